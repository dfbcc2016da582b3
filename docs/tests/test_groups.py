"""docs/benchmarks/groups.py: ``xaffine bench`` for groups of implementations, with the names of the tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("groups")


def test_rows_have_the_names_of_the_tables(groups: Any, tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    arguments = ["--groups", "numpy", "--shapes", "2,3,4", "--rounds", "1", "--dtype", "float64", "--json", str(data)]
    assert groups.main(arguments) == 0
    found = json.loads(data.read_text(encoding="utf-8"))
    names = {"limit", "xaffine", "classic class", "xaffine, out="}
    assert {(row["group"], row["implementation"]) for row in found["rows"]} == {("numpy", name) for name in names}
    assert all(set(row["to"]) == names - {row["implementation"]} for row in found["rows"])
    assert found["rounds"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def stand_in(calls: list[list[str]], exit_codes: dict[str, int]) -> Any:
    """``xaffine bench`` that measures nothing; a backend with an exit code of -1 is interrupted by a signal."""

    def bench(arguments: list[str]) -> int:
        calls.append(arguments)
        backend = arguments[arguments.index("--backend") + 1]
        row = {"group": backend, "implementation": "limit", "to": {}}
        part = {"date": "today", "groups": {backend: {"version": "1"}}, "rows": [row]}
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(part))
        if exit_codes.get(backend) == -1:
            raise SystemExit(143)
        return exit_codes.get(backend, 0)

    return bench


def test_thinc_is_timed_in_float32_alone_and_has_its_own_version(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(groups, "xaffine_command", stand_in(calls, {}))
    monkeypatch.setattr(groups, "version", lambda name: f"{name} of tomorrow")
    data = tmp_path / "rows.json"
    for dtypes in (["float32", "float64"], ["float64"]):
        assert groups.main(["--groups", "thinc", "numpy", "cupy", "--dtype", *dtypes, "--json", str(data)]) == 0
        found = json.loads(data.read_text())
        thinc = {"thinc": {"version": "thinc of tomorrow"}} if "float32" in dtypes else {}
        assert found["groups"] == {**thinc, "numpy": {"version": "1"}, "cupy": {"version": "1"}}
    dtypes_of_calls = [call[call.index("--dtype") + 1 : call.index("--json")] for call in calls]
    both = ["float32", "float64"]
    assert dtypes_of_calls == [["float32"], both, both, ["float64"], ["float64"]]
    assert ["--beside" in call for call in calls] == [True, True, False, True, False]


@pytest.mark.parametrize(("code", "others"), [(2, ["torch", "jax"]), (130, ["torch"]), (-1, ["torch"])])
def test_group_that_fails_leaves_the_rows_of_the_others(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, others: list[str]
) -> None:
    monkeypatch.setattr(groups, "xaffine_command", stand_in([], {"torch": code}))
    data = tmp_path / "rows.json"
    arguments = ["--groups", "numpy", "torch", "jax", "--json", str(data)]
    if code == -1:
        with pytest.raises(SystemExit):
            groups.main(arguments)
    else:
        assert groups.main(arguments) == code
    assert [row["group"] for row in json.loads(data.read_text())["rows"]] == ["numpy", *others]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]
