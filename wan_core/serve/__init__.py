"""Many jobs: carried out, gone on with after whatever ended them, and told of.

In: a JSON Lines file whose lines name a model, an output and fields of ``GenerationConfig``
(``Batch``), or requests over HTTP (``serve``). Out: mp4 files, and what became of each. Jobs are
carried out by this process, by several on this host (``Processes``), or by machines that Ray knows
(``Cluster``). What is done is known by what made it, what was in work goes on from its journal, and
a bad job is named and does not stop the others. Imports ``render`` and what is below; FastAPI,
uvicorn and Ray only when called. Names are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .batch import Batch
    from .carry import Carrier, Outcome
    from .cluster import Cluster
    from .crew import Crew, Here
    from .jobs import BadLine, BatchJob, base_of, read_jobs
    from .ledger import Ledger, as_page
    from .processes import Processes, Relay, processes_for
    from .server import ServerOptions, crew_for, options_of, serve

__getattr__ = lazy_names(
    __name__,
    {
        "batch": ("Batch",),
        "carry": ("Carrier", "Outcome"),
        "cluster": ("Cluster",),
        "crew": ("Crew", "Here"),
        "jobs": ("BadLine", "BatchJob", "base_of", "read_jobs"),
        "ledger": ("Ledger", "as_page"),
        "processes": ("Processes", "Relay", "processes_for"),
        "server": ("ServerOptions", "crew_for", "options_of", "serve"),
    },
)

__all__ = [
    "BadLine",
    "Batch",
    "BatchJob",
    "Carrier",
    "Cluster",
    "Crew",
    "Here",
    "Ledger",
    "Outcome",
    "Processes",
    "Relay",
    "ServerOptions",
    "as_page",
    "base_of",
    "crew_for",
    "options_of",
    "processes_for",
    "read_jobs",
    "serve",
]
