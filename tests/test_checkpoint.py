"""Checkpoints: what is saved comes back, and a file that does not fit is one clear error and no model."""

import ast
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import minirec
from minirec import RecurrentConfig, RecurrentDepthLM
from minirec.files import checkpoint

WTE, NORM = "transformer.wte.weight", "transformer.ln_f.weight"


@pytest.fixture
def model(small_model):
    model = copy.deepcopy(small_model(dtype=torch.float32))
    model.generation_config = {"eos_token_id": [2, 5], "diffusion_forcing": {"inner_steps": 1}}
    return model


@pytest.fixture
def saved(model, tmp_path):
    """A good checkpoint of one file, to spoil."""
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def shards(model, tmp_path):
    """A good checkpoint of several files, to spoil."""
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    return tmp_path / "shards"


def assert_equal(a: RecurrentDepthLM, b: RecurrentDepthLM) -> None:
    """The same config, the same weights to the bit, and so the same logits."""
    assert a.config == b.config and a.dtype == b.dtype
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), f"{name} has changed"
    tokens = torch.arange(10)[None]
    assert torch.equal(a(tokens).logits, b(tokens).logits)


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


def edit_tensors(folder: Path, **changes) -> None:
    """Add or replace tensors of a one-file checkpoint; None removes."""
    path = folder / checkpoint.WEIGHTS
    tensors = load_file(path) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


# ---- round trips


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_what_is_saved_comes_back(small_model, tmp_path, tie_embeddings, max_shard_size):
    model = small_model(dtype=torch.float32, tie_embeddings=tie_embeddings)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = RecurrentDepthLM.from_pretrained(tmp_path)
    assert_equal(model, loaded)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tie_embeddings
    assert not loaded.training
    files = {p.name for p in tmp_path.iterdir()}
    assert ("model.safetensors" in files) == (max_shard_size == "5GB")
    assert ("model.safetensors.index.json" in files) == (max_shard_size == "8KB")


def test_a_tied_head_is_stored_once(saved):
    assert "lm_head.weight" not in load_file(saved / checkpoint.WEIGHTS)


def test_shards_hold_every_tensor_once(model, shards):
    tensors = [name for file in shards.glob("model-*.safetensors") for name in load_file(file)]
    assert sorted(tensors) == sorted(name for name, _ in model.named_parameters())


def test_config_and_generation_config_come_back(small_model, tmp_path):
    sizes = dict(
        n_layers_in_prelude=2, n_layers_in_recurrent_block=3, n_layers_in_coda=2, padded_vocab_size=32, rope_base=999.0,
        norm_eps=1e-5, qk_bias=False, bos_token_id=7, eos_token_id=8, pad_token_id=9, mean_backprop_depth=3,
    )  # fmt: skip
    model = copy.deepcopy(small_model(dtype=torch.float32, **sizes))
    model.generation_config = {"eos_token_id": [8, 3], "diffusion_forcing": {"inner_steps": 2, "exit_threshold": 0.5}}
    model.save_pretrained(tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert loaded.config == model.config and loaded.generation_config == model.generation_config
    assert all(getattr(loaded.config, name) == value for name, value in sizes.items())


def test_the_number_format_of_the_file_is_kept_unless_another_is_asked_for(model, saved, tmp_path):
    half = checkpoint.load(saved, dtype="bfloat16")
    assert torch.equal(half.lm_head.weight, checkpoint.load(saved, dtype=torch.bfloat16).lm_head.weight)
    for wrong in (torch.int8, "int8", "half a byte", 16):
        with pytest.raises(ValueError, match=r"dtype is .*; it must be a floating-point format of torch"):
            checkpoint.load(saved, dtype=wrong)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.transformer.wte.weight, model.transformer.wte.weight.bfloat16())
    half.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_equal(half, checkpoint.load(tmp_path / "half"))
    assert checkpoint.load(tmp_path / "half", dtype=torch.float32).dtype == torch.float32


def test_the_official_model_loads(golden_folder):
    model = checkpoint.load(golden_folder / "model")
    for name, tensor in load_file(golden_folder / "model" / "model.safetensors").items():
        if name not in ("freqs_cis", "lm_head.weight"):
            assert torch.equal(model.get_parameter(name), tensor), name


