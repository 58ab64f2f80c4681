"""What makes the loop of a tiny model be used: one short training run for every change of the recipe.

    python benchmarks/recipe.py [--only NAME ...] [--steps 1000] [--json FILE]

Every run trains the shipped model's shape on the cellular automaton alone, levels 1 to 3, from the same seed, and is
then asked for the row after s steps at depths 1 to 24.  A level is solved at the smallest depth that gets 90 % of the
whole rows right.  With --json a run that is in the file already is not run again, so the table can be made in several
sittings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from timing import in_words, machine, table, write_json

from minirec import RecurrentConfig, RecurrentDepthLM, tasks, training
from minirec.files.run import Run
from minirec.training import TrainingConfig

FAMILY = "automaton"
LEVELS = (1, 2, 3)
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 12, 24)
SOLVED = 0.9

# the objective of 2502.05171: any depth, always the answer; and as many steps as needed and a few more
PAPER = {"early": 0.0, "random": 1.0, "staged": False}
NEEDED = {"early": 0.0, "random": 0.0, "staged": False}
SLOWER = {"learning_rate": 1e-3}

# name -> (what it changes of the training; of the shape; share of the identity put on the adapter's state half)
VARIANTS = {
    "the recipe": ({}, {}, 0.0),
    "depth by the paper's rule, always the answer": (PAPER, {}, 0.0),
    "depth by difficulty, always the answer": (NEEDED, {}, 0.0),
    "the recipe without stages: always the answer": ({"staged": False}, {}, 0.0),
    "the recipe, each row read four times": ({"reads": 4}, {}, 0.0),
    "depth by difficulty, always the answer, identity in the adapter": (NEEDED, {}, 1.0),
    "the recipe, identity in the adapter": ({}, {}, 1.0),
    "the recipe, recurrent block of 2 layers": ({}, {"n_layers_in_recurrent_block": 2}, 0.0),
    "the recipe, prelude and coda of 2 layers": ({}, {"n_layers_in_prelude": 2, "n_layers_in_coda": 2}, 0.0),
    "the recipe, levels join one by one": ({"curriculum": 0.4}, {}, 0.0),
    "the recipe, all levels alike": ({"hardest": 0.0}, {}, 0.0),
    "the recipe, gradients through 2 steps": ({}, {"mean_backprop_depth": 2}, 0.0),
    "the recipe, half the learning rate": (SLOWER, {}, 0.0),
    "depth by the paper's rule, always the answer, half the learning rate": (PAPER | SLOWER, {}, 0.0),
    "depth by difficulty, always the answer, half the learning rate": (NEEDED | SLOWER, {}, 0.0),
    "the recipe, each row read four times, half the learning rate": ({"reads": 4} | SLOWER, {}, 0.0),
}


def run(name: str, steps: int, seed: int, n: int) -> dict:
    """Train one variant and measure it; returns exact match by level and depth."""
    changes, shape, identity = VARIANTS[name]
    config = TrainingConfig(
        **{
            "steps": steps,
            "batch_tokens": 1600,
            "curriculum": 0.0,
            "reads": 1,
            "seed": seed,
            "families": (FAMILY,),
            "evaluate_every": steps,
        }
        | changes
    )
    torch.manual_seed(seed)
    model = RecurrentDepthLM(dataclasses.replace(RecurrentConfig.preset("tiny"), **shape))
    with torch.no_grad():
        state_half = model.transformer.adapter.weight[:, : model.config.n_embd]
        state_half += identity * torch.eye(model.config.n_embd)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(tasks.FAMILIES, {FAMILY: LEVELS}):
        log = training.train(model, config, Run(folder))
    minutes, exact = (time.perf_counter() - started) / 60, {}
    for level in LEVELS:
        problems = tasks.heldout(n, family=FAMILY, level=level)
        exact[level] = [training.exact_match(model, problems, r) for r in DEPTHS]
    return {"minutes": minutes, "loss": log[-1]["loss"], "exact_match": exact}


def solved_at(curve: list[float]) -> str:
    """The smallest depth that solves a level, or the best that any depth reaches."""
    depth = next((d for d, exact in zip(DEPTHS, curve, strict=True) if exact >= SOLVED), None)
    return f"r = {depth}" if depth else f"({max(curve):.0%})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--problems", type=int, default=200, help="of each level, to measure on (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="keep the numbers here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    kept = {"machine": machine(), "steps": args.steps, "seed": args.seed, "depths": list(DEPTHS), "runs": {}}
    if args.json and Path(args.json).exists():
        kept = json.loads(Path(args.json).read_text())
        if (kept["steps"], kept["seed"]) != (args.steps, args.seed):
            parser.error(f"{args.json} holds runs of {kept['steps']} steps and seed {kept['seed']}")
    print(in_words(kept["machine"]))
    setting = f"{args.steps} steps, family {FAMILY}, levels {LEVELS[0]} to {LEVELS[-1]}"
    print(f"{setting}, {args.problems} held-out problems a level.\n")
    for name in args.only:
        if name not in kept["runs"]:
            kept["runs"][name] = json.loads(json.dumps(run(name, args.steps, args.seed, args.problems)))
            if args.json:
                write_json(args.json, kept)
    rows = []
    for name, result in kept["runs"].items():
        curves = [result["exact_match"][str(level)] for level in LEVELS]
        lost = max(max(c) - c[-1] for c in curves)
        rows.append([name, *map(solved_at, curves), f"{100 * lost:.0f}", f"{result['minutes']:.1f}"])
    head = ["", *(f"s = {level}" for level in LEVELS), f"points lost at r = {DEPTHS[-1]}", "minutes"]
    print(table(head, rows))
    print(
        f"\ns: steps of the automaton asked for. r = k: at so many recurrence steps, and at no fewer of those tried, "
        f"{SOLVED:.0%} of the rows are right.\nIn brackets: the best share at any depth, where none comes so far."
    )


if __name__ == "__main__":
    main()
