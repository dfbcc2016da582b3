"""Measure what one call costs on small layers, for every way to spell it: prints a table, or writes overhead.json.

    python docs/benchmarks/overhead.py                      # a minute, on a machine that does nothing else
    python docs/benchmarks/overhead.py --libraries numpy    # these libraries alone
    python docs/benchmarks/overhead.py --save               # also writes overhead.json, for measure.py --page

Only public names of xaffine are used, so that the same script measures any version of it. Each library runs in a
process of its own; the two sides of each ratio take turns within it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers

from xaffine import AffineLayer, affine_jvp, affine_vjp
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms

DATA = Path(__file__).parent / "overhead.json"
CLASSIC, AUTOGRAD, BY_HAND = "classic class", "nn.Linear + autograd", "jax.jit by hand"
PLAIN = f"{BY_HAND}, without keeping squares in range"
ROUNDS = 31
SAMPLE = 2e-3  # seconds that one sample takes: short enough for many turns, long enough for the clock
SMALL = (1, 8, 8)

Call = Callable[[], Any]


class Row(NamedTuple):
    """What is timed against what; `at_most` is the promised ratio, None if the other side computes less."""

    what: str
    shape: tuple[int, int, int]
    against: str
    at_most: float | None
    ours: Call
    other: Call


def random_arrays(*shapes: tuple[int, ...]) -> list[Any]:
    """Normal float32 numbers, one NumPy array for each shape."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def forward_backward(layer: Any, x: Any, dy: Any) -> Call:
    """Make the function that calls forward and backward, and returns arrays to wait for."""

    def call() -> Any:
        layer.forward(x)
        return layer.backward(dy), layer.dW

    return call


def forward_backward_into_buffers(layer: AffineLayer, x: Any, dy: Any) -> Call:
    """Make the function that calls forward and backward with a buffer for every result."""
    y, out = np.empty_like(dy), (np.empty_like(x), np.empty_like(layer.W), np.empty_like(layer.b))

    def call() -> Any:
        layer.forward(x, out=y)
        return layer.backward(dy, out=out), layer.dW

    return call


def functions(x: Any, W: Any, b: Any, dy: Any) -> Call:
    """Make the function that calls `affine_vjp` and what it returned."""

    def call() -> Any:
        _, vjp = affine_vjp(x, W, b)
        return vjp(dy)

    return call


def numpy_rows() -> list[Row]:
    """Every spelling of one small layer, over the classic class doing the same work."""
    x, tensor, vector, W, b, dy = random_arrays((1, 8), (1, 2, 4), (8,), (8, 8), (8,), (1, 8))
    classic, layer = peers.Classic(W, b), AffineLayer(W, b)
    wide_W, wide_b, wide_dy = (array.astype(np.float64) for array in (W, b, dy))
    dy_of_vector = dy[0]

    def classic_vector() -> Any:
        classic_of_rows.forward(vector[None, :])
        return classic_of_rows.backward(dy_of_vector[None, :])[0], classic_of_rows.dW

    classic_of_rows, once, sums = peers.Classic(W, b), AffineLayer(W, b), AffineLayer(W, b)
    once.forward(x)
    sums.forward(x)
    over_classic = forward_backward(classic, x, dy)
    over_classic_tensor = forward_backward(peers.Classic(W, b), tensor, dy)
    mixed = forward_backward(AffineLayer(wide_W, wide_b), x, wide_dy)
    over_classic_mixed = forward_backward(peers.Classic(wide_W, wide_b), x, wide_dy)
    both = "forward + backward"
    spelled = [
        Row(
            f"{both}, n_batch_axes={k}", SMALL, CLASSIC, 1.05,
            forward_backward(AffineLayer(W, b, n_batch_axes=k), x, dy), over_classic,
        )
        for k in (1, -1)
    ]  # fmt: skip
    return [
        Row(both, SMALL, CLASSIC, 1.05, forward_backward(layer, x, dy), over_classic),
        *spelled,
        Row(
            f"{both}, x of shape (1, 2, 4)", SMALL, CLASSIC, 1.35,
            forward_backward(AffineLayer(W, b), tensor, dy), over_classic_tensor,
        ),
        Row(
            f"{both}, x of shape (8,)", SMALL, f"{CLASSIC}, x[None, :]", 1.35,
            forward_backward(AffineLayer(W, b), vector, dy_of_vector), classic_vector,
        ),
        Row(
            f"{both}, out=", SMALL, CLASSIC, 1.8,
            forward_backward_into_buffers(AffineLayer(W, b), x, dy), over_classic,
        ),
        Row(
            f"{both}, out=, x of shape (1, 2, 4)", SMALL, CLASSIC, 2.3,
            forward_backward_into_buffers(AffineLayer(W, b), tensor, dy), over_classic_tensor,
        ),
        Row(f"{both}, x in float32, W and b in float64", SMALL, f"{CLASSIC}, the same mix", 2.5, mixed,
            over_classic_mixed),
        Row(
            "backward(accumulate=True)", SMALL, "backward", 2.0,
            lambda: sums.backward(dy, accumulate=True), lambda: once.backward(dy),
        ),
    ]  # fmt: skip


