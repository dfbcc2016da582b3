"""``xaffine bench``: its rows, its table, its files, and what it says when it cannot run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import PEERS, peers
from xaffine import __main__, backends
from xaffine._command import bench
from xaffine._command.files import replace_text
from xaffine.backends import Backend


def test_rows_compare_every_implementation_with_the_limit_and_each_other(numpy_backend: Backend) -> None:
    rows = bench.compare(numpy_backend, (5, 3, 4), "float64", rounds=3, beside={"classic class": peers.Classic})
    names = ["limit", "xaffine", "classic class", "xaffine, out="]
    assert [(r["implementation"], r["what"]) for r in rows] == [
        (name, what) for name in names for what in ("forward", "backward", "both")
    ]
    for row in rows:
        assert 0 < row["low"] <= row["median"] <= row["high"]
        assert set(row["to"]) == set(names) - {row["implementation"]}
        assert row["implementation"] != "limit" or row["ratio"] == 1
        assert (row["dtype"], row["shape"]) == ("float64", [5, 3, 4])


def test_command_writes_table_data_and_plot(capfd: Any, tmp_path: Path) -> None:
    data, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    target = f"{PEERS}:Classic"
    arguments = ["--beside", target, "--shapes", "2,3,4", "6x5x4", "--rounds", "1", "--dtype", "float32", "float64"]
    assert __main__.main(["bench", *arguments, "--json", str(data), "--plot", str(plot)]) == 0
    printed = capfd.readouterr()
    assert "could not" not in printed.err  # where it takes long, lines there say how far it is
    assert "both/limit" in printed.out
    assert "…peers.py:Classic" in printed.out.replace("/", "")
    found = json.loads(data.read_text())
    assert {tuple(r["shape"]) for r in found["rows"]} == {(2, 3, 4), (6, 5, 4)}
    assert {r["dtype"] for r in found["rows"]} == {"float32", "float64"}
    assert {r["implementation"] for r in found["rows"]} == {"limit", "xaffine", target, "xaffine, out="}
    assert list(found["groups"]) == ["numpy"]  # the only one by default, since the target takes arrays of one library
    assert found["groups"]["numpy"]["version"] == backends.get("numpy").version
    assert found["rounds"] == 1
    drawing = plot.read_text()
    assert drawing.count("<svg") == 1
    assert "Classic" in drawing or "<use" in drawing  # text as text, or as paths


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_table_fits_80_columns_and_breaks_no_word(capsys: Any, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = {"limit": 1.0, "xaffine": 2.0, "folder/of/mine/layers.py:AnAffineLayerOfMine": 3.0, "xaffine, out=": 1.7}
    shape = [262_144, 1024, 1024]
    rows = [
        {
            "group": "cupy", "dtype": "bfloat16", "shape": shape, "implementation": name, "what": what, "cache": each,
            "median": 1.2345 * times, "ratio": 10.5, "ratio_low": 10.25, "ratio_high": 10.75,
            "to": {other: times / value for other, value in names.items()},
        }
        for name, times in names.items() for what in ("forward", "backward", "both") for each in {"warm", cache}
    ]  # fmt: skip
    rows += [{**row, "shape": [2, 3, 4], "to": dict.fromkeys(names, 0.95)} for row in rows]  # not worth its buffers
    rows = [row for row in rows if (row["shape"][0], row["implementation"], row["cache"]) != (2, "limit", "cold")]
    facts = {"version": "14.2.0", "device": "cuda:0", "threads": "threads of its own", "rates": {}}
    found = {"xaffine": "1", "python": "3", "system": "here", "cores": 1, "groups": {"cupy": facts}, "rows": rows}
    bench._print_rows(found)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "cupy 14.2.0 on cuda:0, bfloat16; threads of its own\n" in printed
    warm = "1.23 s 1.23 s 1.23 s 10.50 (10.25-10.75)"
    large, small = (warm, warm) if cache == "warm" else ("1.23 s 1.23 s 1.3 10.50", "1.23 s 0.0 10.50")
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    assert {f"262144x1024x1024 limit {large}", f"2x3x4 limit {small}"} <= lines
    assert printed.count("262144x1024x1024") == 2
    assert f" …{'AnAffineLayerOfMine'[-17:]} " in printed
    assert printed.endswith("of the time without it, at\n  cupy bfloat16 262144x1024x1024 (0.85)\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234e-7, "0.123 µs"),
        (9.99e-4, "999 µs"),
        (9.996e-4, "1.00 ms"),
        (1, "1.00 s"),
        (7, "7.00 s"),
    ],
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert bench._duration(seconds) == text


def test_run_that_is_cut_off_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, numpy_backend: Backend
) -> None:
    shapes = [bench.compare(numpy_backend, (2, 3, m), "float32", rounds=1) for m in (4, 5)]
    data = tmp_path / "bench.json"

    def events(*_: Any) -> Iterator[dict[str, Any]]:
        yield {"event": "group", "version": "1", "device": "cpu", "threads": "one", "rates": {}}
        for count, some in enumerate(shapes):
            yield {"event": "rows", "rows": some}
            assert json.loads(data.read_text())["rows"] == [row for rows in shapes[: count + 1] for row in rows]
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_worker", events)
    assert __main__.main(["bench", "--backend", "numpy", "--shapes", "2,3,4", "--json", str(data)]) == 130
    assert json.loads(data.read_text())["rows"] == shapes[0] + shapes[1]
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def test_panel_without_figures_stays_empty(tmp_path: Path, numpy_backend: Backend) -> None:
    from xaffine._command import plot  # matplotlib is in the session of NumPy alone

    rows = bench.compare(numpy_backend, (2, 3, 4), "float32", rounds=1)
    others = [{**row, "group": "thinc", "dtype": "float64"} for row in rows]
    found = {"system": "here", "cores": 1, "date": "today", "rows": rows + others}
    plot.draw_ratios(found, tmp_path / "bench.svg")
    drawing = (tmp_path / "bench.svg").read_text()
    assert drawing.count('<g id="axes_') == drawing.count('<g id="legend_') == 2


BROKEN = """
class Broken:
    def __init__(self, W, b):
        self.dW = W

    def forward(self, x):
        return x

    def backward(self, dy):
        raise ArithmeticError("no backward yet")
