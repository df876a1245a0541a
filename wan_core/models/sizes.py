"""How many parameters each component of a Wan model has, and the bytes they take in a dtype.

Transformers are counted from their shape, which is exact for every storage format. Other components
are counted from their file's header, or by the published sizes where no file is given. Standard
library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import TypeVar

from .architecture import TRANSFORMERS, ModelArchitecture
from .shapes import control_tensors, transformer_tensors
from .stored import StoredSizes, cast_at_use, stays_wide
from .variants import TransformerShape

BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}

# Parameters of the umT5-xxl encoder, the Wan VAEs 2.1 and 2.2 and the CLIP ViT-H/14 vision model,
# counted on instances of the real classes.
_TEXT_ENCODER = 5_680_910_336
_VAE_21, _VAE_22 = 126_892_531, 704_688_668
_IMAGE_ENCODER = 630_766_080
VOCABULARY = 256_384
"""Rows of umT5's embedding: its tokens, and 84 to a round number."""
_EMBEDDING = VOCABULARY * 4096
MAP_FROM = 2 * 2**30
"""Components of at least so many bytes stay memory-mapped to their file if their dtype needs no
conversion: they load four times faster, and the system can drop their pages from RAM. Smaller ones
are copied, so that their files may be replaced meanwhile."""
_UMT5 = {"d_model": 4096, "d_ff": 10_240, "num_heads": 64, "d_kv": 64}
"""umT5-xxl's sizes, by their names in its config.json."""
_UMT5_BLOCKS = 24

_PLAIN = ("fp32", "fp16", "bf16")
_HEADER = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_STREAMED = ("transformer", "text_encoder")
"""Components whose matrices may stay as stored, and whose blocks can be streamed."""
_REPEATED = ("blocks.", "vace_blocks.", "face_adapter.")
"""Parts of a transformer that there are several of."""


Count = tuple[int, int]
"""Parameters: (all of them, those that stay in fp32)."""


@lru_cache(maxsize=64)
def _counts(shape: TransformerShape) -> dict[str, Count]:
    """Return the parameters of one block ("blocks.0"), of each VACE block, of each face adapter,
    and of what is outside of all of these ("")."""
    counts: dict[str, Count] = {}
    for name, size in transformer_tensors(replace(shape, layers=1), "diffusers").items():
        part = ".".join(name.split(".")[:2]) if name.startswith(_REPEATED) else ""
        total, kept = counts.get(part, (0, 0))
        numbers = prod(size)
        wide = stays_wide("transformer", name)
        counts[part] = total + numbers, kept + numbers * wide
    return counts


def block_parameters(shape: TransformerShape) -> Count:
    """Return one transformer block's parameters."""
    return _counts(shape)["blocks.0"]


def vace_block_parameters(shape: TransformerShape) -> tuple[Count, ...]:
    """Return the parameters of each VACE block."""
    return _each(shape, "vace_blocks")


def _each(shape: TransformerShape, kind: str) -> tuple[Count, ...]:
    return tuple(count for part, count in _counts(shape).items() if part.startswith(kind))


def block_count(shape: TransformerShape) -> int:
    """Return how many blocks compute in one forward, VACE's included."""
    return shape.layers + len(shape.vace_layers)


T = TypeVar("T")


def in_order(
    shape: TransformerShape, blocks: Sequence[T], vace: Sequence[T] = (), faces: Sequence[T] = ()
) -> list[T]:
    """Return what is given of each block in the order in which the blocks compute.

    A VACE block computes just before the block that its hint is added to, a face adapter just after
    the block whose output it reads.
    """
    hints = dict(zip(sorted(shape.vace_layers), vace, strict=False))
    adapters = {index * shape.face_every: one for index, one in enumerate(faces)}
    order: list[T] = []
    for index, block in enumerate(blocks):
        order += [hints[index]] if index in hints else []
        order.append(block)
        order += [adapters[index]] if index in adapters else []
    return order


def rest_parameters(shape: TransformerShape) -> Count:
    """Return the parameters outside the blocks."""
    return _counts(shape)[""]


def fun_parameters(shape: TransformerShape) -> int:
    """Return the parameters of the Fun models' layers for a reference and a camera."""
    return sum(map(prod, control_tensors(shape).values()))


def transformer_parameters(shape: TransformerShape) -> int:
    """Return the number of parameters of a whole transformer."""
    beside = sum(total for part, (total, _) in _counts(shape).items() if part != "blocks.0")
    return shape.layers * block_parameters(shape)[0] + beside


