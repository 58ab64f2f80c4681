"""Diffusion forcing: decode a whole diagonal of positions at once, each at its own depth.

A recurrent-depth model can be decoded after every step, and its intermediate guesses are mostly right.  So do
not wait for a token to be finished: let the next position start from the guess, and correct it while it runs
(arXiv 2510.14961, Algorithm 2).  One outer step:

    e = prelude(tokens of the window)         guesses included; blended with the last e (momentum eta)
    s = (1 - beta) s + beta s0'               optional noise, damped with depth
    s = R(s, e), r' times                     r' = inner_steps, for all positions of the window together
    guesses = choose(coda(s))                 every position says again what should follow it
    freeze                                    settled positions leave the window; what they predict is final
    open                                      headway new positions on the right start from their initial state

| here | paper | default |       | here | paper | default |
|---|---|---|               |---|---|---|
| `inner_steps` | r' | 4 |         | `max_wavefront` | max wavefront | 128 |
| `exit_threshold` | epsilon | 0.03 | | `noise` | beta_t | 0 |
| `headway` | headway | 1 |         | `momentum` | eta | 0.1 |

A checkpoint's generation config may set other defaults (key "diffusion_forcing").  One slot of keys and values per
layer is the paper's; it suits a model whose steps refine one and the same thing.  A model that does another thing in
every step, like the shipped one, has to read what the others were at the same step: its default is kv="full".

**When a position is settled.**  Adaptive schedule: its state moved by less than epsilon, relative to its norm, in
this outer step, or it has run num_steps steps since its own token last changed.  That cap, our addition, bounds
the work and makes wavefront 1 with r' = r plain autoregressive decoding; with r' < r it is per-token adaptive
exit.  Two more rules of the official code, under the same cap: "acceleration", the change of its change over two outer
steps is below epsilon, |s - 2 s' + s''| / |s|; "token-stability", what it predicts has stood for num_steps / r' outer
steps.  Fixed schedule: it has run num_steps steps.  freeze="prefix" (the paper's equation) freezes the longest run of
settled positions from the left, and never one whose own token changed in this very step, as its keys would rest on
the old token.  freeze="last" (the paper's algorithm box, and the official code) freezes up to the last settled
position, unsettled ones before it included.

**What is guaranteed.**  A frozen token never changes, and every new token was predicted by a frozen prefix.  It is
NOT guaranteed that the tokens are those of autoregressive decoding: a position may settle on a left context
that moves later, by less than epsilon at a time.

**Where this differs from the official code** (seal-rg/recurrent-pretraining, 59e0b69; measured on its test
model, see tests/golden/QUIRKS.md).  Theirs compares a state with that of a neighbour on the step after every
advance, so nothing froze on any of the 60 such steps in three runs, where the aligned comparison froze on 29;
ours compares each state with its own.  Theirs freezes the token at a position, ours the token the position
predicts, one outer step sooner: the fixed schedule at r = r' is then exactly autoregressive, and a wavefront of 1
advances (theirs never does).  Stop tokens end a generation as soon as they freeze (theirs ignores them for the first
num_steps outer steps), and never more than max_new_tokens come back.  New positions start from their whole
embedding under momentum (theirs scale it by 1 - eta).  Noise defaults to the paper's 0 (theirs: 0.5).  Driven with
the official freezing decisions, this grid reproduces the official guesses at every outer step (the replay test).

Notebook: 06_diffusion_forcing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minirec.config import flag, number, one_of, shown, whole
from minirec.decoding import Generation, Grid, check_counts
from minirec.kv_cache import upload
from minirec.recurrent_block import RecurrentDepthLM

SCHEDULES = ("adaptive", "acceleration", "token-stability", "fixed")
PAPER = {"inner_steps": 4, "exit_threshold": 0.03, "kv": "shared"}  # arXiv 2510.14961, section 5


def blend(e: Tensor, previous: Tensor, momentum: Tensor) -> Tensor:
    """Momentum of the conditioning (2510.14961, section 3.3): eta e_prev + (1 - eta) e, eta (B, W) per position."""
    return e.lerp(previous, momentum[..., None])


def leading(settled: list[bool], freeze: str) -> int:
    """How many cells of a window freeze, by the prefix or the last rule."""
    if freeze == "prefix":
        return [*settled, False].index(False)
    return max((i for i, yes in enumerate(settled, 1) if yes), default=0)


@dataclass
class Front:
    """The window of one row, from left to right; what freezes is decided here, on the host."""

    tokens: list[int]  # that the cells run on
    depths: list[int] = field(default_factory=lambda: [0])  # steps they have run
    ages: list[int] = field(default_factory=lambda: [0])  # how many of them on that token
    stands: list[tuple[int, int]] = field(default_factory=lambda: [(-1, 0)])  # (prediction, outer steps it has stood)

    def settle(
        self,
        guessed: list[int],
        calm: list[bool],
        inner: int,
        r: int,
        schedule: str = "adaptive",
        freeze: str = "prefix",
    ) -> int:
        """Count an outer step of `inner` steps, and say how many cells, the leftmost, it has frozen.

        guessed: what each cell now predicts; calm: whether it moved by less than the threshold; r: the cap.
        """
        # did the position keep its token in this step?
        same = [True, *(guess == token for guess, token in zip(guessed, self.tokens[1:], strict=False))]
        self.depths = [depth + inner for depth in self.depths]
        ages = [age + inner for age in self.ages]
        self.stands = [(g, n + 1 if g == old else 1) for g, (old, n) in zip(guessed, self.stands, strict=True)]
        self.ages = [age if kept else 0 for age, kept in zip(ages, same, strict=True)]
        self.tokens = [self.tokens[0], *guessed]  # with the one of the position that comes next
        if schedule == "fixed":
            settled = [depth >= r for depth in self.depths]
        else:
            if schedule == "acceleration":  # a first change has none before it to be compared with
                calm = [c and depth > inner for c, depth in zip(calm, self.depths, strict=True)]
            elif schedule == "token-stability":
                calm = [n >= r // inner for _, n in self.stands]
            settled = [c or age >= r for c, age in zip(calm, ages, strict=True)]
            if freeze == "prefix":
                settled = [yes and kept for yes, kept in zip(settled, same, strict=True)]
        return leading(settled, freeze)

    def move(self, n: int, widest: int, headway: int, filler: int) -> int:
        """n cells leave on the left, up to `headway` new ones open on the right; returns the width, 1 at least."""
        width = max(1, min(len(self.depths) - n + headway, widest))
        self.tokens = (self.tokens + [filler] * headway)[n : n + width]
        self.depths, self.ages = ((cells + [0] * headway)[n : n + width] for cells in (self.depths, self.ages))
        self.stands = (self.stands + [(-1, 0)] * headway)[n : n + width]
        return width


@torch.inference_mode()
def generate(
    model: RecurrentDepthLM,
    prompt,
    max_new_tokens: int,
    *,
    num_steps: int | None = None,
    inner_steps: int | None = None,
    exit_threshold: float | None = None,
    schedule: str = "adaptive",
    freeze: str = "prefix",
    headway: int = 1,
    max_wavefront: int = 128,
    noise: float = 0.0,
    momentum: float = 0.1,
    continuous_compute: bool = False,
    kv: str | None = None,
    **options,
) -> Generation | list[Generation]:
    """Continue a prompt (list or 1-D tensor of ids), or a batch of prompts, a wavefront of positions at a time.

    num_steps: recurrence steps of the prompt, and the most any position runs on one token (None: the config's
    mean_recurrence).  inner_steps, exit_threshold, kv: None for the checkpoint's defaults, else the paper's.  kv
    "shared" lets a position read the latest step of those before it; with "full" a position at depth k reads their
    step k, which may date from an earlier guess.  continuous_compute: a position starts from the state that its left
    neighbour has reached, not from its own initial state (section 3.3: less effective).  options: those of
    `minirec.decoding.Options`.  Returns a Generation, or a list of them for a batch, each row's independent of the
    others.  Raises ValueError for a bad argument, FloatingPointError for logits that are not finite.
    """
    settings = PAPER | model.generation_config.get("diffusion_forcing", {})
    r = model.config.depth(num_steps)
    max_new_tokens, headway, max_wavefront = check_counts(
        max_new_tokens=max_new_tokens, headway=headway, max_wavefront=max_wavefront
    )
    inner = whole("inner_steps", min(settings["inner_steps"], r) if inner_steps is None else inner_steps)
    if not 1 <= inner <= r:
        raise ValueError(f"inner_steps is {shown(inner)}; it must be from 1 to num_steps, here {r}")
    one_of("schedule", schedule, SCHEDULES)
    one_of("freeze", freeze, ("prefix", "last"))
    if exit_threshold is not None and schedule in ("token-stability", "fixed"):
        raise ValueError(f"exit_threshold is {shown(exit_threshold)}, which has no effect with schedule {schedule!r}")
    threshold = settings["exit_threshold"] if exit_threshold is None else exit_threshold
    threshold = number("exit_threshold", threshold, least=0)
    noise, momentum = number("noise", noise, least=0, below=1), number("momentum", momentum, least=0, below=1)
    continuous_compute = flag("continuous_compute", continuous_compute)
    kv = settings["kv"] if kv is None else kv
    max_wavefront = min(max_wavefront, max_new_tokens)
    headway = min(headway, max_wavefront)
    grid = Grid(model, prompt, max_new_tokens, r, spare=max_wavefront, kv=kv, **options)
    embedding, eta = torch.zeros_like(grid.state), torch.zeros_like(grid.state[..., 0])  # (B, L, d), (B, L)
    change = torch.zeros_like(grid.state)  # (B, L, d): of the state, in the last outer step
    grid.prefill()  # at full depth, as in autoregressive decoding
    last = [n + max_new_tokens - 2 for n in grid.lengths]  # the last position whose prediction can be asked for
    fronts = [Front(g.tokens[:1]) for g in grid.generations]
    if continuous_compute:
        for row, start in enumerate(grid.lengths):
            grid.state[row, start] = grid.state[row, start - 1]
    outer_step = 0
    while not all(grid.finished):
        outer_step += 1
        starts, depths = [grid.next_position(row) for row in range(len(fronts))], [front.depths for front in fronts]
        widths = [len(cells) for cells in depths]
        at = grid.window(starts, max(widths))
        depth = grid.depths(depths)
        before = at.read(grid.state)  # (B, W, d)
        e, s = grid.embed(at), before
        if momentum:  # eta is still 0 at a position that is new: it has no embedding to blend with
            e = blend(e, at.read(embedding), at.read(eta))
            at.write(embedding, e)
            at.write(eta, momentum)
        if noise:
            fresh = model.initial_state(at.positions, grid.seed + (outer_step << 32), grid.options.init_scale)
            ran = upload([cells + [0] * (at.width - len(cells)) for cells in depths], model.device)
            s = s.lerp(fresh, (noise / (1 + ran.to(s)))[..., None])  # less for deeper positions
        for inner_step in range(inner):
            s = grid.recur(s, e, at, depth + inner_step)
        guesses = grid.choose(grid.decode(s, at), at.positions)  # (B, W): the token after each position
        moved = s - before  # (B, W, d)
        if schedule == "acceleration":
            moved, last_change = moved - at.read(change), moved
            at.write(change, last_change)
        moved = torch.linalg.vector_norm(moved, dim=-1) / torch.linalg.vector_norm(s, dim=-1)  # (B, W)
        if min(widths) < at.width:  # a narrower row has cells that are not open yet: they leave no trace
            is_open = torch.arange(at.width, device=model.device) < upload(widths, model.device)[:, None]
            s, guesses = torch.where(is_open[..., None], s, before), torch.where(is_open, guesses, grid.filler)
            at.write(eta, at.read(eta) * is_open)
        at.write(grid.state, s)
        grid.place(at, guesses)

        # the one synchronisation of the outer step; what freezes is then decided on the host
        for row, (guessed, calm) in enumerate(torch.stack([guesses, moved < threshold], dim=1).tolist()):
            if grid.finished[row]:
                continue
            front, guessed = fronts[row], guessed[: widths[row]]
            n = front.settle(guessed, [bool(c) for c in calm[: widths[row]]], inner, r, schedule, freeze)
            for token, d in zip(guessed[:n], front.depths, strict=False):
                if not grid.finished[row]:
                    grid.commit(row, token, d)
            grid.cache.copy_deeper(row, starts[row], front.depths[:n])
            grid.record(row, starts[row], front.depths, guessed)
            width = front.move(n, min(max_wavefront, last[row] - grid.next_position(row) + 1), headway, grid.filler)
            if continuous_compute:
                end = starts[row] + widths[row]
                grid.state[row, end : starts[row] + n + width] = grid.state[row, end - 1]
    return grid.results()
