"""The grid: windows against stored keys and values give the plain forward pass's numbers; bad arguments are named.

The arguments that all samplers share are checked here, with each sampler that there is.
"""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirec import adaptive_exit, autoregressive, diffusion_forcing, lossless_wavefront, speculative
from minirec.decoding import Grid

TOKENS = st.lists(st.integers(0, 22), min_size=2, max_size=10)
SIZES = st.sampled_from([{}, {"n_layers_in_recurrent_block": 2, "n_layers_in_prelude": 2}, {"qk_bias": False}])
SAMPLERS = pytest.mark.parametrize("sampler", [autoregressive, diffusion_forcing], ids=["ar", "df"])


def advance(grid: Grid, starts: list[int], width: int) -> torch.Tensor:
    """Take a window from its initial states to full depth: logits (B, W, V)."""
    at = grid.window(starts, width)
    s, e = at.read(grid.state), grid.embed(at)
    for depth in range(grid.num_steps):
        s = grid.recur(s, e, at, depth)
    return grid.decode(s, at)


# --- cached = uncached --------------------------------------------------------------------------------------------


@given(TOKENS, st.integers(0, 2), SIZES, st.integers(1, 5), st.data())
def test_windows_of_any_widths_give_the_plain_forward_pass(small_model, tokens, seed, sizes, num_steps, data):
    model = small_model(seed, **sizes)
    right = model(torch.tensor([tokens]), num_steps=num_steps).logits
    grid = Grid(model, tokens, max_new_tokens=1, num_steps=num_steps, kv="full")
    start = 0
    while start < len(tokens):
        width = data.draw(st.integers(1, len(tokens) - start))
        logits = advance(grid, [start], width)
        torch.testing.assert_close(logits, right[:, start : start + width], rtol=0, atol=1e-9)
        start += width


@given(TOKENS, st.integers(0, 2))
def test_also_in_float32(small_model, tokens, seed):
    model = small_model(seed, torch.float32)
    right = model(torch.tensor([tokens])).logits
    grid = Grid(model, tokens, max_new_tokens=1, kv="full")
    logits = torch.cat([advance(grid, [position], 1) for position in range(len(tokens))], dim=1)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)


def test_also_in_bfloat16(small_model):
    model = small_model(0, torch.bfloat16)
    tokens = list(range(8))
    right = model(torch.tensor([tokens])).logits
    grid = Grid(model, tokens, max_new_tokens=1, kv="full")
    assert grid.cache.parts["core"].dtype == torch.bfloat16
    logits = torch.cat([advance(grid, [position], 1) for position in range(len(tokens))], dim=1)
    assert logits.dtype == torch.float32
    assert (logits - right).norm() / right.norm() < 0.05


@given(TOKENS, st.integers(0, 2), st.integers(1, 4), st.data())
def test_rows_at_different_positions_give_the_plain_forward_pass(small_model, tokens, seed, num_steps, data):
    model = small_model(seed)
    rows = [tokens, tokens[::-1], tokens[1:] + tokens[:1]]
    right = model(torch.tensor(rows), num_steps=num_steps).logits
    starts = [data.draw(st.integers(0, len(tokens) - 1)) for _ in rows]
    width = data.draw(st.integers(1, len(tokens) - max(starts)))
    grid = Grid(model, rows, max_new_tokens=1, num_steps=num_steps, kv="full")
    if max(starts):
        advance(grid, [0, 0, 0], max(starts))
    logits = advance(grid, starts, width)
    for row, start in enumerate(starts):
        torch.testing.assert_close(logits[row], right[row, start : start + width], rtol=0, atol=1e-9)


@given(TOKENS, st.integers(0, 2), SIZES, st.integers(1, 5))
def test_a_diagonal_of_known_tokens_gives_the_plain_forward_pass(small_model, tokens, seed, sizes, num_steps):
    """Cell (t, k) only needs the cells (0..t, k) of its own depth: a diagonal is a valid order for "full"."""
    model = small_model(seed, **sizes)
    right = model(torch.tensor([tokens]), num_steps=num_steps).logits[0]
    grid = Grid(model, tokens, max_new_tokens=1, num_steps=num_steps, kv="full")
    for outer_step in range(len(tokens) + num_steps - 1):  # position t starts at outer step t
        first, last = max(0, outer_step - num_steps + 1), min(outer_step, len(tokens) - 1)
        at = grid.window([first], last - first + 1)
        depth = outer_step - at.positions
        s = grid.recur(at.read(grid.state), grid.embed(at), at, depth)
        at.write(grid.state, s)
        logits = grid.decode(s, at)[0]
        if depth[0, 0] == num_steps - 1:  # the leftmost cell is done
            torch.testing.assert_close(logits[0], right[first], rtol=0, atol=1e-9)


