"""The kernel for CuPy: cuBLAS products into place, three small kernels beside them, and no wait for the device.

The figures below are microseconds on an H100 with CuPy 14.2.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import cupy

from xaffine import backends

if TYPE_CHECKING:
    from collections.abc import Collection

    Buffers: TypeAlias = tuple[cupy.ndarray | None, cupy.ndarray | None, cupy.ndarray | None]

__all__ = ["backward", "forward"]

_FLOAT32_SUMS = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, which CuPy does not name

_PACK = 8  # bytes that a thread reads or writes at once
_THREADS = 1 << 18  # as many as the largest cards run at the same time
_LARGE, _LONG = 1 << 16, 512  # elements and rows above which a sum has two stages
_EACH = 64  # packs that a thread adds up at least in the first one
_BLOCK, _WIDE = 256, 512  # threads of a block in the last one; columns from which on a block adds up eight of them

_is_half = functools.cache(backends.is_half)  # which is asked of every product, and takes microseconds

# In the next two kernels thread i of n takes the packs i, i + n, i + 2 n, ... of a C-contiguous matrix. So many packs
# are whole rows, so that each thread stays on its columns. The elements after the last whole pack belong to the thread
# that would take the next one.
_PACKS = f"""
template <typename T> struct alignas(sizeof(T) < {_PACK} ? {_PACK} : sizeof(T)) Pack {{
    static const int size = sizeof(T) < {_PACK} ? {_PACK} / sizeof(T) : 1;
    T at[size];
}};
"""

# y += b, in every row. At (4096, 4096) in bfloat16 this takes 16 and cupy.add 75, since it divides the index of every
# element by m.
_add_to_rows = cupy.ElementwiseKernel(
    "raw T b",
    "raw T y",
    """
    const int size = Pack<T>::size;
    Pack<T>* packs = reinterpret_cast<Pack<T>*>(&y[0]);
    const ptrdiff_t whole = y.size() / size, m = b.size();
    T own[size];
    ptrdiff_t column = i * size % m;
    #pragma unroll
    for (int k = 0; k < size; ++k) {
        own[k] = b[column];
        column = column + 1 == m ? 0 : column + 1;
    }
    ptrdiff_t j = i;
    for (; j < whole; j += _ind.size()) {
        Pack<T> pack = packs[j];
        #pragma unroll
        for (int k = 0; k < size; ++k) pack.at[k] = pack.at[k] + own[k];
        packs[j] = pack;
    }
    #pragma unroll
    for (int k = 0; k < size; ++k)
        if (j * size + k < y.size()) y[j * size + k] = y[j * size + k] + own[k];
    """,
    "xaffine_add_to_rows",
    preamble=_PACKS,
)

# What each thread adds up, in the dtype of `parts`; the index of `parts` counts its rows one after the other. Four
# packs are read before the first is added.
_add_rows_up = cupy.ElementwiseKernel(
    "raw T dy",
    "raw S parts",
    """
    const int size = Pack<T>::size;
    const Pack<T>* packs = reinterpret_cast<const Pack<T>*>(&dy[0]);
    const ptrdiff_t whole = dy.size() / size, step = _ind.size();
    S sums[size];
    #pragma unroll
    for (int k = 0; k < size; ++k) sums[k] = S(0);
    ptrdiff_t j = i;
    for (; j + 3 * step < whole; j += 4 * step) {
        Pack<T> four[4];
        #pragma unroll
        for (int l = 0; l < 4; ++l) four[l] = packs[j + l * step];
        #pragma unroll
        for (int l = 0; l < 4; ++l)
            #pragma unroll
            for (int k = 0; k < size; ++k) sums[k] = sums[k] + S(four[l].at[k]);
    }
    for (; j < whole; j += step) {
        const Pack<T> pack = packs[j];
        #pragma unroll
        for (int k = 0; k < size; ++k) sums[k] = sums[k] + S(pack.at[k]);
    }
    #pragma unroll
    for (int k = 0; k < size; ++k) {
        if (j * size + k < dy.size()) sums[k] = sums[k] + S(dy[j * size + k]);
        parts[i * size + k] = sums[k];
    }
    """,
    "xaffine_add_rows_up",
    preamble=_PACKS,
)

# The sums of the columns, each by a block of threads; where there are many, a block takes eight side by side, whose
# elements come in one piece. cupy.sum takes the host 22, this 10.
_ADD_UP = f"""
    typedef SUM Sum;
    __shared__ __align__(16) char memory[{_BLOCK} * sizeof(Sum)];  // bytes, since shared memory constructs nothing
    Sum* const shared = reinterpret_cast<Sum*>(memory);
    const ptrdiff_t m = sums.size(), rows = parts.size() / m;
    const int columns = m < {_WIDE} ? 1 : 8, t = threadIdx.x;
    const ptrdiff_t column = i / {_BLOCK} * columns + t % columns;
    Sum sum = Sum(0);
    if (column < m)
        for (ptrdiff_t row = t / columns; row < rows; row += {_BLOCK} / columns)
            sum = sum + Sum(parts[row * m + column]);
    shared[t] = sum;
    __syncthreads();
    for (int half = {_BLOCK} / 2; half >= columns; half /= 2) {{
        if (t < half) shared[t] = shared[t] + shared[t + half];
        __syncthreads();
    }}
    if (t < columns && column < m) sums[column] = T(shared[t]);
    __syncthreads();  // before the block goes on to other columns
