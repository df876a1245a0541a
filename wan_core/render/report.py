"""What is known of a run before it, told during it, and measured: seconds and memory by stage."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..config import GIB, MIB, GenerationConfig, StageReport, VideoGenerationResult
from ..errors import is_oom
from ..forward import Surroundings
from ..job import (
    FRAMES_PER_LATENT,
    Request,
    encoder_bytes,
    expected_steps,
    latent_frames,
    plan_windows,
    references_in_front,
    round_up_frames,
    texts_to_encode,
)
from ..kernels import used_attention, used_products
from ..loading import give_back_freed
from ..memory import ATTENTION_8BIT, Workload, process_bytes, stage_was_run
from ..models import Component, ModelArchitecture
from ..plan import Limits

if TYPE_CHECKING:
    from ..config import MemoryEstimate
    from ..memory import Choices, SystemResources
    from ..plan import OptimizationConfig, OptimizationPlan

_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Made by ``WanPipelineWrapper.foresee``."""

    request: Request
    workload: Workload
    system: SystemResources
    plan: OptimizationPlan | None
    """None where nothing fits."""
    estimate: MemoryEstimate
    """That of the plan, or of the smallest way to run the job, with ``fits`` False."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what the user should know before the run."""
        return (*self.estimate.warnings, *self.request.warnings)

    def shortage(self, asked: OptimizationConfig) -> str:
        """Say how much of which memory the smallest way to run the job needs, and what is there."""
        system, estimate, limits = self.system, self.estimate, Limits.of(self.system, asked)
        needed, where, there = estimate.peak_usage_mb, f"on {system.device_name}", limits.device
        if system.device_kind != "cpu" and estimate.host_ram_mb > limits.ram / MIB:
            needed, where, there = estimate.host_ram_mb, "of RAM", limits.ram
        return f"{needed:,.0f} MiB {where}, where {there / MIB:,.0f} MiB can be used"


def workload_of(request: Request, config: GenerationConfig, model: ModelArchitecture) -> Workload:
    """Return the numbers of a job that bytes and seconds depend on."""
    window, control = request.window_frames, request.control
    steps = expected_steps(request, 2 if model.two_experts else 1)
    made = {"transformer": steps.high, "transformer_2": steps.low}
    keyframes = 0 if control is None else len(control.positions)
    vace = model.transformer.vace_in_channels is not None
    animate = model.transformer.animate
    reference = model.transformer.reference_channels
    return Workload(
        width=request.width,
        height=request.height,
        num_frames=request.num_frames if animate is None else max(request.num_frames, window or 0),
        batch_size=request.batch_size,
        guidance_high=max(request.guidance_scale, request.guided_scale or 0.0) > 1.0,
        guidance_low=request.guidance_scale_2 > 1.0,
        # A window that covers the clip makes it in one piece.
        window_frames=None if window is None or window >= request.num_frames else window,
        window_overlap=request.window_overlap if animate else _used_overlap(request),
        overlap_free=request.overlap_free,
        window_anchor=request.window_anchor and request.window_mode == "windows",
        high_steps=len(steps.high) if model.two_experts else None,
        partial_steps=len(steps.high) + len(steps.low) < request.num_inference_steps,
        moving_windows=window is not None and request.window_schedule != "static",
        in_turn=request.window_mode == "continuation",
        image=not vace and (_pictures(config) > 0 or keyframes > 0),
        last_image=not vace and (config.last_image is not None or keyframes > 1),
        references=references_in_front(request, model) + (reference is not None),
        reference_picture=not vace and control is not None and control.references > 0,
        camera=control is not None and control.camera,
        keyframes=keyframes,
        start_video=not vace and control is not None and bool(control.video),
        idle=tuple(name for name in made if model.two_experts and not made[name]),
        steps=len(steps.high) + len(steps.low),
        return_frames=config.return_frames,
        to_file=request.output_path is not None,
        encoder_bytes=_of_encoders(request),
        encode_text=bool(texts_to_encode(config, request)) and "text_encoder" in model.components,
    )


