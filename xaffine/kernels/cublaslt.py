"""y = x W + b as one product on CUDA, through cuBLASLt, where nvmath-python is installed.

cuBLASLt adds the bias before it writes y, which saves a pass over it. Its call takes some 30 µs of the host, so this is
for products that keep the device busy for longer; what it cannot do is left to the kernel that asks. Not yet measured
on a GPU; what it knows of nvmath-python is from its source (1.0).
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from typing import TYPE_CHECKING, Any

import cupy

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["fill"]

_logger = logging.getLogger(__name__)

_WORK = 2**34  # multiplications that take the device longer than the host's part of the call
_ALIGNMENT = 256  # bytes; of any memory that CuPy allocates, and what a plan may rely on
_ROW = 16  # bytes that a row must be a multiple of
_WORKSPACE = 32 << 20  # bytes; what NVIDIA recommends for Hopper
_PLANS = 16  # in each thread


def fill(y: cupy.ndarray, x: cupy.ndarray, W: cupy.ndarray, b: cupy.ndarray) -> bool:
    """Fill y with x W + b: (N, n), (n, m), (m,) to (N, m); False if that was not done."""
    if not (_pays(x, W) and _fits(y, x, W, b)) or (advanced := _nvmath()) is None:
        return False
    tf32 = _is_cut_to_tf32(x.dtype)
    key = (x.device.id, x.shape, W.shape, x.dtype.name, tf32)
    plan = _plans_of_thread().get(key, lambda: _plan(advanced, y, x, W, b, tf32=tf32))
    if plan is None:
        return False
    try:
        plan.reset_operands_unchecked(a=W.T, b=x.T, c=y.T, epilog_inputs={"bias": b})
        plan.execute(release_workspace=True)  # in the order of the stream; kept, it would be out of CuPy's reach
    except Exception as error:  # out of memory for its workspace, say: the plain way needs none
        _logger.warning("a fused product failed, so the bias is added after it: %r", error)
        return False
    finally:
        plan.release_operands()
    return True


def _pays(x: cupy.ndarray, W: cupy.ndarray) -> bool:
    return x.size * W.shape[1] >= _WORK and x.dtype.name in ("float32", "float16", "bfloat16")


def _fits(*arrays: cupy.ndarray) -> bool:
    return all(
        array.flags.c_contiguous and array.data.ptr % _ALIGNMENT == 0 and array.shape[-1] * array.itemsize % _ROW == 0
        for array in arrays
    )


def _is_cut_to_tf32(dtype: Any) -> bool:
    """Whether CuPy's own product of that dtype is computed in TF32."""
    linalg = importlib.import_module("cupy._core._routines_linalg")
    return dtype.name == "float32" and bool(linalg.get_compute_type(dtype) == linalg.COMPUTE_TYPE_TF32)


@functools.cache
def _nvmath() -> Any:
    """nvmath-python's matrix products, None where they are not installed or their libraries are missing."""
    try:
        return importlib.import_module("nvmath.linalg.advanced")
    except (ImportError, OSError, RuntimeError):
        return None


def _plan(advanced: Any, y: cupy.ndarray, x: cupy.ndarray, W: cupy.ndarray, b: cupy.ndarray, *, tf32: bool) -> Any:
    """A plan for yᵀ = Wᵀ xᵀ + b, which cuBLASLt takes column by column, into y; None if there is none."""
    plan = None
    try:
        idle = cupy.cuda.Stream(non_blocking=True)  # planning waits for its stream: not for the one in use
        plan = advanced.Matmul(W.T, x.T, y.T, beta=0.0, options=_options(tf32=tf32), stream=idle)
        plan.plan(epilog=advanced.MatmulEpilog.BIAS, epilog_inputs={"bias": b}, stream=idle)
    except Exception as error:  # whatever keeps it from being planned: the plain way is there
        _logger.warning("a fused product cannot be planned, so biases are added after products: %r", error)
        if plan is not None:
            plan.free()
        return None
    return plan


def _options(*, tf32: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"inplace": True, "memory_limit": _WORKSPACE}
    if tf32:
        options["compute_type"] = importlib.import_module("nvmath.linalg").ComputeType.COMPUTE_32F_FAST_TF32
    return options


class _Plans:
    """The latest plans; what cannot be planned is kept as None, so that it is tried once."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        plan = self._by_key.pop(key) if key in self._by_key else make()
        self._by_key[key] = plan  # last again
        if len(self._by_key) > _PLANS:
            oldest = self._by_key.pop(next(iter(self._by_key)))
            if oldest is not None:
                oldest.free()
        return plan


_local = threading.local()


def _plans_of_thread() -> _Plans:
    if not hasattr(_local, "plans"):
        _local.plans = _Plans()
    plans: _Plans = _local.plans
    return plans
