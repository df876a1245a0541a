"""The cards of a machine, with a fake torch and a fake NVML."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from wan_core.memory import all_cards
from wan_core.memory import cards as module


class NVMLError(Exception):
    pass


def nvml(links: list[int], *, broken: bool = False) -> Any:
    """NVML on a card with so many links, 1 for one that is up; ``broken``: it knows no card."""
    shut: list[bool] = []

    def handle(name: str) -> str:
        assert name.startswith("GPU-")
        if broken:
            raise NVMLError
        return name

    def state(card: str, link: int) -> int:
        if link >= len(links):
            raise NVMLError
        return links[link]

    return SimpleNamespace(
        NVMLError=NVMLError, NVML_NVLINK_MAX_LINKS=18, nvmlInit=lambda: None, shut=shut,
        nvmlDeviceGetHandleByUUID=handle, nvmlDeviceGetNvLinkState=state,
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(free=5),
        nvmlShutdown=lambda: shut.append(True),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("links", "broken", "found"),
    [([], False, (5, 0)), ([1, 1, 0, 1], False, (5, 3)), ([1] * 18, False, (5, 18)),
     ([1], True, (7, 0))],
)  # fmt: skip
def test_what_nvml_says_of_a_card(
    links: list[int], broken: bool, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = nvml(links, broken=broken)
    properties = SimpleNamespace(name="H200", total_memory=9, uuid="abc")
    cuda = SimpleNamespace(
        device_count=lambda: 1, get_device_properties=lambda _: properties,
        mem_get_info=lambda _: (7, 9),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(module, "import_module", lambda _: SimpleNamespace(cuda=cuda))
    (card,) = all_cards()
    assert (card.device, card.name, card.total_bytes) == ("cuda:0", "H200", 9)
    assert (card.free_bytes, card.nvlinks) == found and fake.shut == [True]
