"""Names of a loader's inputs -> the files of a model. Does not import ComfyUI.

A name is looked up in the lists that the node offers, and is never made into a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING

from ..wan_core.config import WanModelFiles
from ..wan_core.errors import InvalidRequest, MissingFile
from ..wan_core.files import some_of
from .job import require_kind
from .pipeline import find_model, fingerprint_of, named_file, portable

if TYPE_CHECKING:
    from ..wan_core.detect import IdentifiedFile

SUFFIXES = (".safetensors", ".sft", ".gguf")
"""Of single files that are offered."""
_RUN_CODE = (".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")
AUTO, NONE = "auto", "none"
PARTS = {
    "low_noise_model": ("transformer_2", "The low-noise model of a Wan 2.2 A14B pair."),
    "text_encoder": ("text_encoder", "The umT5 file of models/text_encoders."),
    "vae": ("vae", "The VAE file: 2.1 for all models but TI2V-5B, which has its own."),
    "image_encoder": (
        "image_encoder",
        "CLIP vision, for Wan 2.1 image-to-video models and Animate only.",
    ),
}
"""Inputs for further components -> the component, and what it is."""
MODULES = {
    "vace_module": ("vace", "of 'model', a text-to-video model of its size"),
    "vace_module_low": ("vace_2", "of the low-noise model of a pair"),
}
"""Inputs for VACE modules published without their base -> the component, and whose it is."""
_WITHOUT = {
    "text_encoder": "a sampler then needs 'positive', and 'negative' with guidance",
    "vae": "a sampler will ask for one",
    "image_encoder": "an image-to-video model of Wan 2.1 or an Animate will ask for one",
}


@dataclass(frozen=True)
class Folders:
    """What ComfyUI's folders hold."""

    roots: tuple[Path, ...]
    """Where folders with a model_index.json lie."""
    files: Mapping[str, Mapping[str, Path]]
    """Per component, the single files by the name to show."""
    places: Mapping[str, str]
    """Per component, the folder that its files belong in."""
    lora: Callable[[str], Path | None]
    """The LoRA file of a name, or None."""


def model_source(
    model: str,
    chosen: Mapping[str, str],
    folders: Folders,
    inspect: Callable[[str | Path], IdentifiedFile] | None = None,
) -> tuple[Path | WanModelFiles, tuple[str, ...]]:
    """Return the folder or the files of a model, and sentences on what "auto" found.

    ``inspect`` reads a header; None reads it from the file. Raises InvalidRequest naming the input
    whose file does not exist, MissingFile for a component that no file fits.
    """
    from ..wan_core.detect import find_companions, inspect_file

    for name, value in {"model": model, **chosen}.items():
        require_kind(name, value, AUTO)
    transformer = named_file(folders.files["transformer"], model)
    if transformer is None:
        return _folder(model, folders), ()
    named: dict[str, Path] = {"transformer": transformer}
    for name, (part, _) in MODULES.items():
        if (value := chosen.get(name, NONE)) != NONE:
            named[part] = require_file(name, value, folders, "transformer")
    present: dict[str, list[Path]] = {}
    left_out: list[str] = []
    for name, (part, _) in PARTS.items():
        value = chosen.get(name, AUTO)
        if value == AUTO:
            present[part] = list(folders.files[part].values())
        elif value != NONE:
            named[part] = require_file(name, value, folders, part)
        elif part in _WITHOUT:
            left_out.append(f"{name}: none, as chosen; {_WITHOUT[part]}")
    try:
        found = find_companions(WanModelFiles(**named), present, inspect or inspect_file)
    except MissingFile as error:
        place = folders.places.get(error.component or "")
        where = f" The folder is {place}; press R after you put a file there." if place else ""
        raise MissingFile(f"{error}{where}", component=error.component) from error
    return found.files, (*found.reasons, *left_out)


def require_model(model: str, folders: Folders) -> None:
    """Raise InvalidRequest if there is neither a file nor a folder of this name."""
    require_kind("model", model, AUTO)
    if named_file(folders.files["transformer"], model) is None:
        _folder(model, folders)


def unused_parts(model: str, chosen: Mapping[str, str], folders: Folders) -> list[str]:
    """Say which files were chosen beside a folder, which has all of its parts."""
    if named_file(folders.files["transformer"], model) is not None:
        return []
    return [
        f"{name} {value!r} is not used: {model!r} is a folder, and its own parts are. Set it to "
        f"{(AUTO if name in PARTS else NONE)!r}, or choose a file as the model."
        for name, value in chosen.items()
        if name in (*PARTS, *MODULES) and value not in (AUTO, NONE)
    ]


def _folder(model: str, folders: Folders) -> Path | WanModelFiles:
    """Return the folder of a model; raises InvalidRequest, for a file's name as for a file."""
    try:
        return find_model(model, folders.roots)
    except InvalidRequest:
        if not model.lower().endswith((*SUFFIXES, *_RUN_CODE)):
            raise
    return require_file("model", model, folders, "transformer")


def fingerprint_of_all(known: Mapping[str, str | None], folders: Folders) -> str:
    """Return a hash that changes with any file that might be meant.

    For a loader of which another node gives a name, which is known only when that has run.
    """
    files = {path for one in folders.files.values() for path in one.values()}
    roots = [*sorted(files), *folders.roots]
    return fingerprint_of(str(sorted(known.items(), key=str)), roots)


def absent_lora(name: str, there: Iterable[str] = ()) -> str:
    """Say that there is no LoRA of this name, and which there are, the likest first."""
    found = some_of(sorted(there, key=lambda one: -_likeness(one, name)), 8)
    return (
        f"lora: there is no file {name!r} in models/loras. Put it there and press R, or choose "
        f"another.{f' Found: {found}.' if found else ''}"
    )


def require_file(field: str, name: str, folders: Folders, part: str) -> Path:
    """Return the file of this name; raises InvalidRequest naming the input and what there is."""
    files = folders.files[part]
    found = named_file(files, name)
    if found is not None:
        return found
    there = some_of(sorted(files, key=lambda one: -_likeness(one, name)), 8) or "none"
    place = folders.places.get(part, "the folder for it")
    what = f"there is no file {name!r}. Put it into {place} and press R, or choose another."
    if name.lower().endswith(_RUN_CODE):
        what = (
            f"{name!r} is of a kind that can run code when it is opened, and is not opened. "
            f"Choose a file that ends in {', '.join(SUFFIXES)}."
        )
    raise InvalidRequest(f"{field}: {what} Found: {there}.", field=field)


def _likeness(one: str, other: str) -> float:
    """Return how alike two files' names are, 0..1: folders and capitals differ between people."""
    names = (portable(name).rpartition("/")[2].lower() for name in (one, other))
    return SequenceMatcher(None, *names).ratio()
