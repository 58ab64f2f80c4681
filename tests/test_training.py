"""The paper's objective against the official one; windows, carrying, rewiring, freezing; runs that are resumed."""

import copy
import csv
import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minirec import RecurrentConfig, RecurrentDepthLM, autoregressive, lens, tasks, training
from minirec.files.run import Run
from minirec.training import (
    IGNORE,
    PHASES,
    TEMPLATE,
    Objective,
    Phase,
    Progress,
    TrainingConfig,
    depth_loss,
    exact_match,
    finish,
    fresh,
    phase_is_over,
    rewire,
    sample_depth,
    settle,
)

# --- the objective ------------------------------------------------------------------------------------------------


@pytest.fixture
def trainable(golden_folder):
    return RecurrentDepthLM.from_pretrained(golden_folder / "model")


@pytest.mark.parametrize("case", ["n4_k4", "n0_k8", "n7_k1", "n4_k4_masked"])
def test_loss_and_gradients_are_the_official_ones(golden, trainable, distance, case):
    f, described = golden("f_training")
    labels = f["labels_masked" if case.endswith("masked") else "labels"]
    n, k = described["cases"][case]["n_no_grad"], described["cases"][case]["k_grad"]
    depths = torch.full((len(labels),), n + k)
    loss = depth_loss(trainable, f["input_ids"], labels, depths, backprop=k, state=f["input_states"])
    assert loss.item() == pytest.approx(f[f"{case}.loss"].item(), abs=1e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in trainable.named_parameters()}
    assert gradients.keys() == set(described["grad_norm_order"])
    for name, norm in zip(described["grad_norm_order"], f[f"{case}.grad_norms"].tolist(), strict=True):
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    whole = [name for name in f if name.startswith(f"{case}.grad.")]
    assert len(whole) == (6 if case == "n4_k4" else 0)
    for name in whole:
        assert distance(gradients[name.removeprefix(f"{case}.grad.")], f[name]) < 1e-4, name


