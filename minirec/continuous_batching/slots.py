"""A slot of the batching engine: a request at work, its window of cells, and where it goes after each coda.

Everything here is a function of a slot that returns what would change.  `Slot.become` applies such changes at once.
"""

from __future__ import annotations

from collections import deque
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minirec.continuous_batching.requests import Request, Stage
from minirec.diffusion_forcing import Front
from minirec.lossless_wavefront import next_wave


class Move(NamedTuple):
    """What follows a coda: the tokens that are now final, and the next window.

    final: (token, depth) for each; start: position of the window's first cell; tokens, depths: of its cells, left to
    right; known: how many of its cells, from the left, still run on the token that they were embedded with.
    """

    final: list[tuple[int, int]]
    start: int
    tokens: list[int]
    depths: list[int]
    known: int = 0
    front: Front | None = None


@dataclass(eq=False)  # compared by identity: slots are looked up in every pass
class Slot:
    """A row of the cache and the request in it: the window of positions being worked on, and what it waits for."""

    row: int
    request: Request
    initial: Tensor  # (T, 1, d): the initial state of every position of the request
    start: int = 0  # first position of the window
    tokens: list[int] = field(default_factory=list)  # that its positions run on
    depths: list[int] = field(default_factory=list)  # steps they have run
    new: int = 0  # how many of them, on the right, have yet to pass the prelude
    front: Front | None = None  # of a request that is decoded by diffusion forcing
    left: int = 0  # steps until the coda
    stage: Stage = Stage.PRELUDE
    sat_out: int = 0  # consecutive passes without this slot
    state: Tensor | None = None  # (n, 1, d), of the cells that have begun
    embedding: Tensor | None = None  # (n, 1, d), of the cells that have passed the prelude
    before: Tensor | None = None  # (n, 1, d): their states at the start of this round of steps
    drawn: deque[tuple[int, int, int]] = field(default_factory=deque)  # (number, token, depth), final, not handed over
    unheard: deque[int] = field(default_factory=deque)  # those of them that on_token has yet to be called with
    stopped: bool = False  # on_token has returned False
    error: Exception | None = None  # that the request fails with
    passes: int = 0
    row_steps: int = 0
    decodes: int = 0

    def become(self, **changes) -> None:
        """Change several fields in one indivisible update: an interrupt finds all of them changed, or none."""
        vars(self).update(changes)

    def opened(self, move: Move, left: int) -> dict:
        """After a coda, or at the start: the tokens to hand over and the next window, `left` steps from its coda."""
        skipped, first = move.start - self.start, len(self.request.generation.tokens)
        begun = skipped + sum(depth > 0 for depth in move.depths)
        state = self.initial[:0] if self.state is None else self.state[skipped:begun]
        new = len(move.tokens) - move.known
        return dict(
            start=move.start, tokens=[max(token, 0) for token in move.tokens], depths=move.depths, new=new,
            front=move.front, left=left, stage=Stage.PRELUDE if new else Stage.RECUR, state=state, before=state,
            embedding=state if self.embedding is None else self.embedding[skipped : skipped + move.known],
            drawn=deque((first + i, token, depth) for i, (token, depth) in enumerate(move.final)),
            unheard=deque(token for token, _ in move.final if self.request.on_token is not None),
        )  # fmt: skip

    def embedded(self, e: Tensor) -> dict:
        """After the prelude, which gave its new cells the embeddings e (new, 1, d)."""
        begun = len(self.state)
        s = self.initial[self.start + begun : self.start + len(self.tokens)]
        s = torch.cat([self.state, s]) if begun else s
        e = torch.cat([self.embedding, e]) if len(self.embedding) else e
        return dict(embedding=e, state=s, before=s, new=0, stage=Stage.RECUR)

    def looped(self, state: Tensor, settled: bool) -> dict:
        """After a recurrence step to `state` (n, 1, d); settled: the exit criterion has been met."""
        return dict(
            state=state, depths=[depth + 1 for depth in self.depths], left=self.left - 1,
            stage=Stage.CODA if self.left == 1 or settled else Stage.RECUR,
            passes=self.passes + 1, row_steps=self.row_steps + len(self.tokens),
        )  # fmt: skip

    def report(self) -> None:
        """Bring the counts of the request's generation up to date."""
        made = self.request.generation
        made.passes, made.row_steps, made.decodes = self.passes, self.row_steps, self.decodes

    @property
    def last(self) -> int:
        """The last position that a token is predicted from."""
        return len(self.request.prompt) + self.request.max_new_tokens - 2


def read_on(slot: Slot, guessed: list[int], chunk: int, waves: bool) -> Move:
    """Prefill: the next chunk of the prompt, or the first new token."""
    request, end = slot.request, slot.start + len(slot.tokens)
    if end < len(request.prompt):
        tokens = request.prompt[end : end + chunk]
        return Move([], end, tokens, [0] * len(tokens))
    token = guessed[-1]
    front = Front([token]) if waves and request.threshold is not None else None
    return Move([(token, request.num_steps)], end, [token], [0], front=front)


def next_token(slot: Slot, guessed: list[int]) -> Move:
    """One position at a time: its prediction is final, and the next position runs on it."""
    return Move([(guessed[0], slot.depths[0])], slot.start + 1, guessed, [0])


def advance_wave(slot: Slot, guessed: list[int], guess_after: int, widest: int) -> Move:
    """An outer step of the lossless wave is over."""
    r = slot.request.num_steps
    done = slot.depths[0] == r
    room = min(widest, slot.last + 1 - slot.start - done)
    tokens, depths = next_wave(slot.tokens, slot.depths, guessed, r, guess_after, room)
    final = [(guessed[0], r)] if done else []
    return Move(final, slot.start + done, tokens, depths, known=sum(depth > 0 for depth in depths))


def advance_front(slot: Slot, guessed: list[int], calm: list[bool], guess_after: int, widest: int, filler: int) -> Move:
    """An outer step of diffusion forcing is over; calm: the cells that moved by less than the threshold."""
    front, r = copy(slot.front), slot.request.num_steps
    n = front.settle(guessed, calm, min(guess_after, r), r)
    final = list(zip(guessed[:n], front.depths, strict=False))
    front.move(n, min(widest, slot.last + 1 - slot.start - n), 1, filler)
    kept = [ran == token for ran, token in zip(slot.tokens[n:], front.tokens, strict=False)]
    return Move(final, slot.start + n, front.tokens, front.depths, [*kept, False].index(False), front)
