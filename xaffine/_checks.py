"""Every check and its message. What a check finds is a plan, which is remembered by the signature of the operands."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from itertools import combinations_with_replacement
from typing import Any, Literal, NamedTuple

from xaffine._shapes import matrix_shape, shapes_differ, size
from xaffine.backends import _BY_TYPE, backend_of
from xaffine.backends.standard import KINDS, Array, Backend, is_known, shape_text

__all__ = [
    "OPERANDS",
    "Plan",
    "check",
    "check_cotangent",
    "check_devices",
    "check_out",
    "check_outs",
    "check_parameters",
    "check_sum",
    "check_tangents",
    "check_tuple",
    "describe",
]  # fmt: skip

OPERANDS: tuple[Literal["x"], Literal["W"], Literal["b"]] = ("x", "W", "b")
_MOST_PLANS = 4096  # that are remembered for a library before all are forgotten


class Plan(NamedTuple):
    """How to compute with operands of one signature. It holds no array."""

    backend: Backend
    product: Callable[..., Array]
    sum_rows: Callable[..., Array]
    """The primitives for arrays of these types, as `Backend` has them."""
    dtype: Any
    """The dtype in which to compute."""
    y_dtype: Any
    """The common dtype of x, W and b."""
    kind: str
    """The kind of all dtypes, in the standard's words."""
    n_batch_axes: int
    """How many leading axes of x are batch, 0 to ``x.ndim``."""
    y_shape: tuple[Any, ...]
    """The shape of y: that of the batch, then m."""
    x_matrix: tuple[Any, Any] | None
    y_matrix: tuple[Any, Any] | None
    """The shapes of x and y as matrices; None if they have them."""
    extents: tuple[int | None, ...]
    """N, n and m; None where they are not known yet."""
    casts: bool
    """Whether operands or results must be cast, or copied for the products to read them."""
    wanted: tuple[str, ...]
    """The operands whose gradients are wanted."""
    derived: dict[Any, Any]
    """What is remembered beside it: the plans with further arrays, by their signature, and compiled steps."""

    def __reduce__(self) -> Any:  # compiled steps cannot be pickled
        return _unpickled, self[:-1]


def _unpickled(*fields: Any) -> Plan:
    """The one plan of these fields, so that a library compiles its steps once."""
    plan = Plan._make((*fields, {}))
    plans, key = plan.backend.plans, ("unpickled", fields)
    known: Plan | None = plans.get(key)
    return _remember(plans, key, plan) if known is None else known


