"""The queue of a server, in one SQLite file: what was accepted is never lost.

A job is accepted when its row is on the disk. Jobs that were in work when the server ended wait
again when it starts, and their journals go on. How far a job is changes many times a second and is
kept in memory only.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidRequest, OutputError
from ..files import make_folder
from .carry import MOST_LOSSES, Outcome
from .jobs import BatchJob, kept_job, kept_object

STATES = ("queued", "in_progress", "completed", "failed")
MOST_WAITING = 10_000
"""More jobs than these are refused until some are done, where the server is not told otherwise."""
PATIENCE = 600.0
"""Seconds for which a change that the disk refuses is tried again before the queue gives up."""
_KILLS = (
    f"The server died {MOST_LOSSES} times under this job, which got no further in between; it may "
    "be the cause."
)
_UNREADABLE = "What the queue holds of this job cannot be read any more. Ask for the video again."
_UNKNOWN: Mapping[str, Any] = {"kind": "Unreadable", "error": "What became of it cannot be read."}
"""An outcome that is not readable."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
_Made = TypeVar("_Made")
_VERSION = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, status TEXT NOT NULL,
    priority REAL NOT NULL, grp TEXT NOT NULL, created REAL NOT NULL, ended REAL, job TEXT NOT NULL,
    shown TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0,
    losses INTEGER NOT NULL DEFAULT 0, unwanted INTEGER NOT NULL DEFAULT 0, outcome TEXT,
    restarts INTEGER NOT NULL DEFAULT 0, reached INTEGER NOT NULL DEFAULT 0
)
"""
_LATER = ("restarts", "reached")
"""Columns that the files of an earlier version lack."""
_INDEX = "CREATE INDEX IF NOT EXISTS by_status ON jobs (status, tries, priority)"
_NEXT = """
SELECT * FROM jobs WHERE status = 'queued' AND unwanted = 0
ORDER BY tries, priority DESC, grp != ?, number LIMIT 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A job of the queue as it is now."""

    number: int
    id: str
    status: str
    created: float
    ended: float | None
    output: Path
    shown: Mapping[str, Any]
    """What its client is told of the request."""
    outcome: Mapping[str, Any]
    """The last try's ``Outcome`` as plain values; empty before the first ended."""
    percent: int
    tries: int


def new_id() -> str:
    """Return a name for a job, which nobody can guess."""
    return f"video_gen_{secrets.token_hex(16)}"


class QueueFull(InvalidRequest):
    """So many jobs wait that no more are taken."""


