"""What only JAX has: vjp as an oracle, jit, vmap, grad, immutable arrays, dtypes that come and go."""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests import fuzz
from tests.helpers import case_on, peers
from xaffine import AffineLayer, affine, affine_backward, affine_jvp, affine_vjp, functional, per_sample
from xaffine._checks import check, check_cotangent
from xaffine._command import clock
from xaffine.backends import jax as module
from xaffine.backends import move
from xaffine.backends.jax import BACKEND
from xaffine.backends.standard import LARGER_THAN_CACHES
from xaffine.curvature import affine_double_backward, kronecker_factors
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms, per_sample_gradients
from xaffine.testing import bounds, make_case
from xaffine.testing.cases import worst_error
from xaffine.testing.strategies import cases

pytestmark = pytest.mark.usefixtures("backend")


def jax_vjp(dy: Any, x: Any, W: Any, b: Any, batch: tuple[int, ...]) -> dict[str, Any]:
    """The gradients by JAX of the formula."""

    def formula(x: Any, W: Any, *b: Any) -> Any:
        y = x.reshape(*batch, W.shape[0]) @ W
        return y + b[0] if b else y

    _, pull_back = jax.vjp(formula, x, W, *([] if b is None else [b]))
    return dict(zip(("dx", "dW", "db"), pull_back(dy), strict=False))


@given(cases(["float32", "float64", "bfloat16", "float16", "complex64", "complex128"], mixed=False))
def test_equals_jax_vjp_on_integers(backend: Any, case: Any) -> None:
    dy, x, W, b = case_on(case, backend)
    ours = affine_backward(dy, x, W, b, n_batch_axes=case.n_batch_axes)
    for name, theirs in jax_vjp(dy, x, W, b, case.batch).items():
        assert jnp.array_equal(getattr(ours, name), theirs), name


@given(cases(["float32", "float64"], values="floats", mixed=False))
def test_jax_vjp_keeps_the_same_bounds(backend: Any, case: Any) -> None:
    exact = case.exact()
    for name, theirs in jax_vjp(*case_on(case, backend), case.batch).items():
        assert worst_error(backend.to_numpy(theirs), exact[name])[0] <= 1, name


@pytest.mark.parametrize(("batch", "features"), [((5,), (2, 3)), ((), (6,)), ((0,), (6,)), ((2, 3), (0,))])
def test_jit_of_forward_and_backward(backend: Any, batch: Any, features: Any) -> None:
    case = make_case((*batch, *features), 4, seed=1, n_batch_axes=len(batch))

    @jax.jit
    def forward_and_backward(dy: Any, x: Any, W: Any, b: Any) -> Any:
        y, vjp = affine_vjp(x, W, b, n_batch_axes=case.n_batch_axes)
        return {"y": y, **vjp(dy)._asdict()}

    exact = case.exact()
    for name, got in forward_and_backward(*case_on(case, backend)).items():
        assert worst_error(backend.to_numpy(got), exact[name])[0] == 0


def test_a_layer_inside_jit(backend: Any) -> None:
    case = make_case((5, 6), 4, seed=2)

    @jax.jit
    def loss_and_gradients(dy: Any, x: Any, W: Any, b: Any) -> Any:
        layer = AffineLayer(W, b)
        return layer(x), layer.backward(dy), layer.dW, layer.db

    names = ("y", "dx", "dW", "db")
    for name, got in zip(names, loss_and_gradients(*case_on(case, backend)), strict=True):
        assert worst_error(backend.to_numpy(got), case.exact()[name])[0] == 0


def test_grad_runs_through_the_layer(backend: Any) -> None:
    dy, x, W, b = case_on(make_case((5, 2, 3), 4, seed=3), backend)
    theirs = jax.grad(lambda *p: jnp.sum(dy * affine(*p)), argnums=(0, 1, 2))(x, W, b)
    for ours, grad in zip(affine_backward(dy, x, W, b), theirs, strict=True):
        assert jnp.array_equal(ours, grad)


def test_vmap_over_the_batch_gives_per_sample_gradients(backend: Any) -> None:
    dy, x, W, b = case_on(make_case((5, 6), 4, seed=4), backend)
    mapped = jax.vmap(lambda dy, x: affine_backward(dy, x, W, b))(dy, x)
    whole = affine_backward(dy, x, W, b)
    assert jnp.array_equal(mapped.dx, whole.dx)
    assert jnp.array_equal(mapped.dW.sum(0), whole.dW)
    assert jnp.array_equal(mapped.db, dy)


