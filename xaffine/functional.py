"""The affine map and its derivatives, as pure functions.

For a scalar L that depends on y = x W + b, with dy = ∂L/∂y,

    dx = dy Wᵀ        dW = xᵀ dy        db = Σ over the batch of dy

Every function takes the same way: check, flatten to matrices, multiply, restore the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from xaffine.backends import Array, namespace_of
from xaffine.kernels import standard as kernel
from xaffine.shapes import Operands, check, check_cotangent, check_out, flatten, restore

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Gradients", "affine", "affine_backward", "affine_vjp"]


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
    """

    dx: Array | None
    dW: Array | None
    db: Array | None


Vjp: TypeAlias = Callable[[Array], Gradients]
_Outs: TypeAlias = tuple[Array | None, Array | None, Array | None]

_OPERANDS = ("x", "W", "b")


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
        Shapes or devices that do not go together, `n_batch_axes` out of range.

    Notes
    -----
    All operands are of one kind: integer (exact as long as the sums fit the dtype), real floating, or complex
    floating. Within a kind they promote by the array API standard, and the products are computed in the
    common dtype. NaN and infinity are data and propagate; that includes 0 · NaN = NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from xaffine import affine
    >>> x = np.asarray([[1.0, 2.0], [3.0, 4.0]])
    >>> W = np.asarray([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
    >>> affine(x, W, np.asarray([10.0, 20.0, 30.0])).tolist()
    [[11.0, 22.0, 36.0], [13.0, 24.0, 44.0]]
    """
    operands = check(x, W, b, n_batch_axes)
    if out is not None:
        check_out("out", out, x, operands.y_shape, operands.dtype)
    return _write(_forward(operands), out)


def affine_backward(
    dy: Array,
    x: Array,
    W: Array,
    b: Array | None = None,
    /,
    *,
    n_batch_axes: int | None = None,
    wrt: Iterable[str] = _OPERANDS,
    out: _Outs | None = None,
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
        is wanted. If anything is wrong with one of them, none is written.

    Returns
    -------
    Gradients
        The named tuple ``(dx, dW, db)``; each has the shape and dtype of what it is the gradient of.

    Raises
    ------
    TypeError, ValueError
        As `affine`; ValueError too if dy has another shape than y, or `wrt` another name.

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
    operands = check(x, W, b, n_batch_axes)
    dtype = check_cotangent(dy, operands)
    wanted = _check_wrt(wrt)
    if out is not None:
        _check_outs(out, operands, wanted)
    gradients = _backward(operands, dy, dtype, wanted)
    return gradients if out is None else Gradients(*map(_write, gradients, out))


def affine_vjp(x: Array, W: Array, b: Array | None = None, /, *, n_batch_axes: int | None = None) -> tuple[Array, Vjp]:
    """Compute y = x W + b and the function that pulls dy back to the gradients.

    Parameters
    ----------
    x, W, b, n_batch_axes
        As in `affine`.

    Returns
    -------
    y : array, shape batch + (m,)
        As from `affine`.
    vjp : callable
        ``vjp(dy)`` returns `Gradients`, as `affine_backward` does with these operands. It holds x, W and b by
        reference and nothing else, may be called any number of times and from several threads, and can be
        pickled. Operands that are changed in place before it is called give the gradients at the new values.

    Raises
    ------
    TypeError, ValueError
        As `affine`; `vjp` as `affine_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from xaffine import affine_vjp
    >>> y, vjp = affine_vjp(np.asarray([1.0, 2.0]), np.asarray([[3.0], [4.0]]))
    >>> y.tolist(), vjp(np.asarray([2.0])).dW.tolist()
    ([11.0], [[2.0], [4.0]])
    """
    operands = check(x, W, b, n_batch_axes)
    return _forward(operands), partial(_pull_back, operands)


def _pull_back(operands: Operands, dy: Array) -> Gradients:
    return _backward(operands, dy, check_cotangent(dy, operands), _OPERANDS)


def _forward(operands: Operands) -> Array:
    x, W, b, k, dtype = operands
    xp = namespace_of(x)
    x, W = _cast(xp, x, dtype), _cast(xp, W, dtype)
    b = None if b is None else _cast(xp, b, dtype)
    return restore(xp, kernel.forward(xp, flatten(xp, x, k), W, b), operands.y_shape, k)


def _backward(operands: Operands, dy: Array, dtype: Any, wanted: Collection[str]) -> Gradients:
    x, W, b, k, _ = operands
    xp = namespace_of(x)
    dy = flatten(xp, _cast(xp, dy, dtype), k)
    dx = dW = db = None
    if "x" in wanted:
        dx = _cast(xp, restore(xp, kernel.backward_x(xp, dy, _cast(xp, W, dtype)), x.shape, k), x.dtype)
    if "W" in wanted:
        dW = _cast(xp, kernel.backward_W(xp, flatten(xp, _cast(xp, x, dtype), k), dy), W.dtype)
    if "b" in wanted and b is not None:
        db = _cast(xp, kernel.backward_b(xp, dy), b.dtype)
    return Gradients(dx, dW, db)


def _cast(xp: ModuleType, array: Array, dtype: Any) -> Array:
    return array if array.dtype == dtype else xp.astype(array, dtype)


def _check_wrt(wrt: Iterable[str]) -> tuple[str, ...]:
    wanted = tuple(wrt)
    if not set(wanted) <= set(_OPERANDS):
        msg = f"wrt names the gradients wanted, out of 'x', 'W' and 'b'; it came as {wrt!r}"
        raise ValueError(msg)
    return wanted


def _check_outs(out: _Outs, operands: Operands, wanted: Collection[str]) -> None:
    if not isinstance(out, tuple) or len(out) != len(_OPERANDS):
        came = f"a tuple of {len(out)}" if isinstance(out, tuple) else f"a {type(out).__name__}"
        msg = f"out must be a tuple (dx, dW, db), with None where a new array is wanted; it came as {came}"
        raise TypeError(msg)
    buffers = [buffer for buffer in out if buffer is not None]
    if len({id(buffer) for buffer in buffers}) < len(buffers):
        msg = "out holds one buffer for two gradients; pass one for each, or None"
        raise ValueError(msg)
    for name, buffer in zip(_OPERANDS, out, strict=True):
        if buffer is None:
            continue
        primal = getattr(operands, name)
        if name not in wanted or primal is None:
            msg = f"out holds a buffer for d{name}, which is not computed: {name} is not in wrt, or is None"
            raise ValueError(msg)
        check_out(f"out's d{name}", buffer, primal, primal.shape, primal.dtype)


def _write(result: Array, out: Array | None) -> Array:
    if out is None:
        return result
    out[...] = result
    return out
