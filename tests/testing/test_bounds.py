"""Rounding bounds: the formula, its forms in integers and in arrays, and the models of summation."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xaffine.testing import bounds
from xaffine.testing.strategies import cases

FLOATS = ("float16", "float32", "float64", "bfloat16", "complex64", "complex128")
SUMMATIONS = (
    bounds.Summation(block=3), bounds.Summation("float64"), bounds.Summation("float64", block=2),
    bounds.Summation(factors="tf32"), bounds.Summation(cuts=True, factors="tf32"),
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_formats_are_those_of_numpy(dtype: str) -> None:
    info = np.finfo(dtype)
    assert bounds.unit_roundoff(dtype) == Fraction(float(info.eps)) / 2
    assert bounds.smallest_normal(dtype) == Fraction(float(info.smallest_normal))
    assert bounds.exact_integers(dtype) == 2 / float(info.eps)


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "uint64"])
def test_integers_have_no_rounding(dtype: str) -> None:
    assert bounds.unit_roundoff(dtype) == bounds.smallest_normal(dtype) == 0
    assert bounds.exact_integers(dtype) == np.iinfo(dtype).max


def test_bound_is_infinite_where_the_model_promises_nothing() -> None:
    assert bounds.gamma(2048, bounds.unit_roundoff("float16")) == math.inf
    assert bounds.gamma(2047, bounds.unit_roundoff("float16")) == 2047


def test_bound_of_one_rounding_is_reached_by_one_rounding() -> None:
    # 1 + u is half way between two float32 numbers: rounding it errs by u, the most that one rounding can.
    u = bounds.unit_roundoff("float32")
    exact = 1 + u
    assert abs(Fraction(float(np.float32(exact))) - exact) == u
    bound = bounds.rounding_bound(exact, [exact], 1, 1, "float32", "float32")
    assert u < bound < u * (1 + 3 * u) + 2 * bounds.smallest_normal("float32") + u * u


def test_a_cast_adds_its_own_rounding() -> None:
    one = Fraction(1)
    narrow = bounds.rounding_bound(one, [one], 3, 3, "float64", "float32")
    wide = bounds.rounding_bound(one, [one], 3, 3, "float64", "float64")
    assert bounds.unit_roundoff("float32") < narrow - wide < 2 * bounds.unit_roundoff("float32")


@given(cases(FLOATS, values="floats", mixed=False), st.sampled_from([None, *SUMMATIONS]))
def test_array_bounds_are_the_exact_ones_rounded_up(case: Any, summation: Any) -> None:
    arrays = {name: getattr(case, name) and getattr(case, name).values for name in ("x", "W", "b", "dy")}
    computed = bounds.affine_bounds(
        **arrays, dtype=case.y_dtype, n_batch_axes=case.n_batch_axes, summation=summation
    )._asdict()
    for name, exact in replace(case, summation=summation).exact().items():
        bound = computed.pop(name)
        assert bound.shape == exact.shape
        for i, part in enumerate([bound.real, bound.imag] if np.iscomplexobj(bound) else [bound]):
            for j, got in enumerate(part.ravel()):
                true = exact.bound(i, j)
                assert true == math.inf == got or true <= Fraction(float(got)) <= true * (1 + Fraction(1, 2**30))
    assert set(computed.values()) <= {None}


@given(cases(FLOATS, values="floats", max_extent=3), st.sampled_from([None, *SUMMATIONS]))
def test_bounds_in_integers_are_those_of_the_formula(case: Any, summation: Any) -> None:
    for exact in replace(case, summation=summation).exact().values():
        how = (exact.k, exact.terms, exact.accumulator, exact.rounded_to)
        for i, part in enumerate(exact.magnitude):
            for j in range(part.size):
                size, bias, *stages = (
                    Fraction(int(some[i].flat[j]), 2**exact.scale)
                    for some in (exact.magnitude, exact.bias, *exact.stages)
                )
                options: Any = {"cuts": exact.cuts, "factors": exact.factors, "bias": bias}
                assert exact.bound(i, j) == bounds.rounding_bound(size, stages, *how, **options)


def test_forward_bound_needs_no_dy() -> None:
    x, W = np.ones((2, 3)), np.ones((3, 4))
    y, *others = bounds.affine_bounds(x, W, dtype="float64")
    assert y.shape == (2, 4)
    assert others == [None, None, None]


def test_blocks_round_less() -> None:
    assert [bounds.Summation(block=10).roundings(k) for k in (0, 1, 10, 11, 20, 21, 100)] == [0, 1, 10, 11, 11, 12, 19]


def test_blocked_sum_stays_within_its_bound_and_a_running_one_does_not() -> None:
    """A running float32 sum of ones stops at 2²⁴."""
    terms = np.ones(2**25, np.float32)
    running = np.add.accumulate(terms)[-1]
    blocked = np.add.accumulate(np.add.accumulate(terms.reshape(8192, 4096), axis=1)[:, -1])[-1]
    exact = Fraction(2**25)
    k = bounds.Summation(block=4096).roundings(2**25)
    limit = bounds.rounding_bound(exact, [exact], k, 2**25, "float32", "float32")
    assert abs(Fraction(float(blocked)) - exact) <= limit < abs(Fraction(float(running)) - exact)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_asks_for_wide_accumulators(dtype: str) -> None:
    assert bounds.usual_summation(dtype) == bounds.Summation("float32", cuts=True)
    k = 4096
    narrow = bounds.rounding_bound(Fraction(k), [Fraction(k)], k, k, dtype, dtype)
    wide = bounds.rounding_bound(Fraction(k), [Fraction(k)], k, k, "float32", dtype)
    assert narrow == math.inf
    assert wide < 2 * bounds.unit_roundoff(dtype) * k


def test_every_product_may_underflow_however_the_sum_is_added_up() -> None:
    """A hundred products just under the smallest normal number, all flushed to zero: a hundred times it is lost."""
    nu = float(bounds.smallest_normal("float32"))
    x, W = np.full((1, 100), 1.0), np.full((100, 1), np.nextafter(nu, 0))
    for summation in (bounds.Summation(), bounds.Summation(block=10)):
        assert bounds.affine_bounds(x, W, dtype="float32", summation=summation).y[0, 0] >= 100 * nu


def test_what_is_no_model_of_summation_is_refused() -> None:
    with pytest.raises(ValueError, match="a block holds at least one term, not 0"):
        bounds.Summation(block=0)
    with pytest.raises(ValueError, match="'tf32' is no dtype of numbers; those with a rounding are bfloat16, float16"):
        bounds.Summation("tf32")
    with pytest.raises(ValueError, match="'float16' is no format of factors; there is 'tf32'"):
        bounds.Summation(factors="float16")
    with pytest.raises(ValueError, match="'flaot32' is no dtype"):
        bounds.affine_bounds(np.ones((2, 3)), np.ones((3, 4)), dtype="flaot32")


@pytest.mark.parametrize(
    ("x", "W", "b", "dy"),
    [((2, 3), (4, 5), None, None), ((2, 3), (3, 4), (1, 4), None), ((2, 3), (3, 4), (4,), (2, 3))],
)
def test_shapes_that_do_not_go_together_are_refused(x: Any, W: Any, b: Any, dy: Any) -> None:
    arrays = (None if shape is None else np.ones(shape) for shape in (x, W, b, dy))
    with pytest.raises(ValueError, match=r"must have the shapes .*; got \(2, 3\), "):
        bounds.affine_bounds(*arrays, dtype="float32")
