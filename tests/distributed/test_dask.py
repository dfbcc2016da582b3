"""The layer on a Dask cluster: exact, bounded in memory, and the same after a fault."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from distributed import Client, KilledWorker, LocalCluster
from distributed.scheduler import NoWorkerError

from tests.distributed.launch import together
from xaffine import AffineLayer, affine_backward, affine_vjp
from xaffine.testing import make_case

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.timeout(180)  # for a whole test; what hangs fails
EXAMPLE = DOCS / "examples" / "out_of_core.py"
MEMORY = 400 << 20  # bytes that a worker may take
SECONDS = 60  # for what is to end in bounded time


def start_cluster(workers: int) -> LocalCluster:
    return LocalCluster(
        n_workers=workers, threads_per_worker=1, memory_limit=MEMORY, dashboard_address="127.0.0.1:0", host="127.0.0.1"
    )


@pytest.fixture
def client() -> Iterator[Client]:
    """Two workers, which give a computation up soon."""
    impatient = {
        "distributed.comm.timeouts.connect": "5s",
        "distributed.scheduler.allowed-failures": 3,
        "distributed.scheduler.no-workers-timeout": "10s",  # longer than a worker takes to be restarted
    }
    with dask.config.set(impatient), start_cluster(2) as cluster, Client(cluster, timeout=SECONDS) as client:
        yield client


def chunked(case: Any, rows: int) -> tuple[da.Array, ...]:
    dy, x, W, b = (o.values for o in (case.dy, case.x, case.W, case.b))
    return (
        *(da.from_array(values, chunks=(rows, *values.shape[1:])) for values in (dy, x)),
        *(da.from_array(values, chunks=-1) for values in (W, b)),
    )


def assert_exact(client: Client, case: Any, futures: Any) -> None:
    computed = client.gather(futures)
    expected = affine_backward(*(o.values for o in (case.dy, case.x, case.W, case.b)))
    for name, own, exact in zip(expected._fields, computed, expected, strict=True):
        assert np.array_equal(own, exact), name


def test_every_way_of_chunking_gives_the_exact_result(client: Client) -> None:
    case = make_case((40, 3, 2), 4, seed=1)
    expected = affine_backward(*(o.values for o in (case.dy, case.x, case.W, case.b)))
    keep = da.from_array(np.ones(40, bool), chunks=7)  # hides how many rows there are
    dy, x, W, b = (da.from_array(o.values, chunks=-1) for o in (case.dy, case.x, case.W, case.b))
    matrix = x.reshape(40, 6)
    ways = {
        "rows": (dy.rechunk((7, -1)), x.rechunk((7, -1, -1)), W, b),
        "rows and features": (dy.rechunk((7, -1)), x.rechunk((7, 2, 1)), W, b),
        "features of a matrix": (dy.rechunk((7, -1)), matrix.rechunk((7, 2)), W, b),
        "odd weights": (dy.rechunk((7, -1)), matrix.rechunk((7, -1)), W.rechunk((5, 3)), b.rechunk(1)),
        "odd everything": (dy.rechunk((9, 3)), matrix.rechunk((7, 4)), W.rechunk((5, 1)), b.rechunk(3)),
        "other rows for dy": (dy.rechunk((9, -1)), matrix.rechunk((7, -1)), W, b),
        "unknown rows": (dy.rechunk((7, -1))[keep], matrix.rechunk((7, -1))[keep], W, b),
        "unknown rows, outputs chunked": (dy.rechunk((7, 3))[keep], matrix.rechunk((7, -1))[keep], W, b),
        "unknown rows, features chunked": (dy.rechunk((7, -1))[keep], matrix.rechunk((7, 4))[keep], W, b),
        "rows of dy known, of x unknown": (dy.rechunk((7, -1)), matrix.rechunk((7, -1))[keep], W, b),
    }
    for name, operands in ways.items():
        gradients = client.gather(client.compute(list(affine_backward(*operands))))
        for own, exact in zip(gradients, expected, strict=True):
            assert np.array_equal(own.reshape(exact.shape), exact), name


# Faults


def falter(block: np.ndarray, flag: Path, fault: Callable[[Path], Any]) -> np.ndarray:
    """Have a fault at the block that begins with 7, once."""
    if block.size and block.flat[0] == 7 and not flag.exists():
        flag.touch()
        fault(flag)
    return block


def die(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def take_all_memory(_: Path) -> None:
    taken = []
    while True:  # until the nanny ends this worker
        taken.append(np.ones(8 << 20, np.uint8))
        time.sleep(0.01)


def wait_to_be_restarted(flag: Path) -> None:
    flag.write_text(str(os.getpid()))
    time.sleep(SECONDS)


def wait_for(flag: Path) -> str:
    """What stands in a file, once something does."""
    deadline = time.monotonic() + SECONDS
    while not (flag.exists() and flag.read_text()):
        assert time.monotonic() < deadline, "the fault did not come"
        time.sleep(0.05)
    return flag.read_text()


def backward_with(fault: Any, flag: Path) -> tuple[Any, Any]:
    """An exact case whose backward has a fault at one of 20 blocks of dy."""
    case = make_case((100, 6), 4, seed=3)
    case.dy.values[50] = 7
    dy, x, W, b = chunked(case, 5)
    dy = dy.map_blocks(falter, flag, fault, dtype=dy.dtype, meta=dy._meta)
    return case, affine_vjp(x, W, b)[1](dy)


@pytest.mark.parametrize("fault", [die, take_all_memory], ids=["killed", "out of memory"])
def test_a_worker_lost_in_a_backward_changes_nothing(client: Client, tmp_path: Path, fault: Any) -> None:
    before = set(client.run(os.getpid).values())
    case, gradients = backward_with(fault, tmp_path / "flag")
    assert_exact(client, case, client.compute(list(gradients)))
    assert (tmp_path / "flag").exists()
    client.wait_for_workers(2, timeout=SECONDS)
    assert len(before & set(client.run(os.getpid).values())) == 1  # the other one is new


def test_a_worker_restarted_in_a_backward_changes_nothing(client: Client, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    case, gradients = backward_with(wait_to_be_restarted, flag)
    futures = client.compute(list(gradients))
    workers = {pid: address for address, pid in client.run(os.getpid).items()}
    client.restart_workers([workers[int(wait_for(flag))]], timeout=SECONDS)
    assert_exact(client, case, futures)


def die_always(block: np.ndarray) -> np.ndarray:
    if block.size and block.flat[0] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return block


def test_a_block_that_kills_every_worker_is_an_error(client: Client) -> None:
    dy, x, W, b = chunked(make_case((100, 6), 4, seed=3), 5)
    dy = da.concatenate([da.full((5, 4), 7, dtype=dy.dtype), dy[5:]]).map_blocks(
        die_always, dtype=dy.dtype, meta=dy._meta
    )
    with pytest.raises(KilledWorker, match="4 different workers, but all those workers died"):
        client.gather(client.compute(list(affine_backward(dy, x, W, b))))


def test_no_worker_left_is_an_error(client: Client, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    _, gradients = backward_with(wait_to_be_restarted, flag)
    futures = client.compute(list(gradients))
    wait_for(flag)
    client.cluster.scale(0)
    with pytest.raises(NoWorkerError, match="without any running workers"):
        client.gather(futures)


# Bad input


def test_blocks_that_turn_out_to_differ_are_the_promised_error(client: Client) -> None:
    dy, x, W, b = chunked(make_case((40, 6), 4, seed=1), 8)
    fewer = np.arange(40) != 3
    hidden = x[da.from_array(np.ones(40, bool), chunks=8)], dy[da.from_array(fewer, chunks=8)]
    for gradient in affine_backward(hidden[1], hidden[0], W, b):
        with pytest.raises(ValueError, match=r"a block of x has 8 rows and that of dy 7"):
            client.gather(client.compute(gradient))


class TestExample:
    """Training on a file that is larger than the memory allowed."""

    module: Any = staticmethod(lambda: runpy.run_path(str(EXAMPLE)))

    def run(self, folder: Path, *arguments: Any, code: int = 0) -> str:
        """What the example writes, in that folder."""
        options = ("--weights", folder / "weights.safetensors", "--plot", folder / "loss.svg", *arguments)
        (ended,) = together([sys.executable, str(EXAMPLE), *map(str, options)], seconds=4 * SECONDS)
        assert ended.status == code, ended.output
        return ended.output

    @pytest.mark.parametrize("whom", ["process", "group"])
    def test_ends_in_one_line_when_it_is_interrupted(self, tmp_path: Path, whom: str) -> None:
        limits = "--make", "1MiB", "--workers", "1", "--memory", "400MiB", "--epochs", "100000"
        options = str(tmp_path / "data.zarr"), "--weights", str(tmp_path / "weights.safetensors"), *limits
        with subprocess.Popen(
            [sys.executable, str(EXAMPLE), *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        ) as child:  # fmt: skip
            try:
                while "loss" not in (line := child.stdout.readline()):
                    assert line
                (os.kill if whom == "process" else os.killpg)(child.pid, signal.SIGINT)
                rest, _ = child.communicate(timeout=SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        assert child.returncode == 130, rest
        assert "Traceback" not in rest
        assert rest.endswith(f"\ninterrupted; the next run goes on from {tmp_path / 'weights.safetensors'}\n")
        losses = json.loads((tmp_path / "weights.json").read_text())
        assert losses

    def test_waits_for_its_cluster_when_it_is_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Cluster:
            def __init__(self, **_: Any) -> None:
                os.kill(os.getpid(), signal.SIGINT)
                happened.append("started")

            def __enter__(self) -> None:
                happened.append("entered")

            def __exit__(self, *_: Any) -> None:
                happened.append("closed")

        happened: list[str] = []
        new_cluster = self.module()["new_cluster"]
        monkeypatch.setitem(new_cluster.__wrapped__.__globals__, "LocalCluster", Cluster)
        with pytest.raises(KeyboardInterrupt), new_cluster():
            pytest.fail("interrupted before")
        assert happened == ["started", "entered", "closed"]

    def test_an_interrupt_that_was_lost_ends_the_training_after_its_step(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        class Interrupted:
            def __del__(self) -> None:
                os.kill(os.getpid(), signal.SIGINT)

        def train(*_: Any, **__: Any) -> Iterator[float]:
            for loss in (3.0, 2.0):
                Interrupted()
                yield loss

        class OneWorker(contextlib.nullcontext[Any]):
            def __enter__(self) -> Any:
                return self

            def scheduler_info(self, **_: Any) -> Any:
                return {"workers": {"first": {"memory_limit": MEMORY}}}

        main = self.module()["main"]
        monkeypatch.setitem(main.__globals__, "train", train)
        monkeypatch.setitem(main.__globals__, "connect", lambda *_: OneWorker())
        weights = tmp_path / "weights.safetensors"
        monkeypatch.setattr("sys.argv", [EXAMPLE.name, str(data), "--scheduler", "one", "--weights", str(weights)])
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 130
        assert capsys.readouterr().err == f"\ninterrupted; the next run goes on from {weights}\n"
        assert json.loads(weights.with_suffix(".json").read_text()) == [3.0]
        assert signal.getsignal(signal.SIGINT) is before

    def losses(self, output: str) -> list[float]:
        return [float(line.rpartition(" ")[2]) for line in output.splitlines() if "  loss " in line]

    def test_learns_from_more_than_fits_and_goes_on_where_it_stopped(self, tmp_path: Path) -> None:
        limits = "--workers", 1, "--memory", "400MiB"
        data = tmp_path / "data.zarr"
        output = self.run(tmp_path, data, "--make", "600MiB", *limits, "--epochs", 2)
        assert "600.00 MiB; all workers may take 400.00 MiB" in output
        assert "100% Completed" in output
        first = self.losses(output)
        further = self.losses(self.run(tmp_path, data, *limits, "--epochs", 4))
        assert [len(first), len(further)] == [2, 2]
        # With x of unit variance each step halves the error, and so quarters the loss, but for sampling.
        assert all(late < early / 3 for early, late in zip([*first, *further], [*first, *further][1:], strict=False))
        assert (tmp_path / "loss.svg").read_text().startswith("<?xml")
        assert AffineLayer.load(tmp_path / "weights.safetensors").W.shape == (256, 8)

    @pytest.fixture(params=[None, "auto"], ids=["plain", "compressed"])
    def data(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        group = zarr.open_group(tmp_path / "data.zarr", mode="w")
        for name, width in (("x", 6), ("t", 4)):
            values = np.arange(1.0, 30 * width + 1, dtype="f").reshape(30, width)
            group.create_array(name, data=values, chunks=(10, width), compressors=request.param)
        return tmp_path / "data.zarr"

    def test_wrong_data_are_told_before_the_cluster_starts(self, data: Path, tmp_path: Path) -> None:
        open_data = self.module()["open_data"]
        assert [array.shape for array in open_data(data)] == [(30, 6), (30, 4)]
        with pytest.raises(ValueError, match=r"is no Zarr group \(.*\): write one with --make"):
            open_data(tmp_path / "nothing")
        (data / "x" / "c" / "1" / "0").rename(tmp_path / "chunk")
        with pytest.raises(ValueError, match=r"is truncated: 2 of 3 chunks of x are there\. .*write_empty_chunks"):
            open_data(data)
        (tmp_path / "chunk").rename(data / "x" / "c" / "1" / "0")
        group = zarr.open_group(data)
        group.create_array("t", data=np.ones((29, 4), "f"), overwrite=True)
        with pytest.raises(
            ValueError, match=r"must go together, and have rows: x is float32 \(30, 6\), t is float32 \(29, 4\)"
        ):
            open_data(data)
        for name in ("x", "t"):
            group.create_array(name, data=np.ones((0, 4), "f"), overwrite=True)
        with pytest.raises(ValueError, match="must go together, and have rows"):
            open_data(data)
        group.create_array("x", data=np.ones((30, 4), "float16"), overwrite=True)
        with pytest.raises(ValueError, match="in float32 or float64; its x is"):
            open_data(data)
        group.create_array("x", data=np.ones((30, 4), "f"), overwrite=True)
        group.create_array("t", data=np.ones(30, "f"), overwrite=True)
        with pytest.raises(ValueError, match=r"must hold x \(N, n\) and t \(N, m\)"):
            open_data(data)

    def test_weights_of_another_width_are_told_before_the_cluster_starts(self, data: Path, tmp_path: Path) -> None:
        AffineLayer.random(5, 4, seed=0).save(tmp_path / "weights.safetensors")
        output = self.run(tmp_path, data, code=2)
        assert "the data need W (6, 4) and b: name other weights" in output
        assert "all workers" not in output

    def test_data_that_exist_are_not_overwritten(self, data: Path, tmp_path: Path) -> None:
        assert "exists: leave out --make" in self.run(tmp_path, data, "--make", "1MiB", code=2)

    def test_a_chunk_cut_short_is_an_error(self, data: Path, tmp_path: Path) -> None:
        chunk = data / "x" / "c" / "1" / "0"
        chunk.write_bytes(chunk.read_bytes()[:20])
        output = self.run(tmp_path, data, "--workers", 1, code=2)
        assert "perhaps at a chunk that was cut short (" in output.splitlines()[-1]
        assert not (tmp_path / "weights.safetensors").exists()

    @pytest.mark.parametrize("listening", [False, True], ids=["nobody there", "somebody silent"])
    def test_a_scheduler_that_does_not_answer_is_an_error(self, data: Path, tmp_path: Path, listening: bool) -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            if listening:
                silent.listen()
            address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
            output = self.run(tmp_path, data, "--scheduler", address, "--patience", 2, code=2)
        assert f"no scheduler with workers answers at {address} within 2 s" in output

    def test_trains_on_a_scheduler_that_runs_already(self, data: Path, tmp_path: Path) -> None:
        with start_cluster(1) as cluster:
            rate = 1e-6  # for x of this size
            output = self.run(tmp_path, data, "--scheduler", cluster.scheduler_address, "--epochs", 2, "--rate", rate)
        first, second = self.losses(output)
        assert second < first


def test_measurement_that_is_interrupted_leaves_the_figures_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def measure(_: Path, found: dict[str, Any]) -> None:
        found["overhead"] = "measured"
        raise KeyboardInterrupt

    main = runpy.run_path(str(DOCS / "benchmarks" / "scale.py"))["main"]
    (tmp_path / "scale.json").write_text("figures of before")
    monkeypatch.setitem(main.__globals__, "DATA", tmp_path / "scale.json")
    monkeypatch.setitem(main.__globals__, "measure", measure)
    monkeypatch.setattr("sys.argv", ["scale.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 130
    assert capsys.readouterr().err == f"interrupted; what was measured is in {tmp_path / 'scale.unfinished'}\n"
    assert json.loads((tmp_path / "scale.unfinished").read_text()) == {"overhead": "measured"}
    assert (tmp_path / "scale.json").read_text() == "figures of before"


def test_overhead_is_that_of_dasks_own_file_beside_that_of_the_primitives_of_the_standard() -> None:
    scale = runpy.run_path(str(DOCS / "benchmarks" / "scale.py"))

    def tasks(chunks: int) -> int:
        return len({key for array in dask.optimize(*scale["small_step"](chunks)) for key in array.dask})

    own = tasks(20) - tasks(10)
    with scale["as_the_standard_says"]():
        standard = tasks(20) - tasks(10)
    assert 30 < own < 45
    assert 60 < standard < 80
    assert tasks(20) - tasks(10) == own


def test_committed_page_is_that_of_the_committed_figures() -> None:
    folder = DOCS / "benchmarks"
    found = json.loads((folder / "scale.json").read_text(encoding="utf-8"))
    write_page = runpy.run_path(str(folder / "scale.py"))["write_page"]
    assert (folder / "scale.md").read_text(encoding="utf-8") == write_page(found)
