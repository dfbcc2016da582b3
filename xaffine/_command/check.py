"""``xaffine check``: put any implementation of the affine layer through all properties.

The implementation runs in a process of its own, ``python -m xaffine._command.check``, which reports what it does as
events: neither a crash nor a hang of a kernel ends the command without a word on which case it was.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any, get_args

from xaffine import backends
from xaffine._command.machine import describe_machine
from xaffine._command.target import TargetError, import_target
from xaffine._command.terminal import print_table, progress_bar
from xaffine._command.worker import WorkerError, run_worker, serve
from xaffine.testing.adapters import Adapter
from xaffine.testing.bounds import Summation
from xaffine.testing.cases import FEATURES
from xaffine.testing.checks import PROPERTIES
from xaffine.testing.options import Options
from xaffine.testing.report import describe_failure
from xaffine.testing.runner import Plan

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from xaffine.testing.cases import Case
    from xaffine.testing.report import Part

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "verify any implementation of the affine layer"
DESCRIPTION = """\
Put an implementation of the affine layer through every property: exact on integers, within rounding bounds on floats,
true to the calculus, and to its contract. TARGET names what is called as make(W, b) and returns an object with
forward(x) -> y and backward(dy) -> dx, which leaves dW and db in attributes. What it refuses is not tested. Exit code
0: right, 1: wrong, 2: could not run, 3: not finished, and nothing wrong was seen until then."""

_GRACE = 10.0  # seconds beyond the time limit, in which the worker can still report by itself what hung


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``xaffine check``."""
    parser.add_argument(
        "target", metavar="TARGET", help="package.module:factory or file.py:factory, for example layers:AffineLayer"
    )
    parser.add_argument("--backend", metavar="NAME", help=f"one of {', '.join(backends.names())}")
    parser.add_argument("--adapter", choices=get_args(Adapter), help="what TARGET is, if not what it looks like")
    parser.add_argument("--device", help="one of the backend's devices, for example cuda:0; gpu is its first GPU")
    parser.add_argument("--dtype", nargs="+", default=["float32", "float64"], help="one for each case")
    parser.add_argument("--mixed", action="store_true", help="several dtypes in one case")
    parser.add_argument("--tf32", action="store_true", help="let float32 products round their factors to TF32")
    parser.add_argument("--examples", type=int, default=100, metavar="N", help="cases for each property (100)")
    parser.add_argument("--large", type=int, default=10, metavar="N", help="cases at the edges of tiles, and long (10)")
    parser.add_argument("--seed", type=int, help="draws the same cases again")
    parser.add_argument(
        "--supports", nargs="*", metavar="WHAT", help=f"what TARGET does, out of {', '.join(FEATURES)} and dtypes"
    )
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S", help="seconds for one case (60)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="properties or tiers, instead of all")
    parser.add_argument("--strict", action="store_true", help="lacking manners are wrong, too")
    parser.add_argument("--fail-fast", action="store_true", help="end at the first property that does not hold")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check the target of the command line and print what was found, the verdict last; the exit code."""
    report: dict[str, Any] = {"target": options.target, "properties": [], "why": "interrupted"}
    try:
        _watch(options, report)
    except TargetError as error:
        print(f"could not run: {error}", file=sys.stderr)
        return 2
    finally:  # an interrupt, too, leaves what was found so far
        _print_or_dump(report, options)
    return {"right": 0, "wrong": 1, "not finished": 3}[report["verdict"]]


def _watch(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Run the worker, show its progress, and fill in the report from its events; again after one property hung."""
    arguments = {name: value for name, value in vars(options).items() if name not in ("run", "json")}
    why_not = "its process ended before anything was checked"
    for _ in range(2):
        latest: dict[str, Any] = {}
        skip = len(report["properties"])
        worker = run_worker(
            "xaffine._command.check", {**arguments, "skip": skip}, min(options.time_limit, 1e6) + _GRACE
        )
        with progress_bar(1) as show, closing(worker) as events:
            try:
                for event in events:
                    kind = event.pop("event")
                    if kind in ("plan", "probe"):
                        report |= event
                    elif kind == "case":
                        latest = event
                        done = len(report["properties"]) + event["examples"] / event["cases"]
                        show(f"{event['property']}, {event['examples']} examples", done / len(report["parts"]))
                    else:
                        report["properties"].append(event)
                report["why"] = "the others ran no full number of cases in time"
                break
            except WorkerError as error:
                report["why"] = why_not = str(error)
                if error.refused:  # no small call ended the process
                    report.pop("probe", None)
                if error.timed_out:
                    report["why"] = why_not = f"no answer within {options.time_limit:g} s, and none to an interrupt"
                if latest.get("property") not in (None, *(result["property"] for result in report["properties"])):
                    blank = {"told": 0, "worst_error": 0.0, "worst_case": None, "cause": None, "reason": why_not}
                    report["properties"].append({**latest, **blank, "verdict": "not finished"})
                if not error.timed_out or len(report["properties"]) == skip:
                    break
    if not report.keys() & {"backend", "probe"}:
        raise TargetError(why_not)


