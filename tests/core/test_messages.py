"""Every message of the layer, whole: what came in, what was wanted, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pytest

from xaffine import AffineLayer, affine, affine_backward, affine_jvp, affine_vjp
from xaffine.curvature import affine_double_backward, gauss_newton_vector_product, kronecker_factors
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms

MESSAGES = Path(__file__).with_name("messages.txt")


def ones(*shape: int, dtype: Any = "float32") -> Any:
    return np.ones(shape, dtype)


def on_device(number: int, *shape: int) -> Any:
    return array_api_strict.ones(shape, device=array_api_strict.Device(f"device{number}"))


def read_only(*shape: int) -> Any:
    array = ones(*shape)
    array.flags.writeable = False
    return array


x, W, b, dy = ones(2, 3), ones(3, 4), ones(4), ones(2, 4)
shared = ones(2, 7)

CALLS = {
    "features, none fits": lambda: affine(ones(2, 5), W, b),
    "features, another slice fits": lambda: affine(ones(2, 5, 3), W),
    "features, several slices fit": lambda: affine(ones(3, 1, 3), W, n_batch_axes=0),
    "features, slice given": lambda: affine(ones(2, 5), W, n_batch_axes=-1),
    "W is no matrix": lambda: affine(x, ones(3), b),
    "W of a layer is no matrix": lambda: AffineLayer(ones(3)),
    "b is broadcast": lambda: affine(x, W, ones(4, 1)),
    "b of a layer is broadcast": lambda: AffineLayer(W, ones(1, 4)),
    "x has no axis": lambda: affine(ones(), W, b),
    "slice is no int": lambda: affine(x, W, b, n_batch_axes=1.5),
    "slice is out of range": lambda: affine(x, W, b, n_batch_axes=3),
    "dy has another shape": lambda: affine_backward(ones(2, 5), x, W, b),
    "dy of a vjp has another shape": lambda: affine_vjp(ones(3), W)[1](dy),
    "kinds of dtypes": lambda: affine(ones(2, 3, dtype="int32"), W, b),
    "two of another kind": lambda: affine(ones(2, 3, dtype="int32"), W, ones(4, dtype="bool")),
    "bool": lambda: affine(ones(2, 3, dtype="bool"), ones(3, 4, dtype="bool")),
    "complex": lambda: affine(x, ones(3, 4, dtype="complex64")),
    "no common dtype": lambda: affine(ones(2, 3, dtype="int64"), ones(3, 4, dtype="uint64")),
    "dy of another kind": lambda: affine_backward(ones(2, 4, dtype="int8"), x, W),
    "no array": lambda: affine([[1.0]], W),
    "no array at all": lambda: affine([[1.0]], [[1.0]]),
    "None for W": lambda: affine(x, None),
    "a NumPy scalar": lambda: affine(np.float32(1), W),
    "two libraries": lambda: affine(x, array_api_strict.ones((3, 4)), b),
    "two arrays of another library": lambda: affine(x, array_api_strict.ones((3, 4)), array_api_strict.ones(4)),
    "two devices": lambda: affine(on_device(1, 2, 3), on_device(2, 3, 4)),
    "wrt": lambda: affine_backward(dy, x, W, wrt=("x", "dW")),
    "out of another shape": lambda: affine(x, W, out=ones(4, 2)),
    "out of another dtype": lambda: affine(x, W, out=ones(2, 4, dtype="float64")),
    "out of another library": lambda: affine(x, W, out=array_api_strict.ones((2, 4))),
    "out on another device": lambda: affine(on_device(1, 2, 3), on_device(1, 3, 4), out=on_device(2, 2, 4)),
    "out is no array": lambda: affine(x, W, out=[[1.0]]),
    "out is read-only": lambda: affine(x, W, out=read_only(2, 4)),
    "out is broadcast": lambda: affine(x, W, out=np.lib.stride_tricks.as_strided(ones(4), (2, 4), (0, 4))),
    "outs are no three": lambda: affine_backward(dy, x, W, b, out=(x, W)),
    "outs are no tuple": lambda: affine_backward(dy, x, W, b, out=x),
    "out for what is not computed": lambda: affine_backward(dy, x, W, b, wrt=("W",), out=(ones(2, 3), None, None)),
    "out for a bias that is not there": lambda: affine_backward(dy, x, W, out=(None, None, ones(4))),
    "one out for two": lambda: affine_backward(ones(2, 2), ones(2, 2), ones(2, 2), out=(W[1:, 2:], W[:2, 1:3], None)),
    "out overlaps an operand": lambda: affine(shared[:, :3], W, b, out=shared[:, 2:6]),
    "out of a gradient": lambda: affine_backward(dy, x, W, b, out=(None, ones(4, 3), None)),
    "backward before forward": lambda: AffineLayer(W).backward(dy),
    "primals are no tuple": lambda: affine_jvp([x, W], (None, None)),
    "tangents are too many": lambda: affine_jvp((x, W, b), (None, None, None, None)),
    "tangent of another shape": lambda: affine_jvp((x, W, b), (None, x, None)),
    "tangent of no bias": lambda: affine_jvp((x, W), (None, None, b)),
    "tangent of another kind": lambda: affine_jvp((x, W, b), (None, None, ones(4, dtype="int32"))),
    "cotangents are no three": lambda: affine_double_backward((None, None), dy, x, W, b),
    "cotangents are no tuple": lambda: affine_double_backward([None, None, None], dy, x, W, b),
    "cotangent of dx has another shape": lambda: affine_double_backward((W, None, None), dy, x, W, b),
    "cotangent of dW has another shape": lambda: affine_double_backward((None, x, None), dy, x, W, b),
    "cotangent of no bias": lambda: affine_double_backward((None, None, b), dy, x, W),
    "vector is no tuple": lambda: gauss_newton_vector_product(W, lambda y_dot: y_dot, x, W),
    "vector has another shape": lambda: gauss_newton_vector_product((W, x, x), lambda y_dot: y_dot, x, W, b),
    "factors of integers": lambda: kronecker_factors(*[ones(2, 2, dtype="int32")] * 3),
    "factors of an empty batch": lambda: kronecker_factors(ones(0, 4), ones(0, 3), W),
    "norms of integers": lambda: per_sample_gradient_norms(*[ones(2, 2, dtype="int32")] * 3),
    "norm is not above zero": lambda: clipped_gradients(dy, x, W, b, max_norm=0),
}


def message_of(call: Any) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        call()
    return f"{caught.type.__name__}: {caught.value}"


def written() -> dict[str, str]:
    blocks = MESSAGES.read_text(encoding="utf-8").strip().split("\n\n")
    return dict(block.split("\n", 1) for block in blocks)


@pytest.mark.parametrize("name", CALLS)
def test_message(name: str) -> None:
    assert message_of(CALLS[name]) == written()[name]


def test_no_message_is_left_over() -> None:
    assert written().keys() == CALLS.keys()


def test_layer_describes_itself() -> None:
    assert (
        repr(AffineLayer(W, b)) == "<AffineLayer: W is float32 (3, 4) (numpy on cpu); b is float32 (4,) (numpy on cpu)>"
    )
    assert repr(AffineLayer(W, n_batch_axes=-1)) == (
        "<AffineLayer, n_batch_axes=-1: W is float32 (3, 4) (numpy on cpu); b is None>"
    )
