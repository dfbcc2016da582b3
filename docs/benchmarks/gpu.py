"""Test and time xaffine on an NVIDIA GPU: one command for a card that is rented by the minute.

    python docs/benchmarks/gpu.py                       # as much as fits in eight minutes, the most valuable first
    python docs/benchmarks/gpu.py --plan                # what would run, and about how long it takes
    python docs/benchmarks/gpu.py --minutes 20 --out F  # more time; the evidence goes to the folder F
    python docs/benchmarks/gpu.py tests:torch reach     # some parts
    python docs/benchmarks/gpu.py page                  # the page and the plot from the figures that are there

Every part consists of runs, each in a process of its own. After each of them gpu.json is written anew, and its whole
log lies in the folder logs beside it, so that whatever ends this script loses nothing. Started again, it goes on with
the runs that are missing: a run counts if it came to its end on this card with these sources. gpu.md and gpu.svg are
made of what was saved, and the table at the end says what was reached.

xaffine itself need not be installed; what must be is in NEEDED. Exit code 0, 1 where a run failed, 2 where
nothing could be measured.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

NEEDED = ("numpy", "array_api_compat", "array_api_strict", "hypothesis", "ml_dtypes", "pytest", "rich", "threadpoolctl")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:  # which the imports below would tell
    print(f"not installed: {', '.join(missing)}; pip install {' '.join(missing).replace('_', '-')}")
    sys.exit(2)

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from xaffine._command.bench import GRID, teraflops  # noqa: E402 - from where this file lies
from xaffine._command.files import replace_text  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LIBRARIES = ("cupy", "torch", "jax")
CUBE, SMALL, COLUMNS = (4096, 4096, 4096), (64, 512, 512), (65536, 4096)
TALL = ((65536, 64, 32), (65536, 784, 10), (262144, 32, 32))
SHAPES = (*GRID, CUBE, (8192, 1024, 4096), (4096, 4096, 512))
# XLA would time every way to compute each product, for the hundreds of small programs of a test.
XLA = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"}
# What lets each library round the factors of float32 products to TF32.
TF32 = {"CUPY_TF32": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32"}
MODES: dict[str, tuple[str, dict[str, str]]] = {
    "float32": ("float32", {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}),  # by default JAX uses TF32 on a GPU
    "TF32": ("float32", TF32),
    "float16": ("float16", {}),
    "bfloat16": ("bfloat16", {}),
}
VERSIONS = ("numpy", "cupy-cuda12x", "cupy-cuda13x", "torch", "triton", "jax", "jaxlib", "hypothesis")
FREE = 8192  # MiB of the card that the largest runs need
GRACE = 5.0  # seconds in which a process that is interrupted may say what it did
TEST_LIMIT = 180  # seconds for one test, where pytest-timeout is installed
WORKERS = min(8, max(1, (os.cpu_count() or 1) // 2))  # processes that share the card; most of their time is compiling
FILE = "FILE"  # stands for the file that a run writes its data to
TABLE_LINES = 40
SCRIPTS = ("alternatives", "groups", "peers")  # which runs that are no tests depend on

DOCTOR = """
import json, pathlib, sys
from xaffine import backends
from xaffine._command import doctor
name, file = sys.argv[1:]
try:
    backend = backends.get(name)
    device = backend.device("gpu")
except (ImportError, RuntimeError, ValueError) as error:
    report = doctor.blank_report(name, status="unusable", note=str(error))
else:
    if name == "torch":  # whose default device is the CPU
        backend.xp.set_default_device(device)
    report = doctor.examine(name) | {"device": backend.device_name(device)}
