"""One array library, as the array API standard describes it.

Every question that xaffine has about a library is a method of `Backend`, and is answered here by the standard alone.
A file beside this one holds what one library does otherwise: a subclass of `Backend`, and nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import array_api_compat
import numpy as np

from xaffine.backends._memory import Memory, are_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from types import ModuleType

__all__ = ["KINDS", "LARGER_THAN_CACHES", "Array", "Backend", "Result", "is_known", "shape_text", "written"]

Array: TypeAlias = Any
"""An array of any library that conforms to the array API standard."""

Result = TypeVar("Result")
"""What a step returns: an array, or several of them."""

KINDS = ("integral", "real floating", "complex floating")
LARGER_THAN_CACHES = 256 << 20  # bytes; the largest L2 cache of a GPU holds half of that
_STRETCHES = 64  # of an axis, which are added to each other


class Backend:
    """One array library: its namespace, devices and dtypes, the way from and to NumPy, and its products.

    Made by `xaffine.backends.get` and `xaffine.backends.backend_of`; there is one object for each library.

    Parameters
    ----------
    namespace : str, optional
        The name of the module that conforms to the standard, for a library without a file of its own.

    Attributes
    ----------
    name : str
        The name of the backend, such as ``"torch"``.
    xp : module
        The array API namespace of the library: ``xp.matmul``, ``xp.float32``, ...

    Examples
    --------
    >>> from xaffine.backends import get
    >>> backend = get("numpy")
    >>> backend, backend.install, "float32" in backend.dtypes()
    (<xaffine backend 'numpy'>, 'pip install numpy', True)
    """

    name: str
    xp: ModuleType
    """The array API namespace of the library: ``xp.matmul``, ``xp.float32``, ..."""
    namespace: str
    """The name of the module that is its namespace."""
    halves: ClassVar[tuple[str, ...]] = ()
    """Half-precision dtypes, which the standard does not list."""
    inexact: ClassVar[tuple[str, ...]] = ()
    """Dtypes beside the floating ones that the library calls numeric and does not compute exactly."""
    has_strides: ClassVar[bool] = True
    """Whether arrays may lie in memory in any order, and be views of parts of others."""
    fills_unknown: ClassVar[bool] = True
    """Whether elements of an array can be assigned before all its extents are known."""
    types: frozenset[type] = frozenset()
    """The types of array that `product` and `sum_rows` of the subclass take; others take those of this class."""

    def __init__(self, namespace: str | None = None) -> None:
        if namespace is not None:
            self.namespace = namespace
            self.name = namespace
        self.calls_directly = type(self).run is Backend.run  # then the layer is spared that call
        self.plans: dict[Any, Any] = {}  # what the checks remember of operands, by their signature

    def __repr__(self) -> str:
        return f"<xaffine backend {self.name!r}>"

    def __reduce__(self) -> Any:
        from xaffine import backends

        return backends._of_namespace, (self.namespace,)

    # What users ask.

    def __getattr__(self, name: str) -> Any:
        if name != "xp":
            msg = f"{type(self).__name__} has no attribute {name!r}"
            raise AttributeError(msg)
        # Imported when it is first asked for, since that of NumPy takes longer than all else.
        self.xp = importlib.import_module(self.namespace)
        return self.xp

    @property
    def package(self) -> str:
        """The name of the library's own package, such as ``"array_api_strict"``."""
        return self.namespace.removeprefix("array_api_compat.").partition(".")[0]

    @property
    def install(self) -> str:
        """The command that installs the library; empty for a library without a file of its own."""
        from xaffine import backends

        return f"pip install {backends._INSTALL[self.name]}" if self.name in backends._INSTALL else ""

    @property
    def version(self) -> str:
        """The version of the library."""
        return str(importlib.import_module(self.package).__version__)

    @property
    def devices(self) -> list[Any]:
        """The devices that arrays can be put on, the default one first."""
        return list(self.xp.__array_namespace_info__().devices())

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
        >>> from xaffine.backends import get
        >>> get("numpy").device("cpu")
        'cpu'
        """
        for device in self.devices:
            if name in (device, str(device).strip("<>"), self.device_name(device)) or (
                name == "gpu" and self.is_gpu(device)
            ):
                return device
        msg = f"{self.name} has no device {name}; it has {', '.join(map(self.device_name, self.devices))}"
        raise ValueError(msg)

    def device_name(self, device: Any) -> str:
        """The text of a device, such as ``"cuda:1"``, by which `device` finds it."""
        return str(device).strip("<>")

    def is_gpu(self, device: Any) -> bool:
        """Whether a device is a GPU, by its text.

        Parameters
        ----------
        device
            One of `devices`, or its text.

        Returns
        -------
        bool
            Whether "cuda" or "gpu" is in it.

        Examples
        --------
        >>> from xaffine.backends import get
        >>> get("numpy").is_gpu("cuda:0"), get("numpy").is_gpu("cpu")
        (True, False)
        """
        return any(word in str(device).lower() for word in ("cuda", "gpu"))

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
        >>> from xaffine.backends import get
        >>> get("numpy").dtypes()[-4:]
        ['uint16', 'uint32', 'uint64', 'uint8']
        """
        numeric = self.xp.__array_namespace_info__().dtypes(kind="numeric", device=device)
        missing = {*self.inexact, *self.missing_on(device)}
        return [name for name in (*filter(self._has, self.halves), *sorted(numeric)) if name not in missing]

    def _has(self, half: str) -> bool:
        return hasattr(self.xp, half) or importlib.util.find_spec("ml_dtypes") is not None

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
        >>> from xaffine.backends import get
        >>> get("numpy").dtype("float16") == np.float16
        True
        """
        if hasattr(self.xp, name):
            return getattr(self.xp, name)
        return np.dtype(getattr(importlib.import_module("ml_dtypes"), name, name))  # Dask has no name for float16

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
        >>> from xaffine.backends import get
        >>> get("numpy").from_numpy(np.ones((2, 3))).shape
        (2, 3)
        """
        return self.xp.asarray(np.asarray(array), device=device)

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
        >>> from xaffine.backends import get
        >>> get("numpy").from_values(np.asarray([1.0, 2.0]), "float16").dtype.name
        'float16'
        """
        host = values.astype("float32" if dtype == "bfloat16" else dtype)
        native = self.from_numpy(host, device=device)
        with self.on_device_of(native):
            return self.xp.astype(native, self.dtype(dtype)) if dtype == "bfloat16" else native

    def over(self, memory: np.ndarray) -> Array | None:
        """An array of this library in the memory of a NumPy array.

        Parameters
        ----------
        memory : numpy.ndarray
            With one axis, and one of the library's dtypes.

        Returns
        -------
        array or None
            None where it would be a copy.

        Examples
        --------
        >>> from xaffine.backends import get
        >>> memory = np.zeros(2)
        >>> get("numpy").over(memory) is memory
        True
        """
        return None

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
        >>> from xaffine.backends import get
        >>> get("numpy").to_numpy(np.ones(2)).tolist()
        [1.0, 1.0]
        """
        return np.asarray(array)

    def to_device(self, array: Array, device: Any) -> Array:
        """Copy an array to another device of this library.

        Parameters
        ----------
        array
            Any shape.
        device
            One of `devices`.

        Returns
        -------
        array
            The same one if it is there already.

        Examples
        --------
        >>> from xaffine.backends import get
        >>> get("numpy").to_device(np.ones(2), "cpu").tolist()
        [1.0, 1.0]
        """
        return array_api_compat.to_device(array, device)

    def wait(self, array: Array) -> None:
        """Block until an array is computed: what a stopwatch needs. A lazy array is computed and dropped.

        Parameters
        ----------
        array
            Of this library.

        Examples
        --------
        >>> from xaffine.backends import get
        >>> backend = get("numpy")
        >>> backend.wait(backend.xp.ones(2))  # NumPy has computed it already
        """

    def use_full_precision(self) -> None:
        """Make the library compute float32 and float64 products as such, in the whole process.

        JAX by default turns float64 into float32 and may round float32 products to fewer bits on accelerators, torch
        adds halves up in half precision there; TF32 may have been allowed. A comparison with rounding bounds needs none
        of it.

        Examples
        --------
        >>> from xaffine.backends import get
        >>> get("numpy").use_full_precision()  # NumPy does nothing else
        """

    def use_tf32(self) -> None:
        """Let the library round the factors of float32 products to TF32, in the whole process, on GPUs that have it.

        `use_full_precision` takes it back.

        Examples
        --------
        >>> from xaffine.backends import get
        >>> get("numpy").use_tf32()  # NumPy has no such thing
        """

    # What is asked of a library. The docstrings say what a library's file may answer otherwise.

    def why_unusable(self) -> str | None:
        """What the library lacks on this machine to run at all, and in a second line what to do; or None."""
        return None

    def missing_on(self, device: Any) -> Collection[str]:
        """The names of dtypes that have no products on a device."""
        return ()

    # What is asked of a dtype.

    @staticmethod
    def dtype_name(dtype: Any) -> str:
        """The name of a dtype, as the standard spells it."""
        # NumPy's text for a foreign byte order is another.
        return dtype.name if isinstance(dtype, np.dtype) else str(dtype).rpartition(".")[2].lower()

    @staticmethod
    def is_half(dtype: Any) -> bool:
        """Whether a dtype is float16 or bfloat16."""
        return str(dtype).lower().endswith("float16")

    def kind(self, dtype: Any) -> str | None:
        """The kind of a dtype, in the standard's words; None for bool and for a dtype that no layer has."""
        try:
            return next((kind for kind in KINDS if self.xp.isdtype(dtype, kind)), None)
        except TypeError:  # NumPy's and CuPy's know the dtypes of NumPy alone
            return "real floating" if self.is_half(dtype) else None

    def promote(self, *dtypes: Any) -> Any:
        """The dtype that some dtypes promote to; of a single one, too, since that undoes a foreign byte order."""
        # Dynamo traces no result_type.
        return reduce(getattr(self.xp, "promote_types", self.xp.result_type), dtypes, dtypes[0])

    def promotion(self) -> Any:
        """What the promotion of dtypes depends on beside the dtypes."""
        return None

    def wide(self, dtype: Any) -> Any:
        """The dtype in which to add up numbers of a dtype: a running sum of halves stops growing at 1/u."""
        return self.xp.float32 if self.is_half(dtype) else dtype

    # What is asked of an array.

    def facts(self, array: Any) -> tuple[Any, ...] | None:
        """What the checks depend on in an array, as a key of a dictionary; None if it must be looked at each time."""
        return None

    def signature(self, *arrays: Any) -> Any:
        """The facts of some arrays or Nones, one after the other; None if one of the arrays has none."""
        signature: list[Any] = []
        for array in arrays:
            if array is None:
                signature.append(None)
            elif (facts := self.facts(array)) is None:
                return None
            else:
                signature += facts
        return tuple(signature)

    def device_of(self, array: Array) -> Any:
        """The device that an array is bound to, or None if nothing binds it to one."""
        return array_api_compat.device(array)

    def on_device_of(self, array: Array) -> AbstractContextManager[Any]:
        """What to enter before making arrays, so that they are on the device of an array."""
        return nullcontext()

    def why_not_writable(self, array: Array) -> str | None:
        """Why the elements of an array cannot be assigned, or None if they can."""
        if not array_api_compat.is_writeable_array(array):
            return "it is immutable or read-only"
        try:
            array[:0, ...] = array[:0, ...]  # writes nothing, and raises where writing would
        except Exception:  # each library has its own error for it
            return "it is immutable or read-only"
        return None

    def memory_of(self, array: Array) -> Memory | None:
        """Where the elements of an array lie, or None where the library hides it."""
        return None

    def can_fill(self, buffers: Sequence[Array | None], operands: Sequence[Array | None]) -> bool:
        """Whether it is clear at once that buffers can be written, and that this changes nothing else.

        If not, `why_not_writable`, `is_recorded`, `share_memory` and `overlaps_itself` are asked. A library whose
        arrays may be read-only or recorded asks the first two here as well.
        """
        memories = [self.memory_of(array) for array in (*buffers, *operands) if array is not None]
        known = [memory for memory in memories if memory is not None]
        return len(known) == len(memories) and are_apart(known)

    def overlaps_itself(self, array: Array) -> bool:
        """Whether two elements of an array share memory; False where the library hides its memory."""
        memory = self.memory_of(array)
        return memory is not None and memory.overlaps_itself()

    def share_memory(self, first: Array, second: Array) -> bool:
        """Whether what is written to one array shows in the other; False where the library hides its memory."""
        memory, other = self.memory_of(first), self.memory_of(second)
        return first is second if memory is None or other is None else memory.overlaps(other)

    def is_recorded(self, array: Array) -> bool:
        """Whether the library follows what is done with an array, to differentiate it."""
        return False

    def adds_in_place(self, array: Array) -> bool:
        """Whether something can be added to an array where it lies."""
        is_writable = self.why_not_writable(array) is None and not self.is_recorded(array)
        return is_writable and not self.overlaps_itself(array)

    def detached(self, array: Array) -> Array:
        """The values of an array, in the same memory, without what the library recorded of it."""
        return array

    def is_copyable(self, array: Array) -> bool:
        """Whether ``copy.deepcopy`` takes an array; if not, a pickle does."""
        return True

    def is_lazy(self, array: Array) -> bool:
        """Whether the values of an array are computed later, if at all."""
        return bool(array_api_compat.is_lazy_array(array))

    def whole(self, array: Array) -> Array:
        """An array, of which each process may hold a part, as one array that each of them holds."""
        return array

    def describe(self, array: Array) -> str:
        """Dtype, shape, library and device of an array."""
        device = self.device_of(array)
        place = self.package if device is None else f"{self.package} on {self.device_name(device)}"
        return f"{self.dtype_name(array.dtype)} {shape_text(array.shape)} ({place})"

    def describe_all(self, **operands: Array) -> str:
        """What each of some operands is."""
        return "; ".join(f"{name} is {self.describe(operand)}" for name, operand in operands.items())

    def check_operands(self, **operands: Any) -> None:
        """Raise a ValueError if some arrays are on two devices, a TypeError for one that no step can compute with."""
        given = {name: operand for name, operand in operands.items() if operand is not None}
        devices = [device for device in map(self.device_of, given.values()) if device is not None]
        if any(device != devices[0] for device in devices[1:]):
            msg = f"arrays on two devices: {self.describe_all(**given)}. Move them to one first"
            raise ValueError(msg)

    def common_dtype(self, **operands: Array) -> tuple[Any, str]:
        """The dtype that operands promote to and its kind, which must be that of each; else a TypeError."""
        dtypes = [operand.dtype for operand in operands.values()]
        kinds = [self.kind(dtype) for dtype in dtypes]
        if kinds[0] is not None and len(set(kinds)) == 1:
            reason = ""
            try:
                common = self.promote(*dtypes)
            except (TypeError, ValueError, RuntimeError) as error:  # how libraries say that two dtypes do not promote
                common, reason = None, f" ({' '.join(str(error).split())})"
            if common is not None and self.kind(common) == kinds[0]:
                return common, kinds[0]
            msg = (
                f"{self.name} has no common dtype of the same kind for these: {self.describe_all(**operands)}{reason}. "
                f"{self._how_to_cast(_widest(map(self.dtype_name, dtypes)), **operands)}"
            )
            raise TypeError(msg)
        ranks = [KINDS.index(kind) if kind else -1 for kind in kinds]
        widest = self.dtype_name(dtypes[ranks.index(max(ranks))]) if max(ranks) != -1 else "float32"
        msg = (
            f"the dtypes must be of one kind, integer, real floating or complex floating: "
            f"{self.describe_all(**operands)}. {self._how_to_cast(widest, **operands)}"
        )
        raise TypeError(msg)

    def cast_call(self, name: str, array: Array, dtype: str) -> str:
        """The call that casts an array of that name, as a reader of a message types it."""
        if hasattr(array, "astype"):
            return f"{name}.astype({dtype!r})"
        return f"{self.package}.astype({name}, {self.package}.{dtype})"

    def _how_to_cast(self, dtype: str, **operands: Array) -> str:
        others = {name: array for name, array in operands.items() if self.dtype_name(array.dtype) != dtype}
        calls = [self.cast_call(name, array, dtype) for name, array in others.items() if name.isidentifier()]
        return f"Cast {' and '.join(others)} to {dtype} first" + (f": {', '.join(calls)}" if calls else "")

    # How it is timed.

    def stopwatch(self, device: Any) -> tuple[str, Callable[[], Any], Callable[[Any, Any], float], Any]:
        """How to time what runs on a device, as `Clock` of the benchmark has it.

        What is read, "host" or "device events"; a mark of now; the seconds between two marks; and what empties the
        caches of the device by writing more than they hold, or None on a CPU.
        """
        return "host", time.perf_counter, lambda start, end: end - start, None

    def _by_events(self, device: Any, event: Callable[[], Any], elapsed: Callable[[Any, Any], float]) -> Any:
        """A stopwatch by events in the queue of a device, with the milliseconds between two of them."""
        larger_than_caches = self.xp.zeros(LARGER_THAN_CACHES, dtype=self.xp.uint8, device=device)

        def mark() -> Any:
            now = event()
            now.record()
            return now

        def between(start: Any, end: Any) -> float:
            end.synchronize()
            return 1e-3 * float(elapsed(start, end))

        def flush() -> None:
            larger_than_caches[...] = 1
            self.wait(larger_than_caches)

        return "device events", mark, between, flush

    def bare_products(self, x: Array, W: Array, dy: Array) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """The products of a forward and of a backward and nothing else, into ready memory where there is such."""
        matmul = importlib.import_module(self.package).matmul
        y, dx, dW = map(self.xp.empty_like, (dy, x, W))
        return lambda: matmul(x, W, out=y), lambda: (matmul(dy, W.T, out=dx), matmul(x.T, dy, out=dW))

    # How the layer computes.

    def run(self, step: Callable[..., Result], plan: Any, *arrays: Any) -> Result:
        """Call ``step(plan, *arrays)``: a step computes with checked arrays, of which the first is no None."""
        return step(plan, *arrays)

    def aligned(self, array: Array, like: Array) -> Array:
        """An array whose rows are split into blocks, if a library does so, as those of another are."""
        return array

    def reshape(self, array: Array, shape: tuple[Any, ...]) -> Array:
        """An array in another shape, of which one extent may not be known yet."""
        if all(map(is_known, shape)):
            return self.xp.reshape(array, shape)
        inferred = tuple(extent if is_known(extent) else -1 for extent in shape)
        if inferred.count(-1) == 1 and 0 not in inferred:  # else -1 would be ambiguous
            try:
                return self.xp.reshape(array, inferred)
            except ValueError:  # Dask does not reshape what it does not know
                pass
        msg = (
            f"an array of shape {shape_text(array.shape)} cannot be reshaped to {shape_text(shape)} before its unknown "
            f"extents (?) are known. Find them first (in Dask: array.compute_chunk_sizes()), or pass a 2-D x"
        )
        raise ValueError(msg)

    def cast(self, array: Array, dtype: Any) -> Array:
        """An array in a dtype: itself, if it has that."""
        return array if array.dtype == dtype else self.xp.astype(array, dtype)

    def as_matrix(self, array: Array, shape: tuple[Any, ...] | None, dtype: Any) -> Array:
        """An array as a matrix in a dtype, which products can read; of a shape, or None if it is a matrix already."""
        return self.readable(self.cast(array if shape is None else self.reshape(array, shape), dtype))

    def is_readable(self, matrix: Array) -> bool:
        """Whether products read a matrix as it lies in memory."""
        return True

    def readable(self, matrix: Array) -> Array:
        """A matrix that products read as it lies in memory."""
        return matrix

    def buffer(self, out: Array, shape: tuple[int, ...] | None, dtype: Any) -> Array | None:
        """A view of `out`, in a shape if one is given, that the primitives can fill with a dtype; or None."""
        return None

    def primitives(
        self, *arrays: Array | None, extents: tuple[int | None, ...] = (None,)
    ) -> tuple[Callable[..., Array], Callable[..., Array]]:
        """`product` and `sum_rows` for some arrays: those of this class if one is of a type that is not in `types`.

        The extents of all factors, as far as they are known, may decide as well.
        """
        if all(array is None or type(array) in self.types for array in arrays):
            return self.product, self.sum_rows
        return partial(Backend.product, self), partial(Backend.sum_rows, self)

    def product(self, a: Array, c: Array, bias: Array | None = None, out: Array | None = None) -> Array:
        """a c + bias, of matrices and a vector of one dtype; in `out`, if that is given: what `buffer` returned."""
        y = self.matmul(a, c)
        if bias is not None:
            y = self.xp.add(y, bias[None, :])  # of two axes: JAX can be told to broadcast no others
        return written(y, out)

    def sum_rows(self, a: Array, out: Array | None = None) -> Array:
        """Σ over the rows of a matrix, as a vector of its dtype; in `out`, if that is given."""
        total = self.sum(a, 0, self.wide(a.dtype))
        return written(total if total.dtype == a.dtype else self.xp.astype(total, a.dtype), out)

    @staticmethod
    def transposed(matrix: Array) -> Array:
        """The transpose of a matrix."""
        return matrix.T

    def matmul(self, a: Array, c: Array) -> Array:
        """a c, of matrices or of each pair in two stacks of them."""
        return self.xp.matmul(a, c)

    def sum(self, array: Array, axis: int, dtype: Any) -> Array:
        """Σ along an axis, in a dtype: a term is rounded at most 63 (1 + log₆₄ N) times, where a running sum takes N.

        Each round adds 64 stretches of the axis to each other; what does not fill them waits for the next.
        """
        xp = self.xp
        terms = array.shape[axis]
        while isinstance(terms, int) and terms > _STRETCHES:
            before, after = array.shape[:axis], array.shape[axis + 1 :]
            length = terms // _STRETCHES
            whole, rest = (
                array[(slice(None),) * axis + (some, ...)]
                for some in (slice(_STRETCHES * length), slice(_STRETCHES * length, None))
            )
            stretches = xp.reshape(whole, (*before, _STRETCHES, length, *after))
            array = xp.concat([xp.sum(stretches, axis=axis, dtype=dtype), xp.astype(rest, dtype)], axis=axis)
            terms = array.shape[axis]
        return xp.sum(array, axis=axis, dtype=dtype)

    def squared_lengths(self, array: Array) -> Array:
        """Σ ``|a|²`` along the last axis."""
        squares = self.xp.vecdot(array, array)
        return self.xp.real(squares) if self.kind(squares.dtype) == "complex floating" else squares


def _widest(dtypes: Iterable[str]) -> str:
    """What dtypes of one kind can be cast to: the widest, signed if there is one; float32 of halves, which differ."""
    widest = max(dtypes, key=lambda name: (int(re.sub(r"\D", "", name)), not name.startswith("u")))
    return "float32" if widest.endswith("float16") else widest


def is_known(extent: Any) -> bool:
    """Whether a lazy library knows an extent yet: else it is None, or nan."""
    return extent is not None and extent == extent  # nan differs from itself


def shape_text(shape: Sequence[Any]) -> str:
    """A shape as Python writes it, with a question mark for an extent that is not known yet."""
    texts = [str(extent) if is_known(extent) else "?" for extent in shape]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def written(result: Array, out: Array | None) -> Array:
    """A result, copied into a buffer if there is one."""
    if out is None:
        return result
    if 0 not in out.shape:  # else there is nothing to write, and some libraries refuse to
        out[...] = result
    return out
