"""Real processes that are killed, stopped, interrupted and starved: the same bits, within seconds.

The moments are drawn from seeds. What threads stand for elsewhere is here what a system does.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cut_clips import CLIP as CUT
from support.cut_clips import cut_units, equal, four_heads, made, make_links_free
from support.drivers import Driver, alive
from support.tiny_models import folders, open_wan

from wan_core import GenerationConfig
from wan_core.sampling.units import HerePasses
from wan_core.workers import close_workers, gang, worker_pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="stops and starves processes as Linux does"),
]
CLIP: dict[str, Any] = {
    "prompt": "a red cat", "width": 64, "height": 64, "num_frames": 29, "seed": 1,
    "num_inference_steps": 8, "max_chunk_size": 17, "window_overlap": 8,
}  # fmt: skip
UNITS = 8 * 2 * 2
"""Steps, windows, and passes of guidance."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = folders(tmp_path_factory.mktemp("kills"))("wan2.2-t2v-a14b")
    return found


@pytest.fixture(scope="module")
def whole(path: Path) -> Any:
    return made(open_wan(path), CLIP)


@pytest.fixture(autouse=True, scope="module")
def _workers() -> Iterator[None]:
    close_workers()
    yield
    close_workers()


def wait_until_ready(pool: Any) -> None:
    deadline = time.monotonic() + 120
    while not (pool.usable and all(one.idle for one in pool._gangs)):
        assert time.monotonic() < deadline
        pool._pump(0.05)


