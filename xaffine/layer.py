"""The affine layer as an object that remembers its latest forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xaffine.functional import affine_vjp
from xaffine.kernels import kernel_of
from xaffine.shapes import check_parameters, describe

if TYPE_CHECKING:
    from xaffine.backends import Array
    from xaffine.functional import Outs, Vjp

__all__ = ["AffineLayer"]


class AffineLayer:
    """The affine layer y = x W + b.

    Parameters
    ----------
    W : array, shape (n, m)
        The weights, held by reference: ``W -= lr * layer.dW`` updates the layer.
    b : array, shape (m,), optional
        The bias, held by reference; without it y = x W.
    n_batch_axes : int, optional
        Which leading axes of x are batch, as in `xaffine.affine`.

    Attributes
    ----------
    W, b : array
        The parameters. Assign to them to use others from the next forward on.
    dW, db : array or None
        The gradients from the latest backward; None before it, and db without a bias.
    n_batch_axes : int or None
        As given.

    Raises
    ------
    TypeError, ValueError
        If W and b do not go together, as `xaffine.affine`.

    Notes
    -----
    A layer keeps one forward: the latest. For several at once, or from several threads, use
    `xaffine.affine_vjp`, which hands out the backward of each call.

    Examples
    --------
    >>> import numpy as np
    >>> from xaffine import AffineLayer
    >>> layer = AffineLayer(np.asarray([[1.0], [2.0]]), np.asarray([3.0]))
    >>> layer(np.asarray([[1.0, 1.0], [2.0, 0.0]])).tolist()
    [[6.0], [5.0]]
    >>> layer.backward(np.asarray([[1.0], [10.0]])).tolist()
    [[1.0, 2.0], [10.0, 20.0]]
    >>> layer.dW.tolist(), layer.db.tolist()
    ([[21.0], [1.0]], [11.0])
    """

    dW: Array | None = None
    db: Array | None = None
    _vjp: Vjp | None = None

    def __init__(self, W: Array, b: Array | None = None, *, n_batch_axes: int | None = None) -> None:
        check_parameters(W, b)
        kernel_of(W)  # found now: torch's compiler does not trace an import
        self.W = W
        self.b = b
        self.n_batch_axes = n_batch_axes

    def __repr__(self) -> str:
        axes = "" if self.n_batch_axes is None else f", n_batch_axes={self.n_batch_axes}"
        return f"<AffineLayer{axes}: {describe(W=self.W, b=self.b)}>"

    def __call__(self, x: Array) -> Array:
        """Compute y = x W + b, as `forward`."""
        return self.forward(x)

    def forward(self, x: Array, *, out: Array | None = None) -> Array:
        """Compute y = x W + b and remember x and W for the backward.

        Parameters
        ----------
        x : array, shape batch + features
            The input; kept by reference until the next forward.
        out : array, shape batch + (m,), optional
            A buffer that is filled with y and returned.

        Returns
        -------
        array, shape batch + (m,)

        Raises
        ------
        TypeError, ValueError
            As `xaffine.affine`; the layer is then as it was.
        """
        y, self._vjp = affine_vjp(x, self.W, self.b, n_batch_axes=self.n_batch_axes, out=out)
        return y

    def backward(self, dy: Array, *, out: Outs | None = None) -> Array:
        """Compute the gradients at the latest forward; store dW and db, return dx.

        Parameters
        ----------
        dy : array, shape batch + (m,)
            ∂L/∂y for the latest y.
        out : tuple (dx, dW, db) of arrays or None, optional
            Buffers that are filled with the gradients, returned or stored; None where a new array is wanted.

        Returns
        -------
        array
            ∂L/∂x, with the shape and the dtype of x.

        Raises
        ------
        RuntimeError
            There was no forward yet.
        TypeError, ValueError
            As `xaffine.affine_backward`; the layer is then as it was.
        """
        if self._vjp is None:
            msg = "backward needs a forward before it: call layer.forward(x) first"
            raise RuntimeError(msg)
        dx, self.dW, self.db = self._vjp(dy, out)
        return dx
