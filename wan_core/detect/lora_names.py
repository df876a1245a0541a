"""From the header of a LoRA file to the modules it changes in a transformer, whatever its style.

Styles: diffusers and PEFT (``transformer.blocks.0.attn1.to_q.lora_A.weight``), ComfyUI, Kijai and
lightx2v (``diffusion_model.blocks.0.self_attn.q.lora_down.weight``, with ``.diff``, ``.diff_b``
and ``.diff_m``), the same without a prefix, and musubi-tuner (``lora_unet_blocks_0_self_attn_q``);
``models.lora_keys`` is the table of them. Names and shapes are compared with the model's before a
weight is read; a tensor that matches nothing in the model is an error. Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from ..errors import CorruptFile, ModelMismatch, UnsupportedModel
from ..files import quoted, some_of
from ..formats import QUANT_SUFFIXES, TensorTable, listing, read_json
from ..models import (
    NEEDS,
    TransformerShape,
    flat_stem,
    foreign_part,
    left_in_lora,
    map_names,
    names_both_experts,
    read_lora_key,
    spellings,
    transformer_tensors,
)
from .lora_patches import Patch, PatchCheck, drop_empty


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPatches:
    """A LoRA file matched with one model: its patches, and notes for the user."""

    table: TensorTable
    patches: tuple[Patch, ...]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of its patches; 0 if none is a product: ``diff``, whole factors."""
        return max((patch.rank for patch in self.patches), default=0)

    @property
    def pairs(self) -> int:
        """The largest rank of its pairs of matrices; see ``FoundLora``."""
        return max((patch.rank for patch in self.patches if "down" in patch.tensors), default=0)

    @property
    def pieces(self) -> int:
        """What its LoKr layers hold for a token at most; see ``FoundLora``."""
        return max((patch.pieces for patch in self.patches), default=0)

    @property
    def columns(self) -> int:
        """The columns of the widest weight of which rows are made, likewise."""
        return max((patch.columns for patch in self.patches), default=0)


_BLOCK: Final = re.compile(r"blocks[._](\d+)(?:[._]|$)")
_FLOATS: Final = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_WHOLE: Final = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""What an alpha may be stored as besides."""
ADAPTER_CONFIG: Final = "adapter_config.json"
"""The file in which PEFT saves the scale of a LoRA, beside its weights."""
_ADAPTER_FILES: Final = "adapter_model"
_PEFT_LORA: Final = "LORA"
_PEFT_ALPHAS: Final = {_PEFT_LORA: "lora_alpha", "LOKR": "alpha", "LOHA": "alpha"}
"""The kinds of PEFT's adapters that are applied, and where their configurations state alpha."""
_APPLIED: Final = "LoRA, DoRA, LoKr and LoHa"
# A key of PEFT's alpha_pattern: a module's name or the end of one, with dots that may be escaped.
_PATTERN_KEY: Final = re.compile(r"\^?[\w.\\-]+\$?")


def read_patches(table: TensorTable, shape: TransformerShape, model: Path) -> LoraPatches:
    """Match every tensor of a LoRA with a module of a transformer of this shape.

    Patches of parts that the model does not have (the CLIP image branch, learned positions, a text
    encoder, an input layer of other channels) are left out, with a note. A text-to-video LoRA's
    patch of the input layer is accepted by an image model, where it applies to the noise channels
    alone. Raises UnsupportedModel for another kind of adapter, ModelMismatch for tensors that match
    nothing or have another size, CorruptFile for a down matrix without its up matrix or the
    reverse; each message names file and tensor.
    """
    _refuse_kinds(table)
    index = _index(shape)
    patches: dict[str, Patch] = {}
    stems: dict[str, str] = {}
    unknown: list[str] = []
    foreign: dict[str, list[str]] = {}
    for name in table.tensors:
        if left_in_lora(name):
            continue
        key = read_lora_key(name)
        target = _target(index, key.stem, name) if key is not None else None
        if key is None or target is None:
            part = foreign_part(key.stem, shape) if key is not None else None
            (unknown if part is None else foreign.setdefault(part, [])).append(name)
            continue
        tensors = patches.setdefault(target, Patch(target)).tensors
        stems.setdefault(target, key.stem)
        if key.role in tensors:
            raise CorruptFile(
                f"{quoted(table.path)} holds {tensors[key.role]!r} and {name!r}, both for "
                f"{target!r}: several LoRAs in one file. Save each as a file of its own."
            )
        tensors[key.role] = name
    if unknown:
        _refuse_unknown(table, unknown, shape, model, index)
    notes = [
        f"{table.path.name}: {len(names)} of {len(table.tensors)} tensors belong to {part} "
        f"({some_of(names, 2)}); left out."
        for part, names in foreign.items()
    ]
    empty = sum(drop_empty(table, patch) for patch in patches.values())
    if empty:
        notes.append(
            f"{table.path.name}: {empty} of the layers it names have matrices of rank 0, which "
            "change nothing; left out."
        )
    patches = {target: patch for target, patch in patches.items() if patch.tensors}
    scale = _stated_scale(table)
    own = transformer_tensors(shape, "diffusers")
    for patch in patches.values():
        notes += PatchCheck(table, patch, shape, own, model).run()
        patch.stated_scale = scale(stems[patch.target], patch)
    used = tuple(patch for patch in patches.values() if patch.tensors)
    if not used:
        parts = f" All of it belongs to {'; '.join(foreign)}." if foreign else ""
        parts += " Its matrices have rank 0: they change nothing." if empty else ""
        raise ModelMismatch(
            f"Nothing in the LoRA {quoted(table.path)} belongs to the transformer {quoted(model)}."
            f"{parts} Choose a LoRA for this model."
        )
    return LoraPatches(table=table, patches=used, notes=tuple(notes))


