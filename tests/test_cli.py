"""The command line as a user meets it: what it prints, what it writes, and how it fails."""

import argparse
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import image
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import minirec
from minirec import (
    RecurrentConfig,
    RecurrentDepthLM,
    autoregressive,
    diffusion_forcing,
    lossless_wavefront,
    tasks,
    training,
)
from minirec.config import PRESETS
from minirec.files import checkpoint, machine
from minirec.files.tokenizer import (
    HUGINN_TEMPLATE,
    ChatTemplate,
    huginn_special_ids,
    read_tokenizer,
    stand_in_tokenizer,
)
from minirec.kv_cache import bytes_per_token
from minirec.tasks import BEGIN, task_tokenizer
from minirec.tools import cli
from minirec.tools.cli import demo
from minirec.tools.cli import options as shared
from minirec.tools.cli.samplers import SAMPLERS
from minirec.tools.cli.terminal import Stream, printable

STORY = "Mia has 12 pears. First Mia buys 5 more pears. How many pears does Mia have?"
FEW_STEPS = "--steps 3 --batch-tokens 250 --evaluate-on 4 --log-every 1 --save-every 1 --families words hops".split()


@pytest.fixture
def minirec_(capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*args):
        code = cli.main([str(a) for a in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped checkpoint, to change."""
    return copy_of_tiny(tmp_path / "model")


def copy_of_tiny(path, **changes):
    shutil.copytree(checkpoint.locate("tiny"), path)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def calls(monkeypatch):
    """What the samplers are called with."""
    seen = []
    for name, sampler in SAMPLERS.items():

        def spy(model, prompt, *args, sampler=sampler, name=name, **options):
            seen.append((name, prompt, args, {k: v for k, v in options.items() if k != "on_token"}))
            return sampler(model, prompt, *args, **options)

        monkeypatch.setitem(SAMPLERS, name, spy)
    return seen


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


# ---- demo


def test_demo_shows_answers_and_a_table_and_draws_the_picture(minirec_, tmp_path):
    picture = tmp_path / "wave.png"
    code, out, err = minirec_("demo", "--problems", 2, "--seed", 5, "--out", picture)
    assert (code, err) == (0, "")
    model, problems = RecurrentDepthLM.from_pretrained("tiny"), tasks.heldout(2, seed=5)
    table = {line[:34].strip(): line[34:].split() for line in out.splitlines()}
    reference = [autoregressive.generate(model, p.prompt, demo.ROOM) for p in problems]
    forced = [diffusion_forcing.generate(model, p.prompt, demo.ROOM) for p in problems]
    lossless = [lossless_wavefront.generate(model, p.prompt, demo.ROOM) for p in problems]
    for column, generations in enumerate([reference, lossless, forced]):
        tokens = sum(len(g.tokens) for g in generations)
        right = sum(p.is_correct(g.tokens) for p, g in zip(problems, generations, strict=True))
        same = sum(g.tokens == r.tokens for g, r in zip(generations, reference, strict=True))
        assert table["exact match of the answer"][column] == f"{right}/2"
        assert table["same tokens as autoregressive"][column] == f"{same}/2"
        passes, calls = sum(g.passes for g in generations) / tokens, sum(g.decodes for g in generations) / tokens
        assert table["recurrent-block passes per token"][column] == f"{passes:.2f}"
        assert table["coda calls per token"][column] == f"{calls:.2f}"
        for p, g in zip(problems, generations, strict=True):
            assert p.text in out and f"the right answer is {p.answer}" in out
            assert task_tokenizer().decode(g.tokens) in out
    assert table["speed-up"][0] == table["speed-up, median of the problems"][0] == "1.00x"
    assert image.imread(picture).shape[1] == 1200
    assert os.listdir(tmp_path) == ["wave.png"]


def test_demo_speed_up_compares_tokens_per_second(capsys):
    def made(n):
        return autoregressive.Generation(tokens=[BEGIN + 2] * n, depth=[8] * n, passes=8 * n, decodes=n)

    # 10 tokens in 1 s and 30 in 5 s; then 10 in 0.5 s and 20 in 0.5 s: ratios 2 and 40/6, totals 40/6 and 30
    runs = {"slow": [(made(10), 1.0), (made(30), 5.0)], "fast": [(made(10), 0.5), (made(20), 0.5)]}
    demo._print_comparison(tasks.heldout(2), runs)
    table = {line[:34].strip(): line[34:].split() for line in capsys.readouterr().out.splitlines()}
    assert table["tokens per second"] == ["7", "30"]
    assert table["speed-up"] == ["1.00x", "4.50x"]
    assert table["speed-up, median of the problems"] == ["1.00x", "4.33x"]
    assert table["same tokens as autoregressive"] == ["2/2", "1/2"]


def test_demo_passes_its_options_on(minirec_, tmp_path, calls):
    out = tmp_path / "w.png"
    args = "--problems 1 --num-steps 6 --inner-steps 2 --exit-threshold 0.1 --guess-after 3".split()
    assert minirec_("demo", *args, "--out", out)[0] == 0
    assert {name for name, *_ in calls} == {"autoregressive", "lossless", "diffusion", "adaptive"}
    own = {"diffusion": {"inner_steps": 2, "exit_threshold": 0.1}, "lossless": {"guess_after": 3}}
    for name, _, _, options in calls:
        expected = {"num_steps": 6} | own.get(name, {})
        if name != "autoregressive":  # which also runs at every depth up to the smallest one that is enough
            assert {k: v for k, v in options.items() if k != "trace"} == expected
    assert {options["num_steps"] for name, *_, options in calls if name == "autoregressive"} >= {1, 6}


def test_demo_needs_the_task_vocabulary(minirec_, folder, tmp_path):
    Tokenizer(models.WordLevel({"<pad>": 0, "Mia": 1}, unk_token="<pad>")).save(str(folder / "tokenizer.json"))
    assert_one_error(minirec_("demo", "--model", folder, "--out", tmp_path / "w.png"), "another vocabulary")


# ---- generate


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_generate_prints_what_the_sampler_gives(minirec_, sampler):
    model = RecurrentDepthLM.from_pretrained("tiny")
    prompt = [BEGIN, *task_tokenizer().encode(STORY).ids]
    expected = SAMPLERS[sampler](model, prompt, 40)
    code, out, err = minirec_("generate", "--sampler", sampler, "--max-new-tokens", 40, "--stats", STORY)
    assert (code, out) == (0, task_tokenizer().decode(expected.tokens) + "\n")
    assert f"{len(expected.tokens)} tokens in" in err
    assert f" {expected.passes} recurrent-block passes" in err
    assert f"{min(expected.depth)} to {max(expected.depth)}" in err


def test_generate_streams_the_text_piece_by_piece(minirec_, folder, monkeypatch):
    pieces = []

    class Recorder(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return super().write(text)

    args = ["generate", "--model", folder, "--max-new-tokens", 12, STORY]
    _, whole, _ = minirec_(*args, "--no-stream")
    monkeypatch.setattr(sys, "stdout", Recorder())
    cli.main([str(a) for a in args])
    assert "".join(pieces) == whole
    assert sum(bool(p.strip()) for p in pieces) > 5
    pieces.clear()
    cli.main([str(a) for a in [*args, "--no-stream"]])
    assert sum(bool(p.strip()) for p in pieces) == 1


def test_stream_waits_for_a_whole_character(capsys):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = tokenizer.encode("aé").ids
    assert len(ids) == 3  # é is two bytes
    stream, shown = Stream(tokenizer), []
    for token in ids:
        stream.add(token)
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "é"]


def test_generate_reads_standard_input(minirec_, folder, monkeypatch):
    args = ["generate", "--model", folder, "--max-new-tokens", 5]
    expected = minirec_(*args, STORY)
    monkeypatch.setattr(sys, "stdin", io.StringIO(STORY + "\n"))
    assert minirec_(*args, "-") == expected


def test_generate_begins_the_prompt_as_the_model_was_trained(minirec_, folder, tmp_path, calls):
    words = task_tokenizer().encode(STORY).ids
    for name, bos, first in [("with", 1, [1]), ("other", 2, [2]), ("without", None, [])]:
        path = copy_of_tiny(tmp_path / name, bos_token_id=bos)
        assert minirec_("generate", "--model", path, "--max-new-tokens", 3, STORY)[0] == 0
        assert calls[-1][1] == first + words


def test_generate_passes_its_options_on(minirec_, folder, calls):
    assert minirec_("generate", "--model", folder, "--max-new-tokens", 4, STORY)[0] == 0
    assert calls[-1][0] == "diffusion" and calls[-1][2] == (4,)
    assert calls[-1][3] == {"temperature": 0.0, "seed": 0}  # the rest is left to the library
    args = (
        "--sampler diffusion --num-steps 6 --inner-steps 2 --exit-threshold 0.2 --temperature 0.7 --top-k 9 "
        "--top-p 0.9 --min-p 0.05 --repetition-penalty 1.1 --seed 4 --kv shared --kv-slots 2 --max-new-tokens 5"
    )
    assert minirec_("generate", "--model", folder, *args.split(), STORY)[0] == 0
    assert calls[-1][3] == {
        "num_steps": 6, "inner_steps": 2, "exit_threshold": 0.2, "temperature": 0.7, "top_k": 9, "top_p": 0.9,
        "min_p": 0.05, "repetition_penalty": 1.1, "seed": 4, "kv": "shared", "kv_slots": 2,
    }  # fmt: skip
    for sampler, own in {
        "adaptive": {"criterion": "argmax-stability", "threshold": 3},
        "speculative": {"draft_steps": 2, "lookahead": 3},
        "lossless": {"guess_after": 2},
    }.items():
        words = [word for name, value in own.items() for word in (f"--{name.replace('_', '-')}", value)]
        assert minirec_("generate", "--model", folder, "--sampler", sampler, *words, STORY)[0] == 0
        assert calls[-1][0] == sampler and own.items() <= calls[-1][3].items()


def test_generate_in_another_number_format(minirec_, folder, monkeypatch):
    loaded = []
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    assert minirec_("generate", "--model", folder, "--dtype", "bfloat16", "--max-new-tokens", 2, STORY)[0] == 0
    assert loaded[0].dtype == torch.bfloat16


# ---- chat


@pytest.fixture
def talker(small_model, tmp_path):
    """A small random model with a chat template, and the text files to go with it."""
    ids, path = huginn_special_ids(320), tmp_path / "talker"
    model = small_model(dtype=torch.float32, vocab_size=320, block_size=200, bos_token_id=ids["begin_text"])
    model.save_pretrained(path)
    stand_in_tokenizer(320).save(str(path / "tokenizer.json"))
    values = {"chat_template": HUGINN_TEMPLATE, "bos_token": "<|begin_text|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    return path


@pytest.fixture
def say(minirec_, monkeypatch, talker):
    """Pipe lines into a chat: exit code, stdout, stderr."""

    def run(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return minirec_("chat", "--model", talker, "--max-new-tokens", 6, *options)

    return run


def test_chat_answers_in_the_conversation_so_far(say, talker, calls):
    code, out, err = say("Hello!", "", "Go on.", "/new", "Hello!", "/quit", "never read")
    assert (code, err) == (0, "")
    tokenizer = read_tokenizer(talker)
    template, model = ChatTemplate(talker, tokenizer), checkpoint.load(talker)
    messages, answers = [], []
    for line in ["Hello!", "Go on."]:
        messages.append({"role": "user", "content": line})
        prompt = template.encode(messages)
        assert calls[len(answers)][1] == prompt
        answers.append(tokenizer.decode(diffusion_forcing.generate(model, prompt, 6, stop_tokens=()).tokens))
        messages.append({"role": "Huginn", "content": answers[-1]})
    assert out == "".join(answer + "\n" for answer in [*answers, answers[0]])
    assert len(calls) == 3 and calls[2][1] == calls[0][1]


def test_chat_ends_where_its_input_does(say):
    assert say("/quit") == say() == (0, "", "")


def test_chat_tells_the_model_what_it_is(say, talker, calls):
    assert say("Hi", "/new", "Hi", options=["--system", "Be short."])[0] == 0
    template = ChatTemplate(talker, read_tokenizer(talker))
    expected = template.encode([{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}])
    assert [prompt for _, prompt, *_ in calls] == [expected] * 2


def test_chat_stops_at_the_end_of_a_turn_and_at_the_stop_tokens_of_the_checkpoint(say, talker, calls):
    assert say("Hi")[0] == 0
    assert calls[-1][3]["stop_tokens"] == {huginn_special_ids(320)["end_turn"]}
    (talker / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert say("Hi")[0] == 0
    assert calls[-1][3]["stop_tokens"] == {huginn_special_ids(320)["end_turn"], 7, 9}


def test_chat_passes_its_options_on(say, calls):
    options = "--sampler adaptive --num-steps 3 --threshold 0.5 --temperature 0.7 --seed 3 --kv shared --kv-slots 2"
    assert say("Hi", options=options.split())[0] == 0
    name, _, (room,), passed = calls[-1]
    passed.pop("stop_tokens")
    assert (name, room) == ("adaptive", 6)
    expected = {"num_steps": 3, "threshold": 0.5, "temperature": 0.7, "seed": 3, "kv": "shared", "kv_slots": 2}
    assert passed == expected


def test_chat_goes_on_where_the_context_is_full(say):
    """One line says so; the conversation before stays as it was, and another one can be begun."""
    long = "x" * 200
    code, out, err = say("Hi", long, "/new", "Hi")
    assert code == 0
    assert re.fullmatch(r"minirec: \d+ tokens of conversation .* context of 200; /new starts another one\n", err)
    first, second = out.splitlines()
    assert first == second
    assert say("Hi", long, "Hi")[1] == say("Hi", "Hi")[1]


def test_chat_uses_the_room_that_is_left(say, talker, calls):
    around = len(ChatTemplate(talker, read_tokenizer(talker)).encode([{"role": "user", "content": ""}]))
    for left in (3, 1):
        assert say("x" * (200 - around - left))[2] == "" and calls[-1][2] == (left,)
    code, out, err = say("x" * (200 - around))
    assert (code, out) == (0, "") and "no room" in err and len(calls) == 2


def test_ctrl_c_ends_an_answer_and_not_the_chat(say, talker, monkeypatch, calls):
    add, added = Stream.add, []

    def interrupted(self, token):
        add(self, token)
        added.append(token)
        if len(added) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "add", interrupted)
    code, out, err = say("Hello!", "Go on.")
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    tokenizer = read_tokenizer(talker)
    said = {"role": "Huginn", "content": tokenizer.decode(added[:3])}  # what was said until then is remembered
    asked = [{"role": "user", "content": text} for text in ("Hello!", "Go on.")]
    assert calls[1][1] == ChatTemplate(talker, tokenizer).encode([asked[0], said, asked[1]])


def test_chat_greets_a_person_only(talker, minirec_, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("/quit\n"))
    code, out, _ = minirec_("chat", "--model", talker)
    assert code == 0 and out.endswith("> ") and "/quit" in out and "Ctrl-C" in out


def test_chat_needs_a_template(minirec_):
    assert_one_error(minirec_("chat", "--model", "tiny"), "no chat template")


# ---- make-checkpoint


def test_make_checkpoint_writes_what_the_other_commands_read(minirec_, tmp_path):
    code, out, _ = minirec_("make-checkpoint", "--preset", "tiny", "--shards", 3, "--seed", 4, tmp_path / "made")
    assert code == 0 and str(tmp_path / "made") in out
    assert len(list((tmp_path / "made").glob("model-*-of-00003.safetensors"))) == 3
    checkpoint.make_random(RecurrentConfig.preset("tiny"), tmp_path / "same", seed=4)
    assert_same_weights(weights(tmp_path / "made"), weights(tmp_path / "same"))
    assert minirec_("generate", "--model", tmp_path / "made", "--max-new-tokens", 3, STORY)[0] == 0
    assert "random, by minirec make-checkpoint" in minirec_("info", tmp_path / "made")[1]
    assert_one_error(minirec_("make-checkpoint", "--preset", "tiny", tmp_path / "made"), "made is there already")


def test_make_checkpoint_into_the_folder_where_one_is(minirec_, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    assert minirec_("make-checkpoint", "--preset", "tiny", ".")[0] == 0
    assert_one_error(minirec_("make-checkpoint", "--preset", "tiny", tmp_path / "link"), "empty is there already")
    assert minirec_("info", tmp_path / "link")[0] == 0 and (tmp_path / "empty" / "tokenizer.json").exists()


def test_a_terminal_that_cannot_show_a_token_gets_something_else(talker):
    command = [sys.executable, "-m", "minirec.tools.cli", "generate", "--model", talker, "x", "--seed", "3"]
    command += ["--temperature", "1", "--max-new-tokens", "8"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0 and b"?" in done.stdout, done.stderr


@pytest.mark.parametrize("device", ["privateuseone", "hpu", "cuda:99", "nothing"])
def test_a_device_that_is_not_here_is_one_error(minirec_, device):
    assert_one_error(minirec_("generate", "x", "--device", device), f"'{device}' is not available here")


def test_a_prompt_that_is_not_utf_8_is_refused(minirec_):
    assert_one_error(minirec_("generate", os.fsdecode(b"Mia \xff")), "is not UTF-8")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of stdin, by the locale
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_nor_may_it_come_through_a_pipe(minirec_, talker, monkeypatch, command, errors):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Mia \xff\n"), encoding="utf-8", errors=errors))
    prompt = ["-"] if command == "generate" else []
    assert_one_error(minirec_(command, *prompt, "--model", talker), "the prompt is not UTF-8")


def test_make_checkpoint_can_be_talked_to(minirec_, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", dict(n_embd=16, n_heads=2, intermediate_size=24, vocab_size=300))
    path = tmp_path / "made"
    assert minirec_("make-checkpoint", "--preset", "small", "--dtype", "bfloat16", path)[0] == 0
    model, ids = checkpoint.load(path), huginn_special_ids(300)
    assert model.dtype == torch.bfloat16 and model.config.bos_token_id == ids["begin_text"]
    assert set(model.generation_config["eos_token_id"]) == {ids["begin_text"], ids["end_text"], ids["end_turn"]}
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    code, out, _ = minirec_("chat", "--model", path, "--max-new-tokens", 3, "--num-steps", 2)
    assert code == 0 and out.strip()


def test_make_checkpoint_refuses_what_the_disk_cannot_hold(minirec_, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: argparse.Namespace(free=3 * 2**30))
    result = minirec_("make-checkpoint", "--preset", "huginn_3_5b", "--shards", 4, tmp_path / "made")
    assert_one_error(result, "14.57 GiB", "3.00 GiB free")
    assert not os.listdir(tmp_path)


# ---- train


def weights(path):
    return checkpoint.load(path).state_dict()


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_train_leaves_a_checkpoint_that_generate_reads(minirec_, tmp_path):
    code, out, _ = minirec_("train", "--out", tmp_path / "run", *FEW_STEPS)
    assert code == 0
    measured = r"whole solution right on 4 held-out problems each: words \d+%, hops \d+%\n"
    assert re.search(rf"^3 steps in \d+\.\d minutes: loss \d+\.\d+, {measured}", out)
    made = tmp_path / "run" / "checkpoint"
    assert {p.name for p in made.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    model = checkpoint.load(made)
    assert model.generation_config["eos_token_id"] == [2]
    assert model.generation_config["diffusion_forcing"] == {"inner_steps": 1, "exit_threshold": 0.2, "kv": "full"}
    assert model.generation_config["lossless_wavefront"] == {"guess_after": 1}
    assert minirec_("generate", "--model", made, "--max-new-tokens", 4, STORY)[0] == 0


def test_train_is_a_function_of_its_seed(minirec_, tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        assert minirec_("train", "--out", tmp_path / name, "--seed", seed, *FEW_STEPS)[0] == 0
    a, b, c = (weights(tmp_path / name / "checkpoint") for name in "abc")
    assert_same_weights(a, b)
    assert not torch.equal(a["transformer.wte.weight"], c["transformer.wte.weight"])


def test_train_passes_every_setting_on(minirec_, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training, "train", lambda model, config, folder, **_: seen.append((model, config)) or interrupt()
    )
    numbers = [f for f in dataclasses.fields(training.TrainingConfig) if f.name != "phases"]
    changed = {f.name: f.default / 2 if f.type == "float" else f.default * 2 or 3 for f in numbers}
    args = [x for name, value in changed.items() for x in ("--" + name.replace("_", "-"), value)]
    minirec_("train", "--out", tmp_path, "--preset", "small", "--families", "hops", "words", "--steps", 9, *args)
    ((model, config),) = seen
    (phase,) = config.phases
    assert {name: getattr(config, name) for name in changed} == changed
    assert (phase.families, phase.steps) == (("hops", "words"), 9)
    shape = RecurrentConfig.preset("small")
    assert model.config == dataclasses.replace(shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def test_train_without_options_takes_the_defaults_of_the_library(minirec_, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training, "train", lambda model, config, folder, **_: seen.append((model, config)) or interrupt()
    )
    minirec_("train", "--out", tmp_path)
    assert [config for _, config in seen] == [training.TrainingConfig()]
    assert seen[0][0].config == RecurrentConfig.preset("tiny")


def test_train_can_start_from_another_model(minirec_, tmp_path, monkeypatch):
    assert minirec_("train", "--out", tmp_path / "first", *FEW_STEPS)[0] == 0
    first, seen = tmp_path / "first" / "checkpoint", []
    monkeypatch.setattr(training, "train", lambda model, config, folder, **_: seen.append(model) or interrupt())
    minirec_("train", "--out", tmp_path / "second", "--start", first, *FEW_STEPS)
    (model,) = seen
    assert model.config == checkpoint.load(first).config, "the shape is the model's own"
    assert_same_weights(dict(model.state_dict()), checkpoint.load(first).state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert_one_error(minirec_("train", "--out", tmp_path / "third", "--start", tmp_path / "none"), "none")
    assert not (tmp_path / "third").exists()


def test_train_begins_with_the_weights_of_another_model(minirec_, folder, tmp_path, monkeypatch):
    seen = []

    def look(model, config, folder):
        seen.append({name: p.detach().clone() for name, p in model.state_dict().items()})
        interrupt()

    monkeypatch.setattr(training, "train", look)
    for start in (["--start", "tiny"], ["--start", folder], []):
        minirec_("train", "--out", tmp_path / "run", *start)
    named, copied, anew = seen
    assert_same_weights(named, weights(checkpoint.locate("tiny")))
    assert_same_weights(copied, named)
    assert not torch.equal(anew["transformer.wte.weight"], named["transformer.wte.weight"])


def test_the_command_that_trains_the_shipped_model_is_the_recipe(minirec_, tmp_path, monkeypatch):
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\t\$\(BIN\)/minirec (train .*)$", makefile, flags=re.MULTILINE)
    args = cli.parser().parse_args(shlex.split(command.replace("$(THREADS)", "2")))
    assert {"families", "steps", "start", "preset"}.isdisjoint(vars(args))


@pytest.mark.parametrize("start", [[], ["--start", "tiny"]])
def test_train_goes_on_after_ctrl_c_as_if_nothing_had_happened(minirec_, tmp_path, monkeypatch, start):
    command = [*FEW_STEPS, *start]
    assert minirec_("train", "--out", tmp_path / "whole", *command)[0] == 0
    forward, steps = training.Objective.forward, iter(range(10))
    with monkeypatch.context() as patch:
        patch.setattr(training.Objective, "forward", lambda *a: interrupt() if next(steps) == 2 else forward(*a))
        code, out, err = minirec_("train", "--out", tmp_path / "cut", *command)
    assert (code, out) == (130, "")
    assert err.strip() == "minirec: stopped (the same command goes on from the last save)"
    assert not (tmp_path / "cut" / "checkpoint").exists()
    assert not list(tmp_path.glob("**/*.part"))
    assert minirec_("train", "--out", tmp_path / "cut", *command)[0] == 0
    assert_same_weights(weights(tmp_path / "whole" / "checkpoint"), weights(tmp_path / "cut" / "checkpoint"))


def test_train_refuses_the_folder_of_another_run(minirec_, tmp_path):
    assert minirec_("train", "--out", tmp_path, *FEW_STEPS)[0] == 0
    before = (tmp_path / "state.safetensors").read_bytes()
    assert_one_error(minirec_("train", "--out", tmp_path, *FEW_STEPS, "--decay", 0.5), "of another run")
    assert (tmp_path / "state.safetensors").read_bytes() == before


# ---- info


def test_info_counts_the_shape_of_the_large_model(minirec_):
    code, out, _ = minirec_("info", "--preset", "huginn_3_5b")
    assert code == 0
    for fact in ["3,564,976,800", "4096 tokens", "32 recurrence steps", "13.28 GiB", "6.64 GiB", "2.659 MiB"]:
        assert fact in out


def test_info_reads_no_weights(minirec_, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "_put", lambda *args: pytest.fail("a weight was read"))
    config = checkpoint.read_config(folder)
    size = (folder / "model.safetensors").stat().st_size
    assert f"{machine.readable(size)} in 1 file(s), float32" in minirec_("info", folder)[1]
    (folder / "model.safetensors").unlink()  # as of a hub repository, of which only the small files are fetched
    code, out, _ = minirec_("info", folder)
    count = sum(p.numel() for p in RecurrentDepthLM(config).parameters())
    assert code == 0 and f"{count:,}" in out and f"{4 * count / 2**20:.4g} MiB" in out
    for kv, slots in [("full", 12), ("shared", 1), ("shared", 2), ("shared", 4), ("shared", 8)]:
        size = bytes_per_token(config, 12, kv, slots, torch.float32) / 1024
        (line,) = [x for x in out.splitlines() if f"{kv}, {slots} slot" in x]
        assert f" {size:.4g} KiB" in line


def test_info_finds_a_broken_checkpoint(minirec_, folder):
    (folder / "model.safetensors").write_bytes(b"half")
    assert_one_error(minirec_("info", folder), "not a whole safetensors file")


def test_info_counts_what_fits(minirec_):
    code, out, _ = minirec_("info", "--preset", "huginn_3_5b", "--memory", "24GB")
    assert code == 0
    config, parameters = RecurrentConfig.preset("huginn_3_5b"), 3_564_976_800
    for kv, slots in [("full", 32), ("shared", 1), ("shared", 4), ("shared", 16)]:
        line = [x for x in out.splitlines() if f"{kv}, {slots} slot" in x][1]
        for dtype in (torch.float32, torch.bfloat16):
            fit = (24 * 10**9 - parameters * dtype.itemsize) // bytes_per_token(config, 32, kv, slots, dtype)
            assert f" {fit:,} = {fit // 4096:,} slots" in line
    assert " 0 = 0 slots" in minirec_("info", "--preset", "huginn_3_5b", "--memory", "10GiB")[1]


def test_info_of_a_device(minirec_, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 3 * 2**30)
    out = minirec_("info", "--device", "cpu", "--memory", "2GiB")[1]
    assert "3.00 GiB free on cpu" in out and "fit in 2.00 GiB" in out
    monkeypatch.setattr(machine, "free_memory", lambda device: None)
    assert_one_error(minirec_("info", "--device", "cpu"), "'cpu'", "--memory")


def test_info_default_is_the_shipped_model(minirec_):
    assert minirec_("info") == minirec_("info", "tiny")


# ---- help


@pytest.mark.parametrize(
    "command, options",
    [
        ("demo", "problems seed threads model out inner-steps exit-threshold guess-after num-steps"),
        (
            "generate",
            "model sampler criterion threshold draft-steps lookahead guess-after "
            "max-new-tokens num-steps inner-steps exit-threshold temperature top-k top-p min-p "
            "repetition-penalty seed kv kv-slots no-stream stats device dtype threads revision",
        ),
        (
            "train",
            "out preset start families steps device threads "
            + " ".join(f.name for f in dataclasses.fields(training.TrainingConfig) if f.name != "phases"),
        ),
        (
            "chat",
            "model revision system sampler criterion threshold draft-steps lookahead guess-after "
            "max-new-tokens num-steps inner-steps exit-threshold temperature top-k top-p min-p "
            "repetition-penalty seed kv kv-slots device dtype threads",
        ),
        ("make-checkpoint", "preset shards dtype seed"),
        ("info", "preset revision device memory words"),
    ],
)
def test_help_explains_every_option_and_gives_an_example(capsys, command, options):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert f"example: minirec {command} " in text
    _, _, explained = text.partition(" options: ")
    for option in options.replace("_", "-").split():
        assert re.search(rf"--{option}\b", explained), f"--{option} is not in the help"
    for action in commands()[command]._actions:
        assert action.help and action.help != argparse.SUPPRESS, f"{action.dest} is not explained"
        defaults = action.default if isinstance(action.default, tuple) else [action.default]
        if action.default in (None, argparse.SUPPRESS):
            assert "default: " in action.help or action.dest in (
                "out",
                "preset",
                "start",
                "prompt",
                "path",
                "model",
                "words",
                "help",
            ), action.dest
        else:
            assert all(str(default) in explained for default in defaults), action.dest


def commands():
    """The parser of each command."""
    (choices,) = [a.choices for a in cli.parser()._actions if isinstance(a.choices, dict)]
    return choices


def test_examples_of_the_help_are_commands():
    assert set(commands()) >= {"demo", "generate", "chat", "train", "make-checkpoint", "info"}
    for name, command in commands().items():
        example = shlex.split(command.epilog.split("\n")[1])
        assert example[:2] == ["minirec", name]
        cli.parser().parse_args(example[1:])


def test_without_a_command_it_prints_the_help(minirec_):
    code, out, err = minirec_()
    assert (code, err) == (0, "")
    assert all(name in out for name in ["demo", "generate", "train", "info", "--version"])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"minirec {minirec.__version__}\n"


# ---- bad input: one line that names it, exit code 2


def assert_one_error(result, *words):
    code, _, err = result
    assert code == 2, err
    assert re.fullmatch(r"minirec: error: .+\n", err), f"not one line: {err!r}"
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"


@pytest.mark.parametrize(
    "args, words",
    [
        ("generate --model nowhere", "nowhere"),
        ("generate --model ./nowhere/here", "nowhere"),
        ("generate --model FILE", "is a file"),
        ("generate --model EMPTY", "config.json"),
        ("generate --num-steps 0", "num_steps"),
        ("generate --num-steps x", "--num-steps"),
        ("generate --inner-steps 13", "inner_steps is 13"),
        ("generate --exit-threshold -1", "exit_threshold is -1"),
        ("generate --exit-threshold nan", "exit_threshold is nan"),
        ("generate --sampler autoregressive --exit-threshold 0.1", "--exit-threshold"),
        ("generate --sampler autoregressive --inner-steps 2", "--inner-steps"),
        ("generate --sampler lossless --threshold 0.1", "--threshold is an option of --sampler adaptive"),
        ("generate --sampler adaptive --threshold -1", "threshold is -1"),
        ("generate --sampler adaptive --criterion argmax-stability --threshold 0.5", "threshold is 0.5"),
        ("generate --sampler lossless --guess-after 13", "guess_after is 13"),
        ("generate --sampler speculative --draft-steps 13", "draft_steps is 13"),
        ("generate --sampler other", "other"),
        ("generate --temperature -1", "temperature is -1"),
        ("generate --temperature 1 --top-p 2", "top_p is 2"),
        ("generate --max-new-tokens 0", "max_new_tokens is 0"),
        ("generate --max-new-tokens 1000", "context is 512"),
        ("generate --kv shared --kv-slots 0", "kv_slots is 0"),
        ("generate --seed -1", "-1"),
        ("generate --threads 0", "--threads"),
        ("generate --device nonsense", "nonsense"),
        ("generate --device meta", "meta"),
        ("generate --wrong", "--wrong"),
        ("demo --problems 0", "--problems"),
        ("demo --exit-threshold -1", "exit_threshold is -1"),
        ("demo --out FILE/w.png", "cannot write"),
        ("demo --out EMPTY/nowhere/w.png", "cannot write"),
        ("demo --out EMPTY", ".png"),
        ("demo --out w.pdf", ".png"),
        ("train", "--out"),
        ("train --out FILE", "cannot write"),
        ("train --out FILE/run", "FILE/run"),
        ("train --out EMPTY --steps 0", "steps is 0"),
        ("train --out EMPTY --families other", "other"),
        ("train --out EMPTY --start nowhere", "nowhere"),
        ("train --out new --start nowhere", "nowhere"),
        ("train --out EMPTY --batch-tokens 0", "batch_tokens is 0"),
        ("train --out EMPTY --batch-size 4", "--batch-size"),
        ("train --out EMPTY --hardest 2", "hardest is 2"),
        ("train --out EMPTY --decay -1", "decay is -1"),
        ("train --out EMPTY --seed -1", "--seed"),
        ("info nowhere", "nowhere"),
        ("info EMPTY", "config.json"),
        ("info --preset other", "other"),
        ("info tiny2 --preset tiny", "not allowed"),
        ("info --memory much", "'much'"),
        ("info --memory 3PB", "'3PB'"),
        ("info --device nonsense", "nonsense"),
        ("chat", "--model"),
        ("chat --model nowhere", "nowhere"),
        ("chat --model tiny --guess-after 3", "--guess-after is an option of --sampler lossless"),
        ("make-checkpoint new", "--preset"),
        ("make-checkpoint --preset other new", "other"),
        ("make-checkpoint --preset tiny FILE", "FILE is there already"),
        ("make-checkpoint --preset tiny --shards 0 new", "shards is 0"),
        ("make-checkpoint --preset tiny --shards 99 new", "shards is 99"),
        ("make-checkpoint --preset tiny --dtype int8 new", "int8"),
        ("other", "other"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(minirec_, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY").mkdir()
    prompt = [STORY] if args.startswith("generate") else []
    assert_one_error(minirec_(*args.split(), *prompt), words)
    assert sorted(os.listdir(tmp_path)) == ["EMPTY", "FILE"] and not os.listdir(tmp_path / "EMPTY")


REQUIRED = {
    "demo": [],
    "generate": [STORY],
    "chat": ["--model", "tiny"],
    "train": ["--out", "new"],
    "make-checkpoint": ["--preset", "tiny", "new"],
    "info": [],
}


def bad_values():
    """(command, option, value): of every option that takes a number, a choice or a device, whatever the command."""
    for name, command in commands().items():
        for action in command._actions:
            option = action.option_strings[-1] if action.option_strings else ""
            if action.choices is not None:
                values = ["other", "", "\x1b[2J"]
            elif action.type is float:
                values = ["x", "", "1,5", "0x10", "--"]
            elif action.type not in (None, str, Path):
                values = ["x", "", "1.5.2", "-1e", "9" * 5000, "٣٣٣٣٣٣٣٣٣٣٣٣"]
            else:
                continue
            yield from ((name, option, value) for value in values)


def test_bad_values_of_every_option(minirec_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = 0
    for name, option, value in bad_values():
        result = minirec_(name, f"{option}={value}", *REQUIRED[name])
        assert_one_error(result, option)
        assert len(result[2]) < 400 and not set(result[2][:-1]) & set(map(chr, [*range(32), 127, *range(128, 160)]))
        tried += 1
    assert tried > 300 and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "args",
    """\
generate --sampler autoregressive --num-steps 0 PROMPT
generate --num-steps -5 PROMPT
generate --num-steps 999999999999999999999999999999 PROMPT
generate --inner-steps 0 PROMPT
generate --inner-steps 999999999999999999999999999999 PROMPT
generate --exit-threshold -inf PROMPT
generate --max-new-tokens -1 PROMPT
generate --max-new-tokens 999999999999999999999999999999 PROMPT
generate --temperature nan PROMPT
generate --temperature inf PROMPT
generate --temperature -inf PROMPT
generate --temperature 1e400 PROMPT
generate --temperature 1 --top-k 0 PROMPT
generate --temperature 1 --top-k -3 PROMPT
generate --temperature 1 --top-p 0 PROMPT
generate --temperature 1 --top-p -0.5 PROMPT
generate --temperature 1 --top-p nan PROMPT
generate --temperature 1 --min-p 0 PROMPT
generate --temperature 1 --min-p 1.5 PROMPT
generate --temperature 1 --min-p nan PROMPT
generate --repetition-penalty 0 PROMPT
generate --repetition-penalty -1 PROMPT
generate --repetition-penalty nan PROMPT
generate --seed 4294967296 PROMPT
generate --kv shared --kv-slots -1 PROMPT
generate --kv shared --kv-slots 13 PROMPT
generate --threads -1 PROMPT
generate --threads 999999 PROMPT
generate --device cuda:99 PROMPT
generate --device cpu:x PROMPT
generate --dtype float64 PROMPT
generate --model EMPTY PROMPT
generate --model BROKEN PROMPT
generate --model ../nowhere PROMPT
generate --model / PROMPT
generate --model a/b/c PROMPT
generate --model some/repository PROMPT
generate --model some/repository --revision main PROMPT
generate --sampler adaptive --threshold nan PROMPT
generate --sampler adaptive --criterion argmax-stability --threshold 0 PROMPT
generate --sampler speculative --draft-steps 0 PROMPT
generate --sampler speculative --lookahead 0 PROMPT
generate --sampler lossless --guess-after 0 PROMPT
generate --sampler lossless --num-steps 3 --guess-after 4 PROMPT
generate --max-new PROMPT
generate --temp 1 PROMPT
generate --no-stats PROMPT
generate --stats=yes PROMPT
generate PROMPT another
generate
generate --model
generate --kv-slots 2 PROMPT
generate --kv full --kv-slots 2 PROMPT
generate --top-k 5 PROMPT
generate --top-p 0.9 PROMPT
generate --min-p 0.1 PROMPT
generate --temperature 0 --top-k 5 PROMPT
generate --sampler autoregressive --guess-after 2 PROMPT
generate --sampler adaptive --guess-after 2 PROMPT
generate --sampler adaptive --exit-threshold 0.1 PROMPT
generate --sampler speculative --criterion kl PROMPT
generate --sampler diffusion --criterion kl PROMPT
generate --threshold 0.1 PROMPT
generate --draft-steps 2 PROMPT
generate --lookahead 2 PROMPT
generate --sampler lossless --draft-steps 2 PROMPT
generate --sampler lossless --inner-steps 2 PROMPT
generate --revision main PROMPT
generate --model EMPTY --revision main PROMPT
chat --model EMPTY
chat --model FILE
chat --model tiny --kv-slots 2
chat --model tiny --top-k 5
chat --model tiny --revision main
chat --model tiny --system
chat --model tiny PROMPT
chat --stream --model tiny
demo --problems -1
demo --problems 10001
demo --problems 999999999999999999999999999999
demo --seed -1
demo --out new
demo --out .
demo --out ..
demo --out EMPTY/
demo --out EMPTY/w.svg
demo --out /nowhere/w.png
demo --num-steps 0
demo --num-steps 3 --inner-steps 4
demo --num-steps 3 --guess-after 4
demo --exit-threshold nan
demo --guess-after 0
demo --threads 0
demo --model EMPTY
demo --model nowhere
demo --revision main
demo --sampler lossless
demo --temperature 1
demo PROMPT
train --out
train --steps 5
train --out new --steps -1
train --out new --steps 5 --until 6
train --out new --until 0
train --out new --until -1
train --out new --preset tiny --start tiny
train --out new --preset other
train --out new --start EMPTY
train --out new --start FILE
train --out new --families
train --out new --families words other
train --out new --learning-rate 0
train --out new --learning-rate -1
train --out new --learning-rate nan
train --out new --learning-rate inf
train --out new --warmup -0.1
train --out new --warmup nan
train --out new --decay 1.1
train --out new --joining -1
train --out new --hardest 2
train --out new --early -0.1
train --out new --random 1.5
train --out new --extra inf
train --out new --extra nan
train --out new --reads 0
train --out new --weight-decay -1
train --out new --gradient-clip 0
train --out new --gradient-clip nan
train --out new --log-every 0
train --out new --evaluate-every 0
train --out new --evaluate-on 0
train --out new --save-every 0
train --out new --seed 4294967296
train --out new --threads 0
train --out new --device nonsense
train --out new PROMPT
train --out FILE/a/b
train --out /dev/null
make-checkpoint
make-checkpoint --preset tiny
make-checkpoint --preset tiny new another
make-checkpoint --preset tiny --shards -1 new
make-checkpoint --preset tiny --seed -1 new
make-checkpoint --preset tiny FILE/new
make-checkpoint --preset tiny BROKEN
make-checkpoint --preset tiny /dev/null
info FILE
info BROKEN
info nowhere --words
info EMPTY --words
info --words --preset tiny
info --words --memory 3GB
info --words --device cpu
info --revision main
info --preset tiny --revision main
info EMPTY --preset tiny
info tiny another
info --memory
info --memory -3GB
info --memory 3.5.1GB
info --memory GB
info --memory 3gb
info --memory infGB
info --memory nan
info --memory 99999999999999999999999999999GB
info --device cuda:99
info --stats
Demo
demo1
--wrong
--model tiny
generate -- --num-steps 3 PROMPT
generate --model -- PROMPT
generate --model=-- PROMPT
chat --model=--
train --out=--""".splitlines(),
)
def test_more_bad_input_is_one_line_and_exit_code_2(minirec_, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "config.json").write_text("[")
    result = minirec_(*(STORY if word == "PROMPT" else word for word in args.split()))
    assert_one_error(result)
    assert result[1] == ""
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "BROKEN", "BROKEN/config.json", "EMPTY", "FILE"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "args, words",
    [
        ("--kv-slots 2", "--kv-slots is an option of --kv shared"),
        ("--top-p 0.5", "--top-p is an option of sampling: --temperature above 0"),
        ("--guess-after 2", "--guess-after is an option of --sampler lossless"),
        ("--revision main", "--revision is an option of a model on the Hugging Face hub"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_an_option_without_effect_is_refused(minirec_, command, args, words):
    assert_one_error(minirec_(command, *args.split(), "--model", "tiny", *[STORY][: command == "generate"]), words)


@pytest.mark.parametrize("values", [["--kv-slots", "2"], ["--top-k", "3", "--top-p", "0.9", "--min-p", "0.1"]])
def test_and_taken_where_it_has_one(minirec_, calls, values):
    setting = ["--kv", "shared"] if "--kv-slots" in values else ["--temperature", "1"]
    assert minirec_("generate", *values, *setting, "--max-new-tokens", 3, STORY)[0] == 0
    names = [name.removeprefix("--").replace("-", "_") for name in values[::2]]
    assert [calls[-1][3][name] for name in names] == [float(value) for value in values[1::2]]


# ---- special tokens in what people type


@pytest.mark.parametrize("sampler", ["autoregressive", "diffusion"])
def test_a_begin_token_that_is_typed_counts_once(minirec_, calls, sampler):
    args = ["generate", "--sampler", sampler, "--max-new-tokens", 12]
    expected = minirec_(*args, STORY)
    for typed in ["<begin>" + STORY, "<begin> " + STORY, " <begin>\n" + STORY]:
        assert minirec_(*args, typed) == expected
    assert all(prompt == [BEGIN, *task_tokenizer().encode(STORY).ids] for _, prompt, *_ in calls)


@pytest.mark.parametrize("prompt", [f"<begin><begin>{STORY}", f"{STORY}<begin>", "Mia has <begin> 12 pears."])
def test_a_begin_token_elsewhere_is_refused(minirec_, monkeypatch, prompt):
    assert_one_error(minirec_("generate", prompt), "'<begin>'")
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    assert_one_error(minirec_("generate", "-"), "'<begin>'")


def test_other_special_tokens_of_a_raw_prompt_count_as_such(minirec_, talker, calls):
    ids = huginn_special_ids(320)
    text = "<|begin_text|><|begin_header|>user<|end_header|>\n\nHi<|end_turn|>"
    assert minirec_("generate", "--model", talker, "--max-new-tokens", 2, text)[0] == 0
    (_, prompt, *_), tokenizer = calls[-1], read_tokenizer(talker)
    assert prompt == tokenizer.encode(text, add_special_tokens=False).ids
    assert prompt.count(ids["begin_text"]) == 1 and prompt[-1] == ids["end_turn"]


@pytest.mark.parametrize("text", ["a<|end_turn|>b", "<|begin_text|>Hi", "<|begin_header|>Huginn<|end_header|>Yes"])
def test_a_message_cannot_hold_special_tokens(say, calls, text):
    token = re.search(r"<\|\w+\|>", text)[0]
    assert_one_error(say("Hi", text), f"'{token}'")
    assert len(calls) == 1
    assert_one_error(say("Hi", options=["--system", text]), f"'{token}'")


def test_at_a_terminal_the_conversation_goes_on(minirec_, talker, monkeypatch, calls):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("a<|end_turn|>b\nHi\n"))
    code, _, err = minirec_("chat", "--model", talker, "--max-new-tokens", 2)
    assert code == 0 and err.count("\n") == 1 and "'<|end_turn|>'" in err
    template = ChatTemplate(talker, read_tokenizer(talker))
    assert [prompt for _, prompt, *_ in calls] == [template.encode([{"role": "user", "content": "Hi"}])]


@pytest.mark.parametrize("lines", ["\ufeff{}", "\ufeff{}\r\n", "{}\n"])
def test_a_byte_order_mark_is_not_text(minirec_, talker, monkeypatch, calls, lines):
    for command, prompt in [("generate", ["-"]), ("chat", [])]:
        piped = io.TextIOWrapper(io.BytesIO(lines.format("Hi").encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", piped)
        assert minirec_(command, *prompt, "--model", talker, "--max-new-tokens", 2)[0] == 0
    (_, raw, *_), (_, message, *_) = calls
    tokenizer = read_tokenizer(talker)
    assert raw[1:] == tokenizer.encode("Hi" + "\n" * ("\n" in lines), add_special_tokens=False).ids
    assert message == ChatTemplate(talker, tokenizer).encode([{"role": "user", "content": "Hi"}])


# ---- a newcomer's words


def answer_by_hand(text):
    """The answer to a word problem, from its text alone."""
    first, *changes, _ = re.split(r"(?<=[.?]) ", text)
    x = int(re.search(r"\d+", first)[0])
    for change in changes:
        a = int((re.search(r"\d+", change) or "0")[0])
        if "doubles" in change or "triples" in change:
            x *= 2 if "doubles" in change else 3
        elif "half" in change:
            x //= 2
        else:
            x += a if re.search("buys|finds|gets|more", change) else -a
    return str(x)


def prompts_in(text):
    """The prompts of the `minirec generate` commands in a text."""
    lines = re.findall(r"minirec generate .*'.*'", text)
    return [shlex.split(line)[-1] for line in lines]


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_example_of_the_help_is_answered_right(minirec_, sampler):
    (prompt,) = prompts_in(commands()["generate"].epilog)
    assert 2 <= prompt.count(". ") - 1 <= 5, "as many changes as in training"
    code, out, _ = minirec_("generate", "--sampler", sampler, prompt)
    assert code == 0 and out.endswith(f" The answer is {answer_by_hand(prompt)}.\n"), out


def test_unknown_words_lead_to_a_prompt_that_works(minirec_):
    for text in ["I have 3 apples", "mia has 12 pears", "What is 2 + 2?", "Привет"]:
        _, _, err = result = minirec_("generate", text)
        assert_one_error(result, "minirec info --words")
        (prompt,) = prompts_in(err)
        assert minirec_("generate", prompt)[1].endswith(f" The answer is {answer_by_hand(prompt)}.\n")


def test_unknown_words_of_another_model(minirec_, folder):
    _, _, err = result = minirec_("generate", "--model", folder, "apples")
    assert_one_error(result, f"minirec info --words {folder}", f"minirec generate --model {folder} '")
    copied = shlex.split(re.search("minirec (generate .*)", err)[1])
    assert minirec_(*copied)[0] == 0
    words = Tokenizer(models.WordLevel({"<pad>": 0, "Mia": 1}, unk_token="<pad>"))
    words.save(str(folder / "tokenizer.json"))
    result = minirec_("generate", "--model", folder, "apples")
    assert_one_error(result, f"minirec info --words {folder}")
    assert "generate" not in result[2], "a prompt of the tasks would not work here"


def test_info_lists_the_words_and_prompts_that_work(minirec_):
    code, out, err = minirec_("info", "--words")
    assert (code, err) == (0, "")
    assert set(tasks.VOCABULARY) <= set(out.split())
    prompts = prompts_in(out)
    assert len(prompts) == 1 + len(tasks.FAMILIES)
    for prompt in prompts[:2]:
        assert minirec_("generate", prompt)[1].endswith(f" The answer is {answer_by_hand(prompt)}.\n")
    for family, prompt in zip(tasks.FAMILIES, prompts[1:], strict=True):
        (problem,) = [p for p in tasks.heldout(1, family=family, level=tasks.FAMILIES[family][0]) if p.text == prompt]
        assert problem.is_correct(task_tokenizer().encode(minirec_("generate", prompt)[1]).ids), prompt


def test_commands_of_the_readme_are_commands(minirec_):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```\w*\n(.*?)```", readme, flags=re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True) if line.startswith("minirec ") else []
            if not words or line.startswith("minirec/"):
                continue
            parsed = cli.parser().parse_args([re.sub("^cuda$", "cpu", word) for word in words[1:]])
            assert "run" in parsed
            if words[1] in ("info", "generate"):
                code, out, _ = minirec_(*words[1:])
                assert code == 0, line
                if "How many" in line:
                    assert f"The answer is {answer_by_hand(words[-1])}." in out, line


# ---- streams that are closed or full, and what a terminal would obey


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


def test_a_closed_standard_output_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    for args in [["info"], ["generate", STORY], ["--help"], []]:
        assert cli.main(args) == 2
        assert capsys.readouterr().err == "minirec: error: standard output is closed\n"


def test_a_closed_standard_input_is_one_line(minirec_, talker, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    for args in [["generate", "-"], ["chat", "--model", talker]]:
        assert_one_error(minirec_(*args), "standard input is closed")
    assert minirec_("info")[0] == 0


def test_without_stderr_nothing_else_changes(monkeypatch, capsys):
    for args, code in [(["info", "nowhere"], 2), (["generate", "--stats", "--max-new-tokens", "2", STORY], 0)]:
        monkeypatch.setattr(sys, "stderr", None)
        assert cli.main(args) == code
        assert capsys.readouterr().out.count("\n") == (code == 0), "what was for stderr is not on stdout"


STREAMS = {  # shell command -> exit code, lines on stdout, what stderr says
    "info >&-": (2, 0, "standard output is closed"),
    "info >/dev/full": (2, 0, "standard output: No space left on device"),
    "--help >/dev/full": (2, 0, "standard output: No space left on device"),
    "generate --max-new-tokens 3 STORY >/dev/full": (2, 0, "standard output: No space left on device"),
    "generate - <&-": (2, 0, "standard input is closed"),
    "generate --stats STORY 2>&-": (0, 1, ""),
    "generate --stats STORY 2>/dev/full": (2, 1, ""),
    "info nowhere 2>/dev/full": (2, 0, ""),
    "info nowhere 2>&-": (2, 0, ""),
    "info <&- >&- 2>&-": (2, 0, ""),
    "info $'\\xff'": (2, 0, "is not UTF-8"),
    "train --out $'\\xff'": (2, 0, "is not UTF-8"),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_streams_of_a_process(tmp_path):
    shells = {}
    for command in STREAMS:
        line = f"{shlex.quote(sys.executable)} -m minirec.tools.cli {command.replace('STORY', shlex.quote(STORY))}"
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        shells[command] = subprocess.Popen(["bash", "-c", line], cwd=tmp_path, **pipes)
    for command, (code, lines, words) in STREAMS.items():
        out, err = shells[command].communicate()
        assert (shells[command].returncode, out.count("\n")) == (code, lines), f"{command}: {out}{err}"
        assert err == "" if words == "" else re.fullmatch(rf"minirec: error: .*{words}\n", err), f"{command}: {err}"
    assert not os.listdir(tmp_path)


ESCAPES = "\x1b[2J\x1b]52;c;aGk=\x07\x9b1m\r\x08\x7f\u202etxt\u2066"


def assert_printable(text):
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text), repr(text)


def test_printable_replaces_what_a_terminal_would_obey():
    assert printable("a\tb\nc é 数 👍 שלום") == "a\tb\nc é 数 👍 שלום"
    assert printable("a\x1b[2Jb\r\x9bc\u202ed") == "a�[2Jb��c�d"
    everything = "".join(map(chr, range(0x3000)))
    assert len(printable(everything)) == len(everything)
    assert_printable(printable(everything))


def test_escapes_of_a_config_do_not_reach_the_terminal(minirec_, tmp_path):
    noted = copy_of_tiny(tmp_path / "noted", weights=f"fine {ESCAPES} indeed")
    code, out, _ = minirec_("info", noted)
    assert code == 0 and "fine �[2J" in out and "indeed" in out
    assert_printable(out)
    named = copy_of_tiny(tmp_path / f"named{ESCAPES.replace('/', '')}")
    code, out, _ = minirec_("info", named)
    assert code == 0 and "named�[2J" in out
    assert_printable(out)
    typed = copy_of_tiny(tmp_path / "typed", model_type=ESCAPES, nonlin_name=ESCAPES)
    for result in [minirec_("info", typed), minirec_("info", tmp_path / f"no{ESCAPES}"), minirec_("info", ESCAPES)]:
        assert_one_error(result)
        assert_printable(result[2])


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_escapes_of_a_token_do_not_reach_the_terminal(minirec_, folder, stream):
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    changed = text.replace('"so"', json.dumps(f"so{ESCAPES}"))
    (folder / "tokenizer.json").write_text(changed, encoding="utf-8")
    code, out, _ = minirec_("generate", "--model", folder, "--max-new-tokens", 12, stream, STORY)
    assert code == 0 and "so�[2J" in out
    assert_printable(out)
    out = minirec_("info", "--words", folder)[1]
    assert "so�[2J" in out
    assert_printable(out)


# ---- words that the tokenizer does not have


def test_unknown_words_are_named(minirec_):
    result = minirec_("generate", "Mia has 12 grapes. How many grapes does Bob have?")
    assert_one_error(result, "'grapes', 'Bob'")
    assert "'Mia'" not in result[2] and result[2].count("grapes") == 1


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(minirec_, prompt):
    assert_one_error(minirec_("generate", prompt), "prompt is empty")


def test_a_checkpoint_without_a_tokenizer_is_named(minirec_, folder):
    (folder / "tokenizer.json").write_text("{}")
    assert_one_error(minirec_("generate", "--model", folder, STORY), "tokenizer.json")
    (folder / "tokenizer.json").unlink()
    assert_one_error(minirec_("generate", "--model", folder, STORY), "tokenizer.json", str(folder))


@pytest.mark.parametrize("args", [["demo"], ["train", "--out", "."]])
def test_an_output_that_cannot_be_written_is_found_before_the_work(minirec_, tmp_path, monkeypatch, args):
    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("loaded a model first"))
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("trained first"))
    assert_one_error(minirec_(*args), "cannot write", "Permission denied")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(minirec_):
    assert_one_error(minirec_("generate", "--device", "cuda", STORY), "cuda")


@pytest.mark.parametrize(
    "error, words",
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15.9 GiB of which "
                "5.00 MiB is free. Process 12 has 3 GiB memory in use. See documentation for Memory Management"
            ),
            ["20.00 MiB", "15.9 GiB", "5.00 MiB is free", "--kv shared", "--dtype bfloat16", "--device"],
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), ["8 bytes"]),
    ],
)
def test_no_memory_left_is_one_line_with_the_numbers(minirec_, folder, monkeypatch, error, words):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setitem(SAMPLERS, "diffusion", full)
    assert_one_error(minirec_("generate", "--model", folder, STORY), *words)


def test_a_model_that_does_not_fit_is_one_line_with_the_numbers(minirec_, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 1000)
    assert_one_error(minirec_("generate", "--model", folder, STORY), "1000 B free", "bfloat16", "another device")


# ---- bugs keep their traceback


def test_errors_that_are_bugs_are_not_hidden(folder, monkeypatch):
    for bug in [ValueError("from below"), TypeError("wrong"), RuntimeError("shape")]:

        def broken(*args, bug=bug, **kwargs):
            raise bug

        monkeypatch.setitem(SAMPLERS, "diffusion", broken)
        with pytest.raises(type(bug), match=str(bug)):
            cli.main(["generate", "--model", str(folder), STORY])


def test_a_value_error_that_no_raise_of_minirec_made_is_a_bug(folder, monkeypatch):
    monkeypatch.setattr(Stream, "end", lambda self: list(zip([1], [], strict=True)))
    with pytest.raises(ValueError, match="zip"):
        cli.main(["generate", "--model", str(folder), "--max-new-tokens", "2", STORY])
    namespace = {"__name__": "minirec.made_up"}  # the same in a line of minirec's own that is not a raise
    source = "def end(self):\n    return int('x')\n"
    exec(compile(source, cli.__file__, "exec"), namespace)
    monkeypatch.setattr(Stream, "end", namespace["end"])
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["generate", "--model", str(folder), "--max-new-tokens", "2", STORY])


# ---- Ctrl-C


def test_ctrl_c_while_generating(minirec_, folder, monkeypatch):
    monkeypatch.setattr(Stream, "add", interrupt)
    code, _, err = minirec_("generate", "--model", folder, STORY)
    assert (code, err) == (130, "\nminirec: stopped\n")


def test_ctrl_c_while_reading_standard_input(minirec_, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"read": interrupt}))
    assert minirec_("generate", "--model", folder, "-")[0] == 130


def test_ctrl_c_while_drawing_leaves_the_old_picture_whole(minirec_, tmp_path, monkeypatch):
    def half(self, path, **kwargs):
        with open(path, "wb") as f:
            f.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", half)
    picture = tmp_path / "w.png"
    for before in [None, b"the old one"]:
        if before:
            picture.write_bytes(before)
        code, _, err = minirec_("demo", "--problems", 1, "--out", picture)
        assert code == 130 and "Traceback" not in err
        assert os.listdir(tmp_path) == (["w.png"] if before else [])
    assert picture.read_bytes() == b"the old one"


# ---- as a process


def process(*args, **options):
    command = [sys.executable, "-m", "minirec.tools.cli", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_exit_code_of_the_process(tmp_path):
    p = process("generate", "--model", "nowhere", STORY, cwd=tmp_path)
    out, err = p.communicate()
    assert_one_error((p.returncode, out, err), "nowhere")


def test_a_reader_that_leaves_is_no_error():
    p = process("info")
    p.stdout.close()  # long before the first line is printed
    assert p.wait() == 141 and p.stderr.read() == ""
