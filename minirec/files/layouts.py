"""The published layouts of all families: whose config.json it is, what its keys may say, and what a save writes.

`layout_of` recognises a checkpoint by its config, and by its tensors where families share one model_type.  A `Layout`
lists the keys that its family reads, each with what it may hold, and the keys that have one supported value.  A switch
that is on and in neither list is refused too: it would change what the published code computes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from minirec.config import RecurrentConfig
from minirec.families import NanbeigeConfig, OuroConfig, ParcaeConfig, RavenConfig
from minirec.files import huginn
from minirec.files.huginn import FIELDS, stop_tokens_of, token_fields
from minirec.files.json_files import Count, Flag, Number, OneOf, OrNull, check_fields
from minirec.files.machine import one_line


@dataclass(frozen=True)
class Layout:
    """How one family is published.

    fields: keys of config.json -> what they may hold; all but `optional` must be there.  fixed: keys -> the only value
    supported, which is also what an absent key means.  stated: keys that a save writes and loading ignores.  extra:
    config.json -> values that are computed from it; ValueError for what is not supported.  stating: config -> further
    keys for config.json.  embedding: the name of its tensor.  derived: tensors that the config determines.
    """

    name: str
    config: type[RecurrentConfig]
    fields: Mapping
    fixed: Mapping
    stated: Mapping
    extra: Callable[[dict], dict]
    stating: Callable[[RecurrentConfig], dict]
    optional: Collection[str] = ()
    embedding: str = "transformer.wte.weight"
    derived: frozenset[str] = frozenset()

    def config_of(self, values: dict) -> RecurrentConfig:
        """The config that config.json describes; ValueError naming a key that is missing, wrong or not supported."""
        for key, value in self.fixed.items():
            if values.get(key, value) != value:
                raise ValueError(f"{key} is {one_line(repr(values[key]))}; minirec supports {value!r}")
        known = self.fields.keys() | self.fixed.keys() | self.stated.keys()
        for key in sorted(values.keys() - known):
            if key.startswith(("enable_", "use_", "loop_")) and values[key] is True:
                raise ValueError(f"{one_line(key)} is True; minirec supports False")
        for key in self.fields.keys() - self.optional:
            if key not in values:
                raise ValueError(f"{key} is missing; it must be {self.fields[key]}")
        check_fields(values, self.fields)
        values = values | self.extra(values)
        check_fields(values, token_fields(values))
        values["eos_token_id"] = next(iter(stop_tokens_of(values)), None)
        return self.config.from_dict({key: value for key, value in values.items() if value is not None})

    def official_config(self, config: RecurrentConfig, dtype: torch.dtype) -> dict:
        """The config.json that the published code needs: our fields under its keys, its constants, what it derives."""
        ours = config.to_dict()
        names = {key: self.config.KEYS.get(key, key) for key in (*self.fields, *token_fields(ours))}
        read = {key: ours[name] for key, name in names.items() if name in ours}
        form = {"torch_dtype": str(dtype).removeprefix("torch.")}
        return {**self.stated, **self.fixed, **form, **read, **self.stating(config)}


class Huginn(Layout):
    """The layout of `minirec.files.huginn`, in which an absent key has the value of the 3.5B model."""

    def config_of(self, values: dict) -> RecurrentConfig:
        return huginn.config_of(values)

    def official_config(self, config: RecurrentConfig, dtype: torch.dtype) -> dict:
        return huginn.official_config(config, dtype)


def nothing(values) -> dict:
    """No further values."""
    return {}


def part(values: dict, key: str, kind: type):
    """The object or list under a key, an empty one if there is none; ValueError for anything else."""
    found = values.get(key)
    if found is not None and not isinstance(found, kind):
        raise ValueError(f"{key} is {one_line(repr(found))}; it must be {'an object' if kind is dict else 'a list'}")
    return found or kind()


HUGINN = Huginn(
    "Huginn-0125", RecurrentConfig, FIELDS, huginn.ARCHITECTURE, huginn.STATED, nothing, nothing, FIELDS,
    huginn.EMBEDDING, frozenset(huginn.DERIVED),
)  # fmt: skip

SIZE = {key: FIELDS[key] for key in ("n_embd", "intermediate_size", "vocab_size")}
HEADS, POSITIONS, BASE, EPS = FIELDS["n_heads"], FIELDS["block_size"], FIELDS["rope_base"], FIELDS["norm_eps"]
PARTS = {f"n_layers_in_{part}": FIELDS[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda")}
LOOPS = {key: FIELDS[key] for key in ("mean_recurrence", "mean_backprop_depth")}


# --- Raven ---


def read_raven(values: dict) -> dict:
    """Its initial state and head width; token ids left over from Huginn's config are dropped with a warning."""
    scales = part(values, "init_values", dict)
    check_fields(scales, {"std": Number(1e-30, 1e30), "embed_scale": Number(1, 1)}, "init_values.")
    found = {"state_std": scales["std"]} if "std" in scales else {}
    ids = {key: values.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    left = {key: token for key, token in ids.items() if type(token) is int and token >= values["vocab_size"]}
    if left:
        warnings.warn(
            f"{', '.join(f'{key} {token}' for key, token in left.items())}: outside the vocabulary of "
            f"{values['vocab_size']}, left over from Huginn's config, and ignored; give stop_tokens to the samplers",
            stacklevel=2,
        )
    head = values["n_embd"] // values["n_heads"]
    if values.get("head_dim") is None:
        found["head_dim"] = head
    elif not values["olmo"] and values["head_dim"] != head:
        raise ValueError(f"head_dim is {values['head_dim']}; with Llama's blocks it must be n_embd / n_heads, {head}")
    return found | dict.fromkeys(left)


def state_raven(config: RecurrentConfig) -> dict:
    """What the published config derives, and the parts of Huginn's config that it keeps."""
    assert isinstance(config, RavenConfig)
    kind = "olmo" if config.olmo else "llama"
    layers = config.n_layers_in_prelude, config.n_layers_in_recurrent_block, config.n_layers_in_coda
    return {
        "auto_map": {
            "AutoConfig": "raven_config_minimal.RavenConfig",
            "AutoModelForCausalLM": f"raven_modeling_minimal_{kind}.RavenForCausalLM",
        },
        "block_size": config.block_size,
        "effective_expected_depth": config.effective_depth,
        "init_values": {"std": config.state_std, "embedding": config.state_std, "embed_scale": 1.0,
                        "out_proj": config.state_std / math.sqrt(2 * config.effective_depth)},
        "n_layers": sum(layers),
        "rope_scaling": config.rope_scaling,
    }  # fmt: skip


RAVEN = Layout(
    "Raven",
    RavenConfig,
    SIZE | PARTS | LOOPS | {
        "n_heads": HEADS, "padded_vocab_size": OrNull(FIELDS["vocab_size"]), "num_key_value_heads": HEADS,
        "head_dim": OrNull(Count(2, 2**14)), "max_position_embeddings": POSITIONS, "norm_eps": EPS, "rope_theta": BASE,
        "tie_embeddings": Flag(), "initial_state_mode": OneOf(("random", "embed-init", "skip-adapter")),
    },
    {
        "model_type": "huginn_raven", "norm_class_name": "RMSNorm_llama", "mlp_class_name": "GatedMLP",
        "nonlin_name": "SiLU", "injection_type": "linear", "state_init": "like-init", "bias": False, "qk_bias": False,
        "test_time_noise": 0,
    },
    {  # left over from Huginn's config in every published file, and not read by the published model
        "block_class_name": "SandwichBlock", "init_strategy": "takase", "init_orthogonal": False, "rope_base": 5e5,
        "sampling_scheme": "poisson-lognormal-filling", "activation_checkpoint_impl": "per-iteration",
        "architecture_class_name": "RecurrentGPT", "padding_multiple": 4096, "test_time_noise_type": "fixed",
        "architectures": ["RavenForCausalLM"],
    },
    read_raven,
    state_raven,
    {"padded_vocab_size", "head_dim", "initial_state_mode"},
)  # fmt: skip


# --- Parcae ---


def read_parcae(values: dict) -> dict:
    """The base of its rotation; keys that must agree with others are checked."""
    rotation = part(values, "rope_settings", dict)
    check_fields(rotation, {"rope_base": BASE, "rope_condense_ratio": Number(1, 1)}, "rope_settings.")
    if rotation.get("use_rope", True) is not True:
        raise ValueError(f"rope_settings.use_rope is {one_line(repr(rotation['use_rope']))}; minirec supports True")
    same = dict(num_key_value_heads="num_attention_heads", recurrent_num_attention_heads="num_attention_heads",
                recurrent_embedding_dimension="n_embd",
                recurrent_intermediation_embedding_dimension="intermediate_size")  # fmt: skip
    for key, other in same.items():
        if values.get(key) not in (None, values[other]):
            raise ValueError(f"{key} is {one_line(repr(values[key]))}; minirec supports {other}, {values[other]}")
    return {"rope_base": rotation.get("rope_base", 50_000.0)}


def state_parcae(config: RecurrentConfig) -> dict:
    """What the published config says twice."""
    return {
        "num_key_value_heads": config.n_heads,
        "recurrent_embedding_dimension": config.n_embd,
        "recurrent_intermediation_embedding_dimension": config.intermediate_size,
        "recurrent_num_attention_heads": None,
        "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": config.rope_base},
    }


