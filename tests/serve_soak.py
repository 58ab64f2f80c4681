"""Many clients at a server for some time: is every answer right, does memory stay flat, does SIGTERM lose nothing?

    python tests/serve_soak.py --clients 256 --seconds 120

starts `minirec serve tiny` on loopback.  Each client asks again and again for a streamed answer to one of a few
prompts, greedy or sampled; one in ten leaves in the middle.  At the end the server gets SIGTERM under full load.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from minirec import RecurrentDepthLM, autoregressive, tasks

LEAVING = 0.1  # share of the requests whose client leaves


def questions(n: int = 24) -> list[tuple[dict, str]]:
    """Requests and the texts of the sampler alone; every third one is sampled."""
    model, tokenizer = RecurrentDepthLM.from_pretrained("tiny"), tasks.task_tokenizer()
    problems = [p for family in tasks.FAMILIES for p in tasks.heldout(n // 3, seed=1, family=family)]
    asked = []
    for i, problem in enumerate(problems):
        sampling = {"temperature": 0.7, "seed": i} if i % 3 == 0 else {"temperature": 0.0}
        made = autoregressive.generate(model, problem.prompt, 48, **sampling)
        body = {"model": "tiny", "prompt": problem.text, "max_tokens": 48, "stream": True}
        asked.append((body | sampling, tokenizer.decode(made.tokens)))
    return asked


class Load:
    """What the clients do and have seen."""

    def __init__(self, host: str, port: int, asked: list[tuple[dict, str]]):
        self.host, self.port, self.asked = host, port, asked
        self.finished = self.left = self.busy = self.cut = self.lost = 0
        self.wrong: list[tuple[str, str]] = []
        self.errors: Counter[str] = Counter()
        self.firsts: list[float] = []
        self.terminated = False

    async def client(self, rng: random.Random) -> None:
        """Ask until the server is gone."""
        while not self.terminated:
            body, expected = rng.choice(self.asked)
            leave_after = rng.randint(0, 12) if rng.random() < LEAVING else None
            try:
                await self.request(body, expected, leave_after)
            except (OSError, asyncio.IncompleteReadError) as error:
                if not self.terminated:
                    self.errors[type(error).__name__] += 1

    async def request(self, body: dict, expected: str, leave_after: int | None) -> None:
        """One streamed completion; leave_after: events until the client leaves."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            data, begun = json.dumps(body).encode(), time.monotonic()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            status = (await reader.readline()).split()
            if not status:  # the server had ended before it read the request
                self.lost += self.terminated
                self.errors["no answer"] += not self.terminated
                return
            if status[1] == b"429":
                self.busy += 1
                await asyncio.sleep(1)
                return
            if status[1] != b"200":
                self.errors[status[1].decode()] += 1
                return
            text, events = "", 0
            while line := await reader.readline():
                if line.startswith(b"data: [DONE]"):
                    self.finished += 1
                    if text != expected:
                        self.wrong.append((expected, text))
                    return
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.errors[event["error"]["message"]] += 1
                        return
                    if not events:
                        self.firsts.append(time.monotonic() - begun)
                    text += event["choices"][0]["text"]
                    events += 1
                    if not expected.startswith(text):
                        self.wrong.append((expected, text))
                        return
                    if leave_after is not None and events > leave_after:
                        self.left += 1
                        return
            self.cut += 1  # a stream without an end
        finally:
            writer.close()


def resident(pid: int) -> float:
    """Memory of a process in MB."""
    fields = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) / 1024


async def soak(server: subprocess.Popen, address: str, clients: int, seconds: float) -> dict:
    """Load a server, end it, and say what was seen; memory_slope is in MB a minute, after the first quarter."""
    host, port = address.removeprefix("http://").split(":")
    load, memory = Load(host, int(port), questions()), []
    tasks_ = [asyncio.create_task(load.client(random.Random(i))) for i in range(clients)]
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        memory.append((now, resident(server.pid)))
        await asyncio.sleep(min(1, end - now))
    before, load.terminated = load.finished, True
    server.send_signal(signal.SIGTERM)
    await asyncio.wait(tasks_, timeout=300)
    code = await asyncio.to_thread(server.wait, 60)
    times, sizes = zip(*memory[len(memory) // 4 :], strict=True)
    slope = statistics.linear_regression(times, sizes).slope * 60
    firsts = sorted(load.firsts) or [0.0]
    return {
        "clients": clients, "seconds": seconds, "finished": load.finished, "after_sigterm": load.finished - before,
        "left": load.left, "busy": load.busy, "cut": load.cut, "never_accepted": load.lost, "wrong": load.wrong[:3],
        "errors": dict(load.errors), "exit_code": code, "memory_start": round(memory[0][1], 1),
        "memory_end": round(memory[-1][1], 1), "memory_slope": round(slope, 2),
        "first_token_median": round(firsts[len(firsts) // 2], 2),
        "first_token_p99": round(firsts[len(firsts) * 99 // 100], 2),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("options", nargs="*", help="of minirec serve, after --")
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = [sys.executable, "-m", "minirec.tools.cli", "serve", "tiny", "--port", "0", "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([*command, *args.options], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        print(
            json.dumps(
                asyncio.run(soak(server, server.stdout.readline().strip(), args.clients, args.seconds)), indent=1
            )
        )
    finally:
        server.kill()
