"""Damage: what a fuzz test does to files. Every function takes the file's content and a seeded generator.

Beside bytes that are changed anywhere, there are mutations that know the form and keep it intact around the damage (JSON that
still parses, tar headers with a right checksum, safetensors with a right header size), so that the code behind sees the damage.
"""

import json
import random
from collections.abc import Callable

BLOCK = 512

#: Values that stand where others were expected.
STRANGE = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, -(2**63) - 1, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "0", "x",
    "../../x", "/", ".", "a\nb", "\x00", "\ud800", "é" * 300, [], {}, [[]], [None], {"a": {}}, ["x", "x"], [0] * 50,
)  # fmt: skip


def mutate_bytes(content: bytes, generator: random.Random) -> bytes:
    """Some bytes changed, removed, added, doubled or cut off."""
    damaged = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(damaged) + 1)
        length = generator.choice((1, 1, 2, 8, BLOCK))
        kind = generator.choice(("change", "change", "flip", "remove", "insert", "double", "cut", "zero"))
        if kind == "change":
            damaged[place : place + length] = generator.randbytes(length)
        elif kind == "flip" and place < len(damaged):
            damaged[place] ^= 1 << generator.randrange(8)
        elif kind == "remove":
            del damaged[place : place + length]
        elif kind == "insert":
            damaged[place:place] = generator.randbytes(length)
        elif kind == "double":
            damaged[place:place] = damaged[place : place + length]
        elif kind == "zero":
            damaged[place : place + length] = bytes(length)
        elif generator.random() < 0.3:
            del damaged[place:]
    return bytes(damaged)


def mutate_json(content: bytes, generator: random.Random) -> bytes:
    """Values exchanged, removed, added, doubled or nested; keys renamed or doubled. What it gives is mostly JSON."""
    value = json.loads(content)
    for _ in range(generator.randint(1, 3)):
        value = _mutate_value(value, generator)
    text = json.dumps(value, ensure_ascii=generator.random() < 0.5, indent=generator.choice((None, 1)))
    kind = generator.randrange(20)
    if kind == 0:
        text = "[" * 100_000 + text
    elif kind == 1:
        text = "[" * 100_000 + "]" * 100_000
    elif kind == 2:
        text = text.replace("0", "9" * 5000, 1)
    elif kind == 3:
        text = "\ufeff" + text
    elif kind == 4:
        text = _double_a_key(text, generator)
    return text.encode("utf-8", "surrogatepass")


def mutate_tar(content: bytes, generator: random.Random) -> bytes:
    """Fields of headers changed, with a right checksum; members removed, doubled, or exchanged."""
    damaged = bytearray(content)
    for _ in range(generator.randint(1, 2)):
        starts = _find_headers(bytes(damaged))
        start = generator.choice(starts)
        kind = generator.choice(
            ("name", "size", "type", "link", "prefix", "magic", "mode", "remove", "double", "exchange")
        )
        if kind in ("remove", "double", "exchange"):
            _move_member(damaged, starts, start, kind, generator)
            continue
        field, values = {
            "name": (slice(0, 100), (b"", b"/", b"..", b"a/../b.png", b"__note__/x.png", b"\xff\xfe.png", b"x" * 100, b".png",
                                     b"a\nb.json", b"train-0.json", b"train-1.cls", b"a.b.c.png", b"A.PNG")),
            "size": (slice(124, 136), (b"00000000000\0", b"00000000001\0", b"00000001000\0", b"77777777777\0", b"-0000000001\0",
                                       b"\x80" + bytes(10) + b"\x05", b"\xff" * 12, b"\x80" + b"\xff" * 11, b" " * 12)),
            "type": (slice(156, 157), tuple(bytes([code]) for code in b"\x000123456789xgLKSDVXz")),
            "link": (slice(157, 257), (b"/etc/passwd", b"../x", b"train-0.png")),
            "prefix": (slice(345, 500), (b"a", b"..", b"/", b"x" * 155, b"\xff")),
            "magic": (slice(257, 265), (b"ustar  \0", bytes(8), b"ustar\x0000", b"GNUtar \0")),
            "mode": (slice(100, 124), (bytes(24), b"\xff" * 24, b"7" * 24)),
        }[kind]  # fmt: skip
        width = field.stop - field.start
        damaged[start + field.start : start + field.stop] = generator.choice(values)[:width].ljust(width, b"\0")
        _repair_checksum(damaged, start)
    return bytes(damaged)


