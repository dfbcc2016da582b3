"""JAX on meshes: eight devices in one process, axes of both types, and two processes, one of which may die."""

from __future__ import annotations

import re
import runpy
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.distributed.launch import Ended, free_port, together
from xaffine import AffineLayer, affine, affine_backward, affine_jvp, affine_vjp
from xaffine.curvature import affine_double_backward, gauss_newton_vector_product, kronecker_factors
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms, per_sample_gradients

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).parent / "workers" / "jax_steps.py")
EXAMPLE = ROOT / "docs" / "examples" / "jax_mesh.py"

TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


class Layout(NamedTuple):
    """Shapes and splits: over which axes of the mesh (2 x, 2 y, 2 z) those of x, W, b and dy are split."""

    shape: tuple[int, ...]
    n_batch_axes: int | None
    x: tuple[Any, ...]
    W: tuple[Any, ...] = ()
    b: tuple[Any, ...] = ()
    dy: tuple[Any, ...] = ()


LAYOUTS = {
    "batch": Layout((8, 12), None, ("x",), dy=("x",)),
    "batch over two axes": Layout((8, 12), None, (("x", "y"),), dy=(("x", "y"),)),
    "columns of W": Layout((8, 12), None, ("x",), (None, "y"), ("y",), ("x", "y")),
    "rows of W": Layout((8, 12), None, ("x", "y"), ("y",), dy=("x",)),
    "everything": Layout((8, 12), None, ("x", "y"), ("y", "z"), ("z",), ("x", "z")),
    "x alone": Layout((8, 12), None, ("x", "y")),
    "W alone": Layout((8, 12), None, (), ("y", "z")),
    "weights as the batch": Layout((8, 12), None, ("x",), ("x",), ("x",), ("x",)),
    "b otherwise than W": Layout((8, 12), None, ("x",), (None, "y"), (), ("x", "y")),
    "tensors": Layout((8, 2, 6), 1, ("x", "y"), ("y",), dy=("x",)),
    "tensors, last axis": Layout((8, 2, 6), 1, ("x", None, "y"), ("y",), dy=("x",)),
    "two batch axes": Layout((4, 8, 12), 2, ("x", "z"), (), (), ("x", "z")),
    "second batch axis": Layout((4, 6, 12), -1, (None, "z", "y"), ("y", "x"), ("x",), (None, "z", "x")),
    "one sample": Layout((12,), None, ("y",), ("y", "z"), ("z",), ("z",)),
    "empty batch": Layout((0, 12), None, ("x",), dy=("x",)),
}
m = 4


def mesh_of(kind: str) -> Any:
    return jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(TYPES[kind],) * 3)


def integers(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(-3, 4, shape).astype("float32") for shape in shapes]


def put(mesh: Any, array: np.ndarray, *split: Any) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*split)))


def operands(layout: Layout, kind: str) -> tuple[list[np.ndarray], list[jax.Array]]:
    """dy, x, W and b, whole and split."""
    k = {None: min(len(layout.shape) - 1, 1), -1: len(layout.shape) - 1}.get(layout.n_batch_axes, layout.n_batch_axes)
    whole = integers((*layout.shape[:k], m), layout.shape, (12, m), (m,))
    mesh = mesh_of(kind)
    splits = (layout.dy, layout.x, layout.W, layout.b)
    return whole, [put(mesh, array, *split) for array, split in zip(whole, splits, strict=True)]


def assert_same(ours: Any, expected: Any) -> None:
    ours, expected = jax.tree.leaves(ours), jax.tree.leaves(expected)
    assert len(ours) == len(expected)
    for own, other in zip(ours, expected, strict=True):
        assert own.dtype == other.dtype
        assert np.array_equal(np.asarray(own), other)


