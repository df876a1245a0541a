"""What a WAN_PIPELINE socket carries, and where models are found. Does not import ComfyUI.

A ``WanPipeline`` is small and immutable: a description of a model and a lease on its weights.
wan_core loads the weights on first use and keeps them in its component cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..wan_core.config import WanLoRA, WanModelFiles, demo_model
from ..wan_core.errors import InvalidRequest
from .lease import WeightsLease, loaded_bytes

if TYPE_CHECKING:
    from ..wan_core.models import ModelArchitecture, VaeShape

INDEX = "model_index.json"
_INDEXES = (INDEX, f"modular_{INDEX}")
NOTHING_FOUND = "(no model found)"
_DEPTH = 2  # a model is a folder "name", or "organisation/name" as on model hubs
_DEMOS = {
    "WanFit demo (text to video)": "t2v",
    "WanFit demo (image to video)": "i2v",
    "WanFit demo (VACE)": "vace",
    "WanFit demo (Fun Control)": "fun",
}


@dataclass(frozen=True, repr=False)
class WanPipeline:
    """A checkpoint and the options to run it with; immutable, methods return a new one."""

    name: str
    path: Path
    architecture: ModelArchitecture
    lease: WeightsLease = field(compare=False)
    options: tuple[tuple[str, Any], ...] = (("offload", "auto"), ("precision", "auto"))
    """Fields of ``OptimizationConfig`` that were set, with their values."""
    loras: tuple[WanLoRA, ...] = ()
    use_recipe: bool = False
    """Whether settings of a distilled LoRA or checkpoint replace the official ones as defaults."""

    def __repr__(self) -> str:  # short, because ComfyUI puts it into every error message
        options = ", ".join(f"{name} {value}" for name, value in self.options)
        options += f", {len(self.loras)} LoRAs" if self.loras else ""
        return f"WanPipeline({self.name!r}, {self.architecture.name}, {options})"

    def optimized(self, **changes: Any) -> WanPipeline:
        """Return a description with other options; it shares the lease on the weights."""
        return replace(self, options=tuple(sorted({**dict(self.options), **changes}.items())))

    def with_lora(self, lora: WanLoRA, use_recipe: bool) -> WanPipeline:
        """Return a description with one more LoRA, whose header is checked against the model.

        Raises InvalidRequest, ModelMismatch, UnsupportedModel or a ModelFileError.
        """
        return self._with([lora], self.use_recipe or use_recipe)

    def with_recipe(self) -> WanPipeline:
        """Return a description whose official settings are those of the distilled checkpoint.

        Raises InvalidRequest if nothing says that it is one.
        """
        return self._with([], True)

    def _with(self, loras: list[WanLoRA], use_recipe: bool) -> WanPipeline:
        from ..wan_core.detect import with_loras

        return replace(
            self,
            # By the same rule as the lease opens the model: which recipe counts, if there are two.
            architecture=with_loras(self.architecture, loras, use_recipe=use_recipe),
            loras=(*self.loras, *loras),
            use_recipe=use_recipe,
        )

    def optimization_config(self) -> dict[str, Any]:
        """Return the options as ``WanPipelineLoader.load_wan_pipeline`` takes them."""
        return dict(self.options)

    @property
    def vae(self) -> VaeShape:
        """Return the VAE whose latents it makes."""
        return self.architecture.vae_shape

    def get_ram_usage(self) -> int:
        """Return the bytes of weights that this keeps in memory.

        ComfyUI's cache calls it to decide what to drop when RAM runs short.
        """
        return loaded_bytes(self.lease.files)


def require_pipeline(given: object) -> WanPipeline:
    """Return what came in at ``pipeline``; a node of any type may give something else."""
    if isinstance(given, WanPipeline):
        return given
    raise InvalidRequest(
        f"pipeline is {str(given)[:60]!r}; a model from a Wan Loader is needed. Connect one.",
        field="pipeline",
    )


def list_models(roots: Iterable[Path]) -> list[str]:
    """Return the names of the diffusers folders below ``roots``, then the bundled demo models."""
    names = {
        folder.relative_to(root).as_posix() for root in roots for folder in _model_folders(root)
    }
    return sorted(names, key=str.lower) + [name for name in _DEMOS if _demo(name) is not None]


def find_model(name: str, roots: Sequence[Path]) -> Path | WanModelFiles:
    """Return the folder of the model called ``name``; of a demo in several places, its files.

    Raises InvalidRequest that says where the folder belongs and which models exist.
    """
    demo = _demo(name)
    if demo is not None:
        return demo
    for wanted in dict.fromkeys((name, portable(name))):
        for root in roots:
            for folder in _model_folders(root):
                if folder.relative_to(root).as_posix() == wanted:
                    return folder
    places = ", ".join(str(root) for root in roots) or "models/diffusers"
    there = ", ".join(repr(known) for known in list_models(roots)) or "none"
    raise InvalidRequest(
        f"model: there is no model {name!r}. A model is a folder that holds {INDEX}; put it at "
        f"{Path(roots[0] if roots else 'models/diffusers') / name} and press R to refresh, or "
        f"choose another. Searched: {places}. Found: {there}.",
        field="model",
    )


def fingerprint(source: Path | WanModelFiles) -> str:
    """Return a hash of ``source`` and of the path, size and mtime of its files; none is read.

    Links to folders are followed: a component may lie on another disk.
    """
    if isinstance(source, WanModelFiles):
        named = (getattr(source, name) for name in source.__slots__ if name != "loras")
        roots = [Path(path) for path in named if path is not None]
    else:
        roots = [source]
    return fingerprint_of(str(source), roots)


def fingerprint_of(name: str, roots: Iterable[Path]) -> str:
    """Return a hash of a name and of the path, size and mtime of files and of those in folders."""
    digest = hashlib.sha256(name.encode())
    for path in (path for root in roots for path in _files_of(root)):
        if path.is_file():
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _files_of(root: Path) -> Iterator[Path]:
    """Yield a file, or all files in a folder in a fixed order; hidden ones are left out."""
    if not root.is_dir():
        yield root
        return
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        # A link may lead back to a folder above it.
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def portable(name: str) -> str:
    """Return a file's name with forward slashes: workflows saved on Windows have backslashes."""
    return name.replace("\\", "/")


def is_offered(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is one to choose from: macOS puts a "._name" beside files on some disks."""
    hidden = portable(name).rpartition("/")[2].startswith(".")
    return name.lower().endswith(suffixes) and not hidden


def named_file(files: Mapping[str, Path], name: str) -> Path | None:
    """Return the file of this name, however the system that saved the workflow writes it."""
    return files.get(name) or files.get(portable(name))


def _demo(name: str) -> Path | WanModelFiles | None:
    """Return a bundled demo model, None where it was left out of an installation."""
    if name not in _DEMOS:
        return None
    source = demo_model(_DEMOS[name])
    if isinstance(source, WanModelFiles):
        there = Path(source.vace or source.transformer).exists()
        return source if there else None
    return source if (source / INDEX).is_file() else None


def _model_folders(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:  # extra_model_paths.yaml may name a folder that does not exist
        return
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        folder = Path(entry.path)
        if any((folder / name).is_file() for name in _INDEXES):
            yield folder
        elif depth > 1:
            yield from _model_folders(folder, depth - 1)
