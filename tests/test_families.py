"""Every family computes what its published code does, and every sampler and engine mode treats it as Huginn."""

import dataclasses
import json
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_continuous_batching import ENGINES, REQUESTS, check_serves, plain

from minirec import (
    RecurrentDepthLM,
    adaptive_exit,
    autoregressive,
    decoding,
    diffusion_forcing,
    lens,
    lossless_wavefront,
    speculative,
)
from minirec.continuous_batching import Engine
from minirec.decoding import Grid
from minirec.families import model_of
from minirec.families.ouro import exit_distribution, exit_loops
from minirec.families.presets import FAMILIES, PRESETS, preset
from minirec.kv_cache import bytes_per_token
from minirec.training import IGNORE, depth_loss

PUBLISHED = ["raven_llama", "raven_olmo", "parcae", "ouro", "nanbeige"]
EVERY = ["huginn", *PUBLISHED]
LOOPED = ["ouro", "nanbeige"]  # without prelude, coda and injection
STATED = PUBLISHED[:3]  # their golden runs start from given states
MODES = ["static", "sequence", "depth", "wavefront"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:num_steps is:UserWarning"),
    pytest.mark.filterwarnings("ignore:kv is 'shared':UserWarning"),
    pytest.mark.filterwarnings("ignore:.*left over from Huginn:UserWarning"),
]


@pytest.fixture(scope="module")
def family(golden_folder):
    """`family("ouro")`: the golden model; `family("ouro", "c_exit")`: the tensors and the JSON of a file."""

    def load(name: str, file: str | None = None):
        folder = golden_folder / "families" / name
        if file is None:
            return RecurrentDepthLM.from_pretrained(folder / "model").requires_grad_(False)
        described = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
        return load_file(folder / f"{file}.safetensors"), described

    return load


def close(ours, right, tolerance: float) -> None:
    torch.testing.assert_close(ours, right, rtol=0, atol=tolerance)


# --- the numbers of the published code ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_states_and_logits_after_every_step(family, name):
    model, (right, _) = family(name), family(name, "a_forward")
    tokens, given_state = right["input_ids"], right.get("input_states")
    if "prelude_output" in right:
        close(model.prelude(tokens), right["prelude_output"], 1e-4)
    else:
        close(model.prelude(tokens), right["embeddings"], 0)
    states = next(t for key, t in right.items() if key.startswith(("states_step", "hidden_after_norm")))
    for n, state in enumerate(states, 1):
        out = model(tokens, num_steps=n, state=given_state)
        close(out.state, state, 3e-4)
        if f"logits_n{n}" in right:
            close(out.logits, right[f"logits_n{n}"], 3e-4)
    assert sum(key.startswith("logits_n") for key in right) == 4
    e = model.prelude(tokens)  # the three parts, one by one
    s = model.initial_state(torch.arange(12)).expand_as(e) if given_state is None else given_state
    for _ in range(2):
        s = model.recur(s, e)
    close(model.coda(s), right["logits_n2"], 3e-4)
    close(model(tokens, num_steps=1, state=model(tokens, num_steps=1, state=given_state).state).logits,
          right["logits_n2"], 3e-4)  # fmt: skip


def test_parcae_injects_what_the_published_code_does(family):
    model, (right, _) = family("parcae"), family("parcae", "a_forward")
    e = model.prelude(right["input_ids"])
    for step, before in ((1, right["input_states"]), (2, right["states_step_1_to_6"][0])):
        close(model.transformer.adapter(before, e), right[f"injected_step_{step}"], 3e-4)


