"""The scripts for a GPU machine, as far as a CPU goes: what they compute, what they say, what they write."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xaffine import backends
from xaffine.command import bench
from xaffine.command.clock import Clock, clock_of

pytestmark = pytest.mark.once

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = script("gpu")
    for name in ("DATA", "PAGE", "PLOT"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).name)
    return module


def cold(names: str = "numpy") -> Clock:
    host = clock_of(backends.get(names), "cpu")
    return Clock("device events", host.mark, host.between, host.wait, lambda: None)


class TestAlternatives:
    """With NumPy in the place of CuPy."""

    alternatives = script("alternatives")

    def draw(self, dtype: str, *shape: int) -> Any:
        return np.random.default_rng(0).integers(-2, 3, shape).astype(backends.get("numpy").dtype(dtype))

    def kernel(self) -> Any:
        def sum_of_rows(dy: Any, out: Any) -> None:
            out[...] = dy.astype("float64").sum(0)

        return SimpleNamespace(_sum_of_rows=sum_of_rows)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_every_way_gives_the_same(self, dtype: str) -> None:
        dy, x, W, b = (self.draw(dtype, *shape) for shape in ((7, 4), (7, 3), (3, 4), (4,)))
        ways = self.alternatives.ways_to_sum(np, self.kernel(), dy)
        assert [way().tolist() for way in ways.values()] == [dy.astype(float).sum(0).tolist()] * 3

        def fill(y: Any, x: Any, W: Any, b: Any) -> bool:
            y[...] = x.astype(float) @ W.astype(float) + b.astype(float)
            return True

        ways = self.alternatives.ways_forward(np, SimpleNamespace(fill=fill), x, W, b)
        y = (x.astype(float) @ W.astype(float) + b.astype(float)).tolist()
        assert [way().tolist() for way in ways.values()] == [y] * 2
        ways = self.alternatives.ways_backward(np, self.kernel(), dy, x, {})
        dW, db = ways["apart"]()
        assert dW.tolist() == (x.T.astype(float) @ dy.astype(float)).tolist()
        assert db.tolist() == dy.astype(float).sum(0).tolist()

    def test_what_cannot_run_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.alternatives, "SUMS", ((5, 3),))
        monkeypatch.setattr(self.alternatives, "PRODUCTS", ((5, 3, 4),))
        monkeypatch.setattr(self.alternatives, "DTYPES", ("float32",))

        def draw(kind: str, dtype: str, *shape: int) -> Any:
            assert kind in ("integers", "floats")
            return self.draw(dtype, *(min(extent, 1000) for extent in shape))

        declined = SimpleNamespace(fill=lambda *_: False)
        wrong = SimpleNamespace(_sum_of_rows=lambda _, out: out.fill(7))
        found = self.alternatives.measure(np, wrong, declined, draw, cold(), {})
        assert found["db"][0]["seconds"]["ones @ dy"] == "another result"
        found = self.alternatives.measure(np, self.kernel(), declined, draw, cold(), {})
        assert found["copied bytes a second"] > 0
        assert set(found["db"][0]["seconds"]) == {"kernel", "one sum", "ones @ dy"}
        assert found["y"][0]["seconds"]["fused"] == "RuntimeError: cublaslt.fill declined"
        assert found["y"][0]["seconds"]["apart"] > 0
        assert "Error" in found["dW and db"][0]["seconds"]["in one product"]  # without nvmath-python, or a GPU
        lines = list(script("gpu").table_of_alternatives(found))
        assert "cublaslt.fill declined |" in "\n".join(lines)


def measured(gpu: Any, factor: float) -> dict[str, Any]:
    """Evidence as it would come from a card on which our layer takes `factor` times what torch takes."""
    found: dict[str, Any] = {"card": "a card, 1.2, 3 MiB", "versions": {"cupy": "14"}, "date": "2026-01-01"}
    groups = {name: {"rates": dict.fromkeys(("float32", "float16", "bfloat16"), 100.0)} for name in gpu.LIBRARIES}
    found["benchmarks"] = {}
    for mode, (dtype, _) in gpu.MODES.items():
        rows = []
        for group, implementation, times in (("cupy", "xaffine", factor), ("torch", "nn.Linear + autograd", 1.0)):
            for shape in (gpu.CUBE, gpu.SMALL):
                for cache in ("warm", "cold"):
                    median = times * 6e-12 * shape[0] * shape[1] * shape[2] / 95
                    rows.append({
                        "group": group, "dtype": dtype, "shape": list(shape), "implementation": implementation,
                        "what": "both", "cache": cache, "median": median, "ratio": times, "to": {"limit": times},
                    })  # fmt: skip
        found["benchmarks"][mode] = {"cores": 1, "groups": groups, "rows": rows}
    failed = {"dtype": "float32", "shape": list(gpu.COLUMNS), "bytes": 1, "seconds": {"kernel": "OutOfMemoryError"}}
    sums = {"dtype": "float32", "shape": list(gpu.COLUMNS), "bytes": 1 << 30, "seconds": {"kernel": factor}}
    found["alternatives"] = {
        "float32": {"copied bytes a second": 2**30 / 0.7, "db": [failed, sums], "y": [], "dW and db": []},
        "TF32": {"told": "no plan"},
    }
    found["tests"] = {"cupy, all tests": {"exit code": 0, "told": "9 passed"}}
    return found


@pytest.mark.parametrize(("factor", "bold"), [(1.0, 0), (2.0, 6)])
def test_page_shows_what_was_reached_and_what_was_missed(gpu: Any, factor: float, bold: int) -> None:
    found = measured(gpu, factor)
    page = gpu.write_page(found)
    assert page.count("**") == 2 * bold
    assert "a card, 1.2, 3 MiB (card, driver, memory); cupy 14." in page
    assert "| cupy, all tests | 9 passed |" in page
    assert "| jax, all tests | not yet run on a GPU |" in page
    assert "It could not run: no plan" in page
    assert f"| {factor:.2f} |" in page or f"**{factor:.2f}**" in page
    assert [round(reached, 2) for _, _, reached in gpu.rows_to_reach(found)] == [
        factor, round(0.95 / factor, 2), factor, round(0.95 / factor, 2), factor, round(0.7 / factor, 2),
    ]  # fmt: skip


def test_page_without_figures_says_so_in_every_row(gpu: Any) -> None:
    page = gpu.write_page({})
    rows = list(gpu.rows_to_reach({}))
    assert page.count("not yet measured on a GPU") == len(rows)
    assert page.count("not yet run on a GPU") == 2 * len(gpu.LIBRARIES)
    partial = gpu.write_page({"versions": {}, "date": "", "card": "", "benchmarks": {"TF32": {"told": "no memory"}}})
    assert "It could not run: no memory" in partial


def test_committed_page_is_that_of_the_committed_figures() -> None:
    module = script("gpu")
    found = json.loads(module.DATA.read_text(encoding="utf-8")) if module.DATA.exists() else {}
    assert module.PAGE.read_text(encoding="utf-8") == module.write_page(found)


def test_parts_are_written_one_by_one(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    evidence = measured(gpu, 1.0)
    monkeypatch.setattr(gpu, "usable_libraries", lambda: ["cupy"])
    parts = {name: (lambda usable, name=name: evidence[name] if usable else None) for name in gpu.PARTS}
    monkeypatch.setattr(gpu, "PARTS", parts)
    for part in parts:
        assert gpu.main([part]) == 0
        assert json.loads(gpu.DATA.read_text())[part] == evidence[part]
    found = json.loads(gpu.DATA.read_text())
    assert set(found) >= {*parts, "card", "versions", "date"}
    assert gpu.PAGE.read_text() == gpu.write_page(found)
    assert "<svg" in gpu.PLOT.read_text()
    assert "95.0 TFLOP/s; 1.00 of limit" in capsys.readouterr().out
    evidence["tests"]["cupy, all tests"]["exit code"] = 1
    assert gpu.main([]) == 1


def test_whole_run_calls_the_tests_and_the_benchmark(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[list[str], Any]] = []

    def run(command: list[str], environment: Any = None) -> tuple[int, str]:
        commands.append((command, environment))
        if "bench" in command:
            Path(command[command.index("--json") + 1]).write_text('{"rows": []}')
        if "alternatives" in command[0]:
            return 0, '{"copied bytes a second": 1}'
        return (0, "3 passed\n") if "torch" not in command else (1, "FAILED tests/x.py::y\n1 failed\n")

    monkeypatch.setattr(gpu, "run", run)
    tests = gpu.tests(["cupy", "torch"])
    assert tests["torch, all tests"]["failed"] == ["FAILED tests/x.py::y"]
    assert [each["exit code"] for each in tests.values()] == [0, 0, 1, 1]
    assert ["--tf32" in command for command, _ in commands] == [False, True] * 2
    commands.clear()
    assert gpu.benchmarks(["cupy"]) == {key: {"rows": []} for key in gpu.MODES}
    assert [environment.get("CUPY_TF32") for _, environment in commands] == [None, "1", None, None]
    assert gpu.alternatives(["torch"]) == {}
    assert gpu.alternatives(["cupy"]) == {key: {"copied bytes a second": 1} for key in ("float32", "TF32")}
    monkeypatch.setattr(gpu, "run", lambda *_: (1, "Traceback\nno memory"))
    assert gpu.benchmarks(["cupy"])["TF32"] == {"told": "no memory"}
    assert gpu.alternatives(["cupy"])["TF32"] == {"told": "no memory"}


def test_commands_run_from_the_source(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.run(["-c", "import xaffine; print(xaffine.__file__)"])[0] == 0
    code, told = gpu.run(["-c", "import os, sys; sys.exit(os.environ['MODE'])"], {"MODE": "words"})
    assert (code, gpu.last_line(told)) == (1, "words")
    monkeypatch.setattr(gpu, "SECONDS", 0.1)
    assert gpu.run(["-c", "import time; time.sleep(60)"]) == (124, "stopped after 0.1 s")
    assert gpu.last_line("") == ""


def test_without_a_gpu_nothing_is_written(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def get(name: str) -> Any:
        raise RuntimeError(f"{name} finds no CUDA device")

    monkeypatch.setattr(gpu.backends, "get", get)
    assert gpu.main([]) == 2
    assert "cupy is left out: cupy finds no CUDA device" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "_is_here", lambda module: module != "array_api_compat")
    assert gpu.main([]) == 2
    assert "not installed: array_api_compat; pip install array-api-compat" in capsys.readouterr().out
    assert gpu.main(["tets"]) == 2
    assert "no part is called tets; the parts are tests, benchmarks, alternatives and page" in capsys.readouterr().out
    assert not gpu.DATA.exists()
    assert not gpu.PAGE.exists()
    assert gpu.main(["page"]) == 0
    assert gpu.PAGE.exists()


def test_grid_is_that_of_the_benchmark_and_three_more(gpu: Any) -> None:
    assert set(gpu.SHAPES) - set(bench.GRID) == {gpu.CUBE, (8192, 1024, 4096), (4096, 4096, 512)}
    assert gpu.SMALL in gpu.SHAPES
    assert isinstance(gpu.card(), str)
    assert "numpy" in gpu.installed_versions()
