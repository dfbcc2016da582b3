"""The kernels: the matrix products of the layer, on 2-D arrays only.

A kernel is a module with two functions, on operands of one dtype, library and device::

    forward(x, W, b, out=None)                               -> y
    backward(dy, x, W, wanted, out=(None, None, None))       -> (dx, dW, db)

x is (N, n), W (n, m), b (m,) or None, dy (N, m); `wanted` holds those of "x", "W" and "b" whose gradients are computed,
the others are None. `out` holds buffers of the shapes and the dtype of the results, apart from each other and from the
operands. A kernel that cannot fill them leaves them alone: who called it copies what it returned.

`xaffine.kernels.standard` is the implementation, which every library can run. A library has a kernel of its own where
a measurement shows the gain. JAX has none: there the whole way is compiled.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from xaffine.backends import Array

__all__ = ["compiler_for", "kernel_of"]

# By the module and the name of a type, so that no library is imported to find out.
_OWN = {
    ("numpy", "ndarray"): "numpy",
    ("numpy", "memmap"): "numpy",
    ("cupy", "ndarray"): "cupy",
    ("torch", "Tensor"): "torch",
    ("torch.nn.parameter", "Parameter"): "torch",
    ("dask.array.core", "Array"): "dask",
    ("ndonnx._array", "Array"): "ndonnx",
}

_KERNELS: dict[type, ModuleType] = {}


def kernel_of(*arrays: Array) -> ModuleType:
    """The kernel for arrays of these very types; subclasses, alone or among others, take the standard one.

    Examples
    --------
    >>> import numpy as np
    >>> kernel_of(np.ones(2)).__name__, kernel_of(np.ones(2).view(np.matrix)).__name__
    ('xaffine.kernels.numpy', 'xaffine.kernels.standard')
    """
    # No set of modules: Dynamo, the tracer of torch.compile, cannot hash them before torch 2.13.
    first, *others = (_kernel_of_type(type(array)) for array in arrays)
    return first if all(other is first for other in others) else _kernel_of_type(object)


def _kernel_of_type(kind: type) -> ModuleType:
    if kind not in _KERNELS:
        name = _OWN.get((kind.__module__, kind.__name__), "standard")
        if name == "torch":  # an import statement, since Dynamo traces no importlib.import_module
            from xaffine.kernels import torch as kernel
        else:
            kernel = importlib.import_module(f"xaffine.kernels.{name}")
        _KERNELS[kind] = kernel
    return _KERNELS[kind]


def compiler_for(kind: type) -> Callable[..., Any] | None:
    """What compiles functions of arrays of this very type: ``jax.jit``; None for other libraries and for tracers.

    Examples
    --------
    >>> import numpy as np
    >>> print(compiler_for(np.ndarray))
    None
    """
    if kind.__name__ == "ArrayImpl" and kind.__module__.startswith("jax"):
        return importlib.import_module("jax").jit  # type: ignore[no-any-return]
    return None
