"""What the mathematics and the checks may know of array libraries: nothing; all that is in ``xaffine/backends``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import xaffine

SOURCE = Path(xaffine.__file__).parent
MODULES = [
    "_checks", "_shapes", "_storage", "curvature", "functional", "initializers", "layer", "per_sample",
]  # fmt: skip
LIBRARIES = re.compile(r"torch|jax|jnp|cupy|cuda|dask|ndonnx|sparse|array_api_strict|mesh|tracer", re.IGNORECASE)
# What a module may tell apart by its type: what users pass that is no array.
TOLD_APART = {"tuple", "list", "dict", "bool", "int", "float", "str", "Iterable", "np", "integer", "Integral"}


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name in the code, with its line; strings are none of these, docstrings and messages among them."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.ImportFrom(module=module, names=imported):
                yield from ((node.lineno, name) for name in (module or "", *(each.name for each in imported)))
            case ast.Import(names=imported):
                yield from ((node.lineno, each.name) for each in imported)


def compared_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string that a comparison or a look-up depends on."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare() | ast.MatchValue() | ast.Subscript():
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.lineno, part.value
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=name), *_]):
                yield node.lineno, str(name)


def faults(source: str) -> list[tuple[int, str]]:
    """What code knows of a library that it should not, by its line."""
    tree = ast.parse(source)
    found = [(line, name) for line, name in (*names(tree), *compared_texts(tree)) if LIBRARIES.search(name)]
    found += [(line, name) for line, name in names(tree) if re.fullmatch(r"is_\w+_(array|namespace)", name)]
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
                parts = [getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(kinds)]
                found += [(node.lineno, part) for part in parts if part is not None and part not in TOLD_APART]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_library_is_known(module: str) -> None:
    assert faults((SOURCE / f"{module}.py").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch", "from jax import numpy", "from xaffine.backends import cupy", "import array_api_strict",
        "from xaffine.backends.dask import BACKEND", "isinstance(x, np.ndarray)", "isinstance(x, (tuple, Tensor))",
        "is_dask_array(x)", "compat.is_numpy_array(x)", "if backend.name == 'torch': pass", "x = y['jax']",
        "hasattr(x, 'device_mesh')", "with cuda.Device(0): pass", "match name:\n    case 'sparse': pass",
        "def on_mesh(x): pass", "f(mesh=None)", "is_lazy_array(x)",
    ],
)  # fmt: skip
def test_what_is_known_of_a_library_is_found(source: str) -> None:
    assert faults(source)


@pytest.mark.parametrize(
    "source", ["'''As torch does.'''", "msg = 'call torch.no_grad()'", "isinstance(out, tuple)", "backend.is_lazy(x)"]
)
def test_what_is_said_of_a_library_is_no_fault(source: str) -> None:
    assert faults(source) == []
