"""Which backend the tests run on is chosen from outside: ``pytest --backend torch``, or ``--backend all``.

A test that takes the fixture `backend` runs on every backend, the others once, with NumPy. A file in ``tests/backends``
that is named after a backend runs with that one alone. A backend whose library is missing is an error. One whose GPU is
missing skips what needs the GPU, and says so.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from xaffine import backends

pytest_plugins = ["pytester"]
pytest.register_assert_rewrite("tests.helpers")  # its assertions show their values, as those of tests do

TESTS = Path(__file__).parent
STAND_IN = TESTS / "cupy_standin"  # which is CuPy where it comes first on PYTHONPATH
# Examples of each property; fewer where a library compiles or schedules anew for every shape.
EXAMPLES = {"numpy": 200, "jax": 15, "dask": 30, "ndonnx": 4, "sparse": 30, "the stand-in for cupy": 15}
# Files that some backends cannot run, with those that can.
SOME_BACKENDS = {
    "core/test_digits.py": set(backends.names()) - {"sparse", "ndonnx"},  # no softmax; a third of a second a step
    "testing/test_peers.py": {"numpy", "torch", "jax"},  # the libraries that people write such layers with
}
OF_ONE_BACKEND = {f"backends/test_{name.replace('-', '_')}.py": {name} for name in backends.names()}


def cupy_is_stand_in() -> bool:
    """Return whether what is imported as CuPy is the stand-in for it."""
    spec = importlib.util.find_spec("cupy")
    return spec is not None and STAND_IN in Path(str(spec.origin)).parents


def pytest_addoption(parser: pytest.Parser) -> None:
    names = [*backends.names(), "all"]
    parser.addoption("--backend", default="numpy", choices=names, help="the array library to test on, or all in turn")
    parser.addoption("--device", default=None, help="one of the backend's devices, as text; gpu is its first GPU")
    parser.addoption("--tf32", action="store_true", help="let products round their factors to TF32: properties alone")


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Run each library that is installed in a process of its own if all are wanted."""
    if config.getoption("backend") != "all":
        return None
    failed = []
    for name in backends.installed():
        print(f"\npytest --backend {name}", flush=True)
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, "--backend", name]  # the last counts
        status = subprocess.run(command, cwd=config.invocation_params.dir, check=False).returncode
        failed += [] if status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else [name]
    print(f"\n{len(backends.installed())} backends were tested; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def pytest_configure(config: pytest.Config) -> None:
    # What a shell starts in the background ignores SIGINT, and so would the processes that tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Numba compiles sparse's loops anew for each dtype and rank, for seconds; as Python they take milliseconds.
    # NUMBA_DISABLE_JIT=0 tests what users run.
    os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
    library = config.getoption("backend")
    if library == "cupy" and cupy_is_stand_in():
        library = "the stand-in for cupy"
    elif library == "cupy" and any(name.startswith("STANDIN_") for name in os.environ):
        msg = f"STANDIN_... describes the stand-in for CuPy, but {STAND_IN} does not come first on PYTHONPATH"
        raise pytest.UsageError(msg)
    # mutmut runs all tests before it forks for a mutant, and what is remembered from then would hide the mutant.
    for loaded in set(backends._BY_TYPE.values()):
        loaded.plans.clear()
    backends._BY_TYPE.clear()
    # Derandomised: a run shows what the commit does; `nox -s fuzz` draws new cases. Deadlines would test the machine.
    settings.register_profile(
        "xaffine",
        max_examples=EXAMPLES.get(library, 100),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("xaffine")


def reason_to_ignore(path: Path, config: pytest.Config) -> str | None:
    """Return why a file or folder of tests is not collected, or None if it is."""
    name = path.relative_to(TESTS).as_posix()
    if name == "distributed" and not any("distributed" in argument for argument in config.args):
        return "starts and kills processes: pytest tests/distributed"
    able = (SOME_BACKENDS | OF_ONE_BACKEND).get(name)
    if able and config.getoption("backend") not in able:
        return f"--backend {' or '.join(sorted(able))}"
    return None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if TESTS in collection_path.parents and reason_to_ignore(collection_path, config) else None


def pytest_report_header(config: pytest.Config) -> list[str]:
    files = [path for path in map(TESTS.joinpath, ("distributed", *SOME_BACKENDS, *OF_ONE_BACKEND)) if path.exists()]
    reasons = {path.relative_to(TESTS.parent): reason_to_ignore(path, config) for path in files}
    lines = [f"not collected: {path} ({reason})" for path, reason in reasons.items() if reason]
    return lines + ["cupy is the stand-in for it"] * (config.getoption("backend") == "cupy" and cupy_is_stand_in())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what does not depend on the backend, unless the backend is NumPy."""

    def runs_once(item: pytest.Item) -> bool:
        of_one_backend = TESTS in item.path.parents and item.path.relative_to(TESTS).as_posix() in OF_ONE_BACKEND
        return "backend" not in item.fixturenames and not of_one_backend

    if config.getoption("backend") != "numpy":
        config.hook.pytest_deselected(items=[item for item in items if runs_once(item)])
        items[:] = [item for item in items if not runs_once(item)]


def run_onnx_on_one_thread() -> None:
    """Start no pool of threads for each constant of ndonnx: that took six times as long as all else."""
    import onnxruntime

    make_options = onnxruntime.SessionOptions

    def options_of_one_thread() -> object:
        options = make_options()
        options.intra_op_num_threads = 1
        return options

    onnxruntime.SessionOptions = options_of_one_thread


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    """The backend under test."""
    try:
        backend = backends.get(request.config.getoption("backend"))
    except RuntimeError as error:  # the library is here, its GPU is not
        pytest.skip(str(error).partition("\n")[0])
    backend.use_full_precision()
    if backend.name == "ndonnx":
        run_onnx_on_one_thread()
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


@pytest.fixture
def ones(backend: backends.Backend, device: object) -> Callable[..., Any]:
    """Return the function that makes an array of ones of the backend under test."""

    def make(*shape: int, dtype: str = "float32") -> Any:
        return backend.from_numpy(np.ones(shape, dtype), device=device)

    return make


@pytest.fixture
def numpy_backend() -> backends.Backend:
    """NumPy, for a test that does not depend on the backend."""
    return backends.get("numpy")
