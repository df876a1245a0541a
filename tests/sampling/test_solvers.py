"""The solvers of our own against closed forms: what they solve, how exactly, and their levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.machines import architecture
from torch import Tensor

from wan_core import GenerationConfig
from wan_core.errors import InvalidRequest
from wan_core.job import (
    SCHEDULERS,
    StepNoise,
    expected_steps,
    plan_steps,
    plan_windows,
    resolve,
    solver_sigmas,
)
from wan_core.sampling import (
    Conditions,
    DenoiseState,
    Expert,
    Solver,
    denoise_steps,
    make_solver,
    noised,
)

SHAPE = (1, 2, 5, 4, 4)
DETERMINISTIC = [name for name in SCHEDULERS if name != "lcm"]


def solver(name: str, **asked: Any) -> Any:
    """Make the solver of a request."""
    model = architecture("wan2.1-t2v-1.3b")
    asked = {"sigma_schedule": "simple", "flow_shift": 5.0, **asked}
    request = resolve(GenerationConfig(prompt="", scheduler=name, **asked), model)
    made = make_solver(request, None, torch.device("cpu"), StepNoise("clip", 7).draw)
    made.set_begin_index(0)
    return made


def run(made: Any, clean: Callable[[Tensor, float], Tensor], start: Tensor, count: int) -> Tensor:
    """Make ``count`` steps with a model that predicts ``clean(latents, sigma)``."""
    latents = start
    for index in range(count):
        sigma = float(made.sigmas[index])
        velocity = (latents - clean(latents, sigma)) / sigma
        latents = made.step(velocity, made.timesteps[index], latents, return_dict=False)[0]
    return latents


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_model_that_knows_the_clip_is_followed_to_it(name: str, steps: int) -> None:
    """x0 is the same at every level, so every solver ends at it; UniPC at its last level 0.001."""
    clip = noise(1)
    made = solver(name, num_inference_steps=steps)
    found = run(made, lambda *_: clip, noise(), steps)
    expected = clip
    if name == "unipc":
        expected = (0.001 * noise() + (1 - 0.001) * clip) / (1 - 0.001)
    # ComfyUI's float32 takes the level 0.001 for something near it.
    assert torch.allclose(found, expected, atol=2e-4 if name == "unipc" else 2e-5)


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("dpm++2m", 2), ("res_multistep", 2), ("unipc", 3)]
)
def test_twice_the_steps_divide_the_error_by_the_order(name: str, order: int) -> None:
    """x0 = x/2 has the solution x = sqrt(s); levels from 1 to 0.05 in equal ratios."""

    def error(steps: int) -> float:
        levels = [0.05 ** (index / steps) for index in range(steps + 1)]
        made = solver(name, sigmas=[*levels, 0.01], sigma_schedule=None, flow_shift=None)
        start = torch.ones(1, 1, 1, 1, 1)
        return abs(float(run(made, lambda x, _: x / 2, start, steps)) - math.sqrt(0.05))

    # The first step has no history and is of first order, which costs the third order a little.
    ratio = error(12) / error(24)
    assert 2 ** (order - 0.4) < ratio < 2 ** (order + 1.2)


def test_lcm_adds_the_noise_of_the_step_and_draws_it_again() -> None:
    clip, fresh = noise(1), torch.Generator().manual_seed(8)
    made = solver("lcm", num_inference_steps=4)
    levels = [float(sigma) for sigma in made.sigmas]
    expected = [(1 - s) * clip + s * torch.randn(SHAPE, generator=fresh) for s in levels[1:4]]
    latents = noise()
    for index, wanted in enumerate(expected):
        velocity = (latents - clip) / levels[index]
        before = latents
        latents = made.step(velocity, made.timesteps[index], before, return_dict=False)[0]
        assert torch.allclose(latents, wanted, atol=1e-6)
        made.step_index = index  # the same step once more, as after an error
        again = made.step(velocity, made.timesteps[index], before, return_dict=False)[0]
        assert torch.equal(again, latents)


def test_noise_of_steps_differs_by_step_segment_and_seed() -> None:
    """Asked in any order, each is always the same; none is the clip's first noise."""
    drawn = {
        (name, seed, step, segment): StepNoise(name, seed).draw(step, SHAPE, segment)
        for name in ("clip", "frame")
        for seed in (0, 1)
        for step in (0, 1, 2)
        for segment in (0, 1)
    }
    one = {name: StepNoise(name, 0) for name in ("clip", "frame")}
    for (name, seed, step, segment), expected in drawn.items():
        if seed == 0:
            assert torch.equal(one[name].draw(step, SHAPE, segment), expected)
        for other in (
            key for key in drawn if key[:1] == (name,) and key != (name, seed, step, segment)
        ):
            # Seed 1's first draw is seed 0's second one only if generators were shared.
            assert not torch.equal(drawn[other], expected)
        assert not torch.equal(
            expected, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        )


LIGHTX2V = (1.0, 0.9375, 0.8333, 0.625, 0.0)


def test_levels() -> None:
    """Four steps of lightx2v; UniPC leaves one of five out; official ones are Wan's own."""
    assert solver_sigmas("euler", "simple", 4, 5.0) == pytest.approx(LIGHTX2V, abs=5e-5)
    five = solver_sigmas("euler", "simple", 5, 5.0)
    assert five is not None and solver_sigmas("unipc", "simple", 4, 5.0) == (*five[:4], 0.0)
    assert solver_sigmas("unipc", "official", 4, 5.0) is None
    assert solver_sigmas("euler", "official", 4, 5.0, (0.9, 0.3)) == (0.9, 0.3, 0.0)
    official = solver("unipc", num_inference_steps=7, sigma_schedule="official").sigmas
    ours = solver("lcm", num_inference_steps=7, sigma_schedule="official").sigmas
    assert torch.allclose(ours, official, atol=2e-6)


