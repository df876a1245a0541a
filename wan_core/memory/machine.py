"""What this machine has: its device and free memory, RAM, bus, and which dtypes it is fast with.

Having no GPU is a normal case. torch is imported inside functions only; NVML and psutil are used if
they are installed. No tensor is allocated on the device. Asking CUDA for its free memory does
create the context, a few hundred MB that a run needs anyway.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from ..config import GIB
from ..errors import InvalidRequest, MissingDependency
from .calibration import Calibration
from .cards import Between, Card, allocator
from .process import (
    ON_CARD,
    done_here,
    growth,
    locked_by_torch,
    process_bytes,
    unknown_process,
)

PINNED_SHARE_WINDOWS, PINNED_SHARE = 0.4, 0.5
"""Share of the RAM that may be page-locked, on Windows and elsewhere."""
_CGROUPS = (
    ("", "memory.max", "memory.current", "", ""),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory", "total_"),
)
"""Of control groups of version 2 and 1: the folder they are in, the files with limit and use, the
name of the controller in /proc/self/cgroup, and what comes before the names of sums over the groups
below in memory.stat. Version 2 sums up without saying so."""
_CUDNN_MENDED = 91_500  # cuDNN 9.15, see ``SystemResources.wasteful_half_conv3d``
_ROCM = (
    "nothing here was measured on an AMD GPU. Where torch has no fused attention for it, a forward "
    "needs far more than is estimated"
)
_ONE_MEMORY = (
    "this GPU has no memory of its own: what is estimated for the device and for RAM must fit into "
    "the RAM together"
)
RAM_RESERVE = GIB
"""Bytes of RAM that are left to the system and other programs. Assumed, not measured."""
_NO_LIMIT = 2**60  # version 1 of control groups writes a number near 2**63 if there is no limit
_REFUSED = {
    "mps": "Apple's GPUs are not supported. Nothing here was ever run on one, and torch's "
    "attention there keeps all scores at once (80 GiB with a 14B model at 832x480 and 81 frames; "
    "pytorch issue 149261) or has returned wrong results (pytorch issue 190791)",
    "xpu": "Intel's GPUs are not supported. Nothing here was ever run on one: neither what torch "
    "says of their memory nor the transfers of streamed weights is known to hold there",
}
"""Kinds of accelerators that torch knows and that are not used, with the reason."""
_PCIE_GBYTES = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # per lane, one way
_MOST_HELD = 3 * GIB
"""What a process holds beyond this is taken for what it holds for others, such as another pack's
models in ComfyUI. Chosen: twice what one that has only rendered was seen to hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResources:
    """A machine as the plan sees it. Sizes are in bytes.

    On a CPU the device's memory is the RAM. ``device_free_bytes`` includes memory that torch's
    allocator holds without any tensor in it. It does not include what libraries take of it when
    they first compute there, nor ``evictable_bytes``, which the caller can free on the device
    (ComfyUI's loaded models, our own cached components).
    """

    device: str
    device_name: str
    device_total_bytes: int
    device_free_bytes: int
    ram_total_bytes: int
    ram_available_bytes: int
    device_used_by_others_bytes: int = 0
    """What other programs hold on the device, and this one's context of some hundred MiB."""
    shares_ram: bool = False
    """Whether a GPU has no memory of its own: what it takes is missing from the RAM."""
    evictable_bytes: int = 0
    ram_evictable_bytes: int = 0
    """RAM that the caller can free: cached components that are not in use."""
    process_bytes: int | None = None
    """Anonymous and page-locked memory that this process holds now; None where the system does not
    tell."""
    done_here: tuple[str, ...] = ()
    """What this process has done before, of the things for which it takes RAM once."""
    loaded: tuple[str, ...] = ()
    """Components of the model that this process holds, and need not read."""
    supports_bf16: bool = True
    """Whether the device computes in bf16 natively; torch accepts it everywhere."""
    supports_fp16: bool = True
    supports_fp8: bool = False
    wasteful_half_conv3d: bool = False
    """Whether 3D convolutions in half precision need several times their memory, as in torch 2.9
    with a cuDNN older than 9.15 (pytorch issue 166643)."""
    compute_capability: tuple[int, int] | None = None
    multiprocessors: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    pinned_budget_bytes: int = 0
    disk_free_bytes: int = 0
    os: str = ""
    torch_version: str = ""
    backend: str = "cpu"
    """"cuda", "rocm" or "cpu"."""
    allocator: str = "default"
    """How torch allocates on the device: "default", "expandable" (segments) or "async" (CUDA's own
    pool, ComfyUI's choice on many cards). How much memory is lost in gaps depends on it."""
    notes: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    """The GPUs of the machine, looked at only where several may be used."""
    calibration: Calibration = Calibration()
    """What earlier runs of the same model on this machine have measured."""
    between: Between = field(default_factory=Between)
    """What was measured between its cards, looked at only where several may be used."""

    @property
    def held_bytes(self) -> int | None:
        """Return what this process holds beside components that it can drop; None if not known.

        What it holds for others, such as another pack's models in ComfyUI, is no part of a run.
        """
        if self.process_bytes is None:
            return None
        return min(max(0, self.process_bytes - self.ram_evictable_bytes), _MOST_HELD)

    def process_ram(
        self, kinds: Iterable[str] = ("encode", "denoise", "decode"), *, tokens: int = 0
    ) -> int:
        """Return the RAM of the interpreter, its packages and the device's libraries.

        It is what the process holds now, and what it will for things it does for the first time:
        stages of these ``kinds``, and a tokenizer of so many ``tokens`` where it has none.
        """
        held, on_cpu = self.held_bytes, self.device_kind == "cpu"
        if held is None:
            return unknown_process(kinds, on_cpu=on_cpu, tokens=tokens)
        return held + growth(kinds, self.done_here, on_cpu=on_cpu, tokens=tokens)

    @property
    def usable_ram_bytes(self) -> int:
        """Return the RAM that a run may take, ``process_ram`` included, beside a reserve."""
        free = self.ram_available_bytes + self.ram_evictable_bytes - RAM_RESERVE
        # What the process holds already is missing from what is available.
        return max(0, free) + (self.held_bytes or 0)

    @property
    def device_kind(self) -> str:
        """Return the device's type without its index: "cuda" or "cpu"."""
        return self.device.partition(":")[0]

    @property
    def bus_bytes_per_second(self) -> float:
        """Return the rate of copies from page-locked memory: 80 % of the bus's nominal rate."""
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
    """Look at the machine. ``device`` None takes the first CUDA or ROCm GPU, else the CPU.

    ``folder`` is where output goes; the free space of its disk is reported. Raises InvalidRequest,
    naming the devices that exist, if ``device`` is not one of them, or is of a kind that is not
    supported.
    """
    torch: Any = import_module("torch")
    name, notes = _choose(device, torch)
    total, available, ram_notes = ram()
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
    }
    if name == "cpu":
        found |= _cpu(total, available)
    else:
        described, more = _cuda(name, torch, available)
        found |= described
        notes = (*notes, *more)
    held = process_bytes()  # after the device was asked: CUDA's context counts
    locked = 0 if name == "cpu" else locked_by_torch(torch)
    found["process_bytes"] = None if held is None else held + locked
    found["done_here"] = done_here(name)
    if name != "cpu" and "card" not in found["done_here"]:
        found["device_free_bytes"] = max(0, found["device_free_bytes"] - ON_CARD)
    return SystemResources(**found, notes=(*notes, *ram_notes))


