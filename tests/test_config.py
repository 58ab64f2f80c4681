"""The numbers that describe a model: presets, derived sizes, and what is refused."""

import math

import pytest

from minirec import RecurrentConfig


def test_huginn_preset_is_the_published_shape():
    config = RecurrentConfig.preset("huginn_3_5b")
    assert (config.n_embd, config.n_heads, config.head_dim, config.intermediate_size) == (5280, 55, 96, 17920)
    assert (config.n_layers_in_prelude, config.n_layers_in_recurrent_block, config.n_layers_in_coda) == (2, 4, 2)
    assert (config.vocab_size, config.block_size, config.mean_recurrence) == (65536, 4096, 32)
    assert config.effective_depth == 2 + 4 * 32 + 2
    assert config.init_std == pytest.approx(math.sqrt(2 / (5 * 5280)))


def test_tiny_preset_loops_one_block_and_learns_through_all_its_steps():
    config = RecurrentConfig.preset("tiny")
    assert (config.n_embd, config.n_heads, config.head_dim, config.intermediate_size) == (96, 3, 32, 264)
    assert (config.n_layers_in_prelude, config.n_layers_in_recurrent_block, config.n_layers_in_coda) == (1, 1, 1)
    assert (config.mean_recurrence, config.mean_backprop_depth) == (12, 16)
    assert config.effective_depth == 1 + 12 + 1
    assert (config.vocab_size, config.block_size) == (128, 512)


@pytest.mark.parametrize("name", ["tiny", "small", "huginn_3_5b"])
def test_dictionary_and_back(name):
    config = RecurrentConfig.preset(name)
    assert RecurrentConfig.from_dict(config.to_dict()) == config


def test_keys_of_others_are_ignored():
    assert RecurrentConfig.from_dict({"n_embd": 64, "n_heads": 4, "model_type": "x"}).n_embd == 64


def test_padded_vocabulary_is_the_vocabulary_unless_given():
    assert RecurrentConfig(vocab_size=100).padded_vocab_size == 100
    assert RecurrentConfig(vocab_size=100, padded_vocab_size=128).padded_vocab_size == 128


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"n_embd": 0}, "n_embd is 0"),
        ({"n_heads": -1}, "n_heads is -1"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"mean_recurrence": 0}, "mean_recurrence is 0"),
        ({"mean_backprop_depth": 0}, "mean_backprop_depth is 0"),
        ({"n_layers_in_prelude": 0}, "n_layers_in_prelude is 0"),
        ({"n_layers_in_recurrent_block": 0}, "n_layers_in_recurrent_block is 0"),
        ({"n_layers_in_coda": 0}, "n_layers_in_coda is 0"),
        ({"n_embd": 64, "n_heads": 5}, "n_embd 64 with n_heads 5"),
        ({"n_embd": 15, "n_heads": 5}, "n_embd 15 with n_heads 5"),  # rotary positions need pairs of channels
        ({"vocab_size": 100, "padded_vocab_size": 64}, "padded_vocab_size is 64"),
        ({"n_embd": 64.0}, "n_embd is 64.0; it must be a whole number from 1 to 262144"),
        ({"vocab_size": 9, "pad_token_id": 9}, "pad_token_id is 9; it must be a whole number from 0 to 8"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"norm_eps": -1e-6}, "norm_eps is -1e-06; it must be a number, above 0 and at most 1"),
        ({"rope_base": "big"}, "rope_base is 'big'; it must be a number, at least 1 and at most"),
        ({"norm_eps": math.inf}, "norm_eps is inf; it must be a number, above 0 and at most 1"),
        ({"norm_eps": 1e-46}, "norm_eps is 1e-46; it must be a number, above 0"),
        ({"norm_eps": 1e-39}, "norm_eps is 1e-39; it must be a finite number that float32 can hold"),
        ({"n_heads": True}, "n_heads is True; it must be a whole number"),
        ({"eos_token_id": True}, "eos_token_id is True; it must be a whole number"),
        ({"qk_bias": "false"}, "qk_bias is 'false'; it must be True or False"),
        ({"n_layers_in_coda": 10**7}, "n_layers_in_coda is 10000000; it must be a whole number from 1 to 4096"),
        ({"block_size": 10**5000}, "block_size is <int>; it must be a whole number from 1 to"),
    ],
)
def test_wrong_value_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        RecurrentConfig(**wrong)


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"preset is 'huge'; it must be one of 'tiny', 'small', 'huginn_3_5b'"):
        RecurrentConfig.preset("huge")
