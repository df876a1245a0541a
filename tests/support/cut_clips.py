"""Clips whose passes gangs of workers cut among them, on a CPU, and what is known between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.tiny_models import make_folder, open_wan
from wan_core import GenerationConfig
from wan_core.memory import FASTEST, CardRecords, Link, Trial

CLIP: dict[str, Any] = {
    "prompt": "a red cat", "width": 64, "height": 64, "num_frames": 17, "seed": 1,
    "num_inference_steps": 2,
}  # fmt: skip
"""80 tokens. With fewer than 16 for each process, products on a CPU round in another way."""
LONG = CLIP | {"num_frames": 29, "max_chunk_size": 17, "window_overlap": 8}
FOUR_HEADS = {"num_attention_heads": 4}


def four_heads(path: Path, family: str) -> Path:
    """Save a family whose heads four processes can share."""
    numbers = FOUR_HEADS | ({"added_kv_proj_dim": 48} if family == "wan2.1-i2v" else {})
    return make_folder(path / family, family, transformer=numbers)


def make_links_free(path: Path, **wishes: Any) -> str:
    """Have plans believe that exchanges take no time; return the machine's name among records.

    Small models would not be worth cutting otherwise.
    """
    _, plan = open_wan(path, devices=2, **wishes).plan(GenerationConfig(**CLIP))
    machine: str = plan.tried_as.partition("; ")[0]
    for cards in (2, 3, 4):
        CardRecords().keep_link(machine, cards, Link(FASTEST, 0.0))
    return machine


def trials() -> dict[str, Trial]:
    """What is kept of trials."""
    return dict(CardRecords().between().trials)


def made(wrapper: Any, job: dict[str, Any], **more: Any) -> Any:
    """Make a clip; return the result."""
    return wrapper.generate(GenerationConfig(**(job | more))).raise_for_error()


def cut_units(result: Any) -> int:
    """Return how many passes gangs have cut, each counted once."""
    return sum({one["gang"]: one["cut"] for one in result.metadata["workers"]}.values())


def equal(first: Any, second: Any) -> bool:
    return torch.equal(first.latents, second.latents)
