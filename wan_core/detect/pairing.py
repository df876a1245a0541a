"""Whether files belong together: experts, VAE, text encoder, image encoder, LoRA.

Every check compares numbers from headers and names both files and both numbers. The high- and the
low-noise expert have the same structure, so the field that a file was given for decides its role.
Hints (whole words of the metadata or the file's name) only lead to warnings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Final

from ..errors import MissingFile, ModelMismatch, UnsupportedModel
from ..files import file_identity, quoted
from ..models import Role, TransformerShape, VaeShape, role_of
from .identified import IdentifiedFile

_HINT_KEYS: Final = ("model_type", "general.name", "modelspec.title", "name")


def check_experts(
    high: IdentifiedFile,
    low: IdentifiedFile,
    high_shape: TransformerShape,
    low_shape: TransformerShape,
) -> None:
    """Refuse two experts that differ in structure, or that are the same file."""
    first, second = high.table.path, low.table.path
    if file_identity(first).path == file_identity(second).path:
        raise ModelMismatch(
            f"Both experts are the same file, {quoted(first)}. Choose the high-noise file for one "
            "and the low-noise file for the other."
        )
    if high.family != low.family:
        raise ModelMismatch(
            f"The experts are of different kinds: {quoted(first)} is {high.title}, "
            f"{quoted(second)} is {low.title}. Choose two files of one model."
        )
    for item in fields(TransformerShape):
        a, b = getattr(high_shape, item.name), getattr(low_shape, item.name)
        if a != b:
            raise ModelMismatch(
                f"The experts do not belong together: {item.name} is {a} in {quoted(first)} and "
                f"{b} in {quoted(second)}. Choose two files of one model."
            )


def check_vae_pair(
    transformer: TransformerShape, vae: VaeShape, transformer_path: Path, vae_path: Path
) -> None:
    """Refuse a VAE of another latent space than the transformer's, or one that gives no frames."""
    problem = vae_problem(vae)
    if problem:
        raise UnsupportedModel(f"{quoted(vae_path)} {problem}. Use the plain Wan VAE.")
    if vae.z_dim != transformer.out_channels:
        need = "2.2" if transformer.out_channels == 48 else "2.1"
        raise ModelMismatch(
            f"{quoted(vae_path)} makes {vae.z_dim} latent channels, the transformer "
            f"{quoted(transformer_path)} works on {transformer.out_channels}. Use the Wan {need} "
            "VAE with this model."
        )


def vae_problem(vae: VaeShape) -> str:
    """Say why frames cannot come out of a VAE of these numbers; empty where they can.

    What goes in and comes out are the 3 colours of a pixel, or of a square of pixels.
    """
    colours = 3 * (vae.patch_size or 1) ** 2
    if vae.out_channels == colours and vae.in_channels == colours:
        return ""
    return (
        f"takes {vae.in_channels} channels and its decoder makes {vae.out_channels}, where frames "
        f"have {colours}: it is made for something else (upscaling, transparency)"
    )


def check_text_encoder(
    transformer: TransformerShape, text: IdentifiedFile, transformer_path: Path, text_path: Path
) -> None:
    """Refuse a text encoder of another width than the transformer's text projection."""
    if text.width != transformer.text_dim:
        raise ModelMismatch(
            f"{quoted(text_path)} gives text of width {text.width}, the transformer "
            f"{quoted(transformer_path)} takes {transformer.text_dim}. Use the umT5-XXL encoder "
            "of this model."
        )


def check_image_encoder(
    transformer: TransformerShape,
    image: IdentifiedFile | None,
    transformer_path: Path,
    image_path: Path,
) -> None:
    """Require a CLIP image encoder of the right width where the transformer has an image branch."""
    if transformer.image_dim is None:
        return
    if image is None:
        raise MissingFile(
            f"{quoted(transformer_path)} takes CLIP image tokens of width {transformer.image_dim}, "
            f"and there is no image encoder in {quoted(image_path)}. Add the image_encoder of "
            "this model (CLIP ViT-H)."
        )
    if image.width != transformer.image_dim:
        raise ModelMismatch(
            f"{quoted(image.table.path)} gives image tokens of width {image.width}, the "
            f"transformer {quoted(transformer_path)} takes {transformer.image_dim}. Use the CLIP "
            "ViT-H vision model."
        )


def check_lora(transformer: TransformerShape, lora: IdentifiedFile, transformer_path: Path) -> None:
    """Refuse a LoRA made for a model of another width, or for no Wan model."""
    if lora.width != transformer.dim:
        made = f"width {lora.width}" if lora.width else "no Wan model"
        raise ModelMismatch(
            f"{quoted(lora.table.path)} is {lora.title}, made for {made}; the transformer "
            f"{quoted(transformer_path)} has width {transformer.dim}. Choose a LoRA for this model."
        )


def role_hint(name: str, metadata: Mapping[str, str] | None = None) -> tuple[Role, str] | None:
    """Guess from metadata, then from the file's name, which expert a file is.

    Returns the role and where the hint was found, or None without a hint (``models.role_of``).
    """
    for key in _HINT_KEYS:
        role = role_of((metadata or {}).get(key, ""))
        if role:
            return role, f"metadata {key} {(metadata or {})[key][:60]!r}"
    role = role_of(Path(name).stem)
    return (role, f"the file name {Path(name).name!r}") if role else None
