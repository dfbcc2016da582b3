"""The array libraries that xaffine knows: which are here, and one by name.

>>> from xaffine import backends
>>> backend = backends.get("numpy")
>>> x = backend.xp.ones((2, 3))
>>> backend.to_numpy(x).shape
(2, 3)

The layer itself needs no backend object: it runs on whatever arrays it is given, on these libraries and
on any other that conforms to the array API standard.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Sequence  # noqa: TC003 - fields of a dataclass
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType  # noqa: TC003 - likewise
from typing import Any, TypeAlias

import array_api_compat
import numpy as np

__all__ = [
    "Array", "Backend", "are_apart", "backend_of", "computing_with", "detached", "device_of", "dtype_name", "get",
    "installed", "is_copyable", "is_gpu", "is_half", "is_of_kind", "is_recorded", "library_of", "memory_of", "move",
    "names", "namespace_of", "on_device_of", "overlap", "share_memory",
]  # fmt: skip

Array: TypeAlias = Any
"""An array of any library that conforms to the array API standard."""


def _standard_devices(xp: ModuleType) -> Sequence[Any]:
    # dask and JAX also list an entry that stands for "wherever the data are".
    return [d for d in xp.__array_namespace_info__().devices() if d is not None and str(d) != "DASK_DEVICE"]


def _nothing(_: Any) -> None:
    """For libraries that compute at once, are always usable, or compute in the precision they are told."""


@dataclass(frozen=True, repr=False)
class Backend:
    """One array library: its namespace, devices, dtypes, and the way from and to NumPy.

    Made by `get`; every attribute and method below works on the result of that.

    Attributes
    ----------
    name : str
        The name in this registry, such as ``"torch"``.
    install : str
        The command that installs the library.

    Examples
    --------
    >>> backend = get("numpy")
    >>> backend, backend.install, "float32" in backend.dtypes()
    (<xaffine backend 'numpy'>, 'pip install numpy', True)
    """

    name: str
    install: str
    _library: str
    _namespace: str
    _halves: tuple[str, ...] = ()
    _inexact: tuple[str, ...] = ()
    _not_on: Callable[[Any], tuple[str, ...]] = lambda _: ()
    _to_numpy: Callable[[Array], Any] = np.asarray
    _from_numpy: Callable[[np.ndarray, Any], Any] = lambda array, _: np.asarray(array)
    _to_device: Callable[[Array, Any], Array] = array_api_compat.to_device
    _devices: Callable[[ModuleType], Sequence[Any]] = _standard_devices
    _why_unusable: Callable[[ModuleType], str | None] = _nothing
    _wait: Callable[[Array], Any] = _nothing
    _full_precision: Callable[[ModuleType], Any] = _nothing
    _tf32: Callable[[ModuleType], Any] = _nothing

    def __repr__(self) -> str:
        return f"<xaffine backend {self.name!r}>"

    @property
    def xp(self) -> ModuleType:
        """The array API namespace of the library: ``xp.matmul``, ``xp.float32``, ..."""
        return importlib.import_module(self._namespace)

    @property
    def version(self) -> str:
        """The version of the library."""
        return str(importlib.import_module(self._library).__version__)

    @property
    def devices(self) -> list[Any]:
        """The devices that arrays can be put on, the default one first."""
        return list(self._devices(self.xp))

    def device(self, name: Any) -> Any:
        """One of `devices`, by its text; ``"gpu"`` is the first GPU.

        Parameters
        ----------
        name : str or device
            Its text, such as ``"cuda:1"``, or the device itself.

        Returns
        -------
        device
            As the library has it.

        Raises
        ------
        ValueError
            There is no such device.

        Examples
        --------
        >>> get("numpy").device("cpu")
        'cpu'
        """
        for device in self.devices:
            if name in (device, str(device).strip("<>")) or (name == "gpu" and is_gpu(device)):
                return device
        msg = f"{self.name} has no device {name}; it has {', '.join(str(d).strip('<>') for d in self.devices)}"
        raise ValueError(msg)

    def dtypes(self, device: Any = None) -> list[str]:
        """Names of the dtypes that the layer runs on, those beside the standard (half precision) included.

        Parameters
        ----------
        device : optional
            One of `devices`; the default one if not given.

        Returns
        -------
        list of str
            Half precision first.

        Examples
        --------
        >>> get("numpy").dtypes()[-4:]
        ['uint16', 'uint32', 'uint64', 'uint8']
        """
        numeric = self.xp.__array_namespace_info__().dtypes(kind="numeric", device=device)
        missing = {"bool", *self._inexact, *self._not_on(device)}
        return [name for name in (*filter(self._has, self._halves), *sorted(numeric)) if name not in missing]

    def dtype(self, name: str) -> Any:
        """The dtype of that name, as this library has it.

        Parameters
        ----------
        name : str
            One of `dtypes`. NumPy and CuPy take their bfloat16 from ml_dtypes.

        Returns
        -------
        dtype
            Of this library.

        Examples
        --------
        >>> get("numpy").dtype("float16") == np.float16
        True
        """
        if hasattr(self.xp, name):
            return getattr(self.xp, name)
        return np.dtype(getattr(importlib.import_module("ml_dtypes"), name))

    def _has(self, half: str) -> bool:
        return hasattr(self.xp, half) or importlib.util.find_spec("ml_dtypes") is not None

    def from_numpy(self, array: np.ndarray, *, device: Any = None) -> Array:
        """An array of this library with the values and the dtype of a NumPy array.

        Parameters
        ----------
        array : numpy.ndarray
            Any shape, any of the library's dtypes. The result may share its memory.
        device : optional
            One of `devices`; the default one if not given.

        Returns
        -------
        array
            Of the same shape.

        Examples
        --------
        >>> get("numpy").from_numpy(np.ones((2, 3))).shape
        (2, 3)
        """
        return self.xp.asarray(self._from_numpy(array, device), device=device)

    def from_values(self, values: np.ndarray, dtype: str, *, device: Any = None) -> Array:
        """An array of this library with values of NumPy in a dtype, bfloat16 included, and memory of its own.

        Parameters
        ----------
        values : numpy.ndarray
            Any shape; of the kind of `dtype`.
        dtype : str
            One of `dtypes`.
        device : optional
            One of `devices`; the default one if not given.

        Returns
        -------
        array
            Of the same shape. The values are rounded on the host, the same for every library.

        Examples
        --------
        >>> get("numpy").from_values(np.asarray([1.0, 2.0]), "float16").dtype.name
        'float16'
        """
        host = values.astype("float32" if dtype == "bfloat16" else dtype)
        native = self.from_numpy(host, device=device)
        with on_device_of(native):
            return self.xp.astype(native, self.dtype(dtype)) if dtype == "bfloat16" else native

    def to_numpy(self, array: Array) -> np.ndarray:
        """A NumPy array with the values of an array of this library, from whatever device it is on.

        Parameters
        ----------
        array
            Any shape. A lazy array is computed.

        Returns
        -------
        numpy.ndarray
            Of the same shape and dtype; it may share memory with the array and be read-only. The bfloat16 of
            torch becomes float32; that of other libraries is one of ml_dtypes. A DTensor of torch is gathered, which
            all its processes must do together.

        Examples
        --------
        >>> get("numpy").to_numpy(np.ones(2)).tolist()
        [1.0, 1.0]
        """
        return np.asarray(self._to_numpy(array))

    def wait(self, array: Array) -> None:
        """Block until an array is computed: what a stopwatch needs. A lazy array is computed and dropped.

        Parameters
        ----------
        array
            Of this library.

        Examples
        --------
        >>> backend = get("numpy")
        >>> backend.wait(backend.xp.ones(2))  # NumPy has computed it already
        """
        self._wait(array)

    def use_full_precision(self) -> None:
        """Make the library compute float32 and float64 products as such, in the whole process.

        JAX by default turns float64 into float32 and may round float32 products to fewer bits on accelerators, torch
        adds halves up in half precision there; TF32 may have been allowed. A comparison with rounding bounds needs none
        of it.

        Examples
        --------
        >>> get("numpy").use_full_precision()  # NumPy does nothing else
        """
        self._full_precision(importlib.import_module(self._library))

    def use_tf32(self) -> None:
        """Let the library round the factors of float32 products to TF32, in the whole process, on GPUs that have it.

        `use_full_precision` takes it back.

        Examples
        --------
        >>> get("numpy").use_tf32()  # NumPy has no such thing
        """
        self._tf32(importlib.import_module(self._library))


def _why_cupy_is_unusable(cupy: ModuleType) -> str | None:
    try:
        return None if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:  # no driver, or one that is older than this CUDA
        return f"no CUDA device ({error})"


def _whole(array: Array) -> Array:
    """An array; of a DTensor of torch, of which each process has a part, all of it in each."""
    return array.full_tensor() if hasattr(array, "full_tensor") else array


def _torch_to_numpy(tensor: Any) -> Any:
    tensor = _whole(tensor).detach().cpu().resolve_conj().resolve_neg()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def _compute_torch_in_full(torch: ModuleType) -> None:
    torch.set_float32_matmul_precision("highest")
    for half in ("fp16", "bf16"):
        setattr(torch.backends.cuda.matmul, f"allow_{half}_reduced_precision_reduction", False)


def _not_on_cuda(device: Any) -> tuple[str, ...]:
    """What CuPy lacks on a device, the current one by default: before compute capability 8.0 cuBLAS has no bfloat16."""
    device = importlib.import_module("cupy").cuda.Device() if device is None else device
    return ("bfloat16",) if int(device.compute_capability) < 80 else ()


def _to_cuda_device(array: Array, device: Any) -> Array:
    """A copy on another device: CuPy copies no memory with gaps from one device to another."""
    with on_device_of(array):
        dense = importlib.import_module("cupy").ascontiguousarray(array)
    return array_api_compat.to_device(dense, device)


def _compute_cupy_in(cupy: ModuleType, name: str) -> None:
    linalg = importlib.import_module("cupy._core._routines_linalg")
    linalg.set_compute_type(cupy.float32, getattr(linalg, name))


_REGISTRY = {
    backend.name: backend
    for backend in (
        Backend(
            "numpy",
            install="pip install numpy",
            _library="numpy",
            _namespace="array_api_compat.numpy",
            _halves=("bfloat16", "float16"),
        ),
        Backend(
            "cupy",
            install='pip install "xaffine[cuda13]" (or "xaffine[cuda12]", after the CUDA that your driver offers)',
            _library="cupy",
            _namespace="array_api_compat.cupy",
            _halves=("bfloat16", "float16"),
            _not_on=_not_on_cuda,
            _to_numpy=lambda array: array.get(),
            _to_device=_to_cuda_device,
            _why_unusable=_why_cupy_is_unusable,
            _wait=lambda array: array.device.synchronize(),
            _full_precision=lambda cupy: _compute_cupy_in(cupy, "COMPUTE_TYPE_DEFAULT"),
            _tf32=lambda cupy: _compute_cupy_in(cupy, "COMPUTE_TYPE_TF32"),
        ),
        Backend(
            "torch",
            install='pip install "xaffine[torch]"',
            _library="torch",
            _namespace="array_api_compat.torch",
            _halves=("bfloat16", "float16"),
            # There torch has no products of integers.
            _not_on=lambda device: ("int8", "int16", "int32", "int64", "uint8") if is_gpu(device) else (),
            _to_numpy=_torch_to_numpy,
            # torch refuses negative strides and warns of read-only memory: hand it a plain copy.
            _from_numpy=lambda array, _: np.array(array, order="C"),
            _devices=lambda xp: [
                xp.device("cpu"), *(xp.device("cuda", i) for i in range(xp.cuda.device_count()))
            ],
            _wait=lambda tensor: tensor.is_cuda and importlib.import_module("torch").cuda.synchronize(tensor.device),
            _full_precision=_compute_torch_in_full,
            _tf32=lambda torch: torch.set_float32_matmul_precision("high"),
        ),
        Backend(
            "jax",
            install='pip install "xaffine[jax]"',
            _library="jax",
            _namespace="jax.numpy",
            _halves=("bfloat16", "float16"),
            # jax.numpy.asarray compiles a program for each shape. What device_put takes may become the array: a copy.
            _from_numpy=lambda array, device: importlib.import_module("jax").device_put(
                np.array(array, order="C"), device
            ),
            _wait=lambda array: array.block_until_ready(),
            _full_precision=lambda jax: [
                jax.config.update("jax_enable_x64", True),
                jax.config.update("jax_default_matmul_precision", "float32"),
            ],
            _tf32=lambda jax: jax.config.update("jax_default_matmul_precision", "tensorfloat32"),
        ),
        Backend(
            "dask",
            install='pip install "xaffine[dask]"',
            _library="dask",
            _namespace="array_api_compat.dask.array",
            _halves=("float16",),
            _to_numpy=lambda array: array.compute(),
            _wait=lambda array: array.compute(),
            # Automatic chunks divide by zero on some empty shapes (dask 2026.8).
            _from_numpy=lambda array, _: importlib.import_module("dask.array").from_array(
                array, chunks="auto" if array.size else -1
            ),
        ),
        Backend(
            "array-api-strict",
            install="pip install array-api-strict",
            _library="array_api_strict",
            _namespace="array_api_strict",
            _to_numpy=lambda array: array.to_device(array.__array_namespace__().Device("CPU_DEVICE")),
        ),
        Backend(
            "ndonnx",
            install="pip install ndonnx onnxruntime",
            _library="ndonnx",
            _namespace="ndonnx",
            _halves=("float16",),
            _inexact=("uint64",),  # summed by way of float64
            _to_numpy=lambda array: array.unwrap_numpy(),
        ),
        Backend(
            "sparse",
            install="pip install sparse",
            _library="sparse",
            _namespace="sparse",
            _to_numpy=lambda array: array.todense(),
        ),
    )
}  # fmt: skip


def names() -> tuple[str, ...]:
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
    return tuple(_REGISTRY)


def installed() -> tuple[str, ...]:
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
    return tuple(name for name, b in _REGISTRY.items() if importlib.util.find_spec(b._library))


def get(name: str) -> Backend:
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
        The registry has no such name.
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
    backend = _REGISTRY.get(name)
    if backend is None:
        msg = f"no backend is called {name!r}; the backends are {', '.join(_REGISTRY)}"
        raise ValueError(msg)
    if importlib.util.find_spec(backend._library) is None:
        msg = f"the backend {name!r} is not installed; to get it: {backend.install}"
        raise ModuleNotFoundError(msg, name=backend._library)
    try:
        library = importlib.import_module(backend._library)
        importlib.import_module(backend._namespace)
    except ImportError as error:
        msg = f"the backend {name!r} is installed and cannot be imported ({error}); to renew it: {backend.install}"
        raise ImportError(msg, name=backend._library) from error
    if missing := backend._why_unusable(library):
        msg = (
            f"the backend {name!r} is installed ({backend.version}) and finds {missing}: it needs an NVIDIA GPU "
            f"and a driver as new as its CUDA (`nvidia-smi` lists both); for an older driver {backend.install}; "
            f"without a GPU, use xaffine.backends.get('numpy')"
        )
        raise RuntimeError(msg)
    return backend


# By type and dtype, since finding one out takes microseconds. The type alone would not do: the tangents that JAX
# gives integers are NumPy arrays by type, of a dtype of JAX's own.
_NAMESPACES: dict[tuple[type, Any], ModuleType] = {}


def namespace_of(array: Array) -> ModuleType:
    """The array API namespace that an array belongs to.

    Parameters
    ----------
    array
        Of any library that conforms to the standard.

    Returns
    -------
    module
        That of array-api-compat, where it has one for the library.

    Raises
    ------
    TypeError
        It is no array of the standard: a list, a Python number, a NumPy scalar, a masked array, a matrix.

    Examples
    --------
    >>> namespace_of(np.ones(2)).__name__
    'array_api_compat.numpy'
    """
    key = (type(array), getattr(array, "dtype", None))
    xp = _NAMESPACES.get(key)
    if xp is None:
        if isinstance(array, (np.generic, np.matrix, np.ma.MaskedArray)):  # a tuple: Dynamo traces no union
            msg = f"{type(array).__name__} does not follow the array API standard"
            raise TypeError(msg)
        xp = _NAMESPACES[key] = array_api_compat.array_namespace(array)
    return xp


def backend_of(array: Array) -> Backend:
    """The backend that an array belongs to.

    Parameters
    ----------
    array
        Of any library.

    Returns
    -------
    Backend
        One of the registry.

    Raises
    ------
    TypeError
        It is no array, or one of a library that the registry does not have.

    Examples
    --------
    >>> backend_of(np.ones(2))
    <xaffine backend 'numpy'>
    """
    xp = namespace_of(array)
    for backend in _REGISTRY.values():
        if backend._namespace == xp.__name__:
            return backend
    msg = f"no backend has arrays of {library_of(xp)}; the backends are {', '.join(_REGISTRY)}"
    raise TypeError(msg)


def dtype_name(dtype: Any) -> str:
    """The name of a dtype of any library.

    Parameters
    ----------
    dtype
        Of any library.

    Returns
    -------
    str
        As the standard spells it.

    Examples
    --------
    >>> dtype_name(np.dtype("float32"))
    'float32'
    """
    # NumPy's text for a foreign byte order is another.
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).rpartition(".")[2].lower()


def _kind(dtype: str) -> str:
    """Complex, integer or real floating, by the name of a dtype."""
    return "complex" if dtype.startswith("complex") else "integer" if "int" in dtype else "floating"


def move(array: Array, backend: Backend, *, device: Any = None, dtype: str | None = None) -> Array:
    """Bring an array to a library, a device and a dtype: by DLPack where both libraries have it, else by the host.

    Parameters
    ----------
    array
        Of any backend; a lazy one is computed.
    backend : Backend
        Where to.
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
        The backend has no such dtype there.

    Examples
    --------
    >>> x = np.ones(2)
    >>> move(x, get("numpy")) is x, move(x, get("numpy"), dtype="float32").dtype.name
    (True, 'float32')
    """
    source = backend_of(array)
    name = own = dtype_name(array.dtype)
    if dtype is not None:
        name = dtype
        if _kind(name) != _kind(own):
            msg = f"{own} and {name} are dtypes of two kinds: stay among those of {_kind(own)} numbers"
            raise TypeError(msg)
    here = device_of(array)  # which of a DTensor of torch is a mesh
    place = here if device is None and source is backend and here in backend.devices else device
    if name not in backend.dtypes(place):
        msg = f"{backend.name} has no dtype {name!r}{'' if place is None else f' on {place}'}; it has "
        raise ValueError(msg + ", ".join(backend.dtypes(place)))
    if source is not backend:
        array = _carried(_whole(array), source, backend, name, device)
    if device is not None and device_of(array) != device:
        array = backend._to_device(array, device)
    with on_device_of(array):
        return array if dtype_name(array.dtype) == name else backend.xp.astype(array, backend.dtype(name))


def _carried(array: Array, source: Backend, backend: Backend, dtype: str, device: Any) -> Array:
    """A copy of an array in another library, on whatever device; by way of the host on that device in that dtype."""
    try:
        shared = backend.xp.from_dlpack(array)
        with on_device_of(shared):
            return backend.xp.asarray(shared, copy=True)
    except Exception:  # one of them has no DLPack, or none for this dtype, device, or read-only memory
        return backend.from_values(np.array(source.to_numpy(array)), dtype, device=device)


def library_of(xp: ModuleType) -> str:
    """The name of a namespace, as users import it.

    Parameters
    ----------
    xp : module
        As from `namespace_of`.

    Returns
    -------
    str
        Without array-api-compat before it.

    Examples
    --------
    >>> library_of(get("numpy").xp)
    'numpy'
    """
    return xp.__name__.removeprefix("array_api_compat.")


def is_of_kind(xp: ModuleType, dtype: Any, kind: str) -> bool:
    """Whether a dtype of a namespace is of a kind of the standard; bfloat16 is "real floating" everywhere.

    Parameters
    ----------
    xp : module
        As from `namespace_of`.
    dtype
        Of that library.
    kind : str
        As the function ``isdtype`` of the standard has it.

    Returns
    -------
    bool
        False for a dtype beside the standard other than bfloat16.

    Examples
    --------
    >>> is_of_kind(np, np.dtype("int8"), "integral"), is_of_kind(np, np.dtype("int8"), "real floating")
    (True, False)
    """
    try:
        return bool(xp.isdtype(dtype, kind))
    except TypeError:  # NumPy's and CuPy's know the dtypes of NumPy alone
        return kind == "real floating" and is_half(dtype)


def is_gpu(device: Any) -> bool:
    """Whether a device of a backend is a GPU, by its text.

    Parameters
    ----------
    device
        Of any library, or its text.

    Returns
    -------
    bool
        Whether "cuda" or "gpu" is in it.

    Examples
    --------
    >>> is_gpu("cuda:0"), is_gpu("cpu")
    (True, False)
    """
    return any(word in str(device).lower() for word in ("cuda", "gpu"))


def is_half(dtype: Any) -> bool:
    """Whether a dtype is float16 or bfloat16, by its name.

    Parameters
    ----------
    dtype
        Of any library.

    Returns
    -------
    bool
        Whether it is one of the two.

    Examples
    --------
    >>> is_half(np.dtype("float16")), is_half(np.dtype("float32"))
    (True, False)
    """
    return str(dtype).lower().endswith("float16")


def device_of(array: Array) -> Any:
    """The device that an array is bound to, or None where nothing binds it to one.

    Parameters
    ----------
    array
        Of any library.

    Returns
    -------
    device or None
        As the library has it.

    Notes
    -----
    JAX moves uncommitted arrays at will, traced arrays have no device yet, and an array sharded over several
    devices has a sharding in place of one: whether those go together, JAX knows and checks itself. A DTensor of torch
    has its mesh in place of one.

    Examples
    --------
    >>> device_of(np.ones(2))
    'cpu'
    """
    if array_api_compat.is_cupy_array(array) or array_api_compat.is_torch_array(array):
        # At once, since a call asks a dozen times.
        return getattr(array, "device_mesh", None) or array.device
    device = array_api_compat.device(array)
    if device is None or hasattr(device, "device_set") or not getattr(array, "committed", True):
        return None
    return device


def on_device_of(array: Array) -> AbstractContextManager[Any]:
    """What to enter before making arrays that belong beside an array, so that they are on its device.

    CuPy makes arrays on the current device, which need not be that of its operands.

    Parameters
    ----------
    array
        Of any library.

    Returns
    -------
    context manager
        The device of a CuPy array; for other arrays one that does nothing.

    Examples
    --------
    >>> x = np.ones(2)
    >>> with on_device_of(x):  # of a CuPy array, its device
    ...     ones = np.ones_like(x)
    """
    return array.device if array_api_compat.is_cupy_array(array) else nullcontext()


def computing_with(array: Array) -> AbstractContextManager[Any]:
    """What to enter before computing with an array, so that results are on its device and in its dtype.

    ``torch.autocast`` makes torch round the factors of products to half precision.

    Parameters
    ----------
    array
        Of any library.

    Returns
    -------
    context manager
        As `on_device_of`; for a torch tensor one that suspends autocast.

    Examples
    --------
    >>> with computing_with(np.ones(2)):
    ...     y = np.ones(2) + 1
    """
    if array_api_compat.is_torch_array(array) and (kind := array.device.type) != "meta":  # which autocast rejects
        torch = sys.modules["torch"]  # as Dynamo can trace it
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    return on_device_of(array)


def share_memory(a: Array, b: Array) -> bool:
    """Whether what is written to one array shows in the other; False where a library hides its memory.

    Parameters
    ----------
    a, b
        Arrays of any library.

    Returns
    -------
    bool
        As `overlap` of their `memory_of`.

    Examples
    --------
    >>> x = np.zeros((4, 6))
    >>> share_memory(x[:, ::2], x[2:]), share_memory(x[:, ::2], x[:, 1::2])
    (True, False)
    """
    return overlap(memory_of(a), memory_of(b))


def overlap(first: Any, second: Any, *, same: bool = False) -> bool:
    """Whether two of `memory_of` have an address in common; with `same`, whether elements of one have.

    Parameters
    ----------
    first, second
        As from `memory_of`.
    same : bool
        Whether to ask about elements of the first alone.

    Returns
    -------
    bool
        False where a library hides its memory, unless both are one array.

    Examples
    --------
    >>> x = np.zeros(6)
    >>> overlap(x[::2], x[1::2]), overlap(x[::2], x[2:])
    (False, True)
    """
    if isinstance(first, _Memory) and isinstance(second, _Memory):
        if same:
            return not first.contiguous and _overlaps_itself(first)
        if first.high <= second.low or second.high <= first.low:
            return False
    elif not isinstance(first, np.ndarray) or not isinstance(second, np.ndarray):
        return first is second and not same
    return _overlaps_itself(first) if same else np.shares_memory(np.asarray(first), np.asarray(second))


def are_apart(memories: Collection[Any]) -> bool:
    """Whether a glance at some of `memory_of` shows that no two have an address in common, nor elements of one.

    Parameters
    ----------
    memories
        As from `memory_of`.

    Returns
    -------
    bool
        True if they are blocks without gaps that lie one after the other. False if it takes `overlap` to tell.

    Examples
    --------
    >>> x = np.zeros(6)
    >>> are_apart([x[:3], x[3:]])  # of NumPy no addresses are known
    False
    """
    blocks = sorted((m.low, m.high) for m in memories if isinstance(m, _Memory) and m.contiguous)
    return len(blocks) == len(memories) and all(high <= low for (_, high), (low, _) in pairwise(blocks))


def _overlaps_itself(memory: np.ndarray | _Memory) -> bool:
    if 0 in memory.shape:
        return False
    span = memory.itemsize
    for stride, extent in sorted((abs(s), e) for s, e in zip(memory.strides, memory.shape, strict=True) if e > 1):
        if stride < span:
            return True
        span += stride * (extent - 1)
    return False


def is_recorded(array: Array) -> bool:
    """Whether torch follows what is done with a tensor: autograd, or a transform of ``torch.func``.

    Parameters
    ----------
    array
        Of any library.

    Returns
    -------
    bool
        False for arrays of other libraries.

    Examples
    --------
    >>> is_recorded(np.ones(2))
    False
    """
    if not array_api_compat.is_torch_array(array):
        return False
    torch = sys.modules["torch"]  # as Dynamo can trace it
    return (array.requires_grad and torch.is_grad_enabled()) or _is_wrapped(array)


def detached(array: Array) -> Array:
    """The array, without what autograd of torch recorded of it: in the same memory, and holding no operand alive.

    Parameters
    ----------
    array
        Of any library, or None.

    Returns
    -------
    array
        The same one, unless it is a tensor that requires a gradient.

    Examples
    --------
    >>> x = np.ones(2)
    >>> detached(x) is x
    True
    """
    return array.detach() if array_api_compat.is_torch_array(array) and array.requires_grad else array


def is_copyable(array: Array) -> bool:
    """Whether ``copy.deepcopy`` takes an array: not what autograd of torch computed, nor an array of ndonnx.

    Parameters
    ----------
    array
        Of any library, or anything else.

    Returns
    -------
    bool
        If not, ``pickle`` copies it; torch then keeps the values, and that a gradient is required.

    Examples
    --------
    >>> is_copyable(np.ones(2))
    True
    """
    if array_api_compat.is_torch_array(array):
        return bool(array.is_leaf)
    return not array_api_compat.is_ndonnx_array(array)


def _is_wrapped(tensor: Any) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # within vmap, grad or jvp it has no memory of its own
        return True
    return False


def memory_of(array: Array) -> Any:
    """The addresses of an array of CuPy or torch; the array itself for other libraries.

    Parameters
    ----------
    array
        Of any library.

    Returns
    -------
    addresses or array
        For `overlap` alone: the memory may be that of a GPU.

    Examples
    --------
    >>> x = np.ones(2)
    >>> memory_of(x) is x
    True
    """
    if array_api_compat.is_cupy_array(array):
        return _Memory(array, array.data.ptr, contiguous=array.flags.c_contiguous)
    if hasattr(array, "to_local"):  # a DTensor of torch lies where the part of this process does
        array = array.to_local()
    if array_api_compat.is_torch_array(array) and array.device.type != "meta":
        return _Memory(array, array.data_ptr(), contiguous=array.is_contiguous())
    return array


class _Memory:
    """Where an array lies: none of its elements below the address `low`, all of them below `high`."""

    def __init__(self, array: Array, address: int, *, contiguous: bool) -> None:
        self.address, self.contiguous, self.array = address, contiguous, array
        self.low, self.high = address, address + array.nbytes
        if not contiguous and 0 not in array.shape:
            reaches = [(extent - 1) * stride for extent, stride in zip(self.shape, self.strides, strict=True)]
            self.low += sum(reach for reach in reaches if reach < 0)
            self.high = address + sum(reach for reach in reaches if reach > 0) + self.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        """The extents."""
        return tuple(self.array.shape)

    @property
    def itemsize(self) -> int:
        """The bytes of an element."""
        return int(self.array.itemsize)

    @property
    def strides(self) -> tuple[int, ...]:
        """The bytes from an element to the next one, along each axis."""
        if array_api_compat.is_torch_array(self.array):
            return tuple(step * self.itemsize for step in self.array.stride())
        return tuple(self.array.strides)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What NumPy makes an array of that lies there, never to be read: the memory may be that of a GPU."""
        return {
            "version": 3, "data": (self.address, False), "shape": self.shape, "strides": self.strides,
            "typestr": f"|V{self.itemsize}",
        }  # fmt: skip