@given(TOKENS, st.integers(0, 2))
def test_decode_of_one_cell_is_that_cell_of_all(small_model, tokens, seed):
    grid = Grid(small_model(seed), [tokens, tokens], max_new_tokens=1)
    at = grid.window([0, 0], len(tokens))
    s = grid.recur(at.read(grid.state), grid.embed(at), at, 0)
    both = grid.decode(s, at)
    one = grid.decode(s, at, only=torch.tensor([0, len(tokens) - 1]))
    torch.testing.assert_close(one[:, 0], torch.stack([both[0, 0], both[1, -1]]), rtol=0, atol=1e-12)


def test_the_grid_starts_from_the_models_initial_state(small_model):
    model = small_model(0)
    grid = Grid(model, [[1, 2], [3, 4, 5]], max_new_tokens=4, seed=[8, 9], init_scale=0.5)
    positions = torch.arange(7)
    right = torch.stack([model.initial_state(positions, seed=s, scale=0.5) for s in (8, 9)])
    assert torch.equal(grid.state, right)


# --- arguments ----------------------------------------------------------------------------------------------------


@SAMPLERS
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": -2}, "num_steps is -2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": torch.zeros(0, dtype=torch.long)}, "prompt is empty"),
        ({"prompt": [[1, 2], []]}, "prompt is empty"),
        ({"prompt": [1, 23]}, "prompt holds 23; token ids are from 0 to 22"),
        ({"prompt": torch.tensor([1, 23])}, "prompt holds 23; token ids are from 0 to 22"),
        ({"prompt": [[1], [-1]]}, "prompt holds -1"),
        ({"prompt": [1, 2.0]}, "prompt holds 2.0"),
        ({"prompt": "text"}, "prompt is 'text'; it must be token ids, or a batch of such"),
        ({"prompt": torch.tensor(3)}, "prompt is tensor.3.; it must be token ids, or a batch of such"),
        ({"prompt": [[1, 2], 3]}, "it must be token ids, or a batch of such, and not both"),
        ({"num_steps": 2.0}, "num_steps is 2.0; it must be a whole number from 1 to 4096"),
        ({"prompt": [0] * 40, "max_new_tokens": 9}, "prompt of 40 tokens and max_new_tokens 9 make 49.*is 48"),
        ({"prompt": [[0], [0] * 48]}, "prompt of 48 tokens"),
        ({"kv": "half"}, "kv is 'half'"),
        ({"kv_slots": 0}, "kv_slots is 0"),
        ({"kv": "shared", "kv_slots": 5}, "kv_slots is 5; .* here 4"),
        ({"kv": "full", "kv_slots": 2}, "kv_slots is 2, which has no effect with kv 'full'"),
        ({"top_k": 3}, "top_k is 3, which has no effect at temperature 0"),
        ({"on_token": 3}, "on_token is 3; it must be a function, or None"),
        ({"trace": 2}, "trace is 2; it must be True or False"),
        ({"init_scale": -0.5}, "init_scale is -0.5"),
        ({"init_scale": float("nan")}, "init_scale is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 2}, "top_p is 2"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": [1, 2]}, "seed has 2 values for 1 prompts"),
        ({"seed": None}, "seed is None; it must be a whole number from -"),
        ({"seed": 2**63}, f"seed is {2**63}; it must be a whole number from -"),
        ({"stop_tokens": "2"}, "stop_tokens is '2'; it must be a whole number, at least 0"),
        ({"kv": "shared", "kv_slots": 2.0}, "kv_slots is 2.0; it must be a whole number"),
        ({"prompt": [[1], [2], [3]], "seed": [1, 2]}, "seed has 2 values for 3 prompts"),
    ],
)
def test_bad_argument_is_named_before_any_work(small_model, monkeypatch, sampler, wrong, named):
    for work in ("prefill", "embed", "recur", "decode"):
        monkeypatch.setattr(Grid, work, lambda *_: pytest.fail("work was done before the arguments were checked"))
    with pytest.raises(ValueError, match=named):
        sampler.generate(small_model(0), **({"prompt": [1, 2], "max_new_tokens": 4} | wrong))


@pytest.mark.parametrize("sampler", [autoregressive, adaptive_exit, speculative, lossless_wavefront, diffusion_forcing])
def test_numbers_may_be_of_numpy_or_torch(small_model, sampler):
    model = small_model(0)
    plain = sampler.generate(model, [1, 2, 3], 9, num_steps=3, seed=7, temperature=1.0, top_k=5, stop_tokens=[4, 5])
    for number in (np.int64, torch.tensor):
        prompt = [number(1), number(2), number(3)]
        options = dict(seed=number(7), temperature=1.0, top_k=number(5))
        for stop in (number([4, 5]), [number(4), number(5)]):
            got = sampler.generate(model, prompt, number(9), num_steps=number(3), stop_tokens=stop, **options)
            assert got == plain and all(type(x) is int for x in (*got.tokens, *got.depth))
    sampled = dict(num_steps=3, temperature=1.0, stop_tokens=4)
    batch = sampler.generate(model, np.array([[1, 2, 3]] * 2), 9, seed=np.array([7, 8]), **sampled)
    alone = [sampler.generate(model, [1, 2, 3], 9, seed=seed, **sampled) for seed in (7, 8)]
    assert [g.tokens for g in batch] == [g.tokens for g in alone]
    assert sampler.generate(model, [1, 2, 3], 9, seed=7, **sampled | {"stop_tokens": torch.tensor(4)}) == alone[0]


