"""What the standard alone answers of a library: on NumPy, whose file answers most of it otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from xaffine.backends import Backend


def test_lacks_what_it_has_not(numpy_backend: Backend) -> None:
    with pytest.raises(AttributeError, match=r"^Numpy has no attribute 'missing'$"):
        numpy_backend.missing  # noqa: B018 - which raises


def test_steps_are_called_directly_where_run_would_only_call_them(numpy_backend: Backend) -> None:
    class Running(Backend):
        def run(self, step: Any, plan: Any, *arrays: Any) -> Any:
            return step(plan, *arrays)

    assert (numpy_backend.calls_directly, Running("nowhere").calls_directly) == (True, False)


class TestDevices:
    @pytest.fixture
    def many(self, numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Backend:
        monkeypatch.setattr(type(numpy_backend), "devices", ["cpu", "<X 0>", "<X GPU 1>"])
        return numpy_backend

    def test_are_found_by_their_text_without_brackets(self, many: Backend) -> None:
        assert [many.device(name) for name in ("cpu", "X 0", "<X 0>", "gpu")] == ["cpu", "<X 0>", "<X 0>", "<X GPU 1>"]

    def test_are_listed_where_there_is_no_such_device(self, many: Backend) -> None:
        with pytest.raises(ValueError, match=r"^numpy has no device 0; it has cpu, X 0, X GPU 1$"):
            many.device("0")

    def test_are_named_only_where_they_bind(self, numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        assert numpy_backend.describe(np.ones(2, "f")) == "float32 (2,) (numpy on cpu)"
        monkeypatch.setattr(type(numpy_backend), "device_of", lambda *_: None)
        assert numpy_backend.describe(np.ones(2, "f")) == "float32 (2,) (numpy)"


class TestDtypes:
    def test_have_one_name_in_every_library(self) -> None:
        class Foreign:
            def __str__(self) -> str:
                return "library.core.Float32"

        assert Backend.dtype_name(np.dtype(">f8")) == "float64"
        assert Backend.dtype_name(Foreign()) == "float32"

    def test_are_promoted_as_the_library_does(self, numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        assert numpy_backend.promote(np.dtype(">f8")) == np.dtype("=f8")
        for own, expected in (({"promote_types": max}, "b"), ({}, "a")):
            monkeypatch.setattr(numpy_backend, "xp", SimpleNamespace(result_type=min, **own))
            assert numpy_backend.promote("a", "b") == expected

    def test_are_the_numeric_ones(self, numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        info = mock.Mock()
        info.dtypes.return_value = {"int8": None, "float32": None}
        monkeypatch.setattr(numpy_backend, "xp", SimpleNamespace(__array_namespace_info__=lambda: info))
        monkeypatch.setattr(type(numpy_backend), "halves", ())
        assert numpy_backend.dtypes("a device") == ["float32", "int8"]
        info.dtypes.assert_called_once_with(kind="numeric", device="a device")


class TestMemory:
    """Arrays of which one library or another cannot tell where they lie, or whether they can be written."""

    def test_that_can_be_written(self, numpy_backend: Backend) -> None:
        array = np.arange(6.0).reshape(3, 2)
        assert Backend.why_not_writable(numpy_backend, array) is None
        assert array.tolist() == [[0, 1], [2, 3], [4, 5]]

    def test_that_cannot(self, numpy_backend: Backend) -> None:
        class Refusing(np.ndarray):
            def __setitem__(self, *_: Any) -> None:
                raise NotImplementedError

        frozen = np.ones(2)
        frozen.flags.writeable = False
        for array in (frozen, np.ones(2).view(Refusing)):
            assert Backend.why_not_writable(numpy_backend, array) == "it is immutable or read-only"

    def test_that_is_added_to_in_place(self, numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        array, frozen = np.ones(4), np.ones(4)
        frozen.flags.writeable = False
        overlapping = np.lib.stride_tricks.as_strided(array, (3, 2), (8, 8))

        def found() -> list[bool]:
            return [Backend.adds_in_place(numpy_backend, each) for each in (array, frozen, overlapping)]

        assert found() == [True, False, False]
        monkeypatch.setattr(type(numpy_backend), "is_recorded", lambda _, each: each is array)
        assert found() == [False, False, False]

    def test_that_can_be_filled(self, numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        out, x = np.ones(4), np.ones(4)

        def found() -> list[bool]:
            calls = [((out,), (x, None)), ((None, out), (x, out[1:]))]
            return [Backend.can_fill(numpy_backend, *call) for call in calls]

        assert found() == [True, False]
        own = numpy_backend.memory_of
        monkeypatch.setattr(type(numpy_backend), "memory_of", lambda _, array: None if array is x else own(array))
        assert found() == [False, False]

    def test_that_two_arrays_share(self, numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = np.ones(4), np.ones(4)

        def found() -> list[bool]:
            pairs = [(first, second), (first, first[1:]), (first[1:], first), (first, first)]
            return [Backend.share_memory(numpy_backend, *pair) for pair in pairs]

        assert found() == [False, True, True, True]
        own = numpy_backend.memory_of
        for hidden in (lambda _: True, lambda array: array is first):
            monkeypatch.setattr(
                type(numpy_backend), "memory_of", lambda _, array, hidden=hidden: None if hidden(array) else own(array)
            )
            assert found() == [False, False, False, True]

    def test_is_copied_by_copy(self, numpy_backend: Backend) -> None:
        assert Backend.is_copyable(numpy_backend, np.ones(2))


def test_laziness_is_a_property_of_the_array(numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("array_api_compat.is_lazy_array", lambda array: asked.append(array) or 1)
    array = np.ones(2)
    assert Backend.is_lazy(numpy_backend, array) is True
    assert asked[0] is array


def test_reshape_infers_one_extent(numpy_backend: Backend) -> None:
    array = np.arange(6.0)
    for shape in ((3, 2), (None, 2), (3, float("nan"))):
        assert Backend.reshape(numpy_backend, array, shape).tolist() == [[0, 1], [2, 3], [4, 5]]
    for shape in ((None, None), (None, 0)):
        with pytest.raises(ValueError, match=r"^an array of shape \(6,\) cannot be reshaped to \(\?, [?0]\) before"):
            Backend.reshape(numpy_backend, array, shape)


def test_bare_products_are_those_of_a_forward_and_of_a_backward(backend: Backend, device: object) -> None:
    if backend.name not in ("numpy", "cupy", "torch", "jax"):
        return  # which have no benchmark
    constants = (np.full((2, 3), 2.0), np.full((3, 4), 3.0), np.full((2, 4), 5.0))
    x, W, dy = (backend.from_numpy(values, device=device) for values in constants)
    with backend.on_device_of(x):  # which the stopwatch of `xaffine bench` makes the current one
        forward, backward = backend.bare_products(x, W, dy)
        for _ in range(2):
            assert backend.to_numpy(forward()).tolist() == [[18] * 4] * 2
            dx, dW = map(backend.to_numpy, backward())
            assert (dx.tolist(), dW.tolist()) == ([[60] * 3] * 2, [[20] * 4] * 3)
        if backend.name != "jax":  # whose results are new
            assert forward() is forward()
            assert backward()[0] is backward()[0]
            assert backward()[1] is backward()[1]


class TestStopwatch:
    def test_is_the_clock_of_the_host_by_default(self, numpy_backend: Backend) -> None:
        name, mark, between, flush = numpy_backend.stopwatch("cpu")
        start = mark()
        assert (name, between(start, start + 2.5), flush) == ("host", 2.5, None)
        assert mark() >= start

    def test_by_events_reads_them_and_empties_the_caches(
        self, numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Any] = []
        written: list[Any] = []
        zeros = numpy_backend.xp.zeros

        def event() -> Any:
            made.append(mock.Mock())
            return made[-1]

        def buffer(shape: int, *, dtype: Any, device: Any) -> Any:
            assert (shape, dtype, device) == (256 << 20, numpy_backend.xp.uint8, "cpu")
            written.append(zeros(8, dtype=dtype))
            return written[-1]

        monkeypatch.setattr(numpy_backend.xp, "zeros", buffer)
        monkeypatch.setattr(type(numpy_backend), "wait", lambda _, array: written.append(array.tolist()))
        name, mark, between, flush = numpy_backend._by_events(
            "cpu", event, lambda start, end: 1500 * (made.index(end) - made.index(start))
        )
        first, second = mark(), mark()
        assert (name, between(first, second)) == ("device events", 1.5)
        assert [each.record.call_count for each in made] == [1, 1]
        assert [each.synchronize.call_count for each in made] == [0, 1]
        flush()
        assert written[1:] == [[1] * 8]
