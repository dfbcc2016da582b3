"""The affine layer y = x W + b with an exact, hand-derived backward, on every array library.

The sub-modules `curvature`, `per_sample` and `testing` are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from xaffine import backends
from xaffine.functional import Gradients, affine, affine_backward, affine_jvp, affine_vjp
from xaffine.layer import AffineLayer

if TYPE_CHECKING:
    from xaffine import curvature, initializers, per_sample, testing

__version__ = "0.1.0"

__all__ = [
    "AffineLayer", "Gradients", "affine", "affine_backward", "affine_jvp", "affine_vjp", "backends", "curvature",
    "initializers", "per_sample", "testing",
]  # fmt: skip


if not TYPE_CHECKING:  # or a type checker would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
