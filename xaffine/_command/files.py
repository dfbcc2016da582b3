"""Files that are never half written, and that are tried before anything is measured."""

from __future__ import annotations

import os
from pathlib import Path

from xaffine._storage import replacing

__all__ = ["replace_text", "require_writable", "write_text"]


def require_writable(file: Path) -> None:
    """Raise an OSError that says what to do unless a file can be written; ``-`` is standard output."""
    target = Path(os.path.realpath(file))
    if str(file) != "-" and ((target.exists() and not target.is_file()) or not os.access(target.parent, os.W_OK)):
        msg = f"{file} cannot be written: name a regular file, or a new one, in a folder that can be written"
        raise OSError(msg)


def write_text(file: Path, text: str) -> None:
    """Write a file anew in one step, or print the text where the file is ``-``."""
    if str(file) == "-":
        print(text, end="")
    else:
        replace_text(file, text)


def replace_text(file: Path, text: str) -> None:
    """Write a file anew in one step: whoever is ended in the middle leaves the file as it was.

    Parameters
    ----------
    file : Path
        As for `xaffine.storage.replacing`.
    text : str
        Written as UTF-8.
    """
    with replacing(file) as new:
        new.write(text.encode())
