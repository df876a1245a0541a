"""Builds a diffusers pipeline from any model that WanFit opens; says where diffusers is broken."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import WanModelFiles
from ..detect import ArchitectureDetector
from ..errors import InvalidRequest, MissingDependency, UnsupportedModel, first_line
from ..models import ModelArchitecture

_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")


class PipelineManager:
    """Says which diffusers pipeline class an architecture belongs to, and builds it.

    WanFit's own denoising loop does not use diffusers' pipelines; this is for code that does.
    """

    def select_pipeline_class(self, architecture: ModelArchitecture, *, image: bool = False) -> str:
        """Return the name of the diffusers pipeline class that runs this architecture.

        It follows from the model's structure, not from what its folder states. ``image=True`` asks
        for image-to-video where the model does both (TI2V-5B). Raises UnsupportedModel where
        diffusers has no pipeline, InvalidRequest for an image with a text-to-video model.
        """
        variant = architecture.variant
        if not variant.supported or variant.pipeline_class is None:
            raise UnsupportedModel(f"{variant.title} cannot be run: {variant.why_not}.")
        if architecture.transformer.vace_in_channels is not None:
            return "WanVACEPipeline"
        if image and variant.image_input == "none":
            raise InvalidRequest(f"{variant.title} takes no image.", field="image")
        if image or variant.image_input == "required":
            return "WanImageToVideoPipeline"
        return "WanPipeline"

    def validate_pipeline_args(self, pipeline_class: str, arguments: Mapping[str, Any]) -> None:
        """Check the names of ``arguments`` against the pipeline's constructor.

        Raises InvalidRequest, naming the pipeline class or the argument that is unknown.
        """
        import inspect

        if pipeline_class not in _PIPELINES:
            raise InvalidRequest(
                f"pipeline_class is {pipeline_class!r}; allowed are {', '.join(_PIPELINES)}.",
                field="pipeline_class",
            )
        import diffusers

        known = inspect.signature(getattr(diffusers, pipeline_class).__init__).parameters
        for name in arguments:
            if name not in known or name == "self":
                raise InvalidRequest(
                    f"{name} is no argument of {pipeline_class}; it takes "
                    f"{', '.join(n for n in known if n != 'self')}.",
                    field=name,
                )

    def load_custom_pipeline(
        self,
        model_path: str | Path | WanModelFiles,
        pipeline_class: str | None = None,
        *,
        dtype: str | None = None,
        **arguments: Any,
    ) -> Any:
        """Build a diffusers pipeline from a model, with WanFit's loader.

        ``dtype`` ("bf16", "fp16", "fp32") applies to every component; None keeps those of the
        files. ``arguments`` replace components or settings. The pipeline is on the CPU.
        """
        import diffusers

        from ..job import make_scheduler
        from ..loading import (
            dtype_of,
            load_component,
            load_image_processor,
            load_scheduler_config,
            load_tokenizer,
        )

        architecture = ArchitectureDetector().detect_model_architecture(model_path)
        name = pipeline_class or self.select_pipeline_class(architecture)
        self.validate_pipeline_args(name, arguments)
        variant, defaults = architecture.variant, architecture.variant.defaults
        torch_dtype = None if dtype is None else dtype_of(dtype)
        parts: dict[str, Any] = {"transformer_2": None}
        for part, component in architecture.components.items():
            if part == "tokenizer":
                parts[part] = load_tokenizer(component.path)
            elif part == "image_processor":
                parts[part] = load_image_processor(component.path)
            elif part == "scheduler":
                saved = load_scheduler_config(component.path)
                parts[part] = make_scheduler("unipc", defaults.flow_shift, saved)
            else:
                parts[part] = load_component(
                    component.path, torch_dtype, kind=component.kind.removesuffix("_2")
                )
        parts.setdefault("scheduler", make_scheduler("unipc", defaults.flow_shift))
        if name != "WanImageToVideoPipeline":
            parts = {k: v for k, v in parts.items() if not k.startswith("image_")}
        else:
            parts = {"image_encoder": None, "image_processor": None} | parts
        boundary = defaults.boundary if architecture.two_experts else None
        settings = {"boundary_ratio": boundary}
        if name != "WanVACEPipeline":
            settings["expand_timesteps"] = variant.expand_timesteps
        return getattr(diffusers, name)(**(parts | settings | arguments))


def check_diffusers() -> None:
    """Raise MissingDependency if diffusers cannot be imported, before any weight is read.

    Planning does without it. An import may also fail because another package is too new for it.
    """
    try:
        from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401
        from diffusers.pipelines.wan import pipeline_wan  # noqa: F401
    except (ImportError, AttributeError, RuntimeError) as err:
        advice = (
            "Install diffusers 0.35 or newer and a transformers that it works with: pip install -U "
            "diffusers transformers."
        )
        if sys.flags.optimize > 1:
            advice = (
                "Python runs without docstrings (-OO or PYTHONOPTIMIZE=2), which transformers "
                "reads: start it without that."
            )
        cause: BaseException = err  # diffusers' own text says no more than "look up"
        while cause.__cause__ is not None:
            cause = cause.__cause__
        name = (getattr(cause, "name", None) or "").partition(".")[0]
        if isinstance(cause, ModuleNotFoundError) and name not in ("diffusers", "transformers", ""):
            advice = "Install what WanFit needs: pip install -r requirements.txt."
        raise MissingDependency(
            f"diffusers cannot be imported ({first_line(cause)}). {advice}"
        ) from err
