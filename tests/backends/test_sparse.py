"""What only sparse has: arrays that stay sparse."""

from __future__ import annotations

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


def test_immutable_out_is_refused() -> None:
    with pytest.raises(TypeError, match="out cannot be written"):
        affine(sparse.zeros((2, 3)), sparse.zeros((3, 4)), out=sparse.zeros((2, 4)))
