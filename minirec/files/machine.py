"""What the machine is, how much memory it has left, and what may be sent to its terminal."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch


def cpu_name() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that can still be had on a device; None where that is not known (neither CUDA nor Linux)."""
    device = torch.device(device)
    if device.type == "cuda":  # what PyTorch keeps for reuse counts as free
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "cpu" and Path("/proc/meminfo").exists():
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Is this PyTorch saying that memory is used up?  Outside CUDA it has no error class of its own."""
    said = ("you tried to allocate", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def readable(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


# C0 and C1 controls except newline and tab, separators that end a line, bidirectional overrides, halves of characters
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text from a file or a model, safe to print: control characters appear as their escapes, ESC as \\x1b.

    A terminal obeys control characters: they clear its screen, change its title, write to the clipboard.
    Newlines and tabs stay.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: object, most: int = 200) -> str:
    """What a file says, as part of an error: printable, on one line, cut off after `most` characters."""
    line = " ".join(printable(str(text)[: 2 * most]).split())
    return line if len(line) <= most else line[: most - 3] + "..."
