"""The fast path for a GPU: every step with fixed shapes, captured once as a CUDA graph and replayed.

At batch 1 a pass through a large model takes as long as reading its weights, if nothing else gets in the way.  Two
things do: a pass is some hundred small calls that Python must make in time, and every call that asks the GPU for a
number waits for all that came before it.  A CUDA graph is such a sequence of calls, recorded once and started by one.
It replays the same kernels on the same addresses.  So whatever changes from step to step must be a *value* in a tensor
that stays, and no shape, address or Python number:

    a window's place   positions, rotations and mask lie in tensors of `StaticWindow`, overwritten by `move`
    its width          is rounded up to a power of two; cells beyond it compute something that nobody reads
    its end            attention looks at the first 64, 128, 256, ... positions; the mask hides those not yet written
    depths of a wave   an int64 tensor (B, W): which slot of the cache each cell writes and reads

One depth for the whole window stays a number: it says which views of the cache are read, without a copy, and every
depth has a graph of its own.  Per cell the slots are gathered, which copies what attention reads.

The work is not written twice: `FastPath` runs the very functions of `Grid`, on a window and inputs of its own.  On a
CPU nothing is captured and the rest is the same, so tests hold both paths together there; it gains nothing there.
A prompt runs as it is, since its pass is long enough, and so do the mixed passes of the batching engine.

Notebook: 10_full_scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirec.kv_cache import KVCache, Window

SHORTEST = 64  # positions that attention looks at, at least


def bucket(n: int, least: int = 1) -> int:
    """The first of least, 2 least, 4 least, ... that is n or more."""
    while least < n:
        least *= 2
    return least


def room(length: int) -> int:
    """The length of a cache for so many tokens: a multiple of SHORTEST, as attention kernels like it."""
    return -(-length // SHORTEST) * SHORTEST


class StaticWindow(Window):
    """A window of fixed width that ends at a fixed place, and whose positions are values in tensors that stay.

    positions (B, W) int64; rope (B, W, 1, 1, c/2); mask (B, 1, W, end) additive.
    """

    mask: Tensor

    def __init__(self, cache: KVCache, width: int, end: int, rope: Tensor):
        self.cache, self.width, self.end, self.start, self.causal = cache, width, end, None, False
        self.table = rope
        self.at: Window | None = None
        self.offsets = torch.arange(width, device=rope.device)
        self.positions = torch.zeros((cache.batch, width), dtype=torch.int64, device=rope.device)
        self.rope = rope[self.positions]
        self.mask = torch.zeros((cache.batch, 1, width, end), dtype=cache.shown.dtype, device=rope.device)

    def move(self, at: Window) -> None:
        """Stand where `at` does.

        Cells beyond its width that would be past the cache are put at the last position.  No cell that counts is ever
        there: the token at the last position is predicted, and nothing is predicted from it.
        """
        if at is self.at:
            return
        self.at, self.text = at, at.text
        self.positions.copy_((at.positions[:, :1] + self.offsets).clamp(max=self.cache.length - 1))
        self.rope.copy_(self.table[self.positions])
        seen = self.cache.index[: self.end] <= self.positions[..., None]  # (B, W, end)
        self.mask.copy_(torch.where(seen, self.cache.shown, self.cache.hidden)[:, None])


class Step:
    """One function on one static window, with inputs of its own: (B, W, ...) each, or plain numbers.

    Called for the first time it runs as it is, which also prepares what must not happen in a capture; the second
    call captures it, and from then on it is replayed.
    """

    def __init__(self, at: StaticWindow, inputs: tuple, pool: Any):
        self.at, self.pool = at, pool
        self.inputs = [x.new_zeros(len(x), at.width, *x.shape[2:]) if isinstance(x, Tensor) else x for x in inputs]
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor

    def __call__(self, work: Callable, inputs: tuple) -> Tensor:
        for mine, x in zip(self.inputs, inputs, strict=True):
            if isinstance(x, Tensor):
                mine[:, : x.shape[1]].copy_(x)
        if self.pool is None or not self.warm:
            self.warm = True
            return work(self.at, *self.inputs)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):  # records, and runs nothing
                self.output = work(self.at, *self.inputs)
        self.graph.replay()
        return self.output.clone()  # the next replay writes there again


class FastPath:
    """Runs the three parts of a `Grid` with fixed shapes; cache: the grid's, rope: its table of all positions."""

    def __init__(self, cache: KVCache, rope: Tensor):
        self.cache, self.rope = cache, rope
        self.windows: dict[tuple, StaticWindow] = {}
        self.steps: dict[tuple, Step] = {}
        # all graphs work in the same memory: they take turns, and no result is left there
        self.pool = torch.cuda.graph_pool_handle() if rope.is_cuda else None

    def __call__(self, at: Window, work: Callable, *inputs) -> Tensor:
        """work(at, *inputs), whose inputs and result are (B, W, ...); numbers among the inputs choose the graph."""
        if type(at) is not Window or at.causal:
            return work(at, *inputs)
        shape = bucket(at.width), min(bucket(at.end, SHORTEST), self.cache.length)
        if shape not in self.windows:
            self.windows[shape] = StaticWindow(self.cache, *shape, self.rope)
        window = self.windows[shape]
        window.move(at)
        key = (work.__name__, *shape, *(x for x in inputs if not isinstance(x, Tensor)))
        if key not in self.steps:
            self.steps[key] = Step(window, inputs, self.pool)
        return self.steps[key](work, inputs)[:, : at.width]
