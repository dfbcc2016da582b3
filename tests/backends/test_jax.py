"""What only JAX has: vjp as an oracle, jit, vmap, grad, immutable arrays, dtypes that come and go."""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests import fuzz
from tests.helpers import case_on
from xaffine import AffineLayer, affine, affine_backward, affine_jvp, affine_vjp, functional, per_sample
from xaffine.command import clock
from xaffine.curvature import affine_double_backward, kronecker_factors
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms, per_sample_gradients
from xaffine.testing import bounds, make_case, peers
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


def test_what_is_compiled_is_what_one_writes_by_hand(backend: Any) -> None:
    dy, x, W, b = case_on(make_case((5, 6), 4, seed=5), backend)
    affine_vjp(x, W, b)[1](dy)
    ours = functional._COMPILED[type(x)]
    assert ours is not None
    forward, backward = peers._jax_functions()

    def program(lowered: Any) -> str:
        return re.sub(r"@jit_\w+| \{jax.result_info = [^}]*\}", "", lowered.as_text())

    assert program(ours.forward.lower(x, W, b, None)) == program(forward.lower(x, W, b))
    assert program(ours.backward.lower(dy, x, W, b, None, ("x", "W", "b"))) == program(backward.lower(dy, x, W))


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
            rows = np.asarray(per_sample._clipped(jnp, operands[1], operands[0], bias=False, max_norm=max_norm))[0]
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
            with pytest.raises(TypeError, match=r"^jax\.numpy has no common dtype of the same kind.*strict.*Cast all"):
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
    monkeypatch.setattr(clock, "is_gpu", lambda _: True)
    own = clock.clock_of(backend, backend.devices[0])
    assert own.name == "host"
    assert own.flush is not None
    assert own.flush().nbytes == clock._LARGER_THAN_CACHES


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
