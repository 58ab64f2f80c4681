"""Training a recurrent-depth model: random depth, gradients through the last steps, and a use for every step.

The objective of the paper is the expected loss over text x and over depth r (arXiv 2502.05171, section 3.3):

    tau ~ N(log(mean) - sigma^2/2, sigma),   r ~ Poisson(exp(tau)) + 1,   sigma = 1/2
    the first r - k steps run without gradient, the last k = min(r, mean_backprop_depth) with it.

e enters every step, so the prelude learns although the graph is cut.  In our runs that alone gave a tiny model which
is done after two steps, however hard the problem.  Two things made it use its loop:

    stages   before a row has run the steps its problem needs, it is asked for the stage that so many steps reach
    reads    a row is read and asked on its way as well, not only where it ends

so that each step learns to do one step of the problem, and the steps beyond to leave the answer alone.  Several
readings taught the later steps much faster; from random weights one reading finds the first step sooner.  The
learning rate weighs as much: half of it found three levels in the time of one (benchmarks/results/recipe.md).

Every batch, depth and initial state is a function of (seed, step): a killed run resumes to the same losses, and needs
only weights, moments and a number.  And processes that torchrun has started share the rows of a batch without a word:
each draws the whole of it, and only gradients and losses are added up.  Notebook: 02_training_through_depth.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minirec import tasks
from minirec.config import MOST_STEPS, flag, number, one_of, plain, shown, whole
from minirec.recurrent_block import RecurrentDepthLM
from minirec.tasks import PAD, task_tokenizer

IGNORE = -100  # label of a position that carries no loss
MOST = {"batch_tokens": 2**24, "evaluate_on": 10**6, "extra": MOST_STEPS}  # upper bounds of a TrainingConfig
POOL = 16  # rounds of batches drawn at once and sorted by length, so that a batch holds problems of one size


@dataclass
class TrainingConfig:
    """How to train.  The shipped model was trained in several runs, each from the last one's weights: `make tiny`.

    `steps` are optimiser steps; `warmup`, `decay`, `joining` and `curriculum` are fractions of them.  `families` are
    taken in turn, a batch each.  `random`, `early` and what they leave of 1 are the shares of rows whose depth is
    drawn by the paper's rule, evenly from 1 to the steps that the problem needs, or as those steps and a Poisson
    number more (mean `extra`); a problem that needs a single step has no early rows.  `hardest` is the share of
    problems that are of the hardest level joined: on its way it asks for what the easier levels ask for at the end.
    Raises ValueError naming a field whose value is of another type or out of range.
    """

    steps: int = 12_000
    batch_tokens: int = 3000  # of a batch, padding included; there are as many rows as fit
    learning_rate: float = 2e-3
    warmup: float = 0.02  # linear from zero
    decay: float = 0.4  # linear to zero, at the end
    families: tuple[str, ...] = ("hops", "automaton", "words", "hops", "words")
    joining: float = 0.15  # the families join one after the other, in this order, over this first part
    curriculum: float = 0.25  # and from then on the levels of each, one by one over so much of the run
    hardest: float = 0.4
    early: float = 0.45
    random: float = 0.15
    extra: float = 2.0  # mean of the steps beyond those needed
    staged: bool = True  # before its steps are enough, a row is asked for the stage reached, not for the answer
    reads: int = 4  # how often the coda reads a row on its way, the end included
    weight_decay: float = 0.05
    gradient_clip: float = 1.0
    seed: int = 0
    log_every: int = 50
    evaluate_every: int = 1000
    evaluate_on: int = 64  # held-out problems
    save_every: int = 500

    def __post_init__(self):
        for field in fields(self):  # as Python's own, so that a run is the same run whoever made its numbers
            name, value = field.name, getattr(self, field.name)
            if name == "seed":
                value = whole(name, value, 0, 2**32 - 1)
            elif field.type == "int":
                value = whole(name, value, 1, MOST.get(name, 2**31 - 1))
            elif field.type == "bool":
                value = flag(name, value)
            elif name in ("learning_rate", "gradient_clip"):
                value = number(name, value, above=0)
            elif field.type == "float":
                value = number(name, value, least=0, most=MOST.get(name, 1))
            setattr(self, name, value)
        if self.early + self.random > 1:
            raise ValueError(f"early is {self.early} and random {self.random}; together they must be at most 1")
        families = plain(self.families)
        self.families = (families,) if isinstance(families, str) else families
        if not isinstance(self.families, Sequence) or not self.families:
            raise ValueError(f"families is {shown(families)}; it must name at least one of {', '.join(tasks.FAMILIES)}")
        self.families = tuple(one_of("family", family, tasks.FAMILIES) for family in self.families)

    def rate(self, step: int) -> float:
        """The learning rate of a step: warm-up, plateau, linear decay to zero."""
        up = (step + 1) / max(1.0, self.warmup * self.steps)
        down = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, up, down)

    def run(self, step: int) -> int:
        """A number that no other step of this seed has: what its depths and initial states are drawn with."""
        return (self.seed + 1) * 1_000_003 + step

    def joins(self, family: str) -> float:
        """The step at which a family joins."""
        order = list(dict.fromkeys(self.families))
        return order.index(family) / max(1, len(order) - 1) * self.joining * self.steps

    def family(self, step: int) -> str:
        """Whose turn a step is."""
        turns = [f for f in self.families if self.joins(f) <= step]
        return turns[step % len(turns)]

    def levels(self, family: str, step: int) -> tuple[int, ...]:
        """The levels of a family that have joined by a step, easiest first, one at least."""
        levels, since = tasks.FAMILIES[family], step - self.joins(family)
        joined = sum(i * self.curriculum * self.steps <= since * len(levels) for i in range(len(levels)))
        return levels[: max(1, joined)]


def sample_depth(mean: float, generator: torch.Generator, n: int = 1, sigma: float = 0.5) -> Tensor:
    """n depths of the paper, (n,) int64: log-normal Poisson of about this mean, at least 1 (2502.05171, eq. 1)."""
    tau = torch.normal(math.log(mean) - sigma**2 / 2, sigma, (n,), generator=generator, dtype=torch.float32)
    return torch.poisson(tau.exp(), generator=generator).long() + 1


def depth_loss(
    model: RecurrentDepthLM,
    tokens: Tensor,
    labels: Tensor,
    depths: Tensor,
    backprop: int,
    state: Tensor,
    reads: Sequence[int] = (0,),
    whole: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean cross-entropy, each row after its own number of recurrence steps, gradients through the last `backprop`.

    tokens (B, T) int64; labels (B, T), already shifted and -100 where there is no loss, or (S, B, T): what a row is
    asked for after step 1, 2, .. S and from there on; depths (B,) int64; state (B, T, d) -> scalar.  Rows start one
    after the other, the deepest first, and end together: so one cut serves all.  reads: at how many steps before the
    end, below `backprop`, the coda reads all rows that have started; the loss is the mean over these readings.

    whole: labels and depths of the batch that these rows are a share of.  Then the loss is what they contribute to the
    mean over that batch: the losses of its shares add up to the loss of the batch.
    """
    order = depths.argsort(descending=True, stable=True)
    labels = labels[None] if labels.dim() == 2 else labels
    tokens, labels, state, depths = tokens[order], labels[:, order], state[order], depths[order]
    steps = depths.tolist()
    all_labels, all_depths = whole or (labels, depths)
    all_labels = all_labels[None] if all_labels.dim() == 2 else all_labels
    e = model.prelude(tokens)  # (B, T, d)
    s, losses = state[:0], []  # (rows that have started, T, d)
    for left in range(steps[0], 0, -1):
        started = sum(n >= left for n in steps)
        # a notebook's own model may have nothing but prelude, recur and coda
        at: list[Any] = [model.whole(tokens[:started])] if isinstance(model, RecurrentDepthLM) else []
        with torch.set_grad_enabled(left <= backprop and torch.is_grad_enabled()):
            s = model.recur(torch.cat([s, state[len(s) : started]]), e[:started], *at)
        if left - 1 in reads:
            logits, asked = model.coda(s, *at), asked_for(labels, depths, left)  # (started, T, V), (started, T)
            loss = F.cross_entropy(logits.flatten(0, 1), asked.flatten(), ignore_index=IGNORE, reduction="sum")
            of_all = asked if whole is None else asked_for(all_labels, all_depths, left)
            losses.append(loss / (of_all != IGNORE).sum())
    deepest = int(all_depths.max())
    return torch.stack(losses).sum() / sum(read < deepest for read in set(reads))


