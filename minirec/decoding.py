"""The position x depth grid, and the one place that advances its cells.

        depth                  a cell (t, k): recurrence step k of token t
      r |  * * * *
        |  * * * * o           every sampler is a schedule over these cells:
        |  * * * * o o           autoregressive     one column after another, each r deep
        |  * * * * o o o         adaptive exit      the same, but a column may stop early
      1 |  * * * * o o o o       diffusion forcing  a diagonal: all columns o advance together
        +-----------------
           position t

`Grid` holds tokens, states, depths and the KV cache of a batch of sequences, and advances the cells of a
*window* of positions: `embed` (prelude), `recur` (one recurrence step), `decode` (coda), `choose` (tokens).
A sampler is a short loop that says which window to advance how far; it has no attention, cache or sampling
code of its own.  Notebook: 06_diffusion_forcing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirec.config import RecurrentConfig, flag, number, plain, shown, whole
from minirec.fast_path import FastPath, room
from minirec.kv_cache import Cells, Diagonal, KVCache, Window, upload
from minirec.noise import as_seed
from minirec.recurrent_block import RecurrentDepthLM, RMSNorm
from minirec.token_choice import TokenChoice


@dataclass
class OuterStep:
    """One outer step as the plots draw it: the window's first position and, after the step, its cells."""

    start: int
    depths: list[int]  # recurrence steps that each cell has had
    guesses: list[int]  # the token that each cell now predicts for the position after it
    frozen: int  # length of the frozen prefix, prompt included


@dataclass
class Generation:
    """What a sampler returns for one prompt.

    tokens: the new tokens, stop token included; depth: recurrence steps spent on each; passes: recurrent-block
    passes in all, prefill included (what a memory-bound machine pays for); row_steps: the cells these passes
    advanced after the prefill; decodes: coda calls, prefill included (of the prelude there are as many, or fewer);
    trace: None unless asked for.
    """

    tokens: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    passes: int = 0
    row_steps: int = 0
    decodes: int = 0
    trace: list[OuterStep] | None = None


@dataclass(kw_only=True)
class Options:
    """What every sampler takes besides its own arguments.

    kv: "full", or "shared" with kv_slots (`minirec.kv_cache`).  init_scale: scale of the random initial state, from 0
    (zeros) to 1000.  seed: an int, or one per prompt.  temperature, top_k, top_p, min_p, repetition_penalty: those of
    `minirec.token_choice`.  stop_tokens: ids that end a generation; None for the checkpoint's, () for none.  on_token:
    called with every token id as it becomes final, and for a batch also with its row; returning False ends that
    generation.  trace: record every outer step.  fast: static shapes, replayed as CUDA graphs on a GPU
    (`minirec.fast_path`); no gain on a CPU.

    Raises ValueError for a bad value, TypeError for an unknown name.
    """

    kv: str = "full"
    kv_slots: int = 1
    init_scale: float = 1.0
    seed: int | Sequence[int] = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_tokens: Collection[int] | None = None
    on_token: Callable | None = None
    trace: bool = False
    fast: bool = False

    def __post_init__(self):
        self.init_scale = number("init_scale", self.init_scale, least=0, most=1000)
        if self.stop_tokens is not None:
            self.stop_tokens = token_ids("stop_tokens", self.stop_tokens)
        if self.on_token is not None and not callable(self.on_token):
            raise ValueError(f"on_token is {shown(self.on_token)}; it must be a function, or None")
        self.trace, self.fast = flag("trace", self.trace), flag("fast", self.fast)


def is_list(x) -> bool:
    """Whether x is a sequence, and not text."""
    return isinstance(x, Sequence) and not isinstance(x, (str, bytes, bytearray))


def token_ids(name: str, ids) -> set[int]:
    """One token id, or a list or set of them, as a set of ints; ValueError naming anything else."""
    ids = plain(ids)
    return {whole(name, token, 0) for token in (ids if is_list(ids) or isinstance(ids, Set) else [ids])}


def as_rows(prompt) -> tuple[list[list[int]], bool]:
    """A prompt or a batch of prompts as lists of ids, and whether it was a single one; ValueError for anything else."""
    rows = plain(prompt)
    if not is_list(rows):
        raise ValueError(f"prompt is {shown(prompt)}; it must be token ids, or a batch of such")
    rows = [plain(row) for row in rows]
    single = not any(map(is_list, rows))
    if not single and not all(map(is_list, rows)):
        raise ValueError(f"prompt is {shown(prompt)}; it must be token ids, or a batch of such, and not both")
    return [rows] if single else [[plain(token) for token in row] for row in rows], single


