"""Put the layer and its functional forms through new cases until the time is over.

From the root of the repository: ``python -m tests.fuzz --backend torch --minutes 50``, or ``nox -s fuzz -- ...``, which
installs what that needs. Exit code 0: every property holds, 1: one does not, 2: could not run, 130: interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import secrets
import sys
import time
import warnings
from typing import TYPE_CHECKING

from tests.core.test_properties import ALL, FORMS
from xaffine import backends
from xaffine.testing import Options, PropertyError
from xaffine.testing.runner import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xaffine.testing import Case, Result
    from xaffine.testing.report import Part

SMALL, LARGE = 100, 5  # cases for each form and property in a round; a large case takes as long as twenty small ones
SECONDS_BETWEEN_LINES = 10.0
SECONDS_FOR_A_CASE = 300.0  # sparse compiles its kernels in the first ones

ADVICE = """\
The code runs in the root of the repository; --seed {seed} finds the case again in its first round.
Add this line above test_cases_found_by_fuzzing in tests/core/test_properties.py:

@example({code})"""


class _EndOfRun(KeyboardInterrupt):
    """The time is over, or enough cases were drawn; Hypothesis lets an interrupt pass."""


class Tally:
    """Count the cases that held, print how many, and end the run.

    Attributes
    ----------
    cases : int
        How many cases held.
    rounds : int
        How many times all properties were done.
    failure : PropertyError or None
        What ended the run, if that was a failure.
    """

    def __init__(self, minutes: float, cases: float) -> None:
        self.failure: PropertyError | None = None
        self.cases, self.rounds, self._most_cases = 0, 0, cases
        self._start = self._printed = time.monotonic()
        self._end = self._start + 60 * minutes
        self._earlier, self._latest = 0, -1  # cases of earlier properties; the number before the latest of this one

    @property
    def minutes(self) -> float:
        """How long the run has taken."""
        return (time.monotonic() - self._start) / 60

    def before_case(self, _: Part, examples: int, __: Case) -> None:
        """End the run here if it is to end, but never while a failing case is being made smaller."""
        if examples == self._latest:
            return  # the case before did not hold
        self._latest, self.cases, now = examples, self._earlier + examples, time.monotonic()
        if now >= self._end or self.cases >= self._most_cases:
            raise _EndOfRun
        if now >= self._printed + SECONDS_BETWEEN_LINES:
            self._printed = now
            rate = self.cases / (now - self._start)
            print(f"{self.cases} cases, {rate:.3g} a second, {self.rounds} rounds", flush=True)

    def after_property(self, result: Result) -> None:
        """Add the cases of a property to those that held, and keep its failure."""
        self._earlier, self._latest, self.failure = self._earlier + result.examples, -1, result.failure
        self.cases = self._earlier


def results(backend: backends.Backend, device: object, seed: int, tally: Tally) -> Iterator[tuple[int, Result]]:
    """Yield the seed and the result of one property after the other, round after round, each with the next seed."""
    for tally.rounds in itertools.count():
        round_seed = seed + tally.rounds
        for make, (large, examples) in itertools.product(FORMS, ((False, SMALL), (True, LARGE))):
            options = Options(
                backend=backend.name, device=device, dtype=backend.dtypes(device),
                max_examples=examples, large=large * examples, seed=round_seed, time_limit=SECONDS_FOR_A_CASE, **ALL,
            )  # fmt: skip
            plan = Plan(make, options)
            plan.parts = [part for part in plan.parts if part.large == large]
            for result in plan.run(tally.before_case):
                yield round_seed, result
                if backend.name == "jax":
                    import jax

                    jax.clear_caches()  # it keeps what it compiles, 4 MB a case


def fuzz(backend: backends.Backend, device: object, seed: int, tally: Tally) -> int:
    """Draw cases until a property fails or the tally ends the run, and print what was found; the exit code."""
    code = 0
    try:
        for round_seed, result in results(backend, device, seed, tally):
            tally.after_property(result)
            if result.failure is not None:
                print(f"\nseed {round_seed}: {result.failure}\n")
                print(ADVICE.format(seed=round_seed, code=result.failure.case.code.replace("'", '"')))
                code = 1
                break
    except _EndOfRun:
        pass
    except KeyboardInterrupt:
        print("\ninterrupted")
        code = 130
    print("\n| backend | cases | minutes | failures |")
    print(f"| {backend.name} | {tally.cases} | {tally.minutes:.1f} | {int(tally.failure is not None)} |", flush=True)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Put xaffine through new cases of every property.")
    parser.add_argument("--backend", default="numpy", metavar="NAME", help=f"one of {', '.join(backends.names())}")
    parser.add_argument("--device", help="one of the backend's devices, for example cuda:0; gpu is its first GPU")
    parser.add_argument("--seed", type=int, metavar="S", help="draws the same cases again")
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="how long to draw cases")
    end.add_argument("--cases", type=int, metavar="N", help="how many cases to draw")
    options = parser.parse_args(arguments)
    cases = math.inf if options.cases is None else options.cases
    try:
        if not options.minutes > 0:  # nor a NaN
            msg = f"--minutes must be positive, not {options.minutes:g}"
            raise ValueError(msg)
        if cases < 1:
            msg = f"--cases must be at least 1, not {cases}"
            raise ValueError(msg)
        backend = backends.get(options.backend)
        backend.use_full_precision()
        device = None if options.device is None else backend.device(options.device)
    except (ValueError, ImportError, RuntimeError) as error:
        print(f"fuzz could not run: {error}", file=sys.stderr)
        return 2
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"{backend.name} {backend.version}, seed {seed}", flush=True)
    with warnings.catch_warnings():  # a warning is a failure, as in the tests
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "invalid value encountered in (matmul|dot)", RuntimeWarning)
        return fuzz(backend, device, seed, Tally(options.minutes, cases))


if __name__ == "__main__":
    sys.exit(main())
