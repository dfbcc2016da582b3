"""Second derivatives of what the layer computes, and the curvature of a loss above it.

With the cotangents ḡx, ḡW and ḡb of dx = dy Wᵀ, dW = xᵀ dy and db = Σ dy, a scalar of these has the gradients

    by dy: ḡx W + x ḡW + ḡb        by x: dy ḡWᵀ        by W: ḡxᵀ dy

the first of which is `xaffine.affine_jvp`, the others `xaffine.affine_backward` at the cotangents. The Gauss-Newton
matrix of a loss above the layer is Jᵀ H J, with the Jacobian J of y and the Hessian H of the loss by y.
"""

from __future__ import annotations

from collections.abc import Callable  # noqa: TC003 - read by typing.get_type_hints
from typing import TYPE_CHECKING, Generic, NamedTuple, overload

from xaffine._checks import check, check_cotangent, check_tangents, check_tuple, check_with_cotangent
from xaffine._shapes import size
from xaffine._types import DW, DX, DY, Outs, Tangents, Wrt
from xaffine.backends import Array, _describe
from xaffine.functional import Gradients, affine_backward, restored, results, tangent_of, unpack_operands

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xaffine._checks import Plan
    from xaffine._types import Bias, Input, Of, Output, Scalar, Unknown, Weights

__all__ = [
    "KroneckerFactors", "SecondGradients", "affine_double_backward", "gauss_newton_vector_product",
    "kronecker_factors",
]  # fmt: skip


class SecondGradients(NamedTuple, Generic[DY, DX, DW]):
    """The gradients of a scalar of (dx, dW, db) by what those depend on; None where one is zero.

    Attributes
    ----------
    dy, x, W : array or None
        With the shape and the dtype of dy, x and W.

    Examples
    --------
    >>> import numpy as np
    >>> x, W, dy = np.asarray([[1.0, 2.0]]), np.asarray([[3.0], [4.0]]), np.asarray([[5.0]])
    >>> second = affine_double_backward((np.asarray([[1.0, 0.0]]), None, None), dy, x, W)
    >>> second.dy.tolist(), second.W.tolist(), second.x
    ([[3.0]], [[5.0], [0.0]], None)
    """

    dy: DY
    x: DX
    W: DW


# fmt: off
@overload
def affine_double_backward(cotangents: tuple[None, None, Array | None], dy: Output, x: Array, W: Array,
                           b: Array | None = None, /, *, n_batch_axes: int | None = None,
                           ) -> SecondGradients[Output, None, None]: ...
@overload
def affine_double_backward(cotangents: tuple[Array, None, Array | None], dy: Output, x: Array, W: Weights,
                           b: Array | None = None, /, *, n_batch_axes: int | None = None,
                           ) -> SecondGradients[Output, None, Weights]: ...
@overload
def affine_double_backward(cotangents: tuple[None, Array, Array | None], dy: Output, x: Input, W: Array,
                           b: Array | None = None, /, *, n_batch_axes: int | None = None,
                           ) -> SecondGradients[Output, Input, None]: ...
@overload
def affine_double_backward(cotangents: Outs, dy: Output, x: Input, W: Weights,
                           b: Array | None = None, /, *, n_batch_axes: int | None = None,
                           ) -> SecondGradients[Output, Input, Weights]: ...
