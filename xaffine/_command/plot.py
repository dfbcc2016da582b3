"""Draw what ``xaffine bench`` found (extra ``plot``)."""

from __future__ import annotations

import itertools
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

    warm = [row for row in found["rows"] if (row["what"], row["cache"]) == ("both", "warm")]
    rows = [row for row in warm if row["implementation"] != "limit"]
    groups, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("group", "dtype"))
    size = (1.5 + 3 * len(groups), 0.5 + 3 * len(dtypes))
    figure, axes = plt.subplots(
        len(dtypes), len(groups), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for (dtype, group), axis in zip(itertools.product(dtypes, groups), axes.flat, strict=True):
        some = [row for row in rows if (row["group"], row["dtype"]) == (group, dtype)]
        if not some:
            axis.set_visible(False)
            continue
        for name in dict.fromkeys(row["implementation"] for row in some):
            line = sorted((math.prod(r["shape"]), r["ratio"]) for r in some if r["implementation"] == name)
            color = "tab:blue" if name.startswith("xaffine") else "tab:red"
            style = "--" if name == "xaffine, out=" else "-"
            axis.plot(*zip(*line, strict=True), style, marker="o", markersize=3, label=name, color=color)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{group}, {dtype}", xlabel="N·n·m")
        axis.legend(frameon=False, fontsize="small")
    for axis in axes[:, 0]:
        axis.set_ylabel("forward + backward / bare products")
    figure.suptitle(f"{found['system']}, {found['cores']} cores, {found['date']}", fontsize="small")
    plain = {"Date": None} if file.suffix == ".svg" else {}
    with mpl.rc_context({"svg.hashsalt": "xaffine"}):  # the same drawing for the same figures
        figure.savefig(file, metadata=plain)
    plt.close(figure)
