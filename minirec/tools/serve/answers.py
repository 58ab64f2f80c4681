"""From tokens to answers: text without half characters, stop strings, log-probabilities, and OpenAI's objects."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from tokenizers import Tokenizer

from minirec.files.tokenizer import Detokenizer
from minirec.tools.serve.worker import Note


class StopStrings:
    """Cuts a text, which comes in pieces of any size, before the first stop string that is complete.

    Of two that end at the same character the longer one counts.  The end of the text is held back while it may be the
    beginning of a stop string, so where a text is cut does not depend on the pieces.
    """

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.found = False
        self._held = ""

    def add(self, text: str) -> str:
        """The text that no stop string can take back any more; nothing after one has been found."""
        if self.found:
            return ""
        text = self._held + text
        if ends := [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        longest = max(map(len, self.stops), default=1) - 1
        start = next(
            (
                i
                for i in range(max(0, len(text) - longest), len(text))
                if any(s.startswith(text[i:]) for s in self.stops)
            ),
            len(text),
        )
        self._held = text[start:]
        return text[:start]

    def end(self) -> str:
        """What was held back, after the end of the text."""
        text, self._held = self._held, ""
        return text


class Token(NamedTuple):
    """A token of an answer as a client sees it: its own text, its place in the whole text, and what was noted of it."""

    text: str
    offset: int
    note: Note | None


class Answer:
    """One choice of an answer, while its tokens come.

    notes: by position, if the client wants log-probabilities; start: the position of the first token.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str], stop_tokens: set[int], notes: dict[int, Note] | None,
                 start: int):  # fmt: skip
        self.tokenizer, self.stop_tokens, self.notes, self.next = tokenizer, stop_tokens, notes, start
        self.text = Detokenizer(tokenizer)
        self.cut = StopStrings(stops)
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.finish_reason: str | None = None
        self.echoed: list[int] = []
        self._seen = 0  # characters that the tokens so far have made certain
        self._out = 0  # of them, those that are released
        self._released: list[str] = []
        self._waiting: deque[Token] = deque()

    def echo(self, ids: list[int], text: str) -> None:
        """Begin with the prompt: its ids and its text."""
        self.echoed = ids
        self._seen = len(text)
        self._release(text)

    def shown(self, token: int) -> str:
        """A token's own text."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def add(self, token: int, depth: int, last: bool) -> None:
        """The next token; last: the engine has ended this answer with it."""
        if self.finish_reason is not None:
            return
        self._echo_notes()
        self.tokens.append(token)
        self.depths.append(depth)
        stopped = token in self.stop_tokens
        new = "" if stopped else self.text.add(token)
        if self.notes is not None:
            self._note(self.next, token, new, self._seen)
            self.next += 1
        if last:
            new += self.text.end()
        self._seen += len(new)
        self._release(self.cut.add(new))
        if self.cut.found or last:
            self.finish_reason = "stop" if stopped or self.cut.found else "length"
            self._release(self.cut.end())

    def end_without_tokens(self) -> None:
        """The client wants no new token, only its own prompt."""
        self._echo_notes()
        self.finish_reason = "length"

    def _echo_notes(self) -> None:
        """The echoed tokens, once the engine has noted them: before the first new one."""
        place, at = Detokenizer(self.tokenizer), 0
        for i, token in enumerate(self.echoed if self.notes is not None else []):
            new = place.add(token)
            self._note(i, token, new, at)
            at += len(new)
        self.echoed = []

    def _note(self, position: int, token: int, new: str, at: int) -> None:
        """Keep a token, with which the text after `at` has become certain, until its own text is released."""
        own = self.shown(token)
        before = len(new) - len(own) if new.endswith(own) else 0  # what waited for it, and the space before a word
        self._waiting.append(Token(own, at + before, (self.notes or {}).get(position)))

    def _release(self, text: str) -> None:
        self._out += len(text)
        self._released.append(text)

    def take(self) -> tuple[str, list[Token]]:
        """The text that is new since the last call, and its tokens; a token follows its text, so none runs ahead."""
        text, tokens = "".join(self._released), []
        self._released.clear()
        over = self.finish_reason is not None and not self.cut.found
        while self._waiting and (over or self._waiting[0].offset < self._out):
            tokens.append(self._waiting.popleft())
        return text, tokens


def completion_logprobs(tokenizer: Tokenizer, tokens: list[Token]) -> dict:
    """OpenAI's log-probabilities of a completion: four lists."""
    best: list[dict | None] = []
    for token in tokens:
        if token.note is None:  # the first token of an echoed prompt
            best.append(None)
            continue
        chosen = {token.text: token.note.logprob}
        # where two tokens have the same text, the likelier one counts
        others = {tokenizer.decode([i], skip_special_tokens=False): p for i, p in reversed(token.note.likeliest)}
        best.append(chosen | others)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [None if token.note is None else token.note.logprob for token in tokens],
        "top_logprobs": best,
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: list[Token]) -> dict:
    """OpenAI's log-probabilities of a chat message: a list with an object for each token."""

    def shown(text: str, logprob: float) -> dict:
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else its bytes are those of no text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    return {
        "content": [
            shown(token.text, token.note.logprob)
            | {
                "top_logprobs": [
                    shown(tokenizer.decode([i], skip_special_tokens=False), p) for i, p in token.note.likeliest
                ]
            }
            for token in tokens
            if token.note is not None
        ],
        "refusal": None,
    }


class Writer:
    """Writes the objects of one request's answer; id and created are the request's."""

    def __init__(
        self, chat: bool, id: str, created: int, model: str, logprobs: bool, usage: bool, tokenizer: Tokenizer
    ):
        self.chat, self.logprobs, self.usage, self.tokenizer = chat, logprobs, usage, tokenizer
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{id}", "created": created, "model": model}

    def _choice(self, index: int, said: dict, tokens: list[Token], finish_reason: str | None) -> dict:
        logprobs = None
        if self.logprobs:
            logprobs = (chat_logprobs if self.chat else completion_logprobs)(self.tokenizer, tokens)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def whole(self, answers: list[Answer], usage: dict) -> dict:
        """The answer to a request without a stream."""
        choices = []
        for i, answer in enumerate(answers):
            text, tokens = answer.take()
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append(self._choice(i, said, tokens, answer.finish_reason))
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict], usage: dict | None = None) -> dict:
        """An event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        counted = {"usage": usage} if self.usage else {}
        return {**self.head, "object": kind, "choices": choices, **counted}

    def opening(self, index: int) -> dict:
        """The first event of a chat choice: who speaks."""
        return self._choice(index, {"delta": {"role": "assistant", "content": ""}}, [], None) | {"logprobs": None}

    def news(self, index: int, answer: Answer) -> dict | None:
        """A choice of an event: what an answer has that is new; None for nothing."""
        text, tokens = answer.take()
        if not (text or tokens or answer.finish_reason):
            return None
        said = {"delta": {"content": text} if text or tokens else {}} if self.chat else {"text": text}
        choice = self._choice(index, said, tokens, answer.finish_reason)
        return choice if tokens else choice | {"logprobs": None}


def usage_of(prompts: list[list[int]], answers: list[Answer]) -> dict:
    """Tokens that went in and came out, and the mean recurrence depth of the latter."""
    asked, made = sum(map(len, prompts)), sum(len(answer.tokens) for answer in answers)
    depths = [depth for answer in answers for depth in answer.depths]
    mean = sum(depths) / len(depths) if depths else None
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made, "mean_depth": mean}
