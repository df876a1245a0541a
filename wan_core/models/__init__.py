"""What Wan is: its variants and their official settings, shapes, tensor names and sizes.

In: the names and shapes of a tensor table. Out: shapes (``TransformerShape``, ``VaeShape``), names
as diffusers' modules have them (``map_names``), the ``ModelArchitecture`` that detection fills in,
and bytes per component. Also the tables that naming and reading share: layouts of components, what
may be left over in a file, how LoRAs and experts are called. Only data and arithmetic; imports the
ground floor and ``formats``.
"""

from __future__ import annotations

from .architecture import Component, FoundLora, ModelArchitecture
from .labels import Role, differ_in_h_and_l, name_stem, role_of, without_role, words_of
from .layouts import LAYOUTS, Layout, find_layouts, nests_blocks, own_names, tokenizer_tensor
from .leftovers import TAG, Leftover, find_leftovers, left_in_lora
from .lora_keys import (
    NEEDS,
    flat_stem,
    foreign_part,
    is_lora,
    is_wan_linear,
    names_both_experts,
    read_lora_key,
    spellings,
)
from .magcache import MagCurve, Skips, computed, magcache_curve, magcache_plan, magcache_skips
from .names import Mapped, Source, map_names
from .recipes import Recipe, few_steps_hint, recipe_of
from .shapes import UNSHUFFLED, count_blocks, read_transformer, read_vae, transformer_tensors
from .sizes import (
    BYTES,
    MAP_FROM,
    PARTS,
    all_blocks,
    assumed_parts,
    block_bytes,
    block_count,
    block_parameters,
    converted_bytes,
    experts_of,
    fun_parameters,
    largest_leaf_bytes,
    part_bytes,
    parts_of,
    ram_bytes,
    rest_bytes,
    stays_in_file,
    stored_of,
    unpacked_bytes,
    vace_block_parameters,
)
from .stored import StoredSize, StoredSizes, cast_at_use, stays_stored, stored_sizes
from .variants import (
    IMAGE_TOKENS,
    TEXT_TOKENS,
    VAE_21,
    VAE_22,
    VARIANTS,
    Defaults,
    TransformerShape,
    VaeShape,
    Variant,
)

__all__ = [
    "BYTES",
    "Component",
    "Defaults",
    "FoundLora",
    "IMAGE_TOKENS",
    "LAYOUTS",
    "Layout",
    "Leftover",
    "MAP_FROM",
    "MagCurve",
    "Mapped",
    "ModelArchitecture",
    "NEEDS",
    "PARTS",
    "Recipe",
    "Role",
    "Skips",
    "Source",
    "StoredSize",
    "StoredSizes",
    "TAG",
    "TEXT_TOKENS",
    "TransformerShape",
    "UNSHUFFLED",
    "VAE_21",
    "VAE_22",
    "VARIANTS",
    "VaeShape",
    "Variant",
    "all_blocks",
    "assumed_parts",
    "block_bytes",
    "block_count",
    "block_parameters",
    "cast_at_use",
    "computed",
    "converted_bytes",
    "count_blocks",
    "differ_in_h_and_l",
    "experts_of",
    "few_steps_hint",
    "find_layouts",
    "find_leftovers",
    "flat_stem",
    "foreign_part",
    "fun_parameters",
    "is_lora",
    "is_wan_linear",
    "largest_leaf_bytes",
    "left_in_lora",
    "magcache_curve",
    "magcache_plan",
    "magcache_skips",
    "map_names",
    "name_stem",
    "names_both_experts",
    "nests_blocks",
    "own_names",
    "part_bytes",
    "parts_of",
    "ram_bytes",
    "read_lora_key",
    "read_transformer",
    "read_vae",
    "recipe_of",
    "rest_bytes",
    "role_of",
    "spellings",
    "stays_in_file",
    "stays_stored",
    "stored_of",
    "stored_sizes",
    "tokenizer_tensor",
    "transformer_tensors",
    "unpacked_bytes",
    "vace_block_parameters",
    "without_role",
    "words_of",
]
