"""The workers of one host: who computes which unit, and what happens when one dies or hangs.

All decisions are made in the thread that asks for a result. A unit whose gang ends goes to another;
one that ended three gangs is given up. Running out of memory is the driver's matter: all workers
give back what they hold, and the error goes to the caller, which makes a smaller plan.

A gang of several computes a unit cut along its tokens where that is known to keep the bits, or may
change them. Where it is not known, the first unit is computed both ways, and the whole one counts.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NoWorkers, WorkerFailed, first_line
from ..journal import code_digest, versions
from ..memory import CardRecords, Trial
from ..sampling import Conditions, Kept, Made, Unit
from .child import conditions_message
from .gang import Gang, Rank, name_of, unheld
from .jobs import Chosen, Cuts, Job, Strips
from .messages import Message
from .process import End, WorkerProcess
from .weights import Weights

_TICK = 0.05
_RELEASE_SECONDS = 15.0
"""How long workers may take to give back their memory, a block of the model included. Assumed."""
_TRIES = 3

Loaded = Callable[[str, int, int], object]


class WorkerPool:
    """Workers on ``devices``; a device that is named twice gets two. They start with the pool.

    ``gang`` of them at a time, in their order, compute a unit together; what is left over is not
    used. To be used by one thread at a time. ``quiet_seconds`` says how long a gang may say nothing
    in the middle of a unit; None takes what its own pace suggests.
    """

    def __init__(
        self, devices: Sequence[str], gang: int = 1, *, quiet_seconds: float | None = None
    ) -> None:
        self.devices, self.gang = tuple(devices), gang
        self.notes: list[str] = []
        """What happened to workers, in words, for the result's warnings."""
        self.loaded: Loaded = lambda *_: None
        self.quiet_seconds = quiet_seconds
        self.user: object | None = None
        """The render that has them, and whether they may be kept after it."""
        self.wanted = True
        self.held: list[str] = []
        """Cards that another program still uses; their workers get nothing until they are out."""
        self._cuts, self._chosen = Cuts(CardRecords()), Chosen()
        self._events: queue.Queue[tuple[WorkerProcess, Message | None]] = queue.Queue()
        self._gangs: list[Gang] = []
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[int] = deque()
        self._next = 0
        self._conditions: tuple[int, Conditions | None] = (0, None)
        self._restarts = 2 * len(self.devices)
        self._closed, self._fresh = False, True
        self._done, self._fallen = 0, set[str]()
        """Units that were finished in this render, and names of gangs that have ended in it."""
        self._strips: tuple[int, Strips | None] = (-1, None)
        """The decode that is shared out among workers, and its number."""
        self._stillborn: set[str] = set()
        """Names of gangs of which the last one has ended before it could be given a unit."""
        for first in range(0, len(self.devices) - gang + 1, gang):
            together = self.devices[first : first + gang]
            self._start(together, name_of(together, first + 1))

    # -- what a render asks -------------------------------------------------------------------

    def send(
        self, unit: Unit, weights: Weights, conditions: Conditions, kept: Kept | None = None
    ) -> int:
        """Ask for a unit without waiting for it; return its number. ``kept`` as ``Elsewhere``'s."""
        if self._conditions[1] is not conditions:
            self._conditions = (self._conditions[0] + 1, conditions)
        self._next += 1
        job = self._jobs[self._next] = Job(unit, weights, self._conditions[0], kept)
        if kept is not None:
            job.name = kept.name(unit)
            job.result = kept.find(job.name)
        if job.result is None:
            self._waiting.append(self._next)
        self._dispatch()
        return self._next

    def result(self, number: int, check: Callable[[], object]) -> Made:
        """Wait for a unit. ``check`` is called meanwhile, several times a second.

        Raises torch.OutOfMemoryError or MemoryError where a worker ran out of memory, NoWorkers
        where none is left or none could finish a unit, and WorkerFailed where a unit cannot be
        computed; all workers are then free of their weights.
        """
        while (job := self._jobs[number]).result is None:
            self._require_one()
            self._pump(_TICK)
            check()
        del self._jobs[number]
        return job.result

    def free_ranks(self, count: int) -> list[Rank]:
        """Return ``count`` workers that could decode a strip each now; fewer where they are not."""
        ours = unheld(self._gangs, self.held)
        return [rank for gang in ours if gang.idle for rank in gang.ranks][:count]

    def begin_strips(self, decoder: Strips, ranks: Sequence[Rank]) -> int:
        """Have ``decoder`` told of what these workers say; return the number of its decode."""
        self._next += 1
        self._strips = self._next, decoder
        self.join_strips(ranks)
        return self._next

    def join_strips(self, ranks: Sequence[Rank]) -> None:
        """Have more workers, which are free, take part in the decode that runs."""
        number, decoder = self._strips
        assert decoder is not None
        for gang in self._gangs:
            if own := [rank for rank in gang.ranks if rank in ranks]:
                gang.begins(number, ("strips", *decoder.kind), own)

    def end_strips(self, number: int) -> None:
        """End a decode: what still runs of it is not wanted any more."""
        self._strips = (-1, None)
        for gang in self._gangs:
            if gang.unit == number:
                gang.send({"type": "cancel", "numbers": [number]})

    def know(self, rank: Rank, weights: Weights) -> None:
        """Send a worker what it does not know yet of weights."""
        if weights.key not in rank.weights:
            rank.weights.add(weights.key)
            plain = {"type": "weights", "key": weights.key, "weights": weights.plain()}
            rank.process.send(plain)

    def wait(self, seconds: float) -> None:
        """Look after the workers, so long at most where none says anything.

        Raises NoWorkers where none is left.
        """
        self._pump(seconds)

    def forget(self) -> None:
        """Give up every unit whose result has not been taken; workers stop at the next block."""
        self._waiting.clear()
        for gang in self._gangs:
            if gang.unit is not None:
                gang.send({"type": "cancel", "numbers": [gang.unit]})
        self._jobs.clear()

    def release(self, *, everything: bool = False) -> None:
        """Have all workers take their weights off their devices, and wait until they have.

        With ``everything`` they also forget the modules and conditions they hold. A worker that
        does not answer is ended, with its gang.
        """
        self.forget()
        waited = [gang for gang in self._gangs if gang.ready]
        for gang in waited:
            gang.send({"type": "release", "everything": everything})
            for rank in gang.ranks:
                rank.released = False
                rank.conditions = -1 if everything else rank.conditions
        if everything:
            self._conditions = (self._conditions[0] + 1, None)
        end = time.perf_counter() + _RELEASE_SECONDS

        def late() -> list[Gang]:
            return [g for g in self._gangs if g in waited and not all(r.released for r in g.ranks)]

        while late():
            self._pump(_TICK)
            if time.perf_counter() > end:
                for gang in late():
                    self._lose(gang, "did not give back its memory")

    def describe(self) -> list[dict[str, Any]]:
        """Return what each worker has done: device, name, units, seconds and peak bytes.

        Of a gang of several also its name, and how many of its units were cut.
        """
        return [one for gang in self._gangs for one in gang.describe()]

    @property
    def pids(self) -> list[int]:
        """Return the numbers of the workers' processes."""
        return [rank.process.pid for gang in self._gangs for rank in gang.ranks]

    @property
    def usable(self) -> bool:
        """Whether all its workers are there."""
        return not self._closed and len(self._gangs) == len(self.devices) // self.gang

    def begin(self, loaded: Loaded) -> None:
        """Begin a render: what is counted and said is its own, and so are the new starts.

        ``loaded`` is called with what the first worker reads (component, bytes done, bytes in all).
        """
        # What happened when they were started is the first render's.
        self.notes, self.loaded = self.notes if self._fresh else [], loaded
        self._fresh = False
        self._restarts = 2 * len(self.devices)
        self._cuts.begin()
        self._chosen.begin()
        self._done = 0
        self._fallen.clear()
        for gang in self._gangs:
            gang.begins_render()

    def close(self) -> None:
        """End all workers."""
        self._closed = True
        self.forget()
        gangs, self._gangs = self._gangs, []
        for gang in gangs:
            gang.send({"type": "stop"})
        for gang in gangs:
            gang.stop()

    # -- how the work goes on -----------------------------------------------------------------

    def _start(self, devices: Sequence[str], name: str) -> None:
        put = self._events.put
        try:
            found = Gang(devices, name, lambda which, message: put((which, message)))
        except OSError as err:  # no process, no memory or no file is left for it
            self._say(f"{name} cannot be started: {first_line(err)}.")
        else:
            self._gangs.append(found)

    def _pump(self, seconds: float) -> None:
        """Wait so long for something to happen; look after the workers and hand out units."""
        with contextlib.suppress(queue.Empty):
            self._hear(*self._events.get(timeout=seconds))
            while not self._events.empty():
                self._hear(*self._events.get())
        for gang in list(self._gangs):
            if (why := gang.trouble(self.quiet_seconds)) is not None:
                self._lose(gang, why)
        self._dispatch()

    def _hear(self, process: WorkerProcess, message: Message | None) -> None:
        found = [(g, rank) for g in self._gangs if (rank := g.of(process)) is not None]
        if not found:
            return  # one that was ended
        gang, rank = found[0]
        if message is None:
            self._end_of(gang, rank)
            return
        gang.hears()
        header, tensors = message
        kind = header["type"]
        if kind == "hello":
            self._greet(gang, rank, header)
        elif kind == "joined":
            self._joined(gang, rank, header)
        elif kind == "loaded":
            if rank is self._gangs[0].ranks[0]:
                self.loaded(header["component"], header["done"], header["total"])
        elif kind == "note":
            self._say(header["text"])
        elif kind in ("choose", "chose"):
            self._chosen.hears(rank, header)
        elif kind == "released":
            rank.released = True
        elif kind in ("mapped", "strip"):
            self._hear_of_strip(gang, rank, header)
        elif kind in ("done", "cancelled", "failed") and rank.busy:
            if header.get("strip"):
                self._hear_of_strip(gang, rank, header)
            else:
                self._answer(gang, rank, header, tensors)

    def _hear_of_strip(self, gang: Gang, rank: Rank, header: dict[str, Any]) -> None:
        number, decoder = self._strips
        if header["type"] in ("done", "cancelled", "failed"):
            gang.answered(rank)
        if header["type"] == "done":
            gang.kinds.add(gang.kind)
            rank.decode_peak_bytes = max(rank.decode_peak_bytes, header["peak_bytes"])
        if decoder is not None and header["number"] == number:
            decoder.hears(rank, header)

    def _joined(self, gang: Gang, rank: Rank, header: dict[str, Any]) -> None:
        """Note that a process has met the others of its gang, and how fast they exchange."""
        rank.joined = True
        if gang.ready:
            self._stillborn.discard(gang.name)
        if not self._cuts.hears_link(header["link"]):
            self._say(
                f"How fast {gang.name} exchange could not be measured ({header['why']}): plans go "
                "on with the assumed rate."
            )

    def _end_of(self, gang: Gang, rank: Rank) -> None:
        """Lose a gang of which a process has ended, or raise that it ran out of memory."""
        end = rank.process.end()
        of = "" if gang.size == 1 else rank.process.device
        told = ": ".join(filter(None, (of, str(end))))
        why = f"has ended ({told})" if told else "has ended"
        # A plan that needs less may be carried out. One that starts has nothing of ours yet.
        if gang.ready and gang.unit in self._jobs and end.out_of_memory:
            self._replace(gang)
            self._say(f"{gang.name} {why}.")
            with contextlib.suppress(WorkerFailed):
                self.release()
            text = f"{end} (on {gang.name})"
            raise MemoryError(text) if end.out_of_ram else torch.OutOfMemoryError(text)
        self._lose(gang, why, end)

    def _answer(
        self, gang: Gang, rank: Rank, header: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        """Hear what became of a unit in one process of its gang."""
        number, kind = header["number"], header["type"]
        free = gang.answered(rank)
        if kind == "done":
            self._take(gang, rank, header, tensors)
        elif kind == "failed" and header["why"] == "gang":
            gang.broken = gang.broken or (time.perf_counter(), header["text"])
            gang.unit, rank.busy = number, True  # until it is known which of them has failed
        elif kind == "failed" and header["why"] == "device":
            gang.unit = number  # its process can compute nothing more
            text = f"{header['text']} on {rank.process.device}"
            self._lose(gang, f"has failed ({text})", End(words=text))
            return
        elif kind == "failed" and header["why"] == "uncut":
            self._cuts.uncut.add(header["weights"])
        elif kind == "failed" and number in self._jobs:
            self._fail(gang, rank, header)
        job = self._jobs.get(number)
        if free and kind != "done" and job is not None and job.result is None:
            self._waiting.appendleft(number)  # it could not be cut

    def _greet(self, gang: Gang, rank: Rank, header: dict[str, Any]) -> None:
        """Compare versions and devices before the first unit: other ones give other bits."""
        own = {**versions(), "sources": code_digest()[:12]}
        its = {**header["versions"], "sources": header["code"]}
        others = [f"{k} {v} (here {own.get(k)})" for k, v in its.items() if own.get(k) != v]
        where = gang.name if gang.size == 1 else f"{rank.process.device} of {gang.name}"
        rank.device_name = header["device_name"]
        first = self._gangs[0].ranks[0].device_name or rank.device_name
        if others:
            self.close()
            raise WorkerFailed(
                f"The worker on {where} has other versions: {', '.join(others)}. Start it from the "
                "same environment, or this program anew where its files were changed meanwhile."
            )
        if rank.device_name != first:
            self._say(
                f"{where} is a {rank.device_name}, the first worker's a {first}: their bits may "
                "differ."
            )
        gang.started(rank)
        if gang.ready:
            self._stillborn.discard(gang.name)

    def _take(
        self, gang: Gang, rank: Rank, header: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        rank.peak_bytes = max(rank.peak_bytes, header["peak_bytes"])
        rank.copied_bytes += header.get("copied_bytes", 0)
        if rank is not gang.ranks[0]:
            return
        gang.done += 1
        self._done += 1
        gang.cut += header["cut"]
        gang.seconds += header["seconds"]
        gang.kinds.add(gang.kind)
        job = self._jobs.get(header["number"])
        if job is None:
            return
        job.finish((tensors["velocity"], tensors.get("residual")))
        if "equal" in header:
            trial = Trial(header["equal"], header["error"])
            self._cuts.keep_trial(job, gang.size, self._conditions[1], trial)

    def _fail(self, gang: Gang, rank: Rank, header: dict[str, Any]) -> None:
        """Raise what went wrong in a worker: it would go wrong on the others too."""
        where = gang.name if gang.size == 1 else f"{rank.process.device} of {gang.name}"
        why, text = header["why"], f"{header['text']} (on {where})"
        with contextlib.suppress(WorkerFailed):  # the first failure is the one to tell
            if header["midway"]:
                # The others wait in the middle of the unit for what this one will not send.
                self._replace(gang)
            self.release()
        if why == "oom":
            raise torch.OutOfMemoryError(text)
        if why == "host_oom":
            raise MemoryError(text)
        raise WorkerFailed(f"{header['error']}: {text}")

    def _replace(self, gang: Gang) -> None:
        """End a gang, and start another one on its devices."""
        self._end(gang)
        self._start(gang.devices, gang.name)

    def _end(self, gang: Gang) -> None:
        self._gangs.remove(gang)
        gang.kill()
        self._chosen.lose(gang.ranks)

    def _lose(self, gang: Gang, why: str, end: End | None = None) -> None:
        """End a gang; its unit goes to another, and a new one is started in its place.

        One that ends before it can be given a unit is started once more and no oftener: what it
        died of is there still.
        """
        again = self._restarts > 0 and not self._closed
        if not gang.ready:
            again = again and gang.name not in self._stillborn
            self._stillborn.add(gang.name)
        self._fallen.add(gang.name)
        self._end(gang)
        job = None if gang.unit is None else self._jobs.get(gang.unit)
        job = None if job is None or job.result is not None else job
        if self._strips[1] is not None:
            for rank in gang.ranks:
                self._strips[1].lost(rank, why)
        went = ""
        if gang.unit is not None and job is not None:
            job.lost += 1
            went = "; its unit was given to another"
            self._waiting.appendleft(gang.unit)
            if gang.cuts and job.lost > 1:
                self._cuts.uncut.add(job.weights.key)
        self._say(f"{gang.name} {why}{went}.")
        if again:
            self._restarts -= 1
            self._start(gang.devices, gang.name)
        if job is not None and job.lost >= _TRIES:
            self._give_up(job, why, end)
        self._require_one()

    def _give_up(self, job: Job, why: str, end: End | None) -> None:
        """Raise that a unit ended several workers: NoWorkers where another process may do better.

        Where others could compute theirs, or code crashed, this unit is the cause, and would take
        the driver along.
        """
        self.forget()
        all_fell = len(self._fallen) == len(self.devices) // self.gang
        if all_fell and not self._done and not (end is not None and end.crashed):
            notes = " ".join(self.notes)
            raise NoWorkers(f"Every worker ended in its first unit of work: {notes}")
        raise WorkerFailed(f"A unit of work ended {job.lost} workers; the last one {why}.")

    def _require_one(self) -> None:
        """Raise NoWorkers where no worker is left."""
        if not self._gangs:
            self.forget()
            raise NoWorkers(f"No worker is left: {' '.join(self.notes)}")

    def _say(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # -- who computes what --------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Give waiting units, in their order, to gangs that have none."""
        for gang in unheld(self._gangs, self.held):
            if not self._waiting:
                return
            if gang.idle:
                self._give(gang, self._waiting.popleft())

    def _give(self, gang: Gang, number: int) -> None:
        job = self._jobs[number]
        cut, both = self._cuts.ways(job, gang.size, self._conditions[1], self._say)
        self._cuts.keep_link(job, gang.size)
        unit, ranks = job.unit, gang.ranks if cut else gang.ranks[:1]
        header, tensors = job.message()
        header |= {"number": number, "cut": cut, "both": both}
        shape = (*unit.latents.shape, unit.residual is None)
        gang.begins(number, (job.weights.key, cut, both, *shape), ranks, cut=cut)
        for rank in ranks:
            self._tell(rank, job)
            rank.process.send(header, tensors)

    def _tell(self, rank: Rank, job: Job) -> None:
        """Send what a process does not know yet of the weights and conditions of a unit."""
        key, conditions = self._conditions
        self.know(rank, job.weights)
        if rank.conditions != job.conditions:
            assert conditions is not None and job.conditions == key
            rank.conditions = key
            rank.process.send(*conditions_message(conditions, key))
