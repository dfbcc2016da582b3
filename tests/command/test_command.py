"""The doctor: its facts, its table, its exit code, with and without rich."""

from __future__ import annotations

import builtins
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from xaffine import AffineLayer, __main__, backends
from xaffine.command import children, doctor, machine, terminal
from xaffine.command.children import ChildError


def report(name: str, **facts: Any) -> dict[str, Any]:
    return {**doctor.blank_report(name, status="not installed", note="to get it: pip install it"), **facts}


RIGHT = report(
    "numpy",
    status="right",
    note=None,
    version="2.0.0",
    device="cpu",
    worst_error=0.25,
    throughput={"size": 64, "layer": 123.4, "matmul": 23456.7},
)


def examined(monkeypatch: pytest.MonkeyPatch, *reports: dict[str, Any]) -> None:
    """Let the doctor find these backends."""
    by_name = {r["backend"]: r for r in reports}
    monkeypatch.setattr(backends, "names", lambda: tuple(by_name))
    monkeypatch.setattr(doctor, "examine_in_child", by_name.__getitem__)
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
sys.exit(__main__.main(["--json"]))
"""


@pytest.fixture(scope="module")
def printed() -> Any:
    """What the doctor prints as JSON, in a process of its own."""
    child = subprocess.run([sys.executable, "-c", DOCTOR], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(child.stdout)


def test_numpy_is_examined_in_a_child_process(printed: Any) -> None:
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
    monkeypatch.setattr(doctor, "examine_in_child", lambda name: examined.append(name) or report(name))
    monkeypatch.setattr(doctor, "find_lost_speed", list)
    assert __main__.main([]) == 0
    assert tuple(examined) == backends.names()


def test_absent_backend_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "installed", lambda: ())
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _: None)
    found = doctor.examine_in_child("torch")
    assert found["status"] == "not installed"
    assert 'pip install "xaffine[torch]"' in found["note"]


def test_unusable_backend_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: str) -> None:
        raise RuntimeError("no CUDA device")

    monkeypatch.setattr(backends, "get", get)
    assert doctor.examine("numpy") == report("numpy", status="unusable", note="no CUDA device")


@pytest.mark.parametrize("with_rich", [True, False])
def test_table_shows_every_fact(monkeypatch: pytest.MonkeyPatch, capsys: Any, with_rich: bool) -> None:
    examined(monkeypatch, RIGHT, report("torch"), report("cupy", status="unusable", note="no CUDA device"))
    if not with_rich:
        without(monkeypatch, "rich", "threadpoolctl")
    assert __main__.main([]) == 0
    printed = capsys.readouterr().out
    for fact in ("numpy", "2.0.0", "cpu", "right", "0.25", "123", "23,457", "absent", "unusable"):
        assert fact in printed
    assert "torch: to get it: pip install it" in printed
    assert "cupy: no CUDA device" in printed
    assert ("unknown without threadpoolctl" in printed) != with_rich
    assert max(map(len, printed.partition("torch: ")[0].splitlines())) <= 110


def test_blas_that_threadpoolctl_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threadpoolctl.threadpool_info", list)
    assert machine.describe_machine()["blas"] == "unknown to threadpoolctl"


def test_wrong_gradients_are_shown_and_exit_with_1(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    examined(monkeypatch, RIGHT, report("torch", status="wrong", note="AssertionError: dW is off"))
    assert __main__.main([]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "torch: AssertionError: dW is off" in printed


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
    assert (found["status"], found["note"]) == ("right", "throughput not measured: MemoryError: too large")


def test_backend_that_crashes_does_not_stop_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> Any:
        raise ChildError("the process was ended by SIGSEGV")

    monkeypatch.setattr(doctor, "answer_of_child", crash)
    found = doctor.examine_in_child("numpy")
    assert found["status"] == "not finished"
    assert found["note"] == "the process was ended by SIGSEGV"


def test_backend_that_hangs_does_not_stop_the_doctor() -> None:
    found = doctor.examine_in_child("numpy", time_limit=0.01)
    assert found["status"] == "not finished"
    assert found["note"] == "no answer within 0.01 s"


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)", "os.abort()", "os.write(1, b'right'), os._exit(0)"])
def test_child_that_ends_early_is_never_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str) -> None:
    (tmp_path / "ends.py").write_text(f"import os, sys\n{end}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "answer_of_child", partial(of_module, "ends"))
    found = doctor.examine_in_child("numpy")
    assert found["status"] == "not finished"
    assert "ended" in found["note"] or "wrote to the pipe" in found["note"]


def of_module(module: str, _: str, *rest: Any) -> Any:
    return children.answer_of_child(module, *rest)


def test_child_that_tells_nothing_gave_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "events_of_child", lambda *_: iter(()))
    found = doctor.examine_in_child("numpy")
    assert (found["status"], found["note"]) == ("not finished", "it gave 0 answers instead of one")


@pytest.mark.parametrize(("statuses", "code"), [(("not finished",), 3), (("not finished", "wrong"), 1)])
def test_not_finished_exits_with_3_unless_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, statuses: tuple[str, ...], code: int
) -> None:
    reports = [report(name, status=status) for name, status in zip(("torch", "jax"), statuses, strict=False)]
    examined(monkeypatch, RIGHT, *reports)
    assert __main__.main([]) == code
    assert "not finished" in capsys.readouterr().out


def test_speed_that_could_not_be_measured_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def crash() -> Any:
        raise ChildError("the process was ended by SIGILL")

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
    monkeypatch.setattr(doctor, "examine_in_child", interrupt)
    assert __main__.main(["--json"]) == 130
    printed = capsys.readouterr()
    assert json.loads(printed.out)["backends"] == [RIGHT]
    assert printed.err == "xaffine: interrupted\n"


def test_device_without_a_text_of_its_own_is_the_cpu() -> None:
    assert doctor._device_name(object()) == "cpu"
    assert doctor._device_name("cuda:0") == "cuda:0"


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        __main__.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("xaffine ")


def test_version_of_what_runs_from_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert machine.own_version() == "not installed"


def test_bar_moves_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    with terminal.progress_bar(2) as show:
        show("half way", 1)
        show("all the way", 2)
    assert "all the way" in capsys.readouterr().err


def test_json_has_what_was_examined(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    examined(monkeypatch, RIGHT)
    assert __main__.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["backends"], facts["lost_speed"]) == ([RIGHT], [])
