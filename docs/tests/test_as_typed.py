"""Each page runs as a reader types it: its cells as one program, with what the page tells the reader to install."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from myst_nb.core.read import read_myst_markdown_notebook
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCS = Path(__file__).parents[1]
PROJECT = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = {
    path.relative_to(DOCS).as_posix(): path
    for path in DOCS.rglob("*.md")
    if "_build" not in path.parts and "\n```{code-cell}" in path.read_text(encoding="utf-8")
}
INSTALL = re.compile(r"^To run this page: `pip install (.+)`, in a clone of the project\.$", re.MULTILINE)
DISTRIBUTIONS = importlib.metadata.packages_distributions()


def cells(page: str) -> list[tuple[str, set[str]]]:
    """The code and the tags of each cell."""
    notebook = read_myst_markdown_notebook(PAGES[page].read_text(encoding="utf-8"), path=PAGES[page])
    return [(cell.source, set(cell.metadata.get("tags", []))) for cell in notebook.cells if cell.cell_type == "code"]


def modules_of(words: list[str]) -> set[str]:
    """The modules that pip would bring with these arguments: those of the distributions, and of all that they need."""
    pending = [Requirement(f"xaffine{word[1:]}" if word[0] == "." else word) for word in words]
    found: dict[str, set[str]] = {}
    while pending:
        wanted = pending.pop()
        name, extras = canonicalize_name(wanted.name), wanted.extras | {""}
        if extras <= found.get(name, set()):
            continue
        found[name] = found.get(name, set()) | extras
        if name == "xaffine":  # as it is here, not as it was installed
            optional = PROJECT["optional-dependencies"]
            needed = PROJECT["dependencies"] + [each for extra in extras - {""} for each in optional[extra]]
        else:
            needed = importlib.metadata.requires(name) or []
        pending += [
            each
            for each in map(Requirement, needed)
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return {module for module, names in DISTRIBUTIONS.items() if found.keys() & set(map(canonicalize_name, names))}


@pytest.mark.parametrize("page", PAGES)
def test_no_cell_is_hidden_and_the_first_line_says_what_to_install(page: str) -> None:
    assert all(tags <= {"hide-input", "hide-cell", "remove-output"} for _, tags in cells(page))
    before = PAGES[page].read_text(encoding="utf-8").partition("```{code-cell}")[0]
    assert re.search(r"^# .*\n\n" + INSTALL.pattern[1:], before, re.MULTILINE)


def run(program: str, folder: Path, *paths: Path, **variables: str) -> str:
    """Run it as a file in an empty folder, with these folders on the path; what it prints."""
    file = folder / "page.py"
    file.write_text(program, encoding="utf-8")
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, str(file)], cwd=empty, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_cells_run_as_one_program_with_what_the_page_names(page: str, tmp_path: Path) -> None:
    """In a process and a folder of their own, without a notebook and with nothing else installed."""
    (line,) = INSTALL.findall(PAGES[page].read_text(encoding="utf-8"))
    hidden = DISTRIBUTIONS.keys() - modules_of(shlex.split(line))
    program = "\n\n".join(code for code, _ in cells(page))
    run(program, tmp_path, DOCS / "tests" / "hidden", HIDDEN=" ".join(hidden))


def test_network_is_a_short_program_and_on_cupy_the_same_but_for_one_line(tmp_path: Path) -> None:
    """Of the training a tenth, which is enough to see that it goes the same way."""
    page = "guides/network.md"
    before_picture = itertools.takewhile(lambda cell: "hide-input" not in cell[1], cells(page))
    program = "\n".join(code for code, _ in before_picture)
    assert len([line for line in program.splitlines() if line.strip()]) <= 60
    ((old, new),) = re.findall(r"^```diff\n-(.*)\n\+(.*)\n```$", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE)
    assert program.splitlines().count(old) == 1
    assert program.count("range(1000)") == 1
    short = program.replace("range(1000)", "range(100)")
    on_numpy = run(short, tmp_path)
    short = short.replace(old, new) + "\nprint(type(y).__module__, type(first.dW).__module__)"
    *_, on_cupy, modules = run(short, tmp_path, DOCS.parent / "tests" / "cupy_standin").splitlines()
    assert on_cupy == on_numpy.splitlines()[-1]  # the line before is of values drawn anew
    assert {module.partition(".")[0] for module in modules.split()} == {"cupy"}
