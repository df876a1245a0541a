"""``WanPipelineWrapper``: plans a generation, has ``Render`` carry it out, and returns the result.

Until the plan is made (``resolve``, ``recommend_optimizations``) nothing is loaded.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from ..config import GenerationConfig, MemoryEstimate, VideoGenerationResult, require_config
from ..errors import DoesNotFit, NoWorkers, WorkerFailed, clear_frames, first_line, is_oom
from ..forward import norms_widen, settings_notes, undisturbed, why_no_lean
from ..job import (
    Inputs,
    Request,
    as_preferred,
    check_files,
    check_inputs,
    check_parts,
    files_of,
    flag,
    has_keyframes,
    pictures_needed,
    resolve,
    texts_to_encode,
    video_frames,
    with_character,
)
from ..kernels import slid_from_cudnn, trials_of_a_render
from ..loading import ComponentCache, component_key, unpin
from ..memory import (
    Calibrations,
    CardRecords,
    RunRecord,
    SystemResources,
    Workload,
    all_cards,
    forward_name,
)
from ..models import ModelArchitecture
from ..placing import require_groups
from ..plan import (
    ABILITIES,
    OptimizationConfig,
    OptimizationPlan,
    Planner,
    Remedies,
    for_all_cards,
)
from ..preferences import Preferences
from ..workers import close_workers, give_back_workers, when_joined
from .diffusers_pipeline import check_diffusers
from .render import Render
from .report import Callbacks, Forecast, Timeline, device_bytes, format_report, workload_of
from .stages import StageRunner


class WanPipelineWrapper:
    """A model that has been opened, and what the user asks of plans for it.

    Made by ``WanPipelineLoader.load_wan_pipeline``. It holds no weights; those are in the cache of
    components. Safe to use from several threads; renders that share a cache run one after the
    other.
    """

    def __init__(
        self,
        architecture: ModelArchitecture,
        *,
        optimization: OptimizationConfig,
        cache: ComponentCache,
        keep_components: bool = True,
        preferences: Preferences | None = None,
    ) -> None:
        self.architecture = architecture
        self.optimization = optimization
        self._preferences = Preferences() if preferences is None else preferences
        """Those that count here: ``optimization`` holds them, and does not tell them apart."""
        self._cache = cache
        self._keep = keep_components
        shape = architecture.transformer
        no_lean = why_no_lean(vace=bool(shape.vace_layers), faces=shape.face is not None)
        abilities = ABILITIES if no_lean is None else ABILITIES - {"lean", "rows"}
        self._manager = Planner(abilities | ({"wide norms"} if norms_widen() else set()))
        self._notes: tuple[str, ...] = ()
        if no_lean is not None:
            self._notes = (f"no lean forward or decoder, which need less memory: {no_lean}",)
        self._notes += self._preferences.reasons()
        self._calibrations = Calibrations()
        self.evictable_bytes = 0
        """Device bytes that the host program (ComfyUI) would free for a render."""
        self._files = files_of(architecture)
        self._stats: dict[str, Any] = {"runs": 0, "failed": 0, "seconds": 0.0, "last": None}

    def plan(self, config: GenerationConfig) -> tuple[Request, OptimizationPlan]:
        """Check what the job is given and decide how to run it, from headers alone.

        Nothing is loaded, and components that the model was opened without are not asked for.
        Raises InvalidRequest for a value, picture or tensor that is not allowed, DoesNotFit if no
        plan fits.
        """
        request = self._resolve(config)
        check_inputs(config, request, self.architecture)
        return request, self._plan(request, config)

    def check(self, config: GenerationConfig) -> Request:
        """Check everything that can be known of a job before its first weight is read.

        Raises what ``generate`` would report: InvalidRequest for a value, picture or tensor that is
        not allowed, a ModelFileError for a component that is missing or a file that was replaced.
        """
        return self._checked(config)[0]

    def estimate_memory_usage(self, config: GenerationConfig) -> MemoryEstimate:
        """Return the memory a generation is expected to need, stage by stage; loads nothing.

        No picture is looked at, and those that the model cannot do without count as given. Raises
        InvalidRequest for a value that is not allowed. If it does not fit, the estimate has
        ``fits`` False; that is not an error.
        """
        config = self._with_pictures(config)
        request, optimization, job, system = self._foreseen(config)
        estimate = self._manager.estimate(self.architecture, job, system, optimization)
        warnings = [*estimate.warnings, *self._preferences.warnings, *request.warnings]
        if texts_to_encode(config, request) and not job.encode_text:
            warnings.append(
                "The text encoder is not counted: the model was opened without one, and runs with "
                "prompt_embeds only."
            )
        return replace(estimate, warnings=tuple(warnings))

    def foresee(self, config: GenerationConfig, machine: SystemResources | None = None) -> Forecast:
        """Return what is known of a job before it runs, within milliseconds; loads nothing.

        As ``estimate_memory_usage``, with the plan and its seconds. ``machine`` is what the machine
        had at an earlier moment; None looks at it now. Raises InvalidRequest.
        """
        config = self._with_pictures(config)
        request, optimization, workload, system = self._foreseen(config, machine)
        plan, estimate = self._manager.foresee(self.architecture, workload, system, optimization)
        warnings = (*estimate.warnings, *self._preferences.warnings)
        estimate = replace(estimate, warnings=warnings)
        return Forecast(
            request=request, workload=workload, system=system, plan=plan, estimate=estimate
        )

    def remedies(self, forecast: Forecast) -> Remedies:
        """Return what of a job that does not fit could be made smaller, and to what."""
        return self._manager.remedies(
            self.architecture, forecast.workload, forecast.system, self.optimization
        )

    def what_fits(self, config: GenerationConfig) -> str:
        """Name, in one sentence, the longest clip and the largest size that would fit."""
        _, optimization, workload, system = self._foreseen(self._with_pictures(config))
        return self._manager.what_fits(self.architecture, workload, system, optimization)

    def _foreseen(
        self, config: GenerationConfig, machine: SystemResources | None = None
    ) -> tuple[Request, OptimizationConfig, Workload, SystemResources]:
        """Return what a plan is made of; ``machine`` as in ``foresee``."""
        request, optimization = self._resolve(config), self._optimization_for(config)
        workload = workload_of(request, config, self.architecture)
        return request, optimization, workload, self._system(optimization, machine)

    def _resolve(self, config: GenerationConfig) -> Request:
        """Check the values of a job. Windows without a length are as long as ``chunk_size``."""
        size = self._optimization_for(config).chunk_size
        request = resolve(config, self.architecture, window=video_frames(size) if size else None)
        return as_preferred(request, config, self._preferences)

    def _with_pictures(self, config: GenerationConfig) -> GenerationConfig:
        """Put names in the place of pictures that the model needs, where none are looked at."""
        require_config(config)
        animate = self.architecture.transformer.animate
        if animate is not None:
            return replace(config, control=with_character(config, animate))
        needed = () if has_keyframes(config) else pictures_needed(self.architecture)
        missing: dict[str, Any] = {n: n for n in needed if getattr(config, n) is None}
        return replace(config, **missing)

    def _checked(self, config: GenerationConfig) -> tuple[Request, Inputs]:
        request = self._resolve(config)
        check_files(self._files)
        check_parts(config, request, self.architecture)
        inputs = check_inputs(config, request, self.architecture)
        check_diffusers()
        return request, inputs

    def _plan(self, request: Request, config: GenerationConfig) -> OptimizationPlan:
        optimization = self._optimization_for(config)
        return self._manager.recommend_optimizations(
            self.architecture,
            workload_of(request, config, self.architecture),
            self._system(optimization),
            optimization,
        )

    def _optimization_for(self, config: GenerationConfig) -> OptimizationConfig:
        require_config(config)
        optimization = self.optimization.overridden(config.precision_override)
        on = flag(config.enable_optimizations, "enable_optimizations")
        return optimization if on else replace(optimization, offload="none")

    def _system(
        self, optimization: OptimizationConfig, machine: SystemResources | None = None
    ) -> SystemResources:
        """Look at the machine; the memory of unused components counts as available.

        ``machine`` is what was seen before, with what could be freed then.
        """
        system = machine or self.machine(optimization.device)
        if optimization.devices != "1":
            known = CardRecords().between(torch.get_num_threads())
            cards = when_joined(all_cards())
            system = for_all_cards(replace(system, cards=cards, between=known), optimization)
        return replace(
            system,
            notes=system.notes + self._notes,
            calibration=self._calibrations.of(self._calibration_key(system)),
            loaded=self._loaded(),
        )

    def _loaded(self) -> tuple[str, ...]:
        """Return the components that need not be read: the cache has them, in whatever dtype."""
        held = {(key.kind, key.files) for key, _ in self._cache.loaded()}
        if not held:
            return ()
        keys = {name: component_key(one, "") for name, one in self.architecture.components.items()}
        return tuple(name for name, key in keys.items() if (key.kind, key.files) in held)

    def machine(self, device: str | None = None) -> SystemResources:
        """Look at the machine, with what unused components and ``evictable_bytes`` would free."""
        system = self._manager.analyze_system_resources(device)
        on_device, in_ram = self._cache.unused_bytes(system.device)
        return replace(
            system,
            evictable_bytes=on_device + self.evictable_bytes,
            ram_evictable_bytes=in_ram,
        )

    def _calibration_key(self, system: SystemResources) -> str:
        torch_version = f"torch {system.torch_version}"
        return ", ".join(
            (system.device_name, system.backend, torch_version, self.architecture.name)
        )

    def generate(self, config: GenerationConfig) -> VideoGenerationResult:
        """Make the video. Failures are reported in the result and not raised.

        Only exceptions from a callback of ``config``, such as an interrupt, are raised, unchanged.
        ``result.frames`` is float32 (num_frames, height, width, 3) in 0..1; ``result.latents`` is
        normalised, (B, C, T, h, w).
        """
        result = VideoGenerationResult(success=False)
        callbacks = Callbacks(config)
        started = time.perf_counter()
        error: Exception | None = None
        try:
            with undisturbed() as callbacks.around, self._cache.one_render(callbacks.check):
                self._render(config, callbacks, result)
        except Exception as err:  # noqa: BLE001 - all failures are reported in the result
            error = callbacks.settle(err)
        finally:
            callbacks.raised = None  # its frames hold the weights, and through this each other
        if callbacks.around is not None:
            result.warnings += [n for n in callbacks.around.notes if n not in result.warnings]
            callbacks.around = None
        result.generation_time = time.perf_counter() - started
        self._finish(result, error)
        try:
            callbacks.tell(result.warnings)
            return result
        finally:
            callbacks.raised = None
            del error, result  # an error has this frame, and the result has the error

    def _render(
        self, config: GenerationConfig, callbacks: Callbacks, result: VideoGenerationResult
    ) -> None:
        result.warnings += self._preferences.warnings
        request, inputs = self._checked(config)
        plan = self._plan(request, config)
        if "group" in plan.choices.part_offload.values():
            require_groups()
        render = self._make_render(config, request, plan, callbacks, result, inputs)
        result.warnings += settings_notes(render.stages.device.type)
        result.warnings += filter(None, [slid_from_cudnn(render.stages.device)])
        before = self._foreign_bytes(render.stages)
        try:
            with trials_of_a_render(result.warnings):
                render.run()
        finally:
            give_back_workers(render.stages)
            # Page-locked memory cannot be swapped out, and other programs need it between renders.
            unpin()
        self._learn(plan, render.stages, before)

    def _foreign_bytes(self, stages: StageRunner) -> int:
        """Return the bytes that torch has in use on a CUDA device for others than the cache.

        To be called outside a render: before or after it, these are the bytes of other users of
        torch in this process.
        """
        if stages.device.type != "cuda":
            return 0
        ours, _ = self._cache.unused_bytes(str(stages.device))
        return max(0, device_bytes(stages.device) - ours)

    def _learn(self, plan: OptimizationPlan, stages: StageRunner, foreign_before: int = 0) -> None:
        """Store what a run on CUDA measured, to correct later predictions.

        A run that stepped down is left out, because its measurements belong to several plans.
        """
        system = self._manager.analyze_system_resources(plan.device)
        # On other devices the measured peaks are the RAM of the process.
        # Of workers' cards the peaks are not those of the stages here.
        if system.device_kind != "cuda" or stages.steps_down or plan.workers:
            return
        key, steps = self._calibration_key(system), stages.timeline.full_steps
        known = self._calibrations.of(key)
        # Where the transfers take longer than the compute, steps do not show the compute's pace.
        pace = median(steps) / plan.step_seconds if steps and plan.compute_bound else None
        record = RunRecord.of(
            plan.estimate.stages,
            stages.timeline.stages,
            forward=forward_name(plan.choices.lean, plan.choices.by_rows),
            learnt=known.extra_of(plan.choices.lean, plan.choices.by_rows),  # as estimates add it
            base_bytes=min(foreign_before, self._foreign_bytes(stages)),
            pace=None if pace is None else known.pace * pace,
        )
        if record is not None:
            self._calibrations.add(key, record)

    def _make_render(
        self,
        config: GenerationConfig,
        request: Request,
        plan: OptimizationPlan,
        callbacks: Callbacks | None = None,
        result: VideoGenerationResult | None = None,
        inputs: Inputs | None = None,
    ) -> Render:
        optimization = self._optimization_for(config)
        alone = replace(optimization, devices="1")
        job = workload_of(request, config, self.architecture)

        def smaller(current: OptimizationPlan, stage: str) -> OptimizationPlan | None:
            system = self._system(optimization)
            return self._manager.smaller_plan(
                self.architecture, job, system, optimization, current, stage
            )

        def for_one(current: OptimizationPlan, lost: NoWorkers) -> OptimizationPlan:
            system = self._system(alone)
            try:
                return self._manager.plan_alone(self.architecture, job, system, alone, current)
            except DoesNotFit as err:
                raise WorkerFailed(
                    f"{lost} This process cannot make the clip by itself either: {err}"
                ) from err

        predicted = {stage.name: stage.device_bytes for stage in plan.estimate.stages}
        stages = StageRunner(
            architecture=self.architecture,
            files=self._files,
            cache=self._cache,
            keep_components=self._keep,
            plan=plan,
            callbacks=callbacks or Callbacks(config),
            result=result or VideoGenerationResult(success=False),
            timeline=Timeline(torch.device(plan.device), predicted),
            smaller_plan=smaller,
            plan_alone=for_one,
            usual_step=plan.step_seconds if plan.paced else None,
        )
        if inputs is None:
            inputs = check_inputs(config, request, self.architecture)
        return Render(stages=stages, config=config, request=request, inputs=inputs)

    def _finish(self, result: VideoGenerationResult, error: Exception | None) -> None:
        if error is None:
            result.success = True
        else:
            result.error = _explained(error)
            result.errors.append(str(result.error) or type(result.error).__name__)
        self._stats["runs"] += 1
        self._stats["failed"] += not result.success
        self._stats["seconds"] += result.generation_time
        self._stats["last"] = result.to_dict()

    def get_generation_stats(self) -> dict[str, Any]:
        """Return the number of runs and failures, all seconds, and the last result, no tensors."""
        return dict(self._stats)

    def preload(self) -> None:
        """Read every component into the cache now. Without caching this has no lasting effect."""
        # The smallest request that every variant accepts; only its plan's dtypes are used.
        config = GenerationConfig(prompt="", num_frames=5, width=64, height=64)
        config = self._with_pictures(config)
        request = self._resolve(config)
        plan = self._plan(request, config)
        render = self._make_render(config, request, plan, inputs=Inputs())
        with undisturbed(), torch.inference_mode(False), torch.no_grad():
            for name in self.architecture.components:
                if name != "scheduler":
                    with render.stages.component(name):
                        pass

    def unload(self) -> None:
        """Drop the components of this pipeline from the cache, and end its workers."""
        if self.optimization.devices != "1":
            close_workers()
        files = {path for part in self.architecture.components.values() for path in part.files}
        self._cache.drop({str(path.resolve()) for path in files})

    def report(self, result: VideoGenerationResult) -> str:
        """Format a result of this pipeline as text."""
        return format_report(result)


def _explained(error: Exception) -> Exception:
    """Turn a shortage of memory into DoesNotFit; free the tensors that tracebacks hold."""
    oom = is_oom(error)
    clear_frames(error)
    if not oom or isinstance(error, DoesNotFit):
        return error
    explained = DoesNotFit(
        f"Memory ran out during the run ({first_line(error)}). Make the clip shorter or smaller, "
        "set max_chunk_size, or choose offload 'model' or 'sequential'."
    )
    explained.__cause__ = error.with_traceback(None)
    return explained
