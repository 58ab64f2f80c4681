"""`minirec train`: train from scratch, from another model, or on from the last save."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from minirec import tasks, training
from minirec.config import PRESETS, RecurrentConfig
from minirec.files import checkpoint
from minirec.files.run import Run
from minirec.recurrent_block import RecurrentDepthLM
from minirec.tasks import BEGIN, END, PAD, task_tokenizer
from minirec.tools import processes
from minirec.tools.cli.options import ABSENT, DEVICE, SEED, THREADS, check_writable, count, given, new_command
from minirec.tools.cli.terminal import show

HELP = {  # of the fields of TrainingConfig
    "batch_tokens": "tokens per batch, padding included",
    "learning_rate": "its highest value",
    "warmup": "steps, the first, in which the learning rate grows from zero",
    "decay": "fraction of the last phase, its end, in which the learning rate falls to zero",
    "hardest": "share of the problems that are of the hardest trained level; the rest are of all levels alike",
    "weight_decay": "of AdamW",
    "gradient_clip": "largest norm of the gradient",
    "seed": "of weights, problems and initial states",
    "log_every": "steps between the lines of log.csv",
    "evaluate_every": "steps between evaluations",
    "evaluate_on": "held-out problems per evaluation and family",
    "save_every": "steps between saves; a run that was stopped goes on from the last one",
}


def add_parser(commands) -> None:
    p = new_command(
        commands,
        run,
        "train",
        "train a model on the tasks; the same command resumes a run that was stopped",
        "--out runs/mine --steps 2000 --threads 2",
        [DEVICE, THREADS],
    )
    p.add_argument("--out", type=Path, required=True, default=ABSENT, metavar="FOLDER", help="for log and checkpoint")
    begin = p.add_mutually_exclusive_group()
    begin.add_argument("--preset", choices=PRESETS, default=ABSENT, help="shape of a new model (default: tiny)")
    begin.add_argument("--start", default=ABSENT, metavar="MODEL", help="begin with this model's weights and shape")
    p.add_argument(
        "--families",
        nargs="+",
        default=ABSENT,
        help="train on these alone, in turn, in one phase (default: the recipe, phase by phase, of all of "
        + ", ".join(tasks.FAMILIES)
        + ")",
    )
    p.add_argument(
        "--steps",
        type=count,
        default=ABSENT,
        help="train in one phase of so many optimiser steps (default: the recipe)",
    )
    for f in dataclasses.fields(training.TrainingConfig):
        if f.name in HELP:
            kind: dict[str, Any] = {"type": SEED if f.name == "seed" else count if f.type == "int" else float}
            p.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=HELP[f.name], **kind)


def run(args: argparse.Namespace) -> None:
    """Train, and leave a checkpoint that `generate` reads."""
    settings = {name: getattr(args, name) for name in HELP}
    if phase := given(args, "families", "steps"):
        families, steps = tuple(phase.get("families", tasks.FAMILIES)), phase.get("steps", 2000)
        settings["phases"] = (training.Phase(families, window=4, learned=2.0, steps=steps),)
    config = training.TrainingConfig(**settings)
    shape = RecurrentConfig.preset(getattr(args, "preset", "tiny"))
    shape = dataclasses.replace(shape, bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD)
    torch.manual_seed(args.seed)
    device = processes.join(args.device)
    if "start" in args:
        model = checkpoint.load(args.start, device=device)
    else:
        model = RecurrentDepthLM(shape).to(device)
    check_writable(next(path for path in (args.out, *args.out.parents) if path.exists()), args.out)
    model.generation_config = {
        "eos_token_id": [END],
        "diffusion_forcing": {"inner_steps": 1, "exit_threshold": 0.2, "kv": "full"},
        "lossless_wavefront": {"guess_after": 1},
    }
    try:
        log = training.train(model, config, Run(args.out))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("(the same command goes on from the last save)") from None
    rank, _ = training.place()
    processes.leave()
    if rank > 0:  # the first one writes and reports
        return
    folder = args.out / "checkpoint"
    checkpoint.write_whole(folder / "tokenizer.json", task_tokenizer().save)
    right = ", ".join(f"{family} {log[-1][family]:.0%}" for family in config.families)
    show(
        f"{log[-1]['step']} steps in {log[-1]['seconds'] / 60:.1f} minutes: loss {log[-1]['loss']:.3f}, whole solution "
        f"right on {config.evaluate_on} held-out problems each: {right}\n"
        f"checkpoint: {folder}   (minirec generate --model {folder} PROMPT)"
    )
