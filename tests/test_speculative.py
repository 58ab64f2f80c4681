"""Self-speculation: the official tokens, round by round; autoregressive tokens, however it drafts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirec import autoregressive, speculative
from minirec.decoding import Grid

PROMPTS = st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=7), min_size=1, max_size=3)
CHOICES = st.sampled_from(
    [{}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 5, "top_p": 0.9}, {"repetition_penalty": 1.5}]
)
OFFICIAL = {  # official case -> new tokens, the same arguments in our words
    "draft4_look4": (40, {"draft_steps": 4, "lookahead": 4}),
    "draft2_look8": (41, {"draft_steps": 2, "lookahead": 8}),  # theirs overshoots its limit of 40
    "draft4_look4_thr0.5": (40, {"draft_steps": 4, "lookahead": 4, "accept": 0.5}),
}


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("case", OFFICIAL)
def test_tokens_and_rounds_are_the_official_ones(golden, golden_model, case, reuse):
    e, _ = golden("e_speculative")
    n, options = OFFICIAL[case]
    gen = speculative.generate(
        golden_model, e["prompt"][0], n, num_steps=8, init_scale=0, stop_tokens=(), reuse=reuse, trace=True, **options
    )
    assert gen.tokens == e[f"{case}.sequence"][0, 12:].tolist()
    rounds = [step.frozen - 1 - step.start for step in gen.trace]
    right = e[f"{case}.accepted_per_round"].tolist()
    assert rounds[:-1] == right[:-1]
    assert rounds[-1] == min(right[-1], n - 1 - sum(right[:-1])), "the last round may hold what is left, no more"


def test_the_stop_token_ends_it_as_in_the_official_code(golden, golden_model):
    e, cases = golden("e_speculative")
    stop = cases["cases"]["draft4_look4_eos"]["args"]["eos_token_id"]
    gen = speculative.generate(golden_model, e["prompt"][0], 40, num_steps=8, init_scale=0, stop_tokens=[stop])
    assert gen.tokens == e["draft4_look4_eos.sequence"][0, 12:].tolist()
    assert gen.tokens[-1] == stop


@given(
    PROMPTS, st.integers(0, 3), CHOICES, st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 9),
    st.booleans(), st.sampled_from([0.0, 1.0, 3.0]), st.sets(st.integers(0, 22), max_size=3),
)  # fmt: skip
def test_tokens_are_autoregressive(
    small_model, prompts, seed, choice, num_steps, draft_steps, lookahead, limit, reuse, scale, stop
):
    model, seeds = small_model(seed), list(range(5, 5 + len(prompts)))
    common = choice | {"num_steps": num_steps, "init_scale": scale, "stop_tokens": stop}
    how = {"draft_steps": min(draft_steps, num_steps), "lookahead": lookahead, "reuse": reuse}
    right = autoregressive.generate(model, prompts, limit, seed=seeds, **common)
    rows = speculative.generate(model, prompts, limit, seed=seeds, **how, **common)
    assert [(g.tokens, g.depth) for g in rows] == [(g.tokens, g.depth) for g in right]
    for prompt, own, row in zip(prompts, seeds, rows, strict=True):
        alone = speculative.generate(model, prompt, limit, seed=own, **how, **common)
        assert alone.tokens == row.tokens


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_a_round_costs_what_it_says(small_model, seed, draft_steps, lookahead, reuse):
    model = small_model(seed)
    gen = speculative.generate(
        model, [3, 1, 4], 12, num_steps=6, draft_steps=draft_steps, lookahead=lookahead, reuse=reuse, trace=True
    )
    widths = [len(step.depths) for step in gen.trace]
    assert gen.passes == 6 + sum(w * draft_steps + (6 - draft_steps if reuse else 6) for w in widths)
    assert gen.decodes == 1 + sum(w + 1 for w in widths), "a coda call for every draft, one to verify them all"
    assert all(w <= lookahead for w in widths)


def test_reuse_saves_the_drafts_own_steps(small_model):
    run = dict(num_steps=8, draft_steps=4, lookahead=3, trace=True)
    kept = speculative.generate(small_model(1), [3, 1, 4], 20, **run)
    again = speculative.generate(small_model(1), [3, 1, 4], 20, reuse=False, **run)
    assert kept.tokens == again.tokens and len(kept.trace) == len(again.trace)
    assert again.passes - kept.passes == 4 * len(kept.trace)


def test_a_lower_threshold_accepts_more(small_model):
    model = small_model(2)
    rounds = [
        len(speculative.generate(model, [3, 1, 4], 30, num_steps=6, draft_steps=1, accept=accept, trace=True).trace)
        for accept in (1.0, 0.5, 1e-6)
    ]
    assert rounds[0] > rounds[1] > rounds[2]


def test_streams_stops_and_counts_the_rest_of_the_round_as_lost(small_model):
    model, seen = small_model(1), []

    def two(token):
        seen.append(token)
        return len(seen) < 3

    gen = speculative.generate(model, [3, 1, 4], 20, num_steps=4, draft_steps=4, on_token=two)
    assert gen.tokens == seen and len(seen) == 3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"draft_steps": 0}, "draft_steps is 0; it must be a whole number, at least 1"),
        ({"draft_steps": 5}, "draft_steps is 5; it must be from 1 to num_steps, here 4"),
        ({"lookahead": 0}, "lookahead is 0; it must be a whole number, at least 1"),
        ({"accept": 0}, "accept is 0; it must be a number, above 0 and at most 1"),
        ({"accept": 1.5}, "accept is 1.5; it must be a number, above 0 and at most 1"),
    ],
)
def test_bad_arguments_are_named_before_any_work(small_model, monkeypatch, wrong, named):
    monkeypatch.setattr(Grid, "recur", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=named):
        speculative.generate(small_model(0), [1, 2], 5, **wrong)


def test_the_official_kind_of_model_in_float32(golden_model):
    prompt = torch.arange(3, 11)
    right = autoregressive.generate(golden_model, prompt, 30, stop_tokens=())
    assert speculative.generate(golden_model, prompt, 30, stop_tokens=()).tokens == right.tokens
