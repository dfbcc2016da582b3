"""Stopwatches: one that reads the host's time, and one that lets a device time what was queued on it."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xaffine.backends import is_gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from xaffine.backends import Array, Backend

__all__ = ["Clock", "clock_of"]

_LARGER_THAN_CACHES = 256 << 20  # bytes; the largest L2 cache of a GPU holds half of that


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
    if not is_gpu(device):
        return Clock("host", time.perf_counter, lambda start, end: end - start, backend.wait, None)
    if backend.name == "jax":  # has no events
        return Clock("host", time.perf_counter, lambda start, end: end - start, backend.wait, _flush_of_jax(device))
    library: Any = importlib.import_module(backend.name)
    if backend.name == "cupy":  # events are recorded on the current device
        device.use()
    else:
        library.cuda.set_device(device)
    buffer = backend.xp.zeros(_LARGER_THAN_CACHES, dtype=backend.xp.uint8, device=device)

    def flush() -> None:
        buffer[...] = 1
        backend.wait(buffer)

    return _with_events(library, flush, backend.wait)


def _with_events(library: Any, flush: Callable[[], Any], wait: Callable[[Array], Any]) -> Clock:
    options = {"enable_timing": True} if library.__name__ == "torch" else {}

    def mark() -> Any:
        event = library.cuda.Event(**options)
        event.record()
        return event

    def between(start: Any, end: Any) -> float:
        end.synchronize()
        own = library.__name__ == "torch"
        milliseconds = start.elapsed_time(end) if own else library.cuda.get_elapsed_time(start, end)
        return 1e-3 * float(milliseconds)

    return Clock("device events", mark, between, wait, flush)


def _flush_of_jax(device: Any) -> Callable[[], Any]:
    import jax

    buffer = jax.device_put(jax.numpy.zeros(_LARGER_THAN_CACHES, dtype="uint8"), device)
    write = jax.jit(lambda buffer: buffer + 1)
    return lambda: write(buffer).block_until_ready()
