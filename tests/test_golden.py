"""The official numbers in golden/ are the ones that its README describes, bit for bit."""

import hashlib
import re


def test_files_are_those_that_the_readme_lists(golden_folder):
    text = (golden_folder / "README.md").read_text(encoding="utf-8")
    listed = {file: digest for digest, file in re.findall(r"^([0-9a-f]{64})  (\S+)$", text, flags=re.MULTILINE)}
    files = [p for p in golden_folder.rglob("*") if p.is_file() and p.suffix != ".md"]
    there = {p.relative_to(golden_folder).as_posix(): p for p in files}
    assert there.keys() == listed.keys()
    for file, digest in listed.items():
        assert hashlib.sha256(there[file].read_bytes()).hexdigest() == digest, file
