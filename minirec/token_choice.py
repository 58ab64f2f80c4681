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

from minirec.config import number, shown, whole
from minirec.noise import gumbel

COLDEST = 1e-6  # the lowest temperature: a logit divided by it is still far from the end of float32


@dataclass(frozen=True)
class TokenChoice:
    """How a token is chosen from logits; the filters are those of transformers, in its order.

    temperature: 0 for greedy, else at least COLDEST.  top_k: keep the k likeliest tokens.  top_p: keep the smallest set
    of likeliest tokens that holds this much probability.  min_p: keep tokens with at least this share of the
    likeliest one's probability.  repetition_penalty, from 1e-6 to 1e6: divide positive and multiply negative logits of
    tokens that are already in the context by it.
    Raises ValueError for a bad value, and for a filter with temperature 0, where it would have no effect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self):
        temperature = number("temperature", self.temperature, least=0)
        if 0 < temperature < COLDEST:
            raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or a number, at least {COLDEST}")
        checked = {"temperature": temperature}
        if self.top_k is not None:
            checked["top_k"] = whole("top_k", self.top_k, 1)
        for name in ("top_p", "min_p"):
            if (value := getattr(self, name)) is not None:
                checked[name] = number(name, value, above=0, most=1)
        if temperature == 0 and len(checked) > 1:
            name = [*checked][1]
            raise ValueError(f"{name} is {shown(checked[name])}, which has no effect at temperature 0; leave it out")
        if self.repetition_penalty is not None:
            checked["repetition_penalty"] = number("repetition_penalty", self.repetition_penalty, least=1e-6, most=1e6)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

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
        seen = torch.zeros_like(logits).scatter_reduce(-1, index, there.to(logits), "amax") > 0  # (B, W, V)
        penalty = self.repetition_penalty
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def choose(self, logits: Tensor, tokens: Tensor, positions: Tensor, seed: Tensor) -> Tensor:
        """The token after each of the window's cells: (B, W) int64; -1 where the logits are not finite.

        logits (B, W, V) at positions (B, W) int64; tokens (B, L) int64: the context, of which a cell sees what is
        at or before its position; seed (B, 1) int64.  Logits of -inf are allowed if one of the cell's is finite.
        """
        scores = self.penalised(logits, tokens, positions)
        if self.temperature > 0:
            scores = self.scores(scores) + gumbel(seed, positions + 1, logits.shape[-1])
        # NaN and +inf win any maximum, and -inf wins where all are: the maximum alone says whether all was well.
        # x - x is 0 for a finite x and NaN for any other, which is two small kernels and no synchronisation.
        best, token = scores.max(-1)  # (B, W) each
        return token.masked_fill_(best.sub_(best).bool(), -1)
