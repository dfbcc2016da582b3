"""The scripts for a GPU machine, as far as a CPU goes: what they compute, what they say, what they write."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from xaffine import backends
from xaffine._command import bench
from xaffine._command.clock import Clock, clock_of

FOLDER = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def cold(names: str = "numpy") -> Clock:
    host = clock_of(backends.get(names), "cpu")
    return Clock("device events", host.mark, host.between, host.wait, lambda: None)


class NumpyWithCublas:
    """NumPy in the place of CuPy, with a math mode that somebody has set to 3."""

    modes: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.mode = 3
        cublas = SimpleNamespace(getMathMode=lambda _: self.mode, setMathMode=self._set_mode)
        self.cuda = SimpleNamespace(cublas=cublas, get_cublas_handle=lambda: 7)

    def _set_mode(self, _: int, mode: int) -> None:
        self.mode = mode
        self.modes.append(mode)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class TestAlternatives:
    """With NumPy in the place of CuPy."""

    alternatives = script("alternatives")

    def draw(self, dtype: str, *shape: int) -> Any:
        return np.random.default_rng(0).integers(-2, 3, shape).astype(backends.get("numpy").dtype(dtype))

    def backend(self) -> Any:
        def product(x: Any, W: Any, b: Any, out: Any) -> Any:
            out[...] = x.astype("float64") @ W.astype("float64") + (0 if b is None else b.astype("float64"))
            return out

        def sum_rows(dy: Any, out: Any) -> Any:
            out[...] = dy.astype("float64").sum(0)
            return out

        return SimpleNamespace(product=product, sum_rows=sum_rows)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_every_way_gives_the_same(self, dtype: str) -> None:
        dy, x, W, b = (self.draw(dtype, *shape) for shape in ((7, 4), (7, 3), (3, 4), (4,)))
        ways = self.alternatives.ways_to_sum(np, self.backend(), dy)
        assert [way().tolist() for way in ways.values()] == [dy.astype(float).sum(0).tolist()] * 4
        ways = self.alternatives.ways_forward(np, self.backend(), x, W, b)
        y = (x.astype(float) @ W.astype(float) + b.astype(float)).tolist()
        assert [way().tolist() for way in ways.values()] == [y] * 2

    def test_ways_are_compared_where_their_arrays_are(self) -> None:
        class OnDevice(np.ndarray):
            def tolist(self) -> Any:
                raise AssertionError("copied to the host")

        results = {"first": [1, 2], "same": [1, 2], "other": [1, 3]}
        shared = np.zeros(2, "float32").view(OnDevice)

        def fill(values: list[int]) -> Any:
            shared[...] = values
            return shared

        ways = {name: (lambda values=values: fill(values)) for name, values in results.items()}
        assert self.alternatives.agree(ways) == {"other": "another result"}
        assert self.alternatives.agree({"pairs": lambda: (shared, shared), "again": lambda: (shared, shared)}) == {}

    @pytest.mark.parametrize("alone", [False, True])
    def test_what_cannot_run_says_why(self, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
        for name, shapes in {"SUMS": ((5, 3),), "HALVES": ((5, 3, 4),), "PRODUCTS": ((5, 3, 4),)}.items():
            monkeypatch.setattr(self.alternatives, name, shapes)
        monkeypatch.setattr(self.alternatives, "COLUMNS", (6, 3))

        def draw(kind: str, dtype: str, *shape: int) -> Any:
            assert kind in ("integers", "floats", "positive")
            array = self.draw(dtype, *(min(extent, 1000) for extent in shape))
            return abs(array) + array.dtype.type(1) if kind == "positive" else array

        saved: list[dict[str, Any]] = []

        def measure(backend: Any) -> Any:
            saved.clear()

            def save(found: Any) -> None:
                saved.append(json.loads(json.dumps(found)))

            cupy = NumpyWithCublas()
            self.alternatives.measure(cupy, backend, draw, cold(), save, db_alone=alone)
            assert cupy.mode == 3
            return saved[-1]

        wrong = self.backend()
        wrong.sum_rows = lambda _, out: np.full_like(out, 7)
        assert measure(wrong)["db"][0]["seconds"]["ones @ dy"] == "another result"
        found = measure(self.backend())
        assert found["copied bytes a second"] > 0
        assert set(found["db"][0]["seconds"]) == {"kernel", "one sum", "two sums", "ones @ dy"}
        counts = [sum(len(rows) for rows in each.values() if isinstance(rows, list)) for each in saved]
        assert counts == list(range(1, len(saved) + 1))  # saved after each row
        if alone:
            assert [(row["dtype"], row["shape"]) for row in found["db"]] == [("float32", [6, 3])]
            assert not found["y"]
            return
        assert set(NumpyWithCublas.modes) == {0, 3, 16}
        assert [row["dtype"] for row in found["halves"]] == ["float16", "bfloat16"]
        assert all(0 <= error <= 2 for row in found["halves"] for error in row["errors"].values())
        assert set(found["y"][0]["seconds"]) == {"kernel", "cupy.add"}
        without_bias = wrong.product

        def fail(x: Any, W: Any, b: Any, out: Any) -> Any:
            assert b is None, "no bias today"
            return without_bias(x, W, b, out)

        wrong.product = fail
        lines = "\n".join(script("gpu").table_of_alternatives(measure(wrong)))
        assert "AssertionError: no bias today" in lines
        assert "cupy.add" in lines


# gpu.py, with cheap processes in the place of the real ones.

RIGHT = 'import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(\'{"status": "right", "note": null}\')'
PASSING = "print('tests/a.py::b PASSED [ 50%]'); print('==== 1 passed in 0.01s ====')"
FAILING = """
print('[gw0] [ 50%] PASSED tests/a.py::b')
print('[gw1] [100%] FAILED tests/a.py::c[x - y]')
print('FAILED tests/a.py::c[x - y] - AssertionError: 1 == 2')
print('==== 1 failed, 1 passed in 0.01s ====')
raise SystemExit(1)
"""
HANGING = """
import subprocess, sys, time
print('tests/a.py::b PASSED [ 25%]')
print('tests/a.py::c FAILED [ 50%]')
try:
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
    print('tests/a.py::d', child.pid, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print('asked to end', flush=True)
    time.sleep(60)
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script on a machine that has a card."""
    module = script("gpu")
    monkeypatch.setattr(module, "card", lambda: "a card, driver 1.2, 3 MiB")
    monkeypatch.setattr(module, "_is_here", lambda _: True)
    monkeypatch.setattr(module, "draw", lambda *_: None)
    monkeypatch.setattr(module, "GRACE", 0.3)
    return module


@pytest.fixture
def runs(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace all runs: by part and what, a piece of Python and its seconds."""

    def replace(**codes: Any) -> None:
        made = [gpu.Run("doctor", "cupy", ["-c", RIGHT, gpu.FILE], "cupy", 0)]
        for what, code in codes.items():
            made.append(gpu.Run("tests:cupy", what, ["-c", code, gpu.FILE], "cupy", 0))
        monkeypatch.setattr(gpu, "all_runs", lambda: made)

    return replace


def saved(folder: Path) -> Any:
    return json.loads((folder / "gpu.json").read_text())


def test_whole_run_is_saved_and_not_done_again(gpu: Any, runs: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "folder"
    runs(own=PASSING, others=PASSING)
    assert gpu.main(["--out", str(out)]) == 0
    found = saved(out)
    assert list(found["runs"]) == ["doctor cupy", "tests:cupy own", "tests:cupy others"]
    record = found["runs"]["tests:cupy own"]
    assert (record["outcome"], record["told"], record["card"]) == ("passed", "1 passed in 0.01s", gpu.card())
    assert (out / record["log"]).read_text() == "tests/a.py::b PASSED [ 50%]\n==== 1 passed in 0.01s ====\n"
    assert (out / "gpu.md").read_text() == gpu.write_page(found)
    assert sorted(file.name for file in out.iterdir()) == ["gpu.json", "gpu.md", "logs"]
    table = capsys.readouterr().out
    assert "own passed; others passed" in table
    assert len(table.splitlines()) <= 3 + gpu.TABLE_LINES
    runs(own=FAILING, others=FAILING)  # they count as done
    assert gpu.main(["--out", str(out)]) == 0
    assert "tests:cupy own: passed before" in capsys.readouterr().out
    assert saved(out)["runs"] == found["runs"]


@pytest.mark.parametrize("changed", ["card", "sources_of"])
def test_another_card_or_another_source_begins_anew(
    gpu: Any, runs: Any, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(own=PASSING)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    runs(own=FAILING)
    monkeypatch.setattr(gpu, changed, lambda *_: "another")
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert saved(tmp_path)["runs"]["tests:cupy own"]["outcome"] == "failed"


def test_sources_are_those_that_the_run_depends_on(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("xaffine/a.py", "tests/b.py", "docs/benchmarks/alternatives.py")]
    others = [files[2].with_name(f"{name}.py") for name in gpu.SCRIPTS]
    for file in {*files, *others}:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    some = {run.part: run for run in gpu.all_runs()}
    before = {part: gpu.sources_of(run) for part, run in some.items()}
    for file, changed in zip(
        files, ({"tests:cupy", "tf32:jax", "reach"}, {"tests:cupy", "tf32:jax"}, {"reach"}), strict=True
    ):
        file.write_text("changed")
        after = {part: gpu.sources_of(run) for part, run in some.items()}
        assert {part for part in ("tests:cupy", "tf32:jax", "reach") if after[part] != before[part]} == changed
        before = after


def test_failing_tests_are_named_and_the_rest_runs(gpu: Any, runs: Any, tmp_path: Path, capsys: Any) -> None:
    runs(own=FAILING, others=PASSING)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    found = saved(tmp_path)["runs"]
    assert found["tests:cupy own"]["failed"] == ["FAILED tests/a.py::c[x - y] - AssertionError: 1 == 2"]
    assert found["tests:cupy own"]["told"] == "1 failed, 1 passed in 0.01s"
    assert found["tests:cupy others"]["outcome"] == "passed"
    assert capsys.readouterr().out.count("FAILED tests/a.py::c[x - y]") == 2  # when it happens, and in the table
    assert "- `FAILED tests/a.py::c[x - y] - AssertionError" in (tmp_path / "gpu.md").read_text()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_the_end(pid: int) -> None:
    for _ in range(100):
        if not is_alive(pid):
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} is still there")


def test_hanging_test_is_ended_with_all_its_processes_and_what_it_printed_is_kept(
    gpu: Any, runs: Any, tmp_path: Path, capsys: Any
) -> None:
    runs(own=HANGING, others=PASSING)
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0.04"]) == 0
    record = saved(tmp_path)["runs"]["tests:cupy own"]
    assert record["outcome"] == "cut off"
    assert (record["told"], record["failed"]) == ("1 passed, 1 failed so far", ["FAILED tests/a.py::c"])
    log = (tmp_path / record["log"]).read_text()
    assert log.endswith("asked to end\n")
    wait_for_the_end(int(re.findall(r"::d (\d+)", log)[0]))
    assert "tests:cupy others: left out, needs about 0 s of the 0 s left" in capsys.readouterr().out
    runs(own=PASSING, others=PASSING)  # what was cut off is done again
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert saved(tmp_path)["runs"]["tests:cupy own"]["outcome"] == "passed"


MAIN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gpu", sys.argv[1])
gpu = sys.modules["gpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)
doctor, passing, hanging = sys.argv[3:]
gpu.card = lambda: "a card, driver 1.2, 3 MiB"
gpu.GRACE = 0.3
made = [("doctor", doctor), ("tests:cupy", passing), ("tf32:cupy", hanging)]
gpu.all_runs = lambda: [gpu.Run(part, "cupy", ["-c", code, gpu.FILE], "cupy", 0) for part, code in made]
sys.exit(gpu.main(["--out", sys.argv[2]]))
"""


def test_killed_in_the_middle_it_ends_its_processes_and_goes_on_later(tmp_path: Path) -> None:
    def start(last: str) -> Any:
        arguments = [str(FOLDER / "gpu.py"), str(tmp_path), RIGHT, PASSING, last]
        return subprocess.Popen([sys.executable, "-c", MAIN, *arguments], stdout=subprocess.PIPE, text=True)

    log = tmp_path / "logs" / "tf32-cupy-cupy.log"
    with start(HANGING) as script_:
        for _ in range(500):
            if log.exists() and "::d " in log.read_text():
                break
            time.sleep(0.02)
        script_.send_signal(signal.SIGTERM)
        told, _ = script_.communicate(timeout=30)
    assert script_.returncode == 130
    assert "interrupted; started again, it goes on from here" in told
    assert "tests:cupy           cupy passed" in told
    wait_for_the_end(int(re.findall(r"::d (\d+)", log.read_text())[0]))
    outcomes = {name: record["outcome"] for name, record in saved(tmp_path)["runs"].items()}
    assert outcomes == {"doctor cupy": "passed", "tests:cupy cupy": "passed", "tf32:cupy cupy": "interrupted"}
    with start(PASSING) as script_:
        told, _ = script_.communicate(timeout=30)
    assert script_.returncode == 0
    assert "tests:cupy cupy: passed before\ntf32:cupy cupy: passed after" in told


def test_data_of_a_run_that_fails_are_kept(gpu: Any, runs: Any, tmp_path: Path) -> None:
    rows = "{'rows': []}".replace("'", '"')
    runs(own=f"import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{rows}'); raise SystemExit('no memory')")
    assert gpu.main(["--out", str(tmp_path)]) == 1
    record = saved(tmp_path)["runs"]["tests:cupy own"]
    assert (record["outcome"], record["data"]) == ("failed", {"rows": []})
    assert record["told"] == "no memory"
    assert [file.name for file in (tmp_path / "logs").iterdir() if file.suffix == ".json"] == []


def test_reason_of_a_failure_is_the_line_that_says_it(gpu: Any) -> None:
    log = "xaffine bench could not time torch: the process ended with exit code 1\n  ValueError: no gpu\na table\n"
    assert gpu.reason(log) == "ValueError: no gpu"
    assert gpu.reason("a\n  b \n\n") == "b"
    assert gpu.reason("") == ""


def test_nothing_measured_for_want_of_time_is_no_success(gpu: Any, runs: Any, tmp_path: Path) -> None:
    runs(own=PASSING)
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0"]) == 2
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0"]) == 0  # it was measured before


@pytest.mark.parametrize("what", ["not here", "crashed"])
def test_library_that_cannot_be_used_is_named_and_left_out(
    gpu: Any, runs: Any, tmp_path: Path, capsys: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(own=PASSING)
    report = '{"status": "unusable", "note": "not here"}'
    code = {"not here": f"import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{report}')", "crashed": "crashed"}
    doctor = gpu.Run("doctor", "cupy", ["-c", code[what], gpu.FILE], "cupy", 0)
    tests = gpu.all_runs()[1:]
    monkeypatch.setattr(gpu, "all_runs", lambda: [doctor, *tests])
    assert gpu.main(["--out", str(tmp_path)]) == 2
    told = capsys.readouterr().out
    assert re.search(
        f"tests:cupy own: left out, cupy cannot be used: .*{what if what == 'not here' else 'NameError'}", told
    )
    assert "tests:cupy own" not in saved(tmp_path)["runs"]


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (None, "nvidia-smi finds no card: "),
        ("exit 9", "nvidia-smi finds no card: "),
        ("echo", "nvidia-smi finds no card: "),
        (
            "echo Tesla V100, 580.1, 16384, 16000, 7.0",
            "Tesla V100 is too old for bfloat16: it has compute capability 7.0",
        ),
        (
            "echo NVIDIA H100, 580.1, 81559, 123, 9.0",
            "NVIDIA H100 is full: 123 MiB of 81559 are free, and 8192 are needed",
        ),
        ("echo NVIDIA H100, 580.1, 81559, 80000, 9.0", None),
        ("echo NVIDIA H100 MIG 1g.10gb, 580.1, '[N/A], [N/A]', 9.0", None),
    ],
)
def test_unfit_card_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, told: str | None, reason: str | None
) -> None:
    gpu = script("gpu")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None)
    if told is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{told}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    if reason is None:
        assert gpu.card().startswith("NVIDIA H100")
        return
    (tmp_path / "gpu.json").write_text('{"runs": {}}')
    assert gpu.main(["--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith(reason)
    assert printed.count("\n") == 1
    assert saved(tmp_path) == {"runs": {}}


def test_what_cannot_be_written_or_is_unknown_is_one_line(gpu: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("kept")
    assert gpu.main(["--out", str(tmp_path / "file" / "folder")]) == 2
    told = capsys.readouterr().out
    assert "cannot be written" in told
    assert told.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        gpu.main(["tets"])
    assert caught.value.code == 2
    assert "no part is called tets; the parts are doctor, tests:cupy, tf32:cupy, reach" in capsys.readouterr().err


def test_plan_says_what_fits_and_measures_nothing(gpu: Any, tmp_path: Path, capsys: Any) -> None:
    assert gpu.main(["--plan", "--minutes", "8", "--out", str(tmp_path / "new")]) == 0
    plan = capsys.readouterr().out.splitlines()
    fits = [line.split("  ")[0] for line in plan[:-1] if "does not fit" not in line]
    assert fits[:2] == ["doctor cupy", "tests:cupy own"]
    assert "reach db" in fits
    assert "tf32:cupy properties" in fits
    assert re.fullmatch(r"about [678]\.\d minutes", plan[-1])
    assert not (tmp_path / "new").exists()
    assert gpu.main(["--plan", "bench:jax", "--out", str(tmp_path / "new")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "doctor", *["bench:jax"] * 4, "about"
    ]  # fmt: skip


def test_commands_are_those_of_the_tests_and_the_benchmark(gpu: Any) -> None:
    """Each is understood by what it calls, as far as that can be seen without a card."""
    for run in gpu.all_runs():
        if "--groups" in run.command:
            assert (FOLDER.parents[1] / run.command[0]).exists()
            options = run.command[run.command.index("--shapes") + 1 : run.command.index("--json")]
            assert all(re.fullmatch(r"\d+,\d+,\d+", shape) for shape in options)
            assert set(run.command[run.command.index("--groups") + 1 : run.command.index("--device")]) <= {
                *script("groups").GROUPS
            }
        if run.command[1] == "pytest":
            files = [word.removeprefix("--ignore=") for word in run.command if "tests/" in word]
            assert files
            assert all((FOLDER.parents[1] / file).exists() for file in files)
            assert f"--timeout={gpu.TEST_LIMIT}" in run.command
    assert {run.environment.get("CUPY_TF32") for run in gpu.all_runs() if run.what == "TF32"} == {"1"}


@pytest.mark.parametrize("name", ["numpy", "missing"])
def test_doctor_says_what_is_wrong(gpu: Any, tmp_path: Path, name: str) -> None:
    run = gpu.Run("doctor", name, ["-c", gpu.DOCTOR, name, gpu.FILE], name, 30)
    (tmp_path / "logs").mkdir()
    record = gpu.execute(run, tmp_path, 60)
    reasons = {"numpy": "numpy has no device gpu; it has cpu", "missing": "missing"}
    assert reasons[name] in gpu.unusable(name, {"runs": {f"doctor {name}": record}})


def test_grid_is_that_of_the_benchmark_and_three_more(gpu: Any) -> None:
    assert set(gpu.SHAPES) - set(bench.GRID) == {gpu.CUBE, (8192, 1024, 4096), (4096, 4096, 512)}
    assert {gpu.SMALL, *gpu.TALL} <= set(gpu.SHAPES)
    assert gpu.COLUMNS == TestAlternatives.alternatives.COLUMNS
    assert "numpy" in gpu.installed_versions()


def measured(gpu: Any, factor: float) -> dict[str, Any]:
    """Evidence as it would come from a card on which our layer takes `factor` times what torch takes."""
    facts = {
        "outcome": "passed",
        "seconds": 1.0,
        "card": "a card, driver 1.2, 3 MiB",
        "date": "2026-01-01",
        "sources": "abc",
    }
    groups = {name: {"rates": dict.fromkeys(("float32", "float16", "bfloat16"), 100.0)} for name in gpu.LIBRARIES}
    runs: dict[str, Any] = {}
    for mode, (dtype, _) in gpu.MODES.items():
        rows = []
        for group, implementation, times in (
            ("cupy", "xaffine", factor), ("cupy", "xaffine, out=", factor), ("torch", "nn.Linear + autograd", 1.0)
        ):  # fmt: skip
            for shape in (gpu.CUBE, gpu.SMALL, *gpu.TALL):
                for cache in ("warm", "cold"):
                    median = times * 6e-12 * shape[0] * shape[1] * shape[2] / 95
                    rows.append({
                        "group": group, "dtype": dtype, "shape": list(shape), "implementation": implementation,
                        "what": "both", "cache": cache, "median": median, "ratio": times, "to": {"limit": times},
                    })  # fmt: skip
        data = {"cores": 1, "groups": groups, "rows": rows}
        runs[f"reach {mode}"] = {**facts, "data": {**data, "rows": rows[:-1]}}  # cut off before the last was cold
        runs[f"bench:torch {mode}"] = {**facts, "data": data}
    failed = {"dtype": "float32", "shape": list(gpu.COLUMNS), "bytes": 1, "seconds": {"kernel": "OutOfMemoryError"}}
    sums = {"dtype": "float32", "shape": list(gpu.COLUMNS), "bytes": 1 << 30, "seconds": {"kernel": factor}}
    halves = {"dtype": "float16", "shape": [1, 2, 3], "seconds": {"a": 1.0}, "errors": {"a": 1.25}}
    alternatives = {
        "copied bytes a second": 2**30 / 0.7,
        "db": [failed, sums],
        "halves": [halves],
        "y": [],
        "dW and db": [],
    }
    runs["alternatives float32"] = {**facts, "data": alternatives}
    runs["alternatives TF32"] = {**facts, "outcome": "failed", "told": "no plan"}
    runs["tests:cupy own"] = {**facts, "told": "9 passed", "failed": []}
    return {"versions": {"cupy": "14"}, "runs": runs}


@pytest.mark.parametrize(("factor", "bold"), [(1.0, 0), (2.0, 11)])
def test_page_shows_what_was_reached_and_what_was_missed(gpu: Any, factor: float, bold: int) -> None:
    found = measured(gpu, factor)
    page = gpu.write_page(found)
    assert page.count("**") == 2 * bold
    assert "measured with cupy 14." in page
    assert "- a card, driver 1.2, 3 MiB, 2026-01-01, sources abc: reach, bench:torch, alternatives, tests:cupy." in page
    assert "| tests:cupy own | passed: 9 passed |" in page
    assert "| tests:jax own | not yet run on a GPU |" in page
    assert "| alternatives TF32 | failed: no plan |" in page
    assert "| halves | float16 | 1, 2, 3 | a | 1,000,000.0 | 1.25 |" in page
    assert page.count("| torch | 64, 512, 512 | nn.Linear + autograd |") == len(gpu.MODES)  # measured twice
    assert f"| {factor:.2f} |" in page or f"**{factor:.2f}**" in page
    assert [round(reached, 2) for _, _, reached in gpu.rows_to_reach(found)] == [
        *2 * [factor, round(0.95 / factor, 2), 1 / factor], *[factor] * 4, round(0.7 / factor, 2),
    ]  # fmt: skip
    assert sum("MISSED" in line for line in gpu.short_table(found, gpu.all_runs())) == bold


def test_table_has_forty_lines_at_most(gpu: Any) -> None:
    found = measured(gpu, 1.0)
    found["runs"]["tests:cupy own"]["failed"] = [f"FAILED {i}" for i in range(100)]
    table = gpu.short_table(found, gpu.all_runs())
    assert len(table) == gpu.TABLE_LINES
    assert re.fullmatch(r"and \d+ more failed", table[-1])


def test_page_without_figures_says_so_in_every_row(gpu: Any) -> None:
    page = gpu.write_page({"runs": {}})
    assert page.count("not yet measured on a GPU") == len(list(gpu.rows_to_reach({"runs": {}})))
    assert page.count("not yet run on a GPU") == len(gpu.all_runs())


def test_plot_has_every_mode(tmp_path: Path) -> None:
    gpu = script("gpu")
    gpu.draw(measured(gpu, 1.0), tmp_path)
    assert "<svg" in (tmp_path / "gpu.svg").read_text()
    (tmp_path / "gpu.svg").unlink()
    gpu.draw({"runs": {}}, tmp_path)
    assert not (tmp_path / "gpu.svg").exists()


def test_page_alone_needs_no_card(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "card", None)
    (tmp_path / "gpu.json").write_text(json.dumps(measured(gpu, 1.0)))
    assert gpu.main(["page", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "gpu.md").read_text() == gpu.write_page(measured(gpu, 1.0))


def test_committed_page_is_that_of_the_committed_figures() -> None:
    module = script("gpu")
    assert (FOLDER / "gpu.md").read_text(encoding="utf-8") == module.write_page(module.load(FOLDER))


def test_runs_on_the_stand_in_as_on_a_card(tmp_path: Path) -> None:
    """Nothing replaced but the card: the doctor, and a library that is here without a GPU."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho A card, 1.2, 81559, 80000, 9.0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(FOLDER.parents[1] / "tests" / "cupy_standin"),
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(FOLDER / "gpu.py"), "--out", str(tmp_path / "out"), "doctor", "--minutes", "2"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
    outcomes = {name: record["outcome"] for name, record in saved(tmp_path / "out")["runs"].items()}
    assert outcomes == {"doctor cupy": "passed", "doctor torch": "unusable", "doctor jax": "unusable"}, told
    assert saved(tmp_path / "out")["runs"]["doctor cupy"]["data"]["device"] == "CUDA Device 0"
    assert "| doctor torch | unusable: " in (tmp_path / "out" / "gpu.md").read_text()


@pytest.mark.parametrize("argument", ["--plan", "page", "doctor"])
def test_missing_library_is_one_line(tmp_path: Path, argument: str) -> None:
    hide = "import runpy, sys; sys.modules['array_api_compat'] = None; del sys.argv[0]"
    code = f"{hide}; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(FOLDER / "gpu.py"), argument, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == "not installed: array_api_compat; pip install array-api-compat\n"
