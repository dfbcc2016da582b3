"""``xaffine check``: what it prints, its exit code, and what becomes of implementations that crash or hang."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.helpers import gone
from xaffine import __main__
from xaffine.testing import PROPERTIES, _progress
from xaffine.testing.cases import FEATURES

ALL = ("--supports", *(set(FEATURES) - {"last-axis"}))  # whatever it refuses
# Implementations in a module of their own, as users have them.
LAYERS = '''
import os, signal, sys, time
from xaffine import AffineLayer as Right

class Square(Right):
    """W is not transposed where it is square."""
    def backward(self, dy):
        dx = super().backward(dy)
        n, m = self.W.shape
        return (dy @ self.W).reshape(dx.shape) if n == m else dx

class Deeper:
    Layer = Square

class TakesNothing:
    pass

class Negative(Right):
    """Has the wrong sign in every case."""
    def backward(self, dy):
        return -super().backward(dy)

class Prints(Right):
    def forward(self, x):
        print("forward of", x.shape)
        return super().forward(x)

class Sleeps(Right):
    """Hangs in the first large case, and computes the others."""
    hung = False

    def forward(self, x):
        if x.size > 8 and not Sleeps.hung:
            Sleeps.hung = True
            while True:
                time.sleep(0.01)
        return super().forward(x)

class Deaf(Right):
    def forward(self, x):
        if x.size > 8:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as in a call that never comes back
            time.sleep(1000)
        return super().forward(x)

class Crashes(Right):
    def forward(self, x):
        if x.size > 8:
            print("about to crash", file=sys.stderr, flush=True)
            os.abort()
        return super().forward(x)

class Exits(Right):
    def forward(self, x):
        os._exit(3)

class ExitsInBackward(Right):
    def backward(self, dy):
        os._exit(0)

class LeavesAThread(Right):
    def forward(self, x):
        import threading
        threading.Thread(target=time.sleep, args=(1000,)).start() if threading.active_count() < 3 else None
        return super().forward(x)

class CrashesAtTheEnd(Right):
    def forward(self, x):
        import atexit
        atexit.register(os.abort)
        return super().forward(x)

class PrintsBytes(Right):
    def forward(self, x):
        os.write(2, b"\\xff\\xfe\\n")
        os.kill(os.getpid(), 40)

def write_to_pipes(*events):
    for number in range(3, 64):
        for event in events:
            try:
                os.write(number, event)
            except OSError:
                pass

class PrintsThatItIsDone(Right):
    def __init__(self, W, b):
        print('{"event": "done"}', flush=True)
        os._exit(0)

class WritesThatItIsDone(Right):
    def __init__(self, W, b):
        write_to_pipes(b'{"event": "done"}\\n')
        os._exit(0)

class WritesThatItIsDoneAndGoesOn(Right):
    def __init__(self, W, b):
        write_to_pipes(b'{"event": "done"}\\n')
        super().__init__(W, b)

class WritesResults(Right):
    def __init__(self, W, b):
        import json
        from xaffine.testing import PROPERTIES
        for prop in PROPERTIES:
            facts = {"property": prop.name, "tier": prop.tier, "sentence": "", "verdict": "holds", "told": 3}
            facts |= {"cases": 3, "examples": 3, "worst_error": 0.0, "worst_case": None}
            facts |= {"reason": None, "code": None, "cause": None}
            write_to_pipes(json.dumps({"event": "result", **facts}).encode() + b"\\n")
        write_to_pipes(b'{"event": "done"}\\n')
        os._exit(0)

class TellsAgain(Right):
    def __init__(self, W, b):
        from xaffine.testing._process import Channel
        Channel()("done")
        os._exit(0)

class WritesGarbage(Right):
    def __init__(self, W, b):
        write_to_pipes(b"\\xff\\x00[[[ garbage")
        super().__init__(W, b)

class ClosesPipes(Right):
    def __init__(self, W, b):
        os.closerange(3, 64)
        super().__init__(W, b)

class IsKilled(Right):
    def backward(self, dy):
        os.kill(os.getpid(), signal.SIGKILL)

class InterruptsItself(Right):
    def forward(self, x):
        raise KeyboardInterrupt

class ExitsWithoutAnError(Right):
    def forward(self, x):
        sys.exit(0)

class LeavesAProcess(Right):
    def __init__(self, W, b):
        if os.fork():
            os._exit(0)
        with open("pid", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(1000)

class LeavesItsGroup(Right):
    """Starts a process that no signal to the group reaches, and that holds the pipes."""
    ended = True

    def __init__(self, W, b):
        super().__init__(W, b)
        if LeavesItsGroup.ended:
            LeavesItsGroup.ended = False
            pid = os.fork()
            if not pid:
                os.setsid()
                time.sleep(30)
                os._exit(0)
            with open("pid", "w") as file:
                file.write(str(pid))

class PrintsForEver(Right):
    def forward(self, x):
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            os.write(2, bytes(1 << 16))
        os._exit(0)

class WritesALongLine(Right):
    def forward(self, x):
        while True:
            write_to_pipes(bytes(1 << 16))

class Waits(Right):
    """Tells in a file that it runs, once the first property is done."""
    calls = 0

    def backward(self, dy):
        Waits.calls += 1
        if Waits.calls > 8:
            with open("pid.unfinished", "w") as file:
                file.write(str(os.getpid()))
            os.rename("pid.unfinished", "pid")
            time.sleep(1000)
        return super().backward(dy)

class Rude(Right):
    """Sees a W that was bound after the forward."""
    def backward(self, dy):
        dx = super().backward(dy)
        return (dy @ self.W.T).reshape(dx.shape)

not_callable = 3
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "layers.py").write_text(LAYERS)
    (tmp_path / "broken.py").write_text("import math\nmath.nonsense\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(5)\n")
    (tmp_path / "crashes.py").write_text("import os\nos.abort()\n")
    (tmp_path / "leaves.py").write_text("import os\nos._exit(0)\n")
    (tmp_path / "needs.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "other").mkdir()
    for name in ("json.py", "sys.py"):
        (tmp_path / "other" / name).write_text(LAYERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_progress, "_EVERY", 600.0)  # nothing on standard error, however slow the machine is
    return tmp_path


def checked(capfd: Any, *arguments: str, examples: int = 10) -> tuple[int, str, str]:
    code = __main__.main(["check", "--large", "0", *arguments, "--seed", "0", "--examples", str(examples)])
    printed = capfd.readouterr()
    return code, printed.out, printed.err


def test_right_implementation(capfd: Any) -> None:
    code, out, err = checked(capfd, "layers:Right", examples=5)
    assert (code, err) == (0, "")
    assert out.startswith("layers:Right on numpy 2")
    assert "; float32, float64; seed 0\n" in out
    assert out.count("holds") == len(PROPERTIES)
    assert "FAILS" not in out
    assert out.endswith(f"\n\nright: {5 * len(PROPERTIES)} cases of {len(PROPERTIES)} properties hold\n")


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder, the exit code and the output of a check of Square, which takes seconds to find the smallest cases."""
    folder = tmp_path_factory.mktemp("square")
    (folder / "layers.py").write_text(LAYERS)
    views = [word for view in ("json", "junit", "markdown", "html") for word in (f"--{view}", f"report.{view}")]
    command = [sys.executable, "-m", "xaffine", "check", "--mixed", "--seed", "0", "--large", "0", *views]
    command += ["--dtype", "float32", "float64", "layers:Deeper.Layer"]
    child = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return folder, child.returncode, child.stdout


