"""`AffineLayer` beside the class that it replaces, and equations (1) to (5) of docs/derivation.md.

Hypothesis draws N, n, m (0 included), the shape of x, and whether there is a bias. All values are small integers, so
every sum is exact in any order and results are compared with ``==``. ``pytest --backend torch`` runs this on torch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xaffine import AffineLayer


class Classic:
    """The affine layer as it is usually written, on NumPy."""

    def __init__(self, W: Any, b: Any) -> None:
        self.W, self.b = W, b

    def forward(self, x: Any) -> Any:
        self.original_x_shape = x.shape
        self.x = x.reshape(x.shape[0], self.W.shape[0])
        return self.x @ self.W + (0 if self.b is None else self.b)

    def backward(self, dout: Any) -> Any:
        self.dW = self.x.T @ dout
        self.db = None if self.b is None else dout.sum(axis=0)
        return (dout @ self.W.T).reshape(self.original_x_shape)


class Operands(NamedTuple):
    x: Any
    W: Any
    b: Any
    dy: Any


@st.composite
def operands(draw: st.DrawFn, smallest_N: int = 0) -> Operands:
    """Draw x (N, d1, ...), W (n, m) with n = d1 · ..., b (m,) or None, and dy (N, m)."""
    N, m = draw(st.integers(smallest_N, 20)), draw(st.integers(0, 20))
    features = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = (N, *features), (math.prod(features), m), (m,), (N, m)
    x, W, b, dy = (rng.integers(-9, 10, shape).astype("float32") for shape in shapes)
    return Operands(x, W, b if draw(st.booleans()) else None, dy)


@pytest.fixture(scope="module")
def results(backend: Any, device: Any) -> Any:
    """Return the function that computes (y, dx, dW, db) with `AffineLayer` on the backend under test."""

    def compute(x: Any, W: Any, b: Any, dy: Any) -> Any:
        x, W, b, dy = (None if a is None else backend.from_numpy(a, device=device) for a in (x, W, b, dy))
        layer = AffineLayer(W, b)
        y, dx = layer.forward(x), layer.backward(dy)
        return tuple(None if a is None else backend.to_numpy(a) for a in (y, dx, layer.dW, layer.db))

    return compute


@given(operands())
def test_results_equal_those_of_the_classic_class(results: Any, operands: Operands) -> None:
    x, W, b, dy = operands
    classic = Classic(W, b)
    y, dx = classic.forward(x), classic.backward(dy)
    for ours, expected in zip(results(x, W, b, dy), (y, dx, classic.dW, classic.db), strict=True):
        assert np.array_equal(ours, expected)


@given(operands())
def test_gradients_have_the_shapes_of_what_they_are_gradients_of(results: Any, operands: Operands) -> None:
    x, W, b, dy = operands
    y, dx, dW, db = results(x, W, b, dy)
    assert (y.shape, dx.shape, dW.shape) == ((len(x), W.shape[1]), x.shape, W.shape)
    assert db is None if b is None else db.shape == b.shape


@given(operands(smallest_N=1))
def test_equation_1_one_sample_is_x_W_plus_b(results: Any, operands: Operands) -> None:
    x, W, b, dy = rows(operands.x, operands.W)[0], operands.W, operands.b, operands.dy[0]
    y, *_ = results(x, W, b, dy)
    assert y.tolist() == [sum(x * W[:, j]) + (0 if b is None else b[j]) for j in range(len(dy))]


@given(operands())
def test_equation_2_every_sample_of_a_batch_is_x_W_plus_b(results: Any, operands: Operands) -> None:
    x, W, b, dy = operands
    y, *_ = results(x, W, b, dy)
    assert np.array_equal(y, (rows(x, W)[:, :, None] * W).sum(axis=1) + (0 if b is None else b))


@given(operands())
def test_equation_3_dx_is_dy_times_W_transposed(results: Any, operands: Operands) -> None:
    x, W, b, dy = operands
    _, dx, _, _ = results(x, W, b, dy)
    assert np.array_equal(rows(dx, W), (dy[:, None, :] * W).sum(axis=2))


@given(operands())
def test_equation_4_dW_is_x_transposed_times_dy(results: Any, operands: Operands) -> None:
    x, W, b, dy = operands
    _, _, dW, _ = results(x, W, b, dy)
    assert np.array_equal(dW, (rows(x, W)[:, :, None] * dy[:, None, :]).sum(axis=0))


@given(operands())
def test_equation_5_db_is_the_sum_of_dy_over_the_batch(results: Any, operands: Operands) -> None:
    x, W, _, dy = operands
    _, _, _, db = results(x, W, np.ones(dy.shape[1], "float32"), dy)
    assert np.array_equal(db, dy.sum(axis=0))


def rows(x: Any, W: Any) -> Any:
    """Flatten each sample to one row of n features."""
    return x.reshape(len(x), len(W))
