"""Verify xaffine on every backend, and other implementations of the layer: writes conformance.json, .svg and README.md.

    python docs/conformance/run.py                       # everything
    python docs/conformance/run.py "xaffine on numpy"    # that implementation alone; the others stay as they are
    python docs/conformance/run.py --page                # the page and the plot alone

Needs ``pip install ".[cli,testing,plot]"`` and thinc; an array library that is missing is left out, as the page says.
"""

from __future__ import annotations

import datetime
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl

import xaffine
from xaffine import backends
from xaffine.__main__ import main as xaffine_command
from xaffine._command.machine import describe_machine
from xaffine.testing import PROPERTIES
from xaffine.testing.cases import FEATURES

HERE = Path(__file__).parent
DATA = HERE / "conformance.json"
FILE = HERE.parent / "benchmarks" / "peers.py"
PEERS = {
    "classic class": ("Classic", "numpy"),
    "torch linear + autograd": ("torch_linear", "torch"),
    "jax.vjp": ("jax_vjp", "jax"),
    "thinc Linear": ("thinc_linear", "numpy"),
}
HALVES = ("float16", "bfloat16")
# Fewer where every new shape is compiled, or any operation takes milliseconds.
EXAMPLES = {"jax": 20, "ndonnx": 8}
MARKS = {"holds": "holds", "FAILS": "**fails**", "not finished": "not finished", "MISTRUSTED": "nothing told"}
MARKS["TAMPERED"] = "**tampered**"


def check(target: str, backend: str, *arguments: str) -> dict[str, Any] | str:
    """The report of ``xaffine check``, or why it could not run; a KeyboardInterrupt where it was interrupted."""
    examples = str(EXAMPLES.get(backend, 200))
    command = ["check", target, "--backend", backend, "--examples", examples, "--large", "0", "--seed", "0"]
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        exit_code = xaffine_command([*command, *arguments, "--json", "-"])
    if exit_code == 130:
        raise KeyboardInterrupt
    if exit_code == 2:
        return stderr.getvalue().strip()
    folders = sorted({str(Path(xaffine.__file__).parents[1]), *filter(None, sys.path)}, key=len, reverse=True)
    text = stdout.getvalue()
    for folder in folders:  # where things lie on this machine is of no use elsewhere
        text = text.replace(f"{folder}/", "")
    report: dict[str, Any] = json.loads(text)
    return report


def measure(names: list[str], reports: dict[str, Any]) -> None:
    """Run some implementations, all if none is named, and fill in the report of each when it is whole."""
    targets = {name: (f"{FILE}:{attribute}", backend) for name, (attribute, backend) in PEERS.items()}
    targets |= {f"xaffine on {name}": ("xaffine:AffineLayer", name) for name in backends.names()}
    for name in names or targets:
        target, backend = targets[name]
        print(name, flush=True)
        report = {"float32": check(target, backend, "--dtype", "float32")}
        if isinstance(report["float32"], dict):
            for dtype in HALVES:
                if dtype in backends.get(backend).dtypes() and name != "thinc Linear":
                    report[dtype] = check(target, backend, "--dtype", dtype)
            for gap in report["float32"]["gaps"]:
                feature = next((name for name, text in FEATURES.items() if text == gap), None)
                if feature is not None:
                    report[feature] = check(target, backend, "--dtype", "float32", "--supports", feature)
        reports[name] = report


