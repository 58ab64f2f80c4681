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
from matplotlib.colors import BoundaryNorm, ListedColormap
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
    if not generation.trace:
        raise ValueError("generation.trace is empty; generate with trace=True")
    return max(max(step.depths) for step in generation.trace)


def _draw_cells(ax: Axes, generation, prompt_length: int, tokenizer=None, steps: int | None = None) -> None:
    """The first `steps` outer steps as coloured cells over hatched frozen tokens; words inside with a tokenizer."""
    cmap, norm = _depth_colours(_deepest(generation))
    new = generation.tokens
    trace = generation.trace[:steps]
    for y, step in enumerate(trace):
        known = step.start - prompt_length + 1  # new tokens final before this step: cell 0 predicts the next
        ax.barh(
            y, known, height=1, left=0, color="#F1F1F1", hatch="///", edgecolor="#CFCFCF", linewidth=0, align="edge"
        )
        for x, (depth, guess) in enumerate(zip(step.depths, step.guesses, strict=True), known):
            colour = cmap(norm(depth))
            ax.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.4))
            wrong = x < len(new) and guess != new[x]
            if tokenizer is not None:
                ax.text(
                    x + 0.5, y + 0.55, _word(tokenizer, guess), ha="center", va="center", fontsize=7, color=_ink(colour)
                )
            if wrong:
                where = (x + 0.88, y + 0.22) if tokenizer is not None else (x + 0.5, y + 0.5)
                size = 4.5 if tokenizer is not None else 3.2
                ax.plot(*where, "o", color=VERMILION, markeredgecolor="white", markeredgewidth=0.5, markersize=size)
    # the right edge of what is final, as one staircase
    edge = [step.start - prompt_length + 1 for step in trace]
    ax.step([*edge, edge[-1]], range(len(edge) + 1), where="pre", color="black", linewidth=1.3)


def wavefront(generation, prompt_length: int, tokenizer=None, ax: Axes | None = None) -> Axes:
    """The position x depth grid seen from above while a diagonal sampler runs: one row an outer step.

    generation: a Generation made with trace=True, for a prompt of `prompt_length` tokens.  A cell is drawn at the
    new token that it predicts; its colour is the recurrence steps its position has had.  Hatched tokens are frozen;
    a dot marks a guess that is not yet the final token.  With a tokenizer the tokens are written along the top, and
    the first outer steps are drawn large, with the guesses as words.  Drawn for a width of 12 inches.
    """
    deepest, new = _deepest(generation), generation.tokens
    if ax is None:
        _, ax = plt.subplots(figsize=(12, 6.6), layout="constrained")
    _draw_cells(ax, generation, prompt_length)
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
        zoom = ax.inset_axes((0.56, 0.55, 0.43, 0.40))
        steps = min(9, len(generation.trace))
        _draw_cells(zoom, generation, prompt_length, tokenizer, steps)
        last = max(s.start - prompt_length + 1 + len(s.depths) for s in generation.trace[:steps])
        zoom.set(xlim=(0, last), ylim=(steps, 0), xticks=np.arange(last) + 0.5, yticks=np.arange(steps) + 0.5)
        zoom.set_xticklabels(range(1, last + 1))
        zoom.set_yticklabels(range(1, steps + 1))
        zoom.tick_params(length=0, labelsize=7)
        zoom.set_title(f"the first {steps} outer steps, with what every cell guesses", fontsize=9)
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
    fig = Figure(figsize=(9, 1.9 * len(generations)), dpi=76, layout="constrained")
    canvas = FigureCanvasAgg(fig)
    axes = fig.subplots(len(generations), squeeze=False)[:, 0]
    images = []
    for frame in range(frames + 1):
        for ax, (title, generation) in zip(axes, generations.items(), strict=True):
            ax.clear()
            step = min(frame, len(generation.trace))
            _draw_columns(ax, generation, prompt_length, step, width, tokenizer)
            final = generation.trace[step - 1].frozen - prompt_length if step else 1
            ax.set_title(f"{title}: after {step} outer steps, {final} tokens are final", fontsize=9, loc="left")
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(24))
    gif = io.BytesIO()
    pauses = [350] * frames + [3000]  # milliseconds; the last frame stays
    images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=pauses, loop=0, optimize=True)
    return gif.getvalue()


def settling(agreement: Sequence[float], movement: Sequence[float], ax: Axes | None = None) -> Axes:
    """How soon guesses are right: the share that is already the final one, and how far the state still moves.

    agreement, movement: one number a recurrence step, from step 1 on; shares from 0 to 1, and |s_k - s_(k-1)| / |s_k|.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    steps = range(1, len(agreement) + 1)
    ax.plot(steps, agreement, "o-", color=BLUE, label="share of guesses that equal the one at the last step")
    ax.plot(steps, movement, "s--", color=VERMILION, label="median relative movement of the state in this step")
    ax.set(xlabel="recurrence step", xticks=steps, ylim=(-0.04, max(1.04, *movement) + 0.02))
    ax.legend(frameon=False, loc="center right")
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


def knobs(results: Mapping[str, Sequence[tuple]], defaults: Mapping[str, object] | None = None) -> np.ndarray:
    """What each setting costs and gives, one column a setting; returns the axes (2, number of settings).

    results: setting -> list of (value, passes per token, prelude-and-coda calls per token, share of texts equal to
    autoregressive decoding, share of correct answers).  The value in `defaults` is marked.
    """
    fig, axes = plt.subplots(
        2, len(results), figsize=(2.1 * len(results), 4.6), sharey="row", squeeze=False, layout="constrained"
    )
    for (name, rows), (cost, quality) in zip(results.items(), axes.T, strict=True):
        values, passes, decodes, same, correct = zip(*rows, strict=True)
        x = range(len(values))
        cost.plot(x, passes, "o-", color=BLUE, label="recurrent-block passes")
        cost.plot(x, decodes, "s--", color=GREEN, label="prelude and coda calls")
        quality.plot(x, same, "o-", color=BLUE, label="same text as autoregressive")
        quality.plot(x, correct, "s--", color=VERMILION, label="correct answer")
        for ax in (cost, quality):
            if defaults and defaults.get(name) in values:
                ax.axvline(values.index(defaults[name]), color=GREY, linestyle=":", zorder=0)
            ax.set_xticks(x, [str(v) for v in values], fontsize=8)
            ax.margins(x=0.12)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        cost.set_title(name, fontsize=10)
    axes[0, 0].set(ylabel="per new token", ylim=(0, None))
    axes[1, 0].set(ylabel="share of the problems", ylim=(-0.05, 1.05))
    for row, where in ((axes[0], "upper center"), (axes[1], "lower center")):
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
