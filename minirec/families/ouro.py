"""Ouro: a whole transformer, run several times, with a learned gate that says when to stop (arXiv 2510.25741).

What differs from the recurrent block of Huginn:

    parts       no prelude and no coda: e is the token's embedding, the head reads the state
    injection   none: the state starts as e, and no later step sees e
    loops       one norm after each; its output feeds the next loop, the gate and the head
    block       Llama's layer with a second norm after each branch, inside the sum

A state of zeros is one that has not begun.  Without injection a state cannot follow its token when that changes (arXiv
2510.14961, section 3.1), so diffusion forcing starts such a position again.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minirec.config import number, shown
from minirec.families.llama import LlamaAttention, LlamaConfig, LlamaMLP, rope_table
from minirec.recurrent_block import Attend, RecurrentDepthLM, RMSNorm, causal, run, wide


@dataclass
class OuroConfig(LlamaConfig):
    """early_exit_threshold: the published default of the gate's criterion."""

    n_layers_in_prelude: int = 0
    n_layers_in_coda: int = 0
    early_exit_threshold: float = 1.0

    KEYS: ClassVar[dict[str, str]] = LlamaConfig.KEYS | {"total_ut_steps": "mean_recurrence"}

    def __post_init__(self):
        super().__post_init__()
        self.mean_backprop_depth = self.mean_recurrence
        self.early_exit_threshold = number("early_exit_threshold", self.early_exit_threshold)


class OuroBlock(nn.Module):
    """x <- x + norm(attn(norm(x)));   x <- x + norm(mlp(norm(x)))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(config), LlamaMLP(config)
        norms = [RMSNorm(config.n_embd, config.norm_eps) for _ in range(4)]
        self.input_layernorm, self.input_layernorm_2 = norms[:2]
        self.post_attention_layernorm, self.post_attention_layernorm_2 = norms[2:]

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = causal) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        x = self.input_layernorm_2(self.self_attn(self.input_layernorm(x), rope, attend)) + x
        return self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x))) + x


class Looped(RecurrentDepthLM):
    """A transformer without prelude, coda or injection that is run again and again; parts as of `RecurrentDepthLM`."""

    model: Any  # a ModuleDict, as `transformer` is
    injects = False

    def build(self) -> None:
        """Modules under the names of the published tensors."""
        config = self.config
        layers = nn.ModuleList(self.block_class(config) for _ in range(config.n_layers_in_recurrent_block))
        embedding, norm = nn.Embedding(config.padded_vocab_size, config.n_embd), RMSNorm(config.n_embd, config.norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "norm": norm})

    @property
    def embedding(self) -> nn.Embedding:
        """The matrix of token embeddings."""
        return self.model.embed_tokens

    def rope(self, positions: Tensor) -> Tensor:
        """The rotation of every position: (..., T) int64 -> (..., T, 1, head_dim/2) complex64."""
        return rope_table(positions, self.config)

    def initial_state(self, positions: Tensor, seed: int | Tensor = 0, scale: float = 1.0) -> Tensor:
        """Zeros (..., d), which `recur` takes for e; ValueError for a scale, which would have no effect."""
        if scale not in (0, 1):
            raise ValueError(f"init_scale is {shown(scale)}; this model's state starts as its token's embedding")
        return torch.zeros(*positions.shape, self.config.n_embd, device=positions.device, dtype=self.dtype)

    def check_decoding(self, num_steps: int, kv: str = "full", level: int = 5) -> None:
        """Warn of what such models do badly: more loops than were trained, and loops that share keys and values."""
        trained = self.config.mean_recurrence
        if num_steps > trained:
            warnings.warn(f"num_steps is {num_steps}; this model was trained with {trained} loops", stacklevel=level)
        if kv == "shared":
            fall = "on GSM8K, Ouro-1.4B falls from 77.9 to 0.2 (arXiv 2608.09444)"
            warnings.warn(f"kv is 'shared', which this model was not trained for: {fall}", stacklevel=level)

    def checked_steps(self, tokens: Tensor, num_steps: int | None, state: Tensor | None = None) -> int:
        """As of `RecurrentDepthLM`; a warning for more loops than were trained."""
        num_steps = super().checked_steps(tokens, num_steps, state)
        self.check_decoding(num_steps, level=6)  # whoever called the model
        return num_steps

    def prelude(self, tokens: Tensor, at=None) -> Tensor:
        """The embedding of tokens (B, T) int64: e (B, T, d)."""
        return self.model.embed_tokens(tokens)

    def recur(self, s: Tensor, e: Tensor, at=None, slot=0) -> Tensor:
        """One loop, state and embedding (B, T, d) each -> the next state (B, T, d)."""
        x = torch.where((s == 0).all(dim=-1, keepdim=True), e, s)  # a state that has not begun starts as e
        return self.after_loop(run(self.model.layers, x, at or self.whole(x), "core", slot))

    def after_loop(self, x: Tensor) -> Tensor:
        """The norm after each loop, (B, T, d) -> (B, T, d)."""
        return self.model.norm(x)

    def coda(self, s: Tensor, at=None, only: Tensor | None = None) -> Tensor:
        """The head alone: state (B, T, d) -> logits (B, T, V) in float32 or wider; with only, of one position a row."""
        return wide(self.lm_head(self.picked(s, only)))


class Ouro(Looped):
    """A looped model with an exit gate."""

    block_class = OuroBlock

    def build(self) -> None:
        """The modules of a looped model, and the gate."""
        super().build()
        self.model["early_exit_gate"] = nn.Linear(self.config.n_embd, 1)

    def gate(self, s: Tensor) -> Tensor:
        """The gate's lambda: states (..., d) after a loop -> (...), the probability to stop there if not before."""
        return wide(self.model.early_exit_gate(s))[..., 0].sigmoid()


def exit_distribution(gates: Tensor) -> Tensor:
    """The probability that each loop is the last: lambdas (R, ...) -> (R, ...); the last takes what is left of 1."""
    left = torch.cat([torch.ones_like(gates[:1]), (1 - gates[:-1]).cumprod(dim=0)])
    return torch.cat([gates[:-1] * left[:-1], left[-1:]])


def exit_loops(gates: Tensor, threshold: float) -> Tensor:
    """The loop at which the gate exits: lambdas (R, ...) -> (...) int64, from 1.

    The first one by which the probability of having exited reaches the threshold; the last one if none does, also where
    rounding keeps the sum below 1.
    """
    reached = exit_distribution(gates).cumsum(dim=0) >= threshold
    reached[-1] = True
    return reached.to(torch.int8).argmax(dim=0) + 1