def write_page(found: dict[str, Any]) -> str:
    """The page, from what was found."""
    ran = {name: report for name, report in found["reports"].items() if not isinstance(report["float32"], str)}
    lines = [
        "# Conformance",
        "",
        f"Written by `docs/conformance/run.py` on {found['date']}: xaffine {found['xaffine']}, "
        f"Python {found['python']}, {found['system']}, {found['cores']} cores; {found['blas']}. The data are in "
        "[conformance.json](conformance.json); `docs/benchmarks/peers.py` has the other implementations. "
        "Where a property does not hold, the smallest case found is below.",
        "",
        "| implementation | version | examples of each property |",
        "|---|---|---|",
    ]
    for name, report in ran.items():
        first = report["float32"]
        most = max(result["examples"] for result in first["properties"])
        thinc = f"thinc {found['thinc']}, " if "thinc" in name else ""
        lines.append(f"| {name} | {thinc}{first['backend']} {first['version']} | {most} |")
    left_out = {name: report for name, report in found["reports"].items() if name not in ran}
    lines += [f"\nNot run: {name}: {report['float32'].splitlines()[0]}" for name, report in left_out.items()]
    results = [result for report in ran.values() for result in report["float32"]["properties"]]
    errors = [result["worst_error"] for result in results if result["verdict"] == "holds"]
    lines += [
        "\nNot measured: float64, complex numbers and integers; TF32 and long axes (`--large`); half precision of "
        "thinc, and of the implementations that a table below has no column for.",
        "",
        "![The worst error of each implementation in forward and backward, float32, as a fraction of its rounding "
        f"bound, which is 1: at most {max(errors):.2f} where the property holds](conformance.svg)",
    ]

    lines += ["", "## float32", "", "The number is the worst error as a fraction of its rounding bound.", ""]
    lines += table(ran, "float32", [prop.name for prop in PROPERTIES])
    lines += ["", "## Half precision", "", "Bounds with float32 accumulators, the sum rounded once.", ""]
    for dtype in HALVES:
        some = {name: report for name, report in ran.items() if isinstance(report.get(dtype), dict)}
        lines += [f"### {dtype}", "", *table(some, dtype, [p.name for p in PROPERTIES if p.tier == "bounded"]), ""]

    lines += ["## What an implementation does not claim", ""]
    lines += ["Verified all the same, with matrices, a bias and nothing empty beside it.", ""]
    lines += ["| implementation | feature | verdict |", "|---|---|---|"]
    for name, report in ran.items():
        for feature in FEATURES:
            if feature in report:
                reasons = failures(report[feature], tiers=("exact", "bounded", "calculus"))
                verdict = f"fails: {reasons[0][1]}" if reasons else "holds, apart from its manners"
                if isinstance(report[feature], str):
                    verdict = report[feature]
                lines.append(f"| {name} | {feature}: {FEATURES[feature]} | {verdict} |")

    lines += ["", "## What does not hold", ""]
    for name, report in ran.items():
        for dtype in ("float32", *HALVES):
            for label, reason, case in failures(report.get(dtype)):
                lines.append(f"- {name}, {dtype}, {label}: {reason}. Case: `{case}`")
    return "\n".join(lines) + "\n"


def table(reports: dict[str, Any], dtype: str, labels: list[str]) -> list[str]:
    """One row for each property, one column for each implementation."""
    lines = [f"| property | {' | '.join(reports)} |", "|---" * (len(reports) + 1) + "|"]
    for label in labels:
        cells = []
        for report in reports.values():
            found = [r for r in report[dtype]["properties"] if r["property"] == label]
            if not found:
                cells.append("not reached")
                continue
            result = found[0]
            error = f" {result['worst_error']:.2f}" if result["worst_error"] and result["verdict"] == "holds" else ""
            cells.append(MARKS[result["verdict"]] + error)
        lines.append(f"| {label.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def draw(found: dict[str, Any], file: Path) -> None:
    """Draw the worst errors in float32 as fractions of their bounds."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ran = {
        name: report["float32"] for name, report in found["reports"].items() if not isinstance(report["float32"], str)
    }
    figure, axis = plt.subplots(figsize=(7, 0.3 * len(ran) + 1), layout="constrained")
    for name, marker in (("forward_is_within_bound", "o"), ("backward_is_within_bounds", "s")):
        worst = [
            next(
                (r["worst_error"] for r in report["properties"] if (r["property"], r["verdict"]) == (name, "holds")),
                None,
            )
            for report in ran.values()
        ]
        shown = [(error, row) for row, error in enumerate(worst) if error is not None]
        axis.plot(*zip(*shown, strict=True), marker, alpha=0.7, label=name.partition("_")[0])
    axis.axvline(1, color="gray", linestyle="--", label="bound")
    axis.set(
        xlim=(0, 1.05), xlabel="worst error over its rounding bound, float32", yticks=range(len(ran)), yticklabels=ran
    )
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize="small", loc="upper left")
    with mpl.rc_context({"svg.hashsalt": "xaffine"}):  # the same drawing for the same figures
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def failures(report: Any, tiers: tuple[str, ...] | None = None) -> list[tuple[str, str, str]]:
    """Property, first line of the reason, and case of everything that does not hold."""
    if not isinstance(report, dict):
        return []
    return [
        (r["property"], r["reason"].partition("\n")[0], r["code"].partition("case = ")[2].partition("\n")[0])
        for r in report["properties"]
        if r["verdict"] == "FAILS" and (tiers is None or r["tier"] in tiers)
    ]


def main() -> int:
    """Verify, unless the page alone is asked for, and write; the exit code."""
    found = json.loads(DATA.read_text(encoding="utf-8"))
    before, exit_code = found["reports"], 0
    reports: dict[str, Any] = {}
    if "--page" not in sys.argv:
        try:
            measure(sys.argv[1:], reports)
        except KeyboardInterrupt:
            print(
                f"interrupted; written are {', '.join(reports) or 'none'}, the others stay as they were",
                file=sys.stderr,
            )
            exit_code = 130
    if reports:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        found = {"date": today, **describe_machine(), "thinc": version("thinc")}
        found["reports"] = {**before, **reports} if sys.argv[1:] or exit_code else reports
        DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, HERE / "conformance.svg")
    (HERE / "README.md").write_text(write_page(found), encoding="utf-8")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