PARCAE = Layout(
    "Parcae",
    ParcaeConfig,
    SIZE | PARTS | LOOPS | {
        "num_attention_heads": HEADS, "padded_vocab_size": OrNull(FIELDS["vocab_size"]), "block_size": POSITIONS,
        "norm_eps": EPS, "tie_embeddings": Flag(),
    },
    {
        "_class_name": "ParcaeConfig", "block_class_name": "TransformerPreNormBlock", "norm_class_name": "RMSNorm",
        "mlp_class_name": "BaseMLP", "nonlin_name": "ReLU2", "bias": False, "qk_bias": False, "qk_norm": True,
        "prelude_norm": True, "injection_type": "diagonal", "state_init": "like-init", "init_strategy": "scaled-zero",
        "logit_softcap": None, "clip_qkv": None, "use_abacus": False, "randomize_positions_from": None,
        "center_attention": False, "debias_attention": False, "mup_model_scaling_factor": 1,
        "model_class_name": "Parcae", "_is_recurrent_block_config": False,
    },
    {
        "padding_multiple": 64, "attn_impl": "flash", "init_orthogonal": True, "skip_initialization": False,
        "use_fused_head": "pytorch", "activation_checkpoint_impl": "per-iteration", "simple_ops": False,
        "strategy": "single", "sampling_scheme": "poisson-truncated-full", "lockstep_n": False, "lockstep_k": False,
        "curriculum_target": "forward", "recurrent_iteration_method": "per-sequence",
    },
    read_parcae,
    state_parcae,
    {"padded_vocab_size"},
    derived=frozenset({"freqs_cis"}),
)  # fmt: skip


