"""Seeded generators of problems with a checkable answer: what the shipped model is trained on and tested with.

Family `words`: a grade-school story in which one number changes two to five times.  Its solution is unique: for
every sentence, in order, one line that restates it and does the sum, then the answer.

    Mia has 12 pears. First Mia buys 5 more pears. Then Mia gives 3 pears to Tom. How many pears does Mia have?
    First Mia buys 5 more pears, so Mia has 12 + 5 = 17 pears. Then ... The answer is 14.

A problem belongs to the training or to the held-out split by a hash of its text, so the two can never share one.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from minirec.tokenizer import BEGIN, END, NAMES, ORDINALS, THINGS, task_tokenizer

FAMILIES = {"words": (2, 3, 4, 5)}  # name -> trained levels, easiest first; of words: the number of changes
LARGEST = 99  # every number of a word problem is between 1 and this

_tokenizer = task_tokenizer()


@dataclass
class Problem:
    """One problem: `text` and `solution` as strings, `prompt` and `target` as token ids."""

    text: str
    solution: str
    answer: str
    family: str
    level: int
    prompt: list[int] = field(init=False, repr=False)  # <begin> and the text
    target: list[int] = field(init=False, repr=False)  # the solution and <end>

    def __post_init__(self):
        self.prompt = [BEGIN, *_tokenizer.encode(self.text).ids]
        self.target = [*_tokenizer.encode(self.solution).ids, END]

    def is_correct(self, tokens: list[int]) -> bool:
        """Whether the final answer in these new tokens is right; the way to it is not looked at."""
        said = re.findall(r"The answer is (.*?)\.", _tokenizer.decode(list(tokens)))
        return bool(said) and said[-1] == self.answer


def _word_problem(rng: random.Random, level: int) -> tuple[str, str, str]:
    """A story of `level` changes to one number, its solution and answer; the number may change hands."""
    names = rng.sample(NAMES, 3)
    things, who = rng.choice(THINGS), names[0]
    x = rng.randint(2, 40)
    story, solution = [f"{who} has {x} {things}."], []
    for ordinal in ORDINALS[:level]:
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
    return " ".join(story), " ".join(solution), str(x)


def problems(split: str, seed: int | str = 0, family: str = "words", level: int | None = None) -> Iterator[Problem]:
    """An endless, seeded stream of problems of the split "train" or "heldout"; level None mixes the trained ones."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; it must be one of {', '.join(FAMILIES)}")
    if level is not None and level not in FAMILIES[family]:
        raise ValueError(f"level is {level}; family {family!r} has levels {FAMILIES[family]}")
    rng = random.Random(f"{split} {seed} {family} {level}")
    while True:
        chosen = level or rng.choice(FAMILIES[family])
        text, solution, answer = _word_problem(rng, chosen)
        if (zlib.crc32(text.encode()) % 16 == 0) == (split == "heldout"):
            yield Problem(text, solution, answer, family, chosen)


def heldout(n: int, seed: int = 0, family: str = "words", level: int | None = None) -> list[Problem]:
    """n problems that training never shows, all different; the same for the same arguments."""
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    seen: dict[str, Problem] = {}
    for problem in problems("heldout", seed, family, level):
        seen.setdefault(problem.text, problem)
        if len(seen) == n:
            return list(seen.values())
