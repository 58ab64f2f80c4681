"""Autoregressive decoding: the official tokens, and what every generation promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirec import autoregressive
from minirec.decoding import Grid

PROMPTS = st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=7), min_size=1, max_size=3)
CACHES = st.sampled_from([{"kv": "full"}, {"kv": "shared"}, {"kv": "shared", "kv_slots": 2}])
CHOICES = st.sampled_from(
    [{}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 5, "top_p": 0.9}, {"repetition_penalty": 1.5}]
)
OFFICIAL = {  # official case -> the same in our words
    "full": {"kv": "full"},
    "latest_m4": {"kv": "full"},  # differs from "full" only where positions stop early
    "s4": {"kv": "shared", "kv_slots": 1},  # their 4 counts the core's four layers
    "s16": {"kv": "shared", "kv_slots": 4},
    "full_n12": {"kv": "full", "num_steps": 12},
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_tokens_and_logits_are_the_official_ones(golden, golden_model, monkeypatch, case):
    b, _ = golden("b_ar")
    logits = []
    choose = Grid.choose
    monkeypatch.setattr(Grid, "choose", lambda grid, x, at: logits.append(x) or choose(grid, x, at))
    options = {"num_steps": 8} | OFFICIAL[case]
    gen = autoregressive.generate(golden_model, b["prompt"][0], 40, init_scale=0, stop_tokens=(), **options)
    assert gen.tokens == b[f"{case}.sequence"][0, 12:].tolist()
    if f"{case}.logits" in b:
        assert (torch.cat(logits)[:, 0] - b[f"{case}.logits"]).abs().max() < 1e-3


def test_the_stop_token_ends_it_as_in_the_official_code(golden, golden_model):
    b, cases = golden("b_ar")
    stop = cases["cases"]["full_eos"]["args"]["eos_token_id"]
    gen = autoregressive.generate(golden_model, b["prompt"][0], 40, init_scale=0, kv="full", stop_tokens=[stop])
    assert gen.tokens == b["full_eos.sequence"][0, 12:].tolist()
    assert gen.tokens[-1] == stop


@given(PROMPTS, st.integers(0, 3), CACHES, CHOICES, st.sampled_from([0.0, 1.0]), st.integers(0, 22))
def test_a_row_of_a_batch_gets_the_tokens_it_gets_alone(small_model, prompts, seed, cache, choice, scale, stop):
    model, seeds = small_model(seed), list(range(7, 7 + len(prompts)))
    options = cache | choice | {"init_scale": scale, "stop_tokens": [stop]}
    together = autoregressive.generate(model, prompts, 6, seed=seeds, **options)
    for prompt, own, row in zip(prompts, seeds, together, strict=True):
        alone = autoregressive.generate(model, prompt, 6, seed=own, **options)
        assert (row.tokens, row.depth, row.passes) == (alone.tokens, alone.depth, alone.passes)


@given(PROMPTS, st.integers(0, 3), st.integers(1, 5))
def test_greedy_is_the_argmax_of_the_plain_forward_pass(small_model, prompts, seed, num_steps):
    model, prompt = small_model(seed), prompts[0]
    gen = autoregressive.generate(model, prompt, 5, num_steps=num_steps)
    sequence = torch.tensor([prompt + gen.tokens])
    right = model(sequence, num_steps=num_steps).logits[0].argmax(-1)
    assert gen.tokens == right[len(prompt) - 1 : -1].tolist()


@given(PROMPTS, st.integers(0, 3), st.integers(1, 5), st.integers(1, 8), st.sets(st.integers(0, 22), max_size=6))
def test_stops_at_a_stop_token_or_at_the_limit(small_model, prompts, seed, num_steps, limit, stop):
    model = small_model(seed)
    unstopped = autoregressive.generate(model, prompts, limit, num_steps=num_steps, stop_tokens=())
    for row, free in zip(
        autoregressive.generate(model, prompts, limit, num_steps=num_steps, stop_tokens=stop), unstopped, strict=True
    ):
        assert len(free.tokens) == limit
        ends = [i + 1 for i, token in enumerate(free.tokens) if token in stop]
        assert row.tokens == free.tokens[: ends[0] if ends else limit]
        assert row.depth == [num_steps] * len(row.tokens)
        assert row.passes == num_steps * len(row.tokens)
        assert row.decodes == len(row.tokens)
        assert row.trace is None


def test_the_checkpoints_own_stop_token_is_the_default(golden, golden_model, monkeypatch):
    b, cases = golden("b_ar")
    stop = cases["cases"]["full_eos"]["args"]["eos_token_id"]
    run = dict(init_scale=0, kv="full", max_new_tokens=40)
    for own in (stop, [7_000, stop]):
        monkeypatch.setattr(golden_model, "generation_config", {"eos_token_id": own})
        assert autoregressive.generate(golden_model, b["prompt"][0], **run).tokens[-1] == stop
    monkeypatch.setattr(golden_model, "generation_config", {})
    monkeypatch.setattr(golden_model.config, "eos_token_id", stop)
    assert autoregressive.generate(golden_model, b["prompt"][0], **run).tokens[-1] == stop


def test_tokens_stream_in_order_and_false_stops(small_model):
    model, seen = small_model(1), []
    gen = autoregressive.generate(model, [3, 1], 6, on_token=seen.append)
    assert seen == gen.tokens and len(seen) == 6
    gen = autoregressive.generate(model, [3, 1], 6, on_token=lambda token: token != seen[2])
    assert gen.tokens == seen[: seen.index(seen[2]) + 1]
    rows = {0: [], 1: []}

    def on_token(token, row):
        rows[row].append(token)
        return row == 1 or len(rows[0]) < 2  # row 0 ends after two tokens, row 1 goes on

    batch = autoregressive.generate(model, [[3, 1], [5]], 4, on_token=on_token)
    assert [gen.tokens for gen in batch] == [rows[0], rows[1]]
    assert (len(rows[0]), len(rows[1])) == (2, 4)


def test_sampling_is_seeded(small_model):
    model = small_model(2)
    runs = [autoregressive.generate(model, [3, 1], 12, temperature=1.0, seed=s).tokens for s in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]
    batch = autoregressive.generate(model, [[3, 1], [3, 1]], 12, temperature=1.0, seed=[5, 6])
    assert [gen.tokens for gen in batch] == runs[1:]


def test_prompts_may_be_lists_tuples_tensors_and_arrays(small_model):
    model = small_model(2)
    right = autoregressive.generate(model, [3, 1], 3).tokens
    ids = torch.tensor([3, 1])
    for prompt in ((3, 1), ids, ids.int(), ids.numpy(), list(ids), list(ids.numpy()), range(3, 0, -2)):
        assert autoregressive.generate(model, prompt, 3).tokens == right
    for batch in ([[3, 1]], [(3, 1)], ids[None], ids[None].numpy(), [ids], [ids.numpy()], (ids,)):
        assert [gen.tokens for gen in autoregressive.generate(model, batch, 3)] == [right]
