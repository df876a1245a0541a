"""The cards of this machine beside the one that computes: their names and their memory.

Asked for only where several may be used. Where NVML is installed no context is made on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as torch counts it; sizes are in bytes."""

    device: str
    name: str
    total_bytes: int
    free_bytes: int


def all_cards() -> tuple[Card, ...]:
    """Return the GPUs of this machine in torch's order; none where the CPU computes."""
    torch: Any = import_module("torch")
    found = []
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        properties = torch.cuda.get_device_properties(device)
        free = _free_bytes(str(getattr(properties, "uuid", "")))
        if free is None:
            free = torch.cuda.mem_get_info(device)[0]
        found.append(Card(device, properties.name, properties.total_memory, free))
    return tuple(found)


def _free_bytes(uuid: str) -> int | None:
    """Return what NVML says is free on a card, or None where it cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - not installed, or no driver: torch is asked then
        return None
    try:
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
