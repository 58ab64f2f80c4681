"""Seeded generators of problems with a checkable answer: what the shipped model is trained on and tested with.

Five families share one vocabulary.  Each has a dial for difficulty, the level: the serial steps to the answer.

    hops       k>c, m>a, a>d, c>f, d>d, f>f. Follow k m.
               k>f, m>d
    grid       a south, b west, f east, g end. Follow b f.
               b>g, f>g
    reports    k>c, m>a, a>d, c>f, d>d, f>f. Say k m.
               Whoever starts at k and follows the arrows gets to f. Whoever starts at m ...
    automaton  Run 3 steps from 0110100101101001.
               0110010010011000
    words      Mia has 12 pears. First Mia buys 5 more pears. Then Mia gives 3 pears to Tom. How many pears ...?
               First Mia buys 5 more pears, so Mia has 12 + 5 = 17 pears. Then ... The answer is 14.

The first three give every place one arrow; the last place of a walk points to itself.  No problem says how many
arrows to follow: follow them until nothing changes, a *fixed point*.  Hops asks where walks end, and reports wraps
the answers in sentences: most of its tokens are easy and a few are deep, as in real text.  The grid has five rows of
five cells, named a to y; its arrows say a way, not a place, so each step has to be worked out.  A walk begins where
no arrow leads (but on the grid), else an answer "k>f" would read like another arrow of the problem.

The automaton is rule 30 (new cell = left XOR (centre OR right)) moved so that a cell depends on itself and the two
cells before it, with zeros before the first: a causal model can iterate it in place.  A word problem has 2 to 5
changes to one number and writes every one of them down, so no token needs much thought: its depth is in its text.

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
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile

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
VOCABULARY += "brings takes twice Say Tell Whoever starts at and follows arrows end north south east west".split()

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
FAMILIES = {
    "hops": (1, 2, 3, 4),
    "grid": (1, 2, 3, 4),
    "reports": (1, 2, 3, 4),
    "automaton": (1, 2, 3, 4, 5, 6),
    "words": (2, 3, 4, 5),
}
HARDER = {
    "hops": (6, 8, 12, 16, 20, 24),
    "grid": (6, 8),
    "reports": (8, 16),
    "automaton": (7, 8),
    "words": (6,),
}
LARGEST = 99  # every number of a word problem is between 1 and this
CELLS = 16  # in a row of the automaton
PATIENCE = 1000  # held-out problems drawn in a row that are known already: then there are hardly any others
# of the families of arrows: what is asked -> how one place and what belongs to it are answered
ASKED = {
    "hops": {"Follow": "{0}>{1},"},
    "grid": {"Follow": "{0}>{1},"},
    "reports": {
        "Say": "Whoever starts at {0} and follows the arrows gets to {1}.",
        "Tell": "Follow the arrows from {0} to the end and the answer is {1}.",
    },
}
QUERIES = {"hops": (3, 3), "grid": (3, 3), "reports": (4, 8)}  # fewest and most
ARROWS = (12, 32)  # fewest and most of a problem
ROUND = 8  # stages of walks without ends
SIDE = 5  # of the grid
WAYS = {"north": -SIDE, "south": SIDE, "west": -1, "east": 1}  # from a cell to the next, counting row by row

_tokenizer = task_tokenizer()
# cell -> its neighbours, by the way that leads there
_neighbours = {
    LETTERS[i]: {
        way: LETTERS[i + step]
        for way, step in WAYS.items()
        if 0 <= i + step < SIDE**2 and (abs(step) > 1 or i // SIDE == (i + step) // SIDE)
    }
    for i in range(SIDE**2)
}


@dataclass
class Walks:
    """Where walks along arrows are: what it takes to draw other arrows under them."""

    asked: str  # a key of ASKED[family]
    letters: list[str]  # all places; the first ones are those asked for
    queries: int  # how many are asked for
    deepest: int  # arrows from the place that is farthest from its end
    ends: bool  # False: walks go round, so that nobody can guess an end instead of following arrows
    # where each walk is after 1, 2, ... steps
    places: list[list[str]] = field(default_factory=list)


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
    deep: list[int]  # which tokens of the target take serial steps, or a sum; the rest is copied or said by rote
    walks: Walks | None = field(default=None, repr=False, compare=False)

    @cached_property
    def prompt(self) -> list[int]:
        """<begin> and the text."""
        return [BEGIN, *_tokenizer.encode(self.text).ids]

    @cached_property
    def target(self) -> list[int]:
        """The solution and <end>."""
        return self.reached(len(self.stages))

    @property
    def split(self) -> str:
        """The split that a problem with this text belongs to."""
        return "heldout" if zlib.crc32(self.text.encode()) % 16 == 0 else "train"

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

    def rewired(self, steps: int, rng: random.Random) -> Problem:
        """Other arrows under walks that have gone `steps` steps: the same length, token for token.

        The new problem goes on from the places reached, so the stages of a state that is kept are those of `rewired`.
        ValueError for a family without arrows.
        """
        if self.walks is None:
            raise ValueError(f"family is {self.family!r}; only {', '.join(ASKED)} have arrows")
        walks = replace(self.walks, deepest=max(self.walks.deepest, max(FAMILIES[self.family])))
        at = walks.places[min(steps, len(walks.places)) - 1]
        problem = None
        while problem is None or problem.split != self.split:
            problem = _walk_on(rng, self.family, walks, at)
        return problem


def _forest(rng: random.Random, w: Walks, at: list[str]) -> dict[str, str]:
    """One arrow out of every place, in the order of the text; ends point to themselves.

    The places asked for have no arrow into them; one of them is `deepest` arrows from its end.  The places `at`, where
    walks are, are not ends: each walk has a step to go.
    """
    heads, rest = w.letters[: w.queries], w.letters[w.queries :]
    rng.shuffle(rest)
    if not w.ends:
        arrows = [(place, rng.choice([other for other in rest if other != place])) for place in w.letters]
        rng.shuffle(arrows)
        return dict(arrows)
    rest.sort(key=at.__contains__)  # so that there are ends to lead to
    deepest = rng.randrange(w.queries)
    by_depth: list[list[str]] = [[] for _ in range(w.deepest)]  # places that may have an arrow into them
    next_of = {}
    for i, place in enumerate(rest):
        depth = i if i < w.deepest else rng.randint(place in at, w.deepest)  # first one walk that is deep enough
        next_of[place] = rng.choice(by_depth[depth - 1]) if depth else place
        if depth < w.deepest:
            by_depth[depth].append(place)
    for i, head in enumerate(heads):
        depth = w.deepest if i == deepest else rng.randint(1, w.deepest)
        next_of[head] = rng.choice(by_depth[depth - 1])
    arrows = list(next_of.items())
    rng.shuffle(arrows)
    return dict(arrows)


def _grid(rng: random.Random, w: Walks, at: list[str]) -> dict[str, str]:
    """The same on the grid, where an arrow leads to a neighbour; `deepest` arrows from a start, if all are there."""
    cells, starts = list(w.letters), w.letters[: w.queries]
    rng.shuffle(cells)
    near = {cell: [other for other in _neighbours[cell].values() if other in cells] for cell in cells}
    if not w.ends:
        return {cell: rng.choice(near[cell]) for cell in cells}
    for _ in range(100):  # tries; not every set of cells has such walks
        walk = [rng.choice(starts)]
        while len(walk) <= w.deepest and (further := [c for c in near[walk[-1]] if c not in (*walk, *at)]):
            walk.append(rng.choice(further))
        next_of = dict(zip(walk, walk[1:] + walk[-1:], strict=True))
        depth = {cell: len(walk) - 1 - i for i, cell in enumerate(walk)}
        for cell in cells * 2:  # the second time round for those that had nowhere to go
            goals = [c for c in near[cell] if depth.get(c, w.deepest) < w.deepest] + [cell] * (cell not in at)
            if cell not in next_of and goals:
                next_of[cell] = goal = rng.choice(goals)
                depth[cell] = 0 if goal == cell else depth[goal] + 1
        fresh, deep = at == starts, max(depth[cell] for cell in starts if cell in depth)
        if len(next_of) == len(cells) and walk[-1] not in at and (not fresh or deep == w.deepest):
            return {cell: next_of[cell] for cell in cells}
    return {}


def _walks(rng: random.Random, family: str, level: int, arrows: tuple[int, int], ends: bool) -> Problem | None:
    """A problem about walks of at most `level` arrows, among so many arrows in all."""
    fewest, most = QUERIES[family]
    fewest = min(fewest, arrows[0] // 3)
    n = max(rng.randint(*arrows), level + fewest + 1)  # the longest walk, and where the others begin
    most = min(most, n // 3, n - level - 1)
    queries, letters = rng.randint(fewest, most), rng.sample(LETTERS, n)
    if family == "grid":  # cells that hang together
        letters = [rng.choice(list(_neighbours))]
        while len(letters) < min(n, SIDE**2):
            letters += [rng.choice([c for k in letters for c in _neighbours[k].values() if c not in letters])]
        rng.shuffle(letters)
    return _walk_on(
        rng, family, Walks(rng.choice(list(ASKED[family])), letters, queries, level, ends), letters[:queries]
    )


def _walk_on(rng: random.Random, family: str, walks: Walks, at: list[str]) -> Problem | None:
    """The problem that newly drawn arrows make of walks that are at the places `at`; None if these cells have none."""
    next_of, starts = (_grid if family == "grid" else _forest)(rng, walks, at), walks.letters[: walks.queries]
    if not next_of:
        return None
    if family == "grid":
        arrows = [
            f"{a} {next((way for way, c in _neighbours[a].items() if c == b), 'end')}" for a, b in next_of.items()
        ]
    else:
        arrows = [f"{a}>{b}" for a, b in next_of.items()]
    form, stages, places = ASKED[family][walks.asked], [], []
    for _ in range(walks.deepest + 1 if walks.ends else ROUND):  # the last one finds that nothing changes
        at = [next_of[place] for place in at]
        places.append(at)
        stages.append(" ".join(form.format(*pair) for pair in zip(starts, at, strict=True)).rstrip(","))
    level = stages.index(stages[-1]) + 1 if walks.ends else walks.deepest
    needed = level if walks.ends else ROUND
    text = f"{', '.join(arrows)}. {walks.asked} {' '.join(starts)}."
    words = re.findall(r"\{\d\}|\w+|[.,]", form)
    deep = [i * len(words) + words.index("{1}") for i in range(len(starts))]
    return Problem(text, tuple(stages[:needed]), stages[-1], family, level, deep, replace(walks, places=places))


def _word_problem(rng: random.Random, level: int) -> Problem:
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
            (f"{other} brings {a} {things} to {who}", "+", a, x + a, who),
            (f"{other} has {a} more {things} than {who}", "+", a, x + a, other),
            (f"{who} gives {a} {things} to {other}", "-", a, x - a, who),
            (f"{other} takes {a} {things} from {who}", "-", a, x - a, who),
            (f"{who} loses {a} {things}", "-", a, x - a, who),
            (f"{who} sells {a} {things}", "-", a, x - a, who),
            (f"{other} has {a} fewer {things} than {who}", "-", a, x - a, other),
            (f"{who} doubles the {things}", "*", 2, x * 2, who),
            (f"{other} has twice the {things} of {who}", "*", 2, x * 2, other),
            (f"{who} triples the {things}", "*", 3, x * 3, who),
            (f"{who} gives away half of the {things}", "/", 2, x / 2, who),
            (f"{other} has half the {things} of {who}", "/", 2, x / 2, other),
        ]
        possible = [c for c in changes if 1 <= c[3] <= LARGEST and c[3] == int(c[3])]
        sentence, operator, operand, result, who = rng.choice(possible)
        result = int(result)
        story.append(f"{ordinal} {sentence}.")
        solution.append(f"{ordinal} {sentence}, so {who} has {x} {operator} {operand} = {result} {things}.")
        x = result
    story.append(f"How many {things} does {who} have?")
    solution.append(f"The answer is {x}.")
    written = " ".join(solution)
    tokens = re.finditer(r"[A-Za-z]+|\d|\S", written)
    deep = [i for i, m in enumerate(tokens) if re.search(r"= \d*$", written[: m.start()]) and m[0].isdigit()]
    return Problem(" ".join(story), (written,), str(x), "words", level, deep)


def _automaton(rng: random.Random, steps: int) -> Problem:
    """A row of cells, and the rows after 1, 2, ... steps of rule 30 on each cell and the two before it."""
    row = [rng.randint(0, 1) for _ in range(CELLS)]
    text, rows = f"Run {steps} steps from {''.join(map(str, row))}.", []
    for _ in range(steps):
        row = [left ^ (centre | right) for left, centre, right in zip([0, 0, *row], [0, *row], row, strict=False)]
        rows.append("".join(map(str, row)))
    return Problem(text, tuple(rows), rows[-1], "automaton", steps, list(range(CELLS)))


def draw(
    rng: random.Random, split: str, family: str, level: int, arrows: tuple[int, int] = ARROWS, ends: bool = True
) -> Problem:
    """The next problem of a split, family and level; `arrows`: the fewest and the most of one that has any.

    ends: without them walks go round, and the answer is where they are after `ROUND` arrows: an exercise for training.
    """
    problem = None
    while problem is None or problem.split != split or problem.level != level:
        if family in ASKED:
            problem = _walks(rng, family, level, arrows, ends)
        else:
            problem = {"automaton": _automaton, "words": _word_problem}[family](rng, level)
    return problem


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
    rng = random.Random(f"{split} {seed} {family} {level}")
    while True:
        yield draw(rng, split, family, level or rng.choice(FAMILIES[family]))


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
