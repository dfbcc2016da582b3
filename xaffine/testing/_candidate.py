"""Beside an implementation: hand operands to it, call it, and tell what came out, without a word on what is right.

This runs in the process of the implementation, which is one of its own where `_subject` starts this module.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xaffine import backends
from xaffine.backends import backend_of
from xaffine.backends.standard import is_known
from xaffine.testing._lines import last_user_line, printable
from xaffine.testing._process import serve
from xaffine.testing._target import TargetError, import_target
from xaffine.testing._timer import NoAnswerError, time_limit
from xaffine.testing.adapters import adapt, has_backward, takes_batch_axes
from xaffine.testing.cases import viewed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xaffine.backends import Array, Backend
    from xaffine.testing._process import Channel
    from xaffine.testing.adapters import Make

__all__ = ["LARGEST", "Candidate", "Facts", "Placed", "RaisedError", "Returned", "prepare", "with_article"]


_LONGEST = 4000  # characters of a message that are told
LARGEST = 1 << 30  # bytes of a result that are read


class RaisedError(AssertionError):
    """The implementation raised an exception, or made no layer; `clean` where it can be taken for a refusal."""

    def __init__(self, message: str, *, clean: bool = True) -> None:
        super().__init__(message)
        self.clean = clean


class Placed(NamedTuple):
    """Where an operand lies in memory, and how."""

    dtype: str
    layout: str
    shape: tuple[int, ...]
    format: str
    """The dtype that NumPy holds the values in."""
    size: int
    """How many elements there are, with the neighbours."""
    start: int
    """The byte at which they begin."""


class Returned(NamedTuple):
    """An array that came out, or what came in place of one."""

    kind: str
    """The name of its type, or "None"."""
    is_own: bool = False
    """Whether it is an array of the library of x."""
    is_like_x: bool = False
    """Whether it has the very type of x."""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    device: str | None = None
    number: int = -1
    """Under which it can be read again."""
    values: np.ndarray | None = None


class Facts(NamedTuple):
    """What there is to know of an implementation before it is called."""

    backend: str
    takes_batch_axes: bool
    has_backward: bool
    adapter: str = "layer"
    version: str = ""
    device: str = ""
    device_index: int | None = None
    """Among the devices of the backend; None for the default one."""
    dtypes: Sequence[str] = ()
    """Those of the backend."""
    supports: Sequence[str] | None = None
    """What it declares; of what is no collection of names, a text."""


class Candidate:
    """An implementation, called with one case after the other."""

    def __init__(self, make: Make, backend: Backend, device: Any = None) -> None:
        self.make, self.backend, self.device = make, backend, device
        self._on_host = False
        if backend.has_strides:  # where arrays come to lie: a library may have been told another default device
            array = backend.from_values(np.zeros(1), "float32", device=device)
            self._on_host = not backend.is_gpu(backend.device_of(array))

    def perform(self, steps: Sequence[Any], memory: Callable[[Placed], np.ndarray]) -> Iterator[Returned]:
        """Take steps, each a name of a method without its underscore, and arguments; `memory` gives that of operands.

        Raises
        ------
        RaisedError
            The implementation raised an exception.
        """
        self._flat = memory
        for name, *arguments in steps:
            yield getattr(self, f"_{name}")(*arguments)

    def _begin(self, n_batch_axes: int | None, operands: dict[str, Any]) -> Returned:
        """Make a layer for a case; what x is comes back, without its values."""
        self.placed = {name: Placed(*each)._replace(shape=tuple(each[2])) for name, each in operands.items()}
        self.kept: list[Array] = []
        self.memory: dict[str, Array] = {}
        self.inputs = {name: self._operand_of(name, placed) for name, placed in self.placed.items()}
        options = {"n_batch_axes": n_batch_axes} if takes_batch_axes(self.make) else {}
        self._make = partial(self.make, **options)
        self.layer = _call("making the layer", self._make, self.inputs["W"], self.inputs.get("b"))
        if not (callable(self._method("forward")) and callable(self._method("backward"))):
            msg = f"make(W, b) gave {with_article(_kind(self.layer))}, not a layer with forward and backward"
            raise RaisedError(msg)
        return self._told("x", self.inputs["x"], read=False)

    def _operand_of(self, name: str, placed: Placed) -> Array:
        flat, backend = self._flat(placed), self.backend
        if not backend.has_strides:
            values = viewed(np, flat, placed)
            self.memory[name] = backend.from_values(np.asarray(values, order="C"), placed.dtype, device=self.device)
            return self.memory[name]
        native = backend.over(flat) if self._on_host and flat.dtype.name == placed.dtype else None
        if native is None:
            native = backend.from_values(flat, placed.dtype, device=self.device)
        self.memory[name] = native
        return viewed(backend.xp, native, placed)

    def _forward(self, operand: str, fill: int | None = None, shape: Sequence[int] | None = None) -> Returned:
        """Call forward with an operand, or with an array of one value in its place; y."""
        x = self._given(operand, fill, shape)
        return self._told("forward", _call("forward", lambda: self._method("forward")(x)))

    def _backward(self, operand: str, fill: int | None = None, shape: Sequence[int] | None = None) -> Returned:
        """Call backward likewise; dx."""
        dy = self._given(operand, fill, shape)
        return self._told("backward", _call("backward", lambda: self._method("backward")(dy)))

    def _another(self) -> Returned:
        """Make and use a second layer of the same shapes, as in a network, and go on with the first."""
        first = self.layer
        W, b, x, dy = (self._given(name, 1, None) if name in self.inputs else None for name in ("W", "b", "x", "dy"))
        self.layer = _call("making a second layer", self._make, W, b)
        _call("forward of a second layer", lambda: self._method("forward")(x))
        _call("backward of a second layer", lambda: self._method("backward")(dy))
        self.layer = first
        return Returned("None")

    def _gradient(self, name: str) -> Returned:
        """dW or db."""
        return self._told(name, _call(name, self._stored, name))

    def _again(self, number: int) -> Returned:
        """What was returned before, as it is now."""
        return self._told("an earlier result", self.kept[number])

    def _operand(self, name: str) -> Returned:
        """An operand as it is now."""
        return self._told(name, self.inputs[name])

    def _memory(self, name: str) -> Returned:
        """The memory of an operand as it is now, with its neighbours."""
        return self._told(name, self.memory[name])

    def _write(self, name: str) -> Returned:
        """Write to an operand, where that is possible."""
        array, backend = self.inputs[name], self.backend
        # What is written to a lazy array would only be noted down.
        writable = not backend.is_lazy(array) and backend.why_not_writable(array) is None
        if writable and self.placed[name].layout != "broadcast":
            with backend.on_device_of(array):
                array[...] = array + array + 1
        return Returned("None")

    def _rebind(self, name: str, value: int) -> Returned:
        """Bind a parameter of the layer anew."""
        if getattr(self.layer, name, None) is not None:
            anew = self._given(name, value, None)
            with suppress(Exception):  # a layer may refuse it
                setattr(self.layer, name, anew)
        return Returned("None")

    def _given(self, name: str, fill: int | None, shape: Sequence[int] | None) -> Array:
        if fill is None:
            return self.inputs[name]
        placed = self.placed[name]
        values = np.full(placed.shape if shape is None else tuple(shape), fill, placed.format)
        return self.backend.from_values(values, placed.dtype, device=self.device)

    def is_usable(self) -> bool:
        """Whether the device still computes: an access out of bounds ends it for the whole process."""
        try:
            self.backend.wait(self.backend.from_values(np.zeros(1), "float32", device=self.device))
        except Exception:  # whatever the library raises
            return False
        return True

    def _method(self, name: str) -> Any:
        """What is called: looked up each time, since a layer may change its own."""
        return getattr(self.layer, name, self.layer if name == "forward" else None)

    def _stored(self, name: str) -> Any:
        """dW or db; of a layer with a list ``grads`` of both instead, a copy, since it fills them anew."""
        if name[1] not in self.inputs:
            return getattr(self.layer, name, None)
        if not hasattr(self.layer, name) and isinstance(grads := getattr(self.layer, "grads", None), list):
            return copy.deepcopy(grads["Wb".index(name[1])])
        return getattr(self.layer, name)

    def _told(self, source: str, result: Any, *, read: bool = True) -> Returned:
        try:
            is_own = backend_of(result) is self.backend
        except TypeError:
            is_own = False
        if not is_own:
            return Returned(_kind(result))
        values = _call(f"reading {source}", self._values, result) if read else np.zeros(0)
        # A lazy library may show a shape only with the values.
        shape = tuple(result.shape) if all(map(is_known, result.shape)) else values.shape
        self.kept.append(result)
        device = self.backend.device_of(result)
        return Returned(
            _kind(result), is_own, type(result) is type(self.inputs["x"]), shape, str(result.dtype).rpartition(".")[2],
            None if device is None else self.backend.device_name(device), len(self.kept) - 1, values,
        )  # fmt: skip

    def _values(self, array: Array) -> np.ndarray:
        """A copy, once the device has computed it."""
        self.backend.wait(array)
        values = self.backend.to_numpy(array)
        if values.nbytes > LARGEST:
            msg = f"an array of shape {values.shape} is larger than any that is right"
            raise ValueError(msg)
        return np.array(values, None if values.dtype.kind in "biufc" else np.float32, order="C")  # bfloat16 as float32


def _kind(thing: Any) -> str:
    return "None" if thing is None else f"{type(thing).__module__}.{type(thing).__qualname__}"


def with_article(kind: str) -> str:
    """What a sentence says of a `Returned.kind`."""
    return kind if kind == "None" else f"a {kind}"


def _call(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call what belongs to the implementation: whatever it raises means that the property does not hold."""
    try:
        return function(*arguments, **options)
    except (Exception, SystemExit) as error:
        try:
            text = str(error)
        except Exception as another:  # which its class may raise
            text = f"no text, since its str() raises {type(another).__name__}"
        msg = printable(f"{what} raised {type(error).__name__}: {text[:_LONGEST]}\n  {last_user_line(error)}")
        raise RaisedError(msg, clean=isinstance(error, Exception)) from error


