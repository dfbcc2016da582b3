"""The slice rule, the way to matrices and back, and every check with its message.

`check` takes the arguments of a call and returns `Operands`, which all later steps trust. Shapes are tuples;
an extent that a lazy library does not know yet (``nan`` in Dask, ``None`` in ndonnx) passes every check.
"""

from __future__ import annotations

import math
import operator
from types import ModuleType  # noqa: TC003 - fields of a NamedTuple
from typing import Any, NamedTuple

import array_api_compat

from xaffine.backends import Array, device_of, library_of, namespace_of

__all__ = [
    "Operands", "check", "check_cotangent", "check_out", "check_parameters", "describe", "flatten", "restore",
]  # fmt: skip

_KINDS = ("integral", "real floating", "complex floating")


class Operands(NamedTuple):
    """Checked operands of one forward: what its backward needs."""

    x: Array
    W: Array
    b: Array | None
    n_batch_axes: int
    """How many leading axes of x are batch, 0 to ``x.ndim``."""
    dtype: Any
    """The common dtype of x, W and b, in which the products are computed; the dtype of y."""

    @property
    def y_shape(self) -> tuple[int, ...]:
        """The shape of y: that of the batch, then m."""
        return (*self.x.shape[: self.n_batch_axes], self.W.shape[1])


