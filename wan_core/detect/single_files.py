"""A model given as single files: the role of each, and whether they belong together.

An all-in-one checkpoint is a single file too: every component that it holds is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ..config import WanModelFiles
from ..errors import MissingFile, ModelMismatch, UnsupportedModel
from ..files import file_identity, named_path, quoted
from ..formats import has_gguf_tokenizer
from ..models import (
    PARTS,
    TRANSFORMERS,
    Component,
    ModelArchitecture,
    Role,
    TransformerShape,
    VaeShape,
    name_stem,
    says_wan_21,
    tokenizer_tensor,
    words_of,
)
from .build import build, component, refuse_weights, require_kind, require_whole
from .identified import IdentifiedFile
from .pairing import (
    check_experts,
    check_image_encoder,
    check_module_role,
    check_text_encoder,
    check_vae_pair,
    join_vace,
    said_role,
)
from .variant_choice import Choice, choose_variant

# Words by which publishers say that both experts were merged into one transformer.
_MERGED: Final = frozenset({"aio", "allinone", "rapid", "merge", "merged"})


def from_part(part: IdentifiedFile, path: Path) -> ModelArchitecture:
    """Return the architecture of a model of which one file is given, with all that it holds."""
    require_kind(part, "transformer", path)
    parts = {"transformer": part}
    return _put_together(path, parts, {"transformer": path}, None, ())


def from_files(
    files: WanModelFiles, inspect: Callable[[str | Path], IdentifiedFile]
) -> ModelArchitecture:
    """Detect a model whose files are named one by one.

    ``inspect`` reads one file (``detector.inspect_file``). The field that a file was given for
    decides its role. What is not given is taken from an all-in-one file that holds it. Raises what
    ``inspect`` raises, ModelMismatch for files that do not belong together, and UnsupportedModel
    for a file of the wrong kind.
    """
    for field in (*PARTS, "tokenizer", "vace", "vace_2"):
        if field == "transformer" or getattr(files, field) is not None:
            named_path(getattr(files, field), field)
    parts: dict[str, IdentifiedFile] = {}
    paths: dict[str, Path] = {}
    for name in PARTS:
        given = getattr(files, name)
        if given is None:
            continue
        kind = name.removesuffix("_2")
        found = inspect(given)
        part = found.of_kind(kind) or found
        require_kind(part, kind, Path(given))
        parts[name], paths[name] = part, Path(given)
    modules, said = _join_modules(files, parts, inspect)
    tokenizer = None if files.tokenizer is None else Path(files.tokenizer)
    reasons = ("each file's role is the one it was given",)
    root = Path(files.transformer)
    return _put_together(root, parts, paths, tokenizer, reasons, modules, said)


def _join_modules(
    files: WanModelFiles,
    parts: dict[str, IdentifiedFile],
    inspect: Callable[[str | Path], IdentifiedFile],
) -> tuple[dict[str, Path], list[str]]:
    """Join each VACE module that is named with its transformer; return their paths, and warnings.

    Of a pair of experts both need one: each has VACE blocks of its own.
    """
    given = {"transformer": files.vace, "transformer_2": files.vace_2}
    modules = {name: Path(path) for name, path in given.items() if path is not None}
    if not modules:
        return {}, []
    for name, field, widget in (
        ("transformer", "vace", "vace_module"), ("transformer_2", "vace_2", "vace_module_low"),
    ):  # fmt: skip
        if (name in parts) != (name in modules):
            what = "has no VACE module" if name in parts else "is not given, and its module is"
            raise MissingFile(
                f"The {name} {what}. Name a text-to-video transformer and its VACE module "
                f"({field}; in ComfyUI {widget}) together: each expert needs its own."
            )
    warnings = []
    for name, path in modules.items():
        module = inspect(path)
        require_kind(module, "vace", path)
        if len(modules) > 1:
            role: Role = "low" if name.endswith("_2") else "high"
            warnings.append(check_module_role(parts[name], module, role))
        parts[name] = join_vace(parts[name], module)
    if len(modules) > 1 and file_identity(files.vace) == file_identity(files.vace_2):  # type: ignore[arg-type]
        raise ModelMismatch(
            f"The VACE modules of both experts are the same file, {quoted(modules['transformer'])}."
            " Choose the high-noise module for one and the low-noise module for the other."
        )
    return modules, [text for text in warnings if text]


def _put_together(
    root: Path,
    parts: dict[str, IdentifiedFile],
    paths: dict[str, Path],
    tokenizer: Path | None,
    reasons: tuple[str, ...],
    modules: Mapping[str, Path] = MappingProxyType({}),
    odd: Sequence[str] = (),
) -> ModelArchitecture:
    """Add what the transformers' own files hold, check that all belongs together, and build.

    ``modules`` are the VACE modules that were joined with the transformers.
    """
    more = (*reasons, *_add_inside(parts, paths))
    for part in parts.values():
        refuse_weights(part)
    main = parts["transformer"].transformer
    assert main is not None
    low = parts.get("transformer_2")
    warnings: list[str] = list(odd)
    if low is not None:
        assert low.transformer is not None
        check_experts(parts["transformer"], low, main, low.transformer)
        warnings += _role_warnings(parts["transformer"], low)
    choice = choose_variant(parts["transformer"], main, 2 if low is not None else None)
    for name in TRANSFORMERS:
        if name in parts:
            require_whole(parts[name], choice)
    vae = _check_companions(root, parts, main)
    warnings += _unused(parts, main)
    if low is None:
        warnings += _one_transformer(choice, parts["transformer"])
    components = {
        name: component(name, paths[name], part, module=modules.get(name))
        for name, part in parts.items()
    }
    tokenizer, said = _tokenizer(tokenizer, parts.get("text_encoder"), paths.get("text_encoder"))
    if tokenizer is not None:
        components["tokenizer"] = Component(kind="tokenizer", path=tokenizer)
        more += (said,) if said else ()
    elif said:
        warnings.append(said)
    return build(
        root, parts, choice, components, main, vae, reasons=more, warnings=tuple(warnings),
        incomplete="" if low is not None else _half(choice, parts["transformer"]),
    )  # fmt: skip


def _add_inside(parts: dict[str, IdentifiedFile], paths: dict[str, Path]) -> list[str]:
    """Add the components that lie in the transformers' files and were not given; say which."""
    out = []
    for name in TRANSFORMERS:
        for part in parts[name].beside if name in parts else ():
            if part.kind not in parts and _fits(part, parts["transformer"]):
                parts[part.kind], paths[part.kind] = part, paths[name]
                out.append(f"{part.title} is taken from {paths[name].name} itself")
    return out