def test_a_first_level_below_1_begins_with_less_noise() -> None:
    made = solver("euler", sigmas=[0.9, 0.4], sigma_schedule=None, flow_shift=None)
    assert isinstance(made, Solver) and torch.equal(made.scaled(noise()), noise() * made.sigmas[0])
    assert torch.equal(solver("euler", num_inference_steps=2).scaled(noise()), noise())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_windows_over_the_clip_are_the_plain_run(name: str) -> None:
    """And where frames do not see each other, windows are too: solvers step the clip as a whole."""

    def model(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.tanh(hidden_states) * (timestep.flatten()[0] / 700),)

    def denoised(windows: Any) -> Tensor:
        made, steps = solver(name, num_inference_steps=5), range(5)
        state = DenoiseState(latents=torch.randn(1, 2, 13, 4, 4), next_step=0)
        state.latents = state.latents.new_ones(state.latents.shape) * noise()[:, :, :1]
        expert = Expert(name="only", model=model, dtype=torch.float32, guidance_scale=1.0)
        told = Conditions(prompt_embeds=torch.zeros(1, 1, 1))
        return denoise_steps(state, steps, expert, made, told, windows=windows).latents

    plain = denoised(None)
    for frames in (81, 17):
        assert torch.equal(denoised(plan_windows(13, frames, 8)), plain)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_half_precision_velocities_leave_float32_latents(name: str) -> None:
    made = solver(name, num_inference_steps=4)
    latents = noise()
    for index in range(4):
        velocity = torch.tanh(latents).bfloat16()
        latents = made.step(velocity, made.timesteps[index], latents, return_dict=False)[0]
        assert latents.dtype == torch.float32 and not torch.equal(latents, latents.bfloat16())


COMFYUI = {"scheduler": "unipc", "sigma_schedule": "simple"}
BAD = [
    ({"sigma_schedule": "karras"}, "sigma_schedule is 'karras'; allowed are official, simple"),
    ({"scheduler": "heun"}, "scheduler is 'heun'; allowed are unipc, euler"),
    ({"sigmas": []}, "sigmas is"),
    ({"sigmas": [0.5, 0.5]}, "sigmas is"),
    ({"sigmas": [0.5, 0.9]}, "smaller than the one before"),
    ({"sigmas": [1.2, 0.5]}, "at most 1"),
    ({"sigmas": [0.0]}, "The last step.s 0 may be left out"),
    ({"sigmas": [1.0, 0.0, 0.0]}, "above 0"),
    ({"sigmas": [1.0, float("nan")]}, "sigmas is"),
    ({"sigmas": [1.0, None]}, "sigmas is"),
    ({"sigmas": "1.0, 0.5"}, "sigmas is"),
    ({"sigmas": 0.5}, "sigmas is"),
    ({"sigmas": [1 - i / 2000 for i in range(1001)]}, "1000 at most"),
    ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "num_inference_steps is 3 and sigmas has 2"),
    ({"sigmas": [1.0, 0.99999999]}, "smaller than the one before"),  # in float32 they are equal
    ({"sigmas": [1.0, 1e-60]}, "above 0"),
    # Where ComfyUI's UniPC divides by zero.
    ({"sigmas": [1.0, 0.5, 0.001], "scheduler": "unipc"}, "sigmas has a noise level 0.001 after"),
    ({"num_inference_steps": 1000} | COMFYUI, "1000 steps at flow_shift 8 have a noise level 1 "),
    ({"num_inference_steps": 50, "flow_shift": 0.01} | COMFYUI, "level 0.001 after 0.000416"),
]


@pytest.mark.parametrize(("asked", "said"), BAD)
def test_what_is_not_allowed(asked: dict[str, Any], said: str) -> None:
    config = GenerationConfig(**{"prompt": "", "scheduler": "euler"} | asked)
    with pytest.raises(InvalidRequest, match=said):
        resolve(config, architecture("wan2.1-t2v-1.3b"))


def test_numbers_of_any_library_are_levels() -> None:
    import numpy

    comfyui = torch.tensor([1.0, 0.25, 0.0])  # whose levels end with the one that is reached last
    for given in (numpy.array([1.0, 0.25]), torch.tensor([1.0, 0.25]), (1, 0.25), comfyui):
        request = resolve(
            GenerationConfig(prompt="", sigmas=given), architecture("wan2.1-t2v-1.3b")
        )
        assert (request.sigmas, request.num_inference_steps) == ((1.0, 0.25), 2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_plans_expect_the_steps_that_the_solver_makes(name: str) -> None:
    """Before torch is there: each expert's steps, and the level that a video begins at."""
    model = architecture("wan2.2-t2v-a14b")
    for asked in ({"sigma_schedule": "simple"}, {"sigmas": [0.97, 0.9, 0.8, 0.5]}):
        for steps in (None, 4, 7, 20):
            if steps is not None and "sigmas" in asked:
                continue
            config = GenerationConfig(
                prompt="", scheduler=name, num_inference_steps=steps, **asked
            )  # fmt: skip
            request = resolve(config, model)
            made = make_solver(request, None, torch.device("cpu"), StepNoise("clip", 0).draw)
            expected = expected_steps(request, 2)
            assert expected.timesteps == pytest.approx([float(t) for t in made.timesteps], rel=1e-6)
            wanted = plan_steps([float(t) for t in made.timesteps], experts=2, boundary=0.875)
            assert (expected.high, expected.low) == (wanted.high, wanted.low)
            made.set_begin_index(2)
            sigma = float(made.sigmas[2])
            mixed = noised(made, noise(1), noise(2), 2)
            assert torch.allclose(mixed, (1 - sigma) * noise(1) + sigma * noise(2))
