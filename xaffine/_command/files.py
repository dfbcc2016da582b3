"""Files that are never half written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xaffine._storage import replacing

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["replace_text"]


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
