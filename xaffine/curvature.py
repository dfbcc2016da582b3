"""Second derivatives of what the layer computes, and the curvature of a loss above it.

With the cotangents ḡx, ḡW and ḡb of dx = dy Wᵀ, dW = xᵀ dy and db = Σ dy, a scalar of these has the gradients

    by dy: ḡx W + x ḡW + ḡb        by x: dy ḡWᵀ        by W: ḡxᵀ dy

the first of which is `xaffine.affine_jvp`, the others `xaffine.affine_backward` at the cotangents. The Gauss-Newton
matrix of a loss above the layer is Jᵀ H J, with the Jacobian J of y and the Hessian H of the loss by y.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from xaffine.backends import Array, computing_with, is_half, is_of_kind, namespace_of, on_device_of
from xaffine.functional import Gradients, affine_backward, along, triple
from xaffine.kernels import kernel_of, standard
from xaffine.meshes import automatic, split_of
from xaffine.shapes import cast, check, check_cotangent, check_tangents, describe, flatten, restore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "KroneckerFactors", "SecondGradients", "affine_double_backward", "gauss_newton_vector_product",
    "kronecker_factors",
]  # fmt: skip


class SecondGradients(NamedTuple):
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

    dy: Array | None
    x: Array | None
    W: Array | None


def affine_double_backward(
    cotangents: tuple[Array | None, Array | None, Array | None],
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
    operands = check(x, W, b, n_batch_axes)
    check_cotangent(dy, operands)
    if not isinstance(cotangents, tuple) or len(cotangents) != len(Gradients._fields):
        came = f"a tuple of {len(cotangents)}" if isinstance(cotangents, tuple) else f"a {type(cotangents).__name__}"
        msg = f"cotangents must be a tuple of three, for dx, dW and db; it came as {came}"
        raise TypeError(msg)
    by_dx, by_dW, by_db = cotangents
    named = {"the cotangent of dx": by_dx, "the cotangent of dW": by_dW, "the cotangent of db": by_db}
    dtype = check_tangents(operands, named, dy=dy)
    if by_dx is by_dW is by_db is None:
        return SecondGradients(None, None, None)
    if (call := automatic(**named, dy=dy, x=x, W=W, b=b)) is not None:
        of_x, of_W = (None if by_dW is None else split_of(x)), (None if by_dx is None else split_of(W))
        return call(
            lambda *some: affine_double_backward(some[:3], *some[3:], n_batch_axes=n_batch_axes),
            SecondGradients(split_of(dy), of_x, of_W),
        )
    xp, k = namespace_of(x), operands.n_batch_axes
    of_dy = along(operands, by_dx, by_dW, by_db, dtype, dy.dtype)
    with computing_with(x):
        # dy ḡWᵀ and ḡxᵀ dy are the dx and the dW of a layer at the point (ḡx, ḡW).
        at_x, at_W = (x if by_dx is None else by_dx), (W if by_dW is None else by_dW)
        matrices = cast(xp, flatten(xp, dy, k), dtype), cast(xp, flatten(xp, at_x, k), dtype), cast(xp, at_W, dtype)
        wanted = [name for name, other in (("x", by_dW), ("W", by_dx)) if other is not None]
        of_x, of_W, _ = kernel_of(*matrices).backward(*matrices, wanted)
        return SecondGradients(
            of_dy,
            None if of_x is None else restore(xp, cast(xp, of_x, x.dtype), x.shape, k),
            None if of_W is None else cast(xp, of_W, W.dtype),
        )


def gauss_newton_vector_product(
    vector: tuple[Array | None, ...],
    hessian_vector_product: Callable[[Array], Array],
    x: Array,
    W: Array,
    b: Array | None = None,
    /,
    *,
    n_batch_axes: int | None = None,
    wrt: Iterable[str] = ("x", "W", "b"),
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
    operands = check(x, W, b, n_batch_axes)
    x_dot, W_dot, b_dot = triple("vector", vector)
    dtype = check_tangents(operands, {"x_dot": x_dot, "W_dot": W_dot, "b_dot": b_dot})
    y_dot = along(operands, x_dot, W_dot, b_dot, dtype, operands.dtype)
    with on_device_of(y_dot):
        dy = hessian_vector_product(y_dot)
    return affine_backward(dy, x, W, b, n_batch_axes=n_batch_axes, wrt=wrt)


class KroneckerFactors(NamedTuple):
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

    A: Array
    G: Array


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
    operands = check(x, W, b, n_batch_axes)
    xp, dtype = namespace_of(x), check_cotangent(dy, operands)
    if not is_of_kind(xp, dtype, "real floating"):
        msg = f"factors of curvature are of real floating dtype: {describe(dy=dy, x=x, W=W)}. Cast all to float32, say"
        raise TypeError(msg)
    if (call := automatic(dy=dy, x=x, W=W, b=b)) is not None:
        whole = (None, None)
        return call(partial(kronecker_factors, n_batch_axes=n_batch_axes), KroneckerFactors(whole, whole))
    with computing_with(x):
        moments = []
        for array in (x, dy):
            matrix = flatten(xp, array, operands.n_batch_axes)
            N = matrix.shape[0]
            if not N or N != N:  # None and nan stand for sizes that are not known yet
                msg = (
                    f"the mean over a batch needs at least one sample, and their number: {describe(dy=dy, x=x)}. Find "
                    f"it first (in Dask: x.compute_chunk_sizes())"
                )
                raise ValueError(msg)
            matrix = cast(xp, matrix, xp.float32 if is_half(array.dtype) else array.dtype)
            moments.append(cast(xp, standard.backward_W(matrix, matrix) / N, array.dtype))
        return KroneckerFactors(*moments)
