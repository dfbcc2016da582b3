"""The affine map and its derivatives, as pure functions.

For a scalar L that depends on y = x W + b, with dy = ∂L/∂y,

    dx = dy Wᵀ        dW = xᵀ dy        db = Σ over the batch of dy

and where the operands move with the velocities ẋ, Ẇ and ḃ, y moves with

    ẏ = ẋ W + x Ẇ + ḃ

Every function takes the same way: check, flatten to matrices, multiply, restore the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from xaffine.backends import Array, computing_with, namespace_of, share_memory
from xaffine.kernels import compiler_for, kernel_of
from xaffine.kernels import numpy as numpy_kernel
from xaffine.meshes import automatic, split_of
from xaffine.shapes import (
    Operands,
    cast,
    check,
    check_apart,
    check_cotangent,
    check_out,
    check_tangents,
    flatten,
    restore,
)  # fmt: skip

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Gradients", "affine", "affine_backward", "affine_jvp", "affine_vjp"]


class Gradients(NamedTuple):
    """The derivatives of a scalar L by the operands of an affine map; None where not asked for.

    Attributes
    ----------
    dx : array or None
        ∂L/∂x, with the shape and the dtype of x.
    dW : array or None
        ∂L/∂W, with the shape and the dtype of W.
    db : array or None
        ∂L/∂b, with the shape and the dtype of b; None without a bias.

    Examples
    --------
    >>> import numpy as np
    >>> from xaffine import affine_backward
    >>> gradients = affine_backward(np.ones((2, 1)), np.ones((2, 3)), np.ones((3, 1)))
    >>> gradients.dW.tolist(), gradients.db
    ([[2.0], [2.0], [2.0]], None)
    """

    dx: Array | None
    dW: Array | None
    db: Array | None


Vjp: TypeAlias = Callable[..., Gradients]
Outs: TypeAlias = tuple[Array | None, Array | None, Array | None]
"""Buffers for dx, dW and db."""

OPERANDS = ("x", "W", "b")


def affine(
    x: Array,
    W: Array,
    b: Array | None = None,
    /,
    *,
    n_batch_axes: int | None = None,
    out: Array | None = None,
) -> Array:
    """Compute y = x W + b.

    Parameters
    ----------
    x : array
        The input, of shape ``batch + features``: ``x.shape[:n_batch_axes]`` is the batch and the product of
        ``x.shape[n_batch_axes:]`` is n. Any extent may be 0.
    W : array, shape (n, m)
        The weights.
    b : array, shape (m,), optional
        The bias; without it y = x W.
    n_batch_axes : int, optional
        Where the slice is, as in Python: 1 flattens a tensor (N, d1, d2, ...) into n = d1·d2·... features,
        -1 maps the last axis of (..., n), 0 takes the whole x as one sample. By default 0 for a 1-D x
        (a single vector) and 1 for any other.
    out : array, shape batch + (m,), optional
        A buffer of the dtype of y that is filled with it and returned.

    Returns
    -------
    array, shape batch + (m,)
        In the common dtype of x, W and b, of their library and on their device.

    Raises
    ------
    TypeError
        Dtypes of different kinds or bool, arrays of two libraries, something that is no array, an `out` of
        another dtype or one that cannot be written.
    ValueError
        Shapes or devices that do not go together, `n_batch_axes` out of range, an `out` that overlaps an operand.

    Notes
    -----
    All operands are of one kind: integer (exact as long as the sums fit the dtype), real floating, or complex
    floating. Within a kind they promote by the array API standard, and the products are computed in the
    common dtype, also where ``torch.autocast`` is on. NaN and infinity are data and propagate; that includes
    0 · NaN = NaN, but for zeros that a sparse array does not store: no product of these is ever computed.

    Examples
    --------
    >>> import numpy as np
    >>> from xaffine import affine
    >>> x = np.asarray([[1.0, 2.0], [3.0, 4.0]])
    >>> W = np.asarray([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
    >>> affine(x, W, np.asarray([10.0, 20.0, 30.0])).tolist()
    [[11.0, 22.0, 36.0], [13.0, 24.0, 44.0]]
    """
    return affine_vjp(x, W, b, n_batch_axes=n_batch_axes, out=out)[0]


def affine_backward(
    dy: Array,
    x: Array,
    W: Array,
    b: Array | None = None,
    /,
    *,
    n_batch_axes: int | None = None,
    wrt: Iterable[str] = OPERANDS,
    out: Outs | None = None,
) -> Gradients:
    """Compute the gradients of a scalar L from dy = ∂L/∂y, where y = x W + b.

    Parameters
    ----------
    dy : array, shape batch + (m,)
        ∂L/∂y, of the same kind of dtype as the operands.
    x, W, b, n_batch_axes
        As in `affine`. Of b only shape and dtype matter; with None there is no db.
    wrt : iterable of {"x", "W", "b"}, optional
        The gradients wanted. The others are None and cost nothing.
    out : tuple (dx, dW, db) of arrays or None, optional
        Buffers with the shapes and dtypes of x, W and b that are filled and returned; None where a new array
        is wanted. All of them are checked before one is written.

    Returns
    -------
    Gradients
        The named tuple ``(dx, dW, db)``; each has the shape and dtype of what it is the gradient of.

    Raises
    ------
    TypeError, ValueError
        As `affine`; ValueError too if dy has another shape than y, `wrt` another name, or buffers overlap.

    Notes
    -----
    With y_ij = Σ_k x_ik W_kj + b_j the chain rule gives dx_ik = Σ_j dy_ij W_kj, dW_kj = Σ_i x_ik dy_ij and
    db_j = Σ_i dy_ij: dx = dy Wᵀ, dW = xᵀ dy, and db the sum of dy over the batch. The products are computed in
    the common dtype of dy, x, W and b, and each gradient is cast to the dtype of its primal.

    Complex operands use the same formulas with the plain transpose, so the result is the transpose of the
    Jacobian applied to dy, as in JAX. Conjugate dy before and the gradients after for torch's convention.

    Examples
    --------
    >>> import numpy as np
    >>> from xaffine import affine_backward
    >>> x, W = np.asarray([[1.0, 2.0], [3.0, 4.0]]), np.asarray([[1.0], [5.0]])
    >>> dx, dW, db = affine_backward(np.asarray([[1.0], [2.0]]), x, W, np.zeros(1))
    >>> dx.tolist(), dW.tolist(), db.tolist()
    ([[1.0, 5.0], [2.0, 10.0]], [[7.0], [10.0]], [3.0])
    """
    wanted = _check_wrt(wrt, b)
    compiled = None if out is not None or type(dy) is not type(x) else _compiled(x, W, b, n_batch_axes)
    if compiled is not None:
        try:
            return compiled.backward(dy, x, W, b, n_batch_axes, wanted)
        except ValueError:  # told below, where the devices are known, too
            pass
    return _backward(check(x, W, b, n_batch_axes), dy, out, wanted)


def affine_vjp(
    x: Array,
    W: Array,
    b: Array | None = None,
    /,
    *,
    n_batch_axes: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Vjp]:
    """Compute y = x W + b and the function that pulls dy back to the gradients.

    Parameters
    ----------
    x, W, b, n_batch_axes, out
        As in `affine`.

    Returns
    -------
    y : array, shape batch + (m,)
        As from `affine`.
    vjp : callable
        ``vjp(dy, out=None, wrt=("x", "W", "b"))`` returns `Gradients`, as `affine_backward` with these operands
        does. It holds x, W and b by reference and nothing else, may be called any number of times and from several
        threads, and can be pickled. Operands that are changed in place before it is called give the gradients at
        the new values.

    Raises
    ------
    TypeError, ValueError
        As `affine`; `vjp` as `affine_backward`.

    Notes
    -----
    What ``jax.jit`` compiles must return arrays, and `vjp` is a function: call it inside, or compile what returns the
    gradients, ``jax.jit(lambda dy, x, W, b: affine_backward(dy, x, W, b))``.

    Examples
    --------
    >>> import numpy as np
    >>> from xaffine import affine_vjp
    >>> y, vjp = affine_vjp(np.asarray([1.0, 2.0]), np.asarray([[3.0], [4.0]]))
    >>> y.tolist(), vjp(np.asarray([2.0])).dW.tolist()
    ([11.0], [[2.0], [4.0]])
    """
    compiled = None if out is not None or type(x) is np.ndarray else _compiled(x, W, b, n_batch_axes)
    if compiled is not None:
        try:
            return compiled.forward(x, W, b, n_batch_axes), partial(_pull_back, x, W, b, n_batch_axes)
        except ValueError:  # told below, where the devices are known, too
            pass
    operands = check(x, W, b, n_batch_axes)
    return _forward(operands, out), partial(_backward, operands)


def affine_jvp(
    primals: tuple[Array, ...], tangents: tuple[Array | None, ...], /, *, n_batch_axes: int | None = None
) -> tuple[Array, Array]:
    """Compute y = x W + b and its derivative along a direction, ẏ = ẋ W + x Ẇ + ḃ.

    Parameters
    ----------
    primals : tuple (x, W) or (x, W, b)
        As in `affine`; b may be None.
    tangents : tuple (x_dot, W_dot) or (x_dot, W_dot, b_dot)
        The direction: each of the shape of its primal and of the same kind of dtype, or None where it is zero. A zero
        costs nothing.
    n_batch_axes : int, optional
        As in `affine`.

    Returns
    -------
    y : array, shape batch + (m,)
        In the common dtype of x, W and b.
    y_dot : array, shape batch + (m,)
        Likewise.

    Raises
    ------
    TypeError, ValueError
        As `affine`; ValueError too for a tangent of another shape than its primal, and for one of no bias.

    Notes
    -----
    Forward mode: one product with the Jacobian, where `affine_vjp` takes one with its transpose. For every direction
    and every dy, ⟨ẏ, dy⟩ = ⟨ẋ, dx⟩ + ⟨Ẇ, dW⟩ + ⟨ḃ, db⟩.

    Examples
    --------
    >>> import numpy as np
    >>> from xaffine import affine_jvp
    >>> x, W, b = np.asarray([[1.0, 2.0]]), np.asarray([[3.0], [4.0]]), np.asarray([5.0])
    >>> y, y_dot = affine_jvp((x, W, b), (np.asarray([[1.0, 0.0]]), None, np.asarray([2.0])))
    >>> y.tolist(), y_dot.tolist()
    ([[16.0]], [[5.0]])
    """
    x, W, b = triple("primals", primals)
    x_dot, W_dot, b_dot = triple("tangents", tangents)
    operands = check(x, W, b, n_batch_axes)
    dtype = check_tangents(operands, {"x_dot": x_dot, "W_dot": W_dot, "b_dot": b_dot})
    return _forward(operands, None), along(operands, x_dot, W_dot, b_dot, dtype, operands.dtype)


def triple(name: str, some: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
    """What came for x, W and b, where that for b may be left out."""
    if not isinstance(some, tuple) or len(some) not in (2, 3):
        came = f"a tuple of {len(some)}" if isinstance(some, tuple) else f"a {type(some).__name__}"
        msg = f"{name} must be a tuple of two or three, for x, W and b; it came as {came}"
        raise TypeError(msg)
    return (*some, None)[:3]


def along(
    operands: Operands, x_dot: Array | None, W_dot: Array | None, b_dot: Array | None, dtype: Any, own: Any
) -> Array:
    """ẏ = ẋ W + x Ẇ + ḃ of checked arrays, computed in one dtype and returned in its own."""
    x, W, b, k, *_ = operands
    xp = namespace_of(x)
    if (call := automatic(x=x, W=W, b=b, x_dot=x_dot, W_dot=W_dot, b_dot=b_dot)) is not None:
        return call(
            lambda x, W, b, *dots: along(operands._replace(x=x, W=W, b=b), dots[0], dots[1], dots[2], dtype, own),
            split_of(x)[:k] + split_of(W)[1:],
        )

    def product(x: Array, W: Array, b: Array | None) -> Array:
        factors = cast(xp, flatten(xp, x, k), dtype), cast(xp, W, dtype)
        return kernel_of(*factors).forward(*factors, b)

    with computing_with(x):
        bias = None if b_dot is None else cast(xp, b_dot, dtype)
        if x_dot is not None and W_dot is not None:
            y_dot = xp.add(product(x_dot, W, bias), product(x, W_dot, None))
        elif x_dot is not None:
            y_dot = product(x_dot, W, bias)
        elif W_dot is not None:
            y_dot = product(x, W_dot, bias)
        else:  # a layer without features is its bias
            matrix = flatten(xp, x, k)
            y_dot = kernel_of(matrix, W).forward(cast(xp, matrix[:, :0], dtype), cast(xp, W[:0, :], dtype), bias)
        return restore(xp, cast(xp, y_dot, own), operands.y_shape, k)


def _pull_back(
    x: Array,
    W: Array,
    b: Array | None,
    n_batch_axes: int | None,
    dy: Array,
    out: Outs | None = None,
    wrt: Iterable[str] = OPERANDS,
) -> Gradients:
    return affine_backward(dy, x, W, b, n_batch_axes=n_batch_axes, wrt=wrt, out=out)


class _Compiled(NamedTuple):
    """The whole way, compiled; what the checks find depends on what a compiler compiles for, and on that alone."""

    forward: Callable[..., Array]
    backward: Callable[..., Gradients]


_COMPILED: dict[type, _Compiled | None] = {np.ndarray: None}


def _compiled(x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> _Compiled | None:
    """The compiled functions for operands of one type whose library compiles, None for others."""
    kind = type(x)
    if type(W) is not kind or (b is not None and type(b) is not kind):
        return None
    if kind not in _COMPILED:
        _COMPILED[kind] = None if (compiler := compiler_for(kind)) is None else _compile(compiler)
    return _COMPILED[kind] if n_batch_axes is None or type(n_batch_axes) is int else None


def _compile(compiler: Callable[..., Any]) -> _Compiled:
    def forward(x: Array, W: Array, b: Array | None, n_batch_axes: int | None) -> Array:
        return _forward(check(x, W, b, n_batch_axes), None)

    def backward(
        dy: Array, x: Array, W: Array, b: Array | None, n_batch_axes: int | None, wrt: tuple[str, ...]
    ) -> Gradients:
        return _backward(check(x, W, b, n_batch_axes), dy, None, wrt)

    return _Compiled(compiler(forward, static_argnums=3), compiler(backward, static_argnums=(4, 5)))


def _forward(operands: Operands, out: Array | None) -> Array:
    x, W, b, k, dtype, y_shape, plain = operands
    if plain and out is None:
        return numpy_kernel.forward(x, W, b)
    if (call := automatic(x=x, W=W, b=b)) is not None:
        return call(lambda x, W, b: _forward(operands._replace(x=x, W=W, b=b), out), split_of(x)[:k] + split_of(W)[1:])
    xp = namespace_of(x)
    if out is not None:
        check_out("out", out, x, y_shape, dtype)
        check_apart({"out": out}, x=x, W=W, b=b)
    with computing_with(x):
        buffer = None if out is None else flatten(xp, out, k)
        b = None if b is None else cast(xp, b, dtype)
        x, W = flatten(xp, cast(xp, x, dtype), k), cast(xp, W, dtype)
        y = kernel_of(x, W).forward(x, W, b, buffer)
        return _write(restore(xp, cast(xp, y, dtype), y_shape, k), out)


def _backward(operands: Operands, dy: Array, out: Outs | None = None, wrt: Iterable[str] = OPERANDS) -> Gradients:
    x, W, b, k, forward_dtype, _, plain = operands
    dtype = check_cotangent(dy, operands)
    wanted = _check_wrt(wrt, b)
    if plain and out is None and forward_dtype is dtype is dy.dtype and type(dy) is np.ndarray:
        return Gradients(*numpy_kernel.backward(dy, x, W, wanted))
    if wanted and (call := automatic(dy=dy, x=x, W=W, b=b)) is not None:
        return call(
            lambda dy, x, W, b: _backward(operands._replace(x=x, W=W, b=b), dy, out, wanted),
            Gradients(*(split_of(getattr(operands, name)) if name in wanted else None for name in OPERANDS)),
        )
    xp = namespace_of(x)
    if out is not None:
        _check_outs(out, dy, operands, wanted)
    with computing_with(x):
        buffers = (None, None, None) if out is None else _fillable(xp, out, k, dtype)
        matrices = flatten(xp, cast(xp, dy, dtype), k), flatten(xp, cast(xp, x, dtype), k), cast(xp, W, dtype)
        dx, dW, db = kernel_of(*matrices).backward(*matrices, wanted, buffers)
        dx = None if dx is None else restore(xp, cast(xp, dx, x.dtype), x.shape, k)
        dW = None if dW is None else cast(xp, dW, W.dtype)
        db = None if b is None or db is None else cast(xp, db, b.dtype)
        return Gradients(dx, dW, db) if out is None else Gradients(*map(_write, (dx, dW, db), out))


def _fillable(xp: ModuleType, out: Outs, n_batch_axes: int, dtype: Any) -> Outs:
    """The buffers for a kernel to fill, dx as a matrix: none where a result is cast, since memory may then run out."""
    if any(buffer is not None and buffer.dtype != dtype for buffer in out):
        return None, None, None
    dx, dW, db = out
    return (None if dx is None else flatten(xp, dx, n_batch_axes), dW, db)


def _check_wrt(wrt: Iterable[str], b: Array | None) -> tuple[str, ...]:
    if wrt is OPERANDS and b is not None:
        return OPERANDS
    wanted = tuple(wrt) if isinstance(wrt, Iterable) else (wrt,)
    if any(name not in OPERANDS for name in wanted):
        msg = f"wrt names the gradients wanted, out of 'x', 'W' and 'b'; it came as {wrt!r}"
        raise ValueError(msg)
    return tuple(name for name in OPERANDS if name in wanted and not (name == "b" and b is None))


def _check_outs(out: Outs, dy: Array, operands: Operands, wanted: Collection[str]) -> None:
    if not isinstance(out, tuple) or len(out) != len(OPERANDS):
        came = f"a tuple of {len(out)}" if isinstance(out, tuple) else f"a {type(out).__name__}"
        msg = f"out must be a tuple (dx, dW, db), with None where a new array is wanted; it came as {came}"
        raise TypeError(msg)
    buffers = {f"out's d{name}": buffer for name, buffer in zip(OPERANDS, out, strict=True) if buffer is not None}
    for name, buffer in buffers.items():
        letter = name[-1]
        primal = getattr(operands, letter)
        if letter not in wanted or primal is None:
            msg = f"out holds a buffer for d{letter}, which is not computed: {letter} is not in wrt, or is None"
            raise ValueError(msg)
        check_out(name, buffer, primal, primal.shape, primal.dtype)
    check_apart(buffers, dy=dy, x=operands.x, W=operands.W, b=operands.b)


def _write(result: Array, out: Array | None) -> Array:
    if out is None:
        return result
    # Else there is nothing to write, or the kernel has written it.
    if 0 not in out.shape and result is not out and not share_memory(result, out):
        out[...] = result
    return out
