"""Worker processes that report events: one line for each event on a pipe that nothing else writes to.

A line is a key and JSON. The key is made anew for each worker, which reads it from its standard input; requests follow
on the same way. What a candidate or a library writes, even to the pipe itself, therefore never counts as an event.
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
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xaffine.testing._lines import printable
from xaffine.testing._target import TargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from io import BufferedReader

__all__ = ["Channel", "Worker", "WorkerError", "result_of_worker", "run_worker", "serve"]

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
    tampered : bool
        Something in it wrote to the pipe of its events.
    """

    def __init__(self, message: str, *, timed_out: bool = False, refused: bool = False, tampered: bool = False) -> None:
        super().__init__(message)
        self.timed_out, self.refused, self.tampered = timed_out, refused, tampered


class Worker:
    """The process ``python -m module``, with its arguments as JSON, in a group of its own.

    Parameters
    ----------
    module : str
        A module of this package that calls `serve`.
    arguments : dict
        Passed to it as JSON.
    environment : dict, optional
        Environment variables in addition to those of this process, with None for one that the worker does not inherit.
    files : sequence of int
        File descriptors that it inherits, under the same numbers.
    """

    def __init__(
        self,
        module: str,
        arguments: dict[str, Any],
        environment: dict[str, str | None] | None = None,
        files: Sequence[int] = (),
    ) -> None:
        variables = {**os.environ, **(environment or {})}
        self._key = secrets.token_hex()
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-W", "ignore", "-m", module, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: value for name, value in variables.items() if value is not None},
            pass_fds=files,
            process_group=0,  # so that a signal to it reaches what it starts, and Ctrl-C reaches this process alone
        )
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._errors = bytearray()
        self._readers = [
            threading.Thread(target=_read_lines, args=(self._process.stdout, self._lines), daemon=True),
            threading.Thread(target=_read_tail, args=(self._process.stderr, self._errors), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self._write(self._key)

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        with suppress(BrokenPipeError):  # it has ended, which its next event tells
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def send(self, **request: Any) -> None:
        """Send a request, as JSON."""
        self._write(json.dumps(request))

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Its next event, or None where it is done.

        Raises
        ------
        WorkerError
            It was silent for so many seconds, or ended before it was done, with whatever exit code, or something in it
            wrote to the pipe of the events; or it raised a `TargetError`, whose message this error has.
        """
        try:
            line = self._lines.get(timeout=seconds).decode(errors="replace")
            if not line:
                end = _describe_end(self._process.wait(timeout=seconds))
                self.close()
                last_line = printable((self._errors.decode(errors="replace").strip().splitlines() or [""])[-1])
                raise WorkerError(f"{end}\n  {last_line}" if last_line else end)
        except (queue.Empty, subprocess.TimeoutExpired):
            msg = f"no sign of life for {seconds:g} s"
            raise WorkerError(msg, timed_out=True) from None
        start, _, text = line.partition(" ")
        if start != self._key:
            msg = f"something in it wrote to the pipe of its events: {line[:60]!r}"
            raise WorkerError(msg, tampered=True)
        event: dict[str, Any] = _cleaned(json.loads(text))
        if event["event"] not in ("done", "cannot"):
            return event
        # How it ends afterwards, in its threads or at exit, says nothing about what it found.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_EXIT_SECONDS)
        if event["event"] == "cannot":
            raise WorkerError(event["why"], refused=True)
        return None

    def close(self) -> None:
        """End it, and every process that it started."""
        self._process.kill()
        with suppress(AttributeError, OSError):  # no groups on Windows; nobody is left in it
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with suppress(OSError):  # what was not sent
            self._process.stdin.close()  # type: ignore[union-attr]
        for reader in self._readers:
            reader.join(_DRAIN_SECONDS)  # a process that left the group may hold the pipes for ever


def _cleaned(value: Any) -> Any:
    """What came from another process, with texts that can be printed."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {key: _cleaned(each) for key, each in value.items()}
    return [_cleaned(each) for each in value] if isinstance(value, list) else value


def run_worker(
    module: str, arguments: dict[str, Any], time_limit: float, environment: dict[str, str | None] | None = None
) -> Generator[dict[str, Any]]:
    """Run a `Worker` and yield the events that it emits, until it is done; a silence of so many seconds ends it.

    Raises
    ------
    WorkerError
        As `Worker.receive` says.
    """
    with closing(Worker(module, arguments, environment)) as worker:
        while (event := worker.receive(time_limit)) is not None:
            yield event


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


class Channel:
    """In a worker: call it to emit an event with facts, and iterate for the requests that come."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._requests = os.fdopen(os.dup(0), "rb")
        self._key = self._requests.readline().decode().strip()
        self._events = os.fdopen(os.dup(1), "w")
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)  # whatever else is printed goes to standard error

    def __call__(self, event: str, **facts: Any) -> None:
        if os.getpid() != self._pid:  # a child of what is checked, which came back to us
            sys.exit()
        print(self._key, json.dumps({"event": event, **facts}), file=self._events, flush=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self._requests)


def serve(work: Callable[..., None]) -> None:
    """In a worker: call ``work(channel, **arguments)``, with the arguments that it was started with."""
    channel = Channel()
    try:
        work(channel, **json.loads(sys.argv[1]))
    except TargetError as error:
        channel("cannot", why=str(error))
    channel("done")
