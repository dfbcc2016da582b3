"""The stopwatches: the host's, and a device's that times what was queued."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xaffine._command import bench, clock
from xaffine.backends import Backend, standard


def test_host_waits_for_what_it_times(monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend) -> None:
    now, waited = [0.0], []
    monkeypatch.setattr(standard.time, "perf_counter", lambda: now[0])

    def wait(array: Any) -> None:
        waited.append(array)
        now[0] += 2.0

    monkeypatch.setattr(numpy_backend, "wait", wait, raising=False)
    stopwatch = clock.clock_of(numpy_backend, "cpu")
    assert (stopwatch.name, stopwatch.flush) == ("host", None)
    assert stopwatch.time(lambda count: ["first", "second"][:count], 2) == 2.0
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

    def test_rows_come_warm_and_cold(self, numpy_backend: Backend) -> None:
        rows = bench.compare(numpy_backend, (5, 3, 4), "float32", rounds=2)
        names = {"limit", "xaffine", "xaffine, out="}
        assert {(r["implementation"], r["what"], r["cache"]) for r in rows} == {
            (name, what, cache) for name in names for what in bench._WHAT for cache in ("warm", "cold")
        }
        assert self.flushed == 2 * len(rows) / 2
        assert all(set(r["to"]) == names - {r["implementation"]} for r in rows)

    def test_table_has_rates(self, capsys: Any, numpy_backend: Backend) -> None:
        rows = bench.compare(numpy_backend, (5, 3, 4), "float32", rounds=1)
        facts = {"version": "1", "device": "gpu", "threads": "many", "rates": {"float32": 1e-3}}
        found = {"xaffine": "1", "python": "3", "system": "here", "cores": 1, "groups": {"numpy": facts}, "rows": rows}
        bench._print_rows(found)
        printed = " ".join(capsys.readouterr().out.split())
        for words in ("cold", "TFLOP/s", "of card", "of its rate in a bare product of 8192³"):
            assert words in printed

    def test_rate_of_a_card_is_that_of_its_largest_product(self, numpy_backend: Backend) -> None:
        assert 0 < bench._rate(numpy_backend, "float32", None, self.clock, size=64) < 100


def test_operations_are_those_of_the_products() -> None:
    row = {"shape": [10, 20, 30], "median": 1e-6}
    rates = [bench.teraflops({**row, "what": what}) for what in ("forward", "backward", "both")]
    assert rates == pytest.approx([0.012, 0.024, 0.036], rel=1e-12)
    assert bench._rates({**row, "what": "both"}, None) == ("0.0", "")
    assert bench._rates({**row, "what": "both"}, 0.072) == ("0.0", "0.50")


def test_a_device_is_a_gpu_by_its_text(numpy_backend: Backend) -> None:
    devices = ["cuda:0", "<CUDA Device 0>", "CudaDevice(id=0)", "gpu:1", "cpu", "TFRT_CPU_0", np.dtype(float)]
    assert [numpy_backend.is_gpu(device) for device in devices] == [True] * 4 + [False] * 3
