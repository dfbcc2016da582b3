"""The kernels: each agrees with the standard one and has every property, also where it cuts tall operands in blocks."""

from __future__ import annotations

import math
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from xaffine import AffineLayer, affine_backward
from xaffine.backends import Backend
from xaffine.kernels import kernel_of, numpy, standard
from xaffine.testing import PROPERTIES, check_affine, checks, make_case
from xaffine.testing.strategies import cases


@pytest.fixture
def kernel(backend: Backend, device: Any) -> Any:
    return kernel_of(backend.from_numpy(np.ones(1), device=device))


def test_backend_has_the_kernel_it_earned(backend: Backend, kernel: Any) -> None:
    own = backend.name if backend.name in ("numpy", "cupy", "torch", "dask") else "standard"
    assert kernel.__name__ == f"xaffine.kernels.{own}"


def assert_agree(first: Any, second: Any, values: str, backend: Backend, device: Any = None) -> None:
    supports = {"no-bias", "empty"}
    # The bfloat16 products of NumPy's standard kernel are float32, which the layer casts.
    dtypes = [d for d in backend.dtypes(device) if (backend.name, d) != ("numpy", "bfloat16")]
    matrices = cases(dtypes, values=values, mixed=False, supports=supports, batch_axes=False)

    # Each case is put through 16 ways; exact arithmetic on floats takes its time.
    @settings(max_examples=settings().max_examples // (5 if values == "floats" else 1))
    @given(matrices)
    def agree(case: Any) -> None:
        checks.kernels_agree(first, second, case, backend, device)

    agree()


@pytest.mark.parametrize("values", ["integers", "floats"])
def test_kernel_agrees_with_the_standard_one(backend: Backend, device: Any, kernel: Any, values: str) -> None:
    if kernel is standard:
        pytest.skip("this library runs the standard kernel itself")
    assert_agree(kernel, standard, values, backend, device)


@pytest.mark.once
@pytest.mark.parametrize("fault", ["forward", "backward", "wanted", "swapped", "buffers", "added", "dtype"])
def test_kernels_that_disagree_are_told_apart(backend: Backend, fault: str) -> None:
    def forward(x: Any, W: Any, b: Any, out: Any = None) -> Any:
        return numpy.forward(x, W, None if fault == "forward" else b, out)

    def backward(dy: Any, x: Any, W: Any, wanted: Any, out: Any = (None,) * 3) -> Any:
        if fault == "wanted":
            wanted = ("x", "W")
        dx, dW, db = numpy.backward(dy, x, W, wanted, out)
        if fault == "swapped" and len(wanted) == 1:
            return dW, dx, db
        if fault == "added" and out[2] is not None:
            db += 7
        if fault == "dtype" and "b" in wanted:
            db = db.astype(float)
        if "W" in wanted and (fault == "backward" or (fault == "buffers" and out[1] is not None)):
            dW = dW * 2
        return dx, dW, db

    broken = SimpleNamespace(forward=forward, backward=backward)
    with pytest.raises(AssertionError, match=r"y\[|d[xWb]\[|were wanted|came in float64"):
        checks.kernels_agree(broken, standard, make_case((5, 3), 2, seed=0), backend)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after a few rows, as tall operands are cut after thousands."""
    for name, value in {"_TALL": 2, "_ROWS": 4, "_LONG": 40, "_SMALL": 200}.items():
        monkeypatch.setattr(numpy, name, value)


@pytest.mark.once
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.name)
def test_blocks_have_every_property(prop: Any, backend: Backend) -> None:
    check_affine(AffineLayer, dtype=backend.dtypes(), max_examples=100, seed=0, properties=[prop])


@pytest.mark.once
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("values", ["integers", "floats"])
def test_blocks_agree_with_the_standard_kernel(backend: Backend, values: str) -> None:
    assert_agree(numpy, standard, values, backend)


@pytest.mark.once
@pytest.mark.parametrize(("n", "m"), [(40, 1), (1, 40), (3, 2)])
@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_narrow_and_wide_operands_agree(backend: Backend, n: int, m: int) -> None:
    checks.kernels_agree(numpy, standard, make_case((31, n), m, seed=0), backend)


@pytest.mark.once
class TestSumOfRows:
    """db on NumPy, where a running float32 sum stops at 2²⁴."""

    def test_of_many_ones_is_their_number(self) -> None:
        N = 20_000_000
        db = affine_backward(np.ones((N, 1), "f"), np.ones((N, 1), "f"), np.ones((1, 1), "f"), np.ones(1, "f")).db
        assert db.tolist() == [N]

    def test_is_five_times_as_exact_as_the_plain_one(self) -> None:
        rng = np.random.default_rng(0)
        dy = rng.standard_normal((1_000_000, 8), dtype=np.float32)
        exact = [math.fsum(column) for column in dy.T]
        db = affine_backward(dy, np.empty((len(dy), 0), "f"), np.empty((0, 8), "f"), np.zeros(8, "f")).db
        own, plain = (max(abs(np.asarray(computed, float) - exact)) for computed in (db, dy.sum(axis=0)))
        assert own <= plain / 5


@pytest.mark.once
def test_buffers_are_all_that_tall_operands_take() -> None:
    rng = np.random.default_rng(0)
    x, W, b, dy = (rng.integers(-1, 2, shape).astype("f") for shape in ((262144, 32), (32, 32), 32, (262144, 32)))
    x[:] = x[0]
    layer, y, out = AffineLayer(W, b), np.empty_like(dy), (np.full_like(x, 7), np.full_like(W, 7), np.full_like(b, 7))
    tracemalloc.start()
    try:
        assert layer.forward(x, out=y) is y
        assert layer.backward(dy, out=out) is out[0]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert layer.dW is out[1]
    assert layer.db is out[2]
    assert np.array_equal(y, np.outer(np.ones(len(x)), x[0] @ W + b))
    assert np.array_equal(layer.db, dy.sum(axis=0, dtype=float))
    assert np.array_equal(layer.dW, (x.astype(float).T @ dy.astype(float)))
