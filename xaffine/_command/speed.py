"""Speed that NumPy's BLAS leaves unused: the better setting, and how much faster it was measured to be.

``python -m xaffine._command.speed {}`` emits the seconds that one product takes in a process of its own, where
environment variables that a BLAS reads when it is loaded take effect.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine.testing._process import result_of_worker, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["candidates", "find_lost_speed", "measure"]

_SIZE = 1024  # of the square product that is timed
_WORTH = 1.05  # below this a difference may be the noise of the machine
_LIMIT = 120.0  # seconds for one process


def candidates(
    pools: Iterable[dict[str, Any]], environment: Mapping[str, str], cores: int
) -> list[dict[str, str | None]]:
    """Settings that may be faster than those in use.

    Parameters
    ----------
    pools : iterable of dict
        What `threadpoolctl.threadpool_info` says of the thread pools.
    environment : mapping
        The environment variables of this process.
    cores : int
        How many this process may use.

    Returns
    -------
    list of dict
        Environment variables each, with None for one that is to be unset.

    Notes
    -----
    OpenBLAS chooses the kernels that suit the CPU, unless OPENBLAS_CORETYPE is set. A value that suited another machine
    can halve the speed, so the advice is always to unset it, never to set it.

    Examples
    --------
    >>> pool = {"user_api": "blas", "internal_api": "openblas", "num_threads": 1}
    >>> candidates([pool], {"OPENBLAS_CORETYPE": "Haswell"}, cores=4)
    [{'OPENBLAS_CORETYPE': None}, {'OPENBLAS_NUM_THREADS': '4'}]
    """
    variables = {"openblas": "OPENBLAS_NUM_THREADS", "mkl": "MKL_NUM_THREADS", "blis": "BLIS_NUM_THREADS"}
    found: list[dict[str, str | None]] = []
    for pool in pools:
        if pool["user_api"] != "blas":
            continue
        library = pool["internal_api"]
        if library == "openblas" and environment.get("OPENBLAS_CORETYPE"):
            found.append({"OPENBLAS_CORETYPE": None})
        if pool["num_threads"] != cores and library in variables:  # too few, or more than there are cores
            found.append({variables[library]: str(cores)})
    return [setting for number, setting in enumerate(found) if setting not in found[:number]]  # two pools of OpenBLAS


def measure(settings: list[dict[str, str | None]], rounds: int = 3) -> list[float]:
    """How many times faster a matrix product is with each of some settings, the median of alternating rounds."""
    ratios: list[list[float]] = [[] for _ in settings]
    for _ in range(rounds if settings else 0):
        seconds_as_set = _seconds({})
        for setting, ratios_of_setting in zip(settings, ratios, strict=True):
            ratios_of_setting.append(seconds_as_set / _seconds(setting))
    return [statistics.median(ratios_of_setting) for ratios_of_setting in ratios]


def find_lost_speed() -> list[dict[str, Any]]:
    """The settings that were measured to be faster here: ``setting`` as text and ``times``, the ratio.

    Empty where none is, and where threadpoolctl is missing: nothing is claimed that was not measured.
    """
    try:
        import threadpoolctl
    except ImportError:
        return []
    settings = candidates(threadpoolctl.threadpool_info(), os.environ, _usable_cores())
    return [
        {"setting": _describe(setting), "times": times}
        for setting, times in zip(settings, measure(settings), strict=True)
        if times >= _WORTH
    ]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(setting: dict[str, str | None]) -> str:
    return " ".join(f"unset {name}" if value is None else f"{name}={value}" for name, value in setting.items())


def _seconds(environment: dict[str, str | None]) -> float:
    return float(result_of_worker("xaffine._command.speed", {}, _LIMIT, environment)["seconds"])


def _work(emit: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((_SIZE, _SIZE), dtype=np.float32) for _ in range(2))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        a.dot(b)
        times.append(time.perf_counter() - start)
    emit("time", seconds=statistics.median(times[2:]))


if __name__ == "__main__":
    serve(_work)
