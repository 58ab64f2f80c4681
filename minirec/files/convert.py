"""Pickled weights as a checkpoint of safetensors: the one place that opens a pickle, and only when told to.

Parcae is published as pickles (`model.pt`, `pytorch_model.bin`).  torch.load(weights_only=True) builds tensors and
plain containers, and runs no code from the file.  What was read is checked, then written by `checkpoint.save`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from minirec.families import model_of
from minirec.files.checkpoint import HEAD, read_config, save
from minirec.files.layouts import LAYOUTS
from minirec.files.machine import one_line

PREFIXES = ("module.", "_orig_mod.", "model.")  # of wrappers that a training script saved along
KEPT = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def convert(source: str | Path, folder: str | Path) -> None:
    """Write the pickled weights of a folder, or a pickle in a folder with config.json, as a checkpoint of safetensors.

    Prefixes of wrappers are stripped where names then fit.  The tokenizer and generation config come along.  Raises
    FileNotFoundError, FileExistsError if folder is there and not empty, or ValueError naming file and tensor; nothing
    is written then.
    """
    source, folder = Path(source), Path(folder)
    home = source if source.is_dir() else source.parent
    files = pickles(source) if source.is_dir() else [source]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; a converted checkpoint goes to a new or an empty folder")
    config = read_config(home)
    with torch.device("meta"):
        model = model_of(config)
    expected = dict(model.named_parameters())
    wanted = expected.keys() | LAYOUTS[type(config)].derived | {HEAD}
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, value in opened(file).items():
            tensors[stripped(name, wanted)] = value
    if config.tie_embeddings and HEAD in tensors:
        embedding = LAYOUTS[type(config)].embedding
        if not torch.equal(tensors[HEAD], tensors.get(embedding, tensors[HEAD])):
            raise ValueError(f"{files[0]}: {HEAD} differs from {embedding}, but config.json says that they are tied")
    for name in sorted(tensors.keys() - wanted):
        raise ValueError(f"{files[0]}: tensor {one_line(name)} is not of this architecture")
    for name, p in expected.items():
        if name not in tensors:
            raise ValueError(f"{files[0]}: tensor {name} is missing")
        if tensors[name].shape != p.shape:
            found = tuple(tensors[name].shape)
            raise ValueError(f"{files[0]}: tensor {name} has shape {found}; config.json asks for {tuple(p.shape)}")
    model.load_state_dict({name: tensors[name] for name in expected}, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embedding.weight
    save(model, folder)
    for name in KEPT:
        if (home / name).exists():
            shutil.copyfile(home / name, folder / name)


def pickles(folder: Path) -> list[Path]:
    """The pickled weights of a folder: model.pt, or pytorch_model.bin, whole or in shards."""
    found = sorted(folder.glob("pytorch_model*.bin")) or [folder / "model.pt"]
    if not found[0].exists():
        raise FileNotFoundError(f"{folder} has no pytorch_model.bin and no model.pt")
    return found


def opened(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name, also where it holds them under "model" or "state_dict"."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {file}") from None
    except Exception as error:  # a broken or hostile pickle raises anything
        raise ValueError(f"{file} holds no weights that can be read safely: {one_line(error)}") from None
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items()):
        raise ValueError(f"{file} holds something else than tensors by name")
    return found


def stripped(name: str, wanted) -> str:
    """A name without the prefixes that keep it from being one of those wanted."""
    short = name
    while short not in wanted and (prefix := next((p for p in PREFIXES if short.startswith(p)), None)):
        short = short.removeprefix(prefix)
    return short if short in wanted else name
