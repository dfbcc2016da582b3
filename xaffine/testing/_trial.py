"""One trial of an implementation: its layer, called with the operands of a case, and comparisons of what it returns."""

from __future__ import annotations

import copy
import inspect
import os
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from xaffine.backends import backend_of
from xaffine.testing.cases import worst_error

if TYPE_CHECKING:
    from xaffine.backends import Array, Backend
    from xaffine.testing.cases import Case, Exact

__all__ = [
    "Make", "Trial", "full_like", "last_line_of", "last_user_line", "require", "require_equal", "require_within", "run",
    "run_forward", "takes_batch_axes",
]  # fmt: skip

Make: TypeAlias = Callable[..., Any]
"""``make(W, b)``, or ``make(W, b, n_batch_axes=k)``, returns a layer."""


def takes_batch_axes(make: Make) -> bool:
    """Whether a factory has a parameter ``n_batch_axes``.

    Parameters
    ----------
    make : callable
        The factory.

    Returns
    -------
    bool
        False also where it has no signature to look at.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> takes_batch_axes(AffineLayer), takes_batch_axes(lambda W, b: None)
    (True, False)
    """
    try:
        return "n_batch_axes" in inspect.signature(make).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


class Trial:
    """One layer, made for a case, with the operands of the case as arrays of the backend."""

    def __init__(self, make: Make, case: Case, backend: Backend, device: Any) -> None:
        self.case, self.backend, self.device = case, backend, device
        self.inputs = {name: operand.on(backend, device) for name, operand in case.operands.items()}
        options = {"n_batch_axes": case.n_batch_axes} if takes_batch_axes(make) else {}
        self.layer = _call("making the layer", make, self.inputs["W"], self.inputs.get("b"), **options)
        for method in (self._method("x"), self._method("dy")):
            require(callable(method), f"make(W, b) gave {_kind(self.layer)}, not a layer with forward and backward")

    def forward(self, x: Array) -> Array:
        """Forward: y."""
        return self._own("forward", _call("forward", lambda: self._method("x")(x)))

    def backward(self, dy: Array) -> Array:
        """Backward: dx."""
        return self._own("backward", _call("backward", lambda: self._method("dy")(dy)))

    def gradients(self) -> dict[str, Array]:
        """Backward: dx, dW, and db if there is a bias."""
        gradients = {"dx": self.backward(self.inputs["dy"]), **self._parameter_gradients()}
        if self.case.b is None:
            db = _call("db", getattr, self.layer, "db", None)
            require(db is None, f"db is not None without a bias, but {_kind(db)}")
        return gradients

    def results(self) -> dict[str, Array]:
        """Forward and backward: y, dx, dW, db."""
        return {"y": self.forward(self.inputs["x"]), **self.gradients()}

    def _method(self, operand: str) -> Any:
        """What is called with x or with dy: looked up each time, since a layer may change its own."""
        return getattr(self.layer, "forward", self.layer) if operand == "x" else getattr(self.layer, "backward", None)

    def _stored(self, name: str) -> Any:
        """dW or db; of a layer with a list ``grads`` of both instead, a copy, since it fills them anew."""
        if not hasattr(self.layer, name) and isinstance(grads := getattr(self.layer, "grads", None), list):
            return copy.deepcopy(grads["Wb".index(name[1])])
        return getattr(self.layer, name)

    def _parameter_gradients(self) -> dict[str, Array]:
        """dW and, with a bias, db."""
        names = [name for name in ("dW", "db") if name[1] in self.inputs]
        return {name: self._own(name, _call(name, self._stored, name)) for name in names}

    def in_numpy(self, native: dict[str, Array]) -> dict[str, np.ndarray]:
        """Some arrays as NumPy has them."""
        return {name: self.backend.to_numpy(array) for name, array in native.items()}

    def require_rejection(self, operand: str, shape: tuple[int, ...]) -> None:
        """Assert that an x or dy of that shape raises and leaves dW and db as they are."""
        before = {name: array.copy() for name, array in self.in_numpy(self._parameter_gradients()).items()}
        right = self.case.operands[operand]
        wrong = replace(right, values=np.zeros(shape, right.values.dtype), layout="C")
        accepted = True
        try:
            self._method(operand)(wrong.on(self.backend, self.device))
        except (Exception, SystemExit):  # which error it is, is the implementation's own contract
            accepted = False
        require(not accepted, f"{operand} of shape {shape} is accepted where {right.values.shape} belongs")
        after = self.in_numpy(self._parameter_gradients())
        require_equal(after, before, f"after a rejected {operand} of shape {shape}, ")

    def _own(self, source: str, result: Any) -> Array:
        """Assert that a result is an array of the library of x."""
        try:
            backend: Backend | None = backend_of(result)
        except TypeError:
            backend = None
        expected = self.backend
        require(backend is expected, f"{source} gave {_kind(result)}, not an array of {expected.name}")
        return result


