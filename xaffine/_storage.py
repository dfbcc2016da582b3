"""Weights in files of the safetensors format: tensors ``W`` and ``b``, and nothing that runs when it is read.

A file is readable by the safetensors library alone. Its metadata name the format and its version, and hold a SHA-256 of
all that is in it, so that no other weights than those that were saved are ever loaded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from xaffine._checks import check_parameters
from xaffine.backends import Array, Backend, backend_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from io import BufferedWriter
    from types import ModuleType

__all__ = ["read", "read_linear", "replacing", "write"]

FilePath: TypeAlias = "str | os.PathLike[str]"

Bits: TypeAlias = tuple[str, np.ndarray]
"""A dtype, and a tensor in it as contiguous, little-endian NumPy, which holds bfloat16 as integers of the same bits."""

_FORMAT, _VERSION = "xaffine", "1"
# The format's names of the dtypes that a layer can have, and NumPy's for the same bits.
_DTYPES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64", "I8": "int8",
    "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip


def write(path: FilePath, W: Array, b: Array | None, n_batch_axes: int | None) -> None:
    """Write W and b to a file, in one step: whatever happens, it is the old one or the new one, whole.

    Parameters
    ----------
    path : path-like
        The folder must exist. A symbolic link is followed.
    W : array, shape (n, m)
    b : array, shape (m,), or None
    n_batch_axes : int or None
        Kept in the metadata.

    Raises
    ------
    ImportError
        The extra ``io`` is not installed.
    OSError
        The file cannot be written, or the path is that of a folder, a device or a pipe; one that was there is as it
        was.
    TypeError
        The format has no such dtype.
    """
    safetensors = _library()
    values = {name: _host(name, array) for name, array in (("W", W), ("b", b)) if array is not None}
    with replacing(path) as file:
        file.write(_header(values, str(n_batch_axes)))
        for _, bits in values.values():
            file.write(bits.data if bits.size else b"")
        file.flush()
        with safetensors.safe_open(file.name, framework="np"):
            pass  # no file takes the place of another before the library has found it whole


@contextlib.contextmanager
def replacing(path: FilePath) -> Iterator[BufferedWriter]:
    """Open a new file that takes the place of the one at a path, and its mode, once all of it is on disk.

    Parameters
    ----------
    path : path-like
        As in `write`, with the same errors; where an error is raised within, the old file is as it was.
    """
    path = Path(path)
    old = None
    with contextlib.suppress(FileNotFoundError):  # that of a link to nothing as well, whose target is made
        old = path.stat()
        _check_regular(path, old)
    mode = 0o666 if old is None else 0o600
    target = Path(os.path.realpath(path))
    new = target.with_name(f".xaffine-{secrets.token_hex(8)}")  # short: the target's name may have all 255 bytes
    file = open(new, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115 - closed below
    try:
        with file:
            yield file
            file.flush()
            if old is not None:
                _keep_rights(target, old, new)
            os.fsync(file.fileno())
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _header(values: Mapping[str, Bits], axes: str) -> bytes:
    """What the format puts before the bits of the tensors: its length, then JSON, padded to a multiple of 8 bytes."""
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    metadata = {"format": _FORMAT, "version": _VERSION, "n_batch_axes": axes, "sha256": _digest(values, axes)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, bits) in values.items():
        start, end = end, end + bits.nbytes
        header[name] = {"dtype": codes[dtype], "shape": bits.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_regular(path: Path, facts: os.stat_result) -> None:
    """Refuse what has no bytes of its own to be replaced, or to be read in any order."""
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "This is kept in a regular file, not in a device, a pipe or a socket", str(path))


def _keep_rights(old: Path, facts: os.stat_result, new: Path) -> None:
    """Give a new file, which nobody else may read yet, the owner, mode and attributes of the one it will replace."""
    for owner, group in ((-1, facts.st_gid), (facts.st_uid, -1)):
        with contextlib.suppress(OSError, AttributeError):  # where we may not, and where there is no such thing
            os.chown(new, owner, group)
    if new.stat().st_gid == facts.st_gid:
        shutil.copystat(old, new)
        os.utime(new)  # but not the time
    else:  # what the old group was allowed, this one was not
        new.chmod(stat.S_IMODE(facts.st_mode) & 0o707)


def _sync_folder(folder: Path) -> None:
    """Make the new name of a file last, where the operating system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems do not sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: FilePath, backend: Backend, device: Any = None) -> tuple[Array, Array | None, int | None]:
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
    with _opened(path) as (found, metadata, read_bits):
        _check_saved(path, found, metadata)
        values = {name: read_bits(name) for name in found}
    axes = metadata.get("n_batch_axes", "")
    if metadata.get("sha256") != _digest(values, axes):
        msg = f"{path} was changed after it was saved: its SHA-256 is another. Restore it from a copy"
        raise ValueError(msg)
    arrays = {name: _native(path, name, value, backend, device) for name, value in sorted(values.items())}
    W, b = _together(path, arrays["W"], arrays.get("b"))
    return W, b, None if axes == "None" else int(axes)


