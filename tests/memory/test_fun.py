"""The Fun models in estimates: weights of the real layers, activations against a dry run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from support.dry_run import DryModel
from support.machines import architecture, cpu, gpu
from support.true_models import DTYPES, KEEP_FP32, transformer

from wan_core.forward import fun_inputs, lean_forward
from wan_core.forward import transformer as lean
from wan_core.loading.blueprint import add_fun_layers
from wan_core.memory import Choices, Workload, estimate
from wan_core.models import PARTS, VARIANTS, rest_bytes, sizes
from wan_core.models.variants import TransformerShape

NAMES = (
    "wan2.1-fun-control-14b", "wan2.2-fun-control-a14b", "wan2.2-fun-control-5b",
    "wan2.1-fun-camera-1.3b", "wan2.2-fun-camera-a14b", "wan2.2-fun-inp-5b",
)  # fmt: skip


@cache
def dry(shape: TransformerShape, dtype: str) -> DryModel:
    def build() -> torch.nn.Module:
        model = transformer(shape, layers=2)
        add_fun_layers(model, shape)
        return model

    return DryModel(build, DTYPES[dtype], KEEP_FP32)


@pytest.mark.parametrize("name", NAMES)
def test_weights_outside_the_blocks_are_those_of_the_layers(name: str) -> None:
    shape = VARIANTS[name].transformer
    model = dry(shape, "bf16").module
    blocks = sum(p.numel() * p.element_size() for p in model.blocks.parameters())
    found = rest_bytes(architecture(name, bare=True), "transformer", "bf16")
    assert found == dry(shape, "bf16").weight_bytes - blocks
    assert sizes.fun_parameters(shape) == sum(
        p.numel()
        for part in ("ref_conv", "control_adapter")
        for p in getattr(model, part, torch.nn.Module()).parameters()
    )


FORWARDS: Mapping[str, Callable[..., Any]] = {
    "diffusers": lambda model: nullcontext(), "lean": lean_forward,
    "rows": lambda model: lean_forward(model, exact=False),
}  # fmt: skip


QUICK = [
    ("wan2.1-fun-control-14b", "lean"),
    ("wan2.2-fun-control-5b", "lean"),
    ("wan2.1-fun-camera-1.3b", "rows"),
    ("wan2.1-fun-camera-1.3b", "diffusers"),
]
CASES = QUICK + [
    pytest.param(name, way, marks=pytest.mark.slow)
    for name in NAMES for way in FORWARDS if (name, way) not in QUICK
]  # fmt: skip


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_denoising_step_agrees_with_the_dry_run(
    monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    """Of an image-led clip with all that the model reads, at 480x832 and 81 frames."""
    found, kind = architecture(name), torch.bfloat16
    shape, vae = found.transformer, found.variant.vae
    scale, five = vae.scale_factor_spatial, found.variant.expand_timesteps
    width, height, frames = 832, 480, 21
    in_front = int(shape.reference_channels is not None)
    size = (frames + in_front, height // scale, width // scale)
    tokens = size[0] * (size[1] // 2) * (size[2] // 2)
    frame = tokens // size[0]
    runs = (0, frame, 2 * frame) if in_front else (0, frame)
    # The runs of equal timesteps are read from values, which fake tensors do not have.
    monkeypatch.setattr(lean, "_runs_of", lambda timestep: runs)

    def run(model: torch.nn.Module) -> object:
        camera = reference = None
        if shape.camera_channels:
            camera = torch.empty(1, 24, frames, height, width, dtype=kind)
        if in_front:
            reference = torch.empty(1, shape.reference_channels, *size[1:], dtype=kind)
        with FORWARDS[way](model), fun_inputs(model, reference, camera):
            return model(
                torch.empty(1, shape.in_channels, *size, dtype=kind),
                torch.empty(1, tokens) if five else torch.empty(1),
                torch.empty(1, 512, shape.text_dim, dtype=kind),
                torch.empty(1, 257, 1280, dtype=kind) if shape.image_dim else None,
                return_dict=False,
            )

    live = dry(shape, "bf16").peak(run)
    job = Workload(
        width=width, height=height, num_frames=81, guidance_high=False, guidance_low=False,
        image=True, references=in_front, camera=shape.camera_channels is not None,
    )  # fmt: skip
    dtypes = dict.fromkeys(PARTS, "bf16")
    choices = Choices(dtypes=dtypes, lean=way != "diffusers", by_rows=way == "rows")
    # cuDNN's copies of a camera's rays are no tensors: a card's estimate is held in render's tests.
    machine = cpu(80) if shape.camera_channels else gpu(80)
    stages = {one.name: one for one in estimate(found, job, choices, machine).stages}
    ours = next(v for k, v in stages.items() if k.startswith("denoise")).activation_bytes
    # Besides the forward, the loop holds six copies of the latents and the condition.
    latents = vae.z_dim * size[1] * size[2] * 4
    held = 6 * latents * (frames + in_front)
    held += (shape.in_channels - vae.z_dim) * 4 * size[1] * size[2] * (frames + in_front)
    # On a GPU, of which the estimate is, the 5B's timesteps are embedded for every token at first.
    assert -0.02 <= (ours - held) / live - 1 <= (0.05 if five else 0.03)


def test_a_camera_costs_its_rays_and_a_reference_a_frame() -> None:
    camera = architecture("wan2.2-fun-camera-a14b")
    job = Workload(width=832, height=480, num_frames=81, guidance_high=False)
    choices = Choices(dtypes=dict.fromkeys(PARTS, "bf16"))

    def denoise(found: Any, wanted: Workload) -> int:
        stages = estimate(found, wanted, choices, gpu(80)).stages
        return next(one for one in stages if one.name == "denoise_low").activation_bytes

    with_rays = denoise(camera, replace(job, camera=True))
    assert with_rays - denoise(camera, job) == 24 * 21 * 480 * 832 * 2
    # In windows only what one sees is there.
    windows = replace(job, window_frames=41, camera=True)
    less = denoise(camera, windows) - denoise(camera, replace(windows, camera=False))
    assert less == pytest.approx(24 * 11 * 480 * 832 * 2, rel=0.001)
    control = architecture("wan2.2-fun-control-a14b")
    more = denoise(control, replace(job, references=1)) / denoise(control, job)
    assert more == pytest.approx(22 / 21, rel=0.01)
