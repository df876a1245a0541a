"""Small real modules to be placed, and what must be the same afterwards."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt and ComfyUI's own."""


def transformer(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(3)
    known: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    model = WanTransformer3DModel(**{**known, **config}).eval().requires_grad_(False)
    return model.to(dtype) if dtype != torch.float32 else model


def text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(4)
    config = UMT5Config(
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        d_kv=8,
        vocab_size=64,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config).eval().requires_grad_(False)


def vae() -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(5)
    model = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return model.eval().requires_grad_(False)


def run_text(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(torch.arange(12)[None]).last_hidden_state
    return out


def state_of(module: nn.Module) -> tuple[object, ...]:
    """Everything placement could disturb: identities, addresses, bytes, hooks, instance dicts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return (
        digest.hexdigest(),
        [(name, id(p), p.data_ptr(), p.device) for name, p in module.named_parameters()],
        [(name, id(b), b.data_ptr()) for name, b in module.named_buffers()],
        [
            (sorted(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks))
            for m in module.modules()
        ],
    )
