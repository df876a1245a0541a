"""Ways that are to give equal bits on a card multiply and convolve the same tensors there.

Found on a CPU: the calls are recorded with all that a card's kernels are chosen by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.cases import slow_but
from support.recorded import recorded
from support.tiny_models import (
    ANIMATE,
    FACE_SIZE,
    FUN_FAMILIES,
    VACE_FAMILIES,
    components,
    make_folder,
    open_wan,
    pipeline,
)
from torch import Tensor

from wan_core import GenerationConfig, WanControl
from wan_core.forward import timestep
from wan_core.sampling import encode_keyframes, prepare_picture

pytestmark = pytest.mark.usefixtures("without_gradients")
FRAMES, SIDE = 9, 32
PICTURES = ("wan2.1-i2v", "wan2.1-flf2v", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b")
QUICK = ("wan2.2-fun-control-a14b", "wan2.2-ti2v-5b", ANIMATE)
WAYS: list[dict[str, Any]] = [
    {"forward": "lean"}, {"offload": "sequential"}, {"offload": "stream", "resident_blocks": 1},
]  # fmt: skip


def some(*shape: int) -> Tensor:
    """Numbers of pictures, as a node gives them: a pixel's colours side by side."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def job_of(family: str) -> GenerationConfig:
    """All that a family reads."""
    _, _, reference, camera, _ = FUN_FAMILIES.get(family, (0, 0, 0, 0, False))
    given: dict[str, Any] = {}
    if camera:
        given["camera"] = some(1, 24, 3, SIDE, SIDE)
    elif "control" in family or family in VACE_FAMILIES or family == ANIMATE:
        given["video"] = some(FRAMES, SIDE, SIDE, 3)
    if reference or family in VACE_FAMILIES or family == ANIMATE:
        given["reference"] = some(1, SIDE, SIDE, 3)
    if family == ANIMATE:
        given["face_video"] = some(FRAMES, FACE_SIZE, FACE_SIZE, 3)
    more: dict[str, Any] = {}
    if family in (*PICTURES, *FUN_FAMILIES):
        more["image"] = some(SIDE, SIDE, 3)
    if family == "wan2.1-flf2v":
        more["last_image"] = some(SIDE, SIDE, 3)
    return GenerationConfig(
        prompt="a red cat", negative_prompt="a dog", num_frames=FRAMES, width=SIDE, height=SIDE,
        num_inference_steps=1, seed=7, guidance_scale=3.0,
        control=WanControl(**given) if given else None, **more,
    )  # fmt: skip


FAMILIES = (*PICTURES, *FUN_FAMILIES, *VACE_FAMILIES, ANIMATE, "wan2.2-t2v-a14b")


@pytest.mark.parametrize("family", slow_but(lambda family: family in QUICK, FAMILIES))
def test_the_lean_ways_make_the_calls_of_diffusers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a card the timesteps of all tokens are embedded, where a CPU embeds one of each run.
    monkeypatch.setattr(timestep, "_one_per_run", timestep._all_tokens)
    folder = make_folder(tmp_path / family, family)

    def run(**way: Any) -> Any:
        wrapper = open_wan(folder, precision="bf16", **{"offload": "none", **way})
        return recorded(lambda: wrapper.generate(job_of(family)).raise_for_error().latents)

    expected, calls = run(forward="diffusers")
    for way in WAYS if family not in QUICK else WAYS[:1]:
        latents, found = run(**way)
        assert found == calls, way
        assert torch.equal(latents, expected), way


@pytest.mark.parametrize("family", PICTURES)
def test_pictures_are_encoded_with_the_calls_of_the_pipeline(family: str) -> None:
    """That both forwards agree says nothing of how the pipeline's pictures lie in memory."""
    parts = components(family)
    pipe, vae = pipeline(family, parts, image=True), parts["vae"]
    given = {"image": some(SIDE, SIDE, 3)}
    if family == "wan2.1-flf2v":
        given["last_image"] = some(SIDE, SIDE, 3).flip(0)
    ready = {name: as_image(value) for name, value in given.items()}

    def theirs() -> Tensor:
        made = pipe.video_processor
        pixels = {name: made.preprocess(one, SIDE, SIDE).float() for name, one in ready.items()}
        found: Any = pipe.prepare_latents(
            pixels["image"], 1, 16, SIDE, SIDE, FRAMES, torch.float32, torch.device("cpu"), None,
            torch.zeros(()), pixels.get("last_image"),
        )  # fmt: skip
        return found[1]

    def ours() -> Tensor:
        leading = family == "wan2.2-ti2v-5b"
        at = {"image": 0, "last_image": FRAMES - 1}
        found = encode_keyframes(
            vae,
            {at[name]: prepare_picture(one, SIDE, SIDE) for name, one in ready.items()},
            num_frames=1 if leading else FRAMES,
            device=torch.device("cpu"),
            check=lambda: None,
        )
        return found[:, 4:] if leading else found

    (expected, calls), (found, made) = recorded(theirs), recorded(ours)
    assert torch.equal(found, expected)
    assert made == calls


def as_image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).byte().numpy())
