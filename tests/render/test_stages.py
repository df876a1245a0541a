"""Memory that runs out in spite of the plan: a smaller plan, from where it stopped, same bits."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import in_turn
from support.clips import picture, read
from support.failures import failing
from support.tiny_models import make_folder, open_wan
from torch.utils._python_dispatch import TorchDispatchMode

from wan_core import GenerationConfig, OptimizationManager, WanPipelineLoader
from wan_core.errors import DoesNotFit, OutputError, is_oom
from wan_core.plan.plan import OptimizationPlan
from wan_core.render import report, video

JOB = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 17, "seed": 1,
       "num_inference_steps": 4}  # fmt: skip

KINDS = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "accelerator": lambda: RuntimeError("CUDA error: out of memory"),
    "hip": lambda: RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"),
}
# Component, its submodule whose call fails, and the call that fails (counted from 1).
STAGES = {
    "load text encoder": ("text_encoder", "", 0),
    "text": ("text_encoder", "", 1),
    "clip": ("image_encoder", "", 1),
    "condition": ("vae", "encoder", 3),
    "load transformer": ("transformer", "", 0),
    "first step": ("transformer", "", 1),
    "middle step, second pass": ("transformer", "", 4),
    "last step": ("transformer", "", 8),
    "decode": ("vae", "decoder", 3),
}


@pytest.fixture(scope="module")
def plain(folder: Any) -> Any:
    """The run in which memory does not run out."""
    config = GenerationConfig(**JOB, image=picture())
    return open_wan(folder("wan2.1-i2v")).generate(config).raise_for_error()


@pytest.mark.parametrize(("stage", "kind"), in_turn(STAGES, KINDS))
def test_the_run_goes_on_with_a_smaller_plan_and_the_same_bits(
    folder: Any, plain: Any, stage: str, kind: str
) -> None:
    component, inner, at = STAGES[stage]
    wrapper = open_wan(folder("wan2.1-i2v"))
    failing(wrapper, component, inner, at, KINDS[kind])
    steps: list[int] = []
    config = GenerationConfig(**JOB, image=picture())
    config.progress_callback = lambda step, *_: steps.append(step)
    result = wrapper.generate(config).raise_for_error()
    assert torch.equal(result.latents, plain.latents)
    assert torch.equal(result.frames, plain.frames)
    assert steps == [1, 2, 3, 4]  # no finished step was made again
    assert any("Memory ran out in stage" in text for text in result.warnings)


class FailAt(TorchDispatchMode):
    """Memory runs out in the n-th operation of the library torch, once."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.n:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def few_objects() -> None:
    """Each step down collects garbage: again without what the last test imported, quickly."""
    gc.collect()
    gc.freeze()


@pytest.mark.parametrize("apart", [97, pytest.param(10, marks=pytest.mark.slow)])
def test_at_operation_after_operation(tmp_path: Path, apart: int) -> None:
    """Found twice: a step taken by the scheduler and not by us, a chunk decoded and not kept."""
    folder = make_folder(tmp_path / "model", "wan2.1-t2v", transformer={"num_layers": 1})
    loader = WanPipelineLoader(enable_caching=True)
    config = GenerationConfig(
        prompt="a", width=16, height=16, num_frames=1, num_inference_steps=2, seed=1,
        guidance_scale=1.0,
    )  # fmt: skip

    def run(fail_at: int) -> tuple[Any, list[int], int]:
        wrapper = loader.load_wan_pipeline(
            folder, optimization_config={"device": "cpu", "precision": "fp32"}
        )
        wrapper._cache._texts.clear()
        steps: list[int] = []
        config.progress_callback = lambda step, *_: steps.append(step)
        with FailAt(fail_at) as mode:
            result = wrapper.generate(config)
        return result, steps, mode.count

    plain, _, _ = run(0)
    plain.raise_for_error()
    _, _, operations = run(0)
    gave_up = []
    for at in range(5, operations, apart):
        result, steps, _ = run(at)
        if result.success:
            assert steps == [1, 2], at
            assert torch.equal(result.latents, plain.latents), at
            assert torch.equal(result.frames, plain.frames), at
        else:
            assert isinstance(result.error, DoesNotFit), (at, result.errors)
            assert not steps, at
            gave_up.append(at)
    loader.clear_cache()
    # Between the stages, where nothing was made yet, a run may end.
    assert operations > 1000 and len(gave_up) <= 5


