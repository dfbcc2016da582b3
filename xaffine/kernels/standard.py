"""The implementation: the products of the layer on the array API standard alone.

The derivatives are of a scalar L, with ``dy`` = ∂L/∂y. In indices, y_ij = Σ_k x_ik W_kj + b_j, so that

    ∂L/∂x_ik = Σ_j dy_ij W_kj      ∂L/∂W_kj = Σ_i x_ik dy_ij      ∂L/∂b_j = Σ_i dy_ij
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xaffine.backends import is_half, namespace_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from xaffine.backends import Array

__all__ = ["backward", "backward_W", "backward_b", "backward_x", "forward"]

_NO_BUFFERS = (None, None, None)


def forward(x: Array, W: Array, b: Array | None, out: Array | None = None) -> Array:  # noqa: ARG001 - not fillable
    """y = x W + b: (N, n), (n, m), (m,) to (N, m)."""
    xp = namespace_of(x)
    y = xp.matmul(x, W)
    return y if b is None else xp.add(y, b)


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
    if is_half(dtype):
        # A running sum in half precision stops growing at 1/u: 4096 ones would add up to 2048 in float16.
        return xp.astype(xp.sum(dy, axis=0, dtype=xp.float32), dtype)
    return xp.sum(dy, axis=0, dtype=dtype)
