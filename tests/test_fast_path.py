"""The fast path: fixed shapes give the tokens, states and counts of the plain path; and on a GPU, graphs do."""

import warnings

import pytest
import torch

from minirec import (
    RecurrentDepthLM,
    adaptive_exit,
    autoregressive,
    diffusion_forcing,
    lossless_wavefront,
    speculative,
    tasks,
)
from minirec.continuous_batching import Engine
from minirec.decoding import Grid
from minirec.fast_path import FastPath

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
SAMPLERS = {
    "autoregressive": (autoregressive, {}),
    "adaptive exit": (adaptive_exit, {"threshold": 0.1}),
    "adaptive exit by output": (adaptive_exit, {"criterion": "argmax-stability", "threshold": 1}),
    "speculative": (speculative, {"draft_steps": 2, "lookahead": 3}),
    "lossless wavefront": (lossless_wavefront, {"guess_after": 1}),
    "lossless wavefront, uneven": (lossless_wavefront, {"guess_after": 3}),
    "diffusion forcing": (diffusion_forcing, {"inner_steps": 1, "exit_threshold": 0.1}),
    "diffusion forcing, fixed": (diffusion_forcing, {"inner_steps": 2, "schedule": "fixed", "headway": 2}),
    "diffusion forcing, narrow": (diffusion_forcing, {"inner_steps": 1, "max_wavefront": 3, "noise": 0.2}),
}
PROMPTS = {1: [3, 1, 4, 1, 5], 3: [[3, 1, 4, 1, 5], [9], [2, 6, 5]]}
CACHES = pytest.mark.parametrize("cache", [{"kv": "full"}, {"kv": "shared"}, {"kv": "shared", "kv_slots": 2}],
                                 ids=["full", "shared", "two slots"])  # fmt: skip


def as_list(generations) -> list:
    return generations if isinstance(generations, list) else [generations]


