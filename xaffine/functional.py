"""The affine map and its derivatives, as pure functions.

For a scalar L that depends on y = x W + b, with dy = ∂L/∂y,

    dx = dy Wᵀ        dW = xᵀ dy        db = Σ over the batch of dy

and where the operands move with the velocities ẋ, Ẇ and ḃ, y moves with

    ẏ = ẋ W + x Ẇ + ḃ

In indices, y_ij = Σ_k x_ik W_kj + b_j, so that

    ∂L/∂x_ik = Σ_j dy_ij W_kj      ∂L/∂W_kj = Σ_i x_ik dy_ij      ∂L/∂b_j = Σ_i dy_ij

Every function follows the same path: its arguments are checked, which makes a plan, and the library of the arrays runs
a step. The steps `forward`, `backward` and `jvp` at the end of this file are the mathematics; the numbers there are
those of the equations in the derivation.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, overload

from xaffine._checks import OPERANDS, check, check_cotangent, check_out, check_outs, check_tangents, check_tuple
from xaffine._types import DB, DW, DX, Operands, Outs, Tangents, Vjp, Wrt
from xaffine.backends import Array, _describe
from xaffine.backends.standard import Result, written

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from xaffine._checks import Plan
    from xaffine._types import Bias, Input, Of, Scalar, Unknown, Weights

__all__ = ["Gradients", "affine", "affine_backward", "affine_jvp", "affine_vjp"]


class Gradients(NamedTuple, Generic[DX, DW, DB]):
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

    dx: DX
    dW: DW
    db: DB

    def __repr__(self) -> str:
        return f"<Gradients: {_describe(**self._asdict())}>"


# fmt: off
@overload
def affine(x: Unknown, W: Array, b: Array | None = None, /, *,
           n_batch_axes: int | None = None, out: Array | None = None) -> Any: ...
@overload
def affine(x: NDArray[Scalar], W: Array, b: Array | None = None, /, *,
           n_batch_axes: int | None = None, out: Array | None = None) -> NDArray[Scalar]: ...
@overload
def affine(x: Input, W: Array, b: Array | None = None, /, *,
           n_batch_axes: int | None = None, out: Array | None = None) -> Input: ...
# fmt: on
def affine(
    x: Array, W: Array, b: Array | None = None, /, *, n_batch_axes: int | None = None, out: Array | None = None
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
    return checked_forward(x, W, b, n_batch_axes, out)[1]


# fmt: off
@overload
def affine_backward(dy: Array, x: Input, W: Weights, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
                    wrt: Of.xWb = OPERANDS, out: Outs | None = None) -> Gradients[Input, Weights, Bias]: ...
@overload
def affine_backward(dy: Array, x: Input, W: Array, b: Array | None = None, /, *, n_batch_axes: int | None = None,
                    wrt: Of.x, out: Outs | None = None) -> Gradients[Input, None, None]: ...
@overload
def affine_backward(dy: Array, x: Array, W: Weights, b: Array | None = None, /, *, n_batch_axes: int | None = None,
                    wrt: Of.W, out: Outs | None = None) -> Gradients[None, Weights, None]: ...
@overload
def affine_backward(dy: Array, x: Array, W: Array, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
                    wrt: Of.b, out: Outs | None = None) -> Gradients[None, None, Bias]: ...
@overload
def affine_backward(dy: Array, x: Input, W: Weights, b: Array | None = None, /, *, n_batch_axes: int | None = None,
                    wrt: Of.xW, out: Outs | None = None) -> Gradients[Input, Weights, None]: ...
@overload
def affine_backward(dy: Array, x: Input, W: Array, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
                    wrt: Of.xb, out: Outs | None = None) -> Gradients[Input, None, Bias]: ...
@overload
def affine_backward(dy: Array, x: Array, W: Weights, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
                    wrt: Of.Wb, out: Outs | None = None) -> Gradients[None, Weights, Bias]: ...
@overload
def affine_backward(dy: Array, x: Input, W: Weights, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
                    wrt: Wrt, out: Outs | None = None) -> Gradients[Input | None, Weights | None, Bias | None]: ...
# fmt: on
def affine_backward(
    dy: Array,
    x: Array,
    W: Array,
    b: Array | None = None,
    /,
    *,
    n_batch_axes: int | None = None,
    wrt: Wrt = OPERANDS,
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
    return _pull_back(check(x, W, b, n_batch_axes), x, W, b, dy, out, wrt)


# fmt: off
@overload
def affine_vjp(x: Unknown, W: Weights, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
               out: Array | None = None) -> tuple[Any, Vjp[Any, Weights, Bias]]: ...
@overload
def affine_vjp(x: NDArray[Scalar], W: Weights, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
               out: Array | None = None) -> tuple[NDArray[Scalar], Vjp[NDArray[Scalar], Weights, Bias]]: ...
@overload
def affine_vjp(x: Input, W: Weights, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
               out: Array | None = None) -> tuple[Input, Vjp[Input, Weights, Bias]]: ...
# fmt: on
def affine_vjp(
    x: Array, W: Array, b: Array | None = None, /, *, n_batch_axes: int | None = None, out: Array | None = None
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
    plan, y = checked_forward(x, W, b, n_batch_axes, out)
    return y, partial(_pull_back, plan, x, W, b)


def _pull_back(
    plan: Plan, x: Array, W: Array, b: Array | None, dy: Array, out: Outs | None = None, wrt: Wrt = OPERANDS
) -> Gradients:
    return Gradients(*checked_backward(plan, x, W, b, dy, out, wrt))


def checked_forward(
    x: Array, W: Array, b: Array | None, n_batch_axes: int | None, out: Array | None
) -> tuple[Plan, Array]:
    """Check the operands and compute y; the plan is for `checked_backward`."""
    plan = check(x, W, b, n_batch_axes)
    if out is not None:
        check_out(plan, out, x, W, b)
    if plan.backend.calls_directly:  # one call less, which would take as long as a small product
        return plan, forward(plan, x, W, b, out)
    return plan, plan.backend.run(forward, plan, x, W, b, out)


def checked_backward(plan: Plan, x: Array, W: Array, b: Array | None, dy: Array, out: Outs | None, wrt: Wrt) -> Outs:
    """Check what a backward takes beside the operands of its forward, and compute dx, dW and db."""
    plan = check_cotangent(plan, dy, x, W, b, wrt)
    if out is not None:
        check_outs(plan, out, dy, x, W, b)
        if out[0] is out[1] is out[2] is None:
            out = None
    if plan.backend.calls_directly:
        return backward(plan, dy, x, W, b, out)
    return plan.backend.run(backward, plan, dy, x, W, b, out)


# fmt: off
@overload
def affine_jvp(primals: Operands[Unknown], tangents: Tangents, /, *,
               n_batch_axes: int | None = None) -> tuple[Any, Any]: ...
@overload
def affine_jvp(primals: Operands[NDArray[Scalar]], tangents: Tangents, /, *,
               n_batch_axes: int | None = None) -> tuple[NDArray[Scalar], NDArray[Scalar]]: ...
@overload
def affine_jvp(primals: Operands[Input], tangents: Tangents, /, *,
               n_batch_axes: int | None = None) -> tuple[Input, Input]: ...
# fmt: on
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
    x, W, b = unpack_operands("primals", primals)
    dots = unpack_operands("tangents", tangents)
    plan = check_tangents(check(x, W, b, n_batch_axes), ("x_dot", "W_dot", "b_dot"), dots, x, W, b)
    return plan.backend.run(jvp, plan, x, W, b, *dots)


def unpack_operands(name: str, arrays: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
    """Unpack (x, W) or (x, W, b)."""
    if type(arrays) is tuple and len(arrays) == 3:  # as most are, which spares a call
        return arrays
    check_tuple(name, arrays, (2, 3), "of two or three, for x, W and b")
    return (*arrays, None)[:3]


def results(*splits: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Say of each result of a step what it is laid out like on a mesh: the name of an operand, or "y"."""

    def mark(step: Callable[..., Result]) -> Callable[..., Result]:
        step.results = splits  # type: ignore[attr-defined]
        return step

    return mark


