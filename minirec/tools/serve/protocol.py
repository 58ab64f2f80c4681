"""What a client asks: the fields of OpenAI's completions and chat completions, checked, and this server's own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from minirec.config import flag, number, one_of, shown, whole
from minirec.continuous_batching import Engine
from minirec.files.tokenizer import ChatTemplate
from minirec.noise import as_seed
from minirec.token_choice import TokenChoice
from minirec.tools.cli.prompts import check_message, encode

MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS = 16, 1000, 20

# what a request may say about sampling, and what it says by saying nothing
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": None, "repetition_penalty": None}
DEPTH = {"num_steps", "threshold", "sampler"}
COMMON = {"model", "max_tokens", "n", "stream", "stream_options", "stop", "seed", *SAMPLING, *DEPTH}
COMPLETION = {"prompt", "echo", "logprobs"}
CHAT = {"messages", "max_completion_tokens", "logprobs", "top_logprobs"}
WITHOUT_EFFECT = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
# OpenAI's fields that this server has no code for, with the values that ask for nothing
UNSUPPORTED = {
    "best_of": (1,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "parallel_tool_calls": (True, False), "modalities": (["text"],),
}  # fmt: skip
SAMPLERS = {  # of an engine's mode: without a threshold, and with one
    "static": ("autoregressive", "adaptive"),
    "sequence": ("autoregressive", "adaptive"),
    "depth": ("autoregressive", "adaptive"),
    "wavefront": ("lossless", "diffusion"),
}
DEFAULT_THRESHOLD = 0.03  # of both samplers that have one


class Problem(Exception):
    """An error that the client is told of: an HTTP status, one sentence, and OpenAI's words for the kind."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_dict(self) -> dict:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(kw_only=True)
class Limits:
    """What one request may ask: tokens of a prompt, new tokens, bytes of a body, seconds, and choices."""

    prompt_tokens: int = 2**31
    tokens: int = 2**31
    body: int = 2**20
    seconds: float = 600.0
    choices: int = 64


@dataclass(kw_only=True)
class Ask:
    """A request that has been checked.

    prompts: token ids; texts: the same as text, for `echo`; n: choices for each; logprobs: how many likeliest tokens to
    report beside the chosen one, None for no log-probabilities; options: for `Engine.submit`, but for the seed.
    """

    chat: bool
    prompts: list[list[int]]
    texts: list[str]
    n: int
    max_tokens: int
    stops: list[str]
    seed: int
    stream: bool
    usage: bool
    logprobs: int | None
    echo: bool
    options: dict

    def seed_of(self, choice: int) -> int:
        """The seed of one of the n choices of a prompt: the request's, counted on, as a 64-bit number."""
        return (self.seed + choice + 2**63) % 2**64 - 2**63


