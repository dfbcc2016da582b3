"""How Sphinx builds the site: ``nox -s docs``."""

from __future__ import annotations

import os
import sys
import tomllib
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

sys.path.append(str(Path(__file__).parent / "_ext"))

project = "xaffine"
author = "The xaffine developers"
copyright = author  # noqa: A001 - the name that Sphinx reads
version = release = version_of("xaffine")

extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode", "sphinxcontrib.programoutput",
    "numpydoc", "generated", "mathml",
]  # fmt: skip
exclude_patterns = ["_build"]
nitpicky = True
smartquotes = False  # quotation marks may be those of code
nitpick_ignore = [("py:class", "collections.abc.Callable")]

# Every {code-cell} and {command-output} of a page runs when the page is built, and an error in one is an error of the
# build. Cells run in an empty folder, as test_as_typed.py runs them again without this site and its notebooks. Commands
# find the `xaffine` of the Python that builds, and a terminal of 88 columns without colours.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
nb_output_stderr = "error"
os.environ |= {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "COLUMNS": "88",
    "NO_COLOR": "1",
    "MATPLOTLIBRC": str(Path(__file__).with_name("matplotlibrc")),
}
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_preserve_defaults = True  # names of constants, not all that is in them
autodoc_typehints = "none"  # the docstrings say more: shapes
default_role = "autolink"  # `name` in a docstring is a link where it names an object, and else a parameter
numpydoc_show_class_members = False
# Not asked for: a summary beyond the first line, a reference in every docstring, an example in those of properties and
# data (test_repository.py asks for the others), types and order of parameters that are described together ("x, W, b: as
# in affine"), and what formulas and plurals look like to it.
numpydoc_validation_checks = {"all", "ES01", "EX01", "GL02", "PR03", "PR04", "SA01", "SS02", "SS05"}
numpydoc_validation_exclude = {
    r"\.(Backend|Bounds|Exact|Gradients|KroneckerFactors|PerSampleGradients|SecondGradients)$",  # not made by users
    r"\.(PropertyError|Report|Result)$",  # likewise
    r"\.(Array|Make)$",  # aliases
    r"\.(checks|initializers)\.[a-z_]+$",  # functions of one signature, which their page describes
    # What the layer asks of a library: one sentence each. What users ask is documented whole.
    r"\.Backend\.(?!(device|dtypes?|is_gpu|(from|to)_\w+|use_\w+|wait)$)",
}

html_theme = "furo"
REPOSITORY = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))["project"]["urls"]
html_theme_options = {
    "source_repository": REPOSITORY["Repository"], "source_branch": "main", "source_directory": "docs/"
}  # fmt: skip
html_title = "xaffine"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["xaffine.css"]
html_copy_source = False


def skip_fields(_: Sphinx, __: str, ___: str, thing: object, *____: object) -> bool | None:
    """Leave out the fields of named tuples, which the docstrings of their classes describe."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skip_fields)
