"""Where arrays lie in memory, for libraries that give their addresses: whether two of them overlap."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["Memory", "are_apart"]


class Memory:
    """The addresses of an array: none of its elements lies below `low`, all of them below `high`; strides in bytes."""

    def __init__(
        self, address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int, *, contiguous: bool
    ) -> None:
        self.address, self.contiguous, self.itemsize = address, contiguous, itemsize
        self.shape, self.strides = tuple(shape), tuple(strides)
        self.axes = list(zip(self.strides, self.shape, strict=True))
        self.low = self.high = address
        if 0 not in self.shape:
            reaches = [stride * (extent - 1) for stride, extent in self.axes]
            self.low += sum(min(reach, 0) for reach in reaches)
            self.high += sum(max(reach, 0) for reach in reaches) + itemsize

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """A NumPy view of the addresses, for overlap tests only: the memory may be that of a GPU."""
        return {
            "version": 3, "data": (self.address, False), "shape": self.shape, "strides": self.strides,
            "typestr": f"|V{self.itemsize}",
        }  # fmt: skip

    def overlaps(self, other: Memory) -> bool:
        """Whether two arrays have an address in common."""
        if self.high <= other.low or other.high <= self.low:
            return False
        return np.shares_memory(np.asarray(self), np.asarray(other))

    def overlaps_itself(self) -> bool:
        """Whether two elements have an address in common."""
        if 0 in self.shape:
            return False
        span = self.itemsize
        for stride, extent in sorted((abs(stride), extent) for stride, extent in self.axes if extent > 1):
            if stride < span:
                return True
            span += stride * (extent - 1)
        return False


def are_apart(memories: Collection[Memory]) -> bool:
    """Whether all are blocks without gaps that lie one after the other; if not, it takes a closer look."""
    blocks = sorted((m.low, m.high) for m in memories if m.contiguous)
    return len(blocks) == len(memories) and all(high <= low for (_, high), (low, _) in pairwise(blocks))
