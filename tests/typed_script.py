"""What a user writes under a strict type checker, and what that knows of it: `nox -s lint` checks both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

import numpy as np

import xaffine
from xaffine import AffineLayer, Gradients, affine, affine_backward, affine_jvp, affine_vjp, backends, initializers
from xaffine.curvature import (
    KroneckerFactors,
    SecondGradients,
    affine_double_backward,
    gauss_newton_vector_product,
    kronecker_factors,
)
from xaffine.per_sample import (
    PerSampleGradients,
    clipped_gradients,
    per_sample_gradient_norms,
    per_sample_gradients,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal, TypeAlias

    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float32]


class Tensor:
    """An array of another library."""


class Parameter(Tensor):
    """Another of its types."""


class Dense(AffineLayer):
    """A user's layer."""

    name = "dense"


def train(x: Floats, dy: Floats, lr: float = 0.1) -> Floats:
    """Take a step, with the gradients of a layer and of the functions."""
    layer = AffineLayer.random(64, 10, backend="numpy", scheme="xavier_normal", seed=0)
    y: Floats = layer(x)
    dx: Floats = layer.backward(dy, wrt=("x", "W"), accumulate=True)
    layer.W -= lr * layer.dW
    if layer.b is not None:
        layer.b -= lr * layer.db
    layer.dW = None
    _, vjp = affine_vjp(x, layer.W, layer.b)
    layer.W -= lr * vjp(dy, wrt="W").dW
    y, y_dot = affine_jvp((x, layer.W), (dx, None))
    dx, _, _ = affine_backward(dy, x, layer.W, wrt=("x", "W"))
    assert_type(backends.get("numpy").name, str)
    total: Floats = affine(x, layer.W) + y_dot + y + dx @ layer.W
    return total


def functions(dy: Floats, x: Floats, W: Floats, b: Floats, b_or_none: Floats | None) -> None:
    """Of NumPy."""
    assert_type(affine(x, W, b), Floats)
    assert_type(affine_backward(dy, x, W, b), Gradients[Floats, Floats, Floats])
    assert_type(affine_backward(dy, x, W), Gradients[Floats, Floats, None])
    assert_type(affine_backward(dy, x, W, b_or_none).db, Floats)
    y, vjp = affine_vjp(x, W, b)
    assert_type(y, Floats)
    assert_type(vjp(dy), Gradients[Floats, Floats, Floats])
    assert_type(vjp(dy, wrt=("W", "b")), Gradients[None, Floats, Floats])
    assert_type(affine_jvp((x, W, b), (None, W, None)), tuple[Floats, Floats])
    cube = np.ones((2, 3, 4))  # of which a type checker knows the number of axes, 3, and y has 2
    assert_type(affine(cube, W).shape, tuple[Any, ...])
    assert_type(AffineLayer(W)(cube).shape, tuple[Any, ...])
    assert_type(AffineLayer(W).backward(np.ones((2, 5))).shape, tuple[Any, ...])
    assert_type(per_sample_gradients(dy, x, np.ones((12, 5))).dW.shape, tuple[Any, ...])


def other_libraries(dy: Tensor, x: Tensor, W: Parameter, b: Parameter | None, unknown: Any) -> None:
    """Of any other library, and of one without types."""
    assert_type(affine(x, W, b), Tensor)
    assert_type(affine_backward(dy, x, W, b), Gradients[Tensor, Parameter, Parameter])
    assert_type(affine_vjp(x, W)[1](dy), Gradients[Tensor, Parameter, None])
    assert_type(affine_jvp((x, W), (None, W)), tuple[Tensor, Tensor])
    layer = AffineLayer(W, b)
    assert_type(layer, AffineLayer[Parameter, Parameter])
    assert_type(layer(x), Tensor)
    assert_type(layer.backward(dy), Tensor)
    assert_type(layer.to("torch").W, Any)
    affine(unknown, W).todense()
    AffineLayer(unknown).backward(unknown).todense()
    per_sample_gradients(unknown, unknown, unknown).dW.todense()


