"""The notebooks as they are stored: whole, run from top to bottom, and light. nbval runs them."""

import json
import warnings
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
MAX_BYTES = 1_000_000
MIN_CELLS, MAX_CELLS = 25, 45


def problems_of_format(notebook: dict) -> list[str]:
    if notebook.get("nbformat") != 4:
        return [f"nbformat is {notebook.get('nbformat')}, not 4"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nbformat only warns of missing or repeated cell ids
            nbformat.validate(notebook)
    except (nbformat.ValidationError, Warning) as problem:
        return [f"not valid nbformat: {problem}"]
    return []


def problems_of_whole(notebook: dict) -> list[str]:
    problems = []
    kernel = notebook["metadata"].get("kernelspec", {}).get("name")
    if kernel != "python3":
        problems.append(f"the kernel is {kernel!r}, not 'python3'")
    if "widgets" in notebook["metadata"]:
        problems.append("widget state is stored in the metadata")
    cells = notebook["cells"]
    if not MIN_CELLS <= len(cells) <= MAX_CELLS:
        problems.append(f"{len(cells)} cells, not {MIN_CELLS} to {MAX_CELLS}")
    if not cells or cells[0]["cell_type"] != "markdown" or not "".join(cells[0]["source"]).startswith("# "):
        problems.append("cell 0 is not markdown that starts with a '# ' title")
    return problems


def problems_of_cells(notebook: dict) -> list[str]:
    problems = []
    count = 0
    for index, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        count += 1
        if cell["execution_count"] != count:
            problems.append(f"cell {index}: execution_count is {cell['execution_count']}, not {count}")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                problems.append(f"cell {index}: stored error {output['ename']}")
            if output.get("name") == "stderr":
                problems.append(f"cell {index}: stored output on stderr")
    return problems


def test_there_are_notebooks():
    assert NOTEBOOKS, "no notebooks found: the other tests of this file would prove nothing"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    problems = problems_of_format(notebook)
    if not problems:  # the rest relies on the format
        problems = problems_of_whole(notebook) + problems_of_cells(notebook)
    if path.stat().st_size >= MAX_BYTES:
        problems.append(f"{path.stat().st_size} bytes, not under {MAX_BYTES}")
    assert not problems, "\n".join(f"{path.name}: {problem}" for problem in problems)
