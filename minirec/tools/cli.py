"""The command line: `minirec demo`, `generate`, `chat`, `train`, `make-checkpoint` and `info`.

Everything here is a thin face over the package: it parses, calls and prints.  Bad input is one line on stderr and
exit code 2; Ctrl-C is exit code 130; anything else that goes wrong is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import minirec
from minirec import adaptive_exit, autoregressive, diffusion_forcing, lossless_wavefront, speculative, tasks, training
from minirec.config import PRESETS, RecurrentConfig
from minirec.decoding import stop_tokens
from minirec.files import checkpoint, machine
from minirec.files.machine import cpu_name, is_out_of_memory, readable
from minirec.files.run import Run
from minirec.files.tokenizer import (
    HUGINN_TEMPLATE,
    ChatTemplate,
    huginn_special_ids,
    read_tokenizer,
    stand_in_tokenizer,
)
from minirec.kv_cache import bytes_per_token
from minirec.recurrent_block import RecurrentDepthLM
from minirec.tasks import BEGIN, END, PAD, task_tokenizer
from minirec.tools import processes

SAMPLERS = {
    "autoregressive": autoregressive.generate,
    "adaptive": adaptive_exit.generate,
    "speculative": speculative.generate,
    "lossless": lossless_wavefront.generate,
    "diffusion": diffusion_forcing.generate,
}
OWN = {  # sampler -> the options that only it has
    "adaptive": ("criterion", "threshold"),
    "speculative": ("draft_steps", "lookahead"),
    "lossless": ("guess_after",),
    "diffusion": ("inner_steps", "exit_threshold"),
}
DEMO_SAMPLERS = ("autoregressive", "lossless", "diffusion")
DEMO_TOKENS = 128  # more than any solution of a word problem needs


def main(argv: list[str] | None = None) -> int:
    """Run one command; argv None is sys.argv. Returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a token that this terminal can't show ends nothing
    try:
        args = parser().parse_args(argv)
        if "threads" in args:
            torch.set_num_threads(args.threads)
        args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:
        print("\nminirec: stopped", *stop.args, file=sys.stderr)  # on a line of its own, after the text so far
        return 130
    except BrokenPipeError:  # the reader of a pipe left, as in `minirec info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if (message := _about_input(error)) is None:
            raise
        print("minirec: error:", " ".join(message.split()), file=sys.stderr)
        return 2


def _about_input(error: Exception) -> str | None:
    """What to say of an error that is no bug: what the system refuses, what minirec itself raises, no memory left."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(minirec.__file__).parent in Path(last.filename).parents and last.line.startswith("raise")
    if is_out_of_memory(error):  # PyTorch's numbers, and what minirec can do about them
        numbers = ". ".join(str(error).split(". ")[:3])
        return f"{numbers}; try --kv shared, fewer tokens, --dtype bfloat16 or another --device"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, OSError) or (ours and isinstance(error, (ValueError, MemoryError))) else None


def demo(args: argparse.Namespace) -> None:
    """Three samplers, the same problems: watch two answers, then compare on all, then draw one."""
    from minirec import figures as plots  # matplotlib: only where a picture is drawn

    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out is {str(args.out)!r}; the picture is written as .png")
    _check_writable(args.out.parent, args.out)
    folder = checkpoint.locate(args.model)
    tokenizer = read_tokenizer(folder)
    if tokenizer.get_vocab() != task_tokenizer().get_vocab():
        raise ValueError(f"{folder} has another vocabulary than the word problems of the demo")
    model = checkpoint.load(folder)
    depth = _given(args, "num_steps")
    columns = {sampler: depth | _given(args, *OWN.get(sampler, ())) for sampler in DEMO_SAMPLERS}
    problems = tasks.heldout(args.problems, seed=args.seed)

    def solve(sampler: str, problem: tasks.Problem, **options):
        room = min(DEMO_TOKENS, model.config.block_size - len(problem.prompt))
        return SAMPLERS[sampler](model, problem.prompt, room, **columns[sampler], **options)

    threads, r = torch.get_num_threads(), depth.get("num_steps", model.config.mean_recurrence)
    print(f"minirec {minirec.__version__}, torch {torch.__version__}, {cpu_name()}, {threads} thread(s)")
    print(f"model {args.model}: {_parameters(model):,} parameters, {r} recurrence steps deep\n")
    for number, problem in enumerate(problems[:2], 1):
        print(f"Problem {number}: {problem.text}")
        for sampler in columns:
            print(f"\n[{sampler}] ", end="", flush=True)
            text = Stream(tokenizer)
            generation = solve(sampler, problem, on_token=text.add, trace=True)
            text.end()
            if number == 1:
                traced = generation  # of the last sampler: diffusion forcing
        print(f"\n(the right answer is {problem.answer})\n")

    runs = {sampler: [] for sampler in columns}  # (generation, seconds) of every problem
    for problem in tqdm(problems, desc="solving", disable=None, leave=False):
        for sampler, done in runs.items():  # one right after the other: both meet the same load on the machine
            started = time.perf_counter()
            generation = solve(sampler, problem)
            done.append((generation, time.perf_counter() - started))
    _print_comparison(problems, runs)

    from matplotlib.figure import Figure  # without pyplot: no window, whatever the backend

    figure = Figure(figsize=(12, 6.6), dpi=100, layout="constrained")  # 1200 pixels wide
    plots.wavefront(traced, len(problems[0].prompt), tokenizer=tokenizer, ax=figure.subplots())
    checkpoint.write_whole(args.out, lambda part: figure.savefig(part, format="png"))
    print(f"""
