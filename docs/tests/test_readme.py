"""What the README promises."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xaffine import AffineLayer, backends

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_exactly_two_set_up_lines() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert blocks == ['pip install ".[cli]" && xaffine\n', "pip install nox && nox\n"]


def test_ci_runs_the_test_line_of_the_readme() -> None:
    assert "\npip install nox && nox\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_python_of_the_readme_runs_and_prints_what_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(first, scope)  # noqa: S102 - our own text
    assert re.findall(r"```text\n(.*?)```", README, re.DOTALL) == [capsys.readouterr().out]
    for block in others:
        exec(block, scope)  # noqa: S102 - likewise
    assert np.array_equal(scope["layer"].W, AffineLayer.random(64, 10, scheme="xavier_normal", seed=0).W)


def test_readme_lists_every_backend() -> None:
    assert (
        tuple(re.findall(r"^\| `([a-z-]+)` \|", README.partition("## Backends")[2], re.MULTILINE)) == backends.names()
    )


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_description_of_the_built_package_has_absolute_links_to_the_repository() -> None:
    described = metadata("xaffine")
    ((_, repository),) = [entry.split(", ") for entry in described.get_all("Project-URL", [])]
    text = str(described.get_payload())
    links = re.findall(r"\]\(([^)]+)\)", text)
    relative = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert [link for link in links if link.startswith(repository)] == [
        f"{repository}/{'raw' if link.endswith('.svg') else 'blob'}/main/{link}" for link in relative
    ]
    assert all(link.startswith("https://") for link in links)


def test_address_of_the_repository_is_that_of_the_project_file() -> None:
    address = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.findall(r"git clone (\S+) && cd (\w+)", text) == [(address, address.rpartition("/")[2])]


def test_readme_says_what_its_lines_cost() -> None:
    """In the words that the session `cost` looks for."""
    words = " ".join(README.split())
    for cost in (r"half a minute and \d+ MB", r"about \d+ minutes and \d+ GB"):
        assert len(re.findall(cost, words)) == 1


def test_every_backend_has_a_session_and_an_environment() -> None:
    noxfile, pyproject = ((ROOT / name).read_text(encoding="utf-8") for name in ("noxfile.py", "pyproject.toml"))
    sessions = re.search(r"^BACKENDS = \((.*)\)$", noxfile, re.MULTILINE)
    assert sessions
    assert set(re.findall(r'"([a-z-]+)"', sessions[1])) == set(backends.names())
    for name in backends.names():
        assert f"\n{name} = [" in pyproject
