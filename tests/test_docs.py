"""Course table, badges, citation and site: what readers find outside the notebooks and the package."""

import doctest
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
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


def reference() -> dict[str, list[str]]:
    """Module -> its members on the pages of the reference."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.rst")))
    listed = re.findall(r"^\.\. automodule:: (\S+)$(?:\n   :members: (.+))?", pages, re.MULTILINE)
    assert len({module for module, _ in listed}) == len(listed), "a module is documented twice"
    return {module: members.split(", ") if members else [] for module, members in listed}


def test_every_module_is_on_a_page_of_the_site():
    """Itself, or the package it belongs to."""
    listed = reference()
    folders = {"minirec.files", "minirec.figures", "minirec.tools"}  # what they hold is listed one by one
    for module in pkgutil.walk_packages(minirec.__path__, "minirec."):
        above = module.name.rpartition(".")[0]
        assert module.name in folders | listed.keys() or above in listed, f"docs/*.rst: no automodule for {module.name}"


def test_what_the_site_lists_is_there():
    for module, members in reference().items():
        if module != "minirec.tools.lm_eval_adapter":  # needs lm-eval
            there = vars(import_module(module))
            assert [name for name in members if name not in there] == [], module


SESSION, *EXAMPLES = re.split(
    r"^# (minirec\.\S+)\n", (ROOT / "docs/examples.txt").read_text(encoding="utf-8"), flags=re.MULTILINE
)
EXAMPLES = dict(zip(EXAMPLES[::2], EXAMPLES[1::2], strict=True))


def test_every_function_of_the_reference_has_an_example():
    listed = [
        f"{module}.{name}"
        for module, members in reference().items()
        for name in members
        if inspect.isfunction(getattr(import_module(module), name))
    ]
    assert [name for name in listed if name not in EXAMPLES] == [], "docs/examples.txt: these have no example"


def test_the_examples_give_what_they_say(tmp_path, monkeypatch):
    """In one session, in an empty folder; a later example may use what an earlier one made."""
    monkeypatch.chdir(tmp_path)
    names, report = {}, []
    exec(textwrap.dedent(SESSION[SESSION.index("\n\n    ") :]), names)
    for name, example in EXAMPLES.items():
        assert name.rpartition(".")[2] in reference()[name.rpartition(".")[0]], f"{name} has an example, but no page"
        session = doctest.DocTestParser().get_doctest(example, names, name, None, 0)
        session.globs = names  # not a copy
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=report.append, clear_globs=False)
        assert results.attempted, f"{name}: no example"
        plt.close("all")
    assert not report, "".join(report)


# --- README ---

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_runs(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 12
    exec(code, {})
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["True", "True"]


def test_the_readme_is_short_and_its_table_of_results_too():
    assert len(README.split()) < 1400
    (results,) = re.findall(r"^## Results\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    rows = [line for line in results.splitlines() if line.startswith("|")][2:]
    assert 1 <= len(rows) <= 5
    assert rows[0].startswith("| autoregressive, r = 8 |") and any("adaptive exit" in row for row in rows)


def test_the_results_in_the_readme_are_those_of_the_benchmark():
    """Speed over the smallest sufficient depth, all problems together; answers; recurrent passes per token."""
    results = (ROOT / "benchmarks/results/samplers.md").read_text(encoding="utf-8").partition("\n## all families")[2]
    speed, work = (
        {
            row[0]: row[1:]
            for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines())
            if row
        }
        for part in results.split("\n\n")[1:3]
    )
    names = {
        "autoregressive, r = 8": "autoregressive, r = 8",
        "adaptive exit": "adaptive exit, threshold 0.4, exit_in_prefill True, num_steps 8",
        "diffusion forcing": "diffusion forcing, exit_threshold 0.4, num_steps 8",
        "self-speculative": "speculative, draft_steps 1, lookahead 4, num_steps 8",
        "lossless wavefront": "lossless wavefront, guess_after 2, num_steps 8",
    }
    shown = re.findall(r"^\| ([^|]+) \| \**([\d.]+)\** \| ([\d.]+) % \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(shown) == len(names)
    for (label, over, right, passes), (start, name) in zip(shown, names.items(), strict=True):
        assert label.startswith(start)
        assert float(over) == float(speed[name][-1])
        assert float(right) == pytest.approx(float(speed[name][0].rstrip(" %")), abs=0.05)
        assert float(passes) == pytest.approx(float(work[name][0].split()[0]), abs=0.051)


def test_the_course_in_the_readme_is_the_course():
    rows = re.findall(r"^\| \[(.+?)\]\(notebooks/(\S+\.ipynb)\) \| (\d+) \|", README, re.MULTILINE)
    assert [(file, title, minutes) for title, file, minutes in rows] == [
        (file, title, minutes) for file, (title, minutes, *_) in course_table().items()
    ]


def test_the_file_tree_of_the_readme_is_that_of_the_package():
    (tree,) = re.findall(r"^```text\n(minirec/\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    (inside,) = re.findall(r"^minirec/\n((?:  .*\n)+)", tree, re.MULTILINE)
    named = {word.partition("/")[0].removesuffix(".py") for line in inside.splitlines() for word in line.split()}
    own = (path for path in (ROOT / "minirec").iterdir() if path.name[0] not in "._")
    there = {path.stem for path in own}
    assert there <= named, "README.md: What is where"
    for word in re.findall(r"\S+\.py", inside):
        assert (ROOT / "minirec" / word).is_file(), word


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_of_readme_and_pages_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_landing_page_leads_to_the_first_notebook_and_has_three_cards():
    page = (ROOT / "docs/_templates/index.html").read_text(encoding="utf-8")
    assert f"pathto('notebooks/{NOTEBOOKS[0].stem}')" in page
    assert page.count('class="card"') == 3 and "race.svg" in page
    for target in re.findall(r"pathto\('([^',]+)'\)", page):
        assert target == "genindex" or list(ROOT.glob(f"{target}.*")), target


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
