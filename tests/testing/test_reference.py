"""The proof's own tools: exact arithmetic, bounds, layouts, strategies."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from xaffine.backends import Backend
from xaffine.testing import bounds, cases, checks, make_case
from xaffine.testing.cases import LAYOUTS, Exact, worst_error
from xaffine.testing.strategies import cases as draw_cases
from xaffine.testing.strategies import extents, large_cases

FLOATS = ("float16", "float32", "float64", "bfloat16", "complex64", "complex128")
SUMMATIONS = (
    bounds.Summation(block=3), bounds.Summation("float64"), bounds.Summation("float64", block=2),
    bounds.Summation(factors="tf32"), bounds.Summation(cuts=True, factors="tf32"),
)  # fmt: skip
ALL = (*FLOATS, "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


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


@given(draw_cases(ALL, values="floats", max_extent=5))
def test_exact_results_are_those_of_rational_arithmetic(case: Any) -> None:
    """The scaled integers of `Case.exact` against Fractions, complex ones against pairs of them."""

    def rational(operand: Any, shape: tuple[int, ...]) -> Any:
        real, imaginary = (np.vectorize(Fraction, otypes=[object])(p) for p in (operand.real, operand.imag))
        return real.reshape(shape), imaginary.reshape(shape)

    def times(a: Any, b: Any) -> Any:
        return a[0] @ b[0] - a[1] @ b[1], a[0] @ b[1] + a[1] @ b[0]

    n, m = case.W.values.shape
    x = rational(case.x.values.astype(complex), (case.N, n))
    W = rational(case.W.values.astype(complex), (n, m))
    dy = rational(case.dy.values.astype(complex), (case.N, m))
    expected = {
        "y": times(x, W),
        "dx": times(dy, [part.T for part in W]),
        "dW": times([part.T for part in x], dy),
    }
    if case.b is not None:
        b = rational(case.b.values.astype(complex), (m,))
        expected["y"] = [y + part for y, part in zip(expected["y"], b, strict=True)]
        expected["db"] = [part.sum(0) for part in dy]
    exact = case.exact()
    assert exact.keys() == expected.keys()
    for name, value in exact.items():
        for part, own in zip(expected[name], value.stages[-1], strict=False):
            assert [Fraction(v, 2**value.scale) for v in own.ravel()] == part.ravel().tolist()


def error_of(computed: np.ndarray, exact: Exact) -> float:
    return worst_error(computed, exact)[0]


def exact_three(k: int = 2) -> Exact:
    three = [np.array([3], object)]
    return Exact([three], three, [0 * three[0]], 0, k, k, "float32", "float32")


def test_error_ratio_is_the_fraction_of_the_bound() -> None:
    bound = bounds.rounding_bound(Fraction(3), [Fraction(3)], 2, 2, "float32", "float32")
    assert error_of(np.array([3.0]), exact_three()) == 0
    off = np.array([3.0 + 2.0**-22])
    assert error_of(off, exact_three()) == float(Fraction(2) ** -22 / bound)
    assert 0 < error_of(off, exact_three()) < 1 < error_of(np.array([3.0 + 2.0**-20]), exact_three())


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_error_ratio_of_what_is_not_finite_is_infinite(wrong: float) -> None:
    assert error_of(np.array([wrong]), exact_three()) == math.inf


def test_error_ratio_of_any_error_is_infinite_where_none_is_allowed() -> None:
    assert error_of(np.array([np.nextafter(3.0, 4)]), exact_three(k=0)) == math.inf


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_cases_hold_values_of_their_dtype(dtype: str) -> None:
    case = make_case((7, 5), 3, seed=0, values="floats", dtypes=dtype)
    parts = np.stack([case.x.values.real, case.x.values.imag]).astype(np.float64)
    significands, _ = np.frexp(parts)
    bits = -int(math.log2(bounds.unit_roundoff(dtype)))
    assert np.all(np.ldexp(significands, bits) % 1 == 0)
    assert np.any(np.ldexp(significands, bits - 1) % 1 != 0)  # and use all of its bits
    assert np.any(parts == 0)
    assert np.any(parts != 0)


@pytest.mark.parametrize("layout", [*LAYOUTS, "broadcast"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (6,), (0, 3), (3, 0)])
def test_layouts_keep_the_values(numpy_backend: Backend, layout: str, shape: Any) -> None:
    values = np.arange(math.prod(shape), dtype="float32").reshape(shape)
    if layout == "broadcast":
        values = np.broadcast_to(values[:1], shape)
    native = cases.Operand(values, "float32", layout).on(numpy_backend)
    assert native.shape == shape
    assert np.array_equal(numpy_backend.to_numpy(native), values)


def test_layouts_differ_in_memory(numpy_backend: Backend) -> None:
    values = np.ones((4, 3), "float32")
    on = {layout: cases.Operand(values, "float32", layout).on(numpy_backend) for layout in [*LAYOUTS, "broadcast"]}
    assert on["C"].flags.c_contiguous
    assert on["Fortran"].flags.f_contiguous
    assert on["reversed"].strides == (-12, -4)
    assert on["strided"].strides == (24, 8)
    assert on["broadcast"].strides == (0, 4)
    assert not on["read-only"].flags.writeable


@pytest.mark.parametrize(
    "wanted",
    [
        lambda c: c.N == 0,
        lambda c: c.W.values.shape[0] == 0,
        lambda c: c.W.values.shape[1] == 0,
        lambda c: c.batch == (),
        lambda c: len(c.batch) == 2 and c.N > 1 and c.x.values.ndim == 4 and c.W.values.size > 1,
        lambda c: c.n_batch_axes is None,
        lambda c: c.n_batch_axes is not None and c.n_batch_axes < 0,
        lambda c: c.b is None,
        lambda c: c.x.dtype != c.W.dtype,
        lambda c: c.dy.layout == "broadcast" and c.N > 1,
        lambda c: c.W.layout == "Fortran",
        lambda c: c.N > 20 and c.W.values.shape[1] > 20,
        *(lambda c, dtype=dtype: c.x.dtype == dtype for dtype in ALL),
    ],
)
def test_strategy_draws(wanted: Any) -> None:
    find(draw_cases(ALL), wanted)


@given(st.data(), st.integers(0, 30))
def test_extents_multiply_to_at_most_the_limit(data: Any, limit: int) -> None:
    assert math.prod(data.draw(extents(limit))) <= max(limit, 1)


@given(st.one_of(draw_cases(ALL), draw_cases(ALL, values="floats"), large_cases(ALL)))
def test_code_of_a_case_makes_it_again(case: Any) -> None:
    again = eval(case.code, {"make_case": make_case})  # noqa: S307 - our own text
    assert again.code == case.code == repr(case)
    assert again.y_dtype == case.y_dtype
    for name in ("x", "W", "b", "dy"):
        ours, theirs = getattr(case, name), getattr(again, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours.dtype, ours.layout) == (theirs.dtype, theirs.layout)
            assert np.array_equal(ours.values, theirs.values)


def test_code_of_a_case_is_short() -> None:
    assert make_case((2, 3), 4, seed=7, bias=False).code == "make_case((2, 3), 4, seed=7, bias=False)"


@given(large_cases(ALL))
def test_large_cases_are_exact_in_every_order(case: Any) -> None:
    """The most that a sum of units can be, with a bias, is an integer that the dtype holds without a gap before it."""
    N, n = case.x.values.shape
    terms = 2 if np.iscomplexobj(case.x.values) else 1
    assert terms * max(N, n, case.W.values.shape[1]) + 1 <= bounds.exact_integers(case.y_dtype)
    assert max(np.abs(o.values.real).max() for o in (case.x, case.W, case.dy)) <= 1
    assert case.kind == "units"


@given(draw_cases(FLOATS, values="floats", mixed=False), st.sampled_from([None, *SUMMATIONS]))
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


def test_case_without_a_bias_does_not_depend_on_its_dtype() -> None:
    dtypes: Any = ("float32", "float32", "float16", "float32")
    case = make_case((3, 2), 2, seed=0, values="floats", dtypes=dtypes, bias=False)
    again = eval(case.code, {"make_case": make_case})  # noqa: S307 - our own text
    assert np.array_equal(case.x.values, again.x.values)


def test_halves_have_wide_accumulators_in_y_beside_a_wider_dy() -> None:
    exact = make_case((3, 2), 2, seed=0, values="floats", dtypes=("float16", "float16", "float16", "float32")).exact()
    assert (exact["y"].accumulator, exact["y"].rounded_to) == ("float32", "float16")
    assert (exact["dx"].accumulator, exact["dx"].rounded_to) == ("float32", "float16")


def test_what_is_no_model_of_summation_is_refused() -> None:
    with pytest.raises(ValueError, match="a block holds at least one term, not 0"):
        bounds.Summation(block=0)
    with pytest.raises(ValueError, match="'tf32' is no dtype of numbers; those with a rounding are bfloat16, float16"):
        bounds.Summation("tf32")
    with pytest.raises(ValueError, match="'float16' is no format of factors; there is 'tf32'"):
        bounds.Summation(factors="float16")
    with pytest.raises(ValueError, match="'flaot32' is no dtype"):
        bounds.affine_bounds(np.ones((2, 3)), np.ones((3, 4)), dtype="flaot32")


def test_factory_without_a_signature_takes_no_batch_axes() -> None:
    assert not checks.takes_batch_axes(type)


def test_no_frames_have_no_last_line() -> None:
    assert checks.last_line_of([]) == "(no traceback)"


def test_mixed_cases_with_bfloat16_promote_as_float32_does() -> None:
    case = make_case((2, 3), 2, seed=0, values="floats", dtypes=("bfloat16", "float64", "bfloat16", "float32"))
    assert case.y_dtype == "float64"
    assert case.exact()["dx"].rounded_to == "bfloat16"


@given(draw_cases(FLOATS, values="floats", max_extent=3), st.sampled_from([None, *SUMMATIONS]))
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


def test_no_finite_error_is_wrong_where_the_bound_is_infinite() -> None:
    exact = exact_three()._replace(k=2048, terms=2048, accumulator="float16", rounded_to="float16")
    assert exact.bound(0, 0) == math.inf
    assert error_of(np.array([1e300]), exact) == 0
    assert error_of(np.array([np.nan]), exact) == math.inf
