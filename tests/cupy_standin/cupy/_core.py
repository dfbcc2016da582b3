"""The machine, the arrays and the functions of the stand-in; ``__init__`` gives them the names that they have in CuPy.

What is not here raises AttributeError, TypeError or NotImplementedError: nothing behaves as NumPy does by accident.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

N_DEVICES = int(os.environ.get("STANDIN_DEVICES", "1"))
PEERS = os.environ.get("STANDIN_PEERS", "1") == "1"
HALF_SPLITK = int(os.environ.get("STANDIN_HALF_SPLITK", "0"))

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = (np.dtype("e"), BFLOAT16)

_thread = threading.local()  # CuPy's current device, current streams and handles of cuBLAS belong to a thread


# ---------------------------------------------------------------- devices, streams and memory


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class PerformanceWarning(RuntimeWarning):
    pass


def current_device() -> int:
    return getattr(_thread, "device", 0)


def set_device(number: int) -> None:
    if not 0 <= number < N_DEVICES:
        raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
    _thread.device = number


def count_devices() -> int:
    if N_DEVICES == 0:
        raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
    return N_DEVICES


class Device:
    compute_capability = "90"
    __hash__ = None  # as in CuPy, where devices are compared and never hashed

    def __init__(self, device: Any = None) -> None:
        self.id = current_device() if device is None else int(device)

    def __int__(self) -> int:
        return self.id

    def __enter__(self) -> Device:
        _thread.__dict__.setdefault("left", []).append(current_device())
        set_device(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        set_device(_thread.left.pop())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def use(self) -> Device:
        set_device(self.id)
        return self

    def synchronize(self) -> None:
        for stream in list(_streams):
            if stream.device_id == self.id:
                host_waits("Device.synchronize", stream)


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()
waits: list[str] = []  # each time that the host waited for a device, and why


def host_waits(why: str, stream: Stream | None = None) -> None:
    """Make the host wait until a stream, by default the current one, has done its work."""
    waits.append(why)
    time.sleep(max(0.0, (stream or current_stream()).busy_until - time.monotonic()))


class Stream:
    """A queue of work, all of which is done at once except for the kernel "spin"."""

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.null, self.non_blocking = null, non_blocking
        self.device_id, self.busy_until = current_device(), 0.0
        _streams.add(self)

    def __enter__(self) -> Stream:
        _thread.__dict__.setdefault("streams", []).append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _thread.streams.pop()

    @property
    def done(self) -> bool:
        return time.monotonic() >= self.busy_until

    def synchronize(self) -> None:
        host_waits("Stream.synchronize", self)


_null_streams = [Stream(null=True) for _ in range(N_DEVICES)]
for _device, _stream in enumerate(_null_streams):
    _stream.device_id = _device


def current_stream() -> Stream:
    entered = reversed(getattr(_thread, "streams", []))
    return next((each for each in entered if each.device_id == current_device()), _null_streams[current_device()])


class Event:
    def record(self) -> None:
        self.stream = current_stream()
        self.at = max(time.monotonic(), self.stream.busy_until)

    def synchronize(self) -> None:
        host_waits("Event.synchronize", self.stream)


def get_elapsed_time(start: Event, end: Event) -> float:
    return 1e3 * (end.at - start.at)


class MemoryPool:
    """The pool of the current device: how much is in use, and a limit."""

    def __init__(self) -> None:
        self.used, self.limits = [0] * N_DEVICES, [0] * N_DEVICES
        self.lock = threading.Lock()

    def reserve(self, nbytes: int, device: int) -> None:
        with self.lock:
            if self.limits[device] and self.used[device] + nbytes > self.limits[device]:
                raise OutOfMemoryError(
                    f"Out of memory allocating {nbytes} bytes (limit set to {self.limits[device]} bytes)."
                )
            self.used[device] += nbytes

    def release(self, nbytes: int, device: int) -> None:
        with self.lock:
            self.used[device] -= nbytes

    def used_bytes(self) -> int:
        return self.used[current_device()]

    def set_limit(self, size: int) -> None:
        self.limits[current_device()] = size

    def free_all_blocks(self) -> None:
        """Do nothing: what is free is never kept."""


pool = MemoryPool()
_BLOCK = 512  # bytes of which CuPy's blocks of memory are multiples, and at multiples of which they begin


def check_dtype(dtype: Any) -> np.dtype:
    """Return a dtype of CuPy, in the byte order of the machine."""
    dtype = np.dtype(dtype)
    if dtype == BFLOAT16 or (dtype.isnative and dtype.char in "?bhilqBHILQefdFD"):
        return dtype
    raise ValueError(f"Unsupported dtype {dtype}")


def allocate(shape: Any, dtype: Any, order: str = "C") -> np.ndarray:
    """Return memory of the current device, full of 0xFF: NaN in floats."""
    shape = tuple(map(int, np.atleast_1d(np.asarray(shape, dtype=np.int64))))
    if min(shape, default=0) < 0:
        raise ValueError("Negative dimensions are not allowed")
    dtype, device = check_dtype(dtype), current_device()
    nbytes = math.prod(shape) * dtype.itemsize
    reserved = -(-nbytes // _BLOCK) * _BLOCK
    pool.reserve(reserved, device)
    memory = np.full(nbytes + _BLOCK, 0xFF, np.uint8)
    weakref.finalize(memory, pool.release, reserved, device)
    start = -memory.ctypes.data % _BLOCK
    return memory[start : start + nbytes].view(dtype).reshape(shape, order=order)


def allocate_like(values: np.ndarray, dtype: Any, order: str) -> np.ndarray:
    """Return memory of the same shape; with the order K the axes lie as those of the values do."""
    if order != "K":
        return allocate(values.shape, dtype, order)
    axes = sorted(range(values.ndim), key=lambda axis: (-abs(values.strides[axis]), axis))
    return allocate([values.shape[axis] for axis in axes], dtype).transpose(np.argsort(axes).astype(int))


def check_peer_access(array: ndarray) -> None:
    """Refuse, or warn of, an operand of a kernel that is not on the device on which the kernel runs."""
    here = current_device()
    if array._device == here:
        return
    text = f"The device where the array resides ({array._device}) is different from the current device ({here})."
    if not PEERS:
        raise ValueError(f"{text} Peer access is unavailable between these devices.")
    warnings.warn(f"{text} Peer access has been activated automatically.", PerformanceWarning, stacklevel=4)


# ---------------------------------------------------------------- arrays


def take_values(array: ndarray) -> np.ndarray:
    """Return what a kernel reads of an operand."""
    if not isinstance(array, ndarray):
        raise TypeError(f"Unsupported type {type(array)}")
    check_peer_access(array)
    return array._values


def wrap(values: np.ndarray, device: int | None = None) -> ndarray:
    """Return an array over memory that is there, of the current device unless another is named."""
    array = object.__new__(ndarray)
    array._values, array._device = values, current_device() if device is None else device
    return array


def put(values: Any, order: str = "C") -> ndarray:
    """Return new memory of the current device that holds the values."""
    values = np.asarray(values)
    memory = allocate(values.shape, values.dtype, order)
    memory[...] = values
    return wrap(memory)


class Flags:
    def __init__(self, values: np.ndarray) -> None:
        self.c_contiguous, self.f_contiguous = values.flags.c_contiguous, values.flags.f_contiguous

    @property
    def forc(self) -> bool:
        return self.c_contiguous or self.f_contiguous


def _own_operator_comes_first(other: Any) -> bool:
    """Return whether CuPy leaves an operator to its right operand."""
    if hasattr(other, "__array_ufunc__"):
        return other.__array_ufunc__ is None
    return getattr(other, "__array_priority__", 0) > ndarray.__array_priority__


def _operator(name: str, *, reflected: bool = False) -> Callable[[ndarray, Any], Any]:
    def method(self: ndarray, other: Any) -> Any:
        operands = (other, self) if reflected else (self, other)
        if isinstance(other, ndarray):
            return FUNCTIONS[name](*operands)
        return NotImplemented if _own_operator_comes_first(other) else getattr(np, name)(*operands)

    return method


class ndarray:  # noqa: N801 - CuPy's name
    """Values in NumPy's memory, and the number of the device that they are said to be on."""

    __module__ = "cupy"  # by which array-api-compat knows it
    __slots__ = ("__weakref__", "_device", "_values")
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, shape: Any, dtype: Any = float, order: str = "C") -> None:
        self._values, self._device = allocate(shape, dtype, order), current_device()

    shape = property(lambda self: self._values.shape)
    strides = property(lambda self: self._values.strides)
    ndim = property(lambda self: self._values.ndim)
    size = property(lambda self: self._values.size)
    dtype = property(lambda self: self._values.dtype)
    itemsize = property(lambda self: self._values.itemsize)
    nbytes = property(lambda self: self._values.nbytes)
    flags = property(lambda self: Flags(self._values))
    device = property(lambda self: Device(self._device))
    T = property(lambda self: self._view(self._values.T))

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self._values.__array_interface__["data"][0], device_id=self._device)

    @property
    def real(self) -> ndarray:
        return self._view(self._values.real) if self.dtype.kind == "c" else self

    def _view(self, values: np.ndarray) -> ndarray:
        return wrap(values, self._device)

    # What the host waits for.

    def get(self) -> np.ndarray:
        host_waits("get")
        return self._values.copy(order="C")

    def item(self) -> Any:
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(
                "The truth value of an array of another size than one is ambiguous. Use a.any() or a.all()"
            )
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._device

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("the stand-in has no memory that another library could read")

    def __reduce__(self) -> Any:
        host_waits("pickle")
        return array, (self._values.copy(order="A"),)

    # Copies.

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> ndarray:
        dtype = np.dtype(dtype)
        if dtype == self.dtype and not copy and (order == "K" or self._values.flags[f"{order}_CONTIGUOUS"]):
            return self
        result = wrap(allocate_like(self._values, dtype, order))
        if self.size:  # else CuPy launches no kernel, and does not look at the device
            elementwise_copy(self, result)
        return result

    def copy(self, order: str = "C") -> ndarray:
        if self.size == 0 or self._device == current_device():
            return self.astype(self.dtype, order)
        with self.device:
            source = self.astype(self.dtype, order, copy=False)
        if not source.flags.forc:
            raise NotImplementedError("CuPy cannot copy non-contiguous array between devices.")
        return put(source._values, "C" if source.flags.c_contiguous else "F")

    def __deepcopy__(self, memo: Any) -> ndarray:
        with self.device:
            return self.copy()

    def fill(self, value: Any) -> None:
        if np.shape(value._values if isinstance(value, ndarray) else value) != ():
            raise ValueError("non-scalar array cannot be used for fill")
        check_peer_access(self)
        with np.errstate(all="ignore"):
            value = take_values(value).astype(self.dtype) if isinstance(value, ndarray) else value
            self._values.fill(np.asarray(value, dtype=self.dtype)[()])

    def reshape(self, *shape: Any, order: str = "C", copy: bool | None = None) -> ndarray:
        values = self._values.reshape(*shape, order=order)
        if values.size == 0 or np.may_share_memory(values, self._values):
            return self._view(values)
        if copy is False:
            raise ValueError("Unable to avoid copy while reshaping.")
        check_peer_access(self)
        return put(values)

    def ravel(self) -> ndarray:
        return self.reshape(-1)

    # Elements.

    def __len__(self) -> int:
        return len(self._values)

    def _basic(self, key: Any) -> tuple[Any, ...]:
        """Return a key that makes NumPy return a view, and never a scalar."""
        parts = key if isinstance(key, tuple) else (key,)
        if not all(part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer)) for part in parts):
            raise NotImplementedError(
                "the stand-in has no arrays among indices; where they are boolean, the host waits"
            )
        return parts if any(part is Ellipsis for part in parts) else (*parts, ...)

    def __getitem__(self, key: Any) -> ndarray:
        return self._view(self._values[self._basic(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        target = self[key]
        if not isinstance(value, ndarray):
            target.fill(value)
            return
        while value.ndim and len(value) == 1:
            value = value[0]
        same_layout = target.shape == value.shape and target.strides == value.strides and target.dtype == value.dtype
        if same_layout and target.flags.c_contiguous:
            target._values[...] = value._values  # a copy of memory, which goes from any device to any other
        else:
            elementwise_copy(value, target)

    # Arithmetic. The methods of operators and reductions are made below.

    def __abs__(self) -> ndarray:
        return UFUNCS["absolute"](self)

    def __neg__(self) -> ndarray:
        return UFUNCS["negative"](self)

    def dot(self, b: ndarray, out: ndarray | None = None) -> ndarray:
        for other in (b, self if out is None else out):
            if not isinstance(other, ndarray):
                raise TypeError(
                    f"Argument has incorrect type (expected cupy._core.core._ndarray_base, got {type(other)})"
                )
        return multiply_matrices(self, b, out)

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        own = FUNCTIONS.get(function.__name__)
        known = (int, float, bool, complex, np.generic, np.ndarray, ndarray)
        if own is None or method != "__call__" or kwargs or not all(isinstance(each, known) for each in inputs):
            return NotImplemented
        return own(*inputs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        own = FUNCTIONS.get(function.__name__)
        if own is None or not all(kind in (ndarray, np.ndarray) for kind in types):
            return NotImplemented
        return own(*args, **kwargs)


for _method, _name in {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "pow": "power", "mod": "remainder",
    "floordiv": "floor_divide", "matmul": "matmul",
}.items():  # fmt: skip
    setattr(ndarray, f"__{_method}__", _operator(_name))
    setattr(ndarray, f"__r{_method}__", _operator(_name, reflected=True))
for _method, _name in {"iadd": "add", "isub": "subtract", "imul": "multiply", "itruediv": "true_divide"}.items():
    setattr(ndarray, f"__{_method}__", lambda self, other, name=_name: FUNCTIONS[name](self, other, self))
for _method, _name in {
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
    "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
}.items():  # fmt: skip
    setattr(ndarray, f"__{_method}__", _operator(_name))
for _method in ("sum", "prod", "max", "min", "all", "any"):
    setattr(ndarray, _method, lambda self, *args, name=_method, **kwargs: FUNCTIONS[name](self, *args, **kwargs))


# ---------------------------------------------------------------- elementwise functions

Loop = tuple[tuple[np.dtype, ...], tuple[np.dtype, ...]]


def parse_loops(types: Iterable[str]) -> list[Loop]:
    """Return the dtypes of inputs and outputs; CuPy writes a loop as ``ff->f``, with E for bfloat16."""
    sides = ((side.split("->")) for side in types)
    return [tuple(tuple(BFLOAT16 if c == "E" else np.dtype(c) for c in side) for side in pair) for pair in sides]


def loops_of(n: int, chars: str, result: str = "") -> list[str]:
    """Return a loop for each character, with n operands of that dtype and a result of the same or a given one."""
    return [f"{n * c}->{result or c}" for c in chars]


class Scalar:
    """A scalar operand; a number of Python is weak: it takes the dtype of an array beside it."""

    def __init__(self, value: Any) -> None:
        self.value, self.weak = value, None
        if type(value) in (int, float, complex):
            self.weak = type(value)
            self.dtype = np.asarray(value).dtype
        elif isinstance(value, (bool, np.generic)):
            self.dtype = np.asarray(value).dtype
        else:
            raise TypeError(f"Unsupported type {type(value)}")


def _kind(scalar_type: type) -> int:
    kinds = ((np.bool_, bool), (np.integer, int), (np.inexact, float, complex))
    return next((rank for rank, types in enumerate(kinds) if issubclass(scalar_type, types)), len(kinds))


class ufunc:  # noqa: N801 - CuPy's name
    """A function with the loops of CuPy, in their order: the first one that the operands can be cast to is taken.

    `types` has them as the attribute of that name has in CuPy.
    """

    def __init__(
        self, name: str, types: list[str], function: Any = None, *,
        casting: str = "same_kind", booleans: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.types = name, types
        self.nin, self.casting, self.booleans = types[0].index("-"), casting, booleans
        self._function, self._loops = function or getattr(np, name), parse_loops(types)
        self._cache: dict[Any, Loop] = {}

    def _loop_for(self, operands: list[Any]) -> Loop:
        dtypes = tuple(each.dtype for each in operands)
        weak = tuple(getattr(each, "weak", None) for each in operands)
        strong_kinds = [_kind(dtype.type) for dtype, kind in zip(dtypes, weak, strict=True) if not kind]
        if not strong_kinds or max(strong_kinds) < max((_kind(kind) for kind in weak if kind), default=0):
            weak = (None,) * len(operands)
        if (dtypes, weak) not in self._cache:
            self._cache[dtypes, weak] = self._search(dtypes, weak)
        return self._cache[dtypes, weak]

    def _search(self, dtypes: tuple[np.dtype, ...], weak: tuple[type | None, ...]) -> Loop:
        def fits(dtype: np.dtype, kind: type | None, wanted: np.dtype) -> bool:
            if np.can_cast(dtype, wanted):
                return True
            try:
                return kind is not None and np.result_type(kind(0), wanted) == wanted
            except TypeError:  # of bfloat16 and a complex number
                return False

        for loop in self._loops:
            if all(map(fits, dtypes, weak, loop[0])) and (self.booleans or loop[1] != (np.dtype(bool),)):
                return loop
            if all(map(fits, dtypes, weak, loop[0])):
                break
        raise TypeError(f"Wrong type ({dtypes}) of arguments for cupy_{self.name}")

    def __call__(self, *args: Any, out: ndarray | None = None) -> ndarray:
        if len(args) == self.nin + 1 and out is None:
            *args, out = args
        if len(args) != self.nin:
            raise TypeError(f"Wrong number of arguments for {self.name!r}.")
        operands: list[Any] = []
        for arg in args:
            if isinstance(arg, ndarray):
                check_peer_access(arg)
            operands.append(arg if isinstance(arg, ndarray) else Scalar(arg))
        if out is not None:
            take_values(out)
        arrays = [each for each in operands if isinstance(each, ndarray)]
        shape = np.broadcast_shapes(*(each.shape for each in (*arrays, *([] if out is None else [out]))))
        (*in_dtypes,), (out_dtype,) = self._loop_for(operands)
        if out is None:
            out = ndarray(shape, out_dtype)
        elif out.shape != shape:
            raise ValueError("Out shape is mismatched")
        elif out_dtype.kind != out.dtype.kind and not np.can_cast(out_dtype, out.dtype, self.casting):
            raise TypeError(
                f"Cannot cast output operand from {out_dtype!r} to {out.dtype!r} according to the rule {self.casting!r}"
            )
        if 0 in shape:
            return out
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
            values = [
                each._values.astype(wanted) if isinstance(each, ndarray) else np.asarray(each.value).astype(wanted)
                for each, wanted in zip(operands, in_dtypes, strict=True)
            ]
            out._values[...] = np.asarray(self._function(*values)).astype(out_dtype)
        return out


_INTEGERS, _REAL, _FLOATING = "bBhHiIlLqQ", "eEfd", "eEfdFD"
_ALL = f"?{_INTEGERS}{_FLOATING}"


_MIXED_INTEGERS = ["qq->{}", "QQ->{}", "qQ->{}", "Qq->{}"]
_COMPARISONS = ["??->?", *(loop.format("?") for loop in _MIXED_INTEGERS), *loops_of(2, _FLOATING, "?")]
_ufuncs = [
    *(ufunc(name, loops_of(2, _ALL)) for name in ("add", "multiply", "maximum", "minimum")),
    ufunc("subtract", loops_of(2, _ALL), booleans=False),
    ufunc("negative", loops_of(1, _ALL), booleans=False),
    ufunc("power", ["??->b", *loops_of(2, _ALL[1:])]),
    ufunc("true_divide", ["qq->d", "qQ->d", "Qq->d", "QQ->d", *loops_of(2, _FLOATING)]),
    *(ufunc(name, loops_of(2, _INTEGERS + _REAL)) for name in ("floor_divide", "remainder")),
    *(ufunc(name, loops_of(1, _ALL[1:])) for name in ("conjugate", "square", "sign")),
    ufunc("absolute", [*loops_of(1, f"?{_INTEGERS}{_REAL}"), "F->f", "D->d"]),
    *(
        ufunc(name, loops_of(1, _FLOATING))
        for name in (
            "sqrt", "exp", "log", "sin", "cos", "tan", "tanh", "arcsin", "arccos", "arctan", "arcsinh", "arccosh",
            "arctanh",
        )
    ),
    ufunc("arctan2", loops_of(2, _FLOATING)),
    *(ufunc(name, loops_of(1, _FLOATING, "?")) for name in ("isnan", "isinf", "isfinite")),
    *(ufunc(name, _COMPARISONS) for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")),
    *(ufunc(name, loops_of(2, f"?{_INTEGERS}")) for name in ("bitwise_and", "bitwise_or", "bitwise_xor")),
    *(ufunc(name, loops_of(2, _INTEGERS)) for name in ("left_shift", "right_shift")),
    ufunc("invert", loops_of(1, f"?{_INTEGERS}")),
]  # fmt: skip
UFUNCS = {each.name: each for each in _ufuncs}
UFUNCS["conj"], UFUNCS["divide"] = UFUNCS["conjugate"], UFUNCS["true_divide"]
FUNCTIONS: dict[str, Any] = UFUNCS | {"abs": UFUNCS["absolute"]}  # and those below, by the names that they have in CuPy

where_ufunc = ufunc("where", [f"?{2 * c}->{c}" for c in _ALL if c != "E"], np.where)
elementwise_copy = ufunc("copy", loops_of(1, _ALL), lambda values: values, casting="unsafe")


def function(call: Any) -> Any:
    """Put a function into the namespace of CuPy."""
    FUNCTIONS[call.__name__] = call
    return call


@function
def where(condition: ndarray, x: Any, y: Any) -> ndarray:
    return where_ufunc(condition.astype("?", copy=False), x, y)


# ---------------------------------------------------------------- reductions

_SUMS = [*(f"{c}->{'l' if c in '?bhil' else 'L'}" for c in f"?{_INTEGERS[:-2]}"), *loops_of(1, f"qQ{_FLOATING}")]
_TRUTHS = loops_of(1, _ALL.replace("b", "").replace("E", ""), "?")
REDUCTIONS = {
    "sum": _SUMS, "prod": _SUMS, "max": loops_of(1, _ALL), "min": loops_of(1, _ALL), "all": _TRUTHS, "any": _TRUTHS
}  # fmt: skip
REDUCTIONS_IN_A_DTYPE = loops_of(1, _ALL)  # sums and products where it is named


def _reduce(name: str, a: ndarray, axis: Any, dtype: Any, out: ndarray | None, keepdims: bool) -> ndarray:
    values = take_values(a)
    axes = np.lib.array_utils.normalize_axis_tuple(range(a.ndim) if axis is None else axis, a.ndim)
    if dtype is None:
        (source,), (result,) = next(loop for loop in parse_loops(REDUCTIONS[name]) if np.can_cast(a.dtype, loop[0][0]))
    else:
        (source,), (result,) = next(
            loop for loop in parse_loops(REDUCTIONS_IN_A_DTYPE) if loop[1][0] == np.dtype(dtype)
        )
    shape = tuple(1 if i in axes else n for i, n in enumerate(a.shape) if keepdims or i not in axes)
    if out is None:
        out = ndarray(shape, result)
    elif take_values(out).shape != shape:
        raise ValueError("Out shape is mismatched")
    if out.size == 0:
        return out
    if name in ("max", "min") and a.size == 0:
        raise ValueError(f"zero-size array to reduction operation cupy_{name} which has no identity")
    wide = np.dtype(np.float32) if source in HALVES else source  # CuPy adds halves up in float
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        options = {"dtype": wide} if name in ("sum", "prod") else {}
        total = getattr(np, name)(values.astype(wide), axis=axes, keepdims=keepdims, **options)
        out._values[...] = np.asarray(total).astype(out.dtype)
    return out


def _reduction(name: str) -> Any:
    def reduce(a: ndarray, axis: Any = None, out: ndarray | None = None, keepdims: bool = False) -> ndarray:
        return _reduce(name, a, axis, None, out, keepdims)

    def reduce_in(
        a: ndarray, axis: Any = None, dtype: Any = None, out: ndarray | None = None, keepdims: bool = False
    ) -> ndarray:
        return _reduce(name, a, axis, dtype, out, keepdims)

    return reduce_in if REDUCTIONS[name] is _SUMS else reduce


FUNCTIONS.update({name: _reduction(name) for name in REDUCTIONS})


# ---------------------------------------------------------------- products

COMPUTE_TYPES = ("TBD", "DEFAULT", "PEDANTIC", "FP16", "FP32", "FP64", "BF16", "TF32")  # by their numbers in CuPy
_TBD, _DEFAULT, _TF32 = (COMPUTE_TYPES.index(name) for name in ("TBD", "DEFAULT", "TF32"))
_ENTRIES = {"e": 0, "E": 1, "f": 2, "F": 2, "d": 3, "D": 3}  # dtypes that share a compute type
_compute_types = [_TBD] * 4

FLOAT32_SUMS = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
_math_modes: dict[int, int] = {}
_handles = itertools.count(0x1000)


def set_compute_type(dtype: Any, compute_type: int) -> None:
    _compute_types[_ENTRIES[np.dtype(dtype).char]] = compute_type


def get_compute_type(dtype: Any) -> int:
    entry, char = _ENTRIES[np.dtype(dtype).char], np.dtype(dtype).char
    if _compute_types[entry] == _TBD:
        _compute_types[entry] = _TF32 if char in "fF" and int(os.environ.get("CUPY_TF32", "0")) else _DEFAULT
    return _compute_types[entry]


def get_cublas_handle() -> int:
    """Return the handle of this thread and the current device."""
    handles = _thread.__dict__.setdefault("handles", {})
    if current_device() not in handles:
        handles[current_device()] = next(_handles)
        _math_modes[handles[current_device()]] = 0
    return handles[current_device()]


def get_math_mode(handle: int) -> int:
    return _math_modes[handle]


def set_math_mode(handle: int, mode: int) -> None:
    assert handle in _math_modes, "no handle of cuBLAS"
    _math_modes[handle] = mode


def _cut_to_tf32(a: np.ndarray) -> np.ndarray:
    """Return factors with the ten bits after the point that tensor cores keep."""
    parts = np.ascontiguousarray(a).view(np.uint32) & np.uint32(0xFFFFE000)
    return parts.view(a.dtype).reshape(a.shape)


def _gemm(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return what cuBLAS makes of two matrices of one dtype."""
    dtype, k = a.dtype, a.shape[1]
    if dtype in HALVES:
        a, b = a.astype(np.float32), b.astype(np.float32)
        if HALF_SPLITK and k >= 4 * HALF_SPLITK and not get_math_mode(get_cublas_handle()) & FLOAT32_SUMS:
            cuts = np.linspace(0, k, HALF_SPLITK + 1).astype(int)
            total = np.zeros((), dtype)
            for start, stop in itertools.pairwise(cuts):
                part = (a[:, start:stop] @ b[start:stop]).astype(dtype)
                total = (total.astype(np.float32) + part.astype(np.float32)).astype(dtype)
            return total
    elif dtype.char in "fF" and get_compute_type(dtype) == _TF32:
        a, b = _cut_to_tf32(a), _cut_to_tf32(b)
    return (a @ b).astype(dtype)


def multiply_matrices(a: ndarray, b: ndarray, out: ndarray | None = None) -> ndarray:
    """Return the product of two arrays with at most two axes, as ``ndarray.dot`` has it."""
    dtype = np.promote_types(a.dtype, b.dtype)
    if out is not None and out.dtype != dtype:
        raise ValueError("Not supported dtype combination.")
    if out is not None and not out.flags.c_contiguous:
        raise ValueError("Output array must be C-contiguous")
    if not {a.ndim, b.ndim} <= {1, 2}:
        raise NotImplementedError("the stand-in multiplies matrices and vectors alone")
    if dtype.kind == "b":
        raise ValueError("Unsupported dtype bool")
    shape = a.shape[:-1] + b.shape[1:]
    a = a.reshape(1, -1) if a.ndim == 1 else a
    b = b.reshape(-1, 1) if b.ndim == 1 else b
    if a.shape[1] != b.shape[0]:
        raise ValueError("Axis dimension mismatch")
    if out is not None and out.size != len(a) * b.shape[1]:
        raise ValueError("Output array has an invalid size")
    for each in (a, b, a if out is None else out):
        # CuPy has no such check: cuBLAS is handed the addresses, whatever they are.
        assert each._device == current_device() or not each.size, (
            f"cuBLAS of device {current_device()} was handed memory of device {each._device}"
        )
    out = ndarray(shape, dtype) if out is None else out
    if not a.size or not b.size:
        out.fill(0)
    elif len(a) == 1 == b.shape[1]:
        UFUNCS["multiply"](a.ravel(), b.ravel()).sum(out=out.reshape(()))  # each product is rounded
    else:
        a, b = (each.astype(dtype, copy=False) for each in (a, b))
        a, b = (each if each.flags.forc else each.copy() for each in (a, b))
        with np.errstate(all="ignore"):
            out._values[...] = _gemm(a._values, b._values).reshape(out.shape)
    return out


@function
def matmul(x1: ndarray, x2: ndarray, /, out: ndarray | None = None) -> ndarray:
    values = [take_values(each) for each in (x1, x2)]
    if max(x1.ndim, x2.ndim) <= 2:
        return x1.dot(x2, out)
    if out is not None or BFLOAT16 in (x1.dtype, x2.dtype):  # CuPy fails for bfloat16
        raise NotImplementedError(
            "the stand-in multiplies stacks of matrices into new memory alone, and not in bfloat16"
        )
    dtype = np.promote_types(x1.dtype, x2.dtype)
    wide = np.float32 if dtype in HALVES else dtype
    with np.errstate(all="ignore"):
        return put(np.matmul(*(each.astype(wide) for each in values)).astype(dtype))


@function
def dot(a: ndarray, b: ndarray, out: ndarray | None = None) -> ndarray:
    return a.dot(b, out)


# ---------------------------------------------------------------- new arrays


@function
def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, float if dtype is None else dtype, order)


@function
def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    if dtype is None:
        dtype = fill_value.dtype if isinstance(fill_value, ndarray) else np.asarray(fill_value).dtype
    result = empty(shape, dtype, order)
    result.fill(fill_value)
    return result


@function
def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 0, float if dtype is None else dtype, order)


@function
def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, float if dtype is None else dtype, order)


@function
def empty_like(prototype: ndarray, dtype: Any = None, order: str = "K") -> ndarray:
    if not isinstance(prototype, ndarray):
        raise TypeError(f"Unsupported type {type(prototype)}")
    return wrap(allocate_like(prototype._values, prototype.dtype if dtype is None else dtype, order))


@function
def full_like(a: ndarray, fill_value: Any, dtype: Any = None, order: str = "K") -> ndarray:
    result = empty_like(a, dtype, order)
    result.fill(fill_value)
    return result


@function
def zeros_like(a: ndarray, dtype: Any = None, order: str = "K") -> ndarray:
    return full_like(a, 0, dtype, order)


@function
def ones_like(a: ndarray, dtype: Any = None, order: str = "K") -> ndarray:
    return full_like(a, 1, dtype, order)


@function
def array(obj: Any, dtype: Any = None, copy: bool | None = True, order: str = "K") -> ndarray:
    if isinstance(obj, ndarray):
        dtype = obj.dtype if dtype is None else np.dtype(dtype)
        if obj._device != current_device():
            return obj.copy(order).astype(dtype, copy=False)
        if copy is False and dtype != obj.dtype:
            raise ValueError("Unable to avoid copy while creating an array as requested.")
        return obj.astype(dtype, order, copy=bool(copy))
    values = np.asarray(obj, dtype=dtype)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    check_dtype(values.dtype)
    return put(values, "F" if order == "F" or (order == "K" and values.flags.fnc) else "C")


@function
def asarray(a: Any, dtype: Any = None, order: str | None = None) -> ndarray:
    return array(a, dtype, None, order or "K")


@function
def ascontiguousarray(a: ndarray) -> ndarray:
    if a.flags.c_contiguous:
        return a
    dense = empty(a.shape, a.dtype)  # on the current device, where the kernel runs
    elementwise_copy(a, dense)
    return dense


@function
def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    return put(np.arange(start, stop, step, dtype) if stop is not None else np.arange(0, start, step, dtype))


@function
def from_dlpack(x: Any) -> ndarray:
    raise TypeError(f"CPU arrays cannot be directly imported to CuPy: {type(x)} is on device {x.__dlpack_device__()}")


@function
def copyto(dst: ndarray, src: ndarray) -> None:
    elementwise_copy(src, dst)


@function
def reshape(a: ndarray, newshape: Any, order: str = "C", *, copy: bool | None = None) -> ndarray:
    return a.reshape(newshape, order=order, copy=copy)


@function
def real(val: ndarray) -> ndarray:
    return val.real


@function
def broadcast_arrays(*args: ndarray) -> list[ndarray]:
    shape = np.broadcast_shapes(*(each.shape for each in args))
    return [each._view(np.broadcast_to(each._values, shape)) for each in args]


@function
def result_type(*arrays_and_dtypes: Any) -> np.dtype:
    return np.result_type(*(each.dtype if isinstance(each, ndarray) else each for each in arrays_and_dtypes))


def _views(name: str) -> None:
    """Add a function whose results are views in NumPy just where they are in CuPy."""

    def call(a: ndarray, *args: Any, **kwargs: Any) -> ndarray:
        return a._view(getattr(np, name)(a._values, *args, **kwargs))

    FUNCTIONS[name] = call


def _copies(name: str) -> None:
    """Add a function that reads all its arrays on the current device, and whose result is new memory there."""

    def values_of(operand: Any) -> Any:
        if isinstance(operand, (list, tuple)):
            return type(operand)(map(values_of, operand))
        return take_values(operand) if isinstance(operand, (ndarray, np.ndarray)) else operand

    def call(*args: Any, **kwargs: Any) -> ndarray:
        return put(getattr(np, name)(*map(values_of, args), **kwargs))

    FUNCTIONS[name] = call


for _name in ("transpose", "swapaxes", "moveaxis", "broadcast_to", "flip"):
    _views(_name)
for _name in ("concatenate", "take", "tensordot", "round"):
    _copies(_name)


def randint(low: int, high: int, size: Any) -> ndarray:
    return put(np.random.default_rng().integers(low, high, size))


def standard_normal(size: Any, dtype: Any = float) -> ndarray:
    return put(np.random.default_rng().standard_normal(size, dtype))


# ---------------------------------------------------------------- compiled kernels


def _whole_packs(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the elements of a matrix as they lie, and how many of them a pack has."""
    assert matrix.flags.c_contiguous, "packs are read from memory that is not C-contiguous"
    assert matrix.ctypes.data % max(8, matrix.itemsize) == 0, "cudaErrorMisalignedAddress: misaligned address"
    return matrix.reshape(-1), max(1, 8 // matrix.itemsize)


def _sum_in_turn(elements: np.ndarray, n: int, dtype: np.dtype) -> np.ndarray:
    """Return n sums, each of every n-th element, in a dtype."""
    padded = np.zeros((-(-elements.size // n), n), dtype)
    padded.reshape(-1)[: elements.size] = elements
    return padded.sum(axis=0, dtype=dtype)  # one row after the other


# Thread i takes packs i, i + threads, ... So it treats elements alike that lie as far apart as there are elements in
# one pack for each thread.


def _add_to_rows(threads: int, block_size: int, b: np.ndarray, y: np.ndarray) -> None:  # noqa: ARG001
    elements, pack = _whole_packs(y)
    elements += np.resize(np.resize(b, threads * pack), elements.size)


def _add_rows_up(threads: int, block_size: int, dy: np.ndarray, parts: np.ndarray) -> None:  # noqa: ARG001
    elements, pack = _whole_packs(dy)
    assert parts.size == threads * pack, "the kernel writes to memory that is not part of its result"
    parts[...] = _sum_in_turn(elements, threads * pack, parts.dtype).reshape(parts.shape)


def _add_up(threads: int, block_size: int, parts: np.ndarray, sums: np.ndarray, wide: Any = None) -> None:
    assert block_size == 256, "the kernel is written for blocks of 256 threads"
    m = sums.size
    columns = 1 if m < 512 else 8  # that a block adds up side by side
    lanes = block_size // columns
    shared = _sum_in_turn(parts.reshape(-1), lanes * m, wide or sums.dtype).reshape(lanes, m)
    while len(shared) > 1:
        first, second = np.split(shared, 2)
        shared = first + second
    written = threads // block_size * columns
    sums.reshape(-1)[:written] = shared[0, :written]


# What the kernels of xaffine do, by their names. Each is handed the numbers of threads and of threads of a block, and
# the operands. A kernel that is new or that changes needs its line here.
EMULATIONS: dict[str, Callable[..., None]] = {
    "xaffine_add_to_rows": _add_to_rows,
    "xaffine_add_rows_up": _add_rows_up,
    "xaffine_add_up": _add_up,
    "xaffine_add_up_to_half": functools.partial(_add_up, wide=np.dtype(np.float32)),
}


class ElementwiseKernel:
    """A kernel whose body is C++, which the stand-in does not read: it knows what the body does by the name."""

    def __init__(
        self, in_params: str, out_params: str, operation: str, name: str = "kernel", *, preamble: str = ""
    ) -> None:
        self.name, self.operation, self.preamble = name, operation, preamble
        self._params = [param.split() for param in f"{in_params},{out_params}".split(",")]
        if name not in EMULATIONS or any(param[0] != "raw" for param in self._params):
            raise NotImplementedError(
                f"the stand-in does not know what the kernel {name!r} does, or it has parameters that are not raw; "
                f"it knows {', '.join(EMULATIONS)}"
            )

    def __call__(self, *args: Any, size: int, block_size: int = 128) -> ndarray:
        if len(args) != len(self._params):
            raise TypeError(f"Wrong number of arguments for {self.name!r}.")
        values = [take_values(arg) for arg in args]
        types: dict[str, np.dtype] = {}
        for (_, letter, name), array in zip(self._params, values, strict=True):
            if types.setdefault(letter, array.dtype) != array.dtype:
                raise TypeError(f"Type is mismatched. {name} {array.dtype} {types[letter]} {letter}")
        if size:
            with np.errstate(all="ignore"):
                EMULATIONS[self.name](size, block_size, *values)
        return args[-1]


class RawKernel:
    """The kernel "spin" alone, which keeps its stream busy for so many cycles."""

    def __init__(self, code: str, name: str) -> None:
        assert code
        assert name == "spin", f"the stand-in does not know what the kernel {name!r} does"

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
        assert grid == block == (1,)
        current_stream().busy_until = time.monotonic() + int(args[0]) / 2e9
