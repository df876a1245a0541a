"""LoRA files: whatever detection calls a LoRA the reader reads, its scale and parts included.

The table is ``models.lora_keys``; detection and the reader both ask it. Each test walks it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import published
from support import wan_layouts as layouts

from wan_core.config import WanLoRA, WanModelFiles
from wan_core.detect.detector import ArchitectureDetector, inspect_file
from wan_core.detect.lora_files import with_loras
from wan_core.detect.lora_names import LoraPatches, read_patches
from wan_core.errors import CorruptFile, ModelMismatch, UnsupportedModel
from wan_core.formats import read_table
from wan_core.models import ModelArchitecture, TransformerShape
from wan_core.models.lora_keys import ADAPTERS, ENDINGS, PREFIXES, SEPARATORS, read_lora_key

DIM, RANK = 256, 4
# A module, its diffusers name, its shape, as Wan's own code names them.
MODULES = {
    "blocks.0.self_attn.q": ("blocks.0.attn1.to_q", (DIM, DIM)),
    "blocks.1.cross_attn.o": ("blocks.1.attn2.to_out.0", (DIM, DIM)),
    "blocks.1.ffn.0": ("blocks.1.ffn.net.0.proj", (512, DIM)),
    "time_projection.1": ("condition_embedder.time_proj", (6 * DIM, DIM)),
    "head.head": ("proj_out", (64, DIM)),
}
# A spelling of each pattern of ENDINGS and ADAPTERS, written by hand from the trainers' code.
SPELT = {
    r"\.lora_(?:A|down)(?:\.[^.]+)?\.weight": (
        ".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight",
        ".lora_A.default_0.weight", ".lora_A.my-style.weight"),
    r"[._]lora\.down\.weight": (".lora.down.weight", "_lora.down.weight"),
    r"\.lora_linear_layer\.down\.weight": (".lora_linear_layer.down.weight",),
    r"\.lora_(?:A|down)": (".lora_A", ".lora_down"),
}  # fmt: skip
ADAPTER_NAMES = {
    "DoRA by 'magnitude'": (".magnitude",),
    "LoKr with a Tucker core": (".lokr_t2",),
    "LoHa with a Tucker core": (".hada_t1", ".hada_t2"),
    "BOFT": (".boft_R", ".boft_s.default"),
    "OFT or BOFT": (".oft_blocks", ".oft_diag", ".oft_R.default.weight"),
    "GLoRA": (".a1.weight", ".b2.weight", ".bm.weight"),
    "GLoRA of PEFT": (".glora_A", ".glora_E.default"),
    "LoCon with a middle matrix": (".lora_mid.weight",),
    "weights to be replaced": (".set_weight", ".reshape_weight"),
    "IA3": (".ia3_l", ".ia3_l.default", ".on_input"),
    "VeRA": (".vera_lambda_b", ".vera_lambda_d.default", ".pvera_lambda_b"),
    "AdaLoRA": (".lora_E", ".lora_E.default", ".ranknum"),
    "T-LoRA": (".lambda_layer", ".q_layer.weight", ".p_layer.weight"),
    "RandLoRA": (".randlora_lambda", ".randlora_gamma.default"),
    "VB-LoRA": (".vblora_logits_A", ".vblora_vector_bank"),
    "DeLoRA": (".delora_A", ".delora_lambda.default"),
    "GraLoRA": (".gralora_A", ".gralora_B_general"),
    "HiRA": (".hira_A", ".hira_B.default"),
    "RoAd": (".road_theta", ".road_alpha.default"),
    "C3A": (".c3a_kernel",),
    "SHiRA": (".shira_weight.default",),
    "WaveFT": (".waveft_spectrum",),
    "embedding LoRA": (".lora_embedding_A", ".lora_embedding_B.default"),
    "FourierFT": (".fourierft_spectrum.default",),
    "Bone": (".bone_block", ".miss_block.default"),
    "HRA": (".hra_u.default",),
    "Stand-In": (".q_loras.down.weight", ".v_loras.up.weight", ".add_k_lora.down.weight"),
}
TRAINERS = {
    "musubi, dots inside": ("lora_unet_blocks_0.self_attn.q", ".lora_down.weight"),
    "DiffSynth": ("pipe.dit.blocks.0.self_attn.q", ".lora_A.default.weight"),
    "VideoX-Fun": ("lora_unet__blocks_0_self_attn_q", ".lora_down.weight"),
    "ai-toolkit": ("transformer$$blocks$$0$$attn1$$to_q", ".lora_A.weight"),
    "lycoris": ("lycoris_blocks_0_self_attn_q", ".lora_down.weight"),
    "PEFT of a pipeline": ("base_model.model.transformer.blocks.0.attn1.to_q", ".lora_A.weight"),
    "a compiled model": ("_orig_mod.blocks.0._orig_mod.self_attn.q", ".lora_A.weight"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelArchitecture:
    path = tmp_path_factory.mktemp("model") / "wan.safetensors"
    shapes = layouts.transformer(DIM, 512, 2, 16)
    layouts.write_sparse(path, layouts.stored(shapes, "bf16"))
    return ArchitectureDetector().detect_model_architecture(path)


def write(path: Path, tensors: dict[str, tuple[int, ...]], metadata: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = layouts.Stored({n: ("F32", s) for n, s in tensors.items()}, metadata or {})
    return layouts.write_sparse(path, file)


def pair(stem: str, down: str = ".lora_A.weight", shape: tuple[int, int] = (DIM, DIM)) -> Any:
    up = down.replace("lora_A", "lora_B").replace("down", "up")
    return {stem + down: (RANK, shape[1]), stem + up: (shape[0], RANK)}


def read(path: Path, shape: TransformerShape) -> LoraPatches:
    return read_patches(read_table(path), shape, Path("model"))


# The table, walked ---------------------------------------------------------------------------


def spellings() -> Iterator[tuple[str, str]]:
    for prefix in ("", *PREFIXES):
        for separator in SEPARATORS:
            yield prefix, separator


@pytest.mark.parametrize(("prefix", "separator"), spellings())
def test_what_is_called_a_lora_is_read(
    tmp_path: Path, model: ModelArchitecture, prefix: str, separator: str
) -> None:
    """Every prefix, with every separator: recognised, its width known, every module found."""
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (_, shape) in MODULES.items():
        stem = f"{prefix}.{name}".lstrip(".").replace(".", separator)
        tensors |= pair(stem, shape=shape)
    path = write(tmp_path / "lora.safetensors", tensors)
    part = inspect_file(path)
    assert (part.kind, part.width) == ("lora", DIM), part.title
    found = read(path, model.transformer)
    assert {patch.target for patch in found.patches} == {new for new, _ in MODULES.values()}
    assert found.rank == RANK and not found.notes


@pytest.mark.parametrize("down", [name for some in SPELT.values() for name in some])
def test_every_ending_is_known_to_both(tmp_path: Path, model: ModelArchitecture, down: str) -> None:
    path = write(tmp_path / "lora.safetensors", pair("diffusion_model.blocks.0.self_attn.q", down))
    assert (inspect_file(path).kind, inspect_file(path).width) == ("lora", DIM)
    (patch,) = read(path, model.transformer).patches
    assert set(patch.tensors) == {"down", "up"}


def test_no_ending_is_left_out() -> None:
    """Each pattern of the table has a spelling above, or is written out in another test."""
    assert set(SPELT) == set(ENDINGS["down"])
    for down, up in zip(ENDINGS["down"], ENDINGS["up"], strict=True):
        assert up == down.replace("A|", "B|").replace("down", "up")
    for pattern, names in SPELT.items():
        for name in names:
            assert re.fullmatch(f"(.+?)(?:{pattern})", "blocks.0.ffn.0" + name), name
    assert set(ADAPTER_NAMES) == set(ADAPTERS)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_trainers_write(tmp_path: Path, model: ModelArchitecture, trainer: str) -> None:
    path = write(tmp_path / "lora.safetensors", pair(*TRAINERS[trainer]))
    assert inspect_file(path).width == DIM
    assert [p.target for p in read(path, model.transformer).patches] == ["blocks.0.attn1.to_q"]


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "lora_unet_"])
def test_other_adapters_are_called_by_their_name(
    tmp_path: Path, model: ModelArchitecture, kind: str, prefix: str
) -> None:
    """Alone in a file, and beside the matrices of a LoRA: named by detection and by the reader."""
    stem = f"{prefix}blocks.0.self_attn.q"
    for ending in ADAPTER_NAMES[kind]:
        for more in ({}, pair(stem)):
            path = write(tmp_path / "lora.safetensors", more | {stem + ending: (RANK, RANK)})
            part = inspect_file(path)
            assert part.kind == "lora" and f"adapter of the kind {kind}" in part.title
            with pytest.raises(UnsupportedModel, match=f"adapter of the kind {kind} "):
                with_loras(model, [WanLoRA(path)])


def test_a_model_s_own_names_are_no_lora() -> None:
    for shapes, _ in layouts.FILES.values():
        names = [*shapes, *map(layouts.to_diffusers, shapes)]
        assert not [name for name in names if read_lora_key(name)]


# Parts that are not there --------------------------------------------------------------------


def test_a_published_lora_fits_its_model(tmp_path: Path) -> None:
    """Wan2.2-Lightning to the byte, on the model it was made for: 400 layers, alpha as I64."""
    shapes = layouts.FILES["t2v-14b"][0]
    path = tmp_path / "wan.safetensors"
    layouts.write_sparse(path, layouts.stored(shapes, "bf16"))
    found = ArchitectureDetector().detect_model_architecture(path)
    lora = layouts.write_sparse(tmp_path / "high_noise_model.safetensors", published.lightning())
    assert inspect_file(lora).title == "a LoRA for Wan (width 5120)"
    patches = read(lora, found.transformer)
    assert len(patches.patches) == 400 and patches.rank == 64 and not patches.notes


Q = "diffusion_model.blocks.0.self_attn.q"
FOREIGN = {
    "input layer, whole": (
        {"diffusion_model.patch_embedding.diff": (DIM, 36, 1, 2, 2)}, "36 input channels"),
    "input layer, low rank": (
        {"diffusion_model.patch_embedding.lora_down.weight": (RANK, 36, 1, 2, 2),
         "diffusion_model.patch_embedding.lora_up.weight": (DIM, RANK, 1, 1, 1),
         "diffusion_model.patch_embedding.alpha": ()}, "36 input channels"),
    "input layer, flat": (
        {"lora_unet_patch_embedding.lora_down.weight": (RANK, 144),
         "lora_unet_patch_embedding.lora_up.weight": (DIM, RANK)}, "36 input channels"),
    "input layer, DoRA": (
        {"lora_unet_patch_embedding.lora_down.weight": (RANK, 144),
         "lora_unet_patch_embedding.lora_up.weight": (DIM, RANK),
         "lora_unet_patch_embedding.dora_scale": (DIM, 1)}, "36 input channels"),
    "input layer, LoKr": (
        {"diffusion_model.patch_embedding.lokr_w1": (2, 2),
         "diffusion_model.patch_embedding.lokr_w2": (DIM // 2, 18, 1, 2, 2)}, "36 input channels"),
    "input layer, LoHa": (
        {f"diffusion_model.patch_embedding.hada_w{n}_{half}": size for n in (1, 2)
         for half, size in (("a", (DIM, RANK)), ("b", (RANK, 144)))}, "36 input channels"),
    "image branch": (pair("diffusion_model.blocks.0.cross_attn.k_img"), "CLIP image branch"),
    "positions": ({"diffusion_model.img_emb.emb_pos.diff": (1, 514, 1280)}, "CLIP image branch"),
    "text encoder, kohya": (pair("lora_te_encoder_block_0_layer_0_SelfAttention_q"), "a text enc"),
    "text encoder, first": (pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "a text encoder"),
    "text encoder, diffusers": (pair("text_encoder.encoder.block.0.q"), "a text encoder"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_one_foreign_part_does_not_refuse_the_rest(
    tmp_path: Path, model: ModelArchitecture, case: str
) -> None:
    extra, words = FOREIGN[case]
    plain = with_loras(model, [write(tmp_path / "plain.safetensors", pair(Q))])
    path = write(tmp_path / "lora.safetensors", pair(Q) | extra)
    found = with_loras(model, [path])
    (note,) = (text for text in found.warnings if text not in model.warnings)
    assert words in note and "left out" in note and path.name in note
    # What is left out takes no memory.
    assert found.lora_bytes("transformer", 2) == plain.lora_bytes("transformer", 2)
    with pytest.raises(ModelMismatch, match="Nothing in the LoRA"):
        with_loras(model, [write(tmp_path / "only.safetensors", extra)])


def test_positions_are_left_out_of_an_image_model(tmp_path: Path) -> None:
    path = tmp_path / "i2v.safetensors"
    shapes = layouts.transformer(DIM, 512, 2, 36, image=True)
    layouts.write_sparse(path, layouts.stored(shapes, "bf16"))
    image = ArchitectureDetector().detect_model_architecture(path)
    extra = {"diffusion_model.img_emb.emb_pos.diff": (1, 514, 1280)}
    found = with_loras(image, [write(tmp_path / "lora.safetensors", pair(Q) | extra)])
    assert any("learned positions" in text and "left out" in text for text in found.warnings)


@pytest.mark.parametrize("kind", ["LoKr", "DoRA"])
def test_a_text_model_s_input_layer_that_cannot_be_widened(tmp_path: Path, kind: str) -> None:
    """A magnitude is that of a whole row, and no row of factors is as wide as an image model's."""
    path = tmp_path / "i2v.safetensors"
    layouts.write_sparse(path, layouts.stored(layouts.transformer(DIM, 512, 2, 36), "bf16"))
    image = ArchitectureDetector().detect_model_architecture(path)
    stem = "diffusion_model.patch_embedding"
    extra: dict[str, tuple[int, ...]] = {
        f"{stem}.lokr_w1": (2, 2), f"{stem}.lokr_w2": (DIM // 2, 32)
    }  # fmt: skip
    if kind == "DoRA":
        extra = {f"{stem}.lora_A.weight": (RANK, 16, 1, 2, 2), f"{stem}.lora_B.weight": (DIM, RANK),
                 f"{stem}.lora_magnitude_vector": (1, DIM, 1, 1, 1)}  # fmt: skip
    found = read(write(tmp_path / "lora.safetensors", pair(Q) | extra), image.transformer)
    assert [patch.target for patch in found.patches] == ["blocks.0.attn1.to_q"]
    assert "made for 16 input channels, this model has 36; left out" in found.notes[0]


ELSEWHERE = {
    "blocks.0.audio_cross_attn_wrapper.audio_cross_attn.q": "reads sound",
    "audio_proj.audio_proj_glob_1.layer": "reads sound",
    "blocks.1.audio_cross_attn.kv_linear": "reads sound",
    "audio_injector.injector.3.q": "reads sound",
    "blocks.0.cross_attn.processor.k_proj": "reads sound",
    "control_adapter.conv": "reads a camera",
    "ref_conv": "reference picture",
}


@pytest.mark.parametrize("style", ["diffusion_model.", "lora_unet_", "base_model.model."])
@pytest.mark.parametrize("part", ELSEWHERE)
def test_parts_of_other_wan_models_are_left_out(
    tmp_path: Path, model: ModelArchitecture, part: str, style: str
) -> None:
    """HuMo, S2V, MultiTalk and the like: what fits is used, and what is left out is said."""
    stems = [style + (one.replace(".", "_") if style.endswith("_") else one) for one in (
        "blocks.0.self_attn.q", part)]  # fmt: skip
    path = write(tmp_path / "l.safetensors", pair(stems[0]) | pair(stems[1], shape=(1536, 768)))
    found = with_loras(model, [path])
    assert found.loras[0].parameters == 2 * RANK * DIM
    (text,) = [text for text in found.warnings if "left out" in text]
    assert ELSEWHERE[part] in text and "2 of 4 tensors" in text and "l.safetensors" in text
    alone = write(tmp_path / "alone.safetensors", pair(stems[1], shape=(1536, 768)))
    with pytest.raises(ModelMismatch, match="Nothing in the LoRA"):
        with_loras(model, [alone])


def test_what_is_no_patch_and_no_sign_is_passed_over(
    tmp_path: Path, model: ModelArchitecture
) -> None:
    """Counters and a quantiser's empty mark; scales of fp8 matrices are neither."""
    tensors = {n: ("F32", s) for n, s in pair(Q).items()}
    marks = {"scaled_fp8": ("F8_E4M3", (2,)), "diffusion_model.scaled_fp8": ("F8_E4M3", (0,))}
    extras = {"global_step": ("I64", ()), "num_updates": ("I32", (1,))} | marks
    path = tmp_path / "l.safetensors"
    layouts.write_sparse(path, layouts.Stored(tensors | extras))
    found = with_loras(model, [path])
    assert found.loras[0].parameters == 2 * RANK * DIM and not found.loras[0].recipe
    scale = {f"{Q}.lora_A.scale_weight": ("F32", (1,))}
    layouts.write_sparse(path, layouts.Stored(tensors | scale))
    with pytest.raises(UnsupportedModel, match="quantised form .*scale_weight"):
        with_loras(model, [path])


@pytest.mark.parametrize(
    ("stem", "words"),
    [("transformer.single_transformer_blocks.0.attn.to_q", "a LoRA for FLUX"),
     ("lora_unet_down_blocks_0_attentions_0_proj_in", "a LoRA for Stable Diffusion"),
     ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "All of it belongs to a text encoder")],
)  # fmt: skip
def test_a_lora_of_another_model_is_called_so(
    tmp_path: Path, model: ModelArchitecture, stem: str, words: str
) -> None:
    path = write(tmp_path / "l.safetensors", pair(stem, shape=(64, 64)))
    with pytest.raises(ModelMismatch, match=words):
        with_loras(model, [path])


