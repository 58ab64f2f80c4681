"""Several processes, one for each GPU: what torchrun starts, and what they have to say to each other.

    torchrun --nproc-per-node 2 -m minirec.tools.cli train --out runs/mine

runs the same program twice (with `-m -- minirec.tools.cli` before `--start`, which torchrun would take for an
option of its own).  Each process finds its rank in the environment and takes its share of the rows or of the problems;
sums over all processes are in `minirec.training`.  Without torchrun there is one process of rank 0, and nothing to say.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def join(device: str | torch.device) -> torch.device:
    """Meet the processes that torchrun has started, if it has, and return the device of this one.

    "cuda" stands for the GPU with this process's number on its machine; GPUs talk by NCCL, all others by gloo.
    ValueError if there are more processes than GPUs.
    """
    device = torch.device(device)
    if not dist.is_torchelastic_launched():
        return device
    if device.type == "cuda":
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            raise ValueError(f"torchrun has started process {number + 1} on a machine with {gpus} GPU(s)")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    """Part from the others at the end.  Not after an error: they may be waiting for this process, and torchrun ends
    all of them once one has failed."""
    if dist.is_initialized():
        dist.destroy_process_group()
