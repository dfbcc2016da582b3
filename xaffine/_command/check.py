"""``xaffine check``: put any implementation of the affine layer through all properties.

The implementation runs in a process of its own, which gets operands and returns results; what is right, this process
alone knows. Neither a crash nor a hang of a kernel ends the command without a word on which case it was.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from xaffine import backends
from xaffine._command.files import require_writable, write_text
from xaffine._command.machine import describe_machine
from xaffine._command.terminal import print_table, progress_bar
from xaffine.testing._subject import TamperedError
from xaffine.testing._target import TargetError
from xaffine.testing._views import FOOTNOTE, HEADER, to_junit, to_markdown, to_page
from xaffine.testing.adapters import Adapter
from xaffine.testing.bounds import Summation
from xaffine.testing.cases import FEATURES
from xaffine.testing.checks import PROPERTIES
from xaffine.testing.options import Options
from xaffine.testing.runner import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from xaffine.testing.report import Report, Result

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "verify any implementation of the affine layer"
DESCRIPTION = """\
Put an implementation of the affine layer through every property: exact on integers, within rounding bounds on floats,
true to the calculus, and to its contract. TARGET names what is called as make(W, b) and returns an object with
forward(x) -> y and backward(dy) -> dx, which leaves dW and db in attributes. What it refuses is not tested. Exit code
0: right, 1: wrong, 2: could not run, 3: not finished, and nothing wrong was seen until then."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``xaffine check``."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="package.module:factory or file.py:factory, for example layers:AffineLayer",
    )
    parser.add_argument("--backend", metavar="NAME", help=f"one of {', '.join(backends.names())}")
    parser.add_argument("--adapter", choices=get_args(Adapter), help="what TARGET is, if not what it looks like")
    parser.add_argument("--device", help="one of the backend's devices, for example cuda:0; gpu is its first GPU")
    parser.add_argument("--dtype", nargs="+", help="one for each case; float32 and float64 by default")
    parser.add_argument("--mixed", action="store_true", help="several dtypes in one case")
    parser.add_argument("--tf32", action="store_true", help="factors may be rounded to TF32; float32 by default")
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
    some: Any = {"type": Path, "metavar": "FILE", "default": argparse.SUPPRESS}
    parser.add_argument("--json", **some, help="the report for a program to read; - prints it")
    parser.add_argument("--junit", **some, help="likewise, as CI servers read test results")
    parser.add_argument("--markdown", **some, help="likewise, as a summary beside a change")
    parser.add_argument("--html", **some, help="likewise, for a browser")
    parser.set_defaults(run=run, error=parser.error)


def run(options: argparse.Namespace) -> int:
    """Check the target of the command line and print what was found, the verdict last; the exit code."""
    files = {view: file for view in _VIEWS if (file := getattr(options, view, None)) is not None}
    for some in (options.dtype or [], options.only, options.supports or []):  # which take whatever follows them
        if options.target is None and some and ":" in some[-1]:
            options.target = some.pop()
    if options.target is None:
        options.error("name what is to be checked: package.module:factory or file.py:factory")
    own = {name: value for name, value in vars(options).items() if name in Options.__dataclass_fields__}
    try:
        own |= {"max_examples": options.examples, "properties": options.only or PROPERTIES}
        own |= {"summation": Summation(factors="tf32", cuts=True) if options.tf32 else None}
        for file in files.values():
            require_writable(file)
        if len(set(map(os.path.realpath, files.values()))) < len(files):
            msg = f"each view of the report needs a file of its own; got {', '.join(map(str, files.values()))}"
            raise ValueError(msg)
        with suppress(AttributeError, OSError):  # on Linux: other processes of the user cannot read this one's memory
            ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
        plan = Plan(options.target, Options(**own))
    except TamperedError as error:
        print(f"wrong: {error}")
        return 1
    except (ImportError, OSError, RuntimeError, TargetError, TypeError, ValueError) as error:
        print(f"could not run: {error}", file=sys.stderr)
        return 2
    results: list[Result] = []
    why: str | None = "interrupted"
    with closing(plan), progress_bar(len(plan.parts)) as show:
        try:
            for result in plan.run(plan.shown(show)):
                results.append(result)  # noqa: PERF402 - an interrupt leaves those so far
            why = None
        finally:  # an interrupt, too, leaves what was found so far
            report = plan.report(results, why)
            for view, file in files.items():
                write_text(file, _VIEWS[view](report))
            if "-" not in map(str, files.values()):
                _print_report(report)
    return {"right": 0, "wrong": 1, "not finished": 3}[report.verdict]


_VIEWS: dict[str, Callable[[Report], str]] = {
    "json": lambda report: json.dumps({**describe_machine(), **report.to_dict()}, indent=1) + "\n",
    "junit": to_junit,
    "markdown": to_markdown,
    "html": to_page,
}
_STYLES = {"holds": "green", "lacking": "yellow"}


def _print_report(report: Report) -> None:
    print(f"{report.head}\n")
    print_table(HEADER, report.rows, [_STYLES.get(result.word, "bold red") for result in report.results])
    print(f"\n{FOOTNOTE}")
    for note in report.notes:
        print(note)
    for number, (first, *others) in enumerate(report.causes):
        what = "did not finish" if first.verdict == "not finished" else "does not hold either"
        print(f"\n{first.failure if number == 0 else f'{first.part.label} {what}: {first.cause}'}")
        if others:
            print(f"\nFor the same cause: {', '.join(other.part.label for other in others)}")
    print(f"\n{report.verdict}: {report.conclusion}")
