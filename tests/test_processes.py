"""Two processes on the CPU train what one trains: the same losses, weights and evaluations, and one of them writes."""

import csv
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minirec import RecurrentDepthLM, tasks, training
from minirec.files.run import Run
from minirec.tools import cli, processes
from minirec.training import IGNORE, TrainingConfig, depth_loss, exact_match

TRAIN = (
    "train --start tiny --steps 6 --batch-tokens 700 --families words hops --learning-rate 0.003 --warmup 0 --decay 0 "
    "--joining 0 --curriculum 0 --gradient-clip 1000 --log-every 1 --evaluate-every 3 --evaluate-on 5 --save-every 3"
).split()
# as `minirec`, but process 1 writes nothing and gives up in the middle of step 5
GIVES_UP = """
import os, sys
from minirec import training
from minirec.files import checkpoint
from minirec.tools import cli
loss, calls = training.depth_loss, []
def gives_up(*args):
    calls.append(1)
    if len(calls) == 5:
        os._exit(3)
    return loss(*args)
def refused(path, write):
    os._exit(4)
if os.environ["RANK"] == "1":
    training.depth_loss, checkpoint.write_whole = gives_up, refused
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, torchrun):
    """The folder of a run by one process, that of a run by two which was interrupted, and what the two printed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "gives_up.py").write_text(GIVES_UP)
    interrupted = torchrun("--", str(folder / "gives_up.py"), *TRAIN, "--out", str(folder / "two"))
    left = sorted(path.name for path in (folder / "two").iterdir())
    finished = torchrun("-m", "--", "minirec.tools.cli", *TRAIN, "--out", str(folder / "two"))
    assert cli.main([*TRAIN, "--out", str(folder / "one")]) == 0
    return folder / "one", folder / "two", interrupted, left, finished


