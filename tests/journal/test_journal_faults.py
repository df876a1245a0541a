"""Journals on disks that fail at any call, on shared disks without locks, and with wrong clocks."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import slow_but
from support.disk_faults import Disk, failing_disk

from wan_core.journal import disk, lock
from wan_core.journal import journal as journal_module
from wan_core.journal.disk import KEEP, journals
from wan_core.journal.journal import Journal
from wan_core.journal.lock import try_lock

IDENTITY: dict[str, object] = {"prompt": "a fox in the snow", "settings": {"seed": 0, "steps": 20}}
ALIKE: dict[str, object] = {"prompt": "a fox in the snow", "settings": {"seed": 1, "steps": 20}}
LAST = 5
"""Units of the render in these tests; two are saved before."""


def state_of(unit: int) -> dict[str, torch.Tensor]:
    return {"latents": torch.full((50,), float(unit)), "last": torch.full((7,), float(unit))}


def render(root: Path, end: str) -> tuple[int, bool]:
    """Go on with a render to its ``end``; return the last unit said to be saved, and if latents."""
    said, latents = 0, False
    with Journal.open(root, IDENTITY) as journal:
        state = journal.load()
        for unit in range(1 + (state.unit if state else 0), LAST + 1):
            if journal.save(unit, state_of(unit)):
                said = unit
        latents = journal.latents_done(torch.full((50,), 1.5))
        if not latents or said < LAST:
            assert journal.warnings, "what was not saved is not said"
        if end == "finish":
            journal.finish()
    return said, latents


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a journal of two units, one of a similar render, and a file of a dead one."""
    root = tmp_path_factory.mktemp("half") / "journals"
    for identity in (ALIKE, IDENTITY):
        with Journal.open(root, identity) as journal:
            for unit in (1, 2):
                assert journal.save(unit, state_of(unit))
    (journal.folder / ".wanfit-00000000-other-host").write_bytes(b"half a state")
    return root


@pytest.mark.parametrize(
    ("fault", "end"),
    slow_but(
        {("full", "crash"), ("read-only", "crash")}.__contains__,
        [("full", "crash"), ("read-only", "crash"), ("no permission", "crash"),
         ("broken", "crash"), ("full", "finish"), ("gone", "finish")],
    ),
)  # fmt: skip
def test_whichever_call_fails_nothing_is_lost(
    half_done: Path, tmp_path: Path, fault: str, end: str
) -> None:
    """Every call is failed once, alone and with all that follow: the render always goes on.

    What was said to be saved is there afterwards, bit for bit, or else something newer.
    """
    for lasting in (False, True):
        at = 0
        while True:
            root = tmp_path / f"{lasting}-{at}"
            shutil.copytree(half_done, root)
            with failing_disk(Disk(str(root), fault, at, lasting=lasting)) as disk:
                said, latents = render(root, end)
            if not disk.failed:
                assert (said, latents) == (LAST, True)
                break
            at += 1
            with Journal.open(root, IDENTITY) as journal:
                state = journal.load()
                assert journal.enabled
                if state is None:
                    # Gone only by ``finish``, or because no state could be read when it began,
                    # so that the render was made anew, and not saved or finished either.
                    assert end == "finish", (fault, at)
                    continue
                if state.latents is not None:
                    assert torch.equal(state.latents, torch.full((50,), 1.5))
                else:
                    assert not latents or end == "finish"
                    assert state.unit >= max(said, 2) or end == "finish", (fault, at)
                    expected = state_of(state.unit)
                    assert all(torch.equal(state.tensors[k], v) for k, v in expected.items())
        assert at > 20


# --- a disk that is too small -----------------------------------------------------------------


class SmallDisk:
    """Has room for ``size`` bytes, by what it says is free; counts the files below ``root``."""

    def __init__(self, root: Path, size: int) -> None:
        self.root, self.size = root, size

    def __call__(self, _: object) -> Any:
        used = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        return SimpleNamespace(total=self.size, used=used, free=max(0, self.size - used))


