"""Parcae: a looped model from scratch whose state decays and takes e in, channel by channel (arXiv 2604.12946).

What differs from the recurrent block of Huginn:

    injection   x = s * exp(-dt exp(A)) + dt * (B e): a stable linear system, with dt, A of each channel learned
    block       one norm before each branch; squared ReLU without a gate
    queries     no offset; after the rotation q and k are normed, head by head, without weights
    values      in every second layer a table adds to v what it holds for the token itself, by a learned gate
    norms       e is normed after the prelude; after the loop a matrix C; ln_f before the head alone

The tables are read by token, in every part of the model: a window knows its tokens, and so does `model.whole(tokens)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirec.config import RecurrentConfig
from minirec.noise import truncated_normal
from minirec.recurrent_block import Attend, RecurrentDepthLM, RMSNorm, Whole, causal, rotate, wide

GATE = 32  # channels of a block's input that the gate of the value table reads


@dataclass
class ParcaeConfig(RecurrentConfig):
    """Raises ValueError for odd counts of layers or steps: tables and gates of published code then miss each other."""

    norm_eps: float = 1e-5
    qk_bias: bool = False
    KEYS: ClassVar[dict[str, str]] = dict(num_attention_heads="n_heads")

    def __post_init__(self):
        super().__post_init__()
        layers = self.n_layers_in_prelude, self.n_layers_in_recurrent_block, self.n_layers_in_coda
        if any(n % 2 for n in layers) or self.n_embd < GATE:
            raise ValueError(
                f"layers are {layers} and n_embd {self.n_embd}; Parcae needs even counts and {GATE} channels"
            )


class ParcaeAttention(nn.Module):
    """Attention with normed queries and keys; `gated` layers add a token's own value."""

    def __init__(self, config: ParcaeConfig, gated: bool):
        super().__init__()
        self.n_heads = config.n_heads
        for name in ("c_q", "c_k", "c_v", "c_proj"):
            setattr(self, name, nn.Linear(config.n_embd, config.n_embd, bias=False))
        if gated:
            self.ve_gate = nn.Linear(GATE, config.n_heads, bias=False)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = causal, own: Tensor | None = None) -> Tensor:
        """x (B, T, d), own (B, T, d): what the table holds for each token -> (B, T, d)."""
        B, T, _ = x.shape
        qk = torch.stack([self.c_q(x), self.c_k(x)], dim=2).view(B, T, 2, self.n_heads, -1)
        qk = rotate(qk, rope)
        qk = F.rms_norm(qk, qk.shape[-1:], eps=torch.finfo(qk.dtype).eps)
        v = self.c_v(x).view(B, T, self.n_heads, -1)
        if own is not None:
            v = v + 2 * self.ve_gate(x[..., :GATE]).sigmoid()[..., None] * own.view(v.shape)
        q, k = qk.transpose(1, 3).unbind(2)  # (B, H, T, c) each
        return self.c_proj(attend(q, k, v.transpose(1, 2)).flatten(2))


class SquaredMLP(nn.Module):
    """proj(max(fc(x), 0)^2 / 2)."""

    def __init__(self, config: ParcaeConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.proj(F.relu(self.fc(x)).square() * 0.5)


class ParcaeBlock(nn.Module):
    """x <- x + attn(norm(x));   x <- x + mlp(norm(x))."""

    def __init__(self, config: ParcaeConfig, gated: bool):
        super().__init__()
        self.norm_1, self.norm_2 = (RMSNorm(config.n_embd, config.norm_eps) for _ in range(2))
        self.attn, self.mlp = ParcaeAttention(config, gated), SquaredMLP(config)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = causal, own: Tensor | None = None) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        x = self.attn(self.norm_1(x), rope, attend, own).add_(x)
        return self.mlp(self.norm_2(x)).add_(x)


class Decay(nn.Module):
    """The injection: s * exp(-dt exp(A_log)) + dt * (e B^T), dt = softplus(dt_bias)."""

    def __init__(self, d: int):
        super().__init__()
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.B = nn.Parameter(torch.eye(d))

    @property
    def rates(self) -> tuple[Tensor, Tensor]:
        """What a step keeps of the state and takes of e, (d,) each."""
        dt = F.softplus(self.dt_bias)
        return torch.exp(-dt * torch.exp(self.A_log)), dt

    def forward(self, s: Tensor, e: Tensor) -> Tensor:
        """(B, T, d) each -> (B, T, d)."""
        keep, take = self.rates
        return s * keep + take * F.linear(e, self.B)


