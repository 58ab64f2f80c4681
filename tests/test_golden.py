"""The official numbers in golden/ are the ones that its READMEs describe, bit for bit."""

import hashlib
import re

import pytest


@pytest.mark.parametrize("part", [".", "families"])
def test_files_are_those_that_the_readme_lists(golden_folder, part):
    folder = golden_folder / part
    text = (folder / "README.md").read_text(encoding="utf-8")
    listed = {file: digest for digest, file in re.findall(r"^([0-9a-f]{64})  (\S+)$", text, flags=re.MULTILINE)}
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"]
    there = {p.relative_to(folder).as_posix(): p for p in files}
    if part == ".":
        there = {name: path for name, path in there.items() if not name.startswith("families/")}
    assert there.keys() == listed.keys()
    for file, digest in listed.items():
        assert hashlib.sha256(there[file].read_bytes()).hexdigest() == digest, file
