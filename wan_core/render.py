"""The stages of one render, in order: texts, pictures, noise, steps, frames.

Each stage borrows its component from the cache, has it placed as the plan says, and gives it back.
Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import encode
from .architecture import ModelArchitecture
from .cache import ComponentCache, ComponentKey, component_key
from .component import load_component
from .tokenizer import load_image_processor, load_scheduler_config, load_tokenizer
from .config import GenerationConfig, VideoGenerationResult
from .denoise import (
    Conditions,
    DenoiseState,
    Expert,
    Signals,
    denoise_steps,
    hold_first_frame,
)
from .errors import InvalidRequest
from .monitor import MIB, Timeline, device_bytes, device_name, versions
from .offload import block_hooks, place
from .plan import OptimizationPlan
from .precision import dtype_of
from .request import Request
from .schedule import StepPlan, make_scheduler, plan_steps
from .vae import decode_frames, denormalize_latents, to_frames
from .video import VideoWriter
from .windows import WindowPlan, plan_windows

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Callbacks:
    """Calls the job's callbacks and remembers the exception one of them raised."""

    def __init__(self, config: GenerationConfig) -> None:
        self._config = config
        self.raised: BaseException | None = None

    def call(self, function: Callable[..., object] | None, *args: object) -> None:
        if function is None:
            return
        try:
            function(*args)
        except BaseException as err:
            self.raised = err
            raise

    def check(self) -> None:
        self.call(self._config.interrupt_check)


