"""How near to the limit of the hardware decoding comes: every sampler against the time that its memory traffic takes.

    python benchmarks/full_scale.py [--checkpoint FOLDER] [--json FILE]

At a small batch a large model decodes as fast as it can read its weights, keys and values.  So each row has a floor,
the bytes that its passes have to read over the copy bandwidth that was measured just before, and the table says which
share of the measured time that floor is.  Weights are random (or those of --checkpoint, see `minirec
make-checkpoint`), which changes no byte and no time; but it does change what an adaptive rule would do.  Therefore:

    autoregressive        at r = 32 and 64, one slot of keys and values per layer
    diffusion forcing     fixed schedule, r' = 2 and 4, with waves of 8 to 128 positions: every position runs
                          r = r' x wave steps, so an outer step has that many positions and freezes one.  At wave
                          32 / r' it is r = 32.  The adaptive schedule needs real weights.
    lossless wavefront    r = 32, guess after 4, guesses that are right at a set rate: the tokens are scripted, and a
                          wrong guess is found out at full depth only, the worst case
    batching by depth     the engine with exits replayed from a stated distribution, against batching by sequence

The clock runs while waves are full, from one final token to a later one; everything before has filled the wave,
captured the graphs and warmed up.  The rows take turns, and ratios are formed within a turn.

Without a GPU a small shape runs on the CPU: the same code, and figures that say nothing about the full scale.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from batching import Replay
from timing import in_words, machine, no_garbage_collection, spread, table, with_quartiles, write_json
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from minirec import RecurrentConfig, RecurrentDepthLM, autoregressive, diffusion_forcing, lossless_wavefront
from minirec.continuous_batching import Engine, Stage
from minirec.decoding import Grid
from minirec.kv_cache import Diagonal, Window

GUESS_AFTER, RATES = 4, (0.9, 0.94, 1.0)
CELLS = 1024  # more in a pass are bound by arithmetic, not by memory
BACKENDS = {b.name.lower(): b for b in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION,
                                        SDPBackend.CUDNN_ATTENTION)}  # fmt: skip
SKIP = 8  # tokens before the clock runs
EXITS = (4, 24)  # replayed depths are drawn evenly from here to there, for r = 32
NO_GPU = (
    "**No GPU was there.** This is the small shape on the CPU, to show that the code runs: no figure of it says "
    "anything about the 3.5B model or about a GPU."
)


@dataclass
class Row:
    """One line of the table: a sampler, its settings, and how many tokens its wave needs to drain."""

    name: str
    generate: Callable
    options: dict
    batch: int
    wave: int = 1
    rate: float | None = None  # of right guesses, if they are scripted
    prompt: int | None = None  # tokens, where it is not the default


class Clock:
    """`on_token` of a run: the clock runs from every row's SKIP-th token to the outer step that ends the first row."""

    def __init__(self, batch: int, tokens: int):
        self.counts, self.tokens, self.timed, self.last = [0] * batch, tokens, 0, 0
        self.start = self.end = 0.0
        self.over = False
        self.moved: dict[str, float] = {}

    def __call__(self, token: int, row: int = 0) -> bool:
        now = time.perf_counter()
        # rows have their turns from the first to the last: a lower one begins another outer step
        self.over |= max(self.counts) == self.tokens and row <= self.last
        self.counts[row], self.last = self.counts[row] + 1, row
        if self.running:
            self.timed, self.end = self.timed + 1, now
        elif min(self.counts) >= SKIP and not self.over:
            self.start = now
        return self.counts[row] < self.tokens and not self.over

    @property
    def running(self) -> bool:
        return self.start > 0 and not self.over


def weight_bytes(model: RecurrentDepthLM) -> dict[str, int]:
    """Bytes of weights that a call of each part reads, whatever the window."""
    parts = model.transformer

    def of(*modules) -> int:
        return sum(p.nbytes for module in modules for p in module.parameters())

    return {
        "embed": of(parts.prelude),
        "recur": of(parts.adapter, parts.core_block),
        "decode": of(parts.coda, parts.ln_f) + model.lm_head.weight.nbytes,
    }


