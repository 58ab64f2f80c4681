"""`minirec serve`: the batching engine behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import ipaddress
import os
from pathlib import Path

from minirec.config import number
from minirec.continuous_batching import MODES, Engine
from minirec.files import checkpoint
from minirec.files.tokenizer import ChatTemplate, read_tokenizer
from minirec.tools.cli.options import (
    ABSENT,
    DEVICE,
    MODEL,
    REVISION,
    REVISION_NEEDS,
    THREADS,
    Needs,
    Option,
    check_effect,
    count,
    given,
    new_command,
    real,
    whole_number,
)
from minirec.tools.cli.terminal import complain

KEY = "MINIREC_API_KEY"
PER_REQUEST = ("max_prompt_tokens", "max_tokens")
NEEDS = [
    Needs(("guess_after",), "--mode wavefront", lambda args: args.mode == "wavefront"),
    REVISION_NEEDS,
]


def add_parser(commands) -> None:
    p = new_command(
        commands,
        run,
        "serve",
        "answer OpenAI's completions and chat completions over HTTP, from one batching engine",
        "tiny --port 8000",
        [
            REVISION,
            Option("--host", str, "127.0.0.1", "address to listen at; any but this machine's own needs an API key"),
            Option("--port", whole_number(0, 65535), 8000, "0 for any that is free"),
            Option("--api-key", str, ABSENT, f"clients must send it (default: the environment variable {KEY}, if set)"),
            Option("--name", str, ABSENT, "the model's name for clients (default: MODEL, of a folder its last part)"),
            Option("--mode", list(MODES), "depth", "of the engine"),
            Option("--slots", count, 8, "requests that run at once"),
            Option("--queue", whole_number(0, 10**6), 256, "requests that may wait; further ones get status 429"),
            Option("--max-length", count, ABSENT, "tokens of a request, prompt and answer (default: at most 512)"),
            Option(
                "--num-steps", count, ABSENT, "recurrence steps, at most (default: the checkpoint's mean_recurrence)"
            ),
            Option(
                "--guess-after", count, ABSENT, "mode wavefront: depth of a guess (default: the checkpoint's, else 1)"
            ),
            Option("--max-prompt-tokens", whole_number(1), ABSENT, "of a request (default: as many as fit)"),
            Option("--max-tokens", whole_number(1), ABSENT, "new tokens of a request (default: as many as fit)"),
            Option("--max-body", whole_number(1), 2**20, "bytes of a request"),
            Option("--max-seconds", real, 600, "of a request, from its first byte to the last of its answer"),
            Option("--dtype", list(checkpoint.DTYPES), ABSENT, "of the weights (default: the checkpoint's)"),
            DEVICE,
            THREADS,
        ],
    )
    p.add_argument("model", nargs="?", default="tiny", metavar="MODEL", help=MODEL.help)


def run(args: argparse.Namespace) -> None:
    """Load the model, then serve until SIGTERM."""
    try:
        from minirec.tools.serve import process
    except ModuleNotFoundError as error:
        raise ValueError(f"minirec serve needs the package {error.name}: pip install 'minirec[serve]'") from None
    check_effect(args, NEEDS)
    key = getattr(args, "api_key", os.environ.get(KEY)) or None
    if key is None and not is_loopback(args.host):
        raise ValueError(f"--host {args.host} can be reached from other machines: it needs --api-key, or {KEY}")
    most = {name.removeprefix("max_"): n for name, n in given(args, *PER_REQUEST).items()}
    seconds = number("--max-seconds", args.max_seconds, above=0)
    limits = process.Limits(body=args.max_body, seconds=seconds, **most)
    with process.bound(args.host, args.port) as sock:
        folder = checkpoint.locate(args.model, **given(args, "revision"))
        tokenizer = read_tokenizer(folder)
        try:
            template = ChatTemplate(folder, tokenizer)
        except ValueError as error:
            template = None
            complain(f"minirec: no chat completions: {error}")
        model = checkpoint.load(args.model, device=args.device, **given(args, "dtype", "revision"))
        guess_after = model.generation_config.get("lossless_wavefront", {}).get("guess_after", 1)
        options = {"max_length": min(512, model.config.block_size), "guess_after": guess_after}
        options |= given(args, "max_length", "num_steps", "guess_after")
        engine = Engine(model, args.slots, mode=args.mode, **options)
        name = getattr(args, "name", Path(args.model).name if Path(args.model).exists() else args.model)
        process.serve(sock, engine, tokenizer, template, name, limits, args.queue, key)


def is_loopback(host: str) -> bool:
    """Whether an address to listen at can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
