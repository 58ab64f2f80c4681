"""Random numbers that are a function of where they are used: (seed, position, channel) -> number.

A sampler that visits positions in another order, in other batches or several times must still see the same
initial state and the same sampling noise at each position; otherwise "the same tokens as autoregressive
decoding" could not even be stated.  A generator with a hidden state cannot give that, a hash can: it has no
state, no order, and gives the same bits on every device.  Notebook: 01_recurrent_block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minirec.config import whole

_32_BITS = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads neighbouring integers apart


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3, on int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _32_BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _32_BITS
    return x ^ (x >> 16)


def as_seed(seed) -> int:
    """The seed of a row's noise, an int64; ValueError for anything else."""
    return whole("seed", seed, -(2**63), 2**63 - 1)


def uniform(seed: int | Tensor, positions: Tensor, n: int, stream: int = 0) -> Tensor:
    """n numbers in the open interval (0, 1) for every position; a function of the arguments alone.

    seed: an int64, as an int or as a tensor that broadcasts against positions (one seed per row); positions (...)
    int64 -> (..., n) float32.  `stream` keeps different uses of one seed apart.  Raises ValueError for a seed of
    another type.
    """
    if not isinstance(seed, Tensor):
        seed = torch.tensor(as_seed(seed), device=positions.device)
    elif seed.dtype != torch.int64:
        raise ValueError(f"seed has dtype {seed.dtype}; it must be torch.int64")
    else:
        seed = seed.to(positions.device)
    key = _mix(seed & _32_BITS)
    key = _mix((key + ((seed >> 32) & _32_BITS) * _GOLDEN) & _32_BITS)
    key = _mix((key + stream * _GOLDEN) & _32_BITS)
    key = _mix((key + positions * _GOLDEN) & _32_BITS)
    channel = torch.arange(1, n + 1, device=positions.device)
    bits = _mix((key[..., None] + channel * _GOLDEN) & _32_BITS)  # (..., n)
    return ((bits >> 9).float() + 0.5) / 2**23  # 23 bits: every value is exact in float32 and below 1


def truncated_normal(seed: int | Tensor, positions: Tensor, n: int, std: float, stream: int = 0) -> Tensor:
    """n draws from a normal distribution cut at three standard deviations: (...) -> (..., n) float32."""
    tail = 0.5 * math.erfc(3 / math.sqrt(2))  # the mass beyond three sigma on either side
    p = tail + (1 - 2 * tail) * uniform(seed, positions, n, stream)
    return std * math.sqrt(2) * torch.erfinv(2 * p - 1)


def gumbel(seed: int | Tensor, positions: Tensor, n: int) -> Tensor:
    """n standard Gumbel draws per position: argmax(logits + gumbel) is a sample of softmax(logits)."""
    return -torch.log(-torch.log(uniform(seed, positions, n, stream=1)))
