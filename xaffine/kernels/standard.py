"""The implementation: the four products of the layer on the array API standard alone.

Operands are 2-D arrays (``b`` is 1-D) of one dtype; ``xp`` is their namespace. The derivatives are of a
scalar L, with ``dy`` = ∂L/∂y. In indices, y_ij = Σ_k x_ik W_kj + b_j, so that

    ∂L/∂x_ik = Σ_j dy_ij W_kj      ∂L/∂W_kj = Σ_i x_ik dy_ij      ∂L/∂b_j = Σ_i dy_ij
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from xaffine.backends import Array

__all__ = ["backward_W", "backward_b", "backward_x", "forward"]


def forward(xp: ModuleType, x: Array, W: Array, b: Array | None) -> Array:
    """y = x W + b: (N, n), (n, m), (m,) to (N, m)."""
    y = xp.matmul(x, W)
    return y if b is None else xp.add(y, b)


def backward_x(xp: ModuleType, dy: Array, W: Array) -> Array:
    """dx = dy Wᵀ: (N, m), (n, m) to (N, n)."""
    return xp.matmul(dy, xp.matrix_transpose(W))


def backward_W(xp: ModuleType, x: Array, dy: Array) -> Array:
    """dW = xᵀ dy: (N, n), (N, m) to (n, m)."""
    return xp.matmul(xp.matrix_transpose(x), dy)


def backward_b(xp: ModuleType, dy: Array) -> Array:
    """db = Σ over the batch of dy: (N, m) to (m,)."""
    dtype = dy.dtype
    if xp.isdtype(dtype, "real floating") and xp.finfo(dtype).bits <= 16:
        # A running sum in half precision stops growing at 1/u: 4096 ones would add up to 2048 in float16.
        return xp.astype(xp.sum(dy, axis=0, dtype=xp.float32), dtype)
    return xp.sum(dy, axis=0, dtype=dtype)