def _check_saved(path: FilePath, found: dict[str, Any], metadata: dict[str, str]) -> None:
    """Refuse a file that `write` did not write."""
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        msg = (
            f"{path} was not saved by AffineLayer.save in format version {_VERSION}: its metadata are "
            f"{_short(repr(metadata))}. For a checkpoint with weight (m, n) and bias use AffineLayer.load_linear"
        )
        raise ValueError(msg)
    if not {"W"} <= found.keys() <= {"W", "b"}:
        msg = f"{path} must hold W, and b or not; it holds {_short(repr(sorted(found)))}. Save the layer again"
        raise ValueError(msg)
    _check_dtypes(path, found)


def read_linear(path: FilePath, prefix: str, backend: Backend, device: Any = None) -> tuple[Array, Array | None]:
    """Read ``weight`` (m, n) and, if there is one, ``bias`` (m,) from a checkpoint; return W (n, m) and b.

    No more of the file is read than its header and these two.

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
        It is no safetensors file, or has no such tensors, or others whose names begin with the prefix.
    """
    weight, bias = f"{prefix}weight", f"{prefix}bias"
    with _opened(path) as (found, _, read_bits):
        under = {name: facts for name, facts in found.items() if name.startswith(prefix)}
        if weight not in under:
            known = sorted(name.removesuffix("weight") for name in found if name.endswith("weight"))
            others = f". Under this prefix it holds {_describe(under)}" if under else ""
            msg = f"{path} has no {weight}; the prefixes of a weight in it are {_short(repr(known))}{others}"
            raise ValueError(msg)
        if unused := {name: facts for name, facts in under.items() if name not in (weight, bias)}:
            msg = (
                f"{path} holds more under the prefix {prefix!r} than a weight and a bias: {_describe(unused)}. A layer "
                f"without them may compute something else: merge scales, adapters and the like into the weight first, "
                f"or leave them out of the checkpoint"
            )
            raise ValueError(msg)
        _check_dtypes(path, under)
        shapes = [tuple(under[name]["shape"]) for name in (weight, bias) if name in under]
        if len(shapes[0]) != 2 or any(shape != shapes[0][:1] for shape in shapes[1:]):
            came = " and ".join(map(str, shapes))
            msg = f"{path}: {weight} must have the shape (m, n) and {bias} (m,); they have {came}"
            raise ValueError(msg)
        dtype, bits = read_bits(weight)
        W = _native(path, weight, (dtype, np.ascontiguousarray(bits.T)), backend, device)
        b = _native(path, bias, read_bits(bias), backend, device) if bias in under else None
    return _together(path, W, b)


def _library() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        msg = "layers are saved with safetensors; to get it: pip install safetensors"
        raise ModuleNotFoundError(msg, name="safetensors") from error
    return safetensors


def _host(name: str, array: Array) -> Bits:
    """The bits of an array: not copied, if they are contiguous and little-endian already."""
    backend = backend_of(array)
    dtype, values = backend.dtype_name(array.dtype), backend.to_numpy(array)
    if dtype not in _DTYPES.values():
        msg = f"the safetensors format has no {dtype}, the dtype of {name}. Cast first: layer.to(..., dtype=...)"
        raise TypeError(msg)
    if dtype == "bfloat16":
        if values.dtype == np.float32:  # torch's become float32: the upper half of each is the bfloat16
            halves = np.asarray(values, "<f4", order="C").reshape(*values.shape, 1).view("<u2")
            return dtype, np.ascontiguousarray(halves[..., 1])
        values = np.asarray(values, order="C").view(np.uint16)
    return dtype, np.asarray(values, _bits_dtype(dtype), order="C")