def test_an_adapter_that_needs_more_than_its_tensors_says_what(
    tmp_path: Path, model: ModelArchitecture
) -> None:
    stem = "diffusion_model.blocks.0.self_attn"
    down = {f"{stem}.{x}_loras.down.weight": (RANK, DIM) for x in "qkv"}
    up = {f"{stem}.{x}_loras.up.weight": (DIM, RANK) for x in "qkv"}
    path = write(tmp_path / "l.safetensors", down | up)
    assert inspect_file(path).title == "an adapter of the kind Stand-In"
    with pytest.raises(UnsupportedModel, match="kind Stand-In .* picture of a face"):
        with_loras(model, [path])


def test_a_bias_of_a_foreign_input_layer_stays(tmp_path: Path, model: ModelArchitecture) -> None:
    extra = {"diffusion_model.patch_embedding.diff": (DIM, 36, 1, 2, 2),
             "diffusion_model.patch_embedding.diff_b": (DIM,)}  # fmt: skip
    found = read(write(tmp_path / "lora.safetensors", pair(Q) | extra), model.transformer)
    assert {p.target: set(p.tensors) for p in found.patches} == {
        "blocks.0.attn1.to_q": {"down", "up"}, "patch_embedding": {"diff_bias"},
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "base_model.model."])
def test_patches_for_both_experts_are_told(
    tmp_path: Path, model: ModelArchitecture, prefix: str
) -> None:
    tensors = pair(f"{prefix}transformer_1.blocks.0.attn1.to_q")
    tensors |= pair(f"{prefix}transformer_2.blocks.0.attn1.to_q")
    path = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(ModelMismatch, match="patches for both experts; save"):
        with_loras(model, [path])


