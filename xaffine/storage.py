"""Weights in files of the safetensors format: tensors ``W`` and ``b``, and nothing that runs when it is read.

A file is readable by the safetensors library alone. Its metadata name the format and its version, and hold a SHA-256 of
all that is in it, so that no other weights than those that were saved are ever loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine.backends import Array, Backend, backend_of, dtype_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

__all__ = ["read", "read_linear", "write"]

_FORMAT, _VERSION = "xaffine", "1"
# The names of the format, and NumPy's for the same bits.
_DTYPES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64", "I8": "int8",
    "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip


def write(path: str | os.PathLike[str], W: Array, b: Array | None, n_batch_axes: int | None) -> None:
    """Write W and b to a file, in one step: whatever happens, it is the old one or the new one, whole.

    Parameters
    ----------
    path : path-like
        The folder must exist.
    W : array, shape (n, m)
    b : array, shape (m,), or None
    n_batch_axes : int or None
        Kept in the metadata.

    Raises
    ------
    ImportError
        The extra ``io`` is not installed.
    OSError
        The file cannot be written; one that was there is as it was.
    TypeError
        The format has no such dtype.
    """
    safetensors = _library()
    path = Path(path)
    values = {name: _host(name, array) for name, array in (("W", W), ("b", b)) if array is not None}
    axes = str(n_batch_axes)
    metadata = {"format": _FORMAT, "version": _VERSION, "n_batch_axes": axes, "sha256": _digest(values, axes)}
    specs = {
        name: safetensors.TensorSpec(
            dtype=dtype, shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes
        )
        for name, (dtype, bits) in values.items()
    }  # fmt: skip
    data = safetensors.serialize(specs, metadata=metadata)
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with new.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name of a file last, where the operating system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems do not sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: str | os.PathLike[str], backend: Backend, device: Any = None) -> tuple[Array, Array | None, int | None]:
    """Read what `write` wrote.

    Parameters
    ----------
    path : path-like
    backend : Backend
        Whose arrays to make.
    device : optional
        One of its devices.

    Returns
    -------
    W, b, n_batch_axes

    Raises
    ------
    ImportError
        The extra ``io`` is not installed.
    OSError
        The file cannot be read.
    ValueError
        It is not what was saved: truncated, changed, another format or version.
    """
    tensors, metadata = _parse(path)
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        msg = (
            f"{path} was not saved by AffineLayer.save in format version {_VERSION}: its metadata are "
            f"{_short(metadata)}. For a checkpoint with weight (m, n) and bias use AffineLayer.load_linear"
        )
        raise ValueError(msg)
    if not {"W"} <= set(tensors) <= {"W", "b"}:
        msg = f"{path} must hold W, and b or not; it holds {_short(sorted(tensors))}. Save the layer again"
        raise ValueError(msg)
    axes = metadata.get("n_batch_axes", "")
    if metadata.get("sha256") != _digest(tensors, axes):
        msg = f"{path} was changed after it was saved: its SHA-256 is another. Restore it from a copy"
        raise ValueError(msg)
    arrays = {name: _native(path, name, value, backend, device) for name, value in sorted(tensors.items())}
    return arrays["W"], arrays.get("b"), None if axes == "None" else int(axes)


def read_linear(
    path: str | os.PathLike[str], prefix: str, backend: Backend, device: Any = None
) -> tuple[Array, Array | None]:
    """Read ``weight`` (m, n) and, if there is one, ``bias`` (m,) from a checkpoint; return W (n, m) and b.

    Parameters
    ----------
    path : path-like
        A safetensors file of any library.
    prefix : str
        What stands before ``weight`` and ``bias`` in their names, such as ``"encoder.fc1."``.
    backend, device
        As in `read`.

    Raises
    ------
    ImportError, OSError
        As `read`.
    ValueError
        It is no safetensors file, or has no such tensors.
    """
    tensors, _ = _parse(path)
    weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
    if weight is None:
        known = sorted(name.removesuffix("weight") for name in tensors if name.endswith("weight"))
        msg = f"{path} has no {prefix}weight; the prefixes of a weight in it are {_short(known)}"
        raise ValueError(msg)
    shape, others = weight[1].shape, [] if bias is None else [bias[1].shape]
    if len(shape) != 2 or any(other != shape[:1] for other in others):
        came = " and ".join(map(str, [shape, *others]))
        msg = f"{path}: {prefix}weight must have the shape (m, n) and {prefix}bias (m,); they have {came}"
        raise ValueError(msg)
    W = (weight[0], np.ascontiguousarray(weight[1].T))
    return (
        _native(path, f"{prefix}weight", W, backend, device),
        None if bias is None else _native(path, f"{prefix}bias", bias, backend, device),
    )


def _library() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        msg = 'layers are saved with safetensors; to get it: pip install "xaffine[io]"'
        raise ModuleNotFoundError(msg, name="safetensors") from error
    return safetensors


def _host(name: str, array: Array) -> tuple[str, np.ndarray]:
    """The dtype of an array, and its bits as contiguous, little-endian NumPy."""
    dtype, values = dtype_name(array.dtype), backend_of(array).to_numpy(array)
    if dtype not in _DTYPES.values():
        msg = f"the safetensors format has no {dtype}, the dtype of {name}. Cast first: layer.to(..., dtype=...)"
        raise TypeError(msg)
    if dtype == "bfloat16":
        if values.dtype == np.float32:  # as torch's come: the same values, with zeros behind
            values = np.ascontiguousarray(values).view(np.uint32) >> 16
        else:
            values = np.ascontiguousarray(values).view(np.uint16)
        return dtype, values.astype("<u2", order="C")
    return dtype, values.astype(np.dtype(dtype).newbyteorder("<"), order="C")


def _digest(values: Mapping[str, tuple[str, np.ndarray]], axes: str) -> str:
    """The SHA-256 of names, dtypes, shapes and bits."""
    digest = hashlib.sha256(f"{_FORMAT} {_VERSION} n_batch_axes={axes}\n".encode())
    for name, (dtype, bits) in sorted(values.items()):
        digest.update(f"{name} {dtype} {bits.shape}\n".encode())
        digest.update(bits.data if bits.size else b"")
    return digest.hexdigest()


def _parse(path: str | os.PathLike[str]) -> tuple[dict[str, tuple[str, np.ndarray]], dict[str, Any]]:
    """The tensors of a file, each as its dtype and bits, and the metadata."""
    safetensors = _library()
    data = Path(path).read_bytes()
    try:
        found = safetensors.deserialize(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, RecursionError, MemoryError) as error:
        msg = f"{path} is no safetensors file, or a damaged one: {error}. Nothing was loaded"
        raise ValueError(msg) from error
    tensors = {}
    for name, facts in found:
        dtype = _DTYPES.get(facts["dtype"])
        if dtype is None:
            continue  # neither of ours nor of a layer
        bits = np.frombuffer(facts["data"], "<u2" if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<"))
        tensors[name] = (dtype, bits.reshape(facts["shape"]))
    return tensors, metadata


def _native(
    path: str | os.PathLike[str], name: str, value: tuple[str, np.ndarray], backend: Backend, device: Any
) -> Array:
    dtype, bits = value
    if dtype not in backend.dtypes(device):
        msg = f"{path} holds {name} in {dtype}, which {backend.name} does not have; load it elsewhere and cast it there"
        raise ValueError(msg)
    values = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits
    return backend.from_values(values, dtype, device=device)


def _short(thing: Any) -> str:
    text = repr(thing)
    return text if len(text) <= 200 else f"{text[:200]}…"