def _of_encoders(request: Request) -> int:
    """Return the RAM of a job's encoders, one for each clip of its batch; 0 without an mp4."""
    if request.output_path is None:
        return 0
    asked = (request.codec, request.pix_fmt, request.width, request.height, request.wanted_frames)
    return request.batch_size * encoder_bytes(*asked)


def _pictures(config: GenerationConfig) -> int:
    return (config.image is not None) + (config.last_image is not None)


def _used_overlap(request: Request) -> int:
    """Return the frames that windows really share, which may be fewer than were asked for.

    Planned for a clip so long that windows of the full length occur.
    """
    if request.window_frames is None:
        return request.window_overlap
    endless = request.latent_frames + latent_frames(round_up_frames(request.window_frames))
    windows = plan_windows(endless, request.window_frames, request.window_overlap)
    return windows.overlap * FRAMES_PER_LATENT


class Callbacks:
    """Calls the user's callbacks, and remembers an exception that one of them raised.

    Unlike our own errors it, even a shortage of memory, is passed on: no smaller plan answers it.
    """

    def __init__(self, config: GenerationConfig) -> None:
        self._config = config
        self._told = 0
        self.seconds = 0.0
        """How long callbacks took so far."""
        self.raised: BaseException | None = None
        self.around: Surroundings | None = None
        """What the computation is kept free of; callbacks are not."""

    def call(self, function: Callable[..., object] | None, *args: object) -> None:
        """Call ``function`` if there is one; an exception is remembered and raised."""
        if function is None:
            return
        own, began = [_copied(arg) for arg in args], time.perf_counter()
        try:
            with nullcontext() if self.around is None else self.around.lifted():
                function(*own)
        except BaseException as err:
            self.raised = err
            raise
        finally:
            self.seconds += time.perf_counter() - began

    def settle(self, err: Exception) -> Exception:
        """Raise what a callback raised; else return ``err``."""
        try:
            if self.raised is not None:  # whatever a reader or a generator made of it
                raise self.raised from self.raised.__cause__
            return err
        finally:
            del err  # or this frame and the exception would keep each other

    def check(self) -> None:
        """Give the user's ``interrupt_check`` the opportunity to raise."""
        self.call(self._config.interrupt_check)

    def loaded(self, component: str, done: int, total: int) -> None:
        """Tell how many bytes of a component have been read."""
        self.call(self._config.load_callback, component, done, total)

    def tell(self, warnings: list[str]) -> None:
        """Pass on the warnings that have not been passed on yet; the list must only grow."""
        while self._told < len(warnings):
            self._told += 1
            self.call(self._config.warning_callback, warnings[self._told - 1])


def _copied(value: object) -> object:
    """Return a copy of a tensor: what a callback writes into it must not change the video.

    Where there is no memory for one, the callback still has to learn of the step.
    """
    if not isinstance(value, torch.Tensor):
        return value
    try:
        return value.clone()
    except (MemoryError, RuntimeError) as err:
        if not is_oom(err):
            raise
    return value


