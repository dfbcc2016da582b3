"""What is asked of a mesh of JAX: which arrays run on it, and how its results are split, with a mesh that only records.

Meshes themselves are tested in tests/distributed. The axes of a batch of (2, 1) fit two values of `n_batch_axes`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xaffine import affine, affine_backward, curvature, functional, per_sample
from xaffine.curvature import SecondGradients, affine_double_backward, kronecker_factors
from xaffine.functional import Gradients
from xaffine.per_sample import PerSampleGradients, clipped_gradients, per_sample_gradient_norms, per_sample_gradients
from xaffine.shapes import check


class Subclass(np.ndarray):
    """Arrays of NumPy itself take a shorter path, which has no meshes."""


class Mesh:
    """Stands in for `automatic` and `split_of`: an array is split over an axis of its own along each of its axes."""

    def __init__(self, **arrays: Any) -> None:
        self.arrays = arrays
        self.calls: list[tuple[dict[str, Any], Any]] = []
        self.running = False

    def automatic(self, **arrays: Any) -> Any:
        def call(function: Any, splits: Any) -> Any:
            self.calls.append((arrays, splits))
            self.running = True
            on_the_mesh = [None if array is None else array.copy() for array in arrays.values()]
            for array in arrays.values():
                if array is not None:
                    array[...] = np.nan  # the function may take the arrays that the mesh hands to it, no others
            return function(*on_the_mesh)

        return None if self.running else call

    def split_of(self, array: Any) -> tuple[str, ...]:
        (name,) = (name for name, other in self.arrays.items() if other is array)
        return self.split(name)

    def split(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}{axis}" for axis in range(self.arrays[name].ndim))


def run(monkeypatch: pytest.MonkeyPatch, call: Any, run_on: dict[str, Any], **arrays: Any) -> tuple[Any, Mesh]:
    """How the mesh is to split what a call returns, and the mesh; the call must have run on the mesh, once."""
    mesh = Mesh(**arrays)
    expected = call()
    for module in (functional, curvature, per_sample):
        monkeypatch.setattr(module, "automatic", mesh.automatic)
        monkeypatch.setattr(module, "split_of", mesh.split_of)
    got = call()
    ((came, splits),) = mesh.calls
    assert came.keys() == run_on.keys()
    assert all(came[name] is run_on[name] for name in run_on)
    assert type(got) is type(expected)
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, expected)), strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and np.array_equal(one, other))
    return splits, mesh


@pytest.fixture(params=[(0, True), (0, False), (1, True), (1, False), (2, True), (2, False)], ids=str)
def operands(request: pytest.FixtureRequest) -> tuple[int, dict[str, Any]]:
    """How many axes x has before its features, and dy, x, W and b, or None."""
    k, bias = request.param
    rng = np.random.default_rng(0)
    x_shape, y_shape = ((4,), (3,)) if k == 0 else ((2, 1, 4), (*(2, 1)[:k], 3))
    shapes = {"dy": y_shape, "x": x_shape, "W": (4, 3), "b": (3,)}
    arrays = {name: rng.integers(-4, 5, shape).astype("float32") for name, shape in shapes.items()}
    return k, arrays if bias else {**arrays, "b": None}


def test_forward(monkeypatch: pytest.MonkeyPatch, operands: Any) -> None:
    k, arrays = operands
    _, x, W, b = arrays.values()
    x, W = x.view(Subclass), W.view(Subclass)
    arrays |= {"x": x, "W": W}
    run_on = {"x": x, "W": W, "b": b}
    splits, mesh = run(monkeypatch, lambda: affine(x, W, b, n_batch_axes=k), run_on, **arrays)
    assert splits == (*mesh.split("x")[:k], "W1")


@pytest.mark.parametrize("wrt", [("x", "W", "b"), ("x",), ("W", "b")], ids=str)
def test_backward(monkeypatch: pytest.MonkeyPatch, operands: Any, wrt: Any) -> None:
    k, arrays = operands
    dy, x, W, b = arrays.values()
    dy, x, W = (array.view(Subclass) for array in (dy, x, W))
    arrays |= {"dy": dy, "x": x, "W": W}
    call = lambda: affine_backward(dy, x, W, b, n_batch_axes=k, wrt=wrt)  # noqa: E731
    splits, mesh = run(monkeypatch, call, arrays, **arrays)
    wanted = [name if name in wrt and arrays[name] is not None else None for name in ("x", "W", "b")]
    assert splits == Gradients(*(None if name is None else mesh.split(name) for name in wanted))


def test_buffers_reach_what_runs_on_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX refuses `out` inside the call on the mesh; buffers that were not passed on would be ignored in silence."""
    dy, x, W, b = (np.ones(shape).view(Subclass) for shape in ((2, 3), (2, 4), (4, 3), (3,)))
    y, out = np.empty_like(dy), tuple(map(np.empty_like, (x, W, b)))
    for call, buffers in (
        (lambda: (affine(x, W, b, out=y),), (y,)),
        (lambda: affine_backward(dy, x, W, b, out=out), out),
    ):
        mesh = Mesh(dy=dy, x=x, W=W, b=b)
        monkeypatch.setattr(functional, "automatic", mesh.automatic)
        monkeypatch.setattr(functional, "split_of", mesh.split_of)
        assert all(result is buffer for result, buffer in zip(call(), buffers, strict=True))
        assert len(mesh.calls) == 1


