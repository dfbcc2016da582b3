"""The kernel for NumPy: results written where they belong, and tall operands taken block by block.

A block of rows stays in the caches between its product and its bias. The gradients dW of blocks are added up in a wider
dtype, which rounds less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from xaffine.backends import is_half
from xaffine.kernels.standard import sum_along

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from numpy import ndarray

    Buffers: TypeAlias = tuple[ndarray | None, ndarray | None, ndarray | None]

__all__ = ["backward", "forward"]

_SMALL = 8192  # elements of the largest W whose partial gradients cost little beside the products of a block
_TALL = 4096  # the most rows that are never cut, and the rows of a block that is summed
_ROWS = 2048  # the rows of other blocks; half of them where a row of x and y takes more than _LONG bytes
_LONG = 2048
# The dtypes that a BLAS multiplies, and those in which to add up what comes from the blocks.
_WIDE = {np.dtype(own): np.dtype(wide) for own, wide in ("fd", "dd", "FD", "DD")}
# Not for complex dtypes, where one times infinity is infinity and NaN.
_ONES = {np.dtype(own): np.ones(_TALL, own) for own in "fd"}


def forward(x: ndarray, W: ndarray, b: ndarray | None, out: ndarray | None = None) -> ndarray:
    """y = x W + b."""
    if type(x) is not np.ndarray:  # the product of two memory maps would be one, of no file
        x = x.view(np.ndarray)
    if len(x) > _TALL and W.size <= _SMALL and x.dtype in _WIDE:
        y = np.empty((len(x), W.shape[1]), x.dtype) if out is None else out
        bias = None
        for rows in _blocks(len(x), _rows_of_block(W)):
            block = np.matmul(x[rows], W, out=y[rows])
            if b is not None:
                if bias is None:  # repeated for every row, the addition is one long loop
                    bias = np.broadcast_to(b, block.shape).copy()
                block += bias[: len(block)]
        return y
    # Without a buffer, the same product in half the time for small operands.
    y = x.dot(W) if out is None else np.matmul(x, W, out=out)
    if b is not None:
        y += b
    return y


def backward(
    dy: ndarray, x: ndarray, W: ndarray, wanted: Collection[str], out: Buffers = (None, None, None)
) -> Buffers:
    """dx = dy Wᵀ, dW = xᵀ dy and db = Σ over the batch of dy."""
    if type(dy) is not np.ndarray:  # as in forward
        dy = dy.view(np.ndarray)
    dx, dW, db = out
    if len(x) > _TALL and W.size <= _SMALL and x.dtype in _WIDE:
        if "x" in wanted:
            dx = np.empty(x.shape, x.dtype) if dx is None else dx
            for rows in _blocks(len(x), _rows_of_block(W)):
                np.matmul(dy[rows], W.T, out=dx[rows])
        if "W" in wanted:
            total = np.zeros(W.shape, _WIDE[W.dtype])
            for rows in _blocks(len(x), _TALL):
                # The wide operand second: its product is the faster one.
                total += dy[rows].T.dot(x[rows]).T if len(W) > 32 * W.shape[1] else x[rows].T.dot(dy[rows])
            dW = _rounded(total, W.dtype, dW)
    else:
        if "x" in wanted:
            dx = dy.dot(W.T) if dx is None else np.matmul(dy, W.T, out=dx)
        if "W" in wanted:
            dW = x.T.dot(dy) if dW is None else np.matmul(x.T, dy, out=dW)
    if "b" in wanted:
        db = _sum_of_rows(dy, db)
    return dx, dW, db


def _rows_of_block(W: ndarray) -> int:
    return _ROWS if sum(W.shape) * W.itemsize <= _LONG else _ROWS // 2


def _blocks(N: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, N, rows))


def _sum_of_rows(dy: ndarray, out: ndarray | None) -> ndarray:
    ones = _ONES.get(dy.dtype)
    if ones is not None and len(dy) <= _TALL:
        total = ones[: len(dy)].dot(dy)
    else:
        total = sum_along(dy, 0, np.dtype(float) if is_half(dy.dtype) else dy.dtype)
    return _rounded(total, dy.dtype, out)


def _rounded(total: Any, dtype: np.dtype, out: ndarray | None) -> ndarray:
    if out is None:
        out = total if total.dtype is dtype else total.astype(dtype)
    else:
        out[...] = total
    return out
