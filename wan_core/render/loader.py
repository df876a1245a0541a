"""Opens a model: from a path to a pipeline that is ready to generate, reading headers only.

Weights are read by the first stage that needs them, through a cache that the process shares.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..config import WanLoRA, WanModelFiles, shown
from ..detect import ArchitectureDetector, lora_list, with_loras
from ..errors import InvalidRequest, MissingFile, UnsupportedModel, WanError
from ..files import decode_text, named_path
from ..job import flag
from ..loading import ComponentCache, component_cache
from ..plan import OptimizationConfig, Planner
from ..preferences import Preferences, read_preferences

if TYPE_CHECKING:
    from .pipeline import WanPipelineWrapper


class WanPipelineLoader:
    """Opens Wan models.

    All loaders of a process share one cache of components. A loader with ``enable_caching=False``
    has a cache of its own and keeps a component only while it is in use.
    ``optimization_config_path`` is a JSON file with keys of ``OptimizationConfig``. What neither it
    nor a call names is as the user prefers: ``preferences``, or None for those of the user's file.
    """

    def __init__(
        self, optimization_config_path: str | Path | None = None, enable_caching: bool = True,
        *, preferences: Preferences | None = None,
    ) -> None:  # fmt: skip
        self._optimization = _read_optimization(optimization_config_path)
        if preferences is not None and not isinstance(preferences, Preferences):
            raise InvalidRequest(
                f"preferences is {shown(preferences)}; a Preferences is needed, or None for those "
                "of the user's file.",
                field="preferences",
            )
        self._preferences = preferences
        self._caching = _yes(enable_caching, "enable_caching", True)
        self._cache = component_cache() if self._caching else ComponentCache()

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

        ``model_path`` is a diffusers folder, a file, or a ``WanModelFiles``. The keys of
        ``optimization_config`` and ``pipeline_kwargs`` are those of ``OptimizationConfig``.
        ``apply_optimizations=False`` keeps everything on the device, in the precision of the files.

        ``loras`` lists ``WanLoRA``, paths, or (path, expert, strength); they are checked from their
        headers. With ``use_recipe`` the settings that a distilled LoRA, or else a distilled
        checkpoint, was trained for (4 steps, no guidance) become the defaults.

        WanFit never runs code from a model: ``trust_remote_code=True`` is refused rather than
        ignored. Raises ModelFileError, UnsupportedModel, ModelMismatch or InvalidRequest.
        """
        # Imported here because it imports torch; opening a model should not wait for that.
        from .pipeline import WanPipelineWrapper

        use_recipe = _yes(use_recipe, "use_recipe", False)
        apply_optimizations = _yes(apply_optimizations, "apply_optimizations", True)
        if _yes(trust_remote_code, "trust_remote_code", False):
            raise InvalidRequest(
                "trust_remote_code is True; WanFit runs no code from models and needs none for "
                "Wan. Leave it False.",
                field="trust_remote_code",
            )
        loras = [_at_home(given) for given in lora_list(loras)]
        architecture = ArchitectureDetector().detect_model_architecture(_at_home(model_path))
        if not architecture.variant.supported:
            raise UnsupportedModel(
                f"{architecture.root} is {architecture.variant.title}, which WanFit cannot run: "
                f"{architecture.variant.why_not}."
            )
        architecture = with_loras(architecture, loras, use_recipe=use_recipe)
        preferences = read_preferences() if self._preferences is None else self._preferences
        named = self._named(optimization_config, pipeline_kwargs)
        optimization = OptimizationConfig.from_mapping(preferences.under(named))
        if not apply_optimizations:
            optimization = dataclasses.replace(optimization, offload="none", precision="stored")
        return WanPipelineWrapper(
            architecture,
            optimization=optimization,
            cache=self._cache,
            keep_components=self._caching,
            preferences=preferences.besides(named),
        )

    def _named(
        self, given: Mapping[str, Any] | OptimizationConfig | None, more: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return what the loader's file and a call ask for; an OptimizationConfig stands alone."""
        if isinstance(given, OptimizationConfig):
            return {**given.to_dict(), **more}
        if given is not None and not isinstance(given, Mapping):
            OptimizationConfig.from_mapping(given)  # says what is needed
        known = [field.name for field in dataclasses.fields(OptimizationConfig)]
        for key in more:
            if key not in known:
                instead = f" Set {_INSTEAD[key]} instead." if key in _INSTEAD else ""
                raise InvalidRequest(
                    f"load_wan_pipeline has no argument {key!r}; besides its own it takes "
                    f"{', '.join(known)}.{instead}",
                    field=key,
                )
        return {**self._optimization, **(given or {}), **more}

    def preload_pipeline(self, model_path: str | Path | WanModelFiles, **kwargs: Any) -> bool:
        """Read every component of a model into the cache; return True if that succeeded.

        Returns False if caching is off or the model cannot be opened or read.
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

    def release_device(self) -> None:
        """Take every cached component off its device, for another process to use; they stay in RAM.

        Components of renders under way are left where they are.
        """
        import torch

        self._cache.release_device()
        torch.cuda.empty_cache()  # does nothing where CUDA was not used

    def clear_cache(self) -> None:
        """Drop every cached component and text. Renders under way keep theirs until they end.

        Workers on other cards end.
        """
        from ..workers import close_workers

        self._cache.clear()
        close_workers()


# What people know from diffusers' ``from_pretrained``, and what says the same here.
_INSTEAD: Final = {"torch_dtype": "precision", "dtype": "precision", "device_map": "device"}


def _yes(value: Any, field: str, usual: bool) -> bool:
    """Return a yes or no; "False", as a form or a config file has it, is neither."""
    return usual if value is None else flag(value, field)


def _at_home(given: Any) -> Any:
    """Return a path, or the files of a model or LoRA, with ``~`` as the user's home folder.

    A shell does that for its own users only.
    """
    if isinstance(given, str | Path):
        return Path(os.path.expanduser(given)) if str(given).startswith("~") else given
    if isinstance(given, list | tuple) and given:
        return (_at_home(given[0]), *given[1:])
    if isinstance(given, WanModelFiles):
        loras = tuple(_at_home(lora) for lora in lora_list(given.loras))
        names = [field.name for field in dataclasses.fields(given) if field.name != "loras"]
        paths = {name: _at_home(getattr(given, name)) for name in names}
        return dataclasses.replace(given, **paths, loras=loras)
    if isinstance(given, WanLoRA):
        return dataclasses.replace(given, path=_at_home(given.path))
    return given


def _read_optimization(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    file = Path(os.path.expanduser(named_path(path, "optimization_config_path")))
    try:
        data = file.read_bytes()
    except (OSError, ValueError) as err:  # ValueError: a character that no path can hold
        why = getattr(err, "strerror", None) or err
        raise MissingFile(f"optimization_config_path {shown(path)} cannot be read: {why}.") from err
    try:
        text = decode_text(data)
    except UnicodeDecodeError as err:
        raise InvalidRequest(
            f"optimization_config_path {path} is not in UTF-8 ({err}). Save it as UTF-8.",
            field="optimization_config_path",
        ) from err
    try:
        mapping = json.loads(text)
        OptimizationConfig.from_mapping(mapping)
    except (ValueError, TypeError, RecursionError) as err:
        raise InvalidRequest(
            f"optimization_config_path {path} is not a JSON object: {err}.",
            field="optimization_config_path",
        ) from err
    return dict(mapping)