class Protocol:
    """Reads requests for the model of an engine; name: what clients call it."""

    def __init__(self, name: str, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None, limits: Limits):
        self.name, self.tokenizer, self.template, self.limits = name, tokenizer, template, limits
        self.config, self.stop_tokens = engine.model.config, set(engine.grid.stop_tokens)
        self.max_length, self.num_steps, self.mode = engine.max_length, engine.r, engine.mode
        self.threshold = DEFAULT_THRESHOLD
        if self.mode == "wavefront":
            own = engine.model.generation_config.get("diffusion_forcing", {})
            self.threshold = own.get("exit_threshold", DEFAULT_THRESHOLD)

    def read(self, body, chat: bool) -> Ask:
        """The request in a body of JSON; Problem for one that this server cannot answer."""
        try:
            return self._read(body, chat)
        except ValueError as error:  # the library's: one sentence that names the field
            raise Problem(400, str(error), _field(str(error))) from None

    def _read(self, body, chat: bool) -> Ask:
        if not isinstance(body, dict):
            raise ValueError(f"the body is {shown(body)}; it must be a JSON object")
        given = {name: value for name, value in body.items() if value is not None}
        for name in sorted(given.keys() & UNSUPPORTED.keys()):
            if given[name] not in UNSUPPORTED[name]:
                raise ValueError(f"{name} is not supported by this server; leave it out")
        known = COMMON | (CHAT if chat else COMPLETION) | WITHOUT_EFFECT | UNSUPPORTED.keys()
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"{shown(unknown[0])} is no field of this request")
        if "model" not in given:
            raise ValueError(f"model is missing; it must be {self.name!r}")
        if given["model"] != self.name:
            message = f"there is no model {shown(given['model'])} here; the model is {self.name!r}"
            raise Problem(404, message, "model", "model_not_found")
        n = whole("n", given.get("n", 1), 1, self.limits.choices)
        stream, echo = flag("stream", given.get("stream", False)), flag("echo", given.get("echo", False))
        options = self._sampling(given) | self._depth(given)
        prompts, texts = self._chat(given) if chat else self._prompts(given)
        if len(prompts) * n > self.limits.choices:
            raise ValueError(
                f"n is {n} for {len(prompts)} prompts; together they must be at most {self.limits.choices} choices"
            )
        for ids in prompts:
            if len(ids) > self.limits.prompt_tokens:
                message = f"the prompt has {len(ids)} tokens; {self.limits.prompt_tokens} at most"
                raise Problem(400, message, "messages" if chat else "prompt", "context_length_exceeded")
        seed = as_seed(given["seed"]) if "seed" in given else random.getrandbits(63) if options["temperature"] else 0
        end = {self.template.end} - {None} if chat and self.template else set()
        return Ask(
            chat=chat, prompts=prompts, texts=texts, n=n, stops=_stops(given.get("stop", [])), seed=seed,
            max_tokens=self._max_tokens(given, chat, echo, max(map(len, prompts))), stream=stream, echo=echo,
            usage=_usage(given.get("stream_options", {}), stream), logprobs=_logprobs(given, chat),
            options=options | {"stop_tokens": self.stop_tokens | end},
        )  # fmt: skip

    def _max_tokens(self, given: dict, chat: bool, echo: bool, longest: int) -> int:
        room = self.max_length - longest
        names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
        name = next((name for name in names if name in given), None)
        if name is None:
            wanted = min(room, self.limits.tokens, room if chat else 16)
        else:  # 0 tokens: only to read the prompt's own log-probabilities
            wanted = whole(name, given[name], 0 if echo else 1, self.limits.tokens)
        if max(wanted, 1) > room:
            message = (
                f"the prompt has {longest} tokens, which leaves {max(room, 0)} of a context of {self.max_length}"
                + (f"; {name} is {wanted}" if name else "")
            )
            raise Problem(400, message, "messages" if chat else "prompt", "context_length_exceeded")
        return wanted

    def _sampling(self, given: dict) -> dict:
        values: dict[str, Any] = {name: given.get(name, default) for name, default in SAMPLING.items()}
        temperature = TokenChoice(values["temperature"]).temperature
        at_all = TokenChoice(temperature or 1.0, **{name: values[name] for name in SAMPLING if name != "temperature"})
        if at_all.top_p == 1:  # clients send it along with temperature 0
            values["top_p"] = None
        if temperature == 0:
            values |= {"top_p": None, "top_k": None, "min_p": None}
        return values | {"temperature": temperature}

    def _depth(self, given: dict) -> dict:
        fixed, exiting = SAMPLERS[self.mode]
        num_steps = whole("num_steps", given.get("num_steps", self.num_steps), 1, self.num_steps)
        threshold = number("threshold", given["threshold"], least=0) if "threshold" in given else None
        sampler = one_of("sampler", given.get("sampler", fixed if threshold is None else exiting), (fixed, exiting))
        if sampler == fixed and threshold is not None:
            raise ValueError(f"threshold has no effect with sampler {sampler!r}; leave it out")
        if sampler == exiting and threshold is None:
            threshold = self.threshold
        return {"num_steps": num_steps, "threshold": threshold}

    def _prompts(self, given: dict) -> tuple[list[list[int]], list[str]]:
        """Text, token ids, or a list of one of them."""
        prompt = given.get("prompt")
        if prompt is None:
            raise ValueError("prompt is missing; it must be a text, a list of token ids, or a list of such")
        several = isinstance(prompt, list) and prompt and all(isinstance(p, (str, list)) for p in prompt)
        prompts = prompt if several else [prompt]
        if len(prompts) > self.limits.choices:
            raise ValueError(f"prompt has {len(prompts)} prompts; {self.limits.choices} at most")
        ids, texts = [], []
        for p in prompts:
            if isinstance(p, str):
                ids.append(encode(self.tokenizer, _text("prompt", p), self.config.bos_token_id, None))
                texts.append(p)
            else:
                ids.append(self._ids(p))
                texts.append(self.tokenizer.decode(ids[-1]))
        return ids, texts

    def _ids(self, prompt) -> list[int]:
        if not isinstance(prompt, list) or not prompt:
            raise ValueError(f"prompt is {shown(prompt)}; it must be a text, a list of token ids, or a list of such")
        return [whole("a token id of prompt", token, 0, self.config.vocab_size - 1) for token in prompt]

    def _chat(self, given: dict) -> tuple[list[list[int]], list[str]]:
        if self.template is None:
            raise ValueError("this model has no chat template; use /v1/completions")
        messages = given.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"messages is {shown(messages)}; it must be a list of at least one message")
        roles = {"system": "system", "developer": "system", "user": "user", "assistant": self.template.speaker}
        said = []
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys() <= {
                "role",
                "content",
                "name",
            }:
                raise ValueError(f"messages[{i}] is {shown(message)}; it must have a role and a content, and no tools")
            role = roles[one_of(f"messages[{i}].role", message["role"], roles)]
            text = _text(f"messages[{i}].content", _joined(i, message["content"]))
            said.append({"role": role, "content": check_message(self.tokenizer, text, None)})
        try:
            return [self.template.encode(said)], [""]
        except ValueError as error:  # not where the template lies on this machine
            raise ValueError(str(error).removeprefix(f"{self.template.path}: ")) from None


