"""The task vocabulary: one token a word, one a digit, and back again."""

import functools
import gc
import importlib.util
import json
import shutil
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path
from random import Random
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors

from minirec import RecurrentConfig
from minirec.files import checkpoint, tokenizer
from minirec.files.machine import one_line, printable
from minirec.files.tokenizer import (
    HUGINN_TEMPLATE,
    ChatTemplate,
    Detokenizer,
    huginn_special_ids,
    read_tokenizer,
    stand_in_tokenizer,
)
from minirec.tasks import BEGIN, DIGITS, END, LETTERS, PAD, VOCABULARY, task_tokenizer

sys.path.insert(0, str(Path(__file__).parent / "chat_templates"))
import make_expected
from spoiling import spoilt_bytes, spoilt_json

WORDS = [w for w in VOCABULARY if w.isalpha()]


def test_no_word_is_in_the_vocabulary_twice():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert task_tokenizer().get_vocab() == {word: i for i, word in enumerate(VOCABULARY)}


def test_the_special_tokens_are_where_the_code_says():
    assert [VOCABULARY[i] for i in (PAD, BEGIN, END)] == ["<pad>", "<begin>", "<end>"]


def test_the_vocabulary_fits_the_tiny_model():
    config = RecurrentConfig.preset("tiny")
    assert len(VOCABULARY) <= config.vocab_size
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (PAD, BEGIN, END)


def test_the_shipped_checkpoint_has_this_tokenizer():
    """Its file is rewritten with `task_tokenizer().save(...)` whenever the vocabulary changes."""
    stored = json.loads((checkpoint.locate("tiny") / "tokenizer.json").read_text(encoding="utf-8"))
    assert stored == json.loads(task_tokenizer().to_str())


def test_every_word_is_one_token():
    for i, word in enumerate(VOCABULARY):
        assert task_tokenizer().encode(word).ids == [i], word


def test_numbers_are_written_digit_by_digit():
    assert task_tokenizer().encode("1207").tokens == ["1", "2", "0", "7"]
    assert task_tokenizer().encode("12 07").tokens == ["1", "2", "0", "7"]


@pytest.mark.parametrize("row", ["0110100101101001", "0000000000000000", "1" * 16])
def test_a_row_of_cells_is_one_token_a_cell_and_comes_back(row):
    ids = task_tokenizer().encode(f"Run 12 steps from {row}.").ids
    assert [VOCABULARY[i] for i in ids] == ["Run", "1", "2", "steps", "from", *row, "."]
    assert task_tokenizer().decode(ids) == f"Run 12 steps from {row}."
    assert task_tokenizer().decode(task_tokenizer().encode(row).ids) == row


def test_there_are_forty_letters_and_case_counts():
    assert len(LETTERS) == len(set(LETTERS)) == 40
    assert all(len(letter) == 1 and letter.isalpha() for letter in LETTERS)
    assert not set(LETTERS) & set(DIGITS)
    assert {"k", "K"} <= set(LETTERS)
    assert task_tokenizer().encode("k K").tokens == ["k", "K"]


def test_of_an_arrow_only_its_letters_are_left():
    """So text with arrows does not come back, but its letters do, in order."""
    tokenizer = task_tokenizer()
    assert tokenizer.encode("k>c, m>A. Follow k m.").tokens == ["k", "c", ",", "m", "A", ".", "Follow", "k", "m", "."]
    assert tokenizer.encode("k>c").ids == tokenizer.encode("k c").ids == tokenizer.encode("k > c").ids
    assert tokenizer.decode(tokenizer.encode("k>c, m>A. Follow k m.").ids) == "k c, m A. Follow k m."
    assert tokenizer.encode(">").ids == [] and ">" not in VOCABULARY


@given(st.lists(st.sampled_from(WORDS) | st.integers(0, 9999).map(str), min_size=1), st.sampled_from(["", ".", "?"]))
def test_text_comes_back(words, end):
    parts = [words[0]]
    for before, word in pairwise(words):
        if before.isdigit() and word.isdigit():
            parts.append("+")  # two numbers in a row would be read as one
        parts.append(word)
    text = " ".join(parts) + end
    assert task_tokenizer().decode(task_tokenizer().encode(text).ids) == text


def test_punctuation_and_operators_come_back():
    text = "First Mia buys 5 more pears, so Mia has 12 + 5 = 17 pears. 8 - 3 = 5, 2 * 4 = 8, 6 / 2 = 3. How many?"
    assert task_tokenizer().decode(task_tokenizer().encode(text).ids) == text


