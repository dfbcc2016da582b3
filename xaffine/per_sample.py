"""Gradients of each sample, and what is computed from them without holding them: norms and clipped sums.

A sample is one element of the first batch axis of x: x_i (T, n) with dy_i (T, m), where T is the product of the other
batch axes, 1 if there are none. Its gradients are

    dW_i = x_iᵀ dy_i        db_i = Σ over T of dy_i

Without a batch axis the whole x is the one sample.
"""

from __future__ import annotations

import math
import operator
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat

from xaffine.backends import Array, computing_with, device_of, is_half, is_of_kind, namespace_of
from xaffine.functional import Gradients
from xaffine.kernels import compiler_for, kernel_of
from xaffine.kernels.standard import backward_W, sum_along
from xaffine.meshes import automatic, split_of
from xaffine.shapes import Operands, cast, check, check_cotangent, describe, flatten, promote, reshape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

__all__ = ["PerSampleGradients", "clipped_gradients", "per_sample_gradient_norms", "per_sample_gradients"]

_ELEMENTS = 2**19  # of x, dy and what is computed of them at a time: some MiB


class PerSampleGradients(NamedTuple):
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

    dW: Array
    db: Array | None


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
    operands, dtype = _checked(dy, x, W, b, n_batch_axes)
    if (call := automatic(dy=dy, x=x, W=W, b=b)) is not None:
        rows = split_of(x)[:1] if operands.n_batch_axes else ()
        splits = PerSampleGradients(rows + split_of(W), None if b is None else rows + split_of(b))
        return call(partial(per_sample_gradients, n_batch_axes=n_batch_axes), splits)
    xp = namespace_of(x)
    with computing_with(x):
        samples, gradients = (cast(xp, each, _wide(xp, dtype)) for each in _as_samples(xp, operands, dy))
        dW, db = _of_each(xp, samples, gradients), sum_along(gradients, 1, gradients.dtype)
        if operands.n_batch_axes == 0:
            dW, db = reshape(xp, dW, W.shape), reshape(xp, db, W.shape[1:])
        return PerSampleGradients(cast(xp, dW, W.dtype), None if b is None else cast(xp, db, b.dtype))


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
    that takes fewer operations. Memory beside the operands is some MiB, or what one sample needs; on lazy libraries it
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
    operands, _ = _checked(dy, x, W, b, n_batch_axes, floating=True)
    if (call := automatic(dy=dy, x=x, W=W, b=b)) is not None:
        rows = split_of(x)[:1] if operands.n_batch_axes else ()
        return call(partial(per_sample_gradient_norms, n_batch_axes=n_batch_axes), rows)
    return _compiled(_norms_of, dy, x, W, b)(dy, x, W, b, n_batch_axes)


def clipped_gradients(
    dy: Array,
    x: Array,
    W: Array,
    b: Array | None = None,
    /,
    *,
    max_norm: float,
    n_batch_axes: int | None = None,
) -> Gradients:
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
    _checked(dy, x, W, b, n_batch_axes, floating=True)
    if (call := automatic(dy=dy, x=x, W=W, b=b)) is not None:
        return call(
            partial(clipped_gradients, max_norm=max_norm, n_batch_axes=n_batch_axes),
            Gradients(None, split_of(W), None if b is None else split_of(b)),
        )
    gradients: Gradients = _compiled(_clipped_sums, dy, x, W, b)(dy, x, W, b, n_batch_axes, float(max_norm))
    return gradients


def _compiled(function: Callable[..., Any], *operands: Array | None) -> Callable[..., Any]:
    """That function; compiled where the library of the operands compiles, which saves it a hundred small steps."""
    kinds = {type(operand) for operand in operands if operand is not None}
    compiler = compiler_for(kinds.pop()) if len(kinds) == 1 else None
    return function if compiler is None else _compile(compiler, function)


