"""The package's layout: imports run one way, each concept has its notebook and test, and the public names stay."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import minirec

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}

# An arrow is an import.  It may only point to a lower floor, or to a module of the same room.
FLOORS = [
    {"config", "noise", "families"},
    {"concepts"},  # every other module and package at the top
    {"figures", "files"},
    {"tools"},
]
ROOMS = set().union(*FLOORS)

# (module, what it imports inside a function) -> why
LAZY = {("minirec.tools.cli.demo", "minirec.figures"): "only a command that draws a picture waits for matplotlib"}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    paths = sorted(root.glob("minirec/**/*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def targets(node: ast.AST, module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a statement or call imports; an unknown one of the package is an error."""
    names: list[tuple[str, str]] = []  # (module, a name in it or nothing)
    if isinstance(node, ast.Import):
        names = [(alias.name, "") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            package = package[: len(package) - node.level + 1]
            base = ".".join([*package, base] if base else package)
        names = [(base, alias.name) for alias in node.names]
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [(str(node.args[0].value), "")]
    found = {
        f"{base}.{name}" if f"{base}.{name}" in known else base
        for base, name in names
        if base.split(".")[0] == "minirec"
    }
    assert found <= known.keys(), f"{module} imports {sorted(found - known.keys())}: there is no such module"
    return found


def imports(module: str, path: Path, known: dict[str, Path], lazy: bool = False) -> set[str]:
    """What a module imports of the package, anywhere in it; with `lazy` only what it imports inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    nodes = (node for start in (inside if lazy else [tree]) for node in ast.walk(start))
    return {target for node in nodes for target in targets(node, module, path, known)} - {module}


def graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {module: imports(module, path, known) for module, path in known.items()}


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    """A walk along arrows that ends where it began, if there is one."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str] | None:
        if module in way:
            return [*way[way.index(module) :], module]
        if module not in done:
            for target in sorted(arrows[module]):
                if found := walk(target, [*way, module]):
                    return found
            done.add(module)
        return None

    return next(filter(None, (walk(module, []) for module in sorted(arrows))), None)


def room(module: str) -> str:
    name = module.split(".")[1]
    return name if name in ROOMS else "concepts"


def floor(module: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room(module) in rooms)


def upward(arrows: dict[str, set[str]]) -> list[str]:
    """The arrows that do not point down.

    `minirec` itself puts the package together: it may import anything but the tools, and only a tool may import it.
    """
    found = []
    for module, module_targets in arrows.items():
        for target in module_targets:
            if module == "minirec":
                right = room(target) != "tools"
            elif target == "minirec":
                right = room(module) == "tools"
            else:
                lowest = floor(module) == floor(target) == 0
                right = lowest or room(module) == room(target) or floor(target) < floor(module)
            if not right:
                found.append(f"{module} imports {target}")
    return found


def lazy_imports(root: Path) -> set[tuple[str, str]]:
    known = modules(root)
    return {(module, target) for module, path in known.items() for target in imports(module, path, known, lazy=True)}


def tools_in_benchmarks(root: Path) -> list[str]:
    known, found = modules(root), []
    for path in sorted(root.glob("benchmarks/**/*.py")):
        used = imports(path.stem, path, known)
        found += [f"{path.name} imports {target}" for target in used if target.startswith("minirec.tools")]
    return found


def test_no_import_comes_back_to_where_it_began():
    assert circle(graph(ROOT)) is None


def test_no_import_points_upwards():
    assert upward(graph(ROOT)) == []


def test_imports_inside_functions_are_listed_with_their_reason():
    assert lazy_imports(ROOT) == LAZY.keys()


def test_benchmarks_import_no_tools():
    assert tools_in_benchmarks(ROOT) == []


def house(root: Path, files: dict[str, str]) -> Path:
    """A small package of the same name: path -> code."""
    empty = dict.fromkeys(f"minirec/{folder}__init__.py" for folder in ("", "files/", "figures/", "tools/"))
    for name, code in (empty | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code or "")
    return root


@pytest.mark.parametrize(
    "code",
    [
        "import minirec.kv_cache",
        "from minirec.kv_cache import Window",
        "from minirec import kv_cache as cache",
        "from . import kv_cache",
        "from .kv_cache import Window",
        "def f():\n    from minirec import kv_cache",
        "if True:\n    import minirec.kv_cache",
        "import importlib\nimportlib.import_module('minirec.kv_cache')",
    ],
)
def test_an_arrow_is_seen_however_it_is_written(tmp_path, code):
    other = "from minirec.decoding import Grid"
    root = house(tmp_path, {"minirec/decoding.py": code, "minirec/kv_cache.py": other})
    assert graph(root)["minirec.decoding"] == {"minirec.kv_cache"}
    assert circle(graph(root)) == ["minirec.decoding", "minirec.kv_cache", "minirec.decoding"]
    assert bool(lazy_imports(root)) == ("def f" in code)


@pytest.mark.parametrize(
    ("where", "code", "right"),
    [
        ("config", "from minirec import kv_cache", False),
        ("config", "from minirec import noise", True),
        ("kv_cache", "from minirec.config import whole", True),
        ("kv_cache", "from minirec import noise, lens", True),
        ("kv_cache", "from minirec.files import checkpoint", False),
        ("kv_cache", "from minirec import figures", False),
        ("kv_cache", "from minirec import RecurrentConfig", False),
        ("continuous_batching/engine", "from ..tools import cli", False),
        ("continuous_batching/engine", "from .. import lens", True),
        ("files/tokenizer", "from minirec.files import checkpoint", True),
        ("files/tokenizer", "from minirec import figures", False),
        ("files/tokenizer", "import minirec.tools.cli", False),
        ("figures/grid", "from minirec import lens", True),
        ("figures/grid", "from minirec.files import checkpoint", False),
        ("tools/processes", "import minirec\nfrom minirec import figures, lens\nfrom minirec.tools import cli", True),
        ("__init__", "from minirec.files import checkpoint", True),
        ("__init__", "from minirec.tools import cli", False),
    ],
)
def test_an_arrow_may_only_point_down(tmp_path, where, code, right):
    names = ("config", "noise", "kv_cache", "lens", "files/checkpoint", "tools/cli")
    root = house(tmp_path, {f"minirec/{name}.py": "" for name in names} | {f"minirec/{where}.py": code})
    assert (upward(graph(root)) == []) == right


def test_an_import_of_nothing_and_a_benchmark_with_a_tool_are_found(tmp_path):
    lost, tool = "from minirec.plots import ink", "from minirec import tools"
    root = house(tmp_path, {"minirec/lens.py": lost, "benchmarks/depth.py": tool})
    assert tools_in_benchmarks(root) == ["depth.py imports minirec.tools"]
    with pytest.raises(AssertionError, match="no such module"):
        graph(root)


CONCEPTS = sorted({module.split(".")[1] for module in modules(ROOT) if module != "minirec"} - (ROOMS - {"concepts"}))
LOWEST = ["config", "noise"]
WITHOUT_NOTEBOOK = {"tasks": "all notebooks use it", "token_choice": "notebooks decode greedily"}


@pytest.mark.parametrize("name", [*LOWEST, *CONCEPTS])
def test_a_concept_names_its_notebook_and_has_its_test(name):
    assert (ROOT / "tests" / f"test_{name}.py").exists()
    said = re.search(r"Notebook: (\w+)", importlib.import_module(f"minirec.{name}").__doc__)
    if name in WITHOUT_NOTEBOOK:
        assert said is None, f"{name} names a notebook, so WITHOUT_NOTEBOOK is out of date"
    else:
        assert said and said[1] in NOTEBOOKS, f"minirec/{name}: 'Notebook: <name>.' belongs into the docstring"


# What users and notebooks rely on.  Add names freely; taking one away breaks their code.
PUBLIC = {
    "minirec": "RecurrentConfig RecurrentDepthLM",
    "minirec.adaptive_exit": "CRITERIA argmax_stability cosine entropy_diff generate kl latent_diff minp_kl",
    "minirec.autoregressive": "generate",
    "minirec.config": "PRESETS RecurrentConfig",
    "minirec.continuous_batching": "MODES Engine Event Pass Request Scheduler Slot Stage State",
    "minirec.decoding": "Generation Grid OuterStep",
    "minirec.diffusion_forcing": "generate",
    "minirec.files.checkpoint": "load save",
    "minirec.files.tokenizer": "ChatTemplate read_tokenizer",
    "minirec.kv_cache": "KVCache Window bytes_per_token",
    "minirec.lens": "coda_lens logit_lens principal_components settled trajectory",
    "minirec.lossless_wavefront": "generate next_wave",
    "minirec.noise": "gumbel truncated_normal uniform",
    "minirec.recurrent_block": "Attention GatedMLP RMSNorm RecurrentDepthLM SandwichBlock rope_table rotate",
    "minirec.speculative": "generate",
    "minirec.tasks": "BEGIN END FAMILIES PAD VOCABULARY Problem heldout task_tokenizer",
    "minirec.token_choice": "TokenChoice",
    "minirec.tools.cli": "main",
    "minirec.training": "IGNORE TrainingConfig batch_of depth_loss exact_match sample_depth",
}
METHODS = {
    "minirec.RecurrentDepthLM": "coda from_pretrained initial_state prelude recur save_pretrained",
    "minirec.continuous_batching.Engine": "run stream submit",
    "minirec.decoding.Grid": "choose commit decode embed prefill recur window",
    "minirec.tasks.Problem": "is_correct",
}
KEYWORDS = {
    "minirec.adaptive_exit.generate": "num_steps criterion threshold exit_in_prefill",
    "minirec.autoregressive.generate": "num_steps",
    "minirec.continuous_batching.Engine": "slots max_length mode",
    "minirec.diffusion_forcing.generate": "num_steps inner_steps exit_threshold schedule freeze headway max_wavefront "
    "noise momentum",
    "minirec.lossless_wavefront.generate": "num_steps guess_after max_wavefront",
    "minirec.speculative.generate": "num_steps draft_steps lookahead",
}


def public(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay(module):
    there = importlib.import_module(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(there, name)] == []


@pytest.mark.parametrize("name", METHODS)
def test_public_methods_stay(name):
    assert [method for method in METHODS[name].split() if not callable(getattr(public(name), method, None))] == []


@pytest.mark.parametrize("name", KEYWORDS)
def test_public_keywords_stay(name):
    assert set(KEYWORDS[name].split()) <= inspect.signature(public(name)).parameters.keys()


def test_what_the_package_itself_offers_is_what_it_lists():
    assert sorted(minirec.__all__) == PUBLIC["minirec"].split()
