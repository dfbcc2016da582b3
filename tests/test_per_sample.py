"""Gradients of each sample, their norms, and clipped sums, against the definition."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from xaffine import affine_backward, per_sample
from xaffine.backends import Backend
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms, per_sample_gradients
from xaffine.testing import bounds, make_case
from xaffine.testing.cases import Case
from xaffine.testing.strategies import cases


def floating(backend: Backend, device: Any) -> list[str]:
    return [dtype for dtype in backend.dtypes(device) if "int" not in dtype]


def on(case: Case, backend: Backend, device: Any) -> list[Any]:
    return [None if o is None else o.on(backend, device) for o in (case.dy, case.x, case.W, case.b)]


def samples(case: Case) -> tuple[Any, Any]:
    """x as (N, T, n) and dy as (N, T, m) in float64 or complex128; N = 1 without a batch axis."""
    batch, (n, m) = case.batch, case.W.values.shape
    N, T = (batch[0] if batch else 1), math.prod(batch[1:])
    kind = complex if np.iscomplexobj(case.x.values) else float
    return case.x.values.astype(kind).reshape(N, T, n), case.dy.values.astype(kind).reshape(N, T, m)


def squared_norms(case: Case) -> Any:
    """‖dW_i‖² + ‖db_i‖² of every sample of small integers, exactly."""
    x, dy = samples(case)
    squares = (abs(np.einsum("itj,itk->ijk", x, dy)) ** 2).sum((1, 2))
    return np.round(squares + (0 if case.b is None else (abs(dy.sum(1)) ** 2).sum(1)))


def u(case: Case) -> Fraction:
    """The unit roundoff of what is computed in: float32 for halves."""
    names = {case.x.dtype, case.dy.dtype} - {"float16", "bfloat16"}
    return min(map(bounds.unit_roundoff, names), default=bounds.unit_roundoff("float32"))


def test_gradients_are_those_of_the_definition(backend: Backend, device: Any) -> None:
    @given(cases(backend.dtypes(device), max_extent=12))
    def exact(case: Case) -> None:
        dy, x, W, b = on(case, backend, device)
        dW, db = per_sample_gradients(dy, x, W, b, n_batch_axes=case.n_batch_axes)
        x_, dy_ = samples(case)
        batch = case.batch[:1]
        assert (dW.dtype, type(dW)) == (W.dtype, type(W))
        got = backend.to_numpy(dW)
        assert got.shape == (*batch, *case.W.values.shape)
        assert np.array_equal(got, np.einsum("itj,itk->ijk", x_, dy_).reshape(got.shape))
        assert (db is None) == (b is None)
        if db is not None:
            assert (db.dtype, type(db)) == (b.dtype, type(b))
            assert np.array_equal(backend.to_numpy(db), dy_.sum(1).reshape(*batch, case.W.values.shape[1]))

    exact()


def test_norms_of_integers_are_rounded_roots(backend: Backend, device: Any) -> None:
    """Sums are exact, two roots and their product are rounded."""

    @given(cases(floating(backend, device), max_extent=12))
    def rounded(case: Case) -> None:
        dy, x, W, b = on(case, backend, device)
        norms = backend.to_numpy(per_sample_gradient_norms(dy, x, W, b, n_batch_axes=case.n_batch_axes))
        assert norms.shape == case.batch[:1]
        assert norms.dtype in (np.float32, np.float64)
        exact = np.sqrt(squared_norms(case))
        limit = float(bounds.gamma(4, u(case)))  # and one for our own root
        assert (abs(norms.reshape(-1).astype(float) - exact) <= limit * exact).all()

    rounded()


def test_norms_of_floats_are_within_their_bounds(backend: Backend, device: Any) -> None:
    """No more roundings than the longest way has: products, sums over features, rows and pairs of rows, one root."""

    @given(cases(floating(backend, device), values="floats", mixed=False, max_extent=6))
    def bounded(case: Case) -> None:
        dy, x, W, b = on(case, backend, device)
        norms = backend.to_numpy(per_sample_gradient_norms(dy, x, W, b, n_batch_axes=case.n_batch_axes)).reshape(-1)
        x_, dy_ = samples(case)
        (_, T, n), m = x_.shape, dy_.shape[2]
        parts = 2 if np.iscomplexobj(x_) else 1
        k = parts * parts * (n * m + T * T + 4 * T + n + m + 8)
        factor = bounds.gamma(k, u(case))
        for i, norm in enumerate(norms.tolist()):
            total, magnitude = exact_square(x_[i], dy_[i], bias=b is not None)
            assert abs(Fraction(norm) ** 2 - total) <= factor * magnitude

    bounded()


def exact_square(x: Any, dy: Any, *, bias: bool) -> tuple[Fraction, Fraction]:
    """‖x yᵀ‖² + ‖Σ dy‖² in exact arithmetic, and the same of absolute values."""

    def fractions(array: Any) -> Any:
        return np.vectorize(Fraction, otypes=[object])(array) if array.size else array.astype(object)

    def square(x: Any, dy: Any) -> Fraction:
        (xr, xi), (dr, di) = ((fractions(part.real), fractions(part.imag)) for part in (x, dy))
        total = ((xr.T @ dr - xi.T @ di) ** 2).sum() + ((xr.T @ di + xi.T @ dr) ** 2).sum()
        return Fraction(total + (((dr.sum(0)) ** 2).sum() + (di.sum(0) ** 2).sum() if bias else 0))

    absolute = [abs(part.real) + abs(part.imag) for part in (x, dy)]
    return square(x, dy), square(*absolute)


@pytest.mark.parametrize("shape", [(4, 2, 11), (4, 9, 3)])  # by Gram matrices, and by the gradients themselves
def test_norms_of_complex_gradients_are_real(backend: Backend, device: Any, shape: Any) -> None:
    if "complex128" not in backend.dtypes(device):
        pytest.skip("this backend has no complex numbers")
    case = make_case(shape, 12, seed=0, dtypes="complex128", n_batch_axes=2)
    dy, x, W, b = on(case, backend, device)
    norms = backend.to_numpy(per_sample_gradient_norms(dy, x, W, b, n_batch_axes=2))
    exact = np.sqrt(squared_norms(case))
    assert norms.dtype == np.float64
    assert (abs(norms - exact) <= float(bounds.gamma(4, u(case))) * exact).all()


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (3,)])
def test_sums_that_are_not_clipped_are_the_gradients(backend: Backend, device: Any, shape: Any) -> None:
    axes = 2 if len(shape) == 3 else None
    for dtype in floating(backend, device):
        case = make_case(shape, 2, seed=1, dtypes=dtype, n_batch_axes=axes)
        dy, x, W, b = on(case, backend, device)
        clipped = clipped_gradients(dy, x, W, b, max_norm=math.inf, n_batch_axes=axes)
        whole = affine_backward(dy, x, W, b, n_batch_axes=axes)
        assert clipped.dx is None
        for got, expected in zip(clipped[1:], whole[1:], strict=True):
            assert (got.dtype, type(got)) == (expected.dtype, type(expected))
            assert np.array_equal(backend.to_numpy(got), backend.to_numpy(expected))


def test_clipped_sums_are_within_their_bounds(backend: Backend, device: Any) -> None:
    """A weight is rounded five times: a norm (three), a quotient, a product with dy; then come N T more."""

    @given(cases([d for d in floating(backend, device) if "16" not in d], mixed=False, max_extent=8))
    def bounded(case: Case) -> None:
        dy, x, W, b = on(case, backend, device)
        norms = np.sqrt(squared_norms(case))
        max_norm = float(np.median(norms)) + 0.5 if norms.size else 1.0
        clipped = clipped_gradients(dy, x, W, b, max_norm=max_norm, n_batch_axes=case.n_batch_axes)
        weights = np.minimum(1, max_norm / np.maximum(norms, max_norm))[:, None, None]
        x_, dy_ = samples(case)
        terms = x_.shape[0] * x_.shape[1]
        # Complex products have two terms, each of which the weights in float64 add roundings to, too.
        limit = float(bounds.gamma(2 * terms + 12, u(case)))
        pairs = [(clipped.dW, "itj,itk->jk", (x_, weights * dy_))]
        if b is not None:
            pairs.append((clipped.db, "itk->k", (weights * dy_,)))
        for got, sum_, factors in pairs:
            expected = np.einsum(sum_, *factors)
            size = np.einsum(sum_, *(abs(factor.real) + abs(factor.imag) for factor in factors))
            assert (abs(backend.to_numpy(got) - expected) <= 2 * limit * size).all()

    bounded()


def test_no_sample_weighs_more_than_it_may(backend: Backend, device: Any) -> None:
    case = make_case((40, 3), 4, seed=0)
    dy, x, W, b = on(case, backend, device)
    for i in range(5):
        one = slice(i, i + 1)
        clipped = clipped_gradients(dy[one, :], x[one, :], W, b, max_norm=1.0)
        norm = math.hypot(*(np.linalg.norm(backend.to_numpy(g)) for g in clipped[1:]))
        assert norm <= 1 + 1e-6 or norm <= 1 + float(bounds.gamma(20, bounds.unit_roundoff("float32")))


@pytest.mark.once
@pytest.mark.parametrize("elements", [1, 7, 40])
@pytest.mark.parametrize("shape", [(9, 3), (5, 3, 2), (4, 2, 30), (0, 3)])
def test_blocks_agree_with_the_whole(monkeypatch: pytest.MonkeyPatch, elements: int, shape: Any) -> None:
    axes = len(shape) - 1
    case = make_case(shape, 20, seed=0, dtypes="float64", n_batch_axes=axes)
    operands = [o.values for o in (case.dy, case.x, case.W, case.b) if o is not None]
    whole = [per_sample_gradient_norms(*operands, n_batch_axes=axes)]
    whole += clipped_gradients(*operands, max_norm=4.0, n_batch_axes=axes)[1:]
    monkeypatch.setattr(per_sample, "_ELEMENTS", elements)
    parts = [per_sample_gradient_norms(*operands, n_batch_axes=axes)]
    parts += clipped_gradients(*operands, max_norm=4.0, n_batch_axes=axes)[1:]
    size = np.einsum("ij,ik->jk", abs(operands[1]).reshape(-1, shape[-1]), abs(operands[0]).reshape(-1, 20))
    limit = float(bounds.gamma(4 * len(operands[1]) + 20, bounds.unit_roundoff("float64")))
    assert np.array_equal(parts[0], whole[0])
    assert (abs(parts[1] - whole[1]) <= limit * size).all()
    assert (abs(parts[2] - whole[2]) <= limit * abs(operands[0]).reshape(-1, 20).sum(0)).all()


@pytest.mark.once
def test_memory_stays_small_at_scale() -> None:
    rng = np.random.default_rng(0)
    N, n, m = 65536, 512, 512
    x, dy = (rng.standard_normal((N, k), dtype=np.float32) for k in (n, m))
    W, b = np.zeros((n, m), np.float32), np.zeros(m, np.float32)
    tracemalloc.start()
    try:
        norms = per_sample_gradient_norms(dy, x, W, b)
        clipped = clipped_gradients(dy, x, W, b, max_norm=float(np.median(norms)))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert norms.shape == (N,)
    some = slice(0, N, 8191)
    exact = np.sqrt((x[some].astype(float) ** 2).sum(1) + 1) * np.sqrt((dy[some].astype(float) ** 2).sum(1))
    assert (abs(norms[some] - exact) <= float(bounds.gamma(n + m + 8, bounds.unit_roundoff("float32"))) * exact).all()
    assert np.isfinite(clipped.dW).all()


def test_nan_of_one_sample_is_its_own_norm_and_poisons_the_sum(backend: Backend, device: Any) -> None:
    if backend.name == "sparse":
        pytest.skip("the library warns of NaN in products")
    x, dy = np.ones((3, 2), "float32"), np.ones((3, 2), "float32")
    x[1, 0] = np.nan
    operands = [backend.from_numpy(a, device=device) for a in (dy, x, np.ones((2, 2), "float32"))]
    assert np.isnan(backend.to_numpy(per_sample_gradient_norms(*operands))).tolist() == [False, True, False]
    dW = backend.to_numpy(clipped_gradients(*operands, max_norm=1.0).dW)
    assert np.isnan(dW[0]).all()


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan])
def test_norm_that_is_not_above_zero_is_refused(max_norm: float) -> None:
    x = np.ones((2, 2))
    with pytest.raises(ValueError, match="max_norm must be above 0, not"):
        clipped_gradients(x, x, x, max_norm=max_norm)


def test_integers_have_no_norms(backend: Backend, device: Any) -> None:
    if "int32" not in backend.dtypes(device):
        pytest.skip("this device has no products of integers")
    x = backend.from_numpy(np.ones((2, 2), "int32"), device=device)
    for call in (per_sample_gradient_norms, lambda *a: clipped_gradients(*a, max_norm=1.0)):
        with pytest.raises(TypeError, match="norms are of floating dtype: dy is int32"):
            call(x, x, x)


def test_wrong_dy_is_refused(backend: Backend, device: Any) -> None:
    x, W = (backend.from_numpy(np.ones(shape, "float32"), device=device) for shape in ((2, 3), (3, 4)))
    for call in (per_sample_gradients, per_sample_gradient_norms, lambda *a: clipped_gradients(*a, max_norm=1.0)):
        with pytest.raises(ValueError, match="dy must have the shape of y"):
            call(x, x, W)
