"""Opening a model: a path in, a pipeline ready to generate out, nothing read but headers.

Weights are read by the first stage that needs them, through the process's component cache.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import WanModelFiles
from ..detect import ArchitectureDetector, with_loras
from ..errors import InvalidRequest, MissingFile, UnsupportedModel, WanError
from ..loading import ComponentCache, component_cache
from ..plan import OptimizationConfig, Planner

if TYPE_CHECKING:
    from .pipeline import WanPipelineWrapper


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
        from .pipeline import WanPipelineWrapper

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
        optimization = self._optimization_for(optimization_config, pipeline_kwargs)
        if not apply_optimizations:
            optimization = dataclasses.replace(optimization, offload="none", precision="stored")
        return WanPipelineWrapper(
            architecture,
            optimization=optimization,
            cache=self._cache,
            keep_components=self._caching,
        )

    def _optimization_for(
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
        resources = Planner().analyze_system_resources()
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
