"""What is wrong, in words, where a wrong result is one that a known mistake computes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xaffine.testing._subject import TamperedError
from xaffine.testing._trial import Trial, in_numpy
from xaffine.testing.cases import Operand, make_case, worst_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xaffine.testing._subject import Subject
    from xaffine.testing.cases import Case

__all__ = ["diagnose"]

_NARROW = {"TF32 (11 significant bits)": 11, "bfloat16 (8 significant bits)": 8}


def diagnose(subject: Subject, case: Case, seconds: float) -> str | None:
    """Name the mistake that an implementation makes on a case, or None where none is known, within so many seconds.

    It is looked for on another case first, of random integers and a square W, where no two mistakes come to the same;
    then on the case itself, unless it is so small that they may.
    """
    layouts: Any = tuple(operand.layout for operand in (case.x, case.W, case.b or case.x, case.dy))
    telling = {"": _telling(case, ("C",) * 4), "in another memory layout than C, ": _telling(case, layouts)}
    large_enough = case.kind == "floats" or min(case.N, *case.W.values.shape) > 2
    for where, each in (telling | ({" ": case} if large_enough else {})).items():
        try:
            with subject.limit(seconds):
                trial = Trial(subject, each)
                first, again = (in_numpy(trial.results()) for _ in range(2))
        except (KeyboardInterrupt, TamperedError):  # the first is the user's
            raise
        except BaseException:  # noqa: S112 - its message says what is wrong
            continue
        if any(
            array.shape != each.owed[name][0] or np.iscomplexobj(array) != each.owed[name][1].startswith("complex")
            for name, array in first.items()
        ):
            return None  # likewise
        causes = dict.fromkeys(_causes(each, first, again))
        if causes:  # else the mistake does not show on this case
            named = "; ".join(filter(None, causes))
            return f"{where.lstrip()}{named}" if named else None
    return None


def _telling(case: Case, layouts: Any) -> Case:
    """Five samples, features and outputs, in the form and dtypes of a case, without a zero in a signed b."""
    batch_axes, ndim = len(case.batch), case.x.values.ndim
    batch = (5, *(1,) * (batch_axes - 1)) if batch_axes else ()
    shape = batch + (5,) * (ndim > batch_axes) + (1,) * (ndim - batch_axes - 1)
    dtypes: Any = tuple(operand.dtype for operand in (case.x, case.W, case.b or case.W, case.dy))
    more: Any = {"dtypes": dtypes, "layouts": layouts, "bias": case.b is not None, "n_batch_axes": case.n_batch_axes}
    return make_case(shape, 5, seed=655, **more)


def _causes(case: Case, first: dict[str, np.ndarray], again: dict[str, np.ndarray]) -> Iterator[str | None]:
    """A cause for each wrong result, or None where none is known."""
    if case.kind == "floats":
        yield from _precision(case, first)
        return
    x, W, b, dy = _flat(case)
    right = {"y": x @ W + b, "dx": dy @ W.T, "dW": x.T @ dy, "db": dy.sum(0)}
    for name, array in first.items():
        got = array.reshape(right[name].shape)
        if not np.array_equal(got, right[name]):
            yield next(_mistakes(name, got, right[name], x, W, b, dy), None)
        elif name != "y" and np.array_equal(again[name].reshape(got.shape), 2 * got) and got.any():
            yield "gradients add up over calls: after a second one they are twice what they should be"


def _flat(case: Case) -> tuple[Any, ...]:
    """x (N, n), W, b and dy (N, m), in arithmetic that is exact."""
    (n, m), wide = case.W.values.shape, complex if case.x.dtype.startswith("complex") else np.int64
    shapes = {"x": (case.N, n), "W": (n, m), "b": (m,), "dy": (case.N, m)}
    flat = {name: operand.values.reshape(shapes[name]).astype(wide) for name, operand in case.operands.items()}
    return flat["x"], flat["W"], flat.get("b", np.zeros(m, int)), flat["dy"]


def _mistakes(name: str, got: Any, right: Any, x: Any, W: Any, b: Any, dy: Any) -> Iterator[str]:
    """Sentences whose mistake gives what came out, the likeliest first."""
    N, square = len(x), W.shape[0] == W.shape[1]
    if not got.any():
        yield f"{name} is zero everywhere"
    known: dict[str, list[tuple[str, Callable[[], Any]]]] = {
        "y": [
            ("y lacks the bias", lambda: x @ W),
            ("y has the bias subtracted", lambda: x @ W - b),
            ("y has the bias added twice", lambda: x @ W + 2 * b),
            ("y uses Wᵀ where W belongs", lambda: x @ W.T + b if square else 0),
        ],
        "dx": [
            ("dx uses W where Wᵀ belongs", lambda: dy @ W if square else 0),
            ("dx uses the conjugate of W", lambda: dy @ W.T.conj()),
        ],
        "dW": [
            ("dW is transposed: dyᵀ x where xᵀ dy belongs", lambda: dy.T @ x if square else 0),
            ("dW uses the conjugate of x", lambda: x.T.conj() @ dy),
        ],
        "db": [
            ("db is the sum over the features, not the batch", lambda: dy.sum(1) if W.shape[1] == N else 0),
            ("db is the first row of dy, not the sum of all", lambda: dy[0]),
            ("db is the last row of dy, not the sum of all", lambda: dy[-1]),
        ],
    }
    yield from (text for text, wrong in known[name] if np.array_equal(got, wrong()))
    if N > 1 and name != "y" and np.array_equal(np.rint(got * N), right):
        yield f"{name} is the mean over the batch, not the sum" if name != "dx" else "dx is divided by the batch size"
    yield from _cut(name, got, right, x, dy)
    some = np.flatnonzero(right)
    ratio = got.flat[some[0]] / right.flat[some[0]] if len(some) > 1 else 0
    times = f"{ratio.real if ratio.imag == 0 else ratio:g}"
    if times not in ("0", "1") and np.array_equal(got, ratio * right):
        yield f"{name} is {times} times what it should be"


def _cut(name: str, got: Any, right: Any, x: Any, dy: Any) -> Iterator[str]:
    """What leaves out the last rows of the batch, or the last columns."""
    N = len(x)
    counts = sorted({N - N % 2**i for i in range(1, 17)} | {2**i for i in range(17)} | {N - 1}, reverse=True)
    for rows in (count for count in counts if 0 < count < N):
        if name in ("dW", "db"):
            part = x[:rows].T @ dy[:rows] if name == "dW" else dy[:rows].sum(0)
            found = np.array_equal(got, part)
        else:
            found = np.array_equal(got[:rows], right[:rows]) and not got[rows:].any()
        if found:
            yield f"the last rows of a batch are dropped: {rows:,} of {N:,} count for {name}"
    if name != "db" and right.shape[1] > 1:
        wrong, computed = (np.flatnonzero(columns.any(0)) for columns in (got != right, got))
        if len(wrong) and len(computed) and wrong[0] > computed[-1]:
            columns = right.shape[1]
            yield f"the last columns of {name} are not computed: {columns - computed[-1] - 1} of {columns}"


def _precision(case: Case, results: dict[str, np.ndarray]) -> Iterator[str]:
    """What was rounded on the way."""
    dtype, exact = case.y_dtype, case.exact()
    wrong = [name for name, got in results.items() if worst_error(got, exact[name])[0] > 1]
    if dtype == "float64":
        for name in wrong:
            if np.array_equal(results[name], results[name].astype(np.float32)):
                yield f"{name} is computed in float32, and cast to float64"
    if dtype != "float32" or wrong in ([], ["db"]):
        return
    for text, bits in _NARROW.items():
        for to_nearest in (True, False):
            x, W, dy = (_rounded(operand, bits, to_nearest=to_nearest) for operand in (case.x, case.W, case.dy))
            of_rounded = replace(case, x=x, W=W, dy=dy).exact()
            if all(worst_error(results[name], of_rounded[name])[0] <= 1 for name in wrong if name != "db"):
                yield f"factors are rounded to {text}"
                return


def _rounded(operand: Operand, bits: int, *, to_nearest: bool) -> Operand:
    """An operand whose values have so many significant bits."""
    significands, exponents = np.frexp(operand.values.astype(float))
    scaled = np.ldexp(significands, bits)
    whole = np.rint(scaled) if to_nearest else np.trunc(scaled)
    return replace(operand, values=np.ldexp(whole, exponents - bits).astype(operand.values.dtype), layout="C")
