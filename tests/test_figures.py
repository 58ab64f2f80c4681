"""Figures show the data they are given: what is read back from the axes is what went in."""

import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from minirec import figures as plots
from minirec.continuous_batching import Pass, Stage
from minirec.decoding import Generation, OuterStep
from minirec.figures import drawings


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_every_public_function_of_the_themes_is_exported_by_name():
    themes = [import_module(f"minirec.figures.{found.name}") for found in pkgutil.iter_modules(plots.__path__)]
    drawn = {
        name
        for theme in themes
        for name, thing in vars(theme).items()
        if inspect.isfunction(thing) and thing.__module__ == theme.__name__ and not name.startswith("_")
    }
    drawn -= {
        name for name, thing in vars(drawings).items() if inspect.isfunction(thing)
    }  # used by their module's name
    helpers = {"depth_colours", "readable_on", "plain", "word", "token_word", "number_map"}
    assert drawn - helpers | {"BLUE", "GREEN", "GREY", "VERMILION"} == set(plots.__all__)
    assert all(hasattr(plots, name) for name in plots.__all__)


# --- Text from outside, in every figure that shows some ---

NASTY = [
    r"$\frac5$",
    "$",
    "$x_1$",
    "\\",
    r"\$",
    "\x1b[2J\x00\x07",
    "a\nb",
    "\udc80",
    "w" * 500,
    "",
    " ",
    "_",
    "%",
    "^",
    "{",
]


class Tokens:
    "A tokenizer whose token i is text number i."

    def __init__(self, texts):
        self.texts = texts

    def decode(self, tokens, **_):
        return "".join(self.texts[token] for token in tokens)


def wave(tokens, steps) -> Generation:
    "One new position per outer step, two in flight; the second guess of each step is wrong."
    trace = [OuterStep(4 + y, [2, 1], [*tokens[y + 1 : y + 2], tokens[y]], 5 + y) for y in range(steps)]
    return Generation(tokens=tokens, depth=[2] * len(tokens), passes=4, trace=trace)


def figures_with(texts: list[str]) -> dict:
    "Every figure that shows text from outside, with these texts in every place for it."
    a = texts[0]
    n, tokens, ones = len(texts), list(range(len(texts))), [1.0] * len(texts)
    tokenizer, run = Tokens(texts), wave(list(range(len(texts))), len(texts) - 1)
    known = SimpleNamespace(known=[False] * n, guesses=tokens, confidence=ones)
    passes = [Pass(Stage.RECUR, 1, [(0, 0, 1)])]
    long = wave([i % n for i in range(34)], 33)
    return {
        "wavefront": lambda: plots.wavefront(run, 4, tokenizer),
        "wavefront, enlarged": lambda: plots.wavefront(long, 4, tokenizer),
        "wavefront_animation": lambda: plots.wavefront_animation({t: run for t in texts[:2]}, 4, tokenizer, frames=2),
        "unmasking_and_wavefront": lambda: plots.unmasking_and_wavefront([known, known], run, 4, tokenizer),
        "noise_levels": lambda: plots.noise_levels({t: np.ones((2, 2)) for t in texts[:4]}),
        "token_depths": lambda: plots.token_depths(texts, [1] * n, title=a),
        "convergence_map": lambda: plots.convergence_map(np.ones((2, n)), texts),
        "depth_curves": lambda: plots.depth_curves({t: {1: 0.5, 2: 1.0} for t in texts}, title=a),
        "change_curves": lambda: plots.change_curves({t: {1: 0.5, 2: 1.0} for t in texts}, title=a),
        "settled_steps": lambda: plots.settled_steps({t: [1, 2] for t in texts}, title=a),
        "exit_thresholds": lambda: plots.exit_thresholds({t: {t: [(0.1, 2, 1.0)]} for t in texts[:2]}),
        "depth_accuracy": lambda: plots.depth_accuracy({t: [(1, 0.5)] for t in texts}, title=a),
        "lens_ranks": lambda: plots.lens_ranks({t: np.ones((2, 2)) for t in texts[:4]}, levels=texts[:2]),
        "state_norms": lambda: plots.state_norms({t: [1, 2] for t in texts}),
        "trajectories": lambda: plots.trajectories({t: np.ones((2, 2)) for t in texts}, title=a),
        "depth_histogram": lambda: plots.depth_histogram([1, 2], {t: 1 for t in texts[:3]}),
        "gradient_by_step": lambda: plots.gradient_by_step({t: [1, 2] for t in texts}, title=a),
        "over_training": lambda: plots.over_training({t: {u: ([1, 2], [1, 2]) for u in texts} for t in texts[:3]}),
        "slot_map": lambda: plots.slot_map({t: [0, 1] for t in texts[:4]}),
        "by_cache": lambda: plots.by_cache(
            {t: dict.fromkeys(texts[:4], 1.0) for t in texts[:4]}, dict.fromkeys(texts[:4], 1)
        ),
        "gantt": lambda: plots.gantt({t: passes for t in texts[:4]}, title=a),
        "speed_accuracy": lambda: plots.speed_accuracy({t: (1.0, 1.0) for t in texts}, baseline=a),
        "pareto": lambda: plots.pareto({t: (1.0, 1.0) for t in texts}, title=a),
        "knobs": lambda: plots.knobs({t: [(u, 1, 1, 1, 1, 1) for u in texts[:3]] for t in texts[:2]}, {a: a}),
        "passes_by_level": lambda: plots.passes_by_level({t: {t: {1: (1, 1)}} for t in texts[:4]}, full=2),
        "pass_times": lambda: plots.pass_times({t: (1, 1) for t in texts}, 1, 1),
        "bytes_by_part": lambda: plots.bytes_by_part({t: {u: 1 for u in texts[:4]} for t in texts[:4]}),
    }


