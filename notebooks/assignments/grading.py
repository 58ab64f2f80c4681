"""Student versions of the assignments, and grades without nbgrader.

    python grading.py student FOLDER            write the student version of every assignment
    python grading.py grade FILE.ipynb ...      run submissions with the hidden tests: points, and why a test failed

A notebook in this folder is the one source: the full solution in nbgrader's format.  nbgrader makes and grades the
same student versions (`make test-nbgrader` compares them cell for cell), but it is ten packages more, and on Python
3.10 an older release; clearing the marked regions takes the few lines below, and then tests and students need nothing
that the notebooks do not need anyway.

A submission runs in a process of its own (`submission_process.py`) with limits on time and memory.  That keeps it from
ending the grader or touching another grade by accident.  It is no sandbox: the code can do what your account can do.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import json
import marshal
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent
SOURCES = sorted(FOLDER.glob("*.ipynb"))
STUB = ["# YOUR CODE HERE", "raise NotImplementedError()"]  # nbgrader's own
CHECKPOINTS = ".ipynb_checkpoints"  # Jupyter's own copies
MOST_BYTES = 2**26  # of a submission's file
START_SECONDS = 300  # for importing PyTorch on a busy machine, not part of any limit
NOTEBOOK_CELLS = 10  # a notebook's limit, in those of cells
LONGEST_ANSWER = 2**16  # bytes of what a submission's process answers


def marks(cell) -> dict:
    """What nbgrader notes of a cell: grade_id, grade, solution, locked, points; nothing for a cell of no concern."""
    return cell["metadata"].get("nbgrader", {})


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


def read(path: Path) -> dict:
    """A submission as far as grading needs it: its cells, each with cell_type, source and metadata.

    Any minor version of notebook format 4, with or without cell ids.  ValueError says why a file is none.
    """
    if path.is_symlink():
        raise ValueError("it is a symbolic link; the file itself is needed")
    if path.is_dir():
        raise ValueError("it is a folder; name the notebooks in it")
    if not path.exists():
        raise ValueError("there is no such file")
    if not path.is_file():
        raise ValueError("it is not a regular file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
        notebook = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"it can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("it is not JSON, so it is no notebook") from None
    if not isinstance(notebook, dict) or "nbformat" not in notebook:
        raise ValueError("it is JSON, but no notebook")
    if notebook["nbformat"] != 4 or not isinstance(notebook.get("cells"), list):
        raise ValueError(f"its notebook format is {notebook['nbformat']!r:.20}; save it in format 4")
    return {"cells": [as_cell(cell) for cell in notebook["cells"]]}


def as_cell(cell) -> dict:
    """A cell of a submission with fields of the types that they must have; ValueError if it has no text."""
    source = cell.get("source") if isinstance(cell, dict) else None
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    if not isinstance(source, str):
        raise ValueError("one of its cells has no text")
    metadata = cell.get("metadata")
    mark = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    name = mark.get("grade_id") if isinstance(mark, dict) else None
    # nothing else of what nbgrader noted is taken from a submission
    return {
        "cell_type": cell.get("cell_type"),
        "source": source,
        "metadata": {"nbgrader": {"grade_id": name}} if isinstance(name, str) else {},
    }


def names_of(notebook, *kinds: str) -> set[str]:
    """The grade_ids of a source's cells that have one of these marks set: solution, grade, locked."""
    return {marks(cell)["grade_id"] for cell in notebook["cells"] if any(marks(cell).get(kind) for kind in kinds)}


def source_of(submission):
    """The source whose exercises and tests a submission has most of; ValueError if it has none."""
    handed_in = {marks(cell).get("grade_id") for cell in submission["cells"]}
    sources = [nbformat.read(path, as_version=4) for path in SOURCES]
    best = max(sources, key=lambda source: len(names_of(source, "solution", "grade") & handed_in))
    if names_of(best, "solution", "grade").isdisjoint(handed_in):
        raise ValueError(f"it has no cell of any assignment; they are {', '.join(path.stem for path in SOURCES)}")
    return best


class Ended(Exception):
    """A cell has no result: its process did not get to the end of it."""


