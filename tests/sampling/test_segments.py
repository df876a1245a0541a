"""Segments that go on from each other, texts per part, and what goes into the mp4 beside frames."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from support.clips import picture
from support.crashes import Crash
from support.tiny_models import make_folder

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.__main__ import main
from wan_core.errors import InvalidRequest
from wan_core.job import plan_segments
from wan_core.job.windows import plan_windows
from wan_core.render.video import read_audio
from wan_core.sampling.denoise import Conditions
from wan_core.sampling.segments import ClipSegments, match_colours

JOB: dict[str, Any] = {
    "prompt": "a red cat", "num_frames": 33, "seed": 1,
    "num_inference_steps": 2, "guidance_scale": 1.0, "guidance_scale_2": 1.0,
    "max_chunk_size": 17, "window_overlap": 4, "window_mode": "continuation", "noise": "frame",
}  # fmt: skip


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made: dict[str, Any] = {}
    loader = WanPipelineLoader()

    def get(family: str) -> Any:
        if family not in made:
            folder = make_folder(tmp_path_factory.mktemp("continued") / family, family)
            made[family] = loader.load_wan_pipeline(
                folder, optimization_config={"device": "cpu", "precision": "fp32"}
            )
        return made[family]

    yield get
    loader.clear_cache()


def job(family: str, **more: Any) -> GenerationConfig:
    """The smallest size the family makes."""
    size = 32 if family == "wan2.2-ti2v-5b" else 16
    return GenerationConfig(**(JOB | {"image": picture(), "width": size, "height": size} | more))


# -- segments by themselves -------------------------------------------------------------------


def told(frames: int, concat: bool) -> Conditions:
    embeds = torch.zeros(1, 1, 1)
    if not concat:
        return Conditions(prompt_embeds=embeds)
    condition = torch.zeros(1, 4 + 2, frames, 4, 4)
    condition[:, :4, 0] = 1
    condition[:, 4:] = 7.0
    return Conditions(prompt_embeds=embeds, concat=condition)


@pytest.mark.parametrize("concat", [True, False])
def test_a_segment_is_given_the_last_latents_and_blends_with_them(concat: bool) -> None:
    plan = plan_segments(13, 0, 29, 12)  # 8 frames, 3 shared: starts 0 and 5
    noise = torch.randn(1, 2, 13, 4, 4, generator=torch.Generator().manual_seed(0))
    segments = ClipSegments(plan=plan, noise=noise, conditions=told(13, concat))
    assert len(segments) == 2
    state = segments.begin(0, 0)
    assert torch.equal(state.latents, noise[:, :, :8]) and state.clip is None
    first = segments.conditions_of(0)
    assert first.first_frame is None
    state.latents = torch.full((1, 2, 8, 4, 4), 1.0)
    segments.finish(state, first)

    state = segments.begin(1, 0)
    assert torch.equal(state.latents, noise[:, :, 5:])
    assert state.clip is not None and state.clip.shape[2] == 8
    second = segments.conditions_of(1)
    if concat:
        assert second.concat is not None and second.concat.shape[2] == 8
        assert second.concat[0, 0, :, 0, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
        assert second.concat[0, 4, :, 0, 0].tolist() == [1, 1, 1, 7, 7, 7, 7, 7]
        state.latents = torch.full((1, 2, 8, 4, 4), 5.0)
        segments.finish(state, second)
        # The ramp k / (w + 1): no change between frames is above a quarter of the difference.
        assert segments.clip[0, 0, :, 0, 0].tolist() == [1] * 5 + [2, 3, 4] + [5] * 5
    else:
        assert second.first_frame is not None and second.first_frame.shape[2] == 3
        state.latents = torch.full((1, 2, 8, 4, 4), 5.0)
        segments.finish(state, second)  # held frames are those of before
        assert segments.clip[0, 0, :, 0, 0].tolist() == [1] * 8 + [5] * 5


def test_segments_of_one_text_are_static_windows() -> None:
    for total in range(2, 60):
        for window, overlap in ((17, 4), (29, 12), (81, 16), (81, 4), (17, 32)):
            windows = plan_windows(total, window, overlap)
            expected = [range(s, s + windows.window) for s in windows.starts()]
            assert list(plan_segments(total, 0, window, overlap).ranges) == expected
            plan = plan_segments(total + 9, 9, window, overlap)
            first = plan.ranges[0].start
            later = plan_windows(total + 9 - first, window, overlap)
            assert [r.start - first for r in plan.ranges] == list(later.starts())
            assert first == 9 - (later.overlap or 9 - first) and first < 9
    assert plan_segments(9, 0, None, 16).ranges == (range(9),)


@pytest.mark.parametrize("given", [0, 6])
def test_a_segment_begins_with_every_text(given: int) -> None:
    draw = random.Random(given)
    for _ in range(300):
        total = draw.randint(given + 1, 70)
        window, overlap = draw.choice([(17, 4), (29, 12), (81, 16), (17, 32), (None, 8)])
        texts = sorted(draw.sample(range(total + 3), draw.randint(0, 4)))
        plan = plan_segments(total, given, window, overlap, texts)
        ends = [t for t in texts if given < t < total]
        assert list(plan.cuts) == ends
        done, length, before = given, plan.windows.window, 0
        for segment in plan.ranges:
            known = done - segment.start
            assert before <= segment.start and 0 <= known < len(segment) <= length
            if segment.start > plan.ranges[0].start:  # as many shared as wanted, never shorter
                assert known >= plan.windows.overlap and len(segment) == length
            new = range(done, segment.stop)
            assert not any(new.start < end < new.stop for end in ends)
            done, before = segment.stop, segment.start
        assert done == total and {r.stop for r in plan.ranges} >= {*ends, total}


def test_p14_colours_that_drift_are_brought_back_and_detail_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(1, 3, 9, 16, 16, generator=generator)
    drifted = clip * 1.2 + torch.tensor([0.5, -0.3, 0.0]).view(1, 3, 1, 1, 1)

    def off(latents: torch.Tensor) -> float:
        return float((latents.mean((2, 3, 4)) - clip.mean((2, 3, 4))).abs().max())

    whole, half = (match_colours(drifted, clip, strength) for strength in (1.0, 0.5))
    assert off(whole) < 0.01 < 0.2 < off(half) < 0.3 < off(drifted)
    # What varies within a cell of the grid is not touched.
    fine = torch.randn(1, 3, 9, 16, 16, generator=generator)
    fine -= (
        torch.nn.functional.avg_pool3d(fine, (1, 4, 4))
        .repeat_interleave(4, 3)
        .repeat_interleave(4, 4)
    )
    change = match_colours(drifted + fine, clip, 1.0) - match_colours(drifted, clip, 1.0)
    assert torch.allclose(change, fine, atol=1e-5)
    assert torch.allclose(match_colours(clip, clip, 1.0), clip, atol=1e-5)


def test_p14_every_segment_is_matched_with_the_first() -> None:
    def mean_of_the_last(strength: float) -> float:
        plan = plan_segments(29, 0, 17, 4)
        noise = torch.randn(1, 2, 29, 4, 4, generator=torch.Generator().manual_seed(0))
        segments = ClipSegments(
            plan=plan, noise=noise, conditions=told(29, True), drift_correction=strength
        )
        for k in range(len(segments)):
            state = segments.begin(k, 0)
            state.latents = state.latents * 0.1 + k  # every segment is brighter
            segments.finish(state, segments.conditions_of(k))
        return float(segments.clip[:, :, -4:].mean())

    assert mean_of_the_last(0.0) > 6
    assert abs(mean_of_the_last(1.0)) < 0.1


# -- whole renders ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["wan2.2-i2v-a14b", "wan2.2-ti2v-5b"])
def test_p08_a_longer_clip_keeps_its_beginning_and_can_be_gone_on_with(
    wan: Any, family: str
) -> None:
    heard: list[tuple[int, int]] = []
    steps: list[int] = []
    long = wan(family).generate(
        job(
            family,
            chunk_callback=lambda i, n: heard.append((i, n)),
            progress_callback=lambda i, n, x: steps.append(i),
        )
    )
    long.raise_for_error()
    assert heard == [(0, 2), (1, 2)] and steps == [1, 2, 3, 4]
    assert long.latents.shape[2] == 9 and torch.isfinite(long.latents).all()
    short = wan(family).generate(job(family, num_frames=17)).raise_for_error()
    assert torch.equal(long.latents[:, :, :4], short.latents[:, :, :4])
    assert torch.equal(long.frames[:13], short.frames[:13])
    # One segment is the plain run.
    plain = wan(family).generate(job(family, num_frames=17, window_mode="windows"))
    assert torch.equal(short.latents, plain.raise_for_error().latents)
    # Another process, with nothing but the latents of the short clip.
    more = wan(family).generate(job(family, continue_from=short.latents)).raise_for_error()
    assert torch.equal(more.latents, long.latents)
    assert not torch.equal(long.latents[:, :, 5:], long.latents[:, :, :4])


@pytest.mark.parametrize("prompts", [None, "9: a red cat\na blue dog"])
def test_p09_going_on_within_any_segment_gives_the_same_bits(
    wan: Any, tmp_path: Path, prompts: str | None
) -> None:
    family = "wan2.1-i2v"
    more = {"scheduler": "unipc", "drift_correction": 0.5, "num_frames": 25 if prompts else 33}
    if prompts:
        more |= {"prompt": None, "prompts": prompts}
    whole = wan(family).generate(job(family, **more)).raise_for_error()
    kept = {"resume": "auto", "journal_folder": tmp_path / "j"}
    made: list[int] = []

    def stop_at(stop: int) -> Any:
        def progress(step: int, total: int, latents: torch.Tensor) -> None:
            made.append(step)
            if step == stop:
                raise Crash

        return progress

    for stop in (1, 2, 3):  # within and at the end of segments
        with pytest.raises(Crash):
            wan(family).generate(job(family, **more, **kept, progress_callback=stop_at(stop)))
    rest = wan(family).generate(job(family, **more, **kept)).raise_for_error()
    assert made == [1, 2, 3]  # no finished step was made again
    assert "segment 2 of 2" in rest.metadata["resumed"]
    assert torch.equal(rest.latents, whole.latents)
    assert torch.equal(rest.frames, whole.frames)
    assert not (tmp_path / "j").exists()


def test_p14_a_job_says_how_far_colours_are_brought_back(wan: Any) -> None:
    """The 5B's held frames stay as they are, so the last segment is known before its correction."""
    family = "wan2.2-ti2v-5b"
    made = {}
    for strength in (0.0, 0.5, 1.0):
        more = {"num_inference_steps": 1, "drift_correction": strength}
        made[strength] = wan(family).generate(job(family, **more)).raise_for_error().latents
    plain = made.pop(0.0)
    for strength, found in made.items():
        expected = match_colours(plain[:, :, 4:], plain[:, :, :4], strength)
        assert torch.equal(found[:, :, :4], plain[:, :, :4])
        assert torch.allclose(found[:, :, 5:], expected[:, :, 1:], atol=1e-6)
        assert not torch.allclose(found[:, :, 5:], plain[:, :, 5:], atol=1e-3)


