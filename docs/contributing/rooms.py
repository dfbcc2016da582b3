"""Draw which room of the package imports which, from the imports themselves: an SVG for the page beside this file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import grimp

__all__ = ["arrows", "drawing", "rows"]

ROOT = Path(__file__).parents[2]
WIDTH, ROW, BOX, HEIGHT = 560, 84, 118, 34


def rows() -> list[list[str]]:
    """The rooms, row by row, as the contract in pyproject.toml has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    return [layer.split(" | ") for layer in contracts[0]["layers"]]


def arrows() -> list[tuple[str, str]]:
    """Who imports whom, less what follows: with a → b → c, a → c is left out."""
    graph = grimp.build_graph("xaffine", exclude_type_checking_imports=True, cache_dir=None)
    rooms = [room for row in rows() for room in row]

    def imported(room: str, other: str) -> bool:
        pair = {"importer": f"xaffine.{room}", "imported": f"xaffine.{other}"}
        return room != other and graph.direct_import_exists(**pair, as_packages=True)

    imports = {room: {other for other in rooms if imported(room, other)} for room in rooms}

    def reached(room: str) -> set[str]:
        return imports[room].union(*map(reached, imports[room]))

    return [
        (room, other)
        for room in rooms
        for other in rooms
        if other in imports[room] and not any(other in reached(between) for between in imports[room])
    ]


def drawing() -> str:
    """The SVG, in the colours of the page around it."""
    places = {
        room: ((i + 0.5) * WIDTH / 4 + (4 - len(row)) * WIDTH / 8, j * ROW + 4)
        for j, row in enumerate(rows())
        for i, room in enumerate(row)
    }
    lines = []
    for room, other in arrows():
        (x, y), (to_x, to_y) = places[room], places[other]
        # Past other rows straight down, beside the box that may stand there.
        between = any(px == x and y < py < to_y for px, py in places.values())
        aside = x + (WIDTH / 8 if between else 0)
        lines.append(
            f'<path d="M{x:g} {y + HEIGHT} L{aside:g} {min(y + ROW, to_y - ROW + HEIGHT):g} '
            f'V{to_y - ROW + HEIGHT:g} L{to_x:g} {to_y - 2:g}"/>'
        )
    boxes = [
        f'<rect x="{x - BOX / 2:g}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{x:g}" y="{y + 22}">{room}</text>'
        for room, (x, y) in places.items()
    ]
    told = "; ".join(f"{room} imports {', '.join(b for a, b in arrows() if a == room)}" for room in dict(arrows()))
    return "\n".join(
        [
            f'<svg class="rooms" role="img" viewBox="0 0 {WIDTH} {ROW * len(rows()) - ROW + HEIGHT + 8}">',
            f"<title>Which room imports which</title><desc>{told}.</desc>",
            '<marker id="rooms-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"'
            ' orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker>',
            *lines,
            *boxes,
            "</svg>",
        ]
    )