def _fits(part: IdentifiedFile, main: IdentifiedFile) -> bool:
    """Whether a component in a transformer's file is one that the transformer needs."""
    shape = main.transformer
    return part.kind != "image_encoder" or (shape is not None and shape.image_dim is not None)


def _one_transformer(choice: Choice, part: IdentifiedFile) -> tuple[str, ...]:
    """Return warnings for a transformer without a second one that may be half of a pair."""
    hint = said_role(part)
    guess = f" It is probably the {hint[0]}-noise one, from {hint[1]}." if hint else ""
    if choice.variant.experts == 2:
        if _is_merged(part):
            return (
                f"This file is taken as both experts of {choice.variant.name} merged into one "
                "transformer, as all-in-one checkpoints are.",
            )
        return (f"This is one of two experts; structure does not say which.{guess}",)
    if len(choice.candidates) > 1:
        return (
            f"Structure leaves {' or '.join(choice.candidates)}; {choice.variant.name} was taken. "
            f"To run a Wan 2.2 pair, name both experts.{guess}",
        )
    return ()


def _half(choice: Choice, part: IdentifiedFile) -> str:
    """Say what a transformer without a second one lacks before it can run, or return nothing."""
    if choice.variant.experts != 2 or _is_merged(part):
        return ""
    hint = said_role(part)
    which = f"the {hint[0]}-noise one by {hint[1]}" if hint else "its structure does not say which"
    return (
        f"{quoted(part.table.path)} is one of the two experts of {choice.variant.name} ({which}), "
        "and makes no clean video alone. Name the other one too: the low-noise file is the "
        "transformer_2 of WanModelFiles, the low_noise_model of WanLoader."
    )


