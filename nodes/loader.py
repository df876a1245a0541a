"""WanLoader and WanOptimize: which model is run, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..wan_core.config import GIB, PRECISIONS, SPEEDS, WanModelFiles
from ..wan_core.errors import MissingFile, WanError
from ..wan_core.plan import FORWARDS, FP8, OFFLOADS, STEP_CACHES
from ..wan_core.preferences import read_preferences
from . import bridge
from .files import (
    AUTO,
    MODULES,
    NONE,
    PARTS,
    fingerprint_of_all,
    model_source,
    require_model,
    unused_parts,
)
from .inputs import Pipeline, pipeline_input
from .job import optimization_options
from .lease import lease_for
from .pipeline import (
    NOTHING_FOUND,
    WanPipeline,
    fingerprint,
    list_models,
    require_pipeline,
)
from .wired import Node, sampler_after
from .words import in_words_of_the_nodes, said_in_words_of_the_nodes

if TYPE_CHECKING:
    from ..wan_core.models import ModelArchitecture


class WanLoader(io.ComfyNode):  # type: ignore[misc]
    """Recognises a diffusers folder or single files by their headers; loads no weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        models, files = list_models(bridge.model_roots()), bridge.model_files()
        return io.Schema(
            node_id="WanLoader",
            display_name="Wan Loader",
            category="WanFit",
            description="Opens any Wan 2.1 or 2.2 model and recognises what it is. Weights are "
            "read when they are needed, not here.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[*models, *files["transformer"]] or [NOTHING_FOUND],
                    tooltip="A folder below models/diffusers that holds model_index.json, or a "
                    "file of models/diffusion_models (the only or the high-noise model) or of "
                    "models/checkpoints (all in one).",
                ),
                *_part_inputs(files),
                io.Boolean.Input(
                    "use_recipe",
                    default=False,
                    optional=True,
                    tooltip="For a model distilled to a few steps (lightx2v, TurboWan, FastWan): "
                    "its settings stand for the official ones, that is, wherever a sampler's input "
                    "is 0 or its first choice. The node says whether it is such a model.",
                ),
                *_module_inputs(files),
            ],
            outputs=[
                Pipeline.Output(
                    "pipeline",
                    display_name="pipeline",
                    tooltip="The model, for WanOptimize, WanEstimateMemory and the samplers.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        """Return True, or that a saved workflow names a model that does not exist.

        None stands for an input that another node provides, whose value is not known yet. Only this
        input is looked at: ComfyUI repeats the answer for every input that is asked for.
        """
        try:
            if model is not None:
                require_model(model, bridge.folders())
        except WanError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, model: str | None = None, use_recipe: bool = False, **parts: str | None
    ) -> str:
        """Return a hash that changes when a file of the model is changed or replaced.

        None stands for a name that another node gives.
        """
        if model is None or None in parts.values():
            return fingerprint_of_all({"model": model, **parts}, bridge.folders())
        try:
            source, _ = _source(model, parts)
            return fingerprint(source)
        except (WanError, OSError):
            return f"absent: {model} {sorted(parts.items())}"  # execute raises the reason

    @classmethod
    def execute(cls, model: str, use_recipe: bool = False, **parts: str) -> io.NodeOutput:
        from ..wan_core.detect import ArchitectureDetector

        source, found = _source(model, parts)
        architecture = ArchitectureDetector().detect_model_architecture(source)
        if architecture.incomplete:
            raise MissingFile(architecture.incomplete)
        named = source if isinstance(source, WanModelFiles) else None
        path = Path(source.transformer) if named else architecture.root
        pipeline = WanPipeline(model, path, architecture, lease_for(architecture, named))
        if use_recipe:
            pipeline = pipeline.with_recipe()
        unused = unused_parts(model, parts, bridge.folders())
        text = in_words_of_the_nodes(_describe(pipeline, found, unused))
        return io.NodeOutput(pipeline, ui=ui.PreviewText(text))


def _part_inputs(files: dict[str, dict[str, Path]]) -> list[io.Input]:
    """Return one choice per further component, for a model made of single files."""
    return [
        io.Combo.Input(
            name,
            options=[AUTO, NONE, *files[part]],
            default=AUTO,
            optional=True,  # so that prompts saved as API format before these existed still run
            tooltip=f"{what} auto: found among the files there, and said which. Not used where "
            "'model' is a folder.",
        )
        for name, (part, what) in PARTS.items()
    ]


def _module_inputs(files: dict[str, dict[str, Path]]) -> list[io.Input]:
    """Return the choices of a VACE module that is published without its base model."""
    return [
        io.Combo.Input(
            name,
            options=[NONE, *files["transformer"]],
            default=NONE,
            optional=True,
            tooltip=f"A VACE module published without its base model, for the transformer {whose}. "
            "Whole VACE checkpoints need none.",
            **bridge.known(io.Combo.Input, advanced=True),
        )
        for name, (_, whose) in MODULES.items()
    ]


def _source(model: str, chosen: Mapping[str, Any]) -> tuple[Path | WanModelFiles, tuple[str, ...]]:
    return model_source(model, chosen, bridge.folders())


class WanOptimize(io.ComfyNode):  # type: ignore[misc]
    """Returns a new WAN_PIPELINE with other options; the one it is given stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanOptimize",
            display_name="Wan Optimize",
            category="WanFit",
            description="How the model shall be run: precision and where its weights wait. "
            "'auto' fits it to this machine.",
            inputs=[
                pipeline_input(),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="Number format of the weights and the arithmetic. auto: bf16 where the "
                    "card has it, else fp16 or fp32. It changes the picture slightly.",
                ),
                io.Combo.Input(
                    "offload",
                    options=list(OFFLOADS),
                    default="auto",
                    tooltip="none: everything stays on the card, fastest. model: one component at "
                    "a time. stream: the model block by block, ahead of time. sequential: one "
                    "layer at a time, slow, needs least. group: by diffusers' own hooks. The "
                    "result is the same.",
                ),
                *_limit_inputs(),
                *_expert_inputs(),
                *_speed_inputs(),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            outputs=[
                Pipeline.Output(
                    "optimized", display_name="pipeline", tooltip="The same model, run this way."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        pipeline: WanPipeline,
        precision: str,
        offload: str,
        vram_limit_gb: float = 0.0,
        ram_limit_gb: float = 0.0,
        fallback_window_frames: int = 0,
        resident_blocks: int = -1,
        forward: str = "auto",
        fp8_storage: str = "auto",
        speed: str | None = None,
        step_cache: str = "auto",
        step_cache_threshold: float = -1.0,
        guidance_gate: float = 0.0,
        step_cache_factor: float = 0.0,
    ) -> io.NodeOutput:
        asked = {
            "precision": precision, "offload": offload, "vram_limit_gb": vram_limit_gb,
            "ram_limit_gb": ram_limit_gb, "fallback_window_frames": fallback_window_frames,
            "resident_blocks": resident_blocks, "forward": forward, "fp8_storage": fp8_storage,
            "speed": speed, "step_cache": step_cache, "step_cache_threshold": step_cache_threshold,
            "guidance_gate": guidance_gate, "step_cache_factor": step_cache_factor,
        }  # fmt: skip
        optimized = require_pipeline(pipeline).optimized(**optimization_options(asked))
        return io.NodeOutput(optimized, ui=ui.PreviewText(_plan_of(optimized, cls.hidden)))


def _limit_inputs() -> list[io.Input]:
    """Return the memory limits and the window to fall back to; 0 leaves each to the plan."""
    return [
        io.Float.Input(
            "vram_limit_gb",
            default=0.0,
            optional=True,
            min=0.0,
            max=1024.0,
            step=0.5,
            tooltip="Use at most so much of the card's memory, in GiB. 0 = as preferred, else "
            "what is free.",
            **bridge.known(io.Float.Input, advanced=True),
        ),
        io.Float.Input(
            "ram_limit_gb",
            default=0.0,
            optional=True,
            min=0.0,
            max=4096.0,
            step=1.0,
            tooltip="Use at most so much RAM, in GiB. 0 = as preferred, else what is available.",
            **bridge.known(io.Float.Input, advanced=True),
        ),
        io.Int.Input(
            "fallback_window_frames",
            default=0,
            optional=True,
            min=-1,
            max=4097,
            tooltip="If the clip does not fit as a whole, it may be made in windows of so many "
            "frames; that changes the result. 0 = of the model's own length, for clips that are "
            "longer; -1 = never.",
            **bridge.known(io.Int.Input, advanced=True),
        ),
    ]


def _expert_inputs() -> list[io.Input]:
    """Return the choices that the plan makes by itself unless they are set here."""
    return [
        io.Int.Input(
            "resident_blocks",
            default=-1,
            optional=True,
            min=-1,
            max=200,
            tooltip="Stream the model, and keep so many of its blocks on the card. -1 = computed.",
            **bridge.known(io.Int.Input, advanced=True),
        ),
        io.Combo.Input(
            "forward",
            options=list(FORWARDS),
            default="auto",
            optional=True,
            tooltip="Whose code computes. diffusers: its own. lean: less memory, the same result. "
            "lean_rows: still less, the result differs by rounding.",
            **bridge.known(io.Combo.Input, advanced=True),
        ),
        io.Combo.Input(
            "fp8_storage",
            options=list(FP8),
            default="auto",
            optional=True,
            tooltip="Keep the model's matrices in fp8: half the memory and traffic, a slightly "
            "different result. auto: only where nothing larger fits.",
            **bridge.known(io.Combo.Input, advanced=True),
        ),
    ]


def _speed_inputs() -> list[io.Input]:
    """Return what may be changed to be faster."""
    return [
        io.Combo.Input(
            "speed",
            options=list(SPEEDS),
            default=read_preferences().speed or SPEEDS[0],
            optional=True,
            tooltip="exact: only what changes no bit. fast: also what changes rounding. fastest: "
            "also what changes the video a little. The plan below says what that is here.",
        ),
        io.Combo.Input(
            "step_cache",
            options=list(STEP_CACHES),
            default="auto",
            optional=True,
            tooltip="easycache: steps that differ little from the one before are not computed. "
            "magcache: those that its published curve of the model says. auto: easycache with "
            "speed 'fastest'. Not with 8 steps or fewer.",
            **bridge.known(io.Combo.Input, advanced=True),
        ),
        io.Float.Input(
            "step_cache_threshold",
            default=-1.0,
            optional=True,
            min=-1.0,
            max=1.0,
            step=0.005,
            tooltip="How much may add up before a step is computed again: 0 nothing, 0.05 usual, "
            "0.2 very fast. -1 = usual.",
            **bridge.known(io.Float.Input, advanced=True),
        ),
        io.Float.Input(
            "guidance_gate",
            default=0.0,
            optional=True,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Share of the steps that compute guidance's second pass; later ones take over "
            "its last effect. 1 = all. 0 = all, or 0.5 with speed 'fastest'.",
            **bridge.known(io.Float.Input, advanced=True),
        ),
        io.Float.Input(
            "step_cache_factor",
            default=0.0,
            optional=True,
            min=0.0,
            max=4.0,
            step=0.1,
            tooltip="How many times rarer magcache shall compute the model's blocks. 0 = 1.5.",
            **bridge.known(io.Float.Input, advanced=True),
        ),
    ]


def _plan_of(pipeline: WanPipeline, hidden: Any) -> str:
    """Say how the clip of the sampler that follows would be run, and why.

    Without one that can be read, it is a clip of the model's official size.
    """
    from .live import config_of

    prompt, node = getattr(hidden, "prompt", None), getattr(hidden, "unique_id", None)
    sampler = None if prompt is None else sampler_after(prompt, str(node))
    here = Node("", "WanOptimize", {}) if sampler is None else sampler
    config = config_of(here, pipeline.architecture)
    with said_in_words_of_the_nodes():
        estimate = bridge.wrapper(pipeline).estimate_memory_usage(config)
    title = f"For {config.width}x{config.height}, {config.num_frames} frames"
    title += " (the model's usual clip):" if sampler is None else f" (node {sampler.id}):"
    lines = [f"! {text}" for text in estimate.warnings] + [title]
    # Without a plan there are no reasons, but a warning that says why nothing fits.
    lines += [f"- {text}" for text in estimate.reasons]
    return in_words_of_the_nodes("\n".join(lines))


def _stored(architecture: ModelArchitecture) -> list[str]:
    """Name how the weights of each large part are stored, and what is computed in."""
    from ..wan_core.models import experts_of
    from ..wan_core.plan import computed_in

    parts: dict[str, list[str]] = {}
    for name in (*experts_of(architecture), "text_encoder"):
        part = architecture.components.get(name)
        if part is not None and part.stored_as:
            kind = f"stored as {part.stored_as}, {computed_in(architecture, name)}"
            parts.setdefault(kind, []).append(name.replace("_", " "))
    return [f"{_and(names)}: {kind}" for kind, names in parts.items()]


def _and(names: list[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _describe(pipeline: WanPipeline, found: tuple[str, ...], unused: list[str]) -> str:
    """Say what was recognised and why, offer a recipe, and list the warnings."""
    architecture = pipeline.architecture
    size = sum(part.nbytes for part in architecture.components.values()) / GIB
    lines = [f"{architecture.variant.title}, {architecture.weight_kind}, {size:.2f} GiB on disk"]
    lines += [f"! {warning}" for warning in (*unused, *architecture.warnings)]
    lines += [f"- {text}" for text in _stored(architecture)]
    lines += [f"- {reason}" for reason in (*found, *architecture.reasons)]
    if architecture.recipe is not None and not pipeline.use_recipe:
        lines.append(
            "! These settings are not used: a sampler's 0 stands for the model's official ones. "
            "Switch use_recipe on to have them used."
        )
    return "\n".join(lines)
