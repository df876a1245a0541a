"""The components that a job needs, and whether the model has them, still as it was opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..config import GenerationConfig
from ..errors import InvalidRequest, MissingFile, ModelMismatch
from ..files import FileIdentity, file_identity, quoted
from ..models import ModelArchitecture
from .request import Request, needs_clip

_LATER = "Name its file as {name} when the model is opened"


def check_parts(
    config: GenerationConfig, request: Request, architecture: ModelArchitecture
) -> None:
    """Raise InvalidRequest or MissingFile for a component that the job needs and the model lacks.

    The text encoder and its tokenizer are needed unless embeddings are given, the image encoder by
    models with an image branch that are given a picture, and the VAE by every job.
    """
    there = architecture.components
    for name in texts_to_encode(config, request):
        other = (
            f"pass {name}_embeds"
            if name == "prompt"
            else f"pass {name}_embeds, or set every guidance scale to 1"
        )
        if "text_encoder" not in there:
            raise InvalidRequest(
                f"{name} needs a umT5 text encoder, and this model was opened without one. "
                f"{_LATER.format(name='text_encoder')}, or {other}.",
                field=name,
            )
        if "tokenizer" not in there:
            file = quoted(there["text_encoder"].path)
            raise InvalidRequest(
                f"{name} needs the tokenizer of the text encoder, and {file} carries none. "
                f"{_LATER.format(name='tokenizer')} (umT5's folder tokenizer, or its "
                f"spiece.model), take a text encoder file that holds it, or {other}.",
                field=name,
            )
    if "vae" not in there:
        raise MissingFile(
            "The VAE is missing: it turns latents into frames, and this model was opened without "
            f"one. {_LATER.format(name='vae')}."
        )
    if needs_clip(config, architecture) and "image_encoder" not in there:
        raise MissingFile(
            f"The image encoder (CLIP vision) is missing: {architecture.variant.title} sees its "
            f"picture through it, and this model was opened without one. "
            f"{_LATER.format(name='image_encoder')}."
        )


def texts_to_encode(config: GenerationConfig, request: Request) -> tuple[str, ...]:
    """Return which of "prompt" and "negative_prompt" must be encoded for this job."""
    names = []
    if config.prompt_embeds is None:
        names.append("prompt")
    if request.guided and config.negative_prompt_embeds is None:
        names.append("negative_prompt")
    return tuple(names)


def files_of(architecture: ModelArchitecture) -> dict[Path, FileIdentity]:
    """Return the files of a model, LoRAs included, as they are on disk now."""
    paths = [path for part in architecture.components.values() for path in part.files]
    for found in architecture.loras:
        paths += found.files or (Path(found.lora.path),)
    return {path: file_identity(path) for path in paths}


def check_files(known: Mapping[Path, FileIdentity]) -> None:
    """Check that the files of a model are those it was opened from.

    Raises MissingFile for one that is gone, ModelMismatch for one that was replaced: what the model
    is was read from its header.
    """
    for path, before in known.items():
        now = file_identity(path)
        if now != before:
            change = (
                f"it has {now.size:,} bytes now and had {before.size:,}"
                if now.size != before.size
                else "it was written again"
            )
            raise ModelMismatch(
                f"{quoted(path)} was replaced after the model was opened: {change}. Open the model "
                "again."
            )
