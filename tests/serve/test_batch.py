"""A file of jobs: what is a job, in which order they run, what is done twice and what never."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.clips import read
from support.pace import pace
from support.tiny_models import make_folder, open_wan

from wan_core import GenerationConfig, VideoGenerationResult, WanPipelineLoader
from wan_core.__main__ import _job, _parser, main
from wan_core.errors import InvalidRequest, MissingFile, OutputError
from wan_core.models import VARIANTS
from wan_core.render import WanPipelineWrapper
from wan_core.serve import BadLine, Batch, BatchJob, Ledger, Outcome, base_of, jobs, read_jobs
from wan_core.serve.crew import Hand
from wan_core.serve.fields import Served, read_job
from wan_core.serve.ledger import Entry, as_page
from wan_core.serve.queue import Queue

TINY: dict[str, Any] = {"num_frames": 5, "width": 32, "height": 32, "num_inference_steps": 2}
CPU = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batch")
    make_folder(root / "one", "wan2.1-t2v")
    make_folder(root / "two", "wan2.1-t2v", seed=1)
    return root


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    yield
    WanPipelineLoader().clear_cache()


def lines(path: Path, *jobs: Any) -> Path:
    text = [one if isinstance(one, str) else json.dumps(one) for one in jobs]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def job(models: Path, name: str, model: str = "one", **more: Any) -> dict[str, Any]:
    return {"model": str(models / model), "output": name, "prompt": f"a {name}", **TINY, **more}


class Counted:
    """Counts what is generated; ``fail`` names outputs, each with the errors of its tries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.fail: dict[str, list[BaseException | None]] = {}
        honest = WanPipelineWrapper.generate

        def generate(wrapper: Any, config: GenerationConfig) -> VideoGenerationResult:
            name = Path(config.output_path or "").name
            self.made.append(name)
            error = self.fail[name].pop(0) if self.fail.get(name) else None
            if error is not None and not isinstance(error, Exception):
                raise error
            if error is not None:
                return VideoGenerationResult(success=False, error=error, errors=[str(error)])
            return honest(wrapper, config)

        monkeypatch.setattr(WanPipelineWrapper, "generate", generate)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def batch(path: Path, told: list[str] | None = None, **more: Any) -> Batch:
    tell = (told if told is not None else []).append
    return Batch(path, path.parent / "clips", optimization=CPU, tell=tell, **more)


def test_every_line_becomes_the_clip_that_one_render_makes(
    models: Path, tmp_path: Path, counted: Counted
) -> None:
    path = lines(
        tmp_path / "jobs.jsonl",
        "# two models in turn, one line empty", "",
        job(models, "a.mp4"), job(models, "b.mp4", "two"), job(models, "in/c.mp4", seed=3),
        job(models, "first.mp4", "two", priority=1),
    )  # fmt: skip
    ledger = batch(path).run()
    assert ledger.counts() == {"waiting": 0, "done": 4, "failed": 0, "bad": 0}
    # The model that is open goes on, then the one of the first line.
    assert counted.made == ["first.mp4", "b.mp4", "a.mp4", "c.mp4"]
    for name, model in (("a.mp4", "one"), ("b.mp4", "two")):
        alone = tmp_path / name
        config = GenerationConfig(
            prompt=f"a {name}", **TINY, output_path=alone, return_frames=False
        )
        open_wan(models / model).generate(config).raise_for_error()
        clip = tmp_path / "clips" / name
        assert (read(alone)[0] == read(clip)[0]).all()
    summary = json.loads((tmp_path / "clips" / "jobs.summary.json").read_text())
    assert [one["line"] for one in summary["jobs"]] == [3, 4, 5, 6]
    assert summary["jobs"][2]["seed"] == 3 and summary["jobs"][2]["tries"] == 1
    page = (tmp_path / "clips" / "jobs.html").read_text()
    assert page.count("<video") == 4 and 'src="in/c.mp4"' in page and "<script" not in page


