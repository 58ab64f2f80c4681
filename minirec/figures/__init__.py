"""Figures of the notebooks and the README, one file per theme.

A function takes plain data and, where it draws one panel, an optional `ax`; it returns the axes and never shows or
saves them.  Colours can be told apart by colour-blind readers: dark means deep, vermilion means wrong.  Text from
outside (tokens, labels, titles) is drawn as it is, never as mathematics.
"""

from minirec.figures.batching import gantt
from minirec.figures.cache import by_cache, slot_map
from minirec.figures.cost import bytes_by_part, knobs, pareto, pass_times, passes_by_level, speed_accuracy
from minirec.figures.depth import (
    change_curves,
    depth_accuracy,
    depth_curves,
    exit_thresholds,
    settled_steps,
    settling,
    token_depths,
)
from minirec.figures.grid import noise_levels, unmasking_and_wavefront, wavefront, wavefront_animation
from minirec.figures.ink import BLUE, GREEN, GREY, VERMILION
from minirec.figures.lens import convergence_map, lens_ranks, relative_change, state_norms, trajectories
from minirec.figures.training import depth_histogram, gradient_by_step, over_training

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "VERMILION",
    "by_cache",
    "bytes_by_part",
    "change_curves",
    "convergence_map",
    "depth_accuracy",
    "depth_curves",
    "depth_histogram",
    "exit_thresholds",
    "gantt",
    "gradient_by_step",
    "knobs",
    "lens_ranks",
    "noise_levels",
    "over_training",
    "pareto",
    "pass_times",
    "passes_by_level",
    "relative_change",
    "settled_steps",
    "settling",
    "slot_map",
    "speed_accuracy",
    "state_norms",
    "token_depths",
    "trajectories",
    "unmasking_and_wavefront",
    "wavefront",
    "wavefront_animation",
]
