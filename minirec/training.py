"""Training a recurrent-depth model until it thinks further than it was taught.

The objective of the paper is the expected loss over text x and over depth r (arXiv 2502.05171, section 3.3):

    tau ~ N(log(mean) - sigma^2/2, sigma),   r ~ Poisson(exp(tau)) + 1,   sigma = 1/2
    the first r - k steps run without gradient, the last k = min(r, mean_backprop_depth) with it.

That is `depth_loss`.  A model of this size trained by it solves no problem deeper than those it was shown.  `train`
trains the step instead.  An optimiser step is a *window* of a few recurrence steps, all with gradient, that starts
from a state of any age, and after each step the target is what so many serial steps reach (`Problem.stages`):

    noise --window--> state --window--> state --window--> ...           each window: loss, backward, optimiser step
                        |                 |
                     rewire?           rewire?                          other arrows, the same walks, the same state

    carrying   the state left by a window is kept, without its graph, and a later window goes on from it
    rewiring   a kept state gets another problem of the same length: a step may be due at any age of the state,
               although no walk in training is longer than four arrows
    bare reading   in the first phases the head reads the state without the coda's blocks: else the coda learns to
               follow the last arrow by itself, the state holds nothing, and no second step ever forms
    freezing   the prompt and the answer up to some token are finished first and then held, as decoding with one
               shared KV slot sees them; the rest loops against them

The schedule is a list of phases, and a phase ends when what it teaches is learned: first the single step, on few
arrows, then the same step from carried states, then more arrows, then all families.

Every batch and initial state is a function of (seed, step), and kept states are dropped at every save: a killed run
resumes to the same losses.  And processes that torchrun has started share the rows of a batch without a word: each
draws the whole of it, and only gradients, losses and counts are added up.  Notebook: 02_training_through_depth.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minirec import tasks
from minirec.config import MOST_STEPS, flag, number, one_of, plain, shown, whole
from minirec.recurrent_block import RecurrentDepthLM, wide
from minirec.tasks import PAD, task_tokenizer

IGNORE = -100  # label of a position that carries no loss; what cross_entropy ignores, too
MOST = {"batch_tokens": 2**24, "evaluate_on": 10**6, "window": MOST_STEPS}  # upper bounds of the settings
KEPT = 8  # states of a family that are kept at once
OLDEST = 40  # recurrence steps after which a state is dropped
TEMPLATE = 0.2  # weight of the loss of all tokens but the deep ones


@dataclass
class Phase:
    """A part of the schedule.  It ends when all its families are right often enough, or after `steps` steps."""

    families: tuple[str, ...]  # in turn, a batch each
    window: int  # recurrence steps of an optimiser step, all with gradient; of problems without arrows see WINDOWS
    arrows: tuple[int, int] = tasks.ARROWS  # fewest and most of a problem
    ends: bool = True  # whether walks come to an end, or go round: without ends nobody can guess them
    carried: float = 0.7  # share of the windows that go on from a kept state, if there is one
    gate: float = 0.6  # a state is kept if more than this share of its deep tokens was right
    rewired: float = 0.5  # share of its rows that get other arrows; all of them, if walks go round
    anew: float = 0.0  # share of the carried windows in which the prompt begins anew, from noise
    bare: bool = False  # read the state with the head alone: a coda learns to follow arrows itself, and leaves s idle
    frozen: float = 0.0  # share of the fresh windows in which part of the text is finished first
    learned: float = 0.93  # ends when so much is right, by family, fresh and carried; above 1: never
    steps: int = 10_000  # or after so many

    def __post_init__(self):
        _check_numbers(self)
        families, arrows = plain(self.families), plain(self.arrows)
        if not isinstance(families, (list, tuple)) or not families:
            raise ValueError(f"families is {shown(families)}; it must name at least one of {', '.join(tasks.FAMILIES)}")
        self.families = tuple(one_of("family", family, tasks.FAMILIES) for family in families)
        if not isinstance(arrows, (list, tuple)) or len(arrows) != 2:
            raise ValueError(f"arrows is {shown(arrows)}; it must be the fewest and the most")
        fewest = whole("arrows", arrows[0], 3, len(tasks.LETTERS))
        self.arrows = fewest, whole("arrows", arrows[1], fewest, len(tasks.LETTERS))


def _check_numbers(settings) -> None:
    """Make the numbers of a dataclass Python's own, so that a run is the same run whoever made them; check them."""
    for item in fields(settings):
        name, value = item.name, getattr(settings, item.name)
        if name == "seed":
            value = whole(name, value, 0, 2**32 - 1)
        elif item.type == "int":
            value = whole(name, value, 1, MOST.get(name, 2**31 - 1))
        elif item.type == "bool":
            value = flag(name, value)
        elif name in ("learning_rate", "gradient_clip"):
            value = number(name, value, above=0)
        elif name in ("gate", "learned"):
            value = number(name, value)
        elif item.type == "float":
            value = number(name, value, least=0, most=1)
        setattr(settings, name, value)


