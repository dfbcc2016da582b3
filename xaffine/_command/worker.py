"""Worker processes that report events: one line for each event on a pipe that nothing else writes to.

A line is a key and JSON. The key is made anew for each worker, which reads it from its standard input. What a candidate
or a library writes, even to the pipe itself, therefore never counts as an event.
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

from xaffine._command.target import TargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from io import BufferedReader

__all__ = ["WorkerError", "emitter", "result_of_worker", "run_worker", "serve"]

_EXIT_SECONDS = 5.0  # for a worker to exit by itself once it is done
_DRAIN_SECONDS = 0.5  # to read what is left in a pipe once the worker is gone
_EVENT_BYTES = 1 << 20  # at most: what a candidate writes must not fill the memory of this process
_STDERR_BYTES = 1 << 12  # that are kept: what a candidate prints must not fill the memory either


class WorkerError(Exception):
    """A worker failed.

    Attributes
    ----------
    timed_out : bool
        It reported nothing for too long and was killed.
    refused : bool
        It raised a `TargetError`, whose message this error has.
    """

    def __init__(self, message: str, *, timed_out: bool = False, refused: bool = False) -> None:
        super().__init__(message)
        self.timed_out, self.refused = timed_out, refused


def run_worker(
    module: str, arguments: dict[str, Any], time_limit: float, environment: dict[str, str | None] | None = None
) -> Generator[dict[str, Any]]:
    """Run ``python -m module`` with its arguments as JSON, and yield the events that it emits.

    Parameters
    ----------
    module : str
        A module of this package that calls `serve`.
    arguments : dict
        Passed to it as JSON.
    time_limit : float
        The longest silence in seconds.
    environment : dict, optional
        Environment variables in addition to those of this process, with None for one that the worker does not inherit.

    Yields
    ------
    dict
        One event. The worker, and every process that it started, is gone once the iterator is closed.

    Raises
    ------
    WorkerError
        It was silent for too long, or ended before it was done, with whatever exit code, or something in it wrote to
        the pipe of the events; or it raised a `TargetError`, whose message this error has.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, json.dumps(arguments)]
    variables = {**os.environ, **(environment or {})}
    key = secrets.token_hex()
    stdin, write_end = os.pipe()
    with os.fdopen(write_end, "w") as pipe:
        pipe.write(key)
    with os.fdopen(stdin) as stdin_of_worker:
        process = subprocess.Popen(  # noqa: S603 - our own module
            command,
            stdin=stdin_of_worker,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: value for name, value in variables.items() if value is not None},
            process_group=0,  # so that a signal to it reaches what it starts, and Ctrl-C reaches this process alone
        )
    lines: queue.Queue[bytes] = queue.Queue()
    errors = bytearray()
    readers = [
        threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True),
        threading.Thread(target=_read_tail, args=(process.stderr, errors), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        while line := lines.get(timeout=time_limit).decode(errors="replace"):
            start, _, text = line.partition(" ")
            if start != key:
                msg = f"something in it wrote to the pipe of its events: {line[:60]!r}"
                raise WorkerError(msg)
            event = json.loads(text)
            if event["event"] in ("done", "cannot"):
                # How it ends afterwards, in its threads or at exit, says nothing about what it found.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=_EXIT_SECONDS)
                if event["event"] == "cannot":
                    raise WorkerError(event["why"], refused=True)
                return
            yield event
        end = _describe_end(process.wait(timeout=time_limit))
    except (queue.Empty, subprocess.TimeoutExpired):
        msg = f"no sign of life for {time_limit:g} s"
        raise WorkerError(msg, timed_out=True) from None
    finally:
        process.kill()
        with suppress(AttributeError, OSError):  # no groups on Windows; nobody is left in it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for reader in readers:
            reader.join(_DRAIN_SECONDS)  # a process that left the group may hold the pipes for ever
    last_line = (errors.decode(errors="replace").strip().splitlines() or [""])[-1]
    raise WorkerError(f"{end}\n  {last_line}" if last_line else end)


def _read_lines(pipe: BufferedReader, lines: queue.Queue[bytes]) -> None:
    """Put each line of a pipe into a queue, and an empty line at its end."""
    with pipe:
        for line in iter(partial(pipe.readline, _EVENT_BYTES), b""):
            lines.put(line)
    lines.put(b"")


def _read_tail(pipe: BufferedReader, tail: bytearray) -> None:
    """Read a pipe to its end and keep its last bytes."""
    with pipe:
        for some in iter(partial(pipe.read1, _STDERR_BYTES), b""):
            tail += some
            del tail[:-_STDERR_BYTES]


def result_of_worker(
    module: str, arguments: dict[str, Any], time_limit: float, environment: dict[str, str | None] | None = None
) -> dict[str, Any]:
    """Run a worker as `run_worker` does and return the one event that it must emit, or raise a WorkerError."""
    events = list(run_worker(module, arguments, time_limit, environment))
    if len(events) != 1:
        msg = f"it gave {len(events)} answers instead of one"
        raise WorkerError(msg)
    return events[0]


def _describe_end(exit_code: int) -> str:
    if exit_code >= 0:
        return f"the process ended with exit code {exit_code}"
    names = {each.value: each.name for each in signal.Signals}
    return f"the process was ended by {names.get(-exit_code, f'signal {-exit_code}')}"


@contextmanager
def emitter() -> Iterator[Callable[..., None]]:
    """In a worker: yield ``emit(event, **facts)``; whatever else is printed goes to standard error."""
    key = sys.stdin.read()  # nothing of it is left there to be read again
    with os.fdopen(os.dup(1), "w") as events:
        os.dup2(2, 1)

        def emit(event: str, **facts: Any) -> None:
            print(key, json.dumps({"event": event, **facts}), file=events, flush=True)

        yield emit
        emit("done")


def serve(work: Callable[..., None]) -> None:
    """In a worker: call ``work(emit, **arguments)``, with the arguments that `run_worker` passed."""
    with emitter() as emit:
        try:
            work(emit, **json.loads(sys.argv[1]))
        except TargetError as error:
            emit("cannot", why=str(error))
