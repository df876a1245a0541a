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
    nvlinks: int = 0
    """How many of its NVLinks are up; 0 also where that could not be asked."""


def all_cards() -> tuple[Card, ...]:
    """Return the GPUs of this machine in torch's order; none where the CPU computes."""
    torch: Any = import_module("torch")
    found = []
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        properties = torch.cuda.get_device_properties(device)
        free, nvlinks = _asked(str(getattr(properties, "uuid", "")))
        if free is None:
            free = torch.cuda.mem_get_info(device)[0]
        found.append(Card(device, properties.name, properties.total_memory, free, nvlinks))
    return tuple(found)


def _asked(uuid: str) -> tuple[int | None, int]:
    """Return what NVML says is free on a card, None where it cannot be asked, and its NVLinks."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - not installed, or no driver: torch is asked then
        return None, 0
    try:
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free), _nvlinks(pynvml, handle)
    except pynvml.NVMLError:
        return None, 0
    finally:
        pynvml.nvmlShutdown()


def _nvlinks(nvml: Any, handle: Any) -> int:
    """Count the links that are up; asking for one that a card does not have is an error."""
    count = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            count += nvml.nvmlDeviceGetNvLinkState(handle, link)
        except nvml.NVMLError:
            break
    return count
