"""What all stages of a render share: components in their place, measurement, and stepping down.

A stage asks for a component and gets it placed as the plan says. When memory runs out in a stage,
the render *steps down*: it takes a smaller plan, and the stage goes on from where it stopped.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..config import StageReport, VideoGenerationResult
from ..errors import DoesNotFit, NoWorkers, SpilledMemory, first_line, is_host_oom, is_oom
from ..files import FileIdentity
from ..job import check_files
from ..loading import (
    ComponentCache,
    ComponentKey,
    component_key,
    dtype_of,
    first_look,
    load_component,
    load_image_processor,
    load_tokenizer,
    read_again,
    to_look_at,
    unpin,
)
from ..memory import RAM_RESERVE, ram
from ..models import ModelArchitecture, part_bytes, ram_bytes, stays_in_file
from ..placing import Ahead, do_ahead, files_ahead, pin_ahead, pin_budget
from ..plan import OptimizationPlan
from ..sampling import OutOfRange
from ..workers import Weights, WorkerPool, give_back_workers, placed, worker_pool
from .report import (
    Callbacks,
    Timeline,
    beyond_fp16,
    device_fill,
    kernels_noted,
    kind_of_storage,
    out_of_ram,
    spilled,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

T = TypeVar("T")

MAX_STEPS_DOWN = 64
"""Most smaller plans that one render tries; each is strictly smaller than the one before."""


@dataclass(slots=True, kw_only=True)
class StageRunner:
    """Carries out the stages of one render.

    ``plan`` is replaced by a smaller one when memory runs out, so always read it from here.
    """

    architecture: ModelArchitecture
    cache: ComponentCache
    keep_components: bool
    plan: OptimizationPlan
    callbacks: Callbacks
    result: VideoGenerationResult
    timeline: Timeline
    smaller_plan: Callable[[OptimizationPlan, str], OptimizationPlan | None]
    """Takes the plan and the stage that failed; returns a plan that needs less there, or None."""
    plan_alone: Callable[[OptimizationPlan, NoWorkers], OptimizationPlan]
    """Takes a plan for workers, and why none is left; returns one by which this process goes on, or
    raises WorkerFailed."""
    files: Mapping[Path, FileIdentity] = field(default_factory=dict)
    """The model's files as they were when it was opened."""
    steps_down: int = 0
    host_rungs: int = 0
    """How often RAM was freed because it ran out."""
    usual_step: float | None = None
    """Expected seconds of a step by the pace of earlier runs; None if there are none."""
    bears_spilling: bool = False
    """Set when memory has spilled and there is no smaller plan: slow is better than not at all."""
    _pool: WorkerPool | None = None

    @property
    def device(self) -> torch.device:
        """The device that the plan computes on."""
        return torch.device(self.plan.device)

    def dtype(self, component: str) -> torch.dtype:
        """Return the dtype that a component computes in."""
        return dtype_of(self.plan.choices.dtypes[component])

    def widen_vae(self, frames: int | None) -> None:
        """Have the VAE compute in bf16 from now on: fp16's range did not hold after ``frames``.

        None says that it encoded; what it encoded before stays as it is.
        """
        dtypes = {**self.plan.choices.dtypes, "vae": "bf16"}
        self.plan = replace(self.plan, choices=replace(self.plan.choices, dtypes=dtypes))
        self.result.applied_optimizations = list(self.plan.applied)
        self.result.warnings.append(beyond_fp16(frames))

    def has(self, component: str) -> bool:
        """Say whether the model has this component."""
        return component in self.architecture.components

    def check_interrupt(self) -> None:
        """Look for an interrupt, and sample the memory in use; called between blocks."""
        self.callbacks.check()
        self.timeline.sample()

    def step_done(self, *, last: bool = False) -> None:
        """Note the time of a denoising step. Raises SpilledMemory if memory has spilled into RAM.

        It does not raise after the ``last`` step of a stage: a smaller plan would come too late.
        """
        self.timeline.step_done(self.callbacks.seconds)
        if last:
            return
        why = spilled(*device_fill(self.device), self.timeline.step_seconds, self.usual_step)
        if why is not None and not self.bears_spilling:
            raise SpilledMemory(f"device memory has spilled into RAM: {why}")

    def key(self, name: str) -> ComponentKey:
        """Return the cache key of a component as the plan wants it."""
        options = ("fp8",) if self._in_fp8(name) else ()
        return component_key(
            self.architecture.components[name], self.plan.choices.dtypes.get(name, ""), options
        )

    def _in_fp8(self, name: str) -> bool:
        if not self.plan.choices.fp8_storage or not name.startswith("transformer"):
            return False
        stored = self.architecture.components[name].stored
        return stored is None or not stored.quantised

    def component(self, name: str, *, look_later: bool = False) -> AbstractContextManager[Any]:
        """Borrow a component from the cache, which reads it if it is not there.

        With ``look_later`` its weights are still to be read then, in a ``first_look``.
        """
        part = self.architecture.components[name]

        def build() -> Any:
            small = {"tokenizer": load_tokenizer, "image_processor": load_image_processor}
            if name in small:
                return small[name](part.path)
            self.callbacks.check()
            told = partial(self.callbacks.loaded, name)
            read = partial(self._read, name, self.check_interrupt, told)
            if look_later:
                with files_ahead(part.files):  # while the module is made
                    return read(look_later=True)
            with self.timeline.stage(f"load {name}") as report:
                report.note = self._kind_of_storage(name)
                return read()

        return self._borrow(name, build)

    def _borrow(self, name: str, build: Callable[[], Any]) -> AbstractContextManager[Any]:
        return self.cache.borrow(
            self.key(name), self._ram_bytes(name), build, keep=self.keep_components
        )

    def _read(
        self, name: str, check: Callable[[], object], progress: Callable[[int, int], object], *,
        look_later: bool = False,
    ) -> Any:  # fmt: skip
        part = self.architecture.components[name]
        # Hours may lie between the job's checks and this: the VAE is read after the last step.
        known = {path: self.files[path] for path in part.files if path in self.files}
        check_files(known)
        module = load_component(
            part.path,
            self.dtype(name),
            kind=part.kind.removesuffix("_2"),
            keep_quantized=True,
            map_file=self._mapped(name),
            align=self.device.type == "cpu",
            fp8_storage=self._in_fp8(name) and self.device,
            look_later=look_later,
            module_path=part.module,
            interrupt_check=check,
            progress=progress,
        )
        check_files(known)
        return module

    def _kind_of_storage(self, name: str) -> str:
        part, computed = self.architecture.components[name], self.plan.choices.dtypes[name]
        return kind_of_storage(part, computed, in_fp8=self._in_fp8(name))

    def _mapped(self, name: str) -> bool:
        """Whether a component's weights are views of its file rather than copies in RAM."""
        dtype = self.plan.choices.dtypes.get(name, "bf16")
        on_cpu = self.device.type == "cpu"
        return stays_in_file(self.architecture, name, dtype, on_cpu=on_cpu)

    def _ram_bytes(self, name: str) -> int:
        """Return what a component takes from the RAM, as the cache makes room for it."""
        part = self.architecture.components[name]
        if not part.files:
            return 0
        dtype = self.plan.choices.dtypes.get(name, "bf16")
        on_cpu, fp8 = self.device.type == "cpu", self._in_fp8(name)
        return ram_bytes(self.architecture, name, dtype, fp8=fp8, on_cpu=on_cpu)

    @contextmanager
    def use(self, stage: str, component: str, *, distilled: bool = True) -> Iterator[Any]:
        """Enter a stage, with its component placed as the plan says.

        Without ``distilled`` no LoRA is put on that is distilled to a few steps.

        Loading counts as a stage of its own. On CUDA weights that stay in their file are read once,
        while they are sent to where the plan wants them, and that belongs to their loading.
        """
        if not component.startswith("transformer"):
            # The experts' page-locked copies stay from one expert, window and segment to the next,
            # but not beside another component, whose memory was planned without them.
            unpin()
        cold = self._reads_while_sending(component)
        with ExitStack() as stack, ExitStack() as loading:
            if cold:
                report = loading.enter_context(self.timeline.stage(f"load {component}"))
                report.note = self._kind_of_storage(component)
            module = stack.enter_context(self.component(component, look_later=cold))
            if not cold:
                report = stack.enter_context(self.timeline.stage(stage))
            told = partial(self.callbacks.loaded, component)
            with first_look(module, self.check_interrupt, told):
                ready = self._placed(module, component, stage, distilled=distilled)
                self.say_once(stack.enter_context(ready))
            if cold:
                loading.close()
                report = stack.enter_context(self.timeline.stage(stage))
            with kernels_noted(report, self.plan.choices, self.say_once):
                yield module

    def _reads_while_sending(self, component: str) -> bool:
        if self.device.type != "cuda" or not self._mapped(component):
            return False
        module = self._in_cache(component)
        return module is None or to_look_at(module)  # some of it, or all, has not been read

    def _placed(
        self, module: Any, component: str, stage: str, *, distilled: bool
    ) -> AbstractContextManager[str | None]:
        loras = self.architecture.loras_of(component, distilled=distilled)
        return placed(
            module,
            component,
            self.plan,
            loras,
            self.dtype(component) if loras else None,
            decoding=stage == "decode",
            check=self.check_interrupt,
        )

    def weights(self, component: str, *, distilled: bool) -> Weights:
        """Return what a worker needs in order to have a transformer as the plan wants it."""
        return Weights.of(
            component,
            self.architecture.components[component],
            self.plan,
            self.architecture.loras_of(component, distilled=distilled),
            fp8=self._in_fp8(component),
            mapped=self._mapped(component),
            nbytes=self._ram_bytes(component),
            pin_limit=pin_budget(self.plan) // len(self.plan.workers),
            shape=self.architecture.transformer,
        )

    @property
    def has_workers(self) -> bool:
        """Whether this render's workers have been started."""
        return self._pool is not None

    def workers(self) -> WorkerPool:
        """Return the processes that the plan wants, the same ones to the end of the render."""
        if self._pool is None:
            self._pool = worker_pool(self.plan.workers, self.plan.gang, self)
            self._pool.begin(self.callbacks.loaded)
        return self._pool

    @contextmanager
    def read_next(self, component: str) -> Iterator[None]:
        """Read the component that comes next while this one computes, and page-lock its blocks.

        Only where the plan found room for it in RAM and the room is there. Where its weights are
        not read ahead they may still be page-locked. For workers only its file is read."""
        room = self._room_for_next(component)
        if self.plan.workers:  # they read it themselves, from the system's cache then
            with files_ahead(self.architecture.components[component].files if room else ()):
                yield
            return
        if not room:
            with self.pin_next(component):
                yield
            return
        known, later = self._in_cache(component) is not None, self._is_sent_whole(component)
        work = partial(self._read_ahead, component, known=known, later=later)
        with do_ahead(work, partial(self._await_next, component)) as ahead:
            yield
        if ahead.seconds and not (known or later):
            note = f"{self._kind_of_storage(component)}, read while the other expert computed"
            done = StageReport(name=f"load {component}", seconds=ahead.seconds, note=note)
            self.timeline.stages.append(done)

    def _room_for_next(self, component: str) -> bool:
        if not (self.plan.reads_ahead and self.keep_components):
            return False
        dtype = self.plan.choices.dtypes[component]
        in_ram = self._in_cache(component) is not None and not self._mapped(component)
        wanted = 0 if in_ram else part_bytes(self.architecture, component, dtype)
        return ram()[1] >= wanted + RAM_RESERVE

    def _in_cache(self, component: str) -> Any | None:
        own = self.key(component)  # asks the disk for each of its files
        return next((module for key, module in self.cache.loaded() if key == own), None)

    def _is_sent_whole(self, component: str) -> bool:
        """Whether a card gets all of a mapped component at its turn, and looks at it then."""
        whole = self.plan.choices.offload_of(component) in ("none", "model")
        return whole and self.device.type == "cuda" and self._mapped(component)

    def _read_ahead(self, component: str, ahead: Ahead, *, known: bool, later: bool) -> None:
        """Load a component, or read its file again where it is ``known``; in a thread's own time.

        The system may have dropped the file's pages since it was loaded. Where it is looked at
        ``later`` they need only be in RAM by then, and nobody waits for those that are not.
        """
        read = partial(self._read, component, ahead.check, ahead.progress, look_later=later)
        with torch.inference_mode(False), torch.no_grad(), self._borrow(component, read) as module:
            ahead.has_read()
            if known or later:
                read_again(module.parameters(), ahead.check)
            with self.pin_next(component):
                ahead.wait()

    def _await_next(self, component: str, done: int, total: int) -> None:
        self.check_interrupt()
        if total:
            self.callbacks.loaded(component, done, total)

    @contextmanager
    def pin_next(self, component: str) -> Iterator[None]:
        """Page-lock the blocks of the component that is streamed next, while this one computes.

        This is done only if its weights are in the cache, or can be mapped without being read.
        Reading a file here would hold up the render, and interrupts with it: what is page-locked is
        read in the thread that does so, the rest when its turn comes.
        """
        with ExitStack() as stack:
            if self._ready_to_pin(component):
                module = stack.enter_context(self.component(component, look_later=True))
                resident, buffers = self.plan.blocks_and_buffers(component)
                pinned = pin_ahead(
                    module,
                    resident_blocks=resident,
                    buffers=buffers,
                    pin_bytes=pin_budget(self.plan),
                )
                stack.enter_context(pinned)
            yield

    def _ready_to_pin(self, component: str) -> bool:
        plan = self.plan
        if plan.choices.offload_of(component) != "stream" or self.device.type != "cuda":
            return False
        loaded = self._in_cache(component) is not None
        mapped = stays_in_file(self.architecture, component, plan.choices.dtypes[component])
        return loaded or (mapped and not plan.choices.fp8_storage and self.keep_components)

    def say_once(self, text: str | None) -> None:
        """Add a warning that the result does not hold yet."""
        if text and text not in self.result.warnings:
            self.result.warnings.append(text)

    def attempt(self, stage: str, action: Callable[[], T]) -> T:
        """Run ``action``; if memory runs out in it, step down to a smaller plan and run it again.

        So it does in bf16 where an encode goes beyond the range of fp16, and by itself where no
        worker is left. ``action`` must go on from where it failed. Raises DoesNotFit if there is no
        smaller plan, WorkerFailed if there is none for one process; all other errors pass.
        """
        while True:
            lost, beyond = None, False
            try:
                return action()
            except OutOfRange as err:
                traceback.clear_frames(err.__traceback__)
                beyond = True
            except NoWorkers as err:
                if self.callbacks.raised is not None or not self.plan.workers:
                    raise
                lost = err.with_traceback(None)
            except Exception as err:
                ours = self.callbacks.raised is None and not isinstance(err, DoesNotFit)
                if not ours or not is_oom(err):
                    raise
                failure, spilled_only = first_line(err), isinstance(err, SpilledMemory)
                on_host = self.device.type != "cpu" and is_host_oom(err)
                # The frames of the traceback hold the tensors that filled the memory.
                traceback.clear_frames(err.__traceback__)
            # Outside the except block: within it, the exception that is being handled would keep
            # the frames, and with them the memory, alive.
            if lost is not None:
                self._go_alone(lost)
            elif beyond:
                self.widen_vae(None)
            elif on_host:
                self._relieve_host(stage, failure)
            else:
                self._step_down(stage, failure, must=not spilled_only)

    def _relieve_host(self, stage: str, failure: str) -> None:
        """Free RAM for another try; a smaller plan for the device would free none.

        First page locks are given up, then every component that is not in use: the other expert
        and the encoder can be read again. Raises DoesNotFit where both were done already.
        """
        gc.collect()
        self.host_rungs += 1
        if self.host_rungs == 1:
            unpin()
            self.plan = replace(self.plan, pin_limit=0)
            what = "page-locked memory was given back"
        elif self.host_rungs == 2:
            dropped = self.cache.drop_unused()
            what = f"{dropped} components that were not in use were dropped from RAM"
        else:
            needed = {s.name: s.host_bytes for s in self.plan.estimate.stages}.get(stage)
            raise DoesNotFit(out_of_ram(self.architecture, stage, failure), needed_bytes=needed)
        self.say_once(f"RAM ran out in stage {stage} ({failure}); {what}, and the run went on.")
        self.callbacks.tell(self.result.warnings)

    def _step_down(self, stage: str, failure: str, *, must: bool) -> None:
        """Free memory and take a smaller plan. Must not be called inside an except block.

        If there is no smaller plan it raises DoesNotFit, or, without ``must``, lets the render go
        on with the same plan.
        """
        # Free first, in this order: only what Python has dropped can be freed, and only what
        # torch's allocator has given back counts as free when the smaller plan is made.
        gc.collect()
        self.cache.release_device()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = self.smaller_plan(self.plan, stage)
        last = smaller is None or self.steps_down >= MAX_STEPS_DOWN
        if last and not must:
            self.bears_spilling = True
            self.say_once(f"In stage {stage} {failure}; there is no smaller way to run this job.")
            return
        if smaller is None or last:
            needed = {s.name: s.device_bytes for s in self.plan.estimate.stages}.get(stage)
            raise DoesNotFit(
                f"Memory ran out in stage {stage} ({failure}), and there is no smaller way to run "
                "this job. Make the clip shorter or smaller, set max_chunk_size, or free memory.",
                needed_bytes=needed,
            )
        self.steps_down += 1
        change = ", ".join(word for word in smaller.applied if word not in self.plan.applied)
        self._take(smaller)
        self.result.warnings.append(
            f"Memory ran out in stage {stage} ({failure}); went on from there with "
            f"{change or 'a smaller plan'}."
        )
        self.callbacks.tell(self.result.warnings)

    def _go_alone(self, lost: NoWorkers) -> None:
        """Go on in this process: no worker is left. Must not be called inside an except block."""
        give_back_workers(self, keep=False)
        self._pool = None
        gc.collect()
        alone = self.plan_alone(self.plan, lost)
        why = f"{lost} This process went on alone, on {alone.device}."
        self._take(replace(alone, reasons=(*alone.reasons, why)))
        self.result.metadata["plan"] = list(self.plan.reasons)
        self.say_once(why)
        self.callbacks.tell(self.result.warnings)

    def _take(self, plan: OptimizationPlan) -> None:
        """Go on with another plan from now on."""
        self.plan = plan
        self.timeline.predict({s.name: s.device_bytes for s in plan.estimate.stages})
        # Steps of another plan take longer, which beside those before would look like a spill.
        self.timeline.step_seconds.clear()
        if self.usual_step is not None:
            self.usual_step = plan.step_seconds
        self.result.applied_optimizations = list(plan.applied)
