"""The array libraries that xaffine knows: which are here, and one by name.

>>> from xaffine import backends
>>> backend = backends.get("numpy")
>>> x = backend.xp.ones((2, 3))
>>> backend.to_numpy(x).shape
(2, 3)

The layer finds the backend of the arrays that it is given. What is known of a library is in the file of that name
beside this one, which is imported when the first array of the library comes.
"""

from __future__ import annotations

import importlib
import importlib.util
import numbers
from typing import Any, Literal, TypeAlias, get_args

import array_api_compat
import numpy as np

from xaffine.backends.standard import Array, Backend

__all__ = ["Array", "Backend", "backend_of", "get", "installed", "move", "names"]

# A new library is its name here, one entry below it, and a file of that name.
Name: TypeAlias = Literal["numpy", "cupy", "torch", "jax", "dask", "array-api-strict", "ndonnx", "sparse"]
"""The name of a backend."""

_INSTALL: dict[str, str] = {  # what pip is told to install
    "numpy": "numpy",
    "cupy": '"cupy-cuda13x[ctk]"',
    "torch": "torch",
    "jax": "jax",
    "dask": '"dask[array]"',
    "array-api-strict": "array-api-strict",
    "ndonnx": "ndonnx onnxruntime",
    "sparse": "sparse",
}
_FILES: dict[str, Name] = {name.replace("-", "_"): name for name in get_args(Name)}
_OTHERS: dict[str, Backend] = {}  # by the namespace, for libraries without a file
# By the type of an array, since finding it out takes microseconds. The type alone will not do for the tangents that JAX
# gives integers: they are NumPy arrays, of a dtype of JAX's own.
_BY_TYPE: dict[type, Backend] = {}


def names() -> tuple[Name, ...]:
    """The names of all backends in the registry, installed or not.

    Returns
    -------
    tuple of str
        In the order of the registry.

    Examples
    --------
    >>> names()
    ('numpy', 'cupy', 'torch', 'jax', 'dask', 'array-api-strict', 'ndonnx', 'sparse')
    """
    return tuple(_FILES.values())


def installed() -> tuple[Name, ...]:
    """The names of the backends whose library is installed here; nothing is imported to find out.

    Returns
    -------
    tuple of str
        In the order of the registry. What they run on, a GPU say, may still be missing.

    Examples
    --------
    >>> "numpy" in installed()
    True
    """
    return tuple(name for file, name in _FILES.items() if importlib.util.find_spec(file))


def get(name: Name | str) -> Backend:
    """The backend of that name, imported and usable.

    Parameters
    ----------
    name : str
        One of `names`.

    Returns
    -------
    Backend
        Its library is imported.

    Raises
    ------
    ValueError
        No backend has that name.
    ImportError
        The library is not installed, with the command that installs it, or its import fails.
    RuntimeError
        The library is there and what it runs on is not: CuPy without a CUDA device.

    Examples
    --------
    >>> from xaffine import backends
    >>> xp = backends.get("numpy").xp
    >>> xp.ones((2, 3)).shape
    (2, 3)
    """
    if name not in _INSTALL:
        msg = f"no backend is called {name!r}; the backends are {', '.join(_INSTALL)}"
        raise ValueError(msg)
    file = name.replace("-", "_")
    if importlib.util.find_spec(file) is None:
        msg = f"the backend {name!r} is not installed; to get it: pip install {_INSTALL[name]}"
        raise ModuleNotFoundError(msg, name=file)
    try:
        backend = _of_file(file)
        backend.xp  # noqa: B018 - which imports it
    except ImportError as error:
        renew = f"pip install {_INSTALL[name]}"
        msg = f"the backend {name!r} is installed and cannot be imported ({error}); to renew it: {renew}"
        raise ImportError(msg, name=file) from error
    if missing := backend.why_unusable():
        msg = f"the backend {name!r} is installed ({backend.version}) and finds {missing}"
        raise RuntimeError(msg)
    return backend


