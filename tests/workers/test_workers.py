"""Clips that several workers compute are, bit for bit, those of one process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from support.clips import picture
from support.drivers import Driver
from support.thread_workers import ThreadWorker, hangs
from support.tiny_models import ANIMATE, folders, open_wan

from wan_core import GenerationConfig
from wan_core.config import WanControl
from wan_core.errors import DoesNotFit, WorkerFailed, is_host_oom, is_oom
from wan_core.memory import Card
from wan_core.plan import Planner
from wan_core.render import format_report
from wan_core.workers import (
    child,
    close_workers,
    gang,
    hold_cards,
    join_card,
    pool,
    when_joined,
    worker_pool,
)
from wan_core.workers.process import End

ROOT = Path(__file__).parents[2]
CLIP = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 29, "seed": 1,
        "num_inference_steps": 4, "max_chunk_size": 17, "window_overlap": 8}  # fmt: skip
SHORT = {"prompt": "a red cat", "width": 32, "height": 32, "num_frames": 5, "seed": 1,
         "num_inference_steps": 3}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return folders(tmp_path_factory.mktemp("workers"))


def latents(path: Path, job: dict[str, Any], **wishes: Any) -> torch.Tensor:
    made = open_wan(path, **wishes).generate(GenerationConfig(**job)).raise_for_error()
    assert made.latents is not None
    if "devices" in wishes:
        assert sum(worker["units"] for worker in made.metadata["workers"]) > 0
    return made.latents


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a whole clip with guidance": ("wan2.1-t2v", SHORT, {}),
    "windows": ("wan2.1-t2v", CLIP, {}),
    "two experts, moving windows": (
        "wan2.2-t2v-a14b", CLIP | {"window_schedule": "uniform", "window_fusion": "pyramid"}, {},
    ),
    "image to video, 2.1": ("wan2.1-i2v", SHORT | {"image": picture()}, {}),
    "image to video in windows": ("wan2.2-i2v-a14b", CLIP | {"image": picture()}, {}),
    "5B with a picture": (
        "wan2.2-ti2v-5b", CLIP | {"image": picture(), "window_anchor": True}, {},
    ),
    "5B in segments": (
        "wan2.2-ti2v-5b", CLIP | {"image": picture(), "window_mode": "continuation"}, {},
    ),
    "several prompts": ("wan2.1-t2v", CLIP | {"prompt": None, "prompts": "16: a cat\na dog"}, {}),
    "VACE with a mask and a reference": (
        "wan2.1-vace",
        CLIP | {"control": WanControl(
            video=torch.rand(29, 32, 32, 3, generator=torch.Generator().manual_seed(0)),
            mask=torch.ones(29, 32, 32), reference=torch.full((1, 32, 32, 3), 0.5),
        )},
        {},
    ),
    "Fun Control with a reference": (
        "wan2.2-fun-control-5b",
        CLIP | {"width": 64, "height": 64, "control": WanControl(
            video=torch.rand(29, 64, 64, 3, generator=torch.Generator().manual_seed(0)),
            reference=torch.full((1, 64, 64, 3), 0.5),
        )},
        {},
    ),
    "Fun Camera": (
        "wan2.2-fun-camera-a14b",
        CLIP | {"width": 64, "height": 64, "image": picture(), "control": WanControl(
            camera=torch.randn(1, 24, 8, 64, 64, generator=torch.Generator().manual_seed(4)),
        )},
        {},
    ),
    "Animate with a face, a background and a mask": (
        ANIMATE, SHORT | {"guidance_scale": 3.0, "control": WanControl(
            reference=torch.full((1, 32, 32, 3), 0.5), mask=torch.ones(5, 32, 32),
            **{name: torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(at))
               for at, name in enumerate(("video", "face_video", "background_video"))},
        )},
        {},
    ),
    "guidance in the first steps only": (
        "wan2.1-t2v", CLIP | {"num_inference_steps": 10}, {"guidance_gate": 0.5},
    ),
    "EasyCache": (
        "wan2.1-t2v", CLIP | {"num_inference_steps": 10},
        {"step_cache": "easycache", "step_cache_threshold": 0.5},
    ),
    "MagCache": (
        "wan2.1-t2v", CLIP | {"num_inference_steps": 12},
        {"step_cache": "magcache", "step_cache_factor": 2.0},
    ),
    "streamed": ("wan2.2-t2v-a14b", CLIP, {"offload": "stream", "resident_blocks": 1}),
    "fp8 storage": ("wan2.1-t2v", CLIP, {"fp8_storage": "always"}),
    "by rows": ("wan2.1-t2v", SHORT, {"forward": "lean_rows"}),
    "without guidance": ("wan2.1-t2v", CLIP | {"guidance_scale": 1.0}, {}),
}  # fmt: skip


QUICK = ("a whole clip with guidance", "two experts, moving windows", "5B with a picture")


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_two_workers_give_the_bits_of_one_process(
    folder: Any, threads: type[ThreadWorker], case: str
) -> None:
    family, job, wishes = CASES[case]
    path = folder(family)
    assert torch.equal(latents(path, job, devices=2, **wishes), latents(path, job, **wishes))
    assert len(threads.made) == 2 and all(worker.units for worker in threads.made)
    assert all(not any(unit["second"] for unit in w.units) for w in threads.made) == (
        case == "without guidance"
    )


def test_a_worker_that_dies_costs_the_unit_it_had(folder: Any, threads: type[ThreadWorker]) -> None:
    path = folder("wan2.2-t2v-a14b")
    whole = latents(path, CLIP)
    died: list[int] = []

    def trouble(worker: ThreadWorker, number: int) -> None:
        if number in (3, 7, 11) and number not in died:
            died.append(number)
            worker.die()

    threads.trouble = trouble
    config = GenerationConfig(**CLIP)
    made = open_wan(path, devices=2).generate(config).raise_for_error()
    assert torch.equal(made.latents, whole)
    assert died == [3, 7, 11]
    counted = [unit["number"] for worker in threads.made for unit in worker.units]
    assert sorted(counted) == sorted([*range(1, 17), *died])  # no other unit was computed twice
    assert any("its unit was given to another" in text for text in made.warnings)


def test_a_unit_that_ends_every_worker_is_given_up(
    folder: Any, threads: type[ThreadWorker]
) -> None:
    threads.trouble = lambda worker, number: worker.die() if number == 2 else None
    made = open_wan(folder("wan2.1-t2v"), devices=2).generate(GenerationConfig(**CLIP))
    assert isinstance(made.error, WorkerFailed) and "ended 3 workers" in str(made.error)


@pytest.mark.parametrize("left", [0, 1])
def test_a_worker_that_cannot_be_started_is_told(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """As where no memory is left for another process: the others do its part, or the driver."""

    def start(device: str, told: Any) -> ThreadWorker:
        if len(threads.made) >= left:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return threads(device, told)

    monkeypatch.setattr(gang, "WorkerProcess", start)
    result = open_wan(folder("wan2.1-t2v"), devices=2).generate(GenerationConfig(**SHORT))
    whole = open_wan(folder("wan2.1-t2v")).generate(GenerationConfig(**SHORT))
    assert torch.equal(result.raise_for_error().latents, whole.latents)
    told = "cpu (worker 2) cannot be started: [Errno 11] Resource temporarily unavailable."
    assert told in result.warnings
    assert ("on 2 cards" in result.applied_optimizations) == bool(left)


def alone(result: Any) -> str:
    """Return what is said of a render that one process has made for its workers."""
    result.raise_for_error()
    (said,) = [text for text in result.warnings if "This process went on alone, on cpu" in text]
    assert said in result.metadata["plan"][-1] and said in format_report(result)
    assert "on 2 cards" not in result.applied_optimizations
    return said


class Fate:
    """What becomes of every worker: they die in their first unit, in a later one, or fail."""

    def __init__(self, units: int, error: Exception | None = None) -> None:
        self.left, self.error = units, error

    def __call__(self, worker: ThreadWorker, number: int) -> None:
        self.left -= 1
        if self.left >= 0:
            return
        if self.error is not None:
            raise self.error
        worker.die()


BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"


@pytest.mark.parametrize(
    ("fate", "last", "told"),
    [
        (Fate(0), End(1, "Traceback\nImportError: no cudnn\n"), "(exit code 1: ImportError: no"),
        (Fate(2), End(-9), "(ended by SIGKILL)"),
        pytest.param(Fate(0, RuntimeError(BUSY)), End(), BUSY, marks=pytest.mark.slow),
    ],
)
def test_one_process_goes_on_where_all_workers_have_ended(
    folder: Any, threads: type[ThreadWorker], fate: Fate, last: End, told: str
) -> None:
    """From the step that is finished, with the same bits."""
    path = folder("wan2.1-t2v")
    whole, steps = latents(path, SHORT), list[int]()
    threads.trouble, threads.last = fate, last
    pool = worker_pool(("cpu", "cpu"))

    def told_step(step: int, *_: Any) -> None:
        steps.append(step)
        if step == 1 and fate.left == 0:
            pool._restarts = 0

    config = GenerationConfig(**SHORT, progress_callback=told_step)
    found = open_wan(path, devices=2).generate(config)
    assert steps == [1, 2, 3]
    said = alone(found)
    assert "cpu (worker 1)" in said and told in said
    assert torch.equal(found.latents, whole)


@pytest.mark.parametrize("what", ["it crashes", "one cannot hold it"])
def test_what_one_process_cannot_do_either_is_refused(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    threads.trouble, threads.last = Fate(0), End(1, "RuntimeError: no driver")
    if what == "it crashes":
        threads.last = End(-11)
    else:

        def refuse(*_: Any) -> None:
            raise DoesNotFit("81 frames need 99 GiB")

        monkeypatch.setattr(Planner, "plan_alone", refuse)
    made = open_wan(folder("wan2.1-t2v"), devices=2).generate(GenerationConfig(**SHORT))
    assert isinstance(made.error, WorkerFailed)
    if what == "it crashes":
        assert "ended 3 workers" in str(made.error) and "SIGSEGV" in str(made.error)
    else:
        assert "no driver" in str(made.error)
        assert "cannot make the clip by itself either: 81 frames need 99" in str(made.error)


def test_processes_that_cannot_start_say_why_and_are_not_started_for_ever(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ones, whose package cannot be imported: their own error is told, once for each."""
    from wan_core.workers import process

    monkeypatch.setattr(process, "_START", "raise ImportError('no libcudnn here')")
    path = folder("wan2.1-t2v")
    close_workers()
    found = open_wan(path, devices=2).generate(GenerationConfig(**SHORT))
    said = alone(found)
    assert said.count("cpu (worker 1) has ended") == 1
    assert "(exit code 1: ImportError: no libcudnn here)" in said
    assert torch.equal(found.latents, latents(path, SHORT))
    close_workers()


