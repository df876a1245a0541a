"""Finds the other files that a transformer needs among the files that are there.

Decides from headers: the VAE of the same latent space, the text encoder of the right width, the
image encoder where one is needed, the other expert of a pair. Of several files the fittest is
taken: first those that can be used, of the model's own family and complete; then the most precise;
then by name. Every choice comes with its reason, and with what would do too or was passed over. The
structure of two experts is the same, so which is the low-noise one is only a proposal made from
names, and the reason says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ..config import WanModelFiles
from ..errors import MissingFile, WanError
from ..files import file_identity, some_of
from ..models import (
    VAE_21,
    VAE_22,
    TransformerShape,
    differ_in_h_and_l,
    without_role,
    words_of,
)
from .identified import IdentifiedFile
from .pairing import lacks_end, published_depth, role_hint, vae_problem
from .single_files import find_tokenizer

Inspect = Callable[[str | Path], IdentifiedFile]

_WANTED: Final = {
    "vae": "VAE",
    "text_encoder": "umT5 text encoder",
    "image_encoder": "CLIP image encoder",
}
# The VAEs of other models, and variants of Wan's for other purposes, have the same structure: only
# their names tell them apart.
_USUAL: Final = {
    "vae": "wan_2.1_vae.safetensors",
    "text_encoder": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "image_encoder": "clip_vision_h.safetensors",
}
_USUAL_22: Final = _USUAL | {"vae": "wan2.2_vae.safetensors"}
"""What the files are called where most people get them, for Wan 2.1 and A14B and for TI2V-5B."""
_OTHER_VAE: Final = re.compile(
    r"qwen\w*|anima|flux\w*|krea\w*|hunyuan\w*|cosmos\w*|ltxv?\w*|mochi\w*|sd\d*|sdxl|chroma\w*"
    r"|alpha|rgba?|upscal\w*|lite|light\w*|tiny|tae\w*"
)
_WAN: Final = re.compile(r"wan\w*")
_OFFICIAL_VAES: Final = frozenset(
    replace(vae, latents_mean=(), latents_std=()) for vae in (VAE_21, VAE_22)
)


@dataclass(frozen=True, slots=True)
class Found:
    """The completed files, and a sentence for each file that was found, not named by the user."""

    files: WanModelFiles
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Offer:
    """A file that holds the component that is wanted, and what speaks against it."""

    path: Path
    part: IdentifiedFile
    unusable: str = ""
    """Why it cannot be used at all; empty where it can."""
    doubts: tuple[str, ...] = ()
    """Why another file is better if there is one, the gravest first: no tokenizer, incomplete, of
    another family, not the published numbers, no name. Empty where nothing speaks against it."""
    inside: bool = False
    """Whether it is part of the transformer's own file."""

    @property
    def grade(self) -> tuple[bool, ...]:
        """What speaks against it, for comparison: the best is all False."""
        return tuple(bool(doubt) for doubt in self.doubts)

    def rank(self) -> tuple[object, ...]:
        """Return what offers are sorted by, the best first.

        Full precision first: a VAE or encoder costs little, and a rounded one costs quality.
        """
        name = self.path.name
        return (self.grade, not self.inside, self.part.weights.rank, name.lower(), str(self.path))

    def against(self) -> str:
        """Say what speaks against it."""
        return self.unusable or " and ".join(doubt for doubt in self.doubts if doubt)


def find_companions(
    files: WanModelFiles, present: Mapping[str, Sequence[str | Path]], inspect: Inspect
) -> Found:
    """Fill the fields of ``files`` that are None from the files ``present`` for each field.

    ``present`` maps vae, text_encoder, image_encoder and transformer_2 to the paths to look at;
    ``inspect`` reads one of them (``detector.inspect_file``). Fields that are set already stay, and
    so does a field that ``present`` does not have. What lies in the transformer's own file comes
    first. A file that cannot be read is skipped. Raises MissingFile, naming what was looked at and
    why it cannot be used, when none of the files is a component that the model needs, and WanError
    for a bad transformer.
    """
    main = inspect(files.transformer)
    reasons: list[str] = []
    for name in _needed(main):
        if getattr(files, name) is not None or name not in present:
            continue
        path, reason = _choose(name, main, files, present[name], inspect)
        change: dict[str, Any] = {name: path}
        files = replace(files, **change)
        reasons.append(reason)
    if files.transformer_2 is None:
        partner = _partner(Path(files.transformer), main, present.get("transformer_2", ()), inspect)
        if partner is not None:
            files = replace(files, transformer_2=partner[0])
            reasons.append(partner[1])
    return Found(files, tuple(reasons))


def _needed(main: IdentifiedFile) -> tuple[str, ...]:
    if main.transformer is None:
        return ()
    image = ("image_encoder",) if main.transformer.image_dim is not None else ()
    return ("vae", "text_encoder", *image)


