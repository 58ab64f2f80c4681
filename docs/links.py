"""Check the links of a built site: `python docs/links.py FOLDER`; exit code 1 names every one that leads nowhere.

A link inside the site has to lead to a file, and to a heading of it if it names one.  What a page needs in order to be
drawn (scripts, style sheets, images) has to be a file of the site, so that it can be read without network; a badge is
the one picture that comes from elsewhere.  Links to other sites are not followed.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


class Page(HTMLParser):
    """The names of a page that can be linked to, what it links to, and what it needs."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.needs = {"", "top"}, [], []  # every page has the first two
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("img", "script", "source", "iframe") and given.get("src"):
            self.needs.append(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.needs.append(given["href"])


def broken(site: Path) -> list[str]:
    """One line for each link of the site that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    problems = [] if pages else [f"{site}: no pages"]
    for path, page in sorted(pages.items()):
        for link in page.links + page.needs:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                if link in page.needs and url.scheme != "data" and link != BADGE:
                    problems.append(f"{path.relative_to(site.resolve())}: needs {link}, which is not part of the site")
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file():
                problems.append(f"{path.relative_to(site.resolve())}: {link} is not there")
            elif target in pages and unquote(url.fragment) not in pages[target].ids:
                problems.append(f"{path.relative_to(site.resolve())}: {link} names no heading of its page")
    return problems


if __name__ == "__main__":
    problems = broken(Path(sys.argv[1]))
    print("\n".join(problems) or "all links inside the site lead somewhere")
    sys.exit(bool(problems))
