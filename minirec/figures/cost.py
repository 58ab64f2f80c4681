"""What a sampler costs and what it gives: notebooks 06, 08 and 10, and the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from minirec.figures.ink import BLUE, GREEN, GREY, VERMILION, plain


def speed_accuracy(results: Mapping[str, tuple[float, float]], baseline: str) -> np.ndarray:
    """Samplers by measured speed and by correct answers, one row each; returns the two axes.

    results: name -> (tokens/s, accuracy from 0 to 1).  Speeds are drawn relative to that of `baseline`.  Names that
    begin with "autoregressive" have a colour of their own: they are what a sampler has to beat.
    """
    _, axes = plt.subplots(
        1, 2, figsize=(10, 0.9 + 0.36 * len(results)), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    names = list(results)
    colours = [BLUE if name.startswith("autoregressive") else VERMILION for name in names]
    shown = [plain(name) for name in names]
    speeds = [results[name][0] / results[baseline][0] for name in names]
    accuracies = [results[name][1] for name in names]
    for ax, values, form in ((axes[0], speeds, "{:.1f} x"), (axes[1], accuracies, "{:.0%}")):
        bars = ax.barh(shown, values, color=colours, height=0.7)
        ax.bar_label(bars, [form.format(v) for v in values], padding=3, fontsize=9)
        ax.margins(x=0.12)
        ax.grid(axis="x", alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[0].axvline(1, color="black", linestyle=":", linewidth=1)
    axes[0].set_xlabel(f"tokens per second, relative to {plain(baseline)}")
    axes[1].set(xlabel="correct answers", xlim=(0, 1.15), xticks=[0, 0.5, 1], xticklabels=["0 %", "50 %", "100 %"])
    return axes


def pareto(points: Mapping[str, tuple[float, float]], title: str = "", ax: Axes | None = None) -> Axes:
    """Settings of all samplers on the plane of speed and accuracy, and the front that no other setting beats.

    points: "sampler, setting" -> (tokens per second, share of answers that are right); one colour per sampler.
    """
    ax = ax or plt.subplots(figsize=(5.2, 4.4), layout="constrained")[1]
    kinds = list(dict.fromkeys(name.split(",")[0] for name in points))
    for kind, colour in zip(kinds, plt.get_cmap("tab10")(np.arange(len(kinds))), strict=True):
        own = np.array([xy for name, xy in points.items() if name.split(",")[0] == kind])
        ax.scatter(own[:, 0], 100 * own[:, 1], s=34, color=colour, label=plain(kind), alpha=0.85, edgecolor="white")
    fastest_first = sorted(points.values(), reverse=True)
    front = [xy for i, xy in enumerate(fastest_first) if xy[1] > max([y for _, y in fastest_first[:i]], default=-1)]
    xs, ys = np.array(front).T
    ax.plot(xs, 100 * ys, color=GREY, zorder=0, drawstyle="steps-pre")
    ax.set(xlabel="tokens per second (median)", ylabel="answers right (%)", title=plain(title), ylim=(-4, 104))
    ax.legend(fontsize=8)
    return ax


def knobs(results: Mapping[str, Sequence[tuple]], defaults: Mapping[str, object] | None = None) -> np.ndarray:
    """What each setting costs and gives, one column per setting; returns the axes (3, number of settings).

    results: setting -> list of (value, passes per token, prelude-and-coda calls per token, cells per token, share of
    texts equal to autoregressive decoding, share of correct answers).  The value in `defaults` is marked.
    """
    fig, axes = plt.subplots(
        3, len(results), figsize=(2.0 * len(results), 6), sharey="row", squeeze=False, layout="constrained"
    )
    for (name, rows), (cost, work, quality) in zip(results.items(), axes.T, strict=True):
        values, passes, decodes, cells, same, correct = zip(*rows, strict=True)
        x = range(len(values))
        cost.plot(x, passes, "o-", color=BLUE, label="recurrent-block passes")
        cost.plot(x, decodes, "s--", color=GREEN, label="prelude and coda calls")
        work.semilogy(x, cells, "o-", color="black")
        quality.plot(x, same, "o-", color=BLUE, markersize=10, label="same text as autoregressive")
        quality.plot(x, correct, "s--", color=VERMILION, markersize=5, label="correct answer")
        for ax in (cost, work, quality):
            if defaults and defaults.get(name) in values:
                ax.axvline(values.index(defaults[name]), color=GREY, linestyle=":", zorder=0)
            ax.set_xticks(x, [plain(v) for v in values], fontsize=8)
            ax.margins(x=0.12, y=0.15)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        cost.set_title(plain(name), fontsize=10)
    axes[0, 0].set(ylabel="calls per token", ylim=(0, None))
    axes[1, 0].set_ylabel("cells per token")
    low, high = axes[1, 0].get_ylim()
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200) if low <= t <= high]
    axes[1, 0].set_yticks(ticks, [str(t) for t in ticks])
    axes[1, 0].minorticks_off()
    axes[2, 0].set(ylabel="share of problems", ylim=(-0.05, 1.1))
    for row, where in ((axes[0], "upper center"), (axes[2], "lower center")):
        fig.legend(*row[0].get_legend_handles_labels(), loc=f"outside {where}", ncols=2, frameon=False, fontsize=9)
    return axes


def passes_by_level(panels: Mapping[str, Mapping[str, Mapping]], full: float) -> np.ndarray:
    """Passes per token by level, one panel per family: dots are measured, lines predicted; returns the axes.

    panels: family -> {setting: {level: (measured, predicted)}}; `full`: what autoregressive decoding costs, dashed.
    """
    fig, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (family, settings) in zip(axes[0], panels.items(), strict=True):
        for (setting, levels), colour in zip(settings.items(), (BLUE, GREEN, VERMILION, "black"), strict=False):
            measured, predicted = zip(*levels.values(), strict=True)
            ax.plot(list(levels), predicted, "-", color=colour, linewidth=1.2)
            ax.plot(list(levels), measured, "o", color=colour, markersize=7, label=plain(setting))
        ax.axhline(full, color="black", linestyle="--", linewidth=1, label="autoregressive")
        ax.set(title=plain(family), xlabel="level", xticks=list(levels), ylim=(0, 1.08 * full))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("passes per token")
    fig.suptitle("dots: measured; lines: predicted", fontsize=10)
    handles = {h.get_label(): h for ax in axes[0] for h in ax.get_legend_handles_labels()[0]}
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return axes[0]


def pass_times(machines: Mapping[str, tuple[float, float]], read: float, work: float, most: int = 1024) -> Axes:
    """Least time of a pass against the positions in it, both axes logarithmic: the longer of reading and
    arithmetic.

    machines: name -> (bytes per second, operations per second); read: bytes per pass; work: operations per position.
    A dot marks where arithmetic begins to take longer.
    """
    _, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    positions = np.unique(np.geomspace(1, most, 200))
    for (name, (bandwidth, speed)), colour in zip(machines.items(), (BLUE, VERMILION, GREEN, "black"), strict=False):
        ax.plot(
            positions, 1e3 * np.maximum(read / bandwidth, positions * work / speed), color=colour, label=plain(name)
        )
        ax.plot(read / bandwidth * speed / work, 1e3 * read / bandwidth, "o", color=colour, markersize=6)
    ax.set(xscale="log", yscale="log", xlabel="positions in a pass", ylabel="ms per pass, at least")
    ax.grid(alpha=0.25, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="upper left")
    return ax


def bytes_by_part(bars: Mapping[str, Mapping[str, float]]) -> Axes:
    """GB that the machine reads per token: a bar per sampler, stacked by part; bars: sampler -> {part: bytes}."""
    _, ax = plt.subplots(figsize=(8.0, 0.5 + 0.42 * len(bars)), layout="constrained")
    left = np.zeros(len(bars))
    for part, colour in zip(next(iter(bars.values())), (BLUE, GREEN, VERMILION, GREY), strict=False):
        width = np.array([1e-9 * parts[part] for parts in bars.values()])
        ax.barh([plain(sampler) for sampler in bars], width, left=left, height=0.65, color=colour, label=plain(part))
        left += width
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:.3g}", va="center", fontsize=9)
    ax.invert_yaxis()
    ax.set(xlabel="GB per token", xlim=(0, 1.1 * left.max()))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    return ax
