"""Measure the layer on a Dask cluster of this machine: writes scale.json, scale.svg and scale.md.

    python docs/benchmarks/scale.py --folder /data    # a quarter of an hour, and 17 GiB of disk there
    python docs/benchmarks/scale.py --page            # the page and the plot alone

Needs ``pip install ".[cli,dask,io,plot]" distributed zarr``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import pickle
import runpy
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import dask
import dask.array as da
import distributed
import matplotlib as mpl
import numpy as np
import zarr
from distributed import Client, LocalCluster

from xaffine import AffineLayer, affine_vjp, functional
from xaffine.command.machine import describe_machine
from xaffine.kernels import kernel_of, standard

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
DATA, PAGE, PLOT = HERE / "scale.json", HERE / "scale.md", HERE / "scale.svg"
EXAMPLE = HERE.parent / "examples" / "out_of_core.py"

GiB = 1 << 30
SIZES = (1, 2, 4, 8, 16)  # GiB of x
FEATURES, OUTPUTS = 256, 8
WORKERS, MEMORY = 2, GiB
ROUNDS = 5
CHUNKS = (500, 2000)  # tiny ones, so that all of the time is overhead
WIDTHS = ((256, 8), (1024, 1024))  # n and m of what goes over the wire
FUTURE_WORKERS, FUTURE_ROWS = 1000, 10**12


@contextmanager
def cluster(workers: int) -> Iterator[Client]:
    """Fresh workers of one thread each."""
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=MEMORY,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as running,
        Client(running) as client,
    ):
        yield client


def peak_memory() -> int:
    """The most memory that this process ever had, in bytes; resource.getrusage counts that of its parent, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure_growth(folder: Path) -> list[dict[str, Any]]:
    """Seconds of a step of the example through so much of its data, and the peak memory of a worker."""
    example = runpy.run_path(str(EXAMPLE))
    path = folder / "scale.zarr"
    if not path.exists():
        with cluster(WORKERS):
            example["make"](path, SIZES[-1] * GiB, FEATURES, OUTPUTS)
    x, t = example["open_data"](path)
    layer = AffineLayer.random(FEATURES, OUTPUTS, seed=0)
    rows = []
    for turn in range(ROUNDS):
        for size in SIZES:
            N = len(x) * size // SIZES[-1]
            with cluster(WORKERS) as client:
                start = time.perf_counter()
                client.gather(client.compute(example["loss_and_gradients"](x[:N], t[:N], layer)))
                seconds = time.perf_counter() - start
                peak = max(client.run(peak_memory).values())
            rows.append({"turn": turn, "GiB": size, "N": N, "seconds": seconds, "peak": peak})
            print(rows[-1], flush=True)
    return rows


def small_backward(chunks: int) -> tuple[da.Array, ...]:
    """A forward and the gradients by W and b, on many chunks without much to compute."""
    x = da.ones((chunks * 8, 8), chunks=(8, 8), dtype="f4")
    y, vjp = affine_vjp(x, *(da.from_array(np.ones(shape, "f"), chunks=-1) for shape in ((8, 4), 4)))
    return vjp(y, wrt=("W", "b"))[1:]


def measure_overhead() -> dict[str, Any]:
    """What one chunk costs beside its products: with the kernel for Dask, and with the standard one."""
    found: dict[str, Any] = {}
    ways = {"dask": kernel_of, "standard": lambda *_: standard}
    for name, way in ways.items():
        with mock.patch.object(functional, "kernel_of", way):
            start = time.perf_counter()
            graph = dict(dask.optimize(*small_backward(CHUNKS[-1]))[0].dask)
            building = time.perf_counter() - start
        found[name] = {
            "tasks": len(graph) / CHUNKS[-1],
            "bytes": len(pickle.dumps(graph)) / CHUNKS[-1],
            "build": building / CHUNKS[-1],
            "run": [],
        }
    with cluster(WORKERS) as client:
        for turn in range(ROUNDS + 1):
            for name, way in ways.items():
                seconds: list[float] = []
                for chunks in CHUNKS:
                    with mock.patch.object(functional, "kernel_of", way):
                        arrays = small_backward(chunks)
                    start = time.perf_counter()
                    client.gather(client.compute(arrays))
                    seconds.append(time.perf_counter() - start)
                if turn:  # the first one warms up
                    found[name]["run"].append((seconds[1] - seconds[0]) / (CHUNKS[1] - CHUNKS[0]))
            print(turn, {name: each["run"][-1:] for name, each in found.items()}, flush=True)
    return found


def bytes_sent(dask_worker: Any) -> int:
    """What a worker has sent to others."""
    return int(dask_worker.transfer_outgoing_bytes_total)


