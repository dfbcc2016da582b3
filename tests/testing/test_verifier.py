"""The verifier on implementations of others: it finds every planted bug, and passes what is right."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from hypothesis import reject
from hypothesis.errors import StopTest

from xaffine import AffineLayer, affine, affine_backward
from xaffine.testing import PROPERTIES, PropertyError, check_affine, from_functions, property_tests
from xaffine.testing.peers import Classic


class Plain:
    """A right layer of another hand: straight NumPy, whatever shape, checks where the contract wants them."""

    dW: Any = None
    db: Any = None

    def __init__(self, W: Any, b: Any) -> None:
        self.W, self.b = W, b

    def forward(self, x: Any) -> Any:
        if math.prod(x.shape[x.ndim > 1 :]) != len(self.W):
            raise ValueError(x.shape)
        rows = x.reshape(self.rows(x), len(self.W))
        y = self.product(rows, self.W)
        y = y if self.b is None else self.add_bias(y)
        self.x, self.shape = rows, x.shape
        self.y_shape = (*x.shape[: x.ndim > 1], self.W.shape[1])
        return y.reshape(self.y_shape)

    def backward(self, dy: Any) -> Any:
        if dy.shape != self.y_shape:
            raise ValueError(dy.shape)
        dy = dy.reshape(len(self.x), self.W.shape[1])
        self.dW = self.gradient_of_W(self.x, dy)
        self.db = None if self.b is None else self.gradient_of_b(dy)
        return self.gradient_of_x(dy).reshape(self.shape)

    def rows(self, x: Any) -> int:
        return len(x) if x.ndim > 1 else 1

    def product(self, a: Any, b: Any) -> Any:
        return a @ b

    def add_bias(self, y: Any) -> Any:
        return y + self.b

    def gradient_of_x(self, dy: Any) -> Any:
        return self.product(dy, self.W.T)

    def gradient_of_W(self, x: Any, dy: Any) -> Any:
        return self.product(x.T, dy)

    def gradient_of_b(self, dy: Any) -> Any:
        return dy.sum(0, dtype=np.float32 if dy.dtype == np.float16 else dy.dtype).astype(dy.dtype)


class NotTransposed(Plain):
    def gradient_of_x(self, dy: Any) -> Any:
        return dy @ (self.W if self.W.shape[0] == self.W.shape[1] else self.W.T)


class MeanOfBias(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return (super().gradient_of_b(dy) / max(len(dy), 1)).astype(dy.dtype)


class BiasSummedOverTheWrongAxis(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return dy.sum(1, dtype=dy.dtype) if dy.shape[0] == dy.shape[1] else super().gradient_of_b(dy)


class StaleCache(Plain):
    def forward(self, x: Any) -> Any:
        y, rows = super().forward(x), self.x
        first = self.__dict__.setdefault("first", rows)
        self.x = first if first.shape == rows.shape else rows
        return y


class Accumulates(Plain):
    def backward(self, dy: Any) -> Any:
        before = self.dW
        dx = super().backward(dy)
        self.dW = self.dW if before is None else self.dW + before
        return dx


class DropsLastRowOfATile(Plain):
    def product(self, a: Any, b: Any) -> Any:
        y = super().product(a, b)
        if len(y) % 64:
            y[len(y) // 64 * 64 :] = 0
        return y


class DropsLastRowBeyondTheFirstTile(Plain):
    def product(self, a: Any, b: Any) -> Any:
        y = super().product(a, b)
        if len(y) > 64 and len(y) % 64:
            y[-1] = 0
        return y


class DropsLastColumnBeyondTheFirstTile(Plain):
    def product(self, a: Any, b: Any) -> Any:
        y = super().product(a, b)
        if y.shape[1] > 64 and y.shape[1] % 64:
            y[:, -1] = 0
        return y


class DropsTheDepthBeyondWholeTiles(Plain):
    def product(self, a: Any, b: Any) -> Any:
        k = a.shape[1]
        k = k // 32 * 32 if k > 512 else k
        return super().product(a[:, :k], b[:k])


class NeverWritesTheLastElement(Plain):
    def product(self, a: Any, b: Any) -> Any:
        y = np.empty((a.shape[0], b.shape[1]), a.dtype)
        stale = y[-1:, -1:].copy()
        y[...] = super().product(a, b)
        y[-1:, -1:] = stale
        return y


class WritesToDy(Plain):
    def backward(self, dy: Any) -> Any:
        dx = super().backward(dy)
        if dy.flags.writeable:
            dy *= 0
        return dx


class WritesToW(Plain):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        if self.W.flags.writeable:
            self.W *= 2
        return y


class ReusesItsBuffer(Plain):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        buffers = self.__dict__.setdefault("buffers", {})
        buffer = buffers.setdefault(y.shape, np.empty_like(y))
        buffer[...] = y
        return buffer


class HalfPrecisionAccumulator(Plain):
    def product(self, a: Any, b: Any) -> Any:
        y = np.zeros((a.shape[0], b.shape[1]), a.dtype)
        for i in range(a.shape[1]):
            y += a[:, i, None] * b[i]
        return y


class HalfPrecisionBias(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return np.add.accumulate(dy, dtype=dy.dtype)[-1] if len(dy) else super().gradient_of_b(dy)


class TF32(Plain):
    def product(self, a: Any, b: Any) -> Any:
        return super().product(self.eleven_bits(a), self.eleven_bits(b))

    def eleven_bits(self, array: Any) -> Any:
        return ((np.ascontiguousarray(array).view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


class WrongForOneRow(Plain):
    def gradient_of_W(self, x: Any, dy: Any) -> Any:
        return super().gradient_of_W(x, dy) * (2 if len(dy) == 1 else 1)


class WrongForOneOutput(Plain):
    def gradient_of_x(self, dy: Any) -> Any:
        return super().gradient_of_x(dy) * (2 if dy.shape[1] == 1 else 1)


class ReadsDyAsIfContiguous(Plain):
    def backward(self, dy: Any) -> Any:
        return super().backward(np.resize(dy.base, dy.shape) if self.is_strided(dy) else dy)

    def is_strided(self, dy: Any) -> bool:
        return dy.base is not None and dy.size > 1 and not dy.flags.c_contiguous and 0 not in dy.strides


class TakesStrideZeroForOneRow(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return dy[0].copy() if len(dy) > 1 and dy.strides[0] == 0 else super().gradient_of_b(dy)


class ReadsFortranOrderedWAsC(Plain):
    def product(self, a: Any, b: Any) -> Any:
        if b is self.W and b.flags.f_contiguous and not b.flags.c_contiguous:
            b = b.ravel(order="K").reshape(b.shape)
        return super().product(a, b)


class FlattensInFortranOrder(Plain):
    def forward(self, x: Any) -> Any:
        rows = x.reshape(self.rows(x), self.W.shape[0], order="F" if x.ndim > 2 else "C")
        return super().forward(rows.reshape(x.shape))


class CrashesOnAnEmptyBatch(Plain):
    def forward(self, x: Any) -> Any:
        return super().forward(x.reshape(x.shape[0], -1) if x.ndim > 1 else x)


class BroadcastsABiasOfColumns(Plain):
    def add_bias(self, y: Any) -> Any:
        return y + self.b.reshape(-1, 1) if len(y) == len(self.b) else super().add_bias(y)


class KeepsTheAxisOfTheBias(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return super().gradient_of_b(dy)[None]


class Widens(Plain):
    def gradient_of_W(self, x: Any, dy: Any) -> Any:
        return super().gradient_of_W(x, dy).astype(np.float64)


class Narrows(Plain):
    def add_bias(self, y: Any) -> Any:
        return super().add_bias(y).astype(np.float16)


class HalfWritten(Plain):
    def backward(self, dy: Any) -> Any:
        self.db = None if self.b is None else np.asarray(dy.sum(0))
        return super().backward(dy)


class ReturnsAList(Plain):
    def forward(self, x: Any) -> Any:
        return super().forward(x).tolist()


class ReturnsNothing(Plain):
    def backward(self, dy: Any) -> Any:
        super().backward(dy)


class ReturnsAPromise(Plain):
    def forward(self, x: Any) -> Any:
        return lambda: super().forward(x)


class ReturnsALazyArray(Plain):
    def forward(self, x: Any) -> Any:
        import array_api_strict

        return array_api_strict.asarray(super().forward(x))


class StoresNoGradient(Plain):
    def backward(self, dy: Any) -> Any:
        dx = super().backward(dy)
        del self.dW
        return dx


class RaisesAtOnce(Plain):
    def forward(self, x: Any) -> Any:
        raise NotImplementedError("not yet")


class Exits(Plain):
    def forward(self, _: Any) -> Any:
        raise SystemExit(3)


class DropsTheImaginaryPart(Plain):
    def forward(self, x: Any) -> Any:
        return super().forward(x).real


class MakesNoLayer(Plain):
    backward = None  # type: ignore[assignment]


class AnotherResultEachTime(Plain):
    calls = itertools.count()

    def add_bias(self, y: Any) -> Any:
        return super().add_bias(y) + np.float32(next(self.calls) % 3 == 0)


# The bug, the property that finds it first, what the message says, and how the check is called.
BUGS: list[tuple[type[Plain], str, str, dict[str, Any]]] = [
    (NotTransposed, "backward_is_exact", r"dx\[", {}),
    (MeanOfBias, "backward_is_exact", r"db\[", {}),
    (BiasSummedOverTheWrongAxis, "backward_is_exact", r"db\[", {}),
    (StaleCache, "backward_belongs_to_latest_forward", r"dW\[", {}),
    (Accumulates, "results_are_fresh", r"dW\[", {}),
    (DropsLastRowOfATile, "forward_is_exact", r"y\[", {}),
    (DropsLastRowBeyondTheFirstTile, "forward_is_exact", r"y\[64, 0\] is 0.0", {"large": True}),
    (DropsLastColumnBeyondTheFirstTile, "forward_is_exact", r"y\[0, 64\] is 0.0", {"large": True}),
    (DropsTheDepthBeyondWholeTiles, "forward_is_exact", r"y\[", {"large": True}),
    (NeverWritesTheLastElement, "forward_is_exact", r"y\[", {}),
    (WritesToDy, "inputs_are_left_alone", r"dy\[", {}),
    (WritesToW, "backward_is_exact", r"dx\[", {}),
    (ReusesItsBuffer, "results_are_fresh", r"after a later call, the earlier y\[", {}),
    (HalfPrecisionAccumulator, "forward_is_within_bound", "times its rounding bound", {"dtype": "float16"}),
    (HalfPrecisionBias, "backward_is_within_bounds", r"db\[\d+\].* times its rounding bound", {"dtype": "float16"}),
    (TF32, "forward_is_within_bound", "times its rounding bound", {}),
    (WrongForOneRow, "backward_is_exact", r"dW\[", {}),
    (WrongForOneOutput, "backward_is_exact", r"dx\[", {}),
    (ReadsDyAsIfContiguous, "backward_is_exact", r"d[xWb]\[", {}),
    (TakesStrideZeroForOneRow, "backward_is_exact", r"db\[", {}),
    (ReadsFortranOrderedWAsC, "forward_is_exact", r"y\[", {}),
    (FlattensInFortranOrder, "forward_is_exact", r"y\[", {}),
    (CrashesOnAnEmptyBatch, "forward_is_exact", "forward raised ValueError: cannot reshape", {}),
    (BroadcastsABiasOfColumns, "forward_is_exact", r"y\[", {}),
    (KeepsTheAxisOfTheBias, "backward_is_exact", r"db has shape \(1, \d+\), not \(\d+,\)", {}),
    (Widens, "results_match_their_primals", "dW has dtype float64, not float32", {}),
    (Narrows, "results_match_their_primals", "y has dtype float16, not float32", {}),
    (HalfWritten, "rejected_dy_changes_nothing", "after a rejected dy of shape", {}),
    (ReturnsAList, "forward_is_exact", "forward gave a builtins.list, not an array of numpy", {}),
    (ReturnsNothing, "backward_is_exact", "backward gave None, not an array of numpy", {}),
    (ReturnsAPromise, "forward_is_exact", "forward gave a builtins.function, not an array of numpy", {}),
    (ReturnsALazyArray, "forward_is_exact", "forward gave a array_api_strict.*, not an array of numpy", {}),
    (StoresNoGradient, "backward_is_exact", "dW gave None, not an array of numpy", {}),
    (
        RaisesAtOnce,
        "forward_is_exact",
        r"Error: not yet\n  .*test_verifier.py:\d+, in forward: raise",
        {},
    ),
    (DropsTheImaginaryPart, "forward_is_exact", "y has dtype float32, of the wrong kind", {"dtype": "complex64"}),
    (
        MakesNoLayer,
        "forward_is_exact",
        r"gave a tests.*MakesNoLayer, not a layer with forward",
        {},
    ),
    (Exits, "forward_is_exact", "forward raised SystemExit: 3", {}),
    (AnotherResultEachTime, "forward_is_exact", "The same case came out differently when it was run again", {}),
]


@pytest.mark.parametrize(("make", "name", "message", "options"), BUGS, ids=[bug[0].__name__ for bug in BUGS])
def test_bug_is_found(make: Any, name: str, message: str, options: Any) -> None:
    in_that_order = ("forward_is_exact", name)
    properties = [prop for prop in PROPERTIES if prop.name in in_that_order]
    with pytest.raises(PropertyError, match=message) as caught:
        check_affine(make, seed=0, max_examples=200, properties=properties, **options)
    text = str(caught.value)
    assert text.startswith(f"{name}{' (large)' if options.get('large') else ''} does not hold.")
    assert next(prop.sentence for prop in PROPERTIES if prop.name == name) in text


RIGHT: list[Any] = [Plain, AffineLayer, from_functions(affine, affine_backward)]


@pytest.mark.parametrize("make", RIGHT)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "complex64", "int32", "uint8"])
def test_right_implementation_passes(make: Any, dtype: str) -> None:
    report = check_affine(make, dtype=dtype, seed=0, max_examples=25)
    floating = dtype.startswith(("float", "complex"))
    assert [result.part.prop for result in report.results] == [p for p in PROPERTIES if floating or p.tier != "bounded"]
    assert report.gaps == (() if floating else ("the bounded tier: integers are not rounded",))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_right_implementation_passes_under_any_number_of_threads(threads: int) -> None:
    with threadpoolctl.threadpool_limits(threads, "blas"):
        report = check_affine(Plain, dtype="float64", seed=threads, max_examples=12, large=True)
    assert len(report.results) == len(PROPERTIES) + 2


def test_report_says_what_was_tested() -> None:
    report = check_affine(Plain, seed=7, max_examples=20)
    assert (report.backend, report.seed, report.dtypes) == ("numpy", 7, ("float32",))
    assert [result.part.label for result in report.results] == [prop.name for prop in PROPERTIES]
    for result in report.results:
        assert result.examples == 20
        bounded = result.part.prop.tier == "bounded"
        assert (0 < result.worst_error <= 1) == bounded
        assert (result.worst_case is not None) == bounded
    text = str(report)
    assert text.startswith(f"numpy {np.__version__} on cpu, float32, seed 7\nholds  forward_is_exact  ")
    assert str(report.results[2].worst_case) in text


def test_worst_case_makes_the_worst_error_again(numpy_backend: Any) -> None:
    result = check_affine(Plain, seed=0, properties=[PROPERTIES[2]]).results[0]
    assert PROPERTIES[2].check(Plain, result.worst_case, numpy_backend) == result.worst_error


def test_same_seed_draws_the_same_cases() -> None:
    first, second, third = (check_affine(Plain, seed=seed, properties=PROPERTIES[2:4]) for seed in (0, 0, 1))
    assert str(first) == str(second) != str(third)
    assert check_affine(Plain, max_examples=1).seed != check_affine(Plain, max_examples=1).seed


def test_code_of_a_failure_fails_when_pasted() -> None:
    with pytest.raises(PropertyError) as caught:
        check_affine(NotTransposed, seed=0)
    code = caught.value.code
    assert "from test_verifier import NotTransposed as make" in code
    assert "# W = [[" in code
    assert caught.value.case.code in code
    with pytest.raises(AssertionError, match=r"dx\["):
        exec(code.replace("from test_verifier import NotTransposed as make", ""), {"make": NotTransposed})  # noqa: S102
    assert caught.value.case.W.values.shape in ((2, 2), (3, 3))  # nothing smaller tells W from its transpose


def test_code_for_a_nameless_implementation_leaves_its_name_open() -> None:
    with pytest.raises(PropertyError) as caught:
        check_affine(lambda W, b: NotTransposed(W, b), seed=0)
    assert "make = ...  # the implementation" in caught.value.code


@pytest.mark.parametrize(
    ("supports", "gaps"),
    [
        ({"no-bias", "vectors", "tensors", "empty"}, []),
        ({"no-bias", "vectors", "last-axis", "empty"}, []),
        ({"float32"}, ["no-bias", "vectors", "tensors", "empty"]),
        ({"vectors", "empty", "float64"}, ["no-bias", "tensors", "dtype float32"]),
    ],
)
def test_declared_gap_is_reported_and_not_tested(supports: Any, gaps: list[str]) -> None:
    drawn = []

    class Declared(Plain):
        def forward(self, x: Any) -> Any:
            drawn.append((x.ndim, self.b is None, x.size == 0 or 0 in self.W.shape))
            return super().forward(x)

    class LastAxis(AffineLayer):
        def __init__(self, W: Any, b: Any) -> None:
            super().__init__(W, b, n_batch_axes=-1)

    make: Any = LastAxis if "last-axis" in supports else Declared
    make.supports = supports
    if "dtype float32" in gaps:
        with pytest.raises(ValueError, match=r"nothing is left to check; not tested: no-bias .* dtype float32"):
            check_affine(make)
        return
    report = check_affine(make, seed=0, max_examples=40)
    assert [gap.partition(" (")[0] for gap in report.gaps] == gaps
    if drawn:
        assert ("vectors" in gaps) == (1 not in {ndim for ndim, _, _ in drawn})
        assert ("tensors" in gaps) == (max(ndim for ndim, _, _ in drawn) == 2)
        assert ("no-bias" in gaps) == (not any(no_bias for _, no_bias, _ in drawn))
        assert ("empty" in gaps) == (not any(empty for _, _, empty in drawn))


def test_argument_overrides_what_is_declared() -> None:
    assert Classic.supports == {"tensors"}
    with pytest.raises(PropertyError, match="forward raised"):
        check_affine(Classic, seed=0, supports={"tensors", "no-bias"})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"make": 3}, TypeError, "make must be callable as make.W, b. and return a layer; it is a int"),
        ({"xp": "nope"}, ValueError, "no backend is called 'nope'"),
        ({"device": "gpu"}, ValueError, "numpy has no device gpu; it has cpu"),
        ({"dtype": "float8"}, ValueError, "dtype 'float8' is not among those of the backend 'numpy': bfloat16, "),
        ({"dtype": ()}, ValueError, "is not among those"),
        ({"dtype": np.float32}, ValueError, "is not among those"),
        ({"time_limit": math.inf}, ValueError, r"at most 1e\+06 s"),
        ({"properties": []}, ValueError, "nothing is left to check; not tested: no property"),
        ({"supports": len}, TypeError, "supports is a collection of names"),
        ({"max_examples": 0}, ValueError, "max_examples must be at least 1"),
        ({"time_limit": 0}, ValueError, "time_limit above 0"),
        ({"supports": "empty"}, TypeError, "supports is a collection of names"),
        ({"supports": {"biases"}}, ValueError, "it also has 'biases'"),
        ({"supports": {"tensors", "last-axis"}}, ValueError, "two readings of the same x"),
    ],
)
def test_bad_argument_is_refused(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        check_affine(**{"make": Plain, **options})


def test_verifier_without_hypothesis_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hypothesis", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "xaffine\[testing\]"'):
        check_affine(Plain)


def test_device_can_be_named() -> None:
    report = check_affine(Plain, device="cpu", max_examples=1)
    assert report.device == "cpu"
    with pytest.raises(PropertyError, match=r"backward_is_exact\(make, case, backend, backend.devices\[0\]\)"):
        check_affine(NotTransposed, device="cpu", seed=0)


def test_layer_with_batch_axes_that_takes_matrices_alone() -> None:
    class Matrices(AffineLayer):
        supports = frozenset({"no-bias"})

        def forward(self, x: Any) -> Any:
            assert x.ndim == 2
            return super().forward(x)

    report = check_affine(Matrices, seed=0, max_examples=30)
    assert [gap.partition(" ")[0] for gap in report.gaps] == ["vectors", "tensors", "empty"]


def test_exit_on_a_rejected_call_is_a_rejection() -> None:
    class ExitsOnBadInput(Plain):
        def backward(self, dy: Any) -> Any:
            try:
                return super().backward(dy)
            except ValueError as error:
                raise SystemExit(2) from error

    check_affine(ExitsOnBadInput, seed=0, max_examples=10)


class Hangs(Plain):
    def forward(self, x: Any) -> Any:
        while len(x) > 5:
            time.sleep(0.01)
        return super().forward(x)


def test_hang_is_found_within_the_time_limit() -> None:
    start = time.monotonic()
    with pytest.raises(PropertyError, match=r"no answer within 0.5 s\n  .*test_verifier.py:\d+, in forward:"):
        check_affine(Hangs, seed=0, time_limit=0.5)
    assert time.monotonic() - start < 30  # half a second, not once for every step of shrinking


def test_hang_is_no_wrong_answer() -> None:
    with pytest.raises(PropertyError, match=r"^forward_is_exact did not finish\.\n") as caught:
        check_affine(Hangs, seed=0, time_limit=0.2)
    assert not caught.value.finished
    with pytest.raises(PropertyError, match=r"^backward_is_exact does not hold\.\n") as caught:
        check_affine(NotTransposed, seed=0)
    assert caught.value.finished


@pytest.mark.parametrize("end", ["answers", "raises"])
def test_hang_that_the_implementation_catches_is_found(end: str) -> None:
    class Catches(Plain):
        def forward(self, x: Any) -> Any:
            try:
                time.sleep(1000)
            except BaseException:
                if end == "raises":
                    raise ValueError from None
            return super().forward(x)

    with pytest.raises(PropertyError, match=r"no answer within 0.1 s\n") as caught:
        check_affine(Catches, seed=0, time_limit=0.1, max_examples=2)
    assert not caught.value.finished


@pytest.mark.parametrize(
    "error",
    [pytest.skip.Exception("skipped"), GeneratorExit(), asyncio.CancelledError(), SystemExit(0), StopTest(0)],
    ids=lambda error: type(error).__name__,
)
def test_whatever_an_implementation_raises_is_no_success(error: BaseException) -> None:
    class Raises(Plain):
        def forward(self, _: Any) -> Any:
            raise error

    with pytest.raises(PropertyError, match=rf"(?s)^forward_is_exact does not hold\..*{type(error).__name__}"):
        check_affine(Raises, seed=0, max_examples=3)


def test_case_that_hypothesis_would_pass_over_is_a_failure() -> None:
    def rejects(make: Any, case: Any, backend: Any, device: Any = None) -> float:
        if case.x.values.size > 8:
            reject()
        return PROPERTIES[0].check(make, case, backend, device)

    prop = dataclasses.replace(PROPERTIES[0], check=rejects)
    with pytest.raises(PropertyError, match=r"UnsatisfiedAssumption: .*\n\nHypothesis takes this for a case to pass"):
        check_affine(Plain, seed=0, max_examples=30, properties=[prop])


def test_interrupt_ends_the_verifier() -> None:
    class Interrupted(Plain):
        def forward(self, _: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_affine(Interrupted, seed=0)


def test_time_limit_leaves_another_timer_running() -> None:
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        check_affine(Plain, max_examples=1, seed=0)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert rung or 0 < left <= 0.2
        time.sleep(0.3)
        assert rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_verifier_runs_in_a_thread_without_a_time_limit() -> None:
    reports = []
    thread = threading.Thread(target=lambda: reports.append(check_affine(Plain, max_examples=2, seed=0)))
    thread.start()
    thread.join(60)
    assert len(reports) == 1


def test_call_stands_for_forward() -> None:
    class Called(Plain):
        forward = property()  # type: ignore[assignment]
        __call__ = Plain.forward

    assert check_affine(Called, seed=0, max_examples=10).results


def test_pytest_form_has_one_test_for_each_property(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_layers="""
        from xaffine.testing import property_tests
        from xaffine.testing.peers import Classic
        test_classic = property_tests(Classic, dtype="float64", max_examples=10)
        """
    )
    outcomes = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-v")
    outcomes.assert_outcomes(passed=len(PROPERTIES) - 2, failed=2)
    outcomes.stdout.fnmatch_lines(
        ["*test_classic?forward_is_exact?*PASSED*", "*test_classic?rejected_x_changes_nothing?*FAILED*"]
    )


test_plain_layer = property_tests(Plain, max_examples=10)
test_plain_layer_on_integers = property_tests(Plain, max_examples=10, dtype="int64")
test_forward_of_the_plain_layer = property_tests(Plain, properties=PROPERTIES[:1], seed=math.prod([3, 5]))
