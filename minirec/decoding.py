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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirec.config import RecurrentConfig, whole
from minirec.fast_path import FastPath, room
from minirec.kv_cache import Cells, Diagonal, KVCache, Window, upload
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

    kv "full" or "shared" with kv_slots: see `minirec.kv_cache`.  init_scale: size of the random initial state,
    0 for zeros.  seed: an int, or one per prompt.  temperature 0 is greedy; with top_k, top_p, min_p and
    repetition_penalty see `minirec.token_choice`.  stop_tokens: ids that end a generation, None for the
    checkpoint's own, () for none.  on_token: called with every token id as it becomes final, and for a batch also
    with its row; returning False ends that generation there.  trace: record every outer step.  fast: static shapes,
    replayed as CUDA graphs on a GPU (`minirec.fast_path`); on a CPU it gains nothing.
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
    stop_tokens: Sequence[int] | None = None
    on_token: Callable | None = None
    trace: bool = False
    fast: bool = False

    def __post_init__(self):
        if self.stop_tokens is not None:
            ids = plain(self.stop_tokens)
            ids = ids if isinstance(ids, Iterable) else [ids]
            self.stop_tokens = {whole("stop_tokens", token, 0) for token in ids}


def plain(x):
    """Lists and numbers of Python's own for tensors, arrays, and single numbers of such; anything else as it is."""
    return x.tolist() if hasattr(x, "tolist") else x


def as_seed(seed) -> int:
    """What the noise of a row hangs on, an int64; anything else is a ValueError."""
    return whole("seed", seed, -(2**63), 2**63 - 1)


def as_rows(prompt) -> tuple[list[list[int]], bool]:
    """A prompt or a batch of prompts as lists of ids, and whether it was a single one."""
    rows = plain(prompt)
    if not isinstance(rows, Iterable) or isinstance(rows, (str, Mapping)):
        raise ValueError(f"prompt is {prompt!r}; it must be token ids, or a batch of such")
    rows = [plain(row) for row in rows]
    single = not any(isinstance(row, Iterable) for row in rows)
    if not single and not all(isinstance(row, Iterable) for row in rows):
        raise ValueError(f"prompt is {prompt!r}; it must be token ids, or a batch of such, and not both")
    return [rows] if single else [[plain(token) for token in row] for row in rows], single


def check_counts(**counts: int) -> list[int]:
    """The counts as ints; a ValueError that names the first that is not a whole number of at least 1."""
    return [whole(name, value, 1) for name, value in counts.items()]


def check_request(config: RecurrentConfig, ids: list[int], max_new_tokens: int, context: int) -> None:
    """A ValueError that says what is wrong with a prompt, or with what is asked to follow it."""
    if not ids:
        raise ValueError("prompt is empty; it must hold at least one token")
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < config.padded_vocab_size:
            raise ValueError(f"prompt holds {token!r}; token ids are from 0 to {config.padded_vocab_size - 1}")
    if len(ids) + max_new_tokens > context:
        raise ValueError(
            f"prompt of {len(ids)} tokens and max_new_tokens {max_new_tokens} make {len(ids) + max_new_tokens}; "
            f"the context is {context} tokens"
        )


class Grid:
    """B sequences x L positions: tokens, states, depths, cache; and the four operations that advance a window.

    prompt: ids as a list or 1-D tensor, or a batch of such.  num_steps: r, None for the config's
    mean_recurrence.  spare: positions allocated in a batch for rows that are narrower than the widest.  Every
    argument is checked before any work; what is wrong is a ValueError that names it.
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
        num_steps = config.mean_recurrence if num_steps is None else num_steps
        num_steps, max_new_tokens = check_counts(num_steps=num_steps, max_new_tokens=max_new_tokens)
        if torch.is_autocast_enabled(model.device.type):
            raise ValueError("autocast is on; decoding has one number format: load the model with dtype instead")
        if not 0 <= o.init_scale < math.inf:
            raise ValueError(f"init_scale is {o.init_scale}; it must be 0 or above, and finite")
        if not prompts:
            raise ValueError("prompt is empty; it must hold at least one token")
        for ids in prompts:
            check_request(config, ids, max_new_tokens, config.block_size)
        seeds = plain(o.seed)
        seeds = [as_seed(s) for s in (seeds if isinstance(seeds, Iterable) else [seeds] * len(prompts))]
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
        return self.cache.window(starts, width, self.rope)

    def cells(self, rows: list[int], positions: list[int]) -> Cells:
        """Any cells: position positions[i] of row rows[i]."""
        return Cells(self.cache, rows, positions, self.rope)

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
        """The token that follows each of positions (B or 1, W): (B, W) int64."""
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
        self.tokens.scatter_(1, last + 1, tokens)
        self.row_steps = 0
        for row, (token, depth) in enumerate(zip(tokens[:, 0].tolist(), depths, strict=True)):
            self.commit(row, token, depth)

    def commit(self, row: int, token: int, depth: int) -> None:
        """Make a row's next token final: record it, tell on_token, and end the row if it was the last one."""
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
        if self.options.trace:
            step = OuterStep(start, depths, guesses, frozen=self.next_position(row) + 1)
            self.generations[row].trace.append(step)

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
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
