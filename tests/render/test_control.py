"""A clip that is guided: started from a video, with key frames; against diffusers and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import components, open_kept, open_wan, pipeline

from wan_core import GenerationConfig, WanControl
from wan_core.errors import WanError
from wan_core.job.steps import make_scheduler

pytestmark = pytest.mark.usefixtures("nothing_is_left")
SIZE = {"width": 64, "height": 32, "num_frames": 9, "num_inference_steps": 5}
TEXT = {"prompt": "a red cat moves right", "negative_prompt": "a dog", "seed": 7}


def pictures(count: int, seed: int = 0, width: int = 64, height: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, height, width, 3, generator=generator)


def make(wrapper: Any, **more: Any) -> Any:
    return wrapper.generate(GenerationConfig(**(SIZE | TEXT | more))).raise_for_error()


# A video to start from ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "denoise"),
    [("unipc", 1.0), ("unipc", 0.8), ("unipc", 0.3), ("euler", 0.8), ("dpm++2m", 0.8)],
)
def test_a_video_is_changed_as_diffusers_does(folder: Any, scheduler: str, denoise: float) -> None:
    """Bit-equal to ``WanVideoToVideoPipeline``; the pipeline's strength is our denoise."""
    from diffusers import WanVideoToVideoPipeline

    video = pictures(9, 3)
    parts = components("wan2.1-t2v")
    parts["scheduler"] = make_scheduler(scheduler, 3.0)
    pipe = WanVideoToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)

    def run(kind: str) -> Any:
        return pipe(
            video=video.permute(0, 3, 1, 2), prompt=TEXT["prompt"], negative_prompt="a dog",
            width=64, height=32, num_inference_steps=5, guidance_scale=4.0, strength=denoise,
            generator=torch.Generator().manual_seed(7), output_type=kind,
        ).frames  # fmt: skip

    wrapper = open_kept(folder("wan2.1-t2v"))
    result = make(
        wrapper, control=WanControl(video=video, denoise=denoise), scheduler=scheduler,
        flow_shift=3.0, guidance_scale=4.0,
    )  # fmt: skip
    assert torch.equal(result.latents, run("latent"))
    assert torch.equal(result.frames, torch.from_numpy(run("np")).flatten(0, 1))
    count = int(5 * denoise)
    assert result.metadata["control"].startswith(f"{count} of 5 steps, from a video with noise of ")


