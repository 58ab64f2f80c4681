"""Several processes, one per GPU, that torchrun starts: how they join and leave the process group.

    torchrun --nproc-per-node 2 -m minirec.tools.cli train --out runs/mine

runs the same program twice.  With `--start`, write `-m -- minirec.tools.cli`: torchrun has an option of that name.
Each process finds its rank in the environment and takes its share of the rows or of the problems; sums over all
processes are in `minirec.training`.  Without torchrun there is one process, of rank 0.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def join(device: str | torch.device) -> torch.device:
    """Join the other processes if torchrun started this one; returns the device of this process.

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
    """Leave the process group at the end.

    Not after an error: the others may be waiting for this process, and torchrun ends all of them once one has failed.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
