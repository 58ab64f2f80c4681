"""Keys and values of everything decided so far, pre-allocated and written in place.

A looped block has one set of weights but meets every token r times, and each time its keys and values differ.
How many of them to keep is a choice (arXiv 2502.05171, section 6.2; arXiv 2510.14961, section 3.2):

    "full"     own keys and values for every recurrence step: step j of a token reads step j of its past
    "shared"   m slots, step j uses slot j mod m; a later step overwrites an earlier one.  m = 1, the paper's,
               needs r times less memory: past tokens then show the keys and values of their last step

    core[k or v]   (layers, slots, B, H, L, c)        slots: num_steps or m
                          |             |
                       by depth     by position       <- the position x depth grid, literally

With shared slots the numbers depend on how a text is cut into windows: positions that run together read each other's
steps before they are overwritten.

Prelude and coda are passed once and have one slot.  The last slot is stored first: in a wave every position is a little
shallower than the one left of it, so its cells lie on a diagonal of this memory, and a diagonal can be read and
written as a view, without a copy (`Diagonal`).  Notebook: 04_kv_cache.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minirec.config import RecurrentConfig


def bytes_per_token(
    config: RecurrentConfig,
    num_steps: int,
    kv: str = "full",
    kv_slots: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes that one token of one sequence takes: 2 (k and v) x layer calls kept x d x bytes of a number."""
    slots = num_steps if kv == "full" else kv_slots
    calls = config.n_layers_in_prelude + config.n_layers_in_recurrent_block * slots + config.n_layers_in_coda
    return 2 * calls * config.n_embd * dtype.itemsize


def upload(values: list, device: torch.device | str) -> Tensor:
    """A small tensor from Python numbers; the host does not wait until a GPU has come as far."""
    return torch.tensor(values).to(device, non_blocking=True)


@dataclass(frozen=True)
class Diagonal:
    """The depths of some cells, as runs: (first cell, cells, depth of the first, fall from each to the next).

    A run is of one row and of neighbouring positions.  Adding a number is taking so many steps.
    """

    cells: tuple[int, ...]  # one by one
    runs: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, cells: list[int], starts: Collection[int] = ()) -> Diagonal:
        """Cut depths, left to right, where they don't fall as evenly as before, and at `starts`, where a row begins."""
        runs: list[tuple[int, int, int, int]] = []
        for i, depth in enumerate(cells):
            first, n, start, fall = runs[-1] if runs else (0, 0, 0, 0)
            drop = cells[i - 1] - depth
            if n and i not in starts and (drop == fall if n > 1 else drop >= 0):
                runs[-1] = (first, n + 1, start, drop)
            else:
                runs.append((i, 1, depth, 0))
        return cls(tuple(cells), tuple(runs))

    def __add__(self, steps: int) -> Diagonal:
        return Diagonal(tuple(d + steps for d in self.cells), tuple((i, n, d + steps, f) for i, n, d, f in self.runs))


