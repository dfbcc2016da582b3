"""Extents that a lazy library does not know, and what checks say, with stand-ins so that no such library is needed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from xaffine import _checks, backends
from xaffine._shapes import matrix_shape, shapes_differ, size
from xaffine.backends import Backend


class Lazy:
    """An array that knows part of its shape."""

    dtype = "float32"

    def __init__(self, *shape: Any) -> None:
        self.shape = shape
        self.ndim = len(shape)


class Reshapes(Backend):
    """A library that reshapes lazy arrays, as ndonnx does."""

    class xp:  # noqa: N801 - its namespace
        @staticmethod
        def reshape(_: Lazy, shape: Any) -> Lazy:
            return Lazy(*shape)


class Refuses(Backend):
    """A library that does not, as Dask."""

    class xp:  # noqa: N801 - its namespace
        @staticmethod
        def reshape(*_: Any) -> Lazy:
            raise ValueError("cannot convert float NaN to integer")


def as_matrix(backend: Backend, array: Lazy, n_batch_axes: int) -> Any:
    return backend.as_matrix(array, matrix_shape(array.shape, n_batch_axes), array.dtype)


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_an_unknown_batch_is_inferred(unknown: Any) -> None:
    assert as_matrix(Reshapes(), Lazy(unknown, 2, 3), 1).shape == (-1, 6)
    assert Reshapes().reshape(Lazy(unknown, 6), (unknown, 2, 3)).shape == (-1, 2, 3)


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_a_matrix_with_unknown_rows_is_left_as_it_is(unknown: Any) -> None:
    matrix = Lazy(unknown, 6)
    assert as_matrix(Refuses(), matrix, 1) is matrix


def test_what_cannot_be_inferred_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"\(\?, 2, 3\) cannot be reshaped to \(\?, 6\).*compute_chunk_sizes"):
        as_matrix(Refuses(), Lazy(math.nan, 2, 3), 1)


@pytest.mark.parametrize("shape", [(None, 0, 3), (None, None, 3), (0, math.nan), (math.nan, math.nan)])
def test_what_is_ambiguous_is_not_guessed(shape: Any) -> None:
    with pytest.raises(ValueError, match="before its unknown extents"):
        Reshapes().reshape(Lazy(None, 3), shape)


@pytest.mark.parametrize(
    ("shape", "n_batch_axes", "matrix"),
    [
        ((2, 3), 1, None), ((2, 3), 0, (1, 6)), ((2, 3), 2, (6, 1)), ((6,), 0, (1, 6)), ((6,), 1, (6, 1)),
        ((2, 3, 4), 1, (2, 12)), ((2, 3, 4), 2, (6, 4)), ((0, 3, 4), 1, (0, 12)), ((2, 0, 4), 1, (2, 0)),
        ((None, 3), 1, None), ((math.nan, 3, 4), 2, (None, 4)), ((2, None, 4), 1, (2, None)),
    ],
)  # fmt: skip
def test_an_array_is_a_matrix_of_its_batch_and_its_features(shape: Any, n_batch_axes: int, matrix: Any) -> None:
    assert matrix_shape(shape, n_batch_axes) == matrix


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_an_unknown_extent_fits_every_other(unknown: Any) -> None:
    assert size((2, unknown)) is None
    assert size((2, 3)) == 6
    for shape in ((2, unknown), (unknown, 3), (unknown, unknown), (2, 3)):
        assert not shapes_differ(shape, (2, 3))
        assert not shapes_differ((2, 3), shape)
        for other in ((2, 3, 1), (2,), ()):
            assert shapes_differ(shape, other)
    assert shapes_differ((2, unknown), (3, 3))
    assert shapes_differ((2, 3), (2, 1))


def test_reason_why_an_array_is_no_operand_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch has one for nested tensors."""
    x, W, b, dy = np.ones((2, 3)), np.ones((3, 4)), np.ones(4), np.ones((2, 4))
    kind, refused = type(backends.backend_of(W)), []
    monkeypatch.setattr(backends.backend_of(x), "plans", {})

    def check_operands(_: Any, **operands: Any) -> None:
        for name, array in operands.items():
            if any(array is each for each in refused):
                raise TypeError(f"not {name}")

    monkeypatch.setattr(kind, "check_operands", check_operands)
    plan = _checks.check(x, W, b, None)
    backends.backend_of(x).plans.clear()
    for name, array in {"x": x, "W": W, "b": b}.items():
        refused[:] = [array]
        with pytest.raises(TypeError, match=f"^not {name}$"):
            _checks.check(x, W, b, None)
    refused[:] = [dy]
    with pytest.raises(TypeError, match=r"^not dy$"):
        _checks.check_cotangent(plan, dy, x, W, b)
    with pytest.raises(TypeError, match=r"^not out$"):
        _checks.check_out(plan, dy, x, W, b)


def test_parameters_are_of_one_kind() -> None:
    with pytest.raises(TypeError, match="the dtypes must be of one kind"):
        _checks.check_parameters(np.ones((2, 3)), np.ones(3, int))


def test_why_dtypes_do_not_promote_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def promote(*_: Any) -> Any:
        raise TypeError("not these\n  two")

    x, W = np.ones((2, 3), "float32"), np.ones((3, 4))
    backend = backends.backend_of(x)
    monkeypatch.setattr(backend, "plans", {})
    monkeypatch.setattr(type(backend), "promote", promote)
    with pytest.raises(TypeError, match=r"no common dtype of the same kind .* \(not these two\)\. Cast"):
        _checks.check(x, W, None, None)
