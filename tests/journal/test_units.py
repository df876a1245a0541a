"""Finished units are found again, whole and as what they are, and cost little time and room."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_core.errors import JournalMismatch, OutputError
from wan_core.journal import Journal, saved_renders, units
from wan_core.journal.unit_log import UnitLog
from wan_core.journal.units import KeptUnits, unit_name
from wan_core.sampling import Unit

UNIT = Unit(
    latents=torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 2, 2),
    timestep=torch.tensor(999.0), indices=(0, 1, 2), middle=1,
)  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "one bit of the latents": {"latents": UNIT.latents.nextafter(UNIT.latents + 1)},
    "their sign of zero": {"latents": UNIT.latents * -1.0},
    "their dtype": {"latents": UNIT.latents.view(torch.int32)},
    "their shape": {"latents": UNIT.latents.reshape(1, 2, 3, 4, 1)},
    "timestep": {"timestep": torch.tensor(998.0)},
    "frames": {"indices": (0, 1, 3)},
    "pass": {"second": True},
    "keep": {"keep": True},
    "residual": {"residual": torch.zeros(1, 2, 3)},
    "another residual": {"residual": torch.ones(1, 2, 3)},
}


def made(seed: int, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"velocity": torch.randn(2, 3, 5, generator=generator).bfloat16(), **more}


def same(found: dict[str, Tensor] | None, given: dict[str, Tensor]) -> bool:
    return found is not None and found.keys() == given.keys() and all(
        torch.equal(found[name], one) and found[name].dtype == one.dtype
        for name, one in given.items()
    )  # fmt: skip


def test_a_unit_is_named_by_all_that_its_bits_depend_on() -> None:
    name = unit_name(UNIT, "a")
    copy = replace(UNIT, latents=UNIT.latents.clone(), timestep=UNIT.timestep.double(), middle=None)
    assert unit_name(copy, "a") == name
    others = [unit_name(replace(UNIT, **change), "a") for change in OTHERS.values()]
    assert len({name, unit_name(UNIT, "b"), *others}) == 2 + len(OTHERS)


def test_what_was_added_comes_back_also_in_the_next_process(tmp_path: Path) -> None:
    given = {f"{n:032x}": made(n, residual=torch.ones(2, 1, 3)) for n in range(5)}
    log = UnitLog(tmp_path / "units")
    for name, one in given.items():
        assert log.find(name) is None
        log.add(name, one)
    log.close()
    for again in (log, UnitLog(tmp_path / "units")):
        assert len(again) == 5 and all(same(again.find(name), one) for name, one in given.items())
    again.add("f" * 32, made(9))  # after those of before
    again.close()
    last = UnitLog(tmp_path / "units")
    assert len(last) == 6 and same(last.find("f" * 32), made(9))
    last.clear()
    assert len(last) == 0 and (tmp_path / "units").stat().st_size == 0
    last.add("0" * 32, made(1))
    assert same(UnitLog(tmp_path / "units").find("0" * 32), made(1))
    last.remove()
    assert not list(tmp_path.iterdir())


def test_no_cut_or_flipped_byte_gives_what_was_never_added(tmp_path: Path) -> None:
    given = {f"{n:032x}": made(n) for n in range(3)}
    log = UnitLog(tmp_path / "units")
    ends = []
    for name, one in given.items():
        log.add(name, one)
        ends.append(log.nbytes)
    log.close()
    whole, dice = (tmp_path / "units").read_bytes(), random.Random(0)
    for cut in range(0, len(whole), 7):
        (tmp_path / "units").write_bytes(whole[:cut])
        found = UnitLog(tmp_path / "units")
        assert len(found) == sum(end <= cut for end in ends)
        found.add("f" * 32, made(9))  # over what was cut off
        found.close()
        after = UnitLog(tmp_path / "units")
        assert len(after) == len(found) and same(after.find("f" * 32), made(9))
    for _ in range(200):
        broken = bytearray(whole)
        broken[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        (tmp_path / "units").write_bytes(broken)
        found = UnitLog(tmp_path / "units")
        kinds = [found.find(name) for name in given]
        assert all(
            one is None or same(one, want) for one, want in zip(kinds, given.values(), strict=True)
        )
        assert sum(one is None for one in kinds) >= 1


def kept_in(root: Path, share: float = 0.01) -> tuple[Journal, KeptUnits]:
    journal = Journal.open(root, {"job": 1}, max_share=share)
    return journal, KeptUnits(journal).of(torch.zeros(1000), lambda: "")


def test_units_take_their_share_of_the_time_and_what_is_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that takes 20 ms for each, every second unit of 2 s is kept; on a usual one all."""
    for cost, expected in ((0.001, 100), (0.02, 50)):
        now = [0.0]
        monkeypatch.setattr(units.time, "monotonic", lambda now=now: now[0])
        journal, kept = kept_in(tmp_path / str(cost))

        def slow(*_: Any, now: list[float] = now, cost: float = cost) -> None:
            now[0] += cost

        monkeypatch.setattr(UnitLog, "add", slow)
        for number in range(100):
            now[0] += 2.0
            kept.keep(f"{number:032x}", (torch.zeros(10), None))
        assert abs(kept.kept - expected) <= 1 and kept.kept + kept.left_out == 100
        assert kept.seconds_spent <= 0.005 * now[0] + cost and journal.seconds_spent == 0
        assert kept.whole == (kept.left_out == 0)
        assert ("not kept" in kept.describe()) == (kept.left_out > 0)
        journal.close()


