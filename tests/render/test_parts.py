"""Parts that do not belong together are refused before the first step, and right ones are used."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import reference_layouts as layouts
from support import single_files, tiny_models

from wan_core import GenerationConfig, WanModelFiles, WanPipelineLoader
from wan_core.errors import MissingFile, ModelMismatch, UnsupportedModel, WanError
from wan_core.render.stages import StageRunner


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    single_files.write(root)
    return root


def files(models: Path, **changes: Any) -> WanModelFiles:
    named = {
        "transformer": models / "diffusion_models" / single_files.HIGH,
        "transformer_2": models / "diffusion_models" / single_files.LOW,
        "vae": models / "vae" / single_files.VAE,
        "text_encoder": models / "text_encoders" / single_files.TEXT,
    }
    return WanModelFiles(**(named | changes))


def failure(given: WanModelFiles, **job: Any) -> tuple[Exception | None, list[int]]:
    """Return the error of opening or running a model, and the steps that were made."""
    steps: list[int] = []
    config = GenerationConfig(
        prompt="a red cat", num_frames=5, width=64, height=64, num_inference_steps=2,
        progress_callback=lambda done, total, latents: steps.append(done), **job,
    )  # fmt: skip
    try:
        wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(given)
    except WanError as error:
        return error, steps
    return wrapper.generate(config).error, steps


def spiece_of(size: int) -> bytes:
    import sentencepiece

    draw, out = random.Random(0), io.BytesIO()
    lines = [
        " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(8))
        for _ in range(2000)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=size, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return out.getvalue()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_tokenizer_of_another_model_is_refused_before_the_encoder_is_read(
    models: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    real = StageRunner.use

    def watched(self: StageRunner, stage: str, component: str) -> Any:
        used.append(component)
        return real(self, stage, component)

    monkeypatch.setattr(StageRunner, "use", watched)
    other = tmp_path / "spiece.model"
    other.write_bytes(spiece_of(3000))
    error, steps = failure(files(models, tokenizer=other if kind == "file" else tmp_path))
    assert isinstance(error, ModelMismatch) and "embeddings for" in str(error)
    assert not steps and not used


@pytest.mark.parametrize("out", [12, 4])
def test_a_vae_of_another_head_is_refused(models: Path, tmp_path: Path, out: int) -> None:
    state = load_file(models / "vae" / single_files.VAE)
    for name in ("decoder.head.2.weight", "decoder.head.2.bias"):
        state[name] = state[name].repeat(4, *[1] * (state[name].ndim - 1))[:out].contiguous()
    path = tmp_path / "Wan2.1_VAE_upscale2x.safetensors"
    save_file(state, path)
    error, steps = failure(files(models, vae=path))
    assert isinstance(error, UnsupportedModel) and f"decoder makes {out}" in str(error)
    assert not steps


def test_one_expert_of_an_image_pair_is_refused(models: Path, tmp_path: Path) -> None:
    parts = tiny_models.components(
        "wan2.2-i2v-a14b", seed=7, transformer=single_files.TRANSFORMER,
        vae=single_files.VAE_NUMBERS,
    )  # fmt: skip
    path = tmp_path / "mix_i2vHighV30.safetensors"
    state = layouts.original_transformer(layouts.state_of(parts["transformer"]))
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    picture = Image.new("RGB", (64, 64))
    error, steps = failure(files(models, transformer=path, transformer_2=None), image=picture)
    assert isinstance(error, MissingFile) and "makes no clean video alone" in str(error)
    assert not steps


def test_an_estimate_counts_each_part_of_a_file_by_its_own_bytes(
    models: Path, tmp_path: Path
) -> None:
    """What else lies in the transformer's file is not held while it works."""
    high = models / "diffusion_models" / single_files.HIGH
    state = {f"model.diffusion_model.{n}": v for n, v in load_file(high).items()}
    state["text_encoders.umt5xxl.transformer.shared.weight"] = torch.zeros(4096, 1024)
    save_file(state, tmp_path / "aio.safetensors")
    job = GenerationConfig(prompt="x", num_frames=5, width=64, height=64)
    weights = []
    for path in (high, tmp_path / "aio.safetensors"):
        wrapper = WanPipelineLoader().load_wan_pipeline(
            files(models, transformer=path, transformer_2=None)
        )
        stages = wrapper.estimate_memory_usage(job).stages
        weights.append(next(one.weights_bytes for one in stages if one.name.startswith("denoise")))
    assert weights[0] == weights[1] > 0