def check_counts(**counts: int) -> list[int]:
    """The counts as ints; ValueError naming the first that is not a whole number of at least 1."""
    return [whole(name, value, 1) for name, value in counts.items()]


def check_request(config: RecurrentConfig, ids: list[int], max_new_tokens: int, context: int) -> None:
    """Raise ValueError if a prompt is empty, holds something that is no token id, or leaves too little context."""
    if not ids:
        raise ValueError("prompt is empty; it must hold at least one token")
    for token in ids:
        if type(token) is not int or not 0 <= token < config.padded_vocab_size:
            raise ValueError(f"prompt holds {shown(token)}; token ids are from 0 to {config.padded_vocab_size - 1}")
    if len(ids) + max_new_tokens > context:
        raise ValueError(
            f"prompt of {len(ids)} tokens and max_new_tokens {shown(max_new_tokens)} make "
            f"{shown(len(ids) + max_new_tokens)}; the context is {context} tokens"
        )


class Grid:
    """B sequences x L positions: tokens, states, depths, cache; and the four operations that advance a window.

    prompt: ids as a list or 1-D tensor, or a batch of such.  num_steps: r, None for the config's
    mean_recurrence.  spare: positions allocated in a batch for rows that are narrower than the widest.  Raises
    ValueError naming a bad argument, before any work.
    """

    def __init__(
        self,
        model: RecurrentDepthLM,
        prompt,
        max_new_tokens: int,
        num_steps: int | None = None,
        spare: int = 0,
        **options,
    ):
        config, o = model.config, Options(**options)
        prompts, self.single = as_rows(prompt)
        num_steps = config.depth(num_steps)
        (max_new_tokens,) = check_counts(max_new_tokens=max_new_tokens)
        if torch.is_autocast_enabled(model.device.type):
            raise ValueError("autocast is on; decoding has one number format: load the model with dtype instead")
        if not prompts:
            raise ValueError("prompt is empty; it must hold at least one token")
        for ids in prompts:
            check_request(config, ids, max_new_tokens, config.block_size)
        seeds = plain(o.seed)
        seeds = [as_seed(s) for s in (seeds if is_list(seeds) else [seeds] * len(prompts))]
        if len(seeds) != len(prompts):
            raise ValueError(
                f"seed has {len(seeds)} values for {len(prompts)} prompts; it must be one int, or one each"
            )

        self.model, self.options = model, o
        self.choice = TokenChoice(o.temperature, o.top_k, o.top_p, o.min_p, o.repetition_penalty)
        self.num_steps, self.max_new_tokens = num_steps, max_new_tokens
        self.stop_tokens = stop_tokens(model) if o.stop_tokens is None else o.stop_tokens
        self.lengths = [len(ids) for ids in prompts]
        length = max(self.lengths) + max_new_tokens + (spare if len(prompts) > 1 else 0)
        length = room(length) if o.fast else length
        device = model.device
        self.cache = KVCache(config, len(prompts), length, num_steps, o.kv, o.kv_slots, device, model.dtype)
        self.rope = model.rope(torch.arange(length, device=device))  # (L, 1, 1, c/2)
        self.seed = torch.tensor(seeds, device=device)[:, None]  # (B, 1)
        self.filler = config.pad_token_id or 0  # stands where no token is known yet
        self.tokens = torch.full((len(prompts), length), self.filler)  # (B, L)
        for row, ids in enumerate(prompts):
            self.tokens[row, : len(ids)] = torch.tensor(ids)
        self.tokens = self.tokens.to(device)
        everywhere = torch.arange(length, device=device).expand(len(prompts), -1)
        # (B, L, d): a position that was not opened yet holds its initial state
        self.state = model.initial_state(everywhere, seed=self.seed, scale=o.init_scale)
        self.net = twin(model)
        self.generations = [Generation(trace=[] if o.trace else None) for _ in prompts]
        self.finished = [False] * len(prompts)
        self.passes = self.row_steps = self.decodes = 0
        self.fast_path = FastPath(self.cache, self.rope) if o.fast else None

    def window(self, starts: list[int], width: int) -> Window:
        """Positions starts[b] .. starts[b] + width - 1 of every row b."""
        at = self.cache.window(starts, width, self.rope)
        at.text = self.tokens
        return at

    def cells(self, rows: list[int], positions: list[int]) -> Cells:
        """Any cells: position positions[i] of row rows[i]."""
        at = Cells(self.cache, rows, positions, self.rope)
        at.text = self.tokens
        return at

    def depths(self, cells: list[list[int]]) -> int | Diagonal | Tensor:
        """What `recur` takes as the depths of a window: cells[b], left to right, as narrow as a row's own window is.

        The plainest that says it: one number, the runs of a single row, or int64 (B, W).
        """
        if len({depth for row in cells for depth in row}) == 1:
            return cells[0][0]
        if len(cells) == 1 and self.fast_path is None:
            return Diagonal.of(cells[0])
        width = max(map(len, cells))
        return upload([row + [0] * (width - len(row)) for row in cells], self.model.device)

    def embed(self, at: Window) -> Tensor:
        """Prelude of the window's tokens: e (B, W, d)."""
        return self._run(at, self._embed, at.read(self.tokens))

    def _embed(self, at: Window, tokens: Tensor) -> Tensor:
        return self.net.prelude(tokens, at)

    def recur(self, s: Tensor, e: Tensor, at: Window, depth: int | Diagonal | Tensor) -> Tensor:
        """One recurrence step of the window, (B, W, d) -> (B, W, d).

        depth: the steps that each cell has had, see `depths`; the cache files keys and values by it.
        """
        self.passes += 1
        self.row_steps += s.shape[1]
        return self._run(at, self._recur, s, e, self.cache.slot(depth))

    def _recur(self, at: Window, s: Tensor, e: Tensor, slot: int | Diagonal | Tensor) -> Tensor:
        return self.net.recur(s, e, at, slot)

    def decode(self, s: Tensor, at: Window, only: Tensor | None = None) -> Tensor:
        """Coda of the window: logits (B, W, V); with `only` (B,) int64, of that one cell of each row: (B, 1, V)."""
        self.decodes += 1
        return self._run(at, self._decode, s) if only is None else self._decode(at, s, only)

    def _decode(self, at: Window, s: Tensor, only: Tensor | None = None) -> Tensor:
        return self.net.coda(s, at, only)

    def _run(self, at: Window, work: Callable, *inputs) -> Tensor:
        """One of the three above on a window: as it is, or on the fast path."""
        return work(at, *inputs) if self.fast_path is None else self.fast_path(at, work, *inputs)

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        """The token that follows each of positions (B or 1, W): (B, W) int64; -1 where its logits are not finite."""
        positions = positions.expand(len(self.lengths), -1)
        return self.choice.choose(logits, self.tokens, positions, self.seed)

    def prefill(self) -> None:
        """Run all prompts r steps deep in parallel, fill the cache, and commit the first new token of each row.

        Shorter prompts are padded on the right.  What padding leaves in the cache is behind every real position,
        so nothing sees it before it is overwritten.
        """
        at = self.window([0] * len(self.lengths), max(self.lengths))
        s, e = at.read(self.state), self.embed(at)  # (B, T, d) each
        for depth in range(self.num_steps):
            s = self.recur(s, e, at, depth)
        self.begin(s, at, [self.num_steps] * len(self.lengths))

    def begin(self, s: Tensor, at: Window, depths: list[int]) -> None:
        """Commit the first new token of each row; s (B, T, d): states of the prompts, at: their window from 0 on.

        The state of each prompt's last position is kept, for samplers that start the next position from it.
        """
        last = torch.tensor(self.lengths, device=s.device)[:, None] - 1  # (B, 1)
        self.state[at.rows, last] = s[at.rows, last]
        tokens = self.choose(self.decode(s, at, only=last[:, 0]), last)  # (B, 1)
        self.tokens.scatter_(1, last + 1, tokens.clamp(min=0))
        self.row_steps = 0
        for row, (token, depth) in enumerate(zip(tokens[:, 0].tolist(), depths, strict=True)):
            self.commit(row, token, depth)

    def place(self, at: Window, tokens: Tensor) -> None:
        """Put the tokens (B, W) that follow the window's cells on the grid: what the next positions run on.

        A token of -1 becomes 0, so that it can be embedded; what is computed from it is never committed.
        """
        at.write(self.tokens[:, 1:], tokens.clamp(min=0))

    def commit(self, row: int, token: int, depth: int) -> None:
        """Make a row's next token final: record it, tell on_token, and end the row if it was the last one.

        Raises FloatingPointError for -1, which `choose` gives for logits that are not finite.
        """
        if token < 0:
            prompt = "" if self.single else f" of prompt {row}"
            raise FloatingPointError(
                f"the logits at position {self.next_position(row)}{prompt} are not finite after {depth} recurrence "
                f"steps; look for NaN, infinite or huge weights, or for overflow in {self.model.dtype}"
            )
        generation = self.generations[row]
        generation.tokens.append(token)
        generation.depth.append(depth)
        generation.passes, generation.decodes = self.passes, self.decodes
        generation.row_steps = self.row_steps
        self.finished[row] = token in self.stop_tokens or len(generation.tokens) == self.max_new_tokens
        if self.options.on_token is not None:
            go_on = self.options.on_token(token) if self.single else self.options.on_token(token, row)
            self.finished[row] |= go_on is False

    def record(self, row: int, start: int, depths: list[int], guesses: list[int]) -> None:
        """Note a finished outer step of a row for the plots, if a trace was asked for."""
        trace = self.generations[row].trace
        if trace is not None:
            trace.append(OuterStep(start, depths, guesses, frozen=self.next_position(row) + 1))

    def next_position(self, row: int) -> int:
        """The position of the last final token of a row: the one whose state predicts the next."""
        return self.lengths[row] + len(self.generations[row].tokens) - 1

    def results(self) -> Generation | list[Generation]:
        """One Generation for a single prompt, a list for a batch."""
        return self.generations[0] if self.single else self.generations


