"""Speed and accuracy of the samplers on held-out problems, with the shipped model, batch 1, CPU.

    python benchmarks/samplers.py [--family words] [--level LEVEL]

Every problem is solved by every sampler before the next problem begins, and the order rotates: all rows come from
one run and share the machine's ups and downs.  Ratios are taken problem by problem against autoregressive decoding
at the checkpoint's default depth.  That depth may be more than the model needs, so the run also looks for the
smallest depth with the full accuracy, and compares diffusion forcing with that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from timing import in_words, machine, no_garbage_collection, spread, table, with_quartiles, write_json
from tqdm import tqdm

from minirec import RecurrentDepthLM, autoregressive, diffusion_forcing, tasks
from minirec.decoding import Generation
from minirec.tasks import Problem

DEPTHS = (1, 2, 3, 4, 6, 8)  # of autoregressive decoding, besides the default
FULL_ACCURACY = 0.005  # as exact as at the default depth: at most half a point below
REFERENCE, DEFAULTS = "autoregressive", "diffusion forcing, defaults of this checkpoint"


def samplers(default_depth: int) -> dict[str, tuple[Callable, dict]]:
    """Name -> (sampler, its arguments); what a diffusion row does not name is the checkpoint's default."""
    rows = {at_depth(default_depth): (autoregressive.generate, {})}
    rows |= {at_depth(d): (autoregressive.generate, {"num_steps": d}) for d in DEPTHS if d < default_depth}
    variants = [{"inner_steps": r, "exit_threshold": x} for r in (1, 2, 4) for x in (0.03, 0.1, 0.3)]
    variants += [{"max_wavefront": w} for w in (1, 4, 8, 128)]
    variants += [{"schedule": "fixed"}, {"freeze": "last"}]
    rows[DEFAULTS] = (diffusion_forcing.generate, {})
    for options in variants:
        name = "diffusion forcing, " + ", ".join(f"{k} {v}" for k, v in options.items())
        rows[name] = (diffusion_forcing.generate, options)
    return rows


def at_depth(depth: int) -> str:
    """The name of the row of autoregressive decoding at some depth."""
    return f"{REFERENCE}, r = {depth}"


def run(model: RecurrentDepthLM, problems: list[Problem], rows: dict) -> dict[str, list[tuple[float, Generation]]]:
    """Seconds and result of every sampler on every problem."""
    room = max(len(p.target) for p in problems) + 16  # past the longest solution, for one that goes astray
    results = {name: [] for name in rows}
    order = list(rows)
    for generate, options in rows.values():  # warm-up
        generate(model, problems[0].prompt, room, **options)
    for problem in tqdm(problems, disable=None, desc="problems"):
        with no_garbage_collection():
            for name in order:
                generate, options = rows[name]
                start = time.perf_counter()
                generation = generate(model, problem.prompt, room, **options)
                results[name].append((time.perf_counter() - start, generation))
        order.append(order.pop(0))
    return results


def summary(row: list[tuple[float, Generation]], base: list[tuple[float, Generation]], problems: list[Problem]) -> dict:
    """The numbers of one row; base: the row it is compared with."""
    n, generations = len(problems), [g for _, g in row]
    seconds, tokens = sum(t for t, _ in row), sum(len(g.tokens) for g in generations)
    return {
        "correct": sum(p.is_correct(g.tokens) for p, g in zip(problems, generations, strict=True)),
        "whole_text": sum(p.target == g.tokens for p, g in zip(problems, generations, strict=True)) / n,
        "same_tokens": sum(b.tokens == g.tokens for (_, b), g in zip(base, generations, strict=True)) / n,
        "tokens_per_second": spread(len(g.tokens) / t for t, g in row),
        "speed_up": spread(b / t for (b, _), (t, _) in zip(base, row, strict=True)),
        "speed_up_in_all": (tokens / seconds) / (sum(len(g.tokens) for _, g in base) / sum(t for t, _ in base)),
        "passes_per_token": sum(g.passes for g in generations) / tokens,
        "row_steps_per_token": sum(g.row_steps for g in generations) / tokens,
        "decodes_per_token": sum(g.decodes for g in generations) / tokens,
    }


