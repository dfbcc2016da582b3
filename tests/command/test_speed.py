"""The doctor finds lost speed, and claims none that it did not measure."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import threadpoolctl

from xaffine._command import doctor, speed
from xaffine.testing import _process as worker

POOL = {"user_api": "blas", "internal_api": "openblas", "architecture": "SkylakeX", "num_threads": 4}


@pytest.mark.parametrize(
    ("pool", "environment", "expected"),
    [
        ({}, {}, []),
        ({}, {"OPENBLAS_CORETYPE": "Haswell"}, [{"OPENBLAS_CORETYPE": None}]),
        ({"architecture": "Haswell"}, {"OPENBLAS_CORETYPE": "SkylakeX"}, [{"OPENBLAS_CORETYPE": None}]),
        ({"architecture": "Haswell"}, {}, []),  # what OpenBLAS chose for this CPU
        ({"architecture": "Haswell"}, {"OPENBLAS_CORETYPE": ""}, []),
        ({"num_threads": 1}, {}, [{"OPENBLAS_NUM_THREADS": "4"}]),
        ({"num_threads": 64}, {}, [{"OPENBLAS_NUM_THREADS": "4"}]),
        (
            {"num_threads": 1},
            {"OPENBLAS_CORETYPE": "Nehalem"},
            [{"OPENBLAS_CORETYPE": None}, {"OPENBLAS_NUM_THREADS": "4"}],
        ),
        ({"internal_api": "mkl", "num_threads": 2}, {"OPENBLAS_CORETYPE": "Nehalem"}, [{"MKL_NUM_THREADS": "4"}]),
        ({"internal_api": "unheard-of", "num_threads": 2}, {}, []),
        ({"user_api": "openmp", "num_threads": 2}, {"OPENBLAS_CORETYPE": "Nehalem"}, []),
    ],
)
def test_candidates(pool: Any, environment: dict[str, str], expected: Any) -> None:
    pools = [{**POOL, **pool}] * 2  # that of NumPy, and that of SciPy
    assert speed.candidates(pools, environment, cores=4) == expected


def test_unset_variable_does_not_reach_the_process_that_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "says.py").write_text(
        "import os\nfrom xaffine.testing._process import serve\n"
        "serve(lambda channel: channel('found', names=sorted(os.environ)))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    for environment, there in (({}, True), ({"OPENBLAS_CORETYPE": None}, False), ({"NOT_SET": None}, True)):
        names = worker.result_of_worker("says", {}, 60, environment)["names"]
        assert ("OPENBLAS_CORETYPE" in names) == there
        assert "NOT_SET" not in names


def test_setting_takes_effect_in_the_process_that_is_measured() -> None:
    """No ratio is asserted, which would be a test of this machine: only that one comes out for each setting."""
    ratios = speed.measure([{"OPENBLAS_NUM_THREADS": "1"}, {"OPENBLAS_CORETYPE": None}], rounds=1)
    assert len(ratios) == 2
    assert min(ratios) > 0


def test_only_what_was_measured_to_be_faster_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = {**POOL, "architecture": "Haswell", "num_threads": 1}
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: [pool])
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setattr(speed, "_usable_cores", lambda: 2)
    seconds = {"": 1.0, "OPENBLAS_CORETYPE": 0.5, "OPENBLAS_NUM_THREADS": 0.99}
    monkeypatch.setattr(speed, "_seconds", lambda setting: seconds[next(iter(setting), "")])
    assert speed.find_lost_speed() == [{"setting": "unset OPENBLAS_CORETYPE", "times": 2.0}]


def test_nothing_is_claimed_without_threadpoolctl(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def import_some(name: str, *rest: Any, **more: Any) -> Any:
        if name == "threadpoolctl":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", import_some)
    assert speed.find_lost_speed() == []


def test_cores_are_those_that_this_process_may_use() -> None:
    assert speed._usable_cores() >= 1


@pytest.mark.parametrize("found", [[], [{"setting": "unset OPENBLAS_CORETYPE", "times": 1.853}]])
def test_doctor_prints_the_better_setting(capsys: Any, found: Any) -> None:
    doctor._print_reports({**doctor.describe_machine(), "lost_speed": found}, [])
    assert ("unset OPENBLAS_CORETYPE: 1.85x faster here\n" in capsys.readouterr().out) == bool(found)