def a_batch(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens and labels (rows, 7), with another number of labels in every row, and states (rows, 7, 16)."""
    generator = torch.Generator().manual_seed(rows)
    tokens, labels = torch.randint(23, (2, rows, 7), generator=generator)
    for row in range(rows):
        labels[row, : row % 5] = IGNORE
    return tokens, labels, torch.randn((rows, 7, 16), generator=generator, dtype=torch.float64)


def by_hand(model, tokens, labels, depth: int, backprop: int, state) -> torch.Tensor:
    """The sum of the losses of rows that all go so deep: one step after the other, cut where the gradient stops."""
    e, s = model.prelude(tokens), state
    for step in range(depth):
        s = model.recur(s, e)
        if step + 1 == depth - backprop:
            s = s.detach()
    logits = model.coda(s if backprop else s.detach())
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_loss(model, one, other) -> None:
    """Same value, and the same gradient of every parameter."""
    torch.testing.assert_close(one, other)
    one, other = gradients(model, one), gradients(model, other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def loose(small_model):
    """A small model in float64 that can be trained."""
    return copy.deepcopy(small_model()).requires_grad_(True)


@pytest.mark.parametrize(("depth", "backprop"), [(1, 1), (6, 2), (6, 5), (6, 6), (3, 8), (4, 0)])
def test_rows_of_one_depth_are_the_plain_loop(loose, depth, backprop):
    tokens, labels, state = a_batch(3)
    ours = depth_loss(loose, tokens, labels, torch.full((3,), depth), backprop, state)
    assert_same_loss(loose, ours, by_hand(loose, tokens, labels, depth, backprop, state) / (labels != IGNORE).sum())


@given(depths=st.lists(st.integers(1, 7), min_size=2, max_size=5), backprop=st.integers(1, 8))
def test_each_row_is_what_it_is_alone_at_its_own_depth(loose, depths, backprop):
    """Value and gradients of the batch are those of its rows, each on its own in the plain loop, by labels."""
    tokens, labels, state = a_batch(len(depths))
    rows = [slice(i, i + 1) for i in range(len(depths))]
    alone = [
        by_hand(loose, tokens[i], labels[i], depth, backprop, state[i]) for i, depth in zip(rows, depths, strict=True)
    ]
    ours = depth_loss(loose, tokens, labels, torch.tensor(depths), backprop, state)
    assert_same_loss(loose, ours, sum(alone) / (labels != IGNORE).sum())


def test_the_order_of_the_rows_does_not_matter(loose):
    tokens, labels, state = a_batch(5)
    depths, other = torch.tensor([2, 7, 1, 2, 4]), torch.tensor([3, 0, 4, 2, 1])
    ours = depth_loss(loose, tokens, labels, depths, 3, state)
    moved = depth_loss(loose, tokens[other], labels[other], depths[other], 3, state[other])
    assert_same_loss(loose, ours, moved)


def test_depth_is_only_where_the_gradient_stops(loose):
    """The same loss for the same depths, other gradients; and without any step, none for the recurrent block."""
    tokens, labels, state = a_batch(3)
    depths = torch.tensor([6, 3, 6])
    losses = [depth_loss(loose, tokens, labels, depths, backprop, state) for backprop in (6, 5, 2, 0)]
    assert len({loss.item() for loss in losses}) == 1
    adapter = [gradients(loose, loss)["transformer.adapter.weight"] for loss in losses]
    assert all((a - b).norm() > 1e-3 * a.norm() for a, b in itertools.pairwise(adapter))
    assert adapter[-1].norm() == 0
    with torch.no_grad():
        assert not depth_loss(loose, tokens, labels, depths, 6, state).requires_grad


def test_no_row_takes_a_step_that_it_does_not_need(loose, monkeypatch):
    rows, recur = [], loose.recur
    monkeypatch.setattr(loose, "recur", lambda s, e: rows.append(len(s)) or recur(s, e))
    tokens, labels, state = a_batch(4)
    depth_loss(loose, tokens, labels, torch.tensor([2, 6, 1, 2]), 3, state)
    assert rows == [1, 1, 1, 1, 3, 4], "they start one after the other and end together"


def test_forward_lets_gradients_through_every_step(golden, trainable):
    f, _ = golden("f_training")
    trainable(f["input_ids"], num_steps=3).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in trainable.parameters())


# --- the paper's depths -------------------------------------------------------------------------------------------


def distance_of_samples(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Kolmogorov-Smirnov distance of two histograms, in its standard deviations: above 2 is one in 1,500."""
    size = max(len(a), len(b))
    a, b = (F.pad(h.double(), (0, size - len(h))) for h in (a, b))
    gap = (a.cumsum(0) / a.sum() - b.cumsum(0) / b.sum()).abs().max().item()
    return gap / math.sqrt(1 / a.sum().item() + 1 / b.sum().item())


def test_depths_are_log_normal_poisson_as_in_the_official_code(golden):
    r = sample_depth(32, torch.Generator().manual_seed(0), 20_000)
    assert r.shape == (20_000,) and r.dtype == torch.int64 and r.min() >= 1
    x = r.double()
    assert x.mean().item() == pytest.approx(33, abs=0.6)
    assert x.std().item() == pytest.approx(17.97, abs=0.8)
    assert r.median().item() in (28, 29, 30)
    smooth = r.bincount().double().unfold(0, 7, 1).mean(1)  # the mode of a histogram jumps, that of its average less
    assert smooth.argmax().item() + 3 in range(20, 28)

    f, _ = golden("f_training")
    assert distance_of_samples(r.bincount(), f["sampler.hist_total"]) < 2  # 10,000 draws
    few = (r < 8).double().mean().item()
    assert few == pytest.approx(1 - f["sampler.hist_k"][8].item() / 10_000, abs=0.005)


def test_the_official_histograms_are_of_the_same_rule(golden):
    """k = min(r, 8) and n = r - k: three histograms of one sample."""
    f, _ = golden("f_training")
    total, n, k = (f[f"sampler.hist_{name}"] for name in ("total", "n", "k"))
    assert k[:8].tolist() == total[:8].tolist() and k[8] == total[8:].sum()
    assert n[0] == total[:9].sum() and n[1:].tolist() == total[9 : 9 + len(n) - 1].tolist()


@pytest.mark.parametrize("mean", [1, 8, 12])
def test_depths_of_other_means(mean):
    generator = torch.Generator().manual_seed(1)
    r = sample_depth(mean, generator, 4000)
    assert r.double().mean().item() == pytest.approx(mean + 1, rel=0.06) and r.min() >= 1
    assert torch.equal(r, sample_depth(mean, generator.manual_seed(1), 4000))
    assert sample_depth(mean, generator).shape == (1,)


# --- schedules ----------------------------------------------------------------------------------------------------

HOPS = Phase(("hops",), window=2, arrows=(6, 9), steps=8, learned=2.0)


def fresh_model(**sizes) -> RecurrentDepthLM:
    torch.manual_seed(0)
    shape = dict(n_embd=32, n_heads=2, intermediate_size=48, vocab_size=128, block_size=256, mean_recurrence=3)
    shape |= dict(n_layers_in_prelude=1, n_layers_in_recurrent_block=1, n_layers_in_coda=1, mean_backprop_depth=2)
    return RecurrentDepthLM(RecurrentConfig(**(shape | sizes)))


def test_the_rate_grows_stays_and_falls_in_the_last_phase():
    phases = (HOPS, dataclasses.replace(HOPS, steps=100))
    config = TrainingConfig(phases=phases, learning_rate=1.0, warmup=10, decay=0.4)
    assert [config.rate(step, Progress()) for step in (0, 4, 9, 50)] == pytest.approx([0.1, 0.5, 1, 1])
    last = Progress(phase=1, began=50)
    assert [config.rate(step, last) for step in (50, 110, 130, 149)] == pytest.approx([1, 1, 0.5, 0.025])


def test_a_phase_ends_when_all_its_families_are_right_often_enough_or_after_its_steps():
    phase = Phase(("hops", "words"), window=2, learned=0.8, steps=100)
    right = {"hops": 0.9, "hops carried": 0.9, "words": 0.9, "words carried": 0.81}
    assert phase_is_over(phase, 10, right) and phase_is_over(phase, 100, {})
    for name in right:
        assert not phase_is_over(phase, 99, right | {name: 0.8}), name
    alone = dataclasses.replace(phase, carried=0.0)
    assert phase_is_over(alone, 10, {"hops": 0.9, "words": 0.9}), "nothing is carried in this phase"
    assert not phase_is_over(dataclasses.replace(phase, learned=2.0), 99, right)


def test_the_recipe_teaches_all_families_and_no_walk_beyond_the_trained_levels():
    config = TrainingConfig()
    assert set(config.families) == set(tasks.FAMILIES)
    assert set(PHASES[-1].families) == set(tasks.FAMILIES)
    for step in range(40):
        for family in tasks.ASKED:
            batch = fresh(fresh_model(), config, PHASES[-1], family, step)
            assert all(len(p.stages) in tasks.FAMILIES[family] and p.split == "train" for p in batch.problems)


# --- batches ------------------------------------------------------------------------------------------------------

CONFIG = TrainingConfig(phases=(HOPS,), batch_tokens=300)
FAMILY = pytest.mark.parametrize("family", tasks.FAMILIES)


def same_batch(a, b) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("state", "sure", "frozen"))
    return tensors and (a.problems, a.ran, a.rows, a.age) == (b.problems, b.ran, b.rows, b.age)


