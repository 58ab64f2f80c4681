"""Continuous depth-wise batching: many requests, each token at its own recurrence depth, none waiting for another.

A server decodes many sequences in one pass, to read the weights once for all of them.  Ordinary transformers need the
same number of layers for every token; here tokens leave the loop at different depths, and a batch that moves in step
waits for its deepest token.  So let every slot be where it is, and keep three queues (arXiv 2608.09444):

      waiting --admit--> [ prelude ] --> [ recurrent block ] --> [ coda ] --token--> prelude of its next position
                                           ^______|  not settled                  or, at the end, of the next request

    mode         admits                          a token that has settled                        positions a slot
    "static"     when all slots are free         waits for all others, and then they go on       1
    "sequence"   when a slot is free             the same                                        1
    "depth"      when a slot is free             goes on with the next pass                      1
    "wavefront"  when a slot is free             goes on with the next pass                      a wave

All four are one loop (`Engine.step`: one pass through one of the queues); a mode is which slots may be in the pass.
Cells of any slots, positions and depths share a pass (`kv_cache.Cells`); a prompt is a few chunks of positions that
move together.  A request gets the tokens it would get alone: from `autoregressive`, or, with a threshold, from
`adaptive_exit` with the criterion "latent-diff"; in mode "wavefront" from `lossless_wavefront`, or, with a threshold,
from `diffusion_forcing` without momentum.

Public engines batch by depth with one position a request (2608.09444, thousands of lines for GPUs), or run a wavefront
for one sequence; this one joins the two.  Keys and values: a row of a static cache for each slot; a budget in bytes
limits how many are promised at once.  Notebook: 09_continuous_batching.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch

from minirec.adaptive_exit import latent_diff
from minirec.decoding import Generation, Grid, Options, as_rows, as_seed, check_counts, check_request
from minirec.diffusion_forcing import Front
from minirec.kv_cache import Cells, bytes_per_token, upload
from minirec.lossless_wavefront import next_wave
from minirec.recurrent_block import RecurrentDepthLM
from minirec.token_choice import TokenChoice

MODES = ("static", "sequence", "depth", "wavefront")
State = Enum("State", ["WAITING", "PREFILL", "DECODE", "FINISHED", "CANCELLED", "FAILED"])
Stage = Enum("Stage", ["PRELUDE", "RECUR", "CODA"])


@dataclass
class Request:
    """One prompt on its way; times are of the engine's clock, in seconds."""

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


@dataclass
class Event:
    """A token has become final; the last event of a request has `finished`, and no token if it ended without one."""

    request: int
    token: int | None
    depth: int
    finished: bool


@dataclass(eq=False)  # a slot is itself, whatever is in it: they are looked up in every pass
class Slot:
    """A row of the cache and who sits there: the window of positions that is in work, and what it waits for."""

    row: int
    request: Request
    start: int  # first position of the window
    tokens: list[int]  # that its positions run on
    depths: list[int]  # steps they have run
    new: int  # how many of them, on the right, have not been through the prelude
    front: Front | None = None  # of a request that decodes by diffusion forcing
    left: int = 0  # steps until the coda
    stage: Stage = Stage.PRELUDE
    sat_out: int = 0  # passes in a row that others had


@dataclass
class Pass:
    """One pass: its queue, how many cells were in it, and (row, request, depth after it) for each slot."""

    stage: Stage
    cells: int
    slots: list[tuple[int, int, int]]


