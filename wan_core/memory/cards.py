"""The cards of this machine: their names and their memory, and how torch allocates on them.

Those beside the one that computes are asked for only where several may be used. Where NVML is
installed no context is made on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

GENERAL_NAME: Final = (2, 10)
"""The torch from which PYTORCH_ALLOC_CONF tells of expandable segments; before, only the names with
a device in them do."""


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


def allocator(
    backend: str, environment: Mapping[str, str], system: str, *, torch_version: str,
    hip: str | None = None,
) -> str:  # fmt: skip
    """Return how torch allocates: "default", "expandable" or "async".

    ``backend`` is what torch calls its allocator, ``hip`` its version of ROCm's HIP, None for CUDA.
    Whether segments are expandable is read from ``environment``, as torch does when it is imported
    (c10/cuda/CUDAAllocatorConfig.h and c10/core/AllocatorConfig.cpp of 2.9 to 2.13). They exist on
    Linux only; on ROCm since torch 2.12 with HIP 7.
    """
    if backend in ("cudaMallocAsync", "hipMallocAsync"):
        return "async"
    release = release_of(torch_version)
    words = _settings(environment, release, hip).replace(" ", "").lower().split(",")
    exist = system == "Linux" and (
        hip is None or (release >= (2, 12) and release_of(hip) >= (7, 0))
    )
    return "expandable" if exist and "expandable_segments:true" in words else "default"


def _settings(environment: Mapping[str, str], release: tuple[int, int], hip: str | None) -> str:
    """Return the settings from which a torch of this release takes expandable segments."""
    names: tuple[str, ...] = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if release >= GENERAL_NAME:
        names = ("PYTORCH_ALLOC_CONF", *names)
    elif hip is None:
        names = names[:1]
    return next((environment[name] for name in names if name in environment), "")


def release_of(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version; (0, 0) if they cannot be read."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
