"""How deep problems and tokens have to go, and how deep they went: notebooks 03, 05 and 06."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from minirec.figures.ink import BLUE, GREEN, VERMILION, depth_colours, plain, readable_on, word


def _level_lines(ax: Axes, curves: Mapping, beyond: Sequence) -> None:
    """One line per level, light for easy and dark for hard, dashed for those `beyond` training; depth in octaves."""
    shades = plt.get_cmap("viridis_r")(np.linspace(0.12, 1.0, len(curves)))
    for shade, (level, curve) in zip(shades, curves.items(), strict=True):
        style = "--" if level in beyond else "-"
        ax.plot(list(curve), list(curve.values()), style, marker="o", markersize=4, color=shade, label=plain(level))
    depths = [r for curve in curves.values() for r in curve]
    ticks = [2**i for i in range(12) if min(depths) <= 2**i <= max(depths)]
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(r) for r in ticks])
    ax.minorticks_off()
    ax.set_xlabel("recurrence steps")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(title="level", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9, labelspacing=0.3)


def depth_curves(curves: Mapping, title: str = "", beyond: Sequence = (), ax: Axes | None = None) -> Axes:
    """Exact match against depth, one line per level: a line rises at the depth that its problems need.

    curves: level, easiest first -> {recurrence steps: share of exact matches, 0 to 1}; `beyond`: levels to dash.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    _level_lines(ax, curves, beyond)
    ax.set(title=plain(title), ylabel="exact match", ylim=(-0.04, 1.04))
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    return ax


def change_curves(curves: Mapping, threshold: float | None = None, title: str = "", ax: Axes | None = None) -> Axes:
    """How far each step moves the state, one line per level on a log axis; `threshold` draws a dotted line there.

    curves: level, easiest first -> {recurrence step: |s_k - s_(k-1)| / |s_k|, one number for all its tokens}.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    _level_lines(ax, curves, ())
    if threshold is not None:
        ax.axhline(threshold, color=VERMILION, linestyle=":", linewidth=1.5)
    ax.set(title=plain(title), yscale="log", ylabel=r"$\|s_k - s_{k-1}\| \,/\, \|s_k\|$")
    return ax


def number_map(ax: Axes, values: np.ndarray, words: np.ndarray, first_step: int, levels, norm, cmap: str) -> None:
    """A table in colours: one row per level, one column per step, a word in each cell."""
    ax.imshow(values, norm=norm, cmap=cmap, aspect="auto", origin="lower")
    for (row, column), shown in np.ndenumerate(words):
        ink = readable_on(plt.get_cmap(cmap)(norm(values[row, column])))
        ax.text(column, row, shown, ha="center", va="center", fontsize=8, color=ink)
    ax.set_xticks(range(values.shape[1]), range(first_step, first_step + values.shape[1]))
    ax.set_yticks(range(len(levels)), map(plain, levels))
    ax.set(xlabel="recurrence step", ylabel="level")
    ax.tick_params(length=0)


def settled_steps(steps: Mapping[int, Sequence[int]], title: str = "", ax: Axes | None = None) -> Axes:
    """At which step tokens settle: for each level the percentage of its tokens at each step, blank for 0.

    steps: level, easiest first -> the step of every token, from 1 up.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    last = max(max(row) for row in steps.values())
    percent = np.array([100 * np.bincount(row, minlength=last + 1)[1:] / len(row) for row in steps.values()])
    words = np.where(percent > 0, np.char.mod("%.0f", percent), "")
    number_map(ax, percent, words, 1, list(steps), Normalize(0, 100), "Blues")
    ax.set_title(plain(title))
    return ax


