"""A-priori rounding bounds, as exact rational numbers.

The model of floating-point arithmetic is the standard one with underflow,

    fl(a ∘ b) = (a ∘ b)(1 + δ) + η,    |δ| ≤ u,    |η| ≤ ν,

where u is the unit roundoff and ν the smallest normal number, which covers gradual underflow and flushing to
zero alike. A sum of products in which no term takes part in more than k roundings then satisfies, in whatever
order it is added up,

    |fl(Σ a_i b_i) − Σ a_i b_i| ≤ γ_k Σ |a_i||b_i| + underflow,    γ_k = k u / (1 − k u).

References
----------
N. J. Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., SIAM 2002: the model (2.4) and (2.8),
γ_k in lemma 3.1, inner products in section 3.1.
"""

from __future__ import annotations

import math
from fractions import Fraction

__all__ = ["exact_integers", "gamma", "rounding_bound", "smallest_normal", "unit_roundoff"]

# Significand bits p and exponent of the smallest normal number, IEEE 754-2019 table 3.5 and bfloat16.
_FORMATS = {
    "bfloat16": (8, -126),
    "float16": (11, -14),
    "float32": (24, -126),
    "float64": (53, -1022),
    "complex64": (24, -126),
    "complex128": (53, -1022),
}


def unit_roundoff(dtype: str) -> Fraction:
    """The unit roundoff u of a dtype (of its real and imaginary parts): 2⁻ᵖ with p significand bits; 0 for integers.

    >>> unit_roundoff("float16")
    Fraction(1, 2048)
    """
    return Fraction(1, 2 ** _FORMATS[dtype][0]) if dtype in _FORMATS else Fraction(0)


def smallest_normal(dtype: str) -> Fraction:
    """The smallest positive normal number of a dtype; 0 for integers.

    >>> smallest_normal("float16")
    Fraction(1, 16384)
    """
    return Fraction(2) ** _FORMATS[dtype][1] if dtype in _FORMATS else Fraction(0)


def exact_integers(dtype: str) -> int:
    """The largest k such that all integers 0 to k are values of the dtype.

    >>> exact_integers("float16"), exact_integers("int8")
    (2048, 127)
    """
    if dtype in _FORMATS:
        return int(2 ** _FORMATS[dtype][0])
    bits = int(dtype.lstrip("uint"))
    return int(2 ** (bits if dtype.startswith("u") else bits - 1)) - 1


def gamma(k: int, u: Fraction) -> Fraction | float:
    """γ_k = k u / (1 − k u), infinite where k u ≥ 1: there the model promises nothing.

    >>> gamma(2, Fraction(1, 10))
    Fraction(1, 4)
    >>> gamma(10, Fraction(1, 10))
    inf
    """
    return k * u / (1 - k * u) if k * u < 1 else math.inf


def rounding_bound(exact: Fraction, magnitude: Fraction, k: int, computed_in: str, rounded_to: str) -> Fraction | float:
    """Bound the error of one element that is a sum of products.

    Parameters
    ----------
    exact : Fraction
        The value Σ a_i b_i without any error.
    magnitude : Fraction
        Σ |a_i||b_i|.
    k : int
        The most roundings that any term takes part in.
    computed_in : str
        The dtype of the products and sums.
    rounded_to : str
        The dtype that the sum is cast to in the end; the same one for no cast.

    Returns
    -------
    Fraction or inf
        The largest |computed − exact| that the standard model allows.

    Examples
    --------
    >>> bound = rounding_bound(Fraction(3), Fraction(5), 2, "float32", "float32")
    >>> round(float(bound / unit_roundoff("float32")), 3)  # 2 roundings of at most 5
    10.0
    """
    # Each term meets k operations at most, and so does what underflow left in an operation before.
    error = gamma(k, unit_roundoff(computed_in)) * magnitude + 2 * k * smallest_normal(computed_in)
    if rounded_to == computed_in:
        return error
    return error + unit_roundoff(rounded_to) * (abs(exact) + error) + smallest_normal(rounded_to)
