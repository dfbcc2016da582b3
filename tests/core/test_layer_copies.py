"""Copies and pickles of a layer, and `AffineLayer.to`: the layer in another library, on another device, in a dtype."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from tests.helpers import case_on, floating_dtypes, layer_of_ones
from xaffine import AffineLayer, backends
from xaffine.backends import Backend
from xaffine.testing import make_case

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),  # noqa: S301 - our own
    "old pickle": lambda layer: pickle.loads(pickle.dumps(layer, 2)),  # noqa: S301 - our own
}


class Named(AffineLayer):
    """A subclass with attributes of its own, one of which no pickle takes."""

    __slots__ = ("label",)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.label, self.others, self.lock, self.me = "a label", [1], threading.Lock(), self

    def __getstate__(self) -> Any:
        attributes, slots = super().__getstate__()
        del attributes["lock"]
        return attributes, slots

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


@pytest.mark.parametrize("how", COPIES)
class TestCopies:
    """A copy or a pickle is the layer without its pending backward."""

    def test_backward_needs_a_forward_again(self, backend: Backend, device: Any, how: str) -> None:
        dy, x, W, b = case_on(make_case((3, 2), 4, seed=0), backend, device)
        layer = AffineLayer(W, b, n_batch_axes=-1)
        new = COPIES[how](layer)
        assert new.dW is new.db is None
        layer.forward(x)
        dx = backend.to_numpy(layer.backward(dy))
        with backend.on_device_of(x):  # CuPy reads pickles into the current device
            new = COPIES[how](layer)
        with pytest.raises(RuntimeError, match="backward needs a forward before it"):
            new.backward(dy)
        for name in ("W", "b", "dW", "db"):
            old, array = (getattr(one, name) for one in (layer, new))
            assert (array.dtype, type(array)) == (old.dtype, type(old))
            assert np.array_equal(backend.to_numpy(array), backend.to_numpy(old))
            assert (array is old) == (how == "copy" and name in "Wb") or backend.name == "jax"
        assert new.n_batch_axes == -1
        assert vars(new).keys() == vars(layer).keys() - {"_pending"}
        new.forward(x)
        assert np.array_equal(backend.to_numpy(new.backward(dy)), dx)
        assert np.array_equal(backend.to_numpy(layer.backward(dy)), dx)  # its own is pending still

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_sums_go_on_apart_from_each_other(self, backend: Backend, device: Any, how: str, dtype: str) -> None:
        if dtype not in backend.dtypes(device) or backend.name == "ndonnx":
            pytest.skip("it has no such dtype, or computes all that came before anew at each reading")
        layer, x = layer_of_ones(backend, device, dtype, N=1)
        half = {"float32": 1, "float16": 1, "bfloat16": 8}[dtype]  # of the distance between numbers above 2048
        with backend.on_device_of(x):  # CuPy reads pickles into the current device
            first, dy = 2048 * x, half * x
            layer.backward(first)
            layer.backward(dy, accumulate=True)  # 2048 in halves, and more in the sums beside them
            new = COPIES[how](layer)
        new.forward(x)
        for one, more, total in ((layer, 1, 2048 + 2 * half), (new, 5, 2048 + 6 * half)):
            for _ in range(more):
                one.backward(dy, accumulate=True)
            for gradient in (one.dW, one.db):
                assert float(backend.to_numpy(gradient).item()) == total

    def test_sum_that_was_replaced_does_not_come_back(self, numpy_backend: Backend, how: str) -> None:
        layer, x = layer_of_ones(numpy_backend, None, "float16", N=2)
        for _ in range(2):
            layer.backward(x, accumulate=True)
        layer.dW, layer.db = np.full((1, 1), 100, np.float16), None
        new = COPIES[how](layer)
        assert new.db is None
        new.forward(x)
        new.backward(x, accumulate=True)
        assert (new.dW.tolist(), new.db.tolist()) == ([[102]], [2])

    def test_subclasses_keep_what_is_theirs(self, how: str) -> None:
        layer = Named(np.ones((2, 3)), n_batch_axes=1)
        layer.forward(np.ones((4, 2)))
        new = COPIES[how](layer)
        assert type(new) is Named
        assert (new.label, new.others) == ("a label", [1])
        assert (new.others is layer.others) == (how == "copy")
        assert new.me is (layer if how == "copy" else new)
        assert new.lock is not layer.lock
        with pytest.raises(RuntimeError, match="backward needs a forward"):
            new.backward(np.ones((4, 3)))

    def test_what_is_shared_stays_shared(self, how: str) -> None:
        layer = AffineLayer(np.ones((2, 3)), np.ones(3))
        layer.forward(np.ones((4, 2)))
        layer.backward(np.ones((4, 3)), accumulate=True)
        model = {"first": layer, "second": AffineLayer(layer.W), "parameters": [layer.W, layer.b], "dW": layer.dW}
        new = COPIES[how](model)
        assert new["first"].W is new["second"].W is new["parameters"][0]
        assert new["first"].b is new["parameters"][1]
        assert new["first"].dW is new["dW"]
        assert (new["first"].W is layer.W) == (how == "copy")

    def test_layer_without_its_batch_stays_small(self, how: str) -> None:
        layer, sizes = AffineLayer(np.ones((2, 3))), []
        for rows in (1, 100_000):
            x = np.ones((rows, 2))
            layer.backward(layer(x), wrt=("W",))
            sizes.append(len(pickle.dumps(layer)))
            new, alive = COPIES[how](layer), weakref.ref(x)
            layer.forward(x[:1].copy())
            del x
            assert alive() is None
            assert new.dW is not None
        assert sizes[0] == sizes[1]


class TestTo:
    """Between libraries, devices and dtypes."""

    def test_there_and_back_changes_no_bit(self, backend: Backend, device: Any) -> None:
        for dtype in set(floating_dtypes(backend, device)) & set(backends.get("numpy").dtypes()):
            layer = AffineLayer.random(5, 4, dtype=dtype, seed=1, n_batch_axes=-1)
            there = layer.to(backend.name, device=device)
            assert backends.backend_of(there.W) is backend
            assert str(there.W.dtype).rpartition(".")[2] == str(there.b.dtype).rpartition(".")[2] == dtype
            back = there.to("numpy")
            assert back.W.dtype == layer.W.dtype
            assert np.array_equal(back.W, layer.W)
            assert there.n_batch_axes == back.n_batch_axes == -1

    def test_nothing_is_copied_where_nothing_changes(self, backend: Backend, device: Any) -> None:
        layer = AffineLayer.random(5, 4, backend=backend.name, device=device, seed=1)
        same = layer.to(backend.name, dtype="float32")
        assert same is not layer
        assert same.W is layer.W
        assert same.b is layer.b
        assert layer.to(backend.name, device=device).W is layer.W

    def test_another_library_has_memory_of_its_own(self, backend: Backend) -> None:
        if backend.name == "numpy":
            pytest.skip("it is the one that all others are compared with")
        layer = AffineLayer.random(5, 4, backend=backend.name, seed=1)
        moved, before = layer.to("numpy"), backend.to_numpy(layer.W).copy()
        moved.W -= 1
        assert np.array_equal(backend.to_numpy(layer.W), before)
        moved = AffineLayer.random(5, 4, seed=1)
        there = moved.to(backend.name)
        moved.W += 1
        assert np.array_equal(backend.to_numpy(there.W), before)

    def test_dtypes_are_cast(self, backend: Backend) -> None:
        if "float64" not in backend.dtypes():
            pytest.skip("this backend has one precision")
        layer = AffineLayer.random(5, 4, dtype="float64", seed=1).to(backend.name, dtype="float32")
        assert np.array_equal(backend.to_numpy(layer.W), AffineLayer.random(5, 4, dtype="float32", seed=1).W)
        assert layer.to(backend.name, dtype="float64").W.dtype == backend.dtype("float64")

    def test_layer_without_a_bias_stays_without(self, backend: Backend) -> None:
        assert AffineLayer.random(3, 2, bias=False).to(backend.name).b is None

    def test_libraries_that_share_memory_meet_by_dlpack(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import array_api_strict

        layer = AffineLayer.random(5, 4, dtype="float64", seed=1)
        strict = backends.get("array-api-strict")
        monkeypatch.setattr(Backend, "from_values", lambda *_, **__: pytest.fail("went by the host"))
        there = layer.to("array-api-strict")
        assert isinstance(there.W, type(array_api_strict.ones(1)))
        assert np.array_equal(strict.to_numpy(there.W), layer.W)

    def test_what_cannot_be_is_refused(self) -> None:
        layer = AffineLayer.random(3, 2)
        with pytest.raises(TypeError, match="float32 and int32 are dtypes of two kinds: stay among those of floating"):
            layer.to("numpy", dtype="int32")
        with pytest.raises(TypeError, match="float32 and complex64 are dtypes of two kinds"):
            layer.to("numpy", dtype="complex64")
        with pytest.raises(ValueError, match="numpy has no dtype 'float8' on cpu; it has bfloat16, float16"):
            layer.to("numpy", dtype="float8")
        with pytest.raises(ValueError, match="array-api-strict has no dtype 'bfloat16'"):
            layer.to("numpy", dtype="bfloat16").to("array-api-strict")
        with pytest.raises(TypeError, match="two kinds: stay among those of integer"):
            AffineLayer(np.ones((2, 2), int)).to("numpy", dtype="float64")
