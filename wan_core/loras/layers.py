"""The modules that a LoRA's patches name."""

from __future__ import annotations

from torch import nn

from ..errors import ModelMismatch

Convolution = nn.Conv3d | nn.Conv2d | nn.Conv1d


def has_matrix(transformer: nn.Module, target: str) -> bool:
    """Say whether a target is a linear or convolution layer, not a norm or scale-shift table."""
    return isinstance(layer_of(transformer, target), nn.Linear | Convolution)


def layer_of(transformer: nn.Module, target: str) -> nn.Module:
    """Return a target's module; for a scale-shift table, the module that owns it."""
    name = target.removesuffix("scale_shift_table").removesuffix(".")
    try:
        return transformer.get_submodule(name)
    except AttributeError as err:
        raise ModelMismatch(
            f"The transformer has no layer {target!r}, which its configuration calls for. Its "
            "layers were replaced or fused; load it again before using LoRAs."
        ) from err
