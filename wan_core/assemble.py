"""Parts put together into a ModelArchitecture, and single files chosen one by one.

The shared last step of detection: refuses a part of the wrong kind, an incomplete transformer and
weights that cannot be loaded right, then writes down variant, numbers, reasons and warnings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from .architecture import Component, ModelArchitecture
from .choose import Choice, choose_variant
from .config import WanModelFiles
from .errors import CorruptFile, UnsupportedModel
from .header import quoted, some_of
from .identify import Part
from .pairing import (
    check_experts,
    check_image_encoder,
    check_text_encoder,
    check_vae_pair,
    role_hint,
)
from .variants import TransformerShape, VaeShape

_WANTED: Final = {
    "transformer": "a Wan transformer",
    "vae": "a Wan VAE",
    "text_encoder": "a umT5 text encoder",
    "image_encoder": "a CLIP image encoder",
}


def require_whole(part: Part, choice: Choice) -> None:
    """Refuse a transformer that lacks tensors its numbers call for, or has ones too many.

    Only for models with a diffusers class of plain Wan tensors; others are refused by name later.
    """
    if part.family not in ("t2v", "i2v", "flf2v", "vace"):
        return
    total = len(part.table.tensors)
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
    kind: str, path: Path, part: Part, config: Mapping[str, Any] | None = None
) -> Component:
    """Describe an identified file as a component of a model."""
    table = part.table
    return Component(
        kind=kind, path=path, files=table.files, nbytes=table.nbytes, parameters=table.parameters,
        dtypes=table.dtypes, layout=part.layout, prefix=part.prefix,
        weight_kind=part.weights.name, format=table.format, file_variant=_tag(table.files[0]),
        config=dict(config or {}),
    )  # fmt: skip


def _tag(file: Path) -> str | None:
    """Return the variant tag of a file name: model.fp16.safetensors -> fp16."""
    words = file.name.removesuffix(".safetensors").split("-0")[0].split(".")
    return (
        words[1] if len(words) == 2 and words[0] in ("model", "diffusion_pytorch_model") else None
    )


def require_kind(part: Part, kind: str, path: Path) -> None:
    """Refuse a file of another kind than the place it was put in, naming what it is."""
    if part.kind != kind:
        wanted = _WANTED[kind]
        why = f" ({part.reasons[0]})" if part.kind == "other" and part.reasons else ""
        raise UnsupportedModel(
            f"{quoted(path)} is {part.title}, not {wanted}{why}. Choose the right file."
        )


def refuse_weights(part: Part) -> None:
    """Refuse weights stored in a way that cannot be loaded right."""
    if part.weights.why_not:
        raise UnsupportedModel(f"{quoted(part.table.path)}: {part.weights.why_not}.")


def build(
    root: Path,
    parts: Mapping[str, Part],
    choice: Choice,
    components: Mapping[str, Component],
    transformer: TransformerShape,
    vae: VaeShape | None,
    *,
    reasons: tuple[str, ...] = (),
    warnings: tuple[str, ...] = (),
) -> ModelArchitecture:
    """Put the conclusions about the parts together."""
    main = parts["transformer"]
    found = [reason for part in parts.values() for reason in part.reasons]
    odd = [text for part in parts.values() for text in (*part.warnings, *part.table.notes)]
    if not transformer.heads_known:
        odd.append(
            f"The file does not say how its width {transformer.dim} divides into heads; it can be "
            "described but not loaded without its config.json."
        )
    return ModelArchitecture(
        variant=choice.variant, transformer=transformer, vae=vae, layout=main.layout,
        weight_kind=main.weights.name, components=components, root=root,
        custom_size=choice.custom_size, candidates=choice.candidates,
        reasons=tuple(dict.fromkeys((*found, choice.reason, *reasons))),
        warnings=tuple(dict.fromkeys((*odd, *warnings))),
    )  # fmt: skip


def from_part(part: Part, path: Path) -> ModelArchitecture:
    """Describe a model of which only the transformer is given."""
    require_kind(part, "transformer", path)
    assert part.transformer is not None
    choice = choose_variant(part, part.transformer, None)
    require_whole(part, choice)
    refuse_weights(part)
    parts = {"transformer": part}
    components = {"transformer": component("transformer", path, part)}
    return build(
        path, parts, choice, components, part.transformer, None,
        warnings=_one_transformer(choice, part),
    )  # fmt: skip


def _one_transformer(choice: Choice, part: Part) -> tuple[str, ...]:
    """Return the warnings that belong to a transformer file without its pair."""
    hint = role_hint(part.table.path.name, part.table.metadata)
    guess = f" It is probably the {hint[0]}-noise one, from {hint[1]}." if hint else ""
    if choice.variant.experts == 2:
        return (f"This is one of two experts; structure does not say which.{guess}",)
    if len(choice.candidates) > 1:
        return (
            f"Structure leaves {' or '.join(choice.candidates)}; {choice.variant.name} was taken. "
            f"To run a Wan 2.2 pair, name both experts.{guess}",
        )
    return ()


def from_files(files: WanModelFiles, inspect: Callable[[str | Path], Part]) -> ModelArchitecture:
    """Detect and pair the files of a pipeline named one by one.

    ``inspect`` reads one file (``detect.inspect_file``). The field a file stands in decides its
    role. Raises what ``inspect`` raises, ModelMismatch for files that do not belong together, and
    UnsupportedModel for a file of the wrong kind.
    """
    parts: dict[str, Part] = {}
    components: dict[str, Component] = {}
    for name in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"):
        given = getattr(files, name)
        if given is None:
            continue
        part = inspect(given)
        require_kind(part, name.removesuffix("_2"), Path(given))
        refuse_weights(part)
        parts[name], components[name] = part, component(name, Path(given), part)
    tokenizer = files.tokenizer or _tokenizer_of(files.text_encoder, parts.get("text_encoder"))
    if tokenizer is not None:
        components["tokenizer"] = Component(kind="tokenizer", path=Path(tokenizer))
    main = parts["transformer"].transformer
    assert main is not None
    low = parts.get("transformer_2")
    warnings: list[str] = []
    if low is not None:
        assert low.transformer is not None
        check_experts(parts["transformer"], low, main, low.transformer)
        warnings += _role_warnings(parts["transformer"], low)
    root = Path(files.transformer)
    choice = choose_variant(parts["transformer"], main, 2 if low is not None else None)
    for name in ("transformer", "transformer_2"):
        if name in parts:
            require_whole(parts[name], choice)
    vae = _check_companions(root, parts, main)
    if low is None:
        warnings += _one_transformer(choice, parts["transformer"])
    return build(
        root, parts, choice, components, main, vae, warnings=tuple(warnings),
        reasons=("each file's role is the one it was given",),
    )  # fmt: skip


def _tokenizer_of(text_encoder: str | Path | None, part: Part | None) -> Path | None:
    """Return where a text encoder's tokenizer is: inside its file, or in the folder beside it."""
    if text_encoder is None or part is None:
        return None
    path = Path(text_encoder)
    if "spiece_model" in part.table.tensors:
        return path
    beside = (path if path.is_dir() else path.parent).parent / "tokenizer"
    return beside if beside.is_dir() else None


