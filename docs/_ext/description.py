"""The description of the built package: the README, with links that also lead somewhere outside the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Description(MetadataHookInterface):  # type: ignore[misc]
    """What hatchling calls for the field `readme` of ``pyproject.toml``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in the README, its links made absolute by the address of the repository."""
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = with_absolute_links(readme, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(text: str, repository: str) -> str:
    """Markdown whose relative links lead to the branch main of a repository, and those of images to the files."""

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[1].endswith((".svg", ".png")) else "blob"
        return f"]({repository}/{kind}/main/{link[1]})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", absolute, text)
