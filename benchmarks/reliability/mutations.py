"""Mutations of files: damaged bytes, and edits of JSON and safetensors structures. Each takes (bytes, rng) and returns bytes."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Mutation = Callable[[bytes, random.Random], bytes]
HUGE = [0, -1, 1, 2**31, 2**62, 10**12, 10**19, 10**30, 1e-320, 1e308, 0.5]
OTHERS = [None, True, "", "4", "W99A8", "a" * 10_000, [], {}, [[]], {"a": {}}, "../../etc", "\u2028\0"]


# Bytes


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 8, 64))) + data[at:]


def zero(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 8, 64, 512)))
    return data[:start] + bytes(end - start) + data[end:]


def remove(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 8, 64, 512)) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    part = data[start : start + rng.choice((1, 8, 64, 512))]
    return data[:start] + part + data[start:]


BYTES: dict[str, Mutation] = {
    "bits flipped": flip, "truncated": truncate, "bytes inserted": insert, "range zeroed": zero, "range removed": remove,
    "range repeated": repeat,
}  # fmt: skip


# JSON


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return all places in a JSON value, as key paths."""
    paths = [path]
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        paths += places(part, (*path, key))
    return paths


def edited(data: bytes, rng: random.Random, change: Callable[[Any, Any, random.Random], None]) -> bytes:
    """Apply `change(parent, key, rng)` at a random place. All depths are equally likely, because most places are at the greatest depth."""
    value = [json.loads(data)]
    paths = places(value)[1:]
    depth = rng.choice(sorted({len(path) for path in paths}))
    path = rng.choice([path for path in paths if len(path) == depth])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1], rng)
    return json.dumps(value[0] if value else None, indent=1).encode("utf8", "surrogatepass")


def structural(change: Callable[[Any, Any, random.Random], None]) -> Mutation:
    return lambda data, rng: edited(data, rng, change)


def drop(parent: Any, key: Any, rng: random.Random) -> None:
    del parent[key]


def retype(parent: Any, key: Any, rng: random.Random) -> None:
    parent[key] = rng.choice([other for other in OTHERS if type(other) is not type(parent[key])])


def enlarge(parent: Any, key: Any, rng: random.Random) -> None:
    value = parent[key]
    if isinstance(value, str):
        parent[key] = rng.choice((value * 1000, value + "\ud800", value + "x", "9" * 5000, "W" + "9" * 5000))
    elif isinstance(value, list) and value:
        parent[key] = rng.choice((value * 1000, value + value[:1], value[1:], value[::-1]))
    elif isinstance(value, dict) and value:
        parent[key] = rng.choice(({**value, "more": 1}, dict(reversed(value.items())), {f"{k}x": v for k, v in value.items()}))
    else:
        parent[key] = rng.choice(HUGE)


def rename(parent: Any, key: Any, rng: random.Random) -> None:
    if isinstance(parent, dict):
        parent[rng.choice((f"{key}x", str(key)[:-1], "", str(key).upper(), "__proto__"))] = parent.pop(key)
    else:
        parent.insert(key, parent[key])


def deepen(parent: Any, key: Any, rng: random.Random) -> None:
    value = parent[key]
    for _ in range(rng.choice((1, 70, 300))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    parent[key] = value


def exchange(parent: Any, key: Any, rng: random.Random) -> None:
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    other = rng.choice(keys)
    parent[key], parent[other] = parent[other], parent[key]


def nudge(parent: Any, key: Any, rng: random.Random) -> None:
    """Replace a value by another of the same type."""
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int):
        parent[key] = value + rng.choice((-1, 1, 7))
    elif isinstance(value, float):
        parent[key] = value * rng.choice((0.5, 2.0, -1.0))
    elif isinstance(value, str) and value:
        at = rng.randrange(len(value))
        parent[key] = value[:at] + chr(33 + rng.randrange(90)) + value[at + 1 :]
    else:
        drop(parent, key, rng)


def write_oddly(data: bytes, rng: random.Random) -> bytes:
    """Write JSON on which parsers disagree: duplicate keys, NaN, infinity, endless digits, a byte order mark, deep nesting."""
    text = data.decode()
    at = rng.choice([index for index, letter in enumerate(text) if letter == ":"] or [0])
    end = min((text.index(mark, at) for mark in (",", "\n") if mark in text[at:]), default=len(text))
    odd = rng.choice(("NaN", "-Infinity", "1e400", "9" * 5000, "9" * 400, "[" * 5000, '"\\ud800"', "01", "0x1", "'a'", "nul"))
    first = text.find('"')
    key_twice = text[:first] + text[first : text.find("\n", first)].rstrip(",") + ", " + text[first:]
    return rng.choice((text[: at + 1] + odd + text[end:], "\ufeff" + text, text + text, key_twice, "[" * 100_000, f"[{text}]")).encode()


