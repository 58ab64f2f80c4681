"""Numbers as a function of (seed, position, channel): the right function, and the right distributions."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from minirec.noise import gumbel, truncated_normal, uniform

SEEDS = st.integers(-(2**63), 2**63 - 1)


def mix(x: int) -> int:
    """The finaliser of MurmurHash3 on Python integers, which do not overflow."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


@given(SEEDS, st.integers(0, 2**20), st.integers(0, 3))
def test_same_bits_as_the_hash_on_python_integers(seed, position, stream):
    golden_ratio = 0x9E3779B9
    key = mix(seed % 2**32)
    key = mix((key + (seed % 2**64 // 2**32) * golden_ratio) % 2**32)
    key = mix((key + stream * golden_ratio) % 2**32)
    key = mix((key + position * golden_ratio) % 2**32)
    bits = [mix((key + channel * golden_ratio) % 2**32) >> 9 for channel in range(1, 6)]
    right = [(b + 0.5) / 2**23 for b in bits]
    assert uniform(seed, torch.tensor([position]), 5, stream)[0].tolist() == right


@given(SEEDS, st.lists(st.integers(0, 5000), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_only_seed_and_position_count(seed, positions, rng):
    together = uniform(seed, torch.tensor(positions), 7)
    order = list(range(len(positions)))
    rng.shuffle(order)
    for i in order:  # in another order, one at a time, inside a batch, with fewer channels, with a seed a row
        alone = uniform(seed, torch.tensor([positions[i]]), 7)
        batch = uniform(torch.tensor([[seed], [3]]), torch.tensor([[positions[i]], [9]]), 4)
        assert torch.equal(together[i], alone[0])
        assert torch.equal(together[i, :4], batch[0, 0])


def test_seeds_positions_streams_and_channels_differ():
    positions = torch.arange(50)
    values = torch.stack([uniform(s, positions, 20, stream) for s in (0, 1, 2**32, -1) for stream in (0, 1)])
    assert len(values.unique()) > 0.99 * values.numel()


def test_uniform_is_uniform_and_open():
    u = uniform(5, torch.arange(2000), 100).double()
    assert 0 < u.min() and u.max() < 1
    assert torch.all(uniform(5, torch.arange(2000), 100) < 1)  # also in float32, where rounding up would give 1
    steps = torch.linspace(0, 1, 201, dtype=torch.float64)
    below = torch.searchsorted(u.flatten().sort().values, steps) / u.numel()
    assert (below - steps).abs().max() < 2.5 / math.sqrt(u.numel())  # Kolmogorov: 2.5 is never reached by chance
    for other in (u[:, 1:] - 0.5, (u - 0.5).roll(1, 0)[:, :-1]):  # neighbours: channels, then positions
        assert ((u[:, :-1] - 0.5) * other).mean().abs() < 5 / 12 / math.sqrt(u.numel())


def test_truncated_normal_is_cut_at_three_sigma():
    x = truncated_normal(3, torch.arange(3000), 100, std=2.0).double()
    assert x.abs().max() <= 6.0 + 1e-5
    assert x.abs().max() > 5.8  # and it reaches out to there
    assert abs(x.mean()) < 0.02
    variance = 1 - 2 * 3 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2))  # of a unit normal, cut
    assert abs(x.var() / 4 - variance) < 0.01
    within_one = math.erf(1 / math.sqrt(2)) / math.erf(3 / math.sqrt(2))
    assert abs((x.abs() < 2).double().mean() - within_one) < 0.01


def test_gumbel_has_the_moments_of_a_gumbel():
    x = gumbel(1, torch.arange(3000), 100).double()
    assert x.isfinite().all()
    assert abs(x.mean() - 0.5772) < 0.01
    assert abs(x.var() - math.pi**2 / 6) < 0.03
    assert not torch.equal(gumbel(1, torch.arange(5), 9), -(-uniform(1, torch.arange(5), 9).log()).log())  # own stream
