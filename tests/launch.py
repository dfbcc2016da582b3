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
    """Run some commands at once; those that are not done after so many seconds fail the test."""
    deadline = time.monotonic() + seconds
    children = []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        try:
            for command, output in zip(commands, outputs, strict=True):
                children.append(
                    subprocess.Popen(
                        command,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env={**os.environ, **environment},
                        start_new_session=True,
                    )
                )
            late = [child for child in children if not _ends(child, deadline - time.monotonic())]
        finally:
            for child in children:
                child.terminate()
            for child in children:
                _ends(child, _GRACE)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
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


def _ends(child: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        child.wait(max(0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True
