"""The objective against the official one, the data with its depths and stages, and runs that are killed and resumed."""

import copy
import csv
import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minirec import RecurrentConfig, RecurrentDepthLM, autoregressive, tasks, training
from minirec.files.run import Run
from minirec.tasks import END, PAD, task_tokenizer
from minirec.training import (
    IGNORE,
    POOL,
    Batches,
    TrainingConfig,
    batch_of,
    depth_loss,
    exact_match,
    sample_depth,
    stages_of,
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


@given(
    depths=st.lists(st.integers(1, 7), min_size=2, max_size=5), backprop=st.integers(3, 8),
    reads=st.sets(st.integers(1, 2)), stages=st.integers(1, 4),
)  # fmt: skip
def test_a_row_is_asked_at_every_reading_for_what_it_has_reached(loose, depths, backprop, reads, stages):
    """The mean over the readings of what a loss without the steps after it would be, on the labels of that step."""
    tokens, labels, state = a_batch(len(depths))
    by_step = torch.stack([labels.where(labels == IGNORE, (labels + 3 * k) % 23) for k in range(stages)])
    losses = []
    for before_end in (0, *reads):
        rows = [i for i, depth in enumerate(depths) if depth > before_end]
        if not rows:
            continue
        total = n = 0
        for i in rows:
            own, ran = slice(i, i + 1), depths[i] - before_end
            asked = by_step[min(ran, stages) - 1, own]
            total = total + by_hand(loose, tokens[own], asked, ran, max(0, backprop - before_end), state[own])
            n += (asked != IGNORE).sum()
        losses.append(total / n)
    ours = depth_loss(loose, tokens, by_step, torch.tensor(depths), backprop, state, (0, *reads))
    assert_same_loss(loose, ours, sum(losses) / len(losses))


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


def test_the_rate_grows_stays_and_falls():
    config = TrainingConfig(steps=1000, learning_rate=1.0, warmup=0.1, decay=0.4)
    assert [config.rate(step) for step in (0, 49, 99, 500, 600, 800, 999)] == pytest.approx(
        [0.01, 0.5, 1, 1, 1, 0.5, 0.0025]
    )
    assert TrainingConfig(steps=10, learning_rate=1.0, warmup=0, decay=0).rate(0) == 1


@pytest.mark.parametrize(("family", "first", "apart"), [("hops", 0, 150), ("automaton", 300, 200), ("words", 600, 300)])
def test_families_join_one_by_one_and_then_their_levels(family, first, apart):
    """In the order in which they are listed; and the levels evenly, easiest first, up to the trained ones."""
    config = TrainingConfig(
        steps=2400, joining=0.25, curriculum=0.5, families=("hops", "automaton", "hops", "words", "automaton")
    )
    levels = tasks.FAMILIES[family]
    assert config.joins(family) == first
    for i in range(len(levels)):
        assert config.levels(family, first + i * apart) == levels[: i + 1]
        assert config.levels(family, max(0, first + i * apart - 1)) == levels[: max(1, i)]
    assert config.levels(family, 0) == levels[:1], "one at least"
    assert config.levels(family, 2399) == config.levels(family, 10**9) == levels, "a harder one never joins"


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_without_a_curriculum_all_is_there_at_once(family):
    together = TrainingConfig(joining=0, curriculum=0)
    assert together.joins(family) == 0 and together.levels(family, 0) == tasks.FAMILIES[family]
    alone = TrainingConfig(joining=1, families=(family, family))
    assert alone.joins(family) == 0 and {alone.family(step) for step in range(10)} == {family}


def test_the_families_that_have_joined_take_turns():
    families = ("hops", "automaton", "words", "hops")
    config = TrainingConfig(steps=1000, joining=0.2, families=families)
    for step in range(400):
        turns = ("hops",) if step < 100 else ("hops", "automaton", "hops") if step < 200 else families
        assert config.family(step) == turns[step % len(turns)], step


# --- the data -----------------------------------------------------------------------------------------------------

FAMILY = pytest.mark.parametrize("family", tasks.FAMILIES)


@dataclass
class Row:
    """A row of a batch, as it can be read from its tokens alone."""

    text: str
    said: list[str]  # the words of its target
    depth: int

    @property
    def family(self) -> str:
        return "automaton" if self.text.startswith("Run ") else "hops" if " Follow " in self.text else "words"

    @property
    def level(self) -> int:
        if self.family == "words":
            return self.text.count(".") - 1
        words = re.findall(r"\w+", self.text)
        return int(words[1]) if self.family == "automaton" else words.index("Follow") // (2 * tasks.WAYS)

    @property
    def needed(self) -> int:
        return 1 if self.family == "words" else self.level


def rows_of(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[Row]:
    """The rows of a batch, with what each is asked for at its own depth."""
    tokens, labels, depths = batch
    if labels.dim() == 3:  # by step
        labels = labels[depths.clamp(max=len(labels)) - 1, torch.arange(len(tokens))]
    assert tokens.shape == labels.shape and depths.shape == (len(tokens),)
    assert {t.dtype for t in batch} == {torch.int64}
    decode, rows = task_tokenizer().decode, []
    for line, target, depth in zip(tokens.tolist(), labels.tolist(), depths.tolist(), strict=True):
        first = next(i for i, label in enumerate(target) if label != IGNORE)
        said = [label for label in target if label != IGNORE]
        assert said[-1] == END
        rows.append(Row(decode(line[: first + 1]), re.findall(r"\w+", decode(said)), depth))
    return rows


@functools.cache
def drawn(mean_depth: int = 12, steps: int = 2 * POOL, **settings) -> list[list[Row]]:
    """The rows of the first batches, all levels at once."""
    data = Batches(TrainingConfig(**{"joining": 0, "curriculum": 0, "batch_tokens": 750} | settings), mean_depth)
    return [rows_of(data[step]) for step in range(steps)]


def flat(batches: list[list[Row]]) -> list[Row]:
    return [row for batch in batches for row in batch]


def assert_shares(found: Counter, expected: dict) -> None:
    """Each count as its share promises, within five standard deviations."""
    n = sum(found.values())
    assert n > 100, "too few to tell"
    for key, share in expected.items():
        assert abs(found[key] - n * share) <= 5 * math.sqrt(n * share * (1 - share)), (key, n, found[key], n * share)


@FAMILY
def test_a_batch_has_the_loss_on_the_solution_alone(family):
    problems = tasks.heldout(5, seed=3, family=family)
    tokens, labels = batch_of(problems)
    assert tokens.shape == labels.shape == (5, max(len(p.prompt) + len(p.target) for p in problems) - 1)
    for row, p in enumerate(problems):
        line, n = p.prompt + p.target, len(p.prompt) + len(p.target) - 1
        assert tokens[row].tolist() == line[:-1] + [PAD] * (tokens.shape[1] - n)
        assert labels[row][labels[row] != IGNORE].tolist() == p.target
        assert labels[row, len(p.prompt) - 1] == p.target[0], "the last token of the prompt predicts the first"


@FAMILY
def test_with_depths_a_batch_asks_for_the_stage_reached(family):
    problems = tasks.heldout(8, seed=3, family=family)
    depths = [1, 2, 3, 4, 5, 6, 7, 30]
    tokens, labels = batch_of(problems, depths)
    for row, (p, depth) in enumerate(zip(problems, depths, strict=True)):
        target = p.reached(depth)
        line = p.prompt + target
        assert tokens[row].tolist() == line[:-1] + [PAD] * (tokens.shape[1] - len(line) + 1)
        assert labels[row, len(p.prompt) - 1 :][: len(target)].tolist() == target
        assert (labels[row] != IGNORE).sum() == len(target)


def test_readings_are_drawn_below_the_last_steps_with_a_gradient():
    data = Batches(TrainingConfig(reads=4), 12)
    drawn_reads = [data.reads(step, 9) for step in range(300)]
    assert all(reads[0] == 0 and len(set(reads)) == 4 for reads in drawn_reads)
    assert_shares(Counter(r for reads in drawn_reads for r in reads[1:]), dict.fromkeys(range(1, 9), 1 / 8))
    assert data.reads(3, 9) == drawn_reads[3]
    assert sorted(data.reads(0, 3)) == [0, 1, 2], "as many as there are"
    assert Batches(TrainingConfig(reads=1), 12).reads(0, 9) == [0]


@FAMILY
def test_labels_of_every_step_are_the_stages(family):
    problems = tasks.heldout(5, seed=3, family=family)
    tokens, labels = stages_of(problems, [1, 2, 3, 4, 30])
    assert len(labels) == max(len(p.stages) for p in problems)
    assert torch.equal(tokens, batch_of(problems, [1, 2, 3, 4, 30])[0])
    for steps in range(1, len(labels) + 1):
        assert torch.equal(labels[steps - 1], batch_of(problems, [steps] * 5)[1])


def test_a_row_that_stops_early_is_asked_for_the_stage_it_reaches(stages_by_hand):
    for family in ("automaton", "hops"):
        early = 0
        for row in flat(drawn(families=(family,))):
            stages = stages_by_hand(row.text)
            assert len(stages) == row.needed
            assert row.said == stages[min(row.depth, row.needed) - 1], row
            early += row.depth < row.needed
        assert early > 50


def test_without_stages_every_row_is_asked_for_its_answer(stages_by_hand):
    """The same problems at the same depths, another target."""
    for family in tasks.FAMILIES:
        staged, plain = drawn(families=(family,)), drawn(families=(family,), staged=False)
        for one, other in zip(flat(staged), flat(plain), strict=True):
            assert (one.text, one.depth) == (other.text, other.depth)
            assert other.said == (one.said if family == "words" else stages_by_hand(one.text)[-1])


@pytest.mark.parametrize("family", ["automaton", "hops"])
def test_early_rows_are_even_over_the_steps_needed(family):
    rows = flat(drawn(families=(family,), early=1.0, random=0.0, batch_tokens=2500))
    rows = [row for row in rows if row.needed > 1]
    assert all(row.depth <= row.needed for row in rows)
    for needed in (2, 4, 6):
        assert {row.depth for row in rows if row.needed == needed} == set(range(1, needed + 1))
    halves = Counter(2 * (row.depth - 1) // row.needed for row in rows if row.needed % 2 == 0)
    assert_shares(halves, {0: 0.5, 1: 0.5})
    rows = [row for row in rows if row.needed >= 4]
    edges = Counter({1: "first", row.needed: "last"}.get(row.depth) for row in rows)
    assert_shares(edges, dict.fromkeys(("first", "last"), sum(1 / row.needed for row in rows) / len(rows)))


def poisson(mean: float) -> dict[int, float]:
    return {k: math.exp(-mean) * mean**k / math.factorial(k) for k in range(6)}


def test_a_problem_that_needs_one_step_has_no_early_rows():
    """It would be the whole of its training; so these rows go beyond, as all word problems do."""
    rows = flat(drawn(families=("words",), early=1.0, random=0.0, extra=1.5))
    assert_shares(Counter(row.depth - 1 for row in rows), poisson(1.5))
    easy = [row.depth for row in flat(drawn(families=("automaton",), early=1.0, random=0.0)) if row.needed == 1]
    assert max(easy) > 1


@FAMILY
@pytest.mark.parametrize("extra", [0.0, 1.5])
def test_rows_beyond_get_the_steps_needed_and_a_poisson_number_more(family, extra):
    rows = flat(drawn(families=(family,), early=0.0, random=0.0, extra=extra))
    more = Counter(row.depth - row.needed for row in rows)
    assert min(more) >= 0
    assert_shares(more, poisson(extra))
    hardest = [row.depth - row.needed for row in rows if row.level == tasks.FAMILIES[family][-1]]
    assert sum(hardest) / len(hardest) == pytest.approx(extra, abs=5 * math.sqrt(extra / len(hardest)))


@FAMILY
def test_rows_of_the_paper_do_not_look_at_the_problem(family):
    rows = flat(drawn(families=(family,), early=0.0, random=1.0, mean_depth=9))
    ours = torch.tensor([row.depth for row in rows])
    paper = sample_depth(9, torch.Generator().manual_seed(5), 20_000)
    assert distance_of_samples(ours.bincount(), paper.bincount()) < 2


@pytest.mark.parametrize(("early", "random"), [(0.45, 0.15), (0.2, 0.5), (0.3, 0.7)])
def test_the_three_kinds_of_rows_have_their_shares(early, random):
    """Told apart where no step is added and the paper's depths are far beyond: below, at, and above what is needed."""
    rows = flat(drawn(families=("automaton",), early=early, random=random, extra=0.0, mean_depth=1000))
    rows = [row for row in rows if row.needed >= 4]
    below = sum(1 - 1 / row.needed for row in rows) / len(rows)  # of the early ones
    kinds = Counter((row.depth > row.needed) - (row.depth < row.needed) for row in rows)
    assert_shares(kinds, {-1: early * below, 0: 1 - random - early * below, 1: random})


def test_depths_of_a_row_do_not_hang_on_its_place():
    """Drawn for each row and each step anew: by the paper's rule, which does not look at the problem."""
    batches = drawn(families=("automaton",), early=0.0, random=1.0)
    depths = [tuple(row.depth for row in batch) for batch in batches]
    assert len(set(depths)) == len(depths)
    assert len({batch[0] for batch in depths}) > 5 and len(set(depths[0])) > 3


@pytest.mark.parametrize("hardest", [0.0, 0.4])
def test_only_levels_that_have_joined_are_drawn_each_with_its_share(hardest):
    """A level is drawn from the next pool of rounds on; the hardest as often as it should, the others evenly."""
    families = ("automaton", "words")
    of_a_pool = POOL * len(families)  # steps
    config = TrainingConfig(
        steps=8 * of_a_pool, joining=0, curriculum=0.8, batch_tokens=600, families=families, hardest=hardest
    )
    data, found, rows_of_step = Batches(config, 12), {}, {}
    for step in range(config.steps):
        rows, family = rows_of(data[step]), families[step % 2]
        assert {row.family for row in rows} == {family}
        assert {row.level for row in rows} <= set(config.levels(family, step)), step
        assert data[step][0].numel() <= 600
        found.setdefault((family, step // of_a_pool), Counter()).update(row.level for row in rows)
        rows_of_step[step] = len(rows)
    for (family, pool), levels in found.items():
        joined = config.levels(family, pool * of_a_pool)
        assert set(levels) == set(joined), (family, pool)
        if family == "automaton":
            shares = dict.fromkeys(joined, (1 - hardest) / len(joined))
            shares[joined[-1]] += hardest
            assert_shares(levels, shares)
    for family in families:
        assert len({len(levels) for (f, _), levels in found.items() if f == family}) > 2, "there was something to see"
    assert rows_of_step[1] > rows_of_step[config.steps - 1], "shorter problems: more of them"


@pytest.mark.parametrize("batch_tokens", [300, 1000, 3000])
@FAMILY
def test_a_batch_is_full_and_not_larger_than_it_may_be(family, batch_tokens):
    """Padding counts; with the longest problems not one row more would fit."""
    data = Batches(TrainingConfig(curriculum=0, families=(family,), batch_tokens=batch_tokens), 12)
    sizes = [data[step][0].shape for step in range(2 * POOL)]
    assert max(rows * length for rows, length in sizes) <= batch_tokens
    rows, longest = max(sizes, key=lambda size: size[1])
    assert (rows + 1) * (longest + 1) > batch_tokens
    assert {size[0] for size in sizes} == {rows}, "every step has as many"


def test_a_batch_holds_problems_of_one_size():
    """Sorted by length within a pool, so that little of a batch is padding; but not from short to long."""
    data = Batches(TrainingConfig(curriculum=0, families=("words",)), 12)
    batches = [data[step][0] for step in range(POOL)]
    assert sum((b == PAD).sum() for b in batches) < 0.1 * sum(b.numel() for b in batches)
    widths = [b.shape[1] for b in batches]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_a_family_that_is_listed_twice_has_two_turns():
    families = ("words", "hops", "automaton", "hops")
    batches = drawn(families=families, batch_tokens=200, steps=12)
    assert [{row.family for row in batch} for batch in batches] == [{family} for family in families] * 3
    texts = [row.text for batch in batches for row in batch]
    assert len(texts) == len(set(texts)), "no two are of the same problems"


def test_a_batch_is_of_the_family_whose_turn_it_is():
    """Also where a family joins in the middle of a pool, and whatever was asked for before."""
    config = TrainingConfig(steps=200, joining=0.5, batch_tokens=200, families=("hops", "automaton", "words", "hops"))
    data, seen = Batches(config, 12), set()
    for step in [*range(45, 60), 3, *range(95, 110), 50, 0, 199]:
        rows = rows_of(data[step])
        assert {row.family for row in rows} == {config.family(step)}, step
        assert {row.level for row in rows} <= set(config.levels(config.family(step), step)), step
        seen |= {row.family for row in rows}
    assert seen == set(tasks.FAMILIES)


def test_no_heldout_problem_is_trained_on():
    """Of the automaton, whose problems are few: some 30,000 are held out, so 500 and 1,000 of them would meet."""
    rows = flat(drawn(families=("automaton",)))
    assert len(rows) > 500
    assert not {p.text for p in tasks.heldout(1000, 1, "automaton")} & {row.text for row in rows}


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_any_step_of_the_data_can_be_asked_for_again():
    config = TrainingConfig(batch_tokens=200, seed=4, families=("words", "hops", "hops"), steps=200)
    data, other = Batches(config, 12), Batches(config, 12)
    first = {step: data[step] for step in (0, 1, 17, 40, 130)}
    for step in (40, 130, 0, 17, 1, 1):
        assert same(first[step], other[step]) and same(first[step], Batches(config, 12)[step])
    assert len({str(t.tolist()) for t, _, _ in first.values()}) == 5
    reseeded = Batches(TrainingConfig(batch_tokens=200, seed=5, families=config.families, steps=200), 12)
    assert not any(torch.equal(first[step][0], reseeded[step][0]) for step in first)


# --- the measure --------------------------------------------------------------------------------------------------


def test_exact_match_is_greedy_decoding():
    """One forward pass says for every problem whether decoding writes exactly its solution."""
    model = fresh_model().double().eval()
    problems = [p for family in tasks.FAMILIES for p in tasks.heldout(3, seed=11, family=family)]
    for num_steps in (1, None):
        for p, room in zip(problems, [40, 3, 1, 7, 17, 2, 12, 1, 5], strict=True):  # what it writes is now right
            p.target = autoregressive.generate(model, p.prompt, room, num_steps=num_steps, stop_tokens=()).tokens
        assert exact_match(model, problems, num_steps) == 1
        for wrong, p in enumerate(problems, 1):
            at = wrong % len(p.target)
            p.target[at] = (p.target[at] + 1) % 100
            assert exact_match(model, [p], num_steps) == 0
            assert exact_match(model, problems, num_steps) == pytest.approx(1 - wrong / len(problems))


# --- a run --------------------------------------------------------------------------------------------------------

RUN = dict(
    steps=12, batch_tokens=400, learning_rate=1e-3, log_every=4, evaluate_every=8, evaluate_on=2, save_every=5, seed=3,
    families=("words", "hops", "hops"),
)  # fmt: skip


def fresh_model(**sizes) -> RecurrentDepthLM:
    torch.manual_seed(0)
    shape = dict(n_embd=32, n_heads=2, intermediate_size=48, vocab_size=128, block_size=256, mean_recurrence=3)
    shape |= dict(n_layers_in_prelude=1, n_layers_in_recurrent_block=1, n_layers_in_coda=1, mean_backprop_depth=2)
    return RecurrentDepthLM(RecurrentConfig(**(shape | sizes)))


def without_times(log: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log]


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    model, folder = fresh_model(), tmp_path_factory.mktemp("straight")
    log = training.train(model, TrainingConfig(**RUN), Run(folder))
    return model, log, folder


def test_a_run_writes_its_log_and_its_checkpoint(straight_run):
    model, log, folder = straight_run
    assert [row["step"] for row in log] == [4, 8, 12]
    assert [[family in row for family in ("words", "hops")] for row in log] == [[False] * 2, [True] * 2, [True] * 2]
    with open(folder / "log.csv", newline="") as f:
        reader = csv.DictReader(f)
        rows = list(reader)
    assert reader.fieldnames == ["step", "loss", "rate", "seconds", "words", "hops"]
    assert [{k: float(v) for k, v in row.items() if v} for row in rows] == log
    assert [row["rate"] for row in log] == [TrainingConfig(**RUN).rate(step) for step in (3, 7, 11)]
    assert log[-1]["loss"] < log[0]["loss"], "it learns something"
    loaded = RecurrentDepthLM.from_pretrained(folder / "checkpoint")
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_each_family_is_measured_on_problems_of_its_own(tmp_path, monkeypatch):
    measured = []

    def count(model, problems):
        (family,) = {p.family for p in problems}
        measured.append((family, len(problems)))
        return {"words": 0.25, "automaton": 0.5, "hops": 0.75}[family]

    monkeypatch.setattr(training, "exact_match", count)
    settings = dict(steps=2, log_every=1, evaluate_every=1, evaluate_on=5, families=("hops", "automaton", "hops"))
    log = training.train(fresh_model(), TrainingConfig(**(RUN | settings)), Run(tmp_path))
    assert [(row["hops"], row["automaton"]) for row in log] == [(0.75, 0.5)] * 2
    assert measured == [("hops", 5), ("automaton", 5)] * 2
    assert (tmp_path / "log.csv").read_text().startswith("step,loss,rate,seconds,hops,automaton\n")


def test_a_run_is_a_plain_loop_over_its_batches(tmp_path, monkeypatch):
    """Every step: the batch of that step, states of its own, a clipped gradient, the rate of the step, AdamW."""
    settings = RUN | dict(steps=5, gradient_clip=0.3, weight_decay=0.2, learning_rate=0.01)
    config, model, seen, loss = TrainingConfig(**settings), fresh_model(), [], depth_loss
    monkeypatch.setattr(training, "depth_loss", lambda *args: seen.append(args[1:]) or loss(*args))
    log = training.train(model, config, Run(tmp_path))

    data, plain, losses = Batches(config, model.config.mean_recurrence), fresh_model(), []
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), weight_decay=0.2, fused=True)
    for step, (tokens, labels, depths, backprop, state, reads, _) in enumerate(seen):
        assert same((tokens, labels, depths), data[step])
        assert backprop == model.config.mean_backprop_depth and reads == data.reads(step, backprop)
        losses.append(loss(plain, tokens, labels, depths, backprop, state, reads))
        optimizer.zero_grad()
        losses[-1].backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3) > 0.3
        optimizer.param_groups[0]["lr"] = config.rate(step)
        optimizer.step()
    assert len(losses) == 5
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert log[0]["loss"] == pytest.approx(sum(losses[:4]).item() / 4)
    assert log[1]["loss"] == pytest.approx(losses[4].item())

    states = [row for *_, state, _, _ in seen for row in state[:, :5]]  # each (5, d): a row's first positions
    assert len({tuple(state.flatten().tolist()) for state in states}) == len(states), "another for every row and step"
    spread = torch.stack(states).std().item()
    assert spread == pytest.approx(math.sqrt(2 / 5), rel=0.05)


# after a save; between two; after a row of the log, with a log that is ahead of the saved weights, as a run leaves it
# that is killed between writing the two
@pytest.mark.parametrize(("killed_at", "log_is_ahead"), [(5, False), (7, False), (11, True)])
def test_a_killed_run_goes_on_to_the_same_bits(straight_run, tmp_path, monkeypatch, killed_at, log_is_ahead):
    model, log, folder = straight_run
    calls, loss = [], training.depth_loss

    def killed(*args):
        calls.append(1)
        if len(calls) == killed_at + 1:
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "depth_loss", killed)
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


def test_a_run_that_was_to_stop_half_way_goes_on_to_the_same_bits(straight_run, tmp_path):
    model, log, _ = straight_run
    other = fresh_model()
    half = training.train(other, TrainingConfig(**RUN), Run(tmp_path), until=6)
    assert half[-1]["step"] == 6 and (tmp_path / "checkpoint").is_dir()
    again = fresh_model()
    whole = training.train(again, TrainingConfig(**RUN), Run(tmp_path))
    assert {row["step"]: row["loss"] for row in whole}[12] == {row["step"]: row["loss"] for row in log}[12]
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="until is 13; it must be from 1 to steps, here 12"):
        training.train(fresh_model(), TrainingConfig(**RUN), Run(tmp_path / "none"), until=13)
    assert not (tmp_path / "none").exists()


