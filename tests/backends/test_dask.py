"""What only Dask has: chunks, unknown row counts, laziness."""

from __future__ import annotations

import math
import operator
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import sparse
from hypothesis import example, given
from hypothesis import strategies as st

from xaffine import affine, affine_backward, affine_jvp, affine_vjp
from xaffine.backends import dask as module
from xaffine.backends.dask import BACKEND
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


def sizes(*shape: int) -> Any:
    """Sizes of the chunks of an array of that shape."""
    return st.tuples(*(st.integers(1, extent) for extent in shape))


@example((3, 5), (5, 4), (4,), (2, 4), 0)
@example((3, 5), (5, 2), (3,), (3, 3), 0)
@example((3, 5), (5, 2), (4,), (3, 4), 0)
@given(sizes(7, 5), sizes(5, 4), sizes(4), sizes(7, 4), st.integers(0, 99))
def test_any_chunks_give_the_exact_result(of_x: Any, of_W: Any, of_b: Any, of_dy: Any, seed: int) -> None:
    case = make_case((7, 5), 4, seed=seed)
    y, vjp = affine_vjp(chunked(case.x.values, of_x), chunked(case.W.values, of_W), chunked(case.b.values, of_b))
    gradients = vjp(chunked(case.dy.values, of_dy))
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


def tasks(*arrays: Any) -> int:
    return len({key for array in dask.optimize(*arrays) for key in array.dask})


def test_a_block_is_one_task_for_each_product() -> None:
    K = 1000
    x, dy = (da.from_array(np.ones((K, k), "f"), chunks=(1, -1)) for k in (3, 4))
    y, vjp = affine_vjp(x, *(da.from_array(np.ones(shape, "f"), chunks=-1) for shape in ((3, 4), 4)))
    dx, dW, db = vjp(dy)
    few = 10  # beside those of the blocks: W, b, what x is cut from
    assert tasks(y) <= 2 * K + few  # a block of x and one of y
    assert tasks(dx) <= 2 * K + few
    assert tasks(dW) <= (3 + 1 / 3) * K + few  # blocks of x, of dy and of dW, and a tree that adds up four at a time
    assert tasks(dW, db) <= tasks(dW) + few  # db rides along


def test_of_a_thousand_partial_sums_few_are_held_at_once() -> None:
    K, live, most = 1000, 0, 0
    x, dy = (da.ones((K, k), chunks=(1, -1)) for k in (3, 4))
    dW, db = affine_vjp(x, da.ones((3, 4)), da.ones(4))[1](dy, wrt=("W", "b"))[1:]

    def count(_key: Any, _value: Any, _dsk: Any, state: Any, _worker: Any) -> None:
        nonlocal live, most
        live = sum(getattr(value, "shape", ())[1:] == (4, 4) for value in state["cache"].values())
        most = max(most, live)

    with dask.callbacks.Callback(posttask=count):
        results = dask.compute(dW, db, scheduler="synchronous")
    assert [result.tolist() for result in results] == [[[K] * 4] * 3, [K] * 4]
    assert 0 < most <= 4 * np.ceil(np.log(K) / np.log(4))  # a tree that adds up four at a time, depth first


def test_rows_that_cannot_be_matched_are_told_before_anything_computes() -> None:
    x, dy = da.ones((6, 3), chunks=(2, 3)), da.ones((6, 4), chunks=(3, 4))
    rows = da.ones(6, chunks=2) > 0
    with pytest.raises(ValueError, match=r"x has 3 blocks along the batch and dy 2, .*compute_chunk_sizes"):
        affine_backward(dy[da.ones(6, chunks=3) > 0], x[rows], da.ones((3, 4)))


@pytest.mark.parametrize("width", [3, 1], ids=["whole rows", "features chunked"])
@pytest.mark.parametrize("known", [False, True], ids=["both unknown", "dy known"])
def test_blocks_that_turn_out_to_differ_are_the_promised_error(width: int, known: bool) -> None:
    x, dy = da.ones((6, 3), chunks=(2, width)), da.ones((6, 4), chunks=(2, 4))
    x = x[da.arange(6, chunks=2) > 0]
    if not known:
        dy = dy[da.arange(6, chunks=2) > 1]
    for gradient in affine_backward(dy, x, da.ones((3, 4)), da.ones(4)):
        with pytest.raises(ValueError, match=f"a block of x has 1 rows and that of dy {2 if known else 0}"):
            gradient.compute()


def test_what_is_not_wanted_is_not_read() -> None:
    def refuse(_: Any) -> Any:
        raise AssertionError("read")

    x, W = (da.ones(shape, chunks=2).map_blocks(refuse, meta=np.empty((0, 0))) for shape in ((6, 3), (3, 4)))
    dy, b = da.ones((6, 4), chunks=(2, 4)), da.ones(4)
    assert affine_backward(dy, x.rechunk((2, -1)), W, b, wrt=("b",)).db.compute().tolist() == [6] * 4
    dW, db = affine_backward(dy, da.ones((6, 3), chunks=(2, 3)), W, b, wrt=("W", "b"))[1:]
    assert [array.tolist() for array in dask.compute(dW, db)] == [[[6] * 4] * 3, [6] * 4]


