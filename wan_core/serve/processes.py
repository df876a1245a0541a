"""A crew of processes on this host: a job each, on cards of their own, or in turn on the same.

A process is this interpreter with this package, started anew. It is told jobs as lines of JSON and
answers in lines of JSON; it ends when its driver does. One that dies costs its driver nothing: the
job's journal is on disk, and another process goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..config import child_environment, leave_ends_to_driver
from ..errors import InvalidRequest, first_line
from .carry import Carrier, Outcome
from .crew import IDLE_SECONDS, Hand, Progress
from .jobs import BatchJob

_ROOT = Path(__file__).resolve().parents[2]
# By path, not by the package's name: inside ComfyUI that is the pack's.
_START = "import sys; sys.path.insert(0, sys.argv[1]); from wan_core.serve import processes; "
_START += "processes.main()"
_VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_END_SECONDS = 5.0
_MOST_AT_ONCE = 4096
"""More is a slip of the finger, and each has a place in memory."""

Line = dict[str, Any]


class _Process(Hand):
    """A hand that is a process, started with its first job and again after a death."""

    def __init__(
        self, name: str, place: Mapping[str, Any], seen: Mapping[str, str],
        told: Callable[[_Process, Line | None], object],
    ) -> None:  # fmt: skip
        super().__init__(name)
        self.home = str(place.get("device") or "cpu")
        """The card that it encodes and decodes on."""
        self.decoding = False
        """Whether its job needs no card but its home any more."""
        self._place, self._seen, self._told = dict(place), dict(seen), told
        self._process: subprocess.Popen[bytes] | None = None
        self._outbox: queue.Queue[bytes | None] = queue.Queue()
        self.idle_since = time.monotonic()
        """Since when it has no job although none waits; once it was given up, since when."""
        self.trouble = ""
        """Why it could not be started."""

    def successor(self) -> _Process:
        """Return one for the same cards, whose process is not started yet."""
        return _Process(self.name, self._place, self._seen, self._told)

    @property
    def pid(self) -> int | None:
        """Return the number of the process; None where it does not run."""
        return None if self._process is None else self._process.pid

    def send(self, line: Line) -> None:
        """Send a line, starting the process first where it does not run; never waits for it.

        A line may be longer than a pipe holds, and the process may hang: another thread writes.
        """
        process = self._process
        if process is None:
            arguments = [sys.executable, "-P", "-c", _START, str(_ROOT), json.dumps(self._place)]
            try:
                process = subprocess.Popen(
                    arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    env={**child_environment(os.environ), **self._seen},
                )  # fmt: skip
            except OSError as err:  # no memory, no process or no file is left for it
                self.trouble = f"Its process cannot be started: {first_line(err)}."
                self._told(self, None)
                return
            self.trouble = ""
            self._process, self._outbox = process, queue.Queue()
            assert process.stdin is not None and process.stdout is not None
            given = (process.stdin, self._outbox)
            threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()
            threading.Thread(target=self._write, args=given, daemon=True).start()
        self._outbox.put((json.dumps(line) + "\n").encode())

    def _write(self, stream: IO[bytes], outbox: queue.Queue[bytes | None]) -> None:
        # A broken pipe: the process has ended, which the reading thread tells.
        with contextlib.suppress(OSError, ValueError):
            while (line := outbox.get()) is not None:
                stream.write(line)
                stream.flush()
        with contextlib.suppress(OSError):
            stream.close()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            with contextlib.suppress(ValueError):
                self._told(self, json.loads(line))
        self._told(self, None)

    def kill(self) -> None:
        """End the process at once; that it has ended is told by the reading thread."""
        if self._process is not None:
            self._process.kill()

    def leave(self) -> None:
        """Tell the process, if it runs, that its driver needs it no more."""
        self._outbox.put(None)  # closes its stdin, at which it ends

    def ended(self) -> int | None:
        """Forget a process that has ended; return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        self.leave()
        try:
            return process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


