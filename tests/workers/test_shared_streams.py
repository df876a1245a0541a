"""Weights that a gang streams together: the bits of weights in their place, and orderly ends.

The quick suite has a gang of real processes, over gloo, in ``test_ulysses``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import shared_streams
from support.cut_clips import CLIP, cut_units, equal, four_heads, made, make_links_free
from support.process_gang import in_processes
from support.thread_workers import ThreadWorker, dies, hangs, meets_at_its_fourth_look
from support.tiny_models import open_wan

from wan_core.plan.gangs import Cutting
from wan_core.workers import worker_pool

IN_TURN = "support.shared_streams.units_in_turn"
STREAMED = {"offload": "stream", "resident_blocks": 0}
JOB = CLIP | {"guidance_scale": 1.0, "num_inference_steps": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "ways"), [(2, shared_streams.WAYS), (4, shared_streams.WAYS[2:3])], ids=["2", "4"]
)
def test_stored_kinds_and_loras_keep_every_bit(
    tmp_path: Path, size: int, ways: tuple[shared_streams.Way, ...]
) -> None:
    """Gathers go on beside the exchanges of a cut forward; one unit is computed by rank 0 alone,
    and one is left by all in the middle. One gang does all ways in turn."""
    lora = tmp_path / "lora.safetensors"
    shared_streams.write_lora(lora)
    found = in_processes(size, IN_TURN, str(lora), ways, folder=tmp_path)
    for number, way in enumerate(ways):
        ranks = [one["ways"][number] for one in found]
        shared_streams.keeps_every_bit(ranks, way[0])
        assert all(one["at_once"] for one in ranks)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose streamed weights gangs share."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Cutting, "shares_weights", lambda self, *_: self.choices.stream)
    folder = four_heads(tmp_path, "wan2.1-t2v")
    make_links_free(folder)
    return folder


class Interrupt(BaseException):
    """Stands for ComfyUI's."""


@pytest.mark.parametrize("fate", [hangs, pytest.param(dies, marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_is_not_waited_for_with_its_part_of_a_block(
    path: Path, threads: type[ThreadWorker], fate: Callable[[ThreadWorker], None]
) -> None:
    """In the second pass, between two blocks: the other has begun to gather with it."""
    whole = made(open_wan(path), JOB)
    looks = meets_at_its_fourth_look(threads, fate, worker_pool(("cpu", "cpu"), 2))
    found = made(open_wan(path, devices=2, **STREAMED), JOB)
    assert equal(found, whole) and cut_units(found) > 0
    assert time.perf_counter() - looks[3] < 60
    assert len(threads.made) == 4  # a gang in the place of the one that ended
    assert all(one["copied_bytes"] for one in found.metadata["workers"])


def test_an_interrupt_leaves_a_gang_that_shares_ready_for_the_next_clip(
    path: Path, threads: type[ThreadWorker]
) -> None:
    ended: list[float] = []

    def check() -> None:
        inside = threads.made and threads.made[0]._worker._sharing
        if inside and inside.on and inside.copied_bytes and not ended:
            ended.append(time.perf_counter())
            raise Interrupt

    wrapper = open_wan(path, devices=2, **STREAMED)
    with pytest.raises(Interrupt):
        made(wrapper, JOB, interrupt_check=check)
    assert time.perf_counter() - ended[0] < 60
    assert equal(made(wrapper, JOB), made(open_wan(path), JOB))
    assert len(threads.made) == 2  # the same gang


def test_a_rank_out_of_memory_ends_a_gang_that_shares(
    path: Path, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a pass, while parts are gathered: a smaller plan goes on."""
    from wan_core.render.stages import StageRunner

    whole, failed = made(open_wan(path), JOB), []

    def fill(worker: ThreadWorker) -> None:
        inside = worker._worker
        if worker is threads.made[1] and inside._unit == 2 and inside._together and not failed:
            failed.append(time.perf_counter())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    def smaller(self: StageRunner, stage: str, failure: str, *, must: bool) -> None:
        assert must and stage == "denoise"
        self.plan = self.plan.with_choices(stream_buffers=1)

    monkeypatch.setattr(StageRunner, "_step_down", smaller)
    threads.looked = fill
    found = made(open_wan(path, devices=2, **STREAMED), JOB)
    assert failed and time.perf_counter() - failed[0] < 60
    assert equal(found, whole) and cut_units(found) > 0 and len(threads.made) == 4


def test_two_experts_are_shared_one_after_the_other(
    tmp_path: Path, path: Path, threads: type[ThreadWorker]
) -> None:
    """Weights leave and others come between two steps, in all ranks at the same unit."""
    folder = four_heads(tmp_path, "wan2.2-t2v-a14b")
    job = JOB | {"guidance_scale_2": 1.0, "switch_step": 1, "num_inference_steps": 4}
    found = made(open_wan(folder, devices=2, **STREAMED), job)
    assert equal(found, made(open_wan(folder), job)) and cut_units(found) == 4
    assert len(threads.made) == 2 and all(one["copied_bytes"] for one in found.metadata["workers"])


WINDOWS = CLIP | {"num_frames": 29, "max_chunk_size": 17, "window_overlap": 8}


@pytest.mark.parametrize("job", [CLIP, WINDOWS])
def test_windows_and_halves_of_guidance_are_never_shared(
    path: Path, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch, job: dict[str, Any]
) -> None:
    """They do not keep step: a gang of one has nobody to gather with, whatever a plan says."""
    monkeypatch.setattr(Cutting, "shares_weights", lambda *_: True)
    found = made(open_wan(path, devices=2, **STREAMED), job)
    assert equal(found, made(open_wan(path), job))
    assert len(threads.made) == 2 and all(one._worker._sharing is None for one in threads.made)
    workers = found.metadata["workers"]
    assert all("gang" not in one and "copied_bytes" not in one for one in workers)