def log_of(folder) -> list[dict]:
    with open(folder / "log.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


def test_when_one_process_ends_all_end_and_the_last_save_stays(runs):
    _, _, interrupted, left, _ = runs
    assert interrupted.returncode != 0
    assert re.search(r"exitcode\s*: 3 ", interrupted.stderr), interrupted.stderr
    assert left == ["log.csv", "state.safetensors"]


def test_two_processes_have_the_losses_and_evaluations_of_one(runs):
    one, two, _, _, finished = runs
    assert finished.returncode == 0, finished.stderr
    log, other = log_of(one), log_of(two)
    assert [row["step"] for row in other] == [1, 2, 3, 4, 5, 6]
    for row, same in zip(log, other, strict=True):
        assert same["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert [same.get(f) for f in ("words", "hops")] == [row.get(f) for f in ("words", "hops")]
    assert 0 < log[2]["words"] + log[2]["hops"] < 2, "the evaluation of a model that knows nothing says nothing"
    assert len({row["loss"] for row in log}) == 6


def test_two_processes_arrive_at_the_weights_and_moments_of_one(runs):
    one, two, *_ = runs
    end, other = (load_file(folder / "state.safetensors") for folder in (one, two))
    assert end.keys() == other.keys()
    for name, p in end.items():  # the moments tell a gradient from its half, to which the weights of AdamW are blind
        assert (other[name] - p).norm() < 1e-4 * p.norm(), name
    start = RecurrentDepthLM.from_pretrained("tiny").transformer.wte.weight
    assert (end["weight.transformer.wte.weight"] - start).abs().max() > 5e-3
    saved = load_file(two / "checkpoint" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(saved, other["weight.transformer.wte.weight"])


def test_one_of_two_processes_writes_and_reports(runs):
    one, two, _, _, finished = runs
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, two)]
    assert files[0] == files[1]
    assert finished.stdout.count("checkpoint: ") == 1


# --- without a second process -------------------------------------------------------------------------------------


def as_process(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setattr(training, "place", lambda: (rank, world))


@given(
    depths=st.lists(st.integers(1, 7), min_size=2, max_size=6),
    backprop=st.integers(1, 5),
    reads=st.sets(st.integers(1, 6), max_size=2),
    stages=st.integers(1, 3),
    world=st.integers(2, 3),
)
def test_the_losses_and_gradients_of_shares_add_up(small_model, depths, backprop, reads, stages, world):
    model = small_model(3)
    generator = torch.Generator().manual_seed(len(depths) + 7 * backprop)
    tokens = torch.randint(0, 23, (len(depths), 6), generator=generator)
    labels = torch.randint(0, 23, (stages, len(depths), 6), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = IGNORE  # so that rows count differently
    labels[..., 0] = 1
    depths, reads = torch.tensor(depths), [0, *reads]
    state = model.initial_state(torch.arange(6).expand_as(tokens), seed=torch.arange(len(depths))[:, None])

    def loss_and_gradients(rows, *whole):
        model.requires_grad_(True)
        loss = depth_loss(model, tokens[rows], labels[:, rows], depths[rows], backprop, state[rows], reads, *whole)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        model.requires_grad_(False)
        return loss.detach(), [torch.zeros(()) if g is None else g for g in gradients]

    loss, gradients = loss_and_gradients(slice(None))
    shares = [loss_and_gradients(slice(r, None, world), (labels, depths)) for r in range(min(world, len(depths)))]
    torch.testing.assert_close(sum(share for share, _ in shares), loss)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(sum(own[i] for _, own in shares), gradient)


def test_shares_of_an_evaluation_add_up(monkeypatch):
    model, problems = RecurrentDepthLM.from_pretrained("tiny"), tasks.heldout(9, seed=5, level=5)
    whole, shares = exact_match(model, problems, num_steps=1), []
    for rank in range(4):
        as_process(monkeypatch, rank, 4)
        shares.append(exact_match(model, problems, num_steps=1))
    assert sum(shares) == pytest.approx(whole) and 0 < whole < 1
    as_process(monkeypatch, 9, 10)  # more processes than problems: the last one has none
    assert exact_match(model, problems) == 0


def test_every_row_is_run_by_one_process_and_the_deepest_rows_by_different_ones(monkeypatch, tmp_path):
    config = TrainingConfig(steps=1, batch_tokens=900, families=("hops",), joining=0, curriculum=0)
    model, dealt = RecurrentDepthLM.from_pretrained("tiny"), []
    tokens, labels, depths = training.Batches(config, model.config.mean_recurrence)[0]

    def seen(model, tokens, labels, depths, backprop, state, reads, whole):
        dealt.append((tokens, labels, depths, state))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "depth_loss", seen)
    monkeypatch.setattr(training, "DistributedDataParallel", lambda module: module)
    for world in (1, 3):
        for rank in range(world):
            as_process(monkeypatch, rank, world)
            with pytest.raises(KeyboardInterrupt):
                training.train(model, config, Run(tmp_path))
    (whole, *shares) = dealt
    assert torch.equal(whole[0], tokens) and torch.equal(whole[1], labels) and torch.equal(whole[2], depths)

    def rows(tokens, labels, depths, state) -> list[tuple]:
        parts = zip(tokens.tolist(), labels.transpose(0, 1).tolist(), depths.tolist(), state.tolist(), strict=True)
        return sorted(str(row) for row in parts)

    assert sorted(row for share in shares for row in rows(*share)) == rows(*whole)
    assert sorted(int(share[2].max()) for share in shares) == depths.sort().values[-3:].tolist()


def test_a_batch_that_is_too_small_for_the_processes_is_refused_before_any_work(monkeypatch, tmp_path):
    as_process(monkeypatch, 0, 64)
    with pytest.raises(ValueError, match=r"batch_tokens is 3000, too few .* 64 processes: a batch may have \d+"):
        training.train(RecurrentDepthLM.from_pretrained("tiny"), TrainingConfig(), Run(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_without_torchrun_there_is_one_process():
    assert processes.join("cpu") == torch.device("cpu")
    assert training.place() == (0, 1)
    x = torch.tensor(3.0)
    assert training.total(x) == 3 and training.total(x) is not x
    processes.leave()
