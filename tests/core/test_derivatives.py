"""`affine_jvp` and the second derivatives of `xaffine.curvature`, in the four tiers of proof."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from xaffine import affine_backward, affine_jvp, functional
from xaffine.backends import Backend
from xaffine.curvature import affine_double_backward, gauss_newton_vector_product, kronecker_factors
from xaffine.kernels import standard
from xaffine.testing import make_case
from xaffine.testing.cases import Case, Operand, worst_error
from xaffine.testing.strategies import cases


def directions(case: Case, seed: int = 1) -> dict[str, Operand | None]:
    """For x, W, b and dy another array of the same kind of values; None for some, and for a bias that is not there."""
    rng = np.random.default_rng(case.seed + seed)
    own = {"x": case.x, "W": case.W, "b": case.b, "dy": case.dy}
    others = make_case(
        case.x.values.shape,
        case.W.values.shape[1],
        seed=case.seed + seed,
        values=case.kind,
        dtypes=tuple(case.x.dtype if o is None else o.dtype for o in own.values()),  # type: ignore[arg-type]
        n_batch_axes=case.n_batch_axes,
    )
    return {
        name: None if o is None or (name != "dy" and rng.random() < 0.25) else getattr(others, name)
        for name, o in own.items()
    }


def wide(operand: Operand | None, shape: tuple[int, ...]) -> Any:
    """Small integers in arithmetic that is exact on them; zeros for None."""
    if operand is None:
        return np.zeros(shape, np.int64)
    kind = complex if np.iscomplexobj(operand.values) else np.int64
    return operand.values.astype(kind).reshape(shape)


def matrices(case: Case, **some: Operand | None) -> list[Any]:
    """x, W, b and dy, or what stands in their places, as matrices."""
    n, m = case.W.values.shape
    shapes = {"x": (case.N, n), "W": (n, m), "b": (m,), "dy": (case.N, m)}
    return [wide(some[name] if name in some else getattr(case, name), shape) for name, shape in shapes.items()]


def on(backend: Backend, device: Any, *some: Operand | None) -> list[Any]:
    return [None if o is None else o.on(backend, device) for o in some]


def assert_is(backend: Backend, got: Any, expected: Any, like: Any) -> None:
    """Equal to the last bit, in the shape, dtype and library of what it belongs to."""
    assert type(got) is type(like)
    assert got.dtype == like.dtype
    values = backend.to_numpy(got)
    assert values.shape == backend.to_numpy(like).shape
    assert np.array_equal(values, np.reshape(expected, values.shape).astype(values.dtype))


class TestJvp:
    """ẏ = ẋ W + x Ẇ + ḃ."""

    def test_is_exact_on_integers(self, backend: Backend, device: Any) -> None:
        @given(cases(backend.dtypes(device)))
        def exact(case: Case) -> None:
            dots = directions(case)
            primals = on(backend, device, case.x, case.W, case.b)
            tangents = on(backend, device, dots["x"], dots["W"], dots["b"])
            y, y_dot = affine_jvp(tuple(primals), tuple(tangents), n_batch_axes=case.n_batch_axes)
            x, W, b, _ = matrices(case)
            x_dot, W_dot, b_dot, _ = matrices(case, **dots)
            assert_is(backend, y, x @ W + b, functional.affine(*primals, n_batch_axes=case.n_batch_axes))
            assert_is(backend, y_dot, x_dot @ W + x @ W_dot + b_dot, y)

        exact()

    def test_is_within_its_rounding_bound(self, backend: Backend, device: Any) -> None:
        @given(cases([d for d in backend.dtypes(device) if "int" not in d], values="floats", mixed=False))
        def bounded(case: Case) -> None:
            dots = directions(case)
            n, m = case.W.values.shape
            flat = [o.values.reshape(shape) if o else np.zeros(shape, case.x.values.dtype) for o, shape in (
                (dots["x"], (case.N, n)), (case.x, (case.N, n)), (case.W, (n, m)), (dots["W"], (n, m)),
                (dots["b"], (m,)), (case.dy, (case.N, m)),
            )]  # fmt: skip
            # One product with twice the features; its parts are what is rounded on the way.
            dtype = case.x.dtype
            operands = [Operand(v, dtype) for v in (np.hstack(flat[:2]), np.vstack(flat[2:4]), flat[4], flat[5])]
            whole = Case(*operands, None if case.N else 1, "floats", 0)  # type: ignore[arg-type]
            exact = replace_stages(whole, n)
            primals = on(backend, device, case.x, case.W, case.b)
            tangents = on(backend, device, dots["x"], dots["W"], dots["b"])
            y_dot = affine_jvp(tuple(primals), tuple(tangents), n_batch_axes=case.n_batch_axes)[1]
            assert worst_error(backend.to_numpy(y_dot).reshape(case.N, m), exact)[0] <= 1

        bounded()

    def test_is_adjoint_to_backward(self, backend: Backend, device: Any) -> None:
        @given(cases(backend.dtypes(device)))
        def adjoint(case: Case) -> None:
            dots = directions(case)
            primals = on(backend, device, case.x, case.W, case.b)
            tangents = on(backend, device, dots["x"], dots["W"], dots["b"])
            y_dot = affine_jvp(tuple(primals), tuple(tangents), n_batch_axes=case.n_batch_axes)[1]
            dy = case.dy.on(backend, device)
            gradients = affine_backward(dy, *primals, n_batch_axes=case.n_batch_axes)
            left = inner(backend.to_numpy(y_dot), case.dy.values)
            pairs = zip(("x", "W", "b"), gradients, strict=True)
            right = sum(inner(dots[name].values, backend.to_numpy(g)) for name, g in pairs if dots[name] is not None)
            assert left == right

        adjoint()

    @pytest.mark.parametrize("given_", list(itertools.product((False, True), repeat=3)))
    def test_zero_costs_nothing(self, monkeypatch: pytest.MonkeyPatch, given_: Any) -> None:
        products: list[Any] = []

        class Counting:
            @staticmethod
            def forward(x: Any, W: Any, b: Any, out: Any = None) -> Any:
                products.append((x.shape, W.shape))
                return standard.forward(x, W, b, out)

        monkeypatch.setattr(functional, "kernel_of", lambda *_: Counting)
        primals = np.ones((2, 3)), np.ones((3, 4)), np.ones(4)
        tangents = tuple(2 * p if g else None for p, g in zip(primals, given_, strict=True))
        y_dot = affine_jvp(primals, tangents)[1]
        with_features = [shapes for shapes in products if shapes[0][1]]
        assert len(with_features) == sum(given_[:2])  # y of NumPy takes the kernel of NumPy
        assert (y_dot == 6 * given_[0] + 6 * given_[1] + 2 * given_[2]).all()

    def test_result_is_fresh_and_inputs_are_left_alone(self, backend: Backend, device: Any) -> None:
        case = make_case((3, 2), 4, seed=0)
        primals, tangents = (tuple(on(backend, device, case.x, case.W, case.b)) for _ in range(2))
        before = [backend.to_numpy(array).copy() for array in (*primals, *tangents)]
        first = backend.to_numpy(affine_jvp(primals, (None, None, tangents[2]))[1]).copy()
        for array, values in zip((*primals, *tangents), before, strict=True):
            assert np.array_equal(backend.to_numpy(array), values)
        again = affine_jvp(primals, (None, None, tangents[2]))[1]
        if isinstance(again, np.ndarray):
            again += 1  # not a view that repeats ḃ
            assert np.array_equal(again, first + 1)

    def test_bad_input_is_refused(self, backend: Backend, device: Any) -> None:
        x, W, b = (backend.from_numpy(np.ones(s, "float32"), device=device) for s in ((2, 3), (3, 4), (4,)))
        for tangents, words in (
            ((W, None, None), r"x_dot must have the shape of x, \(2, 3\)"),
            ((None, x, None), r"W_dot must have the shape of W, \(3, 4\)"),
            ((None, None, x), r"b_dot must have the shape of b, \(4,\)"),
        ):
            with pytest.raises(ValueError, match=words):
                affine_jvp((x, W, b), tangents)
        with pytest.raises(ValueError, match="b_dot goes with b, which is None: x is "):
            affine_jvp((x, W), (None, None, b))
        with pytest.raises(TypeError, match=r"primals must be a tuple of two or three, .* came as a tuple of 1"):
            affine_jvp((x,), (None,))
        with pytest.raises(TypeError, match=r"tangents must be a tuple of two or three, .* came as a list"):
            affine_jvp((x, W), [None, None])  # type: ignore[arg-type]
        integers = backend.from_numpy(np.ones((2, 3), "int32"), device=device)
        with pytest.raises(TypeError, match=r"of one kind.*x_dot is int32"):
            affine_jvp((x, W, b), (integers, None, None))
        with pytest.raises(TypeError, match="x_dot is no array"):
            affine_jvp((x, W, b), (3.0, None, None))


def replace_stages(whole: Case, n: int) -> Any:
    """The exact sum, with each product of n features among what is rounded to the dtype of the result."""
    exact = whole.exact()["y"]
    columns = [slice(n), slice(n, None)]
    assert whole.b is not None
    parts = []
    for some, bias in itertools.product(columns, (whole.b, None)):
        half = replace(
            whole,
            x=replace(whole.x, values=whole.x.values[:, some]),
            W=replace(whole.W, values=whole.W.values[some]),
            b=bias,
        )
        own = half.exact()["y"]
        parts += [[part * 2 ** (exact.scale - own.scale) for part in stage] for stage in own.stages]
    return exact._replace(stages=[*parts, exact.stages[-1]])


def inner(a: Any, b: Any) -> Any:
    kind = complex if np.iscomplexobj(a) or np.iscomplexobj(b) else np.int64
    return np.sum(np.asarray(a).astype(kind) * np.asarray(b).astype(kind))


class TestDoubleBackward:
    """From the cotangents of (dx, dW, db) to the gradients by (dy, x, W)."""

    def test_is_exact_on_integers(self, backend: Backend, device: Any) -> None:
        @given(cases(backend.dtypes(device)))
        def exact(case: Case) -> None:
            dots = directions(case)
            dy, x, W, b = on(backend, device, case.dy, case.x, case.W, case.b)
            cotangents = on(backend, device, dots["x"], dots["W"], dots["b"])
            second = affine_double_backward(tuple(cotangents), dy, x, W, b, n_batch_axes=case.n_batch_axes)  # type: ignore[arg-type]
            x_, W_, _, dy_ = matrices(case)
            by_dx, by_dW, by_db, _ = matrices(case, **dots)
            if all(cotangent is None for cotangent in cotangents):
                assert second == (None, None, None)
                return
            assert_is(backend, second.dy, by_dx @ W_ + x_ @ by_dW + by_db, dy)
            assert (second.x is None) == (dots["W"] is None)
            assert (second.W is None) == (dots["x"] is None)
            if second.x is not None:
                assert_is(backend, second.x, dy_ @ by_dW.T, x)
            if second.W is not None:
                assert_is(backend, second.W, by_dx.T @ dy_, W)

        exact()

    def test_is_the_gradient_of_what_it_differentiates(self, backend: Backend, device: Any) -> None:
        """S(p + v) − S(p) = ⟨∂S/∂p, v⟩ for a step in dy, in x or in W alone: S is affine in each."""
        case = make_case((3, 2, 2), 5, seed=3, dtypes="float64")
        cotangents = make_case((3, 2, 2), 5, seed=4, dtypes="float64")
        step = make_case((3, 2, 2), 5, seed=5, dtypes="float64")

        def scalar(case: Case) -> Any:
            gradients = affine_backward(*on(backend, device, case.dy, case.x, case.W, case.b))
            weights = (cotangents.x, cotangents.W, cotangents.b)
            return sum(
                inner(backend.to_numpy(g), o.values) for g, o in zip(gradients, weights, strict=True) if o is not None
            )

        second = affine_double_backward(
            tuple(on(backend, device, cotangents.x, cotangents.W, cotangents.b)),  # type: ignore[arg-type]
            *on(backend, device, case.dy, case.x, case.W, case.b),
        )
        for name, gradient in second._asdict().items():
            own, other = getattr(case, name).values, getattr(step, name).values
            moved = scalar(case.replace_values(**{name: own + other}))
            assert moved - scalar(case) == inner(backend.to_numpy(gradient), other), name

    def test_is_within_its_rounding_bounds(self, backend: Backend, device: Any) -> None:
        @given(cases([d for d in backend.dtypes(device) if "int" not in d], values="floats", mixed=False))
        def bounded(case: Case) -> None:
            other = make_case(
                case.x.values.shape, case.W.values.shape[1], seed=case.seed + 1, values="floats", dtypes=case.x.dtype,
                n_batch_axes=case.n_batch_axes,
            )  # fmt: skip
            dy, x, W = on(backend, device, case.dy, case.x, case.W)
            second = affine_double_backward(
                tuple(on(backend, device, other.x, other.W, None)),
                dy,
                x,
                W,
                n_batch_axes=case.n_batch_axes,  # type: ignore[arg-type]
            )
            # The dx and the dW of a layer at the cotangents.
            exact = replace(case, x=other.x, W=other.W, b=None).exact()
            assert worst_error(backend.to_numpy(second.x), exact["dx"])[0] <= 1
            assert worst_error(backend.to_numpy(second.W), exact["dW"])[0] <= 1

        bounded()

    def test_bad_input_is_refused(self, backend: Backend, device: Any) -> None:
        dy, x, W, b = on(backend, device, *(getattr(make_case((2, 3), 4, seed=0), n) for n in ("dy", "x", "W", "b")))
        with pytest.raises(ValueError, match=r"the cotangent of dW must have the shape of W, \(3, 4\)"):
            affine_double_backward((None, x, None), dy, x, W, b)
        with pytest.raises(ValueError, match="the cotangent of db goes with b, which is None: dy is "):
            affine_double_backward((None, None, b), dy, x, W)
        with pytest.raises(TypeError, match="a tuple of three, for dx, dW and db; it came as a tuple of 2"):
            affine_double_backward((None, None), dy, x, W, b)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="it came as a list"):
            affine_double_backward([None] * 3, dy, x, W, b)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="dy must have the shape of y"):
            affine_double_backward((None, None, None), x, x, W, b)


class TestGaussNewton:
    """Jᵀ H J v."""

    def test_is_exact_on_integers(self, backend: Backend, device: Any) -> None:
        @given(cases(["float64" if "float64" in backend.dtypes(device) else "float32"], max_extent=8))
        def exact(case: Case) -> None:
            dots = directions(case)
            x, W, b = on(backend, device, case.x, case.W, case.b)
            vector = on(backend, device, dots["x"], dots["W"], dots["b"])
            product = gauss_newton_vector_product(
                tuple(vector), lambda y_dot: 2 * y_dot, x, W, b, n_batch_axes=case.n_batch_axes
            )
            x_, W_, _, _ = matrices(case)
            x_dot, W_dot, b_dot, _ = matrices(case, **dots)
            along = 2 * (x_dot @ W_ + x_ @ W_dot + b_dot)
            assert_is(backend, product.dx, along @ W_.T, x)
            assert_is(backend, product.dW, x_.T @ along, W)
            if b is not None:
                assert_is(backend, product.db, along.sum(0), b)

        exact()

    def test_only_what_is_wanted_is_computed(self) -> None:
        x, W = np.ones((2, 3)), np.ones((3, 4))
        product = gauss_newton_vector_product((None, W), lambda y_dot: y_dot, x, W, wrt=("W",))
        assert product.dx is product.db is None
        assert (product.dW == 6).all()

    @pytest.mark.parametrize(("of_x", "of_W"), [("float32", "float32"), ("float32", "float64"), ("complex64",) * 2])
    def test_hessian_product_is_of_an_array_in_the_dtype_of_y(self, of_x: str, of_W: str) -> None:
        x, W = np.ones((2, 3), of_x), np.ones((3, 4), of_W) * (1j if of_W == "complex64" else 1)
        came = []

        def record(y_dot: Any) -> Any:
            came.append(y_dot)
            return y_dot

        gauss_newton_vector_product((None, W), record, x, W)
        assert came[0].dtype == np.result_type(x, W)
        assert (came[0] == x @ W).all()

    def test_hessian_product_of_another_shape_is_refused(self) -> None:
        x, W = np.ones((2, 3)), np.ones((3, 4))
        with pytest.raises(ValueError, match="dy must have the shape of y"):
            gauss_newton_vector_product((None, W), lambda y_dot: y_dot[:1], x, W)


class TestKroneckerFactors:
    """A = xᵀ x / N and G = dyᵀ dy / N."""

    @pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3), (3,)])
    def test_are_exact_for_powers_of_two(self, backend: Backend, device: Any, shape: Any) -> None:
        axes = 2 if len(shape) == 3 else None
        for dtype in {"float16", "bfloat16", "float32", "float64"} & set(backend.dtypes(device)):
            case = make_case(shape, 2, seed=0, dtypes=dtype, n_batch_axes=axes)
            dy, x, W, b = on(backend, device, case.dy, case.x, case.W, case.b)
            factors = kronecker_factors(dy, x, W, b, n_batch_axes=axes)
            x_, _, _, dy_ = matrices(case)
            for factor, matrix, like in zip(factors, (x_, dy_), (x, dy), strict=True):
                assert factor.dtype == like.dtype
                assert np.array_equal(backend.to_numpy(factor), matrix.T @ matrix / case.N)

    def test_curvature_of_a_squared_length_is_their_product(self) -> None:
        """For one sample the Hessian of ½‖y − t‖² by vec(W) is A ⊗ I, and the empirical Fisher A ⊗ G."""
        rng = np.random.default_rng(0)
        x, W, dy = (rng.integers(-3, 4, shape).astype(float) for shape in ((1, 3), (3, 2), (1, 2)))
        A, G = kronecker_factors(dy, x, W)
        v = rng.integers(-3, 4, W.shape).astype(float)
        hessian = gauss_newton_vector_product((None, v), lambda y_dot: y_dot, x, W, wrt="W").dW
        assert np.array_equal(np.kron(A, np.eye(2)) @ v.ravel(), hessian.ravel())
        gradient = affine_backward(dy, x, W).dW.ravel()
        assert np.array_equal(np.kron(A, G), np.outer(gradient, gradient))

    @pytest.mark.parametrize(
        ("dtype", "within"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
    )
    def test_are_computed_in_the_dtype_of_the_operands(
        self, monkeypatch: pytest.MonkeyPatch, dtype: str, within: str
    ) -> None:
        came = []

        def record(dy: Any, x: Any) -> Any:
            came.extend([dy.dtype.name, x.dtype.name])
            return own(dy, x)

        own = standard.backward_W
        monkeypatch.setattr(standard, "backward_W", record)
        x = np.ones((2, 2), dtype)
        kronecker_factors(x, x, x)
        assert came == [within] * 4

    def test_bias_of_another_shape_is_refused(self) -> None:
        x = np.ones((2, 2))
        with pytest.raises(ValueError, match="b must have"):
            kronecker_factors(x, x, x, np.ones(3))

    def test_halves_keep_their_range(self) -> None:
        x = np.full((4096, 1), 8, np.float16)  # whose squares sum to four times the largest float16
        A, G = kronecker_factors(x, x, np.ones((1, 1), np.float16))
        assert A.tolist() == G.tolist() == [[64]]

    @pytest.mark.parametrize("dtype", ["int32", "complex64"])
    def test_other_kinds_are_refused(self, backend: Backend, device: Any, dtype: str) -> None:
        if dtype in backend.dtypes(device):
            x = backend.from_numpy(np.ones((2, 2), dtype), device=device)
            with pytest.raises(TypeError, match=f"of real floating dtype: dy is {dtype}"):
                kronecker_factors(x, x, x)

    def test_empty_batch_has_no_mean(self, backend: Backend, device: Any) -> None:
        x, W = (backend.from_numpy(np.ones(shape, "float32"), device=device) for shape in ((0, 3), (3, 3)))
        with pytest.raises(ValueError, match="at least one sample"):
            kronecker_factors(x, x, W)
