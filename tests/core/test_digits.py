"""The example learns, and learns the same on every backend."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xaffine.backends import Backend
from xaffine.testing import bounds

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "digits.py"


@pytest.fixture(scope="module")
def train() -> Any:
    """The training function of the example."""
    return runpy.run_path(str(EXAMPLE))["train"]


def test_learns_to_read_digits(backend: Backend, train: Any) -> None:
    history = train(backend.name, epochs=10, batch=64, rate=0.4)
    assert history[-1].accuracy > 0.95
    assert history[-1].loss < history[0].loss / 10


def test_loss_curve_is_that_of_numpy(backend: Backend, train: Any) -> None:
    # What is claimed: computed in float64, the curves of two libraries are one to the precision of float32.
    ours, numpys = (np.array(train(name, epochs=2, batch=128, dtype="float64")) for name in (backend.name, "numpy"))
    assert np.abs(ours - numpys).max() <= float(bounds.unit_roundoff("float32"))


def test_another_seed_gives_another_curve(train: Any) -> None:
    assert train("numpy", epochs=1, seed=0) != train("numpy", epochs=1, seed=1)


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["digits.py", "--backend", "numpy", "--epochs", "2"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    first, second = capsys.readouterr().out.splitlines()
    assert "[###############               ]  loss" in first
    assert "[##############################]  loss" in second


def test_command_line_with_a_backend_that_is_not_here(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["digits.py", "--backend", "cupy"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert exit_.value.code == 2
    assert "cupy" in capsys.readouterr().err
