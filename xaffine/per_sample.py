"""Gradients of each sample, and what is computed from them without holding them: norms and clipped sums.

A sample is one element of the first batch axis of x: x_i (T, n) with dy_i (T, m), where T is the product of the other
batch axes, 1 if there are none. Its gradients are

    dW_i = x_iᵀ dy_i        db_i = Σ over T of dy_i

Without a batch axis the whole x is the one sample.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat

from xaffine.backends import Array, device_of, is_half, is_of_kind, namespace_of, on_device_of
from xaffine.functional import Gradients
from xaffine.kernels import standard
from xaffine.meshes import automatic, split_of
from xaffine.shapes import Operands, cast, check, check_cotangent, describe, flatten, reshape

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

__all__ = ["PerSampleGradients", "clipped_gradients", "per_sample_gradient_norms", "per_sample_gradients"]

_ELEMENTS = 2**20  # of x, dy and what is computed of them at a time: some MiB


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
    xp = namespace_of(x)
    with on_device_of(x):
        norms = [_norms(xp, samples, gradients, bias=b is not None) for samples, gradients in _blocks(xp, operands, dy)]
        together = norms[0] if len(norms) == 1 else xp.concat(norms)
        return together if operands.n_batch_axes else reshape(xp, together, ())


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
    ever held. A sample whose gradient has a NaN or an infinity makes the sums NaN.

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
    operands, _ = _checked(dy, x, W, b, n_batch_axes, floating=True)
    if (call := automatic(dy=dy, x=x, W=W, b=b)) is not None:
        return call(
            partial(clipped_gradients, max_norm=max_norm, n_batch_axes=n_batch_axes),
            Gradients(None, split_of(W), None if b is None else split_of(b)),
        )
    xp = namespace_of(x)
    dW: Any = None
    db: Any = None
    with on_device_of(x):
        for samples, gradients in _blocks(xp, operands, dy):
            norms = _norms(xp, samples, gradients, bias=b is not None)
            ones = xp.ones_like(norms)
            weights = xp.where(norms > max_norm, max_norm / xp.where(norms > max_norm, norms, ones), ones)
            clipped = gradients * xp.astype(weights, gradients.dtype)[:, None, None]
            rows = _rows(xp, clipped)
            sums = standard.backward_W(rows, _rows(xp, samples)), standard.backward_b(rows)
            dW, db = sums if dW is None else (dW + sums[0], db + sums[1])
        return Gradients(None, cast(xp, dW, W.dtype), None if b is None else cast(xp, db, b.dtype))


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
    """The dtype to compute in: squares of halves leave their range."""
    return xp.float32 if is_half(dtype) else dtype


def _as_samples(xp: ModuleType, operands: Operands, dy: Array) -> tuple[Array, Array]:
    """Bring x to (N, T, n) and dy to (N, T, m); N is 1 without a batch axis."""
    k = operands.n_batch_axes
    if k < 2:  # also where N is not known yet
        return flatten(xp, operands.x, k)[:, None, :], flatten(xp, dy, k)[:, None, :]
    (N, *others), (n, m) = operands.x.shape[:k], operands.W.shape
    T = math.prod(others)
    return reshape(xp, operands.x, (N, T, n)), reshape(xp, dy, (N, T, m))


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


def _norms(xp: ModuleType, samples: Array, gradients: Array, *, bias: bool) -> Array:
    """√(‖dW_i‖² + ‖db_i‖²) of every sample."""
    _, T, n = samples.shape
    m = gradients.shape[2]
    if T == 1:
        of_x, of_dy = _squares(xp, samples, 2)[:, 0], _squares(xp, gradients, 2)[:, 0]
        return xp.sqrt(of_dy) * xp.sqrt(of_x + 1 if bias else of_x)
    if T * (n + m) < n * m:
        total = xp.sum(_real(xp, _gram(xp, samples) * _gram(xp, gradients)), axis=(1, 2))
        total = xp.where(total < 0, xp.zeros_like(total), total)  # what rounding may make of a zero
    else:
        total = _squares(xp, _of_each(xp, samples, gradients), (1, 2))
    if bias:
        total = total + _squares(xp, xp.sum(gradients, axis=1, dtype=gradients.dtype), 1)
    return xp.sqrt(total)


def _gram(xp: ModuleType, samples: Array) -> Array:
    """The inner products of the rows of every sample: (N, T, T)."""
    conjugate = xp.conj(samples) if is_of_kind(xp, samples.dtype, "complex floating") else samples
    return _products(xp, samples, xp.matrix_transpose(conjugate))


def _products(xp: ModuleType, first: Array, second: Array) -> Array:
    """The product of each pair of matrices in two stacks."""
    if first.shape[0] == 0:  # the sparse library multiplies no empty stacks
        return xp.zeros((*first.shape[:2], second.shape[2]), dtype=first.dtype, device=device_of(first))
    return xp.matmul(first, second)


def _squares(xp: ModuleType, array: Array, axis: int | tuple[int, ...]) -> Array:
    """Σ |a|²."""
    if is_of_kind(xp, array.dtype, "complex floating"):
        return _squares(xp, xp.real(array), axis) + _squares(xp, xp.imag(array), axis)
    return xp.sum(array * array, axis=axis, dtype=array.dtype)


def _real(xp: ModuleType, array: Array) -> Array:
    return xp.real(array) if is_of_kind(xp, array.dtype, "complex floating") else array


def _rows(xp: ModuleType, samples: Array) -> Array:
    """The rows of all samples, one after the other."""
    N, T, columns = samples.shape
    return samples[:, 0, :] if T == 1 else reshape(xp, samples, (N * T, columns))
