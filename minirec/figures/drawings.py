"""Concept drawings of the README and the site: SVG made by code, in one style, light and dark, readable at 360 pixels.

`make drawings` (`python -m minirec.figures.drawings FOLDER`) writes them.  A drawing is a string of SVG; colours are
classes, which the style sheet inside sets for either colour scheme, so a drawing reads well wherever it is shown.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

WIDTH = 720  # of every drawing; at half that width a caption still has letters of 8 pixels

STYLE = """
svg { --paper: #ffffff; --ink: #1b1f24; --soft: #5c6670; --line: #aab2ba; --fill: #eef1f4;
      --deep: #0072b2; --on: #ffffff; --alarm: #c44e00; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #131416; --ink: #e6e8ea; --soft: #a3abb3; --line: #59626b; --fill: #24282d;
        --deep: #56b4e9; --on: #0b0d0f; --alarm: #ff9a57; }
}
text { font: 19px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
.middle { text-anchor: middle; } .end { text-anchor: end; } .name { font-weight: 650; font-size: 18px; }
.soft, .says { fill: var(--soft); } .says { font-size: 17px; }
.small { fill: var(--soft); font-size: 15px; }
.math { font-family: Georgia, "Times New Roman", "DejaVu Serif", serif; font-style: italic; }
.math .low { font-size: 14px; }
.paper { fill: var(--paper); } .box { fill: var(--fill); stroke: var(--line); stroke-width: 1.5; }
.core { fill: var(--deep); } .on { fill: var(--on); }
.arrow { fill: none; stroke: var(--ink); stroke-width: 2; marker-end: url(#tip); } .tip { fill: var(--ink); }
.again { stroke: var(--deep); stroke-width: 2.5; marker-end: url(#again); } .again-tip { fill: var(--deep); }
.cell { fill: var(--deep); } .idle { fill: none; stroke: var(--line); stroke-dasharray: 2 3; }
.edge { stroke: var(--line); stroke-width: 1.5; } .alarm { fill: var(--alarm); }
.struck { text-decoration: line-through; font-size: 16px; fill: var(--alarm); }
""".strip()


def svg(title: str, height: int, body: Iterable[str], style: str = "") -> str:
    """A whole drawing, `WIDTH` wide: background, style sheet, arrow tips; `title` is what a screen reader says."""
    tips = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="12" markerHeight="12" '
        f'markerUnits="userSpaceOnUse" orient="auto-start-reverse"><path class="{shade}" d="M0 0 10 5 0 10z"/></marker>'
        for name, shade in (("tip", "tip"), ("again", "again-tip"))
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">'
    paper = f'<rect class="paper" width="{WIDTH}" height="{height}"/>'
    return "\n".join([head, f"<style>\n{STYLE}{style}\n</style>", f"<defs>{tips}</defs>", paper, *body, "</svg>", ""])


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words at (x, y), the left end of their base line or, with kind "middle", its centre."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    """A rectangle with round corners."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9" class="{kind}"/>'


def arrow(path: str, kind: str = "arrow") -> str:
    """A line with a tip, along an SVG path."""
    return f'<path d="{path}" class="{kind}"/>'


def low(letter: str, index: str) -> str:
    """A letter with an index."""
    return f'{letter}<tspan dy="5" class="low">{index}</tspan>'


def model() -> str:
    """The model: tokens, prelude, recurrent block with its loop and the injection of e, coda, logits."""
    top, middle = 92, 132
    state = low("s", "k")
    body = [
        text(8, middle + 6, "tokens"),
        arrow(f"M72 {middle}H100"),
        box(104, top, 112, 80),
        text(160, middle - 6, "prelude", "middle name"),
        text(160, middle + 20, "P", "middle math"),
        arrow(f"M216 {middle}H294"),
        text(255, middle - 12, "e", "middle math"),
        text(257, middle + 24, "injected", "middle small"),
        text(257, middle + 42, "each step", "middle small"),
        box(298, top, 156, 80, "core"),
        text(376, middle - 6, "recurrent", "middle name on"),
        text(376, middle + 20, "block R", "middle name on"),
        # the loop: out on the right, back in on the left
        arrow(f"M436 {top - 3}V50Q436 34 420 34H332Q316 34 316 50V{top - 4}", "arrow again"),
        text(376, 22, "r times, the same weights", "middle"),
        text(376, 60, state, "middle math"),
        arrow(f"M454 {middle}H532"),
        text(492, middle - 12, low("s", "r"), "middle math"),
        box(536, top, 92, 80),
        text(582, middle - 6, "coda", "middle name"),
        text(582, middle + 20, "C", "middle math"),
        arrow(f"M628 {middle}H654"),
        text(660, middle + 6, "logits"),
        # where the loop starts
        arrow(f"M376 226V{top + 84}"),
        text(376, 248, low("s", "0") + '<tspan dy="-5"> : noise</tspan>', "middle math"),
        text(8, 296, f'{state}<tspan dy="-5"> = R(</tspan>{low("s", "k−1")}<tspan dy="-5">, e)</tspan>', "math"),
        text(160, 296, "Every step reads e again.", "soft"),
        text(160, 322, "How many steps to run is decided at run time.", "soft"),
    ]
    return svg(
        "Tokens pass the prelude, which gives e. The recurrent block runs r times; each step reads the state and e, "
        "starting from noise. The coda turns the last state into logits.",
        334,
        body,
    )


# --- The position x depth grid: who computes which cell in which pass ---

DEPTH, COLUMNS = 4, 6  # recurrence steps and tokens of each small grid

Schedule = dict[tuple[int, int], int]  # (column, step) -> pass, all from 1 up


def _columns(starts: Iterable[int], depths: Iterable[int]) -> Schedule:
    """Columns that run their steps in consecutive passes."""
    pairs = enumerate(zip(starts, depths, strict=True), 1)
    return {(x, k): start + k - 1 for x, (start, depth) in pairs for k in range(1, depth + 1)}


def _one_by_one(depths: list[int]) -> Schedule:
    """Each column starts when the one before it is finished."""
    return _columns([1 + sum(depths[:x]) for x in range(len(depths))], depths)


def _speculative() -> Schedule:
    """Three tokens drafted with one step each, one after another; then their other steps, all three together."""
    rounds = [(first, 1 + (first - 1) // 3 * 6) for first in (1, 4)]
    return {
        (first + i, k): start + (i if k == 1 else 1 + k)
        for first, start in rounds
        for i in range(3)
        for k in (1, 2, 3, 4)
    }


AUTOREGRESSIVE = _one_by_one([DEPTH] * COLUMNS)
ADAPTIVE = _one_by_one([2, 1, 4, 2, 1, 3])
SPECULATIVE = _speculative()
# In pass 5 the third column changes its mind about the next token: two cells of column 4 and one of column 5 are lost.
LOSSLESS, LOST = _columns([1, 2, 3, 6, 7, 8], [DEPTH] * COLUMNS), {(4, 1): 4, (4, 2): 5, (5, 1): 5}
DIFFUSION = _columns([1, 2, 3, 4, 5, 6], [3, 2, 4, 3, 2, 3])
# Slot 1 runs request A; slot 2 runs B and, from pass 4 on, C.
BATCHING = _columns([1, 3, 1, 2, 4, 7], [2, 4, 1, 2, 3, 1])

PANELS = {
    "autoregressive": (AUTOREGRESSIVE, {}, "one token after another"),
    "adaptive exit": (ADAPTIVE, {}, "a settled token stops"),
    "self-speculative": (SPECULATIVE, {}, "draft 3, verify together"),
    "lossless wavefront": (LOSSLESS, LOST, "wrong guess: restart"),
    "diffusion forcing": (DIFFUSION, {}, "settled tokens freeze"),
    "continuous batching": (BATCHING, {}, "3 requests in 2 slots"),
}


def grid(name: str, left: float, top: float, cell=(35, 31), timed: bool = False) -> list[str]:
    """One sampler's small grid: tokens across, depth upwards, the number of the pass in every cell that is computed."""
    schedule, lost, says = PANELS[name]
    width, height = cell
    last, base = max(AUTOREGRESSIVE.values()), top + 50 + DEPTH * height
    parts = [text(left, top + 16, name, "name"), text(left, top + 39, says, "says")]
    for x in range(1, COLUMNS + 1):
        for k in range(1, DEPTH + 1):
            at, when = (left + (x - 1) * width, base - k * height), schedule.get((x, k))
            centre = at[0] + width / 2, at[1] + height / 2 + 6.5
            place = f'x="{at[0] + 1:g}" y="{at[1] + 1:g}" width="{width - 2}" height="{height - 2}"'
            if when is None:
                parts.append(f'<rect {place} class="idle"/>')
                continue
            shade = 0.12 + 0.88 * (when - 1) / (last - 1)
            number = text(*centre, str(when), "middle on" if shade > 0.55 else "middle")
            if (x, k) in lost:
                number = text(at[0] + 3, centre[1], str(lost[x, k]), "struck")
                number += text(at[0] + width - 3, centre[1], str(when), "end")
            square = f'<rect {place} class="cell" fill-opacity="{shade:.2f}"/>'
            parts.append(f'<g class="p{when}">{square}{number}</g>' if timed else square + number)
    parts.append(f'<path d="M{left:g} {base + 2:g}h{COLUMNS * width:g}" class="edge"/>')
    names = "AABBCC" if name == "continuous batching" else [str(x) for x in range(1, COLUMNS + 1)]
    parts += [text(left + (x + 0.5) * width, base + 22, one, "middle soft") for x, one in enumerate(names)]
    passes = max(schedule.values())
    parts.append(text(left, base + 47, f'<tspan class="name">{passes} passes</tspan> for 6 tokens', "says"))
    return parts


def schedules() -> str:
    """The schedule of every sampler on the position x depth grid, side by side."""
    body = [part for i, name in enumerate(PANELS) for part in grid(name, 8 + 247 * (i % 3), 4 + 246 * (i // 3))]
    body += [
        text(8, 512, "Columns: tokens. Rows: recurrence steps, from 1 (bottom) to r = 4.", "says"),
        text(8, 535, "Cells with the same number run in the same pass. Dashed: skipped.", "says"),
        text(8, 558, "Struck number: computed from a wrong guess and thrown away.", "says"),
    ]
    return svg("Six samplers as schedules over one grid of positions and depths", 568, body)


def race() -> str:
    """Three schedules that run side by side, one pass per tick, for ever; still for readers who want no motion."""
    names = ["autoregressive", "lossless wavefront", "diffusion forcing"]
    body = [part for i, name in enumerate(names) for part in grid(name, 8 + 247 * i, 4, timed=True)]
    last = max(AUTOREGRESSIVE.values())
    ticks, frames = last + 6, []
    for when in range(1, last + 1):
        shown = 100 * when / ticks
        frames.append(
            f"@keyframes p{when} {{ 0%, {shown - 0.4:.1f}% {{ opacity: 0.08; }} "
            f"{shown:.1f}%, 98% {{ opacity: 1; }} 100% {{ opacity: 0.08; }} }} "
            f".p{when} {{ animation: p{when} {0.3 * ticks:.0f}s linear infinite; }}"
        )
    style = "\n@media (prefers-reduced-motion: no-preference) {\n" + "\n".join(frames) + "\n}"
    return svg("Three samplers fill the grid of positions and depths, one pass at a time", 236, body, style)


DRAWINGS = {"model.svg": model, "schedules.svg": schedules, "race.svg": race}

if __name__ == "__main__":
    for file, draw in DRAWINGS.items():
        (Path(sys.argv[1]) / file).write_text(draw(), encoding="utf-8")
