"""Grading survives every submission: a file that is none, and code that ends, hangs, floods, forges or replaces.

A toy assignment stands in for the real ones, so that each submission takes about a second.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from test_assignments import grading

FOLDER = Path(__file__).resolve().parent.parent / "notebooks" / "assignments"
REFERENCE = "def twice(x):\n    return 2 * x\n"
RIGHT = REFERENCE
WRONG = "def twice(x):\n    return 0\n"
TESTS = {
    "twice_test": "cases = [(1, 2), (5, 10)]\n"
    "for x, right in cases:\n    assert twice(x) == right, f'{x}: {twice(x)}, not {right}'",
    "twice_more": "assert all(twice(x) == reference.twice(x) for x, _ in cases)\n"
    "n = random.Random(0).randint(3, 9)\nassert all([twice(n) == reference.twice(n)]), f'{n}: wrong'",
    "thrice_test": "assert thrice(2) == 6",
}
POINTS = {"twice_test": 3, "twice_more": 2, "thrice_test": 1}


def cell(source: str, grade_id: str, kind: str, **more):
    mark = {"grade_id": grade_id, "schema_version": 3, "task": False, "grade": kind == "grade", **more}
    mark |= {"solution": kind == "solution", "locked": kind != "solution"}
    return nbformat.v4.new_code_cell(source, metadata={"nbgrader": mark})


def solution(name: str, line: str):
    text = f"def {name}(x):\n    ### BEGIN SOLUTION\n    {line}\n    ### END SOLUTION"
    return cell(text, name, "solution")


SOURCE = nbformat.v4.new_notebook(
    cells=[
        cell("import random\n\nimport reference", "setup", "locked"),
        solution("twice", "return 2 * x"),
        cell(TESTS["twice_test"], "twice_test", "grade", points=3),
        cell(TESTS["twice_more"], "twice_more", "grade", points=2),
        solution("thrice", "return 3 * x"),
        cell(TESTS["thrice_test"], "thrice_test", "grade", points=1),
    ]
)


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    """The toy is the only assignment, and its setup cell finds the module that it imports."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "reference.py").write_text(REFERENCE)
    paths = [str(modules), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.syspath_prepend(str(modules))
    nbformat.write(SOURCE, modules / "toy.ipynb")
    monkeypatch.setattr(grading, "SOURCES", [modules / "toy.ipynb"])


def handed_in(twice: str = RIGHT, *extra: str):
    """The solution, with another cell for `twice`, and cells of the student's own behind it."""
    notebook = copy.deepcopy(SOURCE)
    notebook.cells[1].source = twice
    notebook.cells[2:2] = [nbformat.v4.new_code_cell(text) for text in extra]
    return notebook


def scores(notebook, **limits) -> dict[str, int]:
    return {test: result.score for test, result in grading.run(notebook, SOURCE, **limits)[0].items()}


ALL, NONE = POINTS, {"twice_test": 0, "twice_more": 0, "thrice_test": 1}
KILL = "import os, signal\n"


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.exit()",
        "exit()",
        "raise KeyboardInterrupt",
        "import os, sys\nfor fd in range(3):\n    os.close(fd)\nsys.stdout.close()",
        KILL + "os.kill(os.getppid(), signal.SIGKILL)",
        pytest.param(KILL + f"os.kill({os.getpid()}, signal.SIGKILL)", id="kill the grader"),
        pytest.param(KILL + f"os.killpg({os.getpgid(0)}, signal.SIGKILL)", id="kill the grader's group"),
        "!kill -9 $(ps -o ppid= -p $PPID)",
        "import os, time\nif os.fork() == 0:\n    time.sleep(1000)",
        "import os\nos.fork()",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
        "import atexit, time\natexit.register(time.sleep, 1000)",
        "import os, shutil\nshutil.rmtree(os.getcwd())",
        "print('x' * 10**8)",
    ],
)
def test_a_cell_that_disturbs_costs_no_points(source):
    assert scores(handed_in(RIGHT, source)) == ALL


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import os\nos._exit(0)", "ended the process (exit status 0)"),
        ("import os\nos.abort()", "ended the process (exit status 134)"),
        ("import os\nif os.fork() == 0:\n    import time\n    time.sleep(1000)\nos._exit(3)", "(exit status 3)"),
        ("!kill -9 $PPID", "ended the process (exit status 137)"),
        ("import os\nos.killpg(0, 9)", "ended the process (exit status 137)"),
        ("import os\nos.execv('/bin/sleep', ['sleep', '1000'])", "closed the connection to the grader"),
        ("import os\nos.closerange(3, 100)", "ended the process (exit status 1)"),
        (
            "import os\nfor fd in range(3, 60):\n    try:\n        os.write(fd, b'passed')\n    except OSError: pass",
            "wrote",
        ),
    ],
)
def test_a_cell_that_ends_the_process_is_named_and_the_rest_is_graded(source, says):
    results, errors = grading.run(handed_in(RIGHT, source), SOURCE)
    assert {test: result.score for test, result in results.items()} == ALL
    assert list(errors) == ["code cell 3"] and says in errors["code cell 3"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended the process (exit status 0)"),
        ("import ctypes; ctypes.string_at(0)", "ended the process (exit status 139)"),
        ("return twice(x)", "RecursionError: maximum recursion depth exceeded"),
        ("raise type('E', (Exception,), {'__bool__': lambda s: False, '__str__': lambda s: ''})", "E"),
        (
            "M = type('M', (type,), {'__name__': property(lambda c: '')})\n"
            "    raise M('E', (Exception,), {'__str__': lambda s: ''})",
            "an exception without a name",
        ),
        ("raise type('E', (Exception,), {'__str__': lambda s: 1 / 0})", "an exception whose text can't be read"),
    ],
)
def test_a_function_that_ends_its_test_gets_no_points_for_it(line, says):
    results, _ = grading.run(handed_in(f"def twice(x):\n    {line}"), SOURCE)
    assert {test: result.score for test, result in results.items()} == NONE
    assert results["twice_test"].error.startswith(says)
    assert "NameError" not in results["twice_more"].error  # it reads a name that the first test defines


