"""The task generators: every problem right, unlike any other, and on its side of the split."""

import itertools
import random
import re
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec import RecurrentConfig, tasks
from minirec.tasks import (
    ARROWS,
    ASKED,
    BEGIN,
    CELLS,
    END,
    FAMILIES,
    HARDER,
    LETTERS,
    ORDINALS,
    PAD,
    QUERIES,
    Problem,
    task_tokenizer,
)

# "Then Mia buys 5 more pears, so Mia has 12 + 5 = 17 pears"
LINE = re.compile(r"(\w+) (.*), so (\w+) has (\d+) ([-+*/]) (\d+) = (\d+) (\w+)")
TRAINED = [(family, level) for family in FAMILIES for level in FAMILIES[family]]
HARD = [(family, level) for family in HARDER for level in HARDER[family]]
COMPARED = ("more", "fewer", "twice", "half")
ARROW = re.compile(r"([a-zA-Z])(?:>([a-zA-Z])| (north|south|east|west|end))")


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Problem]]:
    """Word problems of each split."""
    return {s: list(islice(tasks.problems(s, seed=11), n)) for s, n in [("train", 2500), ("heldout", 300)]}


@pytest.fixture(scope="module")
def of_level() -> dict[tuple[str, int], list[Problem]]:
    """Problems of every level of the families that are answered at once, the harder levels too."""
    drawn = {key: list(islice(tasks.problems("train", 5, *key), 60)) for key in TRAINED if key[0] != "words"}
    return drawn | {key: tasks.heldout(20, 5, *key) for key in HARD if key[0] != "words"}


def lines_of(problem: Problem) -> tuple[list[re.Match], str]:
    """The parsed lines of a word problem's solution, and its answer."""
    *lines, last = problem.solution.split(". ")
    parsed = [LINE.fullmatch(line) for line in lines]
    assert all(parsed), problem.solution
    return parsed, re.fullmatch(r"The answer is (\d+)\.", last).group(1)


def tokens_of(text: str) -> list[int]:
    return task_tokenizer().encode(text).ids


def assert_even(counts: dict, keys) -> None:
    """Every key as often as any other, within five standard deviations."""
    keys, n = list(keys), sum(counts.values())
    share = n / len(keys)
    assert share > 50, "too few to tell"
    assert set(counts) <= set(keys)
    for key in keys:
        assert abs(counts.get(key, 0) - share) < 5 * (share * (1 - 1 / len(keys))) ** 0.5, (key, counts)


# ---- splits and seeds


@pytest.mark.parametrize(("family", "level"), TRAINED)
def test_no_problem_is_in_both_splits(family, level):
    """Of the 65,536 problems of a level of the automaton, 2,000 and 250 would meet 8 times by chance."""
    sizes = {"train": 2000, "heldout": 250} if family == "automaton" else {"train": 300, "heldout": 50}
    train, heldout = ({p.text for p in islice(tasks.problems(s, 1, family, level), n)} for s, n in sizes.items())
    assert len(train) > 0.9 * sizes["train"] and len(heldout) > 0.9 * sizes["heldout"]
    assert not train & heldout


@pytest.fixture(params=list(FAMILIES))
def few(request, monkeypatch) -> str:
    """A family with 200 problems of level 2 in all: what is kept apart by luck alone meets there."""
    write = {"words": "_word_problem", "automaton": "_automaton"}.get(request.param, "_walks")
    pool = [tasks.draw(random.Random(i), "train" if i % 16 else "heldout", request.param, 2) for i in range(200)]
    monkeypatch.setattr(tasks, write, lambda rng, *_: rng.choice(pool))
    monkeypatch.setitem(FAMILIES, request.param, (2,))
    return request.param


def test_a_text_belongs_to_one_split_whatever_the_seed(few):
    seen = {"train": set(), "heldout": set()}
    for split, texts in seen.items():
        for seed in range(4):
            for level in (None, 2):
                texts |= {p.text for p in islice(tasks.problems(split, seed, few, level), 60)}
    assert len(seen["train"]) > 100 and seen["heldout"]
    assert not seen["train"] & seen["heldout"]


