"""How each weight of a file is stored: dtype, scales, notes and metadata read together.

A quantised weight comes with companions: tensors whose name is the layer's and a suffix. This is
the one table of them, for those that skip companions and for those that read them. Everything
is decided from the header and a few kilobytes of notes; what is ambiguous is refused by name.

Sources: ComfyUI 0.33 ``comfy/ops.py``, ``comfy/quant_ops.py``, ``comfy/utils.py`` (notes, metadata,
the old ``scaled_fp8`` marker) and comfy-kitchen ``tensor/*.py`` (layouts and paddings).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn

from ..errors import CorruptFile, UnsupportedModel
from ..files import quoted, some_of
from .foreign import FOREIGN
from .gguf import GGML_TYPES
from .kinds import FLOATS, GGUF_TYPES, Storage, WeightKind
from .open import read_small
from .table import QUANTISED, TensorInfo, TensorTable, bytes_by_dtype

SCALE: Final = (".scale_weight", ".weight_scale")
"""What the stored values are multiplied with: the old spelling and the new one."""
SECOND_SCALE: Final = ".weight_scale_2"
NOTE: Final = ".comfy_quant"
_UNUSED: Final = (".scale_input", ".input_scale")
"""Scales of activations: hints for native products, never part of a weight."""
QUANT_SUFFIXES: Final = (*SCALE, SECOND_SCALE, NOTE, *_UNUSED, *FOREIGN)
"""Endings of tensors that describe how another tensor is stored."""
MARKER: Final = "scaled_fp8"
_IN_BLOCK: Final = re.compile(r"\b((?:blocks?|layers|blk)\.)\d+")
"""The number of a block in a name: layers that differ by it alone are equal."""

_BLOCKS: Final = {name: numbers for name, numbers, _ in GGML_TYPES.values()}
_FP8: Final = {"F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2"}
_NOTE_DTYPES: Final = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
MAX_NOTES: Final = 2048
"""``comfy_quant`` notes that are read, of at most 512 bytes each; in truth some 30 to 90."""


def split_companions(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split the names of a part into weights, and companions that describe weights."""
    weights: list[str] = []
    companions: list[str] = []
    for name in names:
        other = name.endswith(QUANT_SUFFIXES) or name.rpartition(".")[2] == MARKER
        (companions if other else weights).append(name)
    return weights, companions


def logical_shape(name: str, info: TensorInfo, kind: WeightKind) -> tuple[int, ...]:
    """Return the shape a weight has in the model, however its bytes are packed."""
    stored = kind.weights.get(name)
    return info.shape if stored is None else stored.shape


def read_weight_kind(table: TensorTable, own: Mapping[str, TensorInfo]) -> WeightKind:
    """Return how the tensors ``own`` (names without prefix) of ``table`` are stored.

    Raises UnsupportedModel or CorruptFile, naming the tensor, for a weight whose dtype no weight
    can have, for scales that are missing or of a layout that is not known, and for notes that
    contradict their weight. Reads at most 1 MiB of ``comfy_quant`` notes, and scales where a weight
    has two.
    """
    if table.format == "gguf":
        return _gguf_kind(own)
    for name in own:
        foreign = next((kind for end, kind in FOREIGN.items() if name.endswith(end)), None)
        if foreign:
            return _refused(foreign, f"it has {name!r}")
    reader = _Reader(table, own)
    layer, unknown = reader.unknown_format()
    if unknown:
        return _refused(unknown, f"{layer!r} is said to be")
    names, _ = split_companions(own)
    weights = {name: s for name in names if (s := reader.storage_of(name)) is not None}
    reader.check_siblings(weights)
    reader.check_dtypes(weights)
    return _summary(own, weights, reader.warnings(weights))


def _refused(name: str, seen: str) -> WeightKind:
    why = (
        f"weights stored as {name} are not supported ({seen}); use bf16, fp16, fp8, int8, GGUF, or "
        "nvfp4 or mxfp8 in ComfyUI's layout"
    )
    return WeightKind(name, why, title=name)


