"""Progress where no bar can be shown."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["progress_lines"]

_EVERY = 5.0  # seconds


@contextmanager
def progress_lines(total: float) -> Iterator[Callable[[str, float], None]]:
    """Every few seconds print a line to standard error; hand out the function that is told ``(text, completed)``."""
    latest, ended = ("", 0.0), threading.Event()

    def show(text: str, completed: float) -> None:
        nonlocal latest
        latest = text, completed

    def tell() -> None:
        while not ended.wait(_EVERY):
            text, completed = latest
            print(f"{completed / total:4.0%}  {text}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield show
    finally:
        ended.set()
        thread.join()
