"""One of the processes that check the layer on DTensors, under torchrun."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from xaffine import AffineLayer, affine, affine_backward, affine_jvp, affine_vjp
from xaffine.curvature import affine_double_backward, kronecker_factors
from xaffine.per_sample import clipped_gradients, per_sample_gradients

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
mesh = init_device_mesh("cpu", (dist.get_world_size(),))

whole, rows, columns, sums = Replicate(), Shard(0), Shard(1), Partial("sum")
# How x, W, b and dy are placed, and what comes out of it: y, dx, dW, db.
LAYOUTS: dict[str, tuple[list[Placement], list[Placement]]] = {
    "batch": ([rows, whole, whole, rows], [rows, rows, sums, sums]),
    "columns of W": ([whole, columns, rows, columns], [columns, sums, columns, rows]),
    "rows of W": ([columns, rows, whole, whole], [sums, columns, rows, whole]),
    "nothing": ([whole] * 4, [whole] * 4),
}

rng = np.random.default_rng(0)
x, W, b, dy = (
    torch.asarray(rng.integers(-3, 4, shape), dtype=torch.float32) for shape in ((8, 6), (6, 4), (4,), (8, 4))
)
y, exact = affine(x, W, b), affine_backward(dy, x, W, b)


def split(*placements: Placement) -> list[DTensor]:
    """x, W, b and dy, as told."""
    return [distribute_tensor(t.clone(), mesh, [place]) for t, place in zip((x, W, b, dy), placements, strict=True)]


def assert_equal(results: Any, expected: Any) -> None:
    for result, tensor in zip(results, expected, strict=True):
        assert torch.equal(result.full_tensor(), tensor)


def gradients() -> None:
    for name, (places, results) in LAYOUTS.items():
        xs, Ws, bs, dys = split(*places)
        ys, vjp = affine_vjp(xs, Ws, bs)
        got = (ys, *vjp(dys))
        assert [tuple(result.placements) for result in got] == [(place,) for place in results], (name, got)
        assert_equal(got, (y, *exact))


def derivatives() -> None:
    for places, _ in LAYOUTS.values():
        xs, Ws, bs, dys = split(*places)
        assert_equal(affine_jvp((xs, Ws, bs), (xs, Ws, None)), (y, 2 * (x @ W)))
        leaves = [leaf.detach().requires_grad_() for leaf in (xs, Ws, bs)]
        assert_equal(torch.autograd.grad(affine(*leaves), leaves, dys), exact)
        assert_equal(affine_double_backward((xs, None, bs), dys, xs, Ws, bs)[::2], (y, x.mT @ dy))
        assert_equal(per_sample_gradients(dys, xs, Ws, bs), (x[:, :, None] * dy[:, None, :], dy))
        assert_equal(clipped_gradients(dys, xs, Ws, bs, max_norm=float("inf"))[1:], exact[1:])
        assert_equal(kronecker_factors(dys, xs, Ws, bs), (x.mT @ x / 8, dy.mT @ dy / 8))


def buffers() -> None:
    for places, _ in LAYOUTS.values():
        xs, Ws, bs, dys = split(*places)
        out = distribute_tensor(torch.full_like(dy, 7), mesh, [places[3]])
        assert affine(xs, Ws, bs, out=out) is out
        outs = tuple(
            distribute_tensor(torch.full_like(t, 7), mesh, [p]) for t, p in zip((x, W, b), places[:3], strict=True)
        )
        got = affine_backward(dys, xs, Ws, bs, out=outs)
        assert all(result is buffer for result, buffer in zip(got, outs, strict=True))
        # What was a sum of parts is added up into the buffer, however that is placed.
        assert [out.placements, *(result.placements for result in got)] == [(places[3],), *((p,) for p in places[:3])]
        assert_equal((out, *got), (y, *exact))


def layer() -> None:
    xs, Ws, bs, dys = split(*LAYOUTS["batch"][0])
    layer = AffineLayer(Ws, bs)
    assert_equal([layer(xs)], [y])
    for _ in range(3):
        layer.backward(dys, accumulate=True)
    assert_equal((layer.dW, layer.db), (3 * exact.dW, 3 * exact.db))
    moved = layer.to("numpy")
    assert np.array_equal(moved.W, W.numpy())
    Ws -= layer.dW  # added up on the way: the parameters stay alike in all processes
    assert Ws.placements == (whole,)
    assert torch.equal(Ws.to_local(), W - 3 * exact.dW)
    with TemporaryDirectory() as folder:
        layer.save(Path(folder) / "layer.safetensors")
        assert np.array_equal(AffineLayer.load(Path(folder) / "layer.safetensors").W, (W - 3 * exact.dW).numpy())


def refusals() -> None:
    xs, Ws, bs, dys = split(*LAYOUTS["batch"][0])
    out, plain = distribute_tensor(torch.full_like(dy, 7), mesh, [rows]), torch.full_like(dy, 7)
    calls = {
        "arrays on two devices: x is float32 (8, 6) (torch on DeviceMesh(": partial(affine, xs, W, bs),
        "W is float32 (6, 4) (torch on cpu)": partial(affine, xs, W, bs),
        "b is float32 (4,) (torch on cpu)": partial(affine, xs, Ws, b, out=out),
        "dy is float32 (8, 4) (torch on cpu)": partial(affine_backward, dy, xs, Ws, bs),
        "out must be on the device of the operands, DeviceMesh(": partial(affine, xs, Ws, bs, out=plain),
        "out must be on the device of the operands, cpu": partial(affine, x, W, b, out=out),
        "out overlaps x in memory": partial(affine, xs[:, :4], Ws[:4], bs, out=xs[:, :4]),
        "out's dW overlaps W in memory": partial(affine_backward, dys, xs, Ws, bs, out=(None, Ws, None)),
        "out must have the shape (8, 4)": partial(affine, xs, Ws, bs, out=distribute_tensor(x, mesh, [rows])),
    }
    for text, call in calls.items():
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
    assert_equal((out, xs, Ws), (torch.full_like(dy, 7), x, W))
    assert torch.equal(plain, torch.full_like(dy, 7))


for check in (gradients, derivatives, buffers, layer, refusals):
    check()
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {check.__name__} as in one process", flush=True)
dist.destroy_process_group()
os._exit(0)  # not by way of Python's own end, where torch 2.13 may abort: threads of gloo may still hold tensors