def test_errors_are_raised_while_tracing() -> None:
    with pytest.raises(ValueError, match=r"W takes n = 4: x is float32 \(2, 3\) \(jax\)"):
        jax.jit(affine)(jnp.ones((2, 3), "float32"), jnp.ones((4, 5), "float32"))


def test_what_is_compiled_for_one_axis_is_not_run_for_true() -> None:
    x, W = jnp.ones((2, 3)), jnp.ones((3, 4))
    affine(x, W, n_batch_axes=1)
    with pytest.raises(TypeError, match="n_batch_axes must be an int or None, not True"):
        affine(x, W, n_batch_axes=True)
    assert affine(x, W, n_batch_axes=np.int64(1)).shape == (2, 4)


def test_vjp_can_be_pickled() -> None:
    _, vjp = affine_vjp(jnp.ones((2, 3)), jnp.ones((3, 4)))
    assert pickle.loads(pickle.dumps(vjp))(jnp.ones((2, 4))).dW.tolist() == [[2] * 4] * 3  # noqa: S301


TWO_DEVICES = """
import jax, jax.numpy as jnp
from xaffine import affine, affine_backward
first, second = (lambda *shape, d=d: jax.device_put(jnp.ones(shape), d) for d in jax.devices())
x, W = first(2, 3), first(3, 4)
for call in (lambda: affine(x, second(3, 4)), lambda: affine_backward(second(2, 4), x, W)):
    try:
        call()
    except ValueError as error:
        print(error)
for device in jax.devices():
    print(device)
print(affine(first(2, 3), jnp.ones((3, 4))).device == jax.devices()[0])
"""