def test_no_heldout_problem_is_given_twice(few):
    problems = [p.text for p in tasks.heldout(6, seed=1, family=few)]
    assert len(set(problems)) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_arguments_give_the_same_problems(family):
    easiest = FAMILIES[family][0]

    def draw(**arguments):
        return [(p.text, p.stages, p.answer, p.level) for p in islice(tasks.problems(family=family, **arguments), 50)]

    once = draw(split="train", seed=3)
    assert once == draw(split="train", seed=3)
    for other in [
        {"split": "train", "seed": 4},
        {"split": "heldout", "seed": 3},
        {"split": "train", "seed": 3, "level": easiest},
    ]:
        assert once != draw(**other)


def test_streams_do_not_disturb_each_other():
    for family in FAMILIES:
        alone = [p.text for p in islice(tasks.problems("train", 1, family), 20)]
        a, b = tasks.problems("train", 1, family), tasks.problems("train", 2, family)
        assert [p.text for p, _ in islice(zip(a, b, strict=False), 20)] == alone


@pytest.mark.parametrize(("family", "level"), [*((family, None) for family in FAMILIES), *TRAINED, *HARD])
def test_heldout_problems_follow_seed_family_and_level(family, level):
    problems = tasks.heldout(60, seed=2, family=family, level=level)
    assert len(problems) == len({p.text for p in problems}) == 60
    assert problems[:40] == tasks.heldout(40, seed=2, family=family, level=level)
    assert problems[:40] != tasks.heldout(40, seed=3, family=family, level=level)
    assert {p.family for p in problems} == {family}
    assert {p.level for p in problems} == ({level} if level else set(FAMILIES[family])), (
        "harder levels are not mixed in"
    )


def test_heldout_problems_are_of_the_heldout_split():
    for family in FAMILIES:
        stream = {p.text for p in islice(tasks.problems("heldout", 2, family), 120)}
        assert {p.text for p in tasks.heldout(100, seed=2, family=family)} <= stream


