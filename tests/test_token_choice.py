"""From logits to a token: the filters against the official ones, and sampling against the softmax."""

import math

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
def test_greedy_takes_the_likeliest_whatever_the_seed_and_the_filters(logits, seed):
    logits = torch.tensor([[logits]])
    at = torch.tensor([[2]])
    seed = torch.tensor([[seed]])
    for choice in (TokenChoice(), TokenChoice(top_k=1, top_p=0.1, min_p=1.0)):
        assert choice.choose(logits, torch.zeros(1, 4, dtype=torch.long), at, seed) == logits.argmax()


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
        *[("temperature", v) for v in (-0.1, float("nan"), float("inf"))],
        *[("top_k", v) for v in (0, -3)],
        *[("top_p", v) for v in (0.0, -0.5, 1.5, 2, float("nan"))],
        *[("min_p", v) for v in (0.0, -0.5, 1.5, float("nan"))],
        *[("repetition_penalty", v) for v in (0, -1.0, float("nan"))],
    ],
)
def test_bad_value_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        TokenChoice(**{name: value})