def test_a_5b_continues_without_a_picture(wan: Any) -> None:
    found = wan("wan2.2-ti2v-5b").generate(job("wan2.2-ti2v-5b", image=None)).raise_for_error()
    assert "2 segments" in found.metadata["windows"]


@pytest.mark.parametrize("family", ["wan2.2-i2v-a14b", "wan2.2-ti2v-5b"])
def test_a_text_per_segment_is_what_one_makes_by_hand(wan: Any, family: str) -> None:
    """Texts of 13, 16 and 9 frames in segments of at most 17: one clip after the other."""
    texts = ("a red cat", "a blue dog", "a green circle")
    prompts = f"13: {texts[0]}\n16: {texts[1]}\n{texts[2]}"
    made = wan(family).generate(job(family, num_frames=37, prompt=None, prompts=prompts))
    assert "3 segments of at most 17" in made.raise_for_error().metadata["windows"]
    assert "3 texts" in made.metadata["windows"] and not made.warnings
    by_hand = None
    # The last one reaches back over 12 frames, not 4, to be as long as the others.
    for text, frames, shared in zip(texts, (13, 29, 37), (4, 4, 12), strict=True):
        more = {"num_frames": frames, "prompt": text, "window_overlap": shared}
        made_by_hand = wan(family).generate(job(family, **more, continue_from=by_hand))
        by_hand = made_by_hand.raise_for_error().latents
    assert torch.equal(made.latents, by_hand)


