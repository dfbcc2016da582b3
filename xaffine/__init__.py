"""The affine layer y = x W + b with an exact, hand-derived backward, on every array library."""

from xaffine import backends
from xaffine.functional import Gradients, affine, affine_backward, affine_jvp, affine_vjp
from xaffine.layer import AffineLayer

__version__ = "0.1.0"

__all__ = ["AffineLayer", "Gradients", "affine", "affine_backward", "affine_jvp", "affine_vjp", "backends"]
