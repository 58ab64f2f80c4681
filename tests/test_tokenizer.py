"""The task vocabulary: one token a word, one a digit, and back again."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from minirec import RecurrentConfig
from minirec.files import checkpoint
from minirec.files.tokenizer import (
    HUGINN_TEMPLATE,
    ChatTemplate,
    huginn_special_ids,
    read_tokenizer,
    stand_in_tokenizer,
)
from minirec.tasks import BEGIN, DIGITS, END, LETTERS, PAD, VOCABULARY, task_tokenizer

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
