"""``xaffine bench``: forward and backward beside the bare matrix products, and beside other implementations.

Each library is timed in a process of its own, ``python -m xaffine._command.bench``: the thread pools of two libraries
in one process slow each other down. Within a process all implementations take turns, round by round, so that a ratio
compares what ran in the same moments of a noisy machine.

On a GPU the device itself times what was queued (JAX has no means to ask it), once with operands that the calls before
left in its cache, and once with that cache emptied.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import re
import statistics
import sys
from collections import deque
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine import backends
from xaffine._command.clock import clock_of
from xaffine._command.files import replace_text, require_writable
from xaffine._command.machine import describe_machine
from xaffine._command.terminal import print_table, progress_bar
from xaffine.layer import AffineLayer
from xaffine.testing._lines import last_user_line
from xaffine.testing._process import WorkerError, run_worker, serve
from xaffine.testing._target import TargetError, import_target

if TYPE_CHECKING:
    from collections.abc import Callable

    from xaffine._command.clock import Clock
    from xaffine.backends import Array, Backend

__all__ = ["DESCRIPTION", "GRID", "HELP", "add_arguments", "compare", "run", "teraflops"]

HELP = "time the layer beside the bare matrix products and other implementations"
DESCRIPTION = """\
Time forward, backward, and both in a row, for a grid of shapes, beside the bare matrix products of the library into
ready memory (the limit), and beside implementations of your own. Every row is the median of interleaved rounds. TARGET
names what is called as make(W, b) with arrays of the backend, as for xaffine check, which says whether it is right."""

GRID = (
    (1, 8, 8), (32, 64, 64), (64, 512, 512), (256, 784, 100), (1024, 1024, 1024), (65536, 64, 32), (65536, 784, 10),
    (262144, 32, 32), (4096, 2048, 2048),
)  # fmt: skip

_BACKENDS = ("numpy", "torch", "jax", "cupy")  # whose products into ready memory are known here
_WHAT = {"forward": 2, "backward": 4, "both": 6}  # and how many operations it has, in units of N·n·m
_WIDEST = 18  # characters of a name in the table
_WORTH = 0.9  # of the time without buffers: where they take no more, they are recommended
_LARGE = 8192  # the square product that shows the rate of a card
_SILENCE = 600.0  # seconds without a sign of life from a process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``xaffine bench``."""
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=_BACKENDS,
        help="a process each; by default those that are here, but numpy alone with --beside",
    )
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="TARGET", help="package.module:factory or file.py:factory"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=list(GRID), metavar="N,n,m", help="by default a grid of nine"
    )
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="float32 by default")
    parser.add_argument("--device", help="one of the backend's devices, for example cuda:0; gpu is its first GPU")
    parser.add_argument("--rounds", type=_count, default=15, help="how often all implementations take turns (15)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="write all figures to a file, anew after each shape",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    parser.set_defaults(run=run)


def _shape(text: str) -> tuple[int, int, int]:
    extents = re.fullmatch(r"(\d+)[x,](\d+)[x,](\d+)", text)
    if extents is None or "0" in extents.groups():
        msg = f"wanted N,n,m, each at least 1, such as 64,512,512; got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    N, n, m = map(int, extents.groups())
    return N, n, m


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Time what the command line asks for; 0, or 2 where something could not be timed."""
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        print(
            "xaffine bench could not run: --plot draws with matplotlib; to get it: pip install matplotlib",
            file=sys.stderr,
        )
        return 2
    if options.json is not None:
        try:
            require_writable(options.json)
        except OSError as error:
            print(f"xaffine bench could not run: {error}", file=sys.stderr)
            return 2
    names = options.backend or (["numpy"] if options.beside else [name for name in _BACKENDS if _is_here(name)])
    found: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **describe_machine()}
    found |= {"rounds": options.rounds, "groups": {}, "rows": []}
    try:
        exit_code = _measure(options, names, found)
    finally:  # an interrupt, too, leaves the rows that were measured so far
        _save(found, options.json)
        _print_rows(found)
    if options.plot is not None and found["rows"]:
        from xaffine._command.plot import draw_ratios

        draw_ratios(found, options.plot)
    return exit_code


def _measure(options: argparse.Namespace, names: list[str], found: dict[str, Any]) -> int:
    """Fill in what the workers emit; 2 where one could not be timed, else 0."""
    exit_code = 0
    arguments = {key: getattr(options, key) for key in ("beside", "shapes", "dtype", "device", "rounds")}
    steps = len(options.dtype) * len(options.shapes)
    with progress_bar(len(names) * steps) as show:
        for number, name in enumerate(names):
            show(name, number * steps)
            worker = run_worker("xaffine._command.bench", {"backend": name, **arguments}, _SILENCE)
            try:
                with closing(worker) as events:
                    for event in events:
                        if event.pop("event") == "group":
                            found["groups"][name] = event
                        else:
                            found["rows"] += event["rows"]
                            _save(found, options.json)
                            done = len({(r["dtype"], *r["shape"]) for r in found["rows"] if r["group"] == name})
                            show(f"{name} {tuple(event['rows'][0]['shape'])}", number * steps + done)
            except WorkerError as error:
                print(f"xaffine bench could not time {name}: {error}", file=sys.stderr)
                exit_code = 2
    return exit_code


def _save(found: dict[str, Any], file: Path | None) -> None:
    """Write all figures so far, if there is a file for them: a run that is cut off keeps what it measured."""
    if file is not None:
        replace_text(file, json.dumps(found, indent=1) + "\n")


def _is_here(name: str) -> bool:
    try:
        backends.get(name)
    except (ImportError, RuntimeError):
        return False
    return True


def _print_rows(found: dict[str, Any]) -> None:
    print(f"xaffine {found['xaffine']}, Python {found['python']}, {found['system']}, {found['cores']} cores")
    for (group, dtype), rows in itertools.groupby(found["rows"], key=lambda r: (r["group"], r["dtype"])):
        facts = found["groups"][group]
        print(f"\n{group} {facts['version']} on {facts['device']}, {dtype}; {facts['threads']}")
        _print_table(list(rows), facts["rates"].get(dtype))
    print("\nlimit: the bare matrix products into ready memory")
    print("both/limit: median of the rounds, and quartiles where there is room")
    if any(row["cache"] == "cold" for row in found["rows"]):
        print(f"cold: both with the device's cache emptied before\nof card: of its rate in a bare product of {_LARGE}³")
    saving = [
        f"{row['group']} {row['dtype']} {_text_of(row['shape'])} ({row['to']['xaffine']:.2f})"
        for row in found["rows"]
        if (row["implementation"], row["what"], row["cache"]) == ("xaffine, out=", "both", "warm")
        and row["to"]["xaffine"] <= _WORTH
    ]
    if saving:
        print(f"out= pays, since both together take at most {_WORTH} of the time without it, at")
        print("\n".join(f"  {each}" for each in saving))


def _print_table(rows: list[dict[str, Any]], card: float | None) -> None:
    """Print what was measured for one dtype of one library, in at most 80 columns."""
    cold = any(row["cache"] == "cold" for row in rows)
    lines, styles = [], []
    for (shape, name), each in itertools.groupby(rows, key=lambda r: (r["shape"], r["implementation"])):
        by_what = {(row["what"], row["cache"]): row for row in each}
        both = by_what["both", "warm"]
        ratio = f"{both['ratio']:.2f} ({both['ratio_low']:.2f}-{both['ratio_high']:.2f})"
        cells = [_duration(by_what[what, "warm"]["median"]) for what in _WHAT]
        if cold:
            flushed = by_what.get(("both", "cold"))
            cells = [cells[-1], "" if flushed is None else _duration(flushed["median"]), *_rates(both, card)]
            ratio = ratio.partition(" ")[0]
        shortened = name if len(name) <= _WIDEST else f"…{name[1 - _WIDEST :]}"
        lines.append((_text_of(shape) if name == "limit" else "", shortened, *cells, ratio))
        styles.append("dim" if name == "limit" else "bold" if name.startswith("xaffine") else "")
    columns = ("both", "cold", "TFLOP/s", "of card") if cold else tuple(_WHAT)
    print_table(("N x n x m", "implementation", *columns, "both/limit"), lines, styles)


def _text_of(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _rates(row: dict[str, Any], card: float | None) -> tuple[str, str]:
    """TFLOP/s, and their share of those of the card."""
    rate = teraflops(row)
    return f"{rate:.1f}", "" if card is None else f"{rate / card:.2f}"


def teraflops(row: dict[str, Any]) -> float:
    """The 10¹² operations a second that a row stands for, counting those of the matrix products alone."""
    seconds: float = row["median"]
    N, n, m = row["shape"]
    return 1e-12 * _WHAT[row["what"]] * float(N * n * m) / seconds


def _duration(seconds: float) -> str:
    unit, scale = ("µs", 1e6) if seconds < 9.995e-4 else ("ms", 1e3) if seconds < 0.9995 else ("s", 1)
    return f"{seconds * scale:#.3g}".rstrip(".") + f" {unit}"


# In the worker.


def compare(
    backend: Backend,
    shape: tuple[int, int, int],
    dtype: str,
    *,
    rounds: int,
    device: Any = None,
    beside: dict[str, Callable[[Array, Array], Any]] | None = None,
) -> list[dict[str, Any]]:
    """Time the layer, the bare products and other implementations on one shape, interleaved.

    Parameters
    ----------
    backend : Backend
        That of "numpy", "torch", "jax" or "cupy".
    shape : tuple of int
        N, n, m.
    dtype : str
    rounds : int
        How often all take turns.
    device : optional
        One of the backend's devices.
    beside : dict, optional
        What is called as ``make(W, b)`` for each further implementation, by its name.

    Raises
    ------
    TargetError
        A further implementation raised an exception.

    Returns
    -------
    list of dict
        A row for each implementation and each of forward, backward, both (and on a GPU with its cache warm and cold):
        ``median``, ``low`` and ``high`` (quartiles) in seconds; ``ratio`` with its quartiles, to the limit; ``to``, the
        ratio to each of the others.
    """
    clock = clock_of(backend, device or backend.devices[0])
    implementations = _implementations(backend, beside or {}, shape, dtype, device)
    timers: dict[tuple[str, str, str], Callable[[], float]] = {}
    for implementation, what in itertools.product(implementations, _WHAT):
        call = implementations[implementation][what]
        for _ in range(2):  # compile, fill caches
            elapsed = clock.time(call, 1)
        count = max(1, min(2000, int(2e-3 / max(clock.time(call, 1), 1e-9)))) if elapsed < 1e-3 else 1
        timers[implementation, what, "warm"] = partial(clock.time, call, count)
        if clock.flush is not None:
            timers[implementation, what, "cold"] = partial(clock.time_cold, call)
    samples: dict[tuple[str, str, str], list[float]] = {key: [] for key in timers}
    turns = deque(timers)
    for _ in range(rounds):
        for implementation, what, cache in turns:
            for array in implementations[implementation][what](1):
                clock.wait(array)  # memory that lay idle meanwhile may take its time to come back
            samples[implementation, what, cache].append(timers[implementation, what, cache]())
        turns.rotate(-1)  # each begins a round now and then
    rows = []
    for (implementation, what, cache), times in samples.items():
        low, median, high = _quartiles(times)
        ratios = {
            other: _quartiles([a / b for a, b in zip(times, samples[other, what, cache], strict=True)])
            for other in implementations
        }
        rows.append({
            "group": backend.name, "dtype": dtype, "shape": list(shape), "implementation": implementation, "what": what,
            "cache": cache, "median": median, "low": low, "high": high,
            "ratio_low": ratios["limit"][0], "ratio": ratios["limit"][1], "ratio_high": ratios["limit"][2],
            "to": {other: ratio[1] for other, ratio in ratios.items() if other != implementation},
        })  # fmt: skip
    return rows


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return low, median, high


def _implementations(
    backend: Backend, others: dict[str, Any], shape: tuple[int, int, int], dtype: str, device: Any
) -> dict[str, dict[str, Callable[[int], tuple[Array, ...]]]]:
    """By name: forward, backward and both, each a function that makes so many calls and returns what came last."""
    N, n, m = shape
    rng = np.random.default_rng()

    def fresh(*extents: int) -> Array:
        return backend.from_values(rng.standard_normal(extents, dtype=np.float32), dtype, device=device)

    x, W, b, dy = fresh(N, n), fresh(n, m), fresh(m), fresh(N, m)
    found = {"limit": _calls(*backend.bare_products(x, W, dy))}
    for name, make in {"xaffine": AffineLayer, **others}.items():
        try:
            layer = make(W, b)
            layer.forward(x)
            _backward(layer, dy)
        except Exception as error:
            msg = f"{name} raised {type(error).__name__}: {error}\n  {last_user_line(error)}"
            raise TargetError(msg) from error
        found[name] = _calls(partial(layer.forward, x), partial(_backward, layer, dy))
    if backend.why_not_writable(W) is None:
        filling = AffineLayer(W, b)
        y, *gradients = map(backend.xp.empty_like, (dy, x, W, b))
        filling.forward(x)
        forward = partial(filling.forward, x, out=y)
        found["xaffine, out="] = _calls(forward, partial(_backward, filling, dy, out=tuple(gradients)))
    return found


def _calls(forward: Callable[[], Any], backward: Callable[[], Any]) -> dict[str, Callable[[int], tuple[Array, ...]]]:
    steps = {"forward": [forward], "backward": [backward], "both": [forward, backward]}
    return {what: partial(_repeat, functions) for what, functions in steps.items()}


def _repeat(functions: list[Callable[[], Any]], count: int) -> tuple[Array, ...]:
    for _ in range(count):
        for function in functions:
            result = function()
    return result if isinstance(result, tuple) else (result,)


def _backward(layer: Any, dy: Array, **options: Any) -> tuple[Array, Array]:
    """What a stopwatch has to wait for."""
    return layer.backward(dy, **options), layer.dW


def _work(
    emit: Callable[..., None], backend: str, beside: list[str], shapes: Any, dtype: list[str], device: Any, rounds: int
) -> None:
    library = backends.get(backend)
    if "float64" in dtype:
        library.use_full_precision()
    device = None if device is None else library.device(device)
    clock = clock_of(library, device or library.devices[0])
    place = library.device_name(device or library.devices[0])
    facts = {"version": library.version, "device": place, "clock": clock.name}
    makers = {target: import_target(target) for target in beside}
    rates = {name: _rate(library, name, device, clock) for name in dtype if clock.flush is not None}
    emit("group", **facts, threads=_threads(library), rates=rates)
    for name, shape in itertools.product(dtype, shapes):
        rows = compare(library, tuple(shape), name, rounds=rounds, device=device, beside=makers)
        emit("rows", rows=rows)  # at once: no table has a part of a shape


def _rate(backend: Backend, dtype: str, device: Any, clock: Clock, size: int = _LARGE) -> float:
    """The TFLOP/s of a card in one large bare product of random operands."""
    limit = _implementations(backend, {}, (size,) * 3, dtype, device)["limit"]["forward"]
    median = statistics.median([clock.time(limit, 1) for _ in range(7)][2:])
    return teraflops({"what": "forward", "shape": (size,) * 3, "median": median})


def _threads(backend: Backend) -> str:
    if backend.name == "torch":
        return f"{importlib.import_module('torch').get_num_threads()} threads"
    return str(describe_machine()["blas"]) if backend.name == "numpy" else "threads of its own"


if __name__ == "__main__":
    serve(_work)
