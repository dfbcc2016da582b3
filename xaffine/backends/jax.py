"""JAX: steps that are compiled as a whole, tracers, meshes with explicit axes."""

from __future__ import annotations

import inspect
from collections import Counter
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.extend.backend import backends
from jaxlib._jax import ArrayImpl

from xaffine.backends.standard import LARGER_THAN_CACHES, Array, Backend, Result

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BACKEND", "Jax"]

# XLA on a CPU computes a product of fewer columns as a running sum, and one with zeros beside them as usual.
_LONG, _NARROW = 16384, 4

# No array is made here: this module may be imported for the first time while JAX traces.


class Jax(Backend):
    """JAX, on CPUs, GPUs and TPUs."""

    name = "jax"
    namespace = "jax.numpy"
    has_strides = False
    halves = ("bfloat16", "float16")

    @property
    def devices(self) -> list[Any]:
        """Without the entry that stands for "wherever the data are"."""
        return [device for device in super().devices if device is not None]

    def from_numpy(self, array: np.ndarray, *, device: Any = None) -> Array:
        """Copy: what device_put takes may become the array. jax.numpy.asarray compiles a program for each shape."""
        return self.xp.asarray(jax.device_put(np.array(array, order="C"), device), device=device)

    def to_device(self, array: Array, device: Any) -> Array:
        """A copy: what is donated of one array is lost to all that share its memory."""
        return array if self.device_of(array) == device else jax.device_put(array, device, may_alias=False)

    def wait(self, array: Array) -> None:
        """Wait for the computation."""
        array.block_until_ready()

    def use_full_precision(self) -> None:
        """Enable float64, and products of float32 in all its bits."""
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "float32")

    def use_tf32(self) -> None:
        """Allow TF32."""
        jax.config.update("jax_default_matmul_precision", "tensorfloat32")

    def stopwatch(self, device: Any) -> Any:
        """By the host's time: JAX has no events."""
        name, mark, between, flush = super().stopwatch(device)
        if self.is_gpu(device):
            buffer = jax.device_put(jax.numpy.zeros(LARGER_THAN_CACHES, dtype="uint8"), device)
            write = jax.jit(lambda buffer: buffer + 1)
            flush = lambda: write(buffer).block_until_ready()  # noqa: E731
        return name, mark, between, flush

    def bare_products(self, x: Array, W: Array, dy: Array) -> Any:
        """Compiled; arrays of JAX are immutable."""
        forward = jax.jit(jax.numpy.matmul)
        backward = jax.jit(lambda dy, x, W: (dy @ W.T, x.T @ dy))
        return lambda: forward(x, W), lambda: backward(dy, x, W)

    @cached_property
    def _is_alone(self) -> bool:
        """Whether there is one device, so that no two arrays are on different ones."""
        return bool(sum(client.device_count() for client in backends().values()) == 1)

    def facts(self, array: Any) -> tuple[Any, ...] | None:
        """The abstract value of a concrete array, and the devices that it is bound to, if there are several."""
        if type(array) is not ArrayImpl:
            return None
        return (array.aval,) if self._is_alone or not array.committed else (array.aval, array.sharding)

    def signature(self, *arrays: Any) -> Any:
        """Written out for the usual numbers of arrays on the one device: the loop takes longer."""
        if self._is_alone:
            if len(arrays) == 1:
                return (arrays[0].aval,) if type(arrays[0]) is ArrayImpl else None
            if len(arrays) == 3:
                x, W, b = arrays
                if type(x) is type(W) is type(b) is ArrayImpl:
                    return x.aval, W.aval, b.aval
            elif len(arrays) == 4:
                dy, x, W, b = arrays
                if type(dy) is type(x) is type(W) is type(b) is ArrayImpl:
                    return dy.aval, x.aval, W.aval, b.aval
        return super().signature(*arrays)

    def promotion(self) -> Any:
        """The options without which float64 becomes float32, and with which mixed dtypes are refused."""
        return jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion

    def check_operands(self, **operands: Any) -> None:
        """Arrays that are bound to devices must be on the same ones, also where JAX does not look at all of them."""
        bound = {name: a for name, a in operands.items() if type(a) is ArrayImpl and a.committed}
        devices = {name: array.sharding.device_set for name, array in bound.items()}
        if len(set(map(frozenset, devices.values()))) > 1:
            ids = ", ".join(f"{name} on {sorted(device.id for device in some)}" for name, some in devices.items())
            msg = f"arrays on two devices: {self.describe_all(**bound)}; by their ids {ids}. Move them to one first"
            raise ValueError(msg)

    def device_of(self, array: Array) -> Any:
        """None of what JAX moves at will: uncommitted and traced arrays, and those that several devices share."""
        device = array.device if type(array) is ArrayImpl and array.committed else None
        return None if hasattr(device, "device_set") else device

    def why_not_writable(self, array: Array) -> str:
        """No array of JAX is."""
        return "arrays of JAX are immutable"

    def run(self, step: Callable[..., Result], plan: Any, *arrays: Any) -> Result:
        """Compile the step, once for each plan; what the user traces, the user compiles."""
        # Of concrete arrays alone: tracers have no signature.
        compiled: Callable[..., Result] | None = plan.derived.get(step)
        if compiled is None:
            if any(isinstance(array, jax.core.Tracer) for array in arrays):
                return _traced(step, plan, *arrays)
            # Where there are several devices, unused operands are kept: they, too, say on which the results are.
            named = _named_as(step, partial(_traced, step, plan))
            compiled = plan.derived[step] = jax.jit(named, keep_unused=not self._is_alone)
        return compiled(*arrays)

    def primitives(self, *arrays: Array | None, extents: Any = (None,)) -> Any:
        """Those of this class for every type: tracers have many."""
        return self.product, self.sum_rows

    def matmul(self, a: Array, c: Array) -> Array:
        """With zeros beside few columns, where XLA would add many terms up one after the other."""
        n, m = a.shape[-2], c.shape[-1]
        if a.shape[-1] <= _LONG or min(n, m) >= _NARROW:
            return self.xp.matmul(a, c)
        wide_a, wide_c = _widened(a, -2), _widened(c, -1)
        return self.xp.matmul(wide_a, wide_c)[..., :n, :m]

    def sum(self, array: Array, axis: int, dtype: Any) -> Array:
        """JAX sums in trees, and would have to move the terms of an axis that it splits."""
        return self.xp.sum(array, axis=axis, dtype=dtype)


