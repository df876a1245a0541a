"""What survives a crash: a render's identity, its states on disk, and how it goes on from them.

In: a request with its plan, and a ``DenoiseState`` after each step. Out: a folder of states that
are complete or absent, and ``RenderJournal``, which a render asks where to begin; ``saved_renders``
lists those that can go on. Knows a render only by its identity and its states; a journal never
stops one. Also here are ``versions``, ``code_digest`` and ``device_name``, which results and
measurements are told with, and ``try_lock``, which keeps a folder for one process.
With its journal a render is given its outputs to itself. Imports sampling, plan, loading and what
is below. Names are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .content import code_digest
    from .identity import device_name, versions
    from .journal import Journal
    from .lock import FileLock, try_lock
    from .resume import RenderJournal, open_journal
    from .saved import SavedRender, remove_saved, saved_renders

__getattr__ = lazy_names(
    __name__,
    {
        "content": ("code_digest",),
        "identity": ("device_name", "versions"),
        "journal": ("Journal",),
        "lock": ("FileLock", "try_lock"),
        "resume": ("RenderJournal", "open_journal"),
        "saved": ("SavedRender", "remove_saved", "saved_renders"),
    },
)

__all__ = [
    "FileLock",
    "Journal",
    "RenderJournal",
    "SavedRender",
    "code_digest",
    "device_name",
    "open_journal",
    "remove_saved",
    "saved_renders",
    "try_lock",
    "versions",
]
