"""Checkpoints in the Hugging Face layout, read and written without transformers and without pickle.

    config.json               shape of the network, in the keys of the published Huginn checkpoints
    generation_config.json    stop tokens and decoding defaults (optional)
    tokenizer.json            see minirec.tokenizer (optional)
    model.safetensors         all weights, or shards model-00001-of-0000N.safetensors with
    model.safetensors.index.json   which says in which shard each tensor lies

A model is built on the meta device and filled tensor by tensor, so the weights exist once, in the number format
and on the device asked for.  Everything is checked against the architecture; a checkpoint that does not fit is one
error that names file and tensor, and no model.  Notebook: 10_full_scale.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minirec.config import RecurrentConfig
from minirec.recurrent_block import RecurrentDepthLM

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHIPPED = ("tiny",)
# what else of the family's config keys there is, and the only value that this architecture has
ARCHITECTURE = {
    "model_type": "huginn_raven",
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "bias": False,
}
STATED = {
    "state_init": "like-init",
    "init_strategy": "takase",
    "sampling_scheme": "poisson-lognormal-filling",
    "init_orthogonal": False,
    "activation_checkpoint_impl": "per-iteration",
    "padding_multiple": 64,
}


def load(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> RecurrentDepthLM:
    """Load a model: `"tiny"` (shipped with minirec), a folder, or the id of a repository on the Hugging Face hub.

    dtype None keeps the number format of the file.  revision: branch, tag or commit of a hub repository.  A hub
    repository is downloaded once and kept by huggingface_hub, whose environment variables (HF_HUB_OFFLINE,
    HF_HOME) hold.  Raises FileNotFoundError for a folder or file that is not there, ValueError for one that is not
    what it should be; both name it.
    """
    folder = locate(name, revision)
    config = read_config(folder)
    with torch.device("meta"):
        model = RecurrentDepthLM(config)
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}  # a tied head is not among them
    where = _shards(folder, expected, ignored={"freqs_cis"} | ({"lm_head.weight"} if config.tie_embeddings else set()))
    tensors = {}
    for file in sorted(set(where.values())):
        with opened(file) as f:
            for tensor in (t for t, path in where.items() if path == file):
                shape = tuple(f.get_slice(tensor).get_shape())
                if shape != expected[tensor]:
                    raise ValueError(
                        f"{file}: tensor {tensor} has shape {shape}; config.json asks for {expected[tensor]}"
                    )
                value = f.get_tensor(tensor)
                if not value.is_floating_point():
                    raise ValueError(f"{file}: tensor {tensor} is {value.dtype}; minirec needs floating point")
                tensors[tensor] = value.to(device=device, dtype=dtype)
    for tensor, value in tensors.items():
        module, _, leaf = tensor.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(value))
    if config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    generation = folder / "generation_config.json"
    if generation.exists():
        model.generation_config = _read_json(generation)
    return model.eval()


def save(model: RecurrentDepthLM, folder: str | Path, *, max_shard_size: str = "5GB") -> None:
    """Write config, weights and generation config to a folder, so that `load` and the official class read them.

    Each file is written whole or not at all.  A tied head is stored once.  Weights above `max_shard_size` are
    split into shards with an index.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        write_whole(
            folder / file,
            lambda p, n=names: save_file({k: tensors[k] for k in n}, p, metadata={"format": "pt"}),
        )
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    # the index first: without it the new single file counts, whatever is left of the old shards
    for stale in [folder / INDEX, folder / WEIGHTS, *folder.glob("model-?????-of-?????.safetensors")]:
        if stale.name not in split.filename_to_tensors and not (stale.name == INDEX and split.is_sharded):
            stale.unlink(missing_ok=True)
    _write_json(folder / "config.json", official_config(model.config, model.dtype))
    if model.generation_config:
        _write_json(folder / "generation_config.json", model.generation_config)
    else:
        (folder / "generation_config.json").unlink(missing_ok=True)


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


def read_config(folder: Path) -> RecurrentConfig:
    """Read config.json; a ValueError says what was found where it is of another architecture."""
    path = folder / "config.json"
    values = _read_json(path)
    if values.get("model_type") != ARCHITECTURE["model_type"]:
        raise ValueError(
            f"{path}: model_type is {values.get('model_type')!r}; minirec loads {ARCHITECTURE['model_type']!r} "
            "(Huginn-0125 and models of its architecture)"
        )
    for key, value in ARCHITECTURE.items():
        if values.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {values[key]!r}; minirec supports {value!r}")
    try:
        return RecurrentConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: shipped, on disk, or downloaded from the hub."""
    if str(name) in SHIPPED:
        return Path(str(resources.files("minirec") / "assets" / str(name)))
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; a checkpoint is a folder with config.json and safetensors files")
    if len(path.parts) != 2 or path.is_absolute() or str(name).startswith("."):
        raise FileNotFoundError(f"no checkpoint {str(name)!r}: not {' or '.join(map(repr, SHIPPED))}, no such folder")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors"]  # no pickles, no code
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"no folder {str(name)!r} here, and the hub did not give it: {reason}") from None


def _shards(folder: Path, expected: dict, ignored: set[str]) -> dict[str, Path]:
    """Which file holds each expected tensor; an error for one that is missing, and for one too many."""
    index = folder / INDEX
    if index.exists():
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise ValueError(f"{index} has no weight_map")
        for file in listed.values():
            if Path(str(file)).name != file or not file.endswith(".safetensors"):  # "../elsewhere", "/elsewhere"
                raise ValueError(f"{index} names {file!r}; a shard is a file in the folder of the index")
        files = sorted({folder / file for file in listed.values()})
    else:
        files = [folder / WEIGHTS]
        if not files[0].exists():
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
            hint = f"; {pickles[0]} is a pickle, which minirec does not open" if pickles else ""
            raise FileNotFoundError(f"{folder} has no {WEIGHTS} and no {INDEX}{hint}")
    where: dict[str, Path] = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{index} names {file.name}, which is not in {folder}")
        with opened(file) as f:
            where |= dict.fromkeys(f.keys(), file)
    if index.exists():
        for tensor, file in listed.items():
            if where.get(tensor) != folder / file:
                raise ValueError(f"{index} says that {tensor} is in {file}, where it is not")
    named = index if index.exists() else files[0]
    if missing := sorted(expected.keys() - where.keys()):
        raise ValueError(f"{named}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)")
    if extra := sorted(where.keys() - expected.keys() - ignored):
        raise ValueError(f"{named}: tensor {extra[0]} is not of this architecture ({len(extra)} are not)")
    return {tensor: where[tensor] for tensor in expected}


@contextmanager
def opened(file: Path) -> Iterator:
    """A safetensors file to read from; one that is broken or foreign is a ValueError that names it."""
    try:
        with safe_open(file, "pt") as f:
            yield f
    except (SafetensorError, OSError) as error:  # an OSError of safetensors does not name the file
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must be an object")
    return values


def _write_json(path: Path, values: dict) -> None:
    write_whole(path, lambda p: Path(p).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n"))


def write_whole(path: Path, write) -> None:
    """Write a file beside its place and move it there, so that it is never there in part."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        write(part)
        os.chmod(part, 0o644)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)