def drawn_texts(figure) -> list[str]:
    "What is drawn, letter by letter; no text may be taken for mathematics."
    shown = []
    for text in figure.findobj(Text):
        letters, mathematics = text._preprocess_math(text.get_text())
        if mathematics:
            assert re.search(r"mathdefault|s_k", letters), f"read as mathematics: {letters}"  # matplotlib's and our own
        shown.append(letters)
    return shown


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout", "ignore:Tight layout")
@pytest.mark.parametrize("name", figures_with(["a", "b"]))
def test_text_from_outside_is_drawn_letter_by_letter(name):
    figures_with(NASTY)[name]()
    if name == "wavefront_animation":  # returns bytes
        return
    figure = plt.gcf()
    figure.canvas.draw()
    shown = drawn_texts(figure)
    assert any(r"$\frac5$" in text for text in shown), "as it is"
    assert all(c.isprintable() or c == "\n" for text in shown for c in text)


@pytest.mark.parametrize("text", NASTY)
def test_a_token_is_one_short_printable_word(text):
    words = plots.token_depths([text, "b"], [1, 2]).texts[0]
    shown, mathematics = words._preprocess_math(words.get_text())
    assert not mathematics and 1 <= len(shown) <= 60 and shown.isprintable()
    if text.strip().isprintable() and 0 < len(text.strip()) < 20:
        assert shown == text.strip()


# --- Inside the loop: notebook 03_thinking_longer ---


def brightness(colour) -> float:
    return float(np.dot(to_rgb(colour), (0.3, 0.6, 0.1)))


@pytest.mark.parametrize("draw", [plots.depth_curves, plots.change_curves])
def test_curves_of_levels_are_the_numbers_and_harder_is_darker(draw):
    curves = {1: {1: 0.9, 2: 1.0, 8: 1.0}, 3: {1: 0.1, 2: 0.2, 8: 0.9}, 9: {1: 0.1, 8: 0.3}}
    ax = draw(curves, title="hops")
    lines = [line for line in ax.lines if line.get_label() in ("1", "3", "9")]
    drawn = {int(line.get_label()): dict(zip(*line.get_data(), strict=True)) for line in lines}
    assert drawn == curves
    shades = [brightness(line.get_color()) for line in lines]
    assert shades == sorted(shades, reverse=True) and len(set(shades)) == 3
    assert ax.get_xscale() == "log" and ax.get_title() == "hops"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "4", "8"]


def test_levels_beyond_training_are_dashed_and_an_axis_can_be_given():
    _, mine = plt.subplots()
    ax = plots.depth_curves({8: {1: 0.0, 2: 1.0}, 9: {1: 0.0, 2: 0.5}}, beyond=(9, 10), ax=mine)
    assert ax is mine
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]


