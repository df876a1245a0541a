"""companions: the parts of a pipeline are found among the files that are there, with reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import wan_layouts as layouts

from wan_core.config import WanModelFiles
from wan_core.detect.companions import find_companions
from wan_core.detect.detector import ArchitectureDetector, inspect_file
from wan_core.errors import MissingFile, UnsupportedModel

FILES = {
    "diffusion_models": {
        "wan2.2_i2v_high_noise_14B_fp16": ("i2v-a14b", "fp16"),
        "wan2.2_i2v_low_noise_14B_fp16": ("i2v-a14b", "fp16"),
        # Of another set, and the same expert again: neither is the partner.
        "a_finetune_i2v_low_noise_14B_fp16": ("i2v-a14b", "fp16"),
        "wan2.2_i2v_HIGH_noise_14B_fp16": ("i2v-a14b", "fp16"),
        "wan2.2_t2v_low_noise_14B_fp16": ("t2v-14b", "fp16"),
        "wan2.2_ti2v_5B_fp16": ("ti2v-5b", "fp16"), "wan2.1_i2v_480p_14B_bf16": ("i2v-14b", "bf16"),
    },
    "vae": {"wan_2.1_vae": ("vae 2.1", "bf16"), "wan2.2_vae": ("vae 2.2", "fp16"),
            "another_2.1_vae": ("vae 2.1", "fp16")},
    "text_encoders": {"umt5_xxl_fp8_e4m3fn_scaled": ("umt5", "fp8_scaled old"),
                      "umt5_xxl_fp16": ("umt5", "fp16"), "t5xxl_fp16": ("t5", "fp16")},
    "clip_vision": {"clip_vision_h": ("clip", "fp16"), "clip_l": ("clip small", "fp16")},
}  # fmt: skip
SHAPES = {name: layouts.shallow(shapes) for name, (shapes, _) in layouts.FILES.items()} | {
    "vae 2.1": layouts.vae_21(), "vae 2.2": layouts.vae_22(), "umt5": layouts.umt5(layers=2),
    "t5": layouts.umt5(layers=2, every_block=False), "clip": layouts.clip_vision(),
    "clip small": layouts.clip_vision(768),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for folder, files in FILES.items():
        (root / folder).mkdir()
        for name, (shapes, kind) in files.items():
            file = layouts.stored(SHAPES[shapes], kind)
            layouts.write_sparse(root / folder / f"{name}.safetensors", file)
        (root / folder / "broken.safetensors").write_bytes(b"\0" * 100)
    return root


def present(models: Path) -> dict[str, list[Path]]:
    folders = {"vae": "vae", "text_encoder": "text_encoders", "image_encoder": "clip_vision",
               "transformer_2": "diffusion_models"}  # fmt: skip
    return {name: sorted((models / folder).iterdir()) for name, folder in folders.items()}


def find(models: Path, name: str, **given: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    path = models / "diffusion_models" / f"{name}.safetensors"
    found = find_companions(WanModelFiles(transformer=path, **given), present(models), inspect_file)
    ArchitectureDetector().detect_model_architecture(found.files)
    fields = ("transformer_2", "vae", "text_encoder", "image_encoder")
    chosen = {n: getattr(found.files, n) for n in fields}
    return {n: Path(p).stem for n, p in chosen.items() if p}, found.reasons


def test_a_pair(models: Path) -> None:
    chosen, reasons = find(models, "wan2.2_i2v_high_noise_14B_fp16")
    assert chosen == {
        "transformer_2": "wan2.2_i2v_low_noise_14B_fp16", "vae": "wan_2.1_vae",
        "text_encoder": "umt5_xxl_fp16",
    }  # fmt: skip
    assert any("another_2.1_vae.safetensors would do too" in text for text in reasons)
    assert any("a proposal" in text for text in reasons)


def test_the_low_noise_file_finds_no_partner(models: Path) -> None:
    """The socket says it is the only or the high-noise model; nothing is swapped silently."""
    chosen, _ = find(models, "wan2.2_i2v_low_noise_14B_fp16")
    assert "transformer_2" not in chosen


def test_the_5b_finds_its_own_vae(models: Path) -> None:
    chosen, _ = find(models, "wan2.2_ti2v_5B_fp16")
    assert chosen == {"vae": "wan2.2_vae", "text_encoder": "umt5_xxl_fp16"}


def test_an_image_encoder_only_where_one_is_needed(models: Path) -> None:
    chosen, _ = find(models, "wan2.1_i2v_480p_14B_bf16")
    assert chosen["image_encoder"] == "clip_vision_h" and "transformer_2" not in chosen


def test_what_is_named_stays(models: Path) -> None:
    vae = models / "vae" / "another_2.1_vae.safetensors"
    chosen, reasons = find(models, "wan2.2_i2v_high_noise_14B_fp16", vae=vae)
    assert chosen["vae"] == "another_2.1_vae" and not any(r.startswith("VAE") for r in reasons)


def text_encoders(folder: Path) -> dict[str, Path]:
    """Encoders of the same width: with a tokenizer in their file, without, or with a broken one."""
    shapes = layouts.umt5(layers=2)
    names = {"token_embd.weight": (256384, 4096), "enc.blk.0.attn_q.weight": (4096, 4096)}
    names |= {f"enc.blk.{block}.attn_rel_b.weight": (32, 64) for block in range(2)}
    key = "tokenizer.ggml."
    words = [f"word{number}" for number in range(40)]
    arrays = {f"{key}model": "t5", f"{key}tokens": words, f"{key}scores": [-1.0] * 40}
    broken = arrays | {f"{key}scores": [-1.0] * 39}
    bare = layouts.stored(shapes, "bf16")
    whole = layouts.stored(shapes, "bf16")
    whole.tensors["spiece_model"] = ("U8", (4_548_313,))
    folder.mkdir()
    return {
        "bare": layouts.write_sparse(folder / "a-bf16.safetensors", bare),
        "whole": layouts.write_sparse(folder / "b-bf16.safetensors", whole),
        "gguf": layouts.write_sparse_gguf(folder / "c.gguf", names, 12, 256, 144, arrays),
        "bare gguf": layouts.write_sparse_gguf(folder / "d.gguf", names, 12, 256, 144),
        "broken gguf": layouts.write_sparse_gguf(folder / "e.gguf", names, 12, 256, 144, broken),
    }


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (("bare", "whole", "gguf"), "whole"),
        (("bare", "whole", "bare gguf"), "whole"),
        (("bare", "bare gguf", "gguf"), "gguf"),
        (("bare", "broken gguf", "whole"), "whole"),
        (("bare", "bare gguf"), "bare"),
        (("broken gguf", "bare"), "bare"),
    ],
)
def test_an_encoder_that_carries_its_tokenizer_comes_first(
    models: Path, tmp_path: Path, there: tuple[str, ...], chosen: str
) -> None:
    encoders = text_encoders(tmp_path / "text_encoders")
    main = models / "diffusion_models" / "wan2.2_ti2v_5B_fp16.safetensors"
    files = present(models) | {"text_encoder": [encoders[name] for name in there]}
    found = find_companions(WanModelFiles(transformer=main), files, inspect_file)
    assert found.files.text_encoder == encoders[chosen]
    # With a tokenizer named, precision alone decides.
    named = WanModelFiles(transformer=main, tokenizer=tmp_path)
    found = find_companions(named, files, inspect_file)
    assert found.files.text_encoder == encoders["bare" if "bare" in there else chosen]


def test_nothing_fits(models: Path) -> None:
    path = models / "diffusion_models" / "wan2.2_ti2v_5B_fp16.safetensors"
    vaes = [models / "vae" / "wan_2.1_vae.safetensors"]
    with pytest.raises(MissingFile, match=r"No VAE with 48 .* \(looked at wan_2.1_vae.safeten"):
        find_companions(WanModelFiles(transformer=path), {"vae": vaes}, inspect_file)
    with pytest.raises(MissingFile, match="no files there"):
        find_companions(WanModelFiles(transformer=path), {}, inspect_file)


def test_a_transformer_that_is_none(models: Path) -> None:
    path = models / "vae" / "wan_2.1_vae.safetensors"
    found = find_companions(WanModelFiles(transformer=path), present(models), inspect_file)
    with pytest.raises(UnsupportedModel, match="is a Wan 2.1 VAE"):
        ArchitectureDetector().detect_model_architecture(found.files)
