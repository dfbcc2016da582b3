"""Put any affine layer through all properties: `check_affine`, and its pytest form."""

from __future__ import annotations

import secrets
import sys
import zlib
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xaffine.testing import bounds
from xaffine.testing._abilities import declared, probed
from xaffine.testing._diagnoses import diagnose
from xaffine.testing._progress import progress_lines
from xaffine.testing._subject import BrokenError, Isolated, TamperedError, subject_of
from xaffine.testing._timer import NoAnswerError
from xaffine.testing._trial import RejectionError
from xaffine.testing.options import Options
from xaffine.testing.report import NO_BACKWARD, UNREACHED, Part, PropertyError, Report, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xaffine.testing.adapters import Make
    from xaffine.testing.cases import Case
    from xaffine.testing.checks import Property

__all__ = ["Plan", "check_affine", "property_tests"]


_UNUSABLE = "the device is unusable after it"


class NothingLeftError(ValueError):
    """Of what is to be checked, nothing can be."""


class Plan:
    """What to check, with its arguments checked.

    Attributes
    ----------
    gaps : tuple of str
        What is not tested, because the implementation refuses it, or does not declare it.
    parts : list of Part
        What is checked.
    """

    def __init__(self, make: Any, options: Options) -> None:
        try:
            import hypothesis  # noqa: F401 - the extra's library, asked for before anything runs
        except ImportError as error:
            msg = "the verifier draws its cases with Hypothesis; to get it: pip install hypothesis"
            raise ModuleNotFoundError(msg, name="hypothesis") from error
        from xaffine.testing import strategies  # noqa: F401 - loaded before anything of the implementation runs

        self.given, self.options = make, options
        self.seed = secrets.randbits(32) if options.seed is None else options.seed
        self.subject = subject_of(make, options)
        try:
            self._find_parts()
        except BaseException:
            self.close()
            raise

    def _find_parts(self) -> None:
        """Find out what can be checked."""
        options, facts, summation = self.options, self.subject.facts, self.options.summation
        wanted = options.dtypes
        if not wanted or not all(isinstance(d, str) and d in facts.dtypes for d in wanted):
            known = ", ".join(facts.dtypes)
            msg = f"dtype {options.dtype!r} is not among those of the backend {facts.backend!r}: {known}"
            raise ValueError(msg)
        if strangers := [repr(d) for d in wanted if summation and summation.of("y", d).factors != summation.factors]:
            msg = f"only float32 and complex64 have factors in tf32; dtype has {', '.join(strangers)}"
            raise ValueError(msg)
        supports = facts.supports if options.supports is None else options.supports
        if supports is not None:
            self.abilities = declared(self.subject, supports, wanted)
        else:
            self.abilities = probed(self.subject, wanted, options)
        self.dtypes, gaps = self.abilities.dtypes, self.abilities.gaps
        floating = [d for d in self.dtypes if bounds.unit_roundoff(d)]
        if self.dtypes and not floating:
            gaps.append("the bounded tier: integers are not rounded")
        self.other_dtypes = tuple(dtype for dtype in facts.dtypes if dtype not in wanted)
        self.gaps = tuple(gaps)
        testable = [p for p in options.chosen if (floating if p.values == "floats" else self.dtypes)]
        if not self.abilities.features & {"matrices", "tensors", "last-axis"}:
            testable = [prop for prop in testable if prop.of_vectors]
            self.gaps += ("batches",)
        if not facts.has_backward:
            testable = [prop for prop in testable if prop.of_forward]
            self.gaps += (NO_BACKWARD,)
        self.parts = [Part(p, large=False, cases=options.max_examples) for p in testable]
        if options.large:
            self.parts += [Part(p, large=True, cases=options.large) for p in testable if p.tier == "exact"]
        if not self.parts:
            msg = f"nothing is left to check; not tested: {'; '.join(self.gaps) or 'no property'}"
            raise NothingLeftError(msg)

    def close(self) -> None:
        """End the process of the implementation, if it has one."""
        self.subject.close()

    def report(self, results: Sequence[Result], why: str | None = None) -> Report:
        """Put results together, with why there are no more if there are not."""
        facts, given = self.subject.facts, self.given if isinstance(self.given, tuple) else (self.given,)
        unreached = tuple(f"{part.label}{UNREACHED}" for part in self.parts[len(results) :])
        return Report(
            ",".join(map(_name, given)), facts.backend, facts.version, facts.device, self.dtypes, self.seed,
            self.gaps + unreached, tuple(results), facts.adapter, isinstance(self.subject, Isolated),
            self.other_dtypes, self.options.strict, why or ("it ended early" if unreached else None),
        )  # fmt: skip

    def run(self, before: Callable[[Part, int, Case], Any] = lambda *_: None) -> Iterator[Result]:
        """Check the properties one after the other, also those after one that does not hold; until two hang.

        Before every example `before` is called with what is checked, the number of its examples so far, and the case.
        """
        hung = int(self.abilities.hung)
        for part in self.parts:
            result = self._check(part, before)
            yield result
            hung += result.verdict == "not finished" or result.cause == _UNUSABLE
            if hung > 1 or result.verdict == "TAMPERED" or (self.options.fail_fast and _counts(result, self.options)):
                return

    def shown(self, show: Callable[[str, float], Any]) -> Callable[[Part, int, Case], None]:
        """What `run` calls to have `show` told where it is, and how many parts are done."""
        return lambda part, n, _: show(f"{part.label}, {n} examples", self.parts.index(part) + n / part.cases)

    def _check(self, part: Part, before: Callable[[Part, int, Case], Any]) -> Result:
        import hypothesis

        from xaffine.testing import strategies

        features = self.abilities.features
        some: dict[str, Any] = {"supports": features, "layouts": self.abilities.layouts, "bias": self.abilities.bias}
        always: list[Case] = []
        if part.large:
            drawn = strategies.large_cases(self.dtypes, **some)
            always = strategies.long_cases(self.dtypes, features, bias=self.abilities.bias)[: part.cases - 1]
        else:
            slices = self.subject.facts.takes_batch_axes and {"matrices", "vectors", "tensors", "four-axes"} <= features
            values = part.prop.values
            drawn = strategies.cases(self.dtypes, values=values, mixed=self.options.mixed, batch_axes=slices, **some)

        def with_summation(case: Case) -> Case:
            return replace(case, summation=self.options.summation)

        subject = self.subject
        examples, told, worst, worst_case, latest, failed, raised = 0, 0, 0.0, None, None, False, ""
        rejected: dict[str, Any] = {}

        @hypothesis.seed(self.seed + zlib.crc32(part.label.encode()))  # other cases for every property
        @hypothesis.settings(
            max_examples=part.cases - len(always),
            deadline=None,
            database=None,
            derandomize=False,
            report_multiple_bugs=False,
            phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink),
            suppress_health_check=list(hypothesis.HealthCheck),
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(drawn.map(with_summation))
        def holds(case: Case) -> None:
            nonlocal examples, told, worst, worst_case, latest, failed, raised, rejected
            before(part, examples, case)
            if not failed:
                latest = case
            try:
                with subject.limit(self.options.time_limit):
                    error = part.prop.check(subject, case, subject.backend, subject.device)
            except BaseException as exception:
                latest, failed, raised = case, True, f"{type(exception).__name__}: {exception}"
                rejected = exception.operands if isinstance(exception, RejectionError) else {}
                raise
            examples += not failed  # not those of shrinking
            told += error is not None and all(operand.values.any() for operand in (case.x, case.W, case.dy))
            if error is not None and error > worst:
                worst, worst_case = error, case

        reason, verdict, cause = None, "FAILS", None
        for case in always:
            holds = hypothesis.example(with_summation(case))(holds)
        try:
            holds()
            subject.require_intact()
        except KeyboardInterrupt:  # the user's
            raise
        except TamperedError as error:
            reason, verdict = str(error), "TAMPERED"
        except BrokenError as error:
            reason, cause = str(error), _UNUSABLE
        except NoAnswerError as error:
            reason, verdict = str(error), "not finished"
        except hypothesis.errors.FlakyFailure as error:
            first = error.exceptions[0] if error.exceptions else error
            reason = f"{first}\n\nThe same case came out differently when it was run again."
        except BaseException as error:
            reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        if reason is None and failed:
            reason = f"{raised}\n\nHypothesis takes this for a case to pass over; here it is a failure."
        failure = None
        if reason is not None:
            assert latest is not None, reason  # noqa: S101 - else Hypothesis itself went wrong
            if verdict == "FAILS" and cause is None:
                try:
                    cause = diagnose(subject, latest, self.options.time_limit)
                except TamperedError as error:
                    reason, verdict = str(error), "TAMPERED"
            failure = PropertyError(part, reason, latest, self.code(part, latest, rejected), verdict, cause)
        return Result(part, examples, worst, worst_case, told, failure)

    def code(self, part: Part, case: Case, rejected: dict[str, Any]) -> str:
        """Python that runs a check on a case, with the values of operands, and of a rejected one, if they are few."""
        facts, summation = self.subject.facts, self.options.summation
        device = "" if facts.device_index is None else f", backend.devices[{facts.device_index}]"
        lines = [
            "from xaffine import backends",
            f"from xaffine.testing import make_case{'' if summation is None else ', Summation'}",
            f"from {part.prop.check.__module__} import {part.prop.name}",
            *_import_lines(self.given, facts.backend, facts.adapter),
            "",
            f"backend = backends.get({facts.backend!r})",
            "backend.use_full_precision()",
            *(["backend.use_tf32()"] if self.options.tf32 else []),
            f"case = {case.code}",
            f"{part.prop.name}(make, case, backend{device})",
        ]
        values = {name: operand.values for name, operand in case.operands.items()}
        values |= {f"the {name} to be rejected": some for name, some in rejected.items()}
        lines += [f"# {name} = {some.tolist()}" for name, some in values.items() if 0 < some.size <= 36]
        return "\n".join(lines)


