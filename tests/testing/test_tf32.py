"""TF32: products whose factors are cut to 11 significant bits are within their bounds, and nothing coarser is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xaffine import AffineLayer
from xaffine.testing import PROPERTIES, Options, PropertyError, Summation, check_affine, from_functions
from xaffine.testing.runner import Plan

TF32 = Summation(factors="tf32", cuts=True)


def cut(array: np.ndarray, bits: int) -> np.ndarray:
    """Keep that many significant bits of each float32, as matrix units do."""
    if array.dtype == np.complex64:
        return (cut(array.real, bits) + 1j * cut(array.imag, bits)).astype(np.complex64)
    mask = np.uint32(0xFFFFFFFF << (24 - bits) & 0xFFFFFFFF)
    return (np.array(array, order="C").view(np.uint32) & mask).view(np.float32)


def layer(bits: int, bits_of_db: int = 24, bits_of_b: int = 24) -> Any:
    """A layer whose products have factors of so many bits."""

    def forward(x: Any, W: Any, b: Any) -> Any:
        y = cut(x.reshape(len(x), -1), bits) @ cut(W, bits)
        return y if b is None else y + cut(b, bits_of_b)

    def backward(dy: Any, x: Any, W: Any, b: Any) -> Any:
        dx = (cut(dy, bits) @ cut(W, bits).T).reshape(x.shape)
        dW = cut(x.reshape(len(x), -1), bits).T @ cut(dy, bits)
        return dx, dW, None if b is None else cut(dy, bits_of_db).sum(0)

    return from_functions(forward, backward)


def check(make: Any, dtype: str, summation: Summation, *names: str) -> Any:
    """Check some properties on the shapes that the layer takes."""
    properties = [prop for prop in PROPERTIES if prop.name in names]
    supports = {"tensors", "no-bias"}
    return check_affine(
        make, dtype=dtype, max_examples=200, seed=0, summation=summation, supports=supports, properties=properties
    )


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_tf32_is_within_its_bounds(dtype: str) -> None:
    report = check(layer(11), dtype, TF32, "forward_is_within_bound", "backward_is_within_bounds")
    assert 0.2 < max(result.worst_error for result in report.results) <= 1


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_tf32_is_exact_on_small_integers(dtype: str) -> None:
    assert len(check(layer(11), dtype, TF32, "forward_is_exact", "backward_is_exact").results) == 2


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize(
    ("make", "summation", "name"),
    [
        (layer(10), TF32, "forward_is_within_bound"),
        (layer(11), Summation(cuts=True), "forward_is_within_bound"),
        (layer(11, bits_of_db=11), TF32, "backward_is_within_bounds"),
        (layer(11, bits_of_b=11), TF32, "forward_is_within_bound"),
    ],
    ids=["one bit less", "under the bounds of float32", "in the sum, too", "in the bias, too"],
)
def test_anything_coarser_is_caught(dtype: str, make: Any, summation: Summation, name: str) -> None:
    with pytest.raises(PropertyError, match="times its rounding bound"):
        check(make, dtype, summation, name)


def test_code_of_a_failure_says_what_was_assumed() -> None:
    with pytest.raises(PropertyError) as caught:
        check(layer(10), "float32", TF32, "forward_is_within_bound")
    assert "from xaffine.testing import make_case, Summation" in caught.value.code
    assert "backend.use_full_precision()\nbackend.use_tf32()\n" in caught.value.code
    assert "summation=Summation(accumulator=None, block=None, cuts=True, factors='tf32')" in caught.value.code
    with pytest.raises(AssertionError, match="times its rounding bound"):
        exec(caught.value.code.replace("make = ...", "make = layer(10)"), {"layer": layer})  # noqa: S102 - our own


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_tf32_of_another_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"only float32 and complex64 have factors in tf32; dtype has {dtype!r}"):
        Plan(AffineLayer, Options(dtype=["float32", dtype], summation=TF32))
