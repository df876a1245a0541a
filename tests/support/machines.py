"""Made-up machines and models for the tests of estimate and plan: numbers, no files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from wan_core.config import GIB
from wan_core.memory.machine import SystemResources
from wan_core.models.architecture import Component, ModelArchitecture
from wan_core.models.stored import StoredSize, StoredSizes
from wan_core.models.variants import VARIANTS


def gpu(gib: float, *, ram: float = 128, **more: object) -> SystemResources:
    """A machine with a GPU of ``gib`` GiB, all of it free, and ``ram`` GiB of free RAM."""
    known: dict[str, object] = {
        "device": "cuda:0",
        "device_name": f"GPU {gib:g}",
        "device_total_bytes": int(gib * GIB),
        "device_free_bytes": int(gib * GIB),
        "ram_total_bytes": int(ram * GIB),
        "ram_available_bytes": int(ram * GIB),
        "backend": "cuda",
        "supports_fp8": True,
        "compute_capability": (8, 9),
        "multiprocessors": 128,
        "pcie_generation": 4,
        "pcie_width": 16,
        "pinned_budget_bytes": int(ram * GIB / 2),
    }
    return SystemResources(**(known | more))  # type: ignore[arg-type]


def cpu(ram: float) -> SystemResources:
    """A machine without a GPU and with ``ram`` GiB of free RAM."""
    return gpu(
        ram, ram=ram, device="cpu", device_name="a CPU", backend="cpu", supports_fp8=False,
        supports_bf16=False, supports_fp16=False, compute_capability=None,
    )  # fmt: skip


def architecture(name: str, *, weight_kind: str = "bf16", bare: bool = False) -> ModelArchitecture:
    """A detected model with the published numbers, its files without content."""
    variant = VARIANTS[name]
    parts = ["transformer"]
    if not bare:
        parts += ["vae", "text_encoder", "tokenizer"]
        parts += ["transformer_2"] * (variant.experts == 2)
        parts += ["image_encoder"] * variant.image_encoder
    return ModelArchitecture(
        variant=variant,
        transformer=variant.transformer,
        vae=None if bare else variant.vae,
        layout="diffusers",
        weight_kind=weight_kind,
        components={part: Component(kind=part, path=Path("model") / part) for part in parts},
        root=Path("model"),
    )


def stored_pair(kind: str) -> ModelArchitecture:
    """A14B as files hold it: "fp32" is copied to be computed in half, the others stay mapped.

    Of "fp32 encoder" the experts are in fp8.
    """
    found, others = architecture("wan2.2-t2v-a14b"), "fp8" if "encoder" in kind else kind

    def part(name: str, blocks: int, numbers: int, table: int, kind: str) -> object:
        def size(numbers: int) -> StoredSize:
            each = {"fp32": {"plain": numbers}, "bf16": {"half": numbers}}
            return StoredSize(**each.get(kind, {"kept": numbers}))

        sizes = StoredSizes(
            blocks=(size(numbers),) * blocks, rest=StoredSize(wide=10**8), largest=numbers // 5,
            tables=StoredSize(plain=table) if kind == "fp32" else StoredSize(half=table),
        )  # fmt: skip
        sizes = sizes if kind == "fp8" else replace(sizes, largest=0)
        whole = {"fp32": 4, "bf16": 2, "fp8": 1}[kind] * blocks * numbers
        known = found.components[name]
        return replace(known, stored=sizes, nbytes=whole, weight_kind=kind)

    parts = {
        "transformer": part("transformer", 40, 350 * 10**6, 0, others),
        "transformer_2": part("transformer_2", 40, 350 * 10**6, 0, others),
        "text_encoder": part("text_encoder", 24, 193 * 10**6, 10**9, kind.split()[0]),
    }
    return replace(found, components={**found.components, **parts})
