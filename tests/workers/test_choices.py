"""What is chosen by a clock or a trial is the same for all that compute a clip together."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.choosing import OWN
from support.cut_clips import CLIP, cut_units, equal, four_heads, made, make_links_free
from support.process_gang import in_processes
from support.thread_workers import Cancelled, Killed, ThreadWorker
from support.tiny_models import open_wan

from wan_core.kernels import trials
from wan_core.kernels.trials import chosen_together
from wan_core.workers.jobs import Chosen

X, Y, PLAIN = (10, 5, 7, 10, 5), (10, 7, 5, 5, 10), (10, 11, 12, 5, 10)
"""Clocks by which "x" and 8 bit, "y" and 16 bit, and torch's own way and 16 bit are the fastest."""
ROUNDS: dict[str, tuple[Any, Any]] = {
    "alike": (((X, ()), (X, ())), ("x", True, True, True)),
    "another clock": (((X, ()), (Y, ())), ("x", True, True, True)),
    "rank 0 sees no gain": (((PLAIN, ()), (X, ())), (OWN, False, True, True)),
    "rank 1 cannot": (((X, ()), (Y, ("x", "8 bit", "codes"))), (OWN, False, False, True)),
    "rank 0 cannot": (((Y, ("x", "8 bit", "codes")), (X, ())), ("y", False, False, True)),
    "norms of one fail": (((X, ()), (X, ("norms",))), ("x", True, False, False)),
    "norms of rank 0 fail": (((X, ("norms",)), (X, ())), ("x", True, False, False)),
}  # fmt: skip


def test_ranks_whose_clocks_and_cards_disagree_choose_alike(tmp_path: Path) -> None:
    """Over gloo, as in a gang: what rank 0 chooses if all can do it, and else what all can."""
    cards = [cards for cards, _ in ROUNDS.values()]
    first, second = in_processes(
        2, "support.choosing.choose", cards, str(tmp_path), folder=tmp_path
    )
    for (name, (_, wanted)), ours, theirs in zip(ROUNDS.items(), first, second, strict=True):
        for (*found, out), _, _ in (ours, theirs):
            assert tuple(found) == wanted, name
            assert out == ours[0][-1]
        differ = ours[1][:4] != theirs[1][:4]
        assert differ is (name != "alike"), "alone they would have chosen otherwise"
        lacking = [text for text in ours[2] if "Not every card can do" in text]
        assert len(lacking) == (2 if name == "rank 1 cannot" else 0), ours[2]


class Asker:
    """A worker as the driver sees it: what it is told, and where it is."""

    def __init__(self) -> None:
        self.process = SimpleNamespace(send=lambda header, _=None: self.told.append(header))
        self.told: list[dict[str, Any]] = []
        self.asked, self.chooses, self.found = 0, False, ""

    @property
    def waits(self) -> bool:
        return bool(self.asked) and not self.chooses and not self.found

    def hear(self) -> None:
        for header in self.told:
            if header["ask"] == self.asked and self.waits:
                self.found, self.chooses = header["name"] or "", header["name"] is None
        self.told.clear()


@pytest.mark.parametrize("seed", range(40))
def test_one_chooses_for_all_whoever_fails_stops_or_ends_meanwhile(seed: int) -> None:
    """At any time one of those who wait has been asked to choose, and all find the same."""
    at_random, chosen = random.Random(seed), Chosen()
    askers = [Asker() for _ in range(4)]
    for _ in range(60):
        one: Any = at_random.choice(askers)
        what = {"what": "attention"}
        turn = at_random.random()
        if not one.asked:
            one.asked = at_random.randrange(1, 9)
            chosen.hears(one, {"type": "choose", "ask": one.asked, **what})
        elif turn < 0.1:  # it ends, and another takes its place
            chosen.lose([one])
            askers[askers.index(one)] = Asker()
        elif one.chooses:
            name = None if turn < 0.4 else str(turn)
            chosen.hears(one, {"type": "chose", "name": name, "kept": True, **what})
            one.chooses, one.found, one.asked = False, name or "", one.asked if name else 0
        elif one.waits and turn < 0.3:  # its unit is not wanted any more
            chosen.hears(one, {"type": "chose", "name": None, **what})
            one.asked = 0
        for each in askers:
            each.hear()
        assert sum(each.chooses for each in askers) <= 1
        assert any(each.chooses for each in askers) or not any(each.waits for each in askers)
        assert len({each.found for each in askers if each.found}) <= 1