def test_the_shipped_model_loads():
    assert RecurrentDepthLM.from_pretrained("tiny").config == RecurrentConfig.preset("tiny")


def test_saved_config_has_what_the_official_class_reads(golden_folder, tmp_path):
    theirs = json.loads((golden_folder / "model" / "config.json").read_text())
    del theirs["transformers_version"]  # a record of what wrote the file
    checkpoint.load(golden_folder / "model").save_pretrained(tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    for name, value in theirs.items():
        assert ours.get(name) == pytest.approx(value), f"{name} is {ours.get(name)!r}, theirs {value!r}"


def test_the_table_of_rotations_in_a_file_is_ignored(model, saved):
    edit_tensors(saved, freqs_cis=torch.zeros(3))
    assert_equal(model, checkpoint.load(saved))


def test_the_head_in_a_tied_file_is_ignored(model, saved):
    edit_tensors(saved, **{"lm_head.weight": torch.zeros(model.lm_head.weight.shape)})
    loaded = checkpoint.load(saved)
    assert_equal(model, loaded)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_head_that_is_not_tied_is_not_ignored(small_model, tmp_path):
    small_model(dtype=torch.float32, tie_embeddings=False).save_pretrained(tmp_path)
    edit_tensors(tmp_path, **{"lm_head.weight": None})
    assert_refused(tmp_path, "lm_head.weight is missing", checkpoint.WEIGHTS)


# ---- saving over something


def test_saving_again_replaces_the_old_weights(small_model, tmp_path):
    a, b = small_model(0, dtype=torch.float32), small_model(1, dtype=torch.float32)
    for model, size in [(a, "8KB"), (b, "5GB"), (a, "8KB"), (b, "12KB"), (a, "5GB")]:
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert_equal(model, checkpoint.load(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_saving_touches_no_file_of_someone_else(model, saved):
    for name in ["model_backup.safetensors", "model-old.safetensors", "tokenizer.json", "notes.md"]:
        (saved / name).write_text("mine")
        model.save_pretrained(saved, max_shard_size="8KB")
        assert (saved / name).read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["writing", "moving"])
def test_a_save_that_is_cut_short_leaves_the_old_files_whole(small_model, saved, monkeypatch, error, where):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def half(tensors, path, **kwargs):
        Path(path).write_bytes(b"half a file")
        raise error

    def not_moved(source, target):
        raise error

    if where == "writing":
        monkeypatch.setattr(checkpoint, "save_file", half)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", not_moved)
    with pytest.raises(error):
        small_model(1, dtype=torch.float32).save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_save_that_is_cut_short_while_tidying_up_can_be_loaded(small_model, shards, monkeypatch):
    model, unlink, removed = small_model(1, dtype=torch.float32), Path.unlink, []

    def once(path, **kwargs):
        if path.suffix != ".part":
            if removed:
                raise KeyboardInterrupt
            removed.append(path)
        unlink(path, **kwargs)

    monkeypatch.setattr(Path, "unlink", once)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(shards)
    assert_equal(model, checkpoint.load(shards))


# ---- what does not fit


def assert_refused(folder: Path, *words: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error) as refused:
        checkpoint.load(folder)
    message = str(refused.value)
    assert refused.type is error and "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def test_no_such_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), error=FileNotFoundError)
    assert_refused("nowhere", "'nowhere'", "'tiny'", error=FileNotFoundError)


def test_a_file_where_a_folder_should_be(saved):
    assert_refused(saved / "config.json", "config.json is a file")


def test_no_config(saved):
    (saved / "config.json").unlink()
    assert_refused(saved, str(saved), "has no config.json", error=FileNotFoundError)


@pytest.mark.parametrize("text, words", [("{", "is not JSON"), ("", "is not JSON"), ("[1]", "list"), ("3", "int")])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_json_that_is_none(saved, file, text, words):
    (saved / file).write_text(text)
    assert_refused(saved, str(saved / file), words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"block_class_name": "TransformerPreNormBlock"}, "block_class_name is 'TransformerPreNormBlock'"),
        ({"norm_class_name": "LayerNorm"}, "norm_class_name is 'LayerNorm'"),
        ({"injection_type": "add"}, "injection_type is 'add'"),
        ({"bias": True}, "bias is True"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_heads": 3}, "n_heads 3"),
        ({"n_embd": "16"}, "n_embd is '16'; it must be a whole number"),
        ({"vocab_size": None}, "vocab_size is None; it must be a whole number"),
        ({"n_layers_in_coda": -1}, "n_layers_in_coda is -1"),
    ],
)
def test_a_config_of_something_else(saved, changes, words):
    edit_json(saved / "config.json", **changes)
    assert_refused(saved, str(saved / "config.json"), words)


