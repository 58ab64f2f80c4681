"""Speed, accuracy and work of every sampler on held-out problems, with the shipped model, batch 1, CPU.

    python benchmarks/samplers.py [--families words automaton hops] [--csv FILE] [--figure FILE] [--json FILE]

Every problem is solved by every sampler before the next problem begins, and the order rotates: all rows of a family
come from one run and share the machine's ups and downs.  Ratios are taken problem by problem, against autoregressive
decoding at the checkpoint's default depth and at the smallest depth with the full accuracy, which this run looks for:
the default may be more than the problems need, and then part of a speed-up could be had by just looping less.  The
samplers are run with that smallest depth as their most, too.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable

import torch
from timing import in_words, machine, no_garbage_collection, spread, table, with_quartiles, write_json
from tqdm import tqdm

from minirec import (
    RecurrentDepthLM,
    adaptive_exit,
    autoregressive,
    diffusion_forcing,
    lossless_wavefront,
    speculative,
    tasks,
)
from minirec.decoding import Generation, Grid
from minirec.kv_cache import bytes_per_token
from minirec.tasks import Problem

DEPTHS = (1, 2, 3, 4, 6, 7, 8)  # of autoregressive decoding, besides the default
FULL_ACCURACY = 0.005  # as exact as at the default depth: at most half a point below
ALL = "all families"
REFERENCE, DEFAULTS = "autoregressive", "diffusion forcing, defaults of this checkpoint"
PARTS = {"prelude": "embed", "recurrent block": "recur", "coda": "decode"}  # part of a step -> the function that is it


def samplers(default_depth: int, smallest: set[int]) -> dict[str, tuple[Callable, dict]]:
    """Name -> (sampler, its arguments); what a row does not name is the default (diffusion: the checkpoint's).

    smallest: depths that are enough, of this family or of all together.
    """
    rows = {at_depth(default_depth): (autoregressive.generate, {})}
    rows |= {at_depth(d): (autoregressive.generate, {"num_steps": d}) for d in DEPTHS if d < default_depth}
    exits = {"latent-diff": (0.03, 0.1, 0.2, 0.4), "kl": (1e-3, 1e-1), "argmax-stability": (2,)}
    variants = {
        adaptive_exit: [{"criterion": c, "threshold": x} for c, thresholds in exits.items() for x in thresholds],
        speculative: [{"draft_steps": d, "lookahead": 4} for d in (1, 2, 4)]
        + [{"draft_steps": 2, "lookahead": 4, "reuse": False}],
        lossless_wavefront: [{"guess_after": g} for g in (1, 2, 4)],
        diffusion_forcing: [{"inner_steps": r, "exit_threshold": x} for r in (1, 2, 4) for x in (0.03, 0.2)]
        + [{"kv": "shared"}, {"max_wavefront": 4}, {"continuous_compute": True}, {"freeze": "last"}]
        + [{"schedule": s} for s in ("acceleration", "token-stability", "fixed")],
    }
    for depth in sorted(smallest - {default_depth}):
        at_most = {"num_steps": depth}
        variants[adaptive_exit] += [
            {"threshold": 0.4, **at_most},
            {"threshold": 0.4, "exit_in_prefill": True, **at_most},
        ]
        variants[speculative] += [{"draft_steps": d, "lookahead": 4, **at_most} for d in (1, 2) if d < depth]
        variants[lossless_wavefront] += [{"guess_after": g, **at_most} for g in (1, 2) if g <= depth]
        variants[diffusion_forcing] += [{"exit_threshold": x, **at_most} for x in (0.2, 0.4)]
    rows[DEFAULTS] = (diffusion_forcing.generate, {})
    for module, settings in variants.items():
        for options in settings:
            name = module.__name__.split(".")[-1].replace("_", " ")
            rows[f"{name}, {', '.join(f'{k} {v}' for k, v in options.items())}"] = (module.generate, options)
    return rows


def at_depth(depth: int) -> str:
    """The name of the row of autoregressive decoding at some depth."""
    return f"{REFERENCE}, r = {depth}"


def room(problems: list[Problem]) -> int:
    """New tokens to ask for: past the longest solution, for one that goes astray."""
    return max(len(p.target) for p in problems) + 16


def run(model: RecurrentDepthLM, problems: list[Problem], rows: dict) -> dict[str, list[tuple[float, Generation]]]:
    """Seconds and result of every sampler on every problem."""
    new = room(problems)
    results = {name: [] for name in rows}
    order = list(rows)
    for generate, options in rows.values():  # warm-up
        generate(model, problems[0].prompt, new, **options)
    for problem in tqdm(problems, disable=None, desc="problems"):
        with no_garbage_collection():
            for name in order:
                generate, options = rows[name]
                start = time.perf_counter()
                generation = generate(model, problem.prompt, new, **options)
                results[name].append((time.perf_counter() - start, generation))
        order.append(order.pop(0))
    return results


def shares(model: RecurrentDepthLM, problems: list[Problem], row: tuple[Callable, dict]) -> dict[str, float]:
    """Share of a sampler's time in each of PARTS, and in what is left: choosing tokens and Python.

    A run of its own, since looking at the clock takes time too.
    """
    generate, options = row
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, work: Callable) -> Callable:
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = work(*args, **kwargs)
            spent[part] += time.perf_counter() - start
            return result

        return call

    originals = {part: getattr(Grid, name) for part, name in PARTS.items()}
    try:
        for part, name in PARTS.items():
            setattr(Grid, name, timed(part, originals[part]))
        start = time.perf_counter()
        for problem in problems:
            generate(model, problem.prompt, room([problem]), **options)
        whole = time.perf_counter() - start
    finally:
        for part, name in PARTS.items():
            setattr(Grid, name, originals[part])
    return {part: seconds / whole for part, seconds in spent.items()} | {"rest": 1 - sum(spent.values()) / whole}


def kv_bytes(model: RecurrentDepthLM, options: dict, generate: Callable) -> int:
    """Bytes of keys and values that a row keeps for a token."""
    default = {"kv": "full", "num_steps": model.config.mean_recurrence}
    if generate is diffusion_forcing.generate:
        default["kv"] = (diffusion_forcing.PAPER | model.generation_config.get("diffusion_forcing", {}))["kv"]
    settings = {k: v for k, v in (default | options).items() if k in default}
    return bytes_per_token(model.config, dtype=model.dtype, **settings)


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
        "depth": spread(d for g in generations for d in g.depth),
    }


def solved_at(model: RecurrentDepthLM, problems: list[Problem], depth: int) -> int:
    """How many of the problems autoregressive decoding at a depth solves."""
    prompts = [p.prompt for p in problems]
    generations = autoregressive.generate(model, prompts, room(problems), num_steps=depth)
    return sum(p.is_correct(g.tokens) for p, g in zip(problems, generations, strict=True))


def smallest_full_depth(correct: dict[int, int], default: int, n: int) -> int:
    """The smallest depth that solves as many of n problems as the default one, half a point aside."""
    return min(d for d, c in correct.items() if c >= correct[default] - FULL_ACCURACY * n)


def report(rows: dict[str, dict], depth: int, n: int) -> str:
    """The tables of one family; depth: the smallest with the full accuracy."""
    accuracy = [
        [
            name,
            *(f"{100 * share:.1f} %" for share in (row["correct"] / n, row["whole_text"], row["same_tokens"])),
            with_quartiles(row["tokens_per_second"], digits=0),
            with_quartiles(row["speed_up"]),
            with_quartiles(row["speed_up_over_smallest"]),
            f"{row['in_all_over_smallest']:.2f}",
        ]
        for name, row in rows.items()
    ]
    work = [
        [
            name,
            *(f"{row[key]:.2f}" for key in ("passes_per_token", "row_steps_per_token", "decodes_per_token")),
            with_quartiles(row["depth"], digits=0),
            str(row["kv_bytes"]),
            *(f"{share:.0%}" for share in row["shares"].values()),
        ]
        for name, row in rows.items()
    ]
    speed_up = f"over r = {depth}"
    return f"""\
{table(["sampler", "exact match", "whole text", "same tokens", "tokens/s", "speed-up", speed_up, "in all"], accuracy)}

{
        table(
            [
                "sampler",
                "passes/token",
                "row-steps/token",
                "coda calls/token",
                "depth",
                "KV bytes/token",
                *(f"% {part}" for part in (*PARTS, "rest")),
            ],
            work,
        )
    }

Smallest depth with the full accuracy: r = {depth}, exact match {100 * rows[at_depth(depth)]["correct"] / n:.1f} %."""


LEGEND = f"""
Exact match: the final answer is right. Whole text: every token is. Same tokens: as autoregressive decoding at the
default depth, the first row. Tokens/s, and speed-up, the time of autoregressive decoding over this row's, at the
default depth and at the smallest that solves as many problems, {100 * FULL_ACCURACY} points aside: median and quartiles
over the problems; in all: the ratio of tokens per second, all problems together, again to the smallest. Passes: of
the recurrent block, prefill included. Row-steps: the positions they advanced, prefill left out. Coda calls: one for
each outer step, draft or check of a criterion; of the prelude there are as many, or fewer. Depth: of the new tokens,
median and quartiles. Shares: of the time of a run apart; rest: choosing tokens, and Python."""


def figure(families: dict[str, dict], path: str) -> None:
    """Exact match against tokens per second, a panel a family."""
    import matplotlib.pyplot as plt

    from minirec import figures as plots

    fig, axes = plt.subplots(1, len(families), figsize=(5.2 * len(families), 4.4), squeeze=False, layout="constrained")
    for ax, (family, found) in zip(axes[0], families.items(), strict=True):
        points = {
            name: (row["tokens_per_second"]["median"], row["correct"] / found["problems"])
            for name, row in found["rows"].items()
        }
        plots.pareto(points, family, ax)
    fig.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Samplers on held-out problems, with the shipped model.")
    parser.add_argument("--problems", type=int, default=100, help="how many of a family (default: 100)")
    parser.add_argument("--families", nargs="+", choices=tasks.FAMILIES, default=list(tasks.FAMILIES))
    parser.add_argument("--level", type=int, help="how hard they are (default: the trained levels, mixed)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    for what in ("json", "csv", "figure"):
        parser.add_argument(f"--{what}", metavar="FILE", help=f"write the {what} here")
    args = parser.parse_args(argv)
    if args.problems < 1:
        parser.error(f"--problems is {args.problems}; it must be at least 1")
    try:
        problems = {f: tasks.heldout(args.problems, seed=0, family=f, level=args.level) for f in args.families}
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
        f"problems of each family, {f'level {args.level}' if args.level else 'all trained levels'}. "
        f"Diffusion forcing by default: {', '.join(f'{k} {v}' for k, v in settings.items())}."
    )
    depths = [d for d in (*DEPTHS, default) if d <= default]
    correct = {family: {d: solved_at(model, some, d) for d in depths} for family, some in problems.items()}
    if len(problems) > 1:  # one setting for all of them, as who doesn't know what comes has to choose
        problems[ALL] = [p for some in problems.values() for p in some]
        correct[ALL] = {d: sum(of_family[d] for of_family in correct.values()) for d in depths}
    smallest = {family: smallest_full_depth(correct[family], default, len(some)) for family, some in problems.items()}
    families, solved, samplers_ = {}, {}, {}
    for family in args.families:
        rows = samplers(default, {smallest[family], smallest.get(ALL, default)})
        solved[family], samplers_ = run(model, problems[family], rows), samplers_ | rows
    if ALL in problems:
        common = [name for name in samplers_ if all(name in results for results in solved.values())]
        solved[ALL] = {name: [x for results in solved.values() for x in results[name]] for name in common}
    for family, some in problems.items():
        results, depth = solved[family], smallest[family]
        rows = {name: summary(row, results[at_depth(default)], some) for name, row in results.items()}
        for name, row in rows.items():
            over_smallest = summary(results[name], results[at_depth(depth)], some)
            row["speed_up_over_smallest"] = over_smallest["speed_up"]
            row["in_all_over_smallest"] = over_smallest["speed_up_in_all"]
            row["shares"] = shares(model, some[:: max(1, len(some) // 4)][:4], samplers_[name])
            row["kv_bytes"] = kv_bytes(model, samplers_[name][1], samplers_[name][0])
        families[family] = {"problems": len(some), "smallest_full_depth": depth, "rows": rows}
        print(f"\n## {family}\n\n{report(rows, depth, len(some))}", flush=True)
    print(LEGEND)
    if args.json:
        write_json(
            args.json,
            {"machine": before, "arguments": vars(args), "diffusion_defaults": settings, "families": families},
        )
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["family", "sampler", "quantity", "value"])
            for family, found in families.items():
                for name, row in found["rows"].items():
                    for quantity, value in row.items():
                        parts = value.items() if isinstance(value, dict) else [("", value)]
                        for part, number in parts:
                            writer.writerow([family, name, f"{quantity} {part}".strip(), number])
    if args.figure:
        figure(families, args.figure)


if __name__ == "__main__":
    main()