def _bits_dtype(dtype: str) -> np.dtype:
    """The dtype of NumPy for the bits of a tensor in a file; those of a bfloat16 are an integer's."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")


def _digest(values: Mapping[str, Bits], axes: str) -> str:
    """The SHA-256 of names, dtypes, shapes and bits."""
    digest = hashlib.sha256(f"{_FORMAT} {_VERSION} n_batch_axes={axes}\n".encode())
    for name, (dtype, bits) in sorted(values.items()):
        digest.update(f"{name} {dtype} {bits.shape}\n".encode())
        digest.update(bits.data if bits.size else b"")
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: FilePath) -> Iterator[tuple[dict[str, Any], dict[str, str], Callable[[str], Bits]]]:
    """Open a file: what its header says of each tensor, the metadata, and a function that reads one tensor's bits.

    The library checks the header and reads no tensor itself, since its arrays of NumPy have no dtypes beside NumPy's.
    """
    safetensors = _library()
    path = Path(path)
    _check_regular(path, path.stat())
    with path.open("rb") as file:
        try:
            with safetensors.safe_open(path, framework="np"):
                length = int.from_bytes(file.read(8), "little")
                found = json.loads(file.read(length))
        except (safetensors.SafetensorError, ValueError, RecursionError, MemoryError) as error:
            msg = f"{path} is no safetensors file, or a damaged one: {error}. Nothing was loaded"
            raise ValueError(msg) from error
        metadata = found.pop("__metadata__", None) or {}

        def read_bits(name: str) -> Bits:
            facts = found[name]
            dtype = _DTYPES[facts["dtype"]]
            bits = np.empty(facts["shape"], _bits_dtype(dtype))
            file.seek(8 + length + facts["data_offsets"][0])
            if bits.size and file.readinto(bits.data) != bits.nbytes:
                msg = f"{path} ends within {name}: it was cut while it was read. Nothing was loaded"
                raise ValueError(msg)
            return dtype, bits

        yield found, metadata, read_bits


def _check_dtypes(path: FilePath, found: dict[str, Any]) -> None:
    """Refuse tensors in dtypes that no layer has."""
    if strange := {name: facts for name, facts in found.items() if facts["dtype"] not in _DTYPES}:
        msg = (
            f"{path} holds tensors in dtypes that no layer has: {_describe(strange)}. Nothing was loaded; cast them in "
            f"the file first, to one of {', '.join(_DTYPES)}"
        )
        raise ValueError(msg)


def _native(path: FilePath, name: str, value: Bits, backend: Backend, device: Any) -> Array:
    """An array of a backend with the bits of a tensor, whose memory it may take over."""
    dtype, bits = value
    if dtype not in backend.dtypes(device):
        msg = f"{path} holds {name} in {dtype}, which {backend.name} does not have; load it elsewhere and cast it there"
        raise ValueError(msg)
    if dtype == "bfloat16":
        wide = bits.astype(np.uint32)
        wide <<= 16
        return backend.from_values(wide.view(np.float32), dtype, device=device)
    return backend.from_numpy(bits.astype(bits.dtype.newbyteorder("="), copy=False), device=device)


def _together(path: FilePath, W: Array, b: Array | None) -> tuple[Array, Array | None]:
    """W and b, if they make a layer."""
    try:
        check_parameters(W, b)
    except (TypeError, ValueError) as error:
        msg = f"{path} holds weights that make no layer: {error}"
        raise ValueError(msg) from error
    return W, b


def _describe(found: dict[str, Any]) -> str:
    """Name tensors of a file with dtype and shape: the first five."""
    texts = [
        f"{_short(name)} is {facts['dtype']} {_short(str(tuple(facts['shape'])))}"
        for name, facts in sorted(found.items())[:5]
    ]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ("; ".join(texts) or "nothing") + more


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
