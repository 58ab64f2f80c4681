"""The recurrent-depth transformer: a prelude, a block that is iterated, and a coda.

    tokens --P--> e                         (B, T, d)    prelude: the input embedding, computed once
    s0 ~ truncated normal                   (B, T, d)    initial state: noise
    s_k = R(s_{k-1}, e),  k = 1..r          (B, T, d)    one recurrence step; e is injected every time
    C(s_r) --> logits                       (B, T, V)    coda

The block R always sees e, so it can be iterated for as long as one likes: depth is chosen when the model
runs, not when it is built.  This is the architecture of Huginn-0125 at any size (arXiv 2502.05171, section 3;
parameter names are those of its checkpoint), and the model that arXiv 2510.14961 samples from.

| here | paper | | here | paper |
|---|---|---|---|---|
| `prelude` | P | | `num_steps` | r |
| `recur` | R | | `e`, `s` | e, s_i |
| `coda` | C | | `n_embd` | h |

Notebook: 01_recurrent_block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirec.config import RecurrentConfig, number, shown
from minirec.noise import truncated_normal

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, with the statistics in float32 (2502.05171, section 3.2)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider: what norms, rotations and logits are computed in, and NumPy knows."""
    return x if x.dtype == torch.float64 else x.float()


def rope_table(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """Unit complex numbers exp(i p theta_c) that rotate channel pair c of a query or key at position p.

    positions (..., T) int64 -> (..., T, 1, 1, head_dim/2) complex64, theta_c = base^(-2c / head_dim); the two
    singleton axes stand for (q or k) and heads.  Angles are formed in float32, as in the published checkpoint.
    """
    theta = base ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None, None, None].float() * theta  # (..., T, 1, 1, head_dim/2)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the adjacent channel pairs (0, 1), (2, 3), ... of x (B, T, n, H, head_dim) by a rope table.

    A pair is one complex number, so the rotation is one multiplication; it is done in float32 or wider.
    """
    pairs = torch.view_as_complex(wide(x).view(*x.shape[:-1], -1, 2))  # (B, T, n, H, head_dim/2)
    turned = torch.view_as_real(pairs * rope).view(x.shape)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)  # a cast to the same format is not free


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention: position t attends to positions 0..t.  q, k, v (B, H, T, c) -> (B, T, H, c)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with rotary positions and a learned offset on queries and keys."""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        # one row for q, one for k; the singleton axis broadcasts over T
        shape = (2, 1, config.n_heads, config.head_dim)
        self.qk_bias = nn.Parameter(torch.zeros(shape)) if config.qk_bias else None

    @property
    def offset(self) -> Tensor | None:
        """What is added to queries and keys, (2, H, c), if anything is."""
        return None if self.qk_bias is None else self.qk_bias.squeeze(1)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = causal) -> Tensor:
        """x (B, T, d), rope (T, 1, 1, head_dim/2) -> (B, T, d).

        attend: q, k, v (B, H, T, c) -> (B, T, H, c).  Training attends to the window itself; decoding stores k and v
        in the cache, then attends to all that it holds.
        """
        B, T, _ = x.shape
        qkv = self.Wqkv(x).view(B, T, 3, self.n_heads, -1)  # (B, T, 3, H, c)
        offset = self.offset
        qk = qkv[:, :, :2] if offset is None else qkv[:, :, :2] + offset  # (B, T, 2, H, c)
        q, k = rotate(qk, rope).transpose(1, 3).unbind(2)  # (B, H, T, c) each
        y = attend(q, k, qkv[:, :, 2].transpose(1, 2))  # (B, T, H, c)
        return self.proj(y.flatten(2))  # (B, T, d)


class GatedMLP(nn.Module):
    """silu(W1 x) * (W2 x), projected back; W1 and W2 are stored as one matrix `fc`, the gate first."""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        gate, value = self.fc(x).chunk(2, dim=-1)  # (B, T, intermediate_size) each
        return self.proj(F.silu(gate).mul_(value))


