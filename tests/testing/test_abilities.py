"""What an implementation takes is found out before it is judged: what it refuses is a gap, what it accepts counts."""

# ruff: noqa: ARG001, ARG002, ARG005

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.testing.bugs import Plain
from tests.testing.test_diagnoses import textbook
from xaffine import AffineLayer
from xaffine.testing import Options, Property, PropertyError, check_affine, from_functions, property_tests
from xaffine.testing.cases import FEATURES
from xaffine.testing.runner import Plan


class Affine:
    """That of "Deep Learning from Scratch": tensors are flattened, and nothing is checked."""

    def __init__(self, W: Any, b: Any) -> None:
        self.W, self.b = W, b

    def forward(self, x: Any) -> Any:
        self.shape = x.shape
        self.x = x.reshape(x.shape[0], -1)
        return np.dot(self.x, self.W) + self.b

    def backward(self, dout: Any) -> Any:
        self.dW, self.db = np.dot(self.x.T, dout), np.sum(dout, axis=0)
        return np.dot(dout, self.W.T).reshape(*self.shape)


class TimeAffine:
    """That of its second volume: an x of three axes, of which the last is mapped, and lists that it fills anew."""

    def __init__(self, W: Any, b: Any) -> None:
        self.params, self.grads = [W, b], [np.zeros_like(W), np.zeros_like(b)]

    def forward(self, x: Any) -> Any:
        N, T, _ = x.shape
        W, b = self.params
        self.x = x
        return (np.dot(x.reshape(N * T, -1), W) + b).reshape(N, T, -1)

    def backward(self, dout: Any) -> Any:
        N, T, _ = self.x.shape
        W, _ = self.params
        dout = dout.reshape(N * T, -1)
        self.grads[0][...] = np.dot(self.x.reshape(N * T, -1).T, dout)
        self.grads[1][...] = np.sum(dout, axis=0)
        return np.dot(dout, W.T).reshape(*self.x.shape)


class Lazy:
    """Computes its gradients when they are read, and leaves no db without a bias."""

    def __init__(self, W: Any, b: Any) -> None:
        self.W, self.b = W, b

    def __getattr__(self, name: str) -> Any:
        if name == "db" and self.b is not None:
            return self.dy.sum(axis=0)
        raise AttributeError(name)

    @property
    def dW(self) -> Any:
        return self.x.T @ self.dy

    def forward(self, x: Any) -> Any:
        self.x = x
        return x @ self.W if self.b is None else x @ self.W + self.b

    def backward(self, dy: Any) -> Any:
        self.dy = dy.copy()
        return dy @ self.W.T


def affine_forward(x: Any, W: Any, b: Any) -> Any:
    return x.reshape(len(x), -1).dot(W) + b


def affine_backward(dy: Any, x: Any, W: Any, b: Any) -> Any:
    return dy.dot(W.T).reshape(x.shape), x.reshape(len(x), -1).T.dot(dy), dy.sum(axis=0)


@pytest.mark.parametrize(
    ("make", "gaps"),
    [
        (Affine, {"vectors", "last-axis", "no-bias", "no-samples"}),
        (TimeAffine, {"matrices", "vectors", "tensors", "four-axes", "no-bias", "no-samples"}),
        (from_functions(affine_forward, affine_backward), {"vectors", "last-axis", "no-bias", "no-samples"}),
        (textbook(), {"vectors", "tensors", "last-axis", "four-axes", "no-bias"}),
        (Lazy, {"vectors", "tensors", "last-axis", "four-axes"}),
        (Plain, {"last-axis"}),
        (AffineLayer, set()),
    ],
)
def test_classes_of_textbooks_are_right_and_their_gaps_are_named(make: Any, gaps: set[str]) -> None:
    report = check_affine(make, seed=0, max_examples=20)
    assert {name for name, text in FEATURES.items() if any(gap.startswith(text + " (") for gap in report.gaps)} == gaps
    assert len(report.gaps) == len(gaps)
    assert report.dtypes == ("float32", "float64")
    numbers = [result for result in report.results if result.part.prop.tier != "manners"]
    assert {result.verdict for result in numbers} == {"holds"}
    if make in (Affine, TimeAffine):
        with pytest.raises(PropertyError, match=r"rebound_parameters_are_not_seen|rejected_dy"):
            check_affine(make, seed=0, max_examples=20, strict=True, properties=["manners"])


def test_gap_says_why() -> None:
    (bias,) = (gap for gap in Plan(textbook(), Options()).gaps if gap.startswith("b = None"))
    assert bias.startswith("b = None (forward raised TypeError: unsupported operand type")


def test_another_reading_of_x_is_a_gap() -> None:
    class Rows(Plain):
        def forward(self, x: Any) -> Any:
            return super().forward(x.reshape(-1, len(self.weights)))

    gaps = Plan(Rows, Options()).gaps
    assert f"{FEATURES['last-axis']} (y has the shape (6, 5), not (2, 3, 5))" in gaps
    assert f"{FEATURES['vectors']} (y has the shape (1, 5), not (5,))" in gaps