pathlib.Path(file).write_text(json.dumps(report))
print(json.dumps(report, indent=1))
sys.exit(report["status"] == "wrong")
"""


class UnfitError(Exception):
    """Nothing can be measured here; the message is the one line that says why."""


@dataclass(frozen=True, eq=False)
class Run:
    """One process: the part that it belongs to, a backend that must work, and about how long it takes on an H100."""

    part: str
    what: str
    command: list[str]
    backend: str
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The part, and which of its runs this is."""
        return f"{self.part} {self.what}"

    @property
    def stem(self) -> str:
        """The name as a file has it."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.name)


def all_runs() -> list[Run]:
    """Every run, the most valuable first."""
    order = [
        *_doctor("cupy"), *_tests("cupy"), *_tf32("cupy"), *_doctor("torch"), *_reach(), *_alternatives("float32"),
        *_tests("torch"), *_tf32("torch"), *_bench("cupy", 20), *_bench("torch", 20), *_alternatives("TF32"),
        *_doctor("jax"), *_tests("jax"), *_tf32("jax"), *_bench("jax", 60), *_bench("torch.compile", 60, (SMALL, CUBE)),
    ]  # fmt: skip
    assert len({run.stem for run in order}) == len(order)  # noqa: S101 - they name files
    return order


def _doctor(library: str) -> list[Run]:
    seconds = {"cupy": 15, "torch": 15, "jax": 60}[library]
    return [Run("doctor", library, ["-c", DOCTOR, library, FILE], library, seconds, _environment(library))]


def _environment(library: str) -> dict[str, str]:
    """What tests of a library are run with."""
    return XLA if library == "jax" else {}


def _tests(library: str) -> list[Run]:
    own, properties = f"tests/backends/test_{library}.py", "tests/core/test_properties.py"
    rest = ["tests", f"--ignore={own}", f"--ignore={properties}"]
    rest += [] if _is_here("sklearn") else ["--ignore=tests/core/test_digits.py"]
    slow = 2 if library == "jax" else 1  # it compiles for every shape
    # Those of CuPy keep the card busy and its memory short: one process, which shares the card with no other.
    workers = 0 if library == "cupy" else WORKERS
    files = {"own": ([own], workers), "properties": ([properties], WORKERS), "others": (rest, WORKERS)}
    return [
        Run(f"tests:{library}", name, _pytest(library, some, workers), library, slow * 40, _environment(library))
        for name, (some, workers) in files.items()
    ]


def _tf32(library: str) -> list[Run]:
    command = _pytest(library, ["--tf32", "tests/core/test_properties.py"], WORKERS)
    seconds = 60 if library == "jax" else 15
    return [Run(f"tf32:{library}", "properties", command, library, seconds, _environment(library))]


def _pytest(library: str, what: list[str], workers: int) -> list[str]:
    command = ["-m", "pytest", "-v", "--tb=short", "--durations=15", "-p", "no:cacheprovider"]
    command += ["-n", str(workers)] if workers and _is_here("xdist") else []
    # By a thread: a test that waits for a card which has hung up hears no signal.
    command += [f"--timeout={TEST_LIMIT}", "--timeout-method=thread"] if _is_here("pytest_timeout") else []
    return [*command, "--backend", library, "--device", "gpu", *what]


def _reach() -> list[Run]:
    runs = []
    for mode, shapes in {"bfloat16": (CUBE,), "TF32": (CUBE,), "float32": (SMALL, *TALL)}.items():
        dtype, environment = MODES[mode]
        command = _bench_command(["cupy", "torch"], dtype, shapes)
        runs.append(Run("reach", mode, command, "cupy", 15, environment))
    command = ["docs/benchmarks/alternatives.py", FILE, "--db-alone"]
    return [*runs, Run("reach", "db", command, "cupy", 10, MODES["float32"][1])]


def _bench(group: str, seconds: int, shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[Run]:
    library = group.partition(".")[0]
    return [
        Run(f"bench:{group}", mode, _bench_command([group], dtype, shapes), library, seconds, environment)
        for mode, (dtype, environment) in MODES.items()
    ]


def _bench_command(groups: list[str], dtype: str, shapes: Iterable[tuple[int, ...]]) -> list[str]:
    command = ["docs/benchmarks/groups.py", "--groups", *groups, "--device", "gpu", "--dtype", dtype, "--rounds", "11"]
    return [*command, "--shapes", *(",".join(map(str, shape)) for shape in shapes), "--json", FILE]


def _alternatives(mode: str) -> list[Run]:
    return [Run("alternatives", mode, ["docs/benchmarks/alternatives.py", FILE], "cupy", 20, MODES[mode][1])]


def _is_here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# What a run is measured on.


def card() -> str:
    """Name, driver and memory of the card; refused where there is none that is good for the runs."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free,compute_cap"]
    try:
        child = subprocess.run([*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True)  # noqa: S603
        name, driver, total, free, capability = child.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError) as error:
        msg = f"nvidia-smi finds no card: {error}"
        raise UnfitError(msg) from None
    if capability.partition(".")[0].isdigit() and int(capability.partition(".")[0]) < 8:
        msg = f"{name} is too old for bfloat16: it has compute capability {capability}, and 8.0 is needed"
        raise UnfitError(msg)
    if free.isdigit() and int(free) < FREE:
        msg = f"{name} is full: {free} MiB of {total} are free, and {FREE} are needed; see nvidia-smi for who has them"
        raise UnfitError(msg)
    return f"{name}, driver {driver}, {total} MiB"


