"""The rows of docs/benchmarks/overhead.py: what is compared does the same work, and the page says what was found."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("overhead")


def leaves(result: Any) -> list[Any]:
    """The arrays in nested tuples, without None, as NumPy's."""
    if isinstance(result, tuple | list):
        return [leaf for each in result for leaf in leaves(each)]
    return [] if result is None else [np.asarray(result, dtype=np.float64)]


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_both_sides_of_a_ratio_compute_the_same(library: str, overhead: Any) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    rows = overhead.LIBRARIES[library]()
    for row in rows:
        if "accumulate" in row.what:
            continue  # each call adds to the sums of the one before
        ours, other = leaves(row.ours()), leaves(row.other())
        # The functions return db, too, which the other side leaves in its layer.
        for a, b in zip(ours, other, strict=not row.what.startswith("affine_vjp")):
            np.testing.assert_allclose(a, b.reshape(a.shape), rtol=1e-5, atol=1e-5, err_msg=str(row[:3]))


def test_a_row_has_quartiles_around_its_median(overhead: Any) -> None:
    found = overhead.measure_library("numpy", 3)
    assert found["version"] == np.__version__
    assert len(found["rows"]) == len(overhead.numpy_rows())
    for row in found["rows"]:
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_the_sides_of_a_ratio_are_not_swapped(overhead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    row = overhead.Row("sleep", (1, 1, 1), "nothing", 1.0, lambda: time.sleep(2e-4), lambda: None)
    monkeypatch.setitem(overhead.LIBRARIES, "numpy", lambda: [row])
    (found,) = overhead.measure_library("numpy", 4)["rows"]
    assert found["ratio"] > 10
    assert found["seconds"] > 2e-4 > found["seconds_of_other"]


def test_a_figure_above_what_is_promised_is_bold(overhead: Any) -> None:
    found = json.loads((FOLDER / "overhead.json").read_text(encoding="utf-8"))
    row = found["rows"][0]
    for ratio, text in ((row["at_most"], f"| {row['at_most']:.2f} ("), (row["at_most"] + 1, "| **")):
        row["ratio"] = ratio
        found["import"]["beyond"] = found["import"]["at_most"] + ratio - row["at_most"]
        lines = overhead.section(found)
        assert text in next(line for line in lines if line.startswith(f"| {row['library']} |"))
        assert ("takes **16** ms" in lines[-2]) == (ratio > row["at_most"])


def test_each_library_runs_in_a_process_of_its_own(
    overhead: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def run(command: list[str], **_: Any) -> Any:
        monkeypatch.setattr("sys.argv", command[1:])
        overhead.main()
        return type("Process", (), {"stdout": capsys.readouterr().out})

    monkeypatch.setattr(overhead, "DATA", tmp_path / "overhead.json")
    monkeypatch.setattr(
        overhead, "measure_import", lambda _: {"at_most": 15, **dict.fromkeys(("numpy", "beyond", "low", "high"), 1.0)}
    )
    monkeypatch.setattr(overhead.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--rounds", "2", "--libraries", "numpy", "--save"])
    overhead.main()
    assert "| numpy | forward + backward |" in capsys.readouterr().out
    saved = json.loads((tmp_path / "overhead.json").read_text(encoding="utf-8"))
    assert saved["rounds"] == 2
    assert list(saved["versions"]) == ["numpy"]
