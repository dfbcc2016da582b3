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

from tests.helpers import case_on
from xaffine import AffineLayer, affine, affine_vjp, backends
from xaffine.kernels import cupy as kernel
from xaffine.kernels import standard
from xaffine.testing import checks, make_case
from xaffine.testing.cases import worst_error
from xaffine.testing.strategies import cases

is_aligned = kernel._is_aligned  # which tests replace
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


class NumpyWithCublas:
    """NumPy in the place of CuPy, with a cuBLAS handle whose math mode products can look at."""

    def __init__(self, mode: int = 0) -> None:
        self.mode, self.modes_of_products = mode, list[int]()
        cublas = SimpleNamespace(getMathMode=lambda _: self.mode, setMathMode=self._set_mode)
        self.cuda = SimpleNamespace(cublas=cublas, get_cublas_handle=lambda: 7)

    def _set_mode(self, handle: int, mode: int) -> None:
        assert handle == 7
        self.mode = mode

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def watched(self, array: np.ndarray) -> Any:
        """The array, which notes the math mode of each product that it is the first factor of."""
        outer = self

        class Watched(np.ndarray):
            def dot(self, other: Any, out: Any = None) -> Any:
                outer.modes_of_products.append(outer.mode)
                return np.asarray(self).dot(np.asarray(other), out)

        return array.view(Watched)


def slots(array: Any, threads: int) -> Any:
    """For each element of a matrix, which thread of the kernels takes it, and as which element of its packs."""
    index, pack = np.arange(array.size), kernel._elements(array)
    return index // pack % threads * pack + index % pack


def add_to_rows(b: Any, y: Any, size: int) -> None:
    y += b[slots(y, size) % len(b)].reshape(y.shape)


def add_rows_up(dy: Any, parts: Any, size: int) -> None:
    assert parts.size == size * kernel._elements(dy)
    parts[...] = 0
    with np.errstate(invalid="ignore"):  # infinities of two signs
        np.add.at(parts, divmod(slots(dy, size), dy.shape[1]), dy.ravel().astype(parts.dtype))


def sum_to_half(x: Any, out: Any, axis: int) -> None:
    out[...] = x.sum(axis=axis, dtype="float32")