def test_wrong_implementation(square: Any) -> None:
    folder, code, out = square
    assert code == 1
    assert "backward_is_exact does not hold.\nOn small integers dx is dy Wᵀ" in out
    assert "\ndx came out as\n" in out
    assert "and was expected as\n" in out
    assert "\nFor the same cause: backward_is_within_bounds, differences_are_adjoint_to_gradients, " in out
    assert out.endswith("\nwrong: dx uses W where Wᵀ belongs\n")
    assert "module = importlib.import_module('layers')\nmake = module.Deeper.Layer\n" in out
    # The printed code runs, and fails in the same way.
    script = out.partition("to paste and run:\n\n")[2].partition("\n\nFor the same")[0]
    command = [sys.executable, "-c", script]
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 1
    expected = out.partition("exactly.\n\ndx uses W where Wᵀ belongs: ")[2].splitlines()[0]
    assert f"AssertionError: {expected}" in again.stderr


def test_report_as_json(square: Any) -> None:
    report = json.loads((square[0] / "report.json").read_text())
    assert (report["target"], report["backend"], report["seed"]) == ("layers:Deeper.Layer", "numpy", 0)
    assert report["dtypes"] == ["float32", "float64"]
    assert report["isolated"]
    by_name = {result["property"]: result for result in report["properties"]}
    assert list(by_name) == [prop.name for prop in PROPERTIES]
    assert by_name["forward_is_exact"]["verdict"] == "holds"
    assert by_name["forward_is_within_bound"]["worst_case"].startswith("make_case(")
    assert by_name["backward_is_exact"]["verdict"] == "FAILS"
    assert (report["verdict"], report["conclusion"]) == ("wrong", by_name["backward_is_exact"]["cause"])
    assert "make_case(" in by_name["backward_is_exact"]["code"]
    assert report["cores"] > 0


