"""From the header of a LoRA file to the modules it changes in a transformer, whatever its style.

Styles: diffusers and PEFT (``transformer.blocks.0.attn1.to_q.lora_A.weight``), ComfyUI, Kijai and
lightx2v (``diffusion_model.blocks.0.self_attn.q.lora_down.weight``, with ``.diff``, ``.diff_b``
and ``.diff_m``), the same without a prefix, and musubi-tuner (``lora_unet_blocks_0_self_attn_q``).
Names and shapes are compared with the model's before a weight is read; a tensor that matches
nothing in the model is an error. Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from ..errors import CorruptFile, ModelMismatch, UnsupportedModel
from ..files import quoted, some_of
from ..formats import TensorTable
from ..models import TransformerShape, map_names, transformer_tensors
from .lora_patches import Patch, PatchCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPatches:
    """A LoRA file matched with one model: its patches, and notes for the user."""

    table: TensorTable
    patches: tuple[Patch, ...]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of its patches; 0 if it holds only full differences (``diff``)."""
        return max((patch.rank for patch in self.patches), default=0)


_ROLES: Final = tuple(
    (role, re.compile(rf"(.+?)(?:{pattern})"))
    for role, pattern in (
        ("down", r"\.lora_(?:A|down)(?:\.[^.]+)?\.weight|[._]lora\.down\.weight|\.lora_(?:A|down)"),
        ("up", r"\.lora_(?:B|up)(?:\.[^.]+)?\.weight|[._]lora\.up\.weight|\.lora_(?:B|up)"),
        ("up_bias", r"\.lora_(?:B|up)(?:\.[^.]+)?\.bias"),
        ("alpha", r"\.alpha"),
        ("diff", r"\.diff|\.w_norm|\.diff_m"),
        ("diff_bias", r"\.diff_b|\.b_norm"),
    )
)
_REFUSED: Final = (
    ("DoRA", re.compile(r"\.dora_scale$|\.lora_magnitude_vector")),
    ("LoKr", re.compile(r"\.lokr_\w+$")),
    ("LoHa", re.compile(r"\.hada_\w+$")),
    ("OFT", re.compile(r"\.oft_\w+")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("LoCon with a middle matrix", re.compile(r"\.lora_mid\.weight$")),
    ("weights to be replaced", re.compile(r"\.(?:set_weight|reshape_weight)$")),
)
_PREFIXES: Final = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.",
    "unet.", "dit.", "lora_unet_", "lora_transformer_",
)  # fmt: skip
_IMAGE_BRANCH: Final = re.compile(
    r"(?:^|[._])(?:k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_k"
    r"|image_embedder)(?:[._]|$)"
)
_BLOCK: Final = re.compile(r"blocks[._](\d+)(?:[._]|$)")
_FLOATS: Final = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def read_patches(table: TensorTable, shape: TransformerShape, model: Path) -> LoraPatches:
    """Match every tensor of a LoRA with a module of a transformer of this shape.

    Patches of the CLIP image branch are left out, with a note, if the model has no such branch. A
    text-to-video LoRA's patch of the input layer is accepted by an image model, where it applies to
    the noise channels alone. Raises UnsupportedModel for another kind of adapter, ModelMismatch for
    tensors that match nothing or have another size, CorruptFile for a down matrix without its up
    matrix or the reverse; each message names file and tensor.
    """
    _refuse_kinds(table)
    index = _index(shape)
    patches: dict[str, Patch] = {}
    unknown: list[str] = []
    image: list[str] = []
    for name in table.tensors:
        role, stem = _split(name)
        target = _target(index, stem, name) if role else None
        if target is None:
            branch = shape.image_dim is None and _IMAGE_BRANCH.search(stem)
            (image if role and branch else unknown).append(name)
            continue
        tensors = patches.setdefault(target, Patch(target)).tensors
        if role in tensors:
            raise CorruptFile(
                f"{quoted(table.path)} holds {tensors[role]!r} and {name!r}, both for {target!r}: "
                "several LoRAs in one file. Save each as a file of its own."
            )
        tensors[role] = name
    if unknown:
        _refuse_unknown(table, unknown, shape, model)
    notes = []
    if image:
        notes.append(
            f"{table.path.name}: {len(image)} of {len(table.tensors)} tensors belong to the CLIP "
            f"image branch, which this model does not have ({some_of(image, 2)}); left out."
        )
    if not patches:
        raise ModelMismatch(
            f"Nothing in the LoRA {quoted(table.path)} belongs to the transformer {quoted(model)}. "
            "Choose a LoRA for this model."
        )
    scale = _stated_scale(table)
    own = transformer_tensors(shape, "diffusers")
    for patch in patches.values():
        notes += PatchCheck(table, patch, shape, own, model).run()
        patch.stated_scale = scale(patch.target, patch.rank) if patch.rank else None
    return LoraPatches(table=table, patches=tuple(patches.values()), notes=tuple(notes))


