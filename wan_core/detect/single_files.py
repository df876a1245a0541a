"""A model given as single files: the role of each, and whether they belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..config import WanModelFiles
from ..errors import UnsupportedModel
from ..files import quoted
from ..formats import has_gguf_tokenizer
from ..models import Component, ModelArchitecture, TransformerShape, VaeShape
from .build import build, component, refuse_weights, require_kind, require_whole
from .identified import IdentifiedFile
from .pairing import (
    check_experts,
    check_image_encoder,
    check_text_encoder,
    check_vae_pair,
    role_hint,
)
from .variant_choice import Choice, choose_variant


def from_part(part: IdentifiedFile, path: Path) -> ModelArchitecture:
    """Return the architecture of a model of which only the transformer is given."""
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


def _one_transformer(choice: Choice, part: IdentifiedFile) -> tuple[str, ...]:
    """Return warnings for a transformer without a second one that may be half of a pair."""
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


def from_files(
    files: WanModelFiles, inspect: Callable[[str | Path], IdentifiedFile]
) -> ModelArchitecture:
    """Detect a model whose files are named one by one.

    ``inspect`` reads one file (``detector.inspect_file``). The field that a file was given for
    decides its role. Raises what ``inspect`` raises, ModelMismatch for files that do not belong
    together, and UnsupportedModel for a file of the wrong kind.
    """
    parts: dict[str, IdentifiedFile] = {}
    components: dict[str, Component] = {}
    for name in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"):
        given = getattr(files, name)
        if given is None:
            continue
        part = inspect(given)
        require_kind(part, name.removesuffix("_2"), Path(given))
        refuse_weights(part)
        parts[name], components[name] = part, component(name, Path(given), part)
    tokenizer, said = _tokenizer(files, parts.get("text_encoder"))
    if tokenizer is not None:
        components["tokenizer"] = Component(kind="tokenizer", path=tokenizer)
    main = parts["transformer"].transformer
    assert main is not None
    low = parts.get("transformer_2")
    warnings = [said] if tokenizer is None and said else []
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
    reasons = ["each file's role is the one it was given"]
    reasons += [said] if tokenizer is not None and said else []
    return build(
        root, parts, choice, components, main, vae, warnings=tuple(warnings),
        reasons=tuple(reasons),
    )  # fmt: skip


def _tokenizer(files: WanModelFiles, text: IdentifiedFile | None) -> tuple[Path | None, str]:
    """Return where the tokenizer is and a sentence about it: why, or what to do if it lacks."""
    if files.tokenizer is not None:
        return Path(files.tokenizer), ""
    if files.text_encoder is None or text is None:
        return None, ""
    path = find_tokenizer(text, Path(files.text_encoder))
    if path is None:
        holds = "tokenizer.ggml.tokens" if text.table.format == "gguf" else "spiece_model"
        return None, (
            f"{quoted(text.table.path)} carries no tokenizer (no {holds!r}), and no prompt can be "
            "encoded without. Name a tokenizer folder or a spiece.model of umT5 as the tokenizer, "
            "or choose a text encoder file that carries one."
        )
    if path in text.table.files:
        return path, f"{path.name} carries the tokenizer too"
    return path, f"the tokenizer is in {quoted(path)}, beside the text encoder"


def find_tokenizer(text: IdentifiedFile, path: Path) -> Path | None:
    """Return where a text encoder's tokenizer is: in its own file, or in a folder beside it.

    ``path`` is the file or folder that was named. A GGUF file carries the tokenizer in its
    metadata, a safetensors file as a tensor. Raises CorruptFile or UnsupportedModel for metadata
    that cannot be used.
    """
    spiece = text.table.tensors.get("spiece_model")
    if spiece is not None:
        return spiece.file
    if has_gguf_tokenizer(text.table):
        return text.table.files[0]
    beside = (path if path.is_dir() else path.parent).parent / "tokenizer"
    return beside if beside.is_dir() else None


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
    """Return a warning for each file whose name or metadata contradicts the role it was given."""
    out = []
    for part, role in ((high, "high"), (low, "low")):
        hint = role_hint(part.table.path.name, part.table.metadata)
        if hint is not None and hint[0] != role:
            out.append(
                f"{quoted(part.table.path)} was chosen as the {role}-noise expert, but "
                f"{hint[1]} says {hint[0]}. Check that the two are not swapped."
            )
    return out