def stored_of(architecture: ModelArchitecture, name: str) -> StoredSizes | None:
    """Return the sizes read from a component's header; None where no file was given."""
    part = architecture.components.get(name)
    return None if part is None else part.stored


def block_bytes(
    architecture: ModelArchitecture, name: str, dtype: str, *, fp8: bool = False
) -> int:
    """Return the bytes of a component's largest block as it lies in memory; see ``all_blocks``."""
    return max(all_blocks(architecture, name, dtype, fp8=fp8))


def all_blocks(
    architecture: ModelArchitecture, name: str, dtype: str, *, fp8: bool = False
) -> tuple[int, ...]:
    """Return the bytes of each of a component's blocks, in the order in which they compute.

    ``fp8`` stores the matrices of a transformer's blocks in one byte per number, where the file
    has not stored them so already.
    """
    stored, shape = stored_of(architecture, name), architecture.transformer
    if stored is not None and stored.blocks and (stored.quantised or not fp8):
        own, vace, faces = (
            [block.nbytes(BYTES[dtype]) for block in blocks]
            for blocks in (stored.blocks, stored.vace, stored.faces)
        )
        return tuple(in_order(shape, own, vace, faces) if vace or faces else own)
    if name == "text_encoder":
        return (text_block_bytes(architecture, dtype),) * _UMT5_BLOCKS
    size = BYTES["fp8"] if fp8 else BYTES[dtype]
    base = [_mixed(*block_parameters(shape), size)] * shape.layers
    vace = [_mixed(*numbers, size) for numbers in vace_block_parameters(shape)]
    adapters = [total * size for total, _ in _each(shape, "face_adapter")]
    return tuple(in_order(shape, base, vace, adapters))


def rest_bytes(architecture: ModelArchitecture, name: str, dtype: str) -> int:
    """Return the bytes of what is on the device beside a transformer's blocks."""
    stored = stored_of(architecture, name)
    if stored is not None:
        return stored.rest.nbytes(BYTES[dtype])
    return _mixed(*rest_parameters(architecture.transformer), BYTES[dtype])


def unpacked_bytes(architecture: ModelArchitecture, name: str, dtype: str, *, fp8: bool) -> int:
    """Return the bytes of the largest matrix that is taken apart for the time of one product."""
    stored = stored_of(architecture, name)
    if stored is not None and stored.quantised:
        return stored.largest * BYTES[dtype]
    part = architecture.components.get(name)
    cast = part is not None and cast_at_use(_HEADER.get(part.weight_kind, ""), _HEADER[dtype])
    if not (cast or (fp8 and name != "text_encoder")):
        return 0
    if name == "text_encoder":
        return _UMT5["d_model"] * _UMT5["d_ff"] * BYTES[dtype]
    return architecture.transformer.dim * architecture.transformer.ffn_dim * BYTES[dtype]


def _mixed(total: int, kept: int, size: int) -> int:
    return (total - kept) * size + kept * 4


def part_parameters(architecture: ModelArchitecture, name: str) -> int:
    """Return a component's number of parameters; the published number where it has no file."""
    part = architecture.components.get(name)
    if name in TRANSFORMERS:
        counted = transformer_parameters(architecture.transformer)
        if part is not None and part.weight_kind in _PLAIN and part.parameters:
            return part.parameters
        return counted
    if part is not None and part.parameters:
        return part.parameters
    if name == "text_encoder":
        return _TEXT_ENCODER
    if name == "image_encoder":
        return _IMAGE_ENCODER
    vae = architecture.vae_shape
    return _VAE_22 if vae.is_residual else _VAE_21


def part_bytes(architecture: ModelArchitecture, name: str, dtype: str, *, fp8: bool = False) -> int:
    """Return the bytes of a component in memory, as stored where it stays so, fp32 included.

    ``fp8`` stores the matrices of a transformer's blocks in one byte per number, where the file
    has not stored them so already.
    """
    stored = stored_of(architecture, name)
    if stored is not None and (stored.quantised or not fp8):
        return stored.whole.nbytes(BYTES[dtype])
    total = part_parameters(architecture, name)
    if name not in TRANSFORMERS:
        return total * BYTES[dtype]
    shape = architecture.transformer
    kept = block_count(shape) * block_parameters(shape)[1] + rest_parameters(shape)[1]
    nbytes = _mixed(total, kept, BYTES[dtype])
    if fp8:
        nbytes -= sum(all_blocks(architecture, name, dtype))
        nbytes += sum(all_blocks(architecture, name, dtype, fp8=True))
    return nbytes


