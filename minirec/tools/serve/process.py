"""The process of a server: its engine, its socket and its signals."""

from __future__ import annotations

import signal
import socket

import uvicorn
from tokenizers import Tokenizer

from minirec.continuous_batching import Engine
from minirec.files.tokenizer import ChatTemplate
from minirec.tools.cli.terminal import show
from minirec.tools.serve.app import build
from minirec.tools.serve.metrics import Metrics
from minirec.tools.serve.protocol import Limits, Protocol
from minirec.tools.serve.worker import Worker


class Announcing(uvicorn.Server):
    """A server that prints a line once it answers."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for sock in sockets or []:
            host, port = sock.getsockname()[:2]
            show(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet; OSError if there can be none."""
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}") from None
    return sock


def serve(
    sock: socket.socket, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None, name: str, limits: Limits,
    queue: int, api_key: str | None,
) -> None:  # fmt: skip
    """Serve until SIGTERM or Ctrl-C; then take no new connection, finish what runs, and return (or KeyboardInterrupt).

    queue: requests that may wait for a slot.  A second Ctrl-C ends at once.
    """
    protocol = Protocol(name, engine, tokenizer, template, limits)
    metrics = Metrics(engine)
    worker = Worker(engine, len(engine.free) + queue, metrics.ended)
    config = uvicorn.Config(
        build(protocol, worker, metrics, api_key), http="h11", ws="none", log_level="warning", access_log=False,
        server_header=False, timeout_graceful_shutdown=max(1, round(limits.seconds)),
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is done
    Announcing(config).run([sock])