def _check_companions(
    root: Path, parts: Mapping[str, Part], main: TransformerShape
) -> VaeShape | None:
    """Check VAE and encoders, as far as they are given, against the transformer."""
    vae = parts.get("vae")
    text, image = parts.get("text_encoder"), parts.get("image_encoder")
    if vae is not None and vae.vae is not None:
        check_vae_pair(main, vae.vae, root, vae.table.path)
        if not vae.vae.latents_mean:
            raise UnsupportedModel(
                f"{quoted(vae.table.path)} has {vae.vae.z_dim} latent channels, and no published "
                "VAE has; the statistics of its latents are unknown. Use it with its config.json."
            )
    if text is not None:
        check_text_encoder(main, text, root, text.table.path)
    if image is not None:
        check_image_encoder(main, image, root, image.table.path)
    return vae.vae if vae is not None else None


def _role_warnings(high: Part, low: Part) -> list[str]:
    """Warn where a hint contradicts the place a file was put in."""
    out = []
    for part, role in ((high, "high"), (low, "low")):
        hint = role_hint(part.table.path.name, part.table.metadata)
        if hint is not None and hint[0] != role:
            out.append(
                f"{quoted(part.table.path)} was chosen as the {role}-noise expert, but "
                f"{hint[1]} says {hint[0]}. Check that the two are not swapped."
            )
    return out
