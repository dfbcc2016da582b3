"""What only CuPy has: a GPU, and a registry that says so where there is none."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np
import pytest
from hypothesis import given

from xaffine import AffineLayer, affine, affine_vjp, backends
from xaffine.kernels import cublaslt, standard
from xaffine.kernels import cupy as kernel
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


class TestKernelOnTheHost:
    """The kernel with NumPy in the place of CuPy: everything but cuBLAS."""

    numpy = backends.get("numpy")

    @pytest.fixture(autouse=True)
    def _stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel, "cupy", NumpyWithCublas())

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

    @pytest.mark.parametrize("striped", [2, 512])
    def test_agrees_with_the_standard_one(self, monkeypatch: pytest.MonkeyPatch, striped: int) -> None:
        monkeypatch.setattr(kernel, "_STRIPED", striped)
        supports = {"no-bias", "empty"}
        dtypes = [dtype for dtype in self.numpy.dtypes() if dtype != "bfloat16"]  # float32 in NumPy's standard kernel

        @given(cases(dtypes, mixed=False, supports=supports, batch_axes=False))
        def agree(case: Any) -> None:
            checks.kernels_agree(kernel, standard, case, self.numpy)

        agree()

    @pytest.mark.parametrize("N", [511, 512, 1000, 1024, 4097])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64", "int32"])
    def test_sums_of_rows_are_exact(self, N: int, dtype: str) -> None:
        dy = np.ones((N, 3), self.numpy.dtype(dtype))
        assert kernel.backward(dy, dy, dy.T, ("b",))[2].tolist() == [dy.dtype.type(N)] * 3

    def test_sum_of_rows_rounds_less_than_one_sum(self) -> None:
        dy = np.ones((2**25, 1), np.float32)
        out = np.empty(1, np.float32)
        kernel._sum_of_rows(dy, out)
        assert out == 2**25

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
        monkeypatch.setattr(kernel, "_STRIPED", 2)
        db = np.zeros(4)
        with pytest.raises(MemoryError):
            kernel.backward(dy, x, W, ("x", "b"), (dx, None, db))
        assert not dx.any()
        assert not db.any()


class OnDevice(np.ndarray):
    """An array that tells of its memory as CuPy's do."""

    device = SimpleNamespace(id=0)

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])