def check_affine(make: Make, options: Options = Options(), **changes: Any) -> Report:  # noqa: B008 - it is frozen
    """Prove that an implementation of the affine layer is right, or find the smallest input on which it is wrong.

    Parameters
    ----------
    make : callable, pair of callables, or str
        What `adapt` takes. ``make(W, b)`` returns an object with ``forward(x) -> y``, or one that is called, and
        ``backward(dy) -> dx``, which leaves dW and db in attributes of those names. b may be None. If it has a
        parameter ``n_batch_axes``, that of `xaffine.affine`, and supports vectors and tensors, every slice is tested.
        A text names such a thing, ``"package.module:name"`` or ``"folder/file.py:name"``, which then runs in a process
        of its own: there it can neither read nor replace what judges it.
    options : Options, optional
        How to check it.
    **changes
        Fields of `Options`, in place of those of ``options``.

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
    options = _changed(options, changes)
    # A notebook shows how far it is; elsewhere a function prints nothing.
    shown = progress_lines if "ipykernel" in sys.modules else lambda _: nullcontext(lambda *_: None)
    with closing(Plan(make, options)) as plan, shown(len(plan.parts)) as show:
        results = []
        for result in plan.run(plan.shown(show)):
            if result.failure is not None and _counts(result, options):
                raise result.failure
            results.append(result)
        return plan.report(results)


def _changed(options: Options, changes: dict[str, Any]) -> Options:
    if not isinstance(options, Options):
        msg = f"options must be an Options, not {options!r}: pass fields by name, such as backend='torch'"
        raise TypeError(msg)
    if unknown := changes.keys() - Options.__dataclass_fields__.keys():
        msg = f"there is no option {' or '.join(sorted(unknown))}; there are {', '.join(Options.__dataclass_fields__)}"
        raise TypeError(msg)
    return replace(options, **changes)


def property_tests(make: Make, options: Options = Options(seed=0), **changes: Any) -> Callable[..., None]:  # noqa: B008
    """Make one pytest test of each property, for a test module.

    Parameters
    ----------
    make : callable
        As in `check_affine`.
    options, **changes
        As in `check_affine`. By default the seed is 0, so that a run shows what the code does. Manners have tests with
        ``strict=True``.

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

    >>> import xaffine.testing
    >>> from xaffine import AffineLayer
    >>> test_layer = property_tests(AffineLayer, max_examples=5)
    >>> test_layer(xaffine.testing.PROPERTIES[0])  # as pytest calls it, with each of them
    """
    try:
        import pytest
    except ImportError as error:
        msg = "property_tests makes tests of pytest; to get it: pip install pytest"
        raise ModuleNotFoundError(msg, name="pytest") from error
    options = _changed(options, changes)
    properties = [prop for prop in options.chosen if options.strict or prop.tier != "manners"]

    @pytest.mark.parametrize("prop", properties, ids=[prop.name for prop in properties])
    def test(prop: Property) -> None:
        try:
            report = check_affine(make, replace(options, properties=[prop]))
        except NothingLeftError as error:
            pytest.skip(str(error))
        if report.verdict != "right":
            pytest.fail(report.conclusion)

    return test


def _counts(result: Result, options: Options) -> bool:
    if result.part.prop.tier == "manners" and not options.strict:
        return result.verdict == "TAMPERED"
    return result.failure is not None


def _name(make: Any) -> str:
    return make if isinstance(make, str) else getattr(make, "__qualname__", type(make).__qualname__)


def _import_lines(make: Any, backend: str, adapter: str) -> list[str]:
    """Lines after which `make` is what was checked."""
    if not isinstance(make, str):
        names = [_defined(each) for each in (make if isinstance(make, tuple) else (make,))]
        if None in names:
            return ["make = ...  # the implementation"]
        lines = [f"from {module} import {name}" for module, name in names if module != "__main__"]
        made = ", ".join(name for _, name in names)
    else:
        place, _, path = make.rpartition(":")
        module = Path(place).stem if place.endswith(".py") else place
        lines = ["import importlib, sys"] if place.endswith(".py") else ["import importlib"]
        lines += [f"sys.path.insert(0, {str(Path(place).parent)!r})"] if place.endswith(".py") else []
        lines.append(f"module = importlib.import_module({module!r})")
        made = ", ".join(f"module.{name}" for name in path.split(","))
    if adapter == "layer":
        return [*lines, f"make = {made}"]
    value = f"({made})" if "," in made else made
    return [*lines, "from xaffine.testing import adapt", f"make, *_ = adapt({value}, {backend!r}, {adapter!r})"]


def _defined(make: Any) -> Any:
    """The module and the name with which it can be imported, if there are such."""
    name = getattr(make, "__qualname__", "<locals>")
    return None if "<" in name or "." in name else (make.__module__, name)
