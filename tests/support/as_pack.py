"""The repository imported as ComfyUI does it: as one package under a name of its own."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
VALUES: dict[str, Any] = {
    "prompt": "a cat", "negative_prompt": "", "width": 64, "height": 48, "num_frames": 9,
    "steps": 0, "guidance_scale": 0.0, "guidance_scale_2": 0.0, "flow_shift": 0.0,
    "scheduler": "unipc", "seed": 0, "boundary": 0.0, "switch_step": 0, "fps": 0.0,
}  # fmt: skip
"""What the sampler nodes' widgets hold."""


@cache
def load_pack() -> ModuleType:
    """Import it once."""
    name = "wanfit_as_a_pack"
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def part(pack: ModuleType, name: str) -> Any:
    """Return a module of the pack, by its dotted name."""
    return importlib.import_module(f"{pack.__name__}.{name}")


def open_model(pack: ModuleType, folder: Path) -> Any:
    """Describe the model in a folder as the loader node does."""
    from wan_core.detect.detector import ArchitectureDetector

    architecture = ArchitectureDetector().detect_model_architecture(folder)
    lease = part(pack, "nodes.lease").lease_for(architecture)
    return part(pack, "nodes.pipeline").WanPipeline(folder.name, folder, architecture, lease)