# Scales ----------------------------------------------------------------------------------------


def scale_of(path: Path, model: ModelArchitecture) -> float | None:
    (patch,) = read(path, model.transformer).patches
    return patch.stated_scale


PEFT_STEM = "base_model.model.blocks.0.self_attn.q"
CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "alpha": ({"lora_alpha": 32}, 8.0),
    "alpha and a pattern for another module": (
        {"lora_alpha": 8, "alpha_pattern": {"blocks.1.self_attn.q": 64}}, 2.0),
    "a pattern for the module": ({"lora_alpha": 8, "alpha_pattern": {"self_attn.q": 64}}, 16.0),
    "an exact pattern": ({"lora_alpha": 8, "alpha_pattern": {"blocks.0.self_attn.q": 4}}, 1.0),
    "a pattern with escaped dots": (
        {"lora_alpha": 8, "alpha_pattern": {r"^blocks\.0\.self_attn\.q$": 4}}, 1.0),
    "a pattern by diffusers' name": (
        {"lora_alpha": 8, "alpha_pattern": {"blocks.0.attn1.to_q": 4}}, 1.0),
    "the end of another word is none": ({"lora_alpha": 8, "alpha_pattern": {"q": 4, "n.q": 9}}, 1),
    "the root of the rank": ({"lora_alpha": 32, "use_rslora": True}, 16.0),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("place", ["folder", "file", "alone", "metadata"])
