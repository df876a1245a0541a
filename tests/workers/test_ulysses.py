"""Passes that several processes cut among them: the bits of one, or what differs is said."""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import single_files, stored_models
from support.cut_clips import (
    CLIP,
    LONG,
    cut_units,
    equal,
    four_heads,
    made,
    make_links_free,
    trials,
)
from support.drivers import Driver
from support.thread_workers import ThreadWorker, dies, hangs, meets_at_its_fourth_look
from support.tiny_models import open_wan

from wan_core import GenerationConfig, WanLoRA, WanModelFiles, WanPipelineLoader
from wan_core.config import WanControl
from wan_core.errors import WorkerFailed, is_oom
from wan_core.memory import CardRecords, Trial
from wan_core.plan.gangs import Cutting
from wan_core.workers import child, close_workers, group, worker_pool
from wan_core.workers.process import End

PLAIN = {"guidance_scale": 1.0}
WIDE = {"width": 128, "height": 128}
"""80 tokens of the 5B, whose own are four times as large (``CLIP`` says why so many)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("ulysses")
    return functools.cache(lambda family: four_heads(place, family))


@pytest.fixture(autouse=True)
def machine(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Records of its own, by which cutting is worth it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield make_links_free(folder("wan2.1-t2v"))


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def control(frames: int) -> WanControl:
    return WanControl(
        video=torch.rand(frames, 64, 64, 3, generator=torch.Generator().manual_seed(0)),
        mask=torch.ones(frames, 64, 64),
        reference=torch.full((1, 64, 64, 3), 0.5),
    )


Case = tuple[str, dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "two experts, guided": ("wan2.2-t2v-a14b", CLIP, {}),
    "two experts in windows, guided": ("wan2.2-t2v-a14b", LONG, {}),
    "image to video, 5B, in windows": (
        "wan2.2-ti2v-5b", LONG | PLAIN | WIDE | {"image": picture()}, {},
    ),
    "no guidance": ("wan2.1-t2v", CLIP | PLAIN, {}),
    "image to video, 2.1": ("wan2.1-i2v", CLIP | {"image": picture()}, {}),
    "image to video, A14B": ("wan2.2-i2v-a14b", CLIP | {"image": picture()}, {}),
    "VACE": ("wan2.1-vace", CLIP | {"control": control(17)}, {}),
    "VACE in windows": ("wan2.1-vace", LONG | PLAIN | {"control": control(29)}, {}),
    "Fun Control with a reference": (
        "wan2.2-fun-control-5b",
        CLIP | WIDE | {"control": WanControl(
            video=torch.rand(17, 128, 128, 3, generator=torch.Generator().manual_seed(0)),
            reference=torch.full((1, 128, 128, 3), 0.5),
        )},
        {},
    ),
    "5B in segments": (
        "wan2.2-ti2v-5b", LONG | WIDE | {"image": picture(), "window_mode": "continuation"}, {},
    ),
    "by rows": ("wan2.1-t2v", CLIP, {"forward": "lean_rows"}),
    "streamed": ("wan2.2-t2v-a14b", CLIP, {"offload": "stream", "resident_blocks": 1}),
    "fp8 storage": ("wan2.1-t2v", CLIP, {"fp8_storage": "always"}),
    "MagCache": (
        "wan2.1-t2v", CLIP | {"num_inference_steps": 12},
        {"step_cache": "magcache", "step_cache_factor": 2.0},
    ),
    "EasyCache": (
        "wan2.1-t2v", CLIP | {"num_inference_steps": 10},
        {"step_cache": "easycache", "step_cache_threshold": 0.5},
    ),
}  # fmt: skip
QUICK = ("two experts, guided", "image to video, 5B, in windows")


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_pass_that_is_cut_keeps_every_bit(
    folder: Any, threads: type[ThreadWorker], case: str
) -> None:
    """Windows, guidance and a cut: gangs of two, or one of four."""
    family, job, wishes = CASES[case]
    path = folder(family)
    whole = made(open_wan(path, **wishes), job)
    cards = 8 if case == "two experts in windows, guided" else 4
    wrapper = open_wan(path, devices=cards, **wishes)
    _, plan = wrapper.plan(GenerationConfig(**job))
    assert plan.gang == (4 if case == "no guidance" else 2) and len(plan.workers) == cards
    found = made(wrapper, job)
    assert equal(found, whole)
    assert cut_units(found) > 0 and len(threads.made) == cards
    assert trials() and all(trial.equal for trial in trials().values())
    # What a trial has shown is known the next time: nothing is computed twice.
    again = made(wrapper, job)
    assert equal(again, whole) and not any(unit["both"] for unit in last_units(threads, again))


def last_units(threads: type[ThreadWorker], result: Any) -> list[dict[str, Any]]:
    """The units of the last render, of all workers."""
    return [
        unit
        for worker, told in zip(threads.made, result.metadata["workers"], strict=True)
        for unit in worker.units[-told["units"] :]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8_rows", "Q4_K"])
@pytest.mark.parametrize(("lora", "streamed"), [(False, False), (True, False), (True, True)])
def test_stored_weights_and_loras_keep_every_bit(
    threads: type[ThreadWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
    lora: bool, streamed: bool,
) -> None:  # fmt: skip
    """Where they are ``streamed``, one block of two stays, and the gang shares the other."""
    if streamed:
        monkeypatch.setattr(Cutting, "shares_weights", lambda self, *_: self.choices.stream)
    monkeypatch.setattr("wan_core.models.sizes.MAP_FROM", 1)
    single_files.write(tmp_path)
    pair, _ = stored_models.experts(tmp_path, kind)
    loras = (WanLoRA(make_lora(tmp_path), "both", 0.5),) if lora else ()
    given = WanModelFiles(
        transformer=pair[0], transformer_2=pair[1], vae=tmp_path / "vae" / single_files.VAE,
        text_encoder=tmp_path / "text_encoders" / single_files.TEXT,
    )  # fmt: skip

    def opened(**wishes: Any) -> Any:
        wishes = {"device": "cpu", "precision": "bf16", "forward": "lean"} | wishes
        wishes |= {"offload": "stream", "resident_blocks": 1} if streamed else {}
        loader = WanPipelineLoader(enable_caching=False)
        return loader.load_wan_pipeline(given, loras=loras, optimization_config=wishes)

    job = CLIP | {"guidance_scale": 3.0, "guidance_scale_2": 1.0, "switch_step": 1}
    whole, found = made(opened(), job), made(opened(devices=2, speed="fast"), job)
    assert equal(found, whole)
    alone = job | PLAIN | {"guidance_scale_2": 1.0}
    cut = made(opened(devices=2), alone)
    assert cut_units(cut) > 0 and equal(cut, made(opened(), alone))
    assert all(trial.equal for trial in trials().values())
    copied = [one["copied_bytes"] for one in cut.metadata["workers"] if "copied_bytes" in one]
    assert len(copied) == 2 * streamed and (not copied or min(copied) > 0)


def make_lora(folder: Path) -> Path:
    g, tensors = torch.Generator().manual_seed(5), {}
    for name, value in next(stored_models.states()).items():
        if name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2:
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(4, value.shape[1], generator=g) / 10
            tensors[f"{layer}.lora_B.weight"] = torch.randn(value.shape[0], 4, generator=g) / 10
    path = folder / "lora.safetensors"
    save_file(tensors, path)
    return path


FEW = {**CLIP, "width": 32, "height": 32, "num_frames": 1, **PLAIN}
"""Four tokens: two processes have two each, and products of two rows round in another way."""


def test_where_bits_differ_one_card_computes_unless_rounding_is_allowed(
    folder: Any, threads: type[ThreadWorker]
) -> None:
    path = folder("wan2.1-t2v")
    whole = made(open_wan(path), FEW)
    exact = open_wan(path, devices=2)
    _, plan = exact.plan(GenerationConfig(**FEW))
    assert plan.gang == 2 and "was not tried here" in plan.reasons[-1]
    found = made(exact, FEW)
    assert equal(found, whole)  # the trial has failed, and every pass was computed whole
    assert cut_units(found) == 1 and any("has other bits" in text for text in found.warnings)
    assert [trial.equal for trial in trials().values()] == [False]
    _, plan = exact.plan(GenerationConfig(**FEW))
    assert plan.gang == 1 and plan.workers == () and "has other bits here" in plan.reasons[-1]

    fast = open_wan(path, devices=2, speed="fast")
    _, plan = fast.plan(GenerationConfig(**FEW))
    assert plan.gang == 2
    found = made(fast, FEW)
    assert cut_units(found) == 2 and not equal(found, whole)
    assert torch.allclose(found.latents, whole.latents, atol=1e-4)
    _, plan = fast.plan(GenerationConfig(**FEW))
    assert "rounding: tried here, relative error" in plan.reasons[-1]
    assert any("rounding" in text for text in made(fast, FEW).warnings)


@pytest.mark.slow
def test_a_model_that_cannot_be_cut_is_computed_whole(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "can_be_cut", lambda module: False)
    path, job = folder("wan2.1-t2v"), CLIP | PLAIN
    found = made(open_wan(path, devices=2), job)
    assert equal(found, made(open_wan(path), job)) and cut_units(found) == 0


@pytest.mark.parametrize("fate", [pytest.param(dies, marks=pytest.mark.slow), hangs])
def test_a_rank_that_dies_or_hangs_ends_its_gang_and_not_the_render(
    folder: Any, threads: type[ThreadWorker], fate: Callable[[ThreadWorker], None]
) -> None:
    """In the middle of a pass, where the others wait for it."""
    path = folder("wan2.2-t2v-a14b")
    whole = made(open_wan(path), CLIP)
    looks = meets_at_its_fourth_look(threads, fate, worker_pool(("cpu",) * 4, 2))
    found = made(open_wan(path, devices=4), CLIP)
    assert equal(found, whole)
    assert time.perf_counter() - looks[3] < 60
    assert sum("its unit was given to another" in text for text in found.warnings) == 1
    assert len(threads.made) == 6  # a gang in the place of the one that ended
    numbers = [unit["number"] for worker in threads.made[::2] for unit in worker.units]
    assert sorted(numbers) == sorted([*range(1, 5), threads.made[0].units[-1]["number"]])


def test_a_cut_that_ends_gang_after_gang_is_given_up_and_not_the_render(
    folder: Any, threads: type[ThreadWorker]
) -> None:
    """As where NCCL ends a process: each pass is then computed by one card, of the same gang."""
    died: list[int] = []

    def look(worker: ThreadWorker) -> None:
        if worker is threads.made[1 + 2 * len(died)] and worker._worker._together is not None:
            died.append(worker._worker._unit)
            worker.die()

    path, job = folder("wan2.1-t2v"), CLIP | PLAIN
    whole = made(open_wan(path), job)
    threads.looked, threads.last = look, End(-6, "terminate called: ncclInternalError\n")
    found = made(open_wan(path, devices=2), job)
    assert equal(found, whole) and died == [1, 1] and len(threads.made) == 6
    assert cut_units(found) == 0 and sum(one["units"] for one in found.metadata["workers"]) == 4
    assert any("cpu: ended by SIGABRT: terminate called" in text for text in found.warnings)


def test_what_nccl_lacks_of_memory_is_a_shortage_of_memory() -> None:
    """And all else that it says is told as a gang that has fallen apart."""
    said = "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27.5\n"
    said += "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    for last, kind in (
        ("Cuda failure 2 'out of memory'", RuntimeError),
        ("Failed to CUDA calloc async 608 bytes", RuntimeError),
        ("Cuda failure 999 'unknown error'", group.GangBroken),
    ):
        with pytest.raises(kind) as told, group._told():
            raise torch.distributed.DistBackendError(said + last)
        assert is_oom(told.value) == (kind is RuntimeError)


@pytest.mark.parametrize("midway", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_rank_out_of_memory_leads_to_a_smaller_plan(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch, midway: bool
) -> None:
    from wan_core.render.stages import StageRunner

    path, job = folder("wan2.1-t2v"), CLIP | PLAIN | {"num_inference_steps": 3}
    whole = made(open_wan(path), job)
    failed: list[float] = []

    def fill(worker: ThreadWorker) -> None:
        here = midway == (worker._worker._together is not None)
        second = worker is threads.made[1] and worker._worker._unit == 2
        if second and here and not failed:
            failed.append(time.perf_counter())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    def smaller(self: StageRunner, stage: str, failure: str, *, must: bool) -> None:
        assert must and stage == "denoise" and "(on cpu of cpu, cpu (workers 1 to 2))" in failure
        self.plan = self.plan.with_choices(stream=True, lean=True, resident_blocks=1)

    monkeypatch.setattr(StageRunner, "_step_down", smaller)
    threads.looked = fill
    found = made(open_wan(path, devices=2), job)
    assert failed and time.perf_counter() - failed[0] < 60
    assert equal(found, whole) and cut_units(found) > 0
    assert len(threads.made) == (4 if midway else 2)


class Interrupt(BaseException):
    """Stands for ComfyUI's."""


