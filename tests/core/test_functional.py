"""`affine`, `affine_backward` and `affine_vjp` beyond the properties: worked numbers, wrt, out, NaN, threads."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers import assert_fills, case_on
from xaffine import AffineLayer, Gradients, affine, affine_backward, affine_vjp, backends, functional, kernels, shapes
from xaffine.backends import Backend
from xaffine.kernels import kernel_of, standard
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
def test_only_gradients_wanted_are_computed(monkeypatch: pytest.MonkeyPatch, array: Any, wrt: Any) -> None:
    called = []
    monkeypatch.setattr(functional, "_COMPILED", {})
    monkeypatch.setattr(functional, "compiler_for", lambda _: None)
    monkeypatch.setattr(functional, "kernel_of", lambda *_: standard)
    monkeypatch.setattr(functional, "numpy_kernel", standard)
    for name in ("x", "W", "b"):
        original = getattr(standard, f"backward_{name}")
        monkeypatch.setattr(standard, f"backward_{name}", lambda *a, n=name, f=original: called.append(n) or f(*a))
    gradients = affine_backward(
        array(np.ones((2, 4))), array(np.ones((2, 3))), array(np.ones((3, 4))), array(np.ones(4)), wrt=wrt
    )
    assert sorted(called) == sorted(wrt)
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


@pytest.mark.parametrize("which", range(3))
def test_relatives_of_arrays_take_the_standard_kernel(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    monkeypatch.delattr(functional.numpy_kernel, "backward")
    case = make_case((5, 3), 4, seed=0)
    operands = case_on(case, backends.get("numpy"))
    operands[which] = operands[which].view(Relative)
    for gradient, name in zip(affine_backward(*operands), ("dx", "dW", "db"), strict=True):
        assert np.array_equal(gradient, case.exact()[name].value)
    assert kernel_of(*operands[:3]) is standard
    if which > 0:
        monkeypatch.delattr(functional.numpy_kernel, "forward")
        assert np.array_equal(affine(*operands[1:]), case.exact()["y"].value)


class Relative(np.ndarray):
    """An array of a library that compiles, as far as the functions can tell."""


class TestCompiled:
    """What a library compiles is the whole way; here a compiler that notes what it is given stands in for it."""

    case = make_case((5, 2, 3), 4, seed=0, n_batch_axes=1)

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []

        def compiler(function: Any, static_argnums: Any) -> Any:
            def compiled(*arguments: Any) -> Any:
                statics = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
                calls.append((function.__name__, *(arguments[i] for i in statics)))
                assert len(arguments) == max(statics) + 1
                return function(*arguments)

            return compiled

        monkeypatch.setattr(functional, "_COMPILED", {np.ndarray: None})
        monkeypatch.setattr(functional, "compiler_for", lambda kind: compiler if kind is Relative else None)
        return calls

    def operands(self) -> list[Any]:
        return [array.view(Relative) for array in case_on(self.case, backends.get("numpy"))]

    def assert_exact(self, **results: Any) -> None:
        for name, result in results.items():
            assert np.array_equal(result, self.case.exact()[name].value), name

    def test_forward_and_backward_are_compiled(self, calls: list[Any]) -> None:
        dy, x, W, b = self.operands()
        y, vjp = affine_vjp(x, W, b, n_batch_axes=1)
        self.assert_exact(y=y, **vjp(dy)._asdict())
        self.assert_exact(**affine_backward(dy, x, W, b)._asdict())
        assert calls == [
            ("forward", 1), ("backward", 1, ("x", "W", "b")), ("backward", None, ("x", "W", "b"))
        ]  # fmt: skip

    def test_what_is_wanted_is_passed_on(self, calls: list[Any]) -> None:
        dy, x, W, _ = self.operands()
        assert affine_backward(dy, x, W, wrt="bW").dx is None
        _, vjp = affine_vjp(x, W)
        assert vjp(dy, wrt=("x",)).dW is None
        assert calls == [("backward", None, ("W",)), ("forward", None), ("backward", None, ("x",))]
        assert functional._COMPILED.keys() == {np.ndarray, Relative}

    def test_buffers_and_operands_of_two_types_are_not_compiled(self, calls: list[Any]) -> None:
        dy, x, W, b = self.operands()
        y, dx = np.zeros((5, 4), "f").view(Relative), np.zeros((5, 2, 3), "f").view(Relative)
        assert affine(x, W, b, out=y) is y
        assert affine_backward(dy, x, W, b, out=(dx, None, None)).dx is dx
        self.assert_exact(y=y, dx=dx)
        self.assert_exact(y=affine(x, np.asarray(W), b))
        self.assert_exact(y=affine(x, W, np.asarray(b)))
        self.assert_exact(**affine_backward(np.asarray(dy), x, W, b)._asdict())
        self.assert_exact(**affine_backward(dy, x, W, np.asarray(b))._asdict())
        assert calls == []
        _, vjp = affine_vjp(x, W, b)
        assert vjp(dy, (dx, None, None)).dx is dx
        assert calls == [("forward", None)]

    def test_what_is_compiled_takes_the_axes_and_what_is_wanted(self) -> None:
        case = make_case((5, 2, 3), 4, seed=0, n_batch_axes=2)
        dy, x, W, b = case_on(case, backends.get("numpy"))
        compiled = functional._compile(lambda function, **_: function)
        assert np.array_equal(compiled.forward(x, W, b, 2), case.exact()["y"].value)
        dx, dW, db = compiled.backward(dy, x, W, b, 2, ("W",))
        assert np.array_equal(dW, case.exact()["dW"].value)
        assert (dx, db) == (None, None)

    @pytest.mark.parametrize("n_batch_axes", [True, 1.0])
    def test_axes_that_equal_one_and_are_none_are_refused(self, calls: list[Any], n_batch_axes: Any) -> None:
        dy, x, W, b = self.operands()
        affine(x, W, b, n_batch_axes=1)
        with pytest.raises(TypeError, match="n_batch_axes must be an int"):
            affine(x, W, b, n_batch_axes=n_batch_axes)
        with pytest.raises(TypeError, match="n_batch_axes must be an int"):
            affine_backward(dy, x, W, b, n_batch_axes=n_batch_axes)
        assert calls == [("forward", 1)]

    def test_what_the_compiled_way_refuses_is_told_by_the_checks(self, calls: list[Any]) -> None:
        dy, x, W, b = self.operands()
        with pytest.raises(ValueError, match="W takes n = 5"):
            affine(x, W[:5], b)
        with pytest.raises(ValueError, match="dy must have the shape of y"):
            affine_backward(dy[:3], x, W, b)
        assert [name for name, *_ in calls] == ["forward", "backward"]


def test_kernel_is_found_by_the_type_of_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_KERNELS", {})
    for _ in range(2):  # the second time without a search
        assert kernel_of(np.ones(2)) is functional.numpy_kernel
        assert kernel_of(np.ones(2).view(Relative)) is standard
    assert {np.ndarray: functional.numpy_kernel, Relative: standard} == kernels._KERNELS


def test_compiler_is_found_by_the_type_of_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = object()
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(jit=jit))
    for module, name in (("jax._src.array", "ArrayImpl"), ("jaxlib._jax", "ArrayImpl")):
        assert kernels.compiler_for(type(name, (), {"__module__": module})) is jit
    for module, name in (("jax._src.core", "Tracer"), ("mine", "ArrayImpl"), ("torch", "Tensor")):
        assert kernels.compiler_for(type(name, (), {"__module__": module})) is None


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
        ("out", "words"), [((None, None), "tuple of 2"), (np.zeros(()), "ndarray"), ([None], "list")]
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

    def test_buffers_are_not_filled_where_torch_records(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On torch itself the torch session looks."""
        dx, dW = np.zeros((2, 3), "f"), np.zeros((3, 4), "f")
        monkeypatch.setattr(shapes, "is_recorded", lambda array: array is self.W or array is self.b)
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

    def test_kernel_gets_the_memory_of_the_buffers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A result beside a buffer would take its memory once more."""
        filled: list[Any] = []

        def noting(function: Any) -> Any:
            return lambda *arguments: [filled.append(arguments[-1]), function(*arguments)][1]

        for name in ("forward", "backward"):
            monkeypatch.setattr(functional.numpy_kernel, name, noting(getattr(functional.numpy_kernel, name)))
        case = make_case((5, 2, 3), 4, seed=0, n_batch_axes=2)
        dy, x, W, b = case_on(case, backends.get("numpy"))
        y, out = np.empty_like(dy), tuple(map(np.empty_like, (x, W, b)))
        affine(x, W, b, out=y, n_batch_axes=2)
        affine_backward(dy, x, W, b, out=out, n_batch_axes=2)
        for given, came in zip((y, *out), (filled[0], *filled[1]), strict=True):
            assert given.__array_interface__["data"] == came.__array_interface__["data"]
            assert given.size == came.size

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


def test_all_is_computed_on_the_device_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy allocates and multiplies on the current device, wherever its operands are."""
    entered: list[Any] = []

    def computing_with(array: Any) -> Any:
        entered.append(array)
        return nullcontext()

    monkeypatch.setattr(functional, "computing_with", computing_with)
    dy, x, W, b = (array.view(Relative) for array in case_on(make_case((5, 3), 4, seed=0), backends.get("numpy")))
    calls = [lambda: affine(x, W, b), lambda: affine_backward(dy, x, W, b)]
    calls.append(lambda: functional.along(shapes.check(x, W, b, None), x, W, b, x.dtype, x.dtype))
    for call in calls:
        entered.clear()
        call()
        assert len(entered) == 1
        assert entered[0] is x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layer_of_a_dtype_never_seen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_COMMON_DTYPES", {})
    layer = AffineLayer(np.ones((3, 4), np.longdouble))
    assert layer(np.ones((2, 3), np.longdouble)).dtype == np.longdouble
