"""The properties of an affine layer, each a function that any implementation can be put through.

A check takes ``make``, a `Case` and a `Backend`; ``make(W, b)`` returns an object with ``forward(x) -> y`` (or that can
be called) and ``backward(dy) -> dx`` that leaves dW and db in attributes of those names, as `xaffine.AffineLayer` does.
If ``make`` has a parameter ``n_batch_axes``, it is handed that of the case. A check returns the worst error as a
fraction of its rounding bound (0 where the comparison is exact), or None for a case that it has nothing to say of, and
raises `AssertionError`, with the case, where the property does not hold.

>>> from xaffine import AffineLayer, backends
>>> from xaffine.testing import checks, make_case
>>> checks.forward_is_exact(AffineLayer, make_case((5, 3), 2, seed=0), backends.get("numpy"))
0.0
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine.testing._trial import (
    Trial,
    full_like,
    in_numpy,
    require,
    require_equal,
    require_within,
    run,
    run_forward,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from xaffine.backends import Backend
    from xaffine.testing.adapters import Make
    from xaffine.testing.cases import Case

__all__ = [
    "PROPERTIES", "Property", "backward_belongs_to_latest_forward", "backward_is_exact", "backward_is_linear",
    "backward_is_within_bounds", "batch_is_the_sum_of_its_parts", "differences_are_adjoint_to_gradients",
    "forward_is_exact", "forward_is_within_bound", "inputs_are_left_alone", "permuted_rows_permute_results",
    "primitives_agree", "rebound_parameters_are_not_seen", "rejected_dy_changes_nothing", "rejected_x_changes_nothing",
    "results_are_fresh", "results_match_their_primals",
]  # fmt: skip

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
    return require_within(run_forward(make, case, backend, device), case.exact(), "y", 0)


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
    return require_within(run(make, case, backend, device), case.exact(), "dx dW db", 0)


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
    return require_within(run_forward(make, case, backend, device), case.exact(), "y", 1)


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
    return require_within(run(make, case, backend, device), case.exact(), "dx dW db", 1)


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
    base = run(make, case, backend, device)
    for name, primal in case.operands.items():
        if name == "dy":
            continue
        step = rng.integers(0, 2, primal.values.shape).astype(primal.values.dtype)
        moved = run(make, case.replace_values(**{name: primal.values + step}), backend, device)
        forward = _inner(moved["y"], case.dy.values) - _inner(base["y"], case.dy.values)
        backward = _inner(step, base[f"d{name}"])
        require(forward == backward, f"a step in {name} changes L by {forward}, by d{name} {backward}")
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
    at_dy = run(make, case, backend, device)
    at_g = run(make, case.replace_values(dy=g), backend, device)
    at_sum = run(make, case.replace_values(dy=dy + g), backend, device)
    require_equal(at_sum, {name: at_dy[name] + at_g[name] for name in at_sum if name != "y"})
    return 0.0


def batch_is_the_sum_of_its_parts(make: Make, case: Case, backend: Backend, device: Any = None) -> float | None:
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
        return None
    cut = int(np.random.default_rng(case.seed + 3).integers(1, case.batch[0]))
    whole = run(make, case, backend, device)
    first, second = (run(make, _rows(case, rows), backend, device) for rows in (slice(cut), slice(cut, None)))
    rows = {name: np.concatenate([first[name], second[name]]) for name in ("y", "dx") if name in whole}
    sums = {name: first[name] + second[name] for name in whole if name not in rows}
    require_equal(whole, rows | sums)
    return 0.0


def permuted_rows_permute_results(make: Make, case: Case, backend: Backend, device: Any = None) -> float | None:
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
        return None
    order = np.random.default_rng(case.seed + 4).permutation(case.batch[0])
    straight = run(make, case, backend, device)
    permuted = run(make, _rows(case, order), backend, device)
    require_equal(permuted, straight | {name: straight[name][order] for name in ("y", "dx") if name in straight})
    return 0.0


def _rows(case: Case, rows: Any) -> Case:
    return case.replace_values(x=case.x.values[rows], dy=case.dy.values[rows])


def _inner(a: np.ndarray, b: np.ndarray) -> Any:
    """⟨a, b⟩ without a conjugate, in arithmetic wide enough to be exact."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.nan
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
    trial = Trial(make, case, backend, device)
    for name, result in trial.results().items():
        (shape, dtype), x = case.owed[name], trial.x
        require(result.is_like_x, f"{name} is a {result.kind}, not a {x.kind}")
        require(result.shape == shape, f"{name} has shape {result.shape}, not {shape}")
        require(result.dtype == dtype, f"{name} has dtype {result.dtype}, not {dtype}")
        require(None in (result.device, x.device) or result.device == x.device,
                f"{name} is on {result.device}, not {x.device}")  # fmt: skip
    return 0.0


