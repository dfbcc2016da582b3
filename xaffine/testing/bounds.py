"""A-priori rounding bounds for y, dx, dW and db.

The model of floating-point arithmetic is the standard one with underflow, ::

    fl(a ∘ b) = (a ∘ b)(1 + δ) + η,    |δ| ≤ u,    |η| ≤ ν,

where u is the unit roundoff and ν the smallest normal number, which covers gradual underflow and flushing to
zero alike. A sum of t products in which no term takes part in more than k roundings then satisfies ::

    |fl(Σ a_i b_i) − Σ a_i b_i| ≤ γ_k Σ |a_i||b_i| + 2 t ν (1 + γ_k),    γ_k = k u / (1 − k u):

each of its t products and fewer than t additions may leave an η, which at most k later roundings then enlarge.
Where the factors of the products are first rounded to a narrower format, of unit roundoff u', each product has two
more factors 1 + δ', and (1 + γ_k)(1 + u')² − 1 takes the place of γ_k, but for the bias; factors must then be zero or
normal numbers. Arithmetic that cuts off instead of rounding to nearest has twice the unit roundoff.

How large k is, and in which format u is taken, depends on how the sum is added up: see `Summation`.
`affine_bounds` applies this to the four results of an affine layer, `rounding_bound` to one element.

References
----------
N. J. Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., SIAM 2002: the model (2.4), with underflow
(2.8); γ_k in lemma 3.1; inner products in any order and in blocks in section 3.1; matrix products, componentwise,
(3.13) in section 3.5; complex products in section 3.6.

P. Blanchard, N. J. Higham, F. Lopez, T. Mary, S. Pranesh, "Mixed precision block fused multiply-add: error analysis
and application to GPU tensor cores", SIAM J. Sci. Comput. 42 (2020): rounded factors and cut sums.

M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Comput. Sci. 7
(2021): what matrix units cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence  # noqa: TC003 - a field of a NamedTuple
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np

__all__ = [
    "Bounds", "Summation", "affine_bounds", "exact_integers", "gamma", "rounding_bound", "smallest_normal",
    "unit_roundoff", "usual_summation",
]  # fmt: skip

# Significand bits p and exponent of the smallest normal number, IEEE 754-2019 table 3.5 and bfloat16.
_FORMATS = {
    "bfloat16": (8, -126),
    "float16": (11, -14),
    "float32": (24, -126),
    "float64": (53, -1022),
    "complex64": (24, -126),
    "complex128": (53, -1022),
}
# Formats of factors alone: no array has them.
_NARROW = {"tf32": Fraction(1, 2**11)}
_NARROWED = ("float32", "complex64")  # the dtypes whose factors are

Number: TypeAlias = Any
"""A Fraction, a float (infinity), or an array of floats."""


def unit_roundoff(dtype: str) -> Fraction:
    """The unit roundoff u of a dtype (of its real and imaginary parts): 2⁻ᵖ with p significand bits; 0 for integers.

    Parameters
    ----------
    dtype : str
        The name of a dtype of numbers.

    Returns
    -------
    Fraction
        The most that rounding to nearest changes a normal number, relative to it.

    Raises
    ------
    ValueError
        It is no dtype of numbers.

    Examples
    --------
    >>> unit_roundoff("float16")
    Fraction(1, 2048)
    """
    return Fraction(1, 2 ** _FORMATS[dtype][0]) if _known(dtype) in _FORMATS else Fraction(0)


def smallest_normal(dtype: str) -> Fraction:
    """The smallest positive normal number of a dtype; 0 for integers.

    Parameters
    ----------
    dtype : str
        The name of a dtype of numbers.

    Returns
    -------
    Fraction
        The ν of the model.

    Raises
    ------
    ValueError
        It is no dtype of numbers.

    Examples
    --------
    >>> smallest_normal("float16")
    Fraction(1, 16384)
    """
    return Fraction(2) ** _FORMATS[dtype][1] if _known(dtype) in _FORMATS else Fraction(0)


def exact_integers(dtype: str) -> int:
    """The largest k such that all integers 0 to k are values of the dtype.

    Parameters
    ----------
    dtype : str
        The name of a dtype of numbers.

    Returns
    -------
    int
        Sums of integers up to it are exact in any order.

    Examples
    --------
    >>> exact_integers("float16"), exact_integers("int8")
    (2048, 127)
    """
    if dtype in _FORMATS:
        return int(2 ** _FORMATS[dtype][0])
    return int(np.iinfo(dtype).max)


def is_dtype(name: str) -> bool:
    """Whether a name is that of a dtype of numbers.

    >>> is_dtype("bfloat16"), is_dtype("uint8"), is_dtype("float8")
    (True, True, False)
    """
    return name in _FORMATS or name in {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def _known(dtype: str) -> str:
    if not is_dtype(dtype):
        msg = f"{dtype!r} is no dtype of numbers; those with a rounding are {', '.join(_FORMATS)}"
        raise ValueError(msg)
    return dtype


def gamma(k: int, u: Fraction) -> Fraction | float:
    """γ_k = k u / (1 − k u), infinite where k u ≥ 1: there the model promises nothing.

    Parameters
    ----------
    k : int
        How many roundings.
    u : Fraction
        The unit roundoff.

    Returns
    -------
    Fraction or float
        A float where it is infinite.

    Examples
    --------
    >>> gamma(2, Fraction(1, 10))
    Fraction(1, 4)
    >>> gamma(10, Fraction(1, 10))
    inf
    """
    return k * u / (1 - k * u) if k * u < 1 else math.inf


@dataclass(frozen=True)
class Summation:
    """How a sum of products is added up: what a bound assumes of an implementation.

    Parameters
    ----------
    accumulator : str, optional
        The dtype of the products and the partial sums. A sum that is kept in another dtype than the result's is
        rounded once to that of the result (and y once more, when the bias is added). By default that of the result.
    block : int, optional
        The sum is cut into blocks of at most so many real terms (a complex product has two in each part); terms are
        added within their block and then the sums of the blocks, both in any order. By default the whole sum is added
        up in any order.
    cuts : bool
        Sums are cut off instead of rounded to nearest, as matrix units do: twice the unit roundoff.
    factors : {"tf32"}, optional
        The narrower format that the factors of float32 products are first rounded to. By default they are not.

    Raises
    ------
    ValueError
        The accumulator is no dtype, there is no such format of factors, or a block is below 1.

    Examples
    --------
    >>> Summation().roundings(1000), Summation(block=32).roundings(1000)
    (1000, 63)
    """

    accumulator: str | None = None
    block: int | None = None
    cuts: bool = False
    factors: str | None = None

    def __post_init__(self) -> None:
        if self.accumulator is not None:
            _known(self.accumulator)
        if self.factors is not None and self.factors not in _NARROW:
            msg = f"{self.factors!r} is no format of factors; there is {', '.join(map(repr, _NARROW))}"
            raise ValueError(msg)
        if self.block is not None and self.block < 1:
            msg = f"a block holds at least one term, not {self.block}"
            raise ValueError(msg)

    def roundings(self, terms: int) -> int:
        """The most roundings that a term of a sum of so many products takes part in, that of its product included.

        Parameters
        ----------
        terms : int
            How many products the sum has.

        Returns
        -------
        int
            The k of γ_k.

        Examples
        --------
        >>> Summation().roundings(64), Summation(block=8).roundings(64)
        (64, 15)
        """
        if self.block is None or terms <= self.block:
            return terms
        return self.block + math.ceil(terms / self.block) - 1

    def of(self, name: str, dtype: str) -> Summation:
        """What it says of one result, computed in a dtype: db has no factors, and where others have, it is not cut.

        Parameters
        ----------
        name : {"y", "dx", "dW", "db"}
            The result.
        dtype : str
            What it is computed in.

        Returns
        -------
        Summation
            Itself, or one without such a format.

        Examples
        --------
        >>> tf32 = Summation(factors="tf32", cuts=True)
        >>> tf32.of("y", "float32").factors, tf32.of("db", "float32").factors
        ('tf32', None)
        """
        if self.factors is None or (name != "db" and dtype in _NARROWED):
            return self
        return replace(self, factors=None, cuts=self.cuts and name != "db")


def usual_summation(dtype: str) -> Summation:
    """What is asked of an implementation by default: any order, and float32 accumulators for half precision.

    Matrix units, which cut off, and BLAS libraries add products of halves in float32; in half precision itself, a sum
    over a batch of 4096 rows loses half of its terms.

    Parameters
    ----------
    dtype : str
        The name of a dtype of numbers.

    Returns
    -------
    Summation
        With the accumulator None where sums are kept in the dtype itself.

    Examples
    --------
    >>> usual_summation("bfloat16").accumulator, usual_summation("float64").accumulator
    ('float32', None)
    """
    return Summation("float32", cuts=True) if dtype in ("float16", "bfloat16") else Summation()


def rounding_bound(
    magnitude: Number,
    stages: Sequence[Number],
    k: int,
    terms: int,
    accumulator: str,
    rounded_to: str,
    *,
    cuts: bool = False,
    factors: str | None = None,
    bias: Number = 0,
) -> Number:
    """Bound the error of a result that is a sum of products.

    Parameters
    ----------
    magnitude : Fraction or array
        The sum of the absolute values of the products.
    stages : sequence of Fraction or array
        The exact values that are rounded to `rounded_to`, one after the other, where that is not `accumulator`: the
        sum, and y after the sum x W.
    k : int
        The most roundings that any term takes part in, as from `Summation.roundings`.
    terms : int
        How many products the sum has, and one for the bias.
    accumulator : str
        The dtype of the products and sums.
    rounded_to : str
        The dtype of the result.
    cuts, factors
        As in `Summation`.
    bias : Fraction or array
        What in `magnitude` is no product: the absolute value of b.

    Returns
    -------
    Fraction, float (infinity) or array
        The largest error that the model of this module allows; exact on Fractions.

    Examples
    --------
    >>> bound = rounding_bound(Fraction(5), [Fraction(3)], 2, 2, "float32", "float32")
    >>> round(float(bound / unit_roundoff("float32")), 3)  # 2 roundings of at most 5
    10.0
    """
    number: Any = float if isinstance(magnitude, np.ndarray) else Fraction
    times = 2 if cuts else 1
    factor = gamma(k, times * unit_roundoff(accumulator))
    underflow = number(2 * terms * smallest_normal(accumulator))
    factor = number(factor) if factor < math.inf else factor
    error = factor * magnitude + underflow * (1 + factor)
    if factors is not None and k:  # else there is no product
        narrow = number((1 + times * _NARROW[factors]) ** 2 - 1)
        error = error + narrow * (1 + factor) * (magnitude - bias)
    if rounded_to != accumulator:
        u, nu = number(unit_roundoff(rounded_to)), number(smallest_normal(rounded_to))
        for stage in stages:
            error = error + u * (abs(stage) + error) + nu
    return error


class Bounds(NamedTuple):
    """Upper bounds of the absolute errors of the results, element by element; None where there is no such result.

    Attributes
    ----------
    y, dx, dW, db : numpy.ndarray or None
        In float64 and the shape of the result. Complex results have complex bounds: the real part bounds the error of
        the real part, the imaginary part that of the imaginary part.

    Examples
    --------
    >>> bounds = affine_bounds(np.ones((2, 3), "float32"), np.ones((3, 4), "float32"), dtype="float32")
    >>> bounds.y.shape, bounds.dx
    ((2, 4), None)
    """

    y: np.ndarray
    dx: np.ndarray | None = None
    dW: np.ndarray | None = None
    db: np.ndarray | None = None


def affine_bounds(
    x: np.ndarray,
    W: np.ndarray,
    b: np.ndarray | None = None,
    dy: np.ndarray | None = None,
    *,
    dtype: str,
    n_batch_axes: int | None = None,
    summation: Summation | None = None,
) -> Bounds:
    """Bound the rounding errors of y = x W + b, dx = dy Wᵀ, dW = xᵀ dy and db = Σ dy.

    Componentwise, with k the `Summation.roundings` of the terms (n and one for the bias, m, N, and N less the product
    that db does not have), ::

        |ŷ − y| ≤ γ_k (|x||W| + |b|),    |d̂x − dx| ≤ γ_k |dy||W|ᵀ,
        |d̂W − dW| ≤ γ_k |x|ᵀ|dy|,         |d̂b − db| ≤ γ_k Σ |dy|,

    each with the term for underflow, and with the rounding to the result's dtype where sums are kept in another one.
    A complex product has two real products in each part, so there n, m and N count twice.

    Parameters
    ----------
    x, W, b, dy, n_batch_axes
        As in `xaffine.affine_backward`, as NumPy arrays of values of `dtype`. Without `dy`, only y is bounded.
    dtype : str
        The dtype that the layer computes in, such as ``"bfloat16"``: that of x, W, b and dy in the implementation.
    summation : Summation, optional
        How the implementation adds up; by default `usual_summation` of the dtype.

    Returns
    -------
    Bounds
        Rounded up: the roundings of their own computation in float64 are added in.

    Raises
    ------
    ValueError
        The shapes do not go together, or `dtype` is no dtype of numbers.

    Examples
    --------
    >>> x, W = np.ones((2, 3)), np.ones((3, 4))
    >>> bound = affine_bounds(x, W, dtype="float32").y
    >>> bound.shape, round(float(bound[0, 0] / unit_roundoff("float32")), 3)  # three roundings of at most 3
    ((2, 4), 9.0)
    """
    k = count_batch_axes(x.shape, n_batch_axes)
    batch, (n, m) = x.shape[:k], W.shape
    N = math.prod(batch)
    shapes = {"y": (*batch, m), "dx": x.shape, "dW": W.shape, "db": W.shape[1:]}
    fits = math.prod(x.shape[k:]) == n and (b is None or b.shape == (m,))
    if not fits or (dy is not None and dy.shape != shapes["y"]):
        got = ", ".join(str(None if array is None else array.shape) for array in (x, W, b, dy))
        msg = f"x, W, b and dy must have the shapes batch + features, (n, m), (m,) and batch + (m,); got {got}"
        raise ValueError(msg)
    summation = usual_summation(_known(dtype)) if summation is None else summation
    dy = None if dy is None else dy.reshape(N, m)
    sums = sums_of_products(_parts(x.reshape(N, n)), _parts(W), _parts(b), _parts(dy), summation)
    return Bounds(**{name: _round_up(sums[name], dtype, summation.of(name, dtype), shapes[name]) for name in sums})


def _round_up(sums: Sums, dtype: str, summation: Summation, shape: tuple[int, ...]) -> np.ndarray:
    """Bound sums that float64 has computed with errors of its own: relative ones of `own`, and underflow."""
    operations = sums.terms + 16  # those of a sum in any order, and a dozen in the formula
    own, tiny = operations * 2.0**-52, operations * 2.0**-1022
    accumulator = summation.accumulator or dtype
    parts = []
    for i, (magnitude, bias) in enumerate(zip(sums.magnitude, sums.bias, strict=True)):
        size = magnitude * (1 + own) + tiny
        stages = [abs(stage[i]) + own * size for stage in sums.stages]
        how: Any = {"cuts": summation.cuts, "factors": summation.factors, "bias": bias * (1 - own)}
        bound = rounding_bound(size, stages, sums.k, sums.terms, accumulator, dtype, **how)
        parts.append(bound * (1 + own))
    return joined(parts).reshape(shape)


def count_batch_axes(x_shape: tuple[int, ...], n_batch_axes: int | None) -> int:
    """The k of ``x.shape[:k]``, which is the batch."""
    return min(1, len(x_shape) - 1) if n_batch_axes is None else n_batch_axes


Parts: TypeAlias = list[np.ndarray]
"""A matrix or vector as its real part alone, or as real and imaginary part; of floats or of exact integers."""


def split(array: np.ndarray) -> Parts:
    """An array as `Parts`."""
    return [array.real, array.imag] if np.iscomplexobj(array) else [array]


def joined(parts: Parts) -> np.ndarray:
    """The real or complex array that has some parts."""
    return parts[0] if len(parts) == 1 else parts[0] + 1j * parts[1]


class Sums(NamedTuple):
    """The sums that one result consists of.

    Attributes
    ----------
    stages : list of Parts
        The value, after the value without the bias where there is one.
    magnitude : Parts
        The same sums with every term positive.
    bias : Parts
        What in them is no product.
    k : int
        The most roundings that any term takes part in.
    terms : int
        How many terms there are.
    """

    stages: list[Parts]
    magnitude: Parts
    bias: Parts
    k: int
    terms: int


def sums_of_products(x: Parts, W: Parts, b: Parts | None, dy: Parts | None, summation: Summation) -> dict[str, Sums]:
    """The sums in y and, with dy, in dx, dW and (with b) db: operands are matrices, b has the scale of products."""

    def products(left: Parts, right: Parts, bias: Parts | None = None) -> Sums:
        terms = len(left) * left[0].shape[1]
        stages, k = [_product(left, right)], summation.roundings(terms)
        size = _product([abs(part) for part in left], [abs(part) for part in right], sign=1)
        offsets = [0 * part for part in size]
        if bias is not None:
            stages.append([part + offset for part, offset in zip(stages[0], bias, strict=True)])
            offsets = [part + abs(offset) for part, offset in zip(offsets, bias, strict=True)]
            size = [part + offset for part, offset in zip(size, offsets, strict=True)]
            k += terms > 0  # without any product, y is b as it is
            terms += 1
        return Sums(stages, size, offsets, k, terms)

    sums = {"y": products(x, W, b)}
    if dy is not None:
        sums |= {"dx": products(dy, [part.T for part in W]), "dW": products([part.T for part in x], dy)}
    if dy is not None and b is not None:
        N, total, size = len(dy[0]), [part.sum(0) for part in dy], [abs(part).sum(0) for part in dy]
        sums["db"] = Sums([total], size, size, max(summation.roundings(N) - 1, 0), N)  # one less: there are no products
    return sums


def _parts(array: np.ndarray | None) -> Any:
    return None if array is None else [part.astype(np.float64) for part in split(array)]


def _product(a: Parts, b: Parts, *, sign: int = -1) -> Parts:
    """a b; with the sign 1, of absolute values, the largest that the parts of a b can be."""
    if len(a) == 1:
        return [a[0] @ b[0]]
    return [a[0] @ b[0] + sign * (a[1] @ b[1]), a[0] @ b[1] + a[1] @ b[0]]