class Processes:
    """``count`` processes, each with ``cards`` of the host's cards, or on its CPU.

    ``seen`` are the numbers of the cards that may be used, as torch counts them; an empty list is
    for hosts without, where all processes share the CPU. A process that nobody needs for
    ``IDLE_SECONDS`` ends, and gives its cards back. Raises InvalidRequest where there are too few
    cards. ``progress`` and ``stopped`` are called from the thread that waits.
    """

    def __init__(
        self,
        count: int,
        *,
        cards: int = 1,
        seen: Sequence[int] = (),
        progress: Progress | None = None,
        stopped: Callable[[int], bool] | None = None,
    ) -> None:
        if count < 1 or (seen and count * cards > len(seen)):
            raise InvalidRequest(
                f"{count} jobs at once with {cards} card(s) each need {count * cards} cards; "
                f"there are {len(seen)}. Ask for fewer jobs at once, or fewer devices for each.",
                field="at_once",
            )
        self._progress, self._stopped = progress, stopped
        self._told: queue.Queue[tuple[_Process, Line | None]] = queue.Queue()
        self.hands = [self._hand(i, cards, seen) for i in range(count)]
        self._leaving: list[_Process] = []

    def _hand(self, index: int, cards: int, seen: Sequence[int]) -> _Process:
        own = seen[index * cards : (index + 1) * cards]
        # Where cards are hidden from all others, the ones in sight are this process' own.
        place: Mapping[str, Any] = {}
        if own:
            place = {"device": None, "devices": "1" if cards == 1 else "all"}
        return _Process(f"process {index}", place, visible(own, os.environ), self._hear)

    def _hear(self, hand: _Process, line: Line | None) -> None:
        self._told.put((hand, line))

    def free(self, waiting: int) -> Sequence[Hand]:
        """Return the processes without a job; they start with their first."""
        self._give_back(waiting)
        return [hand for hand in self.hands if hand.job is None]

    def _give_back(self, waiting: int) -> None:
        """End the processes that were idle for long; kill those that do not end."""
        now = time.monotonic()
        for index, hand in enumerate(self.hands):
            if waiting or hand.job is not None or hand.pid is None:
                hand.idle_since = now
            elif now - hand.idle_since > IDLE_SECONDS:
                hand.leave()
                hand.idle_since = now
                self._leaving.append(hand)
                self.hands[index] = hand.successor()
        for hand in self._leaving:
            if now - hand.idle_since > _END_SECONDS:
                hand.kill()

    def begin(self, hand: Hand, job: BatchJob) -> None:
        """Send the job to its process."""
        assert isinstance(hand, _Process)
        hand.job, hand.told_to_stop = job, None
        hand.send({"job": job.to_dict()})

    def wait(self, seconds: float) -> list[tuple[BatchJob, Outcome]]:
        """Listen to the processes until a job ended, or for so long."""
        for hand in self.hands:
            if hand.job is None or self._stopped is None or not self._stopped(hand.job.number):
                continue
            if hand.told_to_stop is None:
                hand.told_to_stop = time.monotonic()
                hand.send({"stop": hand.job.number})
            elif hand.hangs():
                hand.kill()
        found: list[tuple[BatchJob, Outcome]] = []
        with contextlib.suppress(queue.Empty):
            hand, line = self._told.get(timeout=seconds)
            while True:
                found += self._heard(hand, line)
                hand, line = self._told.get_nowait()
        return found

    def _heard(self, hand: _Process, line: Line | None) -> list[tuple[BatchJob, Outcome]]:
        job = hand.job
        if line is None:
            code = hand.ended()
            if hand in self._leaving:
                self._leaving.remove(hand)
            hand.job = None
            hand.group = ""
            why = hand.trouble or f"Its process ended with code {code}."
            lost = Outcome(lost=True, kind="Lost", error=why)
            return [] if job is None else [(job, lost)]
        if job is None or line.get("number") != job.number:
            return []
        if "percent" in line:
            if self._progress is not None:
                self._progress(job.number, line["percent"])
            return []
        hand.job = None
        return [(job, Outcome(**line["outcome"]))]

    def close(self) -> None:
        """End the processes. What they had in work is on disk up to its last step."""
        for hand in self.hands:  # all before the first is waited for
            hand.leave()
        for hand in (*self.hands, *self._leaving):
            hand.ended()


class Relay(Processes):
    """Two processes that take turns at the same ``cards``: one computes while the other decodes.

    Both have all of the cards, and each another one for its home, where it encodes and decodes. As
    soon as a job's decode has begun, with its latents on disk, the other process begins the next
    job on all cards but that one, which joins when the clip is finished. A process that dies while
    it decodes costs its decode: the job goes on from its latents. Arguments as for ``Processes``.
    """

    def __init__(self, cards: int, *, seen: Sequence[int] = (), **told: Any) -> None:
        if cards < 2:
            raise InvalidRequest(
                f"devices is {cards}; 'overlap' needs two cards or more, of which one decodes "
                "while the others begin the next job.",
                field="devices",
            )
        self._cards, self._more = cards, False
        super().__init__(1, cards=cards, seen=seen, **told)
        self.hands = [self._turn(i, seen) for i in range(2)]

    def _turn(self, index: int, seen: Sequence[int]) -> _Process:
        place: Mapping[str, Any] = {}
        if seen:
            place = {"device": f"cuda:{index}", "devices": "all"}
        own = visible(seen[: self._cards], os.environ)
        return _Process(f"process {index}", place, own, self._hear)

    def free(self, waiting: int) -> Sequence[Hand]:
        """Return the process whose turn it is, once no other computes."""
        self._give_back(waiting)
        self._more = waiting > 1
        if any(hand.job is not None and not hand.decoding for hand in self.hands):
            return ()
        return [hand for hand in self.hands if hand.job is None][:1]

    def begin(self, hand: Hand, job: BatchJob) -> None:
        """Send the job to its process, with the cards that are still to come."""
        assert isinstance(hand, _Process)
        others = [other for other in self.hands if other is not hand]
        held = [other.home for other in others if other.job is not None]
        hand.job, hand.told_to_stop, hand.decoding = job, None, False
        hand.send({"job": job.to_dict(), "held": held})
        for other in others:
            if other.pid is None and self._more:
                other.send({})  # it starts meanwhile

    def _heard(self, hand: _Process, line: Line | None) -> list[tuple[BatchJob, Outcome]]:
        if line is not None and "decoding" in line:
            hand.decoding = hand.job is not None and line["number"] == hand.job.number
            return []
        had = hand.job is not None
        found = super()._heard(hand, line)
        if had and hand.job is None:
            hand.decoding = False
            for other in self.hands:
                if other is not hand and other.job is not None:
                    other.send({"joined": hand.home})
        return found


