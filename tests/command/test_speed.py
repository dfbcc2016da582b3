"""The doctor finds lost speed, and claims none that it did not measure."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import threadpoolctl

from xaffine.command import doctor, speed

POOL = {"user_api": "blas", "internal_api": "openblas", "architecture": "SkylakeX", "num_threads": 4}


@pytest.mark.parametrize(
    ("pool", "flags", "expected"),
    [
        ({}, ["avx512f"], []),
        ({"architecture": "Haswell"}, ["avx512f"], [{"OPENBLAS_CORETYPE": "SkylakeX"}]),
        ({"architecture": "Haswell"}, ["avx2"], []),
        ({"num_threads": 1}, [], [{"OPENBLAS_NUM_THREADS": "4"}]),
        ({"num_threads": 64}, [], [{"OPENBLAS_NUM_THREADS": "4"}]),
        ({"internal_api": "mkl", "num_threads": 2, "architecture": "Haswell"}, ["avx512f"], [{"MKL_NUM_THREADS": "4"}]),
        ({"internal_api": "unheard-of", "num_threads": 2}, [], []),
        ({"user_api": "openmp", "num_threads": 2}, ["avx512f"], []),
    ],
)
def test_candidates(pool: Any, flags: list[str], expected: Any) -> None:
    assert speed.candidates([{**POOL, **pool}], flags, cores=4) == expected


def test_setting_takes_effect_in_the_process_that_is_measured() -> None:
    """No ratio is asserted, which would be a test of this machine: only that one comes out for each setting."""
    ratios = speed.measure([{"OPENBLAS_NUM_THREADS": "1"}, {"OPENBLAS_CORETYPE": "Nehalem"}], rounds=1)
    assert len(ratios) == 2
    assert min(ratios) > 0


def test_only_what_was_measured_to_be_faster_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = {**POOL, "architecture": "Haswell", "num_threads": 1}
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: [pool])
    monkeypatch.setattr(speed, "_cpu_flags", lambda: ["avx512f"])
    monkeypatch.setattr(speed, "_usable_cores", lambda: 2)
    seconds = {"": 1.0, "OPENBLAS_CORETYPE": 0.5, "OPENBLAS_NUM_THREADS": 0.99}
    monkeypatch.setattr(speed, "_seconds", lambda setting: seconds[next(iter(setting), "")])
    assert speed.find_lost_speed() == [{"setting": "OPENBLAS_CORETYPE=SkylakeX", "times": 2.0}]


def test_nothing_is_claimed_without_threadpoolctl(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def import_some(name: str, *rest: Any, **more: Any) -> Any:
        if name == "threadpoolctl":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", import_some)
    assert speed.find_lost_speed() == []


def test_instruction_sets_are_read(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert speed._cpu_flags(file) == []
    file.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\nprocessor : 1\nflags\t\t: other\n")
    assert speed._cpu_flags(file) == ["fpu", "avx2", "avx512f"]
    assert speed._usable_cores() >= 1


@pytest.mark.parametrize("found", [[], [{"setting": "OPENBLAS_CORETYPE=SkylakeX", "times": 1.853}]])
def test_doctor_prints_the_better_setting(capsys: Any, found: Any) -> None:
    doctor._print_reports({**doctor.describe_machine(), "lost_speed": found}, [])
    assert ("OPENBLAS_CORETYPE=SkylakeX: 1.85x faster here\n" in capsys.readouterr().out) == bool(found)
