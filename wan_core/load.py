"""Opening a model: a path in, a pipeline ready to generate out, nothing read but headers.

Weights are read by the first stage that needs them, through the process's component cache.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architecture import ModelArchitecture
from .cache import ComponentCache, component_cache
from .config import WanModelFiles
from .detect import ArchitectureDetector
from .errors import InvalidRequest, MissingFile, UnsupportedModel, WanError
from .lora_choice import with_loras
from .plan import OptimizationConfig, OptimizationManager

if TYPE_CHECKING:
    from .generate import WanPipelineWrapper

_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")


class PipelineManager:
    """Says which diffusers pipeline an architecture belongs to, and builds it where asked.

    WanFit's own loop needs no diffusers pipeline; this is for those who want one.
    """

    def select_pipeline_class(self, architecture: ModelArchitecture, *, image: bool = False) -> str:
        """Return the name of the diffusers pipeline class, from structure, not from the folder.

        ``image=True`` asks for image-to-video where the model does both (TI2V-5B). Raises
        UnsupportedModel where diffusers has none, InvalidRequest for an image with a text model.
        """
        variant = architecture.variant
        if not variant.supported or variant.pipeline_class is None:
            raise UnsupportedModel(f"{variant.title} cannot be run: {variant.why_not}.")
        if image and variant.image_input == "none":
            raise InvalidRequest(f"{variant.title} takes no image.", field="image")
        if image or variant.image_input == "required":
            return "WanImageToVideoPipeline"
        return "WanPipeline"

    def validate_pipeline_args(self, pipeline_class: str, arguments: Mapping[str, Any]) -> None:
        """Check names of components and settings against a pipeline's constructor.

        Raises InvalidRequest naming the class or the argument that is not known.
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

        ``dtype`` ("bf16", "fp16", "fp32") applies to every component; None keeps the files'.
        ``arguments`` replace components or settings. The pipeline is on the CPU.
        """
        import diffusers

        from .component import load_component
        from .precision import dtype_of
        from .schedule import make_scheduler
        from .tokenizer import load_image_processor, load_scheduler_config, load_tokenizer

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
        if name == "WanPipeline":
            parts = {k: v for k, v in parts.items() if not k.startswith("image_")}
        else:
            parts = {"image_encoder": None, "image_processor": None} | parts
        boundary = defaults.boundary if architecture.two_experts else None
        settings = {"boundary_ratio": boundary, "expand_timesteps": variant.expand_timesteps}
        return getattr(diffusers, name)(**(parts | settings | arguments))


class WanPipelineLoader:
    """Opens Wan models. Several loaders share components; ``enable_caching=False`` does not.

    ``optimization_config_path`` is a JSON file with the keys of ``OptimizationConfig``.
    """

    def __init__(
        self, optimization_config_path: str | Path | None = None, enable_caching: bool = True
    ) -> None:
        self._optimization = _read_optimization(optimization_config_path)
        self._caching = enable_caching
        self._cache = component_cache() if enable_caching else ComponentCache()

    def load_wan_pipeline(
        self,
        model_path: str | Path | WanModelFiles,
        trust_remote_code: bool = False,
        apply_optimizations: bool = True,
        optimization_config: Mapping[str, Any] | OptimizationConfig | None = None,
        *,
        loras: Iterable[Any] = (),
        use_recipe: bool = False,
        **pipeline_kwargs: Any,
    ) -> WanPipelineWrapper:
        """Open a model from its headers; weights are read when they are first needed.

        ``model_path`` is a diffusers folder, a file, or a ``WanModelFiles``. Keys of
        ``optimization_config`` and ``pipeline_kwargs`` are those of ``OptimizationConfig``.
        ``loras`` lists ``WanLoRA``, paths or (path, expert, strength), checked from their headers;
        ``use_recipe`` makes the settings of a distilled one (4 steps, no guidance) the defaults.
        ``apply_optimizations=False`` runs everything resident and in the files' precision.
        WanFit never runs code from a model; ``trust_remote_code=True`` is refused rather than
        ignored. Raises a ModelFileError, UnsupportedModel, ModelMismatch or InvalidRequest.
        """
        # Here, not above: generate carries out what load describes, and imports this package.
        from .generate import WanPipelineWrapper

        if trust_remote_code:
            raise InvalidRequest(
                "trust_remote_code is True; WanFit runs no code from models and needs none for "
                "Wan. Leave it False.",
                field="trust_remote_code",
            )
        architecture = ArchitectureDetector().detect_model_architecture(model_path)
        if not architecture.variant.supported:
            raise UnsupportedModel(
                f"{architecture.root} is {architecture.variant.title}, which WanFit cannot run: "
                f"{architecture.variant.why_not}."
            )
        architecture = with_loras(architecture, loras, use_recipe=use_recipe)
        wishes = self._wishes(optimization_config, pipeline_kwargs)
        if not apply_optimizations:
            wishes = dataclasses.replace(wishes, offload="none", precision="stored")
        return WanPipelineWrapper(
            architecture,
            optimization=wishes,
            cache=self._cache,
            keep_components=self._caching,
        )

    def _wishes(
        self, given: Mapping[str, Any] | OptimizationConfig | None, more: Mapping[str, Any]
    ) -> OptimizationConfig:
        if isinstance(given, OptimizationConfig):
            return dataclasses.replace(given, **more)
        return OptimizationConfig.from_mapping({**self._optimization, **(given or {}), **more})

    def preload_pipeline(self, model_path: str | Path | WanModelFiles, **kwargs: Any) -> bool:
        """Read every component of a model into the cache; True if all of them are there.

        Does nothing and returns False where caching is off or the model cannot be opened.
        """
        if not self._caching:
            return False
        try:
            wrapper = self.load_wan_pipeline(model_path, **kwargs)
            wrapper.preload()
        except WanError:
            return False
        return True

    def get_system_info(self) -> dict[str, Any]:
        """Return ``system_resources``, ``optimization_config`` and ``cache_enabled``."""
        resources = OptimizationManager().analyze_system_resources()
        return {
            "system_resources": dataclasses.asdict(resources),
            "optimization_config": dict(self._optimization),
            "cache_enabled": self._caching,
        }

    def clear_cache(self) -> None:
        """Free every cached component and text; renders under way keep theirs until they end."""
        self._cache.clear()


def _read_optimization(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as err:
        raise MissingFile(f"optimization_config_path {path} cannot be read: {err}.") from err
    try:
        mapping = json.loads(text)
        OptimizationConfig.from_mapping(mapping)
    except (ValueError, TypeError) as err:
        raise InvalidRequest(
            f"optimization_config_path {path} is not a JSON object: {err}.",
            field="optimization_config_path",
        ) from err
    return dict(mapping)
