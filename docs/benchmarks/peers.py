"""Other implementations of the affine layer, in the form that the verifier and the benchmark take.

Each is the usual way to write the layer with its library, and declares in ``supports`` what it does not claim.
``xaffine check docs/benchmarks/peers.py:torch_linear --backend torch`` verifies one of them, and
``xaffine bench --backend torch --beside docs/benchmarks/peers.py:torch_module`` times one.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

__all__ = [
    "Classic", "jax_functions", "jax_jit", "jax_vjp", "thinc_linear", "torch_compiled", "torch_linear", "torch_module",
]  # fmt: skip


class Classic:
    """The layer as textbooks have it: NumPy, a cache in the object, no checks."""

    supports = frozenset({"tensors"})

    def __init__(self, W: Any, b: Any) -> None:
        self.W, self.b = W, b
        self.x: Any = None
        self.shape: Any = None
        self.dW: Any = None
        self.db: Any = None

    def forward(self, x: Any) -> Any:
        """Compute y."""
        self.shape = x.shape
        self.x = x.reshape(x.shape[0], -1)
        return np.dot(self.x, self.W) + self.b

    def backward(self, dy: Any) -> Any:
        """Compute dx, dW and db."""
        self.dW = np.dot(self.x.T, dy)
        self.db = np.sum(dy, axis=0)
        return np.dot(dy, self.W.T).reshape(self.shape)


class _Differentiated:
    """Forward and backward of a function that a library differentiates itself."""

    dW: Any = None
    db: Any = None

    def __init__(self, W: Any, b: Any, differentiate: Any) -> None:
        self.parameters = (W,) if b is None else (W, b)
        self.differentiate = differentiate
        self.vjp: Any = None

    def forward(self, x: Any) -> Any:
        y, self.vjp = self.differentiate(x, *self.parameters)
        return y

    def backward(self, dy: Any) -> Any:
        dx, self.dW, *rest = self.vjp(dy)
        self.db = rest[0] if rest else None
        return dx


def torch_linear(W: Any, b: Any = None) -> Any:
    """Make a layer of ``torch.nn.functional.linear`` and autograd; W of shape (n, m) is transposed for it.

    Parameters
    ----------
    W : torch.Tensor, shape (n, m)
    b : torch.Tensor, shape (m,), optional
    """
    import torch

    def differentiate(x: Any, W: Any, b: Any = None) -> Any:
        leaves = [leaf.detach().requires_grad_() for leaf in (x, W, b) if leaf is not None]
        y = torch.nn.functional.linear(leaves[0], leaves[1].mT, *leaves[2:])

        def vjp(dy: Any) -> Any:
            for leaf in leaves:
                leaf.grad = None
            y.backward(dy, retain_graph=True)
            return [leaf.grad for leaf in leaves]

        return y.detach(), vjp

    return _Differentiated(W, b, differentiate)


def jax_vjp(W: Any, b: Any = None) -> Any:
    """Make a layer of ``jax.vjp`` of ``x @ W + b``.

    Parameters
    ----------
    W : jax.Array, shape (n, m)
    b : jax.Array, shape (m,), optional
    """
    import jax

    def differentiate(x: Any, *parameters: Any) -> Any:
        return jax.vjp(lambda x, W, b=None: x @ W if b is None else x @ W + b, x, *parameters)

    return _Differentiated(W, b, differentiate)


def torch_module(W: Any, b: Any = None) -> Any:
    """Make a layer of ``torch.nn.Linear`` and autograd, as a training loop uses them; its weights are (m, n).

    Parameters
    ----------
    W : torch.Tensor, shape (n, m)
    b : torch.Tensor, shape (m,), optional
    """
    return _torch_module(W, b, lambda linear: linear)


def _torch_module(W: Any, b: Any, compiled: Any) -> Any:
    import torch

    linear: Any = torch.nn.Linear(1, 1)
    linear.weight = torch.nn.Parameter(W.mT.contiguous().clone())
    linear.bias = None if b is None else torch.nn.Parameter(b.clone())
    call = compiled(linear)

    def differentiate(x: Any, *_: Any) -> Any:
        x = x.detach().requires_grad_()
        y = call(x)

        def vjp(dy: Any) -> Any:
            linear.zero_grad(set_to_none=True)
            x.grad = None
            y.backward(dy, retain_graph=True)
            parameters = [linear.weight.grad.mT] if b is None else [linear.weight.grad.mT, linear.bias.grad]
            return [x.grad, *parameters]

        return y, vjp

    return _Differentiated(W, b, differentiate)


def torch_compiled(W: Any, b: Any = None) -> Any:
    """Make the layer of `torch_module` with its forward, and the backward that autograd finds, compiled.

    Parameters
    ----------
    W : torch.Tensor, shape (n, m)
    b : torch.Tensor, shape (m,), optional
    """
    import torch

    torch.compiler.reset()  # after a few shapes torch would give up compiling, and say nothing
    return _torch_module(W, b, torch.compile)


def jax_jit(W: Any, b: Any = None) -> Any:
    """Make a layer of a ``jax.jit`` forward and a ``jax.jit`` backward that are written by hand.

    Parameters
    ----------
    W : jax.Array, shape (n, m)
    b : jax.Array, shape (m,), optional
    """
    forward, backward = jax_functions()

    def differentiate(x: Any, W: Any, b: Any = None) -> Any:
        return forward(x, W, b), lambda dy: backward(dy, x, W)

    return _Differentiated(W, b, differentiate)


@functools.cache
def jax_functions() -> Any:
    """Compiled once for all layers."""
    import jax

    forward = jax.jit(lambda x, W, b: x @ W if b is None else x @ W + b)
    return forward, jax.jit(lambda dy, x, W: (dy @ W.T, x.T @ dy, dy.sum(0)))


# The shapes that these libraries give a meaning to; a tensor is mapped along its last axis.
_SHAPES = frozenset({"vectors", "no-bias", "no-samples", "no-features", "no-outputs", "last-axis"})
torch_linear.supports = _SHAPES  # type: ignore[attr-defined]
torch_module.supports = _SHAPES  # type: ignore[attr-defined]
torch_compiled.supports = _SHAPES  # type: ignore[attr-defined]
jax_jit.supports = frozenset({"no-samples", "no-features", "no-outputs"})  # type: ignore[attr-defined]
jax_vjp.supports = _SHAPES  # type: ignore[attr-defined]


def thinc_linear(W: Any, b: Any) -> Any:
    """Make a layer of ``thinc.api.Linear``, whose accumulated gradients are cleared before each backward.

    Parameters
    ----------
    W : numpy.ndarray, shape (n, m), float32
    b : numpy.ndarray, shape (m,), float32
    """
    from thinc.api import Linear

    n, m = W.shape
    model: Any = Linear(m, n)
    model.set_param("W", np.ascontiguousarray(W.T))
    model.set_param("b", b)

    def differentiate(x: Any, *_: Any) -> Any:
        y, backprop = model.begin_update(x)

        def vjp(dy: Any) -> Any:
            for name in ("W", "b"):
                model.set_grad(name, np.zeros_like(model.get_param(name)))
            dx = backprop(dy)
            return dx, model.get_grad("W").T, model.get_grad("b")

        return y, vjp

    return _Differentiated(W, b, differentiate)


thinc_linear.supports = frozenset({"float32"})  # type: ignore[attr-defined]
