"""LoRAs added to an architecture: checked from their headers, described, distilled ones recognised.

Nothing is loaded. What a LoRA was made for is compared with the transformer's own numbers. The user
says which expert it changes; a name or metadata that says otherwise leads to a warning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import EXPERTS, WanLoRA, is_many, plain_number, shown
from ..errors import InvalidRequest, ModelMismatch
from ..files import named_path, quoted
from ..formats import read_small, read_table
from ..models import TRANSFORMERS, FoundLora, ModelArchitecture, few_steps_hint, recipe_of
from .identified import identify
from .lora_names import LoraPatches, adapter_config_of, read_patches
from .lora_patches import MAGNITUDES
from .pairing import check_lora, role_hint
from .unsupported import lora_base

MAX_STRENGTH = 100.0
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")


def as_lora(given: Any) -> WanLoRA:
    """Return a LoRA given as a WanLoRA, a path, or a tuple (path, expert, strength).

    Raises InvalidRequest naming the field for an unknown expert or a strength that is no number.
    """
    if isinstance(given, WanLoRA):
        lora = given
    elif isinstance(given, str | Path):
        lora = WanLoRA(given)
    elif isinstance(given, list | tuple) and 1 <= len(given) <= 3:
        lora = WanLoRA(*given)
    else:
        raise InvalidRequest(
            f"loras holds {shown(given)}; a WanLoRA, a path or (path, expert, strength) is needed.",
            field="loras",
        )
    named_path(lora.path, "loras")
    if not isinstance(lora.expert, str) or lora.expert not in EXPERTS:
        raise InvalidRequest(
            f"expert of the LoRA {quoted(Path(lora.path))} is {shown(lora.expert)}; allowed are "
            f"{', '.join(EXPERTS)}.",
            field="expert",
        )
    strength = plain_number(lora.strength)
    if strength is None or abs(strength) > MAX_STRENGTH:
        raise InvalidRequest(
            f"strength of the LoRA {quoted(Path(lora.path))} is {shown(lora.strength)}; a "
            f"number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g} is needed.",
            field="strength",
        )
    return replace(lora, strength=strength)


def lora_list(loras: Any) -> list[Any]:
    """Return the LoRAs that were given: a single one counts as a list of one."""
    if isinstance(loras, str | os.PathLike | WanLoRA):
        return [loras]
    if not is_many(loras) or isinstance(loras, Mapping):
        raise InvalidRequest(f"loras is {shown(loras)}; a list of LoRAs is needed.", field="loras")
    found = list(loras)
    if isinstance(loras, tuple) and len(found) > 1 and str(found[1]) in EXPERTS:
        return [loras]  # (path, expert, strength)
    return found


def parse_lora(text: str) -> WanLoRA:
    """Read ``FILE[:EXPERT][:STRENGTH]``; a colon that is part of the file's name is kept.

    Raises InvalidRequest for a strength out of range.
    """
    path, expert, strength = text, "both", 1.0
    head, colon, last = path.rpartition(":")
    if colon and head and _NUMBER.fullmatch(last):
        path, strength = head, float(last)
        head, colon, last = path.rpartition(":")
    if colon and head and last in EXPERTS:
        path, expert = head, last
    return as_lora(WanLoRA(path, expert, strength))


def with_loras(
    architecture: ModelArchitecture, loras: Iterable[Any], *, use_recipe: bool = False
) -> ModelArchitecture:
    """Return the architecture with these LoRAs added, each checked against its transformer.

    ``use_recipe`` makes the settings of a distilled LoRA, or else of a distilled checkpoint, the
    model's defaults, which are what None in a GenerationConfig means. Raises InvalidRequest,
    MissingFile, CorruptFile, ModelMismatch or UnsupportedModel.
    """
    added: list[FoundLora] = []
    warnings: list[str] = []
    for given in lora_list(loras):
        found, notes = _found(architecture, as_lora(given))
        warnings += [*notes, *_given_before(found, [*architecture.loras, *added])]
        added.append(found)
    result = replace(
        architecture,
        loras=(*architecture.loras, *added),
        reasons=(*architecture.reasons, *(found.describe() for found in added)),
        warnings=tuple(dict.fromkeys((*architecture.warnings, *warnings))),
    )
    return _with_recipe(result) if use_recipe else result


def _found(architecture: ModelArchitecture, lora: WanLoRA) -> tuple[FoundLora, list[str]]:
    path = Path(lora.path)
    if lora.expert != "both" and not architecture.two_experts:
        raise InvalidRequest(
            f"expert of the LoRA {quoted(path)} is {lora.expert!r}, but {architecture.name} was "
            "loaded with one transformer. Choose 'both'.",
            field="expert",
        )
    patches = check_file(path, architecture)
    metadata = patches.table.metadata
    notes = list(patches.notes)
    role = role_hint(path.name, metadata) if architecture.two_experts else None
    if role is not None and role[0] != lora.expert:
        notes.append(
            f"The LoRA {quoted(path)} is used for expert {lora.expert!r}, but {role[1]} says "
            f"{role[0]}. Check that it is where it belongs."
        )
    if lora.strength == 0:
        notes.append(f"The LoRA {quoted(path)} has no effect: its strength is 0.")
    elif _scaled_to_nothing(patches):
        notes.append(
            f"The LoRA {quoted(path)} has no effect: its alpha is 0, which every change is "
            "multiplied with. Get another version of it."
        )
    # What a DoRA makes of each magnitude, and the magnitude itself, are kept in float32.
    used = sum(
        patches.table.tensors[name].numel * (6 if role in MAGNITUDES else 1)
        for patch in patches.patches
        for role, name in patch.tensors.items()
    )
    recipe = recipe_of(path, metadata)
    hint = few_steps_hint(path, metadata, whole=False)
    notes += [hint] if hint else []
    config = adapter_config_of(patches.table.files[0])
    files = (*patches.table.files, *([config] if config is not None else []))
    return FoundLora(
        lora=lora, parameters=used, rank=patches.rank, recipe=recipe,
        few_steps=recipe is not None or bool(hint), files=files, pairs=patches.pairs,
        pieces=patches.pieces, columns=patches.columns,
    ), notes  # fmt: skip


def _given_before(found: FoundLora, others: Iterable[FoundLora]) -> list[str]:
    """Say that a file is given a second time for an expert, as happens when nodes are copied."""
    same = [
        other.lora.strength
        for other in others
        if set(other.files) == set(found.files)
        and any(other.works_on(one) and found.works_on(one) for one in TRANSFORMERS)
    ]
    if not same:
        return []
    sums = " + ".join(f"{strength:g}" for strength in (*same, found.lora.strength))
    return [
        f"The LoRA {quoted(Path(found.lora.path))} is given {len(same) + 1} times, and the "
        f"strengths add up: {sums}. Leave all but one out unless that is meant."
    ]


def _scaled_to_nothing(patches: LoraPatches) -> bool:
    """Whether all that a LoRA does is multiplied with 0; reads alphas until one is not."""
    for patch in patches.patches:
        if patch.tensors.keys() & {"diff", "diff_bias", *MAGNITUDES} or not patch.rank:
            return False
        name = patch.tensors.get("alpha")
        if name is None:
            if patch.stated_scale != 0:
                return False
        elif any(read_small([patches.table.tensors[name]])[0]):
            return False
    return True


def check_file(path: Path, architecture: ModelArchitecture) -> LoraPatches:
    """Match a LoRA's header with a model's transformer; raises as :func:`with_loras`."""
    table = read_table(path)
    part = identify(table)
    model = architecture.components["transformer"].path
    if part.kind != "lora":
        raise ModelMismatch(f"{quoted(path)} is {part.title}, not a LoRA. Choose another file.")
    if part.width is not None:
        check_lora(architecture.transformer, part, model)
    elif lora_base(table.tensors) is not None:
        raise ModelMismatch(
            f"{quoted(path)} is {part.title}; the transformer {quoted(model)} is one of Wan. "
            "Choose a LoRA for it."
        )
    return read_patches(table, architecture.transformer, model)


def _with_recipe(architecture: ModelArchitecture) -> ModelArchitecture:
    known = [(Path(one.lora.path).name, one.recipe) for one in architecture.loras]
    known.append((architecture.root.name, architecture.recipe))
    found = next(((name, recipe) for name, recipe in known if recipe is not None), None)
    if found is None:
        names = ", ".join(name for name, _ in known)
        raise InvalidRequest(
            f"use_recipe is set, but no recipe is known for {names}. Recognised are LoRAs and "
            "checkpoints distilled to a few steps (lightx2v, Lightning, rCM, TurboWan, FastWan, "
            "Self-Forcing, CausVid). Leave use_recipe off and set steps and scales yourself.",
            field="use_recipe",
        )
    name, recipe = found
    variant = architecture.variant
    reason = f"settings of {name}, {recipe.describe()} ({recipe.reason})"
    return replace(
        architecture,
        variant=replace(variant, defaults=recipe.as_defaults(variant.defaults)),
        reasons=tuple(dict.fromkeys((*architecture.reasons, reason))),
    )
