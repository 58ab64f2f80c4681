"""Diffusion forcing: the official sampler replayed, and what our own promises."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minirec import autoregressive, diffusion_forcing
from minirec.decoding import Grid
from minirec.diffusion_forcing import blend, leading

CASES = json.loads((Path(__file__).parent / "golden" / "d_diffusion.json").read_text(encoding="utf-8"))["cases"]
LEFT_OUT = ("noise0.5sqrt", "no_prefill", "no_prefill_shrinks", "eos")
REPLAYED = [case for case in CASES if not case.endswith(LEFT_OUT)]
CACHES = {  # official name -> ours
    "full": {"kv": "full"},
    "latest-m4-compress-s4": {"kv": "shared", "kv_slots": 1},
    "latest-m4-compress-s16": {"kv": "shared", "kv_slots": 4},
}

PROMPTS = st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=7), min_size=1, max_size=3)
POLICIES = st.sampled_from([{"kv": "full"}, {"kv": "shared"}, {"kv": "shared", "kv_slots": 2}])
CHOICES = st.sampled_from([{}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 5}, {"repetition_penalty": 1.5}])


def looks(schedule: str) -> bool:
    """Whether a schedule compares with exit_threshold, which the others refuse."""
    return schedule in ("adaptive", "acceleration")


RULES = st.fixed_dictionaries(
    {
        "inner_steps": st.integers(1, 4),
        "exit_threshold": st.sampled_from([0.0, 0.05, 0.3, 1.1, 10.0]),
        "schedule": st.sampled_from(["adaptive", "adaptive", "acceleration", "token-stability", "fixed"]),
        "freeze": st.sampled_from(["prefix", "last"]),
        "headway": st.integers(1, 2),
        "max_wavefront": st.sampled_from([1, 2, 3, 128]),
        "noise": st.sampled_from([0.0, 0.3]),
        "momentum": st.sampled_from([0.0, 0.1, 0.5]),
        "continuous_compute": st.booleans(),
        "init_scale": st.sampled_from([0.0, 1.0]),
    }
).map(lambda rules: {name: rules[name] for name in rules if name != "exit_threshold" or looks(rules["schedule"])})
ODD = {"inner_steps": 1, "exit_threshold": 1.1, "init_scale": 0.0}
LAST = {"freeze": "last", "max_wavefront": 3}


# --- the official sampler, replayed -------------------------------------------------------------------------------


def replay(model, case: str, tensors: dict):
    """Drive our grid with the official decisions of a case: where each window lies and what is frozen in it.

    Yields one record per outer step: the numbers that the official code has at that point, as ours.  Positions
    predict tokens from the last frozen one on; the caches, states and tokens are left to our own code.  Three
    rules are theirs: the cache is filed by the steps of this outer step alone; a new position's embedding is blended
    with zeros, except in the first outer step; the first position counts as num_steps deep when it starts.
    """
    options, t = CASES[case]["args"], {k[len(case) + 1 :]: v for k, v in tensors.items() if k.startswith(case + ".")}
    prompt = t["prompt"][0].tolist()
    grid = Grid(model, prompt, 100, 8, init_scale=0, stop_tokens=(), **CACHES[options["cache_lookup_strategy"]])
    grid.prefill()
    last_e, count = torch.zeros_like(grid.state), torch.zeros_like(grid.tokens)
    count[0, len(prompt)] = 8
    advanced = 0
    for number, columns in enumerate(t["trace"].tolist()):
        record = SimpleNamespace(number=number, advanced=advanced)
        record.start, record.width, _, record.frozen, _, _, length, record.now_frozen, next_start, _ = columns
        at = grid.window([record.start], record.width)
        e, record.before = grid.embed(at), at.read(grid.state).clone()
        if number > 0:
            e = blend(e, at.read(last_e), torch.full(e.shape[:2], options["ema_embeds"]))
        at.write(last_e, e)
        s = record.before * (1 - options["state_noise_mixing"] / (1 + at.read(count)))[..., None]  # the noise is zero
        for inner_step in range(options["inner_recurrence"]):
            s = grid.recur(s, e, at, inner_step)
        at.write(grid.state, s)
        at.write(count, at.read(count) + options["inner_recurrence"])
        guesses = grid.choose(grid.decode(s, at), at.positions)[0]
        end = record.start + record.width
        grid.tokens[0, record.frozen : end + 1] = guesses[record.frozen - 1 - record.start :]
        grid.tokens[0, end + 1 : length] = 0  # headway 2 opens positions on a made-up token, here 0
        record.e, record.s, record.tokens = e[0], s[0], grid.tokens[0, :length].clone()
        if options["continuous_compute"]:
            grid.state[0, end:length] = s[0, -1]
        advanced = next_start - record.start
        yield record


@pytest.mark.parametrize("case", REPLAYED)
def test_guesses_are_the_official_ones_at_every_outer_step(golden, golden_model, distance, case):
    """Left out: what minirec does not have.

    `noise0.5sqrt` mixes noise by another formula; `no_prefill` and `no_prefill_shrinks` start without a prefill;
    `eos` is the same run cut by another stop rule.
    """
    tensors, _ = golden("d_diffusion")
    official = {k[len(case) + 1 :]: v for k, v in tensors.items() if k.startswith(case + ".")}
    threshold, latent_diff = CASES[case]["args"]["exit_t"], CASES[case]["args"]["freeze_strategy"] == "latent-diff"
    changed_before, advanced_before, compared = {}, 0, 0
    for now in replay(golden_model, case, tensors):
        where = f"outer step {now.number}"
        if now.number < len(official["token_tablet"]):  # their record ends after 66 outer steps
            assert now.tokens.tolist() == official["token_tablet"][now.number, : len(now.tokens)].tolist(), where
            frozen = official["frozen_tablet"][now.number, : now.now_frozen].tolist()
            assert now.tokens[: now.now_frozen].tolist() == frozen, where
        if f"states_after_inner.{now.number}" in official:
            assert distance(now.s, official[f"states_after_inner.{now.number}"]) < 1e-5, where
            assert distance(now.e, official[f"embeds.{now.number}"]) < 1e-5, where
        if CASES[case]["args"]["freeze_strategy"].startswith("latent-acceleration"):
            change = dict(enumerate(now.s - now.before[0], now.start))
            if now.number > 1 and not now.advanced and not advanced_before:  # else theirs are misaligned, as below
                theirs = official["criterion"][now.number]
                theirs, old = theirs[~theirs.isnan()], [p for p in change if p in changed_before]
                ours = [(change[p] - changed_before[p]).norm() / now.s[p - now.start].norm() for p in old]
                torch.testing.assert_close(torch.stack(ours), theirs, rtol=0, atol=1e-4)
                compared += 1
            changed_before, advanced_before = change, now.advanced
        if latent_diff and now.number > 0:
            # on the step after an advance they compare position p with what position p + advance was
            theirs = official["criterion"][now.number]
            theirs, n = theirs[~theirs.isnan()], max(0, now.width - now.advanced)
            moved = (now.s[:n] - now.before[0, now.advanced :][:n]).norm(dim=-1) / now.s[:n].norm(dim=-1)
            torch.testing.assert_close(moved, theirs, rtol=0, atol=1e-4)
            length = now.start + leading((moved < threshold).tolist(), "last")  # what they freeze: our "last" rule
            assert now.now_frozen == max(now.frozen, length), where
    assert now.tokens[: now.now_frozen].tolist() == official["sequence"][0].tolist()
    assert compared > 5 or not CASES[case]["args"]["freeze_strategy"].startswith("latent-acceleration")


def test_official_comparison_freezes_nothing_after_an_advance(golden, golden_model):
    """The numbers in the module's head: 60 outer steps that follow an advance, 0 freeze, aligned 29 would have."""
    steps = froze = would_freeze = 0
    for case in ("latent_diff.i4.ema0.0.w128", "latent_diff.i2.ema0.0.w128", "latent_diff.i1.ema0.0.w16"):
        threshold = CASES[case]["args"]["exit_t"]
        for now in replay(golden_model, case, golden("d_diffusion")[0]):
            if now.advanced:
                moved = (now.s - now.before[0]).norm(dim=-1) / now.s.norm(dim=-1)
                steps += 1
                froze += now.now_frozen > now.frozen
                would_freeze += now.start + leading((moved < threshold).tolist(), "last") > now.frozen
    assert (steps, froze, would_freeze) == (60, 0, 29)


