"""What is judged, as the judge sees it: an implementation in this process, or in one of its own."""

from __future__ import annotations

import math
import os
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine.testing._candidate import LARGEST, Candidate, Facts, Placed, RaisedError, Returned, prepare
from xaffine.testing._process import Worker, WorkerError
from xaffine.testing._target import TargetError
from xaffine.testing._timer import NoAnswerError, time_limit
from xaffine.testing.adapters import has_backward, takes_batch_axes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xaffine.backends import Backend
    from xaffine.testing.adapters import Make
    from xaffine.testing.cases import Operand
    from xaffine.testing.options import Options

__all__ = ["BrokenError", "InProcess", "Isolated", "Subject", "TamperedError", "subject_of"]

_GRACE = 1.0  # seconds beyond the time limit, in which the process can still report by itself what hung
_START = 60.0  # seconds that the process may take to import what it checks, if the time limit is shorter


class TamperedError(NoAnswerError):
    """Something in the process of the implementation meddled with what belongs to the judge."""


class BrokenError(NoAnswerError):
    """The implementation left its device unusable: wrong, and nothing more can be learned in that process."""


class Subject(ABC):
    """An implementation, to which operands are handed in memory that the judge reads."""

    facts: Facts
    backend: Backend | None = None
    """Where it is in this process; with the next one and itself what a property is called with."""
    device: Any = None

    @abstractmethod
    def perform(self, *steps: Any) -> list[Returned]:
        """Take steps of `Candidate`."""

    def place(self, operands: dict[str, Operand]) -> dict[str, Placed]:
        """Write operands, each with its neighbours, to the memory."""
        placed: dict[str, Placed] = {}
        self._flat, start = placed, 0
        for name, operand in operands.items():
            flat = operand.memory
            placed[name] = Placed(operand.dtype, operand.layout, operand.shape, flat.dtype.str, flat.size, start)
            self._write(start, flat)
            start += -(-flat.nbytes // 64) * 64
        self._end = start
        return placed

    @abstractmethod
    def _write(self, start: int, flat: np.ndarray) -> None: ...

    @abstractmethod
    def _read(self, placed: Placed) -> np.ndarray: ...

    def memory(self, name: str) -> np.ndarray:
        """What the memory of an operand holds now."""
        return self._read(self._flat[name])

    def overwrite(self) -> None:
        """Write other values over the operands and their neighbours."""
        for placed in self._flat.values():
            self._write(placed.start, np.full(placed.size, 5, placed.format))

    @abstractmethod
    def limit(self, seconds: float) -> Any:
        """A context in which the implementation has so many seconds."""

    def require_intact(self) -> None:  # noqa: B027 - in this process it cannot be told
        """Assert that the implementation replaced nothing that the judge works with."""

    def close(self) -> None:  # noqa: B027 - nothing to close in this process
        """End what was started."""


class InProcess(Subject):
    """An implementation in this process, which it can do anything to."""

    def __init__(self, candidate: Candidate, facts: Facts) -> None:
        self.backend, self.device = candidate.backend, candidate.device
        self.facts, self._candidate = facts, candidate
        self._memory: dict[int, np.ndarray] = {}

    @classmethod
    def of(cls, make: Make, backend: Backend, device: Any) -> InProcess:
        """A factory that is there already."""
        facts = Facts(backend.name, takes_batch_axes(make), has_backward(make, backend, device))
        return cls(Candidate(make, backend, device), facts)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Make a layer, as a property of the user's own does."""
        return self._candidate.make(*arguments, **options)

    def perform(self, *steps: Any) -> list[Returned]:
        return list(self._candidate.perform(steps, lambda placed: self._memory[placed.start]))

    def place(self, operands: dict[str, Operand]) -> dict[str, Placed]:
        self._memory = {}
        return super().place(operands)

    def _write(self, start: int, flat: np.ndarray) -> None:
        self._memory.setdefault(start, flat)[...] = flat

    def _read(self, placed: Placed) -> np.ndarray:
        return self._memory[placed.start]

    def limit(self, seconds: float) -> Any:
        return time_limit(seconds)


class Isolated(Subject):
    """An implementation in a process of its own, which gets operands and returns results, and knows of nothing else.

    The operands lie in a file that the process maps, and the judge reads and writes; results come on the same way.
    """

    def __init__(self, target: str, options: Options) -> None:
        device = None if options.device is None else str(options.device).strip("<>")
        how = {"backend": options.backend, "adapter": options.adapter, "device": device, "tf32": options.tf32}
        self._file = _nameless_file()
        self._arguments = {"target": target, "file": self._file, **how}
        self._seconds, self._number, self._end = options.time_limit, 0, 0
        self._worker: Worker | None = None
        try:
            self._start()
        except BaseException as error:
            self.close()
            if isinstance(error, NoAnswerError) and not isinstance(error, TamperedError):
                raise TargetError(str(error)) from error
            raise

    def _start(self) -> Worker:
        """Start its process."""
        self._worker = worker = Worker("xaffine.testing._candidate", self._arguments, files=[self._file])
        start = max(_START, self._seconds)
        facts = self._receive(worker, start, start)
        if not hasattr(self, "facts"):  # another process has nothing new to tell
            self.facts = Facts(*(facts[name] for name in Facts._fields))
        self._deadline = time.monotonic() + self._seconds
        return worker

    def _receive(self, worker: Worker, left: float, seconds: float) -> dict[str, Any]:
        """Its next event, for which so many of the seconds are left."""
        try:
            event = worker.receive(left + _GRACE)
        except WorkerError as error:
            self._stop()
            if error.refused:
                raise TargetError(str(error)) from error
            if error.tampered:
                raise TamperedError(str(error)) from error
            msg = f"no answer within {seconds:g} s, and none to an interrupt" if error.timed_out else str(error)
            raise NoAnswerError(msg) from error
        if event is None:
            self._stop()
            msg = "its process ended"
            raise NoAnswerError(msg)
        return event

    def perform(self, *steps: Any, last: bool = False) -> list[Returned]:
        worker = self._worker or self._start()
        left = max(self._deadline - time.monotonic(), 1e-3)
        self._number += 1
        worker.send(number=self._number, steps=steps, results=self._end, seconds=left, last=last)
        answer = self._receive(worker, left, self._seconds)
        try:
            return self._read_answer(answer, last=last)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            self._stop()
            msg = "an answer came that is none"
            raise TamperedError(msg) from error

    def _read_answer(self, answer: dict[str, Any], *, last: bool) -> list[Returned]:
        """What it says came out, and the values that lie in the file: nothing of the answer is trusted."""
        if answer["number"] != self._number:
            msg = "an answer came that nobody asked for"
            raise ValueError(msg)
        if last and answer["replaced"] is not None:
            msg = f"tampered with: {answer['replaced']} was replaced"
            raise TamperedError(msg)
        if "hung" in answer:
            line = str(answer["hung"]).partition("\n")[2]
            msg = f"no answer within {self._seconds:g} s\n{line}"
            raise NoAnswerError(msg)
        returned, position = [], self._end
        for told in answer["returned"]:
            result = Returned(**told)
            if told["values"] is not None:
                dtype, shape = np.dtype(told["values"][0]), tuple(map(int, told["values"][1]))
                size = math.prod(shape)
                if dtype.kind not in "biufc" or min(shape, default=0) < 0 or size * dtype.itemsize > LARGEST:
                    msg = f"a result of dtype {dtype} and shape {shape}"
                    raise ValueError(msg)
                values = np.frombuffer(os.pread(self._file, size * dtype.itemsize, position), dtype).reshape(shape)
                position += values.nbytes
                result = result._replace(values=values)
            returned.append(result._replace(shape=tuple(result.shape)))
        if "raised" in answer and not answer["usable"]:
            self._stop()
            raise BrokenError(str(answer["raised"]))
        if "raised" in answer:
            raise RaisedError(str(answer["raised"]), clean=bool(answer["clean"]))
        return returned

    def _write(self, start: int, flat: np.ndarray) -> None:
        if os.fstat(self._file).st_size < start + flat.nbytes:
            os.ftruncate(self._file, 2 * (start + flat.nbytes))
        os.pwrite(self._file, flat.data, start)

    def _read(self, placed: Placed) -> np.ndarray:
        held = os.pread(self._file, placed.size * np.dtype(placed.format).itemsize, placed.start)
        return np.frombuffer(held, placed.format)

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        yield

    def require_intact(self) -> None:
        with self.limit(self._seconds):
            self.perform(last=True)

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def close(self) -> None:
        self._stop()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("operands")
    file, name = tempfile.mkstemp()
    Path(name).unlink()
    return file


def subject_of(make: Any, options: Options) -> Subject:
    """What is to be judged: a text names what runs in a process of its own."""
    if isinstance(make, str):
        return Isolated(make, options)
    how: dict[str, Any] = {"backend": options.backend, "adapter": options.adapter, "device": options.device}
    return InProcess(*prepare(make, tf32=options.tf32, **how))
