"""What must hold for a clip made in windows, with denoisers whose right answer is known.

The numbers of the properties are those of the project's list: P2 (weights) is in test_windows,
P9 (going on after a kill) in test_resume.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.blending import normalised
from support.decoding import decode_to_tensor
from support.seams import MOVING, MovingVideo, energy_at, in_ramps, linear_ramps
from support.tiny_models import make_folder, make_transformer, make_vae
from support.traced import TracedMemory
from torch import Tensor

from wan_core import GenerationConfig, WanPipelineLoader
from wan_core.job.noise import draw_noise
from wan_core.job.steps import DIFFUSERS_SCHEDULERS as SCHEDULERS
from wan_core.job.steps import make_scheduler, plan_steps
from wan_core.job.windows import FUSIONS, WindowPlan, latent_frames, plan_windows
from wan_core.sampling.denoise import (
    Conditions,
    DenoiseState,
    Expert,
    Signals,
    denoise_steps,
    predict,
    predict_windows,
)
from wan_core.sampling.vae import denormalize_latents

SCHEDULES = ("static", "uniform", "looped")
STEPS = 6
Model = Callable[..., tuple[Tensor]]


class Sigmas:
    """Tells an oracle the exact sigma of a timestep; some schedulers round their timesteps."""

    def __init__(self, scheduler: Any) -> None:
        self.timesteps, self.sigmas = scheduler.timesteps, scheduler.sigmas

    def __call__(self, timestep: Tensor) -> Tensor:
        return self.sigmas[int((self.timesteps == timestep.flatten()[0]).nonzero()[0])]


def made_scheduler(name: str) -> Any:
    scheduler = make_scheduler(name, 5.0)
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(0)
    return scheduler


def expert(model: Model, name: str = "only", scale: float = 1.0) -> Expert:
    return Expert(name=name, model=model, dtype=torch.float32, guidance_scale=scale)


def told(concat: Tensor | None = None, **more: Any) -> Conditions:
    return Conditions(prompt_embeds=torch.zeros(1, 1, 1), concat=concat, **more)


def denoised(
    model: Model,
    noise: Tensor,
    conditions: Conditions,
    windows: WindowPlan | None,
    *,
    scheduler: Any = None,
    signals: Signals | None = None,
    anchor: bool = False,
) -> Tensor:
    """All steps, by a high-noise and a low-noise expert."""
    scheduler = scheduler or made_scheduler("euler")
    steps = plan_steps([float(t) for t in scheduler.timesteps], experts=2, boundary=0.9)
    assert len(steps.high) and len(steps.low)
    state, told, made = DenoiseState(latents=noise, next_step=0), signals or Signals(), []

    def step(index: int, latents: Tensor) -> None:
        made.append(index)
        told.step(index, latents)

    for name, part in (("high", steps.high), ("low", steps.low)):
        denoise_steps(
            state, part, expert(model, name), scheduler, conditions,
            windows=windows, signals=replace(told, step=step), anchor=anchor,
        )  # fmt: skip
    assert made == list(range(STEPS))
    return state.latents


def random_latents(frames: int, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.randn(1, channels, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


def mixing(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
    """Every frame sees every other frame of its window and its place in it."""
    frames = hidden_states.shape[2]
    place = torch.linspace(-1, 1, frames).view(1, 1, -1, 1, 1)
    mean = hidden_states.mean(2, keepdim=True)
    return (torch.tanh(hidden_states + mean + place) * (1 + timestep.flatten()[0] / 1000),)


def plans(total: int, fusion: str = "ramp") -> list[WindowPlan]:
    return [plan_windows(total, 29, 12, schedule, fusion) for schedule in SCHEDULES]


# -- P1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_p01_a_window_that_covers_the_clip_is_the_plain_run(scheduler: str) -> None:
    noise = random_latents(8)
    plain = denoised(mixing, noise, told(), None, scheduler=made_scheduler(scheduler))
    for schedule in SCHEDULES:
        windows = plan_windows(8, 81, 16, schedule)
        found = denoised(mixing, noise, told(), windows, scheduler=made_scheduler(scheduler))
        assert torch.equal(found, plain)
    # Also through the fusing itself, which a single window usually passes by.
    window = plan_windows(8, 81, 16)
    parts = list(zip(window.windows(), window.blend_fractions(), strict=True))
    state = DenoiseState(latents=noise, next_step=0)
    fused = predict_windows(state, torch.tensor(500.0), expert(mixing), told(), parts, Signals())
    assert torch.equal(fused, mixing(noise, torch.tensor([500.0]))[0])


# -- P3, P4, P5 -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_p03_what_looks_at_single_frames_gives_the_bits_of_the_whole_clip(
    scheduler: str, fusion: str
) -> None:
    def by_frame(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.tanh(hidden_states) * timestep.flatten()[0] / 700,)

    noise = random_latents(23)
    whole = denoised(by_frame, noise, told(), None, scheduler=made_scheduler(scheduler))
    for windows in plans(23, fusion):
        found = denoised(by_frame, noise, told(), windows, scheduler=made_scheduler(scheduler))
        assert torch.equal(found, whole)


def test_p04_a_constant_stays_constant() -> None:
    def constant(hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.full_like(hidden_states, 0.3),)

    noise = random_latents(1).expand(-1, -1, 23, -1, -1).clone()
    for windows in plans(23):
        found = denoised(constant, noise, told(), windows)
        assert torch.equal(found, found[:, :, :1].expand_as(found))


@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_p05_a_perfect_flow_ends_at_the_clip_it_flows_to(scheduler: str, anchor: bool) -> None:
    """The clip is in the condition, cut by absolute index as an image-to-video model's is."""
    clip = random_latents(23, seed=1)
    for windows in plans(23):
        steps = made_scheduler(scheduler)
        sigma = Sigmas(steps)

        def flow(
            hidden_states: Tensor, timestep: Tensor, sigma: Sigmas = sigma, **_: Any
        ) -> tuple[Tensor]:
            x, target = hidden_states.chunk(2, dim=1)
            return ((x - target) / sigma(timestep),)

        found = denoised(
            flow, random_latents(23), told(clip), windows, scheduler=steps, anchor=anchor
        )
        assert float((found - clip).abs().max()) < 1e-5


