"""The backend CuPy: on a GPU, or without one on the stand-in for CuPy (``tests/cupy_standin``).

The last class compares the stand-in with the CuPy that is installed, which needs no GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np
import pytest
from hypothesis import given

import xaffine
from tests.conftest import STAND_IN, cupy_is_stand_in
from tests.helpers import case_on
from xaffine import AffineLayer, affine, affine_backward, affine_jvp, affine_vjp, backends, curvature, per_sample
from xaffine._command import clock
from xaffine.backends import Backend
from xaffine.backends import cupy as module
from xaffine.backends.cupy import BACKEND
from xaffine.testing import checks, make_case
from xaffine.testing.cases import FEATURES, worst_error
from xaffine.testing.strategies import cases

without_gpu = pytest.mark.skipif(cupy.cuda.is_available(), reason="this machine has a CUDA device, or pretends to")


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
    with pytest.raises(RuntimeError) as caught:
        backends.get("cupy")
    found, advice = str(caught.value).split("\n")
    assert found.endswith(f"finds no CUDA device ({count})" if count else "finds no CUDA device")
    assert advice.startswith("It needs an NVIDIA GPU, and a driver for its CUDA")


@pytest.fixture
def devices(backend: Backend) -> list[Any]:
    """Two devices, the first of which is the current one."""
    if len(backend.devices) < 2:
        pytest.skip("this machine has one CUDA device")
    return backend.devices[:2]


@pytest.fixture
def math_modes(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:  # noqa: ARG001 - a GPU
    """The math mode of cuBLAS in each product, as long as the test runs; afterwards it is what it was before."""
    cublas, handle, modes = cupy.cuda.cublas, cupy.cuda.get_cublas_handle(), list[int]()
    before, dot = cublas.getMathMode(handle), cupy.ndarray.dot

    def noting_dot(self: Any, b: Any, out: Any = None) -> Any:
        modes.append(cublas.getMathMode(cupy.cuda.get_cublas_handle()))
        return dot(self, b, out)

    monkeypatch.setattr(cupy.ndarray, "dot", noting_dot)
    yield modes
    cublas.setMathMode(handle, before)


def fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("called")


class TestProducts:
    """Products of halves are added up in float32, and write into buffers where CuPy needs no memory beside them."""

    @pytest.mark.parametrize(
        ("dtype", "mode"), [("float16", 16), ("bfloat16", 16), ("float32", 0), ("float64", 0), ("complex64", 0)]
    )
    @pytest.mark.parametrize("of_user", [0, 2])
    def test_of_halves_forbid_sums_in_half_precision(
        self, backend: Backend, math_modes: list[int], dtype: str, mode: int, of_user: int
    ) -> None:
        handle = cupy.cuda.get_cublas_handle()
        cupy.cuda.cublas.setMathMode(handle, of_user)
        x, W, dy = (cupy.ones(shape, backend.dtype(dtype)) for shape in ((2, 3), (3, 4), (2, 4)))
        affine(x, W)
        affine_backward(dy, x, W)
        assert math_modes == [mode | of_user] * 3
        assert cupy.cuda.cublas.getMathMode(handle) == of_user

    def test_forbid_it_on_the_device_of_their_operands(self, devices: list[Any], math_modes: list[int]) -> None:
        with devices[1]:
            x, W = cupy.ones((2, 3), "float16"), cupy.ones((3, 4), "float16")
        affine(x, W)
        assert math_modes == [16]

    def test_leave_the_mode_to_the_user_when_they_fail(self, math_modes: list[int]) -> None:
        handle = cupy.cuda.get_cublas_handle()
        cupy.cuda.cublas.setMathMode(handle, 3)
        x = cupy.ones((2, 3), "float16")
        with pytest.raises(ValueError, match="Axis dimension mismatch"):
            BACKEND.product(x, x)
        assert math_modes == [19]
        assert cupy.cuda.cublas.getMathMode(handle) == 3

    @pytest.mark.usefixtures("backend")
    def test_of_single_halves_are_not_left_to_cupy(self) -> None:
        x, W = cupy.asarray([[257, -257, 1]], "float16"), cupy.asarray([[257], [257], [1]], "float16")
        assert np.isnan(x.dot(W).get())  # CuPy rounds each product to float16, where 257² is infinite
        assert affine(x, W).tolist() == [[1]]
        assert affine_backward(x, x[:, :1], W.T, wrt="x").dx.tolist() == [[1]]
        assert affine_backward(x.T, W, W[:1], wrt="W").dW.tolist() == [[1]]

    @pytest.mark.usefixtures("backend")
    @pytest.mark.parametrize(
        ("shape", "dtype", "of", "fills"),
        [
            ((2, 3), "float32", "float32", True), ((2, 3), "float16", "float16", True),
            ((6,), "float32", "float32", True),
            ((2, 3), "float32", "float64", False), ((1, 1), "float32", "float32", False),
            ((2, 3), "int32", "int32", False), ((2, 3), "uint8", "uint8", False),
        ],
    )  # fmt: skip
    def test_fill_buffers_where_cupy_needs_no_more_memory(self, shape: Any, dtype: str, of: str, fills: bool) -> None:
        out = cupy.zeros(shape, dtype)
        assert (BACKEND.buffer(out, None, np.dtype(of)) is not None) is fills
        if len(shape) == 2:
            assert BACKEND.buffer(out[:, ::-1], None, np.dtype(of)) is None
            x, W = cupy.ones((shape[0], 2), of), cupy.ones((2, shape[1]), of)
            if dtype == of:
                assert affine(x, W, out=out) is out
                assert out.tolist() == [[2] * shape[1]] * shape[0]

    @pytest.mark.usefixtures("backend")
    def test_copy_once_what_cublas_cannot_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        copies, copy = [], cupy.ndarray.copy
        monkeypatch.setattr(cupy.ndarray, "copy", lambda array, *args: copies.append(array) or copy(array, *args))
        dy = cupy.broadcast_to(cupy.ones((), "f"), (3, 4))
        x, W = cupy.ones((3, 2), "f"), cupy.ones((2, 4), "f")
        dx, dW, db = affine_backward(dy, x, W, W[0])
        assert len(copies) == 1
        assert (dx.tolist(), dW.tolist(), db.tolist()) == ([[4, 4]] * 3, [[3] * 4] * 2, [3] * 4)
        affine(x[:, ::-1], W[::-1])
        assert len(copies) == 3
        affine_backward(dx, x[:, ::-1], x[:2].T, wrt="x")  # x is not read, and what is transposed need not be copied
        assert len(copies) == 3

    def test_memory_that_runs_out_leaves_buffers_alone(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        x, W, dy = (cupy.ones(shape, "float32") for shape in ((2, 3), (3, 4), (2, 4)))
        long = cupy.ones((40_000, 4), "float32")
        buffers = cupy.zeros((2, 3), "float32"), cupy.zeros((40_000, 3), "float32"), cupy.zeros(4, "float32")
        monkeypatch.setattr(cupy, "empty", fail)
        with pytest.raises(AssertionError, match="called"):
            affine_backward(dy, x, W, out=(buffers[0], None, None))
        with pytest.raises(AssertionError, match="called"):  # memory for partial sums
            affine_backward(
                long, long[:, :3], W, buffers[2], wrt="xb", out=(buffers[1], None, cupy.zeros_like(buffers[2]))
            )
        assert not any(backend.to_numpy(buffer).any() for buffer in buffers)


class TestCompiledKernels:
    """The bias is added, and rows are added up, by kernels that are compiled from C++."""

    @pytest.mark.parametrize(("large", "long"), [(0, 0), (module._LARGE, module._LONG)])
    def test_agree_with_the_primitives_of_the_standard(
        self, backend: Backend, monkeypatch: pytest.MonkeyPatch, large: int, long: int
    ) -> None:
        monkeypatch.setattr(module, "_LARGE", large)
        monkeypatch.setattr(module, "_LONG", long)
        monkeypatch.setattr(module, "_EACH", 1)

        matrices = set(FEATURES) - {"vectors", "tensors", "last-axis"}

        @given(cases(backend.dtypes(), mixed=False, supports=matrices, batch_axes=False))
        def agree(case: Any) -> None:
            pairs = ((each.product, each.sum_rows) for each in (backend, Backend(backend.namespace)))
            checks.primitives_agree(*pairs, case, backend)

        agree()

    @pytest.mark.parametrize(
        "dtype", ["bfloat16", "float16", "float32", "float64", "complex64", "complex128", "int8", "int64"]
    )
    def test_are_exact_on_integers(self, backend: Backend, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
        exact = "complex64" if dtype.startswith("complex") else "float32"
        for N, m in (
            (1, 1),
            (3, 5),
            (511, 3),
            (512, 7),
            (4097, 10),
            (2**17, 1),
            (70001, 3),
            (600, 1000),
            (513, 4096),
            (513, 1001),
        ):
            columns = cupy.arange(m, dtype="float32") % 5 - 2
            # Small sums of small integers: y = a c, whose rows are all -1, then all 1, and the last the columns.
            wide_a, wide_c = cupy.zeros((N + 1, 2), "float32"), cupy.ones((2, m), "float32")
            wide_a[:N, 0], wide_a[: N // 2, 0], wide_a[N, 1], wide_c[1] = 1, -1, 1, columns
            wide = wide_a.dot(wide_c)
            a, c, y, b = (each.astype(backend.dtype(dtype)) for each in (wide_a, wide_c, wide, columns))
            for first, (threads, each) in itertools.product((0, 1), ((1 << 18, 64), (1 << 18, 1), (5, 1))):
                if N * m > 50_000 and threads == 5:
                    continue
                monkeypatch.setattr(module, "_THREADS", threads)
                monkeypatch.setattr(module, "_EACH", each)
                dy = y[first : N + first]  # from 1 on, where no pack begins
                db = backend.sum_rows(dy)
                expected = wide[first : N + first].sum(axis=0)
                assert bool((db.astype(exact) == expected).all()), (N, m, first, threads, each)
                across = backend.sum_rows(dy.T.copy().T)
                assert bool((across == db).all()), (N, m, first, threads, each)
                out = cupy.zeros_like(y)[first:]
                assert backend.product(a[first:], c, b, out) is out
                assert bool((out.astype(exact) == wide[first:] + columns).all()), (N, m, first, threads, each)

    @pytest.mark.usefixtures("backend")
    def test_round_sums_of_rows_less_than_one_sum(self) -> None:
        N = 20_000_000
        in_a_thread = -(-N // module._THREADS), module._THREADS // module._BLOCK  # additions, in either stage
        roundings = sum(in_a_thread) + module._BLOCK.bit_length()
        for value, units in ((1.0, 0), (0.1, roundings)):  # one sum is off by 11330
            db = cupy.empty(2, "float32")
            BACKEND.sum_rows(cupy.full((N, 2), value, "float32"), db)
            exact = float(np.float32(value)) * N
            assert abs(float(db[0]) - exact) <= units * 2.0**-24 * exact

    @pytest.mark.usefixtures("backend")
    def test_are_not_handed_memory_where_no_pack_may_begin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = cupy.zeros(1 + 40_000 * 3, "float32")
        x, W, b = cupy.ones((40_000, 1), "float32"), cupy.ones((1, 3), "float32"), cupy.ones(3, "float32")
        y = memory[1:].reshape(40_000, 3)
        summed, add_rows_up = [], module._add_rows_up
        monkeypatch.setattr(module, "_add_to_rows", fail)

        def noting(dy: Any, parts: Any, **size: int) -> Any:
            summed.append(dy)
            return add_rows_up(dy, parts, **size)

        monkeypatch.setattr(module, "_add_rows_up", noting)
        assert BACKEND.product(x, W, b, y) is y
        assert bool((y == 2).all())
        assert BACKEND.sum_rows(y).tolist() == [80_000] * 3
        assert [module._is_aligned(dy) for dy in summed] == [True] * len(summed)
        assert summed

    @pytest.mark.usefixtures("backend")
    @pytest.mark.parametrize(("N", "n", "m"), [(0, 2, 3), (600, 2, 0), (0, 0, 0)])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_are_not_needed_for_empty_arrays(self, N: int, n: int, m: int, dtype: str) -> None:
        x, W, b, dy = (cupy.ones(shape, dtype) for shape in ((N, n), (n, m), m, (N, m)))
        assert BACKEND.product(x, W, b).shape == (N, m)
        assert BACKEND.sum_rows(dy).tolist() == [0] * m

    @pytest.mark.parametrize("dtype", ["float16", "float64", "complex128"])
    def test_read_packs_at_multiples_of_their_bytes(self, dtype: str) -> None:
        for at in range(33):
            pointer = SimpleNamespace(ptr=0x7F00_0000_0000 + at)
            array = SimpleNamespace(data=pointer, dtype=np.dtype(dtype))
            assert module._is_aligned(array) == (at % max(8, np.dtype(dtype).itemsize) == 0)


def test_the_device_of_the_operands_is_entered(backend: Backend, devices: list[Any]) -> None:
    with devices[1]:
        x = cupy.ones(2)
    with backend.on_device_of(x):
        assert cupy.ones(2).device == devices[1]
    assert cupy.ones(2).device == devices[0]


@pytest.mark.usefixtures("backend")
def test_memory_is_known_by_its_addresses_alone() -> None:
    def some(memory: Any) -> list[Any]:
        rows = memory.reshape(8, 6)
        xp = np if isinstance(memory, np.ndarray) else cupy
        return [
            memory, memory[:0], memory[5:], rows[:4], rows[4:], rows[:, :3], rows[:, 3:], rows[::2], rows[1::2],
            rows[::-1, 3:], rows[3::-1], rows[:4:-1, ::-1], rows[2:3, 1:2], rows[:0, ::-1], rows.T[::2],
            xp.broadcast_to(memory[7:8], (3, 2)), xp.broadcast_to(memory[47:], (3, 1)),
        ]  # fmt: skip

    pairs = list(zip(some(np.arange(48)), some(cupy.zeros(48, "float32")), strict=True))
    for i, (elements, array) in enumerate(pairs):
        assert BACKEND.overlaps_itself(array) == (len(set(elements.flat)) < elements.size), i
        for k, (others, other) in enumerate(pairs):
            shared = bool(set(elements.flat) & set(others.flat))
            assert BACKEND.share_memory(array, other) == shared, (i, k)
            assert not (BACKEND.can_fill([array], [other]) and shared), (i, k)
    first, second = (array for _, array in pairs[3:5])
    assert BACKEND.can_fill([first], [second])


def calls(backend: Backend) -> dict[str, Callable[[], Any]]:
    """Return a call of every public function that computes with arrays, by its name."""
    case = make_case((2, 2, 3), 4, seed=0)
    dy, x, W, b = case_on(case, backend)
    real = [array.astype("float32") for array in (dy, x, W, b)]
    like = cupy.ones_like
    buffers = tuple(map(cupy.empty_like, (x, W, b)))
    layer = AffineLayer(W, b)
    layer.forward(x)

    def accumulate() -> Any:
        return [layer.backward(dy, accumulate=True) for _ in range(2)], layer.dW, layer.db

    return {
        "affine": lambda: (affine(x, W, b), affine(x, W, b, out=cupy.empty_like(dy))),
        "affine_vjp": lambda: affine_vjp(x, W, b)[1](dy),
        "affine_backward": lambda: (affine_backward(dy, x, W, b), affine_backward(dy, x, W, b, out=buffers)),
        "affine_jvp": lambda: affine_jvp((x, W, b), (like(x), like(W), like(b))),
        "AffineLayer": lambda: (layer.forward(x), layer.backward(dy), accumulate()),
        "per_sample_gradients": lambda: per_sample.per_sample_gradients(*real),
        "per_sample_gradient_norms": lambda: per_sample.per_sample_gradient_norms(*real),
        "clipped_gradients": lambda: per_sample.clipped_gradients(*real, max_norm=1.0),
        "affine_double_backward": lambda: curvature.affine_double_backward((like(x), like(W), like(b)), dy, x, W, b),
        "gauss_newton_vector_product": lambda: curvature.gauss_newton_vector_product(
            (like(x), like(W), like(b)), lambda y_dot: y_dot, x, W, b
        ),
        "kronecker_factors": lambda: curvature.kronecker_factors(*real),
    }


READS = ("get", "item", "tolist", "__bool__", "__float__", "__int__", "__complex__", "__array__")


def arrays_among(results: Any) -> list[Any]:
    """Return the arrays in tuples and lists."""
    if isinstance(results, (tuple, list)):
        return [array for each in results for array in arrays_among(each)]
    return [] if results is None else [results]


def test_no_function_waits_for_the_device_or_goes_through_the_host(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = calls(backend)
    modules = xaffine, per_sample, curvature
    public = {name: getattr(module, name) for module in modules for name in module.__all__}
    assert set(some) == {
        name for name, each in public.items()
        if callable(each) and not (isinstance(each, type) and issubclass(each, tuple))
    }  # fmt: skip
    expected = {name: [array.get() for array in arrays_among(call())] for name, call in some.items()}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("read on the host")

    results = {}
    with monkeypatch.context() as patch:
        for way in READS:
            patch.setattr(cupy.ndarray, way, refuse)
        if cupy_is_stand_in():  # which calls this wherever the host waits
            patch.setattr(cupy._core, "host_waits", refuse)
        with pytest.raises(AssertionError, match="read on the host"):
            bool(cupy.ones(()))
        for name, call in some.items():
            results[name] = arrays_among(call())
    for name, arrays in results.items():
        assert all(type(array) is cupy.ndarray for array in arrays), name
        if name != "AffineLayer":  # whose sums grow
            assert all((array.get() == e).all() for array, e in zip(arrays, expected[name], strict=True)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_layers_are_made_and_loaded_on_their_device(
    backend: Backend, devices: list[Any], tmp_path: Path, dtype: str
) -> None:
    first, second = (AffineLayer.random(3, 2, backend="cupy", device=device, dtype=dtype, seed=0) for device in devices)
    second.save(tmp_path / "layer.safetensors")
    for layer in (second, AffineLayer.load(tmp_path / "layer.safetensors", backend="cupy", device=devices[1])):
        assert [layer.W.device, layer.b.device] == [devices[1]] * 2
        assert layer.W.dtype == layer.b.dtype == backend.dtype(dtype)
        assert (backend.to_numpy(layer.W) == backend.to_numpy(first.W)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", None])
@pytest.mark.parametrize("of", ["the same", "NumPy"])
def test_layers_change_their_dtype_and_device_as_they_are_told(
    backend: Backend, devices: list[Any], dtype: str | None, of: str
) -> None:
    W = np.arange(12, dtype="float32").reshape(3, 4)[:, ::2]
    for start, target in itertools.product(devices, (None, *devices)):
        layer = AffineLayer(W if of == "NumPy" else backend.from_numpy(W, device=start))
        moved = layer.to("cupy", device=target, dtype=dtype).W
        assert moved.device == (target or (devices[0] if of == "NumPy" else start))
        assert moved.dtype == backend.dtype(dtype or "float32")
        assert (backend.to_numpy(moved) == W).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda W: W[:, ::2], lambda W: W[::-1], lambda W: W.T, lambda W: W.T[::2], lambda W: W[1:, 1:],
        lambda W: cupy.broadcast_to(W[:1], W.shape), lambda W: W[:0, ::2],
    ],
)  # fmt: skip
def test_weights_that_lie_in_any_way_change_devices(backend: Backend, devices: list[Any], view: Any) -> None:
    for start, target in itertools.permutations(devices):
        with start:
            W = view(cupy.arange(12, dtype="float32").reshape(3, 4))
        moved = AffineLayer(W).to("cupy", device=target).W
        assert moved.device == target
        assert (backend.to_numpy(moved) == backend.to_numpy(W)).all()
        assert cupy.cuda.Device() == devices[0]


def test_hessian_of_the_user_is_called_on_the_device_of_the_operands(backend: Backend, devices: list[Any]) -> None:
    _, x, W, b = case_on(make_case((2, 3), 4, seed=0), backend, devices[1])
    seen = []

    def hessian_vector_product(y_dot: Any) -> Any:
        seen.append(cupy.ones(2).device)
        return y_dot + y_dot

    product = curvature.gauss_newton_vector_product((x, W, b), hessian_vector_product, x, W, b)
    assert seen == [devices[1]]
    assert {array.device.id for array in product} == {devices[1].id}
    assert cupy.cuda.Device() == devices[0]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("capability", "has"), [("70", False), ("75", False), ("80", True), ("90", True), ("120", True)]
)
def test_bfloat16_is_offered_where_cublas_has_it(capability: str, has: bool) -> None:
    device = SimpleNamespace(compute_capability=capability)
    assert ("bfloat16" in BACKEND.missing_on(device)) is not has


def test_own_device_is_asked_for_bfloat16(backend: Backend) -> None:
    lacking = {"bfloat16"} if int(cupy.cuda.Device().compute_capability) < 80 else set()
    for device in (None, *backend.devices):
        assert {"bfloat16", "float16", "float32"} - set(backend.dtypes(device)) == lacking


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


def test_arrays_on_two_devices_are_refused(backend: Any, devices: list[Any]) -> None:
    x, W = (backend.from_numpy(np.ones(shape), device=d) for shape, d in zip(((2, 3), (3, 4)), devices, strict=True))
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


@pytest.mark.parametrize("layout", ["C", "Fortran", "reversed", "strided"])
def test_operands_of_a_device_that_is_not_the_current_one(backend: Any, devices: list[Any], layout: str) -> None:
    case = make_case((3, 2, 3), 4, seed=0)
    dy, x, W, b = (replace(o, layout=layout).on(backend, devices[1]) for o in (case.dy, case.x, case.W, case.b))
    layer = AffineLayer(W, b)
    results = {"y": layer.forward(x), "dx": layer.backward(dy), "dW": layer.dW, "db": layer.db}
    for name, result in results.items():
        assert result.device == devices[1]
        assert worst_error(backend.to_numpy(result), case.exact()[name])[0] == 0, name


def test_checks_copy_nothing(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run on the current device, whichever that of the operands is."""
    x, W, dy = cupy.ones((4, 6), "f")[:, ::2], cupy.ones((6, 4), "f")[::2], cupy.ones((4, 8), "f")[:, ::2]
    monkeypatch.setattr(backend, "plans", {})
    monkeypatch.setattr(type(backend), "run", lambda _, step, *__: (None,) * len(step.results))
    for way in ("copy", "astype"):
        monkeypatch.setattr(cupy.ndarray, way, fail)
    _, vjp = affine_vjp(x, W)
    vjp(dy)
    affine_jvp((x, W), (x, W))
    assert backend.plans


