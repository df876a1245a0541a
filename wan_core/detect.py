"""ArchitectureDetector: what a model is, from headers and configs alone.

Milliseconds, no torch. Every mistake that a header can show is found here and named: which file,
what was found, what was expected, what to do. ``identify`` says what one file is, ``folders`` reads
folders, ``assemble`` puts single files together, ``pairing`` says whether parts belong together.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from .architecture import ModelArchitecture
from .assemble import from_files, from_part
from .config import WanModelFiles
from .configs import check_transformer
from .errors import MissingFile
from .folders import from_diffusers, from_release, is_release
from .header import quoted, read_json, read_table
from .identify import Part, identify


class ArchitectureDetector:
    """Says what a model is, from headers alone. Holds no state; safe to share between threads."""

    def detect_model_architecture(
        self, path: str | os.PathLike[str] | WanModelFiles
    ) -> ModelArchitecture:
        """Detect a diffusers folder, an official release, one file, or the files of a pipeline.

        Raises MissingFile, CorruptFile, UnsafeFile, ModelMismatch or UnsupportedModel, each with
        the file, what was found, what was expected and what to do. No weight is read.
        """
        if isinstance(path, WanModelFiles):
            return from_files(path, inspect_file)
        root = Path(path)
        if not root.exists():
            raise MissingFile(f"{quoted(root)} does not exist. Check the path.")
        if (root / "model_index.json").is_file():
            return from_diffusers(root)
        if is_release(root):
            return from_release(root)
        return from_part(inspect_file(root), root)


def inspect_file(path: str | os.PathLike[str]) -> Part:
    """Say what one file, index or component folder of weights is: a transformer, a VAE, a LoRA …

    Raises as ``read_table`` does, and CorruptFile when tensors are missing or of the wrong shape.
    """
    part = identify(read_table(path))
    folder = Path(path)
    if part.transformer is not None and folder.is_dir() and (folder / "config.json").is_file():
        config_path = folder / "config.json"
        shape = check_transformer(read_json(config_path), part.transformer, config_path)
        part = replace(part, transformer=shape)
    return part