def installed_versions() -> dict[str, str]:
    """The versions that figures depend on."""
    found = {}
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def sources_of(run: Run) -> str:
    """A hash of the sources that the outcome of a run depends on."""
    tests = run.part.startswith(("tests:", "tf32:"))
    files = sorted((ROOT / "xaffine").rglob("*.py"))
    scripts = [ROOT / "docs" / "benchmarks" / f"{name}.py" for name in SCRIPTS]
    files += sorted((ROOT / "tests").rglob("*.py")) if tests else scripts
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


# One run.


def run_child(run: Run, log: Path, data: Path, limit: float) -> int | BaseException:
    """The exit code of a run whose output goes to a log, or why it was ended: its time limit, or an interrupt."""
    data.unlink(missing_ok=True)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "COLUMNS": "200",
        "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2",  # many processes, whose work is on the card
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # or JAX takes most of the card at once
        **run.environment,
    }  # fmt: skip
    command = [sys.executable, *(str(data) if word == FILE else word for word in run.command)]
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(  # noqa: S603 - our own commands
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, which ends as a whole
        )  # fmt: skip
        try:
            return child.wait(timeout=limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as why:
            child.send_signal(signal.SIGINT)  # pytest then lists what failed so far
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=GRACE)
            return why
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


# A line of pytest -v for one test, alone or with pytest-xdist.
_VERDICTS = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<verdict>[A-Z]+) (?P<test>tests/.*?)|(?P<test2>tests/.*?) (?P<verdict2>[A-Z]+)"
    r"(?: \(.*\))?(?: +\[ *\d+%\])?) *$",
    re.MULTILINE,
)


def tests_told(log: str) -> tuple[str, list[str]]:
    """What pytest said last, and a line for each test that failed; of a log that may end anywhere."""
    verdicts = [(m["verdict"] or m["verdict2"], m["test"] or m["test2"]) for m in _VERDICTS.finditer(log)]
    summary = re.findall(r"^=+ (.*\d (?:passed|failed|error|skipped|deselected).*) =+ *$", log, re.MULTILINE)
    failed = re.findall(r"^((?:FAILED|ERROR) tests/.*)$", log, re.MULTILINE)
    if not failed:  # it did not come to its summary
        failed = [f"{verdict} {test}" for verdict, test in verdicts if verdict in ("FAILED", "ERROR")]
    counted = [word for word, _ in verdicts]
    words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    so_far = ", ".join(f"{counted.count(word)} {word.lower()}" for word in words if word in counted)
    return (summary or [f"{so_far} so far" if so_far else last_line(log)])[-1], list(dict.fromkeys(failed))


def last_line(text: str) -> str:
    """The last line that says something."""
    return (text.strip().splitlines() or [""])[-1].strip()


def reason(log: str) -> str:
    """The last line that speaks of an error, or the last of all."""
    errors = [line.strip() for line in log.splitlines() if re.search(r"\w(Error|Exception)\b|could not", line)]
    return errors[-1] if errors else last_line(log)