def asked_for(labels: Tensor, depths: Tensor, left: int) -> Tensor:
    """What a reading after the step with which `left` steps were left asks the rows that have started: (rows, T)."""
    rows = (depths >= left).nonzero()[:, 0]
    return labels[(depths[rows] - left).clamp(max=len(labels) - 1), rows]  # labels (S, B, T): by steps run, less one


class Objective(torch.nn.Module):
    """`depth_loss` of a model, as the module that DistributedDataParallel wants to be called through."""

    def __init__(self, model: RecurrentDepthLM):
        super().__init__()
        self.model = model

    def forward(self, *batch) -> Tensor:
        """The arguments of `depth_loss` after the model -> its loss."""
        return depth_loss(self.model, *batch)


def stages_of(problems: list[tasks.Problem], depths: list[int]) -> tuple[Tensor, Tensor]:
    """The same, with labels for every step: tokens (B, T), labels (S, B, T) int64, S the most stages of a problem.

    The text that a row reads while it is asked for earlier stages is the stage reached at its own depth.
    """
    tokens, last = batch_of(problems, depths)
    labels = last.repeat(max(len(p.stages) for p in problems), 1, 1)  # (S, B, T)
    for row, p in enumerate(problems):
        for steps in range(1, len(labels) + 1):
            target = p.reached(steps)
            labels[steps - 1, row, len(p.prompt) - 1 : len(p.prompt) - 1 + len(target)] = torch.tensor(target)
    return tokens, labels


