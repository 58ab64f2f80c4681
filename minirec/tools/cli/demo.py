"""`minirec demo`: held-out problems, solved by several samplers side by side, and a picture of one of them."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import minirec
from minirec import tasks
from minirec.decoding import Generation
from minirec.files import checkpoint
from minirec.files.machine import cpu_name
from minirec.files.tokenizer import read_tokenizer
from minirec.recurrent_block import RecurrentDepthLM
from minirec.tools.cli.options import MODEL, SEED, Option, check_writable, given, new_command, whole_number
from minirec.tools.cli.prompts import knows_the_tasks
from minirec.tools.cli.samplers import DEPTH, SAMPLERS
from minirec.tools.cli.terminal import Stream, show

WATCHED = ("autoregressive", "lossless", "diffusion")  # their answers are printed as they come
ROOM = 128  # more tokens than any solution of a word problem needs
OTHERS = 8  # problems on which the smallest sufficient depth is found


def add_parser(commands) -> None:
    new_command(
        commands,
        run,
        "demo",
        "solve held-out problems autoregressively, with adaptive exit and by two wavefronts, side by side",
        "--problems 50 --exit-threshold 1",
        [
            MODEL,
            Option("--problems", whole_number(1, 10_000), 20, "how many problems"),
            Option("--seed", SEED, 0, "which problems"),
            Option("--out", Path, Path("wavefront.png"), "where the picture of a wavefront goes"),
            Option("--threads", whole_number(1, 1024), 1, "CPU threads; the shipped model is too small to share"),
            *DEPTH,
        ],
    )


def run(args: argparse.Namespace) -> None:
    """Watch two answers, then compare the samplers on all problems, then draw one."""
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out is {str(args.out)!r}; the picture is written as .png")
    check_writable(args.out.parent, args.out)
    folder = checkpoint.locate(args.model)
    tokenizer = read_tokenizer(folder)
    if not knows_the_tasks(tokenizer):
        raise ValueError(f"{folder} has another vocabulary than the word problems of the demo")
    model = checkpoint.load(folder)
    depth = given(args, "num_steps")
    columns = {  # title -> sampler, options
        "autoregressive": ("autoregressive", depth),
        "lossless": ("lossless", depth | given(args, "guess_after")),
        "diffusion": ("diffusion", depth | given(args, "inner_steps", "exit_threshold")),
        "adaptive": ("adaptive", depth),
    }
    problems = tasks.heldout(args.problems, seed=args.seed)
    for sampler, options in columns.values():  # a bad option is refused before anything is printed
        SAMPLERS[sampler](model, problems[0].prompt, 1, **options)

    parameters = sum(p.numel() for p in model.parameters())
    threads, r = torch.get_num_threads(), depth.get("num_steps", model.config.mean_recurrence)
    show(f"minirec {minirec.__version__}, torch {torch.__version__}, {cpu_name()}, {threads} thread(s)")
    show(f"model {args.model}: {parameters:,} parameters, {r} recurrence steps deep\n")
    for number, problem in enumerate(problems[:2], 1):
        show(f"Problem {number}: {problem.text}")
        for title in WATCHED:
            show(f"\n[{title}] ", end="", flush=True)
            text = Stream(tokenizer)
            generation = _solve(model, problem, *columns[title], on_token=text.add, trace=True)
            text.end()
            if number == 1:
                traced = generation  # of the last sampler: diffusion forcing
        show(f"\n(the right answer is {problem.answer})\n")

    enough = _smallest_depth(model, r, args.seed + 1)
    columns[f"plain, r = {enough}"] = ("autoregressive", {"num_steps": enough})
    runs: dict[str, list[tuple[Generation, float]]] = {title: [] for title in columns}  # seconds, of every problem
    for problem in tqdm(problems, desc="solving", disable=None, leave=False):
        for title, done in runs.items():  # one right after the other: all meet the same load on the machine
            started = time.perf_counter()
            generation = _solve(model, problem, *columns[title])
            done.append((generation, time.perf_counter() - started))
    _print_comparison(problems, runs)
    show(f"plain, r = {enough}: the smallest depth that solves as many of {OTHERS} other problems as r = {r} does")

    _draw(args.out, traced, len(problems[0].prompt), tokenizer)
    show(f"""
What to look at next
  {args.out}: the wavefront of problem 1, how many positions were in flight and when each one froze
  minirec demo --exit-threshold 1          freeze sooner: faster, until the answers go wrong
  minirec info --words                     what the shipped model can be asked
  notebooks/00_start_here.ipynb            the ideas, built step by step""")


def _solve(model: RecurrentDepthLM, problem: tasks.Problem, sampler: str, options: dict, **more) -> Generation:
    room = min(ROOM, model.config.block_size - len(problem.prompt))
    return SAMPLERS[sampler](model, problem.prompt, room, **options, **more)


def _smallest_depth(model: RecurrentDepthLM, r: int, seed: int) -> int:
    """The smallest depth at which plain decoding solves as many problems as at r steps."""
    problems = tasks.heldout(OTHERS, seed=seed)

    def solved(depth: int) -> int:
        return sum(p.is_correct(_solve(model, p, "autoregressive", {"num_steps": depth}).tokens) for p in problems)

    most = solved(r)
    return next((depth for depth in range(1, r) if solved(depth) >= most), r)


def _print_comparison(problems: list[tasks.Problem], runs: dict) -> None:
    """The table. runs: title -> (generation, seconds) of every problem; the first is the reference of the speed-up."""
    columns = [["exact match of the answer", "same tokens as autoregressive", "recurrent-block passes per token"]]
    columns[0] += ["coda calls per token", "tokens per second", "speed-up", "speed-up, median of the problems"]
    reference = next(iter(runs.values()))
    rates = [[len(g.tokens) / seconds for g, seconds in done] for done in runs.values()]  # tokens/s of every problem
    totals = [sum(len(g.tokens) for g, _ in done) for done in runs.values()]
    overall = [n / sum(seconds for _, seconds in done) for n, done in zip(totals, runs.values(), strict=True)]
    for column, done in enumerate(runs.values()):
        right = sum(p.is_correct(g.tokens) for p, (g, _) in zip(problems, done, strict=True))
        same = sum(g.tokens == r.tokens for (g, _), (r, _) in zip(done, reference, strict=True))
        ratio = statistics.median(a / b for a, b in zip(rates[column], rates[0], strict=True))
        cells = [f"{right}/{len(problems)}", f"{same}/{len(problems)}"]
        cells += [f"{sum(g.passes for g, _ in done) / totals[column]:.2f}"]
        cells += [f"{sum(g.decodes for g, _ in done) / totals[column]:.2f}"]
        cells += [f"{overall[column]:.0f}", f"{overall[column] / overall[0]:.2f}x", f"{ratio:.2f}x"]
        columns.append(cells)
    show(f"{f'{len(problems)} held-out problem(s)':<34}" + "".join(f"{title:>16}" for title in runs))
    for name, *cells in zip(*columns, strict=True):
        show(f"{name:<34}" + "".join(f"{cell:>16}" for cell in cells))


def _draw(path: Path, traced: Generation, prompt_length: int, tokenizer) -> None:
    """The wavefront of a generation as a picture, 1200 pixels wide."""
    from matplotlib.figure import Figure  # here: no other command needs matplotlib; no pyplot, so no window

    from minirec import figures

    figure = Figure(figsize=(12, 6.6), dpi=100, layout="constrained")
    figures.wavefront(traced, prompt_length, tokenizer=tokenizer, ax=figure.subplots())
    checkpoint.write_whole(path, lambda part: figure.savefig(part, format="png"))