def _print_or_dump(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Print what was found, if anything was begun."""
    if not report.keys() & {"backend", "probe"}:
        return
    _conclude(report, options)
    if options.json:
        print(json.dumps({**describe_machine(), **report}, indent=2))
    else:
        _print_report(report)


def _conclude(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Add the verdict, and what there is none of."""
    labels, probe = report.pop("parts", []), report.pop("probe", None)
    why = _first_line(report.pop("why"))
    if "backend" not in report:
        report["verdict"] = "not finished"
        report["conclusion"] = f"{why}, in a first small call: {probe}. --supports names what is to be tried instead"
        return
    by_label = {result["property"]: result for result in report["properties"]}
    report["gaps"] += [f"{label} (not reached)" for label in labels if label not in by_label]
    failures = [result for result in report["properties"] if result["verdict"] == "FAILS"]
    wrong = [failure for failure in failures if options.strict or failure["tier"] != "manners"]
    done = [r for r in report["properties"] if r["verdict"] == "holds" and r["examples"] == r["cases"]]
    if wrong:
        others = len({_without_numbers(failure) for failure in wrong}) - 1
        report["verdict"] = "wrong"
        report["conclusion"] = f"{_cause(wrong[0])}{f', and {others} more as above' if others else ''}"
    elif len(done) + len(failures) == len(labels):
        report["verdict"] = "right"
        cases = sum(result["examples"] for result in done)
        report["conclusion"] = f"{cases:,} cases of {len(done)} properties hold"
        if failures:
            report["conclusion"] += f"; bad manners: {', '.join(failure['property'] for failure in failures)}"
    else:
        report["verdict"] = "not finished"
        mistrusted = [result["property"] for result in report["properties"] if result["verdict"] == "MISTRUSTED"]
        why = f"no case of {' and '.join(mistrusted)} could show a fault" if mistrusted else why
        report["conclusion"] = f"{len(done) + len(failures)} of {len(labels)} properties have a verdict; {why}"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _cause(failure: dict[str, Any]) -> str:
    return failure["cause"] or _first_line(failure["reason"])


def _without_numbers(failure: dict[str, Any]) -> str:
    """What failures of one cause have in common: on another case there are other numbers."""
    return re.sub(r"-?\b(\d[\d.,]*(e[-+]\d+)?|inf|nan)\b", "0", _cause(failure)).removesuffix(
        ", 0 times its rounding bound"
    )


_STYLES = {"holds": "green", "FAILS": "bold red", "lacking": "yellow"}


def _print_report(report: dict[str, Any]) -> None:
    if "backend" in report:
        _print_properties(report)
    print(f"{report['verdict']}: {report['conclusion']}")


def _print_properties(report: dict[str, Any]) -> None:
    place = f"{report['backend']} {report['version']} on {report['device']}"
    target = report["target"] + ("" if report["adapter"] == "layer" else f" (a {report['adapter']})")
    print(f"{target} on {place}; {', '.join(report['dtypes'])}; seed {report['seed']}\n")
    rows, styles = [], []
    for result in report["properties"]:
        lacking = result["verdict"] == "FAILS" and result["tier"] == "manners"
        verdict = "lacking" if lacking else result["verdict"]
        error = f"{result['worst_error']:.3g}" if result["worst_error"] else "0"
        rows.append((result["property"], result["tier"], verdict, str(result["examples"]), error))
        styles.append(_STYLES.get(verdict, "bold red"))
    print_table(("property", "tier", "verdict", "examples", "error"), rows, styles)
    print("\nerror: the worst, as a fraction of its rounding bound.")
    for gap in report["gaps"]:
        print(f"not tested: {gap}")
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in report["properties"]:
        if result["verdict"] in ("FAILS", "not finished"):
            groups.setdefault(_without_numbers(result), []).append(result)
    # What is wrong comes before what hangs, and manners last.
    order = sorted(groups.values(), key=lambda some: (some[0]["tier"] == "manners", some[0]["verdict"] != "FAILS"))
    for number, (failure, *others) in enumerate(order):
        if number == 0:
            print(f"\n{describe_failure(failure)}")
        else:
            what = "does not hold either" if failure["verdict"] == "FAILS" else "did not finish"
            print(f"\n{failure['property']} {what}: {_cause(failure)}")
        if others:
            print(f"\nFor the same cause: {', '.join(other['property'] for other in others)}")
    print()


def _work(
    emit: Callable[..., None], *, target: str, examples: int, tf32: bool, only: list[str], skip: int, **options: Any
) -> None:
    """Check the target and emit what is found."""
    make = import_target(target)
    summation = Summation(factors="tf32", cuts=True) if tf32 else None
    try:
        own = Options(
            max_examples=examples, summation=summation, target=target, properties=only or PROPERTIES, **options
        )
        plan = Plan(make, own, lambda case: emit("probe", probe=case.code))
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise TargetError(str(error)) from error
    if not plan.parts:
        msg = f"nothing is left to check; not tested: {'; '.join(plan.gaps)}"
        raise TargetError(msg)
    report = plan.report([])
    facts = {name: getattr(report, name) for name in ("backend", "version", "device", "dtypes", "seed", "gaps")}
    emit("plan", adapter=plan.adapter, **facts, parts=[part.label for part in plan.parts])
    del plan.parts[:skip]

    def progress(part: Part, examples: int, case: Case) -> None:
        emit("case", **part.facts, examples=examples, code=plan.code(part, case))

    for result in plan.run(progress):
        emit("result", **result.to_dict())


if __name__ == "__main__":
    serve(_work)
