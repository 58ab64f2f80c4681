"""What is released works: each file given is installed in a fresh environment, where the demo and the tests run.

    python tests/release_check.py dist/*

The tests run in a copy of the repository in which `minirec` is the installed package.  Needs a package registry.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check(released: Path, folder: Path) -> None:
    """Install `released` below `folder` and use it there; CalledProcessError at the first command that fails."""
    venv.create(folder / "venv", with_pip=True)
    bin_ = folder / "venv" / "bin"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command, cwd: Path) -> str:
        output = subprocess.PIPE if "-c" in command else None
        return subprocess.run(command, cwd=cwd, env=environment, check=True, stdout=output, text=True).stdout

    run(bin_ / "pip", "install", "-qq", f"{released}[dev]", f"--constraint={ROOT / 'constraints.txt'}", cwd=folder)
    print(f"{released.name}: the demo", flush=True)
    run(bin_ / "minirec", "demo", cwd=folder)

    copy = folder / "copy"
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if not name.startswith("minirec/") and (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    installed = Path(run(bin_ / "python", "-c", "import minirec; print(minirec.__file__)", cwd=folder).strip()).parent
    assert folder in installed.parents, f"{installed} is not what was installed"
    (copy / "minirec").symlink_to(installed)
    print(f"{released.name}: the fast tests", flush=True)
    run(bin_ / "pytest", "-q", "-n", "2", "--dist", "loadfile", cwd=copy)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as temporary:
            check(Path(name).resolve(), Path(temporary).resolve())
    print(f"{len(sys.argv) - 1} released files work")
