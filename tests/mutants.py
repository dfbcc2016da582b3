"""Mutation testing: break the mathematics in every small way, and require that the tests notice.

``nox -s mutants`` runs this. The tests on NumPy judge every mutant, those on array-api-strict the mutants that got past
them. A mutant that gets past both must stand in ``equivalent_mutants.toml`` with the reason why it computes the same.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of the kernels, those that the judges run.
KERNELS = ["__init__", "standard", "numpy"]
MUTATED = [f"xaffine/{name}.py" for name in ("functional", "shapes", "layer", *(f"kernels/{name}" for name in KERNELS))]
TESTS = ["core", "backends"]
JUDGES = {"numpy": TESTS, "array-api-strict": TESTS}
AT_LEAST = 0.95


def survivors(judge: str, names: list[str]) -> tuple[dict[str, str], int]:
    """Run mutants, all if none is named; the diffs of those that no test noticed, and how many were run."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "xaffine"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".nox", ".*_cache", "mutants"))
        tests = [f"tests/{name}" for name in JUDGES[judge]]
        with (copy / "pyproject.toml").open("a", encoding="utf-8") as pyproject:
            pyproject.write(
                f"\n[tool.mutmut]\nsource_paths = ['xaffine']\nonly_mutate = {MUTATED}\nalso_copy = ['docs']\n"
                f"pytest_add_cli_args_test_selection = {tests}\n"
                f"pytest_add_cli_args = ['--backend', '{judge}', '-p', 'no:cacheprovider']\n"
            )

        def mutmut(*arguments: str) -> str:
            command = [sys.executable, "-m", "mutmut", *arguments]
            return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True).stdout

        mutmut("run", *names)
        verdicts = dict(re.findall(r"^\s+(\S+): (.+)$", mutmut("results", "--all", "true"), re.MULTILINE))
        judged = {name: verdict for name, verdict in verdicts.items() if not names or name in names}
        assert judged, "mutmut made no mutants"
        alive = [name for name, verdict in judged.items() if verdict not in ("killed", "timeout")]
        return {name: mutmut("show", name) for name in alive}, len(judged)


def change(diff: str) -> tuple[str, str]:
    """The line before and after a mutation, without indentation."""
    before = re.findall(r"^-(?!--)(.*)$", diff, re.MULTILINE)
    after = re.findall(r"^\+(?!\+\+)(.*)$", diff, re.MULTILINE)
    return " ".join(map(str.strip, before)), " ".join(map(str.strip, after))


def main() -> int:
    """Print what survived; 1 if that is too much, or unexplained."""
    listed = tomllib.loads((ROOT / "tests" / "equivalent_mutants.toml").read_text(encoding="utf-8"))["equivalent"]
    reasons = {(entry["function"], entry["before"], entry["after"]): entry["reason"] for entry in listed}
    alive, total = survivors("numpy", [])
    print(f"numpy: {total - len(alive)} of {total} mutants killed", flush=True)
    alive, _ = survivors("array-api-strict", list(alive)) if alive else (alive, 0)
    killed = total - len(alive)
    print(f"with array-api-strict: {killed} of {total} killed, {killed / total:.1%}")
    unexplained = 0
    for name, diff in alive.items():
        function = re.sub(r"\.x_?|ǁ", ".", name.partition("__mutmut_")[0]).removeprefix("xaffine.")
        key = (function, *change(diff))
        if key not in reasons:
            unexplained += 1
            print(f"\n[[equivalent]]\nfunction = '''{key[0]}'''\nbefore = '''{key[1]}'''\nafter = '''{key[2]}'''")
            print("reason = ''", flush=True)
    print(f"{unexplained} survivors are not in equivalent_mutants.toml")
    return int(bool(unexplained) or killed < AT_LEAST * total)


if __name__ == "__main__":
    sys.exit(main())
