"""Both Animates from files as people have them: the bits of the same weights dequantised at load.

What a file means is written down as a bf16 file by code that is not the library's. A LoRA in the
layout of lightx2v's for image-to-video is held against its changes added to the weights by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import animate_files, single_files
from support.stored_models import write_gguf, write_safetensors
from torch import Tensor

from wan_core import GenerationConfig, WanControl, WanLoRA, WanModelFiles, WanPipelineLoader

pytestmark = pytest.mark.usefixtures("mapped")

WIDTH, HEIGHT, LENGTH, FRAMES = 32, 32, 5, 9  # two segments
DIM, FFN = 256, 512  # a row of Q4_K has blocks of 256
NAMES = {1: "wan2.2_animate_14B", 2: "wan_animate_2"}
RESIDENT, STREAMED = {"offload": "none"}, {"offload": "stream", "resident_blocks": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    single_files.write(folder)
    animate_files.write_clip(folder / animate_files.CLIP)
    return folder


def state_of(number: int) -> dict[str, Tensor]:
    """The small Animate's tensors under their official names, in bf16."""
    found = animate_files.random_state(animate_files.shapes(number, 0, DIM, FFN))
    return {name: (value / 2).to(torch.bfloat16) for name, value in found.items()}


def matrices(state: dict[str, Tensor]) -> set[str]:
    """What is stored in a kind: the matrices of the blocks and of the face's adapters, but one."""
    chosen = {n for n in state if n.startswith(("blocks.", "face_adapter.fuser_blocks."))}
    chosen = {n for n in chosen if n.endswith(".weight") and state[n].ndim == 2}
    return chosen - {"blocks.1.cross_attn.v.weight"}


def stored(home: Path, number: int, kind: str) -> tuple[Path, Path]:
    """Write a model as ``kind`` and what that file means in bf16, once for each kind."""
    end = "gguf" if kind.startswith("Q") else "safetensors"
    path = home / f"{NAMES[number]}_{kind}.{end}"
    meant = home / f"{NAMES[number]}_{kind}_meant.safetensors"
    if not path.exists():
        state = state_of(number)
        chosen = matrices(state)
        if end == "gguf":
            meanings = write_gguf(path, state, chosen, kind)
        else:
            meanings = write_safetensors(path, state, chosen, kind, "notes")
        assert set(meanings) == chosen
        save_file({**state, **{n: m(torch.bfloat16) for n, m in meanings.items()}}, meant)
    return path, meant


def opened(home: Path, transformer: Path, loras: Any = (), **wishes: Any) -> Any:
    files = WanModelFiles(
        transformer=transformer, vae=home / "vae" / single_files.VAE,
        text_encoder=home / "text_encoders" / single_files.TEXT,
        image_encoder=home / animate_files.CLIP,
    )  # fmt: skip
    wishes = {"device": "cpu", "precision": "bf16", "offload": "none"} | wishes
    return WanPipelineLoader().load_wan_pipeline(files, loras=loras, optimization_config=wishes)


def latents(wrapper: Any, number: int, **job: Any) -> Tensor:
    g = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {
        "reference": torch.rand(1, HEIGHT, WIDTH, 3, generator=g),
        "video": torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=g),
    }
    if number == 1:
        given["face_video"] = torch.rand(FRAMES, 512, 512, 3, generator=g)
    wanted: dict[str, Any] = {
        "prompt": "a red cat", "width": WIDTH, "height": HEIGHT, "num_frames": 0,
        "num_inference_steps": 1, "guidance_scale": 3.0, "seed": 1, "max_chunk_size": LENGTH,
        "control": WanControl(**given),
    }  # fmt: skip
    result = wrapper.generate(GenerationConfig(**wanted | job)).raise_for_error()
    assert result.latents is not None and bool(torch.isfinite(result.latents).all())
    return result.latents


