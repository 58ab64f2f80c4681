"""The batching engine's four modes on mixed requests: throughput, latency, passes, and what they could be at best.

    python benchmarks/batching.py [--requests 64 256] [--slots 8] [--rates 0.5 0.8 0.95] [--num-steps 12] [--replay]

Static, sequence and depth leave the loop by the same rule and give the same tokens; sequence and wavefront, at fixed
depth, give the same tokens too.  Both is checked in every run.  A wave with an exit is diffusion forcing, whose texts
may differ; their share is printed.  Two kinds of workload, on the shipped model:

- closed loop: all requests are there at the start, and the question is how soon the last one is done;
- Poisson arrivals: requests come when the clock says so, whether the engine keeps up or not.  A rate is a share of what
  mode "sequence" with the same rule got through in the closed loop just before.

The engines of a workload run side by side in turns of a few hundredths of a second: the one with the fewest tokens so
far goes on, and the clocks of the others stand still.  So the same share of the work of every mode is done in the same
weather.  An engine that waits for an arrival has its clock put forward, and nobody sits idle.

--replay takes each token's exit from a run before instead of from the criterion: all modes do the same work then, and
none pays for the criterion (as in arXiv 2608.09444, which has the bound as well).
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch
from timing import in_words, machine, no_garbage_collection, spread, table, with_quartiles, write_json
from tqdm import tqdm

from minirec import RecurrentDepthLM, tasks
from minirec.continuous_batching import Engine, Pass, Request, Slot, Stage
from minirec.continuous_batching.slots import Move
from minirec.decoding import Generation
from minirec.tasks import Problem

EXIT = 0.2  # the state moved by less than this, relative to its length
ROWS = {  # name -> mode, threshold
    "static": ("static", EXIT),
    "sequence": ("sequence", EXIT),
    "depth": ("depth", EXIT),
    "wavefront": ("wavefront", EXIT),
    "sequence, fixed depth": ("sequence", None),
    "wavefront, fixed depth": ("wavefront", None),
}
LOSSY = "wavefront"
BASE = {EXIT: "sequence", None: "sequence, fixed depth"}  # threshold -> the row that others are compared with
TURN = 0.05  # seconds that an engine runs before the next one does
ROOM = 16  # tokens past a solution, for one that goes astray
LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "itl": "inter-token latency"}


class Replay(Engine):
    """An engine whose new tokens leave the loop at given depths; `depths[i]` are those of request i's tokens."""

    depths: list[list[int]]

    def _steps(self, slot: Slot, move: Move) -> int:
        depths, number = self.depths[slot.request.id], len(slot.request.generation.tokens) + len(move.final)
        return depths[number] if 0 < number < len(depths) else super()._steps(slot, move)


class Run:
    """An engine on its way through a workload; its clock stands still between its turns.

    engine: what makes it, of a clock.  arrivals: seconds from the start, in order, one for each problem.
    """

    def __init__(
        self, engine: Callable[..., Engine], problems: list[Problem], arrivals: list[float], threshold: float | None
    ):
        self.problems, self.arrivals, self.threshold = problems, arrivals, threshold
        self.submitted, self.spent, self.started, self.done = 0, 0.0, 0.0, False
        self.crowded: list[int] = []  # slots in each recurrent pass that was run while requests waited
        self.engine = engine(clock=lambda: time.perf_counter() - self.started, on_pass=self.watch)

    def watch(self, done: Pass) -> None:
        if done.stage is Stage.RECUR and self.engine.scheduler.waiting:
            self.crowded.append(len(done.slots))

    def turn(self, seconds: float) -> None:
        """Go on for so long, in whole passes."""
        self.started = time.perf_counter() - self.spent
        end = self.spent + seconds
        while not self.done and (now := time.perf_counter() - self.started) < end:
            while self.submitted < len(self.problems) and self.arrivals[self.submitted] <= now:
                problem = self.problems[self.submitted]
                self.engine.submit(problem.prompt, len(problem.target) + ROOM, threshold=self.threshold)
                self.submitted += 1
            if not self.engine.step():
                self.done = self.submitted == len(self.problems)
                if not self.done:  # put the clock forward
                    self.started = min(self.started, time.perf_counter() - self.arrivals[self.submitted])
        self.spent = time.perf_counter() - self.started

    def results(self) -> list[Generation]:
        """In the order of arrival."""
        return [request.generation for request in self.engine.requests.values()]


def longest(problems: list[Problem]) -> int:
    return max(len(p.prompt) + len(p.target) for p in problems) + ROOM


