"""`check_affine`: its report, the code of a failure, seeds, gaps, time limits, threads, and the form for pytest."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import reject
from hypothesis.errors import StopTest

from tests.helpers import peers
from tests.testing.bugs import Plain, TransposesWOnlyIfNotSquare
from xaffine import AffineLayer
from xaffine.testing import PROPERTIES, Case, Property, PropertyError, Report, Summation, check_affine, property_tests
from xaffine.testing.cases import FEATURES

FORWARD_IS_EXACT, BACKWARD_IS_EXACT, FORWARD_IS_WITHIN_BOUND, *_ = PROPERTIES


def drawn_cases(make: Any, **options: Any) -> tuple[Report, list[Case]]:
    """The report and the cases of properties that hold whatever the layer does."""
    drawn: list[Case] = []

    def recording(prop: Property) -> Property:
        @functools.wraps(prop.check)
        def record(_make: Any, case: Case, *_: Any) -> float:
            drawn.append(case)
            return 0.0

        return dataclasses.replace(prop, check=record)

    properties = [recording(prop) for prop in PROPERTIES]
    return check_affine(make, properties=properties, **options), drawn


def failure_of(make: Any, **options: Any) -> PropertyError:
    """What `check_affine` raises where backward is wrong."""
    with pytest.raises(PropertyError) as caught:
        check_affine(make, seed=0, properties=[BACKWARD_IS_EXACT], **options)
    return caught.value


def test_report_says_what_was_tested() -> None:
    report = check_affine(Plain, seed=7, max_examples=20)
    assert (report.backend, report.seed, report.dtypes) == ("numpy", 7, ("float32", "float64"))
    assert [result.part.label for result in report.results] == [prop.name for prop in PROPERTIES]
    for result in report.results:
        assert result.examples == 20
        bounded = result.part.prop.tier == "bounded"
        assert (0 < result.worst_error <= 1) == bounded
        assert (result.worst_case is not None) == bounded
    text = str(report)
    assert text.startswith(f"Plain on numpy {np.__version__} on cpu; float32, float64; seed 7\nforward_is_exact  ")
    assert text.endswith("\nright: 300 cases of 15 properties hold; 1 gap above")
    assert "\nnot tried: bfloat16, float16, complex128, " in text
    assert "\nnot tried: " not in str(dataclasses.replace(report, other_dtypes=()))
    assert "\nnot ruled out: that the implementation, in the process of its judge, replaced its code\n" in text
    assert repr(report) == "<Report on Plain: right: 300 cases of 15 properties hold; 1 gap above>"
    assert "<strong>right</strong>: 300 cases of 15 properties hold" in report._repr_html_()


def test_worst_case_makes_the_worst_error_again(numpy_backend: Any) -> None:
    result = check_affine(Plain, seed=0, properties=[FORWARD_IS_WITHIN_BOUND]).results[0]
    assert FORWARD_IS_WITHIN_BOUND.check(Plain, result.worst_case, numpy_backend) == result.worst_error


def test_same_seed_draws_the_same_cases() -> None:
    first, second, third = ([c.code for c in drawn_cases(Plain, seed=seed, max_examples=10)[1]] for seed in (0, 0, 1))
    assert first == second != third
    reports = [check_affine(Plain, seed=0, properties=[FORWARD_IS_WITHIN_BOUND]) for _ in range(2)]
    assert str(reports[0]) == str(reports[1])


def test_every_run_without_a_seed_has_its_own() -> None:
    seeds = {check_affine(Plain, max_examples=1, properties=[FORWARD_IS_EXACT]).seed for _ in range(2)}
    assert len(seeds) == 2


def test_code_of_a_failure_fails_when_pasted() -> None:
    failure = failure_of(TransposesWOnlyIfNotSquare)
    imported = "from tests.testing.bugs import TransposesWOnlyIfNotSquare\nmake = TransposesWOnlyIfNotSquare\n"
    assert imported in failure.code
    assert "# W = [[" in failure.code
    assert failure.case.code in failure.code
    with pytest.raises(AssertionError, match=r"dx\["):
        exec(failure.code, {})  # noqa: S102 - our own text
    assert failure.case.W.values.shape in ((2, 2), (3, 3))  # nothing smaller tells W from its transpose


def test_code_for_a_nameless_implementation_leaves_its_name_open() -> None:
    failure = failure_of(lambda W, b: TransposesWOnlyIfNotSquare(W, b))
    assert "make = ...  # the implementation" in failure.code


@pytest.mark.parametrize(
    ("supports", "gaps"),
    [
        (set(FEATURES) - {"last-axis"}, []),
        (set(FEATURES) - {"tensors"}, []),
        ({"no-features", "vectors"}, ["tensors", "last-axis", "no-bias", "no-samples", "no-outputs"]),
        (
            {"float32"},
            ["vectors", "tensors", "last-axis", "no-bias", "no-samples", "no-features", "no-outputs", "dtype float64"],
        ),
    ],
)
def test_declared_gap_is_reported_and_not_drawn(supports: set[str], gaps: list[str]) -> None:
    declared = type("Declared", (Plain,), {"supports": supports})
    report, drawn = drawn_cases(declared, seed=0, max_examples=40)
    assert len(drawn) == 40 * len(PROPERTIES)
    assert list(report.gaps) == [FEATURES.get(gap, gap) for gap in gaps]
    ranks = {case.x.values.ndim for case in drawn}
    assert ("vectors" in gaps) == (1 not in ranks)
    assert ("tensors" in gaps) == (max(ranks) == 2)
    assert ("no-bias" in gaps) == all(case.b is not None for case in drawn)
    n_and_m = [case.W.values.shape for case in drawn]
    empty = [any(0 in case.batch for case in drawn), any(n == 0 for n, _ in n_and_m), any(m == 0 for _, m in n_and_m)]
    assert empty == [name not in gaps for name in ("no-samples", "no-features", "no-outputs")]
    assert ("last-axis" in supports) == any(case.n_batch_axes == -1 for case in drawn)


def test_layer_that_declares_what_it_supports_is_tested_within_it() -> None:
    class LastAxis(AffineLayer):
        supports = frozenset(FEATURES) - {"tensors"}

        def __init__(self, W: Any, b: Any) -> None:
            super().__init__(W, b, n_batch_axes=-1)

    assert not check_affine(LastAxis, seed=0, max_examples=15).gaps


def test_nothing_is_checked_without_a_dtype_in_common() -> None:
    with pytest.raises(ValueError, match=r"nothing is left to check; not tested: an x .* dtype float32"):
        check_affine(Plain, dtype="float32", supports={"vectors", "float64"})


def test_argument_overrides_what_is_declared() -> None:
    assert peers.Classic.supports == {"tensors"}
    with pytest.raises(PropertyError, match="forward raised"):
        check_affine(peers.Classic, seed=0, supports={"tensors", "no-bias"})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"make": 3}, TypeError, "make must be callable as make.W, b. and return a layer; it is a int"),
        ({"backend": "nope"}, ValueError, "no backend is called 'nope'"),
        ({"device": "gpu"}, ValueError, "numpy has no device gpu; it has cpu"),
        ({"dtype": "float8"}, ValueError, "dtype 'float8' is not among those of the backend 'numpy': bfloat16, "),
        ({"dtype": ()}, ValueError, "is not among those"),
        ({"dtype": np.float32}, ValueError, "is not among those"),
        ({"time_limit": math.inf}, ValueError, r"at most 1e\+06 s"),
        (
            {"properties": ["exactly"]},
            ValueError,
            "no property and no tier is called 'exactly'; there are exact, ",
        ),
        ({"properties": "exact"}, TypeError, r"such as \['exact'\], and came as a text"),
        ({"properties": []}, ValueError, "nothing is left to check; not tested: "),
        ({"supports": len}, TypeError, "supports is a collection of names"),
        ({"max_examples": 0}, ValueError, "max_examples must be at least 1"),
        ({"large": -1}, ValueError, "large at least 0, .* they are 100, -1 and 60"),
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
    with pytest.raises(ModuleNotFoundError, match="pip install hypothesis"):
        check_affine(Plain)


def test_tests_without_pytest_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytest", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pytest"):
        property_tests(Plain)


@pytest.mark.parametrize("check", [check_affine, property_tests])
def test_options_that_are_none_are_named(check: Any) -> None:
    with pytest.raises(TypeError, match="options must be an Options, not 'torch': pass fields by name"):
        check(Plain, "torch")
    with pytest.raises(TypeError, match=r"there is no option examples; there are backend, .*max_examples"):
        check(Plain, examples=1)


def test_factors_in_tf32_are_those_of_float32_by_default() -> None:
    summation = Summation(factors="tf32", cuts=True)
    assert check_affine(Plain, summation=summation, max_examples=5, seed=0).dtypes == ("float32",)
    with pytest.raises(ValueError, match="only float32 and complex64 have factors in tf32; dtype has 'float64'"):
        check_affine(Plain, summation=summation, dtype=["float32", "float64"])


def test_device_can_be_named() -> None:
    assert check_affine(Plain, device="cpu", max_examples=1).device == "cpu"
    failure = failure_of(TransposesWOnlyIfNotSquare, device="cpu")
    assert "backward_is_exact(make, case, backend, backend.devices[0])" in failure.code


def test_layer_with_batch_axes_that_takes_matrices_alone_gets_no_others() -> None:
    report, drawn = drawn_cases(AffineLayer, supports={"no-bias"}, seed=0, max_examples=30)
    assert {case.x.values.ndim for case in drawn} == {2}
    assert list(report.gaps) == [
        FEATURES[name] for name in ("vectors", "tensors", "last-axis", "no-samples", "no-features", "no-outputs")
    ]


def test_exit_on_a_rejected_call_is_a_rejection() -> None:
    class ExitsOnBadInput(Plain):
        def backward(self, dy: Any) -> Any:
            try:
                return super().backward(dy)
            except ValueError as error:
                raise SystemExit(2) from error

    rejections = [prop for prop in PROPERTIES if prop.name.startswith("rejected")]
    check_affine(ExitsOnBadInput, seed=0, max_examples=10, properties=rejections, strict=True)


class Hangs(Plain):
    def forward(self, x: Any) -> Any:
        while len(x) > 5:
            time.sleep(0.01)
        return super().forward(x)


def test_hang_is_found_within_the_time_limit() -> None:
    start = time.monotonic()
    with pytest.raises(PropertyError, match=r"no answer within 0.5 s\n  .*test_runner.py:\d+, in forward:"):
        check_affine(Hangs, seed=0, time_limit=0.5)
    assert time.monotonic() - start < 30  # half a second, not once for every step of shrinking


def test_hang_is_no_wrong_answer() -> None:
    with pytest.raises(PropertyError, match=r"^forward_is_exact did not finish\.\n") as caught:
        check_affine(Hangs, seed=0, time_limit=0.2)
    assert caught.value.verdict == "not finished"
    failure = failure_of(TransposesWOnlyIfNotSquare)
    assert str(failure).startswith("backward_is_exact does not hold.\n")
    assert failure.verdict == "FAILS"


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
    assert caught.value.verdict == "not finished"


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
        return FORWARD_IS_EXACT.check(make, case, backend, device)

    prop = dataclasses.replace(FORWARD_IS_EXACT, check=rejects)
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
        from tests.helpers import peers
        test_classic = property_tests(peers.Classic, dtype="float64", max_examples=10)
        test_strictly = property_tests(peers.Classic, dtype="float64", max_examples=10, strict=True)
        """
    )
    outcomes = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:benchmark", "-v")
    outcomes.assert_outcomes(passed=2 * len(PROPERTIES) - 6, failed=3)
    outcomes.stdout.fnmatch_lines(
        ["*test_classic?forward_is_exact?*PASSED*", "*test_strictly?rejected_x_changes_nothing?*FAILED*"]
    )


test_plain_layer = property_tests(Plain, max_examples=10)
test_plain_layer_on_integers = property_tests(Plain, max_examples=10, dtype="int64")
test_forward_of_the_plain_layer = property_tests(Plain, properties=[FORWARD_IS_EXACT], seed=math.prod([3, 5]))
