"""Every figure of the notebooks and the README, drawn from what samplers, engine, lens and training return."""

from minirec.figures.plots import *  # noqa: F403
