"""The lossless wavefront: the tokens of autoregressive decoding, for every prompt, width, start and choice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec import RecurrentDepthLM, autoregressive, lossless_wavefront, tasks
from minirec.decoding import Grid

PROMPTS = st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=7), min_size=1, max_size=3)
CHOICES = st.sampled_from(
    [{}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 5, "top_p": 0.9}, {"repetition_penalty": 1.5}]
)
WIDTHS = st.sampled_from([None, 1, 2, 3, 9])
SHAPES = [
    {},
    {"n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2},  # Huginn's
    {"n_layers_in_recurrent_block": 2, "n_embd": 24, "n_heads": 3},
    {"n_layers_in_prelude": 3, "qk_bias": False},
    {"n_layers_in_coda": 3, "n_heads": 1, "tie_embeddings": False},
]


@given(
    PROMPTS, st.integers(0, 3), CHOICES, st.integers(1, 6), st.integers(1, 6), WIDTHS, st.integers(1, 12),
    st.sampled_from([0.0, 1.0, 3.0]), st.sets(st.integers(0, 22), max_size=3), st.sampled_from(SHAPES),
)  # fmt: skip
@settings(max_examples=60)
def test_tokens_are_autoregressive(
    small_model, prompts, seed, choice, num_steps, guess_after, widest, limit, scale, stop, shape
):
    model, seeds = small_model(seed, **shape), list(range(5, 5 + len(prompts)))
    common = choice | {"num_steps": num_steps, "init_scale": scale, "stop_tokens": stop}
    how = {"guess_after": min(guess_after, num_steps), "max_wavefront": widest, "trace": True}
    right = autoregressive.generate(model, prompts, limit, seed=seeds, **common)
    rows = lossless_wavefront.generate(model, prompts, limit, seed=seeds, **how, **common)
    assert [(g.tokens, g.depth) for g in rows] == [(g.tokens, g.depth) for g in right]
    for prompt, own, row in zip(prompts, seeds, rows, strict=True):
        alone = lossless_wavefront.generate(model, prompt, limit, seed=own, **how, **common)
        assert alone.tokens == row.tokens
        assert alone.passes <= num_steps * len(alone.tokens), "never more passes than one position at a time"
        for step in alone.trace:  # a diagonal: each position at least guess_after behind the one left of it
            assert all(a - b >= how["guess_after"] for a, b in zip(step.depths, step.depths[1:], strict=False))
            assert widest is None or len(step.depths) <= widest


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_autoregressive_in_float32(small_model, shape, batch):
    model = small_model(1, dtype=torch.float32, **shape)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 23, (n,), generator=generator) for n in range(3, 3 + batch)]
    right = autoregressive.generate(model, prompts, 25, num_steps=6, stop_tokens=())
    rows = lossless_wavefront.generate(model, prompts, 25, num_steps=6, guess_after=2, stop_tokens=())
    assert [g.tokens for g in rows] == [g.tokens for g in right]


def shipped_prompts(n: int) -> list[list[int]]:
    """Held-out problems of every family and prompts of random tokens, in turn."""
    generator = torch.Generator().manual_seed(0)
    problems = [iter(tasks.heldout(n // 4 + 1, seed=3, family=family)) for family in tasks.FAMILIES]
    lengths = torch.randint(1, 60, (n,), generator=generator).tolist()
    random = [torch.randint(0, 128, (length,), generator=generator).tolist() for length in lengths]
    return [next(problems[i % 4]).prompt if i % 4 < 3 else random[i] for i in range(n)]


@pytest.mark.parametrize(("n", "batch"), [(24, 1), pytest.param(1000, 8, marks=pytest.mark.slow),
                                          pytest.param(1000, 1, marks=pytest.mark.slow)])  # fmt: skip
def test_tokens_of_the_shipped_model_are_autoregressive(n, batch):
    model, prompts = RecurrentDepthLM.from_pretrained("tiny"), shipped_prompts(n)
    for first in range(0, n, batch):
        some = prompts[first : first + batch]
        right = autoregressive.generate(model, some, 40)
        rows = lossless_wavefront.generate(model, some, 40, guess_after=1 + first % 4)
        assert [g.tokens for g in rows] == [g.tokens for g in right]


def test_guesses_that_hold_cost_guess_after_passes_a_token(small_model):
    model = small_model(0)
    with torch.no_grad():
        head = model.lm_head.weight.clone()
        model.lm_head.weight.zero_()  # every logit is 0: the argmax is token 0 at any depth
    try:
        gen = lossless_wavefront.generate(model, [3, 1, 4], 20, num_steps=6, guess_after=2, stop_tokens=(), trace=True)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(head)
    assert gen.tokens == [0] * 20
    # the prompt; the first position alone until it is done; from then on one token an outer step
    assert gen.passes == 6 + 6 + 18 * 2
    assert max(len(step.depths) for step in gen.trace) == 3


def test_a_changed_guess_takes_back_everything_to_its_right(small_model):
    taken_back = 0
    gen = lossless_wavefront.generate(small_model(2), [3, 1, 4], 30, num_steps=6, guess_after=1, trace=True)
    for before, after in zip(gen.trace, gen.trace[1:], strict=False):
        standing = dict(enumerate(before.guesses, before.start + 1))  # position -> the token it is given next
        earlier = dict(enumerate(before.depths, before.start))
        for position, depth in enumerate(after.depths, after.start):
            if depth > 1:
                assert earlier[position] == depth - 1, "it goes on, one step deeper"
            else:
                taken_back += position in earlier
            assert position == after.start or position in standing
    assert taken_back > 3


def test_sampling_draws_from_the_distribution_of_autoregressive_sampling(small_model):
    """Second and third new token, 4,000 seeds, against their exact probabilities: a chi-square test of all pairs."""
    model, prompt, n, size = small_model(1, vocab_size=5), [3, 1], 4000, 5
    with torch.no_grad():

        def p(tokens: list[list[int]]) -> torch.Tensor:
            """Probabilities of what follows, (B, 5), after three steps from a state of zeros, at temperature 3."""
            zeros = torch.zeros(len(tokens), len(tokens[0]), 16, dtype=torch.float64)
            return (model(torch.tensor(tokens), num_steps=3, state=zeros).logits[:, -1] / 3).softmax(-1)

        first = p([prompt])[0]  # (5,)
        second = p([[*prompt, a] for a in range(size)])  # (5, 5)
        third = p([[*prompt, a, b] for a in range(size) for b in range(size)]).view(size, size, size)
    right = torch.einsum("a,ab,abc->bc", first, second, third) * n  # (5, 5), how often each pair is to be expected
    assert right.min() > 5, "too rare a pair for the test"
    gens = lossless_wavefront.generate(
        model,
        [prompt] * n,
        3,
        num_steps=3,
        guess_after=1,
        seed=range(n),
        init_scale=0.0,
        temperature=3.0,
        stop_tokens=(),
    )
    counts = torch.zeros_like(right)
    for gen in gens:
        counts[gen.tokens[1], gen.tokens[2]] += 1
    chi_square = ((counts - right) ** 2 / right).sum()
    assert chi_square < 51.2, "one right sampler in a thousand would be this far off (24 degrees of freedom)"
    early = torch.einsum("a,ab,abc->bc", first, second, third.roll(1, 0)) * n
    assert ((counts - early) ** 2 / early).sum() > 51.2, "the test would not see a slightly wrong distribution"


def test_streams_in_order_and_stops_where_it_is_told(small_model):
    model, seen = small_model(1), []

    def some(token, row):
        seen.append((row, token))
        return not (row == 0 and len(seen) > 6)

    gens = lossless_wavefront.generate(model, [[3, 1, 4], [5]], 12, num_steps=4, guess_after=1, on_token=some)
    for row, gen in enumerate(gens):
        assert gen.tokens == [token for r, token in seen if r == row]
    assert len(gens[0].tokens) < 12 == len(gens[1].tokens)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"guess_after": 0}, "guess_after is 0; it must be a whole number, at least 1"),
        ({"guess_after": 5}, "guess_after is 5; it must be from 1 to num_steps, here 4"),
        ({"max_wavefront": 0}, "max_wavefront is 0; it must be a whole number, at least 1"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1, 23]}, "prompt holds 23; token ids are from 0 to 22"),
        ({"prompt": [1] * 46}, "the context is 48 tokens"),
    ],
)
def test_bad_arguments_are_named_before_any_work(small_model, monkeypatch, wrong, named):
    monkeypatch.setattr(Grid, "recur", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=named):
        lossless_wavefront.generate(small_model(0), **{"prompt": [1, 2], "max_new_tokens": 5} | wrong)
