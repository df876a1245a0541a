"""config.json files of a model, compared with what the headers of its weights say.

A config that disagrees with its weights is an error that names the field and both numbers.
Otherwise the weights would fail to load later, or load into a model that computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ..errors import CorruptFile, MissingFile, ModelMismatch, UnsupportedModel
from ..files import quoted
from ..formats import read_json
from ..models import TransformerShape, VaeShape

_BOTH: Final = "Config and weights are of different models: download both again."
_AGAIN: Final = "The file is damaged; download it again."

# config field -> (attribute of TransformerShape, diffusers' default when the field is absent)
_TRANSFORMER: Final[Mapping[str, tuple[str, int | None]]] = {
    "ffn_dim": ("ffn_dim", 13824), "num_layers": ("layers", 40),
    "in_channels": ("in_channels", 16), "out_channels": ("out_channels", 16),
    "text_dim": ("text_dim", 4096), "freq_dim": ("freq_dim", 256),
    "image_dim": ("image_dim", None), "added_kv_proj_dim": ("added_kv_dim", None),
    "pos_embed_seq_len": ("pos_embed_seq_len", None),
}  # fmt: skip
_ANIMATE: Final = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_VAE: Final[Mapping[str, tuple[str, Any]]] = {
    "z_dim": ("z_dim", 16), "base_dim": ("base_dim", 96), "num_res_blocks": ("num_res_blocks", 2),
    "dim_mult": ("dim_mult", [1, 2, 4, 4]), "in_channels": ("in_channels", 3),
    "temperal_downsample": ("temporal_downsample", [False, True, True]),
    "out_channels": ("out_channels", 3), "is_residual": ("is_residual", False),
    "patch_size": ("patch_size", None), "scale_factor_spatial": ("scale_factor_spatial", 8),
    "scale_factor_temporal": ("scale_factor_temporal", 4),
}  # fmt: skip


def component_config(folder: Path) -> dict[str, Any]:
    """Read the config of a component's folder; raises MissingFile when there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFile(f"{quoted(path)} is missing. Download this part of the model again.")
    return read_config(path)


def read_config(file: Path) -> dict[str, Any]:
    """Read a component's ``config.json``; raises as ``read_json`` does, and UnsupportedModel where
    it has a ``quantization_config``.

    bitsandbytes, torchao and others store weights in layouts of their own, which headers do not
    tell from plain ones.
    """
    config = read_json(file)
    if how := config.get("quantization_config"):
        raise UnsupportedModel(
            f"{quoted(file)} asks for a quantisation ({str(how)[:80]}) that WanFit does not read. "
            "Use the fp16 or bf16 version, fp8_scaled, or GGUF."
        )
    return config


def check_transformer(
    config: Mapping[str, Any], found: TransformerShape, path: Path
) -> TransformerShape:
    """Return ``found`` with the config's heads; raises ModelMismatch if the two disagree."""
    if "num_heads" in config and "dim" in config:
        return _check_official(config, found, path)
    animate = config.get("_class_name") == "WanAnimateTransformer3DModel"
    heads = _number(config, "num_attention_heads", 40, path)
    head_dim = _number(config, "attention_head_dim", 128, path)
    if heads * head_dim != found.dim:
        raise ModelMismatch(
            f"{quoted(path)} says {heads} heads of {head_dim} (width {heads * head_dim}), the "
            f"weights have width {found.dim}. {_BOTH}"
        )
    for key, (attribute, default) in _TRANSFORMER.items():
        value = config.get(key, _ANIMATE.get(key, default) if animate else default)
        if key == "out_channels" and value is None:
            value = config.get("in_channels", 16)
        _compare(key, value, getattr(found, attribute), path)
    patch = config.get("patch_size", [1, 2, 2])
    _compare("patch_size", list(patch) if isinstance(patch, list) else patch, [1, 2, 2], path)
    layers = found.vace_layers
    if layers:
        layers = _vace_layers(config, found, path)
    return replace(found, heads=heads, head_dim=head_dim, heads_known=True, vace_layers=layers)


