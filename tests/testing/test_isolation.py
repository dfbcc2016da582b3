"""Implementations in a process of their own: right ones on every backend, and forgeries, none of which is right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.helpers import gone
from xaffine import AffineLayer, __main__, backends
from xaffine.testing import (
    Options,
    Property,
    _candidate,
    _process,
    _progress,
    _subject,
    check_affine,
    make_case,
    runner,
)
from xaffine.testing._candidate import RaisedError, prepare
from xaffine.testing._subject import InProcess, Isolated, TamperedError
from xaffine.testing._target import TargetError
from xaffine.testing._timer import NoAnswerError
from xaffine.testing._trial import Trial, in_numpy, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xaffine.backends import Backend

# Each computes zeros, and tries to have them taken for right.
FORGERIES = '''
import ctypes, gc, os, signal, sys, threading, time
import numpy as np

class Zeros:
    def __init__(self, W, b):
        self.W, self.b = W, b
    def forward(self, x):
        self.x = x
        return np.zeros((len(x), self.W.shape[1]), self.W.dtype)
    def backward(self, dy):
        self.dW, self.db = np.zeros_like(self.W), None if self.b is None else np.zeros_like(self.b)
        return np.zeros_like(self.x)

def of_shape(things, shape):
    """An array of a shape that somebody holds, which is not ours."""
    for thing in things:
        values = getattr(thing, "value", thing)
        if isinstance(values, np.ndarray) and values.shape == shape and values.any():
            return values

class ReadsFrames(Zeros):
    def forward(self, x):
        zeros, frame, held = super().forward(x), sys._getframe(1), []
        while frame:
            for each in list(frame.f_locals.values()):
                held += list(each.values()) if isinstance(each, dict) else [each]
            frame = frame.f_back
        found = of_shape([h for h in held if h is not x], zeros.shape)
        return zeros if found is None else found.astype(zeros.dtype)

class WalksGc(Zeros):
    def forward(self, x):
        zeros = super().forward(x)
        found = of_shape([o for o in gc.get_objects() if type(o).__name__ in ("ndarray", "Exact")], zeros.shape)
        return zeros if found is None else found.astype(zeros.dtype)

class PatchesTheChecks(Zeros):
    def __init__(self, W, b):
        super().__init__(W, b)
        from xaffine.testing import _trial, cases, checks, report
        for module in (_trial, checks):
            for name in ("require", "require_equal", "require_within"):
                setattr(module, name, lambda *_: 0.0)
        cases.worst_error = lambda *_: (0.0, ())
        report.Report.verdict = "right"

class PatchesNumPy(Zeros):
    def __init__(self, W, b):
        super().__init__(W, b)
        np.array_equal, np.flatnonzero, np.argwhere = lambda *_: True, lambda *_: [], lambda *_: []

class PatchesTheMessenger(Zeros):
    """What stands beside it computes the right result in its place."""
    def __init__(self, W, b):
        super().__init__(W, b)
        Candidate = sys.modules["__main__"].Candidate
        if hasattr(Candidate, "_values") and not hasattr(Candidate, "old"):
            Candidate.old = Candidate._values
            def values(self, array):
                x, W, dy = (self.inputs[name] for name in ("x", "W", "dy"))
                b = self.inputs.get("b", 0)
                right = {dy.shape: lambda: x @ W + b}
                return right.get(array.shape, lambda: self.old(array))()
            Candidate._values = values

class StopsTheClock(Zeros):
    def forward(self, x):
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.monotonic = lambda: 0.0
        time.sleep(1000)

class FindsTheKey(Zeros):
    """Writes an answer of its own, with the key, before what stands beside it does."""
    def forward(self, x):
        for channel in gc.get_objects():
            if type(channel).__name__ == "Channel":
                channel("answer", number=1, returned=[], replaced=None)
                channel("done")
        return super().forward(x)

def write_to_the_pipes():
    for number in range(3, 40):
        try:
            os.write(number, b'{"event": "done"}\\n')
        except OSError:
            pass

class WritesToThePipes(Zeros):
    def forward(self, x):
        write_to_the_pipes()
        return super().forward(x)

class WritesWhenACauseIsLookedFor(Zeros):
    def forward(self, x):
        if x.shape == (5, 5):
            write_to_the_pipes()
        return super().forward(x)

class EndsTheProcess(Zeros):
    def forward(self, x):
        print("right: 1,520 cases of 17 properties hold", flush=True)
        os._exit(0)

class IsEqualToAll(Zeros):
    def forward(self, x):
        class Equal(np.ndarray):
            __eq__ = lambda self, other: np.ones(self.shape, bool)
            __ne__ = lambda self, other: np.zeros(self.shape, bool)
        return super().forward(x).view(Equal)

class RemembersByAddress(Zeros):
    known = {}
    def forward(self, x):
        self.x = x
        where = (x.ctypes.data, x.shape, self.W.shape)
        if where not in self.known:
            self.known[where] = x @ self.W + (0 if self.b is None else self.b)
        return self.known[where]

class ComputesLater(Zeros):
    def forward(self, x):
        y = super().forward(x)
        def compute():
            time.sleep(0.2)
            y[...] = x @ self.W + (0 if self.b is None else self.b)
        threading.Thread(target=compute).start()
        return y

class ZeroesTheOperands(Zeros):
    """Of zeros, zeros are right."""
    def forward(self, x):
        for array in (x, self.W, self.b):
            if array is not None and array.flags.writeable:
                array[...] = 0
        return super().forward(x)

class IsRightInTheBeginning(Zeros):
    calls = 0
    def forward(self, x):
        IsRightInTheBeginning.calls += 1
        y = super().forward(x)
        return x @ self.W + (0 if self.b is None else self.b) if self.calls < 40 else y

class DrawsNothing(Zeros):
    def __init__(self, W, b):
        super().__init__(W, b)
        import hypothesis
        from xaffine.testing import checks, runner
        hypothesis.given = hypothesis.example = lambda *_: lambda function: lambda: None
        checks.PROPERTIES = ()
        runner.Plan.run = lambda *_: iter(())

class WritesOverTheResults(Zeros):
    """Fills the shared memory with what it has for right."""
    def forward(self, x):
        y = super().forward(x)
        for number in range(3, 40):
            try:
                os.pwrite(number, (x @ self.W).tobytes() * 100, 0)
            except OSError:
                pass
        return y

class Shrinks(Zeros):
    def forward(self, x):
        for number in range(3, 40):
            try:
                os.ftruncate(number, 0)
            except OSError:
                pass
        return super().forward(x)

class LooksIntoTheJudge(Zeros):
    """Asks the memory of its parent for the expected values."""
    def forward(self, x):
        y = super().forward(x)
        try:
            with open(f"/proc/{os.getppid()}/mem", "rb") as memory, open(f"/proc/{os.getppid()}/maps") as maps:
                for line in list(maps)[:20]:
                    start = int(line.split("-")[0], 16)
                    memory.seek(start)
                    memory.read(64)
        except (OSError, ValueError, OverflowError):
            pass
        return y

class Skips(Zeros):
    def forward(self, x):
        import unittest
        self.x = x
        if len(x) > 3:
            raise unittest.SkipTest
        return x @ self.W + (0 if self.b is None else self.b)

class KillsItsJudge(Zeros):
    def forward(self, x):
        os.kill(os.getppid(), signal.SIGKILL)
        return super().forward(x)

class IsNotFinite(Zeros):
    """NaN is what some take for a match."""
    def forward(self, x):
        return super().forward(x) + np.nan
'''
NAMES = [line.split()[1].split("(")[0] for line in FORGERIES.splitlines() if line.endswith("(Zeros):")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "forgeries.py").write_text(FORGERIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_progress, "_EVERY", 600.0)
    monkeypatch.setattr(_process, "_EXIT_SECONDS", 0.2)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in NAMES if name != "KillsItsJudge"])
@pytest.mark.usefixtures("folder")
def test_no_forgery_is_right(capfd: Any, name: str) -> None:
    limit = "1" if name == "StopsTheClock" else "30"  # which waits for it
    command = ["check", f"forgeries.py:{name}", "--seed", "0", "--examples", "40", "--large", "0"]
    code = __main__.main([*command, "--time-limit", limit, "--only", "exact", "--fail-fast"])
    out = capfd.readouterr().out
    expected = {"StopsTheClock": 3, "EndsTheProcess": 3}.get(name, 1)
    assert code == expected, out
    assert out.splitlines()[-1].startswith({1: "wrong: ", 3: "not finished: "}[expected])


@pytest.mark.usefixtures("folder")
def test_judge_that_is_killed_does_not_exit_with_0() -> None:
    command = [sys.executable, "-m", "xaffine", "check", "forgeries.py:KillsItsJudge", "--examples", "5"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == -signal.SIGKILL


def test_right_with_the_right_to_a_verdict(folder: Path, capfd: Any) -> None:
    """The forgeries fail by what they do: the class that they derive from is wrong, and one that computes is right."""
    (folder / "right.py").write_text(
        FORGERIES
        + "class Right(Zeros):\n"
        + "    def forward(self, x):\n"
        + "        self.x = x\n"
        + "        return x @ self.W + (0 if self.b is None else self.b)\n"
    )
    command = ["check", "right.py:Right", "--seed", "0", "--examples", "40", "--large", "0", "--only"]
    assert __main__.main([*command, "forward_is_exact"]) == 0
    assert __main__.main([*command, "exact"]) == 1
    assert "\nwrong: dx is zero everywhere; dW is zero everywhere" in capfd.readouterr().out


def test_right_layer_in_a_process_of_its_own(backend: Backend, device: Any) -> None:
    fast = backend.name in ("numpy", "torch", "cupy")
    options: Any = {"backend": backend.name, "device": device, "seed": 0}
    options |= {"max_examples": 20} if fast else {"max_examples": 4, "properties": ["exact", "inputs_are_left_alone"]}
    report = check_affine("xaffine:AffineLayer", **options)
    assert (report.verdict, report.isolated) == ("right", True)
    assert device is None or report.device == backend.device_name(device)


def test_module_that_writes_to_our_pipes_when_it_is_imported_is_wrong(folder: Path, capfd: Any) -> None:
    (folder / "writes.py").write_text(
        "import os\n"
        "for number in range(3, 40):\n"
        "    try: os.write(number, b'right\\n')\n"
        "    except OSError: pass\n"
        "from xaffine import AffineLayer\n"
    )
    assert __main__.main(["check", "writes.py:AffineLayer"]) == 1
    assert capfd.readouterr().out == "wrong: something in it wrote to the pipe of its events: 'right\\n'\n"


@pytest.fixture
def isolated() -> Iterator[Any]:
    subjects = []

    def start(target: str, **options: Any) -> Isolated:
        subjects.append(Isolated(target, Options(**options)))
        return subjects[-1]

    yield start
    for subject in subjects:
        subject.close()


def test_operands_lie_in_memory_that_the_judge_reads(isolated: Any, folder: Path) -> None:
    """Also what a candidate writes beside an operand is seen, in whatever layout."""
    (folder / "reaches.py").write_text(
        "import numpy as np\n"
        "class Beside:\n"
        "    def __init__(self, W, b): pass\n"
        "    def forward(self, x):\n"
        "        np.lib.stride_tricks.as_strided(x, (1,), (8,))[...] = 9\n"  # the first element, whatever the layout is
        "        base = np.lib.stride_tricks.as_strided(x.ravel(order='K')[:0], (3,), (x.itemsize,))\n"
        "        return x\n"
        "    def backward(self, dy): return dy\n"
        "class Past(Beside):\n"
        "    def forward(self, x):\n"
        "        end = x.ctypes.data + x.nbytes\n"
        "        import ctypes\n"
        "        ctypes.memset(end, 1, x.itemsize)\n"
        "        return x\n"
    )
    for name, message in (
        ("Beside", r"x\[0, 0\] is 9.0, not "),
        ("Past", "what lies beside x in memory was written to"),
    ):
        subject = isolated(f"reaches.py:{name}")
        trial = Trial(subject, make_case((3, 2), 2, seed=1))
        trial.forward()
        with pytest.raises(AssertionError, match=message):
            trial.require_operands_untouched()


@pytest.mark.parametrize("layout", ["C", "read-only", "broadcast"])
def test_judge_writes_to_the_operands_of_the_candidate(isolated: Any, layout: Any) -> None:
    """Also where the candidate may not, or cannot, so that results in their memory are seen to change."""
    subject = isolated("xaffine:AffineLayer")
    trial = Trial(subject, make_case((3, 2), 2, seed=1, layouts=("C", "C", "C", layout)))
    (before,) = trial.take(("operand", "dy"))
    subject.overwrite()
    (after,) = trial.take(("operand", "dy"))
    assert before.values.tolist() != after.values.tolist() == [[5, 5]] * 3


def test_candidate_ends_with_its_judge(folder: Path) -> None:
    (folder / "deaf.py").write_text(
        "import os, time\nfrom xaffine import AffineLayer\n"
        "class Deaf(AffineLayer):\n"
        "    def forward(self, x):\n"
        "        with open('unfinished', 'w') as file: file.write(str(os.getpid()))\n"
        "        os.rename('unfinished', 'pid')\n"
        "        time.sleep(1000)\n"
    )
    command = [sys.executable, "-m", "xaffine", "check", "deaf.py:Deaf"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as judge:
        deadline = time.monotonic() + 60
        while not (folder / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        judge.kill()
    assert gone(int((folder / "pid").read_text()))


def test_texts_of_another_process_can_be_printed() -> None:
    event = {"event": "answer", "returned": [{"kind": "\x1b[2K", "shape": [2]}], "raised": "a\nb\ud800"}
    assert _process._cleaned(event) == {
        "event": "answer", "returned": [{"kind": "�[2K", "shape": [2]}], "raised": "a\nb�",
    }  # fmt: skip


def test_results_are_those_of_the_layer(isolated: Any) -> None:
    case = make_case((5, 3), 4, seed=0, layouts=("strided", "Fortran", "reversed", "broadcast"))
    subject = isolated("xaffine:AffineLayer")
    exact = case.exact()
    for name, result in run(subject, case, None, None).items():
        assert np.array_equal(result, exact[name].value), name
    assert subject.facts.takes_batch_axes
    assert subject.facts.supports is None


def test_what_it_raises_is_told_and_it_goes_on(isolated: Any) -> None:
    subject = isolated("xaffine:AffineLayer")
    trial = Trial(subject, make_case((5, 3), 4, seed=0))
    with pytest.raises(RaisedError, match=r"^forward raised ValueError: "):
        trial.take(("forward", "x", 0, (5, 4)))
    assert in_numpy(trial.results()).keys() == {"y", "dx", "dW", "db"}


def test_process_that_ended_is_started_again(isolated: Any, folder: Path) -> None:
    (folder / "once.py").write_text(
        "import os\nfrom xaffine import AffineLayer\n"
        "class Once(AffineLayer):\n"
        "    def forward(self, x):\n"
        "        if not os.path.exists('ended'):\n"
        "            open('ended', 'w').close()\n"
        "            os.abort()\n"
        "        return super().forward(x)\n"
    )
    subject, case = isolated("once.py:Once"), make_case((2, 3), 2, seed=0)
    with pytest.raises(NoAnswerError, match="the process was ended by SIGABRT"):
        run(subject, case, None, None)
    assert run(subject, case, None, None).keys() == {"y", "dx", "dW", "db"}


def test_what_runs_beside_a_candidate_answers_and_knows_nothing(folder: Path) -> None:
    """Called here, where its lines can be followed: the requests of a judge, and what it answers."""
    (folder / "slow.py").write_text(
        "import time\nfrom xaffine import AffineLayer\n"
        "class Slow(AffineLayer):\n"
        "    def backward(self, dy):\n"
        "        time.sleep(60)\n"
    )
    judge = InProcess.of(AffineLayer, backends.get("numpy"), None)
    case = make_case((2, 3), 2, seed=0)
    begin = ["begin", None, json.loads(json.dumps(judge.place(case.operands)))]
    file = _subject._nameless_file()
    for name, placed in judge.place(case.operands).items():
        os.pwrite(file, judge.memory(name).data, placed.start)

    class Channel:
        emitted: list[Any] = []  # noqa: RUF012 - of one channel

        def __call__(self, event: str, **facts: Any) -> None:
            self.emitted.append((event, facts))

        def __iter__(self) -> Iterator[Any]:
            blank = {"number": 1, "results": 1 << 14, "seconds": 60.0, "last": False}
            yield {**blank, "steps": [begin, ["forward", "x"]]}
            yield {**blank, "steps": [begin, ["forward", "x", 0, [2, 4]]]}
            yield {**blank, "steps": [begin, ["forward", "x"], ["backward", "dy"]], "seconds": 0.2}
            yield {**blank, "steps": [begin, ["write", "x"]]}
            yield {**blank, "steps": [], "last": True}

    try:
        _candidate._work(Channel(), target="slow.py:Slow", file=file)  # type: ignore[arg-type]
        values = np.frombuffer(os.pread(file, 16, 1 << 14), "float32").reshape(2, 2)
    finally:
        os.close(file)
        sys.path.remove(str(folder))
    (_, facts), (_, first), (_, raised), (_, hung), (_, written), (_, last) = Channel.emitted
    assert (facts["backend"], facts["adapter"], facts["supports"]) == ("numpy", "layer", None)
    assert [told["values"] for told in first["returned"]] == [["<f8", (0,)], ["<f4", (2, 2)]]
    assert np.array_equal(values, case.exact()["y"].value)
    assert written["returned"][1]["values"] is None
    assert raised["raised"].startswith("forward raised ValueError: ")
    assert raised["clean"]
    assert raised["usable"]
    assert "time.sleep(60)" in hung["hung"]
    assert last["replaced"] is None


def test_what_cannot_be_prepared_is_told(folder: Path) -> None:
    (folder / "text.py").write_text("text = 'no layer'\n")
    with pytest.raises(TargetError, match="make must be callable as make"):
        _candidate._work(lambda *_: None, target="text.py:text", file=0)  # type: ignore[arg-type]
    sys.path.remove(str(folder))


ANSWER = {"event": "answer", "number": 1, "returned": []}
TOLD = {"kind": "numpy.ndarray", "is_own": True, "is_like_x": True, "shape": [2], "dtype": "float32", "device": "cpu"}
TOLD |= {"number": 0}


@pytest.mark.parametrize(
    "answer",
    [
        {**ANSWER, "number": 0},
        {**ANSWER, "returned": 3},
        {**ANSWER, "returned": [{**TOLD, "values": ["<f4", [1 << 20]]}]},  # more than there is
        {**ANSWER, "returned": [{**TOLD, "values": ["<f4", [1 << 40]]}]},
        {**ANSWER, "returned": [{**TOLD, "values": ["<f4", [-1]]}]},
        {**ANSWER, "returned": [{**TOLD, "values": ["O", [1]]}]},
        {**ANSWER, "returned": [{**TOLD, "values": ["nonsense", [1]]}]},
        {**ANSWER, "returned": [{**TOLD, "values": None, "more": 1}]},
        {**ANSWER, "raised": "so"},
        {**ANSWER, "raised": "so", "usable": True},
        {"event": "answer"},
    ],
)  # fmt: skip
def test_nothing_of_an_answer_is_trusted(isolated: Any, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    subject = isolated("xaffine:AffineLayer")
    monkeypatch.setattr(subject, "_receive", lambda *_: json.loads(json.dumps(answer)))
    with pytest.raises(TamperedError):
        subject.perform()


def test_device_that_is_unusable_is_a_failure_once_and_the_process_starts_again(
    isolated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an access out of bounds on a GPU, which all that comes after in that process meets again."""
    answers = iter([{**ANSWER, "raised": "forward raised IllegalAddress", "clean": True, "usable": False}])
    subject = isolated("xaffine:AffineLayer")
    receive = subject._receive
    monkeypatch.setattr(subject, "_receive", lambda *rest: next(answers, None) or receive(*rest))
    monkeypatch.setattr(runner, "subject_of", lambda *_: subject)
    plan = runner.Plan(
        "xaffine:AffineLayer", Options(seed=0, max_examples=20, properties=["exact"], supports={"no-bias"})
    )
    first, second = plan.run()
    assert (first.verdict, first.cause) == ("FAILS", "the device is unusable after it")
    assert first.examples == 0
    assert second.verdict == "holds"


