"""Hypothesis strategies for cases: sizes 0 included, tensors, batch axes, dtypes, memory layouts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from xaffine.testing.cases import LAYOUTS, Case, largest_extent, make_case

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["cases", "extents"]

# Which dtypes meet in one call: any of one group.
_GROUPS: tuple[frozenset[str], ...] = (
    frozenset({"int8", "int16", "int32", "int64"}),
    frozenset({"uint8", "uint16", "uint32", "uint64"}),
    frozenset({"float16", "float32", "float64"}),
    frozenset({"bfloat16", "float32", "float64"}),
    frozenset({"complex64", "complex128"}),
)


def extents(limit: int, *, min_size: int = 0, max_size: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Tuples of extents, 0 included, whose product is at most `limit`.

    Parameters
    ----------
    limit : int
        The largest product.
    min_size, max_size : int
        How many extents.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(extents(12, min_size=2), lambda shape: 0 not in shape)
    (1, 1)
    """

    @st.composite
    def draw_extents(draw: st.DrawFn) -> tuple[int, ...]:
        shape: list[int] = []
        room = limit
        for left in range(draw(st.integers(min_size, max_size)), 0, -1):
            # A fair share: without it the first extent would mostly leave room for nothing but ones.
            shape.append(draw(st.integers(0, int(room ** (1 / left)))))
            room //= max(shape[-1], 1)
        return tuple(shape)

    return draw_extents()


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: Sequence[str],
    *,
    values: str = "integers",
    max_extent: int = 24,
    mixed: bool = True,
) -> Case:
    """Cases of one forward and backward.

    Parameters
    ----------
    dtypes : sequence of str
        The dtypes to draw from. Values "floats" takes the floating ones among them.
    values : {"integers", "floats"}
        As in `xaffine.testing.cases.make_case`.
    max_extent : int
        The largest N, n and m. Dtypes that hold few integers exactly get smaller ones.
    mixed : bool
        Whether x, W, b and dy may differ in dtype.

    Returns
    -------
    SearchStrategy of Case

    Examples
    --------
    >>> from hypothesis import find
    >>> case = find(cases(["float32", "float64"]), lambda case: case.N > 1 and case.x.dtype != case.W.dtype)
    >>> case.N, case.y_dtype
    (2, 'float64')
    """
    if values == "floats":
        dtypes = [dtype for dtype in dtypes if not dtype.startswith(("int", "uint"))]
    names = _draw_dtypes(draw, dtypes, mixed=mixed)
    limit = min(max_extent, largest_extent(names))

    batch = draw(extents(limit))
    features = draw(extents(limit, min_size=0 if batch else 1))
    ndim, k = len(batch) + len(features), len(batch)
    spellings: list[Any] = [k, *([k - ndim] if k < ndim else [])]
    if k == (0 if ndim == 1 else 1):
        spellings.append(None)

    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    dy_layouts = (*LAYOUTS, "broadcast") if batch else LAYOUTS
    case = make_case(
        batch,
        features,
        # Square W and square y on purpose: there a forgotten transpose has the right shape.
        draw(st.one_of(st.integers(0, limit), st.just(math.prod(features)), st.just(math.prod(batch)))),
        seed=draw(st.integers(0, 2**32 - 1)),
        values=values,
        dtypes=names,
        layouts=(*layouts, draw(st.sampled_from(dy_layouts))),  # type: ignore[arg-type]
        bias=draw(st.sampled_from([True, False])),
    )
    return replace(case, n_batch_axes=draw(st.sampled_from(spellings)))


def _draw_dtypes(draw: st.DrawFn, dtypes: Sequence[str], *, mixed: bool) -> tuple[str, str, str, str]:
    first = draw(st.sampled_from(list(dtypes)))
    if not mixed or draw(st.sampled_from([True, True, False])):
        return (first,) * 4
    group = next(group for group in _GROUPS if first in group)
    others = st.sampled_from([dtype for dtype in dtypes if dtype in group])
    return first, draw(others), draw(others), draw(others)