def test_another_architecture_is_described(saved, shards):
    """What was found, by its tensors too, and what is supported."""
    for folder in (saved, shards):
        edit_json(folder / "config.json", model_type="llama")
        assert_refused(folder, "'llama'", "transformer.adapter.weight", "'huginn_raven'", "Huginn-0125")
    (saved / checkpoint.WEIGHTS).write_bytes(b"broken")
    assert_refused(saved, "model_type is 'llama'; minirec loads")


def test_a_config_that_does_not_say_what_it_is_of(saved):
    values = json.loads((saved / "config.json").read_text())
    del values["model_type"]
    (saved / "config.json").write_text(json.dumps(values))
    assert_refused(saved, str(saved / "config.json"), "model_type is None")


def test_no_weights(saved):
    (saved / checkpoint.WEIGHTS).unlink()
    assert_refused(saved, str(saved), checkpoint.WEIGHTS, checkpoint.INDEX, error=FileNotFoundError)


def test_everything_is_checked_before_a_weight_is_read(shards, monkeypatch):
    monkeypatch.setattr(checkpoint, "_put", lambda *args: pytest.fail("a weight was read"))
    last = sorted(shards.glob("model-*.safetensors"))[-1]
    tensors = load_file(last)
    name = sorted(tensors)[-1]
    save_file(tensors | {name: torch.zeros(3, 4, 5)}, last)
    assert_refused(shards, str(last), name, "(3, 4, 5)")