def backend_of(array: Array) -> Backend:
    """The backend that an array belongs to.

    Parameters
    ----------
    array
        Of any library that conforms to the standard.

    Returns
    -------
    Backend
        One of `names`; for a library that is not among them, one that knows nothing but the standard.

    Raises
    ------
    TypeError
        It is no array of the standard: a list, a Python number, a NumPy scalar, a masked array, a matrix.

    Examples
    --------
    >>> backend_of(np.ones(2))
    <xaffine backend 'numpy'>
    """
    kind = type(array)
    is_tangent = kind is np.ndarray and array.dtype.names is not None
    if kind in _BY_TYPE and not is_tangent:
        return _BY_TYPE[kind]
    if isinstance(array, (np.generic, np.matrix, np.ma.MaskedArray)):  # a tuple: Dynamo traces no union
        msg = f"{kind.__name__} does not follow the array API standard"
        raise TypeError(msg)
    xp = array_api_compat.array_namespace(array)
    backend = _of_namespace(xp.__name__)
    if type(backend) is Backend:
        backend.xp = xp  # which need not be found by its name
    if not is_tangent:
        _BY_TYPE[kind] = backend
    return backend


# Methods that make an array of what the asarray of a library would misread: a masked array would lose its mask, and a
# sparse matrix of SciPy would become one object.
_CONVERSIONS = ("filled", "toarray", "todense", "to_numpy")


def _together(**operands: Any) -> tuple[Backend, Any, str]:
    """The one backend of some operands, their common dtype and its kind; an error that names what does not fit."""
    found: dict[str, Backend] = {}
    for name, operand in operands.items():
        if (backend := _backend_or_none(operand)) is not None:
            backend.check_operands(**{name: operand})
            found[name] = backend
    if strangers := [name for name in operands if name not in found]:
        name = next((name for name in strangers if hasattr(operands[name], "filled")), strangers[0])
        method = next((method for method in _CONVERSIONS if hasattr(operands[name], method)), None)
        library = next((b.namespace.removeprefix("array_api_compat.") for b in found.values()), "numpy")
        if method == "filled":
            call = f"{name}.filled(0), with the value that masked elements stand for"
        else:
            call = f"{library}.asarray({name})" if method is None else f"{name}.{method}()"
        is_convertible = method is not None or isinstance(operands[name], (list, tuple, numbers.Number, np.matrix))
        msg = (
            f"{' and '.join(strangers)} {'is no array' if len(strangers) == 1 else 'are no arrays'} of a library that "
            f"follows the array API standard: {_describe(**operands)}. "
            f"{f'Make it one first, for example {call}' if is_convertible else f'Pass an array for {name}'}"
        )
        raise TypeError(msg)
    first = next(iter(found.values()))
    if any(backend is not first for backend in found.values()):
        backends = list(found.values())
        # Towards the library of most of them; of two, towards that of W, since weights rarely move.
        goal = max(reversed(backends), key=lambda backend: (backend.name in _INSTALL, backends.count(backend)))
        others = [name for name, backend in found.items() if backend is not goal]
        anchor = next(name for name, backend in found.items() if backend is goal)
        is_default = goal.device_of(operands[anchor]) in (None, goal.devices[0])
        move = f"xaffine.backends.move({others[0]}, {goal.name!r}{'' if is_default else f', device={anchor}.device'})"
        msg = (
            f"arrays of two libraries: {_describe(**operands)}. Bring {' and '.join(others)} to {goal.name} first, "
            f"as by {move}"
        )
        raise TypeError(msg)
    dtype, kind = first.common_dtype(**operands)
    first.check_operands(**operands)
    return first, dtype, kind


def _describe(**operands: Any) -> str:
    """Say of every operand what it is: dtype, shape, library and device."""
    return "; ".join(f"{name} is {_described(operand)}" for name, operand in operands.items())


def _described(operand: Any) -> str:
    backend = _backend_or_none(operand)
    if backend is None:
        return "None" if operand is None else f"a {type(operand).__module__}.{type(operand).__qualname__}"
    return backend.describe(operand)