def _choose(
    name: str,
    main: IdentifiedFile,
    files: WanModelFiles,
    candidates: Sequence[str | Path],
    inspect: Inspect,
) -> tuple[Path, str]:
    """Return the fittest file and the sentence that says why it was taken."""
    shape = main.transformer
    assert shape is not None
    own = Path(files.transformer)
    offers = []
    for path, found in [(own, main), *((Path(path), _try(inspect, path)) for path in candidates)]:
        part = None if found is None else found.of_kind(name)
        if part is not None and _matches(part, shape):
            offers.append(_offer(path, part, files.tokenizer is not None, found is main))
    good = sorted((one for one in offers if not one.unusable), key=_Offer.rank)
    if not good:
        raise MissingFile(_nothing(name, shape, candidates, offers), component=name)
    best, *others = good
    place = " itself" if best.inside else ""
    sentence = (
        f"{_WANTED[name]}: {best.path.name}{place}, {best.part.title} ({best.part.weights.name})"
    )
    if best.against():
        sentence += f", although {best.against()}"
    equal = [one.path.name for one in others if one.grade == best.grade]
    if equal:
        sentence += f"; {some_of(equal)} would do too"
    passed = [
        f"{one.path.name} ({one.against()})"
        for one in offers
        if one.unusable or one.grade != best.grade
    ]
    if passed:
        sentence += f"; passed over: {some_of(passed)}"
    return best.path, sentence


def _matches(part: IdentifiedFile, shape: TransformerShape) -> bool:
    """Whether a component has the numbers that a transformer of this shape works with."""
    if part.vae is not None:
        return part.vae.z_dim == shape.out_channels
    wanted = shape.text_dim if part.kind == "text_encoder" else shape.image_dim
    return part.width == wanted


def _offer(path: Path, part: IdentifiedFile, has_tokenizer: bool, inside: bool) -> _Offer:
    unusable, tokenizer, family, size, name = part.weights.why_not, "", "", "", ""
    if part.vae is not None:
        problem = vae_problem(part.vae)
        unusable = unusable or (f"it {problem}" if problem else "")
        family, name = ("", "") if inside else _name_doubts(path)
        if replace(part.vae, latents_mean=(), latents_std=()) not in _OFFICIAL_VAES:
            size = "it is not of the published size"
    if part.kind == "text_encoder" and not has_tokenizer and not _carries_tokenizer(part, path):
        tokenizer = "it carries no tokenizer, and none lies beside it"
    missing = f"it lacks {len(part.missing)} tensors" if part.missing else ""
    depth, _ = published_depth(part)
    if not missing and lacks_end(part.layers, depth):
        missing = f"it has {part.layers} of {depth} blocks"
    return _Offer(path, part, unusable, (tokenizer, missing, family, size, name), inside)


def _carries_tokenizer(part: IdentifiedFile, path: Path) -> bool:
    # A damaged one is as good as none here; the file that is chosen in the end is checked again.
    try:
        return find_tokenizer(part, path) is not None
    except WanError:
        return False


def _name_doubts(path: Path) -> tuple[str, str]:
    """Say what in a VAE's name speaks for another model, and whether it does not speak for Wan."""
    words = words_of(path.stem)
    other = next((word for word in words if _OTHER_VAE.fullmatch(word)), None)
    if other is not None:
        return f"its name says {other!r}", ""
    said = any(_WAN.fullmatch(word) for word in words)
    return "", "" if said else "its name does not say Wan"


def _nothing(
    name: str, shape: TransformerShape, candidates: Sequence[str | Path], offers: Iterable[_Offer]
) -> str:
    """Return the message for a component that no file is, or that no file can be used for."""
    words = {
        "vae": f"with {shape.out_channels} latent channels",
        "text_encoder": f"of width {shape.text_dim}",
        "image_encoder": f"of width {shape.image_dim}",
    }[name]
    refused = [f"{one.path.name}: {one.unusable}" for one in offers]
    if refused:
        return (
            f"No {_WANTED[name]} {words} that can be used was found ({some_of(refused)}). Put "
            "another one into the folder for it, or choose the file."
        )
    there = some_of([os.path.basename(path) for path in candidates])
    looked = f"(looked at {there})" if there else "(its folder is empty)"
    usual = _USUAL_22 if shape.out_channels == VAE_22.z_dim else _USUAL
    return (
        f"No {_WANTED[name]} {words} was found {looked}. Put one into the folder for it, usually "
        f"{usual[name]}, or choose the file."
    )


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
    A file in the same folder and of the same format comes first.
    """
    hint = role_hint(path.name, main.table.metadata)
    offers = []
    for other in map(Path, candidates):
        letters = differ_in_h_and_l(path.stem, other.stem)
        named = hint is not None and hint[0] == "high" and _same_but_role(path, other)
        if not (letters or named) or _same_file(path, other):
            continue
        found = _try(inspect, other)
        part = None if found is None else found.of_kind("transformer")
        if part is None or part.transformer != main.transformer or part.family != main.family:
            continue
        other_hint = role_hint(other.name, part.table.metadata)
        if part.weights.why_not or part.missing or part.unexpected:
            continue
        if letters or (other_hint is not None and other_hint[0] == "low"):
            offers.append((other.parent != path.parent, other.suffix != path.suffix, str(other)))
    if not offers:
        return None
    best, *others = (Path(offer[2]) for offer in sorted(offers))
    sentence = (
        f"low-noise model: {best.name}, a proposal: it has the structure and the name of "
        f"{path.name} but for the word high or low"
    )
    if others:
        names = [one.name if one.name != best.name else str(one) for one in others]
        sentence += f"; {some_of(names)} would do too"
    return best, sentence


def _same_but_role(path: Path, other: Path) -> bool:
    return without_role(other.stem) == without_role(path.stem) and other.name != path.name


def _same_file(path: Path, other: Path) -> bool:
    try:
        return file_identity(path).path == file_identity(other).path
    except MissingFile:
        return False
