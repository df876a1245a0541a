"""LoRAs, DoRA, LoKr and LoHa at run time: a transformer computes with them for a ``with`` block.

In: a transformer whose weights are placed, and LoRA files that ``detect`` can match with it. Out:
``apply_loras``, inside which the layers' outputs are those of the changed weights. No weight is
changed, so that fp8 and GGUF blocks take LoRAs too, and nothing is left afterwards. Names are
resolved on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .apply import apply_loras

__getattr__ = lazy_names(__name__, {"apply": ("apply_loras",)})

__all__ = ["apply_loras"]