# --- Ouro and Nanbeige ---

LLAMA = {
    "hidden_size": SIZE["n_embd"], "intermediate_size": SIZE["intermediate_size"], "vocab_size": SIZE["vocab_size"],
    "num_hidden_layers": PARTS["n_layers_in_recurrent_block"], "num_attention_heads": HEADS,
    "num_key_value_heads": OrNull(HEADS), "head_dim": OrNull(Count(2, 2**14)), "max_position_embeddings": POSITIONS,
    "rms_norm_eps": EPS, "rope_theta": BASE, "tie_word_embeddings": Flag(),
}  # fmt: skip
LLAMA_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
LLAMA_STATED = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
LLAMA_OPTIONAL = {"num_key_value_heads", "head_dim", "tie_word_embeddings"}


def read_llama(values: dict) -> dict:
    """Heads where the config leaves them out: as many of keys as of queries, and n_embd / n_heads wide."""
    heads = values["num_attention_heads"]
    width, kv = values.get("head_dim"), values.get("num_key_value_heads")
    return {
        "head_dim": values["hidden_size"] // heads if width is None else width,
        "num_key_value_heads": heads if kv is None else kv,
    }


def read_ouro(values: dict) -> dict:
    """As for Llama; every layer must attend to everything."""
    for kind in part(values, "layer_types", list):
        if kind != "full_attention":
            raise ValueError(f"layer_types holds {one_line(repr(kind))}; minirec supports 'full_attention'")
    return read_llama(values)


def state_ouro(config: RecurrentConfig) -> dict:
    """What the published config derives."""
    assert isinstance(config, OuroConfig)
    layers = config.n_layers_in_recurrent_block
    return {
        "layer_types": ["full_attention"] * layers,
        "max_window_layers": layers,
        "rope_scaling": config.rope_scaling,
    }


OURO = Layout(
    "Ouro",
    OuroConfig,
    LLAMA | {"total_ut_steps": LOOPS["mean_recurrence"], "early_exit_threshold": Number(-1e30, 1e30)},
    LLAMA_FIXED | {"model_type": "ouro", "use_sliding_window": False, "early_exit_step": None},
    LLAMA_STATED | {
        "architectures": ["OuroForCausalLM"], "sliding_window": None,
        "auto_map": {"AutoConfig": "configuration_ouro.OuroConfig", "AutoModel": "modeling_ouro.OuroModel",
                     "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"},
    },
    read_ouro,
    state_ouro,
    LLAMA_OPTIONAL | {"early_exit_threshold"},
    "model.embed_tokens.weight",
)  # fmt: skip


def read_nanbeige(values: dict) -> dict:
    """As for Llama; weights of the losses say how many loops there are.  N-grams and hyper-connections are refused."""
    for key, value in values.items():
        if any(word in key.lower() for word in ("ngram", "n_gram", "hyper_connection", "mhc")) and value:
            raise ValueError(f"{one_line(key)} is {one_line(repr(value))}; minirec supports none")
    weights = part(values, "loop_loss_weights", list)
    return read_llama(values) | ({"num_loops": len(weights) + 1} if weights else {})


