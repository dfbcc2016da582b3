"""`xaffine.curvature`: the double backward, Gauss–Newton products and Kronecker factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.helpers import (
    arrays_on,
    assert_equals,
    case_on,
    directions,
    floating_dtypes,
    inner,
    matrices,
    wrap_primitives,
)
from xaffine import affine_backward
from xaffine.backends import Backend
from xaffine.curvature import affine_double_backward, gauss_newton_vector_product, kronecker_factors
from xaffine.testing import make_case
from xaffine.testing.cases import Case, worst_error
from xaffine.testing.strategies import cases


class TestDoubleBackward:
    """From the cotangents of (dx, dW, db) to the gradients by (dy, x, W)."""

    def test_is_exact_on_integers(self, backend: Backend, device: Any) -> None:
        @given(cases(backend.dtypes(device)))
        def exact(case: Case) -> None:
            dots = directions(case)
            dy, x, W, b = case_on(case, backend, device)
            cotangents = arrays_on(backend, device, dots["x"], dots["W"], dots["b"])
            second = affine_double_backward(tuple(cotangents), dy, x, W, b, n_batch_axes=case.n_batch_axes)  # type: ignore[arg-type]
            x_, W_, _, dy_ = matrices(case)
            by_dx, by_dW, by_db, _ = matrices(case, **dots)
            if all(cotangent is None for cotangent in cotangents):
                assert second == (None, None, None)
                return
            assert_equals(backend, second.dy, by_dx @ W_ + x_ @ by_dW + by_db, dy)
            assert (second.x is None) == (dots["W"] is None)
            assert (second.W is None) == (dots["x"] is None)
            if second.x is not None:
                assert_equals(backend, second.x, dy_ @ by_dW.T, x)
            if second.W is not None:
                assert_equals(backend, second.W, by_dx.T @ dy_, W)

        exact()

    def test_is_the_gradient_of_what_it_differentiates(self, backend: Backend, device: Any) -> None:
        """S(p + v) − S(p) = ⟨∂S/∂p, v⟩ for a step in dy, in x or in W alone: S is affine in each."""
        case = make_case((3, 2, 2), 5, seed=3, dtypes="float64")
        cotangents = make_case((3, 2, 2), 5, seed=4, dtypes="float64")
        step = make_case((3, 2, 2), 5, seed=5, dtypes="float64")

        def scalar(case: Case) -> Any:
            gradients = affine_backward(*case_on(case, backend, device))
            weights = (cotangents.x, cotangents.W, cotangents.b)
            return sum(
                inner(backend.to_numpy(g), o.values) for g, o in zip(gradients, weights, strict=True) if o is not None
            )

        second = affine_double_backward(
            tuple(arrays_on(backend, device, cotangents.x, cotangents.W, cotangents.b)),  # type: ignore[arg-type]
            *case_on(case, backend, device),
        )
        for name, gradient in second._asdict().items():
            own, other = getattr(case, name).values, getattr(step, name).values
            moved = scalar(case.replace_values(**{name: own + other}))
            assert moved - scalar(case) == inner(backend.to_numpy(gradient), other), name

    def test_is_within_its_rounding_bounds(self, backend: Backend, device: Any) -> None:
        @given(cases(floating_dtypes(backend, device), values="floats", mixed=False))
        def bounded(case: Case) -> None:
            other = make_case(
                case.x.values.shape, case.W.values.shape[1], seed=case.seed + 1, values="floats", dtypes=case.x.dtype,
                n_batch_axes=case.n_batch_axes,
            )  # fmt: skip
            dy, x, W = arrays_on(backend, device, case.dy, case.x, case.W)
            second = affine_double_backward(
                tuple(arrays_on(backend, device, other.x, other.W, None)),
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
        dy, x, W, b = case_on(make_case((2, 3), 4, seed=0), backend, device)
        with pytest.raises(ValueError, match=r"the cotangent of dW must have the shape of W, \(3, 4\)"):
            affine_double_backward((None, x, None), dy, x, W, b)
        with pytest.raises(ValueError, match="the cotangent of db goes with b, which is None: dy is "):
            affine_double_backward((None, None, b), dy, x, W)
        with pytest.raises(TypeError, match="a tuple of three, for dx, dW and db; got a tuple of length 2"):
            affine_double_backward((None, None), dy, x, W, b)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="got a list"):
            affine_double_backward([None] * 3, dy, x, W, b)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"dy must have the shape of y, \(2, 4\): .*; b is "):
            affine_double_backward((None, None, None), x, x, W, b)
        with pytest.raises(ValueError, match=r"b must have the shape \(m,\)"):
            affine_double_backward((None, None, None), dy, x, W, b[:3])


class TestGaussNewton:
    """Jᵀ H J v."""

    def test_is_exact_on_integers(self, backend: Backend, device: Any) -> None:
        @given(cases(["float64" if "float64" in backend.dtypes(device) else "float32"], max_extent=8))
        def exact(case: Case) -> None:
            dots = directions(case)
            _, x, W, b = case_on(case, backend, device)
            vector = arrays_on(backend, device, dots["x"], dots["W"], dots["b"])
            product = gauss_newton_vector_product(
                tuple(vector), lambda y_dot: 2 * y_dot, x, W, b, n_batch_axes=case.n_batch_axes
            )
            x_, W_, _, _ = matrices(case)
            x_dot, W_dot, b_dot, _ = matrices(case, **dots)
            along = 2 * (x_dot @ W_ + x_ @ W_dot + b_dot)
            assert_equals(backend, product.dx, along @ W_.T, x)
            assert_equals(backend, product.dW, x_.T @ along, W)
            if b is not None:
                assert_equals(backend, product.db, along.sum(0), b)

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

    def test_hessian_product_is_computed_on_the_device_of_its_array(
        self, monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend
    ) -> None:
        """As with CuPy, which makes new arrays on its current device."""
        current = []

        @contextmanager
        def on_device_of(_: Backend, array: Any) -> Iterator[None]:
            current.append(array)
            yield
            current.pop()

        def product(y_dot: Any) -> Any:
            assert current[-1] is y_dot
            return y_dot

        monkeypatch.setattr(type(numpy_backend), "on_device_of", on_device_of)
        x, W = np.ones((2, 3)), np.ones((3, 4))
        gauss_newton_vector_product((None, W), product, x, W)
        assert current == []

    def test_bias_of_another_shape_is_refused_before_the_hessian_product(self) -> None:
        x, W = np.ones((2, 3)), np.ones((3, 4))
        with pytest.raises(ValueError, match="b must have"):
            gauss_newton_vector_product((None, W, None), lambda _: pytest.fail("was called"), x, W, np.ones(3))

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
            dy, x, W, b = case_on(case, backend, device)
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
        self, monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend, dtype: str, within: str
    ) -> None:
        came = []

        def recording(primitive: Any) -> Any:
            return lambda a, c: [came.extend([a.dtype.name, c.dtype.name]), primitive(a, c)][1]

        wrap_primitives(monkeypatch, numpy_backend, recording)
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
    def test_other_kinds_are_refused(self, backend: Backend, device: Any, ones: Any, dtype: str) -> None:
        if dtype in backend.dtypes(device):
            x = ones(2, 2, dtype=dtype)
            with pytest.raises(TypeError, match=f"of real floating dtype: dy is {dtype}"):
                kronecker_factors(x, x, x)

    @pytest.mark.parametrize("batch", [(0,), (2, 0)])
    def test_empty_batch_has_no_mean(self, ones: Any, batch: tuple[int, ...]) -> None:
        x, W = ones(*batch, 3), ones(3, 3)
        with pytest.raises(ValueError, match="at least one sample"):
            kronecker_factors(x, x, W, n_batch_axes=-1)

    def test_dy_of_another_shape_is_refused(self) -> None:
        x, W = np.ones((2, 3)), np.ones((3, 4))
        with pytest.raises(ValueError, match=r"dy must have the shape of y, \(2, 4\): .*; b is "):
            kronecker_factors(x, x, W, np.ones(4))
