"""The batching engine: every request gets what it gets alone, nothing is lost, and nobody waits for ever."""

import copy
import gc
import itertools
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec import RecurrentDepthLM, adaptive_exit, autoregressive, diffusion_forcing, lossless_wavefront, tasks
from minirec.continuous_batching import MODES, Engine, Request, Stage, State
from minirec.token_choice import TokenChoice

MODE = pytest.mark.parametrize("mode", MODES)
CHOICES = ({}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 4}, {"repetition_penalty": 1.4})
REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.lists(st.integers(0, 22), min_size=1, max_size=12),
            "max_new_tokens": st.integers(1, 10),
            "num_steps": st.sampled_from([None, 2, 4]),
            "threshold": st.sampled_from([None, 0.05, 0.4, 10.0]),
            "choice": st.sampled_from(CHOICES),
            "stop": st.sampled_from([(), (5,), (1, 2, 3)]),
            "arrives": st.integers(0, 40),  # after so many passes
            "cancelled": st.sampled_from([None, None, None, 0, 3, 20]),  # so many passes later
        }
    ),
    min_size=1,
    max_size=9,
)
ENGINES = st.fixed_dictionaries(
    {
        "slots": st.integers(1, 4),
        "chunk": st.sampled_from([1, 3, 32]),
        "guess_after": st.integers(1, 4),
        "coda_batch": st.sampled_from([1, 3]),
        "row_budget": st.sampled_from([1, 6, 64]),
        "policy": st.sampled_from(["fcfs", "prefill_first"]),
        "patience": st.sampled_from([1, 5]),
        "init_scale": st.sampled_from([0.0, 1.0]),
        "kv_budget": st.sampled_from([None, 30 * 6 * 2 * 16 * 8]),  # 30 tokens: 6 layer calls, k and v, width, float64
        "cache": st.sampled_from([{}, *({"kv": "shared", "kv_slots": n} for n in (1, 2, 3, 4))]),
    }
)


