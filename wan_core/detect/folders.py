"""Model folders: diffusers folders, modular ones too, and official releases.

Each component's config is compared with the header of its weights, and the components with each
other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import MissingFile, UnsupportedModel
from ..files import quoted, some_of
from ..formats import listing, read_json, read_table
from ..models import PARTS, Component, ModelArchitecture, TransformerShape, VaeShape
from .build import build, component, refuse_weights, require_kind, require_whole
from .configs import check_transformer, check_vae, compare_width, component_config, read_config
from .identified import IdentifiedFile, identify
from .pairing import check_experts, check_image_encoder, check_text_encoder, check_vae_pair
from .variant_choice import Choice, choose_variant

INDEXES: Final = ("model_index.json", "modular_model_index.json")
"""Files that say what a diffusers folder holds: for a pipeline, and for a modular one."""
_REQUIRED: Final = ("transformer", "vae", "text_encoder", "tokenizer")
_CONFIG_ONLY: Final[Mapping[str, tuple[str, ...]]] = {
    "scheduler": ("scheduler_config.json",),
    "image_processor": ("preprocessor_config.json",),
    "tokenizer": (
        "tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model", "vocab.json",
    ),
}  # fmt: skip


def index_of(root: Path) -> Path | None:
    """Return the file that says what a diffusers folder holds; None for any other folder."""
    return next((root / name for name in INDEXES if (root / name).is_file()), None)


def from_diffusers(file: Path) -> ModelArchitecture:
    """Detect a diffusers folder: its index ``file`` and one folder per component."""
    root, index = file.parent, read_json(file)
    listed = _listed(index, root)
    _check_present(file, listed)
    parts: dict[str, IdentifiedFile] = {}
    components: dict[str, Component] = {}
    shapes: dict[str, TransformerShape] = {}
    vae: VaeShape | None = None
    for name in (n for n in PARTS if n in listed):
        folder = root / name
        config = component_config(folder)
        part = identify(read_table(folder))
        require_kind(part, name.removesuffix("_2"), folder)
        refuse_weights(part)
        config_path = folder / "config.json"
        if part.transformer is not None:
            shapes[name] = check_transformer(config, part.transformer, config_path)
        elif part.vae is not None:
            vae = check_vae(config, part.vae, config_path)
        else:
            compare_width(
                "d_model" if name == "text_encoder" else "hidden_size",
                config,
                part.width,
                config_path,
            )
        parts[name] = part
        components[name] = component(name, folder, part, config)
    for kind, files in _CONFIG_ONLY.items():
        if kind in listed:
            components[kind] = _config_component(root / kind, kind, files)
    return _pair_folder(file, index, parts, components, shapes, vae)


def _pair_folder(
    file: Path,
    index: Mapping[str, Any],
    parts: Mapping[str, IdentifiedFile],
    components: Mapping[str, Component],
    shapes: Mapping[str, TransformerShape],
    vae: VaeShape | None,
) -> ModelArchitecture:
    """Check that the components belong together, choose the variant, build the architecture."""
    root, main = file.parent, shapes["transformer"]
    experts = 2 if "transformer_2" in parts else 1
    if experts == 2:
        check_experts(parts["transformer"], parts["transformer_2"], main, shapes["transformer_2"])
    choice = choose_variant(parts["transformer"], main, experts)
    for name in shapes:
        require_whole(parts[name], choice)
    boundary = index.get("boundary_ratio")
    if choice.variant.experts == 2 and experts == 1:
        raise MissingFile(
            f"{quoted(root / 'transformer_2')} is missing: {choice.variant.name} has two experts "
            "and this folder holds one. Download transformer_2."
        )
    if boundary is not None and experts == 1:
        raise MissingFile(
            f"{quoted(root / 'transformer_2')} is missing: boundary_ratio {boundary} in "
            f"{file.name} calls for two experts. Download transformer_2."
        )
    assert vae is not None
    check_vae_pair(main, vae, root / "transformer", root / "vae")
    check_text_encoder(main, parts["text_encoder"], root / "transformer", root / "text_encoder")
    check_image_encoder(main, parts.get("image_encoder"), root / "transformer", root)
    return build(
        root, parts, choice, components, main, vae,
        reasons=_folder_reasons(file.name, index, choice, experts),
        warnings=_folder_warnings(index, choice, boundary),
        pipeline=str(index.get("_class_name")),
    )  # fmt: skip


def _folder_reasons(
    name: str, index: Mapping[str, Any], choice: Choice, experts: int
) -> tuple[str, ...]:
    told = index.get("_class_name")
    runs = choice.variant.pipeline_class
    out = [
        "the folder holds one transformer"
        if experts == 1
        else "the folder holds two transformers: transformer is the high-noise expert"
    ]
    if runs is not None and told != runs:
        out.append(f"{name} says {told}; the structure calls for {runs}")
    return tuple(out)


def _folder_warnings(index: Mapping[str, Any], choice: Choice, boundary: Any) -> tuple[str, ...]:
    variant = choice.variant
    out = []
    expand = index.get("expand_timesteps")
    if isinstance(expand, bool) and expand != variant.expand_timesteps:
        out.append(
            f"model_index.json says expand_timesteps {expand}; {variant.name} uses "
            f"{variant.expand_timesteps}."
        )
    official = variant.defaults.boundary
    if official is not None and boundary is not None and boundary != official:
        out.append(
            f"model_index.json says boundary_ratio {boundary}; the official value {official} is "
            "used unless the job names another."
        )
    return tuple(out)


def _listed(index: Mapping[str, Any], root: Path) -> list[str]:
    """Return the components that an index lists; refuses one of another pipeline."""
    name = index.get("_class_name")
    if not isinstance(name, str) or not name.startswith("Wan"):
        raise UnsupportedModel(
            f"{quoted(root)} is a {str(name)[:60]} folder, not a Wan model. Choose a Wan folder."
        )
    return [key for key, value in index.items() if _is_component(value)]


def _is_component(value: Any) -> bool:
    """Say whether an entry names a component: library and class, and in a modular index where from.

    From a copy on disk diffusers reads what lies beside a modular index, whatever the index says
    (``_is_local_component`` of its ``modular_pipeline.py``).
    """
    if not isinstance(value, list) or len(value) not in (2, 3):
        return False
    modular = len(value) == 2 or isinstance(value[2], dict)
    return modular and all(isinstance(one, str) for one in value[:2])


def _check_present(file: Path, listed: list[str]) -> None:
    """Require the folder of every listed component and of those that every Wan model needs."""
    root = file.parent
    wanted = dict.fromkeys([*_REQUIRED, *(n for n in listed if n in (*PARTS, *_CONFIG_ONLY))])
    missing = [name for name in wanted if not (root / name).is_dir()]
    if missing:
        have = [n for n in listing(root) if (root / n).is_dir()]
        raise MissingFile(
            f"{quoted(root)} lacks {some_of(missing, 8)} (it holds {some_of(sorted(have), 8)}). "
            "Download the missing folder."
        )
    unlisted = [name for name in _REQUIRED if name not in listed]
    if unlisted:
        raise MissingFile(
            f"{quoted(file)} does not list {some_of(unlisted)}, which every Wan model needs. "
            f"Download {file.name} again."
        )


def _config_component(folder: Path, name: str, files: tuple[str, ...]) -> Component:
    present = [folder / file for file in files if (folder / file).is_file()]
    if not present:
        raise MissingFile(
            f"{quoted(folder)} holds none of {', '.join(files)}. Download this part again."
        )
    config = read_json(present[0]) if name != "tokenizer" else {}
    return Component(kind=name, path=folder, files=tuple(present), config=config)


_HIGH, _LOW = "high_noise_model", "low_noise_model"
_RELEASE_PARTS: Final = (
    ("vae", ("Wan2.1_VAE", "Wan2.2_VAE")),
    ("text_encoder", ("models_t5_umt5-xxl-enc-bf16",)),
    ("image_encoder", ("models_clip_open-clip-xlm-roberta-large-vit-huge-14",)),
)


def is_release(root: Path) -> bool:
    """Whether a folder is laid out like the checkpoints that Wan-Video publishes."""
    if (root / _HIGH).is_dir() or (root / _LOW).is_dir():
        return True
    return any(
        (root / (stem + end)).is_file()
        for _, stems in _RELEASE_PARTS for stem in stems for end in (".pth", ".safetensors")
    )  # fmt: skip


def from_release(root: Path) -> ModelArchitecture:
    """Detect an official release: safetensors transformers beside .pth VAE and encoders."""
    two = (root / _HIGH).is_dir() or (root / _LOW).is_dir()
    places = (
        {"transformer": root / _HIGH, "transformer_2": root / _LOW}
        if two
        else {"transformer": root}
    )
    missing = [path for path in places.values() if not path.is_dir()]
    if missing:
        raise MissingFile(f"{quoted(missing[0])} is missing. Download both experts.")
    parts: dict[str, IdentifiedFile] = {}
    components: dict[str, Component] = {}
    shapes: dict[str, TransformerShape] = {}
    for name, folder in places.items():
        part = identify(read_table(folder))
        require_kind(part, "transformer", folder)
        refuse_weights(part)
        assert part.transformer is not None
        config_path = folder / "config.json"
        config = read_config(config_path) if config_path.is_file() else {}
        shapes[name] = (
            check_transformer(config, part.transformer, config_path) if config else part.transformer
        )
        parts[name], components[name] = part, component(name, folder, part, config)
    main = shapes["transformer"]
    if two:
        check_experts(parts["transformer"], parts["transformer_2"], main, shapes["transformer_2"])
    choice = choose_variant(parts["transformer"], main, 2 if two else 1)
    for part in parts.values():
        require_whole(part, choice)
    vae = _release_parts(root, parts, components)
    if vae is not None:
        check_vae_pair(main, vae, places["transformer"], components["vae"].path)
    if "text_encoder" in parts:
        check_text_encoder(
            main, parts["text_encoder"], places["transformer"], components["text_encoder"].path
        )
    check_image_encoder(main, parts.get("image_encoder"), places["transformer"], root)
    return build(
        root, parts, choice, components, main, vae,
        reasons=("the folder is laid out like an official release",),
    )  # fmt: skip


def _release_parts(
    root: Path, parts: dict[str, IdentifiedFile], components: dict[str, Component]
) -> VaeShape | None:
    """Add the VAE and encoders that lie beside the transformers; return the VAE's numbers."""
    vae: VaeShape | None = None
    for name, stems in _RELEASE_PARTS:
        files = [root / (stem + end) for stem in stems for end in (".safetensors", ".pth")]
        file = next((path for path in files if path.is_file()), None)
        if file is not None:
            part = identify(read_table(file))
            require_kind(part, name, file)
            refuse_weights(part)
            parts[name], components[name] = part, component(name, file, part)
            vae = part.vae or vae
    tokenizer = root / "google" / "umt5-xxl"
    if tokenizer.is_dir():
        components["tokenizer"] = Component(kind="tokenizer", path=tokenizer)
    return vae
