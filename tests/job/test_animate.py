"""What moves a character: which inputs an Animate takes, how long they are, what is refused."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.machines import architecture

from wan_core.config import GenerationConfig, WanControl
from wan_core.errors import InvalidRequest
from wan_core.job import (
    CharacterPlan,
    animate,
    back_and_forth,
    check_inputs,
    mirrored,
    reads,
    resolve,
)
from wan_core.job.request import needs_clip

CONFIG = ("image", "continue_from", "window_overlap", "max_chunk_size", "end_step")
ANIMATE, ANIMATE_2 = "wan2.2-animate-14b", "wan-animate-2-14b"


def clip(frames: int, width: int = 32, height: int = 16) -> torch.Tensor:
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(frames))


def job(model: str = ANIMATE, frames: int = 9, wanted: int | None = None, **more: Any) -> Any:
    """A whole job of this model whose driving video has ``frames``; ``more`` are its inputs."""
    given: dict[str, Any] = {"reference": clip(1), "video": clip(frames)}
    if model == ANIMATE:
        given["face_video"] = clip(frames, 512, 512)
    number = frames if wanted is None else wanted
    config = {name: more.pop(name) for name in CONFIG if name in more}
    return GenerationConfig(
        prompt="x", num_frames=number, width=32, height=16, control=WanControl(**given | more),
        **config,
    )  # fmt: skip


def checked(config: GenerationConfig, model: str = ANIMATE) -> tuple[Any, Any, list[str]]:
    request = resolve(config, architecture(model))
    inputs = check_inputs(config, request, architecture(model))
    return request, inputs.control, [*request.warnings, *inputs.warnings]


def test_what_each_reads_and_that_it_sees_the_character_through_clip() -> None:
    assert set(reads(architecture(ANIMATE))) == {
        "video", "reference", "face_video", "background_video", "mask",
    }  # fmt: skip
    assert set(reads(architecture(ANIMATE_2))) == {"video", "reference", "strength"}
    for name in (ANIMATE, ANIMATE_2):
        assert needs_clip(job(name), architecture(name))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (ANIMATE, {"reference": None}, r"control\.reference is missing: Wan 2.2 Animate"),
    (ANIMATE_2, {"reference": None}, r"control\.reference is missing: Wan Animate 2"),
    (ANIMATE, {"video": None}, r"control\.video is missing.*drawn pose"),
    (ANIMATE, {"face_video": None}, r"control\.face_video is missing"),
    (ANIMATE, {"reference": clip(2)}, r"control\.reference holds 2 pictures.*one character"),
    (ANIMATE_2, {"reference": [clip(1)[0], clip(1)[0]]}, r"control\.reference holds 2 pictures"),
    (ANIMATE_2, {"face_video": clip(9)}, r"control\.face_video was given, but Wan Animate 2 14B"),
    (ANIMATE_2, {"background_video": clip(9)}, r"background_video was given, but Wan Animate 2"),
    (ANIMATE_2, {"mask": torch.ones(9, 16, 32)}, r"control\.mask was given, but Wan Animate 2"),
    (ANIMATE, {"keyframes": clip(1)}, r"control\.keyframes was given, but Wan 2.2 Animate"),
    (ANIMATE, {"strength": 0.5}, r"control\.strength is 0.5.*nothing that it weighs"),
    (ANIMATE, {"denoise": 0.5}, r"follows its video and does not start from it"),
    (ANIMATE, {"mask": torch.ones(9, 16, 32)}, r"mask was given without control\.background_video"),
    (ANIMATE, {"background_video": clip(9)}, r"background_video was given without control\.mask"),
    (ANIMATE, {"background_video": clip(9), "mask": torch.ones(8, 16, 32)},
     r"control\.mask has 8 frames and control\.background_video 9"),
    (ANIMATE, {"background_video": clip(9), "mask": torch.ones(16, 32), "clear_masked": True},
     r"clear_masked was given, and Wan 2.2 Animate"),
    (ANIMATE, {"window_overlap": 8}, r"window_overlap is 8.*begin with 1 or 5 frames"),
    (ANIMATE_2, {"window_overlap": 5}, r"window_overlap is 5.*begin with 1 frames"),
    (ANIMATE, {"window_overlap": 5, "max_chunk_size": 5}, r"max_chunk_size is 5, and 5 frames"),
    (ANIMATE, {"continue_from": torch.zeros(1, 16, 2, 2, 4)}, r"continue_from was given, but Wan"),
    (ANIMATE, {"end_step": 3}, r"end_step was given, but Wan 2.2 Animate"),
    (ANIMATE, {"image": "x.png"}, r"image was given.*takes its character as control\.reference"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "change", "said"), REFUSED, ids=lambda one: str(one)[:40])
def test_what_does_not_apply_is_refused_by_name(
    model: str, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        resolve(job(model, **change), architecture(model))


def test_every_check_there_is_has_a_case() -> None:
    met: set[int] = set()
    for model, change, _ in REFUSED:
        with pytest.raises(InvalidRequest) as caught:
            resolve(job(model, **change), architecture(model))
        here = [one for one in caught.traceback if Path(one.path) == Path(animate.__file__)]
        met |= {one.lineno + 1 for one in here}
    tree = ast.parse(Path(animate.__file__).read_text(encoding="utf-8"))
    raises = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    assert len(raises) >= 6
    assert all(met & set(range(node.lineno, (node.end_lineno or 0) + 1)) for node in raises)


def test_without_any_control_the_character_is_asked_for() -> None:
    with pytest.raises(InvalidRequest, match=r"control\.reference is missing"):
        resolve(GenerationConfig(prompt="x"), architecture(ANIMATE))


@pytest.mark.parametrize("name", ["face_video", "background_video"])
@pytest.mark.parametrize("model", ["wan2.1-vace-14b", "wan2.2-i2v-a14b", "wan2.1-t2v-1.3b"])
def test_other_models_name_the_input_and_the_model(name: str, model: str) -> None:
    image = "x" if "i2v" in model else None
    config = GenerationConfig(prompt="x", image=image, control=WanControl(**{name: clip(81)}))
    with pytest.raises(InvalidRequest, match=f"control.{name} was given, but Wan 2.* Animate"):
        resolve(config, architecture(model))


def test_the_clip_is_as_long_as_the_driving_video() -> None:
    for frames in (1, 2, 76, 77, 78, 200):
        config = job(frames=frames, wanted=0, face_video=clip(1))
        request = resolve(config, architecture(ANIMATE))
        assert request.wanted_frames == request.control.frames == frames  # type: ignore[union-attr]


def test_videos_of_other_lengths_are_cut_or_played_back_and_forth_and_it_is_said() -> None:
    replacing = {"background_video": clip(12), "mask": torch.ones(12, 16, 32)}
    request, control, said = checked(job(frames=12, wanted=9, **replacing))
    assert (request.control.frames, len(control.video)) == (9, 9)
    assert (len(control.background_video), len(control.mask)) == (12, 12)
    for name in ("video", "face_video", "background_video"):
        assert f"control.{name} has 12 frames; the first 9 are used." in said
    short = {"face_video": clip(5, 512, 512), "background_video": clip(1)}
    request, control, said = checked(job(frames=7, wanted=9, mask=torch.ones(16, 32), **short))
    assert (request.control.frames, len(control.video), len(control.face_video)) == (7, 7, 5)
    texts = "\n".join(said)
    assert "control.video has 7 frames and 9 are made: it is played back and forth" in texts
    assert "control.face_video has 5 frames and 9 are made: it is played back and forth" in texts
    assert "control.background_video has 1 frames and 9 are made: its only frame is rep" in texts
    assert not [one for one in checked(job(frames=9))[2] if "control." in one]


def test_other_sizes_are_said() -> None:
    said = "\n".join(
        checked(
            job(video=clip(9, 64, 32), face_video=clip(9, 256, 128), reference=clip(1, 32, 32))
        )[2]
    )
    assert "control.video is 64x32 and is scaled to 32x16." in said
    assert "control.face_video is 256x128 and is stretched to 512x512" in said
    assert "control.reference is 32x32 and is fitted into 32x16, with black beside it" in said


def test_back_and_forth_is_the_pipeline_s_padding() -> None:
    from diffusers import WanAnimatePipeline

    for frames in range(2, 9):
        wanted = WanAnimatePipeline.pad_video_frames(SimpleNamespace(), list(range(frames)), 40)
        assert [back_and_forth(index, frames) for index in range(40)] == wanted
    assert [back_and_forth(index, 1) for index in range(5)] == [0] * 5


def test_an_estimate_needs_no_picture() -> None:
    from wan_core.job import with_character

    for number, name in ((1, ANIMATE), (2, ANIMATE_2)):
        for control in (None, WanControl(video=clip(20))):
            config = GenerationConfig(prompt="x", num_frames=20, control=control)
            config.control = with_character(config, number)
            request = resolve(config, architecture(name))
            assert request.wanted_frames == 20 and request.control is not None


def test_the_segments_are_those_of_the_pipeline() -> None:
    """Their number and places, against the arithmetic of ``WanAnimatePipeline.__call__``."""
    for length, carried in ((77, 1), (77, 5), (13, 1), (13, 5)):
        for frames in range(carried + 1, 400, 7):
            step = length - carried
            rest = (frames - carried) % step
            target = frames + (step - rest if rest else 0)
            plan = CharacterPlan(frames, length, carried)
            assert plan.count == target // step
            starts = [plan.frames_of(number).start for number in range(plan.count)]
            assert starts == list(range(0, plan.count * step, step))


def test_a_short_clip_is_one_segment_and_a_long_one_has_the_official_length() -> None:
    for frames, given, wanted in (
        (20, {}, (21, 1)), (200, {}, (77, 1)), (200, {"window_overlap": 5}, (77, 5)),
        (200, {"window_overlap": 4}, (77, 5)),
        (200, {"max_chunk_size": 34}, (37, 1)),
    ):  # fmt: skip
        request = resolve(job(frames=frames, face_video=clip(1), **given), architecture(ANIMATE))
        assert (request.window_frames, request.window_overlap) == wanted
        assert request.window_mode == "continuation" and request.flow_shift == 5
        assert any("made 37" in text for text in request.warnings) == ("max_chunk_size" in given)


def test_texts_begin_no_segment() -> None:
    """The segments of other models do: a text then begins where a latent frame does."""
    texts: dict[str, Any] = {"prompt": None, "prompts": "6: a dog\na cat"}
    begins = {"num_frames": 21, "window_mode": "continuation", **texts}
    plain = resolve(GenerationConfig(**begins), architecture("wan2.2-ti2v-5b"))
    assert any("begin" in text for text in plain.warnings)
    windows = resolve(GenerationConfig(num_frames=21, **texts), architecture("wan2.1-t2v-1.3b"))
    assert not any("begin" in text for text in windows.warnings)
    request = resolve(replace(job(frames=21, face_video=clip(1)), **texts), architecture(ANIMATE))
    assert request.window_mode == "continuation"
    assert not any("begin" in text for text in request.warnings)


def test_mirrored_is_the_zigzag_of_animate_2() -> None:
    """[0 1 2 3 4 | 4 3 2], as diffusers says it, and on for ever."""
    assert [mirrored(at, 5) for at in range(11)] == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 0]
    assert {mirrored(at, 1) for at in range(9)} == {0}
