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

A checkpoint's generation config may set other defaults (key "diffusion_forcing").

**When a position is settled.**  Adaptive schedule: its state moved by less than epsilon, relative to its norm, in
this outer step, or it has run num_steps steps since its own token last changed.  That cap, our addition, bounds
the work and makes wavefront 1 with r' = r plain autoregressive decoding; with r' < r it is per-token adaptive
exit.  Fixed schedule: it has run num_steps steps.  freeze="prefix" (the paper's equation) freezes the longest
run of settled positions from the left, and never one whose own token changed in this very step, as its keys
would rest on the old token.  freeze="last" (the paper's algorithm box, and the official code) freezes up to the
last settled position, unsettled ones before it included.

**What is guaranteed.**  A frozen token never changes, and every new token was predicted by a frozen prefix.  It is
NOT guaranteed that the tokens are those of autoregressive decoding: a position may settle on a left context
that moves later, by less than epsilon at a time.

**Where this differs from the official code** (seal-rg/recurrent-pretraining, 59e0b69; measured on its test
model, see tests/golden/README.md).  Theirs compares a state with that of a neighbour on the step after every
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

import numpy as np
import torch
from torch import Tensor

from minirec.decoding import Generation, Grid
from minirec.recurrent_block import RecurrentDepthLM

PAPER = {"inner_steps": 4, "exit_threshold": 0.03}  # arXiv 2510.14961, section 5


def blend(e: Tensor, previous: Tensor, momentum: Tensor) -> Tensor:
    """Momentum of the conditioning (2510.14961, section 3.3): eta e_prev + (1 - eta) e, eta (B, W) per position."""
    return e.lerp(previous, momentum[..., None])


def leading(settled: np.ndarray, freeze: str) -> np.ndarray:
    """How many cells of each row freeze, by the prefix or the last rule: settled (B, W) bool -> (B,) int."""
    if freeze == "prefix":
        return np.logical_and.accumulate(settled, axis=1).sum(axis=1)
    return (settled * np.arange(1, settled.shape[1] + 1)).max(axis=1)


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
    kv: str = "shared",
    **options,
) -> Generation | list[Generation]:
    """Continue a prompt (list or 1-D tensor of ids), or a batch of prompts, a wavefront of positions at a time.

    num_steps: recurrence steps of the prompt, and the most any position runs on one token (None: the config's
    mean_recurrence).  inner_steps, exit_threshold: None for the checkpoint's defaults, else the paper's.  kv: one
    shared slot by default, as in the paper.  With "full" a position at depth k reads step k of those before it,
    which may date from an earlier guess.  options: those of `minirec.decoding.Options`.  Returns a Generation, or
    a list of them for a batch, each row's independent of the others.  A bad argument is a ValueError.
    """
    settings = PAPER | model.generation_config.get("diffusion_forcing", {})
    inner = settings["inner_steps"] if inner_steps is None else inner_steps
    threshold = settings["exit_threshold"] if exit_threshold is None else exit_threshold
    r = model.config.mean_recurrence if num_steps is None else num_steps
    _check(r, inner, threshold, schedule, freeze, headway, max_wavefront, noise, momentum)
    grid = Grid(model, prompt, max_new_tokens, r, spare=min(max_wavefront, max_new_tokens), kv=kv, **options)
    rows = range(len(grid.lengths))
    embedding = torch.zeros_like(grid.state)  # (B, L, d): e of the last outer step
    # the book-keeping is on the host: (B, L) each, at the columns of the grid
    steps = np.zeros(grid.tokens.shape, dtype=int)  # recurrence steps that each position has run
    age = np.zeros_like(steps)  # how many of them since its token last changed
    grid.prefill()  # at full depth, as in autoregressive decoding
    tokens = grid.tokens.numpy(force=True).copy()  # the token it ran on
    last = [n + max_new_tokens - 2 for n in grid.lengths]  # the last position whose prediction can be asked for
    widths = [1] * len(rows)
    outer_step = 0
    while not all(grid.finished):
        outer_step += 1
        starts = [grid.next_position(row) for row in rows]
        at = grid.window(starts, max(widths))
        column = np.array(starts)[:, None] + np.arange(at.width)  # (B, W): the window's positions
        cells = (np.arange(len(rows))[:, None], column)
        # a row narrower than the widest has cells that are not open yet: they leave no trace
        uneven = min(widths) < at.width
        is_open = column < column[:, :1] + np.array(widths)[:, None]  # (B, W)
        depth, since = steps[cells], age[cells]
        device_depth = torch.from_numpy(depth).to(model.device)

        before = at.read(grid.state)  # (B, W, d)
        e, s = grid.embed(at), before
        if momentum:  # a position that is new has no embedding to blend with
            eta = torch.from_numpy(np.where(depth > 0, momentum, 0.0)).to(s)
            e = blend(e, at.read(embedding), eta)
            at.write(embedding, e)
        if noise:
            fresh = model.initial_state(at.positions, grid.seed + (outer_step << 32), grid.options.init_scale)
            s = s.lerp(fresh, (noise / (1 + device_depth))[..., None].to(s))  # less for deeper positions
        for inner_step in range(inner):
            s = grid.recur(s, e, at, device_depth + inner_step)
        guesses = grid.choose(grid.decode(s, at), at.positions)  # (B, W): the token after each position
        moved = torch.linalg.vector_norm(s - before, dim=-1) / torch.linalg.vector_norm(s, dim=-1)  # (B, W)
        if uneven:
            keep = torch.from_numpy(is_open).to(model.device)
            s, guesses = torch.where(keep[..., None], s, before), torch.where(keep, guesses, grid.filler)
        at.write(grid.state, s)
        at.write(grid.tokens[:, 1:], guesses)
        # the one synchronisation of the outer step: (B, W) each
        guessed, calm = torch.stack([guesses, moved < threshold]).numpy(force=True)

        depth, since = depth + inner, since + inner
        same = np.ones_like(is_open)  # did the position keep its token in this step?
        same[:, 1:] = guessed[:, :-1] == tokens[cells][:, 1:]
        if schedule == "fixed":
            settled = depth >= r
        else:
            settled = (calm > 0) | (since >= r)
            settled = settled & same if freeze == "prefix" else settled
        steps[cells], age[cells] = depth * is_open, since * (same & is_open)
        tokens[cells[0], column + 1] = guessed
        for row, n in enumerate(leading(settled & is_open, freeze).tolist()):
            if grid.finished[row]:
                continue
            width, depths = widths[row], depth[row, : widths[row]].tolist()
            for token, deep in zip(guessed[row, :n].tolist(), depths, strict=False):
                if not grid.finished[row]:
                    grid.commit(row, token, deep)
            grid.cache.copy_deeper(row, starts[row], depths[:n])
            grid.record(row, starts[row], depths, guessed[row, :width].tolist())
            widths[row] = max(1, min(width - n + headway, max_wavefront, last[row] - grid.next_position(row) + 1))
    return grid.results()


def _check(r, inner_steps, exit_threshold, schedule, freeze, headway, max_wavefront, noise, momentum) -> None:
    if r < 1:
        raise ValueError(f"num_steps is {r}; it must be at least 1")
    if not 1 <= inner_steps <= r:
        raise ValueError(f"inner_steps is {inner_steps}; it must be from 1 to num_steps, here {r}")
    if not exit_threshold >= 0:
        raise ValueError(f"exit_threshold is {exit_threshold}; it must be 0 or above")
    if schedule not in ("adaptive", "fixed"):
        raise ValueError(f"schedule is {schedule!r}; it must be 'adaptive' or 'fixed'")
    if freeze not in ("prefix", "last"):
        raise ValueError(f"freeze is {freeze!r}; it must be 'prefix' or 'last'")
    for name, value in (("headway", headway), ("max_wavefront", max_wavefront)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for name, value in (("noise", noise), ("momentum", momentum)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must be from 0 to below 1")
