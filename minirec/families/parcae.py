"""Parcae: a looped model, trained from scratch, whose injection is a stable linear system (arXiv 2604.12946).

How it differs from Huginn's recurrent block:

    injection   x = s * exp(-dt exp(A)) + dt * (B e), with dt and A learned for each channel
    block       one norm before each branch; the MLP is a squared ReLU without a gate
    queries     q and k have no offset; they are normed after the rotation, per head and without weights
    values      every second layer adds a learned value for the token itself, scaled by a gate
    norms       e is normed after the prelude; a matrix C follows the loop; ln_f is used once, before the head

All three parts look tokens up: a window knows them, and so do `model.whole(tokens)` and what prelude and recur return.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirec.config import RecurrentConfig
from minirec.families.llama import PreNormBlock, normed
from minirec.recurrent_block import Attend, RecurrentDepthLM, RMSNorm, Whole, causal, rotate, wide

GATE = 32  # channels of a block's input that the gate of the value table reads


@dataclass
class ParcaeConfig(RecurrentConfig):
    """Raises ValueError for odd layer counts: with those the published code leaves value tables unused."""

    norm_eps: float = 1e-5
    qk_bias: bool = False
    KEYS: ClassVar[dict[str, str]] = dict(num_attention_heads="n_heads")
    embed_scale: ClassVar[float] = 1.0

    def __post_init__(self):
        super().__post_init__()
        layers = self.n_layers_in_prelude, self.n_layers_in_recurrent_block, self.n_layers_in_coda
        if any(n % 2 for n in layers) or self.n_embd < GATE or self.qk_bias:
            shape = f"layers are {layers}, n_embd {self.n_embd} and qk_bias {self.qk_bias}"
            raise ValueError(f"{shape}; Parcae needs even layer counts, {GATE} channels and no qk_bias")


class ParcaeAttention(nn.Module):
    """Attention with normed queries and keys; with a gate, it adds each token's own value."""

    def __init__(self, config: ParcaeConfig):
        super().__init__()
        self.n_heads, d = config.n_heads, config.n_embd
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.ve_gate: Any = None  # every second layer has one

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = causal, own: Tensor | None = None) -> Tensor:
        """x (B, T, d), and own (B, T, d), the value table's rows of the tokens -> (B, T, d)."""
        qk = torch.stack([self.c_q(x), self.c_k(x)], dim=2).unflatten(-1, (self.n_heads, -1))  # (B, T, 2, H, c)
        qk = normed(rotate(qk, rope), torch.finfo(qk.dtype).eps)
        v = self.c_v(x).unflatten(-1, (self.n_heads, -1))  # (B, T, H, c)
        if own is not None:
            v = v + 2 * self.ve_gate(x[..., :GATE]).sigmoid()[..., None] * own.view(v.shape)
        q, k = qk.transpose(1, 3).unbind(2)  # (B, H, T, c) each
        return self.c_proj(attend(q, k, v.transpose(1, 2)).flatten(2))


class SquaredMLP(nn.Module):
    """proj(max(fc(x), 0)^2 / 2), (B, T, d) -> (B, T, d)."""

    def __init__(self, config: ParcaeConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square().mul_(0.5))


class Decay(nn.Module):
    """The injection: s * exp(-dt exp(A_log)) + dt * (e B^T) with dt = softplus(dt_bias); (B, T, d) each."""

    def __init__(self, d: int):
        super().__init__()
        self.A_log, self.dt_bias, self.B = (nn.Parameter(torch.empty(shape)) for shape in (d, d, (d, d)))

    def forward(self, s: Tensor, e: Tensor) -> Tensor:
        dt = F.softplus(self.dt_bias)
        return s * torch.exp(-dt * torch.exp(self.A_log)) + dt * F.linear(e, self.B)


class Parcae(RecurrentDepthLM):
    """A Parcae model; parts and use as of `RecurrentDepthLM`."""

    block_class = partial(PreNormBlock, attention=ParcaeAttention, mlp=SquaredMLP)

    def build(self) -> None:
        """The parts of the recurrent block, Parcae's own, and a value table for every second layer."""
        super().build()
        d, parts, self.value_embeds = self.config.n_embd, self.transformer, nn.ModuleDict()
        parts["adapter"], parts["C"] = Decay(d), nn.Linear(d, d, bias=False)
        parts["ln_prelude"] = RMSNorm(d, self.config.norm_eps)
        for i, block in enumerate([*parts.prelude, *parts.core_block, *parts.coda]):
            if i % 2:
                self.value_embeds[str(i)] = nn.Embedding(self.config.padded_vocab_size, d)
                block.attn.ve_gate = nn.Linear(GATE, self.config.n_heads, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Huginn's rule, and the published injection: B = 1, and a step keeps sqrt(1/5) of the state."""
        super().reset_parameters()
        nn.init.eye_(self.transformer.adapter.B)
        self.transformer.adapter.A_log.zero_()
        self.transformer.adapter.dt_bias.fill_(5**0.5 - 1).log_()  # exp(-softplus(x)) = sqrt(1/5)

    def whole(self, x: Tensor) -> Whole:
        """All positions of tokens (B, T), or of the states (B, T, d) that prelude or recur returned for them."""
        at = RecurrentDepthLM.whole(self, x)
        at.tokens = x if x.dim() == 2 else getattr(x, "tokens", None)
        if at.tokens is None:
            raise ValueError("Parcae looks tokens up in every part of the model: pass at=model.whole(tokens)")
        return at

    def through(self, part: str, x: Any, at: Any, before: int, slot=0) -> Any:
        """x (B, W, d) through the blocks of a part, which has `before` layers before it."""
        for layer, block in enumerate(getattr(self.transformer, {"core": "core_block"}.get(part, part))):
            own = getattr(self.value_embeds, str(before + layer))(at.tokens) if layer % 2 else None
            x = block(x, at.rope, partial(at.attend, part, layer, slot), own)
        x.tokens = at.tokens
        return x

    def prelude(self, tokens: Tensor, at=None) -> Tensor:
        """P: tokens (B, T) int64 -> e (B, T, d)."""
        e = self.through("prelude", self.transformer.wte(tokens), at or self.whole(tokens), 0)
        normed: Any = self.transformer.ln_prelude(e)
        normed.tokens = e.tokens
        return normed

    def recur(self, s: Tensor, e: Tensor, at=None, slot=0) -> Tensor:
        """R: one recurrence step, state and embedding (B, T, d) each -> (B, T, d)."""
        before = self.config.n_layers_in_prelude
        return self.through("core", self.transformer.adapter(s, e), at or self.whole(e), before, slot)

    def coda(self, s: Tensor, at=None, only: Tensor | None = None) -> Tensor:
        """C: state (B, T, d) -> logits (B, T, V) in float32 or wider; with only (B,) int64, of one position a row."""
        before = self.config.n_layers_in_prelude + self.config.n_layers_in_recurrent_block
        x = self.through("coda", self.transformer.C(s), at or self.whole(s), before)
        return wide(self.lm_head(self.transformer.ln_f(self.picked(x, only))))