@pytest.mark.parametrize("name", LOOPED)
def test_the_norm_acts_after_every_loop(family, name):
    model, (right, _), seen = family(name), family(name, "a_forward"), []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(right["input_ids"], num_steps=4)
    before = next(t for key, t in right.items() if key.startswith("hidden_before_norm"))
    close(torch.stack(seen), before, 3e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_values_in_the_cache(family, name):
    model, (right, _) = family(name), family(name, "a_forward")
    steps = {"ouro": 4, "nanbeige": 2}.get(name, 3)
    grid = Grid(model, right["input_ids"].tolist(), 1, steps)
    if "input_states" in right:
        grid.state[:, :12] = right["input_states"]
    at = grid.window([0, 0], 12)
    s, e = at.read(grid.state), grid.embed(at)
    for depth in range(steps):
        s = grid.recur(s, e, at, depth)
    grid.decode(s, at)
    checked = 0
    for key, entry in right.items():
        if not key.startswith("kv_"):
            continue
        if part := re.match(r"kv_(prelude|coda)(\d)", key):
            place = part[1], int(part[2]), 0
        elif part := re.match(r"kv_core(\d)_step(\d)", key):
            place = "core", int(part[1]), int(part[2])
        else:
            loop, layer = re.match(r"kv_loop(\d)_layer(\d)", key).groups()
            place = "core", int(layer), int(loop)
        name, layer, slot = place
        close(grid.cache.views[name][layer][slot][key.endswith("_v")][0, :, :12], entry, 1e-4)
        checked += 1
    assert checked >= 6


def decoded(model, prompt, num_steps: int, monkeypatch) -> tuple[list[int], torch.Tensor]:
    """16 greedy tokens from states of zeros, and the logits of each."""
    logits = []
    choose = Grid.choose
    monkeypatch.setattr(Grid, "choose", lambda self, x, at: logits.append(x[0, -1]) or choose(self, x, at))
    made = autoregressive.generate(model, prompt, 16, num_steps=num_steps, init_scale=0.0, stop_tokens=())
    return made.tokens, torch.stack(logits)


@pytest.mark.parametrize("name", PUBLISHED)
def test_greedy_decoding_with_a_cache(family, name, monkeypatch):
    model, (right, described) = family(name), family(name, "b_greedy")
    cases = {case: v.get("num_steps", v.get("num_loops")) for case, v in described["cases"].items()}
    cases |= {"full": 4, "loops2": 2} if name == "ouro" else {}
    for case, steps in cases.items():
        if steps is not None:
            tokens, logits = decoded(model, right["prompt"][0], steps, monkeypatch)
            assert tokens == right[f"{case}.sequence"][0, 6:].tolist()
            close(logits, right[f"{case}.logits"], 3e-4)


def gates_of(model, tokens) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Ouro's lambdas (R, B, T) and the logits of every loop."""
    e = model.prelude(tokens)
    s, gates, logits = model.initial_state(torch.arange(tokens.shape[1])).expand_as(e), [], []
    for _ in range(model.config.mean_recurrence):
        s = model.recur(s, e)
        gates.append(model.gate(s))
        logits.append(model.coda(s))
    return torch.stack(gates), logits


def test_ouros_gate(family):
    model, (right, _) = family("ouro"), family("ouro", "a_forward")
    gates, logits = gates_of(model, right["input_ids"])
    close(gates.movedim(0, -1), right["exit_lambda"], 1e-5)
    close(exit_distribution(gates).movedim(0, -1), right["exit_pdf"], 1e-5)
    close(exit_distribution(gates).cumsum(0).movedim(0, -1), right["exit_cdf"], 1e-5)
    right, _ = family("ouro", "c_exit")
    gates, logits = gates_of(model, right["input_ids"])
    for threshold in (0.3, 0.6, 0.9, 1.0):
        loops = exit_loops(gates, threshold)
        assert torch.equal(loops - 1, right[f"thr{threshold}.exit_steps"])
        picked = torch.stack(logits).take_along_dim((loops - 1)[None, ..., None], dim=0)[0]
        close(picked, right[f"thr{threshold}.logits"], 3e-4)
    close((exit_distribution(gates)[..., None] * torch.stack(logits)).sum(0), right["weighted_logits"], 3e-4)
    assert (exit_distribution(gates).sum(0) < 1).any(), "some sums end below 1, and yet their token exits: at the last"
    assert (exit_loops(gates, 0) == 1).all() and (exit_loops(gates, -1) == 1).all()
    assert (exit_loops(gates, 1.5) == 4).all()


def test_greedy_decoding_by_ouros_gate(family):
    """Without a cache: the published code keeps running a token that has exited, for the keys and values alone."""
    model, (right, described) = family("ouro"), family("ouro", "b_greedy")
    ids = right["prompt"].clone()
    for exit_step in described["cases"]["thr0.6"]["exit_steps"]:
        gates, logits = gates_of(model, ids)
        loop = exit_loops(gates[:, 0, -1], 0.6)
        assert loop - 1 == exit_step
        ids = torch.cat([ids, logits[loop - 1][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, right["thr0.6.sequence"])


@pytest.mark.parametrize("mode", ["embed-init", "skip-adapter"])
def test_states_that_start_as_the_embedding(family, mode):
    right, _ = family("raven_olmo", "e_state_modes")
    like = family("raven_olmo")
    model = model_of(dataclasses.replace(like.config, initial_state_mode=mode))
    model.load_state_dict(like.state_dict())
    for n, state in enumerate(right[f"{mode}.states_step_1_to_3"], 1):
        out = model(right["input_ids"], num_steps=n)
        close(out.state, state, 3e-4)
        if n != 2:
            close(out.logits, right[f"{mode}.n{n}.logits"], 3e-4)
    with pytest.raises(ValueError, match=r"init_scale is 0.5; this model's state starts as its token's embedding"):
        autoregressive.generate(model, [3, 4], 2, init_scale=0.5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_epsilons_of_the_norms(family, name):
    model, (right, described) = family(name), family(name, "g_small_norms")
    for name_, p in model.named_parameters():
        for scaled in described["scaled_parameters"]:
            if scaled["name_contains"] in name_:
                p.data *= scaled["factor"]
    given_state = family(name, "a_forward")[0].get("input_states")
    logits = model(right["input_ids"], num_steps=2, state=given_state).logits
    close(logits, right["logits_n2"], 1e-6 if name == "parcae" else 3e-4)


def check_gradients(model, loss, right, case: str, order: list[str]) -> None:
    model.zero_grad()
    loss.backward()
    close(loss.detach().view(1), right[f"{case}.loss"], 2e-5)
    parameters = dict(model.named_parameters())
    norms = torch.stack([torch.zeros(()) if (g := parameters[n].grad) is None else g.norm() for n in order])
    torch.testing.assert_close(norms, right[f"{case}.grad_norms"], rtol=1e-4, atol=1e-7)
    for key, gradient in right.items():
        if key.startswith(f"{case}.grad."):
            ours = parameters[key.removeprefix(f"{case}.grad.")].grad
            assert (ours - gradient).norm() <= 1e-4 * gradient.norm(), key


@pytest.mark.parametrize("name", STATED)
def test_gradients(family, name):
    model, (right, described) = family(name).requires_grad_(True), family(name, "f_training")
    tokens, labels, state = right["input_ids"], right["labels"], right["input_states"]
    for case, backprop in (("n0_k6", 6), ("n4_k2", 2)):
        loss = depth_loss(model, tokens, labels, torch.tensor([6, 6]), backprop, state)
        check_gradients(model, loss, right, case, described["grad_norm_order"])


def test_gradients_of_rows_with_depths_of_their_own(family):
    model, (right, described) = family("parcae").requires_grad_(True), family("parcae", "f_training")
    case, losses = described["cases"]["per_sequence"], []
    for row in range(2):
        tokens, state = right["input_ids"][[row]], right["input_states"][[row]]
        backprop = case["steps_with_gradient_per_row"][row]
        depths = torch.tensor([case["steps_without_gradient_per_row"][row] + backprop])
        count = (right["labels"][row] != IGNORE).sum()
        losses.append(count * depth_loss(model, tokens, right["labels"][[row]], depths, backprop, state))
    loss = sum(losses) / (right["labels"] != IGNORE).sum()
    check_gradients(model, loss, right, "per_sequence", described["grad_norm_order"])


def test_rows_of_different_depths_train_together(small_family):
    """Tokens follow their rows, which start one after the other: the loss is the mean over the rows alone."""
    for name in EVERY:
        model = small_family(name, 1)
        tokens, depths = torch.arange(18).view(3, 6) % 23, torch.tensor([2, 4, 3])
        state = model.initial_state(torch.arange(6)).expand(3, 6, -1)
        labels = tokens.roll(-1, 1)
        alone = [depth_loss(model, tokens[[b]], labels[[b]], depths[[b]], 4, state[[b]]) for b in range(3)]
        close(depth_loss(model, tokens, labels, depths, 4, state), sum(alone) / 3, 1e-9)


def test_gradients_of_ouro(family):
    model, (right, described) = family("ouro").requires_grad_(True), family("ouro", "f_training")
    tokens = right["input_ids"]
    labels = F.pad(right["labels"][:, 1:], (0, 1), value=IGNORE)
    state = model.initial_state(torch.arange(12)).expand(2, 12, -1)
    loss = depth_loss(model, tokens, labels, torch.tensor([4, 4]), 4, state)
    check_gradients(model, loss, right, "last_loop", described["grad_norm_order"])
    gates, logits = gates_of(model, tokens)
    weighted = (exit_distribution(gates)[..., None] * torch.stack(logits)).sum(0)
    loss = F.cross_entropy(weighted.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    check_gradients(model, loss, right, "official_labels", described["grad_norm_order"])


def test_nanbeige_may_norm_after_the_last_loop_alone(family):
    like, (right, _) = family("nanbeige"), family("nanbeige", "a_forward")
    model = model_of(dataclasses.replace(like.config, skip_loop_final_norm=True))
    model.load_state_dict(like.state_dict())
    close(model(right["input_ids"], num_steps=2).logits, right["skip_loop_final_norm.logits_n2"], 3e-4)


# --- every sampler and engine mode on every family ---

PROMPTS = st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=9), min_size=1, max_size=3)
CHOICES = st.sampled_from(
    [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"repetition_penalty": 1.3}]
)  # fmt: skip


def one_by_one(sampler, model, prompts, seeds, **options) -> list:
    return [sampler.generate(model, p, 8, seed=s, **options) for p, s in zip(prompts, seeds, strict=True)]


def check_lossless(model, prompts, steps: int, part: int, choice: dict, fast: bool) -> None:
    """Plain decoding, uncached; then all schedules that promise the same tokens, one by one and as a batch."""
    seeds, options = [7 + row for row in range(len(prompts))], dict(num_steps=steps, stop_tokens=(), **choice)
    right = one_by_one(autoregressive, model, prompts, seeds, **options)
    if not choice:
        ids = torch.tensor([prompts[0] + right[0].tokens])
        state = model.initial_state(torch.arange(ids.shape[1]), seed=seeds[0])[None]
        uncached = model(ids, num_steps=steps, state=state).logits[0].argmax(-1)
        assert uncached[len(prompts[0]) - 1 : -1].tolist() == right[0].tokens
    part = min(part, steps)
    samplers = [
        (autoregressive, {}),
        (lossless_wavefront, {"guess_after": part}),
        (speculative, {"draft_steps": part, "lookahead": 3}),
        (diffusion_forcing, {"inner_steps": steps, "max_wavefront": 1, "exit_threshold": 0.0, "kv": "full"}),
        (adaptive_exit, {"threshold": 0.0}),
    ]
    for sampler, own in samplers:
        for run in (one_by_one(sampler, model, prompts, seeds, fast=fast, **own, **options),
                    sampler.generate(model, prompts, 8, seed=seeds, fast=fast, **own, **options)):  # fmt: skip
            assert [made.tokens for made in run] == [made.tokens for made in right], sampler.__name__


@pytest.mark.parametrize("name", PUBLISHED)
@given(st.integers(0, 3), PROMPTS, st.integers(1, 5), st.integers(1, 4), CHOICES, st.booleans())
@settings(max_examples=6)
def test_lossless_samplers_are_autoregressive(small_family, name, seed, prompts, steps, part, choice, fast):
    check_lossless(small_family(name, seed), prompts, steps, part, choice, fast)


@pytest.mark.parametrize("name", PUBLISHED)
@given(st.integers(0, 3), PROMPTS, st.integers(2, 5), st.integers(1, 2), CHOICES, st.booleans(), st.booleans())
@settings(max_examples=6)
def test_a_row_of_a_batch_gets_what_it_gets_alone(
    small_family, name, seed, prompts, steps, inner, choice, shared, fast
):
    model, seeds = small_family(name, seed), [3 + row for row in range(len(prompts))]
    options = dict(num_steps=steps, stop_tokens=(), fast=fast, kv="shared" if shared else "full", **choice)
    samplers = [
        (autoregressive, {}),
        (adaptive_exit, {"threshold": 0.4}),
        (adaptive_exit, {"criterion": "kl", "threshold": 0.05}),
        (diffusion_forcing, {"inner_steps": inner, "exit_threshold": 0.3, "max_wavefront": 4}),
        (diffusion_forcing, {"inner_steps": inner, "schedule": "fixed"}),
        *([(adaptive_exit, {"criterion": "gate", "threshold": 0.6})] if name == "ouro" else []),
    ]
    for sampler, own in samplers:
        batch = sampler.generate(model, prompts, 8, seed=seeds, **own, **options)
        right = one_by_one(sampler, model, prompts, seeds, **own, **options)
        assert [(g.tokens, g.depth) for g in batch] == [(g.tokens, g.depth) for g in right], (sampler.__name__, own)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PUBLISHED)
@given(st.integers(0, 3), REQUESTS, ENGINES)
@settings(max_examples=3)
def test_an_engine_gives_a_request_what_it_gets_alone(small_family, name, mode, seed, requests, options):
    check_serves(small_family(name, seed), mode, requests, **(options | {"kv_budget": None}))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PUBLISHED)
