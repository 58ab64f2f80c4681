"""From what people type or pipe to token ids, and the words a model knows."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import TextIO

from tokenizers import Tokenizer

from minirec.tasks import task_tokenizer

# A typical problem that the shipped model solves: shown in help texts and where a prompt has unknown words.
EXAMPLE = "Mia has 12 pears. First Mia buys 5 more pears. Then Mia gives 3 pears to Tom. How many pears does Mia have?"


def standard_input() -> TextIO:
    """Standard input; OSError if it is closed."""
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return sys.stdin


def typed(source: Callable[[], str]) -> str:
    """The text from source, without a byte order mark; ValueError if its bytes are not UTF-8, OSError if unreadable."""
    try:
        text = source()
        text.encode()  # Python lets other bytes through as halves of characters
    except UnicodeError:
        raise ValueError("the prompt is not UTF-8") from None
    except OSError as error:
        raise OSError(f"standard input: {error.strerror or error}") from None
    return text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")


def encode(tokenizer: Tokenizer, text: str, begin: int | None, model: str) -> list[int]:
    """Ids of a raw prompt, with the begin token first if the model has one.

    Special tokens in the text count as such, and a begin token that is typed first is not added again.  ValueError
    for an empty prompt, a begin token anywhere else, or a word that the tokenizer would lose.
    """
    _refuse_unknown(tokenizer, text, model)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ValueError("the prompt is empty")
    if begin is None:
        return ids
    if begin in ids[1:]:
        token = tokenizer.id_to_token(begin)
        raise ValueError(f"the prompt has {token!r} after its beginning; it comes first, and minirec puts it there")
    return ids if ids[0] == begin else [begin, *ids]


def check_message(tokenizer: Tokenizer, text: str, model: str) -> str:
    """The text, if it can be a message of a conversation.

    ValueError for a word that the tokenizer would lose, and for a special token: the chat template writes those.
    """
    _refuse_unknown(tokenizer, text, model)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    tokens = tokenizer.encode(text, add_special_tokens=False).tokens
    if found := [token for token in dict.fromkeys(tokens) if token in special]:
        raise ValueError(f"a message has no special tokens, and {found[0]!r} is one: the chat template adds them")
    return text


def _refuse_unknown(tokenizer: Tokenizer, text: str, model: str) -> None:
    """ValueError for words that a word-level tokenizer would lose; it says which words there are."""
    lost = getattr(tokenizer.model, "unk_token", None)  # the token for unknown words
    if lost is None:
        return
    encoding = tokenizer.encode(text, add_special_tokens=False)
    pieces = ((i, text[start:end]) for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True))
    unknown = dict.fromkeys(repr(p) for i, p in pieces if i == tokenizer.token_to_id(lost) and p != lost)
    if unknown:
        name = "" if model == "tiny" else f" {shlex.quote(model)}"
        hint = f"`minirec info --words{name}` lists the words it knows"
        if knows_the_tasks(tokenizer):
            hint += f". Try: minirec generate{name and ' --model'}{name} '{EXAMPLE}'"
        raise ValueError(f"the model does not know {', '.join(unknown)}; {hint}")


def knows_the_tasks(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the vocabulary of `minirec.tasks`."""
    return tokenizer.get_vocab() == task_tokenizer().get_vocab()