def side_by_side(runs: list[Run]) -> None:
    """Run them all, so that they are always about equally far."""
    gc.collect()  # engines that have done their work: each is in a cycle with its clock
    with no_garbage_collection():
        while going := [run for run in runs if not run.done]:
            min(going, key=lambda run: sum(len(g.tokens) for g in run.results())).turn(TURN)


def mixed(n: int) -> list[Problem]:
    """n held-out problems of all families and trained levels, shuffled."""
    problems = [p for family in tasks.FAMILIES for p in tasks.heldout(n, family=family)]
    return random.Random(0).sample(problems, n)


def poisson(n: int, rate: float, seed: int) -> list[float]:
    """Times of n arrivals, so many a second on average."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(rate) for _ in range(n)))


def check(name: str, results: list[Generation], expected: list[Generation]) -> int:
    """How many tokens left the loop at another depth than expected, by rounding; other tokens are an error."""
    for i, (got, right) in enumerate(zip(results, expected, strict=True)):
        if got.tokens != right.tokens:
            raise RuntimeError(f"mode {name} gave request {i} the tokens {got.tokens} instead of {right.tokens}")
    return sum(a != b for got, right in zip(results, expected, strict=True)
               for a, b in zip(got.depth, right.depth, strict=True))  # fmt: skip


def in_use(requests: list[Request]) -> int:
    """The most bytes of keys and values that were promised to admitted requests at once."""
    changes = [(r.ended, -r.kv_bytes) for r in requests] + [(r.admitted, r.kv_bytes) for r in requests]
    return max(accumulate(change for _, change in sorted(changes)))


def measures(run: Run) -> dict[str, float]:
    """The numbers of a run; times in ms, where not said otherwise, and waiting counts from the arrival."""
    engine, requests = run.engine, list(run.engine.requests.values())
    depths = [d for r in requests for d in r.generation.depth]
    times = [r.token_times for r in requests]
    seconds, n = max(r.ended for r in requests) - run.arrivals[0], len(depths)
    waits = {
        "ttft": [t[0] - arrival for t, arrival in zip(times, run.arrivals, strict=True)],
        "tpot": [(t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1],
        "itl": [b - a for t in times for a, b in pairwise(t)],
    }
    found = {
        "seconds": seconds,
        "requests_per_second": len(requests) / seconds,
        "tokens_per_second": n / seconds,
        "tokens": n,
        "mean_depth": sum(depths) / n,
        # a trip: prelude, loop, coda of a slot, with a token or a chunk of a prompt
        "mean_depth_of_trips": engine.slots_in[Stage.RECUR] / engine.slots_in[Stage.CODA],
        "passes_per_token": sum(engine.passes.values()) / n,
        "recurrent_passes_per_token": engine.passes[Stage.RECUR] / n,
        "recurrent_passes_per_coda": engine.passes[Stage.RECUR] / engine.passes[Stage.CODA],
        "kv_bytes_in_use": in_use(requests),
        "kv_bytes_allocated": engine.grid.cache.nbytes,
    }
    for stage in Stage:
        passes = engine.passes[stage]
        found[f"passes_{stage.name}"] = passes
        found[f"occupancy_{stage.name}"] = engine.slots_in[stage] / passes / engine.scheduler.slots
        found[f"cells_per_pass_{stage.name}"] = engine.cells[stage] / passes
    found["occupancy_crowded"] = sum(run.crowded) / max(1, len(run.crowded)) / engine.scheduler.slots
    for name, values in waits.items():
        ms = 1e3 * np.array(values or [0.0])  # answers of one token each have no gaps
        found |= {f"{name}_mean": ms.mean().item(), f"{name}_p50": np.quantile(ms, 0.5).item(),
                  f"{name}_p99": np.quantile(ms, 0.99).item()}  # fmt: skip
    return found


def costs(
    model: RecurrentDepthLM, problem: Problem, slots: int, threshold: float | None, num_steps: int | None = None
) -> dict[Stage, list[float]]:
    """Milliseconds of every pass with one token in each slot."""
    passes, found = [], {stage: [] for stage in Stage}
    new = 8
    engine = Engine(model, slots, len(problem.prompt) + new, "sequence", num_steps=num_steps, on_pass=passes.append)
    for seed in range(slots):
        engine.submit(problem.prompt, new, threshold=threshold, seed=seed, stop_tokens=())
    with no_garbage_collection():
        start = time.perf_counter()
        while engine.step():
            end = time.perf_counter()
            if passes[-1].cells == slots:
                found[passes[-1].stage].append(1e3 * (end - start))
            start = time.perf_counter()
    return found


def bound(f0: float, fr: float, deepest: float, mean: float) -> float:
    """What taking each token out of the loop on its own can gain at most (2608.09444)."""
    return (f0 + deepest * fr) / (f0 + mean * fr)


def bounds(rows: dict[str, list[dict]], f0: float, fr: float) -> list[dict]:
    """Mode "depth" in a closed loop against both rows of BASE, in time and in passes; f0, fr: ms."""
    counted = {"time": (f0, fr, "tokens_per_second"), "passes": (2, 1, "passes_per_token"),
               "recurrent passes": (0, 1, "recurrent_passes_per_token")}  # fmt: skip
    found = []
    for base in reversed(BASE.values()):
        for unit, (outside, inside, key) in counted.items():
            sign = 1 if unit == "time" else -1  # fewer are better
            reached = spread((a[key] / b[key]) ** sign for a, b in zip(rows["depth"], rows[base], strict=True))
            # in step, every round is as deep as the deepest in it
            deepest, mean = (np.median([run[k] for run in rows[name]]).item() for name, k in
                             [(base, "recurrent_passes_per_coda"), ("depth", "mean_depth_of_trips")])  # fmt: skip
            limit = bound(outside, inside, deepest, mean)
            found.append({"over": base, "in": unit, "f0": outside, "fr": inside, "deepest": deepest, "mean": mean,
                          "bound": limit, "reached": reached, "share": reached["median"] / limit})  # fmt: skip
    return found


def summary(rows: dict[str, list[dict]]) -> dict[str, dict]:
    """Spread of every number over the repeats, and of the speed-ups, each formed within a repeat."""
    found = {}
    for name, runs in rows.items():
        found[name] = {key: spread(run[key] for run in runs) for key in runs[0]}
        same_rule = [base for base in rows if ROWS[base][1] == ROWS[name][1]]
        for base in ("static", BASE[ROWS[name][1]]):
            if base in same_rule:
                speed = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs, rows[base], strict=True)]
                found[name][f"over {base.split(',')[0]}"] = spread(speed)
    return found


def report(found: dict[str, dict[str, dict]]) -> str:
    """The tables over all workloads."""
    stages = [stage.name for stage in Stage]

    def medians(row: dict, keys: list[str], digits: int = 0) -> str:
        return " / ".join(f"{row[key]['median']:.{digits}f}" for key in keys)

    speed, work, wait = [], [], []
    for workload, rows in found.items():
        for name, row in rows.items():
            head = [workload, name]
            gains = [with_quartiles(row[over]) if over in row else "-" for over in ("over static", "over sequence")]
            rates = (with_quartiles(row[key], digits) for key, digits in [("requests_per_second", 1),
                                                                         ("tokens_per_second", 0)])  # fmt: skip
            speed.append([*head, *rates, *gains])
            work.append([*head, *(f"{row[key]['median']:.2f}" for key in ("mean_depth", "passes_per_token",
                                                                         "recurrent_passes_per_token")),
                         medians(row, [f"passes_{s}" for s in stages]),
                         medians(row, [f"occupancy_{s}" for s in stages], 2),
                         medians(row, ["occupancy_crowded"], 2),
                         medians(row, [f"cells_per_pass_{s}" for s in stages], 1),
                         f"{row['kv_bytes_in_use']['median'] / 2**20:.1f}"])  # fmt: skip
            wait.append([*head, *(medians(row, [f"{key}_{x}" for x in ("mean", "p50", "p99")], 1)
                                  for key in LATENCIES)])  # fmt: skip
    by_stage = "prelude / loop / coda"
    return "\n\n".join(
        [
            table(["workload", "mode", "requests/s", "tokens/s", "over static", "over sequence"], speed),
            table(["workload", "mode", "mean depth", "passes/token", "recurrent passes/token", f"passes: {by_stage}",
                   "occupancy", "loop, while others wait", "cells per pass", "KV MiB in use"], work),
            table(["workload", "mode", *(f"{name}, ms" for name in LATENCIES.values())], wait),
        ]
    )  # fmt: skip


def report_bounds(found: dict[str, list[dict]]) -> str:
    cells = [[workload, row["over"], row["in"], f"{row['deepest']:.2f}", f"{row['mean']:.2f}", f"{row['bound']:.2f}",
              with_quartiles(row["reached"]), f"{row['share']:.0%}"] for workload, rows in found.items()
             for row in rows]  # fmt: skip
    head = ["workload", "depth over", "counted in", "r_max", "mean depth", "bound", "reached", "share"]
    return table(head, cells)


LEGEND = """
Fixed depth: no exit. Rate x: requests arrive x times as often as mode sequence with the same rule got them done in the
closed loop. Speed-ups: tokens/s over that of static and of sequence with the same rule, in the same repeat;
median and quartiles over the repeats. With arrivals, a mode that keeps up gets as many tokens/s as arrive, and what
tells modes apart are the latencies. Passes: through prelude, recurrent block and coda, prompts included. Occupancy: the
share of the slots that was in a pass; and that of the loop as long as requests wait, without the end of a run, when
slots stay empty. Cells: positions in a pass, of which a chunk of a prompt has many. KV in use: the
most that was promised to admitted requests. Latencies: mean / p50 / p99 of a repeat, and of each the median over the
repeats; time to first token counts from the arrival, time per output token is a request's mean after its first.