class Poison:
    """Unpickling it is the end of the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_a_pickle_beside_the_weights_is_not_opened(model, saved):
    for name in ["pytorch_model.bin", "training_args.bin", "optimizer.pt"]:
        (saved / name).write_bytes(pickle.dumps(Poison()))
    assert_equal(model, checkpoint.load(saved))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_a_pickle_is_named_and_never_opened(saved, name):
    (saved / checkpoint.WEIGHTS).unlink()
    (saved / name).write_bytes(pickle.dumps(Poison()))
    assert_refused(saved, f"{name} is a pickle", error=FileNotFoundError)
    (saved / name).rename(saved / checkpoint.WEIGHTS)
    assert_refused(saved, checkpoint.WEIGHTS, "not a whole safetensors file")


def test_no_module_can_open_a_pickle():
    """Neither pickle nor what is made of it, under whatever name it is imported."""
    files = sorted(Path(minirec.__file__).parent.glob("**/*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            for name in names:
                bad = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
                assert name.split(".")[0] not in bad, f"{path.name}: {name}"
                assert name not in ("torch.load", "torch.save", "torch.hub", "numpy.load", "np.load"), (
                    f"{path.name}: {name}"
                )


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_file_that_was_cut_off(saved, keep):
    path = saved / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(saved, str(path), "not a whole safetensors file")


@pytest.mark.parametrize("content", [b"hello", b"PK\x03\x04" + bytes(200), bytes(64)])
def test_a_file_of_another_kind(saved, content):
    (saved / checkpoint.WEIGHTS).write_bytes(content)
    assert_refused(saved, str(saved / checkpoint.WEIGHTS), "not a whole safetensors file")


def test_a_folder_where_the_weights_should_be(saved):
    (saved / checkpoint.WEIGHTS).unlink()
    (saved / checkpoint.WEIGHTS).mkdir()
    assert_refused(saved, str(saved / checkpoint.WEIGHTS), "not a whole safetensors file")


def test_a_missing_tensor(saved):
    edit_tensors(saved, **{NORM: None})
    assert_refused(saved, str(saved / checkpoint.WEIGHTS), f"{NORM} is missing")


def test_a_tensor_too_many(saved):
    edit_tensors(saved, **{"transformer.extra.weight": torch.zeros(1)})
    assert_refused(saved, str(saved / checkpoint.WEIGHTS), "transformer.extra.weight is not of this architecture")


def test_a_tensor_of_another_shape(saved):
    edit_tensors(saved, **{NORM: torch.zeros(17)})
    assert_refused(saved, str(saved / checkpoint.WEIGHTS), NORM, "(17,)", "(16,)")


def test_a_tensor_of_whole_numbers(saved):
    edit_tensors(saved, **{NORM: torch.zeros(16, dtype=torch.int8)})
    assert_refused(saved, str(saved / checkpoint.WEIGHTS), NORM, "I8", "F32, F16, BF16")


def test_a_missing_shard(shards):
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert_refused(shards, checkpoint.INDEX, gone.name, error=FileNotFoundError)


def test_a_shard_that_was_cut_off(shards):
    cut = sorted(shards.glob("model-*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-1])
    assert_refused(shards, str(cut), "not a whole safetensors file")


@pytest.mark.parametrize("values", [{}, {"weight_map": None}, {"weight_map": []}])
def test_an_index_without_a_weight_map(shards, values):
    (shards / checkpoint.INDEX).write_text(json.dumps(values))
    assert_refused(shards, checkpoint.INDEX, "no weight_map")


def test_an_index_that_names_a_tensor_that_is_not_there(shards):
    listed = json.loads((shards / checkpoint.INDEX).read_text())["weight_map"]
    first, last = sorted(set(listed.values()))[0], sorted(set(listed.values()))[-1]
    edit_json(shards / checkpoint.INDEX, weight_map=listed | {"transformer.extra.weight": first})
    assert_refused(shards, checkpoint.INDEX, "transformer.extra.weight", first)
    moved = next(tensor for tensor, file in listed.items() if file == first)
    edit_json(shards / checkpoint.INDEX, weight_map=listed | {moved: last})
    assert_refused(shards, checkpoint.INDEX, moved, last)


def test_an_index_that_leaves_a_tensor_out(shards):
    """The tensor is in no shard that the index names."""
    listed = json.loads((shards / checkpoint.INDEX).read_text())["weight_map"]
    last = sorted(set(listed.values()))[-1]
    left = {tensor: file for tensor, file in listed.items() if file != last}
    edit_json(shards / checkpoint.INDEX, weight_map=left)
    assert_refused(shards, checkpoint.INDEX, "is missing")


@pytest.mark.parametrize(
    "where", ["../outside.safetensors", "deeper/inside.safetensors", "ABSOLUTE", "..", "", 3, None]
)
def test_an_index_that_points_out_of_the_folder(shards, where):
    listed = json.loads((shards / checkpoint.INDEX).read_text())["weight_map"]
    file = listed[WTE]
    (shards / "deeper").mkdir()
    for place in [shards.parent / "outside.safetensors", shards / "deeper" / "inside.safetensors"]:
        shutil.copy(shards / file, place)
    where = str(shards.parent / "outside.safetensors") if where == "ABSOLUTE" else where
    changed = {tensor: where if f == file else f for tensor, f in listed.items()}
    edit_json(shards / checkpoint.INDEX, weight_map=changed)
    assert_refused(shards, checkpoint.INDEX, repr(where))


# ---- memory


def test_weights_that_do_not_fit_are_refused_with_the_numbers(saved, monkeypatch):
    size = sum(t.nbytes for t in load_file(saved / checkpoint.WEIGHTS).values())
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: size - 1)
    monkeypatch.setattr(checkpoint, "_put", lambda *args: pytest.fail("a weight was read"))
    numbers = [checkpoint.readable(n) for n in (size, size - 1, size / 2)]
    assert_refused(saved, str(saved), "float32", "cpu has", "bfloat16", "another device", *numbers, error=MemoryError)


def test_weights_that_just_fit_are_loaded(model, saved, monkeypatch):
    size = sum(t.nbytes for t in load_file(saved / checkpoint.WEIGHTS).values())
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: size)
    assert_equal(model, checkpoint.load(saved))
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: size // 2)
    assert checkpoint.load(saved, dtype=torch.bfloat16).dtype == torch.bfloat16
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: None)  # not known: then it is tried
    assert_equal(model, checkpoint.load(saved))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"),
    ],
)
def test_running_out_of_memory_is_the_same_error(saved, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(checkpoint, "_put", full)
    assert_refused(saved, str(saved), "the weights need", "bfloat16", "another device", error=MemoryError)


def test_another_error_of_pytorch_is_not_about_memory(saved, monkeypatch):
    def broken(*args):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(checkpoint, "_put", broken)
    assert_refused(saved, "shapes differ", error=RuntimeError)


def test_free_memory_of_the_cpu():
    free = checkpoint.free_memory("cpu")
    assert free is None or 0 < free < 2**60
    assert (free is not None) == Path("/proc/meminfo").exists()


PEAK = """
import sys, torch
from minirec.files import checkpoint

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

