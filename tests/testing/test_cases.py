"""Cases: exact results, the error as a fraction of its bound, values, memory layouts, and the code of a case."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xaffine.backends import Backend
from xaffine.testing import bounds, make_case
from xaffine.testing.cases import LAYOUTS, Exact, Operand, worst_error
from xaffine.testing.strategies import cases, large_cases

FLOATS = ("float16", "float32", "float64", "bfloat16", "complex64", "complex128")
ALL = (*FLOATS, "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@given(cases(ALL, values="floats", max_extent=5))
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


def test_mixed_cases_with_bfloat16_promote_as_float32_does() -> None:
    case = make_case((2, 3), 2, seed=0, values="floats", dtypes=("bfloat16", "float64", "bfloat16", "float32"))
    assert case.y_dtype == "float64"
    assert case.exact()["dx"].rounded_to == "bfloat16"


def test_halves_have_wide_accumulators_in_y_beside_a_wider_dy() -> None:
    exact = make_case((3, 2), 2, seed=0, values="floats", dtypes=("float16", "float16", "float16", "float32")).exact()
    assert (exact["y"].accumulator, exact["y"].rounded_to) == ("float32", "float16")
    assert (exact["dx"].accumulator, exact["dx"].rounded_to) == ("float32", "float16")


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


def test_error_ratio_beyond_the_floats_is_infinite() -> None:
    zeros = [np.array([0], object)]
    exact = Exact([zeros], zeros, zeros, 0, 2, 2, "float64", "float64")
    assert 0 < exact.bound(0, 0) < 1e-300
    assert error_of(np.array([1e300]), exact) == math.inf


def test_no_finite_error_is_wrong_where_the_bound_is_infinite() -> None:
    exact = exact_three()._replace(k=2048, terms=2048, accumulator="float16", rounded_to="float16")
    assert exact.bound(0, 0) == math.inf
    assert error_of(np.array([1e300]), exact) == 0
    assert error_of(np.array([np.nan]), exact) == math.inf


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
    native = Operand(values, "float32", layout).on(numpy_backend)
    assert native.shape == shape
    assert np.array_equal(numpy_backend.to_numpy(native), values)


def test_layouts_differ_in_memory(numpy_backend: Backend) -> None:
    values = np.ones((4, 3), "float32")
    on = {layout: Operand(values, "float32", layout).on(numpy_backend) for layout in [*LAYOUTS, "broadcast"]}
    assert on["C"].flags.c_contiguous
    assert on["Fortran"].flags.f_contiguous
    assert on["reversed"].strides == (-12, -4)
    assert on["strided"].strides == (24, 8)
    assert on["broadcast"].strides == (0, 4)
    assert not on["read-only"].flags.writeable


@settings(max_examples=100)
@given(st.one_of(cases(ALL), cases(ALL, values="floats"), large_cases(ALL)))
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


def test_case_without_a_bias_does_not_depend_on_its_dtype() -> None:
    dtypes: Any = ("float32", "float32", "float16", "float32")
    case = make_case((3, 2), 2, seed=0, values="floats", dtypes=dtypes, bias=False)
    again = eval(case.code, {"make_case": make_case})  # noqa: S307 - our own text
    assert np.array_equal(case.x.values, again.x.values)