@given(st.integers(0, 3), REQUESTS, ENGINES)
@settings(max_examples=40)
def test_an_engine_gives_a_request_what_it_gets_alone_often(small_family, name, mode, seed, requests, options):
    check_serves(small_family(name, seed), mode, requests, **(options | {"kv_budget": None}))


SHAPES = st.fixed_dictionaries(
    {
        "n_heads": st.sampled_from([2, 4]),
        "intermediate_size": st.sampled_from([8, 24, 40]),
        "vocab_size": st.sampled_from([23, 31]),
        "mean_recurrence": st.integers(1, 4),
        "n_layers_in_recurrent_block": st.sampled_from([2, 4]),
    }
)
PARTS = st.fixed_dictionaries({f"n_layers_in_{part}": st.sampled_from([2, 4]) for part in ("prelude", "coda")})
HEADS = st.fixed_dictionaries({"n_kv_heads": st.sampled_from([1, 2]), "head_dim": st.sampled_from([2, 4, 10])})


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
@given(SHAPES, PARTS, HEADS, PROMPTS, st.integers(1, 5), st.integers(1, 3), CHOICES)
@settings(max_examples=40)
def test_200_random_shapes(small_family, name, shape, parts, heads, prompts, steps, inner, choice):
    sizes = shape | (parts if name in STATED else {}) | ({} if name == "parcae" else heads)
    if name == "raven_llama":
        sizes["head_dim"] = 16 // sizes["n_heads"]
    check_lossless(small_family(name, 1, **sizes), prompts, steps, inner, choice, fast=False)