def measure_wire() -> list[dict[str, Any]]:
    """Bytes between workers in one backward over 200 chunks, and the peak memory of a worker."""
    rows = []
    for workers in (2, 4):
        for n, m in WIDTHS:
            chunks = 200
            x = da.random.default_rng(0).standard_normal((chunks * 16, n), chunks=(16, n), dtype="f4")
            W, b = (da.from_array(np.ones(shape, "f"), chunks=-1) for shape in ((n, m), m))
            with cluster(workers) as client:
                before = max(client.run(peak_memory).values())
                y, vjp = affine_vjp(x, W, b)
                client.gather(client.compute(vjp(y, wrt=("W", "b"))[1:]))
                sent, peak = sum(client.run(bytes_sent).values()), max(client.run(peak_memory).values())
            partial = 4 * (n + 1) * m
            rows.append(
                {"workers": workers, "n": n, "m": m, "chunks": chunks, "sent": sent, "partial": partial,
                 "held": (peak - before) / partial}
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def measure(folder: Path) -> dict[str, Any]:
    """All figures."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **describe_machine(),
        "dask": dask.__version__,
        "distributed": distributed.__version__,
        "zarr": zarr.__version__,
        "overhead": measure_overhead(),
        "wire": measure_wire(),
        "growth": measure_growth(folder),
    }


def by_size(found: dict[str, Any], key: str) -> dict[int, float]:
    """The median over the rounds."""
    return {size: statistics.median(row[key] for row in found["growth"] if row["GiB"] == size) for size in SIZES}


def project(found: dict[str, Any]) -> dict[str, float]:
    """What so many workers and rows would need, from the figures of this machine."""
    seconds = by_size(found, "seconds")
    rate = SIZES[-1] * GiB / seconds[SIZES[-1]] / WORKERS  # bytes of x that a worker takes a second
    step = 4 * FEATURES * FUTURE_ROWS / FUTURE_WORKERS / rate
    overhead = statistics.median(found["overhead"]["dask"]["run"])
    chunks = step / 10 / overhead  # the scheduler may take a tenth of the step
    rows = FUTURE_ROWS / chunks
    wire = max(row["sent"] / row["chunks"] / row["partial"] for row in found["wire"] if row["workers"] == 4)
    return {
        "rate": rate,
        "step": step,
        "chunks": chunks,
        "chunk": rows * 4 * FEATURES,
        "tasks": chunks * found["overhead"]["dask"]["tasks"],
        "graph": chunks * found["overhead"]["dask"]["bytes"],
        "depth": math.ceil(math.log(chunks, 4)),
        "wire": wire * chunks * 4 * (FEATURES + 1) * OUTPUTS,
        "broadcast": FUTURE_WORKERS * 4 * (FEATURES + 1) * OUTPUTS,
    }


def write_page(found: dict[str, Any]) -> str:
    """The page, from the figures."""
    seconds, peaks, small = by_size(found, "seconds"), by_size(found, "peak"), SIZES[0]
    own, plain = found["overhead"]["dask"], found["overhead"]["standard"]
    ratio = statistics.median(a / b for a, b in zip(own["run"], plain["run"], strict=True))
    future = project(found)
    lines = [
        "# On a Dask cluster",
        "",
        f"Written by `docs/benchmarks/scale.py` on {found['date']}: xaffine {found['xaffine']}, "
        f"Python {found['python']}, {found['system']}, {found['cores']} cores; {found['blas']}; dask {found['dask']}, "
        f"distributed {found['distributed']}, zarr {found['zarr']}. The data are in [scale.json](scale.json). Medians "
        f"of {ROUNDS} rounds. Scheduler, client and {WORKERS} workers share the cores of one machine.",
        "",
        "![Peak memory of a worker and time of a step, against the size of x](scale.svg)",
        "",
        "## Memory and time against N",
        "",
        f"One step of `docs/examples/out_of_core.py`, the loss and the gradients by W and b: float32, n = {FEATURES}, "
        f"m = {OUTPUTS}, x in a Zarr file without compression, chunks of 32 MiB, workers of one thread that may take "
        f"{MEMORY // 2**20} MiB each. The memory is all that a worker ever took, Python and its libraries included.",
        "",
        "| x | N | seconds | GiB a second | time over N times the first | peak memory of a worker | over the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        N = next(row["N"] for row in found["growth"] if row["GiB"] == size)
        lines.append(
            f"| {size} GiB | {N:,} | {seconds[size]:.2f} | {size / seconds[size]:.2f} "
            f"| {seconds[size] / seconds[small] * small / size:.2f} "
            f"| {peaks[size] / 2**20:.0f} MiB | {peaks[size] / peaks[small]:.2f} |"
        )
    lines += [
        "",
        "To be reached from the first to the last row: memory at most 1.2 and under 1 GiB, time 0.9 to 1.1.",
        "",
        "## What a chunk costs beside its products",
        "",
        f"Forward and the gradients by W and b on chunks of 8 rows: the time of {CHUNKS[1]:,} chunks less that of "
        f"{CHUNKS[0]:,}, for each chunk more.",
        "",
        "| kernel | tasks | bytes of the graph | building the graph | running |",
        "|---|---|---|---|---|",
    ]
    for name, each in found["overhead"].items():
        run = sorted(each["run"])
        lines.append(
            f"| {name} | {each['tasks']:.2f} | {each['bytes']:,.0f} | {each['build'] * 1e6:.0f} µs "
            f"| {statistics.median(run) * 1e3:.2f} ms ({run[0] * 1e3:.2f} to {run[-1] * 1e3:.2f}) |"
        )
    lines += [
        "",
        f"The kernel for Dask takes {ratio:.2f} of the time of the standard one. A chunk should take many times its "
        "overhead to compute: 32 MiB and more.",
        "",
        "## What goes over the wire, and what is held",
        "",
        "A backward over 200 chunks of 16 rows. A partial sum is [dW; db] of one chunk, 4 (n + 1) m bytes. What is "
        "held is the growth of a worker's peak memory, in partial sums: the tree is walked depth first, so that it "
        "does not grow with the number of chunks.",
        "",
        "| workers | n, m | partial sum | sent between workers | partial sums sent a chunk | held at the peak |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["wire"]:
        each = row["sent"] / row["chunks"] / row["partial"]
        held = f"{row['held']:.1f}" if row["partial"] > 2**20 else "less than the noise"
        lines.append(
            f"| {row['workers']} | {row['n']}, {row['m']} | {row['partial'] / 2**10:,.0f} KiB "
            f"| {row['sent'] / 2**20:,.1f} MiB | {each:.2f} | {held} |"
        )
    lines += [
        "",
        f"## On paper: {FUTURE_WORKERS:,} workers and 10¹² rows",
        "",
        f"Nothing of this was run. With n = {FEATURES} and m = {OUTPUTS}, x is "
        f"{4 * FEATURES * FUTURE_ROWS / 1e15:.2f} PB. From the figures above:",
        "",
        f"- A worker that reads and computes {future['rate'] / 2**30:.2f} GiB of x a second, as one of these does, "
        f"needs {future['step'] / 60:,.0f} minutes for its thousandth: that is the time of a step, if storage keeps "
        f"up with {FUTURE_WORKERS * future['rate'] / 2**30:,.0f} GiB a second.",
        "- The scheduler is one process. For it to take a tenth of a step there may be "
        f"{future['chunks']:,.0f} chunks, of {future['chunk'] / 2**20:,.0f} MiB: {future['tasks']:,.0f} tasks, and a "
        f"graph of {future['graph'] / 2**20:,.0f} MiB. More memory for each worker and larger chunks take load off it.",
        f"- The tree that adds up dW and db four at a time is {future['depth']} levels deep, and sends at most "
        f"{future['wire'] / 2**30:,.1f} GiB between workers in a step, in partial sums of "
        f"{4 * (FEATURES + 1) * OUTPUTS / 2**10:.0f} KiB; W and b go to all workers, "
        f"{future['broadcast'] / 2**20:.0f} MiB in all. With n = m = 4096 a partial sum is 64 MiB, and this is what "
        "limits: then take fewer, larger chunks, or JAX, whose all-reduce sends twice the size of W for each worker, "
        "whatever the number of rows.",
        "",
    ]
    return "\n".join(lines)


def draw(found: dict[str, Any], file: Path) -> None:
    """Draw memory and time against the size of x."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    seconds, peaks = by_size(found, "seconds"), by_size(found, "peak")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, key, scale, medians in ((left, "peak", 2**20, peaks), (right, "seconds", 1, seconds)):
        axis.plot(
            [row["GiB"] for row in found["growth"]], [row[key] / scale for row in found["growth"]], "o",
            color="tab:blue", alpha=0.4, markersize=4,
        )  # fmt: skip
        axis.plot(SIZES, [value / scale for value in medians.values()], color="tab:blue", label="median")
        axis.set(xscale="log", xlabel="x in GiB", xticks=SIZES, xticklabels=SIZES)
        axis.minorticks_off()
    left.axhline(MEMORY / 2**20, color="gray", linestyle="--", label="what a worker may take")
    left.set(ylabel="peak memory of a worker in MiB", ylim=(0, None))
    right.plot(SIZES, [seconds[SIZES[0]] * size for size in SIZES], color="gray", linestyle="--", label="linear")
    right.set(ylabel="seconds for a step", yscale="log")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize="small")
    with mpl.rc_context({"svg.hashsalt": "xaffine"}):  # the same drawing for the same figures
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure, unless the page alone is asked for, and write."""
    parser = argparse.ArgumentParser(description="Measure the layer on a Dask cluster of this machine.")
    parser.add_argument("--folder", type=Path, help="where to write 17 GiB of data, or where they are from before")
    parser.add_argument("--page", action="store_true", help="write the page and the plot alone")
    options = parser.parse_args()
    if options.page:
        found = json.loads(DATA.read_text(encoding="utf-8"))
    elif options.folder is None:
        parser.error("name a --folder for the data")
    else:
        found = measure(options.folder)
        DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, PLOT)
    PAGE.write_text(write_page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
