"""Grade what was handed in with pytest, one test a graded cell.

SUBMISSIONS=folder python -m pytest notebooks/assignments/grade_submissions.py
"""

import os
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import grading

FILES = sorted(Path(os.environ.get("SUBMISSIONS", ".")).rglob("*.ipynb"))


@cache
def results_of(path: Path) -> dict[str, grading.Result]:
    submission = nbformat.read(path, as_version=4)
    return grading.run(submission, grading.source_of(submission))[0]


def graded() -> list[tuple[Path, str]]:
    cells = []
    for path in FILES:
        source = grading.source_of(nbformat.read(path, as_version=4))
        cells += [(path, m["grade_id"]) for cell in source.cells if (m := grading.marks(cell)).get("grade")]
    return cells


@pytest.mark.parametrize(("path", "test"), graded(), ids=str)
def test_submission(path, test):
    error = results_of(path)[test].error
    if error is not None:
        raise error
