"""Text to token ids and back, through the `tokenizers` library, for the shipped model and for real checkpoints.

The task vocabulary is a few dozen whole words, the ten digits and 40 letters that name places: numbers are written
digit by digit, so that arithmetic has to be done and cannot be looked up.  The ">" of an arrow like k>c is for the
reader; the tokenizer drops it, and the model sees the letters k c.  The vocabulary is stored as an ordinary
`tokenizer.json`, the same file that published checkpoints carry, so one loading path serves both.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<pad>", "<begin>", "<end>"]
PUNCTUATION = list(".,?+-*/=")
DIGITS = list("0123456789")
ORDINALS = ["First", "Then", "Next", "Later", "Finally"]
NAMES = ["Mia", "Tom", "Ana", "Ben", "Zoe", "Sam", "Eva", "Max"]
THINGS = ["pears", "plums", "cards", "coins", "books", "shells", "stamps", "beads"]
WORDS = (
    "has buys finds gives eats loses sells doubles triples gets half of the to from than more fewer away "
    "so How many does have The answer is Run steps Follow"
).split()
LETTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN")
VOCABULARY = SPECIAL + PUNCTUATION + DIGITS + ORDINALS + NAMES + THINGS + WORDS + LETTERS

PAD, BEGIN, END = range(3)


def task_tokenizer() -> Tokenizer:
    """The tokenizer of the task vocabulary; `decode` puts numbers and punctuation back together."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(">", "removed"),
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("$"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""),
            decoders.Replace(Regex(r" (?=[.,?])"), ""),
            decoders.Replace(Regex(" $"), ""),
        ]
    )
    return tokenizer
