"""Draw what ``xaffine bench`` found (extra ``plot``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["draw_ratios"]


def draw_ratios(found: dict[str, Any], file: Path) -> None:
    """Draw time of forward and backward over that of the bare products, against size.

    Parameters
    ----------
    found : dict
        What ``xaffine bench --json`` writes.
    file : Path
        Its suffix names the format, such as ``.svg`` or ``.png``.
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in found["rows"] if row["what"] == "both" and row["implementation"] != "limit"]
    panels = sorted({(row["group"], row["dtype"]) for row in rows})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + 3.5 * len(panels), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (group, dtype) in zip(axes[0], panels, strict=True):
        some = [row for row in rows if (row["group"], row["dtype"]) == (group, dtype)]
        for name in dict.fromkeys(row["implementation"] for row in some):
            line = sorted((math.prod(r["shape"]), r["ratio"]) for r in some if r["implementation"] == name)
            color = "tab:blue" if name.startswith("xaffine") else "tab:red"
            style = "--" if name == "xaffine, out=" else "-"
            axis.plot(*zip(*line, strict=True), style, marker="o", markersize=3, label=name, color=color)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{group}, {dtype}", xlabel="N·n·m")
        axis.legend(frameon=False, fontsize="small")
    axes[0][0].set_ylabel("forward + backward / bare products")
    figure.suptitle(f"{found['system']}, {found['cores']} cores, {found['date']}", fontsize="small")
    figure.savefig(file)
    plt.close(figure)
