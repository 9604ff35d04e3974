"""Ways in which a file of others goes wrong, each drawn from a random generator."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

NUMBERS = [
    "0", "-1", "1e308", "-1e308", "1e999", "nan", "inf", "1e-320", str(2**31), str(2**63), str(10**30), "0x10", "007",
]  # fmt: skip
TEXTS = [
    "", " ", "null", "true", "[]", "{}", "..", "../../../outside/x", "/outside/x", "a/../../outside/x", "a\0b", "a\nb",
    "\\", "${oc.env:HOME}", "${", "</title><script>alert(1)</script>", "$(touch outside/x)", "é\u202e", "x" * 5000,
    "*a", "&a [*a]", "file:///etc/passwd", "s3://nobody/x", "http://127.0.0.1:9/x", "%s%n", "{0.__class__}",
    "{:>2000000000}", '"', "'",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 2**40, 10**12, 10**30, 1.5, "x", "", [], {}, [None], {"a": 1}, [[]], "../x", -0.0,
]  # fmt: skip


def bytes_changed(data: bytes, rng: Random) -> bytes:
    """Cut, flipped, overwritten, doubled or left out somewhere."""
    if not data:
        return rng.randbytes(rng.randrange(100))
    first, count = rng.randrange(len(data)), rng.choice([1, 2, 8, 40, 200, 5000])
    start, rest = data[:first], data[first + count :]
    flipped = start + bytes([data[first] ^ 1 << rng.randrange(8)]) + data[first + 1 :]
    text = rng.choice([*TEXTS, *NUMBERS]).encode()
    fillings = [rng.randbytes(count), bytes(count), b"\xff" * count, b"", text, 2 * data[first : first + count]]
    others = [start, flipped, rng.randbytes(count), data + rng.randbytes(count)]
    return rng.choice([*(start + filling + rest for filling in fillings), *others])


def text_changed(data: bytes, rng: Random) -> bytes:
    """A number, a word or a line of it replaced, doubled, left out or made something else."""
    text = data.decode("utf-8", "replace")
    part = rng.choice([r"-?\d+(\.\d+)?", r"[A-Za-z_]+", r"[^,\n]+", r"[^\n]*\n", r"[{}\[\]\":,\n]"])
    matches = list(re.finditer(part, text))
    if not matches:
        return bytes_changed(data, rng)
    old, other = rng.choice(matches), rng.choice(matches)
    new = rng.choice([rng.choice(NUMBERS), rng.choice(TEXTS), "", other.group(), old.group() * 2, "[" * 50_000])
    changed = (text[: old.start()] + new + text[old.end() :]).encode("utf-8", "surrogatepass")
    return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe"]) + changed if rng.random() < 0.05 else changed


def json_changed(data: bytes, rng: Random) -> bytes:
    """One of its values is another one, or gone, or stands under another key."""
    try:
        loaded = json.loads(data)
    except (ValueError, RecursionError):
        return text_changed(data, rng)
    items: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            items.append((value, key))
            walk(value[key])

    walk(loaded)
    if not items or rng.random() < 0.05:
        return json.dumps(rng.choice(VALUES)).encode()
    holder, key = rng.choice(items)
    if rng.random() < 0.2:
        del holder[key]
    elif isinstance(holder, dict) and rng.random() < 0.2:
        holder[rng.choice(TEXTS)] = holder.pop(key)
    else:
        old = holder[key]
        near = [old + 1, -old, old * 10**9] if isinstance(old, int | float) else []
        texts = TEXTS if isinstance(old, str) else []
        holder[key] = rng.choice([*VALUES, *near, *texts, float("nan"), float("inf"), old, [old], {"x": old}])
    return json.dumps(loaded).encode()


def lines_changed(data: bytes, rng: Random) -> bytes:
    """A line of JSON lines is changed as `json_changed` does, or all of it as text."""
    lines = data.splitlines()
    if not lines or rng.random() < 0.5:
        return text_changed(data, rng)
    i = rng.randrange(len(lines))
    lines[i] = json_changed(lines[i], rng)
    return b"\n".join(lines) + b"\n"


def header_changed(data: bytes, rng: Random) -> bytes:
    """The JSON header of a safetensors file, its length kept true or not."""
    size = int.from_bytes(data[:8], "little")
    if size > len(data) or rng.random() < 0.3:
        return bytes_changed(data[: size + 200], rng) + data[size + 200 :]
    header = (json_changed if rng.random() < 0.8 else text_changed)(data[8 : 8 + size], rng)
    length = len(header) if rng.random() < 0.9 else rng.choice([0, 1, size, 2**40, 2**63 - 1])
    return struct.pack("<Q", length) + header + data[8 + size :]


def member_changed(data: bytes, rng: Random) -> bytes:
    """A header of a tar archive: 512 bytes somewhere, its name, type or size."""
    at = 512 * rng.randrange(max(1, len(data) // 512))
    field, new = rng.choice(
        [(0, b"../../outside/x\0"), (0, b"/outside/x\0"), (156, b"2"), (156, b"1"), (124, b"77777777777\0"), 
         (124, b"-1\0"), (148, b"0000000\0"), (0, bytes(512)), (257, b"nostar")]
    )  # fmt: skip
    return data[: at + field] + new + data[at + field + len(new) :] if rng.random() < 0.6 else bytes_changed(data, rng)


BY_SUFFIX: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": json_changed, ".jsonl": lines_changed, ".csv": text_changed, ".yaml": text_changed, ".txt": text_changed,
    ".safetensors": header_changed, ".tar": member_changed,
}  # fmt: skip


def change_file(path: Path, rng: Random) -> None:
    """Changes the file as its kind suggests, now and then as bytes, or makes something else of it."""
    if rng.random() < 0.03:
        path.unlink()
        what = rng.choice(["gone", "folder", "link out", "link to itself"])
        if what == "folder":
            path.mkdir()
        elif what != "gone":
            path.symlink_to("/".join([".."] * 3 + ["outside", "secret"]) if what == "link out" else path)
        return
    change = BY_SUFFIX.get(path.suffix, bytes_changed)
    data = path.read_bytes()
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        data = (change if rng.random() < 0.85 else bytes_changed)(data, rng)
    path.write_bytes(data)
