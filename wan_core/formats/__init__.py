"""Model files read as tensor tables: what is in them, where it lies and how it is stored.

In: a path (.safetensors, .gguf, a torch .pth or .bin zip file, a sharded index, a folder). Out: a
``TensorTable``, and the kind of its weights (fp8, int8, GGUF types). Bounded in memory and time
whatever the file says; nothing in a file is run. Imports the ground floor and the standard
library only.
"""

from __future__ import annotations

from .index import listing
from .open import read_table
from .small_json import read_json
from .table import TensorInfo, TensorTable
from .weight_kind import GGUF_TYPES, QUANT_SUFFIXES, WeightKind, read_weight_kind

__all__ = [
    "GGUF_TYPES",
    "QUANT_SUFFIXES",
    "TensorInfo",
    "TensorTable",
    "WeightKind",
    "listing",
    "read_json",
    "read_table",
    "read_weight_kind",
]
