"""The properties of an affine layer, each a function that any implementation can be put through.

A check takes ``make``, a `Case` and a `Backend`; ``make(W, b)`` returns an object with ``forward(x) -> y`` (or that can
be called) and ``backward(dy) -> dx`` that leaves dW and db in attributes of those names, as `xaffine.AffineLayer` does.
If ``make`` has a parameter ``n_batch_axes``, it is handed that of the case. A check returns the worst error as a
fraction of its rounding bound (0 where the comparison is exact) and raises `AssertionError`, with the case, where the
property does not hold.

>>> from xaffine import AffineLayer, backends
>>> from xaffine.testing import checks, make_case
>>> checks.forward_is_exact(AffineLayer, make_case((5, 3), 2, seed=0), backends.get("numpy"))
0.0
"""

from __future__ import annotations

import inspect
import itertools
import os
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from xaffine.backends import backend_of
from xaffine.backends.standard import is_known
from xaffine.testing.cases import worst_error

if TYPE_CHECKING:
    from xaffine.backends import Array, Backend
    from xaffine.testing.cases import Case, Exact

__all__ = [
    "PROPERTIES", "Make", "Property", "backward_belongs_to_latest_forward", "backward_is_exact", "backward_is_linear",
    "backward_is_within_bounds", "batch_is_the_sum_of_its_parts", "differences_are_adjoint_to_gradients",
    "forward_is_exact", "forward_is_within_bound", "inputs_are_left_alone", "last_user_line",
    "permuted_rows_permute_results", "primitives_agree", "rejected_dy_changes_nothing", "rejected_x_changes_nothing",
    "results_are_fresh", "results_match_their_primals", "takes_batch_axes",
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


class _Trial:
    """One layer, made for a case, with the operands of the case as arrays of the backend."""

    def __init__(self, make: Make, case: Case, backend: Backend, device: Any) -> None:
        self.case, self.backend, self.device = case, backend, device
        self.inputs = {name: operand.on(backend, device) for name, operand in case.operands.items()}
        options = {"n_batch_axes": case.n_batch_axes} if takes_batch_axes(make) else {}
        self.layer = _call("making the layer", make, self.inputs["W"], self.inputs.get("b"), **options)
        for method in (self._method("x"), self._method("dy")):
            _require(callable(method), f"make(W, b) gave {_kind(self.layer)}, not a layer with forward and backward")

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
            db = self._stored("db")
            _require(db is None, f"db is not None without a bias, but {_kind(db)}")
        return gradients

    def results(self) -> dict[str, Array]:
        """Forward and backward: y, dx, dW, db."""
        return {"y": self.forward(self.inputs["x"]), **self.gradients()}

    def _method(self, operand: str) -> Any:
        """What is called with x or with dy: looked up each time, since a layer may change its own."""
        return getattr(self.layer, "forward", self.layer) if operand == "x" else getattr(self.layer, "backward", None)

    def _stored(self, name: str) -> Any:
        return _call(name, getattr, self.layer, name)

    def _parameter_gradients(self) -> dict[str, Array]:
        """dW and, with a bias, db."""
        return {name: self._own(name, self._stored(name)) for name in ("dW", "db") if name[1] in self.inputs}

    def in_numpy(self, native: dict[str, Array]) -> dict[str, np.ndarray]:
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
        _require(not accepted, f"{operand} of shape {shape} is accepted where {right.values.shape} belongs")
        after = self.in_numpy(self._parameter_gradients())
        _require_equal(after, before, f"after a rejected {operand} of shape {shape}, ")

    def _own(self, source: str, result: Any) -> Array:
        """Assert that a result is an array of the library of x."""
        try:
            backend: Backend | None = backend_of(result)
        except TypeError:
            backend = None
        expected = self.backend
        _require(backend is expected, f"{source} gave {_kind(result)}, not an array of {expected.name}")
        return result


def _full_like(backend: Backend, array: Array, value: int) -> Array:
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
    <doctest xaffine.testing.checks.last_user_line[0]>
    """
    return last_line_of(traceback.extract_tb(error.__traceback__))


def last_line_of(frames: list[traceback.FrameSummary]) -> str:
    """The last of some frames that is the user's own, or the last one if all belong to libraries."""
    if not frames:
        return "(no traceback)"
    own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<frozen "))]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"


def _run_forward(make: Make, case: Case, backend: Backend, device: Any) -> dict[str, np.ndarray]:
    trial = _Trial(make, case, backend, device)
    return trial.in_numpy({"y": trial.forward(trial.inputs["x"])})


def _run(make: Make, case: Case, backend: Backend, device: Any) -> dict[str, np.ndarray]:
    """One forward and backward: y, dx, dW and db as NumPy arrays of the shapes they owe; no db without a bias."""
    trial = _Trial(make, case, backend, device)
    results = trial.in_numpy(trial.results())
    for name, result in results.items():
        shape, _ = case.owed[name]
        _require(result.shape == shape, f"{name} has shape {result.shape}, not {shape}")
    return results


def _require(holds: bool, message: str) -> None:
    # No assert: the proof must not vanish under python -O.
    if not holds:
        raise AssertionError(message)


def _require_equal(results: dict[str, np.ndarray], expected: dict[str, np.ndarray], when: str = "") -> None:
    """Assert that results have the shapes that are expected of them, and are equal to the last bit."""
    for name, right in expected.items():
        got = results[name]
        _require(got.shape == right.shape, f"{when}{name} has shape {got.shape}, not {right.shape}")
        if not np.array_equal(got, right):
            where = tuple(int(i) for i in np.argwhere(got != right)[0])
            _require(False, when + _difference(name, got, right, where, ""))


def _require_within(results: dict[str, np.ndarray], exact: dict[str, Exact], names: str, bound: float) -> float:
    """Assert that the errors of some results are at most `bound` times their rounding bounds."""
    worst = 0.0
    for name in names.split():
        if name in exact:
            got, shape = results[name], exact[name].shape
            _require(got.shape == shape, f"{name} has shape {got.shape}, not {shape}")
            same_kind = np.iscomplexobj(got) == (len(exact[name].magnitude) == 2)
            _require(same_kind, f"{name} has dtype {got.dtype}, of the wrong kind")
            ratio, where = worst_error(got, exact[name])
            worst = max(worst, ratio)
            if ratio > bound:
                times = f", {ratio:.3g} times its rounding bound" if bound else ""
                _require(False, _difference(name, got, exact[name].value, where, times))
    return worst


def _difference(name: str, got: np.ndarray, expected: np.ndarray, where: tuple[int, ...], more: str) -> str:
    index = f"[{', '.join(map(str, where))}]" if where else ""
    message = f"{name}{index} is {got[where]}, not {expected[where]}{more}"
    if got.size > 1:
        message += f"\n{name} came out as\n{got}\nand was expected as\n{expected}"
    return message


# Tier 1: exact.


def forward_is_exact(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """On small integers y is x W + b exactly.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> forward_is_exact(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    return _require_within(_run_forward(make, case, backend, device), case.exact(), "y", 0)


def backward_is_exact(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """On small integers dx is dy Wᵀ, dW is xᵀ dy and db is the sum of dy over the batch, exactly.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> backward_is_exact(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    return _require_within(_run(make, case, backend, device), case.exact(), "dx dW db", 0)


# Tier 2: bounded.


def forward_is_within_bound(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """On random floats the error of y is within its rounding bound.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> forward_is_within_bound(AffineLayer, make_case((4, 3), 2, seed=0, values="floats"), get("numpy")) <= 1
    True
    """
    return _require_within(_run_forward(make, case, backend, device), case.exact(), "y", 1)


def backward_is_within_bounds(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """On random floats the errors of dx, dW and db are within their rounding bounds.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> backward_is_within_bounds(AffineLayer, make_case((4, 3), 2, seed=0, values="floats"), get("numpy")) <= 1
    True
    """
    return _require_within(_run(make, case, backend, device), case.exact(), "dx dW db", 1)


# Tier 3: calculus. The operands are small integers, so every equation holds with ==.


def differences_are_adjoint_to_gradients(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """⟨f(p + v) − f(p), dy⟩ is ⟨v, gradient⟩ for a step v in x, in W or in b alone: f is affine in each.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> differences_are_adjoint_to_gradients(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    rng = np.random.default_rng(case.seed + 1)
    base = _run(make, case, backend, device)
    for name, primal in case.operands.items():
        if name == "dy":
            continue
        step = rng.integers(0, 2, primal.values.shape).astype(primal.values.dtype)
        moved = _run(make, case.replace_values(**{name: primal.values + step}), backend, device)
        forward = _inner(moved["y"], case.dy.values) - _inner(base["y"], case.dy.values)
        backward = _inner(step, base[f"d{name}"])
        _require(forward == backward, f"a step in {name} changes L by {forward}, by d{name} {backward}")
    return 0.0


def backward_is_linear(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """The gradients at dy + g are those at dy plus those at g.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> backward_is_linear(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    rng = np.random.default_rng(case.seed + 2)
    dy = case.dy.values
    g = rng.integers(0, 2, dy.shape).astype(dy.dtype)
    at_dy = _run(make, case, backend, device)
    at_g = _run(make, case.replace_values(dy=g), backend, device)
    at_sum = _run(make, case.replace_values(dy=dy + g), backend, device)
    _require_equal(at_sum, {name: at_dy[name] + at_g[name] for name in at_sum if name != "y"})
    return 0.0


def batch_is_the_sum_of_its_parts(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """Cut the batch in two: y and dx are those of the parts in a row, dW and db are sums of theirs.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> batch_is_the_sum_of_its_parts(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    if not case.batch or case.batch[0] < 2:
        return 0.0
    cut = int(np.random.default_rng(case.seed + 3).integers(1, case.batch[0]))
    whole = _run(make, case, backend, device)
    first, second = (_run(make, _rows(case, rows), backend, device) for rows in (slice(cut), slice(cut, None)))
    rows = {name: np.concatenate([first[name], second[name]]) for name in ("y", "dx")}
    sums = {name: first[name] + second[name] for name in whole if name not in rows}
    _require_equal(whole, rows | sums)
    return 0.0


def permuted_rows_permute_results(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """A permutation of the batch permutes y and dx and leaves dW and db.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> permuted_rows_permute_results(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    if not case.batch:
        return 0.0
    order = np.random.default_rng(case.seed + 4).permutation(case.batch[0])
    straight = _run(make, case, backend, device)
    permuted = _run(make, _rows(case, order), backend, device)
    _require_equal(permuted, straight | {name: straight[name][order] for name in ("y", "dx")})
    return 0.0


def _rows(case: Case, rows: Any) -> Case:
    return case.replace_values(x=case.x.values[rows], dy=case.dy.values[rows])


def _inner(a: np.ndarray, b: np.ndarray) -> Any:
    """⟨a, b⟩ without a conjugate, in arithmetic wide enough to be exact."""
    wide = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.int64
    return np.sum(a.astype(wide) * b.astype(wide))


# Tier 4: contract.


def results_match_their_primals(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """Gradients have the shape and dtype of their primals, y its own; all are of the library and device of x.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> results_match_their_primals(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    trial = _Trial(make, case, backend, device)
    x = trial.inputs["x"]
    for name, result in trial.results().items():
        shape, dtype = case.owed[name]
        _require(type(result) is type(x), f"{name} is a {type(result)}, not a {type(x)}")
        # A lazy library may show a shape only with the values.
        sized = result if all(map(is_known, result.shape)) else backend.to_numpy(result)
        _require(tuple(sized.shape) == shape, f"{name} has shape {sized.shape}, not {shape}")
        got = str(result.dtype).rpartition(".")[2]
        _require(got == dtype, f"{name} has dtype {got}, not {dtype}")
        devices = [backend.device_of(array) for array in (result, x)]
        _require(len({str(d) for d in devices if d is not None}) < 2, "{} is on {}, not {}".format(name, *devices))
    return 0.0


def inputs_are_left_alone(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """Forward and backward write to none of x, W, b and dy.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> inputs_are_left_alone(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    trial = _Trial(make, case, backend, device)
    trial.results()
    _require_equal(trial.in_numpy(trial.inputs), {name: operand.values for name, operand in case.operands.items()})
    return 0.0


def results_are_fresh(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """Results share no memory: neither later calls nor writes to the inputs change them; the same call repeats them.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> results_are_fresh(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    trial = _Trial(make, case, backend, device)
    first = trial.results()
    before = {name: array.copy() for name, array in trial.in_numpy(first).items()}
    trial.forward(_full_like(backend, trial.inputs["x"], 0))
    trial.backward(_full_like(backend, trial.inputs["dy"], 0))
    _require_equal(trial.in_numpy(first), before, "after a later call, the earlier ")
    again = trial.results()
    _require_equal(trial.in_numpy(again), before, "in the same call again, ")
    for name, array in trial.inputs.items():
        # What is written to a lazy array would only be noted down.
        writable = not backend.is_lazy(array) and backend.why_not_writable(array) is None
        if writable and case.operands[name].layout != "broadcast":
            with backend.on_device_of(array):
                array[...] = array + array + 1
    _require_equal(trial.in_numpy(again), before, "after a write to the inputs, ")
    return 0.0


def backward_belongs_to_latest_forward(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """After two forwards the gradients are those of the second; after two backwards, those of one.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> backward_belongs_to_latest_forward(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    trial = _Trial(make, case, backend, device)
    trial.forward(_full_like(backend, trial.inputs["x"], 0))
    trial.results()
    return _require_within(trial.in_numpy(trial.gradients()), case.exact(), "dx dW db", 0)


def rejected_dy_changes_nothing(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """A dy of a wrong shape raises, and the gradients and the next right backward are as if it had not come.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> rejected_dy_changes_nothing(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    trial = _Trial(make, case, backend, device)
    trial.results()
    *batch, m = case.dy.values.shape
    wrong = [(*batch, m + 1), (1, *batch, m)]
    if batch:
        wrong += [(rows, *batch[1:], m) for rows in (batch[0] + 1, 1) if rows != batch[0]]
    for shape in wrong:
        trial.require_rejection("dy", shape)
    return _require_within(trial.in_numpy(trial.gradients()), case.exact(), "dx dW db", 0)


def rejected_x_changes_nothing(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """An x with too many features raises, and the gradients and the backward are still those of the forward before.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> rejected_x_changes_nothing(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    *before, last = case.x.values.shape
    features = case.x.values.shape[len(case.batch) :]
    if not features or 0 in features[:-1]:
        return 0.0  # one more would be a sample, or still no feature
    trial = _Trial(make, case, backend, device)
    trial.results()
    trial.require_rejection("x", (*before, last + 1))
    return _require_within(trial.in_numpy(trial.gradients()), case.exact(), "dx dW db", 0)


def primitives_agree(first: Any, second: Any, case: Case, backend: Backend, device: Any = None) -> float:
    """Two pairs of primitives compute the same, into new arrays or into buffers.

    Parameters
    ----------
    first, second : tuple (product, sum_rows) of callables
        ``product(a, c, bias=None, out=None)`` is a c + bias and ``sum_rows(a, out=None)`` the sum over the rows, as
        `xaffine.backends.Backend` has them.
    case : Case
        With a matrix for x and operands of one dtype. On integers the results must be equal, on floats each within
        its rounding bound.
    backend : Backend
        That of the operands.
    device : optional
        One of the backend's devices.

    Returns
    -------
    float
        The worst error as a fraction of its rounding bound.

    Raises
    ------
    AssertionError
        They differ, with the case.

    Examples
    --------
    >>> from xaffine.backends import Backend, get
    >>> from xaffine.testing import make_case
    >>> backend = get("numpy")
    >>> standard = Backend(backend.namespace)
    >>> pairs = [(each.product, each.sum_rows) for each in (backend, standard)]
    >>> primitives_agree(*pairs, make_case((4, 3), 2, seed=0), backend)
    0.0
    """
    arrays = {name: operand.on(backend, device) for name, operand in case.operands.items()}
    dy, x, W, b = arrays["dy"], arrays["x"], arrays["W"], arrays.get("b")
    exact, bound = case.exact(), 1.0 if case.kind == "floats" else 0.0
    worst = 0.0
    for filled, (product, sum_rows) in itertools.product((False, True), (first, second)):
        # What a buffer held before must not show in the result.
        full = {name: _full_like(backend, array, 7) for name, array in arrays.items()}
        buffers = {name: backend.buffer(each, None, each.dtype) if filled else None for name, each in full.items()}
        with backend.on_device_of(x):
            native = {
                "dy": product(x, W, b, buffers["dy"]),
                "x": product(dy, W.T, None, buffers["x"]),
                "W": product(x.T, dy, None, buffers["W"]),
            }
            if b is not None:
                native["b"] = sum_rows(dy, buffers["b"])
        for name, array in native.items():
            _require(buffers[name] is None or array is buffers[name], f"what belongs to {name} is not in its buffer")
            dtype = arrays[name].dtype
            _require(array.dtype == dtype, f"what belongs to {name} came in {array.dtype}, not {dtype}")
        results = {"y" if name == "dy" else f"d{name}": backend.to_numpy(array) for name, array in native.items()}
        worst = max(worst, _require_within(results, exact, " ".join(results), bound))
    return worst


@dataclass(frozen=True)
class Property:
    """One sentence that holds for a right implementation.

    Parameters
    ----------
    tier : {"exact", "bounded", "calculus", "contract"}
        Which tier of proof it belongs to.
    values : {"integers", "floats"}
        What values its cases hold.
    check : callable
        ``check(make, case, backend, device=None)``.

    Examples
    --------
    >>> PROPERTIES[0].name, PROPERTIES[0].tier
    ('forward_is_exact', 'exact')
    """

    tier: str
    values: str
    check: Callable[..., float]

    @property
    def name(self) -> str:
        """The name of the check."""
        return self.check.__name__

    @property
    def sentence(self) -> str:
        """What the property says."""
        return (self.check.__doc__ or "").strip().partition("\n\n")[0]


PROPERTIES = (
    Property("exact", "integers", forward_is_exact),
    Property("exact", "integers", backward_is_exact),
    Property("bounded", "floats", forward_is_within_bound),
    Property("bounded", "floats", backward_is_within_bounds),
    Property("calculus", "integers", differences_are_adjoint_to_gradients),
    Property("calculus", "integers", backward_is_linear),
    Property("calculus", "integers", batch_is_the_sum_of_its_parts),
    Property("calculus", "integers", permuted_rows_permute_results),
    Property("contract", "integers", results_match_their_primals),
    Property("contract", "integers", inputs_are_left_alone),
    Property("contract", "integers", results_are_fresh),
    Property("contract", "integers", backward_belongs_to_latest_forward),
    Property("contract", "integers", rejected_dy_changes_nothing),
    Property("contract", "integers", rejected_x_changes_nothing),
)
"""All properties, cheapest proof first."""