def torch_rows() -> list[Row]:
    """Functions and layer on torch, over its own layer and autograd."""
    import torch

    rows = []
    for (N, n, m), at_most in ((SMALL, 0.45), ((32, 64, 64), 0.6)):
        x, W, b, dy = map(torch.from_numpy, random_arrays((N, n), (n, m), (m,), (N, m)))
        autograd = forward_backward(peers.torch_module(W, b), x, dy)
        layer = forward_backward(AffineLayer(W, b), x, dy)
        rows += [
            Row("affine_vjp and vjp", (N, n, m), AUTOGRAD, at_most, functions(x, W, b, dy), autograd),
            Row("the layer's forward + backward", (N, n, m), AUTOGRAD, at_most, layer, autograd),
        ]
    return rows


def jax_rows() -> list[Row]:
    """Layer, jvp and per-sample gradients on JAX, over the same formulas compiled by hand."""
    import jax
    import jax.numpy as jnp

    def jvp(x: Any, W: Any, b: Any, x_dot: Any, W_dot: Any, b_dot: Any) -> Any:
        return x @ W + b, x_dot @ W + x @ W_dot + b_dot

    def norms_of(dy: Any, x: Any) -> Any:
        return jnp.sqrt((jnp.sum(x * x, axis=1) + 1) * jnp.sum(dy * dy, axis=1))

    def clipped(dy: Any, x: Any, max_norm: float) -> Any:
        weighted = dy * jnp.minimum(1, max_norm / norms_of(dy, x))[:, None]
        return x.T @ weighted, jnp.sum(weighted, axis=0)

    def divided(samples: Any, *, tiny: bool) -> Any:
        """Samples whose squares stay in range, and what they were divided by."""
        sizes, high = jnp.abs(samples), float(jnp.finfo(samples.dtype).max) ** 0.125
        divisors = 1.0
        if tiny:
            small = jnp.sum(jnp.where(sizes < 1, sizes, 1), axis=1, keepdims=True)
            divisors = jnp.where((small < 1 / high) & (small > 0), small, 1)
        large = jnp.sum(sizes * 2.0**-16, axis=1, keepdims=True)
        divisors = jnp.where((large > 2.0**-16 * high) & (large < jnp.inf), large, divisors)
        return samples / divisors, divisors

    def measured(dy: Any, x: Any) -> Any:
        """The norms of the gradients of divided samples, dy divided, and the divisors."""
        (x, of_x), (dy, of_dy) = divided(x, tiny=False), divided(dy, tiny=True)
        square_of_x = jnp.sum(x * x, axis=1, keepdims=True) + (1 / of_x) ** 2
        return jnp.sqrt(square_of_x) * jnp.sqrt(jnp.sum(dy * dy, axis=1, keepdims=True)), dy, of_x, of_dy

    def norms_in_range(dy: Any, x: Any) -> Any:
        norms, _, of_x, of_dy = measured(dy, x)
        return (norms * (jnp.maximum(of_x, of_dy) * 2.0**-20) * (jnp.minimum(of_x, of_dy) * 2.0**20))[:, 0]

    def clipped_in_range(dy: Any, x: Any, max_norm: float) -> Any:
        norms, dy, of_x, of_dy = measured(dy, x)
        size = of_x**0.5 * of_dy**0.5
        small, large = jnp.minimum(size, 1), jnp.maximum(size, 1)
        clips = norms * small * small > max_norm / large / large
        weights = jnp.where(clips, max_norm / jnp.where(clips, of_x, 1), of_dy)
        weights = jnp.where(norms < jnp.inf, weights, jnp.nan)
        weighted = dy / jnp.where(clips, norms, 1) * weights
        return x.T @ weighted, jnp.sum(weighted, axis=0)

    jvp_by_hand = jax.jit(jvp)
    plain = PLAIN, None, jax.jit(norms_of), jax.jit(clipped)
    in_range = BY_HAND, 1.3, jax.jit(norms_in_range), jax.jit(clipped_in_range)

    def rows_of(N: int, n: int, m: int) -> list[Row]:
        shape = (N, n, m)
        x, W, b, dy = map(jax.device_put, random_arrays((N, n), (n, m), (m,), (N, m)))
        dots = tuple(map(jax.device_put, random_arrays((N, n), (n, m), (m,))))
        rows = [
            Row(
                "affine_jvp", shape, BY_HAND, 1.3,
                lambda: affine_jvp((x, W, b), dots), lambda: jvp_by_hand(x, W, b, *dots),
            ),
        ]  # fmt: skip
        for against, at_most, norms_by_hand, clipped_by_hand in (in_range, plain):
            rows += [
                Row(
                    "per_sample_gradient_norms", shape, against, at_most,
                    lambda: per_sample_gradient_norms(dy, x, W, b), partial(norms_by_hand, dy, x),
                ),
                Row(
                    "clipped_gradients", shape, against, at_most,
                    lambda: clipped_gradients(dy, x, W, b, max_norm=22.0), partial(clipped_by_hand, dy, x, 22.0),
                ),
            ]  # fmt: skip
        return rows

    x, W, b, dy = map(jax.device_put, random_arrays((1, 8), (8, 8), (8,), (1, 8)))
    by_hand, layer = (forward_backward(make(W, b), x, dy) for make in (peers.jax_jit, AffineLayer))
    return [
        Row("the layer's forward + backward", SMALL, BY_HAND, 1.15, layer, by_hand),
        *rows_of(*SMALL),
        *rows_of(64, 32, 16),
    ]


