"""What became of each job: kept on disk after every change, so that a batch can go on.

A change is a line at the end of ``<name>.summary.changes``; the summary is written whole when
that has grown by a part of it, so that what is written grows as the number of jobs does. The next
run reads both. The ledger is the batch's summary, and ``as_page`` shows it: every clip with its
prompt, every failure with its reason, without scripts. A job is done when a clip that the same job
made from the same files, and that is the file that was written then, lies in its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import InvalidRequest, OutputError
from ..files import atomic_write
from ..job import clip_paths

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; background: #16181d; color: #e8e8e8 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.5em }
figure { margin: 0 } video { width: 100%; background: #000 } figcaption { overflow-wrap: anywhere }
li { overflow-wrap: anywhere } small { color: #a0a4ab }
"""
_LEAST_LINES, _PART = 16, 4
"""The summary is written whole after so many changes, or after a change of each fourth entry."""
_SUMMARY_SECONDS = 60.0
"""Or where it is as old as this, for who looks at it. Assumed."""
STATES = ("waiting", "done", "failed", "bad")


@dataclass(slots=True, kw_only=True)
class Entry:
    """One line of a batch: its state, and what is known of its run."""

    line: int
    state: str = "waiting"
    identity: str = ""
    output: str = ""
    clips: int = 1
    """How many files it has with a ``batch_size``; ``output`` is the first."""
    size: int = 0
    """Bytes of the finished file."""
    tries: int = 0
    losses: int = 0
    """How often the process that carried it out died."""
    begun: bool = False
    """Whether this run carries it out itself just now."""
    deaths: int = 0
    """How often a run that carried it out itself has died meanwhile."""
    seconds: float = 0.0
    error: str = ""
    resumed: str = ""
    prompt: str = ""
    seed: Any = None
    warnings: list[str] = field(default_factory=list)


class Ledger:
    """The entries of a batch by line. What ``note`` has returned from is kept through any end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal = path.with_suffix(".changes")
        self._noted, self._written = 0, time.monotonic()
        self.entries: dict[int, Entry] = {}
        self._done: dict[str, Entry] = {}
        self._deaths: dict[str, int] = {}
        self._read()

    def _read(self) -> None:
        """Read what an earlier run left.

        Raises InvalidRequest for a file that is none of ours, OutputError for one that cannot be
        read.
        """
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return  # a journal is only ever begun beside a summary
        except OSError as err:
            raise OutputError(
                f"The summary {self.path} cannot be read: {err.strerror}. Name another --folder."
            ) from err
        try:
            read = json.loads(text)
            rows = [Entry(**one) for one in (*read["jobs"], *read.get("earlier", ()))]
            rows += self._changes()
            self._done = {row.identity: row for row in rows if row.state == "done"}
            self._deaths = {row.identity: row.deaths + row.begun for row in rows}  # the last one's
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
            raise InvalidRequest(
                f"{self.path} is not the summary of a batch ({err}). Move it away, or name another."
            ) from err

    def _changes(self) -> list[Entry]:
        """Return what was noted since the summary; of a line that a kill cut off nothing."""
        found = []
        try:
            lines = self._journal.read_bytes().split(b"\n")
        except OSError:
            return []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                found.append(Entry(**json.loads(line)))
        return found

    def finished(self, identity: str, output: Path) -> Entry | None:
        """Return the entry of a job that was done and whose file is still there."""
        found = self._done.get(identity)
        if found is None or found.output != str(output) or not output.is_file():
            return None
        return found if output.stat().st_size == found.size else None

    def deaths(self, identity: str) -> int:
        """Return how many earlier runs died while they carried this job out, one after another."""
        return self._deaths.get(identity, 0)

    def put(self, entry: Entry) -> None:
        """Keep an entry, without writing it."""
        self.entries[entry.line] = entry

    def counts(self) -> dict[str, int]:
        """Return how many entries are in each state."""
        found = Counter(entry.state for entry in self.entries.values())
        return {state: found[state] for state in STATES}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the entries in the order of their lines.

        ``earlier`` are clips of lines that the file lacks by now: where they come back, as those
        that were comments for a while, the clips are there. One whose output another line makes now
        is not the file's any more.
        """
        rows = [asdict(self.entries[line]) for line in sorted(self.entries)]
        outputs = {entry.output for entry in self.entries.values()}
        earlier = [asdict(row) for row in self._done.values() if row.output not in outputs]
        return {"counts": self.counts(), "jobs": rows, "earlier": earlier}

    def note(self, entry: Entry) -> None:
        """Keep a change of an entry on the disk; raises OutputError where it cannot be written."""
        old = time.monotonic() - self._written > _SUMMARY_SECONDS
        if old or self._noted >= max(_LEAST_LINES, len(self.entries) // _PART):
            self.write()
            return
        # Begun on a line of its own: the last one may have been cut off by a kill or a full disk.
        line = ("\n" + json.dumps(asdict(entry), default=str) + "\n").encode()
        try:
            with open(self._journal, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as err:
            if isinstance(err, FileNotFoundError):  # somebody has removed the folder
                self.write()
                return
            raise OutputError(f"{self._journal} cannot be written: {err.strerror}.") from err
        self._noted += 1

    def write(self) -> None:
        """Write the summary whole, and begin the journal anew."""
        text = json.dumps(self.to_dict(), indent=1, default=str) + "\n"
        atomic_write(self.path, text.encode())
        # Where a kill comes between, what is read twice says the same twice.
        with contextlib.suppress(OSError):
            self._journal.unlink(missing_ok=True)
        self._noted, self._written = 0, time.monotonic()


def as_page(title: str, entries: Iterable[Entry], folder: Path) -> bytes:
    """Return an HTML page for ``folder``, with the clips by relative paths."""
    rows = list(entries)
    done = [row for row in rows if row.state == "done"]
    rest = [row for row in rows if row.state != "done"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>",
        f"<p>{len(done)} of {len(rows)} clips are done.</p><main>",
        *(_figure(row, folder) for row in done),
        "</main>",
    ]
    if rest:
        items = "".join(
            f"<li>line {row.line}: {escape(row.state)} {escape(row.error)}" for row in rest
        )
        parts.append(f"<h2>Not done</h2><ul>{items}</ul>")
    # Names of files need not be text: what UTF-8 lacks is shown as "?".
    return "\n".join(parts).encode(errors="replace")


def _figure(row: Entry, folder: Path) -> str:
    places = (os.path.relpath(one, folder) for one in clip_paths(Path(row.output), row.clips))
    links = (quote(os.fsencode(Path(place).as_posix())) for place in places)
    videos = "".join(
        f'<video src="{escape(link)}" controls loop muted preload=metadata></video>'
        for link in links
    )
    return (
        f"<figure>{videos}<figcaption>{escape(row.prompt)}<br><small>line {row.line},"
        f" seed {escape(str(row.seed))}, {row.seconds:.0f} s,"
        f" {escape(Path(row.output).name)}</small></figcaption></figure>"
    )
