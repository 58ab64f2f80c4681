"""Every family is loaded from its published layout and saved to it, and what is not supported is refused by name."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minirec import RecurrentConfig, RecurrentDepthLM, autoregressive
from minirec.families import MODELS, NanbeigeConfig, OuroConfig, ParcaeConfig, RavenConfig
from minirec.families.presets import PRESETS, preset
from minirec.files import checkpoint, convert
from minirec.tools.cli import main

PUBLISHED = ["raven_llama", "raven_olmo", "parcae", "ouro", "nanbeige"]
# what a save leaves out of a golden file: the head that is the embedding, and the table of rotations
TWICE = {"parcae": {"lm_head.weight", "freqs_cis"}}

pytestmark = pytest.mark.filterwarnings("ignore:.*left over from Huginn:UserWarning")


@pytest.fixture
def published(golden_folder, tmp_path):
    """`published("ouro", num_hidden_layers=4)`: a copy of a golden checkpoint, with changes to its config.json."""

    def copy(name: str, **changes) -> Path:
        folder = tmp_path / name
        shutil.copytree(golden_folder / "families" / name / "model", folder, dirs_exist_ok=True)
        edit(folder, **changes)
        return folder

    return copy


def edit(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))


def refused(folder: Path, *words: str) -> None:
    """Refused by the loader and by `info`, in one line with these words, before a weight is read."""
    with pytest.raises(ValueError) as caught:
        RecurrentDepthLM.from_pretrained(folder)
    assert all(word in str(caught.value) for word in words), caught.value
    assert main(["info", str(folder)]) == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_save_is_what_was_loaded(published, tmp_path, name):
    folder = published(name)
    model = RecurrentDepthLM.from_pretrained(folder)
    assert type(model) is MODELS[type(model.config)] is not RecurrentDepthLM
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    again = RecurrentDepthLM.from_pretrained(tmp_path / "saved")
    assert again.config == model.config and type(again) is type(model)
    theirs, ours = load_file(folder / "model.safetensors"), {}
    for file in sorted((tmp_path / "saved").glob("*.safetensors")):
        ours |= load_file(file)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert ours.keys() == theirs.keys() - TWICE.get(name, set())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # every key of the published config is written, with its value, but for what is not the model's
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "saved"))
    left = {"name", "hf_config", "transformers_version", "block_size", "effective_expected_depth", "init_values"}
    left |= (
        {"bos_token_id", "eos_token_id", "pad_token_id"} if name == "raven_llama" else set()
    )  # outside the vocabulary
    assert {key: new.get(key) for key in old.keys() - left} == {key: old[key] for key in old.keys() - left}


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_formats_and_the_command_line(published, tmp_path, name, capsys):
    model = RecurrentDepthLM.from_pretrained(published(name), dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    assert len(autoregressive.generate(model, [3, 1, 4], 3, stop_tokens=()).tokens) == 3
    assert main(["info", str(published(name))]) == 0
    assert f"{sum(p.numel() for p in model.parameters()):,}" in capsys.readouterr().out


def test_who_a_huginn_raven_is(published, golden_folder, small_model, tmp_path):
    """Three families share the model_type: the tensors tell, and before they are there the name of the code."""
    kinds = {"raven_llama": (RavenConfig, False), "raven_olmo": (RavenConfig, True)}
    for name, (config, olmo) in kinds.items():
        read = checkpoint.read_config(published(name, auto_map="absent"))
        assert type(read) is config and read.olmo is olmo
        folder = published(name)
        (folder / "model.safetensors").unlink()
        read = checkpoint.read_config(folder)
        assert type(read) is config and read.olmo is olmo
    assert type(checkpoint.read_config(golden_folder / "model")) is RecurrentConfig
    small_model(dtype=torch.float32).save_pretrained(tmp_path / "huginn")
    (tmp_path / "huginn" / "model.safetensors").unlink()
    assert type(checkpoint.read_config(tmp_path / "huginn")) is RecurrentConfig


def test_left_over_token_ids_are_dropped_with_a_warning(published):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = checkpoint.read_config(published("raven_llama"))
    (warning,) = caught
    assert "eos_token_id 65505" in str(warning.message) and "vocabulary of 160" in str(warning.message)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    refused(published("raven_llama", eos_token_id=-1), "eos_token_id is -1")
    refused(published("raven_olmo", eos_token_id="2"), "eos_token_id is '2'")
    assert checkpoint.read_config(published("ouro", eos_token_id=[2, 0])).eos_token_id == 2


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("nanbeige", {"enable_double_loop_split": True}, "enable_double_loop_split is True; minirec supports False"),
        ("nanbeige", {"loop_share_kv": True}, "loop_share_kv is True; minirec supports False"),
        ("nanbeige", {"enable_depth_attention": True}, "enable_depth_attention is True; minirec supports False"),
        ("nanbeige", {"enable_something_new": True}, "enable_something_new is True; minirec supports False"),
        ("nanbeige", {"ngram_embedding_size": 3}, "ngram_embedding_size is 3"),
        ("nanbeige", {"num_hyper_connections": 2}, "num_hyper_connections is 2"),
        ("nanbeige", {"num_loops": 0}, "num_loops is 0; it must be a whole number from 1"),
        ("nanbeige", {"loop_loss_weights": 3}, "loop_loss_weights is 3; it must be a list"),
        ("nanbeige", {"attention_bias": True}, "attention_bias is True; minirec supports False"),
        ("ouro", {"use_sliding_window": True}, "use_sliding_window is True; minirec supports False"),
        ("ouro", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ("ouro", {"early_exit_step": 1}, "early_exit_step is 1; minirec supports None"),
        ("ouro", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; minirec supports 'silu'"),
        ("ouro", {"total_ut_steps": "absent"}, "total_ut_steps is missing; it must be a whole number"),
        ("ouro", {"rope_theta": "absent"}, "rope_theta is missing"),
        ("ouro", {"hidden_size": None}, "hidden_size is None"),
        ("ouro", {"head_dim": 23}, "head_dim is 23"),
        ("ouro", {"num_key_value_heads": 3}, "n_kv_heads 3"),
        ("ouro", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "must be None or of type 'llama3'"),
        ("ouro", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling's low_freq_factor is None"),
        ("parcae", {"injection_type": "linear"}, "injection_type is 'linear'; minirec supports 'diagonal'"),
        ("parcae", {"injection_type": "add"}, "injection_type is 'add'; minirec supports 'diagonal'"),
        ("parcae", {"n_layers_in_coda": 3}, "Parcae needs even layer counts"),
        ("parcae", {"qk_norm": False}, "qk_norm is False; minirec supports True"),
        ("parcae", {"prelude_norm": False}, "prelude_norm is False; minirec supports True"),
        ("parcae", {"state_init": "normal"}, "state_init is 'normal'; minirec supports 'like-init'"),
        ("parcae", {"nonlin_name": "SiLU"}, "nonlin_name is 'SiLU'; minirec supports 'ReLU2'"),
        ("parcae", {"logit_softcap": 30.0}, "logit_softcap is 30.0; minirec supports None"),
        ("parcae", {"num_key_value_heads": 2}, "num_key_value_heads is 2; minirec supports num_attention_heads, 4"),
        ("parcae", {"recurrent_embedding_dimension": 32}, "recurrent_embedding_dimension is 32"),
        ("parcae", {"rope_settings": {"use_rope": False}}, "rope_settings.use_rope is False"),
        ("parcae", {"rope_settings": {"rope_condense_ratio": 2}}, "rope_settings.rope_condense_ratio is 2"),
        ("parcae", {"rope_settings": 5}, "rope_settings is 5; it must be an object"),
        ("raven_llama", {"init_values": {"embed_scale": 8.0}}, "init_values.embed_scale is 8.0"),
        ("raven_llama", {"head_dim": 8}, "head_dim is 8; with Llama's blocks it must be n_embd / n_heads, 16"),
        ("raven_llama", {"qk_bias": True}, "qk_bias is True; minirec supports False"),
        ("raven_llama", {"test_time_noise": 0.5}, "test_time_noise is 0.5; minirec supports 0"),
        ("raven_llama", {"init_values": 3}, "init_values is 3; it must be an object"),
        ("raven_olmo", {"initial_state_mode": "zeros"}, "initial_state_mode is 'zeros'"),
    ],
)
def test_what_is_not_supported_is_refused(published, name, change, words):
    refused(published(name, **change), str(Path(name) / "config.json"), words)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model_type": "dory"}, "Dory is a looped family that minirec cannot run; it lacks its normalised blocks"),
        ({"model_type": "hrm_text"}, "HRM-Text is a looped family that minirec cannot run; it lacks its two stacks"),
        ({"model_type": "inkling2_loop"}, "Inkling-2 is a looped family that minirec cannot run; it lacks its mixture"),
        ({"model_type": "iquestloopcoder"}, "IQuest-Coder-Loop is a looped family that minirec cannot run"),
        ({"model_type": "mixture_of_recursions"}, "Mixture-of-Recursions is a looped family that minirec cannot run"),
        ({"model_type": "new", "loop_num": 3}, "by its loop_num this is a looped model of a family that minirec lacks"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; it holds 38 tensors"),
        ({"model_type": 3}, "model_type is 3; it holds"),
        ({"model_type": "absent", "_class_name": "OtherConfig"}, "model_type is None"),
    ],
)
def test_other_families_are_named_and_refused(published, values, words):
    folder = published("ouro", total_ut_steps="absent", **values)
    refused(folder, words, "minirec loads 'huginn_raven'", "'ouro', 'nanbeige'")


def test_a_tensor_that_does_not_fit_is_named(published):
    for name, lost in (("ouro", "model.early_exit_gate.bias"), ("parcae", "value_embeds.3.weight")):
        folder = published(name)
        tensors = load_file(folder / "model.safetensors")
        save_file({key: t for key, t in tensors.items() if key != lost}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"tensor {lost} is missing"):
            RecurrentDepthLM.from_pretrained(folder)
    folder = published("parcae")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] * 2}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight differs from transformer.wte.weight"):
        RecurrentDepthLM.from_pretrained(folder)


@pytest.mark.parametrize("config", [
    RavenConfig(n_embd=48, n_heads=4, n_kv_heads=2, head_dim=12, intermediate_size=16, vocab_size=300),
    RavenConfig(n_embd=48, n_heads=4, n_kv_heads=2, head_dim=6, intermediate_size=16, vocab_size=300, olmo=True),
    ParcaeConfig(n_embd=48, n_heads=2, intermediate_size=16, vocab_size=300),
    OuroConfig(n_embd=48, n_heads=4, n_kv_heads=2, head_dim=6, intermediate_size=16, vocab_size=300),
    NanbeigeConfig(n_embd=48, n_heads=4, n_kv_heads=1, head_dim=6, intermediate_size=16, vocab_size=300,
                   skip_loop_final_norm=True),
])  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_a_made_checkpoint_of_every_family(config, tied, tmp_path):
    config = dataclasses.replace(config, tie_embeddings=tied, mean_recurrence=3, block_size=64)
    checkpoint.make_random(config, tmp_path / "made", shards=2, seed=4)
    model = RecurrentDepthLM.from_pretrained(tmp_path / "made")
    assert model.config == config and (model.lm_head.weight is model.embedding.weight) == tied
    assert model(torch.tensor([[3, 1, 4]])).logits.std() > 0
    assert "random" in json.loads((tmp_path / "made" / "config.json").read_text())["weights"]


@pytest.mark.parametrize("name", PRESETS)
def test_info_knows_every_preset(name, capsys):
    assert main(["info", "--preset", name]) == 0
    assert str(preset(name).n_embd) in capsys.readouterr().out


# --- pickles ---


def pickled(folder: Path, rename=lambda name: name, wrap=lambda tensors: tensors, file: str = "model.pt") -> Path:
    tensors = load_file(folder / "model.safetensors")
    torch.save(wrap({rename(name): tensor for name, tensor in tensors.items()}), folder / file)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    "rename, wrap",
    [
        (lambda n: n, lambda t: t),
        (lambda n: f"module._orig_mod.{n}", lambda t: t),
        (lambda n: f"model.{n}", lambda t: {"model": t, "step": 3}),
        (lambda n: n, lambda t: {"state_dict": t}),
    ],
)
def test_a_pickle_is_converted(published, golden_folder, tmp_path, rename, wrap, capsys):
    folder = pickled(published("parcae"), rename, wrap)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"model.pt is a pickle; `minirec convert` rewrites it as safetensors"):
        RecurrentDepthLM.from_pretrained(folder)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    right = RecurrentDepthLM.from_pretrained(golden_folder / "families" / "parcae" / "model")
    made = RecurrentDepthLM.from_pretrained(tmp_path / "out")
    assert made.config == right.config
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), right.parameters(), strict=True))
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2, "not onto what is there"


def test_names_that_begin_like_a_wrapper_are_kept(published, tmp_path):
    """Ouro's own names begin with model."""
    convert.convert(pickled(published("ouro"), file="pytorch_model.bin") / "pytorch_model.bin", tmp_path / "out")
    assert RecurrentDepthLM.from_pretrained(tmp_path / "out").config.mean_recurrence == 4


