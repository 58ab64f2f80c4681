"""Which errors are the user's to correct, and what to say about them."""

from __future__ import annotations

import dis
from pathlib import Path

import minirec
from minirec.files.machine import is_out_of_memory

PACKAGE = Path(minirec.__file__).parent
RAISE = dis.opmap["RAISE_VARARGS"]  # the bytecode of a `raise` statement


def about_input(error: Exception) -> str | None:
    """The message for an error that is not a bug; None for a bug.

    Not a bug: what the operating system refuses, memory that runs out, and a ValueError or FloatingPointError that a
    `raise` statement of minirec raised.  The same classes from anywhere else (`int("x")` in minirec, a library, a
    callback) are bugs.
    """
    if is_out_of_memory(error):  # PyTorch's numbers, and what minirec can do about them
        numbers = ". ".join(str(error).split(". ")[:3])
        return f"{numbers}; try --kv shared, fewer tokens, --dtype bfloat16 or another --device"
    if isinstance(error, OSError):
        place = error.filename2 or error.filename  # of a rename, the target
        reason = error.strerror or str(error) or type(error).__name__
        return reason if place is None else f"{place}: {reason}"
    if isinstance(error, MemoryError):
        return str(error) or "out of memory"
    ours = isinstance(error, (ValueError, FloatingPointError)) and _raised_by_minirec(error)
    return str(error) if ours else None


def _raised_by_minirec(error: Exception) -> bool:
    """Whether the innermost frame is in a file below minirec/ and was at a `raise` statement."""
    last = error.__traceback__
    assert last is not None, "it was caught"
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    return Path(code.co_filename).is_relative_to(PACKAGE) and code.co_code[last.tb_lasti] == RAISE
