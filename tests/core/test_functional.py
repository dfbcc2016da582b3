"""`affine`, `affine_backward` and `affine_vjp` beyond the properties: worked numbers, wrt, out, NaN, threads."""

from __future__ import annotations

import math
import operator
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.helpers import assert_fills, case_on, wrap_primitives
from xaffine import AffineLayer, Gradients, affine, affine_backward, affine_vjp, backends
from xaffine._checks import check, check_cotangent
from xaffine.backends import Backend
from xaffine.testing import make_case
from xaffine.testing.cases import worst_error


@pytest.fixture
def array(backend: Backend, device: Any) -> Any:
    """Return the function that makes an array of the backend under test."""

    def make(values: Any, dtype: str = "float32") -> Any:
        return backend.from_numpy(np.asarray(values, dtype), device=device)

    return make


def test_bias_is_added_to_every_row(backend: Backend, array: Any) -> None:
    y = affine(array(np.eye(2)), array([[1, 2, 3], [6, 8, 10]]), array([1, -1, 5]))
    assert backend.to_numpy(y).tolist() == [[2, 1, 8], [7, 7, 15]]


def test_db_sums_dy_over_the_batch(backend: Backend, array: Any) -> None:
    gradients = affine_backward(array([[7, 5, 3], [2, 4, 8]]), array(np.eye(2)), array(np.ones((2, 3))), array([0] * 3))
    assert backend.to_numpy(gradients.db).tolist() == [9, 9, 11]


def test_backward_by_hand(backend: Backend, array: Any) -> None:
    x, W, dy = array([[1, 2], [3, 4]]), array([[1, -1, 2], [0, 3, 1]]), array([[1, 0, 2], [0, 1, 1]])
    dx, dW, db = (backend.to_numpy(g).tolist() for g in affine_backward(dy, x, W, array([0, 0, 0])))
    assert dx == [[5, 2], [1, 4]]
    assert dW == [[1, 3, 5], [2, 4, 8]]
    assert db == [1, 1, 3]


@pytest.mark.parametrize(
    ("shape", "n_batch_axes", "n", "y_shape"),
    [
        ((6,), None, 6, (4,)),
        ((2, 6), None, 6, (2, 4)),
        ((2, 3, 2), None, 6, (2, 4)),
        ((2, 3, 5), -1, 5, (2, 3, 4)),
        ((2, 3, 5), 2, 5, (2, 3, 4)),
        ((2, 3, 5), 0, 30, (4,)),
        ((2, 3), 2, 1, (2, 3, 4)),
        ((2, 3), -2, 6, (4,)),
        ((5,), 1, 1, (5, 4)),
        ((0, 3, 2), 1, 6, (0, 4)),
        ((2, 0, 3), 1, 0, (2, 4)),
    ],
)
def test_slice_rule(backend: Backend, array: Any, shape: Any, n_batch_axes: Any, n: int, y_shape: Any) -> None:
    x = array(np.ones(shape))
    y, vjp = affine_vjp(x, array(np.ones((n, 4))), array(np.ones(4)), n_batch_axes=n_batch_axes)
    assert backend.to_numpy(y).shape == y_shape
    assert np.all(backend.to_numpy(y) == n + 1)
    assert backend.to_numpy(vjp(y).dx).shape == shape


def test_integers_of_numpy_count_as_batch_axes(array: Any) -> None:
    assert affine(array(np.ones((2, 3, 5))), array(np.ones((5, 4))), n_batch_axes=np.int64(2)).ndim == 3


@pytest.mark.parametrize("wrt", [(), ("x",), ("W",), ("b",), ["b", "x"], ("x", "W", "b"), "W"])
def test_only_gradients_wanted_are_computed(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, array: Any, wrt: Any
) -> None:
    computed: list[tuple[int, ...]] = []

    def recording(primitive: Any) -> Any:
        def record(*operands: Any) -> Any:
            result = primitive(*operands)
            computed.append(tuple(result.shape))
            return result

        return record

    wrap_primitives(monkeypatch, backend, recording)
    shapes = {"x": (2, 3), "W": (3, 4), "b": (4,)}
    gradients = affine_backward(array(np.ones((2, 4))), *(array(np.ones(shape)) for shape in shapes.values()), wrt=wrt)
    # Dask computes dW and db together, in a way of its own.
    by_primitives = set(wrt) - ({"W", "b"} if backend.name == "dask" and {"W", "b"} <= set(wrt) else set())
    assert sorted(computed) == sorted(shapes[name] for name in by_primitives)
    assert {name for name, g in zip("xWb", gradients, strict=True) if g is not None} == set(wrt)


