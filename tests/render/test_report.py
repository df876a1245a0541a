"""What a report says of the kernels that computed a stage, and of those that were planned."""

from __future__ import annotations

import gc
import mmap
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.machines import cpu, gpu, stored_pair

from wan_core import OptimizationConfig
from wan_core.config import StageReport
from wan_core.memory import Choices, process_bytes
from wan_core.render import report


@pytest.mark.parametrize(
    ("attention", "products", "note", "said"),
    [
        ("", (0, 0), "before", []),  # computed by other processes
        ("cuDNN", (0, 0), "attention: cuDNN", ["Attention in 8 bit was planned, and cuDNN"]),
        ("Sage", (2, 5), "attention: Sage, products in 8 bit: 2 of 5 kinds of layers", []),
        ("Sage", (0, 5), "attention: Sage, products in 8 bit: 0 of 5 kinds of layers",
         ["Products in 8 bit were planned"]),
    ],
)  # fmt: skip
def test_what_was_planned_and_did_not_come_is_said(
    monkeypatch: pytest.MonkeyPatch, attention: str, products: tuple[int, int], note: str,
    said: list[str],
) -> None:  # fmt: skip
    """What other stages have used does not count for this one."""
    used = [("math", (9, 9)), (attention, products)]
    monkeypatch.setattr(report, "used_attention", lambda: used[0][0])
    monkeypatch.setattr(report, "used_products", lambda: used.pop(0)[1])
    stage, told = StageReport(name="denoise", note="before"), list[str]()
    with report.kernels_noted(stage, Choices(dtypes={}, attention_8bit=True), told.append):
        pass
    assert stage.note == note and not used
    assert [text[: len(start)] for text, start in zip(told, said, strict=True)] == said
    plain = [("cuDNN", (0, 0))] * 2
    monkeypatch.setattr(report, "used_attention", lambda: plain[0][0])
    monkeypatch.setattr(report, "used_products", lambda: plain.pop()[1])
    with report.kernels_noted(stage, Choices(dtypes={}), told.append):
        pass
    assert len(told) == len(said)


@pytest.mark.parametrize(
    ("machine", "limits", "words"),
    [
        (gpu(24, ram=8), {}, "9,000 MiB of RAM, where 7,168 MiB can be used"),
        (gpu(24, ram=64), {"ram_limit_gb": 4}, "9,000 MiB of RAM, where 4,096 MiB can be used"),
        (gpu(24, ram=64), {}, "30,000 MiB on GPU 24, where 23,839 MiB can be used"),
        (gpu(80), {"vram_limit_gb": 8}, "30,000 MiB on GPU 80, where 8,192 MiB can be used"),
        (cpu(8), {}, "30,000 MiB on a CPU, where 7,168 MiB can be used"),
        (cpu(64), {"ram_limit_gb": 16}, "30,000 MiB on a CPU, where 16,384 MiB can be used"),
    ],
)
def test_a_job_that_does_not_fit_names_the_memory_that_is_short(
    machine: Any, limits: dict[str, Any], words: str
) -> None:
    """And how much of it the planner may use: less than is free, by the limits that are set."""
    needs: Any = SimpleNamespace(host_ram_mb=9000, peak_usage_mb=30_000)
    nothing: Any = None
    forecast = report.Forecast(
        request=nothing, workload=nothing, system=machine, plan=None, estimate=needs
    )
    assert forecast.shortage(OptimizationConfig(**limits)) == words


def test_other_files_are_advised_only_where_there_are_smaller_ones() -> None:
    def told(kind: str) -> str:
        return report.out_of_ram(stored_pair(kind), "denoise_low", "no memory")

    assert told("fp8").endswith("not the device's memory. Close other programs.")
    assert told("fp32 encoder").endswith("programs, or take the text encoder in fp8 or GGUF.")
    assert "the transformer and the text encoder and the transformer 2" in told("bf16")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell them apart")
def test_on_a_cpu_a_stages_peak_is_what_its_estimate_counts(tmp_path: Path) -> None:
    """Pages of a mapped file can be taken back, and are in no estimate's bytes."""
    size, path = 64 * 2**20, tmp_path / "weights"
    path.write_bytes(bytes(size))
    timeline = report.Timeline(torch.device("cpu"))

    def rise_by(what: Any) -> int:
        gc.collect()
        before = process_bytes()
        with timeline.stage("decode") as stage:
            held = what()
            timeline.sample()
        del held
        assert stage.measured_peak_bytes is not None and before is not None
        return stage.measured_peak_bytes - before

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert rise_by(lambda: sum(mapped[:: mmap.PAGESIZE])) < size // 2
        assert rise_by(lambda: torch.ones(size, dtype=torch.uint8)) > size // 2
    assert timeline.peak_bytes > size
