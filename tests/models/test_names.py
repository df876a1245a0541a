"""Every layout and weight kind gives the parameters of the module it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import reference_layouts as layouts
from support.layout_models import assert_equal, clip, umt5, vae
from support.tiny_models import make_transformer

from wan_core.errors import ModelMismatch, UnsupportedModel, WanError
from wan_core.loading.component import load_component
from wan_core.loading.quantized import StoredLinear
from wan_core.models.names import Source, map_names

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
BIG: dict[str, Any] = {"attention_head_dim": 128, "ffn_dim": 320}
VARIANTS: dict[str, dict[str, Any]] = {
    "wan2.1-t2v": {},
    "wan2.1-i2v": {"image_dim": 160, "added_kv_proj_dim": 256},
    "wan2.1-flf2v": {"image_dim": 160, "added_kv_proj_dim": 256},
    "wan2.2-i2v-a14b": {},
    "wan2.2-ti2v-5b": {},
    "vace": {},
}


def transformer(variant: str) -> torch.nn.Module:
    torch.manual_seed(1)
    if variant == "vace":
        from diffusers import WanVACETransformer3DModel

        model = WanVACETransformer3DModel(
            num_attention_heads=2, attention_head_dim=128, text_dim=32, ffn_dim=320, num_layers=4,
            vace_layers=[0, 2], vace_in_channels=96,
        )  # fmt: skip
    else:
        model = make_transformer(variant, **BIG, **VARIANTS[variant])
    for parameter in model.parameters():
        # Norm weights and zero-initialised projections would hide that two were swapped.
        torch.nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def transformers() -> dict[str, torch.nn.Module]:
    return {variant: transformer(variant) for variant in VARIANTS}


def write(path: Path, state: layouts.State, metadata: dict[str, str] | None = None) -> Path:
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata)
    return path


def linear_weights(model: torch.nn.Module, inside: str = "") -> set[str]:
    return {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and inside in name
    }


# Transformer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformer_layouts(
    tmp_path: Path,
    transformers: dict[str, torch.nn.Module],
    variant: str,
    layout: str,
    prefix: str,
) -> None:
    model = transformers[variant]
    state = layouts.state_of(model)
    stored = layouts.original_transformer(state) if layout == "original" else state
    ours = load_component(write(tmp_path / "m.safetensors", layouts.with_prefix(stored, prefix)))
    assert type(ours) is type(model)
    assert_equal(ours, state)
    for name, buffer in model.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer)
    theirs = {k: v for k, v in model.config.items() if not k.startswith("_")}
    ours_config = {k: v for k, v in ours.config.items() if not k.startswith("_")}
    assert json.dumps(ours_config, sort_keys=True) == json.dumps(theirs, sort_keys=True)


def test_the_original_names_are_the_official_ones(transformers: dict[str, Any]) -> None:
    names = set(layouts.original_transformer(layouts.state_of(transformers["wan2.1-flf2v"])))
    assert {
        "patch_embedding.weight", "text_embedding.2.bias", "time_embedding.0.weight",
        "time_projection.1.bias", "head.head.weight", "head.modulation", "img_emb.proj.4.bias",
        "img_emb.emb_pos", "blocks.1.modulation", "blocks.0.norm3.weight", "blocks.0.ffn.2.bias",
        "blocks.0.self_attn.norm_q.weight", "blocks.0.self_attn.o.weight",
        "blocks.0.cross_attn.k_img.weight", "blocks.0.cross_attn.norm_k_img.weight",
    } <= names  # fmt: skip


def test_every_transformer_tensor_is_missed_if_dropped(
    tmp_path: Path, transformers: dict[str, torch.nn.Module]
) -> None:
    state = layouts.original_transformer(layouts.state_of(transformers["wan2.1-i2v"]))
    once = [n for n in state if not n.startswith("blocks.1.")]
    for dropped in once:
        rest = {k: v for k, v in state.items() if k != dropped}
        with pytest.raises(WanError):
            load_component(write(tmp_path / "m.safetensors", rest), kind="transformer")


def test_a_derivative_with_unknown_tensors_is_refused(
    tmp_path: Path, transformers: dict[str, torch.nn.Module]
) -> None:
    state = layouts.original_transformer(layouts.state_of(transformers["wan2.1-t2v"]))
    state["dwpose_embedding.0.weight"] = torch.zeros(2, 2)
    with pytest.raises((ModelMismatch, UnsupportedModel), match="dwpose_embedding.0.weight"):
        load_component(write(tmp_path / "m.safetensors", state))


def test_animate_names() -> None:
    from diffusers import WanAnimateTransformer3DModel

    with torch.device("meta"):
        model = WanAnimateTransformer3DModel(num_layers=10, image_dim=1280, added_kv_proj_dim=5120)
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    stored = {_animate_original(name) for name in wanted}
    stored |= {"motion_encoder.enc.net_app.convs.1.conv2.0.kernel"}
    mapped = map_names("transformer", sorted(stored))
    assert set(mapped.sources) == set(wanted)
    assert mapped.sources["face_adapter.1.to_v.bias"] == Source(
        "face_adapter.fuser_blocks.1.linear1_kv.bias", 1, 2
    )
    assert mapped.ignored == ("motion_encoder.enc.net_app.convs.1.conv2.0.kernel",)


def _animate_original(name: str) -> str:
    """The official Animate names, by hand from ``wan/modules/animate``."""
    import re

    parts = name.split(".")
    if parts[0] == "face_adapter":
        layer = {"to_k": "linear1_kv", "to_v": "linear1_kv", "to_q": "linear1_q",
                 "to_out": "linear2", "norm_q": "q_norm", "norm_k": "k_norm"}[parts[2]]  # fmt: skip
        return f"face_adapter.fuser_blocks.{parts[1]}.{layer}.{parts[3]}"
    if parts[0] == "face_encoder" and parts[1].startswith("conv"):
        return f"face_encoder.{parts[1]}.conv.{parts[2]}"
    if parts[0] == "motion_encoder":
        body = name.removeprefix("motion_encoder.")
        body = body.replace("motion_network", "enc.fc")
        body = body.replace("motion_synthesis_weight", "dec.direction.weight")
        convs = "enc.net_app.convs"
        body = body.replace("conv_in.weight", f"{convs}.0.0.weight")
        body = body.replace("conv_in.act_fn.bias", f"{convs}.0.1.bias")
        body = body.replace("conv_out.weight", f"{convs}.8.weight")
        found = re.fullmatch(r"res_blocks\.(\d+)\.(conv1|conv2|conv_skip)\.(.+)", body)
        if found:
            first = {"conv1": 0, "conv2": 1, "conv_skip": 1}[found[2]]
            leaf = f"{first}.weight" if found[3] == "weight" else f"{first + 1}.bias"
            body = f"{convs}.{int(found[1]) + 1}.{found[2].replace('conv_skip', 'skip')}.{leaf}"
        return f"motion_encoder.{body}"
    return next(iter(layouts.original_transformer({name: torch.empty(0)})))


# The other parts -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_vae_layouts(tmp_path: Path, version: str, layout: str) -> None:
    model = vae(version)
    state = layouts.state_of(model)
    stored = layouts.original_vae(state, 2) if layout == "original" else state
    assert len(stored) == len(state)
    ours = load_component(write(tmp_path / "vae.safetensors", stored))
    assert_equal(ours, state)
    latents = torch.randn(1, model.config.z_dim, 2, 2, 2, generator=torch.manual_seed(0))
    assert torch.equal(ours.decode(latents).sample, model.decode(latents).sample)


def test_vae_of_2_1_has_the_official_numbers_and_names(tmp_path: Path) -> None:
    state = layouts.original_vae(layouts.state_of(vae("2.1")), 2)
    assert {
        "encoder.downsamples.2.resample.1.weight", "decoder.upsamples.3.resample.1.bias",
        "decoder.upsamples.4.residual.6.weight", "decoder.upsamples.14.residual.2.weight",
        "encoder.downsamples.3.shortcut.weight", "decoder.head.2.weight", "conv2.bias",
        "decoder.upsamples.7.time_conv.weight", "encoder.middle.1.to_qkv.weight",
    } <= set(state)  # fmt: skip
    config = load_component(write(tmp_path / "vae.safetensors", state)).config
    assert config["latents_mean"][0] == -0.7571 and config["scale_factor_spatial"] == 8


def test_vae_of_2_2_has_the_official_names() -> None:
    state = layouts.original_vae(layouts.state_of(vae("2.2")), 2)
    assert {
        "decoder.upsamples.0.upsamples.0.residual.2.weight",
        "decoder.upsamples.0.upsamples.3.time_conv.weight",
        "encoder.downsamples.1.downsamples.2.resample.1.weight",
    } <= set(state)


@pytest.mark.parametrize("layout", ["original", "hf", "comfyui", "twice", "full"])
def test_umt5_layouts(tmp_path: Path, layout: str) -> None:
    model = umt5()
    state = layouts.state_of(model)
    stored = layouts.original_umt5(state) if layout == "original" else dict(state)
    if layout == "comfyui":
        stored["spiece_model"] = torch.arange(100, dtype=torch.uint8)
        stored["logit_scale"] = torch.ones(())
    if layout == "twice":
        stored["encoder.embed_tokens.weight"] = stored["shared.weight"].clone()
    if layout == "full":
        stored["decoder.final_layer_norm.weight"] = torch.ones(64)
        stored["lm_head.weight"] = torch.ones(128, 64)
    ours = load_component(write(tmp_path / "te.safetensors", stored))
    assert_equal(ours, state)
    ids = torch.tensor([[4, 8, 15, 16, 23, 42, 1, 0]])
    mask = (ids != 0).long()
    assert torch.equal(ours(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)


@pytest.mark.parametrize("layout", ["original", "hf", "projection"])
def test_clip_layouts(tmp_path: Path, layout: str) -> None:
    model = clip()
    state = {k.removeprefix("vision_model."): v for k, v in layouts.state_of(model).items()}
    if layout == "original":
        stored = layouts.original_clip(state)
    else:
        stored = layouts.with_prefix(state, "vision_model.")
    if layout == "projection":
        stored["visual_projection.weight"] = torch.ones(3, 64)
        stored["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    ours = load_component(write(tmp_path / "clip.safetensors", stored), kind="image_encoder")
    assert_equal(ours, layouts.state_of(model))
    pixels = torch.randn(1, 3, 28, 28, generator=torch.manual_seed(0))
    mine = ours(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(mine, model(pixels, output_hidden_states=True).hidden_states[-2])


# fp8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None], ids=str)
def test_plain_fp8_is_cast(
    tmp_path: Path, transformers: dict[str, torch.nn.Module], dtype: torch.dtype | None
) -> None:
    model = transformers["wan2.1-t2v"]
    state = layouts.state_of(model)
    for name in linear_weights(model, "blocks"):
        state[name] = state[name].to(torch.float8_e4m3fn)
    stored = layouts.original_transformer(state)
    ours = load_component(write(tmp_path / "m.safetensors", stored), dtype)
    for name in linear_weights(model, "blocks"):
        wanted = state[name].to(dtype or torch.bfloat16)
        assert torch.equal(ours.get_parameter(name), wanted)


@pytest.mark.parametrize("style", ["old", "new", "metadata", "rows"])
@pytest.mark.parametrize("inside", ["", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scaled_fp8_is_multiplied_with_its_scale(
    tmp_path: Path,
    transformers: dict[str, torch.nn.Module],
    style: str,
    inside: str,
    dtype: torch.dtype,
) -> None:
    model = transformers["wan2.1-t2v"]
    linear = linear_weights(model, inside)
    stored, metadata, truth = layouts.scaled_fp8(layouts.state_of(model), linear, style)
    for prefix in ("", "model.diffusion_model."):
        named = layouts.with_prefix(layouts.original_transformer(stored), prefix)
        ours = load_component(write(tmp_path / "m.safetensors", named, metadata), dtype)
        for name in linear:
            got = ours.get_parameter(name)
            assert torch.equal(got, truth[name].to(got.dtype)), name
            assert got.dtype == (torch.float32 if "time_embedder" in name else dtype)
        original = dict(model.named_parameters())
        for name in linear:
            # Far from the weights if the scale were left out, or the input's scale put in.
            error = (ours.get_parameter(name).float() - original[name]).abs().max()
            assert error < 0.05 * original[name].abs().max()


@pytest.mark.parametrize("style", ["old", "new", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kept_fp8_computes_what_dequantised_does(
    tmp_path: Path, transformers: dict[str, torch.nn.Module], style: str, dtype: torch.dtype
) -> None:
    model = transformers["wan2.2-i2v-a14b"]
    linear = linear_weights(model)
    stored, metadata, _ = layouts.scaled_fp8(layouts.state_of(model), linear, style)
    path = write(tmp_path / "m.safetensors", layouts.original_transformer(stored), metadata)
    whole = load_component(path, dtype)
    kept = load_component(path, dtype, keep_quantized=True)
    assert sum(isinstance(layer, StoredLinear) for layer in kept.modules()) == len(linear) - 2
    generator = torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 36, 2, 4, 4, generator=generator).to(dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator).to(dtype),
    }
    assert torch.equal(kept(**inputs).sample, whole(**inputs).sample)
    # A cast of the whole module must not touch the bits or the scales.
    assert torch.equal(kept.to(dtype)(**inputs).sample, whole.to(dtype)(**inputs).sample)


def test_kept_fp8_takes_one_byte_per_weight(
    tmp_path: Path, transformers: dict[str, torch.nn.Module]
) -> None:
    model = transformers["wan2.1-t2v"]
    linear = linear_weights(model, "blocks")
    stored, metadata, _ = layouts.scaled_fp8(layouts.state_of(model), linear, "new")
    path = write(tmp_path / "m.safetensors", layouts.original_transformer(stored), metadata)
    kept = load_component(path, torch.bfloat16, keep_quantized=True)
    sizes = {name: p.numel() * p.element_size() for name, p in kept.named_parameters()}
    assert all(sizes[name] == model.get_parameter(name).numel() for name in linear)


@pytest.mark.parametrize("style", ["rows", "new"])
def test_pieces_smaller_than_a_tensor_change_nothing(
    tmp_path: Path, transformers: dict[str, torch.nn.Module], style: str, monkeypatch: Any
) -> None:
    model = transformers["wan2.1-t2v"]
    linear = linear_weights(model, "blocks")
    stored, metadata, _ = layouts.scaled_fp8(layouts.state_of(model), linear, style)
    path = write(tmp_path / "m.safetensors", layouts.original_transformer(stored), metadata)
    dtypes = (None, torch.float16)
    whole = {dtype: layouts.state_of(load_component(path, dtype)) for dtype in dtypes}
    monkeypatch.setattr("wan_core.loading.reader._PIECE", 5000)
    monkeypatch.setattr("wan_core.loading.mapped.LOOKED_AT", 512)
    for dtype, state in whole.items():
        assert_equal(load_component(path, dtype), state)


@pytest.mark.parametrize("keep", [False, True])
def test_scaled_fp8_text_encoder(tmp_path: Path, keep: bool) -> None:
    model = umt5()
    linear = linear_weights(model)
    stored, metadata, truth = layouts.scaled_fp8(layouts.state_of(model), linear, "old")
    stored["spiece_model"] = torch.arange(100, dtype=torch.uint8)
    path = write(tmp_path / "te.safetensors", stored, metadata)
    ours = load_component(path, torch.bfloat16, keep_quantized=keep)
    model.load_state_dict(truth, strict=False)
    ids = torch.tensor([[4, 8, 15, 16, 23, 42, 1]])
    wanted = model.to(torch.bfloat16)(ids).last_hidden_state
    assert torch.equal(ours(ids).last_hidden_state, wanted)


@pytest.mark.parametrize("stored", ["nvfp4", "mxfp8", "comfy"])
def test_other_quantisations_are_refused_by_name(
    tmp_path: Path, transformers: dict[str, torch.nn.Module], stored: str
) -> None:
    model = transformers["wan2.1-t2v"]
    state = layouts.original_transformer(layouts.state_of(model))
    layer = "blocks.0.ffn.0"
    weight = state[f"{layer}.weight"]
    if stored == "nvfp4":
        state[f"{layer}.weight"] = torch.zeros(320, weight.shape[1] // 2, dtype=torch.uint8)
        state[f"{layer}.weight_scale"] = torch.ones(320, 16).to(torch.float8_e4m3fn)
        state[f"{layer}.weight_scale_2"] = torch.ones(())
    elif stored == "mxfp8":
        state[f"{layer}.weight"] = weight.to(torch.float8_e4m3fn)
        state[f"{layer}.weight_scale"] = torch.zeros(320, 8, dtype=torch.uint8)
    else:
        note = json.dumps({"format": "int4_convrot"}).encode()
        state[f"{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    kind = "int4_convrot" if stored == "comfy" else stored
    with pytest.raises(UnsupportedModel, match=kind):
        load_component(write(tmp_path / "m.safetensors", state))


def test_two_names_for_one_parameter_are_refused() -> None:
    names = ["head.modulation", "scale_shift_table"]
    with pytest.raises(ModelMismatch, match="both stand for 'scale_shift_table'"):
        map_names("transformer", names)