checkpoint.load("tiny")  # so that every library is there
before = kilobytes("VmRSS")
model = checkpoint.load(sys.argv[1], dtype=torch.bfloat16)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory a process had")
def test_loading_needs_the_model_and_one_shard(tmp_path):
    """float32 shards loaded as bfloat16; whoever keeps the float32 weights needs three times the model."""
    shape = dict(n_embd=512, n_heads=8, intermediate_size=1408, vocab_size=4096, block_size=64)
    with torch.device("meta"):
        model = RecurrentDepthLM(RecurrentConfig(**shape))
    model.to_empty(device="cpu")
    model.save_pretrained(tmp_path, max_shard_size="12MB")
    weights = sum(p.numel() for p in model.parameters()) * 2 / 1024  # in KiB, as bfloat16
    shard = max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / 1024
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    assert weights * 0.9 < int(run.stdout) < weights + 2 * shard + 8192 < 2 * weights


# ---- from the hub


@pytest.fixture
def hub(saved, monkeypatch):
    """A hub that holds one repository, and the questions that it was asked."""
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_hub_repository_is_downloaded_without_pickles_and_code(model, hub):
    assert_equal(model, checkpoint.load("someone/model", revision="abc"))
    assert {name for name, _ in hub} == {"someone/model"} and {o["revision"] for _, o in hub} == {"abc"}
    assert hub[-1][1]["allow_patterns"] == ["*.json", "*.jinja", "*.safetensors"]


def test_weights_of_something_else_are_not_downloaded(saved, hub):
    edit_json(saved / "config.json", model_type="llama")
    assert_refused("someone/model", "'llama'")
    assert not any("*.safetensors" in options["allow_patterns"] for _, options in hub)


@pytest.fixture
def kept(saved, tmp_path, monkeypatch):
    """What huggingface_hub has kept of a repository, on a machine that is offline."""
    place = tmp_path / "hub" / "models--someone--model"
    (place / "refs").mkdir(parents=True)
    for branch, commit in [("main", "a" * 40), ("old", "b" * 40)]:
        (place / "refs" / branch).write_text(commit)
        shutil.copytree(saved, place / "snapshots" / commit)
    edit_json(place / "snapshots" / commit / "config.json", mean_recurrence=9)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_offline_what_was_kept_is_loaded(model, kept):
    assert_equal(model, checkpoint.load("someone/model"))
    assert checkpoint.load("someone/model", revision="old").config.mean_recurrence == 9
    assert checkpoint.load("someone/model", revision="b" * 40).config.mean_recurrence == 9