def test_what_could_not_be_had_is_chosen_anew_in_the_next_render() -> None:
    chosen, one = Chosen(), Asker()
    for kept, again in ((False, None), (True, "y")):
        chosen.hears(one, {"type": "choose", "what": "", "ask": 1})  # type: ignore[arg-type]
        told = {"type": "chose", "what": "", "name": "y", "kept": kept}
        chosen.hears(one, told)  # type: ignore[arg-type]
        chosen.begin()
        chosen.hears(one, {"type": "choose", "what": "", "ask": 2})  # type: ignore[arg-type]
        assert one.told[-1]["name"] == again
        if again is None:
            chosen.lose([one])  # type: ignore[list-item]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_heads(tmp_path_factory.mktemp("choices"), "wan2.1-t2v")


@pytest.fixture
def free_links(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_links_free(folder)
    return


class Interrupt(BaseException):
    """Stands for ComfyUI's."""


@pytest.mark.usefixtures("free_links")
def test_an_interrupt_reaches_who_waits_for_a_choice(
    folder: Path, threads: type[ThreadWorker]
) -> None:
    """One times kernels for long; the other stops at once, and both compute the next clip."""
    job, chooses, ended = CLIP | {"num_inference_steps": 1}, Event(), Event()
    asking: set[ThreadWorker] = set()

    def look(worker: ThreadWorker) -> None:
        if trials._council.get() is None or ended.is_set() or worker in asking:
            return  # a worker that waits looks for an interrupt, and so comes here again
        asking.add(worker)

        def choose() -> str:
            chooses.set()
            assert ended.wait(60)
            return "kernel"

        try:
            chosen_together("attention", choose, lambda name: True, "plain")
        except Cancelled:
            ended.set()
            raise

    def check() -> None:
        if chooses.is_set() and len(asking) == 2:
            raise Interrupt

    threads.looked = look
    wrapper = open_wan(folder, devices=2)
    with pytest.raises(Interrupt):
        made(wrapper, job, interrupt_check=check)
    assert ended.is_set()
    assert equal(made(wrapper, job), made(open_wan(folder), job)) and len(threads.made) == 2


@pytest.mark.usefixtures("free_links")
@pytest.mark.parametrize(
    ("cards", "fate"),
    [
        (2, "dies"),
        (4, "fails"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, ""), (2, "fails"), (4, ""), (4, "dies"))
        ),
    ],
)
def test_workers_and_gangs_of_a_clip_choose_alike(
    folder: Path, threads: type[ThreadWorker], cards: int, fate: str
) -> None:
    """Two alone, or two gangs of two: each would choose itself, and one does, also where the first
    to choose ends in the middle of it."""
    job = CLIP | {"num_inference_steps": 1}
    whole = made(open_wan(folder), job)
    found: dict[ThreadWorker, set[str]] = {}
    fell: list[ThreadWorker] = []

    def look(worker: ThreadWorker) -> None:
        if trials._council.get() is None:
            return  # weights are put in their place

        def choose() -> str:
            if fate and not fell:
                fell.append(worker)
                raise Killed if fate == "dies" else torch.OutOfMemoryError("CUDA out of memory")
            return f"kernel {threads.made.index(worker)}"

        name = chosen_together("attention", choose, lambda name: True, "plain")
        found.setdefault(worker, set()).add(name)

    threads.looked = look
    result = made(open_wan(folder, devices=cards), job)
    assert equal(result, whole) and (cards == 2 or cut_units(result) > 0)
    names = set.union(*found.values())
    assert len(names) == 1 and names.pop().startswith("kernel")
    # One that starts anew, or fails, may find that the others have done all.
    assert len(found) >= (cards // 2 if fate else cards)
    assert len(fell) == bool(fate)