def mutate_safetensors(content: bytes, generator: random.Random) -> bytes:
    """Shapes, places, types, names and metadata of the header changed, with a right header size."""
    size = int.from_bytes(content[:8], "little")
    header = mutate_json(content[8 : 8 + size], generator)
    if generator.random() < 0.7:  # known changes that keep more of the form
        tree = json.loads(content[8 : 8 + size])
        name = generator.choice([name for name in tree if name != "__metadata__"])
        kind = generator.choice(("dtype", "shape", "place", "rename", "remove", "transpose", "metadata"))
        if kind == "dtype":
            tree[name]["dtype"] = generator.choice(
                ("F64", "F32", "F16", "BF16", "I64", "I32", "U16", "U8", "I8", "BOOL", "F8_E4M3")
            )
        elif kind == "shape":
            tree[name]["shape"] = generator.choice(
                ([], [0], [1], [2**40], [2**32, 2**32], [0, 2**63], tree[name]["shape"][::-1])
            )
        elif kind == "transpose":
            tree[name]["shape"] = [*tree[name]["shape"], 1]
        elif kind == "place":
            tree[name]["data_offsets"] = generator.choice(([0, 0], [0, 2**40], [8, 4], [2**64 - 1, 2**64 - 1]))
        elif kind == "rename":
            tree[generator.choice(("x", "", "__metadata__"))] = tree.pop(name)
        elif kind == "remove":
            del tree[name]
        elif tree.get("__metadata__"):
            key = generator.choice(sorted(tree["__metadata__"]))
            old = tree["__metadata__"][key]
            new = mutate_json(old.encode(), generator).decode("utf-8", "replace") if old[:1] in "{[" else old
            tree["__metadata__"][key] = generator.choice((new, new, "", "-1", "9" * 30, "/", "x\x00", old[::-1]))
        header = json.dumps(tree).encode()
    length = generator.choice((len(header),) * 8 + (0, 2**40, 2**63, len(header) - 1))
    return length.to_bytes(8, "little") + header + content[8 + size :]


def _mutate_value(value: object, generator: random.Random) -> object:
    """One change at a random depth."""
    if isinstance(value, (dict, list)) and value and generator.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = generator.choice(keys)
        kind = generator.randrange(12)
        changed = dict(value) if isinstance(value, dict) else list(value)
        if kind == 0:
            del changed[key]
        elif kind == 1 and isinstance(changed, list):
            changed.insert(generator.randrange(len(changed) + 1), generator.choice(changed))
        elif kind == 1:
            changed[generator.choice((str(key)[:-1], f"{key}s", str(key).upper(), ""))] = changed.pop(key)
        elif kind == 2:
            other = generator.choice(keys)
            changed[key], changed[other] = changed[other], changed[key]
        elif kind == 3 and isinstance(changed, list):
            generator.shuffle(changed)
        else:
            changed[key] = _mutate_value(changed[key], generator)
        return changed
    return generator.choice(STRANGE)


def _double_a_key(text: str, generator: random.Random) -> str:
    """An object's first key again, with another value behind it."""
    places = [n for n, letter in enumerate(text) if letter == "{" and text[n + 1 : n + 20].lstrip().startswith('"')]
    if not places:
        return text
    place = generator.choice(places) + 1
    key = text[place:].split(":", 1)[0].strip()
    return f"{text[:place]}{key}: {json.dumps(generator.choice(('x', 0, [], None)))}, {text[place:]}"


def _find_headers(content: bytes) -> list[int]:
    """Where each member's header starts; what comes after a damaged one is not found."""
    starts, place = [], 0
    while place + BLOCK <= len(content) and content[place : place + BLOCK].strip(b"\0"):
        starts.append(place)
        try:
            size = int(content[place + 124 : place + 136].strip(b"\0 ") or b"0", 8)
        except ValueError:
            break
        if size < 0:
            break
        place += BLOCK + -(-size // BLOCK) * BLOCK
    return starts or [0]


def _move_member(damaged: bytearray, starts: list[int], start: int, kind: str, generator: random.Random) -> None:
    later = [place for place in starts if place > start]
    end = later[0] if later else start + 2 * BLOCK
    member = bytes(damaged[start:end])
    if kind == "double":
        place = generator.choice(starts)
        damaged[place:place] = member
        return
    del damaged[start:end]
    if kind == "exchange":
        places = [place if place < start else place - len(member) for place in starts if place != start] or [0]
        place = generator.choice(places)
        damaged[place:place] = member


def _repair_checksum(damaged: bytearray, start: int) -> None:
    damaged[start + 148 : start + 156] = b" " * 8
    total = sum(damaged[start : start + BLOCK])
    damaged[start + 148 : start + 156] = f"{total:06o}\0 ".encode()


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": mutate_bytes,
    "json": mutate_json,
    "tar": mutate_tar,
    "safetensors": mutate_safetensors,
}
