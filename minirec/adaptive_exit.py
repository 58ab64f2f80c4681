"""Adaptive exit: autoregressive decoding in which every token stops looping once another step would change little.

      depth
        r |  * * *
          |  * * *       *        *  a cell that was run
          |  * * * *     * *      .  one that was not: the token's criterion had said that it has settled
          |  * * * * *   * * .
        1 |  * * * * * * * * * *
          +---------------------   position     (the prompt is run to depth r, unless exit_in_prefill)

After a recurrence step a criterion compares what there is now with what there was before: two states, or two outputs
of the coda, which costs a coda call a step.  Below the threshold, the token is taken from there.  `CRITERIA` lists
them with the thresholds of the official code (`generate_with_adaptive_compute`); the idea is in 2502.05171, section
6.1, with KL below 5e-4.  Exiting means that the host must know after every step whether to go on: one synchronisation
a step, never more, which no other sampler here needs.

**What a deeper token reads of a shallower one.**  With a cache per step, a token that loops deeper than one before it
asks for keys and values which that one never made.  It reads the last ones that were made ("latest": 2502.05171,
remark 6.1): a token that exits stands in for its own missing steps.

**A batch.**  All rows run until the last one exits.  A row that exited repeats its last step: the same input state at
the same depth gives the same state, keys and values, in any kind of cache, and nothing of it changes any more.  So a
row's tokens and depths are those it gets alone.  It waits, though: steps are saved only where all rows have exited.

**Where this differs from the official code** (seal-rg/recurrent-pretraining, 59e0b69; see tests/golden/QUIRKS.md).
Theirs lets a row that exited go on writing, and its later tokens read what it would not have had alone.  Theirs decodes
the last *checked* step if no check fires, ours the last step.  Theirs counts min_steps from 0, so that 3 means 4.  A
zero state has no direction, and their cosine is NaN there; ours is a change of 1.  A criterion that reads the coda
has nothing to compare its first output with and cannot exit there (their KL compares with the uniform distribution).
Tokens, steps and values are otherwise theirs (tests/test_adaptive_exit.py).

Notebook: 05_adaptive_exit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minirec.config import flag, number, one_of, shown, whole
from minirec.decoding import Generation, Grid, check_counts
from minirec.kv_cache import Window, upload
from minirec.recurrent_block import RecurrentDepthLM


def latent_diff(previous: Tensor, new: Tensor) -> Tensor:
    """How far a state moved, relative to its length: |new - previous| / |new|, (B, W, d) each -> (B, W)."""
    return torch.linalg.vector_norm(new - previous, dim=-1) / torch.linalg.vector_norm(new, dim=-1)


def cosine(previous: Tensor, new: Tensor) -> Tensor:
    """How far a state turned: 1 - cos of the angle between two, (B, W, d) each -> (B, W); 1 if one of them is zero."""
    return (1 - F.cosine_similarity(previous, new, dim=-1)).clamp(min=0)


def kl(previous: Tensor, new: Tensor) -> Tensor:
    """KL(previous || new) in nats of the distributions that logits (B, W, V) give -> (B, W)."""
    return _kl(previous.log_softmax(-1), new.log_softmax(-1))


def minp_kl(previous: Tensor, new: Tensor) -> Tensor:
    """The same, blind to what happens among unlikely tokens: (B, W, V) logits each -> (B, W).

    Tokens below a tenth of the likeliest one's probability count as 1 / V (as in the official code; with 0 the KL would
    be infinite whenever one more token gets that far), and all are scaled to sum to 1.
    """

    def filtered(logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        p = p.masked_fill(p < 0.1 * p.amax(-1, keepdim=True), 1 / p.shape[-1])
        return (p / p.sum(-1, keepdim=True)).log()

    return _kl(filtered(previous), filtered(new))


def entropy_diff(previous: Tensor, new: Tensor) -> Tensor:
    """How much the entropy of the distribution changed, in nats: logits (B, W, V) each -> (B, W)."""

    def entropy(logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    return (entropy(new) - entropy(previous)).abs()


def argmax_stability(previous: Tensor, new: Tensor) -> Tensor:
    """Has the likeliest token changed?  1 if so, else 0: logits (B, W, V) each -> (B, W)."""
    return (previous.argmax(-1) != new.argmax(-1)).float()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # rounding may take equal distributions below 0, and a threshold of 0 must never be met
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


# name: (the measure, what it compares, the official threshold).  A row exits at the first check that is below the
# threshold; where the threshold is a whole number, after as many checks in a row that saw no change.
CRITERIA = {
    "latent-diff": (latent_diff, "state", 0.03),
    "cosine": (cosine, "state", 1e-3),
    "kl": (kl, "logits", 1e-3),
    "minp-kl": (minp_kl, "logits", 1e-5),
    "entropy-diff": (entropy_diff, "logits", 1e-3),
    "argmax-stability": (argmax_stability, "logits", 5),
}


@torch.inference_mode()
def generate(
    model: RecurrentDepthLM,
    prompt,
    max_new_tokens: int,
    *,
    num_steps: int | None = None,
    criterion: str = "latent-diff",
    threshold: float | None = None,
    exit_in_prefill: bool = False,
    continuous_compute: bool = False,
    min_steps: int = 1,
    check_every: int = 1,
    **options,
) -> Generation | list[Generation]:
    """Continue a prompt (list or 1-D tensor of ids), or a batch of prompts, each token as deep as it needs.

    num_steps: the most steps a token runs (None: the config's mean_recurrence).  criterion: a name in `CRITERIA`.
    threshold: None for its default there; at least 0, where 0 never exits and gives autoregressive decoding; for
    argmax-stability a whole number of checks.  exit_in_prefill: the prompt may exit as well, as a whole: by the mean
    over its positions of a measure of states, by the output at its last position else.  continuous_compute: a token
    starts from the last state of the one before it (2502.05171, section 6.3), not from its own initial state.
    min_steps, check_every: check after step min_steps and every check_every steps from there, against what the check
    before has seen.  options: those of `minirec.decoding.Options`.  Returns a Generation, or a list of them for a
    batch, whose `passes` count what the whole batch ran; `decodes` count the coda calls of a criterion too.  Raises
    ValueError for a bad argument, FloatingPointError for logits that are not finite.
    """
    r = model.config.depth(num_steps)
    max_new_tokens, min_steps, check_every = check_counts(
        max_new_tokens=max_new_tokens, min_steps=min_steps, check_every=check_every
    )
    if min_steps > r:
        raise ValueError(f"min_steps is {shown(min_steps)}; it must be from 1 to num_steps, here {r}")
    default = CRITERIA[one_of("criterion", criterion, CRITERIA)][2]
    if threshold is None:
        threshold = default
    elif isinstance(default, int):
        threshold = whole("threshold", threshold, 1)
    else:
        threshold = number("threshold", threshold, least=0)
    exit_in_prefill = flag("exit_in_prefill", exit_in_prefill)
    continuous_compute = flag("continuous_compute", continuous_compute)
    grid = Grid(model, prompt, max_new_tokens, r, **options)
    rows, checks = range(len(grid.lengths)), range(min_steps, r, check_every)

    at = grid.window([0] * len(rows), max(grid.lengths))
    s, _, depths = _loop(grid, at, criterion, threshold, checks if exit_in_prefill else range(0), grid.lengths)
    grid.begin(s, at, depths)
    for row, (n, depth) in enumerate(zip(grid.lengths, depths, strict=True)):
        grid.cache.copy_deeper(row, 0, [depth] * n)
        if continuous_compute:
            grid.state[row, n] = grid.state[row, n - 1]
    while not all(grid.finished):
        starts = [grid.next_position(row) for row in rows]
        at = grid.window(starts, 1)
        s, logits, depths = _loop(grid, at, criterion, threshold, checks)
        tokens = grid.choose(grid.decode(s, at) if logits is None else logits, at.positions)  # (B, 1)
        grid.place(at, tokens)
        if continuous_compute:
            at.write(grid.state[:, 1:], s)
        for row, (token, depth) in enumerate(zip(tokens[:, 0].tolist(), depths, strict=True)):
            if not grid.finished[row]:
                grid.commit(row, token, depth)
                grid.cache.copy_deeper(row, starts[row], [depth])
                grid.record(row, starts[row], [depth], [token])
    return grid.results()


def _loop(
    grid: Grid, at: Window, criterion: str, threshold: float, checks: range, lengths: list[int] | None = None
) -> tuple[Tensor, Tensor | None, list[int]]:
    """Run a window until all rows have exited: its states (B, W, d), logits (B, 1, V), and the steps of each row.

    checks: the steps after which to ask the criterion; lengths: of the prompts, if the window holds those.  The logits
    are None if the criterion did not need them at the last step.
    """
    measure, reads, default = CRITERIA[criterion]
    limit, needed = (0.5, threshold) if isinstance(default, int) else (threshold, 1)
    e, s = grid.embed(at), at.read(grid.state)  # (B, W, d) each
    last: Tensor | None = None
    weights: Tensor | float = 1.0
    if lengths is not None:
        n = torch.tensor(lengths, device=s.device)[:, None]  # (B, 1)
        last = n[:, 0] - 1
        if reads == "state":
            weights = (at.positions < n).to(s) / n  # (B, T): the mean over a prompt's own positions, without padding
    previous = s if reads == "state" else None
    ran = [grid.num_steps] * len(grid.lengths)  # the steps of each row: the most, until it exits
    calm = [0] * len(ran)  # checks in a row that were below the limit
    before, exited = s, None
    for step in range(1, grid.num_steps + 1):
        before = s if exited is None else torch.where(exited, before, s)  # what goes into the step
        depths = step - 1 if exited is None else grid.depths([[min(step, n) - 1] * at.width for n in ran])
        s = grid.recur(before, e, at, depths)
        if step not in checks:
            continue
        new = s if reads == "state" else grid.decode(s, at, only=last)  # (B, W, d) or (B, 1, V)
        if previous is not None:
            change = measure(previous, new)  # (B, W) or (B, 1)
            change = change[:, 0] if lengths is None else (change * weights).sum(1)  # (B,)
            for row, moved in enumerate(change.tolist()):  # the one synchronisation of the step
                calm[row] = calm[row] + 1 if moved < limit else 0
                if calm[row] >= needed and not grid.finished[row]:
                    ran[row] = min(ran[row], step)
            if all(n <= step or done for n, done in zip(ran, grid.finished, strict=True)):
                return s, new if reads == "logits" else None, ran
            if min(ran) <= step:
                exited = upload([n <= step for n in ran], s.device)[:, None, None]  # (B, 1, 1)
        previous = new
    return s, None, ran
