"""What only array-api-strict has: several devices on any machine, and nothing beyond the standard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import array_api_strict as xp
import numpy as np
import pytest
from safetensors.numpy import save_file

from xaffine import AffineLayer, affine, affine_backward, affine_vjp, backends


@pytest.mark.parametrize("name", ["CPU_DEVICE", "device1", "device2", "no_float64"])
def test_results_stay_on_the_device(backend: Any, name: str) -> None:
    device = xp.Device(name)
    x, W, b, dy = (xp.asarray(np.ones(shape, "float32"), device=device) for shape in ((2, 2, 3), (6, 4), (4,), (2, 4)))
    y, vjp = affine_vjp(x, W, b)
    for result in (y, *vjp(dy)):
        assert result.device == device
    assert backend.to_numpy(y).tolist() == [[7] * 4] * 2


def test_layer_is_made_on_the_device(tmp_path: Path) -> None:
    first, second = xp.Device("device1"), xp.Device("device2")
    layer = AffineLayer.random(3, 4, backend="array-api-strict", device=first)
    layer.save(tmp_path / "own")
    save_file({"weight": np.ones((4, 3), "float32"), "bias": np.ones(4, "float32")}, tmp_path / "linear")
    elsewhere = AffineLayer.load(tmp_path / "own", backend="array-api-strict", device=second)
    linear = AffineLayer.load_linear(tmp_path / "linear", backend="array-api-strict", device=second)
    for made, device in ((layer, first), (elsewhere, second), (linear, second)):
        assert made.W.device == made.b.device == device
    with pytest.raises(ValueError, match="not in 'float64'"):
        AffineLayer.random(3, 4, backend="array-api-strict", device=xp.Device("no_float64"), dtype="float64")


def test_arrays_on_two_devices_are_refused() -> None:
    here, there = xp.Device("device1"), xp.Device("device2")
    x, W, b = xp.ones((2, 3), device=here), xp.ones((3, 4), device=here), xp.ones(4, device=there)
    with pytest.raises(ValueError, match=r"two devices.*device1.*device2.*Move them to one"):
        affine(x, W, b)
    with pytest.raises(ValueError, match="two devices"):
        affine_backward(xp.ones((2, 4), device=there, dtype=x.dtype), x, W)  # by default it has another
    with pytest.raises(ValueError, match="out must be on the device of the operands"):
        affine(x, W, out=xp.ones((2, 4), device=there, dtype=x.dtype))


@pytest.mark.parametrize("version", ["2022.12", "2023.12", "2024.12"])
def test_runs_on_the_standard_of_that_year(version: str) -> None:
    with xp.ArrayAPIStrictFlags(api_version=version):
        y, vjp = affine_vjp(xp.ones((2, 3, 1)), xp.ones((3, 4)), xp.ones(4))
        assert vjp(y).dx.shape == (2, 3, 1)


def test_runs_without_data_dependent_shapes_and_booleans() -> None:
    flags = {"data_dependent_shapes": False, "boolean_indexing": False}
    with xp.ArrayAPIStrictFlags(**flags):
        y, vjp = affine_vjp(xp.ones((2, 3)), xp.ones((3, 4)), xp.ones(4))
        assert vjp(y).db.shape == (4,)


def test_out_over_read_only_memory_is_refused() -> None:
    memory = np.zeros((2, 4))
    memory.flags.writeable = False
    with pytest.raises(TypeError, match="cannot be written"):
        affine(xp.ones((2, 3)), xp.ones((3, 4)), out=xp.asarray(memory, copy=False))


def test_out_is_filled_and_apart_from_the_operands() -> None:
    x, W, out = xp.ones((2, 3)), xp.ones((3, 3)), xp.zeros((2, 3))
    assert affine(x, W, out=out) is out
    assert bool(xp.all(out == 3))
    with pytest.raises(ValueError, match="out overlaps x in memory"):
        affine(x, W, out=x)
    assert bool(xp.all(x == 1))


@pytest.mark.parametrize("source", ["array-api-strict", "numpy"])
def test_layers_move_between_devices(source: str) -> None:
    layer = AffineLayer.random(3, 2, backend=source, seed=0)
    moved = layer.to("array-api-strict", device="array_api_strict.Device('device1')")
    assert moved.W.device == moved.b.device == xp.Device("device1")
    back = moved.to("array-api-strict", device="array_api_strict.Device('CPU_DEVICE')")
    assert back.W.device == xp.Device("CPU_DEVICE")
    assert np.array_equal(backends.get(source).to_numpy(layer.W), moved.to("numpy").W)
