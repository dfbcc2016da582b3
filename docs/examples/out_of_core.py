"""Train an affine layer on data that do not fit into memory, on a Dask cluster.

    pip install ".[dask,io,plot]" distributed zarr
    python docs/examples/out_of_core.py data.zarr --make 4GiB     # writes data to learn from, and learns from them
    python docs/examples/out_of_core.py data.zarr --epochs 20     # goes on from the weights that were saved

The cluster is one of this machine, or the one at ``--scheduler ADDRESS``, whose workers must see the files, too. Each
step reads all of x once, a chunk at a time, and holds no more than a few chunks of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
import zarr
from dask.utils import format_bytes, parse_bytes
from distributed import Client, LocalCluster, progress
from distributed.scheduler import KilledWorker, NoValidWorkerError, NoWorkerError

from xaffine import AffineLayer, affine, affine_vjp

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 32 << 20  # bytes of x in one
NOISE = 0.1
DTYPES = ("float32", "float64")
NOBODY = "60s"  # without any worker, until a computation is given up
IGNORE_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # what workers run first


def make(path: Path, size: int, n: int, m: int, *, seed: int = 0) -> None:
    """Write x (N, n), of about so many bytes, and t = x W + b + noise (N, m) as float32 to a Zarr group."""
    rng = np.random.default_rng(seed)
    W, b = (da.from_array(rng.standard_normal(shape, dtype="f"), chunks=-1) for shape in ((n, m), m))
    N, rows = max(1, size // (4 * n)), max(1, CHUNK // (4 * n))
    random = da.random.default_rng(seed)
    x, noise = (random.standard_normal((N, k), chunks=(rows, -1), dtype="f") for k in (n, m))
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    group = zarr.open_group(unfinished, mode="w")
    arrays = {"x": x, "t": affine(x, W, b) + np.float32(NOISE) * noise}
    files = [
        group.create_array(name, shape=array.shape, chunks=array.chunksize, dtype=array.dtype, compressors=None)
        for name, array in arrays.items()
    ]
    da.store(list(arrays.values()), files, lock=False)
    unfinished.rename(path)


def open_data(path: Path) -> tuple[da.Array, da.Array]:
    """x and t of a Zarr group, lazily; a ValueError says what is wrong with them."""
    try:
        group = zarr.open_group(path, mode="r")
        arrays = {name: group.get(name) for name in ("x", "t")}
    except (OSError, ValueError, zarr.errors.BaseZarrError) as error:
        msg = f"{path} is no Zarr group ({error}): write one with --make SIZE, or name another"
        raise ValueError(msg) from None
    for name, array in arrays.items():
        if not isinstance(array, zarr.Array) or array.ndim != 2 or array.dtype not in DTYPES:
            msg = f"{path} must hold x (N, n) and t (N, m) in {' or '.join(DTYPES)}; its {name} is {array}"
            raise ValueError(msg)
        if array.nchunks_initialized < array.nchunks:  # Zarr would read zeros in their place
            msg = (
                f"{path} is truncated: {array.nchunks_initialized} of {array.nchunks} chunks of {name} are there. If "
                f"the others are all zeros, write them, too (write_empty_chunks in Zarr's configuration)"
            )
            raise ValueError(msg)
    x, t = (da.from_array(group[name], chunks=group[name].chunks) for name in ("x", "t"))
    if not len(x) == len(t) > 0 or x.dtype != t.dtype:
        msg = f"x and t must go together, and have rows: x is {x.dtype} {x.shape}, t is {t.dtype} {t.shape}"
        raise ValueError(msg)
    return x, t


def loss_and_gradients(x: da.Array, t: da.Array, layer: AffineLayer) -> tuple[da.Array, da.Array, da.Array]:
    """The mean of |x W + b - t|² / 2 and its gradients by W and b, all lazy."""
    y, vjp = affine_vjp(x, *(da.from_array(parameter, chunks=-1) for parameter in (layer.W, layer.b)))
    error = y - t
    _, dW, db = vjp(error / len(x), wrt=("W", "b"))
    loss = (error**2).sum(dtype="float64", split_every=16) / (2 * len(x))  # the 4 × 4 blocks of a level
    return loss, dW, db


def train(client: Client, x: da.Array, t: da.Array, layer: AffineLayer, *, rate: float) -> Iterator[float]:
    """Take steps of gradient descent, each through all data; yield the loss before each."""
    while True:
        futures = client.compute(loss_and_gradients(x, t, layer))
        progress(futures, notebook=False)
        try:
            loss, dW, db = client.gather(futures)
        except (ValueError, RuntimeError) as error:
            msg = f"a step failed, perhaps at a chunk that was cut short ({error}): write the data again"
            raise ValueError(msg) from error
        layer.W -= rate * dW
        layer.b -= rate * db
        yield float(loss)


def start_layer(weights: Path, n: int, m: int, dtype: Any) -> tuple[AffineLayer, list[float]]:
    """The layer that was saved and its losses so far, or a new one."""
    if not weights.exists():
        return AffineLayer.random(n, m, dtype=str(dtype), seed=0), []
    layer, history = AffineLayer.load(weights), weights.with_suffix(".json")
    if layer.W.shape != (n, m) or layer.b is None:
        msg = f"{weights} holds {layer}, and the data need W ({n}, {m}) and b: name other weights, or other data"
        raise ValueError(msg)
    return layer, json.loads(history.read_text(encoding="utf-8")) if history.exists() else []


def save(weights: Path, layer: AffineLayer, losses: list[float]) -> None:
    """Save what the next run goes on from, each file in one step."""
    layer.save(weights)
    unfinished = weights.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(losses), encoding="utf-8")
    unfinished.replace(weights.with_suffix(".json"))


@contextmanager
def remembered_interrupts() -> Iterator[list[int]]:
    """Hand out the list of interrupts so far: Python prints and drops one that comes while it deletes an object."""
    interrupts: list[int] = []
    report = sys.unraisablehook

    def interrupt(number: int, _: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    def report_others(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            report(dropped)

    handler = signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = report_others
    try:
        yield interrupts
    finally:
        sys.unraisablehook = report
        signal.signal(signal.SIGINT, handler)


@contextmanager
def new_cluster(**limits: Any) -> Iterator[LocalCluster]:
    """A cluster of this machine. Ctrl-C is for this process alone, and waits until the cluster stands."""
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        with dask.config.set({"distributed.worker.preload": [IGNORE_INTERRUPTS]}):
            cluster = LocalCluster(threads_per_worker=1, dashboard_address="127.0.0.1:0", **limits)
    finally:
        signal.signal(signal.SIGINT, handler)
    with cluster:
        if interrupts:
            raise KeyboardInterrupt
        yield cluster


def connect(address: str, patience: float) -> Client:
    """A client of a scheduler that answers and has workers in so many seconds; a TimeoutError says if it does not."""

    async def knock() -> None:
        async with Client(address, asynchronous=True, timeout=patience):
            pass

    try:
        asyncio.run(asyncio.wait_for(knock(), patience))  # a client alone waits for ever for one that says nothing
        client = Client(address, timeout=patience)
        client.wait_for_workers(1, timeout=patience)
    except (TimeoutError, OSError) as error:
        msg = f"no scheduler with workers answers at {address} within {patience:g} s: is it running? ({error})"
        raise TimeoutError(msg) from error
    return client


def plot(losses: list[float], file: Path) -> None:
    """Draw the loss of each epoch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.plot(range(1, len(losses) + 1), losses, marker="o", markersize=3)
    axis.set(xlabel="epoch", ylabel="loss", yscale="log")
    figure.savefig(file)
    plt.close(figure)