def test_what_is_compiled_is_what_one_writes_by_hand(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_is_alone", True)  # beside a second device, such as a GPU, b stays an argument
    monkeypatch.setattr(backend, "plans", {})
    dy, x, W, b = case_on(make_case((5, 6), 4, seed=5), backend)
    affine_vjp(x, W, b)[1](dy)
    plan = check(x, W, b, None)
    plan_with_dy = check_cotangent(plan, dy, x, W, b)
    forward, backward = peers.jax_functions()

    def program(lowered: Any) -> list[str]:
        """The operations, in any order."""
        return sorted(re.sub(r"@jit_\w+| \{jax.result_info = [^}]*\}|%\w+", "", lowered.as_text()).splitlines())

    ours = plan.derived[functional.forward], plan_with_dy.derived[functional.backward]
    assert program(ours[0].lower(x, W, b, None)) == program(forward.lower(x, W, b))
    assert program(ours[1].lower(dy, x, W, b, None)) == program(backward.lower(dy, x, W))


def test_each_step_is_compiled_once_for_a_signature(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []

    def record(step: Any, plan: Any, *arrays: Any) -> Any:
        traced.append(step.__name__)
        return _traced(step, plan, *arrays)

    _traced = module._traced
    monkeypatch.setattr(module, "_traced", record)
    monkeypatch.setattr(backend, "plans", {})
    dy, x, W, b = case_on(make_case((5, 3), 4, seed=0), backend)
    for _ in range(2):
        affine_vjp(x, W, b)[1](dy)
        affine_backward(dy, x, W, b, wrt="W")
        affine_backward(dy, x, W, b, wrt="W", n_batch_axes=1)
        affine_jvp((x, W, b), (x, None, b))
        kronecker_factors(dy, x, W, b)
        per_sample_gradients(dy, x, W, b)
        per_sample_gradient_norms(dy, x, W, b)
        clipped_gradients(dy, x, W, b, max_norm=1.0)
        affine_double_backward((x, None, None), dy, x, W, b)
    steps = ["forward", "backward", "backward", "backward", "jvp", "second_moments", "gradients_of_each"]
    assert traced == [*steps, "norms_of_each", "clipped_sums", "double_backward"]
    affine(x[:4], W, b)
    affine(x.astype("float64"), W, b)
    assert traced[10:] == ["forward"] * 2


@pytest.mark.parametrize("which", range(4))
def test_what_the_user_traces_the_user_compiles(backend: Any, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    compiled = []
    monkeypatch.setattr(backend, "plans", {})
    operands = case_on(make_case((5, 3), 4, seed=0), backend)
    expected = affine_backward(*operands)
    plans = dict(backend.plans)

    def backward(traced: Any) -> Any:
        return affine_backward(*(traced if i == which else operand for i, operand in enumerate(operands)))

    jitted = jax.jit(backward)
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda *some: [compiled.append(some), jit(*some)][1])
    gradients = jitted(operands[which])
    assert all(map(jnp.array_equal, gradients, expected))
    assert compiled == []
    assert backend.plans == plans  # which hold no tracer


class TestSplits:
    """How results are split over a mesh, each axis of an operand over an axis of its own."""

    @pytest.fixture(params=[(0, True), (0, False), (1, True), (1, False), (2, True), (2, False)], ids=str)
    def operands(self, request: pytest.FixtureRequest) -> tuple[int, list[Any]]:
        k, bias = request.param
        shapes = {"dy": (*(2, 1)[:k], 3), "x": (2, 1, 4) if k else (4,), "W": (4, 3), "b": (3,)}
        split = {name: [f"{name}{axis}" for axis in range(len(shape))] for name, shape in shapes.items()}
        axes = [axis for some in split.values() for axis in some]
        mesh = jax.make_mesh(
            (1,) * len(axes), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes), devices=jax.devices()[:1]
        )
        arrays = [on_mesh(mesh, jnp.ones(shape, "float32"), *split[name]) for name, shape in shapes.items()]
        return k, arrays if bias else [*arrays[:3], None]

    def splits(self, results: Any) -> Any:
        some = results if isinstance(results, tuple) else (results,)
        return [None if array is None else tuple(jax.typeof(array).sharding.spec) for array in some]

    def test_are_those_of_the_operands(self, operands: Any) -> None:
        k, (dy, x, W, b) = operands
        of_x = tuple(f"x{axis}" for axis in range(x.ndim))
        of_W, of_b, batch, samples = ("W0", "W1"), None if b is None else ("b0",), of_x[:k], of_x[: min(1, k)]
        of_dy = tuple(f"dy{axis}" for axis in range(dy.ndim))
        y, axes = (*batch, "W1"), {"n_batch_axes": k}
        all_ = dy, x, W, b
        for got, expected in (
            (affine(x, W, b, **axes), [y]),
            (affine_backward(*all_, **axes), [of_x, of_W, of_b]),
            (affine_backward(*all_, wrt="W", **axes), [None, of_W, None]),
            (affine_jvp((x, W, b), (x, None, b), **axes), [y, y]),
            (affine_double_backward((x, W, b), *all_, **axes), [of_dy, of_x, of_W]),
            (affine_double_backward((None, W, None), *all_, **axes), [of_dy, of_x, None]),
            (kronecker_factors(*all_, **axes), [(None, None), (None, None)]),
            (per_sample_gradients(*all_, **axes), [(*samples, *of_W), of_b and (*samples, *of_b)]),
            (per_sample_gradient_norms(*all_, **axes), [samples]),
            (clipped_gradients(*all_, max_norm=2.0, **axes), [None, of_W, of_b]),
        ):
            assert self.splits(got) == expected


class TestProducts:
    """XLA on a CPU computes a product of few columns as a running sum, and one with zeros beside them as usual."""

    @pytest.mark.parametrize("stack", [(), (2,)])
    @pytest.mark.parametrize(
        ("N", "n", "m", "widened"),
        [(8, 3, 9, 0), (9, 3, 9, 2), (9, 9, 3, 2), (9, 4, 9, 0), (9, 9, 4, 0), (9, 1, 1, 2), (9, 0, 2, 2)],
    )
    def test_of_few_columns_are_widened(
        self, monkeypatch: pytest.MonkeyPatch, N: int, n: int, m: int, widened: int, stack: Any
    ) -> None:
        widths = []

        def record(matrix: Any, axis: int) -> Any:
            wide = widen(matrix, axis)
            widths.append(wide.shape[axis])
            return wide

        widen = module._widened
        monkeypatch.setattr(module, "_widened", record)
        monkeypatch.setattr(module, "_LONG", 8)
        rng = np.random.default_rng(0)
        a, c = (rng.integers(-4, 5, (*stack, *shape)).astype("f") for shape in ((n, N), (N, m)))
        product = BACKEND.matmul(jnp.asarray(a), jnp.asarray(c))
        assert (product.dtype, product.shape) == (np.float32, (*stack, n, m))
        assert np.array_equal(product, a @ c)
        assert widths == [max(4, n), max(4, m)][:widened]

    def test_sum_is_one_sum(self) -> None:
        program = jax.make_jaxpr(lambda array: BACKEND.sum(array, 0, array.dtype))(jnp.ones((1000, 2), "int8"))
        assert [equation.primitive.name for equation in program.eqns] == ["reduce_sum"]
        assert BACKEND.sum(jnp.ones((1000, 2), "int8"), 0, jnp.int8).tolist() == [1000 - 1024] * 2


def test_device_binds_only_what_is_committed_to_one(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices()[0]
    committed, traced = jax.device_put(jnp.ones(2), device), []
    jax.jit(lambda array: traced.append(backend.device_of(array)))(committed)
    assert backend.device_of(committed) == device
    assert backend.device_of(jnp.ones(2)) is None
    assert traced == [None]
    monkeypatch.setattr(module, "ArrayImpl", SimpleNamespace)  # for an array that two devices share
    assert backend.device_of(SimpleNamespace(committed=True, device=SimpleNamespace(device_set={1, 2}))) is None


def test_two_devices_are_refused() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    child = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    forward, backward, one, other, place = child.stdout.strip().splitlines()
    assert forward.startswith(f"arrays on two devices: x is float32 (2, 3) (jax on {one}); W is")
    assert backward.startswith(f"arrays on two devices: dy is float32 (2, 4) (jax on {other}); x is")
    assert place == "True"


def test_immutable_out_is_refused() -> None:
    with pytest.raises(TypeError, match="out cannot be written"):
        affine(jnp.ones((2, 3)), jnp.ones((3, 4)), out=jnp.ones((2, 4)))


def test_without_x64_float32_is_all_there_is(backend: Any) -> None:
    with jax.enable_x64(False):
        assert "float64" not in backend.dtypes()
        assert "float32" in backend.dtypes()


@pytest.mark.parametrize(("T", "n"), [(8, 64), (8, 6)])  # by Gram matrices, and by the gradients themselves
def test_without_x64_samples_are_clipped_in_range_and_never_too_little(T: int, n: int) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1, n)) + 1e-4 * rng.standard_normal((T, n))).astype("float32")
    dy = rng.integers(-99, 100, (T, n)).astype("float32")
    dy[-1] -= dy.sum(0)
    exact = float(np.linalg.norm(x.astype(float).T @ dy.astype(float)))
    u = float(bounds.unit_roundoff("float32"))
    delta = 8 * u + (2 * n + 2 * T) * u
    with jax.enable_x64(False):
        operands = jnp.asarray(dy)[None], jnp.asarray(x)[None], jnp.zeros((n, n))
        for max_norm in (exact / 3, exact / 100):
            rows = np.asarray(per_sample._clipped(BACKEND, operands[1], operands[0], bias=False, max_norm=max_norm))[0]
            assert np.linalg.norm(x.astype(float).T @ rows.astype(float)) <= (1 + delta) * max_norm
        ones = jnp.ones((1, 1))
        for pair in ((ones, 1e20 * ones), (1e-30 * ones, 1e35 * ones), (1e20 * ones, 1e20 * ones)):
            dW = clipped_gradients(*pair, ones, max_norm=1.0).dW
            assert abs(float(dW[0, 0]) - 1) <= 16 * u
        norms = per_sample_gradient_norms(1e-30 * ones, 1e-5 * ones, ones)
        assert abs(float(norms[0]) - 1e-35) <= 16 * u * 1e-35
        usual = jnp.asarray(rng.integers(-3, 4, (5, T, n)), jnp.float32)  # which nothing divides
        dW = clipped_gradients(usual, usual, operands[2], max_norm=math.inf, n_batch_axes=2).dW
        assert jnp.array_equal(dW, affine_backward(usual, usual, operands[2], n_batch_axes=2).dW)