@pytest.mark.parametrize("missing", [(), ("x_dot",), ("W_dot",), ("x_dot", "W_dot"), ("b_dot",)], ids=str)
def test_tangent(monkeypatch: pytest.MonkeyPatch, operands: Any, missing: Any) -> None:
    k, arrays = operands
    _, x, W, b = arrays.values()
    x, W, b = (array if array is None else array * (1 + 2j) for array in (x, W, b))
    arrays |= {"x": x, "W": W, "b": b}
    dots = {f"{name}_dot": None if arrays[name] is None else 2 * arrays[name] for name in ("x", "W", "b")}
    dots |= dict.fromkeys(missing)
    call = lambda: functional.along(check(x, W, b, k), *dots.values(), x.dtype, x.dtype)  # noqa: E731
    run_on = {"x": x, "W": W, "b": b, **dots}
    splits, mesh = run(monkeypatch, call, run_on, **arrays)
    assert splits == (*mesh.split("x")[:k], "W1")


@pytest.mark.parametrize("missing", [(), ("x",), ("W",), ("b",)], ids=str)
def test_double_backward(monkeypatch: pytest.MonkeyPatch, operands: Any, missing: Any) -> None:
    k, arrays = operands
    dy, x, W, b = arrays.values()
    by_dx, by_dW, by_db = (
        None if name in missing or arrays[name] is None else 2 * arrays[name] for name in ("x", "W", "b")
    )
    call = lambda: affine_double_backward((by_dx, by_dW, by_db), dy, x, W, b, n_batch_axes=k)  # noqa: E731
    cotangents = {"the cotangent of dx": by_dx, "the cotangent of dW": by_dW, "the cotangent of db": by_db}
    splits, mesh = run(monkeypatch, call, {**cotangents, **arrays}, **arrays)
    of_x, of_W = (None if by_dW is None else mesh.split("x")), (None if by_dx is None else mesh.split("W"))
    assert splits == SecondGradients(mesh.split("dy"), of_x, of_W)


def test_kronecker_factors(monkeypatch: pytest.MonkeyPatch, operands: Any) -> None:
    k, arrays = operands
    call = lambda: kronecker_factors(*arrays.values(), n_batch_axes=k)  # noqa: E731
    splits, _ = run(monkeypatch, call, arrays, **arrays)
    assert splits == curvature.KroneckerFactors((None, None), (None, None))


def test_gradients_of_each_sample(monkeypatch: pytest.MonkeyPatch, operands: Any) -> None:
    k, arrays = operands
    call = lambda: per_sample_gradients(*arrays.values(), n_batch_axes=k)  # noqa: E731
    splits, _ = run(monkeypatch, call, arrays, **arrays)
    rows = ("x0",) if k else ()
    assert splits == PerSampleGradients((*rows, "W0", "W1"), None if arrays["b"] is None else (*rows, "b0"))


def test_norms_of_each_sample(monkeypatch: pytest.MonkeyPatch, operands: Any) -> None:
    k, arrays = operands
    call = lambda: per_sample_gradient_norms(*arrays.values(), n_batch_axes=k)  # noqa: E731
    splits, _ = run(monkeypatch, call, arrays, **arrays)
    assert splits == (("x0",) if k else ())


def test_clipped_sums(monkeypatch: pytest.MonkeyPatch, operands: Any) -> None:
    k, arrays = operands
    call = lambda: clipped_gradients(*arrays.values(), max_norm=2.0, n_batch_axes=k)  # noqa: E731
    splits, _ = run(monkeypatch, call, arrays, **arrays)
    assert splits == Gradients(None, ("W0", "W1"), None if arrays["b"] is None else ("b0",))
