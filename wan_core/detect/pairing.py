"""Whether files belong together: experts, VAE, text encoder, image encoder, LoRA.

Every check compares numbers from headers and names both files and both numbers. The high- and the
low-noise expert have the same structure, so the field that a file was given for decides its role.
Hints (whole words of the metadata or the file's name) only lead to warnings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

from ..errors import CorruptFile, MissingFile, ModelMismatch, UnsupportedModel
from ..files import file_identity, quoted, some_of
from ..models import Role, TransformerShape, VaeShape, name_stem, role_of
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


_DEPTHS: Final = {
    ("text_encoder", 4096): (24, "umT5-XXL"),
    ("image_encoder", 1280): (32, "CLIP ViT-H"),
}
"""Blocks of the encoders that all Wan models share, by kind and width."""


def published_depth(part: IdentifiedFile) -> tuple[int, str]:
    """Return how many blocks the published encoder of this width has, and its name; 0 if none."""
    return _DEPTHS.get((part.kind, part.width or 0), (0, ""))


def lacks_end(found: int | None, published: int) -> bool:
    """Whether a component seems to have lost its last blocks.

    No tensor says how many there were; one with far fewer was made so on purpose.
    """
    return published // 2 < (found or 0) < published


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


def join_vace(base: IdentifiedFile, module: IdentifiedFile) -> IdentifiedFile:
    """Return the VACE transformer that a text-to-video transformer and a VACE module make.

    Its tensors are those of both files, the module's under the base's prefix. Block i of n stands
    before base block i * layers / n, as in every published model (0, 5, 10 … of 40 and 0, 2, 4 … of
    30). Raises ModelMismatch for a base of another kind, width or number of blocks, CorruptFile for
    a module that lacks tensors.
    """
    shape = _joined_shape(base, module)
    own = {n: module.own.tensors[n] for n in module.own.tensors if n.startswith("vace_")}
    tensors = dict(base.table.tensors) | {base.prefix + name: info for name, info in own.items()}
    packed = bool(base.weights.weights) or not module.weights.weights
    weights = replace(
        base.weights if packed else module.weights,
        why_not=base.weights.why_not or module.weights.why_not,
        weights={**base.weights.weights, **module.weights.weights},
        warnings=(*base.weights.warnings, *module.weights.warnings),
    )
    table = replace(
        base.table, tensors=tensors, files=(*base.table.files, *module.table.files),
        # A GGUF file flattens weights of five dimensions, which its readers allow for.
        format="gguf" if module.table.format == "gguf" else base.table.format,
        notes=(*base.table.notes, *module.table.notes),
    )  # fmt: skip
    return replace(
        base, title="a Wan VACE transformer", family="vace", transformer=shape, table=table,
        own=replace(table, tensors=dict(base.own.tensors) | own), weights=weights,
        reasons=(
            *base.reasons, *module.reasons,
            f"{module.table.path.name} is joined with {base.table.path.name}: a VACE model",
        ),
        warnings=(*base.warnings, *module.warnings),
    )  # fmt: skip


def _joined_shape(base: IdentifiedFile, module: IdentifiedFile) -> TransformerShape:
    """Return the numbers of a base with a module, or refuse the two."""
    first, second = quoted(base.table.path), quoted(module.table.path)
    extra, own = module.transformer, base.transformer
    assert extra is not None and own is not None
    if base.family != "t2v":
        raise ModelMismatch(
            f"{second} is a VACE module, which belongs to a text-to-video transformer; {first} is "
            f"{base.title}. Choose a Wan text-to-video model of its size."
        )
    if module.missing or module.unexpected:
        what = "lacks" if module.missing else "also holds"
        names = module.missing or module.unexpected
        raise CorruptFile(
            f"{second} {what} {len(names)} tensors ({some_of(names)}), which no VACE module does. "
            "The file is incomplete or damaged: download it again."
        )
    pairs = (("width", own.dim, extra.dim), ("ffn_dim", own.ffn_dim, extra.ffn_dim))
    for name, a, b in pairs:
        if a != b:
            raise ModelMismatch(
                f"The VACE module {second} is for a transformer of {name} {b}; {first} has {a}. "
                "Choose a module and a text-to-video model of one size."
            )
    count = len(extra.vace_layers)
    if count > own.layers:
        raise ModelMismatch(
            f"The VACE module {second} has {count} blocks, {first} only {own.layers}. Choose a "
            "module and a text-to-video model of one size."
        )
    if base.layout == "diffusers" and module.layout != "diffusers":
        raise UnsupportedModel(
            f"{first} has the tensor names of a diffusers folder, the VACE module {second} those "
            "of single files. Use the single file of the text-to-video model."
        )
    layers = tuple(i * own.layers // count for i in range(count))
    return replace(own, vace_layers=layers, vace_in_channels=extra.vace_in_channels)


def check_module_role(base: IdentifiedFile, module: IdentifiedFile, role: Role) -> str:
    """Refuse a VACE module for the other expert; return a warning where only its name says so.

    The modules of both experts have the same structure. Where the names of base and module agree
    that they are for different experts, they are taken at their word.
    """
    said = said_role(module)
    if said is None or said[0] == role:
        return ""
    sentence = (
        f"{quoted(module.table.path)} was chosen as the VACE module of the {role}-noise expert, "
        f"but {said[1]} says {said[0]}"
    )
    own = said_role(base)
    if own is not None and own[0] == role:
        raise ModelMismatch(
            f"{sentence}, while {quoted(base.table.path)} is the {role}-noise expert by {own[1]}. "
            "Choose the other module."
        )
    return f"{sentence}. Check that the two are not swapped."


def said_role(part: IdentifiedFile) -> tuple[Role, str] | None:
    """Return the expert that a file's metadata or name says it is; see ``role_hint``."""
    return role_hint(part.table.path.name, part.table.metadata)


def role_hint(name: str, metadata: Mapping[str, str] | None = None) -> tuple[Role, str] | None:
    """Guess from metadata, then from the file's name, which expert a file is.

    Returns the role and where the hint was found, or None without a hint (``models.role_of``).
    """
    for key in _HINT_KEYS:
        role = role_of((metadata or {}).get(key, ""))
        if role:
            return role, f"metadata {key} {(metadata or {})[key][:60]!r}"
    role = role_of(name_stem(Path(name).name))
    return (role, f"the file name {Path(name).name!r}") if role else None
