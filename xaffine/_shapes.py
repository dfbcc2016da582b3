"""The slice rule: which axes of x are batch and which are features, and the shapes that follow from it.

An extent that a lazy library does not know yet (``nan`` in Dask, ``None`` in ndonnx) fits every other.
"""

from __future__ import annotations

import math
from typing import Any

from xaffine.backends.standard import is_known

__all__ = ["matrix_shape", "shapes_differ", "size"]


def matrix_shape(shape: tuple[Any, ...], n_batch_axes: int) -> tuple[Any, Any] | None:
    """The shape of an array as a matrix, its batch axes as rows and its features as columns; None if it has it."""
    if len(shape) == 2 and n_batch_axes == 1:
        return None
    return size(shape[:n_batch_axes]), size(shape[n_batch_axes:])


def size(extents: tuple[Any, ...]) -> int | None:
    """The product of some extents, None if one is unknown."""
    return math.prod(extents) if all(map(is_known, extents)) else None


def shapes_differ(shape: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    """Whether two shapes cannot be the same."""
    return shape != expected and (len(shape) != len(expected) or any(map(_differ, shape, expected)))


def _differ(extent: Any, expected: Any) -> bool:
    return is_known(extent) and is_known(expected) and extent != expected