def test_special_tokens_are_not_text():
    words = task_tokenizer().encode("Mia has 1 pears.").ids
    assert task_tokenizer().decode([BEGIN, *words, END, PAD]) == "Mia has 1 pears."
    assert task_tokenizer().decode([BEGIN, END], skip_special_tokens=False) == "<begin> <end>"


@pytest.mark.parametrize("ids", [[], [END], [PAD, PAD], [BEGIN, END], [len(VOCABULARY)], [10_000, END]])
def test_no_text_is_the_empty_string(ids):
    """A model may end at once, or say an id that its vocabulary does not use."""
    assert task_tokenizer().decode(ids) == ""


def test_every_prefix_can_be_decoded():
    """Streaming decodes after every token, and prints what is new."""
    text = "Mia has 12 pears, so 12 + 5 = 17. How many?"
    ids, shown = task_tokenizer().encode(text).ids, ""
    for n in range(len(ids) + 1):
        now = task_tokenizer().decode(ids[:n])
        assert now.startswith(shown)
        shown = now
    assert shown == text


def byte_fallback_tokenizer() -> Tokenizer:
    """In the layout of Llama's: words with a sign for the space, and bytes for what is no word."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "b", "é"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<s>"])
    return made


STREAMED = {"bytes": stand_in_tokenizer(300), "byte fallback": byte_fallback_tokenizer(), "tasks": task_tokenizer()}


@pytest.mark.parametrize("name", STREAMED)
@given(data=st.data())
def test_streamed_text_is_the_whole_text_and_no_piece_is_taken_back(name, data):
    made = STREAMED[name]
    euro = [[i for i in (made.encode("€").ids) if i < 300]]  # three tokens of one character, but for the tasks
    one = st.lists(st.integers(0, made.get_vocab_size() - 1), max_size=3) | st.sampled_from(euro)
    ids = [i for part in data.draw(st.lists(one, max_size=60)) for i in part]
    stream, shown, whole = Detokenizer(made), "", made.decode(ids)
    for token in ids:
        shown += stream.add(token)
        assert whole.startswith(shown)
    assert shown + stream.end() == whole


@pytest.mark.parametrize("name", STREAMED)
def test_a_long_text_is_streamed_like_a_short_one(name):
    """Past the tokens that are decoded again."""
    made, rng = STREAMED[name], Random(0)
    for _ in range(20):
        ids = [rng.randrange(made.get_vocab_size()) for _ in range(500)]
        stream = Detokenizer(made)
        shown = "".join(map(stream.add, ids)) + stream.end()
        assert shown == made.decode(ids)


def test_a_character_comes_with_its_last_byte():
    made = STREAMED["bytes"]
    stream = Detokenizer(made)
    assert [stream.add(i) for i in made.encode("a€b").ids] == ["a", "", "", "€", "b"]


def test_an_unknown_word_is_padding():
    """So whoever takes text from a user has to look: `minirec generate` names the word."""
    assert task_tokenizer().encode("Mia has grapes").ids[-1] == PAD
    assert task_tokenizer().model.unk_token == "<pad>"


# ---- a tokenizer in the layout of Huginn's


def test_special_tokens_are_where_huginn_has_them():
    ids, config = huginn_special_ids(65_536), RecurrentConfig.preset("huginn_3_5b")
    assert (ids["begin_text"], ids["end_text"], ids["pad"]) == (config.bos_token_id, config.eos_token_id, 65_509)
    assert ids["end_turn"] == 65_508 and config.pad_token_id == 65_509
    made = stand_in_tokenizer(65_536)
    assert made.get_vocab_size() == 65_536
    assert {name: made.token_to_id(f"<|{name}|>") for name in ids} == ids


@given(st.text(max_size=40))
def test_any_text_is_its_bytes_and_comes_back(text):
    made = stand_in_tokenizer(300)
    ids = made.encode(text).ids
    assert len(ids) == len(text.encode()) and all(i < 256 for i in ids)
    assert made.decode(ids) == text


def test_what_random_weights_say_can_be_read():
    made = stand_in_tokenizer(65_536)
    assert made.decode([256, 4711, *made.encode("!").ids, 65_535]) == " 256 4711! 65535"
    end = made.token_to_id("<|end_turn|>")
    assert made.decode([256, end]) == " 256" and made.encode("a<|end_turn|>b").ids[1] == end


def test_a_vocabulary_that_is_too_small_for_bytes():
    assert stand_in_tokenizer(288).get_vocab_size() == 288
    with pytest.raises(ValueError, match="vocab_size is 287"):
        stand_in_tokenizer(287)


# ---- chat templates


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "system", "content": "Be short.\n"}, {"role": "user", "content": " Hello! "}]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's text files, to spoil."""
    return write(tmp_path, chat_template=HUGINN_TEMPLATE, bos_token="<|begin_text|>")


