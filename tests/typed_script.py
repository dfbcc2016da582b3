"""What a user writes under a strict type checker: `nox -s lint` checks that it passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_type

import numpy as np

from xaffine import AffineLayer, Gradients, affine, affine_backward, affine_jvp, affine_vjp, backends

if TYPE_CHECKING:
    from numpy.typing import NDArray


def train(x: NDArray[np.float32], dy: NDArray[np.float32], lr: float = 0.1) -> NDArray[np.float32]:
    """Take a step, with the gradients of a layer and of the functions."""
    layer = AffineLayer.random(64, 10, backend="numpy", scheme="xavier_normal", seed=0)
    y: NDArray[np.float32] = layer(x)
    dx: NDArray[np.float32] = layer.backward(dy, wrt=("x", "W"), accumulate=True)
    layer.W -= lr * layer.dW
    if layer.b is not None:
        layer.b -= lr * layer.db
    _, vjp = affine_vjp(x, layer.W, layer.b)
    gradients = vjp(dy, wrt="W")
    assert_type(gradients, Gradients)
    layer.W -= lr * gradients.dW
    y, y_dot = affine_jvp((x, layer.W), (dx, None))
    dx, dW, _ = affine_backward(dy, x, layer.W, wrt=["x", "W"])
    assert_type(backends.get("numpy").name, str)
    total: NDArray[np.float32] = affine(x, layer.W) + y_dot + y + lr * dx @ dW
    return total