def full_like(backend: Backend, array: Array, value: int) -> Array:
    """An array like another one, with one value everywhere."""
    with backend.on_device_of(array):  # array-api-compat drops the argument `device` of CuPy
        return backend.xp.full_like(array, value)


def _kind(thing: Any) -> str:
    return "None" if thing is None else f"a {type(thing).__module__}.{type(thing).__qualname__}"


def _call(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call what belongs to the implementation: whatever it raises means that the property does not hold."""
    try:
        return function(*arguments, **options)
    except (Exception, SystemExit) as error:
        msg = f"{what} raised {type(error).__name__}: {error}\n  {last_user_line(error)}"
        raise AssertionError(msg) from error


_FOLDERS = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_LIBRARIES = tuple(f"{folder}{os.sep}" for folder in [str(Path(__file__).parents[1]), *_FOLDERS])


def last_user_line(error: BaseException) -> str:
    """The last line of a traceback that is neither Python's, nor an installed library's, nor xaffine's.

    Parameters
    ----------
    error : BaseException
        One that was raised.

    Returns
    -------
    str
        File, line and code.

    Examples
    --------
    >>> try:
    ...     1 / 0
    ... except ZeroDivisionError as error:
    ...     print(last_user_line(error).partition(":")[0])
    <doctest xaffine.testing._trial.last_user_line[0]>
    """
    return last_line_of(traceback.extract_tb(error.__traceback__))


def last_line_of(frames: list[traceback.FrameSummary]) -> str:
    """The last of some frames that is the user's own, or the last one if all belong to libraries."""
    if not frames:
        return "(no traceback)"
    own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<frozen "))]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"


def run_forward(make: Make, case: Case, backend: Backend, device: Any) -> dict[str, np.ndarray]:
    """One forward: y."""
    trial = Trial(make, case, backend, device)
    return trial.in_numpy({"y": trial.forward(trial.inputs["x"])})


def run(make: Make, case: Case, backend: Backend, device: Any) -> dict[str, np.ndarray]:
    """One forward and backward: y, dx, dW and db as NumPy arrays of the shapes they owe; no db without a bias."""
    trial = Trial(make, case, backend, device)
    results = trial.in_numpy(trial.results())
    for name, result in results.items():
        shape, _ = case.owed[name]
        require(result.shape == shape, f"{name} has shape {result.shape}, not {shape}")
    return results


def require(holds: bool, message: str) -> None:
    """Raise an AssertionError unless something holds: also under ``python -O``, where no assert does."""
    if not holds:
        raise AssertionError(message)


def require_equal(results: dict[str, np.ndarray], expected: dict[str, np.ndarray], when: str = "") -> None:
    """Assert that results have the shapes that are expected of them, and are equal to the last bit."""
    for name, right in expected.items():
        got = results[name]
        require(got.shape == right.shape, f"{when}{name} has shape {got.shape}, not {right.shape}")
        differs = np.argwhere((got != right) & ((got == got) | (right == right)))  # a NaN is itself again
        if len(differs):
            require(False, when + _difference(name, got, right, tuple(map(int, differs[0])), ""))


def require_within(results: dict[str, np.ndarray], exact: dict[str, Exact], names: str, bound: float) -> float:
    """Assert that the errors of some results are at most `bound` times their rounding bounds."""
    worst = 0.0
    for name in names.split():
        if name in exact:
            got, shape = results[name], exact[name].shape
            require(got.shape == shape, f"{name} has shape {got.shape}, not {shape}")
            same_kind = np.iscomplexobj(got) == (len(exact[name].magnitude) == 2)
            require(same_kind, f"{name} has dtype {got.dtype}, of the wrong kind")
            ratio, where = worst_error(got, exact[name])
            worst = max(worst, ratio)
            if ratio > bound:
                times = f", {ratio:.3g} times its rounding bound" if bound else ""
                require(False, _difference(name, got, exact[name].value, where, times))
    return worst


def _difference(name: str, got: np.ndarray, expected: np.ndarray, where: tuple[int, ...], more: str) -> str:
    index = f"[{', '.join(map(str, where))}]" if where else ""
    message = f"{name}{index} is {got[where]}, not {expected[where]}{more}"
    if got.size > 1:
        message += f"\n{name} came out as\n{got}\nand was expected as\n{expected}"
    return message
