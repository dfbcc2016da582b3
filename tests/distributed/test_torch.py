"""DTensors of torch over two processes, one of which may die."""

from __future__ import annotations

import re
import runpy
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import Ended, together

ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent / "workers"
EXAMPLE = ROOT / "docs" / "examples" / "torch_dtensor.py"

START = 60  # seconds to start on a busy machine
TIMEOUT = 5  # seconds that a process waits for the other one


def torchrun(*command: str) -> Ended:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return together([*launcher, *rendezvous, *command], seconds=START, **LOOPBACK)[0]


LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checks() -> Ended:
    """What two processes say that check the layer."""
    return torchrun(str(WORKERS / "torch_checks.py"))


@pytest.mark.parametrize("check", ["gradients", "derivatives", "buffers", "layer", "refusals"])
def test_on_dtensors(checks: Ended, check: str) -> None:
    for rank in range(2):
        assert f"rank {rank} of 2: {check} as in one process" in checks.output


def test_nothing_else_goes_wrong_on_dtensors(checks: Ended) -> None:
    assert checks.status == 0, checks.output


def test_the_example_learns() -> None:
    ended = torchrun(str(EXAMPLE))
    assert ended.status == 0, ended.output
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", ended.output)]
    assert len(losses) > 2
    assert losses[-1] < losses[0] / 10
    assert "x is (Shard(dim=0),), W is (Replicate(),)" in ended.output


def test_the_example_ends_in_one_line_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.distributed, "init_process_group", interrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as exit_:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert getattr(exit_.value, "code", None) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("victim", "by", "why"),
    [
        (0, signal.SIGKILL, "Connection (closed|reset) by peer"),
        (1, signal.SIGKILL, "Connection (closed|reset) by peer"),
        (1, signal.SIGSTOP, f"Timed out waiting {1000 * TIMEOUT}ms"),  # as a machine without power: nothing is closed
    ],
    ids=["first", "second", "silent"],
)
def test_a_process_that_dies_ends_the_other_with_an_error(tmp_path: Path, victim: int, by: int, why: str) -> None:
    worker, store = str(WORKERS / "torch_steps.py"), str(tmp_path / "store")
    ended = together(
        *([sys.executable, worker, store, rank, str(victim), str(int(by)), str(TIMEOUT)] for rank in "01"),
        seconds=START + 3 * TIMEOUT,
        **LOOPBACK,
    )
    survivor = ended[1 - victim]
    assert ended[victim].status == -signal.SIGKILL
    assert survivor.status in (1, -signal.SIGABRT)  # after its error, torch 2.13 may also abort as Python ends
    assert f"rank {1 - victim}: step 0" in survivor.output
    assert f"rank {1 - victim}: step 3" not in survivor.output
    assert re.search(rf"RuntimeError: .*{why}", survivor.output), survivor.output


def test_a_worker_that_is_killed_ends_torchrun_with_an_error(tmp_path: Path) -> None:
    store, by = str(tmp_path / "store"), str(int(signal.SIGKILL))
    worker = [sys.executable, str(WORKERS / "torch_steps.py"), store]
    ended = torchrun("--no-python", "/bin/sh", "-c", f"exec {shlex.join(worker)} $RANK 1 {by} {TIMEOUT}")
    assert ended.status == 1
    assert re.search(r"exitcode\s*: -9", ended.output), ended.output
