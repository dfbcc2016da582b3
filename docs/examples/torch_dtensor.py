"""Train an affine layer with its batch split over processes, as DTensors of torch.

    torchrun --standalone --nproc-per-node 2 docs/examples/torch_dtensor.py

Runs on the processor; for GPUs take the backend "nccl" and the device "cuda" instead.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from xaffine import AffineLayer

N, FEATURES, OUTPUTS, STEPS, RATE = 1024, 16, 4, 40, 0.2


def descend(parameter: Any, gradient: Any) -> None:
    """Go down the gradient, of which each process has a part: the parts are added up in here."""
    parameter -= RATE * gradient


def main() -> None:
    """Fit random targets that are an affine function of x."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    torch.manual_seed(0)  # the same numbers in every process
    x = torch.randn(N, FEATURES)
    targets = x @ torch.randn(FEATURES, OUTPUTS) + torch.randn(OUTPUTS)
    x, targets = (distribute_tensor(rows, mesh, [Shard(0)]) for rows in (x, targets))
    W, b = (
        distribute_tensor(zeros, mesh, [Replicate()])
        for zeros in (torch.zeros(FEATURES, OUTPUTS), torch.zeros(OUTPUTS))
    )

    layer = AffineLayer(W, b)
    for number in range(STEPS):
        error = layer(x) - targets
        layer.backward(error / N, wrt=("W", "b"))
        descend(W, layer.dW)
        descend(b, layer.db)
        loss = (error**2).mean().full_tensor().item()
        if dist.get_rank() == 0 and (number % 10 == 9 or number == 0):
            print(f"step {number + 1:2}  loss {loss:.2e}")
    if dist.get_rank() == 0:
        print(f"x is {x.placements}, W is {W.placements}")
    dist.destroy_process_group()
    time.sleep(0.5)  # threads of gloo let go of the last tensors; torch 2.13 aborts where Python is gone before them


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