class Scheduler:
    """Who is admitted, and who may be in the next pass.  The policy in full: nothing here touches a tensor.

    "fcfs": requests are admitted in the order of arrival, and prompts share passes with tokens.  "prefill_first": while
    a prompt is in work, slots that decode stand back, for at most `patience` passes in a row.
    """

    def __init__(self, mode: str, policy: str, slots: int, kv_budget: int | None, coda_batch: int, patience: int):
        self.mode, self.policy, self.slots = mode, policy, slots
        self.kv_budget, self.coda_batch, self.patience = kv_budget, coda_batch, patience
        self.waiting: deque[Request] = deque()
        self.filling = False  # a static batch, before it starts

    def admit(self, busy: list[Slot]) -> Request | None:
        """The next request to take a free slot, or None.  The first in line is never passed over, so none starves."""
        if not self.waiting or len(busy) == self.slots or (self.mode == "static" and busy and not self.filling):
            self.filling = False
            return None
        promised = sum(slot.request.kv_bytes for slot in busy)
        if self.kv_budget is not None and promised + self.waiting[0].kv_bytes > self.kv_budget:
            return None
        self.filling = True
        return self.waiting.popleft()

    def choose(self, busy: list[Slot]) -> tuple[Stage, list[Slot]]:
        """The queue of the next pass, and the slots in it."""
        if self.policy == "prefill_first" and any(s.request.state is State.PREFILL for s in busy):
            busy = [s for s in busy if s.request.state is State.PREFILL or s.sat_out >= self.patience]
        queues = {stage: [s for s in busy if s.stage is stage] for stage in Stage}
        if self.mode in ("static", "sequence"):  # in step: nobody goes on before all have come as far
            order, enough = (Stage.PRELUDE, Stage.RECUR, Stage.CODA), 1
        else:  # coda first: it ends what was begun, and frees slots
            order, enough = (Stage.CODA, Stage.PRELUDE, Stage.RECUR), min(self.coda_batch, len(busy))
        for stage in order:
            if len(queues[stage]) >= (enough if stage is not Stage.RECUR else 1):
                return stage, queues[stage]
        stage = max(order, key=lambda s: len(queues[s]))  # too few anywhere, and nobody loops
        return stage, queues[stage]

    def widest(self, busy: int, row_budget: int) -> int:
        """Width against breadth: how wide a wave may be when so many slots share a pass of so many rows.

        A lossless wave gets its share of what is busy now.  What diffusion forcing decodes hangs on its width: it gets
        the share of all slots, whoever is there.
        """
        return max(1, row_budget // max(1, busy))


class Engine:
    """Decodes requests in `slots` rows of up to `max_length` tokens, prompt and new ones; see the module's head.

    num_steps: the depth of the cache, and the default of requests (None: the config's mean_recurrence).  chunk: the
    most prompt positions of a slot in a pass.  row_budget: cells of a pass that waves share out (mode "wavefront").
    guess_after: as for the lossless wavefront, and the `inner_steps` of diffusion forcing.  coda_batch: slots that
    prelude or coda wait for while others can loop ("depth", "wavefront").  kv_budget: bytes of keys and values promised
    at once, None for what the slots hold.  kv, kv_slots, init_scale: as for all samplers.  on_pass: called with every
    Pass.  clock: seconds.

    The weights are those that the model has now.  submit and cancel may be called from other threads while one runs
    `step`, `run` or `stream`.  `requests` holds all by id, ended ones too: who serves for long takes those out,
    `requests.pop(id)`, when their last event has come.
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
        if policy not in ("fcfs", "prefill_first"):
            raise ValueError(f"policy is {policy!r}; it must be 'fcfs' or 'prefill_first'")
        if guess_after > self.r:
            raise ValueError(f"guess_after is {guess_after}; it must be from 1 to num_steps, here {self.r}")
        if not 2 <= max_length <= model.config.block_size:
            raise ValueError(f"max_length is {max_length}; it must be from 2 to the context, {model.config.block_size}")
        self.model, self.mode, self.max_length, self.chunk = model, mode, max_length, chunk
        self.row_budget, self.guess_after, self.on_pass, self.clock = row_budget, guess_after, on_pass, clock
        # one token in each row until a request comes
        self.grid = Grid(model, [[0]] * slots, max_length - 1, self.r, kv=kv, kv_slots=kv_slots, init_scale=init_scale)
        self.embedding = torch.zeros_like(self.grid.state)  # (B, L, d)
        self.initial = self.grid.state.clone()  # (B, L, d), of the requests that sit there
        self.before = self.grid.state.clone()  # (B, L, d), at the start of a wave's outer step
        self.kv_bytes = bytes_per_token(model.config, self.r, kv, kv_slots, model.dtype)
        self.kv_budget = slots * max_length * self.kv_bytes if kv_budget is None else kv_budget
        self.scheduler = Scheduler(mode, policy, slots, self.kv_budget, coda_batch, patience)
        self.requests: dict[int, Request] = {}
        self.busy: list[Slot] = []
        self.free = list(range(slots))[::-1]
        self.passes, self.cells = Counter(), Counter()  # by stage
        self.slots_in = Counter()  # slots in all passes, by stage
        self._at: Cells | None = None
        self._events: deque[Event] = deque()
        self._to_cancel: set[int] = set()
        self._lock, self._ids = threading.Lock(), itertools.count()

    def submit(self, prompt, max_new_tokens: int, *, num_steps: int | None = None, threshold: float | None = None,
               **options) -> int:  # fmt: skip
        """Queue a prompt (list or 1-D tensor of ids); returns the request's id.

        num_steps: at most the engine's.  threshold: exit when a state moves by less, relative to its length, at most
        after num_steps; None for never; in mode "wavefront" None is lossless, and a number the `exit_threshold` of
        diffusion forcing, with at most row_budget / slots positions in flight.  options: seed, temperature,
        top_k, top_p, min_p, repetition_penalty, stop_tokens and on_token, as for all samplers.  A request that could
        never run is a ValueError with the numbers, and the engine goes on.
        """
        r = self.r if num_steps is None else num_steps
        r, max_new_tokens = check_counts(num_steps=r, max_new_tokens=max_new_tokens)
        if r > self.r:
            raise ValueError(f"num_steps is {r}; this engine's cache is {self.r} steps deep")
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
        with self._lock:
            request = Request(next(self._ids), ids, max_new_tokens, r, threshold, seed, choice, stop, o.on_token,
                              need, self.clock())  # fmt: skip
            self.requests[request.id] = request
            self.scheduler.waiting.append(request)
        return request.id

    def cancel(self, request: int) -> bool:
        """End a request before the next pass; False if it has ended already.  An unknown id is a KeyError."""
        with self._lock:
            ended = self.requests[request].ended is not None
            if not ended:
                self._to_cancel.add(request)
            return not ended

    def step(self) -> bool:
        """Admit who can be, and run one pass; False if there was nothing to do."""
        with self._lock:
            for waiting in [w for w in self.scheduler.waiting if w.id in self._to_cancel]:
                self.scheduler.waiting.remove(waiting)
                self._end(waiting, State.CANCELLED)
            for slot in [s for s in self.busy if s.request.id in self._to_cancel]:
                self._leave(slot, State.CANCELLED)
            self._to_cancel.clear()
            while (request := self.scheduler.admit(self.busy)) is not None:
                self._enter(request)
        if not self.busy:
            return False
        stage, slots = self.scheduler.choose(self.busy)
        for slot in self.busy:
            slot.sat_out = 0 if slot in slots else slot.sat_out + 1
        {Stage.PRELUDE: self._prelude, Stage.RECUR: self._recur, Stage.CODA: self._coda}[stage](slots)
        return True

    def run(self) -> dict[int, Generation]:
        """Run until nothing is left; what every request has got so far, by id."""
        for _ in self.stream():
            pass
        with self._lock:  # submit may come from another thread
            return {id: request.generation for id, request in self.requests.items()}

    def stream(self) -> Iterator[Event]:
        """Run until nothing is left, and give every token as it becomes final."""
        going = True
        while going:
            going = self.step()
            while self._events:  # one by one: who stops listening and comes back has missed nothing
                yield self._events.popleft()

    def events(self) -> list[Event]:
        """What has happened since this was last asked, for a loop of one's own around `step`."""
        return [self._events.popleft() for _ in range(len(self._events))]

    # --- slots ---

    def _enter(self, request: Request) -> None:
        row, grid = self.free.pop(), self.grid
        request.state, request.admitted = State.PREFILL, self.clock()
        everywhere = torch.arange(grid.state.shape[1], device=self.model.device)
        self.initial[row] = self.model.initial_state(everywhere, request.seed, grid.options.init_scale)
        grid.seed[row] = request.seed
        grid.tokens[row].fill_(grid.filler)
        grid.tokens[row, : len(request.prompt)] = torch.tensor(request.prompt, device=grid.tokens.device)
        self.busy.append(Slot(row, request, 0, [], [], 0))
        self._open(self.busy[-1], request.prompt[: self.chunk])

    def _leave(self, slot: Slot, state: State, error: Exception | None = None) -> None:
        self.busy.remove(slot)
        self.free.append(slot.row)
        self._end(slot.request, state, error)

    def _end(self, request: Request, state: State, error: Exception | None = None) -> None:
        request.state, request.error, request.ended = state, error, self.clock()
        if state is not State.FINISHED:
            self._events.append(Event(request.id, None, 0, True))

    def _open(
        self,
        slot: Slot,
        tokens: list[int],
        depths: list[int] | None = None,
        start: int | None = None,
        new: int | None = None,
    ) -> None:
        """Give a slot its next window: positions that start together, or a wave with `new` for the prelude."""
        slot.start = slot.start + len(slot.tokens) if start is None else start
        slot.tokens, slot.depths = tokens, [0] * len(tokens) if depths is None else depths
        slot.new = sum(depth == 0 for depth in slot.depths) if new is None else new
        r = slot.request.num_steps
        slot.left = r
        if self.mode == "wavefront" and slot.request.state is State.DECODE:
            slot.left = min(self.guess_after, r if slot.front else r - slot.depths[0])
        slot.stage = Stage.PRELUDE if slot.new else Stage.RECUR

    # --- passes ---

    def _cells(self, slots: list[Slot], newest: bool = False):
        """The cells of some slots, or the new ones among them."""
        first = {s.row: len(s.tokens) - s.new if newest else 0 for s in slots}
        cells = [(s.row, s.start + i) for s in slots for i in range(first[s.row], len(s.tokens))]
        if self._at is None or self._at.cells != cells:  # often they are those of the pass before
            self._at = self.grid.cells(*map(list, zip(*cells, strict=True)))
        return self._at

    def _count(self, stage: Stage, slots: list[Slot], cells: int) -> None:
        self.passes[stage] += 1
        self.cells[stage] += cells
        self.slots_in[stage] += len(slots)
        for slot in slots:
            if stage is Stage.RECUR:
                slot.request.generation.passes += 1
                slot.request.generation.row_steps += len(slot.tokens)
            slot.request.generation.decodes += stage is Stage.CODA
        if self.on_pass is not None:
            self.on_pass(Pass(stage, cells, [(s.row, s.request.id, max(s.depths)) for s in slots]))

    @torch.inference_mode()
    def _prelude(self, slots: list[Slot]) -> None:
        at = self._cells(slots, newest=True)
        at.write(self.embedding, self.grid.embed(at))
        new = [depth == 0 for slot in slots for depth in slot.depths[len(slot.tokens) - slot.new :]]
        s = at.read(self.initial)  # (N, 1, d)
        if not all(new):  # by diffusion forcing a token may change and its state go on
            s = torch.where(upload(new, s.device)[:, None, None], s, at.read(self.grid.state))
        at.write(self.grid.state, s)
        if self.mode == "wavefront":
            at.write(self.before, s)
        for slot in slots:
            slot.new, slot.stage = 0, Stage.RECUR
        self._count(Stage.PRELUDE, slots, len(at.positions))

    @torch.inference_mode()
    def _recur(self, slots: list[Slot]) -> None:
        at, grid = self._cells(slots), self.grid
        before = at.read(grid.state)  # (N, 1, d)
        depths = [min(d, slot.request.num_steps - 1) for slot in slots for d in slot.depths]
        s = grid.recur(before, at.read(self.embedding), at, at.depths(depths))
        at.write(grid.state, s)
        calm = None
        if self.mode != "wavefront" and any(slot.request.threshold is not None for slot in slots):
            calm = latent_diff(before, s)[:, 0].tolist()
        first = 0
        for slot in slots:
            slot.depths, slot.left = [d + 1 for d in slot.depths], slot.left - 1
            exits = self.mode != "wavefront" and slot.request.state is State.DECODE
            exits = exits and slot.request.threshold is not None and calm[first] < slot.request.threshold
            if slot.left == 0 or exits:
                slot.stage = Stage.CODA
            first += len(slot.tokens)
        self._count(Stage.RECUR, slots, first)

    @torch.inference_mode()
    def _coda(self, slots: list[Slot]) -> None:
        at, grid = self._cells(slots), self.grid
        s = at.read(grid.state)  # (N, 1, d)
        logits = grid.decode(s, at)  # (N, 1, V)
        tokens, seeds = grid.tokens[at.rows[:, 0]], grid.seed[at.rows[:, 0]]  # (N, L), (N, 1)
        owner = [slot.request.choice for slot in slots for _ in slot.tokens]
        guesses = owner[0].choose(logits, tokens, at.positions, seeds)  # (N, 1)
        for choice in set(owner) - {owner[0]}:  # usually none
            own = torch.tensor([o == choice for o in owner], device=logits.device)
            guesses[own] = choice.choose(logits[own], tokens[own], at.positions[own], seeds[own])
        moved = None
        if any(slot.front for slot in slots):
            moved = latent_diff(at.read(self.before), s)[:, 0].tolist()
            at.write(self.before, s)
        guessed, first = guesses[:, 0].tolist(), 0  # the one synchronisation of the pass
        self._count(Stage.CODA, slots, len(guessed))
        for slot in slots:
            n, request = len(slot.tokens), slot.request
            cells = slice(first, first + n)
            own, first = guessed[cells], first + n
            end = slot.start + n  # prompt tokens before it have been read
            if request.state is State.PREFILL and end < len(request.prompt):
                self._open(slot, request.prompt[end : end + self.chunk])
            elif request.state is State.PREFILL:
                self._commit(slot, own[-1], request.num_steps)
            elif self.mode != "wavefront":
                grid.cache.copy_deeper(slot.row, slot.start, slot.depths)
                self._commit(slot, own[0], slot.depths[0])
            elif slot.front:
                self._advance_front(slot, own, [x < request.threshold for x in moved[cells]])
            else:
                self._advance(slot, own)

    def _advance_front(self, slot: Slot, guessed: list[int], calm: list[bool]) -> None:
        """An outer step of diffusion forcing is over."""
        request, front, start, old = slot.request, slot.front, slot.start, slot.tokens
        r = request.num_steps
        n = front.settle(guessed, calm, min(self.guess_after, r), r)
        self.grid.cache.copy_deeper(slot.row, start, [min(depth, r) for depth in front.depths[:n]])
        for token, depth in zip(guessed[:n], front.depths, strict=False):
            if not self._commit(slot, token, depth, opens=False):
                return
        widest = self.scheduler.widest(self.scheduler.slots, self.row_budget)
        left = (
            len(request.prompt) + request.max_new_tokens - 1 - start - n
        )  # positions whose prediction can be asked for
        front.move(n, min(widest, left), 1, self.grid.filler)
        self.grid.tokens[slot.row, start + n : start + n + len(front.tokens)] = upload(front.tokens, self.model.device)
        kept = [ran == token for ran, token in zip(old[n:], front.tokens, strict=False)]
        self._open(slot, front.tokens, front.depths, start + n, new=len(front.tokens) - [*kept, False].index(False))

    def _advance(self, slot: Slot, guessed: list[int]) -> None:
        """An outer step of the lossless wave is over."""
        request, start = slot.request, slot.start
        last = len(request.prompt) + request.max_new_tokens - 2  # the last position whose prediction can be asked for
        done = slot.depths[0] == request.num_steps
        widest = min(self.scheduler.widest(len(self.busy), self.row_budget), last + 1 - start - done)
        wave = next_wave(slot.tokens, slot.depths, guessed, request.num_steps, self.guess_after, widest)
        if not done or self._commit(slot, guessed[0], request.num_steps, opens=False):
            tokens, depths = wave
            position = start + done + len(tokens) - 1
            if depths[-1] == 0:
                self.grid.tokens[slot.row, position] = tokens[-1]
            self._open(slot, tokens, depths, start + done)

    def _commit(self, slot: Slot, token: int, depth: int, opens: bool = True) -> bool:
        """Make a slot's next token final, and open the position it stands at; False if the request has ended."""
        request, generation = slot.request, slot.request.generation
        position = len(request.prompt) + len(generation.tokens)
        generation.tokens.append(token)
        generation.depth.append(depth)
        request.token_times.append(self.clock())
        finished, error = token in request.stop_tokens or len(generation.tokens) == request.max_new_tokens, None
        if request.on_token is not None:
            try:
                finished |= request.on_token(token) is False
            except Exception as raised:  # the caller's function: its request fails, and no other
                finished, error = True, raised
        self._events.append(Event(request.id, token, depth, finished and error is None))
        if finished:
            self._leave(slot, State.FAILED if error else State.FINISHED, error)
            return False
        self.grid.tokens[slot.row, position] = token
        if request.state is State.PREFILL and self.mode == "wavefront" and request.threshold is not None:
            slot.front = Front([token])
        request.state = State.DECODE
        if opens:
            self._open(slot, [token], start=position)
        return True
