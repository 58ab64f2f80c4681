"""The process that runs the cells of one submission; `grading.py` starts it and sends it one cell after another.

Student code and test cells have separate namespaces, but they share the process and its modules.  So:

- This module keeps its own copies of the builtins and of what it calls, and so does the namespace of the tests.
- Functions that a submission replaced in `minirec`, `torch` or Python are put back before each test.  A test during
  which one is replaced fails.
- A submission can't answer for a cell that is still to come: each answer needs a number that comes with the cell.

Tests and student code in one process can't be kept apart any further: code that searches the interpreter's frames for
the test that called it, or that returns objects equal to everything, can still fake its own points.
"""

from __future__ import annotations

import builtins
import marshal
import os
import resource
import sys
from types import FunctionType, ModuleType

__builtins__ = dict(vars(builtins))  # used by the functions below, whatever becomes of the module
read, write, close, getpid, leave = os.read, os.write, os.close, os.getpid, os._exit
parse = marshal.loads
LONGEST = 2000  # characters of an error's text that are reported


def supervise(channel: int) -> None:
    """Return in a child of this process.  Code that kills its parent kills this go-between, not the grader."""
    child = os.fork()
    if child:
        os.close(channel)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)  # as a shell reports a signal


def protect(grader: int) -> None:
    """Refuse signals to the grader, to its process group, and to all processes at once."""
    group = os.getpgid(grader)
    protected = {-1, 1, grader, -grader, group, -group}

    def hook(event: str, arguments: tuple) -> None:
        if event in ("os.kill", "os.killpg") and arguments[0] in protected:
            raise PermissionError(f"{event}: a submission may not signal the grader")

    sys.addaudithook(hook)


def limit(memory: int, seconds: int) -> None:
    """Limits per process: bytes of memory beyond what the imports took, CPU seconds, files of 1 GiB, no core dumps."""
    used = 0
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    for kind, most in {
        resource.RLIMIT_AS: used + memory,
        resource.RLIMIT_CPU: seconds * (os.cpu_count() or 1),
        resource.RLIMIT_FSIZE: 2**30,
        resource.RLIMIT_CORE: 0,
    }.items():
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # macOS refuses some, and a limit may be lower already
            pass


class Originals:
    """What tests rely on, as it was before any student code ran.

    Watched are the modules of `minirec`, those that the source's own cells take something from, and `builtins`, with
    the classes and tables in them.  A function, class or module counts as replaced if its name leads to another
    object, or if its code or defaults are others.  So does a new name of a callable, which might hide a builtin or an
    inherited method.
    """

    def __init__(self, namespace: dict) -> None:
        found = {value.__name__ for value in namespace.values() if isinstance(value, ModuleType)}
        found |= {getattr(value, "__module__", None) for value in namespace.values() if callable(value)}
        found |= {name for name in sys.modules if name.partition(".")[0] == "minirec"} | {"builtins"}
        self.modules = {
            name: module
            for name, module in sys.modules.items()
            if name in found and name != "__main__" and name.partition(".")[0] not in ("matplotlib", "IPython")
        }
        holders = {}  # by identity: not everything can be hashed
        for name, module in self.modules.items():
            holders[id(module)] = (name, module)
            for key, value in vars(module).items():
                if isinstance(value, type) or (isinstance(value, dict) and name.startswith("minirec")):
                    holders.setdefault(id(value), (f"{name}.{key}", value))
        self.saved = [(where, holder, dict(self.contents(holder))) for where, holder in holders.values()]
        functions = [
            (f"{where}.{key}", value)
            for where, _, names in self.saved
            for key, value in names.items()
            if isinstance(value, FunctionType)
        ]
        self.functions = [(where, f, (f.__code__, f.__defaults__, f.__kwdefaults__)) for where, f in functions]

    @staticmethod
    def contents(holder) -> dict:
        return holder if isinstance(holder, dict) else vars(holder)

    def restore(self) -> list[str]:
        """Put back what was replaced; the names of it."""
        replaced = []
        for name, module in self.modules.items():
            if sys.modules.get(name) is not module:
                replaced.append(name)
                sys.modules[name] = module
        for where, holder, names in self.saved:
            now, table = dict(self.contents(holder)), isinstance(holder, dict)
            for name, value in names.items():
                if now.get(name) is not value and (table or callable(value) or isinstance(value, ModuleType)):
                    replaced.append(f"{where}.{name}")
                    holder.update({name: value}) if table else setattr(holder, name, value)
            for name in now.keys() - names.keys():
                if not table and callable(now[name]):
                    replaced.append(f"{where}.{name}")
                    delattr(holder, name)
        for where, function, parts in self.functions:
            for name, part in zip(("__code__", "__defaults__", "__kwdefaults__"), parts, strict=True):
                if getattr(function, name) is not part:
                    replaced.append(where)
                    setattr(function, name, part)
        return replaced


