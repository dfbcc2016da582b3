"""What only CuPy has: a GPU, and a registry that says so where there is none."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

from xaffine import affine, affine_vjp, backends

without_gpu = pytest.mark.skipif(cupy.cuda.is_available(), reason="this machine has a CUDA device")


@without_gpu
def test_without_a_gpu_the_registry_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"'cupy' is installed .* and finds no CUDA device"):
        backends.get("cupy")


def test_nothing_goes_through_the_host(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = (backend.from_numpy(np.ones(shape, "float32")) for shape in ((2, 2, 3), (6, 4), (4,)))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("copied to the host")

    with monkeypatch.context() as patch:
        for way in ("get", "item", "tolist", "__bool__", "__float__", "__int__", "__array__"):
            patch.setattr(cupy.ndarray, way, refuse)
        with pytest.raises(AssertionError, match="copied to the host"):
            x.get()
        y, vjp = affine_vjp(x, W, b)
        gradients = vjp(y)
    assert all(isinstance(result, cupy.ndarray) for result in (y, *gradients))
    assert bool((y == 7).all())


def test_numpy_x_with_cupy_w_is_refused(backend: Any) -> None:
    with pytest.raises(TypeError, match=r"two libraries: x is .* \(numpy on cpu\); W is .* \(cupy on"):
        affine(np.ones((2, 3)), backend.from_numpy(np.ones((3, 4))))


def test_arrays_on_two_devices_are_refused(backend: Any) -> None:
    if len(backend.devices) < 2:
        pytest.skip("this machine has one CUDA device")
    first, second = backend.devices[:2]
    x, W = backend.from_numpy(np.ones((2, 3)), device=first), backend.from_numpy(np.ones((3, 4)), device=second)
    with pytest.raises(ValueError, match="two devices"):
        affine(x, W)