def state_nanbeige(config: RecurrentConfig) -> dict:
    """What the published config leaves empty."""
    assert isinstance(config, NanbeigeConfig)
    return {"loop_loss_weights": [], "rope_scaling": config.rope_scaling}


NANBEIGE = Layout(
    "Nanbeige",
    NanbeigeConfig,
    LLAMA | {"num_loops": LOOPS["mean_recurrence"], "skip_loop_final_norm": Flag()},
    LLAMA_FIXED | {
        "model_type": "nanbeige", "enable_double_loop_split": False, "loop_share_kv": False,
        "enable_depth_attention": False, "pretraining_tp": 1,
    },
    LLAMA_STATED | {
        "architectures": ["NanbeigeForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_nanbeige.NanbeigeConfig",
                     "AutoModelForCausalLM": "modeling_nanbeige.NanbeigeForCausalLM"},
    },
    read_nanbeige,
    state_nanbeige,
    LLAMA_OPTIONAL | {"skip_loop_final_norm"},
    "model.embed_tokens.weight",
)  # fmt: skip

LAYOUTS = {layout.config: layout for layout in (HUGINN, RAVEN, PARCAE, OURO, NANBEIGE)}
BY_TYPE = {"ouro": OURO, "nanbeige": NANBEIGE}
SUPPORTED = (
    "'huginn_raven' (Huginn-0125 and models of its architecture, Raven), 'ouro', 'nanbeige', "
    "and _class_name 'ParcaeConfig'"
)

# Looped families that are not here: model_type -> name and what of it minirec lacks.
MISSING = {
    "dory": ("Dory", "its normalised blocks with learned scales (nGPT) and its sliding windows"),
    "hrm_text": ("HRM-Text", "its two stacks that loop at different rates and its attention gates"),
    "inkling2_loop": ("Inkling-2", "its mixture of experts and its messages between passes"),
    "iquestloopcoder": ("IQuest-Coder-Loop", "its second loop, which mixes attention to the first loop with a window"),
    "mixture_of_recursions": ("Mixture-of-Recursions", "its router, which chooses a depth for each token"),
    "trm": ("TRM", "its two states that are refined in turn"),
    "hrm": ("HRM", "its two stacks that loop at different rates"),
    "openmythos": ("OpenMythos", "its mixture of experts and its low-rank changes for each loop"),
}
LOOPED = ("loop", "recur", "total_ut_steps", "ut_steps", "ponder")  # in a key: whoever has it loops


def layout_of(values: dict, tensors: Collection[str]) -> Layout:
    """The layout of a config.json, given the names of the checkpoint's tensors as far as they can be seen.

    Raises ValueError: which family it is and what minirec lacks of it, or that it is none that minirec knows.
    """
    kind = values.get("model_type")
    if values.get("_class_name") == "ParcaeConfig":
        return PARCAE
    if kind == "huginn_raven":
        return RAVEN if is_raven(values, tensors) else HUGINN
    if isinstance(kind, str) and kind in BY_TYPE:
        return BY_TYPE[kind]
    plain = str(kind).lower().replace("-", "_")
    for name, (family, lacks) in MISSING.items():
        if plain == name or plain.startswith(f"{name}_") or plain.replace("_", "").startswith(name.replace("_", "")):
            raise ValueError(f"model_type is {one_line(repr(kind))}: {family} is a looped family that minirec cannot "
                             f"run; it lacks {lacks}; minirec loads {SUPPORTED}")  # fmt: skip
    looped = sorted(key for key, value in values.items() if any(word in key.lower() for word in LOOPED) and value)
    other = f"; by its {one_line(looped[0])} this is a looped model of a family that minirec lacks" if looped else ""
    raise ValueError(f"model_type is {one_line(repr(kind))}{holds(tensors)}; minirec loads {SUPPORTED}{other}")


def holds(tensors: Collection[str]) -> str:
    """What a checkpoint of something else holds, as a part of a message; nothing if that cannot be seen."""
    first = ", ".join(map(one_line, list(tensors)[:3]))
    return f"; it holds {len(tensors)} tensors: {first}, ..." if tensors else ""


def is_raven(values: dict, tensors: Collection[str]) -> bool:
    """Whether a "huginn_raven" is a Raven and not a Huginn: by tensors, else by its code's name, else by its rotation.

    Sets values["olmo"]: whether a Raven's blocks are OLMo's.
    """
    code = str(values.get("auto_map", ""))
    if tensors:
        values["olmo"] = any("attn.q_norm" in name for name in tensors)
        return not any("norm_3" in name for name in tensors)
    values["olmo"] = "olmo" in code
    return "olmo" in code or "llama" in code or "rope_theta" in values
