"""Test and time xaffine on an NVIDIA GPU: one command, one file of evidence.

    python docs/benchmarks/gpu.py           # everything: some half an hour
    python docs/benchmarks/gpu.py tests     # a part: tests, benchmarks or alternatives; the others stay as they are
    python docs/benchmarks/gpu.py page      # the page and the plot from the figures that are there

Runs all tests and the benchmark on those of CuPy, torch and JAX that are installed, in float32, TF32, float16 and
bfloat16, and what the CuPy kernel could do otherwise. Writes gpu.json, gpu.svg and gpu.md beside itself and prints a
short table last. xaffine itself need not be installed; what must is in NEEDED below. Without nvmath-python nothing is
said of fused products.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from xaffine import backends  # noqa: E402 - from where this file lies
from xaffine.command.bench import GRID, teraflops  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
DATA, PAGE, PLOT = HERE / "gpu.json", HERE / "gpu.md", HERE / "gpu.svg"
LIBRARIES = ("cupy", "torch", "jax")
CUBE, SMALL, COLUMNS = (4096, 4096, 4096), (64, 512, 512), (65536, 4096)
SHAPES = (*GRID, CUBE, (8192, 1024, 4096), (4096, 4096, 512))
# What lets each library round the factors of float32 products to TF32.
TF32 = {"CUPY_TF32": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32"}
MODES: dict[str, tuple[str, dict[str, str]]] = {
    "float32": ("float32", {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}),  # by default JAX uses TF32 on a GPU
    "TF32": ("float32", TF32),
    "float16": ("float16", {}),
    "bfloat16": ("bfloat16", {}),
}
NEEDED = ("array_api_compat", "array_api_strict", "hypothesis", "ml_dtypes", "pytest", "rich", "threadpoolctl")
VERSIONS = ("numpy", "cupy-cuda12x", "cupy-cuda13x", "nvmath-python", "torch", "triton", "jax", "jaxlib", "hypothesis")
SECONDS = 1200  # for one run of the tests or of the benchmark


def run(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and what a command printed on its standard output; on failure, what it printed at all."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Several processes share the card: JAX would take most of it at once.
    every = {**os.environ, "PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **(environment or {})}
    try:
        child = subprocess.run(  # noqa: S603 - our own commands
            [sys.executable, *command],
            cwd=ROOT, env=every, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, f"stopped after {SECONDS} s"
    return child.returncode, child.stdout if child.returncode == 0 else child.stdout + child.stderr


def last_line(text: str) -> str:
    """The last line that says something."""
    return (text.strip().splitlines() or [""])[-1]


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
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def usable_libraries() -> list[str]:
    """The libraries that find a GPU; the others are named with the reason."""
    usable = []
    for name in LIBRARIES:
        try:
            backends.get(name).device("gpu")
            usable.append(name)
        except (ImportError, RuntimeError, ValueError) as error:
            print(f"{name} is left out: {error}", flush=True)
    return usable


def tests(usable: list[str]) -> dict[str, Any]:
    """All tests on the card, and all properties in TF32."""
    found = {}
    # A few processes: each has a context of its own on the card.
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(["-n", "4"] if _is_here("xdist") else [])]
    pytest += [] if _is_here("sklearn") else ["--ignore", "tests/test_digits.py"]
    for name in usable:
        for mode, more in (("all tests", []), ("properties in TF32", ["--tf32", "tests/test_properties.py"])):
            start = time.monotonic()
            code, told = run([*pytest, "--backend", name, "--device", "gpu", *more])
            seconds = round(time.monotonic() - start)
            failed = [line for line in told.splitlines() if line.startswith(("FAILED", "ERROR"))]
            found[f"{name}, {mode}"] = {
                "exit code": code, "told": last_line(told), "failed": failed, "seconds": seconds,
            }  # fmt: skip
            print("\n".join([*failed, f"{name}, {mode}: {last_line(told)}"]), flush=True)
    return found


def _is_here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def benchmarks(usable: list[str]) -> dict[str, Any]:
    """The benchmark in every mode."""
    found = {}
    shapes = [",".join(map(str, shape)) for shape in SHAPES]
    for mode, (dtype, environment) in MODES.items():
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.json"
            command = ["-m", "xaffine", "bench", "--groups", *usable, "--device", "gpu", "--dtype", dtype]
            code, told = run([*command, "--rounds", "11", "--shapes", *shapes, "--json", str(data)], environment)
            found[mode] = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {"told": last_line(told)}
        print(f"benchmark in {mode}: exit code {code}" + (f"\n{told[-2000:]}" if code else ""), flush=True)
    return found


def alternatives(usable: list[str]) -> dict[str, Any]:
    """What the CuPy kernel could do otherwise, in float32 and TF32."""
    found = {}
    for mode in ("float32", "TF32") if "cupy" in usable else ():
        code, told = run(["docs/benchmarks/alternatives.py"], MODES[mode][1])
        found[mode] = json.loads(told) if code == 0 else {"told": last_line(told)}
        print(f"alternatives in {mode}: exit code {code}" + (f"\n{told[-2000:]}" if code else ""), flush=True)
    return found


PARTS = {"tests": tests, "benchmarks": benchmarks, "alternatives": alternatives}


def medians(found: dict[str, Any], mode: str, library: str, implementation: str, shape: Any) -> dict[str, Any] | None:
    """The row of forward and backward, warm; None where it was not measured."""
    for row in found.get("benchmarks", {}).get(mode, {}).get("rows", ()):
        if (row["group"], row["implementation"], tuple(row["shape"])) == (library, implementation, shape) and (
            row["what"], row["cache"],
        ) == ("both", "warm"):  # fmt: skip
            return dict(row)
    return None


def rows_to_reach(found: dict[str, Any]) -> Iterator[tuple[str, str, float | None]]:
    """What is asked, the limit as text, and what was reached; None where it was not measured."""
    peer = "nn.Linear + autograd"
    for mode in ("bfloat16", "TF32"):
        own, other = medians(found, mode, "cupy", "xaffine", CUBE), medians(found, mode, "torch", peer, CUBE)
        reached = own["median"] / other["median"] if own and other else None
        yield f"CuPy, {mode}, 4096³, forward + backward, over torch's eager nn.Linear", "at most 1.00", reached
        rate = found["benchmarks"][mode]["groups"]["cupy"]["rates"]["float32" if mode == "TF32" else mode] if own else 1
        reached = teraflops(own) / rate if own else None
        yield f"CuPy, {mode}, 4096³, forward + backward, share of the card's bare products", "at least 0.90", reached
    own, other = (
        medians(found, "float32", library, name, SMALL) for library, name in (("cupy", "xaffine"), ("torch", peer))
    )
    reached = own["median"] / other["median"] if own and other else None
    yield "CuPy, float32, (64, 512, 512), forward + backward, over torch's eager nn.Linear", "at most 1.25", reached
    reached = None
    measured = found.get("alternatives", {}).get("float32", {})
    for row in measured.get("db", ()):
        seconds = row["seconds"]["kernel"]
        if tuple(row["shape"]) == COLUMNS and row["dtype"] == "float32" and isinstance(seconds, float):
            reached = row["bytes"] / seconds / measured["copied bytes a second"]
    yield "CuPy, float32, db at (65536, 4096), share of the bandwidth of a copy", "at least 0.60", reached


def holds(limit: str, reached: float) -> bool:
    """Whether a figure is within its limit."""
    bound = float(limit.rpartition(" ")[2])
    return reached <= bound if limit.startswith("at most") else reached >= bound


def write_page(found: dict[str, Any]) -> str:
    """The page, from the figures."""
    lines = ["# Benchmarks on NVIDIA GPUs", "", "Written by `docs/benchmarks/gpu.py`."]
    if found:
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        lines[-1] += f" Measured on {found['date']}: {found['card']} (card, driver, memory); {versions}."
        lines[-1] += " The data are in [gpu.json](gpu.json)."
    else:
        lines[-1] += " Not yet measured on a GPU."
    if "benchmarks" in found:
        lines += ["", "![Time of forward and backward over that of the bare products, against size](gpu.svg)"]
    lines += ["", "## What is to be reached", "", "| what | asked | reached |", "|---|---|---|"]
    for what, limit, reached in rows_to_reach(found):
        text = "not yet measured on a GPU" if reached is None else f"{reached:.2f}"
        lines.append(f"| {what} | {limit} | {text if reached is None or holds(limit, reached) else f'**{text}**'} |")
    lines += ["", "## Tests on the card", "", "| tests | outcome |", "|---|---|"]
    names = [f"{name}, {mode}" for name in LIBRARIES for mode in ("all tests", "properties in TF32")]
    for name in names:
        run_of = found.get("tests", {}).get(name)
        lines.append(f"| {name} | {'not yet run on a GPU' if run_of is None else run_of['told'].strip(' =')} |")
    for mode, benchmark in found.get("benchmarks", {}).items():
        lines += ["", f"## {mode}", "", *table_of(benchmark)]
    for mode, some in found.get("alternatives", {}).items():
        lines += ["", f"## What the CuPy kernel could do otherwise: {mode}", "", *table_of_alternatives(some)]
    return "\n".join(lines) + "\n"


def table_of(benchmark: dict[str, Any]) -> Iterator[str]:
    """One line for each library, shape and implementation."""
    if "rows" not in benchmark:
        yield f"It could not run: {benchmark['told']}"
        return
    yield "Microseconds of forward + backward; TFLOP/s with a warm cache, and their share of the card's in 8192³."
    yield ""
    yield "| library | N, n, m | implementation | warm | cold | TFLOP/s | share |"
    yield "|---|---|---|---|---|---|---|"
    both = [row for row in benchmark["rows"] if row["what"] == "both"]
    cold = {_line(row): row for row in both if row["cache"] == "cold"}
    for row in both:
        if row["cache"] == "warm":
            rate = teraflops(row)
            share = rate / benchmark["groups"][row["group"]]["rates"][row["dtype"]]
            times = [f"{1e6 * each['median']:,.1f}" for each in (row, cold[_line(row)])]
            cells = [row["group"], ", ".join(map(str, row["shape"])), row["implementation"], *times]
            yield f"| {' | '.join(cells)} | {rate:.1f} | {share:.2f} |"


def _line(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["group"], *row["shape"], row["implementation"]


def table_of_alternatives(found: dict[str, Any]) -> Iterator[str]:
    """One line for each result, dtype, shape and way."""
    if "copied bytes a second" not in found:
        yield f"It could not run: {found['told']}"
        return
    copied = 1e-12 * found["copied bytes a second"]
    yield f"A copy moves {copied:.2f} TB/s, counting bytes read and written. Caches are cold, the host waits before."
    yield ""
    yield "| result | dtype | shape | way | µs |"
    yield "|---|---|---|---|---|"
    for result in ("db", "y", "dW and db"):
        for row in found[result]:
            for way, seconds in row["seconds"].items():
                text = f"{1e6 * seconds:,.1f}" if isinstance(seconds, float) else seconds.partition("\n")[0]
                yield f"| {result} | {row['dtype']} | {', '.join(map(str, row['shape']))} | {way} | {text} |"


def short_table(found: dict[str, Any]) -> Iterator[str]:
    """One line for each library, mode and shape."""
    for mode, benchmark in found.get("benchmarks", {}).items():
        for row in benchmark.get("rows", ()):
            if (row["implementation"], row["what"], row["cache"]) == ("xaffine", "both", "warm"):
                peers = " ".join(f"{ratio:.2f} of {name}" for name, ratio in row["to"].items())
                yield f"{row['group']:6}{mode:9}{tuple(row['shape'])!s:20}{teraflops(row):7.1f} TFLOP/s; {peers}"
    for what, limit, reached in rows_to_reach(found):
        yield f"{what}: {'not measured' if reached is None else f'{reached:.2f}'} ({limit})"


def main(arguments: list[str]) -> int:
    """Measure and write; 0, 1 where tests failed, 2 where nothing could be measured."""
    found = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    if arguments != ["page"]:
        parts = arguments or list(PARTS)
        if strangers := [part for part in parts if part not in PARTS]:
            print(f"no part is called {' or '.join(strangers)}; the parts are {', '.join(PARTS)} and page")
            return 2
        if missing := [name for name in NEEDED if not _is_here(name)]:
            print(f"not installed: {', '.join(missing)}; pip install {' '.join(missing).replace('_', '-')}")
            return 2
        usable = usable_libraries()
        if not usable:
            print("no array library here finds a GPU")
            return 2
        found |= {"card": card(), "versions": installed_versions()}
        found["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        for part in parts:
            found[part] = PARTS[part](usable)
            DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if "benchmarks" in found and _is_here("matplotlib"):
        draw(found)
    PAGE.write_text(write_page(found), encoding="utf-8")
    print("\n".join(short_table(found)))
    return int(any(run_of["exit code"] for run_of in found.get("tests", {}).values()))


def draw(found: dict[str, Any]) -> None:
    """The plot: every mode as if it were a dtype."""
    from xaffine.command.plot import draw_ratios

    measured = {mode: each for mode, each in found["benchmarks"].items() if "rows" in each}
    rows = [{**row, "dtype": mode} for mode, each in measured.items() for row in each["rows"]]
    if rows:
        first = next(iter(measured.values()))
        draw_ratios({**first, "system": found["card"], "date": found["date"], "rows": rows}, PLOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
