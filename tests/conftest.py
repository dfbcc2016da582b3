"""Which backend the tests run on is chosen from outside: ``pytest --backend torch``.

A backend whose library is missing is an error. One whose GPU is missing skips what needs the GPU, and says so.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from xaffine import backends

pytest_plugins = ["pytester"]

# Examples of each property; fewer where a library compiles or schedules anew for every shape.
EXAMPLES = {"jax": 15, "dask": 30, "ndonnx": 4, "sparse": 30}
# The example does not run on sparse arrays, and a matrix product of ndonnx takes a third of a second.
WITHOUT_EXAMPLE = ("sparse", "ndonnx")
WITH_PEERS = ("numpy", "torch", "jax")

OWN_FILES = {name: f"test_on_{name.replace('-', '_')}.py" for name in backends.names()}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="numpy", choices=backends.names(), help="the array library to test on")
    parser.addoption("--device", default=None, help="one of the backend's devices, as text; gpu is its first GPU")
    parser.addoption("--distributed", action="store_true", help="the tests that span processes, and those alone")
    parser.addoption("--site", default=None, help="the folder of the built site, to be tested (nox -s docs)")
    parser.addoption("--tf32", action="store_true", help="let products round their factors to TF32: properties alone")


def pytest_configure(config: pytest.Config) -> None:
    # What a shell starts in the background ignores SIGINT, and so would the processes that tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Derandomised: a run shows what the commit does, not what a seed found. Deadlines would test the machine.
    settings.register_profile(
        "xaffine",
        max_examples=EXAMPLES.get(config.getoption("backend"), 100),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("xaffine")
    config.addinivalue_line("markers", "once: does not depend on the backend; runs with numpy only")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files of other backends, those that span processes, and that of the site where none was built."""
    if collection_path.name.startswith("test_"):
        spans = collection_path.name.startswith("test_distributed_")
        if spans != config.getoption("distributed"):
            return True
    backend = config.getoption("backend")
    others = {file for name, file in OWN_FILES.items() if name != backend}
    if backend in WITHOUT_EXAMPLE:
        others.add("test_digits.py")
    if backend not in WITH_PEERS:
        others.add("test_peers.py")
    if config.getoption("site") is None:
        others.add("test_site.py")
    return True if collection_path.name in others else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("backend") != "numpy":
        once = [item for item in items if item.get_closest_marker("once")]
        config.hook.pytest_deselected(items=once)
        items[:] = [item for item in items if item not in once]


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    """The backend under test."""
    try:
        backend = backends.get(request.config.getoption("backend"))
    except RuntimeError as error:  # the library is here, its GPU is not
        pytest.skip(str(error))
    backend.use_full_precision()
    device = request.config.getoption("device")
    if backend.name == "torch" and device is not None:
        # Tests that name no device run on it, too. The other libraries' default is their first GPU.
        backend.xp.set_default_device(backend.device(device))
    return backend


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest, backend: backends.Backend) -> object:
    """The device under test, the backend's default one if none was named."""
    name = request.config.getoption("device")
    return None if name is None else backend.device(name)
