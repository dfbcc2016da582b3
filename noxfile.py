"""Every check of the project: ``nox`` runs all, ``nox -s "tests(torch)"`` those of one backend."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import nox

# uv does not look where the CPU build of torch may be served from.
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.error_on_external_run = True
nox.needs_version = ">=2025.5"

PYPROJECT = nox.project.load_toml("pyproject.toml")
BACKENDS = ("numpy", "array-api-strict", "torch", "jax", "dask", "sparse", "ndonnx", "cupy")
COVERED = ("numpy", "array-api-strict", "torch", "jax", "dask", "cupy")
ASIDE = ("check_command", "docs", "figures", "gpu_scripts", "interrupts", "repository")
SITE = "docs/_build/html"


def lowest(requirements: list[str]) -> list[str]:
    """Turn the lower bounds of some requirements into pins."""
    return [requirement.replace(">=", "==", 1) for requirement in requirements]


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, types, and which way imports point."""
    session.install("-e", ".", *nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("lint-imports", "--no-cache")


@nox.session
@nox.parametrize(
    "backend",
    [
        *(nox.param(name, id=name, tags=["gpu"] if name == "cupy" else []) for name in BACKENDS),
        nox.param("minimum", id="minimum"),
        nox.param("distributed", id="distributed"),
    ],
)
def tests(session: nox.Session, backend: str) -> None:
    """Run the tests on one backend, on NumPy with the lowest versions allowed, or those that span processes."""
    requirements = list(nox.project.dependency_groups(PYPROJECT, backend))
    if backend == "minimum":
        project = PYPROJECT["project"]
        extras = project["optional-dependencies"]
        requirements = [*requirements, *lowest(project["dependencies"] + extras["cli"] + extras["testing"])]
    session.install("-e", ".[cli,testing]", *requirements)

    # Pages, scripts, figures and processes do not depend on the lowest versions: the session of NumPy tests those.
    special = {"minimum": [f"--ignore=tests/test_{name}.py" for name in ASIDE], "distributed": ["--distributed"]}
    arguments = ["-n", "auto", *special.get(backend, ["--backend", backend])]
    if backend in COVERED:
        arguments += ["--cov", "--cov-report=", "--cov-fail-under=0"]  # the coverage session judges
    session.run(
        "pytest", *arguments, *session.posargs, env={"COVERAGE_FILE": str(Path(f".coverage.{backend}").resolve())}
    )


@nox.session
def coverage(session: nox.Session) -> None:
    """Require that some of the test sessions together cover every line and branch."""
    session.install("coverage>=7.10")
    files = [name for backend in COVERED for name in map(str, Path().glob(f".coverage.{backend}*"))]
    session.run("coverage", "combine", "--keep", *files)
    session.run("coverage", "report")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into docs/_build, run every cell of its pages, and test it."""
    session.install("-e", ".[cli,testing,plot,io]", *nox.project.dependency_groups(PYPROJECT, "docs"))
    build = ["sphinx-build", "-W", "--keep-going", "-E", "-d", "docs/_build/doctrees", "docs", SITE]
    session.run(*build, env={"JAX_PLATFORMS": "cpu"})  # or it says on stderr that it could use a GPU
    session.run("pytest", "tests/test_docs.py", "tests/test_figures.py", "tests/test_site.py", "--site", SITE)


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


@nox.session(default=False)
def mutants(session: nox.Session) -> None:
    """Mutate the mathematics and require that the tests notice (half an hour)."""
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    session.install(*project["dependencies"], *extras["cli"], *extras["testing"])
    session.install(*nox.project.dependency_groups(PYPROJECT, "mutants"))
    session.run("python", "tests/mutants.py")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure the whole grid beside the other implementations and write docs/benchmarks (half an hour, alone)."""
    session.install("-e", ".[cli,plot]", *nox.project.dependency_groups(PYPROJECT, "bench"))
    session.run("python", "docs/benchmarks/measure.py", *session.posargs)
