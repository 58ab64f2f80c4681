"""From logits to a token: greedy, or sampled through the usual filters; batched, and seeded by position.

Sampling adds Gumbel noise that is a function of (seed, position) to the filtered scores and takes the argmax,
which is an exact sample of the softmax.  So a sampler that decodes the same position again and again, as
diffusion forcing does, sees its token change only when the logits do, and every sampler given the same logits
and seed takes the same token, in whatever order and batch it visits them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minirec.config import whole
from minirec.noise import gumbel


@dataclass(frozen=True)
class TokenChoice:
    """How a token is taken from logits; the filters as in transformers, in its order.

    temperature 0: greedy, the filters are not looked at.  top_k: the k likeliest.  top_p: the smallest set that
    holds this much probability (its last member included).  min_p: at least this share of the likeliest one's
    probability.  repetition_penalty: divide positive, multiply negative logits of tokens already there.
    A bad value is a ValueError.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or above, and finite")
        if self.top_k is not None:
            object.__setattr__(self, "top_k", whole("top_k", self.top_k, 1))
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; it must be above 0 and at most 1, or None")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0, or None")

    def scores(self, logits: Tensor) -> Tensor:
        """Filtered log-scores (..., V) of logits (..., V): softmax of them is what is sampled. Not for greedy."""
        scores = logits / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            kth = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ordered, index = scores.sort(dim=-1, descending=True)
            p = ordered.softmax(-1)
            before = p.cumsum(-1) - p  # probability of all likelier tokens
            drop = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, before >= self.top_p)
            scores = scores.masked_fill(drop, float("-inf"))
        if self.min_p is not None:
            p = scores.softmax(-1)
            scores = scores.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), float("-inf"))
        return scores

    def penalised(self, logits: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, W, V) with the repetition penalty for tokens (B, L) at or before positions (B, W)."""
        if self.repetition_penalty is None or self.repetition_penalty == 1:
            return logits
        there = torch.arange(tokens.shape[1], device=tokens.device) <= positions[..., None]  # (B, W, L)
        index = tokens[:, None].expand(there.shape)
        seen = torch.zeros(logits.shape, device=logits.device).scatter_reduce(-1, index, there.float(), "amax") > 0
        penalty = self.repetition_penalty
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def choose(self, logits: Tensor, tokens: Tensor, positions: Tensor, seed: Tensor) -> Tensor:
        """The token after each of the window's cells: (B, W) int64.

        logits (B, W, V) at positions (B, W) int64; tokens (B, L) int64: the context, of which a cell sees what is
        at or before its position; seed (B, 1) int64.
        """
        logits = self.penalised(logits, tokens, positions)
        if self.temperature == 0:
            return logits.argmax(-1)
        return (self.scores(logits) + gumbel(seed, positions + 1, logits.shape[-1])).argmax(-1)
