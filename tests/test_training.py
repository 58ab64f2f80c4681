"""The objective against the official one, the depths it draws, and runs that are killed and resumed."""

import csv
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from minirec import RecurrentConfig, RecurrentDepthLM, autoregressive, tasks, training
from minirec.training import TrainingConfig, depth_loss, exact_match, sample_depth

# --- the objective ------------------------------------------------------------------------------------------------


@pytest.fixture
def trainable(golden_folder):
    return RecurrentDepthLM.from_pretrained(golden_folder / "model")


@pytest.mark.parametrize("case", ["n4_k4", "n0_k8", "n7_k1", "n4_k4_masked"])
def test_loss_and_gradients_are_the_official_ones(golden, trainable, distance, case):
    f, described = golden("f_training")
    labels = f["labels_masked" if case.endswith("masked") else "labels"]
    depths = described["cases"][case]
    loss = depth_loss(trainable, f["input_ids"], labels, depths["n_no_grad"], depths["k_grad"], state=f["input_states"])
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


def test_depth_is_only_where_the_gradient_stops(golden, trainable):
    """The same loss for the same depth, other gradients; and without any step, none for the recurrent block."""
    f, _ = golden("f_training")
    losses, norms = [], []
    for without, with_ in [(4, 4), (8, 0)]:
        loss = depth_loss(trainable, f["input_ids"], f["labels"], without, with_, state=f["input_states"])
        trainable.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(trainable.transformer.adapter.weight.grad)
    assert losses[0] == losses[1]
    assert norms[0] is not None and norms[1] is None


def test_forward_lets_gradients_through_every_step(golden, trainable):
    f, _ = golden("f_training")
    trainable(f["input_ids"], num_steps=3).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in trainable.parameters())


# --- the depths ---------------------------------------------------------------------------------------------------


def test_depths_are_log_normal_poisson_as_in_the_official_code(golden):
    generator = torch.Generator().manual_seed(0)
    draws = [sample_depth(32, 8, generator) for _ in range(20_000)]
    r = torch.tensor([without + with_ for without, with_ in draws])
    assert all(with_ == min(n, 8) and without >= 0 for (without, with_), n in zip(draws, r.tolist(), strict=True))
    assert r.min() >= 1
    x = r.double()
    assert x.mean().item() == pytest.approx(33, abs=0.6)
    assert x.std().item() == pytest.approx(17.97, abs=0.8)
    assert r.median().item() in (28, 29, 30)
    smooth = r.bincount().double().unfold(0, 7, 1).mean(1)  # the mode of a histogram jumps, that of its average less
    assert smooth.argmax().item() + 3 in range(20, 28)

    f, _ = golden("f_training")
    official = f["sampler.hist_total"]  # 10,000 draws
    ours = r.bincount(minlength=len(official))[: len(official)]
    gap = (ours.cumsum(0) / len(r) - official.cumsum(0) / official.sum()).abs().max().item()
    assert gap < 2 * math.sqrt(1 / len(r) + 1 / official.sum().item()), "Kolmogorov-Smirnov, two samples"
    few = sum(with_ < 8 for _, with_ in draws) / len(draws)
    assert few == pytest.approx(1 - f["sampler.hist_k"][8].item() / 10_000, abs=0.005)


def test_the_official_histograms_are_of_the_same_rule(golden):
    """k = min(r, 8) and n = r - k: three histograms of one sample."""
    f, _ = golden("f_training")
    total, n, k = (f[f"sampler.hist_{name}"] for name in ("total", "n", "k"))
    assert k[:8].tolist() == total[:8].tolist() and k[8] == total[8:].sum()
    assert n[0] == total[:9].sum() and n[1:].tolist() == total[9 : 9 + len(n) - 1].tolist()


@pytest.mark.parametrize(("mean", "backprop"), [(1, 4), (8, 4), (8, 100)])
def test_depths_of_other_means(mean, backprop):
    generator = torch.Generator().manual_seed(1)
    draws = [sample_depth(mean, backprop, generator) for _ in range(4000)]
    r = torch.tensor(draws).sum(1)
    assert r.double().mean().item() == pytest.approx(mean + 1, rel=0.06)
    assert {with_ for _, with_ in draws} <= set(range(1, backprop + 1))
    generator.manual_seed(1)
    assert draws[:50] == [sample_depth(mean, backprop, generator) for _ in range(50)]


def test_schedules():
    config = TrainingConfig(steps=1000, learning_rate=1.0, warmup=0.1, decay=0.4, ramp=0.5)
    assert [config.rate(step) for step in (0, 49, 99, 500, 600, 800, 999)] == pytest.approx(
        [0.01, 0.5, 1, 1, 1, 0.5, 0.0025]
    )
    assert [config.mean_depth(step, 9) for step in (0, 250, 500, 999)] == [1, 5, 9, 9]
    assert TrainingConfig(ramp=0.0).mean_depth(0, 9) == 9


