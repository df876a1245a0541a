"""A LoRA's file, read: its tensors, scaled, as what they change in each module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import WanLoRA
from ..detect import (
    HADAMARD,
    KRONECKER,
    LYCORIS_MAGNITUDE,
    MAGNITUDES,
    Patch,
    read_patches,
)
from ..formats import read_table
from ..loading import TensorReader, keep_in_fp32, stays_fp32
from ..models import UNSHUFFLED, Source, TransformerShape, read_face
from .delta import Delta, Hadamard, Kronecker, Magnitude
from .layers import Convolution, has_matrix, layer_of


def shape_of(transformer: Any) -> TransformerShape:
    """Return the shape of a loaded transformer: from its configuration, and from the layers that
    only some models have.
    """
    config = transformer.config
    reference = getattr(transformer, "ref_conv", None)
    camera = getattr(transformer, "control_adapter", None)
    faces = isinstance(getattr(transformer, "face_adapter", None), nn.ModuleList)
    return TransformerShape(
        heads=config.num_attention_heads, head_dim=config.attention_head_dim,
        ffn_dim=config.ffn_dim, layers=len(transformer.blocks), in_channels=config.in_channels,
        out_channels=config.out_channels, text_dim=config.text_dim, freq_dim=config.freq_dim,
        image_dim=config.image_dim, added_kv_dim=config.added_kv_proj_dim,
        pos_embed_seq_len=config.pos_embed_seq_len, patch_size=tuple(config.patch_size),
        vace_layers=tuple(config.get("vace_layers", ())),
        vace_in_channels=config.get("vace_in_channels"),
        reference_channels=None if reference is None else reference.in_channels,
        camera_channels=None if camera is None else camera.conv.in_channels // UNSHUFFLED**2,
        animate=1 if faces else None,
        face=read_face(_shapes(transformer), "diffusers") if faces else None,
    )  # fmt: skip


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def read_lora(
    transformer: nn.Module,
    lora: WanLoRA,
    deltas: dict[str, list[Delta]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Read one LoRA and add it to the deltas, which are keyed by target."""
    path = Path(lora.path)
    table = read_table(path)
    found = read_patches(table, shape_of(transformer), Path(type(transformer).__name__))
    kept = keep_in_fp32(transformer, dtype)
    with TensorReader(table, device) as reader:
        for patch in found.patches:
            # Norms compute in float32, whatever dtype their weight has.
            fp32 = stays_fp32(patch.target + ".weight", kept) or not has_matrix(
                transformer, patch.target
            )
            values = _Values(reader, patch, lora.strength, torch.float32 if fp32 else dtype)
            values.collect(transformer, deltas.setdefault(patch.target, []))


@dataclass(slots=True)
class _Values:
    """The tensors of one patch, scaled as they are read."""

    reader: TensorReader
    patch: Patch
    strength: float
    dtype: torch.dtype

    def collect(self, transformer: nn.Module, deltas: list[Delta]) -> None:
        """Add this patch to the last delta of its module; a DoRA is a delta of its own."""
        module, tensors = layer_of(transformer, self.patch.target), self.patch.tensors
        magnitude = self._magnitude()
        if not deltas or magnitude is not None or deltas[-1].magnitude is not None:
            deltas.append(Delta(self.dtype, magnitude=magnitude))
        delta = deltas[-1]
        shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
        wide = module.in_channels if isinstance(module, Convolution) else 0
        if "down" in tensors:
            down = self._read("down").to(delta.dtype)
            if wide:
                down = _widened(down.reshape(down.shape[0], -1, *shape[2:]), wide)
            delta.downs.append(down.reshape(down.shape[0], -1) if not wide else down)
            up = self._read("up").flatten(1) * self._factor_scale()
            delta.ups.append(up.to(delta.dtype))
        if "diff" in tensors:
            diff = self._read("diff") * self._factor_strength
            if wide:
                diff = _widened(diff.reshape(diff.shape[0], -1, *shape[2:]), wide)
            elif isinstance(module, nn.Linear):
                diff = diff.reshape(module.out_features, module.in_features)
            delta.weight = _sum(delta.weight, diff.to(delta.dtype))
        self._collect_factors(module, shape, delta)
        # A LoRA's own bias belongs to B (A x) and is scaled with it.
        for role, scale in (("up_bias", self._scale), ("diff_bias", lambda: 1.0)):
            if role in tensors:
                bias = self._read(role).flatten() * (self.strength * scale())
                delta.bias = _sum(delta.bias, bias.to(delta.dtype))

    def _magnitude(self) -> Magnitude | None:
        role = next((role for role in MAGNITUDES if role in self.patch.tensors), None)
        if role is None:
            return None
        strength = self.strength if role == LYCORIS_MAGNITUDE else None
        return Magnitude(self._read(role).flatten(), strength)

    @property
    def _factor_strength(self) -> float:
        """The strength of factors and of a whole difference; not LyCORIS' own in a DoRA."""
        return 1.0 if LYCORIS_MAGNITUDE in self.patch.tensors else self.strength

    def _factor_scale(self) -> float:
        """Return what factors are multiplied with."""
        return self._factor_strength * self._scale()

    def _collect_factors(self, module: nn.Module, shape: tuple[int, ...], delta: Delta) -> None:
        """Add LoKr's and LoHa's factors: as they are to a linear layer, multiplied to another."""
        for names in (KRONECKER, HADAMARD):
            first, second = (self._factor(name) for name in names)
            if not first or not second:
                continue
            first[0] = first[0] * self._factor_scale()
            dtype = delta.dtype
            if isinstance(module, nn.Linear):
                two = [matrix.to(dtype) for matrix in second]
                term = (
                    Kronecker(_whole(first).to(dtype), two)  # LoKr's first factor is small
                    if names is KRONECKER
                    else Hadamard([matrix.to(dtype) for matrix in first], two)
                )
                delta.terms.append(term)
                continue
            w1, w2 = _whole(first), _whole(second)
            diff = torch.kron(w1, w2) if names is KRONECKER else w1 * w2
            delta.weight = _sum(delta.weight, diff.reshape(shape).to(dtype))

    def _factor(self, role: str) -> list[Tensor]:
        """Return a factor's matrices, of which it is the product; none where there is no factor."""
        halves = (f"{role}_a", f"{role}_b")
        names = (role,) if role in self.patch.tensors else halves  # as they were checked
        return [self._read(name).flatten(1) for name in names if name in self.patch.tensors]

    def _read(self, role: str) -> Tensor:
        name = self.patch.tensors[role]
        shape = self.reader.table.tensors[name].shape
        return self.reader.read(Source(name), shape, torch.float32)

    def _scale(self) -> float:
        if self.patch.rank and "alpha" in self.patch.tensors:
            return float(self._read("alpha").item()) / self.patch.rank
        return 1.0 if self.patch.stated_scale is None else self.patch.stated_scale


def _widened(values: Tensor, channels: int) -> Tensor:
    """Append zeros for input channels that the LoRA does not have.

    One trained on a text-to-video model knows none of the condition's channels.
    """
    missing = channels - values.shape[1]
    return F.pad(values, (0, 0) * (values.dim() - 2) + (0, missing)) if missing > 0 else values


def _whole(factor: list[Tensor]) -> Tensor:
    return factor[0] if len(factor) == 1 else factor[0] @ factor[1]


def _sum(present: Tensor | None, more: Tensor) -> Tensor:
    if present is None:
        return more
    return present + more.reshape(present.shape)