def smallest_full_depth(correct: dict[int, int], default: int, n: int) -> int:
    """The smallest depth that solves as many of n problems as the default one, half a point aside."""
    return min(d for d, c in correct.items() if c >= correct[default] - FULL_ACCURACY * n)


def report(rows: dict[str, dict], small: dict, n: int) -> str:
    """The table and the comparison with the smallest depth."""
    head = [
        "sampler",
        "exact match",
        "whole text",
        "same tokens",
        "tokens/s",
        "speed-up by problem",
        "in all",
        "passes/token",
        "row-steps/token",
        "prelude+coda/token",
    ]
    lines = [
        [
            name,
            *(f"{100 * share:.1f} %" for share in (row["correct"] / n, row["whole_text"], row["same_tokens"])),
            with_quartiles(row["tokens_per_second"], digits=0),
            with_quartiles(row["speed_up"]),
            f"{row['speed_up_in_all']:.2f}",
            *(f"{row[key]:.2f}" for key in ("passes_per_token", "row_steps_per_token", "decodes_per_token")),
        ]
        for name, row in rows.items()
    ]
    depth, slack = small["depth"], 100 * FULL_ACCURACY
    return f"""\
{table(head, lines)}

Exact match: the final answer is right. Whole text: every token is. Same tokens: as autoregressive decoding at the
default depth, the first row. Tokens/s: median and quartiles over the problems. Speed-up by problem: likewise, the
first row's time over this row's. In all: tokens over time, all problems together, against the first row. Passes: of
the recurrent block, prefill included. Row-steps: the positions they advanced, prefill left out. A row whose settings
are the defaults again shows the noise of the run.

Smallest depth with the full accuracy: r = {depth}, exact match {100 * rows[at_depth(depth)]["correct"] / n:.1f} %
(of the depths above, the first within {slack} points of the default depth's).
{DEFAULTS[0].upper() + DEFAULTS[1:]}, against autoregressive decoding at r = {depth}:
speed-up {with_quartiles(small["speed_up"])} by problem, {small["speed_up_in_all"]:.2f} in all."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Samplers on held-out problems, with the shipped model.")
    parser.add_argument("--problems", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--family", choices=tasks.FAMILIES, default="words", help="of the problems (default: words)")
    parser.add_argument("--level", type=int, help="how hard they are (default: the trained levels, mixed)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args(argv)
    if args.problems < 1:
        parser.error(f"--problems is {args.problems}; it must be at least 1")
    try:
        problems = tasks.heldout(args.problems, seed=0, family=args.family, level=args.level)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    before = machine()
    model = RecurrentDepthLM.from_pretrained("tiny")
    default = model.config.mean_recurrence
    settings = diffusion_forcing.PAPER | model.generation_config.get("diffusion_forcing", {})
    print(in_words(before))
    print(
        f"Model: the shipped one, depth {default} by default, float32; batch 1, greedy; {args.problems} held-out "
        f"problems of family {args.family}, {f'level {args.level}' if args.level else 'all trained levels'}. "
        f"Diffusion forcing by default: {', '.join(f'{k} {v}' for k, v in settings.items())}.\n",
        flush=True,
    )
    results = run(model, problems, samplers(default))
    rows = {name: summary(row, results[at_depth(default)], problems) for name, row in results.items()}
    correct = {d: rows[at_depth(d)]["correct"] for d in (*DEPTHS, default) if at_depth(d) in rows}
    depth = smallest_full_depth(correct, default, len(problems))
    small = {"depth": depth, **summary(results[DEFAULTS], results[at_depth(depth)], problems)}
    print(report(rows, small, len(problems)))
    if args.json:
        write_json(
            args.json,
            {
                "machine": before,
                "arguments": vars(args),
                "diffusion_defaults": settings,
                "rows": rows,
                "defaults_against_smallest_full_depth": small,
            },
        )


if __name__ == "__main__":
    main()
