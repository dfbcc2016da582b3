"""One of two processes that take gradient steps on a mesh: jax_steps.py PORT RANK VICTIM SIGNAL HEARTBEAT.

The victim, if that is a rank, sends itself the signal between a forward and its backward, in the middle of the steps.
"""

from __future__ import annotations

import os
import sys

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xaffine import affine_backward, affine_vjp

STEPS = 6

port, rank, victim, signal, heartbeat = map(int, sys.argv[1:])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"127.0.0.1:{port}",
    num_processes=2,
    process_id=rank,
    initialization_timeout=60,
    heartbeat_timeout_seconds=heartbeat,
    shutdown_timeout_seconds=heartbeat,
)
assert len(jax.devices()) == 4
assert len(jax.local_devices()) == 2

rng = np.random.default_rng(0)
x, W, b, dy = (rng.integers(-3, 4, shape).astype("float32") for shape in ((8, 6), (6, 4), (4,), (8, 4)))
y = x @ W + b
expected = affine_backward(dy, x, W, b)
ours = slice(4 * rank, 4 * rank + 4)

for step in range(STEPS):
    kind = AxisType.Explicit if step % 2 else AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    part_x, part_dy = (jax.make_array_from_process_local_data(rows, array[ours]) for array in (x, dy))
    weights, bias = (jax.make_array_from_process_local_data(whole, array) for array in (W, b))

    got, vjp = affine_vjp(part_x, weights, bias)
    if rank == victim and step == STEPS // 2:
        os.kill(os.getpid(), signal)
    gradients = vjp(part_dy)

    assert got.sharding.is_equivalent_to(rows, 2)
    assert gradients.dW.sharding.is_fully_replicated
    assert np.array_equal(np.asarray(gradients.dW), expected.dW)
    assert np.array_equal(np.asarray(gradients.db), expected.db)
    assert np.array_equal(process_allgather(got, tiled=True), y)
    assert np.array_equal(process_allgather(gradients.dx, tiled=True), expected.dx)
    print(f"rank {rank}: step {step} equals that of one process", flush=True)
