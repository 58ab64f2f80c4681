"""The state inside the loop, and what lenses read there: notebooks 01 and 03."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from minirec.figures.depth import number_map
from minirec.figures.ink import BLUE, GREEN, GREY, VERMILION, plain, word


def state_norms(norms, ax: Axes | None = None) -> Axes:
    """Size of the state over recurrence steps, one line for each label.

    norms: label -> (steps + 1,), root mean square of the state before the first step and after every step.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    ax.set_prop_cycle(color=[VERMILION, BLUE, GREEN])
    for label, values in norms.items():
        ax.plot(range(len(values)), values, linewidth=2, label=plain(label))
    ax.set(xlabel="recurrence step", ylabel="state, root mean square")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def relative_change(change, threshold: float | None = None, ax: Axes | None = None) -> Axes:
    """How far each recurrence step moves the state, on a log axis: a thin line per token, a thick one for their median.

    change (steps, T): |s_k - s_{k-1}| / |s_k| of every token; `threshold` draws a dashed line at that value.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    change = np.asarray(change)
    steps = np.arange(1, len(change) + 1)
    for i, token in enumerate(change.T):
        ax.plot(steps, token, color=GREY, linewidth=0.6, label=None if i else "one token")
    ax.plot(steps, np.median(change, axis=1), color=BLUE, linewidth=2.5, marker="o", markersize=4, label="median")
    if threshold is not None:
        ax.axhline(threshold, color=VERMILION, linestyle="--", label=f"threshold {threshold:g}")
    ax.set(yscale="log", xlabel="recurrence step k", ylabel=r"$\|s_k - s_{k-1}\| \,/\, \|s_k\|$")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def lens_ranks(ranks: Mapping[str, np.ndarray], levels: Sequence) -> np.ndarray:
    """How well each lens reads the answer inside the loop: its rank by level and step, one panel per
    lens; returns the axes.

    ranks: lens -> (levels, steps + 1), from step 0 on; 1 is the most likely token.  Dark means far from the top.
    """
    _, axes = plt.subplots(
        1, len(ranks), figsize=(5.6 * len(ranks), 0.9 + 0.3 * len(levels)), squeeze=False, layout="constrained"
    )
    norm = LogNorm(1, max(2, max(np.max(values) for values in ranks.values())))  # one scale for all panels
    for ax, (lens, values) in zip(axes[0], ranks.items(), strict=True):
        values = np.asarray(values, dtype=float)
        number_map(ax, values, np.char.mod("%.3g", values), 0, levels, norm, "viridis_r")
        ax.set_title(plain(lens))
    return axes[0]


def convergence_map(distance, words: Sequence[str], ax: Axes | None = None) -> Axes:
    """How far the state of every token is from its last one: tokens across, steps upwards, on a log colour scale.

    distance (steps, T): |s_k - s_r| for k = 0, 1, ...; words: the T tokens.  Dark is near, so a dark column is done.
    As in arXiv 2502.05171, figure 11.
    """
    distance = np.asarray(distance)
    if ax is None:
        _, ax = plt.subplots(figsize=(max(5, 0.19 * len(words) + 1.6), 4), layout="constrained")
    low = max(distance[distance > 0].min(), distance.max() / 1e4)  # what is nearer has arrived
    image = ax.imshow(np.maximum(distance, low), norm=LogNorm(), cmap="viridis", aspect="auto", origin="lower")
    ax.set_xticks(range(len(words)), map(word, words), rotation=90, fontsize=8)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(length=0)
    ax.set(xlabel="token at this position", ylabel="recurrence step")
    ax.figure.colorbar(image, ax=ax, fraction=0.03, pad=0.01, label=r"$\|s_k - s_r\|$")
    return ax


def trajectories(paths: Mapping[str, np.ndarray], title: str = "", ax: Axes | None = None) -> Axes:
    """Paths of states through a plane, one colour each: a ring where it starts, a square where it ends.

    paths: label -> (steps + 1, 2), coordinates after 0, 1, ... steps, as from `lens.principal_components`.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 4.4), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(paths)))
    for colour, (label, path) in zip(colours, paths.items(), strict=True):
        x, y = np.asarray(path).T
        ax.plot(x, y, "-", marker="o", markersize=3, linewidth=0.9, color=colour, label=plain(label))
        ax.plot(x[0], y[0], "o", markersize=9, markerfacecolor="white", color=colour)
        ax.plot(x[-1], y[-1], "s", markersize=9, markeredgecolor="white", color=colour, zorder=3)
    ax.set(title=plain(title), xlabel="first principal component", ylabel="second")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if len(paths) > 1:
        ax.legend(frameon=False, fontsize=9)
    return ax