def test_peft_states_the_scale(
    tmp_path: Path, model: ModelArchitecture, case: str, place: str
) -> None:
    """adapter_config.json counts however the LoRA is given; diffusers' metadata mean the same."""
    config, scale = CONFIGS[case]
    name = "style.safetensors" if place == "alone" else "adapter_model.safetensors"
    text = json.dumps({"peft_type": "LORA", "r": RANK} | config)
    path = tmp_path / "lora" / name
    if place == "metadata":
        marked = {f"transformer.{k}": v for k, v in config.items()}
        write(path, pair(PEFT_STEM), {"lora_adapter_metadata": json.dumps(marked)})
    else:
        write(path, pair(PEFT_STEM))
        (path.parent / "adapter_config.json").write_text(text)
    assert scale_of(path.parent if place == "folder" else path, model) == scale
    assert with_loras(model, [path.parent if place == "folder" else path]).loras[0].rank == RANK


def test_a_configuration_counts_for_its_own_file_only(
    tmp_path: Path, model: ModelArchitecture
) -> None:
    """In a folder of many LoRAs it is PEFT's file that it belongs to."""
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    first = write(tmp_path / "adapter_model.safetensors", pair(PEFT_STEM))
    other = write(tmp_path / "style.safetensors", pair(PEFT_STEM))
    assert scale_of(first, model) == 8.0 and scale_of(other, model) is None


