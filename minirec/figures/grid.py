"""The position x depth grid while samplers run over it: notebooks 06, 07 and 08."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from minirec.figures.ink import BLUE, VERMILION, depth_colours, plain, readable_on, token_word

IN_A_CELL = 9  # letters that a cell has room for


def _deepest(generation) -> int:
    if generation.trace is None:
        raise ValueError("generation.trace is None; generate with trace=True")
    if not generation.trace:
        raise ValueError("generation.trace is empty: the prompt gave the only token, and there was no outer step")
    return max(max(step.depths) for step in generation.trace)


def _draw_cells(ax: Axes, generation, prompt_length: int, steps: range, tokenizer=None) -> None:
    """Some outer steps as coloured cells over hatched frozen tokens; words inside with a tokenizer."""
    cmap, norm = depth_colours(_deepest(generation))
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
                shown = token_word(tokenizer, guess, most=IN_A_CELL)
                ax.text(*where, shown, ha="center", va="center", fontsize=7, color=readable_on(colour))
                where, size = (x + 0.88, y + 0.22), 5
            if x < len(new) and guess != new[x]:
                ax.plot(*where, "o", color=VERMILION, markeredgecolor="white", markeredgewidth=0.5, markersize=size)
    # the right edge of what is final, as one staircase
    ax.step([*edge, edge[-1]], [*steps, steps.stop], where="pre", color="black", linewidth=1.3)


def wavefront(generation, prompt_length: int, tokenizer=None, ax: Axes | None = None) -> Axes:
    """The position x depth grid seen from above while a diagonal sampler runs: one row per outer step.

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
        top.set_xticks(np.arange(len(new)) + 0.5, [token_word(tokenizer, t) for t in new], rotation=90, fontsize=6.5)
        top.tick_params(length=0, pad=2)
    prefill = generation.depth[0]  # the prompt ran at full depth, and gave the first new token
    rate = (generation.passes - prefill) / len(generation.trace) / prefill
    ax.plot([1, 1 + rate * len(generation.trace)], [0, len(generation.trace)], "--", color=BLUE, linewidth=1.6)
    ax.set_title(
        f"A wavefront of guesses moves through the text: {len(new)} tokens in {len(generation.trace)} outer steps\n"
        f"after {prefill} passes over the prompt; {generation.passes / len(new):.2f} recurrent passes per token in all "
        f"(autoregressive: {prefill})",
        fontsize=12,
    )

    cmap, norm = depth_colours(deepest)
    bar = ax.figure.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=ax, fraction=0.025, pad=0.01)
    ticks = np.unique(np.linspace(1, deepest, min(deepest, 8)).round().astype(int))
    bar.set_ticks(ticks, labels=ticks)
    bar.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.set_label("recurrence steps of the cell")
    first_cell = [step.start - prompt_length + 1 for step in generation.trace]
    corrected = [
        y
        for y, step in enumerate(generation.trace)
        if any(a != b for a, b in zip(step.guesses, new[first_cell[y] :], strict=False))
    ]
    dot = Line2D([], [], marker="o", linestyle="", color=VERMILION, markersize=5, label="guess that is corrected later")
    handles = [
        Patch(facecolor="#F1F1F1", hatch="///", edgecolor="#CFCFCF", label="frozen: token and keys/values are final"),
        Patch(facecolor=cmap(norm(1)), label="the wavefront: positions in flight"),
        *([dot] if corrected else []),
        Line2D([], [], color="black", label="edge of the frozen prefix"),
        Line2D([], [], color=BLUE, linestyle="--", label="edge of autoregressive decoding after as many passes"),
    ]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.16, 0.01), framealpha=1, fontsize=9.5, borderpad=0.8)

    width = max(len(step.depths) for step in generation.trace)
    if tokenizer is not None and len(new) >= 30 and width <= 0.12 * len(new):  # else there is no room
        top = max(0, min(corrected[0] - 3 if corrected else 0, len(generation.trace) - 9))
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
    """The position x depth grid from the side, after `step` outer steps: one column of cells per token."""
    top = max(generation.depth[0], _deepest(generation))
    cmap, norm = depth_colours(top)
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
            shown = token_word(tokenizer, words[x], most=IN_A_CELL)
            ax.text(x + 0.5, depths[x] + 0.2, shown, rotation=90, ha="center", fontsize=7, **style)
    ax.axvline(min(frozen, width), color="black", linewidth=1.3)
    ax.set(xlim=(0, width), ylim=(0, top + 3), xticks=[], yticks=[1, top], ylabel="depth")
    ax.spines[["top", "right"]].set_visible(False)