def test_ouros_gate_is_an_exit_criterion(family):
    """Tokens exit where the gate says; what exits early is read by later tokens, so only the first one is compared."""
    model, prompt = family("ouro"), family("ouro", "b_greedy")[0]["prompt"]
    for threshold, depths in ((0.0, {1}), (-3, {1}), (1.01, {4}), (0.6, {1, 2, 3, 4})):
        made = adaptive_exit.generate(model, prompt[0], 16, criterion="gate", threshold=threshold, stop_tokens=())
        assert set(made.depth[1:]) <= depths and made.depth[0] == 4, "the prompt runs all its loops"
        assert (len(set(made.depth[1:])) > 1) == (threshold == 0.6)
        gates, _ = gates_of(model, torch.cat([prompt, torch.tensor([made.tokens[:1]])], dim=1))
        assert made.depth[1] == exit_loops(gates[:, 0, -1], threshold)
        read = adaptive_exit.generate(
            model, prompt[0], 1, criterion="gate", threshold=threshold, exit_in_prefill=True, stop_tokens=()
        )
        assert read.depth[0] == exit_loops(gates_of(model, prompt)[0][:, 0, -1], threshold)
    default = adaptive_exit.generate(model, prompt[0], 16, criterion="gate", stop_tokens=())
    assert default.tokens == autoregressive.generate(model, prompt[0], 16, stop_tokens=()).tokens
    for other in ("nanbeige", "parcae"):
        with pytest.raises(
            ValueError, match="criterion is 'gate', and this model has no gate; it must be one of 'latent"
        ):
            adaptive_exit.generate(family(other), [3], 2, criterion="gate")


