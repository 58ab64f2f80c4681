"""pyproject.toml, constraints.txt and environment.yml say the same thing, and so does what is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import minirec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
PIN_LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def own_requirement(requirement: Requirement) -> bool:
    return canonicalize_name(requirement.name) == PROJECT["name"]


REQUIREMENTS = [
    requirement
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    if not own_requirement(requirement := Requirement(text))
]


def pins() -> dict[str, Requirement]:
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, PIN_LINES)}


def pinned_version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    return specifier.version


def test_version_is_the_same_everywhere():
    assert minirec.__version__ == metadata.version("minirec") == PROJECT["version"]


def test_extras_of_this_package_exist():
    for text in [text for extra in EXTRAS.values() for text in extra]:
        requirement = Requirement(text)
        if own_requirement(requirement):
            assert requirement.extras and requirement.extras <= EXTRAS.keys(), text


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_requirement_is_one_lower_bound_that_the_pin_satisfies(requirement):
    assert [specifier.operator for specifier in requirement.specifier] == [">="], (
        f"pyproject.toml: '{requirement}' must have a lower bound and nothing else"
    )
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(pinned_version(pin)), (
        f"constraints.txt: '{pin}' is below the bound in '{requirement}'"
    )


def test_constraints_are_plain_pins_each_of_another_package():
    # No paths, no addresses, and no local tags such as +cpu, which no other machine could install.
    plain = re.compile(r'[A-Za-z0-9._-]+==[A-Za-z0-9.]+(; python_(full_)?version >= "[0-9.]+")?')
    assert [line for line in PIN_LINES if not plain.fullmatch(line)] == []
    assert len(PIN_LINES) == len(pins()), "constraints.txt pins a package twice"


def test_pins_apply_only_to_a_python_they_install_on():
    supported = SpecifierSet(PROJECT["requires-python"])
    checked = 0
    for line in PIN_LINES:
        pin = Requirement(line)
        try:
            installed = metadata.distribution(pin.name)
        except metadata.PackageNotFoundError:  # not needed on this machine
            continue
        if installed.version.split("+")[0] != pinned_version(pin):  # installed some other way
            continue
        checked += 1
        installs_on = SpecifierSet(installed.metadata["Requires-Python"] or "")
        for python in ["3.10.0", "3.11.0", "3.11.5", "3.12.0", "3.13.0", "3.14.0"]:
            where = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
            if supported.contains(python) and (pin.marker is None or pin.marker.evaluate(where)):
                assert installs_on.contains(python), f"'{line}' needs a marker: it is for Python {installs_on}"
    if not checked:
        pytest.skip("nothing here is installed at its pinned version")


def test_environment_python_satisfies_requires_python():
    (python,) = [entry for entry in ENVIRONMENT["dependencies"] if re.match(r"python\b", str(entry))]
    version = re.fullmatch(r"python=(\d+\.\d+)", python).group(1)
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)


def test_environment_installs_this_package_with_its_tested_versions():
    (pip_section,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    assert "pip" in ENVIRONMENT["dependencies"]
    assert "-c constraints.txt" in pip_section
    (extras,) = [
        match.group(1).split(",") for entry in pip_section if (match := re.fullmatch(r"-e \.\[([a-z,]+)\]", entry))
    ]
    assert set(extras) <= EXTRAS.keys()


def test_environment_names_no_package_that_pyproject_does_not():
    conda = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    (pip_section,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    named = {
        canonicalize_name(re.match(r"[A-Za-z0-9._-]+", entry.split("::")[-1]).group())
        for entry in [*conda, *pip_section]
        if not entry.startswith("-")
    }
    covered = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    assert named <= covered | {"python", "pip"}


def commands_of_ci() -> list[str]:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    found = []
    for job in jobs:
        targets = job["strategy"]["matrix"].get("target", [])
        for command in (step["run"] for step in job["steps"] if "run" in step):
            found += [command.replace("${{ matrix.target }}", target) for target in targets or [""]]
    return found


def test_ci_runs_make_targets_and_nothing_else():
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    local = [line for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines() if line.startswith("make")]
    for command in [*commands_of_ci(), *local]:
        make, target = command.split()
        assert make == "make" and target in targets, command
    assert {"make lint", "make types", "make test", "make coverage"} <= set(local) & set(commands_of_ci())


def test_ci_tests_every_supported_python():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    assert pythons == [f"3.{minor}" for minor in range(10, 10 + len(pythons))]
    assert [SpecifierSet(PROJECT["requires-python"]).contains(python) for python in ("3.9", pythons[0])] == [
        False,
        True,
    ]


@pytest.mark.slow
def test_what_the_set_up_cells_say_to_install_is_enough_in_a_fresh_environment(tmp_path):
    """Needs a package registry; the versions are those of constraints.txt."""
    clone, home = tmp_path / "clone", tmp_path / "elsewhere"
    kept_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "runs", "build", "dist", "_build")
    shutil.copytree(ROOT, clone, ignore=kept_out)
    home.mkdir()
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}

    def run(*command: str, cwd=home) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    cells = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        code = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        cells[path.name] = "".join(code[0]["source"])
    said = {name: re.search(r"pip install ([^`\n]*?\])", source) for name, source in cells.items()}
    assert [name for name, match in said.items() if match is None] == [], "these set-up cells say nothing of pip"
    assert {tuple(match[1].replace('"', "").split()) for match in said.values()} == {("-e", ".[notebooks]")}
    for name, source in cells.items():  # nothing is installed yet
        before = run(python, "-c", source)
        assert before.returncode and "[notebooks]" in before.stdout + before.stderr, name

    reached = run(python, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path / "probe"), "packaging")
    if reached.returncode:
        pytest.skip("no package registry can be reached")
    installed = run(python, "-m", "pip", "install", "-q", "-e", ".[notebooks]", cwd=clone)
    assert installed.returncode == 0, installed.stderr
    for name, source in cells.items():
        after = run(python, "-c", source)
        assert after.returncode == 0 and "pip install" not in after.stdout, f"{name}: {after.stdout}{after.stderr}"
    assert run(python, "-c", "import jupyterlab, ipykernel").returncode == 0

    built = run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(clone))
    assert built.returncode == 0, built.stderr
    shutil.rmtree(clone)  # from here on the wheel is alone
    load = "import minirec; print(minirec.RecurrentDepthLM.from_pretrained('tiny').config.mean_recurrence)"
    alone = run(python, "-c", load)
    assert alone.returncode == 0, alone.stderr
    demo = run(str(tmp_path / "venv/bin/minirec"), "info")
    assert demo.returncode == 0, demo.stderr