def test_the_replayed_cases_cover_what_they_should():
    args = [CASES[case]["args"] for case in REPLAYED]
    assert {a["inner_recurrence"] for a in args} == {1, 2, 4}
    assert {a["ema_embeds"] for a in args} == {0.0, 0.1}
    assert {a["cache_lookup_strategy"] for a in args} == set(CACHES)
    assert {a["headway"] for a in args} == {1, 2}
    assert {a["state_noise_mixing"] for a in args} == {0.0, 0.5}
    assert len(REPLAYED) == len(CASES) - 5 and len(REPLAYED) >= 25


# --- equal to autoregressive decoding -----------------------------------------------------------------------------


@given(
    PROMPTS, st.integers(0, 3), st.integers(1, 5), POLICIES, CHOICES, st.sampled_from([0.0, 1.0]), st.integers(0, 22)
)
def test_a_wavefront_of_one_at_full_depth_is_autoregressive(
    small_model, prompts, seed, num_steps, policy, choice, scale, stop
):
    model = small_model(seed)
    policy = policy | {"kv_slots": min(policy.get("kv_slots", 1), num_steps)}
    options = policy | choice | {"init_scale": scale, "seed": seed, "num_steps": num_steps, "stop_tokens": [stop]}
    right = autoregressive.generate(model, prompts, 6, **options)
    for freeze in ("prefix", "last"):
        ours = diffusion_forcing.generate(
            model, prompts, 6, max_wavefront=1, inner_steps=num_steps, freeze=freeze, **options
        )
        for a, b in zip(ours, right, strict=True):
            assert (a.tokens, a.depth, a.passes) == (b.tokens, b.depth, b.passes)