@pytest.mark.parametrize("chunks", [1, 2, -1])
@pytest.mark.parametrize(
    ("shape", "n_batch_axes"),
    [((0, 3, 4), 2), ((3, 0, 4), 2), ((0, 0, 4), 2), ((2, 0, 3, 4), 0), ((0, 3, 2, 2), -1), ((0, 3, 2, 2), 2)],
)
def test_empty_tensors_in_chunks(shape: tuple[int, ...], n_batch_axes: int, chunks: int) -> None:
    """Dask's own reshape fails on most of them."""
    n, batch = math.prod(shape[n_batch_axes:]), shape[:n_batch_axes]
    x, W, b = (da.ones(extents, chunks=chunks) for extents in (shape, (n, 5), (5,)))
    dy = da.ones((*batch, 5), chunks=chunks)
    y, vjp = affine_vjp(x, W, b, n_batch_axes=n_batch_axes)
    results = [y, *vjp(dy), affine_jvp((x, W, b), (x, W, b), n_batch_axes=n_batch_axes)[1]]
    results.append(per_sample_gradients(dy, x, W, b, n_batch_axes=n_batch_axes).dW)
    results.append(clipped_gradients(dy, x, W, b, max_norm=1.0, n_batch_axes=n_batch_axes).dW)
    shapes = [dy.shape, x.shape, W.shape, b.shape, dy.shape, (*shape[: min(1, len(batch))], *W.shape), W.shape]
    assert [result.compute().shape for result in results] == shapes
    assert per_sample_gradient_norms(dy, x, W, b, n_batch_axes=n_batch_axes).compute().shape == batch[:1]


