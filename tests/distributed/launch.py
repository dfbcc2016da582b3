"""Processes that run together, and none of which is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from typing import NamedTuple

_GRACE = 15  # seconds that a launcher has to end its own children


class Ended(NamedTuple):
    """How a process ended: its exit status (the negative of the signal), and all that it wrote."""

    status: int
    output: str


def together(*commands: list[str], seconds: float, **environment: str) -> list[Ended]:
    """Run some commands at once, until each has ended or stopped itself; what takes longer fails the test."""
    deadline = time.monotonic() + seconds
    children: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        try:
            for command, output in zip(commands, outputs, strict=True):
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
                children.append(child)
            while any(map(_runs, children)) and time.monotonic() < deadline:
                time.sleep(0.05)
            late = any(map(_runs, children))
        finally:
            for child in children:
                _end(child)
        texts = []
        for output in outputs:
            output.seek(0)
            texts.append(output.read())
    assert not late, f"not done after {seconds} s:\n" + "\n".join(texts)
    return [Ended(child.returncode, text) for child, text in zip(children, texts, strict=True)]


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port: int = some.getsockname()[1]
        return port


def _runs(child: subprocess.Popen[str]) -> bool:
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is None


def _end(child: subprocess.Popen[str]) -> None:
    if _runs(child):
        child.terminate()  # which lets a launcher end its own children
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
