"""One of two processes that take gradient steps: torch_steps.py STORE RANK VICTIM SIGNAL TIMEOUT.

The victim sends itself the signal between a forward and its backward, in the middle of the steps.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from xaffine import affine_vjp

STEPS = 6

rank, victim, signal, timeout = map(int, sys.argv[2:])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2, timeout=timedelta(seconds=timeout)
)
mesh = init_device_mesh("cpu", (2,))
x = distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)])
W = distribute_tensor(torch.ones(6, 4), mesh, [Replicate()])

for step in range(STEPS):
    y, vjp = affine_vjp(x, W)
    if rank == victim and step == STEPS // 2:
        os.kill(os.getpid(), signal)
    gradient = vjp(y).dW.full_tensor()
    print(f"rank {rank}: step {step}, {gradient[0, 0].item()}", flush=True)
