"""Measure the layer on a Dask cluster of this machine: writes scale.json, scale.svg and scale.md.

    python docs/benchmarks/scale.py --folder /data    # a quarter of an hour, and 17 GiB of disk there
    python docs/benchmarks/scale.py --page            # the page and the plot alone

Needs ``pip install ".[cli,dask,io,plot]" distributed zarr``.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import pickle
import runpy
import shutil
import statistics
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import dask
import dask.array as da
import distributed
import matplotlib as mpl
import numpy as np
import zarr
from distributed import Client

from xaffine import AffineLayer, affine_vjp
from xaffine._command.machine import describe_machine
from xaffine.backends import Backend
from xaffine.backends.dask import Dask

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
FUTURE_WORKERS, FUTURE_ROWS, FUTURE_CHUNK = 1000, 10**12, GiB


@contextmanager
def cluster(workers: int) -> Iterator[Client]:
    """Fresh workers of one thread each."""
    new_cluster = runpy.run_path(str(EXAMPLE))["new_cluster"]
    with new_cluster(n_workers=workers, memory_limit=MEMORY, host="127.0.0.1") as running, Client(running) as client:
        yield client


def peak_memory() -> int:
    """The most memory that this process ever had, in bytes; resource.getrusage counts that of its parent, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def data_of(folder: Path, size: int) -> Path:
    """So many GiB of the example's data: the largest file, or hard links to the first chunks of that."""
    path = folder / f"{size}.zarr"
    if not path.exists() and size == SIZES[-1]:
        with cluster(WORKERS):
            runpy.run_path(str(EXAMPLE))["make"](path, size * GiB, FEATURES, OUTPUTS)
    elif not path.exists():
        largest = data_of(folder, SIZES[-1])
        shutil.copytree(largest, path, copy_function=lambda a, b: (shutil.copy if "json" in a else os.link)(a, b))
        for _, array in zarr.open_group(path).arrays():
            array.resize((array.shape[0] * size // SIZES[-1], array.shape[1]))
    return path


def measure_growth(folder: Path) -> list[dict[str, Any]]:
    """Seconds of a step of the example through so much data, and the peak memory of a worker."""
    example = runpy.run_path(str(EXAMPLE))
    layer = AffineLayer.random(FEATURES, OUTPUTS, seed=0)
    rows = []
    for turn, size in itertools.product(range(ROUNDS), SIZES):
        x, t = example["open_data"](data_of(folder, size))
        with cluster(WORKERS) as client:
            client.gather(client.compute(example["loss_and_gradients"](x[:4], t[:4], layer)))  # imports what it needs
            start = time.perf_counter()
            client.gather(client.compute(example["loss_and_gradients"](x, t, layer)))
            seconds = time.perf_counter() - start
            peak = max(client.run(peak_memory).values())
        rows.append({"turn": turn, "GiB": size, "N": len(x), "seconds": seconds, "peak": peak})
        print(rows[-1], flush=True)
    return rows


def small_step(chunks: int) -> list[da.Array]:
    """A step of the example on many chunks without much to compute."""
    x, t = (da.ones((chunks * 8, width), chunks=(8, width), dtype="f4") for width in (8, 4))
    step = runpy.run_path(str(EXAMPLE))["loss_and_gradients"]
    return list(step(x, t, AffineLayer.random(8, 4, seed=0)))


def as_the_standard_says() -> AbstractContextManager[Any]:
    """Within it, arrays of Dask take the primitives of the standard, and Dask calls a step as the standard does."""
    return mock.patch.multiple(Dask, types=frozenset(), run=Backend.run)


def measure_overhead() -> dict[str, Any]:
    """What one chunk costs beside its products: with the file for Dask, and with the primitives of the standard."""
    ways = {"dask": nullcontext, "standard": as_the_standard_says}
    found: dict[str, Any] = {name: {"run": [], "scheduler": []} for name in ways}
    with cluster(WORKERS) as client:
        for turn, (name, way) in itertools.product(range(ROUNDS + 1), ways.items()):
            clocks: dict[str, list[float]] = {"run": [], "scheduler": []}
            for chunks in CHUNKS:
                with way():
                    arrays = small_step(chunks)
                before = time.perf_counter(), time.process_time()  # this process has client and scheduler
                client.gather(client.compute(arrays))
                clocks["run"].append(time.perf_counter() - before[0])
                clocks["scheduler"].append(time.process_time() - before[1])
            for key, (few, many) in clocks.items():
                if turn:  # the first one warms up
                    found[name][key].append((many - few) / (CHUNKS[1] - CHUNKS[0]))
            if turn == ROUNDS:
                start = time.perf_counter()
                graph = {key: task for array in dask.optimize(*arrays) for key, task in array.dask.items()}
                building = time.perf_counter() - start
                of_all = {"tasks": len(graph), "bytes": len(pickle.dumps(graph)), "build": building}
                found[name] |= {key: value / CHUNKS[1] for key, value in of_all.items()}
            print(turn, name, clocks, flush=True)
    return found


def bytes_sent(dask_worker: Any) -> int:
    """What a worker has sent to others."""
    return int(dask_worker.transfer_outgoing_bytes_total)


def measure_wire() -> list[dict[str, Any]]:
    """Bytes between workers in one backward over many chunks, and what a worker holds of its partial sums."""
    rows = []
    for (n, m), workers, chunks in itertools.product(WIDTHS, (2, 4), (100, 400, 1600)):
        W, b = (da.from_array(np.ones(shape, "f"), chunks=-1) for shape in ((n, m), m))

        def backward(W: da.Array, b: da.Array, chunks: int) -> list[da.Array]:
            x = da.random.default_rng(0).standard_normal((chunks * 16, len(W)), chunks=(16, -1), dtype="f4")
            y, vjp = affine_vjp(x, W, b)
            return list(vjp(y, wrt=("W", "b"))[1:])

        with cluster(workers) as client:
            client.gather(client.compute(backward(W, b, workers)))  # imports what it needs
            before = max(client.run(peak_memory).values()), sum(client.run(bytes_sent).values())
            client.gather(client.compute(backward(W, b, chunks)))
            after = max(client.run(peak_memory).values()), sum(client.run(bytes_sent).values())
        partial = 4 * (n + 1) * m
        held, sent = (after[0] - before[0]) / partial, after[1] - before[1]
        rows.append(
            {"workers": workers, "n": n, "m": m, "chunks": chunks, "sent": sent, "partial": partial, "held": held}
        )
        print(rows[-1], flush=True)
    return rows


def measure(folder: Path, found: dict[str, Any]) -> None:
    """Fill in all figures."""
    found |= {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **describe_machine(),
        "dask": dask.__version__,
        "distributed": distributed.__version__,
        "zarr": zarr.__version__,
    }
    found["overhead"] = measure_overhead()
    found["wire"] = measure_wire()
    found["growth"] = measure_growth(folder)


def by_size(found: dict[str, Any], key: str) -> dict[int, float]:
    """The median over the rounds."""
    return {size: statistics.median(row[key] for row in found["growth"] if row["GiB"] == size) for size in SIZES}


def project(found: dict[str, Any]) -> dict[str, float]:
    """What so many workers and rows would need, from the figures of this machine."""
    own = found["overhead"]["dask"]
    rate = SIZES[-1] * GiB / by_size(found, "seconds")[SIZES[-1]] / WORKERS  # bytes of x that a worker takes a second
    x = 4 * FEATURES * FUTURE_ROWS
    step, chunks, partial = x / FUTURE_WORKERS / rate, x / FUTURE_CHUNK, 4 * (FEATURES + 1) * OUTPUTS
    scheduler = statistics.median(own["scheduler"])
    sent = max(row["sent"] / row["chunks"] / row["partial"] for row in found["wire"])
    return {
        "x": x,
        "rate": rate,
        "step": step,
        "chunks": chunks,
        "tasks": chunks * own["tasks"],
        "graph": chunks * own["bytes"],
        "scheduler": chunks * scheduler,
        "tenth": 10 * x * scheduler / step,
        "depth": math.ceil(math.log(chunks, 4)),
        "partial": partial,
        "sent": sent * chunks * partial,
        "broadcast": FUTURE_WORKERS * partial,
    }


def line_through(seconds: dict[int, float]) -> tuple[float, float]:
    """a and b of a + b · size, with the least relative errors."""
    sizes, times = np.array(list(seconds)), np.array(list(seconds.values()))
    b, a = np.polyfit(sizes, times, 1, w=1 / times)
    return float(a), float(b)


def write_page(found: dict[str, Any]) -> str:
    """The page, from the figures."""
    seconds, peaks, small = by_size(found, "seconds"), by_size(found, "peak"), SIZES[0]
    own, plain = found["overhead"]["dask"], found["overhead"]["standard"]
    ratio = statistics.median(a / b for a, b in zip(own["run"], plain["run"], strict=True))
    future = project(found)
    start, each_size = line_through(seconds)
    many = max(found["wire"], key=lambda row: (row["chunks"], row["partial"], row["held"]))
    lines = [
        "# On a Dask cluster",
        "",
        f"Written by `docs/benchmarks/scale.py` on {found['date']}: xaffine {found['xaffine']}, "
        f"Python {found['python']}, {found['system']}, {found['cores']} cores; {found['blas']}; dask {found['dask']}, "
        f"distributed {found['distributed']}, zarr {found['zarr']}. The data are in [scale.json](scale.json). Medians "
        f"of {ROUNDS} rounds. Scheduler, client and {WORKERS} workers share the cores of one machine.",
        "",
        f"![Two plots against the size of x, {small} to {SIZES[-1]} GiB. The peak memory of a worker stays near "
        f"{peaks[small] / 2**20:.0f} MiB, the time of a step grows in a line from {seconds[small]:.1f} to "
        f"{seconds[SIZES[-1]]:.1f} s](scale.svg)",
        "",
        "## Memory and time against N",
        "",
        f"One step of `docs/examples/out_of_core.py`, the loss and the gradients by W and b: float32, n = {FEATURES}, "
        f"m = {OUTPUTS}, x in a Zarr file without compression, chunks of 32 MiB, workers of one thread that may take "
        f"{MEMORY // 2**20} MiB each. The memory is all that a worker ever took, Python and its libraries included.",
        "",
        "| x | N | seconds | GiB a second | over the line | peak memory of a worker | over the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        N = next(row["N"] for row in found["growth"] if row["GiB"] == size)
        lines.append(
            f"| {size} GiB | {N:,} | {seconds[size]:.2f} | {size / seconds[size]:.2f} "
            f"| {seconds[size] / (start + each_size * size):.2f} "
            f"| {peaks[size] / 2**20:.0f} MiB | {peaks[size] / peaks[small]:.2f} |"
        )
    lines += [
        "",
        f"The line is {start:.2f} s to begin with and {each_size:.2f} s for each GiB. To be reached: time within 10 % "
        "of a line, memory at most 1.2 of the first and under 1 GiB.",
        "",
        "## What a chunk costs beside its products",
        "",
        f"The same step on chunks of 8 rows: the time of {CHUNKS[1]:,} chunks less that of {CHUNKS[0]:,}, for each "
        "chunk more.",
        "",
        "| primitives | tasks | bytes of the graph | building the graph | running | of client and scheduler |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in found["overhead"].items():
        run = sorted(each["run"])
        lines.append(
            f"| {name} | {each['tasks']:.2f} | {each['bytes']:,.0f} | {each['build'] * 1e6:.0f} µs "
            f"| {statistics.median(run) * 1e3:.2f} ms ({run[0] * 1e3:.2f} to {run[-1] * 1e3:.2f}) "
            f"| {statistics.median(each['scheduler']) * 1e3:.2f} ms |"
        )
    lines += [
        "",
        f"With `xaffine/backends/dask.py` a chunk takes {ratio:.2f} of the time that it takes with the primitives of "
        "the standard. A chunk should take many times its overhead to compute: 32 MiB and more.",
        "",
        "## What goes over the wire, and what is held",
        "",
        "A backward over chunks of 16 rows. A partial sum is [dW; db] of one chunk, 4 (n + 1) m bytes. What is held is "
        "the growth of a worker's peak memory, in partial sums; products in the making and what Dask itself holds are "
        f"in it. The tree is walked depth first: of {many['chunks']:,} partial sums at most {many['held']:.0f} are "
        "held.",
        "",
        "| n, m | partial sum | workers | chunks | sent between workers | partial sums sent a chunk | held at peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["wire"]:
        each = row["sent"] / row["chunks"] / row["partial"]
        held = f"{row['held']:.1f}" if row["partial"] > 2**20 else "less than the noise"
        lines.append(
            f"| {row['n']}, {row['m']} | {row['partial'] / 2**10:,.0f} KiB | {row['workers']} | {row['chunks']:,} "
            f"| {row['sent'] / 2**20:,.1f} MiB | {each:.2f} | {held} |"
        )
    lines += [
        "",
        f"## On paper: {FUTURE_WORKERS:,} workers and 10¹² rows",
        "",
        f"Nothing of this was run. With n = {FEATURES} and m = {OUTPUTS}, x is {future['x'] / 1e15:.2f} PB. From the "
        "figures above:",
        "",
        f"- *Time.* A worker that reads and computes {future['rate'] / GiB:.2f} GiB of x a second, as one of these "
        f"does, needs {future['step'] / 60:.0f} minutes for its share, if storage keeps up with "
        f"{FUTURE_WORKERS * future['rate'] / GiB:.0f} GiB a second. That is a step.",
        f"- *Scheduler.* It is one process. Chunks of {FUTURE_CHUNK // GiB} GiB are {future['chunks']:,.0f}, "
        f"{future['tasks']:,.0f} tasks and a graph of {future['graph'] / 2**20:,.0f} MiB, which keep it busy for "
        f"{future['scheduler'] / 60:.0f} minutes: it is what limits. For it to take a tenth of the step, "
        f"chunks would have to be of {future['tenth'] / GiB:.0f} GiB.",
        f"- *Wire.* The tree that adds up dW and db four at a time is {future['depth']} levels deep, and sends some "
        f"{future['sent'] / GiB:.1f} GiB between workers in a step, in partial sums of {future['partial'] / 2**10:.0f} "
        f"KiB. W and b go to all workers, {future['broadcast'] / 2**20:.0f} MiB in all.",
        f"- *Wider layers.* With n = m = 4096 a partial sum is 64 MiB, and the same tree would send "
        f"{future['sent'] / future['partial'] * 4 * 4097 * 4096 / 2**40:.0f} TiB. There an all-reduce is the better "
        "engine, as JAX compiles it: twice the size of dW for each process, whatever the number of rows.",
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
        found = {}
        try:
            measure(options.folder, found)
        except KeyboardInterrupt:
            unfinished = DATA.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            parser.exit(130, f"interrupted; what was measured is in {unfinished}\n")
        DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, PLOT)
    PAGE.write_text(write_page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
