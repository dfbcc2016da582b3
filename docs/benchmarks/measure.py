"""Measure the speed of xaffine on the CPU: writes cpu.json, overhead.json, cpu.svg and README.md.

    python docs/benchmarks/measure.py           # everything: some twenty minutes, on a machine that does nothing else
    python docs/benchmarks/measure.py --page    # the page and the plot alone, from the JSON files

Needs ``pip install ".[cli,plot]"``, torch, jax and thinc; a library that is missing is left out.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import groups
import numpy as np
import overhead

from xaffine import AffineLayer
from xaffine._command.plot import draw_ratios

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
DATA, UNFINISHED = HERE / "cpu.json", HERE / "cpu.unfinished"
DTYPES = ("float32", "float64")
TALL = ((65536, 64, 32), (65536, 784, 10), (262144, 32, 32))
SQUARES = ((1024, 1024, 1024), (4096, 2048, 2048))
OWN, FILLING = "xaffine", "xaffine, out="


def layer_with_buffers(N: int, n: int, m: int, dtype: str) -> Any:
    """A function that goes forward and backward into ready buffers."""
    rng = np.random.default_rng()
    x, W, b, dy = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in ((N, n), (n, m), m, (N, m)))
    layer, y, out = AffineLayer(W, b), np.empty_like(dy), (np.empty_like(x), np.empty_like(W), np.empty_like(b))

    def call() -> None:
        layer.forward(x, out=y)
        layer.backward(dy, out=out)

    call()
    return call


def seconds(call: Any) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_peak() -> float:
    """MiB that forward and backward into buffers take at their peak, beside operands and buffers."""
    call = layer_with_buffers(262144, 32, 32, "float32")
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def measure_growth(shape: tuple[int, int, int], dtype: str) -> float:
    """How many times longer 16 N rows take than N, over 16."""
    N, n, m = shape
    small, large = layer_with_buffers(N, n, m, dtype), layer_with_buffers(16 * N, n, m, dtype)
    return statistics.median(seconds(large) / seconds(small) for _ in range(7)) / 16


def measure_sum() -> dict[str, float]:
    """The worst error of db, N = 10⁶ random float32, and of NumPy's own sum."""
    dy = np.random.default_rng().standard_normal((1_000_000, 8), dtype=np.float32)
    exact = np.array([math.fsum(column) for column in dy.T])
    layer = AffineLayer(np.empty((0, 8), "f"), np.zeros(8, "f"))
    layer.forward(np.empty((len(dy), 0), "f"))
    layer.backward(dy)
    return {"db": float(max(abs(layer.db - exact))), "dy.sum(axis=0)": float(max(abs(dy.sum(axis=0) - exact)))}


def measure() -> dict[str, Any]:
    """All figures."""
    here = [name for name in ("numpy", "thinc", "torch", "jax") if find_spec(name) is not None]
    options = ["--groups", *here, "--rounds", "11", "--dtype", *DTYPES, "--json", str(UNFINISHED)]
    exit_code = groups.main(options)
    if exit_code:
        print(f"what was measured is in {UNFINISHED}", file=sys.stderr)
        sys.exit(exit_code)
    found: dict[str, Any] = json.loads(UNFINISHED.read_text(encoding="utf-8"))
    found["peak"] = measure_peak()
    found["growth"] = {dtype: {str(shape): measure_growth(shape, dtype) for shape in TALL} for dtype in DTYPES}
    found["sum"] = measure_sum()
    return found


def rows_to_reach(found: dict[str, Any], dtype: str) -> Iterator[tuple[str, str, str, float, float]]:
    """What is timed, on which shape, against what, the most it may take, and what it takes."""
    rows = {
        (row["group"], tuple(row["shape"]), row["implementation"], row["what"]): row["to"]
        for row in found["rows"]
        if row["dtype"] == dtype
    }
    shapes = list(dict.fromkeys(shape for _, shape, _, _ in rows))

    def ratio(group: str, shape: Any, own: str, what: str, other: str) -> float:
        return float(rows[group, shape, own, what][other])

    for shape in shapes:
        limit, own = (1.05, OWN) if shape == (1, 8, 8) else (0.8, FILLING) if shape in TALL else (1.0, OWN)
        reached = ratio("numpy", shape, own, "both", "classic class")
        yield f"{own}: forward + backward", str(shape), "classic class", limit, reached
    limits = dict.fromkeys(SQUARES, 1.05) | {(262144, 32, 32): 1.25, (65536, 784, 10): 0.95}
    for shape, limit in limits.items():
        yield (
            f"{FILLING}: forward",
            str(shape),
            "bare product",
            limit,
            ratio("numpy", shape, FILLING, "forward", "limit"),
        )
    for shape, limit in (dict.fromkeys(SQUARES, 1.03) | {(65536, 784, 10): 0.85}).items():
        reached = ratio("numpy", shape, FILLING, "backward", "limit")
        yield f"{FILLING}: backward", str(shape), "bare products", limit, reached
    small = {"torch": {(1, 8, 8): 0.45, (32, 64, 64): 0.6}, "jax": {(1, 8, 8): 1.15}}
    for group, other, usual in (("torch", "nn.Linear + autograd", 1.0), ("jax", "jax.jit by hand", 1.05)):
        for shape in shapes if group in found["groups"] else ():
            limit = small[group].get(shape, usual)
            reached = ratio(group, shape, OWN, "both", other)
            yield f"{OWN} on {group}: forward + backward", str(shape), other, limit, reached
    for shape in TALL:
        reached = found["growth"][dtype][str(shape)]
        yield f"{FILLING}: 16 N rows, forward + backward", str(shape), "16 times N rows", 1.1, reached