def test_tangents_of_integers_do_not_turn_numpy_into_jax() -> None:
    float0 = np.zeros((2, 3), jax.dtypes.float0)  # NumPy by type, JAX by dtype
    with pytest.raises(TypeError, match="must be of one kind"):
        affine(float0, jnp.ones((3, 4)))
    assert type(affine(np.ones((2, 3)), np.ones((3, 4)))) is np.ndarray
    with pytest.raises(TypeError, match="two libraries"):
        affine(np.ones((2, 3)), jnp.ones((3, 4)))


def test_promotion_follows_the_switch_to_64_bits() -> None:
    operands = jnp.ones((2, 3), "int32"), jnp.ones((3, 4), "uint32")
    for enabled, dtype in ((False, "int32"), (True, "int64"), (False, "int32")):
        with jax.enable_x64(enabled):
            assert affine(*operands).dtype == dtype


def test_layer_needs_no_promotion_of_ranks() -> None:
    x, W, b = jnp.ones((4, 3)), jnp.ones((3, 2)), jnp.ones(2)
    with jax.numpy_rank_promotion("raise"):
        layer = AffineLayer(W, b)
        assert layer(x).tolist() == [[4, 4]] * 4
        assert layer.backward(jnp.ones((4, 2))).tolist() == [[2, 2, 2]] * 4
        assert affine_jvp((x, W, b), (x, W, b))[1].tolist() == [[7, 7]] * 4
        assert clipped_gradients(jnp.ones((4, 2)), x, W, b, max_norm=100.0).db.tolist() == [4, 4]


