"""A run of training in a folder: log, resumable state, and the checkpoint it ends with.

log.csv              one row every `log_every` steps
state.safetensors    weights and moments; its metadata says which run and which step they are of
checkpoint/          the trained model
.lock                who is training in this folder; as long as that process lives, nobody else may
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minirec.files import checkpoint
from minirec.files.machine import one_line
from minirec.files.writing import LOCK, blaming, locked, write_whole
from minirec.training import TrainingConfig, place

MOMENTS = ("exp_avg", "exp_avg_sq")


class Run:
    """The folder of one run; `minirec.training.train` holds it, resumes from it and saves to it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.start = ""  # which weights the run began with

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from training in the folder; OSError that says who does, if somebody does.

        Of the processes that train together the first one holds it, the one that writes.
        """
        with blaming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if place()[0]:
            yield
        else:
            with locked(self.folder / LOCK, "is training in it"):
                yield

    def resume(self, model: nn.Module, optimizer, config: TrainingConfig) -> tuple[int, list[dict], list[float]]:
        """Put weights and moments back as they were last saved; returns step, log, and losses not yet logged.

        The model has the weights that the run began with, or those last saved.  ValueError, and nothing is changed, if
        the state is of another run (another configuration or model, other weights to begin with), or if a tensor or a
        number in it is not what `save` writes.
        """
        model, parameters = checkpoint.plain(model)
        self.start = _identity(parameters)
        path = self.folder / "state.safetensors"
        if not path.exists():
            return 0, [], []
        with checkpoint.opened(path) as f:
            run = f.metadata() or {}
            ours = self._identities(model, config)
            for what in ("training", "model"):
                if run.get(what) != ours[what]:
                    found = f"its {what} is {run.get(what)}, this one's is {ours[what]}"
                    raise ValueError(f"{path} is of another run: {one_line(found, 2000)}")
            step, running = _numbers(path, run, config)
            _check_tensors(path, f, {name: p for name, p, _ in _stored(parameters)})
            saved = all(torch.equal(f.get_tensor(f"weight.{name}"), p.cpu()) for name, p in parameters.items())
            if not saved and run.get("start") != self.start:
                found = f"it began with {one_line(run.get('start'))}, this one begins with {self.start}"
                raise ValueError(f"{path} is of another run: {found}; give it the model that it began with")
            self.start = run.get("start", self.start)
            log = self._read_log(step)
            with torch.no_grad():
                for name, p, moment in _stored(parameters):
                    value = f.get_tensor(name)
                    if moment is None:
                        p.copy_(value)
                        optimizer.state.pop(p, None)
                    else:
                        optimizer.state[p][moment] = value.to(p.device)
                        optimizer.state[p]["step"] = torch.tensor(float(step), device=p.device, dtype=torch.float32)
        return step, log, running

    def save(self, model, optimizer, config: TrainingConfig, step: int, log: list[dict], running: list) -> None:
        """Write log and state, each whole or not at all; the state's metadata says which run and step it is.

        ValueError, and nothing is written, if a weight or a moment is not finite.
        """

        def write_log(part: str) -> None:
            with open(part, "w", newline="") as f:
                writer = csv.DictWriter(f, ["step", "loss", "rate", "seconds", *dict.fromkeys(config.families)])
                writer.writeheader()
                writer.writerows(log)

        model, parameters = checkpoint.plain(model)
        tensors = {}
        for name, p, moment in _stored(parameters):
            tensors[name] = (p.detach() if moment is None else optimizer.state[p][moment]).contiguous()
            checkpoint.check_finite(f"step {step}: {name}", tensors[name])
        numbers = {"step": str(step), "running": json.dumps(running)}
        run = numbers | self._identities(model, config)
        # the log first: one that is ahead of the state is cut back
        write_whole(self.folder / "log.csv", write_log)
        write_whole(self.folder / "state.safetensors", lambda part: save_file(tensors, part, run))

    def finish(self, model) -> None:
        """Write the trained model."""
        checkpoint.save(model, self.folder / "checkpoint")

    def _identities(self, model, config: TrainingConfig) -> dict[str, str]:
        """What makes a run this run."""
        model_config = json.dumps(model.config.to_dict())
        return {"training": json.dumps(asdict(config)), "model": model_config, "start": self.start}

    def _read_log(self, step: int) -> list[dict]:
        """The rows of log.csv up to a step."""
        path = self.folder / "log.csv"
        try:
            with open(path, newline="", encoding="utf-8") as f:
                rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
            log = [row | {"step": int(row["step"])} for row in rows]
        except (ValueError, TypeError, KeyError, OverflowError, csv.Error):
            raise ValueError(f"{path} is not the log of a run") from None
        return [row for row in log if row["step"] <= step]


def _identity(parameters: dict[str, nn.Parameter]) -> str:
    """A hash of weights: names, shapes, number formats and bits."""
    digest = hashlib.sha256()
    for name, p in parameters.items():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype};".encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"weights {digest.hexdigest()[:16]}"


def _stored(parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter, str | None]]:
    """What a state holds: name of a tensor, its parameter, and which moment it is, None for the weight."""
    for name, p in parameters.items():
        yield f"weight.{name}", p, None
        if p.requires_grad:
            yield from ((f"{moment}.{name}", p, moment) for moment in MOMENTS)


def _check_tensors(path: Path, f, expected: dict[str, Tensor]) -> None:
    """ValueError naming the first tensor of an open state that is missing, foreign, of another shape, or not finite."""
    found = set(f.keys())
    for name in sorted(expected.keys() ^ found):
        what = "is not of this run" if name in found else "is missing"
        raise ValueError(f"{path}: tensor {one_line(name)} {what}")
    for name, p in expected.items():
        value = f.get_tensor(name)
        if (value.shape, value.dtype) != (p.shape, p.dtype):
            is_, be = (f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}" for t in (value, p))
            raise ValueError(f"{path}: tensor {name} is {is_}; it must be {be}")
        checkpoint.check_finite(f"{path}: tensor {name}", value)
        if name.startswith("exp_avg_sq") and value.min() < 0:
            raise ValueError(f"{path}: tensor {name} holds negative values; it must be an average of squares")


def _numbers(path: Path, run: dict[str, str], config: TrainingConfig) -> tuple[int, list[float]]:
    """The step of a state and its losses that are not yet logged."""
    try:
        step, running = int(run["step"]), json.loads(run["running"])
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"{path} does not say which step it is of") from None
    if not 1 <= step <= config.steps:
        raise ValueError(f"{path}: step is {one_line(step)}; it must be from 1 to {config.steps}")
    if not isinstance(running, list) or not all(isinstance(x, float) and math.isfinite(x) for x in running):
        raise ValueError(f"{path}: running is {one_line(running)}; it must be a list of finite losses")
    return step, running
