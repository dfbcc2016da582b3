"""The primitives: each agrees with that of the standard and has every property, also where it cuts tall operands.

What a library does in its own way is tested in the file of that name.
"""

from __future__ import annotations

import itertools
import math
import tracemalloc
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from tests.core.test_properties import ALL
from xaffine import AffineLayer, affine, affine_backward
from xaffine.backends import Backend, numpy
from xaffine.curvature import kronecker_factors
from xaffine.per_sample import per_sample_gradients
from xaffine.testing import PROPERTIES, bounds, check_affine, checks, make_case
from xaffine.testing.cases import FEATURES
from xaffine.testing.strategies import cases


class OfUsers(np.ndarray):
    """A subclass as users derive them."""


def own(backend: Backend) -> Any:
    return backend.product, backend.sum_rows


def standard(backend: Backend) -> Any:
    return partial(Backend.product, backend), partial(Backend.sum_rows, backend)


def test_every_library_is_one_class_below_the_standard(backend: Backend) -> None:
    assert type(backend).__bases__ == (Backend,)


def test_arrays_of_its_types_take_the_primitives_of_a_library(backend: Backend, ones: Any) -> None:
    assert (
        backend.primitives(ones(2, 3), None) == own(backend) or not {"product", "sum_rows"} & vars(type(backend)).keys()
    )