JSONS: dict[str, Mutation] = {
    "field dropped": structural(drop), "field retyped": structural(retype), "field enlarged": structural(enlarge),
    "field renamed": structural(rename), "field nested": structural(deepen), "fields exchanged": structural(exchange),
    "field nudged": structural(nudge), "written oddly": write_oddly,
}  # fmt: skip


# safetensors: eight bytes of length, a JSON header, the numbers


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return (header, numbers), or raise ValueError."""
    if len(data) < 8:
        raise ValueError("no header")
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("no header")
    return header, data[8 + length :]


def closed(header: dict[str, Any], numbers: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + numbers


def of_header(change: Callable[[dict[str, Any], str, random.Random], None]) -> Mutation:
    """Apply `change(header, tensor name, rng)` and leave the numbers unchanged."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        header, numbers = opened(data)
        change(header, rng.choice([name for name in header if name != "__metadata__"]), rng)
        return closed(header, numbers)

    return mutate


def length_of_header(data: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, length + 8, len(data), 10**8, 2**40, 2**63, 2**64 - 1))) + data[8:]


def reshape(header: dict[str, Any], name: str, rng: random.Random) -> None:
    shape = header[name]["shape"]
    other = (shape[::-1], [*shape, 1], [], [0], [10**12], [2**63, 2], [2**32, 2**32], [-1], ["1"], [1.0], [0, 10**18], None, [1] * 1000)
    header[name]["shape"] = rng.choice(other)


def retype_tensor(header: dict[str, Any], name: str, rng: random.Random) -> None:
    header[name]["dtype"] = rng.choice(
        ("F32", "I32", "U32", "F64", "BF16", "F16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", None)
    )


def move(header: dict[str, Any], name: str, rng: random.Random) -> None:
    start, end = header[name]["data_offsets"]
    others = (
        [start + 1, end + 1],
        [0, end - start],
        [start, end + 8],
        [end, start],
        [start, 2**63],
        [-8, end],
        [start],
        [start, start],
        "0",
    )
    header[name]["data_offsets"] = rng.choice(others)


def rename_tensor(header: dict[str, Any], name: str, rng: random.Random) -> None:
    header[rng.choice((f"{name}x", "", "__metadata__", name.replace("|", "."), "a" * 10_000, rng.choice(list(header))))] = header.pop(name)


def edit_metadata(header: dict[str, Any], name: str, rng: random.Random) -> None:
    metadata = header.get("__metadata__", {})
    other = (
        None,
        {},
        {**metadata, "more": "x"},
        dict.fromkeys(metadata, ""),
        dict.fromkeys(metadata, 1),
        {"format": "pt"},
        [],
        dict.fromkeys(metadata, "0" * 64),
    )
    header["__metadata__"] = rng.choice(other)


def drop_tensor(data: bytes, rng: random.Random) -> bytes:
    """Remove a tensor and its numbers; the file stays valid."""
    header, numbers = opened(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    start, end = header.pop(name)["data_offsets"]
    for entry in (entry for key, entry in header.items() if key != "__metadata__"):
        entry["data_offsets"] = [offset - (end - start) * (offset >= end) for offset in entry["data_offsets"]]
    return closed(header, numbers[:start] + numbers[end:])


def add_tensor(data: bytes, rng: random.Random) -> bytes:
    """Add a tensor with numbers; the file stays valid."""
    header, numbers = opened(data)
    name = rng.choice(
        (rng.choice([key for key in header if key != "__metadata__"]) + rng.choice(("2", "|W9|codes", "|A8")), "more", "floats")
    )
    header[name] = {"dtype": "F32", "shape": [4], "data_offsets": [len(numbers), len(numbers) + 16]}
    return closed(header, numbers + bytes(16))


def other_numbers(data: bytes, rng: random.Random) -> bytes:
    """Set one or all numbers of a tensor to impossible or unlikely values."""
    header, numbers = opened(data)
    name = rng.choice(
        [key for key, entry in header.items() if key != "__metadata__" and entry["data_offsets"][1] > entry["data_offsets"][0]]
    )
    start, end = header[name]["data_offsets"]
    if header[name]["dtype"] == "F32":
        values = np.frombuffer(numbers[start:end], "<f4").copy()
        where = slice(None) if rng.random() < 0.3 else rng.randrange(len(values))
        values[where] = rng.choice((np.nan, np.inf, -np.inf, 0.0, -1.0, 3e38, 1e-45, 1.5, 300.0, -values[where]))
    else:
        values = np.frombuffer(numbers[start:end], np.uint8).copy()
        values[rng.randrange(len(values)) :] = rng.randrange(256)
    return closed(header, numbers[:start] + values.tobytes() + numbers[end:])


TENSORS: dict[str, Mutation] = {
    "header's length": length_of_header, "shape edited": of_header(reshape), "dtype edited": of_header(retype_tensor),
    "offsets edited": of_header(move), "tensor renamed": of_header(rename_tensor), "metadata edited": of_header(edit_metadata),
    "tensor dropped": drop_tensor, "tensor added": add_tensor, "numbers edited": other_numbers,
}  # fmt: skip
