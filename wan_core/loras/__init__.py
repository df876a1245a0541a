"""LoRAs, DoRA, LoKr and LoHa at run time: a transformer computes with them for a ``with`` block.

In: a transformer whose weights are placed, and LoRA files that ``detect`` can match with it. Out:
``apply_loras``, inside which the layers' outputs are those of the changed weights. No weight is
changed, so that fp8 and GGUF blocks take LoRAs too, and nothing is left afterwards.
"""

from __future__ import annotations

from .apply import apply_loras

__all__ = ["apply_loras"]