def on_device(*shape: int, dtype: Any = "float32", offset: int = 0) -> Any:
    """Small integers at an address as CuPy aligns them, or so many elements after it."""
    memory = np.zeros(math.prod(shape) * np.dtype(dtype).itemsize + 2048, np.uint8)
    start = -memory.ctypes.data % 256 + offset * np.dtype(dtype).itemsize
    array = memory[start : start + math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
    array[...] = np.arange(array.size).reshape(shape) % 5 - 2
    return array.view(OnDevice)


class Planned:
    """nvmath-python's Matmul, as its source has it: column by column, into c, a bias for each row."""

    made: list[Planned] = []  # noqa: RUF012 - what the tests look at
    fails: str | None = None

    def __init__(self, a: Any, b: Any, c: Any, *, beta: float, options: dict[str, Any], stream: Any) -> None:
        assert beta == 0
        assert options["inplace"]
        assert all(matrix.flags.f_contiguous for matrix in (a, b, c))
        self.operands: Any = (a, b, c)
        self.options, self.stream, self.freed = options, stream, False
        self.made.append(self)
        self._fail("making")

    def plan(self, *, epilog: str, epilog_inputs: dict[str, Any], stream: Any) -> None:
        assert epilog == "BIAS"
        assert stream is self.stream
        self.bias = epilog_inputs["bias"]
        self._fail("planning")

    def reset_operands_unchecked(self, *, a: Any, b: Any, c: Any, epilog_inputs: dict[str, Any]) -> None:
        assert [old is None or old.shape == new.shape for old, new in zip(self.operands, (a, b, c), strict=True)]
        self.operands, self.bias = (a, b, c), epilog_inputs["bias"]

    def execute(self, *, release_workspace: bool) -> None:
        assert release_workspace
        assert not self.freed
        self._fail("executing")
        a, b, c = self.operands
        c[...] = a @ b + self.bias[:, None]

    def release_operands(self) -> None:
        self.operands, self.bias = (None, None, None), None

    def free(self) -> None:
        assert not self.freed
        self.freed = True

    def _fail(self, step: str) -> None:
        if self.fails == step:
            raise MemoryError(step)


class TestFusedBias:
    """The gate, the plans and the way back where nvmath-python has none; its products are NumPy's."""

    @pytest.fixture(autouse=True)
    def _stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = 0
        cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=self.stream), Stream=lambda **_: object())
        monkeypatch.setattr(cublaslt, "cupy", SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(cublaslt, "_WORK", 1)
        monkeypatch.setattr(cublaslt, "_local", SimpleNamespace())
        advanced = SimpleNamespace(Matmul=Planned, MatmulEpilog=SimpleNamespace(BIAS="BIAS"))
        monkeypatch.setattr(cublaslt, "_nvmath", lambda: advanced)
        monkeypatch.setattr(Planned, "made", [])
        monkeypatch.setattr(kernel, "cupy", NumpyWithCublas())

    def operands(self, N: int = 3, **options: Any) -> Any:
        return on_device(N, 8, **options), on_device(8, 16, **options), on_device(16, **options)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_fills_y(self, dtype: str) -> None:
        x, W, b = self.operands(dtype=dtype)
        y = on_device(3, 16, dtype=dtype)
        assert cublaslt.fill(y, x, W, b)
        assert (y == x @ W + b).all()
        assert kernel.forward(x, W, b, y) is y
        assert len(Planned.made) == 1

    def test_nothing_is_held_after_a_call(self) -> None:
        x, W, b = self.operands()
        cublaslt.fill(on_device(3, 16), x, W, b)
        assert Planned.made[0].operands == (None, None, None)

    def test_planning_waits_for_a_stream_of_its_own(self) -> None:
        cublaslt.fill(on_device(3, 16), *self.operands())
        assert Planned.made[0].stream is not None

    def test_the_latest_plans_are_kept(self) -> None:
        many = cublaslt._PLANS + 1
        for N in (*range(1, many), 1, many):  # one too many, after the first was used again
            assert cublaslt.fill(on_device(N, 16), *self.operands(N))
        assert len(Planned.made) == many
        assert [plan.freed for plan in Planned.made] == [False, True, *[False] * (many - 2)]

    def test_modes_have_plans_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        y, operands = on_device(3, 16), self.operands()
        cublaslt.fill(y, *operands)
        monkeypatch.setattr(cublaslt, "_is_cut_to_tf32", lambda _: True)
        names = SimpleNamespace(ComputeType=SimpleNamespace(COMPUTE_32F_FAST_TF32="TF32"))
        monkeypatch.setitem(sys.modules, "nvmath.linalg", names)
        cublaslt.fill(y, *operands)
        assert ["compute_type" in plan.options for plan in Planned.made] == [False, True]

    def test_each_thread_has_its_plans(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cublaslt, "_local", threading.local())
        y, operands = on_device(3, 16), self.operands()
        for _ in range(2):
            thread = threading.Thread(target=cublaslt.fill, args=(y, *operands))
            thread.start()
            thread.join(60)
        assert len(Planned.made) == 2

    @pytest.mark.parametrize(
        ("why", "y", "operands"),
        [
            ("a row of 12 bytes", (3, 3), [(3, 8), (8, 3), (3,)]),
            ("memory between two elements", (3, 16), [(3, 8), (8, 16), (16,)]),
            ("rows of x apart", (3, 16), [(3, 8), (8, 16), (16,)]),
            ("another dtype", (3, 16), [(3, 8), (8, 16), (16,)]),
        ],
    )
    def test_what_does_not_fit_is_left_alone(self, why: str, y: Any, operands: Any) -> None:
        dtype = "float64" if why == "another dtype" else "float32"
        offset = int(why == "memory between two elements")
        x, W, b = (on_device(*shape, dtype=dtype, offset=offset) for shape in operands)
        if why == "rows of x apart":
            x = on_device(6, 8)[::2]
        out = on_device(*y, dtype=dtype)
        before = out.copy()
        assert not cublaslt.fill(out, x, W, b)
        assert (out == before).all()
        assert not Planned.made
        assert (kernel.forward(x, W, b, out) == x @ W + b).all()

    def test_small_products_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cublaslt, "_WORK", 3 * 8 * 16 + 1)
        assert not cublaslt.fill(on_device(3, 16), *self.operands())

    @pytest.mark.parametrize("step", ["making", "planning", "executing"])
    def test_failure_leads_the_plain_way(self, monkeypatch: pytest.MonkeyPatch, caplog: Any, step: str) -> None:
        monkeypatch.setattr(Planned, "fails", step)
        x, W, b = self.operands()
        for _ in range(2):
            assert (kernel.forward(x, W, b, on_device(3, 16)) == x @ W + b).all()
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == (2 if step == "executing" else 1)
        assert all(f"MemoryError('{step}')" in line for line in told)
        assert len(Planned.made) == 1  # what cannot be planned is tried once
        assert Planned.made[0].freed == (step == "planning")
        monkeypatch.setattr(Planned, "fails", None)
        for N in range(10, 10 + cublaslt._PLANS):  # and forgotten in its turn
            cublaslt.fill(on_device(N, 16), *self.operands(N))
        assert cublaslt.fill(on_device(3, 16), x, W, b)


