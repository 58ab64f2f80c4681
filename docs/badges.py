"""Put "Open in Colab" under the title of notebooks: `python docs/badges.py OWNER/NAME FILE...`; `none` takes it out.

Only who publishes the repository knows its address, so the notebooks have no badge until this has been run.  Running
it again changes nothing; running it with another address replaces the old one.
"""

import json
import re
import sys
from pathlib import Path

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"


def line(repo: str, name: str) -> str:
    """The badge of a notebook, and how to get the package there."""
    address = f"https://colab.research.google.com/github/{repo}/blob/main/notebooks/{name}"
    return f"{BADGE}({address}) On Colab, first run `%pip install git+https://github.com/{repo}` in a cell of its own."


def write(repo: str | None, path: Path) -> None:
    """Set the badge of one notebook, or take it out; nothing else of the file changes."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    source = notebook["cells"][0]["source"]
    title, _, rest = "".join(source).partition("\n\n")
    if rest.startswith(BADGE):
        _, _, rest = rest.partition("\n\n")
    parts = [title, line(repo, path.name), rest] if repo else [title, rest]
    text = "\n\n".join(parts)
    notebook["cells"][0]["source"] = text.splitlines(keepends=True) if isinstance(source, list) else text
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    repo, *names = sys.argv[1:] or [""]
    if repo != "none" and not re.fullmatch(r"[A-Za-z0-9-]+/[\w.-]+", repo):
        print(f"REPO is {repo!r}; it must be owner/name, or none to take the badges out", file=sys.stderr)
        sys.exit(2)
    for name in names:
        write(None if repo == "none" else repo, Path(name))
