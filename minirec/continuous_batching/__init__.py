"""Continuous depth-wise batching: many requests, each token at its own recurrence depth, none waiting for another.

A server decodes many sequences in one pass, so that the weights are read once for all of them.  In an ordinary
transformer every token needs the same number of layers; here tokens leave the loop at different depths, and a batch in
lockstep waits for its deepest token.  So every slot keeps its own depth, and there are three queues (arXiv 2608.09444):

      waiting --admit--> [ prelude ] --> [ recurrent block ] --> [ coda ] --token--> prelude of its next position
                                           ^______|  not settled                  or, at the end, of the next request

    mode         admits                          a settled token                                 positions per slot
    "static"     when all slots are free         waits for all others, then they move together   1
    "sequence"   when a slot is free             the same                                        1
    "depth"      when a slot is free             moves on in the next pass                       1
    "wavefront"  when a slot is free             moves on in the next pass                       a wave

All four are one loop (`Engine.step`: one pass through one of the queues); a mode decides which slots may join the pass.
Cells of any slots, positions and depths share a pass (`kv_cache.Cells`); a prompt is a few chunks of positions that
move together.  A request gets the tokens it would get alone: from `autoregressive`, or, with a threshold, from
`adaptive_exit` with the criterion "latent-diff"; in mode "wavefront" from `lossless_wavefront`, or, with a threshold,
from `diffusion_forcing` without momentum.

**Interrupts.**  A pass computes; then each slot changes in one indivisible update.  An interrupt at any point leaves
every slot before or after its update, and the next `step` repeats what was cut: writing the same keys and values again
changes nothing.  So Ctrl-C, or an exception out of on_pass or clock, loses no request and no token: call `run` again.

Public engines batch by depth with one position per request (2608.09444, thousands of lines for GPUs), or run a
wavefront for one sequence; this one joins the two.  Keys and values: one row of a static cache per slot; a budget in
bytes limits how many are promised at once.

    requests.py    what goes in and comes out: Request, Event, Pass
    slots.py       a request at work: its window of cells, and where it goes after a coda (prompt, token, wave, front)
    scheduler.py   who is admitted, and who is in the next pass
    engine.py      the loop around the model

Notebook: 09_continuous_batching.
"""

from minirec.continuous_batching.engine import Engine
from minirec.continuous_batching.requests import Event, Pass, Request, Stage, State
from minirec.continuous_batching.scheduler import MODES, Scheduler
from minirec.continuous_batching.slots import Slot

__all__ = ["MODES", "Engine", "Event", "Pass", "Request", "Scheduler", "Slot", "Stage", "State"]
