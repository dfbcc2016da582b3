"""Plans: what the checks found is remembered by the signature of the operands, and answers as the checks would."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xaffine import AffineLayer, _checks, affine, affine_backward, affine_jvp, affine_vjp, backends
from xaffine.backends import Backend, numpy
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
                lambda: kronecker_factors(dy, x, W, b, **axes),
            ]
        )
    )


@given(st.lists(calls(), min_size=2, max_size=8))
def test_what_is_remembered_is_what_the_checks_find(some: list[Any]) -> None:
    backend = backends.backend_of(np.ones(1))
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
    per_sample_gradients(dy, x, W, b, n_batch_axes=1)
    for call in (
        lambda: affine(x, W, b, n_batch_axes=n_batch_axes),
        lambda: affine_backward(dy, x, W, b, n_batch_axes=n_batch_axes),
        lambda: per_sample_gradients(dy, x, W, b, n_batch_axes=n_batch_axes),
        lambda: kronecker_factors(dy, x, W, b, n_batch_axes=n_batch_axes),
    ):
        with pytest.raises(TypeError, match="n_batch_axes must be an int or None, not"):
            call()


def test_axes_are_looked_up_with_the_operands(ones: Any) -> None:
    operands = ones(2, 1, 4), ones(2, 1, 3), ones(3, 4)
    for function in (per_sample_gradients, kronecker_factors):
        function(*operands, n_batch_axes=2)
        for n_batch_axes in (1, None):
            with pytest.raises(ValueError, match="dy must have the shape of y"):
                function(*operands, n_batch_axes=n_batch_axes)
        with pytest.raises(ValueError, match="out of range"):
            function(*operands, n_batch_axes=-4)
        function(*operands, n_batch_axes=-1)


def test_operands_of_one_signature_are_checked_once(plans: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def use() -> None:
        dy, x, W, b = (np.ones(shape, "f") for shape in ((2, 4), (2, 3), (3, 4), (4,)))
        layer = AffineLayer.__new__(AffineLayer)
        layer.W, layer.b, layer.n_batch_axes, layer._sums = W, b, None, {}
        layer.forward(x)
        layer.backward(dy)
        for wrt in (("x", "W", "b"), "W", "b"):
            layer.backward(dy, accumulate=True, wrt=wrt)
        affine_backward(dy, x, W, b, wrt="W", n_batch_axes=1)
        affine(x, W.astype(float), b)
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
        assert per_sample_gradients(np.ones((2, 4)), *some).db.shape == (2, 4)
    per_sample_gradients(np.ones((2, 4)).view(OfUsers), x.view(OfUsers), W, b)
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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vjp: pickle.loads(pickle.dumps(vjp))])  # noqa: S301 - our own
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((2, 3), "f4", "f8", "f4"), ((2, 3), "f8", "f4", "f4")),
        (((2, 3), "f4", "f8", "f4"), ((2, 3), "f4", "f8", "f8")),
        (((2, 3, 1), "f4", "f4", "f4"), ((2, 1, 3), "f4", "f4", "f4")),
    ],
)
def test_copies_share_what_is_remembered_only_with_operands_like_theirs(copied: Any, first: Any, second: Any) -> None:
    dy = np.ones((2, 4))
    vjps, buffers = [], []
    for shape, *dtypes in (first, second):
        operands = [np.ones(s, d) for s, d in zip((shape, (3, 4), (4,)), dtypes, strict=True)]
        vjps.append(copied(affine_vjp(*operands)[1]))
        buffers.append(tuple(map(np.empty_like, operands)))
    for vjp, out in zip(vjps, buffers, strict=True):
        assert vjp(dy, out=out) == out
    with pytest.raises((TypeError, ValueError), match="must have the "):
        vjps[1](dy, out=buffers[0])


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


class OfUsers(np.ndarray):
    """Arrays without a signature."""


def test_arrays_without_a_signature_are_looked_at_each_time() -> None:
    dy, x, W, b = (np.ones(shape).view(OfUsers) for shape in ((2, 4), (2, 3), (3, 4), (4,)))
    plan = _checks.check(np.ones((2, 3)), np.ones((3, 4)), np.ones(4), None)
    layer = AffineLayer(np.ones((3, 4)), np.ones(4))
    layer.forward(np.ones((2, 3)))
    layer.backward(np.ones((2, 4)))

    def add(dW: Any) -> None:
        layer.dW = dW
        layer.backward(np.ones((2, 4)), accumulate=True, wrt="W")

    for call, right, wrong in (
        (lambda dy: _checks.check_cotangent(plan, dy, x, W, b), dy, dy[:1]),
        (lambda dy: _checks.check_cotangent(plan, dy, x, W, b, "W"), dy, dy[:1]),
        (lambda W_dot: affine_jvp((np.ones((2, 3)), np.ones((3, 4))), (None, W_dot)), W, W[:1]),
        (lambda out: affine(np.ones((2, 3)), np.ones((3, 4)), out=out), dy, dy[:1]),
        (add, W.copy(), W[:1].copy()),
    ):
        call(right)
        with pytest.raises(ValueError, match=r"must have (the|one) shape"):
            call(wrong)


def test_sums_are_looked_at_where_only_the_new_gradient_differs() -> None:
    layer = AffineLayer(np.ones((3, 4)), np.ones(4))
    for x in (np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 1))):
        layer.W = np.ones((x.shape[1], 4))
        layer.forward(x)
        if x.shape[1] == 3:
            layer.backward(np.ones((2, 4)), accumulate=True)
    with pytest.raises(ValueError, match=r"the dW that is there is float64 \(3, 4\).*the new dW is float64 \(1, 4\)"):
        layer.backward(np.ones((2, 4)), accumulate=True)
    layer.dW, layer.db = None, np.ones(3)
    with pytest.raises(ValueError, match=r"the db that is there is .*the new db is .*Set layer\.db = None first"):
        layer.backward(np.ones((2, 4)), accumulate=True)


def test_plan_says_how_to_compute() -> None:
    x, W, b, dy = np.ones((2, 3), "f"), np.ones((3, 4), "f"), np.ones(4, "f"), np.ones((2, 4), "f")
    few, many = ((numpy.BACKEND.primitives(x, W, b, extents=(N, 3, 4))) for N in (2, 9999))
    assert few != many
    plan = _checks.check(x, W, b, None)
    with_dy = _checks.check_cotangent(plan, dy, x, W, b)
    with_tangents = _checks.check_tangents(plan, ("x_dot", "W_dot", "b_dot"), (x, None, b), x, W, b)
    for each in (plan, with_dy, with_tangents):
        assert (each.dtype, each.y_dtype, each.kind, each.n_batch_axes) == (np.float32, np.float32, "real floating", 1)
        assert (each.y_shape, each.extents, each.x_matrix, each.y_matrix) == ((2, 4), (2, 3, 4), None, None)
        assert (each.casts, each.wanted) == (False, ("x", "W", "b"))
        assert (each.product, each.sum_rows) == few
    assert len({id(each.derived) for each in (plan, with_dy, with_tangents)}) == 3

    wide = _checks.check(x.astype("d"), W, b, None)
    with_wide_dy = _checks.check_cotangent(plan, dy.astype("d"), x, W, b)
    with_wide_tangent = _checks.check_tangents(plan, ("x_dot", "W_dot", "b_dot"), (None, W.astype("d"), None), x, W, b)
    for each in (wide, with_wide_dy, with_wide_tangent):
        assert (each.dtype, each.casts) == (np.float64, True)
    assert [each.y_dtype for each in (wide, with_wide_dy, with_wide_tangent)] == [np.float64, np.float32, np.float32]

    for narrow in range(3):
        operands = [array.astype("f" if i == narrow else "d") for i, array in enumerate((x, W, b))]
        assert _checks.check(*operands, None).casts

    tensor, dy_of_all = np.ones((9999, 3, 1), "f"), np.ones((9999, 4), "f")
    plan = _checks.check(tensor, W, b, None)
    with_dy = _checks.check_cotangent(plan, dy_of_all, tensor, W, b)
    vector = _checks.check(np.ones(3, "f"), W, None, None)
    for each in (plan, with_dy):
        assert (each.x_matrix, each.y_matrix, each.casts) == ((9999, 3), None, False)
        assert (each.product, each.sum_rows) == many
    assert (vector.x_matrix, vector.y_matrix, vector.wanted) == ((1, 3), (1, 4), ("x", "W"))
    steps = _checks.check(np.ones((2, 3, 3), "f"), W, b, 2)
    assert (steps.x_matrix, steps.y_matrix) == ((6, 3), (6, 4))


def test_matrices_that_products_cannot_read_are_not_taken_as_they_are(
    monkeypatch: pytest.MonkeyPatch, plans: Any, numpy_backend: Backend
) -> None:
    """As those of CuPy with gaps."""
    x, W, dy = np.ones((2, 3)), np.ones((3, 4)), np.ones((2, 4))
    for unreadable in (x, W, dy):
        plans.clear()
        monkeypatch.setattr(type(numpy_backend), "is_readable", lambda _, array, other=unreadable: array is not other)
        plan = _checks.check(x, W, None, None)
        assert plan.casts == (unreadable is not dy)
        assert _checks.check_cotangent(plan, dy, x, W, None).casts


def test_plan_of_sums_says_what_is_cast_and_what_is_kept_beside_them(numpy_backend: Backend) -> None:
    half, single, double = (np.ones(4, dtype) for dtype in ("e", "f", "d"))
    for old, new, casts, widens in (
        ((single, single), (single, single), False, False),
        ((single, None), (double, single), True, False),
        ((None, double), (single, single), True, False),
        ((double, single), (single, single), True, False),
        ((half, single), (half, single), False, True),
        ((single, half), (single, half), False, True),
        ((half, None), (None, half), False, False),
    ):
        plan = _checks.check_sums(numpy_backend, old, new)
        assert (plan.backend, plan.casts, plan.widens, plan.derived) == (numpy_backend, casts, widens, {})


def test_plan_of_mixed_dtypes_belongs_to_one_way_to_promote(
    monkeypatch: pytest.MonkeyPatch, plans: Any, numpy_backend: Backend
) -> None:
    """As with JAX, where options change it."""
    x, W = np.ones((2, 3), "f"), np.ones((3, 4), "f")
    of_one, mixed = (lambda: _checks.check(x, W, None, None)), (lambda: _checks.check(x, W.astype("d"), None, None))
    found: dict[str, Any] = {}
    for way in ("first", "second", "first"):
        monkeypatch.setattr(type(numpy_backend), "promotion", lambda _, way=way: way)
        assert of_one() is found.setdefault("of one", of_one())
        assert mixed() is found.setdefault(way, mixed())
    assert found["first"] is not found["second"]
    assert len(plans) == 3


def test_unpickled_vjps_share_one_plan() -> None:
    dy, x, W = np.ones((2, 4)), np.ones((2, 3)), np.ones((3, 4))
    first, second = (pickle.loads(pickle.dumps(affine_vjp(x, W)[1])) for _ in range(2))  # noqa: S301 - our own
    assert first.args[0] is second.args[0]
    assert first(dy).dW.tolist() == [[2] * 4] * 3
    assert pickle.loads(pickle.dumps(affine_vjp(x[:1], W)[1])).args[0] is not first.args[0]  # noqa: S301 - our own


@pytest.mark.parametrize("n_batch_axes", [None, 1, np.int64(1)])
def test_forward_and_backward_are_checked_in_one_look_up(monkeypatch: pytest.MonkeyPatch, n_batch_axes: Any) -> None:
    dy, x, W, b = (np.ones(shape) for shape in ((2, 4), (2, 3), (3, 4), (4,)))
    expected = _checks.check_cotangent(_checks.check(x, W, b, 1), dy, x, W, b)
    monkeypatch.setattr(numpy.BACKEND, "plans", {})
    monkeypatch.setattr(_checks, "_BY_TYPE", {})  # as if no array of NumPy came before
    assert _checks.check_with_cotangent(dy, x, W, b, n_batch_axes) == expected
    monkeypatch.undo()
    monkeypatch.setattr(numpy.BACKEND, "plans", {})
    for _ in range(2):
        assert _checks.check_with_cotangent(dy, x, W, b, n_batch_axes) == expected
        assert _checks.check_with_cotangent(dy, x, W, None, n_batch_axes).wanted == ("x", "W")
    for wrong in ((dy[:1], x, W, b), (dy, x[:, :2], W, b), (dy, x, W[:, :3], b), (dy, x, W, b[:3])):
        with pytest.raises(ValueError, match=r"must have the shape|has features"):
            _checks.check_with_cotangent(*wrong, n_batch_axes)
    with pytest.raises(ValueError, match="n_batch_axes = 3"):
        _checks.check_with_cotangent(dy, x, W, b, 3)
    with pytest.raises(TypeError, match="n_batch_axes must be an int"):
        _checks.check_with_cotangent(dy, x, W, b, 1.0)  # type: ignore[arg-type]
    if not isinstance(n_batch_axes, np.integer):
        with monkeypatch.context() as context:
            context.setattr(_checks, "check", lambda *_: pytest.fail("was checked again"))
            assert _checks.check_with_cotangent(dy, x, W, b, n_batch_axes) == expected
    mixed = _checks.check_with_cotangent(dy.astype("f"), x, W, b, n_batch_axes)
    assert mixed.casts
    assert mixed not in numpy.BACKEND.plans.values()
