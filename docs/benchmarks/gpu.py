"""Test and time xaffine on an NVIDIA GPU: one command, one file of evidence.

    python docs/benchmarks/gpu.py [FOLDER]

Runs the tests and then the benchmark on those of CuPy, torch and JAX that are installed, in float32, TF32, float16 and
bfloat16, writes gpu.json into the folder (this file's own by default), and prints a short table last. Needs no
installation of xaffine itself: NumPy, array-api-compat, array-api-strict, pytest, hypothesis, rich, threadpoolctl and
the array libraries.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from xaffine import backends  # noqa: E402 - from where this file lies
from xaffine.command.bench import GRID  # noqa: E402

LIBRARIES = ("cupy", "torch", "jax")
SHAPES = (*GRID, (4096, 4096, 4096), (8192, 1024, 4096), (4096, 4096, 512))
# What lets each library round the operands of float32 products to TF32.
TF32 = {"CUPY_TF32": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32"}
MODES: dict[str, tuple[str, dict[str, str]]] = {
    "float32": ("float32", {}),
    "TF32": ("float32", TF32),
    "float16": ("float16", {}),
    "bfloat16": ("bfloat16", {}),
}
SECONDS = 900  # for one run of the tests or of the benchmark


def run(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and the last line of what a command printed."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    every = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
    try:
        child = subprocess.run(  # noqa: S603 - our own commands
            [sys.executable, "-m", *command],
            cwd=ROOT, env=every, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, f"stopped after {SECONDS} s"
    lines = (child.stdout + child.stderr).strip().splitlines()
    return child.returncode, lines[-1] if lines else ""


def card() -> str:
    """Name and driver of the cards, as ``nvidia-smi`` tells them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def installed_versions() -> dict[str, str]:
    """The versions that figures depend on."""
    found = {}
    for name in ("numpy", "cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "jaxlib", "hypothesis"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure(folder: Path) -> dict[str, Any]:
    """Run everything; the evidence."""
    usable = []
    for name in LIBRARIES:
        try:
            backends.get(name).device("gpu")
            usable.append(name)
        except (ImportError, RuntimeError, ValueError) as error:
            print(f"{name} is left out: {error}", flush=True)
    found: dict[str, Any] = {"card": card(), "versions": installed_versions(), "tests": {}, "benchmarks": {}}
    for name in usable:
        start = time.monotonic()
        example = [] if importlib.util.find_spec("sklearn") else ["--ignore", "tests/test_digits.py"]
        command = ["pytest", "-q", "-p", "no:cacheprovider", "--backend", name, "--device", "gpu", *example]
        code, last = run(command)
        found["tests"][name] = {"exit code": code, "told": last, "seconds": round(time.monotonic() - start)}
        print(f"tests on {name}: {last}", flush=True)
    data = folder / "rows.json"
    for mode, (dtype, environment) in MODES.items() if usable else ():
        shapes = [",".join(map(str, shape)) for shape in SHAPES]
        command = ["xaffine", "bench", "--groups", *usable, "--device", "gpu", "--dtype", dtype, "--shapes", *shapes]
        code, last = run([*command, "--json", str(data)], environment)
        found["benchmarks"][mode] = json.loads(data.read_text(encoding="utf-8")) if data.exists() else last
        data.unlink(missing_ok=True)
        print(f"benchmark in {mode}: exit code {code}", flush=True)
    return found


def rows(found: dict[str, Any]) -> list[str]:
    """One line for each library, mode and shape: forward and backward against the bare products and its peer."""
    lines = []
    for mode, benchmark in found["benchmarks"].items():
        for row in benchmark["rows"] if isinstance(benchmark, dict) else ():
            if row["implementation"] == "xaffine" and row["what"] == "both":
                N, n, m = row["shape"]
                peers = " ".join(f"{ratio:.2f} of {name}" for name, ratio in row["to"].items())
                rate = 6e-12 * N * n * m / row["median"]
                lines.append(f"{row['group']:6} {mode:8} {N, n, m!s:24} {rate:8.1f} TFLOP/s; {peers}")
    return lines


def main() -> int:
    """Measure and write; 0, 1 where tests failed, or 2 without a GPU."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent
    found = measure(folder)
    if not found["tests"]:
        print("no array library here finds a GPU")
        return 2
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(rows(found)))
    return int(any(tests["exit code"] for tests in found["tests"].values()))


if __name__ == "__main__":
    sys.exit(main())
