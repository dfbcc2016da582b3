"""Gradients of each sample, their norms, and clipped sums, against the definition."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import case_on, floating_dtypes
from xaffine import affine_backward, per_sample
from xaffine._checks import check
from xaffine.backends import Backend, get
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms, per_sample_gradients
from xaffine.testing import bounds, make_case
from xaffine.testing.cases import Case
from xaffine.testing.strategies import cases

NUMPY = get("numpy")


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
        dy, x, W, b = case_on(case, backend, device)
        dW, db = per_sample_gradients(dy, x, W, b, n_batch_axes=case.n_batch_axes)
        x_, dy_ = samples(case)
        batch = case.batch[:1]
        assert (dW.dtype, type(dW)) == (W.dtype, type(W))
        got = backend.to_numpy(dW)
        assert got.shape == (*batch, *case.W.values.shape)
        assert np.array_equal(got, (x_[..., None] * dy_[:, :, None, :]).sum(axis=1).reshape(got.shape))
        assert (db is None) == (b is None)
        if db is not None:
            assert (db.dtype, type(db)) == (b.dtype, type(b))
            assert np.array_equal(backend.to_numpy(db), dy_.sum(1).reshape(*batch, case.W.values.shape[1]))

    exact()


def test_norms_of_integers_are_rounded_roots(backend: Backend, device: Any) -> None:
    """Sums are exact, two roots and their product are rounded."""

    @given(cases(floating_dtypes(backend, device), max_extent=12))
    def rounded(case: Case) -> None:
        dy, x, W, b = case_on(case, backend, device)
        norms = backend.to_numpy(per_sample_gradient_norms(dy, x, W, b, n_batch_axes=case.n_batch_axes))
        assert norms.shape == case.batch[:1]
        assert norms.dtype in (np.float32, np.float64)
        exact = np.sqrt(squared_norms(case))
        limit = float(bounds.gamma(4, u(case)))  # and one for our own root
        assert (abs(norms.reshape(-1).astype(float) - exact) <= limit * exact).all()

    rounded()


def test_norms_of_floats_are_within_their_bounds(backend: Backend, device: Any) -> None:
    """No more roundings than the longest way has: products, sums over features, rows and pairs of rows, one root."""

    @given(cases(floating_dtypes(backend, device), values="floats", mixed=False, max_extent=6))
    def bounded(case: Case) -> None:
        dy, x, W, b = case_on(case, backend, device)
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
    dy, x, W, b = case_on(case, backend, device)
    norms = backend.to_numpy(per_sample_gradient_norms(dy, x, W, b, n_batch_axes=2))
    exact = np.sqrt(squared_norms(case))
    assert norms.dtype == np.float64
    assert (abs(norms - exact) <= float(bounds.gamma(4, u(case))) * exact).all()


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (3,)])
def test_sums_that_are_not_clipped_are_the_gradients(backend: Backend, device: Any, shape: Any) -> None:
    axes = 2 if len(shape) == 3 else None
    for dtype in floating_dtypes(backend, device):
        case = make_case(shape, 2, seed=1, dtypes=dtype, n_batch_axes=axes)
        dy, x, W, b = case_on(case, backend, device)
        clipped = clipped_gradients(dy, x, W, b, max_norm=math.inf, n_batch_axes=axes)
        whole = affine_backward(dy, x, W, b, n_batch_axes=axes)
        assert clipped.dx is None
        for got, expected in zip(clipped[1:], whole[1:], strict=True):
            assert (got.dtype, type(got)) == (expected.dtype, type(expected))
            assert np.array_equal(backend.to_numpy(got), backend.to_numpy(expected))


def test_clipped_sums_are_within_their_bounds(backend: Backend, device: Any) -> None:
    """A weight is rounded five times: a norm (three), a quotient, a product with dy; then come N T more."""

    @given(cases([d for d in floating_dtypes(backend, device) if "16" not in d], mixed=False, max_extent=8))
    def bounded(case: Case) -> None:
        dy, x, W, b = case_on(case, backend, device)
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
    dy, x, W, b = case_on(case, backend, device)
    for i in range(5):
        one = slice(i, i + 1)
        clipped = clipped_gradients(dy[one, :], x[one, :], W, b, max_norm=1.0)
        norm = math.hypot(*(np.linalg.norm(backend.to_numpy(g)) for g in clipped[1:]))
        assert norm <= 1 + 1e-6 or norm <= 1 + float(bounds.gamma(20, bounds.unit_roundoff("float32")))


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


def test_integers_have_no_norms(backend: Backend, device: Any, ones: Any) -> None:
    if "int32" not in backend.dtypes(device):
        pytest.skip("this device has no products of integers")
    x = ones(2, 2, dtype="int32")
    for call in (per_sample_gradient_norms, lambda *a: clipped_gradients(*a, max_norm=1.0)):
        with pytest.raises(TypeError, match=r"norms are of floating dtype: dy is int32 .*; x is int32 .*; W is int32 "):
            call(x, x, x)


def test_gradients_are_summed_in_the_dtype_of_all_operands() -> None:
    """A wider b makes them wider, too."""
    dy, x, W = np.asarray([[[1.0], [2.0**-30]]], "f"), np.ones((1, 2, 1), "f"), np.ones((1, 1), "f")
    _, db = per_sample_gradients(dy, x, W, np.ones(1), n_batch_axes=2)
    assert db.tolist() == [[1 + 2.0**-30]]


def test_wrong_dy_is_refused(ones: Any) -> None:
    x, W = ones(2, 3), ones(3, 4)
    for call in (per_sample_gradients, per_sample_gradient_norms, lambda *a: clipped_gradients(*a, max_norm=1.0)):
        with pytest.raises(ValueError, match="dy must have the shape of y"):
            call(x, x, W)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_gradient_by_b_of_a_long_sample_is_summed_in_blocks(backend: Backend, device: Any, dtype: str) -> None:
    """A running sum of float32 is 1 % off after a million rows."""
    if dtype not in backend.dtypes(device):
        pytest.skip(f"this backend has no {dtype}")
    if backend.name in ("sparse", "ndonnx"):
        pytest.skip(f"this takes {backend.name} 20 s, and its sums over a batch are tested elsewhere")
    T = 1_000_000
    arrays = np.full((1, T, 2), 0.1, dtype), np.zeros((1, T, 1), dtype), np.zeros((1, 2), dtype), np.zeros(2, dtype)
    dy, x, W, b = (backend.from_numpy(array, device=device) for array in arrays)
    db = backend.to_numpy(per_sample_gradients(dy, x, W, b, n_batch_axes=2).db).astype(complex)
    exact = T * float(np.float32(0.1))
    assert abs(db - exact).max() <= float(bounds.gamma(2 * math.isqrt(T), bounds.unit_roundoff(dtype))) * exact


@st.composite
def extreme_samples(draw: st.DrawFn, dtypes: list[str]) -> tuple[str, Any, Any, int, int, bool]:
    """One sample as integers that cancel, more or less, and the powers of two that belong to x and to dy."""
    dtype = draw(st.sampled_from(dtypes))
    T, n, m = draw(st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 3, 12]), st.sampled_from([1, 4, 12])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    common = draw(st.sampled_from([0, 2**8, 2**19]))
    x = common * rng.integers(-8, 9, (1, n)) + rng.integers(-3, 4, (T, n))
    dy = rng.integers(-99, 100, (T, m))
    if T > 1 and draw(st.booleans()):
        dy[-1] -= dy.sum(0)
    if "complex" in dtype:
        x, dy = x * (1 + 1j) ** (rng.integers(0, 2)), dy * 1j
    largest, together = (100, 40) if bounds.unit_roundoff(dtype) == bounds.unit_roundoff("float32") else (960, 600)
    of_x = draw(st.sampled_from([0, 0, largest, -largest, largest // 2]))
    of_dy = draw(st.sampled_from([0, -of_x, largest - 12 - of_x, together - of_x, -together - of_x]))
    return dtype, x, dy, of_x, max(-largest, min(of_dy, largest, largest - 12 - of_x)), draw(st.booleans())


def two_to(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def test_clipped_samples_never_exceed_the_norm_by_more_than_is_stated(backend: Backend, device: Any) -> None:
    """In exact arithmetic, for samples that cancel, at both ends of the range; nor clipped more than is stated."""
    dtypes = [d for d in floating_dtypes(backend, device) if "16" not in d]

    @given(extreme_samples(dtypes), st.sampled_from([2**-10, 0.5, 1.0, 3.0]))
    def guaranteed(sample: Any, factor: float) -> None:
        dtype, x_, dy_, of_x, of_dy, bias = sample
        (T, n), m, c = x_.shape, dy_.shape[1], 4 if "complex" in dtype else 1
        x, dy = (
            backend.from_numpy((a * 2.0**e).astype(dtype)[None, ...], device=device)
            for a, e in ((x_, of_x), (dy_, of_dy))
        )
        of_W, of_b = exact_square(x_, dy_, bias=False)[0], exact_square(0 * x_, dy_, bias=bias)[0]
        square = (of_W * two_to(2 * of_x) + of_b) * two_to(2 * of_dy)
        length = (int((abs(x_) ** 2).sum().round()) * two_to(2 * of_x) + bias * T) * int((abs(dy_) ** 2).sum().round())
        length *= two_to(2 * of_dy)
        scale = root(square if square else length if length else Fraction(1))
        max_norm = float(min(max(Fraction(factor) * scale, two_to(-60)), two_to(40)))
        with backend.on_device_of(x):
            got = per_sample._clipped(backend, x, dy, bias=bias, max_norm=max_norm)
        by_x, by_dy = (backend.to_numpy(each)[0].astype(complex if c == 4 else float) for each in (x, got))
        clipped = exact_square(by_x, by_dy, bias=False)[0] + exact_square(0 * by_x, by_dy, bias=bias)[0]
        u, own = bounds.unit_roundoff("float64"), bounds.unit_roundoff(dtype)
        delta = 8 * own + (n + m + 2 * T) * u
        assert clipped <= ((1 + delta) * Fraction(max_norm)) ** 2
        over = (root(2 * c * (n + m + 2 * T + 4) * u) + 2 * c * (T + 2) * u + 4 * own) * root(length) if T > 1 else 0
        most = root(square) + over
        if most:
            share = min(Fraction(1), Fraction(max_norm) / most)
            # Each c_i dy_it is rounded four times at most, and Σ |x_it| |dy_it| is at most the root of the length.
            assert root(clipped) >= share * ((1 - 2 * delta) * root(square) - 4 * own * root(length))

    guaranteed()


def root(square: Fraction) -> Fraction:
    """A square root, right to 2⁻⁶⁰ of itself."""
    shift = 2 * max(0, 70 - (square.numerator.bit_length() - square.denominator.bit_length()) // 2)
    return Fraction(math.isqrt(int(square * two_to(2 * shift))), 2**shift)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("apart", [0, 1e-7, 1e-4])
def test_rows_that_nearly_cancel_are_clipped(backend: Backend, device: Any, dtype: str, apart: float) -> None:
    """So many features that Gram matrices take fewer operations: their sums of large squares leave little."""
    rng = np.random.default_rng(0)
    T, n = 16, 96
    x = (rng.standard_normal((1, n)) + apart * rng.standard_normal((T, n))).astype(dtype)
    dy = rng.integers(-1000, 1000, (T, n)).astype(dtype)
    dy[-1] -= dy.sum(0)
    exact = np.linalg.norm(x.astype(np.longdouble).T @ dy.astype(np.longdouble))
    max_norm = float(exact) / 2 or 1e-12
    operands = [backend.from_numpy(a, device=device) for a in (dy[None, ...], x[None, ...], np.zeros((n, n), dtype))]
    with backend.on_device_of(operands[1]):
        clipped = per_sample._clipped(backend, operands[1], operands[0], bias=False, max_norm=max_norm)
    by_x, by_dy = (backend.to_numpy(a)[0].astype(np.longdouble) for a in (operands[1], clipped))
    u, own = bounds.unit_roundoff("float64"), bounds.unit_roundoff(dtype)
    limit = (1 + float(8 * own + 2 * (n + T) * u)) * max_norm
    reference = float(bounds.gamma(T, u)) * np.linalg.norm(abs(by_x).T @ abs(by_dy))  # where long double is float64
    assert np.linalg.norm(by_x.T @ by_dy) <= limit + reference
    dW = backend.to_numpy(clipped_gradients(*operands, max_norm=max_norm, n_batch_axes=2).dW).astype(float)
    assert np.linalg.norm(dW) <= limit + float(bounds.gamma(T, own)) * np.linalg.norm(abs(by_x).T @ abs(by_dy))


EXTREMES = [
    ("float32", 1, 1e20), ("float32", 1, 1e-30), ("float32", 2.0**-90, 2.0**90), ("float32", 1e-10, 1e36),
    ("float64", 1, 1e160), ("float64", 1, 1e-170), ("float64", 1e-250, 1e250), ("float64", 1e-5, 1e300),
    ("float16", 1, 60000), ("float16", 60000, 60000), ("bfloat16", 1, 2.0**100), ("complex64", 1, 1e20),
    ("complex128", 1, 1e160j), ("float64", 5e-324, 1e300), ("float64", 1e-310, 1e160), ("complex128", 1e-310, 1e200j),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "small", "large"), EXTREMES)
@pytest.mark.parametrize("T", [1, 2])
def test_norms_at_the_ends_of_the_range(
    backend: Backend, device: Any, dtype: str, small: float, large: float, T: int
) -> None:
    """The square of neither leaves the range, whichever of the two is x; nor does a weight."""
    if dtype not in backend.dtypes(device):
        pytest.skip(f"this backend has no {dtype}")
    if backend.name == "jax" and small < 1e-300:
        pytest.skip("XLA takes subnormal numbers for zeros")
    for pair in ((small, large), (large, small)):
        x, dy = (backend.from_values(np.full((1, T, 1), value), dtype, device=device) for value in pair)
        W = backend.from_values(np.zeros((1, 1)), dtype, device=device)
        norm = backend.to_numpy(per_sample_gradient_norms(dy, x, W, n_batch_axes=2)).astype(float)
        dW = backend.to_numpy(clipped_gradients(dy, x, W, max_norm=0.5, n_batch_axes=2).dW).astype(complex)
        exact = T * (abs(small) * abs(large))
        limit = 32 * T * float(bounds.unit_roundoff(dtype))
        assert abs(norm[0] - exact) <= limit * exact
        assert abs(abs(dW[0, 0]) - min(0.5, exact)) <= limit * min(0.5, exact)


@pytest.mark.parametrize("T", [1, 2])
def test_gradient_out_of_range_is_clipped_into_it(backend: Backend, device: Any, T: int) -> None:
    x = backend.from_numpy(np.full((2, T, 1), 1e30, "float32"), device=device)
    W = backend.from_numpy(np.zeros((1, 1), "float32"), device=device)
    dW = float(backend.to_numpy(clipped_gradients(x, x, W, max_norm=1.0, n_batch_axes=2).dW)[0, 0])
    assert abs(dW - 2) <= 32 * T * float(bounds.unit_roundoff("float32"))


@pytest.mark.parametrize("max_norm", [1e-40, 1e-30, 1.0, 1e300, math.inf])
def test_any_norm_above_zero_will_do(backend: Backend, ones: Any, max_norm: float) -> None:
    one = ones(1, 1)
    dW = float(backend.to_numpy(clipped_gradients(one, one, one, max_norm=max_norm).dW)[0, 0])
    tiny = float(bounds.smallest_normal("float32"))
    assert abs(dW - min(1.0, max_norm)) <= 8 * float(bounds.unit_roundoff("float32")) * min(1.0, max_norm) + tiny


@pytest.mark.parametrize("size", [0.0, 5e-324, 1e-310, 1e-150, 1.0, 1e150, 1e300])
@pytest.mark.parametrize("max_norm", [5e-324, 1e-310, 1.0, 1e300, math.inf])
def test_weights_are_found_without_a_warning(size: float, max_norm: float) -> None:
    """NumPy warns of an overflow even where the result is dropped, and warnings are errors here."""
    ones = np.ones((1, 1))
    dW = float(clipped_gradients(ones, size * ones, ones, max_norm=max_norm).dW[0, 0])
    assert abs(dW - min(size, max_norm)) <= 16 * float(bounds.unit_roundoff("float64")) * size + 5e-324


@pytest.mark.parametrize("values", [(1, math.inf), (1, math.nan)])
@pytest.mark.parametrize("T", [1, 2])
def test_gradient_that_is_not_finite_makes_all_sums_nan(
    backend: Backend, device: Any, ones: Any, values: tuple[float, float], T: int
) -> None:
    if backend.name == "sparse":
        pytest.skip("the library warns of NaN in products")
    for pair in (values, values[::-1]):
        arrays = [np.ones((2, T, 2), "float32") for _ in pair]
        for array, value in zip(arrays, pair, strict=True):
            array[1, 0, 0] = value
        x, dy = (backend.from_numpy(array, device=device) for array in arrays)
        W, b = ones(2, 2), ones(2)
        _, dW, db = clipped_gradients(dy, x, W, b, max_norm=1.0, n_batch_axes=2)
        assert np.isnan(backend.to_numpy(dW)).all()
        assert np.isnan(backend.to_numpy(db)).all()


def test_bias_of_another_shape_is_refused() -> None:
    x = np.ones((2, 2))
    for call in (per_sample_gradients, per_sample_gradient_norms, lambda *a: clipped_gradients(*a, max_norm=1.0)):
        with pytest.raises(ValueError, match="b must have"):
            call(x, x, x, np.ones(3))


@pytest.mark.parametrize(
    ("dtype", "real"),
    [("float16", "float32"), ("float32", "float32"), ("float64", "float64"), ("complex64", "float32")],
)
def test_norms_have_the_real_dtype_of_the_operands(dtype: str, real: str) -> None:
    x = np.ones((2, 2), dtype)
    assert per_sample_gradient_norms(x, x, x).dtype == real


def test_two_blocks_agree_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.arange(18.0).reshape(9, 2)
    whole = per_sample_gradient_norms(x, x, np.ones((2, 2)))
    monkeypatch.setattr(per_sample, "_ELEMENTS", 20)
    assert per_sample_gradient_norms(x, x, np.ones((2, 2))).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("T", "n", "m", "elements", "rows"),
    [(1, 3, 2, 10, 2), (2, 10, 10, 200, 2), (8, 3, 2, 80, 2), (1, 3, 2, 1, 1), (1, 0, 0, 3, 3), (2, 0, 5, 20, 2)],
)
def test_block_holds_so_many_elements(
    monkeypatch: pytest.MonkeyPatch, T: int, n: int, m: int, elements: int, rows: int
) -> None:
    """Of x and dy, or of the gradients of the samples where these are computed and larger."""
    monkeypatch.setattr(per_sample, "_ELEMENTS", elements)
    x, dy = np.ones((7, T, n)), np.ones((7, T, m))
    blocks = list(per_sample._blocks(check(x, np.ones((n, m)), None, 2), dy, x))
    lengths = [min(rows, 7 - start) for start in range(0, 7, rows)]
    assert [len(x) for x, _ in blocks] == [len(dy) for _, dy in blocks] == lengths


@pytest.mark.parametrize("T", [1, 2])
def test_each_sample_is_scaled_by_itself(T: int) -> None:
    """One sample at each end of the range; the sum of the large one, times anything, leaves it."""
    sizes = np.asarray([1e308, 1e-300, 1.0, 1e160])[:, None, None]
    x, dy = np.tile(sizes, (1, T, 3)), np.tile(1 / sizes, (1, T, 1))
    for operands in ((dy, x, np.zeros((3, 1))), (x, dy, np.zeros((1, 3)))):
        norms = per_sample_gradient_norms(*operands, n_batch_axes=2)
        limit = 32 * T * float(bounds.unit_roundoff("float64"))
        assert (abs(norms - T * math.sqrt(3)) <= limit * T * math.sqrt(3)).all()


HIGH = float(np.finfo("float64").max) ** 0.125


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize(
    ("sample", "divisor"),
    [
        ([3.0, -4.0], 1.0), ([0.0, 0.0], 1.0), ([HIGH, 0.0], 1.0), ([2.0**127, 2.0**126], 1.0),
        ([2.0**128, -(2.0**128)], 2.0**113), ([2.0**140, 0.0], 2.0**124), ([1e308, 1e308], None),
        ([math.inf, 0.0], 1.0), ([-math.inf, 2.0**-200], 1.0), ([1 / HIGH, 0.0], 1.0), ([1.5 / HIGH, 0.0], 1.0),
        ([2.0**-100, 0.0], 1.0), ([2.0**-130, 0.0], 2.0**-130), ([-(2.0**-130), 2.0**-130], 2.0**-129),
        ([2.0**-130, 1.0], 1.0), ([2.0**-130, -(2.0**140)], 2.0**124), ([5e-324, 0.0], 5e-324),
    ],
)  # fmt: skip
def test_divisor_of_a_sample_is_one_unless_it_is_near_an_end_of_the_range(
    sample: list[float], divisor: float | None, dtype: str
) -> None:
    one = np.ones((1, 2, 1), dtype)
    samples = np.concat([np.reshape(np.asarray(sample, dtype), one.shape), one, one * 2.0**150])
    divided = per_sample._divisors(NUMPY, samples).ravel().tolist()
    divisor = 2 * (1e308 * 2.0**-16) if divisor is None else divisor
    assert divided == [divisor, 1.0, 2.0**135]
    assert per_sample._divisors(NUMPY, samples, tiny=False).ravel().tolist() == [max(divisor, 1.0), 1.0, 2.0**135]


@pytest.mark.parametrize(
    ("exponent", "divisor"), [(1000, 1.0), (-900, 2.0**-890), (-1000, 2.0**-1030), (1000, 2.0**900)]
)
def test_complex_samples_are_divided_exactly(exponent: int, divisor: float) -> None:
    sample = np.asarray([[[(2**53 - 1) * (1 + 1j), 3 - 5j, 0]]]) * 2.0 ** (exponent - 50)
    divided = per_sample._quotient(NUMPY, sample, np.asarray([[[divisor]]]))
    assert divided.tolist() == [[[complex(a.real / divisor, a.imag / divisor) for a in sample.ravel().tolist()]]]


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("T", "n", "m"),
    [(2, 3, 4), (2, 3, 20), (2, 8, 8), (2, 12, 12), (4, 12, 12), (62, 80, 160), (64, 80, 160), (68, 80, 160)],
)
def test_bound_of_a_norm_is_the_stated_one(T: int, n: int, m: int, bias: bool, dtype: str) -> None:
    """Of a sample whose terms cancel, by Gram matrices where these are faster, or by its gradients."""
    x, dy = np.ones((1, T, n), dtype), np.ones((1, T, m), dtype)
    dy[:, ::2] = -1
    measured = per_sample._measure(NUMPY, x, dy, bias=bias)
    u, own, c = 2.0**-53, float(bounds.unit_roundoff(dtype)), 4 if "complex" in dtype else 1
    M = math.sqrt((T * n + bias * T) * T * m)
    by_gram_matrices = T * (n + m) <= n * m * (1.25 if T >= 64 else 0.5)
    slack = 2 * c * (n + m + 2 * T) * u if by_gram_matrices else 0
    expected = (math.sqrt(slack) + 2 * c * (T + 2) * u + 4 * own) * M
    assert measured.norm.tolist() == [[[0.0]]]
    assert abs(float(measured.bound[0, 0, 0]) - expected) <= float(bounds.gamma(20, Fraction(u))) * expected


@pytest.mark.parametrize("size", [1.0, 2.0**140, 2.0**400])
def test_norm_is_that_of_db_where_dW_cancels(size: float) -> None:
    x, dy = size * np.asarray([[[2.0], [1.0]]]), np.asarray([[[1.0], [-2.0]]])
    assert per_sample_gradient_norms(dy, x, np.zeros((1, 1)), np.zeros(1), n_batch_axes=2).tolist() == [1.0]


@pytest.mark.parametrize("elements", [1, 100])
@pytest.mark.parametrize(
    ("of_x", "of_dy", "within"),
    [("float16", "float16", "float32"), ("float32", "float64", "float64"), ("float64", "float32", "float64")],
)
def test_blocks_are_in_the_dtype_to_compute_in(
    monkeypatch: pytest.MonkeyPatch, elements: int, of_x: str, of_dy: str, within: str
) -> None:
    monkeypatch.setattr(per_sample, "_ELEMENTS", elements)
    x, dy = np.ones((2, 3), of_x), np.ones((2, 4), of_dy)
    blocks = list(per_sample._blocks(check(x, np.ones((3, 4), of_x), None, None), dy, x))
    assert len(blocks) == (2 if elements == 1 else 1)
    assert {array.dtype.name for block in blocks for array in block} == {within}


def test_block_of_a_lazy_library_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_sample, "_ELEMENTS", 1)
    x, W, dy = np.ones((2, 3)), np.ones((3, 4)), np.ones((2, 4))
    plan = check(x, W, None, None)
    assert [len(x) for x, _ in per_sample._blocks(plan, dy, x)] == [1, 1]
    monkeypatch.setattr(type(plan.backend), "is_lazy", lambda _, array: array.shape == (2, 1, 3))
    assert [len(x) for x, _ in per_sample._blocks(plan, dy, x)] == [2]


def test_norm_of_small_numbers_by_gram_matrices_is_not_zero() -> None:
    x, dy = np.full((1, 2, 8), 2.0**-20), np.full((1, 2, 8), 2.0**-20)
    assert per_sample_gradient_norms(dy, x, np.zeros((8, 8)), n_batch_axes=2).tolist() == [2.0**-36]


@pytest.mark.parametrize("n_batch_axes", [1, 2])
def test_library_may_split_dy_as_x(monkeypatch: pytest.MonkeyPatch, n_batch_axes: int) -> None:
    """As Dask does, whose blocks must match."""
    x, dy = (np.ones((2, 3, columns)[2 - n_batch_axes :]) for columns in (4, 5))
    plan = check(x, np.ones((4, 5)), None, n_batch_axes)
    monkeypatch.setattr(type(plan.backend), "aligned", lambda _, dy, x: 3 * dy if x.shape[-1] == 4 else None)
    samples, gradients = per_sample._as_samples(plan, dy, x)
    assert (samples == 1).all()
    assert (gradients == 3).all()


def test_products_of_no_samples_have_their_dtype() -> None:
    products = per_sample._products(NUMPY, np.zeros((0, 2, 3), "f"), np.zeros((0, 2, 4), "f"))
    assert (products.shape, products.dtype) == ((0, 3, 4), np.float32)


def test_repr_says_shapes_dtypes_and_library() -> None:
    each = per_sample_gradients(np.ones((5, 2)), np.ones((5, 3)), np.ones((3, 2)))
    assert repr(each) == "<PerSampleGradients: dW is float64 (5, 3, 2) (numpy on cpu); db is None>"
