"""Scripts of the documentation that are interrupted: one line, exit code 130, and what was found is kept."""

from __future__ import annotations

import builtins
import importlib
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from xaffine import __main__

DOCS = Path(__file__).parents[1]


def interrupted(monkeypatch: pytest.MonkeyPatch, capfd: Any, script: Path, *arguments: str) -> str:
    """What a script writes to standard error when it is interrupted, which is all that it may write there."""
    monkeypatch.setattr("sys.argv", [script.name, *arguments])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    assert getattr(exit_.value, "code", None) == 130
    told: str = capfd.readouterr().err
    assert told.count("\n") == 1
    return told


def interrupt_at_the_first_print(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.print

    def interrupt(*words: Any, **options: Any) -> None:
        if "file" not in options:
            raise KeyboardInterrupt
        original(*words, **options)

    monkeypatch.setattr(builtins, "print", interrupt)


def test_digits(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    interrupt_at_the_first_print(monkeypatch)
    assert interrupted(monkeypatch, capfd, DOCS / "examples" / "digits.py") == "interrupted\n"


def test_figures_of_the_cpu(monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path) -> None:
    script = Path(shutil.copy(DOCS / "benchmarks" / "measure.py", tmp_path))
    monkeypatch.syspath_prepend(str(DOCS / "benchmarks"))  # where the modules are that it imports
    (tmp_path / "cpu.json").write_text("figures of before")

    groups = importlib.import_module("groups")
    row = {"group": "numpy", "implementation": "limit", "to": {}}

    def bench(arguments: list[str]) -> int:
        part = {"date": "today", "groups": {"numpy": {"version": "2"}}, "rows": [row]}
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(part))
        return 130

    monkeypatch.setattr(groups, "xaffine_command", bench)
    assert "cpu.unfinished" in interrupted(monkeypatch, capfd, script)
    assert json.loads((tmp_path / "cpu.unfinished").read_text())["rows"] == [row]
    assert (tmp_path / "cpu.json").read_text() == "figures of before"
    assert {file.name for file in tmp_path.iterdir()} == {"measure.py", "cpu.json", "cpu.unfinished"}

    monkeypatch.setattr(groups, "xaffine_command", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert interrupted(monkeypatch, capfd, script).startswith("interrupted")


@pytest.mark.parametrize("names", [[], ["classic class", "thinc Linear"]])
def test_conformance(monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path, names: list[str]) -> None:
    for name in ("run.py", "conformance.json"):
        shutil.copy(DOCS / "conformance" / name, tmp_path)
    before = json.loads((tmp_path / "conformance.json").read_text())["reports"]
    calls: list[list[str]] = []

    def check(arguments: list[str]) -> int:
        calls.append(arguments)
        if arguments[1].endswith("peers.py:Classic"):
            print("could not run", file=sys.stderr)
            return 2
        return 130

    monkeypatch.setattr(__main__, "main", check)
    told = interrupted(monkeypatch, capfd, tmp_path / "run.py", *names)
    assert told == "interrupted; written are classic class, the others stay as they were\n"
    reports = json.loads((tmp_path / "conformance.json").read_text())["reports"]
    assert len(calls) == 2
    assert reports == {**before, "classic class": {"float32": "could not run"}}
    assert list(reports) == list(before)