@given(PROMPTS, st.integers(0, 3), st.integers(1, 5), POLICIES, CHOICES)
def test_a_fixed_schedule_at_full_depth_is_autoregressive(small_model, prompts, seed, num_steps, policy, choice):
    model = small_model(seed)
    policy = policy | {"kv_slots": min(policy.get("kv_slots", 1), num_steps)}
    right = autoregressive.generate(model, prompts, 6, num_steps=num_steps, **policy, **choice)
    ours = diffusion_forcing.generate(
        model, prompts, 6, num_steps=num_steps, inner_steps=num_steps, schedule="fixed", **policy, **choice
    )
    assert [gen.tokens for gen in ours] == [gen.tokens for gen in right]


# --- a batch ------------------------------------------------------------------------------------------------------


# rows of unequal widths, where what lies beyond the narrower one's last open position happens to look settled
@example([[5, 17, 22], [5, 5], [20, 21]], 0, ODD | {"inner_steps": 2, "headway": 2}, {"kv": "shared"}, {}, 7)
@example([[8], [12, 12], [20, 20, 21, 12]], 0, ODD | LAST | {"init_scale": 1.0}, {"kv": "shared"}, {}, 0)
@settings(max_examples=80)
@given(PROMPTS, st.integers(0, 3), RULES, POLICIES, CHOICES, st.integers(0, 22))
def test_a_row_of_a_batch_gets_the_tokens_it_gets_alone(small_model, prompts, seed, rules, policy, choice, stop):
    model, seeds = small_model(seed), list(range(7, 7 + len(prompts)))
    options = rules | policy | choice | {"stop_tokens": [stop], "trace": True}
    together = diffusion_forcing.generate(model, prompts, 8, seed=seeds, **options)
    for prompt, own, row in zip(prompts, seeds, together, strict=True):
        alone = diffusion_forcing.generate(model, prompt, 8, seed=own, **options)
        assert (row.tokens, row.depth, row.passes) == (alone.tokens, alone.depth, alone.passes)
        assert row.trace == alone.trace


# --- what every generation promises -------------------------------------------------------------------------------


@given(PROMPTS, st.integers(0, 3), RULES, POLICIES, st.sets(st.integers(0, 22), max_size=2), st.integers(1, 9))
def test_frozen_tokens_stand_and_the_counts_are_right(small_model, prompts, seed, rules, policy, stop, limit):
    model, prompt, streamed = small_model(seed), prompts[0], []
    gen = diffusion_forcing.generate(
        model, prompt, limit, stop_tokens=stop, trace=True, on_token=streamed.append, **rules, **policy
    )
    assert streamed == gen.tokens
    assert 1 <= len(gen.tokens) <= limit
    assert not stop & set(gen.tokens[:-1]), "nothing comes after a stop token"
    assert len(gen.tokens) == limit or gen.tokens[-1] in stop
    inner, num_steps = rules["inner_steps"], model.config.mean_recurrence
    assert len(gen.depth) == len(gen.tokens)
    assert gen.depth[0] == num_steps and all(d > 0 and d % inner == 0 for d in gen.depth[1:])
    assert gen.passes == num_steps + inner * len(gen.trace)
    assert gen.decodes == 1 + len(gen.trace)
    assert gen.row_steps == inner * sum(len(step.guesses) for step in gen.trace)
    sequence = prompt + gen.tokens
    frozen = len(prompt) + 1
    ran = {}  # recurrence steps per position
    for step in gen.trace:
        assert step.start == frozen - 1, "the window starts at the last frozen position"
        assert len(step.depths) == len(step.guesses) <= rules["max_wavefront"]
        for cell, depth in enumerate(step.depths, step.start):
            assert depth == ran.get(cell, 0) + inner
            ran[cell] = depth
        assert frozen <= step.frozen <= len(sequence)
        newly = step.guesses[: step.frozen - frozen]
        assert newly == sequence[frozen : step.frozen], "what froze is what was guessed, and it stands"
        assert gen.depth[frozen - len(prompt) : step.frozen - len(prompt)] == step.depths[: len(newly)]
        frozen = step.frozen
    assert frozen == len(sequence)


