"""Nanbeige4.2: a plain Llama, run twice (arXiv 2607.22083).

What differs from Ouro: Llama's own layer, with one norm before each branch; no gate; and the norm after a loop may be
that of the last loop alone (`skip_loop_final_norm`, in no published model).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from minirec.config import flag
from minirec.families.llama import LlamaAttention, LlamaConfig, LlamaMLP
from minirec.families.ouro import Looped
from minirec.recurrent_block import Attend, RMSNorm, causal, wide


@dataclass
class NanbeigeConfig(LlamaConfig):
    """skip_loop_final_norm: no norm between loops, only before the head."""

    n_layers_in_prelude: int = 0
    n_layers_in_coda: int = 0
    skip_loop_final_norm: bool = False

    KEYS: ClassVar[dict[str, str]] = LlamaConfig.KEYS | {"num_loops": "mean_recurrence"}

    def __post_init__(self):
        super().__post_init__()
        self.mean_backprop_depth = self.mean_recurrence
        self.skip_loop_final_norm = flag("skip_loop_final_norm", self.skip_loop_final_norm)


class LlamaBlock(nn.Module):
    """x <- x + attn(norm(x));   x <- x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(config), LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = causal) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        x = self.self_attn(self.input_layernorm(x), rope, attend).add_(x)
        return self.mlp(self.post_attention_layernorm(x)).add_(x)


class Nanbeige(Looped):
    """A looped Llama; parts and use as of `RecurrentDepthLM`."""

    block_class = LlamaBlock

    def after_loop(self, x: Tensor) -> Tensor:
        """The norm after each loop, or nothing: (B, T, d) -> (B, T, d)."""
        return x if self.config.skip_loop_final_norm else self.model.norm(x)

    def coda(self, s: Tensor, at=None, only: Tensor | None = None) -> Tensor:
        """State (B, T, d) -> logits (B, T, V) in float32 or wider; with only (B,) int64, of one position a row."""
        x = self.picked(s, only)
        return wide(self.lm_head(self.model.norm(x) if self.config.skip_loop_final_norm else x))
