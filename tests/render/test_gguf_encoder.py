"""umT5 in Q8_0 with its own tokenizer makes the clip that the same safetensors file makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import gguf_umt5, single_files
from support import reference_layouts as layouts

from wan_core import GenerationConfig, WanModelFiles, WanPipelineLoader
from wan_core.detect import find_companions, inspect_file
from wan_core.errors import CorruptFile

PROMPT = "a red Ｃａｆｅ\u0301 cat 猫 🙂 moves  right"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small A14B, its encoder in Q8_0 and the same values in a safetensors file."""
    root = tmp_path_factory.mktemp("models")
    single_files.write(root)
    folder = root / "text_encoders"
    state = load_file(folder / single_files.TEXT)
    tokenizer = state.pop("spiece_model")
    spiece = tokenizer.numpy().tobytes()
    named = layouts.gguf_umt5(state)
    _, truth = gguf_umt5.write_encoder(folder / "umt5-Q8_0.gguf", named, spiece)
    gguf_umt5.write_encoder(folder / "umt5-bare-Q8_0.gguf", named, None)
    back = dict(zip(named, state, strict=True))
    same = {back[name]: value for name, value in truth.items()}
    assert not torch.equal(same["shared.weight"], state["shared.weight"])
    save_file(same | {"spiece_model": tokenizer}, root / "same.safetensors")
    (folder / single_files.TEXT).unlink()
    return root


def files(models: Path, **changes: Path | None) -> WanModelFiles:
    diffusion = models / "diffusion_models"
    paths: dict[str, Path | None] = {
        "transformer_2": diffusion / single_files.LOW, "vae": models / "vae" / single_files.VAE,
    } | changes  # fmt: skip
    return WanModelFiles(transformer=diffusion / single_files.HIGH, **paths)


def frames(model: WanModelFiles) -> torch.Tensor:
    wrapper = WanPipelineLoader().load_wan_pipeline(model)
    result = wrapper.generate(
        GenerationConfig(prompt=PROMPT, num_frames=5, width=32, height=32, num_inference_steps=2)
    )
    result.raise_for_error()
    return result.frames


def test_the_frames_are_those_of_the_safetensors_file(models: Path) -> None:
    gguf = models / "text_encoders" / "umt5-Q8_0.gguf"
    wanted = frames(files(models, text_encoder=models / "same.safetensors"))
    assert torch.equal(frames(files(models, text_encoder=gguf)), wanted)
    # The tokenizer of one file with the weights of another.
    bare = models / "text_encoders" / "umt5-bare-Q8_0.gguf"
    assert torch.equal(frames(files(models, text_encoder=bare, tokenizer=gguf)), wanted)


def test_companions_find_it_and_take_it_before_one_without(models: Path) -> None:
    present = {
        name: sorted((models / folder).iterdir())
        for name, folder in (
            ("text_encoder", "text_encoders"), ("vae", "vae"), ("transformer_2", "diffusion_models")
        )
    }  # fmt: skip
    assert len(present["text_encoder"]) == 2
    given = files(models, transformer_2=None, vae=None)
    found = find_companions(given, present, inspect_file).files
    assert found.text_encoder == models / "text_encoders" / "umt5-Q8_0.gguf"
    wanted = frames(files(models, text_encoder=models / "same.safetensors"))
    assert torch.equal(frames(found), wanted)


def test_a_damaged_tokenizer_is_told_before_anything_is_loaded(
    models: Path, tmp_path: Path
) -> None:
    data = (models / "text_encoders" / "umt5-Q8_0.gguf").read_bytes()
    path = tmp_path / "umt5.gguf"
    path.write_bytes(data.replace(b"tokenizer.ggml.scores", b"tokenizer.ggml.sc0res"))
    with pytest.raises(CorruptFile, match="scores is missing, an array was expected"):
        WanPipelineLoader().load_wan_pipeline(files(models, text_encoder=path))
