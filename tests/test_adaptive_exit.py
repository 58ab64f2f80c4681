"""Adaptive exit: the official tokens and steps; autoregressive where nothing exits; every row as if it were alone."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec import adaptive_exit, autoregressive
from minirec.adaptive_exit import CRITERIA, argmax_stability, cosine, entropy_diff, kl, latent_diff, minp_kl
from minirec.decoding import Grid

GOLDEN = json.loads((Path(__file__).parent / "golden" / "c_adaptive.json").read_text(encoding="utf-8"))["cases"]
RUNS = [case for case in GOLDEN if case != "tokenwise_forward"]  # here a prompt always exits as a whole
MEASURED = [case for case in RUNS if case.replace("_", "-") in CRITERIA]

PROMPTS = st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=7), min_size=1, max_size=3)
CHOICES = st.sampled_from(
    [{}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 5, "top_p": 0.9}, {"repetition_penalty": 1.5}]
)
CACHES = st.sampled_from([{"kv": "full"}, {"kv": "shared"}, {"kv": "shared", "kv_slots": 3}])
LOOSE = {  # thresholds at which some tokens of the small random models exit soon, some late, some never
    "latent-diff": [0.1, 0.3, 10.0],
    "cosine": [0.01, 0.1],
    "kl": [0.01, 0.1, 1.0],
    "minp-kl": [0.01, 0.1],
    "entropy-diff": [0.01, 0.1],
    "argmax-stability": [1, 2, 3],
}
RULES = st.fixed_dictionaries(
    {
        "rule": st.sampled_from([(name, threshold) for name, values in LOOSE.items() for threshold in values]),
        "num_steps": st.integers(3, 9),
        "exit_in_prefill": st.booleans(),
        "continuous_compute": st.booleans(),
        "min_steps": st.sampled_from([1, 1, 2, 3]),
        "check_every": st.sampled_from([1, 1, 2]),
        "init_scale": st.sampled_from([0.0, 1.0]),
    }
)


def keywords(rules: dict) -> dict:
    criterion, threshold = rules["rule"]
    return {k: v for k, v in rules.items() if k != "rule"} | {"criterion": criterion, "threshold": threshold}


# --- the official runs --------------------------------------------------------------------------------------------


def official(golden, case: str) -> tuple[dict, list[int]]:
    """The arguments of an official run in our words, and its prompt."""
    told, tensors = GOLDEN[case], golden("c_adaptive")[0]
    options = told.get("options", {})
    prompt_of = next(c for c in MEASURED if told["criterion"] == c.replace("_", "-"))
    run = {
        "criterion": told["criterion"],
        "threshold": told["exit_threshold"],
        "num_steps": told["num_steps"],
        "exit_in_prefill": not options.get("do_not_exit_in_prefill", False),
        "min_steps": 1 + options.get("min_steps", 0),  # theirs counts from 0
        "check_every": options.get("check_criterion_every_n_steps", 1),
        "continuous_compute": options.get("continuous_compute", False),
        "init_scale": 0,
        "kv": "full",
        "stop_tokens": [told["eos_token_id"]] if "eos_token_id" in told else (),
    }
    return run, tensors[f"{prompt_of}.prompt"][0].tolist()


@pytest.mark.parametrize("case", RUNS)
def test_tokens_and_steps_are_the_official_ones(golden, golden_model, case):
    run, prompt = official(golden, case)
    gen = adaptive_exit.generate(golden_model, prompt, 32, **run)
    assert gen.tokens == GOLDEN[case]["new_tokens"]
    assert prompt + gen.tokens == golden("c_adaptive")[0][f"{case}.sequence"][0].tolist()
    if "compute_steps" in GOLDEN[case]:
        assert gen.depth == GOLDEN[case]["compute_steps"]


@pytest.mark.parametrize("case", MEASURED)
def test_values_are_the_official_ones(golden, golden_model, monkeypatch, case):
    """What each check saw; a list for each token, as theirs."""
    (run, prompt), name = official(golden, case), case.replace("_", "-")
    measure, reads, default = CRITERIA[name]
    seen, first_outputs = [], []
    decode = Grid.decode

    def record(previous, new):
        change = measure(previous, new)
        seen.append(change.mean().item())
        return change

    def watch(grid, s, at, only=None):
        logits = decode(grid, s, at, only)
        first_outputs.append(logits)
        return logits

    monkeypatch.setitem(CRITERIA, name, (record, reads, default))
    monkeypatch.setattr(Grid, "decode", watch)
    gen = adaptive_exit.generate(golden_model, prompt, 32, **run)
    theirs = golden("c_adaptive")[0][f"{case}.exit_values"]
    if name in ("kl", "minp-kl"):  # the first output against the uniform distribution, which is where theirs begins
        uniform = torch.zeros_like(first_outputs[0])
        torch.testing.assert_close(measure(uniform, first_outputs[0])[0, 0], theirs[0, 0], rtol=0, atol=1e-4)
    at, compared = 0, 0
    for token, depth in enumerate(gen.depth):
        checks = range(1 if reads == "state" else 2, depth + (depth < run["num_steps"]))
        stood = 0
        for step in checks:
            value, right = seen[at], theirs[token, step - 1].item()
            at += 1
            if name == "argmax-stability":  # theirs counts, ours tells whether it changed
                value = stood = stood + 1 if value == 0 else 0
            if not math.isnan(right):  # their cosine with a state of zero
                assert value == pytest.approx(right, abs=1e-4), (token, step)
                compared += 1
    assert at == len(seen) and compared > 100


# --- equal to autoregressive decoding -----------------------------------------------------------------------------


@given(
    PROMPTS, st.integers(0, 3), st.sampled_from(list(CRITERIA)), CACHES, CHOICES, st.sampled_from([0.0, 1.0]),
    st.booleans(), st.integers(1, 3), st.sampled_from([0, 1e-30]),
)  # fmt: skip
def test_a_threshold_that_is_never_met_is_autoregressive(
    small_model, prompts, seed, criterion, cache, choice, scale, in_prefill, check_every, threshold
):
    """With check_every above 1 too: the official code then takes the token from the last checked step."""
    model = small_model(seed)
    common = cache | choice | {"init_scale": scale, "seed": seed, "num_steps": 5}
    rule = {"criterion": criterion, "threshold": 5 if criterion == "argmax-stability" else threshold}
    right = autoregressive.generate(model, prompts, 6, **common)
    rows = adaptive_exit.generate(
        model, prompts, 6, exit_in_prefill=in_prefill, check_every=check_every, **rule, **common
    )
    assert [(g.tokens, g.depth, g.passes) for g in rows] == [(g.tokens, g.depth, g.passes) for g in right]


# --- a batch ------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(PROMPTS, st.integers(0, 3), RULES, CACHES, CHOICES, st.integers(0, 22))
def test_a_row_of_a_batch_gets_the_tokens_and_depths_it_gets_alone(
    small_model, prompts, seed, rules, cache, choice, stop
):
    model, seeds = small_model(seed), list(range(7, 7 + len(prompts)))
    options = keywords(rules) | cache | choice | {"stop_tokens": [stop], "trace": True}
    together = adaptive_exit.generate(model, prompts, 8, seed=seeds, **options)
    for prompt, own, row in zip(prompts, seeds, together, strict=True):
        alone = adaptive_exit.generate(model, prompt, 8, seed=own, **options)
        assert (row.tokens, row.depth, row.trace) == (alone.tokens, alone.depth, alone.trace)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_prompt_exits_by_its_own_positions_whatever_its_padding_says(small_model, criterion):
    prompts, depths = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [7, 7], [8, 2, 8]], set()
    for seed in range(4):
        for threshold in LOOSE[criterion][:2]:
            rule = {"criterion": criterion, "threshold": threshold, "exit_in_prefill": True, "num_steps": 12}
            together = adaptive_exit.generate(small_model(seed), prompts, 1, **rule)
            alone = [adaptive_exit.generate(small_model(seed), prompt, 1, **rule) for prompt in prompts]
            assert [(g.tokens, g.depth) for g in together] == [(g.tokens, g.depth) for g in alone]
            depths.add(tuple(g.depth[0] for g in together))
    assert any(len(set(row)) > 1 for row in depths), "prompts do exit at depths of their own"


@pytest.mark.parametrize("criterion", CRITERIA)
def test_rows_do_exit_at_depths_of_their_own(small_model, criterion):
    """So that the property above is about something."""
    rule = {"criterion": criterion, "threshold": LOOSE[criterion][1], "num_steps": 9, "stop_tokens": ()}
    rows = adaptive_exit.generate(small_model(1), [[3, 1, 4], [1, 5], [9]], 12, **rule)
    apart = sum(len(set(depths)) > 1 for depths in zip(*(row.depth for row in rows), strict=True))
    assert apart >= 3
    assert all(len(set(row.depth)) > 1 for row in rows)


# --- what a deeper token reads ------------------------------------------------------------------------------------


def decode_by_hand(model, prompt: list[int], n: int, num_steps: int, threshold: float) -> tuple[list[int], list[int]]:
    """latent-diff with the package's model alone: tokens and depths.

    Before step k of a position, every other one is put back to the state from which it ran its own step k, or, if it
    had stopped by then, its last step.  The model has one layer in its core, so the keys and values it then makes for
    these positions are those of that step.
    """
    tokens, depths, states = list(prompt), [], []  # states[p][k]: of position p after k steps
    for t in range(len(prompt) + n - 1):
        e = model.prelude(torch.tensor([tokens[: t + 1]]))
        path = [model.initial_state(torch.tensor([[t]]), seed=0)[0, 0]]
        for step in range(num_steps):
            s = torch.stack([own[min(step, len(own) - 2)] for own in states] + [path[step]])[None]
            path.append(model.recur(s, e)[0, -1])
            moved = (path[-1] - path[-2]).norm() / path[-1].norm()
            if moved < threshold and t >= len(prompt):
                break
        states.append(path)
        if t >= len(prompt) - 1:
            logits = model.coda(torch.stack([own[-1] for own in states])[None])[0, -1]
            tokens.append(int(logits.argmax()))
            depths.append(len(path) - 1)
    return tokens[len(prompt) :], depths


@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.inference_mode()
def test_a_deeper_token_reads_the_last_step_of_a_shallower_one(small_model, seed):
    model, prompt = small_model(seed), [3, 1, 4, 1]
    gen = adaptive_exit.generate(model, prompt, 14, num_steps=9, threshold=0.2, stop_tokens=())
    assert (gen.tokens, gen.depth) == decode_by_hand(model, prompt, 14, 9, 0.2)
    later_is_deeper = [a < b for a, b in zip(gen.depth[1:], gen.depth[2:], strict=False)]
    assert any(later_is_deeper), "else nothing was asked for that had not been run"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shared_slots_that_no_step_has_written_show_the_last_step_too(small_model, seed):
    """Three slots, but some tokens run one or two steps; what padding left in the third must not be read."""
    model, run = small_model(seed), {"kv": "shared", "kv_slots": 3, "init_scale": 0.0, "stop_tokens": ()}
    prompts = [[3, 1, 4, 1, 5, 9], [2]]
    together = adaptive_exit.generate(model, prompts, 12, criterion="argmax-stability", threshold=1, **run)
    alone = [adaptive_exit.generate(model, p, 12, criterion="argmax-stability", threshold=1, **run) for p in prompts]
    assert [(g.tokens, g.depth) for g in together] == [(g.tokens, g.depth) for g in alone]


# --- what every generation promises -------------------------------------------------------------------------------


@given(PROMPTS, st.integers(0, 3), RULES, CACHES, st.sets(st.integers(0, 22), max_size=3), st.integers(1, 9))
def test_counts_are_exact_and_no_step_is_wasted(small_model, prompts, seed, rules, cache, stop, limit):
    prompt, streamed, options = prompts[0], [], keywords(rules)
    gen = adaptive_exit.generate(
        small_model(seed), prompt, limit, stop_tokens=stop, trace=True, on_token=streamed.append, **options, **cache
    )
    assert streamed == gen.tokens
    assert 1 <= len(gen.tokens) <= limit
    assert not stop & set(gen.tokens[:-1]), "nothing comes after a stop token"
    assert len(gen.tokens) == limit or gen.tokens[-1] in stop
    r, after_prompt = options["num_steps"], sum(gen.depth[1:])
    assert gen.passes == gen.depth[0] + after_prompt and gen.row_steps == after_prompt
    assert options["exit_in_prefill"] or gen.depth[0] == r
    checks = range(options["min_steps"], r, options["check_every"])
    asked = [
        0 if i == 0 and not options["exit_in_prefill"] else sum(c <= d for c in checks) for i, d in enumerate(gen.depth)
    ]
    if options["criterion"] in ("latent-diff", "cosine"):
        assert gen.decodes == len(gen.tokens)
    else:  # the coda is called for every check, and the logits of the one that let a token go are used
        assert gen.decodes == sum(asked) + 1 + sum(depth == r for depth in gen.depth[1:])
    assert all(depth == r or depth in checks for depth in gen.depth)
    assert [(step.depths, step.guesses) for step in gen.trace] == [
        ([depth], [token]) for depth, token in zip(gen.depth[1:], gen.tokens[1:], strict=True)
    ]
    assert [(step.start, step.frozen) for step in gen.trace] == [
        (len(prompt) + i, len(prompt) + i + 2) for i in range(len(gen.trace))
    ]


def test_thresholds_trade_depth(small_model):
    """Looser is shallower, for each criterion; the defaults are the official ones."""
    model, run = small_model(1), {"num_steps": 12, "stop_tokens": ()}
    for name, thresholds in LOOSE.items():
        tight, loose = (
            adaptive_exit.generate(model, [3, 1, 4], 12, criterion=name, threshold=threshold, **run)
            for threshold in sorted(thresholds[:2], reverse=name == "argmax-stability")
        )
        assert sum(loose.depth) < sum(tight.depth) < 12 * 12, name
        default = adaptive_exit.generate(model, [3, 1, 4], 12, criterion=name, **run)
        named = adaptive_exit.generate(model, [3, 1, 4], 12, criterion=name, threshold=CRITERIA[name][2], **run)
        assert default.depth == named.depth
    assert {name: default for name, (_, _, default) in CRITERIA.items()} == {
        "latent-diff": 0.03, "cosine": 1e-3, "kl": 1e-3, "minp-kl": 1e-5, "entropy-diff": 1e-3, "argmax-stability": 5,
    }  # fmt: skip


def test_tokens_stream_in_order_and_false_stops(small_model):
    model, rule = small_model(1), {"threshold": 0.3, "num_steps": 9, "stop_tokens": ()}
    rows = {0: [], 1: []}

    def on_token(token, row):
        rows[row].append(token)
        return row == 1 or len(rows[0]) < 2  # row 0 ends after two tokens, row 1 goes on

    batch = adaptive_exit.generate(model, [[3, 1], [5]], 6, on_token=on_token, **rule)
    assert [gen.tokens for gen in batch] == [rows[0], rows[1]]
    assert (len(rows[0]), len(rows[1])) == (2, 6)
    deepest = [max(gen.depth[i] for gen in batch if i < len(gen.depth)) for i in range(6)]
    assert batch[1].passes == sum(deepest), "nobody waits for a row that has ended"
    alone = adaptive_exit.generate(model, [5], 6, **rule)
    assert (batch[1].tokens, batch[1].depth) == (alone.tokens, alone.depth)


def test_sampling_is_seeded(small_model):
    model, run = small_model(2), {"temperature": 1.0, "threshold": 0.3, "stop_tokens": ()}
    runs = [adaptive_exit.generate(model, [3, 1], 12, seed=seed, **run).tokens for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_continuous_compute_starts_where_the_last_token_ended(small_model):
    model, run = small_model(1), {"num_steps": 1, "stop_tokens": (), "kv": "shared"}  # nothing exits: the start decides
    gen = adaptive_exit.generate(model, [3], 8, continuous_compute=True, **run)
    tokens = torch.tensor([[3, *gen.tokens[:-1]]])
    e, states = model.prelude(tokens), [model.initial_state(torch.tensor([[0]]), seed=0)]
    while len(states) <= tokens.shape[1]:  # one step of one layer: the past shows the keys of the states it began with
        states.append(model.recur(torch.cat(states, dim=1), e[:, : len(states)])[:, -1:])
    assert gen.tokens == model.coda(torch.cat(states[1:], dim=1))[0].argmax(-1).tolist()
    own = adaptive_exit.generate(model, [3], 8, **run)
    assert own.tokens[0] == gen.tokens[0] and own.tokens != gen.tokens


# --- the criteria -------------------------------------------------------------------------------------------------


def test_criteria_on_numbers_that_a_head_can_check():
    a, b = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 5.0]]])
    assert latent_diff(a, b).item() == pytest.approx(math.sqrt(10) / 5)
    assert cosine(a, b).item() == pytest.approx(1 - 0.8)
    assert cosine(a, 7 * a).item() == pytest.approx(0, abs=1e-6)  # it turned nowhere
    assert cosine(torch.zeros_like(a), b).item() == 1  # the official one is NaN
    p, q = (torch.tensor([[values]]).log() for values in ([0.75, 0.25], [0.5, 0.5]))
    assert kl(p, q).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl(q, p).item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    entropies = math.log(2), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert entropy_diff(p, q).item() == pytest.approx(entropies[0] - entropies[1])
    assert entropy_diff(q, p).item() == pytest.approx(entropies[0] - entropies[1])
    assert argmax_stability(p, q + torch.tensor([0.0, 0.1])).item() == 1
    assert argmax_stability(p, q + torch.tensor([0.1, 0.0])).item() == 0
    # of four tokens two are below a tenth of the likeliest: each counts as 1/4, whatever it had
    p, q = (torch.tensor([[values]]).log() for values in ([0.8, 0.16, 0.03, 0.01], [0.64, 0.32, 0.01, 0.03]))
    first, second = ([x / sum(xs) for x in xs] for xs in ([0.8, 0.16, 0.25, 0.25], [0.64, 0.32, 0.25, 0.25]))
    by_hand = sum(x * math.log(x / y) for x, y in zip(first, second, strict=True))
    assert minp_kl(p, q).item() == pytest.approx(by_hand, rel=1e-5)


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 5))
def test_criteria_give_one_number_per_position_and_0_where_nothing_changed(seed, rows, width):
    generator = torch.Generator().manual_seed(seed)
    old, new = 4 * torch.randn(2, rows, width, 11, generator=generator)
    for measure, _, _ in CRITERIA.values():
        change = measure(old, new)
        assert change.shape == (rows, width) and bool((change >= 0).all())
        still = measure(old, old)
        torch.testing.assert_close(still, torch.zeros(rows, width))
        assert bool((still >= 0).all()), "no threshold of 0 is ever met"
        torch.testing.assert_close(change[-1:, -1:], measure(old[-1:, -1:], new[-1:, -1:]))


def test_the_table_is_the_only_list_of_criteria(small_model, monkeypatch):
    model, rule = small_model(0), {"num_steps": 6, "stop_tokens": ()}
    with pytest.raises(ValueError, match=f"one of {', '.join(map(repr, CRITERIA))}$"):
        adaptive_exit.generate(model, [1], 2, criterion="mine")
    monkeypatch.setitem(CRITERIA, "mine", (lambda old, new: torch.zeros(new.shape[:2]), "state", 0.5))
    assert adaptive_exit.generate(model, [1], 4, criterion="mine", **rule).depth == [6, 1, 1, 1]
    monkeypatch.setitem(CRITERIA, "mine", (argmax_stability, "logits", 2))
    stable = adaptive_exit.generate(model, [1], 4, criterion="argmax-stability", threshold=2, **rule)
    assert adaptive_exit.generate(model, [1], 4, criterion="mine", **rule).depth == stable.depth
    with pytest.raises(ValueError, match=r"'argmax-stability', 'mine'$"):
        adaptive_exit.generate(model, [1], 2, criterion="none")


# --- bad arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"criterion": "KL"}, "criterion is 'KL'; it must be one of 'latent-diff', 'cosine', "),
        ({"criterion": None}, "criterion is None; it must be one of 'latent-diff', 'cosine', "),
        ({"threshold": -0.1}, "threshold is -0.1; it must be a number, at least 0"),
        ({"threshold": math.nan}, "threshold is nan; it must be a number, at least 0"),
        ({"threshold": "auto"}, "threshold is 'auto'; it must be a number, at least 0"),
        ({"criterion": "kl", "threshold": -1}, "threshold is -1; it must be a number, at least 0"),
        ({"criterion": "argmax-stability", "threshold": 0}, "threshold is 0; it must be a whole number, at least 1"),
        ({"criterion": "argmax-stability", "threshold": 2.5}, "threshold is 2.5; it must be a whole number"),
        ({"min_steps": 0}, "min_steps is 0; it must be a whole number, at least 1"),
        ({"min_steps": 5}, "min_steps is 5; it must be from 1 to num_steps, here 4"),
        ({"check_every": 0}, "check_every is 0; it must be a whole number, at least 1"),
        ({"num_steps": 0}, "num_steps is 0; it must be a whole number from 1 to 4096"),
        ({"exit_in_prefill": "no"}, "exit_in_prefill is 'no'; it must be True or False"),
        ({"kv_slots": 9, "kv": "shared"}, "kv_slots is 9; it must be from 1 to num_steps, here 4"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1, 23]}, "prompt holds 23; token ids are from 0 to 22"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number, at least 1"),
    ],
)
def test_bad_arguments_are_named_before_any_work(small_model, monkeypatch, wrong, named):
    monkeypatch.setattr(Grid, "embed", lambda *_: pytest.fail("work was done"))
    arguments = {"prompt": [1, 2], "max_new_tokens": 5} | wrong
    with pytest.raises(ValueError) as error:
        adaptive_exit.generate(small_model(0), **arguments)
    assert str(error.value).startswith(named)