def _refuse_kinds(table: TensorTable) -> None:
    if table.format != "safetensors":
        raise UnsupportedModel(
            f"The LoRA {quoted(table.path)} is a {table.format} file; LoRAs are read from "
            ".safetensors. Convert it, or get that version."
        )
    for name, info in table.tensors.items():
        key = read_lora_key(name)
        if key is not None and key.adapter:
            raise _not_applied(table, key.adapter, repr(name))
        readable = (*_FLOATS, *_WHOLE) if name.endswith(".alpha") else _FLOATS
        if info.dtype not in readable and not left_in_lora(name):
            raise UnsupportedModel(
                f"Tensor {name!r} of the LoRA {quoted(table.path)} is stored as {info.dtype}; "
                f"readable are {', '.join(readable)}. Get another version."
            )


def _not_applied(table: TensorTable, kind: str, found: str) -> UnsupportedModel:
    needs = f": {NEEDS[kind]}" if kind in NEEDS else ""
    return UnsupportedModel(
        f"{quoted(table.path)} is an adapter of the kind {kind} ({found}), which WanFit cannot "
        f"apply exactly{needs}. Kinds that can be used are {_APPLIED}. Get or train one of these, "
        "or load a checkpoint into which this one was merged."
    )


@lru_cache(maxsize=16)
def _index(shape: TransformerShape) -> dict[str, str]:
    """Map every module and table, by its flat name in each style, to its diffusers name."""
    original = transformer_tensors(shape, "original")
    renamed = {
        source.name: name for name, source in map_names("transformer", original).sources.items()
    }
    renamed |= {name: name for name in transformer_tensors(shape, "diffusers")}
    index: dict[str, str] = {}
    for stored, name in renamed.items():
        index[_module(stored).replace(".", "_")] = _module(name)
    return index


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _target(index: Mapping[str, str], stem: str, name: str) -> str | None:
    """Return the diffusers name of what a tensor patches, or None where the model lacks it."""
    tables = ("_modulation", "_scale_shift_table") if name.endswith(".diff_m") else ()
    for bare in spellings(stem):
        for spelling in (bare, *(bare + ending for ending in tables)):
            if spelling in index:
                return index[spelling]
    return None


def _refuse_unknown(
    table: TensorTable, unknown: list[str], shape: TransformerShape, model: Path,
    index: Mapping[str, str],
) -> None:  # fmt: skip
    count = f"{len(unknown)} of {len(table.tensors)} tensors of the LoRA {quoted(table.path)}"
    blocks = [int(found[1]) for name in unknown if (found := _BLOCK.search(name))]
    if blocks and len(blocks) == len(unknown) and min(blocks) >= shape.layers:
        raise ModelMismatch(
            f"The LoRA {quoted(table.path)} patches {max(blocks) + 1} blocks, the transformer "
            f"{quoted(model)} has {shape.layers}. Choose a LoRA for this model."
        )
    if marks := [name for name in unknown if name.endswith(QUANT_SUFFIXES)]:
        raise UnsupportedModel(
            f"The LoRA {quoted(table.path)} is stored in a quantised form ({some_of(marks)}), "
            "which is read of models only. Get it in bf16 or fp16, or save it dequantised."
        )
    bare = {name: _module(name) for name in unknown if _module(name) != name}
    if whole := [name for name, stem in bare.items() if _target(index, stem, name) is not None]:
        raise _not_applied(table, "weights to be replaced", some_of(whole))
    hint = "Choose a LoRA for this model."
    if names_both_experts(unknown):
        hint = (
            "It holds patches for both experts; save those of 'transformer_1.' and of "
            "'transformer_2.' as files of their own, one for each expert."
        )
    raise ModelMismatch(
        f"{count} match nothing in the transformer {quoted(model)}: {some_of(unknown)}. {hint}"
    )


