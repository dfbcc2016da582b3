"""Strategies: what they draw, and that it stays within their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from xaffine.testing import Case, bounds
from xaffine.testing.strategies import cases, extents, large_cases

ALL = (
    "float16", "float32", "float64", "bfloat16", "complex64", "complex128",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
)  # fmt: skip
# What must be among the cases, however they are drawn.
WANTED: dict[str, Callable[[Case], bool]] = {
    "an empty batch": lambda case: case.N == 0,
    "no input features": lambda case: case.W.values.shape[0] == 0,
    "no output features": lambda case: case.W.values.shape[1] == 0,
    "a single sample": lambda case: case.batch == (),
    "two batch axes and two of features": lambda case: (
        len(case.batch) == 2 and case.N > 1 and case.x.values.ndim == 4 and case.W.values.size > 1
    ),
    "the default n_batch_axes": lambda case: case.n_batch_axes is None,
    "a negative n_batch_axes": lambda case: case.n_batch_axes is not None and case.n_batch_axes < 0,
    "no bias": lambda case: case.b is None,
    "mixed dtypes": lambda case: case.x.dtype != case.W.dtype,
    "a dy of stride 0": lambda case: case.dy.layout == "broadcast" and case.N > 1,
    "a W in Fortran order": lambda case: case.W.layout == "Fortran",
    "large N and m": lambda case: case.N > 20 and case.W.values.shape[1] > 20,
    **{dtype: lambda case, dtype=dtype: case.x.dtype == dtype for dtype in ALL},
}


@pytest.fixture(scope="module")
def drawn() -> list[Case]:
    """The first cases that a run draws."""
    found: list[Case] = []

    @settings(max_examples=1000, phases=[Phase.generate])
    @given(cases(ALL))
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


@pytest.mark.parametrize("wanted", WANTED)
def test_a_thousand_cases_have(drawn: list[Case], wanted: str) -> None:
    assert any(map(WANTED[wanted], drawn))


@given(st.data(), st.integers(0, 30))
def test_extents_multiply_to_at_most_the_limit(data: Any, limit: int) -> None:
    assert math.prod(data.draw(extents(limit))) <= max(limit, 1)


@settings(max_examples=60)  # a large case takes a tenth of a second to draw
@given(large_cases(ALL))
def test_large_cases_are_exact_in_every_order(case: Any) -> None:
    """The most that a sum of units can be, with a bias, is an integer that the dtype holds without a gap before it."""
    N, n = case.x.values.shape
    terms = 2 if np.iscomplexobj(case.x.values) else 1
    assert terms * max(N, n, case.W.values.shape[1]) + 1 <= bounds.exact_integers(case.y_dtype)
    assert max(np.abs(o.values.real).max() for o in (case.x, case.W, case.dy)) <= 1
    assert case.kind == "units"
