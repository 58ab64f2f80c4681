"""What it costs the shipped model to keep fewer keys and values: right answers and bytes, by kind of cache.

    python benchmarks/kv_sharing.py [--problems 200] [--families automaton hops] [--levels 2 4 8] [--json FILE]

- full: every recurrence step of a token keeps its own keys and values.  The reference.
- shared, m slots: step k writes and reads slot k mod m, so a past token shows the last step that used the slot.  The
  steps of a prompt run in parallel over its positions and overwrite a slot only after it was read: a prompt's own
  states are those of "full", and only new tokens feel the sharing.
- latest: not another cache.  A position that stops early leaves its deeper slots of the full cache to the keys and
  values of its last step (`KVCache.copy_deeper`; 2502.05171, remark 6.1), and tokens that loop deeper read those.
  Measured by adaptive exit at threshold 0.2; so its row shows early stopping and reading "latest" together.  It
  allocates what "full" does.

All at the checkpoint's default depth, greedy.  Nothing here is a time, so the machine does not matter.
"""

from __future__ import annotations

import argparse

import torch
from timing import in_words, machine, table, write_json
from tqdm import tqdm

from minirec import RecurrentDepthLM, adaptive_exit, autoregressive, tasks
from minirec.decoding import Generation
from minirec.kv_cache import bytes_per_token
from minirec.tasks import Problem

SLOTS = (1, 2, 4, 8)
EXIT = 0.2  # of "latest": a token stops when its state moved by less than this, relative to its length
BATCH = 32  # problems decoded together; their tokens do not depend on it


def caches(depth: int) -> dict[str, dict]:
    """Name -> arguments of the cache, "full" first; more slots than recurrence steps are left out."""
    shared = {f"shared, {m} slot{'s' * (m > 1)}": {"kv": "shared", "kv_slots": m} for m in SLOTS if m <= depth}
    return {"full": {"kv": "full"}, **shared, "latest": {"kv": "full"}}


def solve(model: RecurrentDepthLM, problems: list[Problem], name: str, cache: dict) -> list[Generation]:
    """The solutions with one of `caches`."""
    room = max(len(p.target) for p in problems) + 16  # past the longest solution, for one that goes astray
    generate, options = autoregressive.generate, cache
    if name == "latest":
        generate, options = adaptive_exit.generate, cache | {"threshold": EXIT}
    results = []
    for start in range(0, len(problems), BATCH):
        results += generate(model, [p.prompt for p in problems[start : start + BATCH]], room, **options)
    return results


def summary(results: list[Generation], full: list[Generation], problems: list[Problem]) -> dict:
    """Right answers, texts that are token for token those of the full cache, and steps per token."""
    n, depths = len(problems), [d for g in results for d in g.depth[1:]]  # the first comes with the prompt
    return {
        "right": sum(p.is_correct(g.tokens) for p, g in zip(problems, results, strict=True)) / n,
        "same_tokens": sum(f.tokens == g.tokens for f, g in zip(full, results, strict=True)) / n,
        "depth": sum(depths) / len(depths),
    }


def groups(families: list[str], levels: list[int] | None, n: int) -> dict[str, list[Problem]]:
    """Name -> n held-out problems: of a family, levels mixed; with `levels`, of each of these.

    Word problems are always mixed.  Raises ValueError for a level that one of the other families does not have.
    """
    found = {}
    for family in families:
        if family == "words" or not levels:
            found[family] = tasks.heldout(n, family=family)
        else:
            found |= {f"{family} {level}": tasks.heldout(n, family=family, level=level) for level in levels}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the shipped model, or a folder")
    parser.add_argument("--problems", type=int, default=200, help="of each family, or of each level named")
    parser.add_argument("--families", nargs="+", choices=tasks.FAMILIES, default=list(tasks.FAMILIES))
    parser.add_argument("--levels", nargs="+", type=int, help="of automaton and hops, apart (default: mixed)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args(argv)
    if args.problems < 1:
        parser.error(f"--problems is {args.problems}; it must be at least 1")
    try:
        chosen = groups(args.families, args.levels, args.problems)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    before = machine()
    model = RecurrentDepthLM.from_pretrained(args.model)
    depth = model.config.mean_recurrence
    print(in_words(before))
    print(f"{args.problems} held-out problems a column, depth {depth}, float32, greedy.\n")
    rows = {
        name: {"bytes_per_token": bytes_per_token(model.config, depth, dtype=torch.float32, **cache), "groups": {}}
        for name, cache in caches(depth).items()
    }
    for group, problems in tqdm(chosen.items(), disable=None, desc="columns"):
        results = {name: solve(model, problems, name, cache) for name, cache in caches(depth).items()}
        for name, found in results.items():
            rows[name]["groups"][group] = summary(found, results["full"], problems)
    cells = [
        [
            name,
            f"{row['bytes_per_token']:,}",
            *(f"{g['right']:.1%} / {g['same_tokens']:.1%} / {g['depth']:.2f}" for g in row["groups"].values()),
        ]
        for name, row in rows.items()
    ]
    print("Answers right / texts as with the full cache, token for token / recurrence steps per token\n")
    print(table(["keys and values", "bytes per token", *chosen], cells))
    if args.json:
        write_json(args.json, {"machine": before, "problems": args.problems, "depth": depth, "caches": rows})


if __name__ == "__main__":
    main()
