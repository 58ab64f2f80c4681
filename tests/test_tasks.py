"""The task generators: every problem right, unlike any other, and on its side of the split."""

import random
import re
from collections import Counter
from itertools import islice

import pytest

from minirec import RecurrentConfig, tasks
from minirec.tokenizer import BEGIN, END, ORDINALS, PAD, task_tokenizer

LEVELS = tasks.FAMILIES["words"]
# "Then Mia buys 5 more pears, so Mia has 12 + 5 = 17 pears"
LINE = re.compile(r"(\w+) (.*), so (\w+) has (\d+) ([-+*/]) (\d+) = (\d+) (\w+)")


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[tasks.Problem]]:
    """5,000 problems of each split."""
    return {split: list(islice(tasks.problems(split, seed=11), 5000)) for split in ("train", "heldout")}


def lines_of(problem: tasks.Problem) -> tuple[list[re.Match], str]:
    """The parsed lines of a solution, and its answer."""
    *lines, last = problem.solution.split(". ")
    parsed = [LINE.fullmatch(line) for line in lines]
    assert all(parsed), problem.solution
    return parsed, re.fullmatch(r"The answer is (\d+)\.", last).group(1)


def tokens_of(text: str) -> list[int]:
    return task_tokenizer().encode(text).ids


# ---- splits and seeds


def test_no_problem_is_in_both_splits(drawn):
    train, heldout = ({p.text for p in drawn[split]} for split in ("train", "heldout"))
    assert len(train) > 4000 and len(heldout) > 4000
    assert not train & heldout


@pytest.fixture
def few_stories(monkeypatch):
    """A world of 200 stories: what is kept apart by luck alone meets there."""
    pool = [tasks._word_problem(random.Random(i), 2) for i in range(200)]
    monkeypatch.setattr(tasks, "_word_problem", lambda rng, level: rng.choice(pool))


def test_a_text_belongs_to_one_split_whatever_the_seed(few_stories):
    seen = {"train": set(), "heldout": set()}
    for split, texts in seen.items():
        for seed in range(10):
            texts |= {p.text for p in islice(tasks.problems(split, seed=seed), 100)}
    assert len(seen["train"]) > 100 and seen["heldout"]
    assert not seen["train"] & seen["heldout"]


def test_the_same_arguments_give_the_same_problems():
    def draw(**arguments):
        return [(p.text, p.solution, p.answer) for p in islice(tasks.problems(**arguments), 50)]

    once = draw(split="train", seed=3)
    assert once == draw(split="train", seed=3)
    for other in [
        {"split": "train", "seed": 4},
        {"split": "heldout", "seed": 3},
        {"split": "train", "seed": 3, "level": 2},
    ]:
        assert once != draw(**other)


def test_streams_do_not_disturb_each_other():
    alone = [p.text for p in islice(tasks.problems("train", seed=1), 20)]
    a, b = tasks.problems("train", seed=1), tasks.problems("train", seed=2)
    assert [p.text for p, _ in islice(zip(a, b, strict=False), 20)] == alone


def test_no_heldout_problem_is_given_twice(few_stories):
    problems = [p.text for p in tasks.heldout(10, seed=1)]
    assert len(set(problems)) == 10


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_heldout_problems_follow_seed_and_level(level):
    problems = tasks.heldout(300, seed=2, level=level)
    assert len(problems) == len({p.text for p in problems}) == 300
    assert problems[:100] == tasks.heldout(100, seed=2, level=level)
    assert level is None or {p.level for p in problems} == {level}


def test_heldout_problems_are_of_the_heldout_split():
    stream = {p.text for p in islice(tasks.problems("heldout", seed=2), 400)}
    assert {p.text for p in tasks.heldout(300, seed=2, family="words")} <= stream


def test_the_levels_are_mixed_evenly(drawn):
    counts = Counter(p.level for p in drawn["train"])
    assert set(counts) == set(LEVELS)
    assert all(1100 < n < 1400 for n in counts.values()), counts  # 1,250 each, six standard deviations are 184


