"""`AffineLayer.random`: weights drawn by the schemes of the field."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.helpers import floating_dtypes
from xaffine import AffineLayer, initializers
from xaffine.backends import Backend


@pytest.mark.parametrize("scheme", list(initializers.SCHEMES))
def test_same_seed_gives_the_same_bits_everywhere(backend: Backend, device: Any, scheme: str) -> None:
    for dtype in floating_dtypes(backend, device):
        layer = AffineLayer.random(5, 4, backend=backend.name, device=device, dtype=dtype, scheme=scheme, seed=7)
        assert str(layer.W.dtype).rpartition(".")[2] == str(layer.b.dtype).rpartition(".")[2] == dtype
        values = initializers.draw(scheme, 5, 4, seed=7, complex_=dtype.startswith("complex"))
        # What NumPy rounds to float32 or to the dtype; bfloat16 from float32, to even, in every library.
        host = values.astype("float32" if dtype == "bfloat16" else dtype)
        if dtype == "bfloat16":
            bits = host.view(np.uint32)
            host = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
        assert np.array_equal(backend.to_numpy(layer.W).astype(host.dtype), host), dtype
        assert not backend.to_numpy(layer.b).any()


@pytest.mark.parametrize(
    ("scheme", "variance"),
    [
        ("kaiming_uniform", 2 / 300), ("kaiming_normal", 2 / 300), ("xavier_uniform", 2 / 500),
        ("xavier_normal", 2 / 500), ("lecun_uniform", 1 / 300), ("lecun_normal", 1 / 300), ("zeros", 0.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("complex_", [False, True])
def test_variance_is_that_of_the_formula(scheme: str, variance: float, complex_: bool) -> None:
    W = initializers.draw(scheme, 300, 200, seed=0, complex_=complex_)
    # The mean square of 60,000 values has a standard deviation of at most √(2 / 60,000) of itself: six of them.
    assert abs(float(np.mean(abs(W) ** 2)) - variance) <= 6 * math.sqrt(2 / W.size) * variance
    assert abs(complex(W.mean())) <= 6 * math.sqrt(variance / W.size)
    if "uniform" in scheme:
        assert abs(W.real).max() <= math.sqrt(3 * variance / (1 + complex_))
    elif variance:
        assert abs(W.real).max() > math.sqrt(3 * variance)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("he", "kaiming_normal"), ("he_normal", "kaiming_normal"), ("he_uniform", "kaiming_uniform"),
        ("glorot", "xavier_uniform"), ("glorot_uniform", "xavier_uniform"), ("glorot_normal", "xavier_normal"),
    ],
)  # fmt: skip
def test_schemes_have_the_names_of_their_authors_too(name: str, scheme: str) -> None:
    named, original = (AffineLayer.random(5, 4, scheme=each, seed=7) for each in (name, scheme))
    assert np.array_equal(named.W, original.W)


def test_weights_differ_without_a_seed() -> None:
    assert (AffineLayer.random(3, 2).W != AffineLayer.random(3, 2).W).any()


def test_any_extent_may_be_zero(backend: Backend) -> None:
    for n, m in ((0, 3), (3, 0), (0, 0)):
        layer = AffineLayer.random(n, m, backend=backend.name, seed=0, n_batch_axes=1)
        assert backend.to_numpy(layer.W).shape == (n, m)
        assert layer.n_batch_axes == 1
    assert AffineLayer.random(2, 2, backend=backend.name, bias=False).b is None


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((3, 2), {"scheme": "saxe"}, ValueError, "no scheme is called 'saxe'; the schemes are kaiming_uniform"),
        ((3, 2), {"dtype": "int32"}, ValueError, "drawn in one of bfloat16, float16, .* on numpy, not in 'int32'"),
        ((3, 2), {"backend": "nope"}, ValueError, "no backend is called 'nope'"),
        ((3, 2), {"device": "gpu"}, ValueError, "numpy has no device gpu"),
        ((-1, 2), {}, ValueError, "n must be 0 or more, not -1"),
        ((3, 2.0), {}, TypeError, r"m must be an integer, not 2\.0"),
        ((True, 2), {}, TypeError, "n must be an integer, not True"),
    ],
)
def test_bad_input_is_refused(arguments: Any, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        AffineLayer.random(*arguments, **options)