def test_a_run_that_has_come_so_far_says_how_far(tmp_path):
    config = TrainingConfig(**RUN | dict(log_every=50, evaluate_every=50, save_every=2))
    with mock.patch.object(training, "exact_match", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        # the last save is of step 2, and nothing was logged
        training.train(fresh_model(), config, Run(tmp_path), until=3)
    log = training.train(fresh_model(), config, Run(tmp_path), until=2)
    assert [row["step"] for row in log] == [2] and {"loss", "words", "hops"} <= log[0].keys()
    assert training.train(fresh_model(), config, Run(tmp_path), until=1)[-1]["step"] == 2


def test_a_run_that_has_ended_is_not_measured_again(straight_run, monkeypatch):
    _, log, folder = straight_run
    monkeypatch.setattr(training, "exact_match", lambda *_: pytest.fail("it is in the log"))
    assert training.train(fresh_model(), TrainingConfig(**RUN), Run(folder)) == log


def test_what_is_frozen_stays_and_a_run_of_it_resumes(tmp_path):
    models = []
    for until in (6, 12):
        models.append(fresh_model())
        models[-1].transformer.prelude.requires_grad_(False)
        training.train(models[-1], TrainingConfig(**RUN), Run(tmp_path), until=until)
    straight = fresh_model()
    straight.transformer.prelude.requires_grad_(False)
    training.train(straight, TrainingConfig(**RUN), Run(tmp_path / "straight"))
    fresh = dict(fresh_model().named_parameters())
    for (name, a), b in zip(straight.named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, fresh[name]) == ("prelude" in name), name


def test_a_model_without_the_tasks_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 64; the tasks' tokenizer needs 112"):
        training.train(fresh_model(vocab_size=64), TrainingConfig(**RUN), Run(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("sizes", "other", "named"),
    [
        ({}, {"learning_rate": 0.5}, "another run: its training.*0.001.*0.5"),
        ({}, {"steps": 13}, "another run: its training"),
        ({}, {"staged": False}, "another run: its training"),
        ({}, {"families": ("words", "hops")}, "another run: its training"),
        ({"mean_recurrence": 4}, {}, "another run: its model.*mean_recurrence"),
    ],
)
def test_a_run_of_another_configuration_is_refused_and_left_alone(straight_run, sizes, other, named):
    folder = straight_run[2]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=named):
        training.train(fresh_model(**sizes), TrainingConfig(**(RUN | other)), Run(folder))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_finished_run_is_not_run_again(straight_run, monkeypatch):
    model, log, folder = straight_run
    monkeypatch.setattr(training, "depth_loss", lambda *_: pytest.fail("a step was run"))
    again = fresh_model()
    assert training.train(again, TrainingConfig(**RUN), Run(folder)) == log
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_is_weights_moments_and_a_number(straight_run):
    model, _, folder = straight_run
    names = [name for name, _ in model.named_parameters()]
    stored = {f"{kind}.{name}" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in names}
    assert load_file(folder / "state.safetensors").keys() == stored
    assert not list(folder.rglob("*.part")), "nothing half-written is left"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"batch_tokens": -1}, "batch_tokens is -1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"evaluate_on": 0}, "evaluate_on is 0"),
        ({"save_every": 0}, "save_every is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"gradient_clip": math.nan}, "gradient_clip is nan"),
        ({"warmup": -0.1}, "warmup is -0.1"),
        ({"decay": 1.1}, "decay is 1.1"),
        ({"curriculum": 2.0}, "curriculum is 2.0"),
        ({"joining": -0.5}, "joining is -0.5"),
        ({"reads": 0}, "reads is 0; it must be a whole number, at least 1"),
        ({"early": -0.5}, "early is -0.5"),
        ({"random": 1.5}, "random is 1.5"),
        ({"early": 0.8, "random": 0.3}, "early is 0.8 and random 0.3"),
        ({"extra": -1.0}, "extra is -1.0"),
        ({"extra": math.inf}, "extra is inf"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"families": ("words", "sums")}, "family is 'sums'"),
    ],
)
def test_bad_setting_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        TrainingConfig(**wrong)


def test_a_setting_is_the_same_whoever_made_its_numbers():
    numpy = TrainingConfig(
        steps=np.int64(4), extra=np.float64(2), seed=np.int64(3), families="hops", warmup=np.int64(0)
    )
    plain = TrainingConfig(steps=4, extra=2, seed=3, families=("hops",), warmup=0)
    assert numpy == plain and json.dumps(dataclasses.asdict(numpy)) == json.dumps(dataclasses.asdict(plain))
    assert isinstance(plain.extra, float) and training.Batches(plain, 4)[0][2].dtype == torch.int64


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"steps": 1e3}, "steps is 1000.0; it must be a whole number"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 to 4294967295"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
    ],
)
def test_a_number_of_the_wrong_kind_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        TrainingConfig(**wrong)


def test_all_rows_may_be_of_one_kind():
    for early, random in [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.9, 0.1), (0.7, 0.3)]:
        TrainingConfig(early=early, random=random)
