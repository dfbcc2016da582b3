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

__all__ = ["cases", "extents", "large_cases", "long_cases"]

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
    layouts: Sequence[str] = (*LAYOUTS, "broadcast"),
    batch_axes: bool = True,
    bias: bool = True,
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
    layouts : sequence of str
        Which of `xaffine.testing.cases.LAYOUTS` to draw, and "broadcast" for dy.
    batch_axes : bool
        Whether to draw every slice with its `n_batch_axes`, rather than the shapes in `supports` alone.
    bias : bool
        Whether to draw any b.

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
    smallest = "no-outputs" not in supports

    batch, features, n_batch_axes = _draw_shape(draw, limit, supports, batch_axes=batch_axes)
    # Square W and square y on purpose: there a forgotten transpose has the right shape.
    m = draw(st.sampled_from([-1, -1, math.prod(features), math.prod(batch)]))
    m = _draw_extent(draw, smallest, limit) if m < smallest else m
    options: Any = {"values": values, "dtypes": names, "n_batch_axes": n_batch_axes, "bias": bias}
    return _draw_case(draw, (*batch, *features), m, supports, layouts, **options)


@st.composite
def large_cases(
    draw: st.DrawFn,
    dtypes: Sequence[str],
    *,
    supports: Collection[str] = tuple(FEATURES),
    layouts: Sequence[str] = (*LAYOUTS, "broadcast"),
    bias: bool = True,
) -> Case:
    """Cases whose extents lie at the edges of tiles, with tall, wide and deep ones among them.

    Parameters
    ----------
    dtypes : sequence of str
        The dtypes to draw from; one for all operands.
    supports : collection of str
        Which of `xaffine.testing.cases.FEATURES` to draw: here "no-bias" counts, and "matrices", since without it x
        is mapped along its last axis.
    layouts, bias
        As in `cases`.

    Returns
    -------
    SearchStrategy of Case
        Of values "units", in which all sums are exact, and at most 2²² products.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(large_cases(["float32"]), lambda case: case.N % 64 and case.N > 64).N
    65
    """
    dtype = draw(st.sampled_from(list(dtypes)))
    limit = largest_extent([dtype], "units")
    shape, room = [1, 1, 1], 2**22
    for axis in draw(st.permutations(range(3))):
        shape[axis] = draw(st.sampled_from([e for e in _EDGES if e <= min(limit, room)]))
        room //= shape[axis]
    N, n, m = shape
    x_shape, k = _large_form(N, n, supports)
    return _draw_case(draw, x_shape, m, supports, layouts, values="units", dtypes=dtype, n_batch_axes=k, bias=bias)


def long_cases(dtypes: Sequence[str], supports: Collection[str], *, bias: bool = True) -> list[Case]:
    """Cases that have each axis as long as `large_cases` draws it, and one with three of medium length: few drawn do.

    Parameters
    ----------
    dtypes : sequence of str
        The one that holds the most integers is that of all operands.
    supports, bias
        As in `large_cases`.

    Returns
    -------
    list of Case
        One of medium length, one for N, one for n, and one for m.

    Examples
    --------
    >>> [(case.N, *case.W.values.shape) for case in long_cases(["float16", "float32"], {"matrices"})]
    [(129, 130, 131), (65537, 3, 3), (3, 65537, 3), (3, 3, 65537)]
    """
    limit, dtype = max((largest_extent([dtype], "units"), dtype) for dtype in dtypes)
    long = max(extent for extent in _EDGES if extent <= limit)
    long_cases = []
    medium = [min(extent, limit) for extent in (129, 130, 131)]
    for N, n, m in (medium, (long, 3, 3), (3, long, 3), (3, 3, long)):
        x_shape, k = _large_form(N, n, supports)
        long_cases.append(make_case(x_shape, m, seed=0, values="units", dtypes=dtype, n_batch_axes=k, bias=bias))
    return long_cases


def _large_form(N: int, n: int, supports: Collection[str]) -> tuple[tuple[int, ...], int | None]:
    return ((N, n), None) if "matrices" in supports else ((1, N, n), -1)


# One below, at and one above the usual widths of tiles and blocks, and the length of a long axis.
_EDGES = (1, 2, 3, *(2**i + d for i in (4, 5, 6, 7, 8, 9, 10, 12, 16) for d in (-1, 0, 1)))


# Of each form of x: the least and most batch extents, those of the features, and n_batch_axes.
_FORMS: dict[str, tuple[tuple[int, int] | None, tuple[int, int], int | None]] = {
    "matrices": ((1, 1), (1, 1), None),
    "vectors": (None, (1, 1), None),
    "tensors": ((1, 1), (2, 3), None),
    "last-axis": ((2, 3), (1, 1), -1),
}


def _draw_shape(
    draw: st.DrawFn, limit: int, supports: Collection[str], *, batch_axes: bool
) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """Batch extents, feature extents, and the n_batch_axes that tells them apart."""
    draw_batch, draw_features = (
        partial(_draw_extents, draw, limit, name not in supports) for name in ("no-samples", "no-features")
    )
    if batch_axes:
        batch = draw_batch(0, 3)
        features = draw_features(0 if batch else 1, 3)
        ndim, k = len(batch) + len(features), len(batch)
        spellings: list[Any] = [k, *([k - ndim] if k < ndim else [])]
        if k == (0 if ndim == 1 else 1):
            spellings.append(None)
        return batch, features, draw(st.sampled_from(spellings))
    # Mostly matrices: a single vector exercises no sum over the batch.
    forms = [form for form in _FORMS if form in supports]
    forms += ["matrices"] * 3 * ("matrices" in supports)
    batch_counts, feature_counts, n_batch_axes = _FORMS[draw(st.sampled_from(forms))]
    batch, features = (
        () if counts is None else draw_some(counts[0], counts[1] if "four-axes" in supports else min(counts[1], 2))
        for draw_some, counts in ((draw_batch, batch_counts), (draw_features, feature_counts))
    )
    return batch, features, n_batch_axes


def _draw_case(
    draw: st.DrawFn, x_shape: tuple[int, ...], m: int, supports: Collection[str], layouts: Sequence[str], **options: Any
) -> Case:
    for_all = [layout for layout in layouts if layout != "broadcast"]
    batch = x_shape[: count_batch_axes(x_shape, options["n_batch_axes"])]
    # Stride 0 often: a dy from a sum has it, and few cases have the rows to show what it breaks.
    for_dy = [*for_all, *["broadcast"] * (3 if batch and "broadcast" in layouts else 0)]
    options["seed"] = draw(st.integers(0, 2**32 - 1))
    options["layouts"] = tuple(draw(st.sampled_from(some)) for some in (for_all, for_all, for_all, for_dy))
    options["bias"] = options["bias"] and ("no-bias" not in supports or draw(st.booleans()))
    return make_case(x_shape, m, **options)


def _draw_dtypes(draw: st.DrawFn, dtypes: Sequence[str], *, mixed: bool) -> tuple[str, str, str, str]:
    first = draw(st.sampled_from(list(dtypes)))
    if not mixed or draw(st.sampled_from([True, True, False])):
        return (first,) * 4
    group = next(group for group in _GROUPS if first in group)
    others = st.sampled_from([dtype for dtype in dtypes if dtype in group])
    return first, draw(others), draw(others), draw(others)