@pytest.mark.parametrize(
    "line",
    [
        "while True: pass",
        pytest.param(
            "while True:\n        try:\n            while True: pass\n        except BaseException: pass",
            marks=pytest.mark.slow,
        ),
        pytest.param("import os; os.setsid()\n    while True: pass", marks=pytest.mark.slow),
        pytest.param("while True: print('x' * 10**6)", marks=pytest.mark.slow),
    ],
)
def test_an_endless_loop_ends_with_the_cell_and_the_limit(line):
    results, _ = grading.run(handed_in(f"def twice(x):\n    {line}"), SOURCE, seconds=4)
    assert {test: result.score for test, result in results.items()} == NONE
    assert results["twice_test"].error == "stopped after 4 seconds, its limit"


def test_many_endless_cells_end_with_the_limit_of_the_notebook(monkeypatch):
    monkeypatch.setattr(grading, "NOTEBOOK_CELLS", 2)
    results, errors = grading.run(handed_in(RIGHT, *["while True: pass"] * 4), SOURCE, seconds=1)
    assert [result.error for result in results.values()] == [
        "not run: the notebook's limit of 2 seconds was reached"
    ] * 3
    assert errors["code cell 3"] == errors["code cell 4"] == "stopped after 1 seconds, its limit"


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not enforce a limit on memory")
def test_memory_has_a_limit():
    results, _ = grading.run(
        handed_in("def twice(x):\n    kept = []\n    while True:\n        kept.append(bytearray(10**7))"),
        SOURCE,
        memory=2**28,
    )
    assert results["twice_test"].error == "MemoryError" and results["thrice_test"].score == 1


@pytest.mark.parametrize(
    "source",
    [
        "import builtins\nbuiltins.all = lambda *a: True\nbuiltins.callable = lambda *a: False",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a: ''\nbuiltins.AssertionError = SystemExit",
        "all = enumerate = lambda *a: []\ncases = []\nreference = random = None",
        "import random\nrandom.Random.randint = lambda *a: 0\nrandom.Random = lambda *a: None",
        "import reference\nreference.twice = twice",
        "import reference\nreference.twice.__code__ = twice.__code__",
        "import reference\nreference.all = lambda *a: True",
        "import sys, types\nsys.modules['reference'] = types.SimpleNamespace(twice=twice)",
        "import os, marshal\nos.write = os.read = marshal.loads = os.getpid = lambda *a: None",
    ],
)
def test_what_a_submission_replaced_is_put_back_before_a_test(source):
    found = scores(handed_in(WRONG, source), only="twice")
    assert found == {"twice_test": 0, "twice_more": 0}