@pytest.mark.parametrize(("N", "n", "m"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_buffers_are_filled(N: int, n: int, m: int) -> None:
    x, W, b, dy = (da.ones(shape) for shape in ((N, n), (n, m), (m,), (N, m)))
    out, outs = da.zeros((N, m)), tuple(da.full(shape, 7.0) for shape in ((N, n), (n, m), (m,)))
    assert affine(x, W, b, out=out) is out
    assert all(map(operator.is_, affine_backward(dy, x, W, b, out=outs), outs))
    assert np.array_equal(out.compute(), np.ones((N, m)))
    for own, exact in zip(outs, (np.full((N, n), m), np.full((n, m), N), np.full(m, N)), strict=True):
        assert np.array_equal(own.compute(), exact)


def test_buffers_of_unknown_extents_are_refused() -> None:
    x = da.ones((6, 3))[da.ones(6) > 0]
    with pytest.raises(
        ValueError, match=r"out cannot be filled before all extents are known \(in Dask: array\.compute_chunk_sizes"
    ):
        affine(x, da.ones((3, 4)), out=da.zeros((6, 4)))


def test_sums_of_halves_lose_nothing_between_blocks() -> None:
    dy = chunked(np.array([[2048], [1], [-2048]], "float16"), (1, 1))  # 2049 is none of float16
    ones = chunked(np.ones((3, 1), "float16"), (1, 1))
    _, dW, db = affine_backward(dy, ones, da.ones((1, 1), dtype="float16"), da.ones(1, dtype="float16"))
    assert (dW.compute().tolist(), db.compute().tolist()) == ([[1]], [1])


@pytest.mark.parametrize("blocks", [1, 2])
def test_unknown_features(blocks: int) -> None:
    case = make_case((8, 6), 4, seed=1)
    keep = chunked(np.arange(6) % 3 > 0, 6 // blocks)
    x, W = chunked(case.x.values, (3, 6 // blocks))[:, keep], chunked(case.W.values, (6 // blocks, -1))[keep]
    dy, b = chunked(case.dy.values, (3, -1)), chunked(case.b.values, -1)
    y, vjp = affine_vjp(x, W, b)
    kept = case.x.values[:, keep.compute()], case.W.values[keep.compute()]
    expected = affine_backward(case.dy.values, *kept, case.b.values)
    assert np.array_equal(y.compute(), affine(*kept, case.b.values))
    for own, exact in zip(vjp(dy), expected, strict=True):
        assert np.array_equal(own.compute(), exact)


def test_blocks_of_another_library_stay_there() -> None:
    x = da.from_array(sparse.COO(np.eye(4, 3)), chunks=(2, 3), asarray=False)
    W, b = (da.from_array(sparse.COO(np.ones(shape)), chunks=-1, asarray=False) for shape in ((3, 2), 2))
    y, vjp = affine_vjp(x, W, b)
    for result in (y, *vjp(y)):
        assert isinstance(result.compute(), sparse.COO)


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


def test_rows_that_turn_out_to_differ_are_named() -> None:
    x, dy, W = (da.from_array(np.ones(shape), chunks=(2, -1)) for shape in ((6, 3), (6, 2), (3, 2)))
    two, one = x[x[:, 0] > 0], dy[da.from_array(np.arange(6), chunks=2) % 2 > 0]
    calls = [
        lambda dy: per_sample_gradients(dy, two, W).dW,
        lambda dy: per_sample_gradient_norms(dy, two, W),
        lambda dy: clipped_gradients(dy, two, W, max_norm=1.0).dW,
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"a block of x has 2 rows and that of dy 1: the sizes were unknown"):
            call(one).compute()
        with pytest.raises(ValueError, match="x has 3 blocks along the batch and dy 2, of sizes that are not known"):
            call(one.blocks[:2])


def test_features_may_be_unknown() -> None:
    """Norms and clipped sums are computed then by many small tasks instead of one a block."""
    x, dy, W = (da.from_array(np.ones(shape), chunks=-1) for shape in ((4, 3), (4, 2), (3, 2)))
    few = dy[:, da.from_array(np.asarray([True, False]), chunks=-1)]
    assert per_sample_gradient_norms(few, x, W).compute().tolist() == [math.sqrt(3)] * 4
    assert clipped_gradients(few, x, W, max_norm=9.0).dW.compute().tolist() == [[4.0]] * 3


@pytest.mark.parametrize(("dtype", "within"), [("float16", "float32"), ("int8", "int8")])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sum_is_that_of_the_blocks(monkeypatch: pytest.MonkeyPatch, axis: int, dtype: str, within: str) -> None:
    blocks = []

    def record(block: Any, axis: int, dtype: Any) -> Any:
        if block.size:  # else Dask asks for the dtype
            blocks.append(block.shape)
        return sum_of_block(block, axis, dtype)

    sum_of_block = module._sum_of_block
    monkeypatch.setattr(module, "_sum_of_block", record)
    array = np.arange(40, dtype=dtype).reshape(5, 4, 2)
    total = BACKEND.sum(da.from_array(array, chunks=((2, 3), (4,), (1, 1))), axis, np.dtype(within))
    assert total.dtype == within
    assert np.array_equal(total.compute(scheduler="synchronous"), array.astype(within).sum(axis, dtype=within))
    assert sorted(blocks) == [(2, 4, 1)] * 2 + [(3, 4, 1)] * 2


@pytest.mark.parametrize("unit", [1, 1j])
def test_squared_lengths_need_no_extents(unit: complex) -> None:
    array = da.from_array(np.arange(12.0).reshape(2, 3, 2) * unit, chunks=(1, 3, 2))
    known = array[array[:, 0, 0].real + array[:, 0, 0].imag >= 0]
    assert math.isnan(known.shape[0])
    squares = BACKEND.squared_lengths(known).compute(scheduler="synchronous")
    assert squares.tolist() == [[1, 13, 41], [85, 145, 221]]
    assert squares.dtype == float


@pytest.mark.parametrize("wrt", ["W", "b", "Wb", "x", "xW", "xb", "xWb"])
def test_dW_and_db_share_a_tree(monkeypatch: pytest.MonkeyPatch, wrt: str) -> None:
    trees = []

    def record(dy: Any, x: Any, *, with_sum: bool) -> Any:
        trees.append((x is not None, with_sum))
        return total(dy, x, with_sum=with_sum)

    total = module._total
    monkeypatch.setattr(module, "_total", record)
    case = make_case((6, 3), 4, seed=0)
    dy, x = (chunked(each.values, (2, -1)) for each in (case.dy, case.x))
    gradients = affine_backward(dy, x, chunked(case.W.values, -1), chunked(case.b.values, -1), wrt=wrt)
    assert trees == [("W" in wrt, "b" in wrt)] * bool({"W", "b"} & set(wrt))
    for name, gradient in gradients._asdict().items():
        assert (gradient is not None) is (name[1] in wrt)
        if gradient is not None:
            assert worst_error(gradient.compute(scheduler="synchronous"), case.exact()[name])[0] == 0


def test_double_backward_names_rows_that_cannot_be_matched() -> None:
    x, dy, W = da.ones((6, 3), chunks=(2, 3)), da.ones((6, 4), chunks=(3, 4)), da.ones((3, 4))
    rows, rows_of_dy = da.ones(6, chunks=2) > 0, da.ones(6, chunks=3) > 0
    with pytest.raises(ValueError, match=r"x has 3 blocks along the batch and dy 2, .*compute_chunk_sizes"):
        affine_double_backward((x[rows], None, None), dy[rows_of_dy], x[rows], W)
    by_x = affine_double_backward((None, W, None), dy, x, W).x
    assert by_x.chunks[0] == x.chunks[0]