@pytest.mark.parametrize(
    ("sampler", "counts"),
    [
        (adaptive_exit, {"min_steps": 2, "check_every": 1}),
        (speculative, {"draft_steps": 2, "lookahead": 3}),
        (lossless_wavefront, {"guess_after": 2, "max_wavefront": 3}),
        (diffusion_forcing, {"inner_steps": 2, "max_wavefront": 3, "headway": 1}),
    ],
)
def test_so_may_a_samplers_own(small_model, sampler, counts):
    numpy = {name: np.int64(count) for name, count in counts.items()}
    got = sampler.generate(small_model(0), [1, 2, 3], 9, trace=True, **numpy)
    assert got == sampler.generate(small_model(0), [1, 2, 3], 9, trace=True, **counts)
    assert all(type(depth) is int for step in got.trace for depth in (*got.depth, *step.depths))


def test_under_autocast_decoding_says_what_to_do(small_model):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="load the model with dtype instead"):
        autoregressive.generate(small_model(0), [1, 2], 4)


ALL = pytest.mark.parametrize(
    "sampler", [autoregressive, adaptive_exit, speculative, lossless_wavefront, diffusion_forcing]
)
CHOICES = [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.95, "min_p": 0.01}, {"repetition_penalty": 1.3}]


@ALL
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_end_the_generation(small_model, sampler, choice, bad):
    """One embedding is not finite: all is well until that token is in the context."""
    model = copy.deepcopy(small_model(0, tie_embeddings=False))
    right = autoregressive.generate(model, [1, 2, 3], 20, stop_tokens=(), **choice).tokens
    broken = next(token for token in right if token not in (1, 2, 3))
    model.transformer.wte.weight[broken] = bad
    n, streamed = right.index(broken) + 1, []
    own = dict(inner_steps=4, kv="full") if sampler is diffusion_forcing else {}
    where = f"the logits at position {2 + n} are not finite after [1-8] recurrence steps.*torch.float64"
    with pytest.raises(FloatingPointError, match=where):
        sampler.generate(model, [1, 2, 3], 20, stop_tokens=(), on_token=streamed.append, **choice, **own)
    assert len(streamed) == n and streamed[-1] == broken
    if sampler not in (adaptive_exit, diffusion_forcing):
        assert streamed == right[:n], "the tokens before it are right"
    assert sampler.generate(model, [1, 2, 3], 20, stop_tokens=[broken], **choice, **own).tokens == streamed
    with pytest.raises(FloatingPointError, match="the logits at position 2 of prompt 1 are not finite after 4 "):
        sampler.generate(model, [[1, 2], [1, broken, 3]], 1, **choice)


@ALL
def test_overflow_of_a_narrow_format_is_said(small_model, sampler):
    model = copy.deepcopy(small_model(0, torch.float16))
    model.lm_head.weight *= 1e5
    with pytest.raises(FloatingPointError, match=r"position 1 are not finite .* overflow in torch.float16"):
        sampler.generate(model, [1, 2], 4)


@ALL
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(small_model, sampler, default):
    model, own = small_model(0, torch.float32), {}
    if sampler is diffusion_forcing:
        own = dict(noise=0.3, momentum=0.3, schedule="acceleration", exit_threshold=0.3)
    if sampler is adaptive_exit:
        own = dict(exit_in_prefill=True, threshold=0.3)
    for choice in CHOICES:
        options = dict(trace=True, stop_tokens=(), init_scale=0.7) | choice | own
        right = sampler.generate(model, [[1, 2, 3], [4]], 9, **options)
        torch.set_default_dtype(default)
        try:
            assert sampler.generate(model, [[1, 2, 3], [4]], 9, **options) == right
        finally:
            torch.set_default_dtype(torch.float32)


@SAMPLERS
def test_unknown_argument_is_named(small_model, sampler):
    with pytest.raises(TypeError, match="temperatur"):
        sampler.generate(small_model(0), [1, 2], 4, temperatur=0.7)
    with pytest.raises(TypeError):  # samplers' own arguments are keywords
        sampler.generate(small_model(0), [1, 2], 4, 4)


@SAMPLERS
def test_the_whole_context_can_be_used(small_model, sampler):
    gen = sampler.generate(small_model(0), [5] * 40, max_new_tokens=8)
    assert len(gen.tokens) == 8


@SAMPLERS
def test_a_call_leaves_the_model_as_it_was(small_model, sampler):
    model = small_model(0)
    before = {name: p.clone() for name, p in model.state_dict().items()}, dict(vars(model.config))
    sampler.generate(model, [1, 2], 4, num_steps=4, stop_tokens=[3], temperature=1.0, kv="full")
    assert all(torch.equal(p, before[0][name]) for name, p in model.state_dict().items())
    assert (vars(model.config), model.generation_config) == (before[1], {})