NCCL = "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"


@pytest.mark.parametrize(
    ("end", "words", "host"),
    [
        (End(-6, NCCL + "Cuda failure 2 'out of memory'\n"), "SIGABRT", False),
        (End(1, 'File "child.py", line 1, in load\nMemoryError\n'), "exit code 1", True),
    ],
)
def test_a_worker_whose_last_words_are_of_memory_ends_in_a_smaller_plan(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch, end: End,
    words: str, host: bool,
) -> None:  # fmt: skip
    """As where NCCL's own thread ends the process: there is no message, but the end of its log."""
    from wan_core.render import stages
    from wan_core.render.stages import StageRunner

    def smaller(self: StageRunner, stage: str, failure: str, *, must: bool) -> None:
        downs.append(failure)

    downs: list[str] = []
    seen: list[BaseException | None] = []
    monkeypatch.setattr(StageRunner, "_step_down", smaller)
    monkeypatch.setattr(stages, "is_oom", lambda err: bool(seen.append(err)) or is_oom(err))
    threads.last = end
    died: list[int] = []

    def trouble(worker: ThreadWorker, number: int) -> None:
        if number == 5 and not died:
            died.append(number)
            worker.die()

    threads.trouble = trouble
    path = folder("wan2.1-t2v")
    made = open_wan(path, devices=2).generate(GenerationConfig(**SHORT)).raise_for_error()
    (failure,) = downs
    assert words in failure and "on cpu (worker" in failure
    assert is_host_oom(seen[0]) == host
    assert torch.equal(made.latents, latents(path, SHORT))


