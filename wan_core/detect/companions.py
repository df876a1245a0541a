"""Finds the other files that a transformer needs among the files that are there.

Decides from headers: the VAE of the same latent space, the text encoder of the right width, the
image encoder where one is needed, the other expert of a pair. Every choice comes with its reason,
and where several files would do, all are named. The structure of two experts is the same, so which
is the low-noise one is only a proposal made from names, and the reason says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ..config import WanModelFiles
from ..errors import MissingFile, WanError
from ..files import some_of
from .identified import IdentifiedFile
from .pairing import role_hint
from .single_files import find_tokenizer

Inspect = Callable[[str | Path], IdentifiedFile]

_ROLE_WORD: Final = re.compile(r"(?<![A-Za-z])(high|low)(?=[^a-z]|noise|$)", re.IGNORECASE)
# Full precision first: a VAE or encoder costs little, and a rounded one costs quality.
_KINDS: Final = ("fp32", "bf16", "fp16", "fp8_scaled", "gguf", "fp8", "fp8_e5m2")
_WANTED: Final = {
    "vae": "VAE",
    "text_encoder": "umT5 text encoder",
    "image_encoder": "CLIP image encoder",
}


@dataclass(frozen=True, slots=True)
class Found:
    """The completed files, and a sentence for each file that was found, not named by the user."""

    files: WanModelFiles
    reasons: tuple[str, ...] = ()


def find_companions(
    files: WanModelFiles, present: Mapping[str, Sequence[str | Path]], inspect: Inspect
) -> Found:
    """Fill the fields of ``files`` that are None from the files ``present`` for each field.

    ``present`` maps vae, text_encoder, image_encoder and transformer_2 to the paths to look at;
    ``inspect`` reads one of them (``detector.inspect_file``). Fields that are set already stay. A
    file that cannot be read is skipped. Raises MissingFile, naming what was looked at, when none of
    the files is a component that the model needs, and WanError for a bad transformer.
    """
    main = inspect(files.transformer)
    reasons: list[str] = []
    for name, fits in _tests(main).items():
        if getattr(files, name) is not None:
            continue
        candidates = present.get(name, ())
        needs_tokenizer = name == "text_encoder" and files.tokenizer is None
        path, reason = _choose(name, fits, candidates, inspect, needs_tokenizer)
        change: dict[str, Any] = {name: path}
        files = replace(files, **change)
        reasons.append(reason)
    if files.transformer_2 is None:
        partner = _partner(Path(files.transformer), main, present.get("transformer_2", ()), inspect)
        if partner is not None:
            files = replace(files, transformer_2=partner[0])
            reasons.append(partner[1])
    return Found(files, tuple(reasons))


def _tests(main: IdentifiedFile) -> dict[str, tuple[Callable[[IdentifiedFile], bool], str]]:
    """Return for each component the transformer needs a test of its file, and the test in words."""
    shape = main.transformer
    if shape is None:
        return {}
    tests: dict[str, tuple[Callable[[IdentifiedFile], bool], str]] = {
        "vae": (
            lambda part: part.vae is not None and part.vae.z_dim == shape.out_channels,
            f"with {shape.out_channels} latent channels",
        ),
        "text_encoder": (
            lambda part: part.kind == "text_encoder" and part.width == shape.text_dim,
            f"of width {shape.text_dim}",
        ),
    }
    if shape.image_dim is not None:
        tests["image_encoder"] = (
            lambda part: part.kind == "image_encoder" and part.width == shape.image_dim,
            f"of width {shape.image_dim}",
        )
    return tests


def _choose(
    name: str,
    test: tuple[Callable[[IdentifiedFile], bool], str],
    candidates: Sequence[str | Path],
    inspect: Inspect,
    needs_tokenizer: bool,
) -> tuple[Path, str]:
    """Return the best file that passes the test and the sentence that says why it was taken.

    With ``needs_tokenizer``, a file without one comes after all that have one.
    """
    fits, words = test
    good = []
    for candidate in candidates:
        part = _try(inspect, candidate)
        if part is not None and not part.weights.why_not and fits(part):
            lacks = needs_tokenizer and not _has_tokenizer(part, Path(candidate))
            good.append(((lacks, _rank(part)), Path(candidate), part))
    if not good:
        looked = some_of([os.path.basename(path) for path in candidates]) or "no files there"
        raise MissingFile(
            f"No {_WANTED[name]} {words} was found (looked at {looked}). Put one into the folder "
            "for it, or choose the file."
        )
    good.sort(key=lambda item: (item[0], item[1].name))
    path, part = good[0][1], good[0][2]
    others = [item[1].name for item in good[1:]]
    also = f"; {some_of(others)} would do too" if others else ""
    return path, f"{_WANTED[name]}: {path.name}, {part.title} ({part.weights.name}){also}"


def _rank(part: IdentifiedFile) -> int:
    kind = part.weights.name
    return _KINDS.index(kind) if kind in _KINDS else len(_KINDS)


def _has_tokenizer(part: IdentifiedFile, path: Path) -> bool:
    # A damaged one is as good as none here; the file that is chosen in the end is checked again.
    try:
        return find_tokenizer(part, path) is not None
    except WanError:
        return False


def _try(inspect: Inspect, path: str | Path) -> IdentifiedFile | None:
    # A broken file, or one of another model, must not prevent finding the right one beside it.
    try:
        return inspect(path)
    except WanError:
        return None


def _partner(
    path: Path, main: IdentifiedFile, candidates: Sequence[str | Path], inspect: Inspect
) -> tuple[Path, str] | None:
    """Return the low-noise file that belongs to a high-noise one with its reason, or None.

    A file is proposed only if its structure is the same, its name differs in nothing but the word
    for the role, and the name or metadata of the given file says that it is the high-noise expert.
    """
    hint = role_hint(path.name, main.table.metadata)
    if hint is None or hint[0] != "high":
        return None
    for candidate in candidates:
        other = Path(candidate)
        if _plain(other.name) != _plain(path.name) or other.name == path.name:
            continue
        part = _try(inspect, other)
        if part is None or part.transformer != main.transformer or part.family != main.family:
            continue
        other_hint = role_hint(other.name, part.table.metadata)
        if other_hint is not None and other_hint[0] == "low":
            return other, (
                f"low-noise model: {other.name}, a proposal: it has the structure and the name of "
                f"{path.name} but for the word high or low"
            )
    return None


def _plain(name: str) -> str:
    """Return a file name in lower case and without its words for the role."""
    return _ROLE_WORD.sub("", name).lower()
