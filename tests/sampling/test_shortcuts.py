"""EasyCache and the guidance gate against plain loops, with windows, experts and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_core.job import make_scheduler, plan_windows
from wan_core.sampling import (
    Conditions,
    DenoiseState,
    Expert,
    Memory,
    Shortcuts,
    denoise,
    denoise_steps,
)

STEPS = 20
SCALE = 3.0
Model = Callable[..., tuple[Tensor]]


def noise(frames: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(1, 3, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


class Counting:
    """A smooth velocity that mixes the frames it sees; counts its calls by sigma and prompt."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []

    def __call__(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        prompt, time = float(encoder_hidden_states.flatten()[0]), float(timestep.flatten()[0])
        self.calls.append((int(time), prompt))
        mixed = hidden_states + 0.3 * hidden_states.mean(2, keepdim=True)
        return (torch.tanh(mixed + 0.2 * prompt) * (0.8 + 0.2 * time / 1000),)


def scheduler() -> Any:
    made = make_scheduler("unipc", 5.0)
    made.set_timesteps(STEPS)
    made.set_begin_index(0)
    return made


def told(guided: bool = True) -> Conditions:
    negative = torch.full((1, 1, 1), -1.0) if guided else None
    return Conditions(prompt_embeds=torch.ones(1, 1, 1), negative_prompt_embeds=negative)


def denoised(
    model: Model, asked: Shortcuts | None, *, guided: bool = True, switch: int = STEPS,
    frames: int = 5, windows: Any = None, state: DenoiseState | None = None, **more: Any,
) -> DenoiseState:  # fmt: skip
    """Make all steps, by two experts where ``switch`` lies within them."""
    state = state or DenoiseState(latents=noise(frames), next_step=0)
    made = more.pop("scheduler", None) or scheduler()
    for name, steps in (("high", range(switch)), ("low", range(switch, STEPS))):
        expert = Expert(
            name=name, model=model, dtype=torch.float32, guidance_scale=SCALE if guided else 1.0
        )
        denoise_steps(
            state, steps, expert, made, told(guided), windows=windows, shortcuts=asked, **more
        )
    return state


def mean(values: Tensor) -> float:
    return float(values.abs().mean())


class PlainEasyCache:
    """The published rule, written down once more, for one window of an expert's steps."""

    def __init__(self, model: Model, threshold: float, steps: range) -> None:
        self.model, self.threshold, self.steps = model, threshold, steps
        self.inputs: list[Tensor] = []
        self.computed: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self.error, self.k = 0.0, None

    def __call__(self, index: int, x: Tensor, timestep: Tensor) -> Tensor:
        first, last = self.steps.start, self.steps.stop - 1
        warm = first + max(2, math.ceil(len(self.steps) / 5))
        compute = index < warm or index == last
        if compute:
            self.error = 0.0
        elif self.k is not None:
            latest = max(self.computed)
            self.error += self.k * mean(x - self.inputs[-1]) / mean(self.computed[latest][1][0])
            compute = self.error >= self.threshold
            self.error = 0.0 if compute else self.error
        else:
            compute = True
        self.inputs.append(x)
        if compute:
            outs = [
                self.model(x, timestep=timestep, encoder_hidden_states=torch.tensor([prompt]))[0]
                for prompt in (1.0, -1.0)
            ]
            if self.computed:
                before = self.computed[max(self.computed)]
                self.k = mean(outs[0] - before[1][0]) / mean(x - before[0])
            self.computed[index] = (x, outs)
        else:
            at, outs = self.computed[max(self.computed)]
            outs = [x + (out - at) for out in outs]
        return outs[1] + SCALE * (outs[0] - outs[1])


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("switch", [STEPS, 8])
def test_easycache_is_the_published_rule(threshold: float, switch: int) -> None:
    """Latents and the steps that were computed equal those of a loop, for each expert anew."""
    ours, model = Counting(), Counting()
    found = denoised(ours, Shortcuts(easycache=threshold), switch=switch)
    made, latents = scheduler(), noise()
    rules: dict[int, PlainEasyCache] = {}
    for index in range(STEPS):
        steps = range(switch) if index < switch else range(switch, STEPS)
        rule = rules.setdefault(steps.start, PlainEasyCache(model, threshold, steps))
        velocity = rule(index, latents, made.timesteps[index].expand(1))
        latents = made.step(velocity, made.timesteps[index], latents, return_dict=False)[0]
    assert ours.calls == model.calls
    assert torch.allclose(found.latents, latents, atol=1e-5)
    computed = sum(len(rule.computed) for rule in rules.values())
    assert 2 * computed == found.memory.forwards == len(ours.calls)
    assert found.memory.skipped_steps == 2 * (STEPS - computed)
    if threshold > 0.02:
        assert computed < STEPS - 3


def test_the_last_difference_stands_behind_the_gate() -> None:
    """Both passes in the first 40 % of an expert's steps; then c + (s - 1)(c - u) of the last."""
    ours, model = Counting(), Counting()
    found = denoised(ours, Shortcuts(gate=0.4), switch=10)
    made, latents, delta = scheduler(), noise(), torch.zeros(())
    for index in range(STEPS):
        step, calls = made.timesteps[index], {}
        for prompt in (1.0, -1.0) if index % 10 < 4 else (1.0,):
            embeds = torch.tensor([prompt])
            calls[prompt] = model(latents, timestep=step, encoder_hidden_states=embeds)[0]
        if len(calls) == 2:
            delta = calls[1.0] - calls[-1.0]
        velocity = calls[1.0] + (SCALE - 1) * delta
        latents = made.step(velocity, step, latents, return_dict=False)[0]
    assert [time for time, _ in ours.calls] == [time for time, _ in model.calls]
    assert torch.allclose(found.latents, latents, atol=1e-5)
    assert (found.memory.forwards, found.memory.skipped_passes) == (28, 12)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("frames", [81, 17])
def test_what_leaves_nothing_out_changes_no_bit(guided: bool, frames: int) -> None:
    """A threshold of 0 and a gate of 1, with every window, expert and pass."""
    more: dict[str, Any] = {"guided": guided, "switch": 9, "frames": 13}
    more["windows"] = plan_windows(13, frames, 8)
    plain = denoised(Counting(), None, **more)
    for asked in (Shortcuts(), Shortcuts(easycache=0.0, gate=1.0)):
        assert torch.equal(denoised(Counting(), asked, **more).latents, plain.latents)
    other = denoised(Counting(), Shortcuts(easycache=0.2), **more)
    assert not torch.equal(other.latents, plain.latents)


def test_each_window_has_a_memory_of_its_own() -> None:
    """Two windows that share no frame give what two clips give that are made one by one."""
    asked = Shortcuts(easycache=0.1, gate=0.5)
    windows = plan_windows(10, 17, 0)
    assert [tuple(window.indices) for window in windows.windows(0)] == [
        tuple(range(5)), tuple(range(5, 10))
    ]  # fmt: skip
    whole = noise(10)
    # Another scale, so that the halves leave out different steps.
    whole[:, :, 5:] *= 4
    both = denoised(
        Counting(), asked, windows=windows, state=DenoiseState(latents=whole, next_step=0)
    )
    for part in (slice(0, 5), slice(5, 10)):
        one = denoised(
            Counting(), asked, state=DenoiseState(latents=whole[:, :, part], next_step=0)
        )
        assert torch.equal(both.latents[:, :, part], one.latents)


@pytest.mark.parametrize("asked", [Shortcuts(easycache=0.1), Shortcuts(easycache=0.1, gate=0.4)])
@pytest.mark.parametrize("windowed", [False, True])
def test_an_error_in_any_call_costs_no_bit(asked: Shortcuts, windowed: bool) -> None:
    """A step that failed is made again as if nothing had been, in the model and in the solver."""
    windows = plan_windows(10, 17, 0) if windowed else None
    whole = denoised(Counting(), asked, windows=windows, frames=10, switch=9)
    total = whole.memory.forwards

    class Once(Exception):
        pass

    def failing_at(model: Counting, number: int) -> Model:
        left = [number]

        def call(*a: Any, **k: Any) -> tuple[Tensor]:
            left[0] -= 1
            if left[0] == 0:
                raise Once
            return model(*a, **k)

        return call

    for number in range(1, total, 5):
        state = DenoiseState(latents=noise(10), next_step=0)
        made, model = scheduler(), failing_at(Counting(), number)
        again = {"state": state, "windows": windows, "scheduler": made, "switch": 9}
        with pytest.raises(Once):
            denoised(model, asked, **again)
        assert torch.equal(denoised(model, asked, **again).latents, whole.latents)


def test_an_error_in_the_solver_costs_no_bit() -> None:
    asked = Shortcuts(easycache=0.1, gate=0.5)
    whole = denoised(Counting(), asked)
    for bad in (1, 7, 13):
        state, made = DenoiseState(latents=noise(), next_step=0), scheduler()
        step, left = made.step, [bad]

        def once(*a: Any, step: Any = step, left: list[int] = left, **k: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("out of memory")
            return step(*a, **k)

        made.step = once
        with pytest.raises(RuntimeError):
            denoised(Counting(), asked, state=state, scheduler=made)
        found = denoised(Counting(), asked, state=state, scheduler=made)
        assert torch.equal(found.latents, whole.latents)


@pytest.mark.parametrize("windowed", [False, True])
def test_an_error_after_a_prediction_costs_no_bit(
    windowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may run out in what follows it: guidance, the blend of windows, the preview."""
    asked, windows = Shortcuts(easycache=0.1, gate=0.4), plan_windows(10, 17, 0)
    job: dict[str, Any] = {"windows": windows if windowed else None, "switch": 9}
    whole = denoised(Counting(), asked, frames=10, **job)
    predict, left = denoise.predict, [0]

    def once(*a: Any, **k: Any) -> Tensor:
        found = predict(*a, **k)
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("out of memory")
        return found

    monkeypatch.setattr(denoise, "predict", once)
    for left[0] in (2, 7, 12):
        again = job | {"state": DenoiseState(latents=noise(10), next_step=0)}
        again |= {"scheduler": scheduler()}
        with pytest.raises(RuntimeError):
            denoised(Counting(), asked, **again)
        found = denoised(Counting(), asked, **again)
        assert torch.equal(found.latents, whole.latents)
        assert found.memory.describe() == whole.memory.describe()


def test_what_is_remembered_is_saved_and_restored_whole() -> None:
    state = denoised(Counting(), Shortcuts(easycache=0.1, gate=0.5), switch=9)
    tensors, values = state.memory.saved()
    found = Memory.restored(tensors, values)
    for name, window in state.memory.windows.items():
        for part in window.__slots__:
            ours, theirs = getattr(window, part), getattr(found.windows[name], part)
            same = torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
            assert same, part
    assert replace(found, windows={}) == replace(state.memory, windows={})
    assert found.describe() == state.memory.describe()
