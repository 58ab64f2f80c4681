"""Every figure of the notebooks and the README.

A function takes plain data and, where it draws one panel, an optional `ax`; it returns the axes and never shows
or saves them.  Colours are told apart by colour-blind readers: dark means deep, vermilion means wrong.
Nothing but the notebooks and the command line imports this module.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"  # Okabe and Ito's, and a grey


# --- The wavefront: notebook 06_diffusion_forcing ---


def _depth_colours(deepest: int) -> tuple[ListedColormap, BoundaryNorm]:
    """One colour for every number of steps from 1 to `deepest`: light is shallow, dark is deep."""
    colours = plt.get_cmap("viridis_r")(np.linspace(0.08, 1.0, max(deepest, 2)))
    return ListedColormap(colours), BoundaryNorm(np.arange(0.5, max(deepest, 2) + 1), max(deepest, 2))


def _ink(colour) -> str:
    """Black or white, whichever can be read on this colour."""
    return "black" if np.dot(colour[:3], (0.3, 0.6, 0.1)) > 0.55 else "white"


def _word(tokenizer, token: int) -> str:
    """One token as it can be written into a cell."""
    return tokenizer.decode([token], skip_special_tokens=False).strip() or "·"


def _deepest(generation) -> int:
    if generation.trace is None:
        raise ValueError("generation.trace is None; generate with trace=True")
    if not generation.trace:
        raise ValueError("generation.trace is empty: the prompt gave the only token, and there was no outer step")
    return max(max(step.depths) for step in generation.trace)


def _draw_cells(ax: Axes, generation, prompt_length: int, steps: range, tokenizer=None) -> None:
    """Some outer steps as coloured cells over hatched frozen tokens; words inside with a tokenizer."""
    cmap, norm = _depth_colours(_deepest(generation))
    new = generation.tokens
    edge = []
    for y in steps:
        step = generation.trace[y]
        known = step.start - prompt_length + 1  # new tokens final before this step: cell 0 predicts the next
        edge.append(known)
        ax.barh(y, known, 1, align="edge", color="#F1F1F1", hatch="///", edgecolor="#CFCFCF", linewidth=0)
        for x, (depth, guess) in enumerate(zip(step.depths, step.guesses, strict=True), known):
            colour = cmap(norm(depth))
            ax.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.4))
            where, size = (x + 0.5, y + 0.5), np.clip(220 / len(new), 3, 6)
            if tokenizer is not None:
                ax.text(*where, _word(tokenizer, guess), ha="center", va="center", fontsize=7, color=_ink(colour))
                where, size = (x + 0.88, y + 0.22), 5
            if x < len(new) and guess != new[x]:
                ax.plot(*where, "o", color=VERMILION, markeredgecolor="white", markeredgewidth=0.5, markersize=size)
    # the right edge of what is final, as one staircase
    ax.step([*edge, edge[-1]], [*steps, steps.stop], where="pre", color="black", linewidth=1.3)


def wavefront(generation, prompt_length: int, tokenizer=None, ax: Axes | None = None) -> Axes:
    """The position x depth grid seen from above while a diagonal sampler runs: one row an outer step.

    generation: a Generation made with trace=True, for a prompt of `prompt_length` tokens.  A cell is drawn at the
    new token that it predicts; its colour is the recurrence steps its position has had.  Hatched tokens are frozen;
    a dot marks a guess that is not yet the final token.  With a tokenizer the tokens are written along the top, and
    a few outer steps around the first corrected guess are drawn large, with the guesses as words.  Drawn for a width
    of 12 inches.
    """
    deepest, new = _deepest(generation), generation.tokens
    if ax is None:
        _, ax = plt.subplots(figsize=(12, 6.6), layout="constrained")
    _draw_cells(ax, generation, prompt_length, range(len(generation.trace)))
    ax.set(xlim=(0, len(new)), ylim=(len(generation.trace), 0))
    ax.set_xlabel("new token that the cell predicts (1 is the first after the prompt)")
    ax.set_ylabel("outer step (time runs downwards)")
    ticks = np.array([1, *range(10, len(new) + 1, 10)]) if len(new) > 20 else np.arange(1, len(new) + 1)
    ax.set_xticks(ticks - 0.5, ticks)
    if tokenizer is not None and len(new) <= 100:
        top = ax.secondary_xaxis("top")
        top.set_xticks(np.arange(len(new)) + 0.5, [_word(tokenizer, t) for t in new], rotation=90, fontsize=6.5)
        top.tick_params(length=0, pad=2)
    prefill = generation.depth[0]  # the prompt ran at full depth, and gave the first new token
    rate = (generation.passes - prefill) / len(generation.trace) / prefill
    ax.plot([1, 1 + rate * len(generation.trace)], [0, len(generation.trace)], "--", color=BLUE, linewidth=1.6)
    ax.set_title(
        f"A wavefront of guesses moves through the text: {len(new)} tokens in {len(generation.trace)} outer steps,\n"
        f"{generation.passes / len(new):.2f} passes of the recurrent block a token "
        f"(one token after another: {prefill})",
        fontsize=12,
    )

    cmap, norm = _depth_colours(deepest)
    bar = ax.figure.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=ax, fraction=0.025, pad=0.01)
    ticks = np.unique(np.linspace(1, deepest, min(deepest, 8)).round().astype(int))
    bar.set_ticks(ticks, labels=ticks)
    bar.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.set_label("recurrence steps of the cell")
    handles = [
        Patch(facecolor="#F1F1F1", hatch="///", edgecolor="#CFCFCF", label="frozen: token and keys/values are final"),
        Patch(facecolor=cmap(norm(1)), label="the wavefront: positions in flight"),
        Line2D([], [], marker="o", linestyle="", color=VERMILION, markersize=5, label="guess that is corrected later"),
        Line2D([], [], color="black", label="edge of the frozen prefix"),
        Line2D([], [], color=BLUE, linestyle="--", label="edge of autoregressive decoding after as many passes"),
    ]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.16, 0.01), framealpha=1, fontsize=9.5, borderpad=0.8)

    width = max(len(step.depths) for step in generation.trace)
    if tokenizer is not None and len(new) >= 30 and width <= 0.12 * len(new):  # else there is no room
        first_cell = [step.start - prompt_length + 1 for step in generation.trace]
        corrected = (
            y
            for y, step in enumerate(generation.trace)
            if any(a != b for a, b in zip(step.guesses, new[first_cell[y] :], strict=False))
        )
        top = max(0, min(next(corrected, 0) - 3, len(generation.trace) - 9))
        steps = range(top, min(top + 9, len(generation.trace)))
        left, right = first_cell[top] - 1, max(first_cell[y] + len(generation.trace[y].depths) for y in steps)
        zoom = ax.inset_axes((0.56, 0.55, 0.43, 0.40))
        _draw_cells(zoom, generation, prompt_length, steps, tokenizer)
        zoom.set(xlim=(left, right), ylim=(steps.stop, top))
        zoom.set_xticks(np.arange(left, right) + 0.5, range(left + 1, right + 1))
        zoom.set_yticks(np.arange(top, steps.stop) + 0.5, range(top + 1, steps.stop + 1))
        zoom.tick_params(length=0, labelsize=7)
        zoom.set_title("the boxed outer steps, with what every cell guesses", fontsize=9)
        ax.add_patch(plt.Rectangle((left, top), right - left, len(steps), fill=False, linewidth=1, zorder=3))
    return ax


def _draw_columns(ax: Axes, generation, prompt_length: int, step: int, width: int, tokenizer=None) -> None:
    """The position x depth grid from the side, after `step` outer steps: one column of cells a token."""
    top = max(generation.depth[0], _deepest(generation))
    cmap, norm = _depth_colours(top)
    depths, words = {0: generation.depth[0]}, {0: generation.tokens[0]}
    frozen = 1  # the prefill has given the first token
    for outer in generation.trace[:step]:
        first = outer.start - prompt_length + 1
        cells = list(zip(outer.depths, outer.guesses, strict=True))
        depths.update({first + x: depth for x, (depth, _) in enumerate(cells)})
        words.update({first + x: guess for x, (_, guess) in enumerate(cells)})
        frozen = outer.frozen - prompt_length
    for x in range(min(width, max(depths) + 1)):
        for k in range(depths[x]):
            colour = "#DDDDDD" if x < frozen else cmap(norm(k + 1))
            ax.add_patch(plt.Rectangle((x, k), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.6))
        if tokenizer is not None:
            wrong = x < len(generation.tokens) and words[x] != generation.tokens[x]
            style = (
                dict(color=VERMILION, fontweight="bold") if wrong else dict(color="black" if x < frozen else "#555555")
            )
            ax.text(x + 0.5, depths[x] + 0.2, _word(tokenizer, words[x]), rotation=90, ha="center", fontsize=7, **style)
    ax.axvline(min(frozen, width), color="black", linewidth=1.3)
    ax.set(xlim=(0, width), ylim=(0, top + 3), xticks=[], yticks=[1, top], ylabel="depth")
    ax.spines[["top", "right"]].set_visible(False)


def wavefront_animation(generations: Mapping, prompt_length: int, tokenizer=None, frames: int = 32) -> bytes:
    """A GIF of samplers that race over the position x depth grid, one panel each; one frame is one outer step.

    generations: title -> Generation made with trace=True; for a fair race all with the same inner_steps, so that a
    frame is as many recurrent-block passes for each.  Grey columns are frozen, coloured ones in flight; the word on
    a column is what it predicts, in vermilion while that is not yet the final token.
    """
    from PIL import Image  # comes with matplotlib

    width = frames - 3  # with one new position an outer step, the last frames are at the right edge
    fig = Figure(figsize=(9, 1.9 * len(generations)), dpi=76)
    canvas = FigureCanvasAgg(fig)
    axes = fig.subplots(len(generations), squeeze=False)[:, 0]
    fig.subplots_adjust(left=0.06, right=0.99, bottom=0.03, top=1 - 0.13 / len(generations), hspace=0.2)
    images = []
    for frame in range(frames + 1):
        for ax, (title, generation) in zip(axes, generations.items(), strict=True):
            ax.clear()
            step = min(frame, len(generation.trace))
            _draw_columns(ax, generation, prompt_length, step, width, tokenizer)
            final = generation.trace[step - 1].frozen - prompt_length if step else 1
            ax.set_title(f"{title}: after {step} outer steps, {final} tokens are final", fontsize=9, loc="left")
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(48))
    gif = io.BytesIO()
    pauses = [350] * frames + [3000]  # milliseconds; the last frame stays
    images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=pauses, loop=0, optimize=True)
    return gif.getvalue()


def settling(unsettled: Sequence[float], movement: Sequence[float], ax: Axes | None = None) -> Axes:
    """How soon guesses settle, and how soon states do, on a logarithmic axis.

    One number a recurrence step each, from step 1 on.  unsettled: share of guesses that are not yet the final one
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
    speeds = [results[name][0] / results[baseline][0] for name in names]
    accuracies = [results[name][1] for name in names]
    for ax, values, form in ((axes[0], speeds, "{:.1f} x"), (axes[1], accuracies, "{:.0%}")):
        bars = ax.barh(names, values, color=colours, height=0.7)
        ax.bar_label(bars, [form.format(v) for v in values], padding=3, fontsize=9)
        ax.margins(x=0.12)
        ax.grid(axis="x", alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[0].axvline(1, color="black", linestyle=":", linewidth=1)
    axes[0].set_xlabel(f"tokens per second, relative to {baseline}")
    axes[1].set(xlabel="correct answers", xlim=(0, 1.15), xticks=[0, 0.5, 1], xticklabels=["0 %", "50 %", "100 %"])
    return axes


def pareto(points: Mapping[str, tuple[float, float]], title: str = "", ax: Axes | None = None) -> Axes:
    """Settings of all samplers on the plane of speed and accuracy, and the front that no other setting beats.

    points: "sampler, setting" -> (tokens per second, share of answers that are right); one colour a sampler.
    """
    ax = ax or plt.subplots(figsize=(5.2, 4.4), layout="constrained")[1]
    kinds = list(dict.fromkeys(name.split(",")[0] for name in points))
    for kind, colour in zip(kinds, plt.get_cmap("tab10")(np.arange(len(kinds))), strict=True):
        own = np.array([xy for name, xy in points.items() if name.split(",")[0] == kind])
        ax.scatter(own[:, 0], 100 * own[:, 1], s=34, color=colour, label=kind, alpha=0.85, edgecolor="white")
    fastest_first = sorted(points.values(), reverse=True)
    front = [xy for i, xy in enumerate(fastest_first) if xy[1] > max([y for _, y in fastest_first[:i]], default=-1)]
    xs, ys = np.array(front).T
    ax.plot(xs, 100 * ys, color=GREY, zorder=0, drawstyle="steps-pre")
    ax.set(xlabel="tokens per second (median)", ylabel="answers right (%)", title=title, ylim=(-4, 104))
    ax.legend(fontsize=8)
    return ax


def knobs(results: Mapping[str, Sequence[tuple]], defaults: Mapping[str, object] | None = None) -> np.ndarray:
    """What each setting costs and gives, one column a setting; returns the axes (3, number of settings).

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
            ax.set_xticks(x, [str(v) for v in values], fontsize=8)
            ax.margins(x=0.12, y=0.15)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        cost.set_title(name, fontsize=10)
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


# --- The state over the loop: notebook 01_recurrent_block ---


def state_norms(norms, ax: Axes | None = None) -> Axes:
    """Size of the state over recurrence steps, one line for each label.

    norms: label -> (steps + 1,), root mean square of the state before the first step and after every step.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    ax.set_prop_cycle(color=[VERMILION, BLUE, GREEN])
    for label, values in norms.items():
        ax.plot(range(len(values)), values, linewidth=2, label=label)
    ax.set(xlabel="recurrence step", ylabel="state, root mean square")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def relative_change(change, threshold: float | None = None, ax: Axes | None = None) -> Axes:
    """How far each recurrence step moves the state, on a log axis: a thin line a token, a thick one their median.

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


# --- Inside the loop: notebook 03_thinking_longer ---


def _level_lines(ax: Axes, curves: Mapping, beyond: Sequence) -> None:
    """One line a level, light for easy and dark for hard, dashed for those `beyond` training; the depth in octaves."""
    shades = plt.get_cmap("viridis_r")(np.linspace(0.12, 1.0, len(curves)))
    for shade, (level, curve) in zip(shades, curves.items(), strict=True):
        style = "--" if level in beyond else "-"
        ax.plot(list(curve), list(curve.values()), style, marker="o", markersize=4, color=shade, label=f"{level}")
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
    """Exact match against depth, one line a level: what a problem needs is where its line rises.

    curves: level, easiest first -> {recurrence steps: share of exact matches, 0 to 1}; `beyond`: levels to dash.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    _level_lines(ax, curves, beyond)
    ax.set(title=title, ylabel="exact match", ylim=(-0.04, 1.04))
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    return ax


def change_curves(curves: Mapping, threshold: float | None = None, title: str = "", ax: Axes | None = None) -> Axes:
    """How far each step moves the state, one line a level on a log axis; `threshold` draws a dotted line there.

    curves: level, easiest first -> {recurrence step: |s_k - s_(k-1)| / |s_k|, one number for all its tokens}.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    _level_lines(ax, curves, ())
    if threshold is not None:
        ax.axhline(threshold, color=VERMILION, linestyle=":", linewidth=1.5)
    ax.set(title=title, yscale="log", ylabel=r"$\|s_k - s_{k-1}\| \,/\, \|s_k\|$")
    return ax


def _number_map(ax: Axes, values: np.ndarray, words: np.ndarray, first_step: int, levels, norm, cmap: str) -> None:
    """A table in colours: one row a level, one column a step, a word in every cell."""
    ax.imshow(values, norm=norm, cmap=cmap, aspect="auto", origin="lower")
    for (row, column), word in np.ndenumerate(words):
        ink = _ink(plt.get_cmap(cmap)(norm(values[row, column])))
        ax.text(column, row, word, ha="center", va="center", fontsize=8, color=ink)
    ax.set_xticks(range(values.shape[1]), range(first_step, first_step + values.shape[1]))
    ax.set_yticks(range(len(levels)), levels)
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
    _number_map(ax, percent, words, 1, list(steps), Normalize(0, 100), "Blues")
    ax.set_title(title)
    return ax


def lens_ranks(ranks: Mapping[str, np.ndarray], levels: Sequence) -> np.ndarray:
    """How well lenses read the answer on the way, one panel each: its rank by level and step; returns the axes.

    ranks: lens -> (levels, steps + 1), from step 0 on; 1 is the most likely token.  Dark means far from the top.
    """
    _, axes = plt.subplots(
        1, len(ranks), figsize=(5.6 * len(ranks), 0.9 + 0.3 * len(levels)), squeeze=False, layout="constrained"
    )
    norm = LogNorm(1, max(2, max(np.max(values) for values in ranks.values())))  # one scale for all panels
    for ax, (lens, values) in zip(axes[0], ranks.items(), strict=True):
        values = np.asarray(values, dtype=float)
        _number_map(ax, values, np.char.mod("%.3g", values), 0, levels, norm, "viridis_r")
        ax.set_title(lens)
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
    ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
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
        ax.plot(x, y, "-", marker="o", markersize=3, linewidth=0.9, color=colour, label=label)
        ax.plot(x[0], y[0], "o", markersize=9, markerfacecolor="white", color=colour)
        ax.plot(x[-1], y[-1], "s", markersize=9, markeredgecolor="white", color=colour, zorder=3)
    ax.set(title=title, xlabel="first principal component", ylabel="second")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if len(paths) > 1:
        ax.legend(frameon=False, fontsize=9)
    return ax


# --- Training: notebook 02_training_through_depth ---


def depth_histogram(depths, marks: Mapping[str, float], ax: Axes | None = None) -> Axes:
    """How often each depth is drawn: one bar a number of steps, and a line for each of `marks` (label -> depth).

    depths (n,): whole numbers from 1 up.  What lies above the 99.9 % quantile is not drawn.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    depths = np.asarray(depths)
    last = int(np.quantile(depths, 0.999))
    share = np.bincount(depths, minlength=last + 1)[: last + 1] / len(depths)
    ax.bar(range(last + 1), share, width=1.0, color=GREY)
    for (label, depth), style in zip(marks.items(), ("-", "--", ":"), strict=False):
        ax.axvline(depth, color=BLUE, linestyle=style, label=f"{label} {depth:.4g}")
    ax.set(xlabel="recurrence steps r", ylabel="share of draws", xlim=(0, last + 1))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return ax


def gradient_by_step(norms: Mapping[str, Sequence[float]], title: str = "", ax: Axes | None = None) -> Axes:
    """Size of the gradient that reaches the embedding through each recurrence step, on a log axis; zeros are left out.

    norms: label -> one number a step, from step 1 on.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    styles = zip((GREY, GREEN, BLUE, VERMILION), ("o", "s", "D", "^"), (11, 8, 6, 4), strict=True)
    for (label, values), (colour, marker, size) in zip(norms.items(), styles, strict=False):
        values = np.asarray(values, dtype=float)
        shown = np.where(values > 0, values, np.nan)
        ax.plot(np.arange(1, len(values) + 1), shown, "-", marker=marker, markersize=size, color=colour, label=label)
    ax.set(title=title, yscale="log", xlabel="recurrence step", ylabel="gradient of the loss at e")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return ax


def over_training(panels: Mapping[str, Mapping[str, tuple]]) -> np.ndarray:
    """What changes while a model is trained, one panel a quantity and one line a run; returns the axes.

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
            ax.plot(np.asarray(steps)[kept], values[kept], style, color=colour, linewidth=1.6, label=label)
        ax.set(xlabel="optimiser step", ylabel=quantity)
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    handles = {line.get_label(): line for ax in axes[0] for line in ax.lines if line.get_label() in looks}
    if handles:
        fig.legend(
            handles.values(), handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=9
        )
    return axes[0]


# --- Keys and values: notebook 04_kv_cache ---


def slot_map(slots: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Which slot each recurrence step writes, and which step later tokens read there; one panel a cache.

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
        ax.set(xlim=(0.4, len(row) + 0.6), ylim=(rows + 0.9, -0.6), title=title, xlabel="recurrence step k")
        ax.set_xticks(range(1, len(row) + 1))
        ax.set_yticks([*sorted(kept), rows + 0.4], [*(f"slot {slot}" for slot in sorted(kept)), "k reads"])
        ax.tick_params(length=0, labelsize=9)
        ax.spines[:].set_visible(False)
    return axes[0]


def by_cache(
    shares: Mapping[str, Mapping[str, float]], bytes_per_token: Mapping[str, int], ax: Axes | None = None
) -> Axes:
    """Right answers with every kind of cache, one bar a group of problems.

    shares: group -> {cache: share of right answers, 0 to 1}; bytes_per_token: cache -> bytes, written under its name.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(10, 3.6), layout="constrained")
    caches, width = list(bytes_per_token), 0.8 / len(shares)
    shades = plt.get_cmap("viridis_r")(np.linspace(0.12, 1.0, len(shares)))
    for i, (group, row) in enumerate(shares.items()):
        x = np.arange(len(caches)) + (i - (len(shares) - 1) / 2) * width
        bars = ax.bar(x, [row[cache] for cache in caches], 0.94 * width, color=shades[i], label=group)
        ax.bar_label(bars, [f"{100 * row[cache]:.0f}" for cache in caches], fontsize=8, padding=1)
    ax.set_xticks(range(len(caches)), [f"{cache}\n{bytes_per_token[cache] / 1024:.1f} KiB" for cache in caches])
    ax.set(ylabel="right answers", ylim=(0, 1.1), xlabel="keys and values kept, and their size for a token")
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ax.tick_params(axis="x", length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


# --- What a token costs: notebook 08_lossless_wavefront ---


def passes_by_level(panels: Mapping[str, Mapping[str, Mapping]], full: float) -> np.ndarray:
    """Passes a token by level, one panel a family: measured ones as dots, predicted ones as lines; returns the axes.

    panels: family -> {setting: {level: (measured, predicted)}}; `full`: what autoregressive decoding costs, dashed.
    """
    fig, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (family, settings) in zip(axes[0], panels.items(), strict=True):
        for (setting, levels), colour in zip(settings.items(), (BLUE, GREEN, VERMILION, "black"), strict=False):
            measured, predicted = zip(*levels.values(), strict=True)
            ax.plot(list(levels), predicted, "-", color=colour, linewidth=1.2)
            ax.plot(list(levels), measured, "o", color=colour, markersize=7, label=setting)
        ax.axhline(full, color="black", linestyle="--", linewidth=1, label="autoregressive")
        ax.set(title=family, xlabel="level", xticks=list(levels), ylim=(0, 1.08 * full))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("passes a token")
    fig.suptitle("dots: measured; lines: predicted", fontsize=10)
    handles = {h.get_label(): h for ax in axes[0] for h in ax.get_legend_handles_labels()[0]}
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return axes[0]


# --- The batching engine: notebook 09_continuous_batching ---


def gantt(runs: Mapping[str, Sequence], title: str = "") -> np.ndarray:
    """Who was in which pass of the batching engine, one panel a run: a lane a slot, passes to the right.

    runs: label -> passes as `Engine(on_pass=...)` gives them (`stage`, and `slots` of (row, request, depth after it)).
    A full block is a recurrence step, darker the deeper; a low black one the coda, a low grey one the prelude; a thin
    line joins the passes of one request, whose number stands at its start.  Returns the axes, an array of one a run.
    """
    slots = [slot for passes in runs.values() for one in passes for slot in one.slots]
    lanes, deepest = 1 + max(row for row, _, _ in slots), max(depth for _, _, depth in slots)
    length = max(map(len, runs.values()))
    cmap, norm = _depth_colours(deepest)
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
            ax.text(own[0] + 0.003 * length, row - 0.34, request, fontsize=6.5, va="bottom")
        ax.set(xlim=(0, length), ylim=(lanes - 0.5, -0.75))
        ax.set_yticks(range(lanes), [f"slot {row}" for row in range(lanes)], fontsize=8)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_title(label, loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("pass")
    stages = {one.stage.name for passes in runs.values() for one in passes}
    handles = [Patch(facecolor=lows[s][1], label=lows[s][0]) for s in lows if s in stages]
    fig.suptitle(title)
    if handles:
        fig.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    bar = fig.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=axes[:, 0], fraction=0.02, pad=0.01, aspect=30)
    ticks = np.unique(np.linspace(1, deepest, min(deepest, 8)).round().astype(int))
    bar.set_ticks(ticks, labels=ticks)
    bar.minorticks_off()
    bar.set_label("depth after the pass")
    return axes[:, 0]


# --- Depth by token: notebook 05_adaptive_exit ---


def token_depths(
    words: Sequence[str],
    depths: Sequence[int],
    marked: Sequence[int] = (),
    title: str = "",
    line: int = 88,
    ax: Axes | None = None,
) -> Axes:
    """A text with the recurrence steps of every token: dark is deep, and the number stands under the word.

    words, depths: one a token; marked: the tokens to frame, by index; a line of text is `line` letters wide.
    """
    places, x, y = [], 0.0, 0
    for word in words:
        width = max(len(word), 2) + 1.0
        if x + width > line:
            x, y = 0.0, y + 1
        places.append((x, y, width))
        x += width
    if ax is None:
        _, ax = plt.subplots(figsize=(0.125 * line, 0.62 * (y + 1) + 0.35), layout="constrained")
    cmap, norm = _depth_colours(max(depths))
    for i, (word, depth, (x, y, width)) in enumerate(zip(words, depths, places, strict=True)):
        colour = cmap(norm(depth))
        frame = dict(edgecolor=VERMILION, linewidth=2.2) if i in marked else dict(edgecolor="none")
        ax.add_patch(plt.Rectangle((x + 0.1, y + 0.08), width - 0.2, 0.84, facecolor=colour, **frame))
        ink = dict(ha="center", va="center", color=_ink(colour))
        ax.text(x + width / 2, y + 0.36, word, fontsize=9.5, **ink)
        ax.text(x + width / 2, y + 0.74, depth, fontsize=7, **ink)
    ax.set(xlim=(0, line), ylim=(y + 1, 0))
    ax.set_title(title, fontsize=9.5, loc="left")
    ax.set_axis_off()
    return ax


def exit_thresholds(results: Mapping[str, Mapping[str, Sequence[tuple]]]) -> np.ndarray:
    """What a threshold gives and what it asks: right answers above, mean depth below; returns the axes (2, criteria).

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
                ax.plot(thresholds, values, "-", marker=marker, markersize=5, color=colour, label=group)
        top.set(title=criterion, ylim=(-0.05, 1.05))
        bottom.set(xscale="log", xlabel="threshold", ylim=(0, None))
        for ax in (top, bottom):
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("right answers")
    axes[0, 0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes[1, 0].set_ylabel("steps a token")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return axes


def depth_accuracy(
    curves: Mapping[str, Sequence[tuple[float, float]]], title: str = "", ax: Axes | None = None
) -> Axes:
    """Right answers against steps a token, one line a rule, the first one grey: up and to the left is better.

    curves: rule -> list of (mean depth of a token, share of right answers from 0 to 1).
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
    styles = zip(("#888888", BLUE, VERMILION, GREEN), ("s--", "o-", "D-", "^-"), strict=True)
    for (rule, points), (colour, style) in zip(curves.items(), styles, strict=False):
        ax.plot(*zip(*sorted(points), strict=True), style, color=colour, markersize=5, label=rule)
    ax.set(title=title, xlabel="steps a token", ylabel="right answers", xlim=(0, None), ylim=(-0.05, 1.05))
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


# --- Two ways to denoise: notebook 07_diffusion_language_models ---


def noise_levels(panels: Mapping[str, np.ndarray]) -> np.ndarray:
    """How noisy every position still is while a sampler runs, one panel a sampler; returns the axes.

    panels: title -> (sampling steps, positions), from 1 for noise alone to 0 for done.  Dark is done.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.4), squeeze=False, layout="constrained")
    for ax, (title, levels) in zip(axes[0], panels.items(), strict=True):
        image = ax.imshow(np.asarray(levels, dtype=float), norm=Normalize(0, 1), cmap="viridis", aspect="auto")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("position")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("sampling step (time runs downwards)")
    fig.colorbar(image, ax=axes, fraction=0.02, pad=0.01, label="noise left")
    return axes[0]


def _draw_unmasking(ax: Axes, passes: Sequence, tokenizer=None) -> None:
    """Passes of a masked-diffusion model as coloured cells over hatched known tokens; words inside with a tokenizer."""
    cmap, text = plt.get_cmap("viridis_r"), passes[-1].guesses
    for y, one in enumerate(passes):
        for x, (known, guess, sure) in enumerate(zip(one.known, one.guesses, one.confidence, strict=True)):
            if known:
                style = dict(facecolor="#F1F1F1", hatch="///", edgecolor="#CFCFCF", linewidth=0)
                ax.add_patch(plt.Rectangle((x, y), 1, 1, **style))
            else:
                colour = cmap(sure)
                ax.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.4))
                if tokenizer is not None:
                    word = _word(tokenizer, guess)
                    ax.text(x + 0.5, y + 0.55, word, ha="center", va="center", fontsize=6, color=_ink(colour))
            if guess != text[x]:
                ax.plot(x + 0.5, y + 0.14, "o", color=VERMILION, markeredgecolor="white", markersize=4)


