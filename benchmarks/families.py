"""What decoding costs on a CPU at the shapes of published models, with random weights.

    python benchmarks/families.py [--threads 1 2] [--shapes parcae_140m raven_tinyllama_1_1b]

    a token            of autoregressive decoding at context 300, over the matrix products in it
    a step of a wave   one recurrence step over 4, 8 and 16 positions, each at its own depth, over one position's
    an outer step      of diffusion forcing's fixed schedule, which makes one token: r' = r / width steps of a full
                       wave, prelude, coda and choice, over one token of autoregressive decoding
    prefill            of 512 tokens
    memory             weights, their packed copy, keys and values per token

With packed weights (the default of decoding on a CPU) and without.  What is compared takes turns within a repetition;
given are medians over the repetitions.  The copy rate of the memory is printed beside: at one position a step cannot be
faster than its weights are read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from timing import in_words, machine, no_garbage_collection, table, write_json
from torch import Tensor, nn

from minirec import RecurrentDepthLM
from minirec.decoding import Grid, packed
from minirec.families import model_of
from minirec.families.parcae import Decay
from minirec.families.presets import FAMILIES, preset
from minirec.files.machine import readable
from minirec.kv_cache import bytes_per_token

CONTEXT, WIDTHS, PROMPT = 300, (1, 4, 8, 16), 512
STEPS = {"parcae_140m": 8, "raven_tinyllama_1_1b": 4}  # r, where it is not the preset's


def random_model(name: str) -> RecurrentDepthLM:
    """A model of a published shape; every matrix gets numbers, so that no product is with zeros."""
    model = model_of(preset(name)).requires_grad_(False).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(std=p.shape[-1] ** -0.5)
    return model


def matrices(model: RecurrentDepthLM, steps: int) -> list[Tensor]:
    """The weights of the matrix products of one token, in the order in which it meets them."""
    met: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: met.append(m.weight if isinstance(m, nn.Linear) else m.B))
             for m in model.modules() if isinstance(m, (nn.Linear, Decay))]  # fmt: skip
    model(torch.zeros((1, 1), dtype=torch.int64), num_steps=steps)
    for hook in hooks:
        hook.remove()
    return met


def products(weights: list[Tensor], pack: bool) -> Callable[[], None]:
    """All matrix products of one position, by the kernels that decoding uses."""
    inputs = {n: torch.randn(1, 1, n) for n in {w.shape[1] for w in weights}}
    linear, calls = torch.ops.mkldnn._linear_pointwise, []
    for w in weights:
        x, matrix = inputs[w.shape[1]], packed(w) if pack else None
        calls.append((F.linear, (x, w)) if matrix is None else (linear, (x, matrix, None, "none", [], "")))

    def run() -> None:
        for function, arguments in calls:
            function(*arguments)

    return run


def token(grid: Grid, position: int) -> Callable[[], None]:
    """One token of autoregressive decoding at a position."""

    def run() -> None:
        at = grid.window([position], 1)
        e, s = grid.embed(at), at.read(grid.state)
        for depth in range(grid.num_steps):
            s = grid.recur(s, e, at, depth)
        grid.place(at, grid.choose(grid.decode(s, at), at.positions))

    return run


def wave(grid: Grid, position: int, width: int, inner: int, outer: bool) -> Callable[[], None]:
    """A recurrence step of a full wave, `inner` steps from each position to the next, or its whole outer step."""
    at = grid.window([position], width)
    depth = grid.depths([[min((width - 1 - i) * inner, grid.num_steps - inner) for i in range(width)]])
    s, e = at.read(grid.state), grid.embed(at)

    def step() -> None:
        grid.recur(s, e, at, depth)

    def whole() -> None:
        e, now = grid.embed(at), s
        for inner_step in range(inner):
            now = grid.recur(now, e, at, depth + inner_step)
        grid.place(at, grid.choose(grid.decode(now, at), at.positions))

    return whole if outer else step


def seconds(runs: dict[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """The median time of each, in seconds; they take turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with no_garbage_collection(), torch.inference_mode():
        for repetition in range(repetitions + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if repetition:
                    times[name].append(time.perf_counter() - start)
    return {name: median(t) for name, t in times.items()}


def copy_rate(repetitions: int = 5) -> float:
    """Bytes per second of copying 256 MiB, read and written bytes counted."""
    a, b = torch.ones(2**26), torch.empty(2**26)
    best = min(seconds({"copy": lambda: b.copy_(a)}, repetitions).values())
    return 2 * a.nbytes / best


def measure(name: str, pack: bool, repetitions: int) -> dict:
    """All numbers of one shape."""
    model = random_model(name)
    r = STEPS.get(name, model.config.mean_recurrence)
    prompt = torch.randint(model.config.vocab_size, (CONTEXT,), generator=torch.Generator().manual_seed(7)).tolist()
    grid = Grid(model, prompt, 64, r, packed=pack)
    with torch.inference_mode():
        grid.prefill()
        inner = {width: max(1, r // width) for width in WIDTHS}
        runs = {"products": products(matrices(model, r), pack), "token": token(grid, CONTEXT)}
        runs |= {f"step {w}": wave(grid, CONTEXT, w, inner[w], outer=False) for w in WIDTHS}
        runs |= {f"outer {w}": wave(grid, CONTEXT, w, inner[w], outer=True) for w in WIDTHS[1:]}
        taken = seconds(runs, repetitions)
        long = Grid(model, (prompt * 2)[:PROMPT], 1, r, packed=pack)
        taken["prefill"] = seconds({"prefill": long.prefill}, 1)["prefill"]
    sizes = [p.numel() * 4 for p in model.parameters()]
    return {
        "shape": name, "packed": pack, "threads": torch.get_num_threads(), "r": r, "seconds": taken,
        "token over products": taken["token"] / taken["products"],
        "step over one": {w: taken[f"step {w}"] / taken["step 1"] for w in WIDTHS[1:]},
        "outer over token": {w: taken[f"outer {w}"] / taken["token"] for w in WIDTHS[1:]},
        "weights": sum(sizes), "packed copy": sum(p.numel() * 4 for p in model.parameters() if pack and packable(p)),
        "kv": bytes_per_token(model.config, r, dtype=torch.float32),
    }  # fmt: skip


def packable(p: Tensor) -> bool:
    return p.dim() == 2 and packed(p) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=FAMILIES, default=list(STEPS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", help="write the numbers to this file too")
    args = parser.parse_args()
    results, before = [], machine()
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"{in_words(before | {'threads': threads})} Copy rate {copy_rate() / 1e9:.1f} GB/s.\n")
        here = [measure(name, pack, args.repetitions) for name in args.shapes for pack in (False, True)]
        steps = [f"{what} of {w}" for what in ("step", "outer step") for w in WIDTHS[1:]]
        head = ["shape, r", "packed", "ms per token", "over products", *steps, "prefill 512", "weights + packed",
                "KV per token"]  # fmt: skip
        rows = [
            [f"{x['shape']}, {x['r']}", "yes" if x["packed"] else "no", f"{1e3 * x['seconds']['token']:.0f}",
             f"{x['token over products']:.2f}", *(f"{v:.2f}" for v in x["step over one"].values()),
             *(f"{v:.2f}" for v in x["outer over token"].values()), f"{x['seconds']['prefill']:.1f} s",
             f"{readable(x['weights'])} + {readable(x['packed copy'])}", readable(x["kv"])]
            for x in here
        ]  # fmt: skip
        print(table(head, rows), "\n")
        results += here
    if args.json:
        write_json(args.json, {"machine": before, "results": results})


if __name__ == "__main__":
    main()
