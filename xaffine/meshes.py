"""Arrays of JAX that are split over a mesh with explicit axes.

There the split is part of an array's type, and what is summed over a split axis may be split in more than one way: JAX
wants to be told how. So the whole way runs with these axes made automatic, and its results are split as stated: each
gradient as what it is the gradient of, y as the batch of x and the columns of W.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from xaffine.backends import namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from xaffine.backends import Array

__all__ = ["Call", "Split", "automatic", "split_of"]

T = TypeVar("T")

Split: TypeAlias = tuple[Any, ...]
"""For each axis of an array the axis of the mesh that it is split over, or several, or None."""


class Call(Protocol):
    """Calls a function of some arrays and splits what it returns: `splits` has a `Split` for each array of that."""

    def __call__(self, function: Callable[..., T], splits: Any) -> T: ...  # noqa: D102 - of the class


def automatic(**arrays: Array | None) -> Call | None:
    """What calls a function of these arrays with the explicit axes of their mesh made automatic; None without such.

    Parameters
    ----------
    **arrays : array or None
        Of one library, by the names to call them in a message.

    Returns
    -------
    Call or None

    Raises
    ------
    ValueError
        The arrays are on two meshes; or, when called, a split has an axis of the mesh twice.
    """
    first = next(array for array in arrays.values() if array is not None)
    if namespace_of(first).__name__ != "jax.numpy":
        return None
    jax = importlib.import_module("jax")
    types = {name: jax.typeof(array) for name, array in arrays.items() if array is not None}
    meshes = {kind.sharding.mesh for kind in types.values() if not kind.sharding.mesh.empty}
    if not any(mesh.explicit_axes for mesh in meshes):
        return None
    came = "; ".join(f"{name} is {kind}" for name, kind in types.items())
    if len(meshes) > 1:
        places = {name: _text(kind.sharding.mesh) for name, kind in types.items() if not kind.sharding.mesh.empty}
        on = ", ".join(f"{name} on {place}" for name, place in places.items())
        msg = f"arrays on two meshes: {came}; {on}. Bring them to one first, with jax.device_put"
        raise ValueError(msg)
    mesh = meshes.pop()

    def sharding(split: Split) -> Any:
        spec = jax.sharding.PartitionSpec(*split)
        twice = [axis for axis, times in Counter(jax.tree.leaves(tuple(spec))).items() if times > 1]
        if twice:
            msg = (
                f"a result would be split over the axis {twice[0]!r} of the mesh along two of its own axes: {came}. "
                f"Pass one of them that is not split over {twice[0]!r}; jax.sharding.reshard makes one"
            )
            raise ValueError(msg)
        return jax.sharding.NamedSharding(mesh, spec)

    def call(function: Callable[..., T], splits: Any) -> T:
        shardings = jax.tree.map(sharding, splits, is_leaf=lambda split: type(split) is tuple)
        run: Callable[..., T] = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=shardings)
        return run(*arrays.values())

    return call


def split_of(array: Array) -> Split:
    """How an array of JAX is split."""
    spec = importlib.import_module("jax").typeof(array).sharding.spec
    return tuple(getattr(spec, "partitions", spec))  # a tuple itself in older releases


def _text(mesh: Any) -> str:
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return f"({', '.join(f'{name!r}: {size} {kind.name}' for name, size, kind in axes)})"
