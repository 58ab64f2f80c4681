"""The batching engine: one loop around a model, one pass through one of three queues per step."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

import torch

from minirec.config import number, one_of, shown, whole
from minirec.continuous_batching.outbox import Outbox
from minirec.continuous_batching.passes import Passes
from minirec.continuous_batching.requests import Event, Pass, Request, Stage, State
from minirec.continuous_batching.scheduler import MODES, POLICIES, Scheduler
from minirec.continuous_batching.slots import Move, Part, Slot
from minirec.decoding import Generation, Grid, Options, as_rows, as_seed, check_counts, check_request
from minirec.kv_cache import bytes_per_token
from minirec.recurrent_block import RecurrentDepthLM
from minirec.token_choice import TokenChoice


class Engine:
    """Decodes requests in `slots` rows of up to `max_length` tokens, prompt and new ones; see the package's docstring.

    num_steps: the depth of the cache, and the default of requests (None: the config's mean_recurrence).  chunk: the
    most prompt positions of a slot in a pass.  row_budget: cells of a pass that waves share (mode "wavefront").
    guess_after: as for the lossless wavefront, and the `inner_steps` of diffusion forcing.  coda_batch: slots that
    prelude or coda wait for while others can loop ("depth", "wavefront").  kv_budget: bytes of keys and values promised
    at once, None for what the slots hold.  kv, kv_slots, init_scale: as for all samplers.  on_pass: called with every
    Pass.  clock: returns seconds.  Raises ValueError naming a bad argument.

    Weights are those the model has at construction.  submit and cancel may be called from other threads and from the
    engine's callbacks; step, run and stream may not: within a step they raise RuntimeError.  An exception out of
    on_pass or clock, or an interrupt, leaves `step` and loses nothing: the next call carries on.  The counts of passes
    may miss the pass that was cut, and an on_token that was cut is not called again with that token.  `requests` holds
    all requests by id, ended ones too: a long-running server removes them, `requests.pop(id)`, after their last event.
    """

    def __init__(
        self, model: RecurrentDepthLM, slots: int = 8, max_length: int = 512, mode: str = "depth", *,
        num_steps: int | None = None, policy: str = "fcfs", chunk: int = 32, row_budget: int = 64, guess_after: int = 1,
        coda_batch: int = 2, patience: int = 16, kv_budget: int | None = None, kv: str = "full", kv_slots: int = 1,
        init_scale: float = 1.0, on_pass: Callable[[Pass], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):  # fmt: skip
        self.r = model.config.depth(num_steps)
        max_length, chunk, row_budget, guess_after, coda_batch, patience = check_counts(
            max_length=max_length, chunk=chunk, row_budget=row_budget, guess_after=guess_after, coda_batch=coda_batch,
            patience=patience)  # fmt: skip
        slots = whole("slots", slots, 1, 2**16)
        kv_budget = None if kv_budget is None else whole("kv_budget", kv_budget, 1)
        mode, policy = one_of("mode", mode, MODES), one_of("policy", policy, POLICIES)
        if on_pass is not None and not callable(on_pass):
            raise ValueError(f"on_pass is {shown(on_pass)}; it must be a function, or None")
        if not callable(clock):
            raise ValueError(f"clock is {shown(clock)}; it must be a function")
        if guess_after > self.r:
            raise ValueError(f"guess_after is {shown(guess_after)}; it must be from 1 to num_steps, here {self.r}")
        if not 2 <= max_length <= model.config.block_size:
            raise ValueError(
                f"max_length is {shown(max_length)}; it must be from 2 to the context, {model.config.block_size}"
            )
        self.model, self.mode, self.max_length, self.chunk = model, mode, max_length, chunk
        self.row_budget, self.guess_after, self.on_pass, self.clock = row_budget, guess_after, on_pass, clock
        # one token in each row until a request comes
        self.grid = Grid(model, [[0]] * slots, max_length - 1, self.r, kv=kv, kv_slots=kv_slots, init_scale=init_scale)
        self.kv_bytes = bytes_per_token(model.config, self.r, kv, kv_slots, model.dtype)
        self.kv_budget = slots * max_length * self.kv_bytes if kv_budget is None else kv_budget
        self.scheduler = Scheduler(mode, policy, slots, self.kv_budget, coda_batch, patience)
        self.requests: dict[int, Request] = {}
        self.busy: list[Slot] = []
        self.free = list(range(slots))[::-1]
        self.passes: Counter[Stage] = Counter()
        self.cells: Counter[Stage] = Counter()  # in all passes
        self.slots_in: Counter[Stage] = Counter()  # in all passes
        self._passes = Passes(self.grid, self.scheduler, chunk, row_budget, guess_after)
        self._outbox = Outbox(clock)
        self._to_cancel: dict[int, Request] = {}
        self._lock, self._ids, self._stepping = threading.RLock(), count(), False

    # --- requests ---

    def submit(self, prompt, max_new_tokens: int, *, num_steps: int | None = None, threshold: float | None = None,
               **options) -> int:  # fmt: skip
        """Queue a prompt (list or 1-D tensor of ids); returns the request's id.

        num_steps: at most the engine's.  threshold: exit when a state moves by less, relative to its length, at most
        after num_steps; None for never; in mode "wavefront" None is lossless, and a number the `exit_threshold` of
        diffusion forcing, with at most row_budget / slots positions in flight.  options: seed, temperature,
        top_k, top_p, min_p, repetition_penalty, stop_tokens and on_token, as for all samplers.  Raises ValueError for a
        request that could never run; one that fails later fails alone, with its `error`: an exception out of its
        on_token, or a FloatingPointError if its logits are not finite.
        """
        r = self.r if num_steps is None else num_steps
        r, max_new_tokens = check_counts(num_steps=r, max_new_tokens=max_new_tokens)
        if r > self.r:
            raise ValueError(f"num_steps is {shown(r)}; this engine's cache is {self.r} steps deep")
        threshold = None if threshold is None else number("threshold", threshold, least=0)
        unknown = options.keys() & {"kv", "kv_slots", "init_scale", "trace", "fast"}
        if unknown:
            raise ValueError(f"{min(unknown)} is the engine's to choose, not a request's")
        o, ((ids,), _) = Options(**options), as_rows([prompt])
        seed = as_seed(o.seed)
        check_request(self.model.config, ids, max_new_tokens, self.max_length)
        need = (len(ids) + max_new_tokens) * self.kv_bytes
        if need > self.kv_budget:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and max_new_tokens {max_new_tokens} need {need:,} bytes of keys and "
                f"values; kv_budget is {self.kv_budget:,}"
            )
        stop = set(self.grid.stop_tokens if o.stop_tokens is None else o.stop_tokens)
        choice = TokenChoice(o.temperature, o.top_k, o.top_p, o.min_p, o.repetition_penalty)
        _try_out(choice)
        request = Request(next(self._ids), ids, max_new_tokens, r, threshold, seed, choice, stop, o.on_token,
                          need, self.clock())  # fmt: skip
        with self._lock:
            self.requests[request.id] = self.scheduler.waiting[request.id] = request
        return request.id

    def cancel(self, request: int) -> bool:
        """End a request before the next pass; False if it has ended already.  An unknown id is a KeyError."""
        with self._lock:
            going = self.requests[request].ended is None
            if going:
                self._to_cancel[request] = self.requests[request]
        return going

    # --- the loop ---

    def step(self) -> bool:
        """Admit who can be, and run one pass; False if there was nothing to do."""
        if self._stepping:
            raise RuntimeError("the engine is within a step: its callbacks may call submit and cancel, nothing else")
        try:
            try:
                self._stepping = True
                return self._step()
            finally:
                self._stepping = False
        finally:  # again: an interrupt may have come just before it
            self._stepping = False

    def _step(self) -> bool:
        self._hand_over()  # what an interrupt has left
        for cancelled in list(self._to_cancel.values()):
            self._cancel(cancelled)
        while (request := self._next()) is not None:
            self._seat(request)
        if not self.busy:
            return False
        stage, slots = self.scheduler.choose(self.busy)
        for slot in self.busy:
            slot.sat_out = 0 if slot in slots else slot.sat_out + 1
        cells = sum(slot.new if stage is Stage.PRELUDE else len(slot.tokens) for slot in slots)
        done = None
        if self.on_pass is not None:  # a coda's slots go on to their next window, so their depths are read now
            ran = [(s.row, s.request.id, max(s.depths) + (stage is Stage.RECUR)) for s in slots]
            done = Pass(stage, cells, ran)
        for slot, change in zip(slots, self._passes(stage, slots, len(self.busy)), strict=True):
            slot.become(change)
        self.passes[stage] += 1
        self.cells[stage] += cells
        self.slots_in[stage] += len(slots)
        if self.on_pass is not None and done is not None:
            self.on_pass(done)
        self._hand_over()
        return True

    def run(self) -> dict[int, Generation]:
        """Run until nothing is left; what every request has got so far, by id."""
        for _ in self.stream():
            pass
        return {id: request.generation for id, request in list(self.requests.items())}

    def stream(self) -> Iterator[Event]:
        """Run until nothing is left, and give every token as it becomes final."""
        going = True
        while going:
            going = self.step()
            while self._outbox.events:  # one by one: a listener that stops and comes back has missed nothing
                yield self._outbox.pop()

    def events(self) -> list[Event]:
        """What has happened since the last call, for a loop of your own around `step`."""
        if not self._stepping:
            self._hand_over()
        return self._outbox.drain()

    # --- slots ---

    def _next(self) -> Request | None:
        with self._lock:  # another thread may submit
            return self.scheduler.admit(self.busy)

    def _seat(self, request: Request) -> None:
        """Give a request the next free row."""
        row, n = self.free[-1], len(request.prompt) + request.max_new_tokens
        positions = torch.arange(n, device=self.model.device)
        initial = self.model.initial_state(positions, request.seed, self.grid.options.init_scale)[:, None]  # (n, 1, d)
        self.grid.seed[row] = request.seed
        slot, tokens = Slot(row, request, Part(initial, 0, n)), request.prompt[: self.chunk]
        move = Move([], 0, tokens, [0] * len(tokens))
        slot.become(slot.opened(move, self._passes.steps(slot, move)))
        now, busy, free = self.clock(), [*self.busy, slot], self.free[:-1]
        self.busy, self.free, request.admitted, request.state = busy, free, now, State.PREFILL
        self.scheduler.waiting.pop(request.id)

    def _hand_over(self) -> None:
        """Give requests the tokens that their last coda made final, and empty the slots of those that have ended.

        An interrupt may cut this anywhere: the next call repeats what was cut, which changes nothing.
        """
        for slot in self.busy:
            while slot.drawn and slot.error is None and slot.request.ended is None:
                self._outbox.hand_over(slot)
            if slot.error is not None:
                self._outbox.end(slot.request, State.FAILED, slot.error)
            if slot.request.ended is not None:
                self._vacate(slot)

    def _cancel(self, request: Request) -> None:
        self._outbox.end(request, State.CANCELLED)
        for slot in [slot for slot in self.busy if slot.request is request]:
            self._vacate(slot)
        self.scheduler.waiting.pop(request.id, None)
        with self._lock:  # whoever cancels it again sees that it has ended
            self._to_cancel.pop(request.id)

    def _vacate(self, slot: Slot) -> None:
        slot.report()
        if slot.request.state is not State.FINISHED:  # masked keys have weight 0, and 0 times a NaN left there is NaN
            self.grid.cache.clear(slot.row)
        self.busy, self.free = [s for s in self.busy if s is not slot], [*self.free, slot.row]


def _try_out(choice: TokenChoice) -> None:
    """Raise ValueError for a choice that fails, before it can fail in a pass."""
    one = torch.zeros((1, 1), dtype=torch.int64)
    try:
        {choice: choice.choose(torch.zeros((1, 1, 2)), one, one, one)}  # it is looked up by its hash as well
    except Exception as error:
        raise ValueError(f"{choice} cannot choose a token: {error}") from error
