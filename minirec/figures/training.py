"""Training through depth: notebook 02."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from minirec.figures.ink import BLUE, GREEN, GREY, VERMILION, plain


def depth_histogram(depths, marks: Mapping[str, float], ax: Axes | None = None) -> Axes:
    """How often each depth is drawn: one bar per number of steps, and a line for each of `marks` (label -> depth).

    depths (n,): whole numbers from 1 up.  What lies above the 99.9 % quantile is not drawn.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    depths = np.asarray(depths)
    last = int(np.quantile(depths, 0.999))
    share = np.bincount(depths, minlength=last + 1)[: last + 1] / len(depths)
    ax.bar(range(last + 1), share, width=1.0, color=GREY)
    for (label, depth), style in zip(marks.items(), ("-", "--", ":"), strict=False):
        ax.axvline(depth, color=BLUE, linestyle=style, label=f"{plain(label)} {depth:.4g}")
    ax.set(xlabel="recurrence steps r", ylabel="share of draws", xlim=(0, last + 1))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return ax


def gradient_by_step(norms: Mapping[str, Sequence[float]], title: str = "", ax: Axes | None = None) -> Axes:
    """Size of the gradient that reaches the embedding through each recurrence step, on a log axis; zeros are left out.

    norms: label -> one number per step, from step 1 on.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    styles = zip((GREY, GREEN, BLUE, VERMILION), ("o", "s", "D", "^"), (11, 8, 6, 4), strict=True)
    for (label, values), (colour, marker, size) in zip(norms.items(), styles, strict=False):
        sizes = np.asarray(values, dtype=float)
        shown = np.where(sizes > 0, sizes, np.nan)
        ax.plot(
            np.arange(1, len(sizes) + 1), shown, "-", marker=marker, markersize=size, color=colour, label=plain(label)
        )
    ax.set(title=plain(title), yscale="log", xlabel="recurrence step", ylabel="gradient of the loss at e")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return ax


def over_training(panels: Mapping[str, Mapping[str, tuple]]) -> np.ndarray:
    """What changes while a model is trained, one panel per quantity and one line per run; returns the axes.

    panels: quantity -> {label: (optimiser steps, values)}.  A label looks the same in all panels; after the third,
    colours come again with dashed lines; the only line of a panel is black.  A value of None or NaN is left out.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() if len(lines) > 1 for label in lines))
    looks = {label: ((VERMILION, BLUE, GREEN)[i % 3], "-" if i < 3 else "--") for i, label in enumerate(labels)}
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.4), squeeze=False, layout="constrained")
    for ax, (quantity, lines) in zip(axes[0], panels.items(), strict=True):
        for label, (steps, values) in lines.items():
            values = np.asarray(values, dtype=float)
            kept, (colour, style) = np.isfinite(values), looks.get(label, ("black", "-"))
            ax.plot(np.asarray(steps)[kept], values[kept], style, color=colour, linewidth=1.6, label=plain(label))
        ax.set(xlabel="optimiser step", ylabel=plain(quantity))
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    handles = {line.get_label(): line for ax in axes[0] for line in ax.lines if line.get_label() in map(plain, looks)}
    if handles:
        fig.legend(
            handles.values(), handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=9
        )
    return axes[0]