def run(options: argparse.Namespace) -> None:
    """Check everything, start the cluster, train."""
    path, n, m, dtype = options.data, options.features, options.outputs, "float32"
    if options.make is None:
        x, t = open_data(path)
        n, m, dtype = x.shape[1], t.shape[1], x.dtype
    elif path.exists():
        msg = f"{path} exists: leave out --make to learn from it, or name another"
        raise ValueError(msg)
    layer, losses = start_layer(options.weights, n, m, dtype)

    with ExitStack() as stack:
        interrupts = stack.enter_context(remembered_interrupts())
        if options.scheduler is None:
            stack.enter_context(dask.config.set({"distributed.scheduler.no-workers-timeout": NOBODY}))
            limits = {"n_workers": options.workers, "memory_limit": options.memory}
            cluster = stack.enter_context(new_cluster(**limits))
            client = stack.enter_context(Client(cluster))
        else:
            client = stack.enter_context(connect(options.scheduler, options.patience))
        if options.make is not None:
            make(path, options.make, n, m)
        x, t = open_data(path)
        allowed = sum(worker["memory_limit"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())
        limit = format_bytes(allowed) if allowed else "all there is"
        print(f"x is {x.dtype} {x.shape}, {format_bytes(x.nbytes)}; all workers may take {limit}")
        steps = train(client, x, t, layer, rate=options.rate)
        for epoch in range(len(losses) + 1, options.epochs + 1):
            losses.append(next(steps))
            save(options.weights, layer, losses)
            print(f"\repoch {epoch:3d}  loss {losses[-1]:.6f}", flush=True)
            if interrupts:
                raise KeyboardInterrupt
    plot(losses, options.plot)
    print(f"weights in {options.weights}, the curve in {options.plot}")


def main() -> None:
    """Read the command line; say in one line what went wrong."""
    parser = argparse.ArgumentParser(description="Train an affine layer on data that do not fit into memory.")
    parser.add_argument("data", type=Path, help="a Zarr group with x (N, n) and t (N, m)")
    parser.add_argument("--make", type=parse_bytes, metavar="SIZE", help="write data first, with so much in x: 4GiB")
    parser.add_argument("--features", type=int, default=256, help="n of the data to write")
    parser.add_argument("--outputs", type=int, default=8, help="m of the data to write")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a running one, by default one is started here; for it to give up without workers, start it with "
        "DASK_DISTRIBUTED__SCHEDULER__NO_WORKERS_TIMEOUT=60s",
    )
    parser.add_argument("--patience", type=float, default=10, help="seconds for a running scheduler to answer")
    parser.add_argument("--workers", type=int, default=2, help="how many to start")
    parser.add_argument("--memory", default="1GiB", help="what each of them may take")
    parser.add_argument("--epochs", type=int, default=10, help="in all, with those of earlier runs")
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--weights", type=Path, default=Path("out_of_core.safetensors"))
    parser.add_argument("--plot", type=Path, default=Path("out_of_core.svg"))
    options = parser.parse_args()
    try:
        run(options)
    except (KilledWorker, NoValidWorkerError, NoWorkerError) as error:
        parser.exit(1, f"\nthe cluster lost too many workers: {error}\nstart it again with more memory for each\n")
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"\n{error}\n")
    except KeyboardInterrupt:
        saved = f"; the next run goes on from {options.weights}" if options.weights.exists() else ""
        parser.exit(130, f"\ninterrupted{saved}\n")


if __name__ == "__main__":
    main()
