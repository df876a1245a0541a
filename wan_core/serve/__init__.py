"""Many jobs on one host: a file with a job on each line, carried out, gone on with, and told of.

In: a JSON Lines file whose lines name a model, an output and fields of ``GenerationConfig``. Out:
mp4 files, a summary as JSON and a page that shows the clips. What is done is known by what made it,
so the same command goes on after whatever ended it. A bad line, or a job that fails, is named and
does not stop the others. Imports ``render`` and what is below. Names are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .batch import Batch
    from .jobs import BadLine, BatchJob, read_jobs
    from .ledger import Ledger
    from .page import as_page

__getattr__ = lazy_names(
    __name__,
    {
        "batch": ("Batch",),
        "jobs": ("BadLine", "BatchJob", "read_jobs"),
        "ledger": ("Ledger",),
        "page": ("as_page",),
    },
)

__all__ = ["BadLine", "Batch", "BatchJob", "Ledger", "as_page", "read_jobs"]
