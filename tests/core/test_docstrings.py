"""Every public name has a docstring, and every example in one runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import xaffine
from xaffine import backends

MODULES = ["xaffine", *(module.name for module in pkgutil.walk_packages(xaffine.__path__, "xaffine."))]
MODULES.remove("xaffine.__main__")
# These import another library than NumPy, and have no public examples.
KERNELS = [f"xaffine.kernels.{name}" for name in backends.names() if name != "numpy"]
MODULES = [name for name in MODULES if name not in KERNELS]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_listed_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        thing = getattr(module, public)
        assert thing.__doc__ or not callable(thing) or public in ("Make",)  # an alias has no docstring


def test_every_public_function_class_and_method_has_an_example() -> None:
    internal = ("xaffine.command", "xaffine.kernels.", "xaffine.meshes", "xaffine.shapes", "xaffine.storage")
    without = []
    for module in map(importlib.import_module, (m for m in MODULES if not m.startswith(internal))):
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


def test_plugin_that_warns_beside_xdist_is_not_loaded(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.is_blocked("benchmark")