Bound: (F0 + r_max Fr) / (F0 + mean depth Fr), for the speed-up of depth over sequence. r_max: steps of a round of
sequence, the configured depth if it is fixed, that of the deepest of its tokens if not. Mean depth: of tokens and
chunks of prompts, which never leave early. Counted in time F0 and Fr are as measured; in passes F0 = 2 and Fr = 1; in
recurrent passes F0 = 0 and Fr = 1. Depth pays for full recurrent passes with emptier ones through prelude and coda:
where those are cheap, on a large core, time follows the recurrent passes; where a pass costs nearly the same whatever
is in it, as on a small model, it follows all passes. A wave takes fewer passes with more cells in each, and gains where
a cell more costs little."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The batching engine's modes, with the shipped model.")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256], help="of the closed loops; the first also"
                        " of the arrivals (default: 64 256)")  # fmt: skip
    parser.add_argument("--slots", type=int, default=8, help="rows of the engine (default: 8)")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 0.8, 0.95], help="of arrivals, as shares of the"
                        " closed loop's throughput (default: 0.5 0.8 0.95; none: closed loops only)")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=5, help="runs of every workload (default: 5)")
    parser.add_argument("--coda-batch", type=int, default=2, help="slots that prelude or coda wait for in modes depth "
                        "and wavefront (default: 2)")  # fmt: skip
    parser.add_argument("--num-steps", type=int, help="the fixed depth, and the most of an exit (default: the model's)")
    parser.add_argument("--chunk", type=int, default=32, help="positions of a prompt in a pass, at most (default: 32)")
    parser.add_argument("--guess-after", type=int, default=1, help="steps after which a wave guesses (default: 1)")
    parser.add_argument("--replay", action="store_true", help="take exits from a run before, not from the criterion")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args(argv)
    model = RecurrentDepthLM.from_pretrained("tiny")
    args.num_steps = model.config.mean_recurrence if args.num_steps is None else args.num_steps
    for name in ("requests", "slots", "repeat", "coda_batch", "num_steps", "chunk", "guess_after", "threads"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if min(args.rates, default=1) <= 0:
        parser.error(f"--rates is {args.rates}; all must be above 0")
    torch.set_num_threads(args.threads)
    before = machine()
    if args.guess_after > args.num_steps:
        parser.error(f"--guess-after is {args.guess_after}; it must be from 1 to {args.num_steps}")
    problems = mixed(max(args.requests))
    typical = sorted(problems, key=lambda p: len(p.prompt))[len(problems) // 2]
    print(in_words(before))
    print(
        f"Model: the shipped one, depth {args.num_steps}, float32, greedy; {args.slots} slots of "
        f"{longest(problems)} tokens; {' and '.join(map(str, args.requests))} held-out problems of all families and "
        f"levels; exit below {EXIT}, {'replayed' if args.replay else 'live'}; coda batch {args.coda_batch}; "
        f"chunks of {args.chunk}; waves guess after step {args.guess_after}; "
        f"{args.repeat} repeats, modes in turns."
    )

    expected: dict[float | None, list[Generation]] = {}

    def start(name: str, n: int, arrivals: list[float]) -> Run:
        mode, threshold = ROWS[name]
        engine = Replay if args.replay and threshold is not None and threshold in expected and name != LOSSY else Engine
        made = partial(engine, model, args.slots, longest(problems), mode=mode, coda_batch=args.coda_batch,
                       num_steps=args.num_steps, chunk=args.chunk, guess_after=args.guess_after)  # fmt: skip
        run = Run(made, problems[:n], arrivals, None if engine is Replay else threshold)
        if engine is Replay:
            run.engine.depths = [generation.depth for generation in expected[threshold]]
        return run

    # what every run has to give, and the depths to replay
    references = {threshold: start(name, len(problems), [0.0] * len(problems)) for threshold, name in BASE.items()}
    side_by_side(list(references.values()))
    expected |= {threshold: run.results() for threshold, run in references.items()}
    order, few = list(ROWS), min(args.slots, len(problems))
    side_by_side([start(name, few, [0.0] * few) for name in order])  # warm-up
    runs: dict[str, dict[str, list[dict]]] = {}
    passes: dict[float | None, dict[Stage, list[float]]] = {t: {stage: [] for stage in Stage} for t in (None, 0.0)}

    def measure(workload: str, n: int, arrivals: dict[float | None, list[float]]) -> dict[str, list[dict]]:
        together = {name: start(name, n, arrivals[ROWS[name][1]]) for name in order}
        side_by_side(list(together.values()))
        rows = runs.setdefault(workload, {name: [] for name in ROWS})
        for name, run in together.items():
            right = expected[ROWS[name][1]][:n]
            same = sum(a.tokens == b.tokens for a, b in zip(run.results(), right, strict=True)) / n
            other = 0 if name == LOSSY else check(name, run.results(), right)
            rows[name].append(measures(run) | {"other_depths": other, "same_texts": same})
        return rows

    for repeat in tqdm(range(args.repeat), disable=None, desc="repeats"):
        for threshold, ms in passes.items():  # 0: the criterion is asked, and never met
            for stage, some in costs(model, typical, args.slots, threshold, args.num_steps).items():
                ms[stage] += some
        for n in args.requests:
            rows = measure(f"closed, {n}", n, dict.fromkeys(BASE, [0.0] * n))
            if n == args.requests[0]:
                throughput = {t: rows[name][-1]["requests_per_second"] for t, name in BASE.items()}
        for rate in args.rates:
            n = args.requests[0]
            measure(f"rate {rate:g}", n, {t: poisson(n, rate * x, repeat) for t, x in throughput.items()})
        order.append(order.pop(0))

    ms = {stage: spread(values) for stage, values in passes[None].items()}
    asked = spread(passes[0.0][Stage.RECUR])
    f0, fr = ms[Stage.PRELUDE]["median"] + ms[Stage.CODA]["median"], ms[Stage.RECUR]["median"]
    found = {workload: summary(rows) for workload, rows in runs.items()}
    limits = {name: bounds(rows, f0, fr) for name, rows in runs.items() if name.startswith("closed")}
    allocated = next(iter(found.values()))["static"]["kv_bytes_allocated"]["median"]
    every = [run for rows in runs.values() for some in rows.values() for run in some]
    other = {
        what: sum(run[what] for rows in runs.values() for name, some in rows.items() if name != LOSSY for run in some)
        for what in ("other_depths", "tokens")
    }
    print(f"Keys and values: {allocated / 2**20:.1f} MiB allocated.\n")
    print(report(found))
    print(
        f"\nA pass with one token in each slot, ms: prelude {with_quartiles(ms[Stage.PRELUDE])}, coda "
        f"{with_quartiles(ms[Stage.CODA])}, together F0 = {f0:.2f}; recurrent block Fr = "
        f"{with_quartiles(ms[Stage.RECUR])}, and {with_quartiles(asked)} when it asks the exit criterion.\n"
    )
    print(report_bounds(limits))
    lossy = [run for rows in runs.values() for run in rows[LOSSY]]
    print(
        f"\nThe tokens of all {len(every) - len(lossy)} runs without diffusion forcing are those of mode sequence with "
        f"the same rule. At another depth than there, by rounding, {other['other_depths']} of {other['tokens']} left "
        f"the loop. Diffusion forcing gave {min(run['same_texts'] for run in lossy):.1%} of the texts in the worst run."
    )
    print(LEGEND)
    if args.json:
        settings = {"requests": args.requests, "slots": args.slots, "rates": args.rates, "repeat": args.repeat,
                    "replay": args.replay, "coda_batch": args.coda_batch, "guess_after": args.guess_after,
                    "threshold": EXIT, "num_steps": args.num_steps, "chunk": args.chunk}  # fmt: skip
        write_json(
            args.json,
            {"machine": before, "settings": settings, "workloads": found, "bounds": limits,
             "pass_ms": {stage.name: s for stage, s in ms.items()} | {"RECUR with criterion": asked},
             "other_depths": other},
        )  # fmt: skip


if __name__ == "__main__":
    main()