def test_a_gang_of_which_one_cannot_be_started_ends_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []

    def start(device: str, told: Any) -> Any:
        if made:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        made.append(MagicMock())
        return made[0]

    monkeypatch.setattr(gang, "WorkerProcess", start)
    before = set(Path(tempfile.gettempdir()).glob("wanfit_gang_*"))
    with pytest.raises(BlockingIOError):
        gang.Gang(("cpu", "cpu"), "two", lambda *_: None)
    assert made[0].kill.called
    assert set(Path(tempfile.gettempdir()).glob("wanfit_gang_*")) <= before


MEETS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from wan_core.workers.gang import _meeting_place
place, lock = _meeting_place()
print(place, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gangs need NCCL or gloo")
def test_what_a_killed_driver_left_is_removed_and_nothing_of_the_living(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what another user's, a link's or a new folder is."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", MEETS, str(ROOT)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        for _ in range(2)
    ]  # fmt: skip
    dead, living = (Path(one.stdout.readline().strip()) for one in drivers if one.stdout)
    assert dead.parent == living.parent == tmp_path
    drivers[0].kill()
    drivers[0].wait()
    (dead / "meeting").write_text("a store")
    fresh, stray, other, link = (tmp_path / f"wanfit_gang_{n}" for n in "abcd")
    for folder in (fresh, stray, other):
        folder.mkdir()
    os.utime(stray, (0, 0))
    link.symlink_to(other)
    (other / "lock").touch()
    uid = os.getuid()
    whose = {other: uid + 1}
    lstat = Path.lstat

    def of_whom(path: Path) -> Any:
        found = lstat(path)
        return os.stat_result((*found[:4], whose.get(path, found.st_uid), *found[5:]))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "lstat", of_whom)
        place, lock = gang._meeting_place()
    assert set(tmp_path.iterdir()) == {living, fresh, other, link, place}
    drivers[1].kill()
    drivers[1].wait()
    again, lock_of_it = gang._meeting_place()
    assert set(tmp_path.iterdir()) == {fresh, link, place, again}
    for one in (lock, lock_of_it):
        one.close()


