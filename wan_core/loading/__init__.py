"""From bytes to modules: one component of a model, checked, read, and shared through a cache.

In: a path and a dtype. Out: diffusers' and transformers' modules with exactly the file's weights,
tokenizers, and schedulers' configurations. Also here, because loading decides it first: where a
module's memory lies (``move``, page-locked slabs). Imports ``formats``, ``models``, ``detect`` and
``memory``. Names are resolved on first use, so that torch is not imported with the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .cache import ComponentCache, ComponentKey, component_cache, component_key
    from .component import attends_as_torch, check_component, load_component
    from .dequantize import rotation
    from .download import fetch, plan_download
    from .dtypes import dtype_of, keep_in_fp32, stays_fp32
    from .mapped import first_look, is_mapped, read_again, to_look_at
    from .moving import Undo, device_of, give_back_freed, move, remember
    from .page_lock import Slab, all_pinned_bytes, lock_within, pin_block, room_to_pin, unpin
    from .quantized import StoredWeight, stored_weight
    from .reader import TensorReader
    from .tokenizer import (
        check_tokenizer,
        load_image_processor,
        load_scheduler_config,
        load_tokenizer,
    )

__getattr__ = lazy_names(
    __name__,
    {
        "cache": ("ComponentCache", "ComponentKey", "component_cache", "component_key"),
        "component": ("attends_as_torch", "check_component", "load_component"),
        "download": ("fetch", "plan_download"),
        "dequantize": ("rotation",),
        "dtypes": ("dtype_of", "keep_in_fp32", "stays_fp32"),
        "mapped": ("first_look", "is_mapped", "read_again", "to_look_at"),
        "moving": ("Undo", "device_of", "give_back_freed", "move", "remember"),
        "page_lock": (
            "Slab",
            "all_pinned_bytes",
            "lock_within",
            "pin_block",
            "room_to_pin",
            "unpin",
        ),
        "quantized": ("StoredWeight", "stored_weight"),
        "reader": ("TensorReader",),
        "tokenizer": (
            "check_tokenizer",
            "load_image_processor",
            "load_scheduler_config",
            "load_tokenizer",
        ),
    },  # fmt: skip
)

__all__ = [
    "ComponentCache",
    "ComponentKey",
    "Slab",
    "StoredWeight",
    "TensorReader",
    "Undo",
    "all_pinned_bytes",
    "attends_as_torch",
    "check_component",
    "check_tokenizer",
    "component_cache",
    "component_key",
    "device_of",
    "dtype_of",
    "fetch",
    "first_look",
    "give_back_freed",
    "is_mapped",
    "keep_in_fp32",
    "load_component",
    "load_image_processor",
    "load_scheduler_config",
    "load_tokenizer",
    "lock_within",
    "move",
    "pin_block",
    "plan_download",
    "read_again",
    "remember",
    "room_to_pin",
    "rotation",
    "stays_fp32",
    "stored_weight",
    "to_look_at",
    "unpin",
]
