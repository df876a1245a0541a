"""Model files read as tensor tables: which tensors they hold, at which bytes, in which dtype.

In: a path (.safetensors, .gguf, a torch .pth or .bin zip file, a sharded index, a folder). Out: a
``TensorTable``, and how its weights are stored (full precision, fp8, GGUF types). Memory and time
are bounded whatever a file claims, and nothing in a file is executed. Imports the standard library
and the ground floor (``errors``, ``config``, ``files``) only.
"""

from __future__ import annotations

from .index import listing
from .open import read_table
from .small_json import read_json
from .storage import (
    GGUF_TYPES,
    QUANT_SUFFIXES,
    Storage,
    WeightKind,
    logical_shape,
    read_weight_kind,
    split_companions,
)
from .table import TensorInfo, TensorTable

__all__ = [
    "GGUF_TYPES",
    "QUANT_SUFFIXES",
    "Storage",
    "TensorInfo",
    "TensorTable",
    "WeightKind",
    "listing",
    "logical_shape",
    "read_json",
    "read_table",
    "read_weight_kind",
    "split_companions",
]
