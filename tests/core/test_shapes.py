"""Extents that a lazy library does not know, and what checks say, with stand-ins so that no such library is needed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xaffine import shapes


class Lazy:
    """An array that knows part of its shape."""

    def __init__(self, *shape: Any) -> None:
        self.shape = shape
        self.ndim = len(shape)


class Reshapes:
    """A namespace that reshapes lazy arrays, as ndonnx does."""

    @staticmethod
    def reshape(_: Lazy, shape: Any) -> Lazy:
        return Lazy(*shape)


class Refuses:
    """A namespace that does not, as Dask."""

    @staticmethod
    def reshape(*_: Any) -> Lazy:
        raise ValueError("cannot convert float NaN to integer")


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_an_unknown_batch_is_inferred(unknown: Any) -> None:
    flat: Any = shapes.flatten(Reshapes, Lazy(unknown, 2, 3), 1)
    assert flat.shape == (-1, 6)
    back: Any = shapes.restore(Reshapes, Lazy(unknown, 6), (unknown, 2, 3), 1)
    assert back.shape == (-1, 2, 3)


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_a_matrix_with_unknown_rows_is_left_as_it_is(unknown: Any) -> None:
    matrix = Lazy(unknown, 6)
    assert shapes.flatten(Refuses, matrix, 1) is matrix
    assert shapes.restore(Refuses, matrix, (unknown, 6), 1) is matrix


def test_what_cannot_be_inferred_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"\(\?, 2, 3\) cannot be reshaped to \(\?, 6\).*compute_chunk_sizes"):
        shapes.flatten(Refuses, Lazy(math.nan, 2, 3), 1)


@pytest.mark.parametrize("shape", [(None, 0, 3), (None, None, 3)])
def test_what_is_ambiguous_is_not_guessed(shape: Any) -> None:
    with pytest.raises(ValueError, match="before its unknown extents"):
        shapes.restore(Reshapes, Lazy(None, 3), shape, 1)


def test_lazy_arrays_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    for question in ("is_writeable_array", "is_dask_array"):
        monkeypatch.setattr(f"array_api_compat.{question}", lambda _: True)
    assert shapes.is_writable(Lazy(None, 3))  # which a probe could not write to


def test_nested_tensors_are_named() -> None:
    nested = SimpleNamespace(is_nested=True)
    words = r"^x and W must have one extent along each axis, and x is a nested tensor\. .* torch\.cat\(x\.unbind\(\)\)$"
    with pytest.raises(TypeError, match=words):
        shapes.check(nested, nested, None, None)


def test_parameters_are_of_one_kind() -> None:
    with pytest.raises(TypeError, match="the dtypes must be of one kind"):
        shapes.check_parameters(np.ones((2, 3)), np.ones(3, int))


def test_why_dtypes_do_not_promote_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def promote(*_: Any) -> Any:
        raise TypeError("not these\n  two")

    monkeypatch.setattr(shapes, "promote", promote)
    with pytest.raises(TypeError, match=r"no common dtype of the same kind .* \(not these two\)\. Cast"):
        shapes.check(np.ones((2, 3), "float32"), np.ones((3, 4)), None, None)
