"""`minirec convert`: pickled weights as a checkpoint of safetensors, the only command that opens a pickle."""

from __future__ import annotations

import argparse
from pathlib import Path

from minirec.files.convert import convert
from minirec.files.machine import readable
from minirec.tools.cli.options import new_command
from minirec.tools.cli.terminal import show


def add_parser(commands) -> None:
    p = new_command(
        commands,
        run,
        "convert",
        "write pickled weights (model.pt, pytorch_model.bin) as safetensors, without running code from the pickle",
        "parcae-140m runs/parcae-140m",
        [],
    )
    p.add_argument("source", type=Path, metavar="SRC", help="a folder with config.json and pickles, or a pickle in one")
    p.add_argument("path", type=Path, metavar="OUT", help="a folder that is new or empty")


def run(args: argparse.Namespace) -> None:
    """Convert, and say what was written."""
    convert(args.source, args.path)
    size = sum(file.stat().st_size for file in args.path.glob("*.safetensors"))
    show(f"{args.path}: {readable(size)} of weights   (minirec info {args.path})")
