"""A process for what comes from whoever made a checkpoint and is run: chat templates, and tokenizers at first sight.

A template is a program.  It may loop for ever or write a text that fills the memory, and no check of its source tells.
A tokenizer may abort the process that reads it.  So both are tried in a process of their own, within limits of time and
memory, which may die instead.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minirec.files.machine import one_line

# -I keeps the working directory and this folder, whose modules have names of their own, out of the search path
_START = """
import json, runpy, sys
sys.path[:] = json.loads(sys.argv.pop())
runpy.run_path(sys.argv.pop(), run_name="__main__")
"""


class Refused(ValueError):
    """What a sandbox says of a question: the error that it ended with, or the limit that it met."""


class Sandbox:
    """A process that answers questions (minirec.files.sandbox_child), each within some seconds and bytes.

    It is started by the first question, and again by one that follows a question it did not survive; it ends when this
    object is deleted.
    """

    def __init__(self, seconds: float, memory: int):
        self.seconds, self.memory = seconds, memory
        self._lock = threading.Lock()
        self._end: Callable[[], object] = lambda: None  # ends the process, if there is one
        self._process: Any = None  # a Popen, once there is one

    def ask(self, what: str, argument):
        """The answer to a question; Refused, on one line, if it fails or takes too much."""
        question = json.dumps([what, argument])
        with self._lock:
            if self._process is None:
                self._start()
            process = self._process
            try:
                try:
                    process.stdin.write(question + "\n")
                    process.stdin.flush()
                except BrokenPipeError:
                    pass
                reply = process.stdout.readline()
            except BaseException:  # Ctrl-C: the answer that comes later is to no question
                self._stop()
                raise
            if not reply:
                self._stop()
                took = f"it takes more than {self.seconds:g} seconds"
                raise Refused(took if process.returncode == -signal.SIGPROF else "it ends the process that runs it")
        answer = json.loads(reply)
        if "error" in answer:
            raise Refused(one_line(answer["error"]))
        return answer["answer"]

    def _start(self) -> None:
        child, path = Path(__file__).with_name("sandbox_child.py"), [entry for entry in sys.path if entry]
        command = [
            sys.executable,
            "-I",
            "-c",
            _START,
            str(self.seconds),
            str(self.memory),
            str(child),
            json.dumps(path),
        ]
        pipes: dict[str, Any] = dict(
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        quiet = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        # a session of its own: Ctrl-C in the terminal is for its parent
        self._process = subprocess.Popen(command, **pipes, env=quiet, start_new_session=True)
        self._end = weakref.finalize(self, _end, self._process)

    def _stop(self) -> None:
        self._end()
        self._process = None


def _end(process: Any) -> None:
    for pipe in (process.stdin, process.stdout):
        try:
            pipe.close()
        except OSError:  # of a process that has died
            pass
    try:
        process.wait(timeout=0.5)  # one that has died on its own says how
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
