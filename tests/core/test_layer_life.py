"""The life of a layer: random weights, gradients that add up, the way to other libraries and dtypes."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from xaffine import AffineLayer, backends, initializers
from xaffine.backends import Backend
from xaffine.testing import make_case
from xaffine.testing.cases import Case
from xaffine.testing.strategies import cases


def on(case: Case, backend: Backend, device: Any) -> list[Any]:
    return [None if o is None else o.on(backend, device) for o in (case.dy, case.x, case.W, case.b)]


class TestAccumulate:
    """Micro-batches add up to the whole batch."""

    def test_parts_give_the_gradients_of_the_whole(self, backend: Backend, device: Any) -> None:
        @given(cases(backend.dtypes(device), batch_axes=False, supports={"no-bias", "tensors", "empty"}))
        def equal(case: Case) -> None:
            dy, x, W, b = on(case, backend, device)
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

    def test_sums_of_halves_do_not_stall(self, backend: Backend, device: Any) -> None:
        for dtype in {"float16", "bfloat16"} & set(backend.dtypes(device)):
            case = make_case((1, 1), 1, seed=0, dtypes=dtype)
            ones = np.ones_like(case.x.values)
            dy, x, W, b = on(case.replace_values(x=ones, dy=ones), backend, device)
            layer = AffineLayer(W, b)
            layer.forward(x)
            layer.backward(2048 * dy, wrt=("b",))
            for _ in range(16):
                layer.backward(dy, wrt=("b",), accumulate=True)
            assert backend.to_numpy(layer.db).tolist() == [2064], dtype  # 2048 + 1 is 2048 in both
            assert str(layer.db.dtype).rpartition(".")[2] == dtype

    def test_an_assigned_gradient_starts_a_new_sum(self) -> None:
        x = np.ones((2, 1), np.float16)
        layer = AffineLayer(x[:1], x[0])
        layer.forward(x)
        for _ in range(3):
            layer.backward(x, accumulate=True)
        layer.dW = np.full((1, 1), 100, np.float16)
        layer.db = None
        layer.backward(x, accumulate=True)
        assert (layer.dW.tolist(), layer.db.tolist()) == ([[102]], [2])

    def test_a_buffer_that_held_a_sum_starts_a_new_one(self) -> None:
        x, buffer = np.ones((2, 1), np.float16), np.zeros((1, 1), np.float16)
        layer = AffineLayer(x[:1], x[0])
        layer.forward(x)
        for out in (True, False, True, False):
            layer.backward(x, **({"out": (None, buffer, None)} if out else {"accumulate": True}))
        assert layer.dW is buffer
        assert buffer.tolist() == [[4]]

    def test_who_holds_a_gradient_sees_the_sum(self, backend: Backend, device: Any) -> None:
        for dtype in {"float32", "float16"} & set(backend.dtypes(device)):
            dy, x, W, b = on(make_case((3, 2), 4, seed=0, dtypes=dtype), backend, device)
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

    def test_without_it_a_backward_starts_anew(self) -> None:
        x = np.ones((2, 1), np.float16)
        layer = AffineLayer(x[:1], x[0])
        layer.forward(x)
        for accumulate in (True, True, False, True):
            layer.backward(x, accumulate=accumulate)
        assert (layer.dW.tolist(), layer.db.tolist()) == ([[4]], [4])

    def test_only_wanted_gradients_are_touched(self, backend: Backend, device: Any) -> None:
        dy, x, W, b = on(make_case((3, 2), 4, seed=0), backend, device)
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

    def test_failure_changes_nothing(self, backend: Backend, device: Any) -> None:
        dy, x, W, b = on(make_case((3, 2), 4, seed=0), backend, device)
        layer = AffineLayer(W, b)
        layer.forward(x)
        layer.backward(dy)
        layer.db = b[:2]
        before = backend.to_numpy(layer.dW).copy()
        with pytest.raises(ValueError, match=r"must have one shape: the db that is there is .*layer\.db = None first"):
            layer.backward(dy, accumulate=True)
        with pytest.raises(ValueError, match="accumulate adds to dW and db in place, and out names other places"):
            layer.backward(dy, accumulate=True, out=(None, None, None))
        with pytest.raises(ValueError, match="wrt names the gradients wanted"):
            layer.backward(dy, wrt=("y",), accumulate=True)
        layer.db = [0.0] * 4
        with pytest.raises(TypeError, match="the db that is there is no array"):
            layer.backward(dy, accumulate=True)
        assert np.array_equal(backend.to_numpy(layer.dW), before)


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
        dy, x, W, b = on(make_case((3, 2), 4, seed=0), backend, device)
        layer = AffineLayer(W, b, n_batch_axes=-1)
        new = COPIES[how](layer)
        assert new.dW is new.db is None
        layer.forward(x)
        dx = backend.to_numpy(layer.backward(dy))
        new = COPIES[how](layer)
        with pytest.raises(RuntimeError, match="backward needs a forward before it"):
            new.backward(dy)
        for name in ("W", "b", "dW", "db"):
            old, array = (getattr(one, name) for one in (layer, new))
            assert (array.dtype, type(array)) == (old.dtype, type(old))
            assert np.array_equal(backend.to_numpy(array), backend.to_numpy(old))
            assert (array is old) == (how == "copy" and name in "Wb") or backend.name == "jax"
        assert new.n_batch_axes == -1
        new.forward(x)
        assert np.array_equal(backend.to_numpy(new.backward(dy)), dx)
        assert np.array_equal(backend.to_numpy(layer.backward(dy)), dx)  # its own is pending still

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_sums_go_on_apart_from_each_other(self, backend: Backend, device: Any, how: str, dtype: str) -> None:
        if dtype not in backend.dtypes(device) or backend.name == "ndonnx":
            pytest.skip("it has no such dtype, or computes all that came before anew at each reading")
        case = make_case((1, 1), 1, seed=0, dtypes=dtype)
        ones = np.ones_like(case.x.values)
        dy, x, W, b = on(case.replace_values(x=ones, dy=ones), backend, device)
        layer = AffineLayer(W, b)
        layer.forward(x)
        layer.backward(2048 * dy)
        half = {"float32": 1, "float16": 1, "bfloat16": 8}[dtype]  # of the distance between numbers above 2048
        layer.backward(half * dy, accumulate=True)  # 2048 in halves, and more in the sums beside them
        new = COPIES[how](layer)
        new.forward(x)
        for one, more, total in ((layer, 1, 2048 + 2 * half), (new, 5, 2048 + 6 * half)):
            for _ in range(more):
                one.backward(half * dy, accumulate=True)
            for gradient in (one.dW, one.db):
                assert float(backend.to_numpy(gradient).item()) == total

    def test_sum_that_was_replaced_does_not_come_back(self, how: str) -> None:
        x = np.ones((2, 1), np.float16)
        layer = AffineLayer(x[:1], x[0])
        layer.forward(x)
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


class TestRandom:
    """Weights by the schemes of the field."""

    @pytest.mark.parametrize("scheme", list(initializers.SCHEMES))
    def test_same_seed_gives_the_same_bits_everywhere(self, backend: Backend, device: Any, scheme: str) -> None:
        for dtype in [d for d in backend.dtypes(device) if "int" not in d]:
            layer = AffineLayer.random(5, 4, xp=backend.name, device=device, dtype=dtype, scheme=scheme, seed=7)
            assert str(layer.W.dtype).rpartition(".")[2] == str(layer.b.dtype).rpartition(".")[2] == dtype
            values = initializers.draw(scheme, 5, 4, seed=7, complex_=dtype.startswith("complex"))
            # What NumPy rounds to float32 or to the dtype; bfloat16 from float32, to even, in every library.
            host = values.astype("float32" if dtype == "bfloat16" else dtype)
            if dtype == "bfloat16":
                bits = host.view(np.uint32)
                host = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
            assert np.array_equal(backend.to_numpy(layer.W).astype(host.dtype), host), dtype
            assert not backend.to_numpy(layer.b).any()

    @pytest.mark.parametrize(
        ("scheme", "variance"),
        [
            ("kaiming_uniform", 2 / 300), ("kaiming_normal", 2 / 300), ("xavier_uniform", 2 / 500),
            ("xavier_normal", 2 / 500), ("glorot_uniform", 2 / 500), ("glorot_normal", 2 / 500),
            ("lecun_uniform", 1 / 300), ("lecun_normal", 1 / 300), ("zeros", 0.0),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("complex_", [False, True])
    def test_variance_is_that_of_the_formula(self, scheme: str, variance: float, complex_: bool) -> None:
        W = initializers.draw(scheme, 300, 200, seed=0, complex_=complex_)
        # The mean square of 60,000 values has a standard deviation of at most √(2 / 60,000) of itself: six of them.
        assert abs(float(np.mean(abs(W) ** 2)) - variance) <= 6 * math.sqrt(2 / W.size) * variance
        assert abs(complex(W.mean())) <= 6 * math.sqrt(variance / W.size)
        if "uniform" in scheme:
            assert abs(W.real).max() <= math.sqrt(3 * variance / (1 + complex_))
        elif variance:
            assert abs(W.real).max() > math.sqrt(3 * variance)

    def test_without_a_seed_they_differ(self) -> None:
        assert (AffineLayer.random(3, 2).W != AffineLayer.random(3, 2).W).any()

    def test_any_extent_may_be_zero(self, backend: Backend) -> None:
        for n, m in ((0, 3), (3, 0), (0, 0)):
            layer = AffineLayer.random(n, m, xp=backend.name, seed=0, n_batch_axes=1)
            assert backend.to_numpy(layer.W).shape == (n, m)
            assert layer.n_batch_axes == 1
        assert AffineLayer.random(2, 2, xp=backend.name, bias=False).b is None

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "words"),
        [
            ((3, 2), {"scheme": "he"}, ValueError, "no scheme is called 'he'; the schemes are kaiming_uniform"),
            ((3, 2), {"dtype": "int32"}, ValueError, "drawn in one of bfloat16, float16, .* on numpy, not in 'int32'"),
            ((3, 2), {"xp": "nope"}, ValueError, "no backend is called 'nope'"),
            ((3, 2), {"device": "gpu"}, ValueError, "numpy has no device gpu"),
            ((-1, 2), {}, ValueError, "n must be 0 or more, not -1"),
            ((3, 2.0), {}, TypeError, r"m must be an integer, not 2\.0"),
            ((True, 2), {}, TypeError, "n must be an integer, not True"),
        ],
    )
    def test_bad_input_is_refused(self, arguments: Any, options: Any, error: Any, words: str) -> None:
        with pytest.raises(error, match=words):
            AffineLayer.random(*arguments, **options)


class TestTo:
    """Between libraries, devices and dtypes."""

    def test_there_and_back_changes_no_bit(self, backend: Backend, device: Any) -> None:
        for dtype in [d for d in backend.dtypes(device) if "int" not in d and d in backends.get("numpy").dtypes()]:
            layer = AffineLayer.random(5, 4, dtype=dtype, seed=1, n_batch_axes=-1)
            there = layer.to(backend.name, device=device)
            assert backends.namespace_of(there.W) is backend.xp
            assert str(there.W.dtype).rpartition(".")[2] == str(there.b.dtype).rpartition(".")[2] == dtype
            back = there.to("numpy")
            assert back.W.dtype == layer.W.dtype
            assert np.array_equal(back.W, layer.W)
            assert there.n_batch_axes == back.n_batch_axes == -1

    def test_nothing_is_copied_where_nothing_changes(self, backend: Backend, device: Any) -> None:
        layer = AffineLayer.random(5, 4, xp=backend.name, device=device, seed=1)
        same = layer.to(backend.name, dtype="float32")
        assert same is not layer
        assert same.W is layer.W
        assert same.b is layer.b
        assert layer.to(backend.name, device=device).W is layer.W

    def test_another_library_has_memory_of_its_own(self, backend: Backend) -> None:
        if backend.name == "numpy":
            pytest.skip("it is the one that all others are compared with")
        layer = AffineLayer.random(5, 4, xp=backend.name, seed=1)
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
        with pytest.raises(ValueError, match="numpy has no dtype 'float8'; it has bfloat16, float16"):
            layer.to("numpy", dtype="float8")
        with pytest.raises(ValueError, match="array-api-strict has no dtype 'bfloat16'"):
            layer.to("numpy", dtype="bfloat16").to("array-api-strict")
        with pytest.raises(TypeError, match="two kinds: stay among those of integer"):
            AffineLayer(np.ones((2, 2), int)).to("numpy", dtype="float64")

    def test_arrays_of_no_backend_are_named(self) -> None:
        class Stranger:
            dtype = np.dtype("float32")

            def __array_namespace__(self, **_: Any) -> Any:
                return math

        with pytest.raises(TypeError, match="no backend has arrays of math; the backends are numpy, cupy"):
            backends.backend_of(Stranger())