class LeavesItsDevice(AffineLayer):
    """A layer that is right but for the device of one of its results."""

    name: str = ""

    def forward(self, x: Any, **options: Any) -> Any:
        return self.elsewhere("y", super().forward(x, **options))

    def backward(self, dy: Any, **options: Any) -> Any:
        dx = super().backward(dy, **options)
        self.dW, self.db = self.elsewhere("dW", self.dW), self.elsewhere("db", self.db)
        return self.elsewhere("dx", dx)

    def elsewhere(self, name: str, result: Any) -> Any:
        return backends.get("cupy").from_numpy(result.get()) if name == self.name else result


@pytest.mark.parametrize("name", ["y", "dx", "dW", "db"])
def test_results_on_another_device_are_found(backend: Backend, devices: list[Any], name: str) -> None:
    make = type("Kernel", (LeavesItsDevice,), {"name": name})
    case = make_case((3, 2), 4, seed=0)
    with pytest.raises(AssertionError, match=f"{name} is on .*, not CUDA Device {devices[1].id}"):
        checks.results_match_their_primals(make, case, backend, devices[1])
    assert checks.results_match_their_primals(AffineLayer, case, backend, devices[1]) == 0


def test_dtypes_are_those_of_the_device_that_weights_are_on(
    devices: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cupy_is_stand_in():
        pytest.skip("the GPUs of a machine are as they are")
    old, new = (AffineLayer.random(3, 2, backend="cupy", device=device, seed=0) for device in devices)
    halves = [layer.to("cupy", dtype="bfloat16") for layer in (old, new)]
    monkeypatch.setattr(cupy.cuda.Device, "compute_capability", property(lambda self: "90" if self.id else "70"))
    assert new.to("cupy", dtype="bfloat16").W.dtype == halves[0].W.dtype
    assert halves[1].to("cupy").W is halves[1].W
    for layer, device in ((old, None), (new, devices[0]), (AffineLayer(old.W.get()), None)):
        with pytest.raises(ValueError, match="cupy has no dtype 'bfloat16'"):
            layer.to("cupy", device=device, dtype="bfloat16")


def test_weights_of_other_libraries_go_straight_to_their_device(
    backend: Backend, devices: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Any] = []
    from_numpy = type(backend).from_numpy
    monkeypatch.setattr(
        type(backend), "from_numpy",
        lambda self, array, *, device=None: [places.append(device), from_numpy(self, array, device=device)][1],
    )  # fmt: skip
    layer = AffineLayer(np.ones((3, 2)), np.ones(2)).to("cupy", device=devices[1], dtype="bfloat16")
    assert places == [devices[1]] * 2
    assert [layer.W.device, layer.b.device] == [devices[1]] * 2


@pytest.fixture(scope="module")
def stand_in() -> types.ModuleType:
    """The stand-in, imported beside CuPy under a name of its own."""
    if cupy_is_stand_in():
        pytest.skip("compares the stand-in with the CuPy that is installed")
    spec = importlib.util.spec_from_file_location("cupy_standin", STAND_IN / "cupy" / "__init__.py")
    assert spec is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def types_of(ops: Any) -> list[str]:
    """Return the loops of a function of CuPy as text, without those of structures, of which the stand-in has none."""
    sides = [(op.in_types, op.out_types) for op in ops.ops if np.void not in op.in_types]
    return ["->".join("".join(np.dtype(dtype).char for dtype in side) for side in pair) for pair in sides]


class TestTheStandIn:
    """It has nothing that CuPy lacks, and takes the same dtypes to the same results."""

    def functions(self, stand_in: types.ModuleType) -> dict[str, tuple[Any, Any]]:
        """Return the elementwise functions of the stand-in beside those of CuPy."""
        own, search = stand_in._core, importlib.import_module("cupy._sorting.search")
        pairs = {name: (ufunc, getattr(cupy, name)) for name, ufunc in own.UFUNCS.items()}
        pairs["where"] = own.where_ufunc, search._where_ufunc
        pairs["copy"] = own.elementwise_copy, cupy._core.core.elementwise_copy
        return pairs

    def test_has_the_loops_of_cupy(self, stand_in: types.ModuleType) -> None:
        for name, (own, real) in self.functions(stand_in).items():
            assert own.types == types_of(real._ops), name

    def test_reduces_the_dtypes_that_cupy_reduces(self, stand_in: types.ModuleType) -> None:
        mathematics, statistics, logic = (
            importlib.import_module(f"cupy._core._routines_{name}") for name in ("math", "statistics", "logic")
        )
        real = {
            "sum": mathematics.sum_auto_dtype, "prod": mathematics.prod_auto_dtype, "max": statistics.amax,
            "min": statistics.amin, "all": logic.all, "any": logic.any,
        }  # fmt: skip
        assert {name: types_of(each._ops) for name, each in real.items()} == stand_in._core.REDUCTIONS
        for each in (mathematics._sum_keep_dtype, mathematics._prod_keep_dtype):
            assert types_of(each._ops) == stand_in._core.REDUCTIONS_IN_A_DTYPE

    def test_chooses_the_loop_that_cupy_chooses(self, stand_in: types.ModuleType) -> None:
        dtypes = [*map(np.dtype, "?bBhHiIlLefdFD"), stand_in._core.BFLOAT16]
        weak = {int: np.dtype(int), float: np.dtype(float), complex: np.dtype(complex)}
        operands = [*((dtype, None) for dtype in dtypes), *((dtype, kind) for kind, dtype in weak.items())]

        def chosen(search: Callable[[], Any]) -> Any:
            try:
                return search()
            except TypeError:
                return None

        for name, (own, real) in self.functions(stand_in).items():
            for pairs in itertools.product(operands, repeat=own.nin) if own.nin < 3 else ():
                ours = chosen(lambda pairs=pairs, own=own: own._search(*zip(*pairs, strict=True)))
                loop = real._ops._guess_routine_from_in_types(*zip(*pairs, strict=True))
                if loop is not None and loop.error_func is not None:
                    assert ours is None, (name, pairs)
                else:
                    theirs = loop and tuple(tuple(map(np.dtype, side)) for side in (loop.in_types, loop.out_types))
                    assert ours == theirs, (name, pairs)

    def test_has_no_name_that_cupy_lacks(self, stand_in: types.ModuleType) -> None:
        def public(namespace: Any) -> set[str]:
            return {name for name in vars(namespace) if not name.startswith("_")}

        assert public(stand_in) - public(cupy) <= {"np", "sys", "types"}
        for name in ("ndarray", "cuda.Device", "cuda.Stream", "cuda.Event", "cuda.runtime", "cuda.memory", "random"):
            own, real = stand_in, cupy
            for part in name.split("."):
                own, real = getattr(own, part), getattr(real, part)
            assert [each for each in public(own) if not hasattr(real, each)] == [], name

    def test_functions_take_no_argument_that_those_of_cupy_do_not(self, stand_in: types.ModuleType) -> None:
        compared = []
        for name, own in stand_in._core.FUNCTIONS.items():
            real = getattr(cupy, name)
            if isinstance(own, types.FunctionType) and isinstance(real, types.FunctionType):
                parameters, of_cupy = inspect.signature(own).parameters, inspect.signature(real).parameters
                named = [key for key, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
                assert named == list(of_cupy)[: len(named)] or set(parameters) >= {"args", "kwargs"}, name
                compared.append(name)
        assert len(compared) > 20


@pytest.mark.usefixtures("backend")
def test_events_time_a_device_whose_caches_can_be_emptied(backend: Any, device: Any) -> None:
    device = backend.devices[-1] if device is None else device
    with cupy.cuda.Device():  # which is the current one again afterwards
        stopwatch = clock.clock_of(backend, device)
        assert stopwatch.name == "device events"
        assert cupy.cuda.Device() == device
        x = cupy.ones((64, 64), "float32")
        assert 0 <= stopwatch.time(lambda count: [x.dot(x) for _ in range(count)], 2) < 10
        assert 0 <= stopwatch.time_cold(lambda _: [x.dot(x)]) < 10


def test_tf32_is_allowed_and_forbidden(backend: Any) -> None:
    linalg = sys.modules["cupy._core._routines_linalg"]
    before = linalg.get_compute_type(cupy.float32)
    try:
        backend.use_tf32()
        assert linalg.get_compute_type(cupy.float32) == linalg.COMPUTE_TYPE_TF32
        backend.use_full_precision()
        assert linalg.get_compute_type(cupy.float32) == linalg.COMPUTE_TYPE_DEFAULT
    finally:
        linalg.set_compute_type(cupy.float32, before)


def test_arrays_on_two_devices_are_refused_where_their_shapes_are_known(devices: list[Any]) -> None:
    (x, W), (_, elsewhere) = (
        [backends.get("cupy").from_numpy(np.ones(shape, "f"), device=device) for shape in ((2, 3), (3, 4))]
        for device in devices
    )
    affine(x, W)
    with pytest.raises(ValueError, match="arrays on two devices"):
        affine(x, elsewhere)


@pytest.mark.usefixtures("backend")
def test_matrices_with_gaps_have_another_signature() -> None:
    dense, gaps = cupy.ones((4, 4), "float32"), cupy.ones((8, 8), "float32")[::2, ::2]
    assert BACKEND.signature(dense) == BACKEND.signature(dense.T) != BACKEND.signature(gaps)
