"""The kernel for CuPy: cuBLAS products into place, and nothing that waits for the device.

Not yet measured on a GPU; what it knows of CuPy is from CuPy's source (14.2).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeAlias

import cupy

if TYPE_CHECKING:
    from collections.abc import Collection

    Buffers: TypeAlias = tuple[cupy.ndarray | None, cupy.ndarray | None, cupy.ndarray | None]

__all__ = ["backward", "forward"]


def forward(x: cupy.ndarray, W: cupy.ndarray, b: cupy.ndarray | None, out: cupy.ndarray | None = None) -> cupy.ndarray:
    """y = x W + b."""
    y = _product(x, W, _ready(out, (len(x), W.shape[1]), x.dtype))
    return y if b is None else cupy.add(y, b, out=y)


def backward(
    dy: cupy.ndarray, x: cupy.ndarray, W: cupy.ndarray, wanted: Collection[str], out: Buffers = (None, None, None)
) -> Buffers:
    """dx = dy Wᵀ, dW = xᵀ dy and db = Σ over the batch of dy."""
    # All memory first: where it runs out, nothing was written yet.
    shapes = (x.shape, W.shape, dy.shape[1:])
    dx, dW, db = (
        _ready(buffer, shape, dy.dtype) if name in wanted else None
        for name, buffer, shape in zip("xWb", out, shapes, strict=True)
    )
    ones = cupy.ones((1, len(dy)), dy.dtype) if db is not None and _multiplies_exactly(dy.dtype) else None
    if dx is not None:
        _product(dy, W.T, dx)
    if dW is not None:
        _product(x.T, dy, dW)
    if db is not None:
        if ones is not None:  # a product with them keeps more of the device busy than a sum over the first axis
            _product(ones, dy, db[None, :])
        else:
            dy.sum(axis=0, dtype=dy.dtype, out=db)
    return dx, dW, db


def _ready(buffer: cupy.ndarray | None, shape: tuple[int, ...], dtype: Any) -> cupy.ndarray:
    """A buffer that cuBLAS can fill: the one given if it is contiguous, else a new one."""
    return buffer if buffer is not None and buffer.flags.c_contiguous else cupy.empty(shape, dtype)


def _multiplies_exactly(dtype: Any) -> bool:
    """Whether cuBLAS multiplies by ones without rounding: not in TF32, which CuPy reads from the environment."""
    return dtype.kind not in "iu" and not (dtype.char in "fF" and int(os.environ.get("CUPY_TF32", "0")) > 0)


def _product(a: cupy.ndarray, b: cupy.ndarray, out: cupy.ndarray) -> cupy.ndarray:
    if len(a) == 1 == b.shape[1] and a.dtype.itemsize == 2 and a.dtype.kind not in "iu":
        # A single element: there CuPy rounds each product to half precision before it adds them up.
        out[...] = (a[0].astype(cupy.float32) * b[:, 0].astype(cupy.float32)).sum()
        return out
    return a.dot(b, out)
