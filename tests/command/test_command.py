"""The doctor: its facts, its table, its exit code, with and without rich."""

from __future__ import annotations

import builtins
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import xaffine
from xaffine import AffineLayer, __main__, backends
from xaffine._command import doctor, machine, terminal
from xaffine.testing import _process as worker
from xaffine.testing import _progress
from xaffine.testing._process import WorkerError


def report(name: str, **facts: Any) -> dict[str, Any]:
    return {**doctor.blank_report(name, status="not installed", note="to get it: pip install it"), **facts}


RIGHT = report(
    "numpy",
    status="right",
    note=None,
    version="2.0.0",
    device="cpu",
    worst_error=0.25,
    throughput={"size": 64, "layer": 123.4, "matmul": 23456.7, "quiet": True},
)


def examined(monkeypatch: pytest.MonkeyPatch, *reports: dict[str, Any]) -> None:
    """Let the doctor find these backends."""
    by_name = {r["backend"]: r for r in reports}
    monkeypatch.setattr(backends, "names", lambda: tuple(by_name))
    monkeypatch.setattr(doctor, "examine_in_worker", by_name.__getitem__)
    monkeypatch.setattr(doctor, "find_lost_speed", list)


def without(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    """Make some imports fail, as where the `cli` extra is missing."""
    original = builtins.__import__

    def import_some(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in libraries:
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", import_some)


# The whole command on two libraries: each that is installed adds seconds, the slowest of them half a minute.
DOCTOR = """
import sys
from xaffine import __main__, backends
backends.names = lambda: ("numpy", "array-api-strict")
sys.exit(__main__.main(["--json", "-"]))
"""


@pytest.fixture(scope="module")
def printed() -> Any:
    """What the doctor prints as JSON, in a process of its own."""
    child = subprocess.run([sys.executable, "-c", DOCTOR], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(child.stdout)


def test_numpy_is_examined_in_a_worker_process(printed: Any) -> None:
    found = printed["backends"][0]
    assert found["status"] == "right"
    assert found["dtypes"] == ["float32", "float64"]
    assert 0 < found["worst_error"] <= 1
    assert found["throughput"]["layer"] > 0
    assert found["throughput"]["matmul"] > 0


def test_command_prints_every_library_and_the_machine_as_json(printed: Any) -> None:
    assert [(r["backend"], r["status"]) for r in printed["backends"]] == [
        ("numpy", "right"), ("array-api-strict", "right")
    ]  # fmt: skip
    assert printed["cores"] > 0
    assert printed["blas"]


def test_every_library_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    examined: list[str] = []
    monkeypatch.setattr(doctor, "examine_in_worker", lambda name: examined.append(name) or report(name))
    monkeypatch.setattr(doctor, "find_lost_speed", list)
    assert __main__.main([]) == 0
    assert tuple(examined) == backends.names()


def test_absent_backend_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "installed", lambda: ())
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _: None)
    found = doctor.examine_in_worker("torch")
    assert found["status"] == "not installed"
    assert "pip install torch" in found["note"]


def test_unusable_backend_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: str) -> None:
        raise RuntimeError("no CUDA device")

    monkeypatch.setattr(backends, "get", get)
    assert doctor.examine("numpy") == report("numpy", status="unusable", note="no CUDA device")


@pytest.mark.parametrize("with_rich", [True, False])
def test_table_shows_every_fact(monkeypatch: pytest.MonkeyPatch, capsys: Any, with_rich: bool) -> None:
    unusable = report("cupy", status="unusable", note="no CUDA device")
    examined(monkeypatch, RIGHT, report("torch"), unusable, report("dask"))
    if not with_rich:
        without(monkeypatch, "rich", "threadpoolctl")
    assert __main__.main([]) == 0
    printed = capsys.readouterr().out
    for fact in ("numpy", "2.0.0", "cpu", "right", "0.25", "123", "23,457", "unusable"):
        assert fact in printed
    assert "\ncupy: no CUDA device\n" in printed
    assert ("unknown without threadpoolctl" in printed) != with_rich
    machine, table, *_, absent, summary = printed.rstrip("\n").split("\n\n")
    assert machine.count("\n") == 1
    assert max(map(len, table.splitlines())) <= 80
    assert "torch" not in table
    assert absent == 'not installed; pip install any of: torch, "dask[array]"'
    assert summary == "forward and backward are right on numpy; unusable here: cupy"


