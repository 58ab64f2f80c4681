"""Checkpoints: what is saved comes back, and a file that does not fit is one clear error and no model."""

import ast
import copy
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from spoiling import spoilt_bytes, spoilt_json

import minirec
from minirec import RecurrentConfig, RecurrentDepthLM, diffusion_forcing, lossless_wavefront
from minirec.decoding import stop_tokens
from minirec.files import checkpoint, huginn, writing
from minirec.tasks import task_tokenizer

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


@pytest.mark.parametrize("folder", ["saved", "shards"])
def test_a_head_beside_a_tied_embedding_has_to_be_the_embedding(request, model, folder):
    """The published checkpoint holds both; with another head, config or weights are wrong."""
    folder = request.getfixturevalue(folder)
    sharded = (folder / checkpoint.INDEX).exists()
    file = folder / ("model-head.safetensors" if sharded else checkpoint.WEIGHTS)

    def put(head) -> None:
        if sharded:
            save_file({"lm_head.weight": head}, file)
            where = json.loads((folder / checkpoint.INDEX).read_text())["weight_map"]
            edit_json(folder / checkpoint.INDEX, weight_map=where | {"lm_head.weight": file.name})
        else:
            edit_tensors(folder, **{"lm_head.weight": head})

    head = model.lm_head.weight.detach().clone()
    put(head)
    assert_equal(model, checkpoint.load(folder))
    for wrong in (head + 1e-3, head[:-1].clone(), head.double()):
        put(wrong)
        assert_refused(folder, str(file), "lm_head.weight differs from transformer.wte.weight", "tie_embeddings true")
    edit_json(folder / "config.json", tie_embeddings=False)
    put(head + 1)
    loaded = checkpoint.load(folder)
    assert torch.equal(loaded.lm_head.weight, head + 1) and torch.equal(loaded.transformer.wte.weight, head)


def test_a_head_that_is_not_tied_is_not_ignored(small_model, tmp_path):
    small_model(dtype=torch.float32, tie_embeddings=False).save_pretrained(tmp_path)
    edit_tensors(tmp_path, **{"lm_head.weight": None})
    assert_refused(tmp_path, "lm_head.weight is missing", checkpoint.WEIGHTS)


@pytest.mark.parametrize("by_config", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_tied_or_untied_by_hand_the_weights_count(small_model, tmp_path, by_config, max_shard_size):
    model = copy.deepcopy(small_model(dtype=torch.float32, tie_embeddings=by_config))
    if by_config:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2, requires_grad=False)
    else:
        model.lm_head.weight = model.transformer.wte.weight
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = checkpoint.load(tmp_path)
    assert loaded.config.tie_embeddings != by_config
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) != by_config
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


# ---- models that are wrapped, or not what their config says


def test_a_wrapped_model_is_saved_without_its_wrapper(model, tmp_path):
    """None of these wrappers computes anything here; it is their names that matter."""
    part = copy.deepcopy(model)
    part.transformer.core_block[0] = torch.compile(part.transformer.core_block[0])
    wrapped = [torch.compile(model), torch.nn.DataParallel(model), torch.compile(torch.nn.DataParallel(model)), part]
    with mock.patch.object(checkpoint, "DistributedDataParallel", Parallel):
        for i, wrapper in enumerate([*wrapped, Parallel(torch.compile(model))]):
            checkpoint.save(wrapper, tmp_path / str(i))
            assert_equal(model, checkpoint.load(tmp_path / str(i)))


