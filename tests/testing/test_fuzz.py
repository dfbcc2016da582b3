"""The script that draws new cases: its seed, its end, and what it prints of a bug that is planted."""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from tests import fuzz
from tests.core.test_properties import FORMS, Functions, properties_of
from xaffine import backends
from xaffine.testing import PROPERTIES, make_case


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The property and the case of everything that is drawn from now on."""
    record: list[tuple[str, Any]] = []

    class Recorder(fuzz.Tally):
        def before_case(self, part: Any, examples: int, case: Any) -> None:
            super().before_case(part, examples, case)
            record.append((part.label, case))

    monkeypatch.setattr(fuzz, "Tally", Recorder)
    return record


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that is a second later whenever it is read."""
    clock = SimpleNamespace(seconds=itertools.count())
    monkeypatch.setattr(fuzz, "time", SimpleNamespace(monotonic=lambda: next(clock.seconds)))
    return clock


def test_each_run_has_another_seed_and_prints_it_first(capsys: pytest.CaptureFixture[str]) -> None:
    seeds = []
    for _ in range(2):
        assert fuzz.main(["--cases", "1"]) == 0
        seeds += re.findall(r"\Anumpy \S+, seed (\d+)\n", capsys.readouterr().out)
    assert len(set(seeds)) == 2


def test_a_seed_draws_its_cases_again(drawn: list[tuple[str, Any]]) -> None:
    runs = []
    for seed in ("5", "5", "6"):
        drawn.clear()
        assert fuzz.main(["--cases", "20", "--seed", seed]) == 0
        runs.append([case.code for _, case in drawn])
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == 20


def test_a_round_has_every_property_and_dtype_and_the_next_has_other_cases(
    drawn: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SMALL", 8)
    monkeypatch.setattr(fuzz, "LARGE", 1)
    monkeypatch.setattr(fuzz, "FORMS", FORMS[:1])
    large = [f"{prop.name} (large)" for prop in PROPERTIES if prop.tier == "exact"]
    size = 8 * len(PROPERTIES) + len(large)
    assert fuzz.main(["--cases", str(size + 8), "--seed", "0"]) == 0
    assert list(dict(drawn[:size])) == [*(prop.name for prop in PROPERTIES), *large]
    assert {case.x.dtype for _, case in drawn} == set(backends.get("numpy").dtypes())
    first, second = (["".join(case.code for _, case in drawn[i : i + 8])] for i in (0, size))
    assert drawn[size][0] == PROPERTIES[0].name
    assert first != second


def test_the_run_ends_in_time_and_says_how_far_it_is(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--minutes", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"\d+ cases, .* a second, 0 rounds", line) is not None for line in lines[1:3]] == [True, True]
    assert lines[-1] == "| numpy | 29 | 0.5 | 0 |"
    assert next(clock.seconds) < 35


def test_a_failure_is_made_small_also_when_the_time_is_over_and_its_line_is_an_example_that_fails(
    clock: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class WrongForThreeRows(Functions):
        def forward(self, x: Any) -> Any:
            y = super().forward(x)
            if x.shape[:1] != (3,) or not y.size:
                return y
            clock.seconds = itertools.count(10**6)
            return y + y.dtype.type(1)

    monkeypatch.setattr(fuzz, "FORMS", (WrongForThreeRows,))
    assert fuzz.main(["--minutes", "5", "--seed", "1"]) == 1
    printed = capsys.readouterr().out
    assert "forward_is_exact does not hold." in printed
    assert "seed 1: " in printed
    assert printed.endswith("| 1 |\n")
    (line,) = re.findall(r"^@example\((.*)\)$", printed, re.MULTILINE)
    case = eval(line, {"make_case": make_case})  # noqa: S307 - as it is pasted
    assert case.x.values.shape == (3,)
    numpy = backends.get("numpy")
    with pytest.raises(AssertionError, match="not"):
        properties_of(case)[0].check(WrongForThreeRows, case, numpy)
    assert {prop.check(Functions, case, numpy) for prop in properties_of(case)} <= {0, None}


def test_a_warning_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Warns(Functions):
        def forward(self, x: Any) -> Any:
            warnings.warn("in vain", stacklevel=1)
            return super().forward(x)

    monkeypatch.setattr(fuzz, "FORMS", (Warns,))
    assert fuzz.main(["--cases", "5"]) == 1
    assert "UserWarning: in vain" in capsys.readouterr().out


def test_an_interrupt_says_what_was_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = itertools.count()

    class Interrupted(Functions):
        def forward(self, x: Any) -> Any:
            if next(calls) == 7:
                raise KeyboardInterrupt
            return super().forward(x)

    monkeypatch.setattr(fuzz, "FORMS", (Interrupted,))
    assert fuzz.main(["--minutes", "5"]) == 130
    assert re.search(r"\ninterrupted\n.*\n\| numpy \| 7 \| 0.0 \| 0 \|\n\Z", capsys.readouterr().out, re.DOTALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be positive, not 0"),
        (["--minutes", "-1"], "--minutes must be positive, not -1"),
        (["--minutes", "nan"], "--minutes must be positive, not nan"),
        (["--cases", "0"], "--cases must be at least 1, not 0"),
        (["--cases", "1", "--backend", "nunpy"], "no backend is called 'nunpy'"),
        (["--cases", "1", "--backend", "sparse"], "the backend 'sparse' is not installed; to get it: pip install"),
        (["--cases", "1", "--device", "tpu"], "numpy has no device tpu"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sparse", None)
    assert fuzz.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"fuzz could not run: {re.escape(message)}.*\n", printed.err)


def test_a_run_has_one_end(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--minutes", "1", "--cases", "1"], ["--cases", "many"]):
        with pytest.raises(SystemExit) as raised:
            fuzz.main(arguments)
        assert raised.value.code == 2
        assert "error: " in capsys.readouterr().err
