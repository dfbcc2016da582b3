"""ndonnx: each product is one node of the model.

ndonnx itself spends two hundred nodes on a product, since onnxruntime fails where an extent turns out to be zero. With
extents that are known that is not needed, and an eager product takes a hundredth of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ndonnx as ndx
from spox.opset.ai.onnx import v21 as onnx

from xaffine.backends.standard import Backend

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BACKEND", "Ndonnx"]

_NARROW = (ndx.int8, ndx.uint8, ndx.int16, ndx.uint16)  # MatMul of ONNX takes no such integers


class Ndonnx(Backend):
    """ndonnx, whose arrays are nodes of an ONNX model."""

    name = "ndonnx"
    namespace = "ndonnx"
    has_strides = False
    halves = ("float16",)
    inexact = ("uint64", "bool")  # summed by way of float64; no numbers

    def device_name(self, device: object) -> str:
        """Its one device has no text of its own."""
        return "cpu"

    def to_numpy(self, array: ndx.Array) -> np.ndarray:
        """Run the model."""
        return array.unwrap_numpy()  # type: ignore[no-any-return]

    def why_not_writable(self, array: ndx.Array) -> None:
        """Do not try, which ndonnx would record as one more operation."""

    def is_copyable(self, array: ndx.Array) -> bool:
        """Only a pickle copies an array."""
        return False

    def matmul(self, a: ndx.Array, c: ndx.Array) -> ndx.Array:
        """One node, if all extents are known."""
        extents = (*a.shape, *c.shape)
        if None in extents:
            return a @ c
        if 0 in extents:
            return ndx.zeros((*a.shape[:-1], c.shape[-1]), dtype=a.dtype)
        if a.dtype in _NARROW:
            return self.matmul(a.astype(ndx.int32), c.astype(ndx.int32)).astype(a.dtype)
        return ndx.asarray(onnx.matmul(a.unwrap_spox(), c.unwrap_spox()))


BACKEND = Ndonnx()
