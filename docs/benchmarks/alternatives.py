"""Time what the CuPy kernel could do otherwise: print one JSON object. Needs a CUDA device.

    python docs/benchmarks/alternatives.py

Every alternative is called in turn with the device's cache emptied, and timed by device events: db by the kernel, by
one sum and by a product with ones; y with the bias added after the product, and fused into it; dW and db apart, and in
one product. What cannot run says why.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).parents[2]))

from xaffine import backends
from xaffine.command.clock import Clock, clock_of

Ways: TypeAlias = dict[str, Callable[[], Any]]

SUMS = ((64, 512), (4096, 4096), (65536, 10), (65536, 64), (65536, 4096), (262144, 32))
PRODUCTS = ((4096, 4096, 4096), (8192, 1024, 4096), (4096, 4096, 512), (65536, 784, 10))
DTYPES = ("float32", "float16", "bfloat16")
ROUNDS = 11


def ways_to_sum(cupy: Any, kernel: Any, dy: Any) -> Ways:
    """Db of one dy, every way."""
    db, wide = cupy.empty(dy.shape[1], dy.dtype), "float32" if dy.dtype.itemsize == 2 else dy.dtype

    def by_one_sum() -> Any:
        db[...] = dy.sum(axis=0, dtype=wide)
        return db

    def by_a_product() -> Any:
        cupy.ones((1, len(dy)), dy.dtype).dot(dy, db[None, :])
        return db

    def by_the_kernel() -> Any:
        kernel._sum_of_rows(dy, db)
        return db

    return {"kernel": by_the_kernel, "one sum": by_one_sum, "ones @ dy": by_a_product}


def ways_forward(cupy: Any, cublaslt: Any, x: Any, W: Any, b: Any) -> Ways:
    """Y of one x, every way."""
    y = cupy.empty((len(x), W.shape[1]), x.dtype)

    def apart() -> Any:
        x.dot(W, y)
        cupy.add(y, b, out=y)
        return y

    def fused() -> Any:
        if not cublaslt.fill(y, x, W, b):
            msg = "cublaslt.fill declined"
            raise RuntimeError(msg)
        return y

    return {"apart": apart, "fused": fused}


def ways_backward(cupy: Any, kernel: Any, dy: Any, x: Any, more: dict[str, Any]) -> Ways:
    """dW and db of one dy, every way; with more options for nvmath-python."""
    dW, db = cupy.empty((x.shape[1], dy.shape[1]), dy.dtype), cupy.empty(dy.shape[1], dy.dtype)
    planned: list[Any] = []

    def apart() -> Any:
        x.T.dot(dy, dW)
        kernel._sum_of_rows(dy, db)
        return dW, db

    def in_one_product() -> Any:
        if not planned:
            from nvmath.linalg import advanced

            options = {"inplace": True, "memory_limit": 32 << 20, **more}
            product = advanced.Matmul(dy.T, x, dW.T, beta=0.0, options=options)
            product.plan(epilog=advanced.MatmulEpilog.BGRADA)
            planned.append(product)
        _, more_results = planned[0].execute()
        return dW, more_results["bgrada"]

    return {"apart": apart, "in one product": in_one_product}


def agree(ways: Ways) -> dict[str, str]:
    """Those that cannot run, or give another result than the first, with the reason; on operands of small integers."""
    faults: dict[str, str] = {}
    first: Any = None
    for name, way in ways.items():
        try:
            results = way()
            values = [each.tolist() for each in (results if isinstance(results, tuple) else (results,))]
        except Exception as error:  # whatever it is, it is the finding
            faults[name] = f"{type(error).__name__}: {error}"
            continue
        first = values if first is None else first
        if values != first:
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


def measure(
    cupy: Any, kernel: Any, cublaslt: Any, draw: Callable[..., Any], clock: Clock, more: dict[str, Any]
) -> dict[str, Any]:
    """All ways on all shapes; ``draw(kind, dtype, *shape)`` draws "integers" to compare and "floats" to time."""
    source, target = draw("floats", "float32", 2**28), draw("floats", "float32", 2**28)
    copy = time_all(clock, {"copy": lambda: cupy.copyto(target, source)}, {})["copy"]
    found: dict[str, Any] = {"copied bytes a second": 2 * source.nbytes / copy, "db": [], "y": [], "dW and db": []}

    def add(result: str, dtype: str, shape: tuple[int, ...], make: Callable[[str], Ways], **facts: Any) -> None:
        seconds = time_all(clock, make("floats"), agree(make("integers")))
        found[result].append({"dtype": dtype, "shape": list(shape), **facts, "seconds": seconds})

    for dtype in DTYPES:
        for N, m in SUMS:

            def sums(kind: str, dtype: str = dtype, N: int = N, m: int = m) -> Ways:
                return ways_to_sum(cupy, kernel, draw(kind, dtype, N, m))

            add("db", dtype, (N, m), sums, bytes=N * m * (4 if dtype == "float32" else 2))
        for shape in PRODUCTS:

            def forward(kind: str, dtype: str = dtype, shape: Any = shape) -> Ways:
                N, n, m = shape
                return ways_forward(
                    cupy, cublaslt, draw(kind, dtype, N, n), draw(kind, dtype, n, m), draw(kind, dtype, m)
                )

            def backward(kind: str, dtype: str = dtype, shape: Any = shape) -> Ways:
                N, n, m = shape
                return ways_backward(cupy, kernel, draw(kind, dtype, N, m), draw(kind, dtype, N, n), more)

            add("y", dtype, shape, forward)
            add("dW and db", dtype, shape, backward)
    return found


def main() -> int:
    """Measure on the first GPU, and print."""
    import cupy

    from xaffine.kernels import cublaslt
    from xaffine.kernels import cupy as kernel

    backend = backends.get("cupy")
    cublaslt._WORK = 1  # whether it pays is what is asked
    more: dict[str, Any] = {}
    if cublaslt._is_cut_to_tf32(cupy.dtype("float32")):
        from nvmath.linalg import ComputeType

        more["compute_type"] = ComputeType.COMPUTE_32F_FAST_TF32

    def draw(kind: str, dtype: str, *shape: int) -> Any:
        if kind == "integers":  # small enough that every sum is exact
            return cupy.random.randint(-1, 2, shape).astype("float32").astype(backend.dtype(dtype))
        return cupy.random.standard_normal(shape, dtype="float32").astype(backend.dtype(dtype))

    clock = clock_of(backend, backend.devices[0])
    json.dump(measure(cupy, kernel, cublaslt, draw, clock, more), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