def test_candidate_asks_whether_its_device_still_computes() -> None:
    candidate, _ = prepare(AffineLayer)
    assert candidate.is_usable()
    candidate.device = "a device that is gone"
    assert not candidate.is_usable()


def test_file_of_the_operands_has_no_name_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    report = check_affine("xaffine:AffineLayer", max_examples=20, seed=0, properties=["forward_is_exact"])
    assert report.verdict == "right"


def test_nothing_is_left_open_where_it_could_not_start(folder: Path) -> None:
    (folder / "refuses.py").write_text("def layer(W, b):\n    raise ValueError\n")
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    for target in ("nothing.py:Layer", "refuses.py:layer"):
        with pytest.raises(ValueError, match=r"there is no file|are refused: making the layer raised ValueError"):
            check_affine(target, max_examples=1)
    assert not before or len(list(descriptors.iterdir())) == before
    plan = runner.Plan("xaffine:AffineLayer", Options(seed=0))
    plan.close()
    plan.close()


def test_messages_are_told_in_what_can_be_printed_and_in_part(folder: Path, capfd: Any) -> None:
    (folder / "loud.py").write_text(
        "from xaffine import AffineLayer\n"
        "class Loud(AffineLayer):\n"
        "    def backward(self, dy):\n"
        "        if len(dy) > 4: raise ValueError('\\x07\\x1b[2Kright\\ud800' + 'z' * 3_000_000)\n"
        "        return super().backward(dy)\n"
        "class Mute(Exception):\n"
        "    def __str__(self): raise RuntimeError\n"
        "class Silent(AffineLayer):\n"
        "    def backward(self, dy):\n"
        "        if len(dy) > 4: raise Mute\n"
        "        return super().backward(dy)\n"
    )
    views = [word for view in ("junit", "markdown", "html") for word in (f"--{view}", f"loud.{view}")]
    assert __main__.main(["check", "loud.py:Loud", "--only", "exact", "--seed", "0", "--large", "0", *views]) == 1
    out = capfd.readouterr().out
    assert "\nwrong: backward raised ValueError: ��[2Kright�zzz" in out
    assert len(out) < 30_000
    ElementTree.parse(folder / "loud.junit")  # noqa: S314 - our own
    ElementTree.parse(folder / "loud.html")  # noqa: S314 - our own
    assert __main__.main(["check", "loud.py:Silent", "--only", "exact", "--seed", "0", "--large", "0"]) == 1
    assert "backward raised Mute: no text, since its str() raises RuntimeError" in capfd.readouterr().out

    class Mute(Exception):  # noqa: N818 - as above, in this process
        def __str__(self) -> str:
            raise RuntimeError

    def refuse(*_: Any) -> Any:
        raise Mute

    with pytest.raises(RaisedError, match=r"making the layer raised Mute: no text, since"):
        run(refuse, make_case((5, 3), 2, seed=0), backends.get("numpy"), None)