def settling(unsettled: Sequence[float], movement: Sequence[float], ax: Axes | None = None) -> Axes:
    """How soon guesses settle, and how soon states do, on a logarithmic axis.

    One number per recurrence step, from step 1 on.  unsettled: share of guesses that are not yet the final one
    (zeros are not drawn); movement: |s_k - s_(k-1)| / |s_k|.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    steps = range(1, len(movement) + 1)
    shares = [share or np.nan for share in unsettled]
    ax.semilogy(steps, movement, "s--", color=BLUE, label="median relative movement of the state in this step")
    ax.semilogy(steps, shares, "o-", color=VERMILION, label="share of guesses that still change (0: not drawn)")
    ax.set(xlabel="recurrence step", xticks=steps, ylabel="movement (relative), guesses (share)")
    ax.legend(frameon=False, loc="upper right")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def token_depths(
    words: Sequence[str],
    depths: Sequence[int],
    marked: Sequence[int] = (),
    title: str = "",
    line: int = 88,
    ax: Axes | None = None,
) -> Axes:
    """A text with the recurrence steps of every token: dark is deep, and the number is under the word.

    words, depths: one per token; marked: the tokens to frame, by index; a line of text is `line` letters wide, or as
    wide as the longest word.  Words are cut after 24 letters.
    """
    words = [word(text) for text in words]
    places, x, y = [], 0.0, 0
    line = max(line, 2 + max(map(len, words)))
    for shown in words:
        width = max(len(shown), 2) + 1.0
        if x + width > line:
            x, y = 0.0, y + 1
        places.append((x, y, width))
        x += width
    if ax is None:
        _, ax = plt.subplots(figsize=(0.125 * line, 0.62 * (y + 1) + 0.35), layout="constrained")
    cmap, norm = depth_colours(max(depths))
    for i, (shown, depth, (x, y, width)) in enumerate(zip(words, depths, places, strict=True)):
        colour = cmap(norm(depth))
        frame = dict(edgecolor=VERMILION, linewidth=2.2) if i in marked else dict(edgecolor="none")
        ax.add_patch(plt.Rectangle((x + 0.1, y + 0.08), width - 0.2, 0.84, facecolor=colour, **frame))
        ink = dict(ha="center", va="center", color=readable_on(colour))
        ax.text(x + width / 2, y + 0.36, shown, fontsize=9.5, **ink)
        ax.text(x + width / 2, y + 0.74, depth, fontsize=7, **ink)
    ax.set(xlim=(0, line), ylim=(y + 1, 0))
    ax.set_title(plain(title), fontsize=9.5, loc="left")
    ax.set_axis_off()
    return ax


def exit_thresholds(results: Mapping[str, Mapping[str, Sequence[tuple]]]) -> np.ndarray:
    """Right answers (above) and mean depth (below) by threshold; returns the axes (2, criteria).

    results: criterion -> group of problems -> list of (threshold, mean depth, share of right answers from 0 to 1).
    """
    fig, axes = plt.subplots(
        2, len(results), figsize=(4.6 * len(results), 5.4), sharey="row", sharex="col", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (criterion, groups), (top, bottom) in zip(results.items(), axes.T, strict=True):
        styles = zip((GREEN, VERMILION, BLUE, "black"), ("o", "s", "D", "^"), strict=True)
        for (group, rows), (colour, marker) in zip(groups.items(), styles, strict=False):
            thresholds, depths, shares = zip(*rows, strict=True)
            for ax, values in ((top, shares), (bottom, depths)):
                ax.plot(thresholds, values, "-", marker=marker, markersize=5, color=colour, label=plain(group))
        top.set(title=plain(criterion), ylim=(-0.05, 1.05))
        bottom.set(xscale="log", xlabel="threshold", ylim=(0, None))
        for ax in (top, bottom):
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("right answers")
    axes[0, 0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes[1, 0].set_ylabel("steps per token")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return axes


def depth_accuracy(
    curves: Mapping[str, Sequence[tuple[float, float]]], title: str = "", ax: Axes | None = None
) -> Axes:
    """Right answers against steps per token, one line per rule, the first one grey: up and to the left is better.

    curves: rule -> list of (mean depth of a token, share of right answers from 0 to 1).
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
    styles = zip(("#888888", BLUE, VERMILION, GREEN), ("s--", "o-", "D-", "^-"), strict=True)
    for (rule, points), (colour, style) in zip(curves.items(), styles, strict=False):
        ax.plot(*zip(*sorted(points), strict=True), style, color=colour, markersize=5, label=plain(rule))
    ax.set(title=plain(title), xlabel="steps per token", ylabel="right answers", xlim=(0, None), ylim=(-0.05, 1.05))
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax
