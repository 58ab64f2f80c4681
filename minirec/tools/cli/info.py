"""`minirec info`: what a model is, which words it knows, and what of it fits in memory; its weights are not read."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from tokenizers import Tokenizer

from minirec import tasks
from minirec.config import PRESETS, RecurrentConfig
from minirec.files import checkpoint, machine
from minirec.files.machine import readable
from minirec.files.tokenizer import read_tokenizer
from minirec.kv_cache import bytes_per_token
from minirec.recurrent_block import RecurrentDepthLM
from minirec.tools.cli.options import (
    ABSENT,
    MODEL,
    REVISION,
    REVISION_NEEDS,
    Needs,
    Option,
    check_effect,
    device,
    given,
    memory,
    new_command,
)
from minirec.tools.cli.prompts import EXAMPLE, knows_the_tasks
from minirec.tools.cli.terminal import show

NEEDS = [
    REVISION_NEEDS,
    Needs(("words",), "a MODEL: a preset has no tokenizer", lambda args: "preset" not in args),
    Needs(("device", "memory"), "info without --words", lambda args: "words" not in args),
]


def add_parser(commands) -> None:
    p = new_command(
        commands,
        run,
        "info",
        "say what a model is, which words it knows, and what fits in memory, without reading its weights",
        "--preset huginn_3_5b --memory 24GB",
        [
            REVISION,
            Option("--device", device, ABSENT, "say what fits in its free memory (default: not said)"),
            Option("--memory", memory, ABSENT, "say what fits in this much: 24GB, 22.5GiB (default: not said)"),
        ],
    )
    p.add_argument(
        "--words", action="store_true", default=ABSENT, help="list the tokens of the model, and prompts that work"
    )
    which = p.add_mutually_exclusive_group()
    which.add_argument("model", nargs="?", default="tiny", metavar="MODEL", help=MODEL.help)
    which.add_argument("--preset", choices=PRESETS, default=ABSENT, help="a shape without a checkpoint")


def run(args: argparse.Namespace) -> None:
    """Print what the arguments ask for."""
    check_effect(args, NEEDS)
    if "preset" in args:
        _describe(args.preset, RecurrentConfig.preset(args.preset), None)
        _say_what_fits(RecurrentConfig.preset(args.preset), args)
        return
    folder = checkpoint.locate(args.model, **given(args, "revision"), weights=False)
    if "words" in args:
        _list_words(args.model, read_tokenizer(folder))
        return
    config = checkpoint.read_config(folder)
    _describe(args.model, config, folder)
    _say_what_fits(config, args)


def _list_words(name: str, tokenizer: Tokenizer) -> None:
    """Every token in the order of ids, special ones apart, and prompts if the model is for the tasks."""
    special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    words = [token for i, token in vocabulary if i not in special]
    show(f"{name}: {len(words)} tokens, and {len(special)} special ones: {' '.join(special.values())}\n")
    show(textwrap.fill(" ".join(words), width=100, break_long_words=False, break_on_hyphens=False))
    if knows_the_tasks(tokenizer):
        show("\nPrompts that work:")
        easiest = (tasks.heldout(1, family=f, level=levels[0])[0].text for f, levels in tasks.FAMILIES.items())
        for text in (EXAMPLE, *easiest):
            show(f"  minirec generate '{text}'")


def _describe(name: str, config: RecurrentConfig, folder: Path | None) -> None:
    """The shape of a model and, for one in a folder, its files by their headers."""
    note, files = "", {}
    if folder is not None:
        note = checkpoint.read_json(folder / "config.json").get("weights", "")
        if any(folder.glob("*.safetensors")):
            stored = checkpoint.read_headers(folder, config).values()
            files = {tensor.file: tensor.file.stat().st_size for tensor in stored}
            formats = "/".join(sorted({str(checkpoint.NUMBER_FORMATS[t.dtype])[len("torch.") :] for t in stored}))
    layers = config.n_layers_in_prelude, config.n_layers_in_recurrent_block, config.n_layers_in_coda
    show(f"""{name}
  layers           prelude {layers[0]}, recurrent block {layers[1]}, coda {layers[2]}
  width            {config.n_embd} in {config.n_heads} heads, MLP {config.intermediate_size}
  vocabulary       {config.vocab_size} tokens ({config.padded_vocab_size} rows)
  context          {config.block_size} tokens
  default depth    {config.mean_recurrence} recurrence steps: {config.effective_depth} layers deep
  parameters       {_parameters(config):,}""")
    if files:
        show(f"  on disk          {readable(sum(files.values()))} in {len(files)} file(s), {formats}")
    if note:
        show(f"  weights          {note}")


def _say_what_fits(config: RecurrentConfig, args: argparse.Namespace) -> None:
    """Memory of weights and KV cache, and for each memory in the arguments how many tokens fit beside the weights."""
    r, dtypes = config.mean_recurrence, (torch.float32, torch.bfloat16)
    weights = [_parameters(config) * dtype.itemsize for dtype in dtypes]
    policies = [("full", r), *(("shared", 2**i) for i in range(r.bit_length()) if 2**i < min(r, 32))]
    tokens = {
        f"KV per token, {kv}, {slots} slot(s)": [bytes_per_token(config, r, kv, slots, dtype) for dtype in dtypes]
        for kv, slots in policies
    }
    show(f"\n  {'':<34}{'float32':>12}{'bfloat16':>12}")
    for what, sizes in {"weights": weights, **tokens}.items():
        show(f"  {what:<34}" + "".join(f"{readable(size):>12}" for size in sizes))
    for what, size in _memories(args).items():
        show(f"\n  tokens that fit in {what} with the weights (a pass needs some memory too), and slots of the context")
        for policy, sizes in tokens.items():
            fits = [max(0, size - w) // per_token for w, per_token in zip(weights, sizes, strict=True)]
            cells = (f"{n:,} = {n // config.block_size:,} slots" for n in fits)
            show(f"  {policy:<34}" + "".join(f"{cell:>28}" for cell in cells))


def _memories(args: argparse.Namespace) -> dict[str, int]:
    """The memories in the arguments: what each is called -> bytes."""
    found = {readable(args.memory): args.memory} if "memory" in args else {}
    if "device" in args:
        free = machine.free_memory(args.device)
        if free is None:
            raise ValueError(f"the free memory of {str(args.device)!r} is not known; give it with --memory")
        found[f"the {readable(free)} free on {args.device}"] = free
    return found


def _parameters(config: RecurrentConfig) -> int:
    with torch.device("meta"):  # shapes without memory
        return sum(p.numel() for p in RecurrentDepthLM(config).parameters())
