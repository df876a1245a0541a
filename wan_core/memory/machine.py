"""What this machine has: the device and its free memory, RAM, bus, and what runs fast on it.

No GPU is a normal case. torch is imported inside functions only; NVML and psutil are used where
they are installed. Nothing is allocated on the device (asking CUDA for its free memory creates
the context, a few hundred MB that a run needs anyway).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..config import GIB
from ..errors import InvalidRequest
from .calibration import Calibration

PINNED_SHARE_WINDOWS, PINNED_SHARE = 0.4, 0.5
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_CUDNN_MENDED = 91_500
RAM_RESERVE = GIB
"""Bytes of RAM that are left to the system and other programs. Assumed, not measured."""
_NO_LIMIT = 2**60  # version 1 writes a number near 2**63 where there is none
_Look = Callable[[str, Any, int, int], dict[str, Any]]
_PCIE_GBYTES = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # per lane, one way


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResources:
    """A machine as the plan sees it. Bytes, unless the name says otherwise.

    On a CPU the device's memory is the RAM. ``device_free_bytes`` includes what torch's allocator
    holds but nobody uses; ``evictable_bytes`` is what the caller can make free on the device
    (ComfyUI's loaded models, our own cached components) and is reported apart.
    """

    device: str
    device_name: str
    device_total_bytes: int
    device_free_bytes: int
    ram_total_bytes: int
    ram_available_bytes: int
    device_used_by_others_bytes: int = 0
    """What other programs hold on the device, with this one's context of some hundred MiB."""
    evictable_bytes: int = 0
    ram_evictable_bytes: int = 0
    """RAM that the caller can free: cached components that are not in use."""
    supports_bf16: bool = True
    """Whether the device computes in it natively, not whether torch accepts it."""
    supports_fp16: bool = True
    supports_fp8: bool = False
    wasteful_half_conv3d: bool = False
    """Whether 3D convolutions in half precision take many times their memory: torch 2.9 with a
    cuDNN older than 9.15 (pytorch issue 166643)."""
    compute_capability: tuple[int, int] | None = None
    multiprocessors: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    pinned_budget_bytes: int = 0
    disk_free_bytes: int = 0
    os: str = ""
    torch_version: str = ""
    backend: str = "cpu"
    """"cuda", "rocm", "mps", "xpu" or "cpu"."""
    allocator: str = "default"
    """How torch allocates on the device: "default", "expandable" (segments) or "async" (CUDA's own
    pool, ComfyUI's choice on many cards). It decides how much room gaps take."""
    notes: tuple[str, ...] = ()
    calibration: Calibration = Calibration()
    """What runs of the model in question taught on this machine."""

    @property
    def device_kind(self) -> str:
        """Return the device's type without its index: "cuda", "mps", "cpu"."""
        return self.device.partition(":")[0]

    @property
    def bus_bytes_per_second(self) -> float:
        """Return what the bus carries from pinned memory: 80 % of its nominal rate."""
        if self.device_kind == "cpu":
            return float("inf")
        lane = _PCIE_GBYTES.get(self.pcie_generation or 4, 1.969)
        return 0.8e9 * lane * (self.pcie_width or 16)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, ready for JSON."""
        plain = asdict(self)
        plain["bus_gb_per_s"] = (
            None if self.device_kind == "cpu" else round(self.bus_bytes_per_second / 1e9, 1)
        )
        return plain


def system_resources(
    device: str | None = None, *, evictable_bytes: int = 0, ram_evictable_bytes: int = 0,
    folder: str | Path = ".",
) -> SystemResources:  # fmt: skip
    """Look at the machine. ``device`` None takes the first GPU, or the CPU where there is none.

    ``folder`` is where output goes; its disk's free space is reported. Raises InvalidRequest
    naming the devices there are when ``device`` is not one of them.
    """
    torch: Any = import_module("torch")
    name = _choose(device, torch)
    total, available, notes = ram()
    kind = name.partition(":")[0]
    found: dict[str, Any] = {
        "device": name,
        "ram_total_bytes": total,
        "ram_available_bytes": available,
        "evictable_bytes": evictable_bytes,
        "ram_evictable_bytes": ram_evictable_bytes,
        "pinned_budget_bytes": pinned_budget(total, platform.system()),
        "disk_free_bytes": _disk_free(Path(folder)),
        "os": platform.system(),
        "torch_version": torch.__version__,
        "notes": notes,
    }
    describe: dict[str, _Look] = {"cuda": _cuda, "mps": _mps, "xpu": _xpu}
    look = describe.get(kind, _cpu)
    found |= look(name, torch, total, available)
    return SystemResources(**found)


def _choose(device: str | None, torch: Any) -> str:
    accelerators = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        accelerators += [f"xpu:{i}" for i in range(torch.xpu.device_count())]
    known = [*accelerators, "cpu"]
    if device is None:
        return known[0]
    wanted = {"cuda": "cuda:0", "xpu": "xpu:0", "mps:0": "mps", "cpu:0": "cpu"}.get(device, device)
    if wanted not in known:
        raise InvalidRequest(
            f"device is {device!r}; this machine has {', '.join(known)}. Choose one of them, or "
            "leave it empty for the first.",
            field="device",
        )
    return wanted


def _cpu(name: str, torch: Any, total: int, available: int) -> dict[str, Any]:
    # bf16 without AMX or AVX512-BF16 is emulated: it runs, several times slower than fp32.
    return {
        "device_name": platform.processor() or platform.machine(),
        "device_total_bytes": total,
        "device_free_bytes": available,
        "supports_bf16": False,
        "supports_fp16": False,
    }


def _cuda(name: str, torch: Any, total: int, available: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(name)
    free, device_total = torch.cuda.mem_get_info(name)
    reserved = torch.cuda.memory_reserved(name)
    idle = reserved - torch.cuda.memory_allocated(name)
    rocm = torch.version.hip is not None
    capability = (properties.major, properties.minor)
    generation, width = (None, None) if rocm else _pcie(str(properties.uuid))
    return {
        "device_name": properties.name,
        "device_total_bytes": device_total,
        "device_free_bytes": free + max(idle, 0),
        "device_used_by_others_bytes": max(0, device_total - free - reserved),
        "supports_bf16": rocm or capability >= (8, 0),
        "supports_fp16": True,
        "supports_fp8": not rocm and capability >= (8, 9),
        "wasteful_half_conv3d": not rocm
        and wasteful_conv3d(torch.__version__, torch.backends.cudnn.version()),
        "compute_capability": None if rocm else capability,
        "multiprocessors": properties.multi_processor_count,
        "pcie_generation": generation,
        "pcie_width": width,
        "backend": "rocm" if rocm else "cuda",
        "allocator": allocator(torch.cuda.get_allocator_backend(), os.environ, platform.system()),
    }


def allocator(backend: str, environment: Mapping[str, str], system: str) -> str:
    """Return how torch allocates: "default", "expandable" or "async".

    ``backend`` is torch's word for it; the rest it takes from the environment when it is imported.
    Expandable segments exist on Linux only.
    """
    if backend == "cudaMallocAsync":
        return "async"
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    told = next((environment[name] for name in names if name in environment), "")
    words = told.replace(" ", "").lower().split(",")
    return "expandable" if system == "Linux" and "expandable_segments:true" in words else "default"


def close_gaps() -> None:
    """Have torch's allocator use expandable segments in this process, unless told otherwise.

    For a program of one's own, before torch is imported: it reads this then. It needs 2 % more
    than what is alive instead of 30 %. Does nothing where torch is there already, and but on Linux.
    """
    told = any(name.endswith("_ALLOC_CONF") for name in os.environ)
    if platform.system() == "Linux" and not told and "torch" not in sys.modules:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def wasteful_conv3d(torch_version: str, cudnn: int | None) -> bool:
    """Say whether this pair computes half-precision 3D convolutions by vol2col (3 to 17 times)."""
    return torch_version.startswith("2.9.") and (cudnn or 0) < _CUDNN_MENDED


def _mps(name: str, torch: Any, total: int, available: int) -> dict[str, Any]:
    limit = int(torch.mps.recommended_max_memory())
    used = int(torch.mps.driver_allocated_memory())
    return {
        "device_name": platform.processor() or "Apple GPU",
        "device_total_bytes": limit,
        "device_free_bytes": max(0, min(limit - used, available)),
        "supports_bf16": bool(torch.backends.mps.is_macos_or_newer(14, 0)),
        "backend": "mps",
    }


def _xpu(name: str, torch: Any, total: int, available: int) -> dict[str, Any]:
    properties = torch.xpu.get_device_properties(name)
    used = torch.xpu.memory_reserved(name)
    return {
        "device_name": properties.name,
        "device_total_bytes": properties.total_memory,
        "device_free_bytes": properties.total_memory - used,
        "backend": "xpu",
    }


def _pcie(uuid: str) -> tuple[int | None, int | None]:
    """Return the bus generation and lanes NVML reports for a GPU, or None where it cannot."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(
            uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        )
        # The current generation sinks while the card idles; the maximum is what a copy gets.
        return (
            int(pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
            int(pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        )
    except pynvml.NVMLError:
        return None, None
    finally:
        pynvml.nvmlShutdown()


def pinned_budget_now(pinned: int = 0) -> int:
    """Return the bytes of RAM that may be pinned on this machine, at most what is available.

    ``pinned`` bytes are pinned already, and therefore not among what is available.
    """
    total, available, _ = ram()
    return min(pinned_budget(total, platform.system()), available + pinned)


def pinned_budget(ram_total: int, system: str) -> int:
    """Return the bytes of RAM that may be pinned: 40 % on Windows, 50 % elsewhere."""
    share = PINNED_SHARE_WINDOWS if system == "Windows" else PINNED_SHARE
    return int(ram_total * share)


def ram() -> tuple[int, int, tuple[str, ...]]:
    """Return total and available bytes of RAM, a container's limit respected, and notes."""
    total, available = _host_ram()
    limit, used = container_limit()
    if limit is None or limit >= total:
        return total, available, ()
    within = max(0, limit - used)
    note = f"the container limits RAM to {limit / GIB:.1f} GiB of {total / GIB:.1f}"
    return limit, min(available, within), (note,)


def _host_ram() -> tuple[int, int]:
    try:
        import psutil
    except ImportError:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def container_limit(root: Path = Path("/")) -> tuple[int | None, int]:
    """Return (limit, bytes in use) of this process's control group, version 2 or 1.

    Cached file pages count as use in the group's figure, but can be dropped; they are taken off.
    """
    for limit_file, used_file in _CGROUP_FILES:
        limit = _number(root / limit_file.lstrip("/"))
        if limit is None or limit >= _NO_LIMIT:
            continue
        used = _number(root / used_file.lstrip("/")) or 0
        stat = (root / used_file.lstrip("/")).with_name("memory.stat")
        return limit, max(0, used - _stat(stat, "inactive_file") - _stat(stat, "active_file"))
    return None, 0


def _number(path: Path) -> int | None:
    try:
        text = path.read_text("ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(path: Path, field: str) -> int:
    try:
        lines = path.read_text("ascii").splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(" ")
        if name in (field, f"total_{field}") and value.isdigit():
            return int(value)
    return 0


def _disk_free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