def prepare(
    make: Any, *, backend: Any = None, adapter: Any = None, device: Any = None, tf32: bool = False
) -> tuple[Candidate, Facts]:
    """Make a candidate of what is to be checked, and tell what it is; the library computes in full precision from now.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; ImportError and RuntimeError as `xaffine.backends.get`.
    """
    if not all(map(callable, make if isinstance(make, tuple) else (make,))):
        msg = f"make must be callable as make(W, b) and return a layer; it is a {type(make).__name__}"
        raise TypeError(msg)
    supports = getattr(make, "supports", None)
    if isinstance(supports, Collection) and not isinstance(supports, str):
        supports = [name if isinstance(name, str) else repr(name) for name in supports]
    make, adapter, backend = adapt(make, backend, adapter)
    library = backends.get(backend)
    library.use_full_precision()
    if tf32:
        library.use_tf32()
    own = None if device is None else library.device(device)
    facts = Facts(
        adapter=adapter,
        backend=library.name,
        version=library.version,
        device=library.device_name(library.devices[0] if own is None else own),
        device_index=None if own is None else library.devices.index(own),
        dtypes=library.dtypes(own),
        takes_batch_axes=takes_batch_axes(make),
        has_backward=has_backward(make, library, own),
        supports=supports if supports is None or isinstance(supports, list) else repr(supports),
    )
    return Candidate(make, library, own), facts