def test_units_take_no_more_room_than_two_states(tmp_path: Path) -> None:
    journal, kept = kept_in(tmp_path, math.inf)
    for number in range(40):
        kept.keep(f"{number:032x}", (torch.zeros(1000), None))
    assert (tmp_path / journal.key / "units").stat().st_size <= 8 * 4000
    assert kept.kept == 7 and not kept.whole
    kept.step_saved()
    assert kept.whole and kept.find("0" * 32) is None
    kept.keep("0" * 32, (torch.zeros(1000), None))
    assert kept.find("0" * 32) is not None
    kept.remove()
    assert kept.find("0" * 32) is None
    journal.close()


@pytest.mark.parametrize("err", [OSError(28, "No space left on device"), OutputError("no RAM")])
def test_a_full_disk_ends_the_keeping_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, err: Exception
) -> None:
    journal, kept = kept_in(tmp_path, math.inf)
    kept.keep("0" * 32, (torch.zeros(10), None))

    def full(*_: Any) -> None:
        raise err

    monkeypatch.setattr(UnitLog, "add", full)
    for number in range(1, 4):
        kept.keep(f"{number:032x}", (torch.zeros(10), None))
    assert len(journal.warnings) == 1 and str(err) in journal.warnings[0]
    assert not kept.whole and not (journal.folder / "units").exists()  # its room is given back
    assert kept.name(UNIT) == "" and journal.enabled and journal.save(1, {"x": torch.zeros(3)})
    journal.finish()
    assert not tmp_path.exists()


def test_a_render_that_must_go_on_does_so_from_units_alone(tmp_path: Path) -> None:
    """Of a step that was not finished there is no state; a record that was cut off is no unit."""
    about = {"seed": 1}
    with Journal.open(tmp_path, about) as journal:
        path = journal.folder / "units"
        UnitLog(path).add("a" * 32, made(1))
    (saved,) = saved_renders(tmp_path)
    assert (saved.key, saved.next_step, saved.finished) == (journal.key, 0, False)
    with Journal.open(tmp_path, about, "must") as again:
        assert again.units_alone and not again.resuming and again.load() is None
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(JournalMismatch, match="no saved state"):
        Journal.open(tmp_path, about, "must")
    with Journal.open(tmp_path, about) as journal:
        assert not journal.units_alone
