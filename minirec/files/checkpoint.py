"""Checkpoints in the Hugging Face layout, read and written without transformers and without pickle.

    config.json               shape of the network, in the keys of the published Huginn checkpoints
    generation_config.json    stop tokens and decoding defaults (optional)
    tokenizer.json            see minirec.files.tokenizer (optional)
    model.safetensors         all weights, or shards model-00001-of-0000N.safetensors with
    model.safetensors.index.json   which says in which shard each tensor lies

Everything is checked against the architecture by the headers of the files, before a weight is read; a checkpoint that
does not fit is one error that names file and tensor, and no model.  Then a model is built on the meta device and filled
tensor by tensor from memory-mapped files, so the weights exist once, in the number format and on the device asked for,
and of a file no more than one shard is in memory.  Notebook: 10_full_scale.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minirec.config import RecurrentConfig
from minirec.files.machine import free_memory, is_out_of_memory, readable
from minirec.recurrent_block import RecurrentDepthLM, rope_table

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHIPPED = ("tiny",)
SMALL_FILES = ["*.json", "*.jinja"]  # of a hub repository; with the weights, all that is ever downloaded
DTYPES = ("float32", "bfloat16", "float16")  # what people load weights in
NUMBER_FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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


class Stored(NamedTuple):
    """Where a tensor lies and what it is, as the header of its file says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in safetensors' words: F32, BF16, ...


