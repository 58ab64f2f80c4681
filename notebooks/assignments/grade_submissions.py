"""Grade submissions with pytest, one test for each graded cell, and one that fails for a file that can't be graded.

SUBMISSIONS=folder python -m pytest notebooks/assignments/grade_submissions.py
"""

import os
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import grading

# read before any submission runs: it might change those of others
HANDED_IN = grading.read_all(sorted(Path(os.environ.get("SUBMISSIONS", ".")).rglob("*.ipynb")))


@cache
def results_of(place: int) -> dict[str, grading.Result]:
    _, submission, source, _ = HANDED_IN[place]
    return grading.run(submission, source)[0]


def graded() -> list:
    cells = []
    for place, (path, _, source, reason) in enumerate(HANDED_IN):
        tests = [""] if reason else grading.points_of(source)
        cells += [pytest.param(place, test, id=grading.printable(f"{path}-{test or 'not graded'}")) for test in tests]
    return cells


@pytest.mark.parametrize(("place", "test"), graded())
def test_submission(place, test):
    error = HANDED_IN[place][3] or results_of(place)[test].error
    if error:
        pytest.fail(grading.printable(error), pytrace=False)
