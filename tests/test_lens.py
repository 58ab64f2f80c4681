"""The lens: states, distances and readings are what the model's own parts give, and settle as they are defined to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirec import lens

TOKENS = torch.arange(21).reshape(3, 7)  # (B=3, T=7)


@pytest.fixture(scope="module")
def model(small_model):
    return small_model(1, n_layers_in_coda=2)


@pytest.mark.parametrize("num_steps", [None, 0, 1, 5])
def test_the_trajectory_passes_through_the_state_of_every_depth(model, num_steps):
    states = lens.trajectory(model, TOKENS, num_steps)
    last = model.config.mean_recurrence if num_steps is None else num_steps
    assert states.shape == (last + 1, 3, 7, 16)
    for k in range(last + 1):
        torch.testing.assert_close(states[k], model(TOKENS, k).state, msg=f"the state after {k} steps is another one")


def test_the_trajectory_starts_where_it_is_told(model):
    positions = torch.arange(7)
    drawn = lens.trajectory(model, TOKENS, 3, seed=5, scale=0.5)
    expected = model.initial_state(positions, seed=5, scale=0.5).expand(3, 7, 16)
    torch.testing.assert_close(drawn[0], expected)
    assert not torch.allclose(drawn[3], lens.trajectory(model, TOKENS, 3)[3])  # the start makes a difference here
    assert not lens.trajectory(model, TOKENS, 0, scale=0.0).any()
    torch.testing.assert_close(lens.trajectory(model, TOKENS, 2, state=drawn[1])[2], drawn[3])


@pytest.mark.parametrize(
    ("tokens", "num_steps", "word"),
    [(TOKENS, -1, "num_steps is -1"), (TOKENS[0], 2, "tokens has shape"), (TOKENS[:, :0], 2, "tokens has shape"),
     (torch.zeros(1, 49, dtype=torch.long), 2, "from 1 to 48")],
)  # fmt: skip
def test_a_trajectory_that_cannot_be_is_refused(model, tokens, num_steps, word):
    with pytest.raises(ValueError, match=word):
        lens.trajectory(model, tokens, num_steps)


def test_changes_and_distances_of_states_drawn_by_hand():
    s = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0], [3.0, 0.0]]).view(4, 1, 1, 2)  # (r + 1, B, T, d)
    torch.testing.assert_close(lens.relative_change(s).flatten(), torch.tensor([1.0, 4 / 3, 0.0]))
    torch.testing.assert_close(lens.distance_to_end(s).flatten(), torch.tensor([3.0, 4.0, 0.0, 0.0]))
    many = torch.randn(5, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert lens.relative_change(many).shape == (4, 2, 3)
    assert lens.distance_to_end(many).shape == (5, 2, 3)


def test_the_coda_lens_is_what_the_model_says_at_every_depth(model):
    logits = lens.coda_lens(model, lens.trajectory(model, TOKENS, 4))
    assert logits.shape == (5, 3, 7, 23)
    for k in range(5):
        torch.testing.assert_close(logits[k], model(TOKENS, k).logits)
    torch.testing.assert_close(lens.coda_lens(model, model(TOKENS, 2).state), logits[2])  # one step needs no axis


def test_the_logit_lens_reads_each_position_alone_and_without_the_coda(model):
    states = lens.trajectory(model, TOKENS, 4)
    logits = lens.logit_lens(model, states)
    normed = states / (states.pow(2).mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
    expected = normed * model.transformer.ln_f.weight @ model.transformer.wte.weight.T  # the head is tied
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(lens.logit_lens(model, states[:, :, 3:4]), logits[:, :, 3:4])
    alone = lens.coda_lens(model, states[:, :, 3:4])
    assert not torch.allclose(alone, lens.coda_lens(model, states)[:, :, 3:4])  # the coda does look to the left


@pytest.mark.parametrize("read", [lens.coda_lens, lens.logit_lens])
def test_a_lens_gives_float32_for_narrow_weights_and_wants_a_whole_sequence(small_model, read):
    narrow = small_model(1, dtype=torch.bfloat16)
    assert read(narrow, lens.trajectory(narrow, TOKENS, 1)).dtype == torch.float32
    with pytest.raises(ValueError, match="states has shape"):
        read(narrow, torch.zeros(7, 16))


def test_settled_by_hand():
    guesses = torch.tensor([[7, 7, 1, 1], [7, 8, 1, 2], [7, 8, 2, 1], [7, 8, 1, 2]])  # (r = 4, tokens)
    # at once; from step 2; left and came back in step 4; changes in the last step
    assert lens.settled(guesses).tolist() == [1, 2, 4, 4]
    assert lens.settled(guesses.view(4, 2, 2)).tolist() == [[1, 2], [4, 4]]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_settled_is_the_first_step_of_the_last_run(guesses):
    runs = [k for k in range(len(guesses)) if len(set(guesses[k:])) == 1]
    assert lens.settled(torch.tensor(guesses)).item() == runs[0] + 1


def test_principal_components_find_the_plane_that_states_lie_in():
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(10, 2, generator=generator)).Q.T  # (2, 10), orthonormal
    flat = torch.randn(6, 5, 2, generator=generator) * torch.tensor([9.0, 1.0])
    states = flat @ plane + 100.0  # far from the origin: centring matters
    found = lens.principal_components(states)
    assert found.shape == (6, 5, 2)
    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(2), atol=1e-4, rtol=0)
    rows, cols = found.view(30, 2), states.view(30, 10)
    exactly = "donot_use_mm_for_euclid_dist"
    between = [torch.cdist(x, x, compute_mode=exactly) for x in (rows, cols)]
    torch.testing.assert_close(*between, atol=1e-3, rtol=1e-4)
    assert found[..., 0].std() > 3 * found[..., 1].std()  # the widest first


def test_principal_components_have_one_sign_and_say_when_there_are_too_few():
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        direction = torch.randn(6, generator=generator)
        along = lens.principal_components(torch.arange(4.0)[:, None] * direction, n=1)[:, 0]
        assert (along[-1] > along[0]) == (direction[direction.abs().argmax()] > 0)
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n is {n}; 3 states of width 6"):
            lens.principal_components(torch.zeros(3, 6), n=n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_of_half_precision_can_be_looked_at_and_drawn(dtype):
    states = torch.randn(5, 2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for look in (lens.relative_change, lens.distance_to_end, lens.principal_components):
        assert torch.equal(look(states), look(states.float()))
        look(states).numpy()
