"""Properties: right layers have them all, whatever the dtype and the number of threads, and each says what it is."""

from __future__ import annotations

from typing import Any

import pytest
import threadpoolctl

from tests.testing.bugs import Plain
from xaffine import AffineLayer, affine, affine_backward
from xaffine.testing import PROPERTIES, check_affine, from_functions
from xaffine.testing._lines import last_line_of
from xaffine.testing.adapters import takes_batch_axes


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "complex64", "int32", "uint8"])
def test_right_layer_of_another_hand_has_every_property(dtype: str) -> None:
    report = check_affine(Plain, dtype=dtype, seed=0, max_examples=25, strict=True)
    floating = dtype.startswith(("float", "complex"))
    assert [result.part.prop for result in report.results] == [p for p in PROPERTIES if floating or p.tier != "bounded"]
    assert report.gaps[0].startswith("an x of shape (N, T, n), mapped along its last axis (forward raised ValueError")
    assert report.gaps[1:] == (() if floating else ("the bounded tier: integers are not rounded",))


@pytest.mark.parametrize("make", [AffineLayer, from_functions(affine, affine_backward)])
def test_right_layers_of_xaffine_have_every_property_of_the_usual_cases(make: Any) -> None:
    assert len(check_affine(make, seed=0, max_examples=25).results) == len(PROPERTIES)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_right_layer_is_exact_under_any_number_of_threads(threads: int) -> None:
    exact = [prop for prop in PROPERTIES if prop.tier == "exact"]
    with threadpoolctl.threadpool_limits(threads, "blas"):
        report = check_affine(Plain, dtype="float64", seed=threads, max_examples=5, large=5, properties=exact)
    assert [result.part.large for result in report.results] == [False, False, True, True]


def test_every_property_says_what_it_proves() -> None:
    sentences = [prop.sentence for prop in PROPERTIES]
    assert len(set(sentences)) == len(sentences)
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in sentences)


def test_factory_without_a_signature_takes_no_batch_axes() -> None:
    assert not takes_batch_axes(type)


def test_no_frames_have_no_last_line() -> None:
    assert last_line_of([]) == "(no traceback)"