@pytest.mark.parametrize(("split", "n"), [("train", 1500), ("heldout", 500)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trained_levels_are_mixed_evenly(family, split, n):
    assert_even(Counter(p.level for p in islice(tasks.problems(split, 4, family), n)), FAMILIES[family])


# ---- every problem: its stages and its tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_begin_text_solution_end_and_nothing_is_lost(family):
    """Nothing but the arrows, which are for the reader."""
    tokenizer = task_tokenizer()
    for p in tasks.heldout(60, 6, family) + tasks.heldout(10, 6, family, HARDER[family][-1]):
        assert p.prompt[0] == BEGIN and p.target[-1] == END
        assert tokenizer.decode(p.prompt) == p.text.replace(">", " ")
        assert tokenizer.decode(p.target) == p.solution.replace(">", " ")
        assert all(0 <= i < len(p.target) - 1 for i in p.deep) and len(set(p.deep)) == len(p.deep) > 0
        assert PAD not in p.prompt + p.target  # what the tokenizer makes of a word it does not know
        assert (p.prompt + p.target).count(BEGIN) == (p.prompt + p.target).count(END) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_so_many_steps_reach_is_that_stage_and_in_the_end_the_solution(family):
    for p in tasks.heldout(100, 7, family):
        assert p.solution == p.stages[-1]
        for i, stage in enumerate(p.stages):
            assert p.reached(i + 1) == [*tokens_of(stage), END]
        assert p.target == p.reached(len(p.stages)) == p.reached(len(p.stages) + 1) == p.reached(100)


def test_the_tiny_model_has_room_for_every_problem():
    room = RecurrentConfig.preset("tiny").block_size
    for family, level in TRAINED + HARD:
        assert max(len(p.prompt) + len(p.target) for p in tasks.heldout(30, 0, family, level)) <= room


# ---- the automaton


def test_an_automaton_says_its_steps_and_its_cells(of_level):
    for (family, level), problems in of_level.items():
        if family == "automaton":
            for p in problems:
                assert re.fullmatch(rf"Run {level} steps from [01]{{{CELLS}}}\.", p.text)
                assert all(re.fullmatch(rf"[01]{{{CELLS}}}", row) for row in p.stages)
                assert (p.family, p.level, p.answer) == (family, level, p.solution) and p.deep == list(range(CELLS))
            cells = Counter(c for p in problems for c in p.text[-CELLS - 1 : -1])
            assert_even(cells, "01")


def test_every_row_is_what_so_many_steps_give(of_level):
    for (family, level), problems in of_level.items():
        for p in problems if family == "automaton" else []:
            row, rows = [int(c) for c in p.text[-CELLS - 1 : -1]], []
            for _ in range(level):
                before = [0, 0, *row]
                row = [before[i] ^ (before[i + 1] | before[i + 2]) for i in range(CELLS)]
                rows.append("".join(map(str, row)))
            assert list(p.stages) == rows


@pytest.mark.parametrize("level", [1, 3, 6, 8])
def test_a_cell_depends_on_itself_and_those_before_it(level):
    """Rows that begin alike go on to begin alike, whatever comes after; so a causal model can iterate in place."""
    problems = islice(tasks.problems("train" if level <= 6 else "heldout", 8, "automaton", level), 500)
    rows = {p.text.split()[-1].rstrip("."): p.stages for p in problems}
    apart = []
    for one, other in itertools.pairwise(sorted(rows)):  # neighbours in the alphabet begin alike
        same = next(i for i in range(CELLS) if one[i] != other[i])
        for a, b in zip(rows[one], rows[other], strict=True):
            assert a[:same] == b[:same], (one, other)
        apart.append((same, rows[one][-1][same] != rows[other][-1][same]))
    assert max(same for same, _ in apart) >= 12
    assert any(differs for _, differs in apart), "and on the first cell that differs it does depend"


# ---- along arrows: hops, grid and reports, worked out again from the text

ALONG = list(ASKED)
SIDE = 5


def beside(cell: str, way: str) -> str:
    """The cell of the grid, five rows of five named a to y, that a way leads to."""
    row, column = divmod(LETTERS.index(cell), SIDE)
    row, column = {
        "north": (row - 1, column), "south": (row + 1, column), "west": (row, column - 1), "east": (row, column + 1),
        "end": (row, column),
    }[way]  # fmt: skip
    assert 0 <= row < SIDE and 0 <= column < SIDE, "no way leads off the grid"
    return LETTERS[SIDE * row + column]


def parsed(p: Problem) -> tuple[dict[str, str], str, list[str]]:
    """Where each place's arrow leads, what is asked and of which places."""
    arrows, question = p.text.split(". ")
    arrows = [ARROW.fullmatch(arrow).groups() for arrow in arrows.split(", ")]
    asked, *starts = question.rstrip(".").split()
    assert len({a for a, *_ in arrows}) == len(arrows), "one arrow a place"
    return {a: b or beside(a, way) for a, b, way in arrows}, asked, starts


def walk(next_of: dict, at: str, steps: int) -> list[str]:
    """Where a walk is after 1, 2, ... so many steps."""
    reached = []
    for _ in range(steps):
        at = next_of[at]
        reached.append(at)
    return reached


def said(p: Problem, places: list[str]) -> str:
    """How these places are answered."""
    _, asked, starts = parsed(p)
    form = ASKED[p.family][asked]
    return " ".join(form.format(*pair) for pair in zip(starts, places, strict=True)).rstrip(",")


@pytest.mark.parametrize("family", ALONG)
def test_every_stage_is_what_so_many_arrows_reach(of_level, family):
    """One arrow more changes nothing at the end, one less is not enough."""
    for (name, level), problems in of_level.items():
        for p in problems if name == family else []:
            next_of, _, starts = parsed(p)
            walks = [walk(next_of, k, level + 3) for k in starts]
            stages = [said(p, [w[i] for w in walks]) for i in range(level + 3)]
            assert len(p.stages) == p.level == level and p.answer == p.solution
            assert list(p.stages) == stages[:level] and set(stages[level:]) == {p.solution}
            assert level == 1 or stages[level - 2] != p.solution


@pytest.mark.parametrize("family", ALONG)
def test_every_place_has_an_arrow_and_the_ends_point_to_themselves(of_level, family):
    for (name, level), problems in of_level.items():
        for p in problems if name == family else []:
            next_of, _, starts = parsed(p)
            fewest, most = QUERIES[family]
            assert ARROWS[0] <= len(next_of) <= ARROWS[1] and set(next_of.values()) <= set(next_of) <= set(LETTERS)
            assert fewest <= len(starts) == len(set(starts)) <= most
            if family != "grid":
                assert not set(starts) & set(next_of.values()), "no arrow leads to where a walk begins"
            for place in next_of:  # no walk at all is longer than the level, nor does one go round
                end = walk(next_of, place, level)[-1]
                assert next_of[end] == end


@pytest.mark.parametrize("family", ALONG)
def test_deep_tokens_are_the_ones_that_walks_decide(of_level, family):
    for (name, _), problems in of_level.items():
        for p in problems if name == family else []:
            next_of, _, starts = parsed(p)
            assert [tasks.VOCABULARY[p.target[i]] for i in p.deep] == [walk(next_of, k, 40)[-1] for k in starts]


def test_reports_are_long_and_mostly_easy(of_level):
    for (family, _), problems in of_level.items():
        for p in problems if family == "reports" else []:
            assert 40 <= len(p.target) <= 120 and 4 <= len(p.deep) <= 12 and len(p.deep) / len(p.target) < 0.1


def order_of(positions: list[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(positions)), key=positions.__getitem__))


def test_neither_place_nor_letter_gives_an_end_away():
    """Any arrow stands anywhere, any letter ends any walk, and any of the walks may be the longest."""
    n, level = 3000, 4
    along, letters, longest = Counter(), Counter(), Counter()
    for p in islice(tasks.problems("train", 9, "hops", level), n):
        next_of, _, starts = parsed(p)
        lengths = [len(set(walk(next_of, k, 9))) for k in starts]
        deepest = lengths.index(max(lengths))
        way = [starts[deepest], *walk(next_of, starts[deepest], level - 1)]
        at = {start: i for i, start in enumerate(next_of)}
        along[order_of([at[place] for place in way])] += 1
        letters[p.solution[2]] += 1
        if lengths.count(max(lengths)) == 1:
            longest[deepest] += 1
    assert_even(along, itertools.permutations(range(level)))
    assert_even(letters, LETTERS)
    assert_even(longest, range(3))


@pytest.mark.parametrize("family", ALONG)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 9), again=st.integers(1, 9))
def test_rewiring_goes_on_from_the_places_reached(family, seed, steps, again):
    """Other arrows under the same walks, twice: the stages are those of the new arrows from the old places."""
    rng = random.Random(seed)
    p = tasks.draw(rng, "train", family, rng.choice(FAMILIES[family]))
    at = parsed(p)[2]
    for moved in (steps, again):
        next_of, *question = parsed(p)
        at = [walk(next_of, place, moved)[-1] for place in at]
        q = p.rewired(moved, rng)
        new, *same_question = parsed(q)
        assert same_question == question and new.keys() == next_of.keys() and q.text != p.text
        assert (len(q.prompt), len(q.target), q.deep) == (len(p.prompt), len(p.target), p.deep)
        assert q.split == "train" and all(new[place] != place for place in at), "each walk has a step to go"
        after = [walk(new, place, 6) for place in at]
        assert [q.reached(i + 1) for i in range(6)] == [
            [*tokens_of(said(q, [w[i] for w in after])), END] for i in range(6)
        ]
        assert len(q.stages) <= max(FAMILIES[family]), "a rewired walk is not longer than any trained one"
        p = q