def test_an_interrupt_ends_all_ranks_at_the_same_block(
    folder: Any, threads: type[ThreadWorker]
) -> None:
    path = folder("wan2.1-t2v")
    begun = threading.Event()
    threads.looked = lambda w: begun.set() if w._worker._together is not None else None

    def check() -> None:
        if begun.is_set() and not ended:
            ended.append(time.perf_counter())
            raise Interrupt

    ended: list[float] = []
    wrapper, job = open_wan(path, devices=2), CLIP | PLAIN
    with pytest.raises(Interrupt):
        made(wrapper, job, interrupt_check=check)
    assert time.perf_counter() - ended[0] < 60
    assert equal(made(wrapper, job), made(open_wan(path), job))
    assert len(threads.made) == 2  # the same gang


def test_a_rank_without_the_files_is_told_before_the_first_pass(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = child.Worker._in_place

    def other(self: child.Worker, weights: Any) -> Any:
        if self is threads.made[1]._worker:
            raise FileNotFoundError("model.safetensors is not here")
        return honest(self, weights)

    monkeypatch.setattr(child.Worker, "_in_place", other)
    begun = time.perf_counter()
    result = open_wan(folder("wan2.1-t2v"), devices=2).generate(GenerationConfig(**CLIP | PLAIN))
    assert isinstance(result.error, WorkerFailed)
    assert "model.safetensors is not here (on cpu of cpu, cpu" in str(result.error)
    assert time.perf_counter() - begun < 60


def test_what_is_kept_survives_nonsense(tmp_path: Path) -> None:
    records = CardRecords(tmp_path / "cards.json")
    records.keep_trial("a", Trial(False, 1e-6))
    records.keep_trial("a", Trial(True, 0.0))
    assert records.trial("a") == Trial(False, 1e-6)  # bits that may differ are not promised
    for text in ("", "[]", '{"links": {"x": 3}, "trials": {}}', '{"trials": {"a": [1]}}'):
        records.path.write_text(text)
        assert records.trial("a") is None and records.link("m", 2) is None


def test_processes_over_gloo_keep_every_bit_and_end_together(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing, once: a gang of two processes, several models, and one of them killed.

    Streamed weights are shared, which would not pay on a CPU: each copies its half of a block.
    """
    monkeypatch.setattr(Cutting, "shares_weights", lambda self, *_: self.choices.stream)
    streamed = {"offload": "stream", "resident_blocks": 0}
    close_workers()
    pool = worker_pool(("cpu", "cpu"), 2)
    for family, wishes, more in (
        ("wan2.1-t2v", {}, {}),
        ("wan2.2-ti2v-5b", streamed, WIDE | {"image": picture()}),
    ):
        job = CLIP | PLAIN | more
        found = made(open_wan(folder(family), devices=2, **wishes), job)
        assert equal(found, made(open_wan(folder(family)), job)) and cut_units(found) == 2
    assert "streamed weights shared out" in found.applied_optimizations
    first, second = (one["copied_bytes"] for one in found.metadata["workers"])
    states = load_file(next(folder("wan2.2-ti2v-5b").glob("transformer/*.safetensors")))
    whole = sum(-(-t.nbytes // 256) * 256 for name, t in states.items() if "blocks." in name)
    # Two passes, and the trial between them, after which the buffers begin anew.
    assert first + second == 2 * whole and first == pytest.approx(second, rel=0.05)
    assert not torch.distributed.is_initialized()  # not here
    pids, killed = pool.pids, []

    def kill(step: int, *_: Any) -> None:
        if step == 1:
            pool._restarts = 0  # starting others takes seconds; the slow test does
            os.kill(pids[1], signal.SIGKILL)
            killed.append(time.perf_counter())

    config = GenerationConfig(**CLIP, **PLAIN, progress_callback=kill)
    result = open_wan(folder("wan2.1-t2v"), devices=2, **streamed).generate(config)
    (said,) = [text for text in result.raise_for_error().warnings if "went on alone" in text]
    assert "has ended (cpu: ended by SIGKILL)" in said
    assert time.perf_counter() - killed[0] < 60
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    close_workers()


@pytest.mark.slow
def test_four_processes_share_guidance_and_cut_also_when_some_are_stopped(folder: Any) -> None:
    """Two gangs of two: one process is killed, another one stopped so that it hangs."""
    path, job = folder("wan2.2-t2v-a14b"), CLIP | {"num_inference_steps": 6}
    whole = made(open_wan(path), job)
    close_workers()
    pool = worker_pool(("cpu",) * 4, 2)
    first = made(open_wan(path, devices=4), job)
    assert equal(first, whole) and cut_units(first) == 12
    pids, ends = pool.pids, []

    def harm(step: int, *_: Any) -> None:
        ends.append(time.perf_counter())
        if step == 2:
            os.kill(pids[3], signal.SIGKILL)
        if step == 4:
            pool.quiet_seconds = 10.0  # on a busy machine others may pause too
            os.kill(pool.pids[0], signal.SIGSTOP)

    found = made(open_wan(path, devices=4), job, progress_callback=harm)
    assert equal(found, whole)
    told = " ".join(found.warnings)
    assert "has ended" in told, told
    # In the middle of a pass, or asked for its memory where the experts change.
    assert "said nothing for" in told or "did not give back its memory" in told, told
    assert len(pool.pids) == 4 and not set(pids) & set(pool.pids)
    longest = max(b - a for a, b in pairwise(ends))
    assert longest < 120, longest  # the other gang goes on, or a new one starts
    close_workers()


@pytest.mark.slow
def test_ranks_that_die_at_twenty_random_moments(folder: Any, threads: type[ThreadWorker]) -> None:
    """Any rank, in the middle of a pass or between: the same bits, at most that pass anew."""
    path, dice = folder("wan2.2-t2v-a14b"), random.Random(7)
    whole = made(open_wan(path), CLIP)
    left, died, lock = 0, [0], threading.Lock()
    for _ in range(20):
        close_workers()
        threads.made, left = [], dice.randint(1, 30)
        died.clear()

        def look(worker: ThreadWorker) -> None:
            nonlocal left
            with lock:
                left -= 1
                now = left == 0
            if now:
                died.append(worker._worker._unit)
                worker.die()

        threads.looked = look
        found = made(open_wan(path, devices=4), CLIP)
        threads.looked = None
        assert equal(found, whole)
        numbers = [unit["number"] for worker in threads.made[::2] for unit in worker.units]
        assert len(numbers) <= 4 + len(died) and set(numbers) == {1, 2, 3, 4}
        assert len(died) == (left <= 0)


@pytest.mark.slow
def test_a_driver_that_is_killed_takes_its_gang_along_and_goes_on(
    folder: Any, tmp_path: Path
) -> None:
    path, job = folder("wan2.1-t2v"), CLIP | PLAIN | {"num_inference_steps": 4}
    whole = made(open_wan(path), job)
    driver = Driver(path, job, tmp_path / "j", together=2)
    assert driver.hear("step 2"), "the driver has ended"
    driver.kill()
    kept = job | {"resume": "must", "journal_folder": tmp_path / "j"}
    assert equal(made(open_wan(path), kept), whole)
