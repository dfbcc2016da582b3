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
import tempfile
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

__all__ = ["ChildError", "answer_of_child", "events_of_child", "telling"]

_FAREWELL = 5.0  # seconds to end by itself


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
    with (
        os.fdopen(stdin) as stdin_of_child,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
        subprocess.Popen(  # noqa: S603 - our own module
            command,
            stdin=stdin_of_child,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
            process_group=0,  # so that a signal to it reaches what it starts, and Ctrl-C reaches this process alone
        ) as child,
    ):
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            for line in child.stdout or ():
                lines.put(line)
            lines.put("")

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while line := lines.get(timeout=time_limit):
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
            reader.join()  # it ends with the pipe, and must not outlive it
        stderr.seek(0)
        last_line = (stderr.read().strip().splitlines() or [""])[-1]
        raise ChildError(f"{end}\n  {last_line}" if last_line else end)


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
