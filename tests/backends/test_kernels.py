"""The kernels: each agrees with the standard one and has every property, also where it cuts tall operands in blocks."""

from __future__ import annotations

import itertools
import math
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from xaffine import AffineLayer, affine, affine_backward
from xaffine.backends import Backend, on_device_of
from xaffine.curvature import kronecker_factors
from xaffine.kernels import compiler_for, kernel_of, numpy, standard
from xaffine.per_sample import per_sample_gradients
from xaffine.testing import PROPERTIES, bounds, check_affine, checks, make_case
from xaffine.testing.strategies import cases


class OfUsers(np.ndarray):
    """A subclass as users derive them."""


@pytest.fixture
def kernel(backend: Backend, device: Any) -> Any:
    return kernel_of(backend.from_numpy(np.ones(1), device=device))


def test_backend_has_the_kernel_it_earned(backend: Backend, kernel: Any) -> None:
    own = backend.name if backend.name in ("numpy", "cupy", "torch", "dask", "ndonnx") else "standard"
    assert kernel.__name__ == f"xaffine.kernels.{own}"


def assert_agree(first: Any, second: Any, values: str, backend: Backend, device: Any = None) -> None:
    supports = {"no-bias", "empty"}
    # The bfloat16 products of NumPy's standard kernel are float32, which the layer casts.
    dtypes = [d for d in backend.dtypes(device) if (backend.name, d) != ("numpy", "bfloat16")]
    # The exact arithmetic on floats takes a time that grows with the cube of the extents.
    extent = 12 if values == "floats" else 24
    matrices = cases(dtypes, values=values, mixed=False, supports=supports, batch_axes=False, max_extent=extent)

    # Each case is put through 16 ways; exact arithmetic on floats takes its time.
    @settings(max_examples=settings().max_examples // (2 if values == "floats" else 1))
    @given(matrices)
    def agree(case: Any) -> None:
        checks.kernels_agree(first, second, case, backend, device)

    agree()


@pytest.mark.parametrize("values", ["integers", "floats"])
def test_kernel_agrees_with_the_standard_one(backend: Backend, device: Any, kernel: Any, values: str) -> None:
    if kernel is standard:
        pytest.skip("this library runs the standard kernel itself")
    if backend.name == "ndonnx":
        pytest.skip("the standard kernel takes ndonnx half a second a product; the properties test its kernel")
    assert_agree(kernel, standard, values, backend, device)


@pytest.mark.parametrize("fault", ["forward", "backward", "wanted", "swapped", "buffers", "added", "dtype"])
def test_kernels_that_disagree_are_told_apart(numpy_backend: Backend, fault: str) -> None:
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
        checks.kernels_agree(broken, standard, make_case((5, 3), 2, seed=0), numpy_backend)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after a few rows, as tall operands are cut after thousands."""
    for name, value in {"_TALL": 2, "_ROWS": 4, "_LONG": 40, "_SMALL": 200}.items():
        monkeypatch.setattr(numpy, name, value)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.name)
def test_blocks_have_every_property(prop: Any, numpy_backend: Backend) -> None:
    check_affine(AffineLayer, dtype=numpy_backend.dtypes(), max_examples=100, seed=0, properties=[prop])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("values", ["integers", "floats"])
def test_blocks_agree_with_the_standard_kernel(numpy_backend: Backend, values: str) -> None:
    assert_agree(numpy, standard, values, numpy_backend)


@pytest.mark.parametrize(("n", "m"), [(40, 1), (1, 40), (3, 2)])
@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_narrow_and_wide_operands_agree(numpy_backend: Backend, n: int, m: int) -> None:
    checks.kernels_agree(numpy, standard, make_case((31, n), m, seed=0), numpy_backend)


class TestSumOverTheBatch:
    """db of many rows, on every library: a running sum of float32 ones stops at 2²⁴, one of 0.1 is 1 % off at 10⁶."""

    def db(self, dy: Any, backend: Backend, device: Any) -> Any:
        x, W, b = (np.zeros(shape, dy.dtype) for shape in ((len(dy), 0), (0, dy.shape[1]), dy.shape[1]))
        operands = (backend.from_values(array, dy.dtype.name, device=device) for array in (dy, x, W, b))
        return backend.to_numpy(affine_backward(*operands, wrt=("b",)).db)

    def test_of_many_ones_is_their_number(self, backend: Backend, device: Any) -> None:
        if backend.name in ("ndonnx", "sparse"):
            pytest.skip(f"these take {backend.name} 20 s; the test below shows the same of 10⁶ rows")
        N = 20_000_000
        assert self.db(np.broadcast_to(np.ones(1, "f"), (N, 2)), backend, device).tolist() == [N] * 2

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
    def test_rounds_no_more_than_a_sum_in_blocks(self, backend: Backend, device: Any, dtype: str) -> None:
        """All errors have one sign here. Blocks of √N rows, and then their sums, take 2√N roundings, and a cast one."""
        if dtype not in backend.dtypes(device):
            pytest.skip(f"{backend.name} has no {dtype} there")
        N, real = 1_000_000, dtype.replace("complex64", "float32").replace("complex128", "float64")
        wide = "float32" if dtype.endswith("float16") else real
        term = backend.to_numpy(backend.from_values(np.full((1, 1), 0.04), dtype, device=device))
        total = np.abs(self.db(np.broadcast_to(term, (N, 2)), backend, device).astype(complex)).astype(float)
        exact = N * Fraction(float(np.abs(term[0, 0])))
        bound = bounds.gamma(2 * math.isqrt(N), bounds.unit_roundoff(wide)) + 2 * bounds.unit_roundoff(real)
        assert [column for column in total.tolist() if abs(Fraction(column) - exact) > bound * exact] == []

    @pytest.mark.parametrize("N", [16_385, 1_000_000])
    @pytest.mark.parametrize("dtype", ["float32", "complex64"])
    def test_so_do_products_of_narrow_operands(self, backend: Backend, device: Any, N: int, dtype: str) -> None:
        """MKL, for torch, and XLA on CPUs add up all rows of such operands one after the other."""
        if backend.name in ("dask", "ndonnx", "sparse") or dtype not in backend.dtypes(device):
            pytest.skip("how such a library multiplies is its own; or it has no such dtype")
        ones, tenths = np.ones((N, 3), dtype), np.full((N, 2), 0.1, dtype)
        dy, x, W = (backend.from_numpy(array, device=device) for array in (tenths, ones, np.zeros((3, 2), dtype)))
        results = [
            affine_backward(dy, x, W, wrt="W").dW,
            per_sample_gradients(dy[None, ...], x[None, ...], W, n_batch_axes=2).dW,
        ]
        if backend.name in ("numpy", "torch"):
            buffer = backend.from_values(np.zeros((3, 2)), dtype, device=device)
            results.append(affine_backward(dy, x, W, wrt="W", out=(None, buffer, None)).dW)
            assert results[-1] is buffer
        if dtype == "float32":
            A = kronecker_factors(x, dy, backend.xp.matrix_transpose(W)).A
            with on_device_of(A):
                results.append(10 * N * A)
        exact = N * float(tenths[0, 0].real)
        bound = float(bounds.gamma(2 * math.isqrt(N) + 4096, bounds.unit_roundoff(dtype)))
        for number, result in enumerate(results):
            assert abs(backend.to_numpy(result).astype(complex) / exact - 1).max() <= bound, number

    def test_is_five_times_as_exact_as_the_plain_one(self) -> None:
        rng = np.random.default_rng(0)
        dy = rng.standard_normal((1_000_000, 8), dtype=np.float32)
        exact = [math.fsum(column) for column in dy.T]
        db = affine_backward(dy, np.empty((len(dy), 0), "f"), np.empty((0, 8), "f"), np.zeros(8, "f")).db
        own, plain = (max(abs(np.asarray(computed, float) - exact)) for computed in (db, dy.sum(axis=0)))
        assert own <= plain / 5

    @pytest.mark.parametrize("kind", [np.memmap, OfUsers, np.recarray])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_of_a_subclass_is_that_of_an_array(self, kind: type, order: str) -> None:
        dy = np.asarray(np.full((1_000_000, 2), 0.1, "f"), order=order)
        x, W, b = np.zeros((len(dy), 3), "f"), np.zeros((3, 2), "f"), np.zeros(2, "f")
        for operands in ((dy.view(kind), x, W, b), (dy, x.view(kind), W, b), (dy.view(kind), x.view(kind), W, b)):
            assert affine_backward(*operands).db.tolist() == affine_backward(dy, x, W, b).db.tolist() == [100_000] * 2


class TestMemoryMaps:
    """Data larger than memory, read as NumPy reads them: a memory map goes where an array goes."""

    @pytest.fixture
    def maps(self, tmp_path: Path) -> Any:
        def make(name: str, array: np.ndarray, mode: str = "r") -> Any:
            array.tofile(tmp_path / name)
            return np.memmap(tmp_path / name, array.dtype, mode, shape=array.shape)

        return make

    def test_give_the_bits_that_arrays_give(self, maps: Any) -> None:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(shape, dtype="f") for shape in ((5000, 4), (5000, 3), (3, 4), (4,))]
        dy, x, W, b = mapped = [maps(str(i), array) for i, array in enumerate(arrays)]
        own, expected = AffineLayer(W, b), AffineLayer(*arrays[2:])
        for name, got, other in (
            ("y", own(x), expected(arrays[1])), ("dx", own.backward(dy), expected.backward(arrays[0])),
            ("dW", own.dW, expected.dW), ("db", own.db, expected.db),
        ):  # fmt: skip
            assert type(got) is np.ndarray, name
            assert got.tobytes() == other.tobytes(), name
        assert all(np.array_equal(some, array) for some, array in zip(mapped, arrays, strict=True))

    def test_few_rows_give_arrays(self, maps: Any) -> None:
        dy, x, W = (maps(name, np.ones(shape, "f")) for name, shape in (("dy", (2, 4)), ("x", (2, 3)), ("W", (3, 4))))
        results = [affine(x, W), *affine_backward(dy, x, W)[:2]]
        assert [type(result) for result in results] == [np.ndarray] * 3
        assert [np.unique(result).tolist() for result in results] == [[3], [4], [2]]

    def test_are_updated_and_filled_in_place(self, maps: Any) -> None:
        W, y = maps("W", np.ones((3, 2), "f"), "r+"), maps("y", np.zeros((4, 2), "f"), "r+")
        layer = AffineLayer(W)
        assert layer.forward(np.ones((4, 3), "f"), out=y) is y
        layer.backward(y)
        W -= layer.dW
        for memory, expected in ((W, 1 - 4 * 3), (y, 3)):
            memory.flush()
            assert np.unique(np.fromfile(memory.filename, "f")).tolist() == [expected]

    def test_that_cannot_be_written_are_no_buffers(self, maps: Any) -> None:
        y = maps("y", np.zeros((4, 2), "f"))
        with pytest.raises(TypeError, match="out cannot be written"):
            affine(np.ones((4, 3), "f"), np.ones((3, 2), "f"), out=y)


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


class TestProductsOfLongOperands:
    """The ways that torch and JAX take where a product would be a running sum, with NumPy in their places."""

    def product(self, N: int, n: int, m: int, *stack: int) -> None:
        rng = np.random.default_rng(0)
        x, dy = (rng.integers(-4, 5, (*stack, N, columns)).astype("f") for columns in (n, m))
        dW = standard.backward_W(dy, x)
        assert dW.dtype == np.float32
        assert np.array_equal(dW, np.einsum("...ij,...ik->...jk", x, dy))

    @pytest.mark.parametrize("stack", [(), (2,), (2, 3)])
    @pytest.mark.parametrize(("n", "m"), [(2, 3), (3, 2), (2, 2)])
    @pytest.mark.parametrize("N", [3, 4, 9, 300])  # of blocks that are added up in more than one round
    @pytest.mark.parametrize("in_blocks", [True, False])
    def test_in_blocks(
        self, monkeypatch: pytest.MonkeyPatch, N: int, n: int, m: int, stack: Any, in_blocks: bool
    ) -> None:
        parts = []

        def record(array: Any, axis: int, dtype: Any) -> Any:
            parts.append(array.shape)
            return own(array, axis, dtype)

        own = standard.sum_along
        monkeypatch.setattr(standard, "_ROWS", 4)
        monkeypatch.setattr(standard, "adds_up_all_rows", lambda dy, x: dy.shape[:-1] == x.shape[:-1] and in_blocks)
        monkeypatch.setattr(standard, "sum_along", record)
        self.product(N, n, m, *stack)
        assert parts == [(*stack, N // 4, *sorted((n, m)))][:in_blocks]  # the wide operand second

    @pytest.mark.parametrize("stack", [(), (2,)])
    @pytest.mark.parametrize(
        ("N", "n", "m", "widened"),
        [(8, 3, 9, 0), (9, 3, 9, 2), (9, 9, 3, 2), (9, 4, 9, 0), (9, 9, 4, 0), (9, 1, 1, 2), (9, 0, 2, 2)],
    )
    def test_widened(self, monkeypatch: pytest.MonkeyPatch, N: int, n: int, m: int, widened: int, stack: Any) -> None:
        widths = []

        def record(xp: Any, matrix: Any) -> Any:
            wide = own(xp, matrix)
            widths.append(wide.shape[-1])
            return wide

        own = standard._widened
        monkeypatch.setattr(standard, "_widened", record)
        monkeypatch.setattr(standard, "_LONG", 8)
        monkeypatch.setattr(standard, "is_jax_array", lambda array: isinstance(array, np.ndarray))
        self.product(N, n, m, *stack)
        assert widths == [max(4, n), max(4, m)][:widened]

    @pytest.mark.parametrize(
        ("changed", "expected"),
        [
            ({}, True),
            ({"shape": (2, 16_384, 2)}, False),
            ({"shape": (2, 16_385, 64), "m": 128}, True),
            ({"shape": (2, 16_385, 64), "m": 129}, False),
            ({"shape": (2, 16_385, 15), "m": 10_000}, True),
            ({"shape": (2, 16_385, 10_000), "m": 15}, True),
            ({"shape": (2, 16_385, 16), "m": 10_000}, False),
            ({"shape": (2, 16_385, 10_000), "m": 16}, False),
            ({"shape": (2, 16_385, 1), "m": 1}, True),
            ({"shape": (2, 16_385, 0)}, False),
            ({"m": 0}, False),
            ({"real": False}, False),
            ({"real": False, "complex": True}, True),
            ({"half": True}, False),
            ({"layout": "torch.sparse_coo"}, False),
            ({"layout_of_dy": "torch.sparse_coo"}, False),
            ({"layout": "torch.jagged", "layout_of_dy": "torch.jagged"}, False),
            ({"device": "cuda"}, False),
            ({"device_mesh": None}, False),
            ({"torch": False}, False),
        ],
        ids=str,
    )
    def test_running_sums_are_of_dense_narrow_long_floats_of_torch_on_a_cpu(
        self, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], expected: bool
    ) -> None:
        dense = "torch.strided"
        made = {"shape": (2, 16_385, 2), "m": 3, "real": True, "complex": False, "half": False, "torch": True}
        made |= {"layout": dense, "layout_of_dy": dense, "device": "cpu"} | changed
        dtype = SimpleNamespace(is_floating_point=made["real"], is_complex=made["complex"])
        x = SimpleNamespace(
            shape=made["shape"], dtype=dtype, layout=made["layout"], device=SimpleNamespace(type=made["device"])
        )
        dy = SimpleNamespace(shape=(*x.shape[:-1], made["m"]), layout=made["layout_of_dy"])
        if "device_mesh" in made:
            x.device_mesh = made["device_mesh"]
        monkeypatch.setattr(standard, "is_torch_array", lambda array: array is x and made["torch"])
        monkeypatch.setattr(standard, "is_half", lambda kind: kind is dtype and made["half"])
        assert standard.adds_up_all_rows(dy, x) is expected


@pytest.mark.parametrize(
    ("dtype", "within"),
    [("float16", "float32"), ("float32", "float32"), ("float64", "float64"), ("complex64", "complex64")],
)
def test_standard_db_of_halves_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch, dtype: str, within: str) -> None:
    came = []

    def record(array: Any, axis: int, wide: Any) -> Any:
        came.append(np.dtype(wide).name)
        return own(array, axis, wide)

    own = standard.sum_along
    monkeypatch.setattr(standard, "sum_along", record)
    assert standard.backward_b(np.ones((3, 2), dtype)).dtype == dtype
    assert came == [within]


class Chunked(np.ndarray):
    """As much of an array of Dask as a sum asks for."""

    chunks = ((2, 3), (4,), (1, 1))

    def map_blocks(self, function: Any, axis: int, dtype: Any, *, chunks: Any, meta: Any) -> Any:
        def slices(sizes: Any) -> list[slice]:
            ends = np.cumsum(sizes).tolist()
            return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

        assert meta.dtype == dtype
        out = np.empty([sum(sizes) for sizes in chunks], dtype)
        own = itertools.product(*map(slices, self.chunks))
        for block, place in zip(own, itertools.product(*map(slices, chunks)), strict=True):
            result = function(np.asarray(self)[block], axis, dtype)
            assert (result.shape, result.dtype) == (out[place].shape, dtype)
            out[place] = result
        return out

    @property
    def _meta(self) -> Any:
        return np.empty(0, self.dtype)


@pytest.mark.parametrize(("dtype", "within"), [("float16", "float32"), ("int8", "int8")])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sum_of_a_chunked_array_is_that_of_its_blocks(
    monkeypatch: pytest.MonkeyPatch, axis: int, dtype: str, within: str
) -> None:
    blocks = []

    def record(block: Any, axis: int, dtype: Any) -> Any:
        blocks.append(block.shape)
        return own(block, axis, dtype)

    own = standard._sum_of_block
    monkeypatch.setattr(standard, "_sum_of_block", record)
    monkeypatch.setattr(standard, "is_dask_array", lambda array: isinstance(array, Chunked))
    array = np.arange(40, dtype=dtype).reshape(5, 4, 2)
    total = standard.sum_along(array.view(Chunked), axis, np.dtype(within))
    assert blocks == [(2, 4, 1)] * 2 + [(3, 4, 1)] * 2
    assert total.dtype == within
    assert np.array_equal(total, array.astype(within).sum(axis, dtype=within))


@pytest.mark.parametrize("kind", ["is_jax_array", "is_pydata_sparse_array", "device_mesh"])
def test_sum_that_needs_no_stretches_is_one_sum(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    array = np.ones((1000, 2), np.int8).view(type("OfUsers", (np.ndarray,), {kind: None}))
    if kind != "device_mesh":
        monkeypatch.setattr(standard, kind, lambda other: other is array)
    monkeypatch.setattr(standard, "namespace_of", lambda _: SimpleNamespace(sum=np.sum))
    total = standard.sum_along(array, 0, np.dtype("int8"))
    assert (total.dtype, total.tolist()) == (np.int8, [1000 - 1024] * 2)


@pytest.mark.parametrize(
    ("name", "module", "compiled"),
    [("ArrayImpl", "jaxlib._jax", True), ("ArrayImpl", "users", False), ("Tracer", "jax.core", False)],
)
def test_arrays_of_jax_alone_have_a_compiler(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, compiled: bool
) -> None:
    jax = SimpleNamespace(jit=object())
    monkeypatch.setitem(sys.modules, "jax", jax)
    assert compiler_for(type(name, (), {"__module__": module})) is (jax.jit if compiled else None)


class TestBlocksOfNumPy:
    """Which operands the kernel of NumPy cuts, and where."""

    @pytest.mark.parametrize(("n", "m", "rows"), [(256, 256, 2048), (256, 257, 1024), (1, 1, 2048), (512, 0, 2048)])
    def test_rows_of_a_block(self, n: int, m: int, rows: int) -> None:
        assert numpy._rows_of_block(np.empty((n, m), "f")) == rows

    def test_blocks_cover_all_rows(self) -> None:
        assert list(numpy._blocks(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 12)]
        assert list(numpy._blocks(8, 4)) == [slice(0, 4), slice(4, 8)]

    @pytest.mark.parametrize(
        ("N", "n", "m", "dtype", "cut"),
        [
            (4097, 2, 3, "float32", True), (4096, 2, 3, "float32", False), (4097, 64, 128, "float32", True),
            (4097, 64, 129, "float32", False), (4097, 2, 3, "int32", False), (4097, 2, 3, "complex128", True),
        ],
    )  # fmt: skip
    def test_tall_operands_with_a_small_W_are_cut(
        self, monkeypatch: pytest.MonkeyPatch, N: int, n: int, m: int, dtype: str, cut: bool
    ) -> None:
        cuts = []

        def record(N: int, rows: int) -> Any:
            cuts.append((N, rows))
            return own(N, rows)

        own = numpy._blocks
        monkeypatch.setattr(numpy, "_blocks", record)
        x, W, dy = (np.ones(shape, dtype) for shape in ((N, n), (n, m), (N, m)))
        assert (numpy.forward(x, W, None) == n).all()
        numpy.backward(dy, x, W, ("x", "W", "b"))
        assert cuts == [(N, 2048), (N, 2048), (N, 4096)][: 3 * cut]

    @pytest.mark.parametrize("N", [5, 4097])
    def test_results_are_written_into_the_buffers(self, N: int) -> None:
        x, W, b, dy = (np.ones(shape, "f") for shape in ((N, 2), (2, 3), (3,), (N, 3)))
        y, *gradients = (np.zeros_like(operand) for operand in (dy, x, W, b))
        assert numpy.forward(x, W, b, y) is y
        for result, buffer in zip(numpy.backward(dy, x, W, ("x", "W", "b"), tuple(gradients)), gradients, strict=True):
            assert result is buffer
        assert [buffer.max() for buffer in (y, *gradients)] == [3, 3, N, N]
