"""A page that plays samplers over the position x depth grid: pass by pass, up to four of them in lockstep.

`html` makes the page from traces, `show` puts it into a notebook, and `python -m minirec.figures.player FILE` writes
the one of the site.  The page is player.html, plain JavaScript that needs no network; the data goes into it as JSON.
Notebooks: 06_diffusion_forcing, 08_lossless_wavefront, 09_continuous_batching.
"""

from __future__ import annotations

import html as markup
import io
import json
import sys
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from minirec import adaptive_exit, autoregressive, diffusion_forcing, lossless_wavefront, tasks
from minirec.config import shown
from minirec.continuous_batching import Pass
from minirec.decoding import Generation
from minirec.figures.batching import gantt
from minirec.figures.grid import deepest_cell, draw_race
from minirec.figures.ink import LONGEST, depth_colours, visible
from minirec.recurrent_block import RecurrentDepthLM

ROOM = 128  # more tokens than any solution of a word problem needs
MOST = 4  # lanes that can be watched at once
POSTER = 14  # the page opens, and the still picture is taken, when the fastest sampler has so many final tokens


def frames(generation: Generation, prompt_length: int) -> list[dict]:
    """A trace as the page steps through it: the prompt, every outer step, and every drafted token of speculation.

    A frame has `p` and `ms`, the passes and milliseconds at its end; `n`, its own passes; `x`, the new token that its
    first cell predicts; the cells' depths `d` and guesses `g`; and `f`, the number of final tokens.  Where they say
    something, also `c`, the cells whose guess changed; `lost`, the first new token that is thrown away and starts anew;
    `b`, the depths before the frame, if not all cells ran n passes; `draft`, whether it drafts or verifies.
    """
    deepest_cell(generation)  # which refuses what has no trace
    trace, end = generation.trace or [], len(generation.tokens)  # guesses behind the last token count for nothing
    first, last = trace[0], trace[-1]
    if first.start != prompt_length:
        raise ValueError(f"prompt has {prompt_length} tokens; the generation continues one of {first.start}")
    start = 1000 * max(0.0, first.seconds - (last.seconds - first.seconds) / max(1, len(trace) - 1))
    # the prompt ran at full depth, and gave the first new token
    found = [_frame(generation.depth[0], start, generation.depth[0], 0, generation.depth[:1], generation.tokens[:1], 1)]
    for step, following in zip(trace, [*trace[1:], None], strict=True):
        before, x, final = found[-1], step.start - prompt_length + 1, step.frozen - prompt_length
        n, ms = step.passes - before["p"], 1000 * step.seconds
        for i in range(1, len(step.drafts) + 1):
            p, depths = i * step.draft_steps, [step.draft_steps] * i
            when = before["ms"] + (ms - before["ms"]) * p / n  # time by passes: only the round's end was noted
            frame = _frame(before["p"] + p, when, step.draft_steps, x, depths, step.drafts[:i], before["f"])
            found.append(frame | {"b": [*depths[1:], 0], "draft": True})  # only the newest cell runs
        frame = _frame(step.passes, ms, n - len(step.drafts) * step.draft_steps, x, step.depths, step.guesses, final)
        kept = dict(enumerate(following.depths, following.start - prompt_length + 1)) if following else {}
        if step.drafts:
            kept, frame["draft"] = {}, False  # the next round starts anew
        lost = [y for y, d in enumerate(step.depths, x) if final <= y < end and kept.get(y, 0) <= d]
        found.append(frame | ({"lost": lost[0]} if lost and following else {}))
    said: dict[int, int] = {}
    for frame in found:
        cells = enumerate(frame["g"][: end - frame["x"]], frame["x"])
        changed = [x - frame["x"] for x, guess in cells if said.get(x, guess) != guess]
        frame |= {"c": changed} if changed else {}
        said |= dict(enumerate(frame["g"], frame["x"]))
    return found


def _frame(p: int, ms: float, n: int, x: int, d: list[int], g: list[int], f: int) -> dict:
    return {"p": p, "ms": round(ms, 2), "n": n, "x": x, "d": d, "g": g, "f": f}


def html(lanes: Mapping, prompt: Sequence[int] | None = None, tokenizer=None, title: str = "One grid, many schedules"):
    """A whole page, a str, that plays the lanes in lockstep.

    lanes: title -> Generation made with trace=True for the prompt (token ids), or a list of the passes that
    `Engine(on_pass=...)` gives; four at most.  With a tokenizer the tokens are shown as text, else as numbers.  The
    page loads nothing, and shows text from outside as it is, never as markup.  Raises ValueError for bad lanes.
    """
    if not 1 <= len(lanes) <= MOST:
        raise ValueError(f"lanes holds {len(lanes)} runs; it must hold from 1 to {MOST}")
    runs = {name: one for name, one in lanes.items() if isinstance(one, Generation)}
    if runs and prompt is None:
        raise ValueError("prompt is None; it must be the token ids that the generations continue")
    ids = [int(token) for token in prompt] if prompt is not None else []
    rows = [_lane(str(name), lane, len(ids)) for name, lane in lanes.items()]
    deep = max(lane.pop("deepest") for lane in rows)
    cmap, norm = depth_colours(deep)
    traced = [frame for lane in rows for frame in lane.get("frames", ())]
    tokens = {token for frame in traced for token in frame["g"]} | {t for run in runs.values() for t in run.tokens}
    data = {
        "title": visible(title),
        "prompt": visible(_text(tokenizer, ids, skip_special_tokens=True)) if runs else "",
        "open": _poster(runs, len(ids)),
        "palette": [to_hex(cmap(norm(depth))) for depth in range(1, deep + 1)],
        "has": {
            "changed": any("c" in frame for frame in traced),
            "lost": any("lost" in frame for frame in traced),
            "draft": any("draft" in frame for frame in traced),
        },
        "words": {
            token: visible(_text(tokenizer, [token], skip_special_tokens=False).strip() or "·", LONGEST)
            for token in sorted(tokens)
        },
        "lanes": rows,
    }
    for lane in rows:
        if "frames" in lane:
            lane["frames"] = [_packed(frame) for frame in lane["frames"]]
    # no "<" can end the script element, whatever is in a token
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_name("player.html").read_text(encoding="utf-8")
    return page.replace("__DATA__", text, 1)