class SandwichBlock(nn.Module):
    """A transformer block normalised before each branch and again after each residual sum.

        x <- norm_2(x + attn(norm_1(x)));   x <- norm_4(x + mlp(norm_3(x)))

    The norms after the sum keep the state's size fixed however often the block is looped; without them the
    3.5B training collapsed (2502.05171, sections 3.2 and 4.3).
    """

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.norm_3 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = GatedMLP(config)
        self.norm_4 = RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = causal) -> Tensor:
        """(B, T, d) -> (B, T, d); rope and attend as for `Attention`."""
        x = self.norm_2(self.attn(self.norm_1(x), rope, attend).add_(x))  # in place: decoding is many small calls
        return self.norm_4(self.mlp(self.norm_3(x)).add_(x))


class Whole:
    """All positions of a sequence at once, with plain causal attention: where the model runs unless told otherwise.

    Decoding runs the same model `at` a few positions against a cache instead: `minirec.kv_cache.Window` has the same
    two members.  rope: the rotation of every position, as from `RecurrentDepthLM.rope`.
    """

    def __init__(self, rope: Tensor):
        self.rope = rope

    def attend(self, part: str, layer: int, slot, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`causal`, for every part, layer and slot."""
        return causal(q, k, v)


def run(blocks, x: Tensor, at, part: str, slot=0) -> Tensor:
    """x (B, W, d) through some blocks `at` some positions; part and slot say where a cache keeps keys and values."""
    for layer, block in enumerate(blocks):
        x = block(x, at.rope, partial(at.attend, part, layer, slot))
    return x


@dataclass
class Output:
    """What a forward pass gives: logits (B, T, V) in float32 or wider; state (B, T, d), raw, before ln_f."""

    logits: Tensor
    state: Tensor


class RecurrentDepthLM(nn.Module):
    """A recurrent-depth language model: prelude, iterated recurrent block, coda (2502.05171, section 3.2).

    The three parts are methods and can be used alone; the tokens are at positions 0..T-1.  Decoding calls the same
    methods `at` a few positions, with attention to stored keys and values (`minirec.decoding`).
    """

    # Reading and writing files is above this module, so the package attaches these two (minirec/__init__.py).
    from_pretrained: ClassVar[Callable[..., RecurrentDepthLM]]
    save_pretrained: Callable[..., None]
    transformer: Any  # a ModuleDict: PyTorch has no types for what its names stand for

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.config = config
        self.generation_config: dict = {}  # decoding defaults that came with the checkpoint, if any

        def blocks(n: int) -> nn.ModuleList:
            return nn.ModuleList(SandwichBlock(config) for _ in range(n))

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "prelude": blocks(config.n_layers_in_prelude),
                "adapter": nn.Linear(2 * config.n_embd, config.n_embd, bias=False),
                "core_block": blocks(config.n_layers_in_recurrent_block),
                "coda": blocks(config.n_layers_in_coda),
                "ln_f": RMSNorm(config.n_embd, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initialisation of Takase et al. as Huginn uses it (2502.05171, section 3.2).

        Truncated normals (at three sigma): variance 2/(5d), and 1/(5 d l) for the two projections that write
        to the residual stream, l the number of blocks passed at the mean recurrence; offsets 0, norms 1.
        """
        std = self.config.init_std
        out_std = math.sqrt(1 / (5 * self.config.n_embd * self.config.effective_depth))
        for name, p in self.named_parameters():
            if p.dim() == 1:  # norm weights
                p.fill_(1.0)
            elif name.endswith("qk_bias"):
                p.zero_()
            else:
                sigma = out_std if name.endswith("proj.weight") else std
                nn.init.trunc_normal_(p, std=sigma, a=-3 * sigma, b=3 * sigma)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.transformer.wte.weight.dtype

    def rope(self, positions: Tensor) -> Tensor:
        """The rotation of every position: (..., T) int64 -> (..., T, 1, 1, head_dim/2) complex64."""
        return rope_table(positions, self.config.head_dim, self.config.rope_base)

    def initial_state(self, positions: Tensor, seed: int | Tensor = 0, scale: float = 1.0) -> Tensor:
        """The state before the first step: truncated normal of variance 2/5 (2502.05171, 3.2), times scale.

        positions (..., T) int64 -> (..., T, d) in the model's dtype.  A position's state depends on
        (seed, position) alone: not on the batch, the cache, or the order of calls.  seed: int64, as an int or as a
        tensor that broadcasts against positions; scale: from 0 (zeros) to 1000.  Raises ValueError for others.
        """
        scale = number("scale", scale, least=0, most=1000)
        std = self.config.init_std * math.sqrt(self.config.n_embd) * scale
        return truncated_normal(seed, positions, self.config.n_embd, std).to(self.dtype)

    def whole(self, x: Tensor) -> Whole:
        """The positions 0..T-1 that tokens (B, T) or states (B, T, d) stand at."""
        return Whole(self.rope(torch.arange(x.shape[1], device=x.device)))

    def prelude(self, tokens: Tensor, at=None) -> Tensor:
        """P: tokens (B, T) int64 -> e (B, T, d), what every recurrence step is conditioned on."""
        e = self.transformer.wte(tokens) * math.sqrt(self.config.n_embd)  # (B, T, d)
        return run(self.transformer.prelude, e, at or self.whole(e), "prelude")

    def recur(self, s: Tensor, e: Tensor, at=None, slot=0) -> Tensor:
        """R: one recurrence step, state and embedding (B, T, d) each -> the next state (B, T, d)."""
        x = self.transformer.adapter(torch.cat([s, e], dim=-1))  # (B, T, 2d) -> (B, T, d)
        return run(self.transformer.core_block, x, at or self.whole(x), "core", slot)

    def coda(self, s: Tensor, at=None, only: Tensor | None = None) -> Tensor:
        """C: state (B, T, d) -> logits (B, T, V) in float32 or wider: ln_f, coda blocks, ln_f again, head.

        only (B,) int64: the one position of each row that is read; logits are then (B, 1, V).
        """
        x = run(self.transformer.coda, self.transformer.ln_f(s), at or self.whole(s), "coda")
        if only is not None:
            x = x[torch.arange(len(x), device=x.device), only][:, None]  # (B, 1, d)
        return wide(self.lm_head(self.transformer.ln_f(x)))

    def forward(self, tokens: Tensor, num_steps: int | None = None, state: Tensor | None = None) -> Output:
        """Run `num_steps` recurrence steps on tokens (B, T) int64, from `state` (B, T, d) or the initial one.

        num_steps None is the config's mean_recurrence.  Since `state` goes in and comes out, r1 steps and
        then r2 more are r1 + r2 steps.  Raises ValueError for a bad argument; see `checked_steps`.
        """
        num_steps = self.checked_steps(tokens, num_steps, state)
        at = self.whole(tokens)
        e = self.prelude(tokens, at)
        s = state
        if s is None:
            s = self.initial_state(torch.arange(tokens.shape[1], device=e.device)).expand_as(e)  # (B, T, d)
        for _ in range(num_steps):
            s = self.recur(s, e, at)
        return Output(logits=self.coda(s, at), state=s)

    def checked_steps(self, tokens: Tensor, num_steps: int | None, state: Tensor | None = None) -> int:
        """num_steps, or the config's mean_recurrence for None.

        Raises ValueError if it is not a whole number from 0 to `config.MOST_STEPS`; if tokens is not an integer tensor
        (B, T) of token ids that fits the context; or if state is given and is not (B, T, d) in the model's dtype.
        """
        num_steps = self.config.depth(num_steps, least=0)
        kind = getattr(tokens, "dtype", None)
        if not isinstance(tokens, Tensor) or kind not in (torch.int64, torch.int32):
            raise ValueError(f"tokens is {shown(tokens)}; it must be an int64 tensor (B, T)")
        if tokens.dim() != 2 or not len(tokens) or not 1 <= tokens.shape[1] <= self.config.block_size:
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)}; it must be (B, T) with T from 1 to {self.config.block_size}"
            )
        if not tokens.is_meta and not torch.compiler.is_compiling():
            least, most = torch.stack(tokens.aminmax()).tolist()
            if least < 0 or most >= self.config.padded_vocab_size:
                raise ValueError(
                    f"tokens holds {least if least < 0 else most}; token ids are from 0 to "
                    f"{self.config.padded_vocab_size - 1}"
                )
        if state is not None:
            shape = (*tokens.shape, self.config.n_embd)
            if not isinstance(state, Tensor) or tuple(state.shape) != shape:
                given = f"has shape {tuple(state.shape)}" if isinstance(state, Tensor) else f"is {shown(state)}"
                raise ValueError(f"state {given}; it must be {shape}, the shape of tokens and n_embd")
            if state.dtype != self.dtype and not torch.is_autocast_enabled(self.device.type):
                raise ValueError(f"state is {state.dtype}; it must be {self.dtype}, as the model is")
        return num_steps