class Harmful:
    def __reduce__(self):
        return print, ("code of the pickle has run",)


@pytest.mark.parametrize(
    "wrap, words",
    [
        (lambda t: t | {"other": Harmful()}, "holds no weights that can be read safely"),
        (lambda t: list(t.values()), "holds something else than tensors by name"),
        (lambda t: t | {"more.weight": torch.ones(2)}, "tensor more.weight is not of this architecture"),
        (lambda t: {n: x for n, x in t.items() if "ln_f" not in n}, "tensor transformer.ln_f.weight is missing"),
        (lambda t: {n: x[:3] for n, x in t.items()}, "config.json asks for"),
        (lambda t: t | {"lm_head.weight": t["lm_head.weight"] * 2}, "lm_head.weight differs"),
    ],
)
def test_a_pickle_that_does_not_fit_is_refused_and_nothing_is_written(published, tmp_path, wrap, words, capsys):
    folder = pickled(published("parcae"), wrap=wrap)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and "code of the pickle" not in shown.out
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_is_not_there(published, tmp_path):
    folder = published("parcae")
    for source, words in ((folder, "no pytorch_model.bin and no model.pt"), (folder / "other.pt", "no file")):
        with pytest.raises(FileNotFoundError, match=words):
            convert.convert(source, tmp_path / "out")