def test_the_threshold_of_change_curves_is_drawn():
    ax = plots.change_curves({1: {1: 2.0, 2: 0.1}}, threshold=0.03)
    assert [0.03, 0.03] in [list(line.get_ydata()) for line in ax.lines]


def test_settled_steps_are_counted_in_percent():
    ax = plots.settled_steps({1: [1, 1, 1, 1], 2: [1, 2, 2, 4]})
    np.testing.assert_allclose(ax.images[0].get_array(), [[100, 0, 0, 0], [25, 50, 0, 25]])
    assert [text.get_text() for text in ax.texts] == ["100", "", "", "", "25", "50", "", "25"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["1", "2"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "3", "4"]


def test_lens_ranks_share_one_scale_and_start_before_the_first_step():
    ranks = {"logit lens": np.array([[60.0, 5.0], [60.0, 7.0]]), "coda lens": np.array([[50.0, 1.0], [50.0, 3.5]])}
    axes = plots.lens_ranks(ranks, levels=(1, 2))
    assert [ax.get_title() for ax in axes] == list(ranks)
    for ax, values in zip(axes, ranks.values(), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), values)
        assert [text.get_text() for text in ax.texts] == [f"{value:g}" for value in values.flatten()]
        assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1"]
        assert ax.images[0].get_clim() == (1, 60)


def test_the_convergence_map_has_a_column_per_token_and_takes_zeros():
    distance = np.array([[9.0, 8.0, 7.0], [1.0, 4.0, 0.1], [0.0, 0.0, 0.0]])
    ax = plots.convergence_map(distance, ["Follow", "k", "."])
    shown = ax.images[0].get_array()
    np.testing.assert_array_equal(shown[:2], distance[:2])
    assert (shown[2] == shown[2, 0]).all() and 0 < shown[2, 0] <= 0.1  # what has arrived has the darkest colour
    assert [text.get_text() for text in ax.get_xticklabels()] == ["Follow", "k", "."]
    ax.figure.canvas.draw()


def test_trajectories_mark_both_ends_of_every_path():
    paths = {"seed 0": np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 3.0]]), "seed 1": np.array([[5.0, 5.0], [3.0, 3.0]])}
    ax = plots.trajectories(paths)
    drawn = [line.get_xydata() for line in ax.lines]
    for path in paths.values():
        assert any(np.array_equal(path, line) for line in drawn)
        for end in (path[:1], path[-1:]):
            assert any(np.array_equal(end, line) for line in drawn)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(paths)


# --- Training: notebook 02_training_through_depth ---


def test_the_histogram_of_depths_is_their_shares_and_ends_before_the_far_tail():
    depths = np.array([1] * 3000 + [2] * 5000 + [4] * 1996 + [500] * 4)
    ax = plots.depth_histogram(depths, {"mean": 2.3, "mode": 2})
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in ax.patches}
    assert max(heights) == 4
    np.testing.assert_allclose([heights[r] for r in (1, 2, 3, 4)], [0.3, 0.5, 0, 0.1996])
    assert [line.get_xdata()[0] for line in ax.lines] == [2.3, 2]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["mean 2.3", "mode 2"]


def test_gradients_by_step_leave_zeros_out():
    ax = plots.gradient_by_step({"k = 3": [0.1, 0.2, 0.4], "k = 1": [0.0, 0.0, 0.4]})
    np.testing.assert_array_equal([line.get_xdata() for line in ax.lines], [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0.1, 0.2, 0.4])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [np.nan, np.nan, 0.4])
    assert ax.get_yscale() == "log"


def test_over_training_has_a_panel_a_quantity_and_one_look_a_run():
    names = [f"run {i}" for i in range(5)]
    panels = {
        "loss": {name: ([0, 10, 20], [3.0, 2.0, 1.0 + i]) for i, name in enumerate(names)},
        "exact match": {name: ([0, 10, 20], [None, 0.5, float("nan")]) for name in reversed(names)},
    }
    left, right = plots.over_training(panels)
    assert (left.get_ylabel(), right.get_ylabel()) == ("loss", "exact match")
    looks = []
    for ax in (left, right):
        lines = {line.get_label(): line for line in ax.lines}
        assert set(lines) == set(names)
        looks.append([(lines[name].get_color(), lines[name].get_linestyle()) for name in names])
    assert looks[0] == looks[1] and len(set(looks[0])) == 5
    np.testing.assert_array_equal(left.lines[2].get_xydata(), [[0, 3], [10, 2], [20, 3]])
    np.testing.assert_array_equal(right.lines[0].get_xydata(), [[10, 0.5]])
    assert [text.get_text() for text in left.figure.legends[0].get_texts()] == names