def test_strict_promotion_is_named_as_the_cause() -> None:
    x, W = jnp.ones((4, 3), jnp.bfloat16), jnp.ones((3, 2))
    with jax.numpy_dtype_promotion("strict"):
        for call in (lambda: affine(x, W), lambda: affine_backward(jnp.ones((4, 2)), x, W.astype(x.dtype))):
            with pytest.raises(TypeError, match=r"^jax has no common dtype of the same kind.*strict.*Cast .* first: "):
                call()
        layer = AffineLayer(W)
        layer(x.astype(W.dtype))
        assert layer.backward(jnp.ones((4, 2))).tolist() == [[2, 2, 2]] * 4


def test_tf32_is_allowed_where_it_is_asked_for(backend: Any) -> None:
    try:
        backend.use_tf32()
        assert jax.config.jax_default_matmul_precision == "tensorfloat32"
    finally:
        backend.use_full_precision()
    assert jax.config.jax_default_matmul_precision == "float32"


def test_caches_are_emptied_by_writing_more_than_they_hold(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backend), "is_gpu", lambda *_: True)
    own = clock.clock_of(backend, backend.devices[0])
    assert own.name == "host"
    assert own.flush is not None
    assert own.flush().nbytes == LARGER_THAN_CACHES


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_jvp_equals_that_of_jax(backend: Any, dtype: str) -> None:
    case, dots = (make_case((5, 2, 3), 4, seed=seed, dtypes=dtype) for seed in (1, 2))
    primals, tangents = (tuple(case_on(some, backend)[1:]) for some in (case, dots))
    theirs = jax.jvp(lambda x, W, b: x.reshape(5, 6) @ W + b, primals, tangents)
    for ours in (affine_jvp(primals, tangents), jax.jit(affine_jvp)(primals, tangents)):
        for own, other in zip(ours, theirs, strict=True):
            assert jnp.array_equal(own, other)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_double_backward_equals_vjp_of_vjp(backend: Any, dtype: str) -> None:
    case, other = (make_case((5, 2, 3), 4, seed=seed, dtypes=dtype) for seed in (1, 2))
    dy, x, W, b = case_on(case, backend)
    cotangents = tuple(case_on(other, backend)[1:])

    def backward(dy: Any, x: Any, W: Any) -> Any:
        return jax.vjp(lambda x, W, b: x.reshape(5, 6) @ W + b, x, W, b)[1](dy)

    theirs = jax.vjp(backward, dy, x, W)[1](cotangents)
    for function in (affine_double_backward, jax.jit(affine_double_backward)):
        for own, other_ in zip(function(cotangents, dy, x, W, b), theirs, strict=True):
            assert jnp.array_equal(own, other_)


def test_samples_are_weighed_inside_jit(backend: Any) -> None:
    case = make_case((5, 3), 4, seed=1)
    operands = case_on(case, backend)
    inside = jax.jit(lambda *operands: clipped_gradients(*operands, max_norm=2.0))(*operands)
    outside = clipped_gradients(*operands, max_norm=2.0)
    limit = float(bounds.gamma(2 * (5 + 6), bounds.unit_roundoff("float32")))
    size = np.abs(case.x.values).T @ np.abs(case.dy.values)
    assert (abs(np.asarray(inside.dW) - np.asarray(outside.dW)) <= limit * size).all()
    norms = per_sample_gradient_norms(*operands)
    mapped = jax.vmap(lambda dy, x: jnp.sqrt((jnp.outer(x, dy) ** 2).sum() + (dy**2).sum()))(*operands[:2])
    limit = float(bounds.gamma(6, bounds.unit_roundoff("float32")))
    assert (abs(np.asarray(norms) - np.asarray(mapped)) <= limit * np.asarray(mapped)).all()


