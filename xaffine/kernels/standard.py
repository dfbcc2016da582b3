"""The implementation: the products of the layer on the array API standard alone.

The derivatives are of a scalar L, with ``dy`` = ∂L/∂y. In indices, y_ij = Σ_k x_ik W_kj + b_j, so that

    ∂L/∂x_ik = Σ_j dy_ij W_kj      ∂L/∂W_kj = Σ_i x_ik dy_ij      ∂L/∂b_j = Σ_i dy_ij
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from array_api_compat import is_dask_array, is_jax_array, is_pydata_sparse_array

from xaffine.backends import is_half, namespace_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from xaffine.backends import Array

__all__ = ["backward", "backward_W", "backward_b", "backward_x", "forward", "sum_along"]

_STRETCHES = 64
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
    """dW = xᵀ dy: (N, m), (N, n) to (n, m)."""
    xp = namespace_of(dy)
    return xp.matmul(xp.matrix_transpose(x), dy)


def backward_b(dy: Array) -> Array:
    """db = Σ over the batch of dy: (N, m) to (m,)."""
    xp, dtype = namespace_of(dy), dy.dtype
    # A running sum in half precision stops growing at 1/u: 4096 ones would add up to 2048 in float16.
    wide = xp.float32 if is_half(dtype) else dtype
    total = sum_along(dy, 0, wide)
    return total if wide == dtype else xp.astype(total, dtype)


def sum_along(array: Array, axis: int, dtype: Any) -> Array:
    """Σ along an axis, in a dtype: a term is rounded at most 63 (1 + log₆₄ N) times, where a running sum takes N.

    Each round adds 64 stretches of the axis to each other, and what does not fill them waits for the next. JAX, Dask
    and sparse sum in trees of their own, and the first two would have to move the terms of an axis that they split.
    """
    xp = namespace_of(array)
    terms = array.shape[axis]
    if not (is_jax_array(array) or is_dask_array(array) or is_pydata_sparse_array(array)):
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
