"""What only CuPy has: a GPU, and a registry that says so where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np
import pytest
from hypothesis import given

from xaffine import AffineLayer, affine, affine_vjp, backends
from xaffine.kernels import cupy as kernel
from xaffine.kernels import standard
from xaffine.testing import checks, make_case
from xaffine.testing.cases import worst_error
from xaffine.testing.strategies import cases

without_gpu = pytest.mark.skipif(cupy.cuda.is_available(), reason="this machine has a CUDA device")


@without_gpu
def test_without_a_gpu_the_registry_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"'cupy' is installed .* and finds no CUDA device"):
        backends.get("cupy")


@pytest.mark.parametrize("count", [0, "cudaErrorInsufficientDriver: CUDA driver version is insufficient"])
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, count: Any) -> None:
    def count_devices() -> int:
        if isinstance(count, str):
            raise FakeRuntime.CUDARuntimeError(count)
        return int(count)

    class FakeRuntime:
        CUDARuntimeError = RuntimeError
        getDeviceCount = staticmethod(count_devices)

    monkeypatch.setattr(cupy.cuda, "runtime", FakeRuntime)
    with pytest.raises(RuntimeError, match=str(count) if count else "finds no CUDA device: it needs an NVIDIA GPU"):
        backends.get("cupy")


class Cupylike(np.ndarray):
    """What CuPy does with a row times a column, from its source."""

    def dot(self, other: Any, out: Any = None) -> Any:
        single = len(self) == 1 == other.shape[1]
        assert not (single and self.dtype == np.float16), "rounds every product to float16 before it adds them up"
        return super().dot(other, out)


class TestKernelOnTheHost:
    """The kernel with NumPy in the place of CuPy: everything but cuBLAS."""

    numpy = backends.get("numpy")

    @pytest.fixture(autouse=True)
    def _stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel, "cupy", np)

    @pytest.mark.parametrize("tf32", ["0", "1"])
    def test_agrees_with_the_standard_one(self, monkeypatch: pytest.MonkeyPatch, tf32: str) -> None:
        monkeypatch.setenv("CUPY_TF32", tf32)
        supports = {"no-bias", "empty"}

        @given(cases(self.numpy.dtypes(), mixed=False, supports=supports, batch_axes=False))
        def agree(case: Any) -> None:
            checks.kernels_agree(kernel, standard, case, self.numpy)

        agree()

    def test_single_elements_of_halves_are_not_left_to_cupy(self) -> None:
        x, W = np.full((1, 3), 0.1, "float16").view(Cupylike), np.full((3, 1), 0.1, "float16").view(Cupylike)
        y = kernel.forward(x, W, None)
        assert y == np.float16(3 * float(x[0, 0]) ** 2)
        for gradient in kernel.backward(y.view(Cupylike), x[:, :1], W[:1], ("x", "W", "b")):
            assert gradient.size == 1
        with pytest.raises(AssertionError, match="rounds every product"):
            x.dot(W)

    def test_memory_that_runs_out_leaves_buffers_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise MemoryError

        x, W, dy = np.ones((2, 3)), np.ones((3, 4)), np.ones((2, 4))
        dx = np.zeros((2, 3))
        monkeypatch.setattr(np, "empty", refuse)
        with pytest.raises(MemoryError):
            kernel.backward(dy, x, W, ("x", "W"), (dx, None, None))
        assert not dx.any()


def test_the_device_of_the_operands_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.array_api_compat, "is_cupy_array", lambda array: hasattr(array, "device"))
    entered: list[str] = []

    @contextmanager
    def device() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    with backends.on_device_of(SimpleNamespace(device=device())):
        assert entered == ["in"]
    assert entered == ["in", "out"]
    with backends.on_device_of(object()):
        pass


def test_memory_is_known_by_its_addresses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.array_api_compat, "is_cupy_array", lambda array: hasattr(array, "data"))

    def lying(at: int, *shape: int) -> Any:
        data = SimpleNamespace(ptr=0x7F00_0000_0000 + at)
        return SimpleNamespace(data=data, shape=shape, strides=(12, 4), itemsize=4)

    assert backends.share_memory(lying(0, 4, 3), lying(36, 1, 3))
    assert not backends.share_memory(lying(0, 4, 3), lying(48, 4, 3))


def test_nothing_goes_through_the_host(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = (backend.from_numpy(np.ones(shape, "float32")) for shape in ((2, 2, 3), (6, 4), (4,)))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("copied to the host")

    with monkeypatch.context() as patch:
        for way in ("get", "item", "tolist", "__bool__", "__float__", "__int__", "__array__"):
            patch.setattr(cupy.ndarray, way, refuse)
        with pytest.raises(AssertionError, match="copied to the host"):
            x.get()
        y, vjp = affine_vjp(x, W, b)
        gradients = vjp(y)
    assert all(isinstance(result, cupy.ndarray) for result in (y, *gradients))
    assert bool((y == 7).all())


def test_numpy_x_with_cupy_w_is_refused(backend: Any) -> None:
    with pytest.raises(TypeError, match=r"two libraries: x is .* \(numpy on cpu\); W is .* \(cupy on"):
        affine(np.ones((2, 3)), backend.from_numpy(np.ones((3, 4))))


def test_arrays_on_two_devices_are_refused(backend: Any) -> None:
    if len(backend.devices) < 2:
        pytest.skip("this machine has one CUDA device")
    first, second = backend.devices[:2]
    x, W = backend.from_numpy(np.ones((2, 3)), device=first), backend.from_numpy(np.ones((3, 4)), device=second)
    with pytest.raises(ValueError, match="two devices"):
        affine(x, W)


SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


def test_the_host_never_waits_and_the_current_stream_is_used(backend: Any) -> None:
    case = make_case((64, 8), 4, seed=0)
    dy, x, W, b = (o.on(backend) for o in (case.dy, case.x, case.W, case.b))
    layer = AffineLayer(W, b)
    layer.forward(x)
    layer.backward(dy)  # compiles what is compiled once
    cupy.cuda.Device().synchronize()
    spin = cupy.RawKernel(SPIN, "spin")
    own, other = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    with own:
        spin((1,), (1,), (np.int64(4_000_000_000),))  # seconds
        for _ in range(100):
            y = layer.forward(x)
            dx = layer.backward(dy)
        assert not own.done
    with other:
        unhindered = AffineLayer(W, b).forward(x)
        other.synchronize()
        assert not own.done
    own.synchronize()
    exact = case.exact()
    results = {"y": y, "dx": dx, "dW": layer.dW, "db": layer.db}
    for name, result in results.items():
        assert worst_error(backend.to_numpy(result), exact[name])[0] == 0, name
    assert bool((unhindered == y).all())


@pytest.mark.usefixtures("backend")
def test_memory_that_runs_out_changes_nothing() -> None:
    N = 1 << 20
    x, W, dy = (cupy.ones(shape, "float32") for shape in ((N, 16), (16, 16), (N, 16)))
    layer = AffineLayer(W)
    layer.forward(x)
    layer.backward(dy)
    before, pool = layer.dW, cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + (1 << 20))
    try:
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            layer.backward(dy)
        assert layer.dW is before
        assert bool((before == N).all())
        assert AffineLayer(W).forward(x[:16]).shape == (16, 16)
    finally:
        pool.set_limit(size=0)


def test_operands_of_a_device_that_is_not_the_current_one(backend: Any) -> None:
    if len(backend.devices) < 2:
        pytest.skip("this machine has one CUDA device")
    case = make_case((3, 2, 3), 4, seed=0)
    second = backend.devices[1]
    dy, x, W, b = (o.on(backend, second) for o in (case.dy, case.x, case.W, case.b))
    layer = AffineLayer(W, b)
    results = {"y": layer.forward(x), "dx": layer.backward(dy), "dW": layer.dW, "db": layer.db}
    for name, result in results.items():
        assert result.device == second
        assert worst_error(backend.to_numpy(result), case.exact()[name])[0] == 0, name
