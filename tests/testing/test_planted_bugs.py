"""Every property catches a bug that it is there to catch: a proof that could not fail would prove nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings

from xaffine import AffineLayer, functional
from xaffine.backends import Backend
from xaffine.kernels import standard
from xaffine.testing.checks import PROPERTIES
from xaffine.testing.strategies import cases

whole = SimpleNamespace(**vars(standard))  # as it is without a bug


class Broken(AffineLayer):
    """A right layer, to plant bugs in."""


class StaleCache(Broken):
    def forward(self, x: Any) -> Any:
        kept, y = self._vjp, super().forward(x)
        self._vjp = kept or self._vjp
        return y


class Accumulates(Broken):
    def backward(self, dy: Any) -> Any:
        before, dx = self.dW, super().backward(dy)
        self.dW = self.dW if before is None else self.dW + before
        return dx


class ReusesBuffer(Broken):
    buffers: dict[Any, Any] = {}  # noqa: RUF012 - the bug

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        buffer = self.buffers.setdefault((y.shape, y.dtype), np.empty_like(y))
        buffer[...] = y
        return buffer


class HalfWritten(Broken):
    def backward(self, dy: Any) -> Any:
        self.db = dy.sum(0)
        return super().backward(dy)


class AcceptsAnyRank(Broken):
    def backward(self, dy: Any) -> Any:
        return super().backward(dy[0] if dy.shape[:1] == (1,) else dy)


class CutsDyToSize(Broken):
    def backward(self, dy: Any) -> Any:
        return super().backward(dy[: self.N] if dy.ndim == 2 else dy)

    def forward(self, x: Any) -> Any:
        self.N = len(x)
        return super().forward(x)


class BroadcastsDy(Broken):
    def backward(self, dy: Any) -> Any:
        return super().backward(np.broadcast_to(dy, self.y.shape) if dy.shape[:1] == (1,) else dy)

    def forward(self, x: Any) -> Any:
        self.y = super().forward(x)
        return self.y


class ForgetsOnRejection(Broken):
    def forward(self, x: Any) -> Any:
        self._vjp = None
        return super().forward(x)


class GradientsGoneOnRejection(Broken):
    def forward(self, x: Any) -> Any:
        self.dW = self.db = None
        return super().forward(x)


class WritesToX(Broken):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        if x.flags.writeable and x.size:
            x[...] = 0
        return y


class NoBiasGradientIsZero(Broken):
    def backward(self, dy: Any) -> Any:
        dx = super().backward(dy)
        self.db = np.zeros(dy.shape[-1:]) if self.db is None else self.db
        return dx


class FlattensInFortranOrder(Broken):
    def forward(self, x: Any) -> Any:
        k = self.n_batch_axes if self.n_batch_axes is not None else int(x.ndim > 1)
        batch, features = x.shape[:k], x.shape[k:]
        order = np.arange(np.prod(features, dtype=int)).reshape(features, order="F").ravel()
        return super().forward(x.reshape(*batch, order.size)[..., order].reshape(x.shape))


class Float64Bias(Broken):
    def backward(self, dy: Any) -> Any:
        dx = super().backward(dy)
        self.db = self.db if self.db is None or self.db.dtype.kind != "f" else self.db.astype("f8")
        return dx


def doubled_y(x: Any, W: Any, b: Any, _: Any = None) -> Any:
    return whole.forward(x, W, b) * 2


def dropped_tail_row(x: Any, W: Any, b: Any, _: Any = None) -> Any:
    y = whole.forward(x, W, b)
    if len(y) % 2:
        y[-1:] = 0
    return y


def transposed_only_if_not_square(dy: Any, W: Any) -> Any:
    return np.matmul(dy, W if W.shape[0] == W.shape[1] else W.T)


def mean_for_sum(dy: Any) -> Any:
    return (whole.backward_b(dy) / max(len(dy), 1)).astype(dy.dtype)


def view_of_single_row(dy: Any) -> Any:
    return dy[0] if len(dy) == 1 else whole.backward_b(dy)


def rolled_dx(dy: Any, W: Any) -> Any:
    return np.roll(whole.backward_x(dy, W), 1, axis=0)


def dW_of_first_row(dy: Any, x: Any) -> Any:
    return whole.backward_W(dy[:1], x[:1])


def dW_of_absolute_dy(dy: Any, x: Any) -> Any:
    return whole.backward_W(abs(dy).astype(dy.dtype), x)


def dW_weighted_by_row_number(dy: Any, x: Any) -> Any:
    return whole.backward_W(dy * np.arange(1, len(dy) + 1, dtype=dy.dtype)[:, None], x)


def eleven_bits(array: Any) -> Any:
    """Round to the 11 significand bits of TF32."""
    if array.dtype != np.float32:
        return array
    return ((np.ascontiguousarray(array).view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def tf32_forward(x: Any, W: Any, b: Any, _: Any = None) -> Any:
    return whole.forward(eleven_bits(x), eleven_bits(W), b)


def tf32_backward_W(dy: Any, x: Any) -> Any:
    return whole.backward_W(eleven_bits(dy), eleven_bits(x))


# The bug, as a layer or as a replacement for one function of the kernel, and the properties that must catch it.
BUGS: list[tuple[Any, set[str]]] = [
    (StaleCache, {"backward_belongs_to_latest_forward"}),
    (Accumulates, {"backward_belongs_to_latest_forward", "results_are_fresh"}),
    (ReusesBuffer, {"results_are_fresh"}),
    (HalfWritten, {"rejected_dy_changes_nothing"}),
    (AcceptsAnyRank, {"rejected_dy_changes_nothing"}),
    (CutsDyToSize, {"rejected_dy_changes_nothing"}),
    (BroadcastsDy, {"rejected_dy_changes_nothing"}),
    (ForgetsOnRejection, {"rejected_x_changes_nothing"}),
    (GradientsGoneOnRejection, {"rejected_x_changes_nothing"}),
    (("backward_b", view_of_single_row), {"results_are_fresh"}),
    (WritesToX, {"inputs_are_left_alone"}),
    (NoBiasGradientIsZero, {"backward_is_exact"}),
    (FlattensInFortranOrder, {"forward_is_exact", "forward_is_within_bound"}),
    (Float64Bias, {"results_match_their_primals"}),
    (("forward", doubled_y), {"forward_is_exact", "forward_is_within_bound", "differences_are_adjoint_to_gradients"}),
    (("forward", dropped_tail_row), {"forward_is_exact", "permuted_rows_permute_results"}),
    (("backward_x", transposed_only_if_not_square), {"backward_is_exact", "differences_are_adjoint_to_gradients"}),
    (("backward_x", rolled_dx), {"backward_is_exact", "batch_is_the_sum_of_its_parts"}),
    (("backward_W", dW_of_first_row), {"backward_is_exact", "permuted_rows_permute_results"}),
    (("backward_W", dW_of_absolute_dy), {"backward_is_exact", "backward_is_linear"}),
    (("backward_W", dW_weighted_by_row_number), {"batch_is_the_sum_of_its_parts", "permuted_rows_permute_results"}),
    (("backward_b", mean_for_sum), {"backward_is_exact", "differences_are_adjoint_to_gradients"}),
    (("forward", tf32_forward), {"forward_is_within_bound"}),
    (("backward_W", tf32_backward_W), {"backward_is_within_bounds"}),
]  # fmt: skip


def is_caught(prop: Any, make: Any, backend: Backend, examples: int = 300) -> bool:
    @settings(phases=[Phase.generate], max_examples=examples)
    @given(cases(["float32", "float64", "int64"], values=prop.values))
    def holds(case: Any) -> None:
        prop.check(make, case, backend)

    try:
        holds()
    except Exception:  # an AssertionError, or whatever the bug leads to
        return True
    return False


def name_of(bug: Any) -> str:
    return (bug[1] if isinstance(bug, tuple) else bug).__name__


@pytest.mark.parametrize(("bug", "catchers"), BUGS, ids=[name_of(bug) for bug, _ in BUGS])
def test_bug_is_caught(monkeypatch: pytest.MonkeyPatch, numpy_backend: Backend, bug: Any, catchers: set[str]) -> None:
    make = AffineLayer if isinstance(bug, tuple) else bug
    if isinstance(bug, tuple):
        name, function = bug
        monkeypatch.setattr(standard, name, function)
        monkeypatch.setattr(functional, "kernel_of", lambda *_: standard)
        monkeypatch.setattr(functional, "numpy_kernel", standard)
    caught = {prop.name for prop in PROPERTIES if prop.name in catchers and is_caught(prop, make, numpy_backend)}
    assert caught == catchers


def test_every_property_catches_some_bug() -> None:
    assert set().union(*(catchers for _, catchers in BUGS)) == {prop.name for prop in PROPERTIES}


def test_unbroken_layer_is_not_caught(numpy_backend: Backend) -> None:
    assert not any(is_caught(prop, Broken, numpy_backend, examples=100) for prop in PROPERTIES)


def test_every_property_says_what_it_proves() -> None:
    sentences = [prop.sentence for prop in PROPERTIES]
    assert len(set(sentences)) == len(sentences)
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in sentences)
