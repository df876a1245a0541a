"""One forward cut along its tokens over several processes (Ulysses), each with all weights.

Every process computes its part of the tokens. Only self attention lets tokens see each other: for
it the parts are exchanged so that each process has all tokens of some of the heads, and back
afterwards (DeepSpeed-Ulysses, arXiv 2309.14509). What is around the blocks (patches, conditions,
time embedding) is computed whole in each. The numbers are those of one process wherever a kernel
gives a row the same bits however many rows there are; ``workers`` tries that before it relies on
it. It is the lean forward that is cut: diffusers' own context parallel knows no VACE and leaves the
lean forward no place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import TimestepRuns


class Exchange(Protocol):
    """What the processes that share a forward have in common: their number, and how they talk."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""

    @property
    def size(self) -> int:
        """How many they are."""

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Give ``parts[i]`` to process i, and return what they gave, (size, ...)."""

    def all_gather(self, part: Tensor) -> Tensor:
        """Return the parts of all processes, (size, ...)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One process's view of a forward that is cut: which tokens are its own, and the exchanges."""

    among: Exchange

    def own(self, length: int) -> slice:
        """Return which of ``length`` tokens are computed here; raises ValueError for a rest."""
        each, rest = divmod(length, self.among.size)
        if rest:
            raise ValueError(f"{length} tokens cannot be cut into {self.among.size} equal parts")
        return slice(self.among.rank * each, (self.among.rank + 1) * each)

    def heads(self, heads: int) -> int:
        """Return how many of ``heads`` are attended to here; raises ValueError for a rest."""
        each, rest = divmod(heads, self.among.size)
        if rest:
            raise ValueError(f"{heads} heads cannot be shared out to {self.among.size} processes")
        return each

    def to_heads(self, states: Tensor) -> Tensor:
        """Turn own tokens of all heads, (B, L / n, D), into all tokens of own heads, (B, L, D / n).

        ``states`` is read only.
        """
        batch, tokens, width = states.shape
        size = self.among.size
        parts = states.reshape(batch, tokens, size, width // size).permute(2, 0, 1, 3)
        given = self.among.all_to_all(parts.contiguous())
        return given.transpose(0, 1).reshape(batch, size * tokens, width // size)

    def to_tokens(self, states: Tensor) -> Tensor:
        """Turn all tokens of own heads, (B, L, D / n), into own tokens of all heads."""
        batch, tokens, width = states.shape
        size = self.among.size
        parts = states.reshape(batch, size, tokens // size, width).transpose(0, 1)
        given = self.among.all_to_all(parts.contiguous())
        return given.permute(1, 2, 0, 3).reshape(batch, tokens // size, size * width)

    def whole(self, part: Tensor) -> Tensor:
        """Return the tokens of all processes, (B, L, D), of own ones (B, L / n, D)."""
        gathered = self.among.all_gather(part.contiguous())
        return gathered.transpose(0, 1).reshape(part.shape[0], -1, part.shape[2])

    def embedding(self, temb: Tensor | TimestepRuns, length: int) -> Tensor | TimestepRuns:
        """Return the part of a timestep embedding that own tokens read; see ``Modulation``."""
        own = self.own(length)
        if isinstance(temb, TimestepRuns):
            ends = (*temb.starts[1:], length)
            seen = [
                run
                for run, (begin, end) in enumerate(zip(temb.starts, ends, strict=True))
                if begin < own.stop and end > own.start
            ]
            starts = tuple(max(0, temb.starts[run] - own.start) for run in seen)
            return TimestepRuns(temb.values[:, seen[0] : seen[-1] + 1], starts)
        return temb[:, own] if temb.ndim == 4 else temb

    def rotary(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the rows of cos and sin (1, L, 1, d) that own tokens are turned by."""
        cos, sin = tables
        own = self.own(cos.shape[1])
        return cos[:, own], sin[:, own]

    def residual(self, whole: Tensor | None) -> Tensor | None:
        """Return own tokens of what blocks add, (B, L, D); None stays None."""
        return None if whole is None else whole[:, self.own(whole.shape[1])].contiguous()


def alike(first: Tensor, second: Tensor) -> tuple[bool, float]:
    """Compare results: whether every bit is equal, and the relative error of the second."""
    if torch.equal(first, second):
        return True, 0.0
    wide = first.float()
    return False, float((second.float() - wide).norm() / wide.norm())
