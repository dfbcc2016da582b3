"""One trial of an implementation: its layer, called with the operands of a case, and comparisons of what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine.testing._candidate import RaisedError, Returned, with_article
from xaffine.testing._subject import InProcess, Subject
from xaffine.testing.cases import worst_error

if TYPE_CHECKING:
    from xaffine.backends import Array, Backend
    from xaffine.testing.adapters import Make
    from xaffine.testing.cases import Case, Exact

__all__ = [
    "GradientWithoutBiasError", "RejectionError", "Trial", "full_like", "in_numpy", "require", "require_equal",
    "require_within", "run", "run_forward",
]  # fmt: skip


class RejectionError(AssertionError):
    """What was to be rejected, `operands` by name, was not, or it left a trace."""

    def __init__(self, message: str, operands: dict[str, np.ndarray]) -> None:
        super().__init__(message)
        self.operands = operands


class GradientWithoutBiasError(AssertionError):
    """There is a db, and no b."""


class Trial:
    """One layer, made for a case; `make` may be a `Subject` already."""

    def __init__(self, make: Make | Subject, case: Case, backend: Any = None, device: Any = None) -> None:
        self.case = case
        self.subject = make if isinstance(make, Subject) else InProcess.of(make, backend, device)
        self._before: list[Any] = [("begin", case.n_batch_axes, self.subject.place(case.operands))]
        self.x = Returned("")
        """What x is to the library."""

    def take(self, *steps: Any) -> list[Returned]:
        """Take steps of `xaffine.testing._candidate.Candidate`, in one request."""
        first, self._before = self._before, []
        returned = self.subject.perform(*first, *steps)
        if first:
            self.x = returned.pop(0)
        return returned

    def forward(self, fill: int | None = None) -> Returned:
        """Forward of x, or of as many equal values: y."""
        return self._own(self.take(("forward", "x", fill)), ["forward"])["forward"]

    def backward(self, fill: int | None = None) -> Returned:
        """Backward of dy, or of as many equal values: dx."""
        return self._own(self.take(("backward", "dy", fill)), ["backward"])["backward"]

    def gradients(self) -> dict[str, Returned]:
        """Backward: dx, dW, and db if there is a bias."""
        return self._results(("backward", "dy"))

    def results(self) -> dict[str, Returned]:
        """Forward and backward: y, dx, dW, db; y alone of what has no backward."""
        if not self.subject.facts.has_backward:
            return {"y": self.forward()}
        return self._results(("forward", "x"), ("backward", "dy"))

    def _results(self, *calls: Any) -> dict[str, Returned]:
        returned = self.take(*calls, ("gradient", "dW"), ("gradient", "db"))
        if self.case.b is None:
            db = returned.pop()
            if db.kind != "None":
                msg = f"db is not None without a bias, but a {db.kind}"
                raise GradientWithoutBiasError(msg)
        sources = [*(method for method, _ in calls), "dW", "db"][: len(returned)]
        names = {"forward": "y", "backward": "dx"}
        return {names.get(name, name): result for name, result in self._own(returned, sources).items()}

    def again(self, results: dict[str, Returned]) -> dict[str, np.ndarray]:
        """The values of some results as they are now."""
        steps = [("again", result.number) for result in results.values()]
        return dict(zip(results, map(_values, self.take(*steps)), strict=True))

    def require_operands_untouched(self) -> None:
        """Assert that the operands, and what lies beside them in memory, are what they were."""
        operands = self.case.operands
        now = self.take(*(("operand", name) for name in operands), *(("memory", name) for name in operands))
        values = dict(zip(operands, map(_values, now), strict=False))
        require_equal(values, {name: operand.values for name, operand in operands.items()})
        for (name, operand), memory in zip(operands.items(), now[len(operands) :], strict=True):
            for seen in (_values(memory), self.subject.memory(name)):
                same = seen.size == operand.values.size or np.array_equal(seen, operand.memory)
                require(same, f"what lies beside {name} in memory was written to")

    def require_rejection(self, operand: str, shape: tuple[int, ...]) -> None:
        """Assert that an x or dy of that shape raises and leaves dW and db as they are."""
        gradients = [("gradient", name) for name in ("dW", "db") if name[1] in self.case.operands]
        names = [name for _, name in gradients]
        before = in_numpy(self._own(self.take(*gradients), names))
        right, accepted = self.case.operands[operand].values, True
        try:
            self.take(("forward" if operand == "x" else "backward", operand, 0, shape))
        except RaisedError:  # which error it is, is the implementation's own contract
            accepted = False
        try:
            require(not accepted, f"{operand} of shape {shape} is accepted where {right.shape} belongs")
            after = in_numpy(self._own(self.take(*gradients), names))
            require_equal(after, before, f"after a rejected {operand} of shape {shape}, ")
        except AssertionError as error:
            raise RejectionError(str(error), {operand: np.zeros(shape, right.dtype)}) from None

    def _own(self, returned: list[Returned], sources: list[str]) -> dict[str, Returned]:
        """Assert that results are arrays of the library of x."""
        for source, result in zip(sources, returned, strict=True):
            require(
                result.is_own,
                f"{source} gave {with_article(result.kind)}, not an array of {self.subject.facts.backend}",
            )
        return dict(zip(sources, returned, strict=True))


def _values(returned: Returned) -> np.ndarray:
    """The values of an array of the implementation's library."""
    require(returned.values is not None, f"an array became a {returned.kind}")
    return returned.values  # type: ignore[return-value]


def in_numpy(results: dict[str, Returned]) -> dict[str, np.ndarray]:
    """The values of some results as they were when they came."""
    return {name: _values(result) for name, result in results.items()}


def full_like(backend: Backend, array: Array, value: int) -> Array:
    """An array like another one, with one value everywhere."""
    with backend.on_device_of(array):  # array-api-compat drops the argument `device` of CuPy
        return backend.xp.full_like(array, value)


def run_forward(make: Make, case: Case, backend: Backend, device: Any) -> dict[str, np.ndarray]:
    """One forward: y."""
    return in_numpy({"y": Trial(make, case, backend, device).forward()})


def run(make: Make, case: Case, backend: Backend, device: Any) -> dict[str, np.ndarray]:
    """One forward and backward: y, dx, dW and db as NumPy arrays of the shapes they owe; no db without a bias."""
    results = in_numpy(Trial(make, case, backend, device).results())
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
