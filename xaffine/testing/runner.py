"""Put any affine layer through all properties: `check_affine`, its report, and its pytest form."""

from __future__ import annotations

import secrets
import signal
import threading
import time
import traceback
import zlib
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from xaffine import backends
from xaffine.testing import bounds
from xaffine.testing.cases import FEATURES, Case
from xaffine.testing.checks import PROPERTIES, Make, Property, last_line_of, takes_batch_axes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


__all__ = ["Plan", "PropertyError", "Report", "Result", "check_affine", "from_functions", "property_tests"]

Progress: TypeAlias = "Callable[[Part, int, Case], None]"
"""Called before every example with what is checked, the number of examples so far, and the case."""

_LONGEST = 1e6  # seconds; what a timer of any operating system can take

# What an implementation does that declares nothing: the shapes of the classic layer. Mapping the last axis is another
# reading of the same x, so no one does both without being told which.
_USUAL = tuple(feature for feature in FEATURES if feature != "last-axis")


class PropertyError(AssertionError):
    """A property does not hold.

    Attributes
    ----------
    reason : str
        What came out and what was expected.
    case : Case
        The smallest case found.
    code : str
        Python that runs the check on that case.
    finished : bool
        False if the case gave no answer within the time limit, which shows no wrong result.

    Examples
    --------
    >>> from xaffine.testing import check_affine, from_functions
    >>> wrong = from_functions(lambda x, W, b: x @ W, lambda dy, x, W, b: (dy @ W.T, x.T @ dy, dy.sum(0)))
    >>> try:
    ...     check_affine(wrong, seed=0, max_examples=20)
    ... except PropertyError as error:
    ...     print(str(error).splitlines()[0])
    forward_is_exact does not hold.
    """

    def __init__(self, part: Part, reason: str, case: Case, code: str, *, finished: bool = True) -> None:
        self.reason, self.case, self.code, self.finished = reason, case, code, finished
        super().__init__(describe_failure(part.label, part.prop.sentence, reason, code, finished=finished))


def describe_failure(label: str, sentence: str, reason: str, code: str, *, finished: bool = True) -> str:
    """Say which property does not hold or did not finish, what came out, and how to see it again."""
    what = "does not hold" if finished else "did not finish"
    again = f"The case{', as small as it was found,' if finished else ''} to paste and run:"
    return f"{label} {what}.\n{sentence}\n\n{reason}\n\n{again}\n\n{code}"


@dataclass(frozen=True)
class Part:
    """One property, on small or on large cases.

    Attributes
    ----------
    prop : Property
        Which one.
    large : bool
        Whether its cases have sizes at the edges of tiles.
    """

    prop: Property
    large: bool

    @property
    def label(self) -> str:
        """The name of the property, and whether its cases are large."""
        return f"{self.prop.name} (large)" if self.large else self.prop.name

    @property
    def facts(self) -> dict[str, str]:
        """What it is, as JSON has it."""
        return {"property": self.label, "tier": self.prop.tier, "sentence": self.prop.sentence}