"""


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere:Layer", "no module named 'nowhere' can be imported from "),
        ("nowhere.py:Layer", "there is no file 'nowhere.py', seen from "),
        ("layer.py:Missing", "layer.py has no 'Missing'; what it has that can be called: Broken"),
        ("layer.py:Broken", "layer.py:Broken raised ArithmeticError: no backward yet\n  "),
        ("layer", "TARGET is package.module:factory or file.py:factory"),
    ],
)
def test_implementation_that_cannot_be_timed_is_named(
    capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    (tmp_path / "layer.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    data = tmp_path / "bench.json"
    arguments = ["--beside", target, "--shapes", "2,3,4", "--rounds", "1", "--json", str(data)]
    assert __main__.main(["bench", *arguments]) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith("xaffine bench could not time numpy: ")
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert json.loads(data.read_text())["rows"] == []


def test_group_that_cannot_be_timed_is_named(capfd: Any) -> None:
    arguments = ["--backend", "numpy", "--shapes", "2,3,4", "--rounds", "1", "--device", "gpu"]
    assert __main__.main(["bench", *arguments]) == 2
    told = capfd.readouterr().err
    assert "xaffine bench could not time numpy: the process ended with exit code 1" in told
    assert "numpy has no device gpu; it has cpu" in told


# Prints each event that the command received.
REPORTING = """
import sys
from xaffine import __main__
from xaffine._command import bench

def reporting(*arguments, run_worker=bench.run_worker):
    for event in run_worker(*arguments):
        kind = event["event"]
        yield event
        print("took in", kind, flush=True)

