"""A limit of the time that one case may take."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from xaffine.testing._lines import last_line_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LONGEST", "NoAnswerError", "time_limit"]

LONGEST = 1e6  # seconds; what a timer of any operating system can take


class NoAnswerError(BaseException):
    """It hung, or its process ended; no Exception: neither it nor Hypothesis, which would try again, is to catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, where that is possible."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    hung: NoAnswerError | None = None

    def interrupt(_: int, frame: Any) -> None:
        nonlocal hung
        line = last_line_of(traceback.extract_stack(frame))
        msg = f"no answer within {seconds:g} s\n  {line}"
        hung = NoAnswerError(msg)
        raise hung

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again where the error was caught
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's timer, a test runner's: let it go on
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)
        if hung is not None:  # also where the implementation caught it
            raise hung
