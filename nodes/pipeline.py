"""What travels over a WAN_PIPELINE socket, where models are found, and the lease on their weights.

No ComfyUI here. The description is light and immutable; wan_core loads weights on first use and
keeps them in its component cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..wan_core.config import WanLoRA, WanModelFiles
from ..wan_core.errors import InvalidRequest
from .lease import WeightsLease, loaded_bytes

if TYPE_CHECKING:
    from ..wan_core.models import ModelArchitecture

INDEX = "model_index.json"
NOTHING_FOUND = "(no model found)"
_DEPTH = 2  # a folder, or organisation/name as model hubs write it
_DEMO_FOLDER = Path(__file__).resolve().parent.parent / "wan_core" / "demo_model"
_DEMOS = {"WanFit demo (text to video)": "t2v", "WanFit demo (image to video)": "i2v"}


@dataclass(frozen=True, repr=False)
class WanPipeline:
    """A checkpoint and how it shall be run; never changed, only replaced by another."""

    name: str
    path: Path
    architecture: ModelArchitecture
    lease: WeightsLease = field(compare=False)
    options: tuple[tuple[str, Any], ...] = (("offload", "auto"), ("precision", "auto"))
    """Names and values of ``OptimizationConfig`` that WanOptimize set."""
    loras: tuple[WanLoRA, ...] = ()
    use_recipe: bool = False
    """Whether the settings of a distilled LoRA stand for the official ones."""

    def __repr__(self) -> str:  # ComfyUI puts it into every error message
        options = ", ".join(f"{name} {value}" for name, value in self.options)
        options += f", {len(self.loras)} LoRAs" if self.loras else ""
        return f"WanPipeline({self.name!r}, {self.architecture.name}, {options})"

    def optimized(self, **changes: Any) -> WanPipeline:
        """Return a description with other options; it shares the lease on the weights."""
        return replace(self, options=tuple(sorted({**dict(self.options), **changes}.items())))

    def with_lora(self, lora: WanLoRA, use_recipe: bool) -> WanPipeline:
        """Return a description with one LoRA more, checked against the model from its header.

        Raises InvalidRequest, ModelMismatch, UnsupportedModel or a ModelFileError.
        """
        from ..wan_core.detect import with_loras

        return replace(
            self,
            architecture=with_loras(self.architecture, [lora], use_recipe=use_recipe),
            loras=(*self.loras, lora),
            use_recipe=self.use_recipe or use_recipe,
        )

    def optimization_config(self) -> dict[str, Any]:
        """Return the options as ``WanPipelineLoader.load_wan_pipeline`` takes them."""
        return dict(self.options)

    @property
    def latent_channels(self) -> int:
        """Return the channels of its latents: 16, or 48 for TI2V-5B."""
        return self.architecture.transformer.out_channels

    def get_ram_usage(self) -> int:
        """Return the bytes of weights this keeps in memory, for ComfyUI's cache under pressure."""
        return loaded_bytes(self.lease.files)


def list_models(roots: Iterable[Path]) -> list[str]:
    """Return the names of the diffusers folders below ``roots``, then the bundled demo models."""
    names = {
        folder.relative_to(root).as_posix() for root in roots for folder in _model_folders(root)
    }
    return sorted(names, key=str.lower) + [name for name in _DEMOS if _demo(name) is not None]


def find_model(name: str, roots: Sequence[Path], *, field: str = "model") -> Path:
    """Return the folder of the model called ``name``.

    Raises InvalidRequest, naming ``field``, where the folder belongs and what there is.
    """
    demo = _demo(name)
    if demo is not None:
        return demo
    for root in roots:
        for folder in _model_folders(root):
            if folder.relative_to(root).as_posix() == name:
                return folder
    places = ", ".join(str(root) for root in roots) or "models/diffusers"
    there = ", ".join(repr(known) for known in list_models(roots)) or "none"
    raise InvalidRequest(
        f"{field}: there is no model {name!r}. A model is a folder that holds {INDEX}; put it at "
        f"{Path(roots[0] if roots else 'models/diffusers') / name} and press R to refresh, or "
        f"choose another. Searched: {places}. Found: {there}.",
        field=field,
    )


def fingerprint(source: Path | WanModelFiles) -> str:
    """Return a hash of the path, size and mtime of every config and weight file; none is read."""
    if isinstance(source, WanModelFiles):
        named = (getattr(source, name) for name in source.__slots__ if name != "loras")
        paths = sorted(Path(path) for path in named if path is not None)
    else:
        kinds = {".json", ".safetensors", ".gguf", ".model"}
        paths = sorted(path for path in source.rglob("*") if path.suffix in kinds)
    digest = hashlib.sha256(str(source).encode())
    for path in paths:
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _demo(name: str) -> Path | None:
    folder = _DEMO_FOLDER / _DEMOS[name] if name in _DEMOS else None
    return folder if folder is not None and (folder / INDEX).is_file() else None


def _model_folders(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:  # a folder in extra_model_paths.yaml that is not there (any more)
        return
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        folder = Path(entry.path)
        if (folder / INDEX).is_file():
            yield folder
        elif depth > 1:
            yield from _model_folders(folder, depth - 1)