@pytest.mark.parametrize("error", [None, ImportError, OSError, RuntimeError])
def test_nvmath_may_be_missing_or_broken(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def load(name: str) -> Any:
        if error is not None:
            raise error(name)
        return name

    monkeypatch.setattr(cublaslt.importlib, "import_module", load)
    cublaslt._nvmath.cache_clear()
    assert cublaslt._nvmath() == (None if error else "nvmath.linalg.advanced")
    cublaslt._nvmath.cache_clear()


def test_nvmath_takes_what_it_is_given() -> None:
    """Its own signatures and names, since no CPU runs it."""
    advanced: Any = pytest.importorskip("nvmath.linalg.advanced", reason="nvmath-python, which is optional, is missing")
    source = inspect.getsource(cublaslt)
    matmul, none = advanced.Matmul, inspect.Parameter.empty
    inspect.signature(matmul.__init__).bind(None, none, none, none, beta=0.0, options={}, stream=None)
    inspect.signature(matmul.plan).bind(None, epilog=advanced.MatmulEpilog.BIAS, epilog_inputs={}, stream=None)
    inspect.signature(matmul.reset_operands_unchecked).bind(None, a=none, b=none, c=none, epilog_inputs={})
    inspect.signature(matmul.execute).bind(None, release_workspace=True)
    for method in (matmul.release_operands, matmul.free):
        inspect.signature(method).bind(None)
    tf32 = importlib.import_module("nvmath.linalg").ComputeType.COMPUTE_32F_FAST_TF32
    options = advanced.MatmulOptions(**cublaslt._options(tf32=True))
    assert (options.inplace, options.memory_limit, options.compute_type) == (True, 32 << 20, tf32)
    assert "compute_type" not in cublaslt._options(tf32=False)
    for call in ("beta=0.0, options=", "epilog=advanced.MatmulEpilog.BIAS, epilog_inputs=", "release_workspace=True"):
        assert call in source


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_fused_products_are_exact_on_integers(backend: Any, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    if cublaslt._nvmath() is None:
        pytest.skip("nvmath-python is not installed, or finds no cuBLASLt")
    monkeypatch.setattr(cublaslt, "_WORK", 1)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    for seed in range(4):
        case = make_case((64, 32), 48, seed=seed, dtypes=dtype, values="units")
        x, W, b = (o.on(backend) for o in (case.x, case.W, case.b))
        cupy.cuda.Device().synchronize()
        with streams[seed % 2]:
            y = cupy.empty((64, 48), x.dtype)
            assert cublaslt.fill(y, x, W, b)
        streams[seed % 2].synchronize()
        assert worst_error(backend.to_numpy(y), case.exact()["y"])[0] == 0


def test_tf32_is_what_cupy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    linalg = cupy._core._routines_linalg
    assert not cublaslt._is_cut_to_tf32(np.dtype("float32"))
    monkeypatch.setattr(linalg, "get_compute_type", lambda _: linalg.COMPUTE_TYPE_TF32)
    assert cublaslt._is_cut_to_tf32(np.dtype("float32"))
    assert not cublaslt._is_cut_to_tf32(np.dtype("float16"))


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


def test_blocks_of_dask_stay_on_the_device(backend: Any) -> None:
    da = pytest.importorskip("dask.array", reason="dask is not installed on this machine")
    case = make_case((6, 3), 4, seed=1)
    dy, x, W, b = (o.on(backend) for o in (case.dy, case.x, case.W, case.b))
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
    dy, x, W, b = (o.on(backend, second) for o in (case.dy, case.x, case.W, case.b))
    layer = AffineLayer(W, b)
    results = {"y": layer.forward(x), "dx": layer.backward(dy), "dW": layer.dW, "db": layer.db}
    for name, result in results.items():
        assert result.device == second
        assert worst_error(backend.to_numpy(result), case.exact()[name])[0] == 0, name
