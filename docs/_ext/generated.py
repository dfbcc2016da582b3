"""Parts of pages that are made from the sources when the site is built: ``{module-drawing}`` and ``{nox-sessions}``."""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from docutils.parsers.rst import Directive

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

__all__ = ["setup"]

_ROOT = Path(__file__).parents[2]


class ModuleDrawing(Directive):  # type: ignore[misc] # docutils has no types
    """The modules and their imports."""

    def run(self) -> list[nodes.Node]:
        """Draw them."""
        sys.path.append(str(_ROOT / "docs" / "contributing"))
        import modules

        return [nodes.raw("", modules.drawing(), format="html")]


class NoxSessions(Directive):  # type: ignore[misc] # docutils has no types
    """The sessions of noxfile.py with their docstrings."""

    def run(self) -> list[nodes.Node]:
        """List them."""
        noxfile = (_ROOT / "noxfile.py").read_text(encoding="utf-8")
        default = noxfile.partition("\nnox.options.sessions = ")[2].partition("\n")[0]
        listing = []
        for function in ast.parse(noxfile).body:
            if isinstance(function, ast.FunctionDef) and any(
                ast.unparse(mark).startswith("nox.session") for mark in function.decorator_list
            ):
                named = "" if f'"{function.name}' in default else " Only if named."
                lines = textwrap.wrap(f"{ast.get_docstring(function)}{named}", 76)
                listing.append(f"{function.name:12}" + f"\n{'':12}".join(lines))
        text = "\n".join(listing)
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the directives."""
    app.add_directive("module-drawing", ModuleDrawing)
    app.add_directive("nox-sessions", NoxSessions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
