"""What detection returns: a model's components, its numbers, and the reason for each conclusion.

Small, picklable data; standard library only. It holds paths and sizes, never weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from ..config import WanLoRA
from .recipes import Recipe
from .stored import StoredSizes
from .variants import TransformerShape, VaeShape, Variant

TRANSFORMERS: Final = ("transformer", "transformer_2")
"""A model's transformers: the only or the high-noise one, and the low-noise one."""
PARTS: Final = (*TRANSFORMERS, "vae", "text_encoder", "image_encoder")
"""The components that hold weights, by the name they have in a diffusers folder."""
LORA_TOKENS: Final = 1024
"""Tokens that LoKr's two products are made of at once: what lies between them is as wide again."""
LORA_ROWS: Final = 128
"""Rows of a weight, or of its difference, that are made at once in float32 for a LoHa."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One component of a model on disk: where it is, and what its header and config say."""

    kind: str
    """transformer, vae, text_encoder, image_encoder, tokenizer, scheduler or image_processor."""
    path: Path
    """The folder, or the single file, that was named."""
    files: tuple[Path, ...] = ()
    """Files that hold its weights (all shards), in order."""
    nbytes: int = 0
    """Bytes of its tensors as stored."""
    parameters: int = 0
    """Number of stored elements, scales and tables included."""
    dtypes: Mapping[str, int] = field(default_factory=dict)
    """Bytes stored per dtype name, largest first."""
    layout: str = "diffusers"
    """Style of the tensor names: diffusers (also for names of the transformers library), original
    (Wan's own repositories), comfyui (original under a prefix) or gguf (llama.cpp's umT5)."""
    prefix: str = ""
    """The text before every tensor name of this component in the file."""
    weight_kind: str = ""
    """fp32, bf16, fp16, fp8, fp8_scaled, gguf …; empty for a component without weights."""
    stored_as: str = ""
    """The same in words: "fp8 scaled per row", "GGUF Q4_K"."""
    format: str = ""
    """safetensors, gguf, pickle, or empty for a component without weights."""
    stored: StoredSizes | None = None
    """What its weights take in memory, of a transformer or text encoder; None for others."""
    file_variant: str | None = None
    """The tag in names like ``model.fp16.safetensors``."""
    vocabulary: int | None = None
    """For a text encoder: the number of tokens it has embeddings for."""
    module: Path | None = None
    """A file that holds more of its weights: the VACE module beside a text-to-video transformer."""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLora:
    """A LoRA whose header was checked: every tensor that is used fits this model."""

    lora: WanLoRA
    parameters: int
    rank: int
    recipe: Recipe | None = None
    """The settings it was distilled for, if its name or metadata say so."""
    few_steps: bool = False
    """Whether it says that it is distilled to few steps: with a recipe, or without a known one."""
    files: tuple[Path, ...] = ()
    """Its file or shards, and the adapter_config.json that states its scale."""
    pairs: int = 0
    """The largest rank of a pair of matrices, also a DoRA's: numbers made of each token at once."""
    pieces: int = 0
    """Numbers that its widest LoKr layer holds for a token while it computes."""
    columns: int = 0
    """Columns of the widest weight of which a LoHa makes rows, or a DoRA measures them."""

    def works_on(self, component: str) -> bool:
        """Whether it changes ``component``: ``transformer`` (the only or the high-noise one) or
        ``transformer_2`` (the low-noise one)."""
        expert = {"transformer": "high", "transformer_2": "low"}.get(component)
        wanted = expert is not None and self.lora.expert in ("both", expert)
        return wanted and self.lora.strength != 0

    def room(self, tokens: int, size: int) -> int:
        """Return the bytes that LoKr, LoHa or measuring for a DoRA hold beside a layer's output.

        ``tokens`` go through the layer, their numbers have ``size`` bytes.
        """
        pieces = min(tokens, LORA_TOKENS) * self.pieces * size
        if not self.columns:
            return pieces
        # Both products in float32, beside them a factor or what they make together.
        rows = self.columns * 4 * (2 * LORA_ROWS + max(LORA_ROWS, self.rank))
        return max(pieces, rows, LORA_ROWS * size * (self.columns + tokens))

    def describe(self) -> str:
        """Say in one line which file it is, its strength, any rank, and the expert it changes."""
        where = "" if self.lora.expert == "both" else f", {self.lora.expert}-noise expert"
        rank = f", rank {self.rank}" if self.rank else ""
        name = Path(self.lora.path).name
        return f"LoRA {name}, strength {self.lora.strength:g}{rank}{where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArchitecture:
    """A detected Wan model: its variant, its actual numbers, its components, and the reasons.

    ``transformer`` and ``vae`` hold the numbers read from the files, ``variant`` the published
    ones. Where the structure fits several variants, ``candidates`` names all of them, the chosen
    one first.
    """

    variant: Variant
    transformer: TransformerShape
    vae: VaeShape | None
    layout: str
    weight_kind: str
    components: Mapping[str, Component]
    root: Path
    custom_size: bool = False
    """True: the family is certain, but no published model has this size."""
    candidates: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    loras: tuple[FoundLora, ...] = ()
    recipe: Recipe | None = None
    """The settings the checkpoint itself was distilled for, if its names say so."""
    incomplete: str = ""
    """What must be added before it can run, as a sentence; empty where nothing must."""

    @property
    def name(self) -> str:
        """Return the variant's name, e.g. ``wan2.2-i2v-a14b``."""
        return self.variant.name

    @property
    def two_experts(self) -> bool:
        """Whether both experts are present."""
        return "transformer_2" in self.components

    @property
    def pipeline_class(self) -> str | None:
        """Name of the diffusers pipeline this architecture runs in by default."""
        return self.variant.pipeline_class

    @property
    def vae_shape(self) -> VaeShape:
        """The VAE's numbers: those of its file, or the published ones where none was given."""
        return self.vae or self.variant.vae

    @property
    def size_multiple(self) -> int:
        """Width and height in pixels must be multiples of this (by the VAE's file, if given)."""
        return self.vae_shape.scale_factor_spatial * self.transformer.patch_size[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(part.nbytes for part in self.components.values())

    def loras_of(self, component: str, *, distilled: bool = True) -> tuple[WanLoRA, ...]:
        """Return the LoRAs that change a component, in the order in which they were given.

        Without ``distilled`` those are left out that are known to be distilled to a few steps.
        """
        return tuple(
            found.lora
            for found in self.loras
            if found.works_on(component) and (distilled or not found.few_steps)
        )

    def recipes(self) -> tuple[tuple[str, Recipe], ...]:
        """Return every distilled file in use, in words, with the settings it was trained for."""
        own = f"The checkpoint {self.root.name}"
        checkpoint = [(own, self.recipe)] if self.recipe is not None else []
        loras = [
            (f"The LoRA {Path(found.lora.path).name}", found.recipe)
            for found in self.loras
            if found.recipe is not None and found.lora.strength
        ]
        return (*checkpoint, *loras)

    def lora_bytes(self, component: str, size: int) -> int:
        """Return the bytes that a component's LoRAs take, at ``size`` bytes per parameter."""
        return sum(found.parameters * size for found in self.loras if found.works_on(component))

    def lora_room(self, component: str, tokens: int, size: int) -> int:
        """Return the bytes that its LoRAs hold beside the layer which they take most of.

        That is the ranks' activations of all ``tokens``, or what ``FoundLora.room`` says of one.
        """
        used = [found for found in self.loras if found.works_on(component)]
        ranks = sum(found.pairs for found in used)
        return max([tokens * size * ranks, *(found.room(tokens, size) for found in used)])

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain JSON types; ``variant`` is the variant's name at the top level."""
        out: dict[str, Any] = {
            "variant": self.variant.name,
            "title": self.variant.title,
            "supported": self.variant.supported,
            "why_not": self.variant.why_not,
            "candidates": list(self.candidates),
            "custom_size": self.custom_size,
            "layout": self.layout,
            "weight_kind": self.weight_kind,
            "pipeline_class": self.pipeline_class,
            "experts": 2 if self.two_experts else 1,
            "size_multiple": self.size_multiple,
            "bytes": self.nbytes,
            "path": str(self.root),
            "transformer": {**asdict(self.transformer), "dim": self.transformer.dim},
            "vae": asdict(self.vae) if self.vae else None,
            "defaults": asdict(self.variant.defaults),
            "components": {name: _plain(_described(c)) for name, c in self.components.items()},
            "loras": [found.describe() for found in self.loras],
            "recipe": self.recipe.describe() if self.recipe else None,
            "incomplete": self.incomplete,
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
        }
        plain = _plain(out)
        assert isinstance(plain, dict)
        return plain


def _described(component: Component) -> dict[str, Any]:
    """Return a component's fields for JSON; its sizes in memory as one sum, not block by block."""
    fields = asdict(component)
    stored = component.stored
    return fields | {"stored": None if stored is None else asdict(stored.whole)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
