"""Self-speculation: the same model drafts with few recurrence steps and checks with all of them.

A draft model has to be trained for other language models; a recurrent-depth model is its own: stop the loop early and
decode.  A round drafts `lookahead` tokens one after the other, `draft_steps` deep each, and then takes their positions
to full depth in one window (2502.05171, section 6.4; `generate_speculative` of the official code):

      depth
        r |  * * V V V V     V  verify: the steps draft_steps + 1 .. r, all positions of the round at once;
          |  * * V V V V        the drafts before the first wrong one are final, and so is what corrects it
          |  * * V V V V
          |  * * d d d d     d  draft: one position after the other
        1 |  * * d d d d
          +---------------   position

**The draft's steps are the verifier's first steps.**  Step k of a drafted position reads step k of the positions left
of it, which is what autoregressive decoding would have it read if the drafts are right; so nothing is computed twice.
A round costs lookahead x draft_steps + (r - draft_steps) passes.  The official code verifies from scratch and pays
lookahead x draft_steps + r; `reuse=False` does that, to compare.

**What is guaranteed.**  The tokens are those of autoregressive decoding at r steps with the same seed, greedy or
sampled: at temperature > 0 draft and verifier draw with the same noise at the same position (`minirec.noise`), so a
draft is right if it is the very token that autoregressive sampling would have drawn there, and the distribution is
exact with no rejection step (the official code compares drafts with the argmax, and so changes the distribution).
With `accept` below 1 a draft may differ from it, and the guarantee is gone: a draft also passes if its probability is
at least `accept` times that of the verifier's likeliest token.  A shared cache has one more catch, see `generate`.

Notebook: 08_lossless_wavefront, which compares it with the diagonal schedule.
"""

from __future__ import annotations

import torch

from minirec.config import flag, number, shown
from minirec.decoding import Generation, Grid, check_counts
from minirec.recurrent_block import RecurrentDepthLM


@torch.inference_mode()
def generate(
    model: RecurrentDepthLM,
    prompt,
    max_new_tokens: int,
    *,
    num_steps: int | None = None,
    draft_steps: int | None = None,
    lookahead: int = 4,
    accept: float = 1.0,
    reuse: bool = True,
    **options,
) -> Generation | list[Generation]:
    """Continue a prompt (list or 1-D tensor of ids), or a batch of prompts, draft by draft.

    num_steps: recurrence steps of every token that is returned (None: the config's mean_recurrence).  draft_steps, from
    1 to num_steps (None: 4, or num_steps if that is less), and lookahead, at least 1: depth and length of a draft.
    accept, above 0 and at most 1: see above.  reuse: go on from the draft's states.  options: those of
    `minirec.decoding.Options`; with kv="shared" a draft reads other steps of its past than the verifier would, so
    equality with autoregressive decoding needs kv="full".  Returns a Generation, or a list of them for a batch; each
    row accepts on its own and gets what it would get alone.  Raises ValueError for a bad argument, FloatingPointError
    for logits that are not finite.
    """
    r = model.config.depth(num_steps)
    max_new_tokens, lookahead, draft_steps = check_counts(
        max_new_tokens=max_new_tokens,
        lookahead=lookahead,
        draft_steps=min(r, 4) if draft_steps is None else draft_steps,
    )
    if draft_steps > r:
        raise ValueError(f"draft_steps is {shown(draft_steps)}; it must be from 1 to num_steps, here {r}")
    accept, reuse = number("accept", accept, above=0, most=1), flag("reuse", reuse)
    lookahead = min(lookahead, max_new_tokens)
    grid = Grid(model, prompt, max_new_tokens, r, spare=lookahead, **options)
    grid.prefill()
    while not all(grid.finished):
        starts = [grid.next_position(row) for row in range(len(grid.lengths))]
        width = min(lookahead, max(max_new_tokens - len(g.tokens) for g in grid.generations))
        embeddings, states = [], []
        for ahead in range(width):  # draft what follows each position, one after the other
            at = grid.window([start + ahead for start in starts], 1)
            e, s = grid.embed(at), at.read(grid.state)  # (B, 1, d) each
            for depth in range(draft_steps):
                s = grid.recur(s, e, at, depth)
            grid.place(at, grid.choose(grid.decode(s, at), at.positions))
            embeddings.append(e)
            states.append(s)
        at = grid.window(starts, width)
        e = torch.cat(embeddings, dim=1)  # (B, W, d)
        s = torch.cat(states, dim=1) if reuse else at.read(grid.state)  # (B, W, d)
        for depth in range(draft_steps if reuse else 0, r):  # verify: all drafted positions together
            s = grid.recur(s, e, at, depth)
        logits, drafts = grid.decode(s, at), at.read(grid.tokens[:, 1:])  # (B, W, V), (B, W)
        guesses = grid.choose(logits, at.positions)  # (B, W)
        right = drafts == guesses
        if accept < 1:
            p = logits.softmax(-1)  # (B, W, V)
            right |= p.gather(-1, drafts[..., None])[..., 0] >= accept * p.amax(-1)
        tokens = torch.where(right, drafts, guesses)
        grid.place(at, tokens)  # behind a wrong draft they are overwritten before anything reads them

        for row, (row_tokens, passed) in enumerate(torch.stack([tokens, right], dim=1).tolist()):
            if grid.finished[row]:
                continue
            kept = [*passed, 0].index(0) + 1  # the drafts before the first wrong one, and its correction
            for token in row_tokens[:kept]:
                if not grid.finished[row]:
                    grid.commit(row, token, r)
            grid.record(row, starts[row], [r] * width, row_tokens)
    return grid.results()
