"""The numbers that describe a recurrent-depth transformer, under the names that published checkpoints use.

One dataclass holds the shape of the network (prelude P, recurrent block R, coda C), the depth it was trained
at, and the shipped defaults for decoding.  The same class describes the tiny model of the notebooks and the
3.5B Huginn-0125 (arXiv 2502.05171, section 3): only the numbers differ.  Notebook: 01_recurrent_block.
"""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass, fields
from numbers import Real


def whole(name: str, value, least: int | None = None, most: int | None = None) -> int:
    """A whole number as an int, whoever made it: Python, NumPy or a tensor; else a ValueError that names it."""
    try:
        n = operator.index(value)
    except TypeError:
        n = None
    if n is None or (least is not None and n < least) or (most is not None and n > most):
        limits = "" if least is None else f", at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; it must be a whole number{limits}")
    return n


def number(name: str, value) -> float:
    """A number as a float; else a ValueError that names it."""
    if not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return float(value)


@dataclass
class RecurrentConfig:
    """Shape, depth and token ids of a recurrent-depth model; field names as in the Hugging Face config.

    Sizes are counts; `n_embd` is d in the shape comments.  A wrong value is a `ValueError` at construction.
    """

    n_embd: int = 5280  # d: width of the residual stream
    n_heads: int = 55
    intermediate_size: int = 17920  # inner width of the gated MLP
    vocab_size: int = 65536  # tokens that mean something ...
    padded_vocab_size: int | None = None  # ... and rows of the embedding; None: vocab_size
    block_size: int = 4096  # longest context, in tokens
    n_layers_in_prelude: int = 2
    n_layers_in_recurrent_block: int = 4
    n_layers_in_coda: int = 2
    mean_recurrence: int = 32  # mean of the depths drawn in training; the default depth of decoding
    mean_backprop_depth: int = 8  # recurrence steps that gradients flow through
    rope_base: float = 50_000.0
    norm_eps: float = 1e-6
    qk_bias: bool = True
    tie_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.padded_vocab_size is None:
            self.padded_vocab_size = self.vocab_size
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name.endswith("_token_id"):
                if value is not None:
                    setattr(self, name, whole(name, value, 0, self.padded_vocab_size - 1))
            elif field.type.startswith("int"):
                setattr(self, name, whole(name, value, 1))
            elif field.type == "float" and not number(name, value) > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if self.n_embd % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"n_embd {self.n_embd} with n_heads {self.n_heads}: n_embd must be n_heads times an even head size"
            )
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size is {self.padded_vocab_size}; it must be at least vocab_size {self.vocab_size}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_heads

    @property
    def effective_depth(self) -> int:
        """Blocks a token passes at the mean recurrence: the `l` of the initialisation (2502.05171, 3.2)."""
        return (
            self.n_layers_in_prelude + self.n_layers_in_recurrent_block * self.mean_recurrence + self.n_layers_in_coda
        )

    @property
    def init_std(self) -> float:
        """Standard deviation of weights, and of the initial state before scaling: sqrt(2 / 5d)."""
        return math.sqrt(2 / (5 * self.n_embd))

    def to_dict(self) -> dict:
        """The fields as a plain dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> RecurrentConfig:
        """Build from a dictionary; keys that are not fields are left to whoever wrote them."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})

    @classmethod
    def preset(cls, name: str) -> RecurrentConfig:
        """`"tiny"` (the shipped model's shape), `"small"` (the shape of the speed benchmarks), `"huginn_3_5b"`."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


PRESETS = {
    # What one student trains on a laptop: see minirec/assets/tiny.
    "tiny": dict(
        n_embd=96, n_heads=3, intermediate_size=264, vocab_size=144, block_size=512,
        n_layers_in_prelude=1, n_layers_in_recurrent_block=1, n_layers_in_coda=1,
        mean_recurrence=12, mean_backprop_depth=16,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    # Two prelude, four core, two coda blocks as in Huginn, small enough for a CPU: the overhead benchmark.
    "small": dict(
        n_embd=256, n_heads=8, intermediate_size=704, vocab_size=512, block_size=512,
        mean_recurrence=16,
    ),
    # tomg-group-umd/huginn-0125 (2502.05171, section 3)
    "huginn_3_5b": dict(bos_token_id=65504, eos_token_id=65505, pad_token_id=65509),
}  # fmt: skip
