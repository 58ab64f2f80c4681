"""Raven: a pretrained Llama or OLMo-2, cut into prelude, core and coda and trained to loop (arXiv 2511.07384).

What differs from the recurrent block of Huginn:

    block       two norms instead of four: before each branch (Llama), or after it and before the sum (OLMo-2)
    queries     more heads than keys and values have; no offset; OLMo-2 norms q and k over all heads together
    rotation    of channel halves
    embedding   not scaled; the head is a matrix of its own
    ln_f        before the head alone, not between core and coda

`initial_state_mode` "embed-init" starts the state as e; "skip-adapter" also leaves the adapter out of the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minirec.config import flag, number, one_of, shown
from minirec.families.llama import LlamaConfig, PreNormBlock, grouped, rope_table
from minirec.recurrent_block import Attend, GatedMLP, RecurrentDepthLM, RMSNorm, causal, run, wide

STD = 0.0087038827977848  # of the initial state in every published model: sqrt(2 / 5d) at Huginn's width


@dataclass
class RavenConfig(LlamaConfig):
    """olmo: whether blocks are those of OLMo-2.  state_std: standard deviation of the initial state."""

    olmo: bool = False
    state_std: float = STD
    initial_state_mode: str = "random"

    embed_scale: ClassVar[float] = 1.0
    KEYS: ClassVar[dict[str, str]] = dict(
        num_key_value_heads="n_kv_heads", max_position_embeddings="block_size", rope_theta="rope_base"
    )

    def __post_init__(self):
        super().__post_init__()
        self.olmo = flag("olmo", self.olmo)
        self.state_std = number("state_std", self.state_std, above=0)
        one_of("initial_state_mode", self.initial_state_mode, ("random", "embed-init", "skip-adapter"))


class RavenAttention(nn.Module):
    """Grouped-query attention; queries, keys and values come from one matrix, as in Huginn."""

    def __init__(self, config: RavenConfig):
        super().__init__()
        self.heads = config.n_heads, config.n_kv_heads
        self.widths = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        self.Wqkv = nn.Linear(config.n_embd, sum(self.widths), bias=False)
        self.proj = nn.Linear(self.widths[0], config.n_embd, bias=False)
        self.q_norm: Any = RMSNorm(self.widths[0], config.norm_eps) if config.olmo else None
        self.k_norm: Any = RMSNorm(self.widths[1], config.norm_eps) if config.olmo else None

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = causal) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        q, k, v = self.Wqkv(x).split(self.widths, dim=-1)  # (B, T, H c), (B, T, K c) twice
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(grouped(q, k, v, self.heads, rope, attend))


class PostNormBlock(nn.Module):
    """OLMo-2's: x <- x + norm_1(attn(x));   x <- x + norm_2(mlp(x))."""

    def __init__(self, config: RavenConfig):
        super().__init__()
        self.norm_1, self.norm_2 = (RMSNorm(config.n_embd, config.norm_eps) for _ in range(2))
        self.attn, self.mlp = RavenAttention(config), GatedMLP(config)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = causal) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        x = self.norm_1(self.attn(x, rope, attend)).add_(x)
        return self.norm_2(self.mlp(x)).add_(x)


class Raven(RecurrentDepthLM):
    """A retrofitted model; parts and use as of `RecurrentDepthLM`."""

    def block_class(self, config: RavenConfig) -> nn.Module:
        """A block of Llama or of OLMo-2."""
        return PostNormBlock(config) if config.olmo else PreNormBlock(config, RavenAttention, GatedMLP)

    def rope(self, positions: Tensor) -> Tensor:
        """The rotation of every position: (..., T) int64 -> (..., T, 1, head_dim/2) complex64."""
        return rope_table(positions, self.config)

    def initial_state(self, positions: Tensor, seed: int | Tensor = 0, scale: float = 1.0) -> Tensor:
        """Truncated normal of `state_std`; zeros, which `recur` takes for e, if the state starts as e."""
        random = self.config.initial_state_mode == "random"
        if not random and scale not in (0, 1):
            raise ValueError(f"init_scale is {shown(scale)}; this model's state starts as its token's embedding")
        return RecurrentDepthLM.initial_state(self, positions, seed, scale if random else 0)

    def recur(self, s: Tensor, e: Tensor, at=None, slot=0) -> Tensor:
        """R: one recurrence step, state and embedding (B, T, d) each -> (B, T, d)."""
        mode = self.config.initial_state_mode
        first: Any = None if mode == "random" else (s == 0).all(dim=-1, keepdim=True)  # (B, T, 1)
        if mode != "random":
            s = torch.where(first, e, s)
        x = self.transformer.adapter(torch.cat([s, e], dim=-1))
        if mode == "skip-adapter":
            x = torch.where(first, e, x)
        return run(self.transformer.core_block, x, at or self.whole(x), "core", slot)

    def coda(self, s: Tensor, at=None, only: Tensor | None = None) -> Tensor:
        """C: state (B, T, d) -> logits (B, T, V) in float32 or wider; with only (B,) of one position a row."""
        x = run(self.transformer.coda, s, at or self.whole(s), "coda")
        return wide(self.lm_head(self.transformer.ln_f(self.picked(x, only))))
