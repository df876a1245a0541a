"""Several cards for one clip: units of work, and the processes that compute them.

In: the weights that an expert needs (``Weights``), and the units that ``sampling`` asks for. Out:
velocities with the bits of one process, and pictures decoded in strips. The driver alone holds
scheduler, noise, blend and journal; a worker that dies costs the unit it had in work. ``placed``
puts a component in its place, here and in a worker alike. Imports sampling, placing, loading,
journal's ``versions`` and what is below. Names are resolved on first use, so that torch is not
imported with the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .kept import (
        Experts,
        close_workers,
        give_back_workers,
        hold_cards,
        join_card,
        when_joined,
        worker_pool,
    )
    from .placement import placed
    from .pool import WorkerPool
    from .strips import StripsDecoder, StripsLost
    from .weights import Weights

__getattr__ = lazy_names(
    __name__,
    {
        "kept": (
            "Experts",
            "close_workers",
            "give_back_workers",
            "hold_cards",
            "join_card",
            "when_joined",
            "worker_pool",
        ),
        "placement": ("placed",),
        "pool": ("WorkerPool",),
        "strips": ("StripsDecoder", "StripsLost"),
        "weights": ("Weights",),
    },
)

__all__ = [
    "Experts",
    "StripsDecoder",
    "StripsLost",
    "Weights",
    "WorkerPool",
    "close_workers",
    "give_back_workers",
    "hold_cards",
    "join_card",
    "placed",
    "when_joined",
    "worker_pool",
]