_NO_BUFFERS = (None, None, None)


@results("y")
def forward(plan: Plan, x: Array, W: Array, b: Array | None, out: Array | None) -> Array:
    """y = x W + b."""
    backend = plan.backend
    if plan.x_matrix is not None:
        x = backend.reshape(x, plan.x_matrix)
    if plan.casts:
        x, W = backend.as_matrix(x, None, plan.dtype), backend.as_matrix(W, None, plan.dtype)
        b = None if b is None else backend.cast(b, plan.dtype)
    buffer = None if out is None else backend.buffer(out, plan.y_matrix, plan.dtype)
    y = plan.product(x, W, b, buffer)
    if buffer is not None:
        return out
    if plan.casts:
        y = backend.cast(y, plan.y_dtype)
    if plan.y_matrix is not None:
        y = backend.reshape(y, plan.y_shape)
    return y if out is None else written(y, out)


@results("x", "W", "b")
def backward(plan: Plan, dy: Array, x: Array, W: Array, b: Array | None, out: Outs | None) -> Outs:
    """dx = dy Wᵀ, dW = xᵀ dy, db = Σ over the batch of dy."""
    backend, wanted = plan.backend, plan.wanted
    primals = x, W, b
    if plan.x_matrix is not None:
        x = backend.reshape(x, plan.x_matrix)
    if plan.y_matrix is not None:
        dy = backend.reshape(dy, plan.y_matrix)
    if plan.casts:
        dy = backend.aligned(backend.as_matrix(dy, None, plan.dtype), x)
        x = backend.as_matrix(x, None, plan.dtype) if "W" in wanted else x
        W = backend.as_matrix(W, None, plan.dtype) if "x" in wanted else W
    buffers = _NO_BUFFERS if out is None else _buffers(plan, out)
    db = plan.sum_rows(dy, buffers[2]) if "b" in wanted else None  # (5)
    dW = plan.product(backend.transposed(x), dy, None, buffers[1]) if "W" in wanted else None  # (4)
    dx = plan.product(dy, backend.transposed(W), None, buffers[0]) if "x" in wanted else None  # (3)
    if out is not None and buffers is not _NO_BUFFERS:
        return out
    if plan.casts or plan.x_matrix is not None:
        x, W, b = primals
        dx, dW, db = restored(plan, dx, x, plan.x_matrix), restored(plan, dW, W), restored(plan, db, b)
    if out is not None:
        dx, dW, db = (
            gradient if buffer is None else written(gradient, buffer)
            for gradient, buffer in zip((dx, dW, db), out, strict=True)
        )
    return dx, dW, db