def on_mesh(mesh: Any, array: Any, *split: str | None) -> Any:
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*split)))


# One device is enough for what depends on types alone; tests/distributed/test_jax.py has eight.
@pytest.mark.parametrize("shape", [(4, 8), (2, 4, 8), (8,)])  # means over a power of two are exact
def test_splits_that_are_part_of_the_type(backend: Any, shape: tuple[int, ...]) -> None:
    k = len(shape) - 1
    whole = case_on(make_case(shape, 4, seed=6, n_batch_axes=k), backend)
    mesh = jax.make_mesh((1, 1, 1), ("x", "y", "z"), axis_types=(AxisType.Explicit,) * 3, devices=jax.devices()[:1])
    batch = ("x", None)[:k]
    split = [
        on_mesh(mesh, array, *axes)
        for array, axes in zip(whole, ((*batch, "z"), (*batch, "y"), ("y", "z"), ("z",)), strict=True)
    ]
    dy, x, W, b = map(jax.typeof, split)

    def everything(dy: Any, x: Any, W: Any, b: Any) -> dict[str, Any]:
        return {
            "y": affine(x, W, b, n_batch_axes=k),
            "backward": affine_backward(dy, x, W, b, n_batch_axes=k),
            "for some": affine_backward(dy, x, W, n_batch_axes=k, wrt="W"),
            "jvp": affine_jvp((x, W, b), (x, None, b), n_batch_axes=k),
            "second": affine_double_backward((x, W, b), dy, x, W, b, n_batch_axes=k),
            "factors": kronecker_factors(dy, x, W, b, n_batch_axes=k),
            "each": per_sample_gradients(dy, x, W, b, n_batch_axes=k),
            "squares": jnp.round(per_sample_gradient_norms(dy, x, W, b, n_batch_axes=k) ** 2),  # integers
            "clipped": clipped_gradients(dy, x, W, b, n_batch_axes=k, max_norm=np.inf),
        }

    expected = everything(*whole)
    for results in (everything(*split), jax.jit(everything)(*split)):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, results, expected))
        assert jax.typeof(results["y"]) == jax.typeof(results["second"].dy) == dy
        for gradient, kind in zip((*results["backward"], *results["clipped"][1:]), (x, W, b, W, b), strict=True):
            assert jax.typeof(gradient) == kind
        assert jax.typeof(results["each"].db).sharding.spec == PartitionSpec(*batch[:1], "z")
        assert jax.typeof(results["squares"]).sharding.spec == PartitionSpec(*batch[:1])


def test_splits_that_do_not_go_together() -> None:
    mesh, other = (jax.make_mesh((1,), (name,), axis_types=(AxisType.Explicit,)) for name in ("x", "y"))
    x, W = np.ones((2, 3), "float32"), np.ones((3, 4), "float32")
    with pytest.raises(
        ValueError, match=r"over the axis 'x' .*: x is float32\[2@x,3\]; W is float32\[3,4@x\]\. Pass one"
    ):
        affine(on_mesh(mesh, x, "x"), on_mesh(mesh, W, None, "x"))
    with pytest.raises(ValueError, match=r"two meshes: .*; x on \('x': 1 Explicit\), W on \('y': 1 Explicit\)\. Bring"):
        affine(on_mesh(mesh, x), on_mesh(other, W))


