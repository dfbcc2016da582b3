"""The kernel for Dask: one task a block of rows, in which the kernel of the block's own library runs.

The products of the standard take three tasks a block for y, and two trees of sums for dW and db. Here a block of y is
one task; so is [dW; db] of a block, and one tree adds these up, a few at a time, so that never many of them are held.
Where the features are chunked, too, or not known yet, the standard's products are taken.
"""

from __future__ import annotations

import math
import operator
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, TypeAlias

import dask.array as da
import numpy as np

from xaffine.backends import is_half, namespace_of
from xaffine.kernels import kernel_of, standard

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from xaffine.backends import Array

    Buffers: TypeAlias = tuple[da.Array | None, da.Array | None, da.Array | None]

__all__ = ["backward", "chunked_as", "forward"]


def forward(x: da.Array, W: da.Array, b: da.Array | None, out: da.Array | None = None) -> da.Array:  # noqa: ARG001 - lazy
    """y = x W + b."""
    if not _has_whole_rows(x, W):
        return standard.forward(x, W, b)
    bias = () if b is None else (b.rechunk({0: W.chunks[1]}), "j")
    return _blocks(_y, "ij", x, "ik", W.rechunk({0: -1}), "kj", *bias, dtype=x.dtype, meta=x._meta)


def backward(
    dy: da.Array,
    x: da.Array,
    W: da.Array,
    wanted: Collection[str],
    out: Buffers = (None, None, None),  # noqa: ARG001 - lazy
) -> Buffers:
    """dx = dy Wᵀ, dW = xᵀ dy and db = Σ over the batch of dy."""
    dy = chunked_as(x, dy)
    if not _has_whole_rows(x, W, dy):
        dx, dW, _ = standard.backward(dy, x, W, [name for name in wanted if name != "b"])
        return dx, dW, _total(dy, None, 1, with_b=True)[0] if "b" in wanted else None
    dx = dW = db = None
    if "x" in wanted and dy.numblocks[1] == 1:
        dx = _blocks(_dx, "ik", dy, "ij", W.rechunk(-1), "kj", dtype=dy.dtype, meta=x._meta)
    elif "x" in wanted:
        dx = standard.backward_x(dy, W)
    if "W" in wanted or "b" in wanted:
        n, with_b = (W.shape[0] if "W" in wanted else 0), "b" in wanted
        total = _total(dy, x if "W" in wanted else None, n + with_b, with_b=with_b)
        dW = total[:n] if "W" in wanted else None
        db = total[n] if with_b else None
    return dx, dW, db


_blocks: Callable[..., da.Array] = partial(da.blockwise, align_arrays=False)


def _has_whole_rows(x: da.Array, W: da.Array, dy: da.Array | None = None) -> bool:
    """Whether a block has all features of its rows, and all extents are known but the number of rows."""
    extents = (*x.shape[1:], *W.shape, *(() if dy is None else dy.shape[1:]))
    return x.numblocks[1] == 1 and not math.isnan(sum(extents))


def chunked_as(x: da.Array, dy: da.Array) -> da.Array:
    """The rows of dy in the blocks of x; where their numbers are unknown, they are compared once they are not."""
    if not math.isnan(x.shape[0]) and not math.isnan(dy.shape[0]):
        return dy.rechunk({0: x.chunks[0]})
    if x.numblocks[0] != dy.numblocks[0]:
        msg = (
            f"x has {x.numblocks[0]} blocks along the batch and dy {dy.numblocks[0]}, of sizes that are not known "
            f"yet. Compute dy from y block by block, or find the sizes first: array.compute_chunk_sizes()"
        )
        raise ValueError(msg)
    rest = "jk"[: dy.ndim - 1]
    empty = x[:, :0], "ilm"[: x.ndim]
    return _blocks(_alike, f"i{rest}", *empty, dy, f"i{rest}", concatenate=True, dtype=dy.dtype, meta=dy._meta)


def _total(dy: da.Array, x: da.Array | None, rows: int, *, with_b: bool) -> da.Array:
    """[dW; db], as far as wanted: that of each block, and a tree that adds them up."""
    wide = np.dtype("float32") if is_half(dy.dtype) else dy.dtype
    features: tuple[Any, ...] = () if x is None else (x, "ik")
    parts = _blocks(
        partial(_sums, with_b=with_b, dtype=wide), "ikj", dy, "ij", *features, new_axes=None if features else {"k": 1},
        adjust_chunks={"i": 1, "k": rows}, dtype=wide, meta=dy._meta[None, ...].astype(wide),
    )  # fmt: skip
    total = da.reduction(parts, _same, _add, axis=0, dtype=wide, concatenate=False, meta=dy._meta.astype(wide))
    return total.astype(dy.dtype)


# An index that is summed over comes as a list of its blocks, of which there is one; Dask would join them in a copy.
def _y(x: list[Array], W: list[Array], b: Array | None = None) -> Array:
    return kernel_of(x[0], W[0]).forward(x[0], W[0], b)


def _dx(dy: list[Array], W: list[Array]) -> Array:
    return kernel_of(dy[0], W[0]).forward(dy[0], namespace_of(W[0]).matrix_transpose(W[0]), None)


def _alike(x: Array, dy: Array) -> Array:
    """A block of dy, which has as many rows as that of x."""
    if len(x) != len(dy):
        msg = (
            f"a block of x has {len(x)} rows and that of dy {len(dy)}: the sizes were unknown until now. "
            f"Compute dy from y block by block"
        )
        raise ValueError(msg)
    return dy


def _sums(dy: Array, x: Array | None = None, *, with_b: bool, dtype: Any) -> Array:
    """[dW; db] of one block, as far as wanted, in a dtype in which many of them can be added up."""
    xp = namespace_of(dy)
    dy, x = (xp.astype(array, dtype, copy=False) for array in (dy, dy[:, :0] if x is None else x))
    like_W = xp.broadcast_to(xp.zeros((1, 1), dtype=dtype), (x.shape[1], dy.shape[1]))  # without dx, its shape is all
    _, dW, db = kernel_of(dy, x).backward(dy, x, like_W, ("W", "b") if with_b else ("W",))
    return (xp.concat([dW, db[None, :]]) if with_b else dW)[None, ...]


def _same(parts: Array, **_: Any) -> Array:
    return parts


def _add(parts: Any, *, keepdims: bool, **_: Any) -> Array:
    total = reduce(operator.add, parts) if isinstance(parts, list) else parts
    return total if keepdims else total[0]
