"""Examine one backend: is it here, does the layer compute verified gradients on it, and how fast.

``python -m xaffine.doctor NAME`` prints the examination of one backend as JSON. The command runs that for every
backend, each in a process of its own: thread pools of several libraries in one process slow each other down.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine import backends
from xaffine.functional import affine_vjp
from xaffine.layer import AffineLayer
from xaffine.testing.cases import make_case
from xaffine.testing.checks import PROPERTIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from xaffine.backends import Backend

__all__ = ["blank_report", "examine", "measure_throughput", "verify"]

# Batch, features and m of the cases: a batch, a tensor with several batch axes, one vector, an empty batch.
_SHAPES = (((17,), (13,), 7), ((3, 2), (2, 5), 9), ((), (11,), 4), ((0,), (3,), 2))


def examine(name: str) -> dict[str, Any]:
    """Examine one backend.

    Parameters
    ----------
    name : str
        One of `xaffine.backends.names`.

    Returns
    -------
    dict
        ``status`` is "right", "wrong", "unusable" or "not installed". ``note`` says how to get it, what is
        missing or what is wrong. ``version`` and ``device`` are text, ``dtypes`` those verified, ``worst_error``
        is a fraction of its rounding bound, ``throughput`` comes from `measure_throughput`.
    """
    try:
        backend = backends.get(name)
    except (ImportError, RuntimeError) as error:
        status = "unusable" if name in backends.installed() else "not installed"
        return blank_report(name, status=status, note=str(error))
    backend.use_full_precision()
    report = blank_report(name, status="right", note=None)
    report |= {"version": backend.version, "device": _device_name(backend.devices[0])}
    report["dtypes"] = [dtype for dtype in ("float32", "float64") if dtype in backend.dtypes()]
    try:
        report["worst_error"] = verify(backend, report["dtypes"])
    except AssertionError as error:
        return {**report, "status": "wrong", "note": str(error)}
    except Exception as error:  # a library of CUDA that is missing, say
        return {**report, "status": "unusable", "note": f"{type(error).__name__}: {error}"}
    try:
        report["throughput"] = measure_throughput(backend)
    except Exception as error:  # out of memory, say, which leaves the gradients right
        report["note"] = f"throughput not measured: {type(error).__name__}: {error}"
    return report


def blank_report(name: str, *, status: str, note: str | None) -> dict[str, Any]:
    """Make the report of `examine` for a backend that was not examined further."""
    findings = dict.fromkeys(("version", "device", "dtypes", "worst_error", "throughput"))
    return {"backend": name, "status": status, "note": note, **findings}


def verify(backend: Backend, dtypes: list[str], make: Callable[..., Any] = AffineLayer) -> float:
    """Put the layer through the exact and the bounded tier of proof on one backend.

    Parameters
    ----------
    backend : Backend
        From `xaffine.backends.get`.
    dtypes : list of str
        The dtypes to verify.
    make : callable, optional
        What makes the layer, as in `xaffine.testing.checks`.

    Returns
    -------
    float
        The worst error of the bounded tier as a fraction of its bound.

    Raises
    ------
    AssertionError
        A result is wrong.
    """
    worst = 0.0
    for dtype in dtypes:
        for seed, (batch, features, m) in enumerate(_SHAPES):
            for prop in PROPERTIES:
                if prop.tier in ("exact", "bounded"):
                    case = make_case(batch, features, m, seed=seed, values=prop.values, dtypes=dtype)
                    worst = max(worst, prop.check(make, case, backend))
    return worst


def measure_throughput(backend: Backend, seconds: float = 1.0) -> dict[str, float]:
    """Time forward and backward of square float32 layers beside their three bare matrix products.

    Parameters
    ----------
    backend : Backend
        From `xaffine.backends.get`.
    seconds : float
        About how long to measure.

    Returns
    -------
    dict
        ``size`` is N = n = m, ``layer`` and ``matmul`` are medians in GFLOP/s of interleaved rounds.
    """
    xp = backend.xp

    def layer(x: Any, W: Any, b: Any, dy: Any) -> tuple[Any, ...]:
        y, vjp = affine_vjp(x, W, b)
        return (y, *vjp(dy))

    def matmul(x: Any, W: Any, _: Any, dy: Any) -> tuple[Any, ...]:
        x_T, W_T = xp.matrix_transpose(x), xp.matrix_transpose(W)
        return xp.matmul(x, W), xp.matmul(dy, W_T), xp.matmul(x_T, dy)

    def time_of(function: Callable[..., Any]) -> float:
        start = time.perf_counter()
        for result in function(*operands):
            backend.wait(result)
        return time.perf_counter() - start

    # Grow until one warm pass takes a hundredth of the time, so that overheads count little.
    size = 32
    while True:
        rng = np.random.default_rng(size)
        shapes = ((size, size), (size, size), (size,), (size, size))
        operands = [backend.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes]
        time_of(layer)
        if min(time_of(matmul) for _ in range(3)) > seconds / 100 or size == 4096:
            break
        size *= 2
    pairs = [(time_of(layer), time_of(matmul))]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pairs.append((time_of(layer), time_of(matmul)))
    gflop = 6e-9 * size**3
    medians = [gflop / statistics.median(times) for times in zip(*pairs, strict=True)]
    return {"size": size, "layer": medians[0], "matmul": medians[1]}


def _device_name(device: Any) -> str:
    # The one device of ndonnx has no text of its own.
    return "cpu" if str(device) == object.__repr__(device) else str(device).strip("<>")


if __name__ == "__main__":
    json.dump(examine(sys.argv[1]), sys.stdout)
