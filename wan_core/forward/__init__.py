"""How a model computes: the same bits as diffusers with fewer tensors alive.

In: a module of ``loading``. Out: a context in which its forward is another one (``lean_forward``,
``lean_decoder``), or the reason why it cannot be. Knows nothing of where weights are. Names are
resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .block import TimestepRuns
    from .transformer import lean_forward, run_together
    from .vae import lean_decoder

__getattr__ = lazy_names(
    __name__,
    {
        "block": ("TimestepRuns",),
        "transformer": ("lean_forward", "run_together"),
        "vae": ("lean_decoder",),
    },
)

__all__ = [
    "TimestepRuns",
    "lean_decoder",
    "lean_forward",
    "run_together",
]