@FAMILY
def test_a_fresh_batch_is_a_function_of_seed_and_step(family):
    model = fresh_model()
    first = fresh(model, CONFIG, HOPS, family, 7)
    assert same_batch(first, fresh(model, CONFIG, HOPS, family, 7))
    other = fresh(model, CONFIG, HOPS, family, 8), fresh(model, dataclasses.replace(CONFIG, seed=1), HOPS, family, 7)
    assert not {p.text for p in first.problems} & {p.text for batch in other for p in batch.problems}
    states = [row for batch in (first, *other) for row in batch.state[:, :5]]
    assert len({tuple(state.flatten().tolist()) for state in states}) == len(states), "noise of its own in every row"
    assert torch.stack(states).std().item() == pytest.approx(math.sqrt(2 / 5), rel=0.1)


@FAMILY
def test_a_fresh_batch_fills_its_room_with_training_problems(family):
    for step in range(5):
        batch = fresh(fresh_model(), CONFIG, HOPS, family, step)
        lines = [p.prompt + p.target for p in batch.problems]
        assert all(p.split == "train" and p.family == family for p in batch.problems)
        assert len(lines) * (max(map(len, lines)) - 1) == batch.read().numel() <= CONFIG.batch_tokens
        assert (len(lines) + 2) * max(map(len, lines)) > CONFIG.batch_tokens
        assert batch.sure.all() and not batch.frozen.any() and set(batch.ran) == {batch.age} == {0}


