"""Broken, hostile and foreign model files, built from bytes: no binary fixtures.

Each maker returns ``{name of the fault: content}``. Nothing here imports torch or safetensors.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

# The one good file that faults are made of: two tensors, F32 (2, 3) and BF16 (4).
GOOD_HEADER: dict[str, Any] = {
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def safetensors(header: Any = None, data: bytes = bytes(32), *, raw: bytes | None = None) -> bytes:
    """A safetensors file; ``raw`` replaces the JSON text of the header."""
    text = raw if raw is not None else json.dumps(header or GOOD_HEADER).encode()
    return struct.pack("<Q", len(text)) + text + data


def _one(**changes: Any) -> dict[str, Any]:
    entry = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]} | changes
    return {"a": {k: v for k, v in entry.items() if v is not ...}}


def corrupt_safetensors() -> dict[str, bytes]:
    """The 49 headers that must be refused."""
    good = safetensors()
    size = len(good) - 40
    raws = {
        "empty object": b"{}", "only metadata": b'{"__metadata__":{}}', "array": b"[]",
        "number": b"12", "null": b"null", "text": b'"abc"', "not JSON": b"{abc}",
        "unclosed": b'{"a":', "trailing comma": b'{"a":1,}', "bad UTF-8": b'{"\xff\xfe":1}',
        "NaN": b'{"a":NaN}', "deep nesting": b"[" * 100_000, "deep objects": b'{"a":' * 50_000,
        "huge number": b'{"a":' + b"9" * 5000 + b"}", "spaces": b" " * 64,
        "zeros": bytes(64), "many lists": b"[" + b"[]," * 400_000 + b"[]]",
    }  # fmt: skip
    entries = {
        "entry is a list": {"a": []}, "entry is a number": {"a": 1}, "entry is null": {"a": None},
        "metadata is a list": {"__metadata__": [], **_one()},
        "metadata holds numbers": {"__metadata__": {"a": 1}, **_one()},
        "no dtype": _one(dtype=...), "dtype null": _one(dtype=None), "dtype 32": _one(dtype=32),
        "dtype unknown": _one(dtype="F99"), "dtype lower case": _one(dtype="f32"),
        "no shape": _one(shape=...), "shape text": _one(shape="2"), "shape null": _one(shape=None),
        "shape negative": _one(shape=[-2, -4]), "shape float": _one(shape=[2.0, 4]),
        "shape bool": _one(shape=[True, 8]), "shape huge": _one(shape=[2**40, 2**40]),
        "shape zero times huge": _one(shape=[0, 2**62], data_offsets=[0, 0]),
        "shape too small": _one(shape=[2, 3]), "shape too large": _one(shape=[4, 4]),
        "100,000 dimensions": _one(shape=[1] * 99_999 + [8]),
        "no offsets": _one(data_offsets=...), "one offset": _one(data_offsets=[0]),
        "three offsets": _one(data_offsets=[0, 32, 64]),
        "offsets reversed": _one(data_offsets=[32, 0]),
        "offsets negative": _one(data_offsets=[-32, 0]),
        "offset past end": _one(data_offsets=[32, 64]),
        "offset 2**63": _one(data_offsets=[2**63 - 32, 2**63]),
        "empty name": {"": _one()["a"]}, "NUL in name": {"a\0b": _one()["a"]},
        "newline in name": {"a\nb": _one()["a"]}, "long name": {"a" * 5000: _one()["a"]},
    }  # fmt: skip
    entry = json.dumps(_one()["a"]).encode()
    overlap = {"a": _one()["a"], "b": _one()["a"]}
    hole = _one(shape=[2, 2], data_offsets=[16, 32])
    faults = {name: safetensors(raw=raw) for name, raw in raws.items()}
    faults |= {name: safetensors(header) for name, header in entries.items()}
    faults |= {
        "overlap": safetensors(overlap), "hole at the start": safetensors(hole),
        "same key twice": safetensors(raw=b'{"a":%s,"a":%s}' % (entry, entry)),
        "length 0": struct.pack("<Q", 0) + good[8:], "length 1": struct.pack("<Q", 1) + good[8:],
        "length - 1": struct.pack("<Q", size - 1) + good[8:],
        "length + 1": struct.pack("<Q", size + 1) + good[8:],
        "length 2**32": struct.pack("<Q", 2**32) + good[8:],
        "length 2**63": struct.pack("<Q", 2**63) + good[8:],
        "length 2**64 - 1": struct.pack("<Q", 2**64 - 1) + good[8:],
        "length 10**8": struct.pack("<Q", 10**8) + good[8:],
        "length 10**8 + 1": struct.pack("<Q", 10**8 + 1) + good[8:],
    }  # fmt: skip
    return faults


def truncations() -> dict[str, bytes]:
    """A good file cut or prolonged at each place where a reader can go wrong."""
    good = safetensors()
    end = len(good) - 32
    cuts = (0, 1, 7, 8, 9, 8 + (end - 8) // 2, end - 1, end, end + 1, end + 16, len(good) - 1)
    return {f"cut at {cut}": good[:cut] for cut in cuts} | {"one byte more": good + b"\0"}


def pickle_zip(data: bytes = b"\x80\x02}q\x00.") -> bytes:
    """A torch zip checkpoint whose pickle is ``data``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def foreign_files() -> dict[str, tuple[bytes, str]]:
    """Other things under the name of a safetensors file, and a word the message must have."""
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("readme.txt", "hello " * 50)
    return {
        "web page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
        "html": (b"\n  <html lang='en'>" + b"x" * 500, "web page"),
        "git lfs pointer": (LFS_POINTER, "Git LFS pointer (130 bytes)"),
        "zip": (zipped.getvalue(), "zip archive"),
        "torch zip": (pickle_zip(), "pickle"),
        "pickle": (b"\x80\x02}q\x00." + bytes(64), "pickle"),
        "gguf": (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + bytes(64), ".gguf"),
        "gzip": (gzip.compress(b"x" * 500), "gzip"),
        "all zeros": (bytes(4096), "zeros"),
    }


