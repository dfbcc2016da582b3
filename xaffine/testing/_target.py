"""What a user names on the command line: ``package.module:factory`` or ``folder/file.py:factory``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from xaffine.testing._lines import last_user_line

__all__ = ["TargetError", "import_target"]


class TargetError(ValueError):
    """A target names nothing that can be imported, or what it names does not work."""


def import_target(target: str) -> Any:
    """Import what a target names.

    Parameters
    ----------
    target : str
        ``package.module:factory``, or ``folder/file.py:factory``: then the module ``file``, for whose imports `folder`
        comes first in ``sys.path``, as for a script.

    Raises
    ------
    TargetError
        The text is no target, or there is no such module, file or attribute, or importing it failed.
    """
    place, _, path = target.rpartition(":")
    if not place or not path:
        msg = f"TARGET is package.module:factory or file.py:factory, for example layers:AffineLayer; got {target!r}"
        raise TargetError(msg)
    file = Path(place) if place.endswith(".py") else None
    if file is not None:
        if not file.is_file():
            msg = f"there is no file {place!r}, seen from {os.getcwd()}, for the target {target!r}"  # noqa: PTH109
            raise TargetError(msg)
        sys.path.insert(0, str(file.parent.resolve()))
    module_name = place if file is None else file.stem
    try:
        thing: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        msg = f"no module named {error.name!r} can be imported from {os.getcwd()}, for the target {target!r}"  # noqa: PTH109
        raise TargetError(msg) from error
    except (Exception, SystemExit) as error:
        msg = f"importing {module_name} raised {type(error).__name__}: {error}\n  {last_user_line(error)}"
        raise TargetError(msg) from error
    if file is not None and Path(getattr(thing, "__file__", None) or "").resolve() != file.resolve():
        msg = f"{place!r} is not imported, since another module is named {module_name!r}: rename the file"
        raise TargetError(msg)
    found = []
    for one in path.split(","):
        part: Any = thing
        for name in one.split("."):
            if not hasattr(part, name):
                public = [other for other in dir(part) if not other.startswith("_")]
                others = [other for other in public if callable(getattr(part, other, None))]
                msg = f"{place} has no {one!r}; what it has that can be called: {', '.join(others) or 'nothing'}"
                raise TargetError(msg)
            part = getattr(part, name)
        found.append(part)
    return found[0] if len(found) == 1 else tuple(found)