class TestKernelOnTheHost:
    """The kernel with NumPy in the place of CuPy: everything but cuBLAS and what is compiled."""

    numpy = backends.get("numpy")

    @pytest.fixture(autouse=True)
    def _stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel, "cupy", NumpyWithCublas())
        for compiled in (add_to_rows, add_rows_up, sum_to_half):
            monkeypatch.setattr(kernel, f"_{compiled.__name__}", compiled)
        monkeypatch.setattr(kernel, "_is_aligned", lambda array: array.ctypes.data % 8 == 0)

    @pytest.mark.parametrize(
        ("dtype", "mode"), [("float16", 16), ("bfloat16", 16), ("float32", 0), ("float64", 0), ("complex64", 0)]
    )
    @pytest.mark.parametrize("of_user", [0, 2])
    def test_products_of_halves_are_summed_in_float32(
        self, monkeypatch: pytest.MonkeyPatch, dtype: str, mode: int, of_user: int
    ) -> None:
        cupy = NumpyWithCublas(of_user)
        monkeypatch.setattr(kernel, "cupy", cupy)
        x, W, dy = (cupy.watched(np.ones(shape, self.numpy.dtype(dtype))) for shape in ((2, 3), (3, 4), (2, 4)))
        kernel.forward(x, W, None)
        kernel.backward(dy, x, W, ("x", "W"))
        assert cupy.modes_of_products == [mode | of_user] * 3
        assert cupy.mode == of_user

    def test_math_mode_is_the_users_again_after_a_failed_product(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cupy = NumpyWithCublas(3)
        monkeypatch.setattr(kernel, "cupy", cupy)
        with pytest.raises(ValueError, match="not aligned"):
            kernel._product(np.ones((2, 3), "float16"), np.ones((2, 3), "float16"), np.ones((2, 3), "float16"))
        assert cupy.mode == 3

    @pytest.mark.parametrize("rows", [2, 512])
    def test_agrees_with_the_standard_one(self, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
        monkeypatch.setattr(kernel, "_TWO_STAGES", rows)
        monkeypatch.setattr(kernel, "_EACH", 1)
        supports = {"no-bias", "empty"}
        dtypes = [dtype for dtype in self.numpy.dtypes() if dtype != "bfloat16"]  # float32 in NumPy's standard kernel

        @given(cases(dtypes, mixed=False, supports=supports, batch_axes=False))
        def agree(case: Any) -> None:
            checks.kernels_agree(kernel, standard, case, self.numpy)

        agree()

    @pytest.mark.parametrize("N", [511, 512, 1000, 1024, 4097])
    @pytest.mark.parametrize("m", [1, 3, 8, 10])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64", "complex128", "int8"])
    def test_bias_and_sums_of_rows_are_exact(self, monkeypatch: pytest.MonkeyPatch, N: int, m: int, dtype: str) -> None:
        columns = np.arange(1, m + 1)
        dy, b = np.ones((N, m), self.numpy.dtype(dtype)), columns.astype(self.numpy.dtype(dtype))
        x = np.zeros((N, 1), dy.dtype)
        dy[0] = b
        with np.errstate(over="ignore"):
            expected = (N - 1 + columns).astype(dy.dtype).tolist()
        for threads, each in ((1 << 18, 64), (1 << 18, 1), (5, 1)):
            monkeypatch.setattr(kernel, "_THREADS", threads)
            monkeypatch.setattr(kernel, "_EACH", each)
            assert kernel.backward(dy, x, dy[:1], ("b",))[2].tolist() == expected
            assert (kernel.forward(x, dy[:1], b) == b).all()

    @pytest.mark.parametrize("transposed", [0, 1 << 18])
    def test_partial_sums_lie_either_way(self, monkeypatch: pytest.MonkeyPatch, transposed: int) -> None:
        monkeypatch.setattr(kernel, "_TRANSPOSED", transposed)
        parts = kernel._partial_sums(np.ones((4096, 6), "float32"))
        assert parts.flags.f_contiguous == (not transposed)
        assert parts.shape[0] > 1
        assert parts.sum(0).tolist() == [4096] * 6

    def test_memory_where_no_pack_may_begin_takes_another_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = np.zeros(1 + 600 * 3, "float32")
        x, W, b, y = np.ones((600, 1), "float32"), np.ones((1, 3), "float32"), np.ones(3, "float32"), memory[1:]
        y = y.reshape(600, 3)
        monkeypatch.setattr(kernel, "_add_to_rows", None)
        assert kernel.forward(x, W, b, y) is y
        assert (y == 2).all()
        copies: list[Any] = []
        monkeypatch.setattr(
            kernel, "_add_rows_up", lambda dy, parts, size: copies.append(dy) or add_rows_up(dy, parts, size)
        )
        assert kernel.backward(y, x, W, ("b",))[2].tolist() == [1200] * 3
        assert kernel._is_aligned(copies[0])

    @pytest.mark.parametrize(("N", "n", "m"), [(0, 2, 3), (600, 2, 0), (0, 0, 0)])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_compiled_kernels_are_given_elements(
        self, monkeypatch: pytest.MonkeyPatch, N: int, n: int, m: int, dtype: str
    ) -> None:
        monkeypatch.setattr(kernel, "_add_to_rows", None)
        monkeypatch.setattr(kernel, "_add_rows_up", None)
        x, W, b, dy = (np.ones(shape, dtype) for shape in ((N, n), (n, m), m, (N, m)))
        assert kernel.forward(x, W, b).shape == (N, m)
        assert kernel.backward(dy, x, W, ("b",))[2].tolist() == [0] * m

    @pytest.mark.parametrize("dtype", ["float16", "float64", "complex128"])
    def test_packs_begin_at_multiples_of_their_bytes(self, dtype: str) -> None:
        def lying(at: int) -> Any:
            return SimpleNamespace(data=SimpleNamespace(ptr=0x7F00_0000_0000 + at), dtype=np.dtype(dtype))

        for at in range(33):
            assert is_aligned(lying(at)) == (at % max(8, np.dtype(dtype).itemsize) == 0)

    @pytest.mark.parametrize(("shape", "dtype"), [((1, 1), "float32"), ((2, 3), "int32")])
    def test_buffers_are_left_to_the_caller_where_cupy_needs_more_memory(self, shape: Any, dtype: str) -> None:
        x, out = np.ones(shape, dtype), np.zeros((shape[0], 1), dtype)
        assert kernel.forward(x, np.ones((shape[1], 1), dtype), None, out) is not out
        assert not out.any()

    def test_operands_that_cublas_cannot_read_are_copied_once(self) -> None:
        dy = np.broadcast_to(np.float32(1), (3, 4))
        copies: list[str] = []

        class Noting(np.ndarray):
            def copy(self, order: Any = "C") -> Any:
                copies.append("copied")
                return np.asarray(self).copy(order)

        x, W = np.ones((3, 2), "f"), np.ones((2, 4), "f")
        dx, dW, db = kernel.backward(dy.view(Noting), x, W, ("x", "W", "b"))
        assert copies == ["copied"]
        assert (dx.tolist(), dW.tolist(), db.tolist()) == ([[4, 4]] * 3, [[3] * 4] * 2, [3] * 4)
        kernel.forward(x[:, ::-1].view(Noting), W[::-1].view(Noting), None)
        assert copies == ["copied"] * 3
        kernel.backward(dy.copy(), x[:, ::-1].view(Noting), W.T.copy().T, ("x", "b"))  # x is not read
        assert copies == ["copied"] * 3

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
        monkeypatch.setattr(kernel, "_TWO_STAGES", 2)
        db = np.zeros(4)
        with pytest.raises(MemoryError):
            kernel.backward(dy, x, W, ("x", "b"), (dx, None, db))
        assert not dx.any()
        assert not db.any()


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
    memory = np.arange(48, dtype="float32")

    def lying(array: np.ndarray) -> Any:
        at = array.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
        facts = {name: getattr(array, name) for name in ("shape", "strides", "itemsize", "nbytes", "flags")}
        return SimpleNamespace(data=SimpleNamespace(ptr=0x7F00_0000_0000 + at), **facts)

    rows = memory.reshape(8, 6)
    some = [
        memory, memory[:0], memory[5:], rows[:4], rows[4:], rows[:, :3], rows[:, 3:], rows[::2], rows[1::2],
        rows[::-1, 3:], rows[3::-1], rows[:4:-1, ::-1], rows[2:3, 1:2], rows[:0, ::-1], rows.T[::2],
        np.broadcast_to(memory[7], (3, 2)), np.broadcast_to(memory[47:], (3, 1)),
    ]  # fmt: skip
    for first in some:
        assert backends.overlap(*2 * [backends.memory_of(lying(first))], same=True) == backends.overlap(
            first, first, same=True
        )
        for second in some:
            assert backends.share_memory(lying(first), lying(second)) == np.shares_memory(first, second)


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


def test_blocks_of_dask_stay_on_the_device(backend: Any) -> None:
    da = pytest.importorskip("dask.array", reason="dask is not installed on this machine")
    case = make_case((6, 3), 4, seed=1)
    dy, x, W, b = case_on(case, backend)
    rows = [da.from_array(array, chunks=(2, -1), asarray=False) for array in (dy, x)]
    y, vjp = affine_vjp(rows[1], *(da.from_array(array, chunks=-1, asarray=False) for array in (W, b)))
    exact = case.exact()
    for name, lazy in {"y": y, **vjp(rows[0])._asdict()}.items():
        result = lazy.compute(scheduler="synchronous")
        assert type(result) is cupy.ndarray
        assert worst_error(result.get(), exact[name])[0] == 0


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


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "float64", "complex64", "complex128", "int8", "int64"]
)
def test_compiled_kernels_are_exact_on_integers(backend: Any, dtype: str) -> None:
    exact = "complex64" if dtype.startswith("complex") else "float32"
    for N, m in ((1, 1), (3, 5), (511, 3), (512, 7), (4097, 10), (2**17, 1), (70001, 3), (600, 1000), (513, 4096)):
        columns = cupy.arange(m, dtype="float32") % 5 - 2
        wide = cupy.ones((N + 1, m), "float32")
        wide[: N // 2], wide[-1] = -1, columns  # sums that are small, of integers that are
        y, b = wide.astype(backend.dtype(dtype)), columns.astype(backend.dtype(dtype))
        for first in (0, 1):  # where no pack begins, too
            dy = y[first : N + first]
            db = kernel.backward(dy, dy[:, :1], dy[:1], ("b",))[2]
            assert bool((db.astype(exact) == wide[first : N + first].sum(axis=0)).all()), (N, m, first)
            out = y.copy()[first:]
            kernel._add_bias(out, b)
            assert bool((out.astype(exact) == wide[first:] + columns).all()), (N, m, first)


@pytest.mark.usefixtures("backend")
def test_sums_of_rows_are_rounded_less_than_one_sum() -> None:
    N = 20_000_000
    for value, units in ((1.0, 0), (0.1, 100)):  # one sum is off by 11330
        db = cupy.empty(2, "float32")
        kernel._sum_of_rows(cupy.full((N, 2), value, "float32"), db)
        exact = float(np.float32(value)) * N
        assert abs(float(db[0]) - exact) <= units * 2.0**-24 * exact


SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


def test_the_host_never_waits_and_the_current_stream_is_used(backend: Any) -> None:
    case = make_case((64, 8), 4, seed=0)
    dy, x, W, b = case_on(case, backend)
    layer = AffineLayer(W, b)
    spin = cupy.RawKernel(SPIN, "spin")
    own, other = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    for stream in (own, other):  # compiles, loads and allocates what is needed once, or once for each stream
        with stream:
            spin((1,), (1,), (np.int64(0),))
            layer.forward(x)
            layer.backward(dy)
    cupy.cuda.Device().synchronize()
    with own:
        spin((1,), (1,), (np.int64(4_000_000_000),))  # seconds
        for _ in range(30):  # a driver lets the host wait where some thousand launches are queued
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
    N, pool = 1 << 20, cupy.get_default_memory_pool()
    pool.free_all_blocks()  # or x may be a part of a larger block, the rest of which then has room for the gradient
    x, W, dy = (cupy.ones(shape, "float32") for shape in ((N, 16), (16, 16), (N, 16)))
    layer = AffineLayer(W)
    layer.forward(x)
    layer.backward(dy)
    before = layer.dW
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
    dy, x, W, b = case_on(case, backend, second)
    layer = AffineLayer(W, b)
    results = {"y": layer.forward(x), "dx": layer.backward(dy), "dW": layer.dW, "db": layer.db}
    for name, result in results.items():
        assert result.device == second
        assert worst_error(backend.to_numpy(result), case.exact()[name])[0] == 0, name
