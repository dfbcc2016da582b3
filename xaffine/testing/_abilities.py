"""What an implementation takes: what it declares, or what one small case of each ability shows."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from xaffine.testing import bounds
from xaffine.testing._candidate import RaisedError
from xaffine.testing._lines import summary_of
from xaffine.testing._subject import TamperedError
from xaffine.testing._timer import NoAnswerError
from xaffine.testing._trial import GradientWithoutBiasError, Trial
from xaffine.testing.cases import FEATURES, LAYOUTS, make_case

if TYPE_CHECKING:
    from xaffine.testing._subject import Subject
    from xaffine.testing.options import Options

__all__ = ["Abilities", "declared", "probed"]

# The forms of x, the likeliest first: a shape whose extents differ, so that no wrong reading fits, and n_batch_axes.
_FORMS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "matrices": ((2, 3), None), "last-axis": ((2, 3, 4), -1), "tensors": ((2, 3, 4), None), "vectors": ((3,), None),
}  # fmt: skip
_OUTPUTS = 5
_UNTRIED = "not tried after "
_ALL_LAYOUTS = (*LAYOUTS, "broadcast")


class Abilities(NamedTuple):
    """What is drawn for an implementation, and what is not."""

    features: set[str]
    """Out of `FEATURES`."""
    layouts: tuple[str, ...]
    """Out of `LAYOUTS`, and "broadcast" for dy."""
    dtypes: tuple[str, ...]
    gaps: list[str]
    """What it does not take, each with the reason."""
    bias: bool = True
    """Whether it takes a b."""
    hung: bool = False
    """Whether a first small call gave no answer."""


def declared(subject: Subject, supports: Any, dtypes: tuple[str, ...]) -> Abilities:
    """The abilities that an implementation, or who checks it, names: they are drawn whatever it does with them.

    Raises
    ------
    TypeError
        It is no collection of names.
    ValueError
        A name is neither a feature nor a dtype, or two features contradict each other.
    """
    if not isinstance(supports, Collection) or isinstance(supports, str):
        msg = f"supports is a collection of names, such as {{'no-bias', 'vectors'}}; it came as {supports!r}"
        raise TypeError(msg)
    features = {name for name in supports if name in FEATURES}
    own = set(supports) - features
    if strangers := [repr(name) for name in own if not bounds.is_dtype(name)]:
        msg = f"supports names features ({', '.join(FEATURES)}) and dtypes; it also has {', '.join(strangers)}"
        raise ValueError(msg)
    if {"tensors", "last-axis"} <= features and not subject.facts.takes_batch_axes:
        msg = "supports has both 'tensors' and 'last-axis', two readings of the same x; leave out one"
        raise ValueError(msg)
    features |= {"matrices", "four-axes"}
    missing = [f for f in FEATURES if f not in features and not ({f, *features} >= {"tensors", "last-axis"})]
    gaps = [FEATURES[feature] for feature in missing]
    taken = tuple(dtype for dtype in dtypes if not own or dtype in own)
    gaps += [f"dtype {dtype}" for dtype in dtypes if dtype not in taken]
    return Abilities(features, _ALL_LAYOUTS, taken, gaps)


def probed(subject: Subject, dtypes: tuple[str, ...], options: Options) -> Abilities:
    """The abilities that an implementation shows: what it refuses is a gap, what it accepts is held to account.

    A refusal is an exception, or a y of another shape than the form of x asks for.

    Raises
    ------
    ValueError
        It refuses each form of x.
    """
    hung, bias = "", True

    def refusal(dtype: str, shape: tuple[int, ...], k: int | None, m: int = _OUTPUTS, **more: Any) -> str | None:
        nonlocal hung
        if hung:
            return f"{_UNTRIED}{hung}"
        case = make_case(shape, m, seed=0, dtypes=dtype, n_batch_axes=k, **{"bias": bias, **more})
        try:
            with subject.limit(options.time_limit):
                trial = Trial(subject, case)
                y = trial.forward()
                if len(shape) != 2 and case.N and y.shape != case.dy.values.shape:  # another reading of x
                    return f"y has the shape {y.shape}, not {case.dy.values.shape}"
                if subject.facts.has_backward:
                    trial.gradients()
        except GradientWithoutBiasError as error:
            return str(error)
        except (KeyboardInterrupt, TamperedError):  # the first is the user's
            raise
        except NoAnswerError as error:
            hung = summary_of(str(error))
        except RaisedError as error:
            return summary_of(str(error)) if error.clean else None
        except BaseException:  # no clean refusal
            return None
        return None

    def try_forms() -> tuple[dict[tuple[str, str], str | None], tuple[str, ...]]:
        tried = {(form, dtype): refusal(dtype, *_FORMS[form]) for form in _FORMS for dtype in dtypes}
        return tried, tuple(dtype for dtype in dtypes if any(tried[form, dtype] is None for form in _FORMS))

    tried, taken = try_forms()
    if not taken:
        bias = False
        without, taken = try_forms()
        bias = not taken
        if taken:
            why_no_bias, tried = tried["matrices", dtypes[0]], without
    if not taken and refusal(dtypes[0], (2, 3), None, m=3) is None:  # a transpose is missing
        tried["matrices", dtypes[0]], taken = None, dtypes[:1]
    if not taken:
        why = tried["matrices", dtypes[0]]
        kind = subject.facts.adapter
        called = (
            "What is checked is called as layer = make(W, b), y = layer.forward(x), dx = layer.backward(dy), and "
            "leaves layer.dW and layer.db"
            if kind == "layer"
            else f"It was taken for a {kind}; another adapter or backend may fit"
        )
        msg = f"x (2, 3), W (3, 5), b (5,) and dy (2, 5) in {dtypes[0]} are refused: {why}. {called}"
        raise ValueError(msg)
    found: dict[str, str | None] = {form: tried[form, taken[0]] for form in _FORMS}
    base = next(form for form in _FORMS if found[form] is None)
    shape, k = _FORMS[base]
    first = taken[0]
    tall = "last-axis" if found["last-axis"] is None else "tensors"
    found["four-axes"] = found[tall] or refusal(first, (2, 3, 4, 2), _FORMS[tall][1])
    found["no-bias"] = refusal(first, shape, k, bias=False)
    if base != "vectors":
        found["no-samples"] = refusal(first, (0, *shape[1:]), k)
    found["no-features"] = refusal(first, (*shape[:-1], 0), k)
    found["no-outputs"] = refusal(first, shape, k, m=0)
    layouts = {layout: refusal(first, shape, k, layouts=(layout,) * 4) for layout in LAYOUTS}
    layouts["broadcast"] = refusal(first, shape, k, layouts=("C", "C", "C", "broadcast"))
    untried = [name for name, why in (found | layouts).items() if why is not None and why.startswith(_UNTRIED)]
    gaps = [f"{FEATURES[n]} ({why})" for n, why in found.items() if why is not None and n not in untried]
    if not bias:
        gaps.append(f"a bias ({why_no_bias})")
    gaps += [f"operands in the layout {n!r} ({w})" for n, w in layouts.items() if w is not None and n not in untried]
    gaps += [f"dtype {dtype} ({tried[base, dtype]})" for dtype in dtypes if dtype not in taken]
    if untried:
        gaps.append(f"{', '.join(untried)} ({_UNTRIED}{hung})")
    accepted = tuple(name for name, why in layouts.items() if why is None)
    features = {name for name, why in found.items() if why is None}
    return Abilities(features, accepted or ("C",), taken, gaps, bias, bool(hung))