@FAMILY
def test_what_is_read_is_the_solution_and_what_is_due_is_the_stage(family):
    batch = fresh(fresh_model(), CONFIG, HOPS, family, 3)
    batch.ran = [i % 3 for i in range(len(batch.problems))]
    tokens = batch.read()
    for steps in (1, 2, 5):
        deep, rest = batch.labels(steps)
        for row, p in enumerate(batch.problems):
            start, n = len(p.prompt) - 1, len(p.target)
            assert tokens[row, : start + n].tolist() == p.prompt + p.target[:-1]
            due = p.reached(batch.ran[row] + steps)
            where = [start + i for i in p.deep]
            assert deep[row, where].tolist() == [due[i] for i in p.deep]
            assert rest[row, start : start + n].tolist() == [
                t if i not in p.deep else IGNORE for i, t in enumerate(due)
            ]
            for labels, own in ((deep, len(where)), (rest, n - len(where))):
                assert (labels[row] != IGNORE).sum() == own


def test_batches_without_arrows_are_of_one_level_so_that_little_is_padding():
    for family in ("words", "automaton"):
        levels = [{p.level for p in fresh(fresh_model(), CONFIG, HOPS, family, step).problems} for step in range(30)]
        assert all(len(found) == 1 for found in levels)
        assert set.union(*levels) == set(tasks.FAMILIES[family])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_rows_of_a_batch(monkeypatch, world):
    whole = fresh(fresh_model(), CONFIG, HOPS, "hops", 2)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(training, "place", lambda rank=rank: (rank, world))
        shares.append(fresh(fresh_model(), CONFIG, HOPS, "hops", 2))
    assert sorted(row for share in shares for row in share.rows) == whole.rows
    for share in shares:
        for i, row in enumerate(share.rows):
            assert share.problems[i] == whole.problems[row] and torch.equal(share.state[i, :9], whole.state[row, :9])
    monkeypatch.setattr(training, "place", lambda: (0, 100))
    with pytest.raises(ValueError, match=r"batch_tokens is 300, too few .* 100 processes"):
        fresh(fresh_model(), CONFIG, HOPS, "hops", 2)


# --- a window -----------------------------------------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_of_a_window_is_that_of_the_plain_loop(family, frozen):
    """After each of `reads`: mean cross-entropy of deep tokens and a fifth of the others'; held where frozen."""
    model = fresh_model()
    batch = fresh(model, CONFIG, HOPS, family, 5)
    batch.ran[0] = 2
    if frozen:
        batch = finish(model, CONFIG, batch, 5)
    loss, state, guesses = Objective(model)(batch, {1, 3})
    e, s, by_hand = model.prelude(batch.read()), batch.state, 0.0
    for i in (1, 2, 3):
        s = torch.where(batch.frozen[..., None], s, model.recur(s, e))
        if i != 2:
            logits = model.coda(s).flatten(0, 1)
            deep, rest = (labels.flatten() for labels in batch.labels(i))
            by_hand = by_hand + (F.cross_entropy(logits, deep) + TEMPLATE * F.cross_entropy(logits, rest)) / 2
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(state, s.detach())
    assert torch.equal(guesses.flatten(), logits.argmax(-1)) and not state.requires_grad
    grads = gradients(model, loss)
    for name, expected in gradients(model, by_hand).items():
        torch.testing.assert_close(grads[name], expected, msg=lambda m, name=name: f"{name}: {m}")