def test_only_arrows_can_be_rewired():
    with pytest.raises(ValueError, match="family is 'words'"):
        tasks.heldout(1)[0].rewired(1, random.Random(0))


@pytest.mark.parametrize("family", ALONG)
def test_walks_without_ends_go_round(family):
    for seed in range(20):
        p = tasks.draw(random.Random(seed), "train", family, 2, (6, 7), ends=False)
        for _ in range(3):
            next_of, *_ = parsed(p)
            assert all(next_of[place] != place for place in next_of) and p.family == family
            at = p.walks.places[0]
            for i in range(1, tasks.ROUND):
                at = [next_of[place] for place in at]
                assert p.reached(i + 1) == [*tokens_of(said(p, at)), END]
            p = p.rewired(1, random.Random(seed))


@pytest.mark.parametrize("family", ALONG)
def test_few_arrows_can_be_asked_for(family):
    for n in (6, 7, 10):
        for seed in range(20):
            p = tasks.draw(random.Random(seed), "train", family, 2, (n, n))
            assert len(parsed(p)[0]) == n and p.level == 2


# ---- words


@pytest.mark.parametrize("level", FAMILIES["words"] + HARDER["words"])
def test_a_level_is_its_number_of_changes(level):
    ordinals = ORDINALS[:level] if level < 6 else ["First", "Then", "Next", "Later", "Then", "Finally"]
    for p in islice(tasks.problems("heldout", seed=7, level=level), 200):
        lines, _ = lines_of(p)
        assert p.level == len(lines) == level
        assert [line[1] for line in lines] == ordinals
        assert p.text.count(".") == level + 1  # the first sentence, and one a change


