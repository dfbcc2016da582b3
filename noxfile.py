"""Every check of the project: ``nox`` runs what every change must pass, ``nox -l`` lists the rest.

The sessions of tests, coverage and pages share one environment, ``.nox/shared``: each adds what it needs to it. With
``nox --no-venv`` they use the Python that runs nox, and install nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import nox

# uv does not look where the CPU build of torch may be served from.
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.error_on_external_run = True
nox.needs_version = ">=2025.5"

PYPROJECT = nox.project.load_toml("pyproject.toml")
BEGAN = time.monotonic()
BACKENDS = ("numpy", "array-api-strict", "torch", "jax", "dask", "sparse", "ndonnx", "cupy")
COVERED = (*BACKENDS, "cupy-standin")
# What a session runs on its backend, if it is not all tests once: the variables of each run, and its arguments.
VERSIONED = ("test_affine_layer.py", "core", "backends", "testing", "command/test_command.py")
DEVICE_1 = ("--backend", "cupy", "--device", "CUDA Device 1")
RUNS: dict[str, tuple[tuple[dict[str, str], tuple[str, ...]], ...]] = {
    "minimum": (
        ({}, tuple(f"tests/{part}" for part in VERSIONED)),
        ({}, ("--backend", "dask", "tests/backends/test_dask.py", "tests/core/test_properties.py")),
        ({}, ("--backend", "jax", "tests/backends/test_jax.py", "tests/core/test_properties.py")),
    ),
    "newest": (({}, ("--backend", "all")),),
    # Machines that the stand-in for CuPy pretends to be, as its docstring describes them.
    "cupy-standin": (
        ({"STANDIN_DEVICES": "1"}, ("--backend", "cupy")),
        ({"STANDIN_DEVICES": "2"}, DEVICE_1),
        (  # where copies are made
            {"STANDIN_DEVICES": "2", "STANDIN_PEERS": "0"},
            (*DEVICE_1, "tests/backends", "tests/core/test_layer_copies.py"),
        ),
        # Where products of halves are compared with their bounds.
        ({"STANDIN_HALF_SPLITK": "16"}, ("--backend", "cupy", "tests/core/test_properties.py")),
    ),
}
NO_VENV = "--no-venv" in sys.argv  # then some packages may be missing
PARALLEL = () if NO_VENV and find_spec("xdist") is None else ("-n", "auto", "--dist", "worksteal")
SITE = "docs/_build/html"
DATA = Path(".nox", "coverage").resolve()  # apart from .coverage, beside which `coverage report` removes what it finds
# What takes longer, and the lowest versions, are run by CI: .ci/run.
nox.options.sessions = ["lint", *(f"tests({b})" for b in COVERED), "coverage", "docs", "build", "cost"]


def lowest(requirements: list[str]) -> list[str]:
    """Turn the lower bounds of some requirements into pins."""
    return [requirement.replace(">=", "==", 1) for requirement in requirements]


def environment(session: nox.Session, name: str, *requirements: str) -> str:
    """Install into the environment ``.nox/NAME``, made on first use, and return its Python."""
    if NO_VENV:
        return sys.executable
    folder = Path(".nox", name).resolve()
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    if not Path(python).exists():
        session.run_install(sys.executable, "-m", "virtualenv", "--quiet", str(folder), external=True)
    # What is imported is compiled then; all of it would take a minute.
    session.run_install(python, "-m", "pip", "install", "--quiet", "--no-compile", *requirements, external=True)
    return python


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, types, also in the examples of README and guides, and which way imports point."""
    session.install("-e", ".", *nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("python", "tests/typed_pages.py")
    session.run("lint-imports", "--no-cache")


@nox.session(venv_backend="none")
@nox.parametrize(
    "backend",
    [
        *(nox.param(name, id=name, tags=["gpu"] if name == "cupy" else []) for name in BACKENDS),
        *(nox.param(name, id=name) for name in RUNS),
    ],
)
def tests(session: nox.Session, backend: str) -> None:
    """Run the tests on one backend, on the stand-in for CuPy, or on several with their lowest or newest versions."""
    requirements = nox.project.dependency_groups(PYPROJECT, backend)
    if backend == "minimum":
        project = PYPROJECT["project"]
        extras = project["optional-dependencies"]
        bounds = [
            *project["dependencies"],
            *(each for name in ("cli", "testing", "dask", "jax") for each in extras[name]),
        ]
        python = environment(session, "minimum", "-e", ".[cli,testing]", *requirements, *lowest(bounds))
    elif backend == "newest":
        python = environment(session, "newest", "--upgrade", "-e", ".[cli,testing]", *requirements)
    else:
        python = environment(session, "shared", "-e", ".[cli,testing]", *requirements)
    covered = backend in COVERED and not NO_VENV
    measured = ["--cov", "--cov-report=", "--cov-fail-under=0"] if covered else []  # the session `coverage` judges
    for number, (machine, arguments) in enumerate(RUNS.get(backend, (({}, ("--backend", backend)),))):
        variables = {"COVERAGE_FILE": str(DATA / f"{backend}.{number}"), **machine}
        if machine:
            variables |= {"PYTHONPATH": str(Path("tests", "cupy_standin").resolve()), "OMP_NUM_THREADS": "1"}
            session.log("%s", ", ".join(f"{name}={value}" for name, value in machine.items()))
        command = [python, "-m", "pytest", *PARALLEL, *measured, *arguments, *session.posargs]
        session.run(*command, env=variables, external=True)


@nox.session(venv_backend="none")
def distributed(session: nox.Session) -> None:
    """Run the tests that start clusters, meshes and processes, and kill some of them (two to five minutes)."""
    groups = nox.project.dependency_groups(PYPROJECT, "distributed")
    python = environment(session, "shared", "-e", ".[cli,testing]", *groups)
    session.run(python, "-m", "pytest", *PARALLEL, "tests/distributed", *session.posargs, external=True)


@nox.session(venv_backend="none")
def coverage(session: nox.Session) -> None:
    """Require that some of the test sessions together cover every line and branch."""
    python = environment(session, "shared", "coverage>=7.10")
    files = [name for backend in COVERED for name in map(str, DATA.glob(f"{backend}.*"))]
    session.run(python, "-m", "coverage", "combine", "--keep", *files, external=True)
    session.run(python, "-m", "coverage", "report", external=True)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the site into docs/_build, run every cell of its pages, and test pages, figures and scripts."""
    groups = nox.project.dependency_groups(PYPROJECT, "docs")
    python = environment(session, "shared", "-e", ".[cli,testing,plot,io]", *groups)
    options = ["-W", "--keep-going", "-E", "-j", "auto", "-d", "docs/_build/doctrees"]
    build = [python, "-m", "sphinx", *options, "docs", SITE]
    session.run(*build, env={"JAX_PLATFORMS": "cpu"}, external=True)  # or it says on stderr that it could use a GPU
    session.run(python, "-m", "pytest", *PARALLEL, "docs/tests", "--site", SITE, external=True)


@nox.session
def build(session: nox.Session) -> None:
    """Build wheel and sdist and import the package from each in a clean environment; ``-- FOLDER`` keeps them."""
    session.install("build")
    kept = [Path(name).resolve() for name in session.posargs]
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder)
        packages = sorted(map(str, Path(folder).iterdir()))
        assert len(packages) == 2, packages
        session.chdir(folder)  # away from the source, which would be imported instead
        for package in packages:
            session.install("--force-reinstall", package)
            session.run("python", "-c", "import xaffine; print(xaffine.__file__)")
            session.run("xaffine", "--version")
            session.run("pip", "uninstall", "--yes", "xaffine")
        for target in kept:
            shutil.copytree(folder, target, dirs_exist_ok=True)


@nox.session(venv_backend="none")
def cost(session: nox.Session) -> None:
    """Run the first set-up line in a new environment, and say what both lines take beside what the README says."""
    if NO_VENV:
        session.skip("it makes an environment")
    readme = " ".join(Path("README.md").read_text(encoding="utf-8").split())
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        session.run(sys.executable, "-m", "venv", folder, external=True)
        scripts = Path(folder, "Scripts" if os.name == "nt" else "bin")
        session.run(str(scripts / "pip"), "install", "--quiet", ".[cli]", external=True)
        session.run(str(scripts / "xaffine"), external=True)
        _compare(session, start, folder, re.search(r"half a minute and \d+ MB", readme))
    _compare(session, BEGAN, ".nox", re.search(r"about \d+ minutes and \d+ GB", readme))


def _compare(session: nox.Session, start: float, folder: str, said: re.Match[str] | None) -> None:
    size = sum(path.lstat().st_size for path in Path(folder).rglob("*") if path.is_file())
    minutes = (time.monotonic() - start) / 60
    session.log("%.1f minutes and %.2f GB; the README says %s", minutes, size / 1e9, said and said[0])


@nox.session
def mutants(session: nox.Session) -> None:
    """Mutate the mathematics and require that the tests notice (an hour; ``-- curvature`` one module)."""
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    session.install(*project["dependencies"], *extras["cli"], *extras["testing"])
    session.install(*nox.project.dependency_groups(PYPROJECT, "mutants", "torch", "dask"))
    session.run("python", "tests/mutants.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the whole grid beside the other implementations and write docs/benchmarks (half an hour, alone)."""
    session.install("-e", ".[cli,plot]", *nox.project.dependency_groups(PYPROJECT, "bench"))
    session.run("python", "docs/benchmarks/measure.py", *session.posargs)


@nox.session(venv_backend="none")
def fuzz(session: nox.Session) -> None:
    """Draw new cases of every property on one backend: ``-- --minutes 50 --backend torch``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backend", default="numpy")
    backend = parser.parse_known_args(session.posargs)[0].backend
    if backend not in BACKENDS:
        session.error(f"no backend is called {backend!r}; the backends are {', '.join(BACKENDS)}")
    groups = nox.project.dependency_groups(PYPROJECT, backend)
    python = environment(session, "shared", "-e", ".[cli,testing]", *groups)
    session.run(python, "-m", "tests.fuzz", *session.posargs, external=True)
