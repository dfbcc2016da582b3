"""Run ``xaffine bench`` for groups of implementations, each in a process of its own, and put all rows into one file.

    python docs/benchmarks/groups.py --groups numpy thinc --json FILE

A group is a backend and those implementations of peers.py that take its arrays. All further options are those of
``xaffine bench``, which time the same grid for each group.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xaffine.__main__ import main as xaffine_command
from xaffine._command.files import replace_text

PEERS = Path(__file__).with_name("peers.py")
# The backend, and the names in the tables with those in peers.py.
GROUPS = {
    "numpy": ("numpy", {"classic class": "Classic"}),
    "thinc": ("numpy", {"thinc Linear": "thinc_linear"}),
    "torch": ("torch", {"nn.Linear + autograd": "torch_module"}),
    "torch.compile": ("torch", {"torch.compile(nn.Linear)": "torch_compiled"}),
    "jax": ("jax", {"jax.jit by hand": "jax_jit"}),
    "cupy": ("cupy", {}),
}


def main(arguments: list[str] | None = None) -> int:
    """Time the groups one after the other; the exit code of ``xaffine bench`` where it is not 0."""
    parser = argparse.ArgumentParser(description="Run xaffine bench for groups of implementations.", allow_abbrev=False)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, required=True)
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="written anew after each group")
    options, further = parser.parse_known_args(arguments)
    found: dict[str, Any] = {}
    exit_code = 0
    for group in options.groups:
        backend, implementations = GROUPS[group]
        dtypes = [dtype for dtype in options.dtype if group != "thinc" or dtype == "float32"]  # which thinc computes in
        if not dtypes:
            continue
        targets = {f"{PEERS}:{attribute}": name for name, attribute in implementations.items()}
        part = options.json.with_name(f"{options.json.name}.{group}.unfinished")
        command = ["bench", "--backend", backend, "--dtype", *dtypes, "--json", str(part), *further]
        try:
            exit_code = max(exit_code, xaffine_command([*command, *(["--beside", *targets] if targets else [])]))
        finally:  # a run that is ended keeps what it measured
            if part.exists():
                add(found, group, json.loads(part.read_text(encoding="utf-8")), targets)
                replace_text(options.json, json.dumps(found, indent=1) + "\n")
                part.unlink()
        if exit_code == 130:
            break
    return exit_code


def add(found: dict[str, Any], group: str, part: dict[str, Any], names: dict[str, str]) -> None:
    """Add what ``xaffine bench`` found for a group, with the names of the tables in the place of targets."""
    groups, rows = found.get("groups", {}), found.get("rows", [])
    for facts in part.pop("groups").values():
        groups[group] = {**facts, "version": version("thinc")} if group == "thinc" else facts
    for row in part.pop("rows"):
        to = {names.get(name, name): ratio for name, ratio in row["to"].items()}
        rows.append({**row, "group": group, "implementation": names.get(row["implementation"], row["implementation"])})
        rows[-1]["to"] = to
    found |= {**part, "groups": groups, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