def test_a_bare_reading_leaves_the_coda_out():
    """The head reads the state, and the coda's gradient is zero: not missing, for moments and for other processes."""
    model = fresh_model()
    batch = fresh(model, CONFIG, HOPS, "hops", 5)
    loss, state, guesses = Objective(model)(batch, {2}, bare=True)
    logits = lens.logit_lens(model, state)
    deep, rest = (F.cross_entropy(logits.flatten(0, 1), labels.flatten()) for labels in batch.labels(2))
    torch.testing.assert_close(loss.detach(), deep + TEMPLATE * rest)
    assert torch.equal(guesses, logits.argmax(-1))
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad.norm() == 0) == (".coda." in name), name


def test_a_stage_that_was_missed_is_not_asked_for_its_next_one():
    model = fresh_model()
    batch = fresh(model, CONFIG, HOPS, "hops", 1)
    guesses = batch.labels(2)[0]
    where = (guesses != IGNORE).nonzero()
    guesses[tuple(where[0])] += 1
    before = int((guesses != IGNORE).sum())
    assert settle(batch, guesses, 2) == pytest.approx(1 - 1 / before)
    assert batch.ran == [2] * len(batch.problems) and batch.age == 2
    due = batch.labels(1)[0]
    assert due[tuple(where[0])] == IGNORE and (due != IGNORE).sum() == before - 1
    assert due[tuple(where[1])] != IGNORE


def test_what_was_there_before_does_not_count_as_right():
    """Of tokens that a window had to move, the share that it moved rightly; of those that stay, only if none moves."""
    batch = fresh(fresh_model(), CONFIG, HOPS, "hops", 1)
    batch.ran = [1] * len(batch.problems)
    due, before = batch.labels(2)[0], batch.labels(0)[0]
    moving, staying = (due != before).sum().item(), ((due == before) & (due != IGNORE)).sum().item()
    assert moving and staying
    assert settle(batch, before, 2) == 0 and (batch.labels(1)[0] != IGNORE).sum() == staying
    assert settle(batch, batch.labels(9)[0], 9) == 1


def test_a_wrong_answer_of_one_stage_can_still_be_put_right():
    batch = fresh(fresh_model(), CONFIG, HOPS, "words", 1)
    due = batch.labels(1)[0]
    assert settle(batch, due + 1, 3) == 0 and torch.equal(batch.labels(1)[0], due)


@FAMILY
def test_finished_text_is_frozen_and_the_rest_begins_anew(family):
    model = fresh_model()
    noise = fresh(model, CONFIG, HOPS, family, 4).state
    batch = finish(model, CONFIG, fresh(model, CONFIG, HOPS, family, 4), 4)
    e, s, reached = model.prelude(batch.read()), noise, []
    for _ in range(20):
        s = model.recur(s, e)
        reached.append(s)
    held = batch.frozen[..., None].expand_as(noise)
    assert torch.equal(batch.state[~held], noise[~held])
    assert any(torch.allclose(batch.state[held], s[held], atol=1e-5) for s in reached[5:]), "after 6 to 20 steps"
    cuts = []
    for row, p in enumerate(batch.problems):
        cut = int(batch.frozen[row].sum())
        assert batch.frozen[row, :cut].all() and len(p.prompt) - 1 <= cut < len(p.prompt) - 1 + len(p.target)
        assert all((labels[row, :cut] == IGNORE).all() for labels in batch.labels(1)), "nothing is asked of it"
        cuts.append(cut - len(p.prompt))
    assert len(set(cuts)) > 1
    _, state, _ = Objective(model)(batch, {3})
    assert torch.equal(state[held], batch.state[held]) and not torch.equal(state[~held], batch.state[~held])


