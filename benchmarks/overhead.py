"""How much time decoding takes beside its matrix products: the cost of the machinery, on random weights.

    python benchmarks/overhead.py

At batch 1 on a CPU the matrix products of a token are the work that no code can avoid; everything else (norms,
rotary positions, cache, Python) can be small or large.  So every time is given as a multiple of `F.linear` alone on
the same weights, in the order in which a token meets them.  What is measured:

    a token of autoregressive decoding         with own keys and values per step (kv="full"), prompt 32
    an outer step of diffusion forcing         at 8 and at 16 positions: fixed schedule, r' = 4 of r = 32 and 64
    the same token late in a long context      at position 400 against position 40
    where the time goes                        by function, with a clock around each

The clock sits in `on_token`: from one final token to the next is exactly one step, the prefill left out.  The matrix
products run in the same callback, so the two take turns and share the machine's ups and downs; they run twice and
the second time counts, since the first finds other things in the processor's cache and takes up to a tenth longer.
Ratios are taken within a repetition; the tables have their median and quartiles over the repetitions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from timing import in_words, machine, no_garbage_collection, spread, table, with_quartiles, write_json
from torch import Tensor

from minirec import RecurrentConfig, RecurrentDepthLM, autoregressive, decoding, diffusion_forcing, recurrent_block
from minirec.decoding import Grid
from minirec.kv_cache import Window, bytes_per_token

PROMPT, INNER_STEPS, WAVES, POSITIONS = 32, 4, (8, 16), (40, 400)
# every run is as long as asked for, starts from zeros, and multiplies as `F.linear` does, to which it is compared
COMMON = dict(stop_tokens=(), init_scale=0.0, packed=False)
# The official code (seal-rg/recurrent-pretraining, 59e0b69) at the shape "small", on an Intel Xeon with 2 virtual
# cores, torch 2.13, 1 thread: the same ratios, taken over whole generations for diffusion forcing.
OFFICIAL = {"token": "5.4", "step 8": "4.4", "step 16": "3.7", "growth": "2.2 to 3.2"}
GOAL = {"ratio": 2.0, "growth": 1.3}
PARTS = {  # what the profile tells apart: name -> where the function is looked up
    "matrix products": (F, "linear"),
    "norms": (decoding, "quick_norm"),  # which makes the function that is meant
    "rotary positions": (recurrent_block, "rotate"),
    "attention": (F, "scaled_dot_product_attention"),
    "cache reads and writes": (Window, "attend"),  # without the attention in it
    "activation": (F, "silu"),
    "token choice": (Grid, "choose"),
}
REST = "rest: residuals, views, sampler, Python"


def matrix_products(model: RecurrentDepthLM, steps: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Input (1, rows, n) and weight (m, n) of every matrix product of `rows` positions, in order, `steps` deep."""
    parts = model.transformer

    def of(blocks) -> list[Tensor]:
        return [x.weight for b in blocks for x in (b.attn.Wqkv, b.attn.proj, b.mlp.fc, b.mlp.proj)]

    core = [parts.adapter.weight, *of(parts.core_block)]
    weights = [*of(parts.prelude), *steps * core, *of(parts.coda), model.lm_head.weight]
    inputs = {n: torch.randn(1, rows, n) for n in {w.shape[1] for w in weights}}
    return [(inputs[w.shape[1]], w) for w in weights]


def time_steps(generate: Callable, products: list[tuple[Tensor, Tensor]], steady: slice) -> tuple[float, float]:
    """Median seconds of a step and of its matrix products, taking turns.

    generate: a sampler that takes `on_token`; steady: which of the gaps between final tokens are the steps meant.
    """
    entered, warm, left = [], [], []

    def on_token(token: int) -> None:
        for moments in (entered, warm):
            moments.append(time.perf_counter())
            for x, weight in products:
                F.linear(x, weight)
        left.append(time.perf_counter())

    with no_garbage_collection():
        generate(on_token=on_token)
    steps = [b - a for a, b in zip(left, entered[1:], strict=False)]
    alone = [b - a for a, b in zip(warm, left, strict=True)]
    return median(steps[steady]), median(alone)