def test_what_a_function_replaces_while_it_is_tested_fails_the_test():
    results, _ = grading.run(
        handed_in("def twice(x):\n    import reference\n    reference.twice = twice\n    return 0"), SOURCE
    )
    assert results["twice_more"].error == "RuntimeError: the submission replaced reference.twice during this test"
    assert {test: result.score for test, result in results.items()} == NONE


def test_the_tests_have_a_namespace_of_their_own_and_see_a_helper_s_effect():
    """Helpers in cells of the student's own work, before and behind the solution."""
    notebook = handed_in("def twice(x):\n    return helper(x)", "def helper(x):\n    return x + x\n\ncases = None")
    assert scores(notebook) == ALL


def test_copied_tests_do_not_count():
    notebook = grading.student_version(SOURCE)
    for place, copied in reversed(list(enumerate(notebook.cells))):
        if grading.marks(copied).get("grade"):
            notebook.cells.insert(place + 1, copy.deepcopy(copied))
            notebook.cells[place + 1].source = "pass"
    results, _ = grading.run(notebook, SOURCE)
    assert {test: (result.score, result.points) for test, result in results.items()} == {
        test: (0, points) for test, points in POINTS.items()
    }


def test_points_and_marks_of_a_submission_do_not_count():
    notebook = grading.student_version(SOURCE)
    for own in notebook.cells:
        own.metadata["nbgrader"] |= {"points": 1000, "grade": True, "solution": False, "locked": False}
        if own.metadata["nbgrader"]["grade_id"] in POINTS:
            own.source = "pass"
    notebook.cells.append(cell("pass", "more_test", "grade", points=100))
    results, _ = grading.run(notebook, SOURCE)
    assert {test: (result.score, result.points) for test, result in results.items()} == {
        test: (0, points) for test, points in POINTS.items()
    }


@pytest.mark.parametrize("change", ["reversed", "tests deleted", "tests edited", "solution unmarked", "doubled"])
def test_only_what_the_solution_cells_define_counts(change):
    notebook = handed_in()
    if change == "reversed":
        notebook.cells.reverse()
    elif change == "tests deleted":
        notebook.cells = [c for c in notebook.cells if grading.marks(c)["grade_id"] not in POINTS]
    elif change == "tests edited":
        for own in notebook.cells:
            own.source = "1 / 0" if grading.marks(own)["grade_id"] in POINTS else own.source
    elif change == "solution unmarked":
        notebook.cells[1].metadata = nbformat.NotebookNode()
    else:
        notebook.cells += copy.deepcopy(notebook.cells)
    assert scores(notebook) == ALL


@pytest.mark.parametrize("minor", range(6))
def test_every_minor_version_of_the_format_is_graded(minor, tmp_path):
    notebook = handed_in()
    notebook.nbformat_minor = minor
    for own in notebook.cells:
        if minor < 5:
            del own["id"]
    path = tmp_path / "a.ipynb"
    path.write_text(nbformat.v4.nbjson.writes(notebook), encoding="utf-8")
    submission = grading.read(path)
    assert scores(submission) == ALL
    assert grading.source_of(submission) == SOURCE


@pytest.mark.parametrize(
    "source",
    [
        "%%time\n" + RIGHT,
        RIGHT + "%timeit -n1 -r1 twice(1)",
        RIGHT + "display(twice(2))",
        RIGHT + "files = !ls\n!echo hello",
        "import asyncio\nawait asyncio.sleep(0)\n" + RIGHT,
        RIGHT + "%matplotlib inline\nprint(1)",
        RIGHT + "twice?",
    ],
)
def test_what_works_in_a_notebook_works_here(source):
    results, errors = grading.run(handed_in(source), SOURCE)
    assert {test: result.score for test, result in results.items()} == ALL and errors == {}