def write(folder, **values):
    stand_in_tokenizer(320).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def read(folder):
    return ChatTemplate(folder, read_tokenizer(folder))


def test_a_conversation_is_written_as_huginn_was_trained(folder):
    begun = (
        "<|begin_text|><|begin_header|>system<|end_header|>\n\nBe short.<|end_turn|>"
        "<|begin_header|>user<|end_header|>\n\nHello!<|end_turn|>"
    )
    asked = "<|begin_header|>Huginn<|end_header|>\n\n"
    assert read(folder).render(TALK) == begun + asked
    assert read(folder).render(TALK, add_generation_prompt=False) == begun
    answered = [*TALK, {"role": "Huginn", "content": "Hi."}, {"role": "user", "content": "Bye."}]
    follows = "Hi.<|end_turn|><|begin_header|>user<|end_header|>\n\nBye.<|end_turn|>"
    assert read(folder).render(answered) == begun + asked + follows + asked


def test_special_tokens_of_a_template_become_one_token_each(folder):
    template, ids = read(folder), huginn_special_ids(320)
    encoded = template.encode([{"role": "user", "content": "Hi"}])
    special = [i for i in encoded if i >= 288]
    header, turn = [ids["begin_header"], ids["end_header"]], ids["end_turn"]
    assert encoded[0] == ids["begin_text"] and special == [ids["begin_text"], *header, turn, *header]


def test_who_speaks_and_how_a_turn_ends_is_read_off_the_template(folder):
    template = read(folder)
    assert (template.speaker, template.end) == ("Huginn", huginn_special_ids(320)["end_turn"])
    write(folder, chat_template=CHATML)
    template = read(folder)
    assert template.speaker == "assistant" and template.end is None  # no special token of this tokenizer
    write(folder, chat_template=CHATML.replace("<|im_end|>", "<|end_text|>"))
    assert read(folder).end == huginn_special_ids(320)["end_text"]


def test_a_template_may_know_its_roles(folder):
    known = "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no ' ~ m.role) }}{% endif %}"
    write(folder, chat_template=CHATML.replace("<|im_start|>{{", known + "<|im_start|>{{"))
    template = read(folder)
    assert template.speaker == "assistant"
    with pytest.raises(ValueError, match=r"tokenizer_config.json: .*no system"):
        template.render(TALK)


def test_special_tokens_may_be_objects(folder):
    write(folder, chat_template="{{ bos_token }}" + CHATML, bos_token={"content": "<|begin_text|>", "lstrip": False})
    assert read(folder).render(TALK).startswith("<|begin_text|><|im_start|>system\n")


def test_lines_that_only_steer_a_template_leave_nothing(folder):
    lines = (
        "{% for m in messages %}\n  {% if m.content %}\n{{ m.role }}: {{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    )
    write(folder, chat_template=lines + "{% if add_generation_prompt %}\nassistant: {% endif %}")
    assert read(folder).render([{"role": "user", "content": "Hi"}]) == "user: Hi\nassistant: "


def test_a_tokenizer_that_begins_texts_does_not_begin_a_conversation_twice(folder):
    begins = read_tokenizer(folder)
    begins.post_processor = processors.TemplateProcessing(
        single="<|begin_text|> $A", special_tokens=[("<|begin_text|>", huginn_special_ids(320)["begin_text"])]
    )
    begins.save(str(folder / "tokenizer.json"))
    encoded = read(folder).encode(TALK)
    assert encoded.count(huginn_special_ids(320)["begin_text"]) == 1


def test_a_template_in_a_file_of_its_own_comes_first(folder):
    (folder / "chat_template.jinja").write_text(CHATML)
    assert read(folder).render(TALK).startswith("<|im_start|>system\n")
    (folder / "tokenizer_config.json").unlink()
    assert read(folder).speaker == "assistant"


@pytest.mark.parametrize("template", [None, 3])
def test_a_checkpoint_without_a_template(folder, template):
    write(folder, chat_template=template)
    with pytest.raises(ValueError, match=f"{folder} has no chat template"):
        read(folder)


def test_a_checkpoint_without_a_tokenizer_config(folder):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        read(folder)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for m in messages %}", "is not one"),
        ("{{ messages + 1 }}", "does not take these messages"),
        ("{{ messages.__class__.__mro__ }}", "does not take these messages"),
        ("{{ messages.append(1) }}", "does not take these messages"),
        ("nothing", "who speaks"),
    ],
)
def test_a_template_that_does_not_work_or_may_not(folder, template, words):
    write(folder, chat_template=template)
    with pytest.raises(ValueError, match=f"tokenizer_config.json: .*{words}"):
        read(folder)