# fmt: on
def affine_double_backward(
    cotangents: Outs,
    dy: Array,
    x: Array,
    W: Array,
    b: Array | None = None,
    /,
    *,
    n_batch_axes: int | None = None,
) -> SecondGradients:
    """Differentiate `xaffine.affine_backward` itself: from ∂S/∂(dx, dW, db) to ∂S/∂(dy, x, W).

    Parameters
    ----------
    cotangents : tuple (by dx, by dW, by db) of arrays or None
        ∂S/∂dx with the shape of x, ∂S/∂dW with that of W, ∂S/∂db with that of b; None where it is zero, which costs
        nothing. Without a bias the last must be None.
    dy, x, W, b, n_batch_axes
        As in `xaffine.affine_backward`.

    Returns
    -------
    SecondGradients
        ``(dy, x, W)``; None where the cotangents that it comes from are None. b has no part in the gradients.

    Raises
    ------
    TypeError, ValueError
        As `xaffine.affine_backward`; ValueError too for a cotangent of another shape.

    Notes
    -----
    From S = ⟨ḡx, dy Wᵀ⟩ + ⟨ḡW, xᵀ dy⟩ + ⟨ḡb, Σ dy⟩. It is what gradient penalties and Hessian-vector products need.
    Complex operands use the plain transpose, as `xaffine.affine_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> x, W, dy = np.asarray([[1.0, 2.0]]), np.asarray([[3.0], [4.0]]), np.asarray([[5.0]])
    >>> by_dy, by_x, by_W = affine_double_backward((np.asarray([[1.0, 1.0]]), None, None), dy, x, W)
    >>> by_dy.tolist(), by_x, by_W.tolist()  # S is the sum of dx
    ([[7.0]], None, [[5.0], [5.0]])
    """
    plan = check(x, W, b, n_batch_axes)
    check_cotangent(plan, dy, x, W, b)
    by_dx, by_dW, by_db = check_tuple("cotangents", cotangents, (3,), "of three, for dx, dW and db")
    names = "the cotangent of dx", "the cotangent of dW", "the cotangent of db"
    plan = check_tangents(plan, names, cotangents, x, W, b, dy)
    if by_dx is by_dW is by_db is None:
        return SecondGradients(None, None, None)
    return plan.backend.run(double_backward, plan, dy, x, W, b, by_dx, by_dW, by_db)


@results("dy", "x", "W")
def double_backward(
    plan: Plan,
    dy: Array,
    x: Array,
    W: Array,
    b: Array | None,
    by_dx: Array | None,
    by_dW: Array | None,
    by_db: Array | None,
) -> SecondGradients:
    """By dy: ḡx W + x ḡW + ḡb; by x: dy ḡWᵀ; by W: ḡxᵀ dy."""
    backend, dtype = plan.backend, plan.dtype
    rows_of_x = x if plan.x_matrix is None else backend.reshape(x, plan.x_matrix)
    rows = backend.aligned(backend.as_matrix(dy, plan.y_matrix, dtype), rows_of_x)
    of_x = None if by_dW is None else plan.product(rows, backend.transposed(backend.as_matrix(by_dW, None, dtype)))
    of_W = None
    if by_dx is not None:
        of_W = plan.product(backend.transposed(backend.as_matrix(by_dx, plan.x_matrix, dtype)), rows)
    return SecondGradients(
        tangent_of(plan, x, W, by_dx, by_dW, by_db, dy.dtype),
        restored(plan, of_x, x, plan.x_matrix),
        restored(plan, of_W, W),
    )


# fmt: off
@overload
def gauss_newton_vector_product(vector: Tangents, hessian_vector_product: Callable[[Array], Array],
                                x: Input, W: Weights, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
                                wrt: Of.xWb = ...) -> Gradients[Input, Weights, Bias]: ...
@overload
def gauss_newton_vector_product(vector: Tangents, hessian_vector_product: Callable[[Array], Array],
                                x: Input, W: Array, b: Array | None = None, /, *, n_batch_axes: int | None = None,
                                wrt: Of.x) -> Gradients[Input, None, None]: ...
@overload
def gauss_newton_vector_product(vector: Tangents, hessian_vector_product: Callable[[Array], Array],
                                x: Array, W: Weights, b: Array | None = None, /, *, n_batch_axes: int | None = None,
                                wrt: Of.W) -> Gradients[None, Weights, None]: ...
@overload
def gauss_newton_vector_product(vector: Tangents, hessian_vector_product: Callable[[Array], Array],
                                x: Array, W: Array, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
                                wrt: Of.b) -> Gradients[None, None, Bias]: ...
