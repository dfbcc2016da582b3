"""The implementation: the products of the layer on the array API standard alone.

The derivatives are of a scalar L, with ``dy`` = ∂L/∂y. In indices, y_ij = Σ_k x_ik W_kj + b_j, so that

    ∂L/∂x_ik = Σ_j dy_ij W_kj      ∂L/∂W_kj = Σ_i x_ik dy_ij      ∂L/∂b_j = Σ_i dy_ij
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from array_api_compat import is_dask_array, is_jax_array, is_pydata_sparse_array, is_torch_array

from xaffine.backends import is_half, namespace_of

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import ModuleType

    from xaffine.backends import Array

__all__ = ["adds_up_all_rows", "backward", "backward_W", "backward_b", "backward_x", "forward", "sum_along"]

_STRETCHES = 64
_LONG = 16384  # rows from which on a product that would be a running sum is computed in another way
_ROWS = 4096  # of a block
_NARROW = 4  # columns
# Partial products cost little beside those of blocks if they have few elements, or if one operand has few columns.
_SMALL, _FEW = 8192, 16
_NO_BUFFERS = (None, None, None)


def forward(x: Array, W: Array, b: Array | None, out: Array | None = None) -> Array:  # noqa: ARG001 - not fillable
    """y = x W + b: (N, n), (n, m), (m,) to (N, m)."""
    xp = namespace_of(x)
    y = xp.matmul(x, W)
    return y if b is None else xp.add(y, b[None, :])  # of two axes: JAX can be told to broadcast no others


def backward(
    dy: Array,
    x: Array,
    W: Array,
    wanted: Collection[str],
    out: tuple[Array | None, Array | None, Array | None] = _NO_BUFFERS,  # noqa: ARG001 - the standard has no such thing
) -> tuple[Array | None, Array | None, Array | None]:
    """(dx, dW, db), or None in their places."""
    return (
        backward_x(dy, W) if "x" in wanted else None,
        backward_W(dy, x) if "W" in wanted else None,
        backward_b(dy) if "b" in wanted else None,
    )


def backward_x(dy: Array, W: Array) -> Array:
    """dx = dy Wᵀ: (N, m), (n, m) to (N, n)."""
    xp = namespace_of(dy)
    return xp.matmul(dy, xp.matrix_transpose(W))


def backward_W(dy: Array, x: Array) -> Array:
    """dW = xᵀ dy: (N, m), (N, n) to (n, m); or that of every pair in two stacks of them."""
    xp = namespace_of(dy)
    if is_jax_array(x) and x.shape[-2] > _LONG and min(x.shape[-1], dy.shape[-1]) < _NARROW:
        # XLA on a CPU computes a product of so few columns as a running sum, and one with zeros beside them as usual.
        total = xp.matmul(xp.matrix_transpose(_widened(xp, x)), _widened(xp, dy))
        return total[..., : x.shape[-1], : dy.shape[-1]]
    if not adds_up_all_rows(dy, x):
        return xp.matmul(xp.matrix_transpose(x), dy)
    if x.shape[-1] > dy.shape[-1]:  # the wide operand second: its product is the faster one
        return xp.matrix_transpose(backward_W(x, dy))
    whole = x.shape[-2] // _ROWS * _ROWS
    first, second = (
        xp.reshape(each[..., :whole, :], (*each.shape[:-2], whole // _ROWS, _ROWS, each.shape[-1])) for each in (x, dy)
    )
    parts = xp.matmul(xp.matrix_transpose(first), second)
    rest = xp.matmul(xp.matrix_transpose(x[..., whole:, :]), dy[..., whole:, :])
    return xp.add(sum_along(parts, parts.ndim - 3, parts.dtype), rest)


def _widened(xp: ModuleType, matrix: Array) -> Array:
    """A matrix with columns of zeros behind its own, so that it has four or more."""
    missing = max(0, _NARROW - matrix.shape[-1])
    return xp.concat([matrix, xp.zeros((*matrix.shape[:-1], missing), dtype=matrix.dtype)], axis=-1)


def adds_up_all_rows(dy: Array, x: Array) -> bool:
    """Whether xᵀ dy would be a running sum over many rows: MKL's products of narrow operands, for torch, are."""
    if not is_torch_array(x) or is_half(x.dtype) or not (x.dtype.is_floating_point or x.dtype.is_complex):
        return False
    n, m = x.shape[-1], dy.shape[-1]
    dense = str(x.layout) == str(dy.layout) == "torch.strided" and not hasattr(x, "device_mesh")
    narrow = n * m > 0 and (n * m <= _SMALL or min(n, m) < _FEW)
    return dense and narrow and x.device.type == "cpu" and x.shape[-2] > _LONG


def backward_b(dy: Array) -> Array:
    """db = Σ over the batch of dy: (N, m) to (m,)."""
    xp, dtype = namespace_of(dy), dy.dtype
    # A running sum in half precision stops growing at 1/u: 4096 ones would add up to 2048 in float16.
    wide = xp.float32 if is_half(dtype) else dtype
    total = sum_along(dy, 0, wide)
    return total if wide == dtype else xp.astype(total, dtype)


def sum_along(array: Array, axis: int, dtype: Any) -> Array:
    """Σ along an axis, in a dtype: a term is rounded at most 63 (1 + log₆₄ N) times, where a running sum takes N.

    Each round adds 64 stretches of the axis to each other, and what does not fill them waits for the next. JAX and
    sparse sum in trees of their own, and JAX would have to move the terms of an axis that it splits. Of Dask, every
    block is summed so, and then their sums; of a DTensor of torch the parts, where they are.
    """
    xp = namespace_of(array)
    if is_dask_array(array):
        chunks = tuple((1,) * len(sizes) if i == axis else sizes for i, sizes in enumerate(array.chunks))
        array = array.map_blocks(_sum_of_block, axis, dtype, chunks=chunks, meta=array._meta.astype(dtype))
        return xp.sum(array, axis=axis, dtype=dtype)
    terms = array.shape[axis]
    if not (is_jax_array(array) or is_pydata_sparse_array(array) or hasattr(array, "device_mesh")):
        while isinstance(terms, int) and terms > _STRETCHES:
            before, after = array.shape[:axis], array.shape[axis + 1 :]
            length = terms // _STRETCHES
            whole, rest = (
                array[(slice(None),) * axis + (some, ...)]
                for some in (slice(_STRETCHES * length), slice(_STRETCHES * length, None))
            )
            stretches = xp.reshape(whole, (*before, _STRETCHES, length, *after))
            array = xp.concat([xp.sum(stretches, axis=axis, dtype=dtype), xp.astype(rest, dtype)], axis=axis)
            terms = array.shape[axis]
    return xp.sum(array, axis=axis, dtype=dtype)


def _sum_of_block(block: Array, axis: int, dtype: Any) -> Array:
    return namespace_of(block).expand_dims(sum_along(block, axis, dtype), axis=axis)