class Watched:
    """Counts how often each component is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from wan_core.render import stages

        self.read: list[str] = []
        real = stages.load_component

        def load(path: Path, *given: Any, **named: Any) -> Any:
            self.read.append(Path(path).name)
            return real(path, *given, **named)

        monkeypatch.setattr(stages, "load_component", load)


def by_hand(video: torch.Tensor, denoise: float, steps: int) -> torch.Tensor:
    """A loop of a few lines over both experts of a T2V-A14B, with diffusers' own modules."""
    # Not read from the folder: a CPU rounds otherwise where weights lie in a mapped file.
    pipe = pipeline("wan2.2-t2v-a14b", components("wan2.2-t2v-a14b"))
    scheduler = make_scheduler("unipc", 12.0)
    scheduler.set_timesteps(steps)
    texts = pipe.encode_prompt(
        TEXT["prompt"], "a dog", max_sequence_length=512, device=torch.device("cpu")
    )
    pixels = (video * 2 - 1).permute(3, 0, 1, 2)[None]
    config = pipe.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    init = (pipe.vae.encode(pixels).latent_dist.mode() - mean) * std
    noise = torch.randn(init.shape, generator=torch.Generator().manual_seed(7))
    timesteps = scheduler.timesteps[steps - int(steps * denoise) :]
    x = scheduler.add_noise(init, noise, timesteps[:1])
    for t in timesteps:
        high = t >= 875
        model, scale = (pipe.transformer, 4.0) if high else (pipe.transformer_2, 3.0)
        c, u = (
            model(hidden_states=x, timestep=t.expand(1), encoder_hidden_states=e)[0] for e in texts
        )
        x = scheduler.step(u + scale * (c - u), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("denoise", [0.5, 0.25])
@torch.no_grad()
def test_both_experts_or_only_the_one_that_makes_steps(
    folder: Any, monkeypatch: pytest.MonkeyPatch, denoise: float
) -> None:
    """Of eight steps at shift 12 the last two are the low-noise expert's: 0.25 needs it alone."""
    path, video = folder("wan2.2-t2v-a14b"), pictures(9, 4)
    watched = Watched(monkeypatch)
    wrapper = open_wan(path)
    job: dict[str, Any] = {
        "num_inference_steps": 8, "guidance_scale": 4.0, "guidance_scale_2": 3.0,
        "control": WanControl(video=video, denoise=denoise),
    }  # fmt: skip
    result = make(wrapper, **job)
    assert torch.equal(result.latents, by_hand(video, denoise, 8))
    config = GenerationConfig(**(SIZE | TEXT | job))
    stages = [stage.name for stage in wrapper.estimate_memory_usage(config).stages]
    assert "control_encode" in stages and "denoise_low" in stages
    high = denoise > 0.25
    assert ("transformer" in watched.read) == ("denoise_high" in stages) == high
    assert "transformer_2" in watched.read


def test_a_plan_without_the_idle_expert_needs_less(folder: Any) -> None:
    wrapper = open_kept(folder("wan2.2-t2v-a14b"), offload="none")
    job = SIZE | TEXT | {"num_inference_steps": 8, "num_frames": 5}
    machine = wrapper.machine()  # once: what the process holds changes
    needs = {
        denoise: wrapper.foresee(
            GenerationConfig(**job, control=WanControl(video=pictures(5), denoise=denoise)), machine
        ).estimate.peak_usage_mb
        for denoise in (1.0, 0.25)
    }
    assert needs[0.25] < needs[1.0]


def test_the_5b_and_image_to_video_start_from_a_video_too(folder: Any) -> None:
    """The first frame of the 5B stays the given one; the I2V model keeps its condition."""
    video = pictures(9, 5)
    for family in ("wan2.2-ti2v-5b", "wan2.2-i2v-a14b"):
        wrapper = open_kept(folder(family))
        job: dict[str, Any] = {"image": pictures(1, 6)[0]}
        plain = make(wrapper, **job)
        far, near = (
            make(wrapper, **job, control=WanControl(video=video, denoise=d)) for d in (0.8, 0.2)
        )
        other = make(wrapper, **job, control=WanControl(video=pictures(9, 9), denoise=0.2))
        assert not torch.equal(far.latents, plain.latents)
        assert not torch.equal(near.latents, other.latents)
        if family == "wan2.2-ti2v-5b":
            assert torch.equal(far.latents[:, :, 0], plain.latents[:, :, 0])
            assert torch.equal(near.latents[:, :, 0], other.latents[:, :, 0])


def test_windows_make_the_shortened_schedule(folder: Any) -> None:
    """Windows that cover the clip are the clip; shorter ones make as many steps from the video."""
    wrapper, video = open_kept(folder("wan2.1-t2v")), pictures(33, 8)
    job: dict[str, Any] = {"num_frames": 33, "control": WanControl(video=video, denoise=0.6)}
    whole = make(wrapper, **job)
    covered = make(wrapper, **job, max_chunk_size=33, force_chunked_processing=True)
    assert torch.equal(whole.latents, covered.latents)
    steps: list[tuple[int, int]] = []
    windowed = make(
        wrapper, **job, max_chunk_size=17, window_overlap=8,
        progress_callback=lambda done, total, _: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(1, 3), (2, 3), (3, 3)]
    # Nothing but noise of the video's first step is new: at a step of nearly no noise both agree.
    assert not torch.equal(windowed.latents, whole.latents)
    still = WanControl(video=video, denoise=0.2)
    a = make(wrapper, **(job | {"control": still, "flow_shift": 0.05}))
    b = make(wrapper, **(job | {"control": still, "flow_shift": 0.05}), max_chunk_size=17,
             window_overlap=8)  # fmt: skip
    assert (a.latents - b.latents).abs().max() < 0.1


def test_every_segment_makes_the_shortened_schedule(folder: Any) -> None:
    """In continuation mode each segment starts from its own part of the video."""
    wrapper, video = open_kept(folder("wan2.2-ti2v-5b")), pictures(33, 8)
    steps: list[int] = []
    made = make(
        wrapper, num_frames=33, image=pictures(1, 2)[0], window_mode="continuation",
        max_chunk_size=17, window_overlap=4, control=WanControl(video=video, denoise=0.6),
        progress_callback=lambda done, total, _: steps.append(total),
    )  # fmt: skip
    segments = int(made.metadata["windows"].split()[0])
    assert steps == [3 * segments] * (3 * segments)
    other = make(
        wrapper, num_frames=33, image=pictures(1, 2)[0], window_mode="continuation",
        max_chunk_size=17, window_overlap=4,
        control=WanControl(video=torch.cat([video[:25], pictures(8, 77)]), denoise=0.6),
    )  # fmt: skip
    # The causal encoder keeps what comes before a change, and so does every earlier segment.
    assert torch.equal(made.latents[:, :, :4], other.latents[:, :, :4])
    assert not torch.equal(made.latents[:, :, -1], other.latents[:, :, -1])


def test_a_render_from_a_video_that_was_cut_off_goes_on(folder: Any, tmp_path: Path) -> None:
    wrapper, video = open_kept(folder("wan2.1-t2v")), pictures(9, 3)

    def job(video: torch.Tensor, **more: Any) -> dict[str, Any]:
        return {
            "control": WanControl(video=video, denoise=0.8), "resume": "auto",
            "journal_folder": tmp_path, **more,
        }  # fmt: skip

    def stop(done: int, *_: Any) -> None:
        if done == 2:
            raise KeyboardInterrupt

    whole = make(wrapper, control=WanControl(video=video, denoise=0.8))
    with pytest.raises(KeyboardInterrupt):
        make(wrapper, **job(video, progress_callback=stop))
    with pytest.raises(WanError, match="control.video"):
        make(wrapper, **job(pictures(9, 4), resume="must"))
    rest = make(wrapper, **job(video, resume="must"))
    assert rest.metadata["resumed"] == "after step 3 of 5"
    assert torch.equal(rest.latents, whole.latents)


def test_a_control_that_asks_for_nothing_is_none(folder: Any) -> None:
    """The bits, the plan and the identity of a job stay what they were."""
    from wan_core.journal.identity import identity_key, plain_identity, render_identity

    wrapper = open_kept(folder("wan2.1-t2v"))
    plain, empty = GenerationConfig(**SIZE, **TEXT), GenerationConfig(**SIZE, **TEXT)
    empty.control = WanControl()
    keys = []
    for config in (plain, empty):
        request, plan = wrapper.plan(config)
        identity = plain_identity(render_identity(config, request, wrapper.architecture, plan))
        assert "control" not in identity["job"] and "control" not in identity["given"]
        keys.append(identity_key(identity))
    assert keys[0] == keys[1]
    assert torch.equal(make(wrapper).latents, make(wrapper, control=WanControl()).latents)


# Key frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["wan2.1-flf2v", pytest.param("wan2.1-i2v", marks=pytest.mark.slow)]
)
def test_first_and_last_frame_are_key_frames(folder: Any, family: str) -> None:
    """A start and an end image equal key frames 0 and -1, given in any way and order."""
    wrapper, (first, last) = open_kept(folder(family)), pictures(2, 1)
    today = make(wrapper, image=first, last_image=last)
    both = torch.stack([last, first])
    for more in (
        {"control": WanControl(keyframes=both, positions="-1, 0")},
        {"control": WanControl(keyframes=both, positions=[8, 0])},
        {"control": WanControl(keyframes=both.flip(0))},
        {"control": WanControl(keyframes=last[None], positions="-1"), "image": first},
        {"control": WanControl(keyframes=first[None], positions="0"), "last_image": last},
    ):  # fmt: skip
        assert torch.equal(make(wrapper, **more).latents, today.latents), more