def batch_of(problems: list[tasks.Problem], depths: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Problems -> tokens and labels (B, T) int64, padded on the right; the loss is on the solution alone.

    With depths, the target of each problem is the stage reached after so many steps.
    """
    targets = [p.target for p in problems]
    if depths is not None:
        targets = [p.reached(depth) for p, depth in zip(problems, depths, strict=True)]
    width = max(len(p.prompt) + len(t) for p, t in zip(problems, targets, strict=True)) - 1
    tokens, labels = torch.full((len(problems), width), PAD), torch.full((len(problems), width), IGNORE)
    for row, (p, target) in enumerate(zip(problems, targets, strict=True)):
        line = p.prompt + target
        tokens[row, : len(line) - 1] = torch.tensor(line[:-1])
        labels[row, len(p.prompt) - 1 : len(line) - 1] = torch.tensor(target)
    return tokens, labels


class Batches:
    """The training data: `batches[step]` is a function of (config, step), so any step can be asked for again.

    A batch is tokens (B, T), labels (S, B, T), or (B, T) without stages, and depths (B,), all int64; `mean_depth` is
    the paper rule's.
    """

    def __init__(self, config: TrainingConfig, mean_depth: float):
        self.config, self.mean_depth = config, mean_depth
        self._longest: dict[tuple[str, int], int] = {}  # tokens of a line, by family and level
        self._pools: dict[str, dict[int, list[tasks.Problem]]] = {}  # by family and step

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        family, window = config.family(step), POOL * len(config.families)
        if step not in self._pools.get(family, {}):
            number = step // window
            turns = [s for s in range(number * window, (number + 1) * window) if config.family(s) == family]
            seed, levels = f"{config.seed}.{number}", config.levels(family, turns[0])
            size = self.rows(family, levels)
            streams = [tasks.problems("train", seed, family, level) for level in levels]
            rng = random.Random(f"{family} {seed}")
            drawn = [
                next(streams[-1] if rng.random() < config.hardest else rng.choice(streams))
                for _ in range(len(turns) * size)
            ]
            drawn.sort(key=lambda p: len(p.prompt + p.target))
            batches = [drawn[i * size : (i + 1) * size] for i in range(len(turns))]
            rng.shuffle(batches)
            self._pools[family] = dict(zip(turns, batches, strict=True))
        problems = self._pools[family][step]
        generator = torch.Generator().manual_seed(config.run(step))
        depths = self._depths(problems, generator)
        if config.staged:
            return *stages_of(problems, depths.tolist()), depths
        return *batch_of(problems), depths

    def reads(self, step: int, backprop: int) -> list[int]:
        """At how many steps before the end the coda reads: at the end, and where chance has it below `backprop`."""
        others = random.Random(self.config.run(step)).sample(range(1, backprop), min(self.config.reads, backprop) - 1)
        return [0, *others]

    def rows(self, family: str, levels: Sequence[int]) -> int:
        """How many problems a batch of these levels holds."""
        return max(1, self.config.batch_tokens // max(self._length(family, level) for level in levels))

    def _length(self, family: str, level: int) -> int:
        """The longest line among some problems of a level."""
        if (family, level) not in self._longest:
            some = islice(tasks.problems("heldout", 0, family, level), 64)
            self._longest[family, level] = max(len(p.prompt + p.target) for p in some)
        return self._longest[family, level]

    def _depths(self, problems: list[tasks.Problem], generator: torch.Generator) -> Tensor:
        """How deep each row goes, (B,) int64: by the paper's rule, or by what the problem needs."""
        needed = torch.tensor([len(p.stages) for p in problems])  # (B,)
        kind, share = torch.rand((2, len(problems)), generator=generator, dtype=torch.float32)
        early = 1 + (share * needed).long()
        mean = torch.full(needed.shape, self.config.extra, dtype=torch.float32)
        beyond = needed + torch.poisson(mean, generator=generator).long()
        paper = sample_depth(self.mean_depth, generator, len(problems))
        depths = torch.where((kind < self.config.early) & (needed > 1), early, beyond)
        return torch.where(kind >= 1 - self.config.random, paper, depths)


def place() -> tuple[int, int]:
    """Which process this is, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(x: Tensor) -> Tensor:
    """The sum over all processes, each of which has to ask for it; on the device of x, without a gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


@torch.inference_mode()
def exact_match(model: RecurrentDepthLM, problems: list[tasks.Problem], num_steps: int | None = None) -> float:
    """Share of problems whose whole solution greedy decoding gets right, token for token, in one forward pass.

    Greedy decoding writes exactly the solution if and only if every solution token is the argmax given the
    solution's own tokens before it; so nothing has to be generated.  Under torchrun each process looks at its share of
    the problems, so all have to call this, and all get the whole answer.
    """
    rank, world = place()
    right = torch.zeros((), device=model.device, dtype=torch.float32)
    if own := problems[rank::world]:
        tokens, labels = (t.to(model.device) for t in batch_of(own))
        guesses = model(tokens, num_steps=num_steps).logits.argmax(-1)  # (B, T)
        right = ((guesses == labels) | (labels == IGNORE)).all(dim=1).float().sum()
    return total(right).item() / len(problems)


def train(model: RecurrentDepthLM, config: TrainingConfig, run=None, until: int | None = None) -> list[dict]:
    """Train `model` in place and return the log, one row every `log_every` steps.

    run: a `minirec.files.run.Run`, the folder that gets the log, resumable state and the checkpoint; None keeps
    nothing.  If the folder holds a run of the same configuration from the same initial weights, training continues from
    its last save; another run is a ValueError, and a folder that another process trains in is an OSError.  A run that
    is killed loses what it did since the last save.
    until: stop after this step, for now or for good; what is planned for later steps stays as it is.
    ValueError that names the step if the loss or the gradient is not finite, which leaves `model` as it was before that
    step, or if a weight is not finite when it is saved.  The folder stays as it was at the last save.

    Processes that torchrun started (`minirec.tools.processes`) train one model together: each runs its share of the
    rows of the same batches, so their number changes nothing but rounding, and a run may be resumed by another number
    of them.  All read the folder; only the first writes to it.  ValueError if a batch may have fewer rows than there
    are processes.
    """
    end = config.steps if until is None else until
    if not 1 <= end <= config.steps:
        raise ValueError(f"until is {until}; it must be from 1 to steps, here {config.steps}")
    if model.config.padded_vocab_size < (needed := task_tokenizer().get_vocab_size()):
        raise ValueError(f"vocab_size is {model.config.vocab_size}; the tasks' tokenizer needs {needed}")
    data, (_, world) = Batches(config, model.config.mean_recurrence), place()
    fewest = min(data.rows(family, tasks.FAMILIES[family]) for family in config.families) if world > 1 else 1
    if fewest < world:
        raise ValueError(
            f"batch_tokens is {config.batch_tokens}, too few for a row for each of {world} processes: a batch may have "
            f"{fewest}"
        )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )
    with run.held() if run else nullcontext():
        return _train(model, optimizer, config, data, run, end)


