"""The server as clients meet it: OpenAI's own client, curl, and bytes on a socket."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import anyio
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from minirec import RecurrentDepthLM, adaptive_exit, autoregressive, diffusion_forcing, lossless_wavefront, tasks
from minirec.continuous_batching import Engine
from minirec.files.tokenizer import HUGINN_TEMPLATE, ChatTemplate, stand_in_tokenizer
from minirec.tools import cli
from minirec.tools.serve.answers import StopStrings
from minirec.tools.serve.app import build
from minirec.tools.serve.metrics import Metrics
from minirec.tools.serve.protocol import Limits, Protocol
from minirec.tools.serve.worker import Worker

openai = pytest.importorskip("openai")
TOKENIZER = stand_in_tokenizer(320)
EOS = TOKENIZER.token_to_id("<|end_text|>")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(small_model) -> RecurrentDepthLM:
    """One that writes bytes: many of them are halves of characters."""
    return small_model(3, vocab_size=320, block_size=160, eos_token_id=EOS)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("template")
    values = {"bos_token": "<|begin_text|>", "chat_template": HUGINN_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return ChatTemplate(folder, TOKENIZER)


@contextlib.contextmanager
def served(model, template=None, mode="depth", room=64, api_key=None, limits=None, **options):
    """A client of a server in this process, and its worker."""
    engine = Engine(model, options.pop("slots", 4), model.config.block_size, mode, **options)
    metrics = Metrics(engine)
    worker = Worker(engine, room, metrics.ended)
    app = build(Protocol("m", engine, TOKENIZER, template, limits or Limits()), worker, metrics, api_key)
    with TestClient(app, base_url="http://localhost") as client:
        client.worker, client.metrics = worker, metrics
        yield client


@pytest.fixture(scope="module")
def client(model, template):
    with served(model, template) as client:
        yield client


def ask(client, path=COMPLETIONS, **fields):
    return client.post(path, json={"model": "m"} | fields)


def streamed(client, path=COMPLETIONS, **fields) -> list[dict]:
    """The events of a stream, which has to end as OpenAI's do."""
    response = ask(client, path, stream=True, **fields)
    assert response.status_code == 200, response.text
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(events: list[dict], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


def alone(sampler, model, text: str, n: int, **options) -> str:
    """What a sampler writes after a text when it runs alone."""
    return TOKENIZER.decode(sampler.generate(model, TOKENIZER.encode(text).ids, n, **options).tokens)


# --- answers ---------------------------------------------------------------------------------------------------------

SAME = [
    ("depth", {}, autoregressive, {}),
    ("depth", {"num_steps": 2}, autoregressive, {"num_steps": 2}),
    ("depth", {"threshold": 0.5}, adaptive_exit, {"threshold": 0.5}),
    ("depth", {"sampler": "adaptive"}, adaptive_exit, {"threshold": 0.03}),
    ("static", {}, autoregressive, {}),
    ("sequence", {"threshold": 0.4, "num_steps": 3}, adaptive_exit, {"threshold": 0.4, "num_steps": 3}),
    ("wavefront", {}, lossless_wavefront, {"guess_after": 1}),
    ("wavefront", {"sampler": "lossless", "num_steps": 3}, autoregressive, {"num_steps": 3}),
    ("wavefront", {"threshold": 0.3}, diffusion_forcing,
     {"exit_threshold": 0.3, "inner_steps": 1, "momentum": 0.0, "max_wavefront": 16, "kv": "full"}),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "fields", "sampler", "options"), SAME)
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "top_k": 9, "seed": 5}])
def test_an_answer_is_that_of_the_sampler_alone(model, mode, fields, sampler, options, sampling):
    with served(model, mode=mode) as client:
        for prompt in ("ab", "Some longer prompt, in which there is an é"):
            expected = alone(sampler, model, prompt, 30, **options, **sampling)
            body = ask(client, prompt=prompt, max_tokens=30, **fields, **sampling).json()
            assert body["choices"][0]["text"] == expected
            assert text_of(streamed(client, prompt=prompt, max_tokens=30, **fields, **sampling)) == expected