def test_offline_what_was_not_kept_is_one_clear_error(kept):
    assert_refused("someone/else", "'someone/else'", "HF_HUB_OFFLINE", error=FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        checkpoint.load("someone/model", revision="other")


# ---- made checkpoints


@pytest.fixture
def shape(golden_folder):
    return checkpoint.read_config(golden_folder / "model")


def tensors_of(folder: Path) -> dict:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def test_a_made_checkpoint_has_the_published_layout(shape, golden_folder, tmp_path):
    checkpoint.make_random(shape, tmp_path / "made", shards=3)
    official, made = tensors_of(golden_folder / "model"), tensors_of(tmp_path / "made")
    assert made.keys() == official.keys() | {"lm_head.weight"}  # which the published one has twice
    assert all(made[name].shape == t.shape and made[name].dtype == t.dtype for name, t in official.items())
    assert torch.equal(made["lm_head.weight"], made["transformer.wte.weight"])
    torch.testing.assert_close(made["freqs_cis"], official["freqs_cis"], rtol=0, atol=1e-5)
    index = json.loads((tmp_path / "made" / checkpoint.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in made.values())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["config.json", *names, checkpoint.INDEX]
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config.pop("weights").startswith("random") and config == checkpoint.official_config(shape, torch.float32)
    assert checkpoint.load(tmp_path / "made").config == shape


def test_the_large_shape_takes_what_the_published_one_does(tmp_path, monkeypatch):
    """15.65 GB in float32: 3,564,976,800 parameters, the head again, the rotations of 4,096 positions."""
    size = 4 * (3_564_976_800 + 346_030_080 + 4096 * 96)
    assert round(size / 1e9, 2) == 15.65
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(OSError, match=f"would take {checkpoint.readable(size)}, and .* has .* free"):
        checkpoint.make_random(RecurrentConfig.preset("huginn_3_5b"), tmp_path / "deep" / "made")
    assert not (tmp_path / "deep").exists()


def test_made_weights_are_those_of_a_fresh_model(shape, tmp_path):
    checkpoint.make_random(shape, tmp_path / "made")
    fresh = dict(RecurrentDepthLM(shape).named_parameters())
    for name, made in checkpoint.load(tmp_path / "made").named_parameters():
        if made.dim() == 1 or name.endswith("qk_bias"):
            assert torch.equal(made, fresh[name]), name
        else:
            assert made.std().item() == pytest.approx(fresh[name].std().item(), rel=0.05), name
            assert made.abs().max() <= 3.001 * fresh[name].std() * 1.1, name


def test_made_weights_depend_on_the_seed_and_not_on_the_shards(shape, tmp_path):
    for name, options in {"a": {}, "b": {"shards": 5}, "c": {"shards": 77}, "d": {"seed": 1}}.items():
        checkpoint.make_random(shape, tmp_path / name, **options)
    a, b, c, d = (tensors_of(tmp_path / name) for name in "abcd")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == len(c) == 77
    for name, t in a.items():
        assert torch.equal(t, b[name]) and torch.equal(t, c[name]), name
    assert not torch.equal(a[WTE], d[WTE])
    matrices = [t for t in a.values() if t.shape == (64, 64)]
    assert not torch.equal(matrices[0], matrices[1])


def test_making_weights_leaves_the_random_numbers_of_others_alone(shape, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    checkpoint.make_random(shape, tmp_path / "made")
    assert torch.equal(torch.rand(3), expected)


def test_shards_are_of_about_one_size(tmp_path):
    checkpoint.make_random(RecurrentConfig.preset("small"), tmp_path / "made", shards=4)
    sizes = [p.stat().st_size for p in (tmp_path / "made").glob("*.safetensors")]
    assert len(sizes) == 4 and max(sizes) < 1.3 * min(sizes)


def test_a_made_checkpoint_in_another_number_format(shape, tmp_path):
    checkpoint.make_random(shape, tmp_path / "made", dtype=torch.bfloat16, generation_config={"eos_token_id": [3]})
    model = checkpoint.load(tmp_path / "made")
    assert model.dtype == torch.bfloat16 and model.generation_config == {"eos_token_id": [3]}


def test_json_is_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "tokenizer_config.json").write_bytes('{"bos_token": "é"}'.encode())
    code = (
        "import sys; from pathlib import Path; from minirec.files.checkpoint import read_json;"
        "read_json(Path(sys.argv[1]))"
    )
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "tokenizer_config.json"], env=plain, check=True)


def test_a_made_checkpoint_may_go_where_a_link_points(shape, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    checkpoint.make_random(shape, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and checkpoint.load(tmp_path / "empty").config == shape


def test_a_made_checkpoint_overwrites_nothing(shape, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.md").write_text("mine")
    for path in (tmp_path / "full", tmp_path / "full" / "notes.md"):
        with pytest.raises(FileExistsError, match=path.name):
            checkpoint.make_random(shape, path)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.md"]
    (tmp_path / "empty").mkdir()
    checkpoint.make_random(shape, tmp_path / "empty")
    assert checkpoint.load(tmp_path / "empty").config == shape


@pytest.mark.parametrize("shards", [0, 78])
def test_shards_that_cannot_be(shape, tmp_path, shards):
    with pytest.raises(ValueError, match=f"shards is {shards}; it must be from 1 to 77"):
        checkpoint.make_random(shape, tmp_path / "made", shards=shards)


def test_a_made_checkpoint_is_there_whole_or_not_at_all(shape, tmp_path, monkeypatch):
    written = []

    def interrupted(tensors, path, **kwargs):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.make_random(shape, tmp_path / "made", shards=4)
    assert not list(tmp_path.iterdir())
