"""Streamed weights of a gang: each process copies its part of a block, and all gather the rest.

The processes of a gang compute the same blocks at the same time. Where the link between their cards
is faster than the bus to RAM, n of them need not copy a block n times: each copies one n-th, and
the bytes are gathered on the cards while the block before computes. They are the same bytes.

All processes have to gather the same blocks in the same order, and begin that at the same places of
a forward, among its own exchanges. A unit that one computes alone copies whole blocks; the buffers
then begin anew, in all processes, with the next unit they share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from .transport import Pending

_ALIGN = 256


class Gathering(Protocol):
    """What the processes that share weights have in common."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""

    @property
    def size(self) -> int:
        """How many they are."""

    def begin_gather(self, whole: Tensor) -> Pending:
        """Begin to fill in the parts of the others; ``whole`` (size x k bytes) has this one's.

        Gathers are done in the order in which they begin, and no other exchange waits for them.
        """

    def all_say(self, word: bool) -> bool:
        """Return whether all say yes."""


class Sharing:
    """One process's view of streamed weights that a gang may share."""

    def __init__(self, among: Gathering) -> None:
        self.among = among
        self.on = False
        """Whether blocks are loaded in parts: while the gang computes a unit together."""
        self.copied_bytes = 0
        """What was copied from RAM, in both ways."""
        self.at_once = False
        """Whether a gather begins with its copy, in all processes; else where the block is used."""
        self._alone = True
        self._can_at_once = True
        self._anew: Callable[[], object] = lambda: None

    def attach(self, anew: Callable[[], object], *, at_once: bool = True) -> None:
        """Have ``anew`` called when what the buffers hold counts no more.

        ``at_once`` says whether this process knows at once when a copy has begun: not where a
        thread first brings it into page-locked memory.
        """
        self._anew, self._can_at_once = anew, at_once

    def begin(self, *, together: bool) -> None:
        """Begin a unit that the gang computes together, or this process alone.

        To be called by all of them, or by rank 0 alone, which decides: only it computes alone.
        """
        anew = self.on != together
        if together:
            # Also where one of them has put its weights in their place again: whoever gathers
            # blocks that another has whole would be given bytes of other blocks.
            anew = not self.among.all_say(not self._alone)
            if anew:
                self.at_once = self.among.all_say(self._can_at_once)
        self.on, self._alone = together, not together
        if anew:
            self._anew()

    def room(self, nbytes: int) -> int:
        """Return the bytes that a buffer for a block of ``nbytes`` needs: equal parts."""
        return self._each(nbytes) * self.among.size

    def part(self, nbytes: int) -> slice:
        """Return which bytes of a block are copied here."""
        return self.own(nbytes) if self.on else slice(0, nbytes)

    def own(self, nbytes: int) -> slice:
        """Return which bytes of a block are copied here while the gang computes together."""
        begin = self._each(nbytes) * self.among.rank
        return slice(min(begin, nbytes), min(begin + self._each(nbytes), nbytes))

    def gather(self, buffer: Tensor, nbytes: int) -> Pending:
        """Begin to gather the other parts of a block into the buffer that gets this one's."""
        return self.among.begin_gather(buffer[: self.room(nbytes)])

    def _each(self, nbytes: int) -> int:
        return -(-nbytes // (self.among.size * _ALIGN)) * _ALIGN
