"""Text to token ids and back, through the `tokenizers` library, for the shipped model and for real checkpoints.

How a conversation is written down is said by the checkpoint too, as a template in `tokenizer_config.json`.  That of
Huginn-0125 makes a turn of special tokens and the name of who speaks, and calls the model Huginn:

    <|begin_text|><|begin_header|>user<|end_header|>

    Hello!<|end_turn|><|begin_header|>Huginn<|end_header|>

    ... here the model goes on, until it says <|end_turn|>
"""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minirec.files.checkpoint import read_json

# where the vocabulary of Huginn-0125 has its special tokens: the first six of its last 32 ids
HUGINN_SPECIAL = ["begin_text", "end_text", "begin_header", "end_header", "end_turn", "pad"]
HUGINN_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{{ '<|begin_header|>' ~ message.role ~ '<|end_header|>\\n\\n' ~ message.content | trim ~ '<|end_turn|>' }}
{%- endfor -%}
{{ '<|begin_header|>Huginn<|end_header|>\\n\\n' if add_generation_prompt }}"""


def huginn_special_ids(vocab_size: int) -> dict[str, int]:
    """Ids of the special tokens of a vocabulary that is laid out as Huginn's: of 65,536 tokens, 65,504 and on."""
    return {name: vocab_size - 32 + i for i, name in enumerate(HUGINN_SPECIAL)}


def stand_in_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer in the layout of Huginn's for checkpoints without one: text is bytes, and nothing is learned.

    Ids 0 to 255 are the bytes; special tokens are where Huginn has them; any other id reads as its number.  So what a
    model with random weights says can be seen.  ValueError for less than the 288 tokens that this needs.
    """
    if vocab_size < 256 + 32:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and 32 special tokens need at least 288")
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]  # its sign in this alphabet
    vocabulary += [f"{space}{i}" for i in range(len(vocabulary), vocab_size)]
    special = {f"<|{name}|>": i for name, i in huginn_special_ids(vocab_size).items()}
    for token, i in special.items():
        vocabulary[i] = token
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint; FileNotFoundError or ValueError that names the file if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json, without which there is no text")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer: {error}") from None


class ChatTemplate:
    """How a checkpoint writes down a conversation: messages {"role": ..., "content": ...} -> token ids.

    The template is one of jinja, as transformers has them: `chat_template` of tokenizer_config.json, or the file
    chat_template.jinja.  It comes from whoever made the checkpoint, so it runs in a sandbox.  `speaker` is the role
    of the model's own messages; `end` the special token that ends one, None if there is none.  ValueError for a
    checkpoint without a template, or with one that does not work.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.tokenizer, self.path = tokenizer, folder / "tokenizer_config.json"
        values = read_json(self.path) if self.path.exists() else {}
        source = values.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            self.path = folder / "chat_template.jinja"
            source = self.path.read_text(encoding="utf-8")
        if not isinstance(source, str):
            raise ValueError(f"{folder} has no chat template, so it is no model to chat with")
        # special tokens that the template may name; some files have them as objects
        names = {k: v["content"] if isinstance(v, dict) else v for k, v in values.items() if k.endswith("_token")}
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= names | {"raise_exception": _refuse}
        try:
            self.template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"{self.path}: the chat template is not one: {error}") from None
        self.speaker, self.end = self._look()

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, up to where the model goes on."""
        try:
            return self.template.render(messages=messages, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template may fail in any way
            raise ValueError(f"{self.path}: the chat template does not take these messages: {error}") from None

    def encode(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation, up to where the model goes on; the begin token is the template's business."""
        return self.tokenizer.encode(self.render(messages), add_special_tokens=False).ids

    def _look(self) -> tuple[str, int | None]:
        """Role and end of the model's messages: a written one has to begin as the model is asked to begin."""
        asked = [{"role": "user", "content": "?"}]
        begun = self.render(asked)
        prompt = begun[len(self.render(asked, add_generation_prompt=False)) :]
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        for role in ["assistant", *re.findall(r"\w+", prompt)]:
            try:
                whole = self.render([*asked, {"role": role, "content": "!"}], add_generation_prompt=False)
            except ValueError:
                continue  # a template may know its roles
            if whole.startswith(begun + "!"):
                rest = self.tokenizer.encode(whole[len(begun) + 1 :], add_special_tokens=False).ids
                return role, next((i for i in rest if i in special), None)
        raise ValueError(f"{self.path}: the chat template does not show who speaks for the model")


def _refuse(message: str):
    """What templates know as raise_exception."""
    raise TemplateError(message)
