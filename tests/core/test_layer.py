"""`AffineLayer`: a drop-in for the classic layer, and what it keeps when a call is rejected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.test_affine_layer import Classic
from xaffine import AffineLayer
from xaffine.backends import Backend


def some_layer(backend: Backend, seed: int = 0) -> tuple[AffineLayer, Any, Any]:
    rng = np.random.default_rng(seed)
    W, b, x, dy = (rng.integers(-3, 4, s).astype("float32") for s in ((6, 4), (4,), (5, 2, 3), (5, 4)))
    return AffineLayer(backend.from_numpy(W), backend.from_numpy(b)), backend.from_numpy(x), backend.from_numpy(dy)


def test_code_for_the_classic_layer_runs_unchanged() -> None:
    rng = np.random.default_rng(0)
    W, b = rng.integers(-3, 4, (6, 4)).astype(float), rng.integers(-3, 4, 4).astype(float)
    histories = []
    for kind in (Classic, AffineLayer):
        layer = kind(W.copy(), b.copy())
        data = np.random.default_rng(1)
        history = []
        for _ in range(3):
            x, dout = data.integers(-3, 4, (5, 2, 3)).astype(float), data.integers(-3, 4, (5, 4)).astype(float)
            history += [layer.forward(x), layer.backward(dout), layer.dW, layer.db]
            layer.W -= 0.5 * layer.dW
            layer.b -= 0.5 * layer.db
        histories.append(history)
    for classic, ours in zip(*histories, strict=True):
        np.testing.assert_array_equal(classic, ours)


def test_parameters_are_held_by_reference() -> None:
    W, b = np.ones((2, 1)), np.zeros(1)
    layer = AffineLayer(W, b)
    W -= 3
    b += 10
    assert layer(np.ones((1, 2))).tolist() == [[6]]


def test_calling_is_forward(backend: Backend) -> None:
    layer, x, _ = some_layer(backend)
    assert np.array_equal(backend.to_numpy(layer(x)), backend.to_numpy(layer.forward(x)))


def test_rebinding_parameters_after_forward_does_not_change_its_backward(backend: Backend) -> None:
    layer, x, dy = some_layer(backend)
    layer(x)
    before = [backend.to_numpy(a) for a in (layer.backward(dy), layer.dW, layer.db)]
    layer.W, layer.b, layer.n_batch_axes = layer.W + 1, None, -1
    after = [backend.to_numpy(a) for a in (layer.backward(dy), layer.dW, layer.db)]
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old, new)


def test_rebound_parameters_count_from_the_next_forward(backend: Backend) -> None:
    layer, x, _ = some_layer(backend)
    layer.W, layer.b = layer.W * 0, layer.b * 0
    assert not backend.to_numpy(layer(x)).any()


def test_rejected_forward_keeps_the_forward_before(backend: Backend) -> None:
    layer, x, dy = some_layer(backend)
    layer(x)
    expected = backend.to_numpy(layer.backward(dy))
    dW, db = layer.dW, layer.db
    with pytest.raises(ValueError, match="features"):
        layer(layer.W)
    assert layer.dW is dW
    assert layer.db is db
    assert np.array_equal(backend.to_numpy(layer.backward(dy)), expected)


def test_backward_before_forward(backend: Backend) -> None:
    layer, _, dy = some_layer(backend)
    with pytest.raises(RuntimeError, match=r"layer\.forward\(x\) first"):
        layer.backward(dy)
    assert layer.dW is None
    assert layer.db is None


def test_rejected_first_forward_is_no_forward(backend: Backend) -> None:
    layer, _, dy = some_layer(backend)
    with pytest.raises(ValueError, match="features"):
        layer(layer.W)
    with pytest.raises(RuntimeError):
        layer.backward(dy)


def test_wrong_dy_fails_before_a_gradient_is_stored(backend: Backend) -> None:
    layer, x, _ = some_layer(backend)
    layer(x)
    with pytest.raises(ValueError, match="dy must have the shape of y"):
        layer.backward(x)
    assert layer.dW is None
    assert layer.db is None


def test_without_a_bias_db_is_none(backend: Backend) -> None:
    layer, x, dy = some_layer(backend)
    layer = AffineLayer(layer.W)
    layer(x)
    layer.backward(dy)
    assert layer.dW is not None
    assert layer.db is None


@pytest.mark.parametrize(
    ("shape_W", "shape_b"), [((2,), (2,)), ((2, 3, 4), None), ((2, 3), (2,)), ((2, 3), (3, 1)), ((2, 3), ())]
)
def test_unfit_parameters_are_refused_at_once(ones: Any, shape_W: Any, shape_b: Any) -> None:
    b = None if shape_b is None else ones(*shape_b)
    with pytest.raises(ValueError, match="must"):
        AffineLayer(ones(*shape_W), b)


def test_bias_of_another_kind_is_refused_at_once(ones: Any) -> None:
    with pytest.raises(TypeError, match=r"W is float32 \(3, 2\).*b is int32 \(2,\).*Cast b to float32 first"):
        AffineLayer(ones(3, 2), ones(2, dtype="int32"))


def test_repr_says_shapes_dtypes_and_library() -> None:
    layer = AffineLayer(np.ones((3, 2)), np.ones(2), n_batch_axes=-1)
    assert repr(layer) == (
        "<AffineLayer, n_batch_axes=-1: W is float64 (3, 2) (numpy on cpu); b is float64 (2,) (numpy on cpu)>"
    )
    assert repr(AffineLayer(np.ones((3, 2)))) == "<AffineLayer: W is float64 (3, 2) (numpy on cpu); b is None>"
