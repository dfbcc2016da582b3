"""The figures of the derivation: those of the script, true of the layer, legible, and told to those who hear them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from xaffine import affine_vjp

FIGURES = Path(__file__).parents[1] / "figures"
SCRIPT: dict[str, Any] = runpy.run_path(str(FIGURES / "draw.py"))
DRAWN: dict[str, str] = SCRIPT["figures"]()
SVG = "{http://www.w3.org/2000/svg}"
TREES = {name: ElementTree.fromstring(text) for name, text in DRAWN.items()}  # noqa: S314 - our own text
EXTENTS = {"N": 5, "n": 3, "m": 2}
NAMES = sorted(DRAWN)


def test_committed_figures_are_those_of_the_script() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in FIGURES.glob("*.svg")} == DRAWN


@pytest.mark.parametrize("name", NAMES)
def test_shapes_on_the_edges_are_those_of_the_layer(name: str) -> None:
    N, n, m = EXTENTS.values()
    batch = () if name.startswith("vector") else (N,)
    x, W, b = np.ones((*batch, n)), np.ones((n, m)), np.ones(m)
    y, vjp = affine_vjp(x, W, b)
    gradients: Any = vjp(y)
    dx, dW, db = gradients
    forward = [x.shape, W.shape, (x @ W).shape, b.shape, y.shape]
    backward = [dx.shape, dW.shape, y.shape, db.shape, y.shape] if "backward" in name else []
    shown = {
        way: [
            tuple(EXTENTS[letter] for letter in re.findall(r"\w", _one(edge, "shape")))
            for edge in TREES[name].iterfind(f"{SVG}g[@class='{way}']")
        ]
        for way in ("forward", "backward")
    }
    assert shown == {"forward": forward, "backward": backward}


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_says_what_it_shows(name: str) -> None:
    root = TREES[name]
    assert root.get("role") == "img"
    told = {element.get("id"): element.text or "" for element in root if element.tag in (f"{SVG}title", f"{SVG}desc")}
    assert list(told) == (root.get("aria-labelledby") or "").split()
    shapes = {text.text for text in root.iter(f"{SVG}text") if (text.get("class") or "").startswith("shape")}
    assert shapes <= set(re.findall(r"\([^()]*\)", told["description"]))


@pytest.mark.parametrize("palette", ["LIGHT", "DARK"])
@pytest.mark.parametrize("role", ["ink", "forward", "backward"])
def test_text_has_the_contrast_that_wcag_asks_for(palette: str, role: str) -> None:
    colours = SCRIPT[palette]
    low, high = sorted(_luminance(colours[each]) for each in ("card", role))
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.2, success criterion 1.4.3


def _one(edge: ElementTree.Element, kind: str) -> str:
    (text,) = [text.text for text in edge.iter(f"{SVG}text") if (text.get("class") or "").split()[0] == kind]
    assert text
    return text


def _luminance(colour: str) -> float:
    """The relative luminance of WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