def mutants(good: bytes, count: int, seed: int, tokens: tuple[bytes, ...]) -> Iterator[bytes]:
    """Yield seeded mutants of a file: flips, cuts, insertions, deletions, number fields."""
    rng = random.Random(seed)
    numbers = (0, 1, 2**31, 2**32, 2**63, 2**64 - 1, 10**8, 10**8 + 1, len(good), len(good) - 8)
    for _ in range(count):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(max(1, len(data)))
            kind = rng.randrange(7)
            if kind == 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            elif kind == 1:
                data[at : at + rng.randint(1, 16)] = b""
            elif kind == 2:
                data[at:at] = rng.choice(tokens)
            elif kind == 3:
                del data[at:]
            elif kind == 4:
                data[at:at] = bytes(rng.randint(1, 64))
            elif kind == 5:
                data[at : at + 8] = struct.pack("<Q", rng.choice(numbers))
            else:
                data[0:8] = struct.pack("<Q", max(0, len(good) - 40 + rng.randint(-2, 2)))
        yield bytes(data)


SAFETENSORS_TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"-1", b"1e999", b"9" * 40, b"\\u0000",
    b'"__metadata__":{}', b"true", b'"F16"', b"\xff", b"\\ud800", b"[0,0]",
)  # fmt: skip
GGUF_TOKENS = (
    b"\xff" * 8, bytes(8), struct.pack("<Q", 2**40), struct.pack("<I", 9), struct.pack("<I", 8),
    b"general.alignment", b"comfy.gguf.orig_shape.", struct.pack("<Q", 5), b"GGUF",
)  # fmt: skip