def alone(model, request: dict, seed: int, mode: str = "depth", cache: dict = {}, **engine):  # noqa: B006
    """What a request gives without an engine.

    With fewer slots than steps the result depends on how a prompt is cut: for a prompt of several chunks, this is an
    engine with nothing else in it.  With more slots than a request has steps, each step has its own, as in "full".
    """
    steps, slots = request["num_steps"] or model.config.mean_recurrence, cache.get("kv_slots", 1)
    front = mode == "wavefront" and request["threshold"] is not None
    widest = max(1, engine.get("row_budget", 64) // engine.get("slots", 8))
    cache = {} if slots > steps else cache
    if cache and slots < steps and len(request["prompt"]) > engine.get("chunk", 32):
        own = {"slots": 1, "row_budget": widest if front else engine.get("row_budget", 64)}
        lonely = Engine(model, max_length=24, mode=mode, **(engine | own | cache))
        id = submit(lonely, request, seed)
        return lonely.run()[id]
    sampler, rule = autoregressive, {"init_scale": engine.get("init_scale", 1.0)} | cache
    guess_after = min(engine.get("guess_after", 1), steps)
    if request["threshold"] is not None and not front:
        sampler, rule = adaptive_exit, rule | {"threshold": request["threshold"]}
    elif front:
        waves = {"exit_threshold": request["threshold"], "inner_steps": guess_after, "max_wavefront": widest}
        sampler, rule = diffusion_forcing, {"kv": "full"} | rule | waves | {"momentum": 0.0}
    elif mode == "wavefront" and cache and slots < steps:  # tokens of its own: a position reads what no column would
        sampler, rule = lossless_wavefront, rule | {"guess_after": guess_after}
    return sampler.generate(
        model, request["prompt"], request["max_new_tokens"], num_steps=request["num_steps"], seed=seed,
        stop_tokens=request["stop"], **rule, **request["choice"],
    )  # fmt: skip


def submit(engine: Engine, request: dict, seed: int, **more) -> int:
    return engine.submit(
        request["prompt"], request["max_new_tokens"], num_steps=request["num_steps"], threshold=request["threshold"],
        seed=seed, stop_tokens=request["stop"], **request["choice"], **more,
    )  # fmt: skip


def serve(model, mode: str, requests: list[dict], cache: dict = {}, **options) -> tuple[Engine, dict, list]:  # noqa: B006
    """Drive an engine through arrivals and cancellations; returns it, the number of each id, and all events."""
    engine, ids, events = Engine(model, max_length=24, mode=mode, **options, **cache), {}, []
    for now in itertools.count():
        for number, request in enumerate(requests):
            if request["arrives"] == now:
                ids[submit(engine, request, number)] = number
            if request["cancelled"] is not None and now == request["arrives"] + request["cancelled"]:
                engine.cancel(next(id for id, n in ids.items() if n == number))
        busy = engine.step()
        events += engine.events()
        if not busy and now > 70:
            return engine, ids, events


def check_serves(model, mode, requests, **options) -> None:
    if mode == "wavefront" and options.get("cache"):  # the width of a lossless wave then decides about its tokens
        options["row_budget"] = 64
    engine, ids, events = serve(model, mode, requests, **options)
    assert not engine.busy and not engine.scheduler.waiting
    assert sorted(engine.free) == list(range(len(engine.free))), "every slot has come back"
    assert sorted(ids.values()) == list(range(len(requests)))
    for id, number in ids.items():
        request, right = engine.requests[id], alone(model, requests[number], number, mode, **options)
        assert request.state in (State.FINISHED, State.CANCELLED)
        if requests[number]["cancelled"] is None:
            assert request.state is State.FINISHED
        n = len(request.generation.tokens)
        assert request.generation.tokens == right.tokens[:n] and request.generation.depth == right.depth[:n]
        assert request.state is State.CANCELLED or n == len(right.tokens)
        own = [event for event in events if event.request == id]
        assert [event.token for event in own if event.token is not None] == request.generation.tokens
        assert [event.finished for event in own] == [False] * (len(own) - 1) + [True], "ended once, and at the end"


@MODE
@given(st.integers(0, 3), REQUESTS, ENGINES)
@settings(max_examples=13)
def test_every_request_gets_what_it_gets_alone(small_model, mode, seed, requests, options):
    check_serves(small_model(seed), mode, requests, **options)


@pytest.mark.slow
@MODE
@given(st.integers(0, 3), REQUESTS, ENGINES)
@settings(max_examples=125)
def test_every_request_gets_what_it_gets_alone_500_times(small_model, mode, seed, requests, options):
    check_serves(small_model(seed), mode, requests, **options)


@pytest.mark.parametrize("num_steps", [None, 5, 3])
@pytest.mark.parametrize("guess_after", [1, 2])
@pytest.mark.parametrize("row_budget", [6, pytest.param(64, marks=pytest.mark.slow)])
def test_a_wave_with_a_threshold_is_diffusion_forcing(small_model, guess_after, row_budget, num_steps):
    """Guesses that change while a position is deep, windows of many widths, cancelled requests, shared slots."""
    for seed in range(3):
        model = small_model(seed, mean_recurrence=6)
        requests = [
            r | {"threshold": (0.02, 0.2, 0.6)[i % 3], "num_steps": num_steps, "cancelled": 40 if i == 4 else None}
            for i, r in enumerate(plain(8, new=12))
        ]
        for cache in ({}, {"kv": "shared", "kv_slots": 1 + 2 * seed}) if row_budget == 64 else ({},):
            check_serves(
                model, "wavefront", requests, slots=3, guess_after=guess_after, row_budget=row_budget, cache=cache
            )


@MODE
def test_every_request_gets_what_it_gets_alone_from_the_shipped_model(mode):
    model, steps = RecurrentDepthLM.from_pretrained("tiny"), 8
    engine = Engine(model, slots=4, max_length=200, mode=mode, num_steps=steps, chunk=16)
    problems = [
        p for family in tasks.FAMILIES for p in tasks.heldout(4, family=family, level=tasks.FAMILIES[family][1])
    ]
    rule = {} if mode == "wavefront" else {"threshold": 0.2}
    ids = [engine.submit(p.prompt, 24, **rule) for p in problems]
    got = engine.run()
    for id, problem in zip(ids, problems, strict=True):
        sampler = lossless_wavefront if mode == "wavefront" else adaptive_exit
        how = {"guess_after": 1} if mode == "wavefront" else rule
        right = sampler.generate(model, problem.prompt, 24, num_steps=steps, **how)
        assert (got[id].tokens, got[id].depth) == (right.tokens, right.depth)


@MODE
def test_shared_slots_give_what_a_request_gets_alone_whenever_it_arrives(small_model, mode):
    """Cells of several depths in one pass, each with slots of its own."""
    for seed in range(3):
        rng = random.Random(seed)
        requests = [
            r | {"arrives": rng.randint(0, 30), "threshold": rng.choice([None, None, 0.3])} for r in plain(8, new=8)
        ]
        cache = {"kv": "shared", "kv_slots": 2 + seed % 3}
        check_serves(small_model(seed), mode, requests, slots=3, coda_batch=1, cache=cache)


def plain(n: int, new: int = 6) -> list[dict]:
    rng = random.Random(n)
    common = {"num_steps": None, "threshold": 0.3, "choice": {}, "stop": (), "arrives": 0, "cancelled": None}
    return [common | {"prompt": [rng.randrange(23) for _ in range(1 + i % 7)], "max_new_tokens": new + i % 5}
            for i in range(n)]  # fmt: skip


def test_modes_differ_in_passes_and_not_in_tokens(small_model):
    """Fewer recurrent passes from static to sequence to depth, and with a wave of every slot fewer still."""
    passes, tokens = {}, {}
    for mode in MODES:
        engine, ids, _ = serve(small_model(0), mode, [r | {"threshold": None} for r in plain(12)], slots=3)
        passes[mode] = engine.passes[Stage.RECUR]
        tokens[mode] = {n: engine.requests[id].generation.tokens for id, n in ids.items()}
    assert passes["static"] > passes["sequence"] >= passes["depth"] > passes["wavefront"]
    assert all(t == tokens["static"] for t in tokens.values())
    by_depth = {mode: serve(small_model(0), mode, plain(12), slots=3)[0].passes[Stage.RECUR] for mode in MODES[:3]}
    assert by_depth["sequence"] > by_depth["depth"], "slots that exit early do not wait"


def test_a_long_prompt_holds_nobody_up_for_more_than_a_chunk(small_model):
    largest = []
    engine = Engine(small_model(0), slots=2, max_length=48, chunk=4, on_pass=lambda p: largest.append(p.cells))
    engine.submit([1], 12)
    engine.submit(list(range(20)) * 2, 3)
    times = [e.request for e in engine.stream() if e.token is not None]
    assert max(largest) <= 4 + 1
    assert times.index(1) > 5, "tokens of the short one came while the long prompt was being read"


def test_prefill_first_reads_prompts_before_it_writes_and_starves_nobody(small_model):
    def order(policy, patience=6):
        engine = Engine(small_model(0), slots=3, max_length=48, policy=policy, chunk=2, patience=patience)
        for prompt in ([1], list(range(20)), [2] * 15):
            engine.submit(prompt, 8, stop_tokens=())
        return [event.request for event in engine.stream()]

    fair, eager = order("fcfs"), order("prefill_first")
    assert Counter(fair) == Counter(eager) == {0: 8, 1: 8, 2: 8}
    assert eager.index(1) < fair.index(1)
    assert eager[1] == 0, "the first goes on now and then, though prompts are being read"
    assert order("prefill_first", patience=1000)[1] != 0


def test_the_first_in_line_is_not_passed_over(small_model):
    """A small request would fit into the budget at once; the big one before it is admitted first."""
    model = small_model(0)
    per_token = Engine(model, slots=1, max_length=24).kv_bytes
    engine = Engine(model, slots=4, max_length=24, kv_budget=24 * per_token)
    ids = [engine.submit([1] * 4, 10), engine.submit([2] * 4, 16), engine.submit([3], 2)]
    engine.run()
    admitted = [engine.requests[id].admitted for id in ids]
    assert admitted == sorted(admitted)
    assert engine.requests[ids[1]].admitted >= engine.requests[ids[0]].ended


@MODE
def test_cancel_takes_effect_within_one_step(small_model, mode):
    engine = Engine(small_model(0), slots=2, max_length=24, mode=mode)
    ids = [engine.submit([i + 1] * 3, 15, stop_tokens=()) for i in range(4)]
    while not engine.requests[ids[0]].generation.tokens:
        engine.step()
    had = len(engine.requests[ids[0]].generation.tokens)
    assert engine.cancel(ids[0]) and engine.cancel(ids[3])
    engine.step()
    for id in (ids[0], ids[3]):
        assert engine.requests[id].state is State.CANCELLED
    assert len(engine.requests[ids[0]].generation.tokens) == had
    got = engine.run()
    assert [len(got[id].tokens) for id in ids[1:3]] == [15, 15] and got[ids[3]].tokens == []
    assert not engine.cancel(ids[1]), "it has ended"
    with pytest.raises(KeyError):
        engine.cancel(99)


def test_a_request_that_fails_fails_alone(small_model):
    engine = Engine(small_model(0), slots=2, max_length=24)

    def broken(token):
        raise RuntimeError("the caller's own")

    bad = engine.submit([1, 2], 5, on_token=broken)
    told = engine.submit([1, 2], 5, on_token=lambda token: False)
    good = engine.submit([1, 2], 5, stop_tokens=())
    got = engine.run()
    assert engine.requests[bad].state is State.FAILED and str(engine.requests[bad].error) == "the caller's own"
    assert engine.requests[told].state is State.FINISHED and len(got[told].tokens) == 1
    assert len(got[good].tokens) == 5 and sorted(engine.free) == [0, 1]


class Cut(BaseException):
    """An interrupt."""


@contextmanager
def interrupted(when: Callable[[str, int], bool]):
    """Raise Cut before the first line of the package that `when` says, of its file and number."""

    def in_function(frame, event, arg):
        if event == "line" and when(frame.f_code.co_filename, frame.f_lineno):
            sys.settrace(before)
            raise Cut(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return in_function

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: in_function if "/minirec/" in frame.f_code.co_filename else None)
    try:
        yield
    finally:
        sys.settrace(before)


def after(lines: int) -> Callable[[str, int], bool]:
    left = itertools.count(lines, -1)
    return lambda *_: next(left) <= 0


@contextmanager
def timed(seconds: float):
    """Raise Cut after so many seconds, between any two instructions."""

    def cut(*_):
        raise Cut

    before = signal.signal(signal.SIGALRM, cut)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mixed(rng: random.Random, n: int) -> list[dict]:
    """Requests of all kinds, as `submit` takes them."""
    return [
        {
            "prompt": [rng.randrange(23) for _ in range(rng.randint(1, 6))], "max_new_tokens": rng.randint(1, 5),
            "num_steps": rng.choice([None, 2]), "threshold": rng.choice([None, 0.3]),
            "choice": rng.choice(CHOICES), "stop": rng.choice([(), (5, 1)]),
        } for _ in range(n)
    ]  # fmt: skip


def check_interrupts(model, mode: str, seed: int, cuts: Iterator, exact: bool = True) -> None:
    """Cut an engine on its way by each of `cuts`; all is as if nothing had happened."""
    rng = random.Random(seed)
    requests = mixed(rng, 6)
    options = {"slots": 2, "max_length": 24, "mode": mode, "chunk": 3, "coda_batch": rng.choice([1, 2])}
    options |= {"policy": rng.choice(["fcfs", "prefill_first"])}
    if rng.random() < 0.5 and mode != "wavefront":  # where the company does not change a width
        options |= {"kv": "shared", "kv_slots": rng.randint(1, 4)}
    calm = Engine(model, **options)
    right = [submit(calm, request, i) for i, request in enumerate(requests)]
    calm.run()
    engine, heard, events = Engine(model, **options), [[] for _ in requests], []
    ids = [submit(engine, request, i, on_token=heard[i].append) for i, request in enumerate(requests[:5])]
    for number, cut in enumerate(cuts):
        if number == 2:
            ids.append(submit(engine, requests[5], 5, on_token=heard[5].append))
        try:
            with cut:
                if rng.random() < 0.5:
                    for event in engine.stream():
                        events.append(event)
                while engine.step():
                    events += engine.events()
        except Cut:
            pass
    events += engine.stream()
    assert not engine.busy and not engine.scheduler.waiting and sorted(engine.free) == [0, 1]
    for id, expected, told in zip(ids, right, heard, strict=True):
        got, alone = engine.requests[id], calm.requests[expected]
        assert (got.state, got.error, got.generation) == (alone.state, None, alone.generation)
        own = [event for event in events if event.request == id]
        if exact:
            assert told == got.generation.tokens == [event.token for event in own]
            assert [event.finished for event in own] == [False] * (len(own) - 1) + [True]


@MODE
@pytest.mark.parametrize("visit", [1, 4])
def test_an_interrupt_at_any_line_costs_nothing(small_model, mode, visit):
    """Cut at every line of the package that the engine runs, when it comes there for the first or the fourth time."""
    lines, cut = Counter(), 0

    def now(*line) -> bool:
        nonlocal cut
        lines[line] += 1
        cut += lines[line] == visit
        return lines[line] == visit

    for seed in range(3):
        check_interrupts(small_model(0), mode, seed, (interrupted(now) for _ in range(400)))
    assert cut > 200


def test_an_interrupt_of_submit_or_cancel_leaves_nothing_half_done(small_model):
    """A request that was cut on its way in is there and runs, or is not there at all."""
    engine, accepted = Engine(small_model(0), slots=2, max_length=24), 0
    for lines in itertools.count():
        try:
            with interrupted(after(lines)):
                accepted += engine.submit([1, 2], 2, stop_tokens=()) >= 0
        except Cut:
            pass
        assert set(engine.requests) == set(engine.scheduler.waiting)
        if accepted == 3:
            break
    for lines, id in enumerate([engine.submit([3], 2) for _ in range(8)]):
        try:
            with interrupted(after(lines)):
                engine.cancel(id)
        except Cut:
            pass
    engine.run()
    states = Counter(request.state for request in engine.requests.values())
    assert set(states) == {State.FINISHED, State.CANCELLED} and not engine.busy and not engine.scheduler.waiting


@pytest.mark.slow
@MODE
def test_500_episodes_of_interrupts(small_model, mode):
    for seed in range(500):
        rng, timer = random.Random(seed), seed % 4 == 0
        # between any two instructions the list of events may lose what it was to be given: only results are certain
        cuts = (timed(rng.uniform(0, 0.03)) if timer else interrupted(after(rng.randint(0, 3000))) for _ in range(4))
        check_interrupts(small_model(seed % 3), mode, 1000 + seed, cuts, exact=not timer)


@MODE
@pytest.mark.parametrize("callback", ["on_pass", "clock"])
def test_an_exception_out_of_a_callback_of_the_engine_loses_nothing(small_model, mode, callback):
    rng = random.Random(3)
    requests = mixed(rng, 6)

    def run(moody: bool) -> list[Request]:
        calls = itertools.count(1)

        def call(*_) -> int:
            n = next(calls)
            if moody and n > 6 and n % 3 == 0:
                raise OSError("not now")
            return n

        engine = Engine(small_model(0), slots=2, max_length=24, mode=mode, **{callback: call})
        ids = [submit(engine, request, i) for i, request in enumerate(requests)]
        failures = 0
        while True:
            try:
                engine.run()
            except OSError:
                failures += 1
            else:
                assert moody == (failures > 5)
                return [engine.requests[id] for id in ids]

    for got, right in zip(run(True), run(False), strict=True):
        assert (got.state, got.generation) == (State.FINISHED, right.generation)


@MODE
def test_an_interrupt_out_of_on_token_loses_nothing_and_repeats_nothing(small_model, mode):
    engine, heard = Engine(small_model(0), slots=2, max_length=24, mode=mode), []

    def interrupt(token):
        heard.append(token)
        raise KeyboardInterrupt

    ids = [engine.submit([1, 2], 6, stop_tokens=(), on_token=interrupt), engine.submit([3], 6, stop_tokens=())]
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            engine.run()
    got = engine.run()
    for id, prompt in zip(ids, ([1, 2], [3]), strict=True):
        assert got[id].tokens == autoregressive.generate(small_model(0), prompt, 6, stop_tokens=()).tokens
    assert heard == got[ids[0]].tokens


def test_callbacks_may_submit_and_cancel_and_nothing_else(small_model):
    engine, refused, later = Engine(small_model(0), slots=2, max_length=24), [], []

    def call(token):
        for forbidden in (engine.step, engine.run, lambda: next(engine.stream())):
            with pytest.raises(RuntimeError, match="within a step"):
                forbidden()
            refused.append(forbidden)
        engine.events()
        if not later:
            later.append(engine.submit([4], 2, stop_tokens=()))
            engine.cancel(victim)

    first = engine.submit([1, 2], 5, stop_tokens=(), on_token=call)
    victim = engine.submit([3], 10, stop_tokens=())
    engine.on_pass = lambda _: call(None)
    engine.run()
    assert engine.requests[first].state is engine.requests[later[0]].state is State.FINISHED
    assert engine.requests[first].error is None and len(refused) > 15
    assert engine.requests[victim].state is State.CANCELLED


def test_cancelling_takes_constant_time(small_model):
    """Calls of any kind, C's included, to cancel half of n waiting requests: for 8 times n, 8 times as many."""

    def calls(n: int) -> int:
        engine, made = Engine(small_model(0), slots=2, max_length=24), 0
        ids = [engine.submit([1], 1) for _ in range(n)]

        def count(*_):
            nonlocal made
            made += 1

        sys.setprofile(count)
        try:
            for id in ids[::-2]:
                engine.cancel(id)
            engine.step()
        finally:
            sys.setprofile(None)
        assert sum(engine.requests[id].state is State.CANCELLED for id in ids) == n // 2
        return made

    assert calls(3200) < 10 * calls(400)


@MODE
def test_logits_that_are_not_finite_fail_their_request_alone(small_model, mode):
    """Also what sits in the same row later is not touched by what was left there."""
    model = copy.deepcopy(small_model(0, tie_embeddings=False))
    model.transformer.wte.weight[22] = float("nan")
    model.lm_head.weight[22] = model.lm_head.weight[21]  # the smaller of two equal tokens wins: nobody else meets it
    engine = Engine(model, slots=2, max_length=24, mode=mode, chunk=2)
    prompts = [[1, 2, 3], [4, 22, 5, 6, 7, 8, 9], [2], [22], [3, 3], [7, 8, 9]]
    ids = [engine.submit(prompt, 6, stop_tokens=()) for prompt in prompts]
    got = engine.run()
    for id, prompt in zip(ids, prompts, strict=True):
        if 22 in prompt:
            assert engine.requests[id].state is State.FAILED and got[id].tokens == []
            with pytest.raises(FloatingPointError, match=f"logits are not finite at position {len(prompt) - 1}"):
                raise engine.requests[id].error
        else:
            assert got[id].tokens == autoregressive.generate(model, prompt, 6, stop_tokens=()).tokens


@MODE
def test_a_choice_that_fails_in_a_pass_fails_alone(small_model, mode, monkeypatch):
    choose = TokenChoice.choose

    def broken(self, logits, *rest):
        if self.temperature == 0.75 and logits.shape[-1] > 2:
            raise RuntimeError("this choice does not work")
        return choose(self, logits, *rest)

    monkeypatch.setattr(TokenChoice, "choose", broken)
    for order in ([0.75, 0.0, 0.5], [0.0, 0.75, 0.5], [0.75, 0.75, 0.75]):
        engine = Engine(small_model(0), slots=3, max_length=24, mode=mode)
        ids = [engine.submit([1, 2], 4, stop_tokens=(), temperature=t, seed=i) for i, t in enumerate(order)]
        got, events = engine.run(), engine.events()
        assert events == [] and sorted(engine.free) == [0, 1, 2]
        for i, (id, t) in enumerate(zip(ids, order, strict=True)):
            if t == 0.75:
                assert (
                    engine.requests[id].state is State.FAILED
                    and str(engine.requests[id].error) == "this choice does not work"
                )
            else:
                right = autoregressive.generate(small_model(0), [1, 2], 4, stop_tokens=(), temperature=t, seed=i)
                assert got[id].tokens == right.tokens


def test_a_choice_that_cannot_work_is_refused_when_it_is_submitted(small_model, monkeypatch):
    engine = Engine(small_model(0), slots=2, max_length=24)
    monkeypatch.setattr(TokenChoice, "choose", lambda self, *_: 1 / 0)
    with pytest.raises(ValueError, match=r"temperature=0.5.* cannot choose a token: division by zero"):
        engine.submit([1, 2], 4, temperature=0.5)
    assert not engine.requests and not engine.scheduler.waiting


def test_submit_and_cancel_from_another_thread(small_model):
    engine, ids = Engine(small_model(0), slots=2, max_length=24), []

    def client():
        for i in range(20):
            ids.append(engine.submit([i + 1], 4, stop_tokens=()))
            if i % 5 == 4:
                engine.cancel(ids[-1])

    thread = threading.Thread(target=client)
    thread.start()
    while thread.is_alive() or engine.step():
        engine.step()
    thread.join()
    engine.run()
    assert all(engine.requests[id].ended is not None for id in ids) and len(ids) == 20
    for id in ids:
        if engine.requests[id].state is State.FINISHED:
            right = autoregressive.generate(small_model(0), engine.requests[id].prompt, 4, stop_tokens=())
            assert engine.requests[id].generation.tokens == right.tokens


def test_who_stops_listening_and_comes_back_has_missed_nothing(small_model):
    engine = Engine(small_model(0), slots=4, max_length=24, mode="sequence")
    ids = [engine.submit([1 + i, 2], 5, stop_tokens=()) for i in range(4)]
    heard = [next(engine.stream()) for _ in range(7)]  # a stream of its own for each
    heard += engine.stream()
    for id in ids:
        assert [e.token for e in heard if e.request == id] == engine.requests[id].generation.tokens


def test_times_are_in_order_and_of_the_engines_clock(small_model):
    clock = itertools.count()
    engine = Engine(small_model(0), slots=1, max_length=24, clock=lambda: next(clock))
    ids = [engine.submit([1, 2], 4, stop_tokens=()) for _ in range(3)]
    engine.run()
    for id in ids:
        r = engine.requests[id]
        stamps = [r.submitted, r.admitted, *r.token_times, r.ended]
        assert stamps == sorted(stamps) and len(r.token_times) == 4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["depth", "wavefront"])