def _vace_layers(config: Mapping[str, Any], found: TransformerShape, path: Path) -> tuple[int, ...]:
    value = config.get("vace_layers", [0, 5, 10, 15, 20, 25, 30, 35])
    if not isinstance(value, list) or any(type(layer) is not int for layer in value):
        raise CorruptFile(f"vace_layers in {quoted(path)} is not a list of block numbers.")
    _compare("the length of vace_layers", len(value), len(found.vace_layers), path)
    _compare("vace_in_channels", config.get("vace_in_channels", 96), found.vace_in_channels, path)
    return tuple(value)


def _check_official(
    config: Mapping[str, Any], found: TransformerShape, path: Path
) -> TransformerShape:
    """Check the config of an official release (``wan/modules/model.py::WanModel``)."""
    pairs = {
        "dim": found.dim, "ffn_dim": found.ffn_dim, "num_layers": found.layers,
        "in_dim": found.in_channels, "out_dim": found.out_channels,
    }  # fmt: skip
    for key, value in pairs.items():
        if key in config:
            _compare(key, config[key], value, path)
    heads = _number(config, "num_heads", 0, path)
    if not heads or found.dim % heads:
        raise ModelMismatch(
            f"num_heads in {quoted(path)} is {heads}; it does not divide the weights' width "
            f"{found.dim}. {_BOTH}"
        )
    return replace(found, heads=heads, head_dim=found.dim // heads, heads_known=True)


def check_vae(config: Mapping[str, Any], found: VaeShape, path: Path) -> VaeShape:
    """Return ``found`` with the config's latent mean and std; ModelMismatch if they disagree."""
    for key, (attribute, default) in _VAE.items():
        value = getattr(found, attribute)
        expected = list(value) if isinstance(value, tuple) else value
        _compare(key, config.get(key, default), expected, path)
    decoder = config.get("decoder_base_dim")
    if decoder is not None:
        _compare("decoder_base_dim", decoder, found.decoder_base_dim, path)
    mean = _statistics(config, "latents_mean", found.latents_mean, found.z_dim, path)
    std = _statistics(config, "latents_std", found.latents_std, found.z_dim, path)
    if not all(value > 0 for value in std):
        raise CorruptFile(
            f"latents_std in {quoted(path)} has values that are not above 0. {_AGAIN}"
        )
    return replace(found, latents_mean=mean, latents_std=std)


def _statistics(
    config: Mapping[str, Any], key: str, default: tuple[float, ...], length: int, path: Path
) -> tuple[float, ...]:
    value = config.get(key, list(default))
    if not isinstance(value, list) or any(type(v) not in (int, float) for v in value):
        raise CorruptFile(f"{key} in {quoted(path)} is not a list of numbers. {_AGAIN}")
    if len(value) != length:
        raise ModelMismatch(
            f"{key} in {quoted(path)} has {len(value)} values, the VAE has {length} latent "
            f"channels. {_BOTH}"
        )
    return tuple(float(v) for v in value)


def _number(config: Mapping[str, Any], key: str, default: int, path: Path) -> int:
    value = config.get(key, default)
    if type(value) is not int or not 0 <= value < 2**31:
        raise CorruptFile(
            f"{key} in {quoted(path)} is {str(value)[:40]!r}, not a whole number. {_AGAIN}"
        )
    return value


def _compare(key: str, config_value: Any, weights_value: Any, path: Path) -> None:
    if config_value != weights_value:
        raise ModelMismatch(
            f"{quoted(path)} says {key} {_shown(config_value)}, the weights have "
            f"{_shown(weights_value)}. {_BOTH}"
        )


def compare_width(key: str, config: Mapping[str, Any], found: int | None, path: Path) -> None:
    """Require that the width in an encoder's config is that of its weights, else ModelMismatch."""
    if key in config:
        _compare(key, config[key], found, path)


def _shown(value: Any) -> str:
    return "none" if value is None else ascii(value)[:80]
