"""`affine_jvp`: ẏ = ẋ W + x Ẇ + ḃ, exact, within its rounding bound, and adjoint to the backward."""

from __future__ import annotations

import itertools
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
from xaffine import affine, affine_backward, affine_jvp
from xaffine.backends import Backend
from xaffine.testing import make_case
from xaffine.testing.cases import Case, Operand, worst_error
from xaffine.testing.strategies import cases


def jvp_along(dots: dict[str, Operand | None], case: Case, backend: Backend, device: Any) -> tuple[Any, Any]:
    """Return y and ẏ of a case along the directions of x, W and b."""
    primals = case_on(case, backend, device)[1:]
    tangents = arrays_on(backend, device, dots["x"], dots["W"], dots["b"])
    return affine_jvp(tuple(primals), tuple(tangents), n_batch_axes=case.n_batch_axes)


def replace_stages(whole: Case, n: int) -> Any:
    """Return the exact y, whose roundings include those of the products of the first n features and of the rest."""
    exact = whole.exact()["y"]
    columns = [slice(n), slice(n, None)]
    assert whole.b is not None
    parts = []
    for features, bias in itertools.product(columns, (whole.b, None)):
        half = replace(
            whole,
            x=replace(whole.x, values=whole.x.values[:, features]),
            W=replace(whole.W, values=whole.W.values[features]),
            b=bias,
        )
        half_exact = half.exact()["y"]
        parts += [[part * 2 ** (exact.scale - half_exact.scale) for part in stage] for stage in half_exact.stages]
    return exact._replace(stages=[*parts, exact.stages[-1]])


def test_is_exact_on_integers(backend: Backend, device: Any) -> None:
    @given(cases(backend.dtypes(device)))
    def exact(case: Case) -> None:
        dots = directions(case)
        _, *primals = case_on(case, backend, device)
        y, y_dot = jvp_along(dots, case, backend, device)
        x, W, b, _ = matrices(case)
        x_dot, W_dot, b_dot, _ = matrices(case, **dots)
        assert_equals(backend, y, x @ W + b, affine(*primals, n_batch_axes=case.n_batch_axes))
        assert_equals(backend, y_dot, x_dot @ W + x @ W_dot + b_dot, y)

    exact()


def test_is_within_its_rounding_bound(backend: Backend, device: Any) -> None:
    @given(cases(floating_dtypes(backend, device), values="floats", mixed=False))
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
        _, y_dot = jvp_along(dots, case, backend, device)
        assert worst_error(backend.to_numpy(y_dot).reshape(case.N, m), exact)[0] <= 1

    bounded()


def test_is_adjoint_to_backward(backend: Backend, device: Any) -> None:
    @given(cases(backend.dtypes(device)))
    def adjoint(case: Case) -> None:
        dots = directions(case)
        _, y_dot = jvp_along(dots, case, backend, device)
        gradients = affine_backward(*case_on(case, backend, device), n_batch_axes=case.n_batch_axes)
        left = inner(backend.to_numpy(y_dot), case.dy.values)
        pairs = zip(("x", "W", "b"), gradients, strict=True)
        right = sum(inner(dots[name].values, backend.to_numpy(g)) for name, g in pairs if dots[name] is not None)
        assert left == right

    adjoint()


@pytest.mark.parametrize("given_", list(itertools.product((False, True), repeat=3)))
def test_zero_costs_nothing(monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend, given_: Any) -> None:
    factors: list[tuple[int, ...]] = []

    def recording(primitive: Any) -> Any:
        return lambda a, *more: [factors.append(a.shape), primitive(a, *more)][1]

    wrap_primitives(monkeypatch, numpy_backend, recording)
    primals = np.ones((2, 3)), np.ones((3, 4)), np.ones(4)
    tangents = tuple(2 * p if g else None for p, g in zip(primals, given_, strict=True))
    y_dot = affine_jvp(primals, tangents)[1]
    with_features = [shape for shape in factors if shape[1]]
    assert len(with_features) == 1 + sum(given_[:2])  # that of y, and one for each tangent of a factor
    assert (y_dot == 6 * given_[0] + 6 * given_[1] + 2 * given_[2]).all()


def test_result_is_fresh_and_inputs_are_left_alone(backend: Backend, device: Any) -> None:
    case = make_case((3, 2), 4, seed=0)
    primals, tangents = (tuple(case_on(case, backend, device)[1:]) for _ in range(2))
    before = [backend.to_numpy(array).copy() for array in (*primals, *tangents)]
    first = backend.to_numpy(affine_jvp(primals, (None, None, tangents[2]))[1]).copy()
    for array, values in zip((*primals, *tangents), before, strict=True):
        assert np.array_equal(backend.to_numpy(array), values)
    again = affine_jvp(primals, (None, None, tangents[2]))[1]
    if isinstance(again, np.ndarray):
        again += 1  # not a view that repeats ḃ
        assert np.array_equal(again, first + 1)


def test_bad_input_is_refused(ones: Any) -> None:
    x, W, b = ones(2, 3), ones(3, 4), ones(4)
    for tangents, words in (
        ((W, None, None), r"x_dot must have the shape of x, \(2, 3\)"),
        ((None, x, None), r"W_dot must have the shape of W, \(3, 4\)"),
        ((None, None, x), r"b_dot must have the shape of b, \(4,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            affine_jvp((x, W, b), tangents)
    with pytest.raises(ValueError, match="b_dot goes with b, which is None: x is "):
        affine_jvp((x, W), (None, None, b))
    with pytest.raises(TypeError, match=r"primals must be a tuple of two or three, .* got a tuple of length 1"):
        affine_jvp((x,), (None,))
    with pytest.raises(TypeError, match=r"tangents must be a tuple of two or three, .* got a list"):
        affine_jvp((x, W), [None, None])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"of one kind.*x_dot is int32"):
        affine_jvp((x, W, b), (ones(2, 3, dtype="int32"), None, None))
    with pytest.raises(TypeError, match="x_dot is no array"):
        affine_jvp((x, W, b), (3.0, None, None))


def test_tangent_of_y_has_its_dtype_also_where_the_direction_is_wider() -> None:
    x, W = np.ones((2, 3), "float32"), np.ones((3, 4), "float32")
    y, y_dot = affine_jvp((x, W), (np.ones((2, 3)), None))
    assert (y.dtype, y_dot.dtype, y_dot.tolist()) == (np.float32, np.float32, [[3] * 4] * 2)


def test_y_is_that_of_affine_to_the_last_bit_along_wider_directions() -> None:
    rng = np.random.default_rng(0)
    primals = tuple(rng.standard_normal(shape, dtype="f") for shape in ((5, 40), (40, 4), (4,)))
    y, y_dot = affine_jvp(primals, tuple(primal.astype(float) for primal in primals))
    assert y.dtype == y_dot.dtype == np.float32
    assert y.tobytes() == affine(*primals).tobytes()


def test_primals_are_checked_as_in_a_forward(ones: Any) -> None:
    with pytest.raises(ValueError, match=r"b must have the shape \(m,\) = \(4,\)"):
        affine_jvp((ones(2, 3), ones(3, 4), ones(3)), (None, None, None))


def test_named_tuples_are_tuples_of_three(backend: Backend, ones: Any) -> None:
    dy, x, W, b = ones(2, 4), ones(2, 3), ones(3, 4), ones(4)
    gradients = affine_backward(dy, x, W, b)
    _, y_dot = affine_jvp((x, W, b), gradients)
    _, expected = affine_jvp((x, W, b), tuple(gradients))
    assert np.array_equal(backend.to_numpy(y_dot), backend.to_numpy(expected))
