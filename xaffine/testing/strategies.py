"""Hypothesis strategies for cases: sizes 0 included, tensors, batch axes, dtypes, memory layouts."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from xaffine.testing.bounds import count_batch_axes
from xaffine.testing.cases import FEATURES, LAYOUTS, Case, largest_extent, make_case

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["cases", "extents", "large_cases"]

# Which dtypes meet in one call: any of one group.
_GROUPS: tuple[frozenset[str], ...] = (
    frozenset({"int8", "int16", "int32", "int64"}),
    frozenset({"uint8", "uint16", "uint32", "uint64"}),
    frozenset({"float16", "float32", "float64"}),
    frozenset({"bfloat16", "float32", "float64"}),
    frozenset({"complex64", "complex128"}),
)


@st.composite
def extents(draw: st.DrawFn, limit: int, *, smallest: int = 0, min_size: int = 0, max_size: int = 3) -> tuple[int, ...]:
    """Tuples of extents whose product is at most `limit`.

    Parameters
    ----------
    limit : int
        The largest product.
    smallest : int
        The smallest extent.
    min_size, max_size : int
        How many extents.

    Returns
    -------
    SearchStrategy of tuple of int
        Shapes.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(extents(12, min_size=2), lambda shape: 0 not in shape)
    (1, 1)
    """
    return _draw_extents(draw, limit, smallest, min_size, max_size)


def _draw_extents(draw: st.DrawFn, limit: int, smallest: int, min_size: int, max_size: int) -> tuple[int, ...]:
    """What `extents` draws, for use inside other strategies: Hypothesis takes long to make a composite one."""
    shape: list[int] = []
    room = limit
    for left in range(draw(st.integers(min_size, max_size)), 0, -1):
        # A fair share: without it the first extent would mostly leave room for nothing but ones.
        shape.append(_draw_extent(draw, smallest, int(room ** (1 / left))))
        room //= max(shape[-1], 1)
    return tuple(shape)


def _draw_extent(draw: st.DrawFn, smallest: int, largest: int) -> int:
    """Any extent, and 1 more often than its share: there many an implementation takes another way."""
    if largest >= 1 and draw(st.integers(0, 5)) == 5:
        return 1
    return draw(st.integers(smallest, max(largest, smallest)))


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: Sequence[str],
    *,
    values: str = "integers",
    max_extent: int = 24,
    mixed: bool = True,
    supports: Collection[str] = tuple(FEATURES),
    batch_axes: bool = True,
) -> Case:
    """Cases of one forward and backward.

    Parameters
    ----------
    dtypes : sequence of str
        The dtypes to draw from. Values "floats" takes the floating ones among them.
    values : {"integers", "units", "floats"}
        As in `xaffine.testing.make_case`.
    max_extent : int
        The largest N, n and m. Dtypes that hold few integers exactly get smaller ones.
    mixed : bool
        Whether x, W, b and dy may differ in dtype.
    supports : collection of str
        Which of `xaffine.testing.cases.FEATURES` to draw.
    batch_axes : bool
        Whether to draw every slice with its `n_batch_axes`, rather than the shapes in `supports` alone.

    Returns
    -------
    SearchStrategy of Case
        Small ones.

    Examples
    --------
    >>> from hypothesis import find
    >>> case = find(cases(["float32", "float64"]), lambda case: case.N > 1 and case.x.dtype != case.W.dtype)
    >>> case.N, case.y_dtype
    (2, 'float64')
    """
    floating = [dtype for dtype in dtypes if "int" not in dtype]
    names = _draw_dtypes(draw, floating if values == "floats" else dtypes, mixed=mixed)
    limit = min(max_extent, largest_extent(names, values))
    smallest = 0 if "empty" in supports else 1

    batch, features, n_batch_axes = _draw_shape(draw, limit, smallest, supports, batch_axes=batch_axes)
    # Square W and square y on purpose: there a forgotten transpose has the right shape.
    m = draw(st.sampled_from([-1, -1, math.prod(features), math.prod(batch)]))
    m = _draw_extent(draw, smallest, limit) if m < 0 else m
    return _draw_case(draw, (*batch, *features), m, supports, values=values, dtypes=names, n_batch_axes=n_batch_axes)


@st.composite
def large_cases(draw: st.DrawFn, dtypes: Sequence[str], *, supports: Collection[str] = tuple(FEATURES)) -> Case:
    """Cases whose extents lie at the edges of tiles, with tall, wide and deep ones among them.

    Parameters
    ----------
    dtypes : sequence of str
        The dtypes to draw from; one for all operands.
    supports : collection of str
        Which of `xaffine.testing.cases.FEATURES` to draw: here only "no-bias" counts.

    Returns
    -------
    SearchStrategy of Case
        Of values "units", in which all sums are exact, and at most 2²⁵ products.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(large_cases(["float32"]), lambda case: case.N % 64 and case.N > 64).N
    65
    """
    dtype = draw(st.sampled_from(list(dtypes)))
    limit = largest_extent([dtype], "units")
    shape, room = [1, 1, 1], 2**25
    for axis in draw(st.permutations(range(3))):
        shape[axis] = draw(st.sampled_from([e for e in _EDGES if e <= min(limit, room)]))
        room //= shape[axis]
    N, n, m = shape
    return _draw_case(draw, (N, n), m, supports, values="units", dtypes=dtype)


# One below, at and one above the usual widths of tiles and blocks, and the length of a long axis.
_EDGES = (1, 2, 3, *(2**i + d for i in (4, 5, 6, 7, 8, 9, 10, 12, 16) for d in (-1, 0, 1)))


# Of each form of x: the least and most batch extents, those of the features, and n_batch_axes.
_FORMS: dict[str, tuple[tuple[int, int] | None, tuple[int, int], int | None]] = {
    "matrix": ((1, 1), (1, 1), None),
    "vectors": (None, (1, 1), None),
    "tensors": ((1, 1), (2, 3), None),
    "last-axis": ((2, 3), (1, 1), -1),
}


def _draw_shape(
    draw: st.DrawFn, limit: int, smallest: int, supports: Collection[str], *, batch_axes: bool
) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """Batch extents, feature extents, and the n_batch_axes that tells them apart."""
    draw_extents = partial(_draw_extents, draw, limit, smallest)
    if batch_axes:
        batch = draw_extents(0, 3)
        features = draw_extents(0 if batch else 1, 3)
        ndim, k = len(batch) + len(features), len(batch)
        spellings: list[Any] = [k, *([k - ndim] if k < ndim else [])]
        if k == (0 if ndim == 1 else 1):
            spellings.append(None)
        return batch, features, draw(st.sampled_from(spellings))
    # Mostly matrices: a single vector exercises no sum over the batch.
    forms = ["matrix"] * 3 + [form for form in _FORMS if form == "matrix" or form in supports]
    batch_counts, feature_counts, n_batch_axes = _FORMS[draw(st.sampled_from(forms))]
    batch = draw_extents(*batch_counts) if batch_counts else ()
    return batch, draw_extents(*feature_counts), n_batch_axes


def _draw_case(draw: st.DrawFn, x_shape: tuple[int, ...], m: int, supports: Collection[str], **options: Any) -> Case:
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    batch = x_shape[: count_batch_axes(x_shape, options.get("n_batch_axes"))]
    # Stride 0 often: a dy from a sum has it, and few cases have the rows to show what it breaks.
    dy_layouts = (*LAYOUTS, *["broadcast"] * 3) if batch else LAYOUTS
    options["seed"] = draw(st.integers(0, 2**32 - 1))
    options["layouts"] = (*layouts, draw(st.sampled_from(dy_layouts)))
    options["bias"] = draw(st.booleans()) if "no-bias" in supports else True
    return make_case(x_shape, m, **options)


def _draw_dtypes(draw: st.DrawFn, dtypes: Sequence[str], *, mixed: bool) -> tuple[str, str, str, str]:
    first = draw(st.sampled_from(list(dtypes)))
    if not mixed or draw(st.sampled_from([True, True, False])):
        return (first,) * 4
    group = next(group for group in _GROUPS if first in group)
    others = st.sampled_from([dtype for dtype in dtypes if dtype in group])
    return first, draw(others), draw(others), draw(others)
