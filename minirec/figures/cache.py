"""Keys and values: notebook 04."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from minirec.figures.ink import BLUE, GREY, VERMILION, plain


def slot_map(slots: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Which slot each recurrence step writes, and which step later tokens read there; one panel per cache.

    slots: title -> slot of step 1, 2, ... r.  A dark cell is what the slot holds in the end, a light one was
    overwritten.  Under it, what step k of a later token finds in its slot: vermilion where it is not step k.
    """
    rows = 1 + max(max(row) for row in slots.values())
    steps = max(len(row) for row in slots.values())
    _, axes = plt.subplots(
        1, len(slots), figsize=(0.42 * steps * len(slots) + 1.4, 0.36 * (rows + 3)), squeeze=False, layout="constrained"
    )
    for ax, (title, row) in zip(axes[0], slots.items(), strict=True):
        kept = {slot: k for k, slot in enumerate(row, 1)}  # the last step that wrote to it
        for k, slot in enumerate(row, 1):
            stays, found = kept[slot] == k, kept[slot]
            ax.add_patch(plt.Rectangle((k - 0.46, slot - 0.46), 0.92, 0.92, facecolor=BLUE if stays else "#E6E6E6"))
            ax.text(k, slot, k, ha="center", va="center", fontsize=9, color="white" if stays else "#777777")
            weight, colour = ("normal", BLUE) if found == k else ("bold", VERMILION)
            ax.text(k, rows + 0.4, found, ha="center", va="center", fontsize=9, color=colour, fontweight=weight)
        ax.axhline(rows - 0.15, color=GREY, linewidth=0.8)
        ax.set(xlim=(0.4, len(row) + 0.6), ylim=(rows + 0.9, -0.6), title=plain(title), xlabel="recurrence step k")
        ax.set_xticks(range(1, len(row) + 1))
        ax.set_yticks([*sorted(kept), rows + 0.4], [*(f"slot {slot}" for slot in sorted(kept)), "k reads"])
        ax.tick_params(length=0, labelsize=9)
        ax.spines[:].set_visible(False)
    return axes[0]


def by_cache(
    shares: Mapping[str, Mapping[str, float]], bytes_per_token: Mapping[str, int], ax: Axes | None = None
) -> Axes:
    """Right answers with every kind of cache, one bar per group of problems.

    shares: group -> {cache: share of right answers, 0 to 1}; bytes_per_token: cache -> bytes, written under its name.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(10, 3.6), layout="constrained")
    caches, width = list(bytes_per_token), 0.8 / len(shares)
    shades = plt.get_cmap("viridis_r")(np.linspace(0.12, 1.0, len(shares)))
    for i, (group, row) in enumerate(shares.items()):
        x = np.arange(len(caches)) + (i - (len(shares) - 1) / 2) * width
        bars = ax.bar(x, [row[cache] for cache in caches], 0.94 * width, color=shades[i], label=plain(group))
        ax.bar_label(bars, [f"{100 * row[cache]:.0f}" for cache in caches], fontsize=8, padding=1)
    ax.set_xticks(range(len(caches)), [f"{plain(cache)}\n{bytes_per_token[cache] / 1024:.1f} KiB" for cache in caches])
    ax.set(ylabel="right answers", ylim=(0, 1.1), xlabel="keys and values kept, and their size per token")
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ax.tick_params(axis="x", length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax
