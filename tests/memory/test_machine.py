"""What the machine has: this one as it is, and others through their control group files."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wan_core.errors import InvalidRequest
from wan_core.memory import machine as hardware
from wan_core.memory.machine import (
    container_limit,
    pinned_budget,
    pinned_budget_now,
    system_resources,
    wasteful_conv3d,
)

GIB = 2**30


def test_this_machine() -> None:
    found = system_resources("cpu")
    assert found.device == found.device_kind == found.backend == "cpu"
    assert 0 < found.ram_available_bytes <= found.ram_total_bytes == found.device_total_bytes
    assert found.device_free_bytes == found.ram_available_bytes
    assert found.disk_free_bytes > 0
    assert found.os == platform.system()
    assert found.torch_version == torch.__version__
    assert found.bus_bytes_per_second == float("inf")
    assert json.loads(json.dumps(found.to_dict()))["bus_gb_per_s"] is None


def test_the_first_accelerator_or_the_cpu() -> None:
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    if torch.backends.mps.is_available():
        expected = "mps"
    assert system_resources().device == expected


@pytest.mark.parametrize("device", ["cuda:77", "tpu", "gpu"])
def test_an_unknown_device_is_answered_with_the_known(device: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{device}.*cpu") as caught:
        system_resources(device)
    assert caught.value.field == "device"


def test_what_the_caller_can_free_is_reported_apart() -> None:
    found = system_resources("cpu", evictable_bytes=5, ram_evictable_bytes=7)
    assert (found.evictable_bytes, found.ram_evictable_bytes) == (5, 7)
    assert found.device_free_bytes == found.ram_available_bytes


def test_pinned_memory_is_scarcer_on_windows() -> None:
    assert pinned_budget(100 * GIB, "Windows") == 40 * GIB
    assert pinned_budget(100 * GIB, "Linux") == 50 * GIB


def test_what_is_pinned_already_does_not_lower_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "ram", lambda: (100 * GIB, 30 * GIB, ()))
    monkeypatch.setattr(hardware.platform, "system", lambda: "Linux")
    assert pinned_budget_now() == 26 * GIB  # 4 GiB of 100 are never locked
    assert pinned_budget_now(pinned=15 * GIB) == 41 * GIB
    assert pinned_budget_now(pinned=40 * GIB) == 50 * GIB


def cgroup(root: Path, version: int, limit: str, used: int, cached: int) -> None:
    folder = root / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    folder.mkdir(parents=True)
    names = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 12\n{names[2]} {cached}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_without_its_file_cache(tmp_path: Path, version: int) -> None:
    cgroup(tmp_path, version, str(8 * GIB), 6 * GIB, 5 * GIB)
    assert container_limit(tmp_path) == (8 * GIB, GIB)


@pytest.mark.parametrize(("version", "limit"), [(2, "max"), (1, str(2**63 - 4096))])
def test_no_limit_is_none(tmp_path: Path, version: int, limit: str) -> None:
    cgroup(tmp_path, version, limit, 6 * GIB, 0)
    assert container_limit(tmp_path) == (None, 0)


def test_a_limit_below_the_machines_ram_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "container_limit", lambda: (2 * GIB, GIB // 2))
    monkeypatch.setattr(hardware, "_host_ram", lambda: (64 * GIB, 60 * GIB))
    total, available, notes = hardware.ram()
    assert (total, available) == (2 * GIB, 3 * GIB // 2)
    assert "container" in notes[0]
    monkeypatch.setattr(hardware, "container_limit", lambda: (128 * GIB, GIB))
    assert hardware.ram() == (64 * GIB, 60 * GIB, ())


def test_ram_without_psutil_is_about_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    total, _ = hardware._host_ram()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert hardware._host_ram()[0] == pytest.approx(total, rel=0.01)


def test_a_bus_from_generation_and_width() -> None:
    from support.machines import gpu

    assert gpu(24).bus_bytes_per_second == pytest.approx(25.2e9, rel=0.01)
    assert gpu(24, pcie_generation=5).bus_bytes_per_second == pytest.approx(50.4e9, rel=0.01)
    unknown = gpu(24, pcie_generation=None, pcie_width=None)
    assert unknown.bus_bytes_per_second == gpu(24).bus_bytes_per_second
    assert gpu(24, pcie_width=4).bus_bytes_per_second * 4 == gpu(24).bus_bytes_per_second


class FakeCuda:
    """Just enough of torch for a machine with one GPU."""

    def __init__(self, capability: tuple[int, int], hip: str | None = None) -> None:
        self.cuda, self.version, self.capability = self, self, capability
        self.hip, self.__version__ = hip, "2.13.0"
        self.backends = SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91900))
        self.name, self.uuid, self.multi_processor_count = "A card", "x", 84
        self.major, self.minor = capability

    def get_allocator_backend(self) -> str:
        return "native"

    def get_device_properties(self, device: str) -> FakeCuda:
        return self

    def mem_get_info(self, device: str) -> tuple[int, int]:
        return 10 * GIB, 24 * GIB

    def memory_reserved(self, device: str) -> int:
        return 5 * GIB

    def memory_allocated(self, device: str) -> int:
        return 3 * GIB


@pytest.mark.parametrize(
    ("capability", "bf16", "fp8"),
    [((7, 5), False, False), ((8, 6), True, False), ((8, 9), True, True)],
)
def test_what_a_card_computes_natively(capability: tuple[int, int], bf16: bool, fp8: bool) -> None:
    found = hardware._cuda("cuda:0", FakeCuda(capability), 0, 0)
    assert (found["supports_bf16"], found["supports_fp8"]) == (bf16, fp8)
    # What the allocator holds and nobody uses is as good as free.
    assert found["device_free_bytes"] == 12 * GIB
    assert found["device_used_by_others_bytes"] == 9 * GIB


@pytest.mark.parametrize(
    ("backend", "variable", "value", "system", "expected"),
    [
        ("native", "PYTORCH_CUDA_ALLOC_CONF", "", "Linux", "default"),
        ("native", "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "Linux", "expandable"),
        ("native", "PYTORCH_ALLOC_CONF", "a:1, Expandable_Segments: true", "Linux", "expandable"),
        ("native", "PYTORCH_ALLOC_CONF", "expandable_segments:False", "Linux", "default"),
        ("native", "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "Windows", "default"),
        ("cudaMallocAsync", "PATH", "expandable_segments:True", "Linux", "async"),
    ],
)
def test_the_allocator_is_known(
    backend: str, variable: str, value: str, system: str, expected: str
) -> None:
    assert hardware.allocator(backend, {variable: value}, system) == expected


def test_an_amd_card_is_no_compute_capability() -> None:
    found = hardware._cuda("cuda:0", FakeCuda((9, 4), hip="6.2"), 0, 0)
    assert found["backend"] == "rocm"
    assert found["compute_capability"] is None
    assert found["supports_bf16"] and not found["supports_fp8"]


def test_planning_does_not_import_torch() -> None:
    code = (
        "import sys, wan_core.plan, wan_core.memory, wan_core.memory.machine;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "wasteful"),
    [
        ("2.9.0+cu128", 91002, True), ("2.9.1+cu130", 91400, True), ("2.9.1", None, True),
        ("2.9.1+cu130", 91500, False), ("2.8.0", 91002, False), ("2.11.0+cu130", 91002, False),
    ],
)  # fmt: skip
def test_pairs_of_torch_and_cudnn_that_waste_memory(
    torch_version: str, cudnn: int | None, wasteful: bool
) -> None:
    assert wasteful_conv3d(torch_version, cudnn) == wasteful
