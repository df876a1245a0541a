"""What the machine has: this one as it is, and others by a fake torch and control group files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_torch import Card, FakeNvml, FakeTorch, put_in_place
from support.machines import cpu, gpu

from wan_core.errors import InvalidRequest, MissingDependency
from wan_core.memory import cards
from wan_core.memory import machine as hardware
from wan_core.memory.calibration import Calibration
from wan_core.memory.machine import (
    ON_CARD,
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
    assert system_resources().device == ("cuda:0" if torch.cuda.is_available() else "cpu")


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


STAT = {
    2: "anon 12\ninactive_file {cached}\nactive_file {more}\ninactive_files 99999999999\n",
    # Version 1 counts a group alone before it counts it with those below, which the use includes.
    1: "inactive_file 7\nactive_file 5\ntotal_inactive_file {cached}\ntotal_active_file {more}\n",
}
FOLDER = {2: "sys/fs/cgroup", 1: "sys/fs/cgroup/memory"}
NAMES = {
    2: ("memory.max", "memory.current"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
MINE = {
    2: "0::{path}\n",
    1: "12:cpuset:/elsewhere\n4:memory:{path}\n1:name=systemd:/elsewhere\n0::/elsewhere\n",
}


def cgroup(
    root: Path,
    version: int,
    limit: str,
    used: int,
    cached: int = 0,
    more: int = 0,
    inside: str = "",
) -> None:
    folder = root / FOLDER[version] / inside
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(NAMES[version], (limit, str(used)), strict=True):
        (folder / name).write_text(text + "\n")
    (folder / "memory.stat").write_text(STAT[version].format(cached=cached, more=more))


def in_group(root: Path, version: int, path: str) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(MINE[version].format(path=path))


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_without_its_file_cache(tmp_path: Path, version: int) -> None:
    cgroup(tmp_path, version, str(8 * GIB), 6 * GIB, 3 * GIB, 2 * GIB)
    assert container_limit(tmp_path) == (8 * GIB, GIB)
    cgroup(tmp_path, version, str(8 * GIB), 6 * GIB, 5 * GIB, 3 * GIB)
    assert container_limit(tmp_path) == (8 * GIB, 0)
    (tmp_path / FOLDER[version] / "memory.stat").unlink()
    assert container_limit(tmp_path) == (8 * GIB, 6 * GIB)
    (tmp_path / FOLDER[version] / NAMES[version][1]).unlink()
    assert container_limit(tmp_path) == (8 * GIB, 0)


@pytest.mark.parametrize(
    ("version", "limit"), [(2, "max"), (1, str(2**63 - 4096)), (1, str(2**60))]
)
def test_no_limit_is_none(tmp_path: Path, version: int, limit: str) -> None:
    assert container_limit(tmp_path) == (None, 0)
    cgroup(tmp_path, version, limit, 6 * GIB)
    assert container_limit(tmp_path) == (None, 0)


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_any_group_around_the_process_counts(tmp_path: Path, version: int) -> None:
    """As a batch system or a service manager sets it, without a container."""
    in_group(tmp_path, version, "/batch/job_7/step_0")
    cgroup(tmp_path, version, str(64 * GIB), 10 * GIB)
    cgroup(tmp_path, version, str(16 * GIB), 9 * GIB, GIB, inside="batch/job_7")
    cgroup(tmp_path, version, str(12 * GIB), GIB, inside="batch/job_7/step_0")
    cgroup(tmp_path, version, str(GIB), 0, inside="batch/job_8")
    assert container_limit(tmp_path) == (16 * GIB, 8 * GIB), "8 GiB are left, in its own group 11"
    cgroup(tmp_path, version, str(12 * GIB), 5 * GIB, inside="batch/job_7/step_0")
    assert container_limit(tmp_path) == (12 * GIB, 5 * GIB)
    in_group(tmp_path, version, "/")
    assert container_limit(tmp_path) == (64 * GIB, 10 * GIB)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_is_shown_the_hosts_path(tmp_path: Path, version: int) -> None:
    in_group(tmp_path, version, "/docker/0123abcd")  # below the mounted folder there is none
    cgroup(tmp_path, version, str(8 * GIB), GIB)
    assert container_limit(tmp_path) == (8 * GIB, GIB)


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
    assert gpu(24).bus_bytes_per_second == pytest.approx(25.2e9, rel=0.01)
    assert gpu(24, pcie_generation=5).bus_bytes_per_second == pytest.approx(50.4e9, rel=0.01)
    unknown = gpu(24, pcie_generation=None, pcie_width=None)
    assert unknown.bus_bytes_per_second == gpu(24).bus_bytes_per_second
    assert gpu(24, pcie_width=4).bus_bytes_per_second * 4 == gpu(24).bus_bytes_per_second


# ------------------------------------------------------------------------ other machines

LINUX: dict[str, Any] = {
    "between": {"links": {}, "threads": 0, "trials": {}},
    "device": "cuda:0",
    "device_name": "NVIDIA GeForce RTX 4090",
    "device_total_bytes": 24 * GIB,
    # 17, and 2 that torch holds without a tensor in them; kernels are still to come.
    "device_free_bytes": 19 * GIB - ON_CARD,
    "ram_total_bytes": 64 * GIB,
    "ram_available_bytes": 40 * GIB,
    "device_used_by_others_bytes": 2 * GIB,
    "shares_ram": False,
    "evictable_bytes": 0,
    "ram_evictable_bytes": 0,
    "process_bytes": GIB,
    "done_here": ("imports",),
    "loaded": (),
    "cards": (),
    "supports_bf16": True,
    "supports_fp16": True,
    "supports_fp8": True,
    "wasteful_half_conv3d": False,
    "compute_capability": (8, 9),
    "multiprocessors": 128,
    "pcie_generation": 4,
    "pcie_width": 8,
    "pinned_budget_bytes": 32 * GIB,
    "disk_free_bytes": 99 * GIB,
    "os": "Linux",
    "torch_version": "2.13.0+cu130",
    "backend": "cuda",
    "allocator": "default",
    "notes": (),
    "calibration": asdict(Calibration()),
    "bus_gb_per_s": 12.6,
}
BARE = {
    "device": "cpu", "device_name": "arm64", "device_total_bytes": 64 * GIB,
    "device_free_bytes": 40 * GIB, "device_used_by_others_bytes": 0, "supports_bf16": False,
    "supports_fp16": False, "supports_fp8": False, "compute_capability": None,
    "multiprocessors": None, "pcie_generation": None, "pcie_width": None, "backend": "cpu",
    "bus_gb_per_s": None,
}  # fmt: skip
RADEON = Card("AMD Radeon RX 7900 XTX", capability=(11, 0), multiprocessors=48)
MACHINES: dict[str, tuple[FakeTorch, dict[str, Any], dict[str, Any]]] = {
    "NVIDIA": (FakeTorch((Card(),)), {}, {}),
    "NVIDIA on Windows": (
        FakeTorch((Card(),), backend="cudaMallocAsync"),
        {"system": "Windows"},
        {
            "os": "Windows", "pinned_budget_bytes": int(25.6 * GIB), "allocator": "async",
            "process_bytes": None,
        },
    ),
    "an older one": (
        FakeTorch((Card(capability=(7, 5)),)),
        {},
        {"compute_capability": (7, 5), "supports_bf16": False, "supports_fp8": False},
    ),
    "one of 2020": (
        FakeTorch((Card(capability=(8, 0)),)),
        {},
        {"compute_capability": (8, 0), "supports_fp8": False},
    ),
    "one without NVML": (
        FakeTorch((Card(),)),
        {"nvml": None},
        {"pcie_generation": None, "pcie_width": None, "bus_gb_per_s": 25.2},
    ),
    "a torch that wastes memory": (
        FakeTorch((Card(),), version_text="2.9.0+cu128", cudnn=91_002),
        {},
        {"torch_version": "2.9.0+cu128", "wasteful_half_conv3d": True},
    ),
    "expandable segments": (
        FakeTorch((Card(),)),
        {"environment": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}},
        {"allocator": "expandable"},
    ),
    "AMD": (
        FakeTorch((RADEON,), hip="6.4", version_text="2.9.0+rocm6.4", cudnn=91_002),
        {"environment": {"PYTORCH_HIP_ALLOC_CONF": "expandable_segments:True"}},
        {
            "device_name": "AMD Radeon RX 7900 XTX", "multiprocessors": 48, "backend": "rocm",
            "compute_capability": None, "supports_fp8": False, "pcie_generation": None,
            "pcie_width": None, "bus_gb_per_s": 25.2, "torch_version": "2.9.0+rocm6.4",
            "notes": (hardware._ROCM,),
        },
    ),
    "a GPU in the RAM": (
        FakeTorch((Card("NVIDIA GB10", (12, 1), 48, 60 * GIB, 55 * GIB, integrated=True),)),
        {},
        {
            "device_name": "NVIDIA GB10", "compute_capability": (12, 1), "multiprocessors": 48,
            "device_total_bytes": 60 * GIB, "device_free_bytes": 40 * GIB - ON_CARD,
            "device_used_by_others_bytes": 0, "shares_ram": True,
            "notes": (hardware._ONE_MEMORY,),
        },
    ),
    "no GPU": (FakeTorch(), {}, BARE),
    "Apple": (
        FakeTorch(has_mps=True, has_xpu=False, version_text="2.13.0"),
        {"system": "Darwin"},
        BARE
        | {
            "os": "Darwin", "torch_version": "2.13.0", "process_bytes": None,
            "notes": (f"the CPU computes: {hardware._REFUSED['mps']}",),
        },
    ),
    "Intel": (
        FakeTorch(has_xpu=True, version_text="2.13.0+xpu"),
        {},
        BARE
        | {
            "torch_version": "2.13.0+xpu",
            "notes": (f"the CPU computes: {hardware._REFUSED['xpu']}",),
        },
    ),
    "Intel beside NVIDIA": (FakeTorch((Card(),), has_xpu=True), {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_of_a_machine(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, around, differs = MACHINES[machine]
    nvml = FakeNvml(fake.cards)
    put_in_place(monkeypatch, fake, **({"nvml": nvml} | around))
    assert system_resources().to_dict() == LINUX | differs
    assert nvml.open == 0


def test_the_card_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Card("Second", (8, 6), 30, 12 * GIB, 11 * GIB, 0, 0, "GPU-77", 3, 4)
    fake = FakeTorch((Card(), second))
    put_in_place(monkeypatch, fake, nvml=FakeNvml(fake.cards))
    found = system_resources("cuda:1", evictable_bytes=3, ram_evictable_bytes=4, folder="x")
    assert set(fake.asked) == {"cuda:1"}
    differs = {
        "device": "cuda:1", "device_name": "Second", "device_total_bytes": 12 * GIB,
        "device_free_bytes": 11 * GIB - ON_CARD, "device_used_by_others_bytes": GIB,
        "supports_fp8": False,
        "compute_capability": (8, 6), "multiprocessors": 30, "pcie_generation": 3, "pcie_width": 4,
        "bus_gb_per_s": 3.2, "evictable_bytes": 3, "ram_evictable_bytes": 4,
    }  # fmt: skip
    assert found.to_dict() == LINUX | differs
    assert system_resources("cuda").device == "cuda:0"
    assert system_resources("cpu:0").device == "cpu"
    with pytest.raises(InvalidRequest, match="'cuda:2'; this machine has cuda:0, cuda:1, cpu"):
        system_resources("cuda:2")


@pytest.mark.parametrize("fails", ["start", "handle"])
def test_nvml_may_fail(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml((Card(),), fails=fails)
    put_in_place(monkeypatch, FakeTorch((Card(),)), nvml=nvml)
    found = system_resources()
    assert (found.pcie_generation, found.pcie_width) == (None, None)
    assert nvml.open == 0


def test_numbers_that_contradict_each_other_are_not_negative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two questions to a driver another program may have freed or taken memory."""
    for card in (replace(Card(), reserved=9 * GIB), replace(Card(), reserved=GIB)):
        put_in_place(monkeypatch, FakeTorch((card,)))
        found = system_resources()
        assert found.device_used_by_others_bytes == max(0, 7 * GIB - card.reserved)
        free = 17 * GIB + max(0, card.reserved - 3 * GIB)
        assert found.device_free_bytes == free - ON_CARD


def test_kernels_that_are_on_the_card_are_not_still_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_in_place(monkeypatch, FakeTorch((Card(),)))
    monkeypatch.setattr(hardware, "done_here", lambda _: ("card", "encode", "imports"))
    assert system_resources().device_free_bytes == 19 * GIB


@pytest.mark.parametrize("cards", [(), (Card(),)], ids=["alone", "beside NVIDIA"])
@pytest.mark.parametrize(
    ("device", "whose"),
    [("mps", "Apple"), ("mps:0", "Apple"), ("xpu", "Intel"), ("xpu:1", "Intel")],
)
def test_apple_and_intel_gpus_are_refused(
    device: str, whose: str, cards: tuple[Card, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(monkeypatch, FakeTorch(cards, has_mps=True, has_xpu=True))
    with pytest.raises(InvalidRequest, match=f"{device}.*{whose}.* not supported.*--cpu") as caught:
        system_resources(device)
    assert caught.value.field == "device"
    assert system_resources("cpu").device == "cpu"
    assert system_resources("cpu").notes == ()


def test_refused_kinds_are_claimed_nowhere() -> None:
    root = Path(__file__).parents[2]
    metadata = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert "NVIDIA CUDA" in metadata and "Apple" not in metadata and "Intel" not in metadata
    readme = (root / "README.md").read_text(encoding="utf-8")
    for whose in ("Apple", "Intel"):
        line = next(line for line in readme.splitlines() if line.startswith("|") and whose in line)
        assert "not supported" in line


CUDA, HIP, ANY = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
ON, OFF = "expandable_segments:True", "expandable_segments:False"
ALLOCATORS: list[tuple[dict[str, str], str, str | None, str]] = [
    # environment, torch, HIP (None: CUDA), the allocator on Linux
    ({}, "2.13.0", None, "default"),
    ({CUDA: ""}, "2.13.0", None, "default"),
    ({CUDA: ON}, "2.6.0", None, "expandable"),
    ({CUDA: ON}, "2.13.0+cu130", None, "expandable"),
    ({CUDA: "max_split_size_mb:9, Expandable_Segments: true"}, "2.13.0", None, "expandable"),
    ({CUDA: OFF}, "2.13.0", None, "default"),
    ({ANY: ON}, "2.6.0", None, "default"),
    ({ANY: ON}, "2.9.1+cu128", None, "default"),  # pytorch issue 183387
    ({ANY: ON}, "2.10.0+cu128", None, "expandable"),
    ({ANY: ON}, "2.13.0a0+git1", None, "expandable"),
    ({ANY: ON}, "3.0.0", None, "expandable"),
    ({ANY: ON}, "unknown", None, "default"),
    ({ANY: ON, CUDA: OFF}, "2.9.1", None, "default"),
    ({ANY: OFF, CUDA: ON}, "2.9.1", None, "expandable"),
    ({ANY: OFF, CUDA: ON}, "2.10.0", None, "default"),
    ({ANY: ON, CUDA: OFF}, "2.10.0", None, "expandable"),
    ({HIP: ON}, "2.9.1", None, "default"),
    ({HIP: ON}, "2.11.0+rocm7.1", "7.1", "default"),
    ({HIP: ON}, "2.12.0+rocm7.2", "7.2.1", "expandable"),
    ({HIP: ON}, "2.12.0+rocm6.4", "6.4", "default"),
    ({CUDA: ON}, "2.12.0+rocm7.2", "7.0", "expandable"),
    ({CUDA: OFF, HIP: ON}, "2.12.0+rocm7.2", "7.2", "default"),
    ({ANY: ON}, "2.9.1+rocm7.2", "7.2", "default"),
]


@pytest.mark.parametrize(("environment", "version", "hip", "expected"), ALLOCATORS)
def test_the_allocator_is_known(
    environment: dict[str, str], version: str, hip: str | None, expected: str
) -> None:
    def found(backend: str, system: str) -> str:
        return hardware.allocator(backend, environment, system, torch_version=version, hip=hip)

    assert found("native", "Linux") == expected
    assert found("native", "Windows") == "default"
    assert found("cudaMallocAsync", "Linux") == found("hipMallocAsync", "Windows") == "async"


def test_the_hip_variable_counts_before_torch_2_10_on_rocm_only() -> None:
    """No such torch has expandable segments on ROCm; the order is torch's all the same."""
    told = {HIP: ON, CUDA: OFF}
    assert cards._settings(told, (2, 9), "7.2") == OFF
    assert cards._settings({HIP: ON}, (2, 9), "7.2") == ON
    assert cards._settings({HIP: ON}, (2, 9), None) == ""
    assert cards._settings({HIP: ON, ANY: OFF}, (2, 9), "7.2") == ON


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


# ------------------------------------------------------------------------------ small things


@pytest.mark.parametrize(
    ("system", "environment", "loaded", "sets"),
    [
        ("Linux", {}, False, True),
        ("Linux", {}, True, False),
        ("Windows", {}, False, False),
        ("Linux", {CUDA: ""}, False, False),
        ("Linux", {HIP: OFF}, False, False),
        ("Linux", {ANY: OFF}, False, False),
    ],
)
def test_gaps_are_closed_where_nobody_has_said_otherwise(
    system: str, environment: dict[str, str], loaded: bool, sets: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    put_in_place(monkeypatch, FakeTorch(), system=system, environment=dict(environment))
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch")
    hardware.close_gaps()
    assert os.environ == environment | ({CUDA: ON} if sets else {})


def test_a_reserve_of_ram_is_left_to_others() -> None:
    from wan_core.plan.config import OptimizationConfig
    from wan_core.plan.ladder import Limits

    assert hardware.RAM_RESERVE == GIB
    assert Limits.of(cpu(64), OptimizationConfig()).ram == 63 * GIB
    assert Limits.of(gpu(24, ram=0.5), OptimizationConfig()).ram == 0


def test_ram_is_unknown_where_only_psutil_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for system in ("Windows", "Darwin"):
        put_in_place(monkeypatch, FakeTorch(), system=system)
        monkeypatch.setitem(sys.modules, "psutil", None)
        with pytest.raises(MissingDependency, match="psutil is not installed.*pip install psutil"):
            hardware.ram()


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert hardware._disk_free(tmp_path / "a/b/c") == hardware._disk_free(tmp_path) > 0


def test_a_disk_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(hardware.shutil, "disk_usage", fails)
    assert hardware._disk_free(tmp_path) == 0


def test_lanes_of_every_generation() -> None:
    nominal = {1: 4.0, 2: 8.0, 3: 15.75, 4: 31.5, 5: 63.0, 6: 121.0}  # GB/s of 16 lanes, one way
    for generation, rate in nominal.items():
        bus = gpu(24, pcie_generation=generation, pcie_width=16).bus_bytes_per_second
        assert bus == pytest.approx(0.8e9 * rate, rel=0.01)
    assert gpu(24, pcie_generation=9).bus_bytes_per_second == gpu(24).bus_bytes_per_second


@pytest.mark.parametrize(("held", "counted"), [(None, 0), (600, 600), (1600, 1600), (30_000, 3072)])
def test_what_the_interpreter_holds_is_not_asked_of_the_system_again(
    held: int | None, counted: int
) -> None:
    """And what the process holds for others counts neither as needed nor as there."""
    mib = 2**20
    for machine in (gpu(24, ram=16), cpu(16)):
        system = replace(machine, process_bytes=None if held is None else held * mib)
        assert system.usable_ram_bytes == 15 * 2**30 + counted * mib
        if held is not None:
            warm = replace(system, done_here=("card", "decode", "denoise", "encode", "imports"))
            assert warm.process_ram() == counted * mib
