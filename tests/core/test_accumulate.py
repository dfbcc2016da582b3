"""`accumulate`: the gradients of micro-batches add up to those of the whole batch."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.helpers import case_on, layer_of_ones
from xaffine import AffineLayer, backends
from xaffine.backends import Backend
from xaffine.layer import add
from xaffine.testing import make_case
from xaffine.testing.cases import FEATURES, Case
from xaffine.testing.strategies import cases


def test_parts_give_the_gradients_of_the_whole(backend: Backend, device: Any) -> None:
    @given(cases(backend.dtypes(device), batch_axes=False, supports=set(FEATURES) - {"vectors", "last-axis"}))
    def equal(case: Case) -> None:
        dy, x, W, b = case_on(case, backend, device)
        whole = AffineLayer(W, b)
        whole.forward(x)
        whole.backward(dy)
        parts = AffineLayer(W, b)
        cuts = sorted(np.random.default_rng(case.seed).integers(0, case.N + 1, 2).tolist())
        for rows in (slice(cuts[0]), slice(*cuts), slice(cuts[1], None)):
            parts.forward(x[rows, ...])
            parts.backward(dy[rows, ...], accumulate=True)
        for name in ("dW", "db"):
            got, expected = getattr(parts, name), getattr(whole, name)
            if expected is None:
                assert got is None
                continue
            assert (got.dtype, type(got)) == (expected.dtype, type(expected))
            assert np.array_equal(backend.to_numpy(got), backend.to_numpy(expected))

    equal()


def test_sums_of_halves_do_not_stall(backend: Backend, device: Any) -> None:
    for dtype in {"float16", "bfloat16"} & set(backend.dtypes(device)):
        layer, dy = layer_of_ones(backend, device, dtype, N=1)
        with backend.on_device_of(dy):
            first = 2048 * dy
        layer.backward(first, wrt=("b",))
        for _ in range(16):
            layer.backward(dy, wrt=("b",), accumulate=True)
        assert backend.to_numpy(layer.db).tolist() == [2064], dtype  # 2048 + 1 is 2048 in both
        assert str(layer.db.dtype).rpartition(".")[2] == dtype


def test_an_assigned_gradient_starts_a_new_sum(numpy_backend: Backend) -> None:
    layer, x = layer_of_ones(numpy_backend, None, "float16", N=2)
    for _ in range(3):
        layer.backward(x, accumulate=True)
    layer.dW = np.full((1, 1), 100, np.float16)
    layer.db = None
    layer.backward(x, accumulate=True)
    assert (layer.dW.tolist(), layer.db.tolist()) == ([[102]], [2])


def test_a_buffer_that_held_a_sum_starts_a_new_one(numpy_backend: Backend) -> None:
    buffer = np.zeros((1, 1), np.float16)
    layer, x = layer_of_ones(numpy_backend, None, "float16", N=2)
    for out in (True, False, True, False):
        layer.backward(x, **({"out": (None, buffer, None)} if out else {"accumulate": True}))
    assert layer.dW is buffer
    assert buffer.tolist() == [[4]]


def test_who_holds_a_gradient_sees_the_sum(backend: Backend, device: Any) -> None:
    for dtype in {"float32", "float16"} & set(backend.dtypes(device)):
        dy, x, W, b = case_on(make_case((3, 2), 4, seed=0, dtypes=dtype), backend, device)
        layer = AffineLayer(W, b)
        layer.forward(x)
        layer.backward(dy)
        held, before = layer.dW, backend.to_numpy(layer.dW).copy()
        layer.backward(dy, accumulate=True)
        assert np.array_equal(backend.to_numpy(layer.dW), 2 * before)
        if backend.name in ("numpy", "torch", "cupy"):
            assert layer.dW is held
        if isinstance(held, np.ndarray):  # and where it cannot be written, there is a new one
            layer.dW.flags.writeable = False
            layer.backward(dy, accumulate=True)
            assert np.array_equal(held, 2 * before)
            assert np.array_equal(layer.dW, 3 * before)


def test_without_accumulate_a_backward_starts_anew(numpy_backend: Backend) -> None:
    layer, x = layer_of_ones(numpy_backend, None, "float16", N=2)
    for accumulate in (True, True, False, True):
        layer.backward(x, accumulate=accumulate)
    assert (layer.dW.tolist(), layer.db.tolist()) == ([[4]], [4])


def test_only_wanted_gradients_are_touched(backend: Backend, device: Any) -> None:
    dy, x, W, b = case_on(make_case((3, 2), 4, seed=0), backend, device)
    layer = AffineLayer(W, b)
    layer.forward(x)
    assert layer.backward(dy, wrt=("W", "b")) is None
    dW, db = layer.dW, layer.db
    assert layer.backward(dy, wrt=("x",), accumulate=True) is not None
    assert layer.dW is dW
    assert layer.db is db
    layer.backward(dy, wrt=("b",), accumulate=True)
    assert layer.dW is dW
    assert layer.backward(dy, wrt=("x",)) is not None
    assert layer.dW is layer.db is None


def test_failure_changes_nothing(backend: Backend, device: Any) -> None:
    dy, x, W, b = case_on(make_case((3, 2), 4, seed=0), backend, device)
    layer = AffineLayer(W, b)
    layer.forward(x)
    layer.backward(dy)
    layer.db = b[:2]
    before = backend.to_numpy(layer.dW).copy()
    with pytest.raises(ValueError, match=r"must have one shape: the db that is there is .*layer\.db = None first"):
        layer.backward(dy, accumulate=True)
    with pytest.raises(ValueError, match=r"^accumulate adds to dW and db .* for them: leave out one of the two$"):
        layer.backward(dy, accumulate=True, out=(None, None, None))
    with pytest.raises(ValueError, match="wrt names the gradients wanted"):
        layer.backward(dy, wrt=("y",), accumulate=True)
    layer.db = [0.0] * 4
    with pytest.raises(TypeError, match="the db that is there is no array"):
        layer.backward(dy, accumulate=True)
    assert np.array_equal(backend.to_numpy(layer.dW), before)


def test_sum_is_of_the_dtype_of_the_gradient_that_is_there() -> None:
    layer, x = layer_of_ones(backends.get("numpy"), None, "float32", N=2)
    layer.dW, layer.db = np.ones((1, 1)), None
    layer.backward(x, accumulate=True)
    assert (layer.dW.dtype, layer.dW.tolist()) == (np.float64, [[3]])


@pytest.mark.parametrize("writable", [True, False])
def test_sum_of_halves_is_a_half_beside_one_in_float32(writable: bool) -> None:
    layer, x = layer_of_ones(backends.get("numpy"), None, "float16", N=2)
    layer.backward(x)
    layer.dW.flags.writeable = writable
    layer.backward(x, accumulate=True)
    assert (layer.dW.dtype, layer.dW.tolist()) == (np.float16, [[4]])
    assert {wide.dtype for wide in layer._wide_sums()} == {np.dtype("float32")}


@pytest.mark.parametrize("other", ["None", "float32"])
def test_sum_that_another_gradient_replaced_is_forgotten(numpy_backend: Backend, other: str) -> None:
    layer, x = layer_of_ones(numpy_backend, None, "float16", N=2)
    layer.dW = buffer = np.zeros((1, 1), np.float16)
    layer.backward(x, accumulate=True)
    layer.backward(x, accumulate=True)
    layer.dW = None if other == "None" else np.zeros((1, 1), np.float32)
    layer.backward(x, accumulate=True)
    reference = weakref.ref(buffer)
    buffer[...] = 0
    layer.dW = buffer
    layer.backward(x, accumulate=True)
    assert layer.dW.tolist() == [[2]]
    layer.dW = None
    layer.backward(x, accumulate=True)
    del buffer
    gc.collect()
    assert reference() is None


def test_sum_that_is_not_wanted_goes_on(numpy_backend: Backend) -> None:
    layer, x = layer_of_ones(numpy_backend, None, "float16", N=1)
    layer.dW = np.full((1, 1), 2048, np.float16)
    for _ in range(16):  # 2048 + 1 is 2048
        layer.backward(x, accumulate=True, wrt="W")
        layer.backward(x, accumulate=True, wrt="b")
    assert (layer.dW.tolist(), layer.db.tolist()) == ([[2064]], [16])


def test_failure_of_the_second_sum_leaves_that_of_the_first(
    numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with arrays that cannot be changed in place, of which one is on another device."""
    layer, x = layer_of_ones(numpy_backend, None, "float16", N=1)
    monkeypatch.setattr(type(numpy_backend), "adds_in_place", lambda *_: False)
    layer.dW = np.full((1, 1), 2048, np.float16)
    layer.backward(x, accumulate=True)
    before, db = layer.dW, layer.db

    def fail(*arguments: Any) -> Any:
        if arguments[1] is db:
            raise ValueError
        return add(*arguments)

    with monkeypatch.context() as context:
        context.setattr("xaffine.layer.add", fail)
        with pytest.raises(ValueError):  # noqa: PT011 - it has no words
            layer.backward(x, accumulate=True)
    assert layer.dW is before
    layer.backward(x, accumulate=True)
    assert layer.dW.tolist() == [[2050]]


def test_elements_that_share_memory_are_not_added_to_in_place() -> None:
    layer = AffineLayer(np.ones((3, 2)), np.ones(2))
    layer.forward(np.ones((1, 3)))
    memory = np.zeros(4)
    layer.dW = np.lib.stride_tricks.as_strided(memory, (3, 2), (8, 8))
    layer.backward(np.ones((1, 2)), accumulate=True)
    assert layer.dW.tolist() == [[1, 1]] * 3
    assert memory.tolist() == [0] * 4


def test_layer_can_be_copied_whatever_became_of_its_sums(numpy_backend: Backend) -> None:
    layer, x = layer_of_ones(numpy_backend, None, "float16", N=1)
    for _ in range(2):
        layer.backward(x, accumulate=True)
    layer.dW = np.full((1, 1), 5, np.float16)
    new = copy.copy(layer)  # whose running sum is that of db alone
    new.forward(x)
    new.backward(x, accumulate=True)
    assert (new.dW.tolist(), new.db.tolist()) == ([[6]], [3])
    layer.backward(x)
    assert copy.copy(layer).dW.tolist() == [[1]]
