"""Mutation testing: break the mathematics in every small way, and require that the tests notice.

``nox -s mutants`` runs this, ``nox -s mutants -- curvature backends/numpy`` for some modules alone. The tests on NumPy
judge every mutant, those on each further backend the mutants that got past the ones before. A mutant that gets past
all of them must stand in ``equivalent_mutants.toml`` with the reason. An entry there without a mutant is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name

ROOT = Path(__file__).parents[1]
_ABOUT_CALLS = ("shapes", "plans", "steps", "errors", "functional", "jvp", "accumulate")
CALLS = ["test_affine_layer.py", *(f"core/test_{name}.py" for name in _ABOUT_CALLS)]
BACKENDS = ["test_affine_layer.py", "core/test_functional.py", "core/test_plans.py", "backends/test_primitives.py"]
# The modules that are mutated, of the libraries NumPy alone, each with the quick tests that judge it.
TESTS = {
    "functional": CALLS,
    "_checks": CALLS,
    "_shapes": CALLS,
    "layer": [*CALLS, *(f"core/test_{name}.py" for name in ("layer", "layer_copies", "storage", "initializers"))],
    "curvature": ["core/test_curvature.py", "core/test_steps.py", "core/test_errors.py"],
    "per_sample": ["core/test_per_sample.py", "core/test_steps.py", "core/test_errors.py"],
    "backends/__init__": [*BACKENDS, "backends/test_registry.py", "core/test_layer_copies.py", "core/test_errors.py"],
    "backends/_memory": [*BACKENDS, "backends/test_memory.py"],
    "backends/standard": [
        *BACKENDS,
        "backends/test_registry.py",
        "backends/test_standard.py",
        "command/test_clock.py",
        *(f"core/test_{name}.py" for name in ("shapes", "errors", "accumulate", "per_sample", "layer")),
    ],
    "backends/numpy": [*BACKENDS, "backends/test_memory.py"],
}
# Slow tests, of what is not mutated or of how much memory a result takes, which other tests check the value of; and
# those with compilers, which cannot trace what mutmut puts around functions.
LEFT_OUT = [
    "backends/test_primitives.py::TestSumOverTheBatch::test_of_many_ones_is_their_number",
    "backends/test_primitives.py::test_buffers_are_all_that_tall_operands_take",
    "backends/test_torch.py::test_autocast_rounds_no_factors_of_recorded_or_compiled_gradients",
    "backends/test_torch.py::test_compiled_peer_is_right",
    "backends/test_torch.py::test_compiles_as_one_graph",
    "backends/test_torch.py::test_compiles_before_anything_else_ran",
    "core/test_per_sample.py::test_memory_stays_small_at_scale",
    "core/test_storage.py::TestReading::test_ten_thousand_corrupted_files",
]
# The backends whose tests judge, one after the other, each with what it adds to those tests.
JUDGES: dict[str, list[str]] = {
    "numpy": [],
    "array-api-strict": ["backends/test_array_api_strict.py"],
    "torch": ["backends/test_torch.py"],
    "dask": ["backends/test_dask.py"],
}
# The judges whose tests run these modules: mutmut ends with an error where no test runs what it mutates.
JUDGES_OF = {"backends/_memory": {"numpy", "torch"}, "backends/numpy": {"numpy", "dask"}}
# Each mutant is a fork, which a pool of threads does not survive.
NO_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DASK_SCHEDULER": "synchronous"}
AT_LEAST = 0.95


class Mutation(NamedTuple):
    """What a mutant changes, as an entry of equivalent_mutants.toml names it."""

    function: str
    before: str
    after: str


def mutations(module: str) -> dict[str, Mutation]:
    """Return what each mutant of a module changes, by the mutant's name."""
    path = Path("xaffine", f"{module}.py")
    mutated = mutate_file_contents(str(path), path.read_text(encoding="utf-8"))
    lines = mutated.code.splitlines()

    def source(name: str) -> list[str]:
        span = mutated.line_span_by_function_name[name]
        return [re.sub(r"__mutmut_\w+", "", line).strip() for line in lines[span.start - 1 : span.end]]

    found = {}
    for name in mutated.mutant_names:
        function = name.partition("__mutmut_")[0]
        changed = list(difflib.unified_diff(source(f"{function}__mutmut_orig"), source(name), n=0, lineterm=""))[2:]
        before, after = (" ".join(line[1:] for line in changed if line[0] == sign) for sign in "-+")
        full = get_mutant_name(path, name)
        readable = re.sub(r"\.x_?|ǁ", ".", full.partition("__mutmut_")[0]).removeprefix("xaffine.")
        found[full] = Mutation(readable, before, after)
    return found