def _stated_scale(table: TensorTable) -> Callable[[str, Patch], float | None]:
    """Return a function (stem, patch) -> alpha / rank by what diffusers or PEFT saved beside the
    tensors; it returns None where nothing is said. A tensor that holds alpha comes before it.
    """
    config = _adapter_config(table)
    kind = str(config.get("peft_type") or _PEFT_LORA).upper()
    if kind not in _PEFT_ALPHAS:
        raise _not_applied(table, kind, "its configuration says so")
    if config.get("use_dora") and not any(
        "lora_magnitude_vector" in name for name in table.tensors
    ):
        raise CorruptFile(
            f"The configuration of {quoted(table.path)} says that it is a DoRA (use_dora), but it "
            "holds no lora_magnitude_vector. Download it again, or get another version."
        )
    alphas, ranks = (_of_modules(table, config, key) for key in ("alpha_pattern", "rank_pattern"))

    def scale(stem: str, patch: Patch) -> float | None:
        names = (*spellings(stem), flat_stem(patch.target))
        alpha = alphas(names, config.get(_PEFT_ALPHAS[kind]))
        if kind == _PEFT_LORA:
            rank: Any = math.sqrt(patch.rank) if config.get("use_rslora") else patch.rank
        else:  # that of the configuration, also where a factor is whole
            rank = ranks(names, config.get("r"))
        if not rank or any(
            isinstance(n, bool) or not isinstance(n, int | float) for n in (alpha, rank)
        ):
            return None
        if not math.isfinite(alpha / rank):
            raise CorruptFile(
                f"The configuration of the LoRA {quoted(table.path)} states alpha {alpha} and rank "
                f"{rank}; numbers are needed. Download it again."
            )
        return float(alpha / rank)

    return scale


def _of_modules(
    table: TensorTable, config: Mapping[str, Any], key: str
) -> Callable[[Iterable[str], Any], Any]:
    """Return a function (a module's flat names, default) -> what a pattern of PEFT's says of it.

    As in PEFT a pattern is a module's whole name, or the end of it after a dot. Raises
    UnsupportedModel for other patterns: PEFT takes them for regular expressions, and they come from
    outside. Trainers write no others.
    """
    stated = config.get(key)
    stated = stated if isinstance(stated, dict) else {}
    for one in stated:
        if not isinstance(one, str) or not _PATTERN_KEY.fullmatch(one):
            raise UnsupportedModel(
                f"{key} of the LoRA {quoted(table.path)} holds {str(one)[:60]!r}; only names of "
                "modules are read there. Save the LoRA with alpha as tensors."
            )
    patterns = {flat_stem(re.sub(r"[\\^$]", "", one)): value for one, value in stated.items()}

    def found(names: Iterable[str], default: Any) -> Any:
        for part, value in patterns.items():
            if any(name == part or name.endswith("_" + part) for name in names):
                return value
        return default

    return found


def _adapter_config(table: TensorTable) -> dict[str, Any]:
    """Return PEFT's configuration: from the metadata, or from adapter_config.json beside the file.

    A folder of many LoRAs may hold the configuration of one of them, so the file counts only for
    PEFT's own file names, or where one LoRA lies alone in its folder.
    """
    text = table.metadata.get("lora_adapter_metadata", "")
    file = adapter_config_of(table.files[0])
    try:
        stated = json.loads(text) if text else {}
    except (ValueError, RecursionError) as err:
        raise CorruptFile(
            f"The metadata lora_adapter_metadata of {quoted(table.path)} is not JSON ({err}); it "
            "holds the scale of the LoRA. Download the file again."
        ) from err
    if not stated and file is not None:
        stated = read_json(file)
    if not isinstance(stated, dict):
        return {}
    return {str(key).removeprefix("transformer."): value for key, value in stated.items()}


def adapter_config_of(lora: Path) -> Path | None:
    """Return the adapter_config.json that belongs to a LoRA file, or None."""
    folder = lora if lora.is_dir() else lora.parent
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    named = lora.is_dir() or lora.name.startswith(_ADAPTER_FILES)
    alone = named or sum(name.endswith(".safetensors") for name in listing(folder)) == 1
    return file if alone else None
