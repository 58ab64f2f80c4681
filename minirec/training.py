"""Training a recurrent-depth model: a random depth for every batch, gradients through the last few steps.

The objective is the expected loss over text x and over depth r (arXiv 2502.05171, section 3.3):

    tau ~ N(log(mean) - sigma^2/2, sigma),   r ~ Poisson(exp(tau)) + 1,   sigma = 1/2
    the first r - k steps run without gradient, the last k = min(r, mean_backprop_depth) with it.

e enters every step, so the prelude learns although the graph is cut.  Every batch, depth and initial state is a
function of (seed, step): a killed run resumes to the same losses, and needs only weights, moments and a number.
Notebook: 02_training_through_depth.
"""

from __future__ import annotations

import csv
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minirec import checkpoint, tasks
from minirec.recurrent_block import RecurrentDepthLM
from minirec.tokenizer import PAD

IGNORE = -100  # label of a position that carries no loss
POOL = 16  # batches drawn at once and sorted by length, so that a batch holds problems of one size


@dataclass
class TrainingConfig:
    """How to train; the defaults are those of the shipped model.

    `steps` are optimiser steps; `warmup`, `decay` and `ramp` are fractions of them.
    """

    steps: int = 10_000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: float = 0.02  # linear from zero
    decay: float = 0.4  # linear to zero, at the end
    ramp: float = 0.7  # the mean depth grows from 1 to its full value over this fraction
    weight_decay: float = 0.05
    gradient_clip: float = 1.0
    seed: int = 0
    families: tuple[str, ...] = ("words",)
    log_every: int = 50
    evaluate_every: int = 1000
    evaluate_on: int = 64  # held-out problems
    save_every: int = 500

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "evaluate_every", "evaluate_on", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name in ("warmup", "decay", "ramp", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        self.families = tuple(self.families)
        for family in self.families:
            if family not in tasks.FAMILIES:
                raise ValueError(f"family is {family!r}; it must be one of {', '.join(tasks.FAMILIES)}")

    def rate(self, step: int) -> float:
        """The learning rate of a step: warm-up, plateau, linear decay to zero."""
        up = (step + 1) / max(1.0, self.warmup * self.steps)
        down = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, up, down)

    def mean_depth(self, step: int, full: float) -> float:
        """The mean of the depths drawn at a step."""
        return full if step >= self.ramp * self.steps else 1 + (full - 1) * step / (self.ramp * self.steps)


def sample_depth(mean: float, backprop: int, generator: torch.Generator, sigma: float = 0.5) -> tuple[int, int]:
    """Draw (steps without gradient, steps with it) for one batch: log-normal Poisson (2502.05171, eq. 1)."""
    tau = torch.normal(math.log(mean) - sigma**2 / 2, sigma, (1,), generator=generator)
    r = int(torch.poisson(tau.exp(), generator=generator)) + 1
    return max(r - backprop, 0), min(r, backprop)


