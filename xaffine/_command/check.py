"""``xaffine check``: put any implementation of the affine layer through all properties.

The implementation runs in a process of its own, ``python -m xaffine._command.check``, which reports what it does as
events: neither a crash nor a hang of a kernel ends the command without a word on which case it was.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

from xaffine import backends
from xaffine._command.machine import describe_machine
from xaffine._command.target import TargetError, import_target
from xaffine._command.terminal import print_table, progress_bar
from xaffine._command.worker import WorkerError, run_worker, serve
from xaffine.testing.bounds import Summation
from xaffine.testing.cases import FEATURES
from xaffine.testing.runner import Plan, describe_failure

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from xaffine.testing.cases import Case
    from xaffine.testing.runner import Part

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "verify any implementation of the affine layer"
DESCRIPTION = """\
Put an implementation of the affine layer through every property: exact on integers, within rounding bounds on floats,
true to the calculus, and to its contract. TARGET names what is called as make(W, b) and returns an object with
forward(x) -> y and backward(dy) -> dx, which leaves dW and db in attributes. Exit code 0: right, 1: wrong, 2: could not
run, 3: not finished, and nothing wrong was seen until then."""

_GRACE = 10.0  # seconds beyond the time limit, in which the worker can still report by itself what hung


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``xaffine check``."""
    parser.add_argument(
        "target", metavar="TARGET", help="package.module:factory or file.py:factory, for example layers:AffineLayer"
    )
    parser.add_argument("--backend", default="numpy", metavar="NAME", help=f"one of {', '.join(backends.names())}")
    parser.add_argument("--device", help="one of the backend's devices, for example cuda:0; gpu is its first GPU")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="of the operands; several are mixed")
    parser.add_argument("--tf32", action="store_true", help="let float32 products round their factors to TF32")
    parser.add_argument("--examples", type=int, default=100, metavar="N", help="cases for each property (100)")
    parser.add_argument("--large", action="store_true", help="also sizes at the edges of tiles, and long axes")
    parser.add_argument("--seed", type=int, help="draws the same cases again")
    parser.add_argument(
        "--supports", nargs="*", metavar="WHAT", help=f"what TARGET does, out of {', '.join(FEATURES)} and dtypes"
    )
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S", help="seconds for one case (60)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check the target of the command line and print what was found; the exit code."""
    report: dict[str, Any] = {"target": options.target, "properties": [], "why": "interrupted"}
    try:
        _watch(options, report)
    except TargetError as error:
        print(f"xaffine check could not run: {error}", file=sys.stderr)
        return 2
    finally:  # an interrupt, too, leaves what was found so far
        _print_or_dump(report, options)
    if any(result["finished"] and not result["holds"] for result in report["properties"]):
        return 1
    return 3 if report["not_finished"] else 0


def _watch(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Run the worker, show its progress, and fill in the report from its events."""
    arguments = {name: value for name, value in vars(options).items() if name not in ("run", "json")}
    latest: dict[str, Any] = {}
    why_not = "its process ended before anything was checked"
    worker = run_worker("xaffine._command.check", arguments, min(options.time_limit, 1e6) + _GRACE)
    with progress_bar(1) as show, closing(worker) as events:
        try:
            for event in events:
                kind = event.pop("event")
                if kind == "plan":
                    report |= event
                elif kind == "case":
                    latest = event
                    done = len(report["properties"]) + event["examples"] / options.examples
                    show(f"{event['property']}, {event['examples']} examples", done / len(report["parts"]))
                else:
                    report["properties"].append(event)
            report["why"] = "the others ran no full number of cases in time"
        except WorkerError as error:
            why_not = str(error)
            if error.timed_out:
                why_not = f"no answer within {options.time_limit:g} s, and none to an interrupt"
            if latest.get("property") not in (None, *(result["property"] for result in report["properties"])):
                blank = {"holds": False, "finished": False, "worst_error": 0.0, "worst_case": None}
                report["properties"].append({**latest, **blank, "reason": why_not})
            report["why"] = why_not
    if "backend" not in report:
        raise TargetError(why_not)


def _print_or_dump(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the report, if there is a plan with which it can be compared."""
    if "backend" not in report:
        return
    _complete(report, options)
    if options.json:
        print(json.dumps({**describe_machine(), **report}, indent=2))
    else:
        _print_report(report)


def _complete(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Compare the results with what there must be: every property, in that many cases or until one failed."""
    labels, why = report.pop("parts"), report.pop("why")
    by_label = {result["property"]: result for result in report["properties"]}
    report["gaps"] += [f"{label} (not reached)" for label in labels if label not in by_label]
    checked = [
        label for label, result in by_label.items()
        if result["finished"] and (not result["holds"] or result["examples"] == options.examples)
    ]  # fmt: skip
    report["not_finished"] = None
    if checked != labels:
        report["not_finished"] = f"{len(checked)} of {len(labels)} properties have a verdict; {why}"


def _print_report(report: dict[str, Any]) -> None:
    place = f"{report['backend']} {report['version']} on {report['device']}"
    print(f"{report['target']} on {place}; {', '.join(report['dtypes'])}; seed {report['seed']}\n")
    rows, styles = [], []
    for result in report["properties"]:
        verdict = "holds" if result["holds"] else "FAILS" if result["finished"] else "not finished"
        error = f"{result['worst_error']:.3g}" if result["worst_error"] else "0"
        rows.append((result["property"], result["tier"], verdict, str(result["examples"]), error))
        styles.append("green" if result["holds"] else "bold red")
    print_table(("property", "tier", "verdict", "examples", "error"), rows, styles)
    print("\nerror: the worst, as a fraction of its rounding bound.")
    for gap in report["gaps"]:
        print(f"not tested: {gap}")
    failures = [result for result in report["properties"] if not result["holds"]]
    failures.sort(key=lambda failure: not failure["finished"])  # what is wrong comes before what hangs
    for i, failure in enumerate(failures):
        if i == 0:
            facts = (failure[key] for key in ("property", "sentence", "reason", "code"))
            print(f"\n{describe_failure(*facts, finished=failure['finished'])}")
        else:
            reason = failure["reason"].partition("\n")[0]
            what = "does not hold either" if failure["finished"] else "did not finish"
            print(f"\n{failure['property']} {what}: {reason}")
    if report["not_finished"]:
        print(f"\nnot finished: {report['not_finished']}")


def _work(emit: Callable[..., None], *, target: str, examples: int, tf32: bool, **options: Any) -> None:
    """Check the target and emit what is found."""
    make = import_target(target)
    summation = Summation(factors="tf32", cuts=True) if tf32 else None
    try:
        plan = Plan(make, max_examples=examples, summation=summation, target=target, **options)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise TargetError(str(error)) from error
    if not plan.parts:
        msg = f"nothing is left to check; not tested: {'; '.join(plan.gaps)}"
        raise TargetError(msg)
    report = plan.report([])
    facts = {name: getattr(report, name) for name in ("backend", "version", "device", "dtypes", "seed", "gaps")}
    emit("plan", **facts, parts=[part.label for part in plan.parts])

    def progress(part: Part, examples: int, case: Case) -> None:
        emit("case", **part.facts, examples=examples, code=plan.code(part, case))

    for result in plan.run(progress):
        emit("result", **result.to_dict())


if __name__ == "__main__":
    serve(_work)
