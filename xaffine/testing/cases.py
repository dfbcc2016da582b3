"""One case to test with: operands with their dtypes and memory layouts, and the exact answer to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xaffine.testing.bounds import exact_integers, rounding_bound

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xaffine.backends import Array, Backend

__all__ = ["LAYOUTS", "Case", "Exact", "Operand", "error_ratio", "make_case"]

LAYOUTS = ("C", "Fortran", "reversed", "strided", "read-only")
"""The memory layouts an operand can have; a dy can be ``"broadcast"`` (stride 0) besides."""


@dataclass(frozen=True, eq=False)
class Operand:
    """Values, and how an array library is to hold them.

    Attributes
    ----------
    values : numpy.ndarray
        The values, representable in `dtype`; in a wider dtype where NumPy lacks that one.
    dtype : str
        The name of the dtype, such as ``"bfloat16"``.
    layout : str
        One of `LAYOUTS` or ``"broadcast"``. A library that has no such memory keeps the values.
    """

    values: np.ndarray
    dtype: str
    layout: str = "C"

    def on(self, backend: Backend, device: Any = None) -> Array:
        """The operand as an array of that backend."""
        xp, values = backend.xp, self.values

        def convert(array: np.ndarray) -> Array:
            array = np.array(array, order="C")  # a copy: what is done to the result cannot reach the case
            native = backend.from_numpy(array, device=device)
            return native if array.dtype.name == self.dtype else xp.astype(native, getattr(xp, self.dtype))

        if self.layout == "Fortran":
            return xp.permute_dims(convert(values.T), tuple(reversed(range(values.ndim))))
        if self.layout == "reversed":
            return xp.flip(convert(np.flip(values)))
        if self.layout == "strided":
            gaps = np.zeros((*values.shape[:-1], 2 * values.shape[-1]), values.dtype)
            gaps[..., ::2] = values
            return convert(gaps)[..., ::2]
        if self.layout == "broadcast":
            return xp.broadcast_to(convert(values[:1]), values.shape)
        native = convert(values)
        if self.layout == "read-only" and isinstance(native, np.ndarray):
            native.flags.writeable = False
        return native


class Exact(NamedTuple):
    """A result in exact arithmetic, with what its rounding bound needs.

    The arrays hold Python integers, in units of ``2**-scale``, and have one more leading axis: the real part,
    and the imaginary part of a complex result.
    """

    value: np.ndarray
    magnitude: np.ndarray
    scale: int
    k: int
    computed_in: str
    rounded_to: str


@dataclass(frozen=True, eq=False)
class Case:
    """Operands of one forward and backward.

    Attributes
    ----------
    x, W, b, dy : Operand
        As in `xaffine.affine_backward`; b may be None.
    batch : tuple of int
        The batch extents of x: the leading ones.
    n_batch_axes : int or None
        The argument that says so.
    seed : int
        Seeds whatever else a check draws.
    """

    x: Operand
    W: Operand
    b: Operand | None
    dy: Operand
    batch: tuple[int, ...]
    n_batch_axes: int | None
    seed: int

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}={'None' if o is None else f'{o.dtype}{list(o.values.shape)} {o.layout}'}"
            for name, o in {"x": self.x, "W": self.W, "b": self.b, "dy": self.dy}.items()
        )
        return f"Case({fields}, n_batch_axes={self.n_batch_axes}, seed={self.seed})"

    @property
    def N(self) -> int:
        """The batch size."""
        return math.prod(self.batch)

    @property
    def y_dtype(self) -> str:
        """The common dtype of x, W and b."""
        return _common_dtype(self.x, self.W, self.b)

    def replace_values(self, **values: np.ndarray) -> Case:
        """The same case with other values for some operands, in plain layout."""
        operands = {name: replace(getattr(self, name), values=v, layout="C") for name, v in values.items()}
        return replace(self, **operands)

    def exact(self) -> dict[str, Exact]:
        """The exact y, dx, dW and db (without a bias, no db), in the shapes that the layer owes."""
        n, m = self.W.values.shape
        N, dtype, wide = self.N, self.y_dtype, _common_dtype(self.x, self.W, self.b, self.dy)
        scale = _common_scale(self.x, self.W, self.b, self.dy)
        x = _integers(self.x.values.reshape(N, n), scale)
        W = _integers(self.W.values, scale)
        dy = _integers(self.dy.values.reshape(N, m), scale)
        # A complex product has two real terms in each part.
        parts = 2 if dtype.startswith("complex") else 1

        y, size = _product(x, W), _magnitude(x, W)
        if self.b is not None:
            b = _integers(self.b.values, scale)[:, None, :]
            y, size = y + b * 2**scale, size + abs(b) * 2**scale
        k = parts * n + (self.b is not None) if n else 0
        W_T, x_T = W.swapaxes(1, 2), x.swapaxes(1, 2)
        results = {
            "y": Exact(y, size, 2 * scale, k, dtype, dtype),
            "dx": Exact(_product(dy, W_T), _magnitude(dy, W_T), 2 * scale, parts * m, wide, self.x.dtype),
            "dW": Exact(_product(x_T, dy), _magnitude(x_T, dy), 2 * scale, parts * N, wide, self.W.dtype),
        }
        if self.b is not None:
            results["db"] = Exact(dy.sum(1), abs(dy).sum(1), scale, max(N - 1, 0), wide, self.b.dtype)
        shapes = {"y": (*self.batch, m), "dx": self.x.values.shape, "dW": (n, m), "db": (m,)}
        return {
            name: r._replace(value=_shaped(r.value, shapes[name]), magnitude=_shaped(r.magnitude, shapes[name]))
            for name, r in results.items()
        }


def error_ratio(computed: np.ndarray, exact: Exact) -> float:
    """The largest error of a result as a fraction of its rounding bound: 0 for exact, above 1 for wrong.

    An error where the bound is 0, and a NaN or infinity, count as infinite.
    """
    worst = 0.0
    parts = [computed.real, computed.imag] if np.iscomplexobj(computed) else [computed]
    for part, values, magnitudes in zip(parts, exact.value, exact.magnitude, strict=True):
        flat = part.ravel() if part.dtype.kind in "iu" else part.ravel().astype(np.float64)
        for got, value, magnitude in zip(flat.tolist(), values.ravel(), magnitudes.ravel(), strict=True):
            if not math.isfinite(got):
                return math.inf
            true = Fraction(value, 2**exact.scale)
            error = abs(Fraction(got) - true)
            if error:
                size = Fraction(magnitude, 2**exact.scale)
                bound = rounding_bound(true, size, exact.k, exact.computed_in, exact.rounded_to)
                worst = max(worst, float(error / bound) if bound else math.inf)
    return worst


def make_case(
    batch: tuple[int, ...],
    features: tuple[int, ...],
    m: int,
    *,
    seed: int,
    values: str = "integers",
    dtypes: tuple[str, str, str, str] | str = "float32",
    layouts: tuple[str, str, str, str] = ("C", "C", "C", "C"),
    bias: bool = True,
) -> Case:
    """Make a case with random values.

    Parameters
    ----------
    batch, features : tuple of int
        The two parts of the shape of x.
    m : int
        Output features.
    seed : int
        The values follow from it.
    values : {"integers", "floats"}
        Integers from -2 to 2 (0 to 2 in unsigned dtypes), on which all sums are exact, or floats whose exponents
        vary, with zeros among them.
    dtypes, layouts : tuple of str
        For x, W, b and dy; one dtype stands for all four.
    bias : bool
        Whether there is a b.

    Returns
    -------
    Case
        Its `n_batch_axes` is ``len(batch)``.
    """
    dtypes = (dtypes,) * 4 if isinstance(dtypes, str) else dtypes
    rng = np.random.default_rng(seed)
    n = math.prod(features)
    shapes = ((*batch, *features), (n, m), (m,), (*batch, m))
    # Exponents that keep every product, and its cast, inside the narrowest format.
    spread = min({"float16": 4, "float64": 60, "complex128": 60}.get(dtype, 20) for dtype in dtypes)

    def operand(i: int) -> Operand:
        if values == "integers":
            array = _draw_integers(rng, shapes[i], dtypes[i])
        else:
            array = _draw_floats(rng, shapes[i], dtypes[i], spread)
        if layouts[i] == "broadcast":
            array = np.broadcast_to(array[:1], shapes[i])
        return Operand(array, dtypes[i], layouts[i])

    x, W, b, dy = map(operand, range(4))
    return Case(x, W, b if bias else None, dy, batch, len(batch), seed)


def largest_extent(dtypes: Iterable[str]) -> int:
    """The most terms of a sum that stays exact on integers up to 3, in the narrowest of some dtypes."""
    return (min(map(exact_integers, dtypes)) - 3) // 9


def _draw_integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    low = 0 if dtype.startswith("uint") else -2
    if dtype.startswith("complex"):
        # Parts up to 1: a complex product has two terms a part.
        return (rng.integers(-1, 2, shape) + 1j * rng.integers(-1, 2, shape)).astype(dtype)
    return rng.integers(low, 3, shape).astype(_numpy_dtype(dtype))


def _draw_floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, spread: int) -> np.ndarray:
    if dtype.startswith("complex"):
        real, imaginary = (_draw_floats(rng, shape, "float64", spread) for _ in range(2))
        return (real + 1j * imaginary).astype(dtype)
    exponents = rng.integers(-spread, spread, shape)
    floats = rng.choice([-1.0, 1.0], shape) * np.ldexp(rng.uniform(1, 2, shape), exponents)
    floats = np.where(rng.random(shape) < 0.1, 0.0, floats).astype(_numpy_dtype(dtype))
    if dtype == "bfloat16":
        return (floats.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return floats


def _numpy_dtype(dtype: str) -> str:
    return "float32" if dtype == "bfloat16" else dtype


def _common_dtype(*operands: Operand | None) -> str:
    names = {operand.dtype for operand in operands if operand is not None}
    if len(names) == 1:
        return names.pop()
    # NumPy lacks bfloat16; with any other dtype it promotes as float32 does.
    return np.result_type(*("float32" if name == "bfloat16" else name for name in names)).name


def _common_scale(*operands: Operand | None) -> int:
    """The least scale ≥ 0 such that every value is an integer in units of 2**-scale."""
    scale = 0
    for operand in operands:
        if operand is not None and operand.values.size and operand.values.dtype.kind in "fc":
            parts = np.stack([operand.values.real, operand.values.imag]).astype(np.float64)
            exponents = np.frexp(parts[parts != 0])[1]
            scale = max(scale, 53 - int(exponents.min(initial=53)))
    return scale


def _integers(values: np.ndarray, scale: int) -> np.ndarray:
    """The values in units of 2**-scale as Python integers, real and imaginary parts along a new first axis."""
    parts = [values.real, values.imag] if np.iscomplexobj(values) else [values]
    integers = np.empty((len(parts), *values.shape), dtype=object)
    for part, target in zip(parts, integers, strict=True):
        if part.dtype.kind == "f":
            significands, exponents = np.frexp(part.astype(np.float64))
            whole = np.ldexp(significands, 53).astype(np.int64).astype(object)
            shifts = np.where(significands == 0, 0, exponents - 53 + scale).astype(object)
            target[...] = whole * 2**shifts
        else:
            target[...] = part.astype(object)
    return integers


def _product(a: Any, b: Any) -> Any:
    if len(a) == 1:
        return a @ b
    return np.stack([a[0] @ b[0] - a[1] @ b[1], a[0] @ b[1] + a[1] @ b[0]])


def _magnitude(a: Any, b: Any) -> Any:
    a, b = abs(a), abs(b)
    if len(a) == 1:
        return a @ b
    return np.stack([a[0] @ b[0] + a[1] @ b[1], a[0] @ b[1] + a[1] @ b[0]])


def _shaped(parts: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return parts.reshape(len(parts), *shape)
