"""Every public name has a docstring, and every example in one runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from typing import get_origin

import pytest

import xaffine
from xaffine import backends

MODULES = ["xaffine", *(module.name for module in pkgutil.walk_packages(xaffine.__path__, "xaffine."))]
MODULES.remove("xaffine.__main__")
# These import another library than NumPy, and have no public examples.
LIBRARIES = [f"xaffine.backends.{name.replace('-', '_')}" for name in backends.names() if name != "numpy"]
MODULES = [name for name in MODULES if name not in LIBRARIES]
# What users ask a backend; its other methods are what xaffine asks, as the guide to a new backend describes.
ASKED_BY_USERS = {
    "device", "dtype", "dtypes", "from_numpy", "from_values", "is_gpu", "to_device", "to_numpy", "use_full_precision",
    "use_tf32", "wait",
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_listed_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        thing = getattr(module, public)
        assert thing.__doc__ or not callable(thing) or get_origin(thing)  # an alias has no docstring


def test_every_public_function_class_and_method_has_an_example() -> None:
    gathered = ("xaffine.testing.runner", "xaffine.testing.report")  # what is public of them is in xaffine.testing
    public_modules = [m for m in MODULES if not m.startswith(("xaffine.backends.", *gathered)) and "._" not in m]
    without = []
    for module in map(importlib.import_module, public_modules):
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            if not getattr(thing, "__module__", "").startswith("xaffine"):
                continue  # an alias, a constant
            methods = [key for key, value in vars(thing).items() if callable(value)] if isinstance(thing, type) else []
            public = (
                ASKED_BY_USERS if thing is backends.Backend else {key for key in methods if not key.startswith("_")}
            )
            assert public <= set(methods)
            parts = {name: thing} | {f"{name}.{key}": getattr(thing, key) for key in public}
            without += [key for key, part in parts.items() if callable(part) and ">>>" not in (part.__doc__ or "")]
    assert without == []


def test_plugin_that_warns_beside_xdist_is_not_loaded(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.is_blocked("benchmark")