@pytest.mark.parametrize(
    ("states", "more", "left"),
    [(0, 0, ""), (0, 1, "latents"), (1, 0, "a"), (1, 1, "latents"), (2, 0, "latents"),
     (2, 1, "latents"), (6, 0, "a b latents")],
)  # fmt: skip
def test_finished_latents_get_the_room_of_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: int, more: int, left: str
) -> None:
    """Room for so many states, and once more the latents; with twice the states for the video."""
    latents = torch.full((500,), 1.5)

    def run(root: Path) -> tuple[list[bool], bool, Journal]:
        with Journal.open(root, IDENTITY) as journal:
            # As UniPC's: four times as large as the latents.
            each = [{f"{i}": latents + unit for i in range(4)} for unit in range(LAST)]
            saved = [journal.save(unit + 1, each[unit]) for unit in range(LAST)]
            return saved, journal.latents_done(latents), journal

    whole = {path.stem: path.stat().st_size for path in run(tmp_path / "whole")[2].folder.iterdir()}
    shutil.rmtree(tmp_path / "whole")
    size = whole["identity"] + 100 + states * whole["a"] + more * whole["latents"]
    monkeypatch.setattr("shutil.disk_usage", SmallDisk(tmp_path, size))
    saved, finished, journal = run(tmp_path / "j")
    fit = LAST if states > 2 else states
    assert saved == [True] * fit + [False] * (LAST - fit)
    assert finished == ("latents" in left) and bool(journal.warnings) == (states <= 2)
    # The only state of the loop is never removed before something newer is complete.
    assert {path.stem for path in journal.folder.glob("*.safetensors")} == set(left.split())
    if finished:
        with Journal.open(tmp_path / "j", IDENTITY, "must") as journal:
            state = journal.load()
            assert state is not None and state.latents is not None
            assert torch.equal(state.latents, latents)


# --- two runs on one journal -----------------------------------------------------------------


@pytest.fixture
def no_shared_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network disk that is mounted without locks: every host gets its own."""

    def lock(path: Path) -> Any:
        return open(path, "ab")

    monkeypatch.setattr(journal_module, "try_lock", lock)
    monkeypatch.setattr(disk, "try_lock", lock)


@pytest.mark.usefixtures("no_shared_locks")
def test_the_later_of_two_hosts_has_the_journal_and_loses_nothing_to_the_other(
    tmp_path: Path,
) -> None:
    first = Journal.open(tmp_path, IDENTITY)
    for unit in (1, 2, 3):
        assert first.save(unit, state_of(unit))
    being_written = first.folder / ".wanfit-00000000-of-the-other-host"
    being_written.write_bytes(b"half a state")
    second = Journal.open(tmp_path, IDENTITY)
    state = second.load()
    assert state is not None and state.unit == 3 and being_written.exists()
    assert second.save(4, state_of(4))

    assert not first.save(4, state_of(40)) and not first.enabled and not first.due()
    (warning,) = first.warnings
    assert "Another run" in warning and f"process {os.getpid()}" in warning
    assert not first.latents_done(torch.zeros(3))
    first.finish()

    assert second.save(5, state_of(5)) and second.warnings == []
    second.close()
    with Journal.open(tmp_path, IDENTITY, "must") as third:
        state = third.load()
        assert state is not None and state.unit == 5
        assert torch.equal(state.tensors["latents"], state_of(5)["latents"])
        third.finish()
    assert not list(journals(tmp_path))


@pytest.mark.usefixtures("no_shared_locks")
def test_a_journal_that_another_host_removed_is_made_again(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal:
        assert journal.save(1, state_of(1))
        shutil.rmtree(tmp_path)
        assert journal.save(2, state_of(2)) and journal.warnings == []
    with Journal.open(tmp_path, IDENTITY, "must") as journal:
        state = journal.load()
        assert state is not None and state.unit == 2
    assert list(journals(tmp_path)) == [journal.folder]


def in_turns(root: Path, pipe: Any) -> None:
    """Open and finish one journal over and over; send how often it was had, and by how many."""
    had = together = 0
    pipe.recv()
    began = time.monotonic()
    while time.monotonic() < began + (1 if had > 5 else 30):
        with Journal.open(root, IDENTITY) as journal:
            if not journal.enabled:
                continue
            had += 1
            mark = root.parent / "here"
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                together += 1
                continue
            mark.unlink()
            journal.finish()
    pipe.send((had, together))


def test_two_processes_never_have_one_journal_at_once(tmp_path: Path) -> None:
    """Also while one of them removes it: a lock on a file that is gone would keep nobody out."""
    context = multiprocessing.get_context("fork")
    ends, children = [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        ends.append(ours)
        children.append(context.Process(target=in_turns, args=(tmp_path / "journals", theirs)))
        children[-1].start()
    for ours in ends:
        ours.send("go")
    counts = [ours.recv() for ours in ends]
    for child in children:
        child.join()
    assert [together for _, together in counts] == [0, 0] and min(had for had, _ in counts) > 5


def test_a_process_forked_meanwhile_keeps_no_lock(tmp_path: Path) -> None:
    """It has the same open file, and may live on when the render is long interrupted."""
    with Journal.open(tmp_path, IDENTITY) as first:
        assert first.save(1, {"x": torch.ones(2)}) and first._lock is not None
        forked = os.dup(first._lock.file.fileno())
    with Journal.open(tmp_path, IDENTITY) as again:
        assert again.load() is not None and not again.warnings
    os.close(forked)


def test_a_lock_on_a_file_that_was_removed_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run ends between opening the file and locking it."""
    path, real = tmp_path / "lock", open
    opened: list[Any] = []

    def late(name: Any, mode: str, **more: Any) -> Any:
        opened.append(real(name, mode, **more))
        if len(opened) == 1:
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(lock, "open", late, raising=False)
    found = try_lock(path)
    assert found is not None and found.file is opened[1] and opened[0].closed
    assert try_lock(path) is None
    found.close()