def test_a_matrix_of_a_wrong_shape_is_no_gap() -> None:
    class Flat(Plain):
        def forward(self, x: Any) -> Any:
            return super().forward(x).ravel()

    with pytest.raises(PropertyError, match=r"forward_is_exact does not hold"):
        check_affine(Flat, seed=0)


def test_layouts_and_dtypes_that_are_refused_are_not_drawn() -> None:
    class Particular(Plain):
        def forward(self, x: Any) -> Any:
            if not x.flags.c_contiguous or x.dtype != np.float32:
                raise ValueError("C-contiguous float32 alone")
            return super().forward(x)

    plan = Plan(Particular, Options(seed=0, max_examples=30))
    assert plan.abilities.dtypes == plan.dtypes == ("float32",)
    assert set(plan.abilities.layouts) == {"C", "read-only", "broadcast"}
    assert {gap.partition(" (")[0] for gap in plan.gaps[1:]} == {
        "operands in the layout 'Fortran'", "operands in the layout 'reversed'", "operands in the layout 'strided'",
        "dtype float64",
    }  # fmt: skip
    assert {result.verdict for result in plan.run()} == {"holds"}


def test_what_is_accepted_is_held_to_account() -> None:
    class Wrong(Plain):
        def gradient_of_b(self, dy: Any) -> Any:
            return super().gradient_of_b(dy) + (len(dy) == 0)

    with pytest.raises(PropertyError, match=r"db\[0\] is "):
        check_affine(Wrong, seed=0)


def test_lists_of_gradients_are_held_to_account() -> None:
    class Wrong(TimeAffine):
        def backward(self, dout: Any) -> Any:
            dx = super().backward(dout)
            self.grads[1] *= 2
            return dx

    with pytest.raises(PropertyError, match="db is 2 times what it should be"):
        check_affine(Wrong, seed=0)


def test_what_is_declared_is_tested_whatever_is_refused() -> None:
    assert not Plan(textbook(), Options(supports=set(FEATURES) - {"last-axis"})).gaps
    with pytest.raises(PropertyError, match="forward raised TypeError"):
        check_affine(textbook(), seed=0, supports={"no-bias"})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda W: None, r"making the layer raised TypeError: .*takes 1 positional argument but 2 were given"),
        (from_functions(affine_forward, lambda *_: (1, 2)), r"backward raised ValueError: not enough values to unpack"),
        (textbook(y=lambda layer, x, y: {}[0]), r"forward raised KeyError: 0"),
        (
            lambda W, b: SimpleNamespace(forward=lambda x: x @ W),
            r"make\(W, b\) gave a types.SimpleNamespace, not a lay",
        ),
        (lambda W, b: SimpleNamespace(forward=lambda x: x @ W, backward=lambda dy: dy @ W.T), "dW raised AttributeErr"),
    ],
)
def test_what_takes_no_x_at_all_could_not_run(make: Any, words: str) -> None:
    with pytest.raises(
        ValueError, match=rf"(?s)^x \(2, 3\), W \(3, 5\), .* are refused: {words}.*layer = make\(W, b\)"
    ):
        check_affine(make)


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit()])
def test_an_exit_is_no_clean_refusal(error: BaseException) -> None:
    class Exits(Plain):
        def forward(self, x: Any) -> Any:
            if x.ndim == 1:
                raise error
            return super().forward(x)

    with pytest.raises(PropertyError, match=type(error).__name__):
        check_affine(Exits, seed=0)


def test_a_hang_costs_the_time_limit_twice_at_most() -> None:
    class Hangs(Plain):
        def forward(self, x: Any) -> Any:
            while True:
                time.sleep(0.01)

    start = time.monotonic()
    plan = Plan(Hangs, Options(seed=0, time_limit=0.5))
    results = list(plan.run())
    assert 0.9 < time.monotonic() - start < 5
    assert [result.verdict for result in results] == ["not finished"]
    assert [gap for gap in plan.gaps if gap.endswith(" (not tried after no answer within 0.5 s)")][-1].count(", ") > 9


def test_the_run_ends_after_two_properties_that_hang() -> None:
    class HangsForMany(Plain):
        def forward(self, x: Any) -> Any:
            while len(x) > 5:
                time.sleep(0.01)
            return super().forward(x)

    plan = Plan(HangsForMany, Options(seed=0, time_limit=0.2))
    assert [result.verdict for result in plan.run()] == ["not finished"] * 2
    assert len(plan.parts) > 2


def test_a_property_that_could_show_nothing_is_mistrusted() -> None:
    silent = Property("exact", "integers", lambda *_: None)
    (result,) = check_affine(Plain, seed=0, max_examples=5, properties=[silent]).results
    assert (result.verdict, result.examples, result.told) == ("MISTRUSTED", 5, 0)
    assert all(result.told for result in check_affine(Plain, seed=0, max_examples=30).results)