def test_the_only_line_of_a_panel_needs_no_legend():
    (ax,) = plots.over_training({"loss": {"loss": ([1, 2], [3.0, 2.0])}})
    assert not ax.figure.legends
    one, two = ([1, 2], [0.0, 0.5]), ([1, 2], [0.0, 0.9])
    left, right = plots.over_training({"loss": {"loss": one}, "exact match": {"words": one, "hops": two}})
    assert left.lines[0].get_color() not in {line.get_color() for line in right.lines}
    assert [text.get_text() for text in left.figure.legends[0].get_texts()] == ["words", "hops"]


# --- The plane of speed and accuracy: benchmarks/samplers.py ---


def test_points_of_the_plane_and_its_front():
    points = {"slow": (10.0, 0.9), "slow, r = 2": (30.0, 0.8), "fast, a": (20.0, 0.5), "fast, b": (50.0, 0.2)}
    ax = plots.pareto(points, title="words")
    drawn = {tuple(xy) for dots in ax.collections for xy in dots.get_offsets().tolist()}
    assert drawn == {(x, 100 * y) for x, y in points.values()}
    assert [dots.get_label() for dots in ax.collections] == ["slow", "fast"], "one colour a sampler"
    (front,) = ax.lines
    assert list(zip(*front.get_data(), strict=True)) == [(50.0, 20.0), (30.0, 80.0), (10.0, 90.0)]
    assert ax.get_title() == "words"


# --- What a token costs: notebook 08_lossless_wavefront ---


def test_passes_are_dots_where_measured_and_lines_where_predicted():
    words = {"g=1": {2: (1.5, 1.4), 5: (1.2, 1.25)}, "g=2": {2: (2.5, 2.4), 5: (2.2, 2.25)}}
    hops = {"g=1": {8: (5.8, 5.9)}, "g=2": {8: (6.3, 6.1)}}
    axes = plots.passes_by_level({"words": words, "hops": hops}, full=12)
    for ax, (family, settings) in zip(axes, {"words": words, "hops": hops}.items(), strict=True):
        assert ax.get_title() == family
        dots = {line.get_label(): line for line in ax.lines if line.get_marker() == "o"}
        assert set(dots) == set(settings)
        for setting, levels in settings.items():
            colour = dots[setting].get_color()
            (line,) = [x for x in ax.lines if x.get_color() == colour and x.get_linestyle() == "-"]
            assert dict(zip(*dots[setting].get_data(), strict=True)) == {k: m for k, (m, _) in levels.items()}
            assert dict(zip(*line.get_data(), strict=True)) == {k: p for k, (_, p) in levels.items()}
        assert [12, 12] in [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == "--"]
    assert axes[0].get_ylim() == axes[1].get_ylim() and axes[0].get_ylim()[1] > 12
    assert [t.get_text() for t in axes[0].figure.legends[0].get_texts()] == ["g=1", "g=2", "autoregressive"]


# --- The batching engine: notebook 09_continuous_batching ---


