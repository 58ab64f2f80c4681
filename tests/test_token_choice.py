"""From logits to a token: the filters against the official ones, and sampling against the softmax."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirec.token_choice import TokenChoice

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True)


@pytest.mark.parametrize(
    ("case", "filters"),
    [
        ("t0.7", dict(temperature=0.7)),
        ("topk10", dict(temperature=1.0, top_k=10)),
        ("minp0.1", dict(temperature=1.0, min_p=0.1)),
        # min_p drops what the two rules of top_p differ by: see the next test
        ("all", dict(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05)),
    ],
)
def test_probabilities_are_the_official_ones(golden, case, filters):
    g, _ = golden("g_sampling")
    torch.testing.assert_close(TokenChoice(**filters).scores(g["logits"]).softmax(-1), g[f"{case}.probs"])


def test_top_p_keeps_the_token_that_crosses_the_threshold(golden):
    """The one difference: the official code drops that token, we keep it, as transformers does.

    Taking the least likely of our tokens away gives the official probabilities, row by row.
    """
    g, _ = golden("g_sampling")
    ours = TokenChoice(temperature=1.0, top_p=0.8).scores(g["logits"]).softmax(-1)
    for p, theirs in zip(ours, g["topp0.8.probs"], strict=True):
        crossing = torch.where(p > 0, p, 2).argmin()
        assert theirs[crossing] == 0 and (p > 0).sum() == (theirs > 0).sum() + 1
        p[crossing] = 0
        torch.testing.assert_close(p / p.sum(), theirs)


def test_repetition_penalty_is_the_official_one(golden):
    g, _ = golden("g_sampling")
    logits = g["logits"][:1, None]  # (1, 1, V)
    context = torch.cat([g["context"], torch.tensor([[200, 201]])], dim=1)  # two tokens that are still to come
    last = torch.tensor([[g["context"].shape[1] - 1]])
    ours = TokenChoice(repetition_penalty=1.3).penalised(logits, context, last)
    torch.testing.assert_close(ours[:, 0], g["reppen1.3.logits"], rtol=0, atol=0)


def test_each_cell_is_penalised_for_what_is_before_it():
    logits = torch.tensor([2.0, -2.0, 1.0, -1.0]).expand(1, 3, 4)
    penalised = TokenChoice(repetition_penalty=2.0).penalised(
        logits, torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 2, 3]])
    )
    right = [[1.0, -2.0, 1.0, -1.0], [1.0, -4.0, 1.0, -1.0], [1.0, -4.0, 0.5, -1.0]]
    assert penalised[0].tolist() == right
    seed = torch.zeros(1, 1, dtype=torch.long)
    choice = TokenChoice(repetition_penalty=4.0)  # 0.5, -8, 0.25, -1 at the last cell: greedy heeds it too
    assert choice.choose(logits, torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 2, 3]]), seed).tolist() == [[2, 2, 2]]


@given(LOGITS, st.integers(1, 12), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.2, 3))
def test_filters_keep_what_their_definitions_say(logits, top_k, top_p, min_p, temperature):
    logits = torch.tensor([logits], dtype=torch.float64)
    p, rank = (logits / temperature).softmax(-1)[0], logits[0].argsort(descending=True).argsort()
    likelier = torch.stack([p[rank < r].sum() for r in rank])  # probability of all likelier tokens

    def kept(**filters):
        return TokenChoice(temperature=temperature, **filters).scores(logits)[0] > float("-inf")

    assert torch.equal(kept(top_k=top_k), rank < top_k)
    unclear = (likelier - top_p).abs() < 1e-9  # rounding may decide there
    assert torch.equal(kept(top_p=top_p) | unclear, (likelier < top_p) | unclear)
    unclear = (p - min_p * p.max()).abs() < 1e-9
    assert torch.equal(kept(min_p=min_p) | unclear, (p >= min_p * p.max()) | unclear)
    assert kept(top_k=top_k, top_p=top_p, min_p=min_p)[p.argmax()], "the likeliest token always stays"
    assert torch.equal(kept(top_p=1.0, top_k=99), torch.ones_like(rank, dtype=torch.bool))


@given(LOGITS, st.integers(0, 1000))
def test_greedy_takes_the_likeliest_whatever_the_seed(logits, seed):
    logits = torch.tensor([[logits]])
    at = torch.tensor([[2]])
    seed = torch.tensor([[seed]])
    filtered = TokenChoice(temperature=0.5, top_k=1, top_p=0.1, min_p=1.0)  # that leave one token
    for choice in (TokenChoice(), filtered) if len(logits.unique()) == logits.numel() else (TokenChoice(),):
        assert choice.choose(logits, torch.zeros(1, 4, dtype=torch.long), at, seed) == logits.argmax()


FILTERS = [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}]


@pytest.mark.parametrize("options", [{}, *({"temperature": t} | f for t in (0.1, 1.0, 1e30) for f in FILTERS)], ids=str)
@pytest.mark.parametrize("penalty", [None, 1.5, 1e-6, 1e6])
def test_logits_that_are_not_finite_give_no_token(options, penalty):
    good, inf, nan = [1.0, -2.0, 3.0, 0.5], math.inf, math.nan
    rows = [good, [nan] * 4, [1.0, nan, 3.0, 0.5], [nan, -inf, 1.0, 2.0], [1.0, inf, 2.0, 3.0], [-inf] * 4,
            [inf, -inf, nan, 0.0], [-inf, -2.0, -inf, -3.0]]  # fmt: skip
    n = len(rows)
    choice = TokenChoice(repetition_penalty=penalty, **options)
    context = torch.tensor([[0, 3]]).expand(n, -1)
    at, seed = torch.ones(n, 1, dtype=torch.int64), torch.zeros(n, 1, dtype=torch.int64)
    tokens = choice.choose(torch.tensor(rows)[:, None], context, at, seed)  # (n, 1)
    assert (tokens[:, 0] >= 0).tolist() == [True, *[False] * 6, True]
    assert bool((tokens[1:-1] == -1).all())
    assert tokens[-1] in (1, 3)
    huge = torch.full((1, 1, 4), 3e38)  # finite, though their sum is not
    assert TokenChoice().choose(huge, context[:1], at[:1], seed[:1]) == 0


@pytest.mark.parametrize("temperature", [0, 1e-6, 1e-4])
@pytest.mark.parametrize("repetition_penalty", [None, 1e-6, 1.3, 1e6])
def test_the_coldest_temperature_is_greedy(temperature, repetition_penalty):
    logits = torch.tensor([[[2e7, -3e7, 1e7, 2.1e7]]])
    choice = TokenChoice(temperature, repetition_penalty=repetition_penalty)
    at, context = torch.tensor([[1]]), torch.tensor([[1, 0]])
    right = {None: 3, 1e-6: 0, 1.3: 3, 1e6: 3}[repetition_penalty]
    assert all(choice.choose(logits, context, at, torch.tensor([[seed]])) == right for seed in range(20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    choice = TokenChoice(0.7, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.4)
    given = (logits, torch.arange(10).reshape(2, 5), torch.tensor([[2, 3, 4]] * 2), torch.tensor([[5], [6]]))
    right = choice.choose(*given)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(choice.choose(*given), right)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_filter_without_a_temperature_is_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is {option[name]}, which has no effect at temperature 0"):
        TokenChoice(**option)
    TokenChoice(**dict.fromkeys(option))


def test_frequencies_are_the_softmax():
    """Chi-square of 20,000 seeds at one position, and of 20,000 positions with one seed."""
    logits = torch.tensor([1.5, 0.0, -0.5, 1.0, -9.0, 0.7, -1.0, 0.2])
    n, choice = 20_000, TokenChoice(temperature=0.8, top_k=6)
    p = choice.scores(logits).softmax(-1).double()
    tokens = torch.zeros(1, 1, dtype=torch.long)
    many_seeds = choice.choose(
        logits.expand(n, 1, -1), tokens.expand(n, 1), torch.full((n, 1), 7), torch.arange(n)[:, None]
    )
    many_positions = choice.choose(logits.expand(1, n, -1), tokens, torch.arange(n)[None], torch.tensor([[3]]))
    assert not torch.equal(many_seeds.flatten(), many_positions.flatten())
    for drawn in (many_seeds, many_positions):
        count = drawn.flatten().bincount(minlength=8).double()
        assert count[p == 0].sum() == 0
        possible = p > 0
        chi_square = ((count - n * p)[possible] ** 2 / (n * p[possible])).sum().item()
        freedom = int(possible.sum()) - 1
        assert chi_square < freedom + 6 * math.sqrt(2 * freedom), count.tolist()


def test_a_cell_is_sampled_by_seed_and_position_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 30, generator=generator)
    tokens, positions = torch.zeros(2, 9, dtype=torch.long), torch.arange(3, 8).expand(2, 5)
    choice, seed = TokenChoice(temperature=1.0), torch.tensor([[4], [9]])
    batch = choice.choose(logits, tokens, positions, seed)
    for row in range(2):
        for cell in range(5):
            one = (slice(row, row + 1), slice(cell, cell + 1))
            alone = choice.choose(logits[one], tokens[:1], positions[one], seed[row : row + 1])
            assert alone == batch[row, cell]
    assert not torch.equal(batch, choice.choose(logits, tokens, positions, seed + 1))
    assert not torch.equal(batch, choice.choose(logits, tokens, positions + 1, seed))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (-0.1, float("nan"), float("inf"), 1e-38, 1e-46, 1e39, 9.9e-7)],
        *[("top_k", v) for v in (0, -3)],
        *[("top_p", v) for v in (0.0, -0.5, 1.5, 2, float("nan"))],
        *[("min_p", v) for v in (0.0, -0.5, 1.5, float("nan"))],
        *[("repetition_penalty", v) for v in (0, -1.0, float("nan"), 1e-38, 1e7)],
    ],
)
def test_bad_value_is_named(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value}; it must be")):
        TokenChoice(**{name: value})
