"""What families share that come from Llama: its config keys, its rotation of channel halves, its attention and MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirec.config import RecurrentConfig, number, whole
from minirec.recurrent_block import Attend, RMSNorm, causal, wide


@dataclass
class LlamaConfig(RecurrentConfig):
    """A config with grouped key-value heads, heads of any width, and Llama's rotation.

    rope_scaling: None, or the numbers of the "llama3" rule (`scaled`).  Raises ValueError for any other rule.
    """

    n_kv_heads: int = 8
    head_dim: int = 128
    rope_scaling: dict | None = field(default=None)
    qk_bias: bool = False
    tie_embeddings: bool = False

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ("n_layers_in_prelude", "n_layers_in_coda")
    # published key -> field, where they differ
    KEYS: ClassVar[dict[str, str]] = dict(
        hidden_size="n_embd", num_attention_heads="n_heads", num_key_value_heads="n_kv_heads",
        max_position_embeddings="block_size", rms_norm_eps="norm_eps", rope_theta="rope_base",
        tie_word_embeddings="tie_embeddings", num_hidden_layers="n_layers_in_recurrent_block",
    )  # fmt: skip

    def check_heads(self) -> None:
        """ValueError if the heads do not fit each other."""
        self.head_dim = whole("head_dim", self.head_dim, 2, 2**14)
        self.n_kv_heads = whole("n_kv_heads", self.n_kv_heads, 1, self.n_heads)
        if self.head_dim % 2 or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"head_dim is {self.head_dim}, n_heads {self.n_heads} and n_kv_heads {self.n_kv_heads}; "
                "head_dim must be even, and n_heads a multiple of n_kv_heads"
            )
        if (rule := self.rope_scaling) is None:
            return
        kind = rule.get("rope_type", rule.get("type")) if isinstance(rule, dict) else rule
        if kind != "llama3":
            raise ValueError(f"rope_scaling is {rule!r}; it must be None or of type 'llama3'")
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            number(f"rope_scaling's {key}", rule.get(key), above=0)


def scaled(theta: Tensor, rule: dict) -> Tensor:
    """Rotations (c/2,) for longer contexts, by the rule of Llama 3: slow ones slower, fast ones as they are."""
    wave = 2 * math.pi / theta
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    share = ((rule["original_max_position_embeddings"] / wave - low) / (high - low)).clamp(0, 1)
    return theta * ((1 - share) / rule["factor"] + share)


def rope_table(positions: Tensor, config: LlamaConfig) -> Tensor:
    """Unit complex numbers that rotate channel pairs (c, c + head_dim/2): positions (...) -> (..., 1, head_dim/2)."""
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    theta = config.rope_base ** -(half / config.head_dim)
    theta = theta if config.rope_scaling is None else scaled(theta, config.rope_scaling)
    angle = positions[..., None, None].float() * theta
    return torch.polar(torch.ones_like(angle), angle)


def rotate_halves(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate channel pairs (c, c + head_dim/2) of x (B, T, H, head_dim), in float32 or wider."""
    real, imaginary = wide(x).chunk(2, dim=-1)
    turned = torch.view_as_real(torch.complex(real, imaginary) * rope)  # (B, T, H, head_dim/2, 2)
    turned = turned.transpose(-1, -2).flatten(-2)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)


def grouped(q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, int], rope: Tensor, attend: Attend) -> Tensor:
    """Attention with fewer heads of keys and values: q (B, T, H c), k and v (B, T, K c) -> (B, T, H c)."""
    B, T, _ = q.shape
    H, K = heads
    qk = rotate_halves(torch.cat([q, k], dim=-1).view(B, T, H + K, -1), rope).transpose(1, 2)  # (B, H + K, T, c)
    return attend(qk[:, :H], qk[:, H:], v.view(B, T, K, -1).transpose(1, 2)).flatten(2)


class LlamaAttention(nn.Module):
    """Grouped-query attention with four projections."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads = config.n_heads, config.n_kv_heads
        wide, narrow = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, wide, bias=False)
        self.k_proj = nn.Linear(config.n_embd, narrow, bias=False)
        self.v_proj = nn.Linear(config.n_embd, narrow, bias=False)
        self.o_proj = nn.Linear(wide, config.n_embd, bias=False)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = causal) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.o_proj(grouped(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, rope, attend))


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.down_proj(F.silu(self.gate_proj(x)).mul_(self.up_proj(x)))


class PreNormBlock(nn.Module):
    """x <- x + attn(norm_1(x));   x <- x + mlp(norm_2(x)), with the attention and MLP of a family."""

    def __init__(self, config: RecurrentConfig, attention: type[nn.Module], mlp: type[nn.Module]):
        super().__init__()
        self.norm_1, self.norm_2 = (RMSNorm(config.n_embd, config.norm_eps) for _ in range(2))
        self.attn, self.mlp = attention(config), mlp(config)

    def forward(self, x: Tensor, *where) -> Tensor:
        """(B, T, d) -> (B, T, d); where: what the attention takes beside x."""
        x = self.attn(self.norm_1(x), *where).add_(x)
        return self.mlp(self.norm_2(x)).add_(x)
