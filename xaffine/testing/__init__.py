"""The proof that an affine layer is right, for this one and for anyone's.

Five tiers, each a set of properties in `xaffine.testing.checks.PROPERTIES`:

1. *Exact*: on small integer values every sum is exact in any order, so results are compared with ``==``.
2. *Bounded*: on random floats the error stays within the a-priori rounding bound of `bounds`.
3. *Calculus*: adjoint identity, linearity, additivity over the batch, equivariance.
4. *Contract*: shapes, dtypes, devices, fresh results, untouched inputs.
5. *Manners*: rejected calls change nothing. Without them an implementation has right numbers.

`check_affine` puts an implementation through all of them, `property_tests` makes a pytest test of each, and
``xaffine check`` does so from the shell. They draw their cases with Hypothesis (extra ``testing``); the rest needs
NumPy alone.
"""

from xaffine.testing import bounds, cases, checks
from xaffine.testing.adapters import adapt, from_functions
from xaffine.testing.bounds import Summation
from xaffine.testing.cases import Case, Operand, make_case
from xaffine.testing.checks import PROPERTIES, Property
from xaffine.testing.options import Options
from xaffine.testing.report import PropertyError, Report, Result
from xaffine.testing.runner import check_affine, property_tests

__all__ = [
    "PROPERTIES", "Case", "Operand", "Options", "Property", "PropertyError", "Report", "Result", "Summation", "adapt",
    "bounds", "cases", "check_affine", "checks", "from_functions", "make_case", "property_tests",
]  # fmt: skip
