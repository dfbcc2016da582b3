"""Files that are never half written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["replace_text"]


def replace_text(file: Path, text: str) -> None:
    """Write a file anew in one step: whoever is ended in the middle leaves the file as it was.

    Parameters
    ----------
    file : Path
        Its folder must exist.
    text : str
        Written as UTF-8.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
