"""Autoregressive decoding: one position at a time, r recurrence steps deep, then the next.

The plain schedule over the position x depth grid, and the reference for all others.  At batch size 1 every
recurrence step reads all weights of the recurrent block to advance a single cell: r passes per token.
Notebook: 06_diffusion_forcing.
"""

from __future__ import annotations

import torch

from minirec.decoding import Generation, Grid
from minirec.recurrent_block import RecurrentDepthLM


@torch.inference_mode()
def generate(
    model: RecurrentDepthLM, prompt, max_new_tokens: int, *, num_steps: int | None = None, **options
) -> Generation | list[Generation]:
    """Continue a prompt (list or 1-D tensor of ids), or a batch of prompts of any lengths, token by token.

    num_steps: recurrence steps of every token; None: the config's mean_recurrence.  options: those of
    `minirec.decoding.Options`.  Returns a Generation, or a list of them for a batch; a row of a batch gets the tokens
    it would get alone.  Raises ValueError for a bad argument, FloatingPointError for logits that are not finite.
    """
    grid = Grid(model, prompt, max_new_tokens, num_steps, **options)
    grid.prefill()
    while not all(grid.finished):
        starts = [grid.next_position(row) for row in range(len(grid.lengths))]
        at = grid.window(starts, 1)
        e, s = grid.embed(at), at.read(grid.state)  # (B, 1, d) each
        for depth in range(grid.num_steps):
            s = grid.recur(s, e, at, depth)
        tokens = grid.choose(grid.decode(s, at), at.positions)  # (B, 1)
        grid.place(at, tokens)
        for row, token in enumerate(tokens[:, 0].tolist()):
            if not grid.finished[row]:
                grid.commit(row, token, grid.num_steps)
                grid.record(row, starts[row], [grid.num_steps], [token])
    return grid.results()
