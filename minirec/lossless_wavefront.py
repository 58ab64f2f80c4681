"""The lossless wavefront: guess the next token early, go on, and take back what a wrong guess began.

Diffusion forcing lets a position start from a guess and corrects it while it runs; its output is nearly that of
autoregressive decoding.  Two changes make it exactly that (tests hold them together, token for token):

    keys and values per depth    step k of a position reads step k of those before it, as in autoregressive decoding
    a guess that changes         throws away everything to its right, which was computed from the old one

      depth
        r |  * * * A           one outer step: every position in flight runs `guess_after` steps at its own depth,
          |  * * * . B         all of them say again what follows, and then
          |  * * * . . C         - the first guess that differs from the token standing there ends the wave:
          |  * * * . . . D         that position starts again, with the new token, from its initial state
        1 |  * * * . . . .       - the leftmost position, once r deep, commits what it predicts
          +----------------      - the next position opens, when its left neighbour is guess_after deep
             position

When A is r deep, all its steps were run on tokens that are final, reading positions all of whose steps were run on
tokens that are final: it is the cell that autoregressive decoding computes, and induction over positions does the
rest.  Guesses that are right from the start cost guess_after passes a token instead of r.

**Sampling** is exact too, and needs no rejection step: the noise a token is drawn with is a function of (seed,
position) (`minirec.noise`), so a guess is what sampling at that depth draws with the very noise the final choice will
use.  It stands if the final distribution, under the same noise, draws the same token; what is committed is in any
case what autoregressive decoding draws.  Rejection sampling (the correction in LoopSpec and in speculative decoding at
large) accepts with probability 1 - TV, TV the total variation between guess and target; a shared Gumbel noise with at
least (1 - TV) / (1 + TV) (Daliri et al., arXiv 2408.07978), and it gives the same tokens for the same seed.

**What is known.**  WFD (arXiv 2609.23033) is this diagonal: width ceil(r / r_draft), a mismatch flushes what is behind.
LoopSpec (2609.17184) proposes from two depths, follows several branches and verifies in cascade; DAS-Wave (2609.34538)
uses the wave as a drafter for a separate full-depth verifier.  All three run one sequence.  Here a guess is compared
after every outer step, not only once verified, so a wrong one is taken back sooner; rows of a batch run waves of their
own widths; sampled output has the tokens of autoregressive sampling; and the prelude runs on the newest position
alone.  Nothing is trained, branched or verified twice.

Notebook: 08_lossless_wavefront.
"""

from __future__ import annotations

import torch

from minirec.config import shown, whole
from minirec.decoding import Generation, Grid, check_counts
from minirec.kv_cache import upload
from minirec.recurrent_block import RecurrentDepthLM


def next_wave(
    tokens: list[int], ran: list[int], guessed: list[int], r: int, guess_after: int, room: int
) -> tuple[list[int], list[int]]:
    """What a wave is after an outer step: the tokens its positions run on and their depths, left to right.

    tokens, ran, guessed: for each position the token it ran on, its depth now, and what it now says should follow it.
    A leftmost position that is r deep leaves.  room: the widest that the wave may become, at least 1.
    """
    # the first position that predicts another token than the one its right neighbour runs on
    pairs = enumerate(zip(guessed, tokens[1:], strict=False), 1)
    keep = next((i for i, (guess, token) in pairs if guess != token), len(tokens))
    done = int(ran[0] == r)
    tokens, depths = tokens[done:keep], ran[done:keep]
    if not depths or (depths[-1] >= guess_after and len(depths) < room):
        return [*tokens, guessed[keep - 1]], [*depths, 0]
    return tokens, depths


@torch.inference_mode()
def generate(
    model: RecurrentDepthLM,
    prompt,
    max_new_tokens: int,
    *,
    num_steps: int | None = None,
    guess_after: int | None = None,
    max_wavefront: int | None = None,
    **options,
) -> Generation | list[Generation]:
    """Continue a prompt (list or 1-D tensor of ids), or a batch of prompts: autoregressive tokens in fewer passes.

    num_steps: recurrence steps of every token (None: the config's mean_recurrence).  guess_after, from 1 to num_steps:
    the depth at which a position's guess is good enough to start the next one, and the length of an outer step (None:
    the checkpoint's, else 4, or num_steps if that is less).
    max_wavefront, at least 1: the most positions in flight (None: no limit; num_steps / guess_after suffice).
    options: those of `minirec.decoding.Options`.  With kv="shared" a position reads steps of its past that
    autoregressive decoding would not, so the guarantee needs kv="full".  Returns a Generation, or a list of them for a
    batch, each row's independent of the others.  Raises ValueError for a bad argument, FloatingPointError for logits
    that are not finite.
    """
    r = model.config.depth(num_steps)
    if guess_after is None:
        guess_after = min(r, model.generation_config.get("lossless_wavefront", {}).get("guess_after", 4))
    max_new_tokens, guess_after = check_counts(max_new_tokens=max_new_tokens, guess_after=guess_after)
    if guess_after > r:
        raise ValueError(f"guess_after is {shown(guess_after)}; it must be from 1 to num_steps, here {r}")
    widest = -(-r // guess_after) if max_wavefront is None else whole("max_wavefront", max_wavefront, 1)
    grid = Grid(model, prompt, max_new_tokens, r, spare=min(widest, max_new_tokens), **options)
    initial, embedding = grid.state.clone(), torch.zeros_like(grid.state)  # (B, L, d) each
    grid.prefill()
    last = [n + max_new_tokens - 2 for n in grid.lengths]  # the last position whose prediction can be asked for
    rows = range(len(grid.lengths))
    tokens = [[g.tokens[0]] for g in grid.generations]  # of each row's wave, left to right
    depths = [[0] for _ in rows]  # and the steps that each position has run on its token
    while not all(grid.finished):
        starts, widths = [grid.next_position(row) for row in rows], [len(cells) for cells in depths]
        if min(cells[-1] for cells in depths) == 0:  # the others have their embedding
            newest = grid.window([start + width - 1 for start, width in zip(starts, widths, strict=True)], 1)
            newest.write(embedding, grid.embed(newest))
            new = upload([[[cells[-1] == 0]] for cells in depths], model.device)  # (B, 1, 1)
            newest.write(grid.state, torch.where(new, newest.read(initial), newest.read(grid.state)))

        at = grid.window(starts, max(widths))
        # nobody may run past r, so the last outer step of a position is shorter if guess_after does not divide r
        inner = min([guess_after, *(r - depths[row][0] for row in rows if not grid.finished[row])])
        depth = grid.depths(depths)
        e, s = at.read(embedding), at.read(grid.state)  # (B, W, d) each
        for inner_step in range(inner):
            s = grid.recur(s, e, at, depth + inner_step)
        guesses = grid.choose(grid.decode(s, at), at.positions)  # (B, W): the token after each position
        # a narrower row's cells beyond its width are overwritten before anything reads them
        at.write(grid.state, s)
        grid.place(at, guesses)

        for row, guessed in enumerate(guesses.tolist()):  # the one synchronisation of the outer step
            if grid.finished[row]:
                continue
            guessed, ran = guessed[: widths[row]], [d + inner for d in depths[row]]
            if ran[0] == r:
                grid.commit(row, guessed[0], r)
            grid.record(row, starts[row], ran, guessed)
            room = min(widest, last[row] + 1 - grid.next_position(row))
            tokens[row], depths[row] = next_wave(tokens[row], ran, guessed, r, guess_after, room)
    return grid.results()