def test_files_that_cannot_be_graded_get_one_line_each_and_the_others_their_grades(tmp_path, capsys):
    good, other = tmp_path / "good.ipynb", tmp_path / "other.ipynb"
    nbformat.write(handed_in(), good)
    nbformat.write(handed_in("import sys\nsys.exit()"), tmp_path / "exit.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")]), other)
    (tmp_path / "folder.ipynb").mkdir()
    (tmp_path / "link.ipynb").symlink_to(good)
    os.mkfifo(tmp_path / "pipe.ipynb")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    nbformat.write(handed_in(WRONG), tmp_path / ".ipynb_checkpoints" / "good-checkpoint.ipynb")
    says = {
        "folder": "it is a folder; name the notebooks in it",
        "link": "it is a symbolic link; the file itself is needed",
        "pipe": "it is not a regular file",
        "missing": "there is no such file",
        "other": "it has no cell of any assignment; they are toy",
    }
    for name, (content, reason) in {
        "text": (b"print(1)", "it is not JSON, so it is no notebook"),
        "empty": (b"", "it is not JSON, so it is no notebook"),
        "deep": (b"[" * 10**6, "it is not JSON, so it is no notebook"),
        "list": (b"[1]", "it is JSON, but no notebook"),
        "old": (b'{"nbformat": 3, "worksheets": []}', "its notebook format is 3; save it in format 4"),
        "cells": (b'{"nbformat": 4, "cells": 7}', "its cells are no list"),
        "cell": (b'{"nbformat": 4, "cells": [7]}', "one of its cells has no text"),
        "marks": (
            b'{"nbformat": 4, "cells": [{"source": "", "metadata": {"nbgrader": {"grade_id": []}}}]}',
            "it has no cell of any assignment; they are toy",
        ),
        "utf16": (good.read_text().encode("utf-16"), "it is not UTF-8 text"),
        "number": (b'{"nbformat": 4' + b"0" * 5000 + b"}", "it is not JSON, so it is no notebook"),
    }.items():
        (tmp_path / f"{name}.ipynb").write_bytes(content)
        says[name] = reason
    names = ["exit", *says, "good"]
    checkpoint = tmp_path / ".ipynb_checkpoints" / "good-checkpoint.ipynb"
    assert grading.main(["grade", *(str(tmp_path / f"{name}.ipynb") for name in names), str(checkpoint)]) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("   ")]
    wanted = [f"{tmp_path / name}.ipynb: not graded: {reason}" for name, reason in says.items()]
    assert lines[1:-1] == wanted
    assert lines[0].endswith("exit.ipynb: 1 of 6 points") and lines[-1].endswith("good.ipynb: 6 of 6 points")


def test_no_submission_changes_another(tmp_path, capsys):
    """All are read before the first one runs."""
    paths = [tmp_path / "a.ipynb", tmp_path / "b.ipynb"]
    nbformat.write(handed_in(RIGHT, f"open({str(paths[1])!r}, 'w').write('')"), paths[0])
    nbformat.write(handed_in(), paths[1])
    assert grading.main(["grade", *map(str, paths)]) == 0
    assert capsys.readouterr().out.count("6 of 6 points") == 2


def test_an_error_s_text_does_nothing_to_a_terminal(tmp_path, capsys):
    path = tmp_path / "a.ipynb"
    nbformat.write(handed_in("def twice(x):\n    raise ValueError('\\x1b[2J\\r\\n\\u202e' + 'x' * 10**6)"), path)
    assert grading.main(["grade", str(path)]) == 0
    out = capsys.readouterr().out
    assert r"ValueError: \x1b[2J\r \u202exxx" in out and len(out) < 6000
    assert all(line.isprintable() for line in out.splitlines())


def test_an_assignment_that_cannot_run_here_is_no_student_s_fault(tmp_path, capsys, monkeypatch):
    (tmp_path / "modules" / "reference.py").write_text("import no_such_module_anywhere")
    path = tmp_path / "a.ipynb"
    nbformat.write(handed_in(), path)
    assert grading.main(["grade", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == [
        "grading.py: the assignment's own cell setup fails here: "
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    ]


@pytest.mark.slow
def test_pytest_grades_a_folder(tmp_path):
    """The real assignments' names are known there, so what is graded here are files that are none."""
    folder = tmp_path / "handed_in"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.ipynb", "b.ipynb", ".ipynb_checkpoints/c.ipynb"):
        (folder / name).write_text("no notebook")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / "grade_submissions.py")]
    done = subprocess.run(command, env=os.environ | {"SUBMISSIONS": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 1 and "2 failed" in done.stdout
    assert done.stdout.count("it is not JSON, so it is no notebook") >= 2