def twin(module: nn.Module) -> Any:
    """A module's twin with the same methods and weights, whose parts are plain functions instead of modules.

    At batch 1 on a CPU the time beside the matrix products goes into many small calls (benchmarks/overhead.py), and
    calling a module, or looking something up in one, is several of them.  A property is computed once, here.  The
    arithmetic is the module's own, but for norms where `quick_norm` is faster.
    """
    # not of nn.Module: in an object with __getattr__ every attribute takes longer to find
    own = [c for c in reversed(type(module).__mro__) if c is not nn.Module and issubclass(c, nn.Module)]
    members = {name: value for c in own for name, value in vars(c).items() if not name.startswith("__")}
    values = {name: getattr(module, name) for name, value in members.items() if isinstance(value, property)}
    copy = type(type(module).__name__, (), {name: members[name] for name in members.keys() - values.keys()})()
    values |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    values |= dict(module.named_parameters(recurse=False))
    values |= {name: _function(child) for name, child in module.named_children()}
    copy.__dict__.update(values)
    return copy


def _function(module: nn.Module) -> Any:
    """What stands for a module in its parent's twin: something to call, or to look further parts up in."""
    if isinstance(module, nn.Linear):
        weight, bias = module.weight, module.bias
        return lambda x: F.linear(x, weight, bias)
    if isinstance(module, nn.Embedding):
        return lambda tokens: F.embedding(tokens, module.weight)
    if isinstance(module, RMSNorm):
        small_kernels = module.weight.device.type == "cpu" and module.weight.dtype in (torch.float32, torch.float64)
        return quick_norm(module.weight, module.eps) if small_kernels else twin(module).forward
    if isinstance(module, nn.ModuleList):
        return [_function(child) for child in module]
    if isinstance(module, nn.ModuleDict):
        return SimpleNamespace(**{name: _function(child) for name, child in module.items()})
    return twin(module).forward


def quick_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """RMSNorm, (..., d) -> (..., d), in four small kernels that are faster than PyTorch's own in float32 on a CPU.

    With |x| the length of x, x / sqrt(|x|^2 / d + eps) = sqrt(d) x / hypot(|x|, sqrt(d eps)).  Not for training: it
    overwrites what the gradient would need.
    """
    d = weight.shape[-1]
    scaled = weight * math.sqrt(d)  # (d,)
    floor = torch.tensor(math.sqrt(d * eps), dtype=weight.dtype)

    def norm(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)  # (..., 1)
        return torch.div(x, length).mul_(scaled)

    return norm


def stop_tokens(model: RecurrentDepthLM) -> set[int]:
    """The ids that end a generation: the checkpoint's generation config's, else the config's eos_token_id."""
    ids = model.generation_config.get("eos_token_id", model.config.eos_token_id)
    return set() if ids is None else token_ids("eos_token_id", ids)
