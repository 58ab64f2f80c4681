"""Files that are replaced as a whole: whatever stops the writer, a reader finds the old content or the new.

One file      is written in a temporary folder beside its place and moved there (`write_whole`).
Several files are written to a temporary folder in theirs.  Renaming that folder to `.saved` commits them; then they
              move to their places (`saving`).  A process that is killed in between leaves `.saved`, and whoever reads
              or saves next finishes the move (`publish`).

Temporary folders and locks are held by flock, which ends with the process.  So what a killed process leaves can be told
from what a living one is writing, and the next save removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minirec.files.machine import one_line

SAVED, LOCK, FILES = ".saved", ".lock", "files.json"
PATIENCE = 10  # seconds to wait for another process that saves to the same folder


def write_json(path: Path, values: dict) -> None:
    """Write an object as JSON; ValueError or TypeError if JSON cannot hold it."""
    write_whole(path, as_json(values))


def as_json(values: dict) -> Callable[[str], object]:
    """What writes an object to a file that is named later."""
    text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"
    return lambda path: Path(path).write_text(text)


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Replace a file by what `write(temporary path)` writes; OSError that names `path` if the disk refuses."""
    with blaming(path), temporary(path.parent, path.name) as part:
        write(str(part / path.name))
        _seal(part / path.name)
        os.replace(part / path.name, path)
        _sync(path.parent)


@contextmanager
def saving(folder: Path, owned: re.Pattern) -> Iterator[Callable[[str, Callable[[str], object]], None]]:
    """Replace the files of a folder that `owned` matches, all or none; the others stay.

    `with saving(folder, owned) as write: write(name, writer)`, where writer(path) writes the file.  OSError that names
    the file if the disk refuses it, and if another process is saving to the folder for long.  Until the block ends, the
    folder's files are as they were.
    """
    new = not folder.exists()
    with blaming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / LOCK, "is saving to it", PATIENCE):
            _publish(folder, owned)
            with temporary(folder, "saving") as part:
                names: list[str] = []

                def write(name: str, writer: Callable[[str], object]) -> None:
                    with blaming(folder / name):
                        writer(str(part / name))
                        _seal(part / name)
                    names.append(name)

                yield write
                with blaming(folder):
                    (part / FILES).write_text(json.dumps(names))
                    _seal(part / FILES)
                    _sync(part)
                    os.replace(part, folder / SAVED)  # the commit
            _publish(folder, owned)
    finally:
        if new:
            with suppress(OSError):  # not empty: it was saved
                folder.rmdir()


def publish(folder: Path, owned: re.Pattern) -> None:
    """Finish a save to `folder` that was committed and then stopped; waits for one that is going on."""
    if (folder / SAVED).exists():
        with locked(folder / LOCK, "is saving to it", PATIENCE):
            _publish(folder, owned)


def is_left_over(path: Path) -> bool:
    """Is this what a killed save may leave in its folder before it has committed?"""
    return path.name == LOCK or re.fullmatch(r"\.saving\..{8}\.part", path.name) is not None


def _publish(folder: Path, owned: re.Pattern) -> None:
    saved = folder / SAVED
    with blaming(folder):
        if (saved / FILES).exists():  # it is the last file to be removed
            names = _listed(saved / FILES, owned)
            for name in names:
                if (saved / name).exists():
                    os.replace(saved / name, folder / name)
            for path in folder.iterdir():
                if owned.fullmatch(path.name) and path.name not in names:
                    path.unlink(missing_ok=True)
            _sync(folder)
            (saved / FILES).unlink()
        if saved.exists():
            shutil.rmtree(saved)


def _listed(path: Path, owned: re.Pattern) -> list[str]:
    """The names of the files of a save; a folder from somebody else may hold any list."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and owned.fullmatch(name) for name in names):
        raise ValueError(f"{path} does not list the files of a checkpoint")
    return names


@contextmanager
def temporary(folder: Path, name: str) -> Iterator[Path]:
    """A folder in `folder` that is removed at the end, or by the next call for this name if this process is killed."""
    for left in folder.glob(f".{name}.????????.part"):
        with suppress(OSError), _open(left) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises as long as its process lives
            shutil.rmtree(left, ignore_errors=True)
    while True:
        with blaming(folder):
            part = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}.", suffix=".part"))
        try:
            with _open(part) as handle:
                with suppress(OSError):  # a file system without locks: what a killed process leaves there stays
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not part.exists():
                    continue  # another process took it for a dead one's before it was locked
                part.chmod(0o755)
                yield part
                return
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def locked(path: Path, what: str, wait: float = 0) -> Iterator[None]:
    """Hold the lock file `path` until the block or the process ends.

    If another process holds it for longer than `wait` seconds: OSError "<folder> is in use: process 7 on host <what>".
    """
    until = time.monotonic() + wait
    while True:
        with blaming(path.parent):
            file = open(path, "a+b", buffering=0)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = one_line(file.read(200).decode(errors="replace")) or "another process"
                if time.monotonic() >= until:
                    raise OSError(f"{path.parent} is in use: {holder} {what}") from None
                time.sleep(0.02)
                continue
            except OSError:
                pass  # a file system without locks
            with suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    try:
                        with blaming(path.parent):
                            file.truncate(0)
                            file.write(f"process {os.getpid()} on {platform.node()}".encode())
                        yield
                        return
                    finally:
                        path.unlink(missing_ok=True)
            # its last holder removed it before this process locked it


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Errors of the system name `path`, which the user knows, whichever temporary file or library they come from."""
    try:
        yield
    except Exception as error:
        rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers raise classes of their own
        number = error.errno if isinstance(error, OSError) else int(rust[1]) if rust else None
        if number is None or (isinstance(error, OSError) and error.filename == str(path)):
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def _seal(path: Path) -> None:
    """Readable by everybody, and on the disk."""
    path.chmod(0o644)
    _sync(path)


def _sync(path: Path) -> None:
    with _open(path) as handle:
        os.fsync(handle)


@contextmanager
def _open(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
