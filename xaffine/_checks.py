"""What is checked before anything is computed. What the checks find is a plan, remembered by the signature of operands.

Whether arrays can be computed with together, by their libraries, devices and dtypes, is for `xaffine.backends` to say.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from xaffine._shapes import matrix_shape, shapes_differ, size
from xaffine.backends import _BY_TYPE, _backend_or_none, _describe, _together
from xaffine.backends.standard import Array, Backend, is_known, shape_text

__all__ = [
    "OPERANDS", "Plan", "SumPlan", "check", "check_cotangent", "check_out", "check_outs", "check_parameters",
    "check_sums", "check_tangents", "check_tuple", "check_with_cotangent",
]  # fmt: skip

OPERANDS: tuple[Literal["x"], Literal["W"], Literal["b"]] = ("x", "W", "b")
_TRANSPOSED = "If W is in torch's layout, (m, n), pass W.T"
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
    operands: tuple[Any, ...]
    """What else is checked against them, by which copies differ: where x is, its shape, and all dtypes."""
    derived: dict[Any, Any]
    """What is remembered beside it: the plans with further arrays, by their signature, and compiled steps."""

    def __reduce__(self) -> Any:  # compiled steps cannot be pickled
        return _unpickled, self[:-1]


def _unpickled(*fields: Any) -> Plan:
    """The one plan of these fields, so that a library compiles its steps once."""
    plan = Plan._make((*fields, {}))
    plans, key = plan.backend.plans, (_unpickled, fields)
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
    if n_batch_axes is not None and type(n_batch_axes) is not int:  # as keys of a dictionary True and 1.0 are 1
        n_batch_axes = _as_int(n_batch_axes, x=x, W=W, b=b)
    backend = _BY_TYPE.get(type(x))
    if backend is None:  # the first array of its type, or no array
        backend = _plan(x, W, b, n_batch_axes).backend
    signature = backend.signature(x, W, b)
    if signature is None:
        return _plan(x, W, b, n_batch_axes)
    key = signature, n_batch_axes
    plan: Plan | None = backend.plans.get(key)
    return plan or _remembered(backend, backend.plans, key, _plan, x, W, b, n_batch_axes)


def _as_int(n_batch_axes: Any, **operands: Any) -> int:
    if type(n_batch_axes) is not bool and not str(getattr(n_batch_axes, "dtype", None)).endswith("bool"):
        with contextlib.suppress(TypeError):
            return operator.index(n_batch_axes)
    msg = f"n_batch_axes must be an int or None, not {n_batch_axes!r}: {_describe(**operands)}"
    raise TypeError(msg)


def _remembered(backend: Backend, plans: dict[Any, Any], key: Any, make: Callable[..., Any], *arguments: Any) -> Any:
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


def _remember(plans: dict[Any, Any], key: Any, plan: Any) -> Any:
    """Remember a plan; the memo is cleared when it holds `_MOST_PLANS`."""
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def _plan(x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> Plan:
    backend, dtype, kind = _together(**_named(x=x, W=W, b=b))
    _check_parameter_shapes(W, b, x=x)
    k = _batch_axes(x, W, b, n_batch_axes)
    n, m = W.shape
    features = size(x.shape[k:])
    if shapes_differ((features,), (n,)):
        given = f"{n_batch_axes}" if n_batch_axes is not None else f"{k} (the default)"
        msg = (
            f"with n_batch_axes = {given} x has features {shape_text(x.shape[k:])}, {features} values, "
            f"and W takes n = {n}: {_describe(x=x, W=W, b=b)}. {_remedy_for_features(x, W, b, k)}"
        )
        raise ValueError(msg)
    y_shape = (*x.shape[:k], m)
    extents = (size(x.shape[:k]), n, m)
    product, sum_rows = backend.primitives(x, W, b, extents=extents)
    return Plan(
        backend=backend, product=product, sum_rows=sum_rows, dtype=dtype, y_dtype=dtype, kind=kind, n_batch_axes=k,
        y_shape=y_shape, x_matrix=matrix_shape(x.shape, k), y_matrix=matrix_shape(y_shape, k), extents=extents,
        casts=_must_cast(backend, dtype, x, W, b), wanted=OPERANDS if b is not None else OPERANDS[:2],
        operands=(str(backend.device_of(x)), x.shape, x.dtype, W.dtype, None if b is None else b.dtype), derived={},
    )  # fmt: skip


def _must_cast(backend: Backend, dtype: Any, *arrays: Array | None) -> bool:
    """Whether some arrays need more than a new shape; of types that have no signature each call has to find out."""
    some = [array for array in arrays if array is not None]
    return backend.signature(*some) is None or any(
        array.dtype != dtype or not backend.is_readable(array) for array in some
    )


def check_parameters(W: Array, b: Array | None) -> None:
    """Check W and b alone; raises as `check` does."""
    sizes = W if isinstance(W, tuple) else (W,) if b is None else (W, b)
    if sizes and all(isinstance(size, int | float | np.integer) for size in sizes):
        given = ", ".join(f"{size:.0f}" for size in sizes)
        msg = (
            f"AffineLayer takes arrays, W (n, m) and b (m,); got the numbers {given}. For random weights call "
            f"AffineLayer.random({given if len(sizes) == 2 else 'n, m'})"
        )
        raise TypeError(msg)
    _together(**_named(W=W, b=b))
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


def check_with_cotangent(dy: Array, x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> Plan:
    """Check the operands of a forward and its dy in one look-up, if they were seen before; raises as `check` does."""
    backend = _BY_TYPE.get(type(x))
    if backend is None or not (n_batch_axes is None or type(n_batch_axes) is int):
        return check_cotangent(check(x, W, b, n_batch_axes), dy, x, W, b)
    key = backend.signature(dy, x, W, b), n_batch_axes
    known: Plan | None = backend.plans.get(key)
    if known is not None:
        return known
    plan = check_cotangent(check(x, W, b, n_batch_axes), dy, x, W, b)
    return plan if plan.casts else _remember(backend.plans, key, plan)


def _plan_with_dy(plan: Plan, dy: Array, x: Array, W: Array, b: Array | None, wanted: tuple[str, ...]) -> Plan:
    named = _named(dy=dy, x=x, W=W, b=b)
    plan_with_dy = _plan_of_all(plan, named, (dy, x, W))
    if shapes_differ(dy.shape, plan.y_shape):
        msg = (
            f"dy must have the shape of y, {shape_text(plan.y_shape)}: {_describe(**named)}. "
            f"Pass ∂L/∂y for this y, not broadcast and not summed"
        )
        raise ValueError(msg)
    return plan_with_dy._replace(wanted=wanted)


def _plan_of_all(plan: Plan, operands: dict[str, Array], multiplied: Iterable[Array]) -> Plan:
    """The plan of some operands, further ones included, and the primitives for those that are multiplied."""
    backend, dtype, _ = _together(**operands)
    product, sum_rows = backend.primitives(*multiplied, extents=plan.extents)
    casts = _must_cast(backend, dtype, *operands.values())
    return plan._replace(product=product, sum_rows=sum_rows, dtype=dtype, casts=casts, derived={})


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
    signature = plan.backend.signature(*tangents)
    key = None if signature is None else (_plan_with_tangents, signature)
    known: Plan | None = plan.derived.get(key)
    if known is not None:  # before the arguments are collected, which takes as long
        return known
    made: Plan = _remembered(plan.backend, plan.derived, key, _plan_with_tangents, plan, names, tangents, x, W, b, dy)
    return made


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
    plan_of_all = _plan_of_all(plan, given, given.values())
    for name, tangent, letter, primal in zip(names, tangents, OPERANDS, (x, W, b), strict=True):
        if tangent is None:
            continue
        if primal is None:
            msg = f"{name} goes with b, which is None: {_describe(**given)}. Pass a bias, or None for {name}"
            raise ValueError(msg)
        if shapes_differ(tangent.shape, primal.shape):
            msg = (
                f"{name} must have the shape of {letter}, {shape_text(primal.shape)}, never broadcast: "
                f"{_describe(**given)}. Pass None where it is zero"
            )
            raise ValueError(msg)
    return plan_of_all


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
    key = check_out, plan.backend.signature(out)
    if key in plan.derived and plan.backend.can_fill((out,), (x, W, b)):
        return
    _check_buffer(plan, "out", out, x, plan.y_shape, plan.dtype)
    _check_apart(plan, key, {"out": out}, x=x, W=W, b=b)


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
    key = check_outs, plan.backend.signature(*out)
    if key in plan.derived and plan.backend.can_fill(out, (dy, x, W, b)):
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
    _check_apart(plan, key, buffers, dy=dy, x=x, W=W, b=b)


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
    is_ours = type(out) is type(like) or _backend_or_none(out) is backend
    if is_ours:
        backend.check_operands(**{name: out})
    if not is_ours:
        fault = "must be an array of the library of the operands"
    elif (device := backend.device_of(out)) != (expected := backend.device_of(like)) and None not in (device, expected):
        fault, error = f"must be on the device of the operands, {backend.device_name(expected)}", ValueError
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
        f"{name} {fault}: {_describe(**{name: out})}. Pass a buffer of shape {shape_text(shape)} and dtype "
        f"{backend.dtype_name(dtype)} that lives where x, W and b do, or none"
    )
    raise error(msg)


def _check_apart(plan: Plan, key: Any, buffers: dict[str, Array], **operands: Array | None) -> None:
    """Check that what is written to a buffer changes no operand, no other buffer, and nothing that is recorded.

    That buffers of this key fit the plan is then remembered.

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
    names = list(arrays)[::-1]
    for name, other in [(name, other) for i, name in enumerate(names) if name in buffers for other in names[i:]]:
        same, first, second = name == other, arrays[name], arrays[other]
        if backend.overlaps_itself(first) if same else backend.share_memory(first, second):
            msg = (
                f"{name} overlaps {'itself' if same else other} in memory: "
                f"{_describe(**{name: first, other: second})}. Pass a buffer of its own"
            )
            raise ValueError(msg)
    if key[1] is not None:
        plan.derived[key] = True


