"""journal: a render continues after anything, and nothing about the journal stops a render."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from wan_core.errors import InvalidRequest, JournalMismatch
from wan_core.job.steps import DIFFUSERS_SCHEDULERS as SCHEDULERS
from wan_core.job.steps import make_scheduler
from wan_core.journal import journal as journal_module
from wan_core.journal.disk import KEEP
from wan_core.journal.identity import identity_differences, identity_key, plain_identity
from wan_core.journal.journal import (
    Journal,
    restore_scheduler,
    scheduler_state,
)

IDENTITY: dict[str, object] = {
    "files": [{"path": Path("models/wan"), "size": 5, "mtime_ns": 7}],
    "prompt": "a fox in the snow",
    "settings": {"seed": 0, "steps": 20, "guidance": (4.0, 3.0)},
    "versions": {"torch": "2.13.0"},
}


def changed(**settings: object) -> dict[str, object]:
    return {**IDENTITY, "settings": {"seed": 0, "steps": 20, "guidance": (4.0, 3.0), **settings}}


def state_of(unit: int, size: int = 500) -> dict[str, torch.Tensor]:
    """Tensors from which a mixture of two states would be seen."""
    return {"latents": torch.full((size,), float(unit)), "last": torch.full((7,), float(unit))}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def saved(root: Path, units: int = 2, identity: dict[str, object] | None = None) -> Path:
    """Leave a journal with ``units`` units saved, as a killed run would; return its folder."""
    with Journal.open(root, identity or IDENTITY) as journal:
        for unit in range(1, units + 1):
            assert journal.save(unit, state_of(unit), {"note": f"after {unit}"})
        return journal.folder


def newest(folder: Path) -> Path:
    return max(folder.glob("[ab].safetensors"), key=lambda p: p.stat().st_mtime_ns)


# --- states ---------------------------------------------------------------------------------


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    tensors = {
        "float": torch.tensor([math.pi, -0.0, math.inf, 1e-40]),
        "bf16": torch.randn(3, 5).bfloat16(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "long": torch.tensor(2**40),
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "transposed": base.transpose(0, 2),
        "shared": base,
        "slice": base[:, 1:],
    }
    scalars = {"half": 0.1, "none": None, "list": [1, "two", {"three": 3}], "big": 2**60}
    with Journal.open(tmp_path, IDENTITY) as journal:
        assert journal.load() is None
        assert journal.save(3, tensors, scalars)
    with Journal.open(tmp_path, IDENTITY) as journal:
        state = journal.load()
    assert state is not None
    assert (state.unit, state.scalars) == (3, scalars)
    assert same(state.tensors, {name: t.contiguous() for name, t in tensors.items()})
    assert math.copysign(1, state.tensors["float"][1].item()) == -1
    assert journal.warnings == []


def test_the_loop_continues_from_the_last_unit(tmp_path: Path) -> None:
    for units in (1, 2, 3, 6):
        folder = saved(tmp_path / str(units), units)
        with Journal.open(folder.parent, IDENTITY, "must") as journal:
            state = journal.load()
            assert state is not None and state.latents is None
            assert state.unit == units
            assert same(state.tensors, state_of(units))
            assert state.scalars == {"note": f"after {units}"}
            assert journal.warnings == []


@pytest.mark.skipif(sys.platform != "linux", reason="names of folders are bytes there")
def test_a_folder_whose_name_is_no_utf_8_keeps_states_too(tmp_path: Path) -> None:
    folder = saved(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")), 2)
    handles = len(os.listdir("/proc/self/fd"))
    with Journal.open(folder.parent, IDENTITY, "must") as journal:
        state = journal.load()
        assert state is not None and same(state.tensors, state_of(2)) and journal.warnings == []
    assert len(os.listdir("/proc/self/fd")) == handles


def test_states_are_plain_safetensors_files_whose_tensors_are_copies(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    assert same(load_file(folder / "a.safetensors"), state_of(1))
    with Journal.open(tmp_path, IDENTITY) as journal:
        state = journal.load()
        assert state is not None
        for unit in (2, 3, 4):
            journal.save(unit, state_of(unit))
        assert same(state.tensors, state_of(1))


def test_saving_never_overwrites_the_newest_state(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3)
    for unit in range(4, 9):
        kept = newest(folder)
        before = kept.read_bytes()
        with Journal.open(tmp_path, IDENTITY) as journal:
            journal.save(unit, state_of(unit))
        assert kept.read_bytes() == before
        with Journal.open(tmp_path, IDENTITY) as journal:
            state = journal.load()
            assert state is not None and state.unit == unit


def test_a_journal_is_bounded(tmp_path: Path) -> None:
    """Two states and the latents, whatever the number of units; one more while writing."""
    one = 4 * (100_000 + 7)
    with Journal.open(tmp_path, IDENTITY) as journal:
        for unit in range(1, 12):
            journal.save(unit, state_of(unit, 100_000))
        journal.latents_done(torch.zeros(100_000))
        total = sum(path.stat().st_size for path in journal.folder.iterdir())
        assert journal.state_bytes == 400_000
        assert 3 * 400_000 < total < 3 * one + 10_000


def test_finished_latents_are_safe(tmp_path: Path) -> None:
    latents = torch.randn(1, 4, 3, 2, 2)
    with Journal.open(tmp_path, IDENTITY) as journal:
        journal.save(19, state_of(19))
        journal.save(20, state_of(20))
        assert journal.latents_done(latents, {"seed": 0})
    with Journal.open(tmp_path, IDENTITY) as journal:
        state = journal.load()
        assert state is not None and state.latents is not None
        assert (state.unit, state.scalars) == (0, {"seed": 0})
        assert torch.equal(state.latents, latents)


def test_damaged_latents_fall_back_to_the_loop(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal:
        journal.save(20, state_of(20))
        journal.latents_done(torch.zeros(5))
        done = journal.folder / "latents.safetensors"
    done.write_bytes(done.read_bytes()[:-3])
    with Journal.open(tmp_path, IDENTITY) as journal:
        state = journal.load()
        assert state is not None and state.latents is None
        assert state.unit == 20
        assert any("latents.safetensors" in warning for warning in journal.warnings)


def test_finish_removes_the_journal_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "journals"
    other = saved(root, 1, changed(seed=9))
    with Journal.open(root, IDENTITY) as journal:
        journal.save(1, state_of(1))
        journal.latents_done(torch.zeros(3))
        (journal.folder / ".wanfit-0123.safetensors").write_bytes(b"left by a killed run")
        journal.finish()
    assert not journal.folder.exists() and other.exists()
    with Journal.open(root, changed(seed=9)) as journal:
        (journal.folder / "mine.txt").write_text("keep")
        journal.finish()
    assert [p.name for p in root.rglob("*") if p.is_file()] == ["mine.txt"]
    shutil.rmtree(root)
    with Journal.open(root, IDENTITY) as journal:
        journal.finish()
    assert not root.exists()


def test_a_dtype_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal, pytest.raises(InvalidRequest, match="wave"):
        journal.save(1, {"wave": torch.zeros(2, dtype=torch.complex64)})


# --- what does not match --------------------------------------------------------------------


def test_must_names_every_field_that_differs(tmp_path: Path) -> None:
    saved(tmp_path)
    now = {**changed(seed=1, extra=True), "prompt": "a fox in the snow, at dusk"}
    with pytest.raises(JournalMismatch) as caught:
        Journal.open(tmp_path, now, "must")
    text = str(caught.value)
    assert "settings.seed (saved 0, now 1)" in text
    assert "settings.extra (saved nothing, now true)" in text
    assert "prompt (saved" in text and "at dusk" in text
    assert "guidance" not in text and "resume='auto'" in text


def test_must_without_any_journal_says_so(tmp_path: Path) -> None:
    with pytest.raises(JournalMismatch, match="no saved state"):
        Journal.open(tmp_path / "none", IDENTITY, "must")
    assert not (tmp_path / "none").exists()


def test_auto_starts_anew_and_names_what_was_changed(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with Journal.open(tmp_path, changed(seed=1)) as journal:
        assert journal.load() is None and journal.enabled
        (warning,) = journal.warnings
        assert folder.name in warning and "settings.seed (saved 0, now 1)" in warning
    assert (folder / "a.safetensors").exists()


def test_auto_is_silent_about_renders_that_have_nothing_in_common(tmp_path: Path) -> None:
    saved(tmp_path)
    with Journal.open(tmp_path, {"prompt": "another", "settings": {"seed": 5}}) as journal:
        assert journal.warnings == [] and journal.load() is None


def test_never_starts_anew_and_forgets(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with Journal.open(tmp_path, IDENTITY, "never") as journal:
        assert journal.load() is None and journal.enabled
    assert not list(folder.glob("*.safetensors"))


def test_resume_has_three_values(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="auto, never, must") as caught:
        Journal.open(tmp_path, IDENTITY, "maybe")
    assert caught.value.field == "resume"


# --- damage ---------------------------------------------------------------------------------


def damaged(path: Path, kind: str, other: Path) -> None:
    data = path.read_bytes()
    if kind == "directory":
        path.unlink()
        path.mkdir()
    elif kind == "other render":
        shutil.copy(newest(other), path)
    elif kind == "foreign":
        save_file({"x": torch.zeros(3)}, path)
    else:
        path.write_bytes(
            {
                "empty": b"",
                "short": data[: len(data) // 2],
                "garbage": os.urandom(len(data)),
                "bit": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
                "other format": data.replace(b'\\"format\\": 1', b'\\"format\\": 7'),
                "huge header": b"\xff" * 8 + data[8:],
            }[kind]
        )


DAMAGE = (
    "directory",
    "other render",
    "foreign",
    "empty",
    "short",
    "garbage",
    "bit",
    "other format",
    "huge header",
)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_left_for_the_one_before(tmp_path: Path, kind: str) -> None:
    other = saved(tmp_path / "elsewhere", 1, changed(seed=3))
    folder = saved(tmp_path / "here", 5)
    path = newest(folder)
    damaged(path, kind, other)
    with Journal.open(folder.parent, IDENTITY) as journal:
        state = journal.load()
        assert state is not None and state.unit == 4 and same(state.tensors, state_of(4))
        if kind != "directory":
            assert any(path.name in warning for warning in journal.warnings)
            # The damaged file is the one written next, the whole one is not touched.
            assert journal.save(5, state_of(5))
    if kind != "directory":
        with Journal.open(folder.parent, IDENTITY) as journal:
            state = journal.load()
            assert state is not None and state.unit == 5 and journal.warnings == []


@pytest.mark.parametrize("kind", sorted(set(DAMAGE) - {"directory"}))
def test_a_journal_without_a_whole_state_never_stops_a_render(tmp_path: Path, kind: str) -> None:
    other = saved(tmp_path / "elsewhere", 1, changed(seed=3))
    folder = saved(tmp_path / "here", 5)
    for name in ("a.safetensors", "b.safetensors"):
        damaged(folder / name, kind, other)
    (folder / "identity.json").write_bytes(b"{")
    with Journal.open(folder.parent, IDENTITY) as journal:
        assert journal.load() is None
        assert len(journal.warnings) == 3 and "starts anew" in journal.warnings[-1]
        assert journal.save(1, state_of(1))
    damaged(newest(folder), "empty", other)
    with (
        Journal.open(folder.parent, IDENTITY, "must") as journal,
        pytest.raises(JournalMismatch, match="can be used"),
    ):
        journal.load()


def test_no_flipped_byte_or_cut_gives_a_state_that_was_never_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path, 5)
    path = newest(folder)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    places = [*range(0, header, 5), *(rng.randrange(len(whole)) for _ in range(60))]
    units = set()
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped if rng.random() < 0.8 else whole[:place])
        with Journal.open(tmp_path, IDENTITY) as journal:
            state = journal.load()
            assert state is not None and same(state.tensors, state_of(state.unit)), place
            units.add(state.unit)
    assert units <= {4, 5} and 4 in units


# --- a disk that is full or read-only -------------------------------------------------------


def test_a_full_disk_turns_the_journal_off_and_keeps_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal:
        assert journal.save(1, state_of(1))
        usage = SimpleNamespace(total=10, used=10, free=10)
        monkeypatch.setattr("wan_core.files.shutil.disk_usage", lambda _: usage)
        assert not journal.save(2, state_of(2))
        assert not journal.enabled and not journal.due()
        (warning,) = journal.warnings
        assert "free" in warning and "render goes on" in warning
        monkeypatch.undo()
        assert not journal.save(3, state_of(3)) and len(journal.warnings) == 1
    with Journal.open(tmp_path, IDENTITY) as journal:
        state = journal.load()
        assert state is not None and state.unit == 1


def test_a_write_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    """A real failing write: the kernel refuses the file's second megabyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal.open(tmp_path, IDENTITY) as journal:
        assert journal.save(1, state_of(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            assert not journal.save(2, state_of(2, 1_000_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(journal.warnings) == 1 and not journal.enabled
        assert sorted(p.name for p in journal.folder.iterdir()) == [
            "a.safetensors",
            "identity.json",
            "lock",
        ]


def test_a_folder_that_cannot_be_made_turns_the_journal_off(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    journal = Journal.open(tmp_path / "file", IDENTITY)
    assert not journal.enabled and len(journal.warnings) == 1
    assert journal.load() is None and not journal.save(1, state_of(1))
    journal.finish()
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_read_only_journal_is_still_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    saved(tmp_path, 3)

    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(journal_module, "try_lock", refuse)
    journal = Journal.open(tmp_path, IDENTITY, resume)
    state = journal.load()
    assert state is not None and state.unit == 3
    assert not journal.enabled and "Read-only file system" in journal.warnings[0]


def test_an_interrupt_while_saving_passes_and_tears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with Journal.open(tmp_path, IDENTITY) as journal:
        journal.save(1, state_of(1))
        monkeypatch.setattr("wan_core.files.os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.save(2, state_of(2))
        monkeypatch.undo()
        assert not list(journal.folder.glob(".wanfit-*"))
        assert journal.enabled and journal.save(2, state_of(2))


# --- several runs ---------------------------------------------------------------------------


def test_two_runs_of_one_video_do_not_share_a_journal(tmp_path: Path) -> None:
    first = Journal.open(tmp_path, IDENTITY)
    first.save(1, state_of(1))
    second = Journal.open(tmp_path, IDENTITY)
    assert not second.enabled and second.load() is None
    assert "Another run" in second.warnings[0]
    with pytest.raises(JournalMismatch, match="Another run"):
        Journal.open(tmp_path, IDENTITY, "must")
    assert not second.save(9, state_of(9))
    second.finish()
    assert first.save(2, state_of(2))
    first.close()
    with Journal.open(tmp_path, IDENTITY, "must") as third:
        state = third.load()
        assert state is not None and state.unit == 2


def test_old_journals_of_other_renders_go_but_none_that_is_in_use(tmp_path: Path) -> None:
    folders, day = [], time.time() - 24 * 3600
    for seed in range(KEEP + 3):
        folder = saved(tmp_path, 1, {"seed": seed, "prompt": f"{seed} foxes"})
        for path in folder.iterdir():
            os.utime(path, (day + seed, day + seed))
        folders.append(folder)
        if seed == 0:
            held = Journal.open(tmp_path, {"seed": 0, "prompt": "0 foxes"})
            os.utime(folder / "identity.json", (day, day))
    (tmp_path / "someone else's").mkdir()
    with Journal.open(tmp_path, IDENTITY) as journal:
        (told,) = journal.warnings
    assert "were removed" in told and "the oldest: 1 of 0.00 GiB" in told and str(tmp_path) in told
    left = {p.name for p in tmp_path.iterdir()}
    assert {f.name for f in folders[3:]} <= left and "someone else's" in left
    assert folders[0].name in left and not {f.name for f in folders[1:3]} & left
    held.close()


def test_what_is_kept_is_bounded_in_bytes_and_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the latest, which may be the work of a night; a clock that is ahead removes none."""
    size = sum(path.stat().st_size for path in saved(tmp_path / "one").glob("*.safetensors"))
    monkeypatch.setattr("wan_core.journal.disk.KEEP_BYTES", 2 * size + size // 2)
    folders = [saved(tmp_path / "j", 10, {"prompt": f"{n} foxes"}) for n in range(4)]
    with Journal.open(tmp_path / "j", IDENTITY) as journal:
        assert len(journal.warnings) == 1
    assert [folder.exists() for folder in folders] == [False, False, True, True]
    monkeypatch.setattr("wan_core.journal.disk.KEEP_BYTES", 1)
    with Journal.open(tmp_path / "j", changed(steps=3)):
        pass
    assert [folder.exists() for folder in folders] == [False, False, False, True]
    for days, left in ((-400, True), (29, True), (31, False)):
        for path in folders[3].iterdir():
            os.utime(path, (time.time() - days * 86400,) * 2)
        with Journal.open(tmp_path / "j", changed(steps=4)) as journal:
            assert bool(journal.warnings) != left
        assert folders[3].exists() == left
    # Of what has nothing saved nothing is said.
    empty = Journal.open(tmp_path / "j", {"prompt": "no foxes"})
    empty.close()
    os.utime(empty.folder / "identity.json", (time.time() - 31 * 86400,) * 2)
    with Journal.open(tmp_path / "j", changed(steps=5)) as journal:
        assert journal.warnings == [] and not empty.folder.exists()


@pytest.mark.parametrize("name", ["seed", "prompt"])
def test_a_render_that_was_cut_off_for_another_video_is_not_missed(
    tmp_path: Path, name: str
) -> None:
    job = {"seed": 0, "prompt": "a fox", "width": 64}
    saved(tmp_path, 1, {"job": job, "given": {}})
    with Journal.open(tmp_path, {"job": job | {name: 1}, "given": {}}) as journal:
        assert journal.warnings == []
    with Journal.open(tmp_path, {"job": job | {"width": 32}, "given": {}}) as journal:
        assert "job.width" in journal.warnings[0]


def test_two_threads_with_different_videos(tmp_path: Path) -> None:
    units: dict[int, int] = {}

    def render(seed: int) -> None:
        for _ in range(3):
            with Journal.open(tmp_path, {"seed": seed}) as journal:
                state = journal.load()
                done = state.unit if state else 0
                for unit in range(done + 1, done + 5):
                    assert journal.save(unit, state_of(unit + 100 * seed))
        units[seed] = unit

    threads = [threading.Thread(target=render, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert units == {0: 12, 1: 12, 2: 12}


def keep_saving(root: Path, pipe: Any) -> None:
    """Continue from the journal and save for ever; says each unit that is on the disk."""
    torch.set_num_threads(1)  # OpenMP's threads are gone after a fork: it would wait for them
    journal = Journal.open(root, IDENTITY)
    state = journal.load()
    unit = state.unit if state else 0
    pipe.send(("from", unit))
    while True:
        unit += 1
        assert journal.save(unit, state_of(unit, 300_000), {"unit": unit})
        pipe.send(("saved", unit))


def test_killed_at_twenty_random_moments_it_always_continues_from_the_last_unit(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("fork")
    rng = random.Random(20)
    last = 0
    for _ in range(20):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=keep_saving, args=(tmp_path, theirs))
        child.start()
        theirs.close()
        assert ours.recv() == ("from", last)
        time.sleep(rng.uniform(0.0, 0.08))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        said = last
        while True:
            try:
                said = ours.recv()[1]
            except EOFError:
                break
        with Journal.open(tmp_path, IDENTITY) as journal:
            state = journal.load()
            assert journal.warnings == []
        if state is None:
            assert said == 0
            continue
        # What was said to be saved is there; the unit being saved when it was killed may be.
        assert said <= state.unit <= said + 1
        assert same(state.tensors, state_of(state.unit, 300_000))
        assert state.scalars == {"unit": state.unit}
        last = state.unit
    assert last > 5  # on a slow disk a life ends before its second state
    left = {path.name for path in journal.folder.iterdir()}
    assert left == {"a.safetensors", "b.safetensors", "identity.json", "lock"}


# --- how often ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit_seconds", "save_seconds", "most_lost"),
    [(10.0, 0.05, 1), (10.0, 0.3, 4), (0.5, 0.05, 18), (120.0, 1.1, 1)],
)
def test_saving_takes_at_most_its_share_of_the_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unit_seconds: float,
    save_seconds: float,
    most_lost: int,
) -> None:
    now = [0.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])

    def slow(*_: object) -> int:
        now[0] += save_seconds
        return 1

    monkeypatch.setattr(journal_module, "write_state", slow)
    unsaved, worst = 0, 0
    with Journal.open(tmp_path, IDENTITY) as journal:
        for unit in range(1, 200):
            now[0] += unit_seconds
            unsaved += 1
            if journal.due():
                assert journal.save(unit, {})
                unsaved = 0
            worst = max(worst, unsaved)
        # The first save is made whatever it costs, to learn the cost.
        assert journal.seconds_spent <= 0.01 * now[0] + save_seconds
        assert worst <= most_lost
        assert f"{journal.saves} states" in journal.describe()


def test_a_first_save_that_is_large_waits_until_it_is_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short render is sooner made again than saved; a small state is saved at once."""
    now = [0.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    with Journal.open(tmp_path, IDENTITY) as journal:
        now[0] = 1.0
        assert journal.due() and journal.due(3_900_000) and not journal.due(40_000_000)
        now[0] = 10.1
        assert journal.due(40_000_000)


def test_every_unit_is_due_where_asked_for(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY, max_share=math.inf) as journal:
        for unit in range(5):
            assert journal.due() and journal.save(unit, state_of(unit))


# --- identity -------------------------------------------------------------------------------


def test_identity_is_by_content_not_by_order_or_object() -> None:
    image = torch.rand(3, 4, 4)
    one = plain_identity({"a": {"x": 1, "y": [1, 2]}, "image": image, "kinds": {"b", "a"}})
    two = plain_identity({"kinds": {"a", "b"}, "image": image.clone(), "a": {"y": (1, 2), "x": 1}})
    assert identity_key(one) == identity_key(two)
    for other in (image + 1, image.double(), image.reshape(4, 3, 4)):
        assert identity_key(one) != identity_key(
            {**two, "image": plain_identity({"i": other})["i"]}
        )


def test_pictures_arrays_and_dtypes_are_part_of_it() -> None:
    picture = Image.new("RGB", (4, 2), (1, 2, 3))
    values: list[object] = [picture, Image.new("RGB", (2, 4), (1, 2, 3)), picture.convert("L")]
    values += [np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((2, 3), np.float32)]
    values += [b"x", b"y", "x", torch.float16, torch.bfloat16, 1, 1.5, True, None]
    keys = {identity_key(plain_identity({"value": value})) for value in values}
    assert len(keys) == len(values)
    again = Image.new("RGB", (4, 2), (1, 2, 3))
    assert plain_identity({"v": picture}) == plain_identity({"v": again})


def test_what_has_no_content_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"settings\.callback is a function") as caught:
        plain_identity({"settings": {"callback": lambda: None}})
    assert caught.value.field == "settings.callback"


def test_differences_show_where_long_text_parts() -> None:
    before = {"prompt": "x" * 500 + "cat" + "y" * 500}
    after = {"prompt": "x" * 500 + "dog" + "y" * 500}
    (only,) = identity_differences(before, after)
    assert "cat" in only and "dog" in only and len(only) < 250
    assert identity_differences(before, dict(before)) == []
    assert identity_differences({"a": [1, 2]}, {"a": [1]}) == ["a.1 (saved 2, now nothing)"]


# --- schedulers -----------------------------------------------------------------------------

STEPS = 8


def prepared(name: str, steps: int = STEPS, begin: int = 0) -> Any:
    scheduler = make_scheduler(name, 5.0)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(begin)
    return scheduler


def advance(scheduler: Any, latents: torch.Tensor, steps: range) -> torch.Tensor:
    for i in steps:
        generator = torch.Generator().manual_seed(i)
        velocity = torch.sin(latents) + torch.randn(latents.shape, generator=generator)
        latents = scheduler.step(velocity, scheduler.timesteps[i], latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_new_scheduler_continues_bit_for_bit_after_every_step(
    tmp_path: Path, name: str, begin: int
) -> None:
    start = torch.randn(1, 4, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    whole = advance(prepared(name, begin=begin), start, range(begin, STEPS))
    for k in range(begin, STEPS + 1):
        before = prepared(name, begin=begin)
        latents = advance(before, start, range(begin, k))
        tensors, scalars = scheduler_state(before)
        with Journal.open(tmp_path / str(k), IDENTITY) as journal:
            assert journal.save(k, {"latents": latents, **tensors}, scalars)
        with Journal.open(tmp_path / str(k), IDENTITY, "must") as journal:
            state = journal.load()
        assert state is not None and state.unit == k
        after = prepared(name)
        restore_scheduler(after, state)
        assert after.step_index == before.step_index and after.begin_index == begin
        assert torch.equal(advance(after, state.tensors["latents"], range(k, STEPS)), whole)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_the_state_the_result_would_differ(name: str) -> None:
    """What the test above would not notice if schedulers had no memory; Euler has none."""
    start = torch.randn(1, 4, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    whole = advance(prepared(name), start, range(STEPS))
    half = advance(prepared(name), start, range(4))
    forgot = advance(prepared(name, begin=4), half, range(4, STEPS))
    assert torch.equal(forgot, whole) == (name == "euler")


def test_a_scheduler_of_another_kind_or_other_steps_is_refused() -> None:
    tensors, scalars = scheduler_state(prepared("unipc"))
    state = journal_module.JournalState(3, tensors, scalars)
    with pytest.raises(JournalMismatch, match="UniPC"):
        restore_scheduler(prepared("euler"), state)
    with pytest.raises(JournalMismatch, match="number of steps"):
        restore_scheduler(prepared("unipc", steps=STEPS + 1), state)
    shifted = make_scheduler("unipc", 3.0)
    shifted.set_timesteps(STEPS)
    with pytest.raises(JournalMismatch, match="flow shift"):
        restore_scheduler(shifted, state)


def test_a_saved_state_cannot_replace_a_method() -> None:
    tensors, scalars = scheduler_state(prepared("euler"))
    scalars["scheduler"]["values"]["step"] = None
    scheduler = prepared("euler")
    restore_scheduler(scheduler, journal_module.JournalState(3, tensors, scalars))
    assert callable(scheduler.step)


def test_a_scheduler_with_another_model_inside_is_refused() -> None:
    scheduler = prepared("unipc")
    scheduler.solver_p = prepared("euler")
    with pytest.raises(InvalidRequest, match="solver_p"):
        scheduler_state(scheduler)