@pytest.mark.parametrize("name", LOOPED)
@given(st.integers(0, 3), PROMPTS, st.integers(2, 4), st.integers(1, 2))
@settings(max_examples=8)
def test_without_injection_diffusion_forcing_starts_changed_positions_again(
    small_family, name, seed, prompts, r, inner
):
    """On the fixed schedule a frozen position has run all its steps on its last token, so nothing is approximate."""
    model = small_family(name, seed)
    made = diffusion_forcing.generate(
        model, prompts, 8, num_steps=r, inner_steps=inner, schedule="fixed", stop_tokens=(), trace=True
    )
    if r % inner == 0:
        right = autoregressive.generate(model, prompts, 8, num_steps=r, stop_tokens=())
        assert [g.tokens for g in made] == [g.tokens for g in right]
    for generation in made:
        for step in generation.trace:
            assert step.depths == sorted(step.depths, reverse=True), "nobody reads steps that another never ran"


@pytest.mark.parametrize("name", EVERY)
def test_a_wave_of_the_engine_with_a_threshold_is_diffusion_forcing(small_family, name):
    """Guesses change while positions are deep: without injection these begin again, in the engine too."""
    for seed in range(3):
        requests = [r | {"threshold": (0.02, 0.2, 0.6)[i % 3]} for i, r in enumerate(plain(6, new=10))]
        check_serves(small_family(name, seed), "wavefront", requests, slots=2, guess_after=1)