def test_ten_thousand_requests(small_model, mode):
    """Random arrivals, lengths and cancellations: none lost, none twice, everything returned."""
    rng, model = random.Random(0), small_model(0, dtype=torch.float32)
    engine, ids, requests = Engine(model, slots=8, max_length=24, mode=mode, num_steps=2), [], {}
    ended, objects = Counter(), {}
    while len(ids) < 5000 or engine.busy or engine.scheduler.waiting:
        while len(ids) < 5000 and len(engine.scheduler.waiting) < 12 and rng.random() < 0.7:
            prompt = [rng.randrange(23) for _ in range(rng.randint(1, 8))]
            threshold = rng.choice([None, 0.3])
            ids.append(engine.submit(prompt, rng.randint(1, 3), seed=len(ids), threshold=threshold))
            if rng.random() < 0.1 and (unlucky := rng.choice(ids[-9:])) in engine.requests:
                engine.cancel(unlucky)
            if len(ids) in (1000, 5000):
                gc.collect()
                objects[len(ids)] = len(gc.get_objects())
        engine.step()
        for event in engine.events():
            if event.finished:
                ended[event.request] += 1
                request = engine.requests.pop(event.request)
                requests[event.request] = (request.state.name, request.admitted)
    assert ended == Counter(ids) and not engine.requests
    assert sorted(engine.free) == list(range(8))
    assert objects[5000] - objects[1000] < 4000 * 0.2, "what ended and was taken out leaves nothing behind"
    states = Counter(state for state, _ in requests.values())
    assert set(states) == {"FINISHED", "CANCELLED"} and states["CANCELLED"] > 100
    order = [requests[id][1] for id in ids if requests[id][1] is not None]
    assert order == sorted(order), "first come, first served"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mode": "fast"}, "mode is 'fast'; it must be one of 'static', 'sequence', 'depth', 'wavefront'"),
        ({"policy": "last"}, "policy is 'last'; it must be 'fcfs' or 'prefill_first'"),
        ({"slots": 0}, "slots is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"guess_after": 5}, "guess_after is 5; it must be from 1 to num_steps, here 4"),
        ({"max_length": 49}, "max_length is 49; it must be from 2 to the context, 48"),
        ({"max_length": 1}, "max_length is 1; it must be from 2 to the context, 48"),
    ],
)
def test_a_bad_engine_is_refused(small_model, wrong, named):
    with pytest.raises(ValueError, match=named):
        Engine(small_model(0), **{"max_length": 24} | wrong)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1, 23]}, "prompt holds 23; token ids are from 0 to 22"),
        ({"max_new_tokens": 23}, "prompt of 2 tokens and max_new_tokens 23 make 25; the context is 24 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        (
            {"max_new_tokens": 20},
            r"a prompt of 2 tokens and max_new_tokens 20 need 33,792 bytes .* kv_budget is 30,000",
        ),
        ({"num_steps": 5}, "num_steps is 5; this engine's cache is 4 steps deep"),
        ({"threshold": -1.0}, "threshold is -1.0; it must be a number, at least 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"seed": None}, "seed is None; it must be a whole number"),
        ({"seed": [1]}, r"seed is \[1\]; it must be a whole number"),
        ({"stop_tokens": 1.5}, "stop_tokens is 1.5"),
        ({"kv": "shared"}, "kv is the engine's to choose"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_goes_on(small_model, wrong, named):
    engine = Engine(small_model(0), slots=2, max_length=24, kv_budget=30_000)
    good = engine.submit([1, 2], 3, stop_tokens=())
    with pytest.raises(ValueError, match=named):
        engine.submit(**{"prompt": [1, 2], "max_new_tokens": 3} | wrong)
    assert len(engine.run()[good].tokens) == 3 and len(engine.requests) == 1