def execute(run: Run, folder: Path, limit: float) -> dict[str, Any]:
    """Let a process run, and say what came of it."""
    log, data = folder / "logs" / f"{run.stem}.log", folder / "logs" / f"{run.stem}.json"
    start = time.monotonic()
    code = run_child(run, log, data, limit)
    outcomes: dict[Any, str] = {0: "passed", subprocess.TimeoutExpired: "cut off", KeyboardInterrupt: "interrupted"}
    outcome = outcomes.get(code if isinstance(code, int) else type(code), "failed")
    record: dict[str, Any] = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    record["log"] = f"logs/{log.name}"
    text = log.read_text(encoding="utf-8", errors="replace")
    if run.part.startswith(("tests:", "tf32:")):
        record["told"], record["failed"] = tests_told(text)
    elif outcome == "failed":
        record["told"] = reason(text)
    if data.exists():
        record["data"] = json.loads(data.read_text(encoding="utf-8"))
        data.unlink()
        if record["data"].get("status") == "unusable":  # so says its doctor
            record |= {"outcome": "unusable", "told": record["data"]["note"]}
    return record


# All runs.


def is_done(run: Run, found: dict[str, Any], on: str | None) -> bool:
    """Whether a run came to its end with these sources, on this card if that is known."""
    record = found["runs"].get(run.name, {"outcome": "missing"})
    return (
        record["outcome"] in ("passed", "failed")
        and record["sources"] == sources_of(run)
        and (on is None or record["card"] == on)
    )


def unusable(library: str, found: dict[str, Any]) -> str | None:
    """Why nothing can be run with a library, by its doctor; None if it can, or if the doctor only took too long."""
    record = found["runs"].get(f"doctor {library}", {"outcome": "missing", "told": "not examined"})
    report = record.get("data", {"status": record["outcome"], "note": record.get("told")})
    return None if report["status"] in ("right", "wrong", "cut off") else str(report["note"])


def measure(runs: list[Run], folder: Path, deadline: float) -> dict[str, Any]:
    """Do the runs that are missing and fit in the time; everything that is saved, each saved as it ends."""
    found = load(folder)
    on = card()
    found |= {"versions": installed_versions(), "left out": {}}
    for run in runs:
        if is_done(run, found, on):
            print(f"{run.name}: {found['runs'][run.name]['outcome']} before", flush=True)
            continue
        left = deadline - time.monotonic() - GRACE
        if run.part != "doctor" and (why := unusable(run.backend, found)):
            found["left out"][run.name] = f"{run.backend} cannot be used: {why}"
        elif left < run.seconds:
            found["left out"][run.name] = f"needs about {run.seconds} s of the {max(0, left):.0f} s left"
        else:
            # One that hangs must not take the time of all others.
            record = execute(run, folder, min(left, max(150, 2.5 * run.seconds)))
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            found["runs"][run.name] = {**record, "sources": sources_of(run), "card": on, "date": today}
            print("\n".join(lines_of(run.name, record)), flush=True)
        if run.name in found["left out"]:
            print(f"{run.name}: left out, {found['left out'][run.name]}", flush=True)
        save(found, folder)
        if found["runs"].get(run.name, {}).get("outcome") == "interrupted":
            raise KeyboardInterrupt
    return found


def lines_of(name: str, record: dict[str, Any]) -> Iterator[str]:
    """What came of a run, with the tests that failed."""
    told = f": {record['told']}" if record.get("told") else ""
    yield f"{name}: {record['outcome']} after {record['seconds']:.0f} s{told}"
    yield from record.get("failed", ())[:20]


def load(folder: Path) -> dict[str, Any]:
    """What was saved in a folder."""
    data = folder / "gpu.json"
    return dict(json.loads(data.read_text(encoding="utf-8"))) if data.exists() else {"runs": {}}


def save(found: dict[str, Any], folder: Path) -> None:
    """Write the figures and the page."""
    replace_text(folder / "gpu.json", json.dumps(found, indent=1) + "\n")
    replace_text(folder / "gpu.md", write_page(found))


# What was reached.


