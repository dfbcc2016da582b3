"""NumPy: results written where they belong, and tall operands taken block by block.

A block of rows stays in the caches between its product and its bias. Products over a long batch are added up from
blocks in a wider dtype, which rounds less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine.backends._memory import Memory
from xaffine.backends.standard import Backend, written

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy import ndarray

__all__ = ["BACKEND", "Numpy"]

_SMALL = 8192  # elements of the largest W whose partial gradients cost little beside the products of a block
_TALL = 4096  # the most rows that are never cut, and the rows of a block that is summed
_ROWS = 2048  # the rows of other blocks; half of them where a row of x and y takes more than _LONG bytes
_LONG = 2048
# The dtypes that a BLAS multiplies, and those in which to add up the products of blocks.
_WIDE = {np.dtype(narrow): np.dtype(wide) for narrow, wide in ("fd", "dd", "FD", "DD")}
# Not for complex dtypes, where one times infinity is infinity and NaN.
_ONES = {np.dtype(dtype): np.ones(_TALL, dtype) for dtype in "fd"}


class Numpy(Backend):
    """NumPy, on the CPU."""

    name = "numpy"
    namespace = "array_api_compat.numpy"
    halves = ("bfloat16", "float16")
    types = frozenset({np.ndarray, np.memmap})

    def facts(self, array: Any) -> tuple[Any, ...] | None:
        """Dtype and shape; only of NumPy's own type."""
        return (array.dtype, array.shape) if type(array) is np.ndarray else None

    def signature(self, *arrays: Any) -> Any:
        """Written out for the usual numbers of arrays: a small product takes no longer than the loop."""
        if len(arrays) == 3:
            x, W, b = arrays
            if type(x) is type(W) is type(b) is np.ndarray:
                return x.dtype, x.shape, W.dtype, W.shape, b.dtype, b.shape
        elif len(arrays) == 1:
            return self.facts(arrays[0])
        elif len(arrays) == 4:
            x, W, b, dy = arrays
            if type(x) is type(W) is type(b) is type(dy) is np.ndarray:
                return x.dtype, x.shape, W.dtype, W.shape, b.dtype, b.shape, dy.dtype, dy.shape
        return super().signature(*arrays)

    def over(self, memory: ndarray) -> ndarray:
        """It is one."""
        return memory

    def device_of(self, array: ndarray) -> str:
        """The CPU."""
        return "cpu"

    def why_not_writable(self, array: ndarray) -> str | None:
        """Look at the flag."""
        return None if array.flags.writeable else "it is read-only"

    def can_fill(self, buffers: Sequence[ndarray | None], operands: Sequence[ndarray | None]) -> bool:
        """Whether every buffer is a block of memory of its own that no other array lies in."""
        owners = []
        for array in operands:
            owner = array
            if array is not None and array.base is not None:
                owner = array.base
                if type(owner) is not np.ndarray or owner.base is not None:
                    return False
            owners.append(id(owner))
        for buffer in buffers:
            if buffer is None:
                continue
            flags = buffer.flags
            if not (flags.forc and flags.writeable and flags.owndata) or id(buffer) in owners:
                return False
            owners.append(id(buffer))
        return True

    def reshape(self, array: ndarray, shape: tuple[int, ...]) -> ndarray:
        """All extents are known."""
        return array.reshape(shape)

    def memory_of(self, array: ndarray) -> Memory:
        """Its addresses."""
        address, contiguous = array.__array_interface__["data"][0], array.flags.c_contiguous
        return Memory(address, array.shape, array.strides, array.itemsize, contiguous=contiguous)

    def share_memory(self, first: ndarray, second: ndarray) -> bool:
        """As NumPy finds it, in a tenth of the time."""
        return bool(np.shares_memory(first, second))

    def adds_in_place(self, array: ndarray) -> bool:
        """Look at the flags first."""
        return array.flags.writeable and (array.flags.forc or not self.overlaps_itself(array))

    def readable(self, matrix: ndarray) -> ndarray:
        """A memory map as an array, since the product of two maps would be a map of no file."""
        return matrix.view(np.ndarray) if type(matrix) is np.memmap else matrix

    def buffer(self, out: ndarray, shape: tuple[int, ...] | None, dtype: Any) -> ndarray | None:
        """A view, unless elements of `out` lie so that a reshape must copy them."""
        if out.dtype is not dtype and out.dtype != dtype:
            return None
        if shape is None:
            return out
        view = out.reshape(shape)
        return view if out.flags.c_contiguous or np.may_share_memory(view, out) else None

    def primitives(self, *arrays: ndarray | None, extents: tuple[int | None, ...] = (None,)) -> Any:
        """If none of the extents is large, no call has to look at them."""
        product, sum_rows = super().primitives(*arrays)
        if product != self.product or not all(extent is not None and extent <= _TALL for extent in extents):
            return product, sum_rows
        return _product, _sum_few_rows

    def product(self, a: ndarray, c: ndarray, bias: ndarray | None = None, out: ndarray | None = None) -> ndarray:
        """By blocks of rows if a is tall, by blocks of terms if there are many of them, both for a small c."""
        if len(a) > _TALL and c.size <= _SMALL and a.dtype in _WIDE:
            return _tall_product(a, c, bias, out)
        if len(c) > _TALL and len(a) * c.shape[1] <= _SMALL and a.dtype in _WIDE:
            y: ndarray = written(_long_product(a, c).astype(a.dtype, copy=False), out)
            if bias is not None:
                y += bias
            return y
        return _product(a, c, bias, out)

    def sum_rows(self, a: ndarray, out: ndarray | None = None) -> ndarray:
        """By a product with ones, which takes a quarter of the time, for few rows of real floats."""
        if len(a) <= _TALL and a.dtype in _ONES:
            return _sum_few_rows(a, out)
        total = self.sum(a, 0, np.dtype(float) if self.is_half(a.dtype) else a.dtype)
        return written(total.astype(a.dtype, copy=False), out)  # type: ignore[no-any-return]


