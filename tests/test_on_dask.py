"""What only Dask has: chunks, unknown row counts, laziness."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xaffine import affine, affine_backward, affine_jvp, affine_vjp
from xaffine.curvature import affine_double_backward, kronecker_factors
from xaffine.per_sample import clipped_gradients, per_sample_gradient_norms, per_sample_gradients
from xaffine.testing import make_case
from xaffine.testing.cases import worst_error


@pytest.fixture
def nothing_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every computation an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(dask.base, "get_scheduler", lambda **_: refuse)


def chunked(values: np.ndarray, chunks: Any) -> Any:
    return da.from_array(values, chunks=chunks)


@given(st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 99))
def test_any_chunks_give_the_exact_result(chunks: tuple[int, int, int], seed: int) -> None:
    case = make_case((7, 5), 4, seed=seed)
    rows, columns, outputs = chunks
    y, vjp = affine_vjp(
        chunked(case.x.values, (rows, columns)),
        chunked(case.W.values, (columns, outputs)),
        chunked(case.b.values, outputs),
    )
    gradients = vjp(chunked(case.dy.values, (rows, outputs)))
    exact = case.exact()
    for name, result in {"y": y, **gradients._asdict()}.items():
        assert worst_error(result.compute(scheduler="synchronous"), exact[name])[0] == 0


@pytest.mark.usefixtures("nothing_computes")
def test_nothing_computes_before_compute_is_called() -> None:
    x, W, b = da.ones((6, 2, 3), chunks=(2, 2, 3)), da.ones((6, 4)), da.ones(4)
    y, vjp = affine_vjp(x, W, b)
    gradients = vjp(y)
    unknown = da.ones((6, 6))[da.ones(6) > 0]
    affine_backward(affine(unknown, W, b), unknown, W, b)
    assert y.shape == (6, 4)
    assert all(isinstance(g, da.Array) for g in gradients)
    with pytest.raises(AssertionError, match="computed"):
        y.compute()


def test_unknown_row_counts() -> None:
    case = make_case((8, 5), 4, seed=1)
    keep = np.arange(8) % 3 > 0
    x, dy = (chunked(values, (3, -1))[chunked(keep, 3)] for values in (case.x.values, case.dy.values))
    W, b = chunked(case.W.values, -1), chunked(case.b.values, -1)
    assert np.isnan(x.shape[0])
    y, vjp = affine_vjp(x, W, b)
    gradients = vjp(dy)
    known = affine_backward(case.dy.values[keep], case.x.values[keep], case.W.values, case.b.values)
    assert np.array_equal(y.compute(), affine(case.x.values[keep], case.W.values, case.b.values))
    for ours, expected in zip(gradients, known, strict=True):
        assert np.array_equal(ours.compute(), expected)


def test_tensors_with_unknown_row_counts_say_what_to_do() -> None:
    x = da.ones((6, 2, 3))[da.ones(6) > 0]
    with pytest.raises(ValueError, match=r"\(\?, 2, 3\).*compute_chunk_sizes"):
        affine(x, da.ones((6, 4)))
    assert affine(x.compute_chunk_sizes(), da.ones((6, 4))).compute().shape == (6, 4)


def test_unknown_rows_do_not_hide_a_wrong_width() -> None:
    x = da.ones((6, 3))[da.ones(6) > 0]
    with pytest.raises(ValueError, match=r"x is float64 \(\?, 3\)"):
        affine(x, da.ones((4, 5)))
    with pytest.raises(ValueError, match=r"dy must have the shape of y, \(\?, 5\)"):
        affine_backward(da.ones((6, 4)), x, da.ones((3, 5)))


def test_out_is_filled_lazily() -> None:
    out = da.zeros((2, 4))
    assert affine(da.ones((2, 3)), da.ones((3, 4)), out=out) is out
    assert out.compute().tolist() == [[3] * 4] * 2


def test_derivatives_take_unknown_row_counts_and_stay_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    case, dots = (make_case((6, 3), 4, seed=seed, dtypes="float64") for seed in (1, 2))
    rows = da.from_array(np.ones(6, bool), chunks=2)
    x, dy, x_dot = (chunked(a, (2, a.shape[1]))[rows] for a in (case.x.values, case.dy.values, dots.x.values))
    W, b, W_dot, b_dot = (chunked(o.values, -1) for o in (case.W, case.b, dots.W, dots.b))

    with monkeypatch.context() as patch:
        patch.setattr(dask.base, "get_scheduler", lambda **_: pytest.fail("computed"))
        y_dot = affine_jvp((x, W, b), (x_dot, W_dot, b_dot))[1]
        bias_alone = affine_jvp((x, W, b), (None, None, b_dot))[1]
        each = per_sample_gradients(dy, x, W, b)
        norms = per_sample_gradient_norms(dy, x, W, b)
        clipped = clipped_gradients(dy, x, W, b, max_norm=np.inf)
        second = affine_double_backward((x_dot, W_dot, b_dot), dy, x, W, b)
    x_, W_, dy_ = case.x.values, case.W.values, case.dy.values
    expected = x_ @ dots.W.values + dots.x.values @ W_ + dots.b.values
    assert np.array_equal(y_dot.compute(), expected)
    assert np.array_equal(second.dy.compute(), expected)
    assert np.array_equal(second.x.compute(), dy_ @ dots.W.values.T)
    assert np.array_equal(bias_alone.compute(), np.broadcast_to(dots.b.values, (6, 4)))
    assert np.array_equal(each.dW.compute(), x_[:, :, None] * dy_[:, None, :])
    assert np.array_equal(clipped.dW.compute(), x_.T @ dy_)
    assert norms.compute().shape == (6,)
    with pytest.raises(ValueError, match=r"their number: dy is .* \(in Dask: x\.compute_chunk_sizes\(\)\)"):
        kronecker_factors(dy, x, W, b)