def wavefront_animation(generations: Mapping, prompt_length: int, tokenizer=None, frames: int = 32) -> bytes:
    """A GIF of samplers that race over the position x depth grid, one panel each; a frame is one outer step.

    generations: title -> Generation made with trace=True; for a fair race all with the same inner_steps, so that a
    frame costs each the same number of recurrent-block passes.  Grey columns are frozen, coloured ones in flight; the
    word on a column is what it predicts, in vermilion while that is not yet the final token.
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
            ax.set_title(f"{plain(title)}: after {step} outer steps, {final} tokens are final", fontsize=9, loc="left")
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(48))
    gif = io.BytesIO()
    pauses = [350] * frames + [3000]  # milliseconds; the last frame stays
    images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=pauses, loop=0, optimize=True)
    return gif.getvalue()


def noise_levels(panels: Mapping[str, np.ndarray]) -> np.ndarray:
    """How noisy each position is while a sampler runs, one panel per sampler; returns the axes.

    panels: title -> (sampling steps, positions), from 1 for noise alone to 0 for done.  Dark is done.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.4), squeeze=False, layout="constrained")
    for ax, (title, levels) in zip(axes[0], panels.items(), strict=True):
        image = ax.imshow(np.asarray(levels, dtype=float), norm=Normalize(0, 1), cmap="viridis", aspect="auto")
        ax.set_title(plain(title), fontsize=10)
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
                    shown = token_word(tokenizer, guess, most=IN_A_CELL)
                    ax.text(x + 0.5, y + 0.55, shown, ha="center", va="center", fontsize=6, color=readable_on(colour))
            if guess != text[x]:
                ax.plot(x + 0.5, y + 0.14, "o", color=VERMILION, markeredgecolor="white", markersize=4)


def unmasking_and_wavefront(passes: Sequence, generation, prompt_length: int, tokenizer=None) -> np.ndarray:
    """Tokens unmasked anywhere in the text, and states refined along a diagonal, side by side; returns the two axes.

    passes: of a masked-diffusion model, each with `known` (which tokens were fixed before it), `guesses` and
    `confidence` (0 to 1), one entry per position; a cell is a hidden token, dark where the guess is sure.  generation:
    a Generation made with trace=True for a prompt of `prompt_length` tokens, drawn as in `wavefront`.  Hatched tokens
    are known; a dot marks a guess that differs from the final token.
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
    cmap, norm = depth_colours(_deepest(generation))
    left = plt.cm.ScalarMappable(Normalize(0, 1), "viridis_r")
    fig.colorbar(left, ax=axes[0], fraction=0.02, pad=0.01, label="probability of the guess")
    bar = fig.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=axes[1], fraction=0.04, pad=0.01)
    bar.set_label("recurrence steps of the cell")
    bar.set_ticks(range(1, cmap.N + 1))
    bar.minorticks_off()
    for text in axes[1].texts:  # the last windows reach beyond the last token
        text.set_clip_on(True)
    handles = [
        Patch(facecolor="#F1F1F1", hatch="///", edgecolor="#CFCFCF", label="known token"),
        Line2D([], [], marker="o", linestyle="", color=VERMILION, label="guess that is corrected later"),
        Line2D([], [], color="black", label="edge of the frozen prefix"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return axes