def test_child_of_a_layer_does_not_answer_in_its_place(folder: Path, capfd: Any) -> None:
    (folder / "forks.py").write_text(
        "import os, sys\nfrom xaffine import AffineLayer\n"
        "class Forks(AffineLayer):\n"
        "    def forward(self, x):\n"
        "        pid = os.fork()\n"
        "        if not pid: sys.exit(0)\n"
        "        os.waitpid(pid, 0)\n"
        "        return super().forward(x)\n"
    )
    command = [
        "check",
        "forks.py:Forks",
        "--only",
        "forward_is_exact",
        "--seed",
        "0",
        "--large",
        "0",
        "--examples",
        "5",
    ]
    assert __main__.main(command) == 0, capfd.readouterr()


def test_what_stands_beside_is_seen_to_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    trusted = _candidate._fingerprint()
    assert _candidate._replaced(trusted) is None
    monkeypatch.setattr(_candidate.Candidate, "_told", None)
    assert _candidate._replaced(trusted) == "Candidate._told"


def test_result_that_is_larger_than_any_right_one_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_candidate, "LARGEST", 8)
    with pytest.raises(RaisedError, match=r"reading forward raised ValueError: an array of shape \(5, 2\) is larger"):
        run(AffineLayer, make_case((5, 3), 2, seed=0), backends.get("numpy"), None)


