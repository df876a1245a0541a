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


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> object:
        """Have what is computed from now on find what was exchanged."""


class Exchange(Protocol):
    """What the processes that share a forward have in common: their number, and how they talk."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""

    @property
    def size(self) -> int:
        """How many they are."""

    def begin_exchange(self, given: Tensor, parts: Tensor) -> Pending:
        """Begin to give away the rows of ``parts``, and to fill those of ``given``, in order.

        Both have a row for each process, or for each other one, and are contiguous. What is
        computed meanwhile does not wait; neither may be touched before the exchange was waited for.
        """

    def all_gather(self, part: Tensor) -> Tensor:
        """Return the parts of all processes, (size, ...)."""


@dataclass(slots=True)
class Arriving:
    """All tokens of own heads, of which some are on their way."""

    _held: list[Tensor]
    """What is filled, (size, B, L / size, D / size), and what is sent."""
    _pending: list[Pending]

    def wait(self) -> Tensor:
        """Return them, (B, L, D / size); to be called once."""
        self._pending[0].wait()
        given = self._held[0]
        # What was sent, and the exchange, which may hold both, make way for a copy in order.
        self._held.clear()
        self._pending.clear()
        size, batch, tokens, width = given.shape
        return given.transpose(0, 1).reshape(batch, size * tokens, width)


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

    def to_heads(self, states: Tensor) -> Arriving:
        """Begin to turn own tokens of all heads, (B, L / n, D), into all tokens of own heads.

        Those are (B, L, D / n). ``states`` is read only, and may be let go at once.
        """
        size, rank, there = self.among.size, self.among.rank, self._partners
        lanes = torch.unflatten(states, 2, (size, -1)).permute(2, 0, 1, 3)
        given = torch.empty_like(lanes, memory_format=torch.contiguous_format)
        parts = lanes[there].contiguous()
        arriving = Arriving([given, parts], [self.among.begin_exchange(given[there], parts)])
        if size == 2:
            given[rank] = lanes[rank]
        return arriving

    def to_tokens(self, states: Tensor) -> Tensor:
        """Turn all tokens of own heads, (B, L, D / n), into own tokens of all heads."""
        size, rank, there = self.among.size, self.among.rank, self._partners
        rows = torch.unflatten(states, 1, (size, -1)).transpose(0, 1)
        parts = rows[there].contiguous()
        given = torch.empty_like(parts)
        pending = self.among.begin_exchange(given, parts)
        whole = states.new_empty(*rows.shape[1:3], size, rows.shape[3])
        if size == 2:
            whole[:, :, rank] = rows[rank]
        pending.wait()
        whole[:, :, there] = given.permute(1, 2, 0, 3)
        return whole.flatten(2)

    @property
    def _partners(self) -> slice:
        """Return who is given a part: of two the other one, of more all, as one run of rows.

        What a process of two keeps is put in its place while the rest is on its way.
        """
        other = 1 - self.among.rank
        return slice(other, other + 1) if self.among.size == 2 else slice(None)

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