@pytest.mark.parametrize("name", LOOPED)
def test_what_has_no_meaning_without_injection_is_refused(small_family, name):
    model = small_family(name)
    for sampler, wrong in (
        (diffusion_forcing, {"noise": 0.1}),
        (diffusion_forcing, {"continuous_compute": True}),
        (adaptive_exit, {"continuous_compute": True}),
        (autoregressive, {"init_scale": 0.5}),
    ):
        (key,) = wrong
        with pytest.raises(ValueError, match=f"{key} is {wrong[key]}; this model's state"):
            sampler.generate(model, [3, 1], 4, **wrong)


@pytest.mark.parametrize("name", LOOPED)
def test_what_was_never_trained_gives_one_warning(small_family, name):
    model, samplers = small_family(name), (adaptive_exit, autoregressive, diffusion_forcing, lossless_wavefront)

    def warned(run, *arguments, **options) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(*arguments, **options)
        return [str(w.message) for w in caught]

    more = ["num_steps is 6; this model was trained with 4 loops"]
    for sampler in samplers:
        assert warned(sampler.generate, model, [3, 1], 4, num_steps=4) == []
        assert warned(sampler.generate, model, [3, 1], 4, num_steps=6) == more
    assert warned(model, torch.tensor([[3]]), num_steps=6) == more
    assert warned(Engine, model, max_length=20, num_steps=6) == more
    (message,) = warned(autoregressive.generate, model, [3, 1], 4, kv="shared")
    assert "kv is 'shared'" in message and "arXiv 2608.09444" in message


def test_parcae_looks_tokens_up_wherever_it_runs(small_family):
    model, tokens = small_family("parcae", 2), torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    out = model(tokens, num_steps=3)
    states = lens.trajectory(model, tokens, num_steps=3)
    close(states[3], out.state, 1e-12)
    close(lens.coda_lens(model, states, tokens)[3], out.logits, 1e-9)
    with pytest.raises(ValueError, match="looks tokens up"):
        lens.coda_lens(model, states)