def test_fail_fast_ends_at_the_first_failure_that_counts() -> None:
    make = textbook(db=lambda layer, dy, db: -db)
    names = [result.part.label for result in Plan(make, Options(seed=0, fail_fast=True)).run()]
    assert names == ["forward_is_exact", "backward_is_exact"]
    rude = Plan(textbook(), Options(seed=0, max_examples=10, fail_fast=True, properties=["manners", "exact"]))
    assert [result.verdict for result in rude.run()].count("FAILS") == 3
    strict = Plan(textbook(), Options(seed=0, max_examples=10, fail_fast=True, strict=True, properties=["manners"]))
    assert len(list(strict.run())) == 1


def test_a_layer_of_single_vectors_is_judged() -> None:
    class OfVectors(Plain):
        def forward(self, x: Any) -> Any:
            if x.ndim > 1:
                raise ValueError("one sample at a time")
            return super().forward(x)

    report = check_affine(OfVectors, seed=0, max_examples=10)
    assert report.gaps[0].startswith(f"{FEATURES['matrices']} (forward raised ValueError: one sample at a time)")
    assert "holds" in {result.verdict for result in report.results}


def test_layer_that_never_has_a_bias_is_judged_without() -> None:
    class NoBias(textbook()):  # type: ignore[misc]
        def __init__(self, W: Any, b: Any) -> None:
            if b is not None:
                msg = "no bias"
                raise ValueError(msg)
            super().__init__(W, np.zeros(W.shape[1], W.dtype))

        @property
        def db(self) -> None:
            return None

        @db.setter
        def db(self, _: Any) -> None:
            pass

    report = check_affine(NoBias, seed=0, max_examples=20)
    assert report.verdict == "right"
    assert "a bias (making the layer raised ValueError: no bias)" in report.gaps


def test_layer_of_single_samples_is_right_without_what_needs_a_batch() -> None:
    class Sample:
        def __init__(self, W: Any, b: Any) -> None:
            self.W, self.b = W, b

        def forward(self, x: Any) -> Any:
            if x.ndim != 1:
                raise ValueError(x.shape)
            self.x = x
            return x @ self.W + self.b

        def backward(self, dy: Any) -> Any:
            if dy.ndim != 1:
                raise ValueError(dy.shape)
            self.dW, self.db = np.outer(self.x, dy), dy.copy()
            return self.W @ dy

    report = check_affine(Sample, seed=0, max_examples=20)
    assert report.verdict == "right"
    assert "batches" in report.gaps
    assert {"batch_is_the_sum_of_its_parts", "permuted_rows_permute_results"}.isdisjoint(
        result.part.prop.name for result in report.results
    )


def test_db_without_a_bias_is_a_gap_and_hides_nothing() -> None:
    def layer(gradient: Any) -> Any:
        class Always(textbook()):  # type: ignore[misc]
            def forward(self, x: Any) -> Any:
                b, self.b = self.b, 0 if self.b is None else self.b
                y = super().forward(x)
                self.b = b
                return y

            def backward(self, dy: Any) -> Any:
                dx = super().backward(dy)
                self.db = gradient(dy)
                return dx

        return Always

    report = check_affine(layer(lambda dy: dy.sum(0)), seed=0, max_examples=20)
    assert report.verdict == "right"
    assert "b = None (db is not None without a bias, but a numpy.ndarray)" in report.gaps
    with pytest.raises(PropertyError) as caught:
        check_affine(layer(lambda dy: dy.mean(0)), seed=0)
    assert caught.value.cause == "db is the mean over the batch, not the sum"


def test_results_of_another_kind_are_told_whatever_else_is_wrong() -> None:
    class ComplexY(Plain):
        def forward(self, x: Any) -> Any:
            return super().forward(x) + 0j

    class ComplexDW(Plain):
        def gradient_of_W(self, x: Any, dy: Any) -> Any:
            return super().gradient_of_W(x, dy) + 0j

    for wrong in (ComplexY, ComplexDW):
        with pytest.raises(PropertyError, match=r"has dtype complex\d+, of the wrong kind"):
            check_affine(wrong, seed=0, max_examples=20)


def test_property_that_could_show_nothing_is_no_passed_test() -> None:
    nothing = Property("exact", "integers", lambda *_: None)
    test = property_tests(Plain, Options(seed=0, max_examples=5, properties=[nothing]))
    with pytest.raises(pytest.fail.Exception, match="no case of <lambda> could show a fault"):
        test(nothing)


def test_manners_that_could_not_be_told_leave_the_verdict() -> None:
    silent = Property("manners", "integers", lambda *_: None)
    chosen = [silent, "forward_is_exact"]
    assert check_affine(Plain, seed=0, max_examples=20, properties=chosen).verdict == "right"
    assert check_affine(Plain, seed=0, max_examples=20, properties=chosen, strict=True).verdict == "not finished"
