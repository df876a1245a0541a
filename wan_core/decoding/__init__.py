"""How a VAE decodes: the same bits as diffusers, with a few rows of a few frames alive at once.

In: a VAE built by ``loading``. Out: ``lean_decoder``, a context manager inside which the VAE's
decoder runs frame by frame and in bands of rows, its feature cache in RAM if asked, or the reason
why it cannot. What ``forward`` offers for replacing a module's own forward is used here for the
decoder. Nothing here knows on which device weights are. Names are resolved on first use, so that
importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .lean import lean_decoder

__getattr__ = lazy_names(__name__, {"lean": ("lean_decoder",)})

__all__ = ["lean_decoder"]