def test_one_key_frame_is_a_start_image(folder: Any) -> None:
    wrapper, first = open_kept(folder("wan2.1-i2v")), pictures(1, 1)
    today = make(wrapper, image=first[0])
    assert torch.equal(make(wrapper, control=WanControl(keyframes=first)).latents, today.latents)


def test_leading_frames_of_the_5b(folder: Any) -> None:
    """One leading frame is the start image; five hold two latent frames, as they were encoded."""
    from wan_core.loading import load_component
    from wan_core.sampling import normalize_latents

    path, frames = folder("wan2.2-ti2v-5b"), pictures(9, 2)
    wrapper = open_kept(path)
    one = make(wrapper, control=WanControl(keyframes=frames[:1], positions="0"))
    assert torch.equal(one.latents, make(wrapper, image=frames[0]).latents)
    shown: list[torch.Tensor] = []
    five = make(
        wrapper, control=WanControl(keyframes=frames[:5], positions=range(5)),
        preview_callback=lambda step, total, clean: shown.append(clean),
    )  # fmt: skip
    vae: Any = load_component(path / "vae", torch.float32)
    pixels = (frames * 2 - 1).permute(3, 0, 1, 2)[None]
    known = normalize_latents(vae.encode(pixels).latent_dist.mode(), vae.config)
    assert torch.equal(five.latents[:, :, :2], known[:, :, :2])
    assert shown and all(torch.equal(one[:, :, :2], known[:, :, :2]) for one in shown)
    assert not torch.equal(five.latents[:, :, 2], one.latents[:, :, 2])
    # More of them than the first of several segments holds; the next one begins with the rest.
    for more in ({}, {"batch_size": 2}):
        segments = make(
            wrapper, control=WanControl(keyframes=frames, positions=range(9)), num_frames=13,
            window_mode="continuation", max_chunk_size=9, window_overlap=4,
            prompts="5: a red cat\na blue dog", **more,
        )  # fmt: skip
        assert torch.equal(segments.latents[:, :, :3], known.expand_as(segments.latents[:, :, :3]))


