"""What goes to the terminal: text without control characters, and streams that may be closed or full.

Texts from a checkpoint (its note, its tokens, names in errors) can hold escape sequences that clear the screen or
set the clipboard.  They are replaced wherever the output goes: a file is shown on a terminal later.
"""

from __future__ import annotations

import os
import sys

from tokenizers import Tokenizer

# C0 without tab and newline, DEL, C1, and what changes the direction of the text around it
CONTROL = [*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
REPLACED = dict.fromkeys(CONTROL, "\N{REPLACEMENT CHARACTER}") | {ord("\t"): "\t", ord("\n"): "\n"}


def printable(text: str) -> str:
    """The text with every control character, except newline and tab, replaced by U+FFFD; of the same length."""
    return text.translate(REPLACED)


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
        self.shown = 0  # characters

    def add(self, token: int) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if not self.at_once and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character waits
            show(text[self.shown :], end="", flush=True)
            self.shown = len(text)

    def end(self) -> None:
        show(self.tokenizer.decode(self.tokens)[self.shown :])
