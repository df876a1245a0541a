"""Which weights stay as their file stores them, and the bytes a component then takes.

One rule for loading, which carries it out, and for estimates, which count on it. Quantised
matrices and embedding tables of transformers and umT5 keep the bytes of the file; everything else
takes the dtype that is computed in, or fp32 where diffusers' class asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ..formats import Storage, TensorInfo, TensorTable, WeightKind
from .names import map_names
from .shapes import count_blocks

_WIDE: Final[Mapping[str, frozenset[str]]] = {
    "transformer": frozenset(
        {
            "time_embedder",
            "scale_shift_table",
            "norm1",
            "norm2",
            "norm3",
            "motion_synthesis_weight",
        }
    ),
}
"""``_keep_in_fp32_modules`` of ``WanTransformer3DModel`` and ``WanAnimateTransformer3DModel``
(diffusers 0.42): parts of a name."""
_BLOCKS: Final = {"transformer": "blocks.", "text_encoder": "encoder.block."}
_VACE: Final = "vace_blocks."
_FACES: Final = "face_adapter."
_TABLES: Final = ("shared.weight", "encoder.embed_tokens.weight")
_HALF: Final = ("F16", "BF16")


@dataclass(frozen=True, slots=True)
class StoredSize:
    """What some weights take in memory, for any dtype they may be computed in."""

    kept: int = 0
    """Bytes that stay as the file has them, scales included."""
    plain: int = 0
    """Numbers that take the dtype that is computed in."""
    wide: int = 0
    """Numbers that stay in fp32."""
    half: int = 0
    """Numbers of matrices stored in 16 bits, which stay so where 16 bits are computed in."""
    scales: int = 0
    """Bytes of ``kept`` that are copied also from a mapped file: scales of rows and of blocks, put
    in the order of the rows."""

    def nbytes(self, size: int) -> int:
        """Return the bytes, with ``size`` of them for a number of the computing dtype."""
        return self.kept + (self.plain + self.half) * size + self.wide * 4

    def __add__(self, other: StoredSize) -> StoredSize:
        return StoredSize(
            self.kept + other.kept, self.plain + other.plain, self.wide + other.wide,
            self.half + other.half, self.scales + other.scales,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredSizes:
    """The weights of one component as they lie in memory: block by block, and what is around."""

    blocks: tuple[StoredSize, ...]
    rest: StoredSize
    """What is outside the blocks, embedding tables aside."""
    tables: StoredSize
    """Token embeddings, which stay in RAM while blocks are streamed."""
    largest: int
    """Numbers of the largest matrix that is taken apart at each use; 0 where none is."""
    vace: tuple[StoredSize, ...] = ()
    """VACE blocks, which are streamed among the others."""
    faces: tuple[StoredSize, ...] = ()
    """Animate's face adapters, likewise."""

    @property
    def whole(self) -> StoredSize:
        """All weights of the component."""
        return sum((*self.blocks, *self.vace, *self.faces), self.rest + self.tables)

    @property
    def quantised(self) -> bool:
        """Whether some weights are taken apart when they are used."""
        return self.largest > 0


def stays_stored(kind: str, target: str, stored: Storage | None) -> bool:
    """Say whether a parameter called ``target`` keeps the bytes of its file.

    ``kind`` is that of the component. Matrices only: what is not a matrix is small, and what the
    class keeps in fp32 is computed in fp32.
    """
    if stored is None or kind not in _BLOCKS or len(stored.shape) != 2 or not stored.by_rows:
        return False
    return target.endswith(".weight") and not stays_wide(kind, target)


def stays_wide(kind: str, target: str) -> bool:
    """Say whether diffusers keeps a parameter in fp32 whatever is computed in."""
    return not _WIDE.get(kind, frozenset()).isdisjoint(target.split("."))


def cast_at_use(stored: str, computed: str) -> bool:
    """Say whether a matrix stays in its half precision and is cast when it is used.

    ``stored`` and ``computed`` are names as in a safetensors header. A cast copy would take as many
    bytes as the file has, and could not be mapped.
    """
    return stored in _HALF and computed in _HALF and stored != computed


def stored_sizes(
    kind: str, table: TensorTable, weights: WeightKind, prefix: str
) -> StoredSizes | None:
    """Count the weights of a transformer or umT5 from its header; None for other components."""
    if kind not in _BLOCKS or weights.why_not:
        return None
    own = {n[len(prefix) :]: info for n, info in table.tensors.items() if n.startswith(prefix)}
    sources = map_names(kind, table.tensors, prefix).sources
    lists = {
        start: [StoredSize()] * count_blocks(sources, start)
        for start in (_BLOCKS[kind], _VACE, _FACES)
    }
    rest = tables = StoredSize()
    largest = 0
    for target, source in sources.items():
        stored = weights.weights.get(source.name[len(prefix) :])
        size = _size_of(kind, target, table.tensors[source.name], stored, own, source.parts)
        if size.kept and target not in _TABLES:
            largest = max(largest, stored.shape[0] * stored.shape[1] if stored else 0)
        found = next((start for start in lists if target.startswith(start)), None)
        if target in _TABLES:
            tables = size  # a second name of the same table takes nothing more
        elif found is not None:
            index = int(target[len(found) :].split(".")[0])
            lists[found][index] = lists[found][index] + size
        else:
            rest = rest + size
    blocks, vace, faces = (tuple(sizes) for sizes in lists.values())
    return StoredSizes(blocks, rest, tables, largest, vace, faces)


def _size_of(
    kind: str, target: str, info: TensorInfo, stored: Storage | None,
    own: Mapping[str, TensorInfo], parts: int,
) -> StoredSize:  # fmt: skip
    # A part of a fused tensor becomes plain numbers.
    if stays_stored(kind, target, stored) and parts == 1:
        assert stored is not None
        scales = own[stored.scale].numel if stored.scale else 0
        # float32, or a byte for each block; one number for a whole weight is not counted.
        scales = scales if stored.per == "block" else 4 * scales if stored.per == "row" else 0
        return StoredSize(kept=info.nbytes + scales, scales=scales)
    numbers = info.numel // parts
    if stays_wide(kind, target):
        return StoredSize(wide=numbers)
    matrix = stored is None and len(info.shape) == 2 and target.endswith(".weight")
    if matrix and info.dtype in _HALF:
        return StoredSize(half=numbers)
    return StoredSize(plain=numbers)
