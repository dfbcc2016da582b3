"""The proof's own tools: exact arithmetic, bounds, layouts, strategies."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from xaffine.backends import Backend
from xaffine.testing import bounds, cases, make_case
from xaffine.testing.cases import LAYOUTS, Exact, error_ratio
from xaffine.testing.strategies import cases as draw_cases
from xaffine.testing.strategies import extents

pytestmark = pytest.mark.once

FLOATS = ("float16", "float32", "float64", "bfloat16", "complex64", "complex128")
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
    bound = bounds.rounding_bound(exact, exact, 1, "float32", "float32")
    assert u < bound < u * (1 + 3 * u) + 2 * bounds.smallest_normal("float32") + u * u


def test_a_cast_adds_its_own_rounding() -> None:
    one = Fraction(1)
    narrow = bounds.rounding_bound(one, one, 3, "float64", "float32")
    wide = bounds.rounding_bound(one, one, 3, "float64", "float64")
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
        for part, own in zip(expected[name], value.value, strict=False):
            assert [Fraction(v, 2**value.scale) for v in own.ravel()] == part.ravel().tolist()


def exact_three(k: int = 2) -> Exact:
    return Exact(np.array([[3]], object), np.array([[3]], object), 0, k, "float32", "float32")


def test_error_ratio_is_the_fraction_of_the_bound() -> None:
    bound = bounds.rounding_bound(Fraction(3), Fraction(3), 2, "float32", "float32")
    assert error_ratio(np.array([3.0]), exact_three()) == 0
    off = np.array([3.0 + 2.0**-22])
    assert error_ratio(off, exact_three()) == float(Fraction(2) ** -22 / bound)
    assert 0 < error_ratio(off, exact_three()) < 1 < error_ratio(np.array([3.0 + 2.0**-20]), exact_three())


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_error_ratio_of_what_is_not_finite_is_infinite(wrong: float) -> None:
    assert error_ratio(np.array([wrong]), exact_three()) == math.inf


def test_error_ratio_of_any_error_is_infinite_where_none_is_allowed() -> None:
    assert error_ratio(np.array([np.nextafter(3.0, 4)]), exact_three(k=0)) == math.inf


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_cases_hold_values_of_their_dtype(dtype: str) -> None:
    case = make_case((7,), (5,), 3, seed=0, values="floats", dtypes=dtype)
    parts = np.stack([case.x.values.real, case.x.values.imag]).astype(np.float64)
    significands, _ = np.frexp(parts)
    bits = -int(math.log2(bounds.unit_roundoff(dtype)))
    assert np.all(np.ldexp(significands, bits) % 1 == 0)
    assert np.any(np.ldexp(significands, bits - 1) % 1 != 0)  # and use all of its bits
    assert np.any(parts == 0)
    assert np.any(parts != 0)


@pytest.mark.parametrize("layout", [*LAYOUTS, "broadcast"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (6,), (0, 3), (3, 0)])
def test_layouts_keep_the_values(backend: Backend, layout: str, shape: Any) -> None:
    values = np.arange(math.prod(shape), dtype="float32").reshape(shape)
    if layout == "broadcast":
        values = np.broadcast_to(values[:1], shape)
    native = cases.Operand(values, "float32", layout).on(backend)
    assert native.shape == shape
    assert np.array_equal(backend.to_numpy(native), values)


def test_layouts_differ_in_memory(backend: Backend) -> None:
    values = np.ones((4, 3), "float32")
    on = {layout: cases.Operand(values, "float32", layout).on(backend) for layout in [*LAYOUTS, "broadcast"]}
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


def test_cases_print_what_matters() -> None:
    case = make_case((2,), (3,), 4, seed=7, bias=False)
    assert repr(case) == (
        "Case(x=float32[2, 3] C, W=float32[3, 4] C, b=None, dy=float32[2, 4] C, n_batch_axes=1, seed=7)"
    )
