"""Animate in estimates: weights of the real class, activations against a dry run of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.dry_run import DryModel
from support.machines import architecture, gpu
from support.true_models import (
    DTYPES,
    dry_transformer,
    dry_vae,
)

from wan_core.decoding import lean_encoder
from wan_core.forward import as_pixels, encode_faces, known_faces, lean_forward, run_together
from wan_core.memory import Choices, Workload, estimate, lean_peak, transformer_peak
from wan_core.memory.forward import face_peak
from wan_core.models import VARIANTS, all_blocks, rest_bytes, sizes
from wan_core.models.variants import VAE_21, FaceShape
from wan_core.sampling.vae import encode_latents

NAME = "wan2.2-animate-14b"
WHOLE = VARIANTS[NAME].transformer
# Two adapters on four blocks: what an adapter adds is alive while the next block computes.
SHAPE = replace(WHOLE, layers=4, face=replace(FaceShape(), adapters=2))
# Latent frames (the character's in front), height and width: 77 and 81 frames of video.
P480, P720, P720_81 = (21, 60, 104), (21, 90, 160), (22, 90, 160)
FORWARDS: Mapping[str, tuple[Callable[..., Any], Callable[..., int], dict[str, Any]]] = {
    "diffusers": (lambda model: nullcontext(None), transformer_peak, {}),
    "lean": (lean_forward, lean_peak, {}),
    "rows": (lambda m: lean_forward(m, exact=False), lean_peak, {"exact": False}),
}
# Hidden states alive at the peak at 480x832x77 in bf16, besides what the model is given.
STATES = {"diffusers": 13.09, "lean": 5.13, "rows": 3.87}


def dry(dtype: str) -> DryModel:
    return dry_transformer(SHAPE, dtype, fp32=("motion_synthesis_weight",))


def numbers(size: tuple[int, int, int]) -> dict[str, int]:
    names = ("latent_frames", "latent_height", "latent_width")
    return {"batch": 1, **dict(zip(names, size, strict=True))}


def call(kind: torch.dtype, size: tuple[int, int, int] = P480) -> dict[str, Any]:
    """A call of true shape, with the face as tokens."""
    frames, height, width = size
    return {
        "hidden_states": torch.empty(1, 36, *size, dtype=kind),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=kind),
        "encoder_hidden_states_image": torch.empty(1, 257, 1280, dtype=kind),
        "pose_hidden_states": torch.empty(1, 16, frames - 1, height, width, dtype=kind),
        "face_pixel_values": as_pixels(torch.empty(1, frames - 1, 5, WHOLE.dim, dtype=kind)),
        "return_dict": False,
    }


@pytest.mark.parametrize(
    ("way", "dtype", "size"),
    [
        ("diffusers", "bf16", P480),
        ("lean", "bf16", P720),
        pytest.param("lean", "bf16", P480, marks=pytest.mark.slow),
        pytest.param("rows", "bf16", P480, marks=pytest.mark.slow),
        pytest.param("lean", "fp32", P480, marks=pytest.mark.slow),
        pytest.param("diffusers", "bf16", P720, marks=pytest.mark.slow),
        pytest.param("rows", "bf16", P720, marks=pytest.mark.slow),
        pytest.param("lean", "bf16", P720_81, marks=pytest.mark.slow),
    ],
)
def test_a_forward_agrees_with_the_dry_run(
    way: str, dtype: str, size: tuple[int, int, int]
) -> None:
    kind = DTYPES[dtype]
    attach, predict, more = FORWARDS[way]

    def run(model: torch.nn.Module) -> object:
        with attach(model) as refused, known_faces(model):
            assert refused is None
            return model(**call(kind, size))

    live = dry(dtype).peak(run)
    predicted = predict(SHAPE, size=kind.itemsize, **numbers(size), **more)
    assert predicted == pytest.approx(live, rel=0.01), (predicted / 2**20, live / 2**20)
    if dtype == "bf16" and (size == P480 or way != "rows"):  # a stretch of rows has one size
        given = sum(v.nbytes for v in call(kind, size).values() if v is not False)
        hidden = size[0] * (size[1] // 2) * (size[2] // 2) * WHOLE.dim
        assert (live - given) / (hidden * 2) == pytest.approx(STATES[way], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("size", [P480, P720])
def test_both_passes_through_one_block_at_a_time(size: tuple[int, int, int]) -> None:
    def run(model: torch.nn.Module) -> object:
        one = call(torch.bfloat16, size)
        other = one | {"encoder_hidden_states": torch.empty(1, 512, 4096, dtype=torch.bfloat16)}
        with lean_forward(model), known_faces(model):
            return run_together(model, [one, other])

    live = dry("bf16").peak(run)
    assert lean_peak(SHAPE, size=2, passes=2, **numbers(size)) == pytest.approx(live, rel=0.03)


def test_encoding_a_face_takes_what_is_said() -> None:
    def run(model: torch.nn.Module) -> object:
        return encode_faces(model, torch.empty(1, 3, 17, 512, 512, dtype=torch.bfloat16))

    pixels = 3 * 17 * 512**2 * 2  # in RAM in a render
    live = dry("bf16").peak(run) - pixels
    assert live <= face_peak(WHOLE, size=2, frames=5) <= 1.1 * live


def test_bytes_are_those_of_the_real_class() -> None:
    model = dry("bf16").module
    names = dict(model.named_parameters())

    def bytes_of(prefix: str) -> int:
        return sum(p.numel() * p.element_size() for n, p in names.items() if n.startswith(prefix))

    bare = replace(architecture(NAME, bare=True), transformer=SHAPE)
    blocks = all_blocks(bare, "transformer", "bf16")
    order = ("blocks.0.", "face_adapter.0.", "blocks.1.", "blocks.2.", "face_adapter.1.")
    assert blocks[:5] == tuple(bytes_of(name) for name in order) and len(blocks) == 6
    rest = dry("bf16").weight_bytes - sum(blocks)
    assert rest_bytes(bare, "transformer", "bf16") == rest
    total = sum(p.numel() for p in names.values())
    assert sizes.transformer_parameters(SHAPE) == total
    assert sizes.transformer_parameters(WHOLE) == 17_274_816_884  # the published file


def test_a_stage_counts_the_character_s_frame() -> None:
    """The denoising stage of a segment: its forward has a latent frame more than the segment."""
    work = Workload(
        width=832, height=480, num_frames=153, window_frames=77, references=1,
        guidance_high=False, guidance_low=False, start_video=True, reference_picture=True,
    )  # fmt: skip
    choices = Choices(dtypes={"transformer": "bf16", "vae": "bf16"}, lean=True)
    stages = {s.name: s for s in estimate(architecture(NAME), work, choices, gpu(80)).stages}
    assert list(stages)[:4] == ["text_encode", "image_encode", "condition_encode", "control_encode"]
    forward = lean_peak(WHOLE, size=2, **numbers(P480))
    assert 0 < stages["denoise"].activation_bytes - forward < 0.08 * forward


def test_a_batch_s_later_segments_are_encoded_together() -> None:
    """Each of the clips hands over frames of its own; the first segment has none."""
    work = Workload(
        width=832, height=480, num_frames=153, window_frames=77, references=1, batch_size=2,
        guidance_high=False, guidance_low=False, start_video=True, reference_picture=True,
    )  # fmt: skip
    choices = Choices(dtypes={"transformer": "bf16", "vae": "bf16"}, lean=True)

    def said(work: Workload) -> int:
        stages = {s.name: s for s in estimate(architecture(NAME), work, choices, gpu(80)).stages}
        return stages["condition_encode"].activation_bytes

    def run(vae: Any) -> None:
        with lean_encoder(vae):
            pixels = (torch.empty(2, 3, n, 480, 832, dtype=torch.bfloat16) for n in (1, 4, 4))
            encode_latents(vae, pixels)

    live = dry_vae(VAE_21, "bf16").peak(run)
    # With the workspace of the convolutions, which a dry run does not see.
    assert live <= said(work) <= 1.4 * live
    assert said(replace(work, num_frames=77, window_frames=None)) < 0.7 * live