def test_what_a_configuration_says_is_part_of_the_lora(
    tmp_path: Path, model: ModelArchitecture
) -> None:
    path = write(tmp_path / "adapter_model.safetensors", pair(PEFT_STEM))
    config = tmp_path / "adapter_config.json"
    config.write_text('{"lora_alpha": 32}')
    assert with_loras(model, [tmp_path]).loras[0].files == (path, config)
    config.write_bytes(b"\xef\xbb\xbf" + b'{"lora_alpha": 16}')  # as Windows' Notepad saves it
    assert scale_of(tmp_path, model) == 4.0


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [({"use_dora": True}, CorruptFile, "use_dora.* no lora_magnitude_vector"),
     ({"peft_type": "OFT"}, UnsupportedModel, "kind OFT .*can be used are LoRA, .*merged"),
     ('{"lora_alpha": 1e999}', CorruptFile, "states alpha inf and rank 4"),
     ({"lora_alpha": float("nan")}, CorruptFile, "NaN is no JSON number"),
     ({"peft_type": "LOHA", "alpha": 2, "r": 2, "rank_pattern": {"(a+)+$": 3}},
      UnsupportedModel, r"rank_pattern .*\(a\+\)\+"),
     ({"alpha_pattern": {"(a+)+$": 3}}, UnsupportedModel, r"alpha_pattern .*\(a\+\)\+"),
     ("[", CorruptFile, "not valid JSON")],
)  # fmt: skip
def test_configurations_that_cannot_be_followed(
    tmp_path: Path, model: ModelArchitecture, config: Any, error: type[Exception], words: str
) -> None:
    write(tmp_path / "adapter_model.safetensors", pair(PEFT_STEM))
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(error, match=words):
        with_loras(model, [tmp_path])


