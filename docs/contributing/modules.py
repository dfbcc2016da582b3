"""Draw which module of the package imports which, from the imports themselves: an SVG for the page beside this file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import grimp

__all__ = ["arrows", "drawing", "rows"]

ROOT = Path(__file__).parents[2]
WIDTH, ROW, BOX, HEIGHT = 560, 84, 118, 34


def rows() -> list[list[str]]:
    """The modules, row by row, as the contract in pyproject.toml has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    return [layer.split(" | ") for layer in contracts[0]["layers"]]


def arrows() -> list[tuple[str, str]]:
    """Return which module imports which, without what follows: with a → b → c, a → c is left out."""
    graph = grimp.build_graph("xaffine", exclude_type_checking_imports=True, cache_dir=None)
    modules = [module for row in rows() for module in row]

    def imported(module: str, other: str) -> bool:
        pair = {"importer": f"xaffine.{module}", "imported": f"xaffine.{other}"}
        return module != other and graph.direct_import_exists(**pair, as_packages=True)

    imports = {module: {other for other in modules if imported(module, other)} for module in modules}

    def reached(module: str) -> set[str]:
        return imports[module].union(*map(reached, imports[module]))

    return [
        (module, other)
        for module in modules
        for other in modules
        if other in imports[module] and not any(other in reached(between) for between in imports[module])
    ]


def drawing() -> str:
    """The SVG, in the colours of the page around it."""
    places = {
        module: ((i + 0.5) * WIDTH / 4 + (4 - len(row)) * WIDTH / 8, j * ROW + 4)
        for j, row in enumerate(rows())
        for i, module in enumerate(row)
    }

    def lane(x: float, y: int, to_y: int) -> int:
        """Where to pass the rows between two boxes straight down: beside the boxes there, long arrows to the left."""
        boxes = [px for px, py in places.values() if y < py < to_y]
        lanes = sorted(range(0, WIDTH, WIDTH // 8), key=lambda lane: (abs(lane - x), lane * (to_y - y - 2.5 * ROW)))
        return next(lane for lane in lanes if all(abs(px - lane) > BOX / 2 for px in boxes))

    lines = []
    for module, other in arrows():
        (x, y), (to_x, to_y) = places[module], places[other]
        aside = lane(x, y, to_y)
        lines.append(
            f'<path d="M{x:g} {y + HEIGHT} L{aside:g} {min(y + ROW, to_y - ROW + HEIGHT):g} '
            f'V{to_y - ROW + HEIGHT:g} L{to_x:g} {to_y - 2:g}"/>'
        )
    boxes = [
        f'<rect x="{x - BOX / 2:g}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{x:g}" y="{y + 22}">{module}</text>'
        for module, (x, y) in places.items()
    ]
    description = "; ".join(
        f"{module} imports {', '.join(b for a, b in arrows() if a == module)}" for module in dict(arrows())
    )
    return "\n".join(
        [
            f'<svg class="modules" role="img" viewBox="0 0 {WIDTH} {ROW * len(rows()) - ROW + HEIGHT + 8}">',
            f"<title>Which module imports which</title><desc>{description}.</desc>",
            '<marker id="modules-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"'
            ' orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker>',
            *lines,
            *boxes,
            "</svg>",
        ]
    )