def test_report_for_ci(square: Any) -> None:
    suite = ElementTree.parse(square[0] / "report.junit").getroot()  # noqa: S314 - our own
    assert (suite.get("tests"), suite.get("errors")) == (str(len(PROPERTIES)), "0")
    failures = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert failures["forward_is_exact"] is None
    assert failures["backward_is_exact"].get("message") == "dx uses W where Wᵀ belongs"
    assert "case = make_case((" in failures["backward_is_exact"].text
    assert suite.get("failures") == str(sum(failure is not None for failure in failures.values()))
    assert suite.get("skipped") == str(sum(case.find("skipped") is not None for case in suite.iter("testcase"))) != "0"
    assert "\nwrong: dx uses W where Wᵀ belongs" in suite.find("system-out").text
    summary = (square[0] / "report.markdown").read_text()
    assert summary.startswith("**wrong**: dx uses W where Wᵀ belongs\n\nlayers:Deeper.Layer on numpy ")
    assert "| backward_is_exact | exact | FAILS | " in summary
    assert "<details><summary>backward_is_exact, backward_is_within_bounds, " in summary


def test_report_for_a_browser(square: Any) -> None:
    page = ElementTree.fromstring((square[0] / "report.html").read_text())  # noqa: S314 - it is well-formed, too
    text = "".join(page.itertext())
    assert "backward_is_exactexactFAILS" in text
    assert "wrong: dx uses W where Wᵀ belongslayers:Deeper.Layer on numpy " in text
    assert [meter.get("max") for meter in page.iter("meter")]
    assert "make = module.Deeper.Layer" in page.find(".//details/pre").text


def test_code_to_paste_imports_a_target_of_a_module(capfd: Any) -> None:
    code, out, err = checked(capfd, "layers:Negative", examples=2)
    assert (code, err) == (1, "")
    assert "module = importlib.import_module('layers')\nmake = module.Negative\n" in out


def test_large_sizes_and_declared_gaps(capfd: Any) -> None:
    code, out, _ = checked(capfd, "layers:Right", "--large", "8", "--supports", "float32", "tensors", examples=8)
    assert code == 0
    assert "forward_is_exact (large)" in out
    assert "not tested: b = None\n" in out
    assert "not tested: dtype float64\n" in out


def test_manners_count_where_they_are_asked_for(capfd: Any) -> None:
    only = ("--only", "exact", "rebound_parameters_are_not_seen", "--mixed")
    code, out, _ = checked(capfd, "layers:Rude", *only)
    assert code == 0
    assert re.findall(r"^(\w+) +(?:exact|manners) +(holds|lacking) ", out, re.MULTILINE) == [
        ("forward_is_exact", "holds"), ("backward_is_exact", "holds"), ("rebound_parameters_are_not_seen", "lacking"),
    ]  # fmt: skip
    assert out.endswith("\nright: 20 cases of 2 properties hold; bad manners: rebound_parameters_are_not_seen\n")
    code, out, _ = checked(capfd, "layers:Rude", *only, "--strict")
    assert code == 1
    assert "\nwrong: dx[" in out


def test_fail_fast_leaves_the_others_out(capfd: Any) -> None:
    code, out, _ = checked(capfd, "layers:Negative", "--fail-fast")
    assert code == 1
    assert "not tested: forward_is_within_bound (not reached)\n" in out
    assert out.endswith("\nwrong: dx is -1 times what it should be\n")


