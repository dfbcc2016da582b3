"""Speed that NumPy's BLAS leaves unused: the better setting, and how much faster it was measured to be.

``python -m xaffine.command.speed {}`` tells the seconds that one product takes in a process of its own, where
environment variables that a BLAS reads when it is loaded take effect.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine.command.children import answer_of_child, telling

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["candidates", "find_lost_speed", "measure"]

_SIZE = 1024  # of the square product that is timed
_WORTH = 1.05  # below this a difference may be the noise of the machine
_LIMIT = 120.0  # seconds for one process
# The kernels of OpenBLAS that use AVX-512.
_AVX512_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids", "GraniteRapids")


def candidates(pools: Iterable[dict[str, Any]], flags: Iterable[str], cores: int) -> list[dict[str, str]]:
    """Settings that may be faster than what a BLAS chose.

    Parameters
    ----------
    pools : iterable of dict
        What `threadpoolctl.threadpool_info` says of the thread pools.
    flags : iterable of str
        The instruction sets of the CPU, as Linux names them.
    cores : int
        How many this process may use.

    Returns
    -------
    list of dict
        Environment variables each.

    Examples
    --------
    >>> pool = {"user_api": "blas", "internal_api": "openblas", "architecture": "Haswell", "num_threads": 1}
    >>> candidates([pool], ["avx2", "avx512f"], cores=4)
    [{'OPENBLAS_CORETYPE': 'SkylakeX'}, {'OPENBLAS_NUM_THREADS': '4'}]
    """
    variables = {"openblas": "OPENBLAS_NUM_THREADS", "mkl": "MKL_NUM_THREADS", "blis": "BLIS_NUM_THREADS"}
    found = []
    for pool in pools:
        if pool["user_api"] != "blas":
            continue
        library = pool["internal_api"]
        if library == "openblas" and "avx512f" in set(flags) and pool.get("architecture") not in _AVX512_KERNELS:
            found.append({"OPENBLAS_CORETYPE": "SkylakeX"})
        if pool["num_threads"] != cores and library in variables:  # too few, or more than there are cores
            found.append({variables[library]: str(cores)})
    return found


def measure(settings: list[dict[str, str]], rounds: int = 3) -> list[float]:
    """How many times faster a matrix product is with each of some settings, the median of alternating rounds."""
    ratios: list[list[float]] = [[] for _ in settings]
    for _ in range(rounds if settings else 0):
        plain = _seconds({})
        for setting, its_ratios in zip(settings, ratios, strict=True):
            its_ratios.append(plain / _seconds(setting))
    return [statistics.median(its_ratios) for its_ratios in ratios]


def find_lost_speed() -> list[dict[str, Any]]:
    """The settings that were measured to be faster here: ``setting`` as text and ``times``, the ratio.

    Empty where none is, and where threadpoolctl is missing: nothing is claimed that was not measured.
    """
    try:
        import threadpoolctl
    except ImportError:
        return []
    settings = candidates(threadpoolctl.threadpool_info(), _cpu_flags(), _usable_cores())
    return [
        {"setting": " ".join(f"{name}={value}" for name, value in setting.items()), "times": times}
        for setting, times in zip(settings, measure(settings), strict=True)
        if times >= _WORTH
    ]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_flags(file: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instruction sets of the CPU; none where the operating system does not list them there."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])


def _seconds(environment: dict[str, str]) -> float:
    return float(answer_of_child("xaffine.command.speed", {}, _LIMIT, environment)["seconds"])


def _child() -> None:
    with telling() as tell:
        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal((_SIZE, _SIZE), dtype=np.float32) for _ in range(2))
        times = []
        for _ in range(7):
            start = time.perf_counter()
            a.dot(b)
            times.append(time.perf_counter() - start)
        tell("time", seconds=statistics.median(times[2:]))


if __name__ == "__main__":
    _child()
