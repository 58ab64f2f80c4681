"""Arguments of all public entry points: refused by name before any work, or right.

A case is an entry point, one of its arguments, and a value that may be anything: numbers of Python, NumPy, torch,
fractions and decimals, NaN, infinities, huge and tiny numbers, booleans, strings, arrays, iterators.  It must end in a
ValueError that names the argument, with no block of the model run, or in the result that the same value gives as a
plain Python number.
"""

import inspect
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from fractions import Fraction
from itertools import repeat

import numpy as np
import pytest
import torch

from minirec import (
    RecurrentConfig,
    RecurrentDepthLM,
    adaptive_exit,
    autoregressive,
    diffusion_forcing,
    lens,
    lossless_wavefront,
    speculative,
    tasks,
)
from minirec.continuous_batching import Engine
from minirec.decoding import Grid, Options
from minirec.kv_cache import KVCache, bytes_per_token
from minirec.token_choice import TokenChoice
from minirec.training import TrainingConfig

SAMPLERS = (autoregressive, adaptive_exit, speculative, lossless_wavefront, diffusion_forcing)
WHOLE = (0, 1, 2, 3, 4, 5, 7, 23, 100, -1, 10**9, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 10**5000)
REAL = (0.0, -0.0, 0.03, 0.25, 0.5, 1.0, 1.5, 3.0, 100.0, -0.5, 1e-6, 1e-30, 1e-38, 1e-46, 5e-324, 1e30, 1e38, 1e39)
REAL += (1e308, 1 - 2**-40, math.nan, math.inf, -math.inf)


def narrow(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.bfloat16)


def pool() -> list:
    """All values, new ones at each call, since some are iterators."""
    values = [None, True, False, np.True_, torch.tensor(True), "", "1", "nan", "full", "shared", "words", "prefix"]
    values += [b"1", bytearray(b"12"), memoryview(b"12"), 1j, complex(1, 0), np.complex64(1), torch.tensor(1j), ...]
    values += [[], [1], [1, 2], [0.5], (2,), [[1], [2, 3]], ["1"], [[]], [None], {}, {1: 2}, {1}, {"a"}, range(3)]
    values += [iter([1, 2]), repeat(1), (x for x in "ab"), object(), int, torch.float16, torch.int64]
    values += [
        np.array([1]),
        np.array([0.5]),
        np.zeros((2, 2)),
        np.array([], dtype=int),
        np.array("1"),
        np.str_("full"),
    ]
    values += [np.array([[1, 2]]), np.datetime64("2026-01-01"), np.timedelta64(5, "s")]
    values += [torch.tensor([1]), torch.tensor([1, 2]), torch.tensor([[1, 2, 3]]), torch.tensor([[1.5]])]
    values += [torch.zeros(2, 2), torch.empty((), device="meta"), torch.zeros(2, device="meta")]
    values += [Decimal(x) for x in ("NaN", "sNaN", "Infinity", "1e400", "1e-400", "1", "0.5")]
    values += [Fraction(1, 2), Fraction(1, 3), Fraction(2), Fraction(10**400), Fraction(1, 10**400)]
    values += WHOLE
    values += [make(n) for n in WHOLE[:8] for make in (np.int64, np.uint8, torch.tensor, np.array)]
    values += [torch.tensor(2, dtype=torch.int8), np.int64(-1), torch.tensor(-1), np.uint64(2**64 - 1)]
    values += REAL
    with np.errstate(over="ignore"):
        values += [make(x) for x in REAL for make in (np.float32, np.float64, np.longdouble, torch.tensor, np.array)]
        values += [make(x) for x in REAL[:8] for make in (np.float16, narrow)]
    return values


SIZE = len(pool())


