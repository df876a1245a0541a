"""Model files read as tensor tables: which tensors they hold, at which bytes, in which dtype.

In: a path (.safetensors, .gguf, a torch .pth or .bin zip file, a sharded index, a folder). Out: a
``TensorTable``, how its weights are stored (full precision, fp8, GGUF types), and the tokenizer
that a GGUF text encoder carries. Memory and time are bounded whatever a file claims, and nothing in
a file is executed. Imports the standard library and the ground floor (``errors``, ``config``,
``files``) only.
"""

from __future__ import annotations

from .charsmap import charsmap_problem
from .gguf_tokenizer import SentencePieceModel, has_gguf_tokenizer, read_gguf_tokenizer
from .index import listing
from .kinds import GGUF_TYPES, KINDS, Storage, WeightKind
from .open import read_small, read_table, refuse_holes
from .small_json import read_json
from .storage import QUANT_SUFFIXES, logical_shape, read_weight_kind, split_companions
from .table import TensorInfo, TensorTable

__all__ = [
    "GGUF_TYPES",
    "KINDS",
    "QUANT_SUFFIXES",
    "SentencePieceModel",
    "Storage",
    "TensorInfo",
    "TensorTable",
    "WeightKind",
    "charsmap_problem",
    "has_gguf_tokenizer",
    "listing",
    "logical_shape",
    "read_gguf_tokenizer",
    "read_json",
    "read_small",
    "read_table",
    "read_weight_kind",
    "refuse_holes",
    "split_companions",
]