@cache
def _compile(compiler: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    return compiler(function, static_argnames="n_batch_axes")  # type: ignore[no-any-return]


def _norms_of(dy: Array, x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> Array:
    operands, xp = check(x, W, b, n_batch_axes), namespace_of(x)
    with computing_with(x):
        norms = []
        for samples, gradients in _blocks(xp, operands, dy):
            some = _measure(xp, samples, gradients, bias=b is not None)
            norm = some.norm
            if not isinstance(some.of_x, float):  # the larger divisor first, so that what is rounded is not subnormal
                large, small = xp.maximum(some.of_x, some.of_dy), xp.minimum(some.of_x, some.of_dy)
                norm = norm * (large * 2.0**-20) * (small * 2.0**20)  # which keeps the first product in range
            norms.append(cast(xp, norm[:, 0, 0], _real(xp, samples).dtype))
        together = norms[0] if len(norms) == 1 else xp.concat(norms)
        return together if operands.n_batch_axes else reshape(xp, together, ())


def _clipped_sums(
    dy: Array, x: Array, W: Array, b: Array | None, n_batch_axes: int | None, max_norm: float
) -> Gradients:
    operands, xp = check(x, W, b, n_batch_axes), namespace_of(x)
    wanted = ("W",) if b is None else ("W", "b")
    sums: tuple[Any, ...] = ()
    with computing_with(x):
        for samples, gradients in _blocks(xp, operands, dy):
            clipped = _clipped(xp, samples, gradients, bias=b is not None, max_norm=max_norm)
            matrices = _rows(xp, clipped), _rows(xp, samples), cast(xp, W, samples.dtype)
            some = [of for of in kernel_of(*matrices).backward(*matrices, wanted) if of is not None]
            sums = tuple(map(operator.add, sums, some)) if sums else tuple(some)
        return Gradients(None, cast(xp, sums[0], W.dtype), None if b is None else cast(xp, sums[1], b.dtype))


def _checked(
    dy: Array, x: Array, W: Array, b: Array | None, n_batch_axes: int | None, *, floating: bool = False
) -> tuple[Operands, Any]:
    operands = check(x, W, b, n_batch_axes)
    dtype = check_cotangent(dy, operands)
    if floating and is_of_kind(namespace_of(x), dtype, "integral"):
        msg = f"norms are of floating dtype: {describe(dy=dy, x=x, W=W)}. Cast all to float64, say"
        raise TypeError(msg)
    return operands, dtype


def _wide(xp: ModuleType, dtype: Any) -> Any:
    """The dtype to compute in: sums in halves lose too much."""
    return xp.float32 if is_half(dtype) else dtype


def _as_samples(xp: ModuleType, operands: Operands, dy: Array) -> tuple[Array, Array]:
    """Bring x to (N, T, n) and dy to (N, T, m); N is 1 without a batch axis."""
    k = operands.n_batch_axes
    if k < 2:  # also where N is not known yet
        x, dy = flatten(xp, operands.x, k)[:, None, :], flatten(xp, dy, k)[:, None, :]
    else:
        (N, *others), (n, m) = operands.x.shape[:k], operands.W.shape
        T = math.prod(others)
        x, dy = reshape(xp, operands.x, (N, T, n)), reshape(xp, dy, (N, T, m))
    chunked_as = getattr(kernel_of(x, dy), "chunked_as", None)
    return x, dy if chunked_as is None else chunked_as(x, dy)


def _blocks(xp: ModuleType, operands: Operands, dy: Array) -> Iterator[tuple[Array, Array]]:
    """So many samples at a time that they, and what is computed of them, stay small; of a lazy library all."""
    samples, gradients = _as_samples(xp, operands, dy)
    dtype = _wide(xp, promote(xp, samples.dtype, gradients.dtype))
    N, T, n = samples.shape
    m = gradients.shape[2]
    rows = max(1, _ELEMENTS // max(T * (n + m), 1 if T == 1 else n * m, 1))
    if array_api_compat.is_lazy_array(samples) or rows >= N:
        yield cast(xp, samples, dtype), cast(xp, gradients, dtype)
        return
    for start in range(0, N, rows):
        some = slice(start, start + rows)
        yield cast(xp, samples[some, ...], dtype), cast(xp, gradients[some, ...], dtype)


def _of_each(xp: ModuleType, samples: Array, gradients: Array) -> Array:
    """dW_i = x_iᵀ dy_i of every sample."""
    if samples.shape[1] == 1:  # without products of three axes, which some libraries lack for some dtypes
        return xp.matrix_transpose(samples) * gradients
    return _products(xp, samples, gradients)


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


def _measure(xp: ModuleType, x: Array, dy: Array, *, bias: bool) -> _Measured:
    """Compute √(‖dW_i‖² + ‖db_i‖²) of every sample, x_i (T, n) with dy_i (T, m), and a bound of it.

    With one row a sample nothing cancels, and the norm has a small relative error. Else M = ‖[x, 1]‖ ‖dy‖ is at least
    the sum of the absolute values of whatever is added up, so that, with c = 1, or 4 for complex numbers,

    - elements of dW_i and db_i have errors that together are at most γ_cT M;
    - from Gram matrices ‖dW_i‖² has an error of at most γ_k M², k = c (n + m + 2 T);
    - rounding each element of x or dy once changes the gradient by at most u M, u being the unit roundoff of its dtype;
      what is divided is rounded up to four times.

    What is added to the norm is up to twice as much, since M and these terms are rounded, too.
    """
    (_, T, n), m, own = x.shape, dy.shape[2], x.dtype
    wide = xp.result_type(own, xp.float64)
    x, dy = cast(xp, x, wide), cast(xp, dy, wide)
    of_x: Any = 1.0
    of_dy: Any = 1.0
    if wide == own:
        of_x, of_dy = _divisors(xp, x, tiny=not bias), _divisors(xp, dy)
        x, dy = _quotient(xp, x, of_x), _quotient(xp, dy, of_dy)
    square_of_x, square_of_dy = _squares(xp, x), _squares(xp, dy)
    if bias:
        square_of_x = square_of_x + T * (1 / of_x) ** 2
    M = xp.sqrt(square_of_x) * xp.sqrt(square_of_dy)
    if T == 1:
        return _Measured(dy, of_x, of_dy, M, M)
    u, u_own = (float(xp.finfo(dtype).eps) / 2 for dtype in (wide, own))
    c = 4 if is_of_kind(xp, own, "complex floating") else 1
    slack = 0.0
    if T * (n + m) < n * m:
        slack = 2 * c * (n + m + 2 * T) * u
        square = _real(xp, _gram(xp, x) * _gram(xp, dy))
        square = xp.sum(xp.sum(square, axis=2, keepdims=True), axis=1, keepdims=True)
        square = xp.where(square < 0, xp.zeros_like(square), square)  # what rounding may make of a zero
    else:
        square = _squares(xp, _of_each(xp, x, dy))
    if bias:
        square = square + _squares(xp, xp.sum(dy, axis=1, keepdims=True, dtype=dy.dtype)) * (1 / of_x) ** 2
    most = square + slack * square_of_x * square_of_dy if slack else square
    return _Measured(dy, of_x, of_dy, xp.sqrt(square), xp.sqrt(most) + (2 * c * (T + 2) * u + 4 * u_own) * M)


def _divisors(xp: ModuleType, samples: Array, *, tiny: bool = True) -> Array:
    """For every sample Σ |a|, or 2⁻¹⁶ of it, where that is near an end of the range; else 1."""
    sizes, high = xp.abs(samples), float(xp.finfo(samples.dtype).max) ** 0.125  # whose fourth power is far from the end
    ones = xp.ones_like(sizes)
    # Neither sum leaves the range. A largest value will not do, since it is not defined for empty samples.
    large, small = (
        xp.sum(xp.sum(some, axis=2, keepdims=True), axis=1, keepdims=True)
        for some in (sizes * 2.0**-16, xp.where(sizes < 1, sizes, ones))
    )
    ones = xp.ones_like(large)
    divisors = xp.where((small < 1 / high) & (small > 0), small, ones) if tiny else ones
    return xp.where((large > 2.0**-16 * high) & (large < math.inf), large, divisors)


def _quotient(xp: ModuleType, samples: Array, divisors: Array) -> Array:
    """Samples, divided; complex ones away from subnormal numbers, whose reciprocals libraries take on the way."""
    if not is_of_kind(xp, samples.dtype, "complex floating"):
        return samples / divisors
    unit = xp.where(divisors < 1, xp.full_like(divisors, 2.0**60), xp.ones_like(divisors))
    return samples * unit / (divisors * unit)


def _clipped(xp: ModuleType, x: Array, dy: Array, *, bias: bool, max_norm: float) -> Array:
    """c_i dy_i of every sample, where c_i brings its gradient to a norm of at most max_norm; NaN where none does."""
    divided, of_x, of_dy, _, bound = _measure(xp, x, dy, bias=bias)
    ones = xp.ones_like(bound)
    size = ones * (of_x**0.5 * of_dy**0.5)  # of_x times of_dy may be out of range
    small, large = xp.minimum(size, ones), xp.maximum(size, ones)
    clips = bound * small * small > max_norm / large / large
    weight = xp.where(clips, max_norm / xp.where(clips, ones * of_x, ones), ones * of_dy)
    weight = xp.where(bound < math.inf, weight, ones * math.nan)
    bound = xp.where(clips, bound, ones)
    # Of divided samples weight / bound may be out of range; without divisors it saves one pass over them.
    clipped = divided * (weight / bound) if isinstance(of_x, float) else divided / bound * weight
    return cast(xp, clipped, dy.dtype)


def _gram(xp: ModuleType, samples: Array) -> Array:
    """The inner products of the rows of every sample: (N, T, T)."""
    conjugate = xp.conj(samples) if is_of_kind(xp, samples.dtype, "complex floating") else samples
    return _products(xp, xp.matrix_transpose(samples), xp.matrix_transpose(conjugate))


def _products(xp: ModuleType, samples: Array, gradients: Array) -> Array:
    """x_iᵀ dy_i of every pair of matrices in two stacks."""
    if samples.shape[0] == 0:  # the sparse library multiplies no empty stacks
        shape = (0, samples.shape[2], gradients.shape[2])
        return xp.zeros(shape, dtype=samples.dtype, device=device_of(samples))
    return backward_W(gradients, samples)


def _squares(xp: ModuleType, samples: Array) -> Array:
    """Σ |a|² of every sample, (N, 1, 1)."""
    if array_api_compat.is_dask_array(samples):  # whose vecdot needs to know all extents
        squares = xp.sum(xp.abs(samples) ** 2, axis=2)
    else:
        squares = _real(xp, xp.vecdot(samples, samples))
    return xp.sum(squares, axis=1, keepdims=True)[:, :, None]


def _real(xp: ModuleType, array: Array) -> Array:
    return xp.real(array) if is_of_kind(xp, array.dtype, "complex floating") else array


def _rows(xp: ModuleType, samples: Array) -> Array:
    """The rows of all samples, one after the other."""
    N, T, columns = samples.shape
    return samples[:, 0, :] if T == 1 else reshape(xp, samples, (N * T, columns))