What to look at next
  {args.out}: the wavefront of problem 1, how many positions were in flight and when each one froze
  minirec demo --exit-threshold 1          freeze sooner: faster, until the answers go wrong
  minirec generate --help                  your own problem, in the words of the shipped model
  notebooks/00_start_here.ipynb            the ideas, built step by step""")


def _print_comparison(problems: list[tasks.Problem], runs: dict) -> None:
    """The demo's table. runs: sampler -> (generation, seconds) of every problem; the first counts as 1."""
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
    print(f"{f'{len(problems)} held-out problem(s)':<34}" + "".join(f"{sampler:>16}" for sampler in runs))
    for name, *cells in zip(*columns, strict=True):
        print(f"{name:<34}" + "".join(f"{cell:>16}" for cell in cells))


def generate(args: argparse.Namespace) -> None:
    """Text in, text out as its tokens freeze."""
    options = _sampler_options(args)
    folder = checkpoint.locate(args.model, **_given(args, "revision"), weights=False)
    config, tokenizer = checkpoint.read_config(folder), read_tokenizer(folder)
    asked = _text(sys.stdin.read if args.prompt == "-" else lambda: args.prompt)
    prompt = _encode(tokenizer, asked, config.bos_token_id)
    model = _load(args)
    text = Stream(tokenizer, at_once=not args.stream)
    started = time.perf_counter()
    generation = SAMPLERS[args.sampler](model, prompt, args.max_new_tokens, on_token=text.add, **options)
    seconds, n = time.perf_counter() - started, len(generation.tokens)
    text.end()
    if args.stats:
        print(
            f"{n} tokens in {seconds:.2f} s ({n / seconds:.0f} tokens/s), {generation.passes} recurrent-block passes "
            f"({generation.passes / n:.2f} a token), {generation.decodes} coda calls; recurrence steps of a "
            f"token: mean {statistics.mean(generation.depth):.1f}, {min(generation.depth)} to {max(generation.depth)}",
            file=sys.stderr,
        )


