"""JupyterLab and the documentation site as a reader meets them: in a browser.  Slow; needs Chromium and playwright."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MINUTES = 20  # for one notebook, on a machine that does other things too


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation site, built without a warning, whose links have been checked."""
    for needed in ("sphinx", "myst_nb", "furo", "sphinxcontrib.katex"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-b", "html", "-c", "docs", ".", folder]
    for arguments in (command, ["docs/links.py", folder]):
        result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


PICTURES = "[...document.images].map(i => i.complete && i.naturalWidth > 0)"
FORMULAS = "[...document.querySelectorAll('.math')].map(f => f.querySelector('math') !== null)"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_of_the_site_draws_its_figures_and_its_equations(browser, site, path):
    notebook = nbformat.read(path, as_version=4)
    stored = [kind for c in notebook.cells for o in c.get("outputs", ()) for kind in o.get("data", ())]
    figures = sum(kind.startswith("image/") for kind in stored)
    outside, wrong = [], []
    page = browser.new_page()
    page.on("request", lambda request: outside.append(request.url) if request.url.startswith("http") else None)
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto((site / "notebooks" / path.with_suffix(".html").name).as_uri(), wait_until="load")
    pictures, formulas = page.evaluate(PICTURES), page.evaluate(FORMULAS)
    text = page.inner_text("article")
    page.close()
    assert all(pictures) and len(pictures) == figures, f"{sum(pictures)} of {figures} figures are drawn"
    assert all(formulas), f"{formulas.count(False)} of {len(formulas)} formulas are not drawn"
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert bool(formulas) == ("$" in prose)
    assert "$" not in text or "$" in "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert [url for url in outside if "colab-badge" not in url] == [], "a page needs nothing from elsewhere"
    assert wrong == []


def test_the_first_page_of_the_site_leads_to_every_notebook(browser, site):
    page = browser.new_page()
    page.goto((site / "index.html").as_uri())
    page.get_by_text("Open the first notebook").click()
    page.wait_for_url(f"**/{NOTEBOOKS[0].stem}.html")
    page.go_back()
    for path in NOTEBOOKS:
        page.locator(f".sidebar-tree a[href*='{path.stem}.html']").first.click()
        page.wait_for_url(f"**/{path.stem}.html")
        assert page.inner_text("h1").startswith(path.name[:2])
        page.locator(".sidebar-brand").click()
        page.wait_for_url("**/index.html")
    assert all(page.evaluate(PICTURES))
    page.close()


# What of the article is under the side bar at the right or beyond the window, and doesn't scroll by itself.
CUT_OFF = """() => {
  const bar = document.querySelector('.toc-drawer'), window_ = document.documentElement.clientWidth;
  const beside = bar && getComputedStyle(bar).position !== 'fixed' && bar.getBoundingClientRect().width > 0;
  const edge = beside ? bar.getBoundingClientRect().left : window_;
  const scrolls = e => {
    for (; e && !e.matches('.content'); e = e.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return true;
  };
  const out = [...document.querySelectorAll('article *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && box.right > edge + 1 && !scrolls(e);
  });
  return [document.documentElement.scrollWidth - window_, out.map(e => e.tagName + ' ' + e.textContent.slice(0, 40))];
}"""
PAGES = ["index", "README", "notebooks/README", "notebooks/06_diffusion_forcing", "docs/speed", "docs/samplers"]
PAGES += ["docs/model", "docs/figures", "benchmarks/README", "benchmarks/results/samplers"]


@pytest.mark.parametrize("width", [360, 768, 1000, 1280, 1320, 1440, 1536, 1920])
def test_the_contents_are_whole_at_every_width(browser, site, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    found = {}
    for name in PAGES:
        page.goto((site / f"{name}.html").as_uri())
        found[name] = page.evaluate(CUT_OFF)
    page.close()
    assert found == {name: [0, []] for name in PAGES}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab as `make lab` starts it, on copies of the notebooks without their outputs: its address and folder."""
    home = tmp_path_factory.mktemp("lab")
    folder = home / "notebooks"
    folder.mkdir()
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / path.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {f"JUPYTER{name}_DIR": str(home / name) for name in ("_CONFIG", "_DATA", "_RUNTIME", "LAB_SETTINGS")}
    places["JUPYTERLAB_WORKSPACES_DIR"] = str(home / "workspaces")
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= places | {"CUDA_VISIBLE_DEVICES": ""}
    options = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=t",
    ]
    with (home / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", str(folder), *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/lab?token=t&reset", folder
        finally:
            server.terminate()
            server.wait(60)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_newcomer_opens_a_notebook_and_runs_all_cells(browser, lab, path):
    address, folder = lab
    page = browser.new_page()
    page.set_default_timeout(60_000 * MINUTES)
    page.goto(address)
    page.locator(f".jp-DirListing-item[title*='{path.name}']").dblclick()
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before that, running a cell does nothing
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    end = time.monotonic() + 60 * MINUTES
    while True:
        time.sleep(5)
        page.keyboard.press("Control+s")
        time.sleep(1)
        cells = [cell for cell in nbformat.read(folder / path.name, as_version=4).cells if cell.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        errors = [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
        assert not errors, json.dumps(errors)[:2000]
        if all(cell.execution_count for cell in cells):
            break
        ran = sum(bool(cell.execution_count) for cell in cells)
        assert time.monotonic() < end, f"{ran} of {len(cells)} cells after {MINUTES} minutes"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    stored = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", ())]
    pictures = [
        sum(kind.startswith("image/") for o in some for kind in o.get("data", ())) for some in (outputs, stored)
    ]
    assert pictures[0] == pictures[1], "as many figures as in the stored notebook"
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Shut Down Kernel", exact=True).click()
    page.close()