def test_the_same_command_goes_on_and_makes_nothing_twice(
    models: Path, tmp_path: Path, counted: Counted
) -> None:
    jobs = [job(models, f"{i}.mp4", seed=i) for i in range(3)]
    path = lines(tmp_path / "jobs.jsonl", *jobs)
    counted.fail["1.mp4"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        batch(path).run()
    assert counted.made == ["0.mp4", "1.mp4"]
    told: list[str] = []
    assert batch(path, told).run().counts()["done"] == 3
    assert counted.made[2:] == ["1.mp4", "2.mp4"] and "line 1: 0.mp4 is there already" in told
    batch(path).run()
    assert len(counted.made) == 4
    # Another seed, a clip that was written over, one that is gone: each is made anew.
    jobs[0]["seed"] = 9
    (tmp_path / "clips" / "1.mp4").write_bytes(b"x")
    (tmp_path / "clips" / "2.mp4").unlink()
    lines(path, *jobs)
    batch(path).run()
    assert counted.made[4:] == ["0.mp4", "1.mp4", "2.mp4"]
    # Lines in another order are the same jobs.
    lines(path, *reversed(jobs))
    assert batch(path).run().counts()["done"] == 3 and len(counted.made) == 7


def test_a_job_that_takes_the_process_along_lets_the_others_go_first_from_then_on(
    models: Path, tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lines(tmp_path / "jobs.jsonl", *(job(models, f"{i}.mp4", seed=i) for i in range(3)))
    with monkeypatch.context() as killed:  # nothing is done after a kill
        killed.setattr(Batch, "_finish", lambda _: None)
        for _ in range(2):
            counted.fail["1.mp4"] = [SystemExit()]
            with pytest.raises(SystemExit):
                batch(path).run()
    assert counted.made == ["0.mp4", "1.mp4", "1.mp4"]
    counted.fail["2.mp4"] = [KeyboardInterrupt()]  # an end in order is held against nobody
    with pytest.raises(KeyboardInterrupt):
        batch(path).run()
    told: list[str] = []
    assert batch(path, told).run().counts()["done"] == 3
    assert counted.made[3:] == ["2.mp4", "2.mp4", "1.mp4"]
    assert any("line 2: 2 runs died while it was in work" in text for text in told)
    assert (
        json.loads((tmp_path / "clips" / "jobs.summary.json").read_text())["jobs"][1]["deaths"] == 0
    )


def test_other_cards_make_nothing_anew(models: Path, tmp_path: Path, counted: Counted) -> None:
    path = lines(tmp_path / "jobs.jsonl", job(models, "a.mp4"))
    batch(path).run()
    for more, made in (({"devices": "all"}, 1), ({"speed": "fast"}, 2)):
        Batch(path, tmp_path / "clips", optimization=CPU | more).run()
        assert len(counted.made) == made
    Batch(path, tmp_path / "clips", optimization={"precision": "fp32", "speed": "fast"}).run()
    assert len(counted.made) == 2


def test_a_line_with_a_batch_size_has_all_its_clips(
    models: Path, tmp_path: Path, counted: Counted
) -> None:
    """One that another line makes too would be written over in turn, and made anew by each run."""
    jobs = [job(models, "a.mp4", batch_size=2), job(models, "A_2.mp4"), job(models, "b_2.mp4"),
            job(models, "b.mp4", batch_size=2)]  # fmt: skip
    path = lines(tmp_path / "jobs.jsonl", *jobs)
    told: list[str] = []
    assert batch(path, told).run().counts() == {"waiting": 0, "done": 2, "failed": 0, "bad": 2}
    assert "line 2: output is 'A_2.mp4', as in line 1 but for its letters ('a_2.mp4')" in told[0]
    assert told[1] == "line 4: with batch_size another output is 'b_2.mp4', as in line 3."
    page = (tmp_path / "clips" / "jobs.html").read_text()
    assert [f'src="{name}.mp4"' in page for name in ("a", "a_2", "b_2", "b")] == [1, 1, 1, 0]
    batch(path).run()
    (tmp_path / "clips" / "a_2.mp4").unlink()
    batch(path).run()
    assert counted.made == ["a.mp4", "b_2.mp4", "a.mp4"]


def test_another_picture_under_the_same_name_is_another_job(models: Path, tmp_path: Path) -> None:
    def identity() -> str:
        path = lines(tmp_path / "jobs.jsonl", job(models, "a.mp4", image="p.png"))
        (found,) = read_jobs(path, tmp_path)
        assert isinstance(found, BatchJob)
        return found.identity()

    Image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    first = identity()
    assert identity() == first
    Image.new("RGB", (64, 64), "red").save(tmp_path / "p.png")
    assert identity() != first


def test_a_camera_and_references_of_two_sizes(models: Path, tmp_path: Path) -> None:
    rays = np.random.default_rng(0).random((1, 24, 5, 32, 32), np.float32)
    np.save(tmp_path / "rays.npy", rays)
    for name, size in (("a", (32, 16)), ("b", (16, 48))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    control = {"camera": "rays.npy", "reference": ["a.png", "b.png"]}
    path = lines(tmp_path / "jobs.jsonl", job(models, "a.mp4", control=control))
    (found,) = read_jobs(path, tmp_path)
    assert isinstance(found, BatchJob)
    made, before = (
        found.config(VARIANTS["wan2.1-fun-camera-14b"].defaults).control,
        found.identity(),
    )
    assert made is not None and torch.equal(made.camera, torch.from_numpy(rays))
    assert [tuple(one.shape) for one in made.reference] == [(1, 16, 32, 3), (1, 48, 16, 3)]
    np.save(tmp_path / "rays.npy", rays[:, :, :4])
    assert found.identity() != before


@pytest.mark.parametrize(("option", "value", "why"), [
    ("--at-once", "0", "at_once is '0'"), ("--at-once", "some", "at_once is 'some'"),
    ("--at-once", "9" * 5000, "at_once is '9"), ("--at-once", "\u00b2", "at_once is"),
    ("--at-once", "999999999", "1 to 4096"), ("--speed", "warp", "speed is 'warp'"),
    ("--devices", "0.5", "devices is '0.5'"), ("--tries", "0", "tries is 0"),
    ("--cluster", " ", "cluster is empty"),
])  # fmt: skip
def test_a_wrong_option_is_told_once_and_changes_no_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, why: str
) -> None:
    """And not as what is wrong with each line."""
    path = lines(tmp_path / "jobs.jsonl", {"output": "a.mp4", "prompt": "x", "model": "m"})
    assert main(["batch", str(path), option, value]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error: ") and why in told[0], told
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_batch_generate_and_server_have_the_same_size_where_nothing_is_said(
    name: str, tmp_path: Path
) -> None:
    usual = VARIANTS[name].defaults
    path = lines(
        tmp_path / "jobs.jsonl", {"output": "a.mp4", "prompt": "x", "model": "m"},
        {"output": "b.mp4", "prompt": "x", "model": "m", "width": None, "num_frames": 9},
    )  # fmt: skip
    first, second = read_jobs(path, tmp_path)
    assert isinstance(first, BatchJob) and isinstance(second, BatchJob)
    wrapper = SimpleNamespace(architecture=SimpleNamespace(variant=VARIANTS[name]))
    given = _parser().parse_args(["generate", "m", "--output", "a.mp4"])
    served = Served(
        name="m", model=tmp_path, optimization={}, two_experts=False, fps=usual.fps, **usual.shape()
    )
    asked, _ = read_job({"prompt": "x"}, None, served, tmp_path / "a.mp4")
    configs = [first.config(usual), _job(given, wrapper, prompt="x"), asked.config(usual)]
    sizes = {(one.width, one.height, one.num_frames) for one in configs}
    assert sizes == {(usual.width, usual.height, usual.num_frames)}
    short = second.config(usual)
    assert (short.width, short.height, short.num_frames) == (usual.width, usual.height, 9)


BAD = {
    "{not json": "the line is not JSON",
    '["a list"]': "must be a JSON object",
    '{"model": "m", "output": "a.mp4", "prompt": "\\ud83d"}': "half of a character",
    '{"output": "b.mp4", "pormpt": "x"}': "did you mean 'prompt'",
    '{"output": "b.mp4", "steps": 4}': "did you mean 'num_inference_steps'",
    '{"output": "b.mp4", "speed": "fast"}': 'give it as "optimization": {"speed": ...}',
    '{"output": "../b.mp4"}': "is refused",
    '{"output": "/tmp/b.mp4"}': "is refused",
    '{"output": "b.txt"}': "must end in .mp4",
    '{"prompt": "x"}': "output is None",
    '{"output": "b.mp4", "latents": [1]}': "'latents' is no field",
    '{"output": "b.mp4", "optimization": {"speeed": 1}}': "has the key 'speeed'",
    '{"output": "b.mp4", "optimization": {"speed": "slow"}}': "speed is 'slow'",
    '{"output": "b.mp4", "loras": "x"}': "loras must be a list",
    '{"output": "b.mp4", "priority": "high"}': "priority is 'high'",
    '{"output": "b.mp4", "use_recipe": 1}': "use_recipe must be",
    '{"output": "b.mp4", "control": {"vidio": "x"}}': "control has no field 'vidio'",
    '{"output": "b.mp4", "image": 5}': "image is 5",
    '{"output": "a.mp4"}': "as in line 1",
    '{"output": "same/a.mp4"}': "as in line 1",
    '{"output": "A.MP4"}': "as in line 1 but for its letters ('a.mp4')",
    '{"output": "b.mp4", "seed": 1, "seed": 2}': "'seed' is given twice",
    '{"output": "b.mp4", "priority": NaN}': "priority is nan",
    '{"output": "out/b.mp4"}': "leads through a link",
    '{"output": "there.mp4"}': "leads through a link",
    '{"output": "A.mp4", "model": ""}': "model is ''",
    '{"output": "' + "x" * 2**20 + '.mp4"}': "more than 1048576 bytes",
}  # fmt: skip


def test_a_bad_line_is_named_and_the_others_stay(tmp_path: Path) -> None:
    good = {"output": "a.mp4"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "out").symlink_to(elsewhere)
    (folder / "same").symlink_to(folder)
    (folder / "there.mp4").symlink_to(elsewhere / "x.mp4")
    path = lines(tmp_path / "jobs.jsonl", good, *BAD, {"output": "z.mp4"})
    found = list(read_jobs(path, folder, tmp_path / "model"))
    assert [one.number for one in found] == list(range(1, len(BAD) + 3))
    assert isinstance(found[0], BatchJob) and isinstance(found[-1], BatchJob)
    for one, (line, why) in zip(found[1:-1], BAD.items(), strict=True):
        assert isinstance(one, BadLine) and why in one.error, line[:80]


def test_a_file_as_other_systems_write_it(tmp_path: Path) -> None:
    path, model = tmp_path / "jobs.jsonl", tmp_path / "model"
    path.write_bytes(
        b'\xef\xbb\xbf# from an editor\r\n\r\n{"output": "a.mp4"}\r\n{"output": "b.mp4"}'
    )
    assert [one.number for one in read_jobs(path, tmp_path, model)] == [3, 4]
    path.write_bytes(b'\xef\xbb\xbf{"output": "a.mp4"}')
    assert isinstance(next(iter(read_jobs(path, tmp_path, model))), BatchJob)
    path.write_text('{"output": "a.mp4"}', encoding="utf-16")
    with pytest.raises(InvalidRequest, match="save it as UTF-8"):
        list(read_jobs(path, tmp_path, model))


def test_mistakes_are_told_before_the_first_clip(
    models: Path, tmp_path: Path, counted: Counted
) -> None:
    path = lines(
        tmp_path / "jobs.jsonl",
        job(models, "a.mp4"), "{", job(models, "b.mp4", width=-1), job(models, "c.mp4", "none"),
        job(models, "d.mp4", last_image="gone.png"), job(models, "e.mp4"),
    )  # fmt: skip
    told: list[str] = []
    ledger = batch(path, told).run()
    assert ledger.counts() == {"waiting": 0, "done": 2, "failed": 3, "bad": 1}
    assert counted.made == ["a.mp4", "e.mp4"]
    first = next(i for i, text in enumerate(told) if "try 1" in text)
    assert [text.split(":")[0] for text in told[:first]] == [f"line {n}" for n in (2, 3, 4, 5)]
    assert "width" in ledger.entries[3].error and "none" in ledger.entries[4].error
    page = (tmp_path / "clips" / "jobs.html").read_text()
    assert page.count("<li>") == 4 and page.count("<video") == 2


def test_a_precision_that_is_none_is_told_first_where_no_plan_is_made(
    models: Path, tmp_path: Path, counted: Counted
) -> None:
    path = lines(tmp_path / "jobs.jsonl", job(models, "a.mp4", precision_override="fp3"))
    ledger = batch(path, plan=False).run()
    assert "precision_override is 'fp3'" in ledger.entries[1].error and not counted.made


def test_what_may_go_better_is_tried_again_after_the_others(
    models: Path, tmp_path: Path, counted: Counted
) -> None:
    path = lines(tmp_path / "jobs.jsonl", *(job(models, f"{n}.mp4") for n in "abcd"))
    full = OutputError("the disk is full <b>")
    counted.fail = {
        "a.mp4": [full], "b.mp4": [full, full, full], "c.mp4": [InvalidRequest("no")],
    }  # fmt: skip
    ledger = batch(path, tries=3).run()
    assert counted.made == [f"{n}.mp4" for n in "abcdabb"]
    assert [ledger.entries[n].state for n in (1, 2, 3, 4)] == ["done", "failed", "failed", "done"]
    assert [ledger.entries[n].tries for n in (1, 2, 3, 4)] == [2, 3, 1, 1]
    page = (tmp_path / "clips" / "jobs.html").read_text()
    assert "disk is full &lt;b&gt;" in page


class Instant:
    """A crew whose hand writes a file of three bytes for each job."""

    def __init__(self) -> None:
        self.hand = Hand("instant")

    def free(self, waiting: int) -> Sequence[Hand]:
        return () if self.hand.job else (self.hand,)

    def begin(self, hand: Hand, job: BatchJob) -> None:
        job.output.write_bytes(b"mp4")

    def wait(self, seconds: float) -> list[tuple[BatchJob, Outcome]]:
        made, self.hand.job = self.hand.job, None
        assert made is not None
        return [(made, Outcome(size=3, seconds=1.0))]

    def close(self) -> None:
        pass


def test_what_is_written_grows_as_the_number_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A summary that was written whole for each of 2,000 jobs would be 2 GB; seconds at most."""
    monkeypatch.setattr(Batch, "_check", lambda *_: None)
    monkeypatch.setattr("wan_core.serve.ledger.os.fsync", lambda _: None)
    (tmp_path / "model").touch()
    order, written = [], 0
    note, write = Ledger.note, Ledger.write

    def noted(ledger: Ledger, entry: Any) -> None:
        nonlocal written
        order.append(entry.line)
        before = ledger._journal.stat().st_size if ledger._journal.exists() else 0
        note(ledger, entry)
        if ledger._journal.exists():
            written += ledger._journal.stat().st_size - before

    def whole(ledger: Ledger) -> None:
        nonlocal written
        write(ledger)
        written += ledger.path.stat().st_size

    monkeypatch.setattr(Ledger, "note", noted)
    monkeypatch.setattr(Ledger, "write", whole)
    jobs = [
        {"model": "model", "output": f"{i}.mp4", "prompt": f"{i}", "priority": i // 1000}
        for i in range(2000)
    ]
    made = batch(lines(tmp_path / "jobs.jsonl", *jobs), crew=Instant)
    begun = time.process_time()
    assert made.run().counts()["done"] == 2000
    assert time.process_time() - begun < 20 * pace()
    size = made.ledger.path.stat().st_size
    assert size < written < 9 * size
    assert order == [*range(1001, 2001), *range(1, 1001)]
    assert [path.name for path in made.folder.glob("*.changes")] == []
    told: list[str] = []
    again = batch(tmp_path / "jobs.jsonl", told, crew=Instant).run()
    assert again.counts()["done"] == 2000 == len(told) and len(order) == 2000


def test_a_folder_that_is_a_file_by_now_ends_the_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replaced(Instant):
        def begin(self, hand: Hand, job: BatchJob) -> None:
            shutil.rmtree(job.output.parent)
            job.output.parent.write_text("no folder")

    monkeypatch.setattr(Batch, "_check", lambda *_: None)
    (tmp_path / "model").touch()
    path = lines(tmp_path / "jobs.jsonl", {"model": "model", "output": "a.mp4", "prompt": "x"})
    with pytest.raises(OutputError, match=r"Cannot write .*jobs\.summary\.json"):
        batch(path, crew=Replaced).run()


def test_a_second_run_of_the_same_file_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batch, "_check", lambda *_: None)
    (tmp_path / "model").touch()
    path = lines(tmp_path / "jobs.jsonl", {"model": "model", "output": "a.mp4", "prompt": "x"})
    other = batch(path, crew=Instant)
    refused: list[str] = []

    class Crew(Instant):
        def begin(self, hand: Hand, job: BatchJob) -> None:
            with pytest.raises(OutputError, match="Another run is at work") as err:
                other.run()
            refused.append(str(err.value))
            super().begin(hand, job)

    assert batch(path, crew=Crew).run().counts()["done"] == 1 and len(refused) == 1
    # The one that waited knows what the first has done, and nothing is left of the lock.
    told: list[str] = []
    monkeypatch.setattr(other, "_tell", told.append)
    assert other.run().counts()["done"] == 1 and told == ["line 1: a.mp4 is there already"]
    assert not list(tmp_path.rglob("*.lock"))


def test_a_kill_between_two_jobs_loses_none(tmp_path: Path) -> None:
    """As a kill leaves the files: after any change, in the middle of a line, before its removal."""
    path = tmp_path / "jobs.summary.json"
    clips = [tmp_path / f"{i}.mp4" for i in range(4)]
    ledger = Ledger(path)
    for i, clip in enumerate(clips):
        clip.write_bytes(b"mp4")
        ledger.put(Entry(line=i + 1, identity=str(i), output=str(clip), size=3))

    def known() -> list[bool]:
        return [Ledger(path).finished(str(i), clip) is not None for i, clip in enumerate(clips)]

    ledger.write()
    for i in (0, 1):
        ledger.entries[i + 1].state = "done"
        ledger.note(ledger.entries[i + 1])
        assert known() == [j <= i for j in range(4)]
    changes = path.with_suffix(".changes")
    whole = changes.read_bytes()
    for cut in range(len(whole) - 40, len(whole) - 1):
        changes.write_bytes(whole[:cut])
        assert known() == [True, False, False, False]
    ledger = Ledger(path)  # the next run, beside a line that was cut off
    ledger.put(Entry(line=3, identity="2", output=str(clips[2]), size=3, state="done"))
    ledger.note(ledger.entries[3])
    assert known() == [True, False, True, False]
    noted = changes.read_bytes()
    ledger.put(Entry(line=4, identity="3", output=str(clips[3]), size=3, state="done"))
    ledger.write()
    # The first is no line of this run, and its clip is there still.
    assert not changes.exists() and known() == [True, False, True, True]
    changes.write_bytes(noted)  # killed before it was removed: what it says is true still
    assert known() == [True, False, True, True]


def test_a_summary_that_is_none_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="cannot be read"):
        batch(tmp_path / "jobs.jsonl").run()
    (tmp_path / "clips" / "jobs.summary.json").write_text("[]")
    with pytest.raises(InvalidRequest, match="is not the summary of a batch"):
        batch(lines(tmp_path / "jobs.jsonl"))
    with pytest.raises(InvalidRequest, match="tries is 0"):
        batch(lines(tmp_path / "other.jsonl"), tries=0)


def test_from_a_shell(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "jobs.jsonl", {"output": "a.mp4", "prompt": "a cat", **TINY}, "{")
    command = ["batch", str(path), "--model", str(models / "one"), "--device", "cpu"]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "1 done, 1 bad" in shown.out and "line 2: the line is not JSON" in shown.err
    assert (tmp_path / "a.mp4").is_file()
    lines(path, {"output": "a.mp4", "prompt": "a cat", **TINY})
    assert main([*command, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["success"] is True
    assert torch.get_default_dtype() == torch.float32


def test_a_file_that_cannot_be_read_leaves_what_is_known(models: Path, tmp_path: Path) -> None:
    """The next run would otherwise make every clip again."""
    path = lines(tmp_path / "jobs.jsonl", job(models, "a.mp4"))
    Batch(path, tmp_path / "out", optimization=CPU).run()
    told = (tmp_path / "out" / "jobs.summary.json").read_bytes()
    path.unlink()
    with pytest.raises(MissingFile):
        Batch(path, tmp_path / "out", optimization=CPU).run()
    assert (tmp_path / "out" / "jobs.summary.json").read_bytes() == told


def test_a_line_that_was_a_comment_for_a_while_is_done_still(tmp_path: Path) -> None:
    """Not where another line has made the same file meanwhile, be it as large."""
    clips = [tmp_path / f"{name}.mp4" for name in "ab"]
    for clip in clips:
        clip.write_bytes(b"1234")

    def run(*done: tuple[str, Path]) -> Ledger:
        """As a run of a file with these lines does; says what it would not make again."""
        ledger = Ledger(tmp_path / "jobs.summary.json")
        for line, (identity, clip) in enumerate(done, 1):
            there.append(ledger.finished(identity, clip) is not None)
            ledger.put(Entry(line=line, state="done", identity=identity, output=str(clip), size=4))
        ledger.write()
        return ledger

    there: list[bool] = []
    run(("one", clips[0]), ("two", clips[1]))
    assert len(run(("two", clips[1])).to_dict()["earlier"]) == 1
    run()
    run(("one", clips[0]), ("two", clips[1]))
    assert there == [False, False, True, True, True]
    run(("other", clips[0]))
    assert run(("one", clips[0])).to_dict()["earlier"][0]["identity"] == "two"
    assert there[5:] == [False, False]


@pytest.mark.parametrize("what", ["a link to nothing", "a file"])
def test_a_folder_that_cannot_be_one_is_told(tmp_path: Path, what: str) -> None:
    path, folder = lines(tmp_path / "jobs.jsonl", {"output": "a.mp4"}), tmp_path / "clips"
    if what == "a file":
        folder.write_text("mine")
    else:
        folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="clips' cannot be made: File exists"):
        Batch(path, folder)
    with pytest.raises(OutputError, match="clips' cannot be made: File exists"):
        Queue(folder / "queue.sqlite3")


def test_a_folder_that_is_a_link_or_goes_meanwhile_is_no_end(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "clips"
    real.mkdir(parents=True)
    folder = tmp_path / "clips"
    folder.symlink_to(real)
    path = lines(tmp_path / "jobs.jsonl", {"output": "a.mp4", "model": "m"})
    (job,) = read_jobs(path, folder)
    assert isinstance(job, BatchJob) and job.output == real / "a.mp4"
    ledger = Ledger(folder / "jobs.summary.json")
    ledger.put(Entry(line=1))
    ledger.write()
    shutil.rmtree(real.parent)
    folder.unlink()
    ledger.note(Entry(line=1, state="done"))
    assert json.loads(ledger.path.read_text())["jobs"][0]["line"] == 1


def test_a_line_that_the_system_refuses_is_set_aside(models: Path, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "jobs.jsonl", job(models, "a.mp4", image="x" * 5000), job(models, "b.mp4"),
        job(models, "b.mp4/c.mp4"),
    )  # fmt: skip
    ledger = Batch(path, tmp_path / "out", optimization=CPU, tries=1).run()
    assert ledger.counts()["done"] == 1
    assert ledger.entries[1].state in ("failed", "bad")
    assert "b.mp4' cannot be made" in ledger.entries[3].error, ledger.entries[3]


def test_a_line_knows_what_the_options_of_generate_are_called() -> None:
    """Each of them that is no field by another name, and each such field is one."""
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = {a.dest for a in commands.choices["generate"]._actions}
    assert set(jobs._AS_OPTIONS) <= options
    assert set(jobs._AS_OPTIONS.values()) <= {*jobs._OWN, *jobs.CONFIG_FIELDS}
    known = {*jobs._OWN, *jobs.CONFIG_FIELDS, *jobs._OF_A_PLAN, *jobs._AS_OPTIONS}
    rest = {name for name in options - known if not name.startswith("control_")}
    assert rest == {"help", "json", "path", "audio"}


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe with a name")
def test_jobs_come_through_a_pipe(tmp_path: Path) -> None:
    path, line = tmp_path / "jobs.jsonl", '{"output": "a.mp4", "model": "m", "prompt": "x"}'
    os.mkfifo(path)
    for text in (f"\ufeff{line}\n", line):
        writer = threading.Thread(target=path.write_text, args=(text, "utf-8"), daemon=True)
        writer.start()
        (found,) = read_jobs(path, tmp_path)
        assert isinstance(found, BatchJob) and found.number == 1
        writer.join()
        assert found.model == tmp_path / "m" and base_of(path) == tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's names of pipes")
def test_jobs_that_a_shell_pipes_in_begin_where_one_is(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """And their clips go there: not into /dev."""
    monkeypatch.chdir(tmp_path)
    reading, writing = os.pipe()
    os.write(writing, b'{"output": "a.mp4", "model": "m", "prompt": "x"}')
    os.close(writing)
    assert main(["batch", f"/dev/fd/{reading}"]) == 1
    os.close(reading)
    assert str(tmp_path / "m") in capsys.readouterr().err
    assert (tmp_path / f"{reading}.summary.json").is_file()


def test_a_home_is_found_in_every_path_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    names = ("image", "last_image", "model")
    line = {name: f"~/{name}" for name in names} | {"loras": ["~/l"], "output": "a.mp4"}
    control = {"video": "~/v", "keyframes": ["~/k"]}
    (found,) = read_jobs(lines(tmp_path / "j.jsonl", {**line, "control": control}), tmp_path)
    assert isinstance(found, BatchJob), found
    texts = [found.values["image"], found.values["last_image"], str(found.model), *found.loras]
    texts += [found.control["video"], *found.control["keyframes"]]
    assert all(text.startswith(str(tmp_path / "home")) for text in texts), texts


def test_a_folder_of_very_many_files_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk that was named in its place, which would be walked to its end."""
    monkeypatch.setattr("wan_core.serve.jobs._MOST_FILES", 3)
    (tmp_path / "m").mkdir()
    path = lines(tmp_path / "j.jsonl", {"model": "m", "output": "a.mp4", "prompt": "x"})
    (found,) = read_jobs(path, tmp_path)
    assert isinstance(found, BatchJob)
    for i in range(4):
        (tmp_path / "m" / str(i)).touch()
        if i < 3:
            found.identity()
    with pytest.raises(InvalidRequest, match="more than 3 files"):
        found.identity()


@pytest.mark.parametrize("what", [b"\xc0\x80", b'{"jobs": [{"line": 1, "state": "done", '
                                  b'"identity": [1]}]}', None])  # fmt: skip
def test_a_summary_that_cannot_be_read_is_named(tmp_path: Path, what: bytes | None) -> None:
    path = tmp_path / "jobs.summary.json"
    if what is None:
        path.mkdir()
    else:
        path.write_bytes(what)
    with pytest.raises(InvalidRequest if what else OutputError, match=r"jobs.summary.json"):
        Ledger(path)


def test_a_folder_that_cannot_be_written_is_named(models: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "jobs.jsonl", job(models, "a.mp4"))
    (tmp_path / "clips" / "jobs.summary.lock").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"clips cannot be written: .*--folder"):
        batch(path).run()


@pytest.mark.skipif(sys.platform == "win32", reason="names of files are bytes")
def test_a_page_shows_names_that_are_no_text(tmp_path: Path) -> None:
    output = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/a.mp4")
    page = as_page("caf\udce9", [Entry(line=1, state="done", output=output)], tmp_path)
    assert b'src="caf%E9/a.mp4"' in page and b"<h1>caf?</h1>" in page