_Pair: TypeAlias = tuple[Array | None, Array | None]


class SumPlan(NamedTuple):
    """How to add gradients to those that are there. It holds no array."""

    backend: Backend
    casts: bool
    """Whether a gradient has another dtype than the one that it is added to."""
    widens: bool
    """Whether running sums are kept in a wider dtype beside one of them."""
    derived: dict[Any, Any]
    """Steps that are compiled for it."""


def check_sums(backend: Backend, old: _Pair, new: _Pair) -> SumPlan:
    """Check that new gradients by W and b, or one of them, can be added to those that are there.

    Raises
    ------
    TypeError
        They are arrays of two libraries, or of dtypes that do not go together.
    ValueError
        Shapes or devices that differ.
    """
    signature = backend.signature(*old, *new)
    key = None if signature is None else (_sum_plan, signature)
    known: SumPlan | None = backend.plans.get(key)
    return known or _remembered(backend, backend.plans, key, _sum_plan, backend, old, new)


def _sum_plan(backend: Backend, old: _Pair, new: _Pair) -> SumPlan:
    casts = widens = False
    for name, array, term in (("dW", old[0], new[0]), ("db", old[1], new[1])):
        if array is None or term is None:
            continue
        named = {f"the {name} that is there": array, f"the new {name}": term}
        _together(**named)
        if shapes_differ(array.shape, term.shape):
            msg = (
                f"gradients that are added up must have one shape: {_describe(**named)}. Set layer.{name} = None first"
            )
            raise ValueError(msg)
        casts = casts or array.dtype != term.dtype
        widens = widens or backend.wide(array.dtype) != array.dtype
    return SumPlan(backend, casts, widens, {})