class Parallel(torch.nn.Module):
    """As DistributedDataParallel, which needs a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Wrapper(torch.nn.Module):
    """Of a library that minirec does not know."""

    def __init__(self, module):
        super().__init__()
        self.inner, self.config = module, module.config


class Quantized(torch.Tensor):
    """A tensor whose values are not what is stored."""


def spoilt(model, how: str):
    """A model that cannot be written as it is, and what of it the error names."""
    norm = model.transformer.ln_f
    if how == "unknown wrapper":
        return Wrapper(model), "inner"
    if how == "plain module":
        return torch.nn.Linear(2, 2), "Linear"
    if how == "reparametrized":
        torch.nn.utils.parametrizations.weight_norm(model.transformer.adapter)
        return model, "transformer.adapter"
    if how == "part replaced":
        model.transformer.adapter = torch.nn.Linear(32, 16, bias=True)
        return model, "transformer.adapter.bias"
    if how == "another shape":
        norm.weight = torch.nn.Parameter(torch.ones(17))
        return model, NORM
    if how == "meta":
        return model.to("meta"), WTE
    if how == "integers":
        norm.weight = torch.nn.Parameter(torch.ones(16, dtype=torch.int8), requires_grad=False)
        return model, NORM
    if how == "subclass":
        norm.weight = torch.nn.Parameter(norm.weight.detach().as_subclass(Quantized), requires_grad=False)
        return model, NORM
    with torch.no_grad():
        norm.weight[3] = {"nan": torch.nan, "infinite": -torch.inf}[how]
    return model, NORM


@pytest.mark.parametrize(
    "how",
    ["unknown wrapper", "plain module", "reparametrized", "part replaced", "another shape", "meta", "integers",
     "subclass", "nan", "infinite"],
)  # fmt: skip
def test_what_could_not_be_loaded_is_refused_before_anything_is_written(model, saved, how):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    wrong, named = spoilt(copy.deepcopy(model), how)
    with pytest.raises(ValueError, match=named):
        checkpoint.save(wrong, saved)
    with pytest.raises(ValueError, match=named):
        checkpoint.save(wrong, saved.parent / "none")
    assert not (saved.parent / "none").exists()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize("generation", [{"eos_token_id": "2"}, {"temperature": float("nan")}, {"eos_token_id": [99]}])
def test_a_generation_config_that_could_not_be_loaded_is_refused(model, saved, generation):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model.generation_config = generation
    with pytest.raises(ValueError):
        checkpoint.save(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


# ---- not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [WTE, NORM, "transformer.coda.0.attn.qk_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_have_to_be_finite(saved, name, value, dtype):
    tensors = {n: t.to(dtype) for n, t in load_file(saved / checkpoint.WEIGHTS).items()}
    assert name in tensors
    tensors[name].view(-1)[-1] = value
    save_file(tensors, saved / checkpoint.WEIGHTS)
    assert_refused(saved, str(saved / checkpoint.WEIGHTS), name, "NaN or infinities")


def test_weights_have_to_be_finite_in_the_requested_format(saved):
    edit_tensors(saved, **{NORM: torch.full((16,), 1e5)})
    assert checkpoint.load(saved, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=rf"{NORM} holds NaN or infinities \(float16\)"):
        checkpoint.load(saved, dtype="float16")


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


# ---- a save that is stopped

ONE, MANY = "5GB", "12KB"  # max_shard_size: a file, or shards


@pytest.fixture
def no_fsync(monkeypatch):
    """Only a power failure needs it, and it takes most of the time of a small save."""
    monkeypatch.setattr(writing.os, "fsync", lambda handle: None)


class At:
    """`with At(n, act)`: call act before the n-th line of minirec.files.writing that runs."""

    def __init__(self, n: int, act):
        self.left, self.act = n, act

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        if frame.f_code.co_filename != writing.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.act()
        return self.trace


def lines_of(action) -> int:
    """How many lines of minirec.files.writing an action runs."""
    with At(0, None) as counter:
        action()
    return -counter.left


def interrupted(n: int, action) -> None:
    """Do an action that Ctrl-C stops before its n-th line."""

    def stop():
        raise KeyboardInterrupt

    try:
        with At(n, stop):
            action()
    except KeyboardInterrupt:
        return
    pytest.fail("it was not interrupted")


def killed(n: int, action) -> None:
    """Do an action in a process that dies before its n-th line, as by kill -9."""
    if (child := os.fork()) == 0:
        with At(n, lambda: os._exit(9)):
            action()
        os._exit(0)
    os.waitpid(child, 0)


def two_models(small_model) -> tuple[RecurrentDepthLM, RecurrentDepthLM]:
    """Models of one shape that differ in weights, config and generation config."""
    old = copy.deepcopy(small_model(0, dtype=torch.float32))
    new = copy.deepcopy(small_model(1, dtype=torch.float32, mean_recurrence=5, rope_base=77.0))
    old.generation_config = {"eos_token_id": [3]}
    return old, new


def which_is_in(folder: Path, *models: RecurrentDepthLM) -> int:
    """Which of these models the folder holds, whole: config, weights and generation config."""
    loaded = checkpoint.load(folder)
    (found,) = [i for i, m in enumerate(models) if m.config == loaded.config]
    assert_equal(models[found], loaded)
    assert loaded.generation_config == models[found].generation_config
    return found


CHANGES = pytest.mark.parametrize(("before", "after"), [(ONE, ONE), (MANY, MANY), (MANY, ONE), (ONE, MANY)])


@CHANGES
@pytest.mark.parametrize("how", ["interrupt", "kill"])
@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("no_fsync")
def test_a_save_that_is_stopped_leaves_the_old_checkpoint_or_the_new(small_model, tmp_path, before, after, how, every):
    """Stopped before any line of the code that writes files; and the next save leaves nothing but its own files."""
    models = old, new = two_models(small_model)
    clean = tmp_path / "clean"
    old.save_pretrained(clean, max_shard_size=before)
    total = lines_of(lambda: new.save_pretrained(shutil.copytree(clean, tmp_path / "count"), max_shard_size=after))
    found = []
    for n in [*range(1, total - every, every), *range(total - every, total + 1, max(1, every // 5))]:
        folder = shutil.copytree(clean, tmp_path / str(n))
        stopped = {"interrupt": interrupted, "kill": killed}[how]
        stopped(n, lambda folder=folder: new.save_pretrained(folder, max_shard_size=after))
        found.append(which_is_in(folder, *models))
        old.save_pretrained(folder, max_shard_size=ONE)
        assert {p.name for p in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}, n
        shutil.rmtree(folder)
    assert found == sorted(found) and set(found) == {0, 1}, "old up to one line, new from then on"


@pytest.mark.parametrize("after", [ONE, MANY])
@pytest.mark.usefixtures("no_fsync")
def test_a_first_save_that_is_stopped_leaves_nothing_or_everything(small_model, tmp_path, after):
    _, new = two_models(small_model)
    total = lines_of(lambda: new.save_pretrained(tmp_path / "count", max_shard_size=after))
    for n in range(1, total + 1, 17):
        folder = tmp_path / str(n)
        interrupted(n, lambda folder=folder: new.save_pretrained(folder, max_shard_size=after))
        if folder.exists() and checkpoint.locate(folder) and (folder / "config.json").exists():
            assert_equal(new, checkpoint.load(folder))
        new.save_pretrained(folder)
        assert_equal(new, checkpoint.load(folder))


@pytest.mark.usefixtures("no_fsync")
def test_reading_that_finishes_a_save_may_be_stopped_too(small_model, tmp_path):
    models = old, new = two_models(small_model)
    old.save_pretrained(tmp_path / "saved", max_shard_size=MANY)
    committed = tmp_path / "committed"

    def kept(folder, owned):
        if (folder / writing.SAVED).exists():
            shutil.copytree(folder, committed)
        publish(folder, owned)

    publish = writing._publish
    with mock.patch.object(writing, "_publish", kept):
        new.save_pretrained(tmp_path / "saved", max_shard_size=MANY)
    total = lines_of(lambda: writing.publish(shutil.copytree(committed, tmp_path / "count"), checkpoint.OWNED))
    for n in range(1, total + 1, 3):
        folder = shutil.copytree(committed, tmp_path / str(n))
        interrupted(n, lambda folder=folder: checkpoint.locate(folder))
        assert which_is_in(folder, *models) == 1
        assert {p.name for p in folder.iterdir() if p.name.startswith(".")} <= {".lock"}, "which holds nobody up"


@pytest.mark.usefixtures("no_fsync")
def test_a_reader_meets_a_checkpoint_of_one_save(small_model, tmp_path):
    """While another process saves every few moments, now one file and now shards."""
    models = two_models(small_model)
    models[0].save_pretrained(tmp_path)
    child = os.fork()
    if child == 0:
        for i in range(10**6):
            time.sleep(0.05)
            models[i % 2].save_pretrained(tmp_path, max_shard_size=(ONE, MANY)[i % 4 // 2])
    try:
        assert {which_is_in(tmp_path, *models) for _ in range(40)} == {0, 1}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    which_is_in(tmp_path, *models)


def test_while_one_process_saves_another_may_not(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "PATIENCE", 0.1)
    old, new = two_models(small_model)
    old.save_pretrained(tmp_path)
    with writing.locked(tmp_path / writing.LOCK, "is saving to it"):
        with pytest.raises(OSError, match=rf"{tmp_path} is in use: process {os.getpid()} on .* is saving to it"):
            new.save_pretrained(tmp_path)
        assert which_is_in(tmp_path, old, new) == 0
    new.save_pretrained(tmp_path)


def test_shards_never_take_the_names_of_older_ones(small_model, tmp_path):
    """So that the old index and its shards stay whole for every library until the new index is there."""
    names = []
    for seed in range(3):
        small_model(seed, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size=MANY)
        names.append({p.name for p in tmp_path.glob("model-*.safetensors")})
        assert set(json.loads((tmp_path / checkpoint.INDEX).read_text())["weight_map"].values()) == names[-1]
    assert not names[0] & names[1] and not names[1] & names[2]
    assert all(re.fullmatch(r"model-0000\d-of-0000\d\.safetensors", name) for name in names[0] | names[2])


def test_what_a_killed_write_left_is_removed_but_not_what_a_living_one_writes(tmp_path):
    with writing.temporary(tmp_path, "file.txt") as living:
        left = tmp_path / ".file.txt.abcd1234.part"
        left.mkdir()
        (left / "file.txt").write_text("half")
        writing.write_whole(tmp_path / "file.txt", lambda path: Path(path).write_text("whole"))
        assert not left.exists() and living.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("names", ["[", "{}", '["../outside.json"]', '["config.json", "notes.md"]', "[1]", "[" * 10**5])
def test_a_folder_from_somebody_else_moves_no_other_files(model, saved, names):
    (saved / ".saved").mkdir()
    (saved / ".saved" / "files.json").write_text(names)
    (saved / ".saved" / "notes.md").write_text("theirs")
    assert_refused(saved, "files.json does not list the files of a checkpoint")
    assert not (saved / "notes.md").exists()


# ---- a disk that refuses


def limited(size: int, action) -> OSError:
    """What an action raises in a process whose files may not grow beyond size, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError) as refused:
            action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    return refused.value


