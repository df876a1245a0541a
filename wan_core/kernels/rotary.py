"""RMSNorm over all heads and rotary embedding of a query or key, in place.

Span by span, so that fp32 temporaries stay small, or, where a fused kernel gives the same bits (see
``fused``), all tokens in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused import Fused, rms_norm_is_plain, triton_kernels
from .modulation import Span

_EVERY: Span = (slice(None), 0)


def rotate_span(
    norm: Any, rows: Tensor, heads: int, span: Span, rotary: tuple[Tensor, Tensor],
    out: Tensor, fused: Fused,
) -> None:  # fmt: skip
    """Norm a span's query or key (B, r, heads * d) over all heads, rotate it, write it to ``out``.

    ``out`` may be ``rows``: the norm returns a new tensor, so nothing is read after it was
    overwritten.
    """
    tables = rotary[0][:, span[0]], rotary[1][:, span[0]]
    if _in_one_pass(norm, rows, tables, fused):
        triton_kernels().rotate_rows(rows, norm.weight, norm.eps, tables, heads)
        if out is not rows:
            out.copy_(rows)
        return
    pairs = torch.unflatten(norm(rows), -1, (heads, -1, 2))
    first, second = pairs.unbind(-1)
    cos, sin = tables[0][..., 0::2], tables[1][..., 1::2]
    turned = torch.unflatten(out, -1, (heads, -1, 2))
    turned[..., 0] = (first * cos).sub_(second * sin)
    turned[..., 1] = (first * sin).add_(second * cos)


def rotate_all(
    norm: Any, projected: Tensor, heads: int, spans: list[Span], rotary: tuple[Tensor, Tensor],
    fused: Fused,
) -> Tensor:  # fmt: skip
    """Norm a query or key (B, L, heads * d) over all heads and rotate it, in place."""
    # Only where the kernel is sure to run: eager code on all tokens at once holds two more tensors
    # of their size.
    if _in_one_pass(norm, projected, rotary, fused):
        spans = [_EVERY]
    for span in spans:
        rows = projected[:, span[0]]
        rotate_span(norm, rows, heads, span, rotary, rows, fused)
    return projected


def _in_one_pass(norm: Any, rows: Tensor, rotary: tuple[Tensor, Tensor], fused: Fused) -> bool:
    """Say whether a kernel may norm and turn these tokens: it reads ``rotary`` in fp32 only."""
    readable = all(x.dtype == torch.float32 and x.is_contiguous() for x in rotary)
    return fused.rotations and readable and rms_norm_is_plain(norm, rows)


def norm_all(norm: Any, query: Tensor, heads: int, spans: list[Span], fused: Fused) -> Tensor:
    """Norm a query (B, L, heads * d) over all heads, in place."""
    if fused.rotations and rms_norm_is_plain(norm, query):
        triton_kernels().rotate_rows(query, norm.weight, norm.eps, None, heads)
        return query
    # A norm treats each token alone, so it can overwrite the query row by row.
    for rows, _ in spans:
        query[:, rows] = norm(query[:, rows])
    return query
