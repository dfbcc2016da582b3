"""The kernel for ndonnx: each product is one node of the model.

ndonnx itself spends two hundred nodes on a product, since onnxruntime fails where an extent turns out to be zero. With
extents that are known that is not needed, and an eager product takes a hundredth of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ndonnx as ndx
from spox.opset.ai.onnx import v21 as onnx

from xaffine.kernels.standard import backward_b

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["backward", "forward"]

_NARROW = (ndx.int8, ndx.uint8, ndx.int16, ndx.uint16)  # MatMul of ONNX takes no such integers


def forward(x: ndx.Array, W: ndx.Array, b: ndx.Array | None, out: Any = None) -> ndx.Array:  # noqa: ARG001 - not fillable
    """y = x W + b."""
    y = _product(x, W)
    return y if b is None else y + b


def backward(
    dy: ndx.Array,
    x: ndx.Array,
    W: ndx.Array,
    wanted: Collection[str],
    out: Any = (None, None, None),  # noqa: ARG001 - as in forward
) -> tuple[ndx.Array | None, ndx.Array | None, ndx.Array | None]:
    """dx = dy Wᵀ, dW = xᵀ dy and db = Σ over the batch of dy."""
    return (
        _product(dy, W.T) if "x" in wanted else None,
        _product(x.T, dy) if "W" in wanted else None,
        backward_b(dy) if "b" in wanted else None,
    )


def _product(left: ndx.Array, right: ndx.Array) -> ndx.Array:
    extents = (*left.shape, *right.shape)
    if None in extents:  # not known yet
        return left @ right
    if 0 in extents:
        return ndx.zeros((left.shape[0], right.shape[1]), dtype=left.dtype)
    if left.dtype in _NARROW:
        return _product(left.astype(ndx.int32), right.astype(ndx.int32)).astype(left.dtype)
    return ndx.asarray(onnx.matmul(left.unwrap_spox(), right.unwrap_spox()))