def _refuse_kinds(table: TensorTable) -> None:
    if table.format != "safetensors":
        raise UnsupportedModel(
            f"The LoRA {quoted(table.path)} is a {table.format} file; LoRAs are read from "
            ".safetensors. Convert it, or get that version."
        )
    for name, info in table.tensors.items():
        kind = next((kind for kind, pattern in _REFUSED if pattern.search(name)), None)
        if kind is not None:
            raise UnsupportedModel(
                f"{quoted(table.path)} is an adapter of the kind {kind} ({name!r}), which WanFit "
                "cannot apply exactly. Plain LoRAs (lora_A/B or lora_down/up) can be used."
            )
        if info.dtype not in _FLOATS and not name.endswith(".alpha"):
            raise UnsupportedModel(
                f"Tensor {name!r} of the LoRA {quoted(table.path)} is stored as {info.dtype}; "
                f"readable are {', '.join(_FLOATS)}. Get another version."
            )


def _split(name: str) -> tuple[str, str]:
    """Return a tensor's role and the module's name before it; role "" for an unknown ending."""
    for role, pattern in _ROLES:
        found = pattern.fullmatch(name)
        if found:
            return role, found[1]
    return "", name


@lru_cache(maxsize=16)
def _index(shape: TransformerShape) -> dict[str, str]:
    """Map every module and table, by its name in each style, to its diffusers name."""
    original = transformer_tensors(shape, "original")
    renamed = {
        source.name: name for name, source in map_names("transformer", original).sources.items()
    }
    renamed |= {name: name for name in transformer_tensors(shape, "diffusers")}
    index: dict[str, str] = {}
    for stored, name in renamed.items():
        target = _module(name)
        for spelling in (_module(stored), _module(stored).replace(".", "_")):
            index[spelling] = target
    return index


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _target(index: Mapping[str, str], stem: str, name: str) -> str | None:
    """Return the diffusers name of what a tensor patches, or None where the model lacks it."""
    tables = (".modulation", ".scale_shift_table") if name.endswith(".diff_m") else ()
    bare = stem
    # Prefixes are removed one at a time: some files stack several of them.
    while True:
        for candidate in (bare, *(bare + ending for ending in tables)):
            if candidate in index:
                return index[candidate]
        prefix = next((prefix for prefix in _PREFIXES if bare.startswith(prefix)), None)
        if prefix is None:
            return None
        bare = bare[len(prefix) :].lstrip("_")


def _refuse_unknown(
    table: TensorTable, unknown: list[str], shape: TransformerShape, model: Path
) -> None:
    count = f"{len(unknown)} of {len(table.tensors)} tensors of the LoRA {quoted(table.path)}"
    blocks = [int(found[1]) for name in unknown if (found := _BLOCK.search(name))]
    if blocks and len(blocks) == len(unknown) and min(blocks) >= shape.layers:
        raise ModelMismatch(
            f"The LoRA {quoted(table.path)} patches {max(blocks) + 1} blocks, the transformer "
            f"{quoted(model)} has {shape.layers}. Choose a LoRA for this model."
        )
    hint = "Choose a LoRA for this model."
    if any(name.startswith("transformer_2.") for name in unknown):
        hint = "It holds patches for both experts; save 'transformer_2.' as a file of its own."
    raise ModelMismatch(
        f"{count} match nothing in the transformer {quoted(model)}: {some_of(unknown)}. {hint}"
    )


def _stated_scale(table: TensorTable) -> Callable[[str, int], float | None]:
    """Return a function (target, rank) -> alpha / rank by the metadata that diffusers or PEFT
    saved; it returns None where the metadata do not say.
    """
    config = _adapter_config(table)
    if config.get("use_dora"):
        raise UnsupportedModel(
            f"{quoted(table.path)} is an adapter of the kind DoRA (its metadata say use_dora), "
            "which WanFit cannot apply exactly. Plain LoRAs can be used."
        )

    def scale(target: str, rank: int) -> float | None:
        pattern = config.get("alpha_pattern") or {}
        alpha = config.get("lora_alpha")
        for part, value in pattern.items() if isinstance(pattern, dict) else ():
            if target == part or target.endswith("." + part):
                alpha = value
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            return None
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _adapter_config(table: TensorTable) -> dict[str, Any]:
    text = table.metadata.get("lora_adapter_metadata", "")
    try:
        stated = json.loads(text) if text else {}
    except ValueError as err:
        raise CorruptFile(
            f"The metadata lora_adapter_metadata of {quoted(table.path)} is not JSON ({err}); it "
            "holds the scale of the LoRA. Download the file again."
        ) from err
    if not isinstance(stated, dict):
        return {}
    return {str(key).removeprefix("transformer."): value for key, value in stated.items()}
