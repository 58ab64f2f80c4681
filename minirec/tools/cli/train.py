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
    "steps": "optimiser steps",
    "batch_tokens": "tokens per batch, padding included",
    "learning_rate": "its highest value",
    "warmup": "fraction of the steps, the first, in which the learning rate grows from zero",
    "decay": "fraction of the steps, the last, in which it falls to zero",
    "joining": "fraction of the steps, the first, over which the families join one by one",
    "curriculum": "fraction of the steps over which the levels of a family that has joined join one by one",
    "hardest": "share of the problems that are of the hardest level joined; the rest are of all levels alike",
    "early": "share of the problems given as many recurrence steps as they need or fewer",
    "random": "share of the problems whose depth is drawn by the paper's rule, whatever they need",
    "extra": "mean number of steps that the other problems get beyond those they need",
    "staged": "supervise a problem that gets too few steps with the stage reached by then, not with its answer",
    "reads": "at how many of its steps a row is supervised with what it has reached",
    "weight_decay": "of AdamW",
    "gradient_clip": "largest norm of the gradient",
    "seed": "of weights, problems, depths and initial states",
    "families": "kinds of problems, taken in turn, in the order in which they join: " + ", ".join(tasks.FAMILIES),
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
        "--until", type=count, default=ABSENT, metavar="STEP", help="stop after this step (default: the last)"
    )
    for f in dataclasses.fields(training.TrainingConfig):
        kind: dict[str, Any] = {"type": count if f.type == "int" else float}
        if f.name == "families":
            kind = {"nargs": "+"}
        elif f.name == "seed":
            kind = {"type": SEED}
        elif f.name == "staged":
            kind = {"action": argparse.BooleanOptionalAction}
        p.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=HELP[f.name], **kind)


def run(args: argparse.Namespace) -> None:
    """Train, and leave a checkpoint that `generate` reads."""
    fields = dataclasses.fields(training.TrainingConfig)
    config = training.TrainingConfig(**{f.name: getattr(args, f.name) for f in fields})
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
        log = training.train(model, config, Run(args.out), **given(args, "until"))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("(the same command goes on from the last save)") from None
    rank, _ = training.place()
    processes.leave()
    if rank > 0:  # the first one writes and reports
        return
    folder = args.out / "checkpoint"
    checkpoint.write_whole(folder / "tokenizer.json", task_tokenizer().save)
    right = ", ".join(f"{family} {log[-1][family]:.0%}" for family in dict.fromkeys(config.families))
    show(
        f"{log[-1]['step']} steps in {log[-1]['seconds'] / 60:.1f} minutes: loss {log[-1]['loss']:.3f}, whole solution "
        f"right on {config.evaluate_on} held-out problems each: {right}\n"
        f"checkpoint: {folder}   (minirec generate --model {folder} PROMPT)"
    )
