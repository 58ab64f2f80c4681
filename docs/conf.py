"""The documentation site: README, notebooks as they are stored, and the docstrings.  `make docs` builds it.

The pages are the files of the repository themselves, so the source folder is the top of it; nothing is executed, and
nothing that a page needs is loaded from elsewhere.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import minirec

ROOT = Path(__file__).resolve().parent.parent

project = "minirec"
version = release = minirec.__version__
author = copyright = "The minirec authors"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinxcontrib.katex"]
root_doc = "README"
COURSE = ["notebooks/README", *sorted(f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/*.ipynb"))]
COURSE += [f"notebooks/assignments/{path.stem}" for path in ROOT.glob("notebooks/assignments/README.md")]
PACKAGE = ["docs/model", "docs/samplers", "docs/training"]
RESULTS = sorted(f"benchmarks/results/{path.stem}" for path in ROOT.glob("benchmarks/results/*.md"))
MORE = ["minirec/assets/tiny/README", "tests/golden/README", "tests/golden/QUIRKS", "CONTRIBUTING", "CHANGELOG"]
TITLES = {"minirec/assets/tiny/README": "The shipped model"} | {
    page: f"Results: {page.split('/')[-1]}" for page in RESULTS
}
CONTENTS = {"Course": COURSE, "Package": PACKAGE, "Measurements": ["benchmarks/README", *RESULTS], "More": MORE}
include_patterns = [f"{page}.*" for pages in [[root_doc], *CONTENTS.values()] for page in pages]
exclude_patterns = [".*", "docs/_build", "runs", "**/*.png", "**/*.json"]
suppress_warnings = ["myst.header"]  # pages of results skip a level of headings

html_theme = "furo"
html_title = "minirec"
templates_path = ["_templates"]
html_additional_pages = {"index": "index.html"}  # sends to the README's page
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False  # it would copy every notebook

nb_execution_mode = "off"
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "image/gif", 15)]  # the animation of a notebook
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# MathML needs no fonts and no style sheet: every browser draws it by itself.
katex_options = 'output: "mathml"'
katex_css_path = "katex-math.css"  # the extension's own; the default is on another machine

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": False}
autodoc_inherit_docstrings = False
autodoc_mock_imports = ["lm_eval"]  # only an evaluation needs it, and it is large
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
smartquotes = False  # they would bend the quotes of "latent-diff"
default_role = "py:obj"  # a link if there is such a thing, else the text as code

EXPLAINED = r"(?:^|(?<=[.;,)] )|(?<=\.  ))[\w\\]+(?=:(?:\s|$))"  # a name and a colon where a sentence may begin


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", plain_to_rst)


def add_contents(app, page, source):
    """What only the site needs: the README shows no table of contents on GitHub, and results have no titles."""
    if page in RESULTS:
        source[0] = f"# {page.rpartition('/')[2]}\n\n{source[0]}"
    elif page == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def plain_to_rst(app, what, name, thing, options, lines):
    """Docstrings are plain text: paragraphs, with tables and pictures that are indented or begin with a bar."""
    names = set()
    if what in ("function", "method", "class") and thing.__module__.startswith("minirec"):
        names = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
        names |= set(inspect.signature(thing).parameters)
    rst, drawing = [], False
    for line in lines:
        if line.startswith((" ", "|")):
            if not drawing:
                rst += ["", ".. code-block:: text", ""]
            drawing = True
            rst.append(f"    {line}")
        elif not line:
            rst.append("")
        else:
            if drawing:
                rst.append("")
            drawing = False
            rst.append(prose(line, names))
    lines[:] = rst


def prose(line, names):
    """One line of a paragraph: `code` as code or a link, **bold** as such, all other signs as they are."""
    parts = re.split(r"(`[^`]+`|\*\*[^*]+\*\*)", line)
    for i, part in enumerate(parts):
        if i % 2 == 0:  # "num_steps: the most steps ..." in running text: what is explained stands out
            text = re.sub(r"([\\*_|`])", r"\\\1", part)
            parts[i] = re.sub(EXPLAINED, lambda m: f"**{m[0]}**" if m[0].replace("\\", "") in names else m[0], text)
        elif part.startswith("`") and not re.fullmatch(r"`[\w.]+`", part):
            parts[i] = f"`{part}`"
    return "".join(parts)
