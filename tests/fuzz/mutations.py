"""Changes to a file as it gets damaged, or as somebody forges it."""

import json
import random

NASTY_VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**19, 10**400, 1e308, float("inf"), float("nan"),
    "", " ", "a", "../../etc/passwd", "/dev/zero", "..", "\0", "\ud800", "é\u2028", "x" * 5000, "1",
    [], {}, [[]], ["a"], {"a": 1}, [1] * 50,
)  # fmt: skip
NASTY_BYTES = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"\\ud800", b"9" * 5000, b"1e999",
    b"[" * 2000, b"{" * 2000, b'{"a":' * 2000, b"(" * 2000, b"-" * 600, b"NaN", b"\xe2\x80\xa8",
    b"\xff" * 8, b"@", b"%", b"import os\n", b"include 'run.gin'\n", b"\x00\x00\x00\x80", b"../",
    b"**9**9", b"= ", b"()", b"</s>", b"So the answer is ", b"'", b'"""', b"0x", b"\xd9\xa3",
)  # fmt: skip


def mutate(data: bytes, rng: random.Random, others: list[bytes] = ()) -> bytes:
    """Damages a file or forges a field of it, one to four times."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        data = rng.choice((_mutate_bytes, _mutate_bytes, _mutate_json))(data, rng)
    if others and rng.random() < 0.1:
        other = rng.choice(others)
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]
    return data


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((1, 1, 2, 8, 64, 10_000)))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:start] + data[stop:]
    if kind == 1:
        return data[:start] + bytes([rng.randrange(256)]) + data[start + 1 :]
    if kind == 2:
        return data[:start] + rng.choice(NASTY_BYTES) + data[start:]
    if kind == 3:
        return data[:start] + rng.choice(NASTY_BYTES) + data[stop:]
    if kind == 4:
        return data[:start] + data[start:stop] * 2 + data[stop:]
    other = rng.randrange(len(data) + 1)
    return data[:start] + data[other : other + stop - start] + data[stop:]


def _mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Puts a nasty value into a JSON document, a line of JSON, or a safetensors header."""
    start, stop, is_header = 0, len(data), False
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data):
        start, stop, is_header = 8, 8 + int.from_bytes(data[:8], "little"), True
    elif data.count(b"\n") > 1 and rng.random() < 0.9:
        lines = data.split(b"\n")
        number = rng.randrange(len(lines))
        start = sum(len(line) + 1 for line in lines[:number])
        stop = start + len(lines[number])
    try:
        document = json.loads(data[start:stop])
    except (ValueError, RecursionError):
        return _mutate_bytes(data, rng)
    changed = json.dumps(_forge(document, rng)).encode()
    head = len(changed).to_bytes(8, "little") if is_header else data[:start]
    return head + changed + data[stop:]


def _forge(value, rng: random.Random):
    """`value` with one entry, somewhere in it, removed, replaced, renamed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(6)
        if kind == 0:
            return {name: entry for name, entry in value.items() if name != key}
        if kind == 1:
            return value | {rng.choice(("", "x", "__class__", key + "s", "\ud800")): value[key]}
        return value | {key: _forge(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        kind = rng.randrange(5)
        if kind == 0:
            return value[:index] + value[index + 1 :]
        if kind == 1:
            return value + [value[index]]
        return [*value[:index], _forge(value[index], rng), *value[index + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 2, 1000, 10**6, -value - 1))
    return rng.choice(NASTY_VALUES)
