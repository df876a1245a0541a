"""The kinds of storage a weight can have; how those of a file are named and ranked. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

FLOATS: Final = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""Dtypes of plain numbers in a header, and what they are called."""
GGUF_TYPES: Final = frozenset(
    (
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    )
)  # fmt: skip
"""GGUF tensor types that diffusers 0.42 can dequantise (``quantizers/gguf/utils.py``)."""
KINDS: Final = (
    "fp32", "bf16", "fp16",
    "Q8_0", "int8_convrot", "int8", "Q6_K", "mxfp8", "fp8_scaled", "fp8", "Q5_1", "Q5_K", "Q5_0",
    "fp8_e5m2", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS", "Q4_0", "nvfp4", "Q3_K", "Q2_K",
)  # fmt: skip
"""Every kind of storage that can be loaded (``WeightKind.kind``), those first that keep the most of
a weight. Plain numbers stand in the order of publication: what was trained in bf16 loses in fp16
what is beyond its range. Of the others those with the smaller error on normally distributed
weights come first; GGUF's K types, which are fitted, by their bits."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How one weight is stored that is not plain fp32, fp16 or bf16."""

    kind: str
    """"fp8", "int8", "nvfp4", "mxfp8" or "gguf"."""
    dtype: str
    """What the bytes are: F8_E4M3, F8_E5M2, I8, U8 (two nvfp4 codes) or a GGUF type."""
    shape: tuple[int, ...]
    """The weight's own shape, whatever the stored tensor's: (out, in) of a linear layer."""
    scale: str = ""
    """Name of the tensor of scales, without the part's prefix; "" where there is none."""
    second_scale: str = ""
    per: str = ""
    """What has a scale of its own: "tensor", "row", "block" or "" (nothing)."""
    group: int = 0
    """Columns that were rotated together (convrot), 0 where the weight is not rotated."""
    by_rows: bool = True
    """Whether rows can be taken apart alone; False where a GGUF block runs across rows."""
    full_precision: bool = False
    """Whether its note forbids products in 8 bit with it (``full_precision_matrix_mult``)."""

    @property
    def title(self) -> str:
        """Return what a person calls it: "fp8 scaled per tensor", "GGUF Q4_K"."""
        if self.kind == "gguf":
            return f"GGUF {self.dtype}"
        name = "fp8 e5m2" if self.dtype == "F8_E5M2" and self.kind == "fp8" else self.kind
        rotated = f", rotated by {self.group}" if self.group else ""
        return f"{name} scaled per {self.per}{rotated}" if self.per else name


@dataclass(frozen=True, slots=True)
class WeightKind:
    """How the weights of a file are stored.

    ``why_not`` says why they cannot be loaded, empty when they can. ``weights`` has every weight
    that is not plain floating point, by its name without the part's prefix.
    """

    name: str
    """"fp32", "bf16", "fp16", "fp8", "fp8_e5m2", "fp8_scaled", "int8", "int8_convrot", "nvfp4",
    "mxfp8", "gguf", or the name of a kind that cannot be loaded."""
    why_not: str = ""
    warnings: tuple[str, ...] = ()
    weights: Mapping[str, Storage] = field(default_factory=dict)
    title: str = ""
    """What most of the bytes are, in words: "fp8 scaled per row", "GGUF Q4_K"."""

    @property
    def kind(self) -> str:
        """Return the name in ``KINDS``: that of a GGUF file is the type of most of its bytes."""
        kind = self.title.removeprefix("GGUF ") if self.name == "gguf" else self.name
        return FLOATS.get(kind, kind)

    @property
    def rank(self) -> int:
        """Return the place in ``KINDS``, the most precise first; behind all where unknown."""
        return KINDS.index(self.kind) if self.kind in KINDS else len(KINDS)
