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


def ways_backward(cupy: Any, kernel: Any, dy: Any, x: Any) -> Ways:
    """dW and db of one dy, every way."""
    dW, db = cupy.empty((x.shape[1], dy.shape[1]), dy.dtype), cupy.empty(dy.shape[1], dy.dtype)
    planned: list[Any] = []

    def apart() -> Any:
        x.T.dot(dy, dW)
        kernel._sum_of_rows(dy, db)
        return dW, db

    def in_one_product() -> Any:
        if not planned:
            from nvmath.linalg import advanced

            product = advanced.Matmul(dy.T, x, dW.T, beta=0.0, options={"inplace": True, "memory_limit": 32 << 20})
            product.plan(epilog=advanced.MatmulEpilog.BGRADA)
            planned.append(product)
        return planned[0].execute()

    return {"apart": apart, "in one product": in_one_product}


def time_all(clock: Clock, ways: Ways) -> dict[str, Any]:
    """The median seconds of each way, interleaved; or why it cannot run."""
    found: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            for _ in range(3):
                way()
        except Exception as error:  # whatever it is, it is the finding
            found[name] = f"{type(error).__name__}: {error}"
    able = [name for name in ways if name not in found]
    samples: dict[str, list[float]] = {name: [] for name in able}

    def once(name: str) -> Callable[[int], tuple[()]]:
        def run(_: int) -> tuple[()]:
            ways[name]()
            return ()

        return run

    for _ in range(ROUNDS):
        for name in able:
            samples[name].append(clock.time_cold(once(name)))
    return found | {name: statistics.median(some) for name, some in samples.items()}


def measure(cupy: Any, kernel: Any, cublaslt: Any, draw: Callable[..., Any], clock: Clock) -> dict[str, Any]:
    """All ways on all shapes."""
    source, target = draw("float32", 2**28), draw("float32", 2**28)
    copy = time_all(clock, {"copy": lambda: cupy.copyto(target, source)})["copy"]
    found: dict[str, Any] = {"copied bytes a second": 2 * source.nbytes / copy, "db": [], "y": [], "dW and db": []}
    for dtype in DTYPES:
        for N, m in SUMS:
            dy = draw(dtype, N, m)
            times = time_all(clock, ways_to_sum(cupy, kernel, dy))
            found["db"].append({"dtype": dtype, "shape": [N, m], "bytes": dy.nbytes, "seconds": times})
        for N, n, m in PRODUCTS:
            x, W, b, dy = draw(dtype, N, n), draw(dtype, n, m), draw(dtype, m), draw(dtype, N, m)
            row = {"dtype": dtype, "shape": [N, n, m]}
            found["y"].append(row | {"seconds": time_all(clock, ways_forward(cupy, cublaslt, x, W, b))})
            found["dW and db"].append(row | {"seconds": time_all(clock, ways_backward(cupy, kernel, dy, x))})
    return found


def main() -> int:
    """Measure on the first GPU, and print."""
    import cupy

    from xaffine.kernels import cublaslt
    from xaffine.kernels import cupy as kernel

    backend = backends.get("cupy")
    cublaslt._WORK = 1  # whether it pays is what is asked

    def draw(dtype: str, *shape: int) -> Any:
        return cupy.random.standard_normal(shape, dtype="float32").astype(backend.dtype(dtype))

    json.dump(measure(cupy, kernel, cublaslt, draw, clock_of(backend, backend.devices[0])), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
