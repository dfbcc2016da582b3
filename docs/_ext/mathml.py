"""Formulas as MathML, which browsers show by themselves: no script, no font and no network.

What is no LaTeX is a warning with its place, and so fails the build.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata
    from sphinx.writers.html5 import HTML5Translator

__all__ = ["setup"]

_CONVERTER = LatexToMathML(fancy_error=False)
_logger = logging.getLogger(__name__)


def _convert(node: nodes.math | nodes.math_block, *, display: bool) -> str:
    try:
        mathml: str = _CONVERTER.convert_with_local_state(node.astext(), displaystyle=display)
    except LatexError as error:
        _logger.warning("no formula: %s", error, location=node)
        return ""
    return mathml


def _inline(translator: HTML5Translator, node: nodes.math) -> NoReturn:
    translator.body.append(_convert(node, display=False))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> NoReturn:
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append(_convert(node, display=True))
    if node["number"]:
        translator.body.append(f'<span class="eqno">({get_node_equation_number(translator, node)})</span>')
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