class Timeline:
    """The stages of one run in their order, each with its seconds and its peak memory.

    On CUDA the peak is that of torch's allocator during the stage. Elsewhere it is the RAM of the
    process, looked at when the stage begins and ends and in :meth:`sample`.
    """

    def __init__(self, device: torch.device, predicted: Mapping[str, int] | None = None) -> None:
        self.device = device
        self.stages: list[StageReport] = []
        self._predicted = dict(predicted or {})
        self._peak = 0
        self._next_sample = 0.0
        self.step_seconds: list[float] = []
        """Seconds of the steps that work on as many frames as the present one, without the first of
        each stage: it includes warm-up."""
        self._steps = {0: self.step_seconds}
        self._step_ended: float | None = None
        self._stage = ""

    def work_on(self, frames: int) -> None:
        """Say how many latent frames the steps to come work on, where segments differ in length.

        Steps on more frames take longer, by attention more than in proportion. They say nothing of
        what a step on fewer frames may take.
        """
        self.step_seconds = self._steps.setdefault(frames, [])

    @property
    def full_steps(self) -> list[float]:
        """Seconds of the steps on the most frames, which are those that a plan predicts."""
        return self._steps[max(self._steps)]

    @contextmanager
    def stage(self, name: str) -> Iterator[StageReport]:
        """Measure what happens inside the ``with`` block; it is reported also when it fails."""
        report = StageReport(name=name, predicted_peak_bytes=self._predicted.get(name))
        self.stages.append(report)
        self._stage = name
        self._reset_peak()
        self._step_ended = None
        started = time.perf_counter()
        try:
            yield report
            # One that failed may not have come to what its libraries take RAM for.
            stage_was_run(name, self.device.type)
        finally:
            # Kernels are queued: without waiting, their time would be counted in the next stage.
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            report.seconds = time.perf_counter() - started
            report.measured_peak_bytes = self._read_peak()
            give_back_freed()

    def predict(self, predicted: Mapping[str, int]) -> None:
        """Replace the predicted peaks for the stages to come, after a change of the plan.

        The steps so far were those of the old plan, and are forgotten.
        """
        self._predicted = dict(predicted)
        for steps in self._steps.values():
            steps.clear()

    def step_done(self, elsewhere: float = 0.0) -> None:
        """Note that a denoising step of the current stage has ended.

        ``elsewhere`` are the seconds so far that were no part of any step: those of callbacks.
        """
        stage_was_run(self._stage, self.device.type)
        now = time.perf_counter() - elsewhere
        if self._step_ended is not None:
            self.step_seconds.append(now - self._step_ended)
        self._step_ended = now

    def sample(self) -> None:
        """Look at the memory in use, at most twenty times a second, so that every block may ask."""
        now = time.perf_counter()
        if self.device.type != "cuda" and now >= self._next_sample:
            self._next_sample = now + _SAMPLE_SECONDS
            self._peak = max(self._peak, ram_of_process())

    @property
    def peak_bytes(self) -> int:
        """The largest measured peak of all stages."""
        return max((stage.measured_peak_bytes or 0 for stage in self.stages), default=0)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._peak = ram_of_process()

    def _read_peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(self._peak, ram_of_process())


def out_of_ram(model: ModelArchitecture, stage: str, failure: str) -> str:
    """Say that RAM ran out in a stage, and what may help: other files where there are smaller."""
    larger = [
        name.replace("_", " ")
        for name, part in model.components.items()
        if part.stored is not None and not part.stored.quantised
    ]
    other = f", or take the {' and the '.join(larger)} in fp8 or GGUF" if larger else ""
    return (
        f"RAM ran out in stage {stage} ({failure}), not the device's memory. "
        f"Close other programs{other}."
    )


def beyond_fp16(frames: int | None) -> str:
    """Return the warning of a VAE that went on in bf16 after ``frames``; None: it encoded."""
    if frames is None:
        return (
            "The VAE's numbers went beyond the range of fp16 when it encoded; that was done again "
            "in bf16, and the clip was decoded so."
        )
    return (
        f"The VAE's numbers went beyond the range of fp16 after {frames} frames; the frames from "
        "there on were decoded in bf16."
    )


def kind_of_storage(part: Component, computed: str, *, in_fp8: bool) -> str:
    """Name what a component is stored as and what it computes in."""
    if part.stored is not None and part.stored.quantised:
        return f"{part.stored_as}, computed in {computed}"
    return f"stored in fp8, computed in {computed}" if in_fp8 else computed


_SLOW = 4.0
"""A step that takes more than this many times the usual step counts as slowed down by a spill."""
_FULL = 0.9
"""Share of the device that must be reserved for a slow step to count as caused by a spill."""


def device_fill(device: torch.device) -> tuple[int, int]:
    """Return (bytes the allocator has reserved, bytes of the device); (0, 0) if it is not CUDA."""
    if device.type != "cuda":
        return 0, 0
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.memory_reserved(device), total