def test_wrt_b_without_a_bias_is_none(array: Any) -> None:
    gradients = affine_backward(array(np.ones((2, 4))), array(np.ones((2, 3))), array(np.ones((3, 4))), wrt=("b",))
    assert gradients == (None, None, None)


def test_half_precision_sums_do_not_stall(backend: Backend, device: Any) -> None:
    # A running float16 sum of ones stops at 2048, a bfloat16 one at 256; 4096 is a value of both.
    for dtype in {"float16", "bfloat16"} & set(backend.dtypes(device)):
        case = make_case((4096, 1), 2, seed=0, dtypes=dtype)
        case = case.replace_values(dy=np.ones_like(case.dy.values))
        dy, x, W, b = case_on(case, backend, device)
        db = affine_backward(dy, x, W, b, wrt=("b",)).db
        assert backend.to_numpy(db).tolist() == [4096, 4096], dtype


def products_with_nan(backend: Backend) -> Any:
    """NumPy warns of NaN where it is computed, the sparse library that it does not multiply NaN by unstored zeros."""
    if backend.name == "sparse":
        return pytest.warns(RuntimeWarning, match="Nan will not be propagated")
    return np.errstate(invalid="ignore")


def test_nan_and_infinity_propagate(backend: Backend, array: Any) -> None:
    x = np.ones((3, 2))
    x[1] = [np.nan, 1]
    x[2] = [np.inf, 1]
    with products_with_nan(backend):
        y, vjp = affine_vjp(array(x), array([[1, 2], [3, 4]]), array([1, 1]))
        gradients = vjp(array([[1, 2], [1, 1], [1, -1]]))
        y, dW = backend.to_numpy(y), backend.to_numpy(gradients.dW)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    assert np.isposinf(y[2]).all()
    assert np.isnan(dW[0]).all()
    assert np.isfinite(dW[1]).all()
    assert np.isfinite(backend.to_numpy(gradients.dx)).all()


def test_infinities_of_dy_reach_db_as_they_are(backend: Backend) -> None:
    """db is a sum: no product makes them NaN."""
    for dtype in {"float32", "complex64"} & set(backend.dtypes()):
        dy = backend.from_numpy(np.array([[np.inf, 1], [1, 2]], dtype))
        x, W, b = (backend.from_numpy(np.ones(shape, dtype)) for shape in ((2, 1), (1, 2), (2,)))
        db = backend.to_numpy(affine_backward(dy, x, W, b, wrt=("b",)).db)
        assert db.tolist() == [np.inf, 3], dtype


def test_many_halves_are_summed_beyond_the_range_of_float32() -> None:
    N = 2**24 + 2**23
    db = affine_backward(
        np.full((N, 1), 2.0**-10, "e"), np.empty((N, 0), "e"), np.empty((0, 1), "e"), np.zeros(1, "e"), wrt=("b",)
    ).db
    assert db.tolist() == [24576]


class Relative(np.ndarray):
    """A subclass as users derive them."""


@pytest.mark.parametrize("which", range(4))
def test_relatives_of_arrays_take_the_primitives_of_the_standard(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("called")

    backend = backends.get("numpy")
    case = make_case((5, 3), 4, seed=0)
    dy, x, W, b = operands = case_on(case, backend)
    standard = (Backend.product, Backend.sum_rows)
    wrap_primitives(monkeypatch, backend, lambda own: own if getattr(own, "func", None) in standard else fail)
    for call in (lambda: affine(x, W, b), lambda: affine_backward(dy, x, W, b)):
        with pytest.raises(AssertionError, match="called"):
            call()
    operands[which] = operands[which].view(Relative)
    dy, x, W, b = operands
    if which > 0:
        assert np.array_equal(affine(x, W, b), case.exact()["y"].value)
    if which < 3:  # of b only shape and dtype matter
        for gradient, name in zip(affine_backward(dy, x, W, b), ("dx", "dW", "db"), strict=True):
            assert np.array_equal(gradient, case.exact()[name].value)


def test_nan_in_x_reaches_dw_even_where_dy_is_zero(backend: Backend, array: Any) -> None:
    with products_with_nan(backend):
        dW = affine_backward(array([[0.0]]), array([[np.nan]]), array([[1.0]])).dW
        dW = backend.to_numpy(dW)
    assert np.isnan(dW).all() == (backend.name != "sparse")


def test_vjp_is_reentrant(backend: Backend) -> None:
    case = make_case((9, 5), 4, seed=1)
    _, vjp = affine_vjp(*case_on(case, backend)[1:])
    cotangents = [make_case((9, 5), 4, seed=seed).dy for seed in range(2, 18)]
    natives = [dy.on(backend) for dy in cotangents]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(vjp, natives))
    for dy, gradients in zip(cotangents, results, strict=True):
        exact = case.replace_values(dy=dy.values).exact()
        for name, g in gradients._asdict().items():
            assert worst_error(backend.to_numpy(g), exact[name])[0] == 0


