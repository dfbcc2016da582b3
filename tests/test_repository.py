"""What the README promises, and the examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xaffine
from xaffine import AffineLayer, backends

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(xaffine.__path__, "xaffine.")
    if module.name not in ("xaffine.__main__",)
]
# What imports another library than NumPy is looked at in the session that has it.
OWN = {name: [f"xaffine.kernels.{name}"] for name in backends.names() if name != "numpy"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        backend = metafunc.config.getoption("backend")
        everywhere = [name for name in ("xaffine", *MODULES) if not any(name in own for own in OWN.values())]
        own = [name for name in MODULES if name in OWN.get(backend, ())] or ["xaffine"]
        metafunc.parametrize("name", everywhere if backend == "numpy" else own)


@pytest.mark.once
def test_readme_has_exactly_two_set_up_lines() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert blocks == ['pip install ".[cli]" && xaffine\n', "pip install nox && nox\n"]


@pytest.mark.once
def test_ci_runs_the_test_line_of_the_readme() -> None:
    assert "\npip install nox && nox\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.once
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


@pytest.mark.once
def test_readme_lists_every_backend() -> None:
    assert (
        tuple(re.findall(r"^\| `([a-z-]+)` \|", README.partition("## Backends")[2], re.MULTILINE)) == backends.names()
    )


@pytest.mark.once
def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_plugin_that_warns_beside_xdist_is_not_loaded(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.is_blocked("benchmark")


@pytest.mark.once
def test_every_backend_has_a_session_and_an_environment() -> None:
    noxfile, pyproject = ((ROOT / name).read_text(encoding="utf-8") for name in ("noxfile.py", "pyproject.toml"))
    sessions = re.search(r"^BACKENDS = \((.*)\)$", noxfile, re.MULTILINE)
    assert sessions
    assert set(re.findall(r'"([a-z-]+)"', sessions[1])) == set(backends.names())
    for name in backends.names():
        assert f"\n{name} = [" in pyproject


def test_examples_of_the_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_public_names_are_listed_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        thing = getattr(module, public)
        assert thing.__doc__ or not callable(thing) or public in ("Make",)  # an alias has no docstring


@pytest.mark.once
def test_every_public_function_class_and_method_has_an_example() -> None:
    internal = ("xaffine.command", "xaffine.kernels.", "xaffine.meshes", "xaffine.shapes", "xaffine.storage")
    without = []
    for module in map(importlib.import_module, ("xaffine", *(m for m in MODULES if not m.startswith(internal)))):
        if module.__name__ in ("xaffine.testing.peers", "xaffine.testing.runner"):
            continue  # the conformance page describes the former; what is public of the latter is in xaffine.testing
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            if not getattr(thing, "__module__", "").startswith("xaffine"):
                continue  # an alias, a constant
            methods = [key for key, value in vars(thing).items() if callable(value)] if isinstance(thing, type) else []
            parts = {name: thing} | {f"{name}.{key}": getattr(thing, key) for key in methods if not key.startswith("_")}
            without += [key for key, part in parts.items() if callable(part) and ">>>" not in (part.__doc__ or "")]
    assert without == []