def spilled(reserved: int, total: int, steps: Sequence[float], usual: float | None) -> str | None:
    """Say why device memory seems to have spilled into RAM, or return None.

    NVIDIA's driver for Windows does that instead of reporting that memory is out. It shows in one
    of two ways: more is reserved than the device has, or the device is full and the last of
    ``steps`` took far longer than those before it (than ``usual`` if fewer than two came before).
    """
    if not total:
        return None
    if reserved > total:
        return f"{reserved / GIB:.1f} GiB are reserved on a device of {total / GIB:.1f}"
    expected = median(steps[:-1]) if len(steps) > 2 else usual
    if not steps or expected is None or reserved < _FULL * total:
        return None
    if steps[-1] <= _SLOW * expected:
        return None
    return f"a step took {steps[-1]:.1f} s instead of {expected:.1f} s on a full device"


@contextmanager
def kernels_noted(
    report: StageReport, choices: Choices, say: Callable[[str], object]
) -> Iterator[None]:
    """Note which kernels computed a stage; ``say`` what was planned and did not come.

    A stage that other processes compute is not known here, and nothing is said of it.
    """
    used_attention(), used_products()  # of other stages
    yield
    attention, (in_8_bit, kinds) = used_attention(), used_products()
    notes = [f"attention: {attention}"] * bool(attention)
    if kinds:
        notes.append(f"products in 8 bit: {in_8_bit} of {kinds} kinds of layers")
    if notes:
        report.note = ", ".join(notes)
    if kinds and not in_8_bit:
        say(
            "Products in 8 bit were planned, and all were computed in 16: a kernel could not be "
            "tried, was not faster, or a LoRA acts on the layers (the log says which)."
        )
    if attention and choices.attention_8bit and attention not in ATTENTION_8BIT:
        say(
            f"Attention in 8 bit was planned, and {attention} computed it in 16: it was faster by "
            "the clock, or no kernel in 8 bit ran here with a result near torch's (the log says "
            "which)."
        )


def ram_of_process() -> int:
    """Return the bytes of this process in RAM that no file stands behind, as estimates count them.

    Outside Linux pages of mapped files cannot be told apart, and count.
    """
    known = process_bytes()
    if known is not None:
        return known
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)


def device_bytes(device: torch.device) -> int:
    """Return the bytes in use on the device now; without CUDA those of the process in RAM."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return ram_of_process()


def format_report(result: VideoGenerationResult) -> str:
    """Format a finished run as text: what was made, how, and what each stage took."""
    meta = result.metadata
    lines = [_headline(result)]
    lines += [f"error: {text}" for text in result.errors]
    lines += [f"warning: {text}" for text in result.warnings]
    shown = ("model", "device", "steps", "control", "windows", "forwards", "resumed", "journal")
    lines += [f"{key}: {meta[key]}" for key in shown if key in meta]
    lines += [f"applied: {', '.join(result.applied_optimizations)}"] * bool(
        result.applied_optimizations
    )
    if result.stages:
        lines += ["", _stage_table(result.stages, str(meta.get("memory_origin", "")))]
    return "\n".join(lines)


def _headline(result: VideoGenerationResult) -> str:
    meta: Mapping[str, Any] = result.metadata
    size = f"{meta.get('width')}x{meta.get('height')}, {meta.get('num_frames')} frames"
    if not result.success:
        return f"failed after {result.generation_time:.1f} s"
    seed = f", seed {meta.get('seed')}"
    target = f" -> {result.output_path}" if result.output_path else ""
    return f"{size}{seed}: {result.generation_time:.1f} s{target}"


def _stage_table(stages: list[StageReport], origin: str) -> str:
    rows = [f"{'stage':<22}{'seconds':>9}{'predicted':>12}{'measured':>12}"]
    for stage in stages:
        rows.append(
            f"{stage.name:<22}{stage.seconds:>9.2f}{_gib(stage.predicted_peak_bytes):>12}"
            f"{_gib(stage.measured_peak_bytes):>12}" + (f"  {stage.note}" if stage.note else "")
        )
    if origin:
        rows.append(f"({origin})")
    return "\n".join(rows)


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / GIB:.2f} GiB"