def test_what_the_implementation_prints_does_not_disturb(capfd: Any) -> None:
    assert checked(capfd, "layers:Prints", examples=8)[0] == 0


def test_crash_is_reported_with_its_case(capfd: Any) -> None:
    code, out, _ = checked(capfd, "layers:Crashes", *ALL)
    assert code == 3
    assert "forward_is_exact did not finish." in out
    assert "the process was ended by SIGABRT" in out
    assert "case = make_case((" in out
    assert "\nFor the same cause: backward_is_exact\n" in out  # which was tried in another process
    assert "not tested: forward_is_within_bound (not reached)" in out
    assert "\nnot finished: 0 of 15 properties have a verdict; the process was ended by SIGABRT\n" in out


def test_end_in_a_first_small_call_is_reported_with_its_case(capfd: Any) -> None:
    for name, why in (("Exits", "the process ended with exit code 3"), ("Crashes", "the process was ended by SIGABRT")):
        code, out, err = checked(capfd, f"layers:{name}", "--seed", "1")
        assert (code, err) == (3, "")
        assert f" (not tried after {why})\n" in out
        assert "case = make_case((" in out


def test_exit_is_reported_with_its_case(capfd: Any) -> None:
    code, out, _ = checked(capfd, "layers:Exits", *ALL)
    assert code == 3
    assert "the process ended with exit code 3" in out


@pytest.mark.parametrize("name", ["LeavesAThread", "CrashesAtTheEnd"])
def test_what_comes_after_the_last_property_does_not_count(capfd: Any, name: str) -> None:
    code, out, err = checked(capfd, f"layers:{name}", examples=8)
    assert (code, err) == (0, "")
    assert out.count("holds") == len(PROPERTIES)


def test_process_that_left_the_group_is_not_waited_for(capfd: Any, folder: Path) -> None:
    start = time.monotonic()
    code, out, err = checked(capfd, "layers:LeavesItsGroup", examples=8)
    assert time.monotonic() - start < 20
    assert (code, err) == (0, "")
    assert out.count("holds") == len(PROPERTIES)
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)


