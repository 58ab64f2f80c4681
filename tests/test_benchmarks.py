"""The benchmarks run, print what they say, and time what they say; how long anything took is not looked at."""

import csv
import dataclasses
import importlib
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minirec import RecurrentConfig, RecurrentDepthLM, tasks
from minirec.decoding import Generation, Grid
from minirec.kv_cache import KVCache
from minirec.training import TrainingConfig, exact_match

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts import each other as neighbours, as when they are run; PyTorch's threads are put back."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    torch.set_num_threads(threads)


def script(name: str):
    """A fixture that imports benchmarks/<name>.py."""

    @pytest.fixture(scope="module", name=name)
    def imported(scripts):
        return importlib.import_module(name)

    return imported


overhead, samplers, depth, recipe, core_size = map(script, ("overhead", "samplers", "depth", "recipe", "core_size"))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return RecurrentDepthLM(RecurrentConfig.preset("tiny")).eval()


def run(script, arguments: list[str], folder: Path) -> tuple[str, dict]:
    """What a script prints, and what it writes."""
    file = folder / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        script.main([*arguments, "--json", str(file)])
    return "\n".join(printed), json.loads(file.read_text())


@pytest.fixture(scope="module")
def overhead_run(overhead, tmp_path_factory):
    return run(overhead, ["--preset", "tiny", "--tokens", "20", "--repeat", "1"], tmp_path_factory.mktemp("overhead"))


@pytest.fixture(scope="module")
def samplers_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("samplers")


@pytest.fixture(scope="module")
def samplers_run(samplers, samplers_folder):
    files = ["--csv", str(samplers_folder / "rows.csv"), "--figure", str(samplers_folder / "plane.png")]
    return run(samplers, ["--problems", "1", "--families", "words", "hops", "--level", "2", *files], samplers_folder)