# What has no effect, or one that was hardly meant ------------------------------------------------


def warned(model: ModelArchitecture, *loras: Any) -> list[str]:
    return [text for text in with_loras(model, loras).warnings if "The LoRA" in text]


def scaled(path: Path, alphas: tuple[float, ...], *more: str) -> Path:
    """Write a LoRA with a patch for each alpha, and a difference for each of ``more``."""
    tensors: dict[str, Any] = {}
    for alpha, stem in zip(alphas, list(MODULES)[:3], strict=False):
        rows, columns = MODULES[stem][1]
        tensors[f"{stem}.lora_down.weight"] = torch.ones(RANK, columns)
        tensors[f"{stem}.lora_up.weight"] = torch.ones(rows, RANK)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    tensors |= {f"{stem}.diff_b": torch.ones(MODULES[stem][1][0]) for stem in more}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("alphas", "more", "idle"),
    [
        ((0.0,), (), True), ((0.0, 0.0, 0.0), (), True), ((0.0, 1.0), (), False),
        ((1.0, 0.0), (), False), ((1e-30,), (), False), ((0.0,), ("blocks.1.ffn.0",), False),
    ],
)  # fmt: skip
def test_an_alpha_of_0_is_said(
    tmp_path: Path, model: ModelArchitecture, alphas: tuple[float, ...], more: tuple[str, ...],
    idle: bool,
) -> None:  # fmt: skip
    path = scaled(tmp_path / "style.safetensors", alphas, *more)
    found = warned(model, path)
    assert [("alpha is 0" in text, "style" in text) for text in found] == [(True, True)] * idle