def test_the_gantt_figure_has_a_block_for_every_slot_of_every_pass():
    first = [
        Pass(Stage.PRELUDE, 2, [(0, 7, 0), (1, 8, 0)]),
        Pass(Stage.RECUR, 2, [(0, 7, 1), (1, 8, 1)]),
        Pass(Stage.RECUR, 1, [(0, 7, 2)]),
        Pass(Stage.CODA, 1, [(0, 7, 2)]),
        Pass(Stage.RECUR, 1, [(1, 8, 2)]),
    ]
    second = [Pass(Stage.RECUR, 1, [(1, 9, 1)]), Pass(Stage.RECUR, 1, [(1, 9, 2)]), Pass(Stage.RECUR, 1, [(1, 9, 6)])]
    axes = plots.gantt({"depth": first, "sequence": second}, title="two runs")
    assert [ax.get_title(loc="left") for ax in axes] == ["depth", "sequence"]
    blocks = []
    for ax, passes in zip(axes, (first, second), strict=True):
        drawn = {(bar.get_x(), round(bar.get_y() + bar.get_height() / 2)): bar for bar in ax.patches}
        assert set(drawn) == {(x, row) for x, one in enumerate(passes) for row, _, _ in one.slots}
        assert len(drawn) == len(ax.patches)
        blocks.append(drawn)
        assert ax.get_ylim()[0] > ax.get_ylim()[1] and len(ax.get_yticks()) == 2, "a lane for each slot in any run"
    above, below = blocks
    assert above[1, 0].get_facecolor() == above[1, 1].get_facecolor() == below[0, 1].get_facecolor()
    assert above[2, 0].get_facecolor() == above[4, 1].get_facecolor() == below[1, 1].get_facecolor()
    brightness = [sum(bar.get_facecolor()[:3]) for bar in (below[0, 1], below[1, 1], below[2, 1])]
    assert brightness[0] > brightness[1] > brightness[2], "the deeper, the darker"
    assert above[0, 0].get_facecolor()[:3] == to_rgb(plots.GREY) and above[3, 0].get_facecolor()[:3] == (0, 0, 0)
    heights = [bar.get_height() for bar in (above[0, 0], above[3, 0], above[1, 0], below[0, 1])]
    assert heights[:2] == pytest.approx([heights[0]] * 2) and heights[2:] == pytest.approx([heights[2]] * 2)
    assert heights[0] < heights[2]
    assert [[text.get_text() for text in ax.texts] for ax in axes] == [["7", "8"], ["9"]]
    figure = axes[0].figure
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["prelude", "coda"]
    assert figure.get_suptitle() == "two runs"


def test_a_gantt_figure_of_loops_alone_needs_no_legend():
    (ax,) = plots.gantt({"": [Pass(Stage.RECUR, 1, [(0, 0, 1)])]})
    assert not ax.figure.legends
    ax.figure.canvas.draw()


# --- Keys and values: notebook 04_kv_cache ---


def test_the_slot_map_shows_what_each_slot_holds_and_what_is_read_there():
    axes = plots.slot_map({"full": [0, 1, 2], "shared": [0, 1, 0]})
    assert [ax.get_title() for ax in axes] == ["full", "shared"]
    cells, read = [], []
    for ax in axes:
        centres = [(cell.get_x() + cell.get_width() / 2, cell.get_y() + cell.get_height() / 2) for cell in ax.patches]
        below = max(y for _, y in (text.get_position() for text in ax.texts))
        words = {text.get_position(): text for text in ax.texts}
        assert all(int(words[round(x), round(y)].get_text()) == round(x) for x, y in centres), "a step in its column"
        stays = [to_rgb(cell.get_facecolor()) == to_rgb(plots.BLUE) for cell in ax.patches]
        cells.append([(round(x), round(y), kept) for (x, y), kept in zip(centres, stays, strict=True)])
        found = [words[k, below] for k in (1, 2, 3)]
        read.append([(int(text.get_text()), text.get_color() == plots.VERMILION) for text in found])
    assert cells[0] == [(1, 0, True), (2, 1, True), (3, 2, True)]
    assert cells[1] == [(1, 0, False), (2, 1, True), (3, 0, True)], "step 3 has overwritten step 1"
    assert read[0] == [(1, False), (2, False), (3, False)] and read[1] == [(3, True), (2, False), (3, False)]
    assert [label.get_text() for label in axes[1].get_yticklabels()] == ["slot 0", "slot 1", "k reads"]