def test_several_prompts_and_choices_count_the_seed_on(client, model):
    prompts, sampling = ["ab", "x"], {"temperature": 0.9, "top_p": 0.95}
    fields = dict(prompt=prompts, n=3, max_tokens=12, seed=2**63 - 2, **sampling)
    body, events = ask(client, **fields).json(), streamed(client, **fields)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    for i, choice in enumerate(body["choices"]):
        seed = [2**63 - 2, 2**63 - 1, -(2**63)][i % 3]
        expected = alone(autoregressive, model, prompts[i // 3], 12, seed=seed, **sampling)
        assert choice["text"] == expected == text_of(events, i)
    assert len({choice["text"] for choice in body["choices"]}) == 6
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 72, "total_tokens": 75, "mean_depth": 4.0}


def test_a_prompt_may_be_token_ids(client):
    text = ask(client, prompt="abc", max_tokens=9, temperature=0).json()["choices"][0]["text"]
    ids = TOKENIZER.encode("abc").ids
    for prompt in (ids, [ids], [ids, ids]):
        choices = ask(client, prompt=prompt, max_tokens=9, temperature=0).json()["choices"]
        assert {choice["text"] for choice in choices} == {text}


def test_a_chat_is_written_down_by_the_template(client, model, template):
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And now?"},
    ]
    roles = ("system", "user", "Huginn", "user")
    texts = ("Be short.", "Hi", "Hello.", "And now?")
    ids = template.encode([{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)])
    made = autoregressive.generate(model, ids, 20)
    body = ask(client, CHAT, messages=messages, max_completion_tokens=20, temperature=0).json()
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": TOKENIZER.decode(made.tokens), "refusal": None}
    assert body["object"] == "chat.completion" and body["usage"]["prompt_tokens"] == len(ids)
    events = streamed(client, CHAT, messages=messages, max_tokens=20, temperature=0)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(events) == TOKENIZER.decode(made.tokens)


@pytest.mark.parametrize("chat", [False, True])
def test_the_end_of_a_text_is_not_part_of_it(model, template, chat):
    """A bias of the head makes the model end after a few tokens."""
    made = autoregressive.generate(model, template.encode([{"role": "user", "content": "x"}]), 8).tokens
    end = made[5]
    stops = made.index(end)
    other = TOKENIZER.id_to_token(end)
    template_end, template.end = template.end, end
    try:
        with served(model, template) as client:
            if chat:
                fields = {"messages": [{"role": "user", "content": "x"}]}
                body = ask(client, CHAT, **fields, max_tokens=50, temperature=0).json()
                assert body["choices"][0]["finish_reason"] == "stop", other
                assert body["choices"][0]["message"]["content"] == TOKENIZER.decode(made[:stops])
                assert body["usage"]["completion_tokens"] == stops + 1
            else:
                body = ask(client, prompt="x", max_tokens=3, temperature=0).json()
                assert body["choices"][0]["finish_reason"] == "length"
    finally:
        template.end = template_end


def test_no_event_ends_within_a_character(client):
    """All bytes of the events are UTF-8, and U+FFFD is only where the whole text has it."""
    for seed in range(4):
        fields = dict(prompt="é", max_tokens=60, seed=seed, temperature=1.5)
        whole = ask(client, **fields).json()["choices"][0]["text"]
        pieces = [event["choices"][0]["text"] for event in streamed(client, **fields)]
        assert "".join(pieces) == whole


def test_usage_in_a_stream(client):
    events = streamed(client, prompt="ab", max_tokens=5, temperature=0, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7, "mean_depth": 4.0}


# --- stop strings ----------------------------------------------------------------------------------------------------


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.randoms())
def test_a_text_is_cut_before_the_first_stop_string_however_it_comes(text, stops, rng):
    ends = [(i, i - len(s)) for i in range(len(text) + 1) for s in stops if text[:i].endswith(s)]
    expected = text[: min(ends)[1]] if ends else text
    cut, out = StopStrings(stops), ""
    while text:
        n = rng.randint(1, len(text))
        out += cut.add(text[:n])
        text = text[n:]
        assert expected.startswith(out), "what has gone out is never taken back"
    assert cut.found == bool(ends)
    assert out + ("" if cut.found else cut.end()) == expected