@contextlib.contextmanager
def configured(modules: list[str], judge: str) -> Iterator[None]:
    """Work in a copy of the project in which mutmut is configured to mutate some modules for one judge."""
    tests = sorted({f"tests/{name}" for module in modules for name in (*TESTS[module], *JUDGES[judge])})
    deselected = [f"--deselect=tests/{name}" for name in LEFT_OUT]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "xaffine"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".nox", ".*_cache", "mutants"))
        with (copy / "pyproject.toml").open("a", encoding="utf-8") as pyproject:
            pyproject.write(
                f"\n[tool.mutmut]\nsource_paths = ['xaffine']\nalso_copy = ['docs']\n"
                f"only_mutate = {[f'xaffine/{module}.py' for module in modules]}\n"
                f"pytest_add_cli_args_test_selection = {tests}\n"
                f"pytest_add_cli_args = {['--backend', judge, '-p', 'no:cacheprovider', *deselected]}\n"
                f"timeout_multiplier = 4\n"  # of what the tests take: those that never end fill the memory
            )
        with contextlib.chdir(copy):
            yield


def survivors(modules: list[str], judge: str, names: list[str], children: int) -> list[str]:
    """Run some mutants of some modules; those that no test noticed."""
    with configured(modules, judge):
        mutmut = [sys.executable, "-m", "mutmut"]
        command = [*mutmut, "run", "--max-children", str(children), *names]
        subprocess.run(command, env=os.environ | NO_THREADS, check=True)
        results = subprocess.run([*mutmut, "results", "--all", "true"], capture_output=True, text=True, check=True)
    verdicts = dict(re.findall(r"^\s+(\S+): (.+)$", results.stdout, re.MULTILINE))
    return [name for name in names if verdicts[name] not in ("killed", "timeout")]


def main() -> int:
    """Print what survived; 1 if that is too much, or unexplained, or if an explanation is left over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="module", help=f"of {', '.join(TESTS)}; all if none is named")
    parser.add_argument("--max-children", type=int, default=os.cpu_count(), help="processes at a time")
    arguments = parser.parse_args()
    modules = arguments.modules or list(TESTS)
    if unknown := set(modules) - set(TESTS):
        parser.error(f"not mutated: {', '.join(sorted(unknown))}")

    with configured(list(TESTS), next(iter(JUDGES))):
        made = {module: mutations(module) for module in TESTS}
    listed = tomllib.loads((ROOT / "tests" / "equivalent_mutants.toml").read_text(encoding="utf-8"))["equivalent"]
    explained = {Mutation(entry["function"], entry["before"], entry["after"]) for entry in listed}
    dead = explained - {mutation for mutants in made.values() for mutation in mutants.values()}
    for mutation in sorted(dead):
        print(f"no mutant matches this entry: {mutation}")

    changes = {name: mutation for module in modules for name, mutation in made[module].items()}
    module_of = {name: module for module in modules for name in made[module]}
    alive = list(changes)
    for judge in JUDGES:
        judged = [name for name in alive if judge in JUDGES_OF.get(module_of[name], JUDGES)]
        if judged:
            some = sorted({module_of[name] for name in judged})
            killed = set(judged) - set(survivors(some, judge, judged, arguments.max_children))
            alive = [name for name in alive if name not in killed]
        print(f"\nafter {judge} {len(changes) - len(alive)} of {len(changes)} mutants are killed", flush=True)
    for module in modules:
        left = [name for name in alive if name in made[module]]
        print(f"{module}: {len(made[module])} mutants, {len(left)} survive")
    unexplained = [changes[name] for name in alive if changes[name] not in explained]
    for function, before, after in unexplained:
        print(f"\n[[equivalent]]\nfunction = '''{function}'''\nbefore = '''{before}'''\nafter = '''{after}'''")
        print("reason = ''")
    print(f"\n{len(unexplained)} survivors are not in equivalent_mutants.toml, {len(dead)} of its entries are dead")
    return int(bool(unexplained or dead) or len(alive) > (1 - AT_LEAST) * len(changes))


if __name__ == "__main__":
    sys.exit(main())
