"""Makers of operands and layers, comparisons, and what becomes of processes, that several files of tests use."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xaffine import AffineLayer
from xaffine.backends import Backend
from xaffine.testing import make_case
from xaffine.testing.cases import Case, Operand


def load_file(path: Path) -> Any:
    """Import a Python file that is in no package, once."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[path.stem]


PEERS = Path(__file__).parents[1] / "docs" / "benchmarks" / "peers.py"
peers = load_file(PEERS)


def floating_dtypes(backend: Backend, device: Any) -> list[str]:
    """Return the names of the real and complex floating dtypes that the backend has on a device."""
    return [dtype for dtype in backend.dtypes(device) if "int" not in dtype]


def arrays_on(backend: Backend, device: Any, *operands: Operand | None) -> list[Any]:
    """Return operands as arrays of the backend, and None where an operand is None."""
    return [None if operand is None else operand.on(backend, device) for operand in operands]


def case_on(case: Case, backend: Backend, device: Any = None) -> list[Any]:
    """Return dy, x, W and b of a case as arrays of the backend; b is None if the case has no bias."""
    return arrays_on(backend, device, case.dy, case.x, case.W, case.b)


def layer_of_ones(backend: Backend, device: Any, dtype: str, N: int) -> tuple[AffineLayer, Any]:
    """Return a layer with W (1, 1) and b (1,), and the x (N, 1) of its latest forward. All values are 1."""
    x, W, b = (backend.from_values(np.ones(shape), dtype, device=device) for shape in ((N, 1), (1, 1), (1,)))
    layer = AffineLayer(W, b)
    layer.forward(x)
    return layer, x


def directions(case: Case, seed: int = 1) -> dict[str, Operand | None]:
    """Draw an operand like each of x, W, b and dy, with None at random for x, W and b, and for a bias of None."""
    rng = np.random.default_rng(case.seed + seed)
    operands = {"x": case.x, "W": case.W, "b": case.b, "dy": case.dy}
    others = make_case(
        case.x.values.shape,
        case.W.values.shape[1],
        seed=case.seed + seed,
        values=case.kind,
        dtypes=tuple(case.x.dtype if o is None else o.dtype for o in operands.values()),  # type: ignore[arg-type]
        n_batch_axes=case.n_batch_axes,
    )
    return {
        name: None if o is None or (name != "dy" and rng.random() < 0.25) else getattr(others, name)
        for name, o in operands.items()
    }


def exact_matrix(operand: Operand | None, shape: tuple[int, ...]) -> Any:
    """Return small integers in a dtype whose sums and products of them are exact; zeros for None."""
    if operand is None:
        return np.zeros(shape, np.int64)
    dtype = complex if np.iscomplexobj(operand.values) else np.int64
    return operand.values.astype(dtype).reshape(shape)


def matrices(case: Case, **replacements: Operand | None) -> list[Any]:
    """Return x (N, n), W (n, m), b (m,) and dy (N, m) of a case, or their replacements, in exact arithmetic."""
    n, m = case.W.values.shape
    operands = {"x": case.x, "W": case.W, "b": case.b, "dy": case.dy} | replacements
    shapes = {"x": (case.N, n), "W": (n, m), "b": (m,), "dy": (case.N, m)}
    return [exact_matrix(operands[name], shape) for name, shape in shapes.items()]


def assert_equals(backend: Backend, got: Any, expected: Any, like: Any) -> None:
    """Assert that an array has the values expected, to the last bit, and the type, dtype and shape of another array."""
    assert type(got) is type(like)
    assert got.dtype == like.dtype
    values = backend.to_numpy(got)
    assert values.shape == backend.to_numpy(like).shape
    assert np.array_equal(values, np.reshape(expected, values.shape).astype(values.dtype))


def assert_fills(buffers: Sequence[Any], layer: AffineLayer, x: Any, dy: Any) -> None:
    """Run a layer with buffers for y, dx, dW and db, and assert that it returns and keeps these very arrays."""
    y, *gradients = buffers
    assert layer.forward(x, out=y) is y
    assert layer.backward(dy, out=tuple(gradients)) is gradients[0]
    assert layer.dW is gradients[1]
    assert layer.db is gradients[2]


def wrap_primitives(monkeypatch: pytest.MonkeyPatch, backend: Backend, wrap: Callable[[Any], Any]) -> None:
    """Make every plan use what `wrap` returns for the primitives that the backend chooses."""
    own = type(backend).primitives
    monkeypatch.setattr(backend, "plans", {})
    monkeypatch.setattr(type(backend), "primitives", lambda *some, **options: tuple(map(wrap, own(*some, **options))))


def inner(a: Any, b: Any) -> Any:
    """Return the sum of a · b over all elements, exactly on small integers."""
    dtype = complex if np.iscomplexobj(a) or np.iscomplexobj(b) else np.int64
    return np.sum(np.asarray(a).astype(dtype) * np.asarray(b).astype(dtype))


def gone(pid: int) -> bool:
    """Whether a process ended, if it was nobody's child that is waited for, soon."""
    status = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if status.read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False
