"""The task vocabulary: one token a word, one a digit, and back again."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirec import RecurrentConfig, checkpoint, tokenizer
from minirec.tokenizer import BEGIN, DIGITS, END, LETTERS, PAD, VOCABULARY, task_tokenizer

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
    assert tokenizer.task_tokenizer().model.unk_token == "<pad>"
