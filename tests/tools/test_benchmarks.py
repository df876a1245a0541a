"""Benchmarks that measure on a GPU are gone through here, so that they do not fail there first."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_memory

    return gpu_memory


def test_gpu_memory_with_small_models(
    gpu_memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = (gpu_memory.STREAMED, gpu_memory.REFERENCE)
    cases = [case for case in gpu_memory.CASES if case.name in kept]
    monkeypatch.setattr(gpu_memory, "CASES", cases)
    monkeypatch.setattr(gpu_memory, "LATER", gpu_memory.LATER[:1])
    assert gpu_memory.main(["--tiny", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu_memory_cpu.json").read_text())
    assert len(found["notes"]) == 1, "the weights' size; nothing skipped, nothing failed"
    _, streamed, resident, short, group = found["runs"]
    assert all(run["success"] for run in found["runs"])
    assert "the rest streamed" in " ".join(streamed["applied"])
    assert streamed["latents"] == resident["latents"] is not None
    assert streamed["step_seconds"] > 0
    assert short["step_seconds"] is None and short["latents"] is None
    assert "transformer group" in group["applied"]
    equal = {(row["case"], row["way"]): row["equal_bits"] for row in found["passes"]}
    assert len(equal) == 10
    assert all(same for (_, way), same in equal.items() if way == "lean")
    ways = {row["way"] for row in found["decodes"] if row["equal_bits"]}
    assert {"lean", "lean, its cache in RAM"} <= ways
    text = (tmp_path / "gpu_memory_cpu.md").read_text()
    assert "| step, streamed / resident, diffusers' forward | " in text


def test_the_arithmetic_agrees_with_what_an_h100_allocated(gpu_memory: Any) -> None:
    found = json.loads((BENCHMARKS / "results/gpu_memory_h100.json").read_text())
    gpu_memory.predict_again(found)
    errors = {
        (run["case"], stage["name"]): stage["predicted"] / stage["allocated"] - 1
        for run in found["runs"]
        for stage in run["stages"]
        if stage["predicted"]
    }
    assert len(errors) > 20
    assert all(-0.005 < error < 0.025 for error in errors.values()), errors
    for row in found["decodes"]:
        if row["case"].endswith("fp32"):
            assert row["predicted"] == pytest.approx(row["allocated"], rel=0.005)


def test_gpu_memory_keeps_what_it_found(gpu_memory: Any, tmp_path: Path) -> None:
    bench = gpu_memory.Bench("cpu", tmp_path, tmp_path, budget=10, tiny=False)

    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    bench.part("long", 11, fails)
    bench.part("failing", 1, fails)
    bench.part("fine", 1, lambda: bench.note("done"))
    assert "skipped" in bench.found["notes"][0]
    assert bench.found["notes"][1:] == ["failing: OutOfMemoryError: CUDA out of memory.", "done"]
    assert json.loads((tmp_path / "gpu_memory_cpu.json").read_text())["notes"][-1] == "done"


def test_gpu_memory_caps_the_allocator(
    gpu_memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = gpu_memory.Bench("cpu", tmp_path, tmp_path, budget=10, tiny=False)
    bench.cuda, told = True, []
    properties = type("Properties", (), {"total_memory": 80 * 2**30})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share)
    )
    for gib in (4, 200, None):
        bench.cap(gib)
    assert told == [0.05, 1.0]


def test_traced_peak_of_small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import traced_peak

    case = (traced_peak.A14B, (256, 256, 17), 0.7, None)
    rows = list(traced_peak.denoise_rows([case]))
    assert [row.way for row in rows[:2]] == ["diffusers", "lean"]
    assert rows[0].ratio == 1 and rows[1].ratio < 0.7
    assert traced_peak.table(rows, "MiB", 2**20, 0)[3].endswith("| 0.70 | met |")


def test_the_page_of_machines_is_what_the_planner_says(tmp_path: Path) -> None:
    """None of the common models is refused on a common computer, and the page is up to date."""
    sys.path[:0] = [str(BENCHMARKS)]
    try:
        import machines_table
    finally:
        sys.path.remove(str(BENCHMARKS))
    page = machines_table.table(tmp_path)
    assert "refused" not in page
    assert page == (BENCHMARKS.parent / "docs" / "machines.md").read_text(encoding="utf-8")
    assert page.count("\n| A14B") == 8 * 5 * 2 and page.count("\n| 5B") == 8