def test_what_it_prints_without_end_fills_no_memory(capfd: Any) -> None:
    tracemalloc.start()
    code, out, _ = checked(capfd, "layers:PrintsForEver", examples=3)
    assert code == 3
    assert "exit code 0" in out
    code, out, _ = checked(capfd, "layers:WritesALongLine", examples=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == 1
    assert "wrote to the pipe of its events" in out
    assert peak < 1 << 25


def test_end_before_the_last_property_is_no_success_with_any_exit_code(capfd: Any) -> None:
    code, out, _ = checked(capfd, "layers:ExitsInBackward", "--time-limit", "20", *ALL)
    assert code == 3
    assert "backward_is_exact did not finish." in out
    assert "\nnot finished: 2 of 15 properties have a verdict; the process ended with exit code 0\n" in out
    assert "the process ended with exit code 0" in out


def test_end_by_an_unnamed_signal_and_words_that_are_no_text(capfd: Any) -> None:
    code, out, _ = checked(capfd, "layers:PrintsBytes")
    assert code == 3
    assert "the process was ended by signal 40" in out


def test_hang_is_reported_with_its_line(capfd: Any) -> None:
    code, out, _ = checked(capfd, "layers:Sleeps", "--time-limit", "0.3", *ALL)
    assert code == 3
    assert "forward_is_exact did not finish." in out
    assert "no answer within 0.3 s\n" in out
    assert "in forward: time.sleep(0.01)\n" in out


def test_hang_that_no_signal_interrupts_is_ended(capfd: Any) -> None:
    start = time.monotonic()
    code, out, _ = checked(capfd, "layers:Deaf", "--time-limit", "0.3", *ALL)
    assert code == 3
    assert time.monotonic() - start < 20  # with the starts of two processes
    assert "no answer within 0.3 s, and none to an interrupt" in out
    assert "case = make_case((" in out
    assert "\nFor the same cause: backward_is_exact\n" in out  # which was tried in another process
    assert "not tested: forward_is_within_bound (not reached)\n" in out


@pytest.mark.parametrize("name", ["PrintsThatItIsDone", "TellsAgain", "ClosesPipes", "IsKilled", "InterruptsItself"])
def test_what_did_not_finish_is_no_success_whatever_it_says(capfd: Any, name: str) -> None:
    code, out, err = checked(capfd, f"layers:{name}", "--json", "-", "--time-limit", "2", *ALL, examples=3)
    report = json.loads(out)
    assert (code, err, report["verdict"]) == (3, "", "not finished")
    assert report["conclusion"].partition(" of ")[0] == str(sum(r["verdict"] == "holds" for r in report["properties"]))
    reached = {result["property"] for result in report["properties"]}
    assert report["gaps"] == [f"{prop.name} (not reached)" for prop in PROPERTIES if prop.name not in reached]
    assert [result["verdict"] for result in report["properties"]].count("not finished") == 2


@pytest.mark.parametrize(
    "name", ["WritesThatItIsDone", "WritesThatItIsDoneAndGoesOn", "WritesResults", "WritesGarbage"]
)
def test_what_writes_to_our_pipes_is_wrong(capfd: Any, name: str) -> None:
    code, out, err = checked(capfd, f"layers:{name}", *ALL, examples=3)
    assert (code, err) == (1, "")
    assert re.search(r"^forward_is_exact +exact +TAMPERED +0 ", out, re.MULTILINE)
    assert "\nwrong: something in it wrote to the pipe of its events: " in out
    code, out, err = checked(capfd, f"layers:{name}", examples=3)
    assert (code, err) == (1, "")
    assert out.startswith("wrong: something in it wrote to the pipe of its events: ")


def test_exit_that_can_be_caught_is_a_wrong_answer(capfd: Any) -> None:
    code, out, _ = checked(capfd, "layers:ExitsWithoutAnError", examples=1)
    assert code == 1
    assert "forward_is_exact does not hold.\n" in out
    assert "forward raised SystemExit: 0" in out
    assert "not finished" not in out


def test_processes_of_the_implementation_end_with_it(capfd: Any, folder: Path) -> None:
    assert checked(capfd, "layers:LeavesAProcess", "--time-limit", "0.1")[0] == 3
    assert gone(int((folder / "pid").read_text()))


# Signals


@pytest.mark.parametrize(
    ("number", "whom"), [(signal.SIGINT, "process"), (signal.SIGINT, "group"), (signal.SIGTERM, "process")]
)
def test_signal_ends_the_check_with_what_was_found(folder: Path, number: signal.Signals, whom: str) -> None:
    command = [sys.executable, "-m", "xaffine", "check", "layers:Waits", "--seed", "0", "--examples", "8", *ALL]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        try:
            deadline = time.monotonic() + 60
            while not (folder / "pid").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            (os.kill if whom == "process" else os.killpg)(parent.pid, number)
            out, err = parent.communicate(timeout=30)
        finally:
            parent.kill()
    assert parent.returncode == 128 + number
    assert err == ("xaffine: interrupted\n" if number == signal.SIGINT else "")
    assert re.search(r"^forward_is_exact +exact +holds", out, re.MULTILINE)
    assert re.search(r"\nnot finished: .*; interrupted\n$", out)
    assert gone(int((folder / "pid").read_text()))


def test_output_that_nobody_reads_is_one_line() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "xaffine", "check", "layers:Right", "--examples", "1"]
    child = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (child.returncode, child.stderr) == (3, "xaffine: not finished: nobody reads what it prints\n")