def counting(model: RecurrentDepthLM, clock: Clock) -> ExitStack:
    """While it is open, every call of a part adds the bytes it has to read to clock.moved, while that clock runs.

    Keys and values: what one layer call reads is the stored part of every row once, if all cells share a slot, and
    once for each cell if they don't.  What is read twice within a call counts once.
    """
    config, weights = model.config, weight_bytes(model)
    layers = {"embed": config.n_layers_in_prelude, "recur": config.n_layers_in_recurrent_block,
              "decode": config.n_layers_in_coda}  # fmt: skip
    position = 2 * config.n_embd * model.dtype.itemsize  # bytes of keys and values

    def counted(part: str, work: Callable) -> Callable:
        def call(grid: Grid, *inputs, **named):
            result = work(grid, *inputs, **named)
            if clock.running:
                at = next(x for x in inputs if isinstance(x, Window))
                ends = (at.positions + 1).expand(len(result), -1)  # (B, W)
                shared = part != "recur" or isinstance(grid.cache.slot(inputs[3]), int)
                kv = layers[part] * position * (ends[:, -1] if shared else ends).sum().item()
                for name, amount in (("bytes", weights[part] + kv), (part, 1)):
                    clock.moved[name] = clock.moved.get(name, 0) + amount
            return result

        return call

    stack = ExitStack()
    for part in weights:
        stack.enter_context(patch.object(Grid, part, counted(part, getattr(Grid, part))))
    return stack


class Scripted(Grid):
    """A grid whose tokens are scripted: a guess from less than full depth is right at positions drawn at `rate`."""

    rate: float = 1.0

    def recur(self, s: Tensor, e: Tensor, at: Window, depth) -> Tensor:
        self.reached = depth + 1
        return super().recur(s, e, at, depth)

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        chosen = super().choose(logits, positions)  # what it costs belongs to the measurement
        if not hasattr(self, "right"):
            draw = torch.Generator().manual_seed(0)
            right = torch.rand(self.tokens.T.shape, generator=draw) < self.rate  # (L, B): the same for any L
            self.right = right.T.to(chosen.device)  # (B, L)
        positions = positions.expand_as(chosen)
        depth = self.reached
        if isinstance(depth, Diagonal):
            depth = torch.tensor([depth.cells], device=chosen.device)
        final = torch.as_tensor(depth, device=chosen.device) == self.num_steps
        return (positions + 1) % 2 + 2 * ~(final | self.right.gather(1, positions))  # 0 or 1; a wrong guess: 2 or 3


