"""Huginn's layout: what its config.json says, and how its tensors are called."""

from __future__ import annotations

import math

import torch

from minirec.config import RecurrentConfig
from minirec.files.json_files import Count, Flag, Number, OneOf, OrList, OrNull, check_fields
from minirec.files.machine import one_line

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
DERIVED = {"freqs_cis"}  # the cosines and sines of the positions: in published files, and not needed

# what else of the family's config keys there is, and the only value that this architecture has
ARCHITECTURE = {
    "model_type": "huginn_raven",
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "state_init": "like-init",
    "bias": False,
}
STATED = {
    "init_strategy": "takase",
    "sampling_scheme": "poisson-lognormal-filling",
    "init_orthogonal": False,
    "activation_checkpoint_impl": "per-iteration",
    "padding_multiple": 64,
}
# Our fields of config.json.  No published model comes near the upper bounds; above them a file is broken or hostile.
FIELDS = {
    "n_embd": Count(1, 2**17),
    "n_heads": Count(1, 2**12),
    "intermediate_size": Count(1, 2**20),
    "vocab_size": Count(1, 2**24),
    "padded_vocab_size": OrNull(Count(1, 2**24)),
    "block_size": Count(1, 2**26),
    "n_layers_in_prelude": Count(1, 512),
    "n_layers_in_recurrent_block": Count(1, 512),
    "n_layers_in_coda": Count(1, 512),
    "mean_recurrence": Count(1, 2**16),
    "mean_backprop_depth": Count(1, 2**16),
    "rope_base": Number(1, 1e12),
    "norm_eps": Number(1e-30, 1),
    "qk_bias": Flag(),
    "tie_embeddings": Flag(),
}
# What minirec reads of generation_config.json beside the token ids: defaults of its samplers.
SAMPLERS: dict[str, dict] = {
    "diffusion_forcing": {
        "inner_steps": Count(1, 2**16),
        "exit_threshold": Number(0, 1e30),
        "kv": OneOf(("full", "shared")),
    },
    "lossless_wavefront": {"guess_after": Count(1, 2**16)},
}


def config_of(values: dict) -> RecurrentConfig:
    """The config that config.json describes; ValueError naming the key if it is none, or of another architecture.

    Of several eos_token_id the config has the first; `stop_tokens_of` gives all of them.
    """
    for key, value in ARCHITECTURE.items():
        if values.get(key, value) != value:
            raise ValueError(f"{key} is {one_line(repr(values[key]))}; minirec supports {value!r}")
    check_fields(values, FIELDS)
    check_fields(values, token_fields(values))
    config = RecurrentConfig.from_dict(values | {"eos_token_id": next(iter(stop_tokens_of(values)), None)})
    scales = values.get("init_values")
    for key, value in {"std": config.init_std, "embed_scale": math.sqrt(config.n_embd)}.items():
        said = scales.get(key, value) if isinstance(scales, dict) else value
        if type(said) not in (int, float) or not math.isclose(said, value, rel_tol=1e-4):
            raise ValueError(f"init_values.{key} is {one_line(repr(said))}; minirec supports {value}, by n_embd")
    return config


def stop_tokens_of(values: dict) -> list[int]:
    """The eos_token_id of config.json as a list: a number, several or none."""
    ids = values.get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def generation_of(values: dict, config: RecurrentConfig) -> dict:
    """What generation_config.json says, without samplers' settings that are null; ValueError naming the key."""
    check_fields(values, token_fields(config.to_dict()))
    kept = dict(values)
    for sampler, fields in SAMPLERS.items():
        settings = values.get(sampler)
        if settings is None:
            kept.pop(sampler, None)
            continue
        if not isinstance(settings, dict):
            raise ValueError(f"{sampler} is {one_line(repr(settings))}; it must be an object or null")
        kept[sampler] = {name: value for name, value in settings.items() if value is not None}
        check_fields(kept[sampler], fields, f"{sampler}.")
    return kept


def token_fields(values: dict) -> dict:
    """The fields of the token ids of a vocabulary."""
    rows = values.get("padded_vocab_size") or values.get("vocab_size") or RecurrentConfig.vocab_size
    one = Count(0, rows - 1)
    return {"bos_token_id": OrNull(one), "pad_token_id": OrNull(one), "eos_token_id": OrList(one)}


def official_config(config: RecurrentConfig, dtype: torch.dtype) -> dict:
    """The config.json that the official class needs: our fields, its constants, and what it derives from them."""
    std, d, depth = config.init_std, config.n_embd, config.effective_depth
    derived = {
        "architectures": ["RavenForCausalLM"],
        "auto_map": {
            "AutoConfig": "raven_config_minimal.RavenConfig",
            "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "head_dim": config.head_dim,
        "num_key_value_heads": config.n_heads,
        "num_attention_heads": config.n_heads,
        "n_layers": config.n_layers_in_prelude + config.n_layers_in_recurrent_block + config.n_layers_in_coda,
        "effective_expected_depth": depth,
        "init_values": {
            "std": std,
            "embedding": std,
            "out_proj": (5 * d * depth) ** -0.5,
            "embed_scale": d**0.5,
        },
        "test_time_noise": 0,
        "test_time_noise_type": "fixed",
    }
    return config.to_dict() | ARCHITECTURE | STATED | derived
