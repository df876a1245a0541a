"""Benchmarks that measure on a GPU are gone through here, so that they do not fail there first."""

from __future__ import annotations

import ast
import importlib.util
import json
import mmap
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan_core.plan.stage_seconds import StageSeconds

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


@pytest.fixture
def stored_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import stored_model

    return stored_model


@pytest.mark.slow
def test_files_people_have_with_small_models(
    stored_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import files_people_have as program

    kinds = ("fp8_scaled", "Q4_K")
    wanted = [run for run in program.RUNS if run.kind in kinds and run.cap in (8, 24)]
    monkeypatch.setattr(program, "RUNS", [run for run in wanted if run.ram != 32])
    kept = ["--tiny", "--output", str(tmp_path), "--kinds"]
    assert program.main([*kept, "fp8_scaled"]) == 0
    assert program.main([*kept, "Q4_K"]) == 0
    found = json.loads((tmp_path / "files_people_have_cpu.json").read_text())
    assert [row["kind"] for row in found["layers"]] == list(kinds), "the first kind was kept"
    assert not [note for note in found["notes"] if "Error" in note or "skipped" in note]
    for row in found["layers"]:
        assert row["equal"] and row["streamed_equal"] and row["ratio"] > 0
        assert 0 < row["share"] < 2 and row["dequantise_seconds"] > 0
    runs = {run["case"]: run for run in found["runs"]}
    capped = runs["fp8_scaled, 8 GiB, RAM 16 GiB"]
    assert "control group" in capped["ram_by"]
    for run in runs.values():
        assert run["success"] and len(run["steps"]) == (2 if run["low"] else 1)
        names = [stage["name"] for stage in run["stages"]]
        assert ("decode" in names) == run["decode"]
        assert ("denoise_low" in names) == run["low"]
        assert all(stage["host"] > 0 for stage in run["stages"])
        same = [r for r in runs.values() if r["kind"] == run["kind"]]
        assert {r["latents"][0] for r in same} == {run["latents"][0]}
    text = (tmp_path / "files_people_have_cpu.md").read_text()
    assert "| fp8_scaled: latents of 3 runs under caps | equal | equal |" in text
    assert "| RAM: P95 of the stages' error | " in text


def test_constants_of_a_process_follow_from_what_each_stage_holds(stored_model: Any) -> None:
    """Made of known terms, in both orders of the stages, with weights and a tokenizer beside."""
    import host_base as program

    mib, tokens = 2**20, 256_300
    terms = {"imports": 226, "card": 330, "encode": 100, "denoise": 130, "decode": 115}
    tokenizer, weights = 117, {"text_encode": 8, "denoise_low": 246, "decode": 900}

    def row(clip: int, stage: str, done: list[str], *, tokens: bool, locked: int = 0) -> Any:
        held = 300 + sum(terms[name] for name in ("imports", "card", *done))
        held += weights[stage] + tokenizer * tokens + locked
        return {"clip": clip, "stage": stage, "held": held * mib, "known": weights[stage] * mib,
                "locked after": locked * mib, "at plan": 300 * mib}  # fmt: skip

    usual = [row(0, "text_encode", ["encode"], tokens=True),
             row(0, "denoise_low", ["encode", "denoise"], tokens=True, locked=40),
             row(0, "decode", ["encode", "denoise", "decode"], tokens=True)]  # fmt: skip
    late = [row(0, "decode", ["denoise", "decode"], tokens=False),
            row(1, "text_encode", ["denoise", "decode", "encode"], tokens=True)]  # fmt: skip
    compiled = [{**one, "held": one["held"] + 150 * mib} for one in usual]
    grown = {"interpreter": 10, "torch": 260, "diffusers and transformers": 226, "tokenizer": 117,
             "tokenizer dropped": -117, "context": 60, "text encoder, mapped": 9,
             "sent to the card": 7}  # fmt: skip
    steps, held = [], 0
    for name, more in grown.items():
        held += more
        peak = held + (169 if name == "sent to the card" else 0)
        steps.append({"step": name, "held": held * mib, "peak": peak * mib})
    found = program.constants(
        {"steps": steps, "tokens": tokens, "warm": usual, "cold": compiled, "embeds": late}
    )
    assert {name: found[name] for name in terms} == {n: v * mib for n, v in terms.items()}
    assert found["compiler"] == 150 * mib and found["tokenizer"] == 117 * mib
    assert found["a token"] == round(117 * mib / tokens)
    assert found["sending"] == (169 + 7) * mib
    assert found["interpreter with torch and context"] == (10 + 260 + 60) * mib


@pytest.mark.slow
def test_host_base_with_small_models(stored_model: Any, tmp_path: Path) -> None:
    import host_base as program

    assert program.main(["--tiny", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "host_base_cpu.json").read_text())
    assert [row["step"] for row in found["steps"]][-1] == "tokenizer dropped"
    for name, clips in (("cold", 3), ("warm", 3), ("embeds", 2)):
        stages = [(row["clip"], row["stage"]) for row in found[name] if row["planned"] is not None]
        assert {(clip, "decode") for clip in range(clips)} <= set(stages)
        for row in found[name]:
            assert row["peak"] >= row["held"] - 8 * 2**20 > row["known"] >= 0
            if row["planned"]:  # libraries of the CPU take less than is planned, once
                assert 0.9 < row["planned"] / row["peak"] < (1.6 if row["clip"] == 0 else 1.35)
    told = program.constants(found)
    assert 100 < told["imports"] / 2**20 < 300 and abs(told["card"]) < 50 * 2**20


@pytest.mark.parametrize("kind", ["fp8_scaled", "Q4_K", "int8_convrot", "bf16", "Q8_0"])
def test_stored_models_are_weights_of_ordinary_size(
    stored_model: Any, kind: str, tmp_path: Path
) -> None:
    from stored_layers import TINY_SHAPES

    from wan_core.loading import load_component

    model = stored_model.StoredModel(tmp_path, TINY_SHAPES, 2**14)
    model.transformer("bf16" if kind != "bf16" else "Q4_K")
    model.transformer(kind)  # over the first one
    assert model.nbytes == model.path("high").stat().st_size == model.path("low").stat().st_size
    loaded = load_component(model.path("high"), torch.float32, kind="transformer")
    blocks = [dict(block.named_parameters()) for block in loaded.blocks]
    for name, weight in blocks[0].items():
        assert torch.equal(weight, blocks[1][name])
        if weight.ndim == 2:
            assert weight.std() == pytest.approx(0.02, rel=0.05), name
            assert abs(weight.mean()) < 1e-3 and weight.abs().max() < 0.2
    model.part_experts()
    assert model.path("high").stat().st_ino != model.path("low").stat().st_ino
    assert model.path("high").read_bytes() == model.path("low").read_bytes()


def test_stored_models_are_laid_out_as_published(stored_model: Any) -> None:
    from random_model import Shapes

    entries = stored_model.transformer_entries("fp8_scaled", Shapes())
    header, places = stored_model.safetensors_header(entries)
    assert len(places) == 1908
    assert len(header) + sum(entry.nbytes for entry in entries) == 14_293_923_632
    text = stored_model.text_entries(Shapes(), stored_model.PIECES)
    header, _ = stored_model.safetensors_header(text)
    whole = len(header) + sum(entry.nbytes for entry in text)
    assert whole == pytest.approx(6_735_906_897, rel=1e-4)  # but for its tokenizer


def test_host_watch_counts_what_the_system_cannot_take_back(
    stored_model: Any, tmp_path: Path
) -> None:
    import host_memory

    path, size = tmp_path / "file", 64 * 2**20
    path.write_bytes(bytes(size))
    watch = host_memory.HostWatch()
    try:
        before = watch.look()
        mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        assert int(mapped.max()) == 0
        assert watch.peak(before.at).counted - before.counted < size / 4
        # Not from the heap: what a process freed before stays counted there, and is used again.
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own:
            own.write(bytes([1]) * size)
            watch.look()  # between two of its own looks the memory could come and go
        assert size * 0.9 < watch.peak(before.at).counted - before.counted < size * 1.5
    finally:
        watch.close()


def test_parts_of_more_worth_keep_their_seconds(gpu_memory: Any, tmp_path: Path) -> None:
    bench = gpu_memory.Bench("cpu", tmp_path, tmp_path, budget=100, tiny=False)
    bench.part("little", 30, lambda: bench.note("done"), kept=80)
    assert "skipped, needs about 30 s" in bench.found["notes"][0]
    bench.part("more", 30, lambda: bench.note("done"), kept=60)
    assert bench.found["notes"][1] == "done"


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


def test_convolutions_in_both_layouts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every convolution of both halves is asked, each with its own shape and stride."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import conv_layouts

    plain = torch.nn.functional.conv3d
    monkeypatch.setattr(conv_layouts, "CASES", conv_layouts.CASES[:1])
    monkeypatch.setattr(conv_layouts, "DTYPES", {"fp32": torch.float32})
    assert conv_layouts.main(["--tiny", "--output", str(tmp_path)]) == 0
    assert torch.nn.functional.conv3d is plain
    rows = json.loads((tmp_path / "conv_layouts_cpu.json").read_text())["rows"]
    assert {row["half"] for row in rows} == {"decode", "encode"}
    assert {tuple(row["stride"]) for row in rows} == {(1, 1), (2, 2), (1, 1, 1), (2, 1, 1)}
    assert all(row["error"] < 1e-5 and row["first_ms"] > 0 for row in rows)
    text = (tmp_path / "conv_layouts_cpu.md").read_text()
    assert "| VAE 2.1, 480p | fp32 | decode | " in text


@pytest.mark.slow
def test_a_clip_on_two_workers_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "many.py"), "--tiny"]
    command += ["--devices", "1", "2", "--output", str(tmp_path), "--folder", str(tmp_path)]
    subprocess.run(command, check=True, cwd=BENCHMARKS.parent, timeout=170)
    found = json.loads((tmp_path / "many_cpu.json").read_text())
    cases = ("whole", "windows", "whole without guidance")
    expected = [(case, count) for case in cases for count in (1, 2)]
    streamed = ("streamed, shared", "streamed by each", "fp8 streamed by each")
    expected += [(case, 2) for case in (*streamed, "fp8 streamed, shared")]
    runs = {(one["case"], one["devices"]): one for one in found["runs"]}
    assert set(runs) == set(expected) and len(found["runs"]) == len(expected)
    cut = [0, 0, 0, 0, 0, 3, 3, 3, 2, 2]
    assert [runs[key]["cut_passes"] for key in expected] == cut
    for case in cases:
        alone, shared = runs[case, 1], runs[case, 2]
        assert alone["finite"] and alone["bits"] == shared["bits"]
        assert alone["workers"] == [] and shared["workers"] == ["cpu", "cpu"]
    assert [runs[one, 2]["shared_weights"] for one in streamed] == [True, False, False]
    # What one card took teaches the pace of those that come after.
    assert [runs[key]["predicted_paced"] for key in expected] == [False, *[True] * 9]
    assert "OTHER" not in (tmp_path / "many_cpu.md").read_text()
    whole, strips = found["decodes"]
    assert (whole["devices"], strips["devices"]) == (1, 2) and strips["error"] < 1e-6
    assert "| decode | cards | " in (tmp_path / "many_cpu.md").read_text()
    assert whole["predicted_seconds"] > 0


