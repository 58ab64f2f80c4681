"""What the machine is and how much memory it has left."""

from __future__ import annotations

import platform
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
