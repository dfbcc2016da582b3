"""The slice rule, the way to matrices and back, and every check with its message.

`check` takes the arguments of a call and returns `Operands`, which all later steps trust. Shapes are tuples;
an extent that a lazy library does not know yet (``nan`` in Dask, ``None`` in ndonnx) passes every check.
"""

from __future__ import annotations

import math
import operator
import sys
from functools import reduce
from itertools import combinations_with_replacement
from types import ModuleType  # noqa: TC003 - fields of a NamedTuple
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from xaffine.backends import (
    Array,
    are_apart,
    device_of,
    dtype_name,
    is_of_kind,
    is_recorded,
    library_of,
    memory_of,
    namespace_of,
    overlap,
)  # fmt: skip

__all__ = [
    "Operands", "cast", "check", "check_apart", "check_cotangent", "check_out", "check_parameters", "check_sum",
    "check_tangents", "describe", "flatten", "is_writable", "promote", "reshape", "restore",
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
    y_shape: tuple[int, ...]
    """The shape of y: that of the batch, then m."""
    plain: bool
    """Whether all are NumPy arrays of that dtype, and x a matrix."""


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
    # NumPy's usual case at a glance, since the whole check takes microseconds.
    if n_batch_axes is None and type(x) is type(W) is np.ndarray and (b is None or type(b) is np.ndarray):
        dtype, shape, columns = x.dtype, x.shape, W.shape
        if (
            dtype in _PLAIN
            and W.dtype is dtype
            and len(shape) == 2 == len(columns)
            and shape[1] == columns[0]
            and (b is None or (b.dtype is dtype and b.shape == columns[1:]))
        ):
            return Operands(x, W, b, 1, dtype, (shape[0], columns[1]), True)
    dtype = _check_together(**_named(x=x, W=W, b=b))
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
    return Operands(x, W, b, k, dtype, (*x.shape[:k], W.shape[1]), False)


def check_parameters(W: Array, b: Array | None) -> None:
    """Check W and b alone; raises as `check` does."""
    _check_together(**_named(W=W, b=b))
    _check_parameter_shapes(W, b)


def check_cotangent(dy: Array, operands: Operands) -> Any:
    """Check dy against the forward that it belongs to; return the dtype in which to compute the backward.

    Raises as `check` does.
    """
    x, W, b, _, dtype, expected, plain = operands
    if plain and type(dy) is np.ndarray and dy.dtype is dtype and dy.shape == expected:  # at a glance
        return dtype
    if _is_like(dy, x) and dy.dtype == dtype and dy.shape == expected:  # at a second glance
        return dtype
    dtype = _check_together(**_named(dy=dy, x=x, W=W, b=b))
    if _shapes_differ(dy.shape, expected):
        msg = (
            f"dy must have the shape of y, {_text(expected)}: {describe(dy=dy, x=x, W=W, b=b)}. "
            f"Pass ∂L/∂y for this y, not broadcast and not summed"
        )
        raise ValueError(msg)
    return dtype


def check_tangents(operands: Operands, tangents: dict[str, Array | None], **others: Array) -> Any:
    """Check arrays that go with x, W and b, in this order and by the names to call them: None, or of their shapes.

    Returns the dtype in which to compute with them, the operands and the others. Raises as `check` does; ValueError too
    for one that goes with no bias.
    """
    primals = {"x": operands.x, "W": operands.W, "b": operands.b}
    given = {name: array for name, array in {**others, **primals, **tangents}.items() if array is not None}
    dtype = _check_together(**given)
    for (name, tangent), (letter, primal) in zip(tangents.items(), primals.items(), strict=True):
        if tangent is None:
            continue
        if primal is None:
            msg = f"{name} goes with b, which is None: {describe(**given)}. Pass a bias, or None for {name}"
            raise ValueError(msg)
        if _shapes_differ(tangent.shape, primal.shape):
            msg = (
                f"{name} must have the shape of {letter}, {_text(primal.shape)}, never broadcast: "
                f"{describe(**given)}. Pass None where it is zero"
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
    if type(out) is type(like) is np.ndarray and out.dtype is dtype and out.shape == shape and is_writable(out):
        return  # at a glance
    if (
        _is_like(out, like)
        and out.dtype == dtype
        and out.shape == shape
        and not array_api_compat.is_dask_array(out)  # whose extents may be unknown
        and is_writable(out)
    ):
        return  # at a second glance
    _refuse_nested({name: out})
    error: type[Exception] = TypeError
    try:
        same_library = namespace_of(out) is namespace_of(like)
    except TypeError:
        same_library = False
    if not same_library:
        fault = "must be an array of the library of the operands"
    elif (device := device_of(out)) != (expected := device_of(like)) and None not in (device, expected):
        fault, error = f"must be on the device of the operands, {expected}", ValueError
    elif _shapes_differ(out.shape, shape):
        fault, error = f"must have the shape {_text(shape)}", ValueError
    elif array_api_compat.is_dask_array(out) and not all(map(_known, (*out.shape, *shape))):
        fault, error = "cannot be filled by Dask before all extents are known (array.compute_chunk_sizes())", ValueError
    elif out.dtype != dtype:
        fault = f"must have the dtype {dtype_name(dtype)}"
    elif not is_writable(out):
        fault = "cannot be written, being immutable or read-only"
    else:
        return
    msg = (
        f"{name} {fault}: {describe(**{name: out})}. Pass a buffer of shape {_text(shape)} and dtype "
        f"{dtype_name(dtype)} that lives where x, W and b do, or none"
    )
    raise error(msg)


def check_apart(buffers: dict[str, Array], **operands: Array | None) -> None:
    """Check that what is written to a buffer changes no operand, no other buffer, and nothing that torch recorded.

    Raises
    ------
    TypeError
        Autograd records what is done with one of them.
    ValueError
        Two of them, or elements of one buffer, share memory.
    """
    arrays = {name: array for name, array in {**operands, **buffers}.items() if array is not None}
    recorded = [name for name, array in arrays.items() if is_recorded(array)]
    if recorded and buffers:
        msg = (
            f"{' and '.join(buffers)} cannot be filled: autograd or another transform of torch follows "
            f"{' and '.join(recorded)}. Call under torch.no_grad(), pass detached tensors, or no buffer"
        )
        raise TypeError(msg)
    memory = {name: memory_of(array) for name, array in arrays.items()}
    if are_apart(memory.values()):
        return
    for name, other in combinations_with_replacement(reversed(arrays), 2):
        if name in buffers and overlap(memory[name], memory[other], same=name == other):
            msg = (
                f"{name} overlaps {'itself' if name == other else other} in memory: "
                f"{describe(**{name: arrays[name], other: arrays[other]})}. Pass a buffer of its own"
            )
            raise ValueError(msg)


def check_sum(name: str, old: Array, new: Array) -> None:
    """Check that a gradient can be added to one that is there.

    Raises
    ------
    TypeError
        They are arrays of two libraries, or of dtypes that do not go together.
    ValueError
        Shapes or devices that differ.
    """
    named = {f"the {name} that is there": old, f"the new {name}": new}
    _check_together(**named)
    if _shapes_differ(old.shape, new.shape):
        msg = f"gradients that are added up must have one shape: {describe(**named)}. Set layer.{name} = None first"
        raise ValueError(msg)


def is_writable(array: Array) -> bool:
    """Whether elements of an array can be assigned."""
    if array_api_compat.is_cupy_array(array):
        return True  # CuPy has no read-only arrays.
    if not array_api_compat.is_writeable_array(array):
        return False
    if type(array) is np.ndarray:
        return True
    if array_api_compat.is_dask_array(array) or array_api_compat.is_ndonnx_array(array):
        return True  # and no probe, which they would note down as one more operation
    if array_api_compat.is_torch_array(array):
        # No probe, which autograd would count as a change; and no question that Dynamo cannot trace.
        return sys.modules["torch"].compiler.is_compiling() or not array.is_inference()
    try:
        array[:0, ...] = array[:0, ...]  # writes nothing, and raises where writing would
    except Exception:  # each library has its own error for it
        return False
    return True


def flatten(xp: ModuleType, array: Array, n_batch_axes: int) -> Array:
    """Reshape an array to a matrix: its batch axes to rows, its features to columns."""
    if array.ndim == 2 and n_batch_axes == 1:
        return array
    return reshape(xp, array, (_size(array.shape[:n_batch_axes]), _size(array.shape[n_batch_axes:])))


def restore(xp: ModuleType, matrix: Array, shape: tuple[int, ...], n_batch_axes: int) -> Array:
    """Undo `flatten`: reshape a matrix to the shape that it came from."""
    if len(shape) == 2 and n_batch_axes == 1:
        return matrix
    return reshape(xp, matrix, shape)


def cast(xp: ModuleType, array: Array, dtype: Any) -> Array:
    """An array in a dtype: itself, where it has it."""
    return array if array.dtype == dtype else xp.astype(array, dtype)


def promote(xp: ModuleType, *dtypes: Any) -> Any:
    """The dtype that dtypes promote to: by promote_types where there is one, since Dynamo traces no result_type."""
    return reduce(getattr(xp, "promote_types", xp.result_type), dtypes)


def _named(b: Array | None, **operands: Any) -> dict[str, Any]:
    """Name the operands that take part: b only if there is one."""
    return operands if b is None else {**operands, "b": b}


def describe(**operands: Any) -> str:
    """Say what came in: shape, dtype, library and device of every operand."""
    return "; ".join(f"{name} is {_describe(operand)}" for name, operand in operands.items())


def _describe(operand: Any) -> str:
    try:
        library = library_of(namespace_of(operand)).partition(".")[0]
    except TypeError:
        return repr(operand) if operand is None else f"a {type(operand).__module__}.{type(operand).__qualname__}"
    device = device_of(operand)
    place = library if device is None else f"{library} on {device}"
    return f"{dtype_name(operand.dtype)} {_text(operand.shape)} ({place})"


def _text(shape: tuple[Any, ...]) -> str:
    unknown = ["?" if not _known(extent) else str(extent) for extent in shape]
    return f"({', '.join(unknown)}{',' if len(shape) == 1 else ''})"


def _known(extent: Any) -> bool:
    return extent is not None and extent == extent  # nan differs from itself


def _differ(extent: Any, expected: Any) -> bool:
    return _known(extent) and _known(expected) and extent != expected


def _shapes_differ(shape: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return shape != expected and (len(shape) != len(expected) or any(map(_differ, shape, expected)))


def _size(extents: tuple[Any, ...]) -> int | None:
    """The product of the extents, None while one is unknown."""
    return math.prod(extents) if all(map(_known, extents)) else None


def reshape(xp: ModuleType, array: Array, shape: tuple[Any, ...]) -> Array:
    """Reshape an array, where at most one extent is not known yet."""
    if all(map(_known, shape)):
        return xp.reshape(array, shape)
    inferred = tuple(extent if _known(extent) else -1 for extent in shape)
    if inferred.count(-1) == 1 and 0 not in inferred:  # else -1 would be ambiguous
        try:
            return xp.reshape(array, inferred)
        except ValueError:  # Dask does not reshape what it does not know
            pass
    msg = (
        f"an array of shape {_text(array.shape)} cannot be reshaped to {_text(shape)} before its unknown "
        f"extents (?) are known. Find them first (in Dask: array.compute_chunk_sizes()), or pass a 2-D x"
    )
    raise ValueError(msg)


# Dtypes that every check lets pass, and that promote to nothing else.
_PLAIN = frozenset(map(np.dtype, ["float16", "float32", "float64", "complex64", "complex128"])) | frozenset(
    np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)
)
# The dtype to compute in with operands of one type and dtype, the usual case, once those were checked.
_COMMON_DTYPES: dict[tuple[type, Any], Any] = {}


def _check_together(**operands: Any) -> Any:
    """Check that the operands are arrays of one library, one device and one kind of dtype; return the common dtype."""
    _refuse_nested(operands)
    signatures = {(type(operand), getattr(operand, "dtype", None)) for operand in operands.values()}
    dtype = _COMMON_DTYPES.get(next(iter(signatures))) if len(signatures) == 1 else None
    if dtype is None:
        xp = _check_library(operands)
        dtype = _check_dtypes(xp, operands)
        if len(signatures) == 1:
            _COMMON_DTYPES[signatures.pop()] = dtype
    devices = [device for device in map(device_of, operands.values()) if device is not None]
    if any(device != devices[0] for device in devices[1:]):
        msg = f"arrays on two devices: {describe(**operands)}. Move them to one first"
        raise ValueError(msg)
    return dtype


def _is_like(array: Array, like: Array) -> bool:
    """Whether an array is of the library and on the device of one that was checked."""
    return type(array) is type(like) and not getattr(array, "is_nested", False) and device_of(array) == device_of(like)


def _refuse_nested(operands: dict[str, Any]) -> None:
    """Refuse nested tensors of torch: some of them have no shape to ask for, the others an extent that varies."""
    nested = [name for name, operand in operands.items() if getattr(operand, "is_nested", False)]
    if nested:
        msg = (
            f"{' and '.join(nested)} must have one extent along each axis, and {nested[0]} is a nested tensor. "
            f"Pass the rows of all its samples, torch.cat({nested[0]}.unbind())"
        )
        raise TypeError(msg)


# Methods that make an array of what the asarray of a library would misread: a masked array would lose its mask, and a
# sparse matrix of SciPy would become one object.
_CONVERSIONS = ("filled", "toarray", "todense", "to_numpy")


def _check_library(operands: dict[str, Any]) -> ModuleType:
    namespaces: dict[str, ModuleType] = {}
    strangers: list[str] = []
    for name, operand in operands.items():
        try:
            namespaces[name] = namespace_of(operand)
        except TypeError:
            strangers.append(name)
    first = next(iter(namespaces.values()), None)
    library = "numpy" if first is None else library_of(first)
    if strangers:
        name = next((name for name in strangers if hasattr(operands[name], "filled")), strangers[0])
        method = next((method for method in _CONVERSIONS if hasattr(operands[name], method)), None)
        remedy = f"{library}.asarray({name})" if method is None else f"{name}.{method}()"
        if method == "filled":
            remedy = f"{name}.filled(0), with the value that masked elements stand for"
        msg = (
            f"{' and '.join(strangers)} {'is no array' if len(strangers) == 1 else 'are no arrays'} of a library that "
            f"follows the array API standard: "
            f"{describe(**operands)}. Make it one first, for example {remedy}"
        )
        raise TypeError(msg)
    others = [name for name, xp in namespaces.items() if xp is not first]
    if others or first is None:
        msg = (
            f"arrays of two libraries: {describe(**operands)}. Bring {' and '.join(others)} to {library} first; "
            f"to_numpy and from_numpy of xaffine.backends.get(NAME) do"
        )
        raise TypeError(msg)
    return first


def _check_dtypes(xp: ModuleType, operands: dict[str, Any]) -> Any:
    dtypes = [operand.dtype for operand in operands.values()]
    kinds = [next((i for i, kind in enumerate(_KINDS) if is_of_kind(xp, dtype, kind)), -1) for dtype in dtypes]
    if min(kinds) == max(kinds) != -1:
        reason = ""
        try:
            common = promote(xp, dtypes[0], *dtypes)  # of a single dtype, too: it undoes a foreign byte order
        except (TypeError, ValueError, RuntimeError) as error:  # how libraries say that two dtypes do not promote
            common, reason = None, f" ({' '.join(str(error).split())})"
        if common is not None and is_of_kind(xp, common, _KINDS[kinds[0]]):
            return common
        msg = (
            f"{library_of(xp)} has no common dtype of the same kind for these: {describe(**operands)}{reason}. "
            f"Cast all of them to one dtype first, with xp.astype"
        )
        raise TypeError(msg)
    widest = dtype_name(dtypes[kinds.index(max(kinds))]) if max(kinds) != -1 else "a floating dtype"
    others = [name for name, operand in operands.items() if dtype_name(operand.dtype) != widest]
    msg = (
        f"the dtypes must be of one kind, integer, real floating or complex floating: {describe(**operands)}. "
        f"Cast {' and '.join(others)} to {widest} first, with xp.astype"
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
