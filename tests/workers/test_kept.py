"""Workers are kept to the next render, and are one render's at a time."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cut_clips import CLIP, made
from support.thread_workers import ThreadWorker
from support.tiny_models import make_folder, open_wan

from wan_core import WanPipelineLoader
from wan_core.workers import close_workers, give_back_workers, kept, worker_pool


class Pool:
    """Stands for ``WorkerPool``."""

    def __init__(self, devices: tuple[str, ...], gang: int) -> None:
        self.devices, self.gang = tuple(devices), gang
        self.user: object | None = None
        self.wanted, self.usable, self.closed = True, True, False
        self.held: list[str] = []

    def close(self) -> None:
        assert self.user is None and not self.closed
        self.closed = True


@pytest.mark.parametrize("seed", range(20))
def test_a_render_has_its_workers_to_its_end_whatever_others_do(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has another's, none that is asked for is closed, and at most one idle one is kept."""
    monkeypatch.setattr(kept, "WorkerPool", Pool)
    monkeypatch.setattr(kept, "_pools", [])
    at_random, mine = random.Random(seed), dict[object, Any]()
    for _ in range(80):
        turn = at_random.random()
        if turn < 0.5 and len(mine) < 4:
            user, devices = object(), ("cpu",) * at_random.randint(2, 3)
            idle = [p for p in kept._pools if p.user is None and p.wanted]
            pool = worker_pool(devices, 1, user)
            assert pool not in mine.values() and pool.devices == devices
            if idle and idle[0].devices == devices:
                assert pool is idle[0]
            mine[user] = pool
        elif turn < 0.9 and mine:
            user = at_random.choice(list(mine))
            pool, keep = mine.pop(user), at_random.random() < 0.8
            give_back_workers(user, keep=keep)
            assert pool.closed is not (keep and pool.wanted)
        elif turn >= 0.9:
            close_workers()
            assert all(pool in mine.values() for pool in kept._pools)
        assert not any(pool.closed for pool in mine.values())
        assert len([pool for pool in kept._pools if pool.user is None]) <= 1
    assert not any(pool.closed for pool in kept._pools)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be forked here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_off_leaves_the_workers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As servers do that load before they fork; what is registered for the end runs in each."""
    close_workers()
    heard, said = os.pipe()
    monkeypatch.setattr(kept, "WorkerPool", Pool)
    monkeypatch.setattr(Pool, "close", lambda _: os.write(said, b"closed"))
    pool = worker_pool(("cpu", "cpu"))
    child = os.fork()
    if not child:
        kept._close_all()
        os._exit(len(kept._pools))
    assert os.waitpid(child, 0)[1] == 0
    os.set_blocking(heard, False)
    with pytest.raises(BlockingIOError):
        os.read(heard, 1)
    assert worker_pool(("cpu", "cpu")) is pool
    close_workers()
    assert os.read(heard, 9) == b"closed"
    os.close(heard)
    os.close(said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("kept") / "model", "wan2.1-t2v")


JOBS = [CLIP | {"num_inference_steps": 1, "num_frames": 5, "seed": seed} for seed in (1, 2)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("how", ["in two threads", "in a callback"])
def test_two_renders_at_a_time_have_workers_of_their_own(folder: Path, how: str) -> None:
    """Those of two loaders may be; the pages of their weights' files are the same."""
    whole = [made(open_wan(folder), job).latents for job in JOBS]
    found: dict[int, Any] = {}

    def generate(number: int, **more: Any) -> None:
        loader = WanPipelineLoader(enable_caching=False)
        wishes = {"device": "cpu", "precision": "fp32", "devices": 2 + number}
        wrapper = loader.load_wan_pipeline(folder, optimization_config=wishes)
        found[number] = made(wrapper, JOBS[number], **more)
        wrapper.unload()  # and not the workers of the other one

    if how == "in a callback":
        generate(0, preview_callback=lambda *_: 1 in found or generate(1))
    else:
        both = [threading.Thread(target=generate, args=(number,)) for number in (0, 1)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    for number, latents in enumerate(whole):
        assert torch.equal(found[number].latents, latents) and not found[number].warnings
        assert len(found[number].metadata["workers"]) == 2
    assert len(ThreadWorker.made) == 4