def _product(a: ndarray, c: ndarray, bias: ndarray | None = None, out: ndarray | None = None) -> ndarray:
    # For small operands, matmul takes three times as long.
    is_taken_by_dot = out is None or (out.flags.carray and out.dtype.char == a.dtype.char)
    y: ndarray = a.dot(c, out) if is_taken_by_dot else np.matmul(a, c, out=out)
    if bias is not None:
        y += bias[None, :]  # to a single row an array of its shape is added in a third of the time
    return y


def _sum_few_rows(a: ndarray, out: ndarray | None = None) -> ndarray:
    ones = _ONES.get(a.dtype)
    if ones is None:
        return BACKEND.sum_rows(a, out)
    total: ndarray = ones[: len(a)].dot(a)
    if out is not None:
        out[...] = total
        return out
    return total


def _tall_product(x: ndarray, W: ndarray, bias: ndarray | None, out: ndarray | None) -> ndarray:
    """Each block of rows, and the bias while the block is in the caches."""
    y = np.empty((len(x), W.shape[1]), x.dtype) if out is None else out
    biases = None
    for rows in _blocks(len(x), _ROWS if sum(W.shape) * W.itemsize <= _LONG else _ROWS // 2):
        block = np.matmul(x[rows], W, out=y[rows])
        if bias is not None:
            if biases is None:  # repeated for every row, the addition is one long loop
                biases = np.broadcast_to(bias, block.shape).copy()
            block += biases[: len(block)]
    return y


def _long_product(a: ndarray, c: ndarray) -> ndarray:
    """The sum, in a wider dtype, of the products of blocks of terms."""
    total = np.zeros((len(a), c.shape[1]), _WIDE[a.dtype])
    for terms in _blocks(len(c), _TALL):
        # The wide operand second: its product is the faster one.
        wide_first = len(a) > 32 * c.shape[1]
        total += c[terms].T.dot(a[:, terms].T).T if wide_first else a[:, terms].dot(c[terms])
    return total


def _blocks(N: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, N, rows))


BACKEND = Numpy()