def _text(tokenizer, ids: list[int], **options) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids, **options)


def _packed(frame: dict) -> list:
    """The fields that all frames have, without their names, and then the others: a page is a fifth smaller."""
    return [frame.pop(key) for key in ("p", "ms", "n", "x", "d", "g", "f")] + [frame] * bool(frame)


def _lane(name: str, lane, prompt_length: int) -> dict:
    if isinstance(lane, Generation):
        steps = frames(lane, prompt_length)
        return {
            "name": visible(name), "kind": "trace", "tokens": lane.tokens, "depth": lane.depth,
            "passes": lane.passes, "frames": steps, "deepest": max(deepest_cell(lane), *lane.depth),
        }  # fmt: skip
    if not isinstance(lane, Sequence) or not lane or not all(isinstance(one, Pass) for one in lane):
        raise ValueError(f"the run {name!r} is {shown(lane)}; it must be a Generation, or the passes of an Engine")
    slots = [slot for one in lane for slot in one.slots]
    passes = [[one.stage.name, [list(slot) for slot in one.slots]] for one in lane]
    return {
        "name": visible(name), "kind": "engine", "slots": 1 + max(row for row, _, _ in slots), "passes": passes,
        "deepest": max(depth for _, _, depth in slots),
    }  # fmt: skip


def _poster(runs: Mapping[str, Generation], prompt_length: int) -> int:
    """The pass at which the first of the samplers has `POSTER` final tokens, or half of its own."""
    return min(
        (
            next(s.passes for s in run.trace or [] if s.frozen - prompt_length >= min(POSTER, len(run.tokens) // 2 + 1))
            for run in runs.values()
        ),
        default=0,
    )


class Player:
    """The page in a notebook: an iframe, and a still picture for viewers that strip it, such as GitHub."""

    def __init__(self, page: str, picture: bytes):
        self.page, self.picture = page, picture

    def _repr_mimebundle_(self, **_) -> dict:
        still = b64encode(self.picture).decode()
        framed = (
            f'<img class="minirec-still" style="max-width:100%" src="data:image/png;base64,{still}" '
            'alt="Still picture of the player: run the cell to play it">'
            f'<iframe title="Samplers, pass by pass" style="width:100%;height:640px;border:0" '
            f'srcdoc="{markup.escape(self.page)}"></iframe>'
        )
        return {"text/html": framed, "image/png": still, "text/plain": "a page that plays samplers, pass by pass"}


def show(lanes: Mapping, prompt: Sequence[int] | None = None, tokenizer=None, title: str = "One grid, many schedules"):
    """The page of `html`, same arguments, as the value of a notebook's cell."""
    page = html(lanes, prompt, tokenizer, title)
    runs = {name: lane for name, lane in lanes.items() if isinstance(lane, Generation)}
    if prompt is not None and runs:
        figure, n = Figure(figsize=(9, 1.9 * len(runs))), len(prompt)
        when = _poster(runs, n)
        steps = [sum(step.passes <= when for step in run.trace or []) for run in runs.values()]
        draw_race(figure, runs, n, steps, 30, tokenizer)
    else:
        figure = gantt(lanes)[0].figure
        plt.close(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=76)
    return Player(page, png.getvalue())


def hero(model: RecurrentDepthLM, problems: Sequence[tasks.Problem]) -> tuple[tasks.Problem, dict[str, Generation]]:
    """The problem on which both wavefronts correct most guesses per token, and the runs of four samplers on it."""
    prompts = [problem.prompt for problem in problems]
    room = min(ROOM, model.config.block_size - max(map(len, prompts)))
    corrections = []
    for sampler in (lossless_wavefront, diffusion_forcing):
        runs = sampler.generate(model, prompts, room, trace=True)
        changed = [sum(len(f.get("c", ())) for f in frames(g, len(p))) for g, p in zip(runs, prompts, strict=True)]
        corrections.append([n / len(g.tokens) for n, g in zip(changed, runs, strict=True)])
    fewest = [min(both) for both in zip(*corrections, strict=True)]
    best = fewest.index(max(fewest))
    samplers = {
        "Autoregressive": autoregressive, "Adaptive exit": adaptive_exit,
        "Lossless wavefront": lossless_wavefront, "Diffusion forcing": diffusion_forcing,
    }  # fmt: skip
    runs = {name: s.generate(model, prompts[best], room, trace=True) for name, s in samplers.items()}
    return problems[best], runs


if __name__ == "__main__":
    problem, runs = hero(RecurrentDepthLM.from_pretrained("tiny"), tasks.heldout(48))
    page = html(runs, problem.prompt, tasks.task_tokenizer())
    Path(sys.argv[1]).write_text(page, encoding="utf-8")