@pytest.fixture
def many_cases(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import many_cases

    return many_cases


def test_cases_come_with_what_they_are_compared_with(many_cases: Any) -> None:
    def names(words: list[str], known: tuple[str, ...] = ()) -> list[tuple[str, list[int]]]:
        found = many_cases.chosen(many_cases.CASES, words, [1, 2], known)
        return [(case.name, counts) for case, counts in found]

    bare, each = "480p81 without guidance", "fp8 streamed by each"
    streamed = [("480p81 streamed, shared", [2]), ("480p81 streamed by each", [2])]
    assert names(["480p81 streamed"]) == [(bare, [1]), *streamed]
    assert names(["480p81 streamed"], (bare,)) == streamed
    assert names(["fp8 without"]) == [(each, [2]), ("fp8 without guidance", [2])]
    every = names([""])
    assert [name for name, _ in every] == [case.name for case in many_cases.CASES]
    assert every[0][1] == [1, 2]
    with pytest.raises(ValueError, match=f"'overlap' is in no case's name.*{bare}"):
        names(["streamed", "overlap"])


def test_a_row_without_one_to_compare_with_says_so(many_cases: Any) -> None:
    import many_report

    run = {
        "case": "a", "beside": "b", "devices": 2, "workers": ["cuda:0", "cuda:1"], "gang": 2,
        "units": 1, "step_seconds": 1.5, "assumed_step_seconds": 1.4, "predicted_step_seconds": 1.4,
        "bits": "x", "peak_mib": [10, 11], "predicted_peak_mib": 12,
    }  # fmt: skip
    alone = run | {"case": "b", "beside": "b", "devices": 1, "workers": [], "gang": 1}
    alone |= {"step_seconds": 3.0, "peak_mib": [20]}
    failed = run | {"case": "c", "step_seconds": None, "peak_mib": [], "errors": ["no memory"]}
    found: dict[str, Any] = {
        "device": "card", "command": "many", "date": "today", "versions": {}, "decodes": [],
        "notes": [], "kept": {}, "order": [],
    }  # fmt: skip

    def rows(*runs: dict[str, Any]) -> list[str]:
        text = many_report.table(found | {"runs": list(runs)})
        return [line for line in text.splitlines() if line[:4] in ("| a ", "| b ", "| c ")]

    assert rows(run) == ["| a | 1 x 2 of 2 | 1.50 | 1.40 | - | - | no row of b | 10, 11 (12) |"]
    assert rows(alone, run)[1].endswith("| 1.40 | 2.00 | 1.00 of 2.00 | equal | 10, 11 (12) |")
    for line in rows(run, alone, failed):
        assert all(cell.strip() for cell in line.strip("|").split("|")) or "failed" in line


def test_what_passes_until_the_first_step_is_told_beside_its_prediction(many_cases: Any) -> None:
    """Of rows that have one: earlier ones do not. Processes that are there need no start."""
    import many
    import many_report

    stages = [StageSeconds("start workers", 9.5, 9.5), StageSeconds("load transformer", 3.0, 8.0)]
    stages.append(StageSeconds("denoise_high", 20.0, 20.0, 5.5))
    plan = SimpleNamespace(stage_seconds=stages, step_seconds=2.0)
    new, again = (many.until_first_step(plan, fresh) for fresh in (True, False))
    assert sum(new.values()) == 20 and sum(again.values()) == 5
    row = {"case": "a", "devices": 2, "first_step_after": 25.0, "predicted_first_step": new}
    lines = many_report.begin_table([{"case": "old", "first_step_after": 3.0}, row])
    assert lines[-1].startswith("| a | 2 | 25.0 | 20.0 | 0.80 | start workers 9.5, load ")
    assert len(lines) == 4 and many_report.begin_table([{"case": "old"}]) == []
    pace, (case, *_) = many_cases.Pace(), many_cases.CASES
    assert pace.starts(case, 1) and pace.starts(case, 2)
    pace.learn(case, 2, 60.0, 3.0)
    assert pace.starts(case, 1) and not pace.starts(case, 2)


def test_a_run_s_seconds_are_told_beside_what_was_predicted_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stage by stage, without what it leaves out; what lies outside of its stages, too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import files_people_have as program
    import files_report

    names = ("load text_encoder", "load tokenizer", "text_encode", "load transformer", "denoise",
             "load vae", "give back page locks", "decode")  # fmt: skip
    plan = SimpleNamespace(stage_seconds=[StageSeconds(name, 1.0, 3.0) for name in names])
    beside = ("load tokenizer", "give back page locks")

    def row(*made: str) -> dict[str, Any]:
        return {"stages": [{"name": name, "seconds": 2.0} for name in made]}

    whole = row(*(name for name in names if name not in beside))
    program.seconds_told(whole, plan, 15.0, cold=False)
    assert whole["predicted_seconds"] == 8 and whole["predicted_outside_seconds"] == 2
    assert whole["outside_seconds"] == 15 - 6 * 2
    assert {stage["predicted_seconds"] for stage in whole["stages"]} == {1.0}
    short = row("load text_encoder", "text_encode", "load transformer", "denoise")
    program.seconds_told(short, plan, 9.0, cold=True)
    assert short["predicted_seconds"] == 18 and short["predicted_outside_seconds"] == 6
    assert files_report.seconds_ratio(short | {"seconds": 9.0}) == 2
    assert files_report.seconds_ratio({"predicted_seconds": 9.0, "seconds": 4.5}) is None
    assert files_report._seconds(2.0, 1.0) == "2.00 | 1.000 | 0.500"
    assert files_report._seconds(2.0, None) == "2.00 | - | -"  # of an earlier run


def test_every_benchmark_and_tool_finds_what_it_imports() -> None:
    """Most begin on a card only: a name that has moved would be noticed there."""
    for path in [*BENCHMARKS.glob("*.py"), *(BENCHMARKS.parent / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wan_core"):
                module = importlib.import_module(str(node.module))
                for name in (one.name for one in node.names):
                    inside = hasattr(module, "__path__") and importlib.util.find_spec(
                        f"{node.module}.{name}"
                    )
                    assert hasattr(module, name) or inside, f"{path.name}: {node.module}.{name}"


@pytest.fixture
def many_profile(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import many_profile

    return many_profile


def a_pass(found: Any, blocks: int, late: float) -> list[Any]:
    """Blocks of 40 ms after 5 ms of other work; one that is ``late`` is waited for by the others.

    v's exchange is hidden behind a product but for ``late``; the others have nothing beside them.
    """
    made, now = [found.Activity("void at::native::elementwise_kernel", 0.0, 5.0)], 5.0

    def does(name: str, took: float) -> None:
        nonlocal now
        made.append(found.Activity(name, now, now + took))
        now += took

    for _ in range(blocks):
        does("nvjet_hsh_128x256", 4.0)
        made.append(found.Activity("ncclDevKernel_SendRecv(x)", now, now + 1.0 + late))
        does("nvjet_hsh_128x256", 1.0)
        now += late
        for name, took in (
            ("ncclDevKernel_SendRecv(x)", 2.0), ("ncclDevKernel_SendRecv(x)", 3.0),
            ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 20.0),
            ("ncclDevKernel_SendRecv(x)", 4.0), ("Memcpy DtoD (Device -> Device)", 2.0),
            ("_norm_kernel", 3.0),
        ):  # fmt: skip
            does(name, took)
        now += 1.0  # a gap
    does("ncclDevKernel_AllGather_RING_LL(x)", 9.0)
    return made


def test_a_blocks_time_is_taken_apart(many_profile: Any) -> None:
    found, ranks = many_profile, []
    for late in (0.0, 0.5):
        few, many = (a_pass(found, n, late) for n in (found.FEW, found.MANY))
        block = found.per_block(found.pass_times(few), found.pass_times(many))
        swaps = [one.end - one.begin for one in many if one.kind == "exchange"]
        ranks.append(
            {"block": block, "exchanges": swaps, "kernels": 9, "host_ms": 3, "equal": True}
        )
        assert block == pytest.approx({
            "all": 40 + late, "products": 5, "attention": 20, "element-wise": 3, "copies": 2,
            "exchange": 10 + late, "exposed": 9 + late, "gaps": 1,
        })  # fmt: skip
    first, second = found.waiting([one["exchanges"] for one in ranks])
    assert first == [(1, 0), (2, 0), (3, 0), (4, 0)] and second == [(1, 0.5), *first[1:]]
    whole = {"block": dict.fromkeys(ranks[0]["block"], 30.0), "kernels": 8}
    text = "\n".join(found.table(ranks, [whole, whole]))
    assert "| rank 0, lost | 25.00 |" in text and "| rank 1, lost | 25.50 |" in text
    assert "| rank 1 | 1.000 + 0.500 waiting |" in text
    with pytest.raises(ValueError, match="exchanges of each rank"):
        found.waiting([[1.0] * 4, [1.0] * 8])


@pytest.mark.slow
def test_many_profile_with_small_blocks(many_profile: Any) -> None:
    """Real processes over gloo: each exchange of a block is seen, and the bits are equal."""
    text = "\n".join(many_profile.profile("tiny"))
    assert text.count("bits equal") == 2 and text.count(" waiting |") == 8
