"""A comparison of samplers that can't leave out the strongest competitor: looping less.

Autoregressive decoding at a depth that no problem needs is easily beaten: just loop less.  So each table here starts
with autoregressive decoding at the smallest depth that solves as many problems as any depth does, and that depth is
found on other problems than those that are timed.  Adaptive exit, which loops less where less is enough, is always in
the table too.  All samplers run with that depth as their most, batch 1, and problem by problem in turn: what the
machine does meanwhile happens to all of them.

    comparison = compare(model, problems)
    print(comparison)           # family by family and together; then one sentence that says who won

The first pass through the prompt is told apart: `prefill` in the tables is the time to the first token, and passes and
coda calls per token leave it out.  Tokens per second leave nothing out.  Notebook: 06_diffusion_forcing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from minirec import adaptive_exit, autoregressive, diffusion_forcing, lossless_wavefront
from minirec.decoding import Generation
from minirec.recurrent_block import RecurrentDepthLM
from minirec.tasks import Problem
from minirec.training import IGNORE, batch_of

Settings = dict[str, tuple[Callable, dict]]  # name -> (a sampler's `generate`, its arguments)

DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64)
SLACK = 0.01  # a depth is enough if it solves as many as the best one, but for this share
SETTINGS: Settings = {
    "diffusion forcing": (diffusion_forcing.generate, {}),
    "lossless wavefront": (lossless_wavefront.generate, {}),
}
REFERENCE = "autoregressive"
TOGETHER = "all families"


@dataclass
class Run:
    """One sampler on one problem."""

    problem: Problem
    generation: Generation
    seconds: float
    prefill: float  # seconds to the first new token

    @property
    def rate(self) -> float:
        """New tokens per second, prefill included."""
        return len(self.generation.tokens) / self.seconds


@dataclass
class Comparison:
    """What `compare` found; `str` of it is the report.

    depths: the smallest depth that is enough, by family and for all of them together.  found_on: problems that they
    were found on.  runs: sampler -> its runs, the same problems in the same order for each.
    """

    depths: dict[str, int]
    found_on: int
    runs: dict[str, list[Run]]

    @property
    def families(self) -> list[str]:
        """The families of the problems, in the order in which they were given."""
        return list(dict.fromkeys(run.problem.family for run in self.runs[REFERENCE]))

    def of(self, family: str) -> dict[str, list[Run]]:
        """The runs of one family, or of all together."""
        return {
            name: [run for run in runs if family in (TOGETHER, run.problem.family)] for name, runs in self.runs.items()
        }

    def right(self, family: str = TOGETHER) -> dict[str, int]:
        """How many answers of each sampler are right."""
        runs = self.of(family)
        return {name: sum(run.problem.is_correct(run.generation.tokens) for run in runs[name]) for name in runs}

    def speed_up(self, family: str = TOGETHER) -> dict[str, float]:
        """Tokens per second of all problems together, over autoregressive decoding at the smallest depth."""
        runs = self.of(family)

        def rate(name: str) -> float:
            return sum(len(run.generation.tokens) for run in runs[name]) / sum(run.seconds for run in runs[name])

        return {name: rate(name) / rate(REFERENCE) for name in runs}

    def winner(self, family: str = TOGETHER) -> str:
        """The fastest of the samplers that get at least as many answers right as the reference."""
        right, speed_up = self.right(family), self.speed_up(family)
        return max((name for name in right if right[name] >= right[REFERENCE]), key=speed_up.__getitem__)

    def verdict(self) -> str:
        """One sentence: who won, by how much, and who lost answers."""
        name, right, speed_up = self.winner(), self.right(), self.speed_up()
        n, r = len(self.runs[REFERENCE]), self.depths[TOGETHER]
        worse = [other for other in right if right[other] < right[REFERENCE] and not other.startswith(REFERENCE)]
        lost = f" ({', '.join(worse)}: fewer right)" if worse else ""
        if name == REFERENCE:
            return f"Autoregressive decoding at r = {r} won: {right[name]} of {n} right, and nothing was faster{lost}."
        return (
            f"{name.capitalize()} won: {right[name]} of {n} right at {speed_up[name]:.2f} times the tokens/s of "
            f"autoregressive decoding at r = {r}, which got {right[REFERENCE]}{lost}."
        )

    def table(self, family: str = TOGETHER) -> str:
        """The markdown table of one family, or of all together."""
        runs, right, speed_up = self.of(family), self.right(family), self.speed_up(family)
        lines = [
            ["sampler", "right", "same tokens", "tokens/s", "speed-up", "passes/token", "coda calls/token", "prefill"]
        ]
        lines.append(["---"] * len(lines[0]))
        for name, mine in runs.items():
            same = sum(a.generation.tokens == b.generation.tokens for a, b in zip(mine, runs[REFERENCE], strict=True))
            later = max(1, sum(len(run.generation.tokens) - 1 for run in mine))  # tokens after the first one
            # the prompt's passes are the depth of the first token
            passes = sum(run.generation.passes - run.generation.depth[0] for run in mine) / later
            decodes = sum(run.generation.decodes - 1 for run in mine) / later
            lines.append(
                [
                    f"{name}, r = {self.depths[TOGETHER]}" if name == REFERENCE else name,
                    f"{right[name]}/{len(mine)}",
                    f"{same}/{len(mine)}",
                    "{1:.0f} ({0:.0f}-{2:.0f})".format(*np.quantile([run.rate for run in mine], [0.25, 0.5, 0.75])),
                    f"{speed_up[name]:.2f}",
                    f"{passes:.2f}",
                    f"{decodes:.2f}",
                    f"{1000 * np.median([run.prefill for run in mine]):.1f} ms",
                ]
            )
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def __str__(self) -> str:
        parts = []
        for family in [*self.families, TOGETHER] if len(self.families) > 1 else [TOGETHER]:
            n = len(self.of(family)[REFERENCE])
            parts.append(
                f"{family}: {n} problems; smallest sufficient depth r = {self.depths[family]} "
                f"(found on {self.found_on} others, of all families)\n\n{self.table(family)}"
            )
        return "\n\n".join([*parts, self.verdict()])


@torch.inference_mode()
def solved_by_depth(model: RecurrentDepthLM, problems: list[Problem], depths: tuple[int, ...] = DEPTHS) -> np.ndarray:
    """Which whole solutions greedy decoding writes at which depth: bool (len(depths), len(problems)).

    One forward pass does for a problem, as in `minirec.training.exact_match`.  depths have to be sorted.
    """
    solved = np.zeros((len(depths), len(problems)), dtype=bool)
    for column, problem in enumerate(problems):
        tokens, labels = (t.to(model.device) for t in batch_of([problem]))
        e = model.prelude(tokens)
        s = model.initial_state(torch.arange(tokens.shape[1], device=model.device)).expand_as(e)
        for r in range(1, depths[-1] + 1):
            s = model.recur(s, e)
            if r in depths:
                wrong = (model.coda(s).argmax(-1) != labels) & (labels != IGNORE)
                solved[depths.index(r), column] = not wrong.any()
    return solved


def smallest_depth(solved: np.ndarray, depths: tuple[int, ...] = DEPTHS) -> int:
    """The smallest of the depths that solves as many problems as the best of them, `SLACK` aside."""
    counts = solved.sum(1)
    return depths[int(np.argmax(counts >= counts.max() - SLACK * solved.shape[1]))]


def compare(
    model: RecurrentDepthLM, problems: list[Problem], settings: Settings = SETTINGS, depths: tuple[int, ...] = DEPTHS
) -> Comparison:
    """Run samplers on half of the problems, at the smallest depth that is enough for the other half.

    settings: the samplers besides autoregressive decoding and adaptive exit, which are always run (a setting named
    "adaptive exit" replaces the default one).  All get `num_steps`, the depth found, unless they say it themselves.
    depths: where to look for it, sorted.  Batch 1, in turn, problem by problem.  Raises ValueError for less than two
    problems of a family, or a depth below 1.
    """
    depths = tuple(sorted(depths))
    if not depths or depths[0] < 1:
        raise ValueError(f"depths is {depths}; it must hold whole numbers of at least 1")
    by_family: dict[str, list[Problem]] = {}
    for problem in problems:
        by_family.setdefault(problem.family, []).append(problem)
    few = {family: len(some) for family, some in by_family.items() if len(some) < 2}
    if few or not by_family:
        raise ValueError(
            f"problems are {few or 'none'}; a family needs two at least: one to find the depth, one to run"
        )
    solved = {family: solved_by_depth(model, some[::2], depths) for family, some in by_family.items()}
    found = {family: smallest_depth(rows, depths) for family, rows in solved.items()}
    together = np.concatenate(list(solved.values()), axis=1)
    found[TOGETHER] = smallest_depth(together, depths)

    rows: Settings = {
        REFERENCE: (autoregressive.generate, {}),
        "adaptive exit": (adaptive_exit.generate, {"threshold": 0.2}),
    } | settings
    rows = {name: (generate, {"num_steps": found[TOGETHER]} | options) for name, (generate, options) in rows.items()}
    for family, r in found.items():
        if family != TOGETHER and r < found[TOGETHER]:
            rows[f"{REFERENCE}, r = {r}, enough for {family}"] = (autoregressive.generate, {"num_steps": r})
    timed = [problem for some in by_family.values() for problem in some[1::2]]
    runs: dict[str, list[Run]] = {name: [] for name in rows}
    order = list(rows)
    for name in order:  # warm up
        run_once(model, timed[0], *rows[name])
    for problem in timed:
        for name in order:
            runs[name].append(run_once(model, problem, *rows[name]))
        order.append(order.pop(0))
    return Comparison(found, together.shape[1], runs)


def run_once(model: RecurrentDepthLM, problem: Problem, generate: Callable, options: dict) -> Run:
    """Solve a problem once and look at the clock; Python's garbage collector waits meanwhile."""
    first: list[float] = []

    def note(_: int) -> None:
        if not first:
            first.append(time.perf_counter())

    room = len(problem.target) + 16  # for an answer that goes astray
    gc.disable()
    try:
        started = time.perf_counter()
        generation = generate(model, problem.prompt, room, on_token=note, **options)
        return Run(problem, generation, time.perf_counter() - started, first[0] - started)
    finally:
        gc.enable()
