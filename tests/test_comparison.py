"""A fair comparison: the depth is found on other problems, and the strongest competitors are always in the table."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minirec import RecurrentConfig, RecurrentDepthLM, adaptive_exit, autoregressive, tasks
from minirec.comparison import REFERENCE, SETTINGS, TOGETHER, Comparison, Run, compare, smallest_depth, solved_by_depth
from minirec.decoding import Generation
from minirec.tasks import END
from minirec.training import batch_of


class Solver:
    """Stands in for a model: after k recurrence steps it writes what k serial steps of a known problem reach."""

    device = torch.device("cpu")

    def __init__(self, problems):
        self.by_text = {tuple(batch_of([p])[0][0].tolist()): p for p in problems}

    def prelude(self, tokens):
        self.problem = self.by_text[tuple(tokens[0].tolist())]
        return torch.zeros(1, tokens.shape[1], 1)

    def initial_state(self, positions):
        return torch.zeros(len(positions), 1)

    def recur(self, s, e):
        return s + 1

    def coda(self, s):
        labels = batch_of([self.problem], [int(s[0, 0, 0])])[1]
        return F.one_hot(labels.clamp(min=0), 200).float()


def sampler(problems):
    """A `generate` that writes what so many steps reach, for known problems."""
    by_prompt = {tuple(p.prompt): p for p in problems}

    def generate(model, prompt, max_new_tokens, *, num_steps, on_token, **options):
        tokens = by_prompt[tuple(prompt)].reached(num_steps)
        for token in tokens:
            on_token(token)
        return Generation(tokens, [num_steps] * len(tokens))

    return generate


@pytest.fixture
def problems():
    return [p for level in (1, 2, 4) for p in tasks.heldout(4, family="hops", level=level)] + tasks.heldout(
        4, family="automaton", level=6
    )


@pytest.fixture
def run(monkeypatch, problems):
    """compare() on stand-ins, without other settings."""
    for module in (autoregressive, adaptive_exit):
        monkeypatch.setattr(module, "generate", sampler(problems))
    return lambda **more: compare(Solver(problems), problems, {}, **more)


def test_each_depth_solves_what_needs_no_more(problems):
    solved = solved_by_depth(Solver(problems), problems, (1, 2, 3, 4, 6, 8))
    needed = [len(p.stages) for p in problems]
    assert solved.tolist() == [[n <= r for n in needed] for r in (1, 2, 3, 4, 6, 8)]
    assert smallest_depth(solved, (1, 2, 3, 4, 6, 8)) == 6
    assert smallest_depth(solved[:, :12], (1, 2, 3, 4, 6, 8)) == 4, "hops alone"


def test_a_whole_solution_is_what_generation_writes():
    torch.manual_seed(0)
    model = RecurrentDepthLM(RecurrentConfig.preset("tiny")).eval()
    problem = SimpleNamespace(prompt=[1, 5, 9], target=[0] * 4)
    for r in (1, 3):
        problem.target = autoregressive.generate(model, problem.prompt, 4, num_steps=r, stop_tokens=()).tokens
        assert solved_by_depth(model, [problem], (r,)).all()
        problem.target[2] += 1
        assert not solved_by_depth(model, [problem], (r,)).any()


def test_the_depth_is_found_on_the_other_half(problems, run):
    found = run()
    assert found.depths == {"hops": 4, "automaton": 6, TOGETHER: 6}
    assert found.found_on == 8
    timed = [r.problem.text for r in found.runs[REFERENCE]]
    assert timed == [p.text for p in problems[1:12:2] + problems[13::2]]


def test_the_strongest_competitors_are_always_there(run):
    found = run()
    assert list(found.runs) == [REFERENCE, "adaptive exit", "autoregressive, r = 4, enough for hops"]
    for r in found.runs[REFERENCE]:
        assert set(r.generation.depth) == {6}
    report = str(found)
    for expected in ("hops: 6 problems", "automaton: 2 problems", f"{TOGETHER}: 8 problems", "autoregressive, r = 6"):
        assert expected in report
    assert report.endswith(found.verdict())


def found_by(problems, **rows) -> Comparison:
    """A comparison as it may have come out; rows: name -> (seconds, passes a token, whether it is right)."""
    runs = {}
    for name, (seconds, passes, right) in rows.items():
        runs[name] = []
        for p in problems:
            tokens = p.target if right else [END]
            generation = Generation(tokens, [6] * len(tokens), 6 + passes * (len(tokens) - 1), decodes=len(tokens))
            runs[name].append(Run(p, generation, seconds, seconds / 4))
    return Comparison({"hops": 4, "automaton": 6, TOGETHER: 6}, 8, runs)


def test_the_winner_is_the_fastest_that_gets_as_many_right(problems):
    rows = {REFERENCE: (4.0, 6, True), "adaptive exit": (2.0, 3, True), "hasty": (0.01, 1, False)}
    found = found_by(problems, **rows)
    assert found.right() == {REFERENCE: 16, "adaptive exit": 16, "hasty": 0}
    assert found.winner() == found.winner("hops") == "adaptive exit"
    assert found.speed_up()["adaptive exit"] == pytest.approx(2)
    assert "Adaptive exit won: 16 of 16 right at 2.00 times" in found.verdict()
    assert "hasty: fewer right" in found.verdict()
    rows["adaptive exit"] = (5.0, 3, True)
    assert "Autoregressive decoding at r = 6 won: 16 of 16 right" in found_by(problems, **rows).verdict()


def test_passes_leave_the_prompt_out(problems):
    found = found_by(problems, **{REFERENCE: (4.0, 6, True), "swift": (2.0, 1, True)})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.table().splitlines()]
    assert cells[0][4:8] == ["speed-up", "passes/token", "coda calls/token", "prefill"]
    assert cells[2][4:8] == ["1.00", "6.00", "1.00", "1000.0 ms"]
    assert cells[3][4:8] == ["2.00", "1.00", "1.00", "500.0 ms"]


def test_real_samplers_run_and_the_lossless_one_writes_the_same():
    torch.manual_seed(0)
    model = RecurrentDepthLM(RecurrentConfig.preset("tiny")).eval()
    found = compare(model, tasks.heldout(2, family="hops", level=1), depths=(2, 4))
    assert list(found.runs) == [REFERENCE, "adaptive exit", *SETTINGS]
    assert found.depths == {"hops": 2, TOGETHER: 2}, "no depth solves anything, so the smallest solves as many"
    lossless, reference = found.runs["lossless wavefront"], found.runs[REFERENCE]
    assert [r.generation.tokens for r in lossless] == [r.generation.tokens for r in reference]
    assert all(0 < r.prefill <= r.seconds for runs in found.runs.values() for r in runs)


@pytest.mark.parametrize("depths", [(), (0, 2), (-1,)])
def test_a_bad_depth_is_refused(run, depths):
    with pytest.raises(ValueError, match="depths is"):
        run(depths=depths)


@pytest.mark.parametrize("n", [0, 1])
def test_a_family_needs_two_problems(problems, n):
    with pytest.raises(ValueError, match="two at least"):
        compare(Solver(problems), problems[:n])


def test_a_depth_may_miss_one_problem_in_a_hundred():
    solved = np.ones((2, 200), dtype=bool)
    solved[0, :2] = False
    assert smallest_depth(solved, (3, 5)) == 3
    solved[0, :3] = False
    assert smallest_depth(solved, (3, 5)) == 5