class SubmissionProcess:
    """A process for the cells of one submission.

    `seconds` is the limit for a cell, `until` that for all of them (of `time.monotonic`), `memory` is in bytes.
    RuntimeError if the process can't start.  Leaving the context ends it, and all that it started in its group.
    """

    def __init__(self, seconds: float, memory: int, until: float = math.inf) -> None:
        self.seconds, self.until, self.worker = seconds, until, None
        self.folder = tempfile.mkdtemp()
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(FOLDER / "submission_process.py"), str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL),
                cwd=self.folder,
                env=os.environ | {"MPLBACKEND": "Agg", "IPYTHONDIR": self.folder},
                start_new_session=True,
            )
        try:
            cpu_seconds = math.ceil(NOTEBOOK_CELLS * seconds)
            error = self.request("start", START_SECONDS, {"memory": memory, "seconds": cpu_seconds})
        except Ended as problem:
            error = str(problem)
        except BaseException:
            self.close()
            raise
        if error:
            self.close()
            raise RuntimeError(f"no submission can be run here: {error}")

    def __enter__(self) -> SubmissionProcess:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, kind: str, **arguments) -> str:
        """Let `submission_process.Cells` run a cell: its error, "" for none.  Ended if there is no answer."""
        left = max(self.until - time.monotonic(), 0.01)
        limit = f"{self.seconds:g} seconds, the limit for a cell"
        if left < self.seconds:
            limit = f"{left:.0f} seconds, when the limit for the notebook was reached"
        try:
            return self.request(kind, min(left, self.seconds), arguments)
        except TimeoutError:
            raise Ended(f"stopped after {limit}") from None

    def request(self, kind: str, seconds: float, arguments: dict) -> str:
        number = secrets.token_hex()
        request = marshal.dumps((number, kind, arguments))
        until, answer = time.monotonic() + seconds, b""
        try:
            self.connection.settimeout(seconds)
            self.connection.sendall(b"%8d" % len(request) + request)
            while not answer.endswith(b"\n") and len(answer) < LONGEST_ANSWER:
                self.connection.settimeout(max(until - time.monotonic(), 0.01))
                received = self.connection.recv(LONGEST_ANSWER)
                if not received:
                    raise ConnectionError
                answer += received
        except TimeoutError:
            raise
        except OSError:
            try:
                status = self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                raise Ended("closed the connection to the grader") from None
            raise Ended(f"ended the process (exit status {status})") from None
        said, worker, result, error = (answer.decode("utf-8", "replace").rstrip("\n") + "   ").split(" ", 3)
        if said != number or result not in ("passed", "failed"):
            raise Ended("wrote to the connection to the grader")
        self.worker = self.worker or int(worker)  # from the first answer, which comes before any student code
        return error.strip() if result == "failed" else ""

    def close(self) -> None:
        if self.worker and self.process.poll() is None:  # it may have left the process group
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.worker, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        with contextlib.suppress(RecursionError):
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class Result:
    """How a test cell ended: its points, those that the submission got, and the error, "" if there is none."""

    points: int
    score: int
    error: str


@dataclass
class Step:
    """One cell of a run: what `submission_process.Cells` does with it, and its name in messages."""

    kind: str
    name: str
    arguments: dict


