"""What the benchmarks share: the machine they ran on, a section without garbage collection, spread, and tables."""

from __future__ import annotations

import gc
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from minirec.files.machine import cpu_name


def machine() -> dict:
    """CPU name, cores, load and threads: what a time is worth nothing without."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def in_words(m: dict) -> str:
    """One line about the machine, for above a table."""
    load = "unknown" if m["load_average"] is None else " ".join(map(str, m["load_average"]))
    return (
        f"Machine: {m['cpu']}, {m['cores']} cores, {m['threads']} thread(s) used; torch {m['torch']}, "
        f"Python {m['python']}; load average before the run {load}."
    )


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector from running inside a timed section; it makes up for it between two of them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def spread(values: Iterable[float]) -> dict:
    """The median with its quartiles and extremes."""
    low, q1, median, q3, high = np.quantile(list(values), [0, 0.25, 0.5, 0.75, 1]).tolist()
    return {"median": median, "q1": q1, "q3": q3, "min": low, "max": high}


def with_quartiles(s: dict, digits: int = 2) -> str:
    """`1.50 (1.45-1.61)`: the median and the quartiles of a spread."""
    return f"{s['median']:.{digits}f} ({s['q1']:.{digits}f}-{s['q3']:.{digits}f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(path: str, values: dict) -> None:
    Path(path).write_text(json.dumps(values, indent=2) + "\n")
