"""The numbers that describe a recurrent-depth transformer, under the names that published checkpoints use.

One dataclass holds the shape of the network (prelude P, recurrent block R, coda C), the depth it was trained
at, and the shipped defaults for decoding.  The same class describes the tiny model of the notebooks and the
3.5B Huginn-0125 (arXiv 2502.05171, section 3): only the numbers differ.  Notebook: 01_recurrent_block.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from numbers import Real
from typing import Any, ClassVar

MOST_STEPS = 4096  # recurrence steps: more than any published model runs, and a cache of this depth still fits
SMALLEST = 2.0**-126  # the smallest float32 with all its digits

# Upper bounds of the counts of a config: more than any real model has.
MOST = dict(
    n_embd=2**18, n_heads=2**14, intermediate_size=2**20, vocab_size=2**24, padded_vocab_size=2**24, block_size=2**26,
    n_layers_in_prelude=2**12, n_layers_in_recurrent_block=2**12, n_layers_in_coda=2**12,
    mean_recurrence=MOST_STEPS, mean_backprop_depth=MOST_STEPS,
)  # fmt: skip


def plain(x):
    """Tensors, arrays and their scalars as Python lists and numbers; anything else as it is."""
    try:
        return x.tolist()
    except (AttributeError, TypeError, RuntimeError):  # not such a thing, or one without values (the meta device)
        return x


def shown(value) -> str:
    """A value as an error message quotes it: one line of at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of too many digits, or a class with a broken __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(name: str, value, least: int | None = None, most: int | None = None) -> int:
    """A whole number of Python, NumPy or torch as an int; ValueError for anything else, and outside least..most."""
    given = plain(value)
    try:
        n = None if isinstance(given, bool) else operator.index(given)
    except (TypeError, RuntimeError):
        n = None
    if n is None or (least is not None and n < least) or (most is not None and n > most):
        limits = "" if least is None else f", at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number{limits}")
    return n


def number(
    name: str,
    value,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """A real number of Python, NumPy or torch, a Fraction or a Decimal, as a float.

    ValueError for anything else, for NaN and infinities, outside the bounds (least and most may be reached, above and
    below may not), and for what float32, in which models compute, cannot hold: too large, or not 0 and too small.
    """
    given = plain(value)
    try:
        x = math.nan if isinstance(given, bool) or not isinstance(given, (Real, Decimal)) else float(given)
    except OverflowError:  # an int or a fraction beyond float64
        x = math.inf if given > 0 else -math.inf
    except ValueError:  # a signaling NaN
        x = math.nan
    narrow = ctypes.c_float(x).value  # in float32, where a strict bound must hold too
    inside = not math.isnan(x) and (least is None or x >= least) and (most is None or x <= most)
    inside = inside and (above is None or min(x, narrow) > above) and (below is None or max(x, narrow) < below)
    if inside and (SMALLEST <= abs(narrow) < math.inf or given == 0):
        return x
    lower = f"at least {least}" if least is not None else f"above {above}" if above is not None else ""
    upper = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
    limits = f"{lower} and {upper}" if lower and upper else lower or upper
    kind = "a finite number that float32 can hold" if inside else "a number"
    raise ValueError(f"{name} is {shown(value)}; it must be {kind}{', ' * bool(limits)}{limits}")


def flag(name: str, value) -> bool:
    """True or False of Python, NumPy or torch as a bool; ValueError for anything else."""
    given = plain(value)
    if not isinstance(given, bool):
        raise ValueError(f"{name} is {shown(value)}; it must be True or False")
    return given


def one_of(name: str, value, names: Iterable[str]) -> str:
    """A string that is among names; ValueError for anything else."""
    names = list(names)
    if not isinstance(value, str) or value not in names:
        known = " or ".join(map(repr, names)) if len(names) == 2 else f"one of {', '.join(map(repr, names))}"
        raise ValueError(f"{name} is {shown(value)}; it must be {known}")
    return value


@dataclass
class RecurrentConfig:
    """Shape, depth and token ids of a recurrent-depth model; field names as in the Hugging Face config.

    Sizes are counts; `n_embd` is d in the shape comments.  Raises ValueError if a value has the wrong type or is out of
    range; `MOST` has the upper bounds of the counts.
    """

    n_embd: int = 5280  # d: width of the residual stream
    n_heads: int = 55
    intermediate_size: int = 17920  # inner width of the gated MLP
    vocab_size: int = 65536  # tokens that mean something ...
    padded_vocab_size: int = None  # type: ignore[assignment]  # ... and rows of the embedding; None: vocab_size
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

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ()  # counts that a family may do without

    def __post_init__(self):
        if self.padded_vocab_size is None:
            self.padded_vocab_size = self.vocab_size
        for field in fields(RecurrentConfig):  # not those that a family adds
            name, value = field.name, getattr(self, field.name)
            if name.endswith("_token_id"):
                value = None if value is None else whole(name, value, 0, self.padded_vocab_size - 1)
            elif field.type.startswith("int"):
                value = whole(name, value, 0 if name in self.MAY_BE_ZERO else 1, MOST[name])
            elif field.type == "bool":
                value = flag(name, value)
            elif name == "rope_base":
                value = number(name, value, least=1, most=1e12)
            else:
                value = number(name, value, above=0, most=1)
            setattr(self, name, value)
        self.check_heads()
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size is {self.padded_vocab_size}; it must be at least vocab_size {self.vocab_size}"
            )

    def check_heads(self) -> None:
        """ValueError if the width cannot be cut into heads."""
        if self.n_embd % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"n_embd {self.n_embd} with n_heads {self.n_heads}: n_embd must be n_heads times an even head size"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads

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

    def depth(self, num_steps: int | None, least: int = 1) -> int:
        """num_steps, or mean_recurrence for None; ValueError if it is not a whole number from least to MOST_STEPS."""
        return self.mean_recurrence if num_steps is None else whole("num_steps", num_steps, least, MOST_STEPS)

    def to_dict(self) -> dict:
        """The fields as a plain dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> RecurrentConfig:
        """Build from a dictionary; keys that are not fields are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})

    @classmethod
    def preset(cls, name: str) -> RecurrentConfig:
        """`"tiny"` (the shipped model's shape), `"small"` (the shape of the speed benchmarks), `"huginn_3_5b"`."""
        return cls(**PRESETS[one_of("preset", name, PRESETS)])


PRESETS: dict[str, dict[str, Any]] = {
    # What one student trains on a laptop: see minirec/assets/tiny.
    "tiny": dict(
        n_embd=96, n_heads=3, intermediate_size=264, vocab_size=128, block_size=512,
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
