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

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from minirec.config import MOST_STEPS, RecurrentConfig, one_of, shown, whole

COPIED = 24_576  # numbers of a cell's keys up to which a Xeon core copied them faster than it made one more call
FEW = 8  # cells of a row up to which it shares a call with others that have fewer


def slots_kept(num_steps: int, kv: str, kv_slots: int) -> int:
    """Slots of the recurrent block's keys and values: num_steps with kv "full", kv_slots with "shared".

    Raises ValueError for an unknown kv, for kv_slots outside 1..num_steps, and for kv_slots above 1 with kv "full".
    """
    num_steps, kv_slots = whole("num_steps", num_steps, 1, MOST_STEPS), whole("kv_slots", kv_slots)
    one_of("kv", kv, ("full", "shared"))
    if not 1 <= kv_slots <= num_steps:
        raise ValueError(f"kv_slots is {shown(kv_slots)}; it must be from 1 to num_steps, here {num_steps}")
    if kv == "full" and kv_slots > 1:
        raise ValueError(f"kv_slots is {kv_slots}, which has no effect with kv 'full'; it needs kv 'shared'")
    return num_steps if kv == "full" else kv_slots


def bytes_per_token(
    config: RecurrentConfig,
    num_steps: int,
    kv: str = "full",
    kv_slots: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes that one token of one sequence takes: 2 (k and v) x layer calls kept x d x bytes of a number.

    Raises ValueError as `KVCache` does.
    """
    slots, number = slots_kept(num_steps, kv, kv_slots), _format(dtype)
    calls = config.n_layers_in_prelude + config.n_layers_in_recurrent_block * slots + config.n_layers_in_coda
    return 2 * calls * config.n_kv_heads * config.head_dim * number.itemsize


def _format(dtype: torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {shown(dtype)}; it must be a floating-point dtype of torch")
    return dtype


def upload(values: Sequence, device: torch.device | str) -> Tensor:
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

    def each(self, function: Callable[[int], int]) -> Diagonal:
        """The function of every depth, cut into runs anew; no run joins cells that two runs held before."""
        return Diagonal.of([function(depth) for depth in self.cells], {first for first, _, _, _ in self.runs})


def of_each_cell(slot: Tensor, rows: int, width: int) -> Tensor:
    """The slots, if there is one for each cell: other shapes would broadcast to wrong slots, and are a ValueError."""
    if slot.shape != (rows, width):
        raise ValueError(f"slots have shape {tuple(slot.shape)}; the cells have ({rows}, {width})")
    return slot


def attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention of q (B, H, W, c) to keys and values (B, K, L, c) -> (B, H, W, c); mask (B or 1, 1, W or 1, L).

    H is a multiple of K: query head h reads head h // (H / K) of the keys.  The queries that share a head become more
    rows of one window, so that keys and values are read where they are, not repeated.
    """
    H, K, W = q.shape[1], keys.shape[1], q.shape[2]
    if H == K:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal)
    if causal:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    if mask is not None and W > 1:
        mask = mask.repeat(1, 1, H // K, 1)
    q = q.reshape(len(q), K, H // K * W, -1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).reshape(len(q), H, W, -1)


def _attend_run(keys: Tensor, values: Tensor, depth: int, fall: int, end: int, q: Tensor, mask: Tensor) -> Tensor:
    """Attend for one run of cells, stored already: keys, values (slots, H, L, c) of its row, q (n, H, c) -> (n, H, c).

    end: one past the position of its last cell; mask (n, end or more) additive.
    """
    n, stored = len(q), len(keys) - 1 - depth
    if fall == 0:  # all in one slot: a little window
        keys, values = keys[stored, None, :, :end], values[stored, None, :, :end]  # (1, H, end, c)
        shown = None if n == 1 else mask[:, :end]
        return attention(q.transpose(0, 1)[None], keys, values, shown)[0].transpose(0, 1)
    steps = slice(stored, stored + (n - 1) * fall + 1, fall)
    keys, values = keys[steps, :, :end], values[steps, :, :end]  # (n, H, end, c): as each cell's step sees them
    mask = mask[:, None, None, :end]  # (n, 1, 1, end)
    return attention(q[:, :, None], keys, values, mask)[:, :, 0]


def _store_run(kept: Tensor, depth: int, fall: int, start: int, new: Tensor) -> None:
    """Put keys or values (H, n, c) of a run that begins at position `start` into its row's (slots, H, L, c)."""
    n, stored = new.shape[1], len(kept) - 1 - depth
    if fall == 0:
        kept[stored, :, start : start + n] = new
    else:  # (H, c, n): step i at position start + i
        kept[stored : stored + (n - 1) * fall + 1 : fall].diagonal(start, 0, 2).copy_(new.transpose(1, 2))


class KVCache:
    """Keys and values of B rows at L positions, for every layer; allocated once, never grown.

    batch B, length L in tokens; num_steps: recurrence steps that "full" keeps apart (deeper steps share the
    last slot).  Raises ValueError for a bad argument (see `slots_kept`) and, on a CPU, for lack of memory.
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
        self.kv, self.slots = kv, slots_kept(num_steps, kv, kv_slots)
        batch, length = whole("batch", batch, 1, 2**31 - 1), whole("length", length, 1, 2**31 - 1)
        needed = bytes_per_token(config, num_steps, kv, kv_slots, dtype) * batch * length
        self.batch, self.length = batch, length

        def keys_and_values(layers: int, slots: int) -> Tensor:
            # zeros, not empty: a masked key has weight 0, and 0 times the NaN of unset memory would be NaN
            shape = (2, layers, slots, batch, config.n_kv_heads, length, config.head_dim)
            try:
                return torch.zeros(shape, device=device, dtype=dtype)
            except RuntimeError as error:
                if torch.device(device).type != "cpu":
                    raise  # a GPU's own error has the numbers
                raise ValueError(
                    f"batch {batch}, length {length} and {self.slots} slots need {needed:,} bytes of keys and values; "
                    "there is not enough memory"
                ) from error

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
        # and (slots, H, L, c) each, of every layer and row
        self.of_row = {
            name: [[tuple(kv[:, layer, :, row]) for row in range(batch)] for layer in range(kv.shape[1])]
            for name, kv in self.parts.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for t in self.parts.values())

    def slot(self, depth: int | Diagonal | Tensor) -> int | Diagonal | Tensor:
        """The slot of a recurrence step: `depth` counts the steps before it.

        One for all cells, or one for each as a Diagonal or a tensor: the slots come in the same form, a tensor in the
        same shape.
        """
        if self.slots == 1:
            return 0
        if isinstance(depth, Diagonal):
            return depth if max(depth.cells) < self.slots else depth.each(self._slot)
        if isinstance(depth, int):
            return self._slot(depth)
        return depth % self.slots if self.kv == "shared" else depth.clamp(max=self.slots - 1)

    def _slot(self, depth: int) -> int:
        return depth % self.slots if self.kv == "shared" else min(depth, self.slots - 1)

    def window(self, starts: list[int], width: int, rope: Tensor) -> Window:
        """The window of `width` positions from starts[b] on in each row b; rope: the table of all L positions.

        Raises ValueError if it would reach past the end of the cache.
        """
        if max(starts) + width > self.length:
            raise ValueError(
                f"position {max(starts) + width - 1} is outside the cache, which was allocated for {self.length} tokens"
            )
        return Window(self, starts, width, rope)

    def clear(self, row: int) -> None:
        """Set a row's keys and values to zero, which leaves nothing there that is not finite."""
        for kept in self.parts.values():
            kept[:, :, :, row].zero_()

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
    the last position; mask (B or 1, 1, W, end) additive, or None where nothing has to be hidden or `causal` does; text
    (B, L) int64: the tokens of all positions, if the model reads those of the window.
    """

    text: Tensor | None = None
    start: int | None
    mask: Tensor | None

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

    @property
    def tokens(self) -> Tensor:
        """The window's tokens, (B, W) int64."""
        return self.read(self.text)

    def read(self, grid: Tensor) -> Tensor:
        """The window's part of a tensor over all positions: (B, L, ...) -> (B, W, ...)."""
        return grid[:, self.start : self.end] if self.start is not None else grid[self.rows, self.positions]

    def write(self, grid: Tensor, values: Tensor | float) -> None:
        """Put values, (B, W, ...) or one number, at the window's positions of grid (B, L, ...), in place."""
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
            y = attention(q, keys, values, self.mask, self.causal)
            return y.transpose(1, 2)
        # every cell at its own depth: let the cells be the batch of the attention
        if isinstance(slot, Diagonal):
            keys, values = self.cache.of_row[part][layer][0]  # (slots, H, L, c) each
            parts = []
            assert self.start is not None and self.mask is not None, "one row, after its prompt"
            for first, n, depth, fall in slot.runs:
                run, start = slice(first, first + n), self.start + first
                _store_run(keys, depth, fall, start, k[0, :, run])
                _store_run(values, depth, fall, start, v[0, :, run])
                mask = self.mask[0, 0, run]
                parts.append(_attend_run(keys, values, depth, fall, start + n, q[0, :, run].transpose(0, 1), mask))
            return torch.cat(parts)[None]  # (1, W, H, c)
        keys, values = self.cache.parts[part][:, layer]  # (slots, B, H, L, c) each
        slot = self.cache.slots - 1 - of_each_cell(slot, len(q), self.width)  # as stored
        positions = self.positions.expand(slot.shape)  # (B, W)
        keys[slot, self.rows, :, positions] = k.transpose(1, 2)
        values[slot, self.rows, :, positions] = v.transpose(1, 2)
        keys = keys[slot, self.rows, :, : self.end].flatten(0, 1)  # (B W, H, end, c)
        values = values[slot, self.rows, :, : self.end].flatten(0, 1)
        seen = self.cache.index[: self.end] <= positions.reshape(-1, 1)  # (B W, end)
        q = q.transpose(1, 2).flatten(0, 1)[:, :, None]  # (B W, H, 1, c)
        y = attention(q, keys, values, seen[:, None, None])
        return y.squeeze(2).unflatten(0, slot.shape)


class Cells(Window):
    """Any cells of any rows in one pass: a window of one position for each, which need not be of different rows.

    rows, positions: lists of N row numbers and positions, those of a row side by side and from left to right.  Where a
    method of Window speaks of B rows and W positions, read N and 1.
    """

    mask: Tensor

    def __init__(self, cache: KVCache, rows: list[int], positions: list[int], rope: Tensor):
        self.cache, self.width, self.start, self.end = cache, 1, None, max(positions) + 1
        self.cells = list(zip(rows, positions, strict=True))
        self._rows, self.positions = torch.tensor([rows, positions], device=rope.device)[..., None]  # (N, 1) each
        self.rope = rope[self.positions]  # (N, 1, 1, 1, c/2)
        self.mask = torch.where(cache.index[: self.end] <= self.positions, cache.shown, cache.hidden)  # (N, end)

    @property
    def rows(self) -> Tensor:
        """Row numbers (N, 1)."""
        return self._rows

    def depths(self, depths: list[int]) -> int | Diagonal:
        """What `recur` takes as the depths of these cells."""
        return depths[0] if len(set(depths)) == 1 else Diagonal.of(depths, self._starts)

    @cached_property
    def _starts(self) -> set[int]:
        """The cells that are not the right neighbour of the one before."""
        return {i for i, (row, p) in enumerate(self.cells) if i == 0 or self.cells[i - 1] != (row, p - 1)}

    @cached_property
    def _level(self) -> tuple[tuple[int, int], ...]:
        """The runs of cells that are all at one depth: (first cell, cells)."""
        return tuple((first, n) for first, n, _, _ in Diagonal.of([0] * len(self.cells), self._starts).runs)

    @cached_property
    def _few(self) -> Group:
        return Group(self, FEW)

    @cached_property
    def _alone(self) -> Group:
        return Group(self, 1)

    def attend(self, part: str, layer: int, slot: int | Diagonal | Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store each cell's k and v, then let it attend to its own row: (N, H, 1, c) each -> (N, 1, H, c).

        In as few calls as can be.  All in one slot: one for the rows with few cells.  In several: one for the rows with
        a single one, which copies what it reads.  And one for every run that is left.  int64 slots: a copy of all.
        """
        keys, values = self.cache.parts[part][:, layer]  # (slots, B, H, L, c) each
        rows, positions, q = self._rows[:, 0], self.positions[:, 0], q[:, :, 0]  # (N,), (N,), (N, H, c)
        stored: int | Tensor
        together: Collection[int]
        if isinstance(slot, int):
            group, stored = self._few, len(keys) - 1 - slot
            together, where = group.cells, group.where
        elif isinstance(slot, Diagonal):
            group, stored = self._alone, len(keys) - 1 - upload(slot.cells, q.device)  # (N,)
            copies = q.device.type != "cpu" or k[0].numel() * self.end <= COPIED
            together, where = (group.cells, group.where) if copies else ([], group.where)
        else:
            stored = len(keys) - 1 - of_each_cell(slot, len(q), 1)[:, 0]
            together, where = range(len(q)), slice(None)
        keys[stored, rows, :, positions], values[stored, rows, :, positions] = k[:, :, 0], v[:, :, 0]
        keys, values, y = keys[..., : self.end, :], values[..., : self.end, :], torch.empty_like(q)
        if together and isinstance(stored, int):
            y[where] = group.attend(keys[stored], values[stored], q[where])
        elif together and isinstance(stored, Tensor):
            here = stored[where] * keys.shape[1] + rows[where]
            ks, vs = (x.flatten(0, 1).index_select(0, here) for x in (keys, values))  # (n, H, end, c) each
            shown = self.mask[where, None, None]  # (n, 1, 1, end)
            y[where] = attention(q[where, :, None], ks, vs, shown)[:, :, 0]
        if len(together) < len(q) and not isinstance(slot, Tensor):
            runs = [(first, n, slot, 0) for first, n in self._level] if isinstance(slot, int) else slot.runs
            for first, n, depth, fall in runs:
                if first not in together:
                    (row, start), run = self.cells[first], slice(first, first + n)
                    ks, vs = self.cache.of_row[part][layer][row]  # (slots, H, L, c) each
                    y[run] = _attend_run(ks, vs, depth, fall, start + n, q[run], self.mask[run])
        return y[:, None]


class Group:
    """The cells of those rows that have at most `limit`, to share one call; none, if it is a single row."""

    def __init__(self, at: Cells, limit: int):
        cells_of: dict[int, list[int]] = {}
        for i, (row, _) in enumerate(at.cells):
            cells_of.setdefault(row, []).append(i)
        few = [cells for cells in cells_of.values() if len(cells) <= limit]
        self.at, self.cells = at, list(chain.from_iterable(few)) if len(few) > 1 else []
        self.column = [column for cells in few for column in range(len(cells))]  # of a cell, from the left in its row
        everyone = len(self.cells) in (0, len(at.cells))
        self.where = slice(None) if everyone else upload(self.cells, at.rope.device)  # to pick them

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """In a window of all rows: row (n,) and column (n,) of each cell, and what each place sees (B, 1, W, end)."""
        rows, columns = self.at.rows[self.where, 0], upload(self.column, self.at.rope.device)
        # rows that are not here see everything, and nobody asks what
        mask = self.at.mask.new_zeros(self.at.cache.batch, 1, max(self.column) + 1, self.at.end)
        mask[rows, 0, columns] = self.at.mask[self.where]
        return rows, columns, mask

    def attend(self, keys: Tensor, values: Tensor, q: Tensor) -> Tensor:
        """Keys and values (B, H, end, c) of one slot, read where they are; q (n, H, c) -> (n, H, c)."""
        rows, columns, mask = self.places
        window = q.new_zeros(len(keys), q.shape[1], mask.shape[2], q.shape[2])  # (B, H, W, c)
        window[rows, :, columns] = q
        return attention(window, keys, values, mask)[rows, :, columns]
