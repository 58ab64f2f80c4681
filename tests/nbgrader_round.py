"""Let nbgrader itself make and grade the four assignments; `make test-nbgrader` runs this in an environment of its own.

For each: generate the student version, which must have the text that `grading.py` gives it; hand in the solution and
the untouched stub; autograde both.  Full points for the one, none for the other, or an exit code of 1.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from traitlets.config import Config, PyFileConfigLoader

FOLDER = Path(__file__).resolve().parent.parent / "notebooks" / "assignments"
spec = importlib.util.spec_from_file_location("grading", FOLDER / "grading.py")
grading = sys.modules["grading"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grading)


def hand_in(course: Path, student: str, name: str, notebook) -> None:
    place = course / "submitted" / student / name
    place.mkdir(parents=True)
    nbformat.write(notebook, place / f"{name}.ipynb")


def succeeded(result: dict, what: str) -> None:
    if not result["success"]:
        sys.exit(f"{what} failed:\n{result.get('log')}\n{result.get('error')}")


def main(course: Path) -> bool:
    shutil.copy(FOLDER / "nbgrader_config.py", course)
    config = Config(PyFileConfigLoader("nbgrader_config.py", path=str(course)).load_config())
    config.CourseDirectory.root = str(course)
    api, fine = NbGraderAPI(config=config), True
    print(f"{'assignment':18s} {'':9s} points  of  seconds")
    for path in grading.SOURCES:
        name, source = path.stem, nbformat.read(path, as_version=4)
        (course / "source" / name).mkdir(parents=True)
        shutil.copy(path, course / "source" / name)
        succeeded(api.generate_assignment(name), f"generating {name}")
        release = nbformat.read(course / "release" / name / path.name, as_version=4)
        ours = [cell.source.strip() for cell in grading.student_version(source).cells]
        if [cell.source.strip() for cell in release.cells] != ours:
            fine = False
            print(f"{name}: nbgrader's student version is not that of grading.py")
        hand_in(course, "stub", name, release)
        for cell, solved in zip(release.cells, source.cells, strict=True):
            if grading.marks(cell).get("solution"):
                cell.source = solved.source
        hand_in(course, "solution", name, release)
        for student in ("solution", "stub"):
            began = time.perf_counter()
            succeeded(api.autograde(name, student), f"grading {name} of {student}")
            with Gradebook(f"sqlite:///{course / 'gradebook.db'}", course_id="minirec") as book:
                submission = book.find_submission(name, student)
                score, most = submission.score, submission.max_score
            fine &= score == (most if student == "solution" else 0) and most > 0
            print(f"{name:18s} {student:9s} {score:6g} {most:3g} {time.perf_counter() - began:8.0f}", flush=True)
    return fine


if __name__ == "__main__":
    # nbgrader starts a program of this environment by its name alone
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if main(Path(folder)) else 1)