def chosen(dy: Tensor, x: Tensor, W: Parameter, b: Parameter, names: Iterable[Literal["x", "W", "b"]]) -> None:
    """By wrt."""
    assert_type(affine_backward(dy, x, W, b, wrt="x"), Gradients[Tensor, None, None])
    assert_type(affine_backward(dy, x, W, b, wrt=("W",)), Gradients[None, Parameter, None])
    assert_type(affine_backward(dy, x, W, b, wrt="b"), Gradients[None, None, Parameter])
    assert_type(affine_backward(dy, x, W, b, wrt=("x", "W")), Gradients[Tensor, Parameter, None])
    assert_type(affine_backward(dy, x, W, b, wrt=("b", "x")), Gradients[Tensor, None, Parameter])
    assert_type(affine_backward(dy, x, W, b, wrt=("W", "b")), Gradients[None, Parameter, Parameter])
    assert_type(affine_backward(dy, x, W, b, wrt=("x", "W", "b")), Gradients[Tensor, Parameter, Parameter])
    assert_type(affine_backward(dy, x, W, wrt=names), Gradients[Tensor | None, Parameter | None, None])
    takes_gradients(affine_backward(dy, x, W), affine_backward(dy, x, W, b, wrt="W"))
    layer = AffineLayer(W, b)
    assert_type(layer.backward(dy, wrt=("x", "b")), Tensor)
    assert_type(layer.backward(dy, wrt=names), Tensor | None)
    gradients = gauss_newton_vector_product((None, W), lambda y_dot: y_dot, x, W, b, wrt="W")
    assert_type(gradients, Gradients[None, Parameter, None])


def takes_gradients(_: Gradients, __: Gradients[Tensor | None, Tensor | None, Tensor | None]) -> None:
    """Of every array, and of every tensor."""


def layers(x: Floats, W: Floats, b: Floats, name: str) -> None:
    """Made in every way."""
    assert_type(AffineLayer(W, b), AffineLayer[Floats, Floats])
    assert_type(AffineLayer(W, b).b, Floats | Any)
    assert_type(AffineLayer(W), AffineLayer[Floats, Any])
    assert_type(AffineLayer(W, b).dW, Floats)
    assert_type(AffineLayer.random(3, 2), AffineLayer[NDArray[Any], NDArray[Any]])
    assert_type(AffineLayer.load(name).W, NDArray[Any])
    assert_type(AffineLayer.load_linear(name).db, NDArray[Any])
    print([AffineLayer(W, b), AffineLayer(W)][0].W.shape)
    assert_type(AffineLayer.random(3, 2, backend="torch").W, Any)
    assert_type(AffineLayer.random(3, 2, backend=name).to("numpy"), AffineLayer[NDArray[Any], NDArray[Any]])
    assert_type(Dense.random(3, 2), Dense)
    assert_type(Dense.load(name).to("numpy").name, str)
    assert_type(Dense(W, b)(x), Floats)
    takes_every_layer(AffineLayer(np.ones((3, 2)), np.ones(2)))


def takes_every_layer(layer: AffineLayer) -> AffineLayer:
    """Without types in brackets."""
    takes_layers_of_numpy(AffineLayer(np.ones((3, 2)), np.ones(2)))
    return layer


def takes_layers_of_numpy(_: AffineLayer[NDArray[np.float64], NDArray[np.float64]]) -> None:
    """With them."""


def further(dy: Floats, x: Floats, W: Floats, b: Floats, t: Tensor) -> None:
    """What the sub-modules give."""
    assert_type(per_sample_gradients(dy, x, W, b), PerSampleGradients[Floats, Floats])
    assert_type(per_sample_gradients(dy, x, W), PerSampleGradients[Floats, None])
    assert_type(per_sample_gradients(t, t, t), PerSampleGradients[Tensor, None])
    assert_type(per_sample_gradient_norms(dy, x, W), NDArray[np.floating[Any]])
    assert_type(clipped_gradients(dy, x, W, b, max_norm=1.0), Gradients[None, Floats, Floats])
    assert_type(affine_double_backward((x, None, None), dy, x, W), SecondGradients[Floats, None, Floats])
    assert_type(kronecker_factors(dy, x, W), KroneckerFactors[Floats, Floats])
    assert_type(kronecker_factors(t, t, t), KroneckerFactors[Tensor, Tensor])
    assert_type(initializers.draw("he", 3, 2, seed=0), NDArray[np.float64])
    assert_type(backends.names()[0], backends.Name)
    _ = xaffine.afine  # type: ignore[attr-defined]