LIBRARIES = {"numpy": numpy_rows, "torch": torch_rows, "jax": jax_rows}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def seconds(call: Call, count: int, wait: Callable[[Any], Any]) -> float:
    """How long one of `count` calls takes, the wait for the last result included."""
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / count


def measure_library(library: str, rounds: int) -> dict[str, Any]:
    """Time all rows of one library: its version, and a dictionary for each row, as JSON has them."""
    if library == "jax":
        import jax

        wait: Callable[[Any], Any] = jax.block_until_ready
    else:  # calls return when they are done
        wait = id
    rows = LIBRARIES[library]()
    counts = []
    for row in rows:
        for call in (row.ours, row.other):
            seconds(call, 100, wait)  # compiles, fills caches, and lets the processor reach its clock rate
        counts.append([max(1, int(SAMPLE / seconds(call, 20, wait))) for call in (row.ours, row.other)])
    samples: list[tuple[list[float], list[float]]] = [([], []) for _ in rows]
    for number in range(rounds):
        for row, (count, count_of_other), (ours, other) in zip(rows, counts, samples, strict=True):
            if number % 2:  # which side comes first alternates
                other.append(seconds(row.other, count_of_other, wait))
            ours.append(seconds(row.ours, count, wait))
            if not number % 2:
                other.append(seconds(row.other, count_of_other, wait))
    found = []
    for row, (ours, other) in zip(rows, samples, strict=True):
        low, ratio, high = quartiles([a / b for a, b in zip(ours, other, strict=True)])
        found.append({
            "library": library, "what": row.what, "shape": row.shape, "against": row.against, "at_most": row.at_most,
            "ratio": ratio, "ratio_low": low, "ratio_high": high,
            "seconds": statistics.median(ours), "seconds_of_other": statistics.median(other),
        })  # fmt: skip
    return {"version": importlib.metadata.version(library), "rows": found}