def _choose(device: str | None, torch: Any) -> tuple[str, tuple[str, ...]]:
    """Return the device's full name, and notes on accelerators that are left aside."""
    known = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    if device is None:
        aside = [_REFUSED[kind] for kind in _others(torch)] if known == ["cpu"] else []
        return known[0], tuple(f"the CPU computes: {why}" for why in aside)
    why = _REFUSED.get(device.partition(":")[0])
    if why is not None:
        raise InvalidRequest(
            f"device is {device!r}. {why}. This machine has {', '.join(known)}. Choose one of them "
            "(in ComfyUI, start it with --cpu).",
            field="device",
        )
    wanted = {"cuda": "cuda:0", "cpu:0": "cpu"}.get(device, device)
    if wanted not in known:
        raise InvalidRequest(
            f"device is {device!r}; this machine has {', '.join(known)}. Choose one of them, or "
            "leave it empty for the first.",
            field="device",
        )
    return wanted, ()


def _others(torch: Any) -> list[str]:
    """Return the kinds of accelerators that this machine has and that are not used."""
    xpu = getattr(torch, "xpu", None)
    there = {
        "mps": torch.backends.mps.is_available(),
        "xpu": xpu is not None and xpu.is_available(),
    }
    return [kind for kind in _REFUSED if there[kind]]


def _cpu(total: int, available: int) -> dict[str, Any]:
    # Without AMX or AVX512-BF16, bf16 is emulated and several times slower than fp32.
    return {
        "device_name": platform.processor() or platform.machine(),
        "device_total_bytes": total,
        "device_free_bytes": available,
        "supports_bf16": False,
        "supports_fp16": False,
    }


