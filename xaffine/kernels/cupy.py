"""The kernel for CuPy: cuBLAS products into place, and nothing that waits for the device.

Not yet measured on a GPU; what it knows of CuPy is from CuPy's source (14.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import cupy

from xaffine.backends import is_half
from xaffine.kernels import cublaslt

if TYPE_CHECKING:
    from collections.abc import Collection

    Buffers: TypeAlias = tuple[cupy.ndarray | None, cupy.ndarray | None, cupy.ndarray | None]

__all__ = ["backward", "forward"]

_STRIPED = 512  # rows from which on a sum has two stages
_FLOAT32_SUMS = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, which CuPy does not name


def forward(x: cupy.ndarray, W: cupy.ndarray, b: cupy.ndarray | None, out: cupy.ndarray | None = None) -> cupy.ndarray:
    """y = x W + b."""
    y = _ready(out, (len(x), W.shape[1]), x.dtype)
    if b is not None and cublaslt.fill(y, x, W, b):
        return y
    _product(_dense(x), _dense(W), y)
    return y if b is None else cupy.add(y, b, out=y)


def backward(
    dy: cupy.ndarray, x: cupy.ndarray, W: cupy.ndarray, wanted: Collection[str], out: Buffers = (None, None, None)
) -> Buffers:
    """dx = dy Wᵀ, dW = xᵀ dy and db = Σ over the batch of dy."""
    # All memory first: where it runs out, nothing was written yet. That for the sum is taken as it begins.
    dy = _dense(dy)
    x = _dense(x) if "W" in wanted else x
    W = _dense(W) if "x" in wanted else W
    shapes = (x.shape, W.shape, dy.shape[1:])
    dx, dW, db = (
        _ready(buffer, shape, dy.dtype) if name in wanted else None
        for name, buffer, shape in zip("xWb", out, shapes, strict=True)
    )
    if db is not None:
        _sum_of_rows(dy, db)
    if dx is not None:
        _product(dy, W.T, dx)
    if dW is not None:
        _product(x.T, dy, dW)
    return dx, dW, db


def _ready(buffer: cupy.ndarray | None, shape: tuple[int, ...], dtype: Any) -> cupy.ndarray:
    """What a product can fill without more memory: a contiguous buffer, unless CuPy copies operands on the way."""
    copies = dtype.kind in "iu" or shape == (1, 1)
    return cupy.empty(shape, dtype) if buffer is None or copies or not buffer.flags.c_contiguous else buffer


def _dense(matrix: cupy.ndarray) -> cupy.ndarray:
    """A matrix that cuBLAS reads as it lies; made once, where CuPy would copy it in every product."""
    return matrix if matrix.flags.c_contiguous or matrix.flags.f_contiguous else matrix.copy()


def _product(a: cupy.ndarray, b: cupy.ndarray, out: cupy.ndarray) -> None:
    if len(a) == 1 == b.shape[1] and is_half(a.dtype):
        # A single element: there CuPy rounds each product to half precision before it adds them up.
        out[...] = (a[0].astype(cupy.float32) * b[:, 0].astype(cupy.float32)).sum()
    elif is_half(a.dtype):
        # By default cuBLAS may add up the parts of a long sum in half precision. The mode belongs to the handle of this
        # thread and device, which the user's own products share: it is theirs again afterwards.
        cublas, handle = cupy.cuda.cublas, cupy.cuda.get_cublas_handle()
        mode = cublas.getMathMode(handle)
        cublas.setMathMode(handle, mode | _FLOAT32_SUMS)
        try:
            a.dot(b, out)
        finally:
            cublas.setMathMode(handle, mode)
    else:
        a.dot(b, out)


def _sum_of_rows(dy: cupy.ndarray, out: cupy.ndarray) -> None:
    """Σ over the batch, in float32 for halves.

    CuPy sums the first axis with a block of threads for every 32 columns, which leaves most of a device idle. So √N
    rows at a time are taken as one long row, and then their sums; that also rounds √N times where one sum rounds N
    times. A product with ones would be cut to TF32 where that is allowed, and turn a complex infinity into NaN.
    """
    wide = cupy.dtype("float32") if is_half(dy.dtype) else dy.dtype
    N, m = dy.shape
    if N >= _STRIPED and dy.flags.c_contiguous:
        rows = 1 << N.bit_length() // 2
        whole = N // rows * rows
        parts = cupy.empty((rows + N - whole, m), wide)
        dy[:whole].reshape(N // rows, rows * m).sum(axis=0, dtype=wide, out=parts[:rows].reshape(rows * m))
        parts[rows:] = dy[whole:]
        dy = parts
    if wide == out.dtype:
        dy.sum(axis=0, dtype=wide, out=out)
    else:
        out[...] = dy.sum(axis=0, dtype=wide)
