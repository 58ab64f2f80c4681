"""`minirec generate`: text in, text out as its tokens freeze."""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from minirec.files import checkpoint
from minirec.files.tokenizer import read_tokenizer
from minirec.tools.cli.options import DEVICE, MODEL, REVISION, THREADS, given, new_command
from minirec.tools.cli.prompts import EXAMPLE, encode, standard_input, typed
from minirec.tools.cli.samplers import DECODING, SAMPLERS, load, sampler_options
from minirec.tools.cli.terminal import Stream


def add_parser(commands) -> None:
    p = new_command(
        commands,
        run,
        "generate",
        "continue a prompt; the text appears as its tokens freeze, with control characters replaced",
        f"--stats '{EXAMPLE}'",
        [MODEL, REVISION, *DECODING, DEVICE, THREADS],
    )
    p.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    p.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help="print while tokens freeze")
    p.add_argument("--stats", action="store_true", help="at the end print tokens, passes and depth on stderr")


def run(args: argparse.Namespace) -> None:
    """Continue a prompt."""
    options = sampler_options(args)
    folder = checkpoint.locate(args.model, **given(args, "revision"), weights=False)
    config, tokenizer = checkpoint.read_config(folder), read_tokenizer(folder)
    text = typed(standard_input().read if args.prompt == "-" else lambda: args.prompt)
    prompt = encode(tokenizer, text, config.bos_token_id, args.model)
    model = load(args)
    stream = Stream(tokenizer, at_once=not args.stream)
    started = time.perf_counter()
    generation = SAMPLERS[args.sampler](model, prompt, args.max_new_tokens, on_token=stream.add, **options)
    seconds, n = time.perf_counter() - started, len(generation.tokens)
    stream.end()
    if args.stats:
        print(
            f"{n} tokens in {seconds:.2f} s ({n / seconds:.0f} tokens/s), {generation.passes} recurrent-block passes "
            f"({generation.passes / n:.2f} per token), {generation.decodes} coda calls; recurrence steps per "
            f"token: mean {statistics.mean(generation.depth):.1f}, {min(generation.depth)} to {max(generation.depth)}",
            file=sys.stderr,
        )
