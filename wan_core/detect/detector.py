"""ArchitectureDetector: what a model is, from headers and configs alone.

Takes milliseconds and no torch. Every mistake that a header can show is found here and named: which
file, what was found, what was expected, what to do. ``identified`` says what one file is,
``folders`` reads folders, ``single_files`` puts single files together, and ``pairing`` says whether
files belong together.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..config import WanModelFiles
from ..errors import MissingFile
from ..files import file_kind, named_path, quoted, some_of
from ..formats import listing, read_table
from ..models import ModelArchitecture
from .configs import check_transformer, check_vae, read_config
from .folders import INDEXES, from_diffusers, from_release, index_of, is_release
from .identified import IdentifiedFile, identify
from .lora_files import with_loras
from .single_files import from_files, from_part

_WEIGHTS = (".safetensors", ".gguf", ".pth", ".index.json")


class ArchitectureDetector:
    """Says what a model is, from headers and configs. Stateless; safe to share between threads."""

    def detect_model_architecture(
        self, path: str | os.PathLike[str] | WanModelFiles
    ) -> ModelArchitecture:
        """Detect a diffusers folder, an official release, one file, or files named one by one.

        Raises MissingFile, CorruptFile, UnsafeFile, ModelMismatch or UnsupportedModel, each with
        the file, what was found, what was expected and what to do. No weight is read.
        """
        if isinstance(path, WanModelFiles):
            return with_loras(from_files(path, inspect_file), path.loras)
        root = named_path(path, "model_path")
        if root.name in INDEXES:
            root = root.parent
        if file_kind(root) == "file":
            return from_part(inspect_file(root), root)
        if (index := index_of(root)) is not None:
            return from_diffusers(index)
        if is_release(root):
            return from_release(root)
        _refuse_shelf(root)
        _refuse_without_index(root)
        return from_part(inspect_file(root), root)


def inspect_file(path: str | os.PathLike[str]) -> IdentifiedFile:
    """Say what one file, index or component folder of weights is: a transformer, a VAE, a LoRA …

    Raises as ``read_table`` does, and as ``identify`` and the config checks do; MissingFile for a
    folder that holds models, and beside them a file of something else.
    """
    part = identify(read_table(path))
    file = Path(path) / "config.json"
    if part.kind == "other" and Path(path).is_dir():
        _refuse_shelf(Path(path))
    if not file.is_file():
        return part
    config = read_config(file)
    if part.transformer is not None:
        return replace(part, transformer=check_transformer(config, part.transformer, file))
    if part.vae is not None:
        return replace(part, vae=check_vae(config, part.vae, file))
    return part


def _refuse_without_index(root: Path) -> None:
    """Raise MissingFile for a diffusers folder whose model_index.json was lost."""
    inside = set(listing(root))
    if {"transformer", "vae"} <= inside and not any(name.endswith(_WEIGHTS) for name in inside):
        raise MissingFile(
            f"{quoted(root)} holds the parts of a model ({some_of(sorted(inside), 6)}) but no "
            "model_index.json, which says how they belong together. Download that file too, or "
            "name each part in WanModelFiles."
        )


def _refuse_shelf(root: Path) -> None:
    """Raise MissingFile for a folder that is not a model but holds models, naming them."""
    models = [name for name in sorted(listing(root)) if index_of(root / name) is not None]
    if models:
        raise MissingFile(
            f"{quoted(root)} is no model itself; it holds the models {some_of(models, 8)}. Choose "
            "one of them."
        )
    if (root / "snapshots").is_dir() and (root / "blobs").is_dir():
        found = [quoted(root / "snapshots" / name) for name in sorted(listing(root / "snapshots"))]
        raise MissingFile(
            f"{quoted(root)} is a folder of the Hugging Face cache; the model is below it "
            f"({some_of(found) or 'nothing is there yet'}). Choose that folder."
        )
