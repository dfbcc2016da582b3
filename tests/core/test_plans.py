"""Plans: what the checks found is remembered by the signature of the operands, and answers as the checks would."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xaffine import AffineLayer, _checks, affine, affine_backward, affine_jvp, affine_vjp
from xaffine.backends import Backend
from xaffine.curvature import affine_double_backward, kronecker_factors
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms, per_sample_gradients


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend) -> dict[Any, Any]:
    """Those of NumPy, none at first."""
    plans: dict[Any, Any] = {}
    monkeypatch.setattr(numpy_backend, "plans", plans)
    return plans


def outcome(call: Any) -> Any:
    """What a call returns or raises, in a form that can be compared."""
    try:
        results = call()
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    some = results if isinstance(results, tuple) else (results,)
    return [None if each is None else (each.dtype, each.shape, each.tobytes()) for each in some]


dtypes = st.sampled_from(["float32", "float64", "int32", ">f4"])
shapes = st.sampled_from([(2,), (1, 2), (2, 2), (2, 1, 2), (0, 2), ()])


@st.composite
def calls(draw: st.DrawFn) -> Any:
    """A call with operands of few signatures, which need not go together."""
    x, dy = (np.ones(draw(shapes), draw(dtypes)) for _ in range(2))
    W = np.full(draw(st.sampled_from([(2, 2), (2, 1), (1, 2), (2,)])), 3, draw(dtypes))
    b = draw(st.sampled_from([None, np.ones(2, "f"), np.ones(1, "f"), np.ones(2, "i")]))
    axes = {"n_batch_axes": draw(st.sampled_from([None, 0, 1, -1, 2, True, 1.0, np.int64(1)]))}
    wrt = draw(st.sampled_from([("x", "W", "b"), "xW", ["b"], (), "y", None, 5, [["x"]]]))
    tangents = draw(
        st.sampled_from([(x, W, b), (x, None, None), (None, W), (dy, W, None), (None, None, np.ones(2, "f"))])
    )
    out = draw(st.sampled_from([None, np.zeros((2, 2), "f"), x, np.zeros(2)]))
    return draw(
        st.sampled_from(
            [
                lambda: affine(x, W, b, out=None if out is None else out.copy(), **axes),
                lambda: affine_backward(dy, x, W, b, wrt=wrt, **axes),
                lambda: affine_backward(dy, x, W, b, out=(None if out is None else out.copy(), None, None), **axes),
                lambda: affine_jvp((x, W, b), tangents, **axes),
                lambda: affine_double_backward((*tangents, None)[:3], dy, x, W, b, **axes),
                lambda: per_sample_gradients(dy, x, W, b, **axes),
            ]
        )
    )


@given(st.lists(calls(), min_size=2, max_size=8))
def test_what_is_remembered_is_what_the_checks_find(some: list[Any]) -> None:
    backend = _checks.backend_of(np.ones(1))
    expected = []
    for call in some:
        backend.plans.clear()
        expected.append(outcome(call))
    backend.plans.clear()
    for call, result in zip(some + some, expected + expected, strict=True):
        assert outcome(call) == result


@pytest.mark.parametrize("n_batch_axes", [True, 1.0])
def test_axes_that_equal_one_and_are_none_are_refused(ones: Any, n_batch_axes: Any) -> None:
    dy, x, W, b = ones(2, 4), ones(2, 3), ones(3, 4), ones(4)
    affine_vjp(x, W, b, n_batch_axes=1)[1](dy)
    for call in (
        lambda: affine(x, W, b, n_batch_axes=n_batch_axes),
        lambda: affine_backward(dy, x, W, b, n_batch_axes=n_batch_axes),
    ):
        with pytest.raises(TypeError, match="n_batch_axes must be an int or None, not"):
            call()


def test_operands_of_one_signature_are_checked_once(plans: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def use() -> None:
        dy, x, W, b = (np.ones(shape, "f") for shape in ((2, 4), (2, 3), (3, 4), (4,)))
        layer = AffineLayer.__new__(AffineLayer)
        layer.W, layer.b, layer.n_batch_axes, layer._sums = W, b, None, {}
        layer.forward(x)
        layer.backward(dy)
        layer.backward(dy, accumulate=True)
        affine_backward(dy, x, W, b, wrt="W", n_batch_axes=1)
        affine_jvp((x, W, b), (x, None, b))
        affine_double_backward((x, None, b), dy, x, W, b)
        kronecker_factors(dy, x, W, b)
        per_sample_gradients(dy, x, W, b)
        per_sample_gradient_norms(dy, x, W, b)
        clipped_gradients(dy, x, W, b, max_norm=1.0)
        out = np.zeros_like(dy), np.zeros_like(x)
        assert affine(x, W, b, out=out[0]) is out[0]
        assert affine_backward(dy, x, W, b, out=(out[1], None, None)).dx is out[1]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("checked again")

    use()
    assert plans
    for check in ("_together", "_check_parameter_shapes", "_batch_axes", "_check_buffer", "_check_apart"):
        monkeypatch.setattr(_checks, check, refuse)
    use()
    with pytest.raises(AssertionError, match="checked again"):
        affine(np.ones((3, 3), "f"), np.ones((3, 4), "f"))


def test_plans_hold_no_array(plans: Any) -> None:
    arrays = [np.ones(shape, "f") for shape in ((2, 4), (2, 3), (3, 4), (4,))]
    dy, x, W, b = arrays
    held = [weakref.ref(array) for array in arrays]
    affine_vjp(x, W, b)[1](dy)
    affine_jvp((x, W, b), (x, W, b))
    affine(x, W, b, out=np.empty_like(dy))
    per_sample_gradient_norms(dy, x, W, b)
    del arrays, dy, x, W, b
    gc.collect()
    assert [reference() for reference in held] == [None] * 4
    assert plans


def test_plans_are_forgotten_before_they_are_many(plans: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "_MOST_PLANS", 3)
    W = np.ones((3, 4))
    for N in (*range(10), *range(10)):
        assert affine(np.ones((N, 3)), W).shape == (N, 4)
        assert 0 < len(plans) <= 3
    x = np.ones((2, 3))
    vjp = affine_vjp(x, W)[1]
    derived = [plan.derived for plan in plans.values() if plan.y_shape == (2, 4)]
    for dtype in ("f2", "f4", "f8", ">f2", ">f4", ">f8"):
        assert vjp(np.ones((2, 4), dtype)).dx.shape == (2, 3)
        assert max(map(len, derived)) <= 3


def test_of_subclasses_nothing_is_remembered(plans: Any) -> None:
    class OfUsers(np.ndarray):
        pass

    x, W, b = np.ones((2, 3)), np.ones((3, 4)), np.ones(4)
    for some in ((x.view(OfUsers), W, b), (x, W.view(OfUsers), b), (x, W, b.view(OfUsers))):
        assert affine(*some).tolist() == [[4] * 4] * 2
    assert plans == {}


def test_a_pickled_vjp_has_the_plan_and_not_what_is_remembered_beside_it(plans: Any) -> None:
    dy, x, W = np.ones((2, 4)), np.ones((2, 3)), np.ones((3, 4))
    vjp = affine_vjp(x, W)[1]
    vjp(dy)
    ((plan),) = plans.values()
    assert plan.derived
    again = pickle.loads(pickle.dumps(plan))  # noqa: S301 - our own
    assert again.derived == {}
    assert again._replace(derived=plan.derived)[3:] == plan[3:]
    assert again.backend is plan.backend
    assert pickle.loads(pickle.dumps(vjp))(dy).dW.tolist() == [[2] * 4] * 3  # noqa: S301 - our own


def test_buffers_are_looked_at_in_every_call() -> None:
    """Whether they can be written, and where they lie, is no part of a signature."""
    dy, x, W = np.ones((4, 4)), np.ones((4, 4)), np.ones((4, 4))
    for out in (np.zeros((4, 4)), np.zeros((4, 4))):
        affine(x, W, out=out)
        affine_backward(dy, x, W, out=(out, None, None))
    frozen = np.zeros((4, 4))
    frozen.flags.writeable = False
    for call in (lambda out: affine(x, W, out=out), lambda out: affine_backward(dy, x, W, out=(out, None, None))):
        with pytest.raises(TypeError, match="cannot be written, since it is read-only"):
            call(frozen)
        for other in (x, W, x.view(), W[::-1], x.T):
            with pytest.raises(ValueError, match=r"overlaps \w in memory"):
                call(other)
        with pytest.raises(ValueError, match="overlaps itself in memory"):
            call(np.lib.stride_tricks.as_strided(np.zeros(7), (4, 4), (8, 8)))
        with pytest.raises(ValueError, match="overlaps itself in memory"):
            call(np.ndarray((4, 4), strides=(8, 8)))  # which owns its memory
    assert (x == 1).all()
    assert (W == 1).all()


def test_tangents_are_checked_once_for_each_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    primals = tuple(np.ones(shape) for shape in ((2, 3), (3, 4), (4,)))
    first = affine_jvp(primals, primals)[1]
    monkeypatch.setattr(_checks, "_together", lambda **_: pytest.fail("checked again"))
    assert np.array_equal(affine_jvp(primals, primals)[1], first)


def test_backend_that_cannot_tell_at_once_looks_closer_at_every_buffer() -> None:
    assert not Backend("of whose memory nothing is known").can_fill([np.zeros(2)], [np.zeros(2)])