def assert_agree(first: Any, second: Any, values: str, backend: Backend, device: Any = None) -> None:
    supports = set(FEATURES) - {"vectors", "tensors", "last-axis"}
    # The bfloat16 products of NumPy's standard primitives are float32, which the layer casts.
    dtypes = [d for d in backend.dtypes(device) if (backend.name, d) != ("numpy", "bfloat16")]
    # The exact arithmetic on floats takes a time that grows with the cube of the extents.
    extent = 12 if values == "floats" else 24
    matrices = cases(dtypes, values=values, mixed=False, supports=supports, batch_axes=False, max_extent=extent)

    # Exact arithmetic on floats takes its time.
    @settings(max_examples=settings().max_examples // (2 if values == "floats" else 1))
    @given(matrices)
    def agree(case: Any) -> None:
        checks.primitives_agree(first, second, case, backend, device)

    agree()


@pytest.mark.parametrize("values", ["integers", "floats"])
def test_primitives_agree_with_those_of_the_standard(backend: Backend, device: Any, values: str) -> None:
    if not {"product", "sum_rows", "matmul", "sum"} & vars(type(backend)).keys():
        pytest.skip("this library computes as the standard says itself")
    if backend.name == "ndonnx":
        pytest.skip("the standard's take ndonnx half a second a product; the properties test its own")
    assert_agree(own(backend), own(Backend(backend.namespace)), values, backend, device)


def test_primitives_of_the_standard_have_every_property(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, device: Any
) -> None:
    """Arrays of a subclass take them, of which nothing is remembered, and libraries that have none of their own."""
    if backend.name not in ("numpy", "cupy", "torch"):
        pytest.skip("other libraries have none of their own, or are slow; NumPy, CuPy and torch show it")
    monkeypatch.setattr(type(backend), "types", frozenset())
    for name in ("facts", "signature"):
        monkeypatch.setattr(type(backend), name, getattr(Backend, name))
    for name in ("product", "sum_rows"):
        monkeypatch.setattr(type(backend), name, None)  # which would raise if it were called
    examples = settings().max_examples // 4 if backend.name == "numpy" else 10
    check_affine(
        AffineLayer, backend=backend.name, device=device, dtype=backend.dtypes(device), max_examples=examples, seed=0,
        **ALL,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("bias", r"y\["), ("product", r"dx\["), ("sum", r"db\["), ("dtype", "what belongs to b came in float64"),
        ("beside", "what belongs to dy is not in its buffer"), ("added", r"db\["), ("half filled", r"y\["),
    ],
)  # fmt: skip
def test_primitives_that_disagree_are_told_apart(numpy_backend: Backend, fault: str, words: str) -> None:
    def product(a: Any, c: Any, bias: Any = None, out: Any = None) -> Any:
        if fault == "beside":
            out = None
        y = numpy_backend.product(a, c, None if fault == "bias" else bias, out)
        if fault == "half filled" and out is not None:
            y[-1] = 7
        return 2 * y if fault == "product" and bias is None and out is None else y

    def sum_rows(a: Any, out: Any = None) -> Any:
        before = 0 if out is None else out.copy()
        total = numpy_backend.sum_rows(a[:-1] if fault == "sum" else a, out)
        if fault == "added":
            total += before
        return total.astype(float) if fault == "dtype" and out is None else total

    case = make_case((5, 3), 2, seed=0)
    pairs = [(product, sum_rows), standard(numpy_backend)]
    for first, second in itertools.permutations(pairs):
        with pytest.raises(AssertionError, match=words):
            checks.primitives_agree(first, second, case, numpy_backend)
    assert checks.primitives_agree(own(numpy_backend), pairs[1], case, numpy_backend) == 0


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after a few rows, as tall operands are cut after thousands."""
    for name, value in {"_TALL": 2, "_ROWS": 4, "_LONG": 40, "_SMALL": 200}.items():
        monkeypatch.setattr(numpy, name, value)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.name)
def test_blocks_have_every_property(prop: Any, numpy_backend: Backend) -> None:
    check_affine(AffineLayer, dtype=numpy_backend.dtypes(), max_examples=100, seed=0, properties=[prop], **ALL)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("values", ["integers", "floats"])
def test_blocks_agree_with_the_primitives_of_the_standard(numpy_backend: Backend, values: str) -> None:
    assert_agree(own(numpy_backend), standard(numpy_backend), values, numpy_backend)


@pytest.mark.parametrize(("n", "m"), [(40, 1), (1, 40), (3, 2)])
@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_narrow_and_wide_operands_agree(numpy_backend: Backend, n: int, m: int) -> None:
    pairs = own(numpy_backend), standard(numpy_backend)
    checks.primitives_agree(*pairs, make_case((31, n), m, seed=0), numpy_backend)


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
            with backend.on_device_of(A):
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


@pytest.mark.parametrize(
    ("dtype", "within"),
    [("float16", "float32"), ("float32", "float32"), ("float64", "float64"), ("complex64", "complex64")],
)
def test_halves_are_added_up_in_float32(
    monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend, dtype: str, within: str
) -> None:
    came = []

    def record(self: Backend, array: Any, axis: int, wide: Any) -> Any:
        came.append(np.dtype(wide).name)
        return sum_along(self, array, axis, wide)

    sum_along = Backend.sum
    monkeypatch.setattr(Backend, "sum", record)
    assert standard(numpy_backend)[1](np.ones((3, 2), dtype)).dtype == dtype
    assert came == [within]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("terms", [0, 1, 63, 64, 65, 127, 128, 4095, 4097, 10_000])
@pytest.mark.parametrize(("dtype", "within"), [("float32", "float64"), ("int8", "int8")])
def test_sum_in_stretches_has_every_term_once(
    monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend, terms: int, axis: int, dtype: str, within: str
) -> None:
    longest = []

    def record(array: Any, *, axis: int, dtype: Any) -> Any:
        longest.append(array.shape[axis])
        return total(array, axis=axis, dtype=dtype)

    total = numpy_backend.xp.sum
    monkeypatch.setattr(numpy_backend.xp, "sum", record)
    shape, line = [2, 3], [1, 1]
    shape.insert(axis, terms)
    line.insert(axis, terms)
    array = np.broadcast_to(np.arange(terms).reshape(line), shape).astype(dtype)
    got = Backend.sum(numpy_backend, array, axis, np.dtype(within))
    assert got.dtype == within
    assert np.array_equal(got, array.sum(axis=axis, dtype=within))
    assert max(longest) <= 64


class TestBlocksOfNumPy:
    """Which operands the primitives of NumPy cut, and where."""

    @pytest.fixture
    def cuts(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        cuts = []

        def record(N: int, rows: int) -> Any:
            cuts.append((N, rows))
            return blocks(N, rows)

        blocks = numpy._blocks
        monkeypatch.setattr(numpy, "_blocks", record)
        return cuts

    @pytest.mark.parametrize(("n", "m", "rows"), [(16, 496, 2048), (16, 497, 1024), (1, 1, 2048), (512, 0, 2048)])
    def test_rows_of_a_block(self, numpy_backend: Backend, cuts: Any, n: int, m: int, rows: int) -> None:
        assert numpy_backend.product(np.ones((5000, n), "f"), np.ones((n, m), "f")).shape == (5000, m)
        assert cuts == [(5000, rows)]

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
        self, cuts: Any, N: int, n: int, m: int, dtype: str, cut: bool
    ) -> None:
        x, W, dy = (np.ones(shape, dtype) for shape in ((N, n), (n, m), (N, m)))
        assert (affine(x, W) == n).all()
        affine_backward(dy, x, W)
        assert sorted(cuts) == [(N, 2048), (N, 2048), (N, 4096)][: 3 * cut]

    @pytest.mark.parametrize("N", [5, 4097])
    def test_results_are_written_into_the_buffers(self, numpy_backend: Backend, N: int) -> None:
        product, sum_rows = own(numpy_backend)
        x, W, b, dy = (np.ones(shape, "f") for shape in ((N, 2), (2, 3), (3,), (N, 3)))
        y, dx, dW, db = buffers = [np.zeros_like(operand) for operand in (dy, x, W, b)]
        results = product(x, W, b, y), product(dy, W.T, None, dx), product(x.T, dy, None, dW), sum_rows(dy, db)
        assert [result is buffer for result, buffer in zip(results, buffers, strict=True)] == [True] * 4
        assert [buffer.max() for buffer in buffers] == [3, 3, N, N]

    @pytest.mark.usefixtures("small_blocks")
    def test_operands_of_few_rows_and_many_terms_are_cut_along_the_terms(
        self, numpy_backend: Backend, cuts: Any
    ) -> None:
        assert numpy_backend.product(np.ones((2, 3), "f"), np.ones((3, 1), "f")).tolist() == [[3], [3]]
        assert cuts == [(3, 2)]

    @pytest.mark.usefixtures("small_blocks")
    def test_few_rows_are_summed_by_a_product(self, monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend) -> None:
        monkeypatch.setattr(type(numpy_backend), "sum", lambda *_: np.full(1, 7, "f"))
        assert [numpy_backend.sum_rows(np.ones((N, 1), "f")).tolist() for N in (2, 3)] == [[2], [7]]

    @pytest.mark.usefixtures("small_blocks")
    def test_extents_that_are_not_large_are_looked_at_once(self, numpy_backend: Backend) -> None:
        few = numpy_backend.primitives(np.ones(1), extents=(2, 1, 2))
        assert few == (numpy._product, numpy._sum_few_rows)
        for extents in ((3, 1, 2), (2, 3, 2), (2, 1, 3), (None, 1, 2)):
            assert numpy_backend.primitives(np.ones(1), extents=extents) == own(numpy_backend)

    def test_wide_operand_of_a_long_product_comes_second(self) -> None:
        first = []

        class Recorded(np.ndarray):
            def dot(self, other: Any) -> Any:  # type: ignore[override]
                first.append(self.shape)
                return np.asarray(self).dot(np.asarray(other))

        for rows in (64, 65):
            a, c = np.ones((rows, 3)).view(Recorded), np.ones((3, 2)).view(Recorded)
            assert (numpy._long_product(a, c) == 3).all()
        assert first == [(64, 3), (2, 3)]


class TestArraysOfNumPy:
    """What the backend of NumPy knows of an array."""

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    def test_signature_is_of_every_array_and_of_no_subclass(self, numpy_backend: Backend, count: int) -> None:
        signature = numpy_backend.signature
        arrays = [np.ones((i, 2), dtype) for i, dtype in zip(range(count), "fdeFD", strict=False)]
        assert signature(*arrays) == tuple(part for array in arrays for part in (array.dtype, array.shape))
        for kinds in itertools.product([np.ndarray, OfUsers], repeat=count):
            some = [array.view(kind) for array, kind in zip(arrays, kinds, strict=True)]
            assert (signature(*some) is None) == (OfUsers in kinds)
        for i in range(count if count > 1 else 0):
            before, after = arrays[:i], arrays[i + 1 :]
            assert signature(*before, None, *after) == (*signature(*before), None, *signature(*after))

    def test_device_is_the_one_that_there_is(self, numpy_backend: Backend) -> None:
        assert [numpy_backend.device_of(np.ones(1))] == numpy_backend.devices

    def test_arrays_of_a_subclass_are_read_as_they_are(self, numpy_backend: Backend) -> None:
        array = np.ones((2, 2)).view(OfUsers)
        assert numpy_backend.readable(array) is array

    def test_buffer_is_a_view_unless_a_reshape_would_copy(self, numpy_backend: Backend) -> None:
        out, dtype = np.zeros((3, 2, 8), "f"), np.dtype("f", copy=True)
        assert out.dtype is not dtype
        assert numpy_backend.buffer(out, None, dtype) is out
        assert numpy_backend.buffer(out, None, np.dtype("d")) is None
        assert numpy_backend.buffer(out.transpose(1, 0, 2), (6, 8), dtype) is None
        for some in (out, out[:, :, :4]):
            view = numpy_backend.buffer(some, (6, some.shape[2]), dtype)
            view[...] += 1
        assert (out.reshape(6, 8) == [2] * 4 + [1] * 4).all()

    def test_buffers_that_can_be_filled_have_memory_of_their_own(self, numpy_backend: Backend) -> None:
        x, first, second = (np.zeros((2, 2)) for _ in range(3))
        read_only = np.zeros((2, 2))
        read_only.flags.writeable = False
        of_a_view = np.asarray(memoryview(first))[1:]
        for buffers, operands in (
            ([], [x, x]), ([first], [x, None]), ([first], [x[:1], x.T]), ([None, first, None, second], [None, x]),
            ([np.zeros((2, 2), order="F")], [x]),
        ):  # fmt: skip
            assert numpy_backend.can_fill(buffers, operands)
        for buffers, operands in (
            ([x], [x]), ([None, x], [x]), ([first, first], [x]), ([first], [first[:1]]), ([first], [x, first.T]),
            ([first], [of_a_view]), ([first], [np.frombuffer(bytes(8))]), ([first[:1]], [x]), ([first.view()], [x]),
            ([read_only], [x]), ([np.ndarray((2, 2), strides=(8, 8))], [x]),
        ):  # fmt: skip
            assert not numpy_backend.can_fill(buffers, operands)

    def test_arrays_that_are_added_to_in_place_can_be_written_and_overlap_nowhere(self, numpy_backend: Backend) -> None:
        read_only, memory = np.zeros((2, 2)), np.zeros(7)
        read_only.flags.writeable = False
        for array in (memory, np.zeros((2, 2), order="F"), np.zeros((4, 4))[::2, ::2]):
            assert numpy_backend.adds_in_place(array)
        for array in (read_only, np.lib.stride_tricks.as_strided(memory, (4, 4), (8, 8))):
            assert not numpy_backend.adds_in_place(array)
