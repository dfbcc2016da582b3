"""The stopwatches: the host's, and a device's that times what was queued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xaffine import backends
from xaffine.backends import Backend
from xaffine.command import bench, clock


class Device:
    """A GPU as CuPy and torch show it: calls are queued, events take the time at their place in the queue."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.now = 0.0  # milliseconds
        self.calls: list[str] = []
        device = self

        class Event:
            def __init__(self, **options: Any) -> None:
                assert options == ({"enable_timing": True} if name == "torch" else {})
                self.done = False

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None:
                self.done = True

            def elapsed_time(self, end: Any) -> float:
                assert name == "torch"
                return device.elapsed(self, end)

        def make_current(_: Any) -> None:
            self.calls.append("current")

        self.cuda = SimpleNamespace(Event=Event, get_elapsed_time=self.elapsed, set_device=make_current)

    def use(self) -> None:
        self.calls.append("current")

    def __str__(self) -> str:
        return "cuda:0"

    def elapsed(self, start: Any, end: Any) -> float:
        assert end.done
        return float(end.at - start.at)

    def run(self, count: int) -> tuple[str]:
        self.calls += ["call"] * count
        self.now += 3.0 * count
        return ("result",)

    def __setitem__(self, where: Any, value: int) -> None:
        assert (where, value) == (..., 1)
        self.calls.append("flush")
        self.now += 100.0


@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_events_time_what_is_queued_and_nobody_waits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    device = Device(name)
    monkeypatch.setattr(clock.importlib, "import_module", lambda library: {name: device}[library])

    def zeros(size: int, dtype: Any, device: Any) -> Any:
        assert (size >= 1 << 28, dtype, device) == (True, "uint8", gpu)
        return gpu

    gpu, waited = device, []
    backend: Any = SimpleNamespace(name=name, xp=SimpleNamespace(zeros=zeros, uint8="uint8"), wait=waited.append)
    own = clock.clock_of(backend, gpu)
    assert device.calls == ["current"]
    assert own.name == "device events"
    assert own.time(device.run, 4) == pytest.approx(3e-3, rel=1e-12)
    assert device.calls[1:] == ["call"] * 4
    assert not waited
    assert own.time_cold(device.run) == pytest.approx(3e-3, rel=1e-12)
    assert device.calls[5:] == ["flush", "call"]
    assert waited == [gpu]  # for the flush alone


def test_host_waits_for_what_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = [0.0], []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def wait(array: Any) -> None:
        waited.append(array)
        now[0] += 2.0

    own = clock.clock_of(SimpleNamespace(wait=wait), "cpu")  # type: ignore[arg-type]
    assert (own.name, own.flush) == ("host", None)
    assert own.time(lambda count: ["first", "second"][:count], 2) == 2.0
    assert waited == ["first", "second"]


class TestOnAGpu:
    """The benchmark with a cache to empty, here one that only counts."""

    @pytest.fixture(autouse=True)
    def _clock(self, monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend) -> None:
        self.flushed = 0

        def flush() -> None:
            self.flushed += 1

        host = clock.clock_of(numpy_backend, "cpu")
        self.clock = clock.Clock("device events", host.mark, host.between, host.wait, flush)
        monkeypatch.setattr(bench, "clock_of", lambda *_: self.clock)

    def test_rows_come_warm_and_cold(self) -> None:
        rows = bench.compare("numpy", (5, 3, 4), "float32", rounds=2)
        names = {"limit", "xaffine", "classic class", "xaffine, out="}
        assert {(r["implementation"], r["what"], r["cache"]) for r in rows} == {
            (name, what, cache) for name in names for what in bench._WHAT for cache in ("warm", "cold")
        }
        assert self.flushed == 2 * len(rows) / 2
        assert all(set(r["to"]) == names - {r["implementation"]} for r in rows)

    def test_table_has_rates(self, capsys: Any) -> None:
        rows = bench.compare("numpy", (5, 3, 4), "float32", rounds=1)
        facts = {"version": "1", "device": "gpu", "threads": "many", "rates": {"float32": 1e-3}}
        found = {"xaffine": "1", "python": "3", "system": "here", "cores": 1, "groups": {"numpy": facts}, "rows": rows}
        bench._print_rows(found)
        printed = " ".join(capsys.readouterr().out.split())
        for words in ("cold", "TFLOP/s", "of its rate in a bare product of 8192³"):
            assert words in printed

    def test_rate_of_a_card_is_that_of_its_largest_product(self, numpy_backend: Backend) -> None:
        assert 0 < bench._rate(numpy_backend, "float32", None, self.clock, size=64) < 100


def test_operations_are_those_of_the_products() -> None:
    row = {"shape": [10, 20, 30], "median": 1e-6}
    rates = [bench.teraflops({**row, "what": what}) for what in ("forward", "backward", "both")]
    assert rates == pytest.approx([0.012, 0.024, 0.036], rel=1e-12)
    assert bench._rates({**row, "what": "both"}, None) == ("0.0", "")
    assert bench._rates({**row, "what": "both"}, 0.072) == ("0.0", "0.50")


def test_a_device_is_a_gpu_by_its_text() -> None:
    devices = ["cuda:0", "<CUDA Device 0>", "CudaDevice(id=0)", "gpu:1", "cpu", "TFRT_CPU_0", np.dtype(float)]
    assert [backends.is_gpu(device) for device in devices] == [True] * 4 + [False] * 3