"""
_add_up, _add_up_to_half = (
    cupy.ElementwiseKernel("raw S parts", "raw T sums", _ADD_UP.replace("SUM", dtype), name)
    for name, dtype in (("xaffine_add_up", "T"), ("xaffine_add_up_to_half", "float"))
)


def forward(x: cupy.ndarray, W: cupy.ndarray, b: cupy.ndarray | None, out: cupy.ndarray | None = None) -> cupy.ndarray:
    """y = x W + b."""
    y = _ready(out, (len(x), W.shape[1]), x.dtype)
    _product(_dense(x), _dense(W), y)
    if b is not None:
        _add_bias(y, b)
    return y


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
    if len(a) == 1 == b.shape[1] and _is_half(a.dtype):
        # A single element: there CuPy rounds each product to half precision before it adds them up.
        out[...] = (a[0].astype(cupy.float32) * b[:, 0].astype(cupy.float32)).sum()
    elif _is_half(a.dtype):
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


def _add_bias(y: cupy.ndarray, b: cupy.ndarray) -> None:
    if y.size and _is_aligned(y):
        _add_to_rows(b, y, size=_whole_rows(y, _THREADS))
    else:
        cupy.add(y, b, out=y)


def _sum_of_rows(dy: cupy.ndarray, out: cupy.ndarray) -> None:
    """Σ over the batch, in float32 for halves.

    CuPy sums the first axis with a block of threads for every 32 columns, which leaves most of a device idle: 1,610 at
    (65536, 4096) in float32, 390 in two stages. The shorter sums are also rounded less. A product with ones would be
    cut to TF32 where that is allowed, and turn a complex infinity into NaN.
    """
    if dy.size > _LARGE and len(dy) > _LONG and dy.flags.c_contiguous:
        dy = _partial_sums(dy if _is_aligned(dy) else dy.copy())
    if m := len(out):
        add_up = _add_up_to_half if _is_half(out.dtype) else _add_up
        add_up(dy, out, size=_BLOCK * (m if m < _WIDE else -(-m // 8)), block_size=_BLOCK)


def _partial_sums(dy: cupy.ndarray) -> cupy.ndarray:
    """Sums of rows that lie apart by the number of rows of the result."""
    threads = _whole_rows(dy, min(_THREADS, dy.size // (_EACH * _elements(dy))))
    rows = threads * _elements(dy) // dy.shape[1]
    parts = cupy.empty((rows, dy.shape[1]), "float32" if _is_half(dy.dtype) else dy.dtype)
    _add_rows_up(dy, parts, size=threads)
    return parts


def _elements(array: cupy.ndarray) -> int:
    """The elements of a pack."""
    return max(1, _PACK // int(array.dtype.itemsize))


def _is_aligned(array: cupy.ndarray) -> bool:
    """Whether an array begins where packs may begin."""
    return int(array.data.ptr) % max(_PACK, int(array.dtype.itemsize)) == 0


def _whole_rows(array: cupy.ndarray, threads: int) -> int:
    """About so many threads, no more than there are packs, such that one pack for each makes whole rows."""
    size, m = _elements(array), int(array.shape[1])
    period = m // math.gcd(m, size)
    return period * max(1, min(threads // period, -(-int(array.size) // (size * period))))
