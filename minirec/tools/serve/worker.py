"""The thread with the engine, and what goes in and out of it.

An inbox takes what the event loop wants: submit, cancel, stop.  Between two steps the thread does what is there, so
only this thread ever touches the engine.  After each step, what has become final goes to the event loop in one call,
which puts it into the mailbox of its job.  Neither side waits for the other.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minirec.continuous_batching import Engine, Request, State
from minirec.token_choice import TokenChoice

log = logging.getLogger("minirec.serve")


class Note(NamedTuple):
    """Log-probability of the token at a position, and the likeliest tokens there: (id, log-probability) each."""

    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True, eq=False)
class NotedChoice(TokenChoice):
    """A choice of tokens that notes log-probabilities, by position: of the prompt's tokens, and of those it chooses.

    They are the model's, before temperature, penalty and filters.  A position that a wave decodes again is noted again:
    when its token is final, so is its note.
    """

    prompt: tuple[int, ...] = ()
    likeliest: int = 0
    notes: dict[int, Note] = field(default_factory=dict)

    def choose(self, logits: Tensor, tokens: Tensor, positions: Tensor, seed: Tensor) -> Tensor:
        """As of any choice."""
        chosen = super().choose(logits, tokens, positions, seed)  # (N, 1)
        log_p = logits[:, 0].log_softmax(-1)  # (N, V)
        places = (positions[:, 0] + 1).tolist()
        following = [
            self.prompt[place] if place < len(self.prompt) else max(token, 0)
            for place, token in zip(places, chosen[:, 0].tolist(), strict=True)
        ]
        own = log_p.gather(1, torch.tensor(following, device=log_p.device)[:, None])[:, 0].tolist()
        values, ids = log_p.topk(min(self.likeliest, log_p.shape[-1]))  # (N, likeliest) each
        for place, p, *best in zip(places, own, ids.tolist(), values.tolist(), strict=True):
            self.notes[place] = Note(p, list(zip(*best, strict=True)))
        return chosen


@dataclass
class Part:
    """One request to the engine, of a job that may have several: what `Engine.submit` takes."""

    prompt: list[int]
    max_new_tokens: int
    options: dict
    likeliest: int | None = None  # tokens to note beside each that is chosen; None: no notes
    notes: dict[int, Note] = field(default_factory=dict)


class Update(NamedTuple):
    """News of a job: it is in line (part None), or a part has a final token, its end, or an error, which ends it."""

    part: int | None
    token: int | None = None
    depth: int = 0
    finished: bool = False
    error: Exception | None = None


class Job:
    """The parts of one HTTP request, and its mailbox: it holds at most the tokens that its parts may have."""

    def __init__(self, parts: list[Part]):
        self.parts = parts
        self.loop = asyncio.get_running_loop()
        self.open = len(parts)  # parts that have not ended, as the event loop knows
        self.ids: dict[int, int] = {}  # part -> the engine's request; the engine's thread's
        self._mail: deque[Update] = deque()
        self._news = asyncio.Event()

    def put(self, update: Update) -> None:
        """Add an update; in the event loop."""
        self._mail.append(update)
        self._news.set()

    async def updates(self) -> list[Update]:
        """What is new; waits until there is something."""
        await self._news.wait()
        self._news.clear()
        news = list(self._mail)
        self._mail.clear()
        return news


class Worker:
    """Runs an engine in a thread.  room: most parts that may be waiting or running; ended: called with each request
    that has ended, in the engine's thread."""

    def __init__(self, engine: Engine, room: int, ended: Callable[[Request], None] = lambda request: None):
        self.engine, self.room, self.ended = engine, room, ended
        self.in_flight = 0  # parts, as the event loop knows
        self.alive = True
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, tuple[Job, int]] = {}  # by the engine's id
        self._errors: dict[int, Exception] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- the event loop's side ---

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, once its step is over, and wait for it."""
        self._inbox.put(None)
        self._thread.join()

    def submit(self, job: Job) -> bool:
        """Queue a job; its first update says that it is in line, or why not.  False if there is no room for it."""
        if not self.alive or self.in_flight + len(job.parts) > self.room:
            return False
        self.in_flight += len(job.parts)
        self._inbox.put(partial(self._admit, job))
        return True

    def cancel(self, job: Job, part: int | None = None) -> None:
        """End a part, or all parts, of a job before the engine's next pass; those that have ended stay as they are."""
        self._inbox.put(partial(self._cancel, job, part))

    def _deliver(self, mail: list[tuple[Job, Update]]) -> None:
        for job, update in mail:
            job.open -= update.finished
            self.in_flight -= update.finished
            job.put(update)

    # --- the engine's thread ---

    def _run(self) -> None:
        busy = False
        try:
            while True:
                while not (busy and self._inbox.empty()):
                    order = self._inbox.get()  # idle: wait for it
                    if order is None:
                        return
                    order()
                    busy = True
                busy = self._step()
        except Exception as error:  # not even cancelling works: the device is gone
            log.exception("the engine has stopped for good")
            self.alive = False
            self._post([(job, Update(part, finished=True, error=error)) for job, part in self._jobs.values()])
            while (order := self._inbox.get()) is not None:
                order()

    def _step(self) -> bool:
        try:
            busy = self.engine.step()
        except Exception as error:  # out of memory, say: what is running fails, and what comes later may not
            log.exception("a pass has failed")
            if all(id in self._errors for id in self._jobs):
                raise
            for id in self._jobs:
                self.engine.cancel(id)
                self._errors[id] = error
            return True
        mail = []
        for event in self.engine.events():
            job, part = self._jobs[event.request]
            if event.finished:
                mail.append((job, Update(part, event.token, event.depth, True, self._end(event.request))))
            else:
                mail.append((job, Update(part, event.token, event.depth)))
        self._post(mail)
        return busy

    def _post(self, mail: list[tuple[Job, Update]]) -> None:
        if mail:
            try:
                mail[0][0].loop.call_soon_threadsafe(self._deliver, mail)
            except RuntimeError:  # the event loop has ended, and nobody reads any more
                pass

    def _end(self, id: int) -> Exception | None:
        """Forget a request that has ended; why it failed, if it did."""
        del self._jobs[id]
        request, error = self.engine.requests.pop(id), self._errors.pop(id, None)
        self.ended(request)
        return error or (request.error if request.state is State.FAILED else None)

    def _admit(self, job: Job) -> None:
        for i, part in enumerate(job.parts):
            try:
                if not self.alive:
                    raise RuntimeError("the engine has stopped")
                id = self.engine.submit(part.prompt, part.max_new_tokens, **part.options)
            except Exception as error:
                self._cancel(job, None)
                rest = range(i, len(job.parts))
                self._post([(job, Update(part, finished=True, error=error)) for part in rest])
                return
            if part.likeliest is not None:
                request = self.engine.requests[id]
                c = request.choice
                request.choice = NotedChoice(
                    c.temperature, c.top_k, c.top_p, c.min_p, c.repetition_penalty,
                    tuple(part.prompt), part.likeliest, part.notes,
                )  # fmt: skip
            self._jobs[id] = job, i
            job.ids[i] = id
        self._post([(job, Update(None))])

    def _cancel(self, job: Job, part: int | None) -> None:
        for id in job.ids.values() if part is None else [job.ids[part]]:
            if id in self._jobs:
                self.engine.cancel(id)