def _cuda(name: str, torch: Any, available: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what is known of a CUDA or ROCm GPU, and notes; ``available`` is that of the RAM."""
    properties = torch.cuda.get_device_properties(name)
    free, device_total = torch.cuda.mem_get_info(name)
    # What torch has reserved but not allocated looks used to the driver and is free to a run.
    reserved = torch.cuda.memory_reserved(name)
    idle = reserved - torch.cuda.memory_allocated(name)
    rocm = torch.version.hip is not None
    capability = (properties.major, properties.minor)
    generation, width = (None, None) if rocm else _pcie(str(properties.uuid))
    free_to_us = free + max(idle, 0)
    notes = (_ROCM,) if rocm else ()
    shares_ram = bool(getattr(properties, "is_integrated", False))
    if shares_ram:
        free_to_us, notes = min(free_to_us, available), (*notes, _ONE_MEMORY)
    return {
        "device_name": properties.name,
        "device_total_bytes": device_total,
        "device_free_bytes": free_to_us,
        "shares_ram": shares_ram,
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
        "allocator": allocator(
            torch.cuda.get_allocator_backend(), os.environ, platform.system(),
            torch_version=torch.__version__, hip=torch.version.hip,
        ),
    }, notes  # fmt: skip


def close_gaps() -> None:
    """Have torch's allocator use expandable segments, unless the environment says otherwise.

    With them the allocator takes about 2 % more than the tensors need, instead of 30 %. A program
    calls this before it imports torch, which reads the setting at import. Outside Linux, or when
    torch has been imported already, this does nothing. A library inside another program should not
    call it: the setting is the whole process's.
    """
    told = any(name.endswith("_ALLOC_CONF") for name in os.environ)
    if platform.system() == "Linux" and not told and "torch" not in sys.modules:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def wasteful_conv3d(torch_version: str, cudnn: int | None) -> bool:
    """Say whether these versions compute half-precision 3D convolutions by vol2col.

    That needs 3 to 17 times the memory.
    """
    return torch_version.startswith("2.9.") and (cudnn or 0) < _CUDNN_MENDED


def _pcie(uuid: str) -> tuple[int | None, int | None]:
    """Return PCIe generation and lanes of a GPU as NVML reports them, or None for both."""
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
        # The current generation drops while the card is idle; a copy gets the maximum.
        return (
            int(pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
            int(pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        )
    except pynvml.NVMLError:
        return None, None
    finally:
        pynvml.nvmlShutdown()


def pinned_budget_now(pinned: int = 0) -> int:
    """Return how many bytes of RAM may be page-locked now, at most what is available.

    ``pinned`` bytes are page-locked already and thus missing from what is available. They belong
    to the result.
    """
    total, available, _ = ram()
    spare = max(0, available + pinned - unpinned_reserve(total))
    return min(pinned_budget(total, platform.system()), spare)


def unpinned_reserve(ram_total: int) -> int:
    """Return the bytes of RAM that are never page-locked: an eighth, of 2 GiB to 4 GiB.

    Locked memory cannot be swapped out; without a reserve, other programs would be. Chosen for
    desktops, not measured.
    """
    return max(2 * GIB, min(4 * GIB, ram_total // 8))


def pinned_budget(ram_total: int, system: str) -> int:
    """Return how many bytes of RAM may be page-locked: 40 % on Windows, 50 % elsewhere."""
    share = PINNED_SHARE_WINDOWS if system == "Windows" else PINNED_SHARE
    return int(ram_total * share)


def ram() -> tuple[int, int, tuple[str, ...]]:
    """Return total and available bytes of RAM within a container's limit, and notes on it."""
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
        if platform.system() != "Linux":
            raise MissingDependency(
                "psutil is not installed, without which the RAM of this system is not known. "
                "Install it: pip install psutil."
            ) from None
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def container_limit(root: Path = Path("/")) -> tuple[int | None, int]:
    """Return (limit, bytes in use) of the control group that leaves this process the least RAM.

    A process is in one group (of version 2 or 1) and in all groups around that one. Each may have a
    limit. A group counts cached file pages as used. They can be dropped at any time and are
    subtracted.
    """
    found = []
    for place, limit_file, used_file, controller, sums in _CGROUPS:
        for folder in _groups(root, place, controller):
            limit = _number(folder / limit_file)
            if limit is None or limit >= _NO_LIMIT:
                continue
            stat = _numbers(folder / "memory.stat")
            cached = stat.get(f"{sums}inactive_file", 0) + stat.get(f"{sums}active_file", 0)
            found.append((limit, max(0, (_number(folder / used_file) or 0) - cached)))
    return min(found, key=lambda group: group[0] - group[1], default=(None, 0))


def _groups(root: Path, place: str, controller: str) -> list[Path]:
    """Return the folders of this process's group and of those around it, the mounted one last.

    A container usually sees its own group as the mounted one, even if the path says otherwise.
    """
    mounted = root / "sys/fs/cgroup" / place
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inner = PurePosixPath(path.strip("/"))
            return [mounted.joinpath(part) for part in (inner, *inner.parents)]
    return [mounted]


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number in each line."""
    pairs = (line.partition(" ") for line in _lines(path))
    return {name: int(value) for name, _, value in pairs if value.isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii", errors="replace").splitlines()
    except OSError:
        return []


def _disk_free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