def tables(text: str) -> list[list[list[str]]]:
    """The markdown tables of a text, as rows of cells, without the line under the head."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    split = [[[c.strip() for c in line.strip("|").split("|")] for line in t.splitlines()] for t in found]
    return [[head, *rows] for head, _, *rows in split]


@pytest.mark.parametrize("name", ["overhead_run", "samplers_run"])
def test_tables_are_whole_and_the_machine_is_named(name, request):
    text, written = request.getfixturevalue(name)
    assert tables(text)
    for head, *rows in tables(text):
        assert rows and all(len(row) == len(head) for row in rows)
        assert not any(cell in ("", "nan", "inf") for row in rows for cell in row)
    machine = written["machine"]
    assert machine["cpu"] and machine["threads"] == 1 and machine["torch"] == torch.__version__
    assert text.startswith(f"Machine: {machine['cpu']}")


def test_overhead_reports_every_measurement(overhead, overhead_run):
    text, written = overhead_run
    assert [len(rows) for _, *rows in tables(text)] == [3, 2, len(overhead.PARTS) + 2]
    assert list(written["steps"]) == ["token", "step 8", "step 16"]
    assert list(written["growth"]) == ["full", "shared"]
    for row in written["steps"].values():
        assert row["ratio"]["median"] == pytest.approx(row["ms"]["median"] / row["products_ms"]["median"])
    for row in written["growth"].values():
        early, late = (ms["median"] for ms in row["ms"])
        assert row["growth"]["median"] == pytest.approx(late / early)


def test_overhead_counts_the_keys_and_values_that_a_token_reads(overhead_run):
    full, shared = (overhead_run[1]["growth"][kv] for kv in ("full", "shared"))
    # one prelude, one coda and 12 core layers; keys and values; d = 96; 4 bytes; 40 or 400 positions
    calls = [14 * 2 * 96 * 4 * position / 1e6 for position in (40, 400)]
    assert full["kv_mb_read"] == shared["kv_mb_read"] == full["kv_mb_distinct"] == pytest.approx(calls)
    assert shared["kv_mb_distinct"] == pytest.approx([calls[0] * 3 / 14, calls[1] * 3 / 14])


def test_profile_adds_up_and_finds_every_part(overhead, overhead_run):
    for parts in overhead_run[1]["profile"].values():
        named = [*overhead.PARTS, overhead.REST]
        assert set(parts) == {*named, "whole"}
        assert all(parts[part] > 0 for part in named), "a function of PARTS is no longer called by its name"
        assert sum(parts[part] for part in named) == pytest.approx(parts["whole"])


def steps_of(monkeypatch, generate) -> list[tuple[int, str, list[tuple]]]:
    """Of each step, from one final token to the next: its first position, kind of cache, and matrix products."""
    windows, calls, steps = [], [], []
    window, linear = Grid.window, F.linear

    def spy_window(grid, begin, width):
        windows.append((*begin, grid.cache.kv))
        return window(grid, begin, width)

    def spy_linear(x, weight):
        calls.append((tuple(x.shape), weight.data_ptr()))
        return linear(x, weight)

    def on_token(token):
        steps.append((*windows[-1], calls.copy()))
        calls.clear()

    with monkeypatch.context() as patch:
        patch.setattr(Grid, "window", spy_window)
        patch.setattr(F, "linear", spy_linear)
        generate(on_token=on_token)
    return steps[1:]  # the first is the prefill


@pytest.mark.parametrize(
    ("name", "kv", "count", "middle"),
    [
        ("token", "full", 29, 46),
        ("step 8", "shared", 21, None),
        ("step 16", "shared", 13, None),
        *((f"{kv} {position}", kv, 16, position - 0.5) for kv in ("full", "shared") for position in (40, 400)),
    ],
)
def test_what_is_timed_is_a_step_and_exactly_its_matrix_products(name, kv, count, middle, overhead, tiny, monkeypatch):
    generate, products, steady = overhead.runs(tiny, tokens=30)[name]
    steps = steps_of(monkeypatch, generate)
    alone = [(tuple(x.shape), weight.data_ptr()) for x, weight in products]
    assert len(steps[steady]) == count
    assert all(kind == kv and calls == alone for _, kind, calls in steps[steady])
    if middle is None:  # the steps next to the steady ones are of another kind: the ramps
        assert steps[steady.start - 1][2] != alone and steps[steady.stop][2] != alone
    else:
        positions = [start for start, _, _ in steps[steady]]
        assert sum(positions) / count == middle


@pytest.fixture
def ticks(overhead, monkeypatch):
    """A clock that moves by one tick a reading, and `ticks(n)` moves it by n."""
    clock = itertools.count()
    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    return lambda n: [next(clock) for _ in range(n)]


def test_steps_and_products_are_timed_apart(overhead, ticks, monkeypatch):
    def generate(on_token):
        for _ in range(4):
            ticks(100)
            on_token(0)

    monkeypatch.setattr(F, "linear", lambda x, weight: ticks(10))
    # a reading of the clock takes a tick itself
    assert overhead.time_steps(generate, [(None, None)], slice(0, None)) == (101, 11)


def test_profile_counts_the_attention_inside_the_cache_once(overhead, ticks, monkeypatch):
    work = SimpleNamespace(attention=lambda: ticks(50), attend=lambda: (ticks(20), work.attention()))
    monkeypatch.setattr(
        overhead, "PARTS", {"attention": (work, "attention"), "cache reads and writes": (work, "attend")}
    )

    def generate(on_token):
        for _ in range(4):
            work.attend()
            ticks(100)
            on_token(0)

    first, *others = overhead.profile(generate, slice(0, None))
    assert len(others) == 2 and all(step == first for step in others)
    assert first["attention"] / 1e3 == 51
    assert first["cache reads and writes"] / 1e3 == 22
    assert first[overhead.REST] / 1e3 == 102  # and the last two readings of the clock
    assert first["whole"] / 1e3 == 175


def test_samplers_reports_every_setting_of_every_family_from_one_run(samplers, samplers_run):
    text, written = samplers_run
    assert list(written["families"]) == ["words", "hops", samplers.ALL]
    assert written["families"][samplers.ALL]["problems"] == 2
    smallest = {family: found["smallest_full_depth"] for family, found in written["families"].items()}
    asked = {family: samplers.samplers(12, {depth, smallest[samplers.ALL]}) for family, depth in smallest.items()}
    for family, found in written["families"].items():
        if family == samplers.ALL:
            assert found["rows"].keys() == asked["words"].keys() & asked["hops"].keys()
        else:
            assert list(found["rows"]) == list(asked[family])
    for found, printed in zip(written["families"].values(), zip(*[iter(tables(text))] * 2, strict=True), strict=True):
        rows, depth = found["rows"], found["smallest_full_depth"]
        assert depth in (*samplers.DEPTHS, 12)
        for _, *lines in printed:
            assert [line[0] for line in lines] == list(rows)
        kinds = {name.split(",")[0] for name in rows}
        own = {"autoregressive", "adaptive exit", "speculative", "lossless wavefront", "diffusion forcing"}
        assert kinds == own and samplers.DEFAULTS in rows
        reference = rows[samplers.at_depth(12)]
        assert reference["same_tokens"] == 1 and set(reference["speed_up"].values()) == {1}
        for r in (*samplers.DEPTHS, 12):
            row = rows[samplers.at_depth(r)]
            assert row["passes_per_token"] == r and row["decodes_per_token"] == 1
            assert row["depth"]["min"] == row["depth"]["max"] == r
            # a prelude and a coda layer and one core layer a step; keys and values; d = 96; 4 bytes
            assert row["kv_bytes"] == (2 + r) * 2 * 96 * 4
        for name, row in rows.items():
            if name.startswith(("speculative", "lossless")):
                most = int(name.partition("num_steps ")[2] or 12)
                assert row["depth"]["min"] == most
                assert row["same_tokens"] == rows[samplers.at_depth(most)]["same_tokens"], (
                    "autoregressive's at that depth"
                )
            assert sum(row["shares"].values()) == pytest.approx(1) and min(row["shares"].values()) > 0
        assert rows["diffusion forcing, kv shared"]["kv_bytes"] == 3 * 2 * 96 * 4
        reused, again = (rows[f"speculative, draft_steps 2, lookahead 4{x}"] for x in ("", ", reuse False"))
        assert reused["passes_per_token"] < again["passes_per_token"]
        assert f"Smallest depth with the full accuracy: r = {depth}" in text
        assert set(rows[samplers.at_depth(depth)]["speed_up_over_smallest"].values()) == {1}


def test_samplers_writes_every_number_as_csv_and_draws_the_plane(samplers_run, samplers_folder):
    rows = list(csv.DictReader((samplers_folder / "rows.csv").open()))
    written = samplers_run[1]["families"]
    one = {(r["family"], r["sampler"], r["quantity"]): float(r["value"]) for r in rows}
    assert len(one) == len(rows)
    for family, found in written.items():
        for name, row in found["rows"].items():
            assert one[family, name, "passes_per_token"] == row["passes_per_token"]
            assert one[family, name, "speed_up median"] == row["speed_up"]["median"]
    assert (samplers_folder / "plane.png").stat().st_size > 10_000


@pytest.mark.parametrize("there", [1, 2])
def test_idle_blocks_change_nothing(core_size, there):
    torch.manual_seed(0)
    config = dataclasses.replace(RecurrentConfig.preset("tiny"), n_layers_in_recurrent_block=there)
    model, tokens = RecurrentDepthLM(config).eval(), torch.randint(0, 128, (2, 9))
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    larger = core_size.with_idle_blocks(model, 4)
    assert len(larger.transformer.core_block) == 4
    torch.testing.assert_close(larger(tokens, 6).logits, model(tokens, 6).logits)
    same = core_size.with_idle_blocks(model, there)
    assert torch.equal(same(tokens, 6).logits, model(tokens, 6).logits)


def test_core_size_compares_every_sampler_with_autoregressive_decoding(core_size, tmp_path):
    text, written = run(core_size, ["--problems", "1", "--blocks", "1", "2"], tmp_path)
    assert "| core of 1 | core of 2 |" in text and "same in every column: 100.0 %" in text
    assert list(written["blocks"]) == ["1", "2"]
    for rows in written["blocks"].values():
        assert list(rows) == list(core_size.ROWS)
        assert rows[core_size.BASE]["speed_up_in_all"] == 1 and rows[core_size.BASE]["correct"] == 3
        assert all(f"{row['speed_up_in_all']:.2f}" in text for row in rows.values())


def test_summary_of_made_up_results(samplers):
    problems = tasks.heldout(4)
    right = [p.target for p in problems]
    base = [(8.0, Generation(tokens=t, depth=[8] * len(t), passes=8 * len(t))) for t in right]
    other = [[*right[0], 3], right[1], right[2][:4], right[3]]  # one token too many; and one breaks off
    row = [
        (t, Generation(tokens=g, depth=[2] * len(g), passes=2 * len(g)))
        for t, g in zip([2.0, 4.0, 8.0, 16.0], other, strict=True)
    ]
    result = samplers.summary(row, base, problems)
    assert result["correct"] == 3 and result["whole_text"] == result["same_tokens"] == 0.5
    assert result["speed_up"]["median"] == 1.5 and result["speed_up"]["max"] == 4 and result["speed_up"]["min"] == 0.5
    tokens, before = sum(map(len, other)), sum(map(len, right))
    assert result["speed_up_in_all"] == pytest.approx((tokens / 30) / (before / 32))
    assert result["passes_per_token"] == 2


def test_smallest_full_depth_allows_half_a_point(samplers):
    correct = {1: 150, 2: 188, 3: 189, 4: 191, 8: 190}
    assert samplers.smallest_full_depth(correct, default=8, n=200) == 3
    assert samplers.smallest_full_depth({**correct, 3: 188, 4: 188}, default=8, n=200) == 8


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("overhead", ["--tokens", "17"], "--tokens is 17; it must be at least 18"),
        ("overhead", ["--repeat", "0"], "--repeat is 0; it must be at least 1"),
        ("samplers", ["--problems", "0"], "--problems is 0; it must be at least 1"),
        ("core_size", ["--blocks", "2", "0"], "--blocks is 0; it must be at least 1"),
        ("samplers", ["--level", "1"], "level is 1; in split 'heldout' family 'words' has levels (2, 3, 4, 5, 6)"),
        ("depth", ["--problems", "0"], "--problems is 0; it must be at least 1"),
    ],
)
def test_bad_arguments_are_said(name, arguments, says, request, capsys):
    with pytest.raises(SystemExit):
        request.getfixturevalue(name).main(arguments)
    assert says in capsys.readouterr().err


# --- depth.py and recipe.py ---


def test_exact_match_by_depth_is_that_of_training(depth):
    model, problems = RecurrentDepthLM.from_pretrained("tiny"), tasks.heldout(6, family="automaton", level=2)
    by_depth = depth.look_inside(model, problems)["exact_match"]
    assert by_depth == {r: exact_match(model, problems, r) for r in depth.DEPTHS}
    assert by_depth[1] < by_depth[6]


def test_depth_reports_every_level(depth, tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "THRESHOLDS", (0.2,))
    monkeypatch.setattr(depth, "DEPTHS", (1, 12))
    text, written = run(depth, ["--problems", "2", "--families", "hops", "--figure", str(tmp_path / "d.png")], tmp_path)
    names = [f"hops {level}" for level in tasks.FAMILIES["hops"]] + [f"hops {level}*" for level in tasks.HARDER["hops"]]
    assert list(written["levels"]) == names
    assert [[row[0] for row in rows] for _, *rows in tables(text)] == [names, names, names, names[:-3], names]
    for level in written["levels"].values():
        assert list(level["exact_match"]) == ["1", "12"] and len(level["relative_change"]) == 12
        for kv in ("full", "shared"):
            always = level.get("exits", {}).get(f"{kv}, 0.0")
            assert always is None or always["depth"] == always["computed"] == 12, "threshold 0 never leaves early"
    assert (tmp_path / "d.png").stat().st_size > 1000


def test_recipe_keeps_what_it_has_run(recipe, tmp_path, monkeypatch):
    names = list(recipe.VARIANTS)[:2]
    arguments = ["--steps", "1", "--problems", "2", "--only"]
    monkeypatch.setattr(recipe, "DEPTHS", (1, 2))
    first, written = run(recipe, [*arguments, names[0]], tmp_path)
    assert list(written["runs"]) == names[:1]
    text, written = run(recipe, [*arguments, *names], tmp_path)
    ((_, *rows),) = tables(text)
    assert [row[0] for row in rows] == list(written["runs"]) == names
    assert rows[0] == tables(first)[0][1], "not run again"
    with pytest.raises(SystemExit):
        run(recipe, ["--steps", "2", "--only", names[0]], tmp_path)


def test_a_level_is_solved_at_the_smallest_depth_that_reaches_nine_tenths(recipe):
    curve = [0.0] * len(recipe.DEPTHS)
    assert recipe.solved_at([*curve[:-1], 0.25]) == "(25%)"
    curve[3:6] = [0.9, 0.5, 0.95]
    assert recipe.solved_at(curve) == "r = 4"


def test_every_variant_of_the_recipe_can_be_built(recipe):
    fields = {f.name for f in dataclasses.fields(TrainingConfig)}
    for changes, shape, identity in recipe.VARIANTS.values():
        assert changes.keys() <= fields and 0 <= identity <= 1
        TrainingConfig(**changes)
        dataclasses.replace(RecurrentConfig.preset("tiny"), **shape)


# --- kv_sharing.py ---

kv_sharing = script("kv_sharing")


@pytest.fixture(scope="module")
def kv_sharing_run(kv_sharing, tmp_path_factory):
    arguments = ["--problems", "2", "--families", "hops", "--levels", "1", "9"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_sharing, "SLOTS", (1, 4, 99))
        return run(kv_sharing, arguments, tmp_path_factory.mktemp("kv"))


def test_kv_sharing_reports_every_cache_and_what_it_keeps(kv_sharing_run):
    text, written = kv_sharing_run
    names = ["full", "shared, 1 slot", "shared, 4 slots", "latest"]  # 99 slots are more than the steps
    ((head, *printed),) = tables(text)
    assert head[2:] == ["hops 1", "hops 9"]
    assert [row[0] for row in printed] == list(written["caches"]) == names
    slots = {name: row["bytes_per_token"] / (2 * 96 * 4) - 2 for name, row in written["caches"].items()}
    assert slots == dict(zip(names, (12, 1, 4, 12), strict=True)), "of one core layer; keys and values, float32"
    for name, row in written["caches"].items():
        for group in row["groups"].values():
            assert name == "latest" or group["depth"] == 12
            assert name != "full" or group["same_tokens"] == 1
    latest, full = (written["caches"][name]["groups"]["hops 1"] for name in ("latest", "full"))
    assert full["right"] == 1 and latest["depth"] < 9, "easy ones, and their tokens leave early"


def test_word_problems_are_mixed_and_the_others_go_by_level(kv_sharing):
    harder = tasks.HARDER["automaton"][0]
    found = kv_sharing.groups(["words", "automaton"], [2, harder], 12)
    assert list(found) == ["words", "automaton 2", f"automaton {harder}"]
    assert [{p.level for p in problems} for problems in found.values()] == [{2, 3, 4, 5}, {2}, {harder}]
    assert found["words"] == tasks.heldout(12) and {p.family for p in found[f"automaton {harder}"]} == {"automaton"}
    assert kv_sharing.groups(["hops"], None, 3) == {"hops": tasks.heldout(3, family="hops")}


def test_every_row_of_kv_sharing_decodes_with_its_own_cache(kv_sharing, tiny, monkeypatch):
    allocated, asked = [], []
    init = KVCache.__init__

    def spy(cache, *args, **kwargs):
        init(cache, *args, **kwargs)
        allocated.append((cache.kv, cache.slots))

    monkeypatch.setattr(KVCache, "__init__", spy)
    monkeypatch.setattr(kv_sharing, "BATCH", 2)
    problems = tasks.heldout(3, family="hops", level=1)
    for name, cache in kv_sharing.caches(6).items():
        asked.append((cache["kv"], cache.get("kv_slots", 12)))
        assert len(kv_sharing.solve(tiny, problems, name, cache)) == 3
    assert allocated == [row for row in asked for _ in range(2)]  # three problems are two batches
    assert asked == [("full", 12), ("shared", 1), ("shared", 2), ("shared", 4), ("full", 12)]


def test_latest_is_the_exit_of_depth_py(kv_sharing, depth, monkeypatch):
    monkeypatch.setattr(depth, "THRESHOLDS", (0.2,))
    model, problems = RecurrentDepthLM.from_pretrained("tiny"), tasks.heldout(3, family="hops", level=2)
    results = kv_sharing.solve(model, problems, "latest", {"kv": "full"})
    found, theirs = kv_sharing.summary(results, results, problems), depth.exits(model, problems)["full, 0.2"]
    assert found["right"] == theirs["right"] == 1 and found["depth"] == theirs["depth"] < 12


def test_kv_sharing_of_made_up_results(kv_sharing):
    problems = tasks.heldout(2, family="hops", level=1)
    full = [Generation(tokens=p.target, depth=[12] * 4) for p in problems]
    other = [Generation(tokens=full[0].tokens, depth=[1, 3]), Generation(tokens=[7, *full[1].tokens], depth=[12] * 4)]
    full.append(full[1])
    problems, other = [*problems, problems[1]], [*other, other[1]]
    found = kv_sharing.summary(other, full, problems)
    assert found == {"right": 1 / 3, "same_tokens": 1 / 3, "depth": 75 / 7}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--problems", "0"], "--problems is 0; it must be at least 1"),
        (["--levels", "1", "99"], "level is 99; in split 'heldout' family 'automaton' has levels (1, 2,"),
    ],
)
def test_bad_arguments_of_kv_sharing_are_said(kv_sharing, arguments, says, capsys):
    with pytest.raises(SystemExit):
        kv_sharing.main(arguments)
    assert says in capsys.readouterr().err


# --- batching.py ---

batching = script("batching")
NAMES = ["static", "sequence", "depth", "wavefront", "sequence, fixed depth", "wavefront, fixed depth"]
CLOSED = ("passes_PRELUDE", "passes_RECUR", "passes_CODA", "occupancy_RECUR", "mean_depth", "tokens")


@pytest.fixture(scope="module")
def batching_run(batching, tmp_path_factory):
    arguments = ["--requests", "3", "--slots", "2", "--repeat", "1", "--rates"]
    live, replayed = tmp_path_factory.mktemp("live"), tmp_path_factory.mktemp("replayed")
    short = [tasks.heldout(1, family=family, level=level)[0] for family, level in (("hops", 4), ("automaton", 2))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "mixed", lambda n: [*short, *tasks.heldout(1, family="hops", level=1)][:n])
        return run(batching, [*arguments, "0.8"], live), run(batching, [*arguments, "--replay"], replayed)


def test_batching_reports_every_mode_of_every_workload(batching_run):
    (text, written), _ = batching_run
    workloads = ["closed, 3", "rate 0.8"]
    assert list(written["workloads"]) == workloads and list(written["bounds"]) == workloads[:1]
    *three, last = tables(text)
    for head, *rows in [*three, last]:
        assert all(len(row) == len(head) for row in rows)
        assert not any(cell in ("", "nan", "inf") for row in rows for cell in row)
    for _, *rows in three:
        assert [row[:2] for row in rows] == [[workload, name] for workload in workloads for name in NAMES]
    assert text.startswith(f"Machine: {written['machine']['cpu']}")
    for rows in written["workloads"].values():
        by = {name: {key: value["median"] for key, value in row.items()} for name, row in rows.items()}
        assert by["static"]["over static"] == by["sequence"]["over sequence"] == 1
        assert "over static" not in by["wavefront, fixed depth"], "another rule"
        for row in by.values():
            assert row["kv_bytes_in_use"] <= row["kv_bytes_allocated"]
            assert all(0 < row[f"occupancy_{stage}"] <= 1 for stage in ("PRELUDE", "RECUR", "CODA"))
            assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert by["static"]["mean_depth"] == by["depth"]["mean_depth"] < 12
        assert by["sequence, fixed depth"]["mean_depth"] == by["wavefront, fixed depth"]["mean_depth"] == 12
    closed = written["workloads"]["closed, 3"]
    passes = [closed[name]["recurrent_passes_per_token"]["median"] for name in NAMES]
    assert passes[0] >= passes[1] >= passes[2] > passes[3] and passes[4] > passes[5]
    assert 0 <= closed["wavefront"]["same_texts"]["median"] <= 1 == closed["depth"]["same_texts"]["median"]


def test_replayed_exits_are_the_same_work(batching_run):
    (_, live), (text, replayed) = batching_run
    assert "replayed" in text and replayed["settings"]["replay"] and replayed["other_depths"]["other_depths"] == 0
    for workload, rows in replayed["workloads"].items():
        for name, row in rows.items():
            assert {key: row[key] for key in CLOSED} == {key: live["workloads"][workload][name][key] for key in CLOSED}


def test_the_bound_of_fixed_depth_is_that_of_the_costs_measured(batching, batching_run):
    (_, written), _ = batching_run
    ms = {stage: s["median"] for stage, s in written["pass_ms"].items()}
    closed, (row, passes, recurrent, *others) = written["workloads"]["closed, 3"], written["bounds"]["closed, 3"]
    f0, fr, mean = ms["PRELUDE"] + ms["CODA"], ms["RECUR"], closed["depth"]["mean_depth_of_trips"]["median"]
    assert row["over"] == "sequence, fixed depth" and row["deepest"] == 12 and row["mean"] == mean
    assert row["bound"] == pytest.approx((f0 + 12 * fr) / (f0 + mean * fr))
    assert passes["bound"] == pytest.approx(14 / (2 + mean)) and recurrent["bound"] == pytest.approx(12 / mean)
    assert {o["over"] for o in others} == {"sequence"} and all(o["deepest"] <= 12 for o in others)
    for unit, key in ((passes, "passes_per_token"), (recurrent, "recurrent_passes_per_token")):
        fixed, depth = (closed[name][key]["median"] for name in ("sequence, fixed depth", "depth"))
        assert unit["reached"]["median"] == pytest.approx(fixed / depth)
        assert unit["share"] == pytest.approx(fixed / depth / unit["bound"])
    assert batching.bound(f0=1.2, fr=1.0, deepest=16, mean=6) == pytest.approx(17.2 / 7.2)


def test_batching_at_another_depth(batching, tmp_path):
    arguments = "--requests 2 --slots 2 --repeat 1 --num-steps 3 --guess-after 2 --chunk 8 --rates".split()
    text, written = run(batching, arguments, tmp_path)
    assert "depth 3, float32" in text and written["settings"]["num_steps"] == 3
    rows = written["workloads"]["closed, 2"]
    assert all(rows[name]["mean_depth"]["median"] == 3 for name in rows if "fixed depth" in name)
    assert written["bounds"]["closed, 2"][0]["deepest"] == 3
    # every chunk is a trip through the loop, of which the last gives a token, and in step so is a token of each
    trips = max(-(-len(p.prompt) // 8) + len(p.target) - 1 for p in batching.mixed(2))
    assert rows["sequence, fixed depth"]["passes_RECUR"]["median"] == 3 * trips


def test_costs_are_of_full_passes(batching, small_model):
    found = batching.costs(small_model(0), SimpleNamespace(prompt=[1, 2, 3]), slots=3, threshold=None)
    # the first token comes from the prompt, whose passes have more cells
    assert [len(ms) for ms in found.values()] == [7, 7 * 4, 7]
    assert [len(ms) for ms in batching.costs(small_model(0), SimpleNamespace(prompt=[1, 2]), 1, 0.0).values()][1] == 28


@pytest.mark.parametrize("mode", ["static", "sequence", "depth"])
def test_a_replay_leaves_the_loop_where_it_is_told(batching, small_model, mode):
    model, depths = small_model(0), [[4, 1, 3, 2, 4], [4, 2, 1], [4, 3, 3, 3]]
    engine = batching.Replay(model, 2, 24, mode=mode)
    engine.depths = depths
    for number, own in enumerate(depths):
        engine.submit([1 + number, 5], len(own), stop_tokens=())
    assert [g.depth for g in engine.run().values()] == depths


class MadeUp:
    """An engine whose request takes two steps of a second each, and gives a token at the end of both."""

    def __init__(self, wait, clock):
        self.wait, self.clock, self.requests, self.left = wait, clock, {}, []

    def submit(self, prompt, *_, **__):
        self.requests[prompt] = SimpleNamespace(submitted=self.clock(), generation=Generation(), token_times=[])
        self.left += [prompt] * 2

    def step(self):
        if not self.left:
            return False
        self.wait(1)
        request = self.requests[self.left.pop(0)]
        request.generation.tokens.append(1)
        request.token_times.append(self.clock())
        return True


@pytest.fixture
def made_up(batching, monkeypatch):
    """A way to wait, on a clock that does not move else, and `build(arrivals)`: a run of that engine."""
    now = [0.0]
    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def wait(seconds):
        now[0] += seconds

    def build(arrivals):
        problems = [SimpleNamespace(prompt=i, target=[]) for i in range(len(arrivals))]
        return batching.Run(lambda clock, on_pass: MadeUp(wait, clock), problems, arrivals, None)

    return build, wait


def test_a_clock_stands_still_between_turns_and_skips_waiting(made_up):
    build, wait = made_up
    run = build([0.0, 0.5, 30.0])
    for _ in range(9):
        run.turn(1.5)
        wait(1000)  # others have their turn
    assert run.done
    # the second was due in the middle of a pass; nothing is left at 4 until the third comes
    stamps = [(r.submitted, r.token_times) for r in run.engine.requests.values()]
    assert stamps == [(0, [1, 2]), (1, [3, 4]), (30, [31, 32])]


def test_turns_go_to_the_one_with_the_fewest_tokens(batching, made_up, monkeypatch):
    build, wait = made_up
    runs, order = [build([0.0] * 3), build([0.0] * 3)], []
    for run, name, seconds in zip(runs, ("fast", "slow"), (1, 2), strict=True):
        run.engine.wait = lambda _, name=name, seconds=seconds: (wait(seconds), order.append(name))
    monkeypatch.setattr(batching, "TURN", 1)
    batching.side_by_side(runs)
    assert order == ["fast", "slow"] * 6
    assert [run.engine.requests[2].token_times[-1] for run in runs] == [6, 12]


def test_measures_of_made_up_requests(batching):
    def request(admitted, times, size):
        generation = Generation(tokens=[1] * len(times), depth=[12] + [3] * (len(times) - 1))
        return SimpleNamespace(admitted=admitted, ended=times[-1], kv_bytes=size, token_times=times,
                               generation=generation)  # fmt: skip

    requests = [request(1.0, [2.0, 3.0, 6.0], 100), request(4.0, [5.0], 10), request(6.0, [8.0, 9.0], 50)]
    passes = {stage: 4 * (1 + i) for i, stage in enumerate(batching.Stage)}
    engine = SimpleNamespace(
        requests=dict(enumerate(requests)), passes=passes, scheduler=SimpleNamespace(slots=2),
        slots_in={stage: n + 2 for stage, n in passes.items()}, cells={stage: 3 * n for stage, n in passes.items()},
        grid=SimpleNamespace(cache=SimpleNamespace(nbytes=500)),
    )  # fmt: skip
    found = batching.measures(SimpleNamespace(engine=engine, arrivals=[1.0, 1.5, 6.0], crowded=[2, 1, 2]))
    assert found["seconds"] == 8 and found["tokens"] == 6 and found["tokens_per_second"] == 6 / 8
    assert found["requests_per_second"] == 3 / 8 and found["mean_depth"] == (3 * 12 + 3 * 3) / 6
    assert found["kv_bytes_in_use"] == 110, "the third takes the place of the first in the moment it leaves"
    assert [found[f"ttft_{x}"] for x in ("mean", "p50")] == [6500 / 3, 2000]
    assert found["tpot_mean"] == (2000 + 1000) / 2
    assert [found[f"itl_{x}"] for x in ("mean", "p50", "p99")] == pytest.approx([5000 / 3, 1000, 2960])
    assert [found[f"passes_{x}"] for x in ("PRELUDE", "RECUR", "CODA")] == [4, 8, 12]
    assert found["occupancy_crowded"] == 5 / 3 / 2
    assert found["occupancy_RECUR"] == 10 / 8 / 2 and found["cells_per_pass_RECUR"] == 3
    assert found["passes_per_token"] == 4 and found["recurrent_passes_per_token"] == 8 / 6
    assert found["mean_depth_of_trips"] == 10 / 14 and found["recurrent_passes_per_coda"] == 8 / 12


def test_other_tokens_are_an_error_and_other_depths_are_counted(batching):
    right = [Generation(tokens=[1, 2], depth=[4, 3]), Generation(tokens=[5], depth=[4])]
    assert batching.check("depth", right, right) == 0
    assert batching.check("depth", [Generation(tokens=[1, 2], depth=[4, 2]), right[1]], right) == 1
    with pytest.raises(RuntimeError, match=r"mode depth gave request 1 the tokens \[6\] instead of \[5\]"):
        batching.check("depth", [right[0], Generation(tokens=[6], depth=[4])], right)


def test_requests_are_of_all_kinds_and_arrive_as_often_as_asked(batching):
    problems = batching.mixed(64)
    assert len({p.text for p in problems}) == 64 and {p.family for p in problems} == set(tasks.FAMILIES)
    assert len({(p.family, p.level) for p in problems}) > 12
    arrivals = batching.poisson(4000, rate=20.0, seed=1)
    gaps = torch.tensor(arrivals).double().diff(prepend=torch.zeros(1).double())
    assert gaps.min() > 0 and gaps.mean().item() == pytest.approx(0.05, rel=0.05)
    assert gaps.std().item() == pytest.approx(0.05, rel=0.05), "of an exponential, as large as the mean"
    assert arrivals != batching.poisson(4000, rate=20.0, seed=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--requests", "4", "0"], "--requests is [4, 0]; it must be at least 1"),
        (["--coda-batch", "0"], "--coda-batch is 0; it must be at least 1"),
        (["--guess-after", "99"], "--guess-after is 99; it must be from 1 to 12"),
        (["--guess-after", "5", "--num-steps", "4"], "--guess-after is 5; it must be from 1 to 4"),
        (["--num-steps", "0"], "--num-steps is 0; it must be at least 1"),
        (["--chunk", "0"], "--chunk is 0; it must be at least 1"),
        (["--rates", "0.5", "0"], "--rates is [0.5, 0.0]; all must be above 0"),
    ],
)
def test_bad_arguments_of_batching_are_said(batching, arguments, says, capsys):
    with pytest.raises(SystemExit):
        batching.main(arguments)
    assert says in capsys.readouterr().err


# --- full_scale: decoding against the memory bandwidth --------------------------------------------------------------


full_scale = script("full_scale")
SMALLEST = "--preset tiny --tokens 6 --prompt 4 --context 64 --waves 8 --slots 2 --repeat 1".split()


def test_full_scale_runs_without_a_gpu_and_says_so(full_scale, tmp_path):
    printed, found = run(full_scale, [*SMALLEST, "--device", "cpu", "--fast"], tmp_path)
    if not torch.cuda.is_available():
        assert "**No GPU was there.**" in printed and "No GPU" in found["note"]
    assert {"cpu", "torch", "commit"} <= found["machine"].keys()
    rows = {row["name"]: row for row in found["rows"][1:]}
    assert rows["autoregressive, r = 32"]["passes_per_token"] == 32
    assert rows["autoregressive, r = 64"]["passes_per_token"] == 64
    assert rows["diffusion forcing, r' = 2, wave 8"]["passes_per_token"] == 2
    assert rows["lossless wavefront, 100% right"]["passes_per_token"] == 4
    assert all(row["name"] in printed and row["tokens_per_second"]["median"] > 0 for row in rows.values())
    assert {row["mode"] for row in found["batching"]} == {"sequence", "depth"}
    assert "goal" not in printed, "goals are of a GPU"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fast", [False, True])
def test_what_a_full_scale_row_has_to_read(full_scale, batch, fast):
    """By hand: the weights of every call, and keys and values of all positions up to the window's end."""
    model = full_scale.build("tiny", torch.device("cpu"), torch.float32)
    d, inner, vocab = 96, 264, 128
    block = 4 * (3 * d * d + d * d + 3 * d * inner + 2 * d + 4 * d)
    kv, prompt, steady = 4 * 2 * d, 5, 10
    ends = range(prompt + 8, prompt + 18)  # the position after the 8th token, and so on
    name = "autoregressive, r = 32"
    rows = {row.name: row for row in full_scale.rows_of(64, [batch], [8], steady)}
    clock = full_scale.run(model, rows[name], prompt, steady, fast, count=True)
    weights = 32 * (block + 4 * 2 * d * d) + 2 * block + 4 * d + 4 * d * vocab
    assert clock.timed == steady * batch
    assert clock.moved["bytes"] == steady * weights + batch * kv * 34 * sum(ends)
    if batch == 1:  # each of 8 cells reads its own slot, up to itself
        clock = full_scale.run(model, rows["lossless wavefront, 100% right"], prompt, steady, fast, count=True)
        weights = 4 * (block + 4 * 2 * d * d) + 2 * block + 4 * d + 4 * d * vocab
        cells = sum(sum(range(end, end + 8)) for end in ends)
        prelude_and_coda = sum(2 * end + 14 for end in ends)
        assert clock.moved["bytes"] == steady * weights + kv * (4 * cells + prelude_and_coda)


