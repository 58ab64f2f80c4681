"""The three passes of the batching engine, through prelude, recurrent block and coda.

A pass returns the changes of its slots and makes none of them.  What it does write, tokens, keys and values, a second
run writes again with the same result.  So an interrupt may cut a pass anywhere, and the pass is run again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minirec.adaptive_exit import latent_diff
from minirec.continuous_batching.requests import Stage, State
from minirec.continuous_batching.scheduler import Scheduler
from minirec.continuous_batching.slots import (
    Move,
    Part,
    Slot,
    advance_front,
    advance_wave,
    next_token,
    read_on,
    together,
)
from minirec.decoding import Grid
from minirec.kv_cache import Cells, upload
from minirec.token_choice import TokenChoice


class Passes:
    """Runs passes of cells of any slots on a grid; arguments as for the engine."""

    def __init__(self, grid: Grid, scheduler: Scheduler, chunk: int, row_budget: int, guess_after: int):
        self.grid, self.scheduler, self.chunk = grid, scheduler, chunk
        self.row_budget, self.guess_after, self.waves = row_budget, guess_after, scheduler.mode == "wavefront"
        self._at: Cells | None = None

    def __call__(self, stage: Stage, slots: list[Slot], busy: int) -> list[dict]:
        """One pass of these slots, of `busy` in all: the changes of each, for `Slot.become`."""
        if stage is Stage.PRELUDE:
            return self.prelude(slots)
        return self.recur(slots) if stage is Stage.RECUR else self.coda(slots, busy)

    def _cells(self, slots: list[Slot], newest: bool = False) -> Cells:
        """The cells of some slots, or the new ones among them."""
        first = {s.row: len(s.tokens) - s.new if newest else 0 for s in slots}
        cells = [(s.row, s.start + i) for s in slots for i in range(first[s.row], len(s.tokens))]
        if self._at is None or self._at.cells != cells:  # often they are those of the pass before
            self._at = self.grid.cells(*map(list, zip(*cells, strict=True)))
        return self._at

    @torch.inference_mode()
    def prelude(self, slots: list[Slot]) -> list[dict]:
        at = self._cells(slots, newest=True)
        at.write(self.grid.tokens, upload([[t] for s in slots for t in s.tokens[-s.new :]], at.positions.device))
        e, first, changes = self.grid.embed(at), 0, []  # (N, 1, d)
        for slot in slots:
            changes.append(slot.embedded(Part(e, first, slot.new)))
            first += slot.new
        return changes

    @torch.inference_mode()
    def recur(self, slots: list[Slot]) -> list[dict]:
        at = self._cells(slots)
        before, e = together([s.state for s in slots]), together([s.embedding for s in slots])  # (N, 1, d) each
        # diffusion forcing may count past num_steps; the slots of steps that a request never runs are not its own
        kept = self.grid.cache.slots
        depths = [
            min(d, slot.request.num_steps - 1) if kept > slot.request.num_steps else d
            for slot in slots
            for d in slot.depths
        ]
        s = self.grid.recur(before, e, at, at.depths(depths))  # (N, 1, d)
        exits = [
            not self.waves and slot.request.state is State.DECODE and slot.request.threshold is not None
            for slot in slots
        ]
        moved = latent_diff(before, s)[:, 0].tolist() if any(exits) else []
        changes, first = [], 0
        for slot, may in zip(slots, exits, strict=True):
            n, settled = len(slot.tokens), may and moved[first] < slot.request.threshold
            # the embeddings too, so that the next pass of the same slots finds them together
            changes.append(slot.looped(Part(s, first, n), Part(e, first, n), settled))
            first += n
        return changes

    @torch.inference_mode()
    def coda(self, slots: list[Slot], busy: int) -> list[dict]:
        at, s = self._cells(slots), together([slot.state for slot in slots])  # (N, 1, d)
        guesses, failed = self._choose(self.grid.decode(s, at), at, slots)  # (N, 1)
        moved: list[float] = []
        if any(slot.front for slot in slots):
            moved = latent_diff(together([slot.before for slot in slots]), s)[:, 0].tolist()
        guessed, first, changes = guesses[:, 0].tolist(), 0, []  # the one synchronisation of the pass
        for slot in slots:
            own = slice(first, first + len(slot.tokens))
            first = own.stop
            if failed and slot.request.choice in failed:
                changes.append({"error": failed[slot.request.choice]})
                continue
            limit = slot.request.threshold
            calm = [x < limit for x in moved[own]] if slot.front and limit is not None else []
            move = self._move(slot, guessed[own], calm, busy)
            if slot.request.state is State.DECODE:
                depths = [min(depth, slot.request.num_steps) for _, depth in move.final]
                self.grid.cache.copy_deeper(slot.row, slot.start, depths)
            changes.append(slot.opened(move, self.steps(slot, move)))
        return changes

    def _choose(self, logits: Tensor, at: Cells, slots: list[Slot]) -> tuple[Tensor, dict[TokenChoice, Exception]]:
        """What each cell (N, 1) predicts, and the choices that raised an exception, whose requests fail alone."""
        tokens, seeds = self.grid.tokens[at.rows[:, 0]], self.grid.seed[at.rows[:, 0]]  # (N, L), (N, 1)
        owner = [slot.request.choice for slot in slots for _ in slot.tokens]
        guesses, failed = None, {}
        for choice in dict.fromkeys(owner):
            try:
                if guesses is None:  # usually all cells have the same choice, and nothing has to be picked
                    guesses = choice.choose(logits, tokens, at.positions, seeds)
                else:
                    own = torch.tensor([o == choice for o in owner], device=logits.device)
                    guesses[own] = choice.choose(logits[own], tokens[own], at.positions[own], seeds[own])
            except Exception as error:
                failed[choice] = error
        return torch.zeros_like(at.positions) if guesses is None else guesses, failed

    def _move(self, slot: Slot, guessed: list[int], calm: list[bool], busy: int) -> Move:
        """Where a slot goes after a coda in which its cells predicted `guessed`."""
        if slot.request.state is State.PREFILL:
            return read_on(slot, guessed, self.chunk, self.waves, not self.grid.model.injects)
        if not self.waves:
            return next_token(slot, guessed)
        if slot.front is None:
            widest = self.scheduler.widest(busy, self.row_budget)
            return advance_wave(slot, guessed, self.guess_after, widest)
        widest = self.scheduler.widest(self.scheduler.slots, self.row_budget)
        return advance_front(slot, guessed, calm, self.guess_after, widest, self.grid.filler)

    def steps(self, slot: Slot, move: Move) -> int:
        """Steps of a slot's next window until its coda, at most."""
        r = slot.request.num_steps
        if not self.waves or move.start < len(slot.request.prompt):
            return r
        return min(self.guess_after, r if move.front else r - move.depths[0])
