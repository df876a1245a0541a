"""What a file or folder is: tensor tables become a ``ModelArchitecture``, with reasons.

In: a path or a ``WanModelFiles``. Out: the variant, every component with its file, what was
inferred and why. LoRA files are read and checked here too. Only headers and configs are read.
Imports ``formats`` and ``models``.
"""

from __future__ import annotations

from .companions import find_companions
from .configs import read_config
from .detector import ArchitectureDetector, inspect_file
from .folders import index_of, is_release
from .identified import IdentifiedFile, identify
from .lora_files import lora_list, parse_lora, with_loras
from .lora_names import read_patches
from .lora_patches import HADAMARD, KRONECKER, LYCORIS_MAGNITUDE, MAGNITUDES, Patch
from .pairing import join_vace

__all__ = [
    "ArchitectureDetector",
    "IdentifiedFile",
    "HADAMARD",
    "KRONECKER",
    "LYCORIS_MAGNITUDE",
    "MAGNITUDES",
    "Patch",
    "find_companions",
    "identify",
    "index_of",
    "inspect_file",
    "is_release",
    "join_vace",
    "lora_list",
    "parse_lora",
    "read_config",
    "read_patches",
    "with_loras",
]
