"""Published files: their headers, to the byte where the size is known, and what they are taken for.

Also the ways in which published and community files differ from the official ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import published
from support import wan_layouts as layouts

from wan_core.config import WanModelFiles
from wan_core.detect.detector import ArchitectureDetector, inspect_file
from wan_core.errors import CorruptFile, MissingFile, UnsupportedModel
from wan_core.models import VARIANTS, transformer_tensors

detect = ArchitectureDetector().detect_model_architecture
FILES = {name: shapes for name, (shapes, _) in layouts.FILES.items()}
SMALL = layouts.shallow(FILES["t2v-14b"])
IMAGE = layouts.shallow(FILES["i2v-14b"])
LAST = layouts.shallow(FILES["flf2v-14b"])


def sparse(path: Path, file: layouts.Stored) -> Path:
    return layouts.write_sparse(path, file)


def plus(shapes: layouts.Shapes, more: dict[str, tuple[str, tuple[int, ...]]]) -> layouts.Stored:
    file = layouts.stored(shapes, "bf16")
    return layouts.Stored(file.tensors | more)


# The fixtures are the published files ----------------------------------------------------------


@pytest.mark.parametrize("name", published.FINGERPRINTS)
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    assert published.fingerprint(FILES[name]) == published.FINGERPRINTS[name]


@pytest.mark.parametrize(
    ("variant", "reference", "md5"),
    [
        ("wan2.1-fun-control-1.3b", 16, "70ddad9d3a133785da5ea371aae09504"),
        ("wan2.1-fun-control-14b", None, "efa44cddf936c70abd0ea28b6cbe946c"),
    ],
)
def test_the_other_version_of_fun_control_is_the_published_one(
    variant: str, reference: int | None, md5: str
) -> None:
    """V1.0 of both sizes has no layer for a reference, V1.1 of both has one."""
    shape = replace(VARIANTS[variant].transformer, reference_channels=reference)
    assert published.fingerprint(transformer_tensors(shape, "original")) == md5


@pytest.mark.parametrize("name", published.SIZES)
def test_sizes_are_the_published_ones(name: str) -> None:
    make, size = published.SIZES[name]
    assert published.size_of(make()) == size


WHOLE: dict[str, tuple[Callable[[], layouts.Stored], str, str]] = {
    "wan2.1_t2v_14B_fp16": (
        lambda: published.comfy_fp16(FILES["t2v-14b"]), "wan2.1-t2v-14b", "fp16"),
    "wan2.2_t2v_high_noise_14B_fp8_scaled": (
        lambda: published.comfy_scaled(FILES["t2v-14b"]), "wan2.1-t2v-14b", "fp8_scaled"),
    "wan2.2_i2v_high_noise_14B_fp8_scaled": (
        lambda: published.comfy_scaled(FILES["i2v-a14b"]), "wan2.2-i2v-a14b", "fp8_scaled"),
    "wan2.1_i2v_480p_14B_fp8_scaled": (
        lambda: published.comfy_scaled(FILES["i2v-14b"]), "wan2.1-i2v-14b", "fp8_scaled"),
    "Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ": (
        lambda: published.kijai_scaled(FILES["i2v-a14b"]), "wan2.2-i2v-a14b", "fp8_scaled"),
    "Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ": (
        lambda: published.kijai_scaled(FILES["t2v-14b"], "BF16"), "wan2.1-t2v-14b", "fp8_scaled"),
    "Wan2_1-FLF2V-14B-720P_fp16": (
        lambda: published.tagged(published.comfy_fp16(FILES["flf2v-14b"])), "wan2.1-flf2v-14b",
        "fp16"),
    "krea-realtime-video-14b": (
        lambda: layouts.Stored({f"model.{n}": ("BF16", s) for n, s in FILES["t2v-14b"].items()}),
        "wan2.1-t2v-14b", "bf16"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_transformers(tmp_path: Path, name: str) -> None:
    make, variant, kind = WHOLE[name]
    found = detect(sparse(tmp_path / f"{name}.safetensors", make()))
    assert (found.name, found.weight_kind) == (variant, kind)
    assert found.transformer == found.variant.transformer
    assert not [text for text in found.warnings if "experts" not in text]


ENCODERS = {
    "umt5_xxl_fp16": (published.comfy_umt5_fp16, "fp16", True),
    "umt5_xxl_fp8_e4m3fn_scaled": (published.comfy_umt5_scaled, "fp8_scaled", True),
    "umt5-xxl-enc-fp8_e4m3fn": (published.kijai_umt5_fp8, "fp8", False),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders(tmp_path: Path, name: str) -> None:
    make, kind, has_tokenizer = ENCODERS[name]
    path = sparse(tmp_path / f"{name}.safetensors", make())
    part = inspect_file(path)
    assert (part.kind, part.width, part.layers, part.vocabulary) == (
        "text_encoder", 4096, 24, 256384)  # fmt: skip
    assert part.weights.name == kind and not part.missing
    model = sparse(tmp_path / "wan.safetensors", layouts.stored(SMALL, "bf16"))
    found = detect(WanModelFiles(transformer=model, text_encoder=path))
    assert ("tokenizer" in found.components) == has_tokenizer
    said = [text for text in found.warnings if "carries no tokenizer" in text]
    assert bool(said) != has_tokenizer


def test_an_encoder_of_which_a_tensor_is_gone(tmp_path: Path) -> None:
    file = published.comfy_umt5_fp16(layers=3)
    del file.tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    part = inspect_file(sparse(tmp_path / "x.safetensors", file))
    assert part.missing == ("encoder.block.1.layer.1.DenseReluDense.wo.weight",)


def test_lost_blocks_are_told_of_with_the_file(tmp_path: Path) -> None:
    """One in the middle makes the file corrupt; the last ones leave a model of no known depth."""
    whole = FILES["t2v-1.3b"]
    for layout in ("original", "comfyui", "diffusers"):
        for lost in (17, 29):
            shapes = {n: s for n, s in whole.items() if not n.startswith(f"blocks.{lost}.")}
            file = layouts.relabel(layouts.stored(shapes, "bf16"), layout)
            path = sparse(tmp_path / "lost.safetensors", file)
            if lost == 17:
                with pytest.raises(CorruptFile, match=r"lost\.safetensors.*blocks\.17"):
                    detect(path)
            else:
                (text,) = [text for text in detect(path).warnings if "last blocks" in text]
                assert "lost.safetensors" in text and "29 blocks" in text and "30" in text
    for shapes in (whole, layouts.transformer(256, 512, 2, 16)):  # whole, and of a size of its own
        found = detect(sparse(tmp_path / "x.safetensors", layouts.stored(shapes, "bf16")))
        assert not any("last blocks" in text for text in found.warnings)


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
@pytest.mark.parametrize("lost", ["patch_embedding", "blocks.0", "blocks.1", "blocks.1.ffn"])
def test_a_part_of_a_model_named_alone_is_called_so(tmp_path: Path, lost: str, ending: str) -> None:
    """Whatever of the model it happens to lack, it is not damaged, and no other model."""
    shapes = layouts.transformer(256, 512, 3, 16)
    part = {n: s for n, s in shapes.items() if not n.startswith(lost + ".")}
    path = tmp_path / f"wan-00002-of-00003.{ending}"
    if ending == "gguf":
        layouts.write_sparse_gguf(path, part, 8, 32, 34)
    else:
        sparse(path, layouts.stored(part, "bf16"))
    with pytest.raises((CorruptFile, UnsupportedModel)) as caught:
        detect(path)
    text = str(caught.value)
    assert "part 2 of 3" in text and path.name in text and "ownload" not in text
    assert ("--merge" if ending == "gguf" else "Choose the folder") in text
    for name in ("wan-00001-of-00001", "wan"):  # which say nothing of other files
        whole = sparse(tmp_path / f"{name}.safetensors", layouts.stored(shapes, "bf16"))
        assert detect(whole).transformer.layers == 3


# A tag for the variant -------------------------------------------------------------------------


def test_a_tag_decides_nothing_that_the_structure_says(tmp_path: Path) -> None:
    for shapes, name in ((LAST, "wan2.1-flf2v-14b"), (SMALL, "wan2.1-t2v-1.3b")):
        file = layouts.stored(shapes, "bf16")
        plain = detect(sparse(tmp_path / "x.safetensors", file)).transformer
        for dtype in ("U8", "F32", "BF16"):
            tag = {"model_type.Wan2_1-FLF2V-14B-720P": (dtype, (1,))}
            tagged = layouts.Stored(file.tensors | tag)
            found = detect(sparse(tmp_path / "x.safetensors", tagged))
            assert found.transformer == plain, name


@pytest.mark.parametrize("layout", ["original", "comfyui", "diffusers"])
def test_a_tagged_model_without_its_positions_is_told(tmp_path: Path, layout: str) -> None:
    """The structure alone is image-to-video; the tag says that the table of positions is lost."""
    file = layouts.relabel(layouts.stored(IMAGE, "bf16"), layout)
    tag = layouts.PREFIXES[layout] + "model_type.Wan2_1-FLF2V-14B-720P"
    path = sparse(tmp_path / "x.safetensors", published.tagged(file, tag))
    with pytest.raises(CorruptFile, match="first-and-last-frame model, but lacks .*pos"):
        detect(path)


# Leftovers of LoRAs in a whole model -------------------------------------------------------------

LEFT = {
    "matrices": {"blocks.0.self_attn.q.lora_down.weight": ("BF16", (16, 5120)),
                 "blocks.0.self_attn.q.lora_up.weight": ("BF16", (5120, 16)),
                 "blocks.0.self_attn.q.alpha": ("F32", ())},
    "alpha alone": {"blocks.1.cross_attn.k.alpha": ("I64", ())},
    "differences": {"blocks.0.ffn.0.diff_b": ("BF16", (13824,)),
                    "blocks.0.norm3.diff": ("BF16", (5120,))},
    "of another style": {"diffusion_model.blocks.0.ffn.0.lora_A.default.weight": ("F16", (4, 5120)),
                         "lora_unet_blocks_1_ffn_2.lora_down.weight": ("F16", (4, 13824))},
    "another adapter": {"blocks.0.ffn.0.lokr_w1": ("F16", (4, 4))},
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_model_with_leftovers_of_a_lora_is_a_model(
    tmp_path: Path, case: str, prefix: str
) -> None:
    more = {prefix + name: tensor for name, tensor in LEFT[case].items()}
    file = layouts.relabel(layouts.stored(SMALL, "bf16"), "comfyui" if prefix else "original")
    path = sparse(tmp_path / "merged.safetensors", layouts.Stored(file.tensors | more))
    found = detect(path)
    plain = detect(sparse(tmp_path / "plain.safetensors", file))
    assert found.name == plain.name and found.transformer == plain.transformer
    (said,) = (text for text in found.warnings if "LoRA" in text)
    assert f"holds {len(more)} tensors that are a LoRA's" in said and "not used" in said
    assert found.components["transformer"].nbytes == plain.components["transformer"].nbytes


# Sentences that say what is so -------------------------------------------------------------------


def test_quanto_is_called_quanto(tmp_path: Path) -> None:
    file = layouts.stored(SMALL, "bf16")
    name = "blocks.0.ffn.0.weight"
    _, shape = file.tensors.pop(name)
    file.tensors |= {name + "._data": ("I8", shape), name + "._scale": ("BF16", (shape[0], 1))}
    with pytest.raises(UnsupportedModel, match="stored as quanto"):
        detect(sparse(tmp_path / "x.safetensors", file))


def test_a_folder_of_several_ggufs_is_not_empty(tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.GGUF"):
        layouts.write_sparse_gguf(tmp_path / name, SMALL, 8, 32, 34)
    with pytest.raises(MissingFile, match=r"holds 2 sets of weights \(a-Q4_K_M.gguf, a-Q8_0.GGUF"):
        inspect_file(tmp_path)
    (tmp_path / "a-Q4_K_M.gguf").unlink()
    assert inspect_file(tmp_path).kind == "transformer"


def test_hidden_files_are_no_files(tmp_path: Path) -> None:
    """macOS writes ._name beside each file; a half-made copy of rsync begins with a dot too."""
    sparse(tmp_path / "wan_custom.safetensors", layouts.stored(SMALL, "bf16"))
    for name in ("._wan_custom.safetensors", ".wan_custom.safetensors.Xa3b", "._x.gguf"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7" + bytes(4000))
    assert inspect_file(tmp_path).kind == "transformer"


def test_an_sft_file_in_a_folder(tmp_path: Path) -> None:
    sparse(tmp_path / "wan.sft", layouts.stored(SMALL, "bf16"))
    assert inspect_file(tmp_path).kind == "transformer"


# Distilled checkpoints ---------------------------------------------------------------------------

DISTILLED = "wan2.2_t2v_A14b_{}_noise_scaled_fp8_e4m3_lightx2v_4step_comfyui"


def test_a_distilled_checkpoint_is_said_to_be_one(tmp_path: Path) -> None:
    for role in ("high", "low"):
        path = tmp_path / f"{DISTILLED.format(role)}.safetensors"
        sparse(path, layouts.stored(SMALL, "bf16"))
    high, low = (tmp_path / f"{DISTILLED.format(role)}.safetensors" for role in ("high", "low"))
    found = detect(WanModelFiles(transformer=high, transformer_2=low))
    assert found.recipe is not None and "distilled for 4 steps" in " ".join(found.reasons)
    assert [what for what, _ in found.recipes()] == [f"The checkpoint {high.name}"]
    # Offered and not imposed.
    assert found.variant.defaults.num_inference_steps == 40
    other = sparse(tmp_path / "plain_low_noise.safetensors", layouts.stored(SMALL, "bf16"))
    mixed = detect(WanModelFiles(transformer=high, transformer_2=other))
    assert mixed.recipe is None and any("distilled" in text for text in mixed.reasons)
    assert any("nothing says the same of the other expert" in text for text in mixed.warnings)
    assert not any("the other expert" in text for text in found.warnings)


def test_a_folder_s_name_says_distilled(tmp_path: Path) -> None:
    folder = tmp_path / "Wan2.1-T2V-14B-lightx2v-4steps"
    folder.mkdir()
    sparse(folder / "model.safetensors", layouts.stored(SMALL, "bf16"))
    assert detect(folder).recipe is not None


def test_an_effect_is_not_distilled(tmp_path: Path) -> None:
    path = sparse(tmp_path / "thunder_lightning_wan.safetensors", layouts.stored(SMALL, "bf16"))
    assert detect(path).recipe is None


# Animate 2 has the shapes of image to video -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("x", {"config": '{"transformer": {"model_type": "animate2"}}'}),
        ("x", {"general.name": "Wan Animate 2 14B"}),
        ("wan_animate_2_bf16", {}),
        ("wan_animate_2_distill_fp8", {}),
        ("Wan-Animate-2.Q4_K", {}),
        ("WanAnimate2", {}),
    ],
)
def test_animate_2_is_told_from_image_to_video(
    tmp_path: Path, name: str, metadata: dict[str, str]
) -> None:
    file = layouts.Stored(layouts.stored(IMAGE, "bf16").tensors, metadata)
    found = detect(sparse(tmp_path / f"{name}.safetensors", file))
    assert found.name == "wan-animate-2-14b" and found.transformer.animate == 2
    assert any("says that it is Animate 2" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("wan_i2v_480p", {"config": "{}"}),
        ("x", {"config": "["}),
        ("x", {"config": '{"transformer": []}'}),
        ("wan_i2v_animate_20_steps", {"config": '{"transformer": {"model_type": "i2v"}}'}),
        ("animated_2d_style", {}),
    ],
)
def test_image_to_video_stays_image_to_video(
    tmp_path: Path, name: str, metadata: dict[str, str]
) -> None:
    file = layouts.Stored(layouts.stored(IMAGE, "bf16").tensors, metadata)
    assert detect(sparse(tmp_path / f"{name}.safetensors", file)).name == "wan2.1-i2v-14b"


def test_animate_2_distilled_has_a_recipe(tmp_path: Path) -> None:
    file = layouts.stored(IMAGE, "bf16")
    found = detect(sparse(tmp_path / "wan_animate_2_distill_int8_convrot.safetensors", file))
    assert found.name == "wan-animate-2-14b" and found.recipe is not None
    assert (found.recipe.num_inference_steps, found.recipe.guidance_scale) == (10, 1.0)
    assert (found.recipe.scheduler, found.recipe.flow_shift) == ("lcm", 5.0)
    place = tmp_path / "plain"  # a folder's name counts too, and this test's is in tmp_path's
    place.mkdir()
    plain = detect(sparse(place / "wan_animate_2_int8_convrot.safetensors", file))
    assert plain.recipe is None


def test_animate_2_in_the_names_of_its_release(tmp_path: Path) -> None:
    shapes = {n.replace("blocks.0.", "blocks.0.block."): s for n, s in IMAGE.items()}
    shapes = {n.replace("blocks.1.", "blocks.1.block."): s for n, s in shapes.items()}
    found = detect(sparse(tmp_path / "x.safetensors", layouts.stored(shapes, "bf16")))
    assert found.name == "wan-animate-2-14b" and found.transformer.animate == 2


def test_animate_2_in_the_names_of_diffusers_class(tmp_path: Path) -> None:
    renamed = {
        "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj",
        "v_img": "add_v_proj", "norm_k_img": "norm_added_k",
    }  # fmt: skip
    shapes = {}
    for name, shape in IMAGE.items():
        for old, new in renamed.items():
            name = name.replace(f"_attn.{old}.", f"_attn.{new}.")
        shapes[name] = shape
    found = detect(sparse(tmp_path / "x.safetensors", layouts.stored(shapes, "bf16")))
    assert found.name == "wan-animate-2-14b" and "_attn." in " ".join(found.reasons)


# What the Fun models read ------------------------------------------------------------------------


def test_reference_and_camera_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for name, numbers in {
        "fun-control-1.3b": (None, None), "fun-control-14b": (16, None),
        "fun-control-a14b": (16, None), "fun-control-5b": (48, None),
        "fun-camera-1.3b": (None, 24), "fun-camera-a14b": (None, 24), "fun-inp-5b": (None, None),
    }.items():  # fmt: skip
        shapes, (variant, *_) = layouts.FILES[name]
        found = detect(sparse(path, layouts.stored(layouts.shallow(shapes), "bf16")))
        assert found.name == variant
        assert (found.transformer.reference_channels, found.transformer.camera_channels) == numbers
    older = {n: s for n, s in FILES["fun-control-14b"].items() if not n.startswith("ref_conv")}
    found = detect(sparse(path, layouts.stored(older, "bf16")))  # V1.0: the same variant
    assert found.name == "wan2.1-fun-control-14b" and not found.custom_size
    assert found.transformer.reference_channels is None


@pytest.mark.parametrize(
    "lost", ["ref_conv.bias", "control_adapter.residual_blocks.0.conv2.weight"]
)
def test_a_fun_model_that_lacks_tensors(tmp_path: Path, lost: str) -> None:
    name = "fun-control-14b" if "ref" in lost else "fun-camera-14b"
    shapes = layouts.shallow(FILES[name])
    del shapes[lost]
    with pytest.raises(CorruptFile, match=f"lacks 1 of the tensors.*{lost}"):
        detect(sparse(tmp_path / "x.safetensors", layouts.stored(shapes, "bf16")))
