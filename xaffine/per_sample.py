"""Gradients of each sample, and what is computed from them without holding them: norms and clipped sums.

A sample is one element of the first batch axis of x: x_i (T, n) with dy_i (T, m), where T is the product of the other
batch axes, 1 if there are none. Its gradients are

    dW_i = x_iᵀ dy_i        db_i = Σ over T of dy_i

Without a batch axis the whole x is the one sample.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, overload

from xaffine._checks import check_with_cotangent
from xaffine._types import DB, DW, Bias, Weights
from xaffine.backends import Array, _describe
from xaffine.functional import Gradients, results

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from xaffine._checks import Plan
    from xaffine._types import Input, Scalar, Unknown
    from xaffine.backends import Backend

__all__ = ["PerSampleGradients", "clipped_gradients", "per_sample_gradient_norms", "per_sample_gradients"]

_ELEMENTS = 2**19  # of x, dy and what is computed of them at a time: some MiB
# Up to which share of the operations of dW_i itself the two Gram matrices are faster. Measured with NumPy: the BLAS
# computes half of a Gram matrix, and two products of few rows cost more than one.
_GRAM, _GRAM_OF_FEW, _LONG = 1.25, 0.5, 64


class PerSampleGradients(NamedTuple, Generic[DW, DB]):
    """The gradients of each sample.

    Attributes
    ----------
    dW : array, shape (N, n, m)
        In the dtype of W.
    db : array, shape (N, m), or None
        In the dtype of b; None without a bias.

    Examples
    --------
    >>> import numpy as np
    >>> each = per_sample_gradients(np.asarray([[1.0], [2.0]]), np.ones((2, 3)), np.ones((3, 1)))
    >>> each.dW.shape, each.dW[1].tolist(), each.db
    ((2, 3, 1), [[2.0], [2.0], [2.0]], None)
    """

    dW: DW
    db: DB

    def __repr__(self) -> str:
        return f"<PerSampleGradients: {_describe(**self._asdict())}>"


# fmt: off
@overload
def per_sample_gradients(dy: Array, x: Array, W: Unknown, b: Array | None = None, /, *,
                         n_batch_axes: int | None = None) -> PerSampleGradients: ...
@overload
def per_sample_gradients(dy: Array, x: Array, W: NDArray[Scalar], b: None = None, /, *,
                         n_batch_axes: int | None = None) -> PerSampleGradients[NDArray[Scalar], None]: ...
@overload
def per_sample_gradients(dy: Array, x: Array, W: NDArray[Scalar], b: NDArray[Scalar] | None, /, *,
                         n_batch_axes: int | None = None) -> PerSampleGradients[NDArray[Scalar], NDArray[Scalar]]: ...
@overload
def per_sample_gradients(dy: Array, x: Array, W: Weights, b: Bias | None = None, /, *,
                         n_batch_axes: int | None = None) -> PerSampleGradients[Weights, Bias]: ...
# fmt: on
def per_sample_gradients(
    dy: Array, x: Array, W: Array, b: Array | None = None, /, *, n_batch_axes: int | None = None
) -> PerSampleGradients:
    """Compute the gradients of each sample: N times the memory of W.

    Parameters
    ----------
    dy, x, W, b, n_batch_axes
        As in `xaffine.affine_backward`. N is the first extent of x; without a batch axis the results have no axis for
        it.

    Returns
    -------
    PerSampleGradients
        ``(dW, db)``, whose sums over the samples are those of `xaffine.affine_backward`.

    Raises
    ------
    TypeError, ValueError
        As `xaffine.affine_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.asarray([[1.0, 2.0], [3.0, 4.0]]), np.asarray([[1.0], [10.0]])
    >>> dW, db = per_sample_gradients(dy, x, np.zeros((2, 1)), np.zeros(1))
    >>> dW.tolist(), db.tolist()
    ([[[1.0], [2.0]], [[30.0], [40.0]]], [[1.0], [10.0]])
    """
    plan = check_with_cotangent(dy, x, W, b, n_batch_axes)
    return plan.backend.run(gradients_of_each, plan, dy, x, W, b)


@results("samples W", "samples b")
def gradients_of_each(plan: Plan, dy: Array, x: Array, W: Array, b: Array | None) -> PerSampleGradients:
    """dW_i = x_iᵀ dy_i and db_i = Σ over T of dy_i."""
    backend = plan.backend
    samples, gradients = (backend.cast(each, backend.wide(plan.dtype)) for each in _as_samples(plan, dy, x))
    dW, db = _of_each(backend, samples, gradients), backend.sum(gradients, 1, gradients.dtype)
    if plan.n_batch_axes == 0:
        dW, db = backend.reshape(dW, W.shape), backend.reshape(db, W.shape[1:])
    return PerSampleGradients(backend.cast(dW, W.dtype), None if b is None else backend.cast(db, b.dtype))


# fmt: off
@overload
def per_sample_gradient_norms(dy: Array, x: Unknown, W: Array, b: Array | None = None, /, *,
                              n_batch_axes: int | None = None) -> Any: ...
@overload
def per_sample_gradient_norms(dy: Array, x: NDArray[Any], W: Array, b: Array | None = None, /, *,
                              n_batch_axes: int | None = None) -> NDArray[np.floating[Any]]: ...
@overload
def per_sample_gradient_norms(dy: Array, x: Input, W: Array, b: Array | None = None, /, *,
                              n_batch_axes: int | None = None) -> Input: ...
# fmt: on
def per_sample_gradient_norms(
    dy: Array, x: Array, W: Array, b: Array | None = None, /, *, n_batch_axes: int | None = None
) -> Array:
    """Compute the Euclidean norm of each sample's gradient by W and b, without the gradients.

    Parameters
    ----------
    dy, x, W, b, n_batch_axes
        As in `per_sample_gradients`; floating. Of W and b only shape and dtype matter.

    Returns
    -------
    array, shape (N,), or () without a batch axis
        √(‖dW_i‖² + ‖db_i‖²), without the second term where b is None; in the real dtype of x and dy, or float32 for
        halves.

    Raises
    ------
    TypeError
        As `xaffine.affine_backward`, and for integers.
    ValueError
        As `xaffine.affine_backward`.

    Notes
    -----
    With one batch axis dW_i is an outer product, whose norm is ‖x_i‖ ‖dy_i‖: O(N (n + m)) operations. With more,
    ‖dW_i‖² = Σ over s and t of ⟨x_is, x_it⟩ ⟨dy_is, dy_it⟩ from two Gram matrices (T, T), or from dW_i itself where
    that is faster. Memory beside the operands is some MiB, or what one sample needs; on lazy libraries it
    is that library's to choose.

    Samples near an end of the range are scaled first, so that no square leaves it: a norm is infinite only where it is
    too large for its dtype. Sums are in float64 wherever the library has it. With one batch axis the relative error
    is below 8 u + (n + m) 2⁻⁵³, where u is the unit roundoff of the result; with more it grows where the terms of
    dW_i and db_i cancel. Without float64 (JAX by default), 2⁻²⁴ takes the place of 2⁻⁵³, and float32 products must be
    computed as such, not in TF32.

    References
    ----------
    I. Goodfellow, "Efficient per-example gradient computations", arXiv:1510.01799 (2015): one batch axis. X. Li et al.,
    "Large language models can be strong differentially private learners", ICLR 2022, section 4: the Gram matrices.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.asarray([[3.0, 4.0], [0.0, 0.0]]), np.asarray([[2.0], [1.0]])
    >>> per_sample_gradient_norms(dy, x, np.zeros((2, 1))).tolist()
    [10.0, 0.0]
    """
    plan = check_with_cotangent(dy, x, W, b, n_batch_axes)
    if plan.kind == "integral":
        _refuse_integers(dy=dy, x=x, W=W)
    return plan.backend.run(norms_of_each, plan, dy, x)


@results("samples")
def norms_of_each(plan: Plan, dy: Array, x: Array) -> Array:
    """√(‖dW_i‖² + ‖db_i‖²), without the second term if there is no bias."""
    backend = plan.backend
    xp = backend.xp
    norms = []
    for samples, gradients in _blocks(plan, dy, x):
        measured = _measure(backend, samples, gradients, bias="b" in plan.wanted)
        norm = measured.norm
        if not isinstance(measured.of_x, float):  # the larger divisor first, so that what is rounded is not subnormal
            large, small = xp.maximum(measured.of_x, measured.of_dy), xp.minimum(measured.of_x, measured.of_dy)
            norm = norm * (large * 2.0**-20) * (small * 2.0**20)  # which keeps the first product in range
        norms.append(backend.cast(norm[:, 0, 0], _real(backend, samples).dtype))
    together = norms[0] if len(norms) == 1 else xp.concat(norms)
    return together if plan.n_batch_axes else backend.reshape(together, ())


def clipped_gradients(
    dy: Array, x: Array, W: Weights, b: Bias | None = None, /, *, max_norm: float, n_batch_axes: int | None = None
) -> Gradients[None, Weights, Bias]:
    """Sum the gradients of the samples, each scaled down to a norm of at most `max_norm`: what DP-SGD adds noise to.

    Parameters
    ----------
    dy, x, W, b, n_batch_axes
        As in `per_sample_gradient_norms`.
    max_norm : float
        The most that the gradient of one sample, by W and b together, may have; above 0.

    Returns
    -------
    Gradients
        ``(None, dW, db)`` with dW = Σ c_i dW_i and db = Σ c_i db_i, c_i = min(1, max_norm / norm_i).

    Raises
    ------
    TypeError, ValueError
        As `per_sample_gradient_norms`; ValueError too if `max_norm` is not above 0.

    Notes
    -----
    The weights c_i go into dy, so that dW is one product xᵀ (c dy), taken block by block; no gradient of a sample is
    ever held. A sample with a NaN or an infinity makes the sums NaN.

    Where the terms of dW_i or db_i cancel, rounding could make a norm too small. The norm that c_i is computed from
    therefore has a bound of its error added, which is nothing with one batch axis. What a sample adds, x_iᵀ (c_i dy_i)
    and Σ c_i dy_i with c_i dy_i as rounded, has in exact arithmetic a norm of at most ``(1 + δ) max_norm``, with
    δ = 8 u + (n + m + 2 T) 2⁻⁵³ and the unit roundoff u of the dtype computed in (float32 for halves): below 10⁻⁶ while
    n + m + 2 T is below 2³⁰. So in exact arithmetic adding or removing one sample changes (dW, db) by at most
    ``(1 + δ) max_norm`` in the Euclidean norm, and replacing one by at most twice that. Adding the samples up rounds as
    in `xaffine.affine_backward`, and how it rounds may depend on all samples: this, and products that underflow, are
    not part of the guarantee.

    A sample whose terms cancel is clipped more than it need be, as if its norm were larger by up to ε M, where M² is
    (‖x_i‖² + T) ‖dy_i‖², without T where b is None, and ε = √(2 (n + m + 2 T) 2⁻⁵³) + 2 (T + 2) 2⁻⁵³ + 4 u, for
    complex numbers twice that: below 3·10⁻⁶ for float32 with n, m and T up to a thousand. Without float64 (JAX by
    default) 2⁻²⁴ takes the place of 2⁻⁵³ in ε and δ, and float32 products must be computed as such, not in TF32.

    References
    ----------
    M. Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.asarray([[3.0, 4.0], [0.0, 1.0]]), np.asarray([[2.0], [1.0]])
    >>> clipped_gradients(dy, x, np.zeros((2, 1)), max_norm=5.0).dW.tolist()  # half of the first, all of the second
    [[3.0], [5.0]]
    """
    if not max_norm > 0:
        msg = f"max_norm must be above 0, not {max_norm!r}"
        raise ValueError(msg)
    plan = check_with_cotangent(dy, x, W, b, n_batch_axes)
    if plan.kind == "integral":
        _refuse_integers(dy=dy, x=x, W=W)
    dW, db = plan.backend.run(clipped_sums, plan, dy, x, W, b, float(max_norm))
    return Gradients(None, dW, db)


@results("W", "b")
def clipped_sums(plan: Plan, dy: Array, x: Array, W: Array, b: Array | None, max_norm: float) -> tuple[Array, Array]:
    """dW = Σ c_i dW_i and db = Σ c_i db_i."""
    backend = plan.backend
    sums: tuple[Any, ...] = ()
    for samples, gradients in _blocks(plan, dy, x):
        clipped = _rows(backend, _clipped(backend, samples, gradients, bias=b is not None, max_norm=max_norm))
        terms = [plan.product(backend.transposed(_rows(backend, samples)), clipped)]
        if b is not None:
            terms.append(plan.sum_rows(clipped))
        sums = tuple(map(operator.add, sums, terms)) if sums else tuple(terms)
    return backend.cast(sums[0], W.dtype), None if b is None else backend.cast(sums[1], b.dtype)


def _refuse_integers(**operands: Array) -> None:
    msg = f"norms are of floating dtype: {_describe(**operands)}. Cast all to float32 or float64 first"
    raise TypeError(msg)


def _as_samples(plan: Plan, dy: Array, x: Array) -> tuple[Array, Array]:
    """Bring x to (N, T, n) and dy to (N, T, m); N is 1 without a batch axis."""
    backend, k = plan.backend, plan.n_batch_axes
    if k < 2:  # also where N is not known yet
        x, dy = (
            (each if shape is None else backend.reshape(each, shape))[:, None, :]
            for each, shape in ((x, plan.x_matrix), (dy, plan.y_matrix))
        )
    else:
        N, *others, m = plan.y_shape
        T = math.prod(others)
        x, dy = backend.reshape(x, (N, T, math.prod(x.shape[k:]))), backend.reshape(dy, (N, T, m))
    return x, backend.aligned(dy, x)


def _blocks(plan: Plan, dy: Array, x: Array) -> Iterator[tuple[Array, Array]]:
    """Yield x and dy of at most `_ELEMENTS` elements, what is computed of them included; of a lazy library all."""
    backend = plan.backend
    samples, gradients = _as_samples(plan, dy, x)
    dtype = backend.wide(backend.promote(samples.dtype, gradients.dtype))
    N, T, n = samples.shape
    m = gradients.shape[2]
    rows = max(1, _ELEMENTS // max(T * (n + m), 1 if T == 1 else n * m, 1))
    if backend.is_lazy(samples) or rows >= N:
        yield backend.cast(samples, dtype), backend.cast(gradients, dtype)
        return
    for start in range(0, N, rows):
        block = slice(start, start + rows)
        yield backend.cast(samples[block, ...], dtype), backend.cast(gradients[block, ...], dtype)


def _of_each(backend: Backend, samples: Array, gradients: Array) -> Array:
    """dW_i = x_iᵀ dy_i of every sample."""
    if samples.shape[1] == 1:  # without products of three axes, which some libraries lack for some dtypes
        return backend.xp.matrix_transpose(samples) * gradients
    return _products(backend, samples, gradients)


class _Measured(NamedTuple):
    """Norms of the gradients of samples, whose x and dy were divided so that no square leaves the range."""

    dy: Array
    """(N, T, m), divided by `of_dy`, in the dtype that the norms are computed in."""
    of_x: Any
    of_dy: Any
    """The divisors, (N, 1, 1); or 1.0 where that dtype has room for the squares of all numbers in the dtype of x."""
    norm: Array
    """(N, 1, 1), of the divided samples."""
    bound: Array
    """What that norm is at most in exact arithmetic, also after each element of dy was rounded."""


def _measure(backend: Backend, x: Array, dy: Array, *, bias: bool) -> _Measured:
    """Compute √(‖dW_i‖² + ‖db_i‖²) of every sample, x_i (T, n) with dy_i (T, m), and a bound of it.

    With one row a sample nothing cancels, and the norm has a small relative error. Else M = ‖[x, 1]‖ ‖dy‖ is at least
    the sum of the absolute values of whatever is added up, so that, with c = 1, or 4 for complex numbers,

    - elements of dW_i and db_i have errors that together are at most γ_cT M;
    - from Gram matrices ‖dW_i‖² has an error of at most γ_k M², k = c (n + m + 2 T);
    - rounding each element of x or dy once changes the gradient by at most u M, u being the unit roundoff of its dtype;
      what is divided is rounded up to four times.

    What is added to the norm is up to twice as much, since M and these terms are rounded, too.
    """
    xp = backend.xp
    (_, T, n), m, dtype = x.shape, dy.shape[2], x.dtype
    wide = xp.result_type(dtype, xp.float64)
    x, dy = backend.cast(x, wide), backend.cast(dy, wide)
    of_x: Any = 1.0
    of_dy: Any = 1.0
    if wide == dtype:
        of_x, of_dy = _divisors(backend, x, tiny=not bias), _divisors(backend, dy)
        x, dy = _quotient(backend, x, of_x), _quotient(backend, dy, of_dy)
    square_of_x, square_of_dy = _squares(backend, x), _squares(backend, dy)
    if bias:
        square_of_x = square_of_x + T * (1 / of_x) ** 2
    M = xp.sqrt(square_of_x) * xp.sqrt(square_of_dy)
    if T == 1:
        return _Measured(dy, of_x, of_dy, M, M)
    u_wide, u = (float(xp.finfo(each).eps) / 2 for each in (wide, dtype))
    c = 4 if _is_complex(backend, dtype) else 1
    slack = 0.0
    if T * (n + m) <= n * m * (_GRAM if T >= _LONG else _GRAM_OF_FEW):
        slack = 2 * c * (n + m + 2 * T) * u_wide
        square = _real(backend, _gram(backend, x) * _gram(backend, dy))
        square = xp.sum(xp.sum(square, axis=2, keepdims=True), axis=1, keepdims=True)
        square = xp.where(square < 0, xp.zeros_like(square), square)  # what rounding may make of a zero
    else:
        square = _squares(backend, _of_each(backend, x, dy))
    if bias:
        square = square + _squares(backend, xp.sum(dy, axis=1, keepdims=True)) * (1 / of_x) ** 2
    upper = square + slack * square_of_x * square_of_dy if slack else square
    return _Measured(dy, of_x, of_dy, xp.sqrt(square), xp.sqrt(upper) + (2 * c * (T + 2) * u_wide + 4 * u) * M)


def _divisors(backend: Backend, samples: Array, *, tiny: bool = True) -> Array:
    """For every sample Σ |a|, or 2⁻¹⁶ of it, where that is near an end of the range; else 1."""
    xp = backend.xp
    sizes, high = xp.abs(samples), float(xp.finfo(samples.dtype).max) ** 0.125  # whose fourth power is far from the end
    ones = xp.ones_like(sizes)
    # Neither sum leaves the range. A largest value will not do, since it is not defined for empty samples.
    large, small = (
        xp.sum(xp.sum(terms, axis=2, keepdims=True), axis=1, keepdims=True)
        for terms in (sizes * 2.0**-16, xp.where(sizes < 1, sizes, ones))
    )
    ones = xp.ones_like(large)
    divisors = xp.where((small < 1 / high) & (small > 0), small, ones) if tiny else ones
    return xp.where((large > 2.0**-16 * high) & (large < math.inf), large, divisors)


def _quotient(backend: Backend, samples: Array, divisors: Array) -> Array:
    """Samples, divided; complex ones away from subnormal numbers, whose reciprocals libraries take on the way."""
    if not _is_complex(backend, samples.dtype):
        return samples / divisors
    xp = backend.xp
    unit = xp.where(divisors < 1, xp.full_like(divisors, 2.0**60), xp.ones_like(divisors))
    return samples * unit / (divisors * unit)


def _clipped(backend: Backend, x: Array, dy: Array, *, bias: bool, max_norm: float) -> Array:
    """c_i dy_i of every sample, where c_i brings its gradient to a norm of at most max_norm; NaN where none does."""
    xp = backend.xp
    divided, of_x, of_dy, _, bound = _measure(backend, x, dy, bias=bias)
    ones = xp.ones_like(bound)
    size = ones * (of_x**0.5 * of_dy**0.5)  # of_x times of_dy may be out of range
    small, large = xp.minimum(size, ones), xp.maximum(size, ones)
    clips = bound * small * small > max_norm / large / large
    weight = xp.where(clips, max_norm / xp.where(clips, ones * of_x, ones), ones * of_dy)
    weight = xp.where(bound < math.inf, weight, ones * math.nan)
    bound = xp.where(clips, bound, ones)
    # Of divided samples weight / bound may be out of range; without divisors it saves one pass over them.
    clipped = divided * (weight / bound) if isinstance(of_x, float) else divided / bound * weight
    return backend.cast(clipped, dy.dtype)


def _gram(backend: Backend, samples: Array) -> Array:
    """The inner products of the rows of every sample: (N, T, T)."""
    xp = backend.xp
    conjugate = xp.conj(samples) if _is_complex(backend, samples.dtype) else samples
    return _products(backend, xp.matrix_transpose(samples), xp.matrix_transpose(conjugate))


def _products(backend: Backend, samples: Array, gradients: Array) -> Array:
    """x_iᵀ dy_i of every pair of matrices in two stacks."""
    return backend.matmul(backend.xp.matrix_transpose(samples), gradients)


def _squares(backend: Backend, samples: Array) -> Array:
    """Σ |a|² of every sample, (N, 1, 1)."""
    return backend.xp.sum(backend.squared_lengths(samples), axis=1, keepdims=True)[:, :, None]


def _real(backend: Backend, array: Array) -> Array:
    return backend.xp.real(array) if _is_complex(backend, array.dtype) else array


def _is_complex(backend: Backend, dtype: Any) -> bool:
    return backend.kind(dtype) == "complex floating"


def _rows(backend: Backend, samples: Array) -> Array:
    """The rows of all samples, one after the other."""
    N, T, columns = samples.shape
    return samples[:, 0, :] if T == 1 else backend.reshape(samples, (N * T, columns))
