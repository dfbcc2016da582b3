"""How Sphinx builds the site: ``nox -s docs``."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "_ext"))

project = "xaffine"
author = "The xaffine developers"
copyright = author  # noqa: A001 - the name that Sphinx reads
version = release = version_of("xaffine")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "numpydoc", "mathml"]
exclude_patterns = ["_build"]
nitpicky = True

# Every {code-cell} of a page runs when the page is built, and an error in one is an error of the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the docstrings say more: shapes
numpydoc_show_class_members = False

html_theme = "furo"
html_title = "xaffine"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["xaffine.css"]
html_copy_source = False
