"""Course table, badges, citation and site: what readers find outside the notebooks and the package."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import minirec

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
BEFORE = ("**Prerequisites.**", "**You need.**", "**Before you start.**")
NUMBER = r"(?<!\d)\d\d(?!\d)"


def head(path: Path) -> tuple[str, list[str]]:
    """The title of a notebook and the paragraphs of its first cell."""
    title, *paragraphs = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).split("\n\n")
    return title.removeprefix("# "), paragraphs


def course_table() -> dict[str, list[str]]:
    """File name -> title, minutes, what it builds on, and what one can do afterwards."""
    rows = re.findall(
        r"^\| \[(.+?)\]\((\S+\.ipynb)\) \|(.*)\|$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE
    )
    return {file: [title, *(cell.strip() for cell in rest.split("|"))] for title, file, rest in rows}


def test_the_course_has_one_row_for_each_notebook_in_order():
    assert list(course_table()) == [path.name for path in NOTEBOOKS], "notebooks/README.md: a row for each notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_course_says_what_the_notebook_s_head_says(path):
    title, minutes, before, afterwards = course_table()[path.name]
    own_title, paragraphs = head(path)
    assert own_title.startswith(title), "the title, or how it begins"
    (time,) = [p for p in paragraphs if p.startswith("**Time.**")]
    assert minutes == re.search(r"(\d+) minutes", time).group(1)
    (needs,) = [p for p in paragraphs if p.startswith(BEFORE)]
    assert set(re.findall(NUMBER, before)) == set(re.findall(NUMBER, needs)), f"the head says: {needs}"
    assert all(number < path.name[:2] for number in re.findall(NUMBER, before)), "nothing builds on what comes later"
    assert afterwards


def badges(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "docs/badges.py", *arguments], capture_output=True, text=True)


def test_badges_are_written_once_replaced_and_taken_out(tmp_path):
    copies = [Path(shutil.copy(path, tmp_path)) for path in NOTEBOOKS]
    assert badges("none", *copies).returncode == 0
    bare = [path.read_bytes() for path in copies]
    assert badges("someone/copy.of-it", *copies).returncode == 0
    once = [path.read_bytes() for path in copies]
    assert badges("someone/copy.of-it", *copies).returncode == 0
    assert [path.read_bytes() for path in copies] == once
    for path in copies:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        _, paragraphs = head(path)
        assert (
            f"(https://colab.research.google.com/github/someone/copy.of-it/blob/main/notebooks/{path.name})"
            in (paragraphs[0])
        )
        assert "git+https://github.com/someone/copy.of-it`" in paragraphs[0]
        assert paragraphs[1].startswith("**Goal.**")
        assert all(line.endswith("\n") for line in notebook["cells"][0]["source"][:-1]), "as Jupyter stores it"
    assert badges("other/name", *copies).returncode == 0
    assert all(b"someone" not in path.read_bytes() and b"other/name" in path.read_bytes() for path in copies)
    assert badges("none", *copies).returncode == 0
    assert [path.read_bytes() for path in copies] == bare


@pytest.mark.parametrize("repo", [(), ("",), ("minirec",), ("https://github.com/a/b",), ("a/b/c",)])
def test_a_badge_needs_an_address(repo, tmp_path):
    copy = Path(shutil.copy(NOTEBOOKS[0], tmp_path))
    before = copy.read_bytes()
    result = badges(*repo, *([copy] if repo else []))
    assert result.returncode == 2 and "owner/name" in result.stderr and len(result.stderr.splitlines()) == 1
    assert copy.read_bytes() == before


def test_no_badge_leads_to_another_notebook_or_repository():
    repositories = set()
    for path in NOTEBOOKS:
        for repo, file in re.findall(
            r"colab\.research\.google\.com/github/(\S+?)/blob/main/notebooks/([^)]*)", path.read_text("utf-8")
        ):
            repositories.add(repo)
            assert file == path.name
    assert len(repositories) <= 1


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (minirec.__version__, "Apache-2.0")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert [r["url"] for r in citation["references"]] == [
        "https://arxiv.org/abs/2510.14961", "https://arxiv.org/abs/2502.05171"
    ]  # fmt: skip


def test_the_changelog_has_this_version():
    assert f"\n## {minirec.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_module_is_on_one_page_of_the_site():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.rst")))
    listed = re.findall(r"^\.\. automodule:: minirec\.(\w+)$", pages, re.MULTILINE)
    modules = [path.stem for path in (ROOT / "minirec").glob("*.py") if path.stem != "__init__"]
    assert sorted(listed) == sorted([*modules, "continuous_batching"]), "docs/*.rst: one automodule for each module"


def test_links_that_lead_nowhere_are_found(tmp_path):
    def check() -> tuple[int, list[str]]:
        command = [sys.executable, ROOT / "docs/links.py", tmp_path]
        result = subprocess.run(command, capture_output=True, text=True)
        return result.returncode, result.stdout.splitlines()

    assert check()[0] == 1, "no pages are no site"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.html").write_text('<h1 id="here">B</h1><a href="../a.html">a</a><a href="#here">h</a>')
    good = '<a href="sub/b.html#here">b</a><a href="https://nowhere.invalid/">far</a><img src="data:image/png;base64,">'
    (tmp_path / "a.html").write_text(good)
    assert check()[0] == 0
    bad = '<a href="c.html">c</a><a href="sub/b.html#there">b</a><script src="https://nowhere.invalid/x.js"></script>'
    (tmp_path / "a.html").write_text(good + bad + '<img src="p.png">')
    code, lines = check()
    assert code == 1 and len(lines) == 4
    for line, name in zip(sorted(lines), sorted(["c.html", "sub/b.html#there", "p.png", "x.js"]), strict=True):
        assert name in " ".join(lines) and line.startswith("a.html: ")