def check(x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> Operands:
    """Check the operands of a forward.

    Raises
    ------
    TypeError
        Dtypes that do not go together, arrays of two libraries, something that is no array,
        `n_batch_axes` not an integer.
    ValueError
        Shapes or devices that do not go together, `n_batch_axes` out of range.
    """
    dtype = _check_together(x=x, W=W, b=b)
    _check_parameter_shapes(W, b, x=x)
    k = _batch_axes(x, W, b, n_batch_axes)
    n = W.shape[0]
    if _differ(_size(x.shape[k:]), n):
        default = " (the default)" if n_batch_axes is None else ""
        msg = (
            f"with n_batch_axes = {k}{default} x has features {_text(x.shape[k:])}, {_size(x.shape[k:])} values, "
            f"and W takes n = {n}: {describe(x=x, W=W, b=b)}. {_remedy_for_features(x, n)}"
        )
        raise ValueError(msg)
    return Operands(x, W, b, k, dtype)


def check_parameters(W: Array, b: Array | None) -> None:
    """Check W and b alone; raises as `check` does."""
    _check_together(W=W, b=b)
    _check_parameter_shapes(W, b)


def check_cotangent(dy: Array, operands: Operands) -> Any:
    """Check dy against the forward that it belongs to; return the dtype in which to compute the backward.

    Raises as `check` does.
    """
    x, W, b = operands[:3]
    dtype = _check_together(dy=dy, x=x, W=W, b=b)
    expected = operands.y_shape
    if _shapes_differ(dy.shape, expected):
        msg = (
            f"dy must have the shape of y, {_text(expected)}: {describe(dy=dy, x=x, W=W, b=b)}. "
            f"Pass ∂L/∂y for this y, not broadcast and not summed"
        )
        raise ValueError(msg)
    return dtype


def check_out(name: str, out: Array, like: Array, shape: tuple[int, ...], dtype: Any) -> None:
    """Check a buffer for a result of that shape and dtype, which lives where `like` lives.

    Raises
    ------
    TypeError
        Another library or dtype, or an array that cannot be written.
    ValueError
        Another shape or device.
    """
    _check_together(**{name: out, "the operands": like})
    if _shapes_differ(out.shape, shape):
        msg = f"{name} must have the shape {_text(shape)}: {describe(**{name: out})}. Pass a buffer of that shape"
        raise ValueError(msg)
    if out.dtype != dtype:
        msg = f"{name} must have the dtype {_dtype_name(dtype)}: {describe(**{name: out})}. Pass a buffer of that dtype"
        raise TypeError(msg)
    if not array_api_compat.is_writeable_array(out):
        msg = f"{name} cannot be written: {describe(**{name: out})} is immutable or read-only. Leave it out"
        raise TypeError(msg)


def flatten(xp: ModuleType, array: Array, n_batch_axes: int) -> Array:
    """Reshape an array to a matrix: its batch axes to rows, its features to columns."""
    if array.ndim == 2 and n_batch_axes == 1:
        return array
    return _reshape(xp, array, (_size(array.shape[:n_batch_axes]), _size(array.shape[n_batch_axes:])))


def restore(xp: ModuleType, matrix: Array, shape: tuple[int, ...], n_batch_axes: int) -> Array:
    """Undo `flatten`: reshape a matrix to the shape that it came from."""
    if len(shape) == 2 and n_batch_axes == 1:
        return matrix
    return _reshape(xp, matrix, shape)


def describe(**operands: Any) -> str:
    """Say what came in: shape, dtype, library and device of every operand."""
    return "; ".join(f"{name} is {_describe(operand)}" for name, operand in operands.items())


def _describe(operand: Any) -> str:
    try:
        library = library_of(namespace_of(operand))
    except TypeError:
        return repr(operand) if operand is None else f"a {type(operand).__module__}.{type(operand).__qualname__}"
    device = device_of(operand)
    place = library if device is None else f"{library} on {device}"
    return f"{_dtype_name(operand.dtype)} {_text(operand.shape)} ({place})"


def _dtype_name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def _text(shape: tuple[Any, ...]) -> str:
    unknown = ["?" if not _known(extent) else str(extent) for extent in shape]
    return f"({', '.join(unknown)}{',' if len(shape) == 1 else ''})"


def _known(extent: Any) -> bool:
    return extent is not None and extent == extent  # nan differs from itself


def _differ(extent: Any, expected: Any) -> bool:
    return _known(extent) and _known(expected) and extent != expected


def _shapes_differ(shape: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return len(shape) != len(expected) or any(map(_differ, shape, expected))


def _size(extents: tuple[Any, ...]) -> int | None:
    """The product of the extents, None while one is unknown."""
    return math.prod(extents) if all(map(_known, extents)) else None


def _reshape(xp: ModuleType, array: Array, shape: tuple[Any, ...]) -> Array:
    if all(map(_known, shape)):
        return xp.reshape(array, shape)
    # One unknown extent is what -1 stands for, as long as the others leave no doubt about it.
    inferred = tuple(extent if _known(extent) else -1 for extent in shape)
    try:
        return xp.reshape(array, inferred)
    except ValueError as error:
        msg = (
            f"an array of shape {_text(array.shape)} cannot be reshaped to {_text(shape)} before its unknown "
            f"extents (?) are known. Find them first (in Dask: array.compute_chunk_sizes()), or pass a 2-D x"
        )
        raise ValueError(msg) from error


# Libraries and dtypes that were found to go together, by the (type, dtype) of each operand, on which alone that
# depends; with their common dtype.
_COMMON_DTYPES: dict[tuple[Any, ...], Any] = {}


def _check_together(**operands: Any) -> Any:
    """Check that the operands are arrays of one library, one device and one kind of dtype; return the common dtype.

    Only a b may be None.
    """
    present = {name: operand for name, operand in operands.items() if operand is not None or name != "b"}
    signature = tuple([(type(operand), getattr(operand, "dtype", None)) for operand in present.values()])
    common = _COMMON_DTYPES.get(signature)
    if common is None:
        xp = _check_library(present, operands)
        common = _check_dtypes(xp, [operand.dtype for operand in present.values()], operands)
        _COMMON_DTYPES[signature] = common
    devices = [device for device in map(device_of, present.values()) if device is not None]
    if any(device != devices[0] for device in devices[1:]):
        msg = f"arrays on two devices: {describe(**operands)}. Move them to one first"
        raise ValueError(msg)
    return common


def _check_library(present: dict[str, Any], operands: dict[str, Any]) -> ModuleType:
    namespaces = []
    for name, operand in present.items():
        try:
            namespaces.append(namespace_of(operand))
        except TypeError:
            msg = (
                f"{name} is no array of a library that follows the array API standard: {describe(**operands)}. "
                f"Make it one first, for example numpy.asarray({name}) with at least one axis"
            )
            raise TypeError(msg) from None
    if any(xp is not namespaces[0] for xp in namespaces[1:]):
        msg = (
            f"arrays of two libraries: {describe(**operands)}. Convert them to one first, "
            f"for example with xaffine.backends.get({library_of(namespaces[0])!r}).from_numpy"
        )
        raise TypeError(msg)
    return namespaces[0]


def _check_dtypes(xp: ModuleType, dtypes: list[Any], operands: dict[str, Any]) -> Any:
    kinds = [next((i for i, kind in enumerate(_KINDS) if xp.isdtype(dtype, kind)), -1) for dtype in dtypes]
    if min(kinds) == max(kinds) != -1:
        if all(dtype == dtypes[0] for dtype in dtypes[1:]):
            return dtypes[0]
        try:
            common = xp.result_type(*dtypes)
        except (TypeError, ValueError, RuntimeError):  # how libraries say that two dtypes do not promote
            common = None
        if common is not None and xp.isdtype(common, _KINDS[kinds[0]]):
            return common
    widest = _dtype_name(dtypes[kinds.index(max(kinds))]) if max(kinds) != -1 else "a floating dtype"
    others = [
        name for name, operand in operands.items() if operand is not None and _dtype_name(operand.dtype) != widest
    ]
    msg = (
        f"the dtypes must be of one kind (integer, real floating or complex floating) and have a common dtype: "
        f"{describe(**operands)}. Cast {' and '.join(others)} to {widest} first, with xp.astype"
    )
    raise TypeError(msg)


def _check_parameter_shapes(W: Array, b: Array | None, **others: Any) -> None:
    if W.ndim != 2:
        msg = f"W must be 2-D, (n, m): {describe(**others, W=W, b=b)}. Reshape it first"
        raise ValueError(msg)
    if b is not None and _shapes_differ(b.shape, W.shape[1:]):
        msg = (
            f"b must have the shape (m,) = {_text(W.shape[1:])}, never broadcast: {describe(**others, W=W, b=b)}. "
            f"Reshape it first, or pass None for no bias"
        )
        raise ValueError(msg)


def _batch_axes(x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> int:
    """Resolve `n_batch_axes` to the number of leading axes of x that are batch."""
    ndim = x.ndim
    if ndim == 0:
        msg = f"x must have at least one axis: {describe(x=x, W=W, b=b)}. Reshape it to (n,) or (N, n) first"
        raise ValueError(msg)
    if n_batch_axes is None:
        return 0 if ndim == 1 else 1
    try:
        if isinstance(n_batch_axes, bool):
            raise TypeError
        k = operator.index(n_batch_axes)
    except TypeError:
        msg = f"n_batch_axes must be an int or None, not {n_batch_axes!r}: {describe(x=x, W=W, b=b)}"
        raise TypeError(msg) from None
    if not -ndim <= k <= ndim:
        msg = (
            f"n_batch_axes = {k} is out of range for an x with {ndim} axes: {describe(x=x, W=W, b=b)}. "
            f"Pass one of {-ndim} to {ndim}; x.shape[:n_batch_axes] is the batch"
        )
        raise ValueError(msg)
    return k if k >= 0 else ndim + k


def _remedy_for_features(x: Array, n: Any) -> str:
    fitting = [k for k in range(x.ndim + 1) if _size(x.shape[k:]) == n]
    if fitting:
        return f"n_batch_axes = {' or '.join(map(str, fitting))} would fit"
    return f"No n_batch_axes fits; x needs {n} features a sample"
