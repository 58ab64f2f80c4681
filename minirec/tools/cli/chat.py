"""`minirec chat`: a conversation with a model that has a chat template."""

from __future__ import annotations

import argparse

from minirec.decoding import stop_tokens
from minirec.files import checkpoint
from minirec.files.tokenizer import ChatTemplate, read_tokenizer
from minirec.tools.cli.options import ABSENT, DEVICE, REVISION, THREADS, given, new_command
from minirec.tools.cli.prompts import check_message, standard_input, typed
from minirec.tools.cli.samplers import DECODING, SAMPLERS, load, sampler_options
from minirec.tools.cli.terminal import Stream, complain, show


def add_parser(commands) -> None:
    p = new_command(
        commands,
        run,
        "chat",
        "talk with a model that has a chat template; the answers appear as their tokens freeze",
        "--model tomg-group-umd/huginn-0125 --dtype bfloat16",
        [REVISION, *DECODING, DEVICE, THREADS],
    )
    p.add_argument("--model", required=True, default=ABSENT, help="a folder, or the id of a Hugging Face repository")
    p.add_argument("--system", default=ABSENT, metavar="TEXT", help="a system message to begin with (default: none)")


def run(args: argparse.Namespace) -> None:
    """A line in, an answer out as its tokens freeze, and again."""
    options = sampler_options(args)
    folder = checkpoint.locate(args.model, **given(args, "revision"), weights=False)
    config, tokenizer = checkpoint.read_config(folder), read_tokenizer(folder)
    template = ChatTemplate(folder, tokenizer)
    beginning = []
    if "system" in args:
        beginning = [{"role": "system", "content": check_message(tokenizer, args.system, args.model)}]
    by_hand = standard_input().isatty()
    model = load(args)
    stop = stop_tokens(model) | ({template.end} - {None})
    if by_hand:
        show("/new starts another conversation, /quit ends; Ctrl-C ends an answer")
    messages = list(beginning)
    while True:
        try:
            line = typed(lambda: input("> " if by_hand else "")).strip()
        except EOFError:
            line = "/quit"
            show(end="\n" if by_hand else "")
        if line == "/quit":
            break
        if line == "/new":
            messages = list(beginning)
        if not line or line == "/new":
            continue
        try:
            check_message(tokenizer, line, args.model)
        except ValueError as error:
            if not by_hand:
                raise
            complain(f"minirec: {error}")  # and the conversation goes on
            continue
        prompt = template.encode([*messages, {"role": "user", "content": line}])
        room = min(args.max_new_tokens, config.block_size - len(prompt))
        if room < 1:
            full = f"{len(prompt)} tokens of conversation leave no room in the context of {config.block_size}"
            complain(f"minirec: {full}; /new starts another one")
            continue
        text = Stream(tokenizer)
        try:
            SAMPLERS[args.sampler](model, prompt, room, on_token=text.add, stop_tokens=stop, **options)
        except KeyboardInterrupt:
            pass  # what was said until then counts
        text.end()
        answer = {"role": template.speaker, "content": tokenizer.decode(text.tokens)}
        messages += [{"role": "user", "content": line}, answer]
