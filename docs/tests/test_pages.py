"""The pages as they are written. What Sphinx makes of them is looked at in test_site.py."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from xaffine import __version__
from xaffine.__main__ import main
from xaffine._command import bench, check, doctor

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("*.md")} | {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in DOCS.rglob("*.md")
    if "_build" not in path.parts
}
# Code that runs when the site is built is in a {code-cell}. This cannot, by page and first line.
WITHOUT_CELL = {
    ("docs/guides/check.md", "import cupy"): "needs a GPU",
    ("docs/guides/gpu.md", "import cupy"): "needs a GPU",
    ("docs/guides/gpu.md", 'on_card = layer.to("cupy")  # or layer.to("torch", "cuda:0")'): "needs a GPU",
    ("docs/guides/gpu.md", "from xaffine.testing import Summation, check_affine"): "needs a GPU",
}
# The README's are run by test_readme.py.
BLOCKS = [
    (page, block)
    for page, text in TEXTS.items()
    if page.startswith("docs/")
    for block in re.findall(
        r"^[`:]{3,} *(?:\{(?:code|code-block|sourcecode)\} *)?py\w*\n(.*?)^[`:]{3,}$", text, re.MULTILINE | re.DOTALL
    )
]


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str((DOCS / path).parent))  # as when Python runs it
    spec = importlib.util.spec_from_file_location(Path(path).stem, DOCS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("path", "files"),
    [("benchmarks/measure.py", ["cpu.json", "overhead.json"]), ("conformance/run.py", ["conformance.json"])],
)
def test_committed_page_is_that_of_the_committed_figures(
    path: str, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = (DOCS / path).parent
    found = [json.loads((folder / name).read_text(encoding="utf-8")) for name in files]
    assert (folder / "README.md").read_text(encoding="utf-8") == script(path, monkeypatch).write_page(*found)


def test_committed_figures_do_not_say_where_a_machine_keeps_things() -> None:
    files = [path for folder in ("benchmarks", "conformance") for path in (DOCS / folder).glob("*.json")]
    assert files
    for path in files:
        assert not re.search(r"(^|[\s\"'n])/\w+/", path.read_text(encoding="utf-8")), path


def test_code_that_no_build_runs_is_accounted_for() -> None:
    assert [(page, block.partition("\n")[0]) for page, block in BLOCKS] == list(WITHOUT_CELL)


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_code_that_no_build_runs_compiles(page: str, block: str) -> None:
    compile(block, page, "exec")


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "\n```{code-cell}" in text])
def test_pages_with_cells_say_so_to_the_builder(page: str) -> None:
    assert TEXTS[page].startswith("---\n")
    assert "\nkernelspec:\n" in TEXTS[page].partition("\n---\n")[0]


def test_nothing_takes_the_package_from_an_index_where_it_is_not() -> None:
    """It is installed from a clone, and a message may be read anywhere."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "xaffine").rglob("*.py")}
    for name, text in (TEXTS | sources).items():
        assert not re.search(r"pip install [^`\n&#]*\bxaffine\b", text), name
    for name, text in sources.items():
        assert not re.search(r"pip install [^`\n]*\"\.\[", text), name


def commands_of(text: str) -> list[str]:
    """Lines of shell blocks, indented commands, and commands within a sentence."""
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    spans = [span.replace("\n", " ") for span in re.findall(r"(?<![`\w])`([^`]+)`(?!`)", text)]
    return lines + spans + re.findall(r"^    (xaffine .*)$", text, re.MULTILINE)


def parts_of(commands: list[str], program: str) -> list[list[str]]:
    """The arguments of every call of a program."""
    parts = [part.strip() for command in commands for part in command.partition(" #")[0].split("&&")]
    return [shlex.split(part)[1:] for part in parts if part == program or part.startswith(f"{program} ")]


@pytest.mark.parametrize("page", TEXTS)
def test_commands_of_a_page_exist(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the command takes their options, and nox their sessions, not that they can run here."""
    commands = commands_of(TEXTS[page])
    for part in (doctor, check, bench):
        monkeypatch.setattr(part, "run", lambda _: 0)
    for arguments in parts_of(commands, "xaffine"):
        if arguments[:1] == ["check"] and not any(":" in argument or argument == "TARGET" for argument in arguments):
            arguments.insert(1, "TARGET")  # where a sentence leaves it out
        assert main(arguments) == 0
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = re.findall(r"^def (\w+)\(session", noxfile, re.MULTILINE)
    for arguments in parts_of(commands, "nox"):
        for name in [after for before, after in itertools.pairwise(arguments) if before == "-s"]:
            assert name.partition("(")[0] in sessions, name
    for file in re.findall(r"python ((?:docs|tests)/\S+\.py)", TEXTS[page]):
        assert (ROOT / file).exists(), file


def test_workflows_run_nox_and_nothing_else() -> None:
    workflows = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").iterdir()}
    assert sorted(workflows) == ["docs.yml", "fuzz.yml", "tests.yml", "wheels.yml"]
    for text in workflows.values():
        runs = re.findall(r"\brun: (.*)$", text, re.MULTILINE)
        assert runs
        for run in runs:
            assert re.fullmatch(r"pip install nox && nox( -s \w+( '[a-z()]+')?)?( -- .*)?", run)


def test_every_session_that_is_not_in_the_default_set_is_named_to_contributors() -> None:
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    (default,) = re.findall(r"^nox.options.sessions = (.*)$", noxfile, re.MULTILINE)
    others = [
        name
        for name in re.findall(r"^def (\w+)\(session: nox.Session\) ", noxfile, re.MULTILINE)
        if f'"{name}' not in default
    ]
    assert others
    for name in [*others, '"tests(minimum)"']:
        assert f"nox -s {name}" in TEXTS["CONTRIBUTING.md"], name


def test_architecture_names_every_module() -> None:
    table = TEXTS["docs/contributing/architecture.md"].partition("| module |")[2].partition("\n\n")[0]
    named = {
        name for first in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", first)
    }
    modules = {
        path.stem for path in (ROOT / "xaffine").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert named == modules - {"__init__", "__main__"}


def test_table_of_what_can_be_answered_otherwise_has_what_libraries_do() -> None:
    answers: set[str] = set()
    for path in (ROOT / "xaffine" / "backends").glob("[a-z]*.py"):
        text = path.read_text(encoding="utf-8")
        for body in re.findall(r"^class \w+\(Backend\):\n(.*?)^(?=\S)", text, re.MULTILINE | re.DOTALL):
            answers |= set(re.findall(r"^    (?:def )?([a-z]\w*)(?: = |\()", body, re.MULTILINE))
    table = TEXTS["docs/guides/new-backend.md"].partition("| question |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == answers - {"name", "namespace", "xp"}


def test_changelog_has_the_version_on_top() -> None:
    versions = re.findall(r"^## (.*)$", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", version) for version in versions[1:])
    assert all(version.startswith(f"{__version__} ") for version in versions[1:2])


def test_the_landing_page_is_the_beginning_of_the_readme() -> None:
    marker = re.findall(r"^<!-- .* -->$", TEXTS["README.md"], re.MULTILINE)
    assert len(marker) == 1
    assert f":end-before: {marker[0]}\n" in TEXTS["docs/index.md"]