def test_rate_of_a_busy_machine_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    examined(monkeypatch, {**RIGHT, "throughput": {**RIGHT["throughput"], "quiet": False}})
    assert __main__.main([]) == 0
    printed = capsys.readouterr().out
    assert "123" not in printed
    assert len(re.findall(r"\bbusy\b", printed)) == 3
    assert "run it again when the machine is quiet" in printed


@pytest.mark.parametrize(
    ("cores", "others", "busy", "own", "quiet"),
    [
        (4, 0, 100, 4.0, True),  # all four cores are ours
        (4, 0.16, 100, 3.84, True),
        (4, 0.24, 100, 3.76, False),
        (4, 1.0, 75, 2.0, True),  # one core is idle
        (4, 1.0, 80, 2.2, False),
        (2, 0.5, 75, 1.0, False),
    ],
)
def test_machine_is_quiet_unless_others_take_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, others: float, busy: float, own: float, quiet: bool
) -> None:
    now = SimpleNamespace(seconds=10.0, own=3.0)
    answers = [0.0, busy]  # psutil's first one means nothing
    psutil = SimpleNamespace(cpu_count=lambda: cores, cpu_percent=lambda: answers.pop(0))
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    times = {"monotonic": lambda: now.seconds, "process_time": lambda: now.own}
    monkeypatch.setattr(doctor, "time", SimpleNamespace(**times))
    load = doctor._Load()
    now.seconds, now.own = 11.0, 3.0 + own
    assert busy / 100 * cores - own == pytest.approx(others)
    assert load.is_low() is quiet


def test_rate_is_measured_anew_until_the_machine_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_CPU_SIZE", 16)
    answers = [False, True, False, False, False]
    monkeypatch.setattr(doctor._Load, "is_low", lambda _: answers.pop(0))
    assert doctor.measure_throughput(backends.get("numpy"), 0.001)["quiet"] is True
    assert doctor.measure_throughput(backends.get("numpy"), 0.001)["quiet"] is False
    assert answers == []


def test_without_psutil_a_machine_counts_as_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "psutil")
    assert doctor._Load().is_low()


def test_blas_that_threadpoolctl_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threadpoolctl.threadpool_info", list)
    assert machine.describe_machine()["blas"] == "unknown to threadpoolctl"


