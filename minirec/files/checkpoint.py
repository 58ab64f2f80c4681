"""Checkpoints in the Hugging Face layout, read and written without transformers and without pickle.

    config.json               shape of the network, in the keys of the published Huginn checkpoints
    generation_config.json    stop tokens and decoding defaults (optional)
    tokenizer.json            see minirec.files.tokenizer (optional)
    model.safetensors         all weights, or shards model-00001-of-0000N.safetensors with
    model.safetensors.index.json   which says in which shard each tensor lies

Before a weight is read, the headers of the files are checked against the architecture; a checkpoint that does not fit
is one error that names file and tensor.  Then a model is built on the meta device and filled tensor by tensor from
memory-mapped files.  So the weights exist once, in the requested number format and on the requested device, and at most
one shard of a file is in memory.

A save is one transaction over all these files (minirec.files.writing): whatever stops it, `load` finds the old
checkpoint or the new one.  Notebook: 10_full_scale.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minirec.config import RecurrentConfig
from minirec.families import model_of
from minirec.files.huginn import HEAD, generation_of, stop_tokens_of
from minirec.files.json_files import read_json
from minirec.files.layouts import LAYOUTS, holds, layout_of
from minirec.files.machine import free_memory, is_out_of_memory, one_line, readable
from minirec.files.writing import as_json, blaming, is_left_over, publish, saving, write_json, write_whole  # noqa: F401
from minirec.recurrent_block import RecurrentDepthLM, rope_table

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWNED = re.compile(  # the files that a save replaces; a shard has a number of its save where another is in its place
    r"(generation_)?config\.json|model\.safetensors(\.index\.json)?|model-([0-9a-f]{8}-)?\d{5}-of-\d{5}\.safetensors"
)
SHIPPED = ("tiny",)
SMALL_FILES = ["*.json", "*.jinja"]  # of a hub repository; with the weights, all that is ever downloaded
DTYPES = ("float32", "bfloat16", "float16")  # what people load weights in
NUMBER_FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    tag or commit of a hub repository.  huggingface_hub downloads a repository once and keeps it; its environment
    variables (HF_HUB_OFFLINE, HF_HOME) apply.

    Every weight must be finite in the format it is loaded in, and a head that the file holds beside a tied embedding
    must equal it.  Both checks together took 0.26 s for a checkpoint of 1 GB in float32, on one core and with its file
    in the page cache: one pass over the tensors, without a copy.

    Raises FileNotFoundError for a missing folder or file, ValueError for one that is not what it should be, both with
    its name, and MemoryError with the numbers if the weights do not fit.
    """
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; it must be a floating-point format of torch, as torch.bfloat16")
    read_config(locate(name, revision, weights=False))  # before gigabytes of something else are fetched
    folder = locate(name, revision)
    for _ in range(5):
        before = _stamp(folder)
        try:
            model = _load(folder, device, dtype)
        except (OSError, ValueError):
            if _stamp(folder) == before:
                raise
        else:
            if _stamp(folder) == before:
                return model
        publish(folder, OWNED)  # waits for whoever is saving
    raise OSError(f"{folder} is saved to again and again; load it when that has ended")