def test_every_solution_is_right(drawn):
    """Each sum is done again from the text alone, each line starts where the last one ended."""
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}
    for p in drawn["train"] + drawn["heldout"] + tasks.heldout(200, level=6):
        who, have, things = re.match(r"(\w+) has (\d+) (\w+)\.", p.text).groups()
        lines, answer = lines_of(p)
        for _, sentence, owner, x, operator, y, z, what in (line.groups() for line in lines):
            assert (x, what) == (have, things), p.solution
            assert apply[operator](int(x), int(y)) == int(z), p.solution
            # the verb says which sum, and whose number it is afterwards
            subject, verb, *_ = sentence.split()
            amount = int((re.findall(r"\d+", sentence) or [{"doubles": 2, "triples": 3}.get(verb, 2)])[0])
            compared = verb == "has"
            others = verb in ("brings", "takes")  # whose doing it is; the number stays where it was
            assert int(y) == amount, p.solution
            expected = {
                "buys": "+", "finds": "+", "gets": "+", "loses": "-", "sells": "-", "doubles": "*", "triples": "*",
                "gives": "/" if "half" in sentence else "-", "brings": "+", "takes": "-",
                "has": next((o for w, o in zip(COMPARED, "+-*/", strict=True) if f" {w} " in sentence), None),
            }[verb]  # fmt: skip
            assert operator == expected, p.solution
            assert (owner == who != subject) if others else owner == subject, p.solution
            assert owner != who if compared else owner == who, p.solution
            if compared or others:
                assert re.search(rf"(than|of|to|from) {who}$", sentence), p.solution
            if verb in ("gets", "gives") and "half" not in sentence:
                assert sentence.split()[-1] != who, p.solution
            who, have = owner, z
        assert answer == p.answer == have
        assert p.text.endswith(f" How many {things} does {who} have?")


def test_the_solution_restates_the_story_in_order(drawn):
    for p in drawn["train"][:1000]:
        lines, _ = lines_of(p)
        story = p.text.split(". ")[1:-1]
        assert [f"{line[1]} {line[2]}" for line in lines] == story


def test_numbers_stay_within_two_digits(drawn):
    for p in drawn["train"] + drawn["heldout"] + tasks.heldout(200, level=6):
        assert all(1 <= int(n) <= tasks.LARGEST for n in re.findall(r"\d+", p.text + p.solution)), p.solution


def test_solutions_have_the_length_the_model_is_made_for(drawn):
    """From two lines of 16 tokens to five of 24; then the answer, in 5 or 6, and the end."""
    lengths = [len(p.target) for p in drawn["train"] + drawn["heldout"]]
    assert 2 * 16 + 5 + 1 <= min(lengths) and max(lengths) <= 5 * 24 + 6 + 1


def test_a_word_problem_is_one_stage(drawn):
    assert all(p.stages == (p.solution,) for p in drawn["train"] + tasks.heldout(20, level=6))


# ---- grading


