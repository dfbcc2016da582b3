"""The command ``xaffine``: a doctor that verifies the layer on every array library of this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from xaffine import backends
from xaffine.doctor import blank_report, examine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["describe_machine", "examine_in_child", "main"]

_TIME_LIMIT = 300  # seconds for one backend


def main(arguments: list[str] | None = None) -> int:
    """Run the doctor.

    Parameters
    ----------
    arguments : list of str, optional
        Those of the command line by default.

    Returns
    -------
    int
        1 if an installed backend computes wrong gradients, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="xaffine",
        description="Verify forward and backward of the affine layer on every array library of this machine.",
        epilog="Exit code 1: an installed library computes wrong gradients.",
    )
    parser.add_argument("--json", action="store_true", help="print the examination as JSON")
    parser.add_argument("--version", action="version", version=f"xaffine {_version()}")
    options = parser.parse_args(arguments)

    machine = describe_machine()
    reports = list(_with_progress(backends.names()))
    if options.json:
        print(json.dumps({**machine, "backends": reports}, indent=2))
    else:
        _print_reports(machine, reports)
    return int(any(report["status"] == "wrong" for report in reports))


def describe_machine() -> dict[str, Any]:
    """Describe what figures from this machine depend on: versions, cores, and the BLAS of NumPy."""
    machine = {
        "xaffine": _version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
    try:
        import threadpoolctl
    except ImportError:
        return {**machine, "blas": "unknown without threadpoolctl"}
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    texts = [
        f"{pool['internal_api']} {pool['version']}, {pool['num_threads']} threads, "
        f"{pool.get('architecture', 'unnamed')} kernels"
        for pool in pools
    ]
    return {**machine, "blas": "; ".join(texts) or "unknown to threadpoolctl"}


def examine_in_child(name: str, time_limit: float = _TIME_LIMIT) -> dict[str, Any]:
    """Examine a backend in a process of its own: neither a crash nor a hang of a library stops the doctor."""
    if name not in backends.installed():
        return examine(name)
    command = [sys.executable, "-W", "ignore", "-m", "xaffine.doctor", name]
    try:
        child = subprocess.run(  # noqa: S603 - our own module, a name of our own
            command, capture_output=True, text=True, timeout=time_limit, check=False
        )
        report: dict[str, Any] = json.loads((child.stdout.splitlines() or [""])[-1])  # libraries may print, too
    except subprocess.TimeoutExpired:
        return blank_report(name, status="unusable", note=f"no answer within {time_limit} s")
    except json.JSONDecodeError:
        last_line = (child.stderr.strip().splitlines() or ["no message"])[-1]
        note = f"its examination ended with exit code {child.returncode}: {last_line}"
        return blank_report(name, status="unusable", note=note)
    return report


def _version() -> str:
    return importlib.metadata.version("xaffine")


def _with_progress(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Examine backends, with a bar on the terminal while that takes."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield from map(examine_in_child, names)
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("examining", total=len(names))
        for name in names:
            progress.update(task, description=f"examining {name}")
            yield examine_in_child(name)
            progress.advance(task)


def _print_reports(machine: dict[str, Any], reports: list[dict[str, Any]]) -> None:
    print(f"xaffine {machine['xaffine']}, Python {machine['python']}, {machine['system']}, {machine['cores']} cores")
    print(f"BLAS of NumPy: {machine['blas']}\n")
    header = ("backend", "version", "device", "gradients", "error", "GFLOP/s", "matmul")
    rows = [_row(report) for report in reports]
    try:
        from rich.console import Console
        from rich.table import Column, Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    else:
        columns = (Column(text, overflow="fold") for text in header)
        table = Table(*columns, box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold underline")
        for report, row in zip(reports, rows, strict=True):
            table.add_row(*row, style={"right": "green", "wrong": "bold red"}.get(report["status"], "dim"))
        Console().print(table)
    print(
        "\nright: forward and backward exact on integers, and within their rounding bounds on"
        "\nfloats; error is the worst, as a fraction of its bound. GFLOP/s: forward and backward"
        "\nin float32, beside the same matrix products alone."
    )
    for report in reports:
        if report["note"]:
            print(f"\n{report['backend']}: {report['note']}")


def _row(report: dict[str, Any]) -> tuple[str, ...]:
    speed = report["throughput"]
    worst = report["worst_error"]
    return (
        report["backend"],
        report["version"] or "-",
        report["device"] or "-",
        {"wrong": "WRONG", "not installed": "absent"}.get(report["status"], report["status"]),
        "-" if worst is None else f"{worst:.2f}",
        *("-" if speed is None else _three_digits(speed[what]) for what in ("layer", "matmul")),
    )


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


if __name__ == "__main__":
    sys.exit(main())
