"""Makers of operands and layers that several files of tests use."""

from __future__ import annotations

from typing import Any

import numpy as np

from xaffine import AffineLayer
from xaffine.backends import Backend
from xaffine.testing.cases import Case


def operands_on(backend: Backend, device: Any, case: Case) -> list[Any]:
    """Return dy, x, W and b of a case as arrays of the backend; None for a bias that is not there."""
    return [None if o is None else o.on(backend, device) for o in (case.dy, case.x, case.W, case.b)]


def layer_of_ones(backend: Backend, device: Any, dtype: str, N: int) -> tuple[AffineLayer, Any]:
    """Return a layer from one feature to one, with all its values 1, after the forward of an x of ones; and that x."""
    x, W, b = (backend.from_values(np.ones(shape), dtype, device=device) for shape in ((N, 1), (1, 1), (1,)))
    layer = AffineLayer(W, b)
    layer.forward(x)
    return layer, x