def restored(
    plan: Plan, gradient: Array | None, primal: Array, as_matrix: tuple[Any, ...] | None = None
) -> Array | None:
    """A gradient in the dtype of its primal, and in the shape if the primal was taken as a matrix."""
    if gradient is None:
        return None
    if plan.casts:
        gradient = plan.backend.cast(gradient, primal.dtype)
    return gradient if as_matrix is None else plan.backend.reshape(gradient, primal.shape)


def _buffers(plan: Plan, out: Outs) -> Outs:
    """Views of buffers that the primitives can fill.

    There are none if a result needs memory of its own: that could run out after a buffer was overwritten.
    """
    buffer, dtype = plan.backend.buffer, plan.dtype
    dx, dW, db = out
    dx = None if dx is None else buffer(dx, plan.x_matrix, dtype)
    dW = None if dW is None else buffer(dW, None, dtype)
    db = None if db is None else buffer(db, None, dtype)
    filled = (dx is not None) + (dW is not None) + (db is not None)
    return (dx, dW, db) if filled == len(plan.wanted) else _NO_BUFFERS


@results("y", "y")
def jvp(
    plan: Plan, x: Array, W: Array, b: Array | None, x_dot: Array | None, W_dot: Array | None, b_dot: Array | None
) -> tuple[Array, Array]:
    """y = x W + b and ẏ = ẋ W + x Ẇ + ḃ."""
    y = forward(plan._replace(dtype=plan.y_dtype), x, W, b, None)  # which no tangent makes wider
    return y, tangent_of(plan, x, W, x_dot, W_dot, b_dot, plan.y_dtype)


def tangent_of(
    plan: Plan, x: Array, W: Array, x_dot: Array | None, W_dot: Array | None, b_dot: Array | None, dtype: Any
) -> Array:
    """ẏ = ẋ W + x Ẇ + ḃ, in a dtype; zero tangents are None."""
    backend = plan.backend

    def product(x: Array, W: Array, bias: Array | None = None) -> Array:
        factors = backend.as_matrix(x, plan.x_matrix, plan.dtype), backend.as_matrix(W, None, plan.dtype)
        return plan.product(*factors, bias)

    bias = None if b_dot is None else backend.cast(b_dot, plan.dtype)
    if x_dot is not None and W_dot is not None:
        y_dot = backend.xp.add(product(x_dot, W, bias), product(x, W_dot))
    elif x_dot is not None:
        y_dot = product(x_dot, W, bias)
    elif W_dot is not None:
        y_dot = product(x, W_dot, bias)
    else:  # a layer without features is its bias
        rows = backend.as_matrix(x, plan.x_matrix, plan.dtype)
        y_dot = plan.product(rows[:, :0], backend.cast(W[:0, :], plan.dtype), bias)
    y_dot = backend.cast(y_dot, dtype)
    return y_dot if plan.y_matrix is None else backend.reshape(y_dot, plan.y_shape)