# An automaton counts its steps, and what a window leaves behind learns nothing from those after it: so its windows
# are as long as its hardest level.  A word problem needs two or three steps.
WINDOWS = {"automaton": 8, "words": 3}
PHASES = (
    # the step itself, on few arrows; then the same from carried states, which has to start on few arrows as well
    Phase(("hops",), window=1, arrows=(6, 7), ends=False, bare=True, carried=0.0),
    Phase(("hops",), window=1, arrows=(6, 7), ends=False, bare=True, gate=0.3, anew=0.5, learned=0.9),
    # more arrows, longer windows
    Phase(("hops",), window=2, arrows=(10, 20), ends=False, bare=True, gate=0.3, learned=0.9, steps=2000),
    Phase(("hops",), window=4, arrows=(10, 32), ends=False, bare=True, gate=0.3, learned=0.93, steps=2000),
    # the same step in sentences and on the grid, and the automaton's
    Phase(
        ("hops", "reports", "hops", "grid", "hops", "automaton"),
        window=2, arrows=(6, 20), ends=False, bare=True, gate=0.3, learned=0.85, steps=6000,
    ),
    # all families, walks that end, and the coda
    Phase(
        ("words", "hops", "automaton", "words", "reports", "words", "grid", "automaton", "words", "hops"),
        window=4, frozen=0.3, learned=2.0, steps=20_000,
    ),
)  # fmt: skip


@dataclass
class TrainingConfig:
    """How to train; as it is, the recipe of the shipped model (`make tiny`).

    The learning rate grows over `warmup` steps and falls to zero over the last `decay` of the last phase.
    """

    phases: tuple[Phase, ...] = PHASES
    batch_tokens: int = 1200  # of a batch, padding included; there are as many rows as fit
    learning_rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.4
    hardest: float = 0.4  # share of the problems that are of the hardest trained level; the rest are of all alike
    weight_decay: float = 0.05
    gradient_clip: float = 1.0
    seed: int = 0
    log_every: int = 50
    evaluate_every: int = 2000
    evaluate_on: int = 64  # held-out problems
    save_every: int = 250  # kept states are dropped at every save

    def __post_init__(self):
        _check_numbers(self)
        phases = self.phases
        if not isinstance(phases, (list, tuple)) or not phases or not all(isinstance(p, Phase) for p in phases):
            raise ValueError(f"phases is {shown(phases)}; it must be one Phase or more")
        self.phases = tuple(phases)

    @property
    def families(self) -> tuple[str, ...]:
        """All families of the schedule, in the order in which they join."""
        return tuple(dict.fromkeys(f for phase in self.phases for f in phase.families))

    def rate(self, step: int, progress: Progress) -> float:
        """The learning rate of a step: warm-up, plateau, and linear to zero at the end of the last phase."""
        down = 1.0
        if progress.phase == len(self.phases) - 1:
            steps = self.phases[-1].steps
            down = (steps - (step - progress.began)) / max(1.0, self.decay * steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, down)


def sample_depth(mean: float, generator: torch.Generator, n: int = 1, sigma: float = 0.5) -> Tensor:
    """n depths of the paper, (n,) int64: log-normal Poisson of about this mean, at least 1 (2502.05171, eq. 1)."""
    tau = torch.normal(math.log(mean) - sigma**2 / 2, sigma, (n,), generator=generator, dtype=torch.float32)
    return torch.poisson(tau.exp(), generator=generator).long() + 1


