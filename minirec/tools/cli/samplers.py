"""The samplers by name, their options, and which option belongs to which setting."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from minirec import adaptive_exit, autoregressive, diffusion_forcing, lossless_wavefront, speculative
from minirec.files import checkpoint
from minirec.recurrent_block import RecurrentDepthLM
from minirec.tools.cli.options import (
    ABSENT,
    REVISION_NEEDS,
    SEED,
    Needs,
    Option,
    check_effect,
    count,
    given,
    real,
)

SAMPLERS: dict[str, Callable] = {
    "autoregressive": autoregressive.generate,
    "adaptive": adaptive_exit.generate,
    "speculative": speculative.generate,
    "lossless": lossless_wavefront.generate,
    "diffusion": diffusion_forcing.generate,
}

DEPTH = [  # also of `demo`, which runs several samplers
    Option("--num-steps", count, ABSENT, "recurrence steps of a token, r (default: the checkpoint's mean_recurrence)"),
    Option(
        "--guess-after",
        count,
        ABSENT,
        "lossless: depth of a guess that starts the next token (default: the checkpoint's, else 4)",
    ),
    Option(
        "--inner-steps",
        count,
        ABSENT,
        "diffusion: recurrence steps per outer step, r' (default: the checkpoint's, else 4)",
    ),
    Option(
        "--exit-threshold",
        float,
        ABSENT,
        "diffusion: freeze tokens whose state moves less (default: the checkpoint's, else 0.03)",
    ),
]
DECODING = [
    Option("--sampler", list(SAMPLERS), "diffusion", "how to decode"),
    Option("--criterion", list(adaptive_exit.CRITERIA), ABSENT, "adaptive: exit criterion (default: latent-diff)"),
    Option("--threshold", real, ABSENT, "adaptive: exit below this value (default: the criterion's)"),
    Option("--draft-steps", count, ABSENT, "speculative: depth of a draft (default: 4)"),
    Option("--lookahead", count, ABSENT, "speculative: tokens per draft (default: 4)"),
    Option("--max-new-tokens", count, 128, "the most tokens to generate"),
    Option("--temperature", float, 0.0, "0 is greedy; above 0 samples"),
    Option("--top-k", count, ABSENT, "sample from the k likeliest tokens (default: off)"),
    Option("--top-p", float, ABSENT, "sample from the smallest set of tokens that is this probable (default: off)"),
    Option(
        "--min-p",
        float,
        ABSENT,
        "sample from tokens with at least this share of the likeliest one's probability (default: off)",
    ),
    Option("--repetition-penalty", float, ABSENT, "above 1: avoid tokens that are already there (default: off)"),
    Option("--seed", SEED, 0, "of the initial states and of sampling"),
    Option(
        "--kv", ["full", "shared"], ABSENT, "keep the KV of every recurrence step, or share (default: the sampler's)"
    ),
    Option("--kv-slots", count, ABSENT, "slots of --kv shared (default: 1)"),
    Option("--dtype", list(checkpoint.DTYPES), ABSENT, "of the weights (default: the checkpoint's)"),
    *DEPTH,
]
NEEDS = [
    Needs(("criterion", "threshold"), "--sampler adaptive", lambda args: args.sampler == "adaptive"),
    Needs(("draft_steps", "lookahead"), "--sampler speculative", lambda args: args.sampler == "speculative"),
    Needs(("guess_after",), "--sampler lossless", lambda args: args.sampler == "lossless"),
    Needs(("inner_steps", "exit_threshold"), "--sampler diffusion", lambda args: args.sampler == "diffusion"),
    Needs(("top_k", "top_p", "min_p"), "sampling: --temperature above 0", lambda args: args.temperature != 0),
    Needs(("kv_slots",), "--kv shared", lambda args: given(args, "kv") == {"kv": "shared"}),
    REVISION_NEEDS,
]
NOT_OF_THE_SAMPLER = ("sampler", "max_new_tokens", "dtype")


def sampler_options(args: argparse.Namespace) -> dict:
    """The keyword arguments of the chosen sampler; ValueError for an option that would have no effect."""
    check_effect(args, NEEDS)
    names = (option.name.removeprefix("--").replace("-", "_") for option in DECODING)
    return given(args, *(name for name in names if name not in NOT_OF_THE_SAMPLER))


def load(args: argparse.Namespace) -> RecurrentDepthLM:
    """The model of `generate` and `chat`."""
    return checkpoint.load(args.model, device=args.device, **given(args, "dtype", "revision"))
