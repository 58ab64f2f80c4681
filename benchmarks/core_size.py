"""What the samplers would gain if the recurrent block were larger: the shipped model with blocks that do nothing.

    python benchmarks/core_size.py [--problems 20] [--blocks 1 2 4 8] [--json FILE]

The shipped model has one block in its prelude, one in its core and one in its coda; Huginn has 2, 4 and 2.  A sampler
saves passes through the core alone, so what it gains hangs on how much of a token's time these are.  To see that
without another model, the core is given more blocks, both of whose branches add zero: the same tokens, guesses and
depths, and a step that takes longer.  It says nothing about what a larger core could learn.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from samplers import at_depth, run, samplers, summary
from timing import in_words, machine, table, write_json

from minirec import RecurrentDepthLM, tasks

DEPTH = 8  # the smallest that is enough for all families (benchmarks/samplers.py)
BASE = at_depth(DEPTH)
ROWS = (  # of those samplers.py has, the settings that did best there
    BASE,
    f"adaptive exit, threshold 0.4, exit_in_prefill True, num_steps {DEPTH}",
    f"speculative, draft_steps 1, lookahead 4, num_steps {DEPTH}",
    f"lossless wavefront, guess_after 1, num_steps {DEPTH}",
    f"lossless wavefront, guess_after 2, num_steps {DEPTH}",
    f"diffusion forcing, exit_threshold 0.4, num_steps {DEPTH}",
)


def with_idle_blocks(model: RecurrentDepthLM, blocks: int) -> RecurrentDepthLM:
    """The model with so many blocks in its core; those added do nothing.

    What reaches such a block is normalised already, so with nothing added and norms of weight 1 it goes through as it
    is, the norm's eps aside.  The weight of the last norm moves from the last block to the new last one.
    """
    there = model.config.n_layers_in_recurrent_block
    larger = RecurrentDepthLM(dataclasses.replace(model.config, n_layers_in_recurrent_block=blocks))
    larger.load_state_dict(model.state_dict(), strict=False)  # the added blocks are left as they were made
    larger.generation_config = model.generation_config
    core = larger.transformer.core_block
    with torch.no_grad():
        for block in core[there:]:
            block.attn.proj.weight.zero_()
            block.mlp.proj.weight.zero_()
        if blocks > there:
            core[-1].norm_4.weight.copy_(core[there - 1].norm_4.weight)
            core[there - 1].norm_4.weight.fill_(1.0)
    return larger.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Samplers, if a recurrence step took longer.")
    parser.add_argument("--problems", type=int, default=20, help="of each family (default: 20)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8], help="in the core (default: 1 2 4 8)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args(argv)
    for name, least in (("problems", args.problems), ("blocks", min(args.blocks))):
        if least < 1:
            parser.error(f"--{name} is {least}; it must be at least 1")
    torch.set_num_threads(args.threads)
    before, tiny = machine(), RecurrentDepthLM.from_pretrained("tiny")
    print(in_words(before))
    print(
        "Model: the shipped one, its core padded with blocks that do nothing; float32, batch 1, greedy; "
        f"{args.problems} held-out problems of each family, all trained levels; at most {DEPTH} recurrence steps.\n"
    )
    by_family = [tasks.heldout(args.problems, seed=0, family=family) for family in tasks.FAMILIES]
    settings = samplers(tiny.config.mean_recurrence, {DEPTH})
    rows = {name: settings[name] for name in ROWS}
    problems = [p for of_family in by_family for p in of_family]
    found: dict[int, dict] = {}
    first: dict[str, list] = {}
    for blocks in args.blocks:
        model, results = with_idle_blocks(tiny, blocks), {name: [] for name in rows}
        for some in by_family:
            for name, of_family in run(model, some, rows).items():
                results[name] += of_family
        first = first or results
        found[blocks] = {name: summary(row, results[BASE], problems) for name, row in results.items()}
        for name, row in results.items():
            same = sum(a.tokens == b.tokens for (_, a), (_, b) in zip(first[name], row, strict=True))
            found[blocks][name]["same_as_first"] = same / len(problems)
    head = ["over autoregressive, tokens/s of all problems", *(f"core of {blocks}" for blocks in found)]
    gains = [[name, *(f"{of[name]['speed_up_in_all']:.2f}" for of in found.values())] for name in rows]
    work = [[f"{BASE}, tokens/s", *(f"{of[BASE]['tokens_per_second']['median']:.0f}" for of in found.values())]]
    print(table(head, gains + work))
    same = min(row["same_as_first"] for of in found.values() for row in of.values())
    print(f"\nTexts that are the same in every column: {100 * same:.1f} % at least.")
    if args.json:
        write_json(args.json, {"machine": before, "arguments": vars(args), "blocks": found})


if __name__ == "__main__":
    main()
