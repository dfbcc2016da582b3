"""sparse (PyData): arrays that store what is not zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xaffine.backends.standard import Array, Backend

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BACKEND", "Sparse"]


class Sparse(Backend):
    """The sparse library of PyData."""

    name = "sparse"
    namespace = "sparse"
    has_strides = False

    def to_numpy(self, array: Array) -> np.ndarray:
        """Fill in the zeros."""
        return array.todense()  # type: ignore[no-any-return]

    def matmul(self, a: Array, c: Array) -> Array:
        """The library multiplies no empty stacks."""
        if a.ndim > 2 and a.shape[0] == 0:
            return self.xp.zeros((*a.shape[:-1], c.shape[-1]), dtype=a.dtype)
        return self.xp.matmul(a, c)

    def sum(self, array: Array, axis: int, dtype: Any) -> Array:
        """The library sums in trees."""
        return self.xp.sum(array, axis=axis, dtype=dtype)


BACKEND = Sparse()
