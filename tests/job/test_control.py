"""What of a control applies to which model, and the steps that are expected without a scheduler."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.machines import architecture

from wan_core import WanPipelineLoader
from wan_core.config import GenerationConfig, WanControl, demo_model
from wan_core.errors import InvalidRequest
from wan_core.job import make_scheduler, resolve
from wan_core.job.control import first_step, has_control, reads
from wan_core.job.steps import expected_sigmas, expected_steps, plan_steps


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize("scheduler", ["unipc", "euler", "dpm++2m"])
def test_expected_steps_are_those_of_the_scheduler(scheduler: str, shift: float) -> None:
    """Noise levels to rounding, timesteps to one, and the switch between experts at every one."""
    for steps in (1, 2, 4, 7, 15, 20, 40, 50):
        real = make_scheduler(scheduler, shift)
        real.set_timesteps(steps)
        ours = expected_sigmas(scheduler, shift, steps)
        assert max(abs(a - float(b)) for a, b in zip(ours, real.sigmas, strict=False)) < 2e-6
        times = [float(t) for t in real.timesteps]
        job = {"num_frames": 9, "prompt": "x", "scheduler": scheduler, "flow_shift": shift}
        for name in ("wan2.2-t2v-a14b", "wan2.2-i2v-a14b"):
            image = {"image": "x"} if "i2v" in name else {}
            config = GenerationConfig(**job, **image, num_inference_steps=steps)
            request = resolve(config, architecture(name))
            found = expected_steps(request, 2)
            wanted = plan_steps(times, experts=2, boundary=request.boundary)
            assert max(abs(a - b) for a, b in zip(found.timesteps, times, strict=True)) <= 1
            assert (found.high, found.low) == (wanted.high, wanted.low)


@pytest.mark.parametrize("steps", [1, 3, 4, 20, 40, 50])
def test_the_first_step_is_the_pipeline_s(steps: int) -> None:
    from diffusers import WanVideoToVideoPipeline

    class Pipe:
        class scheduler:
            order = 1

    for share in range(1, 101):
        strength = share / 100
        times = torch.arange(steps)
        rest, _ = WanVideoToVideoPipeline.get_timesteps(Pipe(), steps, times, strength, "cpu")
        if len(rest) == 0:
            with pytest.raises(InvalidRequest, match=f"makes none of {steps} steps"):
                first_step(steps, strength)
        else:
            assert first_step(steps, strength) == int(rest[0])


def test_what_the_message_names_makes_a_step() -> None:
    for steps in range(1, 200):
        with pytest.raises(InvalidRequest) as caught:
            first_step(steps, 0.0)
        named = float(str(caught.value).split("; ")[1].split()[0])
        assert first_step(steps, named) == steps - 1


READS = {
    "wan2.1-t2v-1.3b": {"video"}, "wan2.2-t2v-a14b": {"video"}, "wanfit-demo-t2v": {"video"},
    "wan2.2-ti2v-5b": {"video", "keyframes"}, "wan2.1-flf2v-14b": {"keyframes"},
    "wan2.2-i2v-a14b": {"video", "keyframes", "tracks"},
    "wan2.1-i2v-14b": {"keyframes", "tracks"},
    "wan2.1-fun-control-1.3b": {"video"}, "wan2.1-fun-control-14b": {"video", "reference"},
    "wan2.2-fun-control-a14b": {"video", "reference", "keyframes"},
    "wan2.2-fun-control-5b": {"video", "reference", "keyframes"},
    "wan2.2-fun-inp-5b": {"video", "keyframes"}, "wan2.1-fun-camera-14b": {"camera"},
    "wan2.2-fun-camera-a14b": {"video", "camera", "keyframes"},
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_what_a_model_reads(name: str) -> None:
    assert set(reads(architecture(name))) == READS[name]


def test_the_pictures_are_spread_evenly() -> None:
    for count, image, last, wanted in (
        (2, False, False, (0, 80)), (3, False, False, (0, 40, 80)), (1, False, False, (0,)),
        (1, True, True, (40, 0, 80)), (2, True, False, (40, 80, 0)), (1, False, True, (0, 80)),
    ):  # fmt: skip
        config = GenerationConfig(
            prompt="x", control=WanControl(keyframes=torch.zeros(count, 8, 8, 3)),
            image="x" if image else None, last_image="x" if last else None,
        )  # fmt: skip
        found = resolve(config, architecture("wan2.2-i2v-a14b")).control
        assert found is not None and found.positions == wanted


def test_fun_control_follows_its_video_and_the_others_start_from_theirs() -> None:
    for name in READS:
        if "video" in READS[name]:
            wanted = "control" if "fun-control" in name else "start"
            assert reads(architecture(name))["video"] == wanted, name


def test_of_several_references_the_first_is_said_to_be_used() -> None:
    control = WanControl(reference=torch.zeros(2, 8, 8, 3))
    config = GenerationConfig(prompt="x", control=control)
    said = resolve(config, architecture("wan2.2-fun-control-a14b")).warnings
    assert any("holds 2 pictures" in text and "the first" in text for text in said)
    said = resolve(config, architecture("wan2.1-vace-14b")).warnings
    assert not any("the first" in text for text in said)


def test_a_camera_of_another_size_or_length_is_fitted_and_it_is_said() -> None:
    from wan_core.job import check_inputs

    model = architecture("wan2.2-fun-camera-a14b")
    rays = torch.rand(1, 24, 4, 16, 32, generator=torch.Generator().manual_seed(0))
    for size, said in (((32, 16), 1), ((64, 32), 2)):
        config = GenerationConfig(
            prompt="x", num_frames=9, width=size[0], height=size[1],
            control=WanControl(camera=rays),
        )  # fmt: skip
        request = resolve(config, model)
        size = (request.width, request.height)
        inputs = check_inputs(config, request, model)
        assert inputs.control is not None and inputs.control.camera is not None
        found = inputs.control.camera
        assert found.shape == (1, 24, 3, size[1], size[0])
        assert len([text for text in inputs.warnings if "control.camera" in text]) == said
        low, high = rays[:, :, :3].aminmax()
        assert low <= found.min() and found.max() <= high
        if size == (32, 16):
            assert torch.equal(found, rays[:, :, :3])


def test_an_end_that_is_cut_off_is_said() -> None:
    picture = torch.zeros(16, 16, 3)
    ends = (
        {"image": picture, "last_image": picture},
        {"image": picture, "control": WanControl(keyframes=picture[None], positions="-1")},
        {"control": WanControl(keyframes=torch.zeros(2, 16, 16, 3))},
    )
    for end in ends:
        for frames, cut in ((30, True), (33, False)):
            config = GenerationConfig(prompt="x", num_frames=frames, **end)
            said = resolve(config, architecture("wan2.2-i2v-a14b")).warnings
            assert any("not among the 30 returned" in text for text in said) == cut
    config = GenerationConfig(prompt="x", num_frames=30, image=picture)
    said = resolve(config, architecture("wan2.2-i2v-a14b")).warnings
    assert not any("not among" in text for text in said)


def test_paths_of_the_frames_asked_for_are_enough() -> None:
    """What is made beyond them is cut off; videos and masks are taken alike."""
    from wan_core.job import check_inputs

    model = architecture("wan2.1-i2v-14b")
    for frames in (30, 33):
        config = GenerationConfig(
            prompt="x", num_frames=frames, image=torch.zeros(16, 16, 3), width=16, height=16,
            control=WanControl(tracks={"track_path": torch.rand(30, 2, 2)}),
        )  # fmt: skip
        if frames == 33:
            with pytest.raises(InvalidRequest, match="has 30 frames, 3 fewer than the clip's 33"):
                check_inputs(config, resolve(config, model), model)
            continue
        inputs = check_inputs(config, resolve(config, model), model)
        assert inputs.control is not None and inputs.control.tracks is not None
        found = inputs.control.tracks
        assert len(found) == 33 and torch.equal(found[30:], found[29:30].expand(3, -1, -1))


def test_a_mask_of_no_video_is_said_to_keep_grey() -> None:
    from wan_core.job import check_inputs

    model = architecture("wan2.1-vace-14b")
    mask = torch.ones(5, 16, 16)
    mask[:, :8] = 0

    def said(image: torch.Tensor | None = None, **given: torch.Tensor) -> bool:
        control = WanControl(**given)
        config = GenerationConfig(
            prompt="x", num_frames=5, width=16, height=16, control=control, image=image
        )
        warnings = check_inputs(config, resolve(config, model), model).warnings
        return any("kept grey there" in text for text in warnings)

    assert said(mask=mask) and said(mask=mask[0], keyframes=torch.zeros(1, 16, 16, 3))
    assert not said(mask=mask, video=torch.zeros(5, 16, 16, 3))
    assert not said(mask=torch.ones(16, 16))
    first = torch.ones(5, 16, 16)
    first[0] = 0  # where a picture is shown nothing is grey
    picture = torch.zeros(1, 16, 16, 3)
    assert said(mask=first) and not said(mask=first, image=picture)
    assert not said(mask=first, keyframes=picture)
    first[2] = 0
    assert said(mask=first, keyframes=picture)


def test_a_control_without_anything_is_none() -> None:
    empty = WanControl()
    assert not has_control(None) and not has_control(empty)
    for change in (
        {"video": torch.zeros(1, 8, 8, 3)}, {"strength": 0.5}, {"strength": [1.0]},
        {"denoise": 0.5}, {"clear_masked": True}, {"tracks": "[]"},
    ):  # fmt: skip
        assert has_control(replace(empty, **change))


def test_a_control_that_has_one_axis_too_many_or_too_few_is_told() -> None:
    """A mask as pictures have it, with channels; more key frames than the clip has frames."""
    base = GenerationConfig(prompt="x", num_frames=5, width=32, height=32)
    video = torch.zeros(5, 32, 32, 3)
    vace = WanPipelineLoader().load_wan_pipeline(demo_model("vace"))
    for control, said in (
        (WanControl(video=video, mask=torch.ones(32, 32, 3)), "has channels: take one of them"),
        (WanControl(video=video, mask=torch.ones(5, 32, 32, 1)), "has channels: take one of them"),
        (WanControl(keyframes=torch.zeros(9, 32, 32, 3)), "keyframes has 9 pictures, and the clip"),
        (WanControl(positions="0, -1"), "no keyframes to place"),
        (WanControl(positions=np.array([0, 4])), "positions is ndarray.*no keyframes to place"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            vace.plan(replace(base, control=control))
    vace.plan(replace(base, control=WanControl(video=video, mask=torch.ones(32, 32))))


def test_what_a_start_will_be_is_said_beforehand() -> None:
    """A video of which nothing will be left, and a small share at a large shift."""
    video = torch.zeros(9, 8, 8, 3)
    base = GenerationConfig(prompt="x", num_frames=9, num_inference_steps=20)
    for denoise, shift, said in (
        (1.0, 3.0, "control.denoise is 1"), (0.3, 12.0, "noise of sigma 0.8"), (0.3, 3.0, ""),
        (0.8, 12.0, ""),
    ):  # fmt: skip
        control = WanControl(video=video, denoise=denoise)
        config = replace(base, control=control, flow_shift=shift)
        warnings = resolve(config, architecture("wan2.1-t2v-1.3b")).warnings
        found = [text for text in warnings if "control.denoise" in text]
        assert len(found) == bool(said) and all(said in text for text in found), found