def plain(value):
    """A number of NumPy, torch, a fraction or a decimal as Python's own; lists of them too; anything else as it is."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor, memoryview)) and not getattr(value, "is_meta", False):
        value = value.tolist()
    if isinstance(value, (Fraction, Decimal, np.longdouble)):
        return float(value)
    return [plain(x) for x in value] if isinstance(value, list) else value


def is_whole(value) -> bool:
    return type(value) is int


def is_real(value) -> bool:
    return is_whole(value) or (type(value) is float and math.isfinite(value))


def all_whole(value) -> bool:
    """Ids: an int, or a collection of them."""
    one = is_whole(value) or (isinstance(value, (tuple, set, range)) and all(map(is_whole, value)))
    return one or (isinstance(value, list) and all(map(all_whole, value)))


# what an argument may be at most, by the annotation or by its name
KINDS: dict[str, Callable] = {
    "int": is_whole,
    "float": is_real,
    "bool": lambda value: type(value) is bool,
    "str": lambda value: isinstance(value, str),
    "prompt": all_whole,
    "stop_tokens": all_whole,
    "seed": lambda value: all_whole(value) or isinstance(value, str),  # a stream of problems may have a name
    "families": lambda value: isinstance(value, (str, list, tuple)),
    "on_token": callable,
    "on_pass": callable,
    "tokens": lambda value: isinstance(value, torch.Tensor),
    "state": lambda value: isinstance(value, torch.Tensor),
    "states": lambda value: isinstance(value, torch.Tensor),
    "guesses": lambda value: isinstance(value, torch.Tensor),
    "dtype": lambda value: isinstance(value, torch.dtype),
}


@dataclass
class Entry:
    """An entry point: a function of keyword arguments, its arguments with their kinds, and sets of legal ones."""

    name: str
    call: Callable
    arguments: dict[str, str]  # name -> key of KINDS, with "?" if None is allowed
    bases: list[dict]


def arguments_of(function: Callable, *leave_out: str) -> dict[str, str]:
    """Arguments by name, and their kinds from the signature."""
    kinds = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = str(parameter.annotation).split(" |")[0]
        if name not in ("self", "model", "config", "options", "clock", "device", *leave_out):
            kinds[name] = (name if name in KINDS else kind) + "?" * ("None" in str(parameter.annotation))
    return kinds


def entries(model: RecurrentDepthLM) -> list[Entry]:
    """All entry points, on a model."""
    options = {f.name: (f.name if f.name in KINDS else f.type.split(" |")[0]) + "?" * ("None" in f.type)
               for f in fields(Options)}  # fmt: skip
    options.pop("fast")  # on a CPU the same thing twice
    greedy = dict(prompt=[1, 2, 3], max_new_tokens=5)
    sampled = greedy | dict(temperature=1.0, kv="shared", num_steps=3, init_scale=0.5)
    found = []
    for sampler in SAMPLERS:
        own = arguments_of(sampler.generate) | {"prompt": "prompt"}
        own.pop("kv", None)

        def generate(sampler=sampler, **given):
            return sampler.generate(model, given.pop("prompt"), given.pop("max_new_tokens"), **given)

        found.append(Entry(sampler.__name__, generate, own | options, [greedy, sampled]))
    found[1].bases.append(greedy | {"criterion": "kl"})
    found[1].bases.append(greedy | {"criterion": "argmax-stability"})
    found[4].bases.append(greedy | {"schedule": "acceleration", "noise": 0.2})

    def engine(**given):
        made = Engine(model, **given)
        for prompt in ([1, 2, 3], [4]):
            made.submit(prompt, 3)
        return made.run()

    found.append(Entry("Engine", engine, arguments_of(Engine.__init__), [{"slots": 2, "max_length": 20},
                 {"slots": 2, "max_length": 20, "mode": "wavefront", "kv": "shared"}]))  # fmt: skip
    engines = [Engine(model, 2, 20, mode=mode) for mode in ("sequence", "depth", "wavefront")]

    def submit(**given):
        made = engines[given.pop("engine")]
        id = made.submit(given.pop("prompt"), given.pop("max_new_tokens"), **given)
        made.run()
        request = made.requests.pop(id)
        if request.error is not None:
            raise request.error
        return request.generation

    own = arguments_of(Engine.submit) | {"prompt": "prompt"} | options
    for name in ("kv", "kv_slots", "init_scale", "trace"):
        own.pop(name)
    bases = [greedy | {"engine": i} | own for i in range(3) for own in ({}, {"temperature": 1.0, "threshold": 0.1})]
    found.append(Entry("submit", submit, own, bases))

    small = dict(n_embd=16, n_heads=2, intermediate_size=24, vocab_size=23, block_size=48, mean_recurrence=4)
    found.append(Entry("RecurrentConfig", lambda **given: asdict(RecurrentConfig(**given)),
                       arguments_of(RecurrentConfig), [small]))  # fmt: skip
    found.append(Entry("TrainingConfig", lambda **given: asdict(TrainingConfig(**given)),
                       arguments_of(TrainingConfig), [{}]))  # fmt: skip
    found.append(Entry("TokenChoice", lambda **given: asdict(TokenChoice(**given)),
                       arguments_of(TokenChoice), [{}, {"temperature": 0.5}]))  # fmt: skip
    found.append(Entry("heldout", tasks.heldout, arguments_of(tasks.heldout), [{"n": 3}, {"n": 2, "family": "hops"}]))
    found.append(Entry("problems", lambda **given: next(tasks.problems(**given)), arguments_of(tasks.problems),
                       [{"split": "train"}]))  # fmt: skip
    cache = dict(config=model.config, num_steps=3)
    found.append(
        Entry("bytes_per_token", bytes_per_token, arguments_of(bytes_per_token), [cache, cache | {"kv": "shared"}])
    )
    found.append(Entry("KVCache", lambda **given: KVCache(**given).nbytes, arguments_of(KVCache.__init__),
                       [cache | {"batch": 2, "length": 5, "kv": kind} for kind in ("full", "shared")]))  # fmt: skip

    tokens = {"tokens": torch.tensor([[1, 2, 3]])}
    found.append(Entry("model", lambda **given: model(**given).logits, arguments_of(model.forward), [tokens]))
    found.append(Entry("initial_state", lambda **given: model.initial_state(torch.arange(3), **given),
                       {"seed": "int", "scale": "float"}, [{}]))  # fmt: skip
    states = {"states": torch.rand(3, 1, 4, 16, dtype=model.dtype, generator=torch.Generator().manual_seed(0))}
    found.append(Entry("trajectory", lambda **given: lens.trajectory(model, **given),
                       arguments_of(lens.trajectory) | {"seed": "int"}, [tokens]))  # fmt: skip
    for function in (lens.relative_change, lens.distance_to_end, lens.principal_components):
        found.append(Entry(function.__name__, function, arguments_of(function), [states]))
    for function in (lens.coda_lens, lens.logit_lens):
        found.append(Entry(function.__name__, lambda function=function, **given: function(model, **given),
                           {"states": "states"}, [states]))  # fmt: skip
    found.append(Entry("settled", lens.settled, {"guesses": "guesses"}, [{"guesses": torch.tensor([[1, 2], [1, 3]])}]))
    return found


def same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def verdict(entry: Entry, base: dict, argument: str, value, again) -> tuple[str, str | None]:
    """What became of a value: "refused" or "right", and what is wrong with that, if anything; again: the same value."""
    ran = []
    parts = [(Grid, name) for name in ("embed", "recur", "decode")]
    parts += [(RecurrentDepthLM, name) for name in ("prelude", "recur", "coda")]
    before = [getattr(owner, name) for owner, name in parts]

    def counted(work):
        return lambda *given, **more: ran.append(work) or work(*given, **more)

    for (owner, name), work in zip(parts, before, strict=True):
        setattr(owner, name, counted(work))
    try:
        with np.errstate(all="ignore"):
            result = entry.call(**base | {argument: value})
    except ValueError as error:
        if argument not in str(error) and not (argument == "families" and "family" in str(error)):
            return "refused", f"does not name it: {error}"
        return "refused", "after work was done" if ran else None
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    finally:
        for (owner, name), work in zip(parts, before, strict=True):
            setattr(owner, name, work)
    kind = entry.arguments[argument]
    if value is None and kind.endswith("?"):
        return "right", None
    tensors = kind.rstrip("?") in ("tokens", "state", "states", "guesses")
    value, own = again, again if tensors else plain(again)
    if not KINDS[kind.rstrip("?")](own):
        return "right", "accepted, though it is no such thing"
    return "right", None if same(
        result, entry.call(**base | {argument: own})
    ) else "another result than as Python's own"


def cases(model: RecurrentDepthLM) -> list[tuple[Entry, dict, str]]:
    return [(entry, base, name) for entry in entries(model) for base in entry.bases for name in entry.arguments]


@pytest.fixture(scope="module")
def all_cases(small_model):
    return cases(small_model(0))


def fuzz(all_cases: list, n: int, seed: int) -> Counter:
    """What became of n random values; fails with a list of all that were not refused by name or right."""
    rng, ends, wrong = random.Random(seed), Counter(), []
    for _ in range(n):
        (entry, base, argument), value = rng.choice(all_cases), rng.randrange(SIZE)
        ended, why = verdict(entry, base, argument, pool()[value], pool()[value])
        ends[ended] += 1
        if why:
            wrong.append(f"{entry.name}({argument}=value {value} of the pool, {type(pool()[value]).__name__}): {why}")
    assert not wrong, "\n".join([f"{len(wrong)} of {n} are wrong", *wrong])
    return ends


def test_any_value_is_refused_by_name_or_right(all_cases):
    fuzz(all_cases, 400, seed=0)


@pytest.mark.slow
def test_5000_values_are_refused_by_name_or_right(all_cases):
    ends = fuzz(all_cases, 5000, seed=1)
    assert min(ends["refused"], ends["right"]) > 500


def test_a_real_number_may_be_of_any_type(all_cases):
    makes = (np.float16, np.float64, np.longdouble, np.array, torch.tensor, narrow, Fraction, Decimal)
    reals = [(e, base, name) for e, base, name in all_cases if e.arguments[name].startswith("float")]
    taken = set()
    for i, (entry, base, argument) in enumerate(reals):
        value = 1.5 if argument == "rope_base" else 0.5
        ended, wrong = verdict(entry, base, argument, makes[i % len(makes)](value), value)
        assert wrong is None, f"{entry.name}({argument}={makes[i % len(makes)](value)!r}): {wrong}"
        if ended == "right":
            taken.add((entry.name, argument))
    assert taken == {(entry.name, argument) for entry, _, argument in reals}, "some set of arguments has a place for it"