def profile(generate: Callable, steady: slice) -> list[dict[str, float]]:
    """Milliseconds by part, of every steady step, with a clock around each function of PARTS."""
    spent = dict.fromkeys(PARTS, 0.0)
    readings: list[dict[str, float]] = []  # all clocks, whenever a token becomes final

    def clocked(part: str, function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[part] += time.perf_counter() - start
            return result

        return wrapper

    with ExitStack() as stack, no_garbage_collection():
        for part, (owner, name) in PARTS.items():
            function = getattr(owner, name)
            replacement = clocked(part, function)
            if name == "quick_norm":
                replacement = lambda *args, make=function, part=part: clocked(part, make(*args))  # noqa: E731
            stack.enter_context(patch.object(owner, name, replacement))
        generate(on_token=lambda token: readings.append({**spent, "whole": time.perf_counter()}))
    steps = []
    for before, after in pairwise(readings):
        ms = {part: 1e3 * (after[part] - before[part]) for part in before}
        ms["cache reads and writes"] -= ms["attention"]
        ms[REST] = ms["whole"] - sum(ms[part] for part in PARTS)
        steps.append(ms)
    return steps[steady]


def typical(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean of the middle half of the steps: robust like a median, and the parts still add up to the whole."""
    steps = sorted(steps, key=lambda ms: ms["whole"])
    middle = steps[len(steps) // 4 : len(steps) - len(steps) // 4]
    return {part: sum(ms[part] for ms in middle) / len(middle) for part in middle[0]}


def diffusion_run(model: RecurrentDepthLM, prompt: list[int], tokens: int, wave: int) -> tuple[Callable, slice]:
    """A generation whose wave holds `wave` positions, and which of its steps do: all but the ramps at both ends.

    On the fixed schedule each outer step runs r' steps, opens one position and freezes one that has had r.
    """
    generate = partial(
        diffusion_forcing.generate, model, prompt, tokens,
        num_steps=INNER_STEPS * wave, inner_steps=INNER_STEPS, schedule="fixed", **COMMON,
    )  # fmt: skip
    full = sum(len(step.depths) == wave for step in generate(trace=True).trace)
    # the first of them ends the ramp: the gap before its token is the whole ramp, so it is left out
    if full != tokens - wave:
        raise RuntimeError(f"{full} outer steps had {wave} positions, not {tokens - wave}: the clock would be wrong")
    return generate, slice(1, tokens - wave)


def runs(model: RecurrentDepthLM, tokens: int) -> dict[str, tuple[Callable, list, slice]]:
    """Name -> a generation, the matrix products of one of its steps, and which of its steps are meant."""
    config, r = model.config, model.config.mean_recurrence
    draw = torch.Generator().manual_seed(7)
    text = torch.randint(config.vocab_size, (config.block_size,), generator=draw).tolist()
    one, every = matrix_products(model, r, rows=1), slice(0, None)
    found = {"token": (partial(autoregressive.generate, model, text[:PROMPT], tokens, **COMMON), one, every)}
    for wave in WAVES:
        generate, steady = diffusion_run(model, text[:PROMPT], tokens, wave)
        found[f"step {wave}"] = (generate, matrix_products(model, INNER_STEPS, rows=wave), steady)
    around = 8  # a position is timed as the middle of sixteen
    for kv in ("full", "shared"):
        for position in POSITIONS:
            prompt = text[: position - around]
            generate = partial(autoregressive.generate, model, prompt, 2 * around + 1, kv=kv, **COMMON)
            found[f"{kv} {position}"] = (generate, one, every)
    return found


def measure(model: RecurrentDepthLM, tokens: int, repeat: int) -> dict:
    """All measurements, `repeat` times in turn: {"steps": ..., "growth": ..., "profile": ..., "weights_mb": ...}."""
    config, r = model.config, model.config.mean_recurrence
    what = runs(model, tokens)
    times = {name: [] for name in what}
    profiles = {name: [] for name in ("token", "step 8")}
    time_steps(*what["token"])  # warm-up
    for _ in range(repeat):
        for name in what:
            times[name].append(time_steps(*what[name]))
        for name, kept in profiles.items():
            generate, _, steady = what[name]
            kept += profile(generate, steady)

    results = {"steps": {}, "growth": {}, "profile": {}}
    for name in ("token", *(f"step {wave}" for wave in WAVES)):
        results["steps"][name] = {
            "ms": spread(1e3 * step for step, _ in times[name]),
            "products_ms": spread(1e3 * alone for _, alone in times[name]),
            "ratio": spread(step / alone for step, alone in times[name]),
            "official": OFFICIAL[name],
        }
    for kv in ("full", "shared"):
        early, late = (times[f"{kv} {position}"] for position in POSITIONS)
        kept = bytes_per_token(config, r, kv, dtype=model.dtype)
        read = bytes_per_token(config, r, "full", dtype=model.dtype)  # every layer call reads its slot again
        results["growth"][kv] = {
            "ms": [spread(1e3 * step for step, _ in run) for run in (early, late)],
            "growth": spread(b[0] / a[0] for a, b in zip(early, late, strict=True)),
            "kv_mb_read": [read * position / 1e6 for position in POSITIONS],
            "kv_mb_distinct": [kept * position / 1e6 for position in POSITIONS],
            "official": OFFICIAL["growth"],
        }
    for name, kept in profiles.items():
        results["profile"][name] = typical(kept)
    results["weights_mb"] = sum(weight.nbytes for _, weight in what["token"][1]) / 1e6
    return results


def report(results: dict) -> str:
    """The tables."""
    names = {"token": 'autoregressive token, kv="full"'}
    names |= {f"step {w}": f"diffusion forcing, outer step at {w} positions" for w in WAVES}
    steps = [
        [
            names[name],
            with_quartiles(row["ms"]),
            with_quartiles(row["products_ms"]),
            with_quartiles(row["ratio"]),
            f"at most {GOAL['ratio']}",
            row["official"],
        ]
        for name, row in results["steps"].items()
    ]
    growth = [
        [
            kv,
            *(with_quartiles(ms) for ms in row["ms"]),
            with_quartiles(row["growth"]),
            *("{:.1f} / {:.1f}".format(*row[key]) for key in ("kv_mb_read", "kv_mb_distinct")),
            f"at most {GOAL['growth']}",
            row["official"] if kv == "full" else "-",
        ]
        for kv, row in results["growth"].items()
    ]
    profiles = results["profile"]
    shares = [
        [part, *(f"{100 * p[part] / p['whole']:.1f} % ({p[part]:.2f} ms)" for p in profiles.values())]
        for part in [*PARTS, REST, "whole"]
    ]
    early, late = POSITIONS
    traffic = results["weights_mb"] / results["steps"]["token"]["products_ms"]["median"]
    return f"""\
### Time against the matrix products alone

{table(["what", "ms", "matrix products, ms", "ratio", "goal", "official code"], steps)}

A token's matrix products read {results["weights_mb"]:.0f} MB of weights, here at {traffic:.0f} GB/s.

### Growth with the context: a token at position {late} against one at {early}

{
        table(
            [
                "kv",
                f"ms at {early}",
                f"ms at {late}",
                "growth",
                f"KV read per token, MB at {early} / {late}",
                "of it distinct, MB",
                "goal",
                "official code",
            ],
            growth,
        )
    }

What is distinct has to come from memory; what is read again may still be in the processor's cache.

### Where the time goes

{table(["part", *(names[name] for name in profiles)], shares)}

The clocks themselves take part of it, most of all in the many small parts: compare "whole" with the first table.
In their place the matrix products can take longer than alone: what runs between them, and beside them on the machine,
pushes weights out of the processor's caches.

Official code: seal-rg/recurrent-pretraining, 59e0b69, measured at the shape "small" on an Intel Xeon with 2 virtual
cores, torch 2.13, 1 thread; another machine, so compare ratios, not times."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time of decoding against its matrix products, on random weights.")
    parser.add_argument("--preset", default="small", help="shape of the model (default: small)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a generation (default: 128)")
    parser.add_argument("--repeat", type=int, default=7, help="repetitions of every measurement (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args(argv)
    if args.tokens < (least := max(WAVES) + 2):
        parser.error(f"--tokens is {args.tokens}; it must be at least {least}, or no wave is ever full")
    if args.repeat < 1:
        parser.error(f"--repeat is {args.repeat}; it must be at least 1")
    torch.set_num_threads(args.threads)
    before = machine()
    torch.manual_seed(7)
    model = RecurrentDepthLM(RecurrentConfig.preset(args.preset)).eval()
    setting = (
        f'Model: preset "{args.preset}", random weights, r = {model.config.mean_recurrence}, float32, batch 1, greedy; '
        f"prompt {PROMPT}, {args.tokens} new tokens; repeated {args.repeat} times; median (quartiles)."
    )
    print(f"{in_words(before)}\n{setting}\n", flush=True)
    results = measure(model, args.tokens, args.repeat)
    print(report(results))
    if args.json:
        write_json(args.json, {"machine": before, "arguments": vars(args), **results})


if __name__ == "__main__":
    main()