def depth_loss(
    model: RecurrentDepthLM, tokens: Tensor, labels: Tensor, depths: Tensor, backprop: int, state: Tensor
) -> Tensor:
    """Mean cross-entropy, each row after its own number of recurrence steps, gradients through the last `backprop`.

    The paper's objective.  tokens and labels (B, T) int64, already shifted and -100 where there is no loss; depths
    (B,) int64; state (B, T, d) -> scalar.  Rows start one after the other, the deepest first, and end together: so
    one cut serves all.
    """
    order = depths.argsort(descending=True, stable=True)
    tokens, labels, state, steps = tokens[order], labels[order], state[order], depths[order].tolist()
    e = model.prelude(tokens)  # (B, T, d)
    s = state[:0]  # (rows that have started, T, d)
    for left in range(steps[0], 0, -1):
        started = sum(n >= left for n in steps)
        with torch.set_grad_enabled(left <= backprop and torch.is_grad_enabled()):
            s = model.recur(torch.cat([s, state[len(s) : started]]), e[:started])
    return F.cross_entropy(model.coda(s).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


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


@dataclass
class Batch:
    """Problems in training, with the state they have come to."""

    rows: list[int]  # which rows of the whole batch these are: another process may have the others
    problems: list[tasks.Problem]
    ran: list[int]  # recurrence steps of each row on its problem
    state: Tensor  # (B, T, d)
    sure: Tensor  # (B, T) bool: False where the last stage was missed, so that nobody knows what comes next
    frozen: Tensor  # (B, T) bool: True where the text is finished and its state is held
    age: int = 0  # of the state, in recurrence steps

    def read(self) -> Tensor:
        """What the model reads, the whole solution included: (B, T) int64."""
        return batch_of(self.problems)[0].to(self.state.device)

    def labels(self, steps: int) -> tuple[Tensor, Tensor]:
        """What is due after so many steps more, deep tokens and all others apart: (B, T) int64 each."""
        labels = batch_of(self.problems, [ran + steps for ran in self.ran])[1]
        deep = torch.zeros_like(labels, dtype=torch.bool)
        for row, p in enumerate(self.problems):
            deep[row, [len(p.prompt) - 1 + i for i in p.deep]] = True
        labels, deep = (x.to(self.state.device) for x in (labels, deep))
        labels = labels.where(~self.frozen, IGNORE)
        return labels.where(deep & self.sure, IGNORE), labels.where(~deep, IGNORE)


def fresh(model: RecurrentDepthLM, config: TrainingConfig, phase: Phase, family: str, step: int) -> Batch:
    """New problems of a family, their states noise; a function of (config, step) and the weights."""
    rng = random.Random(f"{config.seed} {step}")
    arrows = (rng.randint(*phase.arrows),) * 2  # of one size, so that little is padding
    levels = [level for level in tasks.FAMILIES[family] if family not in tasks.ASKED or 3 * level <= arrows[0]]
    if family not in tasks.ASKED:  # texts of one level are of about one length
        levels = [levels[-1] if rng.random() < config.hardest else rng.choice(levels)]
    problems: list[tasks.Problem] = []
    size = 0
    while not size or (len(problems) + 1) * size <= config.batch_tokens:
        level = levels[-1] if rng.random() < config.hardest else rng.choice(levels)
        problems.append(tasks.draw(rng, "train", family, level, arrows, phase.ends))
        size = max(size, len(problems[-1].prompt + problems[-1].target))
    rank, world = place()
    if len(problems) < world:
        raise ValueError(
            f"batch_tokens is {config.batch_tokens}, too few for a row for each of {world} processes: a batch of "
            f"{family} has {len(problems)}"
        )
    rows = list(range(len(problems)))[rank::world]
    problems = problems[rank::world]
    shape = batch_of(problems)[0].shape
    on = torch.zeros(shape, dtype=torch.bool, device=model.device)
    batch = Batch(rows, problems, [0] * len(rows), noise(model, config, rows, shape[1], step), ~on, on)
    return finish(model, config, batch, step) if rng.random() < phase.frozen else batch


def noise(model: RecurrentDepthLM, config: TrainingConfig, rows: list[int], width: int, step: int) -> Tensor:
    """Initial states (B, T, d) that no other row or step has."""
    seeds = (torch.tensor(rows) + ((config.seed + 1) * 1_000_003 + step) * 1000)[:, None]
    positions = torch.arange(width).expand(len(rows), -1)
    return model.initial_state(positions.to(model.device), seed=seeds.to(model.device))


@torch.no_grad()
def finish(model: RecurrentDepthLM, config: TrainingConfig, batch: Batch, step: int) -> Batch:
    """Run some steps, freeze each row up to some token of its solution, and let the rest begin anew.

    So the model learns to read text that is finished, as it is when one shared slot holds all keys and values.
    """
    rng = random.Random(f"{config.seed} {step} finish")
    e, s = model.prelude(batch.read()), batch.state
    for _ in range(rng.randint(6, 20)):
        s = model.recur(s, e)
    for row, p in enumerate(batch.problems):
        cut = len(p.prompt) + int(random.Random(f"{config.seed} {step} {batch.rows[row]}").random() * len(p.target)) - 1
        batch.frozen[row, :cut] = True
    batch.state = s.where(batch.frozen[..., None], batch.state)
    return batch


def rewire(model: RecurrentDepthLM, config: TrainingConfig, phase: Phase, batch: Batch, step: int) -> Batch:
    """Other arrows under some rows of a kept batch, their states as they are.

    A walk of at most four arrows then has its next step due at any age of the state: what is learned is the step, and
    not how the first four steps go.
    """
    anew = random.Random(f"{config.seed} {step} rewire").random() < phase.anew
    start = noise(model, config, batch.rows, batch.state.shape[1], step) if anew else batch.state
    for row, p in enumerate(batch.problems):
        rng = random.Random(f"{config.seed} {step} {batch.rows[row]}")
        if p.walks and not batch.frozen[row].any() and (rng.random() < phase.rewired or not phase.ends):
            batch.problems[row], batch.ran[row] = p.rewired(batch.ran[row], rng), 0
            batch.state[row, : len(p.prompt) - 1] = start[row, : len(p.prompt) - 1]
    return batch


def settle(batch: Batch, guesses: Tensor, window: int) -> float:
    """Put the end of a window down in its batch; returns the share of right deep tokens, of those that it had to move.

    A token that missed a stage can't be asked for the next one, since where it went is not known; a wrong answer of a
    problem of one stage can still be put right.
    """
    due, before = batch.labels(window)[0], batch.labels(0)[0]
    asked = due != IGNORE
    right = (guesses == due) & asked
    began = torch.tensor([ran == 0 for ran in batch.ran], device=due.device)
    moved = asked & (began[:, None] | (due != before))
    moved = moved if total(moved.sum()) else asked
    one_stage = torch.tensor([len(p.stages) == 1 for p in batch.problems], device=due.device)
    batch.sure &= right | ~asked | one_stage[:, None]
    batch.ran = [ran + window for ran in batch.ran]
    batch.age += window
    return (total((right & moved).sum()) / total(moved.sum()).clamp(min=1)).item()


def phase_is_over(phase: Phase, steps: int, right: dict[str, float]) -> bool:
    """Whether a phase that has run so many steps ends: by what was learned, or since it has had enough."""
    names = [name for f in phase.families for name in ([f, f"{f} carried"] if phase.carried else [f])]
    return steps >= phase.steps or all(right.get(name, 0.0) > phase.learned for name in names)


class Objective(torch.nn.Module):
    """The loss of a window, as the module that DistributedDataParallel wants to be called through."""

    def __init__(self, model: RecurrentDepthLM):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, reads: set[int], bare: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Run max(reads) recurrence steps with gradient; read and ask after each of `reads`; bare: without the coda.

        Returns the loss, the mean cross-entropy of deep tokens plus a fifth of that of the others, over the readings;
        the state (B, T, d); and what the last reading guessed, (B, T) int64.  Of several processes each returns its
        share of the loss of the whole batch.
        """
        e, s = self.model.prelude(batch.read()), batch.state
        loss = e.new_zeros(())
        for i in range(1, max(reads) + 1):
            s = s.where(batch.frozen[..., None], self.model.recur(s, e))
            if i in reads:
                logits = self.head(s) if bare else self.model.coda(s)  # (B, T, V)
                for labels, weight in zip(batch.labels(i), (1.0, TEMPLATE), strict=True):
                    missed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                    loss = loss + weight * missed / total((labels != IGNORE).sum()).clamp(min=1) / len(reads)
        if bare:  # gradients of zero, not missing ones: every weight has moments, and processes wait for all gradients
            loss = loss + 0.0 * sum(p.sum() for p in self.model.transformer.coda.parameters())
        return loss, s.detach(), logits.argmax(-1)

    def head(self, s: Tensor) -> Tensor:
        """Logits (B, T, V) of a state (B, T, d) without the coda's blocks."""
        return wide(self.model.lm_head(self.model.transformer.ln_f(s)))


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


@dataclass
class Progress:
    """Where in its schedule a run is: what resuming needs besides weights, moments and the step."""

    phase: int = 0
    began: int = 0  # the step at which the phase began
    losses: list[float] = field(default_factory=list)  # not yet logged
    right: dict[str, float] = field(default_factory=dict)  # running share of deep tokens right in this phase


def train(model: RecurrentDepthLM, config: TrainingConfig, run=None) -> list[dict]:
    """Train `model` in place and return the log, one row every `log_every` steps.

    run: a `minirec.files.run.Run`, the folder that gets the log, resumable state and the checkpoint; None keeps
    nothing.  If the folder holds a run of the same configuration, training continues from its last save; a run of
    another configuration is a ValueError.  A run that is killed loses what it did since the last save.

    Processes that torchrun started (`minirec.tools.processes`) train one model together: each runs its share of the
    rows of the same batches, so their number changes nothing but rounding, and a run may be resumed by another number
    of them.  All read the folder; only the first writes to it.
    """
    if model.config.padded_vocab_size < (needed := task_tokenizer().get_vocab_size()):
        raise ValueError(f"vocab_size is {model.config.vocab_size}; the tasks' tokenizer needs {needed}")
    rank, world = place()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )
    step, log, progress = run.resume(model, optimizer, config) if run else (0, [], {})
    progress = Progress(**progress)
    objective = Objective(model) if world == 1 else DistributedDataParallel(Objective(model))
    held_out = {f: tasks.heldout(config.evaluate_on, seed=1, family=f) for f in config.families}
    started, spent = time.perf_counter(), log[-1]["seconds"] if log else 0.0
    kept: dict[str, list[Batch]] = {f: [] for f in config.families}
    model.train()
    bar = tqdm(initial=step, total=sum(phase.steps for phase in config.phases), disable=True if rank else None)
    while progress.phase < len(config.phases):
        phase = config.phases[progress.phase]
        family = phase.families[step % len(phase.families)]
        rng = random.Random(f"{config.seed} {step}")
        share = phase.carried if family in tasks.ASKED else phase.carried / 2  # those have no next step for long
        if kept[family] and rng.random() < share:
            name, batch = f"{family} carried", kept[family].pop(rng.randrange(len(kept[family])))
            rewire(model, config, phase, batch, step)
        else:
            name, batch = family, fresh(model, config, phase, family, step)
        window = WINDOWS.get(family, phase.window)
        reads = {window, rng.randint(1, window)}
        loss, batch.state, guesses = objective(batch, reads, phase.bare)
        optimizer.zero_grad()
        (loss * world).backward()  # the gradients of the shares add up, and DistributedDataParallel takes their mean
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step, progress)
        optimizer.step()
        step += 1
        bar.update()

        right = settle(batch, guesses, window)
        if right > phase.gate and batch.age < OLDEST and len(kept[family]) < KEPT:
            kept[family].append(batch)
        before = progress.right.get(name, 0.0)
        progress.right[name] = before + 0.05 * (right - before)
        progress.losses.append(total(loss).item())
        is_over = phase_is_over(phase, step - progress.began, progress.right)
        ends = is_over and phase is config.phases[-1]
        if ends or step % config.log_every == 0:
            row = {"step": step, "phase": progress.phase + 1, "loss": sum(progress.losses) / len(progress.losses)}
            row |= {"rate": optimizer.param_groups[0]["lr"], "seconds": round(spent + time.perf_counter() - started, 1)}
            log.append(row | {f"{n} in training": share for n, share in progress.right.items()})
            progress.losses = []
        if ends or step % config.evaluate_every == 0:
            log[-1] |= {f: exact_match(model, problems) for f, problems in held_out.items()}
        if is_over:
            progress = Progress(progress.phase + 1, step, progress.losses)
        if is_over or step % config.save_every == 0:
            kept = {f: [] for f in config.families}
        if run and rank == 0 and (ends or step % config.save_every == 0):
            run.save(model, optimizer, config, step, log, asdict(progress))
    bar.close()
    model.eval()
    if run and rank == 0:
        run.finish(model)
    return log