def test_reader_that_leaves_in_the_middle_is_no_wrong_layer() -> None:
    command = [sys.executable, "-m", "xaffine", "check", "layers:Right", "--examples", "1", "--large", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == "xaffine: not finished: nobody reads what it prints\n"
    assert child.returncode == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the operating system has no device that is always full")
def test_full_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "xaffine", "check", "layers:Right", "--examples", "1", "--large", "0"]
    with Path("/dev/full").open("w") as full:
        child = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert child.returncode == 3
    assert child.stderr.startswith("xaffine: not finished: ")
    assert child.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["layers"],
            "TARGET is package.module:factory or file.py:factory, for example layers:AffineLayer; got 'layers'",
        ),
        (["layers:"], "TARGET is package.module:factory"),
        ([":Right"], "TARGET is package.module:factory"),
        (["nowhere:Right"], "no module named 'nowhere' can be imported from "),
        (["needs:Right"], "no module named 'a_library_that_is_not_there' can be imported from "),
        (["layers:Wrong"], "layers has no 'Wrong'; what it has that can be called: ClosesPipes, Crashes, "),
        (["layers:not_callable"], "make must be callable as make(W, b) and return a layer; it is a int"),
        (["broken:Right"], "importing broken raised AttributeError: module 'math' has no attribute 'nonsense'"),
        (["exits:Right"], "importing exits raised SystemExit: 5"),
        (["crashes:Right"], "the process was ended by SIGABRT"),
        (["layers:Right", "--backend", "nope"], "no backend is called 'nope'; the backends are numpy, "),
        (["layers:Right", "--dtype", "float8"], "dtype ['float8'] is not among those of the backend 'numpy'"),
        (["layers:Right", "--device", "gpu"], "numpy has no device gpu; it has cpu"),
        (["layers:Right", "--supports", "x"], "it also has 'x'"),
        (["layers:Right", "--time-limit", "0"], "time_limit above 0"),
        (["layers:Right", "--time-limit", "inf"], "at most 1e+06 s"),
        (["layers:Right", "--supports", "float16"], "nothing is left to check; not tested: "),
        (["leaves:Right"], "the process ended with exit code 0"),
        (["layers:not_callable.real.nonsense"], "layers has no 'not_callable.real.nonsense'"),
        (["layers.py"], "TARGET is package.module:factory or file.py:factory"),
        (["layers:TakesNothing"], "making the layer raised TypeError: TakesNothing() takes no arguments"),
        (["builtins:print"], "are refused: make(W, b) gave None, not a layer with forward and backward"),
        (["layers.py:"], "TARGET is package.module:factory or file.py:factory"),
        ([".py:Right"], "there is no file '.py', seen from "),
        (["missing/layers.py:Right"], "there is no file 'missing/layers.py', seen from "),
        (["layers.py:Wrong"], "layers.py has no 'Wrong'; what it has that can be called: ClosesPipes, Crashes, "),
        (["broken.py:Right"], "importing broken raised AttributeError: module 'math' has no attribute 'nonsense'"),
        (["needs.py:Right"], "no module named 'a_library_that_is_not_there' can be imported from "),
        (["other/json.py:Right"], "'other/json.py' is not imported, since another module is named 'json': rename the "),
        (["other/sys.py:Right"], "'other/sys.py' is not imported, since another module is named 'sys': rename the "),
    ],
)
def test_what_cannot_run_says_why(capfd: Any, arguments: list[str], message: str) -> None:
    code, out, err = checked(capfd, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("could not run: ")
    assert message in err
    assert "Traceback" not in err


def test_line_that_broke_the_import_is_shown(capfd: Any, folder: Path) -> None:
    assert f"\n  {folder}/broken.py:2, in <module>: math.nonsense\n" in checked(capfd, "broken:Right")[2]


def test_wrong_options_exit_with_2() -> None:
    with pytest.raises(SystemExit) as exit_:
        __main__.main(["check"])
    assert exit_.value.code == 2


@pytest.mark.parametrize("folders", ["sub", "sub/of-a/sub"])
def test_target_in_a_file_imports_what_lies_beside_it(capfd: Any, folder: Path, folders: str) -> None:
    sub = folder / folders
    sub.mkdir(parents=True)
    (sub / "neighbour.py").write_text("from xaffine import AffineLayer\n")
    (sub / "my-layers.py").write_text("import neighbour\nclass Outer:\n    Layer = neighbour.AffineLayer\n")
    for target in (f"{folders}/my-layers.py:Outer.Layer", f"{sub}/my-layers.py:Outer.Layer"):
        code, out, err = checked(capfd, target, examples=8)
        assert (code, err) == (0, "")
        assert out.startswith(f"{target} on numpy 2")


def test_code_of_a_failing_case_imports_a_target_in_a_file(capfd: Any, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "my-layers.py").write_text(f"{LAYERS}\nclass Outer:\n    Layer = Negative\n")
    code, out, _ = checked(capfd, "sub/my-layers.py:Outer.Layer", "--json", "-", examples=5)
    failure = next(result for result in json.loads(out)["properties"] if result["verdict"] == "FAILS")
    assert code == 1
    again = subprocess.run(
        [sys.executable, "-c", failure["code"]], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"AssertionError: {failure['reason'].splitlines()[0]}" in again.stderr