@pytest.mark.parametrize("family", FAMILIES)
def test_the_solution_itself_is_correct(family):
    assert all(p.is_correct(p.target) and p.is_correct(p.target[:-1]) for p in tasks.heldout(200, 1, family))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "words"])
def test_an_answer_without_words_is_compared_token_by_token_up_to_the_end(family):
    for p in tasks.heldout(50, 1, family):
        right = p.target[:-1]
        assert p.is_correct([*right, END, *right, 5]) and p.is_correct([*right, END, END])
        for i in range(len(right)):
            wrong = next(t for t in p.prompt[1:] if t != right[i])
            assert not p.is_correct([*right[:i], wrong, *right[i + 1 :], END])
            assert not p.is_correct(right[:i]) and not p.is_correct([*right[:i], END, *right[i:], END])
        assert not p.is_correct([*right, right[-1], END]), "one token too many"
        assert not p.is_correct([BEGIN, *right, END]) and not p.is_correct([END, *right])
        for i, stage in enumerate(p.stages[:-1], 1):
            assert p.is_correct(p.reached(i)) == (stage == p.solution), "a stage on the way is not the answer"


@pytest.fixture(scope="module")
def problem():
    return next(p for p in tasks.heldout(50, seed=0, level=3) if len(p.answer) == 2)


def test_only_the_final_answer_counts(problem):
    assert problem.is_correct(tokens_of(f"Mia has 1 + 1 = 3 pears. The answer is {problem.answer}."))
    assert problem.is_correct(tokens_of(f"The answer is 0. The answer is {problem.answer}."))
    assert not problem.is_correct(tokens_of(f"The answer is {problem.answer}. The answer is 0."))


@pytest.mark.parametrize("change", ["{0}0", "0{0}", "{1}", "{2}", "-{0}", "{0} pears", ""])
def test_a_wrong_answer_is_wrong(problem, change):
    said = change.format(problem.answer, problem.answer[0], int(problem.answer) + 1)
    assert not problem.is_correct(tokens_of(f"The answer is {said}."))


def test_a_missing_answer_is_wrong(problem):
    assert not problem.is_correct(problem.target[:-6])  # cut off before "The answer"
    assert not problem.is_correct(tokens_of(problem.answer))


def test_an_answer_that_was_cut_off_is_wrong(problem):
    whole = problem.target[: problem.target.index(END)]
    for cut in range(1, 6):  # the full stop, the digits, and so on
        assert not problem.is_correct(whole[:-cut]), task_tokenizer().decode(whole[:-cut])


@pytest.mark.parametrize("tokens", [[], [END], [PAD], [END, END], [127]])
def test_no_text_at_all_is_wrong(problem, tokens):
    assert not problem.is_correct(tokens)


# ---- bad arguments


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"split": "test"}, "split is 'test'"),
        ({"split": "train", "family": "riddles"}, "family is 'riddles'"),
        ({"split": "train", "level": 1}, "level is 1"),
        ({"split": "heldout", "level": 7}, "level is 7"),
        ({"split": "heldout", "family": "automaton", "level": 0}, "level is 0"),
        ({"split": "heldout", "family": "hops", "level": 11}, "level is 11"),
    ],
)
def test_unknown_names_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        next(tasks.problems(**arguments))


def test_more_problems_than_there_are_is_an_error_and_no_endless_search(monkeypatch):
    monkeypatch.setattr(tasks, "CELLS", 8)  # 256 rows
    with pytest.raises(ValueError, match="n is 500; family 'automaton', level 2, has about"):
        tasks.heldout(500, family="automaton", level=2)


@pytest.mark.parametrize(("family", "level"), HARD)
def test_harder_levels_are_never_trained(family, level):
    with pytest.raises(ValueError, match=f"level is {level}; in split 'train' family '{family}'"):
        next(tasks.problems("train", 0, family, level))
    assert level > max(FAMILIES[family])


@pytest.mark.parametrize("arguments, words", [({"n": 0}, "n is 0"), ({"n": 5, "family": "x"}, "family is 'x'")])
def test_heldout_refuses_what_it_cannot_give(arguments, words):
    with pytest.raises(ValueError, match=words):
        tasks.heldout(**arguments)
