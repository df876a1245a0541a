"""The judge reads the generator's own clips exactly, and refuses what is not such a clip."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import clips, judge
from wan_core.render.video import contact_sheet


def movie(cell: tuple[str, str, str, str], seed: int, wrap: bool, frames: int = 17) -> torch.Tensor:
    scene = clips.scene_of(*cell, seed=seed, wrap=wrap)
    return clips.render(scene, frames)[0].permute(1, 2, 3, 0)


def read(reading: judge.Reading) -> tuple[str, str, str, str]:
    return (reading.colour, reading.shape, reading.direction, reading.background)


# Every seventh has each colour, shape, direction and background, and all pairs but a few.
@pytest.mark.parametrize("apart", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_reads_the_whole_grid_exactly(apart: int) -> None:
    for seed, cell in enumerate(clips.grid()[::apart]):
        reading = judge.read_clip(movie(cell, seed, seed % 2 == 0))
        assert read(reading) == cell
        assert reading.steady()


@settings(max_examples=40, deadline=None)
@given(
    cell=st.sampled_from(clips.grid()),
    seed=st.integers(0, 2**31 - 1),
    wrap=st.booleans(),
    noise=st.floats(0, 0.04),
)
def test_reads_any_clip_also_with_a_little_noise(
    cell: tuple[str, str, str, str], seed: int, wrap: bool, noise: float
) -> None:
    clip = movie(cell, seed, wrap)
    grain = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    assert read(judge.read_clip(clip + noise * grain)) == cell


def test_long_clips_keep_their_object_on_the_torus() -> None:
    for seed, cell in enumerate(clips.grid()[::19]):
        reading = judge.read_clip(movie(cell, seed, wrap=False, frames=65))
        assert read(reading) == cell
        assert reading.steady()


def test_an_object_in_view_stays_in_view() -> None:
    for seed, cell in enumerate(clips.grid()[::7]):
        clip = movie(cell, seed, wrap=False)
        ground = clip.median(dim=2, keepdim=True).values
        border = (clip - ground).abs().amax(-1)[:, :, [0, -1]]
        assert float(border.max()) < 0.05 or cell[1] == "triangle"


def test_reversed_mirrored_and_recoloured_clips_read_otherwise() -> None:
    clip = movie(("red", "circle", "right", "dark"), 3, wrap=False)
    assert judge.read_clip(clip.flip(0)).direction == "left"
    assert judge.read_clip(clip.flip(2)).direction == "left"
    assert judge.read_clip(clip.transpose(1, 2)).direction == "down"
    assert judge.read_clip(clip[..., [1, 0, 2]]).colour == "green"


@pytest.mark.parametrize(
    "clip",
    [
        torch.zeros(17, 64, 64, 3),
        torch.full((17, 64, 64, 3), float("nan")),
        torch.rand(17, 64, 64, 3, generator=torch.Generator().manual_seed(1)),
        torch.linspace(0, 1, 64)[None, None, :, None].expand(17, 64, 64, 3),
    ],
    ids=["black", "nan", "noise", "ramp"],
)
def test_a_clip_without_an_object_has_no_names(clip: torch.Tensor) -> None:
    reading = judge.read_clip(clip)
    assert (reading.colour, reading.shape) == (judge.UNKNOWN, judge.UNKNOWN)
    assert reading.direction == judge.UNKNOWN
    assert not reading.steady()


def test_blur_two_objects_and_a_jump_are_not_taken_for_the_real_thing() -> None:
    clip = movie(("white", "square", "right", "dark"), 5, wrap=False)
    doubled = torch.maximum(clip, clip.roll(32, 1))
    assert judge.read_clip(doubled).shape == judge.UNKNOWN
    jumping = torch.stack(
        [f.roll(int(i % 2) * 31, 1) for i, f in enumerate(clip[:1].expand(17, -1, -1, -1))]
    )
    assert judge.read_clip(jumping).direction in (judge.UNKNOWN, "still")
    other = movie(("red", "circle", "right", "dark"), 5, wrap=False)
    half = torch.cat([clip[:9], other[9:]])
    assert not judge.read_clip(half).steady()


def test_sentences_are_distinct_and_name_their_scene() -> None:
    for template in ("full", "short"):
        lines = [clips.sentence(*cell, template=template) for cell in clips.grid()]
        assert len(set(lines)) == len(lines) == 270
    assert clips.sentence("red", "circle", "right", "dark") == (
        "a red circle moves right on a dark background"
    )


def test_scene_rows_agree_with_the_grid() -> None:
    names = (
        list(clips.COLOURS),
        list(clips.SHAPES),
        list(clips.DIRECTIONS),
        list(clips.BACKGROUNDS),
    )
    scenes = clips.sample_scenes(64, generator=torch.Generator().manual_seed(0))
    parts = (scenes.colour, scenes.shape, scenes.direction, scenes.background)
    for number, row in enumerate(scenes.index().tolist()):
        cell = tuple(n[int(p[number])] for n, p in zip(names, parts, strict=True))
        assert clips.grid()[row] == cell


def test_contact_sheet_places_frames_in_reading_order() -> None:
    frames = torch.stack([torch.full((4, 5, 3), i / 10) for i in range(5)])
    sheet = contact_sheet(frames, columns=3, gap=1)
    assert sheet.size == (3 * 6 - 1, 2 * 5 - 1)
    assert sheet.getpixel((0, 0)) == (0, 0, 0)
    assert sheet.getpixel((6, 5)) == (round(0.4 * 255),) * 3
    assert sheet.getpixel((12, 5)) == (255, 255, 255)