def test_wrong_gradients_are_shown_and_exit_with_1(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    examined(monkeypatch, RIGHT, report("torch", status="wrong", note="AssertionError: dW is off"))
    assert __main__.main([]) == 1
    printed = capsys.readouterr().out
    assert "torch: AssertionError: dW is off" in printed
    assert printed.endswith("\nWRONG gradients on torch; forward and backward are right on numpy\n")


def test_layer_with_a_wrong_gradient_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(AffineLayer):
        def backward(self, dy: Any) -> Any:
            return -super().backward(dy)

    with pytest.raises(AssertionError, match=r"^dx\[0, \d+\] is -(\S+), not \1\n"):
        doctor.verify(backends.get("numpy"), ["float32"], make=Wrong)
    monkeypatch.setattr(doctor, "AffineLayer", Wrong)
    monkeypatch.setattr(doctor.verify, "__defaults__", (Wrong,))
    found = doctor.examine("numpy")
    assert found["status"] == "wrong"
    assert re.fullmatch(r"dx\[0, \d+\] is -(\S+), not \1", found["note"])


def test_backend_that_fails_is_not_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> float:
        raise ImportError("libcublas.so.13")

    monkeypatch.setattr(doctor, "verify", fail)
    found = doctor.examine("numpy")
    assert (found["status"], found["note"]) == ("unusable", "ImportError: libcublas.so.13")


def test_throughput_that_fails_leaves_gradients_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> dict[str, float]:
        raise MemoryError("too large")

    monkeypatch.setattr(doctor, "measure_throughput", fail)
    found = doctor.examine("numpy")
    assert (found["status"], found["note"]) == ("right", "rate not measured: MemoryError: too large")


class Slow:
    """A backend each of whose calls takes some time beside that of NumPy, which passes on a clock of its own."""

    devices = ("cpu",)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, a_call: float, first_calls: float, flops: float) -> None:
        self.now, self.calls, self.sizes = 0.0, 0, []
        self.a_call, self.first_calls, self.flops = a_call, first_calls, flops
        self.xp = SimpleNamespace(matrix_transpose=lambda a: a, matmul=self.matmul)
        self.wait = self.from_numpy = lambda array: array
        self.is_gpu = backends.get("numpy").is_gpu
        monkeypatch.setattr(doctor.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(doctor, "affine_vjp", self.affine_vjp)

    def matmul(self, a: Any, _: Any) -> Any:
        self.now += self.a_call + 2 * len(a) ** 3 / self.flops + (self.first_calls if self.calls < 5 else 0)
        self.calls += 1
        self.sizes.append(len(a))
        return a

    def affine_vjp(self, x: Any, W: Any, b: Any) -> Any:
        return self.matmul(x, W), lambda dy: (self.matmul(dy, W), self.matmul(x, dy), b)


@pytest.mark.parametrize(("a_call", "first_calls"), [(0, 0), (0, 3.0), (0.02, 0), (0.01, 30.0), (0.15, 0)])
def test_rate_is_that_of_one_size_however_slow_the_first_calls_are(
    monkeypatch: pytest.MonkeyPatch, a_call: float, first_calls: float
) -> None:
    found = doctor.measure_throughput(Slow(monkeypatch, a_call, first_calls, 200e9))
    assert found["size"] == 1024
    seconds = 3 * a_call + 6 * 1024**3 / 200e9
    assert found["layer"] == pytest.approx(6e-9 * 1024**3 / seconds)
    assert found["matmul"] == pytest.approx(found["layer"])


@pytest.mark.parametrize(("flops", "size"), [(2e6, 128), (1e7, 128), (1e8, 256), (1e9, 512)])
def test_library_that_is_too_slow_says_so_and_soon(monkeypatch: pytest.MonkeyPatch, flops: float, size: int) -> None:
    slow = Slow(monkeypatch, 0, 0, flops)
    monkeypatch.setattr(backends, "get", lambda _: slow)
    monkeypatch.setattr(doctor, "blank_report", lambda *_, **more: more)
    for name in ("name", "version", "use_full_precision", "device_name"):
        setattr(slow, name, lambda *_: None)
    slow.dtypes = tuple
    monkeypatch.setattr(doctor, "verify", lambda *_: 0.5)
    found = doctor.examine("slow")
    assert found["status"] == "right"
    assert "throughput" not in found
    assert f"rate not measured: forward and backward at N = n = m = {size} take " in found["note"]
    assert max(slow.sizes) == size
    assert slow.now < 4 * max(8 * doctor._PASS_LIMIT / 8, 6 * 128**3 / flops)


def test_size_is_larger_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch, 0, 0, 1e9)
    slow.devices = ("cuda:0",)
    monkeypatch.setattr(doctor, "_GPU_SIZE", 64)
    assert doctor.measure_throughput(slow)["size"] == 64
    assert min(slow.sizes) == 8


def test_backend_that_crashes_does_not_stop_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> Any:
        raise WorkerError("the process was ended by SIGSEGV")

    monkeypatch.setattr(doctor, "result_of_worker", crash)
    found = doctor.examine_in_worker("numpy")
    assert found["status"] == "not finished"
    assert found["note"] == "the process was ended by SIGSEGV"