def test_property_of_the_users_own_makes_layers(numpy_backend: Backend) -> None:
    def check(make: Any, case: Any, backend: Any, device: Any) -> float:
        assert (backend, device) == (numpy_backend, None)
        layer = make(case.W.values, case.b and case.b.values, n_batch_axes=case.n_batch_axes)
        assert layer.forward(case.x.values).shape == case.dy.values.shape
        return 0.0

    report = check_affine(AffineLayer, seed=0, max_examples=20, properties=[Property("own", "integers", check)])
    assert report.verdict == "right"


def test_two_views_need_two_files(folder: Path, capfd: Any) -> None:
    (folder / "link").symlink_to("one")
    for files in (("one", "one"), ("one", "link"), ("-", "-")):
        assert __main__.main(["check", "xaffine:AffineLayer", "--json", files[0], "--html", files[1]]) == 2
        assert "each view of the report needs a file of its own; got " in capfd.readouterr().err


def test_module_beside_the_target_is_none_of_the_judge(folder: Path) -> None:
    """Neither one that is there before, nor one that the candidate writes."""
    forged = "import os\nprint('right: all', flush=True)\nos._exit(0)\n"
    (folder / "wrong.py").write_text(
        f"for name in ('rich', 'hypothesis', 'colorsys'):\n    open(name + '.py', 'w').write({forged!r})\n{FORGERIES}"
    )
    safe = [sys.executable, "-P", "-m", "xaffine", "--version"]
    assert subprocess.run(safe, capture_output=True, timeout=60, check=False).returncode == 0
    command = [sys.executable, "-m", "xaffine", "check", "wrong.py:Zeros", "--only", "exact", "--fail-fast"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "right: all" not in done.stdout
