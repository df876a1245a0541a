"""What Wan is: its variants and their official settings, shapes, tensor names and sizes.

In: the names and shapes of a tensor table. Out: shapes (``TransformerShape``, ``VaeShape``), names
as diffusers' modules have them (``map_names``), the ``ModelArchitecture`` that detection fills in,
and bytes per component. Only data and arithmetic; imports the ground floor and ``formats``.
"""

from __future__ import annotations

from .architecture import Component, FoundLora, ModelArchitecture
from .names import Mapped, Source, map_names
from .recipes import recipe_of
from .shapes import count_blocks, read_transformer, read_vae, transformer_tensors
from .sizes import (
    BYTES,
    MAP_FROM,
    PARTS,
    assumed_parts,
    block_bytes,
    block_parameters,
    converted_bytes,
    experts_of,
    largest_leaf_bytes,
    part_bytes,
    parts_of,
    ram_bytes,
    rest_bytes,
    stays_in_file,
    stored_of,
    unpacked_bytes,
)
from .stored import StoredSize, StoredSizes, cast_at_use, stays_stored, stored_sizes
from .variants import (
    IMAGE_TOKENS,
    TEXT_TOKENS,
    VAE_21,
    VAE_22,
    VARIANTS,
    TransformerShape,
    VaeShape,
    Variant,
)

__all__ = [
    "BYTES",
    "Component",
    "FoundLora",
    "IMAGE_TOKENS",
    "MAP_FROM",
    "Mapped",
    "ModelArchitecture",
    "PARTS",
    "Source",
    "StoredSize",
    "StoredSizes",
    "TEXT_TOKENS",
    "TransformerShape",
    "VAE_21",
    "VAE_22",
    "VARIANTS",
    "VaeShape",
    "Variant",
    "assumed_parts",
    "block_bytes",
    "block_parameters",
    "cast_at_use",
    "converted_bytes",
    "count_blocks",
    "experts_of",
    "largest_leaf_bytes",
    "map_names",
    "part_bytes",
    "parts_of",
    "ram_bytes",
    "read_transformer",
    "read_vae",
    "recipe_of",
    "rest_bytes",
    "stays_in_file",
    "stays_stored",
    "stored_of",
    "stored_sizes",
    "transformer_tensors",
    "unpacked_bytes",
]
