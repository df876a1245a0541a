"""RAM of a process beside the weights: interpreter, libraries, tokenizer, what weights travel by.

What a process holds already is measured when a plan is made. What it takes for things that it does
for the first time is added by the terms below. Each was measured on one machine, an H200 with torch
2.11 and CUDA 13.0, and is not known elsewhere. ``benchmarks/host_base.py`` measures them all and
prints them beside these. Libraries of another card or release take other amounts, and a process
that has used a library in another way has paid for it: a term is then too large.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final

from ..config import MIB

LIBRARIES_OF: Final = "an H200 with torch 2.11"
"""Where the terms of ``FIRST`` were measured; said wherever they are shown."""
FIRST: Final = {
    "imports": 229 * MIB,
    "card": 384 * MIB,
    "encode": 169 * MIB,
    "denoise": 176 * MIB,
    "decode": 116 * MIB,
}
"""What is taken once where a card computes, and kept: by diffusers and transformers; by the first
thing computed on the card, whatever it is (cuBLAS, torch's kernels, which are unpacked when they
are first used, Triton); by an encoder, a transformer and a VAE beside that (attention, fused
kernels, cuDNN). A transformer of 40 blocks took 155 to 202 MiB. Triton's kernels lie on the disk:
compiling them took 7 MiB more."""
AFTER_DENOISING: Final = 48 * MIB
"""What the first encoder takes beside its own where only a transformer has computed before: by far
not all of torch's kernels are unpacked then. Seen once, on that H200; of a VAE it is not known."""
FIRST_ON_CPU: Final = {"imports": 190 * MIB, "encode": 0, "denoise": 100 * MIB, "decode": 0}
"""The same where the CPU computes: with torch 2.13 and blocks of true width up to 155 MiB were seen
in the denoising (tests/render/test_ram_peaks.py)."""
TOKEN_BYTES: Final = 600
"""What a tokenizer keeps for a token: 147 MiB of umT5's 256,300 with transformers 5.17; making it
takes 250 MiB for a moment, less than what comes after it takes."""
ON_CARD: Final = 300 * MIB
"""What libraries take of a card beside the allocator's memory once they compute on it, CUDA's
context aside: their kernels. On an H200 a new process that ran a clip ended with 810 MiB beside
that memory, of which at most 604 were there when it was planned."""
RING: Final = 128 * MIB
"""The page-locked memory through which weights go to a GPU, while they do."""
SENDING: Final = RING + 48 * MIB
"""What sending weights takes: that, and what its threads and the driver take beside it."""
_BARE, _BARE_ON_CPU = 310 * MIB, 160 * MIB
"""An interpreter with torch, and CUDA's context where a card computes: where the system does not
tell what the process holds."""

_run_here: set[tuple[str, str]] = set()
"""The kinds of devices and of stages that this process has run on them."""
_tokenizers: weakref.WeakSet[Any] = weakref.WeakSet()
"""Tokenizers that are alive."""


def stage_kind(stage: str) -> str:
    """Return which libraries a stage uses: "encode", "denoise", "decode"; "" for none."""
    if stage in ("text_encode", "image_encode"):
        return "encode"
    if stage in ("condition_encode", "control_encode", "decode"):
        return "decode"
    return "denoise" if stage.startswith("denoise") else ""


def stage_was_run(stage: str, device: str) -> None:
    """Note that this process has run a stage, or steps of it: its libraries' RAM is held now."""
    if kind := stage_kind(stage):
        _run_here.add((device.partition(":")[0], kind))


def tokenizer_was_made(tokenizer: object) -> None:
    """Note a tokenizer: as long as it lives, its RAM is held."""
    _tokenizers.add(tokenizer)


def done_here(device: str) -> tuple[str, ...]:
    """Return what this process has done, of the things for which it takes RAM once.

    ``tokenizer`` is among it while there is one, whoever's it is.
    """
    classes = ("diffusers.models.transformers.transformer_wan", "transformers.models.umt5")
    found = {"imports"} if all(name in sys.modules for name in classes) else set()
    run = {kind for where, kind in _run_here if where == device.partition(":")[0]}
    if run and not device.startswith("cpu"):
        found.add("card")
    if _tokenizers:
        found.add("tokenizer")
    return tuple(sorted(found | run))


def growth(kinds: Iterable[str], done: Collection[str], *, on_cpu: bool, tokens: int = 0) -> int:
    """Return what a process takes more by its first stages of these ``kinds``.

    ``done`` is what it has done already (``done_here``). ``tokens`` is the size of the tokenizer
    that it makes, 0 where it needs none.
    """
    first, wanted = FIRST_ON_CPU if on_cpu else FIRST, {"imports", *kinds}
    if not on_cpu and len(wanted) > 1:
        wanted.add("card")
    made = 0 if "tokenizer" in done else tokens * TOKEN_BYTES
    computed = {"encode", "denoise", "decode"}.intersection(done)
    if not on_cpu and "encode" in wanted and computed == {"denoise"}:
        made += AFTER_DENOISING
    return made + sum(first[kind] for kind in wanted.difference(done))


def unknown_process(kinds: Iterable[str], *, on_cpu: bool, tokens: int) -> int:
    """Return what a process takes in all where the system does not tell what it holds now."""
    bare = _BARE_ON_CPU if on_cpu else _BARE
    return bare + growth(kinds, (), on_cpu=on_cpu, tokens=tokens)


def process_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Return the bytes of this process that no file stands behind; None outside Linux."""
    try:
        text = status.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def locked_by_torch(torch: Any) -> int:
    """Return the page-locked bytes that torch's allocator holds, which no ``RssAnon`` counts.

    It keeps them for its next use: those of the pictures that left a card, for example.
    """
    ask: Any = getattr(torch.cuda, "host_memory_stats", dict)  # since torch 2.6
    return int(ask().get("allocated_bytes.current", 0))
