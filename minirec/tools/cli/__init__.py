"""The command line: `minirec demo`, `generate`, `chat`, `train`, `make-checkpoint` and `info`.

One file per command.  Each has `add_parser(commands)`, which describes the command and its options, and
`run(args)`, which calls the package and prints.  A new command is a new file and its name in `COMMANDS`.

Bad input is one line on stderr and exit code 2; Ctrl-C is exit code 130; a reader that closes the pipe, as `head`
does, is 141.  Anything else that goes wrong is a bug and shows its traceback.
"""

from __future__ import annotations

import torch

import minirec
from minirec.tools.cli import chat, demo, generate, info, make_checkpoint, train
from minirec.tools.cli.errors import about_input
from minirec.tools.cli.options import Parser, check_arguments
from minirec.tools.cli.terminal import complain, discard, finish, open_streams

COMMANDS = (demo, generate, chat, train, make_checkpoint, info)


def main(argv: list[str] | None = None) -> int:
    """Run one command; argv None is sys.argv. Returns the exit code."""
    try:
        open_streams()
        check_arguments(argv)
        try:
            args = parser().parse_args(argv)
        except SystemExit:  # by --help or --version
            finish()
            raise
        if "threads" in args:
            torch.set_num_threads(args.threads)
        args.run(args)
        finish()
        return 0
    except KeyboardInterrupt as stop:
        complain("\nminirec: stopped", *stop.args)  # on a line of its own, after the text so far
        return 130
    except BrokenPipeError:  # the reader of a pipe left, as in `minirec info | head -1`
        discard()
        return 141
    except Exception as error:
        if (message := about_input(error)) is None:
            raise
        complain("minirec: error:", " ".join(message.split()))
        return 2


def parser() -> Parser:
    """The whole command line."""
    top = Parser(prog="minirec", description=minirec.__doc__, epilog="Start with: minirec demo", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"minirec {minirec.__version__}")
    top.set_defaults(run=lambda args: top.print_help())
    commands = top.add_subparsers(metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return top