def _field(message: str) -> str | None:
    """The field that a message begins with."""
    first = message.split(maxsplit=1)[0].partition("[")[0]
    return first if first in COMMON | COMPLETION | CHAT | UNSUPPORTED.keys() else None


def _text(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has half of a surrogate pair, which is no character") from None
    return text


def _joined(i: int, content) -> str:
    """The content of a message: a text, or parts of type "text"."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"messages[{i}].content is {shown(content)}; it must be a text, or parts of type 'text'")
    return "".join(part["text"] for part in parts)


def _stops(stop) -> list[str]:
    stops = stop if isinstance(stop, list) else [stop]
    if len(stops) > MOST_STOPS or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops):
        raise ValueError(
            f"stop is {shown(stop)}; it must be a text of 1 to {LONGEST_STOP} characters, or {MOST_STOPS} such at most"
        )
    return [_text("stop", s) for s in stops]


def _usage(options, stream: bool) -> bool:
    """Whether a stream ends with a count of tokens."""
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise ValueError(f"stream_options is {shown(options)}; it may have include_usage")
    if options and not stream:
        raise ValueError("stream_options has no effect without stream; leave it out")
    return flag("stream_options.include_usage", options.get("include_usage") or False)


def _logprobs(given: dict, chat: bool) -> int | None:
    """How many likeliest tokens to report beside the chosen one; None for no log-probabilities."""
    if not chat:
        return whole("logprobs", given["logprobs"], 0, MOST_LOGPROBS) if "logprobs" in given else None
    wanted = flag("logprobs", given.get("logprobs", False))
    top = whole("top_logprobs", given.get("top_logprobs", 0), 0, MOST_LOGPROBS)
    if top and not wanted:
        raise ValueError("top_logprobs has no effect without logprobs; leave it out")
    return top if wanted else None
