"""Student versions of the assignments, and grades without nbgrader.

    python grading.py student FOLDER            write the student version of every assignment
    python grading.py grade FILE.ipynb ...      run what was handed in, with the hidden tests: points, and what is wrong

A notebook in this folder is the one source: the full solution in nbgrader's format.  nbgrader makes and grades the
same student versions (`make test-nbgrader` compares them cell for cell), but it is ten packages more, and on Python
3.10 an older release; clearing the marked regions takes the few lines below, and then tests and students need nothing
that the notebooks do not need anyway.

What was handed in is run in this process, with all that you may do: use an account that has nothing to lose.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat

FOLDER = Path(__file__).resolve().parent
SOURCES = sorted(FOLDER.glob("*.ipynb"))
STUB = ["# YOUR CODE HERE", "raise NotImplementedError()"]  # nbgrader's own


def marks(cell) -> dict:
    """What nbgrader notes of a cell: grade_id, grade, solution, locked, points; nothing for a cell of no concern."""
    return cell.metadata.get("nbgrader", {})


def without(source: str, begin: str, end: str, stub: list[str]) -> str:
    """A cell's text with every region from the line with `begin` to the line with `end` replaced by the stub."""
    kept, inside = [], False
    for line in source.split("\n"):
        if begin in line:
            inside = True
            kept += [line[: len(line) - len(line.lstrip())] + new for new in stub]
        elif end in line:
            inside = False
        elif not inside:
            kept.append(line)
    if inside:
        raise ValueError(f"a cell has {begin!r} and no {end!r}:\n{source}")
    return "\n".join(kept)


def student_version(source):
    """The notebook that students get: no solutions, no hidden tests, nothing that was printed or drawn."""
    notebook = copy.deepcopy(source)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if marks(cell).get("solution"):
                cell.source = without(cell.source, "### BEGIN SOLUTION", "### END SOLUTION", STUB)
            if marks(cell).get("grade"):
                cell.source = without(cell.source, "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS", [])
    return notebook


@dataclass
class Result:
    """How a test cell ended: its points, those it got, and the error if that is none of them."""

    points: int
    score: int
    error: Exception | None


def run(submission, source, only: str = "") -> tuple[dict[str, Result], list[Exception]]:
    """Run a notebook that was handed in: the result of each test by grade_id, and the errors of all other cells.

    Locked cells are run as they stand in the source, hidden tests included, whatever the submission made of them; a
    test that was deleted is run at the end.  As in nbgrader, a cell that fails does not end the run.  only: of the
    test cells, run those whose grade_id begins like this.
    """
    locked = {marks(cell)["grade_id"]: cell for cell in source.cells if marks(cell).get("locked")}
    cells = [locked.pop(marks(cell).get("grade_id"), cell) for cell in submission.cells if cell.cell_type == "code"]
    namespace, results, errors = {"__name__": "__main__"}, {}, []
    for cell in cells + list(locked.values()):
        mark = marks(cell)
        graded = mark.get("grade", False)
        if graded and not mark["grade_id"].startswith(only):
            continue
        error = None
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(cell.source, f"<{mark.get('grade_id', cell.id)}>", "exec"), namespace)
        except Exception as problem:
            error = problem
        if graded:
            results[mark["grade_id"]] = Result(mark["points"], 0 if error else mark["points"], error)
        elif error is not None:
            errors.append(error)
    plt.close("all")
    return results, errors


def source_of(submission):
    """The source of what was handed in, recognised by its test cells; ValueError if it is none of ours."""

    def tests(notebook) -> set[str]:
        return {marks(cell)["grade_id"] for cell in notebook.cells if marks(cell).get("grade")}

    for path in SOURCES:
        source = nbformat.read(path, as_version=4)
        if tests(source) & tests(submission):
            return source
    raise ValueError(f"it has no cell of any assignment; they are {', '.join(path.stem for path in SOURCES)}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("student", help="write the student versions").add_argument("folder", type=Path)
    commands.add_parser("grade", help="grade notebooks").add_argument("files", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    if given.command == "student":
        given.folder.mkdir(parents=True, exist_ok=True)
        for path in SOURCES:
            nbformat.write(student_version(nbformat.read(path, as_version=4)), given.folder / path.name)
            print(given.folder / path.name)
        return
    matplotlib.use("Agg")
    for path in given.files:
        submission = nbformat.read(path, as_version=4)
        results, _ = run(submission, source_of(submission))
        print(f"{path}: {sum(r.score for r in results.values())} of {sum(r.points for r in results.values())} points")
        for name, result in results.items():
            print(f"   {result.score} of {result.points}  {name}  {'' if result.error is None else repr(result.error)}")


if __name__ == "__main__":
    sys.exit(main())