def _backend_or_none(operand: Any) -> Backend | None:
    try:
        return backend_of(operand)
    except TypeError:
        return None


def _of_namespace(namespace: str) -> Backend:
    """The backend of a namespace: that of its library's file, if there is one."""
    file = namespace.removeprefix("array_api_compat.").partition(".")[0]
    if file in _FILES:
        return _of_file(file)
    return _OTHERS.setdefault(namespace, Backend(namespace))


def _of_file(file: str) -> Backend:
    if file == "torch":  # an import statement, since Dynamo traces no importlib.import_module
        from xaffine.backends.torch import BACKEND

        return BACKEND
    return importlib.import_module(f"xaffine.backends.{file}").BACKEND  # type: ignore[no-any-return]


def move(array: Array, backend: Backend | Name | str, *, device: Any = None, dtype: str | None = None) -> Array:
    """Bring an array to a library, a device and a dtype: by DLPack where both libraries have it, else by the host.

    Parameters
    ----------
    array
        Of any backend; a lazy one is computed.
    backend : Backend or str
        Where to, by its name or as from `get`.
    device : optional
        One of the backend's devices; by default where the array is, also in another library if it has that GPU; else
        the default one.
    dtype : str, optional
        By default that of the array.

    Returns
    -------
    array
        The same one where nothing changes, else one with memory of its own.

    Raises
    ------
    TypeError
        As `backend_of`; or a dtype of another kind: integer, real floating, complex floating.
    ValueError
        The backend has no such dtype there; ImportError and RuntimeError as `get`.

    Examples
    --------
    >>> x = np.ones(2)
    >>> move(x, "numpy") is x, move(x, "numpy", dtype="float32").dtype.name
    (True, 'float32')
    """
    backend = get(backend) if isinstance(backend, str) else backend
    source = backend_of(array)
    name = own = source.dtype_name(array.dtype)
    if dtype is not None:
        name = dtype
        if _kind(name) != _kind(own):
            msg = f"{own} and {name} are dtypes of two kinds: stay among those of {_kind(own)} numbers"
            raise TypeError(msg)
    here = source.device_of(array)  # which of a DTensor of torch is a mesh
    place = here if device is None and source is backend and here in backend.devices else device
    if name not in backend.dtypes(place):
        msg = f"{backend.name} has no dtype {name!r}{'' if place is None else f' on {place}'}; it has "
        raise ValueError(msg + ", ".join(backend.dtypes(place)))
    if source is not backend:
        array = _carried(source.whole(array), source, backend, name, device)
    here = backend.device_of(array)
    if name in backend.dtypes(here if here in backend.devices else None):
        array = _cast(array, backend, name)  # now, since the device may lack the dtype that it has
    if device is not None and here != device:
        array = backend.to_device(array, device)
    return _cast(array, backend, name)


def _cast(array: Array, backend: Backend, dtype: str) -> Array:
    with backend.on_device_of(array):
        return array if backend.dtype_name(array.dtype) == dtype else backend.xp.astype(array, backend.dtype(dtype))


def _kind(dtype: str) -> str:
    """Complex, integer or real floating, by the name of a dtype."""
    return "complex" if dtype.startswith("complex") else "integer" if "int" in dtype else "floating"


def _carried(array: Array, source: Backend, backend: Backend, dtype: str, device: Any) -> Array:
    """A copy of an array in another library, on whatever device; by way of the host on that device in that dtype."""
    try:
        memory = source.memory_of(array)
        if source.has_strides and (memory is None or min(memory.strides, default=0) < 0):
            array = source.xp.asarray(array, copy=True)  # whose strides are positive: torch ends the process at others
        shared = backend.xp.from_dlpack(array)
        with backend.on_device_of(shared):
            return backend.xp.asarray(shared, copy=True)
    except Exception:  # one of them has no DLPack, or none for this dtype, device, or read-only memory
        return backend.from_values(np.array(source.to_numpy(array)), dtype, device=device)
