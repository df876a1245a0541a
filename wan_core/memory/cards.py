"""The cards of this machine: names, memory, how torch allocates on them, what was measured between.

Those beside the one that computes are asked for only where several may be used. Where NVML is
installed no context is made on them.

How fast they talk, and what stays equal, is in one small JSON file. A forward that is cut over
several cards (Ulysses) gives other shapes to the kernels; whether they keep the bits is tried once
for each kind of card, shape and number of cards. If the file is missing, broken or cannot be
written, it is tried again, and nothing else happens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final

from .calibration import MeasuredFile

_KEPT = 200
"""How many trials, the latest ones, are kept."""
GAPS: Final = {"diffusers": 0.4, "lean": 0.35, "rows": 0.1, "vae": 0.3, "other": 0.2}
"""What torch's default allocator needs beyond the activations, as a share of them, because freed
blocks leave gaps. Measured on an H100 (torch 2.11) with benchmarks/allocator_room.py, which looks
for the smallest limit on the allocator with which a run succeeds: 25 to 40 % for diffusers'
forward, 30 % for the lean one, 4 to 10 % with products by rows, 20 to 30 % for the VAE. CUDA's own
pool ("async") was not measured; the same shares are assumed for it."""
EXPANDABLE_GAPS: Final = {
    "diffusers": 0.025,
    "lean": 0.025,
    "rows": 0.025,
    "vae": 0.05,
    "other": 0.05,
}
"""The same with expandable segments: 1 to 2 % for the forwards, 4 % for the VAE."""
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
    hip: str | None,
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


# -- what was measured between them --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trial:
    """One forward computed twice, on one card and cut over several."""

    equal: bool
    """Whether every bit was equal."""
    error: float
    """The relative error of the cut one, 0 where it was equal."""


FASTEST = 2e12
"""Bytes a second that no link between cards reaches: NVLink 5 has 0.9e12 in a direction, and NVIDIA
announced twice that for the next one. What is beyond was measured wrongly."""


@dataclass(frozen=True, slots=True)
class Link:
    """How fast the cards of a gang exchange what they have computed."""

    rate: float
    """Bytes a second that each sends while all send."""
    seconds: float
    """What an exchange takes beside its bytes."""
    host: float = 0.0
    """Bytes a second that each copies from page-locked RAM while all copy; 0 if not measured."""

    @property
    def plausible(self) -> bool:
        """Whether a link can be like that; no other is kept, and none that is read counts."""
        times = 0 <= self.seconds < 1 and 0 <= self.host <= FASTEST
        return times and 0 < self.rate <= FASTEST


@dataclass(frozen=True, slots=True)
class Between:
    """What is known of the cards of this machine together, as a plan sees it."""

    links: Mapping[str, Link] = field(default_factory=dict)
    """By ``link_name``."""
    trials: Mapping[str, Trial] = field(default_factory=dict)
    """Trials by ``cut_kind``."""
    threads: int = 0
    """Threads that a product on the CPU is computed by: its rounding depends on them."""


class CardRecords(MeasuredFile):
    """The file of link rates and trials."""

    name = "cards.json"

    def link(self, machine: str, cards: int) -> Link | None:
        """Return what was measured between so many cards, or None."""
        return self._links().get(link_name(machine, cards))

    def between(self, threads: int = 0) -> Between:
        """Return all that is known."""
        known = self._read()
        trials = {kind: Trial(*found) for kind, found in known["trials"].items()}
        return Between(self._links(), trials, threads)

    def keep_link(self, machine: str, cards: int, link: Link) -> None:
        """Keep what was measured between so many cards; not what no link can be like."""
        if not link.plausible:
            return
        known = self._read()
        known["links"][link_name(machine, cards)] = [link.rate, link.seconds, link.host]
        self._keep(known)

    def _links(self) -> dict[str, Link]:
        links = {name: Link(*found) for name, found in self._read()["links"].items()}
        return {name: link for name, link in links.items() if link.plausible}

    def trial(self, kind: str) -> Trial | None:
        """Return what a trial of this kind (``cut_kind``) has shown, or None."""
        found = self._read()["trials"].get(kind)
        return None if found is None else Trial(*found)

    def keep_trial(self, kind: str, trial: Trial) -> None:
        """Keep a trial. One that was not equal stays so: bits that may differ are not promised."""
        known = self._read()
        before = known["trials"].pop(kind, None)
        if before is not None and not before[0]:
            trial = Trial(False, max(before[1], trial.error))
        known["trials"][kind] = [trial.equal, trial.error]
        known["trials"] = dict([*known["trials"].items()][-_KEPT:])
        self._keep(known)

    def _read(self) -> dict[str, dict[str, Any]]:
        def understood(plain: Any) -> dict[str, dict[str, Any]]:
            return {
                "links": {
                    str(k): [float(rate), float(seconds), *map(float, host[:1])]
                    for k, (rate, seconds, *host) in plain["links"].items()
                },
                "trials": {
                    str(k): [bool(equal), float(error)]
                    for k, (equal, error) in plain["trials"].items()
                },
            }

        return self._loaded(understood) or {"links": {}, "trials": {}}


def link_name(machine: str, cards: int) -> str:
    """Name what the rate of a link is kept under."""
    return f"{machine}, {cards} cards"


def cut_kind(what: str, batch: int, tokens: int, cards: int) -> str:
    """Name what a trial is made for: ``what`` says card, software, model, dtype and forward."""
    return f"{what}, {batch} x {tokens} tokens over {cards} cards"