def test_a_stop_string_may_begin_in_one_token_and_end_in_another(client, model):
    whole = alone(autoregressive, model, "abc", 60)
    start = next(i for i in range(5, 40) if whole.index(whole[i : i + 3]) == i and "\ufffd" not in whole[i : i + 3])
    stop = whole[start : start + 3]
    fields = dict(prompt="abc", max_tokens=60, temperature=0, stop=["never", stop])
    body, events = ask(client, **fields).json(), streamed(client, **fields)
    assert body["choices"][0]["text"] == text_of(events) == whole[:start]
    assert body["choices"][0]["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < 60
    text = ""
    for event in streamed(client, **fields, logprobs=0):  # no token, not even of a stop string, runs ahead of its text
        (choice,) = event["choices"]
        text += choice["text"]
        assert all(at < len(text) for at in (choice["logprobs"] or {"text_offset": []})["text_offset"])


# --- log-probabilities -----------------------------------------------------------------------------------------------


def log_p(model, ids: list[int], num_steps: int | None = None, seed: int = 0) -> torch.Tensor:
    """(T, V): what the model says at each position, all at once."""
    state = model.initial_state(torch.arange(len(ids)), seed)[None]
    return model(torch.tensor([ids]), num_steps, state).logits[0].log_softmax(-1)


@pytest.mark.parametrize("mode", ["depth", "wavefront"])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_a_forward_pass(model, mode, stream):
    with served(model, mode=mode) as client:
        fields = dict(prompt="abc", max_tokens=20, temperature=0.7, seed=3, logprobs=3, num_steps=3)
        choices = (
            [e["choices"][0] for e in streamed(client, **fields)] if stream else ask(client, **fields).json()["choices"]
        )
    noted = [c["logprobs"] for c in choices if c["logprobs"]]
    ids = TOKENIZER.encode("abc").ids
    tokens = autoregressive.generate(model, ids, 20, num_steps=3, temperature=0.7, seed=3).tokens
    right = log_p(model, ids + tokens, 3, seed=3)[2:-1]  # (20, V)
    own = [p for n in noted for p in n["token_logprobs"]]
    assert own == pytest.approx(right.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), rel=1e-6)
    assert [t for n in noted for t in n["tokens"]] == [TOKENIZER.decode([t], skip_special_tokens=False) for t in tokens]
    for best, row in zip((b for n in noted for b in n["top_logprobs"]), right, strict=True):
        assert sorted(best.values())[-1] == pytest.approx(row.max().item(), rel=1e-6)
    text = "".join(c["text"] for c in choices)
    for piece, at in zip(
        (t for n in noted for t in n["tokens"]), (o for n in noted for o in n["text_offset"]), strict=True
    ):
        assert "\ufffd" in piece or "<|" in piece or text[at:].startswith(piece)