@pytest.mark.parametrize("changes", [{"bos_token": None}, {}, {"bos_token": None, "add_bos_token": True}])
def test_a_token_that_is_null_is_nothing(folder, changes):
    write(folder, chat_template="{{ bos_token }}" + CHATML, **changes)
    assert read(folder).render(TALK).startswith("<|im_start|>system\n")


@pytest.mark.parametrize("token", [3, ["<s>"], {"content": 3}, {"id": 1}, 1.5])
def test_a_token_that_is_none_is_named(folder, token):
    write(folder, chat_template=CHATML, bos_token=token)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: bos_token is .*; it must be a token or null"):
        read(folder)


def test_of_several_templates_the_default_counts(folder):
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": CHATML}]
    write(folder, chat_template=named)
    assert read(folder).render(TALK).startswith("<|im_start|>system\n")
    for wrong in (named[:1], [], [3], [{"name": ["default"], "template": CHATML}]):
        write(folder, chat_template=wrong)
        with pytest.raises(ValueError, match="no chat template is named 'default'"):
            read(folder)
    write(folder, chat_template=[{"name": "default"}])
    with pytest.raises(ValueError, match="has no chat template"):
        read(folder)


def test_a_template_is_utf_8(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(ValueError, match=r"chat_template.jinja is not UTF-8"):
        read(folder)
    (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "é"), encoding="utf-8")
    assert read(folder).render(TALK).startswith("ésystem\n")


# ---- as transformers renders them


class Written(ChatTemplate):
    """A template that does not have to show who speaks."""

    def _look(self):
        return "", None


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """What we make of a case, None if it is refused."""

    @functools.cache
    def template(name: str, special: str) -> Written:
        folder = tmp_path_factory.mktemp(name)
        (folder / "tokenizer_config.json").write_text(json.dumps(make_expected.SPECIAL[special]))
        shutil.copy(make_expected.HERE / f"{name}.jinja", folder / "chat_template.jinja")
        return Written(folder, task_tokenizer())

    def render(name: str, conversation: str, special: str, more: str) -> str | None:
        try:
            return template(name, special).render(**make_expected.arguments(conversation, more))
        except ValueError:
            return None

    return render


@pytest.mark.parametrize("name", sorted({case[0] for case in make_expected.cases()}))
def test_templates_render_as_transformers_renders_them(ours, name):
    expected = json.loads((make_expected.HERE / "expected.json").read_text(encoding="utf-8"))
    cases = [case for case in make_expected.cases() if case[0] == name]
    assert len(cases) == 45 and any(expected[" | ".join(case)] for case in cases)
    for case in cases:
        assert ours(*case) == expected[" | ".join(case)], case


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_what_transformers_renders_is_what_is_stored():
    expected = json.loads((make_expected.HERE / "expected.json").read_text(encoding="utf-8"))
    assert {" | ".join(case): make_expected.by_transformers(*case) for case in make_expected.cases()} == expected


# ---- templates and tokenizers that nobody meant well