@pytest.mark.parametrize("family", tasks.ASKED)
@pytest.mark.parametrize("anew", [0.0, 1.0])
def test_rewiring_changes_the_arrows_and_keeps_the_state(family, anew):
    model, phase = fresh_model(), dataclasses.replace(HOPS, rewired=0.5, anew=anew)
    changed = 0
    for step in range(6):
        batch = fresh(model, CONFIG, phase, family, step)
        batch.ran = [2] * len(batch.problems)
        before, old = batch.state.clone(), list(batch.problems)
        rewire(model, CONFIG, phase, batch, step + 100)
        for row, (p, q) in enumerate(zip(old, batch.problems, strict=True)):
            n = len(p.prompt) - 1  # what is read before the first token of the answer is due
            assert torch.equal(batch.state[row, n:], before[row, n:])
            if p is q:
                assert batch.ran[row] == 2 and torch.equal(batch.state[row], before[row])
                continue
            changed += 1
            assert batch.ran[row] == 0 and q.walks.letters == p.walks.letters and q.prompt != p.prompt
            assert torch.equal(batch.state[row, :n], before[row, :n]) == (anew == 0)
    assert 0.2 < changed / sum(len(fresh(model, CONFIG, phase, family, step).problems) for step in range(6)) < 0.8


def test_nothing_else_is_rewired():
    model, phase = fresh_model(), dataclasses.replace(HOPS, rewired=1.0)
    for batch in (
        fresh(model, CONFIG, phase, "words", 0),
        finish(model, CONFIG, fresh(model, CONFIG, HOPS, "hops", 0), 0),
    ):
        old = list(batch.problems)
        rewire(model, CONFIG, phase, batch, 1)
        assert all(p is q for p, q in zip(old, batch.problems, strict=True))


# --- the measure --------------------------------------------------------------------------------------------------


def test_exact_match_is_greedy_decoding():
    """One forward pass says for every problem whether decoding writes exactly its solution."""
    model = fresh_model().double().eval()
    problems = [p for family in tasks.FAMILIES for p in tasks.heldout(3, seed=11, family=family)]
    for num_steps in (1, None):
        for p, room in zip(
            problems, [40, 3, 1, 7, 17, 2, 12, 1, 5, 9, 2, 4, 3, 8, 1], strict=True
        ):  # what it writes is now right
            p.target = autoregressive.generate(model, p.prompt, room, num_steps=num_steps, stop_tokens=()).tokens
        assert exact_match(model, problems, num_steps) == 1
        for wrong, p in enumerate(problems, 1):
            at = wrong % len(p.target)
            p.target[at] = (p.target[at] + 1) % 100
            assert exact_match(model, [p], num_steps) == 0
            assert exact_match(model, problems, num_steps) == pytest.approx(1 - wrong / len(problems))


# --- a run --------------------------------------------------------------------------------------------------------

RUN = dict(
    phases=(
        Phase(("hops",), window=1, arrows=(6, 7), steps=5, gate=-1.0),
        Phase(("words", "hops"), window=2, arrows=(6, 9), steps=7, gate=-1.0, frozen=0.5),
    ),
    batch_tokens=200, learning_rate=1e-3, warmup=1, log_every=4, evaluate_every=8, evaluate_on=2, save_every=3, seed=3,
)  # fmt: skip


def without_times(log: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log]


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    model, folder = fresh_model(), tmp_path_factory.mktemp("straight")
    log = training.train(model, TrainingConfig(**RUN), Run(folder))
    return model, log, folder


