"""What the commands share: the parser, the types of option values, and options that several commands have."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from minirec.files.checkpoint import SHIPPED
from minirec.tools.cli.terminal import show

ABSENT = argparse.SUPPRESS  # not in the namespace unless given: the library's default, which the help states
LARGEST = 2**31 - 1  # of an option that counts something


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a ValueError, which `main` prints on one line without the usage."""

    def error(self, message: str):
        raise ValueError(message)

    def _print_message(self, message: str, file=None) -> None:
        show(message, end="")  # of --help and --version; argparse itself ignores a full disk


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after every option, and examples printed as they are written."""


class Option(NamedTuple):
    """An option with a value.  kind: a function of the text, or the list of values to choose from."""

    name: str
    kind: Callable | list[str]
    default: object
    help: str


class Needs(NamedTuple):
    """Options that have no effect without a setting, which `holds` finds in the arguments."""

    names: tuple[str, ...]
    setting: str
    holds: Callable[[argparse.Namespace], bool]


def new_command(commands, run: Callable, name: str, what: str, example: str, options: Iterable[Option] = ()) -> Parser:
    """The parser of a command: its function, its help with an example, its options."""
    p = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        formatter_class=_Help,
        allow_abbrev=False,
        epilog=f"example:\n  minirec {name} {example}",
    )
    p.set_defaults(run=run)
    for option in options:
        kind = {"choices": option.kind} if isinstance(option.kind, list) else {"type": option.kind}
        p.add_argument(option.name, default=option.default, help=option.help, **kind)
    return p


def given(args: argparse.Namespace, *names: str) -> dict:
    """Those of the options that were given; what is left out keeps the library's default."""
    return {name: getattr(args, name) for name in names if name in args}


def check_arguments(argv: list[str] | None) -> None:
    """ValueError for arguments that argparse would let through as something else.

    Bytes that are not UTF-8 arrive as halves of characters, and the value of `--out=--` as an empty list.
    """
    for word in sys.argv[1:] if argv is None else argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the argument {word!r} is not UTF-8") from None
        if re.fullmatch("--[^=]+=--", word):
            raise ValueError(f"the argument {word!r} has no value")


def check_effect(args: argparse.Namespace, table: Iterable[Needs]) -> None:
    """ValueError for a given option that would have no effect."""
    for names, setting, holds in table:
        for name in given(args, *names):
            if not holds(args):
                raise ValueError(f"--{name.replace('_', '-')} is an option of {setting}")


def check_writable(folder: Path, path: Path) -> None:
    """OSError, before any work, if its result cannot be written to path in this folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    if path != folder and path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")


# --- types of values -------------------------------------------------------------------------------------------------


def whole_number(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """The type of a whole number from low to high."""

    def convert(text: str) -> int:
        try:
            n = int(text)
        except ValueError:  # no number, or one of more digits than Python reads
            n = None
        if n is None or not low <= n <= high:
            limits = f"at most {high}" if low < 0 else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{_short(text)} is not a whole number, {limits}")
        return n

    return convert


count = whole_number(-LARGEST, LARGEST)  # the library checks the lower limit


def real(text: str) -> int | float:
    """A number: an int if it is written as one."""
    try:
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a number") from None


def memory(text: str) -> int:
    """A number of bytes, as in 24GB or 22.5GiB."""
    units = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    units |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{0,15})?) *([A-Za-z]*)", text)
    if not match or match[2] not in units:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a size like 24GB or 22.5GiB")
    return int(float(match[1]) * units[match[2]])


def device(text: str) -> torch.device:
    """A device that is there and computes."""
    try:
        torch.zeros(1, device=text).item()
    except Exception as error:  # every backend has its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{_short(text)} is not available here: {reason}") from None
    return torch.device(text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


# --- options of several commands -------------------------------------------------------------------------------------


MODEL = Option("--model", str, "tiny", "'tiny' (shipped), a folder, or the id of a Hugging Face repository")
REVISION = Option("--revision", str, ABSENT, "branch, tag or commit of a Hugging Face repository (default: main)")
THREADS = Option("--threads", whole_number(1, 1024), ABSENT, "CPU threads (default: PyTorch's choice)")
DEVICE = Option("--device", device, "cpu", "cpu, cuda, cuda:1, mps, ...")
SEED = whole_number(0)

REVISION_NEEDS = Needs(
    ("revision",),
    "a model on the Hugging Face hub",
    lambda args: "preset" not in args and args.model not in SHIPPED and not Path(args.model).exists(),
)
