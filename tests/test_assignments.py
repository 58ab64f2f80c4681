"""The assignments: solutions pass, stubs raise NotImplementedError alone, wrong answers are told why, right ones pass.

`assignments/<notebook>/<exercise>.py` has other answers to an exercise, one a cell of the percent format:
`# %% right: ...` must get full points, `# %% wrong: ...` must fail and be told what its `# says:` line quotes.
"""

import copy
import importlib.util
import json
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from test_notebooks import MAX_BYTES, problems_of_cells, problems_of_format

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks" / "assignments"
ANSWERS = Path(__file__).resolve().parent / "assignments"

spec = importlib.util.spec_from_file_location("grading", FOLDER / "grading.py")
grading = sys.modules["grading"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grading)
SOURCES = {path.stem: nbformat.read(path, as_version=4) for path in grading.SOURCES}


@dataclass
class Answer:
    notebook: str
    exercise: str
    right: bool
    name: str
    says: str
    source: str

    def __str__(self):
        return f"{self.exercise}, {'right' if self.right else 'wrong'}: {self.name}"


def answers() -> list[Answer]:
    found = []
    for path in sorted(ANSWERS.glob("*/*.py")):
        for cell in re.split(r"^# %% ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            head, source = cell.split("\n", 1)
            kind, name = head.split(": ", 1)
            says = re.match(r"# says: (.*)\n", source)
            found.append(Answer(path.parent.name, path.stem, kind == "right", name, says[1] if says else "", source))
    return found


ANSWERED = answers()


def exercises(notebook) -> list[str]:
    return [m["grade_id"] for cell in notebook.cells if (m := grading.marks(cell)).get("solution")]


def points_of(notebook) -> dict[str, int]:
    return {m["grade_id"]: m["points"] for cell in notebook.cells if (m := grading.marks(cell)).get("grade")}


def answered(notebook, exercise: str, source: str):
    """A notebook in which one exercise is answered like this; without the cells that only show something."""
    handed_in = copy.deepcopy(notebook)
    handed_in.cells = [cell for cell in handed_in.cells if grading.marks(cell)]
    for cell in handed_in.cells:
        if grading.marks(cell)["grade_id"] == exercise:
            cell.source = source
    return handed_in


@pytest.fixture(scope="module")
def errors_of():
    """`errors_of(notebook, name, only)`: the errors of all cells by name, in one process for all answers of a notebook.

    These answers are our own, so they need no process each.
    """
    started, kept = {}, ExitStack()

    def run(handed_in, name: str, only: str = "") -> dict[str, str]:
        steps = grading.steps_of(handed_in, SOURCES[name], only, {"memory": 2**35, "cpu_seconds": 10**6})
        students = [step.kind for step in steps].index("watch") + 1
        if name not in started:
            started[name] = kept.enter_context(grading.SubmissionProcess())
            assert {started[name].run(step.kind, 300, **step.arguments) for step in steps[:students]} == {""}
        return {step.name: started[name].run(step.kind, 300, **step.arguments) for step in steps[students:]}

    with kept:
        yield run


def solution_lines(cell) -> list[str]:
    region = cell.source.split("### BEGIN SOLUTION")[1].split("### END SOLUTION")[0]
    return [line.strip() for line in region.splitlines() if line.strip()]


@pytest.mark.parametrize("path", grading.SOURCES, ids=lambda path: path.stem)
def test_assignment_is_stored_clean(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    problems = problems_of_format(notebook) or problems_of_cells(notebook)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert path.stat().st_size < MAX_BYTES
    assert not problems, "\n".join(f"{path.name}: {problem}" for problem in problems)


def test_there_are_four_assignments():
    assert len(SOURCES) == 4


@pytest.mark.parametrize("name", SOURCES)
def test_the_marks_are_those_of_nbgrader(name):
    notebook, seen = SOURCES[name], set()
    for cell in notebook.cells:
        marks = grading.marks(cell)
        if not marks:
            assert "SOLUTION" not in cell.source and "HIDDEN" not in cell.source
            continue
        assert marks["grade_id"] not in seen, "a grade_id must occur once"
        seen.add(marks["grade_id"])
        assert marks["schema_version"] == 3 and marks["task"] is False
        assert not (marks["grade"] and marks["solution"]) and marks["locked"] is not marks["solution"]
        assert ("points" in marks) is marks["grade"]
        assert cell.source.count("### BEGIN SOLUTION") == cell.source.count("### END SOLUTION") == marks["solution"]
        assert cell.source.count("### BEGIN HIDDEN TESTS") == cell.source.count("### END HIDDEN TESTS")
        assert marks["grade"] or "HIDDEN" not in cell.source
    for exercise in exercises(notebook):
        assert any(test.startswith(exercise) for test in points_of(notebook)), f"{exercise} has no test"


def table(text: str) -> list[list[str]]:
    """The cells of the rows of a Markdown table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


@pytest.mark.parametrize("name", SOURCES)
def test_the_tables_have_the_points_of_the_tests(name):
    """The one at the head of the notebook, and the one of the README."""
    rows, points = table(SOURCES[name].cells[0].source), points_of(SOURCES[name])
    for exercise, row in zip(exercises(SOURCES[name]), rows, strict=True):
        assert f"`{exercise}`" in row[1]
        assert int(row[2]) == sum(n for test, n in points.items() if test.startswith(exercise))
    (row,) = [row for row in table((FOLDER / "README.md").read_text(encoding="utf-8")) if row[0] == f"`{name}.ipynb`"]
    assert int(row[3]) == sum(points.values())


@pytest.mark.parametrize("name", SOURCES)
def test_solutions_pass_their_tests(name, errors_of):
    handed_in = answered(SOURCES[name], "", "")  # without the cells that only show something
    assert set(errors_of(handed_in, name).values()) == {""}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_solutions_get_all_points(name):
    results, errors = grading.run(SOURCES[name], SOURCES[name], seconds=300)
    assert [result.error for result in results.values() if result.error] == [] and errors == {}
    assert {test: result.score for test, result in results.items()} == points_of(SOURCES[name])


@pytest.mark.parametrize("name", SOURCES)
def test_stubs_fail_with_not_implemented_error_alone(name, errors_of):
    errors = errors_of(grading.student_version(SOURCES[name]), name)
    assert errors.keys() >= points_of(SOURCES[name]).keys()
    assert set(errors.values()) == {"NotImplementedError", ""}
    assert all(errors[test] for test in points_of(SOURCES[name]))


@pytest.mark.parametrize("name", SOURCES)
def test_no_line_of_a_solution_or_a_hidden_test_is_left_for_students(name):
    source, student = SOURCES[name], grading.student_version(SOURCES[name])
    text = "\n".join(cell.source for cell in student.cells)
    for word in ("SOLUTION", "HIDDEN"):
        assert word not in text
    for cell, left in zip(source.cells, student.cells, strict=True):
        if grading.marks(cell).get("solution"):
            lines = solution_lines(cell)
            assert lines, "a solution that is empty would prove nothing"
            assert left.source.count("raise NotImplementedError()") == 1
            kept = [line.strip() for line in left.source.splitlines()]
            assert [line for line in lines if line in kept] == []
            assert [line for line in lines if len(line) > 24 and line in text] == [], "it stands in another cell"
        elif "### BEGIN HIDDEN TESTS" in cell.source:
            visible = re.sub(r" *### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS\n?", "", cell.source, flags=re.DOTALL)
            assert left.source.rstrip() == visible.rstrip()
        else:
            assert left.source == cell.source
        if cell.cell_type == "code":
            assert left.outputs == [] and left.execution_count is None


@pytest.mark.parametrize("name", SOURCES)
def test_every_exercise_has_wrong_and_right_answers_beside_the_solution(name):
    for exercise in exercises(SOURCES[name]):
        mine = [answer for answer in ANSWERED if (answer.notebook, answer.exercise) == (name, exercise)]
        assert sum(not answer.right for answer in mine) >= 4, f"{exercise}: fewer than four wrong answers"
        assert sum(answer.right for answer in mine) >= 2, f"{exercise}: fewer than two other right answers"
        assert all(answer.says for answer in mine if not answer.right)


@pytest.mark.parametrize("answer", ANSWERED, ids=str)
def test_right_answers_pass_and_wrong_ones_are_told_why(answer, errors_of):
    source = SOURCES[answer.notebook]
    tests = [test for test in points_of(source) if test.startswith(answer.exercise)]
    handed_in = answered(source, answer.exercise, answer.source)
    found = errors_of(handed_in, answer.notebook, only=answer.exercise)
    errors = [found[test] for test in tests if found[test]]
    if answer.right:
        assert errors == []
    else:
        assert errors, "not noticed"
        assert errors[0].startswith("AssertionError: ")
        assert answer.says in errors[0]


def test_the_command_writes_student_versions_and_grades_them(tmp_path, capsys):
    grading.main(["student", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in grading.SOURCES)
    for path in tmp_path.iterdir():
        assert nbformat.read(path, as_version=4) == grading.student_version(SOURCES[path.stem])
    capsys.readouterr()
    name = "scheduling"
    assert grading.main(["grade", str(tmp_path / f"{name}.ipynb"), "--seconds", "300"]) == 0
    total = sum(points_of(SOURCES[name]).values())
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(f"{name}.ipynb: 0 of {total} points")
    assert len(lines) == len(points_of(SOURCES[name])) and all("NotImplementedError" in line for line in lines)