def rows_of(context: int, batches: list[int], waves: list[int], steady: int) -> list[Row]:
    """What is measured.  Of diffusion forcing, what has at most CELLS cells in a pass."""
    ar, df = autoregressive.generate, diffusion_forcing.generate
    shared = dict(kv="shared", init_scale=0.0)
    rows = []
    for b in batches:
        rows += [Row(f"autoregressive, r = {r}", ar, {"num_steps": r, **shared}, b) for r in (32, 64)]
        rows += [
            Row(f"diffusion forcing, r' = {inner}, wave {wave}", df,
                {"num_steps": inner * wave, "inner_steps": inner, "schedule": "fixed", **shared}, b, wave)
            for inner in (2, 4) for wave in waves if b * wave <= CELLS
        ]  # fmt: skip
        if b == 1:
            rows.append(Row('autoregressive, r = 32, kv="full"', ar, {"num_steps": 32, "init_scale": 0.0}, b))
        if b <= 8:
            rows += [
                Row(f"lossless wavefront, {rate:.0%} right", lossless_wavefront.generate,
                    {"num_steps": 32, "guess_after": GUESS_AFTER, "init_scale": 0.0}, b, 32 // GUESS_AFTER, rate)
                for rate in RATES
            ]  # fmt: skip
    rows.append(Row(f"autoregressive, r = 32, up to {context} tokens", ar, {"num_steps": 32, **shared}, 1,
                    prompt=context - SKIP - steady))  # fmt: skip
    return rows


def run(model: RecurrentDepthLM, row: Row, prompt: int, steady: int, fast: bool, count: bool = False) -> Clock:
    """Decode until every row of the batch has had SKIP + steady tokens; a wave is full all along."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (row.batch, row.prompt or prompt), generator=draw).tolist()
    clock = Clock(row.batch, SKIP + steady)
    with ExitStack() as stack:
        if row.rate is not None:
            scripted = type("Scripted", (Scripted,), {"rate": row.rate})
            stack.enter_context(patch.object(lossless_wavefront, "Grid", scripted))
        if count:
            stack.enter_context(counting(model, clock))
        else:
            stack.enter_context(no_garbage_collection())
        row.generate(model, ids if row.batch > 1 else ids[0], SKIP + steady + row.wave - 1, stop_tokens=(),
                     on_token=clock, fast=fast, **row.options)  # fmt: skip
    return clock


def copy_bandwidth(device: torch.device, size: int, repeat: int = 20) -> dict:
    """Bytes read and written a second by a copy of `size` bytes."""
    a, b = (torch.ones(size // 4, device=device) for _ in range(2))
    found = []
    for _ in range(repeat + 3):
        wait(device)
        start = time.perf_counter()
        b.copy_(a)
        wait(device)
        found.append(2 * size / (time.perf_counter() - start))
    return spread(found[3:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def attention_times(model: RecurrentDepthLM, context: int, widths: list[int]) -> list[dict]:
    """Microseconds of one attention call over `context` stored positions, with each backend of PyTorch."""
    config, device, found = model.config, model.device, []
    shape = (1, config.n_heads, context, config.head_dim)
    keys, values = torch.randn(2, *shape, device=device).to(model.dtype)
    for width in widths:
        q = torch.randn(1, config.n_heads, width, config.head_dim, device=device).to(model.dtype)
        mask = torch.zeros(1, 1, width, context, device=device, dtype=model.dtype)
        for name, backend in BACKENDS.items():
            times = []
            try:
                with sdpa_kernel(backend), torch.inference_mode():
                    for _ in range(5):
                        wait(device)
                        start = time.perf_counter()
                        for _ in range(20):
                            F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
                        wait(device)
                        times.append(1e6 * (time.perf_counter() - start) / 20)
            except RuntimeError:  # this backend does not take this shape, a mask, or this device
                pass
            found.append({"width": width, "backend": name, "us": spread(times) if times else None})
    return found


def batching(model: RecurrentDepthLM, slots: list[int], prompt: int, new: int, repeat: int) -> list[dict]:
    """Batching by depth against by sequence, in turns, each token leaving the loop at a depth drawn from EXITS."""
    found = []
    for n in slots:
        rng = random.Random(n)
        prompts = [[rng.randrange(model.config.vocab_size) for _ in range(prompt)] for _ in range(2 * n)]
        depths = [[rng.randint(*EXITS) for _ in range(new)] for _ in prompts]
        speeds: dict[str, list[float]] = {"sequence": [], "depth": []}
        passes: dict[str, float] = {}
        for _ in range(repeat + 1):
            for mode, speed in speeds.items():
                engine = Replay(model, n, prompt + new, mode, num_steps=32, kv="shared", init_scale=0.0,
                                coda_batch=max(1, n // 4))  # fmt: skip
                engine.depths = depths
                for ids in prompts:
                    engine.submit(ids, new, stop_tokens=())
                with no_garbage_collection():
                    wait(model.device)
                    start = time.perf_counter()
                    engine.run()
                    wait(model.device)
                    speed.append(len(prompts) * new / (time.perf_counter() - start))
                passes[mode] = passes_per_token(engine)
        for mode, speed in speeds.items():
            over = (a / b for a, b in zip(speed[1:], speeds["sequence"][1:], strict=True))  # the first was a warm-up
            found.append({"slots": n, "mode": mode, "tokens_per_second": spread(speed[1:]),
                          "recurrent_passes_per_token": passes[mode], "over_sequence": spread(over)})  # fmt: skip
    return found


def passes_per_token(engine: Engine) -> float:
    return engine.passes[Stage.RECUR] / sum(len(r.generation.tokens) for r in engine.requests.values())


def measure(model: RecurrentDepthLM, rows: list[Row], prompt: int, steady: int, repeat: int, fast: bool) -> list[dict]:
    """Every row: once to count what it moves, then `repeat` times with the clock, all in turns."""
    counted, timed, peak = [], [[] for _ in rows], [0] * len(rows)
    for row in tqdm(rows, disable=None, desc="counting"):
        counted.append(run(model, row, prompt, steady, fast, count=True))
    bandwidth = []
    for _ in tqdm(range(repeat), disable=None, desc="repeats"):
        bandwidth.append(copy_bandwidth(model.device, 2**30 if model.device.type == "cuda" else 2**26)["median"])
        for i, row in enumerate(rows):
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            clock = run(model, row, prompt, steady, fast)
            timed[i].append(clock.timed / (clock.end - clock.start))
            if model.device.type == "cuda":
                peak[i] = max(peak[i], torch.cuda.max_memory_allocated())
    results = []
    for row, count, speeds, memory in zip(rows, counted, timed, peak, strict=True):
        per_token = {name: amount / count.timed for name, amount in count.moved.items()}
        same = next(i for i, r in enumerate(rows) if r.batch == row.batch and r.name == "autoregressive, r = 32")
        results.append({
            "name": row.name, "batch": row.batch, "bytes_per_token": per_token["bytes"],
            "passes_per_token": per_token["recur"], "decodes_per_token": per_token["decode"],
            "tokens_per_second": spread(speeds), "passes_per_second": spread(s * per_token["recur"] for s in speeds),
            "floor_over_time": spread(s * per_token["bytes"] / b for s, b in zip(speeds, bandwidth, strict=True)),
            "over_autoregressive": spread(s / a for s, a in zip(speeds, timed[same], strict=True)),
            "peak_memory": memory or None,
        })  # fmt: skip
    return [{"copy_bandwidth": spread(bandwidth)}, *results]


def report(found: dict) -> str:
    """The tables."""
    bandwidth, *rows = found["rows"]
    cells = [
        [row["name"], str(row["batch"]), with_quartiles(row["tokens_per_second"], 1),
         with_quartiles(row["over_autoregressive"]), with_quartiles(row["passes_per_second"], 0),
         f"{row['passes_per_token']:.2f}", f"{row['bytes_per_token'] / 1e9:.3g}",
         f"{row['floor_over_time']['median']:.0%}",
         f"{row['peak_memory'] / 1e9:.1f}" if row["peak_memory"] else "-"]
        for row in rows
    ]  # fmt: skip
    attention = [[str(row["width"]), row["backend"], with_quartiles(row["us"], 1) if row["us"] else "not for this"]
                 for row in found["attention"]]  # fmt: skip
    engine = [
        [str(row["slots"]), row["mode"], with_quartiles(row["tokens_per_second"], 1),
         with_quartiles(row["over_sequence"]), f"{row['recurrent_passes_per_token']:.2f}"]
        for row in found["batching"]
    ]  # fmt: skip
    weights = found["weight_bytes"]
    goals = [[name, goal, reached] for name, goal, reached in against_goals(rows) if reached]
    return "\n\n".join([
        f"Copy bandwidth: {bandwidth['copy_bandwidth']['median'] / 1e9:.1f} GB/s, read and written. A recurrence step "
        f"reads {weights['recur'] / 1e9:.3g} GB of weights, a prelude {weights['embed'] / 1e9:.3g}, coda and head "
        f"{weights['decode'] / 1e9:.3g}.",
        table(["sampler", "batch", "tokens/s", "over r = 32", "passes/s", "passes/token", "GB/token", "floor / time",
               "peak memory, GB"], cells),
        "Over r = 32: tokens/s over those of autoregressive decoding at r = 32 in the same batch and the same turn; "
        "median and quartiles. Floor: the bytes that must be read over the copy bandwidth; it can be above the time "
        "taken where part of them stays in a cache of the processor.",
        *([table(["what", "goal", "here"], goals)] if goals else []),
        "One attention call, microseconds:",
        table(["positions at once", "backend", "us"], attention),
        f"Batching with replayed exits, depths drawn evenly from {EXITS[0]} to {EXITS[1]}, two requests a slot. The "
        "engine has no graphs: on a GPU its time is mostly that of Python.",
        table(["slots", "mode", "tokens/s", "over sequence", "recurrent passes/token"], engine),
    ])  # fmt: skip


def against_goals(rows: list[dict]) -> list[tuple[str, str, str]]:
    """The three goals for the 3.5B shape on one GPU: what, how much, and what was reached, "" without a GPU."""
    named = {row["name"]: row for row in rows if row["batch"] == 1 and row["peak_memory"]}
    long = next((row for name, row in named.items() if "up to" in name), None)
    ar, df = named.get("autoregressive, r = 32"), named.get("diffusion forcing, r' = 4, wave 8")
    return [
        ("autoregressive, r = 32: floor / time", "at least 80 %",
         f"{ar['floor_over_time']['median']:.0%}" if ar else ""),
        ("diffusion forcing, r' = 4, r = 32: over autoregressive", "at least 4.5",
         with_quartiles(df["over_autoregressive"]) if df else ""),
        (f"peak memory, {long['name'].split(', ')[-1] if long else ''}", "under 16 GB",
         f"{long['peak_memory'] / 1e9:.1f} GB" if long else ""),
    ]  # fmt: skip


def build(preset: str, device: torch.device, dtype: torch.dtype) -> RecurrentDepthLM:
    """A model with random weights, made on its device."""
    with torch.device("meta"):
        model = RecurrentDepthLM(RecurrentConfig.preset(preset))
    model.to_empty(device=device)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    torch.manual_seed(0)
    model.reset_parameters()
    return model.to(dtype).requires_grad_(False).eval()


def commit() -> str:
    """Of the repository that this file lies in, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decoding at full scale against the memory bandwidth.")
    gpu = torch.cuda.is_available()
    parser.add_argument("--checkpoint", help="a folder or hub id (default: random weights of --preset)")
    parser.add_argument("--preset", default="huginn_3_5b" if gpu else "small", help="shape (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="default: %(default)s")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32] if gpu else [1], metavar="B")
    parser.add_argument("--waves", type=int, nargs="*", default=[8, 16, 32, 64, 128] if gpu else [8, 16], metavar="W",
                        help="of diffusion forcing (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=112 if gpu else 8, help="timed tokens (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=256 if gpu else 32, help="tokens (default: %(default)s)")
    parser.add_argument("--context", type=int, default=2048 if gpu else 512,
                        help="of the row that is there for its memory (default: %(default)s)")  # fmt: skip
    parser.add_argument("--slots", type=int, nargs="*", default=[8, 32] if gpu else [4], help="of the engine")
    parser.add_argument("--repeat", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=gpu, help="use the fast path")
    parser.add_argument("--sdpa", choices=list(BACKENDS), help="attention of all rows (default: PyTorch chooses)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows with this in their name, and r = 32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args(argv)
    for name in ("tokens", "prompt", "repeat", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    for name in ("batches", "waves", "slots"):
        if min(values := getattr(args, name), default=1) < 1:
            parser.error(f"--{name} is {values}; all must be at least 1")
    torch.set_num_threads(args.threads)
    before, device = machine() | {"commit": commit()}, torch.device(args.device)
    if device.type == "cuda":
        before["gpu"] = torch.cuda.get_device_name(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.checkpoint:
        model = RecurrentDepthLM.from_pretrained(args.checkpoint, device=device, dtype=dtype).requires_grad_(False)
    else:
        model = build(args.preset, device, dtype)
    least, most = args.prompt + SKIP + args.tokens + max(args.waves, default=1), model.config.block_size
    if least > most or not least <= args.context <= most:
        parser.error(f"--prompt {args.prompt} and --tokens {args.tokens} need a context of {least}; --context is "
                     f"{args.context}, and the model's {most}")  # fmt: skip
    rows = rows_of(args.context, args.batches, args.waves, args.tokens)
    rows = [row for row in rows if args.only in row.name or row.name == "autoregressive, r = 32"]
    what = f"checkpoint {args.checkpoint}" if args.checkpoint else f'preset "{args.preset}", random weights'
    path = "fast path" if args.fast else "plain path"
    setting = (
        f"Model: {what}, {str(dtype).removeprefix('torch.')}; greedy, {path}; prompt {args.prompt}, {args.tokens} "
        f"timed tokens a row, {args.repeat} repeats in turns. Attention: {args.sdpa or 'as PyTorch chooses'}."
    )
    where = f" GPU: {before['gpu']}." if "gpu" in before else f"\n\n{NO_GPU}"
    print(f"{in_words(before)} Commit {before['commit']}.{where}\n\n{setting}\n", flush=True)
    with sdpa_kernel(BACKENDS[args.sdpa]) if args.sdpa else nullcontext():
        found = {
            "weight_bytes": weight_bytes(model),
            "rows": measure(model, rows, args.prompt, args.tokens, args.repeat, args.fast),
            "attention": attention_times(model, args.context, [1, 8, 128]),
            "batching": batching(model, args.slots, 32, 32, args.repeat),
        }
    print(report(found))
    if args.json:
        note = {} if gpu else {"note": NO_GPU}
        write_json(args.json, {**note, "machine": before, "arguments": vars(args), **found})


if __name__ == "__main__":
    main()
