"""Processes of our own that tell what they do: one line for each event on a pipe that nothing else writes to.

A line is a key and JSON. The key is made anew for each child and handed to it on its standard input: what a candidate
or a library writes, even to the pipe itself, is no event.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from io import BufferedReader

__all__ = ["ChildError", "answer_of_child", "events_of_child", "telling"]

_FAREWELL = 5.0  # seconds to end by itself
_REST = 0.5  # seconds to read what is left in a pipe once the child is gone
_LINE = 1 << 20  # bytes of an event at most: what a candidate writes must not fill the memory of this process
_TAIL = 1 << 12  # bytes kept of standard error: what a candidate prints must not fill the disk


class ChildError(Exception):
    """A child came to a bad end.

    Attributes
    ----------
    timed_out : bool
        It said nothing for too long, and was killed.
    """

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


def events_of_child(
    module: str, arguments: dict[str, Any], time_limit: float, environment: dict[str, str] | None = None
) -> Generator[dict[str, Any]]:
    """Run ``python -m module`` with its arguments as JSON, and yield what it tells.

    Parameters
    ----------
    module : str
        A module of ours that tells with `telling`.
    arguments : dict
        Handed to it as JSON.
    time_limit : float
        The longest silence in seconds.
    environment : dict, optional
        Environment variables beside those of this process.

    The child, and what it started, is gone once the iterator is closed.

    Raises
    ------
    ChildError
        It was silent for too long, or ended before it was done, with whatever exit code, or something in it wrote to
        the pipe of the events.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, json.dumps(arguments)]
    key = secrets.token_hex()
    stdin, write_end = os.pipe()
    with os.fdopen(write_end, "w") as pipe:
        pipe.write(key)
    with os.fdopen(stdin) as stdin_of_child:
        child = subprocess.Popen(  # noqa: S603 - our own module
            command,
            stdin=stdin_of_child,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            process_group=0,  # so that a signal to it reaches what it starts, and Ctrl-C reaches this process alone
        )
    lines: queue.Queue[bytes] = queue.Queue()
    errors = bytearray()
    readers = [
        threading.Thread(target=_read_lines, args=(child.stdout, lines), daemon=True),
        threading.Thread(target=_read_tail, args=(child.stderr, errors), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        while line := lines.get(timeout=time_limit).decode(errors="replace"):
            start, _, text = line.partition(" ")
            if start != key:
                msg = f"something in it wrote to the pipe of its events: {line[:60]!r}"
                raise ChildError(msg)
            event = json.loads(text)
            if event["event"] == "done":
                # What becomes of it afterwards, in its threads or at exit, tells nothing.
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=_FAREWELL)
                return
            yield event
        end = _describe_end(child.wait(timeout=time_limit))
    except (queue.Empty, subprocess.TimeoutExpired):
        msg = f"no sign of life for {time_limit:g} s"
        raise ChildError(msg, timed_out=True) from None
    finally:
        child.kill()
        with suppress(AttributeError, OSError):  # no groups on Windows; nobody is left in it
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for reader in readers:
            reader.join(_REST)  # a process that left the group may hold the pipes for ever
    last_line = (errors.decode(errors="replace").strip().splitlines() or [""])[-1]
    raise ChildError(f"{end}\n  {last_line}" if last_line else end)


def _read_lines(pipe: BufferedReader, lines: queue.Queue[bytes]) -> None:
    """Hand on each line of a pipe, and an empty one at its end."""
    with pipe:
        for line in iter(partial(pipe.readline, _LINE), b""):
            lines.put(line)
    lines.put(b"")


def _read_tail(pipe: BufferedReader, tail: bytearray) -> None:
    """Read a pipe to its end, and keep what came last."""
    with pipe:
        for some in iter(partial(pipe.read1, _TAIL), b""):
            tail += some
            del tail[:-_TAIL]


def answer_of_child(
    module: str, arguments: dict[str, Any], time_limit: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a child as `events_of_child` does, and return the one event that it must tell; a ChildError without one."""
    events = list(events_of_child(module, arguments, time_limit, environment))
    if len(events) != 1:
        msg = f"it gave {len(events)} answers instead of one"
        raise ChildError(msg)
    return events[0]


def _describe_end(exit_code: int) -> str:
    if exit_code >= 0:
        return f"the process ended with exit code {exit_code}"
    names = {own.value: own.name for own in signal.Signals}
    return f"the process was ended by {names.get(-exit_code, f'signal {-exit_code}')}"


@contextmanager
def telling() -> Iterator[Callable[..., None]]:
    """In a child: hand out ``tell(event, **facts)``; what else is printed goes to standard error and is no event."""
    key = sys.stdin.read()  # nothing of it is left there to be read again
    with os.fdopen(os.dup(1), "w") as events:
        os.dup2(2, 1)

        def tell(event: str, **facts: Any) -> None:
            print(key, json.dumps({"event": event, **facts}), file=events, flush=True)

        yield tell
        tell("done")