def _gguf_kind(own: Mapping[str, TensorInfo]) -> WeightKind:
    sizes = bytes_by_dtype(own.values())
    bad = {i.dtype: name for name, i in reversed(list(own.items())) if i.dtype not in GGUF_TYPES}
    why = (
        f"GGUF type {some_of(list(bad))} cannot be dequantised by diffusers (tensor "
        f"{some_of(list(bad.values()))}); get a file with {', '.join(sorted(GGUF_TYPES))}"
        if bad else ""
    )  # fmt: skip
    weights = {
        name: Storage(
            "gguf", info.dtype, info.shape,
            by_rows=math.prod(info.shape[1:]) % _BLOCKS[info.dtype] == 0,
        )
        for name, info in own.items()
        if info.dtype not in FLOATS
    }  # fmt: skip
    # Of a small model the tensors that are plain numbers may be the larger part.
    title = next((kind for kind in sizes if kind not in FLOATS), next(iter(sizes), ""))
    return WeightKind("gguf", why, weights=weights, title=f"GGUF {title}")


def _summary(
    own: Mapping[str, TensorInfo], weights: Mapping[str, Storage], warnings: tuple[str, ...]
) -> WeightKind:
    """Name the file by what most of its bytes are."""
    titles: dict[str, int] = {}
    for stored in weights.values():
        titles[stored.title] = titles.get(stored.title, 0) + math.prod(stored.shape)
    quantised = sum(titles.values())
    plain = sum(info.numel for name, info in own.items() if name not in weights)
    if 10 * quantised < plain:  # a few layers do not make the file
        largest = next(iter(bytes_by_dtype(own.values())), "BF16")
        name = FLOATS.get(largest, "bf16")
        title = f"{name}, with {', '.join(titles)}" if titles else name
        return WeightKind(name, warnings=warnings, weights=weights, title=title)
    title = max(titles, key=lambda title: titles[title])
    example = next(stored for stored in weights.values() if stored.title == title)
    name = example.kind
    if example.kind == "fp8":
        name = "fp8_scaled" if example.per else _FP8[example.dtype]
    elif example.group:
        name = "int8_convrot"
    return WeightKind(name, warnings=warnings, weights=weights, title=title)


