"""Figures show the data they are given: what is read back from the axes is what went in."""

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb

from minirec import plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


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


def test_the_convergence_map_has_a_column_a_token_and_bears_zeros():
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