def test_a_middle_frame_reaches_the_clip(folder: Any) -> None:
    wrapper, frames = open_kept(folder("wan2.2-i2v-a14b")), pictures(3, 1)
    places = {
        at: make(wrapper, control=WanControl(keyframes=frames[:2], positions=[0, at])).latents
        for at in (3, 4, 5)
    }
    assert not torch.equal(places[3], places[4]) and not torch.equal(places[4], places[5])


def test_key_frames_in_windows(folder: Any) -> None:
    """A window that covers the clip is the clip, key frames and all."""
    wrapper, frames = open_kept(folder("wan2.2-i2v-a14b")), pictures(2, 1)
    job: dict[str, Any] = {"control": WanControl(keyframes=frames, positions=[2, 7])}
    whole = make(wrapper, **job)
    covered = make(wrapper, **job, max_chunk_size=9, force_chunked_processing=True)
    assert torch.equal(whole.latents, covered.latents)


def test_an_estimate_knows_the_pictures(folder: Any) -> None:
    wrapper = open_kept(folder("wan2.2-i2v-a14b"))
    control = WanControl(keyframes=pictures(2), positions=[2, 7])
    config = GenerationConfig(**SIZE, **TEXT, control=control)
    stages = [stage.name for stage in wrapper.estimate_memory_usage(config).stages]
    assert "condition_encode" in stages and "control_encode" not in stages


# What is said -----------------------------------------------------------------------------------


def test_what_is_done_to_a_video_is_said(folder: Any) -> None:
    wrapper = open_kept(folder("wan2.1-t2v"))
    config = GenerationConfig(**SIZE, **TEXT)
    for video, said in (
        (pictures(12), "12 frames; the first 9 are used"),
        (pictures(9, width=128, height=64), "is 128x64 and is scaled to 64x32"),
        (pictures(9, width=64, height=64), "is 64x64 and is stretched to 64x32; crop it"),
    ):
        result = wrapper.generate(replace(config, control=WanControl(video=video)))
        assert any(said in text for text in result.raise_for_error().warnings), said
    short = replace(config, num_frames=6, control=WanControl(video=pictures(7)))
    warnings = wrapper.generate(short).raise_for_error().warnings
    assert any("last frame is repeated 2 times" in text for text in warnings)


def test_no_frames_means_those_of_the_video(folder: Any) -> None:
    wrapper = open_kept(folder("wan2.1-t2v"))
    result = make(wrapper, num_frames=0, control=WanControl(video=pictures(12), denoise=0.4))
    assert len(result.frames) == 9


# Tracks ------------------------------------------------------------------------------------------

ATI = '[[{"x": 10, "y": 10}, {"x": 30, "y": 12}, {"x": 60, "y": 20}]]'


def paths(frames: int = 9) -> dict[str, torch.Tensor]:
    path = torch.linspace(4, 60, frames).view(-1, 1, 1).expand(frames, 2, 2) / 2
    return {"track_path": path, "track_visibility": torch.ones(frames, 2, dtype=torch.bool)}


@pytest.mark.parametrize(
    "family", ["wan2.1-i2v", pytest.param("wan2.2-i2v-a14b", marks=pytest.mark.slow)]
)
def test_tracks_reach_the_condition(folder: Any, family: str) -> None:
    """As a start image and as key frame 0 they make the same clip, each form another one."""
    wrapper, first = open_kept(folder(family)), pictures(1, 1)
    plain = make(wrapper, image=first[0]).latents
    for tracks in (ATI, paths()):
        a = make(wrapper, image=first[0], control=WanControl(tracks=tracks)).latents
        b = make(wrapper, control=WanControl(tracks=tracks, keyframes=first)).latents
        assert torch.equal(a, b) and not torch.equal(a, plain)
    hidden = paths() | {"track_visibility": torch.zeros(9, 2)}
    unseen = make(wrapper, image=first[0], control=WanControl(tracks=hidden))
    assert torch.equal(unseen.latents, plain)
