"""What runs teach the next estimate, and memory that spills instead of running out."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.machines import architecture, cpu, gpu
from support.tiny_models import make_folder

from wan_core import GenerationConfig, OptimizationManager, WanPipelineLoader
from wan_core.config import GIB, StageEstimate, StageReport
from wan_core.memory import process
from wan_core.memory.calibration import (
    KEPT,
    Calibration,
    Calibrations,
    RunRecord,
    default_path,
)
from wan_core.memory.stages import Choices, Workload, estimate
from wan_core.plan.timing import timing
from wan_core.render import stages
from wan_core.render.report import Timeline, spilled

KEY = "GPU 24, cuda, torch 2.13.0, wan2.1-t2v-14b"
JOB = Workload(width=832, height=480, num_frames=81)
FOUND = architecture("wan2.1-t2v-14b")
BF16 = Choices(dtypes=dict.fromkeys(("transformer", "text_encoder", "vae"), "bf16"))


def run_of(
    measured: float, *, learnt: float = 0.0, pace: float | None = 1.2, base: int = 0,
    forward: str = "diffusers",
) -> Any:  # fmt: skip
    """A run whose stage was estimated at 30 GiB, 10 of them activations. Measures are in GiB."""
    expected = [
        StageEstimate(
            name=name, device_bytes=30 * unit, weights_bytes=0, activation_bytes=10 * unit
        )
        for name, unit in (("denoise", GIB), ("text_encode", GIB // 11))
    ]
    report = [
        StageReport(name="load transformer", measured_peak_bytes=99 * GIB),
        StageReport(name="text_encode", measured_peak_bytes=99 * GIB),
        StageReport(name="denoise", measured_peak_bytes=int(measured * GIB)),
    ]
    return RunRecord.of(
        expected, report, forward=forward, learnt=learnt, base_bytes=base * GIB, pace=pace
    )


# ---------------------------------------------------------------------------- what is kept


def test_nothing_is_known_before_the_first_run(tmp_path: Path) -> None:
    assert Calibrations(tmp_path / "none.json").of(KEY) == Calibration()
    assert default_path().name == "measured.json"


@pytest.mark.parametrize(
    ("measured", "extra", "pace", "kept"),
    [(10, -0.02, 0.01, 0.1), (30, 0.0, 0.1, 0.1), (32, 0.2, 10.0, 10.0), (90, 0.25, 10.1, 10.0)],
)
def test_what_has_another_cause_teaches_no_more_than_the_bounds(
    measured: float, extra: float, pace: float, kept: float
) -> None:
    """A second program on the card, say. -2 to 25 % of the activations, a tenth to ten fold."""
    found = run_of(measured, pace=pace)
    assert (found.extra, found.pace) == (pytest.approx(extra), kept)


def test_the_medians_count(tmp_path: Path) -> None:
    kept = Calibrations(tmp_path / "deep" / "measured.json")
    for measured, pace in ((31, 1.0), (32, 1.4), (30, 5.0), (31, None)):
        kept.add(KEY, run_of(measured, pace=pace))
    kept.add("another card", run_of(34))
    found = Calibrations(kept.path).of(KEY)
    assert (found.runs, found.extra, found.pace, found.paced) == (4, 0.1, 1.4, True)
    for _ in range(KEPT):
        kept.add(KEY, run_of(30, pace=None))
    found = kept.of(KEY)
    assert (found.runs, found.extra, found.pace, found.paced) == (KEPT, 0.0, 1.0, False)


def test_each_forward_has_an_extra_of_its_own(tmp_path: Path) -> None:
    kept = Calibrations(tmp_path / "measured.json")
    for measured, forward in ((31, "diffusers"), (31.5, "diffusers"), (32, "lean")):
        kept.add(KEY, run_of(measured, forward=forward))
    found = kept.of(KEY)
    assert found.extra_of(lean=False, by_rows=False) == pytest.approx(0.125)
    assert found.extra_of(lean=True, by_rows=False) == pytest.approx(0.2)
    assert found.extra_of(lean=True, by_rows=True) == found.extra == pytest.approx(0.15)
    hash(found)


def test_a_run_is_compared_with_the_bare_arithmetic() -> None:
    """Its estimate was corrected already: what it teaches must not be added twice."""
    assert run_of(30, learnt=0.2).extra == pytest.approx(0.2)
    assert run_of(33, base=2).extra == pytest.approx(0.1), "what others hold is not ours"
    assert run_of(10**6).extra == 0.25
    assert run_of(1).extra == -0.02


def test_small_stages_teach_nothing_of_memory() -> None:
    small = run_of(0)
    assert small.extra is None and small.pace == 1.2
    assert run_of(0, pace=None) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"a": 1}', '{"a": [{}]}', '{"a": [{"extra": "x", "pace": 1}]}',
     '{"a": [null]}', '{"a": [{"extra": NaN, "pace": 1, "forward": "lean"}]}',
     '{"a": [{"extra": 0.5, "pace": 1}]}'],
)  # fmt: skip
def test_a_broken_file_is_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "measured.json"
    path.write_text(text)
    kept = Calibrations(path)
    assert kept.of("a") == Calibration()
    kept.add("a", run_of(31))
    assert kept.of("a").runs == 1


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    kept = Calibrations(tmp_path / "file" / "measured.json")
    kept.add(KEY, run_of(31))
    assert kept.of(KEY) == Calibration()


# ---------------------------------------------------------------------------- what it changes


def test_estimates_follow_what_was_learnt_and_say_so() -> None:
    plain = estimate(FOUND, JOB, BF16, gpu(24))
    learnt = gpu(24, calibration=Calibration(runs=3, extra=0.1, pace=2.0))
    found = estimate(FOUND, JOB, BF16, learnt)
    for before, after in zip(plain.stages, found.stages, strict=True):
        assert after.device_bytes - before.device_bytes == int(0.1 * before.activation_bytes)
    assert (plain.basis, found.basis) == ("arithmetic", "arithmetic and 3 runs on this machine")
    assert found.confidence > plain.confidence
    assert timing(FOUND, JOB, BF16, learnt).step == 2 * timing(FOUND, JOB, BF16, gpu(24)).step
    plan = OptimizationManager().recommend_optimizations(FOUND, JOB, learnt)
    assert "by the pace of earlier runs" in " ".join(plan.reasons)


def test_a_cpu_has_its_own_figures() -> None:
    learnt = replace(cpu(64), calibration=Calibration(runs=3, extra=0.4))
    found, plain = estimate(FOUND, JOB, BF16, learnt), estimate(FOUND, JOB, BF16, cpu(64))
    assert [s.device_bytes for s in found.stages] == [s.device_bytes for s in plain.stages]


@given(st.floats(0.1, 10), st.floats(1.0, 3.0))
def test_a_slower_card_never_has_faster_steps(pace: float, slower: float) -> None:
    def step(value: float) -> float:
        machine = gpu(24, calibration=Calibration(runs=1, pace=value))
        plan = OptimizationManager().recommend_optimizations(FOUND, JOB, machine)
        return plan.step_seconds

    assert step(pace * slower) >= step(pace)


def test_a_run_on_an_accelerator_is_learnt_from_and_one_on_a_cpu_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "model", "wan2.1-t2v")
    wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        folder, optimization_config={"device": "cpu"}
    )
    wrapper._calibrations = Calibrations(tmp_path / "measured.json")
    config = GenerationConfig(
        prompt="a", width=32, height=32, num_frames=5, num_inference_steps=3, seed=1
    )
    wrapper.generate(config).raise_for_error()
    assert not wrapper._calibrations.path.exists()
    # The same run, by a machine that calls its device an accelerator.
    system = wrapper._manager.analyze_system_resources("cpu")
    card = replace(system, device="cuda:0", device_name="GPU 24", backend="cuda")
    monkeypatch.setattr(wrapper._manager, "analyze_system_resources", lambda *_, **__: card)
    request, plan = wrapper.plan(config)
    render = wrapper._make_render(config, request, replace(plan, device="cpu"))
    render.run()
    wrapper._learn(plan, render.stages)
    ((key, records),) = json.loads(wrapper._calibrations.path.read_text()).items()
    assert key.startswith("GPU 24, cuda, torch ") and key.endswith("wan2.1-t2v-1.3b")
    assert len(render.stages.timeline.step_seconds) == 2, "the first step also warms up"
    assert len(records) == 1 and records[0]["pace"] is not None
    assert records[0]["forward"] in ("diffusers", "lean", "lean_rows")
    assert records[0]["extra"] is None, "so small a clip says nothing of memory"


# ---------------------------------------------------------------------------- spilled memory

FULL, TOTAL = 23 * GIB, 24 * GIB


@pytest.mark.parametrize(
    ("reserved", "steps", "usual", "word"),
    [
        (25 * GIB, [], None, "are reserved"),
        (FULL, [1.0, 1.1, 9.0], None, "instead of 1.1 s"),
        (FULL, [9.0], 1.0, "instead of 1.0 s"),
        (FULL, [9.0], None, None),  # the card may be that slow
        (FULL, [1.0, 1.1, 3.0], None, None),
        (12 * GIB, [1.0, 1.1, 9.0], None, None),  # something else held it up
        (FULL, [], 1.0, None),
    ],
)
def test_spilled_memory_is_told_from_a_slow_card(
    reserved: int, steps: list[float], usual: float | None, word: str | None
) -> None:
    why = spilled(reserved, TOTAL, steps, usual)
    assert (why is None) if word is None else (why is not None and word in why)
    assert spilled(reserved, 0, steps, usual) is None, "no such figures but on CUDA"


def test_after_a_spill_the_run_goes_on_smaller_from_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "model", "wan2.1-t2v")
    config = GenerationConfig(
        prompt="a", width=32, height=32, num_frames=9, num_inference_steps=5, seed=1
    )

    def render() -> tuple[Any, list[int]]:
        wrapper = WanPipelineLoader(enable_caching=False).load_wan_pipeline(
            folder, optimization_config={"device": "cpu", "precision": "fp32"}
        )
        seen: list[int] = []
        config.progress_callback = lambda step, *_: seen.append(step)
        return wrapper.generate(config).raise_for_error(), seen

    plain, _ = render()
    monkeypatch.setattr(stages, "device_fill", lambda _: (25 * GIB, TOTAL))
    result, seen = render()
    assert seen == [1, 2, 3, 4, 5], "no step is made twice"
    assert torch.equal(result.latents, plain.latents)
    told = " ".join(result.warnings)
    assert "spilled into RAM: 25.0 GiB are reserved on a device of 24.0" in told
    # At the end of the ladder it bears it, rather than giving the run up.
    assert told.count("there is no smaller way") == 1


def open_tiny(folder: Path) -> Any:
    return WanPipelineLoader(enable_caching=False).load_wan_pipeline(
        folder, optimization_config={"device": "cpu", "precision": "fp32"}
    )


def test_a_spill_after_the_last_step_of_a_stage_is_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing left to do smaller: the stage must not be entered again."""
    wrapper = open_tiny(make_folder(tmp_path / "model", "wan2.1-t2v"))
    config = GenerationConfig(
        prompt="a", width=32, height=32, num_frames=5, num_inference_steps=1, seed=1
    )
    monkeypatch.setattr(stages, "device_fill", lambda _: (25 * GIB, TOTAL))
    result = wrapper.generate(config).raise_for_error()
    assert "spilled" not in " ".join(result.warnings)
    assert [stage.name for stage in result.stages].count("denoise") == 1


