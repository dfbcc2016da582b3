"""How to check an implementation: one object, for `check_affine`, `property_tests` and ``xaffine check``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xaffine.testing._timer import LONGEST
from xaffine.testing.checks import PROPERTIES

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from xaffine import backends
    from xaffine.testing.adapters import Adapter
    from xaffine.testing.bounds import Summation
    from xaffine.testing.checks import Property

__all__ = ["Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to check an implementation.

    Parameters
    ----------
    backend : str, optional
        The name of the backend whose arrays it takes, one of `xaffine.backends.names`; by default that of the adapter,
        or "numpy".
    adapter : str, optional
        What it is, out of those of `adapt`; by default what it looks like.
    device : optional
        One of the backend's devices, or its text; the default one if not given.
    dtype : str or sequence of str, optional
        The dtype of x, W, b and dy; of several, one for each case. By default float32 and float64, with factors in TF32
        float32 alone.
    mixed : bool
        Whether of several dtypes any that go together are drawn in one case.
    max_examples : int
        How many cases to draw for each property.
    large : int
        How many cases to draw besides for each property of the exact tier, with sizes at the edges of tiles and long
        axes.
    seed : int, optional
        The cases follow from it; by default a fresh one, which the report names.
    supports : collection of str, optional
        What the implementation does, out of `xaffine.testing.cases.FEATURES` and names of dtypes (with none, any
        dtype); it is tested also where it is refused. By default the attribute ``supports`` of what is checked, and
        without one each feature, layout and dtype is tried on a small case. What is missing or refused is reported as
        a gap and not tested.
    time_limit : float
        Seconds that one case may take. Needs the main thread and an operating system with interval timers; a call that
        never returns to Python is not interrupted (``xaffine check`` ends that, too).
    summation : Summation, optional
        What the bounds assume of the implementation; by default `xaffine.testing.bounds.usual_summation` of the dtype.
        With ``Summation(factors="tf32", cuts=True)`` the library is told to use TF32, too.
    properties : sequence of Property or str
        Which to check; of names, those of properties or of tiers.
    strict : bool
        Whether a property of the tier "manners" that does not hold is a failure, too.
    fail_fast : bool
        Whether to end at the first failure.

    Raises
    ------
    TypeError
        ``properties`` is a text.
    ValueError
        ``max_examples``, ``large`` or ``time_limit`` is out of range, or there is no property or tier of a name.

    Examples
    --------
    >>> from xaffine import AffineLayer
    >>> from xaffine.testing import Options, check_affine
    >>> quick = Options(max_examples=5, seed=0)
    >>> check_affine(AffineLayer, quick, dtype="float64").dtypes
    ('float64',)
    """

    backend: backends.Name | str | None = None
    adapter: Adapter | None = None
    device: Any = None
    dtype: str | Sequence[str] | None = None
    mixed: bool = False
    max_examples: int = 100
    large: int = 0
    seed: int | None = None
    supports: Collection[str] | None = None
    time_limit: float = 60.0
    summation: Summation | None = None
    properties: Sequence[Property | str] = PROPERTIES
    strict: bool = False
    fail_fast: bool = False

    def __post_init__(self) -> None:
        if self.max_examples < 1 or self.large < 0 or not 0 < self.time_limit <= LONGEST:
            msg = (
                f"max_examples must be at least 1, large at least 0, and time_limit above 0 and at most {LONGEST:g} s; "
                f"they are {self.max_examples}, {self.large} and {self.time_limit}"
            )
            raise ValueError(msg)
        if isinstance(self.properties, str):
            msg = f"properties is a sequence of properties or names, such as [{self.properties!r}], and came as a text"
            raise TypeError(msg)
        known = dict.fromkeys([*(prop.tier for prop in PROPERTIES), *(prop.name for prop in PROPERTIES)])
        if unknown := [name for name in self.properties if isinstance(name, str) and name not in known]:
            msg = f"no property and no tier is called {' or '.join(map(repr, unknown))}; there are {', '.join(known)}"
            raise ValueError(msg)

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """The dtypes to check, as they were given or by default."""
        if self.dtype is None:
            return ("float32",) if self.tf32 else ("float32", "float64")
        return tuple(self.dtype) if isinstance(self.dtype, list | tuple) else (self.dtype,)

    @property
    def tf32(self) -> bool:
        """Whether the library may round factors to TF32."""
        return self.summation is not None and self.summation.factors == "tf32"

    @property
    def chosen(self) -> list[Property]:
        """The properties to check."""
        own = [prop for prop in self.properties if not isinstance(prop, str)]
        return own + [prop for prop in PROPERTIES if {prop.name, prop.tier} & set(self.properties)]
