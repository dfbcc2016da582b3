"""What came of the properties: a `Result` for each, a `Report` of all, and the error that a failure raises."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xaffine.testing._lines import summary_of

if TYPE_CHECKING:
    from xaffine.testing.cases import Case
    from xaffine.testing.checks import Property

__all__ = ["NO_BACKWARD", "UNREACHED", "Part", "PropertyError", "Report", "Result"]


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
    verdict : str
        "FAILS"; "not finished", if the case gave no answer, which shows no wrong result; or "TAMPERED".
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
        self, part: Part, reason: str, case: Case, code: str, verdict: str = "FAILS", cause: str | None = None
    ) -> None:
        self.reason, self.case, self.code, self.verdict, self.cause = reason, case, code, verdict, cause
        what = "did not finish" if verdict == "not finished" else "does not hold"
        again = f"The case{', as small as it was found,' if verdict == 'FAILS' else ''} to paste and run:"
        named = reason if cause is None else f"{cause}: {reason}"
        super().__init__(f"{part.label} {what}.\n{part.prop.sentence}\n\n{named}\n\n{again}\n\n{code}")


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
    >>> result = check_affine(AffineLayer, seed=0, max_examples=20).results[0]
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
        """What came of it: "holds", "MISTRUSTED" where no case could show a fault, or what the failure says."""
        if self.failure is None:
            return "holds" if self.told else "MISTRUSTED"
        return self.failure.verdict

    @property
    def word(self) -> str:
        """The verdict, or "lacking" of manners that do not hold."""
        return "lacking" if (self.verdict, self.part.prop.tier) == ("FAILS", "manners") else self.verdict

    @property
    def cause(self) -> str:
        """What went wrong in one line: the mistake in words, or what came out; empty where nothing did."""
        return "" if self.failure is None else self.failure.cause or summary_of(self.failure.reason)

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
        >>> result = check_affine(AffineLayer, seed=0, max_examples=20).results[0]
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


@dataclass(frozen=True, repr=False)
class Report:
    """What `check_affine` found; a notebook shows it as a table.

    Attributes
    ----------
    target : str
        What was checked.
    backend, version, device : str
        What the implementation ran on.
    dtypes : tuple of str
        Those that were drawn.
    seed : int
        Makes the same cases again.
    gaps : tuple of str
        What the implementation refuses, or does not declare, or what was not reached: none of it was tested.
    results : tuple of Result
        One for each property that was.
    adapter : str
        What made a layer of what was checked, as `adapt` says.
    isolated : bool
        Whether the implementation ran in a process of its own. In this one it could have replaced the judge's code.
    other_dtypes : tuple of str
        Those of the backend that nobody asked for.
    strict : bool
        Whether manners count.
    why : str or None
        Why it ended early, if it did.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.testing import check_affine
    >>> report = check_affine(AffineLayer, seed=0, max_examples=20)
    >>> report
    <Report on AffineLayer: right: 300 cases of 15 properties hold>
    >>> report.backend, report.dtypes, report.gaps, report.isolated
    ('numpy', ('float32', 'float64'), (), False)
    """

    target: str
    backend: str
    version: str
    device: str
    dtypes: tuple[str, ...]
    seed: int
    gaps: tuple[str, ...]
    results: tuple[Result, ...]
    adapter: str
    isolated: bool
    other_dtypes: tuple[str, ...]
    strict: bool = False
    why: str | None = None

    @property
    def verdict(self) -> str:
        """One of "right", "wrong" and "not finished"."""
        if self.wrong:
            return "wrong"
        hung = any(result.verdict == "not finished" for result in self.results)
        return "not finished" if hung or self.why or self._told_nothing else "right"

    @property
    def _told_nothing(self) -> list[str]:
        """The properties of which no case could show a fault, and that count."""
        told_nothing = [result.part for result in self.results if result.verdict == "MISTRUSTED"]
        return [part.label for part in told_nothing if self.strict or part.prop.tier != "manners"]

    @property
    def wrong(self) -> list[Result]:
        """The results that make the verdict "wrong": manners that are lacking do so where it is strict alone."""
        return [
            result
            for result in self.results
            if result.verdict == "TAMPERED"
            or (result.verdict == "FAILS" and (self.strict or result.part.prop.tier != "manners"))
        ]

    @property
    def conclusion(self) -> str:
        """What the verdict rests on, in one line."""
        done = [result for result in self.results if result.verdict == "holds"]
        manners = [r.part.label for r in self.results if r.verdict == "FAILS" and r not in self.wrong]
        if self.verdict == "wrong":
            first, *others = [group for group in self.causes if group[0] in self.wrong]
            return f"{first[0].cause}{f', and {len(others)} more as above' if others else ''}"
        if self.verdict == "right":
            cases = sum(result.examples for result in done)
            text = f"{cases:,} cases of {len(done)} properties hold"
            if NO_BACKWARD in self.gaps:
                text += "; of y alone: it has no backward"
            gaps = len(self.gaps) - (NO_BACKWARD in self.gaps)
            text += f"; {gaps} {'gap' if gaps == 1 else 'gaps'} above" if gaps else ""
            return f"{text}; bad manners: {', '.join(manners)}" if manners else text
        number = len(self.results) + sum(gap.endswith(UNREACHED) for gap in self.gaps)
        hung = next((result.cause for result in self.results if result.verdict == "not finished"), None)
        told_nothing = " and ".join(self._told_nothing)
        why = f"no case of {told_nothing} could show a fault" if told_nothing else hung or self.why
        return f"{len(done) + len(manners)} of {number} properties have a verdict; {why}"

    @property
    def causes(self) -> list[list[Result]]:
        """What does not hold or did not finish, by one cause together: wrong results first, then hangs, and manners."""
        groups: dict[str, list[Result]] = {}
        for result in self.results:
            if result.failure is not None:
                groups.setdefault(_without_numbers(result.cause), []).append(result)
        for group in groups.values():
            group.sort(key=lambda result: result not in self.wrong)
        return sorted(groups.values(), key=lambda some: (some[0] not in self.wrong, some[0].verdict == "FAILS"))

    def __repr__(self) -> str:
        return f"<Report on {self.target}: {self.verdict}: {self.conclusion}>"

    @property
    def head(self) -> str:
        """What was checked, and on what."""
        what = self.target + ("" if self.adapter == "layer" else f" (a {self.adapter})")
        where = f"{self.backend} {self.version} on {self.device}"
        return f"{what} on {where}; {', '.join(self.dtypes)}; seed {self.seed}"

    @property
    def notes(self) -> list[str]:
        """What was not tested, and what could not be ruled out."""
        notes = [f"not tested: {gap}" for gap in self.gaps]
        if self.other_dtypes:
            notes.append(f"not tried: {', '.join(self.other_dtypes)}")
        if not self.isolated:
            notes.append("not ruled out: that the implementation, in the process of its judge, replaced its code")
        return notes

    @property
    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Of each result the property, tier, verdict, number of cases, and worst error as a fraction of its bound."""
        return [
            (r.part.label, r.part.prop.tier, r.word, str(r.examples), f"{r.worst_error:.3g}" if r.worst_error else "0")
            for r in self.results
        ]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)] if self.rows else []
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in self.rows]
        return "\n".join([self.head, *lines, *self.notes, f"{self.verdict}: {self.conclusion}"])

    def _repr_html_(self) -> str:
        from xaffine.testing._views import to_html

        return to_html(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it.

        Returns
        -------
        dict
            Of texts, numbers, lists and None.

        Examples
        --------
        >>> from xaffine import AffineLayer
        >>> from xaffine.testing import check_affine
        >>> check_affine(AffineLayer, seed=0, max_examples=20).to_dict()["verdict"]
        'right'
        """
        names = ("target", "backend", "version", "device", "dtypes", "seed", "gaps", "adapter", "isolated")
        facts = {name: getattr(self, name) for name in (*names, "other_dtypes", "verdict", "conclusion")}
        return {**facts, "properties": [result.to_dict() for result in self.results]}


UNREACHED = " (not reached)"
NO_BACKWARD = "dx, dW and db: it has no backward"


def _without_numbers(cause: str) -> str:
    """What failures of one cause have in common: on another case there are other numbers."""
    return re.sub(r"-?\b(\d[\d.,]*(e[-+]\d+)?|inf|nan)\b", "0", cause).removesuffix(", 0 times its rounding bound")
