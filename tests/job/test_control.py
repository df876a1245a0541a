"""What of a control applies to which model, and the steps that are expected without a scheduler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.machines import architecture

from wan_core.config import GenerationConfig, WanControl
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


def test_a_control_without_anything_is_none() -> None:
    empty = WanControl()
    assert not has_control(None) and not has_control(empty)
    for change in (
        {"video": torch.zeros(1, 8, 8, 3)}, {"strength": 0.5}, {"strength": [1.0]},
        {"denoise": 0.5}, {"clear_masked": True}, {"tracks": "[]"},
    ):  # fmt: skip
        assert has_control(replace(empty, **change))


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
