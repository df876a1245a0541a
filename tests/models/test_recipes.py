"""What a file must say of itself to count as distilled, and what says so without a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import tiny_models
from support import wan_layouts as layouts

from wan_core.detect.detector import ArchitectureDetector
from wan_core.models import few_steps_hint, recipe_of

detect = ArchitectureDetector().detect_model_architecture
SHAPES = layouts.shallow(layouts.FILES["t2v-1.3b"][0])

# Path -> the recipe's name and the place that says so; None where nothing does.
PLACES = {
    # A file's own name, whatever the user's folder is called.
    "loras/lightx2v_4steps/my_style.safetensors": None,
    "wan/lightx2v-4steps/wan2.1_t2v_14B_fp16.safetensors": None,
    "lightning/high_noise_model.safetensors": None,
    "lightx2v/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf": None,
    # A name that says only which part it is: published so, in a folder that says what it is.
    "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors": (
        "lightx2v", "folder name"),
    "Wan2.2-Lightning-4steps/diffusion_pytorch_model-00001-of-00006.safetensors": (
        "lightx2v", "folder name"),
    "FastWan2.1-T2V-1.3B-Diffusers/transformer": ("FastWan", "folder name"),
    "models--FastVideo--FastWan2.1-T2V-1.3B-Diffusers/snapshots/0a1b2c/transformer": (
        "FastWan", "folder name"),
    # A dot is no end of a folder's name.
    "Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v": ("lightx2v", "file name"),
    "Wan2_2-TI2V-5B-FastWanFullAttn_bf16.safetensors": ("FastWan", "file name"),
    "self_forcing/self_forcing_dmd.pt": ("Self-Forcing", "file name"),
    "Wan2_1-T2V-1_3B-Self-Forcing-DMD_fp16.safetensors": ("Self-Forcing", "file name"),
}  # fmt: skip


@pytest.mark.parametrize("path", PLACES)
def test_a_file_is_taken_at_its_own_word(path: str) -> None:
    found = recipe_of(f"/models/{path}")
    wanted = PLACES[path]
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert found.name == wanted[0] and wanted[1] in found.reason


def test_a_description_tells_what_a_file_goes_with() -> None:
    """Styles recommend the distilled LoRA beside them; a title is the file's own."""
    for key, distilled in (("modelspec.description", False), ("modelspec.title", True)):
        assert (
            recipe_of("/x/style.safetensors", {key: "lightx2v 4 steps"}) is not None
        ) is distilled


HINTS = {  # (name, for a checkpoint, for a LoRA)
    "wan2.2-rapid-mega-aio-v12.safetensors": (True, False),
    "Wan14BT2VFusioniX_fp16.safetensors": (True, True),
    "Wan2.1_I2V_14B_FusionX_LoRA.safetensors": (True, True),
    "Wan2_1_AccVid_T2V_14B_lora_rank32.safetensors": (True, True),
    "wan_8steps_distill.safetensors": (True, True),
    "wan22_14B_6_steps.gguf": (True, False),
    "distill_of_roses.safetensors": (True, False),
    "turbo_car_effect.safetensors": (True, False),
    "FastWan_8steps.safetensors": (True, True),
    "Wan22-Lightning-fp8_high.safetensors": (True, False),
    "lightning_storm_effect.safetensors": (True, False),
    "wan2.2-seko.gguf": (True, False),
    "lightx2v_8steps.safetensors": (True, True),
    "Wan2.1-Turbo-8steps.safetensors": (True, True),
    "hyper_wan_lora_2_steps.safetensors": (True, True),
    "wan2.1_t2v_14B_fp16.safetensors": (False, False),
    "lightx2v_4steps.safetensors": (False, False),  # which has a recipe
    "trained_2000steps.safetensors": (False, False),
}


@pytest.mark.parametrize("name", HINTS)
def test_few_steps_without_a_recipe_are_warned_of(name: str) -> None:
    said = tuple(few_steps_hint(f"/x/{name}", whole=whole) for whole in (True, False))
    assert tuple(bool(text) for text in said) == HINTS[name]
    assert all(name in text and "num_inference_steps" in text for text in said if text)


def test_a_distilled_checkpoint_is_never_run_in_silence(tmp_path: Path) -> None:
    """With a recipe it is offered and said; without one the official steps are warned of."""
    for name, recipe in (("FastWan2.1-T2V-1.3B", "FastWan"), ("wan2.1-fusionx", None), ("wan", "")):
        path = layouts.write_sparse(
            tmp_path / f"{name}.safetensors", layouts.stored(SHAPES, "bf16")
        )
        found = detect(path)
        assert (found.recipe.name if found.recipe else None) == (recipe or None)
        assert any("probably distilled" in text for text in found.warnings) == (recipe is None)
        assert any("distilled for" in text for text in found.reasons) == bool(recipe)


def test_the_pipeline_of_a_folder_says_that_it_is_distilled(tmp_path: Path) -> None:
    """FastVideo's folders name a pipeline that runs nothing else, whatever they are called."""
    tiny_models.make_folder(tmp_path / "mine", "wan2.1-t2v")
    assert detect(tmp_path / "mine").recipe is None
    file = tmp_path / "mine" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "WanDMDPipeline"}))
    found = detect(tmp_path / "mine")
    assert found.recipe is not None and found.recipe.name == "FastWan"
    assert "WanDMDPipeline" in found.recipe.reason