def test_a_run_writes_its_log_and_its_checkpoint(straight_run):
    model, log, folder = straight_run
    assert [(row["step"], row["phase"]) for row in log] == [(4, 1), (8, 2), (12, 2)]
    assert [[family in row for family in ("words", "hops")] for row in log] == [[False] * 2, [True] * 2, [True] * 2]
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [{k: float(v) for k, v in row.items() if v} for row in rows] == log
    assert log[-1]["loss"] < log[0]["loss"], "it learns something"
    loaded = RecurrentDepthLM.from_pretrained(folder / "checkpoint")
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_needs_no_folder(straight_run):
    model, log, _ = straight_run
    other = fresh_model()
    assert without_times(training.train(other, TrainingConfig(**RUN))) == without_times(log)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_phase_that_has_taught_what_it_should_is_left(tmp_path):
    phases = (dataclasses.replace(RUN["phases"][0], carried=0.0, learned=-1.0, steps=100), RUN["phases"][1])
    log = training.train(fresh_model(), TrainingConfig(**RUN | {"phases": phases}))
    assert log[-1]["step"] == 1 + 7, "one step was enough"


def test_states_are_carried_from_window_to_window(monkeypatch):
    """A kept batch comes again with the state that its last window left; without carrying, none does."""
    seen, forward = [], Objective.forward

    def watched(self, batch, reads, bare):
        seen.append((batch, batch.age, batch.state.clone(), max(reads)))
        result = forward(self, batch, reads, bare)
        seen[-1] += (result[1],)
        return result

    monkeypatch.setattr(Objective, "forward", watched)
    config = TrainingConfig(
        **RUN | {"phases": (dataclasses.replace(HOPS, steps=30, gate=-1.0, rewired=0.0),), "save_every": 99}
    )
    training.train(fresh_model(), config)
    again = [(a, b) for a, b in itertools.combinations(seen, 2) if a[0] is b[0] and b[1] == a[1] + a[3]]
    assert len(again) > 8 and max(age for _, age, *_ in seen) > 4
    assert all(torch.equal(a[4], b[2]) for a, b in again)
    seen.clear()
    training.train(fresh_model(), dataclasses.replace(config, phases=(dataclasses.replace(HOPS, carried=0.0),)))
    assert len(seen) == 8 and all(age == 0 for _, age, *_ in seen)


# after a save; between two; after a row of the log, with a log that is ahead of the saved weights, as a run leaves it
# that is killed between writing the two; in the second phase
@pytest.mark.parametrize(("killed_at", "log_is_ahead"), [(3, False), (5, False), (8, True), (11, False)])
def test_a_killed_run_goes_on_to_the_same_bits(straight_run, tmp_path, monkeypatch, killed_at, log_is_ahead):
    model, log, folder = straight_run
    calls, forward = [], Objective.forward

    def killed(*args):
        calls.append(1)
        if len(calls) == killed_at + 1:
            raise KeyboardInterrupt
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            training.train(fresh_model(), TrainingConfig(**RUN), Run(tmp_path))
    if log_is_ahead:
        shutil.copy(folder / "log.csv", tmp_path)
    again = fresh_model()
    with torch.no_grad():
        again.transformer.wte.weight.zero_()  # what it starts from does not matter: the saved weights come back
    log_again = training.train(again, TrainingConfig(**RUN), Run(tmp_path))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert without_times(log_again) == without_times(log)


def test_weights_without_a_gradient_stay_and_a_run_of_them_resumes(tmp_path, monkeypatch):
    models, calls, forward = [fresh_model(), fresh_model()], [], Objective.forward
    for model in models:
        model.transformer.prelude.requires_grad_(False)

    def killed(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return forward(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Objective, "forward", killed)
        training.train(models[0], TrainingConfig(**RUN), Run(tmp_path))
    training.train(models[0], TrainingConfig(**RUN), Run(tmp_path))
    training.train(models[1], TrainingConfig(**RUN))
    untrained = dict(fresh_model().named_parameters())
    for (name, a), b in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, untrained[name]) == ("prelude" in name), name


