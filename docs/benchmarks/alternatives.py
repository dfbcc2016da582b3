"""Time what xaffine could do otherwise on CuPy, and write the figures to a file. Needs a CUDA device.

    python docs/benchmarks/alternatives.py FILE              # everything
    python docs/benchmarks/alternatives.py FILE --db-alone   # a copy, and db in float32 at (65536, 4096)

The file is JSON and is written anew after every row, so that a run that is cut off keeps what it measured. Every
alternative is called in turn with the device's cache emptied, and timed by device events: db by the kernels of
xaffine/backends/cupy.py, by one sum, by two sums that CuPy has, and by a product with ones; products of halves with and
without sums in half precision, and how far they are off; y with its bias added by the kernel, and by CuPy. What cannot
run says why.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

sys.path.insert(0, str(Path(__file__).parents[2]))

from xaffine import backends
from xaffine._command.clock import Clock, clock_of
from xaffine._command.files import replace_text
from xaffine.testing.bounds import unit_roundoff

if TYPE_CHECKING:
    from xaffine.backends import Backend

Ways: TypeAlias = dict[str, Callable[[], Any]]

SUMS = ((64, 512), (4096, 4096), (65536, 10), (65536, 64), (65536, 4096), (262144, 32))
PRODUCTS = ((4096, 4096, 4096), (8192, 1024, 4096), (4096, 4096, 512), (65536, 784, 10))
HALVES = (
    (32, 1024, 8), (32, 4096, 8), (64, 4096, 64), (16, 65536, 16), (64, 65536, 64), (512, 16384, 512),
    (784, 65536, 16), (4096, 4096, 4096),
)  # fmt: skip
COLUMNS = (65536, 4096)
DTYPES = ("float32", "float16", "bfloat16")
ROUNDS = 11


def ways_to_sum(cupy: Any, backend: Backend, dy: Any) -> Ways:
    """Db of one dy, every way."""
    db, wide = cupy.empty(dy.shape[1], dy.dtype), "float32" if dy.dtype.itemsize == 2 else dy.dtype

    def by_one_sum() -> Any:
        db[...] = dy.sum(axis=0, dtype=wide)
        return db

    def by_two_sums() -> Any:
        N, m = dy.shape
        rows = 1 << N.bit_length() // 2  # √N rows at a time are taken as one long row
        whole = N // rows * rows
        parts = cupy.empty((rows + N - whole, m), wide)
        dy[:whole].reshape(N // rows, rows * m).sum(axis=0, dtype=wide, out=parts[:rows].reshape(rows * m))
        parts[rows:] = dy[whole:]
        db[...] = parts.sum(axis=0)
        return db

    def by_a_product() -> Any:
        cupy.ones((1, len(dy)), dy.dtype).dot(dy, db[None, :])
        return db

    def by_the_kernel() -> Any:
        return backend.sum_rows(dy, db)

    return {"kernel": by_the_kernel, "one sum": by_one_sum, "two sums": by_two_sums, "ones @ dy": by_a_product}


def ways_to_multiply_halves(cupy: Any, x: Any, W: Any) -> Ways:
    """One product, every math mode of cuBLAS that matters."""
    cublas, handle = cupy.cuda.cublas, cupy.cuda.get_cublas_handle()
    y = cupy.empty((len(x), W.shape[1]), x.dtype)

    def with_mode(mode: int) -> Callable[[], Any]:
        def multiply() -> Any:
            before = cublas.getMathMode(handle)
            cublas.setMathMode(handle, mode)
            x.dot(W, y)
            cublas.setMathMode(handle, before)
            return y

        return multiply

    return {"sums in float32": with_mode(16), "as cuBLAS likes": with_mode(0)}


def worst_errors(ways: Ways, x: Any, W: Any, dtype: str) -> dict[str, float]:
    """The largest relative error of each way, in unit roundoffs of the dtype; of positive factors."""
    exact = x.astype("float64").dot(W.astype("float64"))
    u = float(unit_roundoff(dtype))
    return {name: float((abs(way().astype("float64") - exact) / exact).max()) / u for name, way in ways.items()}


def ways_forward(cupy: Any, backend: Backend, x: Any, W: Any, b: Any) -> Ways:
    """Y of one x, with every way to add the bias."""
    y = cupy.empty((len(x), W.shape[1]), x.dtype)

    def by_the_kernel() -> Any:
        return backend.product(x, W, b, y)

    def by_cupy_add() -> Any:
        return cupy.add(backend.product(x, W, None, y), b, out=y)

    return {"kernel": by_the_kernel, "cupy.add": by_cupy_add}


def agree(ways: Ways) -> dict[str, str]:
    """Those that cannot run, or give another result than the first, with the reason; on operands of small integers."""
    faults: dict[str, str] = {}
    first: Any = None
    for name, way in ways.items():
        try:
            results = way()
            # Copies, since all ways fill the same memory; compared on the device, which takes a moment.
            values = [each.astype("float32") for each in (results if isinstance(results, tuple) else (results,))]
        except Exception as error:  # whatever it is, it is the finding
            faults[name] = f"{type(error).__name__}: {error}"
            continue
        first = values if first is None else first
        if not all(bool((a == b).all()) for a, b in zip(values, first, strict=True)):
            faults[name] = "another result"
    return faults


def time_all(clock: Clock, ways: Ways, faults: dict[str, str]) -> dict[str, Any]:
    """The median seconds of each way that has no fault, interleaved."""
    able = [name for name in ways if name not in faults]
    samples: dict[str, list[float]] = {name: [] for name in able}

    def once(name: str) -> Callable[[int], tuple[()]]:
        def run(_: int) -> tuple[()]:
            ways[name]()
            return ()

        return run

    for number in range(ROUNDS + 3):
        for name in able:
            seconds = clock.time_cold(once(name))
            if number >= 3:
                samples[name].append(seconds)
    return faults | {name: statistics.median(some) for name, some in samples.items()}


def rate_of_a_copy(cupy: Any, draw: Callable[..., Any], clock: Clock) -> float:
    """The bytes that a copy of a gibibyte reads and writes in a second."""
    source, target = draw("floats", "float32", 2**28), draw("floats", "float32", 2**28)
    seconds: float = time_all(clock, {"copy": lambda: cupy.copyto(target, source)}, {})["copy"]
    return 2 * int(source.nbytes) / seconds


def measure(
    cupy: Any,
    backend: Backend,
    draw: Callable[..., Any],
    clock: Clock,
    save: Callable[[dict[str, Any]], None],
    *,
    db_alone: bool = False,
) -> None:
    """All ways on all shapes, saved after each row.

    ``draw(kind, dtype, *shape)`` draws "integers" to compare, "floats" to time, and "positive" floats.
    """
    found: dict[str, Any] = {"copied bytes a second": rate_of_a_copy(cupy, draw, clock)}
    found |= {"db": [], "halves": [], "y": []}

    def add(result: str, dtype: str, shape: tuple[int, ...], seconds: dict[str, Any], **facts: Any) -> None:
        found[result].append({"dtype": dtype, "shape": list(shape), **facts, "seconds": seconds})
        save(found)

    def compare(make: Callable[[str], Ways]) -> dict[str, Any]:
        return time_all(clock, make("floats"), agree(make("integers")))

    for dtype in ("float32",) if db_alone else DTYPES:
        for N, m in (COLUMNS,) if db_alone else SUMS:

            def sums(kind: str, dtype: str = dtype, N: int = N, m: int = m) -> Ways:
                return ways_to_sum(cupy, backend, draw(kind, dtype, N, m))

            add("db", dtype, (N, m), compare(sums), bytes=N * m * (4 if dtype == "float32" else 2))
    if db_alone:
        return
    for dtype in DTYPES:
        for N, n, m in HALVES if dtype != "float32" else ():
            x, W = draw("positive", dtype, N, n), draw("positive", dtype, n, m)
            halves = ways_to_multiply_halves(cupy, x, W)
            add("halves", dtype, (N, n, m), time_all(clock, halves, {}), errors=worst_errors(halves, x, W, dtype))
    for dtype in DTYPES:
        for shape in PRODUCTS:

            def forward(kind: str, dtype: str = dtype, shape: Any = shape) -> Ways:
                N, n, m = shape
                return ways_forward(
                    cupy, backend, draw(kind, dtype, N, n), draw(kind, dtype, n, m), draw(kind, dtype, m)
                )

            add("y", dtype, shape, compare(forward))


def main(arguments: list[str] | None = None) -> int:
    """Measure on the first GPU."""
    parser = argparse.ArgumentParser(description="Time what xaffine could do otherwise on CuPy.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--db-alone", action="store_true")
    options = parser.parse_args(arguments)

    import cupy

    backend = backends.get("cupy")

    def draw(kind: str, dtype: str, *shape: int) -> Any:
        if kind == "integers":  # small enough that every sum is exact
            return cupy.random.randint(-1, 2, shape).astype("float32").astype(backend.dtype(dtype))
        array = cupy.random.standard_normal(shape, dtype="float32")
        return (abs(array) if kind == "positive" else array).astype(backend.dtype(dtype))

    def save(found: dict[str, Any]) -> None:
        replace_text(options.file, json.dumps(found) + "\n")

    measure(cupy, backend, draw, clock_of(backend, backend.devices[0]), save, db_alone=options.db_alone)
    return 0


if __name__ == "__main__":
    sys.exit(main())