@dataclass(slots=True, kw_only=True)
class Render:
    """One job on its way; ``run`` fills in ``result``. Methods stand in the stages' order."""

    architecture: ModelArchitecture
    cache: ComponentCache
    keep_components: bool
    config: GenerationConfig
    request: Request
    plan: OptimizationPlan
    callbacks: Callbacks
    result: VideoGenerationResult
    timeline: Timeline

    def run(self) -> None:
        """Carry the job out. Raises what goes wrong; the result then holds what was finished."""
        device = self.timeline.device
        self.result.warnings += [*self.architecture.warnings, *self.request.warnings]
        self.result.stages = self.timeline.stages
        self.result.applied_optimizations = list(self.plan.applied)
        before = device_bytes(device)
        try:
            # Weights made under inference_mode could not be used outside it afterwards.
            with torch.inference_mode(False), torch.no_grad():
                self._render(device)
        finally:
            self.result.peak_memory_mb = self.timeline.peak_bytes / MIB
            self.result.memory_used_mb = max(0, device_bytes(device) - before) / MIB

    def _render(self, device: torch.device) -> None:
        self._describe(device)
        conditions = self._conditions(device)
        scheduler, steps = self._scheduler(device)
        latents = self._denoise(device, conditions, scheduler, steps)
        # Safe before decoding: a failing decode must not cost the sampling.
        self.result.latents = latents.to("cpu", torch.float32)
        with self._component("vae") as vae:
            self.result.vae_latents = denormalize_latents(self.result.latents, vae.config)
            if self.config.return_frames or self.request.output_path is not None:
                self._decode(vae, latents, device)

    def _describe(self, device: torch.device) -> None:
        request = self.request
        self.result.metadata |= {
            "model": self.architecture.variant.title,
            "variant": self.architecture.name,
            "seed": request.seed,
            "width": request.width,
            "height": request.height,
            "num_frames": request.wanted_frames,
            "fps": request.fps,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "guidance_scale_2": request.guidance_scale_2,
            "flow_shift": request.flow_shift,
            "scheduler": request.scheduler,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "device": device_name(device),
            "plan": list(self.plan.reasons),
            "versions": versions(),
            "memory_origin": "predicted from headers and shapes; measured "
            + ("by the allocator" if device.type == "cuda" else "as the process's RAM"),
        }

    # -- components ---------------------------------------------------------------------------

    def _key(self, name: str) -> ComponentKey:
        return component_key(self.architecture.components[name], self.plan.dtypes.get(name, ""))

    def _component(self, name: str) -> AbstractContextManager[Any]:
        """Borrow a component from the cache; it is read first if it is not there."""
        part = self.architecture.components[name]
        builders: dict[str, Callable[[], Any]] = {
            "tokenizer": lambda: load_tokenizer(part.path),
            "image_processor": lambda: load_image_processor(part.path),
        }

        def build() -> Any:
            if name in builders:
                return builders[name]()
            self.callbacks.check()
            with self.timeline.stage(f"load {name}") as report:
                report.note = str(self.plan.dtypes[name])
                return load_component(
                    part.path, dtype_of(self.plan.dtypes[name]), kind=part.kind.removesuffix("_2")
                )

        key = self._key(name)
        return self.cache.borrow(key, part.nbytes, build, keep=self.keep_components)

    @contextmanager
    def _placed(self, name: str, device: torch.device) -> Iterator[Any]:
        """Borrow a component and have it compute on the device as the plan says."""
        with self._component(name) as module, place(module, self.plan.offload, device):
            yield module

    # -- stages -------------------------------------------------------------------------------

    def _conditions(self, device: torch.device) -> Conditions:
        config, batch = self.config, self.request.batch_size
        dtype = dtype_of(self.plan.dtypes["transformer"])
        prompt, negative = self._texts(device)

        def to_model(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else _rows(tensor, batch).to(device, dtype)

        pictures = {
            field: encode.load_picture(value, field)
            for field in ("image", "last_image")
            if (value := getattr(config, field)) is not None
        }
        self._warn_stretched(pictures)
        image_embeds = concat = first_frame = None
        if pictures:
            image_embeds = self._clip(pictures, device)
            concat, first_frame = self._start_latents(pictures, device)
        embeds = to_model(prompt)
        assert embeds is not None
        return Conditions(
            prompt_embeds=embeds,
            negative_prompt_embeds=to_model(negative),
            # CLIP rows go pairwise (first, last) per sample: the whole block is repeated.
            image_embeds=None
            if image_embeds is None
            else image_embeds.repeat(batch, 1, 1).to(device, dtype),
            concat=None if concat is None else _rows(concat, batch),
            first_frame=first_frame,
        )

    def _texts(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return positive and negative embeddings; each distinct text is encoded once."""
        config, request = self.config, self.request
        given = {"prompt": config.prompt_embeds, "negative_prompt": config.negative_prompt_embeds}
        wanted = ["prompt"] + ["negative_prompt"] * request.guided
        width = self.architecture.transformer.text_dim
        found: dict[str, Tensor] = {}
        missing: list[str] = []
        for name in wanted:
            value = given[name]
            if value is None:
                missing.append(name)
            else:
                found[name] = encode.check_embeds(
                    value, f"{name}_embeds", width, request.batch_size
                )
        if missing:
            texts = [getattr(request, name) for name in missing]
            found |= zip(missing, self._encode_texts(texts, device), strict=True)
        return found["prompt"], found.get("negative_prompt")

    def _encode_texts(self, texts: list[str], device: torch.device) -> list[Tensor]:
        if "text_encoder" not in self.architecture.components:
            raise InvalidRequest(
                "prompt needs a text encoder, and this model was loaded without one. Add the "
                "umT5 file, or pass prompt_embeds.",
                field="prompt",
            )
        cache = self.cache
        keys = [(self._key("text_encoder"), self._key("tokenizer"), text) for text in texts]
        if all(cache.has_text(key) for key in keys):
            return [cache.text(key, lambda: None) for key in keys]
        with ExitStack() as stack:
            tokenizer = stack.enter_context(self._component("tokenizer"))
            encoder = stack.enter_context(self._component("text_encoder"))
            stack.enter_context(self.timeline.stage("text_encode"))
            stack.enter_context(place(encoder, self.plan.offload, device))
            found = []
            for key, text in zip(keys, texts, strict=True):
                self.callbacks.check()
                found.append(
                    cache.text(
                        key,
                        lambda text=text: encode.encode_text(
                            encoder, tokenizer, text, device
                        ).cpu(),
                    )
                )
        return found

    def _warn_stretched(self, pictures: dict[str, Any]) -> None:
        target = self.request.width / self.request.height
        for field, picture in pictures.items():
            width, height = encode.picture_size(picture)
            if abs(width / height / target - 1) > 0.02:
                self.result.warnings.append(
                    f"{field} is {width}x{height} and is stretched to "
                    f"{self.request.width}x{self.request.height}; crop it to keep its proportions."
                )

    def _clip(self, pictures: dict[str, Any], device: torch.device) -> Tensor | None:
        """Return CLIP embeddings for the models that have an image branch."""
        if self.architecture.transformer.image_dim is None:
            return None
        with ExitStack() as stack:
            processor = stack.enter_context(self._component("image_processor"))
            encoder = stack.enter_context(self._component("image_encoder"))
            stack.enter_context(self.timeline.stage("image_encode"))
            stack.enter_context(place(encoder, self.plan.offload, device))
            self.callbacks.check()
            images = [encode.to_pil(picture) for picture in pictures.values()]
            return encode.encode_clip(encoder, processor, images, device)

    def _start_latents(
        self, pictures: dict[str, Any], device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (concat, first_frame): the form in which this family takes its start image."""
        request = self.request
        ready = {
            field: encode.prepare_picture(picture, request.width, request.height)
            for field, picture in pictures.items()
        }
        with (
            self._component("vae") as vae,
            self.timeline.stage("condition_encode"),
            place(vae, self.plan.offload, device),
        ):
            if self.architecture.variant.expand_timesteps:
                first = encode.encode_first_frame(
                    vae, ready["image"], device=device, check=self._tick
                )
                return None, first
            concat = encode.encode_condition(
                vae,
                ready["image"],
                num_frames=request.num_frames,
                last_image=ready.get("last_image"),
                device=device,
                check=self._tick,
            )
            return concat, None

    def _scheduler(self, device: torch.device) -> tuple[Any, StepPlan]:
        request = self.request
        saved = self.architecture.components.get("scheduler")
        config = load_scheduler_config(saved.path) if saved is not None else None
        scheduler = make_scheduler(request.scheduler, request.flow_shift, config)
        scheduler.set_timesteps(request.num_inference_steps, device=device)
        steps = plan_steps(
            [float(t) for t in scheduler.timesteps],
            experts=2 if self.architecture.two_experts else 1,
            boundary=request.boundary,
            switch_step=request.switch_step,
            start_step=request.start_step,
            end_step=request.end_step,
        )
        scheduler.set_begin_index(steps.start)
        self.result.metadata["steps"] = steps.describe()
        return scheduler, steps

    def _noise(self, device: torch.device) -> Tensor:
        """Draw the noise on the CPU, so that it is the same for every device."""
        request = self.request
        vae = self.architecture.vae or self.architecture.variant.vae
        shape = (
            request.batch_size,
            vae.z_dim,
            request.latent_frames,
            request.height // vae.scale_factor_spatial,
            request.width // vae.scale_factor_spatial,
        )
        if self.config.latents is not None:
            given = tuple(self.config.latents.shape)
            if given != shape:
                raise InvalidRequest(
                    f"latents have shape {given}; this job needs {shape} (batch, channels, "
                    "latent frames, height / scale, width / scale).",
                    field="latents",
                )
            return self.config.latents.to(device=device, dtype=torch.float32)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)

    def _windows(self) -> WindowPlan | None:
        request, plan = self.request, self.plan
        if plan.window_frames is None:
            return None
        windows = plan_windows(
            request.latent_frames,
            window=plan.window_frames,
            overlap=plan.window_overlap,
            schedule=request.window_schedule,
            fusion=request.window_fusion,
        )
        self.result.metadata["windows"] = windows.describe()
        return windows

    def _denoise(
        self, device: torch.device, conditions: Conditions, scheduler: Any, steps: StepPlan
    ) -> Tensor:
        state = DenoiseState(latents=self._noise(device), next_step=steps.start)
        windows = self._windows()
        signals = self._signals(steps)
        request = self.request
        single = not self.architecture.two_experts
        passes = (
            ("only" if single else "high", "transformer", steps.high, request.guidance_scale),
            ("low", "transformer_2", steps.low, request.guidance_scale_2),
        )
        for name, component, wanted, scale in passes:
            if not wanted:
                continue
            with ExitStack() as stack:
                model = stack.enter_context(self._component(component))
                stage = "denoise" if single else f"denoise_{name}"
                stack.enter_context(self.timeline.stage(stage))
                stack.enter_context(place(model, self.plan.offload, device))
                stack.enter_context(block_hooks(model, self._tick))
                expert = Expert(
                    name=name,
                    model=model,
                    dtype=dtype_of(self.plan.dtypes[component]),
                    guidance_scale=scale,
                )
                denoise_steps(
                    state, wanted, expert, scheduler, conditions, windows=windows, signals=signals
                )
        return hold_first_frame(state.latents, conditions)

    def _tick(self) -> None:
        """Between blocks: look for an interrupt, and at the memory."""
        self.callbacks.check()
        self.timeline.sample()

    def _signals(self, steps: StepPlan) -> Signals:
        total = steps.end - steps.start
        config, call = self.config, self.callbacks.call

        def step(index: int, latents: Tensor) -> None:
            call(config.progress_callback, index - steps.start + 1, total, latents)

        def preview(index: int, clean: Tensor) -> None:
            call(config.preview_callback, index - steps.start + 1, total, clean)

        return Signals(
            step=step,
            preview=None if config.preview_callback is None else preview,
            window=lambda index, count: call(config.chunk_callback, index, count),
            check=self.callbacks.check,
        )

    def _decode(self, vae: Any, latents: Tensor, device: torch.device) -> None:
        """Decode frame group by frame group into the result's tensor, the mp4, or both."""
        request = self.request
        wanted, batch = request.wanted_frames, request.batch_size
        frames = None
        if self.config.return_frames:
            frames = torch.empty(
                (batch, wanted, request.height, request.width, 3), dtype=torch.float32
            )
        with ExitStack() as stack:
            stack.enter_context(self.timeline.stage("decode"))
            writers = [
                stack.enter_context(self._writer(path)) for path in self._output_paths(batch)
            ]
            stack.enter_context(place(vae, self.plan.offload, device))
            # In the VAE's dtype, as diffusers' pipelines do it.
            ready = denormalize_latents(latents.to(device, vae.dtype), vae.config)
            done = 0
            for chunk in decode_frames(vae, ready, check=self._tick):
                pictures = to_frames(chunk)[:, : wanted - done]
                for index, writer in enumerate(writers):
                    writer.write(pictures[index])
                if frames is not None:
                    frames[:, done : done + pictures.shape[1]] = pictures
                done += pictures.shape[1]
        if frames is not None:
            self.result.frames = frames.flatten(0, 1)
        self.result.output_path = request.output_path

    def _output_paths(self, batch: int) -> list[Path]:
        """Name one mp4 per clip of the batch: name.mp4, name_2.mp4, ..."""
        path = self.request.output_path
        if path is None:
            return []
        return [path] + [
            path.with_name(f"{path.stem}_{n}{path.suffix}") for n in range(2, batch + 1)
        ]

    def _writer(self, path: Path) -> VideoWriter:
        return VideoWriter(
            path,
            fps=self.request.fps,
            width=self.request.width,
            height=self.request.height,
            metadata=self.config.output_metadata,
        )


def _rows(tensor: Tensor, batch: int) -> Tensor:
    """Repeat a single row for every sample of the batch."""
    return tensor if tensor.shape[0] == batch else tensor.repeat(batch, *[1] * (tensor.ndim - 1))