def _stamp(folder: Path) -> list:
    """Another value after each save: what was read before it and after it does not belong together."""
    stats = [p.stat() if p.exists() else None for p in (folder / n for n in (CONFIG, GENERATION, INDEX, WEIGHTS))]
    return [stat and (stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]


def _load(folder: Path, device: torch.device | str, dtype: torch.dtype | None) -> RecurrentDepthLM:
    config = read_config(folder)
    stored = read_headers(folder, config)
    if config.tie_embeddings and HEAD in stored:
        _check_tied(stored, LAYOUTS[type(config)].embedding)
    generation = _read_generation(folder, config)
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
                        check_finite(f"{file}: tensor {name}", value)
                        _put(model, name, value)
                        bar.update(value.nbytes)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise too_large from None
    if config.tie_embeddings:
        model.lm_head.weight = model.embedding.weight
    model.generation_config = generation
    return model.eval()


def _read_generation(folder: Path, config: RecurrentConfig) -> dict:
    """generation_config.json; the stop tokens are those of config.json if only that has several."""
    path, stop = folder / GENERATION, stop_tokens_of(read_json(folder / CONFIG))
    several = {"eos_token_id": stop} if len(stop) > 1 else {}
    try:
        return several | (generation_of(read_json(path), config) if path.exists() else {})
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {error}") from None


def check_finite(what: str, value: Tensor) -> None:
    """ValueError if a tensor holds NaN or infinities, which nothing computed with it would survive."""
    least, most = value.aminmax()  # one pass without a copy, and NaN comes through
    if not (least.isfinite() and most.isfinite()):
        raise ValueError(f"{what} holds NaN or infinities ({str(value.dtype).removeprefix('torch.')})")


def _check_tied(stored: dict[str, Stored], embedding: str) -> None:
    """A head beside a tied embedding has to be the embedding, or loading would lose it."""
    same = stored[HEAD][1:] == stored[embedding][1:]
    if same:
        with opened(stored[embedding].file) as f, opened(stored[HEAD].file) as g:
            same = torch.equal(f.get_tensor(embedding), g.get_tensor(HEAD))
    if not same:
        raise ValueError(
            f"{stored[HEAD].file}: {HEAD} differs from {embedding}, but {CONFIG} says tie_embeddings true: one is wrong"
        )


def _too_large(folder: Path, needed: int, dtype: torch.dtype, device, free: int | None) -> MemoryError:
    has = "has too little" if free is None else f"has {readable(free)} free"
    half = f"dtype bfloat16 ({readable(needed * 2 / dtype.itemsize)}) or " if dtype.itemsize > 2 else ""
    need = f"the weights need {readable(needed)} in {str(dtype).removeprefix('torch.')}"
    return MemoryError(f"{folder}: {need}, and {device} {has}; try {half}another device")


def _shape_of(config: RecurrentConfig) -> RecurrentDepthLM:
    """A model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return model_of(config)


def _put(model: RecurrentDepthLM, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value))


def save(model: RecurrentDepthLM, folder: str | Path, *, max_shard_size: str = "5GB") -> None:
    """Write config, weights and generation config to a folder, so that `load` and the official class read them.

    All files are replaced or none: an interrupt, a full disk or a killed process leaves the old checkpoint, or the new
    one for `load` and the next save to put in place.  (Another library sees that only after them; a shard never takes
    the name of an older one, so its old weights stay whole as well.)  A tied head is stored once.  Weights above
    `max_shard_size` are split into shards with an index.  `tie_embeddings` is written as the weights are.

    A model wrapped by torch.compile or DistributedDataParallel is saved without its wrapper.  Raises, before anything
    is written, ValueError for another wrapper or parameters that `load` would refuse; OSError that names the file if
    the disk refuses it or if another process is saving to the folder.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    model, parameters = plain(model)
    tensors = {name: p.detach().contiguous() for name, p in parameters.items()}
    config = dataclasses.replace(model.config, tie_embeddings=HEAD not in tensors)
    expected = {name: p.shape for name, p in _shape_of(config).named_parameters()}
    for name in sorted(expected.keys() | tensors.keys()):
        found = tensors[name].shape if name in tensors else "missing"
        if found != expected.get(name, "not in this architecture"):
            wanted = expected.get(name, "not in this architecture")
            raise ValueError(f"the model's {name} is {_words(found)}; by its config it is {_words(wanted)}")
        check_finite(f"the model's {name}", tensors[name])
    generation = generation_of(model.generation_config, config)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    folder = Path(folder)
    names = {file: file for file in split.filename_to_tensors}
    if split.is_sharded and any((folder / file).exists() for file in names):
        number = secrets.token_hex(4)
        names = {file: file.replace("model-", f"model-{number}-") for file in names}
    files = {CONFIG: as_json(LAYOUTS[type(config)].official_config(config, model.dtype))}
    if generation:
        files[GENERATION] = as_json(generation)
    if split.is_sharded:
        where = {tensor: names[file] for tensor, file in split.tensor_to_filename.items()}
        files[INDEX] = as_json({"metadata": split.metadata, "weight_map": where})
    with saving(folder, OWNED) as write:
        for file, held in split.filename_to_tensors.items():
            write(names[file], partial(_write_tensors, {name: tensors[name] for name in held}))
        for file, writer in files.items():
            write(file, writer)


def _write_tensors(tensors: dict[str, Tensor], path: str) -> None:
    save_file(tensors, path, {"format": "pt"})


def _words(shape: torch.Size | str) -> str:
    return shape if isinstance(shape, str) else f"of shape {tuple(shape)}"


def plain(model: Any) -> tuple[RecurrentDepthLM, dict[str, nn.Parameter]]:
    """The model inside the wrappers of torch.compile and DistributedDataParallel, and its parameters, tied ones once.

    ValueError if it is another wrapper, or if a parameter is no plain tensor with values: sharded by FSDP, quantized,
    or on the meta device.
    """
    while "_orig_mod" in model._modules or isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        model = model._modules["_orig_mod"] if "_orig_mod" in model._modules else model.module
    if not isinstance(getattr(model, "config", None), RecurrentConfig):
        raise ValueError(f"the model is a {type(model).__name__}; it must be a RecurrentDepthLM, without a wrapper")
    parameters = {}
    for name, p in model.named_parameters():
        name = name.replace("_orig_mod.", "")  # a part that was compiled alone
        if (
            type(p) is not nn.Parameter
            or type(p.data) is not Tensor
            or p.is_meta
            or p.dtype not in NUMBER_FORMATS.values()
        ):
            kind = "meta tensor" if p.is_meta else f"{type(p).__name__} of {str(p.dtype).removeprefix('torch.')}"
            raise ValueError(f"the model's {name} is a {kind}; it must be a plain tensor of floats")
        parameters[name] = p
    return model, parameters


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
    1 to the number of tensors, OSError if the disk is too small; all before anything is written, and all files appear
    or none.
    """
    folder, model = Path(folder).resolve(), _shape_of(config)
    layout = LAYOUTS[type(config)]
    shapes = {name: p.shape for name, p in model.named_parameters()} | {HEAD: model.lm_head.weight.shape}
    if layout.derived:
        table = torch.view_as_real(rope_table(torch.arange(config.block_size), config.head_dim, config.rope_base))
        shapes["freqs_cis"] = torch.Size((1, *table.squeeze(1).shape))
    if not 1 <= shards <= len(shapes):
        raise ValueError(f"shards is {shards}; it must be from 1 to {len(shapes)}, the number of tensors")
    if folder.exists() and (not folder.is_dir() or any(not is_left_over(p) for p in folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; a made checkpoint goes to a new or an empty folder")
    generation = generation_of(generation_config or {}, config)
    files = _split({name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}, shards)
    size = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    if size > (free := shutil.disk_usage(disk).free):
        raise OSError(f"{folder} would take {readable(size)}, and {disk} has {readable(free)} free")

    def value(name: str) -> Tensor:
        if name == "freqs_cis":
            return table.squeeze(1)[None]  # (1, T, 1, c/2, 2)
        if name == HEAD and config.tie_embeddings:
            name = layout.embedding
        torch.manual_seed((seed << 16) + list(shapes).index(name))
        random = torch.empty(shapes[name])
        for rows in random.split(max(1, 2**22 // random[0].numel())):  # in pieces: a draw takes several copies
            _put(model, name, rows)
            model.reset_parameters()  # of all; but the others are on the meta device, where that is free
        _put(model, name, random.to("meta"))
        return random

    note = {"weights": f"random, by minirec make-checkpoint with seed {seed}: for tests and timing, not trained"}
    with saving(folder, OWNED) as write, torch.random.fork_rng([]):
        with tqdm(total=size, unit="B", unit_scale=True, desc="writing", disable=None, leave=False) as bar:
            for file, names in files.items():
                tensors = {name: value(name).to(dtype) for name in names}
                write(file, partial(_write_tensors, tensors))
                bar.update(sum(t.nbytes for t in tensors.values()))
                del tensors  # before the next shard is made
        if shards > 1:
            where = {name: file for file, names in files.items() for name in names}
            write(INDEX, as_json({"metadata": {"total_size": size}, "weight_map": where}))
        write(CONFIG, as_json(layout.official_config(config, dtype) | note))
        if generation:
            write(GENERATION, as_json(generation))


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


def read_config(folder: Path) -> RecurrentConfig:
    """Read config.json; a ValueError says what was found where it is of another architecture."""
    path = folder / CONFIG
    values = read_json(path)
    try:
        return layout_of(values, _tensors(folder)).config_of(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def locate(name: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: shipped, on disk, or downloaded from the hub (weights False: its small files only).

    With HF_HUB_OFFLINE set, or without a network, it is what huggingface_hub has kept.
    """
    if str(name) in SHIPPED:
        return Path(str(resources.files("minirec") / "assets" / str(name)))
    path = Path(name)
    if path.is_dir():
        publish(path, OWNED)  # if a save was killed on its way
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
        reason = one_line(error, 500) or type(error).__name__
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
            name = file if isinstance(file, str) and file.isprintable() and len(file) < 200 else ""
            if Path(name).name != name or not name.endswith(".safetensors"):  # "../elsewhere", "/elsewhere"
                raise ValueError(f"{index} names {one_line(repr(file))}; a shard is a file in the folder of the index")
        files = sorted({folder / file for file in listed.values()})
    else:
        files = [folder / WEIGHTS]
        if not files[0].exists():
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
            hint = (
                f"; {one_line(pickles[0])} is a pickle; `minirec convert` rewrites it as safetensors" if pickles else ""
            )
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
            raise ValueError(f"{index} says that {one_line(name)} is in {file}, where it is not")
    expected = {name: tuple(p.shape) for name, p in _shape_of(config).named_parameters()}  # a tied head is not in it
    derived = LAYOUTS[type(config)].derived | ({HEAD} if config.tie_embeddings else set())
    named = files[0] if listed is None else index
    if missing := sorted(expected.keys() - stored.keys()):
        raise ValueError(
            f"{named}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are){holds(stored)}"
        )
    if extra := sorted(stored.keys() - expected.keys() - derived):
        raise ValueError(f"{named}: tensor {one_line(extra[0])} is not of this architecture ({len(extra)} are not)")
    for name, shape in expected.items():
        file, found, dtype = stored[name]
        if found != shape:
            raise ValueError(f"{file}: tensor {name} has shape {found}; config.json asks for {shape}")
        if dtype not in NUMBER_FORMATS:
            raise ValueError(f"{file}: tensor {name} is {dtype}; it must be one of {', '.join(NUMBER_FORMATS)}")
    return stored


def _tensors(folder: Path) -> list[str]:
    """The names of a checkpoint's tensors; none where they cannot be seen."""
    names: list[str] = []
    try:
        if (folder / INDEX).exists():
            listed = read_json(folder / INDEX).get("weight_map")
            names = list(listed) if isinstance(listed, dict) else []
        elif (folder / WEIGHTS).exists():
            with opened(folder / WEIGHTS) as f:
                names = list(f.keys())
    except (ValueError, OSError):
        pass
    return names


@contextmanager
def opened(file: Path) -> Iterator:
    """A safetensors file to read from; raises ValueError naming one that is broken or foreign."""
    with blaming(file):  # a file that is not there, or may not be read, is an OSError
        if not file.is_dir():
            open(file, "rb").close()
    try:
        opening = safe_open(file, "pt")
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: PyTorch cannot map it
        raise ValueError(f"{file} is not a whole safetensors file: {one_line(error)}") from None
    try:
        with opening as f:
            yield f
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {one_line(error)}") from None
