"""`minirec make-checkpoint`: random weights in the layout of the published checkpoint, for tests and timing."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from minirec.config import PRESETS, RecurrentConfig
from minirec.files import checkpoint
from minirec.files.machine import readable
from minirec.files.tokenizer import HUGINN_TEMPLATE, huginn_special_ids, stand_in_tokenizer
from minirec.tasks import END, task_tokenizer
from minirec.tools.cli.options import ABSENT, SEED, Option, count, new_command
from minirec.tools.cli.terminal import show


def add_parser(commands) -> None:
    p = new_command(
        commands,
        run,
        "make-checkpoint",
        "write random weights in the layout of the published checkpoint, for tests and timing",
        "--preset huginn_3_5b --shards 4 runs/random",
        [
            Option("--shards", count, 1, "files to cut the weights into"),
            Option("--dtype", list(checkpoint.DTYPES), "float32", "number format of the weights"),
            Option("--seed", SEED, 0, "of the weights"),
        ],
    )
    p.add_argument("--preset", choices=PRESETS, required=True, default=ABSENT, help="shape of the model")
    p.add_argument("path", type=Path, metavar="PATH", help="a folder that is new or empty")


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint, with a tokenizer that turns any token into text."""
    config = RecurrentConfig.preset(args.preset)
    if args.preset == "tiny":  # has fewer tokens than there are bytes
        tokenizer, stop = task_tokenizer(), [END]
    else:
        ids = huginn_special_ids(config.vocab_size)
        bos, eos, pad = (ids[name] for name in ("begin_text", "end_text", "pad"))
        config = dataclasses.replace(config, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
        tokenizer, stop = stand_in_tokenizer(config.vocab_size), [eos, bos, ids["end_turn"]]
    path = args.path.resolve()  # "." is another folder afterwards
    checkpoint.make_random(
        config,
        path,
        shards=args.shards,
        dtype=getattr(torch, args.dtype),
        seed=args.seed,
        generation_config={"eos_token_id": stop},
    )
    checkpoint.write_whole(path / "tokenizer.json", tokenizer.save)
    if args.preset != "tiny":
        special = {f"{name}_token": tokenizer.id_to_token(i) for name, i in [("bos", bos), ("eos", eos), ("pad", pad)]}
        values = special | {"chat_template": HUGINN_TEMPLATE, "model_max_length": config.block_size}
        checkpoint.write_json(path / "tokenizer_config.json", values)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    show(f"{args.path}: {readable(size)} of random weights   (minirec info {args.path})")
