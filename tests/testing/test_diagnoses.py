"""Causes in words: a planted mistake is named, and what only looks like it is not."""

# ruff: noqa: ARG001, ARG005

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.testing.bugs import Plain
from xaffine.testing import Options, PropertyError, check_affine


def textbook(**wrong: Callable[..., Any]) -> type:
    """The class of a textbook, which takes no b = None and checks nothing, with some results replaced.

    Each function is called with the layer, dy (forward has none) and the right result.
    """

    class Affine:
        calls = 0

        def __init__(self, W: Any, b: Any) -> None:
            self.W, self.b, self.count = W, b, itertools.count()

        def forward(self, x: Any) -> Any:
            self.x = x
            y = x @ self.W + self.b
            return wrong["y"](self, x, y) if "y" in wrong else y

        def backward(self, dy: Any) -> Any:
            self.calls += 1
            right = {"dx": dy @ self.W.T, "dW": self.x.T @ dy, "db": dy.sum(0)}
            got = {name: wrong[name](self, dy, value) if name in wrong else value for name, value in right.items()}
            self.dW, self.db = got["dW"], got["db"]
            return got["dx"]

    return Affine


def narrow(array: Any, bits: int = 11) -> Any:
    """Values of so many significant bits."""
    significands, exponents = np.frexp(array)
    return np.ldexp(np.rint(np.ldexp(significands, bits)), exponents - bits).astype(array.dtype)


def square(layer: Any) -> bool:
    return bool(layer.W.shape[0] == layer.W.shape[1])


def adding_up(layer: Any, _: Any, dW: Any) -> Any:
    layer.sum = getattr(layer, "sum", 0) + dW
    return layer.sum


class Of(Plain):
    """Products of rounded factors, or in another precision."""

    bits = 11

    def product(self, a: Any, b: Any) -> Any:
        return narrow(a, self.bits) @ narrow(b, self.bits)


class OfBfloat16(Of):
    bits = 8


class InFloat32(Plain):
    def product(self, a: Any, b: Any) -> Any:
        return (a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype)


class RoundsResults(Plain):
    def product(self, a: Any, b: Any) -> Any:
        return narrow(a @ b)