bench.run_worker = reporting
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("whom", ["process", "group"])
def test_interrupt_leaves_the_rows_that_were_measured(tmp_path: Path, whom: str) -> None:
    data = tmp_path / "bench.json"
    arguments = ["bench", "--backend", "numpy", "--shapes", "2,3,4", "1500,1500,1500", "--rounds", "9"]
    with subprocess.Popen(
        [sys.executable, "-c", REPORTING, *arguments, "--json", str(data)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as parent:  # fmt: skip
        try:
            while parent.stdout.readline() not in ("took in rows\n", ""):
                pass
            (os.kill if whom == "process" else os.killpg)(parent.pid, signal.SIGINT)
            out, err = parent.communicate(timeout=30)
        finally:
            parent.kill()
    assert (parent.returncode, err) == (130, "xaffine: interrupted\n")
    assert "2x3x4" in out
    assert "1500" not in out
    assert {tuple(row["shape"]) for row in json.loads(data.read_text())["rows"]} == {(2, 3, 4)}


def test_plot_without_matplotlib_says_how_to_get_it(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert __main__.main(["bench", "--plot", "x.svg"]) == 2
    assert "pip install matplotlib" in capfd.readouterr().err


def test_file_that_cannot_be_written_is_named_before_anything_is_timed(capfd: Any, tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for file in (tmp_path / "missing" / "bench.json", pipe, link, tmp_path):
        assert __main__.main(["bench", "--json", str(file)]) == 2
        printed = capfd.readouterr()
        assert f"{file} cannot be written: name a regular file" in printed.err
        assert printed.out == ""
    assert pipe.is_fifo()
    assert link.is_symlink()


def test_file_of_figures_keeps_its_mode_and_links_and_may_have_any_name(tmp_path: Path) -> None:
    file, link = tmp_path / ("n" * 255), tmp_path / "link"
    file.touch(0o600)
    link.symlink_to(file)
    for text in ("first", "second"):
        replace_text(link, text)
        assert file.read_text() == text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert link.is_symlink()
    with pytest.raises(OSError, match="regular file"):
        replace_text(Path(os.devnull), "")
    assert Path(os.devnull).is_char_device()
    assert {entry.name for entry in tmp_path.iterdir()} == {file.name, "link"}


def test_backends_are_those_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(name: str) -> None:
        if name == "torch":
            raise ImportError(name)
        if name == "cupy":
            raise RuntimeError("no CUDA device")

    def events(_: str, arguments: dict[str, Any], __: float) -> Iterator[dict[str, Any]]:
        timed.append((arguments["backend"], arguments["beside"]))
        yield from ()

    monkeypatch.setattr(backends, "get", get)
    monkeypatch.setattr(bench, "run_worker", events)
    timed: list[Any] = []
    assert __main__.main(["bench"]) == 0
    assert timed == [("numpy", []), ("jax", [])]
    timed.clear()
    assert __main__.main(["bench", "--beside", "a:b", "c.py:d"]) == 0
    assert __main__.main(["bench", "--beside", "a:b", "--backend", "jax", "torch"]) == 0
    assert timed == [("numpy", ["a:b", "c.py:d"]), ("jax", ["a:b"]), ("torch", ["a:b"])]


@pytest.mark.parametrize(
    "arguments", [["--shapes", "1,2"], ["--shapes", "0,1,1"], ["--rounds", "0"], ["--backend", "x"]]
)
def test_wrong_options_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        __main__.main(["bench", *arguments])
    assert exit_.value.code == 2


def test_shape_that_is_none_says_what_is_wanted(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["bench", "--shapes", "64,512"])
    assert "wanted N,n,m, each at least 1, such as 64,512,512; got '64,512'" in capsys.readouterr().err


def test_quartiles_of_one_round_are_that_round() -> None:
    assert bench._quartiles([2.0]) == (2.0, 2.0, 2.0)
