"""Which streamed block is in which device buffer, as blocks take their turns: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Load:
    """Bring ``block`` into ``buffer``."""

    block: int
    buffer: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What happens before a block computes: buffers given up, loads begun, the buffer to use.

    ``use`` is None for a resident block.
    """

    free: tuple[int, ...] = ()
    loads: tuple[Load, ...] = ()
    use: int | None = None


def spread(blocks: int, resident: int) -> tuple[int, ...]:
    """Return which of ``blocks`` stay on the device when ``resident`` do, evenly spread."""
    return tuple(i for i in range(blocks) if (i + 1) * resident // blocks > i * resident // blocks)


class BufferSchedule:
    """Decides which streamed block is in which buffer, as the blocks take their turns.

    Loads go in the order of the blocks and around the end, as far ahead as there are buffers. A
    block that is not there at its turn (the first step, or one after an interrupt) is loaded then.
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
        """Return the loads to begin with."""
        return self._fill(0, list(range(self.buffers)))

    def turn(self, block: int) -> Turn:
        """Return what to do before ``block`` computes. A block may take several turns in a row."""
        if block == self._current:
            return Turn(use=self._held.get(block))
        free: tuple[int, ...] = ()
        loads: tuple[Load, ...] = ()
        last, self._current = self._current, block
        if block in self._rank and block not in self._held:  # out of order: begin anew from here
            free = tuple(sorted(self._held.values()))
            self._held.clear()
            loads = self._fill(self._rank[block], list(range(self.buffers)))
        elif last in self._held and len(self.streamed) > self.buffers:
            assert last is not None
            buffer = self._held.pop(last)
            free = (buffer,)
            loads = self._fill(self._rank[last] + 1, [buffer])
        return Turn(free, loads, self._held.get(block))

    def _fill(self, rank: int, buffers: list[int]) -> tuple[Load, ...]:
        """Load the next streamed blocks from ``rank`` on that are not held into free buffers."""
        loads = []
        for step in range(len(self.streamed)):
            if not buffers:
                break
            block = self.streamed[(rank + step) % len(self.streamed)]
            if block not in self._held:
                self._held[block] = buffers.pop(0)
                loads.append(Load(block, self._held[block]))
        return tuple(loads)
