"""Every property of `xaffine.testing`, on the layer and on the two functional forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings

from xaffine import AffineLayer, affine, affine_backward, affine_vjp
from xaffine.backends import Array, Backend
from xaffine.testing import PROPERTIES, Case, Property, Summation, check_affine, make_case
from xaffine.testing.bounds import affine_bounds
from xaffine.testing.cases import FEATURES
from xaffine.testing.strategies import cases


class Functions:
    """`affine` and `affine_backward` in the form of a layer."""

    dW: Array = None
    db: Array = None

    def __init__(self, W: Array, b: Array | None = None, *, n_batch_axes: int | None = None) -> None:
        self.W, self.b = W, b
        self.options: dict[str, Any] = {"n_batch_axes": n_batch_axes}

    def forward(self, x: Array) -> Array:
        y = affine(x, self.W, self.b, **self.options)
        self.operands = x, self.W, self.b
        return y

    def backward(self, dy: Array) -> Array:
        dx, self.dW, self.db = affine_backward(dy, *self.operands, **self.options)
        return dx


class Vjp(Functions):
    """`affine_vjp` in the form of a layer."""

    def forward(self, x: Array) -> Array:
        y, self.vjp = affine_vjp(x, self.W, self.b, **self.options)
        return y

    def backward(self, dy: Array) -> Array:
        dx, self.dW, self.db = self.vjp(dy)
        return dx


FORMS = (AffineLayer, Functions, Vjp)
# All that there is, whatever the layer refuses.
ALL: dict[str, Any] = {"supports": FEATURES, "mixed": True, "strict": True}


class Subclass(np.ndarray):
    """As users derive them."""


class OfSubclasses(AffineLayer):
    """The layer on subclasses of ndarray alone."""

    kind: type[np.ndarray] = Subclass

    def __init__(self, W: Array, b: Array | None = None, *, n_batch_axes: int | None = None) -> None:
        super().__init__(W.view(self.kind), None if b is None else b.view(self.kind), n_batch_axes=n_batch_axes)

    def forward(self, x: Array) -> Array:  # type: ignore[override]
        return super().forward(x.view(self.kind))

    def backward(self, dy: Array) -> Array:  # type: ignore[override]
        return super().backward(dy.view(self.kind))


class OfMemoryMaps(OfSubclasses):
    """The layer on memory maps alone."""

    kind = np.memmap


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # The functional forms share the code of the layer. jax compiles every product of a new shape, and ndonnx takes
    # milliseconds for any operation: there the layer alone is drawn for.
    backend = metafunc.config.getoption("backend")
    makes = [AffineLayer] if backend in ("jax", "ndonnx") else [*FORMS]
    makes += [OfSubclasses, OfMemoryMaps] if backend == "numpy" else []
    if "make" in metafunc.fixturenames:
        metafunc.parametrize("make", makes)


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.name)
def test_property(prop: Property, make: Any, backend: Backend, device: Any, pytestconfig: pytest.Config) -> None:
    if make is OfSubclasses and prop.name == "results_match_their_primals":
        pytest.skip("which asks for results of one type, and those of a subclass are of that subclass")
    examples = settings().max_examples // (4 if issubclass(make, OfSubclasses) else 1)
    tf32 = pytestconfig.getoption("tf32")
    dtypes = [dtype for dtype in backend.dtypes(device) if not tf32 or dtype in ("float32", "complex64")]
    report = check_affine(
        make,
        backend=backend.name,
        device=device,
        dtype=dtypes,
        max_examples=examples,
        seed=0,
        summation=Summation(factors="tf32", cuts=True) if tf32 else None,
        properties=[prop],
        **ALL,
    )
    assert report.results[0].examples == examples
    assert report.results[0].worst_error <= 1
    assert not report.gaps


# As `nox -s fuzz` prints them; these two, one with floats and a large one, show the form. No others are drawn here.
@example(make_case((3, 0), 2, seed=0, values="floats", layouts=("C", "C", "C", "broadcast")))
@example(make_case((65, 1), 3, seed=0, values="units", bias=False))
@given(cases(["float32"]))
@settings(phases=[Phase.explicit])
@pytest.mark.parametrize("form", FORMS)
def test_cases_found_by_fuzzing(
    form: Any, backend: Backend, device: Any, pytestconfig: pytest.Config, case: Case
) -> None:
    if pytestconfig.getoption("tf32"):
        pytest.skip("their bounds are those of full precision")
    operands = [operand for operand in (case.x, case.W, case.b, case.dy) if operand is not None]
    missing = {operand.dtype for operand in operands} - set(backend.dtypes(device))
    # A case counts only where arrays can hold it. No skip, which would end the test before the other cases.
    assume(not missing)
    for prop in properties_of(case):
        assert (prop.check(form, case, backend, device) or 0) <= 1, prop.name


def properties_of(case: Case) -> list[Property]:
    """Return those that are drawn with values of that kind: large cases, of "units", are of the exact tier alone."""
    if case.kind == "units":
        return [prop for prop in PROPERTIES if prop.tier == "exact"]
    return [prop for prop in PROPERTIES if prop.values == case.kind]


@pytest.mark.parametrize("terms", [1024, 4096])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_long_sums_of_halves_are_within_their_bounds(backend: Backend, device: Any, dtype: str, terms: int) -> None:
    """In y, dW and dx in turn: a library that adds up the parts of such a sum in half precision misses them."""
    if dtype not in backend.dtypes(device):
        pytest.skip(f"{backend.name} has no {dtype}")
    rng = np.random.default_rng(0)
    for N, n, m in ((16, terms, 8), (terms, 16, 8), (8, 16, terms)):
        # Fractions that both dtypes hold, and whose sums of products float64 holds; of one sign, so that sums grow.
        x, W, b, dy = (rng.integers(1, 128, shape) / 128 for shape in ((N, n), (n, m), (m,), (N, m)))
        layer = AffineLayer(*(backend.from_values(array, dtype, device=device) for array in (W, b)))
        computed = {"y": layer.forward(backend.from_values(x, dtype, device=device))}
        computed["dx"] = layer.backward(backend.from_values(dy, dtype, device=device))
        computed |= {"dW": layer.dW, "db": layer.db}
        exact = {"y": x @ W + b, "dx": dy @ W.T, "dW": x.T @ dy, "db": dy.sum(0)}
        for name, bound in affine_bounds(x, W, b, dy, dtype=dtype)._asdict().items():
            errors = abs(backend.to_numpy(computed[name]).astype(float) - exact[name])
            assert (errors <= bound).all(), (name, (errors / bound).max())


def test_tf32_is_on_where_it_is_asked_for(backend: Backend, device: Any, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("tf32") or not backend.is_gpu(device):
        pytest.skip("of --tf32 on a GPU alone")
    backend.use_tf32()
    size = 1024  # a library may take other units for small products
    x = np.full((size, size), 1 + 2**-20, "float32")
    y = affine(*(backend.from_numpy(a, device=device) for a in (x, np.eye(size, dtype="float32"))))
    assert (backend.to_numpy(y) == 1).all()
