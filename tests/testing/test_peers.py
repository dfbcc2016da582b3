"""The other implementations: right where they claim to be, and what they lack is what the page says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import PEERS, load_file, peers
from xaffine._command import bench
from xaffine.backends import Backend
from xaffine.testing import PROPERTIES, Case, Property, check_affine, make_case

MANNERS = tuple(prop.name for prop in PROPERTIES if prop.tier == "manners")
OF = {
    "numpy": [(peers.Classic, MANNERS), (peers.thinc_linear, ())],
    "torch": [(peers.torch_linear, ()), (peers.torch_module, ())],
    "jax": [(peers.jax_vjp, ()), (peers.jax_jit, MANNERS[1:2])],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make" not in metafunc.fixturenames:
        return
    some = OF[metafunc.config.getoption("backend")]
    metafunc.parametrize(("make", "lacking"), some, ids=[make.__name__ for make, _ in some])


def together(properties: list[Property]) -> Property:
    """Some properties as one, on the same cases."""

    def hold_together(make: Any, case: Case, backend: Backend, device: Any = None) -> float:
        """Each of several properties holds for the case."""
        worst = 0.0
        for prop in properties:
            try:
                worst = max(worst, prop.check(make, case, backend, device) or 0.0)
            except AssertionError as error:
                raise AssertionError(f"{prop.name}: {error}") from error
        return worst

    return Property(properties[0].tier, properties[0].values, hold_together)


def test_peer_is_right_but_for_what_it_lacks(backend: Backend, make: Any, lacking: tuple[str, ...]) -> None:
    properties = [prop for prop in PROPERTIES if prop.name not in lacking]
    if backend.name == "jax":  # it compiles every operation for every shape that it has not met
        properties = [together([p for p in properties if p.values == values]) for values in ("integers", "floats")]
    examples = 8 if backend.name == "jax" else 40
    report = check_affine(make, backend=backend.name, seed=0, max_examples=examples, properties=properties, strict=True)
    assert [result.examples for result in report.results] == [examples] * len(properties)
    for prop in PROPERTIES:
        if prop.name in lacking:
            with pytest.raises(AssertionError, match=r"is accepted where|after a rejected|raised|is .*, not"):
                prop.check(make, make_case((4, 3), 2, seed=0), backend)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of torch about itself
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # of torch, where a GPU has them
def test_benchmark_times_the_peers(backend: Backend) -> None:
    groups = load_file(PEERS.with_name("groups.py")).GROUPS
    beside = {
        name: getattr(peers, attribute)
        for its_backend, implementations in groups.values()
        for name, attribute in implementations.items()
        if its_backend == backend.name
    }
    rows = bench.compare(backend, (5, 3, 4), "float32", rounds=1, beside=beside)
    assert beside
    assert {row["implementation"] for row in rows} >= {"limit", "xaffine", *beside}
    assert all(row["median"] > 0 for row in rows)
    assert "threads" in bench._threads(backend)
