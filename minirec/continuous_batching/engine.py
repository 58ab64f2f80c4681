"""The batching engine: one loop around a model, one pass through one of three queues per step."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from itertools import count, repeat
from operator import itemgetter

import torch
from torch import Tensor

from minirec.adaptive_exit import latent_diff
from minirec.config import number
from minirec.continuous_batching.requests import Event, Pass, Request, Stage, State
from minirec.continuous_batching.scheduler import MODES, POLICIES, Scheduler
from minirec.continuous_batching.slots import Move, Slot, advance_front, advance_wave, next_token, read_on
from minirec.decoding import Generation, Grid, Options, as_rows, as_seed, check_counts, check_request
from minirec.kv_cache import Cells, bytes_per_token, upload
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
        num_steps = model.config.mean_recurrence if num_steps is None else num_steps
        slots, max_length, self.r, chunk, row_budget, guess_after, coda_batch, patience = check_counts(
            slots=slots, max_length=max_length, num_steps=num_steps, chunk=chunk, row_budget=row_budget,
            guess_after=guess_after, coda_batch=coda_batch, patience=patience)  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(map(repr, MODES))}")
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}; it must be {' or '.join(map(repr, POLICIES))}")
        if guess_after > self.r:
            raise ValueError(f"guess_after is {guess_after}; it must be from 1 to num_steps, here {self.r}")
        if not 2 <= max_length <= model.config.block_size:
            raise ValueError(f"max_length is {max_length}; it must be from 2 to the context, {model.config.block_size}")
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
        self.passes, self.cells = Counter(), Counter()  # by stage
        self.slots_in = Counter()  # slots in all passes, by stage
        self._at: Cells | None = None
        # by (request, number of the token), so that an event which is repeated after an interrupt is still one event
        self._events: OrderedDict[tuple[int, int], Event] = OrderedDict()
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
            raise ValueError(f"num_steps is {r}; this engine's cache is {self.r} steps deep")
        threshold = None if threshold is None else number("threshold", threshold)
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold is {threshold}; it must be 0 or above, or None")
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
        stop = self.grid.stop_tokens if o.stop_tokens is None else o.stop_tokens
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
        for request in list(self._to_cancel.values()):
            self._cancel(request)
        while (request := self._next()) is not None:
            self._seat(request)
        if not self.busy:
            return False
        stage, slots = self.scheduler.choose(self.busy)
        for slot in self.busy:
            slot.sat_out = 0 if slot in slots else slot.sat_out + 1
        ran = [(s.row, s.request.id, max(s.depths) + (stage is Stage.RECUR)) for s in slots]
        cells = sum(s.new if stage is Stage.PRELUDE else len(s.tokens) for s in slots)
        changes = {Stage.PRELUDE: self._prelude, Stage.RECUR: self._recur, Stage.CODA: self._coda}[stage](slots)
        for slot, change in zip(slots, changes, strict=True):
            slot.become(**change)
        self.passes[stage] += 1
        self.cells[stage] += cells
        self.slots_in[stage] += len(slots)
        if self.on_pass is not None:
            self.on_pass(Pass(stage, cells, ran))
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
            while self._events:  # one by one: a listener that stops and comes back has missed nothing
                yield self._events.popitem(last=False)[1]

    def events(self) -> list[Event]:
        """What has happened since the last call, for a loop of your own around `step`."""
        if not self._stepping:
            self._hand_over()
        # in one call: an interrupt between two of them would lose the first
        return [*map(itemgetter(1), map(self._events.popitem, repeat(False, len(self._events))))]

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
        slot, tokens = Slot(row, request, initial), request.prompt[: self.chunk]
        move = Move([], 0, tokens, [0] * len(tokens))
        slot.become(**slot.opened(move, self._steps(slot, move)))
        now, busy, free = self.clock(), [*self.busy, slot], self.free[:-1]
        self.busy, self.free, request.admitted, request.state = busy, free, now, State.PREFILL
        self.scheduler.waiting.pop(request.id)

    def _hand_over(self) -> None:
        """Give requests the tokens that their last coda made final, and empty the slots of those that have ended.

        An interrupt may cut this anywhere: the next call repeats what was cut, which changes nothing.
        """
        for slot in self.busy:
            while slot.drawn and slot.error is None and slot.request.ended is None:
                self._hand_over_next(slot)
            if slot.error is not None:
                self._end(slot.request, State.FAILED, slot.error)
            if slot.request.ended is not None:
                self._vacate(slot)

    def _hand_over_next(self, slot: Slot) -> None:
        request, (number, token, depth) = slot.request, slot.drawn[0]
        if token < 0:  # what `TokenChoice.choose` makes of logits that are not finite
            position = len(request.prompt) + number - 1
            slot.error = FloatingPointError(f"logits are not finite at position {position}, after {depth} steps")
            return
        request.record(number, token, depth, self.clock())
        slot.report()
        if len(slot.unheard) == len(slot.drawn):
            try:  # off the list and then the call, on one line: an interrupt finds neither done, or the call begun
                slot.stopped = request.on_token(slot.unheard.popleft()) is False
            except Exception as raised:  # the caller's function: its request fails, and no other
                slot.error = raised
        finished = slot.stopped or token in request.stop_tokens or number + 1 == request.max_new_tokens
        finished = finished and slot.error is None
        self._events[request.id, number] = Event(request.id, token, depth, finished)
        if finished:
            self._end(request, State.FINISHED)
        elif slot.error is None:
            slot.drawn.popleft()

    def _cancel(self, request: Request) -> None:
        self._end(request, State.CANCELLED)
        for slot in [slot for slot in self.busy if slot.request is request]:
            self._vacate(slot)
        self.scheduler.waiting.pop(request.id, None)
        with self._lock:  # whoever cancels it again sees that it has ended
            self._to_cancel.pop(request.id)

    def _end(self, request: Request, state: State, error: Exception | None = None) -> None:
        """End a request, unless it has ended."""
        if request.ended is None:
            now = self.clock()
            request.state, request.error, request.ended = state, error, now
        if request.state is state is not State.FINISHED:
            self._events[request.id, len(request.generation.tokens)] = Event(request.id, None, 0, True)

    def _vacate(self, slot: Slot) -> None:
        slot.report()
        if slot.request.state is not State.FINISHED:  # masked keys have weight 0, and 0 times a NaN left there is NaN
            self.grid.cache.clear(slot.row)
        self.busy, self.free = [s for s in self.busy if s is not slot], [*self.free, slot.row]

    # --- passes: each returns the changes of its slots, and does nothing itself that could not be done twice ---

    def _cells(self, slots: list[Slot], newest: bool = False) -> Cells:
        """The cells of some slots, or the new ones among them."""
        first = {s.row: len(s.tokens) - s.new if newest else 0 for s in slots}
        cells = [(s.row, s.start + i) for s in slots for i in range(first[s.row], len(s.tokens))]
        if self._at is None or self._at.cells != cells:  # often they are those of the pass before
            self._at = self.grid.cells(*map(list, zip(*cells, strict=True)))
        return self._at

    @torch.inference_mode()
    def _prelude(self, slots: list[Slot]) -> list[dict]:
        at = self._cells(slots, newest=True)
        at.write(self.grid.tokens, upload([[t] for s in slots for t in s.tokens[-s.new :]], self.model.device))
        embeddings = self.grid.embed(at).split([slot.new for slot in slots])  # (new, 1, d) each
        return [slot.embedded(e) for slot, e in zip(slots, embeddings, strict=True)]

    @torch.inference_mode()
    def _recur(self, slots: list[Slot]) -> list[dict]:
        at = self._cells(slots)
        before, e = torch.cat([s.state for s in slots]), torch.cat([s.embedding for s in slots])  # (N, 1, d) each
        depths = [min(d, slot.request.num_steps - 1) for slot in slots for d in slot.depths]
        s = self.grid.recur(before, e, at, at.depths(depths))  # (N, 1, d)
        exits = [
            self.mode != "wavefront" and slot.request.state is State.DECODE and slot.request.threshold is not None
            for slot in slots
        ]
        moved = latent_diff(before, s)[:, 0].tolist() if any(exits) else None
        changes, first = [], 0
        for slot, state, may in zip(slots, s.split([len(slot.tokens) for slot in slots]), exits, strict=True):
            changes.append(slot.looped(state, settled=may and moved[first] < slot.request.threshold))
            first += len(slot.tokens)
        return changes

    @torch.inference_mode()
    def _coda(self, slots: list[Slot]) -> list[dict]:
        at, s = self._cells(slots), torch.cat([slot.state for slot in slots])  # (N, 1, d)
        guesses, failed = self._choose(self.grid.decode(s, at), at, slots)  # (N, 1)
        moved = None
        if any(slot.front for slot in slots):
            moved = latent_diff(torch.cat([slot.before for slot in slots]), s)[:, 0].tolist()
        guessed, first, changes = guesses[:, 0].tolist(), 0, []  # the one synchronisation of the pass
        for slot in slots:
            own = slice(first, first + len(slot.tokens))
            first = own.stop
            if failed and slot.request.choice in failed:
                changes.append({"error": failed[slot.request.choice]})
                continue
            calm = [x < slot.request.threshold for x in moved[own]] if slot.front else []
            move = self._move(slot, guessed[own], calm)
            if slot.request.state is State.DECODE:
                depths = [min(depth, slot.request.num_steps) for _, depth in move.final]
                self.grid.cache.copy_deeper(slot.row, slot.start, depths)
            changes.append(slot.opened(move, self._steps(slot, move)) | {"decodes": slot.decodes + 1})
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

    def _move(self, slot: Slot, guessed: list[int], calm: list[bool]) -> Move:
        """Where a slot goes after a coda in which its cells predicted `guessed`."""
        if slot.request.state is State.PREFILL:
            return read_on(slot, guessed, self.chunk, self.mode == "wavefront")
        if self.mode != "wavefront":
            return next_token(slot, guessed)
        if slot.front is None:
            widest = self.scheduler.widest(len(self.busy), self.row_budget)
            return advance_wave(slot, guessed, self.guess_after, widest)
        widest = self.scheduler.widest(self.scheduler.slots, self.row_budget)
        return advance_front(slot, guessed, calm, self.guess_after, widest, self.grid.filler)

    def _steps(self, slot: Slot, move: Move) -> int:
        """Steps of a slot's next window until its coda, at most."""
        r = slot.request.num_steps
        if self.mode != "wavefront" or move.start < len(slot.request.prompt):
            return r
        return min(self.guess_after, r if move.front else r - move.depths[0])


def _try_out(choice: TokenChoice) -> None:
    """Raise ValueError for a choice that fails, before it can fail in a pass."""
    one = torch.zeros((1, 1), dtype=torch.int64)
    try:
        {choice: choice.choose(torch.zeros((1, 1, 2)), one, one, one)}  # it is looked up by its hash as well
    except Exception as error:
        raise ValueError(f"{choice} cannot choose a token: {error}") from error