def test_right_answers_by_cache_are_one_bar_a_group_and_cache():
    shares = {"words": {"full": 1.0, "1 slot": 0.97}, "hops 8": {"full": 0.75, "1 slot": 0.25}}
    _, mine = plt.subplots()
    ax = plots.by_cache(shares, {"full": 10240, "1 slot": 2560}, ax=mine)
    assert ax is mine
    for bars, (group, row) in zip(ax.containers, shares.items(), strict=True):
        assert bars.get_label() == group and [bar.get_height() for bar in bars] == list(row.values())
        assert [round(bar.get_x() + bar.get_width() / 2) for bar in bars] == [0, 1], "over the name of its cache"
    assert [text.get_text() for text in ax.texts] == ["100", "97", "75", "25"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["full\n10.0 KiB", "1 slot\n2.5 KiB"]


# --- Depth by token: notebook 05_adaptive_exit ---


def test_a_text_shows_every_token_with_its_depth_and_breaks_lines():
    words, depths = ["Eva", "has", "38", "+", "18", "=", "56", "stamps", "."], [12, 2, 2, 3, 2, 2, 5, 2, 2]
    ax = plots.token_depths(words, depths, marked=[6], title="words", line=20)
    texts = [text.get_text() for text in ax.texts]
    assert texts[::2] == words and texts[1::2] == [str(depth) for depth in depths]
    boxes = ax.patches
    assert len(boxes) == len(words)
    assert {box.get_y() for box in boxes} == {0.08, 1.08}, "two lines"
    assert max(box.get_x() + box.get_width() for box in boxes) <= 20
    shade = {depth: brightness(box.get_facecolor()[:3]) for depth, box in zip(depths, boxes, strict=True)}
    assert shade[2] > shade[3] > shade[5] > shade[12]
    assert [box.get_linewidth() > 1.5 and box.get_edgecolor()[3] > 0 for box in boxes] == [i == 6 for i in range(9)]
    assert ax.get_title(loc="left") == "words"


def test_thresholds_are_drawn_with_what_they_give_and_ask():
    rows = [(0.01, 9.0, 1.0), (0.1, 5.0, 0.75), (1.0, 2.0, 0.25)]
    results = {"latent-diff": {"words": rows, "hops": rows[:2]}, "kl": {"words": rows[1:], "hops": rows}}
    axes = plots.exit_thresholds(results)
    assert axes.shape == (2, 2)
    for column, (criterion, groups) in zip(axes.T, results.items(), strict=True):
        assert column[0].get_title() == criterion
        for ax, which in zip(column, (2, 1), strict=True):
            drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in ax.lines}
            assert drawn == {group: [(row[0], row[which]) for row in rows] for group, rows in groups.items()}
            assert ax.get_xscale() == "log"


def test_rules_on_the_plane_of_depth_and_accuracy_are_lines_from_left_to_right():
    curves = {"fixed depth": [(1, 0.0), (12, 1.0), (4, 0.5)], "kl": [(5.5, 1.0), (2.5, 0.75)]}
    ax = plots.depth_accuracy(curves, title="hops")
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in ax.lines}
    assert drawn == {rule: sorted(points) for rule, points in curves.items()}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(curves) and ax.get_title() == "hops"


# --- Two ways to denoise: notebook 07_diffusion_language_models ---


def test_noise_levels_share_one_scale_and_run_downwards():
    panels = {"together": np.array([[1.0, 1.0], [0.5, 0.5]]), "diagonal": np.array([[1.0, 1.0], [0.25, 1.0], [0, 0.5]])}
    axes = plots.noise_levels(panels)
    assert [ax.get_title() for ax in axes] == list(panels)
    for ax, levels in zip(axes, panels.values(), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), levels)
        assert ax.images[0].get_clim() == (0, 1)
        bottom, top = ax.get_ylim()
        assert bottom > top, "the first sampling step is the top row"
    dark, light = (brightness(axes[0].images[0].cmap(level)[:3]) for level in (0.0, 1.0))
    assert dark < light, "what is done is dark, as what is deep"


class Words:
    "A tokenizer whose words are the numbers of its tokens."

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


@pytest.mark.parametrize(
    ("trace", "says"), [(None, "trace is None; generate with trace=True"), ([], "trace is empty: the prompt gave the")]
)
def test_a_generation_without_outer_steps_says_why(trace, says):
    with pytest.raises(ValueError, match=says):
        plots.wavefront(Generation(tokens=[2], depth=[1], trace=trace), 4)