def test_the_message_names_the_run_that_has_the_journal(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY):
        other = Journal.open(tmp_path, IDENTITY)
        assert f"Another run (process {os.getpid()} on " in other.warnings[0]


def test_a_journal_that_may_not_be_removed_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of several users, the system refuses what belongs to another."""
    first = None
    for number in range(KEEP + 1):
        with Journal.open(tmp_path, {"prompt": f"{number} foxes"}) as journal:
            assert journal.save(1, state_of(1))
            first = first or journal.folder
    theirs = list(journals(tmp_path))
    real = disk.try_lock

    def refused(path: Path) -> Any:
        if path.parent in theirs and path.parent != first:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(disk, "try_lock", refused)
    monkeypatch.setattr(disk, "KEEP", 1)
    with Journal.open(tmp_path, IDENTITY) as journal:
        (warning,) = journal.warnings
    assert first is not None and not first.exists() and "1 of " in warning
    assert len(list(journals(tmp_path))) == KEEP + 1


# --- clocks -----------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_removes_no_render_that_was_cut_off_last(tmp_path: Path) -> None:
    """The newest are those that were opened last, whatever the times of their files say."""
    folders = []
    for number in range(KEEP + 3):
        with Journal.open(tmp_path, {"prompt": f"{number} foxes"}) as journal:
            assert journal.save(1, state_of(1))
        folders.append(journal.folder)
        for path in journal.folder.iterdir():  # every day, the clock is set back by two
            os.utime(path, (time.time() - 86_400 * number,) * 2)
    assert list(journals(tmp_path)) == sorted(folders[2:])


def test_states_are_told_apart_by_number_not_by_time(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal:
        for unit in (1, 2, 3):
            assert journal.save(unit, state_of(unit))
            for path in journal.folder.iterdir():
                os.utime(path, (10**9 - unit,) * 2)
    with Journal.open(tmp_path, IDENTITY) as journal:
        state = journal.load()
        assert state is not None and state.unit == 3


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1, "sequence": Infinity, "key": 0}'])
def test_a_state_of_another_making_is_no_state(tmp_path: Path, text: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"journal": text, "checksum": "1"})
    key = 0 if "key" in text else ""
    assert disk.state_sequence(path, key) is None  # type: ignore[arg-type]
    with pytest.raises(disk.BrokenState):
        disk.read_state(path, "k")


def test_a_journal_made_before_owners_were_noted_is_gone_on_with(tmp_path: Path) -> None:
    with Journal.open(tmp_path, IDENTITY) as journal:
        assert journal.save(1, state_of(1))
        record = json.loads((journal.folder / "identity.json").read_bytes())
    for name in ("owner", "opened"):
        del record[name]
    (journal.folder / "identity.json").write_text(json.dumps(record))
    with Journal.open(tmp_path, IDENTITY, "must") as journal:
        assert journal.load() is not None and journal.save(2, state_of(2))
        journal.finish()
    assert not journal.folder.exists()