def test_logprobs_of_a_chat(client, model, template):
    messages = [{"role": "user", "content": "x"}]
    fields = dict(messages=messages, max_tokens=9, temperature=0, logprobs=True, top_logprobs=2)
    content = ask(client, CHAT, **fields).json()["choices"][0]["logprobs"]["content"]
    ids = template.encode(messages)
    tokens = autoregressive.generate(model, ids, 9).tokens
    right = log_p(model, ids + tokens)[len(ids) - 1 : -1]
    assert [c["logprob"] for c in content] == pytest.approx(right.max(-1).values.tolist(), rel=1e-6)
    for c in content:
        assert len(c["top_logprobs"]) == 2 and c["top_logprobs"][0]["logprob"] == c["logprob"]
        assert c["bytes"] is None or bytes(c["bytes"]).decode() == c["token"]
    events = streamed(client, CHAT, **fields)
    parts = [e["choices"][0]["logprobs"] for e in events]
    assert [c for part in parts if part for c in part["content"]] == content


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_echo_gives_the_log_probabilities_of_a_prompt(client, model, max_tokens):
    """What evaluations ask for."""
    prompt, ids = "abcdé" * 9, TOKENIZER.encode("abcdé" * 9).ids  # longer than a chunk of the engine
    body = ask(client, prompt=prompt, max_tokens=max_tokens, temperature=0, echo=True, logprobs=1).json()
    (choice,) = body["choices"]
    made = autoregressive.generate(model, ids, 4).tokens[:max_tokens]
    assert choice["text"] == prompt + TOKENIZER.decode(made)
    right = log_p(model, ids + made)
    first, *own = choice["logprobs"]["token_logprobs"]
    expected = right[:-1].gather(1, torch.tensor(ids[1:] + made)[:, None])[:, 0].tolist()
    assert first is None and own == pytest.approx(expected, rel=1e-6)
    assert body["usage"]["completion_tokens"] == max_tokens
    events = streamed(client, prompt=prompt, max_tokens=max_tokens, temperature=0, echo=True, logprobs=1)
    noted = [event["choices"][0]["logprobs"] for event in events]
    assert [p for n in noted if n for p in n["token_logprobs"]] == [None, *own]
    assert text_of(events) == choice["text"]


# --- errors ----------------------------------------------------------------------------------------------------------

BAD = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": None}, "prompt is missing"),
    ({"prompt": {}}, "must be a text"),
    ({"prompt": []}, "must be a text"),
    ({"prompt": [[]]}, "must be a text"),
    ({"prompt": ["a", [1]] * 40}, "80 prompts"),
    ({"prompt": [1, 999]}, "999"),
    ({"prompt": [1, 2.5]}, "2.5"),
    ({"prompt": "\ud800"}, "surrogate"),
    ({"prompt": "x" * 160}, "leaves 0"),
    ({"prompt": "x" * 150, "max_tokens": 11}, "leaves 10"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": True}, "max_tokens is True"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"n": 0}, "n is 0"),
    ({"n": 65}, "n is 65"),
    ({"n": 33, "prompt": ["a", "b"]}, "at most 64 choices"),
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 1.5, "temperature": 0}, "top_p is 1.5"),
    ({"top_k": -1}, "top_k is -1"),
    ({"seed": 2**63}, "seed is"),
    ({"stop": ""}, "stop is"),
    ({"stop": ["a"] * 17}, "stop is"),
    ({"stop": [1]}, "stop is"),
    ({"stream": "yes"}, "stream is 'yes'"),
    ({"stream_options": {"include_usage": True}}, "without stream"),
    ({"logprobs": 21}, "logprobs is 21"),
    ({"logprobs": True}, "logprobs is True"),
    ({"num_steps": 5}, "num_steps is 5"),
    ({"threshold": -0.1}, "threshold is -0.1"),
    ({"sampler": "lossless"}, "'autoregressive' or 'adaptive'"),
    ({"sampler": "autoregressive", "threshold": 0.1}, "no effect"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
    ({"logit_bias": {"1": 2}}, "logit_bias is not supported"),
    ({"tokens": 3}, "'tokens' is no field"),
    ({"messages": []}, "'messages' is no field"),
]  # fmt: skip