def _given(operands: dict[str, Array | None]) -> dict[str, Array]:
    return {name: array for name, array in operands.items() if array is not None}


def _named(b: Array | None, **operands: Any) -> dict[str, Any]:
    """Name the operands that take part: b only if there is one."""
    return operands if b is None else {**operands, "b": b}


def _check_parameter_shapes(W: Array, b: Array | None, **others: Any) -> None:
    if W.ndim != 2:
        msg = f"W must be 2-D, (n, m): {_describe(**others, W=W, b=b)}. Reshape it first"
        raise ValueError(msg)
    if b is not None and shapes_differ(b.shape, W.shape[1:]):
        is_transposed = not shapes_differ(b.shape, W.shape[:1])
        fits = size(b.shape) == W.shape[1]
        remedy = f"{'Reshape it first' if fits else 'Pass one value for each output'}, or pass None for no bias"
        msg = (
            f"b must have the shape (m,) = {shape_text(W.shape[1:])}, never broadcast: "
            f"{_describe(**others, W=W, b=b)}. "
            f"{_TRANSPOSED if is_transposed else remedy}"
        )
        raise ValueError(msg)


def _batch_axes(x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> int:
    """Resolve `n_batch_axes` to the number of leading axes of x that are batch."""
    ndim = int(x.ndim)
    if ndim == 0:
        msg = f"x must have at least one axis: {_describe(x=x, W=W, b=b)}. Reshape it to (n,) or (N, n) first"
        raise ValueError(msg)
    if n_batch_axes is None:
        return 0 if ndim == 1 else 1
    k = n_batch_axes
    if not -ndim <= k <= ndim:
        msg = (
            f"n_batch_axes = {k} is out of range for an x with {ndim} axes: {_describe(x=x, W=W, b=b)}. "
            f"Pass one of {-ndim} to {ndim}; x.shape[:n_batch_axes] is the batch"
        )
        raise ValueError(msg)
    return k if k >= 0 else ndim + k


def _remedy_for_features(x: Array, W: Array, b: Array | None, k: int) -> str:
    n, m = W.shape
    fitting, fitting_m = ([j for j in range(x.ndim + 1) if size(x.shape[j:]) == extent] for extent in (n, m))
    if fitting:
        return f"n_batch_axes = {' or '.join(map(str, fitting))} would fit"
    if b is None and k in fitting_m:  # else b has shown that m is right
        return _TRANSPOSED
    if b is None and fitting_m:
        return f"{_TRANSPOSED} and n_batch_axes={fitting_m[0]}"
    return f"No n_batch_axes fits; x needs {n} features a sample"
