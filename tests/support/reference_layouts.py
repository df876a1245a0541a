"""Writes modules under the names and in the weight kinds of other code: the inverse of convert.

The renaming here is written from the official code's attribute names, by regular expressions,
so that it shares no table with ``wan_core.models.names``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

State = dict[str, torch.Tensor]

_TRANSFORMER = (
    (r"condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"condition_embedder\.time_proj\.", "time_projection.1."),
    (r"condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table", "head.modulation"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"(vace_blocks\.\d+)\.proj_in\.", r"\1.before_proj."),
    (r"(vace_blocks\.\d+)\.proj_out\.", r"\1.after_proj."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.add_k_proj\.", ".k_img."),
    (r"\.add_v_proj\.", ".v_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"_attn\.to_([qkv])\.", r"_attn.\1."),
    (r"_attn\.to_out\.0\.", "_attn.o."),
)
_VAE = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"(samples\.\d+|middle\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"(samples\.\d+|middle\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"(samples\.\d+|middle\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"(samples\.\d+|middle\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
_UMT5 = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.", r"blocks.\1."),
    (r"layer\.0\.SelfAttention\.relative_attention_bias\.", "pos_embedding.embedding."),
    (r"layer\.0\.SelfAttention\.", "attn."),
    (r"layer\.0\.layer_norm\.", "norm1."),
    (r"layer\.1\.layer_norm\.", "norm2."),
    (r"layer\.1\.DenseReluDense\.wi_0\.", "ffn.gate.0."),
    (r"layer\.1\.DenseReluDense\.wi_1\.", "ffn.fc1."),
    (r"layer\.1\.DenseReluDense\.wo\.", "ffn.fc2."),
)
_UMT5_GGUF = (
    (r"^shared\.", "token_embd."),
    (r"^encoder\.final_layer_norm\.", "enc.output_norm."),
    (r"^encoder\.block\.(\d+)\.", r"enc.blk.\1."),
    (r"layer\.0\.SelfAttention\.relative_attention_bias\.", "attn_rel_b."),
    (r"layer\.0\.SelfAttention\.", "attn_"),
    (r"layer\.0\.layer_norm\.", "attn_norm."),
    (r"layer\.1\.layer_norm\.", "ffn_norm."),
    (r"layer\.1\.DenseReluDense\.wi_0\.", "ffn_gate."),
    (r"layer\.1\.DenseReluDense\.wi_1\.", "ffn_up."),
    (r"layer\.1\.DenseReluDense\.wo\.", "ffn_down."),
)
_CLIP = (
    (r"^embeddings\.class_embedding", "visual.cls_embedding"),
    (r"^embeddings\.position_embedding\.weight", "visual.pos_embedding"),
    (r"^embeddings\.patch_embedding\.", "visual.patch_embedding."),
    (r"^pre_layrnorm\.", "visual.pre_norm."),
    (r"^post_layernorm\.", "visual.post_norm."),
    (r"^encoder\.layers\.(\d+)\.", r"visual.transformer.\1."),
    (r"\.layer_norm1\.", ".norm1."),
    (r"\.layer_norm2\.", ".norm2."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def state_of(module: torch.nn.Module) -> State:
    """The saved tensors of a module, without umT5's second name for its embedding."""
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    state.pop("encoder.embed_tokens.weight", None)
    return state


def original_transformer(state: State) -> State:
    return {_rename(name, _TRANSFORMER): value for name, value in state.items()}


def original_vae(state: State, num_res_blocks: int) -> State:
    """Flat block lists for 2.1, nested ones for 2.2 (its encoder's blocks have ``resnets`` too)."""
    nested = any(name.startswith("encoder.down_blocks.0.resnets.") for name in state)
    out: State = {}
    for name, value in state.items():
        if nested:
            new = re.sub(
                r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.downsamples.\1.downsamples", name
            )
            new = re.sub(
                r"decoder\.up_blocks\.(\d+)\.resnets", r"decoder.upsamples.\1.upsamples", new
            )
            new = re.sub(
                r"encoder\.down_blocks\.(\d+)\.downsampler",
                rf"encoder.downsamples.\1.downsamples.{num_res_blocks}", new,
            )  # fmt: skip
            new = re.sub(
                r"decoder\.up_blocks\.(\d+)\.upsampler",
                rf"decoder.upsamples.\1.upsamples.{num_res_blocks + 1}", new,
            )  # fmt: skip
        else:
            new = name.replace("encoder.down_blocks.", "encoder.downsamples.")
            stride = num_res_blocks + 2
            found = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)(\..+)", new)
            if found:
                inside = int(found[3]) if found[2] == "resnets" else stride - 1
                new = f"decoder.upsamples.{int(found[1]) * stride + inside}{found[4]}"
        out[_rename(new, _VAE)] = value
    return out


def original_umt5(state: State) -> State:
    return {_rename(name, _UMT5): value for name, value in state.items()}


def gguf_umt5(state: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's names; of tensors, or of whatever else is known of each."""
    return {_rename(name, _UMT5_GGUF): value for name, value in state.items()}


def original_clip(state: State) -> State:
    """The official XLM-Roberta CLIP: q, k, v in one tensor, class token and positions with axes."""
    state = {k.removeprefix("vision_model."): v for k, v in state.items()}
    out: State = {}
    for name, value in state.items():
        fused = re.match(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name)
        if fused:
            parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            out[f"visual.transformer.{fused[1]}.attn.to_qkv.{fused[2]}"] = torch.cat(parts)
        elif "self_attn.k_proj" not in name and "self_attn.v_proj" not in name:
            out[_rename(name, _CLIP)] = value
    out["visual.cls_embedding"] = out["visual.cls_embedding"].view(1, 1, -1)
    out["visual.pos_embedding"] = out["visual.pos_embedding"].unsqueeze(0)
    out["visual.head"] = torch.ones(3, 3)
    out["textual.token_embedding.weight"] = torch.ones(3, 3)
    out["log_scale"] = torch.ones(())
    return out


def with_prefix(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def scaled_fp8(state: State, linear: set[str], style: str) -> tuple[State, dict[str, str], State]:
    """Store the weights of ``linear`` layers as scaled fp8.

    ``style``: "old" (``scaled_fp8``, ``scale_weight``, ``scale_input``), "new" (``weight_scale``,
    ``comfy_quant``), "metadata" (``_quantization_metadata``) or "rows" (one scale per row).
    Returns the file's tensors, its metadata, and the float32 values they stand for.
    """
    import json

    out, truth = dict(state), dict(state)
    metadata: dict[str, str] = {}
    layers: dict[str, Any] = {}
    for name in linear:
        layer = name.removesuffix(".weight")
        weight = state[name].float()
        peak = weight.abs().amax(dim=1, keepdim=True) if style == "rows" else weight.abs().max()
        scale = (peak / 448.0).clamp(min=1e-12)
        stored = (weight / scale).to(torch.float8_e4m3fn)
        out[name], truth[name] = stored, stored.float() * scale
        if style == "old":
            out[f"{layer}.scale_weight"] = scale.reshape(1)
            out[f"{layer}.scale_input"] = torch.tensor([17.0])
        else:
            out[f"{layer}.weight_scale"] = scale
            out[f"{layer}.input_scale"] = torch.tensor(17.0)
        layers[layer] = {"format": "float8_e4m3fn"}
        if style == "new":
            note = json.dumps(layers[layer]).encode()
            out[f"{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    if style == "old":
        out["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    if style == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return out, metadata, truth
