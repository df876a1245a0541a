"""Which streamed block lies in which device buffer at which time: pure arithmetic.

Knows neither tensors nor devices, so that every sequence of calls can be tested on its own.
``streaming`` asks before each block's forward and a ``Transport`` carries the answer out.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidRequest
from ..memory import spread


@dataclass(frozen=True, slots=True)
class Load:
    """An instruction to copy the weights of ``block`` into device buffer ``buffer``."""

    block: int
    buffer: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What to do before a block's forward, in this order.

    ``free``: buffers whose contents are no longer needed. ``loads``: copies to begin. ``use``: the
    buffer that holds the block itself, or None for a resident block.
    """

    free: tuple[int, ...] = ()
    loads: tuple[Load, ...] = ()
    use: int | None = None


class BufferSchedule:
    """Decides which streamed block is in which buffer as the blocks compute one after the other.

    Blocks are loaded in the order in which they compute. After the last block comes the first one
    again, for the next forward. Loads run as many blocks ahead as there are buffers. A block that
    is in no buffer when it is called (the forward before it was interrupted, or there is only one
    buffer) is loaded at that moment.
    """

    def __init__(self, blocks: int, resident: int, buffers: int) -> None:
        if not 0 <= resident <= blocks:
            raise InvalidRequest(
                f"resident_blocks is {resident}; the model has {blocks}, so 0..{blocks} is "
                "allowed.", field="resident_blocks",
            )  # fmt: skip
        if buffers < 1:
            raise InvalidRequest(f"buffers is {buffers}; at least 1 is needed.", field="buffers")
        self.resident = spread(blocks, resident)
        self.streamed = tuple(i for i in range(blocks) if i not in set(self.resident))
        self.buffers = min(buffers, len(self.streamed))
        self._rank = {block: rank for rank, block in enumerate(self.streamed)}
        self._held: dict[int, int] = {}
        self._current: int | None = None

    def start(self) -> tuple[Load, ...]:
        """Return the loads that fill the buffers before the first forward."""
        return self._fill(0, list(range(self.buffers)))

    def reset(self) -> tuple[int, ...]:
        """Forget what the buffers hold; return those that held something."""
        freed = tuple(sorted(self._held.values()))
        self._held.clear()
        self._current = None
        return freed

    def turn(self, block: int) -> Turn:
        """Return what to do before ``block`` computes; the same block may come several times."""
        if block == self._current:
            return Turn(use=self._held.get(block))
        free: tuple[int, ...] = ()
        loads: tuple[Load, ...] = ()
        last, self._current = self._current, block
        if block in self._rank and block not in self._held:
            # Called out of order, as after an interrupt: what was loaded ahead is of no use, so
            # loading begins anew at this block.
            free = tuple(sorted(self._held.values()))
            self._held.clear()
            loads = self._fill(self._rank[block], list(range(self.buffers)))
        elif last in self._held and len(self.streamed) > self.buffers:
            # The block before this one has been queued, so its buffer is the one to load into next.
            # It cannot be given up earlier: the block may be called again (the second guidance
            # pass), and only the call of another block shows that it is done. Where every streamed
            # block has a buffer of its own, nothing is ever replaced.
            assert last is not None
            buffer = self._held.pop(last)
            free = (buffer,)
            loads = self._fill(self._rank[last] + 1, [buffer])
        return Turn(free, loads, self._held.get(block))

    def _fill(self, rank: int, buffers: list[int]) -> tuple[Load, ...]:
        """Assign ``buffers`` to the next streamed blocks from ``rank`` on that are in none yet."""
        loads = []
        for step in range(len(self.streamed)):
            if not buffers:
                break
            block = self.streamed[(rank + step) % len(self.streamed)]
            if block not in self._held:
                self._held[block] = buffers.pop(0)
                loads.append(Load(block, self._held[block]))
        return tuple(loads)