def test_a_text_that_begins_within_a_latent_frame_begins_with_it_and_says_so(wan: Any) -> None:
    more = {"prompt": None, "num_inference_steps": 1}
    family = "wan2.2-ti2v-5b"
    odd = wan(family).generate(job(family, **more, prompts="15: a red cat\na blue dog"))
    even = wan(family).generate(job(family, **more, prompts="13: a red cat\na blue dog"))
    assert torch.equal(odd.raise_for_error().latents, even.raise_for_error().latents)
    assert "line 2 begins with frame 13, not 15" in odd.warnings[0] and not even.warnings
    # A first text of a single latent frame leaves one to compare colours with.
    short = job(family, **more, prompts="1: a red cat\na blue dog", drift_correction=1.0)
    assert torch.isfinite(wan(family).generate(short).raise_for_error().latents).all()


def test_every_part_of_a_clip_has_its_text(wan: Any) -> None:
    """A segment and a window take the text of their middle; equal texts are one prompt."""
    family = "wan2.2-ti2v-5b"
    for mode in ("continuation", "windows"):
        more = {"window_mode": mode, "num_inference_steps": 1}
        same = wan(family).generate(job(family, **more, prompts="17: a red cat\na red cat"))
        plain = wan(family).generate(job(family, **more))
        assert torch.equal(same.raise_for_error().latents, plain.raise_for_error().latents)
        assert any("prompts was given" in warning for warning in same.warnings)
        two = wan(family).generate(
            job(family, **more, prompt=None, prompts="17: a red cat\na blue dog")
        )
        assert not two.raise_for_error().warnings
        if mode == "continuation":
            assert torch.equal(two.latents[:, :, :4], plain.latents[:, :, :4])
        else:
            unseen = "1: a green circle\n16: a red cat\na blue dog"
            three = wan(family).generate(job(family, **more, prompt=None, prompts=unseen))
            assert torch.equal(three.raise_for_error().latents, two.latents)
            assert any("'a green circle' is not seen" in text for text in three.warnings)
        assert not torch.equal(two.latents[:, :, 5:], plain.latents[:, :, 5:])


