"""The model against the official one, number for number, and the properties that make it a recurrent-depth model."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirec import RecurrentConfig, RecurrentDepthLM

SAME = 1e-5  # relative Frobenius; measured: 1e-6 and below

TOKENS = st.lists(st.integers(0, 22), min_size=1, max_size=9)
STEPS = st.integers(0, 5)


# --- the official numbers -----------------------------------------------------------------------------------------


def test_prelude_is_the_official_one(golden, golden_model, distance):
    a, _ = golden("a_forward")
    assert distance(golden_model.prelude(a["input_ids"]), a["prelude_output"]) < SAME


def test_every_step_of_the_state_is_the_official_one(golden, golden_model, distance):
    a, _ = golden("a_forward")
    e, s = golden_model.prelude(a["input_ids"]), a["input_states"]
    for step in range(1, 17):
        s = golden_model.recur(s, e)
        if step <= 8:
            assert distance(s, a["latents_step_1_to_8"][step - 1]) < SAME, f"after step {step}"
    assert distance(s, a["latent_step_16"]) < SAME


@pytest.mark.parametrize("num_steps", [1, 4, 8, 16])
def test_logits_are_the_official_ones(golden, golden_model, distance, num_steps):
    a, _ = golden("a_forward")
    out = golden_model(a["input_ids"], num_steps=num_steps, state=a["input_states"])
    assert out.logits.dtype == torch.float32
    assert distance(out.logits, a[f"logits_n{num_steps}"]) < SAME
    assert (out.logits - a[f"logits_n{num_steps}"]).abs().max() < 1e-3
    if num_steps >= 8:  # the official code returns the state after ln_f, we return it before
        assert distance(golden_model.transformer.ln_f(out.state), a[f"latent_states_lnf_n{num_steps}"]) < SAME


def test_parameter_names_and_shapes_are_the_official_ones(golden_folder, golden_model):
    listed = json.loads((golden_folder / "model_tensors.json").read_text(encoding="utf-8"))["tensors"]
    official = {t["name"]: tuple(t["shape"]) for t in listed}
    assert official.pop("freqs_cis")  # a table that we compute
    assert {name: tuple(p.shape) for name, p in golden_model.named_parameters()} == official
    assert {name for name in golden_model.state_dict() if name not in official} == {"lm_head.weight"}  # the tied head


def test_the_3_5b_shape_has_its_parameters():
    with torch.device("meta"):
        model = RecurrentDepthLM(RecurrentConfig.preset("huginn_3_5b"))
    assert sum(p.numel() for p in model.parameters()) == 3_564_976_800


# --- the recurrence -----------------------------------------------------------------------------------------------


@given(TOKENS, STEPS, STEPS, st.integers(0, 3))
def test_r1_steps_and_then_r2_are_r1_plus_r2(small_model, tokens, r1, r2, seed):
    model, tokens = small_model(seed), torch.tensor([tokens])
    half = model(tokens, num_steps=r1)
    both = model(tokens, num_steps=r2, state=half.state)
    at_once = model(tokens, num_steps=r1 + r2)
    assert torch.equal(both.state, at_once.state)
    assert torch.equal(both.logits, at_once.logits)


@given(TOKENS, st.integers(1, 5), st.integers(0, 3), st.data())
def test_a_token_changes_nothing_before_it(small_model, tokens, num_steps, seed, data):
    where = data.draw(st.integers(0, len(tokens) - 1))
    other = list(tokens)
    other[where] = (tokens[where] + data.draw(st.integers(1, 22))) % 23
    model = small_model(seed)
    a, b = (model(torch.tensor([t]), num_steps=num_steps).logits[0] for t in (tokens, other))
    torch.testing.assert_close(a[:where], b[:where], rtol=0, atol=1e-12)
    assert (a[where] - b[where]).abs().max() > 1e-6, "the token's own logits should depend on it"


@given(st.lists(TOKENS, min_size=2, max_size=3), st.integers(0, 3))
def test_padding_on_the_right_changes_nothing(small_model, prompts, seed):
    model, width = small_model(seed), max(map(len, prompts))
    batch = model(torch.tensor([p + [0] * (width - len(p)) for p in prompts])).logits
    for row, p in enumerate(prompts):
        torch.testing.assert_close(batch[row, : len(p)], model(torch.tensor([p])).logits[0], rtol=0, atol=1e-10)


def test_forward_takes_the_depth_of_the_config(small_model):
    model, tokens = small_model(0), torch.arange(6)[None]
    assert torch.equal(model(tokens).logits, model(tokens, num_steps=model.config.mean_recurrence).logits)
    assert not torch.equal(model(tokens).logits, model(tokens, num_steps=1).logits)


def test_bad_arguments_are_named(small_model):
    model = small_model(0)
    with pytest.raises(ValueError, match="num_steps is -1"):
        model(torch.zeros(1, 3, dtype=torch.long), num_steps=-1)
    for shape in [(3,), (1, 0), (1, 49)]:
        with pytest.raises(ValueError, match=rf"tokens has shape \({', '.join(map(str, shape))}.*from 1 to 48"):
            model(torch.zeros(shape, dtype=torch.long))


# --- the initial state and the initialisation ---------------------------------------------------------------------


@given(st.integers(0, 2**40), st.lists(st.integers(0, 47), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_initial_state_depends_on_seed_and_position_alone(small_model, seed, positions, rng):
    model = small_model(0)
    everywhere = model.initial_state(torch.arange(48), seed=seed)  # (48, d)
    assert torch.equal(model.initial_state(torch.tensor(positions), seed=seed), everywhere[positions])
    shuffled = rng.sample(positions, len(positions))
    batch = model.initial_state(torch.tensor([positions, shuffled]), seed=torch.tensor([[seed + 1], [seed]]))
    assert torch.equal(batch[1], everywhere[shuffled])
    assert not torch.equal(batch[0], everywhere[positions]), "another seed, another state"


def test_initial_state_is_a_cut_normal_of_variance_two_fifths(small_model):
    model = small_model(0, n_embd=64)
    s = model.initial_state(torch.arange(2000))
    assert s.dtype == model.dtype
    assert s.abs().max() <= 3 * math.sqrt(2 / 5) + 1e-6
    assert abs(s.var() - 0.4) < 0.02
    assert torch.equal(model.initial_state(torch.arange(5), scale=0), torch.zeros(5, 64, dtype=model.dtype))
    torch.testing.assert_close(model.initial_state(torch.arange(5), scale=0.5), s[:5] / 2)


def test_fresh_weights_have_the_sizes_of_takase():
    torch.manual_seed(0)
    model = RecurrentDepthLM(RecurrentConfig(n_embd=96, n_heads=4, intermediate_size=200, vocab_size=300))
    std, depth = math.sqrt(2 / (5 * 96)), 2 + 4 * 32 + 2
    out_std = math.sqrt(1 / (5 * 96 * depth))
    cut = math.sqrt(0.9733)  # what cutting at three sigma leaves
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        elif name.endswith("qk_bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        else:
            sigma = out_std if name.endswith((".attn.proj.weight", ".mlp.proj.weight")) else std
            assert abs(p.std() / (sigma * cut) - 1) < 0.03, name
            assert p.abs().max() <= 3 * sigma + 1e-7, name