def test_unmasking_has_a_cell_for_every_hidden_token_and_a_dot_for_every_guess_to_be_changed():
    passes = [
        SimpleNamespace(known=[False, False, False], guesses=[7, 5, 6], confidence=[0.9, 0.5, 0.2]),
        SimpleNamespace(known=[True, False, False], guesses=[7, 8, 6], confidence=[1.0, 0.8, 0.4]),
        SimpleNamespace(known=[True, True, False], guesses=[7, 8, 9], confidence=[1.0, 1.0, 0.7]),
    ]
    steps = [OuterStep(4, [1], [3], 5), OuterStep(5, [1], [2], 6)]  # a prompt of four tokens, one new one a step
    wave = Generation(tokens=[7, 3, 2], depth=[2, 1, 1], passes=4, trace=steps)
    left, right = plots.unmasking_and_wavefront(passes, wave, 4, Words())
    assert [text.get_text() for text in left.texts] == ["7", "5", "6", "8", "6", "9"], "hidden tokens show their guess"
    places = [(round(cell.get_x()), round(cell.get_y())) for cell in left.patches]
    assert sorted(places) == [(x, y) for x in range(3) for y in range(3)]
    hatched = {place for place, cell in zip(places, left.patches, strict=True) if cell.get_hatch()}
    assert hatched == {(0, 1), (0, 2), (1, 2)}
    shade = {place: brightness(cell.get_facecolor()[:3]) for place, cell in zip(places, left.patches, strict=True)}
    assert shade[0, 0] < shade[1, 0] < shade[2, 0], "sure is dark"
    dots = sorted((int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in left.lines)
    assert dots == [(1, 0), (2, 0), (2, 1)]
    assert [text.get_text() for text in right.texts] == ["3", "2"], "the wavefront's cells show theirs"
    for ax, rows in ((left, 3), (right, 2)):
        assert ax.get_ylim() == (rows, 0) and ax.get_xlim() == (0, 3)


def test_a_pass_takes_its_reading_or_its_arithmetic():
    ax = plots.pass_times({"slow": (100.0, 1000.0), "fast": (200.0, 1000.0)}, read=50.0, work=10.0, most=100)
    slow, corner = ax.get_lines()[:2]
    assert slow.get_ydata()[0] == pytest.approx(500), "50 bytes at 100 a second, in ms"
    assert slow.get_ydata()[-1] == pytest.approx(1000), "100 positions of 10 operations at 1000 a second"
    assert corner.get_xdata()[0] == pytest.approx(50) and corner.get_ydata()[0] == pytest.approx(500)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["slow", "fast"]


def test_bytes_are_stacked_by_part():
    ax = plots.bytes_by_part({"a": {"core": 3e9, "rest": 1e9}, "b": {"core": 0.5e9, "rest": 1e9}})
    widths = [[bar.get_width() for bar in bars] for bars in ax.containers]
    assert widths == [[pytest.approx(3), pytest.approx(0.5)], [pytest.approx(1), pytest.approx(1)]]
    assert [bar.get_x() for bar in ax.containers[1]] == [pytest.approx(3), pytest.approx(0.5)]
    assert [t.get_text().strip() for t in ax.texts] == ["4", "1.5"]


# --- Concept drawings ---


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_well_formed_within_its_frame_and_up_to_date(name):
    source = drawings.DRAWINGS[name]()
    stored = Path(__file__).resolve().parent.parent / "docs/drawings" / name
    assert stored.read_text(encoding="utf-8") == source, "make drawings writes it again"
    root = ElementTree.fromstring(source)
    assert root.get("aria-label")
    width, height = map(float, root.get("viewBox").split()[2:])
    for part in root.iter():
        if part.get("x"):
            assert 0 <= float(part.get("x")) < width and 0 <= float(part.get("y")) <= height
    classes = {kind for part in root.iter() for kind in (part.get("class") or "").split()}
    (style,) = (part.text for part in root.iter() if part.tag.endswith("style"))
    assert {kind for kind in classes if not re.search(rf"\.{kind}\b", style)} == set(), "a class without a look"
    assert "prefers-color-scheme: dark" in style and "#" not in re.sub(
        r"<style>.*?</style>|url\(#\w+\)", "", source, flags=re.S
    )


def test_a_schedule_runs_the_steps_of_a_token_in_order_and_each_cell_once():
    passes = {}
    for name, (schedule, lost, _) in drawings.PANELS.items():
        for (x, k), when in schedule.items():
            assert k == 1 or schedule[x, k - 1] < when, f"{name}: step {k} of token {x} comes too early"
            assert (x, k) not in lost or lost[x, k] < when
        passes[name] = max(schedule.values())
        assert set(schedule.values()) == set(range(1, passes[name] + 1)), f"{name}: a pass without a cell"
    full = {(x, k) for x in range(1, 7) for k in range(1, 5)}
    for name in ("autoregressive", "self-speculative", "lossless wavefront"):  # these leave out nothing
        assert set(drawings.PANELS[name][0]) == full
    one_at_a_time = drawings.PANELS["adaptive exit"][0]
    assert passes["autoregressive"] == len(full) and passes["adaptive exit"] == len(one_at_a_time)