def measure_import(rounds: int) -> dict[str, float]:
    """Milliseconds that ``import xaffine`` takes beyond ``import numpy``: fresh processes that take turns."""

    def milliseconds(module: str) -> float:
        code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
        # Compiled sources are kept, as wherever a package is installed.
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        command = [sys.executable, "-c", code]
        process = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)  # noqa: S603
        return 1e3 * float(process.stdout)

    milliseconds("xaffine")  # compiles the sources
    numpy_alone, beyond = [], []
    for _ in range(rounds):
        numpy_alone.append(milliseconds("numpy"))
        beyond.append(milliseconds("xaffine") - numpy_alone[-1])
    low, median, high = quartiles(beyond)
    return {"at_most": 15, "numpy": statistics.median(numpy_alone), "beyond": median, "low": low, "high": high}


def measure(libraries: list[str] | None = None, rounds: int = ROUNDS) -> dict[str, Any]:
    """All figures: each library in a process of its own, since thread pools slow each other down."""
    libraries = libraries or [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "rounds": rounds,
        "versions": {},
        "rows": [],
    }
    for library in libraries:
        command = [sys.executable, __file__, "--rounds", str(rounds), "--within", library]
        process = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # noqa: S603
        its = json.loads(process.stdout)
        found["versions"][library] = its["version"]
        found["rows"] += its["rows"]
    return found | {"import": measure_import(rounds)}


def save(found: dict[str, Any]) -> None:
    """Write the figures for the page."""
    DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def section(found: dict[str, Any]) -> list[str]:
    """The lines of the page on these figures."""
    versions = ", ".join(f"{library} {version}" for library, version in found["versions"].items())
    threads = "the default number of threads" if found["threads"] is None else f"OMP_NUM_THREADS={found['threads']}"
    lines = [
        "## What one call costs",
        "",
        f"Written by `docs/benchmarks/overhead.py` (`nox -s bench`) on {found['date']}: Python {found['python']}, "
        f"{found['system']}, {found['cores']} cores, {threads}; {versions}. float32 unless the row says otherwise. "
        "The data are in [overhead.json](overhead.json). A figure is the median of the ratios within "
        f"{found['rounds']} interleaved rounds, with quartiles; bold figures are above what is to be reached.",
        "",
        "| library | what | N, n, m | against | at most | ratio (quartiles) | µs | µs of the other |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        ratio = _bold_above(row["at_most"], row["ratio"], f"{row['ratio']:.2f}")
        quartiles_of_row = f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        at_most = "-" if row["at_most"] is None else format(row["at_most"], ".2f")
        times = f"{row['seconds'] * 1e6:,.1f} | {row['seconds_of_other'] * 1e6:,.1f}"
        lines.append(
            f"| {row['library']} | {row['what']} | {', '.join(map(str, row['shape']))} | {row['against']} "
            f"| {at_most} | {ratio} {quartiles_of_row} | {times} |"
        )
    imported = found["import"]
    beyond = _bold_above(imported["at_most"], imported["beyond"], f"{imported['beyond']:.0f}")
    return [
        *lines,
        "",
        f"`import xaffine` takes {beyond} ms ({imported['low']:.0f} to {imported['high']:.0f}) beyond `import numpy`, "
        f"which takes {imported['numpy']:.0f} ms (at most {imported['at_most']} beyond it).",
        "",
    ]


def _bold_above(at_most: float | None, value: float, text: str) -> str:
    return text if at_most is None or value <= at_most else f"**{text}**"


def main() -> None:
    """Measure, print the table, and write the figures if they are to be saved."""
    parser = argparse.ArgumentParser(description="Measure what one call of xaffine costs on small layers.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often the two sides take turns ({ROUNDS})")
    parser.add_argument("--save", action="store_true", help=f"write {DATA.name}")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, help="by default those that are installed")
    parser.add_argument("--within", choices=LIBRARIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.within is not None:
        print(json.dumps(measure_library(options.within, options.rounds)))
        return
    found = measure(options.libraries, options.rounds)
    print("\n".join(section(found)))
    if options.save:
        save(found)


if __name__ == "__main__":
    main()