@given(PROMPTS, st.integers(0, 3), RULES, POLICIES, st.integers(0, 7))
def test_a_stop_token_cuts_the_run_and_changes_nothing_before_it(small_model, prompts, seed, rules, policy, index):
    """Also in the middle of several tokens that freeze in one outer step."""
    model, prompt = small_model(seed), prompts[0]
    free = diffusion_forcing.generate(model, prompt, 8, **rules, **policy)
    stop = free.tokens[index]
    gen = diffusion_forcing.generate(model, prompt, 8, stop_tokens=[stop], **rules, **policy)
    n = free.tokens.index(stop) + 1
    assert (gen.tokens, gen.depth) == (free.tokens[:n], free.depth[:n])


def test_false_from_on_token_ends_it(small_model):
    model = small_model(1)
    free = diffusion_forcing.generate(model, [3, 1], 8)
    for stop_after in (1, 3):
        seen = []

        def on_token(token, seen=seen, stop_after=stop_after):
            seen.append(token)
            return len(seen) < stop_after

        gen = diffusion_forcing.generate(model, [3, 1], 8, on_token=on_token)
        assert gen.tokens == seen == free.tokens[:stop_after]


def test_sampling_is_seeded_and_shared_with_autoregressive_decoding(small_model):
    model, run = small_model(2), dict(temperature=1.0, inner_steps=2)
    same = [diffusion_forcing.generate(model, [3, 1], 12, seed=s, **run).tokens for s in (5, 5, 6)]
    assert same[0] == same[1] != same[2]
    one = dict(temperature=1.0, seed=5, kv="shared")
    narrow = diffusion_forcing.generate(model, [3, 1], 12, max_wavefront=1, inner_steps=4, **one)
    assert narrow.tokens == autoregressive.generate(model, [3, 1], 12, **one).tokens


# --- the rules, one by one ----------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_leading(settled):
    prefix = next((i for i, yes in enumerate(settled) if not yes), len(settled))
    last = max((i + 1 for i, yes in enumerate(settled) if yes), default=0)
    assert (leading(settled, "prefix"), leading(settled, "last")) == (prefix, last)


