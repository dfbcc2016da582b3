"""What only sparse has: arrays that stay sparse."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import sparse

from xaffine import affine, affine_backward


def test_results_of_sparse_operands_store_no_zeros() -> None:
    x = sparse.random((50, 40), density=0.02, random_state=0)
    W = sparse.random((40, 30), density=0.02, random_state=1)
    dy = sparse.random((50, 30), density=0.02, random_state=2)
    gradients = affine_backward(dy, x, W, sparse.zeros((30,)))
    for result in (affine(x, W), *gradients):
        assert isinstance(result, sparse.COO)
        assert result.nnz == np.count_nonzero(result.todense()) < result.size
    assert np.array_equal(gradients.dW.todense() != 0, (abs(x.T) @ abs(dy)).todense() != 0)


@pytest.mark.filterwarnings("ignore:Nan will not be propagated:RuntimeWarning")
def test_what_is_not_stored_annihilates_nan() -> None:
    """0 · NaN is NaN on every other library; here the product of a zero that is not stored is never computed."""
    x, dy = sparse.COO.from_numpy(np.asarray([[np.nan, 1.0]])), sparse.COO.from_numpy(np.asarray([[1.0, 0.0]]))
    W = sparse.COO.from_numpy(np.asarray([[0.0, 1.0], [2.0, 0.0]]))
    assert np.array_equal(affine(x, W).todense(), [[2, np.nan]], equal_nan=True)
    assert np.array_equal(affine_backward(dy, x, W).dW.todense(), [[np.nan, 0], [1, 0]], equal_nan=True)


COMPILED = """
import numba, numpy as np, sparse
from xaffine import AffineLayer
assert not numba.config.DISABLE_JIT
x, W, b, dy = (sparse.COO(np.ones(shape)) for shape in ((2, 3), (3, 4), 4, (2, 4)))
layer = AffineLayer(W, b)
y, dx = layer(x), layer.backward(dy)
print(*(np.unique(array.todense()) for array in (y, dx, layer.dW, layer.db)))
"""


def test_compiled_loops_of_the_library_give_the_same() -> None:
    """Users run them compiled; the other tests run them as Python, since a compilation takes seconds."""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "0"}
    command = [sys.executable, "-c", COMPILED]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert child.stdout.split() == ["[4.]", "[4.]", "[2.]", "[2.]"]


def test_immutable_out_is_refused() -> None:
    with pytest.raises(TypeError, match="out cannot be written"):
        affine(sparse.zeros((2, 3)), sparse.zeros((3, 4)), out=sparse.zeros((2, 4)))