def test_a_smaller_plan_is_not_judged_by_the_steps_of_the_one_before(tmp_path: Path) -> None:
    wrapper = open_tiny(make_folder(tmp_path / "model", "wan2.1-t2v"))
    config = GenerationConfig(
        prompt="a", width=32, height=32, num_frames=5, num_inference_steps=4, seed=1
    )
    request, plan = wrapper.plan(config)
    found = wrapper._make_render(config, request, plan).stages
    assert found.usual_step is None, "no run taught the pace"
    found.timeline.step_seconds += [1.0, 1.1]
    found.usual_step = 1.0
    found._step_down("denoise", "out of memory", must=True)
    assert found.timeline.step_seconds == []
    assert found.usual_step == found.plan.step_seconds and found.plan is not plan


def test_steps_are_usual_only_where_a_run_taught_the_pace(tmp_path: Path) -> None:
    wrapper = open_tiny(make_folder(tmp_path / "model", "wan2.1-t2v"))
    wrapper._calibrations = Calibrations(tmp_path / "measured.json")
    key = wrapper._calibration_key(wrapper._manager.analyze_system_resources("cpu"))
    config = GenerationConfig(prompt="a", width=32, height=32, num_frames=5)
    for pace, known in ((None, False), (1.2, True)):
        wrapper._calibrations.add(key, run_of(31, pace=pace))
        request, plan = wrapper.plan(config)
        found = wrapper._make_render(config, request, plan).stages
        assert found.usual_step == (plan.step_seconds if known else None)


