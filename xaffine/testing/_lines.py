"""Where an exception came from, as its user wants to know it."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

__all__ = ["last_line_of", "last_user_line", "printable", "summary_of"]


def printable(text: str) -> str:
    """A text without what moves the cursor of a terminal, ends an XML document, or has no encoding."""
    return "".join(each if each.isprintable() or each in "\n\t" else "�" for each in text)


_FOLDERS = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_LIBRARIES = tuple(f"{folder}{os.sep}" for folder in [str(Path(__file__).parents[1]), *_FOLDERS])


def summary_of(text: str) -> str:
    """The first line of a text, as far as it is read."""
    line = text.partition("\n")[0]
    return line if len(line) <= 300 else f"{line[:299]}…"


def last_user_line(error: BaseException) -> str:
    """The last line of a traceback that is neither Python's, nor an installed library's, nor xaffine's.

    Parameters
    ----------
    error : BaseException
        One that was raised.

    Returns
    -------
    str
        File, line and code.

    Examples
    --------
    >>> try:
    ...     1 / 0
    ... except ZeroDivisionError as error:
    ...     print(last_user_line(error).partition(":")[0])
    <doctest xaffine.testing._lines.last_user_line[0]>
    """
    return last_line_of(traceback.extract_tb(error.__traceback__))


def last_line_of(frames: list[traceback.FrameSummary]) -> str:
    """The last of some frames that is the user's own, or the last one if all belong to libraries."""
    if not frames:
        return "(no traceback)"
    own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<frozen "))]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