@pytest.mark.parametrize("at", [1, 4, 9])
def test_no_frame_is_written_twice(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Memory runs out while a decoded part goes to two files, between any two frames of it."""
    job = JOB | {
        "num_frames": 7,
        "batch_size": 2,
        "num_inference_steps": 1,
        "width": 16,
        "height": 16,
    }
    plain = open_wan(folder("wan2.1-t2v")).generate(
        GenerationConfig(**job, output_path=tmp_path / "plain.mp4")
    )
    original, calls = video.as_bytes, 0

    def to_bytes(picture: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KINDS["torch"]()
        return original(picture)

    monkeypatch.setattr(video, "as_bytes", to_bytes)
    result = open_wan(folder("wan2.1-t2v")).generate(
        GenerationConfig(**job, output_path=tmp_path / "out.mp4")
    )
    assert any("Memory ran out in stage decode" in text for text in result.warnings)
    assert calls == 15  # two clips of seven, and the one that failed
    assert torch.equal(result.raise_for_error().frames, plain.raise_for_error().frames)
    for end in ("", "_2"):
        pictures = read(tmp_path / f"out{end}.mp4")[0]
        assert pictures.shape == (7, 16, 16, 3)
        assert (pictures == read(tmp_path / f"plain{end}.mp4")[0]).all()
    assert len(list(tmp_path.iterdir())) == 4


def test_what_callbacks_take_is_no_part_of_a_step(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow one would be taken for memory that has spilled, and slow down later predictions."""
    now, found = [0.0], []
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    ended = report.Timeline.step_done

    def step_done(self: Any, *given: Any) -> None:
        now[0] += 1
        ended(self, *given)
        found[:] = self.full_steps

    def slow(*_: Any) -> None:
        now[0] += 100

    monkeypatch.setattr(report.Timeline, "step_done", step_done)
    job = JOB | {"num_frames": 5, "width": 16, "height": 16, "num_inference_steps": 3}
    config = GenerationConfig(**job, progress_callback=slow, interrupt_check=slow)
    open_wan(folder("wan2.1-t2v")).generate(config).raise_for_error()
    assert found == [1.0, 1.0]


def test_a_file_that_cannot_be_finished_costs_no_frame(folder: Any, tmp_path: Path) -> None:
    """What is decoded is there, and the error says what became of the file."""
    small = {"num_inference_steps": 1, "num_frames": 5, "width": 16, "height": 16}
    job, target = JOB | small, tmp_path / "out.mp4"
    plain = open_wan(folder("wan2.1-t2v")).generate(GenerationConfig(**job)).raise_for_error()

    def taken(done: int, frames: int) -> None:
        if done == frames:
            target.mkdir()

    result = open_wan(folder("wan2.1-t2v")).generate(
        GenerationConfig(**job, output_path=target, decode_callback=taken)
    )
    assert isinstance(result.error, OutputError) and result.output_path is None
    assert result.frames is not None and torch.equal(result.frames, plain.frames)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_memory_that_keeps_running_out_ends_in_does_not_fit(folder: Any) -> None:
    wrapper = open_wan(folder("wan2.1-t2v"))
    tried: list[OptimizationPlan] = []
    original = OptimizationManager.smaller_plan

    class Watched(OptimizationManager):
        def smaller_plan(self, *arguments: Any) -> OptimizationPlan | None:
            smaller = original(self, *arguments)
            tried.extend([smaller] * (smaller is not None))
            return smaller

    wrapper._manager = Watched()
    failing(wrapper, "transformer", "", 3, KINDS["torch"], times=10**6)
    result = wrapper.generate(GenerationConfig(**JOB))
    assert isinstance(result.error, DoesNotFit)
    assert "denoise" in result.errors[0]
    needs = [{s.name: s.device_bytes for s in plan.estimate.stages}["denoise"] for plan in tried]
    assert tried and needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)
    # Afterwards the wrapper is as at first: without the fault the run is right.
    fresh = open_wan(folder("wan2.1-t2v"))
    plain = fresh.generate(GenerationConfig(**JOB)).raise_for_error()
    again = open_wan(folder("wan2.1-t2v")).generate(GenerationConfig(**JOB)).raise_for_error()
    assert torch.equal(again.latents, plain.latents)


def test_both_experts_keep_the_scheduler_they_share(folder: Any) -> None:
    config = GenerationConfig(**JOB, guidance_scale=3.0)
    plain = open_wan(folder("wan2.2-t2v-a14b")).generate(config).raise_for_error()
    for component, at in (("transformer", 5), ("transformer_2", 1), ("transformer_2", 2)):
        wrapper = open_wan(folder("wan2.2-t2v-a14b"))
        failing(wrapper, component, "", at, KINDS["torch"])
        result = wrapper.generate(config).raise_for_error()
        assert torch.equal(result.latents, plain.latents), (component, at)


def test_a_window_that_failed_is_made_again_and_no_other(folder: Any) -> None:
    windows = {"max_chunk_size": 9, "window_overlap": 4}
    plain = open_wan(folder("wan2.1-t2v")).generate(GenerationConfig(**JOB, **windows))
    wrapper = open_wan(folder("wan2.1-t2v"))
    failing(wrapper, "transformer", "", 6, KINDS["torch"])
    seen: list[int] = []
    config = GenerationConfig(**JOB, **windows, chunk_callback=lambda index, n: seen.append(index))
    result = wrapper.generate(config).raise_for_error()
    assert torch.equal(result.latents, plain.raise_for_error().latents)
    per_step = max(seen) + 1
    assert len(seen) == per_step * JOB["num_inference_steps"] + 1


def test_what_a_callback_raises_is_never_taken_for_memory(folder: Any) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(torch.OutOfMemoryError) as raised:
        open_wan(folder("wan2.1-t2v")).generate(GenerationConfig(**JOB, progress_callback=stop))
    assert raised.value is error


def test_every_kind_is_recognised_also_behind_its_cause() -> None:
    for make in KINDS.values():
        outer = ValueError("loading failed")
        outer.__cause__ = make()
        assert is_oom(make()) and is_oom(outer)
    assert is_oom(MemoryError())
    assert not is_oom(RuntimeError("shape mismatch")) and not is_oom(None)
    loop = RuntimeError("a")
    loop.__context__ = loop
    assert not is_oom(loop)