def _train(model, optimizer, config: TrainingConfig, data: Batches, run, end: int) -> list[dict]:
    """The loop of `train`, from the last save of `run` to step `end`."""
    (rank, world), device = place(), model.device
    first, log, running = run.resume(model, optimizer, config) if run else (0, [], [])
    objective: torch.nn.Module = Objective(model)
    if world > 1:
        objective = DistributedDataParallel(objective)
    held_out = {f: tasks.heldout(config.evaluate_on, seed=1, family=f) for f in config.families}
    started, spent = time.perf_counter(), log[-1]["seconds"] if log else 0.0

    def line(done: int) -> dict:
        loss, seconds = sum(running) / len(running), round(spent + time.perf_counter() - started, 1)
        return {"step": done, "loss": loss, "rate": config.rate(done - 1), "seconds": seconds}

    def measured() -> dict:
        return {family: exact_match(model, problems) for family, problems in held_out.items()}

    model.train()
    for step in tqdm(range(first, end), initial=first, total=end, disable=True if rank else None):
        tokens, labels, depths = (t.to(device) for t in data[step])
        # dealt out from the deepest on, so that all processes have about the same to do
        own = depths.argsort(descending=True, stable=True)[rank::world].sort().values
        positions = torch.arange(tokens.shape[1], device=device).expand(len(own), -1)
        state = model.initial_state(positions, seed=config.run(step) * len(tokens) + own[:, None])
        backprop = model.config.mean_backprop_depth
        batch = tokens[own], labels[..., own, :], depths[own], backprop, state, data.reads(step, backprop)
        loss = objective(*batch, (labels, depths) if world > 1 else None)
        optimizer.zero_grad()
        (loss * world).backward()  # the gradients of the shares add up, and DistributedDataParallel takes their mean
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        value, norm = torch.stack([total(loss), norm.to(loss.dtype)]).tolist()  # the step's only synchronisation
        for what, found in (("loss", value), ("norm of the gradient", norm)):
            if not math.isfinite(found):
                raise ValueError(f"step {step + 1}: the {what} is {found}; try a lower learning_rate")
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()

        running.append(value)
        done = step + 1
        if done % config.log_every == 0 or done == end:
            log.append(line(done) | (measured() if done % config.evaluate_every == 0 or done == end else {}))
            running = []
        if done % config.save_every == 0 or done == end:
            for name, p in model.named_parameters():
                if not p.isfinite().all():
                    raise ValueError(f"step {done}: {name} is not finite after it; try a lower learning_rate")
            if run and rank == 0:
                run.save(model, optimizer, config, done, log, running)
    if first >= end:  # it had come so far before
        log += [line(first)] if running else []
        log[-1] |= {} if held_out.keys() <= log[-1].keys() else measured()
    model.eval()
    if run and rank == 0:
        run.finish(model)
    return log