def check_refused(response, status: int = 400) -> str:
    """OpenAI's error object with one sentence."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert 5 < len(message) < 300 and "\n" not in message and not message.endswith((".", " "))
    return message


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_gets_one_sentence(client, fields, message, stream):
    body = {"model": "m", "prompt": "ab", "stream": stream} | fields
    if stream and "stream_options" in fields:
        pytest.skip("it has an effect there")
    response = client.post(COMPLETIONS, content=json.dumps(body), headers={"content-type": "application/json"})
    assert message in check_refused(response)


BAD_CHATS = [
    (None, "messages is None"),
    ([], "at least one"),
    ("Hi", "must be a list"),
    (["Hi"], "messages[0]"),
    ([{"role": "tool", "content": "x"}], "messages[0].role"),
    ([{"role": "user", "content": "x"}, {"role": "user"}], "messages[1]"),
    ([{"role": "user", "content": 3}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content"),
    ([{"role": "user", "content": "<|end_turn|>"}], "special tokens"),
    ([{"role": "user", "content": "x" * 200}], "leaves 0"),
]


@pytest.mark.parametrize(("messages", "message"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_a_bad_chat_gets_one_sentence(client, messages, message):
    assert message in check_refused(ask(client, CHAT, messages=messages))


def test_a_model_without_a_template_does_not_chat(model):
    with served(model) as client:
        assert "no chat template" in check_refused(ask(client, CHAT, messages=[{"role": "user", "content": "x"}]))


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b"3", b'{"model": "m"', b"[" * 100_000, b'{"n": NaN}'])
def test_a_body_that_is_no_request(client, body):
    check_refused(client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}))


def test_other_addresses_methods_and_types(client):
    check_refused(client.get("/v1/nothing"), 404)
    check_refused(client.get(COMPLETIONS), 405)
    check_refused(client.get("/v1/models/other"), 404)
    check_refused(ask(client, model="gpt-4", prompt="x"), 404)
    check_refused(client.post(COMPLETIONS, content="{}", headers={"content-type": "text/plain"}), 415)
    assert client.get("/v1/models/m").json()["id"] == client.get("/v1/models").json()["data"][0]["id"] == "m"
    assert client.get("/health").json() == {"status": "ok"}
    assert "<textarea" in client.get("/").text


def test_limits(model):
    limits = Limits(prompt_tokens=5, tokens=7, body=200, seconds=30, choices=2)
    with served(model, limits=limits) as client:
        assert ask(client, prompt="abcde", max_tokens=7, n=2).status_code == 200
        assert "5 at most" in check_refused(ask(client, prompt="abcdef", max_tokens=1))
        assert "7" in check_refused(ask(client, prompt="a", max_tokens=8))
        assert "200 bytes" in check_refused(ask(client, prompt="a" * 200), 413)
        assert "n is 3" in check_refused(ask(client, prompt="a", n=3))


def test_a_request_may_not_take_for_ever(model):
    with served(model, limits=Limits(seconds=0.3)) as client:
        client.worker.engine.on_pass = lambda done: time.sleep(0.02)
        check_refused(ask(client, prompt="ab", max_tokens=150), 504)
        response = ask(client, prompt="ab", max_tokens=150, stream=True)
        assert response.status_code == 200
        assert (
            "took more than" in json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))["error"]["message"]
        )
        wait_until(lambda: not client.worker.engine.busy and not client.worker.in_flight)
        assert client.get("/metrics").text.count('minirec_requests_total{outcome="timeout"} 2.0') == 1


def test_a_full_queue_is_429_with_retry_after(model):
    with served(model, room=2) as client:
        assert ask(client, prompt="a", n=2).status_code == 200
        response = ask(client, prompt="a", n=3)
        check_refused(response, 429)
        assert int(response.headers["retry-after"]) >= 1
        assert client.worker.in_flight == 0


def test_a_key_and_a_host(model):
    with served(model, api_key="secret") as client:
        check_refused(ask(client, prompt="a"), 401)
        check_refused(client.get("/metrics"), 401)
        assert client.get("/health").status_code == client.get("/").status_code == 200
        client.headers["authorization"] = "Bearer secret2"
        check_refused(ask(client, prompt="a"), 401)
        client.headers["authorization"] = "Bearer secret"
        assert ask(client, prompt="a").status_code == 200
        assert client.get("/health", headers={"host": "example.org"}).status_code == 200
    with served(model) as client:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"):
            assert client.get("/health", headers={"host": host}).status_code == 200
        for host in ("example.org", "127.0.0.1.example.org", "example.org:8000"):
            check_refused(client.get("/health", headers={"host": host}), 403)


def test_an_engine_that_fails_is_an_error_of_the_server_and_the_next_request_works(model, monkeypatch):
    with served(model) as client:
        broken = [True]

        def clock():
            if broken and client.worker.engine.busy:
                broken.clear()
                raise MemoryError("no room")
            return time.perf_counter()

        client.worker.engine.clock = client.worker.engine._outbox.clock = clock
        assert "MemoryError" in check_refused(ask(client, prompt="ab", max_tokens=9), 500)
        assert ask(client, prompt="ab", max_tokens=9).status_code == 200
        assert client.get("/health").status_code == 200 and client.worker.in_flight == 0


def test_an_engine_that_fails_again_and_again_stops(model, monkeypatch):
    with served(model) as client:
        engine = client.worker.engine

        def step():
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(engine, "step", step)
        check_refused(ask(client, prompt="ab"), 500)
        assert client.get("/health").status_code == 503
        check_refused(ask(client, prompt="ab"), 503)
        assert client.worker.in_flight == 0


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "minirec.tools.serve.process", raising=False)
    assert cli.main(["serve"]) == 2
    assert "needs the package uvicorn: pip install 'minirec[serve]'" in capsys.readouterr().err


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics(model):
    with served(model, slots=2) as client:
        for threshold in (None, 0.5):
            ask(client, prompt="ab", max_tokens=10, n=2, threshold=threshold, temperature=0)
        ask(client, prompt="")
        lines = client.get("/metrics").text.splitlines()
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
    assert values['minirec_requests_total{outcome="finished"}'] == 2
    assert values['minirec_requests_total{outcome="refused"}'] == 1
    assert values["minirec_time_to_first_token_seconds_count"] == 4
    assert values["minirec_time_per_output_token_seconds_count"] == 4
    assert values["minirec_token_depth_steps_count"] == 40
    assert 40 <= values["minirec_token_depth_steps_sum"] < 160
    assert values["minirec_queue_length"] == values["minirec_slots_busy"] == 0
    for kind in ("prelude", "recur", "coda"):
        assert 0 < values[f'minirec_pass_occupancy{{kind="{kind}"}}'] <= 1
        assert values[f'minirec_cells_total{{kind="{kind}"}}'] >= values[f'minirec_passes_total{{kind="{kind}"}}'] > 0


# --- clients that leave, and clients that do not read ----------------------------------------------------------------


def wait_until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


async def post(app, fields: dict, receive_more, send) -> None:
    """One request as an ASGI server would make it."""
    body = json.dumps({"model": "m"} | fields).encode()
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        return first.pop() if first else await receive_more()

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "raw_path": COMPLETIONS.encode(), "root_path": "",
             "query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http"}  # fmt: skip
    await app(scope, receive, send)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(model, stream):
    with served(model, slots=1) as client:
        engine, order = client.worker.engine, []

        async def leave():
            first_token = lambda: any(r.token_times for r in list(engine.requests.values()))  # noqa: E731
            while not first_token():
                await anyio.sleep(0.001)
            order.append(engine.busy[0].request)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        async def one():
            await post(client.app, {"prompt": "ab", "max_tokens": 150, "stream": stream}, leave, send)

        engine.on_pass = lambda done: time.sleep(0.002)
        client.portal.call(one)
        wait_until(lambda: not engine.busy and not client.worker.in_flight)
        (request,) = order
        assert request.state.name == "CANCELLED" and len(request.generation.tokens) < 100
        assert 'outcome="client_left"} 1.0' in client.get("/metrics").text
        assert not engine.requests


def test_a_client_that_does_not_read_holds_nobody_up(model):
    with served(model, slots=2) as client:
        opened, sent = threading.Event(), []

        async def never():
            await anyio.sleep_forever()

        async def stuck(message):
            sent.append(message)
            if len(sent) > 2:
                opened.set()
                await anyio.sleep_forever()

        future = client.portal.start_task_soon(
            post, client.app, {"prompt": "ab", "max_tokens": 150, "stream": True}, never, stuck
        )
        assert opened.wait(20)
        for _ in range(3):
            assert ask(client, prompt="abc", max_tokens=40).status_code == 200
        wait_until(lambda: not client.worker.in_flight)  # the engine has finished what nobody reads
        assert not client.worker.engine.requests and len(sent) == 3
        future.cancel()


# --- a process of its own --------------------------------------------------------------------------------------------

PROBLEMS = [p for family in ("words", "hops", "automaton") for p in tasks.heldout(4, family=family, level=2)]
TINY = RecurrentDepthLM.from_pretrained("tiny")


@contextlib.contextmanager
def process(*options, environment=None):
    """`minirec serve` in a process of its own, and its address."""
    command = [sys.executable, "-m", "minirec.tools.cli", "serve", "tiny", "--port", "0", "--threads", "1", *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server = subprocess.Popen(command, env=os.environ | (environment or {}), **pipes)
    try:
        address = server.stdout.readline().strip()
        assert address, server.stderr.read()
        yield server, address
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def tiny_server():
    with process(environment={"MINIREC_API_KEY": "secret"}) as (_, address):
        yield address


def official(address: str, key: str = "secret"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def tiny_alone(problem, **options) -> str:
    return tasks.task_tokenizer().decode(autoregressive.generate(TINY, problem.prompt, 100, **options).tokens)


def test_openai_s_own_client(tiny_server):
    with official(tiny_server) as client:
        assert [m.id for m in client.models.list()] == ["tiny"]
        problem = PROBLEMS[0]
        expected = tiny_alone(problem)
        make = client.completions.create
        fields = dict(model="tiny", prompt=problem.text, max_tokens=100, temperature=0)
        made = make(**fields, logprobs=2, extra_body={"num_steps": 12})
        assert made.choices[0].text == expected and made.choices[0].finish_reason == "stop"
        assert made.usage.prompt_tokens == len(problem.prompt) and len(made.choices[0].logprobs.tokens) > 5
        pieces = list(make(**fields, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == expected and len(pieces) > 2
        cut = make(**fields, stop=[" has"]).choices[0]
        assert cut.text == expected.partition(" has")[0] and cut.finish_reason == "stop"
        for bad, error in [({"model": "other"}, openai.NotFoundError), ({"temperature": -1}, openai.BadRequestError)]:
            with pytest.raises(error, match=r"other|temperature is -1"):
                make(**(fields | bad))
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_chats_are_of_the_official_types(client):
    fields = dict(
        messages=[{"role": "user", "content": "x"}], max_tokens=5, temperature=0, logprobs=True, top_logprobs=1
    )
    whole = openai.types.chat.ChatCompletion.model_validate(ask(client, CHAT, **fields).json(), strict=True)
    pieces = [
        openai.types.chat.ChatCompletionChunk.model_validate(e, strict=True) for e in streamed(client, CHAT, **fields)
    ]
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].message.content == said


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(tiny_server):
    body = json.dumps(
        {"model": "tiny", "prompt": PROBLEMS[1].text, "max_tokens": 100, "temperature": 0, "stream": True}
    )
    command = ["curl", "-sS", "-N", "--noproxy", "*", f"{tiny_server}{COMPLETIONS}"]
    command += ["-H", "Content-Type: application/json", "-H", "Authorization: Bearer secret", "-d", body]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    events = [json.loads(line.removeprefix("data: ")) for line in out.split("\n\n")[:-2]]
    assert text_of(events) == tiny_alone(PROBLEMS[1])


def test_a_word_that_the_model_does_not_know(tiny_server):
    with official(tiny_server) as client:
        with pytest.raises(openai.BadRequestError, match="the model does not know 'grapes'"):
            client.completions.create(model="tiny", prompt="Mia has 3 grapes.")


def test_sigterm_finishes_what_runs_and_takes_nothing_new():
    """Eight at once in two slots: six of them still wait when the signal comes."""
    with process("--slots", "2") as (server, address):
        host, port = address.removeprefix("http://").split(":")
        asked = [{"temperature": 0.7, "seed": i} if i % 2 else {"temperature": 0} for i in range(8)]
        body = {"model": "tiny", "max_tokens": 100, "stream": True}
        readers = [
            stream_of(host, int(port), body | {"prompt": problem.text} | sampling)
            for problem, sampling in zip(PROBLEMS, asked, strict=False)
        ]
        first = next(readers[0])
        server.send_signal(signal.SIGTERM)
        texts = [first + "".join(readers[0]), *("".join(reader) for reader in readers[1:])]
        assert texts == [tiny_alone(p, **sampling) for p, sampling in zip(PROBLEMS, asked, strict=False)]
        assert server.wait(20) == 0 and "Traceback" not in server.stderr.read()
        with pytest.raises(OSError):
            socket.create_connection((host, int(port)), 1)


def stream_of(host: str, port: int, body: dict):
    """The pieces of text of a streamed completion; the request is sent at once."""
    sock, data = socket.create_connection((host, port), 60), json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def read():
        with sock, sock.makefile("rb") as answer:
            assert answer.readline().split()[1] == b"200"
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])["choices"][0]["text"]
                elif line.startswith(b"data: [DONE]"):
                    return
            raise AssertionError("the stream has no end")

    return read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "example.org"], "--api-key"),
        (["--max-seconds", "0"], "--max-seconds is 0"),
        (["--guess-after", "2"], "--mode wavefront"),
        (["--max-length", "1000"], "max_length is 1000"),
        (["--slots", "0"], "slots is 0"),
        (["no/such/folder"], "no/such/folder"),
        (["--port", "70000"], "70000"),
    ],
)
def test_a_server_that_cannot_start_says_so_on_one_line(options, message, capsys, monkeypatch):
    monkeypatch.delenv("MINIREC_API_KEY", raising=False)
    assert cli.main(["serve", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err


def test_a_key_from_the_environment(tiny_server):
    with official(tiny_server, "other") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


# --- fuzz ------------------------------------------------------------------------------------------------------------

ODD = [
    None, True, -1, 0, 1, 3, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "\ud800", "\x00", [], {},
    [None], [[]], [[1]], {"a": 1}, ["a"] * 100, [1] * 300, "x" * 5000, [{"role": "user", "content": "x"}],
]  # fmt: skip
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n",
    "repetition_penalty", "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "num_steps",
    "threshold", "sampler", "user", "tools", "logit_bias", "response_format", "best_of", "nonsense",
]  # fmt: skip


def fuzz(client, n: int, seed: int) -> dict[int, int]:
    """Statuses of n requests that are mostly wrong."""
    rng, statuses = random.Random(seed), {}
    for _ in range(n):
        path = rng.choice([COMPLETIONS, CHAT])
        body = {"model": "m", "max_tokens": 3} | (
            {"prompt": "ab"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
        )
        for field in rng.sample(FIELDS, rng.randint(0, 3)):
            body[field] = rng.choice(ODD)
        content = json.dumps(body).encode()
        if rng.random() < 0.1:  # broken bytes
            content = bytearray(content)
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        response = client.post(path, content=bytes(content), headers={"content-type": "application/json"})
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        if response.status_code != 200:
            assert 400 <= response.status_code < 500, (response.text, content)
            check_refused(response, response.status_code)
        else:
            assert '"error"' not in response.text
    return statuses


def test_fuzzed_requests_are_answered_or_refused(client):
    statuses = fuzz(client, 150, seed=0)
    assert statuses[400] > 50 and statuses[200] > 10


@pytest.mark.slow
def test_many_fuzzed_requests_are_answered_or_refused(client):
    statuses = fuzz(client, 2000, seed=1)
    print(statuses)
    assert client.worker.in_flight == 0 and not client.worker.engine.requests


# --- soak ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_clients_for_two_minutes():
    from serve_soak import soak

    with process("--slots", "16", "--queue", "300") as (server, address):
        result = asyncio.run(soak(server, address, clients=256, seconds=120))
        print(json.dumps(result))
        assert result["wrong"] == [] and result["errors"] == {} and result["exit_code"] == 0
        assert result["finished"] > 100 and result["left"] > 5
        assert result["memory_slope"] < 2.0  # MB per minute, after the first quarter
