"""The doctor: which array libraries are here, does the layer compute verified gradients on each, and how fast.

``python -m xaffine._command.doctor NAME`` emits the examination of one backend. The command runs it for every backend,
each in a process of its own: thread pools of several libraries in one process slow each other down.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine import backends
from xaffine._command.files import require_writable, write_text
from xaffine._command.machine import describe_machine
from xaffine._command.speed import find_lost_speed
from xaffine._command.terminal import print_table, progress_bar
from xaffine.functional import affine_vjp
from xaffine.layer import AffineLayer
from xaffine.testing._process import WorkerError, result_of_worker, serve
from xaffine.testing.cases import make_case
from xaffine.testing.checks import PROPERTIES

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from xaffine.backends import Backend

__all__ = [
    "TooSlowError", "add_arguments", "blank_report", "examine", "examine_in_worker", "measure_throughput", "run",
    "verify",
]  # fmt: skip

_TIME_LIMIT = 300  # seconds for one backend
# N = n = m of the products that show the rate of a machine: the same for all libraries, so that their rates compare.
_CPU_SIZE, _GPU_SIZE = 1024, 4096
_PASS_LIMIT = 5.0  # seconds for one forward and backward of that size
_TRIES = 3  # to measure a rate while nothing else runs
_MOST_OF_OTHERS = 0.05  # of the cores, taken by other processes; beyond it a rate says nothing of the library

# x, n_batch_axes and m of the cases: a batch, a tensor with several batch axes, one vector, an empty batch.
_SHAPES = (((17, 13), 1, 7), ((3, 2, 2, 5), 2, 9), ((11,), 0, 4), ((0, 3), 1, 2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the doctor."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="all of it for a program to read; - prints it")


def run(options: argparse.Namespace) -> int:
    """Examine all backends and print what was found.

    Returns
    -------
    int
        The exit code: 1 if an installed backend computes wrong gradients, else 3 if the examination of one did not
        finish, else 0.
    """
    if options.json is not None:
        try:
            require_writable(options.json)
        except OSError as error:
            print(f"xaffine could not run: {error}", file=sys.stderr)
            return 2
    machine = {**describe_machine(), "lost_speed": []}
    names = backends.names()
    reports: list[dict[str, Any]] = []
    try:
        with progress_bar(len(names) + 1) as show:
            for done, name in enumerate(names):
                show(f"examining {name}", done)
                reports.append(examine_in_worker(name))
            show("looking for lost speed", len(names))
            try:
                machine["lost_speed"] = find_lost_speed()
            except WorkerError as error:
                print(f"xaffine could not look for lost speed: {error}", file=sys.stderr)
    finally:  # an interrupt, too, leaves what was found so far
        if options.json is not None:
            write_text(options.json, json.dumps({**machine, "backends": reports}, indent=1) + "\n")
        if str(options.json) != "-":
            _print_reports(machine, reports)
    found = {report["status"] for report in reports}
    return 1 if "wrong" in found else 3 if "not finished" in found else 0


def examine_in_worker(name: str, time_limit: float = _TIME_LIMIT) -> dict[str, Any]:
    """Examine a backend in a process of its own, whose early end or hang gives the status "not finished"."""
    if name not in backends.installed():
        return examine(name)
    try:
        report: dict[str, Any] = result_of_worker("xaffine._command.doctor", {"name": name}, time_limit)["report"]
    except WorkerError as error:
        note = f"no answer within {time_limit} s" if error.timed_out else str(error)
        return blank_report(name, status="not finished", note=note)
    return report


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
    report |= {"version": backend.version, "device": backend.device_name(backend.devices[0])}
    report["dtypes"] = [dtype for dtype in ("float32", "float64") if dtype in backend.dtypes()]
    try:
        report["worst_error"] = verify(backend, report["dtypes"])
    except AssertionError as error:
        return {**report, "status": "wrong", "note": str(error).partition("\n")[0]}
    except Exception as error:  # a library of CUDA that is missing, say
        return {**report, "status": "unusable", "note": f"{type(error).__name__}: {error}"}
    try:
        report["throughput"] = measure_throughput(backend)
    except TooSlowError as error:
        report["note"] = f"rate not measured: {error}"
    except Exception as error:  # out of memory, say, which leaves the gradients right
        report["note"] = f"rate not measured: {type(error).__name__}: {error}"
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
        for seed, (x_shape, k, m) in enumerate(_SHAPES):
            for prop in PROPERTIES:
                if prop.tier in ("exact", "bounded"):
                    case = make_case(x_shape, m, seed=seed, values=prop.values, dtypes=dtype, n_batch_axes=k)
                    worst = max(worst, prop.check(make, case, backend) or 0.0)
    return worst


class TooSlowError(Exception):
    """A library would take too long to show its rate."""


def measure_throughput(backend: Backend, seconds: float = 1.0) -> dict[str, Any]:
    """Time forward and backward of a square float32 layer beside their three bare matrix products.

    Parameters
    ----------
    backend : Backend
        From `xaffine.backends.get`.
    seconds : float
        About how long to measure.

    Returns
    -------
    dict
        ``size`` is N = n = m, 1024 on a CPU and 4096 on a GPU; ``layer`` and ``matmul`` are medians in GFLOP/s of
        interleaved rounds; ``quiet`` is whether no other work took the cores meanwhile, in one of three tries.

    Raises
    ------
    TooSlowError
        One forward and backward of that size would take more than 5 seconds.
    """
    xp = backend.xp

    def layer(x: Any, W: Any, b: Any, dy: Any) -> tuple[Any, ...]:
        y, vjp = affine_vjp(x, W, b)
        return (y, *vjp(dy))

    def matmul(x: Any, W: Any, _: Any, dy: Any) -> tuple[Any, ...]:
        x_T, W_T = xp.matrix_transpose(x), xp.matrix_transpose(W)
        return xp.matmul(x, W), xp.matmul(dy, W_T), xp.matmul(x_T, dy)

    def time_of(function: Callable[..., Any], operands: list[Any]) -> float:
        start = time.perf_counter()
        for result in function(*operands):
            backend.wait(result)
        return time.perf_counter() - start

    target = _GPU_SIZE if backend.is_gpu(backend.devices[0]) else _CPU_SIZE
    # Twice the size takes at most eight times as long, so no step of this search takes long.
    for size in (target // 8, target // 4, target // 2, target):
        rng = np.random.default_rng(size)
        shapes = ((size, size), (size, size), (size,), (size, size))
        operands = [backend.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes]
        for function in (layer, matmul):  # compiles, starts threads, makes memory ready
            time_of(function, operands)
        if size < target and 8 * (taken := time_of(layer, operands)) > _PASS_LIMIT:
            msg = (
                f"forward and backward at N = n = m = {size} take {taken:.2g} s, too long for the {target} at which "
                "rates are compared"
            )
            raise TooSlowError(msg)
    for _ in range(_TRIES):
        pairs: list[tuple[float, float]] = []
        load, end = _Load(), time.perf_counter() + seconds
        while not pairs or time.perf_counter() < end:
            pairs.append((time_of(layer, operands), time_of(matmul, operands)))
        if quiet := load.is_low():
            break
    gflop = 6e-9 * size**3
    medians = [gflop / statistics.median(times) for times in zip(*pairs, strict=True)]
    return {"size": size, "layer": medians[0], "matmul": medians[1], "quiet": quiet}


class _Load:
    """What other processes take from the cores from now on; nothing, where psutil is missing."""

    def __init__(self) -> None:
        try:
            import psutil
        except ImportError:
            return
        psutil.cpu_percent()  # the next call says what happened since this one
        self._psutil, self._start, self._own = psutil, time.monotonic(), time.process_time()

    def is_low(self) -> bool:
        """Whether others took at most a twentieth of the cores, or left one of them idle."""
        if not hasattr(self, "_psutil"):
            return True
        elapsed = time.monotonic() - self._start
        available = elapsed * self._psutil.cpu_count()
        busy = available * self._psutil.cpu_percent() / 100
        others = busy - (time.process_time() - self._own)
        return bool(others <= _MOST_OF_OTHERS * available or available - busy >= elapsed)


def _print_reports(machine: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    print(f"xaffine {machine['xaffine']}, Python {machine['python']}, {machine['system']}, {machine['cores']} cores")
    print(f"BLAS of NumPy: {machine['blas']}\n")
    absent = [report["backend"] for report in reports if report["status"] == "not installed"]
    here = [report for report in reports if report["status"] != "not installed"]
    styles = [{"right": "green", "wrong": "bold red"}.get(report["status"], "dim") for report in here]
    header = ("backend", "version", "device", "gradients", "error", "GFLOP/s", "matmul")
    print_table(header, [_row(report) for report in here], styles)
    print(
        "\nerror: the worst, as a fraction of its rounding bound. GFLOP/s: forward and backward"
        "\nin float32, beside the same matrix products alone."
    )
    if any(_is_busy(report) for report in here):
        print("busy: other work took the cores meanwhile; run it again when the machine is quiet.")
    for found in machine["lost_speed"]:
        print(f"\n{found['setting']}: {found['times']:.2f}x faster here")
    for report in here:
        if report["note"]:
            print(f"\n{report['backend']}: {report['note']}")
    if absent:
        requirements = ", ".join(backends._INSTALL[name] for name in absent)
        print(f"\nnot installed; pip install any of: {requirements}")
    if here:
        print(f"\n{_summary(here)}")


def _summary(reports: list[dict[str, Any]]) -> str:
    """The verdict of all libraries that are installed, in one line."""
    by_status: dict[str, list[str]] = {}
    for report in reports:
        by_status.setdefault(report["status"], []).append(report["backend"])
    texts = {
        "wrong": "WRONG gradients on", "not finished": "not finished on", "right": "forward and backward are right on",
        "unusable": "unusable here:",
    }  # fmt: skip
    return "; ".join(f"{text} {', '.join(by_status[status])}" for status, text in texts.items() if status in by_status)


def _is_busy(report: dict[str, Any]) -> bool:
    return report["throughput"] is not None and not report["throughput"]["quiet"]


def _row(report: dict[str, Any]) -> tuple[str, ...]:
    speed = report["throughput"]
    worst = report["worst_error"]
    rates = ["-"] * 2 if speed is None else [_three_digits(speed[what]) for what in ("layer", "matmul")]
    return (
        report["backend"],
        report["version"] or "-",
        report["device"] or "-",
        "WRONG" if report["status"] == "wrong" else report["status"],
        "-" if worst is None else f"{worst:.2f}",
        *(["busy"] * 2 if _is_busy(report) else rates),
    )


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _work(emit: Callable[..., None], name: str) -> None:
    emit("examined", report=examine(name))


if __name__ == "__main__":
    serve(_work)