def chat(args: argparse.Namespace) -> None:
    """A conversation: a line in, an answer out as its tokens freeze, and again."""
    options = _sampler_options(args)
    folder = checkpoint.locate(args.model, **_given(args, "revision"), weights=False)
    config, tokenizer = checkpoint.read_config(folder), read_tokenizer(folder)
    template = ChatTemplate(folder, tokenizer)
    model = _load(args)
    stop = stop_tokens(model) | ({template.end} - {None})
    by_hand = sys.stdin.isatty()
    if by_hand:
        print("/new starts another conversation, /quit ends; Ctrl-C ends an answer")
    beginning = [{"role": "system", "content": _text(lambda: args.system)}] if "system" in args else []
    messages = list(beginning)
    while True:
        try:
            line = _text(lambda: input("> " if by_hand else "")).strip()
        except EOFError:
            line = "/quit"
            print(end="\n" if by_hand else "")
        if line == "/quit":
            break
        if line == "/new":
            messages = list(beginning)
        if not line or line == "/new":
            continue
        prompt = template.encode([*messages, {"role": "user", "content": line}])
        room = min(args.max_new_tokens, config.block_size - len(prompt))
        if room < 1:
            full = f"{len(prompt)} tokens of conversation leave no room in the context of {config.block_size}"
            print(f"minirec: {full}; /new starts another one", file=sys.stderr)
            continue
        text = Stream(tokenizer)
        try:
            SAMPLERS[args.sampler](model, prompt, room, on_token=text.add, stop_tokens=stop, **options)
        except KeyboardInterrupt:
            pass  # what was said until then counts
        text.end()
        answer = {"role": template.speaker, "content": tokenizer.decode(text.tokens)}
        messages += [{"role": "user", "content": line}, answer]


def _sampler_options(args: argparse.Namespace) -> dict:
    """What generate and chat hand on to the sampler."""
    for sampler, names in OWN.items():
        for name in _given(args, *names) if sampler != args.sampler else ():
            raise ValueError(f"--{name.replace('_', '-')} is an option of --sampler {sampler}")
    names = ("num_steps", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "kv", "kv_slots")
    return _given(args, *names, *OWN.get(args.sampler, ()))


def _load(args: argparse.Namespace) -> RecurrentDepthLM:
    return checkpoint.load(args.model, device=args.device, **_given(args, "dtype", "revision"))


class Stream:
    """Prints the text of a generation while its tokens freeze, or all of it at the end."""

    def __init__(self, tokenizer: Tokenizer, at_once: bool = False):
        self.tokenizer, self.at_once = tokenizer, at_once
        self.tokens: list[int] = []
        self.shown = 0  # characters

    def add(self, token: int) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if not self.at_once and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character waits
            print(text[self.shown :], end="", flush=True)
            self.shown = len(text)

    def end(self) -> None:
        print(self.tokenizer.decode(self.tokens)[self.shown :])


def train(args: argparse.Namespace) -> None:
    """Train from scratch, or go on, and leave a checkpoint that `generate` reads."""
    fields = dataclasses.fields(training.TrainingConfig)
    config = training.TrainingConfig(**{f.name: getattr(args, f.name) for f in fields})
    special = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    shape = dataclasses.replace(RecurrentConfig.preset(args.preset), **special)
    torch.manual_seed(args.seed)
    device = processes.join(args.device)
    if "start" in args:
        model = checkpoint.load(args.start, device=device)
    else:
        model = RecurrentDepthLM(shape).to(device)
    if not args.out.exists():
        args.out.mkdir(parents=True, exist_ok=True)  # another process may have been faster
    _check_writable(args.out, args.out)
    model.generation_config = {
        "eos_token_id": [END],
        "diffusion_forcing": {"inner_steps": 1, "exit_threshold": 0.2, "kv": "full"},
        "lossless_wavefront": {"guess_after": 1},
    }
    try:
        log = training.train(model, config, Run(args.out), **_given(args, "until"))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("(the same command goes on from the last save)") from None
    rank, _ = training.place()
    processes.leave()
    if rank > 0:  # the first one writes and reports
        return
    folder = args.out / "checkpoint"
    checkpoint.write_whole(folder / "tokenizer.json", task_tokenizer().save)
    right = ", ".join(f"{family} {log[-1][family]:.0%}" for family in dict.fromkeys(config.families))
    print(
        f"{log[-1]['step']} steps in {log[-1]['seconds'] / 60:.1f} minutes: loss {log[-1]['loss']:.3f}, whole solution "
        f"right on {config.evaluate_on} held-out problems each: {right}\n"
        f"checkpoint: {folder}   (minirec generate --model {folder} PROMPT)"
    )


