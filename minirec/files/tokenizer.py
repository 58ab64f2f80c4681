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

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minirec.files.json_files import LARGEST, read_json
from minirec.files.machine import one_line
from minirec.files.sandbox import Refused, Sandbox
from minirec.files.writing import blaming

# where the vocabulary of Huginn-0125 has its special tokens: the first six of its last 32 ids
HUGINN_SPECIAL = ["begin_text", "end_text", "begin_header", "end_header", "end_turn", "pad"]
LARGEST_TEMPLATE = 2**20  # characters; published ones have thousands
TEMPLATE_LIMITS = {"seconds": 2, "memory": 2**30}  # for each text; macOS has no limit of memory
TOKENIZER_LIMITS = {"seconds": 30, "memory": 2**32}
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # one byte of a character that is not in the vocabulary
SPECIAL_TOKEN = re.compile(r"(?!add_)\w+_token")  # its key in tokenizer_config.json
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
    """The tokenizer of a checkpoint, without the truncation and padding that its file may prescribe.

    It is tried in a process of its own first: some files make the library abort, or never end.  FileNotFoundError,
    OSError or ValueError that names the file if there is none that works.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json, without which there is no text")
    with blaming(path):
        open(path, "rb").close()
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is not a tokenizer: {path.stat().st_size:,} bytes is too much")
    try:
        Sandbox(**TOKENIZER_LIMITS).ask("tokenizer", str(path.resolve()))
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer: {one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Detokenizer:
    """Tokens in, one by one; text out, as soon as no later token can change it.

    What `add` has returned so far, and then `end`, is together what the tokenizer makes of all tokens at once.  The
    last character waits while it may be half of one, and a run of byte tokens waits for its end: it is text only as a
    whole.  Only the latest tokens are decoded again, so a text of n tokens takes time in proportion to n.
    """

    LONGEST, KEPT = 64, 16  # tokens that are decoded again, and how many stay when there are more

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._recent: list[int] = []
        self._given = 0  # characters of their text that have been returned

    def add(self, token: int) -> str:
        """The text that has become certain with this token; it may be empty."""
        piece = self.tokenizer.id_to_token(token)
        if piece is None or token in self._special:  # no text, and no end of a run of bytes
            return ""
        self._recent.append(token)
        if BYTE_TOKEN.fullmatch(piece):
            return ""
        text = self.tokenizer.decode(self._recent)
        certain = max(self._given, len(text) - text.endswith("\N{REPLACEMENT CHARACTER}"))
        new, self._given = text[self._given : certain], certain
        if len(self._recent) > self.LONGEST and certain == len(text):
            kept = self._recent[-self.KEPT :]
            if (again := self.tokenizer.decode(kept)).strip():  # a decoder may treat the first word differently
                self._recent, self._given = kept, len(again)
        return new

    def end(self) -> str:
        """The rest, after the last token."""
        text = self.tokenizer.decode(self._recent)
        new, self._given = text[self._given :], len(text)
        return new


class ChatTemplate:
    """How a checkpoint writes down a conversation: messages {"role": ..., "content": ...} -> token ids.

    The template is one of jinja, and renders as in transformers: the file chat_template.jinja, or `chat_template` of
    tokenizer_config.json, of several the one named "default".  It comes from whoever made the checkpoint, so it runs
    in a sandbox, with 2 seconds and 1 GiB for each text.  `speaker` is the role of the model's own messages; `end` the
    special token that ends one, None if there is none.  ValueError for a checkpoint without a template, or with one
    that does not work.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.tokenizer, self.path = tokenizer, folder / "tokenizer_config.json"
        self.source, self.special = self._read(folder)
        self.sandbox = Sandbox(**TEMPLATE_LIMITS)
        try:
            self.sandbox.ask("check", self.source)
        except Refused as error:
            raise ValueError(f"{self.path}: the chat template is not one: {error}") from None
        self.speaker, self.end = self._look()

    def _read(self, folder: Path) -> tuple[str, dict[str, str]]:
        """The source of the template, and the special tokens that it may name."""
        values = read_json(self.path) if self.path.exists() else {}
        special = {}
        for key in filter(SPECIAL_TOKEN.fullmatch, values):
            token = values[key]["content"] if _is_token(values[key]) else values[key]
            if isinstance(token, str):
                special[key] = token
            elif token is not None and not isinstance(token, bool):  # "add_bos_token": true is no token
                raise ValueError(f"{self.path}: {key} is {one_line(repr(token))}; it must be a token or null")
        source = values.get("chat_template")
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if _is_named(t)}
            if "default" not in named:
                names = ", ".join(one_line(repr(name)) for name in named) or "none"
                raise ValueError(f"{self.path}: no chat template is named 'default' (there are: {names})")
            source = named["default"]
        if (folder / "chat_template.jinja").exists():
            self.path = folder / "chat_template.jinja"
            try:
                source = self.path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"{self.path} is not UTF-8") from None
        if not isinstance(source, str):
            raise ValueError(f"{folder} has no chat template, so it is no model to chat with")
        if len(source) > LARGEST_TEMPLATE:
            raise ValueError(
                f"{self.path}: the chat template has {len(source):,} characters; {LARGEST_TEMPLATE:,} at most"
            )
        return source, special

    def render(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
    ) -> str:
        """The text of a conversation, up to where the model goes on; tools and documents as in transformers."""
        told = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = dict(messages=told, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt)
        try:
            return self.sandbox.ask("render", [self.source, self.special | variables])
        except (Refused, TypeError) as error:  # TypeError: a message with what JSON does not have
            reason = f"the chat template does not take these messages: {one_line(error)}"
            raise ValueError(f"{self.path}: {reason}") from None

    def encode(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation, up to where the model goes on; the begin token is the template's business."""
        return self._ids(self.render(messages))

    def _ids(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # Rust's, no Exception
                raise ValueError(f"the tokenizer does not take the conversation: {one_line(error)}") from None
            raise

    def _look(self) -> tuple[str, int | None]:
        """Role and end of the model's messages: a written one has to begin as the model is asked to begin."""
        asked = [{"role": "user", "content": "?"}]
        begun = self.render(asked)
        prompt = begun[len(self.render(asked, add_generation_prompt=False)) :]
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        for role in dict.fromkeys(["assistant", *re.findall(r"\w+", prompt)[:20]]):
            try:
                whole = self.render([*asked, {"role": role, "content": "!"}], add_generation_prompt=False)
            except ValueError:
                continue  # a template may know its roles
            if whole.startswith(begun + "!"):
                return role, next((i for i in self._ids(whole[len(begun) + 1 :]) if i in special), None)
        raise ValueError(f"{self.path}: the chat template does not show who speaks for the model")


def _is_named(value) -> bool:
    """Is this one of several templates?"""
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _is_token(value) -> bool:
    """Is this a token as an object, as AddedToken is written?"""
    return isinstance(value, dict) and isinstance(value.get("content"), str)