def test_a_longer_segment_is_no_spill() -> None:
    """Steps are compared with those on as many frames; a plan predicts those on the most."""
    timeline = Timeline(torch.device("cpu"))
    for frames, seconds in ((3, [1.0, 1.1, 1.0]), (21, [5.2, 5.3]), (3, [1.0])):
        timeline.work_on(frames)
        for second in seconds:
            timeline.step_seconds.append(second)
            assert spilled(FULL, TOTAL, timeline.step_seconds, None) is None
    assert timeline.full_steps == [5.2, 5.3]
    timeline.work_on(21)
    timeline.step_seconds.append(30.0)
    assert "instead of 5.2 s" in str(spilled(FULL, TOTAL, timeline.step_seconds, None))
    timeline.predict({})
    for frames in (3, 21):
        timeline.work_on(frames)
        assert timeline.step_seconds == []


def test_every_segment_is_timed_by_itself(tmp_path: Path) -> None:
    wrapper = open_tiny(make_folder(tmp_path / "model", "wan2.2-ti2v-5b"))
    config = GenerationConfig(
        prompts="9: a cat\n28: a dog\na fox", width=32, height=32, num_frames=57, seed=1,
        num_inference_steps=4, guidance_scale=1.0, max_chunk_size=33, window_overlap=4,
        window_mode="continuation",
    )  # fmt: skip
    seen: dict[int, int] = {}
    work_on = Timeline.work_on

    def noted(self: Timeline, frames: int) -> None:
        seen[frames] = seen.get(frames, 0) + 1
        work_on(self, frames)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timeline, "work_on", noted)
        request, plan = wrapper.plan(config)
        render = wrapper._make_render(config, request, plan)
        render.run()
    timeline = render.stages.timeline
    assert len(seen) > 1, seen
    assert {n: len(steps) for n, steps in timeline._steps.items() if n} == {
        frames: 3 * count for frames, count in seen.items()
    }


def test_the_first_step_of_a_stage_is_not_timed() -> None:
    timeline = Timeline(torch.device("cpu"))
    for name in ("denoise_high", "denoise_low"):
        with timeline.stage(name):
            for _ in range(3):
                timeline.step_done()
    assert len(timeline.step_seconds) == 4


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("error", [None, MemoryError, KeyboardInterrupt])
def test_a_stage_that_failed_at_its_start_has_taken_nothing_yet(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None, steps: int
) -> None:
    """What its libraries will take must be predicted again."""
    monkeypatch.setattr(process, "_run_here", set())
    timeline = Timeline(torch.device("cpu"))
    with suppress(MemoryError, KeyboardInterrupt), timeline.stage("denoise_high"):
        for _ in range(steps):
            timeline.step_done()
        if error is not None:
            raise error
    assert ("denoise" in process.done_here("cpu")) is (error is None or steps > 0)
