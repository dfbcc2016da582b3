"""A stand-in for CuPy 14.2 on machines without a GPU: CuPy's rules, read from its source, over NumPy's arithmetic.

It is found as ``cupy`` where ``tests/cupy_standin`` comes first on PYTHONPATH. It is strict: arrays become NumPy arrays
by `get` alone, operands must be CuPy's, kernels run and allocate on the current device and look at the devices of their
operands, fresh memory is full of 0xFF, factors are cut to TF32 where that is allowed. Kernels of xaffine, which are
compiled from C++, are told apart by their names. ``tests/backends/test_cupy.py`` compares it with the real CuPy.

It cannot show how cuBLAS rounds, that kernels compile, what runs at the same time, and how long anything takes.

The environment describes the machine: STANDIN_DEVICES (1), STANDIN_PEERS (1: a device can read the memory of another),
and STANDIN_HALF_SPLITK (0: cuBLAS adds products of halves up in float32; else a long sum has so many parts, each of
which is rounded to the half dtype, unless the math mode of the handle forbids it).
"""

import sys
import types

import numpy as np

from . import _core

__version__ = "14.2.0"

globals().update(_core.FUNCTIONS)
for _name in ("ndarray", "ufunc", "ElementwiseKernel", "RawKernel"):
    globals()[_name] = getattr(_core, _name)
for _name in (
    "bool_", "int8", "int16", "int32", "int64", "intp", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
    "float64", "complex64", "complex128", "dtype", "finfo", "iinfo", "isdtype", "issubdtype", "can_cast", "e", "inf",
    "nan", "newaxis", "pi", "integer",
):  # fmt: skip
    globals()[_name] = getattr(np, _name)


def get_default_memory_pool() -> _core.MemoryPool:
    """Return the pool of all devices."""
    return _core.pool


def _add_module(name: str, **contents: object) -> types.ModuleType:
    """Make a sub-module that can be imported."""
    module = types.ModuleType(f"{__name__}.{name}")
    vars(module).update(contents)
    sys.modules[module.__name__] = module
    parent, _, last = module.__name__.rpartition(".")
    setattr(sys.modules[parent], last, module)
    return module


_add_module(
    "_core._routines_linalg",
    set_compute_type=_core.set_compute_type,
    get_compute_type=_core.get_compute_type,
    **{f"COMPUTE_TYPE_{name}": number for number, name in enumerate(_core.COMPUTE_TYPES)},
)
_add_module(
    "cuda",
    Device=_core.Device,
    Stream=_core.Stream,
    Event=_core.Event,
    get_cublas_handle=_core.get_cublas_handle,
    get_current_stream=_core.current_stream,
    get_elapsed_time=_core.get_elapsed_time,
    is_available=lambda: _core.N_DEVICES > 0,
)
_add_module("cuda.cublas", getMathMode=_core.get_math_mode, setMathMode=_core.set_math_mode)
_add_module("cuda.device", Device=_core.Device)
_add_module("cuda.memory", OutOfMemoryError=_core.OutOfMemoryError)
_add_module("cuda.runtime", CUDARuntimeError=_core.CUDARuntimeError, getDeviceCount=_core.count_devices)
_add_module("fft")
_add_module("linalg", lstsq=None)
_add_module("random", randint=_core.randint, standard_normal=_core.standard_normal)
