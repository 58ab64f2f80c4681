"""JSON from somebody else: read without surprises, and each field held to the type and range declared for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minirec.files.machine import one_line

LARGEST = 2**28  # bytes; tokenizers with a million tokens need a tenth


def read_json(path: Path) -> dict:
    """The object in a JSON file; FileNotFoundError, OSError or ValueError that names the file if there is none."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes is too much")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except RecursionError:
        raise ValueError(f"{path} is not JSON that minirec reads: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must be an object")
    return values


class Count(NamedTuple):
    """A whole number."""

    least: int
    most: int

    def __str__(self):
        return f"a whole number from {self.least} to {self.most}"

    def holds(self, value) -> bool:
        return type(value) is int and self.least <= value <= self.most  # a bool is no size


class Number(NamedTuple):
    """A finite number."""

    least: float
    most: float

    def __str__(self):
        return f"a number from {self.least:g} to {self.most:g}"

    def holds(self, value) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and self.least <= value <= self.most


class Flag(NamedTuple):
    """true or false."""

    def __str__(self):
        return "true or false"

    def holds(self, value) -> bool:
        return type(value) is bool


class OneOf(NamedTuple):
    """One of some words."""

    words: tuple[str, ...]

    def __str__(self):
        return " or ".join(map(repr, self.words))

    def holds(self, value) -> bool:
        return isinstance(value, str) and value in self.words


class OrNull(NamedTuple):
    """What another field may be, or null."""

    field: Any

    def __str__(self):
        return f"{self.field}, or null"

    def holds(self, value) -> bool:
        return value is None or self.field.holds(value)


class OrList(NamedTuple):
    """What another field may be, null, or a list of such values."""

    field: Count

    def __str__(self):
        return f"{self.field}, a list of such numbers, or null"

    def holds(self, value) -> bool:
        return value is None or all(map(self.field.holds, value if isinstance(value, list) else [value]))


def check_fields(values: Mapping, fields: Mapping, where: str = "") -> None:
    """ValueError "<where><name> is <value>; it must be <field>" for the first value that its field does not hold."""
    for name, field in fields.items():
        if name in values and not field.holds(values[name]):
            raise ValueError(f"{where}{name} is {one_line(repr(values[name]))}; it must be {field}")