def test_backend_that_hangs_does_not_stop_the_doctor() -> None:
    found = doctor.examine_in_worker("numpy", time_limit=0.01)
    assert found["status"] == "not finished"
    assert found["note"] == "no answer within 0.01 s"


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)", "os.abort()", "os.write(1, b'right'), os._exit(0)"])
def test_worker_that_ends_early_is_never_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str) -> None:
    (tmp_path / "ends.py").write_text(f"import os, sys\n{end}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "result_of_worker", partial(of_module, "ends"))
    found = doctor.examine_in_worker("numpy")
    assert found["status"] == "not finished"
    assert "ended" in found["note"] or "wrote to the pipe" in found["note"]


def of_module(module: str, _: str, *rest: Any) -> Any:
    return worker.result_of_worker(module, *rest)


def test_worker_that_emits_nothing_gave_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "run_worker", lambda *_: iter(()))
    found = doctor.examine_in_worker("numpy")
    assert (found["status"], found["note"]) == ("not finished", "it gave 0 answers instead of one")


@pytest.mark.parametrize(("statuses", "code"), [(("not finished",), 3), (("not finished", "wrong"), 1)])
def test_not_finished_exits_with_3_unless_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, statuses: tuple[str, ...], code: int
) -> None:
    reports = [report(name, status=status) for name, status in zip(("torch", "jax"), statuses, strict=False)]
    examined(monkeypatch, RIGHT, *reports)
    assert __main__.main([]) == code
    printed = capsys.readouterr().out
    wrong = "WRONG gradients on jax; " if code == 1 else ""
    assert printed.endswith(f"\n{wrong}not finished on torch; forward and backward are right on numpy\n")


def test_speed_that_could_not_be_measured_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def crash() -> Any:
        raise WorkerError("the process was ended by SIGILL")

    examined(monkeypatch, RIGHT)
    monkeypatch.setattr(doctor, "find_lost_speed", crash)
    assert __main__.main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == "xaffine could not look for lost speed: the process was ended by SIGILL\n"
    assert "numpy" in printed.out


def test_interrupt_leaves_what_was_examined(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(name: str) -> Any:
        if name == "torch":
            raise KeyboardInterrupt
        return RIGHT

    examined(monkeypatch, RIGHT, report("torch"))
    monkeypatch.setattr(doctor, "examine_in_worker", interrupt)
    assert __main__.main(["--json", "-"]) == 130
    printed = capsys.readouterr()
    assert json.loads(printed.out)["backends"] == [RIGHT]
    assert printed.err == "xaffine: interrupted\n"
    examined(monkeypatch, report("torch"))
    monkeypatch.setattr(doctor, "examine_in_worker", interrupt)
    assert __main__.main([]) == 130
    assert capsys.readouterr().out.endswith("beside the same matrix products alone.\n")


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        __main__.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"xaffine {xaffine.__version__}\n"


def test_bar_moves_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    with terminal.progress_bar(2) as show:
        show("half way", 1)
        show("all the way", 2)
    assert "all the way" in capsys.readouterr().err


def test_file_that_cannot_be_written_is_said_before_anything_is_examined(capsys: Any, tmp_path: Path) -> None:
    for arguments in ([], ["bench"], ["check", "xaffine:AffineLayer"]):
        assert __main__.main([*arguments, "--json", str(tmp_path / "missing" / "report.json")]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "could not run: " in printed.err
        assert "report.json cannot be written: name a regular file, or a new one, in a folder that can" in printed.err


def test_progress_off_a_terminal_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(_progress, "_EVERY", 0.05)
    with terminal.progress_bar(4) as show:
        show("the first", 1)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert set(lines) == {" 25%  the first"}


def test_json_has_what_was_examined(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    examined(monkeypatch, RIGHT)
    assert __main__.main(["--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["backends"], facts["lost_speed"]) == ([RIGHT], [])
