"""Check a published model on your machine, and print a table to paste into an issue.

    python benchmarks/published.py SandyResearch/parcae-140m [--tokens 32] [--num-steps 4] [--dtype bfloat16]

Published weights were not at hand when minirec's families were written: their numbers are tested against the published
code with random weights.  This loads a checkpoint (a hub id or a folder; pickles go through `minirec convert` first),
continues a dozen prompts greedily, and compares every sampler with plain decoding.  The lossless ones must agree in
every token, except where two tokens are equally likely up to rounding; the table counts that too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from timing import in_words, machine, table

from minirec import RecurrentDepthLM, adaptive_exit, autoregressive, diffusion_forcing, lossless_wavefront, speculative
from minirec.files import checkpoint
from minirec.files.tokenizer import read_tokenizer

PROMPTS = [
    "The capital of France is", "Water boils at", "Once upon a time", "2 + 2 =", "def fibonacci(n):",
    "The opposite of hot is", "A triangle has three", "In 1969, the first man", "My favourite colour is",
    "The quick brown fox", "To be or not to be", "The sun rises in the",
]  # fmt: skip
CLOSE = 1e-2  # logits this near to the best one, relative to their spread, are a tie up to rounding


def prompts_of(model: RecurrentDepthLM, folder: Path) -> tuple[list[list[int]], str]:
    """A dozen prompts as ids: text if there is a tokenizer, else random tokens; and which of both."""
    try:
        tokenizer = read_tokenizer(folder)
        return [tokenizer.encode(text).ids for text in PROMPTS], "English prompts"
    except (OSError, ValueError):
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (len(PROMPTS), 8), generator=draw)
        return ids.tolist(), "random prompts: there is no tokenizer"


def is_tie(model: RecurrentDepthLM, text: list[int], steps: int, tokens: tuple[int, int]) -> bool:
    """Whether two tokens after a text are equally likely up to rounding."""
    logits = model(torch.tensor([text], device=model.device), num_steps=steps).logits[0, -1]
    return bool((logits[tokens[0]] - logits[tokens[1]]).abs() <= CLOSE * logits.std())


def compare(model: RecurrentDepthLM, prompts: list[list[int]], tokens: int, steps: int) -> list[list[str]]:
    """A row for every sampler: agreement with plain decoding, passes and time."""
    part = max(1, steps // 4)
    samplers = {
        "autoregressive": (autoregressive, {}),
        f"lossless wavefront, guess after {part}": (lossless_wavefront, {"guess_after": part}),
        f"speculative, draft {part}": (speculative, {"draft_steps": part}),
        "adaptive exit, latent-diff 0.03": (adaptive_exit, {}),
        f"diffusion forcing, r' {part}": (diffusion_forcing, {"inner_steps": part}),
    }
    if hasattr(model, "gate"):
        samplers["adaptive exit, gate 0.5"] = adaptive_exit, {"criterion": "gate", "threshold": 0.5}
    rows, right, passes = [], [], 1
    for name, (sampler, options) in samplers.items():
        start = time.perf_counter()
        made = [sampler.generate(model, p, tokens, num_steps=steps, stop_tokens=(), **options) for p in prompts]
        seconds = time.perf_counter() - start
        right = right or made
        passes = passes if rows else sum(g.passes for g in made)
        wrong = [next((i for i in range(tokens) if a.tokens[i] != b.tokens[i]), None)
                 for a, b in zip(made, right, strict=True)]  # fmt: skip
        ties = sum(
            is_tie(model, p + b.tokens[:i], steps, (a.tokens[i], b.tokens[i]))
            for p, a, b, i in zip(prompts, made, right, wrong, strict=True) if i is not None
        )  # fmt: skip
        depth = sum(sum(g.depth) for g in made) / sum(len(g.depth) for g in made)
        same, ran = f"{wrong.count(None)} of {len(prompts)}", sum(g.passes for g in made) / passes
        rate = len(prompts) * tokens / seconds
        rows.append([name, same, str(ties), f"{depth:.2f}", f"{ran:.2f}", f"{rate:.1f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a hub id, or a folder")
    parser.add_argument("--tokens", type=int, default=32, help="of each continuation")
    parser.add_argument("--num-steps", type=int, help="recurrence steps (default: the checkpoint's)")
    parser.add_argument("--dtype", choices=checkpoint.DTYPES, help="of the weights (default: the checkpoint's)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = RecurrentDepthLM.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    prompts, kind = prompts_of(model, checkpoint.locate(args.model))
    steps = model.config.depth(args.num_steps)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.model}: {type(model).__name__}, {parameters:,} parameters, {model.dtype}, {steps} steps; {kind}.")
    print(in_words(machine()) + "\n")
    head = ["sampler", "same text as autoregressive", "first difference a tie", "steps per token", "passes", "tokens/s"]
    print(table(head, compare(model, prompts, args.tokens, steps)))
    if kind == "English prompts":
        tokenizer = read_tokenizer(checkpoint.locate(args.model))
        for ids, text in zip(prompts[:3], PROMPTS[:3], strict=True):
            made = autoregressive.generate(model, ids, args.tokens, num_steps=steps)
            print(f"\n> {text}{tokenizer.decode(made.tokens)}")


if __name__ == "__main__":
    main()