def test_vjp_belongs_to_its_own_forward(backend: Backend, array: Any) -> None:
    W = array([[1.0], [2.0]])
    _, first = affine_vjp(array([[1.0, 1.0]]), W)
    _, second = affine_vjp(array([[5.0, 7.0]]), W)
    dy = array([[1.0]])
    assert backend.to_numpy(first(dy).dW).tolist() == [[1], [1]]
    assert backend.to_numpy(second(dy).dW).tolist() == [[5], [7]]


def test_vjp_can_be_pickled() -> None:
    _, vjp = affine_vjp(np.ones((2, 3)), np.ones((3, 4)))
    assert pickle.loads(pickle.dumps(vjp))(np.ones((2, 4))).dW.tolist() == vjp(np.ones((2, 4))).dW.tolist()  # noqa: S301


def test_complex_by_jax_and_by_torch_convention() -> None:
    x, W, dy = (np.asarray([[v]]) for v in (3 + 1j, 1 + 2j, 1 + 0j))
    assert affine_backward(dy, x, W).dx == 1 + 2j
    conjugated = affine_backward(dy.conj(), x, W).dx.conj()
    assert conjugated == 1 - 2j


class TestOut:
    """Buffers for results, on NumPy, whose arrays can be written."""

    x, W, b, dy = np.ones((2, 3), "f"), np.ones((3, 4), "f"), np.ones(4, "f"), np.ones((2, 4), "f")

    def test_affine_fills_and_returns_it(self) -> None:
        out = np.full((2, 4), np.nan, "f")
        assert affine(self.x, self.W, self.b, out=out) is out
        assert np.all(out == 4)

    def test_affine_fills_a_view_of_a_larger_buffer(self) -> None:
        buffer = np.zeros((4, 8), "f")
        affine(self.x, self.W, self.b, out=buffer[::2, ::2])
        assert np.all(buffer[::2, ::2] == 4)
        assert buffer.sum() == 2 * 4 * 4

    def test_backward_fills_some_and_makes_the_others(self) -> None:
        dW = np.zeros((3, 4), "f")
        gradients = affine_backward(self.dy, self.x, self.W, self.b, out=(None, dW, None))
        assert gradients.dW is dW
        assert np.all(dW == 2)
        assert gradients.dx.tolist() == [[4] * 3] * 2

    @pytest.mark.parametrize(
        ("out", "error", "words"),
        [
            (np.zeros((2, 5), "f"), ValueError, r"shape \(2, 4\).*\(2, 5\)"),
            (np.zeros((2, 4)), TypeError, "dtype float32.*float64"),
            (np.zeros((2, 4), int), TypeError, "must have the dtype float32.*Pass a buffer of shape"),
            (np.broadcast_to(np.float32(0), (2, 4)), TypeError, "cannot be written"),
            ([[0.0] * 4] * 2, TypeError, "library of the operands: out is a builtins.list"),
        ],
    )
    def test_unfit_one_is_refused_and_left_alone(self, out: Any, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            affine(self.x, self.W, self.b, out=out)
        assert not np.any(out)

    def test_one_unfit_gradient_leaves_all_alone(self) -> None:
        dx, dW = np.zeros((2, 3), "f"), np.zeros((4, 3), "f")
        with pytest.raises(ValueError, match="dW must have the shape"):
            affine_backward(self.dy, self.x, self.W, self.b, out=(dx, dW, None))
        assert not dx.any()

    def test_buffer_for_a_gradient_not_computed_is_refused(self) -> None:
        db = np.zeros(4, "f")
        with pytest.raises(ValueError, match="not computed"):
            affine_backward(self.dy, self.x, self.W, self.b, wrt="x", out=(None, None, db))
        with pytest.raises(ValueError, match="not computed"):
            affine_backward(self.dy, self.x, self.W, out=(None, None, db))

    @pytest.mark.parametrize(
        ("out", "words"), [((None, None), "tuple of length 2"), (np.zeros(()), "ndarray"), ([None], "list")]
    )
    def test_what_is_no_triple_is_refused(self, out: Any, words: str) -> None:
        with pytest.raises(TypeError, match=rf"tuple \(dx, dW, db\).*{words}"):
            affine_backward(self.dy, self.x, self.W, self.b, out=out)

    def test_one_buffer_for_two_gradients_is_refused(self) -> None:
        buffer = np.zeros((3, 3), "f")
        with pytest.raises(ValueError, match="out's dW overlaps out's dx in memory"):
            affine_backward(
                np.ones((3, 3), "f"), np.ones((3, 3), "f"), np.ones((3, 3), "f"), out=(buffer, buffer, None)
            )
        assert not buffer.any()

    def test_buffers_without_elements_overlap_nothing(self) -> None:
        empty = np.empty((3, 0))
        outs = (np.empty((2, 3)), empty, np.empty(0))
        gradients = affine_backward(np.empty((2, 0)), np.ones((2, 3)), empty, np.empty(0), out=outs)
        assert all(result is out for result, out in zip(gradients, outs, strict=True))
        assert np.array_equal(outs[0], np.zeros((2, 3)))

    def test_overlapping_elements_are_refused(self) -> None:
        for strides in ((0, 4), (4, 4), (4, -4), (8, 4)):
            out = np.lib.stride_tricks.as_strided(np.zeros(16, "f")[8:], (2, 4), strides)
            with pytest.raises(ValueError, match="out overlaps itself in memory"):
                affine(self.x, self.W, self.b, out=out)
            assert not out.any()

    @pytest.mark.parametrize("operand", ["x", "W", "b"])
    def test_buffer_of_y_is_apart_from_every_operand(self, operand: str) -> None:
        operands = {"x": np.ones((1, 1), "f"), "W": np.ones((1, 1), "f"), "b": np.ones(1, "f")}
        shared = operands[operand]
        with pytest.raises(ValueError, match=f"out overlaps {operand} in memory"):
            affine(*operands.values(), out=shared.reshape(1, 1))
        assert np.all(shared == 1)

    @pytest.mark.parametrize("operand", ["dy", "x", "W", "b"])
    def test_buffers_of_gradients_are_apart_from_every_operand(self, operand: str) -> None:
        operands = {"dy": np.ones((4, 4), "f"), "x": np.ones((4, 4), "f"), "W": np.ones((4, 4), "f")}
        operands["b"] = np.ones(16, "f")[:4]
        shared = operands[operand]
        out = (None, None, shared[:]) if operand == "b" else (shared[:], None, None)
        name = "db" if operand == "b" else "dx"
        with pytest.raises(ValueError, match=f"out's {name} overlaps {operand} in memory"):
            affine_backward(*operands.values(), out=out)
        assert np.all(shared == 1)

    def test_operands_in_memory_of_others_are_looked_at_closely(self) -> None:
        memory = bytearray(np.ones((2, 3), "f").tobytes())
        x, y = np.frombuffer(memory, "f").reshape(2, 3), np.zeros((2, 4), "f")
        for _ in range(2):  # the second time, all but the memory is known to be right
            assert affine(x, self.W, self.b, out=y) is y
        inside = np.frombuffer(memory, "f")[:4].reshape(2, 2)
        with pytest.raises(ValueError, match="out overlaps x in memory"):
            affine(x, np.ones((3, 2), "f"), out=inside)

    def test_buffers_are_not_filled_where_the_library_records(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As torch does, which looks in its own session."""
        dx, dW = np.zeros((2, 3), "f"), np.zeros((3, 4), "f")
        kind = type(backends.get("numpy"))
        monkeypatch.setattr(kind, "is_recorded", lambda _, array: array is self.W or array is self.b)
        monkeypatch.setattr(kind, "can_fill", lambda *_: False)
        with pytest.raises(TypeError) as caught:
            affine_backward(self.dy, self.x, self.W, self.b, out=(dx, dW, None))
        assert str(caught.value) == (
            "out's dx and out's dW cannot be filled: autograd or another transform of torch follows W and b. "
            "Call under torch.no_grad(), pass detached tensors, or no buffer"
        )
        assert affine(self.x, self.W, self.b) is not None
        assert not dx.any()

    @pytest.mark.parametrize("layout", ["Fortran", "reversed", "strided"])
    def test_every_other_layout_is_filled(self, layout: str) -> None:
        case = make_case((5, 2, 3), 4, seed=0)
        buffers = [replace(o, layout=layout).on(backends.get("numpy")) for o in (case.dy, case.x, case.W, case.b)]
        dy, x, W, b = case_on(case, backends.get("numpy"))
        assert_fills(buffers, AffineLayer(W, b), x, dy)
        for buffer, exact in zip(buffers, case.exact().values(), strict=True):
            assert np.array_equal(buffer, exact.value)

    def test_primitives_get_the_memory_of_the_buffers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A result beside a buffer would take its memory once more."""
        filled: dict[tuple[int, ...], Any] = {}

        def noting(function: Any) -> Any:
            def note(*arguments: Any) -> Any:
                result = function(*arguments)
                assert result is arguments[-1]
                filled[result.shape] = result
                return result

            return note

        backend = backends.get("numpy")
        wrap_primitives(monkeypatch, backend, noting)
        case = make_case((5, 2, 3), 4, seed=0, n_batch_axes=2)
        dy, x, W, b = case_on(case, backend)
        y, out = np.empty_like(dy), tuple(map(np.empty_like, (x, W, b)))
        affine(x, W, b, out=y, n_batch_axes=2)
        affine_backward(dy, x, W, b, out=out, n_batch_axes=2)
        for given, shape in zip((y, *out), ((10, 4), (10, 3), (3, 4), (4,)), strict=True):
            assert given.__array_interface__["data"] == filled[shape].__array_interface__["data"]

    @pytest.mark.parametrize("N", [1, 5])
    def test_buffers_of_dtypes_apart_from_that_of_the_products_are_filled(self, N: int) -> None:
        case = make_case((N, 3), 4, seed=0, dtypes=("float32", "float64", "float16", "float32"))
        dy, x, W, b = case_on(case, backends.get("numpy"))
        out = np.full_like(x, 7), np.full_like(W, 7), np.full_like(b, 7)
        gradients = affine_backward(dy, x, W, b, out=out)
        for buffer, gradient, name in zip(out, gradients, ("dx", "dW", "db"), strict=True):
            assert gradient is buffer
            assert np.array_equal(buffer, case.exact()[name].value)


def test_gradients_is_a_named_tuple() -> None:
    assert Gradients._fields == ("dx", "dW", "db")


def test_foreign_byte_order_is_data() -> None:
    x, W, dy = (np.ones(shape, ">f8") for shape in ((2, 3), (3, 4), (2, 4)))
    y, vjp = affine_vjp(x, W, np.ones(4, ">f8"))
    assert y.tolist() == [[4] * 4] * 2
    dx, dW, db = vjp(dy)
    assert (dx.tolist(), dW.tolist(), db.tolist()) == ([[4] * 3] * 2, [[2] * 4] * 3, [2] * 4)
    assert dx.dtype == x.dtype


def test_out_of_integers_and_of_a_single_row_is_written() -> None:
    x, W = np.ones((1, 3), "int32"), np.ones((3, 4), "int32")
    out = np.zeros((1, 4), "int32")
    assert affine(x, W, out=out) is out
    assert out.tolist() == [[3] * 4]
    one_row = np.lib.stride_tricks.as_strided(np.zeros(4, "int32"), (1, 4), (0, 4))  # a stride that is never taken
    assert affine(x, W, out=one_row) is one_row
    assert one_row.tolist() == [[3] * 4]


def test_gradients_are_computed_in_the_common_dtype_of_all() -> None:
    """With b in float64, a sum that float32 would round away is kept: 1 + 2¹³ terms of 2⁻²⁵."""
    W = np.full((1, 2**13 + 1), 2.0**-25, "float32")
    W[0, 0] = 1
    dx, _, _ = affine_backward(np.ones((1, W.size), "float32"), np.ones((1, 1), "float32"), W, np.zeros(W.size))
    assert dx.dtype == np.float32
    assert dx[0, 0] == np.float32(1 + 2**13 * 2.0**-25)


@pytest.mark.parametrize("one", range(4))
@pytest.mark.parametrize("others", ["float32", "float64"])
def test_gradients_have_the_dtypes_of_their_operands(one: int, others: str) -> None:
    its = "float64" if others == "float32" else "float32"
    case = make_case((5, 3), 4, seed=0, dtypes=tuple(its if i == one else others for i in range(4)))
    operands = case_on(case, backends.get("numpy"))
    gradients = affine_backward(*operands)
    for gradient, operand, name in zip(gradients, operands[1:], ("dx", "dW", "db"), strict=True):
        assert gradient.dtype == operand.dtype
        assert np.array_equal(gradient, case.exact()[name].value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layer_of_a_dtype_never_seen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("numpy"), "plans", {})
    layer = AffineLayer(np.ones((3, 4), np.longdouble))
    assert layer(np.ones((2, 3), np.longdouble)).dtype == np.longdouble


def test_buffers_may_come_as_gradients() -> None:
    dy, x, W, b = (np.ones(shape) for shape in ((2, 4), (2, 3), (3, 4), (4,)))
    out = Gradients(np.zeros((2, 3)), np.zeros((3, 4)), np.zeros(4))
    for _ in range(2):
        assert all(map(operator.is_, affine_backward(dy, x, W, b, out=out), out))
    assert out.db.tolist() == [2] * 4


def unaligned(shape: tuple[int, ...], dtype: str) -> Any:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(bytearray(size + 1), dtype, offset=1).reshape(shape)


@pytest.mark.parametrize("make", [lambda shape: np.empty(shape, "q"), lambda shape: unaligned(shape, "l")])
def test_buffers_that_a_dot_refuses_are_filled(make: Any) -> None:
    """A dtype that is equal and has another number, as two of C's integers; memory that is not aligned."""
    dy, x, W, b = (np.ones(shape, "l") for shape in ((2, 4), (2, 3), (3, 4), (4,)))
    y, out = make((2, 4)), (make((2, 3)), make((3, 4)), make((4,)))
    assert affine(x, W, b, out=y) is y
    assert all(map(operator.is_, affine_backward(dy, x, W, b, out=out), out))
    assert (y.max(), *(buffer.max() for buffer in out)) == (4, 4, 2, 2)


def test_bias_may_be_wider_than_all_else() -> None:
    dy, x, W = (np.ones(shape) for shape in ((2, 4), (2, 3), (3, 4)))
    dx, dW, db = affine_backward(dy, x, W, np.ones(4, np.longdouble))
    assert (dx.dtype, dW.dtype, db.dtype) == (x.dtype, W.dtype, np.longdouble)
    assert db.tolist() == [2] * 4


def test_buffers_that_are_none_are_no_buffers(backend: Backend, device: Any) -> None:
    dy, x, W, b = case_on(make_case((2, 3), 4, seed=1), backend, device)
    expected = affine_backward(dy, x, W, b)
    for gradient, right in zip(affine_backward(dy, x, W, b, out=(None, None, None)), expected, strict=True):
        assert np.array_equal(backend.to_numpy(gradient), backend.to_numpy(right))


def test_type_of_the_bias_leaves_the_products_of_a_backward_alone() -> None:
    class Subclass(np.ndarray):
        pass

    dy, x, W, b = np.ones((2, 4)), np.ones((2, 3)), np.ones((3, 4)), np.ones(4)
    plans = [check_cotangent(check(x, W, bias, None), dy, x, W, bias) for bias in (b, b.view(Subclass))]
    assert plans[0].product is plans[1].product
    assert plans[0].sum_rows is plans[1].sum_rows


def test_buffer_of_a_vjp_is_filled() -> None:
    out = np.zeros((2, 4))
    y, vjp = affine_vjp(np.ones((2, 3)), np.ones((3, 4)), out=out)
    assert y is out
    assert out.tolist() == [[3] * 4] * 2
    assert vjp(out).dW.tolist() == [[6] * 4] * 3


def test_repr_of_gradients_says_shapes_dtypes_and_library() -> None:
    gradients = affine_backward(np.ones((5, 2), "float32"), np.ones((5, 3), "float32"), np.ones((3, 2)))
    assert repr(gradients) == (
        "<Gradients: dx is float32 (5, 3) (numpy on cpu); dW is float64 (3, 2) (numpy on cpu); db is None>"
    )
    assert repr(Gradients(0, None, 0)) == "<Gradients: dx is a builtins.int; dW is None; db is a builtins.int>"
