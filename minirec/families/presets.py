"""The shapes of published models, by name; `preset` has those of Huginn and the shipped model too.

Sources: the papers and model cards that docs/families.md lists; Raven's are those of the models that it retrofits.
Token ids are left out where they were not seen published.
"""

from __future__ import annotations

from dataclasses import replace

from minirec import config
from minirec.config import RecurrentConfig, one_of
from minirec.families.nanbeige import NanbeigeConfig
from minirec.families.ouro import OuroConfig
from minirec.families.parcae import ParcaeConfig
from minirec.families.raven import RavenConfig


def raven(prelude: int, core: int, coda: int, **sizes) -> RavenConfig:
    """A retrofitted model that was trained at a mean of 32 steps."""
    return RavenConfig(
        n_embd=2048, n_layers_in_prelude=prelude, n_layers_in_recurrent_block=core, n_layers_in_coda=coda,
        mean_recurrence=32, mean_backprop_depth=8, **sizes,
    )  # fmt: skip


def parcae(layers: int, heads: int) -> ParcaeConfig:
    """So many layers in each part; every head is 128 wide."""
    return ParcaeConfig(
        n_embd=128 * heads, n_heads=heads, intermediate_size=512 * heads, vocab_size=32_768, block_size=2048,
        n_layers_in_prelude=layers, n_layers_in_recurrent_block=layers, n_layers_in_coda=layers,
        mean_recurrence=8, mean_backprop_depth=4,
    )  # fmt: skip


def ouro(layers: int) -> OuroConfig:
    """So many layers, looped four times."""
    return OuroConfig(
        n_embd=2048, n_heads=16, n_kv_heads=16, head_dim=128, intermediate_size=5632, vocab_size=49_152,
        block_size=65_536, n_layers_in_recurrent_block=layers, mean_recurrence=4, rope_base=1e6, norm_eps=1e-6,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


LLAMA_3_2 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=8192)  # fmt: skip

FAMILIES: dict[str, RecurrentConfig] = {
    "raven_tinyllama_1_1b": raven(
        4, 8, 4, n_heads=32, n_kv_heads=4, head_dim=64, intermediate_size=5632, vocab_size=32_000, block_size=2048,
        rope_base=1e4, norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    ),
    "raven_llama_3_2_1b": raven(
        4, 6, 4, n_heads=32, n_kv_heads=8, head_dim=64, intermediate_size=8192, vocab_size=128_256, block_size=131_072,
        rope_base=5e5, rope_scaling=LLAMA_3_2, norm_eps=1e-5, bos_token_id=128_000, eos_token_id=128_001,
    ),
    "raven_olmo_2_1b": raven(
        4, 6, 4, n_heads=16, n_kv_heads=16, head_dim=128, intermediate_size=8192, vocab_size=100_352, block_size=4096,
        rope_base=5e5, norm_eps=1e-6, olmo=True, eos_token_id=100_257, pad_token_id=100_277,
    ),
    "parcae_140m": parcae(2, heads=6),
    "parcae_370m": parcae(4, heads=8),
    "parcae_770m": parcae(6, heads=10),
    "parcae_1_3b": parcae(8, heads=12),
    "ouro_1_4b": ouro(24),
    "ouro_2_6b": ouro(48),
    "nanbeige_4_2_3b": NanbeigeConfig(
        n_embd=3072, n_heads=48, n_kv_heads=8, head_dim=128, intermediate_size=10_752, vocab_size=166_144,
        block_size=262_144, n_layers_in_recurrent_block=22, mean_recurrence=2, rope_base=7e7, norm_eps=1e-5,
        eos_token_id=166_101,
    ),
}  # fmt: skip
PRESETS = (*config.PRESETS, *FAMILIES)


def preset(name: str) -> RecurrentConfig:
    """The config of a published or shipped model; ValueError for a name that is not in PRESETS."""
    one_of("preset", name, PRESETS)
    return replace(FAMILIES[name]) if name in FAMILIES else RecurrentConfig.preset(name)
