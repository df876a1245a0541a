"""Wishes of an OptimizationConfig that a plan cannot heed, and why: one table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..memory import Choices
from ..models import ModelArchitecture, block_count, experts_of
from .config import OptimizationConfig

if TYPE_CHECKING:
    from ..memory import SystemResources


def wishes_without_effect(
    requested: OptimizationConfig,
    architecture: ModelArchitecture,
    system: SystemResources,
    choices: Choices,
) -> Iterator[str]:
    """Yield a sentence for each wish that was stated and changes nothing in these choices."""
    cache = "easycache" if choices.easycache else "magcache" if choices.magcache else ""
    cache = cache or requested.step_cache  # a threshold of 0 is EasyCache that leaves nothing out
    if requested.step_cache_threshold is not None and cache != "easycache":
        yield _said(
            "step_cache_threshold",
            "no EasyCache is in this plan. step_cache 'easycache' asks for it",
        )
    if requested.step_cache_factor is not None and cache != "magcache":
        yield _said(
            "step_cache_factor", "no MagCache is in this plan. step_cache 'magcache' asks for it"
        )
    if requested.min_vram_mb is not None and system.device_kind == "cpu":
        yield _said("min_vram_mb", "the job runs on the CPU, and it is a wish of a GPU")
    blocks = block_count(architecture.transformer)
    if requested.resident_blocks is not None and requested.resident_blocks > blocks:
        yield (
            f"resident_blocks is {requested.resident_blocks}, and {architecture.variant.title} has "
            f"{blocks} blocks: all of them stay on the device."
        )
    quantised = [
        part.stored_as
        for name in experts_of(architecture)
        if (part := architecture.components.get(name)) is not None
        and part.stored is not None
        and part.stored.quantised
    ]
    if requested.fp8_storage == "always" and quantised and not choices.fp8_storage:
        yield _said("fp8_storage", f"the weights stay as the file has them ({quantised[0]})")


def _said(name: str, why: str) -> str:
    return f"{name} has no effect: {why}."