@pytest.mark.parametrize("way", [jax.jit, lambda function: function], ids=["jit", "eager"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_device(name: str, kind: str, way: Any) -> None:
    layout = LAYOUTS[name]
    k = layout.n_batch_axes
    whole, split = operands(layout, kind)

    def both(dy: Any, x: Any, W: Any, b: Any) -> Any:
        y, vjp = affine_vjp(x, W, b, n_batch_axes=k)
        return y, vjp(dy), affine_backward(dy, x, W, n_batch_axes=k, wrt="W").dW

    results = way(both)(*split)
    assert_same(results, both(*whole))
    if kind == "explicit":
        y, gradients, dW = results
        for gradient, operand in zip((*gradients, dW), (*split[1:], split[2]), strict=True):
            assert jax.typeof(gradient) == jax.typeof(operand)
        x, W = jax.typeof(split[1]).sharding.spec, jax.typeof(split[2]).sharding.spec
        assert tuple(jax.typeof(y).sharding.spec) == (*tuple(x)[: y.ndim - 1], W[1])


@pytest.mark.parametrize("way", [jax.jit, lambda function: function], ids=["jit", "eager"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["batch", "everything", "two batch axes", "one sample"])
def test_derivatives_equal_those_on_one_device(name: str, kind: str, way: Any) -> None:
    layout = LAYOUTS[name]
    k = layout.n_batch_axes

    def derivatives(dy: Any, x: Any, W: Any, b: Any) -> Any:
        return {
            "jvp": affine_jvp((x, W, b), (x, None, b), n_batch_axes=k),
            "second": affine_double_backward((x, None, b), dy, x, W, b, n_batch_axes=k),
            "Gauss-Newton": gauss_newton_vector_product((x, W, b), lambda y: y, x, W, b, n_batch_axes=k, wrt="W").dW,
            "factors": kronecker_factors(dy, x, W, b, n_batch_axes=k),
            "each": per_sample_gradients(dy, x, W, b, n_batch_axes=k),
            "clipped": clipped_gradients(dy, x, W, b, n_batch_axes=k, max_norm=np.inf),
            # Integers, and the root's rounding is far below a half.
            "squares": jnp.round(per_sample_gradient_norms(dy, x, W, b, n_batch_axes=k) ** 2),
        }

    whole, split = operands(layout, kind)
    results = way(derivatives)(*split)
    assert_same(results, jax.tree.map(np.asarray, derivatives(*whole)))
    if kind == "explicit":
        dy, x, W, b = map(jax.typeof, split)
        assert jax.typeof(results["second"].dy) == dy
        assert [jax.typeof(gradient) for gradient in results["clipped"][1:]] == [W, b]
        rows = tuple(x.sharding.spec)[:1] if name != "one sample" else ()
        assert tuple(jax.typeof(results["each"].dW).sharding.spec) == (*rows, *W.sharding.spec)
        assert tuple(jax.typeof(results["squares"]).sharding.spec) == rows


@pytest.mark.parametrize("kind", TYPES)
def test_transforms_of_jax_run_through_the_layer(kind: str) -> None:
    (dy, x, W, b), split = operands(LAYOUTS["everything"], kind)
    with jax.set_mesh(split[0].sharding.mesh):
        grads = jax.grad(lambda dy, x, W, b: jnp.sum(dy * affine(x, W, b)), argnums=(1, 2, 3))
        assert_same(jax.jit(grads)(*split), affine_backward(dy, x, W, b))
        assert_same(grads(*split), affine_backward(dy, x, W, b))
        each = jax.vmap(lambda dy, x, W, b: affine_backward(dy, x, W, b), in_axes=(0, 0, None, None))
        assert_same(jax.jit(each)(*split).dW, per_sample_gradients(dy, x, W, b).dW)


@pytest.mark.parametrize("kind", TYPES)
def test_a_layer_adds_up_what_it_gets(kind: str) -> None:
    (dy, x, W, _), split = operands(LAYOUTS["columns of W"], kind)
    layer = AffineLayer(split[2], split[3])
    layer(split[1])
    for _ in range(2):
        layer.backward(split[0], accumulate=True)
    assert_same((layer.dW, layer.db), (2 * x.T @ dy, 2 * dy.sum(0)))
    assert layer.dW.sharding == split[2].sharding
    assert np.array_equal(layer.to("numpy").W, W)


@pytest.mark.parametrize("kind", TYPES)
def test_operands_that_nothing_binds_to_a_device_join_the_mesh(kind: str) -> None:
    (dy, x, W, b), split = operands(LAYOUTS["batch"], kind)
    free = jnp.asarray(W), jnp.asarray(b)
    assert_same(affine(split[1], *free), affine(x, W, b))
    assert_same(affine_backward(*split[:2], *free), affine_backward(dy, x, W, b))


@pytest.mark.parametrize("kind", TYPES)
def test_inside_shard_map_gradients_are_those_of_the_part(kind: str) -> None:
    (dy, x, W, b), split = operands(LAYOUTS["rows of W"], kind)
    rows, whole = PartitionSpec("x"), PartitionSpec()
    with jax.set_mesh(split[0].sharding.mesh):
        mapped = jax.shard_map(
            lambda *operands: jax.tree.map(lambda part: jax.lax.psum(part, "x"), affine_backward(*operands)[1:]),
            in_specs=(rows, rows, whole, whole),
            out_specs=whole,
            axis_names={"x"},  # so the other axes of the mesh, over which n is split, stay what they are
        )
        assert_same(jax.jit(mapped)(*split), affine_backward(dy, x, W, b)[1:])


def test_axes_of_both_types_on_one_mesh() -> None:
    (dy, x, W, b), _ = operands(LAYOUTS["everything"], "auto")
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Explicit, AxisType.Auto, AxisType.Explicit))
    splits = [getattr(LAYOUTS["everything"], name) for name in ("dy", "x", "W", "b")]
    split = [put(mesh, array, *axes) for array, axes in zip((dy, x, W, b), splits, strict=True)]
    gradients = jax.jit(affine_backward)(*split)
    assert_same(gradients, affine_backward(dy, x, W, b))
    assert [jax.typeof(gradient) for gradient in gradients] == [jax.typeof(operand) for operand in split[1:]]


def collectives(function: Any, *arguments: Any) -> dict[str, int]:
    """What a compiled program exchanges between devices."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    names = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    return dict(Counter(re.findall(rf" ({names})(?:-start)?\(", text)))


def forward_and_backward(dy: Any, x: Any, W: Any, b: Any) -> Any:
    y, vjp = affine_vjp(x, W, b)
    return y, vjp(dy)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("batch", {}, {"all-reduce": 1}),  # dW and db in one
        ("batch over two axes", {}, {"all-reduce": 1}),
        ("columns of W", {}, {"all-reduce": 2}),  # and one for dx, over another axis of the mesh
        ("rows of W", {"all-reduce": 1}, {"all-reduce": 1}),  # one for y
    ],
)
def test_what_devices_exchange(name: str, kind: str, forward: Any, backward: Any) -> None:
    dy, x, W, b = operands(LAYOUTS[name], kind)[1]
    assert collectives(affine, x, W, b) == forward
    assert collectives(affine_backward, dy, x, W, b) == backward
    together = Counter(forward) + Counter(backward)
    assert collectives(forward_and_backward, dy, x, W, b) == together


@pytest.mark.parametrize("kind", TYPES)
def test_the_one_sum_of_data_parallel_training_holds_dW_and_db(kind: str) -> None:
    split = operands(LAYOUTS["batch"], kind)[1]
    text = jax.jit(forward_and_backward).lower(*split).compile().as_text()
    (line,) = [line for line in text.splitlines() if " all-reduce(" in line]
    assert re.search(r"= \(f32\[12,4\]\S* f32\[4\]\S*\) all-reduce\(", line)


@pytest.mark.parametrize("kind", TYPES)
def test_where_nothing_is_wanted_nothing_comes(kind: str) -> None:
    dy, x, W, b = operands(LAYOUTS["batch"], kind)[1]
    assert affine_backward(dy, x, W, b, wrt=()) == (None, None, None)
    layer = AffineLayer(W)
    layer(x)
    assert layer.backward(dy, wrt="b") is layer.dW is layer.db is None


@pytest.mark.parametrize("way", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_an_axis_of_the_mesh_splits_a_result_once(way: Any) -> None:
    mesh = mesh_of("explicit")
    x, W = integers((8, 12), (12, m))
    message = (
        r"over the axis 'x' of the mesh along two of its own axes: x is float32\[8@x,12\]; W is float32\[12,4@x\]\. "
        r"Pass one of them that is not split over 'x'; jax\.sharding\.reshard makes one"
    )
    with pytest.raises(ValueError, match=message):
        way(affine)(put(mesh, x, "x"), put(mesh, W, None, "x"))
    other = jax.sharding.reshard(put(mesh, W, None, "x"), NamedSharding(mesh, PartitionSpec()))
    assert_same(way(affine)(put(mesh, x, "x"), other), x @ W)


@pytest.mark.parametrize("kind", TYPES)
def test_two_meshes_are_refused(kind: str) -> None:
    x, W = integers((8, 12), (12, m))
    other = jax.make_mesh((4, 2), ("x", "y"), axis_types=(TYPES[kind],) * 2)
    message = (
        r"arrays on two meshes: x is float32\[8@x,12\]; W is float32\[12,4\]; "
        r"x on \('x': 2 Explicit, 'y': 2 Explicit, 'z': 2 Explicit\), W on \('x': 4 \w+, 'y': 2 \w+\)\. Bring them"
    )
    with pytest.raises(ValueError, match=message):
        affine(put(mesh_of("explicit"), x, "x"), put(other, W))


def test_weights_that_are_to_be_reduced_give_whole_gradients() -> None:
    (dy, x, _, _), split = operands(LAYOUTS["batch"], "explicit")
    with jax.set_mesh(split[0].sharding.mesh):
        reduced = jax.sharding.reshard(split[2], PartitionSpec(None, None, reduced={"x"}))
        assert_same(jax.jit(affine_backward)(*split[:2], reduced).dW, x.T @ dy)


def test_the_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) > 2
    assert losses[-1] < losses[0] / 10


def test_the_example_ends_in_one_line_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jax, "jit", interrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as exit_:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert getattr(exit_.value, "code", None) == 130
    assert capsys.readouterr().err == "interrupted\n"


HEARTBEAT = 10  # seconds without a sign of life after which a process counts as dead
START = 60  # seconds to start and compile on a busy machine


def run_two(*, victim: int = -1, by: int = 0, seconds: float = START) -> list[Ended]:
    port = str(free_port())
    return together(
        *([sys.executable, "-u", WORKER, port, rank, str(victim), str(by), str(HEARTBEAT)] for rank in "01"),
        seconds=seconds,
    )


def test_two_processes_equal_one() -> None:
    for rank, ended in enumerate(run_two()):
        assert ended.status == 0, ended.output
        assert ended.output.count(f"rank {rank}: step") == 6


@pytest.mark.parametrize(
    ("victim", "by", "why"),
    [
        (0, signal.SIGKILL, "Failed to send RPC to coordination service"),
        (1, signal.SIGKILL, "Gloo all-reduce failed"),
        (1, signal.SIGSTOP, "stopped sending heartbeats"),  # as a machine without power: no connection is closed
    ],
    ids=["coordinator", "other", "silent"],
)
def test_a_process_that_dies_ends_the_other_with_an_error(victim: int, by: int, why: str) -> None:
    ended = run_two(victim=victim, by=by, seconds=START + 3 * HEARTBEAT)
    assert ended[victim].status == -signal.SIGKILL
    survivor = ended[1 - victim]
    assert survivor.status == -signal.SIGABRT
    assert f"rank {1 - victim}: step 0" in survivor.output
    assert f"rank {1 - victim}: step 3" not in survivor.output
    assert "the JAX distributed service detected fatal errors" in survivor.output
    assert why in survivor.output