PROMPT = "{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.fixture
def impatient(monkeypatch):
    """A fraction of a second for each text, so that the tests need not wait."""
    monkeypatch.setitem(tokenizer.TEMPLATE_LIMITS, "seconds", 0.5)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (ENDLESS, "takes more than 0.5 seconds|range"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        (DOUBLING, "MemoryError|takes more than 0.5 seconds"),
        ("{{ 'a' * 10**10 }}", "MemoryError|takes more"),
        ("{{ 'a' * 10**8 }}", "it writes 100,000,000 characters|takes more"),
        ("{{ '%0999999999d' % 1 }}", "MemoryError|characters|takes more"),
        ("{{ 'a'|center(10**10) }}", "MemoryError|characters|takes more"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than 0.5 seconds"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ lipsum(n=10**6) }}", "takes more than 0.5 seconds|characters"),
        ("(" * 10 + "{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "is not one"),
        ("{{ raise_exception('\x1b[2J\nsecond line \x9b' ~ 'long' * 1000) }}", r"\\x1b\[2J second line \\x9b"),
        ("x" * (2**20 + 1), "the chat template has 1,048,577 characters"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_template_cannot_take_time_or_memory(folder, template, words):
    write(folder, chat_template=template)
    with pytest.raises(ValueError, match=rf"tokenizer_config.json: .*({words})") as refused:
        read(folder)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


@pytest.mark.usefixtures("impatient")
def test_a_template_that_ended_its_process_can_be_used_again(folder):
    loops = "{% if messages[0].content == 'loop' %}" + ENDLESS + "{% endif %}"
    write(folder, chat_template=loops + CHATML)
    template = read(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"takes more than 0.5 seconds"):
            template.render([{"role": "user", "content": "loop"}])
        assert template.render([{"role": "user", "content": "Hi"}]).startswith("<|im_start|>user\nHi")


def test_a_template_runs_in_a_process_that_ends_with_it(folder):
    template = read(folder)
    process = template.sandbox._process
    assert process.poll() is None
    del template
    gc.collect()
    assert process.poll() is not None


def test_messages_that_are_no_json_are_refused(folder):
    with pytest.raises(ValueError, match="does not take these messages"):
        read(folder).render([{"role": "user", "content": object()}])


def spoil(folder, model=None, **parts):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8")) | parts
    values["model"] |= model or {}
    path.write_text(json.dumps(values))


LONG = "Mia has 12 pears. " * 50


def test_a_tokenizer_cuts_and_pads_nothing(tmp_path):
    task_tokenizer().save(str(tmp_path / "tokenizer.json"))
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>", "pad_to_multiple_of": 64}
    spoil(tmp_path, truncation=truncation, padding=padding | {"strategy": {"Fixed": 4096}})
    ids = read_tokenizer(tmp_path).encode(LONG).ids
    assert ids == task_tokenizer().encode(LONG).ids and len(ids) == 300


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"decoder": {"type": "Strip", "content": "M", "start": 50, "stop": 50}}, "index out of bounds"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "precompiled_charsmap"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}}, "ends the process"),
        ({"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}] * 6}}, "ends the process|takes"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
         "parenthesis"),
        ({"model": {"type": "\x1b[2J"}}, "is not a tokenizer"),
        ({"version": "9.9\x1b[2J\n"}, "is not a tokenizer"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_panics_or_aborts_is_one_error(tmp_path, parts, words, capfd):
    task_tokenizer().save(str(tmp_path / "tokenizer.json"))
    spoil(tmp_path, **parts)
    with pytest.raises(ValueError, match=rf"tokenizer.json is not a tokenizer: .*({words})|({words})") as refused:
        read_tokenizer(tmp_path)
    assert str(refused.value).isprintable() and str(tmp_path) in str(refused.value)
    assert capfd.readouterr() == ("", ""), "a panic prints its backtrace"


def test_a_panic_while_text_is_encoded_is_an_error(folder):
    template = read(folder)

    class PanicException(BaseException):
        """As Rust's."""

    template.tokenizer = mock.Mock()
    template.tokenizer.encode.side_effect = PanicException("range end index")
    with pytest.raises(ValueError, match="the tokenizer does not take the conversation: range end index"):
        template.encode(TALK)
    template.tokenizer.encode.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        template.encode(TALK)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 10**5, "\0", '{"a":' * 10**5])
def test_a_tokenizer_file_that_is_none(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer") as refused:
        read_tokenizer(tmp_path)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_spoilt_file_is_read_or_one_clear_error(folder, file):
    if file == "chat_template.jinja":
        (folder / file).write_text(HUGINN_TEMPLATE)
    content, random = (folder / file).read_bytes(), Random(file)
    for i in range(12):
        if file.endswith(".json") and i % 2:
            (folder / file).write_text(json.dumps(spoilt_json(json.loads(content), random)))
        else:
            (folder / file).write_bytes(spoilt_bytes(content, random))
        try:
            read(folder).encode(TALK)
        except (ValueError, OSError, MemoryError) as error:
            assert str(error).isprintable() and len(str(error)) < 1000, error


@given(st.text())
def test_printable_text_obeys_no_terminal_and_stays_readable(text):
    shown = printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in shown if c not in "\n\t")
    assert printable(shown) == shown
    assert len(one_line(text)) <= 200 and "\n" not in one_line(text)


def test_printable_text_shows_what_was_there():
    assert printable("a\x1b[2J\x07b\r\x9b\u202ec\ud800\n\té🙂‍↔️東") == "a\\x1b[2J\\x07b\\r\\x9b\\u202ec\\ud800\n\té🙂‍↔️東"
    assert one_line("a\n b\x1b ") == "a b\\x1b" and one_line("x" * 300).endswith("xxx...")