# --- shapes, memory and packed weights ---


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("parcae_140m", 144_323_136),
        ("parcae_370m", 388_003_328),
        ("parcae_770m", 776_655_680),
        ("parcae_1_3b", 1_338_591_744),
        ("raven_tinyllama_1_1b", 844_171_264),
        ("raven_llama_3_2_1b", 1_385_228_288),
        ("raven_olmo_2_1b", 1_359_071_232),
        ("ouro_1_4b", 1_434_652_673),
        ("ouro_2_6b", 2_667_974_657),
        ("nanbeige_4_2_3b", 4_169_800_704),
    ],
)
def test_parameters_of_published_sizes(name, parameters):
    with torch.device("meta"):
        model = model_of(preset(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_presets_are_copies(small_family):
    assert len(FAMILIES) == 10 and set(FAMILIES) < set(PRESETS)
    preset("ouro_1_4b").mean_recurrence = 9
    assert preset("ouro_1_4b").mean_recurrence == 4
    with pytest.raises(ValueError, match="preset is 'ouro'"):
        preset("ouro")


def test_grouped_queries_need_less_memory():
    """TinyLlama's shape: 4 heads of keys for 32 of queries; 4 + 8 r + 4 layer calls; k and v; two bytes."""
    assert bytes_per_token(preset("raven_tinyllama_1_1b"), 4) == 2 * (4 + 8 * 4 + 4) * 4 * 64 * 2
    assert bytes_per_token(preset("ouro_1_4b"), 4) == 768 * 1024  # as arXiv 2608.09444 has it
    assert bytes_per_token(preset("ouro_1_4b"), 4, "shared") == 192 * 1024


@pytest.fixture(scope="module")
def wide(small_family):
    """`wide("parcae")`: a model whose matrices are large enough to be packed."""
    sizes = dict(n_embd=256, n_heads=4, intermediate_size=256, vocab_size=300)
    return lambda name: small_family(name, 5, torch.float32, **sizes)


@pytest.mark.parametrize("name", ["huginn", "parcae"])
def test_packed_matrices_give_the_same_logits(wide, name, monkeypatch):
    model, seen = wide(name), []
    choose = Grid.choose
    monkeypatch.setattr(Grid, "choose", lambda self, x, at: seen.append(x.clone()) or choose(self, x, at))
    runs = [autoregressive.generate(model, [3, 1, 4], 6, packed=packed) for packed in (True, False)]
    assert runs[0].tokens == runs[1].tokens
    for ours, right in zip(seen[:6], seen[6:], strict=True):
        assert (ours - right).abs().max() < 1e-4 * right.abs().max()


def test_packed_matrices_follow_the_weights(wide):
    """Made once; and again for weights that have changed, in whatever way."""
    model = wide("huginn")
    weight = model.transformer.core_block[0].mlp.fc.weight
    if decoding.packed(weight) is None:
        pytest.skip("this build of PyTorch has no packed matrices")
    assert decoding.packed(weight) is decoding.packed(weight)
    before, kept = autoregressive.generate(model, [3, 1, 4], 6).tokens, weight.clone()
    for change in (lambda: weight.mul_(-1), lambda: setattr(weight, "data", -weight), lambda: weight.data.mul_(-1)):
        first = decoding.packed(weight)
        change()
        assert decoding.packed(weight) is not first
        right = autoregressive.generate(model, [3, 1, 4], 6, packed=False).tokens
        assert autoregressive.generate(model, [3, 1, 4], 6).tokens == right
    with torch.no_grad():
        weight.copy_(kept)
    assert autoregressive.generate(model, [3, 1, 4], 6).tokens == before


def test_without_packed_matrices_decoding_is_plain(wide, monkeypatch):
    model = wide("huginn")
    weight = model.transformer.core_block[0].mlp.fc.weight
    assert decoding.packed(weight.double()) is None and decoding.packed(weight[:100]) is None
    right = autoregressive.generate(model, [3, 1, 4], 6, packed=False).tokens
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert decoding.packed(weight) is None
    assert autoregressive.generate(model, [3, 1, 4], 6).tokens == right