class _Reader:
    """Reads the notes of one part once, and says of each weight how it is stored."""

    def __init__(self, table: TensorTable, own: Mapping[str, TensorInfo]) -> None:
        self._table, self._own = table, own
        self._where = quoted(table.path)
        self._marked = MARKER in own
        self._unmatched: list[str] = []
        notes, stated = self._from_tensors(), self._from_metadata()
        for layer, note in notes.items():
            other = stated.get(layer, note)["format"]
            if other != note["format"]:
                raise CorruptFile(
                    f"{self._where} says of {layer!r} that it is {note['format']}, and in its "
                    f"metadata that it is {other}. The file is mixed; download it again."
                )
        self._notes = stated | notes
        self._check_doubles()

    def _check_doubles(self) -> None:
        """Refuse a weight with a scale in each spelling, where these are not the same."""
        old, new = SCALE
        layers = [n.removesuffix(old) for n in self._own if n.endswith(old)]
        layers = [layer for layer in layers if layer + new in self._own]
        ours, theirs = (
            read_small([self._own[layer + end] for layer in layers], limit=2**20)
            for end in (old, new)
        )
        for layer, one, other in zip(layers, ours, theirs, strict=True):
            if one != other:
                raise CorruptFile(
                    f"Weight {f'{layer}.weight'!r} of {self._where} has two scales that differ, "
                    f"{layer + old!r} and {layer + new!r}. The file is mixed; download it again."
                )

    def _from_tensors(self) -> dict[str, dict[str, Any]]:
        named = [(n, i) for n, i in self._own.items() if n.endswith(NOTE)]
        if len(named) > MAX_NOTES:
            raise CorruptFile(
                f"{self._where} has {len(named):,} notes (comfy_quant) on how layers are stored; "
                f"{MAX_NOTES:,} are allowed. The file is damaged; download it again."
            )
        texts = read_small([info for _, info in named], limit=512)
        notes: dict[str, dict[str, Any]] = {}
        for (name, _), text in zip(named, texts, strict=True):
            layer = name.removesuffix(NOTE)
            notes[layer] = self._checked(layer, _json_object(text))
            if f"{layer}.weight" not in self._own:
                raise CorruptFile(
                    f"{self._where} has a note on how {layer!r} is stored, and no weight of that "
                    "name. The file is incomplete or mixed; download it again."
                )
        return notes

    def _checked(self, layer: str, note: object) -> dict[str, Any]:
        """Return a note's options, whether they stand at its top or below "params".

        One that is null is left open, as one that is not there.
        """
        if isinstance(note, dict) and isinstance(note.get("format"), str):
            below = note.get("params")
            places = (below if isinstance(below, dict) else {}, note)
            stated = (item for place in places for item in place.items())
            return {name: value for name, value in stated if value is not None}
        raise CorruptFile(
            f"The note on how {layer!r} of {self._where} is stored is damaged: a JSON object with "
            'a text "format" is expected. Download the file again.'
        )

    def _from_metadata(self) -> dict[str, dict[str, Any]]:
        """Read the layers of the header's metadata, whatever prefix they were written with."""
        text = self._table.metadata.get(QUANTISED)
        if text is None:
            return {}
        whole = _json_object(text)
        layers = {} if whole is None else whole.get("layers", {})
        if whole is None or not isinstance(layers, dict):
            raise CorruptFile(
                f"{QUANTISED} in the header of {self._where} is damaged: a JSON object with an "
                'object "layers" is expected. Download the file again.'
            )
        found: dict[str, dict[str, Any]] = {}
        for name, note in layers.items():
            words = str(name).split(".")
            tails = (".".join(words[i:]) for i in range(len(words)))
            layer = next((t for t in tails if f"{t}.weight" in self._own), None)
            if layer is not None:
                found[layer] = self._checked(layer, note)
            elif f"{name}.weight" not in self._table.tensors:
                self._unmatched.append(str(name))
        return found

    def unknown_format(self) -> tuple[str, str]:
        """Return a layer and its format that nobody here can read, or two empty texts."""
        known = {*_NOTE_DTYPES, "nvfp4", "mxfp8", "int8_tensorwise"}
        formats = ((layer, str(note["format"])) for layer, note in self._notes.items())
        return next((pair for pair in formats if pair[1] not in known), ("", ""))

    def storage_of(self, name: str) -> Storage | None:
        """Say how one weight is stored; None for plain floating point and for companions."""
        info = self._own[name]
        if not name.endswith(".weight"):
            return Storage("fp8", info.dtype, info.shape) if info.dtype in _FP8 else None
        layer = name.removesuffix(".weight")
        note = self._notes.get(layer)
        scale = next((layer + s for s in SCALE if layer + s in self._own), "")
        form = str(note["format"]) if note is not None else self._undeclared(name, info, scale)
        if form == "float":
            return None
        if form in _NOTE_DTYPES or form == "fp8":
            return self._fp8(name, info, scale, note)
        if form == "int8_tensorwise":
            return self._int8(name, info, scale, note or {})
        return self._blocks(name, info, scale, form)

    def _undeclared(self, name: str, info: TensorInfo, scale: str) -> str:
        """Say what a weight without a note is, where dtype and companions leave no doubt."""
        second = name.removesuffix(".weight") + SECOND_SCALE in self._own
        block_scale = scale and self._own[scale].dtype in ("F8_E8M0", "F8_E4M3", "U8")
        if second or block_scale:
            what = "nvfp4" if second else "mxfp8"
            raise UnsupportedModel(
                f"Weight {name!r} of {self._where} looks like {what} without a note that says who "
                "wrote it (comfy_quant, or _quantization_metadata). Writers order nibbles and "
                "scales differently, and the wrong order is noise. Get ComfyUI's version of the "
                "file, or one in bf16, fp8 or GGUF."
            )
        if info.dtype in _FP8:
            return "fp8"
        if info.dtype == "I8" and scale:
            if self._notes or self._unmatched:
                raise UnsupportedModel(
                    f"Weight {name!r} of {self._where} is int8, and neither notes nor metadata say "
                    "whether it is rotated, as they do of others. Get another version of the file."
                )
            return "int8_tensorwise"  # LightX2V's: rows, never rotated
        if info.dtype in FLOATS and scale:
            raise CorruptFile(
                f"Weight {name!r} of {self._where} is stored as {info.dtype} and has a scale; only "
                "fp8, int8 and packed weights have one. The file is mixed; download it again."
            )
        return "float"

    def _fp8(self, name: str, info: TensorInfo, scale: str, note: dict[str, Any] | None) -> Storage:
        dtype = _NOTE_DTYPES[str(note["format"])] if note is not None else info.dtype
        if info.dtype not in (dtype, "U8", "I8"):
            self._contradicts(name, info, str(note and note["format"]))
        if note is not None and not scale:
            raise CorruptFile(
                f"Weight {name!r} of {self._where} is said to be scaled fp8, and its scale is not "
                "in the file; without it the video is noise. Get the whole file, or one in bf16."
            )
        per = self._per(name, info.shape, scale) if scale else ""
        return Storage("fp8", dtype, info.shape, scale, per=per, full_precision=_full(note or {}))

    def _int8(self, name: str, info: TensorInfo, scale: str, note: dict[str, Any]) -> Storage:
        if info.dtype != "I8" or len(info.shape) != 2:
            self._contradicts(name, info, "int8")
        if not scale:
            raise CorruptFile(
                f"Weight {name!r} of {self._where} is int8 and its scale is not in the file; "
                "without it the video is noise. Get the whole file, or one in bf16."
            )
        per = self._per(name, info.shape, scale)
        group, rotated = 0, note.get("convrot", False)
        if rotated not in (False, True):
            raise UnsupportedModel(
                f"The note on {name!r} of {self._where} has convrot {rotated!r}; true or false is "
                "allowed. Get another version of the file."
            )
        if rotated:
            group = note.get("convrot_groupsize", 256)
            powers = (4, 16, 64, 256, 1024, 4096)
            if type(group) is not int or group not in powers or info.shape[1] % group:
                raise UnsupportedModel(
                    f"Weight {name!r} of {self._where} is rotated in groups of {group!r} columns; "
                    f"a power of 4 that divides its {info.shape[1]} columns is allowed. Get "
                    "another version of the file."
                )
        return Storage(
            "int8", "I8", info.shape, scale, per=per, group=group, full_precision=_full(note)
        )

    def _blocks(self, name: str, info: TensorInfo, scale: str, form: str) -> Storage:
        """nvfp4 and mxfp8: packed values, and a scale for each 16 or 32 of them."""
        stored = ("U8", "F4", "I8") if form == "nvfp4" else ("F8_E4M3", "U8")
        if info.dtype not in stored or len(info.shape) != 2:
            self._contradicts(name, info, form)
        rows, width = info.shape
        columns = 2 * width if form == "nvfp4" and info.dtype != "F4" else width
        per_scale = 16 if form == "nvfp4" else 32
        second = name.removesuffix(".weight") + SECOND_SCALE
        absent = [n for n in (scale or f"{name}_scale",) if n not in self._own]
        absent += [second] if form == "nvfp4" and second not in self._own else []
        if absent:
            raise CorruptFile(
                f"Weight {name!r} of {self._where} is {form} and {some_of(absent)} is not in the "
                "file; without it the video is noise. Get the whole file."
            )
        if columns % per_scale:
            raise UnsupportedModel(
                f"Weight {name!r} of {self._where} is {form} and has {columns} columns; a multiple "
                f"of {per_scale} is allowed. Get another version of the file."
            )
        blocks = columns // per_scale
        wanted = -(-rows // 128) * 128 * (-(-blocks // 4) * 4)
        allowed = ("F8_E4M3", "U8") if form == "nvfp4" else ("F8_E8M0", "U8")
        if self._own[scale].numel != wanted or self._own[scale].dtype not in allowed:
            self._odd_scale(
                scale, f"{wanted:,} bytes ({' or '.join(allowed)}), one per {per_scale} columns"
            )
        single = self._own.get(second)
        if form == "nvfp4" and (single is None or single.numel != 1 or single.dtype not in FLOATS):
            self._odd_scale(second, "one number, F32, F16 or BF16")
        return Storage(
            form, info.dtype, (rows, columns), scale, second if form == "nvfp4" else "", "block"
        )

    def _per(self, name: str, shape: tuple[int, ...], scale: str) -> str:
        """Say what has a scale of its own: the whole weight, or each of its rows."""
        info = self._own[scale]
        if info.dtype not in FLOATS:
            self._odd_scale(scale, "F32, F16 or BF16")
        rows = shape[0] if shape else 1
        if info.numel == 1:
            return "tensor"
        if info.numel == rows and info.shape in ((rows,), (rows, 1)):
            return "row"
        self._odd_scale(scale, f"one number, or one for each of {name!r}'s {rows} rows")

    def _odd_scale(self, scale: str, allowed: str) -> NoReturn:
        info = self._own[scale]
        raise UnsupportedModel(
            f"Scale {scale!r} of {self._where} is {info.dtype} {list(info.shape)}; allowed is "
            f"{allowed}. Scales in blocks of other sizes cannot be used: get an fp8_scaled, int8, "
            "GGUF or bf16 version of the model."
        )

    def _contradicts(self, name: str, info: TensorInfo, form: str) -> NoReturn:
        raise CorruptFile(
            f"Weight {name!r} of {self._where} is stored as {info.dtype} {list(info.shape)}, and "
            f"its note says {form}. The file is damaged or mixed; download it again."
        )

    def check_siblings(self, weights: Mapping[str, Storage]) -> None:
        """Refuse fp8 layers without a scale among equal layers that have theirs.

        Only fp8 counts: in a mixed file some layers are bf16 or fp32, and those need none.
        """
        groups: dict[str, tuple[list[str], list[str]]] = {}
        for name, stored in weights.items():
            if stored.kind == "fp8" and len(stored.shape) == 2:
                have, lack = groups.setdefault(_IN_BLOCK.sub(r"\1#", name), ([], []))
                (have if stored.scale else lack).append(name)
        for have, lack in groups.values():
            if have and lack:
                raise CorruptFile(
                    f"{len(have)} of {len(have) + len(lack)} fp8 weights like {have[0]!r} of "
                    f"{self._where} have their scale, {lack[0]!r} has none; without it the weights "
                    "are noise. Download the file again."
                )
        scaled = any(stored.scale for stored in weights.values())
        fp8 = sum(stored.kind == "fp8" for stored in weights.values())
        if self._marked and fp8 and not scaled:
            raise CorruptFile(
                f"{self._where} says that its fp8 weights are scaled, but holds none of the scales "
                f"for its {fp8} fp8 weights; without them the video is noise. Get the "
                "whole file, or one in bf16."
            )

    def check_dtypes(self, weights: Mapping[str, Storage]) -> None:
        """Refuse a weight of a dtype that no weight can have, and scales without a weight."""
        for name, info in self._own.items():
            for ending in (*SCALE, SECOND_SCALE):
                if name.endswith(ending) and f"{name.removesuffix(ending)}.weight" not in self._own:
                    raise CorruptFile(
                        f"{self._where} has the scale {name!r}, and no weight that it belongs to. "
                        "The file is incomplete or mixed; download it again."
                    )
            if name in weights or info.dtype in FLOATS or name.endswith(QUANT_SUFFIXES):
                continue
            if name.rpartition(".")[2] in (MARKER, "spiece_model"):
                continue
            if name.endswith("position_ids") and info.dtype in ("I64", "I32"):
                continue
            raise UnsupportedModel(
                f"Tensor {name!r} of {self._where} is stored as {info.dtype}; weights are F32, "
                "BF16, F16 or F8 here, or I8 and U8 with their scales. Use a file in one of these."
            )

    def warnings(self, weights: Mapping[str, Storage]) -> tuple[str, ...]:
        """Return what is odd and harmless, in words."""
        out = []
        fp8 = [name for name, s in weights.items() if s.kind == "fp8" and name.endswith(".weight")]
        bare = [name for name in fp8 if not weights[name].scale]
        if bare and len(bare) < len(fp8):
            out.append(
                f"{len(bare)} of {len(fp8)} fp8 weights have no scale and are taken as they are "
                f"({some_of(bare, 2)})."
            )
        if self._unmatched:
            out.append(
                f"The metadata of {self._where} says how {len(self._unmatched)} layers are stored "
                f"that are not in it ({some_of(self._unmatched, 2)})."
            )
        noted = any(s.kind == "int8" for n, s in weights.items()) and not self._notes
        if noted:
            out.append("Its int8 weights carry no note; they are read as plain, unrotated rows.")
        return tuple(out)


def _full(note: Mapping[str, Any]) -> bool:
    """Say whether a note wants its layer multiplied in full precision.

    The old marker wants that of a whole file where it has two elements. It is not taken so: what is
    meant are ComfyUI's products, which do not scale what they multiply with.
    """
    return bool(note.get("full_precision_matrix_mult", False))


def _json_object(data: str | bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