def check(x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> Plan:
    """Check the operands of a forward.

    Raises
    ------
    TypeError
        Dtypes that do not go together, arrays of two libraries, something that is no array,
        `n_batch_axes` not an integer.
    ValueError
        Shapes or devices that do not go together, `n_batch_axes` out of range.
    """
    backend = _BY_TYPE.get(type(x)) or _backend_or_none(x)
    signature = None if backend is None else backend.signature(x, W, b)
    if n_batch_axes is not None and type(n_batch_axes) is not int:
        n_batch_axes = _as_int(n_batch_axes)
        if type(n_batch_axes) is not int:
            signature = None  # it is refused; as a key of a dictionary, True would be 1
    if backend is None or signature is None:
        return _plan(x, W, b, n_batch_axes)
    key = signature, n_batch_axes
    plan: Plan | None = backend.plans.get(key)
    return plan or _remembered(backend, backend.plans, key, _plan, x, W, b, n_batch_axes)


def _as_int(value: Any) -> Any:
    """An integer of another type as an int; what is no integer as it is."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _remembered(backend: Backend, plans: dict[Any, Plan], key: Any, make: Callable[..., Plan], *arguments: Any) -> Plan:
    """Return the plan that is remembered for this way to promote dtypes, or make it of some arguments.

    Where nothing is promoted, every way is the same. Without a key, the plan is made each time.
    """
    if key is None:
        return make(*arguments)
    key_of_mixed = key, backend.promotion()
    known = plans.get(key_of_mixed)
    if known is not None:
        return known
    plan = make(*arguments)
    return _remember(plans, key_of_mixed if plan.casts else key, plan)


def _remember(plans: dict[Any, Plan], key: Any, plan: Plan) -> Plan:
    """Remember a plan; the memo is cleared when it holds `_MOST_PLANS`."""
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def _plan(x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> Plan:
    backend, dtype, kind = _check_together(**_named(x=x, W=W, b=b))
    _check_parameter_shapes(W, b, x=x)
    k = _batch_axes(x, W, b, n_batch_axes)
    n, m = W.shape
    features = size(x.shape[k:])
    if shapes_differ((features,), (n,)):
        given = f"{n_batch_axes}" if n_batch_axes is not None else f"{k} (the default)"
        msg = (
            f"with n_batch_axes = {given} x has features {shape_text(x.shape[k:])}, {features} values, "
            f"and W takes n = {n}: {describe(x=x, W=W, b=b)}. {_remedy_for_features(x, n)}"
        )
        raise ValueError(msg)
    y_shape = (*x.shape[:k], m)
    extents = (size(x.shape[:k]), n, m)
    product, sum_rows = backend.primitives(x, W, b, extents=extents)
    x_matrix = matrix_shape(x.shape, k)
    return Plan(
        backend=backend,
        product=product,
        sum_rows=sum_rows,
        dtype=dtype,
        y_dtype=dtype,
        kind=kind,
        n_batch_axes=k,
        y_shape=y_shape,
        x_matrix=x_matrix,
        y_matrix=matrix_shape(y_shape, k),
        extents=extents,
        casts=_must_cast(backend, dtype, x, W, b),
        wanted=OPERANDS if b is not None else OPERANDS[:2],
        derived={},
    )


def _must_cast(backend: Backend, dtype: Any, *arrays: Array | None) -> bool:
    """Whether some arrays need more than a new shape; of types that have no signature each call has to find out."""
    some = [array for array in arrays if array is not None]
    return backend.signature(*some) is None or any(
        array.dtype != dtype or not backend.is_readable(array) for array in some
    )


def check_parameters(W: Array, b: Array | None) -> None:
    """Check W and b alone; raises as `check` does."""
    _check_together(**_named(W=W, b=b))
    _check_parameter_shapes(W, b)


def check_cotangent(plan: Plan, dy: Array, x: Array, W: Array, b: Array | None, wrt: Any = OPERANDS) -> Plan:
    """Check dy against the forward that it belongs to, and the names of the gradients that are wanted.

    Raises as `check` does; ValueError too for another name.
    """
    wanted = plan.wanted if wrt is OPERANDS else _wanted(wrt, b)
    signature = plan.backend.signature(dy)
    key = None if signature is None else signature if wrt is OPERANDS else (signature, wanted)
    known: Plan | None = plan.derived.get(key)
    return known or _remembered(plan.backend, plan.derived, key, _plan_with_dy, plan, dy, x, W, b, wanted)


def _plan_with_dy(plan: Plan, dy: Array, x: Array, W: Array, b: Array | None, wanted: tuple[str, ...]) -> Plan:
    named = _named(dy=dy, x=x, W=W, b=b)
    backend, dtype, _ = _check_together(**named)
    if shapes_differ(dy.shape, plan.y_shape):
        msg = (
            f"dy must have the shape of y, {shape_text(plan.y_shape)}: {describe(**named)}. "
            f"Pass ∂L/∂y for this y, not broadcast and not summed"
        )
        raise ValueError(msg)
    product, sum_rows = backend.primitives(dy, x, W, extents=plan.extents)
    casts = plan.casts or dtype != plan.dtype or _must_cast(backend, dtype, dy)
    return plan._replace(product=product, sum_rows=sum_rows, dtype=dtype, casts=casts, wanted=wanted, derived={})


def check_tangents(
    plan: Plan,
    names: tuple[str, ...],
    tangents: tuple[Array | None, ...],
    x: Array,
    W: Array,
    b: Array | None,
    dy: Array | None = None,
) -> Plan:
    """Check arrays that go with x, W and b, in this order: None, or of their shapes. Names are for the messages.

    The plan that is returned computes in the common dtype of all. Raises as `check` does; ValueError too for one that
    goes with no bias.
    """
    signature = plan.backend.signature(*tangents) if dy is None else plan.backend.signature(dy, *tangents)
    key = None if signature is None else ("tangents", signature)
    known: Plan | None = plan.derived.get(key)
    arguments = plan, names, tangents, x, W, b, dy
    return known or _remembered(plan.backend, plan.derived, key, _plan_with_tangents, *arguments)


def _plan_with_tangents(
    plan: Plan,
    names: tuple[str, ...],
    tangents: tuple[Array | None, ...],
    x: Array,
    W: Array,
    b: Array | None,
    dy: Array | None,
) -> Plan:
    given = _given({"dy": dy, "x": x, "W": W, "b": b, **dict(zip(names, tangents, strict=True))})
    backend, dtype, _ = _check_together(**given)
    for name, tangent, letter, primal in zip(names, tangents, OPERANDS, (x, W, b), strict=True):
        if tangent is None:
            continue
        if primal is None:
            msg = f"{name} goes with b, which is None: {describe(**given)}. Pass a bias, or None for {name}"
            raise ValueError(msg)
        if shapes_differ(tangent.shape, primal.shape):
            msg = (
                f"{name} must have the shape of {letter}, {shape_text(primal.shape)}, never broadcast: "
                f"{describe(**given)}. Pass None where it is zero"
            )
            raise ValueError(msg)
    product, sum_rows = backend.primitives(*given.values(), extents=plan.extents)
    casts = _must_cast(backend, dtype, *given.values())
    return plan._replace(product=product, sum_rows=sum_rows, dtype=dtype, casts=casts, derived={})


def check_tuple(name: str, arrays: Any, lengths: tuple[int, ...], wanted: str) -> tuple[Any, ...]:
    """Check that arrays were passed as a tuple of one of some lengths."""
    if not isinstance(arrays, tuple) or len(arrays) not in lengths:
        got = f"a tuple of length {len(arrays)}" if isinstance(arrays, tuple) else f"a {type(arrays).__name__}"
        msg = f"{name} must be a tuple {wanted}; got {got}"
        raise TypeError(msg)
    return arrays


def _wanted(wrt: Any, b: Array | None) -> tuple[str, ...]:
    names = tuple(wrt) if isinstance(wrt, Iterable) else (wrt,)
    if any(name not in OPERANDS for name in names):
        msg = f"wrt names the gradients wanted, out of 'x', 'W' and 'b'; got {wrt!r}"
        raise ValueError(msg)
    return tuple(name for name in OPERANDS if name in names and not (name == "b" and b is None))


def check_out(plan: Plan, out: Array, x: Array, W: Array, b: Array | None) -> None:
    """Check a buffer for y, and that it lies apart from the operands; raises as `check_outs` does."""
    backend = plan.backend
    key = "out", backend.signature(out)
    if key in plan.derived and backend.can_fill((out,), (x, W, b)):
        return
    _check_buffer(plan, "out", out, x, plan.y_shape, plan.dtype)
    _check_apart(plan, {"out": out}, x=x, W=W, b=b)
    if key[1] is not None:
        plan.derived[key] = True


def check_outs(plan: Plan, out: Any, dy: Array, x: Array, W: Array, b: Array | None) -> None:
    """Check buffers for dx, dW and db, and that they lie apart from each other and from the operands.

    Raises
    ------
    TypeError
        It is no tuple of three; another library or dtype, or an array that cannot be written.
    ValueError
        Another shape or device; a buffer for what is not computed; two arrays, or elements of one buffer, share memory.
    """
    check_tuple("out", out, (3,), "(dx, dW, db), with None where a new array is wanted")
    backend = plan.backend
    key = "outs", backend.signature(*out)
    if key in plan.derived and backend.can_fill([buffer for buffer in out if buffer is not None], (dy, x, W, b)):
        return
    buffers = {}
    for letter, buffer, primal in zip(OPERANDS, out, (x, W, b), strict=True):
        if buffer is None:
            continue
        if letter not in plan.wanted:
            msg = f"out holds a buffer for d{letter}, which is not computed: {letter} is not in wrt, or is None"
            raise ValueError(msg)
        _check_buffer(plan, f"out's d{letter}", buffer, primal, primal.shape, primal.dtype)
        buffers[f"out's d{letter}"] = buffer
    _check_apart(plan, buffers, dy=dy, x=x, W=W, b=b)
    if key[1] is not None:
        plan.derived[key] = True


def _check_buffer(plan: Plan, name: str, out: Array, like: Array, shape: tuple[Any, ...], dtype: Any) -> None:
    """Check a buffer for a result of that shape and dtype, which lives where `like` lives.

    Raises
    ------
    TypeError
        Another library or dtype, or an array that cannot be written.
    ValueError
        Another shape or device.
    """
    error: type[Exception] = TypeError
    backend = plan.backend
    if type(out) is not type(like) and _backend_or_none(out) is not backend:
        fault = "must be an array of the library of the operands"
    elif reason := backend.why_no_operand(name, out):
        raise TypeError(reason)
    elif (device := backend.device_of(out)) != (expected := backend.device_of(like)) and None not in (device, expected):
        fault, error = f"must be on the device of the operands, {expected}", ValueError
    elif out.shape != shape and shapes_differ(out.shape, shape):
        fault, error = f"must have the shape {shape_text(shape)}", ValueError
    elif not backend.fills_unknown and not all(map(is_known, (*out.shape, *shape))):
        error = ValueError
        fault = "cannot be filled before all extents are known (in Dask: array.compute_chunk_sizes())"
    elif out.dtype != dtype:
        fault = f"must have the dtype {backend.dtype_name(dtype)}"
    elif reason := backend.why_not_writable(out):
        fault = f"cannot be written, since {reason}"
    else:
        return
    msg = (
        f"{name} {fault}: {describe(**{name: out})}. Pass a buffer of shape {shape_text(shape)} and dtype "
        f"{backend.dtype_name(dtype)} that lives where x, W and b do, or none"
    )
    raise error(msg)


def _check_apart(plan: Plan, buffers: dict[str, Array], **operands: Array | None) -> None:
    """Check that what is written to a buffer changes no operand, no other buffer, and nothing that is recorded.

    Raises
    ------
    TypeError
        The library follows what is done with one of them.
    ValueError
        Two of them, or elements of one buffer, share memory.
    """
    backend = plan.backend
    given = _given(operands)
    recorded = [name for name, array in (given | buffers).items() if backend.is_recorded(array)]
    if recorded and buffers:
        msg = (
            f"{' and '.join(buffers)} cannot be filled: autograd or another transform of torch follows "
            f"{' and '.join(recorded)}. Call under torch.no_grad(), pass detached tensors, or no buffer"
        )
        raise TypeError(msg)
    arrays = given | buffers
    for name, other in combinations_with_replacement(reversed(arrays), 2):
        if name not in buffers:
            continue
        same, first, second = name == other, arrays[name], arrays[other]
        if backend.overlaps_itself(first) if same else backend.share_memory(first, second):
            msg = (
                f"{name} overlaps {'itself' if same else other} in memory: "
                f"{describe(**{name: first, other: second})}. Pass a buffer of its own"
            )
            raise ValueError(msg)


def check_sum(name: str, old: Array, new: Array) -> Plan:
    """Check that a gradient can be added to one that is there.

    Raises
    ------
    TypeError
        They are arrays of two libraries, or of dtypes that do not go together.
    ValueError
        Shapes or devices that differ.
    """
    backend = _BY_TYPE.get(type(old)) or _backend_or_none(old)
    signature = None if backend is None else backend.signature(old, new)
    key = "sum", signature
    known: Plan | None = None if backend is None or signature is None else backend.plans.get(key)
    if known is not None and known.backend.signs_devices:
        return known
    named = {f"the {name} that is there": old, f"the new {name}": new}
    if known is not None:
        known.backend.check_devices(**named)
        return known
    backend, _, kind = _check_together(**named)
    if shapes_differ(old.shape, new.shape):
        msg = f"gradients that are added up must have one shape: {describe(**named)}. Set layer.{name} = None first"
        raise ValueError(msg)
    plan = Plan(
        backend, *backend.primitives(old, new), backend.wide(old.dtype), old.dtype, kind, 0, old.shape, None, None, (),
        casts=old.dtype != new.dtype, wanted=(), derived={},
    )  # fmt: skip
    return plan if signature is None else _remember(backend.plans, key, plan)


def check_devices(plan: Plan, **operands: Array | None) -> None:
    """Check the devices of operands with which a step does not compute, if their signature leaves them out."""
    if not plan.backend.signs_devices:
        plan.backend.check_devices(**_given(operands))


def _given(operands: dict[str, Array | None]) -> dict[str, Array]:
    return {name: array for name, array in operands.items() if array is not None}


def _named(b: Array | None, **operands: Any) -> dict[str, Any]:
    """Name the operands that take part: b only if there is one."""
    return operands if b is None else {**operands, "b": b}


def describe(**operands: Any) -> str:
    """Say of every operand what it is: dtype, shape, library and device."""
    return "; ".join(f"{name} is {_describe(operand)}" for name, operand in operands.items())


def _describe(operand: Any) -> str:
    backend = _backend_or_none(operand)
    if backend is None:
        return repr(operand) if operand is None else f"a {type(operand).__module__}.{type(operand).__qualname__}"
    return backend.describe(operand)


def _backend_or_none(operand: Any) -> Backend | None:
    try:
        return backend_of(operand)
    except TypeError:
        return None


# Methods that make an array of what the asarray of a library would misread: a masked array would lose its mask, and a
# sparse matrix of SciPy would become one object.
_CONVERSIONS = ("filled", "toarray", "todense", "to_numpy")


def _check_together(**operands: Any) -> tuple[Backend, Any, str]:
    """Check that operands are arrays of one library, device and kind of dtype; return backend, common dtype, kind."""
    found: dict[str, Backend] = {}
    for name, operand in operands.items():
        if (backend := _backend_or_none(operand)) is not None:
            found[name] = backend
            if reason := backend.why_no_operand(name, operand):
                raise TypeError(reason)
    first = next(iter(found.values()), None)
    library = "numpy" if first is None else first.namespace.removeprefix("array_api_compat.")
    if strangers := [name for name in operands if name not in found]:
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
    others = [name for name, backend in found.items() if backend is not first]
    if others or first is None:
        msg = (
            f"arrays of two libraries: {describe(**operands)}. Bring {' and '.join(others)} to "
            f"{'numpy' if first is None else first.name} first; "
            f"to_numpy and from_numpy of xaffine.backends.get(NAME) do"
        )
        raise TypeError(msg)
    dtype, kind = _check_dtypes(first, operands)
    first.check_devices(**operands)
    return first, dtype, kind


def _check_dtypes(backend: Backend, operands: dict[str, Any]) -> tuple[Any, str]:
    dtypes = [operand.dtype for operand in operands.values()]
    kinds = [backend.kind(dtype) for dtype in dtypes]
    if kinds[0] is not None and len(set(kinds)) == 1:
        reason = ""
        try:
            common = backend.promote(*dtypes)
        except (TypeError, ValueError, RuntimeError) as error:  # how libraries say that two dtypes do not promote
            common, reason = None, f" ({' '.join(str(error).split())})"
        if common is not None and backend.kind(common) == kinds[0]:
            return common, kinds[0]
        msg = (
            f"{backend.name} has no common dtype of the same kind for these: {describe(**operands)}{reason}. "
            f"Cast all of them to one dtype first, with xp.astype"
        )
        raise TypeError(msg)
    ranks = [KINDS.index(kind) if kind else -1 for kind in kinds]
    widest = backend.dtype_name(dtypes[ranks.index(max(ranks))]) if max(ranks) != -1 else "a floating dtype"
    others = [name for name, operand in operands.items() if backend.dtype_name(operand.dtype) != widest]
    msg = (
        f"the dtypes must be of one kind, integer, real floating or complex floating: {describe(**operands)}. "
        f"Cast {' and '.join(others)} to {widest} first, with xp.astype"
    )
    raise TypeError(msg)


def _check_parameter_shapes(W: Array, b: Array | None, **others: Any) -> None:
    if W.ndim != 2:
        msg = f"W must be 2-D, (n, m): {describe(**others, W=W, b=b)}. Reshape it first"
        raise ValueError(msg)
    if b is not None and shapes_differ(b.shape, W.shape[1:]):
        msg = (
            f"b must have the shape (m,) = {shape_text(W.shape[1:])}, never broadcast: {describe(**others, W=W, b=b)}. "
            f"Reshape it first, or pass None for no bias"
        )
        raise ValueError(msg)


def _batch_axes(x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> int:
    """Resolve `n_batch_axes` to the number of leading axes of x that are batch."""
    ndim = int(x.ndim)
    if ndim == 0:
        msg = f"x must have at least one axis: {describe(x=x, W=W, b=b)}. Reshape it to (n,) or (N, n) first"
        raise ValueError(msg)
    if n_batch_axes is None:
        return 0 if ndim == 1 else 1
    if type(n_batch_axes) is not int:
        msg = f"n_batch_axes must be an int or None, not {n_batch_axes!r}: {describe(x=x, W=W, b=b)}"
        raise TypeError(msg)
    k = n_batch_axes
    if not -ndim <= k <= ndim:
        msg = (
            f"n_batch_axes = {k} is out of range for an x with {ndim} axes: {describe(x=x, W=W, b=b)}. "
            f"Pass one of {-ndim} to {ndim}; x.shape[:n_batch_axes] is the batch"
        )
        raise ValueError(msg)
    return k if k >= 0 else ndim + k


def _remedy_for_features(x: Array, n: Any) -> str:
    fitting = [k for k in range(x.ndim + 1) if size(x.shape[k:]) == n]
    if fitting:
        return f"n_batch_axes = {' or '.join(map(str, fitting))} would fit"
    return f"No n_batch_axes fits; x needs {n} features a sample"
