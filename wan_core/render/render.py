"""One render: conditions, noise, denoising steps, frames.

It carries out the plan and decides nothing itself. What all stages share, and what happens when
memory runs out, is in ``stages``.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import MIB, GenerationConfig
from ..files import sweep
from ..formats import read_table, refuse_holes
from ..job import (
    Inputs,
    Request,
    SegmentPlan,
    StepNoise,
    StepPlan,
    WindowPlan,
    check_outputs,
    draw_noise,
    latent_index,
    latent_shape,
    output_paths,
    plan_segments,
    plan_steps,
    plan_windows,
    references_in_front,
    window_settings_without_effect,
)
from ..journal import RenderJournal, open_journal
from ..loading import check_component, load_scheduler_config
from ..models import PARTS, magcache_curve
from ..sampling import (
    ClipSegments,
    Conditions,
    DenoiseState,
    Shortcuts,
    Signals,
    chosen_shortcuts,
    denoise_steps,
    denormalize_latents,
    hold_first_frame,
    make_solver,
    noised,
    start_latents,
)
from .animate import CharacterSegments, character_plan, character_segments, decoder_of, with_faces
from .conditions import ConditionMaker
from .decode import Decoding, decode_frames, decode_in_strips, try_strips
from .experts import describe_job, expert_in_place, unseen_texts
from .report import device_bytes
from .stages import StageRunner
from .video import VideoWriter


@dataclass(slots=True, kw_only=True)
class Render:
    """One render; ``run`` fills in the result. The methods are in the order of the stages."""

    stages: StageRunner
    config: GenerationConfig
    request: Request
    inputs: Inputs
    segment: int = 0
    """The segment that is being made, in continuation mode."""
    character: CharacterSegments | None = None
    """The segments of a clip that moves a character."""

    def run(self) -> None:
        """Make the video. Raises what goes wrong; the result then holds what was finished."""
        stages, result = self.stages, self.stages.result
        result.warnings += [
            *stages.architecture.warnings, *self.request.warnings, *self.inputs.warnings,
            *stages.plan.estimate.warnings,
        ]  # fmt: skip
        result.stages = stages.timeline.stages
        result.applied_optimizations = list(stages.plan.applied)
        before = device_bytes(stages.device)
        try:
            self._make_way()
            # Weights made in inference mode could not be used by a later render outside it.
            with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
                journal = open_journal(
                    stack, self.config, self.request, stages.architecture, stages.plan
                )
                if journal is None:
                    self._render(None)
                    return
                # Before anything is computed: the rest must round as the saved part did.
                stages.plan = journal.continued(stages.plan)
                result.applied_optimizations = list(stages.plan.applied)
                try:
                    self._warn(journal.warnings)
                    self._render(journal)
                finally:
                    journal.save_rest()  # after an interrupt or an error
                    self._warn(journal.warnings)
        finally:
            result.peak_memory_mb = stages.timeline.peak_bytes / MIB
            result.memory_used_mb = max(0, device_bytes(stages.device) - before) / MIB

    def _make_way(self) -> None:
        """Check every output path and what is read late; remove what a killed process left.

        Before anything is loaded: a mistake here must not show only after the last step.
        """
        stages = self.stages
        parts = stages.architecture.components
        new = {n: parts[n] for n in PARTS if n in parts and not stages.cache.holds(stages.key(n))}
        paths = (path for part in new.values() for path in (part.path, part.module))
        for path in dict.fromkeys(filter(None, paths)):  # one file may hold several
            refuse_holes(read_table(path))
        if "vae" in new:  # of what is read before the first step loading says the same
            check_component(new["vae"].path, "vae")
        check_outputs(self.request)
        for path in output_paths(self.request):
            sweep(path.parent)

    def _warn(self, warnings: Iterable[str]) -> None:
        """Add warnings that are new; ``warning_callback`` gets them after the next step."""
        result = self.stages.result
        result.warnings += [text for text in warnings if text not in result.warnings]

    def _render(self, journal: RenderJournal | None) -> None:
        result = self.stages.result
        describe_job(self.stages, self.request)
        self.stages.callbacks.tell(result.warnings)
        latents = None if journal is None else journal.finished_latents
        if journal is None or latents is None:
            latents = self._sample(journal)
        else:
            said = {"resumed": "the denoising was finished; only decoded"}
            result.metadata |= journal.told | said
        # Kept before decoding: if the decode fails, the denoising is not lost.
        result.latents = latents.to("cpu", torch.float32)
        kept, shape = result.latents, self.stages.architecture.vae_shape
        result.vae_latents = self.stages.attempt(
            "decode", lambda: denormalize_latents(kept, shape.statistics)
        )
        if journal is not None:
            journal.latents_done(result.latents, self.stages.plan, result.metadata)
        if self.config.return_frames or self.request.output_path is not None:
            self._decode(latents)
        if journal is not None:
            journal.report(result.metadata)
            journal.finish()

    # -- sampling -----------------------------------------------------------------------------

    def _sample(self, journal: RenderJournal | None) -> Tensor:
        # First what may be refused: text and pictures take long to encode.
        scheduler, steps = self._scheduler()
        if self.stages.plan.workers:
            self.stages.workers()  # they start while texts are encoded
        if character_plan(self.stages, self.request) is not None:
            conditions, _ = self._conditions()

            def begun(noise: Tensor) -> Tensor:
                return start_latents(noise, scheduler, steps.start)

            self.character = character_segments(
                self.stages, self.request, self.inputs, conditions, begun
            )
            return self._make_segments(self.character, scheduler, steps, journal)
        if self.request.window_mode == "continuation":
            return self._sample_segments(self._segments(), journal)
        windows = self._windows(self.request.latent_frames)
        if windows is None or windows.count == 1:
            self._warn(window_settings_without_effect(self.config))
        conditions, start = self._conditions()
        if (windows is None or windows.count == 1) and len(conditions.prompt_parts) > 1:
            self.stages.result.warnings.append(
                "prompts: the clip is denoised as a whole, so only the text of its middle is "
                "used. Set max_chunk_size to make it in windows."
            )
        elif windows is not None and self.request.prompts:
            seen = (one.middle for i in range(steps.start, steps.end) for one in windows.windows(i))
            self._warn(unseen_texts(self.request, seen))
        latents = self._begin(start, windows, scheduler, steps)
        state = DenoiseState(latents=latents, next_step=steps.start)
        resumed = steps.start if journal is None else journal.restore(state, scheduler)
        if resumed > steps.start or state.next_window:
            part = f" and {state.next_window} windows of the next" if state.next_window else ""
            self.stages.result.metadata["resumed"] = f"after step {resumed} of {steps.end}{part}"
        signals = self._signals(state, steps, scheduler, journal)
        self._denoise(state, conditions, scheduler, steps, signals)
        latents, in_front = hold_first_frame(state.latents, conditions), conditions.references
        return latents[:, :, in_front:] if in_front else latents

    def _conditions(self) -> tuple[Conditions, Tensor | None]:
        """Return the conditions, and the latents of a video that the clip starts from."""
        maker = ConditionMaker(stages=self.stages, request=self.request, inputs=self.inputs)
        return maker.make(), maker.start()

    def _begin(
        self, start: Tensor | None, windows: WindowPlan | None, scheduler: Any, steps: StepPlan
    ) -> Tensor:
        """Return the latents of the first step: noise, or a video with noise added."""
        noise = self._noise(windows)
        if start is None:
            return start_latents(noise, scheduler, steps.start)
        sigma, made = float(scheduler.sigmas[steps.start]), steps.end - steps.start
        count = self.request.num_inference_steps
        said = f"{made} of {count} steps, from a video with noise of sigma {sigma:.3f}"
        self.stages.result.metadata["control"] = said
        return noised(scheduler, start, noise, steps.start)

    def _segments(self) -> SegmentPlan:
        request, given = self.request, self.inputs.continue_from
        return plan_segments(
            request.latent_frames,
            0 if given is None else given.shape[2],
            self.stages.plan.choices.window_frames,
            self._overlap,
            [latent_index(part.start) for part in request.prompts],
        )

    def _sample_segments(self, plan: SegmentPlan, journal: RenderJournal | None) -> Tensor:
        """Make one segment after the other, each with all denoising steps."""
        request, result = self.request, self.stages.result
        conditions, start = self._conditions()
        given = self.inputs.continue_from
        scheduler, steps = self._scheduler()
        segments = ClipSegments(
            plan=plan,
            noise=self._begin(start, plan.windows, scheduler, steps),
            conditions=conditions,
            given=given,
            drift_correction=request.drift_correction,
        )
        if len(plan.ranges) == 1:
            self._warn(window_settings_without_effect(self.config))
        result.metadata["windows"] = plan.describe(0 if given is None else given.shape[2])
        result.warnings += plan.windows.notes
        return self._make_segments(segments, scheduler, steps, journal)

    def _make_segments(
        self,
        segments: ClipSegments | CharacterSegments,
        scheduler: Any,
        steps: StepPlan,
        journal: RenderJournal | None,
    ) -> Tensor:
        result = self.stages.result
        state = segments.begin(0, steps.start)
        if journal is not None and (resumed := journal.restore(state, scheduler)) > steps.start:
            segments.go_on(state)
            result.metadata["resumed"] = (
                f"segment {state.segment + 1} of {len(segments)}, "
                f"after step {resumed} of {steps.end}"
            )
        while True:
            self.segment = state.segment
            # Segments may differ in length, and their steps in time.
            self.stages.timeline.work_on(len(segments.frames(state.segment)))
            self.stages.callbacks.call(self.config.chunk_callback, state.segment, len(segments))
            conditions = segments.conditions_of(state.segment)
            signals = self._signals(state, steps, scheduler, journal, len(segments))
            self._denoise(state, conditions, scheduler, steps, signals)
            segments.finish(state, conditions)
            # Each segment has a new scheduler, because the solver remembers the last one's steps.
            if state.segment + 1 == len(segments):
                return segments.clip
            scheduler, steps = self._scheduler()
            remembered = state.memory.next_segment()
            state = segments.begin(state.segment + 1, steps.start)
            state.memory = remembered

    def _scheduler(self) -> tuple[Any, StepPlan]:
        request, architecture = self.request, self.stages.architecture
        saved = architecture.components.get("scheduler")
        config = load_scheduler_config(saved.path) if saved is not None else None
        noise = StepNoise(request.noise, request.seed)
        # No run has made the steps before a video's first: its draws begin there, as ComfyUI's do.
        first = request.start_step if self.inputs.latents is None else 0

        def fresh(step: int, shape: Any) -> Tensor:
            return noise.draw(step - first, shape, self.segment)

        scheduler = make_solver(request, config, self.stages.device, fresh)
        steps = plan_steps(
            [float(t) for t in scheduler.timesteps],
            experts=2 if architecture.two_experts else 1,
            boundary=request.boundary,
            switch_step=request.switch_step,
            start_step=request.start_step,
            end_step=request.end_step,
        )
        scheduler.set_begin_index(steps.start)
        self.stages.result.metadata["steps"] = steps.describe()
        return scheduler, steps

    def _noise(self, windows: WindowPlan | None) -> Tensor:
        """Draw the initial noise, or take the latents that the user gave."""
        request, given, stages = self.request, self.inputs.latents, self.stages
        if given is not None:
            return given.to(device=stages.device, dtype=torch.float32)
        b, c, frames, h, w = latent_shape(request, stages.architecture)
        shape, before = (b, c, frames + self._references, h, w), self._references
        return draw_noise(request.noise, shape, request.seed, windows, before).to(stages.device)

    @property
    def _references(self) -> int:  # latent frames that are denoised with the clip and cut off
        return references_in_front(self.request, self.stages.architecture)

    @property
    def _overlap(self) -> int:
        """The overlap of windows in frames: as asked for if the windows are, else the plan's.

        Given the value that was asked for, ``plan_windows`` can say that it had to be rounded.
        """
        request, plan = self.request, self.stages.plan
        asked = request.window_frames == plan.choices.window_frames and not request.overlap_free
        return request.window_overlap if asked else plan.choices.window_overlap

    def _windows(self, frames: int) -> WindowPlan | None:
        """Plan the windows over ``frames`` latent frames, those of the clip or of one segment.

        Windows that were asked for and cover the clip are one window, of which the plan knows
        nothing: it is the clip in one piece.
        """
        request, plan = self.request, self.stages.plan
        length = plan.choices.window_frames or request.window_frames
        if length is None or self.character is not None:
            return None
        windows = plan_windows(
            frames,
            window=length,
            overlap=self._overlap,
            schedule=request.window_schedule,
            fusion=request.window_fusion,
        )
        if request.window_mode == "windows":
            self.stages.result.metadata["windows"] = windows.describe()
        self._warn(windows.notes)
        return windows

    def _denoise(
        self,
        state: DenoiseState,
        conditions: Conditions,
        scheduler: Any,
        steps: StepPlan,
        signals: Signals,
    ) -> None:
        """Make all steps that ``state`` has not made yet, each with its expert.

        An expert makes all its steps before the next is loaded: only one needs the device.
        """
        stages, request = self.stages, self.request
        single = not stages.architecture.two_experts
        for name, component, wanted, scale, plain in steps.passes(request, two_experts=not single):
            if state.next_step >= wanted.stop:
                continue
            stage = "denoise" if single else f"denoise_{name}"

            # Called again after a step down; ``denoise_steps`` goes on from ``state``. The defaults
            # bind the loop's variables to this pass.
            def work(
                name: str = name,
                component: str = component,
                wanted: range = wanted,
                scale: float = scale,
                stage: str = stage,
                plain: bool = plain,
            ) -> None:
                ahead = self._next_ahead(component, steps)
                found = expert_in_place(stages, name, stage, component, scale, plain, ahead)
                with found as expert:
                    told = with_faces(self.character, conditions, state.segment, expert)
                    denoise_steps(
                        state,
                        wanted,
                        expert,
                        scheduler,
                        told,
                        windows=self._windows(state.latents.shape[2] - self._references),
                        anchor=request.window_anchor,
                        signals=signals,
                        shortcuts=self._shortcuts(steps),
                    )

            stages.attempt(stage, work)
        if state.memory.phase:
            stages.result.metadata["forwards"] = state.memory.describe()

    def _shortcuts(self, steps: StepPlan) -> Shortcuts | None:
        choices, request, model = self.stages.plan.choices, self.request, self.stages.architecture
        control = request.control
        image = self.config.image is not None or bool(control and control.positions)
        curve = magcache_curve(model.name, request.width, request.height, image)
        return chosen_shortcuts(choices, curve, steps, two_experts=model.two_experts)

    def _next_ahead(self, component: str, steps: StepPlan) -> AbstractContextManager[None]:
        """Read the low-noise expert while the high-noise one computes."""
        if component == "transformer" and len(steps.low) and self.stages.has("transformer_2"):
            return self.stages.read_next("transformer_2")
        return nullcontext()

    def _signals(
        self,
        state: DenoiseState,
        steps: StepPlan,
        scheduler: Any,
        journal: RenderJournal | None,
        segments: int = 1,
    ) -> Signals:
        """Return the signals of the denoising loop: journal, callbacks, and the timeline."""
        each = steps.end - steps.start
        total, before = each * segments, each * state.segment - steps.start + 1
        config, call, in_front = self.config, self.stages.callbacks.call, self._references
        # After these steps another expert is loaded, or another segment begun. After the very last
        # one the finished latents are saved at once.
        stops = [steps.high.stop] * bool(steps.low) + [steps.end] * (state.segment + 1 < segments)
        # In continuation mode ``chunk_callback`` is called for segments, not for windows.
        chunk = config.chunk_callback if self.request.window_mode == "windows" else None

        def step(index: int, latents: Tensor) -> None:
            # The journal first: what a callback raises must not lose the step. A spill last.
            if journal is not None:
                journal.step_done(state, scheduler, self.stages.plan, last=index + 1 in stops)
                self._warn(journal.warnings)
            self.stages.callbacks.tell(self.stages.result.warnings)
            shown = latents[:, :, in_front:] if in_front else latents
            call(config.progress_callback, before + index, total, shown)
            self.stages.step_done(last=index + 1 in (steps.high.stop, steps.low.stop))

        def preview(index: int, clean: Tensor) -> None:
            call(config.preview_callback, before + index, total, clean[:, :, in_front:])

        def window_done(index: int, count: int) -> None:
            if journal is not None:
                journal.window_done(state, scheduler, self.stages.plan)

        return Signals(
            step=step,
            preview=None if config.preview_callback is None else preview,
            window=lambda index, count: call(chunk, index, count),
            window_done=window_done,
            check=self.stages.callbacks.check,
            kept=None if journal is None else journal.units(state, lambda: self.stages.plan),
        )

    # -- decoding -----------------------------------------------------------------------------

    def _decode(self, latents: Tensor) -> None:
        """Decode a few frames at a time into the result's tensor, the mp4, or both."""
        request, result = self.request, self.stages.result
        wanted, batch = request.wanted_frames, request.batch_size
        # Allocated before decoding, so that it fails now if RAM is short, not after the last frame.
        frames = None
        if self.config.return_frames:
            shape = (batch, wanted, request.height, request.width, 3)
            frames = self.stages.attempt("decode", lambda: torch.empty(shape, dtype=torch.float32))
        with ExitStack() as stack:
            writers = [stack.enter_context(self._writer(path)) for path in output_paths(request)]
            progress = Decoding(latents, frames, writers, wanted)
            self.stages.attempt("decode", lambda: self._decode_rest(progress))
            if progress.overflowed:
                self.stages.widen_vae(progress.done)
                self.stages.attempt("decode", lambda: self._decode_rest(progress))
            progress.check_whole()
            if frames is not None:  # whatever becomes of the file
                result.frames = frames.flatten(0, 1)
        result.output_path = request.output_path
        try_strips(self.stages, progress)

    def _decode_rest(self, progress: Decoding) -> None:
        """Decode the frames that are left. After a failure the same call goes on from there."""
        stages = self.stages
        if decode_in_strips(stages, self.config, progress):
            return
        with stages.use("decode", "vae") as vae:
            decoder = progress.decoder
            if progress.needs_decoder:
                # Cast before denormalising, as diffusers' pipelines do: the order affects rounding.
                latents = progress.latents.to(stages.device, stages.dtype("vae"))
                latents = denormalize_latents(latents, vae.config)
                made = decoder_of(stages, self.request, self.character, vae, latents)
                decoder = progress.go_on_with(made)
            decoder.vae = vae  # loaded anew, maybe, in the smaller plan's dtype
            try:
                decode_frames(stages, self.config, progress)
            finally:
                decoder.close()

    def _writer(self, path: Path) -> VideoWriter:
        return VideoWriter.of(path, self.request, self.config.output_metadata, self.inputs.audio)
