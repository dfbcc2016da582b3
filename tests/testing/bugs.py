"""A right affine layer in plain NumPy, and one list of bugs that are planted in it."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xaffine import AffineLayer


class Plain:
    """A right layer that shares no code with xaffine: NumPy alone, x of any rank, and wrong shapes are rejected."""

    dW: Any = None
    db: Any = None

    def __init__(self, W: Any, b: Any) -> None:
        self.weights, self.bias = W, b

    def forward(self, x: Any) -> Any:
        if math.prod(x.shape[x.ndim > 1 :]) != len(self.weights):
            raise ValueError(x.shape)
        rows = x.reshape(self.rows(x), len(self.weights))
        y = self.product(rows, self.weights)
        y = y if self.bias is None else self.add_bias(y)
        self.x, self.shape = rows, x.shape
        self.y_shape = (*x.shape[: x.ndim > 1], self.weights.shape[1])
        return y.reshape(self.y_shape)

    def backward(self, dy: Any) -> Any:
        if dy.shape != self.y_shape:
            raise ValueError(dy.shape)
        dy = dy.reshape(len(self.x), self.weights.shape[1])
        self.dW = self.gradient_of_W(self.x, dy)
        self.db = None if self.bias is None else self.gradient_of_b(dy)
        return self.gradient_of_x(dy).reshape(self.shape)

    def rows(self, x: Any) -> int:
        return len(x) if x.ndim > 1 else 1

    def product(self, a: Any, b: Any) -> Any:
        return a @ b

    def add_bias(self, y: Any) -> Any:
        return y + self.bias

    def gradient_of_x(self, dy: Any) -> Any:
        return self.product(dy, self.weights.T)

    def gradient_of_W(self, x: Any, dy: Any) -> Any:
        return self.product(x.T, dy)

    def gradient_of_b(self, dy: Any) -> Any:
        return dy.sum(0, dtype=np.float32 if dy.dtype == np.float16 else dy.dtype).astype(dy.dtype)


# The mathematics is wrong, for every case or for some shapes.


class DoublesY(Plain):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * 2


class TransposesWOnlyIfNotSquare(Plain):
    def gradient_of_x(self, dy: Any) -> Any:
        return dy @ (self.weights if self.weights.shape[0] == self.weights.shape[1] else self.weights.T)


class RollsDx(Plain):
    def gradient_of_x(self, dy: Any) -> Any:
        return np.roll(super().gradient_of_x(dy), 1, axis=0)


class DoublesDxOfOneOutput(Plain):
    def gradient_of_x(self, dy: Any) -> Any:
        return super().gradient_of_x(dy) * (2 if dy.shape[1] == 1 else 1)


class DoublesDWOfOneRow(Plain):
    def gradient_of_W(self, x: Any, dy: Any) -> Any:
        return super().gradient_of_W(x, dy) * (2 if len(dy) == 1 else 1)


class TakesDWOfTheFirstRow(Plain):
    def gradient_of_W(self, x: Any, dy: Any) -> Any:
        return super().gradient_of_W(x[:1], dy[:1])


class TakesDWOfAbsoluteDy(Plain):
    def gradient_of_W(self, x: Any, dy: Any) -> Any:
        return super().gradient_of_W(x, abs(dy))


class WeightsDWByRowNumber(Plain):
    def gradient_of_W(self, x: Any, dy: Any) -> Any:
        return super().gradient_of_W(x, dy * np.arange(1, len(dy) + 1, dtype=dy.dtype)[:, None])


class TakesTheMeanForTheSum(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return (super().gradient_of_b(dy) / max(len(dy), 1)).astype(dy.dtype)


class SumsOverTheWrongAxis(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return dy.sum(1, dtype=dy.dtype) if dy.shape[0] == dy.shape[1] else super().gradient_of_b(dy)


class KeepsTheAxisOfTheBias(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return super().gradient_of_b(dy)[None]


class AddsTheBiasToColumns(Plain):
    def add_bias(self, y: Any) -> Any:
        return y + self.bias.reshape(-1, 1) if len(y) == len(self.bias) else super().add_bias(y)


class GivesZerosWithoutABias(Plain):
    def backward(self, dy: Any) -> Any:
        dx = super().backward(dy)
        self.db = np.zeros(dy.shape[-1:]) if self.db is None else self.db
        return dx


class DropsTheImaginaryPart(Plain):
    def forward(self, x: Any) -> Any:
        return super().forward(x).real


# Shapes and tiles are handled wrongly.


class FlattensInFortranOrder(Plain):
    def forward(self, x: Any) -> Any:
        rows = x.reshape(self.rows(x), self.weights.shape[0], order="F" if x.ndim > 2 else "C")
        return super().forward(rows.reshape(x.shape))


class IgnoresTheBatchAxes(AffineLayer):
    def __init__(self, W: Any, b: Any, n_batch_axes: int | None = None) -> None:  # noqa: ARG002
        super().__init__(W, b)


class FailsOnAnEmptyBatch(Plain):
    def forward(self, x: Any) -> Any:
        return super().forward(x.reshape(x.shape[0], -1) if x.ndim > 1 else x)


class DropsAnOddLastRow(Plain):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        if x.ndim > 1 and len(y) % 2:
            y[-1] = 0
        return y


class DropsTheLastTile(Plain):
    def product(self, a: Any, b: Any) -> Any:
        y = super().product(a, b)
        if len(y) % 64:
            y[len(y) // 64 * 64 :] = 0
        return y


class DropsTheLastRowBeyondTheFirstTile(Plain):
    def product(self, a: Any, b: Any) -> Any:
        y = super().product(a, b)
        if len(y) > 64 and len(y) % 64:
            y[-1] = 0
        return y


class DropsTheLastColumnBeyondTheFirstTile(Plain):
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


# Precision and dtypes are wrong.


def eleven_bits(array: Any) -> Any:
    """Round float32 to the 11 significand bits of TF32."""
    return ((np.ascontiguousarray(array).view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


class RoundsFactorsToTF32(Plain):
    def product(self, a: Any, b: Any) -> Any:
        return super().product(eleven_bits(a), eleven_bits(b))


class RoundsFactorsOfDWToTF32(Plain):
    def gradient_of_W(self, x: Any, dy: Any) -> Any:
        return super().gradient_of_W(eleven_bits(x), eleven_bits(dy))


class AccumulatesInHalfPrecision(Plain):
    def product(self, a: Any, b: Any) -> Any:
        y = np.zeros((a.shape[0], b.shape[1]), a.dtype)
        for i in range(a.shape[1]):
            y += a[:, i, None] * b[i]
        return y


class SumsDyInHalfPrecision(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return np.add.accumulate(dy, dtype=dy.dtype)[-1] if len(dy) else super().gradient_of_b(dy)


class WidensDW(Plain):
    def gradient_of_W(self, x: Any, dy: Any) -> Any:
        return super().gradient_of_W(x, dy).astype(np.float64)


class WidensDb(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return super().gradient_of_b(dy).astype(np.float64)


class NarrowsY(Plain):
    def add_bias(self, y: Any) -> Any:
        return super().add_bias(y).astype(np.float16)


class PromotesGradients(Plain):
    """`Plain` itself on mixed dtypes: its gradients have the common dtype, not that of their primals."""


# Memory is read or written wrongly.


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
        if b is self.weights and b.flags.f_contiguous and not b.flags.c_contiguous:
            b = b.ravel(order="K").reshape(b.shape)
        return super().product(a, b)


class NeverWritesTheLastElement(Plain):
    def product(self, a: Any, b: Any) -> Any:
        y = np.empty((a.shape[0], b.shape[1]), a.dtype)
        stale = y[-1:, -1:].copy()
        y[...] = super().product(a, b)
        y[-1:, -1:] = stale
        return y


class WritesToX(Plain):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        if x.flags.writeable:
            x[...] = 0
        return y


class WritesToW(Plain):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        if self.weights.flags.writeable:
            self.weights *= 2
        return y


class WritesToDy(Plain):
    def backward(self, dy: Any) -> Any:
        dx = super().backward(dy)
        if dy.flags.writeable:
            dy *= 0
        return dx


class ReusesItsBuffer(Plain):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        buffers = self.__dict__.setdefault("buffers", {})
        buffer = buffers.setdefault(y.shape, np.empty_like(y))
        buffer[...] = y
        return buffer


class ReturnsAViewOfASingleRow(Plain):
    def gradient_of_b(self, dy: Any) -> Any:
        return dy[0] if len(dy) == 1 else super().gradient_of_b(dy)


# The layer's life: what it keeps between calls, and what a rejected call leaves behind.


class SharesXAmongLayers(Plain):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        type(self).x = self.x
        del self.x
        return y


class SharesWeightsAmongLayers(Plain):
    def __init__(self, W: Any, b: Any) -> None:
        type(self).weights, type(self).bias = W, b


class TiresOfBackward(Plain):
    """Is right three times."""

    calls = 0

    def backward(self, dy: Any) -> Any:
        self.calls += 1
        return super().backward(dy) * (self.calls < 5)


class WritesBesideX(Plain):
    """Writes one element past the end of an x in C order."""

    def forward(self, x: Any) -> Any:
        if x.flags.c_contiguous and x.flags.writeable and x.size:
            ctypes.memset(x.ctypes.data + x.nbytes, 1, x.itemsize)
        return super().forward(x)


class IsWrongInTheLastOfManyTiles(Plain):
    def product(self, a: Any, b: Any) -> Any:
        product = super().product(a, b)
        if min(*a.shape, *b.shape) > 128:
            product[-1, -1] += 1
        return product


class KeepsTheFirstX(Plain):
    def forward(self, x: Any) -> Any:
        y, rows = super().forward(x), self.x
        first = self.__dict__.setdefault("first", rows)
        self.x = first if first.shape == rows.shape else rows
        return y


class AccumulatesDW(Plain):
    def backward(self, dy: Any) -> Any:
        before = self.dW
        dx = super().backward(dy)
        self.dW = self.dW if before is None else self.dW + before
        return dx


class WritesDbBeforeItChecksDy(Plain):
    def backward(self, dy: Any) -> Any:
        self.db = None if self.bias is None else np.asarray(dy.sum(0))
        return super().backward(dy)


class AcceptsAnAxisTooMany(Plain):
    def backward(self, dy: Any) -> Any:
        return super().backward(dy[0] if dy.shape[1:] == self.y_shape else dy)


class CutsDyToSize(Plain):
    def backward(self, dy: Any) -> Any:
        return super().backward(dy[: self.y_shape[0]] if dy.ndim == 2 else dy)


class BroadcastsDy(Plain):
    def backward(self, dy: Any) -> Any:
        return super().backward(np.broadcast_to(dy, self.y_shape) if dy.shape[:1] == (1,) else dy)


class ForgetsXBeforeItChecksTheNext(Plain):
    def forward(self, x: Any) -> Any:
        self.x = None
        return super().forward(x)


class ForgetsGradientsBeforeItChecksX(Plain):
    def forward(self, x: Any) -> Any:
        self.dW = self.db = None
        return super().forward(x)


class GivesAnotherResultEachTime(Plain):
    calls = itertools.count()

    def add_bias(self, y: Any) -> Any:
        return super().add_bias(y) + np.float32(next(self.calls) % 3 == 0)


# What comes back is no array, or nothing comes back.


class ReturnsAList(Plain):
    def forward(self, x: Any) -> Any:
        return super().forward(x).tolist()


class ReturnsNothing(Plain):
    def backward(self, dy: Any) -> Any:
        super().backward(dy)


class ReturnsAFunction(Plain):
    def forward(self, x: Any) -> Any:
        return lambda: super().forward(x)


class ReturnsAnotherLibrarysArray(Plain):
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


class HasNoBackward(Plain):
    backward = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Bug:
    """A wrong layer, and how the verifier must find it.

    `found_by` is the property that finds it first, with a message that matches `message` when the verifier is called
    with `options`; each of the properties `also_by` finds it on its own, too.
    """

    make: Callable[..., Any]
    found_by: str
    message: str
    also_by: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


class ReadsWAfterwards(Plain):
    def __init__(self, W: Any, b: Any) -> None:
        super().__init__(W, b)
        self.W = W

    def gradient_of_x(self, dy: Any) -> Any:
        return self.product(dy, self.W.T)


BUGS = [
    Bug(
        DoublesY, "forward_is_exact", r"y\[",
        ("forward_is_within_bound", "differences_are_adjoint_to_gradients"),
    ),
    Bug(TransposesWOnlyIfNotSquare, "backward_is_exact", r"dx\[", ("differences_are_adjoint_to_gradients",)),
    Bug(RollsDx, "backward_is_exact", r"dx\[", ("batch_is_the_sum_of_its_parts",)),
    Bug(DoublesDxOfOneOutput, "backward_is_exact", r"dx\["),
    Bug(DoublesDWOfOneRow, "backward_is_exact", r"dW\["),
    Bug(TakesDWOfTheFirstRow, "backward_is_exact", r"dW\[", ("permuted_rows_permute_results",)),
    Bug(TakesDWOfAbsoluteDy, "backward_is_exact", r"dW\[", ("backward_is_linear",)),
    Bug(
        WeightsDWByRowNumber, "backward_is_exact", r"dW\[",
        ("batch_is_the_sum_of_its_parts", "permuted_rows_permute_results"),
    ),
    Bug(TakesTheMeanForTheSum, "backward_is_exact", r"db\[", ("differences_are_adjoint_to_gradients",)),
    Bug(SumsOverTheWrongAxis, "backward_is_exact", r"db\["),
    Bug(KeepsTheAxisOfTheBias, "backward_is_exact", r"db has shape \(1, \d+\), not \(\d+,\)"),
    Bug(AddsTheBiasToColumns, "forward_is_exact", r"y\["),
    Bug(GivesZerosWithoutABias, "backward_is_exact", "db is not None without a bias, but a numpy.ndarray"),
    Bug(
        DropsTheImaginaryPart, "forward_is_exact", "y has dtype float32, of the wrong kind",
        options={"dtype": "complex64"},
    ),
    Bug(FlattensInFortranOrder, "forward_is_exact", r"y\[", ("forward_is_within_bound",)),
    Bug(IgnoresTheBatchAxes, "forward_is_exact", "y has shape|forward raised ValueError: with n_batch_axes"),
    Bug(FailsOnAnEmptyBatch, "forward_is_exact", "forward raised ValueError: cannot reshape"),
    Bug(DropsAnOddLastRow, "forward_is_exact", r"y\[", ("permuted_rows_permute_results",)),
    Bug(DropsTheLastTile, "forward_is_exact", r"y\["),
    Bug(DropsTheLastRowBeyondTheFirstTile, "forward_is_exact", r"y\[65536, 0\] is", options={"large": 200}),
    Bug(DropsTheLastColumnBeyondTheFirstTile, "forward_is_exact", r"y\[0, 65536\] is", options={"large": 200}),
    Bug(DropsTheDepthBeyondWholeTiles, "forward_is_exact", r"y\[", options={"large": 200}),
    Bug(
        RoundsFactorsToTF32, "forward_is_within_bound", "times its rounding bound",
        options={"dtype": "float32"},
    ),
    Bug(
        RoundsFactorsOfDWToTF32, "backward_is_within_bounds", r"dW\[.* times its rounding bound",
        options={"dtype": "float32"},
    ),
    Bug(
        AccumulatesInHalfPrecision, "forward_is_within_bound", "times its rounding bound",
        options={"dtype": "float16"},
    ),
    Bug(
        SumsDyInHalfPrecision, "backward_is_within_bounds", r"db\[\d+\].* times its rounding bound",
        options={"dtype": "float16"},
    ),
    Bug(WidensDW, "results_match_their_primals", "dW has dtype float64, not float32"),
    Bug(WidensDb, "results_match_their_primals", "db has dtype float64, not float32"),
    Bug(NarrowsY, "results_match_their_primals", "y has dtype float16, not float32"),
    Bug(
        PromotesGradients, "results_match_their_primals", r"d[xWb] has dtype float\d\d, not float\d\d",
        options={"dtype": ["float32", "float64"]},
    ),
    Bug(ReadsDyAsIfContiguous, "backward_is_exact", r"d[xWb]\["),
    Bug(TakesStrideZeroForOneRow, "backward_is_exact", r"db\["),
    Bug(ReadsFortranOrderedWAsC, "forward_is_exact", r"y\["),
    Bug(NeverWritesTheLastElement, "forward_is_exact", r"y\["),
    Bug(WritesToX, "backward_is_exact", r"dW\[", ("inputs_are_left_alone",)),
    Bug(WritesToW, "backward_is_exact", r"dx\["),
    Bug(WritesToDy, "inputs_are_left_alone", r"dy\["),
    Bug(ReusesItsBuffer, "results_are_fresh", r"after a later call, the earlier y\["),
    Bug(ReturnsAViewOfASingleRow, "results_are_fresh", r"after a write to the inputs, db\["),
    Bug(SharesXAmongLayers, "backward_belongs_to_latest_forward", r"dW\["),
    Bug(SharesWeightsAmongLayers, "backward_belongs_to_latest_forward", r"dx\["),
    Bug(TiresOfBackward, "backward_belongs_to_latest_forward", r"dx\["),
    Bug(WritesBesideX, "inputs_are_left_alone", "what lies beside x in memory was written to"),
    Bug(IsWrongInTheLastOfManyTiles, "forward_is_exact", r"y\[128, 130\] is", options={"large": 5}),
    Bug(KeepsTheFirstX, "backward_belongs_to_latest_forward", r"dW\["),
    Bug(AccumulatesDW, "results_are_fresh", r"dW\[", ("backward_belongs_to_latest_forward",)),
    Bug(ReadsWAfterwards, "rebound_parameters_are_not_seen", r"dx\["),
    Bug(WritesDbBeforeItChecksDy, "rejected_dy_changes_nothing", "after a rejected dy of shape"),
    Bug(AcceptsAnAxisTooMany, "rejected_dy_changes_nothing", r"dy of shape .* is accepted where .* belongs"),
    Bug(CutsDyToSize, "rejected_dy_changes_nothing", r"dy of shape .* is accepted where .* belongs"),
    Bug(BroadcastsDy, "rejected_dy_changes_nothing", r"dy of shape \(1,.* is accepted where .* belongs"),
    Bug(ForgetsXBeforeItChecksTheNext, "rejected_x_changes_nothing", "backward raised TypeError"),
    Bug(ForgetsGradientsBeforeItChecksX, "rejected_x_changes_nothing", "dW gave None, not an array of numpy"),
    Bug(GivesAnotherResultEachTime, "forward_is_exact", "The same case came out differently when it was run again"),
    Bug(ReturnsAList, "forward_is_exact", "forward gave a builtins.list, not an array of numpy"),
    Bug(ReturnsNothing, "backward_is_exact", "backward gave None, not an array of numpy"),
    Bug(ReturnsAFunction, "forward_is_exact", "forward gave a builtins.function, not an array of numpy"),
    Bug(ReturnsAnotherLibrarysArray, "forward_is_exact", "forward gave a array_api_strict.*, not an array of numpy"),
    Bug(StoresNoGradient, "backward_is_exact", "dW gave None, not an array of numpy"),
    Bug(RaisesAtOnce, "forward_is_exact", r"Error: not yet\n  .*bugs.py:\d+, in forward: raise"),
    Bug(Exits, "forward_is_exact", "forward raised SystemExit: 3"),
    Bug(HasNoBackward, "forward_is_exact", r"gave a tests.*HasNoBackward, not a layer with forward and backward"),
]  # fmt: skip
