"""One case to test with: operands with their dtypes and memory layouts, and the exact answer to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xaffine.testing import bounds
from xaffine.testing.bounds import Summation, usual_summation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xaffine.backends import Array, Backend
    from xaffine.testing.bounds import Parts

__all__ = ["FEATURES", "LAYOUTS", "Case", "Exact", "Operand", "largest_extent", "make_case", "worst_error"]

_NEIGHBOURS = 64  # elements before and after an operand: whole lines of a cache, so that the operand is aligned as is

LAYOUTS = ("C", "Fortran", "reversed", "strided", "read-only")
"""The memory layouts an operand can have; a dy can be ``"broadcast"`` (stride 0) besides."""

FEATURES = {
    "matrices": "an x of shape (N, n)",
    "vectors": "a 1-D x as a single sample",
    "tensors": "an x of shape (N, d1, d2), flattened to N samples of n = d1·d2 features",
    "last-axis": "an x of shape (N, T, n), mapped along its last axis",
    "four-axes": "an x of four axes",
    "no-bias": "b = None",
    "no-samples": "N = 0",
    "no-features": "n = 0",
    "no-outputs": "m = 0",
}
"""What an implementation may declare that it supports, in a collection called ``supports``, beside names of dtypes."""


@dataclass(frozen=True, eq=False)
class Operand:
    """Values, and how an array library is to hold them.

    Parameters
    ----------
    values : numpy.ndarray
        The values, representable in `dtype`; in a wider dtype where NumPy lacks that one.
    dtype : str
        The name of the dtype, such as ``"bfloat16"``.
    layout : str
        One of `LAYOUTS` or ``"broadcast"``. A library that has no such memory keeps the values.

    Examples
    --------
    >>> from xaffine.backends import get
    >>> Operand(np.asarray([[1.0, 2.0]]), "float64", "strided").on(get("numpy")).strides
    (32, 16)
    """

    values: np.ndarray
    dtype: str
    layout: str = "C"

    def on(self, backend: Backend, device: Any = None) -> Array:
        """The operand as an array of that backend.

        Parameters
        ----------
        backend : Backend
            As from `xaffine.backends.get`.
        device : optional
            One of its devices; the default one if not given.

        Returns
        -------
        array
            With memory of its own.

        Examples
        --------
        >>> from xaffine.backends import get
        >>> Operand(np.ones(2), "float32", "read-only").on(get("numpy")).flags.writeable
        False
        """
        if not backend.has_strides:  # another layout would only add operations, which JAX compiles for every shape
            return backend.from_values(np.asarray(self.values, order="C"), self.dtype, device=device)
        return viewed(backend.xp, backend.from_values(self.memory, self.dtype, device=device), self)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.values.shape

    @property
    def memory(self) -> np.ndarray:
        """One axis of what the operand and its neighbours hold in memory: 3 wherever the operand is not."""
        values, held = self.values, self.values
        if self.layout == "Fortran":
            held = values.T
        elif self.layout == "reversed":
            held = np.flip(values)
        elif self.layout == "strided":
            held = np.full((*values.shape[:-1], 2 * values.shape[-1]), 3, values.dtype)
            held[..., ::2] = values
        elif self.layout == "broadcast":
            held = values[:1]
        memory = np.full(held.size + 2 * _NEIGHBOURS, 3, values.dtype)
        memory[_NEIGHBOURS : _NEIGHBOURS + held.size] = held.reshape(-1)
        return memory


def viewed(xp: Any, memory: Array, operand: Any) -> Array:
    """What lies in `memory`, which is like `Operand.memory`, with the shape and the layout of an operand."""
    inner, shape, layout = memory[_NEIGHBOURS : memory.shape[0] - _NEIGHBOURS], operand.shape, operand.layout
    if layout == "Fortran":
        return xp.permute_dims(xp.reshape(inner, shape[::-1]), tuple(reversed(range(len(shape)))))
    if layout == "strided":
        return xp.reshape(inner, (*shape[:-1], 2 * shape[-1]))[..., ::2]
    if layout == "broadcast":
        return xp.broadcast_to(xp.reshape(inner, (min(shape[0], 1), *shape[1:])), shape)
    array = xp.reshape(inner, shape)
    if layout == "reversed":
        return xp.flip(array)
    if layout == "read-only" and isinstance(array, np.ndarray):
        array.flags.writeable = False
    return array


class Exact(NamedTuple):
    """A result in exact arithmetic, with what its rounding bound needs.

    Attributes
    ----------
    stages, magnitude, bias : list of arrays
        The value, after the value without the bias where there is one; the sum with every term positive; what in that
        is no product. Each as a real part or a real and an imaginary one, in integers in units of ``2**-scale``.
    k, terms : int
        The most roundings that any term takes part in, and how many terms there are.
    scale : int
        The unit.
    accumulator, rounded_to : str
        As in `xaffine.testing.bounds.rounding_bound`.
    cuts, factors
        As in `xaffine.testing.bounds.Summation`.

    Examples
    --------
    >>> exact = make_case((2,), 1, seed=0, bias=False).exact()["y"]  # 2 · 0 + 1 · (-1)
    >>> exact.value.tolist(), exact.k
    ([-1.0], 2)
    """

    stages: list[Parts]
    magnitude: Parts
    bias: Parts
    scale: int
    k: int
    terms: int
    accumulator: str
    rounded_to: str
    cuts: bool = False
    factors: str | None = None

    def bound(self, part: int, position: int) -> Any:
        """The rounding bound of one element's real (part 0) or imaginary part (1).

        Parameters
        ----------
        part : int
            0 or 1.
        position : int
            Of the element in C order.

        Returns
        -------
        Fraction or float
            A float where it is infinite.

        Examples
        --------
        >>> exact = make_case((2,), 1, seed=0, bias=False).exact()["y"]
        >>> 0 < exact.bound(0, 0) < 2**-22
        True
        """
        numerator, denominator = self._bound(part, position)
        return Fraction(numerator, denominator << self.scale) if denominator else math.inf

    def _bound(self, part: int, position: int) -> tuple[int, int]:
        """The bound as a numerator and a denominator in units of ``2**-scale``; over 0 it is infinite."""
        how = (self.k, self.terms, self.accumulator, self.rounded_to, self.cuts, self.factors)
        constant, weights, denominator = _weights(len(self.stages), *how)
        values = (abs(int(some[part].flat[position])) for some in (self.magnitude, self.bias, *self.stages))
        return (constant << self.scale) + sum(w * v for w, v in zip(weights, values, strict=True)), denominator

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.magnitude[0].shape

    @property
    def value(self) -> np.ndarray:
        """The result, rounded to float64 or complex128."""
        unit = Fraction(1, 2**self.scale)
        parts = [np.array([float(v * unit) for v in part.ravel().tolist()], float) for part in self.stages[-1]]
        return bounds.joined(parts).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Case:
    """Operands of one forward and backward.

    Parameters
    ----------
    x, W, b, dy : Operand
        As in `xaffine.affine_backward`; b may be None.
    n_batch_axes : int or None
        The argument of that name.
    kind : str
        What values they hold, as `values` of `make_case`.
    seed : int
        Seeds whatever else a check draws.
    summation : Summation or None
        What the bounds assume of the implementation; None for `xaffine.testing.bounds.usual_summation` of the common
        dtype.

    Examples
    --------
    >>> case = make_case((5, 2, 3), 4, seed=0)
    >>> case.batch, case.N, case.W.values.shape, case.y_dtype
    ((5,), 5, (6, 4), 'float32')
    """

    x: Operand
    W: Operand
    b: Operand | None
    dy: Operand
    n_batch_axes: int | None
    kind: str
    seed: int
    summation: Summation | None = None

    def __repr__(self) -> str:
        return self.code

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch extents of x: the leading ones."""
        return self.x.values.shape[: bounds.count_batch_axes(self.x.values.shape, self.n_batch_axes)]

    @property
    def N(self) -> int:
        """The batch size."""
        return math.prod(self.batch)

    @property
    def y_dtype(self) -> str:
        """The common dtype of x, W and b."""
        return _common_dtype([operand for name, operand in self.operands.items() if name != "dy"])

    @property
    def operands(self) -> dict[str, Operand]:
        """The operands by name, b only where there is one."""
        operands = {"x": self.x, "W": self.W, "b": self.b, "dy": self.dy}
        return {name: operand for name, operand in operands.items() if operand is not None}

    @property
    def owed(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The shape and dtype of each result by name: y, and a gradient like each operand but dy."""
        gradients = {f"d{name}": (o.values.shape, o.dtype) for name, o in self.operands.items() if name != "dy"}
        return {"y": (self.dy.values.shape, self.y_dtype), **gradients}

    def replace_values(self, **values: np.ndarray) -> Case:
        """The same case with other values for some operands, in plain layout.

        Parameters
        ----------
        **values : numpy.ndarray
            By the names of the operands: x, W, b, dy.

        Returns
        -------
        Case
            A new one.

        Examples
        --------
        >>> case = make_case((2,), 1, seed=0, bias=False)
        >>> case.replace_values(W=np.ones((2, 1), "float32")).exact()["y"].value.tolist()
        [3.0]
        """
        operands = {name: replace(getattr(self, name), values=v, layout="C") for name, v in values.items()}
        return replace(self, **operands)

    @property
    def code(self) -> str:
        """The call of `make_case` that makes this case."""
        x = self.x
        four = (x, self.W, replace(x, layout="C") if self.b is None else self.b, self.dy)
        dtypes, layouts = tuple(o.dtype for o in four), tuple(o.layout for o in four)
        options = {
            "values": self.kind,
            "dtypes": dtypes[0] if len(set(dtypes)) == 1 else dtypes,
            "layouts": layouts[0] if len(set(layouts)) == 1 else layouts,
            "bias": self.b is not None,
            "n_batch_axes": self.n_batch_axes,
            "summation": self.summation,
        }
        defaults: Any = make_case.__kwdefaults__
        texts = [f"{key}={value!r}" for key, value in options.items() if value != defaults[key]]
        m = self.W.values.shape[1]
        return f"make_case({', '.join([repr(x.values.shape), str(m), f'seed={self.seed}', *texts])})"

    def exact(self) -> dict[str, Exact]:
        """The exact y, dx, dW and db (without a bias, no db), in the shapes that the layer owes.

        Returns
        -------
        dict of Exact
            By the names of the results.

        Examples
        --------
        >>> exact = make_case((2,), 1, seed=0, bias=False).exact()
        >>> {name: result.value.tolist() for name, result in exact.items()}
        {'y': [-1.0], 'dx': [0.0, 1.0], 'dW': [[-2.0], [-1.0]]}
        """
        n, m = self.W.values.shape
        N, operands = self.N, self.operands
        wide = _common_dtype(operands.values())
        # Small integers: their sums fit an int64, and no unit is needed.
        common_scale = _common_scale(operands.values()) if self.kind == "floats" else None
        shapes = {"x": (N, n), "W": (n, m), "b": (m,), "dy": (N, m)}
        parts = {name: _integers(o.values.reshape(shapes[name]), common_scale) for name, o in operands.items()}
        scale = common_scale or 0
        b = [part * 2**scale for part in parts["b"]] if "b" in parts else None
        summation = self.summation or usual_summation(wide)
        exact = {}
        for name, sums in bounds.sums_of_products(parts["x"], parts["W"], b, parts["dy"], summation).items():
            shape, rounded_to = self.owed[name]
            dtype = self.y_dtype if name == "y" else wide
            model = (self.summation or usual_summation(dtype)).of(name, dtype)
            magnitude, bias, *stages = (
                [part.reshape(shape) for part in each] for each in (sums.magnitude, sums.bias, *sums.stages)
            )
            exact[name] = Exact(
                stages, magnitude, bias, scale if name == "db" else 2 * scale, sums.k, sums.terms,
                model.accumulator or dtype, rounded_to, model.cuts, model.factors,
            )  # fmt: skip
        return exact


def worst_error(computed: np.ndarray, exact: Exact) -> tuple[float, tuple[int, ...]]:
    """The largest error of a result as a fraction of its rounding bound, and the element that has it.

    Parameters
    ----------
    computed : numpy.ndarray
        The result.
    exact : Exact
        What it was to be.

    Returns
    -------
    error : float
        The fraction.
    where : tuple of int
        The index of the element.

    Notes
    -----
    0 stands for an exact result, above 1 for a wrong one. An error where the bound is 0, and a NaN or infinity, count
    as infinite.

    Examples
    --------
    >>> exact = make_case((2,), 1, seed=0, bias=False).exact()["y"]
    >>> worst_error(np.asarray([-1.0]), exact), worst_error(np.asarray([-1.5]), exact)[0] > 1
    ((0.0, (0,)), True)
    """
    worst, where = 0.0, 0
    for i, part in enumerate(bounds.split(computed)):
        flat = part.ravel() if part.dtype.kind in "iu" else part.ravel().astype(np.float64)
        values = exact.stages[-1][i].ravel()
        if values.dtype == object:
            suspects: Any = range(flat.size)
        else:  # exact in float64, too; the first few errors tell enough
            suspects = np.flatnonzero(flat != values)[:1000].tolist()
        for j in suspects:
            got = flat[j].item()
            if not math.isfinite(got):
                return math.inf, _index(j, exact.shape)
            numerator, denominator = got.as_integer_ratio()
            error = abs((numerator << exact.scale) - int(values[j]) * denominator)
            if error:
                bound, unit = exact._bound(i, j)  # in integers: Fractions are slow
                try:
                    ratio = error * unit / (bound * denominator)
                except (OverflowError, ZeroDivisionError):  # beyond the floats, or where no error is allowed
                    ratio = math.inf
                if ratio > worst:
                    worst, where = ratio, j
    return worst, _index(where, exact.shape)


@lru_cache
def _weights(
    stages: int, k: int, terms: int, accumulator: str, rounded_to: str, cuts: bool, factors: str | None
) -> tuple[int, tuple[int, ...], int]:
    """The bound is linear: its constant, its weights of magnitude, bias and stages, and their common denominator.

    The denominator is 0 where the bound is infinite.
    """

    def at(*values: int) -> Any:
        magnitude, bias, *exactly = map(Fraction, values)
        how = (k, terms, accumulator, rounded_to)
        return bounds.rounding_bound(magnitude, exactly, *how, cuts=cuts, factors=factors, bias=bias)

    count = 2 + stages
    if at(1, *[0] * (count - 1)) == math.inf:
        return 1, (0,) * count, 0
    constant = at(*[0] * count)
    weights = [at(*(int(i == j) for j in range(count))) - constant for i in range(count)]
    denominator = math.lcm(*(f.denominator for f in (constant, *weights)))
    return int(constant * denominator), tuple(int(w * denominator) for w in weights), denominator


def _index(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(position, shape)) if math.prod(shape) else ()


def make_case(
    x_shape: tuple[int, ...],
    m: int,
    *,
    seed: int,
    values: str = "integers",
    dtypes: tuple[str, str, str, str] | str = "float32",
    layouts: tuple[str, str, str, str] | str = "C",
    bias: bool = True,
    n_batch_axes: int | None = None,
    summation: Summation | None = None,
) -> Case:
    """Make a case with random values.

    Parameters
    ----------
    x_shape : tuple of int
        The shape of x.
    m : int
        Output features.
    seed : int
        The values follow from it.
    values : {"integers", "units", "floats"}
        Integers from -2 to 2 (0 to 2 in unsigned dtypes, parts from -1 to 1 in complex ones), or -1 and 1 (0 and 1 in
        unsigned dtypes), on which all sums up to `largest_extent` terms are exact; or floats whose exponents vary,
        with zeros among them.
    dtypes, layouts : str or tuple of str
        For x, W, b and dy, or one for all.
    bias : bool
        Whether there is a b.
    n_batch_axes : int, optional
        As in `xaffine.affine`.
    summation : Summation, optional
        What the bounds assume of the implementation; by default `xaffine.testing.bounds.usual_summation` of the common
        dtype.

    Returns
    -------
    Case
        The same for the same arguments.

    Examples
    --------
    >>> case = make_case((2,), 1, seed=0, bias=False)
    >>> case.x.values.tolist(), case.W.values.tolist()
    ([2.0, 1.0], [[0.0], [-1.0]])
    >>> case
    make_case((2,), 1, seed=0, bias=False)
    """
    dtypes = (dtypes,) * 4 if isinstance(dtypes, str) else dtypes
    layouts = (layouts,) * 4 if isinstance(layouts, str) else layouts
    rng = np.random.default_rng(seed)
    k = bounds.count_batch_axes(x_shape, n_batch_axes)
    shapes = (x_shape, (math.prod(x_shape[k:]), m), (m,), (*x_shape[:k], m))
    # Exponents that keep every product, and its cast, inside the narrowest format.
    used = dtypes if bias else (dtypes[0], dtypes[1], dtypes[3])
    spread = min({"float16": 4, "float64": 60, "complex128": 60}.get(dtype, 20) for dtype in used)

    def operand(i: int) -> Operand:
        if values == "floats":
            array = _draw_floats(rng, shapes[i], dtypes[i], spread)
        else:
            array = _draw_integers(rng, shapes[i], dtypes[i], values)
        if layouts[i] == "broadcast":
            array = np.broadcast_to(array[:1], shapes[i])
        return Operand(array, dtypes[i], layouts[i])

    x, W, dy = operand(0), operand(1), operand(3)
    return Case(x, W, operand(2) if bias else None, dy, n_batch_axes, values, seed, summation)


def largest_extent(dtypes: Iterable[str], values: str = "integers") -> int:
    """The most terms of a sum that stays exact in the narrowest of some dtypes.

    With "integers" there is room for the steps up to 3 that checks take, with "units" for one bias.

    Parameters
    ----------
    dtypes : iterable of str
        Their names.
    values : {"integers", "units"}
        As in `make_case`.

    Returns
    -------
    int
        The largest N, n or m for which every result is exact.

    Examples
    --------
    >>> largest_extent(["float16"]), largest_extent(["float16"], "units")
    (227, 1023)
    """
    limit = min(map(bounds.exact_integers, dtypes))
    return (limit - 1) // 2 if values == "units" else (limit - 3) // 9  # a complex product has two terms


def _draw_integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, kind: str) -> np.ndarray:
    if dtype.startswith("complex"):
        # Parts up to 1: a complex product has two terms a part.
        parts = (-1, 1) if kind == "units" else (-1, 0, 1)
        return (rng.choice(parts, shape) + 1j * rng.choice(parts, shape)).astype(dtype)
    if dtype.startswith("uint"):
        values: tuple[int, ...] = (0, 1) if kind == "units" else (0, 1, 2)
    else:
        values = (-1, 1) if kind == "units" else (-2, -1, 0, 1, 2)
    return rng.choice(values, shape).astype(_numpy_dtype(dtype))


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


def _common_dtype(operands: Iterable[Operand]) -> str:
    names = {operand.dtype for operand in operands}
    if len(names) == 1:
        return names.pop()
    # NumPy lacks bfloat16; with any other dtype it promotes as float32 does.
    return np.result_type(*map(_numpy_dtype, names)).name


def _common_scale(operands: Iterable[Operand]) -> int:
    """The least scale ≥ 0 such that every value is an integer in units of 2**-scale."""
    parts = [part.astype(np.float64) for operand in operands for part in bounds.split(operand.values)]
    return max(53 - int(np.frexp(part[part != 0])[1].min(initial=53)) for part in parts)


def _integers(values: np.ndarray, scale: int | None) -> Parts:
    """Small integers as int64 if there is no scale, else floats in units of 2**-scale as Python integers."""
    if scale is None:
        return [part.astype(np.int64) for part in bounds.split(values)]
    integers = []
    for part in bounds.split(values):
        significands, exponents = np.frexp(part.astype(np.float64))
        whole = np.ldexp(significands, 53).astype(np.int64).astype(object)
        integers.append(whole * 2 ** np.where(significands == 0, 0, exponents - 53 + scale).astype(object))
    return integers