def stored_layers(wrapper: Any) -> list[str]:
    """The layers of the transformer whose weights are as stored, by name."""
    loaded = [module for _, module in wrapper._cache.loaded() if hasattr(module, "blocks")]
    return [n for model in loaded for n, layer in model.named_modules() if hasattr(layer, "stored")]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (2, "int8_convrot"),
        pytest.param(2, "Q4_K", marks=pytest.mark.slow),
        pytest.param(2, "Q8_0", marks=pytest.mark.slow),
        pytest.param(1, "int8_convrot", marks=pytest.mark.slow),
        (1, "Q8_0"),
        pytest.param(1, "Q4_K", marks=pytest.mark.slow),
    ],
)
def test_a_stored_file_gives_the_bits_of_what_it_means(home: Path, number: int, kind: str) -> None:
    path, meant = stored(home, number, kind)
    expected = latents(opened(home, meant), number)
    for wishes in (RESIDENT, STREAMED):
        wrapper = opened(home, path, **wishes)
        assert torch.equal(latents(wrapper, number), expected)
        kept = stored_layers(wrapper)
        # Animate 1's keys and values of a face lie in one matrix, whose halves become plain.
        assert len(kept) == len(matrices(state_of(number))) - (number == 1)


def lightx2v(
    state: dict[str, Tensor], rank: int = 4
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a LoRA as ``lightx2v_I2V_14B_..._rank64``, and what it adds to each weight.

    Matrices of the blocks, those of the picture included; differences of biases, norms and of what
    is around the blocks. Nothing of it is for the face.
    """
    g, tensors, changes = torch.Generator().manual_seed(5), {}, {}
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".")
        if name.startswith(("face_", "motion_", "pose_")) or leaf == "modulation":
            continue
        if name.startswith("blocks.") and value.ndim == 2:
            down = torch.randn(rank, value.shape[1], generator=g) / 20
            up = torch.randn(value.shape[0], rank, generator=g) / 20
            tensors[f"diffusion_model.{layer}.lora_down.weight"] = down
            tensors[f"diffusion_model.{layer}.lora_up.weight"] = up
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(2.0)
            changes[name] = up.double() @ down.double() * (2 / rank)
        else:
            change = torch.randn(value.shape, generator=g) / 50
            end = "diff_b" if leaf == "bias" else "diff"
            tensors[f"diffusion_model.{layer}.{end}"] = change
            changes[name] = change.double()
    return tensors, changes


@pytest.mark.parametrize("number", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_lora_is_what_it_adds_to_the_weights(home: Path, tmp_path: Path, number: int) -> None:
    state = {name: value.float() for name, value in state_of(number).items()}
    tensors, changes = lightx2v(state)
    lora = tmp_path / "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"
    plain, by_hand = (tmp_path / f"{NAMES[number]}_{name}.safetensors" for name in ("a", "b"))
    save_file(tensors, lora)
    save_file(state, plain)
    merged = {
        name: (value.double() + 0.7 * changes[name]).float() if name in changes else value
        for name, value in state.items()
    }
    save_file(merged, by_hand)
    fp32 = {"precision": "fp32"}
    one = {"num_frames": LENGTH}  # of the video, its first segment
    expected = latents(opened(home, by_hand, **fp32), number, **one)
    without = latents(opened(home, plain, **fp32), number, **one)
    wrapper = opened(home, plain, [WanLoRA(lora, strength=0.7)], **fp32 | STREAMED)
    wrong = (latents(wrapper, number, **one) - expected).abs().max()
    assert wrong < 1e-4 * (without - expected).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "kind"), [(2, "int8_convrot"), (2, "Q8_0"), (1, "Q8_0")])
def test_a_lora_on_stored_weights(home: Path, tmp_path: Path, number: int, kind: str) -> None:
    path, meant = stored(home, number, kind)
    lora = tmp_path / "lora.safetensors"
    save_file(lightx2v(state_of(number))[0], lora)
    expected = latents(opened(home, meant, [WanLoRA(lora)]), number)
    assert not torch.equal(expected, latents(opened(home, meant), number))
    for wishes in (RESIDENT, STREAMED):
        assert torch.equal(latents(opened(home, path, [WanLoRA(lora)], **wishes), number), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "kind"), [(2, "int8_convrot"), (2, "Q4_K"), (1, "Q8_0")])
def test_by_rows_too(home: Path, tmp_path: Path, number: int, kind: str) -> None:
    """Products by rows, with a LoRA on them: the bits of the same on what the file means."""
    path, meant = stored(home, number, kind)
    lora = tmp_path / "lora.safetensors"
    save_file(lightx2v(state_of(number))[0], lora)
    rows = {"forward": "lean_rows"}
    for loras in ([], [WanLoRA(lora)]):
        expected = latents(opened(home, meant, loras, **rows), number)
        for wishes in (RESIDENT, STREAMED):
            found = latents(opened(home, path, loras, **rows, **wishes), number)
            assert torch.equal(found, expected)
