"""Carries out the jobs of a file: mistakes first, then one model after the other.

Every job is checked from headers before the first one runs. Jobs of a higher priority come first;
within one priority those that share a model run together, in the order of their lines. What may go
better another time is tried again after the others; what cannot is set aside at once. A job whose
process died goes back into the queue, and its journal goes on. One under which this process died
twice comes after the others when the same command goes on.
"""

from __future__ import annotations

import contextlib
import heapq
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest, OutputError, WanError
from ..files import atomic_write, make_folder
from ..journal import try_lock
from ..plan import OptimizationConfig
from .carry import MOST_LOSSES, Carrier, Outcome
from .crew import Crew, Here, carry_out
from .jobs import BadLine, BatchJob, read_jobs
from .ledger import Entry, Ledger, as_page

_Kind = tuple[int, float, str]
"""(tries, priority, group) of a job that waits; a suspect counts as tried once more."""
_SUSPECT = 2
"""So many runs must have died under a job to think that it may be the cause."""


def _silent(_: str) -> None:
    return None


class Batch:
    """The jobs of one file. ``run`` makes what is not there yet, and may be called again.

    ``folder`` is where the clips, the summary (``<name>.summary.json``) and the page
    (``<name>.html``) go. ``tell`` is called with a line for everything that happens. ``crew``
    returns who carries the jobs out; without it this process does. ``plan`` False leaves out the
    question whether a job fits this machine: for a crew on others.
    """

    def __init__(
        self, path: Path, folder: Path, *, model: Path | None = None, tries: int = 2,
        optimization: Mapping[str, Any] | None = None, tell: Callable[[str], object] = _silent,
        crew: Callable[[], Crew] | None = None, plan: bool = True,
    ) -> None:  # fmt: skip
        if tries < 1:
            raise InvalidRequest(f"tries is {tries}; 1 or more are needed.", field="tries")
        OptimizationConfig.from_mapping(optimization or {})  # not to be told of each line
        self.path, self.folder, self.tries, self._tell = path, folder, tries, tell
        self._model, self._optimization = model, dict(optimization or {})
        make_folder(folder)
        self.ledger = Ledger(folder / f"{path.stem}.summary.json")
        self._carrier = Carrier()
        self._crew, self._plan = crew, plan
        self._jobs: dict[int, BatchJob] = {}
        self._waiting: dict[_Kind, list[int]] = {}
        """The lines of jobs that wait, the first in front, by what decides between them."""
        self._in_work: dict[int, str] = {}
        self._first: dict[tuple[float, str], int] = {}

    def run(self) -> Ledger:
        """Carry out what is to be done; return what became of every line.

        Raises MissingFile or InvalidRequest where the file of jobs itself cannot be used,
        OutputError where another run carries it out, and whatever interrupts it. What was done is
        in the summary on disk in any case.
        """
        with self._alone():
            return self._run()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep others from the summary, and from making each clip a second time."""
        path = self.ledger.path.with_suffix(".lock")
        try:
            lock = try_lock(path)
        except OSError as err:
            raise OutputError(
                f"{self.folder} cannot be written: {err.strerror}. Name another --folder."
            ) from err
        if lock is None:
            raise OutputError(
                f"Another run is at work on {self.path} in {self.folder}. Wait for its end, or "
                "name another --folder."
            )
        try:
            self.ledger = Ledger(self.ledger.path)  # another run may have ended meanwhile
            yield
        finally:
            # On Windows an open file cannot be removed, and the folder may have gone meanwhile.
            with lock, contextlib.suppress(OSError):
                if sys.platform != "win32":
                    path.unlink()

    def _run(self) -> Ledger:
        # Until all lines are known nothing is written: the summary there tells what is done.
        jobs = self._checked()
        self._jobs, self._waiting, self._in_work, self._first = {}, {}, {}, {}
        for job in jobs:
            self._first.setdefault((job.priority, job.group), job.number)
            self._add(job)
        try:
            self.ledger.write()
            if jobs:
                make = self._crew
                carry_out(self, Here(carrier=self._carrier) if make is None else make())
        finally:
            self._finish()
        return self.ledger

    def _checked(self) -> list[BatchJob]:
        """Read and check all lines; return the jobs that are not done yet."""
        waiting = []
        jobs = read_jobs(self.path, self.folder, self._model, self._optimization)
        for job in jobs:
            if isinstance(job, BadLine):
                self.ledger.put(Entry(line=job.number, state="bad", error=job.error))
                self._tell(f"line {job.number}: {job.error}")
                continue
            entry = _entry_of(job)
            self.ledger.put(entry)
            try:
                entry.identity = job.identity()
                entry.deaths = self.ledger.deaths(entry.identity)
                done = self.ledger.finished(entry.identity, job.output)
                if done is not None and not all(one.is_file() for one in job.outputs):
                    done = None
                if done is None:
                    self._check(job)
            except (WanError, OSError) as err:
                self._set_aside(entry, str(err) or type(err).__name__)
                continue
            if done is not None:
                done.line, done.clips = job.number, entry.clips
                self.ledger.put(done)
                self._tell(f"line {job.number}: {job.output.name} is there already")
                continue
            if entry.deaths >= _SUSPECT:
                self._tell(
                    f"line {job.number}: {entry.deaths} runs died while it was in work; it may be "
                    "the cause and comes after the others. A run with --at-once 1 outlives it."
                )
            waiting.append(job)
        return waiting

    def _check(self, job: BatchJob) -> None:
        wrapper = self._carrier.open(job)
        config = job.config(wrapper.architecture.variant.defaults)
        wrapper.check(config)
        if self._plan:
            wrapper.plan(config)

    def waiting(self) -> int:
        """Return how many jobs no hand has and none is done with."""
        return len(self._jobs)

    def _add(self, job: BatchJob) -> None:
        entry = self.ledger.entries[job.number]
        kind = entry.tries + (entry.deaths >= _SUSPECT), job.priority, job.group
        self._jobs[job.number] = job
        heapq.heappush(self._waiting.setdefault(kind, []), job.number)

    def take(self, group: str) -> BatchJob | None:
        """Return the job that comes next for a hand with the model ``group`` open.

        That is one that was tried less often, then one of a higher priority, then one of the open
        model, then one of a model that few hands have, each in the order of lines.
        """
        if not self._waiting:
            return None
        hands = Counter(self._in_work.values())

        def rank(kind: _Kind) -> tuple[float, ...]:
            tries, priority, wanted = kind
            other = wanted != group
            return tries, -priority, other, hands[wanted] * other, self._first[priority, wanted]

        kind = min(self._waiting, key=rank)
        job = self._jobs.pop(heapq.heappop(self._waiting[kind]))
        if not self._waiting[kind]:
            del self._waiting[kind]
        self._in_work[job.number] = job.group
        entry = self.ledger.entries[job.number]
        entry.tries += 1
        self._tell(f"line {job.number}: {job.output.name}, try {entry.tries}")
        if self._crew is None:  # who may take this process along is known when it is gone
            entry.begun = True
            with contextlib.suppress(OutputError):  # told when there is an outcome to keep
                self.ledger.note(entry)
        return job

    def settle(self, job: BatchJob, outcome: Outcome) -> None:
        """Note what a try gave: the clip, an error that is final, or one to try again after."""
        entry = self.ledger.entries[job.number]
        del self._in_work[job.number]
        entry.begun, entry.deaths = False, 0
        entry.seconds, entry.warnings = outcome.seconds, list(outcome.warnings)
        if outcome.lost:  # not a try: where it was is on disk
            entry.tries, entry.losses = entry.tries - 1, entry.losses + 1
        if not outcome.error:
            entry.seed, entry.size = outcome.seed, outcome.size
            entry.prompt = outcome.prompt or entry.prompt
            entry.resumed = outcome.resumed
            entry.state, entry.error = "done", ""
            self._tell(f"line {job.number}: done in {entry.seconds:.0f} s")
        elif outcome.final or entry.tries >= self.tries or entry.losses >= MOST_LOSSES:
            self._set_aside(entry, outcome.error)
        else:
            entry.error = outcome.error
            then = "goes on elsewhere" if outcome.lost else "is tried again after the others"
            self._tell(f"line {job.number}: {outcome.error} It {then}.")
            self._add(job)
        self.ledger.note(entry)

    def rest(self) -> bool:
        """A file brings no more jobs."""
        return False

    def _set_aside(self, entry: Entry, error: str) -> None:
        entry.state, entry.error = "failed", error
        self._tell(f"line {entry.line}: set aside: {entry.error}")

    def _finish(self) -> None:
        for entry in self.ledger.entries.values():
            entry.begun = False  # an end in order is no death
        self.ledger.write()
        rows = [self.ledger.entries[line] for line in sorted(self.ledger.entries)]
        atomic_write(
            self.folder / f"{self.path.stem}.html", as_page(self.path.stem, rows, self.folder)
        )


def _entry_of(job: BatchJob) -> Entry:
    text = job.values.get("prompt") or job.values.get("prompts") or ""
    return Entry(
        line=job.number, output=str(job.output), clips=len(job.outputs), prompt=str(text),
        seed=job.values.get("seed", 0),
    )  # fmt: skip