def _widened(matrix: Array, axis: int) -> Array:
    """A matrix with zeros behind it along an axis, so that it has four rows or columns or more."""
    missing = max(0, _NARROW - matrix.shape[axis])
    widths = [(0, 0)] * matrix.ndim
    widths[axis] = (0, missing)
    return jax.numpy.pad(matrix, widths)


def _named_as(step: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the arrays of a step with the step's name and parameters, which JAX puts into its messages."""

    def named(*arrays: Any) -> Any:
        return function(*arrays)

    signature = inspect.signature(step)
    named.__name__ = named.__qualname__ = step.__name__
    named.__signature__ = signature.replace(parameters=[*signature.parameters.values()][1:])  # type: ignore[attr-defined]
    return named


def _named(step: Callable[..., Any], arrays: tuple[Any, ...]) -> dict[str, Any]:
    """The arrays that a step is called with, by the names of its parameters."""
    _, *names = inspect.signature(step).parameters
    return {name: array for name, array in zip(names, arrays, strict=True) if array is not None}


def _traced(step: Callable[..., Result], plan: Any, *arrays: Any) -> Result:
    """Call a step; it may mix dtypes, such as float64 for sums, also where users refuse that of their operands."""
    with jax.numpy_dtype_promotion("standard"):
        return _split_as_said(step, plan, *arrays)


def _split_as_said(step: Callable[..., Result], plan: Any, *arrays: Any) -> Result:
    """Call a step; on a mesh with explicit axes, with these axes made automatic and the results split as it says.

    There the split is part of an array's type, and what is summed over a split axis may be split in more than one way:
    JAX requires the sharding of each result.
    """
    types = {name: jax.typeof(array) for name, array in _named(step, arrays).items()}
    meshes = {kind.sharding.mesh for kind in types.values() if not kind.sharding.mesh.empty}
    results = getattr(step, "results", None)  # of sums without, each is laid out as its terms
    if results is None or not any(mesh.explicit_axes for mesh in meshes):
        return step(plan, *arrays)
    text = "; ".join(f"{name} is {kind}" for name, kind in types.items())
    if len(meshes) > 1:
        places = {name: _text(kind.sharding.mesh) for name, kind in types.items() if not kind.sharding.mesh.empty}
        on = ", ".join(f"{name} on {place}" for name, place in places.items())
        msg = f"arrays on two meshes: {text}; {on}. Bring them to one first, with jax.device_put"
        raise ValueError(msg)
    mesh = meshes.pop()

    def sharding(result: str) -> Any:
        spec = jax.sharding.PartitionSpec(*_split(result, plan, types))
        twice = [axis for axis, times in Counter(jax.tree.leaves(tuple(spec))).items() if times > 1]
        if twice:
            msg = (
                f"a result would be split over the axis {twice[0]!r} of the mesh along two of its own axes: {text}. "
                f"Pass one of them that is not split over {twice[0]!r}; jax.sharding.reshard makes one"
            )
            raise ValueError(msg)
        return jax.sharding.NamedSharding(mesh, spec)

    def whole(array: Any) -> Any:
        return None if array is None else jax.ShapeDtypeStruct(jax.numpy.shape(array), jax.numpy.result_type(array))

    shapes = jax.eval_shape(partial(step, plan), *map(whole, arrays))
    if isinstance(shapes, tuple):
        splits: Any = [None if s is None else sharding(r) for r, s in zip(results, shapes, strict=True)]
        splits = type(shapes)(*splits) if hasattr(shapes, "_fields") else tuple(splits)
    else:
        splits = sharding(*results)
    automatic = jax.sharding.auto_axes(partial(step, plan), axes=mesh.explicit_axes, out_sharding=splits)
    return automatic(*arrays)  # type: ignore[no-any-return]


def _split(result: str, plan: Any, types: dict[str, Any]) -> tuple[Any, ...]:
    """How a result is split: as the operand that it is named after, each axis of the mesh by its name.

    "y" has the batch of x and the columns of W, "samples" the first axis of the batch, "samples W" that and the axes of
    W, and "" is in one piece.
    """
    parts: tuple[Any, ...] = ()
    for name in result.split():
        if name == "y":
            parts += _spec(types["x"])[: plan.n_batch_axes] + _spec(types["W"])[1:]
        elif name == "samples":
            parts += _spec(types["x"])[: min(1, plan.n_batch_axes)]
        else:
            parts += _spec(types[name])
    return parts


def _spec(kind: Any) -> tuple[Any, ...]:
    spec = kind.sharding.spec
    return tuple(getattr(spec, "partitions", spec))  # a tuple itself in older releases


def _text(mesh: Any) -> str:
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return f"({', '.join(f'{name!r}: {size} {kind.name}' for name, size, kind in axes)})"


BACKEND = Jax()