@overload
def gauss_newton_vector_product(vector: Tangents, hessian_vector_product: Callable[[Array], Array],
                                x: Input, W: Weights, b: Array | None = None, /, *, n_batch_axes: int | None = None,
                                wrt: Of.xW) -> Gradients[Input, Weights, None]: ...
@overload
def gauss_newton_vector_product(vector: Tangents, hessian_vector_product: Callable[[Array], Array],
                                x: Input, W: Array, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
                                wrt: Of.xb) -> Gradients[Input, None, Bias]: ...
@overload
def gauss_newton_vector_product(vector: Tangents, hessian_vector_product: Callable[[Array], Array],
                                x: Array, W: Weights, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
                                wrt: Of.Wb) -> Gradients[None, Weights, Bias]: ...
@overload
def gauss_newton_vector_product(vector: Tangents, hessian_vector_product: Callable[[Array], Array],
                                x: Input, W: Weights, b: Bias | None = None, /, *, n_batch_axes: int | None = None,
                                wrt: Wrt) -> Gradients[Input | None, Weights | None, Bias | None]: ...
# fmt: on
def gauss_newton_vector_product(
    vector: Tangents,
    hessian_vector_product: Callable[[Array], Array],
    x: Array,
    W: Array,
    b: Array | None = None,
    /,
    *,
    n_batch_axes: int | None = None,
    wrt: Wrt = ("x", "W", "b"),
) -> Gradients:
    """Multiply a vector by the Gauss-Newton matrix Jᵀ H J of a loss above the layer.

    Parameters
    ----------
    vector : tuple (for x, for W, for b) of arrays or None
        With the shapes of x, W and b; None where it is zero, which costs nothing.
    hessian_vector_product : callable
        ``hessian_vector_product(y_dot)`` returns H ẏ, the Hessian of the loss by y times ẏ, in the shape of y. For
        half the squared length of y - t that is ẏ itself.
    x, W, b, n_batch_axes, wrt
        As in `xaffine.affine_backward`.

    Returns
    -------
    Gradients
        Jᵀ H J times the vector, by x, W and b.

    Raises
    ------
    TypeError, ValueError
        As `xaffine.affine_backward`, also for what `hessian_vector_product` returns.

    Notes
    -----
    J v is a forward-mode product, H J v the caller's, Jᵀ H J v a backward: no matrix of curvature is ever formed.
    y is affine in each operand, so by W and b alone the Gauss-Newton matrix is the Hessian.

    References
    ----------
    N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 14
    (2002).

    Examples
    --------
    >>> import numpy as np
    >>> x, W = np.asarray([[1.0, 2.0], [0.0, 1.0]]), np.asarray([[3.0], [4.0]])
    >>> product = gauss_newton_vector_product((None, np.asarray([[1.0], [1.0]])), lambda y_dot: y_dot, x, W, wrt="W")
    >>> product.dW.tolist()  # xᵀ x times the vector
    [[3.0], [7.0]]
    """
    dots = unpack_operands("vector", vector)
    names = "vector's x", "vector's W", "vector's b"
    plan = check_tangents(check(x, W, b, n_batch_axes), names, dots, x, W, b)
    y_dot = plan.backend.run(tangent, plan, x, W, b, *dots)
    with plan.backend.on_device_of(y_dot):
        dy = hessian_vector_product(y_dot)
    return affine_backward(dy, x, W, b, n_batch_axes=n_batch_axes, wrt=wrt)


@results("y")
def tangent(
    plan: Plan, x: Array, W: Array, b: Array | None, x_dot: Array | None, W_dot: Array | None, b_dot: Array | None
) -> Array:
    """ẏ = ẋ W + x Ẇ + ḃ."""
    return tangent_of(plan, x, W, x_dot, W_dot, b_dot, plan.y_dtype)