@pytest.mark.parametrize("alpha", [0, 0.0, 4])
def test_an_alpha_of_0_in_a_configuration_is_said(
    tmp_path: Path, model: ModelArchitecture, alpha: float
) -> None:
    path = write(tmp_path / "adapter_model.safetensors", pair("transformer.blocks.0.attn1.to_q"))
    config = {"peft_type": "LORA", "lora_alpha": alpha}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert ["alpha is 0" in text for text in warned(model, path)] == [True] * (alpha == 0)


def test_a_strength_of_0_and_a_file_given_twice_are_said(
    tmp_path: Path, model: ModelArchitecture
) -> None:
    one, other = (scaled(tmp_path / f"{name}.safetensors", (1.0,)) for name in ("one", "other"))
    assert warned(model, one, other) == []
    (text,) = warned(model, (one, "both", 0.0))
    assert "one.safetensors" in text and "strength is 0" in text
    (text,) = warned(model, one, (other, "both", 2.0), (one, "both", -0.5))
    assert "one.safetensors" in text and "given 2 times" in text and "1 + -0.5" in text
    assert "given 3 times" in warned(model, one, one, one)[-1]
    # One of strength 0 adds nothing to the other.
    assert not any("times" in text for text in warned(model, one, (one, "both", 0.0)))
    # Given to the description first, and with the call then.
    assert "given 2 times" in warned(with_loras(model, [one]), one)[-1]


def test_a_file_for_each_expert_is_not_given_twice(tmp_path: Path) -> None:
    shapes = layouts.transformer(DIM, 512, 2, 16)
    high, low = (
        layouts.write_sparse(tmp_path / f"{e}_noise.safetensors", layouts.stored(shapes, "bf16"))
        for e in ("high", "low")
    )
    files = WanModelFiles(transformer=high, transformer_2=low)
    pair_of = ArchitectureDetector().detect_model_architecture(files)
    one = scaled(tmp_path / "one.safetensors", (1.0,))
    assert warned(pair_of, (one, "high", 1.0), (one, "low", 0.8)) == []
    for again in ("high", "both"):
        assert "2 times" in warned(pair_of, (one, "high", 1.0), (one, again, 0.8))[-1]


OTHER_MODELS = {
    "LTX": "diffusion_model.transformer_blocks.0.attn1.to_q",
    "CogVideoX": "transformer.transformer_blocks.0.attn1.to_q",
    "without a prefix": "transformer_blocks.0.attn1.to_q",
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_blocks_of_another_model_are_not_wans(
    tmp_path: Path, model: ModelArchitecture, other: str
) -> None:
    """Of the same width, too: a LoRA of CogVideoX 5B is as wide as Wan 2.2 5B."""
    path = write(tmp_path / "other.safetensors", pair(OTHER_MODELS[other]))
    found = inspect_file(path)
    assert found.kind == "lora" and "for Wan" not in found.title
    with pytest.raises(ModelMismatch, match=r"match nothing in the transformer"):
        with_loras(model, [path])


@pytest.mark.parametrize(
    ("stem", "words"),
    [("vace_blocks.0.self_attn.q", "VACE"), ("vace_patch_embedding", "VACE"),
     ("face_adapter.fuser_blocks.0.linear1_q", "Animate"),
     ("motion_encoder.enc.fc.0", "Animate"), ("pose_patch_embedding", "Animate")],
)  # fmt: skip
def test_parts_of_vace_and_animate_do_not_refuse_the_rest(
    tmp_path: Path, model: ModelArchitecture, stem: str, words: str
) -> None:
    tensors = {**pair("diffusion_model.blocks.0.self_attn.q"), **pair(f"diffusion_model.{stem}")}
    path = write(tmp_path / "l.safetensors", tensors)
    (note,) = read(path, model.transformer).notes
    assert words in note and "2 of 4 tensors" in note and "left out" in note
    alone = write(tmp_path / "alone.safetensors", pair(f"diffusion_model.{stem}"))
    with pytest.raises(ModelMismatch, match="Nothing in the LoRA"):
        read(alone, model.transformer)
