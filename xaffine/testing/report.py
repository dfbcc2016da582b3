"""What came of the properties: a `Result` for each, a `Report` of all, and the error that a failure raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xaffine.testing.cases import Case
    from xaffine.testing.checks import Property

__all__ = ["Part", "PropertyError", "Report", "Result", "describe_failure"]


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
    cause : str or None
        The mistake in words, where one is known that computes what came out.

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

    def __init__(
        self, part: Part, reason: str, case: Case, code: str, *, finished: bool = True, cause: str | None = None
    ) -> None:
        self.reason, self.case, self.code, self.finished, self.cause = reason, case, code, finished, cause
        facts = {"property": part.label, "sentence": part.prop.sentence, "reason": reason, "code": code}
        verdict = "FAILS" if finished else "not finished"
        super().__init__(describe_failure({**facts, "verdict": verdict, "cause": cause}))


def describe_failure(failure: dict[str, Any]) -> str:
    """Say which property does not hold or did not finish, what came out, and how to see it again."""
    finished, cause = failure["verdict"] != "not finished", failure["cause"]
    what = "does not hold" if finished else "did not finish"
    reason = failure["reason"] if cause is None else f"{cause}: {failure['reason']}"
    again = f"The case{', as small as it was found,' if finished else ''} to paste and run:"
    return f"{failure['property']} {what}.\n{failure['sentence']}\n\n{reason}\n\n{again}\n\n{failure['code']}"


@dataclass(frozen=True)
class Part:
    """One property, on small or on large cases.

    Attributes
    ----------
    prop : Property
        Which one.
    large : bool
        Whether its cases have sizes at the edges of tiles.
    cases : int
        How many to draw.
    """

    prop: Property
    large: bool
    cases: int

    @property
    def label(self) -> str:
        """The name of the property, and whether its cases are large."""
        return f"{self.prop.name} (large)" if self.large else self.prop.name

    @property
    def facts(self) -> dict[str, Any]:
        """What it is, as JSON has it."""
        return {"property": self.label, "tier": self.prop.tier, "sentence": self.prop.sentence, "cases": self.cases}


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
    told : int
        How many cases could show a fault: those that the property applies to, with operands that are not zero.
    failure : PropertyError or None
        None where the property holds.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.testing import check_affine
    >>> result = check_affine(AffineLayer, seed=0, max_examples=5).results[0]
    >>> result.part.label, result.failure, result.worst_error
    ('forward_is_exact', None, 0.0)
    """

    part: Part
    examples: int
    worst_error: float
    worst_case: Case | None
    told: int
    failure: PropertyError | None

    @property
    def verdict(self) -> str:
        """What came of it: "holds", "FAILS", "not finished", or "MISTRUSTED" where no case could show a fault."""
        if self.failure is None:
            return "holds" if self.told else "MISTRUSTED"
        return "FAILS" if self.failure.finished else "not finished"

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON has it.

        Returns
        -------
        dict
            Of texts, numbers and None.

        Examples
        --------
        >>> from xaffine import AffineLayer
        >>> from xaffine.testing import check_affine
        >>> result = check_affine(AffineLayer, seed=0, max_examples=5).results[0]
        >>> result.to_dict()["verdict"]
        'holds'
        """
        return {
            **self.part.facts,
            "verdict": self.verdict,
            "examples": self.examples,
            "worst_error": self.worst_error,
            "worst_case": None if self.worst_case is None else self.worst_case.code,
            "reason": None if self.failure is None else self.failure.reason,
            "code": None if self.failure is None else self.failure.code,
            "cause": None if self.failure is None else self.failure.cause,
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
        What the implementation refuses, or does not declare, which was not tested.
    results : tuple of Result
        One for each property.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.testing import check_affine
    >>> report = check_affine(AffineLayer, seed=0, max_examples=5)
    >>> report.backend, report.dtypes, len(report.results), report.gaps
    ('numpy', ('float32', 'float64'), 15, ())
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
            f"{r.verdict:<12}  {r.part.label:<44}  {r.examples:>6} examples  "
            f"worst error {r.worst_error:.3g}" + ("" if r.worst_case is None else f"  {r.worst_case}")
            for r in self.results
        ]
        return "\n".join([*lines, *(f"not tested: {gap}" for gap in self.gaps)])