def load(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> RecurrentDepthLM:
    """Load a model: `"tiny"` (shipped with minirec), a folder, or the id of a repository on the Hugging Face hub.

    dtype: a floating-point format of torch or its name, as "bfloat16"; None keeps that of the file.  revision: branch,
    tag or commit of a hub repository.  A hub repository is downloaded once and kept by huggingface_hub, whose
    environment variables (HF_HUB_OFFLINE, HF_HOME) hold.  Raises FileNotFoundError for a folder or file that is not
    there, ValueError for one that is not what it should be, both with its name, and MemoryError with the numbers where
    the weights do not fit.
    """
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; it must be a floating-point format of torch, as torch.bfloat16")
    config = read_config(locate(name, revision, weights=False))  # before gigabytes of something else are fetched
    folder = locate(name, revision)
    stored = read_headers(folder, config)
    model = _shape_of(config)
    formats = {n: dtype or NUMBER_FORMATS[stored[n].dtype] for n, _ in model.named_parameters()}  # without a tied head
    needed = sum(p.numel() * formats[n].itemsize for n, p in model.named_parameters())
    free = free_memory(device)
    too_large = _too_large(folder, needed, max(formats.values(), key=lambda f: f.itemsize), device, free)
    if free is not None and needed > free:
        raise too_large
    try:
        with tqdm(total=needed, unit="B", unit_scale=True, desc="loading", disable=None, leave=False) as bar:
            for file in sorted({stored[n].file for n in formats}):
                with opened(file) as f:
                    for name in (n for n in formats if stored[n].file == file):
                        value = f.get_tensor(name).to(device=device, dtype=dtype)
                        _put(model, name, value)
                        bar.update(value.nbytes)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise too_large from None
    if config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    generation = folder / "generation_config.json"
    if generation.exists():
        model.generation_config = read_json(generation)
    return model.eval()


def _too_large(folder: Path, needed: int, dtype: torch.dtype, device, free: int | None) -> MemoryError:
    has = "has too little" if free is None else f"has {readable(free)} free"
    half = f"dtype bfloat16 ({readable(needed * 2 / dtype.itemsize)}) or " if dtype.itemsize > 2 else ""
    need = f"the weights need {readable(needed)} in {str(dtype).removeprefix('torch.')}"
    return MemoryError(f"{folder}: {need}, and {device} {has}; try {half}another device")


def _shape_of(config: RecurrentConfig) -> RecurrentDepthLM:
    """A model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return RecurrentDepthLM(config)


def _put(model: RecurrentDepthLM, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value))


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
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    # the index first: without it the new single file counts, whatever is left of the old shards
    for stale in [folder / INDEX, folder / WEIGHTS, *folder.glob("model-?????-of-?????.safetensors")]:
        if stale.name not in split.filename_to_tensors and not (stale.name == INDEX and split.is_sharded):
            stale.unlink(missing_ok=True)
    write_json(folder / "config.json", official_config(model.config, model.dtype))
    if model.generation_config:
        write_json(folder / "generation_config.json", model.generation_config)
    else:
        (folder / "generation_config.json").unlink(missing_ok=True)


def make_random(
    config: RecurrentConfig,
    folder: str | Path,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    generation_config: dict | None = None,
) -> None:
    """Write a checkpoint with random weights in the layout of the published one, for tests and for timing.

    Also what that has twice or could leave out: a tied head beside the embedding, and `freqs_cis`, the cosines and
    sines of the positions (with both, the 3.5B shape takes the published 15.65 GB in float32).  The values depend on
    seed and name alone, and are those of a fresh model; config.json says under "weights" that they are random.  Memory
    is needed for one shard.  Raises FileExistsError if folder is there and not empty, ValueError if shards is not from
    1 to the number of tensors, OSError if the disk is too small; all before anything is written, and the folder
    appears whole or not at all.
    """
    folder, model = Path(folder).resolve(), _shape_of(config)
    table = torch.view_as_real(rope_table(torch.arange(config.block_size), config.head_dim, config.rope_base))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    shapes |= {"lm_head.weight": model.lm_head.weight.shape, "freqs_cis": torch.Size((1, *table.squeeze(1).shape))}
    if not 1 <= shards <= len(shapes):
        raise ValueError(f"shards is {shards}; it must be from 1 to {len(shapes)}, the number of tensors")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; a made checkpoint goes to a new or an empty folder")
    files = _split({name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}, shards)
    size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    if size > (free := shutil.disk_usage(disk).free):
        raise OSError(f"{folder} would take {readable(size)}, and {disk} has {readable(free)} free")

    def value(name: str) -> Tensor:
        if name == "freqs_cis":
            return table.squeeze(1)[None]  # (1, T, 1, c/2, 2)
        if name == "lm_head.weight" and config.tie_embeddings:
            name = "transformer.wte.weight"
        torch.manual_seed((seed << 16) + list(shapes).index(name))
        random = torch.empty(shapes[name])
        for rows in random.split(max(1, 2**22 // random[0].numel())):  # in pieces: a draw takes several copies
            _put(model, name, rows)
            model.reset_parameters()  # of all; but the others are on the meta device, where that is free
        _put(model, name, random.to("meta"))
        return random

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as temporary, torch.random.fork_rng([]):
        part = Path(temporary) / folder.name
        part.mkdir()
        with tqdm(total=size, unit="B", unit_scale=True, desc="writing", disable=None, leave=False) as bar:
            for file, names in files.items():
                tensors = {name: value(name).to(dtype) for name in names}
                write_whole(part / file, lambda p, tensors=tensors: save_file(tensors, p, metadata={"format": "pt"}))
                bar.update(sum(t.nbytes for t in tensors.values()))
                del tensors  # before the next shard is made
        if shards > 1:
            where = {name: file for file, names in files.items() for name in names}
            write_json(part / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        note = {"weights": f"random, by minirec make-checkpoint with seed {seed}: for tests and timing, not trained"}
        write_json(part / "config.json", official_config(config, dtype) | note)
        if generation_config:
            write_json(part / "generation_config.json", generation_config)
        os.replace(part, folder)


def _split(sizes: dict[str, int], shards: int) -> dict[str, list[str]]:
    """Cut tensors, in order, into so many files of about the same size, none of them empty: file -> names."""
    cut: list[list[str]] = [[]]
    done, left = 0, len(sizes)
    for name, size in sizes.items():
        full = done + size / 2 > sum(sizes.values()) * len(cut) / shards
        if cut[-1] and len(cut) < shards and (full or left == shards - len(cut)):
            cut.append([])
        cut[-1].append(name)
        done, left = done + size, left - 1
    if shards == 1:
        return {WEIGHTS: cut[0]}
    return {f"model-{i:05}-of-{shards:05}.safetensors": names for i, names in enumerate(cut, 1)}


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
    values = read_json(path)
    if values.get("model_type") != ARCHITECTURE["model_type"]:
        found = f"model_type is {values.get('model_type')!r}{_first_tensors(folder)}"
        supported = f"{ARCHITECTURE['model_type']!r} (Huginn-0125 and models of its architecture)"
        raise ValueError(f"{path}: {found}; minirec loads {supported}")
    for key, value in ARCHITECTURE.items():
        if values.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {values[key]!r}; minirec supports {value!r}")
    try:
        return RecurrentConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def locate(name: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: shipped, on disk, or downloaded from the hub (weights False: its small files only).

    With HF_HUB_OFFLINE set, or without a network, it is what huggingface_hub has kept.
    """
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
        patterns = SMALL_FILES + ["*.safetensors"] * weights  # no pickles, no code
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"no folder {str(name)!r} here, and the hub did not give it: {reason}") from None


