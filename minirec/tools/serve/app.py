"""Routes, limits, errors and streams."""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

import anyio
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from minirec.tools.serve.answers import Answer, Writer, usage_of
from minirec.tools.serve.metrics import Metrics
from minirec.tools.serve.protocol import Ask, Problem, Protocol
from minirec.tools.serve.worker import Job, Part, Update, Worker

log = logging.getLogger("minirec.serve")
OPEN = ("/", "/health")  # no key needed
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
QUIET_SECONDS = 15  # then a stream gets a comment, so that nothing between here and the client gives it up


def build(protocol: Protocol, worker: Worker, metrics: Metrics, api_key: str | None = None) -> Starlette:
    """The application; it starts the worker's thread and, once all requests are done, stops it.

    Without an api_key it answers only requests that name this machine as their host, so that no page of another site
    can use it through a browser.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await to_thread.run_sync(worker.stop)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok" if worker.alive else "failed"}, 200 if worker.alive else 503)

    async def models(request: Request) -> Response:
        own = {"id": protocol.name, "object": "model", "created": started, "owned_by": "minirec"}
        own |= {"max_model_len": protocol.max_length, "num_steps": protocol.num_steps, "mode": protocol.mode}
        if "id" not in request.path_params:
            return JSONResponse({"object": "list", "data": [own]})
        if request.path_params["id"] != protocol.name:
            return error_response(Problem(404, f"there is no such model; the model is {protocol.name!r}", "model"))
        return JSONResponse(own)

    async def counts(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(request: Request) -> Response:
        return HTMLResponse(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        said = (
            f"{request.method} is not allowed here" if error.status_code == 405 else f"there is no {path[:80]!r} here"
        )
        return error_response(Problem(error.status_code, said), error.headers)

    started = int(time.time())
    app = Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/metrics", counts),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", models),
            Route("/v1/completions", Generate(protocol, worker, metrics, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", Generate(protocol, worker, metrics, chat=True), methods=["POST"]),
        ],
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    app.add_middleware(Gate, api_key=api_key)
    return app


def error_response(problem: Problem, headers=None) -> Response:
    """A problem as OpenAI's error object."""
    more = (
        {"Retry-After": "1"}
        if problem.status == 429
        else {"WWW-Authenticate": "Bearer"}
        if problem.status == 401
        else {}
    )
    return JSONResponse(problem.to_dict(), problem.status, headers=dict(headers or {}) | more)