def processes_for(at_once: str, optimization: Mapping[str, Any], **told: Any) -> Processes:
    """Return a crew for this host: ``at_once`` is a number, or "all" for as many as fit its cards.

    With "overlap" one job after the other has the cards, and the next begins while one is decoded.
    ``optimization`` says with ``devices`` how many cards a job has, and with ``device`` "cpu" that
    none is used. Raises InvalidRequest for numbers that do not go together.
    """
    from ..memory import all_cards

    cpu = str(optimization.get("device") or "").startswith("cpu")
    cards = () if cpu else all_cards()
    if at_once == "overlap":
        devices = str(optimization.get("devices", "all"))
        own = len(cards) if devices == "all" and not cpu else _number(devices, "devices")
        return Relay(own, seen=range(len(cards)), **told)
    count = None if at_once == "all" else _number(at_once, "at_once")
    if count == 1:  # the one job has this host as it is, and its plan chooses
        return Processes(1, **told)
    each = _number(str(optimization.get("devices", "1")), "devices")
    count = max(1, len(cards) // each) if count is None else count
    return Processes(count, cards=each, seen=range(len(cards)), **told)


def check_at_once(at_once: str | None) -> None:
    """Raise InvalidRequest for what says no number of jobs, before any job is looked at."""
    if at_once not in (None, "all", "overlap"):
        _number(at_once, "at_once")


def _number(text: str, name: str) -> int:
    digits = text.isascii() and text.isdigit() and len(text) < 10
    if not (digits and 1 <= int(text) <= _MOST_AT_ONCE):
        raise InvalidRequest(
            f"{name} is {text[:20]!r}; with several jobs at once a number from 1 to "
            f"{_MOST_AT_ONCE} is needed{', or all, or overlap' if name == 'at_once' else ''}.",
            field=name,
        )
    return int(text)


def visible(cards: Sequence[int], given: Mapping[str, str]) -> dict[str, str]:
    """Return what of the environment lets a process see these cards alone, in their order.

    ``cards`` are counted among those that ``given``, this process' environment, shows it.
    """
    if not cards:
        return {}
    name = next((one for one in _VISIBLE if given.get(one)), _VISIBLE[-1])
    seen = [one.strip() for one in given.get(name, "").split(",") if one.strip()]
    return {name: ",".join(seen[card] if seen else str(card) for card in cards)}


def _listen(
    stream: IO[bytes], inbox: queue.Queue[tuple[BatchJob, bool]], unwanted: set[int],
    cards: tuple[Callable[[Sequence[str]], None], Callable[[str], None]],
) -> None:  # fmt: skip
    """Hand on what the driver says; ``cards`` hold some, and let one join. Ends with the driver."""
    hold_cards, join_card = cards
    try:
        for text in stream:
            if not text.endswith(b"\n"):
                break  # the driver was killed in the middle of a line
            line = json.loads(text)
            if "job" in line:
                # Here, in the order of the lines: a card may join before the job has begun.
                hold_cards(line.get("held", ()))
                inbox.put((BatchJob.from_dict(line["job"]), "held" in line))
            elif "joined" in line:
                join_card(line["joined"])
            elif "stop" in line:
                unwanted.add(line["stop"])
        os._exit(0)  # the driver is gone, however: the journal is whole after every step
    finally:
        os._exit(1)  # one that cannot hear would outlive its driver, and hold the card


def main() -> None:
    """Be a process of a crew: carry out the jobs that come by stdin until it closes."""
    from ..workers import hold_cards, join_card  # by no thread: it takes torch along

    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    leave_ends_to_driver()
    inbox: queue.Queue[tuple[BatchJob, bool]] = queue.Queue()
    unwanted: set[int] = set()

    given = (sys.stdin.buffer, inbox, unwanted, (hold_cards, join_card))
    threading.Thread(target=_listen, args=given, daemon=True).start()

    def answer(line: Line) -> None:
        answers.write((json.dumps(line, default=str) + "\n").encode())

    carrier = Carrier(json.loads(sys.argv[2]))
    while True:
        job, in_turn = inbox.get()
        number, last = job.number, [-1]

        def tell(percent: int, number: int = number, last: list[int] = last) -> None:
            if percent != last[0]:
                last[0] = percent
                answer({"number": number, "percent": percent})

        def stop(number: int = number) -> bool:
            return number in unwanted

        def decoding(number: int = number) -> None:
            answer({"number": number, "decoding": True})

        outcome = carrier.carry_out(job, tell, stop, decoding if in_turn else None)
        unwanted.discard(number)
        if in_turn:
            carrier.give_back()  # before the other one is told that the card is free
        answer({"number": number, "outcome": outcome.to_dict()})