# -- P6, P7 -----------------------------------------------------------------------------------


class Biased:
    """Adds +1 in every other window and -1 in the rest."""

    def __init__(self) -> None:
        self.number = 0
        self.signals = Signals(window=self.before)

    def before(self, number: int, _: int) -> None:
        self.number = number

    def __call__(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.full_like(hidden_states, 1.0 if self.number % 2 else -1.0),)


@pytest.mark.parametrize("overlap", [4, 8, 16, 20])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_p06_windows_that_disagree_move_the_clip_by_the_least_there_can_be(
    schedule: str, overlap: int
) -> None:
    model = Biased()
    windows = plan_windows(46, 41, overlap, schedule)
    found = denoised(model, torch.zeros(1, 1, 46, 2, 2), told(), windows, signals=model.signals)
    jumps = found.diff(dim=2).abs()
    # Noise to clip is a way of length 1 at speed +-1: windows disagree by 2.
    assert 0 < float(jumps.max()) <= 2 / (windows.overlap + 1) * (1 + 1e-5)
    flat = denoised(
        model, torch.zeros(1, 1, 46, 2, 2), told(), plan_windows(46, 41, overlap, "static", "flat"),
        signals=model.signals,
    )  # fmt: skip
    assert float(flat.diff(dim=2).abs().max()) > 2 / (windows.overlap + 1) or overlap == 4