def inputs_are_left_alone(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """Forward and backward write to none of x, W, b and dy, nor to what lies beside them in memory.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> inputs_are_left_alone(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    trial = Trial(make, case, backend, device)
    trial.results()
    trial.require_operands_untouched()
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
    trial = Trial(make, case, backend, device)
    first = trial.results()
    before = in_numpy(first)
    trial.forward(0)
    if trial.subject.facts.has_backward:
        trial.backward(0)
    require_equal(trial.again(first), before, "after a later call, the earlier ")
    again = trial.results()
    require_equal(in_numpy(again), before, "in the same call again, ")
    trial.take(*(("write", name) for name in case.operands))
    trial.subject.overwrite()
    require_equal(trial.again(again), before, "after a write to the inputs, ")
    return 0.0


def backward_belongs_to_latest_forward(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """Gradients are those of the latest forward and of one backward, however many there were, of this layer alone.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> backward_belongs_to_latest_forward(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    trial, exact = Trial(make, case, backend, device), case.exact()
    trial.forward(0)
    trial.backward(0)
    for _ in range(4):
        require_within(in_numpy(trial.results()), exact, "y dx dW db", 0)
        require_within(in_numpy(trial.gradients()), exact, "dx dW db", 0)
    trial.forward()
    trial.take(("another",))
    return require_within(in_numpy(trial.gradients()), exact, "dx dW db", 0)


# Tier 5: manners. Without them an implementation is right, and hard to use.


def rebound_parameters_are_not_seen(make: Make, case: Case, backend: Backend, device: Any = None) -> float:
    """A W and b that are bound anew between forward and backward change nothing in that backward.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.backends import get
    >>> from xaffine.testing import make_case
    >>> rebound_parameters_are_not_seen(AffineLayer, make_case((4, 3), 2, seed=0), get("numpy"))
    0.0
    """
    trial = Trial(make, case, backend, device)
    trial.forward()
    trial.take(*(("rebind", name, 7) for name in ("W", "b") if name in case.operands))
    return require_within(in_numpy(trial.gradients()), case.exact(), "dx dW db", 0)


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
    trial = Trial(make, case, backend, device)
    trial.results()
    *batch, m = case.dy.values.shape
    wrong = [(*batch, m + 1), (1, *batch, m)]
    if batch:
        wrong += [(rows, *batch[1:], m) for rows in (batch[0] + 1, 1) if rows != batch[0]]
    for shape in wrong:
        trial.require_rejection("dy", shape)
    return require_within(in_numpy(trial.gradients()), case.exact(), "dx dW db", 0)


def rejected_x_changes_nothing(make: Make, case: Case, backend: Backend, device: Any = None) -> float | None:
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
        return None  # one more would be a sample, or still no feature
    trial = Trial(make, case, backend, device)
    trial.results()
    trial.require_rejection("x", (*before, last + 1))
    return require_within(in_numpy(trial.gradients()), case.exact(), "dx dW db", 0)


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
        full = {name: full_like(backend, array, 7) for name, array in arrays.items()}
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
            require(buffers[name] is None or array is buffers[name], f"what belongs to {name} is not in its buffer")
            dtype = arrays[name].dtype
            require(array.dtype == dtype, f"what belongs to {name} came in {array.dtype}, not {dtype}")
        results = {"y" if name == "dy" else f"d{name}": backend.to_numpy(array) for name, array in native.items()}
        worst = max(worst, require_within(results, exact, " ".join(results), bound))
    return worst


@dataclass(frozen=True)
class Property:
    """One sentence that holds for a right implementation.

    Parameters
    ----------
    tier : {"exact", "bounded", "calculus", "contract", "manners"}
        Which tier of proof it belongs to. An implementation without manners has right numbers.
    values : {"integers", "floats"}
        What values its cases hold.
    check : callable
        ``check(make, case, backend, device=None)``, which returns None for a case that it has nothing to say of.
    of_forward, of_vectors : bool
        Whether it also says something of an implementation that has no backward, or takes single samples alone.

    Examples
    --------
    >>> PROPERTIES[0].name, PROPERTIES[0].tier
    ('forward_is_exact', 'exact')
    """

    tier: str
    values: str
    check: Callable[..., float | None]
    of_forward: bool = False
    of_vectors: bool = True

    @property
    def name(self) -> str:
        """The name of the check."""
        return self.check.__name__

    @property
    def sentence(self) -> str:
        """What the property says."""
        return (self.check.__doc__ or "").strip().partition("\n\n")[0]


PROPERTIES = (
    Property("exact", "integers", forward_is_exact, of_forward=True),
    Property("exact", "integers", backward_is_exact),
    Property("bounded", "floats", forward_is_within_bound, of_forward=True),
    Property("bounded", "floats", backward_is_within_bounds),
    Property("calculus", "integers", differences_are_adjoint_to_gradients),
    Property("calculus", "integers", backward_is_linear),
    Property("calculus", "integers", batch_is_the_sum_of_its_parts, of_forward=True, of_vectors=False),
    Property("calculus", "integers", permuted_rows_permute_results, of_forward=True, of_vectors=False),
    Property("contract", "integers", results_match_their_primals, of_forward=True),
    Property("contract", "integers", inputs_are_left_alone, of_forward=True),
    Property("contract", "integers", results_are_fresh, of_forward=True),
    Property("contract", "integers", backward_belongs_to_latest_forward),
    Property("manners", "integers", rebound_parameters_are_not_seen),
    Property("manners", "integers", rejected_dy_changes_nothing),
    Property("manners", "integers", rejected_x_changes_nothing),
)
"""All properties, cheapest proof first."""
