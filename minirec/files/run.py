"""A run of training in a folder: log, resumable state, and the checkpoint it ends with.

log.csv              one row every `log_every` steps
state.safetensors    weights and moments; its metadata says which run and which step they are of
checkpoint/          the trained model
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from minirec.files import checkpoint
from minirec.training import TrainingConfig


class Run:
    """The folder of one run; `minirec.training.train` resumes from it and saves to it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def resume(self, model, optimizer, config: TrainingConfig) -> tuple[int, list[dict], dict]:
        """Put weights and moments back as they were last saved; returns step, log, and what `save` got as progress."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "state.safetensors"
        if not path.exists():
            return 0, [], {}
        with checkpoint.opened(path) as f:
            run = f.metadata() or {}
            ours = {"training": json.dumps(asdict(config)), "model": json.dumps(model.config.to_dict())}
            for what, value in ours.items():
                if run.get(what) != value:
                    raise ValueError(f"{path} is of another run: its {what} is {run.get(what)}, this one's is {value}")
            step = int(run["step"])
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(f.get_tensor(f"weight.{name}"))
                    if not p.requires_grad:
                        continue
                    optimizer.state[p] = {
                        "step": torch.tensor(float(step), device=p.device, dtype=torch.float32),
                        "exp_avg": f.get_tensor(f"exp_avg.{name}").to(p.device),
                        "exp_avg_sq": f.get_tensor(f"exp_avg_sq.{name}").to(p.device),
                    }
        with open(self.folder / "log.csv", newline="") as f:
            log = [{k: float(v) if k != "step" else int(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
        return step, [row for row in log if row["step"] <= step], json.loads(run["progress"])

    def save(self, model, optimizer, config: TrainingConfig, step: int, log: list[dict], progress: dict) -> None:
        """Write log and state, each whole or not at all; the state's metadata says which run and step it is."""

        def write_log(part: str) -> None:
            with open(part, "w", newline="") as f:
                writer = csv.DictWriter(f, list(dict.fromkeys(name for row in log for name in row)))
                writer.writeheader()
                writer.writerows(log)

        tensors = {}
        for name, p in model.named_parameters():
            tensors[f"weight.{name}"] = p.detach().contiguous()
            if p.requires_grad:
                for moment in ("exp_avg", "exp_avg_sq"):
                    tensors[f"{moment}.{name}"] = optimizer.state[p][moment].contiguous()
        run = {
            "step": str(step),
            "progress": json.dumps(progress),
            "training": json.dumps(asdict(config)),
            "model": json.dumps(model.config.to_dict()),
        }
        # the log first: one that is ahead of the state is cut back
        checkpoint.write_whole(self.folder / "log.csv", write_log)
        checkpoint.write_whole(self.folder / "state.safetensors", lambda part: save_file(tensors, part, metadata=run))

    def finish(self, model) -> None:
        """Write the trained model."""
        checkpoint.save(model, self.folder / "checkpoint")