def test_fuzzing_keeps_nothing_that_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX itself keeps all of it, some megabytes for each case of a new shape."""
    calls: list[None] = []
    monkeypatch.setattr(fuzz, "SMALL", 2)
    monkeypatch.setattr(jax, "clear_caches", lambda: calls.append(None))
    assert fuzz.main(["--backend", "jax", "--cases", "5", "--seed", "0"]) == 0
    assert len(calls) == 2  # after each property that has all of its cases


def test_arrays_from_numpy_have_memory_of_their_own(backend: Any) -> None:
    for _ in range(20):  # whether jax.device_put takes over memory depends on its address
        source = np.ones((64, 64), "float32")
        array = backend.from_numpy(source)
        source[...] = 2
        assert float(array.max()) == 1


def test_what_is_moved_can_be_donated(backend: Any) -> None:
    array, device = jnp.ones(4), jax.devices()[0]
    moved = move(array, backend, device=device)
    assert backend.to_device(moved, device) is moved
    jax.jit(jnp.negative, donate_argnums=0)(moved)
    assert moved.is_deleted()
    assert array.tolist() == [1] * 4


@pytest.mark.usefixtures("backend")
def test_steps_are_compiled_once_for_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, dy = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((2, 4))
    vjp = pickle.dumps(affine_vjp(x, W)[1])
    compiled: list[Any] = []
    compile_ = jax.jit
    monkeypatch.setattr(BACKEND, "plans", {})
    monkeypatch.setattr(jax, "jit", lambda *a, **o: [compiled.append(a), compile_(*a, **o)][1])
    for _ in range(3):
        affine(x, W, n_batch_axes=np.int64(1))
        pickle.loads(vjp)(dy)  # noqa: S301 - our own
    assert len(compiled) == 2


@pytest.mark.usefixtures("backend")
def test_strict_promotion_is_asked_of_shapes_that_were_seen_before() -> None:
    dy, x, W = jnp.ones((2, 4)), jnp.ones((2, 3), "float16"), jnp.ones((3, 4), "float32")
    for call in (lambda: affine(x, W), lambda: per_sample_gradients(dy, x, W).dW):
        assert call().dtype == jnp.float32
        with jax.numpy_dtype_promotion("strict"), pytest.raises(TypeError, match="no common dtype"):
            call()


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_strict_promotion_is_of_operands_alone(backend: Any, dtype: str) -> None:
    dy, x, W, b = case_on(make_case((3, 2), 4, seed=0, dtypes=dtype), backend)
    for function in (
        per_sample_gradient_norms,
        jax.jit(per_sample_gradient_norms),
        lambda *operands: clipped_gradients(*operands, max_norm=1.0).dW,
    ):
        expected = function(dy, x, W, b)
        with jax.numpy_dtype_promotion("strict"):
            assert jnp.array_equal(function(dy, x, W, b), expected)


DEVICES_OF_KNOWN_SHAPES = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from xaffine import AffineLayer, affine_backward
from xaffine.curvature import affine_double_backward, kronecker_factors
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms, per_sample_gradients

first, second = jax.devices()
both = [
    NamedSharding(jax.make_mesh((2,), ("a",), axis_types=(kind,)), PartitionSpec())
    for kind in (AxisType.Auto, AxisType.Explicit)
]
free = dy, x, W, b = [jnp.ones(shape) for shape in ((2, 4), (2, 3), (3, 4), (4,))]
for place in (second, *both):  # of what is not computed with, too
    for call in (lambda *some: affine_backward(*some, wrt="b").db, lambda *some: per_sample_gradients(*some).dW):
        assert call(dy, x, jax.device_put(W, place), b).devices() == {second} | {*getattr(place, "device_set", ())}

dy, x, W, b = (jax.device_put(array, first) for array in free)
calls = [
    lambda *a: affine_backward(*a, wrt="b"),
    kronecker_factors, per_sample_gradients, per_sample_gradient_norms, lambda *a: clipped_gradients(*a, max_norm=1.0),
    lambda *a: affine_double_backward((None, None, None), *a),
]
for call in calls:
    call(dy, x, W, b)  # from now on these shapes are known
    for place, ids in ((second, [1]), *((mesh, [0, 1]) for mesh in both)):
        try:
            call(dy, x, jax.device_put(W, place), b)
        except ValueError as error:
            words = f"; by their ids x on [0], W on {ids}, b on [0]. Move"
            assert "arrays on two devices: x is float32 (2, 3) (jax on" in str(error) and words in str(error), error
        else:
            print("not refused:", call)

layer = AffineLayer(W, b)
layer(x)
for accumulate in (False, True):
    layer.backward(dy, accumulate=accumulate)
before = layer.dW
layer.db = jax.device_put(layer.db, second)
try:
    layer.backward(dy, accumulate=True)
except ValueError as error:
    assert "arrays on two devices: the db that is there is float32 (4,) (jax on" in str(error), error
assert layer.dW is before
print("done")
"""


def test_devices_are_looked_at_where_shapes_are_known() -> None:
    variables = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", DEVICES_OF_KNOWN_SHAPES]
    child = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert (child.stdout, child.returncode) == ("done\n", 0), child.stderr
