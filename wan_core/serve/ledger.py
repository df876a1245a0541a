"""What became of each job: kept on disk after every change, so that a batch can go on.

The ledger is the batch's summary, and ``as_page`` shows it: every clip with its prompt, every
failure with its reason, without scripts. A job is done when a clip that the same job made from the
same files, and that is the file that was written then, lies in its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import InvalidRequest
from ..files import atomic_write

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; background: #16181d; color: #e8e8e8 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.5em }
figure { margin: 0 } video { width: 100%; background: #000 } figcaption { overflow-wrap: anywhere }
li { overflow-wrap: anywhere } small { color: #a0a4ab }
"""
STATES = ("waiting", "done", "failed", "bad")


@dataclass(slots=True, kw_only=True)
class Entry:
    """One line of a batch: its state, and what is known of its run."""

    line: int
    state: str = "waiting"
    identity: str = ""
    output: str = ""
    size: int = 0
    """Bytes of the finished file."""
    tries: int = 0
    losses: int = 0
    """How often the process that carried it out died."""
    seconds: float = 0.0
    error: str = ""
    resumed: str = ""
    prompt: str = ""
    seed: Any = None
    warnings: list[str] = field(default_factory=list)


class Ledger:
    """The entries of a batch by line. Every change is written at once, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[int, Entry] = {}
        self._done: dict[str, Entry] = {}
        self._read()

    def _read(self) -> None:
        """Read what an earlier run left; raises InvalidRequest for a file that is none of ours."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        try:
            rows = [Entry(**one) for one in json.loads(text)["jobs"]]
        except (ValueError, TypeError, KeyError) as err:
            raise InvalidRequest(
                f"{self.path} is not the summary of a batch ({err}). Move it away, or name another."
            ) from err
        self._done = {row.identity: row for row in rows if row.state == "done"}

    def finished(self, identity: str, output: Path) -> Entry | None:
        """Return the entry of a job that was done and whose file is still there."""
        found = self._done.get(identity)
        if found is None or found.output != str(output) or not output.is_file():
            return None
        return found if output.stat().st_size == found.size else None

    def put(self, entry: Entry) -> None:
        """Keep an entry, without writing it."""
        self.entries[entry.line] = entry

    def counts(self) -> dict[str, int]:
        """Return how many entries are in each state."""
        return {s: sum(e.state == s for e in self.entries.values()) for s in STATES}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the entries in the order of their lines."""
        rows = [asdict(self.entries[line]) for line in sorted(self.entries)]
        return {"counts": self.counts(), "jobs": rows}

    def write(self) -> None:
        """Write the summary."""
        atomic_write(self.path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())


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
    return "\n".join(parts).encode()


def _figure(row: Entry, folder: Path) -> str:
    link = quote(Path(os.path.relpath(row.output, folder)).as_posix())
    return (
        f'<figure><video src="{escape(link)}" controls loop muted preload=metadata></video>'
        f"<figcaption>{escape(row.prompt)}<br><small>line {row.line}, seed {escape(str(row.seed))},"
        f" {row.seconds:.0f} s, {escape(Path(row.output).name)}</small></figcaption></figure>"
    )
