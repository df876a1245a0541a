"""How many parameters each part of a Wan model has, and the bytes they take in a given dtype.

Transformers are counted from their shape, which is exact and works for every storage format;
other parts from their file's header, or from the published sizes where no file is given.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from .architecture import ModelArchitecture
from .variants import TransformerShape

BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
PARTS = ("transformer", "transformer_2", "text_encoder", "vae", "image_encoder")
"""The parts that hold weights, by the name they have in a diffusers folder."""

# umT5-xxl encoder, Wan VAE 2.1 and 2.2, CLIP ViT-H/14 vision: counted on the real classes.
_TEXT_ENCODER = 5_680_910_336
_VAE_21, _VAE_22 = 126_892_531, 704_688_668
_IMAGE_ENCODER = 630_766_080
_EMBEDDING = 256_384 * 4096
MAP_FROM = 2 * 2**30
"""Bytes from which a component stays mapped to its file where its dtype allows: it is read four
times faster and its pages can leave RAM. Smaller ones are copied, their files may be replaced."""
_UMT5 = {"d_model": 4096, "d_ff": 10_240, "num_heads": 64, "d_kv": 64}
"""umT5-xxl's numbers, by their names in its config.json."""

_PLAIN = ("fp32", "fp16", "bf16")
_ATTENTION_SIDES = 4  # q, k, v, out


@lru_cache(maxsize=64)
def block_parameters(shape: TransformerShape) -> tuple[int, int]:
    """Return (all, kept in fp32) of one transformer block."""
    d, ffn = shape.dim, shape.ffn_dim
    attention = _ATTENTION_SIDES * (d * d + d) + 2 * d
    image = 2 * (shape.added_kv_dim * d + d) + d if shape.added_kv_dim else 0
    feed_forward = 2 * d * ffn + ffn + d
    kept = 2 * d + 6 * d  # norm2 and the scale-shift table
    return 2 * attention + image + feed_forward + kept, kept


@lru_cache(maxsize=64)
def rest_parameters(shape: TransformerShape) -> tuple[int, int]:
    """Return (all, kept in fp32) of what a transformer has outside its blocks."""
    d = shape.dim
    patch = shape.patch_size[0] * shape.patch_size[1] * shape.patch_size[2]
    time = shape.freq_dim * d + d + d * d + d
    total = shape.in_channels * patch * d + d + time + 6 * d * d + 6 * d
    total += shape.text_dim * d + d + d * d + d
    total += d * patch * shape.out_channels + patch * shape.out_channels + 2 * d
    kept = time + 2 * d
    if shape.image_dim:
        wide = shape.image_dim
        norms = 2 * wide + 2 * d
        total += norms + wide * wide + wide + wide * d + d
        total += (shape.pos_embed_seq_len or 0) * wide
        kept += norms
    return total, kept


def transformer_parameters(shape: TransformerShape) -> int:
    """Return the number of parameters of a whole transformer."""
    return shape.layers * block_parameters(shape)[0] + rest_parameters(shape)[0]


def block_bytes(shape: TransformerShape, dtype: str, *, fp8: bool = False) -> int:
    """Return the bytes of one block; with ``fp8`` its matrices are stored in one byte each."""
    total, kept = block_parameters(shape)
    return _mixed(total, kept, BYTES["fp8"] if fp8 else BYTES[dtype])


def rest_bytes(shape: TransformerShape, dtype: str) -> int:
    """Return the bytes of what is not in the blocks."""
    return _mixed(*rest_parameters(shape), BYTES[dtype])


def _mixed(total: int, kept: int, size: int) -> int:
    return (total - kept) * size + kept * 4


def part_parameters(architecture: ModelArchitecture, name: str) -> int:
    """Return the number of parameters of a part; the usual one's where its file is not given."""
    part = architecture.components.get(name)
    if name in ("transformer", "transformer_2"):
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
    vae = architecture.vae or architecture.variant.vae
    return _VAE_22 if vae.is_residual else _VAE_21


def part_bytes(architecture: ModelArchitecture, name: str, dtype: str, *, fp8: bool = False) -> int:
    """Return the bytes of a part in memory, what stays in fp32 included.

    ``fp8`` stores the transformer blocks' matrices in one byte per number.
    """
    total = part_parameters(architecture, name)
    if name not in ("transformer", "transformer_2"):
        return total * BYTES[dtype]
    shape = architecture.transformer
    kept = shape.layers * block_parameters(shape)[1] + rest_parameters(shape)[1]
    nbytes = _mixed(total, kept, BYTES[dtype])
    if fp8:
        saved = block_bytes(shape, dtype) - block_bytes(shape, dtype, fp8=True)
        nbytes -= shape.layers * saved
    return nbytes


def stays_in_file(architecture: ModelArchitecture, name: str, dtype: str) -> bool:
    """Say whether a part's weights are used as they lie in the file, mapped into memory.

    The system may then drop their pages and read them again: RAM may be smaller than the part.
    """
    part = architecture.components.get(name)
    if part is None or part.nbytes < MAP_FROM:
        return False
    return part.format == "safetensors" and part.weight_kind == dtype


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
    """Return the bytes of the largest single layer of a part: what leaf-wise offload holds."""
    size = BYTES[dtype]
    if name in ("transformer", "transformer_2"):
        shape = architecture.transformer
        return max(shape.dim * shape.ffn_dim, 6 * shape.dim**2) * size
    if name == "text_encoder":
        part = architecture.components.get(name)
        config = part.config if part is not None else {}
        rows, width = config.get("vocab_size"), config.get("d_model")
        known = isinstance(rows, int) and isinstance(width, int)
        return (rows * width if known else _EMBEDDING) * size  # type: ignore[operator]
    if name == "vae":
        vae = architecture.vae or architecture.variant.vae
        widest = max(vae.dim_mult) * max(vae.base_dim, vae.decoder_base_dim)
        return widest**2 * 27 * size
    return min(part_parameters(architecture, name), 5120 * 1280) * size


def parts_of(architecture: ModelArchitecture) -> tuple[str, ...]:
    """Return the parts a run of this model needs, assumed ones included, in order of use."""
    names = ["text_encoder"]
    if architecture.transformer.image_dim is not None:
        names.append("image_encoder")
    names += ["transformer"]
    if architecture.two_experts:
        names.append("transformer_2")
    return (*names, "vae")


def assumed_parts(architecture: ModelArchitecture) -> tuple[str, ...]:
    """Return the needed parts that no file was given for."""
    return tuple(name for name in parts_of(architecture) if name not in architecture.components)