class Queue:
    """The jobs of one server; safe to use from several threads. Is a ``Work`` for a crew.

    ``tries`` is how often a job is tried before it is failed for good, ``most`` how many may wait.
    ``room`` says whether jobs may begin; while it says no they wait. Raises InvalidRequest for a
    file that is no queue, OutputError where it cannot be written.
    """

    def __init__(
        self, path: Path, tries: int = 2, most: int = MOST_WAITING,
        room: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        # Absolute: a machine of a cluster has another folder to begin from.
        self.path = path = path.absolute()
        self._tries, self._most, self._room = tries, most, room
        self._lock = threading.RLock()
        self._news = threading.Event()
        self._percent: dict[int, int] = {}
        self._reached: dict[int, tuple[int, int]] = {}
        self._unwanted: set[int] = set()
        self.counts: Counter[str] = Counter()
        """How many jobs ended since the server began, by how they did."""
        self.seconds = 0.0
        """Seconds of all renders that ended since."""
        self.closed = False
        self.trouble: str | None = None
        """Why a change cannot be written just now; None while all is well."""
        self._ended = threading.Event()
        try:
            make_folder(path.parent)
            self._file = sqlite3.connect(
                path, timeout=1, check_same_thread=False, isolation_level=None
            )
            self._file.row_factory = sqlite3.Row
            self._file.text_factory = lambda text: text.decode(errors="replace")
            self._begin()
            self._place = os.stat(path)
        except sqlite3.DatabaseError as err:
            if isinstance(err, sqlite3.OperationalError):
                raise OutputError(
                    f"The queue {path} cannot be used: {err}. Another server may use this folder, "
                    "or nobody may write there."
                ) from err
            raise InvalidRequest(
                f"{path} is not the queue of a server ({err}). Move it away, or name another."
            ) from err

    def _begin(self) -> None:
        """Make the table, take the file for this process alone, and take up what was in work."""
        self._file.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = FULL")
        version = self._file.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise InvalidRequest(
                f"{self.path} was made by another version of WanFit (format {version}; this one "
                f"reads {_VERSION}). Name another folder."
            )
        self._file.execute(_TABLE)
        known = {row["name"] for row in self._file.execute("PRAGMA table_info(jobs)").fetchall()}
        for name in _LATER:
            if name not in known:
                self._file.execute(f"ALTER TABLE jobs ADD COLUMN {name} INTEGER NOT NULL DEFAULT 0")
        self._file.execute(_INDEX)
        self._file.execute(f"PRAGMA user_version = {_VERSION}")
        with self._lock:
            # A kill is no loss: whoever ended the server did not mean the job. But a job under
            # which the server dies again and again may be the cause.
            self._file.execute(
                "UPDATE jobs SET status = 'queued', tries = MAX(0, tries - 1),"
                " restarts = restarts + 1 WHERE status = 'in_progress'"
            )
            last = json.dumps(Outcome(error=_KILLS, kind="Lost", final=True, lost=True).to_dict())
            self._file.execute(
                "UPDATE jobs SET status = 'failed', ended = ?, outcome = ?"
                " WHERE status = 'queued' AND restarts >= ?",
                (time.time(), last, MOST_LOSSES),
            )
            gone = self._file.execute("SELECT * FROM jobs WHERE unwanted = 1").fetchall()
        for row in gone:
            self._remove(row)

    @property
    def lost(self) -> str | None:
        """Return why what is written is kept no more: the file was removed or replaced; or None.

        SQLite goes on with a file that has no name, as if nothing had happened.
        """
        with contextlib.suppress(OSError):
            if os.path.samestat(self._place, os.stat(self.path)):
                return None
        return (
            f"The queue {self.path} was removed or replaced while the server runs. Put it back, or "
            "start the server again."
        )

    def folder_of(self, id: str) -> Path:
        """Return the folder with all that belongs to a job: input, journal and clip."""
        return self.path.parent / "jobs" / id

    def remove_folder(self, id: str) -> None:
        """Remove all files of a job."""
        shutil.rmtree(self.folder_of(id), ignore_errors=True)

    def add(self, id: str, job: BatchJob, shown: Mapping[str, Any]) -> Row:
        """Accept a job; it is on the disk when this returns.

        Raises QueueFull where too many wait, OutputError where the disk is full.
        """
        with self._lock:
            if self._queued() >= self._most:
                raise QueueFull(f"{self._most:,} jobs wait already; try again later.")
            values = (
                id, job.priority, job.group, time.time(), json.dumps(job.to_dict()),
                json.dumps(dict(shown)),
            )  # fmt: skip
            try:
                self._file.execute(
                    "INSERT INTO jobs (id, status, priority, grp, created, job, shown)"
                    " VALUES (?, 'queued', ?, ?, ?, ?, ?)",
                    values,
                )
            except sqlite3.OperationalError as err:
                raise OutputError(f"The job cannot be kept: {err}. Free some space.") from err
            row = self.get(id)
        self._news.set()
        assert row is not None
        return row

    def get(self, id: str) -> Row | None:
        """Return a job; None for one that is not there, or was deleted."""
        with self._lock, closing(self._file.cursor()) as cursor:
            cursor.execute("SELECT * FROM jobs WHERE id = ? AND unwanted = 0", (id,))
            row = cursor.fetchone()
        return None if row is None else self._row(row)

    def list(self, limit: int, after: str | None = None, newest: bool = True) -> list[Row]:
        """Return at most so many jobs, those behind ``after`` in the order of their numbers.

        Raises InvalidRequest for an ``after`` that is not there.
        """
        order, sign = ("DESC", "<") if newest else ("ASC", ">")
        with self._lock, closing(self._file.cursor()) as cursor:
            edge = 2**62 if newest else -1
            if after is not None:
                found = cursor.execute("SELECT number FROM jobs WHERE id = ?", (after,)).fetchone()
                if found is None:
                    raise InvalidRequest(
                        f"after is {after!r}; there is no such job.", field="after"
                    )
                edge = found[0]
            cursor.execute(
                f"SELECT * FROM jobs WHERE unwanted = 0 AND number {sign} ?"
                f" ORDER BY number {order} LIMIT ?",
                (edge, limit),
            )
            return [self._row(row) for row in cursor.fetchall()]

    def by_status(self) -> dict[str, int]:
        """Return how many jobs are in each state."""
        with self._lock:
            rows = self._file.execute(
                "SELECT status, COUNT(*) FROM jobs WHERE unwanted = 0 GROUP BY status"
            ).fetchall()
        return dict.fromkeys(STATES, 0) | {row[0]: row[1] for row in rows}

    def delete(self, id: str) -> bool:
        """Take a job out, with all that belongs to it; one in work stops at its next block.

        On a full disk the files of one that has ended go first, and make the room to note it.
        Raises OutputError where it cannot be written all the same.
        """
        try:
            with contextlib.suppress(sqlite3.OperationalError):
                return self._delete(id)
            row = self.get(id)
            if row is not None and row.ended is not None:
                self.remove_folder(id)
            return self._delete(id)
        except sqlite3.OperationalError as err:
            raise OutputError(f"The job cannot be taken out: {err}. Free some space.") from err

    def _delete(self, id: str) -> bool:
        with self._lock:
            row = self._file.execute(
                "SELECT * FROM jobs WHERE id = ? AND unwanted = 0", (id,)
            ).fetchone()
            if row is None:
                return False
            self._file.execute("UPDATE jobs SET unwanted = 1 WHERE id = ?", (id,))
            if row["status"] == "in_progress":
                self._unwanted.add(row["number"])
                return True
        self._remove(row)
        return True

    def _remove(self, row: sqlite3.Row) -> None:
        """Take a row that nobody wants out of the table, after its files.

        A kill between leaves no orphan. To be called without the lock: files may take long, and
        nobody who asks for another job is to wait for them.
        """
        self.remove_folder(row["id"])
        with self._lock:
            self._file.execute("DELETE FROM jobs WHERE number = ?", (row["number"],))
            self._unwanted.discard(row["number"])
            self._percent.pop(row["number"], None)

    def _row(self, row: sqlite3.Row) -> Row:
        done = row["status"] == "completed"
        job, shown, outcome = (kept_object(row[name]) for name in ("job", "shown", "outcome"))
        return Row(
            number=row["number"],
            id=row["id"],
            status=row["status"],
            created=row["created"],
            ended=row["ended"],
            output=Path(self._here(row["id"], str((job or {}).get("output")))),
            shown=shown or {},
            outcome={**(_UNKNOWN if row["outcome"] else {}), **(outcome or {})},
            percent=100 if done else self._percent.get(row["number"], 0),
            tries=row["tries"],
        )

    # -- what a crew asks -------------------------------------------------------------------------

    def waiting(self) -> int:
        """Return how many jobs could begin; none once the server ends, or without room or file."""
        return 0 if self.closed or self.lost or not self._room() else self._queued()

    def _queued(self) -> int:
        with self._lock:
            found = self._file.execute(
                "SELECT COUNT(*) FROM jobs WHERE status = 'queued' AND unwanted = 0"
            )
            return int(found.fetchone()[0])

    def take(self, group: str) -> BatchJob | None:
        """Return the next job: tried least, of the highest priority, of the open model, oldest."""
        if self.closed or self.lost or not self._room():
            return None
        return self._patiently(lambda: self._take(group))

    def _patiently(self, change: Callable[[], _Made]) -> _Made:
        """Make a change, again and again while the disk refuses it, and tell so in ``trouble``.

        Each statement is whole or not at all, so that a change may begin anew. Raises OutputError
        after ``PATIENCE``, or where the server ends meanwhile.
        """
        pause, began = _FIRST_PAUSE, time.monotonic()
        while True:
            try:
                made = change()
                self.trouble = None
                return made
            except sqlite3.OperationalError as err:
                self.trouble = f"The queue {self.path} cannot be written: {err}. Free some space."
            # Without the lock: what can be read is told meanwhile.
            if self._ended.wait(pause) or time.monotonic() - began > PATIENCE:
                raise OutputError(self.trouble)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _take(self, group: str) -> BatchJob | None:
        with self._lock:
            while True:
                row = None if self.closed else self._file.execute(_NEXT, (group,)).fetchone()
                if row is None:
                    return None
                job = kept_job(row["job"], row["number"], partial(self._here, row["id"]))
                if job is not None:
                    break
                self._set_aside(row["number"])
            # After a death it is known how far it gets, be it nowhere: whoever gets further than
            # that the next time is not the cause. The first time it was not written down.
            self._file.execute(
                "UPDATE jobs SET status = 'in_progress', tries = tries + 1,"
                " reached = MAX(reached, restarts > 0) WHERE number = ?",
                (row["number"],),
            )
            if row["restarts"]:
                self._reached[row["number"]] = (row["reached"], row["reached"])
        return job

    def _here(self, id: str, path: str) -> str:
        """Return where a file of a job lies now: the queue's folder may have been moved."""
        parent, name = os.path.split(path)
        return str(self.folder_of(id) / name) if os.path.basename(parent) == id else path

    def _set_aside(self, number: int) -> None:
        """Fail a job that cannot be read; to be called with the lock."""
        outcome = Outcome(error=_UNREADABLE, kind="Unreadable", final=True)
        self._file.execute(
            "UPDATE jobs SET status = 'failed', ended = ?, outcome = ? WHERE number = ?",
            (time.time(), json.dumps(outcome.to_dict()), number),
        )
        self.counts["failed"] += 1

    def settle(self, job: BatchJob, outcome: Outcome) -> None:
        """Note what became of a job; remove it where it was deleted while in work."""
        self._patiently(lambda: self._settle(job, outcome))

    def _settle(self, job: BatchJob, outcome: Outcome) -> None:
        with self._lock:
            row = self._file.execute(
                "SELECT * FROM jobs WHERE number = ?", (job.number,)
            ).fetchone()
            if row is None:
                return
            self._percent.pop(job.number, None)
            self._reached.pop(job.number, None)
            if not row["unwanted"]:
                self._note(job, outcome, row)
                return
        self._remove(row)
        self.counts["deleted"] += 1

    def _note(self, job: BatchJob, outcome: Outcome, row: sqlite3.Row) -> None:
        """Write what became of a job; to be called with the lock."""
        tries, losses = row["tries"] - outcome.lost, row["losses"] + outcome.lost
        status = "completed"
        if outcome.stopped:  # the server ends: as if it had not been begun
            tries, status = tries - 1, "queued"
        elif outcome.error:
            last = outcome.final or tries >= self._tries or losses >= MOST_LOSSES
            status = "failed" if last else "queued"
        ended = time.time() if status in ("completed", "failed") else None
        self._file.execute(
            "UPDATE jobs SET status = ?, tries = ?, losses = ?, ended = ?, outcome = ?,"
            " restarts = restarts + ? WHERE number = ?",
            (
                status,
                tries,
                losses,
                ended,
                json.dumps(outcome.to_dict(), default=str),
                self.closed,
                job.number,
            ),
        )
        self.counts["lost" if outcome.lost else "again" if status == "queued" else status] += 1
        self.seconds += outcome.seconds

    def progress(self, number: int, percent: int) -> None:
        """Note how far a job is.

        Of one under which a server died this is kept on the disk too: where it gets further than
        it did after the death before, it is not the cause, and its count begins again.
        """
        self._percent[number] = percent
        if number not in self._reached:
            return
        before, now = self._reached[number]
        if percent <= now:
            return
        self._reached[number] = (before, percent)
        # Best effort: a full disk is told where an outcome is to be kept.
        with contextlib.suppress(sqlite3.OperationalError), self._lock:
            self._file.execute(
                "UPDATE jobs SET reached = ?, restarts = CASE WHEN ? THEN MIN(restarts, 1)"
                " ELSE restarts END WHERE number = ?",
                (percent, before > 0, number),
            )

    def stopped(self, number: int) -> bool:
        """Return whether a job in work is not wanted any more."""
        return self.closed or number in self._unwanted

    def rest(self) -> bool:
        """Wait until a job comes; False once the server ends."""
        self._news.wait(0.5)
        self._news.clear()
        return not self.closed

    def end(self) -> None:
        """Give out no more jobs, and stop those in work; their journals stay."""
        with self._lock:
            # One that does not stop in time is in work when the file is opened again: no death.
            # Of one that does, ``_note`` takes this back.
            if not self.closed:
                with contextlib.suppress(sqlite3.Error):
                    self._file.execute(
                        "UPDATE jobs SET restarts = restarts - 1 WHERE status = 'in_progress'"
                    )
            self.closed = True
        self._ended.set()
        self._news.set()

    def close(self) -> None:
        """Close the file, when nobody uses it any more."""
        with self._lock:
            self._file.close()