@CHANGES
@pytest.mark.parametrize("size", [0, 500, 5000])  # a file of weights takes more, config.json about 1,500
def test_a_full_disk_is_an_error_that_names_the_file(small_model, tmp_path, before, after, size):
    old, new = two_models(small_model)
    old.save_pretrained(tmp_path, max_shard_size=before)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    error = limited(size, lambda: new.save_pretrained(tmp_path, max_shard_size=after))
    assert Path(error.filename).parent in (tmp_path, tmp_path.parent) and "part" not in error.filename
    assert "\n" not in str(error) and error.strerror == os.strerror(error.errno)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_a_full_disk_while_one_file_is_written(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    error = limited(10, lambda: writing.write_json(tmp_path / "a.json", {"key": "much longer than that"}))
    assert error.filename == str(tmp_path / "a.json") and (tmp_path / "a.json").read_text() == "{}"
    error = limited(10, lambda: writing.write_whole(tmp_path / "tokenizer.json", task_tokenizer().save))
    assert error.filename == str(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def nobody():
    """A folder, and the rights of a user who owns nothing, for a test that root runs."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    yield folder, (lambda: os.seteuid(65534) if root else None)
    if root:
        os.seteuid(0)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_without_permission_the_error_says_so(small_model, nobody):
    folder, drop = nobody
    model = small_model(dtype=torch.float32)
    model.save_pretrained(folder / "saved")
    (folder / "saved" / checkpoint.WEIGHTS).chmod(0)
    (folder / "saved").chmod(0o555)
    drop()
    for action, named in [
        (lambda: checkpoint.load(folder / "saved"), folder / "saved" / checkpoint.WEIGHTS),
        (lambda: model.save_pretrained(folder / "saved"), folder / "saved"),
        (lambda: writing.write_json(folder / "saved" / "a.json", {}), folder / "saved" / "a.json"),
    ]:
        with pytest.raises(PermissionError) as refused:
            action()
        assert refused.value.filename == str(named) and "Permission denied" in str(refused.value)


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


SIZES = ["n_embd", "n_heads", "intermediate_size", "vocab_size", "block_size", "n_layers_in_prelude",
         "n_layers_in_recurrent_block", "n_layers_in_coda", "mean_recurrence", "mean_backprop_depth"]  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [True, False, 0, -1, 10**9, 6 * 10**9, 10**30, 2.0, "2", None, [2], {}])
def test_a_size_that_no_model_has_is_named_at_once(saved, name, value):
    edit_json(saved / "config.json", **{name: value})
    assert_refused(saved, f"config.json: {name} is {value!r}; it must be a whole number from 1 to")


def test_a_large_number_of_layers_is_named_at_once(saved):
    for name in SIZES[5:8]:
        edit_json(saved / "config.json", **{name: 10**7})
        assert_refused(saved, f"{name} is 10000000")
        edit_json(saved / "config.json", **{name: 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_eps": float("inf")}, "norm_eps is inf"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"norm_eps": 1e-46}, "norm_eps is 1e-46"),  # zero in float32
        ({"norm_eps": True}, "norm_eps is True"),
        ({"rope_base": 1e300}, "rope_base is 1e+300"),
        ({"rope_base": "50000"}, "rope_base is '50000'"),
        ({"qk_bias": 1}, "qk_bias is 1; it must be true or false"),
        ({"qk_bias": "false"}, "qk_bias is 'false'"),
        ({"tie_embeddings": None}, "tie_embeddings is None; it must be true or false"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'; it must be a whole number from 0 to 22, a list of such numbers"),
        ({"eos_token_id": [2, "3"]}, "eos_token_id is [2, '3']"),
        ({"eos_token_id": [2, True]}, "eos_token_id is [2, True]"),
        ({"eos_token_id": 23}, "eos_token_id is 23"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"bos_token_id": [1]}, "bos_token_id is [1]"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"state_init": "zero"}, "state_init is 'zero'; minirec supports 'like-init'"),
        ({"init_values": {"embed_scale": 1.0}}, "init_values.embed_scale is 1.0; minirec supports 4.0"),
        ({"init_values": {"std": "x"}}, "init_values.std is 'x'"),
        ({"model_type": "\x1b[2Jx" * 500}, "'\\x1b[2Jx"),
        ({"model_type": ["huginn_raven"]}, "model_type is ['huginn_raven']"),
        ({"nonlin_name": "\x9b2J"}, "nonlin_name is '\\x9b2J'"),
    ],
)
def test_a_value_that_is_none_is_named(saved, changes, words):
    edit_json(saved / "config.json", **changes)
    assert_refused(saved, "config.json: ", words)


@pytest.mark.parametrize("stop", [None, 3, [3], [3, 4], []])
@pytest.mark.parametrize("generation", ["absent", "silent", None, 5, [5, 6], []])
def test_stop_tokens_may_be_one_several_or_none(saved, stop, generation):
    """generation_config.json counts where it says something, null included, as in transformers."""
    edit_json(saved / "config.json", eos_token_id=stop)
    path = saved / "generation_config.json"
    if generation == "absent":
        path.unlink()
    else:
        path.write_text(json.dumps({"top_k": 5} if generation == "silent" else {"eos_token_id": generation}))
    said = stop if generation in ("absent", "silent") else generation
    expected = set() if said is None else {said} if isinstance(said, int) else set(said)
    model = checkpoint.load(saved)
    assert stop_tokens(model) == expected
    model.save_pretrained(saved.parent / "again")
    assert stop_tokens(checkpoint.load(saved.parent / "again")) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"diffusion_forcing": None},
        {"lossless_wavefront": None},
        {"diffusion_forcing": {}},
        {"diffusion_forcing": {"inner_steps": None, "kv": None}},
        {"bos_token_id": None, "pad_token_id": 0, "eos_token_id": None, "temperature": 0.7, "top_p": None},
    ],
)
def test_legal_settings_are_read_and_used(saved, values):
    (saved / "generation_config.json").write_text(json.dumps(values))
    model = checkpoint.load(saved)
    for sampler in (diffusion_forcing, lossless_wavefront):
        assert len(sampler.generate(model, [1, 2], 3, stop_tokens=()).tokens) == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"eos_token_id": [2, 99]}, "eos_token_id is [2, 99]"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id is {'a': 1}"),
        ({"diffusion_forcing": 3}, "diffusion_forcing is 3; it must be an object or null"),
        ({"diffusion_forcing": []}, "diffusion_forcing is []"),
        ({"diffusion_forcing": {"inner_steps": 0}}, "diffusion_forcing.inner_steps is 0"),
        ({"diffusion_forcing": {"inner_steps": True}}, "diffusion_forcing.inner_steps is True"),
        ({"diffusion_forcing": {"exit_threshold": "0.2"}}, "diffusion_forcing.exit_threshold is '0.2'"),
        ({"diffusion_forcing": {"exit_threshold": 1e400}}, "diffusion_forcing.exit_threshold is inf"),
        ({"diffusion_forcing": {"kv": "\x1b[2J"}}, "diffusion_forcing.kv is '\\x1b[2J'; it must be 'full' or 'shared'"),
        ({"lossless_wavefront": {"guess_after": 10**30}}, "lossless_wavefront.guess_after is 1000"),
    ],
)
def test_a_setting_that_is_none_is_named(saved, values, words):
    (saved / "generation_config.json").write_text(json.dumps(values))
    assert_refused(saved, "generation_config.json: ", words)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", checkpoint.INDEX])
def test_json_that_is_nested_too_deeply(saved, file):
    (saved / file).write_text('{"a":' * 10**5 + "1" + "}" * 10**5)
    assert_refused(saved, str(saved / file), "nested too deeply")


def test_names_of_tensors_reach_no_terminal(saved, shards):
    """A tensor's name is any text, and errors show it."""
    evil = "\x1b]52;c;ZXZpbA==\x07\x9b2J\n" + "x" * 5000
    edit_tensors(saved, **{evil: torch.zeros(1)})
    assert_refused(saved, "\\x1b]52;c;ZXZpbA==\\x07\\x9b2J x")
    edit_json(saved / "config.json", model_type="llama")
    assert_refused(saved, "it holds")
    where = json.loads((shards / checkpoint.INDEX).read_text())["weight_map"]
    for changed in ({evil: where[WTE]}, {WTE: evil + ".safetensors"}):
        edit_json(shards / checkpoint.INDEX, weight_map=where | changed)
        assert_refused(shards, "\\x1b]52")


# ---- files that somebody spoilt at random


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", checkpoint.INDEX, ".saved/files.json"])
@pytest.mark.parametrize("spoil", ["json", "bytes"])
def test_a_spoilt_file_is_loaded_or_one_clear_error(shards, file, spoil):
    random = Random(f"{file} {spoil}")
    if file == ".saved/files.json":
        (shards / ".saved").mkdir()
        (shards / file).write_text(json.dumps([checkpoint.INDEX, "config.json"]))
    content, refused = (shards / file).read_bytes(), 0
    for _ in range(60):
        if spoil == "json":
            (shards / file).write_text(json.dumps(spoilt_json(json.loads(content), random)))
        else:
            (shards / file).write_bytes(spoilt_bytes(content, random))
        try:
            checkpoint.load(shards)
        except (ValueError, OSError, MemoryError) as error:
            assert str(error).isprintable() and len(str(error)) < 1000, error
            refused += 1
        (shards / file).parent.mkdir(exist_ok=True)
        (shards / file).write_bytes(content)
    assert refused > 5


def test_spoilt_weights_are_loaded_or_one_clear_error(saved):
    random, path = Random(0), saved / checkpoint.WEIGHTS
    content = path.read_bytes()
    for _ in range(60):
        path.write_bytes(spoilt_bytes(content[:3000], random) + content[3000:])
        try:
            checkpoint.load(saved)
        except (ValueError, OSError, MemoryError) as error:
            assert str(error).isprintable() and len(str(error)) < 1000, error


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
                banned = {"torch.load", "torch.save", "torch.hub", "numpy.load", "np.load"}
                if path.parts[-2:] == ("files", "convert.py"):  # reads a pickle when told to, and runs no code of it
                    banned -= {"torch.load"}
                    assert 'torch.load(file, map_location="cpu", weights_only=True)' in path.read_text(encoding="utf-8")
                assert name not in banned, f"{path.name}: {name}"


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
    model = RecurrentDepthLM(RecurrentConfig(**shape))
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
    assert config.pop("weights").startswith("random") and config == huginn.official_config(shape, torch.float32)
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

    def interrupted(tensors, path, metadata):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.make_random(shape, tmp_path / "made", shards=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("no_fsync")
def test_a_made_checkpoint_may_be_made_again_after_it_was_killed(shape, tmp_path):
    total = lines_of(lambda: checkpoint.make_random(shape, tmp_path / "count", shards=2))
    for n in range(1, total, 19):
        folder = tmp_path / str(n)
        killed(n, lambda folder=folder: checkpoint.make_random(shape, folder, shards=2))
        if not folder.exists() or not (checkpoint.locate(folder) / "config.json").exists():
            checkpoint.make_random(shape, folder, shards=2)
        assert checkpoint.load(folder).config == shape
        assert {p.name for p in folder.iterdir()} - {".lock"} == {p.name for p in (tmp_path / "count").iterdir()}
