"""A configuration that is read from shapes builds a module of exactly these shapes."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan_core.formats.kinds import WeightKind
from wan_core.loading import blueprint
from wan_core.loading.blueprint import found_blueprint

TRANSFORMER: Mapping[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 96, "text_dim": 24,
    "freq_dim": 32, "num_layers": 3, "in_channels": 36, "out_channels": 16,
}  # fmt: skip
ANIMATE: Mapping[str, Any] = {
    **TRANSFORMER, "num_layers": 4, "image_dim": 1280, "added_kv_proj_dim": 256,
    "motion_encoder_size": 32,
    "motion_encoder_channel_sizes": {"4": 24, "8": 16, "16": 8, "32": 4}, "motion_style_dim": 8,
    "motion_dim": 4, "motion_encoder_dim": 12, "face_encoder_hidden_dim": 16,
}  # fmt: skip
VAE: Mapping[str, Any] = {
    "base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}  # fmt: skip
UMT5: Mapping[str, Any] = {
    "vocab_size": 40, "d_model": 24, "d_kv": 8, "d_ff": 56, "num_layers": 3, "num_heads": 5,
    "relative_attention_num_buckets": 16, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip
CASES: list[tuple[str, str, Mapping[str, Any]]] = [
    ("transformer", "WanTransformer3DModel", {**TRANSFORMER, "in_channels": 16}),
    ("transformer", "WanTransformer3DModel",
     {**TRANSFORMER, "image_dim": 1280, "added_kv_proj_dim": 256, "pos_embed_seq_len": 514}),
    ("transformer", "WanVACETransformer3DModel",
     {**TRANSFORMER, "in_channels": 16, "num_layers": 4, "vace_layers": [0, 2],
      "vace_in_channels": 96}),
    *(("transformer", "WanAnimateTransformer3DModel",
       {**ANIMATE, "inject_face_latents_blocks": every, "face_encoder_num_heads": heads})
      for every, heads in ((1, 1), (2, 2), (4, 4))),
    ("vae", "AutoencoderKLWan", VAE),
    ("text_encoder", "UMT5EncoderModel", UMT5),
    *(("image_encoder", "CLIPVisionModel",
       {"hidden_size": width, "intermediate_size": 40, "num_hidden_layers": 2, "image_size": 28,
        "num_attention_heads": heads, "patch_size": 14, "hidden_act": "gelu",
        "projection_dim": 1024})
      for width, heads in ((768, 12), (1280, 16))),
]  # fmt: skip


def built(name: str, config: Mapping[str, Any]) -> Any:
    import diffusers
    import transformers

    with torch.device("meta"):
        if hasattr(diffusers, name):
            return getattr(diffusers, name)(**config)
        kind = name.replace("EncoderModel", "Config").replace("Model", "Config")
        return getattr(transformers, name)(getattr(transformers, kind)(**config))


@pytest.mark.parametrize(("kind", "name", "config"), CASES, ids=lambda one: str(one)[:30])
def test_what_the_shapes_say_is_what_was_built(
    kind: str, name: str, config: Mapping[str, Any]
) -> None:
    module = built(name, config)
    state = {key.removeprefix("vision_model."): v for key, v in module.state_dict().items()}
    part: Any = SimpleNamespace(
        kind=kind,
        prefix="",
        weights=WeightKind("bf16"),
        table=SimpleNamespace(
            tensors={key: SimpleNamespace(shape=tuple(v.shape)) for key, v in state.items()}
        ),
    )
    sources = {key: SimpleNamespace(name=key, parts=1) for key in state}
    mapped: Any = SimpleNamespace(sources=sources)
    found = found_blueprint(part, mapped)
    assert (found.class_name, found.kind, found.from_file) == (name, kind, False)
    for key, value in config.items():
        assert found.config[key] == value, key
    again = built(name, found.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in module.state_dict().items()
    }
    assert len(set(blueprint._CLASSES.values())) == 4


def test_parts_of_a_fused_tensor_have_their_share_of_its_rows() -> None:
    module = built("UMT5EncoderModel", UMT5)
    part: Any = SimpleNamespace(
        kind="text_encoder",
        prefix="",
        weights=WeightKind("bf16"),
        table=SimpleNamespace(tensors={}),
    )
    sources = {}
    for key, value in module.state_dict().items():
        rows, *rest = value.shape
        part.table.tensors[key] = SimpleNamespace(shape=(3 * rows, *rest))
        sources[key] = SimpleNamespace(name=key, parts=3)
    found = found_blueprint(part, SimpleNamespace(sources=sources))  # type: ignore[arg-type]
    assert {key: found.config[key] for key in UMT5} == UMT5
