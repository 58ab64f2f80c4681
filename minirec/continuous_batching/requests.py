"""What goes into the batching engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from minirec.decoding import Generation
from minirec.token_choice import TokenChoice

State = Enum("State", ["WAITING", "PREFILL", "DECODE", "FINISHED", "CANCELLED", "FAILED"])
Stage = Enum("Stage", ["PRELUDE", "RECUR", "CODA"])


@dataclass
class Request:
    """One prompt and what has become of it; times are in seconds of the engine's clock."""

    id: int
    prompt: list[int]
    max_new_tokens: int
    num_steps: int
    threshold: float | None
    seed: int
    choice: TokenChoice
    stop_tokens: set[int]
    on_token: Callable | None
    kv_bytes: int
    submitted: float
    state: State = State.WAITING
    admitted: float | None = None
    token_times: list[float] = field(default_factory=list)
    ended: float | None = None
    error: Exception | None = None
    generation: Generation = field(default_factory=Generation)

    def record(self, number: int, token: int, depth: int, now: float) -> None:
        """Make `token` the new token with this number, counted from 0; recording it again changes nothing."""
        self.generation.tokens[number:] = [token]
        self.generation.depth[number:] = [depth]
        self.token_times[number:] = [now]
        self.state = State.DECODE


@dataclass
class Event:
    """A token has become final.  A request's last event has `finished`, and no token if the request did not finish."""

    request: int
    token: int | None
    depth: int
    finished: bool


@dataclass
class Pass:
    """One pass: its queue, its number of cells, and (row, request, depth after it) for each slot in it."""

    stage: Stage
    cells: int
    slots: list[tuple[int, int, int]]
