"""Where arrays lie in memory, by their addresses alone, against the elements that they have."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from xaffine.backends import get
from xaffine.backends._memory import Memory, are_apart

memory_of = get("numpy").memory_of


def views(memory: Any) -> list[Any]:
    """Return views of 48 elements: whole, in part, with gaps, backwards, broadcast, empty."""
    rows = memory.reshape(8, 6)
    return [
        memory, memory[:0], memory[5:], rows[:4], rows[4:], rows[:, :3], rows[:, 3:], rows[::2], rows[1::2],
        rows[::-1, 3:], rows[3::-1], rows[:4:-1, ::-1], rows[2:3, 1:2], rows[:0, ::-1], rows[:0:-1, :0], rows.T[::2],
        memory[7:8].reshape(()), np.broadcast_to(memory[7:8], (3, 2)), np.broadcast_to(memory[47:], (3, 1)),
        np.lib.stride_tricks.sliding_window_view(memory[:9], 4), memory[:24].reshape(2, 3, 4).transpose(2, 0, 1),
    ]  # fmt: skip


PLACE = np.zeros(48, "f")


def pairs() -> list[tuple[Any, Memory]]:
    """Return the numbers of the elements of each view, and where it lies in `PLACE`."""
    return list(zip(views(np.arange(48)), map(memory_of, views(PLACE)), strict=True))


def test_ends_are_those_of_the_elements() -> None:
    for elements, memory in pairs():
        low, high = ((end - PLACE.ctypes.data) / PLACE.itemsize for end in (memory.low, memory.high))
        assert (low, high) == ((elements.min(), elements.max() + 1) if elements.size else (low, low))


def test_every_axis_has_a_stride() -> None:
    with pytest.raises(ValueError, match="zip"):
        Memory(0, (2, 3), (4,), 4, contiguous=True)


def test_elements_that_two_arrays_share_are_found() -> None:
    for elements, memory in pairs():
        assert memory.overlaps_itself() == (len(set(elements.flat)) < elements.size)
        for others, other in pairs():
            assert memory.overlaps(other) == bool(set(elements.flat) & set(others.flat))


def test_blocks_without_gaps_that_lie_one_after_the_other_are_apart() -> None:
    for blocks in itertools.permutations(map(memory_of, np.split(PLACE, [3, 4, 9]))):
        assert are_apart(blocks)
    for elements, memory in pairs():
        for others, other in pairs():
            may_share = not (memory.contiguous and other.contiguous) or set(elements.flat) & set(others.flat)
            # Of one without elements within another it is not said.
            assert are_apart([memory, other]) == (not may_share) or 0 in (elements.size, others.size)