def make_checkpoint(args: argparse.Namespace) -> None:
    """Random weights in the layout of the published checkpoint, with a tokenizer that makes text of any token."""
    config = RecurrentConfig.preset(args.preset)
    if args.preset == "tiny":  # has fewer tokens than there are bytes
        tokenizer, stop = task_tokenizer(), [END]
    else:
        ids = huginn_special_ids(config.vocab_size)
        bos, eos, pad = (ids[name] for name in ("begin_text", "end_text", "pad"))
        config = dataclasses.replace(config, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
        tokenizer, stop = stand_in_tokenizer(config.vocab_size), [eos, bos, ids["end_turn"]]
    path = args.path.resolve()  # "." is another folder afterwards
    checkpoint.make_random(
        config,
        path,
        shards=args.shards,
        dtype=getattr(torch, args.dtype),
        seed=args.seed,
        generation_config={"eos_token_id": stop},
    )
    checkpoint.write_whole(path / "tokenizer.json", tokenizer.save)
    if args.preset != "tiny":
        special = {f"{name}_token": tokenizer.id_to_token(i) for name, i in [("bos", bos), ("eos", eos), ("pad", pad)]}
        values = special | {"chat_template": HUGINN_TEMPLATE, "model_max_length": config.block_size}
        checkpoint.write_json(path / "tokenizer_config.json", values)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    print(f"{args.path}: {readable(size)} of random weights   (minirec info {args.path})")


def info(args: argparse.Namespace) -> None:
    """What a model is, and what of it fits in memory: from its config, and from the headers of files that are there."""
    note, files = "", {}
    if "preset" in args:
        name, config = args.preset, RecurrentConfig.preset(args.preset)
    else:
        folder = checkpoint.locate(args.model, **_given(args, "revision"), weights=False)
        name, config = args.model, checkpoint.read_config(folder)
        note = checkpoint.read_json(folder / "config.json").get("weights", "")
        if any(folder.glob("*.safetensors")):
            stored = checkpoint.read_headers(folder, config).values()
            files = {tensor.file: tensor.file.stat().st_size for tensor in stored}
            formats = "/".join(sorted({str(checkpoint.NUMBER_FORMATS[t.dtype])[len("torch.") :] for t in stored}))
    with torch.device("meta"):  # shapes without memory
        parameters = _parameters(RecurrentDepthLM(config))
    r, dtypes = config.mean_recurrence, (torch.float32, torch.bfloat16)
    layers = config.n_layers_in_prelude, config.n_layers_in_recurrent_block, config.n_layers_in_coda
    print(f"""{name}
  layers           prelude {layers[0]}, recurrent block {layers[1]}, coda {layers[2]}
  width            {config.n_embd} in {config.n_heads} heads, MLP {config.intermediate_size}
  vocabulary       {config.vocab_size} tokens ({config.padded_vocab_size} rows)
  context          {config.block_size} tokens
  default depth    {r} recurrence steps: {config.effective_depth} layers deep
  parameters       {parameters:,}""")
    if files:
        print(f"  on disk          {readable(sum(files.values()))} in {len(files)} file(s), {formats}")
    if note:
        print(f"  weights          {note}")
    print(f"""
  {"":<34}{"float32":>12}{"bfloat16":>12}""")
    weights = [parameters * dtype.itemsize for dtype in dtypes]
    policies = [("full", r), *(("shared", 2**i) for i in range(r.bit_length()) if 2**i < min(r, 32))]
    tokens = {
        f"KV of a token, {kv}, {slots} slot(s)": [bytes_per_token(config, r, kv, slots, dtype) for dtype in dtypes]
        for kv, slots in policies
    }
    for what, sizes in {"weights": weights, **tokens}.items():
        print(f"  {what:<34}" + "".join(f"{readable(size):>12}" for size in sizes))
    for what, memory in _memories(args).items():
        print(
            f"\n  tokens that fit in {what} with the weights (a pass needs some memory too), and slots of the context"
        )
        for policy, sizes in tokens.items():
            fits = [max(0, memory - w) // size for w, size in zip(weights, sizes, strict=True)]
            cells = (f"{n:,} = {n // config.block_size:,} slots" for n in fits)
            print(f"  {policy:<34}" + "".join(f"{cell:>28}" for cell in cells))


def _memories(args: argparse.Namespace) -> dict[str, int]:
    """Bytes of the memories that `info` was asked about: what it is called -> bytes."""
    found = {readable(args.memory): args.memory} if "memory" in args else {}
    if "device" in args:
        free = machine.free_memory(args.device)
        if free is None:
            raise ValueError(f"what is free on {str(args.device)!r} cannot be seen; say it with --memory")
        found[f"the {readable(free)} free on {args.device}"] = free
    return found


def _given(args: argparse.Namespace, *names: str) -> dict:
    """Those of the options that were given; what is left out keeps the library's default."""
    return {name: getattr(args, name) for name in names if name in args}


def _text(source: Callable[[], str]) -> str:
    """What somebody typed or piped; bytes that are no text are a ValueError."""
    try:
        text = source()
        text.encode()  # Python lets other bytes through as halves of characters
    except UnicodeError:
        raise ValueError("the prompt is not UTF-8") from None
    return text


def _encode(tokenizer: Tokenizer, text: str, begin: int | None) -> list[int]:
    """Ids of a prompt, the begin token first if there is one; a word that would be lost is an error."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if not encoding.ids:
        raise ValueError("the prompt is empty")
    lost = getattr(tokenizer.model, "unk_token", None)  # what a word-level tokenizer puts for unknown words
    pieces = ((i, text[start:end]) for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True))
    unknown = [repr(p) for i, p in pieces if lost is not None and i == tokenizer.token_to_id(lost) and p != lost]
    if unknown:
        raise ValueError(f"the tokenizer does not know {', '.join(dict.fromkeys(unknown))}; see its tokenizer.json")
    return ([] if begin is None else [begin]) + encoding.ids


def _check_writable(folder: Path, path: Path) -> None:
    """Find out before the work, not after it, that its result cannot be written to path in this folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    if path != folder and path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")


def _parameters(model: RecurrentDepthLM) -> int:
    return sum(p.numel() for p in model.parameters())


def _device(text: str) -> torch.device:
    try:
        torch.zeros(1, device=text).item()  # is it there, and does it compute?
    except Exception as error:  # every backend has its own
        raise argparse.ArgumentTypeError(f"{text!r} is not to be had here: {str(error).splitlines()[0]}") from None
    return torch.device(text)


def _whole(low: int, high: int = 2**32 - 1):
    def whole_number(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} to {high}")
        return int(text)

    return whole_number


def _memory(text: str) -> int:
    units = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    units |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
    match = re.fullmatch(r"([0-9.]+) *([A-Za-z]*)", text)
    if not match or match[2] not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 24GB or 22.5GiB")
    return int(float(match[1]) * units[match[2]])


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after every option, and examples printed as they are written."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # one line, by `main`, instead of the usage and a line


ABSENT = argparse.SUPPRESS  # not in the namespace unless given: the library's default, which the help states
MODEL = ("--model", str, "tiny", "'tiny' (shipped), a folder, or the id of a Hugging Face repository")
REVISION = ("--revision", str, ABSENT, "branch, tag or commit of a Hugging Face repository (default: main)")
THREADS = ("--threads", _whole(1), ABSENT, "CPU threads (default: PyTorch's choice)")
DEVICE = ("--device", _device, "cpu", "cpu, cuda, cuda:1, mps, ...")
DEPTH = [
    ("--num-steps", int, ABSENT, "recurrence steps of a token, r (default: the checkpoint's mean_recurrence)"),
    (
        "--guess-after",
        int,
        ABSENT,
        "lossless: depth of a guess that starts the next token (default: the checkpoint's, else 4)",
    ),
    ("--inner-steps", int, ABSENT, "diffusion: recurrence steps an outer step, r' (default: the checkpoint's, else 4)"),
    ("--exit-threshold", float, ABSENT, "diffusion: freeze what moves less (default: the checkpoint's, else 0.03)"),
]
DEMO = [
    ("--problems", _whole(1), 20, "how many problems"),
    ("--seed", _whole(0), 0, "which problems"),
    ("--out", Path, Path("wavefront.png"), "where the picture of a wavefront goes"),
    ("--threads", _whole(1), 1, "CPU threads; the shipped model is too small to share"),
]
GENERATE = [
    ("--sampler", list(SAMPLERS), "diffusion", "how to decode"),
    ("--criterion", list(adaptive_exit.CRITERIA), ABSENT, "adaptive: when a token is done (default: latent-diff)"),
    ("--threshold", _number, ABSENT, "adaptive: below it, a token is done (default: the criterion's)"),
    ("--draft-steps", int, ABSENT, "speculative: depth of a draft (default: 4)"),
    ("--lookahead", int, ABSENT, "speculative: tokens of a draft (default: 4)"),
    ("--max-new-tokens", int, 128, "stop here at the latest"),
    ("--temperature", float, 0.0, "0 is greedy, and does not look at the next three options"),
    ("--top-k", int, ABSENT, "sample from the k likeliest (default: off)"),
    ("--top-p", float, ABSENT, "sample from the smallest set that is this probable (default: off)"),
    ("--min-p", float, ABSENT, "sample from those with this share of the likeliest one's probability (default: off)"),
    ("--repetition-penalty", float, ABSENT, "above 1: avoid what was said (default: off)"),
    ("--seed", _whole(0), 0, "of the initial states and of sampling"),
    ("--kv", ["full", "shared"], ABSENT, "keep the KV of every recurrence step, or share (default: the sampler's)"),
    ("--kv-slots", int, 1, "slots of --kv shared"),
    ("--dtype", list(checkpoint.DTYPES), ABSENT, "of the weights (default: the checkpoint's)"),
]
TRAIN = {
    "steps": "optimiser steps",
    "batch_tokens": "tokens of a batch, padding included",
    "learning_rate": "its highest value",
    "warmup": "fraction of the steps, the first, in which the learning rate grows from zero",
    "decay": "fraction of the steps, the last, in which it falls to zero",
    "joining": "fraction of the steps, the first, over which the families join one by one",
    "curriculum": "fraction of the steps over which the levels of a family that has joined join one by one",
    "hardest": "share of the problems that are of the hardest level joined; the rest are of all levels alike",
    "early": "share of the problems given as many recurrence steps as they need or fewer",
    "random": "share of the problems whose depth is drawn by the paper's rule, whatever they need",
    "extra": "mean number of steps that the other problems get beyond those they need",
    "staged": "ask a problem that gets too few steps for the stage reached by then, not for its answer",
    "reads": "at how many of its steps a row is read and asked for what it has reached",
    "weight_decay": "of AdamW",
    "gradient_clip": "largest norm of the gradient",
    "seed": "of weights, problems, depths and initial states",
    "families": "kinds of problems, taken in turn, in the order in which they join: " + ", ".join(tasks.FAMILIES),
    "log_every": "steps between the lines of log.csv",
    "evaluate_every": "steps between evaluations",
    "evaluate_on": "held-out problems of an evaluation, of each family",
    "save_every": "steps between saves; a run that was stopped goes on from the last one",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="minirec", description=minirec.__doc__, epilog="Start with: minirec demo", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"minirec {minirec.__version__}")
    top.set_defaults(run=lambda args: top.print_help())
    commands = top.add_subparsers(metavar="COMMAND")

    def command(run, what: str, example: str, options: list) -> argparse.ArgumentParser:
        shape = dict(formatter_class=_Help, allow_abbrev=False, epilog=f"example:\n  minirec {example}")
        p = commands.add_parser(
            run.__name__.replace("_", "-"), help=what, description=what[0].upper() + what[1:] + ".", **shape
        )
        p.set_defaults(run=run)
        for name, kind, default, text in options:
            kind = {"choices": kind} if isinstance(kind, list) else {"type": kind}
            p.add_argument(name, default=default, help=text, **kind)
        return p

    command(
        demo, "solve held-out problems autoregressively and by two wavefronts, side by side",
        "demo --problems 50 --exit-threshold 1", [MODEL, *DEMO, *DEPTH],
    )  # fmt: skip
    p = command(
        generate, "continue a prompt; the text appears as its tokens freeze",
        "generate --stats 'Mia has 12 pears. First Mia buys 5 more pears. How many pears does Mia have?'",
        [MODEL, REVISION, *GENERATE, *DEPTH, DEVICE, THREADS],
    )  # fmt: skip
    p.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    p.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help="print while tokens freeze")
    p.add_argument("--stats", action="store_true", help="at the end print tokens, passes and depth on stderr")
    p = command(
        chat, "talk with a model that has a chat template; the answers appear as their tokens freeze",
        "chat --model tomg-group-umd/huginn-0125 --dtype bfloat16",
        [REVISION, *GENERATE, *DEPTH, DEVICE, THREADS],
    )  # fmt: skip
    p.add_argument("--model", required=True, default=ABSENT, help="a folder, or the id of a Hugging Face repository")
    p.add_argument("--system", default=ABSENT, metavar="TEXT", help="what the model is told first (default: nothing)")
    p = command(
        train, "train a model on the tasks; the same command resumes a run that was stopped",
        "train --out runs/mine --steps 2000 --threads 2", [DEVICE, THREADS],
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, default=ABSENT, metavar="FOLDER", help="for log and checkpoint")
    p.add_argument("--preset", choices=PRESETS, default="tiny", help="shape of the model")
    p.add_argument(
        "--start", default=ABSENT, metavar="MODEL", help="begin with this model's weights and shape, not anew"
    )
    p.add_argument("--until", type=int, default=ABSENT, metavar="STEP", help="stop after this step (default: the last)")
    for f in dataclasses.fields(training.TrainingConfig):
        kind = {"nargs": "+"} if f.name == "families" else {"type": type(f.default)}
        kind = {"type": _whole(0)} if f.name == "seed" else kind
        kind = {"action": argparse.BooleanOptionalAction} if f.name == "staged" else kind
        p.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=TRAIN[f.name], **kind)
    p = command(
        make_checkpoint, "write random weights in the layout of the published checkpoint, for tests and timing",
        "make-checkpoint --preset huginn_3_5b --shards 4 runs/random",
        [
            ("--shards", int, 1, "files to cut the weights into"),
            ("--dtype", list(checkpoint.DTYPES), "float32", "number format of the weights"),
            ("--seed", _whole(0), 0, "of the weights"),
        ],
    )  # fmt: skip
    p.add_argument("--preset", choices=PRESETS, required=True, default=ABSENT, help="shape of the model")
    p.add_argument("path", type=Path, metavar="PATH", help="a folder that is new or empty")
    p = command(
        info, "say what a model is and what fits in memory, without reading its weights",
        "info --preset huginn_3_5b --memory 24GB",
        [
            REVISION,
            ("--device", _device, ABSENT, "what fits in its free memory (default: is not looked at)"),
            ("--memory", _memory, ABSENT, "what fits in so much, as in 24GB or 22.5GiB (default: is not looked at)"),
        ],
    )  # fmt: skip
    which = p.add_mutually_exclusive_group()
    which.add_argument("model", nargs="?", default="tiny", metavar="MODEL", help=MODEL[-1])
    which.add_argument("--preset", choices=PRESETS, default=ABSENT, help="a shape without a checkpoint")
    return top


if __name__ == "__main__":
    sys.exit(main())