def test_a_model_without_the_tasks_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 64; the tasks' tokenizer needs 128"):
        training.train(fresh_model(vocab_size=64), TrainingConfig(**RUN), Run(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("sizes", "other", "named"),
    [
        ({}, {"learning_rate": 0.5}, "another run: its training.*0.001.*0.5"),
        ({}, {"phases": RUN["phases"][:1]}, "another run: its training"),
        ({"mean_recurrence": 4}, {}, "another run: its model.*mean_recurrence"),
    ],
)
def test_a_run_of_another_configuration_is_refused_and_left_alone(straight_run, sizes, other, named):
    folder = straight_run[2]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=named):
        training.train(fresh_model(**sizes), TrainingConfig(**(RUN | other)), Run(folder))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_finished_run_is_neither_run_nor_measured_again(straight_run, monkeypatch):
    model, log, folder = straight_run
    monkeypatch.setattr(Objective, "forward", lambda *_: pytest.fail("a step was run"))
    monkeypatch.setattr(training, "exact_match", lambda *_: pytest.fail("it is in the log"))
    again = fresh_model()
    assert training.train(again, TrainingConfig(**RUN), Run(folder)) == log
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_is_weights_and_moments(straight_run):
    model, _, folder = straight_run
    names = [name for name, _ in model.named_parameters()]
    stored = {f"{kind}.{name}" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in names}
    assert load_file(folder / "state.safetensors").keys() == stored
    assert not list(folder.rglob("*.part")), "nothing half-written is left"


def test_each_family_is_measured_on_problems_of_its_own(monkeypatch):
    measured = []

    def count(model, problems):
        (family,) = {p.family for p in problems}
        assert all(p.split == "heldout" for p in problems)
        measured.append((family, len(problems)))
        return {"words": 0.25, "hops": 0.75}[family]

    monkeypatch.setattr(training, "exact_match", count)
    log = training.train(fresh_model(), TrainingConfig(**RUN | {"evaluate_on": 5, "evaluate_every": 12}))
    assert (log[-1]["hops"], log[-1]["words"]) == (0.75, 0.25) and "hops" not in log[0]
    assert measured == [("hops", 5), ("words", 5)]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"batch_tokens": 1e3}, "batch_tokens is 1000.0; it must be a whole number"),
        ({"log_every": 0}, "log_every is 0"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"evaluate_on": 0}, "evaluate_on is 0"),
        ({"save_every": 0}, "save_every is 0"),
        ({"warmup": 0}, "warmup is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"gradient_clip": math.nan}, "gradient_clip is nan"),
        ({"decay": 1.1}, "decay is 1.1"),
        ({"hardest": 2.0}, "hardest is 2.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 to 4294967295"),
        ({"phases": ()}, r"phases is \(\); it must be one Phase"),
        ({"phases": ("hops",)}, "phases is"),
    ],
)
def test_bad_setting_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        TrainingConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"families": ()}, r"families is \(\); it must name at least one"),
        ({"families": "hops"}, "families is 'hops'"),
        ({"families": ("words", "sums")}, "family is 'sums'"),
        ({"window": 0}, "window is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"arrows": (5, 3)}, "arrows is 3; it must be a whole number from 5 to 40"),
        ({"arrows": 6}, "arrows is 6; it must be the fewest and the most"),
        ({"arrows": (4, 41)}, "arrows is 41; it must be a whole number from 4 to 40"),
        ({"arrows": (2, 9)}, "arrows is 2; it must be"),
        ({"carried": 1.5}, "carried is 1.5"),
        ({"rewired": -0.5}, "rewired is -0.5"),
        ({"anew": 2.0}, "anew is 2.0"),
        ({"frozen": 2.0}, "frozen is 2.0"),
    ],
)
def test_bad_phase_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        Phase(**{"families": ("hops",), "window": 1} | wrong)


def test_a_setting_is_the_same_whoever_made_its_numbers():
    numpy = TrainingConfig(
        seed=np.int64(3), decay=np.float64(1), phases=[Phase(["hops"], np.int64(1), [6, np.int64(7)])]
    )
    plain = TrainingConfig(seed=3, decay=1, phases=(Phase(("hops",), 1, (6, 7)),))
    assert numpy == plain and json.dumps(dataclasses.asdict(numpy)) == json.dumps(dataclasses.asdict(plain))
    assert isinstance(plain.decay, float)