def test_scripted_guesses_are_right_as_often_as_asked(full_scale):
    model = full_scale.build("tiny", torch.device("cpu"), torch.float32)
    rows = {row.rate: row for row in full_scale.rows_of(512, [1], [], 150) if row.rate is not None}
    passes = {}
    for rate, row in rows.items():
        clock = full_scale.run(model, row, 5, 150, fast=False, count=True)
        passes[rate] = clock.moved["recur"] / clock.timed
    assert passes[1.0] == 4
    # a wrong guess is found out at depth 32 and not at 4
    assert passes[0.9] == pytest.approx(4 + 0.1 * 28, rel=0.25)
    assert 4 < passes[0.94] < passes[0.9]


def test_the_clock_of_full_scale_stops_when_the_first_row_ends(full_scale, monkeypatch):
    now = iter(range(1, 100))
    monkeypatch.setattr(full_scale.time, "perf_counter", lambda: next(now))
    clock = full_scale.Clock(batch=2, tokens=10)
    going = [clock(0, row) for step in range(8) for row in (0, 1)]  # 16 moments
    assert all(going) and clock.start == 16
    assert [clock(0, 0), clock(0, 0), clock(0, 1)] == [True, False, True], "row 1 is slower"
    assert not clock(0, 1), "the first row has ended, and another outer step begins"
    assert clock.timed == 3 and clock.end == 19


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--repeat", "0"], "--repeat is 0; it must be at least 1"),
        (["--waves", "8", "0"], "--waves is [8, 0]; all must be at least 1"),
        (["--prompt", "600"], "--prompt 600 and --tokens"),
        (["--context", "4096"], "--context is 4096, and the model's 512"),
    ],
)
def test_bad_arguments_of_full_scale_are_said(full_scale, arguments, says, capsys):
    with pytest.raises(SystemExit):
        full_scale.main(["--preset", "tiny", "--device", "cpu", *arguments])
    assert says in capsys.readouterr().err
