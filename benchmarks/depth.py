"""What the shipped model's loop is good for: accuracy, settling, exits and path independence by family and level.

    python benchmarks/depth.py [--problems 200] [--json FILE] [--figure FILE]

A level is solved to x % at depth r if greedy decoding writes x % of the held-out solutions token for token.  Levels
marked with * are harder than any that training showed.  Nothing here is a time, so the machine does not matter.
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch
from timing import in_words, machine, table, write_json

from minirec import RecurrentDepthLM, adaptive_exit, lens, tasks
from minirec.tasks import Problem
from minirec.training import IGNORE, batch_of

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SHOWN = 12  # steps of the table of relative changes
THRESHOLDS = (0.03, 0.2, 0.4)
STARTS = ((1, 1.0), (2, 1.0), (0, 0.0), (0, 0.5), (0, 2.0))  # (seed, scale) of other initial states


def levels_of(family: str) -> list[int]:
    return [*tasks.FAMILIES[family], *tasks.HARDER[family]]


def name_of(family: str, level: int) -> str:
    return f"{family} {level}" + ("*" if level in tasks.HARDER[family] else "")


@torch.inference_mode()
def look_inside(model: RecurrentDepthLM, problems: list[Problem]) -> dict:
    """Accuracy after every depth, what the states of the solution's tokens do on the way, and from other starts."""
    tokens, labels = batch_of(problems)
    asked = labels != IGNORE  # (B, T)
    states = lens.trajectory(model, tokens, max(DEPTHS))  # (r + 1, B, T, d)
    guesses = lens.coda_lens(model, states[1:]).argmax(-1)  # (r, B, T)
    solved = ((guesses == labels) | ~asked).all(dim=2).float().mean(dim=1)  # (r,)

    settled = lens.settled(guesses)  # (B, T)
    computed = settled[asked & (settled > 1)]
    others, r = {}, model.config.mean_recurrence
    for seed, scale in STARTS:
        start = model.initial_state(torch.arange(tokens.shape[1]).expand_as(tokens), seed=seed, scale=scale)
        end = model(tokens, r, state=start)
        distance = (end.state - states[r]).norm(dim=-1) / states[r].norm(dim=-1)  # (B, T)
        others[f"seed {seed}, scale {scale}"] = {
            "same": (end.logits.argmax(-1) == guesses[r - 1])[asked].float().mean().item(),
            "distance": distance[asked].median().item(),
        }
    return {
        "exact_match": {depth: solved[depth - 1].item() for depth in DEPTHS},
        "relative_change": lens.relative_change(states)[:, asked].median(dim=1).values.tolist(),
        "settled_mean": settled[asked].float().mean().item(),
        "settled_mean_of_later": computed.float().mean().item() if len(computed) else 1.0,
        "settled_max": settled[asked].max().item(),
        "other_starts": others,
    }


def exits(model: RecurrentDepthLM, problems: list[Problem]) -> dict:
    """Adaptive exit by the relative change of the state.

    With kv "full" a position in its step k sees what the others were after step k, as in training; with "shared" it
    sees where they ended.  The first token, which comes with the prompt at full depth, does not count; "computed" is
    over the tokens that another stage of the solution would not share.
    """
    rows = {}
    room = max(len(p.target) for p in problems)
    for kv in ("full", "shared"):
        for threshold in (0.0, *THRESHOLDS):
            results = adaptive_exit.generate(model, [p.prompt for p in problems], room, threshold=threshold, kv=kv)
            depths = [d for g in results for d in g.depth[1:]]
            computed = [
                d
                for p, g in zip(problems, results, strict=True)
                for d, last, before in islice(
                    zip(g.depth, p.target, p.reached(max(1, len(p.stages) - 1)), strict=False), 1, None
                )
                if last != before or len(p.stages) == 1
            ]
            right = sum(p.is_correct(g.tokens) for p, g in zip(problems, results, strict=True)) / len(problems)
            rows[f"{kv}, {threshold}"] = {
                "right": right,
                "depth": sum(depths) / len(depths),
                "computed": sum(computed) / max(1, len(computed)),
            }
    return rows


def figure(found: dict, path: str) -> None:
    """Accuracy against depth, one panel a family."""
    import matplotlib.pyplot as plt

    from minirec import figures as plots

    families = [f for f in tasks.FAMILIES if name_of(f, tasks.FAMILIES[f][0]) in found]
    fig, axes = plt.subplots(1, len(families), figsize=(12, 3.4), sharey=True, squeeze=False, layout="constrained")
    for ax, family in zip(axes[0], families, strict=True):
        curves = {level: found[name_of(family, level)]["exact_match"] for level in levels_of(family)}
        plots.depth_curves(curves, family, tasks.HARDER[family], ax)
    fig.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the shipped model, or a folder")
    parser.add_argument("--problems", type=int, default=200, help="of each level")
    parser.add_argument("--families", nargs="+", choices=tasks.FAMILIES, default=list(tasks.FAMILIES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("--figure", metavar="FILE", help="draw the curves here")
    args = parser.parse_args(argv)
    if args.problems < 1:
        parser.error(f"--problems is {args.problems}; it must be at least 1")
    torch.set_num_threads(args.threads)
    model = RecurrentDepthLM.from_pretrained(args.model)
    print(in_words(machine()))
    print(f"{args.problems} held-out problems a level, default depth {model.config.mean_recurrence}.\n")
    found = {}
    for family in args.families:
        for level in levels_of(family):
            problems = tasks.heldout(args.problems, family=family, level=level)
            found[name_of(family, level)] = look_inside(model, problems)
            if level in tasks.FAMILIES[family]:
                found[name_of(family, level)]["exits"] = exits(model, problems[:20])
    print("Exact match by depth\n")
    print(table(["", *(f"r = {r}" for r in DEPTHS)],
                [[n, *(f"{100 * x:.1f}" for x in f["exact_match"].values())] for n, f in found.items()]))  # fmt: skip
    print("\nMedian relative change of the state in step k, tokens of the solution\n")
    print(table(["", *(f"k = {k}" for k in range(1, SHOWN + 1))],
                [[n, *(f"{x:.3f}" for x in f["relative_change"][:SHOWN])] for n, f in found.items()]))  # fmt: skip
    print("\nStep after which the most likely token never changes (up to 32), tokens of the solution\n")
    print(table(["", "mean", "mean of those after the first step", "latest"],
                [[n, f"{f['settled_mean']:.2f}", f"{f['settled_mean_of_later']:.2f}", str(f["settled_max"])]
                 for n, f in found.items()]))  # fmt: skip
    print("\nAdaptive exit, by cache and threshold (0: never): right / mean depth from token 2 on / of computed ones\n")
    print(table(["", *next(f["exits"] for f in found.values() if "exits" in f)],
                [[n, *(f"{e['right']:.1%} / {e['depth']:.2f} / {e['computed']:.2f}" for e in f["exits"].values())]
                 for n, f in found.items() if "exits" in f]))  # fmt: skip
    print(
        "\nOther initial states, at the default depth: same tokens / median distance to the usual state over its size\n"
    )
    print(table(["", *next(iter(found.values()))["other_starts"]],
                [[n, *(f"{o['same']:.2%} / {o['distance']:.3f}" for o in f["other_starts"].values())]
                 for n, f in found.items()]))  # fmt: skip
    if args.json:
        write_json(args.json, {"machine": machine(), "problems": args.problems, "levels": found})
    if args.figure:
        figure(found, args.figure)


if __name__ == "__main__":
    main()