def test_p07_frames_away_from_every_edge_are_exact() -> None:
    """A network that looks one frame to either side is right wherever no window ends near by."""

    def neighbours(hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        padded = torch.nn.functional.pad(hidden_states, (0, 0, 0, 0, 1, 1))
        return (padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:],)

    noise, total = random_latents(23), 23
    whole = neighbours(noise)[0]
    for windows in plans(total)[:2]:  # a loop has other neighbours where it closes
        parts = list(zip(windows.windows(), windows.blend_fractions(), strict=True))
        state = DenoiseState(latents=noise, next_step=0)
        found = predict_windows(
            state, torch.tensor(1.0), expert(neighbours), told(), parts, Signals()
        )
        ends = {(w, j) for w in windows.windows() for j in (0, -1) if w.weights[j] > 0}
        near = {w.indices[j] for w, j in ends} - {0, total - 1}  # there the whole clip ends too
        same = {i for i in range(total) if torch.equal(found[:, :, i], whole[:, :, i])}
        assert near and same == set(range(total)) - near


# -- P8, P9 -----------------------------------------------------------------------------------


def test_p08_a_longer_clip_keeps_its_beginning() -> None:
    """Noise by frame and static windows; what is new is felt one window further per step."""
    short, long = plan_windows(14 + 9, 17, 8), plan_windows(14 + 18, 17, 8)
    assert short.starts() == long.starts()[: short.count]
    noise = {p.total: draw_noise("frame", (1, 3, p.total, 4, 4), 9) for p in (short, long)}
    made = {p.total: denoised(mixing, noise[p.total], told(), p) for p in (short, long)}
    same = [torch.equal(made[23][:, :, i], made[32][:, :, i]) for i in range(23)]
    kept = short.starts()[short.count - STEPS]
    assert kept > 0 and all(same[:kept]) and not any(same[-short.overlap :])


# -- P10 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("properties") / "a14b", "wan2.2-t2v-a14b")