def rows_of(found: dict[str, Any], mode: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of the benchmark in a mode, each once and with the facts of its group; those to be reached first."""
    seen = set()
    names = [
        f"reach {mode}",
        *(name for name in found["runs"] if name.startswith("bench:") and name.endswith(f" {mode}")),
    ]
    for name in names:
        data = found["runs"].get(name, {}).get("data", {"rows": []})
        for row in data["rows"]:
            key = (row["group"], tuple(row["shape"]), row["implementation"], row["what"], row["cache"])
            if key not in seen:
                seen.add(key)
                yield row, data["groups"][row["group"]]


def warm(found: dict[str, Any], mode: str, group: str, implementation: str, shape: Any) -> Any:
    """The row of forward and backward with a warm cache, and the facts of its group; twice None if not measured."""
    wanted = (group, implementation, tuple(shape), "both", "warm")
    for row, facts in rows_of(found, mode):
        if (row["group"], row["implementation"], tuple(row["shape"]), row["what"], row["cache"]) == wanted:
            return row, facts
    return None, None


def rows_to_reach(found: dict[str, Any]) -> Iterator[tuple[str, str, float | None]]:
    """What is asked, the limit as text, and what was reached; None where it was not measured."""

    def over_torch(mode: str, shape: Any, own: str = "xaffine") -> float | None:
        row, _ = warm(found, mode, "cupy", own, shape)
        other, _ = warm(found, mode, "torch", "nn.Linear + autograd", shape)
        return row["median"] / other["median"] if row and other else None

    for mode in ("bfloat16", "TF32"):
        reached = over_torch(mode, CUBE)
        yield f"CuPy, {mode}, 4096³, forward + backward, over torch's eager nn.Linear", "at most 1.00", reached
        row, facts = warm(found, mode, "cupy", "xaffine", CUBE)
        reached = teraflops(row) / facts["rates"][row["dtype"]] if row else None
        yield f"CuPy, {mode}, 4096³, forward + backward, share of the bare product in 8192³", "at least 0.90", reached
        reached = 1 / row["to"]["limit"] if row else None
        yield f"CuPy, {mode}, 4096³, forward + backward, share of its own bare products", "at least 0.90", reached
    reached = over_torch("float32", SMALL)
    yield "CuPy, float32, (64, 512, 512), forward + backward, over torch's eager nn.Linear", "at most 1.25", reached
    for shape in TALL:
        reached = over_torch("float32", shape, "xaffine, out=")
        yield f"CuPy, float32, {shape}, into ready buffers, over torch's eager nn.Linear", "at most 1.00", reached
    reached = None
    for name in ("alternatives float32", "reach db"):
        data = found["runs"].get(name, {}).get("data", {"db": []})
        for row in data["db"]:
            seconds = row["seconds"]["kernel"]
            if tuple(row["shape"]) == COLUMNS and row["dtype"] == "float32" and isinstance(seconds, float):
                reached = row["bytes"] / seconds / data["copied bytes a second"]
    yield f"CuPy, float32, db at {COLUMNS}, share of the bandwidth of a copy", "at least 0.60", reached


def holds(limit: str, reached: float) -> bool:
    """Whether a figure is within its limit."""
    bound = float(limit.rpartition(" ")[2])
    return reached <= bound if limit.startswith("at most") else reached >= bound


def describe(record: dict[str, Any] | None) -> str:
    """What came of a run, in a few words."""
    if record is None:
        return "not yet run on a GPU"
    told = record.get("told", "")
    words = record["outcome"] + f" after {record['seconds']:.0f} s" * (record["outcome"] in ("cut off", "interrupted"))
    return f"{words}: {told}" if told else words


def write_page(found: dict[str, Any]) -> str:
    """The page, from the figures."""
    records = found["runs"]
    lines = ["# Benchmarks on NVIDIA GPUs", "", "Written by `docs/benchmarks/gpu.py`."]
    if records:
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        lines[-1] += f" The data are in [gpu.json](gpu.json), measured with {versions}."
        for on, date, sources in sorted({(r["card"], r["date"], r["sources"]) for r in records.values()}):
            names = [name for name, r in records.items() if (r["card"], r["date"], r["sources"]) == (on, date, sources)]
            parts = ", ".join(dict.fromkeys(name.partition(" ")[0] for name in names))
            lines += ["", f"- {on}, {date}, sources {sources}: {parts}."]
    else:
        lines[-1] += " Not yet measured on a GPU."
    if any(any(rows_of(found, mode)) for mode in MODES):
        lines += ["", "![Time of forward and backward over that of the bare products, against size](gpu.svg)"]
    lines += ["", "## What is to be reached", "", "| what | asked | reached |", "|---|---|---|"]
    for what, limit, reached in rows_to_reach(found):
        text = "not yet measured on a GPU" if reached is None else f"{reached:.2f}"
        lines.append(f"| {what} | {limit} | {text if reached is None or holds(limit, reached) else f'**{text}**'} |")
    lines += ["", "## Runs", "", "| run | outcome |", "|---|---|"]
    lines += [f"| {run.name} | {_cell(describe(records.get(run.name)))} |" for run in all_runs()]
    failed = [line for record in records.values() for line in record.get("failed", ())]
    lines += ["", "Tests that failed:", "", *(f"- `{line}`" for line in failed)] if failed else []
    for mode in MODES:
        if table := list(table_of(found, mode)):
            lines += ["", f"## {mode}", "", *table]
        some = records.get(f"alternatives {mode}", {}).get("data")
        if some:
            lines += ["", f"## What the CuPy kernel could do otherwise: {mode}", "", *table_of_alternatives(some)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table_of(found: dict[str, Any], mode: str) -> Iterator[str]:
    """One line for each library, shape and implementation; nothing where there is no row."""
    both = [(row, facts) for row, facts in rows_of(found, mode) if row["what"] == "both"]
    if not both:
        return
    yield "Microseconds of forward + backward; TFLOP/s with a warm cache, and their share of the card's in 8192³."
    yield ""
    yield "| library | N, n, m | implementation | warm | cold | TFLOP/s | share |"
    yield "|---|---|---|---|---|---|---|"
    cold = {_line(row): f"{1e6 * row['median']:,.1f}" for row, _ in both if row["cache"] == "cold"}
    for row, facts in both:
        if row["cache"] == "warm":
            rate = teraflops(row)
            cells = [row["group"], ", ".join(map(str, row["shape"])), row["implementation"]]
            cells += [f"{1e6 * row['median']:,.1f}", cold.get(_line(row), ""), f"{rate:.1f}"]
            yield f"| {' | '.join(cells)} | {rate / facts['rates'][row['dtype']]:.2f} |"


def _line(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["group"], tuple(row["shape"]), row["implementation"]


def table_of_alternatives(found: dict[str, Any]) -> Iterator[str]:
    """One line for each result, dtype, shape and way."""
    copied = 1e-12 * found["copied bytes a second"]
    yield f"A copy moves {copied:.2f} TB/s, counting bytes read and written. Caches are cold, the host waits before."
    yield "The error of a product of halves is the largest relative one, in unit roundoffs of the dtype."
    yield ""
    yield "| result | dtype | shape | way | µs | error |"
    yield "|---|---|---|---|---|---|"
    for result in ("db", "halves", "y"):
        for row in found[result]:
            for way, seconds in row["seconds"].items():
                text = f"{1e6 * seconds:,.1f}" if isinstance(seconds, float) else _cell(seconds.partition("\n")[0])
                error = f"{row['errors'][way]:.2f}" if "errors" in row else ""
                shape = ", ".join(map(str, row["shape"]))
                yield f"| {result} | {row['dtype']} | {shape} | {way} | {text} | {error} |"


def short_table(found: dict[str, Any], runs: list[Run]) -> list[str]:
    """What came of each part and what was reached, in at most 40 lines."""
    records, lines = found["runs"], []
    for part in dict.fromkeys(run.part for run in runs):
        of_part = {run.what: records.get(run.name) for run in runs if run.part == part}
        done = [f"{what} {record['outcome']}" for what, record in of_part.items() if record]
        missing = [what for what, record in of_part.items() if record is None]
        told = "; ".join(done + [f"missing: {', '.join(missing)}"] * bool(missing))
        lines.append(f"{part:20} {told}")
    for what, limit, reached in rows_to_reach(found):
        mark = "not measured" if reached is None else f"{reached:.2f}" + " MISSED" * (not holds(limit, reached))
        lines.append(f"{what}: {mark} ({limit})")
    failed = [line for run in runs for line in records.get(run.name, {}).get("failed", ())]
    room = TABLE_LINES - len(lines)
    return lines + (
        failed if len(failed) <= room else [*failed[: room - 1], f"and {len(failed) - room + 1} more failed"]
    )


def draw(found: dict[str, Any], folder: Path) -> None:
    """The plot: every mode as if it were a dtype."""
    from xaffine._command.plot import draw_ratios

    rows = [{**row, "dtype": mode} for mode in MODES for row, _ in rows_of(found, mode)]
    if rows:
        latest = [record for record in found["runs"].values() if "rows" in record.get("data", {})][-1]
        facts = {"system": latest["card"], "date": latest["date"], "cores": latest["data"]["cores"]}
        draw_ratios({**facts, "rows": rows}, folder / "gpu.svg")


# The command.


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; a part that is unknown is named beside those that are."""
    parts = [*dict.fromkeys(run.part for run in all_runs()), "page"]
    parser = argparse.ArgumentParser(description="Test and time xaffine on an NVIDIA GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"by default all: {', '.join(parts)}")
    parser.add_argument("--minutes", type=float, default=8, help="how long it may take in all (8)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder of the evidence")
    parser.add_argument("--plan", action="store_true", help="print what would run, and end")
    options = parser.parse_args(arguments)
    if strangers := [part for part in options.parts if part not in parts]:
        parser.error(f"no part is called {' or '.join(strangers)}; the parts are {', '.join(parts)}")
    return options


def chosen(parts: list[str]) -> list[Run]:
    """The runs of some parts, with the doctors of their libraries; all by default."""
    runs = all_runs()
    libraries = {run.backend for run in runs if run.part in parts}
    return [
        run for run in runs if not parts or run.part in parts or (run.part == "doctor" and run.backend in libraries)
    ]


def print_plan(runs: list[Run], found: dict[str, Any], minutes: float) -> None:
    """Each run with its seconds, and which are done or do not fit any more."""
    total = 0
    for run in runs:
        if is_done(run, found, None):
            print(f"{run.name:32} done")
            continue
        fits = total + run.seconds + GRACE <= 60 * minutes
        total += run.seconds if fits else 0
        print(f"{run.name:32} {run.seconds:4} s" + ("" if fits else f", does not fit in {minutes:g} minutes"))
    print(f"about {total / 60:.1f} minutes")


def require_writable(folder: Path) -> None:
    """Refuse a folder in which nothing can be written."""
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        replace_text(folder / "logs" / "probe", "")
        (folder / "logs" / "probe").unlink()
    except OSError as error:
        msg = f"--out {folder} cannot be written: {error}"
        raise UnfitError(msg) from None


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0, 1 where a run failed, 2 where nothing could be measured."""
    start = time.monotonic()
    options = parse(arguments)
    runs = [run for run in chosen(options.parts) if options.parts != ["page"]]
    if options.plan:
        print_plan(runs, load(options.out), options.minutes)
        return 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends us must end our processes, too
    interrupted = False
    try:
        require_writable(options.out)
        if runs:
            measure(runs, options.out, start + 60 * options.minutes)
    except UnfitError as error:
        print(error)
        return 2
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; started again, it goes on from here")
    finally:
        signal.signal(signal.SIGTERM, before)
    found = load(options.out)
    replace_text(options.out / "gpu.md", write_page(found))
    if _is_here("matplotlib"):
        draw(found, options.out)
    print("\n".join(short_table(found, runs or all_runs())))
    return exit_code(found, runs, interrupted=interrupted)


def exit_code(found: dict[str, Any], runs: list[Run], *, interrupted: bool) -> int:
    """0, 1 where a run failed, 2 where nothing could be measured, 130 where the script was interrupted."""
    if interrupted:
        return 130
    records = {run: found["runs"][run.name] for run in runs if run.name in found["runs"]}
    asked = {run for run in runs if run.part != "doctor"}
    if runs and (all(unusable(run.backend, found) for run in runs) or (asked and not asked & records.keys())):
        return 2
    return int(any(record["outcome"] == "failed" for record in records.values()))


if __name__ == "__main__":
    sys.exit(main())
