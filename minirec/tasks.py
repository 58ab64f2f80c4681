"""Seeded generators of problems with a checkable answer: what the shipped model is trained on and tested with.

Three families share one vocabulary.  Each has a dial for difficulty, the level:

    words      Mia has 12 pears. First Mia buys 5 more pears. Then Mia gives 3 pears to Tom. How many pears ...?
               First Mia buys 5 more pears, so Mia has 12 + 5 = 17 pears. Then ... The answer is 14.
    automaton  Run 3 steps from 0110100101101001.
               0110010010011000
    hops       k>c, m>a, e>h, c>f, h>b, a>d. Follow k e m.
               k>f, e>b, m>d

A word problem has 2 to 5 changes to one number and writes every one of them down, so no token needs much thought: its
depth is in its text.  The other two are to be answered at once.  Of an automaton the row after s steps is asked, of
the arrows where each way ends; the s steps, or s hops, that lie between are nowhere written, so they have to be taken
inside the loop of the model, and s is the level.  The automaton is rule 30 (new cell = left XOR (centre OR right))
moved so that a cell depends on itself and the two cells before it, with zeros before the first: a causal model can
iterate it in place.  Three ways of equal length hide in every set of arrows, and no place is on two of them.

A problem belongs to the training or to the held-out split by a hash of its text, so the two can never share one.
Levels above the trained ones are held out altogether.

The task vocabulary is a few dozen whole words, the ten digits and 40 letters that name places: numbers are written
digit by digit, so that arithmetic has to be done and cannot be looked up.  The ">" of an arrow like k>c is for the
reader; the tokenizer drops it, and the model sees the letters k c.  The vocabulary is stored as an ordinary
`tokenizer.json`, the same file that published checkpoints carry, so one loading path serves both.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from minirec.config import one_of, shown, whole

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


# name -> levels, easiest first: those trained, and harder ones that training never shows
FAMILIES = {"words": (2, 3, 4, 5), "automaton": (1, 2, 3, 4, 5, 6), "hops": (1, 2, 3, 4, 5, 6, 7, 8)}
HARDER = {"words": (6,), "automaton": (7, 8, 10), "hops": (9, 10, 12)}
LARGEST = 99  # every number of a word problem is between 1 and this
CELLS = 16  # in a row of the automaton
PATIENCE = 1000  # held-out problems drawn in a row that are known already: then there are hardly any others
WAYS = 3  # in a set of arrows

_tokenizer = task_tokenizer()


@dataclass
class Problem:
    """One problem: `text` and `solution` as strings, `prompt` and `target` as token ids.

    `stages` is what the solution would be after 1, 2, ... of the serial steps that its tokens need; the last stage is
    the solution itself.  A word problem has one stage, since its text holds every step.
    """

    text: str
    stages: tuple[str, ...]
    answer: str
    family: str
    level: int
    prompt: list[int] = field(init=False, repr=False)  # <begin> and the text
    target: list[int] = field(init=False, repr=False)  # the solution and <end>

    def __post_init__(self):
        self.prompt = [BEGIN, *_tokenizer.encode(self.text).ids]
        self.target = self.reached(len(self.stages))

    @property
    def solution(self) -> str:
        """What the model is to write."""
        return self.stages[-1]

    def reached(self, steps: int) -> list[int]:
        """The target after so many serial steps, from 1 up: that stage, or the last one, and <end>."""
        return [*_tokenizer.encode(self.stages[min(steps, len(self.stages)) - 1]).ids, END]

    def is_correct(self, tokens: list[int]) -> bool:
        """Whether the final answer in these new tokens is right; the way to it, if any, is not looked at."""
        if self.family != "words":  # the answer is all there is
            return list(takewhile(lambda token: token != END, tokens)) == self.target[:-1]
        said = re.findall(r"The answer is (.*?)\.", _tokenizer.decode(list(tokens)))
        return bool(said) and said[-1] == self.answer


def _word_problem(rng: random.Random, level: int) -> tuple[str, tuple[str, ...], str]:
    """A story of `level` changes to one number, its solution and answer; the number may change hands."""
    names = rng.sample(NAMES, 3)
    things, who = rng.choice(THINGS), names[0]
    x = rng.randint(2, 40)
    story, solution = [f"{who} has {x} {things}."], []
    for ordinal in ORDINALS[:level] if level <= len(ORDINALS) else [*ORDINALS[:4], "Then", "Finally"]:
        a = rng.randint(1, min(40, max(x, LARGEST - x)))
        other = rng.choice([n for n in names if n != who])
        # (sentence, operator, operand, result, whose number it is from now on)
        changes = [
            (f"{who} buys {a} more {things}", "+", a, x + a, who),
            (f"{who} finds {a} more {things}", "+", a, x + a, who),
            (f"{who} gets {a} {things} from {other}", "+", a, x + a, who),
            (f"{other} has {a} more {things} than {who}", "+", a, x + a, other),
            (f"{who} gives {a} {things} to {other}", "-", a, x - a, who),
            (f"{who} loses {a} {things}", "-", a, x - a, who),
            (f"{who} sells {a} {things}", "-", a, x - a, who),
            (f"{other} has {a} fewer {things} than {who}", "-", a, x - a, other),
            (f"{who} doubles the {things}", "*", 2, x * 2, who),
            (f"{who} triples the {things}", "*", 3, x * 3, who),
            (f"{who} gives away half of the {things}", "/", 2, x / 2, who),
        ]
        possible = [c for c in changes if 1 <= c[3] <= LARGEST and c[3] == int(c[3])]
        sentence, operator, operand, result, who = rng.choice(possible)
        result = int(result)
        story.append(f"{ordinal} {sentence}.")
        solution.append(f"{ordinal} {sentence}, so {who} has {x} {operator} {operand} = {result} {things}.")
        x = result
    story.append(f"How many {things} does {who} have?")
    solution.append(f"The answer is {x}.")
    return " ".join(story), (" ".join(solution),), str(x)


def _automaton(rng: random.Random, steps: int) -> tuple[str, tuple[str, ...], str]:
    """A row of cells, and the rows after 1, 2, ... steps of rule 30 on each cell and the two before it."""
    row = [rng.randint(0, 1) for _ in range(CELLS)]
    text, rows = f"Run {steps} steps from {''.join(map(str, row))}.", []
    for _ in range(steps):
        row = [left ^ (centre | right) for left, centre, right in zip([0, 0, *row], [0, *row], row, strict=False)]
        rows.append("".join(map(str, row)))
    return text, tuple(rows), rows[-1]


def _hops(rng: random.Random, length: int) -> tuple[str, tuple[str, ...], str]:
    """Arrows in any order that make three ways of so many hops; the place on each way after 1, 2, ... of them."""
    places = rng.sample(LETTERS, WAYS * (length + 1))
    ways = [places[i::WAYS] for i in range(WAYS)]
    arrows = [f"{a}>{b}" for way in ways for a, b in pairwise(way)]
    rng.shuffle(arrows)
    text = f"{', '.join(arrows)}. Follow {' '.join(way[0] for way in ways)}."
    stages = tuple(", ".join(f"{way[0]}>{way[i]}" for way in ways) for i in range(1, length + 1))
    return text, stages, stages[-1]


def problems(split: str, seed: int | str = 0, family: str = "words", level: int | None = None) -> Iterator[Problem]:
    """An endless, seeded stream of problems of the split "train" or "heldout"; level None mixes the trained ones.

    Raises ValueError for an unknown split or family, or a level that the split does not have.
    """
    one_of("split", split, ("train", "heldout"))
    one_of("family", family, FAMILIES)
    levels = FAMILIES[family] + (HARDER[family] if split == "heldout" else ())
    level = None if level is None else whole("level", level)
    if level is not None and level not in levels:
        raise ValueError(f"level is {shown(level)}; in split {split!r} family {family!r} has levels {levels}")
    seed = seed if isinstance(seed, str) else whole("seed", seed)
    write = {"words": _word_problem, "automaton": _automaton, "hops": _hops}[family]
    rng = random.Random(f"{split} {seed} {family} {level}")
    while True:
        chosen = level or rng.choice(FAMILIES[family])
        text, stages, answer = write(rng, chosen)
        if (zlib.crc32(text.encode()) % 16 == 0) == (split == "heldout"):
            yield Problem(text, stages, answer, family, chosen)


def heldout(n: int, seed: int = 0, family: str = "words", level: int | None = None) -> list[Problem]:
    """n problems that training never shows, all different; the same for the same arguments.

    level None mixes the trained levels evenly; one of HARDER[family] is harder than any that training shows.  Raises
    ValueError if there are not so many.
    """
    n = whole("n", n, 1, 10**6)
    seen: dict[str, Problem] = {}
    in_vain = 0
    for problem in problems("heldout", seed, family, level):
        in_vain = in_vain + 1 if problem.text in seen else 0
        seen.setdefault(problem.text, problem)
        if len(seen) == n:
            return list(seen.values())
        if in_vain == PATIENCE:
            raise ValueError(f"n is {n}; family {family!r}, level {level}, has about {len(seen)} held-out problems")
    raise AssertionError("a stream of problems never ends")
