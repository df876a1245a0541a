"""The pieces a block computes with: norms, rotary, attention, products, each in the quickest way.

In: tensors, and the small modules they pass through (a norm, a linear layer). Out: the numbers of
torch's own code where a way is called exact, else numbers within a bound that a trial on the device
has shown. ``fused_for`` and ``products_of`` say which ways may be used for a device, dtype and
width, ``fused_norms`` which for the norms of a VAE; ``shared_by`` has layers read the same tokens,
rounded once; ``attend`` times what it can take; ``triton_kernels`` is the Triton code, or None
where it cannot be imported. ``Trials`` remember what a device was found to do, and in
``trials_of_a_render`` those that lacked memory are made again; ``choosing_with`` has processes that
compute together take the same ways. Imports loading, for weights as they are stored.
"""

from __future__ import annotations

from .attention import attend, slid_from_cudnn, used_attention
from .fused import NOTHING, Fused, triton_kernels
from .fused_trial import fused_for
from .maps import FusedNorms, fused_duplicates, fused_norms
from .modulation import Modulation, Span, TimestepRuns
from .products import Addition, Shared, products_of, shared_by, used_products
from .rotary import norm_all, rotate_all, rotate_span
from .trials import Council, Trials, begin_trials, choosing_with, trials_of_a_render

__all__ = [
    "NOTHING",
    "Addition",
    "Council",
    "Fused",
    "FusedNorms",
    "Modulation",
    "Shared",
    "Span",
    "TimestepRuns",
    "Trials",
    "attend",
    "begin_trials",
    "choosing_with",
    "fused_duplicates",
    "fused_for",
    "fused_norms",
    "norm_all",
    "products_of",
    "rotate_all",
    "rotate_span",
    "shared_by",
    "slid_from_cudnn",
    "trials_of_a_render",
    "triton_kernels",
    "used_attention",
    "used_products",
]
