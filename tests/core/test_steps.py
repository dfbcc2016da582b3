"""Steps: all is computed in them, from the arrays that they are handed alone, and they say whose shape results have.

So a library may run a step on a device, compile it, or split it over a mesh; JAX does the last by what the step says.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.helpers import wrap_primitives
from xaffine import (
    AffineLayer,
    affine,
    affine_backward,
    affine_jvp,
    affine_vjp,
    curvature,
    functional,
    layer,
    per_sample,
)
from xaffine.backends import Backend

STEPS = {
    functional: {"forward", "backward", "jvp"},
    curvature: {"double_backward", "tangent", "second_moments"},
    per_sample: {"gradients_of_each", "norms_of_each", "clipped_sums"},
    layer: {"add"},
}
COMPUTING = ("matmul", "sum", "reshape", "cast")


class Runs:
    """Stands in for `Backend.run`: a step gets copies, while what the caller holds is NaN."""

    def __init__(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.handed: list[dict[str, Any]] = []
        self.running = False
        wrap_primitives(monkeypatch, backend, self.within_a_step)
        for name in COMPUTING:
            monkeypatch.setattr(type(backend), name, self.within_a_step(getattr(type(backend), name)))
        monkeypatch.setattr(backend, "calls_directly", False)
        monkeypatch.setattr(type(backend), "run", lambda _, *arguments: self.run(*arguments))

    def within_a_step(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            assert self.running, "something is computed outside of a step"
            return method(*arguments)

        return checked

    def run(self, step: Any, plan: Any, *arrays: Any) -> Any:
        _, *names = inspect.signature(step).parameters
        named = dict(zip(names, arrays, strict=True))
        self.names.append(step.__name__)
        self.handed.append(named)
        assert arrays[0] is not None
        assert pickle.loads(pickle.dumps(step)) is step  # noqa: S301
        copies = [array.copy() if isinstance(array, np.ndarray) else array for array in arrays]
        kept = [(array, array.copy()) for array in arrays if isinstance(array, np.ndarray)]
        for array, _ in kept:
            array[...] = np.nan
        self.running = True
        try:
            results = step(plan, *copies)
        finally:
            self.running = False
            for array, values in kept:
                array[...] = values
        if step is not layer.add:
            self.check_shapes(step.results, results, plan, named)
        return results

    def check_shapes(self, described: tuple[str, ...], results: Any, plan: Any, arrays: dict[str, Any]) -> None:
        """Assert that the results have the shapes that the step says; "" says nothing."""
        some = results if isinstance(results, tuple) else (results,)
        for described_as, result in zip(described, some, strict=True):
            if result is not None and described_as:
                known = {"y": plan.y_shape, "samples": arrays["x"].shape[: min(1, plan.n_batch_axes)]}
                parts = [known[name] if name in known else arrays[name].shape for name in described_as.split()]
                shape = tuple(extent for part in parts for extent in part)
                assert result.shape == shape, described_as


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend) -> Runs:
    return Runs(numpy_backend, monkeypatch)


@pytest.fixture(params=[(0, True), (0, False), (1, True), (1, False), (2, True), (2, False)], ids=str)
def operands(request: pytest.FixtureRequest) -> tuple[int, list[Any]]:
    """How many axes x has before its features, and dy, x, W and b, or None; no two of these have one shape."""
    k, bias = request.param
    rng = np.random.default_rng(0)
    x_shape, y_shape = ((4,), (3,)) if k == 0 else ((2, 1, 4), (*(2, 1)[:k], 3))
    arrays: list[Any] = [rng.integers(-4, 5, shape).astype("f") for shape in (y_shape, x_shape, (4, 3), (3,))]
    return k, arrays if bias else [*arrays[:3], None]


def calls(k: int, dy: Any, x: Any, W: Any, b: Any) -> dict[str, tuple[Callable[[], Any], list[str]]]:
    """A call of every function that computes with arrays, and the steps that it takes."""
    tangents, axes = (2 * x, 3 * W, None if b is None else 4 * b), {"n_batch_axes": k}

    def use_layer() -> Any:
        model = AffineLayer(W, b, n_batch_axes=k)
        return model.forward(x), model.backward(dy), model.dW, model.db

    def accumulate() -> Any:
        model = AffineLayer(W, b, n_batch_axes=k)
        model.dW, model.db = W + 1, None if b is None else b + 1
        model.forward(x)
        return model.backward(dy, accumulate=True), model.dW

    return {
        "affine": (lambda: affine(x, W, b, **axes), ["forward"]),
        "vjp": (lambda: affine_vjp(x, W, b, **axes)[1](dy), ["forward", "backward"]),
        "backward": (lambda: affine_backward(dy, x, W, b, **axes), ["backward"]),
        "backward by x": (lambda: affine_backward(dy, x, W, b, wrt="x", **axes), ["backward"]),
        "backward by W and b": (lambda: affine_backward(dy, x, W, b, wrt="Wb", **axes), ["backward"]),
        "jvp": (lambda: affine_jvp((x, W, b), tangents, **axes), ["jvp"]),
        "jvp along x": (lambda: affine_jvp((x, W, b), (tangents[0], None, None), **axes), ["jvp"]),
        "jvp along W and b": (lambda: affine_jvp((x, W, b), (None, *tangents[1:]), **axes), ["jvp"]),
        "jvp along nothing": (lambda: affine_jvp((x, W, b), (None, None, None), **axes), ["jvp"]),
        "double backward": (
            lambda: curvature.affine_double_backward(tangents, dy, x, W, b, **axes), ["double_backward"],
        ),
        "double backward by dW": (
            lambda: curvature.affine_double_backward((None, W + 1, None), dy, x, W, b, **axes), ["double_backward"],
        ),
        "Gauss-Newton": (
            lambda: curvature.gauss_newton_vector_product(tangents, lambda y_dot: y_dot, x, W, b, **axes),
            ["tangent", "backward"],
        ),
        "factors": (lambda: curvature.kronecker_factors(dy, x, W, b, **axes), ["second_moments"]),
        "each": (lambda: per_sample.per_sample_gradients(dy, x, W, b, **axes), ["gradients_of_each"]),
        "norms": (lambda: per_sample.per_sample_gradient_norms(dy, x, W, b, **axes), ["norms_of_each"]),
        "clipped": (lambda: per_sample.clipped_gradients(dy, x, W, b, max_norm=2.0, **axes), ["clipped_sums"]),
        "layer": (use_layer, ["forward", "backward"]),
        "sums": (accumulate, ["forward", "backward", "add", "add"][: 3 if b is None else 4]),
    }  # fmt: skip


NAMES = list(calls(1, *np.ones((4, 2, 2))))


@pytest.mark.parametrize("name", NAMES)
def test_all_is_computed_in_steps(
    monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend, operands: Any, name: str
) -> None:
    k, arrays = operands
    call, steps = calls(k, *arrays)[name]
    expected = call()
    runs = Runs(numpy_backend, monkeypatch)
    got = call()
    assert runs.names == steps
    assert type(got) is type(expected)
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in (got, expected)), strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and np.array_equal(one, other))
    for named in runs.handed:  # each operand by its own name
        for letter, array in zip(("dy", "x", "W", "b"), arrays, strict=True):
            assert letter not in named or named[letter] is array or (letter == "dy" and name == "Gauss-Newton")


def test_steps_are_called_without_run_where_it_does_no_more(backend: Backend) -> None:
    assert backend.calls_directly is ("run" not in vars(type(backend)))


def test_every_step_is_taken_by_a_call() -> None:
    taken = {step for _, steps in calls(1, *np.ones((4, 2, 2))).values() for step in steps}
    assert taken == set.union(*STEPS.values())
    for module, steps in STEPS.items():
        described = {name for name, thing in vars(module).items() if hasattr(thing, "results")}
        assert steps - {"add"} == {name for name in described if getattr(module, name).__module__ == module.__name__}


def test_buffers_are_handed_to_the_step(runs: Runs) -> None:
    dy, x, W, b = (np.ones(shape, "f") for shape in ((2, 3), (2, 4), (4, 3), (3,)))
    y, out = np.empty_like(dy), tuple(map(np.empty_like, (x, W, b)))
    affine_backward(dy, x, W, b, out=out)
    affine(x, W, b, out=y)
    backward, forward = runs.handed
    assert backward["out"] is out
    assert forward["out"] is y


def test_tangents_and_cotangents_are_handed_to_the_step_by_their_names(runs: Runs) -> None:
    dy, x, W, b = (np.ones(shape, "f") for shape in ((2, 3), (2, 4), (4, 3), (3,)))
    for_x, for_W, for_b = 2 * x, 2 * W, 2 * b
    affine_jvp((x, W, b), (for_x, for_W, for_b))
    curvature.affine_double_backward((for_x, for_W, for_b), dy, x, W, b)
    curvature.gauss_newton_vector_product((for_x, for_W, for_b), lambda y_dot: y_dot, x, W, b)
    names = [("x_dot", "W_dot", "b_dot"), ("by_dx", "by_dW", "by_db"), ("x_dot", "W_dot", "b_dot")]
    for named, three in zip(runs.handed, names, strict=False):
        assert [named[name] is array for name, array in zip(three, (for_x, for_W, for_b), strict=True)] == [True] * 3


def test_steps_say_what_their_results_are_laid_out_like() -> None:
    said = {name: getattr(module, name).results for module, names in STEPS.items() for name in names - {"add"}}
    assert said == {
        "forward": ("y",), "backward": ("x", "W", "b"), "jvp": ("y", "y"),
        "double_backward": ("dy", "x", "W"), "tangent": ("y",), "second_moments": ("", ""),
        "gradients_of_each": ("samples W", "samples b"), "norms_of_each": ("samples",), "clipped_sums": ("W", "b"),
    }  # fmt: skip