def test_a_worker_that_hangs_is_ended(folder: Any, threads: type[ThreadWorker]) -> None:
    path = folder("wan2.1-t2v")
    whole = latents(path, CLIP)
    pool, hung = worker_pool(("cpu", "cpu")), list[bool]()

    def trouble(worker: ThreadWorker, number: int) -> None:
        if number == 4 and not hung:
            hung.append(True)
            pool.quiet_seconds = 0.5
            try:
                hangs(worker)
            finally:
                pool.quiet_seconds = None  # others may pause on a busy machine

    threads.trouble = trouble
    made = open_wan(path, devices=2).generate(GenerationConfig(**CLIP)).raise_for_error()
    assert hung and torch.equal(made.latents, whole)
    assert any("said nothing for" in text for text in made.warnings)


def test_what_is_new_to_a_worker_may_take_long(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels may be compiled in the first unit of other weights or shapes: it does not hang."""
    monkeypatch.setattr(gang, "_QUIET_SECONDS", 1.0)
    monkeypatch.setattr(gang, "_QUIET_FACTOR", 1.0)
    met: list[str] = []

    def trouble(worker: ThreadWorker, number: int) -> None:
        weights = worker.units[-1]["weights"]
        if worker is threads.made[0] and weights not in met:
            met.append(weights)
            time.sleep(1.5)

    threads.trouble = trouble
    made = open_wan(folder("wan2.2-t2v-a14b"), devices=2).generate(GenerationConfig(**SHORT))
    assert made.success and len(met) == 2 and not made.warnings
    assert len(threads.made) == 2


def test_a_peak_is_that_of_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    held = [7]
    worker = child.Worker("cuda:0", lambda header, *_: told.append(header))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: max(held))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.clear())

    def compute(*_: object) -> tuple[torch.Tensor, None]:
        held.append(3)
        return torch.zeros(1), None

    monkeypatch.setattr(worker, "_given", lambda *_: (None, None, None, None))
    monkeypatch.setattr(child, "compute_unit", compute)
    worker._next_beat = float("inf")
    worker._work({"number": 1, "cut": False, "both": False, "weights": ""}, {})
    assert told[-1]["peak_bytes"] == 3


def test_running_out_of_memory_ends_in_a_smaller_plan(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver decides; every worker gets the new plan, and the steps before are kept."""
    from wan_core.render.stages import StageRunner

    path = folder("wan2.1-t2v")
    whole = latents(path, CLIP)
    failed: list[int] = []

    def trouble(worker: ThreadWorker, number: int) -> None:
        if number == 9 and not failed:
            failed.append(number)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    def smaller(self: StageRunner, stage: str, failure: str, *, must: bool) -> None:
        assert must and stage == "denoise" and "(on cpu (worker" in failure
        self.plan = self.plan.with_choices(stream=True, lean=True, resident_blocks=1)

    monkeypatch.setattr(StageRunner, "_step_down", smaller)
    threads.trouble = trouble
    steps: list[int] = []
    config = GenerationConfig(**CLIP, progress_callback=lambda step, *_: steps.append(step))
    made = open_wan(path, devices=2).generate(config).raise_for_error()
    assert failed and torch.equal(made.latents, whole) and steps == [1, 2, 3, 4]
    keys = [{unit["weights"] for unit in worker.units} for worker in threads.made]
    assert len(set.union(*keys)) == 2


def test_an_error_in_a_worker_is_told(folder: Any, threads: type[ThreadWorker]) -> None:
    def trouble(worker: ThreadWorker, number: int) -> None:
        raise ValueError("bad numbers")

    threads.trouble = trouble
    made = open_wan(folder("wan2.1-t2v"), devices=2).generate(GenerationConfig(**SHORT))
    assert isinstance(made.error, WorkerFailed)
    assert "ValueError: bad numbers (on cpu (worker" in str(made.error)


class Interrupt(BaseException):
    """Stands for ComfyUI's."""


def test_an_interrupt_ends_the_units_and_the_next_render_is_whole(
    folder: Any, threads: type[ThreadWorker]
) -> None:
    path = folder("wan2.1-t2v")
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 12:
            raise Interrupt

    wrapper = open_wan(path, devices=2)
    with pytest.raises(Interrupt):
        wrapper.generate(GenerationConfig(**CLIP, interrupt_check=check))
    assert torch.equal(
        wrapper.generate(GenerationConfig(**CLIP)).raise_for_error().latents, latents(path, CLIP)
    )
    assert len(threads.made) == 2  # the same workers


def test_an_interrupt_is_told_also_where_the_workers_fail(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, **_: Any) -> None:
        raise WorkerFailed("No worker is left")

    def stop(step: int, *_: Any) -> None:
        raise Interrupt

    monkeypatch.setattr(pool.WorkerPool, "release", fails)
    with pytest.raises(Interrupt):
        open_wan(folder("wan2.1-t2v"), devices=2).generate(
            GenerationConfig(**SHORT, progress_callback=stop)
        )


def test_one_process_goes_on_where_workers_stopped(
    folder: Any, threads: type[ThreadWorker], tmp_path: Path
) -> None:
    """How many cards compute is no part of a render's identity."""
    path = folder("wan2.2-t2v-a14b")
    whole = latents(path, CLIP)
    kept = CLIP | {"resume": "auto", "journal_folder": tmp_path / "j"}

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise Interrupt

    for first, then in (({"devices": 2}, {}), ({}, {"devices": 2})):
        with pytest.raises(Interrupt):
            open_wan(path, **first).generate(GenerationConfig(**kept, progress_callback=stop))
        made = open_wan(path, **then).generate(GenerationConfig(**kept)).raise_for_error()
        assert "after step 2" in made.metadata["resumed"]
        assert torch.equal(made.latents, whole)


def test_a_file_that_differs_is_refused_before_the_first_unit(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from wan_core.workers import Weights

    honest = Weights.of

    def other(*args: Any, **more: Any) -> Weights:
        made = honest(*args, **more)
        return replace(made, files=(replace(made.files[0], size=1), *made.files[1:]))

    monkeypatch.setattr(Weights, "of", staticmethod(other))
    made = open_wan(folder("wan2.1-t2v"), devices=2).generate(GenerationConfig(**SHORT))
    assert isinstance(made.error, WorkerFailed) and "the driver's has 1" in str(made.error)


@pytest.mark.parametrize("what", ["versions", "code_digest"])
def test_other_versions_or_sources_are_refused(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Sources too: an update between the start of the program and that of its workers."""
    own = pool.versions()
    others = {"versions": own | {"torch": "1.0"}, "code_digest": "1.0"}
    monkeypatch.setattr(pool, what, lambda: others[what])
    made = open_wan(folder("wan2.1-t2v"), devices=2).generate(GenerationConfig(**SHORT))
    assert isinstance(made.error, WorkerFailed) and "(here 1.0)" in str(made.error)


def test_processes_give_the_same_bits_also_when_one_is_killed(folder: Any) -> None:
    """The real thing, once: two processes, two experts, windows and guidance; one is killed."""
    path = folder("wan2.2-t2v-a14b")
    whole = latents(path, SHORT)
    close_workers()
    two = worker_pool(("cpu", "cpu"))
    pids = two.pids

    def kill(step: int, *_: Any) -> None:
        if step == 1:
            two._restarts = 0  # starting a third takes seconds; the slow test does
            for asked in ("SIGINT", "SIGTERM", "SIGHUP"):  # the driver hears them too, and ends it
                os.kill(pids[1], getattr(signal, asked))
            os.kill(pids[0], signal.SIGKILL)

    config = GenerationConfig(**SHORT, progress_callback=kill)
    made = open_wan(path, devices=2).generate(config).raise_for_error()
    assert torch.equal(made.latents, whole)
    assert any("has ended" in text for text in made.warnings)
    assert not two.usable and len(two.pids) == 1
    close_workers()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_workers_that_die_at_twenty_random_moments(
    folder: Any, threads: type[ThreadWorker]
) -> None:
    """Within a unit, at any look for an interrupt: the same bits, and at most that unit anew."""
    path, dice = folder("wan2.2-t2v-a14b"), random.Random(5)
    whole = latents(path, CLIP)
    left, died = 0, [0]
    for _ in range(20):
        close_workers()
        threads.made, left = [], dice.randint(1, 60)
        died.clear()

        def look(worker: ThreadWorker) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                died.append(worker._worker._unit)
                worker.die()

        threads.looked = look
        made = open_wan(path, devices=2).generate(GenerationConfig(**CLIP)).raise_for_error()
        threads.looked = None
        assert torch.equal(made.latents, whole)
        counted = [unit["number"] for worker in threads.made for unit in worker.units]
        assert sorted(counted) in (list(range(1, 17)), sorted([*range(1, 17), *died]))
        assert len(died) == (left <= 0)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_a_driver_that_is_killed_takes_its_workers_along_and_goes_on(
    folder: Any, tmp_path: Path, step: int
) -> None:
    path = folder("wan2.2-t2v-a14b")
    whole = latents(path, CLIP)
    driver = Driver(path, CLIP, tmp_path / "j")
    assert driver.hear(f"step {step}"), "the driver has ended"
    driver.kill()
    kept = CLIP | {"resume": "must", "journal_folder": tmp_path / "j"}
    made = open_wan(path).generate(GenerationConfig(**kept)).raise_for_error()
    assert torch.equal(made.latents, whole)


@pytest.mark.skipif(sys.platform != "linux", reason="the names of Linux's interfaces")
def test_what_a_worker_sees_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """One card; no port that others reach; NVLink's multicast only where it was asked for."""
    from wan_core.workers.process import environment

    seen = environment("cuda:1", {"CUDA_VISIBLE_DEVICES": "4, 6", "GLOO_SOCKET_IFNAME": "eth0"})
    assert seen["CUDA_VISIBLE_DEVICES"] == "6" and seen["GLOO_SOCKET_IFNAME"] == "lo"
    assert seen["NCCL_SOCKET_IFNAME"] == "lo" and seen["NCCL_NVLS_ENABLE"] == "0"
    assert seen["TORCH_NCCL_HIGH_PRIORITY"] == "1"
    assert environment("cpu", {"NCCL_NVLS_ENABLE": "1"})["NCCL_NVLS_ENABLE"] == "1"
    # Somebody has set the variable after torch had read it.
    with pytest.raises(OSError, match="CUDA_VISIBLE_DEVICES is '4', without a card 1"):
        environment("cuda:1", {"CUDA_VISIBLE_DEVICES": "4"})
    for version, value in (("2.7.1+cu128", "1"), ("2.8.0", None), ("2.10.0", None)):
        monkeypatch.setattr(torch, "__version__", version)  # newer ones warn of it in each worker
        assert environment("cpu", {}).get("TORCH_NCCL_AVOID_RECORD_STREAMS") == value


@pytest.mark.skipif(sys.platform != "linux", reason="reads another process's environment")
def test_a_worker_does_not_see_the_token_of_the_server_that_started_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from wan_core.workers import process

    monkeypatch.setattr(process, "_START", "import time; time.sleep(60)")
    monkeypatch.setenv("WANFIT_TOKEN", "a server's secret")
    monkeypatch.setenv("WANFIT_HERE", "yes")
    for device in ("cpu", "cuda:0"):
        worker = process.WorkerProcess(device, lambda *_: None)
        try:
            seen = Path(f"/proc/{worker.pid}/environ").read_bytes()
            assert b"WANFIT_HERE=yes" in seen and b"TOKEN" not in seen
        finally:
            worker.kill()


def test_a_worker_starts_where_the_driver_s_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries ask for the folder when they are loaded, and end the process without one."""
    from wan_core.workers import process

    monkeypatch.setattr(process, "_START", "import os; raise SystemExit(os.getcwd())")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    ended = threading.Event()
    worker = process.WorkerProcess("cpu", lambda *_: ended.set())
    assert ended.wait(60) and worker.end().words.strip() == str(process._ROOT)


def test_a_render_goes_on_with_the_overlap_it_began_with(
    folder: Any, threads: type[ThreadWorker], tmp_path: Path
) -> None:
    """Sixteen latent frames are two windows of ten that share four; three cards have time for one
    more, and one process goes on with it."""
    path = folder("wan2.1-t2v")
    job = CLIP | {"num_frames": 61, "guidance_scale": 1.0, "max_chunk_size": 37}
    job |= {"num_inference_steps": 3, "width": 16, "height": 16}
    del job["window_overlap"]
    three = latents(path, job, devices=3)
    assert sum(len(worker.units) for worker in threads.made) == 3 * 3
    alone = latents(path, job)
    assert torch.equal(three, latents(path, job | {"window_overlap": 20}))
    assert not torch.equal(three, alone)
    kept = job | {"resume": "auto", "journal_folder": tmp_path / "j"}

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        open_wan(path, devices=3).generate(GenerationConfig(**kept, progress_callback=stop))
    made = open_wan(path).generate(GenerationConfig(**kept)).raise_for_error()
    assert "after step 2" in made.metadata["resumed"]
    assert any("and so do those of the rest" in text for text in made.warnings)
    assert torch.equal(made.latents, three)


def test_a_card_that_is_held_gets_its_first_unit_when_it_joins(
    folder: Any, threads: type[ThreadWorker]
) -> None:
    """Another program decodes there: until it has done, the other worker takes every unit."""
    path = folder("wan2.1-t2v")
    whole = latents(path, CLIP)
    begun: list[tuple[int, int]] = []

    def trouble(worker: ThreadWorker, number: int) -> None:
        begun.append((threads.made.index(worker), number))
        if number == 6:
            assert {index for index, _ in begun} == {1}
            join_card("cpu")

    threads.trouble = trouble
    hold_cards(["cpu"])
    try:
        assert torch.equal(latents(path, CLIP, devices=2), whole)
        assert {index for index, number in begun if number > 8} == {0, 1}
        # With all of them held it waits, and an interrupt is heard.
        hold_cards(["cpu", "cpu"])
        asked: list[int] = []

        def stop() -> None:
            asked.append(1)
            if len(asked) > 30:
                raise KeyboardInterrupt

        begun.clear()
        with pytest.raises(KeyboardInterrupt):
            latents(path, CLIP | {"interrupt_check": stop}, devices=2)
        assert not begun
    finally:
        hold_cards([])


def test_a_plan_counts_a_held_card_as_it_will_be() -> None:
    cards = tuple(
        Card(f"cuda:{i}", "H200", total, free)
        for i, (free, total) in enumerate([(20, 80), (70, 80), (60, 80), (10, 40)])
    )
    assert when_joined(cards) == cards
    hold_cards(["cuda:0", "cuda:3"])
    try:
        assert [card.free_bytes for card in when_joined(cards)] == [70, 70, 60, 40]
    finally:
        hold_cards([])


def test_a_worker_that_cannot_read_what_it_is_told_says_why_before_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory that ran out for that leads to a smaller plan; a process that just ends is a death."""
    from wan_core.workers import child

    class Stream:
        def read(self, *_: Any) -> bytes:
            raise MemoryError

        readinto = read

    monkeypatch.setattr(child.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        child._listen(Stream(), None)  # type: ignore[arg-type]
    assert ended.value.code == 1
    assert End(1, capsys.readouterr().err).out_of_ram
