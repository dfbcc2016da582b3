"""Draw the affine layer as a graph: ``python docs/figures/draw.py`` writes the four SVG files beside this one.

Each has a card of its own behind it, so that it is legible on any page, and follows the reader's choice of light or
dark where the page says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["DARK", "LIGHT", "figures"]

HERE = Path(__file__).parent
LIGHT = {"card": "#f6f7f9", "frame": "#cdd3da", "ink": "#1b1f24", "forward": "#545d68", "backward": "#a82614"}
DARK = {"card": "#1d2127", "frame": "#454d57", "ink": "#e8ebee", "forward": "#a3adb8", "backward": "#ff9f87"}
STYLE = """
text { font: 20px 'STIX Two Text', Cambria, Georgia, 'DejaVu Serif', serif; text-anchor: middle }
.letter { font-style: italic }
.shape, .remark, .node { font-size: 18px }
.start { text-anchor: start }
.end { text-anchor: end }
rect, circle { stroke-width: 1.5 }
path { fill: none; stroke-width: 2 }
""".strip()

# The line x → dot → add → y, with W and b below their nodes.
VALUES = ("x", "W", "b", "y")
WIDTH, HEIGHT = 570, 340
LINE, BELOW = 90, 300
X, DOT, ADD, Y = 40, 200, 370, 530
RADIUS, HALF, GAP = 26, 22, 4
BESIDE = 7  # how far the arrows of the two directions keep from the line between them


class Edge(NamedTuple):
    """What an arrow carries, in one direction: its name, its shape, and a remark."""

    name: str
    shape: str
    remark: str = ""


class Graph(NamedTuple):
    """What one figure says; the edges in the order x, W, x W, b, y."""

    title: str
    description: str
    forward: tuple[Edge, ...]
    backward: tuple[Edge, ...] = ()


VECTOR = (
    Edge("x", "(n,)"), Edge("W", "(n, m)"), Edge("x W", "(m,)"), Edge("b", "(m,)"), Edge("y", "(m,)"),
)  # fmt: skip
BATCH = (
    Edge("x", "(N, n)"), Edge("W", "(n, m)"), Edge("x W", "(N, m)"), Edge("b", "(m,)"), Edge("y", "(N, m)"),
)  # fmt: skip
GRAPHS = {
    "vector-forward": Graph(
        "The affine layer, forward, for one vector",
        "x of shape (n,) and W of shape (n, m) go into the node dot, which gives x W of shape (m,). That and b of "
        "shape (m,) go into the node add, which gives y of shape (m,).",
        VECTOR,
    ),
    "vector-backward": Graph(
        "The affine layer, backward, for one vector",
        "The gradient dy of shape (m,) comes back to the node add, which hands it on to b, as db, and to the node dot. "
        "That gives x the gradient dx = dy Wᵀ of shape (n,), and W the gradient dW = xᵀ dy of shape (n, m), an outer "
        "product.",
        VECTOR,
        (
            Edge("dx = dy Wᵀ", "(n,)"), Edge("dW = xᵀ dy", "(n, m)", "outer product"), Edge("dy", "(m,)"),
            Edge("db = dy", "(m,)"), Edge("dy", "(m,)"),
        ),
    ),
    "batch-forward": Graph(
        "The affine layer, forward, for a batch",
        "x of shape (N, n) and W of shape (n, m) go into the node dot, which gives x W of shape (N, m). The node add "
        "adds b of shape (m,) to every row of it and gives y of shape (N, m).",
        (*BATCH[:3], Edge("b", "(m,)", "to every row"), BATCH[4]),
    ),
    "batch-backward": Graph(
        "The affine layer, backward, for a batch",
        "The gradient dy of shape (N, m) comes back to the node add, which hands it on to the node dot, and summed "
        "over the batch to b, as db of shape (m,). The node dot gives x the gradient dx = dy Wᵀ of shape (N, n), and W "
        "the gradient dW = xᵀ dy of shape (n, m), a sum over the batch.",
        BATCH,
        (
            Edge("dx = dy Wᵀ", "(N, n)"), Edge("dW = xᵀ dy", "(n, m)", "sum over N"), Edge("dy", "(N, m)"),
            Edge("db = Σ dy", "(m,)", "sum over N"), Edge("dy", "(N, m)"),
        ),
    ),
}  # fmt: skip


def figures() -> dict[str, str]:
    """Return the text of each SVG file by its name."""
    return {f"{name}.svg": _svg(graph) for name, graph in GRAPHS.items()}


def _svg(graph: Graph) -> str:
    apart = BESIDE if graph.backward else 0
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title description" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f'<title id="title">{graph.title}</title>',
        f'<desc id="description">{graph.description}</desc>',
        f"<style>\n{STYLE}\n{_colours(LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{_colours(DARK)}\n}}\n</style>",
        f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12"/>',
        *_edges("forward", graph.forward, -apart),
        *_edges("backward", graph.backward, apart),
        *(_value(*place) for place in (("x", X, LINE), ("W", DOT, BELOW), ("b", ADD, BELOW), ("y", Y, LINE))),
        *(_node(*place) for place in (("dot", DOT), ("add", ADD))),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _colours(palette: dict[str, str]) -> str:
    return "\n".join(
        [
            f"text {{ fill: {palette['ink']} }}",
            f"rect, circle {{ fill: {palette['card']}; stroke: {palette['ink']} }}",
            f".card {{ stroke: {palette['frame']} }}",
            *(
                f".{way} path {{ stroke: {palette[way]} }} .{way} text {{ fill: {palette[way]} }}"
                for way in ("forward", "backward")
            ),
        ]
    )


def _edges(way: str, edges: tuple[Edge, ...], aside: int) -> list[str]:
    """Draw the arrows of one direction, that far below the line, and to the right of the vertical ones."""
    if not edges:
        return []
    y, top, bottom = LINE + aside, LINE + RADIUS + GAP, BELOW - HALF - GAP
    spans = [
        (X + HALF + GAP, y, DOT - RADIUS - GAP, y),
        (DOT + aside, bottom, DOT + aside, top),
        (DOT + RADIUS + GAP, y, ADD - RADIUS - GAP, y),
        (ADD + aside, bottom, ADD + aside, top),
        (ADD + RADIUS + GAP, y, Y - HALF - GAP, y),
    ]
    drawn = []
    for edge, (x1, y1, x2, y2) in zip(edges, spans, strict=True):
        path = _arrow(x1, y1, x2, y2) if way == "forward" else _arrow(x2, y2, x1, y1)
        drawn.append(f'<g class="{way}"><path d="{path}"/>{_label(way, edge, x1, y1, x2)}</g>')
    return drawn


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    """The path of an arrow, horizontal or vertical."""
    u, v = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    tail, side = 9, 5
    barbs = [(x2 - tail * u + side * s * v, y2 - tail * v + side * s * u) for s in (1, -1)]
    return f"M{x1} {y1}H{x2}V{y2}M{barbs[0][0]} {barbs[0][1]}L{x2} {y2}L{barbs[1][0]} {barbs[1][1]}"


def _label(way: str, edge: Edge, x1: int, y1: int, x2: int) -> str:
    """The label of an edge: forward above or to the left of it, backward below or to the right."""
    name = "" if edge.name in VALUES else _formula(edge.name)  # that of a value stands in its box
    lines = [(kind, text) for kind, text in zip(edge._fields, (name, *edge[1:]), strict=True) if text]
    step, upwards = 22, 22 * (len(lines) - 1)
    if x1 != x2:
        x, anchor = (x1 + x2) // 2, ""
        first = y1 + 36 if way == "backward" else y1 - 12 - upwards
    else:
        x, anchor = (x1 + 12, " start") if way == "backward" else (x1 - 12, " end")
        first = LINE + 96 if way == "backward" else BELOW - HALF - 20 - upwards
    return "".join(
        f'<text class="{kind}{anchor}" x="{x}" y="{first + i * step}">{text}</text>'
        for i, (kind, text) in enumerate(lines)
    )


def _formula(text: str) -> str:
    """Letters in italics, names of two letters like dy upright, as in the formulas of the page."""
    return " ".join(f'<tspan class="letter">{word}</tspan>' if word[0] in VALUES else word for word in text.split())


def _value(name: str, x: int, y: int) -> str:
    side = 2 * HALF
    return (
        f'<rect x="{x - HALF}" y="{y - HALF}" width="{side}" height="{side}" rx="8"/>'
        f'<text class="letter" x="{x}" y="{y + 6}">{name}</text>'
    )


def _node(name: str, x: int) -> str:
    return f'<circle cx="{x}" cy="{LINE}" r="{RADIUS}"/><text class="node" x="{x}" y="{LINE + 6}">{name}</text>'


if __name__ == "__main__":
    for name, text in figures().items():
        (HERE / name).write_text(text, encoding="utf-8")
