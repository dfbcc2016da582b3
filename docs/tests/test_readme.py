"""What the README promises."""

from __future__ import annotations

import re
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


def test_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(first, scope)  # noqa: S102 - our own text
    assert scope["y"].shape == (32, 10)
    assert scope["dx"].shape == (32, 8, 8)
    assert scope["layer"].W is scope["W"]
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


def test_every_backend_has_a_session_and_an_environment() -> None:
    noxfile, pyproject = ((ROOT / name).read_text(encoding="utf-8") for name in ("noxfile.py", "pyproject.toml"))
    sessions = re.search(r"^BACKENDS = \((.*)\)$", noxfile, re.MULTILINE)
    assert sessions
    assert set(re.findall(r'"([a-z-]+)"', sessions[1])) == set(backends.names())
    for name in backends.names():
        assert f"\n{name} = [" in pyproject
