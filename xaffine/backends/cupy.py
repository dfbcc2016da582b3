"""CuPy: cuBLAS products into place, three small kernels beside them, and no wait for the device.

The figures below are microseconds on an H100 with CuPy 14.2.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import TYPE_CHECKING, Any

import array_api_compat
import cupy

from xaffine.backends._memory import Memory
from xaffine.backends.standard import Array, Backend, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from contextlib import AbstractContextManager

__all__ = ["BACKEND", "Cupy"]

_FLOAT32_SUMS = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, which CuPy does not name

_PACK = 8  # bytes that a thread reads or writes at once
_THREADS = 1 << 18  # as many as the largest cards run at the same time
_LARGE, _LONG = 1 << 16, 512  # elements and rows above which a sum has two stages
_EACH = 64  # packs that a thread adds up at least in the first one
_BLOCK, _WIDE = 256, 512  # threads of a block in the last one; columns from which on a block adds up eight of them

_is_half = functools.cache(Backend.is_half)  # which is asked of every product, and takes microseconds

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


class Cupy(Backend):
    """CuPy, on NVIDIA GPUs: it makes arrays on the current device, which need not be that of its operands."""

    name = "cupy"
    namespace = "array_api_compat.cupy"
    halves = ("bfloat16", "float16")
    types = frozenset({cupy.ndarray})

    def why_unusable(self) -> str | None:
        """There is no GPU, or no driver, or one that is older than this CUDA."""
        why = ""
        try:
            if cupy.cuda.runtime.getDeviceCount():
                return None
        except cupy.cuda.runtime.CUDARuntimeError as error:
            why = f" ({error})"
        return (
            f"no CUDA device{why}\nIt needs an NVIDIA GPU, and a driver for its CUDA, which `nvidia-smi` names: "
            '"cupy-cuda13x[ctk]" is for CUDA 13, "cupy-cuda12x[ctk]" for CUDA 12'
        )

    def missing_on(self, device: Any) -> Collection[str]:
        """Before compute capability 8.0 cuBLAS has no bfloat16."""
        device = cupy.cuda.Device() if device is None else device
        return ("bfloat16",) if int(device.compute_capability) < 80 else ()

    def to_numpy(self, array: cupy.ndarray) -> Any:
        """Copy to the host."""
        return array.get()

    def to_device(self, array: cupy.ndarray, device: Any) -> cupy.ndarray:
        """Copy: CuPy copies no memory with gaps from one device to another."""
        with array.device:
            dense = cupy.ascontiguousarray(array)
        return array_api_compat.to_device(dense, device)

    def wait(self, array: cupy.ndarray) -> None:
        """Wait for the device of an array."""
        array.device.synchronize()

    def use_full_precision(self) -> None:
        """Forbid TF32."""
        _compute_in("COMPUTE_TYPE_DEFAULT")

    def use_tf32(self) -> None:
        """Allow TF32."""
        _compute_in("COMPUTE_TYPE_TF32")

    def stopwatch(self, device: Any) -> Any:
        """By events in the queue of the device, which becomes the current one."""
        device.use()
        return self._by_events(device, cupy.cuda.Event, cupy.cuda.get_elapsed_time)

    def facts(self, array: Any) -> tuple[Any, ...] | None:
        """Dtype, shape, device, and whether cuBLAS reads it; only of CuPy's own type."""
        if type(array) is not cupy.ndarray:
            return None
        return array.dtype, array.shape, array.device.id, _is_dense(array)

    def device_of(self, array: cupy.ndarray) -> Any:
        """The GPU."""
        return array.device

    def on_device_of(self, array: cupy.ndarray) -> AbstractContextManager[Any]:
        """Its device."""
        return array.device  # type: ignore[no-any-return]

    def why_not_writable(self, array: cupy.ndarray) -> None:
        """CuPy has no read-only arrays."""

    def memory_of(self, array: cupy.ndarray) -> Memory:
        """Its addresses on the GPU."""
        contiguous = array.flags.c_contiguous
        return Memory(array.data.ptr, array.shape, array.strides, array.itemsize, contiguous=contiguous)

    def reshape(self, array: cupy.ndarray, shape: tuple[int, ...]) -> cupy.ndarray:
        """All extents are known."""
        return array.reshape(shape)

    def run(self, step: Callable[..., Result], plan: Any, *arrays: Any) -> Result:
        """Compute on the device of the operands."""
        with arrays[0].device:
            return step(plan, *arrays)

    def is_readable(self, matrix: cupy.ndarray) -> bool:
        """Whether it has no gaps."""
        return _is_dense(matrix)

    def readable(self, matrix: Array) -> Array:
        """A copy of a matrix with gaps, which CuPy would make in every product."""
        return matrix if _is_dense(matrix) else matrix.copy()

    def buffer(self, out: cupy.ndarray, shape: tuple[int, ...] | None, dtype: Any) -> cupy.ndarray | None:
        """A contiguous one, unless CuPy copies operands on the way: those of integers, and for a single element."""
        shape = out.shape if shape is None else shape
        if out.dtype != dtype or dtype.kind in "iu" or shape == (1, 1) or not out.flags.c_contiguous:
            return None
        return out.reshape(shape)

    def product(
        self, a: cupy.ndarray, c: cupy.ndarray, bias: cupy.ndarray | None = None, out: cupy.ndarray | None = None
    ) -> cupy.ndarray:
        """By cuBLAS, with halves added up in float32, and the bias by a kernel."""
        y = cupy.empty((len(a), c.shape[1]), a.dtype) if out is None else out
        if len(a) == 1 == c.shape[1] and _is_half(a.dtype):
            # A single element: there CuPy rounds each product to half precision before it adds them up.
            y[...] = (a[0].astype(cupy.float32) * c[:, 0].astype(cupy.float32)).sum()
        elif _is_half(a.dtype):
            # By default cuBLAS may add up the parts of a long sum in half precision. The mode belongs to the handle of
            # this thread and device, which the user's own products share: it is theirs again afterwards.
            cublas, handle = cupy.cuda.cublas, cupy.cuda.get_cublas_handle()
            mode = cublas.getMathMode(handle)
            cublas.setMathMode(handle, mode | _FLOAT32_SUMS)
            try:
                a.dot(c, y)
            finally:
                cublas.setMathMode(handle, mode)
        else:
            a.dot(c, y)
        if bias is not None:
            if y.size and _is_aligned(y):
                _add_to_rows(bias, y, size=_whole_rows(y, _THREADS))
            else:
                cupy.add(y, bias, out=y)
        return y

    def sum_rows(self, a: cupy.ndarray, out: cupy.ndarray | None = None) -> cupy.ndarray:
        """In float32 for halves, and in two stages for many rows.

        CuPy sums the first axis with a block of threads for every 32 columns, which leaves most of a device idle: 1,610
        at (65536, 4096) in float32, 390 in two stages. The shorter sums are also rounded less. A product with ones
        would be cut to TF32 where that is allowed, and turn a complex infinity into NaN.
        """
        out = cupy.empty(a.shape[1:], a.dtype) if out is None else out
        if a.size > _LARGE and len(a) > _LONG and a.flags.c_contiguous:
            a = _partial_sums(a if _is_aligned(a) else a.copy())
        if m := len(out):
            add_up = _add_up_to_half if _is_half(out.dtype) else _add_up
            add_up(a, out, size=_BLOCK * (m if m < _WIDE else -(-m // 8)), block_size=_BLOCK)
        return out


def _compute_in(name: str) -> None:
    linalg = importlib.import_module("cupy._core._routines_linalg")
    linalg.set_compute_type(cupy.float32, getattr(linalg, name))


def _is_dense(array: cupy.ndarray) -> bool:
    """Whether cuBLAS reads a matrix as it lies."""
    return bool(array.flags.c_contiguous or array.flags.f_contiguous)


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


BACKEND = Cupy()
