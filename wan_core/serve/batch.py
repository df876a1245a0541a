"""Carries out the jobs of a file: mistakes first, then one model after the other.

Every job is checked from headers before the first one runs. Jobs of a higher priority come first;
within one priority those that share a model run together, in the order of their lines. What may go
better another time is tried again after the others; what cannot is set aside at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import VideoGenerationResult
from ..errors import (
    DoesNotFit,
    InvalidRequest,
    MissingDependency,
    ModelFileError,
    ModelMismatch,
    UnsupportedModel,
    WanError,
)
from ..files import atomic_write
from ..render import WanPipelineLoader
from .jobs import BadLine, BatchJob, read_jobs
from .ledger import Entry, Ledger
from .page import as_page

_FINAL = (
    InvalidRequest, DoesNotFit, MissingDependency, ModelFileError, ModelMismatch, UnsupportedModel,
)  # fmt: skip
"""Errors that the same job on the same machine would meet again."""


def _silent(_: str) -> None:
    return None


class Batch:
    """The jobs of one file. ``run`` makes what is not there yet, and may be called again.

    ``folder`` is where the clips, the summary (``<name>.summary.json``) and the page
    (``<name>.html``) go. ``tell`` is called with a line for everything that happens.
    """

    def __init__(
        self, path: Path, folder: Path, *, model: Path | None = None, tries: int = 2,
        optimization: Mapping[str, Any] | None = None, tell: Callable[[str], object] = _silent,
    ) -> None:  # fmt: skip
        if tries < 1:
            raise InvalidRequest(f"tries is {tries}; 1 or more are needed.", field="tries")
        self.path, self.folder, self.tries, self._tell = path, folder, tries, tell
        self._model, self._optimization = model, dict(optimization or {})
        folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(folder / f"{path.stem}.summary.json")
        self._loader = WanPipelineLoader()
        self._wrapper: tuple[str, Any] = ("", None)

    def run(self) -> Ledger:
        """Carry out what is to be done; return what became of every line.

        Raises MissingFile or InvalidRequest where the file of jobs itself cannot be used, and
        whatever interrupts it. What was done is in the summary on disk in any case.
        """
        # Until all lines are known nothing is written: the summary there tells what is done.
        waiting = in_order(self._checked())
        try:
            self.ledger.write()
            last = self.tries
            for attempt in range(1, last + 1):
                waiting = [job for job in waiting if not self._try(job, attempt == last)]
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
                done = self.ledger.finished(entry.identity, job.output)
                if done is None:
                    self._open(job).check(job.config())
            except (WanError, OSError) as err:
                self._set_aside(entry, err)
                continue
            if done is not None:
                done.line = job.number
                self.ledger.put(done)
                self._tell(f"line {job.number}: {job.output.name} is there already")
                continue
            waiting.append(job)
        return waiting

    def _open(self, job: BatchJob) -> Any:
        """Return the model of a job; the last one that was opened is kept."""
        from ..detect import parse_lora

        if self._wrapper[0] != job.group:
            wrapper = self._loader.load_wan_pipeline(
                job.model,
                optimization_config=job.optimization,
                loras=[parse_lora(text) for text in job.loras],
                use_recipe=job.use_recipe,
            )
            self._wrapper = (job.group, wrapper)
        return self._wrapper[1]

    def _try(self, job: BatchJob, last: bool) -> bool:
        """Run a job; say whether it is settled, one way or the other."""
        entry = self.ledger.entries[job.number]
        entry.tries += 1
        self._tell(f"line {job.number}: {job.output.name}, try {entry.tries}")
        began = time.perf_counter()
        error: BaseException | None = None
        try:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            result = self._open(job).generate(job.config())
        except (WanError, OSError) as err:
            error = err
        else:
            error = self._made(entry, job, result)
        entry.seconds = round(time.perf_counter() - began, 3)
        if error is None:
            self._tell(f"line {job.number}: done in {entry.seconds:.0f} s")
        elif last or isinstance(error, _FINAL):
            self._set_aside(entry, error)
        else:
            entry.error = str(error)
            self._tell(f"line {job.number}: {error} It is tried again after the others.")
            self.ledger.write()
            return False
        self.ledger.write()
        return True

    def _made(
        self, entry: Entry, job: BatchJob, result: VideoGenerationResult
    ) -> BaseException | None:
        """Note what a run gave; return what went wrong in it."""
        entry.warnings = list(result.warnings)
        entry.seed = result.metadata.get("seed", entry.seed)
        entry.prompt = str(result.metadata.get("prompt") or entry.prompt)
        if result.error is not None:
            return result.error
        try:
            entry.size = job.output.stat().st_size
        except OSError as err:
            return err
        entry.state, entry.error = "done", ""
        return None

    def _set_aside(self, entry: Entry, error: BaseException) -> None:
        entry.state, entry.error = "failed", str(error) or type(error).__name__
        self._tell(f"line {entry.line}: set aside: {entry.error}")

    def _finish(self) -> None:
        self.ledger.write()
        rows = [self.ledger.entries[line] for line in sorted(self.ledger.entries)]
        atomic_write(
            self.folder / f"{self.path.stem}.html", as_page(self.path.stem, rows, self.folder)
        )


def in_order(jobs: list[BatchJob]) -> list[BatchJob]:
    """Return jobs by priority, and within one priority by model, each in the order of lines."""
    first: dict[tuple[float, str], int] = {}
    for job in jobs:
        first.setdefault((job.priority, job.group), job.number)
    return sorted(jobs, key=lambda job: (-job.priority, first[job.priority, job.group], job.number))


def _entry_of(job: BatchJob) -> Entry:
    text = job.values.get("prompt") or job.values.get("prompts") or ""
    return Entry(
        line=job.number, output=str(job.output), prompt=str(text), seed=job.values.get("seed", 0)
    )
