"""Hypothesis strategies for cases: sizes 0 included, tensors, batch axes, dtypes, memory layouts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

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


def extents(
    limit: int, *, smallest: int = 0, min_size: int = 0, max_size: int = 3
) -> st.SearchStrategy[tuple[int, ...]]:
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
    return _extents(limit, smallest, min_size, max_size)


def _draw_extents(draw: st.DrawFn, limit: int, smallest: int, min_size: int, max_size: int) -> tuple[int, ...]:
    """What `extents` draws, for use inside other strategies: Hypothesis takes long to make a composite one."""
    shape: list[int] = []
    room = limit
    for left in range(draw(st.integers(min_size, max_size)), 0, -1):
        # A fair share: without it the first extent would mostly leave room for nothing but ones.
        shape.append(_draw_extent(draw, smallest, int(room ** (1 / left))))
        room //= max(shape[-1], 1)
    return tuple(shape)


_extents = st.composite(_draw_extents)


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
    names = _draw_dtypes(draw, _of_kind(dtypes, values), mixed=mixed)
    limit = min(max_extent, largest_extent(names, values))
    smallest = 0 if "empty" in supports else 1

    batch, features, n_batch_axes = _draw_shape(draw, limit, smallest, supports, batch_axes=batch_axes)
    # Square W and square y on purpose: there a forgotten transpose has the right shape.
    m = draw(st.sampled_from([-1, -1, math.prod(features), math.prod(batch)]))
    m = _draw_extent(draw, smallest, limit) if m < 0 else m
    return _draw_case(draw, (*batch, *features), m, n_batch_axes, values, names, supports)


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
    return _draw_case(draw, (N, n), m, None, "units", (dtype,) * 4, supports)


# One below, at and one above the usual widths of tiles and blocks, and the length of a long axis.
_EDGES = (1, 2, 3, *(2**i + d for i in (4, 5, 6, 7, 8, 9, 10, 12, 16) for d in (-1, 0, 1)))


def _draw_shape(
    draw: st.DrawFn, limit: int, smallest: int, supports: Collection[str], *, batch_axes: bool
) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """Batch extents, feature extents, and the n_batch_axes that tells them apart."""
    # Mostly matrices: a single vector exercises no sum over the batch.
    forms = [*["matrix"] * 4, *(form for form in ("vectors", "tensors", "last-axis") if form in supports)]
    form = "any" if batch_axes else draw(st.sampled_from(forms))

    def draw_extents(min_size: int, max_size: int) -> tuple[int, ...]:
        return _draw_extents(draw, limit, smallest, min_size, max_size)

    if form == "any":
        batch = draw_extents(0, 3)
        features = draw_extents(0 if batch else 1, 3)
        ndim, k = len(batch) + len(features), len(batch)
        spellings: list[Any] = [k, *([k - ndim] if k < ndim else [])]
        if k == (0 if ndim == 1 else 1):
            spellings.append(None)
        return batch, features, draw(st.sampled_from(spellings))
    if form == "vectors":
        return (), draw_extents(1, 1), None
    if form == "tensors":
        return draw_extents(1, 1), draw_extents(2, 3), None
    if form == "last-axis":
        return draw_extents(2, 3), draw_extents(1, 1), -1
    return draw_extents(1, 1), draw_extents(1, 1), None


def _draw_case(
    draw: st.DrawFn,
    x_shape: tuple[int, ...],
    m: int,
    n_batch_axes: int | None,
    values: str,
    dtypes: tuple[str, str, str, str],
    supports: Collection[str],
) -> Case:
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    has_batch = len(x_shape) > 1 if n_batch_axes is None else n_batch_axes != 0 and n_batch_axes != -len(x_shape)
    # Stride 0 often: a dy from a sum has it, and few cases have the rows to show what it breaks.
    dy_layouts = (*LAYOUTS, *["broadcast"] * 3) if has_batch else LAYOUTS
    return make_case(
        x_shape,
        m,
        seed=draw(st.integers(0, 2**32 - 1)),
        values=values,
        dtypes=dtypes,
        layouts=(*layouts, draw(st.sampled_from(dy_layouts))),  # type: ignore[arg-type]
        bias=draw(st.booleans()) if "no-bias" in supports else True,
        n_batch_axes=n_batch_axes,
    )


def _of_kind(dtypes: Sequence[str], values: str) -> list[str]:
    return [dtype for dtype in dtypes if values != "floats" or not dtype.startswith(("int", "uint"))]


def _draw_dtypes(draw: st.DrawFn, dtypes: Sequence[str], *, mixed: bool) -> tuple[str, str, str, str]:
    first = draw(st.sampled_from(list(dtypes)))
    if not mixed or draw(st.sampled_from([True, True, False])):
        return (first,) * 4
    group = next(group for group in _GROUPS if first in group)
    others = st.sampled_from([dtype for dtype in dtypes if dtype in group])
    return first, draw(others), draw(others), draw(others)