def stays_in_file(
    architecture: ModelArchitecture, name: str, dtype: str, *, on_cpu: bool = False
) -> bool:
    """Say whether a component's weights are used as they lie in the file, mapped into memory.

    The system may then drop their pages and read them again: RAM may be smaller than the part.
    On a CPU only what is taken apart at each use may be mapped: its kernels round by alignment,
    which a file does not keep.
    """
    part = architecture.components.get(name)
    if part is None or part.nbytes < MAP_FROM or part.kind.removesuffix("_2") not in _STREAMED:
        return False
    if part.stored is not None and part.stored.quantised:
        return True
    stored = _HEADER.get(part.weight_kind, "")
    same = stored == _HEADER[dtype] or cast_at_use(stored, _HEADER[dtype])
    return same and not on_cpu


def converted_bytes(
    architecture: ModelArchitecture, name: str, dtype: str, *, on_cpu: bool = False
) -> int:
    """Return the bytes of a mapped component that lie in RAM all the same.

    They are converted, put in order, or (``on_cpu``) copied to where a CPU's kernels want them.
    """
    stored = stored_of(architecture, name)
    if stored is None:
        return 0
    whole = stored.whole
    half = 0 if BYTES[dtype] == 2 and not on_cpu else whole.half * BYTES[dtype]
    if stored.quantised:
        return whole.plain * BYTES[dtype] + whole.wide * 4 + whole.scales + half
    return whole.wide * 4 + half


def ram_bytes(
    architecture: ModelArchitecture, name: str, dtype: str, *, fp8: bool = False,
    on_cpu: bool = False,
) -> int:  # fmt: skip
    """Return the bytes of RAM that a loaded component takes from others.

    The pages of a mapped file do not count: the system takes them back when it needs memory.
    """
    if not fp8 and stays_in_file(architecture, name, dtype, on_cpu=on_cpu):
        return converted_bytes(architecture, name, dtype, on_cpu=on_cpu)
    return part_bytes(architecture, name, dtype, fp8=fp8)


def text_block_bytes(architecture: ModelArchitecture, dtype: str) -> int:
    """Return the bytes of one block of the umT5 encoder, which streams like a transformer's."""
    part = architecture.components.get("text_encoder")
    config = part.config if part is not None else {}
    numbers = {name: int(config.get(name, usual)) for name, usual in _UMT5.items()}
    width, inner, heads, head = numbers.values()
    # q, k, v, o; the gated feed-forward's three; two norms and the table of relative positions
    block = 4 * width * heads * head + 3 * width * inner + 2 * width + 32 * heads
    return block * BYTES[dtype]


def largest_leaf_bytes(architecture: ModelArchitecture, name: str, dtype: str) -> int:
    """Return the bytes of a component's largest layer: what leaf-wise offload holds at once."""
    size = BYTES[dtype]
    stored = stored_of(architecture, name)
    if stored is not None and stored.quantised:
        # The bytes arrive as stored and are taken apart beside them.
        block = block_bytes(architecture, name, dtype)
        return min(block, stored.largest * size)
    if name in TRANSFORMERS:
        shape = architecture.transformer
        return max(shape.dim * shape.ffn_dim, 6 * shape.dim**2) * size
    if name == "text_encoder":
        part = architecture.components.get(name)
        config = part.config if part is not None else {}
        rows, width = config.get("vocab_size"), config.get("d_model")
        known = isinstance(rows, int) and isinstance(width, int)
        return (rows * width if known else _EMBEDDING) * size  # type: ignore[operator]
    if name == "vae":
        vae = architecture.vae_shape
        widest = max(vae.dim_mult) * max(vae.base_dim, vae.decoder_base_dim)
        return widest**2 * 27 * size
    return min(part_parameters(architecture, name), 5120 * 1280) * size


def parts_of(architecture: ModelArchitecture) -> tuple[str, ...]:
    """Return the components that a render needs, in order of use, also those without a file."""
    names = ["text_encoder"]
    if architecture.transformer.image_dim is not None:
        names.append("image_encoder")
    names += ["transformer"]
    if architecture.two_experts:
        names.append("transformer_2")
    return (*names, "vae")


def experts_of(architecture: ModelArchitecture) -> tuple[str, ...]:
    """Return the model's transformers, the high-noise one first."""
    return TRANSFORMERS if architecture.two_experts else TRANSFORMERS[:1]


def assumed_parts(architecture: ModelArchitecture) -> tuple[str, ...]:
    """Return the needed components that no file was given for."""
    return tuple(name for name in parts_of(architecture) if name not in architecture.components)
