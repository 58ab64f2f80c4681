"""Two processes on the CPU train what one trains: the same losses, weights and evaluations, and one of them writes."""

import csv
import re

import pytest
import torch
from safetensors.torch import load_file

from minirec import RecurrentConfig, RecurrentDepthLM, tasks, training
from minirec.tools import cli, processes
from minirec.training import Objective, Phase, TrainingConfig, exact_match, fresh

TRAIN = (
    "train --start tiny --steps 6 --batch-tokens 700 --families words hops --learning-rate 0.003 --warmup 1 --decay 0 "
    "--gradient-clip 1000 --log-every 1 --evaluate-every 3 --evaluate-on 5 --save-every 3"
).split()
# as `minirec`, but process 1 writes nothing and gives up in the middle of step 5
GIVES_UP = """
import os, sys
from minirec import training
from minirec.files import checkpoint
from minirec.tools import cli
forward, calls = training.Objective.forward, []
def gives_up(*args):
    calls.append(1)
    if len(calls) == 5:
        os._exit(3)
    return forward(*args)
def refused(path, write):
    os._exit(4)
if os.environ["RANK"] == "1":
    training.Objective.forward, checkpoint.write_whole = gives_up, refused
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


@pytest.mark.parametrize("family", tasks.FAMILIES)
@pytest.mark.parametrize("world", [2, 3])
def test_the_losses_and_gradients_of_shares_add_up(monkeypatch, family, world):
    """Each process divides by the tokens of all, so the sum over them is the mean over the whole batch."""
    torch.manual_seed(0)
    model = RecurrentDepthLM(RecurrentConfig.preset("tiny")).double()
    phase = Phase((family,), window=2, arrows=(6, 8), frozen=1.0)
    config = TrainingConfig(phases=(phase,), batch_tokens=700)

    def loss_and_gradients(total) -> tuple[torch.Tensor, list[torch.Tensor]]:
        monkeypatch.setattr(training, "total", total)
        loss, *_ = Objective(model)(fresh(model, config, phase, family, 0), {1, 2})
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))

    counted: list[torch.Tensor] = []
    loss, gradients = loss_and_gradients(lambda x: counted.append(x) or x)
    shares = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        counts = iter(counted)
        shares.append(loss_and_gradients(lambda _, counts=counts: next(counts)))
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


def test_without_torchrun_there_is_one_process():
    assert processes.join("cpu") == torch.device("cpu")
    assert training.place() == (0, 1)
    x = torch.tensor(3.0)
    assert training.total(x) == 3 and training.total(x) is not x
    processes.leave()
