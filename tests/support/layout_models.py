"""Small real modules whose weights are written in other layouts."""

from __future__ import annotations

from typing import Any

import torch

from support import reference_layouts as layouts
from support.tiny_models import make_vae


def vae(version: str) -> torch.nn.Module:
    torch.manual_seed(2)
    family = "wan2.2-ti2v-5b" if version == "2.2" else "wan2.1-t2v"
    numbers: dict[str, Any] = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    if version == "2.2":
        numbers |= {"decoder_base_dim": 8}
    model = make_vae(family, **numbers)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def umt5(**numbers: Any) -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(3)
    config = UMT5Config(
        **(
            {
                "d_model": 64, "d_ff": 96, "num_layers": 3, "num_heads": 4, "d_kv": 8,
                "vocab_size": 128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
            }
            | numbers
        )
    )  # fmt: skip
    model = UMT5EncoderModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def clip() -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(4)
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=16,
        image_size=28, patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def assert_equal(ours: torch.nn.Module, state: layouts.State) -> None:
    mine = layouts.state_of(ours)
    assert mine.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(mine[name], value), name
