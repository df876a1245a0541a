"""Modulation: norms, scales, shifts and gates of a block's tokens, each token by its timestep.

Elementwise operations work on spans of tokens, so that their fp32 temporaries stay small, or, where
fused kernels give the same bits (see ``fused``), on all tokens in one pass without temporaries.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .codes import Codes, empty_codes, norms_to_codes
from .fused import Fused, layer_norm_is_plain, rows_without_gaps, triton_kernels

_WIDE = torch.float32
Span = tuple[slice, int]
"""A slice of tokens, and the index of the run of equal timesteps that it lies in."""


class TimestepRuns(NamedTuple):
    """Per-token timestep embeddings, stored once per run of tokens with equal timesteps.

    ``values`` is (B, n, parts, dim); ``starts`` is the first token of each of the n runs.
    """

    values: Tensor
    starts: tuple[int, ...]


class Modulation:
    """The tokens' shift, scale and gate: a table (1, parts, dim) plus the timestep embedding.

    ``temb`` is (B, parts, dim), TimestepRuns, or (B, L, parts, dim). ``upcast`` converts it to
    fp32 before the table is added.
    """

    def __init__(
        self,
        table: Tensor,
        temb: Tensor | TimestepRuns,
        length: int,
        rows: int,
        upcast: bool,
        fused: Fused,
    ) -> None:
        self._table, self._upcast = table, upcast
        self._per_token: Tensor | None = None
        starts: tuple[int, ...] = (0,)
        if isinstance(temb, TimestepRuns):
            starts = temb.starts
            self._values = table.unsqueeze(1) + self._cast(temb.values)
        elif temb.ndim == 4:
            self._per_token = temb
        else:
            self._values = (table + self._cast(temb)).unsqueeze(1)
        self.spans = spans_of(starts, length, rows)
        self.runs: list[Span] = [
            (slice(a, b), run) for run, (a, b) in enumerate(pairwise((*starts, length)))
        ]
        # In a narrower dtype the sum with the table would be rounded, which kernels do not do.
        wide = upcast or (table if self._per_token is not None else self._values).dtype == _WIDE
        self._fused = fused.norms and wide

    def _cast(self, temb: Tensor) -> Tensor:
        return temb.float() if self._upcast else temb

    def part(self, index: int, span: Span) -> Tensor:
        """Return one part for a span's tokens, (B, 1 or tokens, dim)."""
        # Per-token embeddings are added to the table span by span: the sum over all tokens and
        # parts, which diffusers makes, is six fp32 hidden states.
        values, table = self._sources(index, span)
        return values if table is None else table + self._cast(values)

    def _sources(self, index: int, span: Span) -> tuple[Tensor, Tensor | None]:
        """Return a part for a span's tokens, and the table (dim) that is to be added, if any."""
        if self._per_token is not None:
            return self._per_token[:, span[0], index], self._table[0, index]
        return self._values[:, span[1] : span[1] + 1, index], None

    def normed(
        self, norm: nn.Module, hidden: Tensor, shift: int, span: Span, out: Tensor | None = None
    ) -> Tensor:
        """Return ``norm(hidden) * (1 + scale) + shift`` for the tokens of a span.

        ``shift`` is the index of the shift among the parts; the scale is the part after it. The
        result is computed in fp32 and rounded once, into ``out`` if it is given.
        """
        rows = hidden[:, span[0]]
        if self._can_fuse(norm, rows, rows if out is None else out):
            out = torch.empty_like(rows) if out is None else out
            self._fused_norm(norm, rows, out, shift, span)
            return out
        wide: Tensor = norm(rows.float())
        wide.mul_(1 + self.part(shift + 1, span))
        if out is None:
            out = wide if wide.dtype == rows.dtype else torch.empty_like(rows)
        return torch.add(wide, self.part(shift, span), out=out)

    def all_normed(self, norm: nn.Module, hidden: Tensor, shift: int) -> Tensor:
        """Return :meth:`normed` of all tokens."""
        out = torch.empty_like(hidden)
        for span in self.runs if self._can_fuse(norm, hidden, out) else self.spans:
            self.normed(norm, hidden, shift, span, out[:, span[0]])
        return out

    def all_normed_as(
        self, kind: torch.dtype | None, norm: nn.Module, hidden: Tensor, shift: int
    ) -> Tensor | Codes:
        """Return :meth:`all_normed`, in 8 bit where a ``kind`` is given and a kernel can do it."""
        if kind is not None and self._can_code(norm, hidden, kind):
            return self._coded(norm, hidden, kind, shift)
        return self.all_normed(norm, hidden, shift)

    def add_gated(self, hidden: Tensor, change: Tensor, gate: int, span: Span) -> None:
        """Add ``change`` times its gate to the span of ``hidden``, in place, computed in fp32.

        ``change`` holds the span's tokens only; ``gate`` is the index of the gate among the parts.
        """
        rows = hidden[:, span[0]]
        if self._fused and _alike(rows, change):
            triton_kernels().add_rows(rows, change, self._sources(gate, span))
        else:
            rows.add_(change * self.part(gate, span))

    def add_all_gated(self, hidden: Tensor, change: Tensor, gate: int) -> None:
        """Do :meth:`add_gated` for all tokens; ``change`` is (B, L, dim)."""
        for span in self.runs if self._fused and _alike(hidden, change) else self.spans:
            self.add_gated(hidden, change[:, span[0]], gate, span)

    def add_and_norm(
        self, hidden: Tensor, change: Tensor, gate: int | None, norm: nn.Module, shift: int | None
    ) -> Tensor:
        """Add ``change`` to ``hidden``, in place, and return the norm of the sum, for all tokens.

        ``change`` is overwritten by the result where it is of the same kind. ``gate`` and ``shift``
        are indices among the parts; without a gate the change is added as it is, in its dtype, and
        without a shift the norm is not modulated.
        """
        out = change if _alike(hidden, change) else torch.empty_like(hidden)
        if out is change and self._can_fuse(norm, hidden, change):
            for span in self.runs:
                rows = hidden[:, span[0]], out[:, span[0]]
                self._fused_norm(norm, *rows, shift, span, rows[1], gate)
            return out
        if gate is None:
            hidden.add_(change)
        else:
            self.add_all_gated(hidden, change, gate)
        for span in self.spans:
            if shift is None:
                out[:, span[0]] = norm(hidden[:, span[0]].float())
            else:
                self.normed(norm, hidden, shift, span, out[:, span[0]])
        return out

    def add_and_norm_as(
        self, kind: torch.dtype | None, hidden: Tensor, change: Tensor, gate: int | None,
        norm: nn.Module, shift: int | None,
    ) -> Tensor | Codes:  # fmt: skip
        """Do :meth:`add_and_norm`, with the norm in 8 bit as in :meth:`all_normed_as`."""
        if kind is not None and _alike(hidden, change) and self._can_code(norm, hidden, kind):
            return self._coded(norm, hidden, kind, shift, change, gate)
        return self.add_and_norm(hidden, change, gate, norm, shift)

    def _can_fuse(self, norm: nn.Module, hidden: Tensor, out: Tensor) -> bool:
        return self._fused and _alike(hidden, out) and layer_norm_is_plain(norm, hidden)

    def _can_code(self, norm: nn.Module, hidden: Tensor, kind: torch.dtype) -> bool:
        per_token = self._per_token is not None
        return self._can_fuse(norm, hidden, hidden) and norms_to_codes(hidden, kind, per_token)

    def _fused_norm(
        self, norm: Any, rows: Tensor, out: Tensor, shift: int | None, span: Span,
        change: Tensor | None = None, gate: int | None = None,
    ) -> None:  # fmt: skip
        parts = self._parts(norm, shift, span, gate)
        triton_kernels().norm_rows(rows, out, norm.eps, change=change, **parts)

    def _coded(
        self, norm: Any, hidden: Tensor, kind: torch.dtype, shift: int | None,
        change: Tensor | None = None, gate: int | None = None,
    ) -> Codes:  # fmt: skip
        codes = empty_codes(hidden, kind)
        numbers, scales = codes.numbers.view(hidden.shape), codes.scales.view(hidden.shape[:2])
        for span in self.runs:
            rows = span[0]
            triton_kernels().norm_codes(
                hidden[:, rows], numbers[:, rows], scales[:, rows], norm.eps,
                change=None if change is None else change[:, rows],
                **self._parts(norm, shift, span, gate),
            )  # fmt: skip
        return codes

    def _parts(self, norm: Any, shift: int | None, span: Span, gate: int | None) -> dict[str, Any]:
        """Return what a fused norm reads besides the tokens."""
        return {
            "gate": None if gate is None else self._sources(gate, span),
            "shift": None if shift is None else self._sources(shift, span),
            "scale": None if shift is None else self._sources(shift + 1, span),
            "affine": None if norm.weight is None else (norm.weight, norm.bias),
        }


def spans_of(starts: tuple[int, ...], length: int, rows: int) -> list[Span]:
    """Divide ``length`` tokens into spans of at most ``rows``, none across two runs.

    ``starts`` are the first tokens of the runs.
    """
    spans: list[Span] = []
    for run, (begin, end) in enumerate(pairwise((*starts, length))):
        # Spans of equal size: a short last span could select another GEMM kernel, which rounds
        # differently.
        pieces = max(1, -(-(end - begin) // rows))
        edges = [begin + (end - begin) * i // pieces for i in range(pieces + 1)]
        spans += [(slice(a, b), run) for a, b in pairwise(edges)]
    return spans


def _alike(hidden: Tensor, other: Tensor) -> bool:
    """Say whether a kernel can read both: (B, L, dim), one dtype, tokens without gaps."""
    if hidden.shape != other.shape or hidden.dtype != other.dtype:
        return False
    return rows_without_gaps(hidden) and rows_without_gaps(other)