@dataclass(frozen=True)
class Result:
    """What came of one property.

    Attributes
    ----------
    part : Part
        Which one, and on which cases.
    examples : int
        How many cases it held for.
    worst_error : float
        The largest error as a fraction of its rounding bound; 0 where all results were exact.
    worst_case : Case or None
        The case that reached it; None where all results were exact.
    failure : PropertyError or None
        None where the property holds.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> result = check_affine(AffineLayer, seed=0, max_examples=5).results[0]
    >>> result.part.label, result.failure, result.worst_error
    ('forward_is_exact', None, 0.0)
    """

    part: Part
    examples: int
    worst_error: float
    worst_case: Case | None
    failure: PropertyError | None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON has it.

        Returns
        -------
        dict
            Of texts, numbers and None.

        Examples
        --------
        >>> from xaffine import AffineLayer
        >>> result = check_affine(AffineLayer, seed=0, max_examples=5).results[0]
        >>> result.to_dict()["holds"]
        True
        """
        return {
            **self.part.facts,
            "holds": self.failure is None,
            "finished": self.failure is None or self.failure.finished,
            "examples": self.examples,
            "worst_error": self.worst_error,
            "worst_case": None if self.worst_case is None else self.worst_case.code,
            "reason": None if self.failure is None else self.failure.reason,
            "code": None if self.failure is None else self.failure.code,
        }


@dataclass(frozen=True)
class Report:
    """What `check_affine` found.

    Attributes
    ----------
    backend, version, device : str
        What the implementation ran on.
    dtypes : tuple of str
        Those that were drawn.
    seed : int
        Makes the same cases again.
    gaps : tuple of str
        What the implementation declares that it does not do, which was not tested.
    results : tuple of Result
        One for each property.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> report = check_affine(AffineLayer, seed=0, max_examples=5)
    >>> report.backend, report.dtypes, len(report.results), report.gaps
    ('numpy', ('float32',), 14, ())
    """

    backend: str
    version: str
    device: str
    dtypes: tuple[str, ...]
    seed: int
    gaps: tuple[str, ...]
    results: tuple[Result, ...]

    def __str__(self) -> str:
        lines = [f"{self.backend} {self.version} on {self.device}, {', '.join(self.dtypes)}, seed {self.seed}"]
        lines += [
            f"{'holds' if r.failure is None else 'FAILS'}  {r.part.label:<44}  {r.examples:>6} examples  "
            f"worst error {r.worst_error:.3g}" + ("" if r.worst_case is None else f"  {r.worst_case}")
            for r in self.results
        ]
        return "\n".join([*lines, *(f"not tested: {gap}" for gap in self.gaps)])


class Plan:
    """What to check, with its arguments checked; parameters as in `check_affine`.

    Attributes
    ----------
    gaps : tuple of str
        What is not tested, because the implementation declares that it does not do it.
    parts : list of Part
        What is checked.
    target : str or None
        Where to import the implementation from in the code of a failing case: ``"package.module:name"`` or
        ``"folder/file.py:name"``.
    """

    def __init__(
        self,
        make: Make,
        *,
        backend: str = "numpy",
        device: Any = None,
        dtype: str | Sequence[str] = "float32",
        max_examples: int = 100,
        large: bool = False,
        seed: int | None = None,
        supports: Collection[str] | None = None,
        time_limit: float = 60.0,
        summation: bounds.Summation | None = None,
        properties: Sequence[Property] = PROPERTIES,
        target: str | None = None,
    ) -> None:
        if not callable(make):
            msg = f"make must be callable as make(W, b) and return a layer; it is a {type(make).__name__}"
            raise TypeError(msg)
        try:
            import hypothesis  # noqa: F401 - the extra's library, asked for before anything runs
        except ImportError as error:
            msg = 'the verifier draws its cases with Hypothesis; to get it: pip install "xaffine[testing]"'
            raise ModuleNotFoundError(msg, name="hypothesis") from error
        if max_examples < 1 or not 0 < time_limit <= _LONGEST:
            msg = (
                f"max_examples must be at least 1, and time_limit above 0 and at most {_LONGEST:g} s; they are "
                f"{max_examples} and {time_limit}"
            )
            raise ValueError(msg)
        self.make, self.target, self.max_examples, self.time_limit = make, target, max_examples, time_limit
        self.seed, self.summation = secrets.randbits(32) if seed is None else seed, summation
        self.backend = backends.get(backend)
        tf32 = summation is not None and summation.factors == "tf32"
        self._precision = ["use_full_precision", *(["use_tf32"] if tf32 else [])]  # methods of the backend, in order
        for method in self._precision:
            getattr(self.backend, method)()
        self.device = None if device is None else self.backend.device(device)
        self.supports, dtypes, gaps = _declared(make, supports)
        wanted = tuple(dtype) if isinstance(dtype, list | tuple) else (dtype,)
        known = self.backend.dtypes(self.device)
        if not wanted or not all(isinstance(d, str) and d in known for d in wanted):
            msg = f"dtype {dtype!r} is not among those of the backend {backend!r}: {', '.join(known)}"
            raise ValueError(msg)
        if strangers := [repr(d) for d in wanted if summation and summation.of("y", d).factors != summation.factors]:
            msg = f"only float32 and complex64 have factors in tf32; dtype has {', '.join(strangers)}"
            raise ValueError(msg)
        self.dtypes = tuple(d for d in wanted if dtypes is None or d in dtypes)
        gaps += [f"dtype {d}" for d in wanted if d not in self.dtypes]
        floating = [d for d in self.dtypes if bounds.unit_roundoff(d)]
        if self.dtypes and not floating:
            gaps.append("the bounded tier: integers are not rounded")
        self.gaps = tuple(gaps)
        testable = [p for p in properties if (floating if p.values == "floats" else self.dtypes)]
        self.parts = [Part(p, large=False) for p in testable]
        self.parts += [Part(p, large=True) for p in testable if large and p.tier == "exact"]

    def report(self, results: Sequence[Result]) -> Report:
        """Put results together."""
        device = self.backend.devices[0] if self.device is None else self.device
        name, version = self.backend.name, self.backend.version
        return Report(name, version, str(device), self.dtypes, self.seed, self.gaps, tuple(results))

    def run(self, progress: Progress | None = None) -> Iterator[Result]:
        """Check the properties one after the other; also those after one that does not hold."""
        for part in self.parts:
            yield self._check(part, progress)

    def _check(self, part: Part, progress: Progress | None) -> Result:
        import hypothesis

        from xaffine.testing import strategies

        if part.large:
            drawn = strategies.large_cases(self.dtypes, supports=self.supports)
        else:
            batch_axes = takes_batch_axes(self.make) and {"vectors", "tensors"} <= self.supports
            values = part.prop.values
            drawn = strategies.cases(self.dtypes, values=values, supports=self.supports, batch_axes=batch_axes)
        drawn = drawn.map(lambda case: replace(case, summation=self.summation))
        examples, worst, worst_case, latest, raised = 0, 0.0, None, None, ""

        @hypothesis.seed(self.seed + zlib.crc32(part.label.encode()))  # other cases for every property
        @hypothesis.settings(
            max_examples=self.max_examples,
            deadline=None,
            database=None,
            derandomize=False,
            report_multiple_bugs=False,
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
            suppress_health_check=list(hypothesis.HealthCheck),
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(drawn)
        def holds(case: Case) -> None:
            nonlocal examples, worst, worst_case, latest, raised
            if progress is not None:
                progress(part, examples, case)
            try:
                with _time_limit(self.time_limit):
                    error = part.prop.check(self.make, case, self.backend, self.device)
            except BaseException as exception:
                latest, raised = case, f"{type(exception).__name__}: {exception}"
                raise
            examples += latest is None  # not those of shrinking
            if error > worst:
                worst, worst_case = error, case

        reason, finished = None, True
        try:
            holds()
        except KeyboardInterrupt:  # the user's
            raise
        except _HungError as error:
            reason, finished = str(error), False
        except hypothesis.errors.FlakyFailure as error:
            first = error.exceptions[0] if error.exceptions else error
            reason = f"{first}\n\nThe same case came out differently when it was run again."
        except BaseException as error:
            reason = str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"
        if reason is None and latest is not None:
            reason = f"{raised}\n\nHypothesis takes this for a case to pass over; here it is a failure."
        failure = None
        if reason is not None:
            assert latest is not None, reason  # noqa: S101 - else Hypothesis itself went wrong
            failure = PropertyError(part, reason, latest, self.code(part, latest), finished=finished)
        return Result(part, examples, worst, worst_case, failure)

    def code(self, part: Part, case: Case) -> str:
        """Python that runs a check on a case, with the values of the operands if they are few."""
        device = "" if self.device is None else f", backend.devices[{self.backend.devices.index(self.device)}]"
        lines = [
            "from xaffine import backends",
            f"from xaffine.testing import make_case{'' if self.summation is None else ', Summation'}",
            f"from {part.prop.check.__module__} import {part.prop.name}",
            _import_line(self.make, self.target),
            "",
            f"backend = backends.get({self.backend.name!r})",
            *(f"backend.{method}()" for method in self._precision),
            f"case = {case.code}",
            f"{part.prop.name}(make, case, backend{device})",
        ]
        values = {name: operand.values for name, operand in case.operands.items()}
        lines += [f"# {name} = {some.tolist()}" for name, some in values.items() if 0 < some.size <= 36]
        return "\n".join(lines)


def check_affine(
    make: Make,
    *,
    backend: backends.Name = "numpy",
    device: Any = None,
    dtype: str | Sequence[str] = "float32",
    max_examples: int = 100,
    large: bool = False,
    seed: int | None = None,
    supports: Collection[str] | None = None,
    time_limit: float = 60.0,
    summation: bounds.Summation | None = None,
    properties: Sequence[Property] = PROPERTIES,
) -> Report:
    """Prove that an implementation of the affine layer is right, or find the smallest input on which it is wrong.

    Parameters
    ----------
    make : callable
        ``make(W, b)`` returns an object with ``forward(x) -> y``, or one that is called, and ``backward(dy) -> dx``,
        which leaves dW and db in attributes of those names. b may be None. If it has a parameter ``n_batch_axes``,
        that of `xaffine.affine`, and supports vectors and tensors, every slice is tested. A pair of functions becomes
        one by `from_functions`.
    backend : str
        The name of the backend whose arrays it takes, one of `xaffine.backends.names`.
    device : optional
        One of the backend's devices, or its text; the default one if not given.
    dtype : str or sequence of str
        The dtype of x, W, b and dy; of several, any that go together are drawn.
    max_examples : int
        How many cases to draw for each property.
    large : bool
        Besides, draw sizes at the edges of tiles and long axes for the properties of the exact tier.
    seed : int, optional
        The cases follow from it; by default a fresh one, which the report names.
    supports : collection of str, optional
        What the implementation does, out of `xaffine.testing.cases.FEATURES` and names of dtypes (with none, any
        dtype). By default the attribute ``supports`` of `make`, and without one all features but "last-axis".
        What is missing is reported as a gap and not tested.
    time_limit : float
        Seconds that one case may take. Needs the main thread and an operating system with interval timers; a call that
        never returns to Python is not interrupted (``xaffine check`` ends that, too).
    summation : Summation, optional
        What the bounds assume of the implementation; by default `xaffine.testing.bounds.usual_summation` of the dtype.
        With ``Summation(factors="tf32", cuts=True)`` the library is told to use TF32, too.
    properties : sequence of Property
        Which to check.

    Returns
    -------
    Report
        The worst error of each property, and what was not tested.

    Raises
    ------
    AssertionError
        The first property that does not hold, or whose case took too long, as `PropertyError`.
    TypeError, ValueError
        An argument is wrong, or nothing is left to check; ImportError and RuntimeError as `xaffine.backends.get`.

    Notes
    -----
    JAX is switched to float64 and full precision in the whole process, as
    `xaffine.backends.Backend.use_full_precision` says.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.testing import check_affine
    >>> report = check_affine(AffineLayer, dtype="float64", max_examples=20, seed=0)
    >>> max(result.worst_error for result in report.results) <= 1
    True
    """
    plan = Plan(
        make, backend=backend, device=device, dtype=dtype, max_examples=max_examples, large=large, seed=seed,
        supports=supports, time_limit=time_limit, summation=summation, properties=properties,
    )  # fmt: skip
    if not plan.parts:
        msg = f"nothing is left to check; not tested: {'; '.join(plan.gaps) or 'no property'}"
        raise ValueError(msg)
    results = []
    for result in plan.run():
        if result.failure is not None:
            raise result.failure
        results.append(result)
    return plan.report(results)


def property_tests(make: Make, **options: Any) -> Callable[..., None]:
    """Make one pytest test of each property, for a test module.

    Parameters
    ----------
    make : callable
        As in `check_affine`.
    **options
        Those of `check_affine`. Without a `seed` it is 0, so that a run shows what the code does.

    Returns
    -------
    callable
        A parametrised test function.

    Examples
    --------
    In a test module, one test for each property of each implementation::

        from xaffine.testing import property_tests
        test_layer = property_tests(MyLayer, dtype="float64")
        test_layer_on_torch = property_tests(MyTorchLayer, backend="torch")

    >>> from xaffine import AffineLayer
    >>> test_layer = property_tests(AffineLayer, max_examples=5)
    >>> test_layer(PROPERTIES[0])  # as pytest calls it, with each of them
    """
    import pytest

    properties = options.pop("properties", PROPERTIES)

    @pytest.mark.parametrize("prop", properties, ids=[prop.name for prop in properties])
    def test(prop: Property) -> None:
        chosen = {"properties": [prop], "seed": 0, **options}
        plan = Plan(make, **chosen)
        if not plan.parts:
            pytest.skip(f"not tested: {'; '.join(plan.gaps)}")
        check_affine(make, **chosen)

    return test


def from_functions(forward: Callable[..., Any], backward: Callable[..., Any]) -> Make:
    """Make a layer of a pair of functions.

    Parameters
    ----------
    forward : callable
        ``forward(x, W, b) -> y``; b may be None.
    backward : callable
        ``backward(dy, x, W, b) -> (dx, dW, db)``.

    Returns
    -------
    callable
        The `make` of `check_affine`.

    Examples
    --------
    >>> from xaffine import affine, affine_backward
    >>> report = check_affine(from_functions(affine, affine_backward), max_examples=5, seed=0)
    """

    class Pair:
        dW: Any = None
        db: Any = None

        def __init__(self, W: Any, b: Any) -> None:
            self.W, self.b, self.x = W, b, None

        def forward(self, x: Any) -> Any:
            y = forward(x, self.W, self.b)
            self.x = x
            return y

        def backward(self, dy: Any) -> Any:
            dx, self.dW, self.db = backward(dy, self.x, self.W, self.b)
            return dx

    return Pair


def _declared(make: Make, supports: Collection[str] | None) -> tuple[set[str], set[str] | None, list[str]]:
    """The features to test, the dtypes (None for any), and the gaps."""
    declared = getattr(make, "supports", None) if supports is None else supports
    if declared is None:
        return set(_USUAL), None, []
    if not isinstance(declared, Collection) or isinstance(declared, str):
        msg = f"supports is a collection of names, such as {{'no-bias', 'empty'}}; it came as {declared!r}"
        raise TypeError(msg)
    features = {name for name in declared if name in FEATURES}
    dtypes = set(declared) - features
    if strangers := [repr(name) for name in dtypes if not bounds.is_dtype(name)]:
        msg = f"supports names features ({', '.join(FEATURES)}) and dtypes; it also has {', '.join(strangers)}"
        raise ValueError(msg)
    if {"tensors", "last-axis"} <= features and not takes_batch_axes(make):
        msg = "supports has both 'tensors' and 'last-axis', two readings of the same x; leave out one"
        raise ValueError(msg)
    missing = [f for f in _USUAL if f not in features and not (f == "tensors" and "last-axis" in features)]
    return features, dtypes or None, [f"{feature} ({FEATURES[feature]})" for feature in missing]


def _import_line(make: Make, target: str | None) -> str:
    if target is None:
        name = getattr(make, "__qualname__", "<locals>")
        if "<" in name or "." in name or make.__module__ == "__main__":
            return "make = ...  # the implementation"
        return f"from {make.__module__} import {name} as make"
    place, _, path = target.rpartition(":")
    if place.endswith(".py"):
        return (
            f"import importlib, sys\nsys.path.insert(0, {str(Path(place).parent)!r})\n"
            f"make = importlib.import_module({Path(place).stem!r}).{path}"
        )
    first, _, rest = path.partition(".")
    return f"from {place} import {first} as make" + (f"\nmake = make.{rest}" if rest else "")


class _HungError(BaseException):
    """No Exception: neither the implementation nor Hypothesis, which would try it again and again, is to catch it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, where that is possible."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    hung: _HungError | None = None

    def interrupt(_: int, frame: Any) -> None:
        nonlocal hung
        line = last_line_of(traceback.extract_stack(frame))
        msg = f"no answer within {seconds:g} s\n  {line}"
        hung = _HungError(msg)
        raise hung

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, interrupt)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again where the error was caught
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's timer, a test runner's: let it go on
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)
        if hung is not None:  # also where the implementation caught it
            raise hung
