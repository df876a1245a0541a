"""Clips that their workers decode in strips: one picture, whatever becomes of the workers."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import cut_clips
from support.thread_workers import ThreadWorker
from support.tiny_models import folders, open_wan

from wan_core import GenerationConfig
from wan_core.memory import CHUNKS, CardRecords
from wan_core.render.decode import Decoding, try_strips
from wan_core.render.pipeline import WanPipelineWrapper
from wan_core.render.video import read_video
from wan_core.sampling import StreamingDecoder, to_pictures
from wan_core.workers import WorkerPool, worker_pool
from wan_core.workers.ring import Ring

CLIP: dict[str, Any] = {
    "prompt": "a red cat", "width": 64, "height": 16, "num_frames": 13, "seed": 1,
    "num_inference_steps": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan_core.plan.strips._GAIN", 100.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return folders(tmp_path_factory.mktemp("strips"))


@pytest.fixture(scope="module")
def whole(folder: Any) -> Any:
    """The clip as one process makes it."""
    return made(folder("wan2.1-t2v"), {}, speed="fast")


def made(path: Path, job: dict[str, Any], **wishes: Any) -> Any:
    config = GenerationConfig(**{**CLIP, **job})
    return open_wan(path, **wishes).generate(config).raise_for_error()


def near(found: Any, expected: Any) -> bool:
    """The numbers of one process but for rounding, which a seam would exceed a thousandfold."""
    return bool(torch.allclose(found.frames, expected.frames, rtol=0, atol=2e-6))


def decoding(worker: ThreadWorker) -> bool:
    """Whether a worker makes a strip."""
    return worker._worker._placed[0][1] is not None


CASES = [
    ("wan2.1-t2v", 2, {}),
    ("wan2.2-ti2v-5b", 2, {"width": 32, "height": 96, "batch_size": 2}),
    ("wan2.1-t2v", 4, {"num_frames": 33, "max_chunk_size": 17, "window_overlap": 4}),
]


@pytest.mark.parametrize(
    ("family", "count", "job"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
)
def test_strips_make_the_picture_of_one_process(
    folder: Any, threads: type[ThreadWorker], family: str, count: int, job: dict[str, Any]
) -> None:
    path = folder(family)
    whole, told = made(path, job, speed="fast"), list[tuple[int, int]]()
    job = job | {"decode_callback": lambda done, wanted: told.append((done, wanted))}
    found = made(path, job, speed="fast", devices=count)
    assert near(found, whole) and not found.warnings
    decode = next(stage for stage in found.stages if stage.name == "decode")
    assert decode.note == f"in {count} strips on as many cards"
    assert f"decoded in {count} strips" in found.applied_optimizations
    assert any(f"decode in {count} strips" in text for text in found.metadata["plan"])
    frames = (CLIP | job)["num_frames"]
    assert told == [(n, frames) for n in range(1, frames + 1, 4)]
    assert not any(decoding(worker) for worker in threads.made), "their memory is given back"


def test_a_file_of_strips_shows_what_one_process_writes(
    folder: Any, threads: type[ThreadWorker], tmp_path: Path
) -> None:
    """As bytes, chunk by chunk, no further ahead than there is room; nothing is left over."""
    ahead: list[int] = []
    make = Ring.make

    def watched(*given: Any, **more: Any) -> Ring:
        ring = make(*given, **more)
        assert ring.whole_bytes and ring.dtype == torch.uint8
        ahead.append(ring.slots)
        rings.append(ring)
        return ring

    rings: list[Ring] = []
    path, shown = folder("wan2.1-t2v"), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Ring, "make", staticmethod(watched))
        for name, wishes in (("one", {}), ("two", {"devices": 2})):
            job = {"return_frames": False, "output_path": str(tmp_path / f"{name}.mp4"), "crf": 0}
            made(path, job, speed="fast", **wishes)
            shown.append(read_video(tmp_path / f"{name}.mp4", "video").int())
    assert len(rings) == 1 and rings[0]._open == []
    with pytest.raises(OSError):
        rings[0].map()
    assert shown[0].shape == (13, 16, 64, 3)
    assert (shown[0] - shown[1]).abs().max() <= 2  # rounded to bytes, and to the file's colours


_WRITES = """
import os, sys
sys.stdout.write(str(os.pwrite(os.open(sys.argv[1], os.O_RDWR), b"\\x07", 5)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_pictures_on_their_way_have_a_file_without_a_name() -> None:
    """Whoever is killed at whatever moment: there is nothing in any folder to be left over."""

    def names() -> set[Path]:
        folders = (Path("/dev/shm"), Path(tempfile.gettempdir()))
        return {path for folder in folders for path in folder.glob("wanfit_ring_*")}

    before = names()
    ring = Ring.make(2, (1, 4, 2, 3, 3), whole_bytes=True)
    assert names() == before
    slots = Ring.from_plain(ring.plain()).map()
    assert slots.shape == (2, 1, 4, 2, 3, 3) and not slots.any()
    other = subprocess.run([sys.executable, "-c", _WRITES, ring.path], capture_output=True)
    assert other.stdout == b"1", other.stderr
    assert slots.flatten()[5] == 7, "another process sees the same pages"
    ring.remove()
    ring.remove()
    with pytest.raises(OSError):
        ring.map()
    assert names() == before, "who comes late makes no file anew"
    assert slots.flatten()[5] == 7


def test_a_file_that_took_the_place_of_a_ring_is_left_alone(tmp_path: Path) -> None:
    ring = Ring.make(1, (1, 1, 2, 2, 3), whole_bytes=True)
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    with pytest.raises(OSError):
        replace(ring, path=str(other)).map()
    assert other.read_bytes() == b"mine"
    ring.remove()


@pytest.mark.parametrize("what", ["out of memory", "other dtype"])
def test_a_trial_of_strips_costs_a_finished_clip_nothing(what: str) -> None:
    @contextmanager
    def stage(name: str) -> Iterator[None]:
        assert what == "out of memory", "the first chunks were made in another dtype"
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    plan = SimpleNamespace(decode_trial=2)
    stages: Any = SimpleNamespace(
        plan=plan, steps_down=0, has_workers=True, timeline=SimpleNamespace(stage=stage)
    )
    progress = Decoding(torch.zeros(1), None, [], 9, overflowed=what == "other dtype")
    progress.first = dict.fromkeys(range(CHUNKS), torch.zeros(1))
    try_strips(stages, progress)


class Trouble:
    """Ends or starves a worker in the middle of its strip, once; no other is started for it."""

    def __init__(self, what: str, after: int, cards: int = 2, gang: int = 1) -> None:
        self.what, self.after, self.looks, self.happened = what, after, 0, False
        self.pool = worker_pool(("cpu",) * cards, gang)

    def __call__(self, worker: ThreadWorker) -> None:
        if not decoding(worker) or worker is not ThreadWorker.made[1] or self.happened:
            return
        self.looks += 1
        if self.looks < self.after:
            return
        self.happened = True
        if self.what == "dies":
            self.pool._restarts = 0
            worker.die()
        raise torch.OutOfMemoryError("out of memory: injected")


@pytest.fixture
def nobody_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker can take another's strip, as where all have one in work."""
    free = WorkerPool.free_ranks

    def none_in_a_decode(pool: WorkerPool, count: int) -> Any:
        return [] if pool._strips[1] is not None else free(pool, count)

    monkeypatch.setattr(WorkerPool, "free_ranks", none_in_a_decode)


@pytest.mark.usefixtures("nobody_is_free")
@pytest.mark.parametrize(
    ("what", "after"), [("dies", 4), pytest.param("runs out of memory", 2, marks=pytest.mark.slow)]
)
def test_what_workers_cannot_finish_is_decoded_by_the_driver(
    folder: Any, whole: Any, threads: type[ThreadWorker], what: str, after: int
) -> None:
    path, told = folder("wan2.1-t2v"), list[int]()
    threads.looked = trouble = Trouble(what, after)
    job = {"decode_callback": lambda done, wanted: told.append(done)}
    found = made(path, job, speed="fast", devices=2)
    assert trouble.happened and near(found, whole)
    (said,) = [text for text in found.warnings if "strips" in text]
    assert said.startswith("The decode in strips was given up (cpu") and "one card" in said
    assert told == list(range(1, 14, 4)), "no frame is handed on twice"
    notes = [stage.note for stage in found.stages if stage.name == "decode"]
    assert len(notes) == 2 and not notes[1]


@pytest.mark.parametrize("spare", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_strip_of_a_worker_that_ends_is_made_by_the_others(
    folder: Any, whole: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch,
    spare: bool,
) -> None:  # fmt: skip
    """By one that is free, with the same strips; else all that are left share out the rest."""
    plain, path, told = WanPipelineWrapper._plan, folder("wan2.1-t2v"), list[int]()

    def in_strips(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        return replace(found, decode_strips=2 if spare else 3) if found.workers else found

    monkeypatch.setattr(WanPipelineWrapper, "_plan", in_strips)
    threads.looked = trouble = Trouble("dies", 4, 3)
    job = {
        "decode_callback": lambda done, wanted: told.append(done), "max_chunk_size": 9,
        "window_overlap": 4,
    }  # fmt: skip
    one = made(path, job, speed="fast") if spare else None
    told.clear()
    found = made(path, job, speed="fast", devices=3)
    assert trouble.happened and told == list(range(1, 14, 4)), "no frame is handed on twice"
    notes = [stage.note for stage in found.stages if stage.name == "decode"]
    assert not any("one card" in text for text in found.warnings)
    if one is not None:
        assert near(found, one)
    if spare:
        assert notes == ["in 2 strips on as many cards"]
        assert any("cpu went on with its strip from frame" in text for text in found.warnings)
    elif len(notes) > 1:  # else one had finished its own by then
        assert notes == ["in 3 strips on as many cards", "in 2 strips on as many cards"]
        assert any("shared out among the others" in text for text in found.warnings)


def test_a_worker_that_has_finished_its_strip_makes_the_other_too(
    folder: Any, threads: type[ThreadWorker]
) -> None:
    """Three chunks fit into the ring: the first worker is done before a picture is taken."""
    path, job, pool = folder("wan2.1-t2v"), {"num_frames": 9}, worker_pool(("cpu", "cpu"))
    whole, died = made(path, job, speed="fast"), list[bool]()

    def look(worker: ThreadWorker) -> None:
        if not decoding(worker) or worker is not threads.made[1] or died:
            return
        until = time.perf_counter() + 30
        while not pool._gangs[0].idle and time.perf_counter() < until:
            time.sleep(0.01)
        died.append(True)
        pool._restarts = 0
        worker.die()

    threads.looked = look
    found = made(path, job, speed="fast", devices=2)
    assert died and near(found, whole)
    notes = [stage.note for stage in found.stages if stage.name == "decode"]
    assert notes == ["in 2 strips on as many cards"]
    assert any("went on with its strip from frame 1" in text for text in found.warnings)


@pytest.mark.usefixtures("nobody_is_free")
def test_exact_shares_no_rest_out_in_strips_that_were_not_tried(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three strips have shown equal bits here; of two nothing is known."""
    plain, path = WanPipelineWrapper._plan, folder("wan2.1-t2v")

    def three_strips(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        assert found.must_equal and len(found.workers) == 3
        return replace(found, decode_strips=3)

    monkeypatch.setattr(WanPipelineWrapper, "_plan", three_strips)
    threads.looked = trouble = Trouble("dies", 4, 3)
    job = {"max_chunk_size": 9, "window_overlap": 4}
    found = made(path, job, forward="lean", devices=3)
    notes = [stage.note for stage in found.stages if stage.name == "decode"]
    assert trouble.happened and notes == ["in 3 strips on as many cards", ""]
    assert any("one card decoded the rest" in text for text in found.warnings)


def test_an_interrupt_ends_the_strips_within_seconds(
    folder: Any, whole: Any, threads: type[ThreadWorker]
) -> None:
    path, told = folder("wan2.1-t2v"), list[float]()

    class Stop(Exception):
        pass

    def stop(done: int, wanted: int) -> None:
        if done == 5:
            told.append(time.perf_counter())
            raise Stop

    wrapper = open_wan(path, speed="fast", devices=2)
    with pytest.raises(Stop):
        wrapper.generate(GenerationConfig(**CLIP, decode_callback=stop))
    assert time.perf_counter() - told[0] < 60
    assert not any(decoding(worker) for worker in threads.made)
    pool = worker_pool(("cpu", "cpu"))
    assert all(gang.idle for gang in pool._gangs), "the workers are there for the next clip"
    assert near(wrapper.generate(GenerationConfig(**CLIP)), whole)


def test_exact_takes_no_strips_unless_a_trial_has_shown_equal_bits(folder: Any) -> None:
    config, path = GenerationConfig(**CLIP), folder("wan2.1-t2v")
    for speed, strips in (("exact", 1), ("fast", 2), ("fastest", 2)):
        _, plan = open_wan(path, speed=speed, devices=2).plan(config)
        assert (plan.decode_strips, len(plan.workers)) == (strips, 2)
        assert any("rounding" in text and "strips" in text for text in plan.reasons) == (strips > 1)


@pytest.mark.slow
def test_frames_beyond_fp16_go_on_in_bf16_in_strips(
    folder: Any, threads: type[ThreadWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one process does: what was decoded before stays, the rest is made in another dtype."""
    plain, path = WanPipelineWrapper._plan, folder("wan2.1-t2v")

    def in_half(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        dtypes = {**found.choices.dtypes, "vae": kind}
        return replace(found, choices=replace(found.choices, dtypes=dtypes))

    monkeypatch.setattr(WanPipelineWrapper, "_plan", in_half)
    halves = {}
    for kind in ("bf16", "fp16"):
        halves[kind] = made(path, {}, speed="fast").frames
    run = StreamingDecoder._run

    def overflowing(self: Any, index: int, cache: Any) -> Any:
        chunk = run(self, index, cache)
        if index == 2 and chunk.dtype == torch.float16:
            chunk[0, 0, 1, 3, 3] = float("inf")
        return chunk

    monkeypatch.setattr(StreamingDecoder, "_run", overflowing)
    found = made(path, {}, speed="fast", devices=2)
    assert (found.frames[:5] - halves["fp16"][:5]).abs().max() < 4e-3
    assert (found.frames[5:] - halves["bf16"][5:]).abs().max() < 4e-3
    notes = [stage.note for stage in found.stages if stage.name == "decode"]
    assert notes == ["in 2 strips on as many cards"] * 2
    (text,) = (text for text in found.warnings if "fp16" in text)
    assert "after 5 frames" in text and "decoded in bf16" in text


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_all_processes_of_gangs_decode_a_strip_each(
    threads: type[ThreadWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Gangs of two cut their passes; of a decode each process has a strip, and dies for all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = cut_clips.four_heads(tmp_path, "wan2.1-t2v")
    cut_clips.make_links_free(path)
    job = cut_clips.CLIP | {"guidance_scale": 1.0 if count == 2 else 5.0}
    whole = made(path, job, speed="fast")
    found = made(path, job, speed="fast", devices=count)
    assert cut_clips.cut_units(found) > 0 and worker_pool(("cpu",) * count, 2).usable
    assert found.stages[-1].note == f"in {count} strips on as many cards"
    assert (found.frames - whole.frames).abs().max() < 1e-4
    threads.looked = trouble = Trouble("dies", 3, count, 2)
    again = made(path, job, speed="fast", devices=count)
    assert trouble.happened and (again.frames - whole.frames).abs().max() < 1e-4
    shared = "shared out among the others" if count == 4 else "strips was given up"
    assert any(shared in text for text in again.warnings)


@pytest.mark.parametrize(
    "equal", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["equal bits", "other bits"]
)
def test_exact_learns_from_its_first_clip_whether_strips_keep_the_bits(
    folder: Any, threads: type[ThreadWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    equal: bool,
) -> None:  # fmt: skip
    """One card's pictures count until then, and for ever where a strip has others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("wan_core.plan.strips._TRIED_ON", ("cpu",))
    path, exact = folder("wan2.1-t2v"), {"forward": "lean", "devices": 2}
    whole = made(path, {"return_frames": True}, forward="lean")
    if not equal:

        def others(chunk: torch.Tensor, **more: Any) -> torch.Tensor:
            return to_pictures(chunk, **more) * (1 + 1e-6)

        monkeypatch.setattr("wan_core.sampling.vae.to_pictures", others)
    first = made(path, {}, **exact)
    assert torch.equal(first.frames, whole.frames)
    assert [stage.name for stage in first.stages][-2:] == ["decode", "try_strips"]
    assert any("decoded both ways after this clip" in text for text in first.metadata["plan"])
    ((kind, trial),) = CardRecords().between().trials.items()
    assert kind.endswith("1 x 64x16 in 2 strips") and "fp32" in kind
    assert trial.equal == equal and (trial.error == 0) == equal and trial.error < 1e-5
    again = made(path, {}, **exact)
    assert torch.equal(again.frames, whole.frames)
    assert [stage.name for stage in again.stages][-1] == "decode", "it is tried once"
    strips = [text for text in again.metadata["plan"] if "in 2 strips" in text]
    assert len(strips) == equal and all("exact: tried here" in text for text in strips)
