"""On a CUDA device: the Fun models' bits in every placement and forward, and their peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import FUN_FAMILIES, make_folder
from support.true_models import KEEP_FP32, transformer

from wan_core import GenerationConfig, WanControl, WanPipelineLoader
from wan_core.forward import fun_inputs, lean_forward
from wan_core.loading.blueprint import add_fun_layers
from wan_core.memory.forward import camera_peak
from wan_core.memory.forward_lean import lean_peak
from wan_core.models import VARIANTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
DEVICE = "cuda"
FRAMES, SIDE = 17, 64
WAYS: list[dict[str, Any]] = [
    {"offload": "none", "forward": "diffusers"}, {"offload": "model", "forward": "lean"},
    {"offload": "sequential"}, {"offload": "stream", "resident_blocks": 1},
]  # fmt: skip


def job_of(family: str) -> GenerationConfig:
    """All that a family reads, of a short clip in two windows."""
    g = torch.Generator().manual_seed(1)
    _, _, reference, camera, _ = FUN_FAMILIES[family]
    given: dict[str, Any] = {}
    if camera:
        given["camera"] = torch.randn(1, 24, 5, SIDE, SIDE, generator=g)
    elif "control" in family:
        given["video"] = torch.rand(FRAMES, SIDE, SIDE, 3, generator=g)
    if reference:
        given["reference"] = torch.rand(1, SIDE, SIDE, 3, generator=g)
    return GenerationConfig(
        prompt="a red cat", negative_prompt="a dog", num_frames=FRAMES, width=SIDE, height=SIDE,
        num_inference_steps=3, seed=7, image=torch.rand(SIDE, SIDE, 3, generator=g),
        max_chunk_size=13, window_overlap=4, control=WanControl(**given) if given else None,
    )  # fmt: skip


@pytest.mark.parametrize("family", FUN_FAMILIES)
def test_every_placement_and_forward_gives_the_same_bits(tmp_path: Path, family: str) -> None:
    folder, found = make_folder(tmp_path / family, family), []
    for way in WAYS:
        wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
            folder, optimization_config={"device": DEVICE, "precision": "bf16"} | way
        )
        found.append(wrapper.generate(job_of(family)).raise_for_error().latents)
    assert bool(torch.isfinite(found[0]).all())
    for way, latents in zip(WAYS, found, strict=True):
        assert torch.equal(latents, found[0]), way


@pytest.mark.parametrize("exact", [True, False], ids=["lean", "rows"])
@pytest.mark.parametrize("name", ["wan2.1-fun-camera-1.3b", "wan2.2-fun-control-a14b"])
def test_the_peak_of_a_forward_is_the_predicted_one(
    name: str, exact: bool, record_property: Callable[[str, object], None]
) -> None:
    """At true width, 480x832 and 81 frames, on two blocks; what the allocator counts."""
    shape, kind = VARIANTS[name].transformer, torch.bfloat16
    model = transformer(shape, layers=2)
    add_fun_layers(model, shape)
    model = model.to_empty(device=DEVICE).eval().requires_grad_(False)
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        torch.nn.init.normal_(tensor, std=0.01)
        if set(KEEP_FP32).isdisjoint(key.split(".")):  # as loading does
            tensor.data = tensor.data.to(kind)
    in_front = int(shape.reference_channels is not None)
    grid = (21 + in_front, 60, 104)
    numbers: dict[str, Any] = {
        "batch": 1, "latent_frames": grid[0], "latent_height": 60, "latent_width": 104, "size": 2,
    }  # fmt: skip
    predicted = lean_peak(shape, exact=exact, **numbers)
    rays = reference = None
    gc.collect()  # what earlier tests left must not go while this one is measured
    base = torch.cuda.memory_allocated()
    if shape.camera_channels:
        rays = torch.randn(1, 24, 21, 480, 832, device=DEVICE, dtype=kind)
        predicted = max(predicted, camera_peak(shape, channels_last=True, **numbers)) + rays.nbytes
    if in_front:
        reference = torch.randn(1, 16, *grid[1:], device=DEVICE, dtype=kind)
    call: dict[str, Any] = {
        "hidden_states": torch.randn(1, shape.in_channels, *grid, device=DEVICE, dtype=kind),
        "timestep": torch.tensor([777.0], device=DEVICE),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device=DEVICE, dtype=kind),
        "return_dict": False,
    }
    if shape.image_dim:
        image = torch.randn(1, 257, shape.image_dim, device=DEVICE, dtype=kind)
        call["encoder_hidden_states_image"] = image
    with torch.no_grad(), lean_forward(model, exact=exact), fun_inputs(model, reference, rays):
        model(**call)  # workspaces and kernels
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(**call)
    measured = torch.cuda.max_memory_allocated() - base
    record_property("measured / predicted", round(measured / predicted, 3))
    assert 0.85 <= measured / predicted <= 1.1, f"{measured:,} of the predicted {predicted:,}"