def write_page(found: dict[str, Any], calls: dict[str, Any]) -> str:
    """The page, from the figures of the grid and those of `overhead`."""
    versions = ", ".join(f"{group} {facts['version']}" for group, facts in found["groups"].items())
    lines = [
        "# Benchmarks",
        "",
        f"Written by `docs/benchmarks/measure.py` (`nox -s bench`) on {found['date']}: xaffine {found['xaffine']}, "
        f"Python {found['python']}, {found['system']}, {found['cores']} cores; {found['blas']}; {versions}. "
        "The data are in [cpu.json](cpu.json). Every figure is the median of the ratios within "
        f"{found['rounds']} interleaved rounds. GPUs have [a page of their own](gpu.md).",
        "",
        "![Time of forward and backward over that of the bare products, against N n m, for each implementation on "
        "NumPy, torch and JAX: the figures of the tables below](cpu.svg)",
        "",
        "## What is to be reached",
        "",
        "Bold figures miss it. From run to run the medians differ by some 3 % on this machine, on JAX by 10 %: what "
        "JAX compiles is the very program that is compared with, which a test holds.",
        "",
        "Not measured: other machines, operating systems and BLAS libraries than those above; half precision, complex "
        "numbers and integers; ndonnx, sparse and array-api-strict; Dask, which has [a page of its own](scale.md).",
        "",
    ]
    tables = {dtype: list(rows_to_reach(found, dtype)) for dtype in DTYPES}
    lines += ["| what | N, n, m | against | at most | float32 | float64 |", "|---|---|---|---|---|---|"]
    for single, double in zip(tables["float32"], tables["float64"], strict=True):
        what, shape, other, limit, _ = single
        reached = (f"{value:.2f}" if value <= limit else f"**{value:.2f}**" for value in (single[-1], double[-1]))
        lines.append(f"| {what} | {shape[1:-1]} | {other} | {limit:.2f} | {' | '.join(reached)} |")
    sums = found["sum"]
    lines += [
        "",
        f"- Forward and backward into buffers at (262144, 32, 32) take {found['peak']:.1f} MiB beside operands and "
        "buffers (at most 8).",
        f"- The worst error of db on a million random float32 rows is {sums['db']:.1e}, that of `dy.sum(axis=0)` "
        f"{sums['dy.sum(axis=0)']:.1e} (at most a fifth).",
        "",
        *overhead.section(calls),
        "## All figures",
        "",
        "Microseconds, and forward + backward over the bare products.",
        "",
    ]
    for group in found["groups"]:
        lines += [f"### {group}", ""]
        lines += ["| dtype | N, n, m | implementation | forward | backward | both | both / products (quartiles) |"]
        lines += ["|---|---|---|---|---|---|---|"]
        by_line: dict[tuple[str, ...], dict[str, Any]] = {}
        for row in found["rows"]:
            if row["group"] == group:
                key = (row["dtype"], ", ".join(map(str, row["shape"])), row["implementation"])
                by_line.setdefault(key, {})[row["what"]] = row
        for line, each in by_line.items():
            times = [f"{each[what]['median'] * 1e6:,.1f}" for what in ("forward", "backward", "both")]
            both = each["both"]
            ratio = f"{both['ratio']:.2f} ({both['ratio_low']:.2f} to {both['ratio_high']:.2f})"
            lines.append(f"| {' | '.join(line)} | {' | '.join(times)} | {ratio} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, unless the page alone is asked for, and write."""
    if sys.argv[1:] != ["--page"]:
        found = measure()
        overhead.save(overhead.measure())
        DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        UNFINISHED.unlink()
    found, calls = (json.loads(file.read_text(encoding="utf-8")) for file in (DATA, overhead.DATA))
    draw_ratios(found, HERE / "cpu.svg")
    (HERE / "README.md").write_text(write_page(found, calls), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; what was measured, if a group was begun, is in", UNFINISHED, file=sys.stderr)
        sys.exit(130)