# ---- the problems themselves


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_its_number_of_changes(level):
    for p in islice(tasks.problems("train", seed=7, level=level), 200):
        lines, _ = lines_of(p)
        assert p.level == len(lines) == level
        assert [line[1] for line in lines] == ORDINALS[:level]
        assert p.text.count(".") == level + 1  # the first sentence, and one a change


def test_every_solution_is_right(drawn):
    """Each sum is done again from the text alone, each line starts where the last one ended."""
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}
    for p in drawn["train"] + drawn["heldout"]:
        who, have, things = re.match(r"(\w+) has (\d+) (\w+)\.", p.text).groups()
        lines, answer = lines_of(p)
        for _, sentence, owner, x, operator, y, z, what in (line.groups() for line in lines):
            assert (x, what) == (have, things), p.solution
            assert apply[operator](int(x), int(y)) == int(z), p.solution
            # the verb says which sum, and whose number it is afterwards
            subject, verb, *_ = sentence.split()
            amount = int((re.findall(r"\d+", sentence) or [{"doubles": 2, "triples": 3}.get(verb, 2)])[0])
            compared = " than " in sentence
            assert int(y) == amount, p.solution
            expected = {
                "buys": "+", "finds": "+", "gets": "+", "loses": "-", "sells": "-", "doubles": "*", "triples": "*",
                "gives": "/" if "half" in sentence else "-", "has": "+" if " more " in sentence else "-",
            }[verb]  # fmt: skip
            assert operator == expected, p.solution
            assert owner == subject and (owner != who if compared else owner == who), p.solution
            if compared:
                assert sentence.endswith(f"than {who}"), p.solution
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
    for p in drawn["train"] + drawn["heldout"]:
        assert all(1 <= int(n) <= tasks.LARGEST for n in re.findall(r"\d+", p.text + p.solution)), p.solution


def test_solutions_have_the_length_the_model_is_made_for(drawn):
    """From two lines of 16 tokens to five of 24; then the answer, in 5 or 6, and the end."""
    lengths = [len(p.target) for p in drawn["train"] + drawn["heldout"]]
    assert 2 * 16 + 5 + 1 <= min(lengths) and max(lengths) <= 5 * 24 + 6 + 1
    room = RecurrentConfig.preset("tiny").block_size
    assert max(len(p.prompt) + len(p.target) for p in drawn["train"] + drawn["heldout"]) <= room


def test_tokens_are_begin_text_solution_end_and_nothing_is_lost(drawn):
    tokenizer = task_tokenizer()
    for p in drawn["train"][:1000] + drawn["heldout"][:1000]:
        assert p.prompt[0] == BEGIN and p.target[-1] == END
        assert tokenizer.decode(p.prompt) == p.text
        assert tokenizer.decode(p.target) == p.solution
        assert PAD not in p.prompt + p.target  # what the tokenizer makes of a word it does not know
        assert (p.prompt + p.target).count(BEGIN) == (p.prompt + p.target).count(END) == 1


# ---- grading


@pytest.fixture(scope="module")
def problem():
    return next(p for p in tasks.heldout(50, seed=0, level=3) if len(p.answer) == 2)


def test_the_solution_itself_is_correct(drawn):
    assert all(p.is_correct(p.target) and p.is_correct(p.target[:-1]) for p in drawn["heldout"][:500])


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
        ({"split": "train", "level": 6}, "level is 6"),
    ],
)
def test_unknown_names_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        next(tasks.problems(**arguments))


@pytest.mark.parametrize("arguments, words", [({"n": 0}, "n is 0"), ({"n": 5, "family": "x"}, "family is 'x'")])
def test_heldout_refuses_what_it_cannot_give(arguments, words):
    with pytest.raises(ValueError, match=words):
        tasks.heldout(**arguments)