def steps_of(submission, source, only: str = "") -> list[Step]:
    """All cells of a run in their order.

    First come the source's own cells, then the submission's as the student arranged them, in a namespace of the
    students' code.  Then the source's cells again, with its tests, in another one.  Of the tests, those whose grade_id
    begins with `only`.
    """
    fixed, own = names_of(source, "locked", "grade"), [cell for cell in source["cells"] if marks(cell).get("locked")]
    solved = [cell["source"] for cell in source["cells"] if marks(cell).get("solution")]
    takes = [node.name for text in solved for node in ast.parse(text).body if hasattr(node, "name")]
    steps = [
        Step("student", marks(cell)["grade_id"], {"source": cell["source"]})
        for cell in own
        if not marks(cell).get("grade")
    ]
    steps.append(Step("watch", "", {}))
    code = [cell for cell in submission["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        name = marks(cell).get("grade_id", "")
        if name not in fixed:
            steps.append(Step("student", name or f"code cell {number}", {"source": cell["source"]}))
    for cell in own:
        mark, arguments = marks(cell), {"source": cell["source"]}
        if not mark.get("grade"):
            steps.append(Step("given", mark["grade_id"], arguments))
        elif mark["grade_id"].startswith(only):
            steps.append(Step("test", mark["grade_id"], arguments | {"takes": takes, "ended": False}))
    return steps


def run(
    submission, source, only: str = "", seconds: float = 60, memory: int = 4 * 2**30
) -> tuple[dict[str, Result], dict[str, str]]:
    """Run a submission: the result of each of the source's tests by grade_id, and the errors of other cells by name.

    Only the source's locked cells and tests count, each once and as the source has it.  The submission brings what its
    other cells define, wherever they are.  A cell that fails does not end the run.  After one that ends the process,
    or runs for more than `seconds`, the others are run again without it.  A notebook has ten times as many seconds.
    `memory`: bytes.  RuntimeError if the source's own cells can't run here.
    """
    steps, outcomes, ended = steps_of(submission, source, only), {}, Counter()
    before_students = [step.kind for step in steps].index("watch")
    until = time.monotonic() + NOTEBOOK_CELLS * seconds
    while len(outcomes) < len(steps) and time.monotonic() < until:
        with SubmissionProcess(seconds, memory, until) as process:
            for place, step in enumerate(steps):
                if ended[place] > (step.kind == "test"):  # a test is run once more, without the student's functions
                    continue
                try:
                    error, over = process.run(step.kind, **step.arguments), False
                except Ended as problem:
                    error, over = str(problem), True
                if error and place <= before_students and not ended:
                    raise RuntimeError(f"the assignment's own cell {step.name} fails here: {error}")
                outcomes.setdefault(place, error)
                if over:
                    ended[place] += 1
                    step.arguments |= {"ended": True} if step.kind == "test" else {}
                    break
    late = f"not run: the notebook took {NOTEBOOK_CELLS * seconds:g} seconds, its limit"
    points = {marks(cell)["grade_id"]: marks(cell)["points"] for cell in source["cells"] if marks(cell).get("grade")}
    results, errors = {}, {}
    for place, step in enumerate(steps):
        error = outcomes.get(place, late)
        if step.kind == "test":
            results[step.name] = Result(points[step.name], 0 if error else points[step.name], error)
        elif error:
            errors[step.name] = error
    return results, errors


def printable(text: str) -> str:
    """One line that does nothing to a terminal: other characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def grade(files: list[Path], seconds: float, memory: int) -> int:
    """Print the grades of submissions, one after the other; the number of files that have none.

    All files are read before any submission runs: it might change those of others.
    """
    submissions, failed = [], 0
    for path in files:
        if CHECKPOINTS in path.parts:
            continue
        try:
            submission = read(path)
            submissions.append((path, submission, source_of(submission), ""))
        except ValueError as error:
            submissions.append((path, None, None, str(error)))
    for path, submission, source, reason in submissions:
        if reason:
            failed += 1
            print(printable(f"{path}: not graded: {reason}"), flush=True)
            continue
        results, errors = run(submission, source, seconds=seconds, memory=memory)
        score, points = sum(r.score for r in results.values()), sum(r.points for r in results.values())
        print(printable(f"{path}: {score} of {points} points"))
        for name, result in results.items():
            print(printable(f"   {result.score} of {result.points}  {name}  {result.error}".rstrip()))
        for name, error in errors.items():
            print(printable(f"   {name}: {error}"))
        sys.stdout.flush()
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("student", help="write the student versions").add_argument("folder", type=Path)
    grader = commands.add_parser("grade", help="grade notebooks; exit code 2 if one of the files can't be graded")
    grader.add_argument("files", type=Path, nargs="+")
    grader.add_argument("--seconds", type=positive, default=60, help="for a cell; a notebook has ten times as many")
    grader.add_argument("--gigabytes", type=positive, default=4, help="of memory, beyond what PyTorch itself takes")
    given = parser.parse_args(arguments)
    if given.command == "student":
        given.folder.mkdir(parents=True, exist_ok=True)
        for path in SOURCES:
            nbformat.write(student_version(nbformat.read(path, as_version=4)), given.folder / path.name)
            print(given.folder / path.name)
        return 0
    with contextlib.suppress(AttributeError):  # a replaced stdout
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return 2 if grade(given.files, given.seconds, int(given.gigabytes * 2**30)) else 0
    except RuntimeError as error:
        print(f"grading.py: {error}", file=sys.stderr)
        return 2


def positive(text: str) -> float:
    """An option's number, finite and above 0; ValueError for another."""
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
