"""Identified files put together into a ModelArchitecture: the last step of every detection.

Refuses a file of the wrong kind, an incomplete transformer, and weights that cannot be loaded
correctly. Then records the variant, the numbers, the reasons and the warnings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import CorruptFile, UnsupportedModel
from ..files import quoted, some_of
from ..models import (
    TRANSFORMERS,
    Component,
    ModelArchitecture,
    Recipe,
    TransformerShape,
    VaeShape,
    few_steps_hint,
    recipe_of,
    stored_sizes,
)
from .identified import IdentifiedFile
from .pairing import lacks_end, published_depth
from .unsupported import part_of_several
from .variant_choice import Choice

_POSITIONS: Final = (
    ("img_emb.emb_pos",), ("condition_embedder.image_embedder.pos_embed",),
)  # fmt: skip
_WANTED: Final = {
    "transformer": "a Wan transformer",
    "vae": "a Wan VAE",
    "text_encoder": "a umT5 text encoder",
    "image_encoder": "a CLIP image encoder",
    "vace": "a VACE module without its base model",
}


def require_whole(part: IdentifiedFile, choice: Choice) -> None:
    """Refuse a transformer that lacks tensors its shape calls for, or has others besides.

    Only families whose tensors are known are checked; the rest are refused later, by the name of
    their variant.
    """
    known = ("t2v", "i2v", "flf2v", "vace", "control", "camera", "animate", "animate2")
    if part.family not in known:
        return
    total = len(part.own.tensors)
    if part.missing in _POSITIONS:
        raise CorruptFile(
            f"{quoted(part.table.path)} says that it is a first-and-last-frame model, but lacks "
            f"{part.missing[0]}, by which such a model tells its two pictures apart. Use another "
            "file of this model."
        )
    several, advice = part_of_several(part.table)
    if part.missing and several:
        raise CorruptFile(f"{quoted(part.table.path)} is {several}. {advice}")
    if part.missing:
        raise CorruptFile(
            f"{quoted(part.table.path)} lacks {len(part.missing)} of the tensors a "
            f"{choice.variant.name} of its size has ({some_of(part.missing)}). The file is "
            "incomplete: download it again."
        )
    if part.unexpected:
        raise UnsupportedModel(
            f"{quoted(part.table.path)} looks like {choice.variant.name}, but "
            f"{len(part.unexpected)} of its {total:,} tensors belong to no plain Wan model "
            f"({some_of(part.unexpected)}): it is a derivative that WanFit cannot run."
        )


def component(
    kind: str,
    path: Path,
    part: IdentifiedFile,
    config: Mapping[str, Any] | None = None,
    module: Path | None = None,
) -> Component:
    """Return the identified file as a component of a model; ``module`` was joined with it."""
    table, own = part.table, part.own
    return Component(
        kind=kind, path=path, files=table.files, nbytes=own.nbytes, parameters=own.parameters,
        dtypes=own.dtypes, layout=part.layout, prefix=part.prefix,
        weight_kind=part.weights.name, format=table.format, file_variant=_tag(table.files[0]),
        stored_as=part.weights.title,
        stored=stored_sizes(kind.removesuffix("_2"), table, part.weights, part.prefix),
        vocabulary=part.vocabulary, config=dict(config or {}), module=module,
    )  # fmt: skip


def _tag(file: Path) -> str | None:
    """Return the variant tag of a file name: model.fp16.safetensors -> fp16."""
    words = file.name.removesuffix(".safetensors").split("-0")[0].split(".")
    return (
        words[1] if len(words) == 2 and words[0] in ("model", "diffusion_pytorch_model") else None
    )


def require_kind(part: IdentifiedFile, kind: str, path: Path) -> None:
    """Refuse a file whose kind is not the one its place needs, naming what it is."""
    if part.kind != kind:
        wanted = _WANTED[kind]
        # What is missing of a transformer explains nothing where a VAE is wanted.
        known = part.kind == "other" and part.reasons and kind.startswith("transformer")
        why = f" ({part.reasons[0]})" if known else ""
        several, advice = part_of_several(part.table)
        if several:
            why = ""
        else:
            advice = "Choose the right file."
            if why and not part.reasons[0].startswith("0 of"):
                advice += " If it is a Wan transformer, it has lost them: download it again."
        if part.kind == "vace" and kind == "transformer":
            advice = (
                "Choose a Wan text-to-video transformer of its size here, and name the module "
                "beside it, as vace of WanModelFiles, as vace_module of WanLoader."
            )
        raise UnsupportedModel(f"{quoted(path)} is {part.title}, not {wanted}{why}. {advice}")


def refuse_weights(part: IdentifiedFile) -> None:
    """Refuse weights stored in a way that cannot be loaded correctly."""
    if part.weights.why_not:
        raise UnsupportedModel(f"{quoted(part.table.path)}: {part.weights.why_not}.")


def build(
    root: Path,
    parts: Mapping[str, IdentifiedFile],
    choice: Choice,
    components: Mapping[str, Component],
    transformer: TransformerShape,
    vae: VaeShape | None,
    *,
    reasons: tuple[str, ...] = (),
    warnings: tuple[str, ...] = (),
    incomplete: str = "",
    pipeline: str = "",
) -> ModelArchitecture:
    """Return the architecture, with the reasons and warnings of all its files, each once.

    ``pipeline`` is the class that the folder's ``model_index.json`` names.
    """
    main = parts["transformer"]
    found = [reason for part in parts.values() for reason in part.reasons]
    odd = [text for part in parts.values() for text in (*part.warnings, *part.table.notes)]
    if not transformer.heads_known:
        odd.append(
            f"The file does not say how its width {transformer.dim} divides into heads; it can be "
            "described but not loaded without its config.json."
        )
    recipe, said = _recipe(root, parts, pipeline)
    if said and recipe is None:
        odd.append(
            f"{said[0]}, and nothing says the same of the other expert. No settings suit both; "
            "choose two files that were distilled together, or two that were not."
        )
    last = [text for part in parts.values() for text in _cut(part, choice)]
    last += _few_steps(root, parts) if not said else []
    return ModelArchitecture(
        variant=choice.variant, transformer=transformer, vae=vae, layout=main.layout,
        weight_kind=main.weights.name, components=components, root=root,
        custom_size=choice.custom_size, candidates=choice.candidates, incomplete=incomplete,
        recipe=recipe, reasons=tuple(dict.fromkeys((*found, choice.reason, *reasons, *said))),
        warnings=tuple(dict.fromkeys((*odd, *warnings, *last))),
    )  # fmt: skip


def _recipe(
    root: Path, parts: Mapping[str, IdentifiedFile], pipeline: str
) -> tuple[Recipe | None, tuple[str, ...]]:
    """Return the settings that the checkpoint was distilled for, and the sentence that says so.

    Of two experts both must be distilled; a folder's name speaks for all its files.
    """
    files = [parts[name].table for name in TRANSFORMERS if name in parts]
    folder = recipe_of(root / "transformer", pipeline=pipeline) if root.is_dir() else None
    found = [recipe_of(table.path, table.metadata) or folder for table in files]
    said = [
        f"{table.path.name} is {one.describe()} ({one.reason})"
        for table, one in zip(files, found, strict=True)
        if one is not None
    ]
    recipe = found[0] if all(one is not None for one in found) else None
    return recipe, tuple(said if recipe is None else said[:1])


def _few_steps(root: Path, parts: Mapping[str, IdentifiedFile]) -> list[str]:
    """Return a warning where a checkpoint without a recipe says that it needs few steps."""
    tables = [parts[name].table for name in TRANSFORMERS if name in parts]
    said = [few_steps_hint(table.path, table.metadata, whole=True) for table in tables]
    said += [few_steps_hint(root / "transformer", whole=True)] if root.is_dir() else []
    return [text for text in said if text][:1]


def _cut(part: IdentifiedFile, choice: Choice) -> list[str]:
    """Return a warning for a component that is a published one but for its last blocks."""
    published, name = published_depth(part)
    if part.transformer is not None:
        whole, found = choice.variant.transformer, part.transformer
        if (found.dim, found.ffn_dim) == (whole.dim, whole.ffn_dim):
            published, name = whole.layers, choice.variant.name
    if not lacks_end(part.layers, published):
        return []
    return [
        f"{quoted(part.table.path)} has {part.layers} blocks; {name}, whose width it has, has "
        f"{published}. If it was not made so, its last blocks are lost and it makes noise: "
        "download it again."
    ]