@pytest.mark.parametrize("noise", ["frame", "freenoise"])
def test_a_job_chooses_its_noise(wan: Any, noise: str) -> None:
    family = "wan2.2-ti2v-5b"
    more = {"image": None, "window_mode": "windows", "num_inference_steps": 1}
    plain = wan(family).generate(job(family, **(more | {"noise": "clip"}))).raise_for_error()
    other = wan(family).generate(job(family, **(more | {"noise": noise}))).raise_for_error()
    assert not torch.equal(plain.latents, other.latents)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"window_overlap": 0}, "window_overlap"),
        ({"window_schedule": "looped"}, "window_schedule"),
        ({"window_mode": "both"}, "window_mode"),
        ({"start_step": 1}, "start_step"),
        ({"drift_correction": 1.5}, "drift_correction"),
        ({"noise": "pink"}, "noise"),
        ({"prompts": "no count\nat all"}, "prompts"),
        ({"prompts": "5: a cat\n3: a dog\na bird"}, "prompts"),
        ({"prompts": "a cat", "prompt_embeds": torch.zeros(1, 3, 32)}, "prompts"),
        ({"continue_from": torch.zeros(1, 48, 9, 2, 2)}, "continue_from"),
        ({"continue_from": torch.zeros(1, 48, 3, 4, 2)}, "continue_from"),
        ({"continue_from": torch.zeros(2, 2)}, "continue_from"),
        ({"continue_from": torch.zeros(1, 48, 3, 2, 2), "window_mode": "windows"}, "continue_from"),
        ({"audio": (torch.zeros(3, 99), 48000)}, "audio"),
        ({"audio": (torch.zeros(1, 99), 48001)}, "audio"),
        ({"crf": 52}, "crf"),
        ({"pix_fmt": "rgb24"}, "pix_fmt"),
        ({"codec": "av1"}, "codec"),
    ],
)
def test_a_bad_field_is_named(wan: Any, change: dict[str, Any], field: str) -> None:
    result = wan("wan2.2-ti2v-5b").generate(job("wan2.2-ti2v-5b", **change))
    assert isinstance(result.error, InvalidRequest), result.errors
    assert result.error.field == field and field in result.errors[0]


