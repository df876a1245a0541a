"""What ComfyUI's own conditioning nodes give a model, and what is sampled with it, is ours too.

The nodes of a real ComfyUI run in a process of its own, with a small VAE and small models; without
one the tests are skipped and say what is missing. Conditions are equal within 1e-5 of their norm,
the latents of whole runs within 1e-4. Left out is where the two differ on purpose: pictures of
another size (cropped there, stretched here), soft masks (not thresholded there), Fun Control
without a reference (left out there, a zero latent here) and known frames of Fun Control (encoded
alone there, in the whole clip here); see docs/differences.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reference_layouts as layouts
from support.comfy_server import find_checkout, find_python, told_by_comfyui
from support.tiny_models import components, make_folder, make_transformer
from torch import Tensor

from wan_core import GenerationConfig, WanControl, WanPipelineLoader
from wan_core.config import WanModelFiles
from wan_core.models import VAE_21
from wan_core.render.conditions import ConditionMaker

CHECKOUT = find_checkout()
PYTHON = find_python(CHECKOUT) if isinstance(CHECKOUT, Path) else CHECKOUT
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON)),
]

FRAMES, WIDTH, HEIGHT, SEED, STEPS, GUIDANCE = 9, 64, 48, 5, 4, 3.0
TRACKS = json.dumps(
    [[{"x": 8 + 3 * i, "y": 30} for i in range(13)], [{"x": 50, "y": 40 - 2 * i} for i in range(9)]]
)
PAIRS = {
    "vace": "wan2.2-vace-fun-a14b", "fun": "wan2.2-fun-control-a14b", "i2v": "wan2.2-i2v-a14b",
    "camera": "wan2.2-fun-camera-a14b",
}  # fmt: skip
# name: ComfyUI's node, its inputs (names of tensors or values), and the model that samples with it.
JOBS: dict[str, dict[str, Any]] = {
    "vace": {"node": "WanVaceToVideo", "model": "vace", "inputs": {
        "strength": 0.7, "control_video": "video", "control_masks": "mask",
        "reference_image": "reference",
    }},
    "fun 2.1": {"node": "WanFunControlToVideo", "inputs": {
        "start_image": "start", "control_video": "video",
    }},
    "fun 2.2": {"node": "Wan22FunControlToVideo", "model": "fun", "inputs": {
        "ref_image": "reference", "control_video": "video",
    }},
    "first and last": {"node": "WanFirstLastFrameToVideo", "model": "i2v", "inputs": {
        "start_image": "start", "end_image": "end",
    }},
    "tracks": {"node": "WanTrackToVideo", "model": "i2v", "inputs": {
        "tracks": TRACKS, "temperature": 220.0, "topk": 2, "start_image": "start",
    }},
    "camera": {"node": "WanCameraImageToVideo", "model": "camera", "inputs": {
        "camera_conditions": "rays",
    }},
}  # fmt: skip
SAMPLED = [name for name, job in JOBS.items() if "model" in job]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write small models and a VAE under their original names, texts' embeddings and pictures."""
    folder = tmp_path_factory.mktemp("nodes")
    state = torch.get_rng_state()
    torch.manual_seed(3)
    parts = components(
        "wan2.1-fun-control", vae={"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    )
    make_folder(folder / "fun21", "wan2.1-fun-control", parts=parts)
    save_file(layouts.original_vae(layouts.state_of(parts["vae"]), 2), folder / "vae.safetensors")
    shape = {"num_attention_heads": 1, "attention_head_dim": 128, "text_dim": 4096}
    for name, family in PAIRS.items():
        model = make_transformer(family, **shape)
        with torch.no_grad():  # a fresh one moves the latents by hardly anything
            model.proj_out.weight.mul_(4.0)
        weights = layouts.original_transformer(layouts.state_of(model))
        for expert in ("high", "low"):
            save_file(weights, folder / f"wan2.2_{name}_{expert}_noise_14B.safetensors")
    tensors = {name: torch.zeros(1, 512, 4096) for name in ("positive", "negative")}
    for name, tokens in (("positive", 9), ("negative", 4)):
        tensors[name][:, :tokens] = torch.randn(1, tokens, 4096)
    for name, count in (("video", FRAMES), ("reference", 1), ("start", 1), ("end", 1)):
        tensors[name] = torch.rand(count, HEIGHT, WIDTH, 3)
    tensors["mask"] = (torch.rand(FRAMES, HEIGHT, WIDTH) > 0.6).float()
    torch.set_rng_state(state)
    save_file(tensors, folder / "tensors.safetensors")
    return folder


@pytest.fixture(scope="module")
def theirs(files: Path) -> dict[str, Tensor]:
    """Return what ComfyUI's nodes made and sampled."""
    jobs = {
        name: job | ({"model": str(transformer(files, job["model"]))} if "model" in job else {})
        for name, job in JOBS.items()
    }
    given = {
        "tensors": str(files / "tensors.safetensors"), "vae": str(files / "vae.safetensors"),
        "size": {"width": WIDTH, "height": HEIGHT, "length": FRAMES}, "seed": SEED,
        "steps": STEPS, "cfg": GUIDANCE, "jobs": jobs,
    }  # fmt: skip
    return told_by_comfyui("comfy_nodes.py", given, files, CHECKOUT, PYTHON)


def transformer(files: Path, name: str, expert: str = "high") -> Path:
    return files / f"wan2.2_{name}_{expert}_noise_14B.safetensors"


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    WanPipelineLoader().clear_cache()


def job_of(name: str, given: dict[str, Tensor], rays: Tensor) -> dict[str, Any]:
    """Return what WanFit is asked for in place of a node."""
    video = given["video"]
    return {
        "vace": {"control": WanControl(
            video=video, mask=given["mask"], reference=given["reference"], strength=0.7
        )},
        "fun 2.1": {"control": WanControl(video=video), "image": given["start"][0]},
        "fun 2.2": {"control": WanControl(video=video, reference=given["reference"])},
        "first and last": {"image": given["start"][0], "last_image": given["end"][0]},
        "tracks": {"control": WanControl(tracks=TRACKS), "image": given["start"][0]},
        "camera": {"control": WanControl(camera=rays)},
    }[name]  # fmt: skip


def ours(
    files: Path, theirs: dict[str, Tensor], name: str, patch: pytest.MonkeyPatch, **changes: Any
) -> tuple[Any, Tensor]:
    """Return the conditions that WanFit makes for a job, and its latents as in a LATENT."""
    given, model = load_file(files / "tensors.safetensors"), JOBS[name].get("model")
    source: Any = files / "fun21"
    texts: dict[str, Any] = {"prompt": "a red cat"}
    if model is not None:
        source = WanModelFiles(
            transformer=transformer(files, model), transformer_2=transformer(files, model, "low"),
            vae=files / "fun21" / "vae",
        )  # fmt: skip
        texts = {"prompt_embeds": given["positive"], "negative_prompt_embeds": given["negative"]}
        texts["guidance_scale_2"] = GUIDANCE
    settings: dict[str, Any] = {
        "width": WIDTH, "height": HEIGHT, "num_frames": FRAMES, "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE, "flow_shift": 5.0, "seed": SEED, "scheduler": "euler",
        "sigma_schedule": "simple",
    }  # fmt: skip
    made: list[Any] = []
    make = ConditionMaker.make

    def remembered(maker: ConditionMaker) -> Any:
        made.append(make(maker))
        return made[-1]

    patch.setattr(ConditionMaker, "make", remembered)
    wrapper = WanPipelineLoader().load_wan_pipeline(
        source, optimization_config={"device": "cpu", "precision": "fp32"}
    )
    config = GenerationConfig(**(settings | texts | job_of(name, given, theirs["rays"]) | changes))
    result = wrapper.generate(config).raise_for_error()
    return made[0], result.vae_latents


def normalized(latents: Tensor) -> Tensor:
    """As ComfyUI's ``process_latent_in``, of each 16 channels."""
    mean, std = (
        torch.tensor(values * (latents.shape[1] // 16)).view(1, -1, 1, 1, 1)
        for values in (VAE_21.latents_mean, VAE_21.latents_std)
    )
    return (latents - mean) / std


def condition(theirs: dict[str, Tensor], name: str) -> Tensor:
    """Return a node's condition as ComfyUI's model gives it to the transformer."""
    if name == "vace":
        return torch.cat([normalized(theirs["vace.vace_frames"]), theirs["vace.vace_mask"]], 1)
    latents = normalized(theirs[f"{name}.concat_latent_image"])
    if name == "fun 2.1":
        return latents
    known = 1 - theirs[f"{name}.concat_mask"]
    known = known.expand(1, 4, *known.shape[2:])
    return torch.cat([latents[:, :-16], known, latents[:, -16:]], dim=1)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference relative to that of ``b``."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", JOBS)
def test_the_condition_is_the_node_s(
    files: Path, theirs: dict[str, Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions, _ = ours(files, theirs, name, monkeypatch, num_inference_steps=1)
    if name == "camera":  # without a start image the node says nothing else
        assert torch.equal(conditions.camera, theirs["camera.camera_conditions"])
        assert not conditions.concat.any()
        return
    found = conditions.concat if conditions.vace is None else conditions.vace
    expected = condition(theirs, name)
    assert found.shape == expected.shape and distance(found, expected) < 1e-5
    if name == "fun 2.2":
        reference = normalized(theirs["fun 2.2.reference_latents"])[:, :, 0]
        assert distance(conditions.reference, reference) < 1e-5


@pytest.mark.parametrize("name", SAMPLED)
def test_the_latents_are_comfyui_s(
    files: Path, theirs: dict[str, Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = ours(files, theirs, name, monkeypatch)
    assert found.shape == theirs[f"{name}.latents"].shape == (1, 16, 3, 6, 8)
    assert distance(found, theirs[f"{name}.latents"]) < 1e-4


@pytest.mark.parametrize("name", ["vace", "fun 2.2", "camera"])
def test_without_its_control_the_latents_are_others(
    files: Path, theirs: dict[str, Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the comparison above can fail."""
    _, found = ours(files, theirs, name, monkeypatch, control=None)
    assert distance(found, theirs[f"{name}.latents"]) > 1e-3