def _is_merged(part: IdentifiedFile) -> bool:
    """Whether one transformer with the structure of an expert stands for both.

    So it is in all-in-one checkpoints, which carry their VAE and text encoder, and in the files
    made of them, which say so. A file that names its role is half of a pair whatever it carries.
    """
    if said_role(part) is not None:
        return False
    words = words_of(name_stem(part.table.path.name))
    said = not _MERGED.isdisjoint(words) or "all in one" in " ".join(words)
    return said or {"vae", "text_encoder"} <= {other.kind for other in part.beside}


def _tokenizer(
    given: Path | None, text: IdentifiedFile | None, path: Path | None
) -> tuple[Path | None, str]:
    """Return where the tokenizer is and a sentence about it: why, or what to do if it lacks.

    ``given`` is the tokenizer that was named, ``path`` the text encoder's file or folder.
    """
    if given is not None or text is None or path is None:
        return given, ""
    found = find_tokenizer(text, path)
    if found is None:
        holds = "tokenizer.ggml.tokens" if text.table.format == "gguf" else "spiece_model"
        return None, (
            f"{quoted(text.table.path)} carries no tokenizer (no {holds!r}), and no prompt "
            "can be encoded without. Name a tokenizer folder or a spiece.model of umT5 as the "
            "tokenizer, or choose a text encoder file that carries one."
        )
    if found in text.table.files:
        return found, f"{found.name} carries the tokenizer too"
    return found, f"the tokenizer is in {quoted(found)}, beside the text encoder"


def find_tokenizer(text: IdentifiedFile, path: Path) -> Path | None:
    """Return where a text encoder's tokenizer is: in its own file, or in a folder beside it.

    ``path`` is the file or folder that was named. A GGUF file carries the tokenizer in its
    metadata, a safetensors file as a tensor. Raises CorruptFile or UnsupportedModel for metadata
    that cannot be used.
    """
    spiece = tokenizer_tensor(text.table.tensors)
    if spiece is not None:
        return text.table.tensors[spiece].file
    if has_gguf_tokenizer(text.table):
        return text.table.files[0]
    beside = (path if path.is_dir() else path.parent).parent / "tokenizer"
    return beside if beside.is_dir() else None


def _unused(parts: Mapping[str, IdentifiedFile], main: TransformerShape) -> list[str]:
    """Return a warning for an image encoder that the model has no use for."""
    image = parts.get("image_encoder")
    if image is None or main.image_dim is not None:
        return []
    return [
        f"{quoted(image.table.path)} is not used: this model takes no CLIP image tokens (only Wan "
        "2.1 image-to-video models do)."
    ]


def _check_companions(
    root: Path, parts: Mapping[str, IdentifiedFile], main: TransformerShape
) -> VaeShape | None:
    """Check the VAE and the encoders that are given against the transformer."""
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


def _role_warnings(high: IdentifiedFile, low: IdentifiedFile) -> list[str]:
    """Return a warning where a file's name or metadata contradicts the role it was given.

    Where both do, the two are swapped: that makes noise and no video, and is refused.
    """
    out = []
    for part, role in ((high, "high"), (low, "low")):
        hint = said_role(part)
        if hint is not None and hint[0] != role:
            out.append(
                f"{quoted(part.table.path)} was chosen as the {role}-noise expert, but "
                f"{hint[1]} says {hint[0]}."
            )
    if len(out) == 2:
        raise ModelMismatch(
            f"The experts are swapped. {' '.join(out)} Choose each file for the other: the "
            "high-noise one first (in ComfyUI as model), the low-noise one as low_noise_model."
        )
    return [
        *(f"{text} Check that the two are not swapped." for text in out),
        *(
            f"{quoted(part.table.path)} was chosen as one of two experts, but its name says Wan "
            "2.1, whose models are one transformer. Choose the expert of Wan 2.2, or the other "
            "file alone."
            for part in (high, low)
            if says_wan_21(name_stem(part.table.path.name))
        ),
    ]
