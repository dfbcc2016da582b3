"""Gradients of each sample, and what is computed from them without holding them: norms and clipped sums.

A sample is one element of the first batch axis of x: x_i (T, n) with dy_i (T, m), where T is the product of the other
batch axes, 1 if there are none. Its gradients are

    dW_i = x_iᵀ dy_i        db_i = Σ over T of dy_i

Without a batch axis the whole x is the one sample.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat

from xaffine.backends import Array, device_of, is_half, is_of_kind, namespace_of, on_device_of
from xaffine.functional import Gradients
from xaffine.kernels import compiler_for, kernel_of, standard
from xaffine.meshes import automatic, split_of
from xaffine.shapes import Operands, cast, check, check_cotangent, describe, flatten, reshape

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
    with on_device_of(x):
        samples, gradients = (cast(xp, each, _wide(xp, dtype)) for each in _as_samples(xp, operands, dy))
        dW, db = _of_each(xp, samples, gradients), xp.sum(gradients, axis=1, dtype=gradients.dtype)
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

    Samples are scaled by powers of two first, so that no square leaves the range: a norm is infinite only where it is
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
    ever held. A sample with a NaN or an infinity makes the sums NaN; so does one whose gradient must have an infinite
    element, its norm being too large.

    Where the terms of dW_i or db_i cancel, rounding could make a norm too small. The norm that c_i is computed from
    therefore has a bound of that added, which is nothing with one batch axis. What a sample adds, x_iᵀ (c_i dy_i) and
    Σ c_i dy_i with c_i dy_i as rounded, has in exact arithmetic a norm of at most ``(1 + δ) max_norm``, with
    δ = 8 u + (n + m + 2 T) 2⁻⁵³ and the unit roundoff u of the dtype computed in (float32 for halves): below 10⁻⁶ while
    n + m + 2 T is below 2³⁰. So in exact arithmetic adding or removing one sample changes (dW, db) by at most
    ``(1 + δ) max_norm`` in the Euclidean norm, and replacing one by at most twice that. Adding the samples up rounds as
    in `xaffine.affine_backward`, and how it rounds may depend on all samples: this, and products that underflow, are
    not part of the guarantee.

    A sample whose terms cancel is clipped more than it need be, as if its norm were larger by up to ε M, where M² is
    (‖x_i‖² + T) ‖dy_i‖², without T where b is None, and ε = 3·10⁻⁶ for float32 with n, m and T up to a thousand, by
    Gram matrices also for float64. Without float64 (JAX by default) 2⁻²⁴ takes the place of 2⁻⁵³, ε is (T + 4) 2⁻²³
    (four times that for complex numbers), and float32 products must be computed as such, not in TF32.

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
    with on_device_of(x):
        norms = [
            _block_by_block(_scaled_back, *block, [(1, 1)], bias=b is not None)[0][:, 0, 0]
            for block in _blocks(xp, operands, dy)
        ]
        together = norms[0] if len(norms) == 1 else xp.concat(norms)
        return together if operands.n_batch_axes else reshape(xp, together, ())


def _clipped_sums(
    dy: Array, x: Array, W: Array, b: Array | None, n_batch_axes: int | None, max_norm: float
) -> Gradients:
    operands, xp = check(x, W, b, n_batch_axes), namespace_of(x)
    dW: Any = None
    db: Any = None
    with on_device_of(x):
        for samples, gradients in _blocks(xp, operands, dy):
            (_, T, n), m = samples.shape, gradients.shape[2]
            shapes = [(T, n), (T, m), (T, m)][: 2 + (b is not None)]
            some_x, some_dy, *for_b = _block_by_block(
                _clipped, samples, gradients, shapes, bias=b is not None, max_norm=max_norm
            )
            of_W = standard.backward_W(_rows(xp, some_dy), _rows(xp, some_x))
            dW = of_W if dW is None else dW + of_W
            for rows in for_b:
                of_b = standard.backward_b(_rows(xp, rows))
                db = of_b if db is None else db + of_b
        return Gradients(None, cast(xp, dW, W.dtype), None if b is None else cast(xp, db, b.dtype))


def _block_by_block(
    function: Callable[..., list[Array]], x: Array, dy: Array, shapes: list[tuple[int, int]], **options: Any
) -> list[Array]:
    """Call a function of samples that gives arrays of those shapes a sample; in Dask as one task for each block."""
    by_block = getattr(kernel_of(x, dy), "by_block", None)
    return function(x, dy, **options) if by_block is None else by_block(partial(function, **options), x, dy, shapes)


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
    dtype = _wide(xp, xp.result_type(samples.dtype, gradients.dtype))
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
    return _products(xp, xp.matrix_transpose(samples), gradients)


class _Scaled(NamedTuple):
    """Samples, divided by powers of two so that no square leaves the range, with the norms of their gradients."""

    x: Array
    dy: Array
    of_x: Array
    of_dy: Array
    """What each x_i and dy_i was divided by: (N,), in the real dtype of x and dy."""
    scales: tuple[Array, Array]
    """Two factors with the product of the two, both at least 1 or both at most 1: (N,), in the dtype of the norms."""
    norm: Array
    """The norm of each scaled gradient."""
    bound: Array
    """What that norm is at most, whatever rounding did to it and will do to dy."""


def _scaled(x: Array, dy: Array, *, bias: bool) -> _Scaled:
    """Scale samples (N, T, n) and (N, T, m), and compute the norms; the scaled b has gradients Σ dy / of_x."""
    xp = namespace_of(x)
    of_x, of_dy = _power_of_two(xp, x), _power_of_two(xp, dy)
    ones = xp.ones_like(of_x)
    if bias:  # which stands beside x as a column of ones
        of_x = xp.where(of_x < 1, ones, of_x)
    x, dy = x / of_x[:, None, None], dy / of_dy[:, None, None]
    has_wide = "float64" in xp.__array_namespace_info__().dtypes()
    wide = xp.float64 if has_wide else of_x.dtype
    norm, bound = _norms(xp, x, dy, 1 / cast(xp, of_x, wide) if bias else None, wide)
    wide_x, wide_dy = cast(xp, of_x, wide), cast(xp, of_dy, wide)
    opposite = (of_x > 1) & (of_dy < 1) | (of_x < 1) & (of_dy > 1)
    ones = xp.ones_like(wide_x)
    scales = wide_x * xp.where(opposite, wide_dy, ones), xp.where(opposite, ones, wide_dy)
    return _Scaled(x, dy, of_x, of_dy, scales, norm, bound)


def _power_of_two(xp: ModuleType, array: Array) -> Array:
    """For each sample a power of two by which to divide it, so that Σ |a| comes near 1; it is 1 for usual samples.

    In float32 sums between 2⁻¹⁸ and 2¹⁸ stay as they are, and others come to between 2⁻¹⁸ and 2²⁰, or as near as they
    can; in float64 the exponents are eight times as large.
    """
    is_complex = is_of_kind(xp, array.dtype, "complex floating")
    parts = [xp.abs(part) for part in ((xp.real(array), xp.imag(array)) if is_complex else (array,))]
    width = 9 * math.frexp(float(xp.finfo(parts[0].dtype).max))[1] // 64
    # A sum, since there is no largest value of nothing; smaller by a factor, since it must not overflow.
    total = sum(xp.sum(part * 4.0**-width, axis=(1, 2), dtype=part.dtype) for part in parts)
    scale = xp.ones_like(total)
    for j in (1, 3, 5):
        smaller = xp.where(total < 2.0 ** (-width * (j + 2)), scale * 4.0**-width, scale)
        scale = xp.where(total > 2.0 ** (width * (j - 2)), scale * 4.0**width, smaller)
    return scale


def _norms(xp: ModuleType, x: Array, dy: Array, one: Array | None, wide: Any) -> tuple[Array, Array]:
    """√(‖dW_i‖² + ‖db_i · one‖²) of every sample, without the second term where `one` is None; and what it is at most.

    With one row a sample nothing cancels, and a relative error is all there is. Else let M = ‖[x, one]‖ ‖dy‖, which is
    at least the sum of the absolute values of whatever is added up. With c = 1, or 4 for complex numbers,

    - dW_i is off by at most γ_cT M, and so is db_i;
    - Gram matrices give the square with an error of at most γ_k M², k = c (n + m + 2 T + 4): too much in float32;
    - rounding each element of c_i dy_i twice changes the gradient by at most γ_2 M in the dtype of dy.

    The terms below are about twice as large, since M and they themselves are rounded.
    """
    (_, T, n), m = x.shape, dy.shape[2]
    of_x, of_dy = (xp.sum(_squares(xp, array, wide), axis=1) for array in (x, dy))
    if one is not None:
        of_x = of_x + T * one * one
    together = xp.sqrt(of_x) * xp.sqrt(of_dy)
    if T == 1:
        return together, together
    c = 4 if is_of_kind(xp, x.dtype, "complex floating") else 1
    u, own = (float(xp.finfo(dtype).eps) / 2 for dtype in (wide, x.dtype))
    x, dy = (cast(xp, array, xp.result_type(array.dtype, wide)) for array in (x, dy))
    slack = 0.0
    if wide == xp.float64 and T * (n + m) < n * m:
        total = xp.sum(xp.sum(_real(xp, _gram(xp, x) * _gram(xp, dy)), axis=2), axis=1)
        total = xp.where(total < 0, xp.zeros_like(total), total)  # what rounding may make of a zero
        slack = 2 * c * (n + m + 2 * T + 4) * u
    else:
        total = xp.sum(_squares(xp, _of_each(xp, x, dy), wide), axis=1)
    if one is not None:
        total = total + _squares(xp, xp.sum(dy, axis=1, dtype=dy.dtype), wide) * one * one
    most = total + slack * of_x * of_dy if slack else total
    return xp.sqrt(total), xp.sqrt(most) + (2 * c * (T + 2) * u + 4 * own) * together


def _exceeds(xp: ModuleType, norm: Array, scales: tuple[Array, Array], limit: float) -> Array:
    """Whether norms of scaled samples exceed a limit; without leaving the range, so that nothing warns."""
    ones = xp.ones_like(norm)
    bound = ones * limit
    for scale in scales:
        norm, bound = norm * xp.where(scale < 1, scale, ones), bound / xp.where(scale > 1, scale, ones)
    return norm > bound


def _scaled_back(x: Array, dy: Array, *, bias: bool) -> list[Array]:
    """The norms of the gradients, (N, 1, 1)."""
    scaled = _scaled(x, dy, bias=bias)
    norms = scaled.norm * scaled.scales[0] * scaled.scales[1]
    return [cast(namespace_of(x), norms, scaled.of_x.dtype)[:, None, None]]


def _clipped(x: Array, dy: Array, *, bias: bool, max_norm: float) -> list[Array]:
    """x and dy of every sample whose products are its clipped gradients; and with a bias the dy whose sums are."""
    xp = namespace_of(x)
    x, dy, of_x, of_dy, scales, _, bound = _scaled(x, dy, bias=bias)
    clips, finite = _exceeds(xp, bound, scales, max_norm), bound < math.inf
    if (size := (x.shape[2] + bias) * dy.shape[2]) > 0:  # a norm so large that an element is infinite
        largest = float(xp.finfo(of_x.dtype).max)
        finite = finite & ~_exceeds(xp, bound / math.sqrt(size), scales, largest)
    ones = xp.ones_like(bound)
    share = xp.where(clips, 1 / xp.where(clips, bound, ones), cast(xp, of_dy, bound.dtype))
    share = cast(xp, xp.where(finite, share, ones * math.nan), of_x.dtype)
    most = cast(xp, xp.where(clips & finite, ones * max_norm, ones), of_x.dtype)
    ones = xp.ones_like(of_x)
    dy = dy * share[:, None, None] * most[:, None, None]
    by_W = [x * xp.where(clips, ones, of_x)[:, None, None], dy]
    return [*by_W, dy / xp.where(clips, of_x, ones)[:, None, None]] if bias else by_W


def _gram(xp: ModuleType, samples: Array) -> Array:
    """The inner products of the rows of every sample: (N, T, T)."""
    conjugate = xp.conj(samples) if is_of_kind(xp, samples.dtype, "complex floating") else samples
    return _products(xp, samples, xp.matrix_transpose(conjugate))


def _products(xp: ModuleType, first: Array, second: Array) -> Array:
    """The product of each pair of matrices in two stacks."""
    if first.shape[0] == 0:  # the sparse library multiplies no empty stacks
        return xp.zeros((*first.shape[:2], second.shape[2]), dtype=first.dtype, device=device_of(first))
    return xp.matmul(first, second)


def _squares(xp: ModuleType, array: Array, dtype: Any) -> Array:
    """Σ |a|² over the last axis, added up in a real dtype."""
    if is_of_kind(xp, array.dtype, "complex floating"):
        return _squares(xp, xp.real(array), dtype) + _squares(xp, xp.imag(array), dtype)
    return xp.sum(array * array, axis=-1, dtype=dtype)


def _real(xp: ModuleType, array: Array) -> Array:
    return xp.real(array) if is_of_kind(xp, array.dtype, "complex floating") else array


def _rows(xp: ModuleType, samples: Array) -> Array:
    """The rows of all samples, one after the other."""
    N, T, columns = samples.shape
    return samples[:, 0, :] if T == 1 else reshape(xp, samples, (N * T, columns))
