"""Looking inside the loop: where the state goes, and what could be read from it on the way.

    trajectory          s_0 .. s_r             every state that a token passes through
    relative_change     |s_k - s_(k-1)|/|s_k|  how far each step moves it
    distance_to_end     |s_k - s_r|            how far it still is from where it ends: the convergence map
    coda_lens           C(s_k)                 what the model would say if it stopped here
    logit_lens          head(ln_f(s_k))        the same without the coda blocks: a state read in the wrong place
    settled             from which step on the most likely token never changes again
    principal_components                       the two or three directions in which states differ most, for pictures

The coda is trained to read states of the loop, whatever their depth; the head is trained to read what the coda
blocks make of them.  So the coda lens is the model's own reader, and the logit lens is a guess that happens to work
in ordinary transformers.  Lu et al. (arXiv 2507.02199) compare the two on Huginn-0125; maps and paths are those of
arXiv 2502.05171, section 7.  States are raw, before ln_f, and the step is always the first axis.
Notebook: 03_thinking_longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minirec.config import shown, whole
from minirec.recurrent_block import RecurrentDepthLM, wide


@torch.inference_mode()
def trajectory(
    model: RecurrentDepthLM,
    tokens: Tensor,
    num_steps: int | None = None,
    seed: int | Tensor = 0,
    scale: float = 1.0,
    state: Tensor | None = None,
) -> Tensor:
    """The states s_0 .. s_r of every token: tokens (B, T) int64 -> (num_steps + 1, B, T, d), raw, before ln_f.

    num_steps None is the config's mean_recurrence.  s_0 is `model.initial_state` with this seed and scale, or `state`
    (B, T, d).  With the defaults the last state is `model(tokens, num_steps).state`.  Raises ValueError for a bad
    argument, as the model does.
    """
    num_steps = model.checked_steps(tokens, num_steps, state)
    if state is None:
        state = model.initial_state(torch.arange(tokens.shape[1], device=tokens.device), seed=seed, scale=scale)
    e = model.prelude(tokens)  # (B, T, d)
    states = e.new_empty(num_steps + 1, *e.shape)  # (r + 1, B, T, d)
    states[0] = state
    for k in range(num_steps):
        states[k + 1] = model.recur(states[k], e)
    return states


@torch.inference_mode()
def relative_change(states: Tensor) -> Tensor:
    """How far each step moves the state: (r + 1, ..., d) -> (r, ...), |s_k - s_(k-1)| / |s_k| for k = 1..r.

    In float32 or wider.  What the exit criterion of arXiv 2510.14961 (appendix A.1, algorithm 2) compares with its
    threshold.  Raises ValueError if states are not floating-point numbers of that shape.
    """
    states = _wide(states, "(r + 1, ..., d)", 2)
    return (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1)


@torch.inference_mode()
def distance_to_end(states: Tensor) -> Tensor:
    """How far each state is from the last one: (r + 1, ..., d) -> (r + 1, ...), |s_k - s_r|, in float32 or wider.

    Drawn as tokens x steps this is the convergence map of arXiv 2502.05171, figure 11.  Raises ValueError if states are
    not floating-point numbers of that shape.
    """
    states = _wide(states, "(r + 1, ..., d)", 2)
    return (states - states[-1]).norm(dim=-1)


@torch.inference_mode()
def coda_lens(model: RecurrentDepthLM, states: Tensor) -> Tensor:
    """What the model would say at each state: (..., B, T, d) -> logits (..., B, T, V), float32 or wider.

    The coda's blocks attend, so the states of all positions of a sequence are read together, step by step.  Raises
    ValueError if states are not floating-point numbers of that shape and the model's d.
    """
    return _by_step(model, model.coda, states)


@torch.inference_mode()
def logit_lens(model: RecurrentDepthLM, states: Tensor) -> Tensor:
    """ln_f and the head alone, no coda block: (..., B, T, d) -> logits (..., B, T, V), float32 or wider.

    The lens that reads the layers of ordinary transformers, as in Lu et al. (arXiv 2507.02199).  Raises ValueError if
    states are not floating-point numbers of that shape and the model's d.
    """

    def read(s: Tensor) -> Tensor:
        return wide(model.lm_head(model.transformer.ln_f(s)))

    return _by_step(model, read, states)


def _by_step(model: RecurrentDepthLM, read, states: Tensor) -> Tensor:
    """Apply `read` (B, T, d) -> (B, T, V) to one step after another: (..., B, T, d) -> (..., B, T, V)."""
    d = model.config.n_embd
    _wide(states, "(..., B, T, d)", 3)
    if states.shape[-1] != d or states.shape[-2] > model.config.block_size or states.dtype != model.dtype:
        raise ValueError(
            f"states is {states.dtype} {tuple(states.shape)}; this model reads {model.dtype} (..., B, T, {d}) "
            f"with T up to {model.config.block_size}"
        )
    logits = torch.stack([read(s) for s in states.reshape(-1, *states.shape[-3:])])  # (steps, B, T, V)
    return logits.view(*states.shape[:-1], -1)


def _wide(states: Tensor, shape: str, axes: int) -> Tensor:
    """States in float32 or wider; ValueError if they are no floating-point tensor with so many axes, none empty."""
    if not isinstance(states, Tensor) or not states.is_floating_point():
        raise ValueError(f"states is {shown(states)}; it must be a floating-point tensor {shape}")
    if states.dim() < axes or not states.numel():
        raise ValueError(f"states has shape {tuple(states.shape)}; it must be {shape}")
    return wide(states)


@torch.inference_mode()
def settled(guesses: Tensor) -> Tensor:
    """The first step, from 1, after which a guess never changes again: guesses (r, ...) int64 -> (...) int64.

    guesses: the argmax of a lens after steps 1..r.  A guess that changes in the last step has settled at r.  Raises
    ValueError if they are not an integer tensor of at least one step.
    """
    if not isinstance(guesses, Tensor) or guesses.is_floating_point() or guesses.is_complex():
        raise ValueError(f"guesses is {shown(guesses)}; it must be an int64 tensor (r, ...)")
    if not guesses.dim() or not len(guesses):
        raise ValueError(f"guesses has shape {tuple(guesses.shape)}; it must be (r, ...) with r at least 1")
    steps = torch.arange(1, len(guesses) + 1, device=guesses.device).view(-1, *[1] * (guesses.dim() - 1))
    return ((guesses != guesses[-1]) * steps).amax(dim=0) + 1  # one more than the last step that was not the end


@torch.inference_mode()
def principal_components(states: Tensor, n: int = 2) -> Tensor:
    """The coordinates of states (..., d) along the n directions in which they differ most: (..., n), widest first.

    Centred over all leading axes, then a singular value decomposition.  Its signs are free; here the largest weight
    of every direction is positive.  As in arXiv 2502.05171, figure 12.  Raises ValueError if there are no n
    directions, or if states are not finite floating-point numbers.
    """
    rows = _wide(states, "(..., d)", 1).reshape(-1, states.shape[-1])  # (N, d)
    n = whole("n", n)
    if not 1 <= n <= min(rows.shape):
        raise ValueError(
            f"n is {shown(n)}; {len(rows)} states of width {rows.shape[1]} have 1 to {min(rows.shape)} directions"
        )
    if not rows.isfinite().all():
        raise ValueError("states holds NaN or infinities, which have no directions")
    rows = rows - rows.mean(dim=0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:n]  # (n, d)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))  # (n, 1)
    return (rows @ (directions * largest.sign()).T).view(*states.shape[:-1], n)