@pytest.mark.parametrize("seed", range(10))
def test_workers_killed_at_random_moments_cost_a_unit_each_at_most(
    path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Two kills for each of ten seeds, of either worker, anywhere in a render, and also between."""
    dice, given = random.Random(seed), list[int]()
    begins = gang.Gang.begins

    def counted(self: gang.Gang, number: int, *rest: Any, **more: Any) -> None:
        given.append(number)
        begins(self, number, *rest, **more)

    monkeypatch.setattr(gang.Gang, "begins", counted)
    pool = worker_pool(("cpu", "cpu"))
    wrapper = open_wan(path, devices=2)
    wait_until_ready(pool)
    assert equal(made(wrapper, CLIP), whole)
    begun = time.monotonic()
    assert equal(made(wrapper, CLIP), whole)
    usual = time.monotonic() - begun
    for _ in range(2):
        wait_until_ready(pool)
        given.clear()
        victim = pool.pids[dice.randrange(2)]
        killer = threading.Timer(dice.uniform(0, usual), os.kill, (victim, signal.SIGKILL))
        killer.start()
        found = made(wrapper, CLIP)
        killer.join()
        assert equal(found, whole)
        assert len(set(given)) == UNITS and len(given) <= UNITS + 1, given


@pytest.mark.parametrize("seed", range(10))
def test_drivers_killed_at_random_moments_cost_the_units_in_work(
    path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    """Two for each of ten seeds. Workers end with them; of each card one unit is made again.

    What is left is made by this process alone, which takes over what they have finished.
    """
    dice, given = random.Random(seed), list[int]()
    compute = HerePasses._compute

    def counted(self: HerePasses, numbers: Any, *rest: Any) -> None:
        given.extend(numbers)
        compute(self, numbers, *rest)

    monkeypatch.setattr(HerePasses, "_compute", counted)
    moments: list[int] = []
    for number in range(2):
        journal = tmp_path / str(number)
        driver = Driver(path, CLIP, journal, units_kept=True)
        for _ in range(dice.randrange(1, UNITS)):
            driver.hear("unit")
        time.sleep(dice.uniform(0, 0.02))
        driver.kill()
        job = CLIP | {"resume": "auto", "journal_folder": journal}
        begun = driver.said.count("unit")
        given.clear()
        found = made(open_wan(path), job)
        assert equal(found, whole)
        # In work were two at most.
        assert UNITS <= begun + len(given) <= UNITS + 2, (begun, len(given))
        moments.append(begun)
    assert min(moments) < UNITS, moments


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that a gang of two cuts, with records of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = four_heads(tmp_path, "wan2.1-t2v")
    make_links_free(found)
    return found


class Interrupt(BaseException):
    """Stands for ComfyUI's."""


PLAIN = CUT | {"guidance_scale": 1.0, "num_inference_steps": 6}


def test_a_gang_that_is_interrupted_or_hangs_ends_within_seconds(cut: Path) -> None:
    pool = worker_pool(("cpu", "cpu"), 2)
    wrapper = open_wan(cut, devices=2)
    whole = made(open_wan(cut), PLAIN)
    first = made(wrapper, PLAIN)
    assert equal(first, whole) and cut_units(first) == 6
    pids, asked = pool.pids, list[float]()

    def check() -> None:
        asked.append(time.monotonic())
        if len(asked) == 4:
            raise Interrupt

    with pytest.raises(Interrupt):
        made(wrapper, PLAIN | {"num_inference_steps": 400}, interrupt_check=check)
    assert time.monotonic() - asked[-1] < 10
    assert equal(made(wrapper, PLAIN), whole) and pool.pids == pids  # the same gang

    stopped: list[float] = []

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            pool.quiet_seconds = 5.0
            os.kill(pids[1], signal.SIGSTOP)
            stopped.append(time.monotonic())
        elif step == 3:
            stopped.append(time.monotonic())

    found = made(wrapper, PLAIN, progress_callback=stop)
    assert equal(found, whole) and "said nothing for" in " ".join(found.warnings)
    assert stopped[1] - stopped[0] < 120  # a new gang was started meanwhile
    assert not any(alive(pid) for pid in pids) and not set(pids) & set(pool.pids)


def test_a_rank_without_memory_leads_to_a_smaller_plan_within_seconds(
    cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system gives one of two processes no more memory, and the next clip is larger."""
    import resource  # not on Windows

    # Each tensor from 64 KiB on is asked of the system and given back, so that nothing is left in
    # the process that the larger clip could be made in.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    small = PLAIN | {"num_inference_steps": 3}
    large = small | {"width": 512, "height": 512}
    whole = made(open_wan(cut), large)
    pool = worker_pool(("cpu", "cpu"), 2)
    wrapper = open_wan(cut, devices=2)
    made(wrapper, small)
    wait_until_ready(pool)
    pid = pool.pids[1]
    most = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (most, most))
    begun = time.monotonic()
    found = made(wrapper, large)
    close_workers()
    assert equal(found, whole) and time.monotonic() - begun < 150
    told = " ".join(found.warnings)
    # In a unit it leads to a smaller plan; as the process reads what units need, to its end.
    assert "cpu, cpu (workers 1 to 2)" in told
    assert "Memory ran out in stage denoise" in told or "can't allocate memory" in told, told


@pytest.mark.parametrize(("count", "seed"), [(2, 0), (2, 1), (4, 2), (4, 3)])
def test_a_decode_in_strips_outlives_the_processes_that_make_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, count: int, seed: int
) -> None:
    """A worker is killed at a random chunk: no frame is lost or made twice."""
    monkeypatch.setattr("wan_core.plan.strips._GAIN", 100.0)
    dice, wide = random.Random(seed), CLIP | {"width": 128, "num_inference_steps": 2}
    wide |= {"switch_step": 1}
    whole = open_wan(path, speed="fast").generate(GenerationConfig(**wide)).raise_for_error()
    pool = worker_pool(("cpu",) * count)
    wrapper = open_wan(path, speed="fast", devices=count)
    wait_until_ready(pool)
    found = wrapper.generate(GenerationConfig(**wide)).raise_for_error()
    assert f"decoded in {count} strips" in found.applied_optimizations
    assert torch.allclose(found.frames, whole.frames, rtol=0, atol=2e-6) and not found.warnings
    wait_until_ready(pool)
    told, at = list[int](), dice.choice((1, 5, 13))
    before = set(Path("/dev/shm").glob("wanfit_ring_*"))  # of a program that was killed long ago

    def kill(done: int, wanted: int) -> None:
        told.append(done)
        if done == at:
            os.kill(dice.choice(pool.pids), signal.SIGKILL)

    begun = time.monotonic()
    job = GenerationConfig(**wide, decode_callback=kill)
    found = wrapper.generate(job).raise_for_error()
    assert time.monotonic() - begun < 120
    assert torch.allclose(found.frames, whole.frames, rtol=0, atol=2e-6)
    assert told == list(range(1, 30, 4))
    assert set(Path("/dev/shm").glob("wanfit_ring_*")) <= before