class Parcae(RecurrentDepthLM):
    """A Parcae model; parts and use as of `RecurrentDepthLM`."""

    def build(self) -> None:
        """Modules under the names of the published tensors."""
        config, d = self.config, self.config.n_embd
        counts = config.n_layers_in_prelude, config.n_layers_in_recurrent_block, config.n_layers_in_coda
        parts = {
            name: nn.ModuleList(ParcaeBlock(config, gated=i % 2 == 1) for i in range(n))
            for name, n in zip(("prelude", "core_block", "coda"), counts, strict=True)
        }
        self.transformer = nn.ModuleDict(
            parts
            | {"wte": nn.Embedding(config.padded_vocab_size, d), "adapter": Decay(d), "C": nn.Linear(d, d, bias=False)}
            | {name: RMSNorm(d, config.norm_eps) for name in ("ln_prelude", "ln_f")}
        )
        tables = range(1, sum(counts), 2)  # by layer, counted through all parts
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.padded_vocab_size, d) for i in tables})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation, "scaled-zero": blocks that add nothing, a decay of sqrt(1/5), B = 1."""
        std = self.config.init_std
        for name, p in self.named_parameters():
            if name.endswith(("c_proj.weight", "mlp.proj.weight", "A_log")):
                p.zero_()
            elif name.endswith("dt_bias"):
                p.fill_(math.log(math.expm1(math.log(5) / 2)))  # exp(-softplus(x)) = sqrt(1/5)
            elif name.endswith("adapter.B"):
                nn.init.eye_(p)
            elif "value_embeds" in name:
                nn.init.normal_(p)
            elif p.dim() == 1:
                p.fill_(1.0)
            else:
                nn.init.trunc_normal_(p, std=std, a=-3 * std, b=3 * std)

    def initial_state(self, positions: Tensor, seed: int | Tensor = 0, scale: float = 1.0) -> Tensor:
        """Truncated normal of variance 2/(5d), times scale: positions (..., T) int64 -> (..., T, d)."""
        std = self.config.init_std * scale
        return truncated_normal(seed, positions, self.config.n_embd, std).to(self.dtype)

    def whole(self, x: Tensor) -> Whole:
        """The positions of tokens (B, T), or of what prelude or recur returned for them, (B, T, d)."""
        at = RecurrentDepthLM.whole(self, x)
        at.tokens = x if x.dim() == 2 else getattr(x, "tokens", None)
        if at.tokens is None:
            raise ValueError("Parcae reads the tokens in every part of the model: pass at=model.whole(tokens)")
        return at

    def through(self, part: str, x: Tensor, at: Any, cached: str, slot=0) -> Tensor:
        """x (B, W, d) through the blocks of a part; the layer before its first one is `before`."""
        config = self.config
        before = {"prelude": 0, "core": config.n_layers_in_prelude}
        first = before.get(cached, config.n_layers_in_prelude + config.n_layers_in_recurrent_block)
        for layer, block in enumerate(getattr(self.transformer, part)):
            table = str(first + layer)
            own = getattr(self.value_embeds, table)(at.tokens) if layer % 2 else None
            x = block(x, at.rope, partial(at.attend, cached, layer, slot), own)
        return x

    def prelude(self, tokens: Tensor, at=None) -> Tensor:
        """P: tokens (B, T) int64 -> e (B, T, d)."""
        here = at or self.whole(tokens)
        e = self.through("prelude", self.transformer.wte(tokens), here, "prelude")
        return self.remembering(self.transformer.ln_prelude(e), here, at)

    def recur(self, s: Tensor, e: Tensor, at=None, slot=0) -> Tensor:
        """R: one recurrence step, state and embedding (B, T, d) each -> (B, T, d)."""
        here = at or self.whole(e)
        s = self.through("core_block", self.transformer.adapter(s, e), here, "core", slot)
        return self.remembering(s, here, at)

    def remembering(self, x: Tensor, here: Any, at: Any) -> Tensor:
        """x, which then knows its tokens if nobody else does: so that the three parts can be called one by one."""
        if at is None:
            x.tokens = here.tokens
        return x

    def coda(self, s: Tensor, at=None, only: Tensor | None = None) -> Tensor:
        """C: state (B, T, d) -> logits (B, T, V) in float32 or wider; with only (B,) int64, of one position a row."""
        x = self.through("coda", self.transformer.C(s), at or self.whole(s), "coda")
        return wide(self.lm_head(self.transformer.ln_f(self.picked(x, only))))