class Gate:
    """Lets in who has the key; without a key, whoever calls this machine by a name of its own."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self.refuse(scope)):
            await error_response(problem)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def refuse(self, scope: Scope) -> Problem | None:
        """Why a request is not let in."""
        headers = dict(scope["headers"])
        if self.api_key is not None:
            given = headers.get(b"authorization", b"").partition(b" ")[2]
            if scope["path"] in OPEN or hmac.compare_digest(given, self.api_key.encode()):
                return None
            return Problem(401, "the API key is missing or wrong", code="invalid_api_key")
        host = headers.get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name.lower() in LOOPBACK_NAMES:
            return None
        return Problem(403, "without an API key this server answers only to localhost")


class Generate:
    """The endpoint of completions, or of chat completions: one call is one HTTP request, from body to last token."""

    def __init__(self, protocol: Protocol, worker: Worker, metrics: Metrics, chat: bool):
        self.protocol, self.worker, self.metrics, self.chat = protocol, worker, metrics, chat
        self.readers = anyio.CapacityLimiter(2)  # threads that turn text into tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _Call(self, scope, receive, send)
        try:
            with anyio.move_on_after(self.protocol.limits.seconds) as time_limit:
                await call.run()
            if time_limit.cancelled_caught and not call.complete:
                call.outcome = "timeout"
                await call.fail(Problem(504, f"the request took more than {self.protocol.limits.seconds:g} seconds"))
        finally:
            self.metrics.requests.labels(call.outcome).inc()
            if call.job is not None and call.job.open:
                self.worker.cancel(call.job)


class _Call:
    """One HTTP request at work."""

    def __init__(self, endpoint: Generate, scope: Scope, receive: Receive, send: Send):
        self.endpoint, self.scope, self._receive, self._send = endpoint, scope, receive, send
        self.job: Job | None = None
        self.outcome = "failed"
        self.complete = False  # nothing is left to do but to send the last bytes
        self.streaming = False  # the head of a stream has been sent, so errors are events

    async def run(self) -> None:
        """Read, ask the engine, answer; ends early if the client leaves."""
        try:
            body = await self._body()
            async with anyio.create_task_group() as group:
                group.start_soon(self._until_the_client_leaves, group.cancel_scope)
                await self._answer_or_fail(body)
                group.cancel_scope.cancel()
        except Problem as problem:
            await self._refuse(problem)
        except _Left:
            self.outcome = "client_left"

    async def _answer_or_fail(self, body: bytes) -> None:
        try:
            ask = await to_thread.run_sync(self._read, body, limiter=self.endpoint.readers)
            await self._answer(ask)
        except Problem as problem:
            await self._refuse(problem)
        except Exception:
            log.exception("a request has failed")
            await self.fail(Problem(500, "an error of the server, which its log describes"))

    async def _refuse(self, problem: Problem) -> None:
        self.outcome = "busy" if problem.status == 429 else "refused" if problem.status < 500 else "failed"
        await self.fail(problem)

    async def fail(self, problem: Problem) -> None:
        """Tell the client of an error: as a response, or as an event of a stream that has begun."""
        self.complete = True
        if not self.streaming:
            await error_response(problem)(self.scope, self._receive, self._send)
            return
        with anyio.move_on_after(1):  # a client that reads nothing may be why there is an error
            await self._event(problem.to_dict())
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    # --- in ---

    async def _body(self) -> bytes:
        headers = dict(self.scope["headers"])
        most, body = self.endpoint.protocol.limits.body, bytearray()
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise Problem(415, "the content type must be application/json")
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _Left
            body += message.get("body", b"")
            if len(body) > most:
                raise Problem(413, f"the body has more than {most} bytes")
            if not message.get("more_body"):
                return bytes(body)

    async def _until_the_client_leaves(self, scope: anyio.CancelScope) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.complete:  # the end of the response is a disconnect too
            self.outcome = "client_left"
            scope.cancel()

    def _read(self, body: bytes) -> Ask:
        try:
            fields = json.loads(body.decode())
        except (ValueError, RecursionError):  # the first are those of bytes that are not UTF-8, too
            raise Problem(400, "the body is not JSON in UTF-8") from None
        return self.endpoint.protocol.read(fields, self.endpoint.chat)

    # --- out ---

    async def _answer(self, ask: Ask) -> None:
        tokenizer, protocol = self.endpoint.protocol.tokenizer, self.endpoint.protocol
        parts, answers = [], []
        for ids, text in zip(ask.prompts, ask.texts, strict=True):
            for choice in range(ask.n):
                part = Part(ids, max(ask.max_tokens, 1), ask.options | {"seed": ask.seed_of(choice)}, ask.logprobs)
                parts.append(part)
                notes = None if ask.logprobs is None else part.notes
                answer = Answer(tokenizer, ask.stops, ask.options["stop_tokens"], notes, len(ids))
                answers.append(answer)
                if ask.echo:
                    answer.echo(ids, text)
        writer = Writer(ask.chat, secrets.token_hex(12), int(time.time()), protocol.name, ask.logprobs is not None,
                        ask.usage, tokenizer)  # fmt: skip
        self.job = Job(parts)
        if not self.endpoint.worker.submit(self.job):
            self.job = None
            if not self.endpoint.worker.alive:
                raise Problem(503, "the engine has stopped")
            raise Problem(429, "the queue is full; try again later", code="queue_full")
        for update in await self.job.updates():
            await self._take(update, ask, answers)  # raises Problem for what the engine refuses
        if ask.stream:
            await self._stream(ask, answers, writer)
        else:
            while any(answer.finish_reason is None for answer in answers):
                for update in await self.job.updates():
                    await self._take(update, ask, answers)
            self.complete, self.outcome = True, "finished"
            await JSONResponse(writer.whole(answers, usage_of(ask.prompts, answers)))(
                self.scope, self._receive, self._send
            )

    async def _take(self, update: Update, ask: Ask, answers: list[Answer]) -> None:
        """Give an answer its news; a stop string ends the engine's work on it."""
        if isinstance(update.error, ValueError):
            raise Problem(400, str(update.error))
        if update.error is not None:
            raise Problem(500, f"the engine could not go on: {type(update.error).__name__}")
        if update.part is None:
            return
        answer = answers[update.part]
        if ask.max_tokens == 0:
            answer.end_without_tokens()
        elif update.token is not None:
            answer.add(update.token, update.depth, update.finished)
        if answer.finish_reason is not None and not update.finished and self.job is not None:
            self.endpoint.worker.cancel(self.job, update.part)

    async def _stream(self, ask: Ask, answers: list[Answer], writer: Writer) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self.streaming = True
        if ask.chat:
            await self._event(writer.chunk([writer.opening(i) for i in range(len(answers))]))
        unfinished = set(range(len(answers)))
        changed = set(unfinished)  # the first updates may have had tokens, and echo has text before any token
        while True:
            choices = [choice for i in sorted(changed & unfinished) if (choice := writer.news(i, answers[i]))]
            if choices:
                await self._event(writer.chunk(choices))
            unfinished -= {i for i in unfinished if answers[i].finish_reason is not None}
            if not unfinished:
                break
            updates = await self._updates()
            for update in updates:
                await self._take(update, ask, answers)
            changed = {update.part for update in updates if update.part is not None}
        if ask.usage:
            await self._event(writer.chunk([], usage_of(ask.prompts, answers)))
        self.complete, self.outcome = True, "finished"
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _updates(self) -> list[Update]:
        """What is new; while nothing is, a comment from time to time."""
        assert self.job is not None
        while True:
            with anyio.move_on_after(QUIET_SECONDS):
                return await self.job.updates()
            await self._send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})

    async def _event(self, event: dict) -> None:
        data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        await self._send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


class _Left(Exception):
    """The client has left before its request was read."""
