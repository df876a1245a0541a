"""A control's latents for VACE, against what WanVACEPipeline makes of the same pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.clips import as_tensor, pixels
from support.tiny_models import components, pipeline
from torch import Tensor

from wan_core.sampling import ControlClip, encode_grey, encode_vace
from wan_core.sampling.vace import mask_channels

WIDTH, HEIGHT = 48, 32


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline("wan2.1-vace", components("wan2.1-vace"))


def diffusers(pipe: Any, frames: int, video: Any, mask: Any, references: Any) -> Tensor:
    pictures = None if video is None else [Image.fromarray(one) for one in video]
    masks = None if mask is None else [Image.fromarray(one) for one in mask]
    clip, soft, found = pipe.preprocess_conditions(
        pictures, masks, references, 1, HEIGHT, WIDTH, frames, torch.float32, torch.device("cpu")
    )
    latents = pipe.prepare_video_latents(clip, soft, found, None, torch.device("cpu"))
    return torch.cat([latents, pipe.prepare_masks(soft, found)], dim=1)


def ours(pipe: Any, clip: ControlClip) -> Tensor:
    def check() -> None: ...

    return encode_vace(
        pipe.vae, clip, check=check, grey=lambda: encode_grey(pipe.vae, clip, check=check)
    )


SOFT = pixels(17, HEIGHT, WIDTH, seed=1)
MASKS = {
    "none": None, "soft": SOFT, "black": SOFT * 0, "white": SOFT * 0 + 255,
    "one frame": np.where(np.arange(17)[:, None, None] == 4, SOFT, 0).astype(np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_video_and_mask_equal_diffusers(
    pipe: Any, frames: int, mask: str, dtype: torch.dtype
) -> None:
    video, given = pixels(frames, HEIGHT, WIDTH, 3), MASKS[mask]
    given = None if given is None else given[:frames]
    pipe.vae.to(dtype)
    try:
        expected = diffusers(pipe, frames, video, given, None)
        clip = ControlClip(
            num_frames=frames, width=WIDTH, height=HEIGHT, video=as_tensor(video),
            mask=None if given is None else as_tensor(given),
        )  # fmt: skip
        assert torch.equal(ours(pipe, clip), expected)
    finally:
        pipe.vae.to(torch.float32)


@pytest.mark.parametrize("sizes", [[], [(48, 32)], [(33, 41), (200, 64), (64, 200)]])
def test_references_equal_diffusers(pipe: Any, sizes: list[tuple[int, int]]) -> None:
    found = [Image.fromarray(pixels(h, w, 3, seed=h)) for w, h in sizes]
    expected = diffusers(pipe, 9, None, None, found or None)
    clip = ControlClip(num_frames=9, width=WIDTH, height=HEIGHT, references=found)
    assert torch.equal(ours(pipe, clip), expected)
    tensors = [as_tensor(np.asarray(one)) for one in found]
    clip = ControlClip(num_frames=9, width=WIDTH, height=HEIGHT, references=tensors)
    assert torch.equal(ours(pipe, clip), expected)
    assert expected.shape[2] == 3 + len(sizes)


@pytest.mark.parametrize("frames", [1, 5, 9, 33, 81, 121])
def test_the_masks_frames_are_those_diffusers_picks(pipe: Any, frames: int) -> None:
    mask = torch.rand(frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    clip = ControlClip(num_frames=frames, width=WIDTH, height=HEIGHT, mask=mask)
    soft = ((2.0 * mask - 1.0 + 1) / 2)[None, None].expand(1, 3, -1, -1, -1)
    assert torch.equal(mask_channels(clip), pipe.prepare_masks(soft, [[]]))


def test_key_frames_equal_a_hand_made_video_and_mask(pipe: Any) -> None:
    frames, at = 17, (0, 6, 16)
    pictures = pixels(3, HEIGHT, WIDTH, 3, seed=4)
    video, mask = torch.full((frames, HEIGHT, WIDTH, 3), 0.5), torch.ones(frames, HEIGHT, WIDTH)
    for index, picture in zip(at, pictures, strict=True):
        video[index], mask[index] = as_tensor(picture), 0
    made = ControlClip(num_frames=frames, width=WIDTH, height=HEIGHT, video=video, mask=mask)
    clip = ControlClip(
        num_frames=frames, width=WIDTH, height=HEIGHT,
        keyframes=list(zip(at, map(Image.fromarray, pictures), strict=True)),
    )  # fmt: skip
    assert torch.equal(ours(pipe, clip), ours(pipe, made))


def test_cleared_is_what_is_painted_grey_by_hand(pipe: Any) -> None:
    video, mask = as_tensor(pixels(9, HEIGHT, WIDTH, 3)), as_tensor(SOFT[:9])
    size: dict[str, Any] = {"num_frames": 9, "width": WIDTH, "height": HEIGHT, "mask": mask}
    grey = torch.where((mask > 0.5)[..., None], 0.5, video)
    left = ours(pipe, ControlClip(**size, video=video))
    cleared = ours(pipe, ControlClip(**size, video=video, clear_masked=True))
    assert torch.equal(cleared, ours(pipe, ControlClip(**size, video=grey)))
    assert not torch.equal(cleared, left)
    assert torch.equal(cleared[:, :16], left[:, :16])  # what is kept is kept


def test_another_size_is_resized_and_one_mask_holds_for_all_frames(pipe: Any) -> None:
    small = torch.zeros(1, 16, 24)
    small[:, :, 12:] = 1
    clip = ControlClip(num_frames=9, width=WIDTH, height=HEIGHT, mask=small)
    assert clip.mask_at(5).shape == (HEIGHT, WIDTH)
    assert torch.equal(clip.mask_at(5), clip.mask_at(0))
    assert clip.hard_mask(0)[:, :24].sum() == 0 and bool(clip.hard_mask(0)[:, 24:].all())
    large = ControlClip(num_frames=9, width=WIDTH, height=HEIGHT, video=torch.rand(9, 64, 96, 3))
    assert large.frame(3).shape == (1, 3, HEIGHT, WIDTH)
    assert ours(pipe, large).shape == (1, 96, 3, HEIGHT // 8, WIDTH // 8)


def test_grey_is_encoded_only_where_it_is_needed(pipe: Any) -> None:
    def check() -> None: ...

    asked: list[int] = []

    def grey() -> Tensor:
        asked.append(1)
        return encode_grey(pipe.vae, clip, check=check)

    size: dict[str, Any] = {"num_frames": 5, "width": WIDTH, "height": HEIGHT}
    video = as_tensor(pixels(5, HEIGHT, WIDTH, 3))
    for more, count in (
        ({"video": video, "mask": as_tensor(SOFT[:5])}, 0),
        ({"video": video}, 1),
        ({"video": video, "mask": torch.zeros(1, HEIGHT, WIDTH)}, 1),
        ({"video": video, "mask": as_tensor(SOFT[:5]), "clear_masked": True}, 1),
        ({}, 2),
    ):
        clip = ControlClip(**size, **more)
        asked.clear()
        encode_vace(pipe.vae, clip, check=check, grey=grey)
        assert len(asked) == count


def test_the_native_node_s_formula(pipe: Any) -> None:
    """ComfyUI's WanVaceToVideo: halves around mid-grey, one reference, the mask's 64 channels.

    It differs where the mask is soft, which it does not round for the halves, and in how it fits
    pictures of other sizes; with a hard mask and pictures of the clip's size it is the same.
    """
    video, reference = as_tensor(pixels(9, HEIGHT, WIDTH, 3)), as_tensor(pixels(HEIGHT, WIDTH, 3))
    mask = (as_tensor(SOFT[:9]) > 0.5).float()

    def encoded(frames: Tensor) -> Tensor:
        found = pipe.vae.encode((frames * 2 - 1).permute(3, 0, 1, 2)[None]).latent_dist.mode()
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        return (found - mean) / std

    centred, hole = video - 0.5, mask[..., None]
    halves = [encoded(centred * (1 - hole) + 0.5), encoded(centred * hole + 0.5)]
    latents = torch.cat(halves, dim=1)
    before = encoded(reference[None])
    latents = torch.cat([torch.cat([before, torch.zeros_like(before)], dim=1), latents], dim=2)
    cells = mask.view(9, HEIGHT // 8, 8, WIDTH // 8, 8).permute(2, 4, 0, 1, 3)
    cells = cells.reshape(64, 9, HEIGHT // 8, WIDTH // 8)
    shrunk = torch.nn.functional.interpolate(
        cells[None], size=(3, HEIGHT // 8, WIDTH // 8), mode="nearest-exact"
    )
    shrunk = torch.cat([torch.zeros_like(shrunk[:, :, :1]), shrunk], dim=2)
    clip = ControlClip(
        num_frames=9, width=WIDTH, height=HEIGHT, video=video, mask=mask, references=[reference]
    )
    assert torch.allclose(ours(pipe, clip), torch.cat([latents, shrunk], dim=1), atol=1e-4)
