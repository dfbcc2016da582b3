"""What type checkers and editors see: that y and dx are of the type of x, dW of that of W, and db of that of b."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeAlias, final, overload

import numpy as np

from xaffine.backends import Array

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from xaffine.functional import Gradients
    from xaffine.layer import AffineLayer
else:

    def TypeVar(name: str, **_: Any) -> typing.TypeVar:
        """Only a type checker reads the rest, and Python knows defaults from 3.13 on."""
        return typing.TypeVar(name)


__all__ = [
    "DB", "DW", "DX", "DY", "Bias", "Gradient", "Input", "LayerBias", "LayerWeights", "Of", "Operands", "Original",
    "Output", "Outs", "Scalar", "Tangents", "Unknown", "Vjp", "Weights", "Wrt",
]  # fmt: skip

# Of functions: the types of x, W, b and dy. Without a bias db is None. NumPy's types know the number of axes, and y may
# have another one than x: what returns y has an overload for NDArray, which is any number, with the Scalar of x.
Input = TypeVar("Input")
Weights = TypeVar("Weights")
Bias = TypeVar("Bias", default=None)
Output = TypeVar("Output")
Scalar = TypeVar("Scalar", bound=np.generic)

# Of classes, which without types in brackets take every array.
LayerWeights = TypeVar("LayerWeights", default=Any)
LayerBias = TypeVar("LayerBias", default=Any)
DX = TypeVar("DX", default=Any, covariant=True)
DW = TypeVar("DW", default=Any, covariant=True)
DB = TypeVar("DB", default=Any, covariant=True)
DY = TypeVar("DY", default=Any, covariant=True)

Operand: TypeAlias = Literal["x", "W", "b"]
Wrt: TypeAlias = Operand | Iterable[Operand]
"""The operands whose gradients are wanted."""


class Of:
    """Those of `Wrt` of which a type checker knows what they select."""

    x: TypeAlias = Literal["x"] | tuple[Literal["x"]]
    W: TypeAlias = Literal["W"] | tuple[Literal["W"]]
    b: TypeAlias = Literal["b"] | tuple[Literal["b"]]
    xW: TypeAlias = tuple[Literal["x"], Literal["W"]] | tuple[Literal["W"], Literal["x"]]
    xb: TypeAlias = tuple[Literal["x"], Literal["b"]] | tuple[Literal["b"], Literal["x"]]
    Wb: TypeAlias = tuple[Literal["W"], Literal["b"]] | tuple[Literal["b"], Literal["W"]]
    xWb: TypeAlias = tuple[Operand, Operand, Operand]


Operands: TypeAlias = tuple[Input, Array] | tuple[Input, Array, Array | None]
"""(x, W) or (x, W, b)."""
Tangents: TypeAlias = tuple[Array | None, Array | None] | tuple[Array | None, Array | None, Array | None]
"""What goes with them; None where it is zero."""
Outs: TypeAlias = tuple[Array | None, Array | None, Array | None]
"""dx, dW and db, or buffers for them; None for those that are not wanted."""


@final
class Unknown:
    """No array is one, so that the first overload takes nothing but what a type checker knows nothing about.

    Else pyright would take that for an NDArray: arrays of a library without types, which have methods of their own.
    """


class Vjp(Protocol[DX, DW, DB]):
    """The function from dy to the gradients that `xaffine.affine_vjp` returns."""

    # fmt: off
    @overload
    def __call__(self, dy: Array, out: Outs | None = None, wrt: Of.xWb = ...) -> Gradients[DX, DW, DB]: ...
    @overload
    def __call__(self, dy: Array, out: Outs | None = None, *, wrt: Of.x) -> Gradients[DX, None, None]: ...
    @overload
    def __call__(self, dy: Array, out: Outs | None = None, *, wrt: Of.W) -> Gradients[None, DW, None]: ...
    @overload
    def __call__(self, dy: Array, out: Outs | None = None, *, wrt: Of.b) -> Gradients[None, None, DB]: ...
    @overload
    def __call__(self, dy: Array, out: Outs | None = None, *, wrt: Of.xW) -> Gradients[DX, DW, None]: ...
    @overload
    def __call__(self, dy: Array, out: Outs | None = None, *, wrt: Of.xb) -> Gradients[DX, None, DB]: ...
    @overload
    def __call__(self, dy: Array, out: Outs | None = None, *, wrt: Of.Wb) -> Gradients[None, DW, DB]: ...
    @overload
    def __call__(
        self, dy: Array, out: Outs | None = None, *, wrt: Wrt
    ) -> Gradients[DX | None, DW | None, DB | None]: ...
    # fmt: on


class Gradient(Generic[LayerWeights]):
    """An attribute that may be None: it takes None, and whoever reads it need not test for that."""

    if TYPE_CHECKING:

        def __get__(self, layer: object, kind: type) -> LayerWeights: ...
        def __set__(self, layer: object, gradient: LayerWeights | None) -> None: ...


class Original(Protocol):
    """AffineLayer and no class derived from it: where an attribute has the type Self, that differs."""

    _itself: AffineLayer
