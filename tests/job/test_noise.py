"""Noise by clip, by frame and repeated; texts per part of a clip."""

from __future__ import annotations

import pytest
import torch

from wan_core.errors import InvalidRequest
from wan_core.job.fields import parse_prompts
from wan_core.job.noise import NOISES, draw_noise
from wan_core.job.windows import plan_windows

WINDOWS = plan_windows(23, window=17, overlap=8)  # 5 latent frames, 2 shared


def shape(frames: int, batch: int = 1) -> tuple[int, int, int, int, int]:
    return batch, 4, frames, 6, 5


def test_clip_is_the_draw_of_the_pipelines() -> None:
    expected = torch.randn(shape(9, 2), generator=torch.Generator("cpu").manual_seed(3))
    assert torch.equal(draw_noise("clip", shape(9, 2), 3), expected)


@pytest.mark.parametrize("frames", [1, 2, 9, 22])
@pytest.mark.parametrize("name", ["frame", "freenoise"])
def test_a_longer_clip_begins_with_the_noise_of_a_shorter(name: str, frames: int) -> None:
    longer = draw_noise(name, shape(23), 7, WINDOWS)
    window = WINDOWS if frames > WINDOWS.window else None
    shorter = draw_noise(name, shape(frames), 7, window)
    if name == "frame" or frames > WINDOWS.window:
        assert torch.equal(longer[:, :, :frames], shorter)
    else:  # one window: the plain draw
        assert torch.equal(shorter, draw_noise("clip", shape(frames), 7))


def test_noise_by_frame_depends_on_seed_frame_and_sample_and_on_nothing_else() -> None:
    noise = draw_noise("frame", shape(5, 2), 0)
    pieces = [noise[b, :, i] for b in range(2) for i in range(5)]
    pieces += [draw_noise("frame", shape(5), 1)[0, :, i] for i in range(5)]
    for i, piece in enumerate(pieces):
        assert not any(torch.equal(piece, other) for other in pieces[i + 1 :])
    assert torch.equal(noise[:1], draw_noise("frame", shape(5), 0))


def test_freenoise_repeats_the_first_window_in_another_order() -> None:
    noise = draw_noise("freenoise", shape(23), 5, WINDOWS)
    plain = draw_noise("clip", shape(5), 5)
    assert torch.equal(noise[:, :, :5], plain)
    stride = WINDOWS.stride
    for start in range(5, 23, stride):
        block = range(start, min(start + stride, 23))
        back = range(start - 5, start - 5 + stride)
        for i in block:
            assert sum(torch.equal(noise[:, :, i], noise[:, :, j]) for j in back) == 1
    order = [
        next(j for j in range(5) if torch.equal(noise[:, :, i], noise[:, :, j])) for i in range(23)
    ]
    assert order != [i % 5 for i in range(23)]


@pytest.mark.parametrize("name", NOISES)
def test_every_frame_is_standard_normal(name: str) -> None:
    noise = draw_noise(name, (1, 16, 12, 32, 32), 11, plan_windows(12, 17, 8))
    assert noise.dtype == torch.float32
    assert float(noise.mean((0, 1, 3, 4)).abs().max()) < 0.04
    assert float((noise.std((0, 1, 3, 4)) - 1).abs().max()) < 0.03


def test_parts_follow_each_other() -> None:
    parts = parse_prompts("81: a red fox runs\n\n 40 : it sleeps: soundly\na bird\n")
    assert [(p.start, p.text) for p in parts] == [
        (0, "a red fox runs"), (81, "it sleeps: soundly"), (121, "a bird"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 lines"), ("no count\n3: x", "line 1"), ("0: x", "line 1"), ("5:\nx", "line 1"),
        ("5: x\n6: ", "line 2"), ("1: x\n" * 257, "257 lines"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named(text: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as raised:
        parse_prompts(text)
    assert raised.value.field == "prompts"
