"""VACE's control in windows and segments: sliced by the clip's frames, references always in front.

The denoiser here knows the right answer: it heads for the control it is told at every place, so
that a control that is off by a frame, or a reference that is missing, shows in the result.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wan_core.job import NOISES, draw_noise, make_scheduler, plan_segments, plan_windows
from wan_core.job.windows import FUSIONS, WindowPlan
from wan_core.sampling import ClipSegments, Conditions, DenoiseState, Expert, denoise_steps

FRAMES, REFERENCES = 21, 2
SIZE = (1, 3, REFERENCES + FRAMES, 4, 4)


def control() -> Tensor:
    """A control of 3 x 3 channels, every number of its own."""
    return torch.randn(1, 9, *SIZE[2:], generator=torch.Generator().manual_seed(5))


def scheduler_of(steps: int = 4) -> Any:
    scheduler = make_scheduler("euler", 5.0)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def told(vace: Tensor, references: int = REFERENCES) -> Conditions:
    return Conditions(
        prompt_embeds=torch.zeros(1, 1, 1), vace=vace, vace_scale=torch.ones(2),
        vace_grey=torch.full((1, 3, FRAMES, 4, 4), 0.25), references=references,
    )  # fmt: skip


class Follows:
    """Predicts, frame by frame, the way to what the control says there; remembers its calls."""

    def __init__(self, scheduler: Any, whole: bool = False) -> None:
        self.scheduler, self.whole = scheduler, whole
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **call: Any) -> tuple[Tensor]:
        self.calls.append(call)
        latents, vace = call["hidden_states"], call["control_hidden_states"]
        assert latents.shape[2] == vace.shape[2]
        index = int((self.scheduler.timesteps == call["timestep"][0]).nonzero()[0])
        target = vace[:, :3] + vace[:, 3:6] * vace[:, 6:9]
        velocity = (latents - target) / self.scheduler.sigmas[index]
        if self.whole:  # references see the window that they are in front of
            velocity[:, :, :REFERENCES] += velocity[:, :, REFERENCES:].mean()
        return (velocity,)


def denoised(
    vace: Tensor, windows: WindowPlan | None, *, whole: bool = False, anchor: bool = False
) -> tuple[Tensor, Follows]:
    scheduler = scheduler_of()
    model = Follows(scheduler, whole)
    expert = Expert(name="only", model=model, dtype=torch.float32, guidance_scale=1.0)
    noise = draw_noise("clip", SIZE, 3)  # type: ignore[arg-type]
    state = denoise_steps(
        DenoiseState(latents=noise, next_step=0), range(4), expert, scheduler, told(vace),
        windows=windows, anchor=anchor,
    )  # fmt: skip
    return state.latents, model


@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("schedule", ["static", "uniform", "looped"])
def test_a_denoiser_of_frames_makes_the_same_in_windows(
    schedule: str, fusion: str, anchor: bool
) -> None:
    vace = control()
    expected, _ = denoised(vace, None)
    plan = plan_windows(FRAMES, 29, 12, schedule=schedule, fusion=fusion)
    found, model = denoised(vace, plan, anchor=anchor)
    assert plan.count > 1
    assert torch.equal(found, expected)
    for call in model.calls:
        assert torch.equal(call["control_hidden_states"][:, :, :REFERENCES], vace[:, :, :2])
    # Whatever the noise was, the answer is the control's: sigma ends at zero.
    target = vace[:, :3] + vace[:, 3:6] * vace[:, 6:9]
    assert torch.allclose(found, target, atol=1e-5)


def test_a_window_that_covers_the_clip_is_the_clip() -> None:
    plan = plan_windows(FRAMES, 4 * FRAMES - 3, 12)
    assert plan.count == 1
    assert torch.equal(
        denoised(control(), plan, whole=True)[0], denoised(control(), None, whole=True)[0]
    )


def test_every_window_s_reference_counts_alike() -> None:
    scheduler, plan = scheduler_of(), plan_windows(FRAMES, 29, 12)
    seen: list[Tensor] = []

    class Watched(Follows):
        def __call__(self, **call: Any) -> tuple[Tensor]:
            (velocity,) = super().__call__(**call)
            seen.append(velocity[:, :, :REFERENCES])
            return (velocity,)

    expert = Expert(
        name="only", model=Watched(scheduler, whole=True), dtype=torch.float32, guidance_scale=1.0
    )
    noise = draw_noise("clip", SIZE, 3)  # type: ignore[arg-type]
    state = DenoiseState(latents=noise.clone(), next_step=0)
    denoise_steps(state, range(1), expert, scheduler, told(control()), windows=plan)
    assert len(seen) == plan.count > 2
    mean = torch.stack(seen).mean(0)
    assert not torch.allclose(seen[0], seen[1])
    step = scheduler.sigmas[1] - scheduler.sigmas[0]
    expected = noise[:, :, :REFERENCES] + step * mean
    assert torch.allclose(state.latents[:, :, :REFERENCES], expected, atol=1e-5)


@pytest.mark.parametrize("references", [0, REFERENCES])
def test_a_segment_keeps_the_latents_before_it(references: int) -> None:
    """Handed over as they are: kept, grey in what is made, a black mask; the overlap is blended."""
    vace = control()[:, :, REFERENCES - references :]
    noise = draw_noise("frame", (1, 3, references + FRAMES, 4, 4), 3, references=references)
    plan = plan_segments(FRAMES, 0, 45, 12)  # 12 frames, 3 shared
    segments = ClipSegments(plan=plan, noise=noise, conditions=told(vace, references))
    assert [*map(list, plan.ranges)] == [list(range(12)), list(range(9, 21))]
    state, first = segments.begin(0, 0), segments.conditions_of(0)
    assert torch.equal(state.latents, noise[:, :, : references + 12])
    assert first.vace is not None and torch.equal(first.vace, vace[:, :, : references + 12])
    state.latents = torch.full_like(state.latents, 1.0)
    segments.finish(state, first)
    state, second = segments.begin(1, 0), segments.conditions_of(1)
    assert torch.equal(state.latents[:, :, :references], noise[:, :, :references])
    assert torch.equal(state.latents[:, :, references:], noise[:, :, references + 9 :])
    assert second.vace is not None
    expected = torch.cat([vace[:, :, :references], vace[:, :, references + 9 :]], dim=2).clone()
    known = expected[:, :, references : references + 3]
    known[:, :3], known[:, 3:6], known[:, 6:] = 1.0, 0.25, 0.0
    assert torch.equal(second.vace, expected)
    assert torch.equal(told(vace, references).vace, vace)  # type: ignore[arg-type]
    state.latents = torch.full_like(state.latents, 3.0)
    segments.finish(state, second)
    assert segments.clip.shape == (1, 3, FRAMES, 4, 4)
    line = segments.clip[0, 0, :, 0, 0]
    assert torch.equal(line[:9], torch.ones(9)) and torch.equal(line[12:], torch.full((9,), 3.0))
    assert torch.allclose(line[9:12], torch.tensor([1.5, 2.0, 2.5]))


@pytest.mark.parametrize("name", NOISES)
def test_noise_of_references_stands_before_the_clip_s(name: str) -> None:
    plan = plan_windows(FRAMES, 29, 12)
    size = (1, 3, REFERENCES + FRAMES, 4, 4)
    noise = draw_noise(name, size, 3, plan, references=REFERENCES)
    assert noise.shape == size
    flat = noise[0, 0].flatten(1)
    assert abs(float(noise.mean())) < 0.2 and 0.8 < float(noise.std()) < 1.2
    alike = sum(
        torch.equal(flat[0], flat[i]) or torch.equal(flat[1], flat[i]) for i in range(2, 23)
    )
    assert alike == 0
    if name == "clip":  # one draw, as in diffusers
        assert torch.equal(noise, draw_noise("clip", size, 3))
    else:
        plain = draw_noise(name, (1, 3, FRAMES, 4, 4), 3, plan)
        assert torch.equal(noise[:, :, REFERENCES:], plain)
