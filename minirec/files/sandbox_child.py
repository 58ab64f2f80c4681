"""What runs templates and tokenizers of unknown origin: a process that answers lines of JSON, within limits.

`minirec.files.sandbox` starts it as a script.  It imports nothing of minirec, so it is there in a tenth of a second.
A question that takes too much time ends the process; one that takes too much memory is a MemoryError.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from collections.abc import Callable

LARGEST_TEXT = 10_000_000  # characters that a template may write; a long context has a tenth


def limit(seconds: float, memory: int) -> None:
    """Keep the process to so much time of the CPU from now on, and to so many bytes (on macOS: unlimited)."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ValueError, OSError):
        pass


def environment():
    """Jinja as transformers sets it up for chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the model says; the text is the same without it."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller):
            return caller()

    class PlainNamespace(Namespace):
        """namespace(), without a way to Python's internals."""

        def __init__(*args, **kwargs):
            self, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                refuse_internal(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name, value):
            refuse_internal(name)
            Namespace.__setitem__(self, name, value)

    def refuse_internal(name):
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        """JSON as it is; jinja's own filter is for HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda text: datetime.datetime.now().strftime(text),
        "namespace": PlainNamespace,
    }
    return made


@functools.lru_cache(1)
def template_of(source: str):
    """A template, read."""
    return environment().from_string(source)


def check_template(source: str) -> None:
    """Is it a template at all?"""
    template_of(source)


def render(argument: list) -> str:
    """The text that a template makes of variables."""
    source, variables = argument
    text = template_of(source).render(**variables)
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"it writes {len(text):,} characters")
    return text


def try_tokenizer(path: str) -> None:
    """Read a tokenizer, and put text and every token through it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ascii = "".join(map(chr, range(32, 127)))
    for text in [
        "",
        " ",
        "\n\t \r\n",
        "Hello, world! 1 + 2 = 3.",
        ascii,
        ascii * 4,
        "a" * 1000,
        "Größe, 東京, ёж, 🙂‍↔️ \0",
    ]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.decode(ids)
    ids = sorted({*tokenizer.get_vocab().values()})
    for i in ids:
        tokenizer.decode([i], skip_special_tokens=False)
    tokenizer.decode(ids[:1000], skip_special_tokens=False)
    tokenizer.get_added_tokens_decoder()


def main() -> None:
    """Answer questions until there are none: [what, argument] -> {"answer": ...} or {"error": ...}."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    asked: dict[str, Callable] = {"check": check_template, "render": render, "tokenizer": try_tokenizer}
    for line in sys.stdin:
        what, argument = json.loads(line)
        limit(seconds, memory)
        try:
            reply = {"answer": asked[what](argument)}
            text = json.dumps(reply)
        except BaseException as error:  # a panic of Rust is no Exception
            text = json.dumps({"error": str(error)[:1000] or type(error).__name__})
        print(text, flush=True)


if __name__ == "__main__":
    main()