def read_headers(folder: Path, config: RecurrentConfig) -> dict[str, Stored]:
    """Every tensor of a checkpoint, by the headers of its files; a ValueError if they are not what config asks for.

    Names, shapes and number formats are checked, and that every file is whole; no weight is read.
    """
    index, listed = folder / INDEX, None
    if index.exists():
        listed = read_json(index).get("weight_map")
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
    stored: dict[str, Stored] = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{index} names {file.name}, which is not in {folder}")
        with opened(file) as f:
            for name in f.keys():
                header = f.get_slice(name)
                stored[name] = Stored(file, tuple(header.get_shape()), header.get_dtype())
    for name, file in (listed or {}).items():
        if name not in stored or stored[name].file != folder / file:
            raise ValueError(f"{index} says that {name} is in {file}, where it is not")
    expected = {name: tuple(p.shape) for name, p in _shape_of(config).named_parameters()}  # a tied head is not in it
    derived = {"freqs_cis"} | ({"lm_head.weight"} if config.tie_embeddings else set())
    named = files[0] if listed is None else index
    if missing := sorted(expected.keys() - stored.keys()):
        raise ValueError(
            f"{named}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are){_first_tensors(folder)}"
        )
    if extra := sorted(stored.keys() - expected.keys() - derived):
        raise ValueError(f"{named}: tensor {extra[0]} is not of this architecture ({len(extra)} are not)")
    for name, shape in expected.items():
        file, found, dtype = stored[name]
        if found != shape:
            raise ValueError(f"{file}: tensor {name} has shape {found}; config.json asks for {shape}")
        if dtype not in NUMBER_FORMATS:
            raise ValueError(f"{file}: tensor {name} is {dtype}; it must be one of {', '.join(NUMBER_FORMATS)}")
    return stored


def _first_tensors(folder: Path) -> str:
    """What a checkpoint of something else holds, as a part of a message; nothing if that cannot be seen."""
    names: list[str] = []
    try:
        if (folder / INDEX).exists():
            names = list(read_json(folder / INDEX).get("weight_map", ()))
        elif (folder / WEIGHTS).exists():
            with opened(folder / WEIGHTS) as f:
                names = list(f.keys())
    except ValueError:
        pass
    return f"; it holds {len(names)} tensors: {', '.join(names[:3])}, ..." if names else ""


@contextmanager
def opened(file: Path) -> Iterator:
    """A safetensors file to read from; one that is broken or foreign is a ValueError that names it."""
    try:
        with safe_open(file, "pt") as f:
            yield f
    except (SafetensorError, OSError) as error:  # an OSError of safetensors does not name the file
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file; FileNotFoundError or ValueError that names the file if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must be an object")
    return values


def write_json(path: Path, values: dict) -> None:
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
