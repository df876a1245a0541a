"""A Wan 2.2 T2V-A14B as the single files people have, with random weights of true shape.

Names, dtypes, companions and the order of tensors are those of the published files: ComfyUI's
``fp8_scaled`` in its old spelling, ``int8_convrot`` with notes, city96's GGUF, plain bf16; umT5-XXL
in scaled fp8 with its tokenizer inside; the VAE with its own beginning values. The weights of one
block are made once and written for every block; all matrices have a standard deviation of 0.02.

Only one kind of transformer lies on the disk at a time. Both experts are one file under two names,
as in ``random_model``. The next kind is written over the last one: its pages are there already.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from random_model import Shapes, sizes_of
from safetensors.torch import save_file
from support import bad_files
from support.reference_layouts import original_vae, state_of
from support.tiny_models import WORDS
from support.true_models import autoencoder
from torch import Tensor

from wan_core import WanModelFiles
from wan_core.models import transformer_tensors

KINDS = ("fp8_scaled", "Q4_K", "int8_convrot", "bf16", "Q8_0")
"""In the order of their worth."""
GROUP = 256
STD, LARGEST = 0.02, 0.1
"""Of the weights; numbers beyond ``LARGEST`` (five standard deviations) are cut."""
PIECES = 256_000
"""Pieces of umT5's tokenizer."""
EXTRA_IDS = 300
"""Tokens that come after the pieces."""
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name, its dtype and shape in the header, and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    made_of: str
    """What its bytes are: "numbers", "ones", "scale", or the text of a note."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        count = math.prod(self.shape)
        if self.dtype in _BYTES:
            return count * _BYTES[self.dtype]
        per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.dtype]]
        return count // per_block * size


class Numbers:
    """Bytes of normally distributed weights in every dtype, made once and repeated."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._plain = torch.randn(count, generator=generator).mul_(STD).clamp_(-LARGEST, LARGEST)
        self._made: dict[str, tuple[Tensor, int]] = {}
        self._blocks: dict[tuple[object, ...], Tensor] = {}

    def of(self, entry: Entry) -> Tensor:
        """Return the bytes of a tensor, uint8. Blocks have the same ones."""
        key = (re.sub(r"\.\d+\.", ".#.", entry.name), entry.dtype, entry.shape, entry.made_of)
        if key not in self._blocks:
            self._blocks[key] = self._fresh(entry, len(self._blocks))
        return self._blocks[key]

    def _fresh(self, entry: Entry, number: int) -> Tensor:
        if entry.made_of == "scale":
            largest = 448 if entry.shape == () else 127
            spread = torch.linspace(0.9, 1.1, math.prod(entry.shape)) if entry.shape else 1
            scales = torch.ones(entry.shape).flatten() * spread * (LARGEST / largest)
            return scales.view(torch.uint8)
        if entry.made_of == "ones":
            numbers = self._plain[: math.prod(entry.shape)] + 1
            return numbers.to(_TORCH[entry.dtype]).view(torch.uint8)
        if entry.made_of != "numbers":
            return torch.frombuffer(bytearray(entry.made_of.encode("latin-1")), dtype=torch.uint8)
        base, unit = self._base(entry.dtype)
        # Begun somewhere else for each tensor, so that no two are the same.
        start = number * 7919 * unit % len(base)
        turned = torch.cat([base[start:], base[:start]])
        return turned.repeat(-(-entry.nbytes // len(base)))[: entry.nbytes]

    def _base(self, dtype: str) -> tuple[Tensor, int]:
        """Return bytes that may be repeated, and the bytes of one unit of them."""
        if dtype not in self._made:
            plain = self._plain
            if dtype in _TORCH:
                made = plain.to(_TORCH[dtype]), _BYTES[dtype]
            elif dtype == "F8_E4M3":
                made = (plain * (448 / LARGEST)).to(torch.float8_e4m3fn), 1
            elif dtype == "I8":
                made = _codes(plain), GROUP
            else:
                made = {"Q8_0": _q8_0, "Q4_K": _q4_k}[dtype](plain)
            self._made[dtype] = made[0].view(torch.uint8).flatten(), made[1]
        return self._made[dtype]

    def forget(self) -> None:
        """Drop what was made for one file."""
        self._made.clear()
        self._blocks.clear()


def _codes(plain: Tensor) -> Tensor:
    return (plain * (127 / LARGEST)).round().to(torch.int8)


def _q8_0(plain: Tensor) -> tuple[Tensor, int]:
    """Blocks of a float16 scale and 32 codes."""
    codes = _codes(plain).view(-1, 32)
    scale = torch.full((len(codes), 1), LARGEST / 127, dtype=torch.float16).view(torch.int8)
    return torch.cat([scale, codes], dim=1), 34


def _q4_k(plain: Tensor) -> tuple[Tensor, int]:
    """Blocks of 256: d, dmin, eight scales and minima of 6 bits, 128 bytes of nibbles.

    A number is d * scale * q - dmin * minimum with q of 0 to 15: with minimum = scale and
    dmin = 7.5 d its mean is zero.
    """
    generator = np.random.default_rng(0)
    count = max(1, len(plain) // 256)
    out = generator.integers(0, 256, (count, 144), np.uint8)  # the nibbles
    scale = generator.integers(24, 41, (count, 8), np.uint8)
    d = STD / (32 * math.sqrt((16**2 - 1) / 12))
    out[:, :4] = np.array([d, 7.5 * d], np.float16).view(np.uint8)
    low, high = scale[:, :4], scale[:, 4:]
    out[:, 4:8] = out[:, 8:12] = low | (high >> 4 << 6)
    out[:, 12:16] = (high & 15) | (high << 4)
    return torch.from_numpy(out), 144


# -- layouts ----------------------------------------------------------------------------------


def transformer_entries(kind: str, shapes: Shapes) -> list[Entry]:
    """Return the tensors of a transformer's file."""
    out = []
    for name, shape in transformer_tensors(shapes.transformer, "original").items():
        matrix, layer = len(shape) == 2, name.removesuffix(".weight")
        made_of = "ones" if "norm" in name and name.endswith(".weight") else "numbers"
        in_block = name.startswith("blocks.") and matrix
        if kind == "bf16":
            out.append(Entry(name, "BF16", shape, made_of))
        elif kind == "fp8_scaled" and matrix:
            out.append(Entry(name, "F8_E4M3", shape, made_of))
            out += [Entry(f"{layer}.{leaf}", "F32", (), "scale")
                    for leaf in ("scale_weight", "scale_input")]  # fmt: skip
        elif kind == "int8_convrot" and in_block:
            note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}
            text = json.dumps(note)
            out.append(Entry(name, "I8", shape, made_of))
            out.append(Entry(f"{layer}.weight_scale", "F32", (shape[0], 1), "scale"))
            out.append(Entry(f"{layer}.comfy_quant", "U8", (len(text),), text))
        elif kind.startswith("Q"):
            dtype = kind if in_block else "F16" if matrix else "F32"
            out.append(Entry(name, dtype, shape, made_of))
        else:
            out.append(Entry(name, "F16", shape, made_of))
    if kind == "fp8_scaled":
        out.append(Entry("scaled_fp8", "F8_E4M3", (0,), "numbers"))
    return out


def text_entries(shapes: Shapes, pieces: int) -> list[Entry]:
    """Return the tensors of umT5 in scaled fp8, its tokenizer among them."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        sizes = sizes_of(UMT5EncoderModel(UMT5Config(**shapes.text)))
    out = [Entry("scaled_fp8", "F8_E4M3", (0,), "numbers")]
    for name, size in sizes.items():
        if name == "encoder.embed_tokens.weight":
            continue  # is shared.weight
        linear = re.search(r"\.(q|k|v|o|wi_0|wi_1|wo)\.weight$", name)
        made_of = "ones" if "layer_norm" in name else "numbers"
        out.append(Entry(name, "F8_E4M3" if linear else "F16", tuple(size), made_of))
        if linear:
            out.append(Entry(f"{name.removesuffix('weight')}scale_weight", "F32", (), "scale"))
    model = spiece_model(pieces).decode("latin-1")
    return [*out, Entry("spiece_model", "U8", (len(model),), model)]


def spiece_model(pieces: int) -> bytes:
    """Return a SentencePiece unigram model of a few words, all of ASCII, and rare pieces."""
    known = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -4.0, 1)]
    known += [("▁" + word, -3.0, 1) for word in WORDS]
    known += [(chr(code), -6.0, 1) for code in range(33, 127)]
    known += [(f"¡{n:x}", -20.0, 1) for n in range(pieces - len(known))]
    out = bytearray()
    for piece, score, kind in known:
        text = piece.encode()
        body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score)
        body += b"\x18" + bytes([kind])
        out += b"\x0a" + _varint(len(body)) + body
    trainer = b"\x18\x01" + _varint(40 << 3) + b"\x02"  # unigram; <unk> is piece 2
    return bytes(out + b"\x12" + _varint(len(trainer)) + trainer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# -- files ------------------------------------------------------------------------------------


def safetensors_header(entries: Iterable[Entry]) -> tuple[bytes, list[tuple[Entry, int]]]:
    """Return the header, and each tensor's place after it; wide dtypes first, as published."""
    ordered = sorted(entries, key=lambda e: (-_BYTES[e.dtype], e.name))
    header: dict[str, Any] = {}
    places, total = [], 0
    for entry in ordered:
        end = total + entry.nbytes
        places.append((entry, total))
        header[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [total, end],
        }  # fmt: skip
        total = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def gguf_header(entries: Iterable[Entry]) -> tuple[bytes, list[tuple[Entry, int]]]:
    """Return the header of a GGUF file, and each tensor's place after it."""
    places, total = [], 0
    for entry in entries:
        places.append((entry, total))
        total += -(-entry.nbytes // 32) * 32
    told = [
        (entry.name, entry.shape, int(gguf.GGMLQuantizationType[entry.dtype]), place)
        for entry, place in places
    ]
    return bad_files.gguf(told, {"general.architecture": "wan"}), places


def write_file(path: Path, entries: list[Entry], numbers: Numbers) -> int:
    """Write a file through a mapping, over what it held; return its bytes."""
    build = gguf_header if path.suffix == ".gguf" else safetensors_header
    header, places = build(entries)
    last, start = places[-1]
    size = len(header) + -(-(start + last.nbytes) // 32) * 32
    if path.suffix != ".gguf":  # not a byte more than the header says
        size = len(header) + start + last.nbytes
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.truncate(size)
        file.write(header)
    out = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)[len(header) :]
    for entry, place in places:
        if entry.nbytes:
            out[place : place + entry.nbytes].copy_(numbers.of(entry))
    numbers.forget()
    return size


class StoredModel:
    """The files of the model in a folder; ``transformer`` writes both experts in a kind."""

    def __init__(self, folder: Path, shapes: Shapes, numbers: int = 2**24) -> None:
        self.folder, self.shapes = folder, shapes
        self.kind = ""
        self.nbytes = 0
        self._numbers = Numbers(numbers)
        self.text = folder / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
        self.vae = folder / "wan_2.1_vae.safetensors"

    def write_rest(self, pieces: int = PIECES) -> int:
        """Write text encoder and VAE; return their bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pieces = min(pieces, self.shapes.text["vocab_size"] - EXTRA_IDS)
        total = write_file(self.text, text_entries(self.shapes, pieces), self._numbers)
        torch.manual_seed(0)
        state = original_vae(state_of(autoencoder(self.shapes.vae)), self.shapes.vae.num_res_blocks)
        save_file({n: t.bfloat16().contiguous() for n, t in state.items()}, self.vae)
        return total + self.vae.stat().st_size

    def path(self, expert: str, kind: str = "") -> Path:
        """Return where an expert ("high" or "low") of a kind lies."""
        kind = kind or self.kind
        ending = "gguf" if kind.startswith("Q") else "safetensors"
        return self.folder / f"wan2.2_t2v_{expert}_noise_14B_{kind}.{ending}"

    def transformer(self, kind: str) -> int:
        """Have both experts in ``kind``; return the bytes of their file."""
        if self.kind == kind:
            return self.nbytes
        target = self.path("high", kind)
        if self.kind:
            self.path("low").unlink()
            os.replace(self.path("high"), target)
        self.kind = kind
        entries = transformer_entries(kind, self.shapes)
        self.nbytes = write_file(target, entries, self._numbers)
        os.link(target, self.path("low"))
        return self.nbytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in the file."""
        entries = transformer_entries(self.kind, self.shapes)
        return sum(entry.nbytes for entry in entries if entry.name.startswith("blocks.0."))

    def part_experts(self) -> None:
        """Make the low-noise expert's file one of its own, so that both take room in a cache."""
        low, high = self.path("low"), self.path("high")
        if low.stat().st_ino == high.stat().st_ino:
            low.unlink()
            shutil.copyfile(high, low)

    def files(self) -> WanModelFiles:
        """Return the model as a user names it."""
        return WanModelFiles(
            transformer=self.path("high"), transformer_2=self.path("low"), vae=self.vae,
            text_encoder=self.text,
        )  # fmt: skip


def sizes(shapes: Shapes, kinds: Iterable[str] = KINDS) -> Mapping[str, int]:
    """Return the bytes of the tensors of each kind's file."""
    return {kind: sum(e.nbytes for e in transformer_entries(kind, shapes)) for kind in kinds}
