"""The batching engine: notebook 09."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from minirec.figures.ink import GREY, depth_colours, plain


def gantt(runs: Mapping[str, Sequence], title: str = "") -> np.ndarray:
    """Who was in which pass of the batching engine, one panel per run: a lane per slot, passes to the right.

    runs: label -> passes as `Engine(on_pass=...)` gives them (`stage`, and `slots` of (row, request, depth after it)).
    A full block is a recurrence step, darker the deeper; a low black one the coda, a low grey one the prelude; a thin
    line joins the passes of one request, whose number is at its start.  Returns an array of axes, one per run.
    """
    slots = [slot for passes in runs.values() for one in passes for slot in one.slots]
    lanes, deepest = 1 + max(row for row, _, _ in slots), max(depth for _, _, depth in slots)
    length = max(map(len, runs.values()))
    cmap, norm = depth_colours(deepest)
    fig, axes = plt.subplots(
        len(runs), 1, figsize=(12, 0.8 + (0.5 + 0.34 * lanes) * len(runs)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    lows = {"PRELUDE": ("prelude", GREY), "CODA": ("coda", "black")}
    for (label, passes), ax in zip(runs.items(), axes[:, 0], strict=True):
        spans: dict[tuple[int, int], list[int]] = {}  # (row, request) -> its passes
        for x, one in enumerate(passes):
            rows, _, depths = zip(*one.slots, strict=True)
            for row, request, _ in one.slots:
                spans.setdefault((row, request), []).append(x)
            if one.stage.name in lows:
                ax.barh(rows, 1, 0.3, left=x, color=lows[one.stage.name][1])
            else:
                ax.barh(rows, 1, 0.64, left=x, color=cmap(norm(depths)), edgecolor="white", linewidth=0.3)
        for (row, request), own in spans.items():
            ax.hlines(row, own[0], own[-1] + 1, color="black", linewidth=0.7, zorder=0)
            ax.vlines(own[0], row - 0.46, row + 0.32, color="black", linewidth=0.9)
            ax.text(own[0] + 0.003 * length, row - 0.34, plain(request), fontsize=6.5, va="bottom")
        ax.set(xlim=(0, length), ylim=(lanes - 0.5, -0.75))
        ax.set_yticks(range(lanes), [f"slot {row}" for row in range(lanes)], fontsize=8)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_title(plain(label), loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("pass")
    stages = {one.stage.name for passes in runs.values() for one in passes}
    handles = [Patch(facecolor=lows[s][1], label=lows[s][0]) for s in lows if s in stages]
    fig.suptitle(plain(title))
    if handles:
        fig.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    bar = fig.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=axes[:, 0], fraction=0.02, pad=0.01, aspect=30)
    ticks = np.unique(np.linspace(1, deepest, min(deepest, 8)).round().astype(int))
    bar.set_ticks(ticks, labels=ticks)
    bar.minorticks_off()
    bar.set_label("depth after the pass")
    return axes[:, 0]
