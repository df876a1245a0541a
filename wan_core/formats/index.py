"""Which weights a component folder holds, and the tensor tables of sharded checkpoints.

An index is accepted only if it agrees with the header of every shard it names: each tensor is in
exactly the shard that the index says, no shard is missing, and every shard's name is a plain file
name without a folder. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from ..errors import CorruptFile, MissingFile, UnsafeFile
from ..files import contained_path, quoted, some_of
from .one_file import read_file
from .small_json import read_json
from .table import AGAIN, MAX_TENSORS, PICKLE_SUFFIXES, QUANTISED, TensorInfo, TensorTable

MAX_SHARDS: Final = 1024
SAFE_SUFFIXES: Final = (".safetensors", ".sft")
_STANDARD: Final = (
    "diffusion_pytorch_model", "model", "adapter_model", "pytorch_lora_weights",
)  # fmt: skip
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\b")
_PARTIAL: Final = (".incomplete", ".part", ".aria2", ".crdownload", ".tmp", ".download")


def find_weights(folder: str | os.PathLike[str]) -> Path:
    """Return the file or index of weights that a component folder holds.

    Knows the names of diffusers, transformers and PEFT, with or without a variant tag
    (``*.fp16.safetensors``). Raises MissingFile when there are no weights or several sets of them,
    UnsafeFile when there are only pickles, CorruptFile when there are shards without their index.
    """
    root = Path(folder)
    names = sorted(listing(root))
    safe = [n for n in names if n.lower().endswith(SAFE_SUFFIXES)]
    indexes = [n for n in names if ".safetensors.index" in n and n.endswith(".json")]
    ggufs = [n for n in names if n.lower().endswith(".gguf")]
    for stem in _STANDARD:
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
            if name in names:
                return root / name
    whole = [n for n in safe if not _SHARD.search(n)]
    # Shards without their index come before GGUF files: the download is not whole.
    for group in (indexes, whole, ggufs if not safe else []):
        if len(group) == 1:
            return root / group[0]
        if group:
            raise MissingFile(
                f"{str(root)!r} holds {len(group)} sets of weights ({some_of(group)}) and none has "
                "a standard name. Name the one you want, or keep only that one."
            )
    if safe:
        raise CorruptFile(
            f"{str(root)!r} holds {len(safe)} shards ({some_of(safe)}) but not their index "
            "(*.safetensors.index.json). Download the index too."
        )
    _refuse_empty(root, names)


def _refuse_empty(root: Path, names: Sequence[str]) -> NoReturn:
    pickles = [n for n in names if n.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise UnsafeFile(
            f"{str(root)!r} holds its weights only as {some_of(pickles)}: a pickle, which can run "
            "code when it is opened. Use a .safetensors version of this model, or convert it: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), new_file)."
        )
    partial = [n for n in names if n.lower().endswith(_PARTIAL)]
    if partial:
        raise MissingFile(
            f"{str(root)!r} holds only a download that has not finished ({some_of(partial)}). "
            "Finish the download."
        )
    raise MissingFile(
        f"{str(root)!r} holds no weights (looked for *.safetensors with its index and for *.gguf, "
        f"found {some_of(names) if names else 'nothing'}). Download this part of the model again."
    )


def read_index(path: Path) -> TensorTable:
    """Read a sharded index and the header of every shard it names."""
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(
            f"{quoted(path)} has no weight_map from tensor to shard; it is no index of weights. "
            f"{AGAIN if path.name.endswith('.index.json') else 'Choose the folder that it is in.'}"
        )
    if len(weight_map) > MAX_TENSORS:
        raise CorruptFile(
            f"{quoted(path)} lists {len(weight_map):,} tensors; {MAX_TENSORS:,} are allowed. "
            f"{AGAIN}"
        )
    shards = _shard_paths(path, weight_map)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    said: list[str] = []
    header_bytes = 0
    for name, shard in shards.items():
        table = read_file(shard)
        header_bytes += table.header_bytes
        metadata.update(table.metadata)
        said += [table.metadata[QUANTISED]] if QUANTISED in table.metadata else []
        _check_shard(path, name, table, weight_map, tensors)
        tensors.update(table.tensors)
    if len(said) > 1:
        metadata[QUANTISED] = _all_layers(path, said)
    return TensorTable(
        path, tuple(shards.values()), {name: tensors[name] for name in weight_map}, metadata,
        "safetensors", header_bytes, _extra_shards(path, shards),
    )  # fmt: skip


def _all_layers(path: Path, said: Sequence[str]) -> str:
    """Put together what each shard says of how its layers are stored.

    What is not an object with layers is returned as it is: who reads it says so.
    """
    layers: dict[str, Any] = {}
    for text in said:
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            return text
        own = whole.get("layers", {}) if isinstance(whole, dict) else None
        if not isinstance(own, dict):
            return text
        other = next((name for name in own if layers.get(name, own[name]) != own[name]), None)
        if other is not None:
            raise CorruptFile(
                f"Two shards of {quoted(path)} say differently how {other!r} is stored "
                f"({QUANTISED}). They are of different downloads: download all of them again."
            )
        layers |= own
    return json.dumps({"layers": layers})


def _shard_paths(path: Path, weight_map: Mapping[str, Any]) -> dict[str, Path]:
    names = dict.fromkeys(weight_map.values() if _all_texts(weight_map) else ())
    if not names:
        raise CorruptFile(
            f"The weight_map of {quoted(path)} names shards that are not texts. {AGAIN}"
        )
    if len(names) > MAX_SHARDS:
        raise CorruptFile(
            f"{quoted(path)} names {len(names):,} shards; {MAX_SHARDS:,} are allowed. {AGAIN}"
        )
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise UnsafeFile(
                f"{quoted(path)} names the shard {name[:120]!r}; a shard is a plain .safetensors "
                "name beside its index. Get the model from a source you trust."
            )
    shards = {name: contained_path(path.parent, name, allow_links=True) for name in names}
    missing = [name for name, shard in shards.items() if not shard.exists()]
    if missing:
        raise MissingFile(
            f"{len(missing)} of {len(shards)} shards named by {quoted(path)} are missing: "
            f"{some_of(missing)}. Download them into {str(path.parent)!r}."
        )
    return shards


def _check_shard(
    path: Path,
    shard: str,
    table: TensorTable,
    weight_map: Mapping[str, str],
    seen: Mapping[str, TensorInfo],
) -> None:
    promised = [name for name, where in weight_map.items() if where == shard]
    absent = [name for name in promised if name not in table.tensors]
    if absent:
        raise CorruptFile(
            f"{quoted(path)} says {shard!r} holds {absent[0]!r}, and it does not ({len(absent)} of "
            f"{len(promised)} tensors are elsewhere or missing). Index and shards are of "
            "different downloads: download all of them again."
        )
    for name in table.tensors:
        if name in seen:
            raise CorruptFile(
                f"Tensor {name!r} is in two shards of {quoted(path)}: {seen[name].file.name!r} and "
                f"{shard!r}. Download the model again."
            )
        if weight_map.get(name) != shard:
            raise CorruptFile(
                f"{shard!r} holds {name!r}, which {quoted(path)} "
                + (f"places in {weight_map[name]!r}" if name in weight_map else "does not list")
                + ". Index and shards are of different downloads: download all of them again."
            )


def _extra_shards(path: Path, shards: Mapping[str, Path]) -> tuple[str, ...]:
    # Names that differ only in their shard numbers (a-00001-of-00003.safetensors) are one set: a
    # file of this set that the index does not use is left over from another download.
    patterns = {_SHARD.sub("#", name) for name in shards}
    extra = [
        n for n in listing(path.parent)
        if n not in shards and _SHARD.search(n) and _SHARD.sub("#", n) in patterns
    ]  # fmt: skip
    if not extra:
        return ()
    return (f"{path.parent} also holds {some_of(sorted(extra))}, which the index does not use.",)


def _all_texts(weight_map: Mapping[str, Any]) -> bool:
    return all(isinstance(value, str) for value in weight_map.values())


def listing(folder: Path) -> list[str]:
    """Return the names in a folder that are not hidden; MissingFile when it cannot be listed.

    macOS writes a hidden ``._name`` beside every file on disks that are not its own.
    """
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError as err:
        raise MissingFile(f"{quoted(folder)} cannot be listed: {err.strerror}.") from err