@given(PROMPTS, st.integers(0, 3), st.integers(1, 4), st.integers(1, 6), st.sampled_from([128, 1, 3]))
def test_fixed_schedule_runs_every_position_equally_deep(small_model, prompts, seed, inner, limit, wavefront):
    model, num_steps = small_model(seed), 4
    gen = diffusion_forcing.generate(
        model, prompts[0], limit, schedule="fixed", inner_steps=inner, max_wavefront=wavefront, trace=True
    )
    outer_steps = -(-num_steps // inner)  # of one position
    assert gen.depth == [num_steps] + [outer_steps * inner] * (limit - 1)
    if wavefront == 1:  # one position after another
        assert len(gen.trace) == outer_steps * (limit - 1)
    elif wavefront == 128 and limit > 1:  # a diagonal: a token an outer step, once the first is through
        assert len(gen.trace) == outer_steps + limit - 2


@given(PROMPTS, st.integers(0, 3), st.integers(1, 4), st.sampled_from([0.0, 1e9]), st.integers(1, 2))
def test_adaptive_freezing_follows_from_the_guesses_alone_at_the_two_ends(
    small_model, prompts, seed, inner, threshold, headway
):
    """Threshold 0: only the cap can settle a position.  A huge one: every position is settled at once.

    Either way what freezes follows from which positions kept their token, so the trace can be checked by hand.
    """
    model = small_model(seed)
    gen = diffusion_forcing.generate(
        model, prompts[0], 8, inner_steps=inner, exit_threshold=threshold, headway=headway, trace=True
    )
    ran_on = {}  # position -> the token that it ran on; the first one's is final
    age = {}  # recurrence steps since that token last changed
    for step, following in zip(gen.trace, gen.trace[1:] + [None], strict=True):
        frozen, leads, before = 0, True, dict(ran_on)
        for i, position in enumerate(range(step.start, step.start + len(step.guesses))):
            kept = i == 0 or step.guesses[i - 1] == before.get(position, 0)  # 0 stands where nothing was guessed
            settled = threshold > 0 or age.get(position, 0) + inner >= model.config.mean_recurrence
            leads = leads and settled and kept
            frozen += leads
            age[position] = age.get(position, 0) + inner if kept else 0
            ran_on[position + 1] = step.guesses[i]
        assert step.frozen == step.start + 1 + frozen
        if following:
            room = len(prompts[0]) + 8 - 1 - following.start
            assert len(following.guesses) == max(1, min(len(step.guesses) - frozen + headway, room))


@given(
    st.lists(st.integers(0, 22), min_size=1, max_size=5), st.integers(0, 3), st.integers(1, 3), st.floats(0.01, 1.0),
    st.sampled_from(["adaptive", "acceleration", "token-stability"]), st.booleans(),
)  # fmt: skip
def test_when_a_position_settles(small_model, prompt, seed, inner, threshold, schedule, continuous):
    """By hand: its state moved less than the threshold, or its pace changed by less, or its token stood."""
    model = small_model(seed)
    gen = diffusion_forcing.generate(
        model, prompt, 2, num_steps=12, inner_steps=inner, exit_threshold=threshold if looks(schedule) else None,
        kv="shared", schedule=schedule, continuous_compute=continuous,
    )  # fmt: skip
    grid = Grid(model, prompt, 2, num_steps=12, kv="shared")
    grid.prefill()
    at = grid.window([len(prompt)], 1)
    e, s, depth = grid.embed(at), at.read(grid.state), 0
    if continuous:
        s = grid.state[:, len(prompt) - 1 : len(prompt)]
    states, said = [s], []
    while depth < 12:
        for _ in range(inner):
            s = grid.recur(s, e, at, depth)
            depth += 1
        states.append(s)
        said.append(grid.decode(s, at).argmax().item())
        if schedule == "adaptive":
            enough = (s - states[-2]).norm() / s.norm() < threshold
        elif schedule == "acceleration":
            enough = len(states) > 2 and (s - 2 * states[-2] + states[-3]).norm() / s.norm() < threshold
        else:
            enough = len(said) >= 12 // inner and len(set(said[-(12 // inner) :])) == 1
        if enough:
            break
    assert gen.depth == [12, depth]
    assert gen.tokens[1] == grid.decode(s, at).argmax()


def test_positions_that_stopped_early_stand_in_for_the_steps_they_never_ran(small_model, monkeypatch):
    model = small_model(1)
    run = dict(inner_steps=1, exit_threshold=0.5, kv="full", num_steps=6)
    gens = diffusion_forcing.generate(model, [[3, 1, 4], [5]], 10, **run)
    monkeypatch.setattr(Grid, "results", lambda grid: grid)
    core = diffusion_forcing.generate(model, [[3, 1, 4], [5]], 10, **run).cache.parts["core"].flip(2)  # by step
    early = 0
    for row, (gen, length) in enumerate(zip(gens, (3, 1), strict=True)):
        for position, depth in enumerate(gen.depth[1:], length):  # the position that predicted each token
            keys_and_values = core[:, :, :, row, :, position]  # (2, layers, slots, H, c)
            for slot in range(depth, 6):
                assert torch.equal(keys_and_values[:, :, slot], keys_and_values[:, :, depth - 1])
                early += 1
    assert early > 10 and len({depth for gen in gens for depth in gen.depth}) > 2


@pytest.fixture
def first_recurrences(monkeypatch):
    """What every outer step starts from: its positions, embeddings before blending, and what `recur` is given."""
    records, embed, recur = [], Grid.embed, Grid.recur

    def spy_on_embed(grid, at):
        e = embed(grid, at)
        records.append(SimpleNamespace(start=at.start, raw=e[0], depth=None))
        return e

    def spy_on_recur(grid, s, e, at, depth):
        if records[-1].depth is None:
            depths = torch.as_tensor(getattr(depth, "cells", depth)).expand(1, at.width)[0]
            vars(records[-1]).update(depth=depths, s=s[0], e=e[0], state=at.read(grid.state)[0].clone())
        return recur(grid, s, e, at, depth)

    monkeypatch.setattr(Grid, "embed", spy_on_embed)
    monkeypatch.setattr(Grid, "recur", spy_on_recur)
    return records


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_momentum_blends_old_positions_and_leaves_new_ones(small_model, first_recurrences, momentum):
    """Ours gives a new position its whole embedding, the official code 1 - eta of it."""
    diffusion_forcing.generate(small_model(1), [3, 1, 4], 10, inner_steps=1, momentum=momentum, kv="full")
    last, old = {}, 0
    for step in first_recurrences[1:]:  # after the prefill
        for i, depth in enumerate(step.depth.tolist()):
            position = step.start + i
            right = step.raw[i]
            if depth > 0:
                right, old = momentum * last[position] + (1 - momentum) * right, old + 1
            torch.testing.assert_close(step.e[i], right, rtol=0, atol=1e-12)
            last[position] = step.e[i]
    assert old > 10


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_noise_is_damped_with_depth_and_fresh_every_outer_step(small_model, first_recurrences, scale):
    model = small_model(1)
    diffusion_forcing.generate(model, [3, 1, 4], 10, inner_steps=1, noise=0.4, init_scale=scale)
    added = []
    for step in first_recurrences[1:]:
        beta = (0.4 / (1 + step.depth))[:, None]
        noise = (step.s - (1 - beta) * step.state) / beta
        assert noise.abs().max() <= 3 * (2 / 5) ** 0.5 * scale + 1e-5
        added.append(noise[0])
    if scale:
        assert len({round(n[0].item(), 6) for n in added}) == len(added)
        assert abs(torch.cat(added).var() - 0.4) < 0.15


def test_noise_is_seeded(small_model):
    model, run = small_model(1), dict(inner_steps=1, noise=0.9, temperature=0.5)
    runs = [diffusion_forcing.generate(model, [3, 1], 14, seed=s, **run).tokens for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_checkpoints_own_settings_are_the_default(small_model, monkeypatch):
    model = small_model(3)
    papers = dict(inner_steps=4, exit_threshold=0.03, kv="shared")
    paper = diffusion_forcing.generate(model, [3, 1], 10)
    assert paper == diffusion_forcing.generate(model, [3, 1], 10, **papers)
    given = dict(inner_steps=1, exit_threshold=0.5, kv="full")
    monkeypatch.setattr(model, "generation_config", {"diffusion_forcing": given})
    own = diffusion_forcing.generate(model, [3, 1], 10)
    assert own == diffusion_forcing.generate(model, [3, 1], 10, **given)
    for name, value in papers.items():
        assert own != diffusion_forcing.generate(model, [3, 1], 10, **{name: value}), f"{name} makes no difference here"
    assert paper == diffusion_forcing.generate(model, [3, 1], 10, **papers)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"inner_steps": 0}, "inner_steps is 0; it must be from 1 to num_steps, here 4"),
        ({"inner_steps": 5}, "inner_steps is 5"),
        ({"inner_steps": 3, "num_steps": 2}, "inner_steps is 3; .* here 2"),
        ({"exit_threshold": -0.1}, "exit_threshold is -0.1"),
        ({"exit_threshold": float("nan")}, "exit_threshold is nan"),
        (
            {"schedule": "slow"},
            "schedule is 'slow'; it must be one of 'adaptive', 'acceleration', 'token-stability', 'fixed'",
        ),
        ({"freeze": "all"}, "freeze is 'all'; it must be 'prefix' or 'last'"),
        ({"schedule": "fixed", "exit_threshold": 0.3}, "exit_threshold is 0.3, which has no effect with .* 'fixed'"),
        ({"headway": 0}, "headway is 0"),
        ({"max_wavefront": 0}, "max_wavefront is 0"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": 1.0}, "noise is 1.0"),
        ({"momentum": 1}, "momentum is 1"),
        ({"momentum": float("nan")}, "momentum is nan"),
    ],
)
def test_bad_argument_is_named_before_any_work(small_model, monkeypatch, wrong, named):
    for work in ("prefill", "embed", "recur", "decode"):
        monkeypatch.setattr(Grid, work, lambda *_: pytest.fail("work was done before the arguments were checked"))
    with pytest.raises(ValueError, match=named):
        diffusion_forcing.generate(small_model(0), [1, 2], 4, **wrong)
