"""Copies of good files with something wrong in them, for tests that feed foreign files."""

import copy

ODD = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, 1e308, float("inf"), float("nan"), "", "0", "\x1b[2J",
       "\ud800", "\0", "x" * 10**4, "../x", [], [[]], {}, {"": None}, [1, "2"], {"a": {"b": [0]}}]  # fmt: skip


def spoilt_json(values, random) -> object:
    """A copy with one value replaced, removed, or put where it does not belong."""
    values = copy.deepcopy(values)
    place, key = None, None
    while place is None or (isinstance(place[key], (dict, list)) and place[key] and random.random() < 0.7):
        place = values if place is None else place[key]
        key = random.choice(list(place)) if isinstance(place, dict) else random.randrange(len(place))
    how = random.random()
    if how < 0.8 or isinstance(place, list):
        place[key] = copy.deepcopy(random.choice(ODD))
    elif how < 0.9:
        del place[key]
    else:
        place[random.choice(["", "model_type", "eos_token_id", "\x1b", "weight_map"])] = place[key]
    return values


def spoilt_bytes(content: bytes, random) -> bytes:
    """A copy with some bytes replaced, removed, or repeated."""
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(content))
        content[at : at + random.choice([0, 1, 1, 8])] = random.choice(
            [b"", b"\xff", b"{", b"[" * 3000, b"0", b'"', b"\0"]
        )
    return bytes(content)