def test_a_text_model_cannot_continue(wan: Any) -> None:
    result = wan("wan2.1-t2v").generate(job("wan2.1-t2v", image=None))
    assert isinstance(result.error, InvalidRequest) and result.error.field == "window_mode"
    assert "image-to-video" in result.errors[0]


# -- the mp4 and the command line -------------------------------------------------------------


def sound(path: Path, rate: int = 44100, seconds: float = 2.0) -> Path:
    wave = np.sin(np.arange(int(rate * seconds)) * 440 * 2 * np.pi / rate).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        data = (wave * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(data, format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return path


def test_sound_is_read_as_it_is(tmp_path: Path) -> None:
    wave, rate = read_audio(sound(tmp_path / "a.wav"))
    assert rate == 44100 and wave.shape == (1, 88200)
    expected = np.sin(np.arange(88200) * 440 * 2 * np.pi / 44100)
    assert float(np.abs(wave[0].numpy() - expected).max()) < 1e-3
    assert read_audio(tmp_path / "a.wav", seconds=0.5)[0].shape[1] == 22051
    assert read_audio(sound(tmp_path / "b.wav", rate=50000))[1] == 48000
    (tmp_path / "c.wav").write_bytes(b"no sound")
    for name in ("c.wav", "missing.wav"):
        with pytest.raises(InvalidRequest, match=name) as raised:
            read_audio(tmp_path / name)
        assert raised.value.field == "audio"


def test_the_command_line_takes_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "model", "wan2.2-ti2v-5b")
    picture().save(tmp_path / "in.png")
    (tmp_path / "prompts.txt").write_text("9: a red cat\na blue dog\n")
    target = tmp_path / "out" / "o.mp4"
    arguments = [
        "generate", folder, "--prompts", tmp_path / "prompts.txt", "--image", tmp_path / "in.png",
        "--width", 32, "--height", 32, "--frames", 25, "--steps", 1, "--window", 17, "--overlap", 8,
        "--mode", "continuation", "--noise", "freenoise", "--drift-correction", 0.5, "--crf", 5,
        "--pix-fmt", "yuv444p", "--audio", sound(tmp_path / "a.wav"), "--output", target, "--json",
    ]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    with av.open(str(target)) as video:
        assert video.streams.video[0].codec_context.pix_fmt == "yuv444p"
        assert sum(1 for _ in video.decode(video=0)) == 25
        assert video.streams.audio[0].rate == 44100
    assert "segments" in capsys.readouterr().out
    assert list((tmp_path / "out").iterdir()) == [target]  # the journal is gone
    code = main([str(a) for a in [*arguments, "--resume", "must"]])
    assert code == 1 and "no saved state" in capsys.readouterr().err
