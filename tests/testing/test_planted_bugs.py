"""Every bug of `bugs.BUGS` is found, and every property finds some bug: a proof that could not fail proves nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.testing.bugs import BUGS, Bug
from xaffine.testing import PROPERTIES, PropertyError, check_affine
from xaffine.testing.cases import FEATURES

BY_NAME = {prop.name: prop for prop in PROPERTIES}
STRICT: dict[str, Any] = {"supports": set(FEATURES) - {"last-axis"}, "strict": True, "mixed": True}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.make.__name__)
def test_bug_is_found_by_the_property_that_names_it(bug: Bug) -> None:
    """With that property's sentence and a reason; a forward that is right for the bug holds before."""
    if bug.found_by != "forward_is_exact":
        check_affine(bug.make, seed=0, max_examples=25, properties=["forward_is_exact"], **STRICT, **bug.options)
    with pytest.raises(PropertyError, match=bug.message) as caught:
        check_affine(bug.make, seed=0, max_examples=200, properties=[bug.found_by], **STRICT, **bug.options)
    label = f"{bug.found_by}{' (large)' if bug.options.get('large') else ''}"
    assert str(caught.value).startswith(f"{label} does not hold.\n{BY_NAME[bug.found_by].sentence}\n")


@pytest.mark.parametrize(
    ("bug", "name"),
    [pytest.param(bug, name, id=f"{bug.make.__name__}-{name}") for bug in BUGS for name in bug.also_by],
)
def test_bug_is_found_by_its_other_properties_on_their_own(bug: Bug, name: str) -> None:
    with pytest.raises(PropertyError, match=rf"^{name} does not hold\."):
        check_affine(bug.make, seed=0, max_examples=300, properties=[name], **STRICT, **bug.options)


def test_every_property_finds_some_bug() -> None:
    assert {name for bug in BUGS for name in (bug.found_by, *bug.also_by)} == set(BY_NAME)
