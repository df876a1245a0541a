"""The summary as a page: every clip with its prompt, every failure with its reason. No scripts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from urllib.parse import quote

from .ledger import Entry

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; background: #16181d; color: #e8e8e8 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.5em }
figure { margin: 0 } video { width: 100%; background: #000 } figcaption { overflow-wrap: anywhere }
li { overflow-wrap: anywhere } small { color: #a0a4ab }
"""


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