def test_p10_memory_that_runs_out_costs_the_window_it_ran_out_in(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(step, window) through both experts: nothing finished is made again, the bits are equal."""
    wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        model_folder, optimization_config={"device": "cpu", "precision": "fp32"}
    )
    calls: list[tuple[int, int]] = []
    failures: list[tuple[int, int]] = []
    step, window = 0, 0

    def hook(*_: Any) -> None:
        if (step, window) in failures:
            failures.remove((step, window))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        calls.append((step, window))

    original = wrapper._cache.borrow

    def borrow(key: Any, nbytes: int, build: Any, *, keep: bool = True) -> Any:
        def hooked() -> Any:
            module = build()
            if hasattr(module, "blocks"):
                module.register_forward_pre_hook(hook)
            return module

        return original(key, nbytes, hooked, keep=keep)

    def chunk(index: int, _: int) -> None:
        nonlocal window
        window = index

    def progress(done: int, *_: Any) -> None:
        nonlocal step
        step = done

    def made() -> Any:
        nonlocal step
        step = 0
        calls.clear()
        job = GenerationConfig(
            prompt_embeds=torch.ones(1, 4, 32), width=16, height=16, num_frames=33, seed=3,
            num_inference_steps=4, max_chunk_size=17, window_overlap=8, guidance_scale=1.0,
            guidance_scale_2=1.0, switch_step=2, chunk_callback=chunk, progress_callback=progress,
        )  # fmt: skip
        return wrapper.generate(job).raise_for_error()

    monkeypatch.setattr(wrapper._cache, "borrow", borrow)
    monkeypatch.setattr(
        wrapper._manager, "smaller_plan", lambda *given: given[4].with_choices(offload="sequential")
    )
    whole = made()
    expected = list(calls)
    assert len(expected) == 4 * 3 and not whole.warnings
    failures += [(0, 0), (1, 2), (2, 0), (3, 1)]
    found = made()
    assert not failures and calls == expected
    assert torch.equal(found.latents, whole.latents)
    assert torch.equal(found.frames, whole.frames)
    assert "sequential" in found.warnings[0] and "denoise_high" in found.warnings[0]
    assert len(found.warnings) == 4 and "denoise_low" in found.warnings[-1]


def test_p10_windows_that_become_smaller_begin_their_step_anew() -> None:
    """The mean of the windows so far belongs to those windows; the finished steps stay."""

    class Full:
        left = 4

        def __call__(self, **inputs: Any) -> tuple[Tensor]:
            self.left -= 1
            if self.left < 0 and inputs["hidden_states"].shape[2] > 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return mixing(**inputs)

    large, small = plan_windows(15, 29, 12), plan_windows(15, 17, 8)
    assert large.count == 3
    noise, scheduler, model = random_latents(15), made_scheduler("unipc"), Full()
    state = DenoiseState(latents=noise, next_step=0)
    with pytest.raises(torch.OutOfMemoryError):
        denoise_steps(state, range(3), expert(model), scheduler, told(), windows=large)
    assert (state.next_step, state.next_window) == (1, 1)
    denoise_steps(state, range(3), expert(model), scheduler, told(), windows=small)
    expected = DenoiseState(latents=noise, next_step=0)
    scheduler = made_scheduler("unipc")
    denoise_steps(expected, range(1), expert(mixing), scheduler, told(), windows=large)
    denoise_steps(expected, range(3), expert(mixing), scheduler, told(), windows=small)
    assert torch.equal(state.latents, expected.latents)


# -- P11, P12 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_p11_memory_grows_by_the_latents_alone(scheduler: str) -> None:
    def wide(hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (hidden_states.repeat(1, 400, 1, 1, 1).tanh()[:, :3],)

    def peak(frames: int) -> int:
        windows = plan_windows(frames, 29, 12)
        noise, steps = random_latents(frames), made_scheduler(scheduler)
        with TracedMemory() as memory:
            denoised(wide, noise, told(), windows, scheduler=steps)
        return memory.peak_bytes

    frame = random_latents(1).nbytes
    short, middle, long = peak(20), peak(40), peak(80)
    window = 8 * 400 * frame
    assert short > window
    # Solvers keep earlier velocities and samples, the fused mean and the step's result.
    assert (long - middle) == 2 * (middle - short)
    assert 0 < (long - middle) / 40 <= 10 * frame
    assert long - short < 0.1 * short


@pytest.mark.parametrize("schedule", ["static", "uniform", "looped"])
def test_p12_the_work_done_is_the_work_that_was_said(schedule: str) -> None:
    for total in (20, 51, 101):
        seen: list[int] = []

        def counting(hidden_states: Tensor, seen: list[int] = seen, **_: Any) -> tuple[Tensor]:
            seen.append(hidden_states.shape[2])
            return (torch.zeros_like(hidden_states),)

        windows = plan_windows(total, 41, 12, schedule)
        denoised(counting, torch.zeros(1, 1, total, 2, 2), told(), windows)
        assert sum(seen) / (STEPS * total) == pytest.approx(windows.cost_factor, rel=1e-9)
        if schedule == "static":
            length, overlap = windows.window, windows.overlap
            formula = (1 + math.ceil((total - length) / (length - overlap))) * length / total
            assert windows.cost_factor == pytest.approx(formula, rel=0.01)


# -- P13, P14 ---------------------------------------------------------------------------------


def moving_gradient(frames: int, step: float = 0.1) -> Tensor:
    place = torch.arange(4.0).view(1, 1, 1, 1, 4) / 10
    return (place + step * torch.arange(frames).view(1, 1, -1, 1, 1)).expand(1, 1, -1, 4, 4).clone()


class Leaning:
    """A perfect flow but for a bias that grows from window to window."""

    def __init__(self, clip: Tensor, sigma: Sigmas, lean: float) -> None:
        self.clip, self.sigma, self.lean, self.number = clip, sigma, lean, 0
        self.signals = Signals(window=self.before)

    def before(self, number: int, _: int) -> None:
        self.number = number

    def __call__(self, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        x, target = hidden_states.chunk(2, dim=1)
        return ((x - target - self.lean * self.number) / self.sigma(timestep),)


def seam_ratio(clip: Tensor, windows: WindowPlan) -> float:
    """Median change between frames at the seams over the median elsewhere."""
    change, ramps = clip.diff(dim=2).abs().mean((0, 1, 3, 4)), in_ramps(windows)
    at = [float(c) for i, c in enumerate(change) if i in ramps]
    off = [float(c) for i, c in enumerate(change) if i not in ramps]
    return sorted(at)[len(at) // 2] / sorted(off)[len(off) // 2]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_p13_a_moving_gradient_moves_as_fast_at_the_seams(scheduler: str) -> None:
    clip = moving_gradient(53)
    ratios = {}
    for name, overlap, fusion in (("ramp", 16, "ramp"), ("cut", 0, "flat")):
        windows = plan_windows(53, 81, overlap, "static", fusion)
        steps = made_scheduler(scheduler)
        model = Leaning(clip, Sigmas(steps), lean=0.03)
        noise = random_latents(53, channels=1)
        made = denoised(model, noise, told(clip), windows, scheduler=steps, signals=model.signals)
        ratios[name] = seam_ratio(made, windows)
    assert 0.9 < ratios["ramp"] < 1.1 < ratios["cut"]


@pytest.mark.parametrize("overlap", [8, 16, 32])
def test_p13_what_comes_back_with_every_window_is_the_least_there_can_be(overlap: int) -> None:
    """The energy of the movement's autocorrelation at the windows' period, beside others'."""
    length, lean, step = latent_frames(81), 0.03, 0.1

    def energy(shared: int, wrap: Callable[[WindowPlan], WindowPlan], width: int) -> float:
        """Of a clip of five whole periods; ``width`` changes take the step between windows."""
        period = length - shared // 4
        clip = moving_gradient(length + 5 * period, step)
        windows = wrap(plan_windows(clip.shape[2], 81, shared))
        steps = made_scheduler("euler")
        model = Leaning(clip, Sigmas(steps), lean)
        made = denoised(
            model, clip + 1, told(clip), windows, scheduler=steps, signals=model.signals
        )
        change = made.diff(dim=2).abs().mean((0, 1, 3, 4))
        # In closed form: the step between two windows, spread over ``width`` changes.
        spread = torch.full_like(change, step)
        inset = (shared // 4 + 1 - width) // 2  # linspace(0, 1) wastes one change at either end
        for window in windows.windows()[1:]:
            first = window.start - 1 + inset
            spread[first : first + width] += lean / width
        found = energy_at(change, period)
        assert found == pytest.approx(energy_at(spread, period), rel=0.01, abs=1e-6)
        return found

    shared = overlap // 4
    ours = energy(overlap, lambda plan: plan, shared + 1)
    linear = energy(overlap, linear_ramps, shared - 1)
    cut = energy(0, lambda plan: plan, 1)
    assert 0 < ours < 0.5 * cut
    assert linear < cut or shared == 2  # of two shared frames that ramp makes a cut
    # Every window's energy is lean^2 / width, less what an even movement of the same length has.
    assert ours / linear < (shared - 1) / (shared + 1) + 1e-3
    still = moving_gradient(length + 5 * 17).diff(dim=2).abs().mean((0, 1, 3, 4))
    assert abs(energy_at(still, 17)) < 1e-9


def test_p13_decoded_video_moves_as_fast_at_the_seams() -> None:
    """Windows that disagree by a frame of movement, through the trained demo decoder."""
    video = MovingVideo(moving=MOVING[:2])
    ours, cut = video.ratios(plan_windows(6, 13, 8)), video.ratios(plan_windows(6, 9, 0))
    assert float(ours.min()) > 0.9 and float(ours.max()) < 1.1 < float(cut.max())


def test_p14_a_still_clip_keeps_its_colours() -> None:
    """Made twice, with colours that do and do not lean from window to window: it would show."""
    torch.manual_seed(0)
    vae, frames = make_vae("wan2.1-t2v"), 19
    pattern = torch.randn(1, 16, 1, 4, 4)
    still = pattern.expand(-1, -1, frames, -1, -1)
    windows = plan_windows(frames, 41, 12)

    def made(clip: Tensor, lean: float) -> Tensor:
        steps = made_scheduler("euler")
        model = Leaning(clip, Sigmas(steps), lean)
        noise = torch.randn(clip.shape)
        return denoised(model, noise, told(clip), windows, scheduler=steps, signals=model.signals)

    both = torch.cat([made(still, 0.0), made(still, 80.0)])
    video = decode_to_tensor(vae, denormalize_latents(both, vae.config))
    colours = [[lab(p.mean((0, 1, 2))) for p in (v[21:33], v[-12:])] for v in video]
    steady, leaning = (float((first - last).norm()) for first, last in colours)
    assert steady < 0.2 < 1.0 < leaning


def lab(colour: Tensor) -> Tensor:
    """CIE Lab of an sRGB colour, D65."""
    linear = torch.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = torch.where(
        (v := matrix @ linear / torch.tensor([0.9505, 1.0, 1.089])) > 0.008856,
        v.clamp_min(1e-9) ** (1 / 3),
        7.787 * v + 16 / 116,
    )
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_p11_a_window_takes_its_part_of_a_condition_that_waits_in_ram() -> None:
    clip = torch.arange(9.0).view(1, 1, 9, 1, 1)
    waiting = Conditions(prompt_embeds=torch.empty(1, 4, 8, device="meta"), concat=clip)
    assert waiting.window(range(2, 5)).concat.device.type == "meta"  # where the model is
    assert waiting.concat.device.type == "cpu"
    here = Conditions(prompt_embeds=torch.empty(1, 4, 8), concat=clip).window([7, 8, 0])
    assert here.concat.flatten().tolist() == [7, 8, 0]


# -- P15, P16 ---------------------------------------------------------------------------------


class Watching:
    """Remembers what every call was shown."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        self.seen.append({k: v for k, v in inputs.items() if isinstance(v, Tensor)})
        return (torch.zeros_like(inputs["hidden_states"][:, :3]),)


@pytest.mark.parametrize("anchor", [False, True])
def test_p15_conditions_are_cut_by_absolute_index(anchor: bool) -> None:
    """Start picture in the first window only, end picture in the last, for every length."""
    for frames in range(37, 130, 4):
        total = latent_frames(frames)
        concat = torch.zeros(1, 5, total, 4, 4)
        concat[:, 0, 0] = concat[:, 1, -1] = 1  # masks of the first and the last picture
        concat[:, 2] = torch.arange(total).view(1, -1, 1, 1)
        model, windows = Watching(), plan_windows(total, 29, 12)
        state = DenoiseState(latents=torch.zeros(1, 3, total, 4, 4), next_step=0)
        parts = tuple(
            (i * 10, torch.full((1, 1, 1), float(i))) for i in range(1 + (total - 1) // 10)
        )
        conditions = told(concat, prompt_parts=parts)
        denoise_steps(
            state, range(1), expert(model), made_scheduler("euler"), conditions,
            windows=windows, anchor=anchor,
        )  # fmt: skip
        assert len(model.seen) == windows.count
        for shown, window in zip(model.seen, windows.windows(), strict=True):
            inputs = shown["hidden_states"][0, 3:, :, 0, 0]
            extra = int(anchor and window.start > 0)
            indices = [*range(window.start - extra, window.start), *window.indices]
            assert inputs[2].tolist() == indices
            assert inputs[0].tolist() == [float(i == 0) for i in indices]
            assert inputs[1].tolist() == [float(i == total - 1) for i in indices]
            middle = window.indices[len(window.indices) // 2]
            assert shown["encoder_hidden_states"].item() == middle // 10


@pytest.mark.parametrize("held", [1, 3])
def test_p15_the_5b_holds_its_frames_where_they_are_seen(held: int) -> None:
    total, first = 23, torch.full((1, 3, held, 4, 4), 9.0)
    for windows in plans(total):
        model = Watching()
        state = DenoiseState(latents=random_latents(total), next_step=0)
        steps = made_scheduler("euler")
        denoise_steps(
            state, range(2), expert(model), steps, told(first_frame=first), windows=windows
        )
        seen = iter(model.seen)
        for step in range(2):
            for window in windows.windows(step):
                shown, t = next(seen), float(steps.timesteps[step])
                times = [0.0 if i < held else t for i in window.indices]
                found = shown["timestep"][0].view(-1, 4) if shown["timestep"].ndim == 2 else None
                if min(times) > 0:
                    assert found is None and shown["timestep"].tolist() == [t]
                else:
                    assert found is not None and found.tolist() == [[x] * 4 for x in times]
                values = shown["hidden_states"][0, 0, :, 0, 0].tolist()
                assert [v == 9.0 for v in values] == [i < held for i in window.indices]


@pytest.mark.parametrize("held", [1, 4])
def test_p15_a_real_5b_gets_the_times_of_its_tokens_anew_in_every_window(held: int) -> None:
    """Beside the same windows made by hand, with a time for every token in all of them.

    The second window begins at frame 3: after a start picture, and within four held frames.
    """
    torch.manual_seed(0)
    model = make_transformer("wan2.2-ti2v-5b")
    windows, steps = plan_windows(11, 17, 8), made_scheduler("unipc")
    assert windows.starts() == (0, 3, 6)
    noise, first = torch.randn(1, 48, 11, 4, 4), torch.randn(1, 48, held, 4, 4)
    embeds = torch.randn(1, 4, 32)
    watching = Watching()
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: watching.seen.append(inputs), with_kwargs=True
    )
    conditions = Conditions(prompt_embeds=embeds, first_frame=first)
    state = DenoiseState(latents=noise, next_step=0)
    with torch.no_grad():
        denoise_steps(state, range(2), expert(model), steps, conditions, windows=windows)
    hook.remove()

    latents, by_hand, seen = noise, made_scheduler("unipc"), iter(watching.seen)
    for step in range(2):
        t, velocity = by_hand.timesteps[step], torch.zeros_like(noise)
        for window, weights in zip(windows.windows(step), normalised(windows, step), strict=True):
            index = list(window.indices)
            inside = [place for place, i in enumerate(index) if i < held]
            assert inside == {1: [[0], [], []], 4: [[0, 1, 2, 3], [0], []]}[held][window.index]
            x, times = latents[:, :, index].clone(), torch.full((len(index), 4), float(t))
            x[:, :, inside] = first[:, :, [index[place] for place in inside]]
            times[inside] = 0  # 4x4 latent pixels are 2x2 tokens
            shown = next(seen)
            assert torch.allclose(shown["hidden_states"], x, atol=1e-5)
            if inside:
                assert torch.equal(shown["timestep"], times.view(1, -1))
            else:
                assert shown["timestep"].tolist() == [float(t)]
            with torch.no_grad():
                made = model(x, times.view(1, -1), embeds, return_dict=False)[0]
            velocity[:, :, index] += torch.tensor(weights).view(1, 1, -1, 1, 1) * made
        latents = by_hand.step(velocity, t, latents, return_dict=False)[0]
    assert torch.allclose(state.latents, latents, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_p16_the_order_in_which_windows_are_predicted_changes_no_bit(schedule: str) -> None:
    noise, windows = random_latents(23), plan_windows(23, 29, 12, schedule)
    parts = list(zip(windows.windows(3), windows.blend_fractions(3), strict=True))
    timestep = torch.tensor(500.0)

    def fused(model: Model) -> Tensor:
        state = DenoiseState(latents=noise, next_step=3)
        return predict_windows(state, timestep, expert(model), told(), parts, Signals())

    expected = fused(mixing)
    order = list(range(len(parts)))
    random.Random(0).shuffle(order)
    assert order != sorted(order)
    stored = {}
    for k in order:
        indices = parts[k][0].indices
        stored[k] = predict(noise[:, :, list(indices)], timestep, expert(mixing), told())
    replay = iter(sorted(stored))
    assert torch.equal(fused(lambda **_: (stored[next(replay)],)), expected)
    # The fused mean is the weighted one.
    mean = torch.zeros_like(noise)
    for (window, _), weights in zip(parts, normalised(windows, 3), strict=True):
        share = torch.tensor(weights).view(1, 1, -1, 1, 1)
        mean[:, :, list(window.indices)] += share * stored[window.index]
    assert torch.allclose(mean, expected, atol=1e-6)
