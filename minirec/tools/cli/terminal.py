"""What goes to the terminal: text without control characters, and streams that may be closed or full.

Texts from a checkpoint (its note, its tokens, names in errors) can hold escape sequences that clear the screen or
set the clipboard.  They are shown as escapes wherever the output goes: a file may be shown on a terminal later.
"""

from __future__ import annotations

import os
import sys

from tokenizers import Tokenizer

from minirec.files.machine import printable
from minirec.files.tokenizer import Detokenizer


def open_streams() -> None:
    """Start of a command; OSError if standard output is closed.  Messages to a closed stderr are dropped."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        raise OSError("standard output is closed")
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a token that this terminal can't show ends nothing


def show(text: str = "", end: str = "\n", flush: bool = False) -> None:
    """Print to standard output, printable; OSError if it is full."""
    try:
        print(printable(text), end=end, flush=flush)
    except OSError as error:
        raise _lost(error) from None


def finish() -> None:
    """Write out what standard output still holds; OSError if it is full."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _lost(error) from None


def _lost(error: OSError) -> OSError:
    if isinstance(error, BrokenPipeError):
        return error
    discard()
    return OSError(f"standard output: {error.strerror or error}")


def complain(*words: str) -> None:
    """Print a line to stderr, printable; dropped if stderr takes nothing."""
    try:
        print(*map(printable, words), file=sys.stderr, flush=True)
    except OSError:
        discard()


def discard() -> None:
    """Drop what the streams still hold, so that the interpreter does not try to write it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Stream:
    """Prints the text of a generation while its tokens freeze, or all of it at the end."""

    def __init__(self, tokenizer: Tokenizer, at_once: bool = False):
        self.tokenizer, self.at_once = tokenizer, at_once
        self.tokens: list[int] = []
        self.text = Detokenizer(tokenizer)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if not self.at_once:
            show(self.text.add(token), end="", flush=True)

    def end(self) -> None:
        show(self.tokenizer.decode(self.tokens) if self.at_once else self.text.end())