def depth_loss(
    model: RecurrentDepthLM, tokens: Tensor, labels: Tensor, without_grad: int, with_grad: int, state: Tensor
) -> Tensor:
    """Mean cross-entropy after `without_grad` + `with_grad` recurrence steps, gradients through the last ones.

    tokens, labels (B, T) int64, labels already shifted and -100 where there is no loss; state (B, T, d) -> scalar.
    """
    e = model.prelude(tokens)  # (B, T, d)
    with torch.no_grad():
        for _ in range(without_grad):
            state = model.recur(state, e)
    for _ in range(with_grad):
        state = model.recur(state, e)
    return F.cross_entropy(model.coda(state).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def batch_of(problems: list[tasks.Problem]) -> tuple[Tensor, Tensor]:
    """Problems -> tokens and labels (B, T) int64, padded on the right; the loss is on the solution alone."""
    lines = [p.prompt + p.target for p in problems]
    width = max(map(len, lines)) - 1
    tokens, labels = torch.full((len(lines), width), PAD), torch.full((len(lines), width), IGNORE)
    for row, (line, p) in enumerate(zip(lines, problems, strict=True)):
        tokens[row, : len(line) - 1] = torch.tensor(line[:-1])
        labels[row, len(p.prompt) - 1 : len(line) - 1] = torch.tensor(p.target)
    return tokens, labels


class Batches:
    """The training data: `batches[step]` is a function of (config, step), so any step can be asked for again."""

    def __init__(self, config: TrainingConfig):
        self.config = config
        self._pool: tuple[int, list[list[tasks.Problem]]] = (-1, [])

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        number, inside = divmod(step, POOL)
        if self._pool[0] != number:
            seed, size = f"{self.config.seed}.{number}", self.config.batch_size
            share = -(-POOL * size // len(self.config.families))
            drawn = [p for f in self.config.families for p in islice(tasks.problems("train", seed, f), share)]
            drawn.sort(key=lambda p: len(p.prompt) + len(p.target))
            batches = [drawn[i * size : (i + 1) * size] for i in range(POOL)]
            random.Random(seed).shuffle(batches)
            self._pool = (number, batches)
        return batch_of(self._pool[1][inside])


@torch.inference_mode()
def exact_match(model: RecurrentDepthLM, problems: list[tasks.Problem], num_steps: int | None = None) -> float:
    """Share of problems whose whole solution greedy decoding gets right, token for token, in one forward pass.

    Greedy decoding writes exactly the solution if and only if every solution token is the argmax given the
    solution's own tokens before it; so nothing has to be generated.
    """
    tokens, labels = (t.to(model.device) for t in batch_of(problems))
    guesses = model(tokens, num_steps=num_steps).logits.argmax(-1)  # (B, T)
    return ((guesses == labels) | (labels == IGNORE)).all(dim=1).float().mean().item()


def train(model: RecurrentDepthLM, config: TrainingConfig, folder: str | Path) -> list[dict]:
    """Train `model` in place and return the log; `folder` gets the log, resumable state and the checkpoint.

    If `folder` holds a run of the same configuration, it is continued where it was last saved; a run of
    another configuration is a ValueError.  A run that is killed loses what it did since the last save.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = model.device
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )
    first, log, running = _resume(model, optimizer, config, folder)
    data = Batches(config)
    held_out = [p for f in config.families for p in tasks.heldout(config.evaluate_on, seed=1, family=f)]
    generator = torch.Generator()
    started, spent = time.perf_counter(), log[-1]["seconds"] if log else 0.0
    model.train()
    for step in tqdm(range(first, config.steps), initial=first, total=config.steps, disable=None):
        tokens, labels = (t.to(device) for t in data[step])
        rows = torch.arange(len(tokens), device=device)[:, None]
        run = (config.seed + 1) * 1_000_003 + step
        without, with_ = sample_depth(
            config.mean_depth(step, model.config.mean_recurrence),
            model.config.mean_backprop_depth,
            generator.manual_seed(run),
        )
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        state = model.initial_state(positions, seed=run * len(tokens) + rows)
        loss = depth_loss(model, tokens, labels, without, with_, state)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()

        running.append(loss.item())
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            row = {"step": done, "loss": sum(running) / len(running), "rate": config.rate(step)}
            row["seconds"] = round(spent + time.perf_counter() - started, 1)
            if done % config.evaluate_every == 0 or done == config.steps:
                row["exact_match"] = exact_match(model, held_out)
            log.append(row)
            running = []
        if done % config.save_every == 0 or done == config.steps:
            _save(model, optimizer, config, folder, done, log, running)
    model.eval()
    model.save_pretrained(folder / "checkpoint")
    return log


LOG_FIELDS = ("step", "loss", "rate", "seconds", "exact_match")


def _save(model, optimizer, config: TrainingConfig, folder: Path, step: int, log: list[dict], running: list) -> None:
    """Write log and state, each whole or not at all; the state's metadata says which run and step it is."""

    def write_log(part: str) -> None:
        with open(part, "w", newline="") as f:
            writer = csv.DictWriter(f, LOG_FIELDS)
            writer.writeheader()
            writer.writerows(log)

    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"weight.{name}"] = p.detach().contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[p][moment].contiguous()
    run = {
        "step": str(step),
        "running": json.dumps(running),
        "training": json.dumps(asdict(config)),
        "model": json.dumps(model.config.to_dict()),
    }
    # the log first: one that is ahead of the state is cut back
    checkpoint.write_whole(folder / "log.csv", write_log)
    checkpoint.write_whole(folder / "state.safetensors", lambda part: save_file(tensors, part, metadata=run))


def _resume(model, optimizer, config: TrainingConfig, folder: Path) -> tuple[int, list[dict], list[float]]:
    """Put weights and moments back as they were last saved; returns step, log, and losses not yet logged."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0, [], []
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
                optimizer.state[p] = {
                    "step": torch.tensor(float(step), device=p.device),
                    "exp_avg": f.get_tensor(f"exp_avg.{name}").to(p.device),
                    "exp_avg_sq": f.get_tensor(f"exp_avg_sq.{name}").to(p.device),
                }
    with open(folder / "log.csv", newline="") as f:
        log = [{k: float(v) if k != "step" else int(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
    return step, [row for row in log if row["step"] <= step], json.loads(run["running"])