class _Memory:
    """A file in which the judge places operands, and from which it reads results."""

    def __init__(self, file: int) -> None:
        self.file, self._map = file, mmap.mmap(-1, 1)

    def at(self, placed: Placed) -> np.ndarray:
        """The memory of an operand."""
        if placed.start + placed.size * np.dtype(placed.format).itemsize > len(self._map):
            self._map = mmap.mmap(self.file, 0)
        return np.frombuffer(self._map, placed.format, placed.size, placed.start)


def _fingerprint() -> dict[tuple[Any, str], Any]:
    """What stands beside the implementation: the functions of the verifier and of the backends."""
    found: dict[tuple[Any, str], Any] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(("xaffine.testing", "xaffine.backends", "__main__")):
            owners = [module, *(each for each in vars(module).values() if isinstance(each, type))]
            found |= {(o, key): value for o in owners for key, value in vars(o).items() if callable(value)}
    return found


def _replaced(trusted: dict[tuple[Any, str], Any]) -> str | None:
    """The name of something in a fingerprint that is something else by now."""
    for (owner, key), value in trusted.items():
        if vars(owner).get(key) is not value:
            return f"{owner.__name__}.{key}"
    return None


def _work(channel: Channel, *, target: str, file: int, **how: Any) -> None:
    """Answer the requests of the judge."""
    with suppress(AttributeError, OSError):  # on Linux: nothing of it outlives its judge
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
    trusted = _fingerprint()
    try:
        candidate, facts = prepare(import_target(target), **how)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise TargetError(str(error)) from error
    channel("facts", **facts._asdict())
    memory = _Memory(file)
    for request in channel:
        answer: dict[str, Any] = {"returned": []}
        position = request["results"]
        try:
            with time_limit(request["seconds"]):
                for returned in candidate.perform(request["steps"], memory.at):
                    told = returned._asdict()
                    if returned.values is not None:
                        told["values"] = [returned.values.dtype.str, returned.values.shape]
                        position += os.pwrite(file, returned.values.data, position)
                    answer["returned"].append(told)
        except RaisedError as error:
            answer |= {"raised": str(error), "clean": error.clean, "usable": candidate.is_usable()}
        except NoAnswerError as error:
            answer["hung"] = str(error)
        if request["last"]:
            answer["replaced"] = _replaced(trusted)
        channel("answer", number=request["number"], **answer)


if __name__ == "__main__":
    serve(_work)