def gguf_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Any) -> bytes:
    """A typed metadata value: text, int (u32), float, or a list of ints, floats or texts."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list):
        if value and isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_text, value))
        if value and isinstance(value[0], float):
            return struct.pack("<IIQ", 9, 6, len(value)) + struct.pack(f"<{len(value)}f", *value)
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return struct.pack("<II", 4, value)


def gguf(
    tensors: list[tuple[str, tuple[int, ...], int, int]],
    metadata: dict[str, Any] | None = None,
    data: bytes = b"",
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    """A GGUF file; a tensor is (name, torch shape, type number, offset). Data is aligned to 32."""
    metadata = metadata or {}
    n_tensors, n_keys = counts or (len(tensors), len(metadata))
    out = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    for key, value in metadata.items():
        out += gguf_text(key) + gguf_value(value)
    for name, shape, kind, offset in tensors:
        out += gguf_text(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % 32) + data


GOOD_GGUF = gguf(
    [("a.weight", (4, 64), 8, 0), ("b.bias", (8,), 0, 288)],
    {"general.architecture": "wan", "general.name": "tiny", "x": [1, 2, 3], "t": ["a", "bc"]},
    bytes(320),
)


def corrupt_gguf() -> dict[str, bytes]:
    """GGUF files that must be refused, among them the 49 bytes that hang the public reader."""
    one = [("a", (4, 64), 8, 0)]
    big = 2**63
    hang = (
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + gguf_text("k") + struct.pack("<IIQ", 9, 0, big - 1)
    )
    return {
        "array of 2**63 - 1 (49 bytes)": hang,
        "array of 2**63 texts": hang[:-12] + struct.pack("<IQ", 8, big),
        "array of arrays": hang[:-12] + struct.pack("<IQ", 9, 2),
        "tensor count 2**63": gguf(one, data=bytes(272), counts=(big, 0)),
        "key count 2**63": gguf(one, data=bytes(272), counts=(1, big)),
        "no tensors": gguf([]),
        "text length 2**63": b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, big) + bytes(32),
        "10**6 dimensions": b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + gguf_text("a")
        + struct.pack("<I", 10**6) + bytes(64),
        "2**32 - 1 dimensions": b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + gguf_text("a")
        + struct.pack("<I", 2**32 - 1) + bytes(64),
        "offset past the end": gguf([("a", (4, 64), 8, 2**40)], data=bytes(272)),
        "offset not aligned": gguf([("a", (4, 64), 8, 1)], data=bytes(300)),
        "product overflows": gguf([("a", (2**32, 2**32, 64), 8, 0)], data=bytes(272)),
        "size 2**63": gguf([("a", (big,), 0, 0)], data=bytes(272)),
        "row not a multiple of the block": gguf([("a", (64, 4), 8, 0)], data=bytes(272)),
        "type unknown": gguf([("a", (4, 64), 77, 0)], data=bytes(272)),
        "type of a value unknown": gguf(one, {"k": 1}, bytes(272)).replace(
            struct.pack("<II", 4, 1), struct.pack("<II", 44, 1)),
        "alignment 0": gguf(one, {"general.alignment": 0}, bytes(272)),
        "alignment 3": gguf(one, {"general.alignment": 3}, bytes(272)),
        "version 1": gguf(one, data=bytes(272), version=1),
        "version 2**31": gguf(one, data=bytes(272), version=2**31),
        "name twice": gguf([*one, ("a", (4, 64), 8, 288)], data=bytes(600)),
        "empty name": gguf([("", (4, 64), 8, 0)], data=bytes(272)),
        "overlap": gguf([*one, ("b", (4, 64), 8, 32)], data=bytes(600)),
        "orig_shape of another size": gguf(one, {"comfy.gguf.orig_shape.a": [3, 3]}, bytes(272)),
        "orig_shape negative": gguf(one, {"comfy.gguf.orig_shape.a": [-4, -64]}, bytes(272)),
        "data cut": gguf(one, data=bytes(271)),
        "header cut": gguf(one, data=b"")[:40], "only the magic": b"GGUF", "empty": b"",
    }  # fmt: skip


ESCAPING_NAMES = (
    "../x", "../../x", "a/../../x", "/etc/passwd", "//srv/x", "..", ".", "", " ", "\t",
    "..\\x", "a\\..\\..\\x", "\\x", "C:\\x", "C:x", "c:/x", "\\\\srv\\s\\x", "//?/C:/x",
    "x\0y", "x\ny", "x\x7fy", "CON", "con.safetensors", "sub/NUL.safetensors", "LPT1.txt",
    "COM¹.safetensors", "x.", "x ", "a" * 300, "x:stream", "model.safetensors:stream",
    "file:///x", "./../x", "a/./b",
)  # fmt: skip
"""Names that must never become a path, under the rules of Posix or of Windows."""
HARMLESS_NAMES = ("~x", "~/x", "%2e%2e/x", "a/b.safetensors", "..x", "x..y", "ünïcode", "-rf", "…")
