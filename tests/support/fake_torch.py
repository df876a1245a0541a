"""Stand-ins for torch, NVML and psutil on machines that this one is not.

``FakeTorch`` has what ``memory/machine.py`` asks torch for, and no more: any other question is an
AttributeError, so that a new one is noticed. Every number differs from every other one, so that a
test which pins them tells which was taken.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from wan_core.memory import machine

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU as torch and NVML describe it. Sizes are in bytes."""

    name: str = "NVIDIA GeForce RTX 4090"
    capability: tuple[int, int] = (8, 9)
    multiprocessors: int = 128
    total: int = 24 * GIB
    free: int = 17 * GIB
    reserved: int = 5 * GIB
    allocated: int = 3 * GIB
    uuid: str = "1234-abcd"
    generation: int = 4
    width: int = 8
    integrated: bool = False


@dataclass
class FakeTorch:
    """torch on a machine with these ``cards``; ``hip`` makes it a build for ROCm."""

    cards: tuple[Card, ...] = ()
    hip: str | None = None
    version_text: str = "2.13.0+cu130"
    cudnn: int = 91_900
    backend: str = "native"
    has_mps: bool = False
    has_xpu: bool | None = None
    """None: a torch without ``torch.xpu``, as before 2.4."""
    asked: list[str] = field(default_factory=list)
    """The devices whose memory was asked for."""

    def __post_init__(self) -> None:
        self.__version__ = self.version_text
        self.version = SimpleNamespace(hip=self.hip)
        self.backends = SimpleNamespace(
            cudnn=SimpleNamespace(version=lambda: self.cudnn),
            mps=SimpleNamespace(is_available=lambda: self.has_mps),
        )
        self.cuda = SimpleNamespace(
            device_count=lambda: len(self.cards),
            get_device_properties=self._properties,
            mem_get_info=lambda device: (self._card(device).free, self._card(device).total),
            memory_reserved=lambda device: self._card(device).reserved,
            memory_allocated=lambda device: self._card(device).allocated,
            get_allocator_backend=lambda: self.backend,
        )
        if self.has_xpu is not None:
            self.xpu = SimpleNamespace(is_available=lambda: self.has_xpu)

    def _card(self, device: str) -> Card:
        self.asked.append(device)
        return self.cards[int(device.removeprefix("cuda:"))]

    def _properties(self, device: str) -> SimpleNamespace:
        card = self._card(device)
        return SimpleNamespace(
            name=card.name,
            major=card.capability[0],
            minor=card.capability[1],
            multi_processor_count=card.multiprocessors,
            uuid=card.uuid,
            is_integrated=card.integrated,
        )


class FakeNvml(ModuleType):
    """pynvml for these cards; it must be shut down as often as it was started."""

    class NVMLError(Exception):
        """What every call of NVML may raise."""

    def __init__(self, cards: tuple[Card, ...], *, fails: str = "") -> None:
        super().__init__("pynvml")
        self._cards = {f"GPU-{card.uuid.removeprefix('GPU-')}": card for card in cards}
        self._fails = fails
        self.open = 0

    def nvmlInit(self) -> None:
        if self._fails == "start":
            raise self.NVMLError("driver not loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        if self._fails == "handle" or uuid not in self._cards:
            raise self.NVMLError("not found")
        return self._cards[uuid]

    def nvmlDeviceGetMaxPcieLinkGeneration(self, card: Card) -> int:
        return card.generation

    def nvmlDeviceGetMaxPcieLinkWidth(self, card: Card) -> int:
        return card.width


def put_in_place(
    monkeypatch: pytest.MonkeyPatch, torch: FakeTorch, *, system: str = "Linux",
    nvml: FakeNvml | None = None, ram: tuple[int, int] = (64 * GIB, 40 * GIB),
    environment: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Make ``memory/machine.py`` look at this machine until the end of the test."""
    monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    memory: Any = SimpleNamespace(total=ram[0], available=ram[1])
    monkeypatch.setitem(
        sys.modules,
        "psutil",
        SimpleNamespace(virtual_memory=lambda: memory),  # type: ignore[arg-type]
    )
    monkeypatch.setattr(machine, "container_limit", lambda: (None, 0))
    held = GIB if system == "Linux" else None
    monkeypatch.setattr(machine, "process_bytes", lambda: held)
    monkeypatch.setattr(machine, "done_here", lambda device: ("imports",))
    monkeypatch.setattr(machine.os, "environ", environment or {})
    monkeypatch.setattr(
        machine,
        "platform",
        SimpleNamespace(system=lambda: system, processor=lambda: "", machine=lambda: "arm64"),
    )
    usage = SimpleNamespace(free=99 * GIB)
    monkeypatch.setattr(machine, "shutil", SimpleNamespace(disk_usage=lambda folder: usage))