class KroneckerFactors(NamedTuple, Generic[DX, DY]):
    """The factors of the Kronecker-factored curvature of one layer.

    Attributes
    ----------
    A : array, shape (n, n)
        The second moment of what goes in.
    G : array, shape (m, m)
        The second moment of what comes back.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.asarray([[1.0], [3.0]]), np.asarray([[2.0], [0.0]])
    >>> A, G = kronecker_factors(dy, x, np.ones((1, 1)))
    >>> A.tolist(), G.tolist()
    ([[5.0]], [[2.0]])
    """

    A: DX
    G: DY


# fmt: off
@overload
def kronecker_factors(dy: Array, x: Unknown, W: Array, b: Array | None = None, /, *,
                      n_batch_axes: int | None = None) -> KroneckerFactors: ...
@overload
def kronecker_factors(dy: NDArray[Scalar], x: NDArray[Scalar], W: Array, b: Array | None = None, /, *,
                      n_batch_axes: int | None = None) -> KroneckerFactors[NDArray[Scalar], NDArray[Scalar]]: ...
@overload
def kronecker_factors(dy: Output, x: Input, W: Array, b: Array | None = None, /, *,
                      n_batch_axes: int | None = None) -> KroneckerFactors[Input, Output]: ...
# fmt: on
def kronecker_factors(
    dy: Array, x: Array, W: Array, b: Array | None = None, /, *, n_batch_axes: int | None = None
) -> KroneckerFactors:
    """Compute A = xᵀ x / N and G = dyᵀ dy / N, whose Kronecker product K-FAC takes for the curvature by W.

    Parameters
    ----------
    dy, x, W, b, n_batch_axes
        As in `xaffine.affine_backward`; real floating. Of W and b only shape and dtype matter.

    Returns
    -------
    KroneckerFactors
        ``(A, G)`` in the dtypes of x and dy.

    Raises
    ------
    TypeError
        As `xaffine.affine_backward`, and for integers and complex numbers.
    ValueError
        As `xaffine.affine_backward`; the batch is empty, or its size is not known yet.

    Notes
    -----
    N counts every position of the batch, over all its axes ("expand" where weights are shared). dy is ∂L/∂y of a loss
    L that is the *sum* over the batch: multiply a mean's dy by N first. For the curvature by W and b together append a
    column of ones to x, as the paper does. With these conventions the curvature of vec(W) is N times that of A ⊗ G.

    References
    ----------
    J. Martens, R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015:
    section 3.1. R. Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network
    architectures", NeurIPS 2023: weight sharing.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.asarray([[1.0, 2.0], [1.0, 0.0]]), np.asarray([[2.0], [4.0]])
    >>> A, G = kronecker_factors(dy, x, np.zeros((2, 1)))
    >>> A.tolist(), G.tolist()
    ([[1.0, 1.0], [1.0, 2.0]], [[10.0]])
    """
    plan = check_with_cotangent(dy, x, W, b, n_batch_axes)
    if plan.kind != "real floating":
        msg = (
            f"factors of curvature are of real floating dtype: {_describe(dy=dy, x=x, W=W)}. Cast all to float32 first"
        )
        raise TypeError(msg)
    if not size(plan.y_shape[:-1]):  # None stands for a size that is not known yet
        msg = (
            f"the mean over a batch needs at least one sample, and their number: {_describe(dy=dy, x=x)}. Find "
            f"it first (in Dask: x.compute_chunk_sizes())"
        )
        raise ValueError(msg)
    return plan.backend.run(second_moments, plan, dy, x, W, b)


@results("", "")
def second_moments(plan: Plan, dy: Array, x: Array, W: Array, b: Array | None) -> KroneckerFactors:
    """A = xᵀ x / N and G = dyᵀ dy / N."""
    backend, N = plan.backend, size(plan.y_shape[:-1])
    moments = []
    for array, shape in ((x, plan.x_matrix), (dy, plan.y_matrix)):
        rows = backend.as_matrix(array, shape, backend.wide(array.dtype))
        moments.append(backend.cast(plan.product(backend.transposed(rows), rows) / N, array.dtype))
    return KroneckerFactors(*moments)