def _attend_run(
    keys: Tensor, values: Tensor, depth: int, fall: int, start: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> Tensor:
    """Store and attend for one run: keys, values (slots, H, L, c) of its row; q, k, v (H, n, c) -> (n, H, c).

    start: position of its first cell; mask (n, end or more) additive.
    """
    n, end, stored = q.shape[1], start + q.shape[1], len(keys) - 1 - depth
    mask = None if n == 1 else mask[:, :end]
    if fall == 0:  # all in one slot: a little window
        ks, vs = keys[stored], values[stored]  # (H, L, c)
        ks[:, start:end], vs[:, start:end] = k, v
        y = F.scaled_dot_product_attention(q[None], ks[None, :, :end], vs[None, :, :end], attn_mask=mask)
        return y[0].transpose(0, 1)
    steps = slice(stored, stored + (n - 1) * fall + 1, fall)
    ks, vs = keys[steps], values[steps]  # (n, H, L, c): all positions, as each cell's step sees them
    # (H, c, n): step i at position start + i
    ks.diagonal(start, 0, 2).copy_(k.transpose(1, 2))
    vs.diagonal(start, 0, 2).copy_(v.transpose(1, 2))
    mask, one = mask[:, None, None], q.transpose(0, 1)[:, :, None]  # (n, 1, 1, end), (n, H, 1, c)
    return F.scaled_dot_product_attention(one, ks[:, :, :end], vs[:, :, :end], attn_mask=mask)[:, :, 0]


class KVCache:
    """Keys and values of B rows at L positions, for every layer; allocated once, never grown.

    batch B, length L in tokens; num_steps: recurrence steps that "full" keeps apart (deeper steps share the
    last slot).  Raises ValueError for an unknown kind, for no slots, or for more slots than steps.
    """

    def __init__(
        self,
        config: RecurrentConfig,
        batch: int,
        length: int,
        num_steps: int,
        kv: str = "full",
        kv_slots: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if kv not in ("full", "shared"):
            raise ValueError(f"kv is {kv!r}; it must be 'full' or 'shared'")
        if not 1 <= kv_slots <= num_steps:
            raise ValueError(f"kv_slots is {kv_slots}; it must be from 1 to num_steps, here {num_steps}")
        self.kv, self.slots = kv, num_steps if kv == "full" else kv_slots
        self.batch, self.length = batch, length

        def keys_and_values(layers: int, slots: int) -> Tensor:
            # zeros, not empty: a masked key has weight 0, and 0 times the NaN of unset memory would be NaN
            shape = (2, layers, slots, batch, config.n_heads, length, config.head_dim)
            return torch.zeros(shape, device=device, dtype=dtype)

        self.parts = {
            "prelude": keys_and_values(config.n_layers_in_prelude, 1),
            "core": keys_and_values(config.n_layers_in_recurrent_block, self.slots),
            "coda": keys_and_values(config.n_layers_in_coda, 1),
        }
        self.index = torch.arange(length, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]  # (B, 1)
        self.shown, self.hidden = torch.tensor([0.0, float("-inf")], device=device, dtype=dtype)
        # the same memory as (keys, values), (B, H, L, c) each, of every layer and slot: a step looks them up
        self.views = {
            name: [[tuple(kv[:, layer, slot]) for slot in reversed(range(kv.shape[2]))] for layer in range(kv.shape[1])]
            for name, kv in self.parts.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for t in self.parts.values())

    def slot(self, depth: int | Diagonal | Tensor) -> int | Diagonal | Tensor:
        """The slot of a recurrence step: `depth` counts the steps before it, for all cells or for each of (B, W)."""
        if self.slots == 1:
            return 0
        if isinstance(depth, Diagonal):
            if self.kv == "full" and max(depth.cells) < self.slots:
                return depth
            depth = upload([depth.cells], self.index.device)
        if self.kv == "shared":
            return depth % self.slots
        return min(depth, self.slots - 1) if isinstance(depth, int) else depth.clamp(max=self.slots - 1)

    def window(self, starts: list[int], width: int, rope: Tensor) -> Window:
        """The window of `width` positions from starts[b] on in each row b; rope: the table of all L positions.

        Raises ValueError if it would reach past the end of the cache.
        """
        if max(starts) + width > self.length:
            raise ValueError(
                f"position {max(starts) + width - 1} is outside the cache, which was allocated for {self.length} tokens"
            )
        return Window(self, starts, width, rope)

    def copy_deeper(self, row: int, start: int, depths: list[int]) -> None:
        """Let positions of a row that stopped early stand in for the steps they never ran.

        A later token that loops deeper would find nothing there; it reads the last step that was run ("latest":
        2502.05171, remark 6.1).  depths: steps run by each position from `start` on.  Shared slots are all written
        by as many steps as there are slots, and then need no copy.
        """
        core = self.parts["core"][:, :, :, row]  # (2, layers, slots, H, L, c)
        for position, depth in enumerate(depths, start):
            if depth < self.slots:  # the last step that was run; the deeper ones are stored before it
                ran = self.slots - depth
                core[:, :, :ran, :, position] = core[:, :, ran : ran + 1, :, position]


class Window:
    """A few positions of every row: what one pass computes, against all that the cache holds before them.

    positions (B or 1, W) int64; rope (B or 1, W, 1, 1, c/2); `start` if all rows share it, else None; `end`: one past
    the last position; mask (B or 1, 1, W, end) additive, or None where nothing has to be hidden or `causal` does.
    """

    def __init__(self, cache: KVCache, starts: list[int], width: int, rope: Tensor):
        self.cache, self.width, self.end = cache, width, max(starts) + width
        self.mask, self.causal = None, False
        if len(set(starts)) == 1:  # every row at the same positions: slices, no gathers
            self.start = starts[0]
            self.positions = cache.index[None, self.start : self.end]  # (1, W)
            self.rope = rope[None, self.start : self.end]
            self.causal = self.start == 0 and width > 1
        else:
            self.start = None
            self.positions = upload(starts, rope.device)[:, None] + cache.index[:width]  # (B, W)
            self.rope = rope[self.positions]
        if self.start is None or (self.start > 0 and width > 1):  # something stored has to be hidden from some cell
            seen = cache.index[: self.end] <= self.positions[..., None]  # (B or 1, W, end)
            self.mask = torch.where(seen, cache.shown, cache.hidden)[:, None]  # (B or 1, 1, W, end)

    @property
    def rows(self) -> Tensor:
        """Row numbers (B, 1), to index together with positions."""
        return self.cache.rows

    def read(self, grid: Tensor) -> Tensor:
        """The window's part of a tensor over all positions: (B, L, ...) -> (B, W, ...)."""
        return grid[:, self.start : self.end] if self.start is not None else grid[self.rows, self.positions]

    def write(self, grid: Tensor, values: Tensor) -> None:
        """Put values (B, W, ...) at the window's positions of grid (B, L, ...), in place."""
        if self.start is not None:
            grid[:, self.start : self.end] = values
        else:
            grid[self.rows, self.positions] = values

    def attend(self, part: str, layer: int, slot: int | Diagonal | Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the window's k and v in one layer, then attend to all it holds: (B, H, W, c) each -> (B, W, H, c).

        slot: one for all cells, or one for each: a Diagonal, if there is one row, or int64 (B, W).
        """
        if isinstance(slot, int):
            keys, values = self.cache.views[part][layer][slot]  # (B, H, L, c) each
            if self.start is not None:
                keys.narrow(2, self.start, self.width).copy_(k)
                values.narrow(2, self.start, self.width).copy_(v)
            else:
                keys[self.rows, :, self.positions] = k.transpose(1, 2)
                values[self.rows, :, self.positions] = v.transpose(1, 2)
            keys, values = keys.narrow(2, 0, self.end), values.narrow(2, 0, self.end)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, is_causal=self.causal)
            return y.transpose(1, 2)
        # every cell at its own depth: let the cells be the batch of the attention
        keys, values = self.cache.parts[part][:, layer]  # (slots, B, H, L, c) each
        if isinstance(slot, Diagonal):
            parts = [
                _attend_run(
                    keys[:, 0], values[:, 0], depth, fall, self.start + first,
                    *(x[0, :, first : first + n] for x in (q, k, v)), self.mask[0, 0, first : first + n],
                )
                for first, n, depth, fall in slot.runs
            ]  # fmt: skip
            return torch.cat(parts)[None]  # (1, W, H, c)
        slot = self.cache.slots - 1 - slot  # as stored
        positions = self.positions.expand(slot.shape)  # (B, W)
        keys[slot, self.rows, :, positions] = k.transpose(1, 2)
        values[slot, self.rows, :, positions] = v.transpose(1, 2)
        keys = keys[slot, self.rows, :, : self.end].flatten(0, 1)  # (B W, H, end, c)
        values = values[slot, self.rows, :, : self.end].flatten(0, 1)
        seen = self.cache.index[: self.end] <= positions.reshape(-1, 1)  # (B W, end)
        q = q.transpose(1, 2).flatten(0, 1)[:, :, None]  # (B W, H, 1, c)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])
        return y.squeeze(2).unflatten(0, slot.shape)


class Cells(Window):
    """Any cells of any rows in one pass: a window of one position for each, which need not be of different rows.

    rows, positions: lists of N row numbers and positions, those of a row side by side and from left to right.  Where a
    method of Window speaks of B rows and W positions, read N and 1.
    """

    def __init__(self, cache: KVCache, rows: list[int], positions: list[int], rope: Tensor):
        self.cache, self.width, self.start, self.end = cache, 1, None, max(positions) + 1
        self.cells = list(zip(rows, positions, strict=True))
        self.starts = {i for i, (row, p) in enumerate(self.cells) if i == 0 or self.cells[i - 1] != (row, p - 1)}
        self._rows, self.positions = torch.tensor([rows, positions], device=rope.device)[..., None]  # (N, 1) each
        self.rope = rope[self.positions]  # (N, 1, 1, 1, c/2)
        self.mask = torch.where(cache.index[: self.end] <= self.positions, cache.shown, cache.hidden)  # (N, end)

    @property
    def rows(self) -> Tensor:
        """Row numbers (N, 1)."""
        return self._rows

    def depths(self, depths: list[int]) -> Diagonal:
        """What `recur` takes as the depths of these cells."""
        return Diagonal.of(depths, self.starts)

    def attend(self, part: str, layer: int, slot: int | Diagonal | Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store each cell's k and v, then let it attend to its own row: (N, H, 1, c) each -> (N, 1, H, c).

        Run by run, on views.  With int64 slots it gathers: one copy of all that is read, but no loop over runs.
        """
        keys, values = self.cache.parts[part][:, layer]  # (slots, B, H, L, c) each
        if isinstance(slot, Tensor):
            stored, rows, positions = len(keys) - 1 - slot.flatten(), self._rows[:, 0], self.positions[:, 0]  # (N,)
            keys[stored, rows, :, positions], values[stored, rows, :, positions] = k[:, :, 0], v[:, :, 0]
            keys, values = keys[stored, rows, :, : self.end], values[stored, rows, :, : self.end]  # (N, H, end, c)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask[:, None, None]).transpose(1, 2)
        parts = []
        for first, n, depth, fall in (self.depths([slot] * len(q)) if isinstance(slot, int) else slot).runs:
            row, start = self.cells[first]
            own = (x[first : first + n, :, 0].transpose(0, 1) for x in (q, k, v))  # (H, n, c) each
            mask = self.mask[first : first + n]
            parts.append(_attend_run(keys[:, row], values[:, row], depth, fall, start, *own, mask))
        return torch.cat(parts)[:, None]  # (N, 1, H, c)