@DEVICES
@CACHES
@pytest.mark.parametrize("batch", PROMPTS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_the_same_with_fixed_shapes(small_model, name, batch, cache, device):
    """float64: rounding, which depends on shapes, can't decide between two tokens."""
    sampler, settings = SAMPLERS[name]
    model = small_model(1).to(device)
    common = dict(stop_tokens=(), trace=True, temperature=0.8, seed=5, **cache)
    plain, fast = (
        as_list(sampler.generate(model, PROMPTS[batch], 16, fast=fast, **settings, **common)) for fast in (False, True)
    )
    assert fast == plain, "tokens, depths, counts of passes, and every outer step"


@pytest.mark.parametrize("kv", ["full", "shared"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["autoregressive", "adaptive exit", "lossless wavefront", "diffusion forcing"])
def test_also_in_float32_on_the_shipped_model(name, batch, kv):
    sampler, settings = SAMPLERS[name]
    model = RecurrentDepthLM.from_pretrained("tiny").requires_grad_(False)
    problems = tasks.heldout(2, family="words") + tasks.heldout(1, family="hops")
    prompts = [p.prompt for p in problems] if batch == 3 else problems[0].prompt
    plain, fast = (
        as_list(sampler.generate(model, prompts, 40, fast=fast, kv=kv, **settings)) for fast in (False, True)
    )
    assert [g.tokens for g in fast] == [g.tokens for g in plain]


@pytest.mark.parametrize("sampler", [autoregressive, lossless_wavefront], ids=["ar", "lossless"])
def test_past_a_length_where_attention_gets_longer(small_model, sampler):
    model = small_model(2, block_size=160)
    plain, fast = (sampler.generate(model, [7] * 50, 100, stop_tokens=(), fast=fast) for fast in (False, True))
    assert fast.tokens == plain.tokens and len(fast.tokens) == 100


def test_states_and_logits_are_those_of_the_plain_path(small_model):
    model, found = small_model(0), []
    for fast in (False, True):
        grid = Grid(model, [[1, 2, 3], [4, 5]], max_new_tokens=8, spare=3, fast=fast)
        grid.prefill()
        at = grid.window([3, 2], 3)
        e = grid.embed(at)
        s = grid.recur(at.read(grid.state), e, at, 0)
        kept = s.clone()
        t = grid.recur(s, e, at, torch.tensor([[1, 0, 0], [2, 1, 0]]))
        assert torch.equal(s, kept), "a step must not write into what the one before gave"
        found.append((e, s, t, grid.decode(t, at)))
    for plain, fast in zip(*found, strict=True):
        assert fast.shape == plain.shape
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


def shapes_seen(monkeypatch) -> list[tuple]:
    """Collects (function, width, end) of all that runs with fixed shapes from now on."""
    seen, call = [], FastPath.__call__

    def note(self, at, work, *inputs):
        def noted(window, *rest):
            if window is not at:
                seen.append((work.__name__, window.width, window.end))
            return work(window, *rest)

        noted.__name__ = work.__name__
        return call(self, at, noted, *inputs)

    monkeypatch.setattr(FastPath, "__call__", note)
    return seen


def test_the_fast_path_is_taken_and_its_shapes_are_few(small_model, monkeypatch):
    seen = shapes_seen(monkeypatch)
    model = small_model(1, mean_recurrence=12, block_size=200)
    generation = diffusion_forcing.generate(
        model, [1, 2], 150, inner_steps=1, schedule="fixed", stop_tokens=(), kv="shared", fast=True
    )
    assert sum(work == "_recur" for work, _, _ in seen) == generation.passes - 12, "all but the prompt's steps"
    assert {width for _, width, _ in seen} == {1, 2, 4, 8, 16}
    assert {end for _, _, end in seen} == {64, 128, 192}


def test_plain_is_the_default(small_model, monkeypatch):
    seen = shapes_seen(monkeypatch)
    autoregressive.generate(small_model(1), [1, 2], 4)
    assert not seen


def test_a_prompt_of_one_token_and_one_new_token(small_model):
    model = small_model(1)
    for new in (1, 2):
        plain, fast = (autoregressive.generate(model, [3], new, fast=fast) for fast in (False, True))
        assert fast == plain


@pytest.mark.parametrize("name", ["autoregressive", "lossless wavefront", "diffusion forcing, narrow"])
def test_up_to_the_end_of_the_context(small_model, name):
    """The widest window that can be, at the last positions there are: nothing is written past the cache."""
    model = small_model(1, block_size=64)
    sampler, settings = SAMPLERS[name]
    plain, fast = (
        sampler.generate(model, [5] * 40, 24, stop_tokens=(), fast=fast, **settings) for fast in (False, True)
    )
    assert fast == plain


# --- waiting for the GPU ------------------------------------------------------------------------------------------

LOOPS = ["autoregressive", "speculative", "lossless wavefront", "lossless wavefront, uneven", "diffusion forcing",
         "diffusion forcing, fixed", "diffusion forcing, narrow"]  # fmt: skip


class Reads(torch.overrides.TorchFunctionMode):
    """Counts what makes the host wait on a GPU: numbers taken out of tensors, and tensors made there from numbers."""

    WAIT = (
        "tolist",
        "item",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "nonzero",
        "cpu",
        "numpy",
        "__contains__",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made_there = function is torch.tensor and (kwargs or {}).get("device") is not None
        self.count += made_there or getattr(function, "__name__", "") in self.WAIT
        return function(*args, **(kwargs or {}))


def reads_and_outer_steps(model, name: str, batch: int, new: int, **options) -> tuple[int, int]:
    sampler, settings = SAMPLERS[name]
    with Reads() as reads:
        generations = sampler.generate(
            model, PROMPTS[batch], new, stop_tokens=(), trace=True, fast=True, **settings, **options
        )
    return reads.count, max(len(g.trace) for g in as_list(generations))


@pytest.mark.parametrize("kv", ["full", "shared"])
@pytest.mark.parametrize("batch", PROMPTS)
@pytest.mark.parametrize("name", LOOPS)
def test_an_outer_step_reads_numbers_once(small_model, name, batch, kv):
    model = small_model(1)
    before, few = reads_and_outer_steps(model, name, batch, 6, kv=kv)
    after, many = reads_and_outer_steps(model, name, batch, 18, kv=kv)
    assert many > few
    assert after - before <= many - few


@pytest.mark.parametrize("batch", PROMPTS)
def test_adaptive_exit_reads_numbers_once_a_check(small_model, batch):
    reads, _ = reads_and_outer_steps(small_model(1), "adaptive exit", batch, 20)
    generations = as_list(adaptive_exit.generate(small_model(1), PROMPTS[batch], 20, stop_tokens=(), threshold=0.1))
    assert reads <= generations[0].passes + 20 + 10  # checks, tokens, the beginning


@CUDA
@pytest.mark.parametrize("batch", PROMPTS)
@pytest.mark.parametrize("name", LOOPS)
def test_an_outer_step_waits_for_the_gpu_once(small_model, name, batch):
    model, found = small_model(1).cuda(), []
    sampler, settings = SAMPLERS[name]
    for new in (6, 26):
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:  # without graphs: capturing one waits, replaying it does not
                generations = sampler.generate(model, PROMPTS[batch], new, stop_tokens=(), trace=True, **settings)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append((sum("synchroniz" in str(w.message) for w in waits), len(as_list(generations)[0].trace)))
    (before, few), (after, many) = found
    assert after - before <= many - few


@CUDA
@pytest.mark.parametrize("name", SAMPLERS)
def test_in_bfloat16_graphs_give_what_the_same_steps_give_without(small_model, name, monkeypatch):
    sampler, settings = SAMPLERS[name]
    model = small_model(1, torch.bfloat16).cuda()
    replayed = sampler.generate(model, PROMPTS[1], 30, stop_tokens=(), fast=True, **settings)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)  # no pool: nothing is captured
    alone = sampler.generate(model, PROMPTS[1], 30, stop_tokens=(), fast=True, **settings)
    assert replayed.tokens == alone.tokens


@CUDA
def test_graphs_are_captured_once_and_replayed(small_model, monkeypatch):
    captured, replay = [], torch.cuda.CUDAGraph.replay
    replayed = []
    capture = torch.cuda.CUDAGraph.capture_end
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", lambda g: (captured.append(g), capture(g))[1])
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: (replayed.append(g), replay(g))[1])
    autoregressive.generate(small_model(1).cuda(), [1, 2], 20, kv="shared", stop_tokens=(), fast=True)
    assert len(captured) == 3, "prelude, recurrent block, coda"
    assert len(replayed) > 19 * 4


def test_the_engine_runs_as_it_is(small_model):
    """Its passes mix cells of any rows; it has no fast path, and says so."""
    engine = Engine(small_model(1), slots=2, max_length=40)
    with pytest.raises(ValueError, match="fast is the engine's to choose"):
        engine.submit([1, 2], 4, fast=True)
