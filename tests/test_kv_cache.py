"""The cache: what it holds, how large it is, which slot is whose, and that nothing is copied or grown."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirec import RecurrentConfig, kv_cache
from minirec.decoding import Grid
from minirec.kv_cache import KVCache, bytes_per_token

CONFIG = RecurrentConfig(n_embd=12, n_heads=2, intermediate_size=8, vocab_size=9, n_layers_in_recurrent_block=3)


def test_keys_and_values_are_the_official_ones(golden, golden_model, distance):
    a, _ = golden("a_forward")
    grid = Grid(golden_model, a["input_ids"], max_new_tokens=1, num_steps=8, kv="full")
    grid.state[:, :24] = a["input_states"]
    grid.prefill()
    # their name: prelude block 0; core block 0 in recurrence 1; coda block 0
    for name, part in [("kv_step0", "prelude"), ("kv_step2", "core"), ("kv_step-1", "coda")]:
        keys, values = (each[0, :, :24] for each in grid.cache.views[part][0][0])  # (H, T, c) each, of batch row 0
        assert distance(keys, a[f"{name}_k"]) < 1e-5, f"keys of the {part}"
        assert distance(values, a[f"{name}_v"]) < 1e-5, f"values of the {part}"


def test_a_token_of_the_3_5b_model_takes_2_66_mib():
    huginn = RecurrentConfig.preset("huginn_3_5b")
    full = bytes_per_token(huginn, 32)
    assert full == 2 * (2 + 4 * 32 + 2) * 5280 * 2  # k and v, layer calls, width, bytes of a bfloat16
    assert round(full / 2**20, 2) == 2.66
    assert bytes_per_token(huginn, 32, kv="shared", kv_slots=32) == full
    assert full / bytes_per_token(huginn, 32, kv="shared") == (2 + 4 * 32 + 2) / (2 + 4 + 2)
    assert bytes_per_token(huginn, 32, dtype=torch.float32) == 2 * full


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(["full", "shared"]),
    st.sampled_from([torch.bfloat16, torch.float64]),
    st.data(),
)
def test_allocated_is_what_the_arithmetic_says(batch, length, num_steps, kv, dtype, data):
    slots = data.draw(st.integers(1, num_steps if kv == "shared" else 1))
    cache = KVCache(CONFIG, batch, length, num_steps, kv, slots, dtype=dtype)
    assert cache.nbytes == bytes_per_token(CONFIG, num_steps, kv, slots, dtype) * length * batch
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in cache.parts.values())


def test_slots_of_the_recurrence_steps():
    def slots(kv, kv_slots):
        cache = KVCache(CONFIG, 1, 4, num_steps=4, kv=kv, kv_slots=kv_slots)
        as_ints = [cache.slot(depth) for depth in range(6)]
        assert [int(i) for i in torch.as_tensor(cache.slot(torch.arange(6))).expand(6)] == as_ints
        return as_ints

    assert slots("full", 1) == [0, 1, 2, 3, 3, 3]  # past num_steps, the last slot
    assert slots("shared", 1) == [0, 0, 0, 0, 0, 0]
    assert slots("shared", 3) == [0, 1, 2, 0, 1, 2]


def test_views_are_the_parts():
    cache = KVCache(CONFIG, batch=2, length=5, num_steps=3)
    for name, layers in cache.views.items():
        for layer, slots in enumerate(layers):
            for slot, (keys, values) in enumerate(slots):
                mark = 1 + 100 * layer + 10 * slot
                keys.fill_(mark)
                values.fill_(-mark)
                stored = cache.parts[name].shape[2] - 1 - slot  # the last slot first
                assert cache.parts[name][:, layer, stored, 0, 0, 0, 0].tolist() == [mark, -mark]
        assert len(layers) == cache.parts[name].shape[1]


@pytest.mark.parametrize("starts", [[3], [0, 3], [3, 3]])
def test_a_window_past_the_end_is_refused(small_model, starts):
    model = small_model(0)
    cache = KVCache(model.config, len(starts), length=5, num_steps=2)
    rope = model.rope(torch.arange(5))
    assert cache.window(starts, 2, rope).end == 5
    with pytest.raises(ValueError, match="position 5 is outside the cache, which was allocated for 5 tokens"):
        cache.window(starts, 3, rope)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"kv": "half"}, "kv is 'half'; it must be 'full' or 'shared'"),
        ({"kv_slots": 0}, "kv_slots is 0; it must be from 1 to num_steps, here 3"),
        ({"kv_slots": 4}, "kv_slots is 4; it must be from 1 to num_steps, here 3"),
        ({"kv_slots": 2}, "kv_slots is 2, which has no effect with kv 'full'"),
        ({"length": 2**40}, "length is 1099511627776; it must be a whole number from 1 to"),
        ({"length": 2**31 - 1, "batch": 2**31 - 1}, "not enough memory"),
        ({"dtype": torch.int64}, "dtype is torch.int64; it must be a floating-point dtype"),
    ],
)
def test_bad_arguments_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        KVCache(CONFIG, **{"batch": 1, "length": 4, "num_steps": 3} | wrong)


def test_copy_deeper_repeats_the_last_step_that_ran():
    cache = KVCache(CONFIG, batch=2, length=6, num_steps=4)
    cache.parts["core"].normal_(generator=torch.Generator().manual_seed(0))
    before = cache.parts["core"].flip(2)  # by step
    cache.copy_deeper(row=1, start=2, depths=[1, 4, 3])  # positions 2, 3, 4; 3 ran all steps
    right = before.clone()
    right[:, :, 1:, 1, :, 2] = before[:, :, :1, 1, :, 2]
    right[:, :, 3, 1, :, 4] = before[:, :, 2, 1, :, 4]
    assert torch.equal(cache.parts["core"].flip(2), right)
    cache.copy_deeper(row=0, start=0, depths=[7])  # deeper than the slots: nothing to fill
    assert torch.equal(cache.parts["core"].flip(2), right)


def test_shared_slots_need_a_copy_only_if_fewer_steps_ran_than_there_are_slots():
    cache = KVCache(CONFIG, batch=1, length=4, num_steps=4, kv="shared", kv_slots=2)
    cache.parts["core"].normal_(generator=torch.Generator().manual_seed(0))
    before = cache.parts["core"].flip(2)  # by slot
    cache.copy_deeper(row=0, start=0, depths=[2, 4, 1])
    right = before.clone()
    right[:, :, 1, 0, :, 2] = before[:, :, 0, 0, :, 2]
    assert torch.equal(cache.parts["core"].flip(2), right)


@pytest.mark.parametrize("starts", [[2, 2], [1, 3]])
def test_read_and_write_are_each_others_inverse(small_model, starts):
    model = small_model(0)
    at = KVCache(model.config, 2, length=7, num_steps=2).window(starts, 3, model.rope(torch.arange(7)))
    grid = torch.zeros(2, 7, 4, dtype=torch.long)
    values = torch.arange(1, 25).view(2, 3, 4)
    at.write(grid, values)
    assert torch.equal(at.read(grid), values)
    for row, start in enumerate(starts):
        assert torch.equal(grid[row, start : start + 3], values[row])
    assert (grid != 0).sum() == 24, "nothing else was written"


@given(st.integers(0, 3), st.data())
def test_cells_read_as_views_are_the_cells_that_are_gathered(small_model, seed, data):
    """Rows with windows of their own, waves and positions of one depth: the same states, the same keys and values."""
    model, rows, positions, depths = small_model(seed, n_layers_in_recurrent_block=2), [], [], []
    for row in range(3):
        width, start = data.draw(st.integers(0 if row else 1, 4)), data.draw(st.integers(0, 5))
        own = data.draw(st.lists(st.integers(0, 4), min_size=width, max_size=width))
        rows += [row] * width
        positions += range(start, start + width)
        depths += sorted(own, reverse=True)
    results = []
    for views, copied in ((True, kv_cache.COPIED), (True, 0), (False, 0)):  # with 0, single cells too are read as views
        grid = Grid(model, [[1] * 4, [2] * 6, [3] * 9], max_new_tokens=2, num_steps=5)
        for part in grid.cache.parts.values():
            part.normal_(generator=torch.Generator().manual_seed(1))
        at = grid.cells(rows, positions)
        depth = at.depths(depths) if views else torch.tensor(depths)[:, None]
        with mock.patch.object(kv_cache, "COPIED", copied):
            s = grid.recur(at.read(grid.state), grid.embed(at), at, depth)
            logits = grid.decode(s, at)
        results.append((s, logits, *(part.clone() for part in grid.cache.parts.values())))
    for read in results[:-1]:
        torch.testing.assert_close(read, results[-1])
