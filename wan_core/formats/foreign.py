"""Ways to store weights that are known by name and cannot be read: told by their companions.

Sources: compressed-tensors, LightX2V, ComfyUI 0.33 (W4A8), bitsandbytes, AutoGPTQ, nunchaku,
quanto, DeepSeek. Standard library only.
"""

from __future__ import annotations

from typing import Final

FOREIGN: Final = {
    ".pre_quant_scale": "nvfp4 with scales for its input (AWQ)",
    ".weight_global_scale": "LightX2V's or compressed-tensors' nvfp4",
    ".input_global_scale": "LightX2V's nvfp4", ".input_absmax": "LightX2V's nvfp4",
    ".weight_packed": "compressed-tensors' packed weights",
    ".weight_s_rel": "W4A8", ".weight_s_channel": "W4A8", ".weight_codebook": "W4A8",
    ".absmax": "bitsandbytes nf4", ".quant_map": "bitsandbytes nf4",
    ".nested_absmax": "bitsandbytes nf4", ".nested_quant_map": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".qzeros": "GPTQ/AWQ int4", ".g_idx": "GPTQ/AWQ int4",
    ".wscales": "nunchaku SVDQuant int4", ".SCB": "bitsandbytes int8",
    ".weight_scale_inv": "fp8 in square blocks (weight_scale_inv)",
    ".weight_zero_point": "integers with zero points",
    ".weight._data": "quanto", ".weight._scale": "quanto",
}  # fmt: skip
"""Companions of formats that are known by name and cannot be read."""
