"""Initial weights by the schemes of the field, the same to the last bit on every array library.

Values are drawn by NumPy in float64, rounded to the dtype, and then handed to the library: one seed gives one W
everywhere. In each formula n is the number of input features ("fan in") and m that of output features ("fan out").
Every scheme is called as ``scheme(rng, n, m)`` with a ``numpy.random.Generator`` and returns a float64 array (n, m).

>>> draw("lecun_normal", 4, 3, seed=0).shape
(4, 3)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = [
    "SCHEMES", "draw", "kaiming_normal", "kaiming_uniform", "lecun_normal", "lecun_uniform", "xavier_normal",
    "xavier_uniform", "zeros",
]  # fmt: skip


def kaiming_uniform(rng: np.random.Generator, n: int, m: int) -> NDArray[np.float64]:
    """Uniform in ±√(6 / n), a variance of 2 / n: keeps the variance from layer to layer under ReLU.

    Also called "he_uniform".

    K. He, X. Zhang, S. Ren, J. Sun, "Delving deep into rectifiers", ICCV 2015, (10). torch's ``nn.Linear`` draws from
    ±√(1 / n) instead, `lecun_uniform` divided by √3.

    Examples
    --------
    >>> W = kaiming_uniform(np.random.default_rng(0), 6, 100)
    >>> W.shape, bool(abs(W).max() <= 1)  # √(6 / 6)
    ((6, 100), True)
    """
    return _uniform(rng, n, m, 2 / n)


def kaiming_normal(rng: np.random.Generator, n: int, m: int) -> NDArray[np.float64]:
    """Normal with variance 2 / n: keeps the variance from layer to layer under ReLU.

    Also called "he_normal" and "he".

    K. He, X. Zhang, S. Ren, J. Sun, "Delving deep into rectifiers", ICCV 2015, (10).

    Examples
    --------
    >>> kaiming_normal(np.random.default_rng(0), 3, 2).shape
    (3, 2)
    """
    return _normal(rng, n, m, 2 / n)


def xavier_uniform(rng: np.random.Generator, n: int, m: int) -> NDArray[np.float64]:
    """Uniform in ±√(6 / (n + m)), a variance of 2 / (n + m): between those that keep y and dx.

    Also called "glorot_uniform" and "glorot".

    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010,
    (16).

    Examples
    --------
    >>> W = xavier_uniform(np.random.default_rng(0), 50, 4)
    >>> W.shape, bool(abs(W).max() <= (6 / 54) ** 0.5)
    ((50, 4), True)
    """
    return _uniform(rng, n, m, 2 / (n + m))


def xavier_normal(rng: np.random.Generator, n: int, m: int) -> NDArray[np.float64]:
    """Normal with variance 2 / (n + m): between those that keep y and dx.

    Also called "glorot_normal".

    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010,
    (12).

    Examples
    --------
    >>> xavier_normal(np.random.default_rng(0), 3, 2).shape
    (3, 2)
    """
    return _normal(rng, n, m, 2 / (n + m))


def lecun_uniform(rng: np.random.Generator, n: int, m: int) -> NDArray[np.float64]:
    """Uniform in ±√(3 / n), a variance of 1 / n: keeps the variance of y for a linear layer.

    Y. LeCun, L. Bottou, G. B. Orr, K.-R. Müller, "Efficient backprop", 1998, (16).

    Examples
    --------
    >>> W = lecun_uniform(np.random.default_rng(0), 3, 100)
    >>> W.shape, bool(abs(W).max() <= 1)  # √(3 / 3)
    ((3, 100), True)
    """
    return _uniform(rng, n, m, 1 / n)


def lecun_normal(rng: np.random.Generator, n: int, m: int) -> NDArray[np.float64]:
    """Normal with variance 1 / n: keeps the variance of y for a linear layer.

    Y. LeCun, L. Bottou, G. B. Orr, K.-R. Müller, "Efficient backprop", 1998, (16).

    Examples
    --------
    >>> lecun_normal(np.random.default_rng(0), 3, 2).shape
    (3, 2)
    """
    return _normal(rng, n, m, 1 / n)


def zeros(_: np.random.Generator, n: int, m: int) -> NDArray[np.float64]:
    """Zeros: y = b. For the last layer of a residual branch, say; two layers of zeros in a row do not learn.

    H. Zhang, Y. N. Dauphin, T. Ma, "Fixup initialization", ICLR 2019.

    Examples
    --------
    >>> zeros(np.random.default_rng(0), 1, 2).tolist()
    [[0.0, 0.0]]
    """
    return np.zeros((n, m))


def _uniform(rng: np.random.Generator, n: int, m: int, variance: float) -> NDArray[np.float64]:
    return math.sqrt(3 * variance) * rng.uniform(-1, 1, (n, m))


def _normal(rng: np.random.Generator, n: int, m: int, variance: float) -> NDArray[np.float64]:
    return math.sqrt(variance) * rng.standard_normal((n, m))


Scheme: TypeAlias = Literal[
    "kaiming_uniform", "kaiming_normal", "he_uniform", "he_normal", "he", "xavier_uniform", "xavier_normal",
    "glorot_uniform", "glorot_normal", "glorot", "lecun_uniform", "lecun_normal", "zeros",
]  # fmt: skip
"""The name of a scheme."""

SCHEMES: dict[Scheme, Callable[[np.random.Generator, int, int], NDArray[np.float64]]] = {
    "kaiming_uniform": kaiming_uniform, "kaiming_normal": kaiming_normal,
    "he_uniform": kaiming_uniform, "he_normal": kaiming_normal, "he": kaiming_normal,
    "xavier_uniform": xavier_uniform, "xavier_normal": xavier_normal,
    "glorot_uniform": xavier_uniform, "glorot_normal": xavier_normal, "glorot": xavier_uniform,
    "lecun_uniform": lecun_uniform, "lecun_normal": lecun_normal, "zeros": zeros,
}  # fmt: skip
"""The schemes by name."""


# fmt: off
@overload
def draw(scheme: Scheme, n: int, m: int, *, seed: int | None,
         complex_: Literal[False] = False) -> NDArray[np.float64]: ...
@overload
def draw(scheme: Scheme, n: int, m: int, *, seed: int | None, complex_: bool) -> NDArray[Any]: ...
# fmt: on
def draw(scheme: Scheme, n: int, m: int, *, seed: int | None, complex_: bool = False) -> NDArray[Any]:
    """Draw W.

    Parameters
    ----------
    scheme : str
        One of `SCHEMES`.
    n, m : int
        Input and output features, 0 or more.
    seed : int or None
        The values follow from it; fresh ones for None.
    complex_ : bool
        Whether to draw a real and an imaginary part, each with half the variance.

    Returns
    -------
    numpy.ndarray, shape (n, m), float64 or complex128
        To be rounded to the dtype of the layer.

    Raises
    ------
    TypeError
        n or m is no integer.
    ValueError
        There is no such scheme, or n or m is negative.

    Examples
    --------
    >>> float(abs(draw("xavier_uniform", 2, 1, seed=0)).max()) <= 2 ** 0.5
    True
    """
    if scheme not in SCHEMES:
        msg = f"no scheme is called {scheme!r}; the schemes are {', '.join(SCHEMES)}"
        raise ValueError(msg)
    for name, extent in (("n", n), ("m", m)):
        if not isinstance(extent, int | np.integer) or isinstance(extent, bool):
            msg = f"{name} must be an integer, not {extent!r}"
            raise TypeError(msg)
        if extent < 0:
            msg = f"{name} must be 0 or more, not {extent}"
            raise ValueError(msg)
    if n == 0 or m == 0:
        return np.zeros((n, m), complex if complex_ else float)
    rng = np.random.default_rng(seed)
    parts = [SCHEMES[scheme](rng, n, m) for _ in range(1 + complex_)]
    return (parts[0] + 1j * parts[1]) / math.sqrt(2) if complex_ else parts[0]
