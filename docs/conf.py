"""The documentation site: a landing page, README, notebooks as they are stored, docstrings.  `make docs` builds it.

The pages are the files of the repository themselves, so the source folder is the top of it; nothing is executed, and
nothing that a page needs is loaded from elsewhere.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import minirec

ROOT = Path(__file__).resolve().parent.parent


def examples(path):
    """How the session of the examples begins; name -> its example, as the interpreter shows it."""
    head, *blocks = re.split(r"^# (minirec\.\S+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return head[head.index("\n\n    ") :].strip("\n"), dict(zip(blocks[::2], map(str.strip, blocks[1::2]), strict=True))


project = "minirec"
version = release = minirec.__version__
author = copyright = "The minirec authors"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode", "sphinxcontrib.katex"]
root_doc = "README"
COURSE = ["notebooks/README", *sorted(f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/*.ipynb"))]
COURSE += [f"notebooks/assignments/{path.stem}" for path in ROOT.glob("notebooks/assignments/README.md")]
MEASURED = [f"docs/{page}" for page in ("correctness", "depth", "speed", "other_families", "full_scale", "serving")]
MEASURED += ["benchmarks/README"]
PACKAGE = [f"docs/{page}" for page in ("model", "families", "samplers", "training", "figures", "files", "internals")]
RESULTS = sorted(f"benchmarks/results/{path.stem}" for path in ROOT.glob("benchmarks/results/*.md"))
MORE = ["minirec/assets/tiny/README", "tests/golden/README", "tests/golden/families/README", "tests/golden/QUIRKS"]
MORE += ["CONTRIBUTING", "CHANGELOG"]
TITLES = {  # of pages of results, which are stored as they were printed
    "batching": "Batching engine",
    "batching_deeper": "Batching engine at r = 32",
    "core_size": "Samplers by core size",
    "depth": "Accuracy by depth",
    "full_scale": "Full scale",
    "kv_sharing": "Shared keys and values",
    "overhead": "Overhead of decoding",
    "recipe": "Training recipe",
    "samplers": "Samplers",
}
CONTENTS = {"Course": COURSE, "Measurements": MEASURED, "Reference": PACKAGE, "More": MORE}
SESSION, EXAMPLES = examples(ROOT / "docs/examples.txt")
include_patterns = [f"{page}.*" for pages in [[root_doc], RESULTS, *CONTENTS.values()] for page in pages]
exclude_patterns = [".*", "docs/_build", "runs", "**/*.png", "**/*.json"]
suppress_warnings = ["myst.header"]  # pages of results skip a level of headings

html_theme = "furo"
html_title = "minirec"
templates_path = ["_templates"]
html_additional_pages = {"index": "index.html"}  # the landing page
html_static_path = ["_static", "drawings"]
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

autodoc_default_options = {"member-order": "bysource"}
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
    app.connect("html-page-context", home)


def add_contents(app, page, source):
    """What only the site needs: tables of contents, titles of results, and a summary of each page of the reference."""
    if page in RESULTS:
        source[0] = f"# {TITLES[page.rpartition('/')[2]]}\n\n{source[0]}"
    elif page in PACKAGE:
        title, rule, _, says, rest = source[0].split("\n", 4)
        source[0] = "\n".join([title, rule, "", says, "", *summary(rest), "", rest])
    elif page == "benchmarks/README":
        source[0] += toctree("Results", RESULTS)
    elif page == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += toctree(caption, pages)


def toctree(caption, pages):
    """A hidden table of contents, with paths from the top of the repository."""
    return "\n".join(
        ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *(f"/{page}" for page in pages), "```", ""]
    )


def summary(rst):
    """A table of what the modules of a page of the reference have, and how its examples begin."""
    modules = re.findall(r"automodule:: (\S+)\n   :members: (.+)", rst)
    names = [f"{module}.{name}" for module, members in modules for name in members.split(", ")]
    shown = [name.removeprefix("minirec.") for name in names]
    lines = [
        ".. currentmodule:: minirec",
        "",
        ".. autosummary::",
        "   :nosignatures:",
        "",
        *(f"   {name}" for name in shown),
        "",
    ]
    if not any(name in EXAMPLES for name in names):
        return lines
    return [*lines, "The examples run in one session that begins with", "", ".. code-block:: python", "", SESSION, ""]


def home(app, page, template, context, doctree):
    """The name of the site leads to its landing page, not to the page that holds the table of contents."""
    context["master_doc"] = "index"


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
    example = EXAMPLES.get(name)
    lines[:] = [*rst, "", *example.splitlines(), ""] if example else rst


def prose(line, names):
    """One line of a paragraph: `code` as code or a link, **bold** and *slanted* as such, other signs as they are."""
    parts = re.split(r"(`[^`]+`|\*\*[^*]+\*\*|\*\w+\*)", line)
    for i, part in enumerate(parts):
        if i % 2 == 0:  # "num_steps: the most steps ..." in running text: what is explained stands out
            text = re.sub(r"([\\*_|`])", r"\\\1", part)
            parts[i] = re.sub(EXPLAINED, lambda m: f"**{m[0]}**" if m[0].replace("\\", "") in names else m[0], text)
        elif part.startswith("`") and not re.fullmatch(r"`[\w.]+`", part):
            parts[i] = f"`{part}`"
    return "".join(parts)