# --- the data and the measure -------------------------------------------------------------------------------------


def test_a_batch_has_the_loss_on_the_solution_alone():
    problems = tasks.heldout(5, seed=3)
    tokens, labels = training.batch_of(problems)
    assert tokens.shape == labels.shape == (5, max(len(p.prompt) + len(p.target) for p in problems) - 1)
    for row, p in enumerate(problems):
        line, n = p.prompt + p.target, len(p.prompt) + len(p.target) - 1
        assert tokens[row].tolist() == line[:-1] + [training.PAD] * (tokens.shape[1] - n)
        assert labels[row][labels[row] != training.IGNORE].tolist() == p.target
        assert labels[row, len(p.prompt) - 1] == p.target[0], "the last token of the prompt predicts the first"


def test_any_step_of_the_data_can_be_asked_for_again():
    config = TrainingConfig(batch_size=3, seed=4)
    data, other = training.Batches(config), training.Batches(config)
    first = {step: data[step] for step in (0, 5, 17, 40)}
    for step in (40, 0, 17, 5):
        for a, b in zip(first[step], other[step], strict=True):
            assert torch.equal(a, b)
    assert not any(torch.equal(first[0][0], t) for t in (first[5][0], first[17][0], first[40][0]))


def test_exact_match_is_greedy_decoding():
    """One forward pass says for every problem whether decoding writes exactly its solution."""
    model = RecurrentDepthLM.from_pretrained("tiny")
    problems = sorted(tasks.heldout(24, seed=11), key=lambda p: len(p.target))
    problems = problems[:8] + problems[-2:]
    written = autoregressive.generate(model, [p.prompt for p in problems], max(len(p.target) for p in problems))
    right = [gen.tokens == p.target for gen, p in zip(written, problems, strict=True)]
    assert [exact_match(model, [p]) == 1.0 for p in problems] == right
    assert exact_match(model, problems) == pytest.approx(sum(right) / len(right))
    # and at a depth where some fail
    shallow = autoregressive.generate(model, [p.prompt for p in problems], 120, num_steps=1)
    right = [gen.tokens == p.target for gen, p in zip(shallow, problems, strict=True)]
    assert [exact_match(model, [p], num_steps=1) == 1.0 for p in problems] == right


# --- killed and resumed -------------------------------------------------------------------------------------------

RUN = dict(
    steps=12, batch_size=4, learning_rate=1e-3, log_every=4, evaluate_every=8, evaluate_on=2, save_every=5, seed=3
)


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
    log = training.train(model, TrainingConfig(**RUN), folder)
    return model, log, folder


def test_a_run_writes_its_log_and_its_checkpoint(straight_run):
    model, log, folder = straight_run
    assert [row["step"] for row in log] == [4, 8, 12]
    assert ["exact_match" in row for row in log] == [False, True, True]
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in log]
    assert log[-1]["loss"] < log[0]["loss"], "it learns something"
    loaded = RecurrentDepthLM.from_pretrained(folder / "checkpoint")
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


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
            training.train(fresh_model(), TrainingConfig(**RUN), tmp_path)
    if log_is_ahead:
        shutil.copy(folder / "log.csv", tmp_path)
    again = fresh_model()
    with torch.no_grad():
        again.transformer.wte.weight.zero_()  # what it starts from does not matter: the saved weights come back
    log_again = training.train(again, TrainingConfig(**RUN), tmp_path)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert without_times(log_again) == without_times(log)


@pytest.mark.parametrize(
    ("sizes", "other", "named"),
    [
        ({}, {"learning_rate": 0.5}, "another run: its training.*0.001.*0.5"),
        ({}, {"steps": 13}, "another run: its training"),
        ({"mean_recurrence": 4}, {}, "another run: its model.*mean_recurrence"),
    ],
)
def test_a_run_of_another_configuration_is_refused_and_left_alone(straight_run, sizes, other, named):
    folder = straight_run[2]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=named):
        training.train(fresh_model(**sizes), TrainingConfig(**(RUN | other)), folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_finished_run_is_not_run_again(straight_run, monkeypatch):
    model, log, folder = straight_run
    monkeypatch.setattr(training, "depth_loss", lambda *_: pytest.fail("a step was run"))
    again = fresh_model()
    assert training.train(again, TrainingConfig(**RUN), folder) == log
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
        ({"batch_size": -1}, "batch_size is -1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"save_every": 0}, "save_every is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"families": ("words", "sums")}, "family is 'sums'"),
    ],
)
def test_bad_setting_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        TrainingConfig(**wrong)