def new_shell():
    """IPython without a terminal: magics, `!` and `await` work; nothing is shown or kept."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shell(InteractiveShell):
        def enable_gui(self, gui=None):  # %matplotlib calls it
            pass

        def ask_exit(self):  # exit() stops a kernel after the cell; here the next cell still runs
            pass

        def showtraceback(self, *arguments, **options):
            pass

        showsyntaxerror = showtraceback

    config = Config()
    config.HistoryManager.enabled = False
    return Shell.instance(config=config)


class Cells:
    """Runs cells, each by the method named after its kind; a cell's error is raised or returned."""

    def start(self, memory: int, seconds: int) -> None:
        import minirec  # noqa: F401, what every submission needs is not counted as its memory or its time

        self.shell = new_shell()
        self.tests = {"__name__": "__main__"}
        limit(memory, seconds)

    def student(self, source: str) -> BaseException | None:
        """A cell in the students' namespace, run as Jupyter would."""
        result = self.shell.run_cell(source, silent=True, store_history=False)
        return result.error_in_exec if result.error_before_exec is None else result.error_before_exec

    def watch(self) -> None:
        """Student code begins after this."""
        self.originals = Originals(self.shell.user_ns)

    def given(self, source: str) -> None:
        """A cell of the source in the tests' namespace."""
        self.originals.restore()
        exec(compile(source, "<source>", "exec"), self.tests)

    def test(self, source: str, takes: list[str], ended: bool) -> None:
        """A test cell with the student's functions; if it `ended` the process before, with functions that raise.

        Then it still defines what later tests use.
        """

        def stopped(*arguments, **options):
            raise RuntimeError("this test ended its process")

        for name in takes:
            if name in self.shell.user_ns:
                self.tests[name] = stopped if ended else self.shell.user_ns[name]
        try:
            self.given(source)
        finally:
            replaced = self.originals.restore()
        if replaced:
            raise RuntimeError(f"the submission replaced {replaced[0]} during this test")


def describe(error: BaseException) -> str:
    """`AssertionError: its text`, whatever the exception does when it is asked."""
    try:
        text = str(error)[:LONGEST]
        return f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}"
    except BaseException:
        return "an exception whose text can't be read"


def main(channel: int, grader: int) -> None:
    """Answer requests until there are no more: a number used once, the kind of a cell, and what its method takes.

    A request is its length in 8 digits and a marshalled tuple.  An answer is a line: the number, the process, "passed"
    or "failed", and the error.  Only C functions read and write: no student code can replace a part of them.
    """
    supervise(channel)
    protect(grader)
    os.set_inheritable(channel, False)
    os.register_at_fork(after_in_child=lambda: close(channel))  # a process that a submission leaves behind is not heard
    worker, cells = getpid(), Cells()
    requests = open(channel, "rb", closefd=False)
    while size := requests.read(8):
        number, kind, arguments = parse(requests.read(int(size)))
        try:
            error = getattr(cells, kind)(**arguments)
        except BaseException as problem:
            error = problem
        if getpid() != worker:
            leave(0)
        text = "passed" if error is None else "failed " + describe(error).replace("\n", " ")
        write(channel, f"{number} {worker} {text}\n".encode("utf-8", "backslashreplace"))
    leave(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
