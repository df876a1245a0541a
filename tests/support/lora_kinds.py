"""LoRA files of random numbers, one of each kind that is applied, in the names of trainers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

RANK = 3


def factors(kind: str, shape: tuple[int, ...], g: torch.Generator) -> dict[str, Tensor]:
    """What LyCORIS saves of one layer; ``kind`` names what is saved as a product of two."""
    out, wide = shape[0], torch.Size(shape[1:]).numel()
    first, second = (
        ((out, wide), (out, wide)) if kind == "loha" else ((2, 4), (out // 2, wide // 4))
    )
    found = {}
    for name, size in (("w1", first), ("w2", second)):
        if kind == "loha" or name in kind:
            found[f"{name}_a"] = torch.randn(size[0], RANK, generator=g) * 0.4
            found[f"{name}_b"] = torch.randn(RANK, size[1], generator=g) * 0.4
        else:
            kernel = (size[1] // 4, 1, 2, 2) if len(shape) > 2 and name == "w2" else size[1:]
            found[name] = torch.randn(size[0], *kernel, generator=g) * 0.4
    prefix = "hada" if kind == "loha" else "lokr"
    return {f"{prefix}_{name}": value for name, value in found.items()}


def lora_file(state: Mapping[str, Tensor], kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Return a LoRA for the matrices of a transformer under its original names.

    ``kind`` is "lora" (musubi's names), "lightx2v", "lokr", "loha", or one of these with "dora"
    before it.
    """
    g = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, weight in state.items():
        module, _, leaf = name.rpartition(".")
        if not name.startswith("blocks."):
            continue
        stem = f"lora_unet_{module.replace('.', '_')}"
        if "lightx2v" in kind:
            stem = f"diffusion_model.{module}"
        if leaf == "weight" and weight.dim() == 2:
            shape, size = tuple(weight.shape), float(weight.norm()) / weight.numel() ** 0.5
            if "lo" in kind and kind.split()[-1] in ("lokr", "loha"):
                made = factors(kind.split()[-1], shape, g)
                made[next(iter(made))] *= 6 * size
            else:
                made = {"lora_down.weight": torch.randn(RANK, shape[1], generator=g) * size,
                        "lora_up.weight": torch.randn(shape[0], RANK, generator=g)}  # fmt: skip
            made["alpha"] = torch.tensor(1.5)
            if "dora" in kind:
                spread = 1 + 0.6 * torch.rand(shape[0], 1, generator=g)
                made["dora_scale"] = weight.norm(dim=1, keepdim=True) * spread
            found |= {f"{stem}.{end}": value for end, value in made.items()}
        elif "lightx2v" in kind and leaf in ("weight", "bias"):
            ending = "diff" if leaf == "weight" else "diff_b"
            found[f"{stem}.{ending}"] = torch.randn(weight.shape, generator=g) * 0.1
    return found