def unmasking_and_wavefront(passes: Sequence, generation, prompt_length: int, tokenizer=None) -> np.ndarray:
    """Tokens unmasked anywhere in the text, and states refined along a diagonal, side by side; returns the two axes.

    passes: of a masked-diffusion model, each with `known` (which tokens stood before it), `guesses` and `confidence`
    (0 to 1), one entry a position; a cell is a hidden token, dark where the guess is sure.  generation: a Generation
    made with trace=True for a prompt of `prompt_length` tokens, drawn as in `wavefront`.  Hatched tokens stand; a dot
    marks a guess that is not what the text ends with.
    """
    widths = len(passes[0].guesses), 2 * len(generation.tokens)
    fig, axes = plt.subplots(1, 2, figsize=(14, 4.8), width_ratios=widths, layout="constrained")
    _draw_unmasking(axes[0], passes, tokenizer)
    _draw_cells(axes[1], generation, prompt_length, range(len(generation.trace)), tokenizer)
    limits = (len(passes[0].guesses), len(passes)), (len(generation.tokens), len(generation.trace))
    names = ("pass of the denoiser", "token of the canvas"), ("outer step", "new token that the cell predicts")
    for ax, (columns, rows), (y_name, x_name) in zip(axes, limits, names, strict=True):
        ax.set(xlim=(0, columns), ylim=(rows, 0), xlabel=x_name, ylabel=f"{y_name} (time runs downwards)")
        for axis, n in ((ax.xaxis, columns), (ax.yaxis, rows)):
            shown = np.arange(1, n + 1, max(1, -(-n // 20)))
            axis.set_ticks(shown - 0.5, shown)
        ax.tick_params(length=0, labelsize=8)
    axes[0].set_title("masked diffusion: tokens are uncovered where they are sure", fontsize=10)
    axes[1].set_title("diffusion forcing: states refined along a diagonal", fontsize=10)
    cmap, norm = _depth_colours(_deepest(generation))
    left = plt.cm.ScalarMappable(Normalize(0, 1), "viridis_r")
    fig.colorbar(left, ax=axes[0], fraction=0.02, pad=0.01, label="probability of the guess")
    bar = fig.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=axes[1], fraction=0.04, pad=0.01)
    bar.set_label("recurrence steps of the cell")
    bar.set_ticks(range(1, cmap.N + 1))
    bar.minorticks_off()
    for text in axes[1].texts:  # the last windows reach beyond the last token
        text.set_clip_on(True)
    handles = [
        Patch(facecolor="#F1F1F1", hatch="///", edgecolor="#CFCFCF", label="token that stands"),
        Line2D([], [], marker="o", linestyle="", color=VERMILION, label="guess that is not the last one"),
        Line2D([], [], color="black", label="edge of the frozen prefix"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return axes


# --- Full scale: notebook 10_full_scale ---


def pass_times(machines: Mapping[str, tuple[float, float]], read: float, work: float, most: int = 1024) -> Axes:
    """Least time of a pass against the positions in it, both axes logarithmic: reading, or arithmetic, if that is more.

    machines: name -> (bytes a second, operations a second); read: bytes of a pass; work: operations of one position.
    A dot marks where arithmetic begins to take longer.
    """
    _, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    positions = np.unique(np.geomspace(1, most, 200))
    for (name, (bandwidth, speed)), colour in zip(machines.items(), (BLUE, VERMILION, GREEN, "black"), strict=False):
        ax.plot(positions, 1e3 * np.maximum(read / bandwidth, positions * work / speed), color=colour, label=name)
        ax.plot(read / bandwidth * speed / work, 1e3 * read / bandwidth, "o", color=colour, markersize=6)
    ax.set(xscale="log", yscale="log", xlabel="positions in a pass", ylabel="ms a pass, at least")
    ax.grid(alpha=0.25, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="upper left")
    return ax


def bytes_by_part(bars: Mapping[str, Mapping[str, float]]) -> Axes:
    """What a token makes the machine read, in GB: a bar a sampler, stacked by part; bars: sampler -> {part: bytes}."""
    _, ax = plt.subplots(figsize=(8.0, 0.5 + 0.42 * len(bars)), layout="constrained")
    left = np.zeros(len(bars))
    for part, colour in zip(next(iter(bars.values())), (BLUE, GREEN, VERMILION, GREY), strict=False):
        width = np.array([1e-9 * parts[part] for parts in bars.values()])
        ax.barh(list(bars), width, left=left, height=0.65, color=colour, label=part)
        left += width
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:.3g}", va="center", fontsize=9)
    ax.invert_yaxis()
    ax.set(xlabel="GB a token", xlim=(0, 1.1 * left.max()))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    return ax
