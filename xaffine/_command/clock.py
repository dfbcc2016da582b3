"""Stopwatches: one that reads the host's time, and one that lets a device time what was queued on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from xaffine.backends import Array, Backend

__all__ = ["Clock", "clock_of"]


@dataclass(frozen=True)
class Clock:
    """How to time calls.

    Attributes
    ----------
    name : {"host", "device events"}
        What is read.
    mark : callable
        Returns a mark of now: a time, or an event in the queue of the device.
    between : callable
        ``between(start, end)``: the seconds between two marks, once the second has come to pass.
    wait : callable
        ``wait(array)`` blocks until an array is computed.
    flush : callable or None
        Empties the caches of the device by writing more than they hold, and waits for that; None on the CPU.
    """

    name: str
    mark: Callable[[], Any]
    between: Callable[[Any, Any], float]
    wait: Callable[[Array], Any]
    flush: Callable[[], Any] | None

    def time(self, run: Callable[[int], Iterable[Array]], count: int) -> float:
        """The seconds that one of so many calls takes; ``run(count)`` makes them and returns what comes last."""
        start = self.mark()
        results = run(count)
        if self.name == "host":
            for array in results:
                self.wait(array)
        return self.between(start, self.mark()) / count

    def time_cold(self, run: Callable[[int], Iterable[Array]]) -> float:
        """The seconds of one call whose operands are in no cache of the device; needs `flush`."""
        assert self.flush is not None  # noqa: S101 - who calls has looked
        self.flush()
        return self.time(run, 1)


def clock_of(backend: Backend, device: Any) -> Clock:
    """The clock for arrays of a backend on one of its devices."""
    name, mark, between, flush = backend.stopwatch(device)
    return Clock(name, mark, between, backend.wait, flush)