NAMED: dict[str, Any] = {
    "y lacks the bias": textbook(y=lambda layer, x, y: y - layer.b),
    "y has the bias subtracted": textbook(y=lambda layer, x, y: y - 2 * layer.b),
    "y has the bias added twice": textbook(y=lambda layer, x, y: y + layer.b),
    "y uses Wᵀ where W belongs": textbook(y=lambda layer, x, y: x @ layer.W.T + layer.b if square(layer) else y),
    "y is 2 times what it should be": textbook(y=lambda layer, x, y: 2 * y),
    "y is zero everywhere": textbook(y=lambda layer, x, y: 0 * y),
    "dx uses W where Wᵀ belongs": textbook(dx=lambda layer, dy, dx: dy @ layer.W if square(layer) else dx),
    "dx is divided by the batch size": textbook(dx=lambda layer, dy, dx: dx / len(dx)),
    "dx is -1 times what it should be": textbook(dx=lambda layer, dy, dx: -dx),
    "dW is transposed: dyᵀ x where xᵀ dy belongs": textbook(dW=lambda layer, dy, dW: dW.T if square(layer) else dW),
    "dW is the mean over the batch, not the sum": textbook(dW=lambda layer, dy, dW: dW / len(dy)),
    "db is the mean over the batch, not the sum": textbook(db=lambda layer, dy, db: dy.mean(0)),
    "db is 0.5 times what it should be": textbook(db=lambda layer, dy, db: db / 2),
    "db is the first row of dy, not the sum of all": textbook(db=lambda layer, dy, db: dy[0].copy()),
    "db is the last row of dy, not the sum of all": textbook(db=lambda layer, dy, db: dy[-1].copy()),
    "the last rows of a batch are dropped: 4 of 5 count for db": textbook(
        db=lambda layer, dy, db: dy[: len(dy) // 4 * 4].sum(0)
    ),
    "the last rows of a batch are dropped: 4 of 5 count for dW": textbook(
        dW=lambda layer, dy, dW: layer.x[:-1].T @ dy[:-1]
    ),
    "the last columns of dx are not computed: 1 of 5": textbook(
        dx=lambda layer, dy, dx: np.pad(dx[:, : dx.shape[1] // 4 * 4], ((0, 0), (0, dx.shape[1] % 4)))
    ),
    "gradients add up over calls: after a second one they are twice what they should be": textbook(dW=adding_up),
    "factors are rounded to TF32 (11 significant bits)": Of,
    "factors are rounded to bfloat16 (8 significant bits)": OfBfloat16,
}
LOOK_ALIKES: dict[str, Any] = {
    "a rolled bias": textbook(y=lambda layer, x, y: y - layer.b + np.roll(layer.b, 1)),
    "a mirrored W": textbook(dx=lambda layer, dy, dx: dy @ layer.W.T[::-1] if square(layer) else dx),
    "a mirrored dW": textbook(dW=lambda layer, dy, dW: dW[::-1].copy()),
    "a weighted sum": textbook(db=lambda layer, dy, db: np.arange(1, len(dy) + 1, dtype=dy.dtype) @ dy),
    "every second row": textbook(db=lambda layer, dy, db: dy[::2].sum(0)),
    "rows in the middle": textbook(db=lambda layer, dy, db: dy[1:-1].sum(0)),
    "one wrong element": textbook(dW=lambda layer, dy, dW: dW + (np.arange(dW.size) == 3).reshape(dW.shape)),
    "results of few bits": RoundsResults,
    "the first bias everywhere": textbook(y=lambda layer, x, y: y - layer.b + layer.b[:1].sum()),
    "a y that grows over calls": textbook(y=lambda layer, x, y: y + next(layer.count)),
}


def failure_of(make: Any, **options: Any) -> PropertyError:
    with pytest.raises(PropertyError) as caught:
        check_affine(make, seed=0, max_examples=60, dtype="float32", **options)
    return caught.value


@pytest.mark.parametrize("cause", NAMED)
def test_known_mistake_is_named(cause: str) -> None:
    failure = failure_of(NAMED[cause])
    assert failure.cause == cause
    assert f"\n\n{cause}: {failure.reason}" in str(failure)


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_what_only_looks_like_one_is_not_named(name: str) -> None:
    assert failure_of(LOOK_ALIKES[name]).cause is None


def test_conjugates_are_named() -> None:
    of_W = textbook(dx=lambda layer, dy, dx: dy @ layer.W.conj().T)
    of_x = textbook(dW=lambda layer, dy, dW: layer.x.conj().T @ dy)
    of_dy = textbook(dW=lambda layer, dy, dW: layer.x.T @ dy.conj())
    found = []
    for make in (of_W, of_x, of_dy):
        with pytest.raises(PropertyError) as caught:
            check_affine(make, seed=0, dtype="complex64")
        found.append(caught.value.cause)
    assert found == ["dx uses the conjugate of W", "dW uses the conjugate of x", None]


def test_float32_within_float64_is_named() -> None:
    with pytest.raises(PropertyError) as caught:
        check_affine(InFloat32, seed=0, dtype="float64", properties=["backward_is_within_bounds"])
    assert "dx is computed in float32, and cast to float64" in str(caught.value.cause)


def test_several_causes_are_named_together() -> None:
    make = textbook(dW=lambda layer, dy, dW: dW / len(dy), db=lambda layer, dy, db: -db)
    assert failure_of(make).cause == "dW is the mean over the batch, not the sum; db is -1 times what it should be"


def test_where_rows_are_dropped_is_seen_on_a_long_batch_alone() -> None:
    make = textbook(db=lambda layer, dy, db: dy[:64].sum(0))
    failure = failure_of(make, large=60, properties=["exact"])
    assert str(failure.cause).startswith("the last rows of a batch are dropped: 64 of ")


def test_cause_of_a_failure_of_other_kinds_is_its_reason() -> None:
    def forward_twice(layer: Any, x: Any, y: Any) -> Any:
        raise OverflowError("too large")

    with pytest.raises(PropertyError, match=r"forward raised OverflowError: too large") as caught:
        check_affine(textbook(y=forward_twice), seed=0, supports=())
    assert caught.value.cause is None
    shapes = textbook(db=lambda layer, dy, db: db[None, :])
    assert failure_of(shapes).cause is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        (
            {"dW": lambda layer, dy, dW: layer.x[:4096].T @ dy[:4096]},
            "the last rows of a batch are dropped: 4,096 of 65,537 count for dW",
        ),
        ({"y": lambda layer, x, y: x[:, :65536] @ layer.W[:65536] + layer.b}, None),
        ({"dx": lambda layer, dy, dx: dy[:, :65535] @ layer.W[:, :65535].T}, None),
    ],
)
def test_what_is_wrong_on_long_axes_alone_is_found_with_any_seed(faults: Any, cause: str | None, seed: int) -> None:
    options = Options(seed=seed, max_examples=1, large=5, properties=["exact"], dtype=["float16", "float32"])
    with pytest.raises(PropertyError) as caught:
        check_affine(textbook(**faults), options)
    assert caught.value.cause == cause


def test_a_missing_transpose_that_most_shapes_refuse_is_named() -> None:
    for fault, cause in (
        ({"dx": lambda layer, dy, dx: dy @ layer.W}, "dx uses W where Wᵀ belongs"),
        ({"y": lambda layer, x, y: x @ layer.W.T + layer.b}, "y uses Wᵀ where W belongs"),
    ):
        assert failure_of(textbook(**fault)).cause == cause


def test_mistake_in_a_memory_layout_alone_is_named_with_it() -> None:
    of_raw_W = textbook(y=lambda layer, x, y: x @ layer.W.ravel(order="K").reshape(layer.W.shape) + layer.b)
    of_dy = textbook(dW=lambda layer, dy, dW: dW if dy.strides[0] else 0 * dW)
    assert failure_of(of_raw_W).cause == "in another memory layout than C, y uses Wᵀ where W belongs"
    assert failure_of(of_dy).cause == "in another memory layout than C, dW is zero everywhere"


def test_sum_over_the_wrong_axis_is_named_where_its_shape_is_wrong() -> None:
    make = textbook(db=lambda layer, dy, db: dy.sum(1))
    assert failure_of(make).cause == "db is the sum over the features, not the batch"


@pytest.mark.parametrize("name", ["y", "dx", "dW", "db"])
def test_results_kept_from_an_earlier_call_are_wrong(name: str) -> None:
    Right: Any = textbook()

    class Caching(Right):  # type: ignore[misc]
        dW: Any
        db: Any

        def forward(self, x: Any) -> Any:
            self.kept = getattr(self, "kept", {})
            y = super().forward(x)
            return self.kept.setdefault((name, x.shape), y) if name == "y" else y

        def backward(self, dy: Any) -> Any:
            dx = super().backward(dy)
            results = {"dx": dx, "dW": self.dW, "db": self.db}
            if name in results:
                results[name] = self.kept.setdefault((name, dy.shape), results[name])
            self.dW, self.db = results["dW"], results["db"]
            return results["dx"]

    with pytest.raises(PropertyError, match="backward_belongs_to_latest_forward does not hold"):
        check_affine(Caching, seed=0, properties=["contract"])


def test_a_result_that_is_no_number_is_not_said_to_change() -> None:
    make = textbook(y=lambda layer, x, y: np.where(y == 3, np.nan, y))
    assert check_affine(make, seed=0, properties=["results_are_fresh"]).results[0].failure is None
    with pytest.raises(PropertyError, match=r"a step in \w changes L by nan, by d\w "):
        check_affine(make, seed=0, properties=["differences_are_adjoint_to_gradients"])


def test_an_error_in_float64_is_not_taken_for_float32() -> None:
    make = textbook(y=lambda layer, x, y: y + (y - np.rint(y)) * 2.0**-30)  # right on integers
    with pytest.raises(PropertyError) as caught:
        check_affine(make, seed=0, dtype="float64", properties=["forward_is_within_bound"])
    assert caught.value.cause is None


def test_interrupt_while_a_cause_is_looked_for_ends_the_verifier() -> None:
    calls = []

    def interrupted(layer: Any, x: Any, y: Any) -> Any:
        calls.append(x.shape)
        if x.shape == (5, 5) and layer.W.shape == (5, 5):
            raise KeyboardInterrupt
        return -y

    with pytest.raises(KeyboardInterrupt):
        check_affine(textbook(y=interrupted), seed=0, dtype="float32", properties=["forward_is_exact"])
    assert calls[-1] == (5, 5)
